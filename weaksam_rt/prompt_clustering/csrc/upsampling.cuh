// Bilinear upsampling of a low-resolution map, one pixel at a time; the large map is never stored.
//
// Along one axis, pixel i lies between the nodes ``low`` and ``low + 1`` at ``weight``: half-pixel
// centres, edges repeated. The pixels that share ``low`` on both axes form a *cell*. Within a cell
// and a column the value is t + w * (b - t) with a weight that never falls from row to row, hence
// monotonic, after rounding too: its extremes stand in the cell's first and last row. All searches
// below visit those two rows only and are exact.
#pragma once

#include "execution.cuh"

struct AxisSample {
    int low;
    float weight;
};

__device__ inline AxisSample sample_axis(int position, int num_out, int num_in) {
    const double ratio = static_cast<double>(num_in) / static_cast<double>(num_out);
    const double centre = (position + 0.5) * ratio - 0.5;
    const double clamped = centre > 0.0 ? centre : 0.0;
    const int low = min(static_cast<int>(clamped), num_in - 1);
    return {low, static_cast<float>(clamped - low)};
}

__device__ inline float interpolate(float start, float end, float weight) {
    return start + weight * (end - start);
}

// One map at image resolution, computed where it is looked at.
struct UpsampledMap {
    const float* nodes;
    int rows, columns;
    int height, width;
    const AxisSample* y_samples;
    const AxisSample* x_samples;
    // Where the pixels of each row and column of cells begin; one entry more than there are.
    const int* row_starts;
    const int* column_starts;

    __device__ float at(int y, int x) const {
        const AxisSample down = y_samples[y];
        const AxisSample right = x_samples[x];
        const int next = min(right.low + 1, columns - 1);
        const float* top = nodes + down.low * columns;
        const float* bottom = nodes + min(down.low + 1, rows - 1) * columns;
        return interpolate(interpolate(top[right.low], top[next], right.weight),
                           interpolate(bottom[right.low], bottom[next], right.weight),
                           down.weight);
    }
};

// Samples and cell borders of both axes of every image.
//
// Grid: (images, 2); y is the axis, 0 rows, 1 columns.
//   image_sizes    [images, 2]      (height, width)
//   sample_starts  [images, 2]      where the samples of each axis begin
//   samples        [sum of sides]   out
//   cell_starts    [images, rows + 1 + columns + 1]   out
extern "C" __global__ void axis_tables(const int* image_sizes, const int* sample_starts, int rows,
                                       int columns, AxisSample* samples, int* cell_starts) {
    const int image = blockIdx.x;
    const int axis = blockIdx.y;
    const int num_in = axis == 0 ? rows : columns;
    const int num_out = image_sizes[2 * image + axis];
    AxisSample* out = samples + sample_starts[2 * image + axis];
    int* starts = cell_starts + image * (rows + columns + 2) + (axis == 0 ? 0 : rows + 1);
    for (int i = threadIdx.x; i < num_out; i += blockDim.x) {
        const AxisSample sample = sample_axis(i, num_out, num_in);
        const int previous = i == 0 ? -1 : sample_axis(i - 1, num_out, num_in).low;
        out[i] = sample;
        for (int cell = previous + 1; cell <= sample.low; ++cell) starts[cell] = i;
        if (i == num_out - 1)
            for (int cell = sample.low + 1; cell <= num_in; ++cell) starts[cell] = num_out;
    }
}

// Low-resolution mask logits to box, stability score and area, one mask a block.
//
// Edges of the box lie where the row and column maxima of the logits, interpolated between cell
// centres, cross the threshold. Logits are clamped to +-1e30 and NaN counts as -1e30: a broken
// logit is outside its mask.
#pragma once

#include "execution.cuh"

constexpr float mask_thresh = 0.0f;
constexpr float stability_offset = 1.0f;
constexpr float logit_limit = 1e30f;

struct MaskFrame {
    int valid_height, valid_width, model_size;
    int image_height, image_width;
};

struct MaskCounts {
    int inner, outer, inside;
};

// Cells are walked in strips of rows. So many threads share a row: neighbours read neighbouring
// cells and keep what they find in registers. One shared address for the whole row would make them
// wait for each other at every cell.
constexpr int strip_rows = 32;
constexpr int row_lanes = 32;

// A row's maxima, one a lane. The odd pitch puts the lanes of 32 rows into 32 banks.
struct StripMaxima {
    unsigned int of_lane[strip_rows][row_lanes + 1];
};

__device__ inline float usable_logit(float logit) {
    if (!(logit > -logit_limit)) return -logit_limit;
    return logit < logit_limit ? logit : logit_limit;
}

__device__ inline int valid_cells(int valid, int side, int model_size) {
    return max(1, (valid * side + model_size - 1) / model_size);
}

// Where the profile crosses the threshold beside its outermost cell that is inside, in cells.
__device__ inline double profile_edge(const unsigned int* profile, int size, int inside,
                                      int step) {
    const int outside = inside + step;
    if (outside < 0 || outside >= size) return inside + (step < 0 ? 0 : 1);
    const float value_in = float_from_ordered(profile[inside]) - mask_thresh;
    const float value_out = float_from_ordered(profile[outside]) - mask_thresh;
    const float drop = max(value_in - value_out, 1e-12f);
    const float share = min(max(value_in / drop, 0.0f), 1.0f);
    return inside + 0.5 + step * static_cast<double>(share);
}

__device__ inline int outermost_inside(const unsigned int* profile, int size, int step) {
    int i = step > 0 ? 0 : size - 1;
    while (0 <= i && i < size && !(float_from_ordered(profile[i]) > mask_thresh)) i += step;
    return i;
}

// From cells to pixels of the image; the padding of the frame is cut off.
__device__ inline float image_coordinate(double edge, double stride, int valid, int image) {
    const double in_frame = min(max(edge * stride, 0.0), static_cast<double>(valid));
    return static_cast<float>(in_frame / (static_cast<double>(valid) / image));
}

__device__ inline void write_box(const unsigned int* column_max, const unsigned int* row_max,
                                 int width, int height, double stride, const MaskFrame& frame,
                                 float* box) {
    const double left = profile_edge(column_max, width, outermost_inside(column_max, width, 1), -1);
    const double right =
        profile_edge(column_max, width, outermost_inside(column_max, width, -1), 1);
    const double top = profile_edge(row_max, height, outermost_inside(row_max, height, 1), -1);
    const double bottom = profile_edge(row_max, height, outermost_inside(row_max, height, -1), 1);
    box[0] = image_coordinate(left, stride, frame.valid_width, frame.image_width);
    box[1] = image_coordinate(top, stride, frame.valid_height, frame.image_height);
    box[2] = image_coordinate(right, stride, frame.valid_width, frame.image_width);
    box[3] = image_coordinate(bottom, stride, frame.valid_height, frame.image_height);
}

// The part of rows [first, first + strip_rows) that a thread has: counts to ``own``, column maxima to
// ``column_max``, row maxima to ``strip``.
__device__ inline void walk_strip(const float* logits, int side, int first, int height, int width,
                                  unsigned int* column_max, StripMaxima& strip, MaskCounts& own) {
    for (int i = threadIdx.x; i < strip_rows * row_lanes; i += blockDim.x) {
        const int row = i / row_lanes;
        const int lane = i % row_lanes;
        if (first + row >= height) return;
        const float* cells = logits + static_cast<long long>(first + row) * side;
        unsigned int highest = 0;
        for (int x = lane; x < width; x += row_lanes) {
            const float logit = usable_logit(cells[x]);
            own.inner += logit > mask_thresh + stability_offset;
            own.outer += logit > mask_thresh - stability_offset;
            own.inside += logit > mask_thresh;
            highest = max(highest, ordered_from_float(logit));
            atomicMax(&column_max[x], ordered_from_float(logit));
        }
        strip.of_lane[row][lane] = highest;
    }
}

// The maxima of the lanes to one a row.
__device__ inline void join_lanes(const StripMaxima& strip, int first, int height,
                                  unsigned int* row_max) {
    for (int row = threadIdx.x; row < strip_rows && first + row < height; row += blockDim.x) {
        unsigned int highest = 0;
        for (int lane = 0; lane < row_lanes; ++lane)
            highest = max(highest, strip.of_lane[row][lane]);
        row_max[first + row] = highest;
    }
}

// Grid: masks. Dynamic shared memory: 2 * side * 4 bytes.
//   logits       [masks, side, side]   over the model frame
//   mask_images  [masks]               position in ``frames``
//   boxes        [masks, 4]            out, XYXY in pixels of the image; zeros for an empty mask
//   stability    [masks]               out, in [0, 1]
//   areas        [masks]               out, square pixels of the image
extern "C" __global__ void __launch_bounds__(256, 2)
    summarize_masks(const float* logits, int side, const int* mask_images,
                    const MaskFrame* frames, float* boxes, float* stability, float* areas) {
    DYNAMIC_SHARED(dynamic);
    __shared__ MaskCounts counts;
    __shared__ StripMaxima strip;
    unsigned int* column_max = reinterpret_cast<unsigned int*>(dynamic);
    unsigned int* row_max = column_max + side;
    const int mask = blockIdx.x;
    const MaskFrame frame = frames[mask_images[mask]];
    const int height = valid_cells(frame.valid_height, side, frame.model_size);
    const int width = valid_cells(frame.valid_width, side, frame.model_size);
    for (int i = threadIdx.x; i < side; i += blockDim.x) column_max[i] = 0;
    if (threadIdx.x == 0) counts = {0, 0, 0};
    __syncthreads();
    MaskCounts own = {0, 0, 0};
    const float* of_mask = logits + static_cast<long long>(mask) * side * side;
    for (int first = 0; first < height; first += strip_rows) {
        walk_strip(of_mask, side, first, height, width, column_max, strip, own);
        __syncthreads();
        join_lanes(strip, first, height, row_max);
        __syncthreads();
    }
    atomicAdd(&counts.inner, own.inner);
    atomicAdd(&counts.outer, own.outer);
    atomicAdd(&counts.inside, own.inside);
    __syncthreads();
    if (threadIdx.x != 0) return;
    const double stride = static_cast<double>(frame.model_size) / side;
    const double cell_width = stride / (static_cast<double>(frame.valid_width) / frame.image_width);
    const double cell_height =
        stride / (static_cast<double>(frame.valid_height) / frame.image_height);
    stability[mask] = static_cast<float>(static_cast<double>(counts.inner) / max(counts.outer, 1));
    areas[mask] = static_cast<float>(counts.inside * (cell_width * cell_height));
    float* box = boxes + 4LL * mask;
    box[0] = box[1] = box[2] = box[3] = 0.0f;
    if (counts.inside > 0)
        write_box(column_max, row_max, width, height, stride, frame, box);
}

// One image whose size and classes only the GPU knows: what an engine hands to the prompt chain.
//
// Its maps are coarse [classes], fine [classes], cross-attention [layers][classes]. An image is
// refused when its size is out of range, or a tag is unknown or comes twice: then it counts as one
// pixel, so that no other kernel leaves its buffers, and its counts come out as -1.
#pragma once

#include "packing.cuh"

// As longest_side_frame of weaksam_rt.preprocessing.
__device__ inline FrameScale frame_scale(int height, int width, int model_size) {
    const double scale = static_cast<double>(model_size) / (height > width ? height : width);
    const int valid_height = static_cast<int>(height * scale + 0.5);
    const int valid_width = static_cast<int>(width * scale + 0.5);
    return {static_cast<double>(valid_width < 1 ? 1 : valid_width) / width,
            static_cast<double>(valid_height < 1 ? 1 : valid_height) / height};
}

// Grid: 1.
//   tag_ids        [classes] class of each tag, below num_known
//   image_size     (height, width) in pixels
//   map_classes    [maps]    out
//   image_sizes    [1, 2]    out
//   frame_scales   [1]       out
//   is_taken       [1]       out, 0 where the image is refused
extern "C" __global__ void describe_image(const int* tag_ids, const int* image_size,
                                          int num_classes, int num_maps, int num_known,
                                          int model_size, int max_side, int* map_classes,
                                          int* image_sizes, FrameScale* frame_scales,
                                          int* is_taken) {
    __shared__ int num_faults;
    const int height = image_size[0];
    const int width = image_size[1];
    if (threadIdx.x == 0) {
        const bool has_size = 1 <= height && height <= max_side && 1 <= width && width <= max_side;
        num_faults = has_size ? 0 : 1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_classes; i += blockDim.x) {
        bool is_fine = 0 <= tag_ids[i] && tag_ids[i] < num_known;
        for (int earlier = 0; earlier < i; ++earlier) is_fine &= tag_ids[earlier] != tag_ids[i];
        if (!is_fine) atomicAdd(&num_faults, 1);
    }
    for (int map = threadIdx.x; map < num_maps; map += blockDim.x)
        map_classes[map] = tag_ids[map % num_classes];
    __syncthreads();
    if (threadIdx.x != 0) return;
    const bool is_taken_in = num_faults == 0;
    image_sizes[0] = is_taken_in ? height : 1;
    image_sizes[1] = is_taken_in ? width : 1;
    frame_scales[0] = frame_scale(image_sizes[0], image_sizes[1], model_size);
    is_taken[0] = is_taken_in ? 1 : 0;
}

// Grid: 1.
//   counts         [1]   out, of the image's prompts; -1 each where it was refused
extern "C" __global__ void count_outputs(const int* is_taken, const BatchCounts* totals,
                                         BatchCounts* counts) {
    if (threadIdx.x != 0) return;
    if (is_taken[0])
        counts[0] = totals[0];
    else
        counts[0] = {-1, -1, -1};
}

// Low-resolution mask logits to masks at image resolution, as bits and as run lengths.
//
// The order of pixels is COCO's: down the columns. A pixel's logit is interpolated twice, as SAM
// does it: to the model frame, whose padding is cut off, and to the image. Neither the frame nor
// the image's logits are ever written.
#pragma once

#include "masks.cuh"
#include "upsampling.cuh"

struct MaskPixels {
    const float* logits;
    int side;
    const AxisSample* to_frame;  // [model size], the same along both axes
    const AxisSample* rows;      // [image height], between rows of the valid frame
    const AxisSample* columns;   // [image width]
    int valid_height, valid_width;

    __device__ float in_frame(int y, int x) const {
        const AxisSample down = to_frame[y];
        const AxisSample right = to_frame[x];
        const int next = min(right.low + 1, side - 1);
        const float* top = logits + down.low * side;
        const float* bottom = logits + min(down.low + 1, side - 1) * side;
        return interpolate(interpolate(usable_logit(top[right.low]), usable_logit(top[next]),
                                       right.weight),
                           interpolate(usable_logit(bottom[right.low]),
                                       usable_logit(bottom[next]), right.weight),
                           down.weight);
    }
    __device__ bool is_inside(int y, int x) const {
        const AxisSample down = rows[y];
        const AxisSample right = columns[x];
        const int below = min(down.low + 1, valid_height - 1);
        const int next = min(right.low + 1, valid_width - 1);
        const float top =
            interpolate(in_frame(down.low, right.low), in_frame(down.low, next), right.weight);
        const float bottom =
            interpolate(in_frame(below, right.low), in_frame(below, next), right.weight);
        return interpolate(top, bottom, down.weight) > mask_thresh;
    }
};

// Grid: (masks, any).
//   logits         [masks, side, side]   over the model frame
//   mask_images    [masks]               position in ``frames``
//   to_frame       [model size]
//   to_image       [sum of image sides]  rows, then columns, of each image
//   sample_starts  [images, 2]           where those of each image begin
//   word_starts    [masks + 1]           first word of each mask
//   bits           [words]               out, 32 pixels a word, the lowest bit first; what is left
//                                        of a mask's last word is 0
extern "C" __global__ void __launch_bounds__(256, 2)
    pack_masks(const float* logits, int side, const int* mask_images, const MaskFrame* frames,
               const AxisSample* to_frame, const AxisSample* to_image, const int* sample_starts,
               const int* word_starts, unsigned int* bits) {
    const int mask = blockIdx.x;
    const int image = mask_images[mask];
    const MaskFrame frame = frames[image];
    const MaskPixels pixels = {logits + static_cast<long long>(mask) * side * side,
                               side,
                               to_frame,
                               to_image + sample_starts[2 * image],
                               to_image + sample_starts[2 * image + 1],
                               frame.valid_height,
                               frame.valid_width};
    const int num_words = word_starts[mask + 1] - word_starts[mask];
    for (int word = blockIdx.y * blockDim.x + threadIdx.x; word < num_words;
         word += gridDim.y * blockDim.x) {
        unsigned int packed = 0;
        int x = static_cast<int>(32LL * word / frame.image_height);
        int y = static_cast<int>(32LL * word % frame.image_height);
        for (int bit = 0; bit < 32 && x < frame.image_width; ++bit) {
            packed |= (pixels.is_inside(y, x) ? 1u : 0u) << bit;
            if (++y == frame.image_height) y = 0, ++x;
        }
        bits[word_starts[mask] + word] = packed;
    }
}

// The pixels of a word that differ from the pixel before; before the first one is outside.
__device__ inline unsigned int changes_of_word(const unsigned int* bits, int word, int num_pixels) {
    const unsigned int before = word == 0 ? 0u : bits[word - 1] >> 31;
    const unsigned int changes = bits[word] ^ (bits[word] << 1 | before);
    const int left = num_pixels - 32 * word;
    return left >= 32 ? changes : changes & ((1u << left) - 1);
}

__device__ inline int pixels_of_mask(const int* mask_images, const MaskFrame* frames, int mask) {
    const MaskFrame& frame = frames[mask_images[mask]];
    return frame.image_height * frame.image_width;
}

// Grid: masks.
//   run_counts  [masks]   out, runs of outside and inside in turn, the first of outside
extern "C" __global__ void count_runs(const int* mask_images, const MaskFrame* frames,
                                      const int* word_starts, const unsigned int* bits,
                                      int* run_counts) {
    __shared__ int num_changes;
    const int mask = blockIdx.x;
    if (threadIdx.x == 0) num_changes = 0;
    __syncthreads();
    const int num_pixels = pixels_of_mask(mask_images, frames, mask);
    const int num_words = word_starts[mask + 1] - word_starts[mask];
    int own = 0;
    for (int word = threadIdx.x; word < num_words; word += blockDim.x)
        own += __popc(changes_of_word(bits + word_starts[mask], word, num_pixels));
    atomicAdd(&num_changes, own);
    __syncthreads();
    if (threadIdx.x == 0) run_counts[mask] = num_changes + 1;
}

// What a thread knows of its words in ``write_runs``.
struct ChangesOfThread {
    int count, last;  // number, and the last one's pixel
};

// Grid: masks. Dynamic shared memory: 8 bytes a thread.
//   capacity     room in ``runs``
//   runs         [runs]        out, lengths
//   run_offsets  [masks + 1]   out, first run of each mask; above the capacity ``runs`` is not valid
extern "C" __global__ void write_runs(const int* mask_images, const MaskFrame* frames,
                                      const int* word_starts, const unsigned int* bits,
                                      const int* run_counts, int capacity, int* runs,
                                      int* run_offsets) {
    DYNAMIC_SHARED(dynamic);
    __shared__ int first_run;
    ChangesOfThread* changes = reinterpret_cast<ChangesOfThread*>(dynamic);
    const int mask = blockIdx.x;
    const unsigned int* words = bits + word_starts[mask];
    const int num_words = word_starts[mask + 1] - word_starts[mask];
    const int num_pixels = pixels_of_mask(mask_images, frames, mask);
    const int share = (num_words + blockDim.x - 1) / blockDim.x;
    const int begin = min(num_words, static_cast<int>(threadIdx.x) * share);
    const int end = min(num_words, begin + share);

    if (threadIdx.x == 0) first_run = 0;
    ChangesOfThread own = {0, 0};
    for (int word = begin; word < end; ++word) {
        const unsigned int found = changes_of_word(words, word, num_pixels);
        own.count += __popc(found);
        if (found != 0) own.last = 32 * word + 31 - __clz(static_cast<int>(found));
    }
    changes[threadIdx.x] = own;
    __syncthreads();
    for (int other = threadIdx.x; other < mask; other += blockDim.x)
        atomicAdd(&first_run, run_counts[other]);
    __syncthreads();
    const bool is_last = mask + 1 == static_cast<int>(gridDim.x);
    if (threadIdx.x == 0) {
        run_offsets[mask] = first_run;
        if (is_last) run_offsets[mask + 1] = first_run + run_counts[mask];
    }
    if (first_run > capacity - run_counts[mask]) return;
    int run = first_run;
    int previous = 0;
    for (int thread = 0; thread < static_cast<int>(threadIdx.x); ++thread) {
        run += changes[thread].count;
        if (changes[thread].count > 0) previous = changes[thread].last;
    }
    for (int word = begin; word < end; ++word)
        for (unsigned int left = changes_of_word(words, word, num_pixels); left != 0;
             left &= left - 1) {
            const int pixel = 32 * word + __ffs(static_cast<int>(left)) - 1;
            runs[run++] = pixel - previous;
            previous = pixel;
        }
    if (threadIdx.x + 1 == blockDim.x) runs[run] = num_pixels - previous;
}

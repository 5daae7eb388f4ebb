// Class-wise greedy non-maximum suppression by bit masks.
//
// Three kernels: the order of the boxes by score, some rows of a matrix of bits that says which
// better box suppresses which, and a walk over these rows. The last two take turns until all rows
// are walked, so that the memory of a part is enough. IoU is computed as in weaksam_rt.boxes.
#pragma once

#include "execution.cuh"

typedef unsigned long long Bits;

// NaN scores come last, as NumPy sorts them.
__device__ inline bool is_better(float score, int index, float other_score, int other_index) {
    const bool is_nan = score != score;
    const bool other_is_nan = other_score != other_score;
    if (is_nan != other_is_nan) return other_is_nan;
    if (!is_nan && score != other_score) return score > other_score;
    return index < other_index;
}

// Grid: any.
//   order  [boxes]   out, indices of the boxes, best score first, ties by index
extern "C" __global__ void nms_order(const float* scores, int num_boxes, int* order) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_boxes;
         i += gridDim.x * blockDim.x) {
        int rank = 0;
        for (int other = 0; other < num_boxes; ++other)
            rank += is_better(scores[other], other, scores[i], i);
        order[rank] = i;
    }
}

__device__ inline float box_area(const float* box) {
    return max(box[2] - box[0], 0.0f) * max(box[3] - box[1], 0.0f);
}

// A box with a coordinate that is not finite overlaps nothing.
__device__ inline bool is_finite_box(const float* box) {
    return is_finite(box[0]) && is_finite(box[1]) && is_finite(box[2]) && is_finite(box[3]);
}

__device__ inline float box_iou(const float* box, const float* other) {
    if (!is_finite_box(box) || !is_finite_box(other)) return 0.0f;
    const float width = min(box[2], other[2]) - max(box[0], other[0]);
    const float height = min(box[3], other[3]) - max(box[1], other[1]);
    const float intersection = max(width, 0.0f) * max(height, 0.0f);
    const float overlap = box_area(box) + box_area(other) - intersection;
    return overlap > 0.0f ? intersection / overlap : 0.0f;
}

// Grid: any.
//   first_rank, num_rows   the ranks whose rows are made
//   conflicts  [rows, ceil(boxes / 64)]   out; bit j of row i: the box of rank first_rank + i
//                                         suppresses that of a greater rank j
extern "C" __global__ void nms_conflicts(const float* boxes, const int* labels, const int* order,
                                         int num_boxes, int first_rank, int num_rows,
                                         float iou_thresh, Bits* conflicts) {
    const int num_words = (num_boxes + 63) / 64;
    const long long num_all = static_cast<long long>(num_rows) * num_words;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_all;
         i += static_cast<long long>(gridDim.x) * blockDim.x) {
        const int rank = first_rank + static_cast<int>(i / num_words);
        const int first = static_cast<int>(i % num_words) * 64;
        const int box = order[rank];
        Bits bits = 0;
        for (int other_rank = max(first, rank + 1); other_rank < min(first + 64, num_boxes);
             ++other_rank) {
            const int other = order[other_rank];
            if (labels[box] == labels[other] &&
                box_iou(boxes + 4LL * box, boxes + 4LL * other) > iou_thresh)
                bits |= Bits{1} << (other_rank - first);
        }
        conflicts[i] = bits;
    }
}

// Grid: 1. Dynamic shared memory: ceil(boxes / 64) * 8 bytes.
//   first_rank, num_rows   the ranks whose rows ``conflicts`` has; the part that begins with rank 0
//                          comes first
//   suppressed_so_far  [ceil(boxes / 64)]   in and out: from one part to the next
//   kept      [boxes]   out, indices of the boxes that stay, best first
//   num_kept  [1]       in and out
extern "C" __global__ void nms_select(const int* order, const Bits* conflicts, int num_boxes,
                                      int first_rank, int num_rows, Bits* suppressed_so_far,
                                      int* kept, int* num_kept) {
    DYNAMIC_SHARED(suppressed);
    const int num_words = (num_boxes + 63) / 64;
    for (int word = threadIdx.x; word < num_words; word += blockDim.x)
        suppressed[word] = first_rank == 0 ? 0 : suppressed_so_far[word];
    int count = first_rank == 0 ? 0 : *num_kept;
    __syncthreads();
    for (int rank = first_rank; rank < first_rank + num_rows; ++rank) {
        const bool is_kept = (suppressed[rank / 64] >> (rank % 64) & 1) == 0;
        if (!is_kept) continue;
        // All threads have read this box's bit before any changes the word around it.
        __syncthreads();
        if (threadIdx.x == 0) kept[count] = order[rank];
        ++count;
        const Bits* row = conflicts + static_cast<long long>(rank - first_rank) * num_words;
        for (int word = rank / 64 + threadIdx.x; word < num_words; word += blockDim.x)
            suppressed[word] |= row[word];
        __syncthreads();
    }
    for (int word = threadIdx.x; word < num_words; word += blockDim.x)
        suppressed_so_far[word] = suppressed[word];
    if (threadIdx.x == 0) *num_kept = count;
}

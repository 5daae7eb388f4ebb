// Peaks and cluster centres of a whole batch to point prompts and to SAM's prompts, without gaps.
//
// Point prompts of an image: peaks of its maps in map order (coarse, then fine), then the centres.
// SAM's prompts of an image: one for each point prompt, then for coarse and for fine maps one for
// each class with several peaks, in class order. Each ends with the padding point SAM was trained
// to see. Where one buffer is too small for the batch, all are left alone and the sizes needed are
// reported.
#pragma once

#include "clustering.cuh"

constexpr int no_class = -1;
constexpr int foreground_label = 1;
constexpr int padding_label = -1;

struct BatchCounts {
    int points, prompts, sam_points;
};

// Where an image's pixels go in SAM's model frame.
struct FrameScale {
    double x, y;
};

__device__ inline bool gives_class_prompt(int source, int num_peaks) {
    return source != cross_source && num_peaks > 1;
}

// Grid: images.
//   image_counts  [images]   out
extern "C" __global__ void count_prompts(const int* map_starts, const int* map_sources,
                                         const int* peak_counts, const int* centre_counts,
                                         BatchCounts* image_counts) {
    __shared__ BatchCounts counts;
    const int image = blockIdx.x;
    if (threadIdx.x == 0) {
        const int num_centres = centre_counts[image];
        counts = {num_centres, num_centres, 2 * num_centres};
    }
    __syncthreads();
    for (int map = map_starts[image] + threadIdx.x; map < map_starts[image + 1];
         map += blockDim.x) {
        if (map_sources[map] == cross_source) continue;
        const int num_peaks = peak_counts[map];
        const int is_class = gives_class_prompt(map_sources[map], num_peaks) ? 1 : 0;
        atomicAdd(&counts.points, num_peaks);
        atomicAdd(&counts.prompts, num_peaks + is_class);
        atomicAdd(&counts.sam_points, 2 * num_peaks + is_class * (num_peaks + 1));
    }
    __syncthreads();
    if (threadIdx.x == 0) image_counts[image] = counts;
}

// What the packing kernel writes; see pack_prompts.
struct PackedOutputs {
    float* points;
    float* scores;
    int* class_ids;
    int* sources;
    int* point_offsets;
    float* sam_points;
    int* sam_labels;
    int* sam_offsets;
    int* image_index;
};

__device__ inline void write_sam_point(const PackedOutputs& out, int position, double x, double y,
                                       int label, const FrameScale& scale) {
    out.sam_points[2 * position] = static_cast<float>(x * scale.x);
    out.sam_points[2 * position + 1] = static_cast<float>(y * scale.y);
    out.sam_labels[position] = label;
}

// A point prompt and SAM's prompt of this point alone. ``rank`` counts within the image.
__device__ inline void write_single(const PackedOutputs& out, const BatchCounts& base, int rank,
                                    int x, int y, float score, int class_id, int source, int image,
                                    const FrameScale& scale) {
    const int point = base.points + rank;
    out.points[2 * point] = static_cast<float>(x);
    out.points[2 * point + 1] = static_cast<float>(y);
    out.scores[point] = score;
    out.class_ids[point] = class_id;
    out.sources[point] = source;
    const int prompt = base.prompts + rank;
    const int start = base.sam_points + 2 * rank;
    out.sam_offsets[prompt] = start;
    out.image_index[prompt] = image;
    write_sam_point(out, start, x, y, foreground_label, scale);
    write_sam_point(out, start + 1, 0, 0, padding_label, scale);
}

// Point prompts before a map's own, and class prompts and their points before its class's.
__device__ inline BatchCounts counts_before(const int* map_sources, const int* map_classes,
                                            const int* peak_counts, int first_map, int end_map,
                                            int map) {
    BatchCounts before = {0, 0, 0};
    for (int other = first_map; other < end_map; ++other) {
        const int source = map_sources[other];
        const int num_peaks = peak_counts[other];
        if (source == cross_source) continue;
        if (other < map) before.points += num_peaks;
        const bool is_earlier =
            source < map_sources[map] ||
            (source == map_sources[map] && map_classes[other] < map_classes[map]);
        if (is_earlier && gives_class_prompt(source, num_peaks)) {
            ++before.prompts;
            before.sam_points += num_peaks + 1;
        }
    }
    return before;
}

// Adds the counts of images [first, end) to ``total``, which the block shares.
__device__ inline void add_counts(const BatchCounts* image_counts, int first, int end,
                                  BatchCounts& total) {
    for (int image = first + threadIdx.x; image < end; image += blockDim.x) {
        atomicAdd(&total.points, image_counts[image].points);
        atomicAdd(&total.prompts, image_counts[image].prompts);
        atomicAdd(&total.sam_points, image_counts[image].sam_points);
    }
}

__device__ inline bool fits(const BatchCounts& counts, const BatchCounts& room) {
    return counts.points <= room.points && counts.prompts <= room.prompts &&
           counts.sam_points <= room.sam_points;
}

// Grid: images.
//   map_classes    [maps]          class of each map, one map a class within image and source
//   frame_scales   [images]
//   capacity_of    room in the outputs
//   points         [points, 2]     out, (x, y) in pixels of the image
//   scores, class_ids, sources     [points]   out
//   point_offsets  [images + 1]    out, first point prompt of each image
//   sam_points     [sam points, 2] out, (x, y) in the model frame
//   sam_labels     [sam points]    out
//   sam_offsets    [prompts + 1]   out, first point of each of SAM's prompts
//   image_index    [prompts]       out
//   totals         [1]             out, what the batch needs; above capacity_of: nothing is written
extern "C" __global__ void pack_prompts(const int* map_starts, const int* map_sources,
                                        const int* map_classes, const int* peak_xy,
                                        const float* peak_scores, const int* peak_counts,
                                        int capacity, const int* point_starts,
                                        const int* centres_xy, const int* centre_counts,
                                        const BatchCounts* image_counts,
                                        const FrameScale* frame_scales, BatchCounts capacity_of,
                                        PackedOutputs out, BatchCounts* totals) {
    __shared__ BatchCounts before_image, of_batch;
    const int image = blockIdx.x;
    const int num_images = gridDim.x;
    if (threadIdx.x == 0) before_image = of_batch = {0, 0, 0};
    __syncthreads();
    add_counts(image_counts, 0, image, before_image);
    add_counts(image_counts, 0, num_images, of_batch);
    __syncthreads();
    const BatchCounts base = before_image;
    const BatchCounts own = image_counts[image];
    const bool is_last = image + 1 == num_images;
    if (is_last && threadIdx.x == 0) *totals = of_batch;
    if (!fits(of_batch, capacity_of)) return;
    if (threadIdx.x == 0) {
        out.point_offsets[image] = base.points;
        if (is_last) out.point_offsets[num_images] = of_batch.points;
        if (is_last) out.sam_offsets[of_batch.prompts] = of_batch.sam_points;
    }
    const int first_map = map_starts[image];
    const int end_map = map_starts[image + 1];
    const int num_centres = centre_counts[image];
    const FrameScale scale = frame_scales[image];
    for (int map = first_map + threadIdx.x; map < end_map; map += blockDim.x) {
        const int num_peaks = peak_counts[map];
        if (map_sources[map] == cross_source || num_peaks == 0) continue;
        const BatchCounts before =
            counts_before(map_sources, map_classes, peak_counts, first_map, end_map, map);
        const int* xy = peak_xy + 2LL * map * capacity;
        const float* scores = peak_scores + static_cast<long long>(map) * capacity;
        for (int i = 0; i < num_peaks; ++i)
            write_single(out, base, before.points + i, xy[2 * i], xy[2 * i + 1], scores[i],
                         map_classes[map], map_sources[map], image, scale);
        if (!gives_class_prompt(map_sources[map], num_peaks)) continue;
        const int prompt = base.prompts + own.points + before.prompts;
        const int start = base.sam_points + 2 * own.points + before.sam_points;
        out.sam_offsets[prompt] = start;
        out.image_index[prompt] = image;
        for (int i = 0; i < num_peaks; ++i)
            write_sam_point(out, start + i, xy[2 * i], xy[2 * i + 1], foreground_label, scale);
        write_sam_point(out, start + num_peaks, 0, 0, padding_label, scale);
    }
    const int* centres = centres_xy + 2LL * point_starts[image];
    for (int i = threadIdx.x; i < num_centres; i += blockDim.x)
        write_single(out, base, own.points - num_centres + i, centres[2 * i], centres[2 * i + 1],
                     1.0f, no_class, cross_source, image, scale);
}

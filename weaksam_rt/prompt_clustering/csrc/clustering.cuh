// k-means of the pooled cross-attention peaks of one image, by one block.
//
// The first centre is the point nearest to the mean, each next one the point farthest from all
// centres so far; then Lloyd's iterations. Sums are integers and quotients double: neither the
// number of threads nor their order changes a bit. Ties go to the lowest index.
#pragma once

#include "execution.cuh"

constexpr int max_lloyd_iterations = 300;
constexpr int cross_source = 3;  // PromptSource.CROSS

// One image's part of the batch-wide scratch; n points, k <= n clusters.
struct ClusterScratch {
    int* xy;                      // [n, 2]
    int* assigned;                // [n]
    unsigned int* nearest;        // [n], squared distance to the nearest centre
    int* counts;                  // [k]
    unsigned long long* sums_xy;  // [k, 2]
    double* centres_xy;           // [k, 2]
};

struct ClusterSearch {
    unsigned long long sum_x, sum_y, best, best_bits;
    int num_points, has_changed;
};

__device__ inline double squared_distance(const int* point_xy, const double* centre_xy) {
    const double dx = point_xy[0] - centre_xy[0];
    const double dy = point_xy[1] - centre_xy[1];
    return dx * dx + dy * dy;
}

// Peaks of the image's cross-attention maps, in the order of the maps.
__device__ inline int pool_points(const int* map_sources, int first_map, int end_map,
                                  const int* peak_xy, const int* peak_counts, int capacity,
                                  int* xy, ClusterSearch& search) {
    for (int map = first_map + threadIdx.x; map < end_map; map += blockDim.x) {
        if (map_sources[map] != cross_source) continue;
        int start = 0;
        for (int before = first_map; before < map; ++before)
            if (map_sources[before] == cross_source) start += peak_counts[before];
        const int count = peak_counts[map];
        const int* peaks = peak_xy + 2LL * map * capacity;
        for (int i = 0; i < 2 * count; ++i) xy[2 * start + i] = peaks[i];
        atomicAdd(&search.num_points, count);
    }
    __syncthreads();
    return search.num_points;
}

__device__ inline int nearest_to_mean(const ClusterScratch& scratch, int num_points,
                                      ClusterSearch& search) {
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        atomicAdd(&search.sum_x, static_cast<unsigned long long>(scratch.xy[2 * i]));
        atomicAdd(&search.sum_y, static_cast<unsigned long long>(scratch.xy[2 * i + 1]));
    }
    __syncthreads();
    const double mean[2] = {static_cast<double>(search.sum_x) / num_points,
                            static_cast<double>(search.sum_y) / num_points};
    // Bits of doubles that are not negative are in the order of their values.
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        const long long bits = __double_as_longlong(squared_distance(scratch.xy + 2 * i, mean));
        atomicMin(&search.best_bits, static_cast<unsigned long long>(bits));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        const long long bits = __double_as_longlong(squared_distance(scratch.xy + 2 * i, mean));
        if (static_cast<unsigned long long>(bits) == search.best_bits)
            atomicMin(&search.best, static_cast<unsigned long long>(i));
    }
    __syncthreads();
    const int nearest = static_cast<int>(search.best);
    // The caller uses ``best`` again.
    __syncthreads();
    return nearest;
}

// Returns the number of centres; fewer than asked for where fewer points are distinct.
__device__ inline int seed_centres(const ClusterScratch& scratch, int num_points, int num_clusters,
                                   ClusterSearch& search) {
    int chosen = nearest_to_mean(scratch, num_points, search);
    int num_centres = 0;
    for (;;) {
        const int chosen_x = scratch.xy[2 * chosen];
        const int chosen_y = scratch.xy[2 * chosen + 1];
        if (threadIdx.x == 0) {
            scratch.centres_xy[2 * num_centres] = chosen_x;
            scratch.centres_xy[2 * num_centres + 1] = chosen_y;
            search.best = 0;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
            const int dx = scratch.xy[2 * i] - chosen_x;
            const int dy = scratch.xy[2 * i + 1] - chosen_y;
            const unsigned int distance = static_cast<unsigned int>(dx * dx) +
                                          static_cast<unsigned int>(dy * dy);
            const unsigned int nearest =
                num_centres == 0 ? distance : min(scratch.nearest[i], distance);
            scratch.nearest[i] = nearest;
            // The farthest; among equals the lowest index, whose complement is the greatest.
            atomicMax(&search.best, static_cast<unsigned long long>(nearest) << 32 |
                                        (0xffffffffu - static_cast<unsigned int>(i)));
        }
        __syncthreads();
        const unsigned long long farthest = search.best;
        __syncthreads();
        ++num_centres;
        if (num_centres == num_clusters || farthest >> 32 == 0) return num_centres;
        chosen = static_cast<int>(0xffffffffu - static_cast<unsigned int>(farthest));
    }
}

__device__ inline int nearest_centre(const int* point_xy, const double* centres_xy,
                                     int num_centres) {
    int nearest = 0;
    double least = squared_distance(point_xy, centres_xy);
    for (int c = 1; c < num_centres; ++c) {
        const double distance = squared_distance(point_xy, centres_xy + 2 * c);
        if (distance < least) {
            least = distance;
            nearest = c;
        }
    }
    return nearest;
}

// Whether any point changed its cluster. The same for all threads, which meet at another barrier
// before the next call.
__device__ inline bool assign_points(const ClusterScratch& scratch, int num_points,
                                     int num_centres, ClusterSearch& search) {
    if (threadIdx.x == 0) search.has_changed = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        const int nearest = nearest_centre(scratch.xy + 2 * i, scratch.centres_xy, num_centres);
        if (nearest != scratch.assigned[i]) atomicOr(&search.has_changed, 1);
        scratch.assigned[i] = nearest;
    }
    __syncthreads();
    return search.has_changed != 0;
}

// A cluster that lost all its points stays where it was.
__device__ inline void move_centres(const ClusterScratch& scratch, int num_points,
                                    int num_centres) {
    for (int c = threadIdx.x; c < num_centres; c += blockDim.x)
        scratch.counts[c] = 0, scratch.sums_xy[2 * c] = scratch.sums_xy[2 * c + 1] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        const int c = scratch.assigned[i];
        atomicAdd(&scratch.counts[c], 1);
        for (int axis = 0; axis < 2; ++axis)
            atomicAdd(&scratch.sums_xy[2 * c + axis],
                      static_cast<unsigned long long>(scratch.xy[2 * i + axis]));
    }
    __syncthreads();
    for (int c = threadIdx.x; c < num_centres; c += blockDim.x)
        for (int axis = 0; axis < 2 && scratch.counts[c] > 0; ++axis)
            scratch.centres_xy[2 * c + axis] =
                static_cast<double>(scratch.sums_xy[2 * c + axis]) / scratch.counts[c];
    __syncthreads();
}

// Grid: images.
//   map_starts     [images + 1]   first map of each image
//   map_sources    [maps]         PromptSource
//   point_starts   [images + 1]   where the scratch and the centres of each image begin; an image
//                                 has room for all peaks its maps can have
//   centres_xy     [points, 2]    out, truncated to pixels
//   centre_counts  [images]       out
extern "C" __global__ void __launch_bounds__(256, 2)
    cluster_peaks(const int* map_starts, const int* map_sources, const int* peak_xy,
                  const int* peak_counts, int capacity, int points_per_cluster,
                  const int* point_starts, int* scratch_xy, int* scratch_assigned,
                  unsigned int* scratch_nearest, int* scratch_counts,
                  unsigned long long* scratch_sums, double* scratch_centres, int* centres_xy,
                  int* centre_counts) {
    __shared__ ClusterSearch search;
    const int image = blockIdx.x;
    const long long start = point_starts[image];
    const ClusterScratch scratch = {scratch_xy + 2 * start,      scratch_assigned + start,
                                    scratch_nearest + start,     scratch_counts + start,
                                    scratch_sums + 2 * start,    scratch_centres + 2 * start};
    if (threadIdx.x == 0) {
        search.sum_x = search.sum_y = 0;
        search.best = search.best_bits = ~0ull;
        search.num_points = 0;
        centre_counts[image] = 0;
    }
    __syncthreads();
    const int num_points = pool_points(map_sources, map_starts[image], map_starts[image + 1],
                                       peak_xy, peak_counts, capacity, scratch.xy, search);
    if (num_points == 0) return;
    const int num_centres =
        seed_centres(scratch, num_points, max(1, num_points / points_per_cluster), search);
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) scratch.assigned[i] = -1;
    __syncthreads();
    for (int iteration = 0; iteration < max_lloyd_iterations; ++iteration) {
        if (!assign_points(scratch, num_points, num_centres, search)) break;
        move_centres(scratch, num_points, num_centres);
    }
    for (int i = threadIdx.x; i < 2 * num_centres; i += blockDim.x)
        centres_xy[2 * start + i] = static_cast<int>(scratch.centres_xy[i]);
    if (threadIdx.x == 0) centre_counts[image] = num_centres;
}

// k-means of the pooled cross-attention peaks of each image, from several starts, one block a start.
//
// Seeding needs no random numbers. A start has a first centre, a point of a certain rank by distance
// from the mean, and a rule for the next ones: the point that leaves the least sum of squared
// distances, or the point farthest from all centres so far. Then Lloyd's iterations; the tightest
// start is the answer. Sums are integers and quotients double: neither the number of threads nor
// their order changes a bit. Ties go to the lowest index.
#pragma once

#include "execution.cuh"

constexpr int max_lloyd_iterations = 300;
constexpr int cross_source = 3;  // PromptSource.CROSS
constexpr int num_first_centres = 4;
constexpr int num_seeding_rules = 2;
constexpr int num_starts = num_first_centres * num_seeding_rules;

typedef unsigned long long Sum;
constexpr Sum no_sum = ~0ull;

// One start's part of the batch-wide scratch; n points, k <= n clusters.
struct ClusterScratch {
    int* xy;                // [n, 2]
    int* assigned;          // [n]
    unsigned int* nearest;  // [n], squared distance to the nearest centre
    Sum* potentials;        // [n], sum of squared distances if the point became a centre
    int* counts;            // [k]
    Sum* sums_xy;           // [k, 2]
    double* centres_xy;     // [k, 2]
};

struct ClusterSearch {
    Sum sum_x, sum_y, farthest, least;
    int num_points, has_changed, chosen;
};

__device__ inline double squared_distance(const int* point_xy, const double* centre_xy) {
    const double dx = point_xy[0] - centre_xy[0];
    const double dy = point_xy[1] - centre_xy[1];
    return dx * dx + dy * dy;
}

__device__ inline unsigned int squared_distance(const int* point_xy, const int* other_xy) {
    const int dx = point_xy[0] - other_xy[0];
    const int dy = point_xy[1] - other_xy[1];
    return static_cast<unsigned int>(dx * dx) + static_cast<unsigned int>(dy * dy);
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

// The point that as many points precede by distance from the mean as ``rank`` says.
__device__ inline int point_of_rank(const ClusterScratch& scratch, int num_points, int rank,
                                    ClusterSearch& search) {
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        atomicAdd(&search.sum_x, static_cast<Sum>(scratch.xy[2 * i]));
        atomicAdd(&search.sum_y, static_cast<Sum>(scratch.xy[2 * i + 1]));
    }
    __syncthreads();
    const double mean[2] = {static_cast<double>(search.sum_x) / num_points,
                            static_cast<double>(search.sum_y) / num_points};
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        const double distance = squared_distance(scratch.xy + 2 * i, mean);
        int num_before = 0;
        for (int other = 0; other < num_points; ++other) {
            const double other_distance = squared_distance(scratch.xy + 2 * other, mean);
            num_before += other_distance < distance || (other_distance == distance && other < i);
        }
        if (num_before == rank) search.chosen = i;
    }
    __syncthreads();
    return search.chosen;
}

// Brings the distances to the nearest centre up to date after ``centre`` became one, and returns
// the farthest point: its distance in the high word, the complement of its index in the low one.
__device__ inline Sum update_nearest(const ClusterScratch& scratch, int num_points, int centre,
                                     bool is_first, ClusterSearch& search) {
    if (threadIdx.x == 0) {
        search.farthest = 0;
        search.least = no_sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        const unsigned int distance =
            squared_distance(scratch.xy + 2 * i, scratch.xy + 2 * centre);
        const unsigned int nearest = is_first ? distance : min(scratch.nearest[i], distance);
        scratch.nearest[i] = nearest;
        atomicMax(&search.farthest, static_cast<Sum>(nearest) << 32 |
                                        (0xffffffffu - static_cast<unsigned int>(i)));
    }
    __syncthreads();
    return search.farthest;
}

// The point that would leave the least sum of squared distances.
__device__ inline int tightest_next(const ClusterScratch& scratch, int num_points,
                                    ClusterSearch& search) {
    if (threadIdx.x == 0) search.chosen = num_points;
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) {
        Sum potential = 0;
        for (int other = 0; other < num_points; ++other)
            potential += min(scratch.nearest[other],
                             squared_distance(scratch.xy + 2 * i, scratch.xy + 2 * other));
        scratch.potentials[i] = potential;
        atomicMin(&search.least, potential);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_points; i += blockDim.x)
        if (scratch.potentials[i] == search.least) atomicMin(&search.chosen, i);
    __syncthreads();
    return search.chosen;
}

// Returns the number of centres; fewer than asked for where fewer points are distinct.
__device__ inline int seed_centres(const ClusterScratch& scratch, int num_points, int num_clusters,
                                   int start, ClusterSearch& search) {
    const long long first = start % num_first_centres;
    const bool is_tightest = start / num_first_centres == 0;
    const int rank = static_cast<int>(first * num_points / num_first_centres);
    int chosen = point_of_rank(scratch, num_points, rank, search);
    for (int num_centres = 1;; ++num_centres) {
        if (threadIdx.x == 0) {
            scratch.centres_xy[2 * (num_centres - 1)] = scratch.xy[2 * chosen];
            scratch.centres_xy[2 * (num_centres - 1) + 1] = scratch.xy[2 * chosen + 1];
        }
        const Sum farthest = update_nearest(scratch, num_points, chosen, num_centres == 1, search);
        if (num_centres == num_clusters || farthest >> 32 == 0) return num_centres;
        chosen = is_tightest
                     ? tightest_next(scratch, num_points, search)
                     : static_cast<int>(0xffffffffu - static_cast<unsigned int>(farthest));
        // All threads have read ``search`` before it is reset.
        __syncthreads();
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
            atomicAdd(&scratch.sums_xy[2 * c + axis], static_cast<Sum>(scratch.xy[2 * i + axis]));
    }
    __syncthreads();
    for (int c = threadIdx.x; c < num_centres; c += blockDim.x)
        for (int axis = 0; axis < 2 && scratch.counts[c] > 0; ++axis)
            scratch.centres_xy[2 * c + axis] =
                static_cast<double>(scratch.sums_xy[2 * c + axis]) / scratch.counts[c];
    __syncthreads();
}

// The greater, the tighter: what the squared distances from the origin exceed those from the
// centres by.
__device__ inline double tightness_of(const ClusterScratch& scratch, int num_centres) {
    double tightness = 0;
    for (int c = 0; c < num_centres; ++c) {
        if (scratch.counts[c] == 0) continue;
        const double x = static_cast<double>(scratch.sums_xy[2 * c]);
        const double y = static_cast<double>(scratch.sums_xy[2 * c + 1]);
        tightness += (x * x + y * y) / scratch.counts[c];
    }
    return tightness;
}

// Grid: (images, num_starts). Scratch: for each start room for the points of all images.
//   map_starts     [images + 1]   first map of each image
//   map_sources    [maps]         PromptSource
//   point_starts   [images + 1]   where the scratch and the centres of each image begin; an image
//                                 has room for all peaks its maps can have
//   centres        [starts, points, 2]   out
//   centre_counts  [images]       out, the same of all starts
//   tightness      [images, starts]      out
extern "C" __global__ void __launch_bounds__(256, 2)
    cluster_peaks(const int* map_starts, const int* map_sources, const int* peak_xy,
                  const int* peak_counts, int capacity, int points_per_cluster,
                  const int* point_starts, int* scratch_xy, int* scratch_assigned,
                  unsigned int* scratch_nearest, Sum* scratch_potentials, int* scratch_counts,
                  Sum* scratch_sums, double* centres, int* centre_counts, double* tightness) {
    __shared__ ClusterSearch search;
    const int image = blockIdx.x;
    const int start = blockIdx.y;
    const long long offset =
        static_cast<long long>(start) * point_starts[gridDim.x] + point_starts[image];
    const ClusterScratch scratch = {scratch_xy + 2 * offset,     scratch_assigned + offset,
                                    scratch_nearest + offset,    scratch_potentials + offset,
                                    scratch_counts + offset,     scratch_sums + 2 * offset,
                                    centres + 2 * offset};
    if (threadIdx.x == 0) {
        search.sum_x = search.sum_y = 0;
        search.num_points = 0;
        if (start == 0) centre_counts[image] = 0;
        tightness[image * num_starts + start] = 0;
    }
    __syncthreads();
    const int num_points = pool_points(map_sources, map_starts[image], map_starts[image + 1],
                                       peak_xy, peak_counts, capacity, scratch.xy, search);
    if (num_points == 0) return;
    const int num_centres =
        seed_centres(scratch, num_points, max(1, num_points / points_per_cluster), start, search);
    for (int i = threadIdx.x; i < num_points; i += blockDim.x) scratch.assigned[i] = -1;
    __syncthreads();
    for (int iteration = 0; iteration < max_lloyd_iterations; ++iteration) {
        if (!assign_points(scratch, num_points, num_centres, search)) break;
        move_centres(scratch, num_points, num_centres);
    }
    if (threadIdx.x != 0) return;
    tightness[image * num_starts + start] = tightness_of(scratch, num_centres);
    if (start == 0) centre_counts[image] = num_centres;
}

// Grid: images.
//   centres     [starts, points, 2]
//   centres_xy  [points, 2]   out, those of the tightest start, truncated to pixels
extern "C" __global__ void choose_clusters(const int* point_starts, const double* centres,
                                           const int* centre_counts, const double* tightness,
                                           int* centres_xy) {
    const int image = blockIdx.x;
    const long long first = point_starts[image];
    int best = 0;
    for (int start = 1; start < num_starts; ++start)
        if (tightness[image * num_starts + start] > tightness[image * num_starts + best])
            best = start;
    const double* chosen =
        centres + 2 * (static_cast<long long>(best) * point_starts[gridDim.x] + first);
    for (int i = threadIdx.x; i < 2 * centre_counts[image]; i += blockDim.x)
        centres_xy[2 * first + i] = static_cast<int>(chosen[i]);
}

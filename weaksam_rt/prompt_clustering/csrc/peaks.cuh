// Sum over test-time passes, min-max normalisation and peaks of one map, by one block.
//
// A peak is the maximum of its window. Pixels are visited from the highest down (ties in row
// order); each visit compares one pixel with its whole window. The highest pixel of that window then
// *rules out* every lower pixel of its own window, so visits stay far apart. Cells remember the best
// pixel that is left in them, or only an upper bound of it: most are ruled out before anyone has to
// look inside.
#pragma once

#include "upsampling.cuh"

struct PeakRule {
    int kernel_size;
    float value_thresh;
    int max_candidates;
    int is_l2;
};

// A pixel as one number: the greater, the earlier it is visited. Values are positive, so their bits
// are in order. The low word is the complement of the pixel's index or, with the highest bit set, of
// a cell: "a pixel of this value or less is in it, nobody looked yet".
typedef unsigned long long PixelKey;
constexpr PixelKey no_pixel = 0;
constexpr unsigned int bound_bit = 0x80000000u;
constexpr unsigned int largest_index = 0x7ffffffeu;

__device__ inline PixelKey key_of_bound(float value, int cell) {
    return static_cast<PixelKey>(__float_as_uint(value)) << 32 | bound_bit |
           (largest_index - static_cast<unsigned int>(cell));
}
__device__ inline PixelKey key_of_pixel(float value, int index) {
    return static_cast<PixelKey>(__float_as_uint(value)) << 32 |
           (largest_index - static_cast<unsigned int>(index));
}
__device__ inline float value_of(PixelKey key) {
    return __uint_as_float(static_cast<unsigned int>(key >> 32));
}
__device__ inline bool is_bound(PixelKey key) {
    return (static_cast<unsigned int>(key) & bound_bit) != 0;
}
// Of the pixel, or of the bound's cell.
__device__ inline int index_of(PixelKey key) {
    return static_cast<int>(largest_index - (static_cast<unsigned int>(key) & ~bound_bit));
}

// The last visits that ruled others out. A forgotten one costs visits, never an answer.
constexpr int max_rulers = 64;
struct Rulers {
    int y[max_rulers], x[max_rulers];
    float value[max_rulers];
};

// What the threads of a block share during the search.
struct PeakSearch {
    PixelKey top, best, higher;
    unsigned int low, high;
    int is_unusable;
    Rulers rulers;
};

struct NormalizedMap {
    UpsampledMap map;
    float low, scale;

    __device__ float at(int y, int x) const { return normalize(map.at(y, x)); }
    __device__ float normalize(float value) const { return (value - low) * scale; }
};

// nodes[i] = the sum of all passes at node i, in their order; mirrored passes are turned back.
__device__ inline void sum_passes(const float* maps, int num_passes, unsigned int mirrored_passes,
                                  int num_maps, int map_index, int rows, int columns,
                                  float* nodes) {
    const int num_nodes = rows * columns;
    for (int i = threadIdx.x; i < num_nodes; i += blockDim.x) {
        const int column = i % columns;
        const int mirrored = i - column + (columns - 1 - column);
        float sum = 0.0f;
        for (int pass = 0; pass < num_passes; ++pass) {
            const long long start =
                (static_cast<long long>(pass) * num_maps + map_index) * num_nodes;
            const float value = maps[start + ((mirrored_passes >> pass & 1u) ? mirrored : i)];
            sum = pass == 0 ? value : sum + value;
        }
        nodes[i] = sum;
    }
}

// Whether every node, and the distance between any two, is a finite number.
__device__ inline bool nodes_are_usable(const float* nodes, int num_nodes, PeakSearch& search) {
    unsigned int low = 0xffffffffu;
    unsigned int high = 0;
    for (int i = threadIdx.x; i < num_nodes; i += blockDim.x) {
        if (!is_finite(nodes[i])) atomicOr(&search.is_unusable, 1);
        low = min(low, ordered_from_float(nodes[i]));
        high = max(high, ordered_from_float(nodes[i]));
    }
    atomicMin(&search.low, low);
    atomicMax(&search.high, high);
    __syncthreads();
    const float range = float_from_ordered(search.high) - float_from_ordered(search.low);
    const bool is_usable = search.is_unusable == 0 && is_finite(range);
    __syncthreads();
    return is_usable;
}

// So many threads share a row of a cell: neighbours read neighbouring pixels, and few wait for each
// other at the cell's maximum.
constexpr int cell_lanes = 8;

// The greatest value of each cell, and the least and greatest of the map in ``search``.
__device__ inline void find_extremes(const UpsampledMap& map, unsigned int* cell_max,
                                     PeakSearch& search) {
    for (int i = threadIdx.x; i < map.rows * map.columns; i += blockDim.x) cell_max[i] = 0;
    if (threadIdx.x == 0) {
        search.low = 0xffffffffu;
        search.high = 0;
    }
    __syncthreads();
    unsigned int low = 0xffffffffu;
    unsigned int high = 0;
    for (int i = threadIdx.x; i < 2 * cell_lanes * map.rows * map.columns; i += blockDim.x) {
        const int lane = i % cell_lanes;
        const int cell = i / cell_lanes % (map.rows * map.columns);
        const int first = map.row_starts[cell / map.columns];
        const int last = map.row_starts[cell / map.columns + 1] - 1;
        if (last < first) continue;
        const int y = i < cell_lanes * map.rows * map.columns ? first : last;
        const int end = map.column_starts[cell % map.columns + 1];
        unsigned int highest = 0;
        for (int x = map.column_starts[cell % map.columns] + lane; x < end; x += cell_lanes) {
            const unsigned int value = ordered_from_float(map.at(y, x));
            highest = max(highest, value);
            low = min(low, value);
        }
        if (highest != 0) atomicMax(&cell_max[cell], highest);
        high = max(high, highest);
    }
    atomicMin(&search.low, low);
    atomicMax(&search.high, high);
    __syncthreads();
}

struct Window {
    int top, bottom, left, right;  // inclusive

    __device__ Window(int y, int x, int radius, int height, int width)
        : top(max(0, y - radius)),
          bottom(min(height - 1, y + radius)),
          left(max(0, x - radius)),
          right(min(width - 1, x + radius)) {}
    __device__ bool contains(int y, int x) const {
        return top <= y && y <= bottom && left <= x && x <= right;
    }
};

// A pixel of the window above ``value``: the highest; none: ``no_pixel``. The same for all threads.
__device__ inline PixelKey highest_above(const NormalizedMap& map, const Window& window,
                                         float value, PeakSearch& search) {
    const int num_columns = window.right - window.left + 1;
    const int first_cell = map.map.y_samples[window.top].low;
    const int num_cells = map.map.y_samples[window.bottom].low - first_cell + 1;
    PixelKey highest = no_pixel;
    for (int i = threadIdx.x; i < 2 * num_cells * num_columns; i += blockDim.x) {
        const int cell_row = first_cell + i / num_columns / 2;
        const int first = max(window.top, map.map.row_starts[cell_row]);
        const int last = min(window.bottom, map.map.row_starts[cell_row + 1] - 1);
        if (last < first) continue;
        const int y = (i / num_columns) % 2 == 0 ? first : last;
        const int x = window.left + i % num_columns;
        const float other = map.at(y, x);
        if (other > value) highest = max(highest, key_of_pixel(other, y * map.map.width + x));
    }
    if (highest != no_pixel) atomicMax(&search.higher, highest);
    __syncthreads();
    return search.higher;
}

__device__ inline bool is_ruled_out(const Rulers& rulers, int num_rulers, int y, int x, float value,
                                    int radius) {
    for (int i = 0; i < num_rulers; ++i) {
        const int dy = y - rulers.y[i];
        const int dx = x - rulers.x[i];
        if (value < rulers.value[i] && -radius <= dy && dy <= radius && -radius <= dx &&
            dx <= radius)
            return true;
    }
    return false;
}

// The first pixel of a cell after ``cursor`` in the order of visits that nothing rules out.
__device__ inline void look_inside(const NormalizedMap& map, int cell, PixelKey cursor,
                                   int num_rulers, const PeakRule& rule, PixelKey* cell_keys,
                                   PeakSearch& search) {
    const int cell_row = cell / map.map.columns;
    const int cell_column = cell % map.map.columns;
    const int top = map.map.row_starts[cell_row];
    const int left = map.map.column_starts[cell_column];
    const int height = map.map.row_starts[cell_row + 1] - top;
    const int width = map.map.column_starts[cell_column + 1] - left;
    PixelKey best = no_pixel;
    for (int i = threadIdx.x; i < height * width; i += blockDim.x) {
        const int y = top + i / width;
        const int x = left + i % width;
        const float value = map.at(y, x);
        if (!(value >= rule.value_thresh)) continue;
        const PixelKey key = key_of_pixel(value, y * map.map.width + x);
        if (key <= best || key >= cursor) continue;
        if (!is_ruled_out(search.rulers, num_rulers, y, x, value, rule.kernel_size / 2)) best = key;
    }
    if (best != no_pixel) atomicMax(&search.best, best);
    __syncthreads();
    // next_key has a barrier before anyone reads it.
    if (threadIdx.x == 0) cell_keys[cell] = search.best;
}

// Cells forget the visited pixel and those that the ruler, of this value, rules out.
__device__ inline void rule_out(const UpsampledMap& map, PixelKey visited, const Window& window,
                                float ruler_value, PixelKey* cell_keys) {
    for (int cell = threadIdx.x; cell < map.rows * map.columns; cell += blockDim.x) {
        // Pixels of the same value may follow in this cell.
        if (cell_keys[cell] == visited) cell_keys[cell] = key_of_bound(value_of(visited), cell);
        const PixelKey key = cell_keys[cell];
        if (key == no_pixel || !(value_of(key) < ruler_value)) continue;
        const int row = cell / map.columns;
        const int column = cell % map.columns;
        const bool is_inside =
            window.contains(map.row_starts[row], map.column_starts[column]) &&
            window.contains(map.row_starts[row + 1] - 1, map.column_starts[column + 1] - 1);
        if (is_inside) {
            cell_keys[cell] = no_pixel;
        } else if (!is_bound(key) &&
                   window.contains(index_of(key) / map.width, index_of(key) % map.width)) {
            cell_keys[cell] = key_of_bound(value_of(key), cell);
        }
    }
}

// Whether (x, y) lies too near one of the kept points. Every thread finds out for itself.
__device__ inline bool is_near_kept(const int* kept_xy, int num_kept, int x, int y,
                                    const PeakRule& rule) {
    const long long kernel_size = rule.kernel_size;
    for (int i = 0; i < num_kept; ++i) {
        const long long dx = kept_xy[2 * i] - x;
        const long long dy = kept_xy[2 * i + 1] - y;
        const bool is_near = rule.is_l2
                                 ? 4 * (dx * dx + dy * dy) <= kernel_size * kernel_size
                                 : max(dx, -dx) + max(dy, -dy) < (kernel_size - 1) / 2;
        if (is_near) return true;
    }
    return false;
}

// The next pixel, or bound, in the order of visits. Between two calls there is another barrier.
__device__ inline PixelKey next_key(const PixelKey* cell_keys, int num_cells,
                                    PeakSearch& search) {
    if (threadIdx.x == 0) search.top = no_pixel;
    __syncthreads();
    // All have read what they found in the step before.
    if (threadIdx.x == 0) search.best = search.higher = no_pixel;
    PixelKey top = no_pixel;
    for (int cell = threadIdx.x; cell < num_cells; cell += blockDim.x)
        top = max(top, cell_keys[cell]);
    if (top != no_pixel) atomicMax(&search.top, top);
    __syncthreads();
    return search.top;
}

// Visits pixels from the highest down; writes the kept peaks and returns their number.
__device__ inline int visit_peaks(const NormalizedMap& map, const PeakRule& rule,
                                  PixelKey* cell_keys, PeakSearch& search, int* kept_xy,
                                  float* kept_scores) {
    const int num_cells = map.map.rows * map.map.columns;
    PixelKey cursor = ~no_pixel;
    int num_candidates = 0;
    int num_kept = 0;
    int num_visits = 0;
    while (num_candidates < rule.max_candidates) {
        const PixelKey key = next_key(cell_keys, num_cells, search);
        if (key == no_pixel) break;
        if (is_bound(key)) {
            look_inside(map, index_of(key), cursor, min(num_visits, max_rulers), rule, cell_keys,
                        search);
            continue;
        }
        const int x = index_of(key) % map.map.width;
        const int y = index_of(key) / map.map.width;
        const int radius = rule.kernel_size / 2;
        const Window window(y, x, radius, map.map.height, map.map.width);
        const PixelKey higher = highest_above(map, window, value_of(key), search);
        if (higher == no_pixel) {
            ++num_candidates;
            if (!is_near_kept(kept_xy, num_kept, x, y, rule)) {
                if (threadIdx.x == 0) {
                    kept_xy[2 * num_kept] = x;
                    kept_xy[2 * num_kept + 1] = y;
                    kept_scores[num_kept] = value_of(key);
                }
                ++num_kept;
            }
        }
        const PixelKey ruler = higher == no_pixel ? key : higher;
        const int ruler_x = index_of(ruler) % map.map.width;
        const int ruler_y = index_of(ruler) / map.map.width;
        if (threadIdx.x == 0) {
            const int slot = num_visits % max_rulers;
            search.rulers.x[slot] = ruler_x;
            search.rulers.y[slot] = ruler_y;
            search.rulers.value[slot] = value_of(ruler);
        }
        rule_out(map.map, key, Window(ruler_y, ruler_x, radius, map.map.height, map.map.width),
                 value_of(ruler), cell_keys);
        cursor = key;
        ++num_visits;
    }
    return num_kept;
}

// Peaks of every map of a batch. A map with a value that is not finite has none.
//
// Grid: maps. Dynamic shared memory: rows * columns * 16 bytes.
//   maps             [passes, maps, rows, columns]
//   mirrored_passes  bit p: the maps of pass p are mirrored left to right
//   map_images, map_rules  [maps]
//   rules            [rules]
//   peak_xy          [maps, capacity, 2]   out, (x, y), highest first
//   peak_scores      [maps, capacity]      out
//   peak_counts      [maps]                out, at most the rule's max_candidates
extern "C" __global__ void __launch_bounds__(256, 2)
    find_peaks(const float* maps, int num_passes, unsigned int mirrored_passes, int num_maps,
               int rows, int columns, const int* map_images, const int* map_rules,
               const PeakRule* rules, const int* image_sizes, const int* sample_starts,
               const AxisSample* samples, const int* cell_starts, int capacity, int* peak_xy,
               float* peak_scores, int* peak_counts) {
    DYNAMIC_SHARED(dynamic);
    __shared__ PeakSearch search;
    const int map_index = blockIdx.x;
    const int image = map_images[map_index];
    const int num_nodes = rows * columns;
    PixelKey* cell_keys = dynamic;
    float* nodes = reinterpret_cast<float*>(cell_keys + num_nodes);
    unsigned int* cell_max = reinterpret_cast<unsigned int*>(nodes + num_nodes);

    if (threadIdx.x == 0) {
        search.is_unusable = 0;
        search.low = 0xffffffffu;
        search.high = 0;
        peak_counts[map_index] = 0;
    }
    sum_passes(maps, num_passes, mirrored_passes, num_maps, map_index, rows, columns, nodes);
    __syncthreads();
    if (!nodes_are_usable(nodes, num_nodes, search)) return;

    const int* starts = cell_starts + image * (rows + columns + 2);
    const UpsampledMap map = {nodes,
                              rows,
                              columns,
                              image_sizes[2 * image],
                              image_sizes[2 * image + 1],
                              samples + sample_starts[2 * image],
                              samples + sample_starts[2 * image + 1],
                              starts,
                              starts + rows + 1};
    find_extremes(map, cell_max, search);
    const float low = float_from_ordered(search.low);
    const float high = float_from_ordered(search.high);
    const NormalizedMap normalized = {map, low, 1.0f / (high - low + 1e-8f)};
    const PeakRule rule = rules[map_rules[map_index]];
    for (int cell = threadIdx.x; cell < num_nodes; cell += blockDim.x) {
        const float value = normalized.normalize(float_from_ordered(cell_max[cell]));
        const bool is_candidate = cell_max[cell] != 0 && value >= rule.value_thresh;
        cell_keys[cell] = is_candidate ? key_of_bound(value, cell) : no_pixel;
    }
    __syncthreads();
    const int num_kept = visit_peaks(normalized, rule, cell_keys, search,
                                     peak_xy + 2LL * map_index * capacity,
                                     peak_scores + static_cast<long long>(map_index) * capacity);
    if (threadIdx.x == 0) peak_counts[map_index] = num_kept;
}

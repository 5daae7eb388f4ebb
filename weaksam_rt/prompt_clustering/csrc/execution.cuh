// What a kernel may use: CUDA's own names on a GPU, the same names from cpu_execution.h elsewhere.
//
// All blocks are one-dimensional. No warp intrinsics, so that a block of any size, also of one
// thread, gives the same answer. Every float operation is rounded by itself (--fmad=false,
// -ffp-contract=off), which makes the results those of NumPy, bit for bit.
#pragma once

#if defined(__CUDACC__)

// Eight-byte elements align whatever a kernel lays out in its dynamic shared memory.
#define DYNAMIC_SHARED(name) extern __shared__ unsigned long long name[]

#else

#include "cpu_execution.h"

#define DYNAMIC_SHARED(name) unsigned long long* name = cpu_execution::dynamic_shared()

#endif

__device__ inline bool is_finite(float value) { return value - value == 0.0f; }

// Unsigned integers in the order of the floats, so that integer atomics find float extremes.
__device__ inline unsigned int ordered_from_float(float value) {
    const unsigned int bits = __float_as_uint(value);
    return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

__device__ inline float float_from_ordered(unsigned int ordered) {
    return __uint_as_float((ordered & 0x80000000u) ? ordered & 0x7fffffffu : ~ordered);
}

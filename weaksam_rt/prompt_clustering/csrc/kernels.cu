// All kernels as one translation unit: what NVRTC, nvcc and g++ compile.
#include "masks.cuh"
#include "nms.cuh"
#include "packing.cuh"
#include "peaks.cuh"

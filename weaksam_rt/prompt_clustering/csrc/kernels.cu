// All kernels as one translation unit: what NVRTC, nvcc and g++ compile.
#include "engine_image.cuh"
#include "mask_encoding.cuh"
#include "masks.cuh"
#include "nms.cuh"
#include "packing.cuh"
#include "peaks.cuh"

// The CUDA kernels' launchers. Each is a plain function: it enqueues on `stream` of `device` and returns a cudaError_t
// as an int, 0 for success. Nothing is allocated and nothing waits.
#pragma once

#include "cuda/arguments.h"

namespace refinenet_fast::cuda {

int maxpool5(const MaxPool5&, int device, void* stream);
int maxpool5_backward(const MaxPool5Backward&, int device, void* stream);
int bilinear(const Bilinear&, int device, void* stream);
int bilinear_backward(const BilinearBackward&, int device, void* stream);
int conv3x3(const PackedConvolution&, int device, void* stream);
int weight_grad(const PackedWeightGrad&, int device, void* stream);

// The newest CUDA that the installed driver runs, and the one this was built with, as 1000 * major + 10 * minor; the
// driver's is 0 where there is none.
int driver_version();
int built_version();

// CUDA's own words for an error.
const char* error_string(int error);

}  // namespace refinenet_fast::cuda

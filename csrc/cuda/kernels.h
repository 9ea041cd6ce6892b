// The CUDA kernels' launchers. Each is a plain function: it enqueues on `stream` of `device` and returns a cudaError_t
// as an int, 0 for success: that of its own calls, whatever the runtime keeps of others'. None allocates memory or
// waits for work; but a kernel's first launch may have the runtime load its code.
#pragma once

#include "cuda/arguments.h"

namespace refinenet_fast::cuda {

int maxpool5(const MaxPool5&, int device, void* stream);
int maxpool5_backward(const MaxPool5Backward&, int device, void* stream);
int bilinear(const Bilinear&, int device, void* stream);
int bilinear_backward(const BilinearBackward&, int device, void* stream);
int conv3x3(const PackedConvolution&, int device, void* stream);
int pool_conv3x3(const PackedConvolution&, int device, void* stream);  // with pool_in
int sum_splits(const PackedConvolution&, int device, void* stream);    // of `parts`, and the way out
int weight_grad(const PackedWeightGrad&, int device, void* stream);

// What plan_sm90.h says it takes; part of builds for sm_90a.
namespace sm90 {
int conv3x3(const PackedConvolution&, int processors, int device, void* stream);
}

// The newest CUDA that the installed driver runs, and the one this was built with, as 1000 * major + 10 * minor; the
// driver's is 0 where there is none.
int driver_version();
int built_version();

// CUDA's own words for an error.
const char* error_string(int error);

// What the runtime keeps of the last call that failed, on this thread, for whoever asks; and an end to that.
int kept_error();
void forget_error();

// Whether an error can only be that of work that was enqueued before, which every later call is told.
bool is_of_earlier_work(int error);

}  // namespace refinenet_fast::cuda

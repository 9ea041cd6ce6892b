// The CUDA launchers' host code over a runtime without a GPU (fake_cuda): what is launched, on which device and stream,
// and whose error is returned when a call fails.
#include <functional>

#include "cuda.h"
#include "cuda/kernels.h"
#include "cuda/plan_sm90.h"
#include "plain_check.h"

// Dynamic shared memory, of kernels that nobody calls.
extern "C" {
unsigned char shared_memory[1] __asm__("_ZN14refinenet_fast4cuda12_GLOBAL__N_16sharedE");
unsigned char shared_memory_sm90[1] __asm__("_ZN14refinenet_fast4cuda4sm9012_GLOBAL__N_17dynamicE");
}

using namespace refinenet_fast;
using namespace refinenet_fast::cuda;
using refinenet_fast::test::check;
using refinenet_fast::test::failures;

namespace {

constexpr int kDevice = 3;

// Nothing is read there.
template <class T = void>
T* somewhere(uintptr_t number) {
  return reinterpret_cast<T*>(number << 20);
}

void* stream() { return somewhere(99); }

fake::Runtime& anew(int capability = 80, int processors = 108) {
  fake::runtime = {};
  fake::runtime.device = 1;
  fake::runtime.capability = capability;
  fake::runtime.processors = processors;
  return fake::runtime;
}

PackedConvolution convolution(const Shape& shape, int64_t k, DType dtype = DType::kBFloat16) {
  PackedConvolution p{};
  p.x = somewhere(1);
  p.weights = somewhere(2);
  p.out.y = somewhere(3);
  p.shape = shape;
  p.k = k;
  p.side = 3;
  p.dtype = dtype;
  return p;
}

PackedConvolution split(PackedConvolution p, int splits) {
  p.parts = somewhere<float>(4);
  p.splits = splits;
  return p;
}

PackedWeightGrad gradient(const Shape& shape, int64_t k) {
  PackedWeightGrad p{};
  p.x = somewhere(1);
  p.gy = somewhere(2);
  p.parts = somewhere<float>(3);
  p.gw = somewhere(4);
  p.gb = somewhere<float>(5);
  p.strides[0] = shape.c * 9;
  p.strides[1] = 9;
  p.strides[2] = 1;
  p.shape = shape;
  p.k = k;
  p.side = 3;
  p.splits = 2;
  p.dtype = DType::kBFloat16;
  p.gw_dtype = DType::kFloat32;
  return p;
}

// What every launch has to have.
void check_launches(size_t count, const char* what) {
  check(fake::runtime.launches.size() == count, what, fake::runtime.launches.size(), count);
  for (const fake::Launch& launch : fake::runtime.launches) {
    check(launch.kernel != nullptr && launch.blocks > 0 && launch.threads > 0, "a kernel and threads", launch.blocks);
    check(launch.device == kDevice && static_cast<void*>(launch.stream) == stream(), "device and stream");
    check(launch.shared <= launch.allowed, "shared memory that was not allowed", launch.shared, launch.allowed);
    check(launch.blocks % launch.cluster == 0, "whole clusters", launch.blocks);
  }
  check(fake::runtime.device == 1, "the caller's device", fake::runtime.device);
}

void convolutions() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool exact : {false, true}) {
      PackedConvolution p = convolution({2, 17, 19, 40}, 72, dtype);
      p.exact = exact;
      anew();
      check(conv3x3(p, kDevice, stream()) == 0, "a convolution");
      check_launches(1, "launches of a convolution");
      p.splits = 1;  // there is no room for more
      check(fake::runtime.launches[0].blocks == plan(p, 108).blocks, "blocks", fake::runtime.launches[0].blocks);
      p.pool_in = true;
      anew();
      check(conv3x3(p, kDevice, stream()) == 0, "one that pools");
      check_launches(1, "launches of one that pools");
    }
  }
  anew();
  check(conv3x3(convolution({0, 17, 19, 40}, 72), kDevice, stream()) == cudaErrorInvalidValue, "nothing to compute");
  check_launches(0, "launches of nothing");
}

void splits() {
  for (const int64_t k : {72, 21}) {  // in whole chunks, and one by one
    const PackedConvolution p = split(convolution({1, 9, 9, 200}, k), 3);
    anew();
    check(conv3x3(p, kDevice, stream()) == 0, "a split convolution");
    check_launches(2, "a product and its sum");
    const auto& launches = fake::runtime.launches;
    const int64_t items = 81 * k / (k == 72 ? 8 : 1);
    check(launches[0].blocks == plan(p, 108).blocks && plan(p, 108).splits == 3, "blocks", launches[0].blocks);
    check(launches[1].blocks == (items + 255) / 256 && launches[1].threads == 256, "of the sum", launches[1].blocks);
  }
  anew();
  PackedConvolution p = split(convolution({1, 9, 9, 200}, 72), 3);
  p.parts = nullptr;
  check(conv3x3(p, kDevice, stream()) == cudaErrorInvalidValue, "splits without room for them");
  check_launches(0, "nothing");
  p.splits = 0;
  check(conv3x3(p, kDevice, stream()) == 0, "as many as there is room for");
  check_launches(1, "one");
}

void on_sm90a() {
  const Shape shape{1, 32, 32, 256};
  PackedConvolution p = convolution(shape, 256);
  p.out.relued = somewhere(5);
  anew(90, 132);
  check(conv3x3(p, kDevice, stream()) == 0, "by wgmma");
  check_launches(1, "one launch");
  check(fake::runtime.launches[0].cluster == 2 && fake::runtime.maps == 4, "maps of a plain way out",
        fake::runtime.launches[0].cluster, fake::runtime.maps);
  p.out.adds = p.out.raw_adds = 1;
  p.out.add[0] = somewhere(6);
  anew(90, 132);
  check(conv3x3(p, kDevice, stream()) == 0 && fake::runtime.maps == 2, "maps of another one", fake::runtime.maps);
  anew(90, 132);
  check(conv3x3(split(convolution(shape, 256), 4), kDevice, stream()) == 0, "split");
  check_launches(2, "a product and its sum");
  check(fake::runtime.maps == 2 && fake::runtime.launches[0].blocks == 128, "of four splits", fake::runtime.maps,
        fake::runtime.launches[0].blocks);
  anew(90, 132);
  fake::runtime.failing = "cuTensorMapEncodeTiled";
  fake::runtime.after = 1;
  check(conv3x3(p, kDevice, stream()) == cudaErrorInvalidValue, "no map of the weights");
  check_launches(0, "nothing without maps");
}

using Launcher = std::function<int()>;

std::vector<std::pair<const char*, Launcher>> launchers() {
  const Shape shape{1, 9, 9, 200};
  const auto run = [](const auto& p, auto launcher) { return [=] { return launcher(p, kDevice, stream()); }; };
  const MaxPool5 pool{somewhere(1), somewhere(2), somewhere<uint8_t>(3), shape, DType::kFloat32, true};
  const MaxPool5Backward back{somewhere(1), somewhere<uint8_t>(2), nullptr, somewhere(3), shape, DType::kBFloat16};
  const BilinearAxis axis{9, 20, true};
  const Bilinear resize{somewhere(1), nullptr, somewhere(2), shape, axis, axis, DType::kFloat16};
  const BilinearBackward adjoint{somewhere(1), somewhere(2), shape, axis, axis, DType::kFloat32};
  PackedConvolution pooled = convolution(shape, 72);
  pooled.pool_in = true;
  PackedConvolution large = convolution(shape, 136);
  large.tile = 128;
  return {{"conv3x3", run(large, conv3x3)},       {"split conv3x3", run(split(convolution(shape, 72), 3), conv3x3)},
          {"pool_conv3x3", run(pooled, conv3x3)}, {"weight_grad", run(gradient(shape, 72), weight_grad)},
          {"maxpool5", run(pool, maxpool5)},      {"maxpool5_backward", run(back, maxpool5_backward)},
          {"bilinear", run(resize, bilinear)},    {"bilinear_backward", run(adjoint, bilinear_backward)}};
}

// Whichever call fails, and however many came before: its error is returned, nothing more is launched, and the caller's
// device is back.
void failing_calls() {
  const char* const calls[] = {"cudaGetDevice", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute",
                               "cudaLaunchKernelEx"};
  for (const int capability : {80, 90}) {
    for (const auto& [name, launch] : launchers()) {
      anew(capability);
      check(launch() == 0, name);
      const size_t all = fake::runtime.launches.size();
      check_launches(all, name);
      int failed = 0;
      for (const char* call : calls) {
        for (int after = 0; after < 6; ++after) {
          anew(capability);
          fake::runtime.failing = call;
          fake::runtime.after = after;
          fake::runtime.with = cudaErrorLaunchOutOfResources;
          const int error = launch();
          const bool was_reached = fake::runtime.after < 0;
          if (!was_reached) {
            check(error == 0, name, error, after);
            break;
          }
          // The last call of cudaSetDevice puts the caller's device back: nobody is told of it.
          const bool last = fake::runtime.launches.size() == all;
          check(last || error == cudaErrorLaunchOutOfResources, call, error, after);
          if (call != calls[1]) check(fake::runtime.device == 1, "the caller's device after a failure");
          ++failed;
        }
      }
      check(failed >= 3, "calls that failed", failed);
    }
  }
}

// What an earlier call has left behind is not a launch's, and stays for whom it concerns.
void earlier_errors() {
  for (const auto& [name, launch] : launchers()) {
    for (const cudaError_t earlier : {cudaErrorInvalidDevice, cudaErrorIllegalAddress}) {
      anew();
      fake::runtime.kept = earlier;
      check(launch() == 0, name);
      check(kept_error() == earlier, "what was kept", kept_error());
      forget_error();
      check(kept_error() == 0, "what was forgotten", kept_error());
    }
  }
  check(is_of_earlier_work(cudaErrorIllegalAddress) && is_of_earlier_work(cudaErrorLaunchFailure), "of earlier work");
  for (const int own : {0, 1, 2, 9, 100, 701, 801}) check(!is_of_earlier_work(own), "a launch's own", own);
}

void too_many_blocks() {
  const int64_t side = int64_t{1} << 20;
  const MaxPool5 pool{somewhere(1), somewhere(2), nullptr, {1, side, side, 64}, DType::kFloat32, false};
  anew();
  check(maxpool5(pool, kDevice, stream()) == cudaErrorInvalidConfiguration, "more blocks than a grid has");
  check_launches(0, "nothing of those");
}

// A thread takes 16 bytes of channels, or one channel where some address is no multiple of that.
void misaligned_addresses() {
  const Shape s{1, 18, 9, 64}, large{1, 20, 9, 64};
  const DType dtype = DType::kBFloat16;
  const BilinearAxis rows{s.h, large.h, true}, columns{s.w, large.w, true};
  for (int moved = -1; moved < 4; ++moved) {
    const auto at = [moved](int number) { return somewhere<uint8_t>(number + 1) + (number == moved ? 2 : 0); };
    const auto check_blocks = [moved](int error, int tensors, int64_t channels, const char* name) {
      const int64_t threads = 0 <= moved && moved < tensors ? channels : channels / 8, want = (threads + 255) / 256;
      check(error == 0, name, error);
      check_launches(1, name);
      check(fake::runtime.launches[0].blocks == want, name, fake::runtime.launches[0].blocks, want);
      anew();
    };
    anew();
    const int64_t map = s.h * s.w * s.c;
    check_blocks(maxpool5({at(0), at(1), at(2), s, dtype, true}, kDevice, stream()), 3, 2 * s.w * s.c, "maxpool5");
    check_blocks(maxpool5_backward({at(0), at(1), at(2), at(3), s, dtype}, kDevice, stream()), 4, map, "its backward");
    const Bilinear resize{at(0), at(1), at(2), s, rows, columns, dtype};
    check_blocks(bilinear(resize, kDevice, stream()), 3, large.h * large.w * large.c, "bilinear");
    const BilinearBackward adjoint{at(0), at(1), s, rows, columns, dtype};
    check_blocks(bilinear_backward(adjoint, kDevice, stream()), 2, map, "its adjoint");
  }
}

}  // namespace

int main() {
  convolutions();
  splits();
  on_sm90a();
  failing_calls();
  earlier_errors();
  too_many_blocks();
  misaligned_addresses();
  std::printf("%d failed\n", failures);
  return failures != 0;
}

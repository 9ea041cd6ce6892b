// The extension module refinenet_fast._C: kernels on raw pointers, sizes and a stream. Nothing here knows torch;
// arguments are checked and outputs allocated in Python (refinenet_fast/backends/native.py and engine.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/content_hash.h"
#include "cpu/kernels.h"
#include "cuda/plan.h"
#include "cuda/plan_sm90.h"
#ifdef REFINENET_FAST_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace refinenet_fast {
namespace {

using Address = uintptr_t;  // 0 for no tensor

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// From Python's flat arguments to the kernels' structs. Sizes are N, H, W, C; those of bilinear are the small tensor's,
// followed by the large one's height and width.

MaxPool5 maxpool5(Address x, Address y, Address argmax, int64_t n, int64_t h, int64_t w, int64_t c, int dtype,
                  bool relu) {
  return {at<void>(x), at<void>(y), at<uint8_t>(argmax), {n, h, w, c}, DType(dtype), relu};
}

MaxPool5Backward maxpool5_backward(Address gy, Address argmax, Address add, Address gx, int64_t n, int64_t h, int64_t w,
                                   int64_t c, int dtype) {
  return {at<void>(gy), at<uint8_t>(argmax), at<void>(add), at<void>(gx), {n, h, w, c}, DType(dtype)};
}

Bilinear bilinear(Address x, Address add, Address y, int64_t n, int64_t h, int64_t w, int64_t c, int64_t out_h,
                  int64_t out_w, int dtype, bool align_corners) {
  return {at<void>(x), at<void>(add), at<void>(y), {n, h, w, c}, {h, out_h, align_corners}, {w, out_w, align_corners},
          DType(dtype)};
}

BilinearBackward bilinear_backward(Address gy, Address gx, int64_t n, int64_t h, int64_t w, int64_t c, int64_t out_h,
                                   int64_t out_w, int dtype, bool align_corners) {
  return {at<void>(gy), at<void>(gx), {n, h, w, c}, {h, out_h, align_corners}, {w, out_w, align_corners}, DType(dtype)};
}

void convolve(int taps, Address x, Address weights, const std::array<int64_t, 4>& strides, Address bias, Address select,
              const std::vector<Address>& add, const std::vector<Address>& add_relu, Address low, int64_t low_h,
              int64_t low_w, bool align_corners, Address y, int64_t n, int64_t h, int64_t w, int64_t c, int64_t k,
              int dtype, bool relu_in, bool pool_in, bool relu_out, int threads) {
  std::vector<const void*> adds;
  for (Address other : add) adds.push_back(at<void>(other));
  for (Address other : add_relu) adds.push_back(at<void>(other));
  const int64_t all = static_cast<int64_t>(adds.size()), raw = static_cast<int64_t>(add.size());
  Convolution p{at<void>(x),
                at<float>(weights),
                {},
                at<float>(bias),
                at<void>(select),
                adds.data(),
                all,
                raw,
                at<void>(low),
                {low_h, h, align_corners},
                {low_w, w, align_corners},
                at<void>(y),
                {n, h, w, c},
                k,
                static_cast<DType>(dtype),
                relu_in,
                pool_in,
                relu_out};
  for (int i = 0; i < 4; ++i) p.strides[i] = strides[i];
  (taps == 1 ? cpu::kernels().conv1x1 : cpu::kernels().conv3x3)(p, threads);
}

void weight_grad(Address x, Address gy, Address gw, const std::array<int64_t, 4>& strides, Address gb, int64_t n,
                 int64_t h, int64_t w, int64_t c, int64_t k, int dtype, bool relu_in, int threads) {
  const DType type = static_cast<DType>(dtype);
  WeightGrad p{at<void>(x), at<void>(gy), at<float>(gw), {}, at<float>(gb), {n, h, w, c}, k, type, relu_in};
  for (int i = 0; i < 4; ++i) p.strides[i] = strides[i];
  cpu::kernels().weight_grad(p, threads);
}

// Of the CUDA products the sizes are N, H, W, C, K; `add` holds those that are added as they are, then the others.

using Sizes = std::array<int64_t, 5>;

cuda::PackedConvolution packed_convolution(Address x, Address weights, Address parts, Address y, Address relued,
                                           Address bias, Address select, const std::vector<Address>& add, int raw_adds,
                                           Address low, int64_t low_h, int64_t low_w, bool align_corners, bool relu_out,
                                           const Sizes& sizes, int side, int dtype, bool exact, bool turned,
                                           bool relu_in, bool pool_in, int tile, int splits, bool sm80_loop) {
  const auto [n, h, w, c, k] = sizes;
  if (add.size() > cuda::kMostAdds) throw py::value_error("add: expected 8 tensors at most");
  cuda::WayOut out{};
  out.y = at<void>(y);
  out.relued = at<void>(relued);
  out.bias = at<float>(bias);
  out.select = at<void>(select);
  for (size_t i = 0; i < add.size(); ++i) out.add[i] = at<void>(add[i]);
  out.low = at<void>(low);
  out.rows = {low_h, h, align_corners};
  out.columns = {low_w, w, align_corners};
  out.adds = static_cast<int>(add.size());
  out.raw_adds = raw_adds;
  out.relu = relu_out;
  return {at<void>(x),
          at<void>(weights),
          at<float>(parts),
          out,
          {n, h, w, c},
          k,
          side,
          DType(dtype),
          tile,
          splits,
          exact,
          turned,
          relu_in,
          pool_in,
          sm80_loop};
}

cuda::PackedWeightGrad packed_weight_grad(Address x, Address gy, Address parts, Address gw, Address gb,
                                          const std::array<int64_t, 3>& strides, const Sizes& sizes, int side,
                                          int splits, int dtype, int gw_dtype, bool exact, bool relu_in, int tile) {
  const auto [n, h, w, c, k] = sizes;
  const auto [along_k, along_c, along_taps] = strides;
  return {at<void>(x),
          at<void>(gy),
          at<float>(parts),
          at<void>(gw),
          at<float>(gb),
          {along_k, along_c, along_taps},
          {n, h, w, c},
          k,
          side,
          splits,
          DType(dtype),
          DType(gw_dtype),
          tile,
          exact,
          relu_in};
}

// What one kernel is called on each device.
template <class Arguments>
struct Entry {
  const char* name;
  void (*cpu::Kernels::*on_cpu)(const Arguments&, int threads);
  int (*on_cuda)(const Arguments&, int device, void* stream);
};

#ifdef REFINENET_FAST_WITH_CUDA
#define REFINENET_FAST_ENTRY(NAME) {#NAME, &cpu::Kernels::NAME, cuda::NAME}

// launch() has to succeed. Its error is the exception's from here on: the runtime does not keep it for whoever asks
// next. What it kept before stays.
template <class Launch>
void check(const Launch& launch, const char* kernel, const std::string& sizes) {
  const int before = cuda::kept_error(), error = launch();
  if (error == 0) return;
  if (before == 0) cuda::forget_error();
  const bool earlier = cuda::is_of_earlier_work(error);
  throw std::runtime_error("CUDA kernel " + std::string(kernel) + " on " + sizes + ": " +
                           (earlier ? "not launched, as something before it has failed: " : "") +
                           cuda::error_string(error));
}

int launched(const cuda::PackedConvolution& p, int device, void* stream) { return cuda::conv3x3(p, device, stream); }
int launched(const cuda::PackedWeightGrad& p, int device, void* stream) { return cuda::weight_grad(p, device, stream); }

std::string described(const Shape& s) {
  return "(N, H, W, C) = (" + std::to_string(s.n) + ", " + std::to_string(s.h) + ", " + std::to_string(s.w) + ", " +
         std::to_string(s.c) + ")";
}
#else
#define REFINENET_FAST_ENTRY(NAME) {#NAME, &cpu::Kernels::NAME, nullptr}
#endif

const Shape& shape_of(const MaxPool5& a) { return a.shape; }
const Shape& shape_of(const MaxPool5Backward& a) { return a.shape; }
const Shape& shape_of(const Bilinear& a) { return a.in; }
const Shape& shape_of(const BilinearBackward& a) { return a.in; }

bool is_work(const Shape& s) { return s.n > 0 && s.h > 0 && s.w > 0 && s.c > 0; }

// Defines cpu_<name>(..., threads) and, where CUDA is built, cuda_<name>(..., device, stream). Empty tensors are done.
template <class Arguments, class... Flat>
void define(py::module_& m, Entry<Arguments> entry, Arguments (*from)(Flat...)) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def(("cpu_" + std::string(entry.name)).c_str(),
        [entry, from](Flat... flat, int threads) {
          const Arguments arguments = from(flat...);
          if (is_work(shape_of(arguments))) (cpu::kernels().*entry.on_cpu)(arguments, threads);
        },
        release);
#ifdef REFINENET_FAST_WITH_CUDA
  m.def(("cuda_" + std::string(entry.name)).c_str(),
        [entry, from](Flat... flat, int device, Address stream) {
          const Arguments arguments = from(flat...);
          const Shape& shape = shape_of(arguments);
          if (!is_work(shape)) return;
          check([&] { return entry.on_cuda(arguments, device, at<void>(stream)); }, entry.name, described(shape));
        },
        release);
#endif
}

// Defines cuda_plan_<name>(..., processors), wherever this is built, and where CUDA is, cuda_<name>(..., device,
// stream).
template <class Arguments, class... Flat>
void define_product(py::module_& m, const std::string& name, Arguments (*from)(Flat...)) {
  m.def(("cuda_plan_" + name).c_str(), [from](Flat... flat, int processors) {
    const cuda::Plan chosen = cuda::plan(from(flat...), processors);
    return py::make_tuple(chosen.tile, chosen.piece, chosen.blocks, chosen.shared_bytes, chosen.splits, chosen.shares,
                          chosen.parts);
  });
#ifdef REFINENET_FAST_WITH_CUDA
  m.def(("cuda_" + name).c_str(),
        [name, from](Flat... flat, int device, Address stream) {
          const Arguments arguments = from(flat...);
          const std::string sizes = described(arguments.shape) + ", K = " + std::to_string(arguments.k);
          check([&] { return launched(arguments, device, at<void>(stream)); }, name.c_str(), sizes);
        },
        py::call_guard<py::gil_scoped_release>());
#endif
}

// Defines cuda_plan_<name>_sm90(..., capability, processors): None where the main loop for sm_90a does not take this.
template <class Arguments, class... Flat>
void define_plan_sm90(py::module_& m, const std::string& name, Arguments (*from)(Flat...)) {
  m.def(("cuda_plan_" + name + "_sm90").c_str(), [from](Flat... flat, int capability, int processors) -> py::object {
    const cuda::sm90::Plan chosen = cuda::sm90::plan(from(flat...), capability, processors);
    if (!chosen.outs) return py::none();
    return py::make_tuple(chosen.outs, chosen.blocks, chosen.shared_bytes, chosen.splits, chosen.parts);
  });
}

// Defines cuda_splits_<name>(..., capability, processors): how many splits its loop there makes, and the floats of room
// that they take. Of a Hopper `capability` is 90 only where the loop for sm_90a was built.
template <class Arguments, class... Flat>
void define_splits(py::module_& m, const std::string& name, Arguments (*from)(Flat...)) {
  m.def(("cuda_splits_" + name).c_str(), [from](Flat... flat, int capability, int processors) {
    const Arguments asked = from(flat...);
    const cuda::sm90::Plan hopper = cuda::sm90::plan(asked, capability, processors);
    if (hopper.outs) return std::pair(hopper.splits, hopper.parts);
    const cuda::Plan chosen = cuda::plan(asked, processors);
    return std::pair(chosen.splits, chosen.parts);
  });
}

py::list cpu_isas() {
  int count;
  const cpu::Kernels* const* list = cpu::available_kernels(&count);
  py::list names;
  for (int i = 0; i < count; ++i) names.append(list[i]->isa);
  return names;
}

void cpu_set_isa(const std::string& isa) {
  if (cpu::use_isa(isa.c_str())) return;
  const std::string known = py::str(", ").attr("join")(cpu_isas()).cast<std::string>();
  throw py::value_error("expected an instruction set that is built in and that this processor has (" + known +
                        "), got '" + isa + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "RefineNet's kernels on raw pointers; use refinenet_fast.ops instead.";
  define<MaxPool5>(m, REFINENET_FAST_ENTRY(maxpool5), maxpool5);
  define<MaxPool5Backward>(m, REFINENET_FAST_ENTRY(maxpool5_backward), maxpool5_backward);
  define<Bilinear>(m, REFINENET_FAST_ENTRY(bilinear), bilinear);
  define<BilinearBackward>(m, REFINENET_FAST_ENTRY(bilinear_backward), bilinear_backward);
  define_product(m, "conv3x3", packed_convolution);
  define_product(m, "weight_grad", packed_weight_grad);
  define_plan_sm90(m, "conv3x3", packed_convolution);
  define_splits(m, "conv3x3", packed_convolution);
  m.def("cuda_refusal", [](int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, bool pool_in) {
    return cuda::refusal({n, h, w, c}, k, pool_in);
  });
  m.attr("CUDA_MOST_ADDS") = cuda::kMostAdds;
  m.def("cpu_convolve", convolve, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_weight_grad", weight_grad, py::call_guard<py::gil_scoped_release>());
  m.def(
      "content_hash",
      [](Address memory, size_t bytes, int threads) { return cpu::content_hash(at<void>(memory), bytes, threads); },
      py::call_guard<py::gil_scoped_release>());
  m.def("cpu_isa", [] { return cpu::kernels().isa; });
  m.def("cpu_isas", cpu_isas);
  m.def("cpu_set_isa", cpu_set_isa);
#ifdef REFINENET_FAST_WITH_CUDA
  m.def("cuda_driver_version", cuda::driver_version);
  m.def("cuda_built_version", cuda::built_version);
#endif
  m.def("build_info_json", [] { return REFINENET_FAST_BUILD_INFO_JSON; });
}

}  // namespace refinenet_fast

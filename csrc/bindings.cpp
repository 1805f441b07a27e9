// SPDX-License-Identifier: Apache-2.0
// The module ctxops._C: one submodule per backend, each with the same kernels, but for those of the
// CPU alone; and what Python must know of them.
#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "category_statistics/category_statistics.h"
#include "criss_cross_attention/criss_cross_attention.h"
#include "gated_fusion/gated_fusion.h"
#include "neighborhood_attention/neighborhood_attention.h"
#include "pyramid_pool/pyramid_pool.h"
#include "third_party/dlpack.h"

// Every kernel entry, one line each; behind them those of the CPU alone.
#define CTXOPS_DEFINE_KERNELS(backend, ...)         \
  void define_##backend(py::module_ module) {       \
    using namespace ctxops::backend;                \
    CTXOPS_DEFINE(pyramid_pool_forward);            \
    CTXOPS_DEFINE(pyramid_pool_backward);           \
    CTXOPS_DEFINE(neighborhood_attention_forward);  \
    CTXOPS_DEFINE(neighborhood_attention_backward); \
    CTXOPS_DEFINE(gated_fusion_forward);            \
    CTXOPS_DEFINE(gated_fusion_backward);           \
    CTXOPS_DEFINE(category_statistics);             \
    __VA_ARGS__                                     \
  }
#define CTXOPS_DEFINE(kernel) define(module, #kernel, kernel)
#define CTXOPS_DEFINE_CPU_KERNELS(backend) \
  CTXOPS_DEFINE_KERNELS(backend, CTXOPS_DEFINE(criss_cross_attention_turn);)

namespace py = pybind11;

namespace pybind11::detail {

// A DLPack capsule -> TensorView. The capsule keeps the memory alive until the call returns.
template <>
struct type_caster<ctxops::TensorView> {
  PYBIND11_TYPE_CASTER(ctxops::TensorView, const_name("PyCapsule"));

  bool load(handle source, bool) {
    if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
    const auto* managed =
        static_cast<DLManagedTensor*>(PyCapsule_GetPointer(source.ptr(), "dltensor"));
    const DLTensor& tensor = managed->dl_tensor;
    if (tensor.ndim > ctxops::kMaxDims) throw value_error("a kernel got too many dimensions");
    value.ndim = tensor.ndim;
    value.dtype = dtype_of(tensor.dtype);
    if (tensor.device.device_type == kDLCPU || tensor.device.device_type == kDLCUDAHost) {
      value.cuda_device = -1;
    } else if (tensor.device.device_type == kDLCUDA ||
               tensor.device.device_type == kDLCUDAManaged) {
      value.cuda_device = tensor.device.device_id;
    } else {
      throw value_error("a kernel got a tensor that is neither on the CPU nor on CUDA");
    }
    int64_t elements = 1, dense = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
      value.size[i] = tensor.shape[i];
      const int64_t stride = tensor.strides ? tensor.strides[i] : dense;
      value.stride[i] = tensor.shape[i] > 1 ? stride : 0;
      dense *= tensor.shape[i];
      elements *= tensor.shape[i];
    }
    if (elements > 0 && tensor.data == nullptr) {
      throw value_error("a kernel got a tensor without memory (a fake or meta tensor)");
    }
    value.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return true;
  }

 private:
  static ctxops::DType dtype_of(const DLDataType& type) {
    if (type.lanes != 1) return ctxops::DType::other;
    if (type.code == kDLFloat && type.bits == 32) return ctxops::DType::float32;
    if (type.code == kDLFloat && type.bits == 64) return ctxops::DType::float64;
    if (type.code == kDLFloat && type.bits == 16) return ctxops::DType::float16;
    if (type.code == kDLBfloat && type.bits == 16) return ctxops::DType::bfloat16;
    if (type.code == kDLUInt && type.bits == 8) return ctxops::DType::uint8;
    if (type.code == kDLInt && type.bits == 8) return ctxops::DType::int8;
    if (type.code == kDLInt && type.bits == 16) return ctxops::DType::int16;
    if (type.code == kDLInt && type.bits == 32) return ctxops::DType::int32;
    if (type.code == kDLInt && type.bits == 64) return ctxops::DType::int64;
    return ctxops::DType::other;
  }
};

// A sequence of DLPack capsules -> TensorList.
template <>
struct type_caster<ctxops::TensorList> {
  PYBIND11_TYPE_CASTER(ctxops::TensorList, const_name("Sequence[PyCapsule]"));

  bool load(handle source, bool) {
    if (!isinstance<sequence>(source)) return false;
    const auto items = reinterpret_borrow<sequence>(source);
    if (items.size() > ctxops::kMaxTensors) throw value_error("a kernel got too many tensors");
    value.count = static_cast<int32_t>(items.size());
    for (int i = 0; i < value.count; ++i) {
      make_caster<ctxops::TensorView> item;
      if (!item.load(items[i], false)) return false;
      value.value[i] = cast_op<ctxops::TensorView&>(item);
    }
    return true;
  }
};

// A sequence of integers -> IntList.
template <>
struct type_caster<ctxops::IntList> {
  PYBIND11_TYPE_CASTER(ctxops::IntList, const_name("Sequence[int]"));

  bool load(handle source, bool) {
    if (!isinstance<sequence>(source)) return false;
    const auto items = reinterpret_borrow<sequence>(source);
    if (items.size() > ctxops::kMaxInts) throw value_error("a kernel got too many integers");
    value.count = static_cast<int32_t>(items.size());
    for (int i = 0; i < value.count; ++i) {
      make_caster<int64_t> item;
      if (!item.load(items[i], false)) return false;
      value.value[i] = item;
    }
    return true;
  }
};

// The name of a border -> Border.
template <>
struct type_caster<ctxops::Border> {
  PYBIND11_TYPE_CASTER(ctxops::Border, const_name("str"));

  bool load(handle source, bool) {
    if (!isinstance<str>(source)) return false;
    int border = 0;
    for (const char* name : ctxops::kBorderNames) {
      value = static_cast<ctxops::Border>(border++);
      if (PyUnicode_CompareWithASCIIString(source.ptr(), name) == 0) return true;
    }
    throw value_error("a kernel got an unknown border");
  }
};

}  // namespace pybind11::detail

namespace {

using ctxops::TensorList;
using ctxops::TensorView;

// What an argument must be, for errors.
template <typename T>
constexpr const char* kExpected = py::detail::make_caster<T>::name.text;
template <>
constexpr const char* kExpected<int64_t> = "int";
template <>
constexpr const char* kExpected<double> = "float";

// A kernel as Python calls it: with a dictionary of arguments by the names of the members of
// Params, and the executor.
template <typename Params, typename Executor>
class Kernel {
 public:
  using Entry = const char* (*)(const Params&, Executor);

  Kernel(const char* name, Entry entry) : name_(name), entry_(entry) {
    std::istringstream members(Params::kMembers);
    for (std::string member; std::getline(members >> std::ws, member, ',');) {
      // Interned as the names of keyword arguments are: they are found by their address.
      members_.push_back(
          py::reinterpret_steal<py::object>(PyUnicode_InternFromString(member.c_str())));
    }
  }

  void operator()(const py::dict& arguments, int64_t executor) const {
    Params params{};
    params.visit([&](auto&... member) {
      auto name = members_.begin();
      (read(arguments, *name++, member), ...);
    });
    if (arguments.size() > members_.size()) refuse_unknown(arguments);
    const char* error;
    {
      py::gil_scoped_release release;
      error = entry_(params, {executor});
    }
    if (error == nullptr) return;
    // Parameters that pass their checks are not at fault where CUDA fails.
    if (std::is_same_v<Executor, ctxops::Stream> && params.check() == nullptr) {
      throw std::runtime_error(name_ + ": " + error);
    }
    throw py::value_error(name_ + ": " + error);
  }

 private:
  template <typename T>
  void read(const py::dict& arguments, const py::object& name, T& member) const {
    const py::handle argument = PyDict_GetItemWithError(arguments.ptr(), name.ptr());
    if (!argument) throw py::type_error(text(name) + " is missing");
    py::detail::make_caster<T> caster;
    if (!caster.load(argument, false)) {
      throw py::type_error(text(name) + " must be " + kExpected<T> + ", got " +
                           Py_TYPE(argument.ptr())->tp_name);
    }
    member = py::detail::cast_op<T&>(caster);
    if constexpr (std::is_same_v<T, TensorView>) expect_device(name, member);
    if constexpr (std::is_same_v<T, TensorList>) {
      for (int i = 0; i < member.count; ++i) expect_device(name, member.value[i]);
    }
  }

  void expect_device(const py::object& name, const TensorView& tensor) const {
    if ((tensor.cuda_device >= 0) != std::is_same_v<Executor, ctxops::Stream>) {
      throw py::value_error(text(name) + " is on the wrong device");
    }
  }

  void refuse_unknown(const py::dict& arguments) const {
    for (const auto& [name, value] : arguments) {
      bool known = false;
      for (const py::object& member : members_) known = known || member.equal(name);
      if (!known) throw py::type_error(text(name) + " is no argument of this kernel");
    }
  }

  std::string text(py::handle argument) const {
    return name_ + ": " + std::string(py::str(argument));
  }

  std::string name_;
  Entry entry_;
  std::vector<py::object> members_;
};

template <typename Params, typename Executor>
void define(py::module_& module, const char* name, const char* (*entry)(const Params&, Executor)) {
  module.def(name, Kernel<Params, Executor>(name, entry));
}

CTXOPS_DEFINE_CPU_KERNELS(baseline)
#ifdef CTXOPS_X86_64
CTXOPS_DEFINE_CPU_KERNELS(avx2)
CTXOPS_DEFINE_CPU_KERNELS(avx512)
#endif
#ifdef CTXOPS_WITH_CUDA
CTXOPS_DEFINE_KERNELS(cuda)
#endif

}  // namespace

PYBIND11_MODULE(_C, root) {
  root.attr("source_hash") = CTXOPS_SOURCE_HASH;
  root.attr("compiler") = CTXOPS_COMPILER;
  root.attr("cuda_compiler") = CTXOPS_CUDA_COMPILER;
  root.attr("cuda_archs") = CTXOPS_CUDA_ARCHS;

  define_baseline(root.def_submodule("baseline"));
#ifdef CTXOPS_X86_64
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    define_avx2(root.def_submodule("avx2"));
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    define_avx512(root.def_submodule("avx512"));
  }
#endif
#ifdef CTXOPS_WITH_CUDA
  define_cuda(root.def_submodule("cuda"));
#endif

  // What the allocation in Python must agree with.
  root.attr("max_ints") = ctxops::kMaxInts;
  root.attr("max_tensors") = ctxops::kMaxTensors;
  root.attr("neighborhood_attention_max_window") = ctxops::kMaxWindow;
  root.attr("neighborhood_attention_max_window_along_columns") = ctxops::kMaxWindowAlongColumns;
  root.attr("neighborhood_attention_max_sliding_window_along_columns") =
      ctxops::kMaxSlidingWindowAlongColumns;
  root.attr("gated_fusion_part") = ctxops::kPart;
  root.def("pyramid_pool_cells", [](int64_t extent, const ctxops::IntList& sizes) {
    return ctxops::make_cell_axis(extent, sizes).count;
  });
  root.def("category_statistics_scratch", &ctxops::scratch_of_position);
}

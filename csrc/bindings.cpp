// SPDX-License-Identifier: Apache-2.0
// The module ctxops._C: one submodule per backend, each with the same kernels.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "category_statistics/category_statistics.h"
#include "gated_fusion/gated_fusion.h"
#include "neighborhood_attention/neighborhood_attention.h"
#include "pyramid_pool/pyramid_pool.h"
#include "third_party/dlpack.h"

// Every kernel entry, one line each.
#define CTXOPS_KERNELS(kernel)                                                       \
  kernel(pyramid_pool_forward) kernel(pyramid_pool_backward)                         \
      kernel(neighborhood_attention_forward) kernel(neighborhood_attention_backward) \
          kernel(gated_fusion_forward) kernel(gated_fusion_backward) kernel(category_statistics)

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
    for (int i = 0; i < value.count; ++i) value.value[i] = items[i].cast<ctxops::TensorView>();
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
    for (int i = 0; i < value.count; ++i) value.value[i] = items[i].cast<int64_t>();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

// Wraps a kernel: arguments are decoded before the GIL goes, an error text becomes a ValueError.
template <typename... Args>
void define(py::module_& module, const char* name, const char* (*kernel)(Args...), bool cuda) {
  module.def(name, [name, kernel, cuda](Args... args) {
    const auto expect = [&](const ctxops::TensorView& tensor) {
      if ((tensor.cuda_device >= 0) != cuda) {
        throw py::value_error(std::string(name) + ": a tensor is on the wrong device");
      }
    };
    const auto expect_device = [&](const auto& argument) {
      using Argument = std::decay_t<decltype(argument)>;
      if constexpr (std::is_same_v<Argument, ctxops::TensorView>) {
        expect(argument);
      } else if constexpr (std::is_same_v<Argument, ctxops::TensorList>) {
        for (int i = 0; i < argument.count; ++i) expect(argument.value[i]);
      }
    };
    (expect_device(args), ...);
    const char* error;
    {
      py::gil_scoped_release release;
      error = kernel(args...);
    }
    if (error != nullptr) throw py::value_error(std::string(name) + ": " + error);
  });
}

#define CTXOPS_DEFINE_CPU(kernel) define(module, #kernel, &CTXOPS_BACKEND::kernel, false);
#define CTXOPS_DEFINE_CUDA(kernel) define(module, #kernel, &ctxops::cuda::kernel, true);

void define_cpu_backends(py::module_& root) {
  {
    auto module = root.def_submodule("baseline");
#define CTXOPS_BACKEND ctxops::baseline
    CTXOPS_KERNELS(CTXOPS_DEFINE_CPU)
#undef CTXOPS_BACKEND
  }
#ifdef CTXOPS_X86_64
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    auto module = root.def_submodule("avx2");
#define CTXOPS_BACKEND ctxops::avx2
    CTXOPS_KERNELS(CTXOPS_DEFINE_CPU)
#undef CTXOPS_BACKEND
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    auto module = root.def_submodule("avx512");
#define CTXOPS_BACKEND ctxops::avx512
    CTXOPS_KERNELS(CTXOPS_DEFINE_CPU)
#undef CTXOPS_BACKEND
  }
#endif
}

}  // namespace

PYBIND11_MODULE(_C, root) {
  root.attr("source_hash") = CTXOPS_SOURCE_HASH;
  root.attr("compiler") = CTXOPS_COMPILER;
  root.attr("cuda_compiler") = CTXOPS_CUDA_COMPILER;
  root.attr("cuda_archs") = CTXOPS_CUDA_ARCHS;
  root.attr("max_ints") = ctxops::kMaxInts;
  root.attr("max_tensors") = ctxops::kMaxTensors;
  define_cpu_backends(root);
#ifdef CTXOPS_WITH_CUDA
  auto module = root.def_submodule("cuda");
  CTXOPS_KERNELS(CTXOPS_DEFINE_CUDA)
#endif
  root.def(
      "pyramid_pool_cells",
      [](int64_t extent, const ctxops::IntList& sizes) {
        return ctxops::make_cell_axis(extent, sizes).count;
      },
      "How many cells the bins of these grids cut an axis into.");
}

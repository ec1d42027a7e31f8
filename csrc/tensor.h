// Tensors as kernel arguments: checks, worded as in the Python reference, and allocation of outputs.
// Everything goes through PyTorch's stable ABI, so one build works with every torch >= 2.10.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "calls.h"
#include "poison.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it under its older name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace slm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// No iostreams: they crash if the compiler links a second C++ standard library into _C, next to torch's.
template <class Part>
inline std::string text_of(const Part& part) {
  if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else if constexpr (std::is_floating_point_v<Part>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(part));
    return text;
  } else {
    return part;
  }
}

// A ValueError in Python, which the public functions re-raise as InputError.
template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  throw std::invalid_argument((std::string() + ... + text_of(parts)));
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (const int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    default: return torch::headeronly::toString(type);
  }
}

inline Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: fail(name, ": expected a floating dtype, got ", name_of(tensor.scalar_type()));
  }
}

inline void check_like(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  const bool shaped = tensor.dim() == static_cast<int64_t>(sizes.size()) &&
                      std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin());
  if (shaped && tensor.scalar_type() == type && tensor.is_cpu()) return;
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  fail(
      name, ": expected ", name_of(type), " [", expected, "] on cpu, got ", name_of(tensor.scalar_type()), " ",
      shape_of(tensor), tensor.is_cpu() ? "" : " elsewhere");
}

// The byte range from a tensor's first element to its last, gaps included.
struct Extent {
  const char *begin, *end;
  explicit Extent(const Tensor& tensor) : begin(static_cast<const char*>(tensor.data_ptr())), end(begin) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.size(i) == 0) return;
      last += (tensor.size(i) - 1) * tensor.stride(i);
    }
    end = begin + (last + 1) * static_cast<int64_t>(tensor.element_size());
  }
};

inline bool overlap(const Tensor& one, const Tensor& other) {
  const Extent a(one), b(other);
  return a.begin < b.end && b.begin < a.end;
}

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline int32_t aoti_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: return aoti_torch_dtype_float32();
  }
}

inline Tensor empty(ScalarType type, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), aoti_type(type), aoti_torch_device_type_cpu(),
      0, &handle));
  Tensor tensor(handle);
  poison(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

}  // namespace slm_fast

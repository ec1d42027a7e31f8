// Shared by both scoring kernels: rows as float64 tensor core operands.
#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "tensor_core.cuh"
#include "vector.cuh"

namespace slm_fast::cuda {

constexpr double kShortest = 1e-24;  // vectors with at most this square (length 1e-12) have cosine 0 with everything

// Four elements of a row, in flight from memory. A lane's four are columns lane % 4 + {0, 4, 8, 12} of a product: a
// chunk may be summed in any order that keys and queries share.
template <class T, bool kWhole>
struct Four {
  using Bits = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  Bits bits;

  // Zeros from `count` on. Whole rows end at a multiple of four.
  __device__ void load(const T* from, int count) {
    bits = Bits{};
    if constexpr (kWhole) {
      if (count > 0) bits = *reinterpret_cast<const Bits*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) reinterpret_cast<T*>(&bits)[i] = from[i];
    }
  }
  __device__ double at(int i) const { return static_cast<double>(to_float(reinterpret_cast<const T*>(&bits)[i])); }
};

// The sum over the four lanes that share a row.
__device__ inline double sum_of_row(double value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// 1 / the length of a vector; 0 if it is too short or contains NaN.
__device__ inline double inverse_length(double square) { return square > kShortest ? rsqrt(square) : 0.0; }

// The cosine with a key whose inverse length is 0 is 0, whatever the product.
__device__ inline float cosine_of(double product, double key_inverse) {
  return key_inverse > 0 ? static_cast<float>(product * key_inverse) : 0.f;
}

}  // namespace slm_fast::cuda

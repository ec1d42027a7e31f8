// 16-byte vector loads and stores of floats and 16-bit types, as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace slm_fast::cuda {

template <class T>
__device__ inline float to_float(T value) {
  return static_cast<float>(value);
}

// N numbers, from a 16-byte aligned address if they fill 16 bytes.
template <int N, class T>
__device__ inline void load(const T* from, float (&to)[N]) {
  if constexpr (N * sizeof(T) >= 16) {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int part = 0; part < N / kEach; ++part) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + part * kEach);
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int i = 0; i < kEach; ++i) to[part * kEach + i] = to_float(values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(from[i]);
  }
}

template <int N, class T>
__device__ inline void store(T* to, const float (&from)[N]) {
  constexpr int kEach = 16 / sizeof(T);
  static_assert(N % kEach == 0);
#pragma unroll
  for (int part = 0; part < N / kEach; ++part) {
    uint4 bits;
    T* values = reinterpret_cast<T*>(&bits);
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = static_cast<T>(from[part * kEach + i]);
    *reinterpret_cast<uint4*>(to + part * kEach) = bits;
  }
}

}  // namespace slm_fast::cuda

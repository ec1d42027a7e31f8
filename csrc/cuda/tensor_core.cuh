// Asynchronous copies, tensor core products of 16-bit and float64 tiles (sm_80 and later), and programmatic dependent
// launch. tests/ops/cuda_on_host.h replaces them on a CPU, for tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace slm_fast::cuda {

#if !defined(SLM_ON_HOST)

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, or 16 zero bytes, to shared memory. `from` must be a readable global address either way.
__device__ inline void copy_or_zero(void* to, const void* from, bool copied) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(copied ? 16 : 0));
}
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until all but the last N groups of this thread's copies have arrived.
template <int N>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers, lane l pointing at row l % 8 of matrix l / 8. to[m] gets the two numbers in
// row lane / 4 and columns 2 (lane % 4), + 1; transposed, in that column and those rows.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16, 8] += p [16, 16] . q [16, 8], in float32. p: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15. q0,
// q1: rows 0-7 and 8-15, transposed. sums: rows lane / 4, + 8, columns 2 (lane % 4), + 1.
template <class T>
__device__ inline void multiply(float (&sums)[4], const uint32_t (&p)[4], uint32_t q0, uint32_t q1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q0), "r"(q1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q0), "r"(q1));
}

// sums [16, 8] += p [16, 16] . q [16, 8], in float64. p[2 t + h]: row lane / 4 + 8 h, column lane % 4 + 4 t. q[t]: row
// lane % 4 + 4 t, column lane / 4. sums: rows lane / 4, + 8, columns 2 (lane % 4), + 1.
__device__ inline void multiply(double (&sums)[4], const double (&p)[8], const double (&q)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3};"
               : "+d"(sums[0]), "+d"(sums[1]), "+d"(sums[2]), "+d"(sums[3])
               : "d"(p[0]), "d"(p[1]), "d"(p[2]), "d"(p[3]), "d"(p[4]), "d"(p[5]), "d"(p[6]), "d"(p[7]), "d"(q[0]),
                 "d"(q[1]), "d"(q[2]), "d"(q[3]));
#else
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+d"(sums[2 * h]), "+d"(sums[2 * h + 1])
                   : "d"(p[2 * t + h]), "d"(q[t]));
#endif
}

// Programmatic dependent launch, on sm_90: the next kernel's blocks may start once all blocks of this one have called
// let_next_begin(); its writes are visible after wait_for_previous(). In an ordinary launch both do nothing.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Barrier of a cluster that orders no accesses to memory: no block may exit, or access another's shared memory, before all
// have come so far.
__device__ inline void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

#endif

// Two numbers packed into 32 bits, the first in the lower half.
template <class T>
__device__ inline uint32_t two(float first, float second) {
  const T low = static_cast<T>(first), high = static_cast<T>(second);
  return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&low)) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&high)) << 16;
}
template <class T>
__device__ inline float one_of(uint32_t both, bool second) {
  const uint16_t bits = second ? both >> 16 : both & 0xffff;
  return static_cast<float>(*reinterpret_cast<const T*>(&bits));
}

}  // namespace slm_fast::cuda

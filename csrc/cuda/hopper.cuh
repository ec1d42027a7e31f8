// What sm_90a has for tiles of 16-bit numbers: copies of boxes of a tensor, barriers that count their bytes, and products
// by groups of four warps. tests/ops/cuda_on_host.h replaces them on a CPU, for tests.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels.h"
#include "tensor_core.cuh"

namespace slm_fast::cuda {

// A line of a box: 64 numbers, in 16-byte pieces of which piece p lies at p ^ (line % 8). Boxes begin at whole lines,
// and what is multiplied at multiples of eight lines.
constexpr int kBoxColumns = 64, kBoxLine = 2 * kBoxColumns, kEightLines = 8 * kBoxLine, kGroupThreads = 128;

// Lines of 64 numbers, in shared memory. Lines are rows of p or columns of q (`apart` unused), or with `apart` rows of q,
// whose next 64 columns lie that many bytes further.
__device__ inline uint64_t lines_at(const void* first, int apart = 16) {
  return (shared_address(first) & 0x3ffff) >> 4 | static_cast<uint64_t>(apart >> 4) << 16 |
         static_cast<uint64_t>(kEightLines >> 4) << 32 | uint64_t{1} << 62;
}

#if !defined(SLM_ON_HOST)

#define SLM_GRID_CONSTANT __grid_constant__

// Counts arrivals and, of copies to shared memory, bytes. In every function `block` is one of the cluster's.
struct Barrier {
  uint64_t word;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  // Arrives, and makes the phase wait for `bytes` to be copied.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  // Arrives at this barrier of another block.
  __device__ void arrive(int block) {
    asm volatile(
        "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
        " mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(shared_address(this)),
        "r"(block)
        : "memory");
  }
  // Waits for the end of a phase with this parity. The phase before the first has parity 1.
  __device__ void wait(uint32_t parity) {
    asm volatile(
        "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
        " @done bra end; bra again; end: }" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// After barriers were initialised, before another block or a copy uses them.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Between ordinary writes to shared memory, and copies and products that access it.
__device__ inline void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Fetches what describes a tensor, ahead of its first copy.
__device__ inline void prefetch(const Boxes& boxes) { asm volatile("prefetch.tensormap [%0];" ::"l"(&boxes) : "memory"); }

// Copies the box at (column, row, matrix) of a tensor, whose part outside the tensor is zeros.
__device__ inline void copy_box(void* to, const Boxes& from, Barrier& barrier, int column, int row, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          shared_address(to)),
      "l"(&from), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(&barrier))
      : "memory");
}
// The same to the same place of the cluster's first two blocks, and at their barriers.
__device__ inline void copy_box_to_both(void* to, const Boxes& from, Barrier& barrier, int column, int row, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(&from), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(&barrier)), "h"(uint16_t{3})
      : "memory");
}

// Barrier of a block's second and third group.
__device__ inline void meet_two_groups() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
template <int N>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Products run asynchronously: begin_products() before the first, end_products() after the last of a batch, and
// wait_for_products<N>() until all but the last N batches are done.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define SLM_8(s, i) "+f"(s[i][0]), "+f"(s[i][1]), "+f"(s[i][2]), "+f"(s[i][3]), "+f"(s[i + 1][0]), "+f"(s[i + 1][1]), "+f"(s[i + 1][2]), "+f"(s[i + 1][3])
#define SLM_16(s, i) SLM_8(s, i), SLM_8(s, i + 2)
#define SLM_32(s, i) SLM_16(s, i), SLM_16(s, i + 4)
#define SLM_64(s, i) SLM_32(s, i), SLM_32(s, i + 8)
#define SLM_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SLM_NAMES_16 SLM_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SLM_NAMES_24 SLM_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SLM_NAMES_32 SLM_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SLM_NAMES_48 SLM_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SLM_NAMES_64 SLM_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SLM_NAMES_96 SLM_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SLM_NAMES_128 SLM_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SLM_PRODUCT(n, names, p, q, add, ...)                                                                  \
  asm volatile("{.reg .pred add; setp.ne.b32 add, %" add ", 0; wgmma.mma_async.sync.aligned.m64n" n            \
               "k16.f32.bf16.bf16 {" names "}, %" p ", %" q ", add, 1, 1, 0, 0;}"                               \
               : __VA_ARGS__                                                                                   \
               : "l"(p_lines), "l"(q_lines), "r"(more))
#define SLM_EXPAND(n, names, p0, p1, p2, p3, q, ...)                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" names "}, {%" p0 ", %" p1 ", %" p2  \
               ", %" p3 "}, %" q ", 1, 1, 1, 1;"                                                               \
               : __VA_ARGS__                                                                                   \
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(q_lines))

// sums [64, N] (+)= p [64, 16] . q [16, N] of bfloat16, by a group of warps: warp w of four has rows 16 w to 16 w + 15, as
// multiply() has them. Without `more` they are replaced.
template <int N>
__device__ inline void multiply_lines(float (&sums)[N / 8][4], uint64_t p_lines, uint64_t q_lines, int more) {
  if constexpr (N == 16) SLM_PRODUCT("16", SLM_NAMES_8, "8", "9", "10", SLM_8(sums, 0));
  else if constexpr (N == 32) SLM_PRODUCT("32", SLM_NAMES_16, "16", "17", "18", SLM_16(sums, 0));
  else if constexpr (N == 48) SLM_PRODUCT("48", SLM_NAMES_24, "24", "25", "26", SLM_16(sums, 0), SLM_8(sums, 4));
  else if constexpr (N == 64) SLM_PRODUCT("64", SLM_NAMES_32, "32", "33", "34", SLM_32(sums, 0));
  else if constexpr (N == 96) SLM_PRODUCT("96", SLM_NAMES_48, "48", "49", "50", SLM_32(sums, 0), SLM_16(sums, 8));
  else if constexpr (N == 192) SLM_PRODUCT("192", SLM_NAMES_96, "96", "97", "98", SLM_64(sums, 0), SLM_32(sums, 16));
  else {
    static_assert(N == 256);
    SLM_PRODUCT("256", SLM_NAMES_128, "128", "129", "130", SLM_64(sums, 0), SLM_64(sums, 16));
  }
}
// The same with p in registers, as for multiply(), and q's lines as rows.
template <int N>
__device__ inline void multiply_rows(float (&sums)[N / 8][4], const uint32_t (&p)[4], uint64_t q_lines) {
  if constexpr (N == 192)
    SLM_EXPAND("192", SLM_NAMES_96, "96", "97", "98", "99", "100", SLM_64(sums, 0), SLM_32(sums, 16));
  else {
    static_assert(N == 256);
    SLM_EXPAND("256", SLM_NAMES_128, "128", "129", "130", "131", "132", SLM_64(sums, 0), SLM_64(sums, 16));
  }
}

#endif

}  // namespace slm_fast::cuda

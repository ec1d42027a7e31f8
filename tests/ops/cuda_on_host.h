// Enough of CUDA to run csrc/cuda/*.cu on a CPU, for tests: each thread of a block is a fiber, each block a host thread,
// so that the kernels' own code is checked, barriers and shuffles included. It shows neither races nor speed.
// cuda_on_host.py puts it in the place of CUDA's headers, rewrites kernel<<<...>>>(...) as on_host::launch and makes
// shared variables references to on_host::shared. Shared memory and fibers' stacks begin as poison: see csrc/poison.h.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define SLM_ON_HOST  // what stands here in the place of instructions that C++ has no word for
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float from) : value(from) {}
  explicit operator float() const { return value; }
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float from) {
    uint32_t wide;
    std::memcpy(&wide, &from, 4);
    bits = from != from ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

inline thread_local dim3 threadIdx, blockIdx;

namespace on_host {

inline void poison(void* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(memory)[i] = i % 2 ? 0x7f : 0xff;
}

constexpr int64_t kShared = 227 << 10, kStack = 64 << 10;
inline thread_local double shared_memory[kShared / 8];

// A block's own: each block is a new thread. `which` tells variables of one type apart.
template <class T, int which>
T& shared() {
  struct Memory {
    alignas(T) unsigned char bytes[sizeof(T)];
    Memory() { poison(bytes, sizeof(T)); }
  };
  static thread_local Memory memory;
  return reinterpret_cast<T&>(memory.bytes);
}

struct Cluster {
  std::barrier<> barrier;
  std::vector<char*> blocks;  // where each block's thread-local memory lies
};

struct Block {
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<bool> done;
  std::vector<int> arrived;  // at the block's barrier ([0]), at each warp's, then at each warp group's, then at two groups'
  std::vector<int> turn;
  std::vector<std::array<uint64_t, 12>> lanes;
  int running = 0;
  const std::function<void()>* kernel = nullptr;
  Cluster* cluster = nullptr;
  int rank = 0;

  void yield() { swapcontext(&fibers[running], &scheduler); }
  // Waits until `count` fibers have come; the last to come runs `at_last`.
  template <class AtLast>
  void meet(int where, int count, const AtLast& at_last) {
    const int mine = turn[where];
    if (++arrived[where] == count) {
      arrived[where] = 0;
      at_last();
      ++turn[where];
    }
    while (turn[where] == mine) yield();
  }
  void run(int threads) {
    fibers.resize(threads), done.assign(threads, false), lanes.resize(threads);
    arrived.assign(2 + threads / 32 + threads / 128, 0), turn.assign(arrived.size(), 0);
    for (int t = 0; t < threads; ++t) {
      stacks.emplace_back(new char[kStack]);
      poison(stacks[t].get(), kStack);
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = stacks[t].get(), fibers[t].uc_stack.ss_size = kStack;
      fibers[t].uc_link = &scheduler;
      makecontext(&fibers[t], reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (running = 0; running < threads; ++running) {
        if (done[running]) continue;
        any = true, threadIdx = dim3(running);
        swapcontext(&scheduler, &fibers[running]);
      }
    }
  }
  static void enter();
};
inline thread_local Block* block = nullptr;
inline void Block::enter() {
  (*block->kernel)();
  block->done[block->running] = true;
}

inline void run_block(dim3 at, int threads, const std::function<void()>& kernel, Cluster* cluster, int rank) {
  poison(shared_memory, kShared);
  Block mine;
  block = &mine, blockIdx = at, mine.kernel = &kernel, mine.cluster = cluster, mine.rank = rank;
  if (cluster) {
    cluster->blocks[rank] = reinterpret_cast<char*>(shared_memory);
    cluster->barrier.arrive_and_wait();
  }
  mine.run(threads);
  if (cluster) cluster->barrier.arrive_and_wait();  // no block's memory goes while another may read it
}

inline void launch_all(dim3 grid, int threads, int cluster_blocks, const std::function<void()>& kernel) {
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster_blocks) {
      Cluster cluster{std::barrier<>(cluster_blocks), std::vector<char*>(cluster_blocks)};
      std::vector<std::thread> blocks;
      for (int rank = 0; rank < cluster_blocks; ++rank)
        blocks.emplace_back([&, rank] { run_block(dim3(x + rank, y), threads, kernel, &cluster, rank); });
      for (auto& thread : blocks) thread.join();
    }
}

template <class... Rest>
auto launch(dim3 grid, int threads, Rest...) {
  return [=](const std::function<void()>& kernel) { launch_all(grid, threads, 1, kernel); };
}

// Every lane of the warp leaves values; then reads those of all: read(lane, which).
template <class T, class Read, size_t N>
void exchange(const T (&values)[N], const Read& read) {
  const int thread = threadIdx.x, warp = thread / 32;
  for (size_t n = 0; n < N; ++n) std::memcpy(&block->lanes[thread][n], &values[n], sizeof(T));
  block->meet(1 + warp, 32, [] {});
  read([&](int lane, int which) {
    T value;
    std::memcpy(&value, &block->lanes[warp * 32 + lane][which], sizeof(T));
    return value;
  });
  block->meet(1 + warp, 32, [] {});
}
template <class T>
T exchange(T value, int from) {
  exchange({value}, [&](const auto& of) { value = of(from, 0); });
  return value;
}

}  // namespace on_host

inline void __syncthreads() { on_host::block->meet(0, static_cast<int>(on_host::block->fibers.size()), [] {}); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return on_host::exchange(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return on_host::exchange(value, static_cast<int>(threadIdx.x % 32) ^ step);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = threadIdx.x % 32;
  return on_host::exchange(value, lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  on_host::exchange({vote}, [&](const auto& of) {
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(of(lane, 0)) << lane;
  });
  return votes;
}
template <class T>
T __reduce_max_sync(unsigned, T value) {
  on_host::exchange({value}, [&](const auto& of) {
    for (int lane = 0; lane < 32; ++lane) value = max(value, of(lane, 0));
  });
  return value;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline double rsqrt(double value) { return 1 / std::sqrt(value); }
inline void __trap() { std::abort(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace cooperative_groups {
struct cluster_group {
  void sync() const {
    on_host::Block& block = *on_host::block;
    block.meet(0, static_cast<int>(block.fibers.size()), [&] { block.cluster->barrier.arrive_and_wait(); });
  }
  template <class T>
  T* map_shared_rank(T* mine, int rank) const {
    const on_host::Cluster& cluster = *on_host::block->cluster;
    return reinterpret_cast<T*>(cluster.blocks[rank] + (reinterpret_cast<char*>(mine) - cluster.blocks[on_host::block->rank]));
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

namespace slm_fast::cuda {  // csrc/cuda/tensor_core.cuh says what these do
inline void copy_or_zero(void* to, const void* from, bool copied) {
  if (copied) std::memcpy(to, from, 16);
  else std::memset(to, 0, 16);
}
inline void end_of_copies() {}
template <int N>
void wait_for_copies() {}
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const int lane = threadIdx.x % 32;
  on_host::exchange({static_cast<const uint32_t*>(row)}, [&](const auto& of) {
    for (int m = 0; m < 4; ++m) to[m] = of(8 * m + lane / 4, 0)[lane % 4];
  });
}
inline void load_transposed(uint32_t (&to)[4], const void* row) {
  const int lane = threadIdx.x % 32, first = lane % 4 * 2;
  on_host::exchange({static_cast<const uint16_t*>(row)}, [&](const auto& of) {
    for (int m = 0; m < 4; ++m)
      to[m] = of(8 * m + first, 0)[lane / 4] | static_cast<uint32_t>(of(8 * m + first + 1, 0)[lane / 4]) << 16;
  });
}
template <class T>
float one_of(uint32_t both, bool second);
template <class T>
void multiply(float (&sums)[4], const uint32_t (&p)[4], uint32_t q0, uint32_t q1) {
  const int lane = threadIdx.x % 32;
  on_host::exchange({p[0], p[1], p[2], p[3], q0, q1}, [&](const auto& of) {
    for (int m = 0; m < 4; ++m) {
      const int row = lane / 4, column = lane % 4 * 2 + m % 2;
      double sum = sums[m];
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(one_of<T>(of(row * 4 + k % 8 / 2, m / 2 + k / 8 * 2), k % 2)) *
               one_of<T>(of(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
      sums[m] = static_cast<float>(sum);
    }
  });
}
inline void multiply(double (&sums)[4], const double (&p)[8], const double (&q)[4]) {
  const int lane = threadIdx.x % 32;
  on_host::exchange({p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], q[0], q[1], q[2], q[3]}, [&](const auto& of) {
    for (int m = 0; m < 4; ++m)
      for (int k = 0; k < 16; ++k)
        sums[m] += of(lane / 4 * 4 + k % 4, k / 4 * 2 + m / 2) * of((lane % 4 * 2 + m % 2) * 4 + k % 4, 8 + k / 4);
  });
}
inline void let_next_begin() {}
inline void wait_for_previous() {}
inline void arrive_at_cluster() {}
inline void wait_for_cluster() { cooperative_groups::this_cluster().sync(); }
}  // namespace slm_fast::cuda

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  int dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= on_host::kShared ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Argument>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t* config, void (*kernel)(Argument), const Argument& argument) {
  const int cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  on_host::launch_all(config->gridDim, config->blockDim.x, cluster, [&] { kernel(argument); });
  return cudaSuccess;
}

#include "hopper_on_host.h"

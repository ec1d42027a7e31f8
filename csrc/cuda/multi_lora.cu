// multi_lora for decoding: one row per route, one launch. Specified in slm_fast/ops/multi_lora.py.
//
// A row's LoRA weights are a few hundred kilobytes, used once, so the floor is reading them: 2 R (I + O) bytes per row
// at DRAM (or, for slots that rows share, L2) bandwidth. Each block of a row shrinks its share of the in-features, adds
// up the R sums of all shares in a fixed order, and expands its share of the out-features. On sm_90 the blocks form a
// cluster and read each other's sums in shared memory; elsewhere the sums go through global memory and a second launch.
#include <cooperative_groups.h>

#include "clusters.cuh"
#include "kernels.h"
#include "launch.h"
#include "tensor_core.cuh"
#include "vector.cuh"

namespace slm_fast::cuda {
namespace {

constexpr int kWarps = kDecodeThreads / 32;

struct Sums {
  float part[kMostRank];   // this block's share of x . A^T
  float whole[kMostRank];  // sum of all shares, times the weight
  int64_t row[kMostRank];  // row of lora_a and lora_b, or -1
  float spread[kDecodeThreads][kPiece + 1];
};

__device__ inline void find_rows(const Decode& op, int64_t sample, Sums& sums) {
  for (int j = threadIdx.x; j < op.picks * op.rank; j += kDecodeThreads) {
    const int64_t slot = op.slot_ids[sample * op.picks + j / op.rank];
    sums.row[j] = slot >= 0 && slot < op.slots ? slot * op.rank + j % op.rank : -1;
  }
  __syncthreads();
}

// sums.part[j] = x . A[j] over this block's features; each warp computes two of every 2 kWarps rows at once.
template <class T>
__device__ inline void shrink(const Decode& op, int64_t sample, int block, Sums& sums) {
  const Span span = share_of(op.features_in, op.blocks, block);
  const T* x = static_cast<const T*>(op.x) + sample * op.features_in;
  const int lane = threadIdx.x % 32, rows = static_cast<int>(op.picks * op.rank);
  for (int j = threadIdx.x / 32; j < rows; j += 2 * kWarps) {
    const int64_t row[2] = {sums.row[j], j + kWarps < rows ? sums.row[j + kWarps] : -1};
    float sum[2] = {};
#pragma unroll 2
    for (int64_t i = span.begin + lane * kPiece; i < span.end; i += 32 * kPiece) {
      float x_piece[kPiece], a_piece[2][kPiece] = {};
      load(x + i, x_piece);
#pragma unroll
      for (int m = 0; m < 2; ++m)
        if (row[m] >= 0) load(static_cast<const T*>(op.lora_a) + row[m] * op.features_in + i, a_piece[m]);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kPiece; ++n) sum[m] = fmaf(x_piece[n], a_piece[m][n], sum[m]);
    }
    for (int step = 16; step > 0; step /= 2)
#pragma unroll
      for (int m = 0; m < 2; ++m) sum[m] += __shfl_xor_sync(~0u, sum[m], step);
    if (lane == 0) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
        if (j + m * kWarps < rows) sums.part[j + m * kWarps] = row[m] < 0 ? 0.f : sum[m];
    }
  }
  __syncthreads();
}

// The sum of row j over all blocks, scaled by the row's weight; part(b) is where block b left its share.
template <class Part>
__device__ inline float whole(const Decode& op, int64_t sample, const Sums& sums, int j, const Part& part) {
  float sum = 0.f;
#pragma unroll
  for (int block = 0; block < kMostBlocks; ++block)  // unrolled, so that all loads are in flight at once
    if (block < op.blocks) sum += part(block)[j];
  return sums.row[j] < 0 ? 0.f : sum * op.weights[sample * op.picks + j / op.rank];
}

// Which pieces of y a thread sums. With fewer pieces than threads, several share one: each takes every `helpers`-th
// row, and the first adds the others' results, in order.
struct Columns {
  int many, helpers, helper;
  int64_t begin;  // of the thread's piece

  __device__ Columns(const Span& span, int64_t first) {
    many = static_cast<int>(min((span.end - span.begin) / kPiece - first, static_cast<int64_t>(kDecodeThreads)));
    helpers = kDecodeThreads / max(many, 1), helper = threadIdx.x / max(many, 1);
    begin = span.begin + (first + threadIdx.x % max(many, 1)) * kPiece;
  }
};

// Prefetch of the first rows of B that a thread needs, before their coefficients are known.
template <class T>
struct Ahead {
  static constexpr int kRows = 4, kWords = kPiece * sizeof(T) / 16;
  uint4 bits[kRows][kWords];

  __device__ Ahead(const Decode& op, int block, const Sums& sums) {
    const Columns columns(share_of(op.features_out, op.blocks, block), 0);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const int j = columns.helper + n * columns.helpers;
      const int64_t row = columns.many > 0 && columns.helper < columns.helpers && j < op.picks * op.rank ? sums.row[j] : -1;
      const T* from = static_cast<const T*>(op.lora_b) + row * op.features_out + columns.begin;
#pragma unroll
      for (int word = 0; word < kWords; ++word)
        bits[n][word] = row < 0 ? uint4{0, 0, 0, 0} : reinterpret_cast<const uint4*>(from)[word];
    }
  }
};

// y = base + sums.whole . B over this block's features.
template <class T>
__device__ inline void expand(const Decode& op, int64_t sample, int block, Sums& sums, const Ahead<T>& ahead) {
  const Span span = share_of(op.features_out, op.blocks, block);
  const int rows = static_cast<int>(op.picks * op.rank);
  const auto add = [&](int j, const T* b, float(&sum)[kPiece]) {
    float b_piece[kPiece];
    load(b, b_piece);
#pragma unroll
    for (int n = 0; n < kPiece; ++n) sum[n] = fmaf(sums.whole[j], b_piece[n], sum[n]);
  };
  for (int64_t first = 0; first < (span.end - span.begin) / kPiece; first += kDecodeThreads) {
    const Columns columns(span, first);
    float sum[kPiece] = {};
    if (columns.helper < columns.helpers) {
      int j = columns.helper;
      if (first == 0) {
#pragma unroll
        for (int n = 0; n < Ahead<T>::kRows; ++n, j += columns.helpers)
          if (j < rows && sums.row[j] >= 0) add(j, reinterpret_cast<const T*>(ahead.bits[n]), sum);
      }
#pragma unroll 4
      for (; j < rows; j += columns.helpers)
        if (sums.row[j] >= 0)
          add(j, static_cast<const T*>(op.lora_b) + sums.row[j] * op.features_out + columns.begin, sum);
#pragma unroll
      for (int n = 0; n < kPiece; ++n) sums.spread[threadIdx.x][n] = sum[n];
    }
    __syncthreads();
    if (columns.helper == 0) {
      for (int other = 1; other < columns.helpers; ++other)
#pragma unroll
        for (int n = 0; n < kPiece; ++n) sum[n] += sums.spread[other * columns.many + threadIdx.x][n];
      if (op.base) {
        float base[kPiece];
        load(static_cast<const T*>(op.base) + sample * op.features_out + columns.begin, base);
#pragma unroll
        for (int n = 0; n < kPiece; ++n) sum[n] += base[n];
      }
      store(static_cast<T*>(op.y) + sample * op.features_out + columns.begin, sum);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kDecodeThreads) decode_in_cluster(const Decode op) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  const cg::cluster_group cluster = cg::this_cluster();
  __shared__ Sums sums;
  const int64_t sample = blockIdx.y;
  let_next_begin();
  wait_for_previous();
  find_rows(op, sample, sums);
  shrink<T>(op, sample, blockIdx.x, sums);
  const Ahead<T> ahead(op, blockIdx.x, sums);
  cluster.sync();
  for (int j = threadIdx.x; j < op.picks * op.rank; j += kDecodeThreads)
    sums.whole[j] = whole(op, sample, sums, j, [&](int block) { return cluster.map_shared_rank(sums.part, block); });
  __syncthreads();
  arrive_at_cluster();
  expand<T>(op, sample, blockIdx.x, sums, ahead);
  wait_for_cluster();  // no block exits while its sums are read
#endif
}

template <class T>
__global__ void __launch_bounds__(kDecodeThreads) decode_shrink(const Decode op) {
  __shared__ Sums sums;
  const int64_t sample = blockIdx.y;
  find_rows(op, sample, sums);
  shrink<T>(op, sample, blockIdx.x, sums);
  float* to = op.partial + (sample * op.blocks + blockIdx.x) * op.picks * op.rank;
  for (int j = threadIdx.x; j < op.picks * op.rank; j += kDecodeThreads) to[j] = sums.part[j];
}

template <class T>
__global__ void __launch_bounds__(kDecodeThreads) decode_expand(const Decode op) {
  __shared__ Sums sums;
  const int64_t sample = blockIdx.y;
  find_rows(op, sample, sums);
  const Ahead<T> ahead(op, blockIdx.x, sums);
  const float* from = op.partial + sample * op.blocks * op.picks * op.rank;
  for (int j = threadIdx.x; j < op.picks * op.rank; j += kDecodeThreads)
    sums.whole[j] = whole(op, sample, sums, j, [&](int block) { return from + block * op.picks * op.rank; });
  __syncthreads();
  expand<T>(op, sample, blockIdx.x, sums, ahead);
}

template <class T>
cudaError_t launch(const Decode& op, bool clusters, cudaStream_t stream) {
  const dim3 grid(op.blocks, static_cast<unsigned>(op.rows));
  if (clusters) return launch_clusters(decode_in_cluster<T>, op, grid, kDecodeThreads, op.blocks, 0, stream);
  decode_shrink<T><<<grid, kDecodeThreads, 0, stream>>>(op);
  decode_expand<T><<<grid, kDecodeThreads, 0, stream>>>(op);
  return cudaGetLastError();
}

}  // namespace

cudaError_t decode(const Decode& op, bool clusters, cudaStream_t stream) {
  switch (op.type) {
    case Type::float32: return launch<float>(op, clusters, stream);
    case Type::bfloat16: return launch<__nv_bfloat16>(op, clusters, stream);
    case Type::float16: return launch<__half>(op, clusters, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace slm_fast::cuda

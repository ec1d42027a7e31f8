// multi_lora for decoding: one row a route, one launch. The specification is slm_fast/ops/multi_lora.py.
//
// A row's weights are some hundred kilobytes that are used once, so the floor is reading them: 2 R (I + O) bytes a row
// at the memory's (or, for slots that rows share, the L2's) bandwidth. The blocks of one row each shrink their share of
// the in-features, add up the R sums of all shares in a fixed order, and expand their share of the out-features. On
// sm_90 those blocks are a cluster and read each other's sums in shared memory; elsewhere the sums go through memory
// and a second launch.
#include <cooperative_groups.h>

#include "kernels.h"
#include "launch.h"
#include "vector.cuh"

namespace slm_fast::cuda {
namespace {

constexpr int kWarps = kDecodeThreads / 32;

struct Sums {
  float part[kMostRank];   // this block's share of x . A^T
  float whole[kMostRank];  // of all shares, times the weight
  int64_t row[kMostRank];  // which row of lora_a and lora_b, or -1
  float spread[kDecodeThreads][kPiece + 1];
};

__device__ inline void find_rows(const Decode& op, int64_t sample, Sums& sums) {
  for (int j = threadIdx.x; j < op.picks * op.rank; j += kDecodeThreads) {
    const int64_t slot = op.slot_ids[sample * op.picks + j / op.rank];
    sums.row[j] = slot >= 0 && slot < op.slots ? slot * op.rank + j % op.rank : -1;
  }
  __syncthreads();
}

// sums.part[j] = x . A[j] over this block's features; a warp takes every kWarps-th row.
template <class T>
__device__ inline void shrink(const Decode& op, int64_t sample, int block, Sums& sums) {
  const Span span = share_of(op.features_in, op.blocks, block);
  const T* x = static_cast<const T*>(op.x) + sample * op.features_in;
  const int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < op.picks * op.rank; j += kWarps) {
    float sum = 0.f;
    if (sums.row[j] >= 0) {
      const T* a = static_cast<const T*>(op.lora_a) + sums.row[j] * op.features_in;
#pragma unroll 4
      for (int64_t i = span.begin + lane * kPiece; i < span.end; i += 32 * kPiece) {
        float x_piece[kPiece], a_piece[kPiece];
        load(x + i, x_piece);
        load(a + i, a_piece);
#pragma unroll
        for (int n = 0; n < kPiece; ++n) sum = fmaf(x_piece[n], a_piece[n], sum);
      }
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) sums.part[j] = sum;
  }
  __syncthreads();
}

// y = base + sums.whole . B over this block's features. Where there are fewer pieces than threads, several threads
// share a column and their sums are added in order.
template <class T>
__device__ inline void expand(const Decode& op, int64_t sample, int block, Sums& sums) {
  const Span span = share_of(op.features_out, op.blocks, block);
  const int rows = static_cast<int>(op.picks * op.rank);
  const int64_t pieces = (span.end - span.begin) / kPiece;
  for (int64_t first = 0; first < pieces; first += kDecodeThreads) {
    const int columns = static_cast<int>(min(pieces - first, static_cast<int64_t>(kDecodeThreads)));
    const int helpers = kDecodeThreads / columns, helper = threadIdx.x / columns;
    const int64_t o = span.begin + (first + threadIdx.x % columns) * kPiece;
    float sum[kPiece] = {};
    if (helper < helpers) {
#pragma unroll 4
      for (int j = helper; j < rows; j += helpers) {
        if (sums.row[j] < 0) continue;
        float b_piece[kPiece];
        load(static_cast<const T*>(op.lora_b) + sums.row[j] * op.features_out + o, b_piece);
#pragma unroll
        for (int n = 0; n < kPiece; ++n) sum[n] = fmaf(sums.whole[j], b_piece[n], sum[n]);
      }
#pragma unroll
      for (int n = 0; n < kPiece; ++n) sums.spread[threadIdx.x][n] = sum[n];
    }
    __syncthreads();
    if (helper == 0) {
      for (int other = 1; other < helpers; ++other)
#pragma unroll
        for (int n = 0; n < kPiece; ++n) sum[n] += sums.spread[other * columns + threadIdx.x][n];
      if (op.base) {
        float base[kPiece];
        load(static_cast<const T*>(op.base) + sample * op.features_out + o, base);
#pragma unroll
        for (int n = 0; n < kPiece; ++n) sum[n] += base[n];
      }
      store(static_cast<T*>(op.y) + sample * op.features_out + o, sum);
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
  find_rows(op, sample, sums);
  shrink<T>(op, sample, blockIdx.x, sums);
  cluster.sync();
  for (int j = threadIdx.x; j < op.picks * op.rank; j += kDecodeThreads) {
    float sum = 0.f;
    for (int block = 0; block < op.blocks; ++block) sum += cluster.map_shared_rank(sums.part, block)[j];
    sums.whole[j] = sums.row[j] < 0 ? 0.f : sum * op.weights[sample * op.picks + j / op.rank];
  }
  cluster.sync();  // nobody leaves while its sums are read
  expand<T>(op, sample, blockIdx.x, sums);
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
  const float* from = op.partial + sample * op.blocks * op.picks * op.rank;
  for (int j = threadIdx.x; j < op.picks * op.rank; j += kDecodeThreads) {
    float sum = 0.f;
    for (int block = 0; block < op.blocks; ++block) sum += from[block * op.picks * op.rank + j];
    sums.whole[j] = sums.row[j] < 0 ? 0.f : sum * op.weights[sample * op.picks + j / op.rank];
  }
  __syncthreads();
  expand<T>(op, sample, blockIdx.x, sums);
}

template <class T>
cudaError_t launch(const Decode& op, bool clusters, cudaStream_t stream) {
  const dim3 grid(op.blocks, static_cast<unsigned>(op.rows));
  if (clusters) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(op.blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(kDecodeThreads), config.stream = stream;
    config.attrs = &cluster, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, decode_in_cluster<T>, op);
  }
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

// retrieve on a GPU: mean of cosines over groups, or dot products, K <= 32. Specified in slm_fast/ops/retrieve.py.
//
// Products use float64 tensor cores, so that scores rounded to float32 match the reference and equal keys get equal
// scores. Two launches: one scores the keys, few (retrieve_few.cuh) or many (retrieve_many.cuh, where each block keeps
// its best); the other picks each query's best from all scores or all blocks' bests (best.cuh).
#include "best.cuh"
#include "kernels.h"
#include "launch.h"
#include "retrieve_few.cuh"
#include "retrieve_many.cuh"

namespace slm_fast::cuda {
namespace {

// A pair of launches: the call's queries from `first` on.
struct Slab {
  RetrieveOnDevice on;
  int64_t first;
};

template <class T, int N, bool kWhole>
__global__ void __launch_bounds__(kFewThreads, 2) score_few(const Slab slab) {
  using Memory = FewShared<N>;
  __shared__ Memory shared;
  let_next_begin();
  Few<T, N, kWhole>(slab.on, shared, slab.first).run();
}

template <class T, int N, bool kWhole>
__global__ void __launch_bounds__(kRetrieveThreads, 1) score_many(const Slab slab) {
  extern __shared__ double shared[];
  let_next_begin();
  Many<T, N, kWhole>(slab.on, shared).run(static_cast<long long*>(slab.on.scratch));
}

struct Lists {
  long long of[kMostPickWarps * kMostPicks];
};

// One block per query. Its warps pick from strips of the candidates, then the first warp picks from their results.
__global__ void __launch_bounds__(32 * kMostPickWarps) pick(const Slab slab) {
  __shared__ Lists lists;
  const Retrieve& op = slab.on.call;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = slab.on.cut.pick_warps;
  const int k = static_cast<int>(op.k);
  const int64_t query = slab.first + blockIdx.x, count = slab.on.cut.few ? op.slots : slab.on.cut.parts * k;
  Best best[1];
  long long candidates[1][kStrip / 32];
  wait_for_previous();
  for (int64_t begin = warp * kStrip; begin < count; begin += warps * kStrip) {
    const long long least = best[0].last(k);
#pragma unroll
    for (int i = 0; i < kStrip / 32; ++i) {
      const int64_t at = begin + i * 32 + lane;
      candidates[0][i] = kNone;
      if (at >= count) continue;
      if (slab.on.cut.few)
        candidates[0][i] =
            candidate(op, query, at, static_cast<const float*>(slab.on.scratch)[blockIdx.x * count + at], least);
      else candidates[0][i] = static_cast<const long long*>(slab.on.scratch)[query * count + at];
    }
    take(best, candidates, k);
  }
  if (warps > 1) {
    if (lane < k) lists.of[warp * k + lane] = best[0].mine;
    __syncthreads();
    if (warp > 0) return;
    for (int begin = k; begin < warps * k; begin += kStrip) {  // it already has its own
#pragma unroll
      for (int i = 0; i < kStrip / 32; ++i) {
        const int at = begin + i * 32 + lane;
        candidates[0][i] = at < warps * k ? lists.of[at] : kNone;
      }
      take(best, candidates, k);
    }
  }
  write_route(op, query, best[0]);
}

cudaError_t launch_pick(const Slab& slab, int64_t queries, cudaStream_t stream) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(queries)), config.blockDim = dim3(32 * slab.on.cut.pick_warps);
  config.stream = stream, config.attrs = &early, config.numAttrs = slab.on.early ? 1 : 0;
  return cudaLaunchKernelEx(&config, pick, slab);
}

template <class T, int N, bool kWhole>
cudaError_t launch(const RetrieveOnDevice& on, cudaStream_t stream) {
  const RetrieveCut& cut = on.cut;
  const int64_t all = on.call.queries;
  if (!cut.few) {
    const Slab slab{on, 0};
    const int bytes = static_cast<int>(cut.shared);
    const cudaError_t status =
        cudaFuncSetAttribute(score_many<T, N, kWhole>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    const dim3 grid(static_cast<unsigned>(blocks_of(all, cut.tile)), static_cast<unsigned>(cut.parts));
    score_many<T, N, kWhole><<<grid, kRetrieveThreads, bytes, stream>>>(slab);
    return launch_pick(slab, all, stream);
  }
  for (int64_t first = 0; first < all; first += cut.slab) {
    const Slab slab{on, first};
    const int64_t queries = std::min(cut.slab, all - first);
    const dim3 grid(static_cast<unsigned>(cut.parts), static_cast<unsigned>(blocks_of(queries, cut.tile)));
    if (cut.parts > 0) score_few<T, N, kWhole><<<grid, kFewThreads, 0, stream>>>(slab);
    if (const cudaError_t status = launch_pick(slab, queries, stream); status != cudaSuccess) return status;
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const RetrieveOnDevice& on, cudaStream_t stream) {
  if (!on.whole) return on.cut.tile == 8 ? launch<T, 1, false>(on, stream) : cudaErrorInvalidValue;
  switch (on.cut.tile) {
    case 8: return launch<T, 1, true>(on, stream);
    case 16: return launch<T, 2, true>(on, stream);
    case 32: return launch<T, 4, true>(on, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t retrieve(const RetrieveOnDevice& on, cudaStream_t stream) {
  switch (on.call.type) {
    case Type::float32: return launch<float>(on, stream);
    case Type::bfloat16: return launch<__nv_bfloat16>(on, stream);
    case Type::float16: return launch<__half>(on, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace slm_fast::cuda

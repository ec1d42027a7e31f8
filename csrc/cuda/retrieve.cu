// retrieve on a GPU: mean of cosines over groups, or plain products, K <= 32. The specification is
// slm_fast/ops/retrieve.py.
//
// Keys are read once a block of kQueries queries, 8 lanes a key, and scored in float64 against the queries in shared
// memory, so that scores rounded to float32 are the reference's. A score and its slot make one 64-bit integer that
// sorts by falling score, then by rising id; a warp keeps the best 32 in its lanes, one each, and a better one is put
// in its place with one ballot and one shuffle. Warps' lists are joined in shared memory, those of several blocks by a
// second launch.
#include "kernels.h"
#include "launch.h"
#include "vector.cuh"

namespace slm_fast::cuda {
namespace {

constexpr int kWarps = kRetrieveThreads / 32;
constexpr double kEpsilon = 1e-12;  // a vector no longer than this has cosine 0 with everything
constexpr long long kNone = INT64_MIN;

__device__ inline long long pack(float score, int64_t slot) {
  int bits = __float_as_int(score == 0.f ? 0.f : score);  // both zeros are one
  bits ^= (bits >> 31) & 0x7fffffff;                      // integers in the order of the floats
  return static_cast<long long>(static_cast<unsigned long long>(bits) << 32) |
         static_cast<long long>(0xffffffffu - static_cast<unsigned>(slot));
}
__device__ inline float score_of(long long packed) {
  int bits = static_cast<int>(packed >> 32);
  bits ^= (bits >> 31) & 0x7fffffff;
  return __int_as_float(bits);
}
__device__ inline int64_t slot_of(long long packed) { return 0xffffffffu - static_cast<unsigned>(packed); }

// The best 32 so far: lane i has the i-th.
struct Best {
  long long mine = kNone;

  // The same candidate in all lanes. Whether it was better than the last of the best k.
  __device__ bool offer(long long candidate, int k) {
    if (candidate <= __shfl_sync(~0u, mine, k - 1)) return false;
    const int lane = threadIdx.x % 32, place = __popc(__ballot_sync(~0u, mine > candidate));
    const long long before = __shfl_up_sync(~0u, mine, 1);
    mine = lane < place ? mine : lane == place ? candidate : before;
    return true;
  }
  // A sorted list of k.
  __device__ void offer_all(const long long* list, int k) {
    for (int i = 0; i < k; ++i)
      if (!offer(list[i], k)) return;
  }
};

__device__ inline float sum_of_lanes(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ inline void write_route(const Retrieve& op, int64_t query, const Best& best) {
  const int lane = threadIdx.x % 32, k = static_cast<int>(op.k);
  const bool found = lane < k && best.mine != kNone;
  const float score = found ? score_of(best.mine) : 0.f;
  float share;
  if (op.softmax) {
    // The list is sorted, so lane 0 has the highest.
    const float scaled = score / static_cast<float>(op.temperature), top = __shfl_sync(~0u, scaled, 0);
    share = found ? expf(scaled - top) : 0.f;
  } else {
    share = score > 0.f ? score : 0.f;
    if (!(sum_of_lanes(share) > 0.f)) share = found ? 1.f : 0.f;
  }
  const float total = sum_of_lanes(share);
  if (lane < k) {
    op.slot_ids[query * op.k + lane] = found ? slot_of(best.mine) : -1;
    op.weights[query * op.k + lane] = found ? share / total : 0.f;
  }
}

// V numbers of a key, zeros from `count` on.
template <int V, class T>
__device__ inline void load_key(const T* from, int64_t count, double (&to)[V]) {
  if constexpr (V > 1) {
    float values[V] = {};
    if (count >= V) load(from, values);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = values[v];
  } else {
    to[0] = count > 0 ? to_float(*from) : 0.0;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kRetrieveThreads) search(const RetrieveOnDevice on) {
  const Retrieve& op = on.call;
  const int64_t d = op.width / op.groups, padded = padded_group(d, V), row = op.groups * padded;
  extern __shared__ double shared[];
  double* queries = shared;                          // [kQueries, G, padded], lane by lane as the keys are read
  double* lengths = queries + kQueries * row;        // [kQueries, G]
  auto* lists = reinterpret_cast<long long*>(lengths + kQueries * op.groups);  // [kWarps, kQueries, 32]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % 8;
  const int k = static_cast<int>(op.k);

  for (int64_t i = threadIdx.x; i < kQueries * row; i += kRetrieveThreads) {
    const int64_t q = i / row, g = i % row / padded, at = i % padded;
    const int64_t element = at / (8 * V) * (8 * V) + at % 8 * V + at / 8 % V;  // lane at % 8, its (at / 8 % V)-th number
    const bool inside = first + q < op.queries && element < d;
    queries[i] = inside ? to_float(static_cast<const T*>(op.query)[(first + q) * op.width + g * d + element]) : 0.0;
  }
  __syncthreads();
  for (int64_t i = warp; i < kQueries * op.groups; i += kWarps) {
    double square = 0;
    for (int64_t n = lane; n < padded; n += 32) square += queries[i * padded + n] * queries[i * padded + n];
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
    if (lane == 0) lengths[i] = sqrt(square);
  }
  __syncthreads();

  Best best[kQueries];
  const int64_t end = min(op.slots, (blockIdx.y + int64_t{1}) * on.span);
  for (int64_t p0 = blockIdx.y * on.span + warp * 4; p0 < end; p0 += kKeysAtOnce) {
    const int64_t p = p0 + lane / 8;
    const T* key = static_cast<const T*>(op.keys) + min(p, op.slots - 1) * op.width;
    float score[kQueries] = {};
    for (int64_t g = 0; g < op.groups; ++g) {
      double product[kQueries] = {}, square = 0;
#pragma unroll 2
      for (int64_t n = 0; n < padded; n += 8 * V) {
        double values[V];
        load_key<V>(key + g * d + n + part * V, d - n - part * V, values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          square += values[v] * values[v];
#pragma unroll
          for (int q = 0; q < kQueries; ++q)
            product[q] += values[v] * queries[q * row + g * padded + n + v * 8 + part];
        }
      }
      for (int step = 4; step > 0; step /= 2) {  // the 8 lanes of a key; all of them get the same sum
        square += __shfl_xor_sync(~0u, square, step);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) product[q] += __shfl_xor_sync(~0u, product[q], step);
      }
      const double length = sqrt(square);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        if (op.cosine) {
          const double other = lengths[q * op.groups + g];
          score[q] += length > kEpsilon && other > kEpsilon ? static_cast<float>(product[q] / (length * other)) : 0.f;
        } else {
          score[q] = static_cast<float>(product[q] + (op.bias && p < op.slots ? op.bias[p] : 0.f));
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      bool allowed = p < end && first + q < op.queries;
      if (allowed && op.mask) allowed = op.mask[(op.mask_per_query ? (first + q) * op.slots : 0) + p];
      const long long packed = allowed ? pack(score[q] / static_cast<float>(op.groups), p) : kNone;
#pragma unroll
      for (int n = 0; n < 4; ++n) best[q].offer(__shfl_sync(~0u, packed, n * 8), k);
    }
  }

#pragma unroll
  for (int q = 0; q < kQueries; ++q) lists[(warp * kQueries + q) * kMostPicks + lane] = best[q].mine;
  __syncthreads();
  if (warp >= kQueries || first + warp >= op.queries) return;
  Best joined;
  for (int w = 0; w < kWarps; ++w) joined.offer_all(lists + (w * kQueries + warp) * kMostPicks, k);
  if (on.splits == 1) write_route(op, first + warp, joined);
  else if (lane < k) on.parts[(blockIdx.y * op.queries + first + warp) * op.k + lane] = joined.mine;
}

__global__ void __launch_bounds__(kRetrieveThreads) join(const RetrieveOnDevice on) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (query >= on.call.queries) return;
  Best best;
  for (int part = 0; part < on.splits; ++part)
    best.offer_all(
        reinterpret_cast<const long long*>(on.parts) + (part * on.call.queries + query) * on.call.k,
        static_cast<int>(on.call.k));
  write_route(on.call, query, best);
}

template <class T, int V>
cudaError_t launch(const RetrieveOnDevice& on, cudaStream_t stream) {
  if (on.shared > 48 << 10) {
    const cudaError_t status =
        cudaFuncSetAttribute(search<T, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(on.shared));
    if (status != cudaSuccess) return status;
  }
  search<T, V><<<dim3(on.tiles, on.splits), kRetrieveThreads, on.shared, stream>>>(on);
  if (on.splits > 1)
    join<<<static_cast<unsigned>(blocks_of(on.call.queries, kWarps)), kRetrieveThreads, 0, stream>>>(on);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const RetrieveOnDevice& on, cudaStream_t stream) {
  return on.vector > 1 ? launch<T, 16 / sizeof(T)>(on, stream) : launch<T, 1>(on, stream);
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

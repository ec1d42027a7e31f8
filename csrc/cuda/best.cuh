// A query's best slots, as a warp keeps them.
//
// Score and slot are packed into one 64-bit integer that sorts by descending score, then by ascending id. A warp keeps
// the best 32 slots, one per lane and each slot once; a better one is inserted with a few ballots and shuffles.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "calls.h"
#include "launch.h"

namespace slm_fast::cuda {

constexpr long long kNone = INT64_MIN;  // its lower half is that of slot kMostSlots, which does not exist

// Maps a float to an integer of the same order.
__device__ inline int ordered(float score) {
  const int bits = __float_as_int(score == 0.f ? 0.f : score);  // -0 becomes 0
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ inline long long pack(float score, int64_t slot) {
  return static_cast<long long>(static_cast<unsigned long long>(ordered(score)) << 32) |
         static_cast<long long>(0xffffffffu - static_cast<unsigned>(slot));
}
__device__ inline float score_of(long long packed) {
  int bits = static_cast<int>(packed >> 32);
  bits ^= bits >> 31 & 0x7fffffff;
  return __int_as_float(bits);
}
__device__ inline int64_t slot_of(long long packed) { return 0xffffffffu - static_cast<unsigned>(packed); }

// A query's candidate for a key of this score: kNone if its slot must not be returned or the score is below that of
// `least`. Slot and mask are read only if it is not.
__device__ inline long long candidate(const Retrieve& op, int64_t query, int64_t key, float score, long long least) {
  if (ordered(score) < static_cast<int>(least >> 32)) return kNone;
  const int64_t slot = op.key_slot ? op.key_slot[key] : key;
  if (slot < 0 || slot >= op.mask_slots) return kNone;
  if (op.mask && !op.mask[(op.mask_per_query ? query * op.mask_slots : 0) + slot]) return kNone;
  return pack(score, slot);
}

__device__ inline long long highest_of_lanes(long long mine) {
  const int high = static_cast<int>(mine >> 32), highest = __reduce_max_sync(~0u, high);
  const unsigned low = __reduce_max_sync(~0u, high == highest ? static_cast<unsigned>(mine) : 0u);
  return static_cast<long long>(static_cast<unsigned long long>(highest) << 32) | low;
}

// The best 32 slots so far: lane i holds the i-th.
struct Best {
  long long mine = kNone;

  __device__ long long last(int k) const { return __shfl_sync(~0u, mine, k - 1); }

  // Inserts a candidate, the same in all lanes. Returns whether it beats the k-th best. Branchless, so that the work
  // for several queries overlaps.
  __device__ bool offer(long long candidate, int k) {
    const int lane = threadIdx.x % 32;
    const bool better = candidate > last(k);
    const unsigned held = __ballot_sync(~0u, static_cast<unsigned>(mine) == static_cast<unsigned>(candidate));
    const int place = __popc(__ballot_sync(~0u, mine > candidate));
    const int end = held ? __ffs(static_cast<int>(held)) - 1 : 31;  // the slot's old place, or the last one drops out
    const long long before = __shfl_up_sync(~0u, mine, 1);
    if (better && lane >= place && lane <= end) mine = lane == place ? candidate : before;
    return better;
  }
};

// Merges a strip of candidates, N per lane, into the lists of Q queries: repeatedly inserts the best one left, dropping
// others of its slot, until it no longer beats the list.
template <int Q, int N>
__device__ inline void take(Best (&best)[Q], long long (&candidates)[Q][N], int k) {
  for (bool more = true; more;) {
    more = false;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      long long mine = candidates[q][0];
#pragma unroll
      for (int n = 1; n < N; ++n) mine = max(mine, candidates[q][n]);
      const long long top = highest_of_lanes(mine);
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (static_cast<unsigned>(candidates[q][n]) == static_cast<unsigned>(top)) candidates[q][n] = kNone;
      more |= best[q].offer(top, k);
    }
  }
}

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

}  // namespace slm_fast::cuda

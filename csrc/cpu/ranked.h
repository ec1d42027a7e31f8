// Slots in the reference's ranking order, and short lists of the best.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vec.h"

namespace slm_fast::SLM_ISA {

// A slot and its score packed into one sortable number: by float32 score, NaN first, ties by lower id.
using Ranked = uint64_t;

inline Ranked ranked(float score, int64_t slot) {
  const uint32_t bits = float_to_bits(score + 0.0f);  // -0 becomes 0
  const uint32_t rising = std::isnan(score) ? ~uint32_t{0} : bits ^ (bits >> 31 ? ~uint32_t{0} : uint32_t{1} << 31);
  return uint64_t{rising} << 32 | static_cast<uint32_t>(~slot);
}
inline int64_t slot_of(Ranked one) { return static_cast<uint32_t>(~one); }
inline float score_of(Ranked one) {
  const auto rising = static_cast<uint32_t>(one >> 32);
  return bits_to_float(rising ^ (rising >> 31 ? uint32_t{1} << 31 : ~uint32_t{0}));  // all ones becomes NaN again
}
struct Better {
  bool operator()(Ranked one, Ranked other) const { return one > other; }
};

// Candidates for the best: the first `count` of `slots`. Pruned only when full, so adding is cheap.
struct Shortlist {
  Ranked* slots;
  int64_t count, most;

  static int64_t capacity(int64_t most) { return most + std::max<int64_t>(16, most); }
  // Returns true when full.
  bool add(Ranked one) {
    slots[count++] = one;
    return count == capacity(most);
  }
  void keep_best() {
    if (count <= most) return;
    std::nth_element(slots, slots + most - 1, slots + count, Better{});
    count = most;
  }
  // Keeps scores not below cutoff(the k-th best), at most the `most` best. Returns the highest score that need no
  // longer be added, or NaN.
  template <class Cutoff>
  float keep_likely(int64_t k, const Cutoff& cutoff) {
    std::nth_element(slots, slots + k - 1, slots + count, Better{});
    const float lowest = cutoff(score_of(slots[k - 1]));
    if (!std::isnan(lowest)) {
      Ranked* end = slots + k;
      for (const Ranked* one = end; one < slots + count; ++one)
        if (score_of(*one) >= lowest) *end++ = *one;
      count = end - slots;
    }
    if (count < most) return below(lowest);
    keep_best();
    return score_of(slots[most - 1]);
  }
  static float below(float score) {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    return score == kLowest ? std::numeric_limits<float>::quiet_NaN() : std::nextafter(score, kLowest);
  }
};

// One bit per lane, set where !(a <= b).
inline uint32_t lanes_not_at_most(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) bits |= static_cast<uint32_t>(!(a[lane] <= b[lane])) << lane;
  return bits;
#endif
}

constexpr int kSeeded = 16;  // largest K whose K-th best is found in registers

// kth[query] = k-th best of scores[key][query]. NaN is ignored.
inline void kth_best(const float* scores, int64_t keys, int64_t queries, int64_t k, float* kth) {
  for (int64_t column = 0; column < queries; column += kLanes<float>) {
    Vec<float> top[kSeeded];
    std::fill_n(top, k, broadcast(-std::numeric_limits<float>::infinity()));
    for (int64_t key = 0; key < keys; ++key) {
      Vec<float> score = load<float>(scores + key * queries + column);
      for (int64_t i = 0; i < k; ++i) {
        const Vec<float> larger = score > top[i] ? score : top[i];
        score = score > top[i] ? top[i] : score;
        top[i] = larger;
      }
    }
    store(kth + column, top[k - 1]);
  }
}

}  // namespace slm_fast::SLM_ISA

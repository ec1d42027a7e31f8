// The search's arguments; lengths, rounded rows and scores of the fast pass; float64 scores for the ranking.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "tile.h"

namespace slm_fast::SLM_ISA {

constexpr double kEpsilon = 1e-12;  // vectors of at most this length have cosine 0 with everything

// A search. If slots have several keys, `slots` counts keys, and any of a slot's keys identifies it.
struct Search {
  int64_t queries, slots, width, groups, k;
  const void *query, *keys;
  const void* prepared;  // from prepare_keys, or null
  const float* bias;
  bool cosine, by_group;  // by_group: each group ranks slots separately, else by the mean over groups
  const int64_t* key_slot = nullptr;  // [slots] slot of each key, ascending; null if each slot has one key
  int64_t lists() const { return by_group ? groups : 1; }
  bool same_slot(int64_t key, int64_t other) const { return key_slot && key_slot[key] == key_slot[other]; }
};

constexpr double kSmallest = 0x1p-126;  // smallest normal float32

// By how much group_lengths may underestimate the length of d numbers, because small squares underflow in float32.
inline float underflow(int64_t d) { return 0x1p-74f * std::sqrt(static_cast<float>(d)); }

// The length of each group of a row, in float32.
template <class T>
inline void group_lengths(const T* row, int64_t groups, int64_t d, float* lengths) {
  constexpr int L = kLanes<float>;
  for (int64_t g = 0; g < groups; ++g, row += d) {
    Vec<float> sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * L <= d; i += 4 * L)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<float> value = load<float>(row + i + j * L);
        sums[j] = value * value + sums[j];
      }
    for (; i < d; i += L) {
      const Vec<float> value = load_first<float>(row + i, d - i);
      sums[0] = value * value + sums[0];
    }
    float parts[4];
    sum_each_of_4<float>(sums, parts);
    lengths[g] = std::sqrt((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
}

// 1 / length; 0 for a zero vector; NaN where float32 cannot decide, which defers to float64.
inline float inverse_length(float length) {
  if (length > 2 * kEpsilon && length < 1e18f) return 1 / length;
  return length < kEpsilon / 2 ? 0 : std::numeric_limits<float>::quiet_NaN();
}

// Norm of the bfloat16 rounding error of a unit row's groups: of the worst group, or the mean, if the mean over groups
// is ranked. NaN is ignored: the scores are NaN too.
struct Lost {
  float worst, mean;
  float of(bool by_group) const { return by_group ? worst : mean; }
  void keep_larger(Lost other) { worst = std::max(worst, other.worst), mean = std::max(mean, other.mean); }
};

// Normalises each group of a row in bfloat16, zero-padded to `padded` numbers per group.
template <class T>
inline Lost round_row(const T* from, int64_t groups, int64_t d, int64_t padded, BFloat16* to, float* lengths) {
  constexpr int L = kLanes<float>;
  group_lengths(from, groups, d, lengths);
  Lost all{0, 0};
  for (int64_t g = 0; g < groups; ++g, from += d, to += padded) {
    const Vec<float> factor = broadcast(inverse_length(lengths[g]));
    Vec<float> lost[4] = {};
    auto round = [&](int64_t i, int64_t count, int64_t wide, Vec<float>& sum) {
      const Vec<float> value = load_first<float>(from + i, count) * factor;
      store_first(to + i, value, wide);  // lanes beyond count are zero
      const Vec<float> rest = value - load_first<float>(to + i, wide);
      sum = rest * rest + sum;
    };
    int64_t i = 0;
    for (; i + 2 * L <= d; i += 2 * L) round(i, L, L, lost[0]), round(i + L, L, L, lost[1]);
    for (; i < d; i += L) round(i, d - i, padded - i, lost[2]);
    float parts[4];
    sum_each_of_4<float>(lost, parts);
    const float here = std::sqrt(parts[0] + parts[1] + parts[2]);
    all.worst = std::max(all.worst, here);
    all.mean += here / static_cast<float>(groups);
  }
  return all;
}

// combine's output: scores[key][query], kQueries queries. Not part of Searcher, so that all storage types share it, and
// combine with it.
template <int64_t kQueries>
struct Scored {
  float* scores;
  const float* factor;  // scale of a key in this group, or null
  int64_t stride;
  bool more;
  const char* next;
  int64_t offset, next_step;
  void ahead(int64_t n) const {
    if (!next) return;
    ask_for(next, offset + n * next_step);
    if (next_step > 64) ask_for(next, offset + n * next_step + 64);
  }
  void add(int64_t key, int64_t column, Vec<float> sum) const {
    float* to = scores + key * kQueries + column;
    if (factor) sum = sum * broadcast(factor[key * stride]);
    store(to, more ? load<float>(to) + sum : sum);
  }
  void add_first(int64_t key, int64_t column, Vec<float> sum, int64_t) const { add(key, column, sum); }
};

// a . b and, if kSquare, b . b, in float64.
struct ExactProducts {
  double product, square;
};

template <bool kSquare, class Q, class T>
inline ExactProducts exact_products(const Q* a, const T* b, int64_t d) {
  constexpr int L = kLanes<double>;
  Vec<double> products[2] = {}, squares[2] = {};
  int64_t i = 0;
  auto step = [&](int j, Vec<double> a_i, Vec<double> b_i) {
    products[j] = a_i * b_i + products[j];
    if (kSquare) squares[j] = b_i * b_i + squares[j];
  };
  for (; i + 2 * L <= d; i += 2 * L) {
    step(0, load<double>(a + i), load<double>(b + i));
    step(1, load<double>(a + i + L), load<double>(b + i + L));
  }
  for (; i < d; i += L) step(0, load_first<double>(a + i, d - i), load_first<double>(b + i, d - i));
  return {sum_lanes(products[0] + products[1]), kSquare ? sum_lanes(squares[0] + squares[1]) : 0};
}

template <class T>
inline double exact_length(const T* row, int64_t d) {
  return std::sqrt(exact_products<false>(row, row, d).product);
}

inline double exact_cosine(double product, double length, double other) {
  return length > kEpsilon && other > kEpsilon ? product / length / other : 0;  // false for NaN lengths
}

template <class Q, class T>
inline double exact_cosine(const Q* query, double query_length, const T* key, int64_t d) {
  const ExactProducts of = exact_products<true>(query, key, d);
  return exact_cosine(of.product, query_length, std::sqrt(of.square));
}

// The reference's score: float64 rounded to float32, group by group.
template <class T>
struct ExactScore {
  const Search& s;
  const double *query, *lengths;  // [D], [G]
  const double* key_lengths;      // [P][G] or null
  float operator()(int64_t list, int64_t slot) const {
    if (!s.cosine) {
      const double product = exact_products<false>(query, static_cast<const T*>(s.keys) + slot * s.width, s.width).product;
      return static_cast<float>(product + (s.bias ? static_cast<double>(s.bias[slot]) : 0));
    }
    if (s.by_group) return cosine(list, slot);
    float sum = 0;
    for (int64_t g = 0; g < s.groups; ++g) sum += cosine(g, slot);
    return sum / static_cast<float>(s.groups);
  }

 private:
  float cosine(int64_t g, int64_t slot) const {
    const int64_t d = s.width / s.groups;
    const T* key = static_cast<const T*>(s.keys) + slot * s.width + g * d;
    if (!key_lengths) return static_cast<float>(exact_cosine(query + g * d, lengths[g], key, d));
    const double product = exact_products<false>(query + g * d, key, d).product;
    return static_cast<float>(exact_cosine(product, lengths[g], key_lengths[slot * s.groups + g]));
  }
};

}  // namespace slm_fast::SLM_ISA

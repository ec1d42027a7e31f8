// What retrieve and key_loss share: the K best slots of each query, ranked as the reference ranks them.
//
// A fast pass scores all slots in float32 and keeps a few more than K. Queries are turned into panels [D][queries], so
// that keys are used where they lie: a key's numbers are broadcast, lanes are queries, nothing is summed across lanes.
// Then what could be among the K best, given the rounding of float32, is scored again in float64 and ranked by that,
// rounded to float32. So a route depends on its query and the keys alone: not on the batch, a tile, the processor or a
// thread. Where more slots than were kept are too close to call, that query is scored against all slots in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "kernels.h"
#include "tile.h"

namespace slm_fast::SLM_ISA {

constexpr double kEpsilon = 1e-12;  // a vector no longer than this has cosine 0 with everything
constexpr int64_t kSpare = 8;       // slots kept beyond K

struct Candidate {
  double score;
  int64_t id;
};

// Ranked in float32; a NaN stands first, of equal scores the lower id.
inline bool better(const Candidate& one, const Candidate& other) {
  const auto a = static_cast<float>(one.score), b = static_cast<float>(other.score);
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) != std::isnan(b) ? std::isnan(a) : one.id < other.id;
  return a != b ? a > b : one.id < other.id;
}

// The k best so far, as a heap with the worst on top.
struct Best {
  Candidate* kept;
  int64_t count, k;

  void offer(Candidate candidate) {
    if (count == k) {
      if (!better(candidate, kept[0])) return;
      std::pop_heap(kept, kept + count, better);
      kept[count - 1] = candidate;
    } else {
      kept[count++] = candidate;
    }
    std::push_heap(kept, kept + count, better);
  }
  // No score that is at most this can enter. NaN while there is room: nothing is at most NaN.
  float threshold() const {
    return count < k ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(kept[0].score);
  }
};

// A bit for each lane where !(a <= b).
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

constexpr int64_t kQueries = kCombineV * kLanes<float>;  // of a panel
constexpr int64_t kKeys = 64;                            // of a chunk: it stays in L2 while all panels pass over it

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

// 1 / length; 0 for a zero vector; NaN where float32 cannot tell, which leaves the case to float64.
inline float inverse_length(float length) {
  if (length > 2 * kEpsilon && length < 1e18f) return 1 / length;
  return length < kEpsilon / 2 ? 0 : std::numeric_limits<float>::quiet_NaN();
}

template <class T>
inline double exact_dot(const T* a, const T* b, int64_t d) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16)
    for (int j = 0; j < 16; ++j) sums[j] += widen<double>(a[i + j]) * widen<double>(b[i + j]);
  for (; i < d; ++i) sums[0] += widen<double>(a[i]) * widen<double>(b[i]);
  double sum = 0;
  for (int j = 0; j < 16; ++j) sum += sums[j];
  return sum;
}

template <class T>
inline double exact_cosine(const T* a, const T* b, int64_t d) {
  const double length_a = std::sqrt(exact_dot(a, a, d)), length_b = std::sqrt(exact_dot(b, b, d));
  return length_a <= kEpsilon || length_b <= kEpsilon ? 0 : exact_dot(a, b, d) / length_a / length_b;
}

// What is asked of every slot.
struct Search {
  int64_t queries, slots, width, groups, k;
  const void *query, *keys;
  const float* bias;
  bool cosine, by_group;  // by_group: each group ranks its own slots, else the mean over groups is ranked
  int64_t lists() const { return by_group ? groups : 1; }
};

template <class T>
class Searcher {
 public:
  Searcher(const Search& search, const Pool& pool)
      : s(search), pool(pool), d(s.width / s.groups), most(std::min(s.k + kSpare, s.slots)) {
    blocks = (s.queries + kQueries - 1) / kQueries;
    // A thread takes some panels and a range of slots; ranges are long enough to be worth lists of their own.
    panels_at_once = std::clamp<int64_t>((384 << 10) / (s.width * kQueries * 4 + 1), 1, std::max<int64_t>(1, blocks));
    parts = (blocks + panels_at_once - 1) / panels_at_once;
    const int64_t wanted = (4 * pool.workers + parts) / std::max<int64_t>(1, parts);
    range = s.slots / std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, s.slots / 256));
    range = std::max<int64_t>(kKeys, (range + kKeys - 1) / kKeys * kKeys);
    ranges = (s.slots + range - 1) / range;
    panels.at_least(blocks * s.width * kQueries);
    longest_query.at_least(blocks);
    longest_key.at_least(parts * ranges);
    kept.at_least(ranges * s.lists() * s.queries * most);
    counts.at_least(ranges * s.lists() * s.queries);
    threads = 2.0 * static_cast<double>(s.queries) * s.slots * s.width > 3e5;
  }

  // use(query, list, best) for each query, in no order, with the K best of each of its lists, the best first.
  // allowed(query, list, slot) says whether a slot may be returned; it is asked only for slots that would be.
  template <class Allowed, class Use>
  void run(const Allowed& allowed, const Use& use) {
    pool.for_each(blocks, threads, [&] {
      return [&, rows = Buffer<float>(kQueries * s.width), lengths = Buffer<float>(s.groups)](int64_t block) mutable {
        make_panel(block, rows.data(), lengths.data());
      };
    });
    pool.for_each(parts * ranges, threads, [&] {
      return [&, scratch = Scratch(*this)](int64_t item) mutable {
        longest_key[item] = search_range(item / ranges * panels_at_once, item % ranges, allowed, scratch);
      };
    });
    pool.for_each(s.queries, threads, [&] {
      return [&, found = Buffer<Candidate>(most)](int64_t query) mutable {
        for (int64_t list = 0; list < s.lists(); ++list) use(query, list, ranked(query, list, allowed, found.data()));
      };
    });
  }

 private:
  struct Scratch {
    Buffer<float> keys, lengths, scores, thresholds;
    explicit Scratch(const Searcher& of)
        : lengths(kKeys * of.s.groups), scores(kCombineM * kQueries),
          thresholds(of.s.lists() * of.panels_at_once * kQueries) {
      if constexpr (!std::is_same_v<T, float>) keys.at_least(kKeys * of.s.width);
    }
  };

  const T* query_row(int64_t q) const { return static_cast<const T*>(s.query) + q * s.width; }
  const T* key_row(int64_t p) const { return static_cast<const T*>(s.keys) + p * s.width; }
  int64_t list_at(int64_t r, int64_t list, int64_t query) const { return (r * s.lists() + list) * s.queries + query; }

  // Queries, of unit length in each group when cosine, transposed; zeros beyond the last query.
  void make_panel(int64_t block, float* rows, float* lengths) {
    const int64_t first = block * kQueries, count = std::min(kQueries, s.queries - first);
    float longest = 0;
    for (int64_t q = 0; q < count; ++q) {
      const T* from = query_row(first + q);
      float* to = rows + q * s.width;
      group_lengths(from, s.groups, d, lengths);
      for (int64_t g = 0; g < s.groups; ++g) {
        const float factor = s.cosine ? inverse_length(lengths[g]) : 1;
        for (int64_t i = g * d; i < (g + 1) * d; ++i) to[i] = widen<float>(from[i]) * factor;
        longest = lengths[g] <= longest ? longest : lengths[g];
      }
    }
    longest_query[block] = longest;
    float* panel = panels.data() + block * s.width * kQueries;
    for (int64_t i = 0; i < s.width; ++i, panel += kQueries)
      for (int64_t q = 0; q < kQueries; ++q) panel[q] = q < count ? rows[q * s.width + i] : 0;
  }

  struct Scored {  // combine's output: scores[key][query]
    float* scores;
    const float* factor;  // of a key in this group, or null
    int64_t stride;
    bool more;
    void add(int64_t key, int64_t column, Vec<float> sum) const {
      float* to = scores + key * kQueries + column;
      if (factor) sum = sum * broadcast(factor[key * stride]);
      store(to, more ? load<float>(to) + sum : sum);
    }
    void add_first(int64_t key, int64_t column, Vec<float> sum, int64_t) const { add(key, column, sum); }
  };

  // Returns the length of the longest key when it matters.
  template <class Allowed>
  float search_range(int64_t first_block, int64_t r, const Allowed& allowed, Scratch& scratch) {
    const int64_t last_block = std::min(first_block + panels_at_once, blocks);
    const int64_t begin = r * range, end = std::min(begin + range, s.slots);
    std::fill_n(
        scratch.thresholds.data(), s.lists() * panels_at_once * kQueries, std::numeric_limits<float>::quiet_NaN());
    for (int64_t list = 0; list < s.lists(); ++list)
      for (int64_t q = first_block * kQueries; q < std::min(last_block * kQueries, s.queries); ++q)
        counts[list_at(r, list, q)] = 0;

    float longest = 0;
    for (int64_t chunk = begin; chunk < end; chunk += kKeys) {
      const int64_t keys = std::min(kKeys, end - chunk);
      const T* source = key_row(chunk);
      for (int64_t i = 0; i < keys; ++i) {
        float* lengths = scratch.lengths.data() + i * s.groups;
        group_lengths(source + i * s.width, s.groups, d, lengths);
        longest = lengths[0] <= longest ? longest : lengths[0];
        for (int64_t g = 0; g < s.groups; ++g) lengths[g] = inverse_length(lengths[g]);
      }
      const float* rows;
      if constexpr (std::is_same_v<T, float>) {
        rows = source;
      } else {
        for (int64_t i = 0; i < keys * s.width; ++i) scratch.keys[i] = widen<float>(source[i]);
        rows = scratch.keys.data();
      }
      const int64_t next = std::clamp<int64_t>(end - chunk - kKeys, 0, kKeys);
      Ahead ahead = Ahead::of(source + kKeys * s.width, s.width, s.width, next);
      const int64_t lines = ahead.lines() / ((last_block - first_block) * ((keys + kCombineM - 1) / kCombineM)) + 1;
      for (int64_t block = first_block; block < last_block; ++block) {
        float* thresholds = scratch.thresholds.data() + (block - first_block) * s.lists() * kQueries;
        for (int64_t key = 0; key < keys; key += kCombineM) {
          ahead.ask(lines);
          score(rows, scratch, block, key, std::min<int64_t>(key + kCombineM, keys), chunk, r, thresholds, allowed);
        }
      }
    }
    return longest;
  }

  // Scores keys first..last-1 of a chunk against one panel and offers what may be among the best.
  template <class Allowed>
  void score(
      const float* rows, Scratch& scratch, int64_t block, int64_t first, int64_t last, int64_t chunk, int64_t r,
      float* thresholds, const Allowed& allowed) {
    const float* panel = panels.data() + block * s.width * kQueries;
    const int64_t count = std::min(kQueries, s.queries - block * kQueries);
    float* scores = scratch.scores.data();
    for (int64_t g = 0; g < s.groups; ++g) {
      const float* factor = s.cosine ? scratch.lengths.data() + first * s.groups + g : nullptr;
      combine<Plain<float>>(
          rows + first * s.width + g * d, 1, s.width, panel + g * d * kQueries, d, 0, last - first, count,
          Scored{scores, factor, s.groups, g > 0 && !s.by_group});
      if (s.by_group) offer(scores, first, last, block, count, chunk, r, g, thresholds + g * kQueries, allowed);
    }
    if (!s.by_group) offer(scores, first, last, block, count, chunk, r, 0, thresholds, allowed);
  }

  template <class Allowed>
  void offer(
      const float* scores, int64_t first, int64_t last, int64_t block, int64_t count, int64_t chunk, int64_t r,
      int64_t list, float* thresholds, const Allowed& allowed) {
    constexpr int L = kLanes<float>;
    const float share = s.by_group ? 1 : 1 / static_cast<float>(s.groups);
    for (int64_t key = first; key < last; ++key) {
      const int64_t id = chunk + key;
      const Vec<float> bias = broadcast(s.bias ? s.bias[id] : 0.0f);
      for (int64_t column = 0; column < count; column += L) {
        const Vec<float> score = load<float>(scores + (key - first) * kQueries + column) * broadcast(share) + bias;
        uint32_t bits = lanes_not_at_most(score, load<float>(thresholds + column));
        if (count - column < L) bits &= (1u << (count - column)) - 1;
        for (; bits; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          const int64_t q = block * kQueries + column + lane;
          if (!allowed(q, list, id)) continue;
          const int64_t at = list_at(r, list, q);
          Best best{kept.data() + at * most, counts[at], most};
          best.offer({score[lane], id});
          counts[at] = best.count;
          thresholds[column + lane] = best.threshold();
        }
      }
    }
  }

  // The score that the reference gives: float64, each group rounded to float32.
  double exact_score(int64_t query, int64_t list, int64_t slot) const {
    const T *q = query_row(query), *key = key_row(slot);
    if (!s.cosine) return exact_dot(q, key, d) + (s.bias ? static_cast<double>(s.bias[slot]) : 0);
    if (s.by_group) return exact_cosine(q + list * d, key + list * d, d);
    float sum = 0;
    for (int64_t g = 0; g < s.groups; ++g) sum += static_cast<float>(exact_cosine(q + g * d, key + g * d, d));
    return sum / static_cast<float>(s.groups);
  }

  // What float32 may be wrong by: d + 4 roundings of products whose magnitudes sum to at most |query| |key|.
  float margin(int64_t query) const {
    const float unit = static_cast<float>(d + s.groups + 4) * 0x1p-23f;
    if (s.cosine) return unit;
    const int64_t block = query / kQueries;
    float longest = 0;
    for (int64_t r = 0; r < ranges; ++r) {
      const float length = longest_key[block / panels_at_once * ranges + r];
      longest = length <= longest ? longest : length;
    }
    return unit * longest_query[block] * longest;
  }

  template <class Allowed>
  Best ranked(int64_t query, int64_t list, const Allowed& allowed, Candidate* found) const {
    Best all{found, 0, most};
    for (int64_t r = 0; r < ranges; ++r) {
      const int64_t at = list_at(r, list, query);
      for (int64_t i = 0; i < counts[at]; ++i) all.offer(kept[at * most + i]);
    }
    std::sort(found, found + all.count, better);
    const int64_t k = std::min(s.k, all.count);
    const double bias = s.bias && k > 0 ? std::abs(found[k - 1].score) * 0x1p-22 : 0;
    const double cutoff = k > 0 ? found[k - 1].score - 2 * margin(query) - bias : 0;
    const bool all_kept = all.count < most || most == s.slots;
    Best best{found, 0, s.k};
    if (all_kept || (found[all.count - 1].score < cutoff && !std::isnan(found[0].score))) {
      for (int64_t i = 0; i < all.count; ++i)
        if (all_kept || found[i].score >= cutoff)
          found[best.count++] = {exact_score(query, list, found[i].id), found[i].id};
      std::sort(found, found + best.count, better);
      best.count = std::min(best.count, s.k);
    } else {
      for (int64_t slot = 0; slot < s.slots; ++slot)
        if (allowed(query, list, slot)) best.offer({exact_score(query, list, slot), slot});
      std::sort(found, found + best.count, better);
    }
    return best;
  }

  const Search s;
  const Pool& pool;
  const int64_t d, most;  // most: slots kept a list
  int64_t blocks, panels_at_once, parts, range, ranges;
  bool threads;
  Buffer<float> panels;         // [block][D][kQueries]
  Buffer<float> longest_query;  // [block]
  Buffer<float> longest_key;    // [part][range]
  Buffer<Candidate> kept;       // [range][list][B][most]
  Buffer<int64_t> counts;       // [range][list][B]
};

}  // namespace slm_fast::SLM_ISA

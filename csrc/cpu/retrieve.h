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
constexpr int64_t kSpare = 4;       // slots kept beyond K
constexpr int64_t kFew = 8;         // queries too few for lanes
constexpr int kSeeded = 16;         // the longest list whose threshold is found in registers

// A slot and its score as one number that ranks as they do: by score in float32, a NaN first, then the lower id.
using Ranked = uint64_t;

inline Ranked ranked(float score, int64_t slot) {
  const uint32_t bits = float_to_bits(score + 0.0f);  // -0 becomes 0
  const uint32_t rising = std::isnan(score) ? ~uint32_t{0} : bits ^ (bits >> 31 ? ~uint32_t{0} : uint32_t{1} << 31);
  return uint64_t{rising} << 32 | static_cast<uint32_t>(~slot);
}
inline int64_t slot_of(Ranked one) { return static_cast<uint32_t>(~one); }
inline float score_of(Ranked one) {
  const auto rising = static_cast<uint32_t>(one >> 32);
  return bits_to_float(rising ^ (rising >> 31 ? uint32_t{1} << 31 : ~uint32_t{0}));  // all ones is a NaN again
}
struct Better {
  bool operator()(Ranked one, Ranked other) const { return one > other; }
};

// The `most` best so far, among the first `count` of `slots`; pruned when full, so that adding is cheap.
struct Shortlist {
  Ranked* slots;
  int64_t count, most;

  static int64_t capacity(int64_t most) { return most + std::max<int64_t>(16, most); }
  // Returns true when pruned: from then on no score that is at most slots[most - 1]'s can enter.
  bool add(Ranked one) {
    slots[count++] = one;
    if (count < capacity(most)) return false;
    prune();
    return true;
  }
  void prune() {
    if (count <= most) return;
    std::nth_element(slots, slots + most - 1, slots + count, Better{});
    count = most;
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

constexpr int kCombineKeys = kCombineM<Plain<float>>;
constexpr int64_t kQueries = kPanelColumns<Plain<float>>;  // of a panel
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

// a . b and b . b in float64.
struct ExactProducts {
  double product, square;
};

template <class T>
inline ExactProducts exact_products(const T* a, const T* b, int64_t d) {
  constexpr int L = kLanes<double>;
  Vec<double> products[2] = {}, squares[2] = {};
  int64_t i = 0;
  auto step = [&](int j, Vec<double> a_i, Vec<double> b_i) {
    products[j] = a_i * b_i + products[j];
    squares[j] = b_i * b_i + squares[j];
  };
  for (; i + 2 * L <= d; i += 2 * L) {
    step(0, load<double>(a + i), load<double>(b + i));
    step(1, load<double>(a + i + L), load<double>(b + i + L));
  }
  for (; i < d; i += L) step(0, load_first<double>(a + i, d - i), load_first<double>(b + i, d - i));
  double lanes[2][L];
  store(lanes[0], products[0] + products[1]);
  store(lanes[1], squares[0] + squares[1]);
  for (int half = L / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) {
      lanes[0][lane] += lanes[0][lane + half];
      lanes[1][lane] += lanes[1][lane + half];
    }
  return {lanes[0][0], lanes[1][0]};
}

template <class T>
inline double exact_length(const T* row, int64_t d) {
  return std::sqrt(exact_products(row, row, d).square);
}

template <class T>
inline double exact_cosine(const T* query, double query_length, const T* key, int64_t d) {
  const ExactProducts of = exact_products(query, key, d);
  const double length = std::sqrt(of.square);
  return query_length <= kEpsilon || length <= kEpsilon ? 0 : of.product / query_length / length;
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
    // A thread takes some panels, and a range of slots when panels are few: each range has lists of its own.
    const int64_t turns = 2 * pool.workers, fits = (384 << 10) / (s.width * kQueries * 4 + 1);
    panels_at_once = std::max<int64_t>(1, std::min(fits, blocks / turns));
    parts = (blocks + panels_at_once - 1) / panels_at_once;
    const int64_t wanted = parts >= turns ? 1 : (2 * turns + parts - 1) / std::max<int64_t>(1, parts);
    range = s.slots / std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, s.slots / 256));
    range = std::max<int64_t>(kKeys, (range + kKeys - 1) / kKeys * kKeys);
    ranges = (s.slots + range - 1) / range;
    few = s.queries <= kFew;
    most_listed = Shortlist::capacity(most);
    panels.at_least(blocks * s.width * (few ? kFew : kQueries));
    longest_query.at_least(blocks);
    longest_key.at_least(parts * ranges);
    kept.at_least(ranges * s.lists() * s.queries * most_listed);
    counts.at_least(ranges * s.lists() * s.queries);
    threads = 2.0 * static_cast<double>(s.queries) * s.slots * s.width > 3e5;
  }

  // use(query, list, best, count) for each query, in no order, with the K best of each of its lists, the best first.
  // allowed(query, list, slot) says whether a slot may be returned; it is asked only for slots that would be, and it
  // says no to some only if Allowed::kAsks.
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
      return [&, found = Buffer<Ranked>(std::max(ranges, int64_t{1}) * most_listed),
              lengths = Buffer<double>(s.groups)](int64_t query) mutable {
        for (int64_t g = 0; g < s.groups; ++g) lengths[g] = exact_length(query_row(query) + g * d, d);
        for (int64_t list = 0; list < s.lists(); ++list) {
          const int64_t count = rank(query, list, lengths.data(), allowed, found.data());
          use(query, list, static_cast<const Ranked*>(found.data()), count);
        }
      };
    });
  }

 private:
  struct Scratch {
    Buffer<float> keys, lengths, scores, thresholds;
    explicit Scratch(const Searcher& of)
        : lengths(kKeys * of.s.groups), scores(kKeys * kQueries),
          thresholds(of.s.lists() * of.panels_at_once * kQueries) {
      if constexpr (!std::is_same_v<T, float>) keys.at_least(kKeys * of.s.width);
    }
  };

  const T* query_row(int64_t q) const { return static_cast<const T*>(s.query) + q * s.width; }
  const T* key_row(int64_t p) const { return static_cast<const T*>(s.keys) + p * s.width; }
  int64_t list_at(int64_t r, int64_t list, int64_t query) const { return (r * s.lists() + list) * s.queries + query; }

  // Queries, of unit length in each group when cosine; transposed unless they are few, zeros beyond the last query.
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
    if (few) {
      std::copy_n(rows, count * s.width, panels.data());
      return;
    }
    float* panel = panels.data() + block * s.width * kQueries;
    for (int64_t i = 0; i < s.width; ++i, panel += kQueries)
      for (int64_t q = 0; q < kQueries; ++q) panel[q] = q < count ? rows[q * s.width + i] : 0;
  }

  struct Scored {  // combine's output: scores[key][query]
    float* scores;
    const float* factor;  // of a key in this group, or null
    int64_t stride;
    bool more;
    const T* next;  // rows that come later: a step asks for as much of them as it uses of these rows
    int64_t offset;
    void ahead(int64_t n) const { ask_for(next, (offset + n * kCombineKeys) * static_cast<int64_t>(sizeof(T))); }
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
        widen_all(source, scratch.keys.data(), keys * s.width);
        rows = scratch.keys.data();
      }
      for (int64_t block = first_block; block < last_block; ++block)
        for (int64_t list = 0; list < s.lists(); ++list) {
          for (int64_t key = 0; key < keys; key += kCombineKeys) {
            // The first panel's pass fetches the next chunk, the others find it there.
            const bool fetch = block == first_block && chunk + kKeys + key < end;
            score(
                rows, scratch, block, key, std::min<int64_t>(key + kCombineKeys, keys), list,
                source + (fetch ? kKeys + key : key) * s.width);
          }
          finish(scratch.scores.data(), keys, chunk);
          float* thresholds = scratch.thresholds.data() + ((block - first_block) * s.lists() + list) * kQueries;
          if (chunk == begin && !Allowed::kAsks && most <= kSeeded && keys >= most)
            seed(scratch.scores.data(), keys, thresholds);
          offer(scratch.scores.data(), keys, block, chunk, r, list, thresholds, allowed);
        }
    }
    return longest;
  }

  // Scores of keys first..last-1 of a chunk for one panel: of one group, or summed over all.
  void score(
      const float* rows, Scratch& scratch, int64_t block, int64_t first, int64_t last, int64_t list,
      const T* next) const {
    const float* panel = panels.data() + block * s.width * kQueries;
    const int64_t count = std::min(kQueries, s.queries - block * kQueries);
    const int64_t first_group = s.by_group ? list : 0, last_group = s.by_group ? list + 1 : s.groups;
    for (int64_t g = first_group; g < last_group; ++g) {
      const float* key_rows = rows + first * s.width + g * d;
      const float* factor = s.cosine ? scratch.lengths.data() + first * s.groups + g : nullptr;
      const Scored out{scratch.scores.data() + first * kQueries, factor, s.groups, g > first_group,
                       next, g * d * kCombineKeys};
      if (few) {
        score_few(key_rows, last - first, g, out);
      } else {
        combine<Plain<float>>(key_rows, 1, s.width, panel + g * d * kQueries, d, 0, last - first, count, out);
      }
    }
  }

  // The mean over groups, and the bias.
  void finish(float* scores, int64_t keys, int64_t chunk) const {
    const float share = s.by_group ? 1 : 1 / static_cast<float>(s.groups);
    if (share == 1 && !s.bias) return;
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t q = 0; q < kQueries; ++q)
        scores[key * kQueries + q] = scores[key * kQueries + q] * share + (s.bias ? s.bias[chunk + key] : 0.0f);
  }

  // Thresholds that leave the `most` best of the first chunk: so few are offered from the start.
  void seed(const float* scores, int64_t keys, float* thresholds) const {
    for (int64_t column = 0; column < kQueries; column += kLanes<float>) {
      Vec<float> top[kSeeded];
      std::fill_n(top, most, broadcast(-std::numeric_limits<float>::infinity()));
      for (int64_t key = 0; key < keys; ++key) {
        Vec<float> score = load<float>(scores + key * kQueries + column);
        for (int64_t i = 0; i < most; ++i) {
          const Vec<float> larger = score > top[i] ? score : top[i];
          score = score > top[i] ? top[i] : score;
          top[i] = larger;
        }
      }
      for (int lane = 0; lane < kLanes<float>; ++lane)  // the largest number below: what equals the last is offered too
        thresholds[column + lane] = std::nextafter(top[most - 1][lane], -std::numeric_limits<float>::infinity());
    }
  }

  // Sums along the rows; its bits differ from combine's, which the float64 ranking makes good.
  void score_few(const float* key_rows, int64_t keys, int64_t g, const Scored& out) const {
    const float *queries[kFew], *rows[kCombineKeys];
    float sums[kCombineKeys * kFew];
    for (int64_t q = 0; q < s.queries; ++q) queries[q] = panels.data() + q * s.width + g * d;
    for (int64_t key = 0; key < keys; ++key) rows[key] = key_rows + key * s.width;
    dot<Plain<float>>(queries, s.queries, rows, keys, d, sums, kFew);
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t q = 0; q < s.queries; ++q) {
        float* to = out.scores + key * kQueries + q;
        *to = (out.more ? *to : 0) + sums[key * kFew + q] * (out.factor ? out.factor[key * out.stride] : 1);
      }
  }

  template <class Allowed>
  void offer(
      const float* scores, int64_t keys, int64_t block, int64_t chunk, int64_t r, int64_t list, float* thresholds,
      const Allowed& allowed) {
    constexpr int L = kLanes<float>;
    const int64_t count = std::min(kQueries, s.queries - block * kQueries);
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t id = chunk + key;
      for (int64_t column = 0; column < count; column += L) {
        const Vec<float> score = load<float>(scores + key * kQueries + column);
        uint32_t bits = lanes_not_at_most(score, load<float>(thresholds + column));
        if (count - column < L) bits &= (1u << (count - column)) - 1;
        for (; bits; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          const int64_t q = block * kQueries + column + lane;
          if (!allowed(q, list, id)) continue;
          const int64_t at = list_at(r, list, q);
          Shortlist shortlist{kept.data() + at * most_listed, counts[at], most};
          if (shortlist.add(ranked(score[lane], id)))
            thresholds[column + lane] = score_of(shortlist.slots[most - 1]);
          counts[at] = shortlist.count;
        }
      }
    }
  }

  // The score that the reference gives: float64 rounded to float32, each group by itself.
  float exact_score(int64_t query, int64_t list, int64_t slot, const double* lengths) const {
    const T *q = query_row(query), *key = key_row(slot);
    if (!s.cosine) return static_cast<float>(
        exact_products(q, key, d).product + (s.bias ? static_cast<double>(s.bias[slot]) : 0));
    if (s.by_group) return static_cast<float>(exact_cosine(q + list * d, lengths[list], key + list * d, d));
    float sum = 0;
    for (int64_t g = 0; g < s.groups; ++g)
      sum += static_cast<float>(exact_cosine(q + g * d, lengths[g], key + g * d, d));
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

  // The K best into `found`, the best first; how many there are.
  template <class Allowed>
  int64_t rank(int64_t query, int64_t list, const double* lengths, const Allowed& allowed, Ranked* found) const {
    Shortlist all{found, 0, most};
    for (int64_t r = 0; r < ranges; ++r) {
      const int64_t at = list_at(r, list, query);
      std::copy_n(kept.data() + at * most_listed, counts[at], found + all.count);
      all.count += counts[at];
    }
    all.prune();
    std::sort(found, found + all.count, Better{});
    const int64_t k = std::min(s.k, all.count);
    if (k == 0) return 0;
    const double bias = s.bias ? std::abs(score_of(found[k - 1])) * 0x1p-22 : 0;
    const double cutoff = score_of(found[k - 1]) - 2 * margin(query) - bias;
    const bool complete = all.count < most || most == s.slots;
    const bool clear = complete || score_of(found[all.count - 1]) < cutoff;
    if (clear && !std::isnan(score_of(found[0])) && !std::isnan(cutoff)) {
      int64_t count = 0;
      for (; count < all.count && score_of(found[count]) >= cutoff; ++count)
        found[count] = ranked(exact_score(query, list, slot_of(found[count]), lengths), slot_of(found[count]));
      std::sort(found, found + count, Better{});
      return k;
    }
    all.count = 0;
    for (int64_t slot = 0; slot < s.slots; ++slot)
      if (allowed(query, list, slot)) all.add(ranked(exact_score(query, list, slot, lengths), slot));
    all.prune();
    std::sort(found, found + all.count, Better{});
    return k;
  }

  const Search s;
  const Pool& pool;
  const int64_t d, most;  // most: slots kept a list
  int64_t most_listed, blocks, panels_at_once, parts, range, ranges;
  bool threads, few;
  Buffer<float> panels;         // [block][D][kQueries], or [B][D] where queries are few
  Buffer<float> longest_query;  // [block]
  Buffer<float> longest_key;    // [part][range]
  Buffer<Ranked> kept;       // [range][list][B][most_listed]
  Buffer<int64_t> counts;       // [range][list][B]
};

}  // namespace slm_fast::SLM_ISA

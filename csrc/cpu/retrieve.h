// What retrieve and key_loss share: scores of all slots for a block of queries, and the K best of them.
//
// Queries are turned into panels [D][queries], so that the keys can be used where they lie: a key's numbers are
// broadcast, lanes are queries, and nothing is summed across lanes. A score's bits therefore depend on its query and key
// alone: not on the batch, the other slots, a tile or a thread. Equal keys score equally, wherever they stand.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "kernels.h"
#include "tile.h"

namespace slm_fast::SLM_ISA {

constexpr double kEpsilon = 1e-12;  // a vector shorter than this has cosine 0 with everything

template <class A>
struct Candidate {
  A score;
  int64_t id;
};

// Ranked in float32; a NaN stands first, of equal scores the lower id.
template <class A>
inline bool better(const Candidate<A>& one, const Candidate<A>& other) {
  const auto a = static_cast<float>(one.score), b = static_cast<float>(other.score);
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) != std::isnan(b) ? std::isnan(a) : one.id < other.id;
  return a != b ? a > b : one.id < other.id;
}

// The k best so far, as a heap with the worst on top.
template <class A>
struct Best {
  Candidate<A>* kept;
  int64_t count, k;

  void offer(Candidate<A> candidate) {
    if (count == k) {
      if (!better(candidate, kept[0])) return;
      std::pop_heap(kept, kept + count, better<A>);
      kept[count - 1] = candidate;
    } else {
      kept[count++] = candidate;
    }
    std::push_heap(kept, kept + count, better<A>);
  }
  // No score that is at most this can enter. NaN while there is room: nothing is at most NaN.
  A threshold() const { return count < k ? std::numeric_limits<A>::quiet_NaN() : kept[0].score; }
};

// A bit for each lane where !(a <= b).
template <class A>
inline uint32_t lanes_not_at_most(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)));
#endif
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) bits |= static_cast<uint32_t>(!(a[lane] <= b[lane])) << lane;
  return bits;
}

template <class A>
constexpr int64_t kQueries = kCombineV * kLanes<A>;  // of a panel
constexpr int64_t kKeys = 64;                        // of a chunk: it stays in L2 while all panels pass over it

// |row[g]| for each group, at least kEpsilon.
template <class A, class T>
inline void group_lengths(const T* row, int64_t groups, int64_t d, A* lengths) {
  for (int64_t g = 0; g < groups; ++g, row += d) {
    Vec<A> sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes<A> <= d; i += 4 * kLanes<A>)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<A> value = load<A>(row + i + j * kLanes<A>);
        sums[j] = value * value + sums[j];
      }
    for (; i < d; i += kLanes<A>) {
      const Vec<A> value = load_first<A>(row + i, d - i);
      sums[0] = value * value + sums[0];
    }
    A parts[4];
    sum_each_of_4<A>(sums, parts);
    const A length = std::sqrt((parts[0] + parts[1]) + (parts[2] + parts[3]));
    lengths[g] = length < A(kEpsilon) ? A(kEpsilon) : length;  // a NaN stays
  }
}

// What is asked of every slot.
struct Search {
  int64_t queries, slots, width, groups, k;
  const void *query, *keys;
  const float* bias;
  bool cosine, by_group;  // by_group: each group keeps its own K best, else the mean over groups is ranked
  int64_t lists() const { return by_group ? groups : 1; }
};

template <class T, class A>
class Searcher {
 public:
  Searcher(const Search& search, const Pool& pool) : s(search), pool(pool), d(s.width / s.groups) {
    blocks = (s.queries + kQueries<A> - 1) / kQueries<A>;
    // A thread takes some panels and a range of slots; ranges are long enough to be worth a K best list each.
    panels_at_once = std::clamp<int64_t>((384 << 10) / (s.width * kQueries<A> * int64_t{sizeof(A)} + 1), 1, std::max<int64_t>(1, blocks));
    const int64_t parts = (blocks + panels_at_once - 1) / panels_at_once;
    const int64_t wanted = (4 * pool.workers + parts - 1) / parts, most = (s.slots + 255) / 256;
    range = (s.slots + std::min(wanted, most) - 1) / std::max<int64_t>(1, std::min(wanted, most));
    range = std::max<int64_t>(kKeys, (range + kKeys - 1) / kKeys * kKeys);
    ranges = (s.slots + range - 1) / range;
    panels.at_least(blocks * s.width * kQueries<A>);
    kept.at_least(ranges * s.lists() * s.queries * s.k);
    counts.at_least(ranges * s.lists() * s.queries);
    found.at_least(std::max<int64_t>(1, ranges) * s.k);
  }

  // allowed(query, group, slot) says whether a slot may be returned; it is asked only for slots that would be.
  template <class Allowed>
  void run(const Allowed& allowed) {
    const bool threads = 2.0 * static_cast<double>(s.queries) * s.slots * s.width > 3e5;
    pool.for_each(blocks, threads, [&] {
      return [&, rows = Buffer<A>(kQueries<A> * s.width), lengths = Buffer<A>(s.groups)](int64_t block) mutable {
        make_panel(block, rows.data(), lengths.data());
      };
    });
    const int64_t parts = (blocks + panels_at_once - 1) / panels_at_once;
    pool.for_each(parts * ranges, threads, [&] {
      return [&, scratch = Scratch(*this)](int64_t item) mutable {
        search_range(item / ranges * panels_at_once, item % ranges, allowed, scratch);
      };
    });
  }

  // The K best of a query (in a group), the best first, over all ranges. Valid until the next call.
  Best<A> best(int64_t query, int64_t list) {
    Best<A> all{found.data(), 0, s.k};
    for (int64_t r = 0; r < ranges; ++r) {
      const int64_t at = (r * s.lists() + list) * s.queries + query;
      for (int64_t i = 0; i < counts[at]; ++i) all.offer(kept[at * s.k + i]);
    }
    std::sort(all.kept, all.kept + all.count, better<A>);
    return all;
  }

 private:
  struct Scratch {
    Buffer<A> keys, inverse, scores, thresholds;
    explicit Scratch(const Searcher& of)
        : inverse(kKeys * of.s.groups), scores(kCombineM * kQueries<A>),
          thresholds(of.s.lists() * of.panels_at_once * kQueries<A>) {
      if constexpr (!std::is_same_v<T, A>) keys.at_least(kKeys * of.s.width);
    }
  };

  // Queries, of unit length in each group when cosine, transposed; zeros beyond the last query.
  void make_panel(int64_t block, A* rows, A* lengths) {
    const int64_t first = block * kQueries<A>, count = std::min(kQueries<A>, s.queries - first);
    for (int64_t q = 0; q < count; ++q) {
      const T* from = static_cast<const T*>(s.query) + (first + q) * s.width;
      A* to = rows + q * s.width;
      if (s.cosine) group_lengths<A>(from, s.groups, d, lengths);
      for (int64_t i = 0; i < s.width; ++i) to[i] = widen<A>(from[i]);
      for (int64_t i = 0; s.cosine && i < s.width; ++i) to[i] /= lengths[i / d];
    }
    A* panel = panels.data() + block * s.width * kQueries<A>;
    for (int64_t i = 0; i < s.width; ++i, panel += kQueries<A>)
      for (int64_t q = 0; q < kQueries<A>; ++q) panel[q] = q < count ? rows[q * s.width + i] : A(0);
  }

  struct Scored {  // combine's output: scores[key][query]
    A* scores;
    const A* inverse;  // of a key's length in this group, or null
    int64_t stride;
    bool more;
    void add(int64_t key, int64_t column, Vec<A> sum) const {
      A* to = scores + key * kQueries<A> + column;
      if (inverse) sum = sum * broadcast(inverse[key * stride]);
      store(to, more ? load<A>(to) + sum : sum);
    }
    void add_first(int64_t key, int64_t column, Vec<A> sum, int64_t) const { add(key, column, sum); }
  };

  template <class Allowed>
  void search_range(int64_t first_block, int64_t r, const Allowed& allowed, Scratch& scratch) {
    const int64_t last_block = std::min(first_block + panels_at_once, blocks);
    const int64_t begin = r * range, end = std::min(begin + range, s.slots);
    for (int64_t i = 0; i < s.lists() * panels_at_once * kQueries<A>; ++i)
      scratch.thresholds[i] = std::numeric_limits<A>::quiet_NaN();
    for (int64_t list = 0; list < s.lists(); ++list)
      for (int64_t q = first_block * kQueries<A>; q < std::min(last_block * kQueries<A>, s.queries); ++q)
        counts[(r * s.lists() + list) * s.queries + q] = 0;

    for (int64_t chunk = begin; chunk < end; chunk += kKeys) {
      const int64_t keys = std::min(kKeys, end - chunk);
      const T* source = static_cast<const T*>(s.keys) + chunk * s.width;
      if (s.cosine) {
        for (int64_t i = 0; i < keys; ++i)
          group_lengths<A>(source + i * s.width, s.groups, d, scratch.inverse.data() + i * s.groups);
        for (int64_t i = 0; i < keys * s.groups; ++i) scratch.inverse[i] = 1 / scratch.inverse[i];
      }
      const A* rows;
      if constexpr (std::is_same_v<T, A>) {
        rows = source;
      } else {
        for (int64_t i = 0; i < keys * s.width; ++i) scratch.keys[i] = widen<A>(source[i]);
        rows = scratch.keys.data();
      }
      const int64_t turns = (last_block - first_block) * ((keys + kCombineM - 1) / kCombineM);
      Ahead ahead = Ahead::of(source + kKeys * s.width, s.width, s.width, std::clamp<int64_t>(end - chunk - kKeys, 0, kKeys));
      const int64_t lines = ahead.lines() / turns + 1;
      for (int64_t block = first_block; block < last_block; ++block) {
        A* thresholds = scratch.thresholds.data() + (block - first_block) * s.lists() * kQueries<A>;
        for (int64_t key = 0; key < keys; key += kCombineM) {
          ahead.ask(lines);
          score(rows, scratch, block, key, std::min<int64_t>(key + kCombineM, keys), chunk, r, thresholds, allowed);
        }
      }
    }
  }

  // Scores keys first..last-1 of a chunk against one panel and offers what may be among the K best.
  template <class Allowed>
  void score(
      const A* rows, Scratch& scratch, int64_t block, int64_t first, int64_t last, int64_t chunk, int64_t r,
      A* thresholds, const Allowed& allowed) {
    const A* panel = panels.data() + block * s.width * kQueries<A>;
    const int64_t count = std::min(kQueries<A>, s.queries - block * kQueries<A>);
    A* scores = scratch.scores.data();
    for (int64_t g = 0; g < s.groups; ++g) {
      const A* inverse = s.cosine ? scratch.inverse.data() + first * s.groups + g : nullptr;
      const bool more = g > 0 && !s.by_group;
      combine<Plain<A>>(
          rows + first * s.width + g * d, 1, s.width, panel + g * d * kQueries<A>, d, 0, last - first, count,
          Scored{scores, inverse, s.groups, more});
      if (s.by_group) offer(scores, first, last, block, count, chunk, r, g, thresholds + g * kQueries<A>, allowed);
    }
    if (!s.by_group) offer(scores, first, last, block, count, chunk, r, 0, thresholds, allowed);
  }

  template <class Allowed>
  void offer(
      const A* scores, int64_t first, int64_t last, int64_t block, int64_t count, int64_t chunk, int64_t r,
      int64_t list, A* thresholds, const Allowed& allowed) {
    constexpr int L = kLanes<A>;
    const bool divide = !s.by_group && s.groups > 1;
    for (int64_t key = first; key < last; ++key) {
      const int64_t id = chunk + key;
      const A bias = s.bias ? static_cast<A>(s.bias[id]) : A(0);
      for (int64_t column = 0; column < count; column += L) {
        Vec<A> score = load<A>(scores + (key - first) * kQueries<A> + column);
        if (divide) score = score / broadcast(A(s.groups));
        if (s.bias) score = score + broadcast(bias);
        uint32_t bits = lanes_not_at_most<A>(score, load<A>(thresholds + column));
        if (count - column < L) bits &= (1u << (count - column)) - 1;
        for (; bits; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          const int64_t q = block * kQueries<A> + column + lane;
          if (!allowed(q, list, id)) continue;
          const int64_t at = (r * s.lists() + list) * s.queries + q;
          Best<A> best{kept.data() + at * s.k, counts[at], s.k};
          best.offer({score[lane], id});
          counts[at] = best.count;
          thresholds[column + lane] = best.threshold();
        }
      }
    }
  }

  const Search s;
  const Pool& pool;
  const int64_t d;
  int64_t blocks, panels_at_once, range, ranges;
  Buffer<A> panels;            // [block][D][kQueries]
  Buffer<Candidate<A>> kept;   // [range][list][B][K]
  Buffer<int64_t> counts;      // [range][list][B]
  Buffer<Candidate<A>> found;  // [ranges * K]
};

}  // namespace slm_fast::SLM_ISA

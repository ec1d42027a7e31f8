// What retrieve and key_loss share: the K best slots of each query, ranked as the reference ranks them.
//
// A fast pass scores all slots and keeps a few more than K. Queries are turned into panels [D][queries], so that keys are
// broadcast and nothing is summed across lanes. Then what could be among the K best, given what the fast pass may be
// wrong by, is scored again in float64 and ranked by that, rounded to float32. So a route depends on its query and the
// keys alone: not on the batch, a tile, the processor or a thread.
//
// The fast pass multiplies float32, or, where the processor can, pairs of bfloat16: twice as fast, and wrong by at most
// what rounding the query and the keys to bfloat16 took away from them, which is measured. Queries with more slots too
// close to call than were kept go on to the next way: from bfloat16 to float32, and from there to float64 for all slots.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "across.h"
#include "buffer.h"
#include "scores.h"
#include "kernels.h"
#include "ranked.h"

namespace slm_fast::SLM_ISA {

constexpr int64_t kFew = 8;    // queries too few for lanes
constexpr int64_t kKeys = 48;  // of a chunk: it stays in L2 while all panels pass over it

// T: what queries and keys are stored as. P: how the fast pass multiplies.
template <class T, class P>
class Searcher {
  using E = typename P::Element;
  static constexpr bool kRounded = P::kPair == 2;              // unit rows in bfloat16, else keys as they are
  static constexpr bool kAsStored = std::is_same_v<T, E>;      // keys are used where they lie
  static constexpr int64_t kSpare = kRounded ? 16 : 4;         // slots kept beyond K
  static constexpr int64_t kQueries = kPanelColumns<P>;        // of a panel
  static constexpr int64_t kPiece = (16 << 10) / (4 * kQueries);  // words of a panel that stay in L1
  static constexpr int64_t kM = kCombineM<P>;                  // keys of a tile

 public:
  Searcher(const Search& search, const Pool& pool)
      : s(search), pool(pool), d(s.width / s.groups), padded_d((d + P::kPair - 1) / P::kPair * P::kPair),
        words(s.groups * padded_d / P::kPair), most(std::min(s.k + kSpare, s.slots)) {
    blocks = (s.queries + kQueries - 1) / kQueries;
    // A thread takes some panels, and a range of slots when panels are few: each range has lists of its own.
    const int64_t turns = 2 * pool.workers, fits = (384 << 10) / (words * kQueries * 4 + 1);
    panels_at_once = std::max<int64_t>(1, std::min(fits, blocks / turns));
    parts = (blocks + panels_at_once - 1) / panels_at_once;
    const int64_t wanted = parts >= turns ? 1 : (2 * turns + parts - 1) / std::max<int64_t>(1, parts);
    range = s.slots / std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, s.slots / (2 * kKeys)));
    range = std::max<int64_t>(kKeys, (range + kKeys - 1) / kKeys * kKeys);
    ranges = (s.slots + range - 1) / range;
    few = !kRounded && s.queries <= kFew;
    most_listed = Shortlist::capacity(most);
    panels.at_least(blocks * words * P::kPair * (few ? kFew : kQueries));
    query_slack.at_least(s.queries);
    key_slack.at_least(parts * ranges);
    kept.at_least(ranges * s.lists() * s.queries * most_listed);
    counts.at_least(ranges * s.lists() * s.queries);
    threads = 2.0 * static_cast<double>(s.queries) * s.slots * s.width > 3e5;
  }

  // use(query, list, best, count) for each query, in no order, with the K best of each of its lists, the best first.
  // allowed(query, list, slot) says whether a slot may be returned; it is asked only for slots that would be, and it
  // says no to some only if Allowed::kAsks. undecided(query) instead where this pass cannot tell.
  template <class Allowed, class Use, class Undecided>
  void run(const Allowed& allowed, const Use& use, const Undecided& undecided) {
    pool.for_each(blocks, threads, [&] {
      return [&, rows = Buffer<E>(kQueries * words * P::kPair), lengths = Buffer<float>(s.groups)](
                 int64_t block) mutable { make_panel(block, rows.data(), lengths.data()); };
    });
    if constexpr (kRounded)
      if (parts > 1 && s.slots * words * 4 <= 16 << 20) convert_keys();
    pool.for_each(parts * ranges, threads, [&] {
      return [&, scratch = Scratch(*this)](int64_t item) mutable {
        key_slack[item] = search_range(item / ranges * panels_at_once, item % ranges, allowed, scratch);
      };
    });
    pool.for_each(s.queries, threads, [&] {
      return [&, found = Buffer<Ranked>(std::max(ranges, int64_t{1}) * most_listed), row = Buffer<double>(s.width),
              lengths = Buffer<double>(s.groups)](int64_t query) mutable {
        widen_all(query_row(query), row.data(), s.width);
        for (int64_t g = 0; g < s.groups; ++g) lengths[g] = exact_length(row.data() + g * d, d);
        const ExactScore<T> exact{s, row.data(), lengths.data()};
        for (int64_t list = 0; list < s.lists(); ++list) {
          const int64_t count = rank(query, list, exact, allowed, found.data());
          if (count < 0) return undecided(query);
          use(query, list, static_cast<const Ranked*>(found.data()), count);
        }
      };
    });
  }

 private:
  struct Scratch {
    Buffer<E> keys;
    Buffer<float> lengths, scores, thresholds;
    explicit Scratch(const Searcher& of)
        : lengths(kKeys * of.s.groups), scores(kKeys * kQueries),
          thresholds(of.s.lists() * of.panels_at_once * kQueries) {
      if constexpr (kRounded || !kAsStored) keys.at_least(kKeys * of.words * P::kPair);
    }
  };

  const T* query_row(int64_t q) const { return static_cast<const T*>(s.query) + q * s.width; }
  const T* key_row(int64_t p) const { return static_cast<const T*>(s.keys) + p * s.width; }
  int64_t list_at(int64_t r, int64_t list, int64_t query) const { return (r * s.lists() + list) * s.queries + query; }

  // ---- rows as the fast pass reads them ----

  // Queries, of unit length in each group when cosine; transposed unless they are few.
  void make_panel(int64_t block, E* rows, float* lengths) {
    const int64_t first = block * kQueries, count = std::min(kQueries, s.queries - first), width = words * P::kPair;
    for (int64_t q = 0; q < count; ++q) {
      const T* from = query_row(first + q);
      E* to = rows + q * width;
      if constexpr (kRounded) {
        query_slack[first + q] = round_row(s, from, padded_d, to, lengths);
      } else {
        float slack = 0;
        group_lengths(from, s.groups, d, lengths);
        for (int64_t g = 0; g < s.groups; ++g) {
          const float factor = s.cosine ? inverse_length(lengths[g]) : 1;
          for (int64_t i = g * d; i < (g + 1) * d; ++i) to[i] = widen<float>(from[i]) * factor;
          slack = lengths[g] <= slack ? slack : lengths[g];
        }
        query_slack[first + q] = slack;
      }
    }
    if (few) std::copy_n(rows, count * width, panels.data());
    else turn_rows<P>(panels.data() + block * width * kQueries, [&](int64_t q) { return rows + q * width; }, count, width);
  }

  void convert_keys() {
    const int64_t chunks = (s.slots + kKeys - 1) / kKeys;
    converted.at_least(s.slots * words * P::kPair), converted_slack.at_least(chunks);
    pool.for_each(chunks, threads, [&] {
      return [&, lengths = Buffer<float>(s.groups)](int64_t chunk) mutable {
        const int64_t first = chunk * kKeys, keys = std::min(kKeys, s.slots - first);
        converted_slack[chunk] = round_keys(first, keys, converted.data() + first * words * P::kPair, lengths.data());
      };
    });
  }

  float round_keys(int64_t first, int64_t keys, E* to, float* lengths) const {
    float slack = 0;
    for (int64_t i = 0; i < keys; ++i) {
      const float lost = round_row(s, key_row(first + i), padded_d, to + i * words * P::kPair, lengths);
      slack = lost <= slack ? slack : lost;
    }
    return slack;
  }

  struct Chunk {
    const E* rows;
    const char* next;  // the rows that come later, to be asked for meanwhile, and how many bytes of them a step asks for
    int64_t next_step;
    float slack;
  };

  Chunk take_keys(int64_t first, int64_t keys, bool more, Scratch& scratch) const {
    constexpr auto size = static_cast<int64_t>(sizeof(T));
    Chunk chunk{nullptr, nullptr, 0, 0};
    if constexpr (kRounded) {
      if (converted.data()) return {converted.data() + first * words * P::kPair, nullptr, 0, converted_slack[first / kKeys]};
      chunk.slack = round_keys(first, keys, scratch.keys.data(), scratch.lengths.data());
      chunk.rows = scratch.keys.data();
    } else {
      for (int64_t i = 0; i < keys && !few; ++i)
        chunk.slack = measure_key(first + i, scratch.lengths.data() + i * s.groups, chunk.slack);
      if constexpr (kAsStored) {
        chunk.rows = key_row(first);
      } else {
        widen_all(key_row(first), scratch.keys.data(), keys * s.width);
        chunk.rows = scratch.keys.data();
      }
    }
    if (more) chunk.next = reinterpret_cast<const char*>(key_row(first + keys)), chunk.next_step = kM * size * P::kPair;
    return chunk;
  }

  // The key's inverse lengths, and the longest length so far.
  float measure_key(int64_t key, float* lengths, float longest) const {
    group_lengths(key_row(key), s.groups, d, lengths);
    longest = lengths[0] <= longest ? longest : lengths[0];
    for (int64_t g = 0; g < s.groups; ++g) lengths[g] = inverse_length(lengths[g]);
    return longest;
  }

  // ---- the fast pass ----

  struct Scored {  // combine's output: scores[key][query]
    float* scores;
    const float* factor;  // of a key in this group, or null
    int64_t stride;
    bool more;
    const char* next;
    int64_t offset, next_step;
    void ahead(int64_t n) const {
      if (next) ask_for(next, offset + n * next_step);
    }
    void add(int64_t key, int64_t column, Vec<float> sum) const {
      float* to = scores + key * kQueries + column;
      if (factor) sum = sum * broadcast(factor[key * stride]);
      store(to, more ? load<float>(to) + sum : sum);
    }
    void add_first(int64_t key, int64_t column, Vec<float> sum, int64_t) const { add(key, column, sum); }
  };

  // Returns the keys' part in what a score may be wrong by.
  template <class Allowed>
  float search_range(int64_t first_block, int64_t r, const Allowed& allowed, Scratch& scratch) {
    const int64_t last_block = std::min(first_block + panels_at_once, blocks);
    const int64_t begin = r * range, end = std::min(begin + range, s.slots);
    std::fill_n(
        scratch.thresholds.data(), s.lists() * panels_at_once * kQueries, std::numeric_limits<float>::quiet_NaN());
    for (int64_t list = 0; list < s.lists(); ++list)
      for (int64_t q = first_block * kQueries; q < std::min(last_block * kQueries, s.queries); ++q)
        counts[list_at(r, list, q)] = 0;

    float slack = 0;
    for (int64_t first = begin; first < end; first += kKeys) {
      const int64_t keys = std::min(kKeys, end - first);
      Chunk chunk = take_keys(first, keys, first + 2 * kKeys <= end, scratch);
      for (int64_t block = first_block; block < last_block; ++block)
        for (int64_t list = 0; list < s.lists(); ++list) {
          if (few) chunk.slack = score_few(chunk, first, keys, list, scratch, chunk.slack);
          else score(chunk, keys, block, list, scratch);
          if (list + 1 == s.lists()) chunk.next = nullptr;  // the first panel's pass fetched it
          finish(scratch.scores.data(), keys, first);
          float* thresholds = scratch.thresholds.data() + ((block - first_block) * s.lists() + list) * kQueries;
          if (first == begin && !Allowed::kAsks && most <= kSeeded && keys >= most)
            seed_thresholds(scratch.scores.data(), keys, kQueries, most, thresholds);
          offer(scratch.scores.data(), keys, block, first, r, list, thresholds, allowed);
        }
      slack = chunk.slack <= slack ? slack : chunk.slack;
    }
    return slack;
  }

  // Scores of a chunk for one panel: of one group, or summed over all. A piece of the panel stays in L1 while the keys
  // pass over it.
  void score(const Chunk& chunk, int64_t keys, int64_t block, int64_t list, Scratch& scratch) const {
    const E* panel = panels.data() + block * words * P::kPair * kQueries;
    const int64_t count = std::min(kQueries, s.queries - block * kQueries), group = padded_d / P::kPair;
    const int64_t first_word = s.by_group ? list * group : 0, last_word = s.by_group ? first_word + group : words;
    // Only a product of one group can be scaled by the key's length in it.
    const int64_t whole = kRounded ? last_word - first_word : group;
    const int64_t pieces = std::max<int64_t>(1, (whole + kPiece - 1) / kPiece);
    for (int64_t from = first_word; from < last_word; from += whole)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t at = from + whole * piece / pieces, to = from + whole * (piece + 1) / pieces;
        const auto* c = reinterpret_cast<const typename P::Coefficient*>(chunk.rows + at * P::kPair);
        const float* factor = !kRounded && s.cosine ? scratch.lengths.data() + at / group : nullptr;
        const E* part = panel + at * P::kPair * kQueries;
        auto pass = [&]<int M>(std::integral_constant<int, M>) {
          for (int64_t key = 0; key < keys; key += M) {
            const Scored out{scratch.scores.data(), factor, s.groups, at > first_word, chunk.next,
                             (key * words + at * kM) * P::kPair * static_cast<int64_t>(sizeof(T)), chunk.next_step};
            combine<P, M>(c, 1, words, part, to - at, key, std::min<int64_t>(key + M, keys), count, out);
          }
        };
        // Few columns leave registers for more keys.
        if (kRounded && count <= kQueries / 2) pass(std::integral_constant<int, kRounded ? 12 : kM>{});
        else pass(std::integral_constant<int, kM>{});
      }
  }

  // The mean over groups, and the bias.
  void finish(float* scores, int64_t keys, int64_t first) const {
    const float share = s.by_group ? 1 : 1 / static_cast<float>(s.groups);
    if (share == 1 && !s.bias) return;
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t q = 0; q < kQueries; ++q)
        scores[key * kQueries + q] = scores[key * kQueries + q] * share + (s.bias ? s.bias[first + key] : 0.0f);
  }

  // Sums along the rows; its bits differ from combine's, which the float64 ranking makes good.
  float score_few(
      const Chunk& chunk, int64_t first, int64_t keys, int64_t list, Scratch& scratch, float longest) const {
    if constexpr (!kRounded) {
      const int64_t first_group = s.by_group ? list : 0, last_group = s.by_group ? list + 1 : s.groups;
      const float *queries[kFew], *rows[kM];
      float sums[kM * kFew];
      for (int64_t key = 0; key < keys; key += kM) {
        const int64_t count = std::min(kM, keys - key);
        float* lengths = scratch.lengths.data() + key * s.groups;
        if (list == 0)
          for (int64_t i = 0; i < count; ++i) longest = measure_key(first + key + i, lengths + i * s.groups, longest);
        for (int64_t g = first_group; g < last_group; ++g) {
          for (int64_t q = 0; q < s.queries; ++q) queries[q] = panels.data() + q * s.width + g * d;
          for (int64_t i = 0; i < count; ++i) rows[i] = chunk.rows + (key + i) * s.width + g * d;
          dot<P>(queries, s.queries, rows, count, d, sums, kFew);
          for (int64_t i = 0; i < count; ++i)
            for (int64_t q = 0; q < s.queries; ++q) {
              float* to = scratch.scores.data() + (key + i) * kQueries + q;
              const float sum = sums[i * kFew + q] * (s.cosine ? lengths[i * s.groups + g] : 1);
              *to = g > first_group ? *to + sum : sum;
            }
        }
      }
    }
    return longest;
  }

  template <class Allowed>
  void offer(
      const float* scores, int64_t keys, int64_t block, int64_t first, int64_t r, int64_t list, float* thresholds,
      const Allowed& allowed) {
    constexpr int L = kLanes<float>;
    const int64_t count = std::min(kQueries, s.queries - block * kQueries);
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t id = first + key;
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

  // ---- the ranking ----

  // What the fast pass may be wrong by. In float32: d + 4 roundings of products whose magnitudes sum to at most
  // |query| |key|. Rounded to bfloat16, q + e and k + f have the product q k + q f + e (k + f), |q| = |k| = 1 and |f| less
  // than 1/100.
  float margin(int64_t query) const {
    const int64_t block = query / kQueries;
    float of_keys = 0;
    for (int64_t r = 0; r < ranges; ++r) {
      const float slack = key_slack[block / panels_at_once * ranges + r];
      of_keys = slack <= of_keys ? of_keys : slack;
    }
    if constexpr (kRounded) {
      const float unit = static_cast<float>(s.width + s.groups + 8) * 0x1p-23f;
      return unit + 1.001f * (of_keys + 1.01f * query_slack[query]);
    } else {
      const float unit = static_cast<float>(d + s.groups + 4) * 0x1p-23f;
      return s.cosine ? unit : unit * query_slack[query] * of_keys;
    }
  }

  // The K best into `found`, the best first; how many there are, or -1 if the fast pass cannot tell and another can.
  template <class Allowed>
  int64_t rank(int64_t query, int64_t list, const ExactScore<T>& exact, const Allowed& allowed, Ranked* found) const {
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
        found[count] = ranked(exact(list, slot_of(found[count])), slot_of(found[count]));
      std::sort(found, found + count, Better{});
      return k;
    }
    if constexpr (kRounded) return -1;
    all.count = 0;
    for (int64_t slot = 0; slot < s.slots; ++slot)
      if (allowed(query, list, slot)) all.add(ranked(exact(list, slot), slot));
    all.prune();
    std::sort(found, found + all.count, Better{});
    return k;
  }

  const Search s;
  const Pool& pool;
  const int64_t d, padded_d, words, most;  // of a group, of a row; words are of P::kPair elements; slots kept a list
  int64_t most_listed, blocks, panels_at_once, parts, range, ranges;
  bool threads, few;
  Buffer<E> panels;           // [block][words][kQueries] words, or [B][D] where queries are few
  Buffer<E> converted;        // [P][words] words, where they are read more than once
  Buffer<float> query_slack;  // [B] its length, or the length of what rounding took from it
  Buffer<float> key_slack;    // [part][range] the largest of keys
  Buffer<float> converted_slack;  // [chunk]
  Buffer<Ranked> kept;            // [range][list][B][most_listed]
  Buffer<int64_t> counts;         // [range][list][B]
};

#if defined(__AVX512BF16__)
// For a query that is among those left over from another search.
template <class Allowed>
struct AllowedAmong {
  static constexpr bool kAsks = Allowed::kAsks;
  const Allowed& allowed;
  const int64_t* query;
  bool operator()(int64_t q, int64_t list, int64_t slot) const { return allowed(query[q], list, slot); }
};
#endif

// The K best of each query by the fastest way; see Searcher::run for `allowed` and `use`. A query's lists come in order,
// and may all come a second time.
template <class T, class Allowed, class Use>
void search(const Search& s, const Pool& pool, const Allowed& allowed, const Use& use) {
  Search rest = s;
  auto never = [](int64_t) {};
#if defined(__AVX512BF16__)
  if (s.cosine && s.queries > kFew && s.slots >= 4 * (s.k + 24)) {
    Buffer<char> left(s.queries);
    std::fill_n(left.data(), s.queries, 0);
    Searcher<T, Bf16Pairs>(s, pool).run(allowed, use, [&](int64_t query) { left[query] = 1; });
    rest.queries = std::count(left.data(), left.data() + s.queries, 1);
    if (rest.queries == 0) return;
    Buffer<int64_t> which(rest.queries);
    Buffer<T> rows(rest.queries * s.width);
    for (int64_t query = 0, next = 0; query < s.queries; ++query) {
      if (!left[query]) continue;
      std::copy_n(static_cast<const T*>(s.query) + query * s.width, s.width, rows.data() + next * s.width);
      which[next++] = query;
    }
    rest.query = rows.data();
    return Searcher<T, Plain<float>>(rest, pool).run(
        AllowedAmong<Allowed>{allowed, which.data()},
        [&](int64_t query, int64_t list, const Ranked* best, int64_t count) { use(which[query], list, best, count); },
        never);
  }
#endif
  Searcher<T, Plain<float>>(rest, pool).run(allowed, use, never);
}

}  // namespace slm_fast::SLM_ISA

// A search for the K best slots of each query, ranked as the reference ranks them.
//
// A fast pass scores all slots and keeps a few more than K. Queries are transposed into panels [D][queries], so that
// keys are broadcast and no horizontal sums are needed. Slots that may be among the K best, given the fast pass's error
// bound, are scored again in float64 and ranked by that, rounded to float32. A route therefore depends only on its
// query and the keys: not on the batch, tiling, processor or threads.
//
// The fast pass multiplies float32 or, if the processor can, bfloat16, with an error bounded by the measured rounding
// error of query and keys or, if each number is split in two (`Split`), little more than float32's. If more slots are
// too close to call than were kept, the query falls back: from bfloat16 to float32, then to float64 for all slots.
//
// A slot with several keys is kept by its best key alone. If another one is too close to call, all are ranked.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "across.h"
#include "best_keys.h"
#include "buffer.h"
#include "in_tiles.h"
#include "keys.h"
#include "ranked.h"
#include "search.h"

namespace slm_fast::SLM_ISA {

constexpr int64_t kFew = 8;      // up to this many queries are too few to fill the lanes
constexpr int64_t kFewKeys = 8;  // per chunk in that case: they stay in L1

// T: storage type of queries and keys. P: how the fast pass multiplies.
template <class T, class P>
class Searcher {
  using E = typename P::Element;
  using Chunk = typename Keys<T, P>::Chunk;
  static constexpr bool kRounded = P::kPair == 2;              // normalised bfloat16 rows
  static constexpr bool kSplit = std::is_same_v<P, Split>;     // bfloat16 tiles that add up to float32
  static constexpr int64_t kUnit = kSplit ? amx::kStep : P::kPair;
  static constexpr int64_t kSplitPanels = 4;                   // per work item, as splitting keys costs as much as one
  static constexpr int64_t kSpare = kRounded ? 16 : 12;        // slots kept beyond K
  static constexpr int64_t kQueries = kPanelColumns<P>;        // per panel
  static constexpr int64_t kPiece = (16 << 10) / (4 * kQueries);  // words of a panel that stay in L1

 public:
  Searcher(const Search& search, const Threads& threads)
      : s(search), threads(threads), keys(s), d(s.width / s.groups), padded_d((d + kUnit - 1) / kUnit * kUnit),
        words(s.groups * padded_d / P::kPair), most(std::min(s.k + kSpare, s.slots)), few(s.queries <= kFew) {
    blocks = (s.queries + kQueries - 1) / kQueries;
    // A work item is some panels and, if there are few, a range of key chunks; each range has its own lists.
    const int64_t turns = 2 * threads.workers, fits = (384 << 10) / (words * kQueries * 4 + 1);
    panels_at_once = kSplit ? std::min(blocks, kSplitPanels) : std::max<int64_t>(1, std::min(fits, blocks / turns));
    parts = (blocks + panels_at_once - 1) / panels_at_once;
    chunks = (s.slots + kKeys - 1) / kKeys;
    const int64_t wanted = parts >= turns ? 1 : (2 * turns + parts - 1) / std::max<int64_t>(1, parts);
    ranges = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, chunks / 2));
    most_listed = Shortlist::capacity(most);
    rounded_by = roundings() * 0x1p-23 + (kSplit ? amx::kLost : 0);
    panels.at_least(blocks * words * P::kPair * (few ? kFew : kQueries));
    query_slack.at_least(s.queries);
    key_slack.at_least(parts * ranges);
    kept.at_least(ranges * s.lists() * s.queries * most_listed);
    counts.at_least(ranges * s.lists() * s.queries);
    parallel = 2.0 * static_cast<double>(s.queries) * s.slots * s.width > 3e5;
  }

  // Calls use(query, list, best, count) for each query, in no particular order, with the K best of each of its lists,
  // best first, or undecided(query) if this pass cannot tell.
  template <class Undecided>
  void run(const Allowed& allowed, const Use& use, const Undecided& undecided) {
    threads.for_each(blocks, parallel, [&] {
      return [&, rows = Buffer<E>(kQueries * words * P::kPair), lengths = Buffer<float>(s.groups)](
                 int64_t block) mutable { make_panel(block, rows.data(), lengths.data()); };
    });
    if (parts > 1) keys.round_all(threads, parallel);
    threads.for_each(parts * ranges, parallel, [&] {
      return [&, scratch = Scratch(*this)](int64_t item) mutable {
        key_slack[item] = search_range(item / ranges * panels_at_once, item % ranges, allowed, scratch);
      };
    });
    threads.for_each(s.queries, parallel, [&] {
      return [&, found = Buffer<Ranked>(std::max(ranges, int64_t{1}) * most_listed), row = Buffer<double>(s.width),
              lengths = Buffer<double>(s.groups)](int64_t query) mutable {
        widen_all(query_row(query), row.data(), s.width);
        for (int64_t g = 0; g < s.groups; ++g) lengths[g] = exact_length(row.data() + g * d, d);
        const ExactScore<T> exact{
            s, row.data(), lengths.data(),
            s.prepared ? PreparedKeys::at(s.prepared, s.slots, s.width, s.groups).lengths : nullptr};
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
    typename Keys<T, P>::Scratch keys;
    Buffer<float> thresholds;
    BestKeysBuffer best, open;  // of a chunk; of slots that continue in the next chunk, per panel and list
    Buffer<uint16_t> split;     // keys of a chunk
    explicit Scratch(const Searcher& of)
        : keys(of.keys), thresholds(of.s.lists() * of.panels_at_once * kQueries), best(kKeys * kQueries),
          open(of.s.key_slot ? of.s.lists() * of.panels_at_once * kQueries : 0),
          split(kSplit ? kKeys * 2 * of.padded_d : 0) {}
  };

  const T* query_row(int64_t q) const { return static_cast<const T*>(s.query) + q * s.width; }
  int64_t list_at(int64_t r, int64_t list, int64_t query) const { return (r * s.lists() + list) * s.queries + query; }

  // Queries, each group normalised for cosine; transposed unless they are few.
  void make_panel(int64_t block, E* rows, float* lengths) {
    const int64_t first = block * kQueries, count = std::min(kQueries, s.queries - first), width = words * P::kPair;
    for (int64_t q = 0; q < count; ++q) {
      const T* from = query_row(first + q);
      E* to = rows + q * width;
      if constexpr (kRounded) {
        query_slack[first + q] = round_row(from, s.groups, d, padded_d, to, lengths).of(s.by_group);
      } else {
        float slack = 0;
        group_lengths(from, s.groups, d, lengths);
        for (int64_t g = 0; g < s.groups; ++g) {
          const float factor = s.cosine ? inverse_length(lengths[g]) : 1;
          for (int64_t i = g * d; i < (g + 1) * d; ++i) to[i] = widen<float>(from[i]) * factor;
          slack = lengths[g] <= slack ? slack : lengths[g];
        }
        query_slack[first + q] = slack + underflow(d);
      }
    }
    E* panel = panels.data() + block * width * kQueries;
    if constexpr (kSplit) split_panel(rows, width, count, d, padded_d / kUnit, panel);
    else if (few) std::copy_n(rows, count * width, panel);
    else turn_rows<P>(panel, [&](int64_t q) { return rows + q * width; }, count, width);
  }

  // ---- the fast pass ----

  // The first key of a range of chunks. No slot is split between ranges.
  int64_t range_begin(int64_t r) const {
    int64_t key = std::min(chunks * r / ranges * kKeys, s.slots);
    while (key > 0 && key < s.slots && s.same_slot(key - 1, key)) ++key;
    return key;
  }

  // Whether any query of these panels may retrieve any slot of these keys.
  bool asked_for(const Allowed& allowed, int64_t block, int64_t last_block, int64_t first, int64_t count) const {
    const int64_t last = std::min(last_block * kQueries, s.queries);
    for (int64_t query = block * kQueries; query < last; ++query)
      if (allowed.any(query, first, count)) return true;
    return false;
  }

  // Returns the keys' part of a score's error bound.
  float search_range(int64_t first_block, int64_t r, const Allowed& allowed, Scratch& scratch) {
    const int64_t last_block = std::min(first_block + panels_at_once, blocks), step = few ? kFewKeys : kKeys;
    const int64_t begin = range_begin(r), end = range_begin(r + 1);
    std::fill_n(
        scratch.thresholds.data(), s.lists() * panels_at_once * kQueries, std::numeric_limits<float>::quiet_NaN());
    for (int64_t list = 0; list < s.lists(); ++list)
      for (int64_t q = first_block * kQueries; q < std::min(last_block * kQueries, s.queries); ++q)
        counts[list_at(r, list, q)] = 0;

    float slack = 0;
    const amx::Tiles tiles(kSplit || (kRounded && amx::chosen()));
    const BestKeys best = scratch.best.data();
    for (int64_t first = begin, count; first < end; first += count) {
      count = std::min({step, end - first, kKeys - first % kKeys});
      if (allowed.asks && !asked_for(allowed, first_block, last_block, first, count)) {
        if (s.key_slot) scratch.open.data().begin_with(first + count - 1, s.lists() * panels_at_once * kQueries);
        continue;
      }
      Chunk chunk = keys.take(first, count, scratch.keys);
      if constexpr (kSplit) split_keys(chunk.rows, count, d, padded_d / kUnit, scratch.split.data());
      const float before = slack;
      slack = std::max(slack, chunk.slack);
      if (first + 2 * step > end) chunk.next = nullptr;
      for (int64_t block = first_block; block < last_block; ++block)
        for (int64_t list = 0; list < s.lists(); ++list) {
          const int64_t queries = std::min(kQueries, s.queries - block * kQueries), steps = padded_d / kUnit;
          if constexpr (kSplit)
            score_split(scratch.split.data(), count, &panels[block * words * kQueries], queries, steps, best.score);
          else if (few) score_few(chunk, count, list, best.score);
          else score(chunk, count, block, list, best.score);
          if (list + 1 == s.lists()) chunk.next = nullptr;  // the first panel has prefetched it
          if (s.bias)
            for (int64_t key = 0; key < count; ++key)
              for (int64_t q = 0; q < kQueries; ++q) best.score[key * kQueries + q] += s.bias[first + key];
          const int64_t place = ((block - first_block) * s.lists() + list) * kQueries;
          const int64_t found = s.key_slot ? join_keys(s.key_slot, s.slots, first, count, kQueries, queries, best,
                                                       scratch.open.data().at(place))
                                           : count;
          float* thresholds = scratch.thresholds.data() + place;
          const bool seeded = first == begin && !allowed.asks && s.k <= kSeeded && found >= s.k;
          if (seeded) kth_best(best.score, found, kQueries, s.k, thresholds);
          if (seeded || slack > before)  // or the error bound has grown since thresholds were set
            for (int64_t q = 0; q < queries; ++q)
              thresholds[q] = Shortlist::below(cutoff(thresholds[q], block * kQueries + q, slack));
          offer(best, found, block, first, r, list, thresholds, slack, allowed);
        }
    }
    return slack;
  }

  // The elements of a row that a list's scores cover, and how many are multiplied at once: unless rows are normalised,
  // one group, whose product is scaled by the key's inverse length.
  struct Span {
    int64_t begin, end, piece;
  };
  Span span_of(int64_t list) const {
    const Span all{0, s.groups * padded_d, 0}, one{list * padded_d, (list + 1) * padded_d, 0};
    const Span span = s.by_group ? one : all;
    return {span.begin, span.end, kRounded ? span.end - span.begin : padded_d};
  }

  // Scores a chunk against one panel: one group, or the sum over all. A piece of the panel stays in L1 while the keys
  // pass over it.
  void score(const Chunk& chunk, int64_t count, int64_t block, int64_t list, float* scores) const {
    const E* panel = panels.data() + block * words * P::kPair * kQueries;
    const int64_t queries = std::min(kQueries, s.queries - block * kQueries);
    const Span span = span_of(list);
    const int64_t whole = span.piece / P::kPair, pieces = pieces_of(whole, kPiece);
    int64_t done = 0;
    if constexpr (kRounded) {
      const int64_t first = span.begin / 2, many = (span.end - span.begin) / 2;
      done = score_tiles(chunk.rows + span.begin, words, count, panel + first * 2 * kQueries, queries, many, scores);
      for (int64_t offset = 0; chunk.next && offset < done * chunk.row_bytes; offset += 64) ask_for(chunk.next, offset);
      if (done == count) return;
    }
    for (int64_t from = span.begin; from < span.end; from += span.piece)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t at = from / P::kPair + whole * piece / pieces, to = from / P::kPair + whole * (piece + 1) / pieces;
        const auto* c = reinterpret_cast<const typename P::Coefficient*>(chunk.rows + at * P::kPair);
        const float* factor = chunk.factors ? chunk.factors + from / padded_d : nullptr;
        const E* part = panel + at * P::kPair * kQueries;
        auto pass = [&]<int M>(std::integral_constant<int, M>) {
          const int64_t word = chunk.row_bytes / words;
          for (int64_t key = done; key < count; key += M) {
            const Scored<kQueries> out{scores, factor, s.groups, at * P::kPair > span.begin, chunk.next,
                             key * chunk.row_bytes + at * M * word, M * word};
            combine<P, M>(c, 1, words, part, to - at, key, std::min<int64_t>(key + M, count), queries, out);
          }
        };
        // Few columns leave registers for more keys.
        if (kRounded && queries <= kQueries / 2) pass(std::integral_constant<int, kRounded ? 12 : kCombineM<P>>{});
        else pass(std::integral_constant<int, kCombineM<P>>{});
      }
  }

  // Sums along the rows, so its bits differ from combine's; the float64 ranking makes up for that.
  void score_few(const Chunk& chunk, int64_t count, int64_t list, float* scores) const {
    const E *queries[kFew], *rows[kFewKeys];
    float sums[kFewKeys * kFew];
    const Span span = span_of(list);
    const int64_t size = words * P::kPair;
    for (int64_t offset = 0; chunk.next && offset < count * chunk.row_bytes; offset += 64) ask_for(chunk.next, offset);
    for (int64_t from = span.begin; from < span.end; from += span.piece) {
      for (int64_t q = 0; q < s.queries; ++q) queries[q] = panels.data() + q * size + from;
      for (int64_t key = 0; key < count; ++key) rows[key] = chunk.rows + key * size + from;
      dot<P>(queries, s.queries, rows, count, span.piece, sums, kFew);
      for (int64_t key = 0; key < count; ++key)
        for (int64_t q = 0; q < s.queries; ++q) {
          float* to = scores + key * kQueries + q;
          const float sum = sums[key * kFew + q] * (chunk.factors ? chunk.factors[key * s.groups + from / padded_d] : 1);
          *to = from > span.begin ? *to + sum : sum;
        }
    }
  }

  void offer(
      const BestKeys& best, int64_t slots, int64_t block, int64_t first, int64_t r, int64_t list, float* thresholds,
      float slack, const Allowed& allowed) {
    constexpr int L = kLanes<float>;
    const int64_t count = std::min(kQueries, s.queries - block * kQueries);
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t column = 0; column < count; column += L) {
        const BestKeys at = best.at(slot * kQueries + column);
        const Vec<float> score = load<float>(at.score);
        uint32_t bits = lanes_not_at_most(score, load<float>(thresholds + column));
        if (count - column < L) bits &= (1u << (count - column)) - 1;
        for (; bits; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          const int64_t q = block * kQueries + column + lane;
          int64_t id = s.key_slot ? at.key[lane] : first + slot;
          if (allowed.asks && !allowed.slot(q, list, id)) continue;
          if (s.key_slot && !(at.second[lane] < cutoff(score[lane], q, slack))) id |= kClose;
          const int64_t own = list_at(r, list, q);
          Shortlist shortlist{kept.data() + own * most_listed, counts[own], most};
          if (shortlist.add(ranked(score[lane], id)))
            thresholds[column + lane] =
                shortlist.keep_likely(std::min(s.k, most), [&](float kth) { return cutoff(kth, q, slack); });
          counts[own] = shortlist.count;
        }
      }
  }

  // ---- the ranking ----

  static int64_t pieces_of(int64_t length, int64_t piece) { return std::max<int64_t>(1, (length + piece - 1) / piece); }

  // How often a score is rounded: in summing products within a piece, then pieces and groups, and, for cosines, in
  // lengths and factors.
  double roundings() const {
    constexpr int64_t L = kLanes<float>;
    const int64_t length = span_of(0).piece, ahead = s.cosine ? d / (4 * L) + 16 : 4;
    const int64_t most_of_piece = kSplit ? amx::kPiece : few ? kDotPiece<P> : kPiece * P::kPair;
    const int64_t pieces = pieces_of(length, most_of_piece);
    const int64_t piece = std::min(length, most_of_piece), one_by_one = few ? (piece + L - 1) / L + L : piece;
    // Pieces are added to a running sum over groups, on average half of its final size.
    const int64_t after = std::max(pieces + s.groups, (pieces + 1) * (s.groups + 1) / 4);
    return static_cast<double>(one_by_one + after + ahead);
  }

  // With `kth` the K-th best fast-pass score so far, a slot that scores below this is not among the K best. Sums over
  // groups are not yet divided by G. The float32 error is at most rounded_by (|query| |key| + kSmallest): the first
  // term bounds the sum of the products' magnitudes, the second covers underflow. Rounded to bfloat16, q + e and k + f
  // have the product q k + q f + e (k + f), with |q| = |k| = 1 and |f| < 1/100.
  float cutoff(float kth, int64_t query, float of_keys) const {
    double margin = s.by_group ? 1 : static_cast<double>(s.groups);
    if constexpr (kRounded)
      margin *= rounded_by + 1.001 * (of_keys + 1.01 * query_slack[query]);
    else
      margin *= rounded_by * (s.cosine ? 1.0 : query_slack[query] * double{of_keys}) +
                (kSplit ? 8.0 * static_cast<double>(s.width) : rounded_by) * kSmallest;  // tiles flush to zero
    if (s.bias) margin += std::abs(kth) * 0x1p-23;
    return static_cast<float>(kth - 2 * margin);
  }

  // Writes the K best to `found`, best first. Returns their number, or -1 if this pass cannot tell but another can.
  int64_t rank(int64_t query, int64_t list, const ExactScore<T>& exact, const Allowed& allowed, Ranked* found) const {
    Shortlist all{found, 0, most};
    for (int64_t r = 0; r < ranges; ++r) {
      const int64_t at = list_at(r, list, query);
      std::copy_n(kept.data() + at * most_listed, counts[at], found + all.count);
      all.count += counts[at];
    }
    all.keep_best();
    std::sort(found, found + all.count, Better{});
    const int64_t k = std::min(s.k, all.count);
    if (k == 0) return 0;
    const float* slacks = key_slack.data() + query / kQueries / panels_at_once * ranges;
    float slack = 0;
    for (int64_t r = 0; r < ranges; ++r) slack = std::max(slack, slacks[r]);
    const float lowest = cutoff(score_of(found[k - 1]), query, slack);
    const bool complete = all.count < most || most == s.slots;
    const bool clear = complete || score_of(found[all.count - 1]) < lowest;
    if (clear && !std::isnan(score_of(found[0])) && !std::isnan(lowest)) {
      int64_t count = 0;
      for (; count < all.count && score_of(found[count]) >= lowest; ++count)
        found[count] = exact_best(exact, list, slot_of(found[count]));
      std::sort(found, found + count, Better{});
      return k;
    }
    if constexpr (kRounded || kSplit) return -1;
    all.count = 0;
    for (int64_t key = 0; key < s.slots;)
      if (allowed.asks && !allowed.slot(query, list, key)) ++key;
      else if (all.add(exact_best_from(exact, list, key))) all.keep_best();
    all.keep_best();
    std::sort(found, found + all.count, Better{});
    return k;
  }

  const Search s;
  const Threads& threads;
  Keys<T, P> keys;
  const int64_t d, padded_d, words, most;  // per group; of a row, in words of P::kPair elements; slots kept per list
  const bool few;
  int64_t most_listed, blocks, panels_at_once, parts, chunks, ranges;
  bool parallel;
  double rounded_by;          // error bound of a sum of products of magnitude 1
  Buffer<E> panels;           // [block][words][kQueries] words, or [B][D] if queries are few
  Buffer<float> query_slack;  // [B] length, or norm of the rounding error
  Buffer<float> key_slack;    // [part][range] largest of the keys
  Buffer<Ranked> kept;        // [range][list][B][most_listed]
  Buffer<int64_t> counts;     // [range][list][B]
};

}  // namespace slm_fast::SLM_ISA

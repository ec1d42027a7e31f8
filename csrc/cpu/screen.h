// The K best slots by inner product with float32 keys that were rounded to bfloat16 beforehand, in tiles (amx.h).
//
// A first pass multiplies the rounded keys, half as many bytes, by the queries, which are split in two and lose little.
// It bounds each score from above, by the query's length times what the key has lost. The float64 scores of its best
// slots bound the K-th best score from below. Keys that may reach that are scored in float64 and ranked by it. So a
// route is the same, bit for bit, as by the other searches (searcher.h).
#pragma once

#include <algorithm>
#include <limits>

#include "best_keys.h"
#include "buffer.h"
#include "in_tiles.h"
#include "ranked.h"
#include "search.h"

#if defined(__AVX512BF16__)
namespace slm_fast::SLM_ISA {

// Views into one memory block that holds P rounded keys.
struct RoundedKeys {
  static constexpr int64_t kPart = amx::kRows * amx::kStep;  // numbers in a tile

  float* slack;     // [P] maximum error of a score, for queries of length 1
  uint16_t* tiles;  // [P / 16][D / 32][16][32], zero-padded

  static int64_t steps(int64_t width) { return (width + amx::kStep - 1) / amx::kStep; }
  static int64_t bytes(int64_t keys, int64_t width) {
    return slack_bytes(keys) + tiles_of(keys) * steps(width) * kPart * static_cast<int64_t>(sizeof(uint16_t));
  }
  static RoundedKeys at(void* memory, int64_t keys) {
    auto* bytes = static_cast<char*>(memory);
    return {reinterpret_cast<float*>(bytes), reinterpret_cast<uint16_t*>(bytes + slack_bytes(keys))};
  }

  // Rounds a tile of keys: `count` rows of `width` numbers.
  void round(int64_t tile, const float* rows, int64_t count, int64_t width) const {
    constexpr int L = kLanes<float>;
    for (int64_t key = 0; key < amx::kRows; ++key) {
      auto* to = reinterpret_cast<BFloat16*>(tiles + tile * steps(width) * kPart + key * amx::kStep);
      const float* row = rows + key * width;
      Vec<float> lost[4] = {};
      for (int64_t step = 0; step < steps(width); ++step, to += kPart)
        for (int64_t i = 0; i < amx::kStep; i += L) {
          const int64_t left = key < count ? width - step * amx::kStep - i : 0;
          const Vec<float> value = left > 0 ? load_first<float>(row + step * amx::kStep + i, left) : Vec<float>{};
          store(to + i, value);
          const Vec<float> rest = value - load<float>(to + i);
          lost[i / L] = rest * rest + lost[i / L];
        }
      float parts[4];
      sum_each_of_4<float>(lost, parts);
      if (key < count) slack[tile * amx::kRows + key] = slack_of(row, width, parts[0] + parts[1]);
    }
  }

 private:
  static int64_t slack_bytes(int64_t keys) { return (keys * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64; }

  // What the key has lost, and what float32 rounds in summing up, first within pieces and then over them. Tiles flush
  // denormal numbers to zero.
  static float slack_of(const float* row, int64_t width, float lost) {
    float length;
    group_lengths(row, 1, width, &length);
    const double roundings = static_cast<double>(amx::kPiece + width / amx::kPiece + 8);
    const double of_length = roundings * 0x1p-23 + amx::kLost;
    return static_cast<float>(1.001 * (std::sqrt(lost) + of_length * length + underflow(width)));
  }
};

class Screen {
  static constexpr int L = kLanes<float>;
  static constexpr int64_t kColumns = kPanelColumns<Split>;       // queries per panel
  static constexpr int64_t kChunk = 8 * amx::kRows;               // keys that stay in L2 while all panels pass
  static constexpr int64_t kMost = 1024;                          // keys per query to score in float64
  static constexpr int64_t kScores = (64 << 20) / sizeof(float);  // scores held at once

 public:
  static constexpr int64_t kMostSlots = 64;  // K

  Screen(const Search& s, const Threads& threads)
      : s(s), threads(threads), keys(RoundedKeys::at(const_cast<void*>(s.prepared), s.slots)),
        steps(RoundedKeys::steps(s.width)), chunks((s.slots + kChunk - 1) / kChunk), k(std::min(s.k, s.slots)) {
    const int64_t panels = (s.queries + kColumns - 1) / kColumns;
    at_once = std::clamp<int64_t>(kScores / (chunks * kChunk * kColumns + 1), 1, std::max<int64_t>(1, panels));
  }

  // As Searcher::run, where every slot is allowed: keys that no query may retrieve are skipped there, not here.
  template <class Undecided>
  void run(const Allowed&, const Use& use, const Undecided& undecided) {
    const bool parallel = 2.0 * static_cast<double>(s.queries) * s.slots * s.width > 3e5;
    const int64_t step = at_once * kColumns;
    panels.at_least(at_once * 2 * steps * amx::kRows * kColumns);
    scores.at_least(at_once * chunks * kChunk * kColumns);
    for (int64_t first = 0; first < s.queries; first += step) {
      const int64_t queries = std::min(step, s.queries - first), blocks = (queries + kColumns - 1) / kColumns;
      threads.for_each(blocks, parallel, [&] {
        return [&](int64_t block) {
          const int64_t from = block * kColumns, count = std::min(kColumns, queries - from);
          split_panel(query_row(first + from), s.width, count, s.width, steps, panel(block));
        };
      });
      threads.for_each(chunks, parallel, [&] { return [&](int64_t chunk) { score(chunk, queries); }; });
      threads.for_each((queries + L - 1) / L, parallel, [&] {
        return [&, scratch = Scratch(s.width, k)](int64_t lanes) mutable {
          rank(first, lanes * L, std::min<int64_t>(L, queries - lanes * L), scratch, use, undecided);
        };
      });
    }
  }

 private:
  struct Scratch {
    Buffer<double> rows;                 // [L][D]
    Buffer<Ranked> best, likely, found;  // [L][K], [L][kMost], [K]
    int64_t counts[L];
    Scratch(int64_t width, int64_t k) : rows(L * width), best(L * k), likely(L * kMost), found(k) {}
  };

  const float* query_row(int64_t query) const { return static_cast<const float*>(s.query) + query * s.width; }
  float* panel(int64_t block) { return panels.data() + block * 2 * steps * amx::kRows * kColumns; }
  float* scores_of(int64_t block) { return scores.data() + block * chunks * kChunk * kColumns; }

  // Products of a chunk of keys with all panels, without the biases.
  void score(int64_t chunk, int64_t queries) {
    constexpr int64_t kRow = 2 * amx::kStep, kTile = amx::kRows * kRow;
    const int64_t first = chunk * kChunk, count = std::min(kChunk, s.slots - first);
    const auto* rows = reinterpret_cast<const char*>(keys.tiles) + first / amx::kRows * steps * kTile;
    const amx::Tiles tiles(true);
    for (int64_t block = 0; block * kColumns < queries; ++block) {
      const int64_t columns = std::min(kColumns, queries - block * kColumns);
      amx::score({rows, kRow, kTile, kTile * steps, 0, reinterpret_cast<const uint32_t*>(panel(block)),
                  steps * amx::kRows * kColumns, tiles_of(count), tiles_of(columns), steps, kColumns,
                  scores_of(block) + first * kColumns});
    }
  }

  // Ranks `count` queries, from `first + at` on.
  template <class Undecided>
  void rank(int64_t first, int64_t at, int64_t count, Scratch& scratch, const Use& use, const Undecided& undecided) {
    const float* column = scores_of(at / kColumns) + at % kColumns;
    float lowest[L], length[L];
    find_best(column, count, scratch);
    for (int64_t lane = 0; lane < count; ++lane) {
      const float* row = query_row(first + at + lane);
      widen_all(row, scratch.rows.data() + lane * s.width, s.width);
      group_lengths(row, 1, s.width, &length[lane]);
      length[lane] = (length[lane] + underflow(s.width)) * (1 + 0x1p-20f) + 0x1p-100f;
      lowest[lane] = kth_of(lane, scratch);
    }
    std::fill(lowest + count, lowest + L, std::numeric_limits<float>::infinity());
    std::fill(length + count, length + L, 0.0f);
    find_likely(column, load<float>(lowest), load<float>(length), count, scratch);
    for (int64_t lane = 0; lane < count; ++lane) {
      if (scratch.counts[lane] > kMost) undecided(first + at + lane);
      else use(first + at + lane, 0, scratch.found.data(), pick(lane, scratch));
    }
  }

  // Each query's K best slots by the first pass, each by its best key.
  void find_best(const float* column, int64_t count, Scratch& scratch) const {
    const Vec<float> none = broadcast(-std::numeric_limits<float>::infinity());
    Vec<float> kth = none, highest = none;
    Vec<int32_t> which = broadcast(int32_t{0});
    std::fill_n(scratch.counts, L, 0);
    for (int64_t key = 0; key < s.slots; ++key) {
      const Vec<float> score = score_of_key(column, key);
      const Vec<int32_t> higher = score > highest;
      highest = higher ? score : highest;
      which = higher ? broadcast(static_cast<int32_t>(key)) : which;
      if (key + 1 < s.slots && s.same_slot(key, key + 1)) continue;
      for (uint32_t bits = lanes_not_at_most(highest, kth); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        if (lane >= count) break;
        Ranked *best = scratch.best.data() + lane * k, *end = best + scratch.counts[lane];
        if (end == best + k) --end;
        else ++scratch.counts[lane];
        const Ranked one = ranked(highest[lane], which[lane]);
        for (; end > best && end[-1] < one; --end) *end = end[-1];
        *end = one;
        if (scratch.counts[lane] == k) kth[lane] = score_of(best[k - 1]);
      }
      highest = none;
    }
  }

  // A score that the K-th best slot reaches; minus infinity if there are fewer.
  float kth_of(int64_t lane, const Scratch& scratch) const {
    float lowest = std::numeric_limits<float>::infinity();
    const ExactScore<float> exact = exact_of(lane, scratch);
    for (int64_t i = 0; i < k; ++i) {
      if (i == scratch.counts[lane]) return -std::numeric_limits<float>::infinity();
      const float score = exact(0, slot_of(scratch.best[lane * k + i]));
      if (!(score >= lowest)) lowest = score;
    }
    return lowest;
  }

  // The keys whose score may reach `lowest`.
  void find_likely(
      const float* column, Vec<float> lowest, Vec<float> length, int64_t count, Scratch& scratch) const {
    const Vec<float> tiny = broadcast(static_cast<float>(8.0 * static_cast<double>(s.width) * kSmallest));
    Vec<float> below;
    for (int lane = 0; lane < L; ++lane) below[lane] = Shortlist::below(lowest[lane]);
    std::fill_n(scratch.counts, L, 0);
    for (int64_t key = 0; key < s.slots; ++key) {
      const Vec<float> score = score_of_key(column, key), size = score < 0 ? -score : score;
      const Vec<float> most = score + (length * broadcast(keys.slack[key]) + size * broadcast(0x1p-21f)) + tiny;
      for (uint32_t bits = lanes_not_at_most(most, below); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        if (lane >= count) break;
        if (scratch.counts[lane] < kMost) scratch.likely[lane * kMost + scratch.counts[lane]] = ranked(0, key);
        scratch.counts[lane] += scratch.counts[lane] <= kMost;
      }
    }
  }

  // Writes the K best slots to `found`, best first, each with its best key. Returns their number.
  int64_t pick(int64_t lane, Scratch& scratch) const {
    const ExactScore<float> exact = exact_of(lane, scratch);
    Ranked *likely = scratch.likely.data() + lane * kMost, *end = likely + scratch.counts[lane];
    for (Ranked* one = likely; one < end; ++one) *one = ranked(exact(0, slot_of(*one)), slot_of(*one));
    std::sort(likely, end, Better{});
    int64_t count = 0;
    for (const Ranked* one = likely; one < end && count < k; ++one) {
      const auto same = [&](Ranked other) { return s.same_slot(slot_of(*one), slot_of(other)); };
      if (std::any_of(scratch.found.data(), scratch.found.data() + count, same)) continue;
      scratch.found[count++] = *one;
    }
    return count;
  }

  Vec<float> score_of_key(const float* column, int64_t key) const {
    const Vec<float> product = load<float>(column + key * kColumns);
    return s.bias ? product + broadcast(s.bias[key]) : product;
  }
  ExactScore<float> exact_of(int64_t lane, const Scratch& scratch) const {
    return {s, scratch.rows.data() + lane * s.width, nullptr, nullptr};
  }

  const Search s;
  const Threads& threads;
  const RoundedKeys keys;
  const int64_t steps, chunks, k;
  int64_t at_once;       // panels
  Buffer<float> panels;  // [at_once] as split_panel makes them
  Buffer<float> scores;  // [at_once][P, in whole chunks][kColumns]
};

}  // namespace slm_fast::SLM_ISA
#endif

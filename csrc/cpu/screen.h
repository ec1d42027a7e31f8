// The K best slots by inner product with float32 keys that were rounded to bfloat16 beforehand, in AMX tiles (amx.h) or,
// on processors without, in the same order by the instructions that multiply pairs of bfloat16 numbers.
//
// A first pass multiplies the rounded keys, half as many bytes, by rounded queries. It bounds each score from above, by
// the query's length times what the key has lost and the key's length times what the query has lost. The float64 scores
// of its best slots bound the K-th best score from below. Keys that may reach that are scored in float64 and ranked by
// it. So a route is the same, bit for bit, as by the other searches (searcher.h).
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

// Views into one memory block that holds P rounded keys, in the order in which they are read: chunks of keys that stay
// in L2, each cut into pieces of features.
struct RoundedKeys {
  static constexpr int64_t kPart = amx::kRows * amx::kStep;  // numbers in a tile
  static constexpr int64_t kChunk = 8;                       // tiles
  static constexpr int64_t kPiece = 8;                       // steps

  float* slack;     // [P] how far rounding the key may move a score, for queries of length 1
  float* length;    // [P]
  uint16_t* tiles;  // [P / 16 / kChunk][D / 32 / kPiece][kChunk][kPiece][16][32], zero-padded
  int64_t all;      // tiles of keys

  static int64_t steps(int64_t width) { return (width + amx::kStep - 1) / amx::kStep; }
  static int64_t bytes(int64_t keys, int64_t width) {
    return 2 * each(keys) + tiles_of(keys) * steps(width) * kPart * static_cast<int64_t>(sizeof(uint16_t));
  }
  static RoundedKeys at(void* memory, int64_t keys) {
    auto* bytes = static_cast<char*>(memory);
    return {reinterpret_cast<float*>(bytes), reinterpret_cast<float*>(bytes + each(keys)),
            reinterpret_cast<uint16_t*>(bytes + 2 * each(keys)), tiles_of(keys)};
  }

  int64_t tiles_in(int64_t chunk) const { return std::min(kChunk, all - chunk * kChunk); }
  // A chunk's tiles from this step on, the first of a piece.
  uint16_t* piece(int64_t chunk, int64_t step, int64_t width) const {
    return tiles + (chunk * kChunk * steps(width) + tiles_in(chunk) * step) * kPart;
  }

  // Rounds a tile of keys: `count` rows of `width` numbers.
  void round(int64_t tile, const float* rows, int64_t count, int64_t width) const {
    constexpr int L = kLanes<float>;
    const int64_t chunk = tile / kChunk, all_steps = steps(width);
    for (int64_t key = 0; key < amx::kRows; ++key) {
      const float* row = rows + key * width;
      Vec<float> lost[4] = {};
      for (int64_t step = 0; step < all_steps; ++step) {
        const int64_t first = step / kPiece * kPiece, wide = std::min(kPiece, all_steps - first);
        auto* to = reinterpret_cast<BFloat16*>(
            piece(chunk, first, width) + (tile % kChunk * wide + step - first) * kPart + key * amx::kStep);
        for (int64_t i = 0; i < amx::kStep; i += L) {
          const int64_t left = key < count ? width - step * amx::kStep - i : 0;
          const Vec<float> value = left > 0 ? load_first<float>(row + step * amx::kStep + i, left) : Vec<float>{};
          store(to + i, value);
          const Vec<float> rest = value - load<float>(to + i);
          lost[i / L] = rest * rest + lost[i / L];
        }
      }
      float parts[4];
      sum_each_of_4<float>(lost, parts);
      if (key < count) measure(tile * amx::kRows + key, row, width, parts[0] + parts[1]);
    }
  }

 private:
  static int64_t each(int64_t keys) { return (keys * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64; }

  // What the key has lost, and what float32 rounds in summing up. Tiles flush denormal numbers to zero. 1.01: rounded
  // vectors may be longer, by 2^-8.
  void measure(int64_t key, const float* row, int64_t width, float lost) const {
    float found;
    group_lengths(row, 1, width, &found);
    const double summing = static_cast<double>(width + 8) * 0x1p-23 * found;
    length[key] = 1.01f * (found + underflow(width));
    slack[key] = static_cast<float>(1.01 * (std::sqrt(lost) + summing + underflow(width)));
  }
};

// Eight keys of a tile against N tiles of queries, as amx::screen does a whole tile.
template <int N>
void screen_8(const amx::Screened& of, const char* keys, const char* queries, float* sums, int64_t ahead) {
  constexpr int64_t kTile = RoundedKeys::kPart * sizeof(uint16_t), kRow = kTile / amx::kRows;
  Vec<float> sum[8][N];
#pragma GCC unroll 8
  for (int key = 0; key < 8; ++key)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      sum[key][n] = of.more ? load<float>(sums + n * of.sum_numbers + key * amx::kRows) : Vec<float>{};
  for (int64_t step = 0; step < of.steps; ++step, keys += kTile, queries += kTile) {
    for (int64_t key = ahead ? 0 : 8; key < 8; ++key) __builtin_prefetch(keys + ahead + key * kRow, 0, 2);
    for (int64_t pair = 0; pair < amx::kRows; ++pair) {
      Bf16Pairs::Operand column[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) column[n] = Bf16Pairs::load_operand(queries + n * of.query_bytes + pair * kRow);
#pragma GCC unroll 8
      for (int key = 0; key < 8; ++key) {
        const auto* row = reinterpret_cast<const Bf16Pairs::Coefficient*>(keys + key * kRow);
        const Bf16Pairs::Operand both = Bf16Pairs::spread(row[pair]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[key][n] = Bf16Pairs::multiply_add(both, column[n], sum[key][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int key = 0; key < 8; ++key)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(sums + n * of.sum_numbers + key * amx::kRows, sum[key][n]);
}

inline void screen(const amx::Screened& of) {
  if (amx::chosen()) return amx::screen(of);
  constexpr int64_t kTile = RoundedKeys::kPart * sizeof(uint16_t);
  for (int64_t query = 0, queries; query < of.query_tiles; query += queries) {
    queries = std::min<int64_t>(of.query_tiles - query, of.query_tiles - query == 4 ? 2 : 3);  // not three and one
    const auto run = queries > 2 ? screen_8<3> : queries > 1 ? screen_8<2> : screen_8<1>;
    for (int64_t key = 0; key < of.key_tiles * amx::kRows; key += 8)
      run(of, of.keys + key / amx::kRows * of.steps * kTile + key % amx::kRows * (kTile / amx::kRows),
          of.queries + query * of.query_bytes, of.sums + query * of.sum_numbers + key * amx::kRows,
          query == 0 ? of.ahead_bytes : 0);
  }
}

class Screen {
  static constexpr int L = kLanes<float>;  // queries per tile
  static_assert(L == amx::kRows);
  static constexpr int64_t kMost = 1024;                          // keys per query to score in float64
  static constexpr int64_t kScores = (64 << 20) / sizeof(float);  // scores held at once,
  static constexpr int64_t kLeast = 4;                            // but those of so many tiles of queries
  static constexpr int64_t kMostSlots = 64;                       // K

 public:
  // Whether this is how to search. Without AMX, few products take less time than what is done beside them.
  static bool pays(const Search& s) {
    return s.k <= kMostSlots && (amx::chosen() || (s.slots >= 128 && s.queries * s.slots >= 1024));
  }

  Screen(const Search& s, const Threads& threads)
      : s(s), threads(threads), keys(RoundedKeys::at(const_cast<void*>(s.prepared), s.slots)),
        steps(RoundedKeys::steps(s.width)), chunks((keys.all + RoundedKeys::kChunk - 1) / RoundedKeys::kChunk),
        k(std::min(s.k, s.slots)) {
    at_once = std::min(tiles_of(s.queries), std::max(kLeast, kScores / (keys.all * amx::kRows * L + 1)));
  }

  // As Searcher::run, where every slot is allowed: keys that no query may retrieve are skipped there, not here.
  template <class Undecided>
  void run(const Allowed&, const Use& use, const Undecided& undecided) {
    const bool parallel = 2.0 * static_cast<double>(s.queries) * s.slots * s.width > 3e5;
    queries.at_least(at_once * steps * RoundedKeys::kPart);
    lost.at_least(at_once * L);
    scores.at_least(at_once * keys.all * amx::kRows * L);
    for (int64_t first = 0; first < s.queries; first += at_once * L) {
      const int64_t left = s.queries - first, tiles = std::min(at_once, tiles_of(left));
      auto in_tile = [&](int64_t tile) { return std::min<int64_t>(L, left - tile * L); };
      threads.for_each(tiles, parallel, [&] {
        return [&](int64_t tile) {
          uint16_t* to = queries.data() + tile * steps * RoundedKeys::kPart;
          round_queries(query_row(first + tile * L), s.width, in_tile(tile), steps, to, lost.data() + tile * L);
        };
      });
      threads.for_each(chunks, parallel, [&] { return [&](int64_t chunk) { score(chunk, tiles); }; });
      threads.for_each(tiles, parallel, [&] {
        return [&, scratch = Scratch(s.width, k)](int64_t tile) mutable {
          rank(first, tile, in_tile(tile), scratch, use, undecided);
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
  float* scores_of(int64_t tile) { return scores.data() + tile * keys.all * amx::kRows * L; }

  // Products of a chunk of keys with tiles of queries, without the biases. A piece of the keys stays in L2 while all
  // queries pass, and the next one is fetched.
  void score(int64_t chunk, int64_t query_tiles) {
    constexpr int64_t kTile = RoundedKeys::kPart * sizeof(uint16_t);
    const int64_t count = keys.tiles_in(chunk);
    const amx::Tiles tiles(amx::chosen());
    for (int64_t step = 0; step < steps; step += RoundedKeys::kPiece) {
      const int64_t wide = std::min(RoundedKeys::kPiece, steps - step);
      const bool last = chunk + 1 == chunks && step + wide == steps;
      screen({reinterpret_cast<const char*>(keys.piece(chunk, step, s.width)), count, wide,
              reinterpret_cast<const char*>(queries.data()) + step * kTile, steps * kTile, query_tiles,
              scores_of(0) + chunk * RoundedKeys::kChunk * amx::kRows * L, keys.all * amx::kRows * L, step > 0,
              last ? 0 : count * wide * kTile});
    }
  }

  // Ranks the `count` queries of a tile, of the queries from `first` on.
  template <class Undecided>
  void rank(int64_t first, int64_t tile, int64_t count, Scratch& scratch, const Use& use, const Undecided& undecided) {
    const float* column = scores_of(tile);
    const int64_t at = tile * L;
    float lowest[L], length[L], short_of[L];
    find_best(column, count, scratch);
    for (int64_t lane = 0; lane < count; ++lane) {
      const float* row = query_row(first + at + lane);
      widen_all(row, scratch.rows.data() + lane * s.width, s.width);
      group_lengths(row, 1, s.width, &length[lane]);
      length[lane] = (length[lane] + underflow(s.width)) * (1 + 0x1p-20f) + 0x1p-100f;
      short_of[lane] = lost[at + lane];
      lowest[lane] = kth_of(lane, scratch);
    }
    std::fill(lowest + count, lowest + L, std::numeric_limits<float>::infinity());
    std::fill(length + count, length + L, 0.0f);
    std::fill(short_of + count, short_of + L, 0.0f);
    find_likely(column, load<float>(lowest), load<float>(length), load<float>(short_of), count, scratch);
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

  // The keys whose score may reach `lowest`, for queries of this length that rounding moved by `short_of`.
  void find_likely(
      const float* column, Vec<float> lowest, Vec<float> length, Vec<float> short_of, int64_t count,
      Scratch& scratch) const {
    const Vec<float> tiny = broadcast(static_cast<float>(8.0 * static_cast<double>(s.width) * kSmallest));
    Vec<float> below;
    for (int lane = 0; lane < L; ++lane) below[lane] = Shortlist::below(lowest[lane]);
    std::fill_n(scratch.counts, L, 0);
    for (int64_t key = 0; key < s.slots; ++key) {
      const Vec<float> score = score_of_key(column, key), size = score < 0 ? -score : score;
      const Vec<float> slack = length * broadcast(keys.slack[key]) + short_of * broadcast(keys.length[key]);
      const Vec<float> most = score + (slack + size * broadcast(0x1p-21f)) + tiny;
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
    const Vec<float> product = load<float>(column + key * L);
    return s.bias ? product + broadcast(s.bias[key]) : product;
  }
  ExactScore<float> exact_of(int64_t lane, const Scratch& scratch) const {
    return {s, scratch.rows.data() + lane * s.width, nullptr, nullptr};
  }

  const Search s;
  const Threads& threads;
  const RoundedKeys keys;
  const int64_t steps, chunks, k;
  int64_t at_once;           // tiles of queries
  Buffer<uint16_t> queries;  // [at_once][steps] tiles, rounded
  Buffer<float> lost;        // [at_once][L] by each query
  Buffer<float> scores;      // [at_once][P, in whole tiles][L]
};

}  // namespace slm_fast::SLM_ISA
#endif

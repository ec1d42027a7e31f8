// How the CUDA kernels cut their work. Plain C++ without CUDA, so that a machine without nvcc checks it too.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__)
#define SLM_BOTH __host__ __device__
#else
#define SLM_BOTH
#endif

namespace slm_fast::cuda {

SLM_BOTH constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Decode: the blocks of one row share its features out in pieces of 8, as evenly as whole pieces go.
constexpr int kPiece = 8, kDecodeThreads = 256, kMostBlocks = 8, kMostRank = 256;  // 8: a cluster on any sm_90 card

struct Span {
  int64_t begin, end;
};

SLM_BOTH constexpr Span share_of(int64_t features, int blocks, int block) {
  const int64_t pieces = features / kPiece;
  return {pieces * block / blocks * kPiece, pieces * (block + 1) / blocks * kPiece};
}

// Blocks a row: as many as the card has room for twice over, each with at least 256 features to read.
constexpr int decode_blocks(int64_t rows, int64_t features_in, int64_t features_out, int multiprocessors) {
  int blocks = 1;
  while (blocks < kMostBlocks && rows * blocks < 2 * multiprocessors &&
         std::min(features_in, features_out) >= 2 * blocks * 256)
    blocks *= 2;
  return blocks;
}

// Many rows a route: a tile is so many of a sample's tokens, and tiles of features are shared out among the blocks.
constexpr int kTileFeatures = 64, kMostColumns = 64, kTokenBlocks = 2;

// Columns of rank that a kernel is compiled for.
SLM_BOTH constexpr int token_columns(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

// Tiles that are there or on their way: as many as leave room for two blocks on sm_90, and for one on any card.
SLM_BOTH constexpr int token_stages(int64_t tokens, int64_t columns) {
  return columns == 64 ? 4 : tokens == 64 ? 6 : 8;
}

SLM_BOTH constexpr Span share_of_tiles(int64_t features, int blocks, int block) {
  const int64_t tiles = blocks_of(features, kTileFeatures);
  return {tiles * block / blocks * kTileFeatures, tiles * (block + 1) / blocks * kTileFeatures};
}

// Numbers that the blocks of a tile leave each other: 128 rows of sums (of the tokens, from each of the warps that share
// them), 8 columns of padding a row.
SLM_BOTH constexpr int64_t token_sums(int64_t rank) { return 128 * (token_columns(rank) + 8); }

// Bytes: the tiles, the sums, the sums added up and their scales, and which rows of A and B are meant.
SLM_BOTH constexpr int64_t tokens_shared(int64_t tokens, int64_t columns) {
  return token_stages(tokens, columns) * (tokens + columns) * kTileFeatures * 2 + token_sums(columns) * 4 +
         tokens * (2 * columns + 16 + 4) + columns * 12;
}

struct TokenCut {
  int tile, blocks;  // tokens, and the blocks that share them
};

// Small tiles, and two blocks to each, as long as that is about one wave of two blocks a multiprocessor; then larger
// tiles, for which A and B are read less often. Measured: benchmarks/results/multi_lora_tokens_sweep.csv.
constexpr TokenCut cut_tokens(
    int64_t samples, int64_t tokens, int64_t rank, int64_t features_in, int64_t features_out, int multiprocessors,
    int64_t most_shared) {
  const auto in_a_wave = [&](int64_t blocks) { return 2 * blocks <= 5 * multiprocessors; };
  const bool small = tokens <= 32 || in_a_wave(2 * samples * blocks_of(tokens, 32)) ||
                     tokens_shared(64, token_columns(rank)) > most_shared;
  const int tile = small ? 32 : 64;
  const bool wide = std::min(features_in, features_out) >= 4 * kTileFeatures;
  return {tile, wide && in_a_wave(2 * samples * blocks_of(tokens, tile)) ? kTokenBlocks : 1};
}

// Retrieve: warps score keys, 16 at a time, against a tile of 8, 16 or 32 queries, 16 numbers of a group at a time;
// then a block a query picks the best. Blocks of 6 warps for few keys: two of them have 168 registers a thread.
constexpr int kRetrieveWarps = 8, kRetrieveThreads = 32 * kRetrieveWarps, kMostPicks = 32;
constexpr int64_t kMostSlots = 0xffffffff;  // ids of 32 bits, the last of which is no slot's
constexpr int kFewWarps = 6, kFewThreads = 32 * kFewWarps;
constexpr int kKeyRows = 16, kChunk = 16, kManyKeys = kRetrieveWarps * kKeyRows;
constexpr int kScoreRow = kManyKeys + 4;  // 4 more, so that rows meet other banks
constexpr int kStrip = 4 * 32;            // candidates that a warp looks at together
constexpr int kMostPickWarps = 32;
constexpr int64_t kMostScores = int64_t{1} << 26;  // kept between the two launches: 256 MiB

struct RetrieveCut {
  bool few;        // a block for 16 keys, whose warps share their numbers out; else blocks that go through many keys
  int tile;        // queries a block
  int64_t parts;   // of the pool, a block each
  int64_t span;    // keys a part
  int64_t slab;    // queries a pair of launches
  int64_t shared;  // bytes
  int pick_warps;  // that pick a query's best
};

SLM_BOTH constexpr int64_t chunks_of(int64_t group_width) { return blocks_of(group_width, kChunk); }

// float64 numbers of a query's row in shared memory; two more than there are, so that rows meet other banks.
SLM_BOTH constexpr int64_t query_row(int64_t groups, int64_t group_width) {
  return groups * chunks_of(group_width) * kChunk + 2;
}

// Bytes: the queries, and the scores of two tiles of keys.
SLM_BOTH constexpr int64_t many_shared(int64_t tile, int64_t groups, int64_t group_width) {
  return tile * (query_row(groups, group_width) * 8 + 2 * kScoreRow * 4);
}

// Few keys: all multiprocessors get a block before a tile of queries grows. Many, from 4 such blocks a multiprocessor
// on: about a wave of blocks, which hold the queries and read the keys once. Where a tile of queries is too wide to be
// held the keys go the way of few, as many queries at a time as their scores have room: a smaller tile would have them
// read from memory more often. `whole`: rows can be read four numbers at a time.
constexpr RetrieveCut cut_retrieve(
    int64_t queries, int64_t slots, int64_t width, int64_t groups, int64_t k, bool whole, int multiprocessors,
    int64_t most_shared) {
  const auto pick_warps = [](int64_t candidates) {
    return static_cast<int>(std::clamp<int64_t>(blocks_of(candidates, kStrip), 1, kMostPickWarps));
  };
  int tile = whole ? 32 : 8;
  while (tile > 8 && tile / 2 >= queries) tile /= 2;
  const int64_t bytes = many_shared(tile, groups, width / groups), sixteens = blocks_of(slots, kKeyRows);
  if (bytes > most_shared || sixteens * blocks_of(queries, tile) <= 4 * multiprocessors) {
    while (tile > 8 && 4 * sixteens * blocks_of(queries, tile) < 3 * multiprocessors) tile /= 2;
    const int64_t most = std::clamp<int64_t>(kMostScores / std::max<int64_t>(slots, 1) / tile, 1, 65535);
    return {true, tile, sixteens, kKeyRows, std::min(most, blocks_of(queries, tile)) * tile, 0, pick_warps(slots)};
  }
  const int64_t tiles = blocks_of(queries, tile), key_tiles = blocks_of(slots, kManyKeys);
  const int64_t wanted =
      4 * tiles <= multiprocessors ? multiprocessors / tiles : blocks_of(4 * multiprocessors, tiles);
  const int64_t span = blocks_of(key_tiles, std::min(wanted, key_tiles)) * kManyKeys, parts = blocks_of(slots, span);
  return {false, tile, parts, span, queries, bytes, pick_warps(parts * k)};
}

// 64-bit words between the two launches: scores in float32, or each part's best.
constexpr int64_t scratch_longs(const RetrieveCut& cut, int64_t queries, int64_t slots, int64_t k) {
  return cut.few ? blocks_of(std::min(cut.slab, queries) * slots, 2) : queries * cut.parts * k;
}

}  // namespace slm_fast::cuda

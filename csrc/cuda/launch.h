// How the CUDA kernels partition their work. Plain C++ without CUDA, so that it is tested without nvcc too.
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

// Decode: the blocks of a row split its features in pieces of 8, as evenly as whole pieces allow.
constexpr int kPiece = 8, kDecodeThreads = 256, kMostBlocks = 8, kMostRank = 256;  // 8: portable cluster size

struct Span {
  int64_t begin, end;
};

SLM_BOTH constexpr Span share_of(int64_t features, int blocks, int block) {
  const int64_t pieces = features / kPiece;
  return {pieces * block / blocks * kPiece, pieces * (block + 1) / blocks * kPiece};
}

// Blocks per row: doubled up to two blocks per multiprocessor, each with at least 256 features to read.
constexpr int decode_blocks(int64_t rows, int64_t features_in, int64_t features_out, int multiprocessors) {
  int blocks = 1;
  while (blocks < kMostBlocks && rows * blocks < 2 * multiprocessors &&
         std::min(features_in, features_out) >= 2 * blocks * 256)
    blocks *= 2;
  return blocks;
}

// Many rows per route: a tile is a run of a sample's tokens, and its thread blocks split the feature tiles.
constexpr int kTileFeatures = 64, kMostColumns = 64, kTokenBlocks = 2;

// Rank columns that a kernel is compiled for.
SLM_BOTH constexpr int token_columns(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

// Pipeline stages, loaded or in flight: as many as leave room for two blocks on sm_90, and for one on any GPU.
SLM_BOTH constexpr int token_stages(int64_t tokens, int64_t columns) {
  return columns == 64 ? 4 : tokens == 64 ? 6 : 8;
}

SLM_BOTH constexpr Span share_of_tiles(int64_t features, int blocks, int block) {
  const int64_t tiles = blocks_of(features, kTileFeatures);
  return {tiles * block / blocks * kTileFeatures, tiles * (block + 1) / blocks * kTileFeatures};
}

// Numbers that a block leaves for the others of its tile: 128 rows of sums (tokens times the warps that share them),
// each padded by 8 columns.
SLM_BOTH constexpr int64_t token_sums(int64_t rank) { return 128 * (token_columns(rank) + 8); }

// Bytes: the stages, the partial sums, the reduced sums with their scales, and the rows of A and B with their weights.
SLM_BOTH constexpr int64_t tokens_shared(int64_t tokens, int64_t columns) {
  return token_stages(tokens, columns) * (tokens + columns) * kTileFeatures * 2 + token_sums(columns) * 4 +
         tokens * (2 * columns + 16 + 4) + columns * 12;
}

struct TokenCut {
  int tile, blocks;  // tokens per tile, and blocks that share it
};

// Small tiles with two blocks each, up to about one wave at two blocks per multiprocessor; beyond that larger tiles,
// which read A and B less often. Measured: benchmarks/results/multi_lora_tokens_sweep.csv.
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

// The linear layer with its increments: a cluster of two blocks has two tiles of tokens and the same output features.
constexpr int kFusedTokens = 128, kMostFusedShared = 227 << 10, kMostFusedColumns = 96, kMostFusedPicks = 32;
constexpr int64_t kMostFusedRows = int64_t{1} << 30;  // and features, and slots: places in boxes are 32-bit

// The most samples that a tile's tokens can be of.
SLM_BOTH constexpr int64_t fused_spans(int64_t tokens) {
  if (tokens % kFusedTokens == 0) return 1;
  return kFusedTokens % tokens == 0 ? kFusedTokens / tokens : (kFusedTokens - 2) / tokens + 2;
}

// Rank columns that a kernel is compiled for.
SLM_BOTH constexpr int fused_columns(int64_t rank) {
  return rank <= 64 ? static_cast<int>(blocks_of(rank, 16)) * 16 : kMostFusedColumns;
}

// Bytes: B's rows, their weights, samples and marks, barriers, and what alignment may take; then the stages, lines of 128 bytes
// of x, the weight and A.
SLM_BOTH constexpr int64_t fused_fixed(int64_t width, int64_t columns) {
  return width * columns * 2 + columns * 12 + 256 + 1024;
}
SLM_BOTH constexpr int64_t fused_stage(int64_t width, int64_t columns) { return (kFusedTokens + width + columns) * 128; }
SLM_BOTH constexpr int fused_stages(int64_t width, int64_t columns) {
  const int64_t room = (kMostFusedShared - fused_fixed(width, columns)) / fused_stage(width, columns);
  return static_cast<int>(room < 6 ? room : 6);
}
SLM_BOTH constexpr int64_t fused_shared(int64_t width, int64_t columns) {
  return fused_fixed(width, columns) + fused_stages(width, columns) * fused_stage(width, columns);
}

struct FusedCut {
  int width;       // output features per tile
  int64_t across;  // tiles of the same tokens
  int64_t tiles;   // a cluster has two at a time, counted as one here
  int64_t run;     // that a cluster takes one after the other
};

// The width whose tiles take least time. A tile's arithmetic is in proportion to its width; the first of the same tokens
// also has the rank columns; and filling the ring and storing take about as long as `kFixed` columns of a chunk.
constexpr FusedCut cut_fused(
    int64_t rows, int64_t rank, int64_t features_in, int64_t features_out, int multiprocessors) {
  constexpr int64_t kFixed = 1200;
  const int64_t pairs = blocks_of(rows, 2 * kFusedTokens);
  const int64_t chunks = blocks_of(features_in, kTileFeatures), clusters = std::max(1, multiprocessors / 2);
  FusedCut best{};
  int64_t least = 0;
  for (const int width : {256, 192}) {
    const int64_t across = blocks_of(features_out, width), tiles = pairs * across, run = blocks_of(tiles, clusters);
    const int64_t fresh = across % run == 0 ? 1 : 1 + blocks_of(run - 1, across);  // at most, of a run
    const int64_t time = run * (width * chunks + kFixed) + fresh * fused_columns(rank) * chunks;
    if (best.width == 0 || time < least) least = time, best = {width, across, tiles, run};
  }
  return best;
}

// Retrieve: a warp scores 16 keys at a time against 8, 16 or 32 queries, 16 elements of a group at a time; then a block
// per query picks the best. For few keys, 6 warps per block: two such blocks leave 168 registers per thread.
constexpr int kRetrieveWarps = 8, kRetrieveThreads = 32 * kRetrieveWarps, kMostPicks = 32;
constexpr int64_t kMostSlots = 0xffffffff;  // 32-bit ids, the last of which is no slot's
constexpr int kFewWarps = 6, kFewThreads = 32 * kFewWarps;
constexpr int kKeyRows = 16, kChunk = 16, kManyKeys = kRetrieveWarps * kKeyRows;
constexpr int kScoreRow = kManyKeys + 4;  // padded by 4 to avoid bank conflicts
constexpr int kStrip = 4 * 32;            // candidates that a warp examines at once
constexpr int kMostPickWarps = 32;
constexpr int64_t kMostScores = int64_t{1} << 26;  // held between the two launches: 256 MiB

struct RetrieveCut {
  bool few;        // a block per 16 keys, split-K across its warps; else blocks that loop over many keys
  int tile;        // queries per block
  int64_t parts;   // of the pool, one block each
  int64_t span;    // keys per part
  int64_t slab;    // queries per pair of launches
  int64_t shared;  // bytes of shared memory
  int pick_warps;  // per query, to pick its best
};

SLM_BOTH constexpr int64_t chunks_of(int64_t group_width) { return blocks_of(group_width, kChunk); }

// float64 elements of a query's row in shared memory, padded by two to avoid bank conflicts.
SLM_BOTH constexpr int64_t query_row(int64_t groups, int64_t group_width) {
  return groups * chunks_of(group_width) * kChunk + 2;
}

// Bytes: the queries, and the scores of two key tiles.
SLM_BOTH constexpr int64_t many_shared(int64_t tile, int64_t groups, int64_t group_width) {
  return tile * (query_row(groups, group_width) * 8 + 2 * kScoreRow * 4);
}

// Few keys: every multiprocessor gets a block before query tiles grow. Many, above 4 such blocks per multiprocessor:
// about one wave of blocks, which hold the queries and read the keys once. If a query tile is too wide for shared
// memory, keys are handled as few, for as many queries at a time as their scores have room: a smaller tile would read
// the keys from memory more often. `whole`: rows can be read four elements at a time.
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

// 64-bit words between the two launches: float32 scores, or each part's best.
constexpr int64_t scratch_longs(const RetrieveCut& cut, int64_t queries, int64_t slots, int64_t k) {
  return cut.few ? blocks_of(std::min(cut.slab, queries) * slots, 2) : queries * cut.parts * k;
}

}  // namespace slm_fast::cuda

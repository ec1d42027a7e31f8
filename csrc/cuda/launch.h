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

// Retrieve: a block of 8 warps holds kQueries queries, and 4 keys a warp pass by at a time.
constexpr int kQueries = 4, kRetrieveThreads = 256, kKeysAtOnce = kRetrieveThreads / 8, kMostPicks = 32;
constexpr int64_t kMostShared = 99 << 10;  // bytes a block may have on any card since sm_80

struct RetrieveCut {
  int tiles, splits;  // blocks of queries, parts of the pool
  int64_t span;       // slots a part
  int64_t shared;     // bytes
};

// A group's numbers as they lie in shared memory: whole rounds of 8 lanes, `vector` numbers each, zeros at the end.
SLM_BOTH constexpr int64_t padded_group(int64_t width, int64_t vector) {
  return (width + 8 * vector - 1) / (8 * vector) * (8 * vector);
}

constexpr RetrieveCut cut_retrieve(
    int64_t queries, int64_t slots, int64_t width, int64_t groups, int64_t vector, int multiprocessors) {
  const int64_t tiles = blocks_of(queries, kQueries);
  const int64_t most = std::max<int64_t>(1, blocks_of(slots, kKeysAtOnce));
  const int64_t wanted = std::clamp<int64_t>(blocks_of(2 * multiprocessors, tiles), 1, std::min<int64_t>(most, 65535));
  const int64_t span = std::max<int64_t>(1, blocks_of(blocks_of(slots, wanted), kKeysAtOnce)) * kKeysAtOnce;
  const int64_t numbers = kQueries * groups * (padded_group(width / groups, vector) + 1);  // and a length a group
  const int64_t lists = kRetrieveThreads / 32 * kQueries * kMostPicks;
  return {static_cast<int>(tiles), static_cast<int>(std::max<int64_t>(1, blocks_of(slots, span))), span, 8 * (numbers + lists)};
}

}  // namespace slm_fast::cuda

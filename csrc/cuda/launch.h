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

constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

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

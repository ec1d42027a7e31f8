// Scores of few keys, or of rows too wide for the other kernel: a block has 16 keys and a tile of queries, and its
// warps split the rows' elements (split-K), so that all are read at once. The warps' products and squares are added up
// in shared memory in a fixed order.
#pragma once

#include "kernels.h"
#include "retrieve_rows.cuh"

namespace slm_fast::cuda {

// N: number of 8-query tiles.
template <int N>
struct FewShared {
  static constexpr int kTile = 8 * N, kRow = kTile + 1;  // padded by one, so that a query's products hit all banks
  double products[kFewWarps][kKeyRows * kRow];
  double squares[kFewWarps][kKeyRows + kTile];  // of keys and queries; then their inverse lengths
};

template <class T, int N, bool kWhole>
struct Few {
  static constexpr int kTile = 8 * N, kRow = FewShared<N>::kRow;
  static constexpr int kAhead = N == 1 ? 6 : N == 2 ? 3 : 1;  // chunks, as registers allow
  static constexpr int kPairs = kKeyRows * kTile, kEach = (kPairs + kFewThreads - 1) / kFewThreads;

  const RetrieveOnDevice& on;
  const Retrieve& op;
  FewShared<N>& shared;
  int64_t slab;          // the first query of this launch
  int d;                 // elements per group
  int at_once, warps;    // groups processed at a time, warps per group
  int warp, lane, quarter;

  __device__ Few(const RetrieveOnDevice& on, FewShared<N>& shared, int64_t slab)
      : on(on), op(on.call), shared(shared), slab(slab), d(static_cast<int>(op.width / op.groups)),
        at_once(static_cast<int>(min(op.groups, int64_t{kFewWarps}))), warps(kFewWarps / at_once),
        warp(threadIdx.x / 32), lane(threadIdx.x % 32), quarter(lane % 4) {}

  // Recomputed on each use to save registers.
  __device__ int64_t first_key() const { return static_cast<int64_t>(blockIdx.x) * kKeyRows; }
  __device__ int64_t first_query() const { return slab + static_cast<int64_t>(blockIdx.y) * kTile; }

  // This warp's share of its group's products and squares.
  __device__ void multiply_share(int group) {
    const int chunks = static_cast<int>(chunks_of(d)), share = warp % warps;
    const int begin = chunks * share / warps, end = chunks * (share + 1) / warps;
    const int row = lane / 4, eight = 8 * static_cast<int>(op.width), column = 4 * quarter;
    const int64_t from = static_cast<int64_t>(group) * d + column;
    const T* keys = static_cast<const T*>(op.keys) + (first_key() + row) * op.width + from;
    const T* queries = static_cast<const T*>(op.query) + (first_query() + row) * op.width + from;
    const int keys_left = static_cast<int>(min(op.slots - first_key(), int64_t{kKeyRows})) - row;
    const int queries_left = static_cast<int>(min(op.queries - first_query(), int64_t{kTile})) - row;
    Four<T, kWhole> key_ahead[kAhead][2], query_ahead[kAhead][N];
    const auto fetch = [&](int r, int chunk) {  // zeros past the last row and past a group's end
      const int at = chunk * kChunk, count = chunk < end ? d - at - column : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) key_ahead[r][h].load(keys + h * eight + at, 8 * h < keys_left ? count : 0);
#pragma unroll
      for (int n = 0; n < N; ++n) query_ahead[r][n].load(queries + n * eight + at, 8 * n < queries_left ? count : 0);
    };
    double product[N][4] = {}, square[2 + N] = {};
#pragma unroll
    for (int r = 0; r < kAhead; ++r) fetch(r, begin + r);
    for (int chunk = begin; chunk < end; chunk += kAhead) {
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        if (chunk + r >= end) break;
        double key[8];
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            key[2 * t + h] = key_ahead[r][h].at(t);
            square[h] += key[2 * t + h] * key[2 * t + h];
          }
#pragma unroll
        for (int n = 0; n < N; ++n) {
          double query[4];
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            query[t] = query_ahead[r][n].at(t);
            square[2 + n] += query[t] * query[t];
          }
          multiply(product[n], key, query);
        }
        fetch(r, chunk + r + kAhead);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m)
        shared.products[warp][(lane / 4 + m / 2 * 8) * kRow + 8 * n + 2 * quarter + m % 2] = product[n][m];
    if (!op.cosine) return;
#pragma unroll
    for (int i = 0; i < 2 + N; ++i) {
      const double sum = sum_of_row(square[i]);
      if (quarter == 0) shared.squares[warp][8 * i + lane / 4] = sum;  // the keys' rows are the first 16
    }
  }

  // The sum of a group's shares.
  template <class Share>
  __device__ double add_up(int group, const Share& share) const {
    double sum = share(group * warps);
    for (int w = 1; w < warps; ++w) sum += share(group * warps + w);
    return sum;
  }

  __device__ void run() {
    float score[kEach] = {};
    for (int done = 0; done < static_cast<int>(op.groups); done += at_once) {
      const int groups = min(static_cast<int>(op.groups) - done, at_once);
      if (warp / warps < groups) multiply_share(done + warp / warps);
      __syncthreads();
      if (op.cosine) {
        for (int i = threadIdx.x; i < groups * (kKeyRows + kTile); i += kFewThreads) {
          const int group = i / (kKeyRows + kTile), vector = i % (kKeyRows + kTile);
          const double square = add_up(group, [&](int w) { return shared.squares[w][vector]; });
          shared.squares[group * warps][vector] = inverse_length(square);
        }
        __syncthreads();
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int pair = threadIdx.x + e * kFewThreads, key = pair % kKeyRows, q = pair / kKeyRows;
        if (pair >= kPairs) break;
        for (int group = 0; group < groups; ++group) {
          const double product = add_up(group, [&](int w) { return shared.products[w][key * kRow + q]; });
          const double* inverse = shared.squares[group * warps];
          if (op.cosine) score[e] += cosine_of(product * inverse[kKeyRows + q], inverse[key]);
          else {
            const bool biased = op.bias && first_key() + key < op.slots;
            score[e] = static_cast<float>(product + (biased ? op.bias[first_key() + key] : 0.f));
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int pair = threadIdx.x + e * kFewThreads;
      const int64_t key = first_key() + pair % kKeyRows, query = first_query() + pair / kKeyRows;
      if (pair < kPairs && key < op.slots && query < min(op.queries, slab + on.cut.slab))
        static_cast<float*>(on.scratch)[(query - slab) * op.slots + key] =
            op.cosine ? score[e] / static_cast<float>(op.groups) : score[e];
    }
  }
};

}  // namespace slm_fast::cuda

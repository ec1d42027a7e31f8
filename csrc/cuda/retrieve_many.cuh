// Scores of many keys: a block holds a tile of queries in shared memory, in float64 and normalised for cosine, and
// loops over its part of the pool 128 keys at a time, 16 per warp. Keys are loaded straight into the registers of the
// lanes that multiply them, four chunks ahead, so that each is read once and memory stays busy: the floor is reading
// them. Scores go to shared memory, where each warp picks the best for some of the queries; they are double-buffered,
// so that a warp may be one tile ahead.
#pragma once

#include "best.cuh"
#include "kernels.h"
#include "retrieve_rows.cuh"

namespace slm_fast::cuda {

// N: number of 8-query tiles.
template <class T, int N, bool kWhole>
struct Many {
  static constexpr int kTile = 8 * N, kAhead = 4;

  const Retrieve& op;
  const RetrieveCut& cut;
  double* queries;  // [kTile][row]
  float* scores;    // [2][kTile][kScoreRow]
  int64_t first;    // this block's first query
  int64_t row;
  int groups, d, chunks;  // groups of d elements, chunks per group
  int warp, lane, quarter;
  int64_t end;  // of this block's part

  // The next chunks to load: kAhead of one group of a tile's keys, or what is left of it.
  struct Next {
    int64_t keys;
    const T* rows[2];  // start of the group in this lane's two keys, plus this lane's offset in a chunk
    int group, chunk, count;
  } next;
  Four<T, kWhole> ahead[kAhead][2];

  __device__ Many(const RetrieveOnDevice& on, double* shared)
      : op(on.call), cut(on.cut), queries(shared), first(static_cast<int64_t>(blockIdx.x) * kTile),
        row(query_row(op.groups, op.width / op.groups)), groups(static_cast<int>(op.groups)),
        d(static_cast<int>(op.width / op.groups)), chunks(static_cast<int>(chunks_of(d))), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32), quarter(lane % 4) {
    scores = reinterpret_cast<float*>(queries + kTile * row);
    const int64_t begin = blockIdx.y * cut.span;
    end = min(op.slots, begin + cut.span);
    aim(begin);
  }

  __device__ void aim(int64_t keys) {
    next.keys = keys, next.group = 0, next.chunk = 0;
    next.count = keys < end ? d - 4 * quarter : 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t key = min(keys + warp * kKeyRows + lane / 4 + 8 * h, op.slots - 1);
      next.rows[h] = static_cast<const T*>(op.keys) + key * op.width + 4 * quarter;
    }
  }

  __device__ void advance() {
    if ((next.chunk += kAhead) < chunks) return;
    next.chunk = 0, next.rows[0] += d, next.rows[1] += d;
    if (++next.group == groups) aim(next.keys + kManyKeys);
  }

  __device__ void fetch(int r) {
    const int at = kChunk * (next.chunk + r);
#pragma unroll
    for (int h = 0; h < 2; ++h) ahead[r][h].load(next.rows[h] + at, next.count - at);
  }

  __device__ void load_queries() {
#pragma unroll 4
    for (int i = threadIdx.x; i < kTile * groups * chunks * 4; i += kRetrieveThreads) {
      const int chunk = i / 4 % (groups * chunks), q = i / 4 / (groups * chunks);
      const int group = chunk / chunks, at = chunk % chunks * kChunk + i % 4 * 4;
      Four<T, kWhole> four;
      four.load(
          static_cast<const T*>(op.query) + (first + q) * op.width + static_cast<int64_t>(group) * d + at,
          first + q < op.queries ? d - at : 0);
      double* to = queries + q * row + chunk * kChunk + i % 4 * 4;
#pragma unroll
      for (int t = 0; t < 4; ++t) to[t] = four.at(t);
    }
    __syncthreads();
    if (!op.cosine) return;
    const int width = chunks * kChunk;
    for (int i = threadIdx.x / 8; i < kTile * groups; i += kRetrieveThreads / 8) {  // 8 lanes per group, whole warps
      double* group = queries + i / groups * row + i % groups * width;
      double square = 0;
      for (int n = threadIdx.x % 8; n < width; n += 8) square += group[n] * group[n];
#pragma unroll
      for (int step = 4; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
      const double inverse = inverse_length(square);
      for (int n = threadIdx.x % 8; n < width; n += 8) group[n] *= inverse;
    }
    __syncthreads();
  }

  // The scores of this warp's 16 keys, in the tensor cores' accumulator layout.
  __device__ void score_tile(int64_t keys, float (&score)[N][4]) {
    const double* group = queries + lane / 4 * row + 4 * quarter;
    for (int g = 0; g < groups; ++g, group += chunks * kChunk) {
      double product[N][4] = {}, square[2] = {};
      for (int chunk = 0; chunk < chunks; chunk += kAhead) {
        advance();
#pragma unroll
        for (int r = 0; r < kAhead; ++r) {
          if (chunk + r < chunks) {
            double key[8];
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                key[2 * t + h] = ahead[r][h].at(t);
                square[h] += key[2 * t + h] * key[2 * t + h];
              }
            fetch(r);
#pragma unroll
            for (int n = 0; n < N; ++n) {
              const double2* from = reinterpret_cast<const double2*>(group + 8 * n * row + (chunk + r) * kChunk);
              const double2 low = from[0], high = from[1];
              const double query[4] = {low.x, low.y, high.x, high.y};
              multiply(product[n], key, query);
            }
          } else {
            fetch(r);
          }
        }
      }
      end_group(keys, product, square, score);
    }
  }

  __device__ void end_group(
      int64_t keys, const double (&product)[N][4], const double (&square)[2], float (&score)[N][4]) const {
    double factor[2];  // the keys' inverse lengths, or their biases
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t key = keys + warp * kKeyRows + lane / 4 + 8 * h;
      if (op.cosine) factor[h] = inverse_length(sum_of_row(square[h]));
      else factor[h] = op.bias && key < end ? op.bias[key] : 0.f;
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m)
        score[n][m] += op.cosine ? cosine_of(product[n][m], factor[m / 2])
                                 : static_cast<float>(product[n][m] + factor[m / 2]);
  }

  // Each warp picks for N queries.
  __device__ void pick(Best (&best)[N], int64_t keys, const float* from) const {
    long long candidates[N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int q = warp * N + n;
      const float4 four = *reinterpret_cast<const float4*>(from + q * kScoreRow + 4 * lane);
      const float score[4] = {four.x, four.y, four.z, four.w};
      const long long least = best[n].last(static_cast<int>(op.k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t key = keys + 4 * lane + i;
        const bool inside = key < end && first + q < op.queries;
        candidates[n][i] = inside ? candidate(op, first + q, key, score[i], least) : kNone;
      }
    }
    take(best, candidates, static_cast<int>(op.k));
  }

  __device__ void run(long long* parts) {
    int64_t keys = next.keys;
#pragma unroll
    for (int r = 0; r < kAhead; ++r) fetch(r);
    load_queries();
    Best best[N];
    for (int turn = 0; keys < end; keys += kManyKeys, turn ^= 1) {
      float score[N][4] = {};
      score_tile(keys, score);
      float* to = scores + turn * kTile * kScoreRow;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          float* at = to + (8 * n + 2 * quarter + m % 2) * kScoreRow + warp * kKeyRows + lane / 4 + m / 2 * 8;
          *at = op.cosine ? score[n][m] / static_cast<float>(op.groups) : score[n][m];
        }
      __syncthreads();
      pick(best, keys, to);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t query = first + warp * N + n;
      if (lane < op.k && query < op.queries) parts[(query * cut.parts + blockIdx.y) * op.k + lane] = best[n].mine;
    }
  }
};

}  // namespace slm_fast::cuda

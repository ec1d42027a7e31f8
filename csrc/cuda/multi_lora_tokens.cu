// multi_lora for many rows per route, in 16-bit types. Specified in slm_fast/ops/multi_lora.py.
//
// One or two thread blocks handle a tile of a sample's tokens. Each multiplies its share of the in-features by its
// share of A (the K slots' rows concatenated, R = K r in all). The sums of all shares are added in a fixed order,
// scaled and rounded, and each block expands them onto its share of the out-features. x and base are read once, y is
// written once, and A and B are read once per token tile: the floor is moving those bytes.
//
// Tiles of 64 features stream through a shared memory ring, first those of x and A, then those of base and B, so that
// loads continue while the sums are added. Their 16-byte pieces are XOR-swizzled: eight rows of a column hit all banks.
// On sm_90 the thread blocks form a cluster: each adds the sums of its share of the tokens and writes them to every
// block's shared memory. Elsewhere the sums go through global memory and a second launch.
#include <cooperative_groups.h>

#include "clusters.cuh"
#include "kernels.h"
#include "launch.h"
#include "tensor_core.cuh"

namespace slm_fast::cuda {
namespace {

constexpr int kLine = kTileFeatures * 2;  // bytes per tile row

// M warps along the tokens, N warps sharing the work of each; R: rank columns, a multiple of 16.
template <class T, int M, int N, int R>
struct Tokens {
  static constexpr int kTokens = 16 * M, kThreads = 32 * M * N, kStages = token_stages(kTokens, R);
  static constexpr int kStage = (kTokens + R) * kLine;
  static constexpr int kStride = R + 8, kSums = N * kTokens * kStride;  // padded by 8 to avoid bank conflicts
  static constexpr int kLeft = 2 * R + 16;                             // likewise
  static_assert(tokens_shared(kTokens, R) == kStages * kStage + kSums * 4 + kTokens * (kLeft + 4) + R * 12);

  const Adapt& op;
  char* stages;   // [kStages][kTokens + R][kLine bytes], each a tile of x and A or of base and B
  float* sums;    // [N][kTokens][kStride] this thread block's share of x . A^T
  char* left;     // [kTokens][kLeft bytes] R sums as T, reduced and scaled
  float* up;      // [kTokens] factors that undo their scaling
  int64_t* rows;  // [R] row of lora_a and lora_b, or -1
  float* scales;  // [R] its weight
  int64_t sample, first;
  int warp_m, warp_n, lane;
  Span in, out;     // this thread block's share
  int tiles_in = 0, tiles = 0, tile = 0;  // how many go through the ring, and the next one

  __device__ Tokens(const Adapt& op, char* shared, int64_t token_tile, int block)
      : op(op), stages(shared), sums(reinterpret_cast<float*>(stages + kStages * kStage)),
        left(reinterpret_cast<char*>(sums + kSums)), up(reinterpret_cast<float*>(left + kTokens * kLeft)),
        rows(reinterpret_cast<int64_t*>(up + kTokens)), scales(reinterpret_cast<float*>(rows + R)),
        in(share_of_tiles(op.features_in, op.blocks, block)), out(share_of_tiles(op.features_out, op.blocks, block)) {
    const int64_t of_sample = blocks_of(op.tokens, kTokens);
    sample = token_tile / of_sample, first = token_tile % of_sample * kTokens;
    const int warp = threadIdx.x / 32;
    warp_m = warp % M, warp_n = warp / M, lane = threadIdx.x % 32;
    for (int j = threadIdx.x; j < R; j += kThreads) {
      int64_t row = -1;
      float scale = 0.f;
      if (j < op.picks * op.rank) {
        const int64_t place = sample * op.picks + j / op.rank, slot = op.slot_ids[place];
        if (slot >= 0 && slot < op.slots) row = slot * op.rank + j % op.rank, scale = op.weights[place];
      }
      rows[j] = row, scales[j] = scale;
    }
    __syncthreads();
  }

  __device__ char* piece(int stage, int line, int at) const {
    return stages + stage * kStage + line * kLine + (at ^ (line & 7)) * 16;
  }

  // Fetches 64 features of `tall` [tokens, features] and of `wide` [rows, features]. If `tall` is null (no base), its
  // part of the stage is left unchanged.
  __device__ void fetch(int stage, const void* tall, const void* wide, int64_t features, int64_t begin) const {
    const int at = threadIdx.x % 8;
    const int64_t feature = begin + at * 8;
    if (tall) {
      const T* from = static_cast<const T*>(tall) + (sample * op.tokens + first) * features + feature;
#pragma unroll
      for (int n = 0; n < kTokens; n += kThreads / 8) {
        const int line = n + threadIdx.x / 8;
        const bool inside = feature < features && first + line < op.tokens;
        copy_or_zero(piece(stage, line, at), inside ? from + line * features : tall, inside);
      }
    }
    const T* from = static_cast<const T*>(wide) + feature;
#pragma unroll
    for (int n = 0; n < R; n += kThreads / 8) {
      const int line = n + threadIdx.x / 8;
      if (R % (kThreads / 8) != 0 && line >= R) break;
      const int64_t row = rows[line];
      const bool inside = feature < features && row >= 0;
      copy_or_zero(piece(stage, kTokens + line, at), inside ? from + row * features : wide, inside);
    }
  }

  __device__ void fetch(int number) const {
    if (number < tiles_in) fetch(number % kStages, op.x, op.lora_a, op.features_in, in.begin + number * kTileFeatures);
    else if (number < tiles)
      fetch(number % kStages, op.base, op.lora_b, op.features_out, out.begin + (number - tiles_in) * kTileFeatures);
    end_of_copies();
  }

  // Sets which tiles go through the ring, and fetches the first ones.
  __device__ void begin(bool shrinks, bool expands) {
    tiles_in = shrinks ? static_cast<int>((in.end - in.begin) / kTileFeatures) : 0;
    tiles = tiles_in + (expands ? static_cast<int>((out.end - out.begin) / kTileFeatures) : 0);
    for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch(ahead);
  }

  // Waits for the next tile and returns its stage.
  __device__ int next() {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    fetch(tile + kStages - 1);
    return tile++ % kStages;
  }

  // sums = this thread block's share of x . A^T, each warp in its own part.
  __device__ void shrink() {
    float sum[R / 8][4] = {};
    while (tile < tiles_in) {
      const int stage = next();
#pragma unroll
      for (int step = 0; step < 4 / N; ++step) {
        const int k = warp_n * (4 / N) + step;  // 16 features
        uint32_t x[4];
        load_matrices(x, piece(stage, 16 * warp_m + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < R / 16; ++j) {
          uint32_t a[4];
          load_matrices(a, piece(stage, kTokens + 16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
          multiply<T>(sum[2 * j], x, a[0], a[1]);
          multiply<T>(sum[2 * j + 1], x, a[2], a[3]);
        }
      }
    }
    float* to = sums + (warp_n * kTokens + 16 * warp_m + lane / 4) * kStride + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < R / 8; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = float2{sum[j][0], sum[j][1]};
      *reinterpret_cast<float2*>(to + 8 * j + 8 * kStride) = float2{sum[j][2], sum[j][3]};
    }
  }

  // Reduces the sums of tokens [begin, end), scales and rounds them, and stores them where keep() says. part(b): where
  // block b's sums are. keep(each): calls each(left, up) for every destination. In float16 a token's sums are scaled by
  // a power of two to at most 1, because they may exceed float16's range.
  template <class Part, class Keep>
  __device__ void add_up(int begin, int end, const Part& part, const Keep& keep) const {
    constexpr int kFours = R / 4;  // threads per token
    for (int at = 0; at < (end - begin) * kFours; at += kThreads) {
      const int place = at + threadIdx.x, token = begin + place / kFours, j = place % kFours * 4;
      const bool mine = token < end;
      float sum[4] = {};
      if (mine) {
#pragma unroll
        for (int other = 0; other < kTokenBlocks; ++other) {  // all loads in flight at once, added in this order
          if (other >= op.blocks) break;
          const float* from = part(other) + token * kStride + j;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            const float4 more = *reinterpret_cast<const float4*>(from + n * kTokens * kStride);
            sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) sum[m] = rows[j + m] < 0 ? 0.f : sum[m] * scales[j + m];
      float scale = 1.f;
      if constexpr (std::is_same_v<T, __half>) {
        float most = fmaxf(fmaxf(fabsf(sum[0]), fabsf(sum[1])), fmaxf(fabsf(sum[2]), fabsf(sum[3])));
#pragma unroll
        for (int step = kFours / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        scale = power_above(most);
      }
      const uint2 both{two<T>(sum[0] / scale, sum[1] / scale), two<T>(sum[2] / scale, sum[3] / scale)};
      if (mine)
        keep([&](char* to, float* scales_to) {
          *reinterpret_cast<uint2*>(to + token * kLeft + 2 * j) = both;
          if (j == 0) scales_to[token] = scale;
        });
    }
  }

  __device__ void expand() {
    uint32_t sum_of[R / 16][4];
#pragma unroll
    for (int j = 0; j < R / 16; ++j)
      load_matrices(sum_of[j], left + (16 * warp_m + lane % 16) * kLeft + (2 * j + lane / 16) * 16);
    const float scale[2] = {up[16 * warp_m + lane / 4], up[16 * warp_m + lane / 4 + 8]};
    while (tile < tiles) {
      const int64_t begin = out.begin + (tile - tiles_in) * kTileFeatures;
      const int stage = next();
#pragma unroll
      for (int step = 0; step < 4 / N; ++step) {
        const int columns = warp_n * (4 / N) + step;  // 16 features
        float sum[2][4] = {};
#pragma unroll
        for (int j = 0; j < R / 16; ++j) {
          uint32_t b[4];
          load_transposed(b, piece(stage, kTokens + 16 * j + lane % 16, 2 * columns + lane / 16));
          multiply<T>(sum[0], sum_of[j], b[0], b[1]);
          multiply<T>(sum[1], sum_of[j], b[2], b[3]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < 2; ++m) {  // rows lane / 4 and lane / 4 + 8
            char* place = piece(stage, 16 * warp_m + lane / 4 + 8 * m, 2 * columns + half) + lane % 4 * 4;
            float low = sum[half][2 * m] * scale[m], high = sum[half][2 * m + 1] * scale[m];
            if (op.base) {
              const uint32_t base = *reinterpret_cast<const uint32_t*>(place);
              low += one_of<T>(base, false), high += one_of<T>(base, true);
            }
            *reinterpret_cast<uint32_t*>(place) = two<T>(low, high);
          }
      }
      __syncthreads();
      const int at = threadIdx.x % 8;
      const int64_t feature = begin + at * 8;
      T* to = static_cast<T*>(op.y) + (sample * op.tokens + first) * op.features_out + feature;
#pragma unroll
      for (int n = 0; n < kTokens; n += kThreads / 8) {
        const int line = n + threadIdx.x / 8;
        if (feature < op.features_out && first + line < op.tokens)
          *reinterpret_cast<uint4*>(to + line * op.features_out) = *reinterpret_cast<const uint4*>(piece(stage, line, at));
      }
    }
  }

  // The smallest power of two above a number; 1 for zero, infinity, NaN and numbers near float32's maximum.
  __device__ static float power_above(float number) {
    const int exponent = (__float_as_int(number) >> 23 & 0xff) + 1;
    return number > 0.f && exponent < 255 ? __int_as_float(exponent << 23) : 1.f;
  }
};

template <class T, int M, int N, int R>
__global__ void __launch_bounds__(32 * M * N, 2) adapt_in_cluster(const Adapt op) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  const cg::cluster_group cluster = cg::this_cluster();
  extern __shared__ double shared[];
  const int block = static_cast<int>(blockIdx.x % op.blocks);
  using Mine = Tokens<T, M, N, R>;
  let_next_begin();
  wait_for_previous();
  Mine mine(op, reinterpret_cast<char*>(shared), blockIdx.x / op.blocks, block);
  mine.begin(true, true);
  mine.shrink();
  cluster.sync();
  const int share = Mine::kTokens / op.blocks;
  mine.add_up(
      share * block, share * (block + 1), [&](int other) { return cluster.map_shared_rank(mine.sums, other); },
      [&](const auto& leave) {
        for (int other = 0; other < op.blocks; ++other)
          leave(cluster.map_shared_rank(mine.left, other), cluster.map_shared_rank(mine.up, other));
      });
  cluster.sync();  // from here on no block accesses another's memory
  mine.expand();
#endif
}

template <class T, int M, int N, int R>
__global__ void __launch_bounds__(32 * M * N, 2) adapt_shrink(const Adapt op) {
  extern __shared__ double shared[];
  using Mine = Tokens<T, M, N, R>;
  Mine mine(op, reinterpret_cast<char*>(shared), blockIdx.x / op.blocks, static_cast<int>(blockIdx.x % op.blocks));
  mine.begin(true, false);
  mine.shrink();
  __syncthreads();
  float* to = op.partial + blockIdx.x * int64_t{Mine::kSums};
  for (int i = threadIdx.x; i < Mine::kSums; i += Mine::kThreads) to[i] = mine.sums[i];
}

template <class T, int M, int N, int R>
__global__ void __launch_bounds__(32 * M * N, 2) adapt_expand(const Adapt op) {
  extern __shared__ double shared[];
  using Mine = Tokens<T, M, N, R>;
  Mine mine(op, reinterpret_cast<char*>(shared), blockIdx.x / op.blocks, static_cast<int>(blockIdx.x % op.blocks));
  mine.begin(false, true);
  const float* parts = op.partial + blockIdx.x / op.blocks * op.blocks * int64_t{Mine::kSums};
  mine.add_up(
      0, Mine::kTokens, [&](int other) { return parts + other * Mine::kSums; },
      [&](const auto& leave) { leave(mine.left, mine.up); });
  __syncthreads();
  mine.expand();
}

template <class T, int M, int N, int R>
cudaError_t launch(const Adapt& op, bool clusters, cudaStream_t stream) {
  using Mine = Tokens<T, M, N, R>;
  const int bytes = static_cast<int>(tokens_shared(Mine::kTokens, R));
  const dim3 grid(op.samples * blocks_of(op.tokens, Mine::kTokens) * op.blocks);
  const auto allow = [&](auto* kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  if (clusters) {
    if (const cudaError_t status = allow(adapt_in_cluster<T, M, N, R>); status != cudaSuccess) return status;
    return launch_clusters(adapt_in_cluster<T, M, N, R>, op, grid, Mine::kThreads, op.blocks, bytes, stream);
  }
  if (const cudaError_t status = allow(adapt_shrink<T, M, N, R>); status != cudaSuccess) return status;
  if (const cudaError_t status = allow(adapt_expand<T, M, N, R>); status != cudaSuccess) return status;
  adapt_shrink<T, M, N, R><<<grid, Mine::kThreads, bytes, stream>>>(op);
  adapt_expand<T, M, N, R><<<grid, Mine::kThreads, bytes, stream>>>(op);
  return cudaGetLastError();
}

template <class T, int R>
cudaError_t launch(const Adapt& op, bool clusters, cudaStream_t stream) {
  switch (op.tile) {
    case 64: return launch<T, 4, 2, R>(op, clusters, stream);
    case 32: return launch<T, 2, 4, R>(op, clusters, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t launch(const Adapt& op, bool clusters, cudaStream_t stream) {
  switch (token_columns(op.picks * op.rank)) {
    case 16: return launch<T, 16>(op, clusters, stream);
    case 32: return launch<T, 32>(op, clusters, stream);
    case 64: return launch<T, 64>(op, clusters, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t adapt(const Adapt& op, bool clusters, cudaStream_t stream) {
  switch (op.type) {
    case Type::bfloat16: return launch<__nv_bfloat16>(op, clusters, stream);
    case Type::float16: return launch<__half>(op, clusters, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace slm_fast::cuda

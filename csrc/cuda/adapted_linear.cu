// A frozen linear layer with its increments, in bfloat16 on sm_90a. Specified in slm_fast/ops/adapted_linear.py.
//
// A tile is 128 tokens by kColumns output features. Two groups of warps, 64 tokens each, multiply x by the frozen weight
// and by the rows of A of the slots of the tile's samples (R rank columns) as x passes; the products of a token by its
// own sample's A are then scaled, rounded and multiplied by B's rows onto the others. So the increments need no pass of
// their own over x and y.
//
// A third group copies: one warp x and the weight, another what belongs to the slots, into a ring of stages. The two
// thread blocks of a cluster have the same output features, and each copies half of the weight's tile to both. Blocks are
// as many as multiprocessors. Each takes a run of tiles, the same tokens first, whose products by A it keeps: copies for
// the next tile begin while the last is stored.
#include "clusters.cuh"
#include "hopper.cuh"
#include "kernels.h"
#include "launch.h"

namespace slm_fast::cuda {
namespace {

constexpr int kFusedThreads = 3 * kGroupThreads;

// In the order in which they lie in shared memory, from a multiple of 1,024 bytes on.
template <int kColumns, int R>
struct FusedShared {
  static constexpr int kStages = fused_stages(kColumns, R), kLines = kFusedTokens + kColumns + R;
  static constexpr int kStage = kLines * kBoxLine, kBlock = R * kBoxLine;  // of B: its rows, 64 features of each

  char* base;
  __device__ char* x(int stage) const { return base + stage * kStage; }
  __device__ char* weight(int stage) const { return x(stage) + kFusedTokens * kBoxLine; }
  __device__ char* a(int stage) const { return weight(stage) + kColumns * kBoxLine; }
  __device__ char* b() const { return base + kStages * kStage; }
  __device__ float* scales() const { return reinterpret_cast<float*>(b() + kColumns / kBoxColumns * kBlock); }  // [R]
  __device__ int* owners() const { return reinterpret_cast<int*>(scales() + R); }  // [R] sample of the column's slot, or -1
  __device__ int* spoiled() const { return owners() + R; }  // [R] the last tile, from 1 on, whose B was not finite in this row
  __device__ Barrier* barriers() const { return reinterpret_cast<Barrier*>(spoiled() + R); }
  __device__ Barrier& full(int stage) const { return barriers()[stage]; }
  __device__ Barrier& empty(int stage) const { return barriers()[kStages + stage]; }
  __device__ Barrier& b_full() const { return barriers()[2 * kStages]; }  // with scales and owners
  __device__ Barrier& b_empty() const { return barriers()[2 * kStages + 1]; }
};

// A place in the ring of stages: each phase of their barriers has the other parity.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <int kColumns, int R>
struct Fused {
  using Memory = FusedShared<kColumns, R>;
  static constexpr int kStages = Memory::kStages, kParts = kColumns / kBoxColumns;
  static constexpr int kWarps = 2 * kGroupThreads / 32;  // that multiply

  const FusedOnDevice& on;
  const AdaptedLinear& op;
  Memory shared;
  int block, chunks, picks, columns, group, thread;  // picks, columns: of all samples of a tile
  int64_t first, end;  // of this cluster's tiles

  __device__ Fused(const FusedOnDevice& on, char* memory)
      : on(on), op(on.call), shared{memory}, block(static_cast<int>(blockIdx.x % 2)),
        chunks(static_cast<int>(blocks_of(op.features_in, kBoxColumns))), picks(on.spans * static_cast<int>(op.picks)),
        columns(picks * static_cast<int>(op.rank)), group(threadIdx.x / kGroupThreads), thread(threadIdx.x % kGroupThreads),
        first(blockIdx.x / 2 * on.cut.run), end(min(first + on.cut.run, on.cut.tiles)) {}

  struct Place {
    int row, feature;  // row: of all samples' tokens
    bool fresh;        // the last tile had other tokens
  };
  __device__ Place place(int64_t tile) const {
    const int64_t row = (tile / on.cut.across * 2 + block) * kFusedTokens;
    return {static_cast<int>(row), static_cast<int>(tile % on.cut.across) * kColumns,
            tile == first || tile % on.cut.across == 0};
  }

  // The slot of a tile's pick, and where its weight is; -1 if there is none.
  struct Pick {
    int64_t slot, at;
  };
  __device__ Pick pick_of(const Place& place, int pick) const {
    const int64_t at = place.row / op.tokens * op.picks + pick, slot = at < op.samples * op.picks ? op.slot_ids[at] : -1;
    return {slot < op.slots ? slot : -1, at};
  }

  __device__ void prepare() {
    if (threadIdx.x == 0) {
      for (const Boxes* boxes : {&on.x, &on.weight, &on.a, &on.b}) prefetch(*boxes);
      for (int stage = 0; stage < kStages; ++stage) shared.full(stage).init(2), shared.empty(stage).init(2 * kWarps);
      shared.b_full().init(1), shared.b_empty().init(kWarps);
      publish_barriers();
    }
    for (int j = threadIdx.x; j < R; j += kFusedThreads) shared.spoiled()[j] = 0;
    // B's lines past the last rank column stay zero: nothing is copied to them.
    constexpr int kPieces = kBoxLine / 16;
    for (int at = threadIdx.x; at < kParts * (R - columns) * kPieces; at += kFusedThreads) {
      const int line = at / kPieces, part = line / (R - columns), row = columns + line % (R - columns);
      *reinterpret_cast<uint4*>(shared.b() + part * Memory::kBlock + row * kBoxLine + at % kPieces * 16) = uint4{};
    }
    publish_writes();
  }

  // One thread.
  __device__ void copy_layer() {
    Turn<kStages> turn;
    for (int64_t tile = first; tile < end; ++tile) {
      const Place at = place(tile);
      const int half = block * (kColumns / 2);
      for (int chunk = 0; chunk < chunks; ++chunk, turn.next()) {
        const int stage = turn.stage, column = chunk * kBoxColumns;
        Barrier& full = shared.full(stage);
        shared.empty(stage).wait(turn.parity ^ 1);
        full.expect((kFusedTokens + kColumns) * kBoxLine);
        copy_box(shared.x(stage), on.x, full, column, at.row, 0);
        copy_box_to_both(shared.weight(stage) + half * kBoxLine, on.weight, full, column, at.feature + half, 0);
      }
    }
    // The other block has arrived at this one's barriers for the last time when all stages are empty.
    for (int stage = 0; stage < kStages; ++stage, turn.next()) shared.empty(turn.stage).wait(turn.parity ^ 1);
  }

  // One warp; lane k copies the rows of the tile's k-th slot.
  __device__ void copy_slots() {
    const int lane = threadIdx.x % 32, rank = static_cast<int>(op.rank), when = chunks / 2;
    Turn<kStages> turn;
    uint32_t b_parity = 1;
    int matrix = 0;
    for (int64_t tile = first; tile < end; ++tile) {
      const Place at = place(tile);
      if (at.fresh && lane < picks) {
        const int64_t slot = pick_of(at, lane).slot;
        matrix = static_cast<int>(slot < 0 ? op.slots : slot);  // past the last: zeros
      }
      for (int chunk = 0; chunk < chunks; ++chunk, turn.next()) {
        if (chunk == when) {
          shared.b_empty().wait(b_parity);
          b_parity ^= 1;
          if (at.fresh) write_scales(at, lane);
          __syncwarp();
          if (lane == 0) shared.b_full().expect(kParts * columns * kBoxLine);
          __syncwarp();
          if (lane < picks)
            for (int part = 0; part < kParts; ++part)
              copy_box(shared.b() + part * Memory::kBlock + lane * rank * kBoxLine, on.b, shared.b_full(),
                       at.feature + part * kBoxColumns, 0, matrix);
        }
        const int stage = turn.stage;
        shared.empty(stage).wait(turn.parity ^ 1);
        if (lane == 0) shared.full(stage).expect(at.fresh ? columns * kBoxLine : 0);
        __syncwarp();
        if (at.fresh && lane < picks)
          copy_box(shared.a(stage) + lane * rank * kBoxLine, on.a, shared.full(stage), chunk * kBoxColumns, 0, matrix);
      }
    }
  }

  __device__ void write_scales(const Place& place, int lane) const {
    const int rank = static_cast<int>(op.rank), first_sample = static_cast<int>(place.row / op.tokens);
    for (int j = lane; j < R; j += 32) {
      const Pick pick = j < columns ? pick_of(place, j / rank) : Pick{-1, 0};
      shared.scales()[j] = pick.slot < 0 ? 0.f : op.weights[pick.at];
      shared.owners()[j] = pick.slot < 0 ? -1 : first_sample + j / rank / static_cast<int>(op.picks);
    }
  }

  // Each warp tells both blocks, which copy to both.
  __device__ void release(int stage) {
    if (thread % 32 < 2) shared.empty(stage).arrive(thread % 32);
  }

  // sums = x . weight^T, and in a fresh tile low = x . A^T.
  template <bool kFresh>
  __device__ void multiply(float (&sums)[kColumns / 8][4], float (&low)[R / 8][4], Turn<kStages>& turn) {
    int before = 0;
    for (int chunk = 0; chunk < chunks; ++chunk, turn.next()) {
      const int stage = turn.stage;
      shared.full(stage).wait(turn.parity);
      const uint64_t x = lines_at(shared.x(stage) + (group - 1) * 64 * kBoxLine), w = lines_at(shared.weight(stage)),
                     a = lines_at(shared.a(stage));
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 features each: two pieces further
        multiply_lines<kColumns>(sums, x + 2 * k, w + 2 * k, chunk + k);
        if constexpr (kFresh) multiply_lines<R>(low, x + 2 * k, a + 2 * k, chunk + k);
      }
      end_products();
      if (chunk > 0) {
        wait_for_products<1>();
        release(before);
      }
      before = stage;
    }
    wait_for_products<0>();
    release(before);
  }

  __device__ void run() {
    Turn<kStages> turn;
    uint32_t b_parity = 0;
    uint32_t left[R / 16][4] = {};
    int number = 0;
    for (int64_t tile = first; tile < end; ++tile) {
      const Place at = place(tile);
      ++number;
      float sums[kColumns / 8][4];
      if (at.fresh) {
        float low[R / 8][4];
        multiply<true>(sums, low, turn);
        shared.b_full().wait(b_parity);
        scale(left, low, at);
      } else {
        float none[R / 8][4];
        multiply<false>(sums, none, turn);
        shared.b_full().wait(b_parity);
      }
      b_parity ^= 1;
      if (on.spans > 1) keep_apart(number);
      begin_products();
#pragma unroll
      for (int j = 0; j < R / 16; ++j)
        multiply_rows<kColumns>(sums, left[j], lines_at(shared.b() + 16 * j * kBoxLine, Memory::kBlock));
      end_products();
      wait_for_products<0>();
      if (on.spans > 1) spoil(sums, at, number);
      __syncwarp();
      if (thread % 32 == 0) shared.b_empty().arrive(block);
      store(sums, at);
    }
  }

  // This thread has two rows of its group, eight apart.
  __device__ int row() const { return (group - 1) * 64 + thread / 32 * 16 + thread % 32 / 4; }

  // Products by A, scaled and rounded. Those of no slot or of another sample's become zero whatever they are.
  __device__ void scale(uint32_t (&left)[R / 16][4], const float (&low)[R / 8][4], const Place& at) const {
    const int quarter = threadIdx.x % 4, tokens = static_cast<int>(op.tokens);
    const int sample[2] = {(at.row + row()) / tokens, (at.row + row() + 8) / tokens};
#pragma unroll
    for (int j = 0; j < R / 8; ++j) {
      float scaled[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int column = 8 * j + 2 * quarter + m % 2;
        scaled[m] = shared.owners()[column] == sample[m / 2] ? low[j][m] * shared.scales()[column] : 0.f;
      }
      left[j / 2][j % 2 * 2] = two<__nv_bfloat16>(scaled[0], scaled[1]);
      left[j / 2][j % 2 * 2 + 1] = two<__nv_bfloat16>(scaled[2], scaled[3]);
    }
  }

  // Other samples' tokens have zeros for a slot's products by A, but zero times infinity is not zero. So numbers of B that
  // are not finite become zero, and their rows are marked.
  __device__ void keep_apart(int number) const {
    constexpr int kPieces = kBoxLine / 16;
    for (int at = threadIdx.x - kGroupThreads; at < kParts * columns * kPieces; at += 2 * kGroupThreads) {
      const int line = at / kPieces, row = line % columns;
      uint4& piece = *reinterpret_cast<uint4*>(
          shared.b() + line / columns * Memory::kBlock + row * kBoxLine + at % kPieces * 16);
      bool spoiled = false;
      const auto clean = [&](uint32_t both) {
        const uint32_t keep = (finite(both & 0xffff) ? 0xffffu : 0) | (finite(both >> 16) ? 0xffff0000u : 0);
        spoiled |= keep != ~0u;
        return both & keep;
      };
      const uint4 cleaned{clean(piece.x), clean(piece.y), clean(piece.z), clean(piece.w)};
      if (!spoiled) continue;
      piece = cleaned;
      shared.spoiled()[row] = number;
    }
    publish_writes();
    meet_two_groups();
  }
  __device__ static bool finite(uint32_t bits) { return (bits & 0x7f80) != 0x7f80; }

  // Tokens whose own sample's B has marked rows are NaN in the whole tile.
  __device__ void spoil(float (&sums)[kColumns / 8][4], const Place& at, int number) const {
    const int tokens = static_cast<int>(op.tokens);
    for (int j = 0; j < columns; ++j) {
      if (shared.spoiled()[j] != number) continue;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (shared.owners()[j] != (at.row + row() + 8 * m) / tokens) continue;
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) sums[i][2 * m] = sums[i][2 * m + 1] = __int_as_float(0x7fffffff);
      }
    }
  }

  // Neighbouring threads exchange halves of two columns of eight, so that each writes four numbers.
  __device__ void store(const float (&sums)[kColumns / 8][4], const Place& at) const {
    using T = __nv_bfloat16;
    const int quarter = threadIdx.x % 4, odd = quarter % 2, feature = 8 * odd + 4 * (quarter / 2);
    const int features = static_cast<int>(op.features_out) - at.feature;  // that are left
    T* to = static_cast<T*>(op.y) + int64_t{at.row + row()} * op.features_out + at.feature + feature;
    const T* bias = op.bias ? static_cast<const T*>(op.bias) + at.feature + 2 * quarter : nullptr;
    bool inside[2];
    for (int m = 0; m < 2; ++m) inside[m] = at.row + row() + 8 * m < op.samples * op.tokens;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      float more[2][2] = {};
      if (bias) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (8 * (j + h) >= features) break;
          const uint32_t both = *reinterpret_cast<const uint32_t*>(bias + 8 * (j + h));
          more[h][0] = one_of<T>(both, false), more[h][1] = one_of<T>(both, true);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t even_one = two<T>(sums[j][2 * m] + more[0][0], sums[j][2 * m + 1] + more[0][1]);
        const uint32_t odd_one = two<T>(sums[j + 1][2 * m] + more[1][0], sums[j + 1][2 * m + 1] + more[1][1]);
        const uint32_t other = __shfl_xor_sync(~0u, odd ? even_one : odd_one, 1);
        if (inside[m] && 8 * j + feature < features)
          *reinterpret_cast<uint2*>(to + 8 * m * op.features_out + 8 * j) =
              odd ? uint2{other, odd_one} : uint2{even_one, other};
      }
    }
  }
};

template <int kColumns, int R>
__global__ void __launch_bounds__(kFusedThreads, 1) adapted_linear_in_tiles(const SLM_GRID_CONSTANT FusedOnDevice on) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // compiled for sm_90a
  extern __shared__ double memory[];
  char* aligned = reinterpret_cast<char*>(memory);
  aligned += (kEightLines - shared_address(aligned) % kEightLines) % kEightLines;
  Fused<kColumns, R> mine(on, aligned);
  let_next_begin();
  mine.prepare();
  __syncthreads();
  arrive_at_cluster();
  wait_for_cluster();
  wait_for_previous();
  if (mine.group == 0) {
    fewer_registers<40>();
    if (mine.thread == 0) mine.copy_layer();
    if (mine.thread / 32 == 1) mine.copy_slots();
    __syncwarp();
  } else {
    more_registers<232>();
    mine.run();
  }
  arrive_at_cluster();
  wait_for_cluster();  // no block exits while the other may use its barriers
#else
  __trap();  // operators.cpp calls it where it is compiled
#endif
}

template <int kColumns, int R>
cudaError_t launch(const FusedOnDevice& on, cudaStream_t stream) {
  const int bytes = static_cast<int>(fused_shared(kColumns, R));
  const cudaError_t status = cudaFuncSetAttribute(
      adapted_linear_in_tiles<kColumns, R>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(2 * static_cast<unsigned>(blocks_of(on.cut.tiles, on.cut.run)));
  return launch_clusters(adapted_linear_in_tiles<kColumns, R>, on, grid, kFusedThreads, 2, bytes, stream);
}

template <int kColumns>
cudaError_t launch(const FusedOnDevice& on, cudaStream_t stream) {
  switch (fused_columns(on.spans * on.call.picks * on.call.rank)) {
    case 16: return launch<kColumns, 16>(on, stream);
    case 32: return launch<kColumns, 32>(on, stream);
    case 48: return launch<kColumns, 48>(on, stream);
    case 64: return launch<kColumns, 64>(on, stream);
    case kMostFusedColumns: return launch<kColumns, kMostFusedColumns>(on, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t adapted_linear(const FusedOnDevice& on, cudaStream_t stream) {
  switch (on.cut.width) {
    case 192: return launch<192>(on, stream);
    case 256: return launch<256>(on, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace slm_fast::cuda

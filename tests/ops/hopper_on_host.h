// What csrc/cuda/hopper.cuh has, on a CPU: boxes are copied and products computed at once, by the threads that ask for
// them, with each number where its swizzled line has it. Included by cuda_on_host.h.
#pragma once

#define SLM_GRID_CONSTANT
struct CUtensorMap {  // [matrices, rows, columns] of 16-bit numbers, in boxes of `box` rows and 64 columns
  const void* base;
  int64_t columns, rows, matrices, box;
};
inline void __syncwarp() { on_host::block->meet(1 + threadIdx.x / 32, 32, [] {}); }

namespace on_host {

struct Phase {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t parity = 0;
};
inline std::mutex phases_mutex;
inline std::map<const void*, Phase> phases;  // by barrier
template <class Change>
void at_barrier(const void* barrier, const Change& change) {
  const std::lock_guard guard(phases_mutex);
  Phase& phase = phases.at(barrier);
  change(phase);
  if (phase.pending == 0 && phase.bytes == 0) phase.parity ^= 1, phase.pending = phase.arrivals;
}
inline char* of_block(const void* mine, int rank) {
  const auto* cluster = block->cluster;
  return cluster->blocks[rank] + (static_cast<const char*>(mine) - cluster->blocks[block->rank]);
}
// The 16-bit number at an offset of this block's shared memory, whose 16-byte pieces are swizzled.
inline uint16_t& swizzled(char* memory, int64_t at) {
  return *reinterpret_cast<uint16_t*>(memory + (at ^ (at >> 7 & 7) << 4));
}
inline float bfloat16_at(int64_t at) {
  __nv_bfloat16 number;
  number.bits = swizzled(reinterpret_cast<char*>(shared_memory), at);
  return static_cast<float>(number);
}

}  // namespace on_host

namespace slm_fast::cuda {  // csrc/cuda/hopper.cuh says what these do
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - reinterpret_cast<const char*>(on_host::shared_memory));
}
struct Barrier {
  uint64_t word;
  void init(int arrivals) {
    const std::lock_guard guard(on_host::phases_mutex);
    on_host::phases[this] = {arrivals, arrivals};
  }
  void expect(int bytes) {
    on_host::at_barrier(this, [&](auto& phase) { --phase.pending, phase.bytes += bytes; });
  }
  void arrive(int block) {
    on_host::at_barrier(on_host::of_block(this, block), [](auto& phase) { --phase.pending; });
  }
  void wait(uint32_t parity) {
    for (;;) {
      {
        const std::lock_guard guard(on_host::phases_mutex);
        if (on_host::phases.at(this).parity != parity) return;
      }
      on_host::block->yield();
    }
  }
};
inline void publish_barriers() {}
inline void publish_writes() {}
inline void prefetch(const CUtensorMap&) {}
inline void copy_box_to(int block, void* to, const CUtensorMap& from, Barrier& barrier, int column, int row, int matrix) {
  const int64_t at = shared_address(to);
  for (int64_t i = 0; i < from.box; ++i)
    for (int64_t j = 0; j < 64; ++j) {
      const bool inside = column + j < from.columns && row + i < from.rows && matrix < from.matrices;
      on_host::swizzled(on_host::block->cluster->blocks[block], at + i * 128 + j * 2) =
          inside ? static_cast<const uint16_t*>(from.base)[(matrix * from.rows + row + i) * from.columns + column + j] : 0;
    }
  on_host::at_barrier(on_host::of_block(&barrier, block), [&](auto& phase) { phase.bytes -= from.box * 128; });
}
inline void copy_box(void* to, const CUtensorMap& from, Barrier& barrier, int column, int row, int matrix) {
  copy_box_to(on_host::block->rank, to, from, barrier, column, row, matrix);
}
inline void copy_box_to_both(void* to, const CUtensorMap& from, Barrier& barrier, int column, int row, int matrix) {
  for (int block = 0; block < 2; ++block) copy_box_to(block, to, from, barrier, column, row, matrix);
}
inline void meet_group() {
  on_host::Block& block = *on_host::block;
  block.meet(1 + static_cast<int>(block.fibers.size()) / 32 + threadIdx.x / 128, 128, [] {});
}
inline void meet_two_groups() { on_host::block->meet(static_cast<int>(on_host::block->arrived.size()) - 1, 256, [] {}); }
template <int N>
void more_registers() {}
template <int N>
void fewer_registers() {}
inline void begin_products() { meet_group(); }
inline void end_products() {}
template <int N>
void wait_for_products() {
  meet_group();
}
// Where number (line, at) of lines lies, as the descriptor says.
inline int64_t in_lines(uint64_t lines, int64_t line, int64_t at) {
  return ((lines & 0x3fff) << 4) + line / 8 * ((lines >> 32 & 0x3fff) << 4) + line % 8 * 128 + at * 2;
}
template <int N>
void multiply_lines(float (&sums)[N / 8][4], uint64_t p_lines, uint64_t q_lines, int more) {
  for (int j = 0; j < N / 8; ++j)
    for (int m = 0; m < 4; ++m) {
      const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + m / 2 * 8, column = 8 * j + threadIdx.x % 4 * 2 + m % 2;
      float sum = more ? sums[j][m] : 0.f;
      for (int k = 0; k < 16; ++k)
        sum += on_host::bfloat16_at(in_lines(p_lines, row, k)) * on_host::bfloat16_at(in_lines(q_lines, column, k));
      sums[j][m] = sum;
    }
}
template <int N>
void multiply_rows(float (&sums)[N / 8][4], const uint32_t (&p)[4], uint64_t q_lines) {
  const int lane = threadIdx.x % 32, apart = static_cast<int>(q_lines >> 16 & 0x3fff) << 4;
  on_host::exchange({p[0], p[1], p[2], p[3]}, [&](const auto& of) {
    for (int j = 0; j < N / 8; ++j)
      for (int m = 0; m < 4; ++m) {
        const int row = lane / 4, column = 8 * j + lane % 4 * 2 + m % 2;
        for (int k = 0; k < 16; ++k)
          sums[j][m] += one_of<__nv_bfloat16>(of(row * 4 + k % 8 / 2, m / 2 + k / 8 * 2), k % 2) *
                        on_host::bfloat16_at(in_lines(q_lines, k, column % 64) + column / 64 * apart);
      }
  });
}
}  // namespace slm_fast::cuda

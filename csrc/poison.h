// For tests: uninitialised memory reads as NaN, or as an out-of-range slot id.
#pragma once

#include <cstdint>

namespace slm_fast {

extern bool poisons_memory;  // set through _C.poison_memory, checked at every native allocation
void write_poison(void* memory, int64_t bytes);

// Always inline: the linker could otherwise pick any instruction set's copy.
[[gnu::always_inline]] inline void poison(void* memory, int64_t bytes) {
  if (__atomic_load_n(&poisons_memory, __ATOMIC_RELAXED)) [[unlikely]] write_poison(memory, bytes);
}

}  // namespace slm_fast

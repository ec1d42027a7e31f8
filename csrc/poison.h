// For tests: memory that nobody has written yet reads as NaN, or as an id that no slot has.
#pragma once

#include <cstdint>

namespace slm_fast {

extern bool poisons_memory;  // set through _C.poison_memory, asked wherever native code gets memory
void write_poison(void* memory, int64_t bytes);

// Always inline: a function that several instruction sets' object files share may come from any of them.
[[gnu::always_inline]] inline void poison(void* memory, int64_t bytes) {
  if (__atomic_load_n(&poisons_memory, __ATOMIC_RELAXED)) [[unlikely]] write_poison(memory, bytes);
}

}  // namespace slm_fast

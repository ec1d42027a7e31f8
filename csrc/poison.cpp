// The switch and fill pattern of poison.h, compiled once for all instruction sets.
#include "poison.h"

namespace slm_fast {

bool poisons_memory = false;

// 0x7fff in every 16-bit word: NaN in float16, bfloat16, float32 and float64, a huge id in int64.
void write_poison(void* memory, int64_t bytes) {
  auto* to = static_cast<unsigned char*>(memory);
  for (int64_t i = 0; i < bytes; ++i) to[i] = i % 2 ? 0x7f : 0xff;
}

}  // namespace slm_fast

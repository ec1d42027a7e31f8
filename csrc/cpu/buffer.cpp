// Scratch memory as tests see it.
#include "buffer.h"

#include <algorithm>

namespace slm_fast::SLM_ISA {

// The first bytes of a new, uninitialised buffer.
void read_scratch(char* to, int64_t count) {
  const Buffer<char> scratch(count);
  std::copy_n(scratch.data(), count, to);
}

}  // namespace slm_fast::SLM_ISA

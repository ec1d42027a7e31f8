// What tests see of scratch memory.
#include "buffer.h"

#include <algorithm>

namespace slm_fast::SLM_ISA {

// The first bytes of a new buffer, as nobody has written them.
void read_scratch(char* to, int64_t count) {
  const Buffer<char> scratch(count);
  std::copy_n(scratch.data(), count, to);
}

}  // namespace slm_fast::SLM_ISA

// torch's thread pool, as the CPU kernels use it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/threads.h"

namespace slm_fast {

// Inside another parallel region torch runs this on the calling thread, so cores are never oversubscribed.
inline Threads torch_threads() {
  return {
      static_cast<int>(torch::stable::get_num_threads()),
      [](int workers, void (*body)(void*, int), void* context) {
        torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
          for (int64_t worker = begin; worker < end; ++worker) body(context, static_cast<int>(worker));
        });
      }};
}

}  // namespace slm_fast

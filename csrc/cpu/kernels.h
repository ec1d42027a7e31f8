// The kernels of an instruction set, and the choice of one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../calls.h"
#include "threads.h"

namespace slm_fast {

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*multi_lora)(const MultiLora&, const Threads&);
  void (*multi_lora_backward)(const MultiLoraBackward&, const Threads&);
  void (*adapted_linear)(const AdaptedLinear&, const Threads&);  // only on processors with AMX
  int64_t (*retrieve)(const Retrieve&, const Threads&);  // returns the first non-finite query, or -1
  int64_t (*prepared_bytes)(const PrepareKeys&);
  void (*prepare_keys)(const PrepareKeys&, void* prepared, const Threads&);
  void (*key_loss)(KeyLoss&, const Threads&);
  void (*key_loss_backward)(const KeyLossBackward&, const Threads&);
  void (*invariant_linear)(const InvariantLinear&, const Threads&);
  void (*sum_scatters)(const SumScatters&, const Threads&);
  void (*read_scratch)(char* to, int64_t count);  // for tests: what new scratch memory holds
};

// The best compiled-in set that the processor supports, or the one named by the environment variable SLM_FAST_CPU (for
// tests and comparisons; an unknown or unsupported name selects the portable set).
const Kernels& kernels();
std::vector<std::string> instruction_sets();  // compiled in, best first

}  // namespace slm_fast

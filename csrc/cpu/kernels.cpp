// Run-time choice of the instruction set, made once.
#include "kernels.h"

#include "amx.h"

#include <cstdlib>
#include <cstring>

#define DECLARE(isa)                                                                                        \
  namespace slm_fast::isa {                                                                                 \
  void multi_lora(const MultiLora&, const Threads&);                                                        \
  void multi_lora_backward(const MultiLoraBackward&, const Threads&);                                       \
  void adapted_linear(const AdaptedLinear&, const Threads&);                                                \
  int64_t retrieve(const Retrieve&, const Threads&);                                                        \
  int64_t prepared_bytes(const PrepareKeys&);                                                               \
  void prepare_keys(const PrepareKeys&, void*, const Threads&);                                             \
  void key_loss(KeyLoss&, const Threads&);                                                                  \
  void key_loss_backward(const KeyLossBackward&, const Threads&);                                           \
  void invariant_linear(const InvariantLinear&, const Threads&);                                            \
  void sum_scatters(const SumScatters&, const Threads&);                                                    \
  void read_scratch(char*, int64_t);                                                                        \
  constexpr Kernels kTable{#isa,           multi_lora,   multi_lora_backward, adapted_linear,    retrieve,    \
                           prepared_bytes, prepare_keys, key_loss,            key_loss_backward, invariant_linear, \
                           sum_scatters,   read_scratch};                                                   \
  }

DECLARE(portable)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
#endif

namespace slm_fast {
namespace {

#if defined(__x86_64__)
// The same kernels, of which retrieve, multi_lora and adapted_linear use AMX.
constexpr Kernels kAmx = [] {
  Kernels table = avx512_bf16::kTable;
  table.name = "amx";
  return table;
}();
#endif

struct Candidate {
  const Kernels* table;
  bool usable;
};

// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  all.push_back({&kAmx, bf16 && amx::usable()});
  all.push_back({&avx512_bf16::kTable, bf16});
  all.push_back({&avx512::kTable, avx512});
  all.push_back({&avx2::kTable, avx2});
#endif
  all.push_back({&portable::kTable, true});
  return all;
}

const Kernels* choose() {
  const char* wanted = std::getenv("SLM_FAST_CPU");
  for (const Candidate& candidate : candidates())
    if (candidate.usable && (!wanted || !std::strcmp(wanted, candidate.table->name))) return candidate.table;
  return &portable::kTable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const Kernels* table = choose();
    amx::choose(!std::strcmp(table->name, "amx"));
    return table;
  }();
  return *chosen;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.push_back(candidate.table->name);
  return names;
}

}  // namespace slm_fast

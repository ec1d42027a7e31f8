// The schemas of all native operators, and the Python module `_C` that loads them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "cuda/launch.h"
#include "operators.h"
#include "poison.h"

// Schemas shared by several backends; `backend` is the name's suffix.
// clang-format off
#define MULTI_LORA(backend) "multi_lora_" backend "(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor? base) -> Tensor"
#define MULTI_LORA_(backend) "multi_lora_" backend "_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor(a!) base) -> ()"
#define ADAPTED_LINEAR(backend) "adapted_linear_" backend "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights) -> Tensor"
#define RETRIEVE(backend, more) "retrieve_" backend "(Tensor query, Tensor keys, SymInt k, SymInt groups, Tensor? bias, Tensor? mask, str metric, str aggregate, str weighting, float temperature" more ") -> (Tensor, Tensor)"

STABLE_TORCH_LIBRARY_FRAGMENT(slm_fast, library) {
  library.def(MULTI_LORA("native"));
  library.def(MULTI_LORA_("native"));
  library.def(ADAPTED_LINEAR("native"));
  library.def("multi_lora_native_backward(Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(RETRIEVE("native", ", Tensor? prepared=None, Tensor? key_slot=None"));
  library.def("prepare_keys_native(Tensor keys, SymInt groups, str metric='cosine') -> Tensor");
  library.def("key_loss_native(Tensor query, Tensor keys, SymInt k, SymInt groups, float mask_prob, SymInt seed) -> (Tensor, Tensor)");
  library.def("key_loss_native_backward(Tensor grad, Tensor query, Tensor keys, Tensor selected) -> Tensor");
  library.def("invariant_linear_native(Tensor x, Tensor weight) -> Tensor");
  library.def("sum_scatters_native(Tensor factor, Tensor rows, Tensor exponent, Tensor diagonal) -> (Tensor, Tensor)");
#if defined(SLM_FAST_CUDA)
  library.def(MULTI_LORA("cuda"));
  library.def(MULTI_LORA_("cuda"));
  library.def(RETRIEVE("cuda", ", Tensor? key_slot=None"));
  library.def(ADAPTED_LINEAR("cuda"));
#endif
}
// clang-format on

#if defined(SLM_FAST_CUDA)
STABLE_TORCH_LIBRARY_IMPL(slm_fast, CUDA, library) {
  library.impl("multi_lora_cuda", TORCH_BOX(&slm_fast::cuda::multi_lora));
  library.impl("multi_lora_cuda_", TORCH_BOX(&slm_fast::cuda::multi_lora_));
  library.impl("retrieve_cuda", TORCH_BOX(&slm_fast::cuda::retrieve));
  library.impl("adapted_linear_cuda", TORCH_BOX(&slm_fast::cuda::adapted_linear));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(slm_fast, CPU, library) {
  library.impl("multi_lora_native", TORCH_BOX(&slm_fast::multi_lora));
  library.impl("multi_lora_native_", TORCH_BOX(&slm_fast::multi_lora_));
  library.impl("adapted_linear_native", TORCH_BOX(&slm_fast::adapted_linear));
  library.impl("multi_lora_native_backward", TORCH_BOX(&slm_fast::multi_lora_backward));
  library.impl("retrieve_native", TORCH_BOX(&slm_fast::retrieve));
  library.impl("prepare_keys_native", TORCH_BOX(&slm_fast::prepare_keys));
  library.impl("key_loss_native", TORCH_BOX(&slm_fast::key_loss));
  library.impl("key_loss_native_backward", TORCH_BOX(&slm_fast::key_loss_backward));
  library.impl("invariant_linear_native", TORCH_BOX(&slm_fast::invariant_linear));
  library.impl("sum_scatters_native", TORCH_BOX(&slm_fast::sum_scatters));
}

PYBIND11_MODULE(_C, module) {
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = SLM_FAST_COMPILER;
        info["instruction_sets"] = slm_fast::instruction_sets();
        info["instruction_set"] = slm_fast::kernels().name;
#if defined(SLM_FAST_CUDA)
        info["cuda"] = SLM_FAST_CUDA;
#else
        info["cuda"] = false;
#endif
        return info;
      },
      "Compiler, compiled instruction sets, the set selected for this CPU, and the CUDA compiler and architectures (False\n"
      "without CUDA).");
  module.def(
      "decode_cut",
      [](int64_t rows, int64_t features_in, int64_t features_out, int multiprocessors) {
        const int blocks = slm_fast::cuda::decode_blocks(rows, features_in, features_out, multiprocessors);
        std::vector<std::pair<int64_t, int64_t>> in, out;
        for (int block = 0; block < blocks; ++block) {
          const auto i = slm_fast::cuda::share_of(features_in, blocks, block);
          const auto o = slm_fast::cuda::share_of(features_out, blocks, block);
          in.emplace_back(i.begin, i.end), out.emplace_back(o.begin, o.end);
        }
        return std::make_pair(in, out);
      },
      "Partition of a row by the CUDA decode kernel: one range of in-features and one of out-features per block.");
  module.def(
      "token_cut",
      [](int64_t samples, int64_t tokens, int64_t rank, int64_t features_in, int64_t features_out, int multiprocessors,
         int64_t most_shared) {
        using namespace slm_fast::cuda;
        const TokenCut cut = cut_tokens(samples, tokens, rank, features_in, features_out, multiprocessors, most_shared);
        std::vector<std::pair<int64_t, int64_t>> in, out;
        for (int block = 0; block < cut.blocks; ++block) {
          const auto i = share_of_tiles(features_in, cut.blocks, block), o = share_of_tiles(features_out, cut.blocks, block);
          in.emplace_back(i.begin, i.end), out.emplace_back(o.begin, o.end);
        }
        return std::make_tuple(cut.tile, in, out, tokens_shared(cut.tile, token_columns(rank)));
      },
      "Partition by the CUDA kernel for many tokens: tokens per tile, the ranges of in- and of out-features of the blocks\n"
      "that share a tile, and their bytes of shared memory.");
  module.def(
      "fused_cut",
      [](int64_t samples, int64_t tokens, int64_t rank, int64_t features_in, int64_t features_out, int multiprocessors) {
        using namespace slm_fast::cuda;
        const int64_t spans = fused_spans(tokens), columns = fused_columns(spans * rank);
        const FusedCut cut = cut_fused(samples * tokens, spans * rank, features_in, features_out, multiprocessors);
        return std::make_tuple(
            spans, cut.width, cut.across, cut.tiles, cut.run, fused_stages(cut.width, columns), fused_shared(cut.width, columns));
      },
      "Partition by the CUDA kernel for a linear layer with its increments: the most samples in a tile of 128 tokens,\n"
      "output features per tile, tiles of the same tokens, all tiles (two of tokens count as one), tiles that a cluster\n"
      "takes one after the other, stages, and bytes of shared memory per block.");
  module.def(
      "retrieve_cut",
      [](int64_t queries, int64_t slots, int64_t width, int64_t groups, int64_t k, bool whole, int multiprocessors,
         int64_t most_shared) {
        const auto cut = slm_fast::cuda::cut_retrieve(
            queries, slots, width, groups, k, whole, multiprocessors, most_shared);
        return std::make_tuple(cut.few, cut.tile, cut.parts, cut.span, cut.slab, cut.shared, cut.pick_warps);
      },
      "Partition by the CUDA retrieve kernels: whether the path for few keys is taken, queries per block, parts of the\n"
      "pool, keys per part, queries per pair of launches, bytes of shared memory, and warps that select a query's top K.");
  module.def(
      "poison_memory", [](bool on) { __atomic_store_n(&slm_fast::poisons_memory, on, __ATOMIC_RELAXED); },
      "For tests: fill memory that native code allocates with NaN, or with indices out of range.");
  module.def(
      "read_scratch",
      [](int64_t count) {
        std::string bytes(static_cast<size_t>(count), '\0');
        slm_fast::kernels().read_scratch(bytes.data(), count);
        return pybind11::bytes(bytes);
      },
      "For tests: the first `count` bytes of a kernel's new, uninitialised scratch memory.");
}

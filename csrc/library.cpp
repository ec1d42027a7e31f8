// Every native operator's schema, one line each, and the Python module `_C` that loads them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "operators.h"

STABLE_TORCH_LIBRARY_FRAGMENT(slm_fast, library) {
  // clang-format off
  library.def("multi_lora_native(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor? base) -> Tensor");
  library.def("multi_lora_native_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor(a!) base) -> ()");
  library.def("multi_lora_native_backward(Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("retrieve_native(Tensor query, Tensor keys, SymInt k, SymInt groups, Tensor? bias, Tensor? mask, str metric, str aggregate, str weighting, float temperature) -> (Tensor, Tensor)");
  library.def("key_loss_native(Tensor query, Tensor keys, SymInt k, SymInt groups, float mask_prob, SymInt seed) -> (Tensor, Tensor)");
  library.def("key_loss_native_backward(Tensor grad, Tensor query, Tensor keys, Tensor selected) -> Tensor");
  // clang-format on
}

STABLE_TORCH_LIBRARY_IMPL(slm_fast, CPU, library) {
  library.impl("multi_lora_native", TORCH_BOX(&slm_fast::multi_lora));
  library.impl("multi_lora_native_", TORCH_BOX(&slm_fast::multi_lora_));
  library.impl("multi_lora_native_backward", TORCH_BOX(&slm_fast::multi_lora_backward));
  library.impl("retrieve_native", TORCH_BOX(&slm_fast::retrieve));
  library.impl("key_loss_native", TORCH_BOX(&slm_fast::key_loss));
  library.impl("key_loss_native_backward", TORCH_BOX(&slm_fast::key_loss_backward));
}

PYBIND11_MODULE(_C, module) {
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = SLM_FAST_COMPILER;
        info["instruction_sets"] = slm_fast::instruction_sets();
        info["instruction_set"] = slm_fast::kernels().name;
        info["cuda"] = false;
        return info;
      },
      "The compiler, the instruction sets compiled in, the one chosen for this processor, and whether CUDA was built.");
}

// The operators that library.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace slm_fast {

using torch::stable::Tensor;

Tensor multi_lora(
    Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::optional<Tensor> base);
void multi_lora_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor base);

}  // namespace slm_fast

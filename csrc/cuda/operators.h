// The operators that library.cpp registers on the CUDA key.
#pragma once

#include "operators.h"

namespace slm_fast::cuda {

Tensor multi_lora(
    Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::optional<Tensor> base);
std::tuple<Tensor, Tensor> retrieve(
    Tensor query, Tensor keys, int64_t k, int64_t groups, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::string metric, std::string aggregate, std::string weighting, double temperature);

}  // namespace slm_fast::cuda

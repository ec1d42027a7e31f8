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
Tensor adapted_linear(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights);
std::tuple<Tensor, Tensor, Tensor, Tensor> multi_lora_backward(
    Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::vector<bool> needed);

std::tuple<Tensor, Tensor> retrieve(
    Tensor query, Tensor keys, int64_t k, int64_t groups, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::string metric, std::string aggregate, std::string weighting, double temperature,
    std::optional<Tensor> prepared, std::optional<Tensor> key_slot);
Tensor prepare_keys(Tensor keys, int64_t groups, std::string metric);
std::tuple<Tensor, Tensor> key_loss(
    Tensor query, Tensor keys, int64_t k, int64_t groups, double mask_prob, int64_t seed);
Tensor key_loss_backward(Tensor grad, Tensor query, Tensor keys, Tensor selected);
Tensor invariant_linear(Tensor x, Tensor weight);
std::tuple<Tensor, Tensor> sum_scatters(Tensor factor, Tensor rows, Tensor exponent, Tensor diagonal);

// GPU versions: csrc/cuda/operators.cpp.
namespace cuda {
Tensor multi_lora(
    Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::optional<Tensor> base);
void multi_lora_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor base);
std::tuple<Tensor, Tensor> retrieve(
    Tensor query, Tensor keys, int64_t k, int64_t groups, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::string metric, std::string aggregate, std::string weighting, double temperature,
    std::optional<Tensor> key_slot);
Tensor adapted_linear(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights);
}  // namespace cuda

}  // namespace slm_fast

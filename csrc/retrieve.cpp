// CPU retrieve and prepare_keys operators: check all arguments, then pass plain pointers to the kernel.
#include <cstdint>

#include "check_pair.h"
#include "cpu/kernels.h"
#include "operators.h"
#include "tensor.h"
#include "torch_threads.h"

namespace slm_fast {
namespace {

bool one_of(const char* name, const std::string& got, const char* no, const char* yes) {
  if (got != no && got != yes) fail(name, ": expected '", no, "' or '", yes, "', got '", got, "'");
  return got == yes;
}

// Keys must be sorted by slot.
void check_key_slot(const Retrieve& op, int64_t slots) {
  if (op.slots >= int64_t{1} << 31) fail("key_slot: expected fewer than 2**31 keys, got ", op.slots);
  for (int64_t i = 0; i < op.slots; ++i) {
    const int64_t slot = op.key_slot[i], before = i ? op.key_slot[i - 1] : 0;
    if (slot < before || slot >= slots) fail("key_slot: expected rising slots from 0, got ", slot, " after ", before);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> retrieve(
    Tensor query, Tensor keys, int64_t k, int64_t groups, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::string metric, std::string aggregate, std::string weighting, double temperature,
    std::optional<Tensor> prepared, std::optional<Tensor> key_slot) {
  check_pair(query, keys, k, groups);
  query = dense(query), keys = dense(keys);
  Retrieve op{};
  op.type = type_of("query", query);
  op.queries = query.size(0), op.slots = keys.size(0), op.width = query.size(1), op.groups = groups, op.k = k;
  op.cosine = one_of("metric", metric, "dot", "cosine");
  op.vote = one_of("aggregate", aggregate, "mean", "vote");
  op.softmax = one_of("weighting", weighting, "ratio", "softmax");
  if (!op.cosine && (groups != 1 || op.vote)) fail("metric: groups and aggregate='vote' go with 'cosine', got 'dot'");
  if (op.cosine && bias) fail("bias: goes with metric='dot', got metric='cosine'");
  if (!(temperature > 0)) fail("temperature: expected a positive number, got ", temperature);
  op.temperature = temperature;
  op.query = query.data_ptr(), op.keys = keys.data_ptr();
  if (prepared) {
    const PrepareKeys of{op.type, op.cosine, op.slots, op.width, groups, op.keys};
    check_like("prepared", *prepared, ScalarType::Byte, {kernels().prepared_bytes(of)});
    prepared = dense(*prepared);
    op.prepared = prepared->data_ptr();
  }
  if (bias) {
    type_of("bias", *bias);
    check_like("bias", *bias, bias->scalar_type(), {op.slots});
    bias = dense(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
    op.bias = static_cast<const float*>(bias->data_ptr());
  }
  int64_t slots = op.slots;
  if (key_slot) {
    if (op.vote) fail("key_slot: goes with aggregate='mean', got 'vote'");
    check_like("key_slot", *key_slot, ScalarType::Long, {op.slots});
    key_slot = dense(*key_slot);
    op.key_slot = static_cast<const int64_t*>(key_slot->data_ptr());
    slots = op.mask_slots = mask && mask->dim() > 0 ? mask->size(mask->dim() - 1) : INT64_MAX;
    check_key_slot(op, slots);
  }
  if (mask) {
    op.mask_per_query = mask->dim() == 2;
    if (op.mask_per_query) check_like("mask", *mask, ScalarType::Bool, {op.queries, slots});
    else check_like("mask", *mask, ScalarType::Bool, {slots});
    mask = dense(*mask);
    op.mask = static_cast<const bool*>(mask->data_ptr());
  }
  Tensor slot_ids = empty(ScalarType::Long, {op.queries, k}), weights = empty(ScalarType::Float, {op.queries, k});
  op.slot_ids = static_cast<int64_t*>(slot_ids.data_ptr()), op.weights = static_cast<float*>(weights.data_ptr());
  const int64_t bad = kernels().retrieve(op, torch_threads());
  if (bad >= 0) fail("query: row ", bad, " holds a number that is not finite");
  return {slot_ids, weights};
}

Tensor prepare_keys(Tensor keys, int64_t groups, std::string metric) {
  if (keys.dim() != 2 || !keys.is_cpu()) fail("keys: expected floating [P, D] on cpu, got ", shape_of(keys));
  if (groups < 1 || keys.size(1) % groups != 0)
    fail("groups: expected a divisor of the key width ", keys.size(1), ", got ", groups);
  const bool cosine = one_of("metric", metric, "dot", "cosine");
  if (!cosine && groups != 1) fail("metric: groups go with 'cosine', got 'dot'");
  keys = dense(keys);
  const PrepareKeys op{type_of("keys", keys), cosine, keys.size(0), keys.size(1), groups, keys.data_ptr()};
  Tensor prepared = empty(ScalarType::Byte, {kernels().prepared_bytes(op)});
  kernels().prepare_keys(op, prepared.data_ptr(), torch_threads());
  return prepared;
}

}  // namespace slm_fast

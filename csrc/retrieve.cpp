// The retrieve and key_loss operators on a CPU: check every argument, then hand plain pointers to the kernel.
#include "operators.h"
#include "tensor.h"

namespace slm_fast {
namespace {

void check_pair(const Tensor& query, const Tensor& keys, int64_t k, int64_t groups) {
  if (query.dim() != 2 || !query.is_cpu()) fail("query: expected floating [B, D] on cpu, got ", shape_of(query));
  type_of("query", query);
  if (keys.dim() != 2) fail("keys: expected [P, ", query.size(1), "], got ", shape_of(keys));
  check_like("keys", keys, query.scalar_type(), {keys.size(0), query.size(1)});
  if (k < 1) fail("k: expected at least 1, got ", k);
  if (keys.size(0) >= int64_t{1} << 32) fail("keys: expected fewer than 2**32 slots, got ", keys.size(0));
  if (groups < 1 || query.size(1) % groups != 0)
    fail("groups: expected a divisor of the query width ", query.size(1), ", got ", groups);
}

bool one_of(const char* name, const std::string& got, const char* no, const char* yes) {
  if (got != no && got != yes) fail(name, ": expected '", no, "' or '", yes, "', got '", got, "'");
  return got == yes;
}

}  // namespace

std::tuple<Tensor, Tensor> retrieve(
    Tensor query, Tensor keys, int64_t k, int64_t groups, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::string metric, std::string aggregate, std::string weighting, double temperature,
    std::optional<Tensor> prepared) {
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
    const PrepareKeys of{op.type, op.slots, op.width, groups, op.keys};
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
  if (mask) {
    op.mask_per_query = mask->dim() == 2;
    if (op.mask_per_query) check_like("mask", *mask, ScalarType::Bool, {op.queries, op.slots});
    else check_like("mask", *mask, ScalarType::Bool, {op.slots});
    mask = dense(*mask);
    op.mask = static_cast<const bool*>(mask->data_ptr());
  }
  Tensor slot_ids = empty(ScalarType::Long, {op.queries, k}), weights = empty(ScalarType::Float, {op.queries, k});
  op.slot_ids = static_cast<int64_t*>(slot_ids.data_ptr()), op.weights = static_cast<float*>(weights.data_ptr());
  const int64_t bad = kernels().retrieve(op, pool());
  if (bad >= 0) fail("query: row ", bad, " holds a number that is not finite");
  return {slot_ids, weights};
}

Tensor prepare_keys(Tensor keys, int64_t groups) {
  if (keys.dim() != 2 || !keys.is_cpu()) fail("keys: expected floating [P, D] on cpu, got ", shape_of(keys));
  if (groups < 1 || keys.size(1) % groups != 0)
    fail("groups: expected a divisor of the key width ", keys.size(1), ", got ", groups);
  keys = dense(keys);
  const PrepareKeys op{type_of("keys", keys), keys.size(0), keys.size(1), groups, keys.data_ptr()};
  Tensor prepared = empty(ScalarType::Byte, {kernels().prepared_bytes(op)});
  kernels().prepare_keys(op, prepared.data_ptr(), pool());
  return prepared;
}

std::tuple<Tensor, Tensor> key_loss(
    Tensor query, Tensor keys, int64_t k, int64_t groups, double mask_prob, int64_t seed) {
  check_pair(query, keys, k, groups);
  if (!(mask_prob >= 0 && mask_prob <= 1)) fail("mask_prob: expected 0 to 1, got ", mask_prob);
  query = dense(query), keys = dense(keys);
  KeyLoss op{};
  op.type = type_of("query", query);
  op.queries = query.size(0), op.slots = keys.size(0), op.width = query.size(1), op.groups = groups, op.k = k;
  op.query = query.data_ptr(), op.keys = keys.data_ptr();
  op.mask_prob = mask_prob, op.seed = static_cast<uint64_t>(seed);
  Tensor selected = empty(ScalarType::Long, {op.queries, groups, std::min(k, op.slots)});
  op.selected = static_cast<int64_t*>(selected.data_ptr());
  kernels().key_loss(op, pool());
  const bool wide = op.type == Type::float64;
  Tensor loss = empty(wide ? ScalarType::Double : ScalarType::Float, {});
  if (wide) *static_cast<double*>(loss.data_ptr()) = op.loss;
  else *static_cast<float*>(loss.data_ptr()) = static_cast<float>(op.loss);
  return {loss, selected};
}

Tensor key_loss_backward(Tensor grad, Tensor query, Tensor keys, Tensor selected) {
  if (selected.dim() != 3) fail("selected: expected int64 [B, G, K], got ", shape_of(selected));
  check_pair(query, keys, 1, selected.size(1));
  check_like("selected", selected, ScalarType::Long, {query.size(0), selected.size(1), selected.size(2)});
  if (grad.numel() != 1 || !grad.is_cpu()) fail("grad: expected [], got ", shape_of(grad));
  query = dense(query), keys = dense(keys), selected = dense(selected);
  KeyLossBackward op{};
  op.type = type_of("query", query);
  op.queries = query.size(0), op.slots = keys.size(0), op.width = query.size(1), op.groups = selected.size(1);
  op.k = selected.size(2);
  op.query = query.data_ptr(), op.keys = keys.data_ptr();
  op.selected = static_cast<const int64_t*>(selected.data_ptr());
  for (int64_t i = 0; i < selected.numel(); ++i)
    if (op.selected[i] < -1 || op.selected[i] >= op.slots)
      fail("selected: expected -1..", op.slots - 1, ", got ", op.selected[i]);
  op.grad = grad.scalar_type() == ScalarType::Double ? *static_cast<const double*>(grad.data_ptr())
                                                     : *static_cast<const float*>(grad.data_ptr());
  Tensor grad_keys = empty(keys.scalar_type(), {op.slots, op.width});
  op.grad_keys = grad_keys.data_ptr();
  kernels().key_loss_backward(op, pool());
  return grad_keys;
}

}  // namespace slm_fast

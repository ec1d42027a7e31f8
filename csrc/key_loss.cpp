// CPU key_loss operators: check all arguments, then pass plain pointers to the kernel.
#include "check_pair.h"
#include "cpu/kernels.h"
#include "operators.h"
#include "tensor.h"
#include "torch_threads.h"

namespace slm_fast {

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
  kernels().key_loss(op, torch_threads());
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
  kernels().key_loss_backward(op, torch_threads());
  return grad_keys;
}

}  // namespace slm_fast

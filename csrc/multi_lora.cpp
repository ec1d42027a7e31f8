// CPU multi_lora operators and adapted_linear: check all arguments, then pass plain pointers to the kernel.
#include "cpu/kernels.h"
#include "operators.h"
#include "tensor.h"
#include "torch_threads.h"

namespace slm_fast {
namespace {

Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// Checks everything but base and y. The tensors must outlive the result.
MultiLora checked(
    const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Tensor& slot_ids, const Tensor& weights) {
  MultiLora op{};
  op.type = type_of("x", x);
  const ScalarType dtype = x.scalar_type();
  if (x.dim() != 3 || !x.is_cpu()) fail("x: expected [B, T, I] on cpu, got ", shape_of(x));
  if (lora_a.dim() != 3) fail("lora_a: expected [P, r, I], got ", shape_of(lora_a));
  if (lora_b.dim() != 3) fail("lora_b: expected [P, r, O], got ", shape_of(lora_b));
  if (slot_ids.dim() != 2) fail("slot_ids: expected int64 [B, K], got ", shape_of(slot_ids));
  op.samples = x.size(0), op.tokens = x.size(1), op.features_in = x.size(2);
  op.slots = lora_a.size(0), op.rank = lora_a.size(1), op.features_out = lora_b.size(2), op.picks = slot_ids.size(1);
  check_like("lora_a", lora_a, dtype, {op.slots, op.rank, op.features_in});
  check_like("lora_b", lora_b, dtype, {op.slots, op.rank, op.features_out});
  check_like("slot_ids", slot_ids, ScalarType::Long, {op.samples, op.picks});
  op.weights_are_double = dtype == ScalarType::Double && weights.scalar_type() == ScalarType::Double;
  check_like("weights", weights, op.weights_are_double ? ScalarType::Double : ScalarType::Float, {op.samples, op.picks});

  op.slot_ids = static_cast<const int64_t*>(slot_ids.data_ptr());
  int64_t lowest = 0, highest = -1;
  for (int64_t i = 0; i < op.samples * op.picks; ++i) {
    lowest = std::min(lowest, op.slot_ids[i]);
    highest = std::max(highest, op.slot_ids[i]);
  }
  if (lowest < -1 || highest >= op.slots)
    fail("slot_ids: expected -1..", op.slots - 1, ", got ", lowest, "..", highest);
  op.x = rows_of(x);
  op.lora_a = lora_a.data_ptr(), op.lora_b = lora_b.data_ptr(), op.weights = weights.data_ptr();
  return op;
}

// base is written, so its elements must not overlap each other or any input.
void check_writable(const Tensor& base, const std::initializer_list<std::pair<const char*, const Tensor*>>& read) {
  const int64_t B = base.size(0), T = base.size(1), O = base.size(2);
  const int64_t sample = base.stride(0), token = base.stride(1);
  if (B == 0 || T == 0 || O == 0) return;
  if (O > 1 && base.stride(2) != 1) fail("base: expected a dense last axis, got stride ", base.stride(2));
  const bool by_sample = (T == 1 || token >= O) && (B == 1 || sample >= (T - 1) * token + O);
  const bool by_token = (B == 1 || sample >= O) && (T == 1 || token >= (B - 1) * sample + O);
  if (!by_sample && !by_token) fail("base: rows overlap in memory, strides [", sample, ", ", token, ", 1]");
  for (const auto& [name, tensor] : read)
    if (overlap(base, *tensor)) fail("base: overlaps ", name, " in memory");
}

}  // namespace

Tensor adapted_linear(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights) {
  x = dense_rows(x), lora_a = dense(lora_a), lora_b = dense(lora_b), slot_ids = dense(slot_ids);
  weight = dense(weight), weights = dense(weights);
  AdaptedLinear op{};
  MultiLora& lora = op.increments = checked(x, lora_a, lora_b, slot_ids, weights);
  check_like("weight", weight, x.scalar_type(), {lora.features_out, lora.features_in});
  if (bias) {
    check_like("bias", *bias, x.scalar_type(), {lora.features_out});
    bias = dense(*bias);
  }
  constexpr int64_t kColumns = 32;
  if (lora.type != Type::bfloat16 || lora.features_in == 0 || lora.features_in % kColumns || lora.features_out % kColumns)
    fail("x: expected torch.bfloat16 with features in multiples of ", kColumns, ", got ", name_of(x.scalar_type()), " ",
         shape_of(x), " to ", lora.features_out, " features");
  if (std::string(kernels().name) != "amx") fail("adapted_linear: expected a processor with AMX, got ", kernels().name);
  op.weight = weight.data_ptr(), op.bias = bias ? bias->data_ptr() : nullptr;
  Tensor y = empty(x.scalar_type(), {lora.samples, lora.tokens, lora.features_out});
  lora.y = rows_of(y);
  kernels().adapted_linear(op, torch_threads());
  return y;
}

Tensor multi_lora(
    Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::optional<Tensor> base) {
  x = dense_rows(x), lora_a = dense(lora_a), lora_b = dense(lora_b), slot_ids = dense(slot_ids);
  weights = dense(weights);
  MultiLora op = checked(x, lora_a, lora_b, slot_ids, weights);
  if (base) {
    check_like("base", *base, x.scalar_type(), {op.samples, op.tokens, op.features_out});
    base = dense_rows(*base);
    op.base = rows_of(*base);
  }
  Tensor y = empty(x.scalar_type(), {op.samples, op.tokens, op.features_out});
  op.y = rows_of(y);
  kernels().multi_lora(op, torch_threads());
  return y;
}

void multi_lora_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor base) {
  x = dense_rows(x), lora_a = dense(lora_a), lora_b = dense(lora_b), slot_ids = dense(slot_ids);
  weights = dense(weights);
  MultiLora op = checked(x, lora_a, lora_b, slot_ids, weights);
  check_like("base", base, x.scalar_type(), {op.samples, op.tokens, op.features_out});
  check_writable(
      base, {{"x", &x}, {"lora_a", &lora_a}, {"lora_b", &lora_b}, {"slot_ids", &slot_ids}, {"weights", &weights}});
  op.base = op.y = rows_of(base);
  kernels().multi_lora(op, torch_threads());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> multi_lora_backward(
    Tensor grad, Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::vector<bool> needed) {
  if (needed.size() != 4) fail("needed: expected 4 flags, got ", needed.size());
  x = dense_rows(x), lora_a = dense(lora_a), lora_b = dense(lora_b), slot_ids = dense(slot_ids);
  weights = dense(weights);
  MultiLoraBackward op{};
  op.forward = checked(x, lora_a, lora_b, slot_ids, weights);
  check_like("grad", grad, x.scalar_type(), {op.forward.samples, op.forward.tokens, op.forward.features_out});
  grad = dense_rows(grad);
  op.grad = rows_of(grad);
  auto wanted = [&](size_t which, const Tensor& like, void*& to) {
    const auto shape = like.sizes();
    std::vector<int64_t> sizes(needed[which] ? shape.size() : 1);  // [0] if no gradient is wanted
    if (needed[which]) std::copy(shape.begin(), shape.end(), sizes.begin());
    Tensor made = empty(like.scalar_type(), sizes);
    to = needed[which] ? made.data_ptr() : nullptr;
    return made;
  };
  Tensor grad_x = wanted(0, x, op.grad_x), grad_a = wanted(1, lora_a, op.grad_a);
  Tensor grad_b = wanted(2, lora_b, op.grad_b), grad_weights = wanted(3, weights, op.grad_weights);
  kernels().multi_lora_backward(op, torch_threads());
  return {grad_x, grad_a, grad_b, grad_weights};
}

}  // namespace slm_fast

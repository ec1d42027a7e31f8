// GPU operators: check all arguments, then pass device pointers and torch's stream to the launchers.
#include "operators.h"

#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>

#include "cuda/boxes.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/torch_cuda.h"
#include "tensor.h"

namespace slm_fast::cuda {
namespace {

void check(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes, int device) {
  const bool shaped = tensor.dim() == static_cast<int64_t>(sizes.size()) &&
                      std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin());
  if (shaped && tensor.scalar_type() == type && tensor.is_cuda() && tensor.get_device_index() == device) return;
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  fail(
      name, ": expected ", name_of(type), " [", expected, "] on cuda:", device, ", got ", name_of(tensor.scalar_type()),
      " ", shape_of(tensor), tensor.is_cuda() ? "" : " elsewhere");
}

// Contiguous and 16-byte aligned.
Tensor readable(const Tensor& tensor) {
  const Tensor whole = dense(tensor);
  return reinterpret_cast<uintptr_t>(whole.data_ptr()) % 16 ? torch::stable::clone(whole) : whole;
}

void done(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("slm_fast: CUDA: ") + cudaGetErrorString(status));
}

// A GPU's properties, queried once.
struct Card {
  int multiprocessors = 0, major = 0, most_shared = 0;

  static const Card& of(int device) {
    static std::mutex mutex;
    static std::map<int, Card> cards;
    const std::lock_guard guard(mutex);
    const auto [at, is_new] = cards.try_emplace(device);
    Card& card = at->second;
    if (is_new || card.multiprocessors == 0) {
      done(cudaDeviceGetAttribute(&card.major, cudaDevAttrComputeCapabilityMajor, device));
      done(cudaDeviceGetAttribute(&card.most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
      done(cudaDeviceGetAttribute(&card.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    }
    return card;
  }
};

// Makes the tensor's device current during its lifetime.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  const Card& card;

  explicit OnDevice(int device)
      : guard(device), stream(static_cast<cudaStream_t>(current_stream(device))), card(Card::of(device)) {}
};

Tensor like(const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(tensor, sizes, type);
}

}  // namespace

namespace {

// Computes y, which may alias base.
void add_increments(
    const Tensor& given_x, const Tensor& given_a, const Tensor& given_b, const Tensor& given_ids,
    const Tensor& given_weights, const std::optional<Tensor>& given_base, const Tensor* given_y, Tensor& y) {
  const ScalarType type = given_x.scalar_type();
  const Type kind = type_of("x", given_x);
  if (given_x.dim() != 3 || !given_x.is_cuda()) fail("x: expected [B, T, I] on cuda, got ", shape_of(given_x));
  if (given_a.dim() != 3) fail("lora_a: expected [P, r, I], got ", shape_of(given_a));
  if (given_b.dim() != 3) fail("lora_b: expected [P, r, O], got ", shape_of(given_b));
  if (given_ids.dim() != 2) fail("slot_ids: expected int64 [B, K], got ", shape_of(given_ids));
  const int device = given_x.get_device_index();
  const int64_t samples = given_x.size(0), tokens = given_x.size(1), features_in = given_x.size(2);
  const int64_t slots = given_a.size(0), rank = given_a.size(1), features_out = given_b.size(2);
  const int64_t picks = given_ids.size(1), columns = picks * rank;
  check("lora_a", given_a, type, {slots, rank, features_in}, device);
  check("lora_b", given_b, type, {slots, rank, features_out}, device);
  check("slot_ids", given_ids, ScalarType::Long, {samples, picks}, device);
  check("weights", given_weights, ScalarType::Float, {samples, picks}, device);
  if (given_base) check("base", *given_base, type, {samples, tokens, features_out}, device);
  const bool one_row = tokens == 1 && columns <= kMostRank && samples <= 65535 && kind != Type::float64;
  const bool narrow = columns <= kMostColumns && (kind == Type::bfloat16 || kind == Type::float16);
  if (features_in % kPiece != 0 || features_out % kPiece != 0 || !(one_row || narrow))
    fail("x: expected features in eights, and one token a route or 16-bit numbers and at most ", kMostColumns,
         " rows of rank, got ", name_of(type), " ", shape_of(given_x), " and ", columns);

  const OnDevice on(device);
  const Tensor x = readable(given_x), lora_a = readable(given_a), lora_b = readable(given_b);
  const Tensor slot_ids = dense(given_ids), weights = dense(given_weights);
  std::optional<Tensor> base;
  if (given_base) base = readable(*given_base);
  y = given_y ? *given_y : like(x, {samples, tokens, features_out}, type);
  if (samples * tokens * features_out == 0) return;
  const bool clusters = on.card.major >= 9;
  const auto fill = [&](auto& op) {
    op.type = kind, op.picks = picks, op.slots = slots, op.rank = rank;
    op.features_in = features_in, op.features_out = features_out;
    op.x = x.data_ptr(), op.lora_a = lora_a.data_ptr(), op.lora_b = lora_b.data_ptr(), op.y = y.data_ptr();
    op.base = base ? base->data_ptr() : nullptr;
    op.slot_ids = static_cast<const int64_t*>(slot_ids.data_ptr());
    op.weights = static_cast<const float*>(weights.data_ptr());
  };
  // Scratch for GPUs whose blocks cannot read each other's memory.
  std::optional<Tensor> partial;
  const auto scratch = [&](int64_t numbers) -> float* {
    if (clusters) return nullptr;
    partial = like(x, {numbers}, ScalarType::Float);
    return static_cast<float*>(partial->data_ptr());
  };
  if (one_row) {
    Decode op{};
    fill(op);
    op.rows = samples, op.blocks = decode_blocks(samples, features_in, features_out, on.card.multiprocessors);
    op.partial = scratch(samples * op.blocks * columns);
    done(decode(op, clusters, on.stream));
    return;
  }
  Adapt op{};
  fill(op);
  const TokenCut cut =
      cut_tokens(samples, tokens, columns, features_in, features_out, on.card.multiprocessors, on.card.most_shared);
  op.samples = samples, op.tokens = tokens, op.tile = cut.tile, op.blocks = cut.blocks;
  op.partial = scratch(samples * blocks_of(tokens, cut.tile) * cut.blocks * token_sums(columns));
  done(adapt(op, clusters, on.stream));
}

}  // namespace

Tensor multi_lora(
    Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::optional<Tensor> base) {
  Tensor y;
  add_increments(x, lora_a, lora_b, slot_ids, weights, base, nullptr, y);
  return y;
}

void multi_lora_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, Tensor base) {
  if (!base.is_contiguous() || reinterpret_cast<uintptr_t>(base.data_ptr()) % 16) fail("base: expected dense rows");
  for (const Tensor* other : {&x, &lora_a, &lora_b, &slot_ids, &weights})
    if (overlap(base, *other)) fail("base: shares memory with another argument");
  Tensor y;
  add_increments(x, lora_a, lora_b, slot_ids, weights, base, &base, y);
}

Tensor adapted_linear(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights) {
  const ScalarType type = ScalarType::BFloat16;
  if (x.dim() != 3 || !x.is_cuda()) fail("x: expected [B, T, I] on cuda, got ", shape_of(x));
  if (lora_a.dim() != 3) fail("lora_a: expected [P, r, I], got ", shape_of(lora_a));
  if (lora_b.dim() != 3) fail("lora_b: expected [P, r, O], got ", shape_of(lora_b));
  if (slot_ids.dim() != 2) fail("slot_ids: expected int64 [B, K], got ", shape_of(slot_ids));
  const int device = x.get_device_index();
  FusedOnDevice on_device{};
  AdaptedLinear& op = on_device.call;
  op.samples = x.size(0), op.tokens = x.size(1), op.features_in = x.size(2), op.features_out = lora_b.size(2);
  op.slots = lora_a.size(0), op.rank = lora_a.size(1), op.picks = slot_ids.size(1);
  check("x", x, type, {op.samples, op.tokens, op.features_in}, device);
  check("weight", weight, type, {op.features_out, op.features_in}, device);
  if (bias) check("bias", *bias, type, {op.features_out}, device);
  check("lora_a", lora_a, type, {op.slots, op.rank, op.features_in}, device);
  check("lora_b", lora_b, type, {op.slots, op.rank, op.features_out}, device);
  check("slot_ids", slot_ids, ScalarType::Long, {op.samples, op.picks}, device);
  check("weights", weights, ScalarType::Float, {op.samples, op.picks}, device);
  const int64_t rows = op.samples * op.tokens;
  Tensor y = like(x, {op.samples, op.tokens, op.features_out}, type);
  if (rows * op.features_out == 0) return y;
  const int64_t spans = fused_spans(op.tokens), columns = spans * op.picks * op.rank;
  if (op.features_in % kPiece != 0 || op.features_out % kPiece != 0 || op.features_in == 0 || op.slots == 0 ||
      columns == 0 || columns > kMostFusedColumns || spans * op.picks > kMostFusedPicks ||
      std::max({rows, op.features_in, op.features_out, op.slots}) > kMostFusedRows)
    fail("x: expected features in eights, and at most ", kMostFusedPicks, " slots with ", kMostFusedColumns,
         " rows of rank for 128 tokens, got ", shape_of(x), " and ", spans, " times ", op.picks, " slots of rank ", op.rank);

  const OnDevice on(device);
#if defined(SLM_FAST_SM_90A)
  if (on.card.major != 9) fail("x: expected a GPU of compute capability 9.0, got ", on.card.major, ".x");
#else
  fail("x: the CUDA operators were built without sm_90a");
#endif
  x = readable(x), weight = readable(weight), lora_a = readable(lora_a), lora_b = readable(lora_b);
  slot_ids = dense(slot_ids), weights = dense(weights);
  if (bias) bias = readable(*bias);
  op.x = x.data_ptr(), op.weight = weight.data_ptr(), op.bias = bias ? bias->data_ptr() : nullptr, op.y = y.data_ptr();
  op.lora_a = lora_a.data_ptr(), op.lora_b = lora_b.data_ptr();
  op.slot_ids = static_cast<const int64_t*>(slot_ids.data_ptr());
  op.weights = static_cast<const float*>(weights.data_ptr());
  on_device.spans = static_cast<int>(spans);
  on_device.cut = cut_fused(rows, columns, op.features_in, op.features_out, on.card.multiprocessors);
  on_device.x = boxes_of(op.x, op.features_in, rows, 1, kFusedTokens);
  on_device.weight = boxes_of(op.weight, op.features_in, op.features_out, 1, on_device.cut.width / 2);
  on_device.a = boxes_of(op.lora_a, op.features_in, op.rank, op.slots, op.rank);
  on_device.b = boxes_of(op.lora_b, op.features_out, op.rank, op.slots, op.rank);
  done(adapted_linear(on_device, on.stream));
  return y;
}

std::tuple<Tensor, Tensor> retrieve(
    Tensor query, Tensor keys, int64_t k, int64_t groups, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::string metric, std::string aggregate, std::string weighting, double temperature,
    std::optional<Tensor> key_slot) {
  RetrieveOnDevice on_device{};
  Retrieve& op = on_device.call;
  const ScalarType type = query.scalar_type();
  op.type = type_of("query", query);
  if (op.type == Type::float64) fail("query: expected at most float32, got ", name_of(type));
  if (query.dim() != 2 || !query.is_cuda()) fail("query: expected [B, D] on cuda, got ", shape_of(query));
  if (keys.dim() != 2) fail("keys: expected [P, ", query.size(1), "], got ", shape_of(keys));
  const int device = query.get_device_index();
  op.queries = query.size(0), op.width = query.size(1), op.slots = keys.size(0), op.groups = groups, op.k = k;
  check("keys", keys, type, {op.slots, op.width}, device);
  if (groups < 1 || op.width % groups != 0) fail("groups: expected a divisor of ", op.width, ", got ", groups);
  if (k < 1 || k > kMostPicks) fail("k: expected 1..", kMostPicks, ", got ", k);
  if (aggregate != "mean") fail("aggregate: expected 'mean', got '", aggregate, "'");
  op.cosine = metric == "cosine";
  if (!op.cosine && groups != 1) fail("metric: groups go with 'cosine', got '", metric, "'");
  op.softmax = weighting == "softmax", op.temperature = temperature;

  const OnDevice on(device);
  query = dense(query), keys = dense(keys);
  if (bias) {
    check("bias", *bias, bias->scalar_type(), {op.slots}, device);
    bias = dense(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
    op.bias = static_cast<const float*>(bias->data_ptr());
  }
  op.mask_slots = op.slots;
  if (key_slot) {
    check("key_slot", *key_slot, ScalarType::Long, {op.slots}, device);
    key_slot = dense(*key_slot);
    op.key_slot = static_cast<const int64_t*>(key_slot->data_ptr());
    op.mask_slots = mask && mask->dim() > 0 ? mask->size(mask->dim() - 1) : kMostSlots;
  }
  if (op.slots > kMostSlots || op.mask_slots > kMostSlots) fail("keys: expected at most ", kMostSlots, " slots");
  if (mask) {
    op.mask_per_query = mask->dim() == 2;
    if (op.mask_per_query) check("mask", *mask, ScalarType::Bool, {op.queries, op.mask_slots}, device);
    else check("mask", *mask, ScalarType::Bool, {op.mask_slots}, device);
    mask = dense(*mask);
    op.mask = static_cast<const bool*>(mask->data_ptr());
  }
  Tensor slot_ids = like(query, {op.queries, k}, ScalarType::Long), weights = like(query, {op.queries, k}, ScalarType::Float);
  if (op.queries == 0) return {slot_ids, weights};
  op.query = query.data_ptr(), op.keys = keys.data_ptr();
  op.slot_ids = static_cast<int64_t*>(slot_ids.data_ptr()), op.weights = static_cast<float*>(weights.data_ptr());
  const auto by_fours = [&](const void* rows) {
    return reinterpret_cast<uintptr_t>(rows) % (4 * query.element_size()) == 0;
  };
  on_device.whole = op.width / groups % 4 == 0 && by_fours(op.query) && by_fours(op.keys);
  on_device.early = on.card.major >= 9;
  on_device.cut = cut_retrieve(
      op.queries, op.slots, op.width, groups, k, on_device.whole, on.card.multiprocessors, on.card.most_shared);
  Tensor scratch = like(query, {scratch_longs(on_device.cut, op.queries, op.slots, k)}, ScalarType::Long);
  on_device.scratch = scratch.data_ptr();
  done(retrieve(on_device, on.stream));
  return {slot_ids, weights};
}

}  // namespace slm_fast::cuda

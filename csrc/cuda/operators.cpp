// The operators on a GPU: check every argument, then hand device pointers and torch's stream to the launchers.
#include "operators.h"

#include <torch/csrc/stable/accelerator.h>

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

// Dense, and on an address that 16-byte reads may use.
Tensor readable(const Tensor& tensor) {
  const Tensor whole = dense(tensor);
  return reinterpret_cast<uintptr_t>(whole.data_ptr()) % 16 ? torch::stable::clone(whole) : whole;
}

// The tensor's device is the current one as long as this lives.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  int multiprocessors = 0, major = 0;

  explicit OnDevice(int device) : guard(device), stream(current_stream(device)) {
    done(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    done(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  }

  static void done(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("slm_fast: CUDA: ") + cudaGetErrorString(status));
  }
};

Tensor like(const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(tensor, sizes, type);
}

}  // namespace

Tensor multi_lora(
    Tensor x, Tensor lora_a, Tensor lora_b, Tensor slot_ids, Tensor weights, std::optional<Tensor> base) {
  Decode op{};
  const ScalarType type = x.scalar_type();
  op.type = type_of("x", x);
  if (op.type == Type::float64) fail("x: expected at most float32, got ", name_of(type));
  if (x.dim() != 3 || x.size(1) != 1 || !x.is_cuda()) fail("x: expected [B, 1, I] on cuda, got ", shape_of(x));
  if (lora_a.dim() != 3) fail("lora_a: expected [P, r, I], got ", shape_of(lora_a));
  if (lora_b.dim() != 3) fail("lora_b: expected [P, r, O], got ", shape_of(lora_b));
  if (slot_ids.dim() != 2) fail("slot_ids: expected int64 [B, K], got ", shape_of(slot_ids));
  const int device = x.get_device_index();
  op.rows = x.size(0), op.features_in = x.size(2), op.slots = lora_a.size(0), op.rank = lora_a.size(1);
  op.features_out = lora_b.size(2), op.picks = slot_ids.size(1);
  check("lora_a", lora_a, type, {op.slots, op.rank, op.features_in}, device);
  check("lora_b", lora_b, type, {op.slots, op.rank, op.features_out}, device);
  check("slot_ids", slot_ids, ScalarType::Long, {op.rows, op.picks}, device);
  check("weights", weights, ScalarType::Float, {op.rows, op.picks}, device);
  if (base) check("base", *base, type, {op.rows, 1, op.features_out}, device);
  if (op.features_in % kPiece != 0 || op.features_out % kPiece != 0 || op.picks * op.rank > kMostRank || op.rows > 65535)
    fail("x: expected features in eights, at most ", kMostRank, " rows of rank and 65535 routes, got ", shape_of(x));

  const OnDevice on(device);
  x = readable(x), lora_a = readable(lora_a), lora_b = readable(lora_b), slot_ids = dense(slot_ids);
  weights = dense(weights);
  Tensor y = like(x, {op.rows, 1, op.features_out}, type);
  if (base) base = readable(*base);
  if (op.rows == 0 || op.features_out == 0) return y;
  op.x = x.data_ptr(), op.lora_a = lora_a.data_ptr(), op.lora_b = lora_b.data_ptr(), op.y = y.data_ptr();
  op.base = base ? base->data_ptr() : nullptr;
  op.slot_ids = static_cast<const int64_t*>(slot_ids.data_ptr());
  op.weights = static_cast<const float*>(weights.data_ptr());
  op.blocks = decode_blocks(op.rows, op.features_in, op.features_out, on.multiprocessors);
  const bool clusters = on.major >= 9;
  Tensor partial = like(x, {clusters ? 0 : op.rows * op.blocks * op.picks * op.rank}, ScalarType::Float);
  op.partial = static_cast<float*>(partial.data_ptr());
  OnDevice::done(decode(op, clusters, static_cast<cudaStream_t>(on.stream)));
  return y;
}

std::tuple<Tensor, Tensor> retrieve(
    Tensor query, Tensor keys, int64_t k, int64_t groups, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::string metric, std::string aggregate, std::string weighting, double temperature) {
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
  op.cosine = metric == "cosine", op.softmax = weighting == "softmax", op.temperature = temperature;

  const OnDevice on(device);
  query = dense(query), keys = dense(keys);
  if (bias) {
    check("bias", *bias, bias->scalar_type(), {op.slots}, device);
    bias = dense(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
    op.bias = static_cast<const float*>(bias->data_ptr());
  }
  if (mask) {
    op.mask_per_query = mask->dim() == 2;
    if (op.mask_per_query) check("mask", *mask, ScalarType::Bool, {op.queries, op.slots}, device);
    else check("mask", *mask, ScalarType::Bool, {op.slots}, device);
    mask = dense(*mask);
    op.mask = static_cast<const bool*>(mask->data_ptr());
  }
  Tensor slot_ids = like(query, {op.queries, k}, ScalarType::Long), weights = like(query, {op.queries, k}, ScalarType::Float);
  if (op.queries == 0) return {slot_ids, weights};
  op.query = query.data_ptr(), op.keys = keys.data_ptr();
  op.slot_ids = static_cast<int64_t*>(slot_ids.data_ptr()), op.weights = static_cast<float*>(weights.data_ptr());
  const int64_t vector = 16 / static_cast<int64_t>(query.element_size()), d = op.width / groups;
  const bool whole = d % vector == 0 && op.width % vector == 0 && reinterpret_cast<uintptr_t>(op.keys) % 16 == 0;
  on_device.vector = whole ? static_cast<int>(vector) : 1;
  const RetrieveCut cut = cut_retrieve(op.queries, op.slots, op.width, groups, on_device.vector, on.multiprocessors);
  if (cut.shared > kMostShared) fail("query: ", groups, " groups of ", d, " numbers are too wide");
  on_device.tiles = cut.tiles, on_device.splits = cut.splits, on_device.span = cut.span, on_device.shared = cut.shared;
  Tensor parts = like(query, {cut.splits > 1 ? cut.splits * op.queries * k : 0}, ScalarType::Long);
  on_device.parts = static_cast<int64_t*>(parts.data_ptr());
  OnDevice::done(retrieve(on_device, static_cast<cudaStream_t>(on.stream)));
  return {slot_ids, weights};
}

}  // namespace slm_fast::cuda

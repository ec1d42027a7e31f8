// key_loss and its gradient, as specified in slm_fast/ops/key_loss.py.
#include "../calls.h"
#include "buffer.h"
#include "search.h"

namespace slm_fast::SLM_ISA {

inline uint64_t splitmix64(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EB;
  return h ^ (h >> 31);
}

// The random mask of Eq. 7; see `hidden_slots` in the reference. `any` stays true: many keys are hardly ever all hidden.
struct Shown final : Allowed {
  int64_t groups, slots;
  uint64_t seed;
  double mask_prob;
  explicit Shown(const KeyLoss& op)
      : Allowed(true), groups(op.groups), slots(op.slots), seed(op.seed), mask_prob(op.mask_prob) {}
  bool slot(int64_t b, int64_t g, int64_t p) const override {
    const auto index = static_cast<uint64_t>((b * groups + g) * slots + p);
    const uint64_t h = splitmix64(seed + 0x9E3779B97F4A7C15 * (1 + index));
    return !(static_cast<double>(h >> 40) * 0x1p-24 < mask_prob);
  }
};

template <class T>
void key_loss_as(KeyLoss& op, const Threads& threads) {
  const int64_t G = op.groups, P = op.slots, K = std::min(op.k, P);
  const Search asked{op.queries, P, op.width, G, K, op.query, op.keys, nullptr, nullptr, true, true};
  Buffer<double> sums(op.queries * G);
  Buffer<int64_t> counts(op.queries * G);
  search<T>(asked, threads, Shown(op), [&](int64_t b, int64_t g, const Ranked* best, int64_t count) {
    const int64_t d = op.width / G;
    const T* query = static_cast<const T*>(op.query) + b * op.width + g * d;
    const double length = exact_length(query, d);
    double sum = 0;
    for (int64_t i = 0; i < K; ++i) op.selected[(b * G + g) * K + i] = i < count ? slot_of(best[i]) : -1;
    for (int64_t i = 0; i < count; ++i)
      sum += exact_cosine(query, length, static_cast<const T*>(op.keys) + slot_of(best[i]) * op.width + g * d, d);
    sums[b * G + g] = sum, counts[b * G + g] = count;
  });
  double total = 0;
  int64_t found = 0;
  for (int64_t i = 0; i < op.queries * G; ++i) total += sums[i], found += counts[i];
  op.loss = -total / static_cast<double>(std::max<int64_t>(1, found));
}

void key_loss(KeyLoss& op, const Threads& threads) {
  switch (op.type) {
    case Type::float32: return key_loss_as<float>(op, threads);
    case Type::float64: return key_loss_as<double>(op, threads);
    case Type::float16: return key_loss_as<Float16>(op, threads);
    case Type::bfloat16: return key_loss_as<BFloat16>(op, threads);
  }
}

// d loss / d key[g] = -grad / found * sum over selected (query^ - cos key^) / |key|, with unit vectors query^ and key^.
// One thread owns a group and adds the queries in order.
template <class T>
void key_loss_backward_as(const KeyLossBackward& op, const Threads& threads) {
  const int64_t G = op.groups, P = op.slots, K = op.k, d = op.width / G;
  int64_t found = 0;
  for (int64_t i = 0; i < op.queries * G * K; ++i) found += op.selected[i] >= 0;
  const double scale = -op.grad / static_cast<double>(std::max<int64_t>(1, found));
  threads.for_each(G, 4.0 * static_cast<double>(op.queries * K + P) * op.width > 3e5, [&] {
    return [&, towards = Buffer<double>(P * d), along = Buffer<double>(P)](int64_t g) mutable {
      std::fill_n(towards.data(), P * d, 0.0);  // [P, d] sum of query^
      std::fill_n(along.data(), P, 0.0);        // [P] sum of cosines
      for (int64_t b = 0; b < op.queries; ++b) {
        const T* query = static_cast<const T*>(op.query) + b * op.width + g * d;
        const double length = exact_length(query, d), inverse = length > kEpsilon ? 1 / length : 0;
        for (int64_t i = 0; i < K; ++i) {
          const int64_t p = op.selected[(b * G + g) * K + i];
          if (p < 0) continue;
          along[p] += exact_cosine(query, length, static_cast<const T*>(op.keys) + p * op.width + g * d, d);
          for (int64_t j = 0; j < d; ++j) towards[p * d + j] += widen<double>(query[j]) * inverse;
        }
      }
      for (int64_t p = 0; p < P; ++p) {
        const T* key = static_cast<const T*>(op.keys) + p * op.width + g * d;
        T* to = static_cast<T*>(op.grad_keys) + p * op.width + g * d;
        const double length = exact_length(key, d), factor = length > kEpsilon ? scale / length : 0;
        for (int64_t j = 0; j < d; ++j) {
          const double outward = length > kEpsilon ? along[p] * widen<double>(key[j]) / length : 0;
          to[j] = narrow<T>(factor * (towards[p * d + j] - outward));
        }
      }
    };
  });
}

void key_loss_backward(const KeyLossBackward& op, const Threads& threads) {
  switch (op.type) {
    case Type::float32: return key_loss_backward_as<float>(op, threads);
    case Type::float64: return key_loss_backward_as<double>(op, threads);
    case Type::float16: return key_loss_backward_as<Float16>(op, threads);
    case Type::bfloat16: return key_loss_backward_as<BFloat16>(op, threads);
  }
}

}  // namespace slm_fast::SLM_ISA

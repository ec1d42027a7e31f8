// retrieve, key_loss and its gradient. See slm_fast/ops/retrieve.py for what they compute.
#include "retrieve.h"

#include <limits>

namespace slm_fast::SLM_ISA {

// ---- retrieve ----

// Vote: the sum, over the groups that kept a slot, of its cosines there.
template <class S>
int64_t gather_votes(S& searcher, const Retrieve& op, int64_t query, Candidate<float>* votes) {
  int64_t count = 0;
  for (int64_t g = 0; g < op.groups; ++g) {
    const Best<float> best = searcher.best(query, g);
    for (int64_t i = 0; i < best.count; ++i) votes[count++] = best.kept[i];
    // Stable, so that a slot's cosines are added in the order of groups.
    std::inplace_merge(
        votes, votes + count - best.count, votes + count,
        [](const Candidate<float>& a, const Candidate<float>& b) { return a.id < b.id; });
  }
  int64_t slots = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (slots > 0 && votes[slots - 1].id == votes[i].id) {
      votes[slots - 1].score += votes[i].score;
    } else {
      votes[slots++] = votes[i];
    }
  }
  for (int64_t i = 0; i < slots; ++i) votes[i].score /= static_cast<float>(op.groups);
  return slots;
}

// One query's output row: ids by falling score, their weights, then -1 and 0.
void write_route(const Retrieve& op, const Candidate<float>* best, int64_t count, int64_t* ids, float* weights) {
  float total = 0, highest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < op.k; ++i) {
    ids[i] = i < count ? best[i].id : -1;
    weights[i] = 0;
    if (i >= count) continue;
    // Not std::max: a NaN has to come through.
    weights[i] = op.softmax ? best[i].score / static_cast<float>(op.temperature) : best[i].score < 0 ? 0 : best[i].score;
    highest = weights[i] > highest || std::isnan(weights[i]) ? weights[i] : highest;
    total += weights[i];
  }
  if (op.softmax) {
    total = 0;
    for (int64_t i = 0; i < count; ++i) total += weights[i] = std::exp(weights[i] - highest);
  }
  for (int64_t i = 0; i < count; ++i)
    weights[i] = op.softmax || total > 0 ? weights[i] / total : 1 / static_cast<float>(count);
}

template <class T>
void retrieve_as(const Retrieve& op, const Pool& pool) {
  Search search{op.queries, op.slots, op.width, op.groups, std::min(op.k, std::max<int64_t>(1, op.slots)),
                op.query,   op.keys,  op.bias,  op.cosine, op.vote};
  Searcher<T, float> searcher(search, pool);
  const bool* mask = op.mask;
  if (!mask) {
    searcher.run([](int64_t, int64_t, int64_t) { return true; });
  } else {
    const int64_t row = op.mask_per_query ? op.slots : 0;
    searcher.run([mask, row](int64_t query, int64_t, int64_t slot) { return mask[query * row + slot]; });
  }
  Buffer<Candidate<float>> votes(op.vote ? op.groups * search.k : 0);
  for (int64_t q = 0; q < op.queries; ++q) {
    int64_t* ids = op.slot_ids + q * op.k;
    float* weights = op.weights + q * op.k;
    if (op.vote) {
      const int64_t slots = gather_votes(searcher, op, q, votes.data()), count = std::min(slots, op.k);
      std::sort(votes.data(), votes.data() + slots, better<float>);
      write_route(op, votes.data(), count, ids, weights);
    } else {
      const Best<float> best = searcher.best(q, 0);
      write_route(op, best.kept, best.count, ids, weights);
    }
  }
}

// The first query with a number that is not finite (in float32), or -1.
template <class T>
int64_t not_finite(const Retrieve& op) {
  constexpr uint32_t kExponent = 0x7f800000;
  for (int64_t q = 0; q < op.queries; ++q) {
    const T* row = static_cast<const T*>(op.query) + q * op.width;
    uint32_t found = 0;
    for (int64_t i = 0; i < op.width; ++i) found |= (float_to_bits(widen<float>(row[i])) & kExponent) == kExponent;
    if (found) return q;
  }
  return -1;
}

int64_t retrieve(const Retrieve& op, const Pool& pool) {
  auto run = [&]<class T>(T) {
    const int64_t bad = not_finite<T>(op);
    if (bad < 0) retrieve_as<T>(op, pool);
    return bad;
  };
  switch (op.type) {
    case Type::float32: return run(float{});
    case Type::float64: return run(double{});
    case Type::float16: return run(Float16{});
    case Type::bfloat16: return run(BFloat16{});
  }
  return -1;
}

// ---- key_loss ----

inline uint64_t splitmix64(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EB;
  return h ^ (h >> 31);
}

template <class T, class A>
void key_loss_as(KeyLoss& op, const Pool& pool) {
  const int64_t G = op.groups, P = op.slots, K = std::min(op.k, P);
  Search search{op.queries, P, op.width, G, std::max<int64_t>(1, K), op.query, op.keys, nullptr, true, true};
  Searcher<T, A> searcher(search, pool);
  const uint64_t seed = op.seed;
  const double mask_prob = op.mask_prob;
  searcher.run([=](int64_t b, int64_t g, int64_t p) {
    const auto index = static_cast<uint64_t>((b * G + g) * P + p);
    const uint64_t h = splitmix64(seed + 0x9E3779B97F4A7C15 * (1 + index));
    return !(static_cast<double>(h >> 40) * 0x1p-24 < mask_prob);
  });
  double total = 0;
  int64_t found = 0;
  for (int64_t b = 0; b < op.queries && K > 0; ++b)
    for (int64_t g = 0; g < G; ++g) {
      const Best<A> best = searcher.best(b, g);
      for (int64_t i = 0; i < K; ++i) op.selected[(b * G + g) * K + i] = i < best.count ? best.kept[i].id : -1;
      for (int64_t i = 0; i < best.count; ++i) total += static_cast<double>(best.kept[i].score);
      found += best.count;
    }
  op.loss = -total / static_cast<double>(std::max<int64_t>(1, found));
}

void key_loss(KeyLoss& op, const Pool& pool) {
  switch (op.type) {
    case Type::float32: return key_loss_as<float, float>(op, pool);
    case Type::float64: return key_loss_as<double, double>(op, pool);
    case Type::float16: return key_loss_as<Float16, float>(op, pool);
    case Type::bfloat16: return key_loss_as<BFloat16, float>(op, pool);
  }
}

// d loss / d key[g] = -grad / found * sum over selected (query^ - cos key^) / |key|, query^ and key^ of unit length.
template <class T, class A>
void key_loss_backward_as(const KeyLossBackward& op, const Pool& pool) {
  const int64_t G = op.groups, P = op.slots, K = op.k, d = op.width / G;
  int64_t found = 0;
  for (int64_t i = 0; i < op.queries * G * K; ++i) found += op.selected[i] >= 0;
  const A scale = static_cast<A>(-op.grad / static_cast<double>(std::max<int64_t>(1, found)));
  Buffer<A> towards(P * op.width), along(P * G);  // sums of query^ [P, G, d] and of cos [P, G]
  pool.for_each(G, 4.0 * op.queries * K * op.width > 3e5, [&] {
    return [&, query = Buffer<A>(d), key = Buffer<A>(d)](int64_t g) mutable {
      auto unit = [&](const void* rows, int64_t row, A* to) {
        const T* from = static_cast<const T*>(rows) + row * op.width + g * d;
        A length;
        group_lengths<A>(from, 1, d, &length);
        for (int64_t i = 0; i < d; ++i) to[i] = widen<A>(from[i]) / length;
        return length;
      };
      for (int64_t p = 0; p < P; ++p) {
        std::fill_n(towards.data() + p * op.width + g * d, d, A(0));
        along[p * G + g] = 0;
      }
      for (int64_t b = 0; b < op.queries; ++b) {
        unit(op.query, b, query.data());
        for (int64_t i = 0; i < K; ++i) {
          const int64_t p = op.selected[(b * G + g) * K + i];
          if (p < 0) continue;
          unit(op.keys, p, key.data());
          A* sum = towards.data() + p * op.width + g * d;
          A cosine = 0;
          for (int64_t j = 0; j < d; ++j) {
            cosine += query[j] * key[j];
            sum[j] += query[j];
          }
          along[p * G + g] += cosine;
        }
      }
      for (int64_t p = 0; p < P; ++p) {
        const A length = unit(op.keys, p, key.data()), factor = length > A(kEpsilon) ? scale / length : A(0);
        const A* sum = towards.data() + p * op.width + g * d;
        T* to = static_cast<T*>(op.grad_keys) + p * op.width + g * d;
        for (int64_t j = 0; j < d; ++j) to[j] = narrow<T>(factor * (sum[j] - along[p * G + g] * key[j]));
      }
    };
  });
}

void key_loss_backward(const KeyLossBackward& op, const Pool& pool) {
  switch (op.type) {
    case Type::float32: return key_loss_backward_as<float, float>(op, pool);
    case Type::float64: return key_loss_backward_as<double, double>(op, pool);
    case Type::float16: return key_loss_backward_as<Float16, float>(op, pool);
    case Type::bfloat16: return key_loss_backward_as<BFloat16, float>(op, pool);
  }
}

}  // namespace slm_fast::SLM_ISA

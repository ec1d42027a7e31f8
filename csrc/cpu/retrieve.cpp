// retrieve, key_loss and its gradient. See slm_fast/ops/retrieve.py for what they compute.
#include "search.h"

namespace slm_fast::SLM_ISA {

// ---- retrieve ----

// Vote: a slot's score is the sum, over the groups that kept it, of its cosines there, divided by G. `votes` holds the
// groups' lists one after another; the slots that come out are sorted.
int64_t add_votes(Ranked* votes, int64_t count, int64_t groups) {
  // Stable, so that a slot's cosines are added in the order of groups.
  std::stable_sort(votes, votes + count, [](Ranked a, Ranked b) { return slot_of(a) < slot_of(b); });
  int64_t slots = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t slot = slot_of(votes[i]);
    float sum = 0;
    for (; i < count && slot_of(votes[i]) == slot; ++i) sum += score_of(votes[i]);
    votes[slots++] = ranked(sum / static_cast<float>(groups), slot);
  }
  std::sort(votes, votes + slots, Better{});
  return slots;
}

// One query's output row: ids by falling score, their weights, then -1 and 0.
void write_route(const Retrieve& op, const Ranked* best, int64_t count, int64_t query) {
  int64_t* ids = op.slot_ids + query * op.k;
  float* weights = op.weights + query * op.k;
  float total = 0, highest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < op.k; ++i) {
    ids[i] = i < count ? slot_of(best[i]) : -1;
    weights[i] = 0;
    if (i >= count) continue;
    const float score = score_of(best[i]);
    // Not std::max: a NaN has to come through.
    weights[i] = op.softmax ? score / static_cast<float>(op.temperature) : score < 0 ? 0 : score;
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

// Which slots a query may be given.
struct All {
  static constexpr bool kAsks = false;
  bool operator()(int64_t, int64_t, int64_t) const { return true; }
};
struct Masked {
  static constexpr bool kAsks = true;
  const bool* mask;
  int64_t row;  // P, or 0 when one mask serves all queries
  bool operator()(int64_t query, int64_t, int64_t slot) const { return mask[query * row + slot]; }
};

template <class T>
void retrieve_as(const Retrieve& op, const Pool& pool) {
  const Search asked{op.queries, op.slots, op.width, op.groups, op.vote ? std::min(op.k, op.slots) : op.k,
                      op.query,   op.keys,  op.prepared, op.bias, op.cosine, op.vote};
  Buffer<Ranked> votes(op.vote ? op.queries * op.groups * asked.k : 0);
  Buffer<int64_t> counts(op.queries);
  auto use = [&](int64_t query, int64_t group, const Ranked* best, int64_t count) {
    if (!op.vote) return write_route(op, best, count, query);
    Ranked* mine = votes.data() + query * op.groups * asked.k;
    if (group == 0) counts[query] = 0;
    std::copy_n(best, count, mine + counts[query]);
    counts[query] += count;
    if (group + 1 < op.groups) return;
    const int64_t slots = add_votes(mine, counts[query], op.groups);
    write_route(op, mine, std::min(slots, op.k), query);
  };
  if (op.mask) search<T>(asked, pool, Masked{op.mask, op.mask_per_query ? op.slots : 0}, use);
  else search<T>(asked, pool, All{}, use);
}

// The first query with a number that is not finite, or -1.
template <class T>
int64_t not_finite(const Retrieve& op) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t q = 0; q < op.queries; ++q) {
    const T* row = static_cast<const T*>(op.query) + q * op.width;
    constexpr int L = kLanes<A>;
    Vec<A> sums[2] = {};  // of zeros, or NaN
    int64_t i = 0;
    for (; i + 2 * L <= op.width; i += 2 * L)
      for (int j = 0; j < 2; ++j) sums[j] = sums[j] + load<A>(row + i + j * L) * broadcast(A(0));
    for (; i < op.width; i += L) sums[0] = sums[0] + load_first<A>(row + i, op.width - i) * broadcast(A(0));
    for (int lane = 0; lane < L; ++lane)
      if (sums[0][lane] + sums[1][lane] != 0) return q;
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

// ---- prepare_keys ----

int64_t prepared_bytes(const PrepareKeys& op) {
  int64_t bytes;
  PreparedKeys::at(nullptr, op.slots, op.width, op.groups, &bytes);
  return bytes;
}

template <class T>
void prepare_keys_as(const PrepareKeys& op, void* memory, const Pool& pool) {
  const PreparedKeys prepared = PreparedKeys::at(memory, op.slots, op.width, op.groups);
  const int64_t d = op.width / op.groups;
  pool.for_each((op.slots + kKeys - 1) / kKeys, static_cast<double>(op.slots) * op.width > 1e5, [&] {
    return [&, lengths = Buffer<float>(op.groups)]([[maybe_unused]] int64_t chunk) mutable {
      const int64_t first = chunk * kKeys, keys = std::min(kKeys, op.slots - first);
      const T* rows = static_cast<const T*>(op.keys) + first * op.width;
      for (int64_t i = 0; i < keys * op.groups; ++i)
        prepared.lengths[first * op.groups + i] = exact_length(rows + i * d, d);
#if defined(__AVX512BF16__)
      const int64_t padded = PreparedKeys::padded(d);
      prepared.lost[chunk] =
          round_rows(rows, keys, op.groups, d, prepared.unit + first * op.groups * padded, lengths.data());
#endif
    };
  });
}

void prepare_keys(const PrepareKeys& op, void* prepared, const Pool& pool) {
  switch (op.type) {
    case Type::float32: return prepare_keys_as<float>(op, prepared, pool);
    case Type::float64: return prepare_keys_as<double>(op, prepared, pool);
    case Type::float16: return prepare_keys_as<Float16>(op, prepared, pool);
    case Type::bfloat16: return prepare_keys_as<BFloat16>(op, prepared, pool);
  }
}

// ---- key_loss ----

inline uint64_t splitmix64(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EB;
  return h ^ (h >> 31);
}

// The random mask of Eq. 7; see `hidden_slots` in the reference.
struct Shown {
  static constexpr bool kAsks = true;
  int64_t groups, slots;
  uint64_t seed;
  double mask_prob;
  bool operator()(int64_t b, int64_t g, int64_t p) const {
    const auto index = static_cast<uint64_t>((b * groups + g) * slots + p);
    const uint64_t h = splitmix64(seed + 0x9E3779B97F4A7C15 * (1 + index));
    return !(static_cast<double>(h >> 40) * 0x1p-24 < mask_prob);
  }
};

template <class T>
void key_loss_as(KeyLoss& op, const Pool& pool) {
  const int64_t G = op.groups, P = op.slots, K = std::min(op.k, P);
  const Search asked{op.queries, P, op.width, G, K, op.query, op.keys, nullptr, nullptr, true, true};
  const Shown shown{G, P, op.seed, op.mask_prob};
  Buffer<double> sums(op.queries * G);
  Buffer<int64_t> counts(op.queries * G);
  search<T>(asked, pool, shown, [&](int64_t b, int64_t g, const Ranked* best, int64_t count) {
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

void key_loss(KeyLoss& op, const Pool& pool) {
  switch (op.type) {
    case Type::float32: return key_loss_as<float>(op, pool);
    case Type::float64: return key_loss_as<double>(op, pool);
    case Type::float16: return key_loss_as<Float16>(op, pool);
    case Type::bfloat16: return key_loss_as<BFloat16>(op, pool);
  }
}

// d loss / d key[g] = -grad / found * sum over selected (query^ - cos key^) / |key|, query^ and key^ of unit length.
// One thread owns a group, and adds the queries in their order.
template <class T>
void key_loss_backward_as(const KeyLossBackward& op, const Pool& pool) {
  const int64_t G = op.groups, P = op.slots, K = op.k, d = op.width / G;
  int64_t found = 0;
  for (int64_t i = 0; i < op.queries * G * K; ++i) found += op.selected[i] >= 0;
  const double scale = -op.grad / static_cast<double>(std::max<int64_t>(1, found));
  pool.for_each(G, 4.0 * static_cast<double>(op.queries * K + P) * op.width > 3e5, [&] {
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

void key_loss_backward(const KeyLossBackward& op, const Pool& pool) {
  switch (op.type) {
    case Type::float32: return key_loss_backward_as<float>(op, pool);
    case Type::float64: return key_loss_backward_as<double>(op, pool);
    case Type::float16: return key_loss_backward_as<Float16>(op, pool);
    case Type::bfloat16: return key_loss_backward_as<BFloat16>(op, pool);
  }
}

}  // namespace slm_fast::SLM_ISA

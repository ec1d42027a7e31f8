// retrieve and prepare_keys, as specified in slm_fast/ops/retrieve.py.
#include <functional>
#include <numeric>

#include "../calls.h"
#include "keys.h"
#include "screen.h"
#include "search.h"

namespace slm_fast::SLM_ISA {

// Vote: a slot's score is the sum of its cosines in the groups that kept it, divided by G. `votes` holds the groups'
// lists back to back and is replaced by the slots, best first.
int64_t add_votes(Ranked* votes, int64_t count, int64_t groups) {
  // Stable, so that a slot's cosines are added in group order.
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

// One query's output row: slots by descending score (`best` has one key each if they have several) and their weights,
// padded with -1 and 0.
void write_route(const Retrieve& op, const Ranked* best, int64_t count, int64_t query) {
  int64_t* ids = op.slot_ids + query * op.k;
  float* weights = op.weights + query * op.k;
  float total = 0, highest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < op.k; ++i) {
    ids[i] = i >= count ? -1 : op.key_slot ? op.key_slot[slot_of(best[i])] : slot_of(best[i]);
    weights[i] = 0;
    if (i >= count) continue;
    const float score = score_of(best[i]);
    // Not std::max: NaN must propagate.
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

struct Masked final : Allowed {
  const uint8_t* mask;      // any non-zero byte is true
  int64_t row;              // row stride: the number of slots, or 0 if all queries share a mask
  const int64_t* key_slot;  // null if each slot has one key
  explicit Masked(const Retrieve& op)
      : Allowed(true), mask(reinterpret_cast<const uint8_t*>(op.mask)),
        row(!op.mask_per_query ? 0 : op.key_slot ? op.mask_slots : op.slots), key_slot(op.key_slot) {}
  bool slot(int64_t query, int64_t, int64_t key) const override { return mask[query * row + of(key)] != 0; }
  bool any(int64_t query, int64_t first, int64_t count) const override {
    const uint8_t *from = mask + query * row + of(first), *last = mask + query * row + of(first + count - 1);
    return std::accumulate(from, last + 1, 0, std::bit_or<>{}) != 0;
  }

 private:
  int64_t of(int64_t key) const { return key_slot ? key_slot[key] : key; }
};

template <class T>
void retrieve_as(const Retrieve& op, const Threads& threads) {
  const int64_t k = op.vote ? std::min(op.k, op.slots) : op.k;
  const Search asked{op.queries,  op.slots, op.width,  op.groups, k,          op.query, op.keys,
                     op.prepared, op.bias,  op.cosine, op.vote,   op.key_slot};
  Buffer<Ranked> votes(op.vote ? op.queries * op.groups * k : 0);
  Buffer<int64_t> counts(op.queries);
  const Use use = [&](int64_t query, int64_t group, const Ranked* best, int64_t count) {
    if (!op.vote) return write_route(op, best, count, query);
    Ranked* mine = votes.data() + query * op.groups * k;
    if (group == 0) counts[query] = 0;
    std::copy_n(best, count, mine + counts[query]);
    counts[query] += count;
    if (group + 1 < op.groups) return;
    const int64_t slots = add_votes(mine, counts[query], op.groups);
    write_route(op, mine, std::min(slots, op.k), query);
  };
  if (op.mask) search<T>(asked, threads, Masked(op), use);
  else search<T>(asked, threads, Allowed(), use);
}

// The first query with a non-finite number, or -1.
template <class T>
int64_t not_finite(const Retrieve& op) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t q = 0; q < op.queries; ++q) {
    const T* row = static_cast<const T*>(op.query) + q * op.width;
    constexpr int L = kLanes<A>;
    Vec<A> sums[2] = {};  // sums of value * 0: zero, or NaN
    int64_t i = 0;
    for (; i + 2 * L <= op.width; i += 2 * L)
      for (int j = 0; j < 2; ++j) sums[j] = sums[j] + load<A>(row + i + j * L) * broadcast(A(0));
    for (; i < op.width; i += L) sums[0] = sums[0] + load_first<A>(row + i, op.width - i) * broadcast(A(0));
    for (int lane = 0; lane < L; ++lane)
      if (sums[0][lane] + sums[1][lane] != 0) return q;
  }
  return -1;
}

int64_t retrieve(const Retrieve& op, const Threads& threads) {
  auto run = [&]<class T>(T) {
    const int64_t bad = not_finite<T>(op);
    if (bad < 0) retrieve_as<T>(op, threads);
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

// Keys of inner products are prepared for a Screen, or not at all.
int64_t prepared_bytes(const PrepareKeys& op) {
  if (!op.cosine) {
#if defined(__AVX512BF16__)
    if (op.type == Type::float32) return RoundedKeys::bytes(op.slots, op.width);
#endif
    return 0;
  }
  int64_t bytes;
  PreparedKeys::at(nullptr, op.slots, op.width, op.groups, &bytes);
  return bytes;
}

template <class T>
void prepare_keys_as(const PrepareKeys& op, void* memory, const Threads& threads) {
  const PreparedKeys prepared = PreparedKeys::at(memory, op.slots, op.width, op.groups);
  const int64_t d = op.width / op.groups;
  threads.for_each((op.slots + kKeys - 1) / kKeys, static_cast<double>(op.slots) * op.width > 1e5, [&] {
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

void prepare_keys(const PrepareKeys& op, void* prepared, const Threads& threads) {
  if (!op.cosine) {
#if defined(__AVX512BF16__)
    if (prepared_bytes(op) == 0) return;
    const RoundedKeys rounded = RoundedKeys::at(prepared, op.slots);
    threads.for_each(tiles_of(op.slots), static_cast<double>(op.slots) * op.width > 1e5, [&] {
      return [&](int64_t tile) {
        const int64_t first = tile * amx::kRows;
        const auto* rows = static_cast<const float*>(op.keys) + first * op.width;
        rounded.round(tile, rows, std::min(amx::kRows, op.slots - first), op.width);
      };
    });
#endif
    return;
  }
  switch (op.type) {
    case Type::float32: return prepare_keys_as<float>(op, prepared, threads);
    case Type::float64: return prepare_keys_as<double>(op, prepared, threads);
    case Type::float16: return prepare_keys_as<Float16>(op, prepared, threads);
    case Type::bfloat16: return prepare_keys_as<BFloat16>(op, prepared, threads);
  }
}

}  // namespace slm_fast::SLM_ISA

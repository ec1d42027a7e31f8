// Slots with several keys: a slot scores as its best key.
#pragma once

#include <algorithm>
#include <limits>

#include "buffer.h"
#include "ranked.h"
#include "scores.h"
#include "vec.h"

namespace slm_fast::SLM_ISA {

constexpr int64_t kClose = int64_t{1} << 31;  // flag on a key's id: other keys of its slot score too close to call

// For some slots and a panel of queries, each [slots][columns].
struct BestKeys {
  float* score;   // of the slot's best key
  float* second;  // of the best of the slot's other keys
  int32_t* key;   // the slot's best key
  BestKeys at(int64_t place) const { return {score + place, second + place, key + place}; }
  // As if each slot so far had only a key that scores below any other.
  void begin_with(int64_t first_key, int64_t count) const {
    std::fill_n(score, count, -std::numeric_limits<float>::infinity());
    std::fill_n(second, count, -std::numeric_limits<float>::infinity());
    std::fill_n(key, count, static_cast<int32_t>(first_key));
  }
};

struct BestKeysBuffer {
  Buffer<float> score, second;
  Buffer<int32_t> key;
  explicit BestKeysBuffer(int64_t size) : score(size), second(size), key(size) {}
  BestKeys data() { return {score.data(), second.data(), key.data()}; }
};

// Reduces the scores in best.score, of keys [first, first + count) of N, in place to those of their slots. Returns how
// many slots end here. If the last one does not, its row goes to `open`, to be resumed with the next keys. NaN ranks
// highest.
inline int64_t join_keys(
    const int64_t* key_slot, int64_t N, int64_t first, int64_t count, int64_t columns, int64_t queries,
    const BestKeys& best, const BestKeys& open) {
  auto same = [&](int64_t key, int64_t next) { return next < N && key_slot[key] == key_slot[next]; };
  int64_t slots = 0;
  for (int64_t from = first, end; from < first + count; from = end, ++slots) {
    for (end = from + 1; end < first + count && same(from, end);) ++end;
    const bool goes_on = from == first && from > 0 && same(from - 1, from);
    const bool stays_open = end == first + count && same(from, end);
    for (int64_t column = 0; column < queries; column += kLanes<float>) {
      Vec<float> highest = broadcast(-std::numeric_limits<float>::infinity()), second = highest;
      Vec<int32_t> which = broadcast(static_cast<int32_t>(from));
      if (goes_on) {
        highest = load<float>(open.score + column), second = load<float>(open.second + column);
        which = load<int32_t>(open.key + column);
      }
      for (int64_t key = from; key < end; ++key) {
        const Vec<float> score = load<float>(best.score + (key - first) * columns + column);
        const Vec<int32_t> stays = (score <= highest) | (highest != highest);
        const Vec<float> lower = stays ? score : highest;
        second = lower > second ? lower : second;
        highest = stays ? highest : score;
        which = stays ? which : broadcast(static_cast<int32_t>(key));
      }
      const BestKeys to = stays_open ? open.at(column) : best.at(slots * columns + column);
      store(to.score, highest), store(to.second, second), store(to.key, which);
    }
    slots -= stays_open;
  }
  return slots;
}

// The best key, by exact score, of the slot whose keys start at `key`; advances `key` to the next slot.
template <class T>
inline Ranked exact_best_from(const ExactScore<T>& exact, int64_t list, int64_t& key) {
  const int64_t first = key;
  Ranked best = 0;
  do best = std::max(best, ranked(exact(list, key), key));
  while (++key < exact.s.slots && exact.s.same_slot(first, key));
  return best;
}

// Exact score of a key or, if it is flagged kClose, of its slot's best key.
template <class T>
inline Ranked exact_best(const ExactScore<T>& exact, int64_t list, int64_t id) {
  if (!exact.s.key_slot || !(id & kClose)) return ranked(exact(list, id), id);
  for (id -= kClose; id > 0 && exact.s.same_slot(id - 1, id);) --id;
  return exact_best_from(exact, list, id);
}

}  // namespace slm_fast::SLM_ISA

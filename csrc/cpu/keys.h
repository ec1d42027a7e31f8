// Keys as a search reads them, a chunk at a time: normalised in bfloat16, or as stored; and what prepare_keys computes
// of them once for all searches.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "scores.h"
#include "threads.h"
#include "tile.h"

namespace slm_fast::SLM_ISA {

constexpr int64_t kKeys = 48;  // per chunk, which stays in L2 while all query panels pass over it
#if defined(__AVX512BF16__)
constexpr bool kRounds = true;  // searches may multiply bfloat16 pairs
#else
constexpr bool kRounds = false;
#endif

// Views into one memory block that holds the prepared data of P keys.
struct PreparedKeys {
  double* lengths;  // [P][G]
  Lost* lost;       // [chunk] largest rounding error of its keys
  BFloat16* unit;   // [P][G][padded d], each group normalised

  static int64_t padded(int64_t d) { return (d + 1) / 2 * 2; }
  static PreparedKeys at(const void* memory, int64_t slots, int64_t width, int64_t groups, int64_t* bytes = nullptr) {
    constexpr int64_t kLine = 64;
    int64_t used = 0;
    auto take = [&]<class X>(X*, int64_t count) {
      auto* part = reinterpret_cast<X*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(used));
      used += (count * static_cast<int64_t>(sizeof(X)) + kLine - 1) / kLine * kLine;
      return part;
    };
    PreparedKeys keys{};
    keys.lengths = take(keys.lengths, slots * groups);
    if (kRounds) {
      keys.lost = take(keys.lost, (slots + kKeys - 1) / kKeys);
      keys.unit = take(keys.unit, slots * groups * padded(width / groups));
    }
    if (bytes) *bytes = used;
    return keys;
  }
};

// Normalises each group into `to` in bfloat16. Returns the largest rounding error of a row.
template <class T>
inline Lost round_rows(const T* from, int64_t rows, int64_t groups, int64_t d, BFloat16* to, float* lengths) {
  const int64_t padded = PreparedKeys::padded(d);
  Lost most{0, 0};
  for (int64_t i = 0; i < rows; ++i)
    most.keep_larger(round_row(from + i * groups * d, groups, d, padded, to + i * groups * padded, lengths));
  return most;
}

// T: storage type of the keys. P: how a search multiplies them.
template <class T, class P>
class Keys {
  using E = typename P::Element;
  static constexpr bool kRounded = P::kPair == 2;          // normalised bfloat16 rows, else keys as they are
  static constexpr bool kAsStored = std::is_same_v<T, E>;  // used in place

 public:
  struct Chunk {
    const E* rows;
    const float* factors;  // [keys][G] scale of a key's product in a group, or null
    float slack;           // the keys' part of a score's error bound
    const char* next;      // the following rows, or null; bytes per row
    int64_t row_bytes;
  };
  struct Scratch {
    Buffer<E> rows;
    Buffer<float> factors;
    explicit Scratch(const Keys& of) : factors(kKeys * of.s.groups) {
      if (kRounded || !kAsStored) rows.at_least(kKeys * of.size);
    }
  };

  explicit Keys(const Search& s) : s(s), size(s.groups * ((s.width / s.groups + P::kPair - 1) / P::kPair * P::kPair)) {
    if (s.prepared) prepared = PreparedKeys::at(s.prepared, s.slots, s.width, s.groups);
  }

  // Rounds all keys up front if they are few enough; for keys that are read more than once.
  void round_all(const Threads& threads, bool parallel) {
    if constexpr (kRounded) {
      if (s.prepared || s.slots * size * 2 > 16 << 20) return;
      const int64_t chunks = (s.slots + kKeys - 1) / kKeys;
      rounded.at_least(s.slots * size), rounded_lost.at_least(chunks);
      threads.for_each(chunks, parallel, [&] {
        return [&, lengths = Buffer<float>(s.groups)](int64_t chunk) mutable {
          const int64_t first = chunk * kKeys, keys = std::min(kKeys, s.slots - first);
          rounded_lost[chunk] = round(first, keys, rounded.data() + first * size, lengths.data());
        };
      });
      prepared.unit = rounded.data(), prepared.lost = rounded_lost.data();
    }
  }

  // Keys [first, first + keys), which must not cross a multiple of kKeys.
  Chunk take(int64_t first, int64_t keys, Scratch& scratch) const {
    Chunk chunk{nullptr, nullptr, 0, nullptr, size * static_cast<int64_t>(sizeof(E))};
    if constexpr (kRounded) {
      if (prepared.unit) {
        chunk.rows = prepared.unit + first * size;
        chunk.slack = prepared.lost[first / kKeys].of(s.by_group);
        chunk.next = reinterpret_cast<const char*>(chunk.rows + keys * size);
        return chunk;
      }
      chunk.slack = round(first, keys, scratch.rows.data(), scratch.factors.data()).of(s.by_group);
      chunk.rows = scratch.rows.data();
    } else {
      for (int64_t i = 0; i < keys; ++i)
        chunk.slack = measure(first + i, scratch.factors.data() + i * s.groups, chunk.slack);
      if (s.cosine) chunk.factors = scratch.factors.data(), chunk.slack = 0;
      if constexpr (kAsStored) {
        chunk.rows = row(first);
      } else {
        widen_all(row(first), scratch.rows.data(), keys * s.width);
        chunk.rows = scratch.rows.data();
      }
    }
    chunk.next = reinterpret_cast<const char*>(row(first + keys));
    chunk.row_bytes = s.width * static_cast<int64_t>(sizeof(T));
    return chunk;
  }

 private:
  const T* row(int64_t key) const { return static_cast<const T*>(s.keys) + key * s.width; }
  Lost round(int64_t first, int64_t keys, BFloat16* to, float* lengths) const {
    return round_rows(row(first), keys, s.groups, s.width / s.groups, to, lengths);
  }

  // Writes the key's inverse lengths, returns the longest length so far.
  float measure(int64_t key, float* lengths, float longest) const {
    if (s.prepared) std::copy_n(prepared.lengths + key * s.groups, s.groups, lengths);
    else group_lengths(row(key), s.groups, s.width / s.groups, lengths);
    longest = std::max(longest, lengths[0] + underflow(s.width));
    for (int64_t g = 0; g < s.groups; ++g) lengths[g] = inverse_length(lengths[g]);
    return longest;
  }

  const Search& s;
  const int64_t size;  // of a row, in elements
  PreparedKeys prepared{};
  Buffer<BFloat16> rounded;
  Buffer<Lost> rounded_lost;
};

}  // namespace slm_fast::SLM_ISA

// Scores of keys and queries by amx.h: of bfloat16 rows, and of float32 rows split into two bfloat16 numbers each.
#pragma once

#include <algorithm>

#include "across.h"
#include "amx.h"
#include "buffer.h"
#include "scores.h"

namespace slm_fast::SLM_ISA {

// The same arithmetic as Plain<float>, or nearly, in tiles.
struct Split : Plain<float> {};
constexpr int64_t kManyToSplit = 48;  // queries; with fewer, splitting the keys takes longer than it saves

#if defined(__AVX512BF16__)
struct HighLow {
  __m512i high, low;  // 32 bfloat16 numbers
};

// Splits 32 numbers; those past `count` are zero.
inline HighLow split_32(const float* from, int64_t count) {
  const __mmask32 lanes = first_lanes(count);
  const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
  const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), from + 16);
  const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  auto rest = [&](__m512 value, __m256i rounded) {
    return _mm512_sub_ps(value, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  };
  return {high, (__m512i)_mm512_cvtne2ps_pbh(
                    rest(b, _mm512_extracti64x4_epi64(high, 1)), rest(a, _mm512_castsi512_si256(high)))};
}

// Rows [count][d] as tiles of keys, zero-padded to whole ones.
inline void split_keys(const float* rows, int64_t count, int64_t d, int64_t steps, uint16_t* to) {
  constexpr int64_t kPart = amx::kRows * amx::kStep;
  for (int64_t key = 0; key < (count + amx::kRows - 1) / amx::kRows * amx::kRows; ++key) {
    uint16_t* tile = to + key / amx::kRows * steps * 2 * kPart + key % amx::kRows * amx::kStep;
    for (int64_t step = 0; step < steps; ++step, tile += 2 * kPart) {
      const int64_t left = key < count ? d - step * amx::kStep : 0;
      const HighLow parts = split_32(rows + key * d + step * amx::kStep, left);
      _mm512_storeu_si512(tile, parts.high), _mm512_storeu_si512(tile + kPart, parts.low);
    }
  }
}

// Rows of queries, `stride` numbers apart, as a panel.
inline void split_panel(const float* rows, int64_t stride, int64_t count, int64_t d, int64_t steps, float* panel) {
  const int64_t words = steps * amx::kRows;
  Buffer<float> parts(2 * words * count);  // [query][high, low][words] pairs, as bits
  for (int64_t q = 0; q < count; ++q)
    for (int64_t step = 0; step < steps; ++step) {
      const HighLow found = split_32(rows + q * stride + step * amx::kStep, d - step * amx::kStep);
      float* to = parts.data() + 2 * q * words + step * amx::kRows;
      _mm512_storeu_si512(to, found.high), _mm512_storeu_si512(to + words, found.low);
    }
  for (int64_t part = 0; part < 2; ++part)
    turn_rows<Split>(
        panel + part * words * kPanelColumns<Split>, [&](int64_t q) { return parts.data() + (2 * q + part) * words; },
        count, words);
}

// At most 16 rows of queries as tiles, rounded: [steps][16 pairs][16 queries] pairs. lost: the length of what rounding
// has taken from each row, at most.
inline void round_queries(const float* rows, int64_t d, int64_t count, int64_t steps, uint16_t* to, float* lost) {
  __m512 sums[amx::kRows] = {};
  for (int64_t step = 0; step < steps; ++step, to += amx::kRows * amx::kStep) {
    __m512i pairs[amx::kRows];
#pragma GCC unroll 16
    for (int q = 0; q < amx::kRows; ++q) {
      const int64_t left = q < count ? d - step * amx::kStep : 0;
      const HighLow found = split_32(left > 0 ? rows + q * d + step * amx::kStep : rows, left);
      pairs[q] = found.high;
      const __m512 even = (__m512)_mm512_slli_epi32(found.low, 16);
      const __m512 odd = (__m512)_mm512_and_si512(found.low, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
      sums[q] = _mm512_fmadd_ps(odd, odd, _mm512_fmadd_ps(even, even, sums[q]));
    }
    transpose_16(pairs);
#pragma GCC unroll 16
    for (int pair = 0; pair < amx::kRows; ++pair) _mm512_storeu_si512(to + pair * amx::kStep, pairs[pair]);
  }
  for (int64_t q = 0; q < count; ++q)  // 1.01: the low parts are rounded, too
    lost[q] = 1.01f * (std::sqrt(_mm512_reduce_add_ps(sums[q])) + underflow(d));
}

inline int64_t tiles_of(int64_t rows) { return (rows + amx::kRows - 1) / amx::kRows; }

// Scores what split_keys and split_panel have made.
inline void score_split(
    const uint16_t* keys, int64_t count, const float* panel, int64_t queries, int64_t steps, float* scores) {
  constexpr int64_t kRow = 2 * amx::kStep, kTile = amx::kRows * kRow, kColumns = kPanelColumns<Split>;
  amx::score({reinterpret_cast<const char*>(keys), kRow, 2 * kTile, 2 * kTile * steps, kTile,
              reinterpret_cast<const uint32_t*>(panel), steps * amx::kRows * kColumns, tiles_of(count),
              tiles_of(queries), steps, kColumns, scores});
}

// Scores as many rows of keys, `words` pairs apart, as fill tiles, if the pairs to multiply do too. Returns how many.
inline int64_t score_tiles(
    const BFloat16* keys, int64_t words, int64_t count, const BFloat16* panel, int64_t queries, int64_t pairs,
    float* scores) {
  const int64_t tiles = count / amx::kRows;
  if (!amx::chosen() || tiles == 0 || pairs % amx::kRows) return 0;
  amx::score({reinterpret_cast<const char*>(keys), words * 4, 2 * amx::kStep, amx::kRows * words * 4, 0,
              reinterpret_cast<const uint32_t*>(panel), 0, tiles, tiles_of(queries), pairs / amx::kRows,
              kPanelColumns<Bf16Pairs>, scores});
  return tiles * amx::kRows;
}
#endif

}  // namespace slm_fast::SLM_ISA

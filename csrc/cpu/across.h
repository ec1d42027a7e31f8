// Transposes rows into combine's column panels, for products that sum along the rows.
#pragma once

#include "tile.h"

namespace slm_fast::SLM_ISA {

#if defined(__AVX512F__)
// Transposes a 16 x 16 block of 32-bit words.
[[gnu::always_inline]] inline void transpose_16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88), t[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88), t[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

// panel[word][lane] = word of rows[lane], where a word is P::kPair elements. Zero-padded past `count` rows, up to whole
// vectors of lanes, and past `length` elements.
template <class P, class RowAt>
inline void turn_rows(typename P::Element* panel, const RowAt& row_at, int64_t count, int64_t length) {
  constexpr int64_t kWide = kPanelColumns<P>, kWord = P::kPair;
  const int64_t words = (length + kWord - 1) / kWord;
#if defined(__AVX512F__)
  if constexpr (sizeof(typename P::Element) * P::kPair == 4) {
    for (int64_t row = 0; row < count; row += 16)
      for (int64_t word = 0; word < words; word += 16) {
        __m512i block[16];
        const __mmask32 halves = first_lanes((length - word * kWord) * static_cast<int64_t>(2 / kWord));
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          block[i] = row + i < count ? _mm512_maskz_loadu_epi16(halves, row_at(row + i) + word * kWord)
                                     : _mm512_setzero_si512();
        transpose_16(block);
        auto* to = panel + (word * kWide + row) * kWord;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (i < words - word) _mm512_store_si512(to + i * kWide * kWord, block[i]);
      }
    return;
  }
#endif
  constexpr int L = kLanes<typename P::Accumulator>;
  for (int64_t row = 0; row < (count + L - 1) / L * L; ++row)
    for (int64_t i = 0; i < words * kWord; ++i)
      panel[(i / kWord * kWide + row) * kWord + i % kWord] =
          row < count && i < length ? row_at(row)[i] : typename P::Element{};
}

}  // namespace slm_fast::SLM_ISA

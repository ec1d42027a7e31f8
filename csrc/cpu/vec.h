// One vector type for all instruction sets, based on the compiler's vector extensions, so that each kernel is written
// once. Each kernel file is compiled once per instruction set, with SLM_ISA as its name. Everything here is in that
// namespace, because the linker must never merge code compiled for different processors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace slm_fast::SLM_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class V>
using LaneOf = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// ---- scalars: storage type T to accumulation type A, and back ----

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class A, class T>
inline A widen(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return static_cast<A>(bits_to_float(static_cast<uint32_t>(value.bits) << 16));
  } else if constexpr (std::is_same_v<T, Float16>) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    // A multiplication rebiases the exponent: it is exact and also normalises subnormals.
    const float scaled = bits_to_float(rest << 13) * 0x1p112f;
    const uint32_t special = rest >= 0x7c00 ? 0x7f800000u | (rest << 13) : float_to_bits(scaled);
    return static_cast<A>(bits_to_float(sign | special));
  } else {
    return static_cast<A>(value);
  }
}

template <class T, class A>
inline T narrow(A value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = float_to_bits(static_cast<float>(value));
    if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // round to nearest even
  } else if constexpr (std::is_same_v<T, Float16>) {
    const float number = static_cast<float>(value);
    const uint32_t bits = float_to_bits(number), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
    if (rest < 0x38800000) {  // subnormal half: adding 0.5 leaves its bits, correctly rounded, at the bottom
      const float shifted = bits_to_float(rest) + 0.5f;
      return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000))};
    }
    return {static_cast<uint16_t>(sign | ((rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13))};
  } else {
    return static_cast<T>(value);
  }
}

// ---- vectors ----

// Element by element; out of line, so that it is compiled once and not at each use.
template <class A, class T>
[[gnu::noinline]] Vec<A> load_each(const T* from) {
  Vec<A> value;
  for (int i = 0; i < kLanes<A>; ++i) value[i] = widen<A>(from[i]);
  return value;
}
template <class T, class V>
[[gnu::noinline]] void store_each(T* to, V value) {
  for (int i = 0; i < kLanes<LaneOf<V>>; ++i) to[i] = narrow<T>(LaneOf<V>(value[i]));
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <class A, class T>
inline Vec<A> load(const T* from) {
  if constexpr (std::is_same_v<A, T>) {
    Vec<A> value;
    std::memcpy(&value, from, sizeof value);
    return value;
#if defined(__AVX512F__)  // the compiler needs three instructions for the conversion below
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, BFloat16>) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (Vec<float>)_mm512_slli_epi32(words, 16);
#endif
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, BFloat16>) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vec<float>)(__builtin_convertvector(halves, Words) << 16);
  } else if constexpr (std::is_same_v<A, double> && std::is_same_v<T, float>) {
    typedef float Floats __attribute__((vector_size(kVectorBytes / 2)));
    Floats floats;
    std::memcpy(&floats, from, sizeof floats);
    return __builtin_convertvector(floats, Vec<double>);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<A, double> && std::is_same_v<T, BFloat16>) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
  } else if constexpr (std::is_same_v<A, double> && std::is_same_v<T, Float16>) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, Float16>) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, Float16>) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  } else {
    return load_each<A>(from);
  }
}

template <class T, class V>
inline void store(T* to, V value) {
  using A = LaneOf<V>;
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(to, &value, sizeof value);
#if defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, BFloat16>) {
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &halves, sizeof halves);
#else
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, BFloat16>) {  // narrow() on all lanes
    const Words bits = (Words)value, kept = bits >> 16;
    const Words nearest = (bits + 0x7fff + (kept & 1)) >> 16;
    const Halves halves = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? kept | 0x40 : nearest, Halves);
    std::memcpy(to, &halves, sizeof halves);
#endif
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, Float16>) {
    const __m256i halves = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof halves);
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, Float16>) {
    const __m128i halves = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof halves);
#endif
  } else {
    store_each(to, value);
  }
}

// Only the first `count` lanes (all of them if count is larger); the others are zero.
template <class A, class T>
inline Vec<A> load_first(const T* from, int64_t count) {
  if (count >= kLanes<A>) return load<A>(from);
#if defined(__AVX512F__)
  const auto mask = static_cast<uint16_t>((1u << count) - 1);
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>) return (Vec<A>)_mm512_maskz_loadu_ps(mask, from);
  if constexpr (std::is_same_v<A, float> && sizeof(T) == 2) {
    T whole[kLanes<A>];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole), _mm256_maskz_loadu_epi16(mask, from));
    return load<A>(whole);
  }
#endif
  T whole[kLanes<A>] = {};
  std::memcpy(whole, from, static_cast<size_t>(count) * sizeof(T));
  return load<A>(whole);
}

template <class T, class V>
inline void store_first(T* to, V value, int64_t count) {
  if (count >= kLanes<LaneOf<V>>) return store(to, value);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<LaneOf<V>, float> && std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(to, static_cast<uint16_t>((1u << count) - 1), (__m512)value);
#endif
  T whole[kLanes<LaneOf<V>>];
  store(whole, value);
  std::memcpy(to, whole, static_cast<size_t>(count) * sizeof(T));
}

#if defined(__AVX512F__)
// Mask of the first `count` of 32 lanes.
inline __mmask32 first_lanes(int64_t count) {
  return count >= 32 ? ~uint32_t{0} : count <= 0 ? 0 : static_cast<uint32_t>((uint64_t{1} << count) - 1);
}
#endif

#if defined(__AVX512BF16__)
// 32 bfloat16 numbers, split into even and odd ones: a shift and a mask instead of two conversions.
struct EvenOdd {
  Vec<float> even, odd;
};
inline EvenOdd load_even_odd(const BFloat16* from, int64_t count) {
  const __m512i both = _mm512_maskz_loadu_epi16(first_lanes(count), from);
  return {(Vec<float>)_mm512_slli_epi32(both, 16), (Vec<float>)_mm512_and_si512(both, _mm512_set1_epi32(~0xffff))};
}
inline void store_even_odd(BFloat16* to, EvenOdd value, int64_t count) {
  alignas(64) static constexpr uint16_t kInTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh((__m512)value.odd, (__m512)value.even);
  const __m512i both = _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), apart);
  _mm512_mask_storeu_epi16(to, first_lanes(count), both);
}
#endif

template <class A, class T>
inline void widen_all(const T* from, A* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load<A>(from + i));
  for (; i < count; ++i) to[i] = widen<A>(from[i]);
}

// Horizontal sum; its order depends on the instruction set.
inline double sum_lanes(Vec<double> v) {
#if defined(__AVX512F__)
  const __m256d half = _mm512_castpd512_pd256(v) + _mm512_extractf64x4_pd(v, 1);
  const __m128d quarter = _mm256_castpd256_pd128(half) + _mm256_extractf128_pd(half, 1);
  return quarter[0] + quarter[1];
#else
  double sum = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) sum += v[lane];
  return sum;
#endif
}

// Horizontal sums of four vectors, always in the same order.
template <class A>
inline void sum_each_of_4(const Vec<A> (&v)[4], A (&sums)[4]) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    const __m512 ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);  // a02 b02 a13 b13
    const __m512 cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    const __m512 abcd = (__m512)low + (__m512)high;
    const __m256 half = _mm512_castps512_ps256(abcd) + (__m256)_mm512_extractf64x4_pd((__m512d)abcd, 1);
    const __m128 quarter = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    _mm_storeu_ps(sums, quarter);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) {
    const __m256 ab = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
    const __m256 cd = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
    const __m256d low = _mm256_unpacklo_pd((__m256d)ab, (__m256d)cd), high = _mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
    const __m256 abcd = (__m256)low + (__m256)high;
    _mm_storeu_ps(sums, _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) {
    A sum = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) sum += v[i][lane];
    sums[i] = sum;
  }
}

}  // namespace slm_fast::SLM_ISA

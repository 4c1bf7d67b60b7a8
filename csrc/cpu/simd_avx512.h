// Sixteen float32 lanes in one AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Finite, so that differences with it are no NaN.
constexpr float kHidden = -3e38f;

struct Simd {
  using V = __m512;
  static constexpr int kRows = 6;   // 6 x 4 accumulators, 4 weights, 1 broadcast: 29 of 32 registers
  static constexpr int kMostRows = 8;
  static constexpr int kTiles = 4;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(V v) { return _mm512_reduce_add_ps(v); }
  static float highest(V v) { return _mm512_reduce_max_ps(v); }

  static bool any_above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

  static V load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static __m256i narrow(V v) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    // Round to nearest, ties to even; a NaN stays one because its quiet bit is set first.
    __m512i bits = _mm512_castps_si512(v);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    bits = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#endif
  }
  static void store_bf16(uint16_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  // The two bfloat16 of each 32-bit lane.
  static V even(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static V odd(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int32_t(0xffff0000))));
  }
  // Byte `i` of each 32-bit lane, signed.
  template <int i>
  static V byte(const int8_t* p) {
    const __m512i high = _mm512_slli_epi32(_mm512_loadu_si512(p), 24 - 8 * i);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24));
  }
  // 16 pairs of bfloat16 from float32 that are exact in bfloat16, whose low halves are zeros.
  static __m512i pairs(V even, V odd) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
  }
  static void store_pairs(uint16_t* p, V even, V odd) { _mm512_storeu_si512(p, pairs(even, odd)); }
  // 16 pairs of bfloat16, rounded as `store_bf16` does.
  static __m512i rounded_pairs(V even, V odd) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(odd)), 16);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(even)), high);
  }
  static void store_rounded_pairs(uint16_t* p, V even, V odd) { _mm512_storeu_si512(p, rounded_pairs(even, odd)); }
  // Lanes from `first` on become a score so low that its power of two is 0.
  static V hide_from(V v, int first) {
    const __mmask16 hidden = first <= 0 ? __mmask16(0xffff) : first >= 16 ? __mmask16(0) : __mmask16(0xffff << first);
    return _mm512_mask_mov_ps(v, hidden, _mm512_set1_ps(kHidden));
  }
  // x - floor(x)
  static V fraction(V v) { return _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // v * 2^floor(x)
  static V scale(V v, V x) { return _mm512_scalef_ps(v, x); }

  // Lanes apart; a NaN is neither at least nor above anything.
  using Mask = __mmask16;
  static Mask at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Mask above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Mask either(Mask a, Mask b) { return a | b; }
  // Lane i in bit i.
  static unsigned bits(Mask m) { return m; }
  static Mask from_bits(unsigned bits) { return Mask(bits); }
  static V choose(Mask m, V yes, V no) { return _mm512_mask_mov_ps(no, m, yes); }
  static V add_where(V sum, Mask m, V v) { return _mm512_mask_add_ps(sum, m, sum, v); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static float lowest(V v) { return _mm512_reduce_min_ps(v); }
  // a * b, rounded before anything is added to it: the compiler would make one operation of the two.
  static V product(V a, V b) {
    V p = mul(a, b);
    asm("" : "+v"(p));
    return p;
  }
  // Writes the lanes of the mask one behind the other, and 16 lanes in all; returns how many there are.
  static int compress(float* to, V v, Mask m) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(m, v));
    return __builtin_popcount(m);
  }

  // Whole numbers.
  using Whole = __m512i;
  static Whole none() { return _mm512_setzero_si512(); }
  static Whole load_int16(const int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Whole and_with(Whole a, int32_t b) { return _mm512_and_si512(a, _mm512_set1_epi32(b)); }
  static V to_float(Whole a) { return _mm512_cvtepi32_ps(a); }
  static Whole count_where(Whole count, Mask m) {
    return _mm512_mask_add_epi32(count, m, count, _mm512_set1_epi32(1));
  }
  static int64_t sum(Whole a) { return _mm512_reduce_add_epi32(a); }

  // Weights in blocks: 16 words, and numbers of a few bits in them.
  using Words = __m512i;
  static Words load_words(const char* p) { return _mm512_loadu_si512(p); }
  static Words load_bytes(const char* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Words load_shorts(const char* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load_int8(const char* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static V load_half(const char* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // The value at bit `at` of each word. A permutation looks at four bits of an index, whatever is above them.
  template <int at>
  static V pick(Words w, const float* values) {
    return _mm512_permutexvar_ps(at == 0 ? w : _mm512_srli_epi32(w, at), _mm512_load_ps(values));
  }
  template <int bits, int at>
  static V field(Words w) {
    alignas(64) static constexpr float kFour[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    alignas(64) static constexpr float kTwo[] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    static_assert(bits == 4 || bits == 2);
    return pick<at>(w, bits == 4 ? kFour : kTwo);
  }
  // Adds to the lanes whose word has bit `at`.
  template <int at>
  static V add_where_bit(V v, Words w, V more) {
    return _mm512_mask_add_ps(v, _mm512_test_epi32_mask(w, _mm512_set1_epi32(1 << at)), v, more);
  }

  // Sums of float32 in float64.
  struct Wide {
    __m512d lo, hi;
  };
  static Wide wide_zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static Wide add(Wide a, V v) {
    return {_mm512_add_pd(a.lo, _mm512_cvtps_pd(_mm512_castps512_ps256(v))),
            _mm512_add_pd(a.hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)))};
  }
  static double sum(Wide a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.lo, a.hi)); }
};

}  // namespace

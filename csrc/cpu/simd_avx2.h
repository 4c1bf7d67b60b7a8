// Sixteen float32 lanes in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Finite, so that differences with it are no NaN.
constexpr float kHidden = -3e38f;

struct Simd {
  struct V {
    __m256 lo, hi;
  };
  static constexpr int kRows = 6;  // 6 x 1 tiles of two registers, 2 weights, 1 broadcast: 15 of 16 registers
  static constexpr int kMostRows = 6;
  static constexpr int kTiles = 1;

  static V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static V set1(float x) {
    const __m256 v = _mm256_set1_ps(x);
    return {v, v};
  }
  static V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, V v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
  }
  static V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
  static float sum(V v) {
    const __m256 both = _mm256_add_ps(v.lo, v.hi);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float highest(V v) {
    const __m256 both = _mm256_max_ps(v.lo, v.hi);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }

  static bool any_above(V a, V b) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ),
                                           _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))) != 0;
  }

  static V load_bf16(const uint16_t* p) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(packed));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(packed, 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
  static void store_bf16(uint16_t* p, V v) {
    const __m256i lo = rounded(v.lo), hi = rounded(v.hi);
    // packus works within 128-bit halves; the permutation puts the halves back in order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  // The two bfloat16 of each 32-bit lane.
  static V even(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words(p), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(words(p + 16), 16))};
  }
  static V odd(const uint16_t* p) {
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(words(p), high)),
            _mm256_castsi256_ps(_mm256_and_si256(words(p + 16), high))};
  }
  // Byte `i` of each 32-bit lane, signed.
  template <int i>
  static V byte(const int8_t* p) {
    return {signed_byte<i>(words(p)), signed_byte<i>(words(p + 32))};
  }
  // Stores 16 pairs of bfloat16 from float32 that are exact in bfloat16.
  static void store_pairs(uint16_t* p, V even, V odd) {
    store_half(p, even.lo, odd.lo);
    store_half(p + 16, even.hi, odd.hi);
  }
  // Stores 16 pairs of bfloat16, rounded as `store_bf16` does.
  static void store_rounded_pairs(uint16_t* p, V even, V odd) {
    const __m256i lo = _mm256_or_si256(rounded(even.lo), _mm256_slli_epi32(rounded(odd.lo), 16));
    const __m256i hi = _mm256_or_si256(rounded(even.hi), _mm256_slli_epi32(rounded(odd.hi), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), hi);
  }
  // Lanes from `first` on become a score so low that its power of two is 0.
  static V hide_from(V v, int first) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 hidden = _mm256_set1_ps(kHidden);
    const __m256i lo = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lanes);
    const __m256i hi = _mm256_cmpgt_epi32(_mm256_set1_epi32(first - 8), lanes);
    return {_mm256_blendv_ps(hidden, v.lo, _mm256_castsi256_ps(lo)),
            _mm256_blendv_ps(hidden, v.hi, _mm256_castsi256_ps(hi))};
  }
  // x - floor(x)
  static V fraction(V v) {
    return {_mm256_sub_ps(v.lo, _mm256_floor_ps(v.lo)), _mm256_sub_ps(v.hi, _mm256_floor_ps(v.hi))};
  }
  // v * 2^floor(x); 0 below the smallest normal number, and no more than 2^127 v.
  static V scale(V v, V x) { return {scaled(v.lo, x.lo), scaled(v.hi, x.hi)}; }

  // Lanes apart; a NaN is neither at least nor above anything.
  struct Mask {
    __m256 lo, hi;
  };
  static Mask at_least(V a, V b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)};
  }
  static Mask above(V a, V b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
  }
  static Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
  static Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
  // Lane i in bit i.
  static unsigned bits(Mask m) { return unsigned(_mm256_movemask_ps(m.lo) | _mm256_movemask_ps(m.hi) << 8); }
  static Mask from_bits(unsigned bits) { return {mask_of(bits), mask_of(bits >> 8)}; }
  static V choose(Mask m, V yes, V no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
  }
  static V add_where(V sum, Mask m, V v) {
    return add(sum, V{_mm256_and_ps(m.lo, v.lo), _mm256_and_ps(m.hi, v.hi)});
  }
  static V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static float lowest(V v) {
    const __m256 both = _mm256_min_ps(v.lo, v.hi);
    __m128 x = _mm_min_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    x = _mm_min_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_min_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  // a * b, rounded before anything is added to it: the compiler would make one operation of the two.
  static V product(V a, V b) {
    V p = mul(a, b);
    asm("" : "+x"(p.lo), "+x"(p.hi));
    return p;
  }
  // Writes the lanes of the mask one behind the other, and 16 lanes at most; returns how many there are.
  static int compress(float* to, V v, Mask m) {
    const int lo = _mm256_movemask_ps(m.lo), hi = _mm256_movemask_ps(m.hi), count = __builtin_popcount(unsigned(lo));
    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(v.lo, order_of(lo)));
    _mm256_storeu_ps(to + count, _mm256_permutevar8x32_ps(v.hi, order_of(hi)));
    return count + __builtin_popcount(unsigned(hi));
  }

  // Whole numbers.
  struct Whole {
    __m256i lo, hi;
  };
  static Whole none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Whole load_int16(const int16_t* p) {
    return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static Whole and_with(Whole a, int32_t b) {
    const __m256i both = _mm256_set1_epi32(b);
    return {_mm256_and_si256(a.lo, both), _mm256_and_si256(a.hi, both)};
  }
  static V to_float(Whole a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  static Whole count_where(Whole count, Mask m) {
    // Lanes of the mask are -1.
    return {_mm256_sub_epi32(count.lo, _mm256_castps_si256(m.lo)),
            _mm256_sub_epi32(count.hi, _mm256_castps_si256(m.hi))};
  }
  static int64_t sum(Whole a) {
    const __m256i both = _mm256_add_epi32(a.lo, a.hi);
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
  }

  // Weights in blocks: 16 words, and numbers of a few bits in them.
  using Words = Whole;
  static Words load_words(const char* p) { return {words(p), words(p + 32)}; }
  static Words load_bytes(const char* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static Words load_shorts(const char* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
  }
  static V load_int8(const char* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
  }
  static V load_half(const char* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
  }
  // The number of so many bits at bit `at` of each word.
  template <int bits, int at>
  static V field(Words w) {
    const __m256i most = _mm256_set1_epi32((1 << bits) - 1);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.lo, at), most)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.hi, at), most))};
  }
  // One of 16 values, by the nibble at bit `at` of each word.
  template <int at>
  static V pick(Words w, const float* values) {
    return {picked<at>(w.lo, values), picked<at>(w.hi, values)};
  }
  // Adds to the lanes whose word has bit `at`.
  template <int at>
  static V add_where_bit(V v, Words w, V more) {
    const __m256i bit = _mm256_set1_epi32(1 << at);
    const __m256i lo = _mm256_cmpeq_epi32(_mm256_and_si256(w.lo, bit), bit);
    const __m256i hi = _mm256_cmpeq_epi32(_mm256_and_si256(w.hi, bit), bit);
    return add_where(v, Mask{_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)}, more);
  }

  // Sums of float32 in float64.
  struct Wide {
    __m256d parts[4];
  };
  static Wide wide_zero() {
    const __m256d zero = _mm256_setzero_pd();
    return {{zero, zero, zero, zero}};
  }
  static Wide add(Wide a, V v) {
    return {{_mm256_add_pd(a.parts[0], _mm256_cvtps_pd(_mm256_castps256_ps128(v.lo))),
             _mm256_add_pd(a.parts[1], _mm256_cvtps_pd(_mm256_extractf128_ps(v.lo, 1))),
             _mm256_add_pd(a.parts[2], _mm256_cvtps_pd(_mm256_castps256_ps128(v.hi))),
             _mm256_add_pd(a.parts[3], _mm256_cvtps_pd(_mm256_extractf128_ps(v.hi, 1)))}};
  }
  static double sum(Wide a) {
    const __m256d all = _mm256_add_pd(_mm256_add_pd(a.parts[0], a.parts[1]), _mm256_add_pd(a.parts[2], a.parts[3]));
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(all), _mm256_extractf128_pd(all, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }

 private:
  template <int at>
  static __m256 picked(__m256i word, const float* values) {
    // A permutation looks at three bits of an index; the fourth, moved to the sign, chooses between two.
    const __m256i index = _mm256_srli_epi32(word, at);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(values), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(values + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(word, 28 - at)));
  }
  static __m256 mask_of(unsigned bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(bits)), bit), bit));
  }
  // For every mask of 8 lanes, which lanes come one behind the other, a byte each.
  struct Orders {
    uint64_t of[256];
  };
  static constexpr Orders make_orders() {
    Orders orders{};
    for (unsigned mask = 0; mask < 256; ++mask)
      for (unsigned lane = 0, count = 0; lane < 8; ++lane)
        if (mask >> lane & 1) orders.of[mask] |= uint64_t(lane) << 8 * count++;
    return orders;
  }
  static __m256i order_of(int mask) {
    static constexpr Orders kOrders = make_orders();
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kOrders.of[mask])));
  }
  static void store_half(uint16_t* p, __m256 even, __m256 odd) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, _mm256_castps_si256(odd)));
  }
  static __m256i words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  template <int i>
  static __m256 signed_byte(__m256i word) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(word, 24 - 8 * i), 24));
  }
  static __m256 scaled(__m256 v, __m256 x) {
    const __m256 n = _mm256_floor_ps(x);
    // The exponent field holds -126 ... 127.
    const __m256 low = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
    const __m256 held = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(127.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(held), _mm256_set1_epi32(127));
    return _mm256_andnot_ps(low, _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))));
  }
  // Round to nearest, ties to even, into the low half of each lane; a NaN stays one because its quiet bit is set.
  static __m256i rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  }
};

}  // namespace

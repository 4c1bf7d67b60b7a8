// What the kernels multiply, written over `Simd`, and how they see to it that memory has come when they need it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "api.h"
#include "parallel.h"

namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

using V = Simd::V;
constexpr int kLanes = 16;
constexpr float kLog2E = 1.44269504f;  // e^x = 2^(x log2(e))
constexpr int64_t kMaxHeadDim = 512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 2^x, as precise as its use: polynomials over [0, 1) fitted by weighted least squares, with relative errors below 8e-8
// for what stays float32 and 8e-5 for what becomes bfloat16 (whose step is 4e-3), times a power of two.
template <class A>
ALWAYS_INLINE V exp2(V x) {
  const V f = Simd::fraction(x);
  V p;
  if constexpr (std::is_same_v<A, float>) {
    p = Simd::set1(1.877575555e-3f);
    p = Simd::fma(p, f, Simd::set1(8.989342804e-3f));
    p = Simd::fma(p, f, Simd::set1(5.582631577e-2f));
    p = Simd::fma(p, f, Simd::set1(2.401536178e-1f));
    p = Simd::fma(p, f, Simd::set1(6.931530731e-1f));
    p = Simd::fma(p, f, Simd::set1(9.999999251e-1f));
  } else {
    p = Simd::set1(7.802442484e-2f);
    p = Simd::fma(p, f, Simd::set1(2.260672948e-1f));
    p = Simd::fma(p, f, Simd::set1(6.958334925e-1f));
    p = Simd::fma(p, f, Simd::set1(9.999252208e-1f));
  }
  return Simd::scale(p, x);
}

// Operand kinds ------------------------------------------------------------------------------------------------------
//
// A: what multiplies from the left, row-major in memory. B: packed, from the right. kDepth: elements along K of a step,
// which takes 16 * kDepth elements of B.

// Kinds whose sums are registers of 16 lanes.
struct InLanes {
  static constexpr int kMostRows = Simd::kMostRows;
  static constexpr int kQueryRows = Simd::kMostRows;
  // What the processor is told before products of so many rows: nothing.
  struct Session {
    void rows(int64_t) {}
  };
};

// acc[i][j] += x[i] w[j], with x[i] at a[i * lda]
template <int rows, int tiles>
ALWAYS_INLINE void add_outer(V (&acc)[rows][tiles], const float* a, int64_t lda, const V (&w)[tiles]) {
  for (int i = 0; i < rows; ++i) {
    const V x = Simd::set1(a[i * lda]);
    for (int j = 0; j < tiles; ++j) acc[i][j] = Simd::fma(x, w[j], acc[i][j]);
  }
}

struct Float32 : InLanes {
  using A = float;
  using B = float;
  static constexpr int kDepth = 1;
  static constexpr Format kFormat = kFloat32;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    V w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = Simd::load(b[j]);
    add_outer(acc, a, lda, w);
  }
  // The same for weights in registers, of two neighbouring depths.
  template <int rows, int tiles>
  static ALWAYS_INLINE void add_pair(V (&acc)[rows][tiles], const A* const (&x)[rows], int64_t depth,
                                     const V (&even)[tiles], const V (&odd)[tiles]) {
    for (int i = 0; i < rows; ++i) {
      const V first = Simd::set1(x[i][depth]), second = Simd::set1(x[i][depth + 1]);
      for (int j = 0; j < tiles; ++j) acc[i][j] = Simd::fma(second, odd[j], Simd::fma(first, even[j], acc[i][j]));
    }
  }
};

struct WidenedBf16 : InLanes {
  using A = float;
  using B = uint16_t;
  static constexpr int kDepth = 2;
  static constexpr Format kFormat = kBFloat16;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    V w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = Simd::even(b[j]);
    add_outer(acc, a, lda, w);
    for (int j = 0; j < tiles; ++j) w[j] = Simd::odd(b[j]);
    add_outer(acc, a + 1, lda, w);
  }
};

#ifdef __AVX512BF16__
struct DotBf16 : InLanes {
  using A = uint16_t;
  using B = uint16_t;
  static constexpr int kDepth = 2;
  static constexpr Format kFormat = kBFloat16;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    __m512bh w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = (__m512bh)_mm512_loadu_si512(b[j]);
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < tiles; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, w[j]);
    }
  }
  template <int rows, int tiles>
  static ALWAYS_INLINE void add_pair(V (&acc)[rows][tiles], const A* const (&x)[rows], int64_t depth,
                                     const V (&even)[tiles], const V (&odd)[tiles]) {
    __m512bh w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = (__m512bh)Simd::rounded_pairs(even[j], odd[j]);
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, x[i] + depth, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < tiles; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], both, w[j]);
    }
  }
};
#endif

struct WidenedInt8 : InLanes {
  using A = float;
  using B = int8_t;
  static constexpr int kDepth = 4;
  static constexpr Format kFormat = kInt8;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    add<0>(acc, a, lda, b);
    add<1>(acc, a, lda, b);
    add<2>(acc, a, lda, b);
    add<3>(acc, a, lda, b);
  }

 private:
  template <int depth, int rows, int tiles>
  static ALWAYS_INLINE void add(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    V w[tiles];
    for (int j = 0; j < tiles; ++j) w[j] = Simd::byte<depth>(b[j]);
    add_outer(acc, a + depth, lda, w);
  }
};

#ifdef __AVX512BF16__
struct DotInt8 : InLanes {
  using A = uint16_t;
  using B = int8_t;
  static constexpr int kDepth = 4;
  static constexpr Format kFormat = kInt8;

  template <int rows, int tiles>
  static ALWAYS_INLINE void step(V (&acc)[rows][tiles], const A* a, int64_t lda, const B* const (&b)[tiles]) {
    __m512bh first[tiles], second[tiles];
    for (int j = 0; j < tiles; ++j) {
      // Whole numbers below 256 are exact in bfloat16.
      first[j] = (__m512bh)Simd::pairs(Simd::byte<0>(b[j]), Simd::byte<1>(b[j]));
      second[j] = (__m512bh)Simd::pairs(Simd::byte<2>(b[j]), Simd::byte<3>(b[j]));
    }
    for (int i = 0; i < rows; ++i) {
      int32_t pair[2];
      std::memcpy(pair, a + i * lda, 8);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair[0]), y = (__m512bh)_mm512_set1_epi32(pair[1]);
      for (int j = 0; j < tiles; ++j) {
        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, first[j]);
        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], y, second[j]);
      }
    }
  }
};
#endif

template <class Kind>
constexpr bool kInTiles = !std::is_base_of_v<InLanes, Kind>;

// Beside a kind: those that take int8 weights, few rows at a time and, made bfloat16 first, many.
template <class Kind>
struct ForInt8 {
  using Few = WidenedInt8;
  using Many = WidenedBf16;
};
#ifdef __AVX512BF16__
template <>
struct ForInt8<DotBf16> {
  using Few = DotInt8;
  using Many = DotBf16;
};
#endif
#ifdef __AMX_BF16__
template <>
struct ForInt8<TilesBf16> {
  using Many = TilesBf16;
};
#endif

inline void store_row(float* out, V v) { Simd::store(out, v); }
inline void store_row(uint16_t* out, V v) { Simd::store_bf16(out, v); }

// Beside a kind: what multiplies by weights that were decoded from blocks, which are never rounded to be widened again.
template <class Kind>
struct ForBlocks {
  using Decoded = Kind;
};
template <>
struct ForBlocks<WidenedBf16> {
  using Decoded = Float32;
};

// Memory that will be read --------------------------------------------------------------------------------------------

constexpr int64_t kKeys = 512;  // keys whose scores are in memory at a time
constexpr int64_t kKeyTiles = kKeys / kLanes;

// What a thread reads in its next unit of work, fetched into the second-level cache line after line while it computes.
// Otherwise the first rows of a unit wait for memory and the others leave it idle. Requested in one burst, or in leaps
// from page to page, the lines would hold up the products behind them.
class Ahead {
 public:
  void expect_nothing() {
    count_ = next_piece_ = 0;
    next_ = end_ = nullptr;
  }
  // One more piece; all pieces of a unit have the same size.
  void expect(const void* start, int64_t bytes) {
    pieces_[count_++] = static_cast<const char*>(start);
    bytes_ = bytes;
  }
  // All of it shall be fetched in `calls` calls of fetch().
  void spread(int64_t calls) { lines_ = ceil_div(count_ * bytes_, 64 * std::max<int64_t>(calls, 1)); }

  ALWAYS_INLINE void fetch() {
    for (int64_t i = 0; i < lines_; ++i, next_ += 64) {
      if (next_ >= end_) {
        if (next_piece_ == count_) return;
        next_ = pieces_[next_piece_++];
        end_ = next_ + bytes_;
      }
      _mm_prefetch(next_, _MM_HINT_T1);
    }
  }

 private:
  const char* pieces_[2 * kKeyTiles];
  int64_t count_ = 0, next_piece_ = 0, bytes_ = 0, lines_ = 0;
  const char *next_ = nullptr, *end_ = nullptr;
};

// Where a few rows read memory once, or tile registers outrun it, its speed is the limit and the processor's own
// prefetchers reach it better: decoding 8 sequences in tiles took a third longer with than without.
template <class Kind>
inline bool looks_ahead(int64_t rows) {
  return !kInTiles<Kind> && rows > Simd::kRows;
}

}  // namespace

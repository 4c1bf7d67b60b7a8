// Norms of rows, and what adds a normalised row to the residual stream.
#pragma once

#include <cmath>
#include <cstdint>

#include "operands.h"

namespace {

// How one row is moved and scaled.
struct Moments {
  float mean, factor;
};

inline Moments moments_of(const Norm& norm, const float* x) {
  float mean = 0.0f;
  if (norm.kind == kLayerNorm) {
    V sum = Simd::zero();
    for (int64_t i = 0; i < norm.size; i += kLanes) sum = Simd::add(sum, Simd::load(x + i));
    mean = Simd::sum(sum) / float(norm.size);
  }
  const V centre = Simd::set1(mean);
  V squares = Simd::zero();
  for (int64_t i = 0; i < norm.size; i += kLanes) {
    const V v = Simd::sub(Simd::load(x + i), centre);
    squares = Simd::fma(v, v, squares);
  }
  return {mean, 1.0f / std::sqrt(Simd::sum(squares) / float(norm.size) + norm.eps)};
}

// Calls take(i, v) with 16 normalised elements from i on, for `size` elements of x; the weights begin at `first`.
template <class Take>
ALWAYS_INLINE void normalise(const Norm& norm, Moments moments, const float* x, int64_t size, int64_t first,
                             Take&& take) {
  const V centre = Simd::set1(moments.mean), factor = Simd::set1(moments.factor);
  const float* weight = norm.weight ? norm.weight + first : nullptr;
  const float* bias = norm.bias ? norm.bias + first : nullptr;
  for (int64_t i = 0; i < size; i += kLanes) {
    V v = Simd::mul(Simd::sub(Simd::load(x + i), centre), factor);
    if (weight) v = Simd::mul(v, Simd::load(weight + i));
    if (bias) v = Simd::add(v, Simd::load(bias + i));
    take(i, v);
  }
}

// Without a norm, x itself becomes an operand.
template <class A>
inline void norm_row(const Norm& norm, const float* x, int64_t size, A* out) {
  if (norm.kind == kNoNorm) {
    for (int64_t i = 0; i < size; i += kLanes) store_row(out + i, Simd::load(x + i));
    return;
  }
  normalise(norm, moments_of(norm, x), x, size, 0, [&](int64_t i, V v) { store_row(out + i, v); });
}

template <class A>
void norm_rows(Member& member, const Norm& norm, const float* x, int64_t rows, int64_t size, A* out) {
  member.for_each_range(rows, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) norm_row(norm, x + r * size, size, out + r * size);
  });
}

// What a product adds to the residual stream: hidden = keep * hidden + add * x.
struct Residual {
  float keep, add;
};

inline void add_normed_rows(Member& member, const Norm& norm, const float* x, int64_t rows, Residual residual,
                            float* hidden) {
  const V keep = Simd::set1(residual.keep), add = Simd::set1(residual.add);
  member.for_each_range(rows, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const float* row = x + r * norm.size;
      float* stream = hidden + r * norm.size;
      normalise(norm, moments_of(norm, row), row, norm.size, 0, [&](int64_t i, V v) {
        Simd::store(stream + i, Simd::fma(v, add, Simd::mul(Simd::load(stream + i), keep)));
      });
    }
  });
}

}  // namespace

// What attention reads: queries, keys and values, normalised, turned by their positions and written into place.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention.h"

namespace {

// Sets the values in the lanes after `lane` to 0, in one head's tile.
template <class C>
inline void clear_values_after(C* tile, int64_t lane, int64_t d) {
  for (C* to = tile; to < tile + kLanes * d; to += kLanes * kLanes) {
    if constexpr (std::is_same_v<C, float>) {
      std::memset(to + (lane + 1) * kLanes, 0, (kLanes - 1 - lane) * kLanes * sizeof(C));
    } else {
      for (int64_t i = 0; lane % 2 == 0 && i < kLanes; ++i) to[(lane / 2 * kLanes + i) * 2 + 1] = 0;
      std::memset(to + (lane / 2 + 1) * 2 * kLanes, 0, (kLanes / 2 - 1 - lane / 2) * 2 * kLanes * sizeof(C));
    }
  }
}

// The heads of one token's q, k or v, which lie side by side, after a norm of each head or of all together.
class NormedHeads {
 public:
  NormedHeads(const Norm& norm, const float* x, int64_t d)
      : norm_(norm), x_(x), d_(d), together_(norm.size != d) {
    if (norm.kind != kNoNorm && together_) moments_ = moments_of(norm, x);
  }
  // Head `h`; where there is a norm, in `space`.
  const float* head(int64_t h, float* space) const {
    const float* x = x_ + h * d_;
    if (norm_.kind == kNoNorm) return x;
    normalise(norm_, together_ ? moments_ : moments_of(norm_, x), x, d_, together_ ? h * d_ : h * norm_.head_stride,
              [&](int64_t i, V v) { Simd::store(space + i, v); });
    return space;
  }

 private:
  const Norm& norm_;
  const float* x_;
  int64_t d_;
  bool together_;
  Moments moments_{};
};

// Turns the first rope.dim elements of a head; the others stay.
inline void turn(const Rope& rope, int64_t position, const float* x, int64_t d, float* out) {
  const int64_t half = rope.dim / 2;
  const float* cosines = rope.cos_sin + position * rope.dim;
  const float* sines = cosines + half;
  if (rope.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cosines[i] - b * sines[i];
      out[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      out[i] = a * cosines[i] - b * sines[i];
      out[half + i] = b * cosines[i] + a * sines[i];
    }
  }
  for (int64_t i = rope.dim; i < d; ++i) out[i] = x[i];
}

// q and k of one token are turned, K and V written into their tiles, and `take_q(head, turned)` called for each query
// head.
template <class C, class TakeQ>
inline void rope_and_write_token(const Attention& shape, const Batch& batch, int64_t token, const float* qkv,
                                 C* k_cache, C* v_cache, TakeQ&& take_q) {
  const int64_t heads = shape.num_heads, kv_heads = shape.num_kv_heads, d = shape.head_dim;
  const int64_t slot = batch.slots[token], tile = slot / kLanes, lane = slot % kLanes;
  constexpr int64_t kDepth = sizeof(float) / sizeof(C);  // elements along K that lie together in a packed matrix
  alignas(64) float normed[kMaxHeadDim], turned[kMaxHeadDim];
  alignas(64) C stored[kMaxHeadDim];
  auto ready = [&](const NormedHeads& x, int64_t h) -> const float* {
    const float* head = x.head(h, normed);
    if (!shape.rope.cos_sin) return head;
    turn(shape.rope, batch.positions[token], head, d, turned);
    return turned;
  };
  const NormedHeads q(shape.q_norm, qkv, d), k(shape.k_norm, qkv + heads * d, d);
  const NormedHeads v(shape.v_norm, qkv + (heads + kv_heads) * d, d);
  for (int64_t h = 0; h < heads; ++h) take_q(h, ready(q, h));
  for (int64_t h = 0; h < kv_heads; ++h) {
    const float* x = ready(k, h);
    C* to = k_cache + (tile * kv_heads + h) * kLanes * d;
    for (int64_t i = 0; i < d; i += kLanes) store_row(stored + i, Simd::load(x + i));
    for (int64_t i = 0; i < d; i += kDepth)
      std::memcpy(to + i * kLanes + lane * kDepth, stored + i, sizeof(C) * kDepth);
  }
  // Tiles are multiplied whole, values after the last key by 0: an infinity or NaN that a former owner of the block left
  // there would spread. So the first run of tokens that is written into a tile clears what comes after it.
  auto in_tile = [&](int64_t other) {
    return other >= 0 && other < batch.num_tokens && batch.slots[other] / kLanes == tile;
  };
  const bool clears = !in_tile(token + 1) && (lane == 0 || in_tile(token - 1));
  for (int64_t h = 0; h < kv_heads; ++h) {
    const float* x = v.head(h, normed);
    C* to = v_cache + (tile * kv_heads + h) * kLanes * d;
    if (clears) clear_values_after(to, lane, d);
    for (int64_t i = 0; i < d; i += kLanes, to += kLanes * kLanes) {
      store_row(stored, Simd::load(x + i));
      for (int64_t j = 0; j < kLanes; ++j) to[(lane / kDepth * kLanes + j) * kDepth + lane % kDepth] = stored[j];
    }
  }
}

template <class C, class TakeQ>
void rope_and_write(Member& member, const Attention& shape, const Batch& batch, const float* qkv, C* k_cache,
                    C* v_cache, TakeQ&& take_q) {
  const int64_t size = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  member.for_each_range(batch.num_tokens, 2, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      rope_and_write_token(shape, batch, t, qkv + t * size, k_cache, v_cache,
                           [&](int64_t head, const float* turned) { take_q(t, head, turned); });
  });
}

// Writes a query, scaled, where `attention` reads it: [KVH][num_tokens][heads per KV head][D], so that the rows that
// read one KV head lie together.
template <class A>
inline void store_query(const Attention& shape, const Batch& batch, int64_t token, int64_t head, const float* from,
                        A* q) {
  const int64_t per_kv = shape.num_heads / shape.num_kv_heads, d = shape.head_dim;
  A* to = q + ((head / per_kv * batch.num_tokens + token) * per_kv + head % per_kv) * d;
  float factor = query_factor(shape);
  if (shape.query_factors) factor *= shape.query_factors[batch.positions[token]];
  const V by = Simd::set1(factor);
  for (int64_t i = 0; i < d; i += kLanes) store_row(to + i, Simd::mul(Simd::load(from + i), by));
}

}  // namespace

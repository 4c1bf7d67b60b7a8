// Attention over tiles of 16 keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "linear.h"

namespace {

constexpr int64_t kMostUnitRows = 128;  // at least kUnitQueries; one token may have that many in a KV head

// Where the keys and values of one KV head lie, a tile of 16 slots at a time.
template <class C>
struct HeadTiles {
  const C *k_cache, *v_cache;
  const AttentionUnit* unit;
  int64_t per_block;  // tiles of a block
  int64_t kv_heads, kv_head, size;

  // Elements before the tile.
  int64_t at(int64_t tile) const {
    const int64_t index = unit->table == nullptr ? unit->first_slot / kLanes + tile
                                                 : unit->table[tile / per_block] * per_block + tile % per_block;
    return (index * kv_heads + kv_head) * size;
  }
  // The first keys from `first_key` on, then their values.
  void expect(int64_t first_key, Ahead& ahead) const {
    const int64_t first = first_key / kLanes;
    const int64_t end = std::min(first + kKeyTiles, ceil_div(unit->end_key, kLanes));
    for (const C* cache : {k_cache, v_cache})
      for (int64_t tile = first; tile < end; ++tile) ahead.expect(cache + at(tile), size * int64_t(sizeof(C)));
  }
};

// What the softmax of some rows of queries needs between one run of keys and the next.
struct SoftmaxRows {
  float* base;   // of the weights 2^(score - base); kHidden until a key is visible
  float* shift;  // what is subtracted: the base, or 0 where there is none yet, so that hidden scores weigh nothing
  float* lanes;  // [row][kLanes] sums of weights, not yet added up over the lanes
  float* sums;   // [row][d] sums of weighted values

  SoftmaxRows from(int64_t row, int64_t d) const {
    return {base + row, shift + row, lanes + row * kLanes, sums + row * d};
  }
};

// As online softmax does (Milakov and Gimelshein, 2018), but a base follows the highest score only when that has left
// it far behind: any base will do while no weight overflows.
template <int rows>
ALWAYS_INLINE void raise_bases(const float* scores, int64_t tiles, const SoftmaxRows& state, int64_t d) {
  constexpr float kFar = 40.0f;
  V tops[rows], most = Simd::set1(kHidden);
  for (int i = 0; i < rows; ++i) {
    tops[i] = Simd::load(scores + i * kKeys);
    for (int64_t t = 1; t < tiles; ++t) tops[i] = Simd::max(tops[i], Simd::load(scores + i * kKeys + t * kLanes));
    most = Simd::max(most, Simd::sub(tops[i], Simd::set1(state.base[i])));
  }
  if (!Simd::any_above(most, Simd::set1(kFar))) return;
  for (int i = 0; i < rows; ++i) {
    const float next = Simd::highest(tops[i]);
    if (next - state.base[i] <= kFar) continue;
    const V factor = Simd::set1(state.base[i] == kHidden ? 0.0f : std::exp2(state.base[i] - next));
    state.base[i] = state.shift[i] = next;
    Simd::store(state.lanes + i * kLanes, Simd::mul(Simd::load(state.lanes + i * kLanes), factor));
    for (float* sum = state.sums + i * d; sum < state.sums + (i + 1) * d; sum += kLanes)
      Simd::store(sum, Simd::mul(Simd::load(sum), factor));
  }
}

// Weights of one tile of keys.
template <int rows, class A>
ALWAYS_INLINE void weigh(const float* scores, const SoftmaxRows& state, A* weights) {
  for (int i = 0; i < rows; ++i) {
    const V p = exp2<A>(Simd::sub(Simd::load(scores + i * kKeys), Simd::set1(state.shift[i])));
    Simd::store(state.lanes + i * kLanes, Simd::add(Simd::load(state.lanes + i * kLanes), p));
    store_row(weights + i * kKeys, p);
  }
}

// sums[i][16 column ...] += weights[i] · values, over `count` tiles of 16 keys. Where the weights are still scores, those
// of the next tile are made while this one is multiplied: the powers then take turns with the products in the
// processor's units instead of following them.
template <class Kind, int rows, int tiles, bool weighs, class C>
ALWAYS_INLINE void add_values(const float* scores, typename Kind::A* weights, const C* const* v_tiles, int64_t count,
                              int64_t column, const SoftmaxRows& state, int64_t d, Ahead& ahead) {
  if constexpr (weighs) weigh<rows>(scores, state, weights);
  V acc[rows][tiles];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < tiles; ++j) acc[i][j] = Simd::load(state.sums + i * d + (column + j) * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    if constexpr (weighs)
      if (t + 1 < count) weigh<rows>(scores + (t + 1) * kLanes, state, weights + (t + 1) * kLanes);
    const C* b[tiles];
    for (int j = 0; j < tiles; ++j) b[j] = v_tiles[t] + (column + j) * kLanes * kLanes;
    multiply<Kind>(acc, weights + t * kLanes, kKeys, b, kLanes / Kind::kDepth, ahead);
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < tiles; ++j) Simd::store(state.sums + i * d + (column + j) * kLanes, acc[i][j]);
}

// The weights of `rows`, up to Simd::kMostRows, from their scores, and their products with the values.
template <class Kind, class C>
ALWAYS_INLINE void attend_in_lanes(int64_t rows, const float* scores, typename Kind::A* weights,
                                   const C* const* v_tiles, int64_t count, const SoftmaxRows& state, int64_t d,
                                   Ahead& ahead) {
  with_rows(rows, [&](auto r) {
    raise_bases<r>(scores, count, state, d);
    auto add = [&](auto width, auto weighs, int64_t column) {
      add_values<Kind, r, width, weighs>(scores, weights, v_tiles, count, column, state, d, ahead);
    };
    constexpr int wide = tiles_for(decltype(r)::value);
    using Wide = std::integral_constant<int, wide>;
    using One = std::integral_constant<int, 1>;
    const int64_t d_tiles = d / kLanes;
    int64_t column = d_tiles >= wide ? wide : 1;
    if (d_tiles >= wide)
      add(Wide(), std::true_type(), 0);
    else
      add(One(), std::true_type(), 0);
    for (; column + wide <= d_tiles; column += wide) add(Wide(), std::false_type(), column);
    for (; column < d_tiles; ++column) add(One(), std::false_type(), column);
  });
}

// The weights of `rows`, up to 16, from scores that were made in tile registers, and their products with the values.
template <class Kind, class C>
ALWAYS_INLINE void attend_in_tiles(int64_t rows, const float* scores, typename Kind::A* weights,
                                   const C* const* v_tiles, int64_t count, const SoftmaxRows& state, int64_t d) {
  for (int64_t i = 0, some; i < rows; i += some) {
    some = std::min<int64_t>(rows - i, Simd::kMostRows);
    with_rows(some, [&](auto r) { raise_bases<r>(scores + i * kKeys, count, state.from(i, d), d); });
  }
  auto add = [&](auto tiles, int64_t column) {
    Kind::template add_values<tiles>(weights, kKeys, v_tiles, count, column, state.sums, d, [&](int64_t t) {
      if (column > 0) return;
      for (int64_t i = 0; i < rows; ++i)
        weigh<1>(scores + i * kKeys + t * kLanes, state.from(i, d), weights + i * kKeys + t * kLanes);
    });
  };
  const int64_t d_tiles = d / kLanes;  // an even number, since depths in tiles are multiples of 32
  int64_t column = 0;
  for (; column + 4 <= d_tiles; column += 4) add(std::integral_constant<int, 4>(), column);
  if (column < d_tiles) add(std::integral_constant<int, 2>(), column);
}

// Lanes before `first` become a score so low that its power of two is 0.
ALWAYS_INLINE V hide_before(V v, int64_t first) {
  const unsigned shown = first >= kLanes ? 0u : 0xffffu << first & 0xffffu;
  return Simd::choose(Simd::from_bits(shown), v, Simd::set1(kHidden));
}

// Scores are in powers of two; a query holds its factor already.
inline float query_factor(const Attention& shape) {
  return shape.softcap != 0.0f ? shape.scale / shape.softcap : shape.scale * kLog2E;
}

// One unit: the queries of some neighbouring tokens of one KV head against some keys. Leaves, for every row, the
// unnormalised sum of values, the base of its weights and their sum. `then()` expects what the thread reads after it.
template <class Kind, class C, class Then>
void attention_unit(const Attention& shape, const Batch& batch, const HeadTiles<C>& own, const typename Kind::A* q,
                    float* sums, float* base, float* totals, Ahead& ahead, const Then& then) {
  using A = typename Kind::A;
  const AttentionUnit& unit = *own.unit;
  const int64_t d = shape.head_dim, per_kv = shape.num_heads / shape.num_kv_heads;
  const int64_t rows = unit.num_tokens * per_kv, d_tiles = d / kLanes;
  const A* queries = q + (own.kv_head * batch.num_tokens + unit.first_token) * per_kv * d;
  const V cap = Simd::set1(shape.softcap * kLog2E);
  alignas(64) float scores[Kind::kQueryRows * kKeys];
  alignas(64) A weights[Kind::kQueryRows * kKeys];
  typename Kind::Session session;

  alignas(64) float lanes[kMostUnitRows * kLanes];
  alignas(64) float shift[kMostUnitRows];
  std::fill_n(base, rows, kHidden);
  std::fill_n(shift, rows, 0.0f);
  std::memset(lanes, 0, rows * kLanes * sizeof(float));
  std::memset(sums, 0, rows * d * sizeof(float));
  for (int64_t key = unit.first_key; key < unit.end_key; key += kKeys) {
    const int64_t tiles = std::min(kKeyTiles, ceil_div(unit.end_key - key, kLanes));
    const C *k_tiles[kKeyTiles], *v_tiles[kKeyTiles];
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t start = own.at(key / kLanes + t);
      k_tiles[t] = own.k_cache + start, v_tiles[t] = own.v_cache + start;
    }
    ahead.expect_nothing();
    if (looks_ahead<Kind>(rows)) {
      if (key + kKeys < unit.end_key)
        own.expect(key + kKeys, ahead);
      else
        then();
      ahead.spread(num_fetches(rows, tiles, d / Kind::kDepth) + tiles * num_fetches(rows, d_tiles, kLanes / Kind::kDepth));
    }
    for (int64_t row = 0, some; row < rows; row += some) {
      some = next_rows<Kind>(rows - row, Kind::kQueryRows);
      // Keys that the last of these rows may see; without a causal limit, all.
      auto limit = [&](int64_t r) {
        return unit.causal ? std::min(unit.end_key, unit.first_position + r / per_kv + 1) : unit.end_key;
      };
      const int64_t seen = std::min(tiles, ceil_div(limit(row + some - 1) - key, kLanes));
      // Tiles before the windows of all these rows are left out.
      int64_t first = 0;
      if (unit.lowest) {
        const int64_t* token = unit.lowest + row / per_kv;
        first = (*std::min_element(token, unit.lowest + (row + some - 1) / per_kv + 1) - key) / kLanes;
        first = std::max<int64_t>(first, 0);
      }
      const int64_t count = seen - first, from = key + first * kLanes;
      if (count <= 0) continue;
      session.rows(some);
      product<Kind>(queries + row * d, d, some, [&](int64_t t) { return k_tiles[first + t]; }, count, d / Kind::kDepth,
                    scores, kKeys, ahead, true);
      if (shape.softcap != 0.0f)
        for (int64_t i = 0; i < some; ++i)
          for (float* line = scores + i * kKeys; line < scores + i * kKeys + count * kLanes; line += kLanes)
            Simd::store(line, capped(Simd::load(line), cap));
      for (int64_t i = 0; i < some; ++i) {
        float* line = scores + i * kKeys;
        const int64_t visible = limit(row + i) - from;
        for (int64_t t = std::max<int64_t>(visible, 0) / kLanes; t < count; ++t)
          Simd::store(line + t * kLanes, Simd::hide_from(Simd::load(line + t * kLanes), int(visible - t * kLanes)));
        if (!unit.lowest) continue;
        const int64_t hidden = unit.lowest[(row + i) / per_kv] - from;
        for (int64_t t = 0; t < count && t * kLanes < hidden; ++t)
          Simd::store(line + t * kLanes, hide_before(Simd::load(line + t * kLanes), hidden - t * kLanes));
      }
      const SoftmaxRows state = {base + row, shift + row, lanes + row * kLanes, sums + row * d};
      if constexpr (kInTiles<Kind>)
        attend_in_tiles<Kind>(some, scores, weights, v_tiles + first, count, state, d);
      else
        attend_in_lanes<Kind>(some, scores, weights, v_tiles + first, count, state, d, ahead);
    }
  }
  for (int64_t r = 0; r < rows; ++r) totals[r] = Simd::sum(Simd::load(lanes + r * kLanes));
}

// Joins the parts of one query row by their log-sum-exps, a sink among them, and writes it, normalised.
template <class A>
inline void merge_row(const AttentionPlan& plan, const Buffers& parts, int64_t token, int64_t head,
                      const Attention& shape, A* out) {
  const int64_t d = shape.head_dim, per_kv = shape.num_heads / shape.num_kv_heads;
  auto row_of = [&](int64_t part) {
    const AttentionUnit& unit = plan.units[plan.parts[part]];
    return unit.first_row + (head / per_kv * unit.num_tokens + token - unit.first_token) * per_kv + head % per_kv;
  };
  const int64_t first = plan.parts_of[token], end = plan.parts_of[token + 1];
  const float sink = shape.sinks ? shape.sinks[head] * kLog2E : kHidden;
  float top = sink;
  for (int64_t p = first; p < end; ++p) top = std::max(top, parts.bases[row_of(p)]);
  float total = shape.sinks ? std::exp2(sink - top) : 0.0f;
  V sum[kMaxHeadDim / kLanes];
  for (int64_t i = 0; i < d / kLanes; ++i) sum[i] = Simd::zero();
  for (int64_t p = first; p < end; ++p) {
    const int64_t row = row_of(p);
    const float weight = std::exp2(parts.bases[row] - top);
    total += weight * parts.totals[row];
    for (int64_t i = 0; i < d / kLanes; ++i)
      sum[i] = Simd::fma(Simd::load(parts.sums + row * d + i * kLanes), Simd::set1(weight), sum[i]);
  }
  const V norm = Simd::set1(1.0f / total);
  for (int64_t i = 0; i < d / kLanes; ++i) store_row(out + i * kLanes, Simd::mul(sum[i], norm));
}

// The units of attention, of each KV head apart.
template <class C>
struct AttentionUnits {
  const Attention& shape;
  const Batch& batch;
  const AttentionPlan& plan;
  const C *k_cache, *v_cache;
  const int64_t count = plan.num_units * shape.num_kv_heads;

  HeadTiles<C> operator[](int64_t i) const {
    return {k_cache, v_cache, plan.units + i / shape.num_kv_heads, batch.block_size / kLanes, shape.num_kv_heads,
            i % shape.num_kv_heads, kLanes * shape.head_dim};
  }
  void expect(int64_t i, Ahead& ahead) const {
    if (i >= count) return;
    const HeadTiles<C> tiles = (*this)[i];
    tiles.expect(tiles.unit->first_key, ahead);
  }
};

template <class Kind, class C, class Out>
void attention(Member& member, const AttentionUnits<C>& units, const Buffers& buffers, Out* out, const Next& next) {
  const Attention& shape = units.shape;
  const Batch& batch = units.batch;
  const int64_t per_kv = shape.num_heads / shape.num_kv_heads, d = shape.head_dim;
  const auto* q = static_cast<const typename Kind::A*>(buffers.q);
  Ahead ahead;
  member.for_each(units.count, [&](int64_t i) {
    const HeadTiles<C> own = units[i];
    const int64_t row = own.unit->first_row + own.kv_head * own.unit->num_tokens * per_kv;
    attention_unit<Kind>(shape, batch, own, q, buffers.sums + row * d, buffers.bases + row, buffers.totals + row,
                         ahead, LookAhead<AttentionUnits<C>>{member, units, i, ahead, next});
  });
  member.for_each_range(batch.num_tokens, 2, [&](int64_t from, int64_t to) {
    for (int64_t token = from; token < to; ++token)
      for (int64_t head = 0; head < shape.num_heads; ++head)
        merge_row(units.plan, buffers, token, head, shape, out + (token * shape.num_heads + head) * d);
  });
}

}  // namespace

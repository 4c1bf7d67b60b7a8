// The kernels, written once over `Simd`; each isa_*.cpp includes this with the flags of its instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "decoder.h"
#include "sampling.h"

namespace {

// Calls f with the kind of operands for a format and an arithmetic.
template <class F>
void with_kind([[maybe_unused]] int32_t format, [[maybe_unused]] int32_t arithmetic, F&& f) {
#ifdef __AMX_BF16__
  return f(TilesBf16());  // called for nothing else
#else
  if (format == kFloat32 || format == kBlocks) return f(Float32());
#ifdef __AVX512BF16__
  if (arithmetic != kWiden) return f(DotBf16());
#endif
  return f(WidenedBf16());
#endif
}

// x Wᵀ + b for rows of float32; they become left operands in buffers.x.
void linear_of(Member& member, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
               int32_t arithmetic, const Finish& finish) {
  with_kind(w.format, arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    auto* operands = static_cast<typename Kind::A*>(buffers.x);
    norm_rows(member, Norm{}, x, rows, w.k, operands);
    linear<Kind>(member, buffers, operands, w.k, rows, w, finish, kNothingNext);
  });
}

void enter_stack(Team& team, int index, const Stack& stack, const Batch& batch, const AttentionPlan* const* plans,
                 const Buffers& buffers, float* hidden) {
  Member member(team, index);
  with_kind(stack.cache_format, stack.arithmetic, [&](auto kind) {
    run_stack<decltype(kind)>(member, stack, batch, plans, buffers, hidden);
  });
}

void enter_linear(Team& team, int index, const float* x, int64_t rows, const Projection& projection,
                  const Buffers& buffers, int32_t arithmetic, float* out) {
  Member member(team, index);
  linear_of(member, x, rows, projection.w, buffers, arithmetic, StoreLogits(projection, out));
}

void enter_activated(Team& team, int index, const float* x, int64_t rows, const Matrix& w, int32_t activation,
                     int32_t gated, const Buffers& buffers, int32_t arithmetic, float* out) {
  Member member(team, index);
  const Activate<float> finish(out, gated ? w.n / 2 : w.n, activation, gated);
  linear_of(member, x, rows, w, buffers, arithmetic, finish);
}

void enter_norm(Team& team, int index, const float* x, int64_t rows, const Norm& norm, float* out) {
  Member member(team, index);
  norm_rows(member, norm, x, rows, norm.size, out);
}

void enter_rope_and_write(Team& team, int index, const Attention& shape, const Batch& batch, const float* qkv,
                          int32_t cache_format, void* k_cache, void* v_cache, float* q) {
  Member member(team, index);
  const int64_t d = shape.head_dim;
  auto take_q = [&](int64_t token, int64_t head, const float* turned) {
    std::memcpy(q + (token * shape.num_heads + head) * d, turned, d * sizeof(float));
  };
  if (cache_format == kFloat32)
    rope_and_write(member, shape, batch, qkv, static_cast<float*>(k_cache), static_cast<float*>(v_cache), take_q);
  else
    rope_and_write(member, shape, batch, qkv, static_cast<uint16_t*>(k_cache), static_cast<uint16_t*>(v_cache), take_q);
}

void enter_attention(Team& team, int index, const Attention& shape, const Batch& batch, const AttentionPlan& plan,
                     const Buffers& buffers, const float* q, int32_t cache_format, int32_t arithmetic,
                     const void* k_cache, const void* v_cache, float* out) {
  Member member(team, index);
  with_kind(cache_format, arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    using C = typename Kind::B;
    auto* queries = static_cast<typename Kind::A*>(buffers.q);
    member.for_each_range(batch.num_tokens, 4, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        for (int64_t h = 0; h < shape.num_heads; ++h)
          store_query(shape, batch, t, h, q + (t * shape.num_heads + h) * shape.head_dim, queries);
    });
    const AttentionUnits<C> units = {shape, batch, plan, static_cast<const C*>(k_cache),
                                     static_cast<const C*>(v_cache)};
    attention<Kind>(member, units, buffers, out, kNothingNext);
  });
}

void enter_most_likely(Team& team, int index, const float* x, int64_t rows, const Projection& projection,
                       const Buffers& buffers, int32_t arithmetic, int64_t* out) {
  Member member(team, index);
  const Highest highest(projection, buffers, nullptr);
  linear_of(member, x, rows, projection.w, buffers, arithmetic, highest);
  member.for_each(rows, [&](int64_t row) { out[row] = highest.column_of(row); });
}

void enter_head(Team& team, int index, const Head& head, const Buffers& buffers, const Draw& draw) {
  Member member(team, index);
  const Highest highest(head.projection, buffers, head.logits);
  linear_of(member, head.x, draw.num_rows, head.projection.w, buffers, head.arithmetic, highest);
  member.for_each(draw.num_rows, [&](int64_t row) {
    if (head.logits[row] == nullptr) draw.drawn[row] = highest.column_of(row);
  });
  draw_rows(member, draw);
}

void enter_draw(Team& team, int index, const Draw& draw) {
  Member member(team, index);
  draw_rows(member, draw);
}

void enter_logprobs(Team& team, int index, const Logprobs& wanted) {
  Member member(team, index);
  for_each_row(member, wanted.num_rows, wanted.spaces, [&](auto& crew, int64_t row, const ScoreSpace& space) {
    logprobs_of_row(crew, wanted, row, space);
  });
}

constexpr Kernels kKernels = {enter_stack, enter_linear,   enter_activated, enter_most_likely,    enter_head,
                              enter_draw,  enter_logprobs, enter_norm,      enter_rope_and_write, enter_attention};

}  // namespace

// The kernels, written once over `Simd`; each isa_*.cpp includes this with the flags of its instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "linear.h"
#include "sampling.h"

namespace {

template <class A>
inline void rms_norm_row(const float* x, int64_t size, const float* weight, float eps, A* out) {
  V squares = Simd::zero();
  for (int64_t i = 0; i < size; i += kLanes) {
    const V v = Simd::load(x + i);
    squares = Simd::fma(v, v, squares);
  }
  const V factor = Simd::set1(1.0f / std::sqrt(Simd::sum(squares) / float(size) + eps));
  for (int64_t i = 0; i < size; i += kLanes)
    store_row(out + i, Simd::mul(Simd::mul(Simd::load(x + i), factor), Simd::load(weight + i)));
}

template <class A>
void rms_norm(Member& member, const float* x, int64_t rows, int64_t size, const float* weight, float eps, A* out) {
  member.for_each_range(rows, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) rms_norm_row(x + r * size, size, weight, eps, out + r * size);
  });
}

// The stack of layers ------------------------------------------------------------------------------------------------

// Moves the wanted rows to the front.
template <class T>
inline void keep_wanted(const Batch& batch, T* rows, int64_t size) {
  for (int64_t i = 0; i < batch.num_wanted; ++i)
    std::memmove(rows + i * size, rows + batch.wanted[i] * size, size * sizeof(T));
}

// Between the products everything is float32; the residual stream is never rounded. The last layer does nothing more for
// tokens that are not wanted once their K and V are written; those that are, are in front then.
template <class Kind, class C>
void run_stack(Member& member, const Stack& stack, const Batch& batch, const AttentionPlan& plan,
               const Buffers& buffers, float* hidden) {
  using A = typename Kind::A;
  const int64_t size = stack.hidden_size, inner_size = stack.intermediate_size;
  const int64_t heads_size = stack.num_heads * stack.head_dim;
  const int64_t qkv_size = heads_size + 2 * stack.num_kv_heads * stack.head_dim;
  A *x = static_cast<A*>(buffers.x), *attended = static_cast<A*>(buffers.attended);
  A* inner = static_cast<A*>(buffers.inner);
  int64_t tokens = batch.num_tokens;
  for (int64_t i = 0; i < stack.num_layers; ++i) {
    const Layer& layer = stack.layers[i];
    C *k_cache = static_cast<C*>(layer.k_cache), *v_cache = static_cast<C*>(layer.v_cache);
    const AttentionUnits<C> attention_units = {stack, batch, plan, k_cache, v_cache};
    auto then_linear = [&](const Matrix& w) {
      return [&](int64_t unit, Ahead& ahead) { LinearUnits(w, tokens).expect(unit, ahead); };
    };
    rms_norm(member, hidden, tokens, size, layer.input_norm, stack.norm_eps, x);
    linear<Kind>(member, buffers, x, size, tokens, layer.qkv, Store{buffers.qkv, qkv_size},
                 [&](int64_t unit, Ahead& ahead) { attention_units.expect(unit, ahead); });
    rope_and_write(member, stack, batch, buffers.qkv, k_cache, v_cache,
                   [&](int64_t token, int64_t head, const float* turned) {
                     store_query(stack, batch, token, head, turned, static_cast<A*>(buffers.q));
                   });
    const bool narrows = i + 1 == stack.num_layers && batch.wanted;
    if (narrows && batch.num_wanted == 0) return;
    attention<Kind>(member, attention_units, buffers, attended, then_linear(layer.o));
    if (narrows) {
      member.for_each(2, [&](int64_t which) {
        if (which == 0)
          keep_wanted(batch, hidden, size);
        else
          keep_wanted(batch, attended, heads_size);
      });
      tokens = batch.num_wanted;
    }
    linear<Kind>(member, buffers, attended, heads_size, tokens, layer.o, Accumulate{hidden, size},
                 then_linear(layer.gate_up));
    rms_norm(member, hidden, tokens, size, layer.post_attention_norm, stack.norm_eps, x);
    linear<Kind>(member, buffers, x, size, tokens, layer.gate_up, SiluMul<A>{inner, inner_size},
                 then_linear(layer.down));
    linear<Kind>(member, buffers, inner, inner_size, tokens, layer.down, Accumulate{hidden, size},
                 [&](int64_t unit, Ahead& ahead) {
                   if (i + 1 < stack.num_layers) then_linear(stack.layers[i + 1].qkv)(unit, ahead);
                 });
  }
  rms_norm(member, hidden, tokens, size, stack.final_norm, stack.norm_eps, hidden);
}

// Entry points -------------------------------------------------------------------------------------------------------

// Calls f with the kind of operands for a format and an arithmetic.
template <class F>
void with_kind([[maybe_unused]] int32_t format, [[maybe_unused]] int32_t arithmetic, F&& f) {
#ifdef __AMX_BF16__
  return f(TilesBf16());  // called for nothing else
#else
  if (format == kFloat32) return f(Float32());
#ifdef __AVX512BF16__
  if (arithmetic != kWiden) return f(DotBf16());
#endif
  return f(WidenedBf16());
#endif
}

// x Wᵀ + b for rows of float32; they become left operands in buffers.x.
template <class Epilogue>
void linear_of(Member& member, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
               int32_t arithmetic, const Epilogue& epilogue) {
  with_kind(w.format, arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    auto* operands = static_cast<typename Kind::A*>(buffers.x);
    member.for_each_range(rows, 4, [&](int64_t from, int64_t end) {
      for (int64_t i = from * w.k; i < end * w.k; i += kLanes) store_row(operands + i, Simd::load(x + i));
    });
    linear<Kind>(member, buffers, operands, w.k, rows, w, epilogue, [](int64_t, Ahead&) {});
  });
}

void enter_stack(Team& team, int index, const Stack& stack, const Batch& batch, const AttentionPlan& plan,
                 const Buffers& buffers, float* hidden) {
  Member member(team, index);
  with_kind(stack.cache_format, stack.arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    run_stack<Kind, typename Kind::B>(member, stack, batch, plan, buffers, hidden);
  });
}

void enter_linear(Team& team, int index, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
                  int32_t arithmetic, float* out) {
  Member member(team, index);
  linear_of(member, x, rows, w, buffers, arithmetic, Store{out, w.n});
}

void enter_swiglu(Team& team, int index, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
                  int32_t arithmetic, float* out) {
  Member member(team, index);
  linear_of(member, x, rows, w, buffers, arithmetic, SiluMul<float>{out, w.n / 2});
}

void enter_rms_norm(Team& team, int index, const float* x, int64_t rows, int64_t size, const float* weight, float eps,
                    float* out) {
  Member member(team, index);
  rms_norm(member, x, rows, size, weight, eps, out);
}

void enter_rope_and_write(Team& team, int index, const Stack& stack, const Batch& batch, const float* qkv,
                          void* k_cache, void* v_cache, float* q) {
  Member member(team, index);
  const int64_t d = stack.head_dim;
  auto take_q = [&](int64_t token, int64_t head, const float* turned) {
    std::memcpy(q + (token * stack.num_heads + head) * d, turned, d * sizeof(float));
  };
  if (stack.cache_format == kFloat32)
    rope_and_write(member, stack, batch, qkv, static_cast<float*>(k_cache), static_cast<float*>(v_cache), take_q);
  else
    rope_and_write(member, stack, batch, qkv, static_cast<uint16_t*>(k_cache), static_cast<uint16_t*>(v_cache), take_q);
}

void enter_attention(Team& team, int index, const Stack& stack, const Batch& batch, const AttentionPlan& plan,
                     const Buffers& buffers, const float* q, const void* k_cache, const void* v_cache, float* out) {
  Member member(team, index);
  with_kind(stack.cache_format, stack.arithmetic, [&](auto kind) {
    using Kind = decltype(kind);
    using C = typename Kind::B;
    auto* queries = static_cast<typename Kind::A*>(buffers.q);
    member.for_each_range(batch.num_tokens, 4, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        for (int64_t h = 0; h < stack.num_heads; ++h)
          store_query(stack, batch, t, h, q + (t * stack.num_heads + h) * stack.head_dim, queries);
    });
    const AttentionUnits<C> units = {stack, batch, plan, static_cast<const C*>(k_cache),
                                     static_cast<const C*>(v_cache)};
    attention<Kind>(member, units, buffers, out, [](int64_t, Ahead&) {});
  });
}

void enter_most_likely(Team& team, int index, const float* x, int64_t rows, const Matrix& w, const Buffers& buffers,
                       int32_t arithmetic, int64_t* out) {
  Member member(team, index);
  const Highest highest{buffers.bases, buffers.indices, ceil_div(w.n, kUnitColumns)};
  linear_of(member, x, rows, w, buffers, arithmetic, highest);
  member.for_each(rows, [&](int64_t row) { out[row] = highest.column_of(row); });
}

void enter_head(Team& team, int index, const Head& head, const Buffers& buffers, const Draw& draw) {
  Member member(team, index);
  const Highest highest{buffers.bases, buffers.indices, ceil_div(head.w.n, kUnitColumns)};
  linear_of(member, head.x, draw.num_rows, head.w, buffers, head.arithmetic, StoreSome{head.logits, highest});
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

constexpr Kernels kKernels = {enter_stack, enter_linear,   enter_swiglu,   enter_most_likely,    enter_head,
                              enter_draw,  enter_logprobs, enter_rms_norm, enter_rope_and_write, enter_attention};

}  // namespace

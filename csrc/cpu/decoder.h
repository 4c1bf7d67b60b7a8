// A stack of decoder layers, each of which is data.
#pragma once

#include <cstdint>
#include <cstring>

#include "keys.h"

namespace {

// Moves the wanted rows to the front.
template <class T>
inline void keep_wanted(const Batch& batch, T* rows, int64_t size) {
  for (int64_t i = 0; i < batch.num_wanted; ++i)
    std::memmove(rows + i * size, rows + batch.wanted[i] * size, size * sizeof(T));
}

// Adds x Wᵀ + b, after a norm where there is one, to the residual stream.
template <class Kind>
void add_linear(Member& member, const Buffers& buffers, const typename Kind::A* x, int64_t rows, const Matrix& w,
                const Norm& norm, Residual residual, float* hidden, const Next& next) {
  if (norm.kind == kNoNorm) {
    linear<Kind>(member, buffers, x, w.k, rows, w, Accumulate(hidden, w.n, residual), next);
    return;
  }
  linear<Kind>(member, buffers, x, w.k, rows, w, Store(buffers.qkv, w.n), next);
  add_normed_rows(member, norm, buffers.qkv, rows, residual, hidden);
}

// Between the products everything is float32; the residual stream is never rounded. The last layer does nothing more for
// tokens that are not wanted once their K and V are written; those that are, are in front then.
template <class Kind>
void run_stack(Member& member, const Stack& stack, const Batch& batch, const AttentionPlan* const* plans,
               const Buffers& buffers, float* hidden) {
  using A = typename Kind::A;
  using C = typename Kind::B;
  const int64_t size = stack.hidden_size;
  A *x = static_cast<A*>(buffers.x), *attended = static_cast<A*>(buffers.attended);
  A *inner = static_cast<A*>(buffers.inner), *queries = static_cast<A*>(buffers.q);
  int64_t tokens = batch.num_tokens;
  for (int64_t i = 0; i < stack.num_layers; ++i) {
    const Layer& layer = stack.layers[i];
    const Attention& shape = layer.attention;
    const Batch& seen = seen_by(shape, batch);
    C *k_cache = static_cast<C*>(layer.k_cache), *v_cache = static_cast<C*>(layer.v_cache);
    const AttentionUnits<C> attention_units = {shape, seen, *plans[i], k_cache, v_cache};
    const auto expect_attention = [&](int64_t unit, Ahead& ahead) { attention_units.expect(unit, ahead); };
    const auto expect = [&](const Matrix& w) {
      return [&w, &tokens](int64_t unit, Ahead& ahead) { LinearUnits(w, tokens).expect(unit, ahead); };
    };
    const auto expect_o = expect(layer.o), expect_up = expect(layer.up), expect_down = expect(layer.down);
    const bool last = i + 1 == stack.num_layers, narrows = last && batch.wanted;
    norm_rows(member, layer.before_attention, hidden, tokens, size, x);
    linear<Kind>(member, buffers, x, size, tokens, layer.qkv, Store(buffers.qkv, layer.qkv.n), expect_attention);
    rope_and_write(member, shape, seen, buffers.qkv, k_cache, v_cache,
                   [&](int64_t token, int64_t head, const float* turned) {
                     store_query(shape, seen, token, head, turned, queries);
                   });
    if (narrows && batch.num_wanted == 0) return;
    attention<Kind>(member, attention_units, buffers, attended, expect_o);
    if (narrows) {
      member.for_each(3, [&](int64_t which) {
        if (which == 0) keep_wanted(batch, hidden, size);
        if (which == 1) keep_wanted(batch, attended, layer.o.k);
        if (which == 2 && layer.parallel) keep_wanted(batch, x, size);
      });
      tokens = batch.num_wanted;
    }
    add_linear<Kind>(member, buffers, attended, tokens, layer.o, layer.after_attention, {1.0f, layer.residual_factor},
                     hidden, expect_up);
    if (!layer.parallel) norm_rows(member, layer.before_mlp, hidden, tokens, size, x);
    linear<Kind>(member, buffers, x, size, tokens, layer.up,
                 Activate<A>(inner, layer.down.k, layer.activation, layer.gated), expect_down);
    const auto expect_layer = [&](int64_t unit, Ahead& ahead) {
      if (!last) LinearUnits(stack.layers[i + 1].qkv, tokens).expect(unit, ahead);
    };
    add_linear<Kind>(member, buffers, inner, tokens, layer.down, layer.after_mlp,
                     {layer.layer_factor, layer.layer_factor * layer.residual_factor}, hidden, expect_layer);
  }
  norm_rows(member, stack.final_norm, hidden, tokens, size, hidden);
}

}  // namespace

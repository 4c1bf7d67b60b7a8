// What Python calls (by ctypes): choice of instruction set, threads, memory, the plan of a step's attention, packing.
//
// Compiled for any x86-64 processor, and linked first, so that inline library functions are taken from here.

#include <cpuid.h>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "api.h"
#include "block_packing.h"
#include "parallel.h"
#include "plan.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Threads ------------------------------------------------------------------------------------------------------------

// The OpenMP run-time that torch brought along, so that there is one pool of threads, not two.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*num_threads)() = nullptr;
  int (*thread_num)() = nullptr;
};
OpenMp openmp;

template <class F>
void run_team(int threads, F&& f) {
  Team team;
  if (threads <= 1 || openmp.parallel == nullptr) {
    f(team, 0);
    return;
  }
  struct Call {
    Team& team;
    F& f;
  } call{team, f};
  openmp.parallel(
      [](void* data) {
        Call& call = *static_cast<Call*>(data);
        // As many as were really given; every thread writes the same number before it reads it.
        std::atomic_ref<int>(call.team.size).store(openmp.num_threads(), std::memory_order_relaxed);
        call.f(call.team, openmp.thread_num());
      },
      &call, unsigned(threads), 0);
}

// Memory -------------------------------------------------------------------------------------------------------------

// Grows, never shrinks; kept between steps.
class Memory {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = size_t(std::max<int64_t>(count, 1)) * sizeof(T);
    if (bytes > capacity_) {
      const size_t wanted = (bytes + 4095) / 4096 * 4096;
      data_.reset(static_cast<char*>(std::aligned_alloc(4096, wanted)));
      if (!data_) {
        std::fprintf(stderr, "CPU kernels: out of memory (%zu bytes)\n", wanted);
        std::abort();
      }
      capacity_ = wanted;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  size_t capacity_ = 0;
};

struct Workspace {
  Memory hidden, x, q, attended, inner, qkv, sums, bases, totals, indices, panels, logits, scores;
  std::vector<int64_t> positions, slots, window_slots, context_lens, wanted;
  std::vector<int64_t> rows, num_tokens;  // of a draw
  std::vector<float*> lines;
  std::vector<ScoreSpace> spaces;
  std::deque<PlanMemory> plans;  // one a kind of attention
  std::vector<const AttentionPlan*> plan_of;  // each layer
};

// One a calling thread: engines in several threads do not disturb each other.
thread_local Workspace workspace;

void reserve_panels(Workspace& memory, Buffers& buffers, int64_t longest, int threads) {
  buffers.panel_size = 2 * kUnitColumns * longest;  // room for float32 too
  buffers.panels = memory.panels.take<uint16_t>(buffers.panel_size * threads);
}

Buffers product_buffers(int64_t rows, const Matrix& w, int threads) {
  Buffers buffers{};
  buffers.x = workspace.x.take<float>(rows * w.k);
  reserve_panels(workspace, buffers, w.k, threads);
  return buffers;
}

// For the draws of a team, a part for each of its threads.
const ScoreSpace* score_spaces(int64_t vocab_size, int threads) {
  const int64_t chunks = ceil_div(vocab_size, kChunk), columns = chunks * kChunk;
  // Parts of 8 bytes a chunk, in whole cache lines.
  const int64_t line = ceil_div(chunks, 8) * 8 * 8;
  const int64_t bytes = 4 * columns * int64_t(sizeof(float)) + (kThresholds + 4) * line;
  char* at = workspace.scores.take<char>(bytes * std::max(threads, 1));
  auto take = [&at](int64_t size) { return std::exchange(at, at + size); };
  workspace.spaces.clear();
  for (int i = 0; i < std::max(threads, 1); ++i) {
    ScoreSpace space;
    for (float** to : {&space.scores, &space.weights, &space.near_scores, &space.near_weights})
      *to = reinterpret_cast<float*>(take(columns * sizeof(float)));
    space.sums = reinterpret_cast<double*>(take(kThresholds * line));
    space.totals = reinterpret_cast<double*>(take(line));
    space.lows = reinterpret_cast<float*>(take(line));
    space.highs = reinterpret_cast<float*>(take(line));
    space.counts = reinterpret_cast<int64_t*>(take(line));
    workspace.spaces.push_back(space);
  }
  return workspace.spaces.data();
}

// Instruction sets ---------------------------------------------------------------------------------------------------

const Kernels* kernels_of(int32_t instructions) {
  switch (instructions) {
    case kAvx2: return &kAvx2Kernels;
    case kAvx512: return &kAvx512Kernels;
    default: return &kAvx512Bf16Kernels;
  }
}

const Kernels* kernels = nullptr;
bool uses_tiles = false;  // beside them

// Those for operands of a format, so many elements deep.
const Kernels& kernels_for(int32_t format, int32_t arithmetic, std::initializer_list<int64_t> depths) {
  const bool tiles = uses_tiles && arithmetic == kTiles && format != kFloat32 && format != kBlocks &&
                     std::all_of(depths.begin(), depths.end(), [](int64_t depth) { return depth % 32 == 0; });
  return tiles ? *kAmxKernels : *kernels;
}

const Kernels& kernels_for(const Stack& stack) {
  for (int64_t i = 0; i < stack.num_layers; ++i) {
    const Layer& layer = stack.layers[i];
    const Kernels& found = kernels_for(stack.cache_format, stack.arithmetic,
                                       {layer.qkv.k, layer.o.k, layer.up.k, layer.down.k, layer.attention.head_dim});
    if (&found == kernels) return found;
  }
  return kernels_for(stack.cache_format, stack.arithmetic, {});
}

const Kernels& kernels_for(const Matrix& w, int32_t arithmetic) { return kernels_for(w.format, arithmetic, {w.k}); }

// Whether this processor multiplies bfloat16 in tile registers and the operating system lets this process use them,
// which it must be asked for.
bool may_use_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24;
  if ((d & kTileBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

EXPORT int32_t vsp_interface() { return kInterface; }

// The best instruction set that this processor, its operating system and this build offer; -1: not even AVX2 with FMA.
EXPORT int32_t vsp_best_instructions() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return -1;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
  static const bool tiles = kAmxKernels != nullptr && may_use_tiles();
  return tiles ? kAmx : kAvx512Bf16;
}

// How many kinds of Arithmetic differ with the chosen instructions, from the first on.
EXPORT int32_t vsp_num_arithmetics() { return uses_tiles ? 3 : kernels == &kAvx512Bf16Kernels ? 2 : 1; }

// Chooses an instruction set, no better than the best. Returns 0 if torch's OpenMP run-time was found, else 1: all
// then runs in the calling thread.
EXPORT int32_t vsp_initialize(int32_t instructions) {
  kernels = kernels_of(instructions);
  uses_tiles = instructions == kAmx;
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  openmp.num_threads = reinterpret_cast<decltype(openmp.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  openmp.thread_num = reinterpret_cast<decltype(openmp.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  if (openmp.parallel && openmp.num_threads && openmp.thread_num) return 0;
  openmp = OpenMp();
  return 1;
}

namespace {

// Plans for attention of the kinds of the layers; memory for the results of any of them.
class Plans {
 public:
  Plans(Workspace& memory, const Batch& batch) : memory_(memory), batch_(batch) {}

  const AttentionPlan& add(const Attention& attention) {
    const PlanShape shape = PlanShape::of(attention);
    size_t i = 0;
    while (i < count_ && !(memory_.plans[i].shape == shape)) ++i;
    if (i == count_) {
      if (++count_ > memory_.plans.size()) memory_.plans.emplace_back();
      memory_.plans[i].make(shape, seen_by(attention, batch_));
    }
    const PlanMemory& plan = memory_.plans[i];
    queries_ = std::max(queries_, batch_.num_tokens * attention.num_heads * attention.head_dim);
    sums_ = std::max(sums_, plan.num_rows * attention.head_dim);
    rows_ = std::max(rows_, plan.num_rows);
    return plan.plan;
  }

  void reserve(Buffers& buffers) const {
    buffers.q = memory_.q.take<float>(queries_);
    buffers.sums = memory_.sums.take<float>(sums_);
    buffers.bases = memory_.bases.take<float>(rows_);
    buffers.totals = memory_.totals.take<float>(rows_);
  }

 private:
  Workspace& memory_;
  const Batch& batch_;
  size_t count_ = 0;
  int64_t queries_ = 0, sums_ = 0, rows_ = 0;
};

void run_stack(const Stack& stack, const Batch& batch, float* hidden, int32_t threads) {
  Workspace& memory = workspace;
  Buffers buffers{};
  Plans plans(memory, batch);
  memory.plan_of.clear();
  int64_t attended = 0, inner = 0, qkv = stack.hidden_size;
  for (int64_t i = 0; i < stack.num_layers; ++i) {
    const Layer& layer = stack.layers[i];
    memory.plan_of.push_back(&plans.add(layer.attention));
    attended = std::max(attended, layer.o.k);
    inner = std::max(inner, layer.down.k);
    qkv = std::max(qkv, layer.qkv.n);
  }
  plans.reserve(buffers);
  const int64_t tokens = batch.num_tokens;
  buffers.x = memory.x.take<float>(tokens * stack.hidden_size);
  buffers.attended = memory.attended.take<float>(tokens * attended);
  buffers.inner = memory.inner.take<float>(tokens * inner);
  buffers.qkv = memory.qkv.take<float>(tokens * qkv);
  reserve_panels(memory, buffers, std::max({stack.hidden_size, attended, inner}), threads);
  const Kernels& chosen = kernels_for(stack);
  run_team(threads, [&](Team& team, int index) {
    chosen.run_stack(team, index, stack, batch, memory.plan_of.data(), buffers, hidden);
  });
}

// Of products of which the highest are kept.
Buffers highest_buffers(int64_t rows, const Matrix& w, int threads) {
  Buffers buffers = product_buffers(rows, w, threads);
  const int64_t pieces = rows * ceil_div(w.n, kUnitColumns);
  buffers.bases = workspace.bases.take<float>(pieces);
  buffers.indices = workspace.indices.take<int64_t>(pieces);
  return buffers;
}

void most_likely(const float* x, int64_t rows, const Projection& head, int64_t* out, int32_t arithmetic,
                 int32_t threads) {
  const Buffers buffers = highest_buffers(rows, head.w, threads);
  run_team(threads, [&](Team& team, int index) {
    kernels_for(head.w, arithmetic).most_likely(team, index, x, rows, head, buffers, arithmetic, out);
  });
}

// Whether a row takes the most likely token whatever it has so far.
bool is_greedy(const SamplingTables& tables, int64_t row) {
  return tables.floats[row * kNumFloats + kTemperature] == 0 && tables.ints[row * kNumInts + kFlags] == 0;
}

void store_drawn(const SamplingTables& tables, int64_t count, const int64_t* rows, const int64_t* num_tokens,
                 const int64_t* drawn, int64_t* token_ids, int64_t token_stride) {
  for (int64_t i = 0; i < count; ++i) {
    token_ids[rows[i] * token_stride + num_tokens[i]] = drawn[i];
    if ((tables.ints[rows[i] * kNumInts + kFlags] & kPenalties) == 0) continue;
    int16_t& seen = tables.counts[rows[i] * tables.vocab_size + drawn[i]];
    if ((seen & 0x7fff) < 0x7fff) ++seen;
  }
}

// So many rows at a time have their logits in memory; if they are more, the weights pass once more.
constexpr int64_t kRowsAtOnce = 64;

// Next tokens after states x [count][hidden_size].
void draw_next(const Network& network, const Rows& rows, const float* x, int64_t count, const int64_t* of_rows,
               const int64_t* num_tokens, const Sampling& sampling, int32_t threads) {
  if (count == 0) return;
  const Matrix& w = network.head.w;
  const int32_t arithmetic = network.stack.arithmetic;
  auto needs_logits = [&](int64_t i) {
    return sampling.logits || !is_greedy(*sampling.tables, of_rows[i]) ||
           (sampling.masks.words && sampling.masks.of[i] >= 0);
  };
  bool any = false;
  for (int64_t i = 0; i < count && !any; ++i) any = needs_logits(i);
  if (!any) most_likely(x, count, network.head, sampling.drawn, arithmetic, threads);
  for (int64_t first = 0; any && first < count; first += kRowsAtOnce) {
    const int64_t some = std::min(kRowsAtOnce, count - first);
    float* logits = sampling.logits ? sampling.logits + first * w.n : workspace.logits.take<float>(some * w.n);
    auto& lines = workspace.lines;
    lines.clear();
    for (int64_t i = 0; i < some; ++i) lines.push_back(needs_logits(first + i) ? logits + i * w.n : nullptr);
    TokenMasks masks = sampling.masks;
    if (masks.words) masks.of += first;
    const Head head = {x + first * w.k, network.head, arithmetic, lines.data()};
    const Draw draw = {some,
                       lines.data(),
                       of_rows + first,
                       num_tokens + first,
                       rows.token_ids,
                       rows.token_stride,
                       sampling.tables,
                       masks,
                       sampling.drawn + first,
                       score_spaces(w.n, threads)};
    const Buffers buffers = highest_buffers(some, w, threads);
    run_team(threads, [&](Team& team, int index) {
      kernels_for(w, arithmetic).head(team, index, head, buffers, draw);
    });
  }
  store_drawn(*sampling.tables, count, of_rows, num_tokens, sampling.drawn, rows.token_ids, rows.token_stride);
}

// One row of the table of embeddings, times their factor.
void embed(const Network& network, int64_t token_id, float* to) {
  const int64_t size = network.stack.hidden_size;
  const float factor = network.stack.embedding_factor;
  if (network.embedding_format == kBlocks) {
    decode_block_row(*static_cast<const Matrix*>(network.embeddings), token_id, to);
    for (int64_t i = 0; i < size; ++i) to[i] *= factor;
    return;
  }
  if (network.embedding_format == kFloat32) {
    const float* from = static_cast<const float*>(network.embeddings) + token_id * size;
    for (int64_t i = 0; i < size; ++i) to[i] = factor * from[i];
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(network.embeddings) + token_id * size;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(bits));
    to[i] = factor * wide;
  }
}

}  // namespace

// hidden [num_tokens][hidden_size]: in, embeddings times their factor; out, the normalised states after the last layer of the tokens that
// are wanted.
EXPORT void vsp_run_stack(const Stack* stack, const Batch* batch, float* hidden, int32_t threads) {
  run_stack(*stack, *batch, hidden, threads);
}

// All of a step, from token ids to states or to new tokens.
EXPORT void vsp_run_step(const Network* network, const Rows* rows, const Step* step, int32_t threads) {
  Workspace& memory = workspace;
  const int64_t size = network->stack.hidden_size;
  int64_t tokens = 0;
  for (int64_t i = 0; i < step->num_entries; ++i) tokens += step->counts[i];
  float* hidden = memory.hidden.take<float>(tokens * size);
  memory.positions.clear();
  memory.slots.clear();
  memory.window_slots.clear();
  memory.context_lens.clear();
  memory.wanted.clear();
  memory.wanted.reserve(1);  // an empty list has a place too: none is not all
  float* embedded = hidden;
  for (int64_t i = 0; i < step->num_entries; ++i) {
    const int64_t row = step->rows[i], end = step->starts[i] + step->counts[i], prefix = rows->prefix_lens[row];
    const int64_t* ids = rows->token_ids + row * rows->token_stride;
    const int64_t* table = rows->block_tables + row * rows->table_stride;
    const int64_t* window = rows->window_tables ? rows->window_tables + row * rows->window_stride : nullptr;
    for (int64_t position = step->starts[i]; position < end; ++position, embedded += size) {
      const int64_t own = position - prefix, block = own / rows->block_size, offset = own % rows->block_size;
      memory.positions.push_back(position);
      memory.slots.push_back(table[block] * rows->block_size + offset);
      if (window) memory.window_slots.push_back(window[block] * rows->block_size + offset);
      embed(*network, ids[position], embedded);
    }
    memory.context_lens.push_back(end - prefix);
    if (step->samples && step->samples[i]) memory.wanted.push_back(int64_t(memory.positions.size()) - 1);
  }
  Batch batch = {tokens,
                 memory.positions.data(),
                 memory.slots.data(),
                 step->num_entries,
                 step->counts,
                 memory.context_lens.data(),
                 rows->block_tables,
                 rows->table_stride,
                 step->rows,
                 rows->block_size,
                 step->num_groups,
                 step->groups,
                 int64_t(memory.wanted.size()),
                 step->samples ? memory.wanted.data() : nullptr,
                 nullptr};
  Batch within = batch;
  if (rows->window_tables) {
    within.slots = memory.window_slots.data();
    within.block_tables = rows->window_tables;
    within.table_stride = rows->window_stride;
    within.num_groups = step->num_window_groups;
    within.groups = step->window_groups;
    batch.within = &within;
  }
  run_stack(network->stack, batch, hidden, threads);
  const int64_t wanted = step->samples ? batch.num_wanted : tokens;
  if (step->hidden) std::memcpy(step->hidden, hidden, wanted * size * sizeof(float));
  if (!step->sampling.drawn || !step->samples || wanted == 0) return;
  memory.rows.clear();
  memory.num_tokens.clear();
  for (int64_t i = 0; i < step->num_entries; ++i) {
    if (!step->samples[i]) continue;
    memory.rows.push_back(step->rows[i]);
    memory.num_tokens.push_back(step->starts[i] + step->counts[i]);
  }
  draw_next(*network, *rows, hidden, wanted, memory.rows.data(), memory.num_tokens.data(), step->sampling, threads);
}

// The end of a step whose states [count][hidden_size] have been computed before.
EXPORT void vsp_draw(const Network* network, const Rows* rows, const float* states, int64_t count,
                     const int64_t* of_rows, const int64_t* num_tokens, const Sampling* sampling, int32_t threads) {
  draw_next(*network, *rows, states, count, of_rows, num_tokens, *sampling, threads);
}

// Draws a token for each row of logits [num_rows][vocab_size], puts it into token_ids and counts it.
EXPORT void vsp_sample(const float* logits, int64_t num_rows, const int64_t* rows, const int64_t* num_tokens,
                       int64_t* token_ids, int64_t token_stride, const Sampling* sampling, int32_t threads) {
  const SamplingTables& tables = *sampling->tables;
  std::vector<const float*> lines;
  for (int64_t i = 0; i < num_rows; ++i) lines.push_back(logits + i * tables.vocab_size);
  const Draw draw = {num_rows,
                     lines.data(),
                     rows,
                     num_tokens,
                     token_ids,
                     token_stride,
                     &tables,
                     sampling->masks,
                     sampling->drawn,
                     score_spaces(tables.vocab_size, threads)};
  run_team(threads, [&](Team& team, int index) { kernels->draw(team, index, draw); });
  store_drawn(tables, num_rows, rows, num_tokens, sampling->drawn, token_ids, token_stride);
}

// logits [num_rows][vocab_size] → of each row: log-probability and rank of a token, and the k highest.
EXPORT void vsp_logprobs(const float* logits, int64_t num_rows, int64_t vocab_size, const int64_t* tokens, int64_t k,
                         float* values, int64_t* ranks, float* top_values, int64_t* top_tokens, int32_t threads) {
  const Logprobs wanted = {logits, num_rows, vocab_size, tokens,     k,
                           values, ranks,    top_values, top_tokens, score_spaces(vocab_size, threads)};
  run_team(threads, [&](Team& team, int index) { kernels->logprobs(team, index, wanted); });
}

// x [rows][k] → out [rows][n]
EXPORT void vsp_linear(const float* x, int64_t rows, const Projection* projection, float* out, int32_t arithmetic,
                       int32_t threads) {
  const Buffers buffers = product_buffers(rows, projection->w, threads);
  run_team(threads, [&](Team& team, int index) {
    kernels_for(projection->w, arithmetic).linear(team, index, x, rows, *projection, buffers, arithmetic, out);
  });
}

// x [rows][k] → activation(gate) · up [rows][n/2], or activation(x Wᵀ + b) [rows][n]
EXPORT void vsp_activated(const float* x, int64_t rows, const Matrix* w, int32_t activation, int32_t gated, float* out,
                          int32_t arithmetic, int32_t threads) {
  const Buffers buffers = product_buffers(rows, *w, threads);
  run_team(threads, [&](Team& team, int index) {
    kernels_for(*w, arithmetic).activated(team, index, x, rows, *w, activation, gated, buffers, arithmetic, out);
  });
}

EXPORT void vsp_norm(const float* x, int64_t rows, const Norm* norm, float* out, int32_t threads) {
  run_team(threads, [&](Team& team, int index) { kernels->norm(team, index, x, rows, *norm, out); });
}

// x [rows][k] → out [rows], the column of each row's highest logit, the first of equals
EXPORT void vsp_most_likely(const float* x, int64_t rows, const Projection* projection, int64_t* out,
                            int32_t arithmetic, int32_t threads) {
  most_likely(x, rows, *projection, out, arithmetic, threads);
}

// qkv [num_tokens][(heads + 2 KVH) D] → K and V in their slots, q [num_tokens][heads][D]; normalised and turned.
EXPORT void vsp_rope_and_write(const Attention* shape, const Batch* batch, const float* qkv, int32_t cache_format,
                               void* k_cache, void* v_cache, float* q, int32_t threads) {
  run_team(threads, [&](Team& team, int index) {
    kernels->rope_and_write(team, index, *shape, *batch, qkv, cache_format, k_cache, v_cache, q);
  });
}

// q [num_tokens][heads][D] → out, alike: attention of every token over its extents and its own slots up to itself.
EXPORT void vsp_attention(const Attention* shape, const Batch* batch, const float* q, int32_t cache_format,
                          int32_t arithmetic, const void* k_cache, const void* v_cache, float* out, int32_t threads) {
  Buffers buffers{};
  Plans plans(workspace, *batch);
  const AttentionPlan& plan = plans.add(*shape);
  plans.reserve(buffers);
  const Kernels& chosen = kernels_for(cache_format, arithmetic, {shape->head_dim});
  run_team(threads, [&](Team& team, int index) {
    chosen.attention(team, index, *shape, *batch, plan, buffers, q, cache_format, arithmetic, k_cache, v_cache, out);
  });
}

// Packs row-major weights [n][k], float32 or bfloat16 as `format` says, into `to`. k is a multiple of 16.
// `interleave`: the rows are a gate and an up projection, n/2 each, whose tiles shall alternate.
EXPORT void vsp_pack(const void* from, int64_t n, int64_t k, int32_t format, int32_t interleave, void* to) {
  const int64_t tiles = ceil_div(n, kLanes), half = tiles / 2;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = (interleave ? t / 2 + t % 2 * half : t) * kLanes;
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t row = first + i;
      if (format == kFloat32) {
        float* tile = static_cast<float*>(to) + t * kLanes * k;
        const float* line = static_cast<const float*>(from) + row * k;
        for (int64_t j = 0; j < k; ++j) tile[j * kLanes + i] = row < n ? line[j] : 0.0f;
      } else {
        uint16_t* tile = static_cast<uint16_t*>(to) + t * kLanes * k;
        const uint16_t* line = static_cast<const uint16_t*>(from) + row * k;
        for (int64_t j = 0; j < k; ++j) tile[(j / 2 * kLanes + i) * 2 + j % 2] = row < n ? line[j] : uint16_t(0);
      }
    }
  }
}

// Quantises row-major float32 weights [n][k] to int8, symmetric, one factor a row, and packs them; scale [n padded].
EXPORT void vsp_pack_int8(const float* from, int64_t n, int64_t k, int32_t interleave, int8_t* to, float* scale) {
  const int64_t tiles = ceil_div(n, kLanes), half = tiles / 2;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = (interleave ? t / 2 + t % 2 * half : t) * kLanes;
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t row = first + i;
      const float* line = from + row * k;
      float top = 0.0f;
      for (int64_t j = 0; j < k && row < n; ++j) top = std::max(top, std::fabs(line[j]));
      const float factor = top > 0.0f ? top / 127.0f : 1.0f;
      scale[t * kLanes + i] = factor;
      int8_t* tile = to + t * kLanes * k;
      for (int64_t j = 0; j < k; ++j)
        tile[(j / 4 * kLanes + i) * 4 + j % 4] = row < n ? int8_t(std::lrintf(line[j] / factor)) : int8_t(0);
    }
  }
}

namespace {

// How many tiles from `first` on take turns in memory: those of one unit of work that are of one type.
int64_t num_together(const int32_t* types, const int32_t* spans, int64_t first, int64_t count) {
  const int64_t unit = kUnitColumns / kLanes, end = std::min(count, (first / unit + 1) * unit);
  int64_t last = first + 1;
  while (last < end && types[last] == types[first] && spans[last] == spans[first]) ++last;
  return last - first;
}

}  // namespace

// Bytes of a matrix in blocks, of tiles of these types.
EXPORT int64_t vsp_block_bytes(int64_t num_tiles, const int32_t* types, const int32_t* spans, int64_t k) {
  int64_t bytes = 0;
  for (int64_t t = 0; t < num_tiles; ++t) bytes += block_tile_bytes(types[t], spans[t], k);
  return bytes;
}

// Packs a matrix in blocks: tile t has the `counts[t]` rows that begin at sources[t], as a file has them. Fills `table`,
// which points into `to`.
EXPORT void vsp_pack_blocks(int64_t num_tiles, const uint8_t* const* sources, const int64_t* counts,
                            const int32_t* types, const int32_t* spans, int64_t k, Tile* table, char* to,
                            int32_t threads) {
  for (int64_t t = 0; t < num_tiles;) {
    const int64_t together = num_together(types, spans, t, num_tiles);
    const int64_t bytes = block_tile_bytes(types[t], spans[t], k), turns = k / kBlockDepth / spans[t];
    for (int64_t i = 0; i < together; ++i, ++t)
      table[t] = {to + i * (bytes / turns), types[t], spans[t], int32_t(together), int32_t(bytes)};
    to += together * bytes;
  }
  run_team(threads, [&](Team& team, int index) {
    Member(team, index).for_each(num_tiles, [&](int64_t t) {
      pack_block_tile(sources[t], counts[t], k, table[t], const_cast<char*>(table[t].data));
    });
  });
}

// Rows `ids` [count] of a matrix in blocks, dequantised → out [count][k]
EXPORT void vsp_block_rows(const Matrix* w, const int64_t* ids, int64_t count, float* out, int32_t threads) {
  run_team(threads, [&](Team& team, int index) {
    Member(team, index).for_each_range(count, 8, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) decode_block_row(*w, ids[i], out + i * w->k);
    });
  });
}

// Copies blocks of `bytes`; pairs [count][2] of (from, to). All sources are read before any destination is written.
EXPORT void vsp_copy_blocks(char* cache, const int64_t* pairs, int64_t count, int64_t bytes) {
  std::vector<char> held(size_t(count * bytes));
  for (int64_t i = 0; i < count; ++i) std::memcpy(held.data() + i * bytes, cache + pairs[2 * i] * bytes, bytes);
  for (int64_t i = 0; i < count; ++i) std::memcpy(cache + pairs[2 * i + 1] * bytes, held.data() + i * bytes, bytes);
}

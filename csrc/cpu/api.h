// The C interface of the compiled CPU kernels; vllm/ops/cpu mirrors these structs.
//
// All strides and sizes count elements unless said otherwise. Packed matrices come in tiles of 16 columns:
//   float32   [N/16][K][16]
//   bfloat16  [N/16][K/2][16][2]   pairs along K, as dot-product instructions take them
//   int8      [N/16][K/4][16][4]   one float32 factor a column
// N is padded to a multiple of 16 and K to a multiple of 2 (bfloat16) or 4 (int8) with zeros.
//
// KV memory of 16 neighbouring slots is one tile, heads outermost, so that a tile of keys and a tile of values is each
// a packed matrix already (keys: N = 16 slots, K = head_dim; values: N = head_dim, K = 16 slots):
//   float32   keys [KVH][D][16]          values [KVH][D/16][16][16]
//   bfloat16  keys [KVH][D/2][16][2]     values [KVH][D/16][8][16][2]
#pragma once

#include <cstdint>

// Raised with every change of what Python calls; vllm/ops/cpu/library.py says the same number.
constexpr int32_t kInterface = 6;

// kBlocks: the weights are in blocks, each tile of a type of its own, see blocks.h; multiplied as float32, or, where
// activations are bfloat16, as these.
enum Format : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kBlocks = 3, kBlocksAsBFloat16 = 4 };

// Weights in blocks of 32 along K. The names are GGUF's but the last: 4-bit numbers with a scale and a shift in float32
// for each group of blocks.
enum BlockType : int32_t {
  kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kIQ4_NL, kGroups, kNumBlockTypes
};
constexpr int64_t kBlockDepth = 32;

struct Tile {
  const char* data;
  int32_t type;
  int32_t span;      // blocks that share a head
  int32_t together;  // tiles that take turns in memory
  int32_t bytes;     // of it alone
};

// How bfloat16 weights multiply: widened to float32, in dot products of pairs, or in tile registers; each as the one
// before it where the instructions for it are not there.
enum Arithmetic : int32_t { kWiden = 0, kDot = 1, kTiles = 2 };

enum Instructions : int32_t { kAvx2 = 0, kAvx512 = 1, kAvx512Bf16 = 2, kAmx = 3 };

struct Matrix {
  const void* data;    // packed; of weights in blocks a Tile for each 16 columns
  const float* scale;  // int8: factor of each column
  const float* bias;   // null, or one number a column
  int64_t n, k;        // without padding
  int32_t format;
};

// RMS norm (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016).
enum NormKind : int32_t { kNoNorm = 0, kRms = 1, kLayerNorm = 2 };

struct Norm {
  const float* weight;  // null: ones
  const float* bias;    // null: zeros
  int64_t size;         // elements that are normalised together, a multiple of 16; as many weights
  float eps;
  int32_t kind;
  int64_t head_stride;  // where each head is normalised by itself: from the weights of one to those of the next, or 0
};

// Rotary positions (Su et al., 2021) of the first `dim` elements of a head.
struct Rope {
  const float* cos_sin;  // [positions][dim]: dim/2 cosines, then as many sines; null: heads are not turned
  int64_t dim;           // even
  int32_t interleaved;   // element 2i turns with 2i + 1; else i with i + dim/2
};

struct Attention {
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t window;   // a query at position p sees the keys p - window < key <= p; 0: all up to p
  float scale;      // of the scores
  float softcap;    // scores become softcap * tanh(score / softcap); 0: they do not
  const float* sinks;  // [num_heads], one more score of each softmax, without a value; null: none
  const float* query_factors;  // [positions], by which queries are multiplied; null: by 1
  // Of q, k and v before they are turned. `size` is head_dim, or the size of all heads.
  Norm q_norm, k_norm, v_norm;
  Rope rope;
};

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kReluSquared = 3 };

// A decoder layer. With r = residual_factor and s = layer_factor:
//   x = before_attention(hidden);  hidden = hidden + r * after_attention(o(attention(qkv(x))))
//   x = before_mlp(hidden);        hidden = s * (hidden + r * after_mlp(down(activation(up(x)))))
// `parallel`: the MLP reads the first x too, and before_mlp is not used.
struct Layer {
  Attention attention;
  Norm before_attention, after_attention, before_mlp, after_mlp;
  // `up` of a gated MLP: tile 2i is tile i of the gate, tile 2i + 1 that of the up projection; activation(gate) * up.
  Matrix qkv, o, up, down;
  int32_t activation, gated, parallel;
  float residual_factor, layer_factor;
  void* k_cache;
  void* v_cache;
};

struct Stack {
  int64_t num_layers, hidden_size;
  float embedding_factor;
  Norm final_norm;
  const Layer* layers;
  int32_t cache_format;  // kFloat32 or kBFloat16
  int32_t arithmetic;    // of bfloat16 operands
};

// What makes logits of states: y = factor * (x Wᵀ + b), then softcap * tanh(y / softcap) unless softcap is 0.
struct Projection {
  Matrix w;
  float factor, softcap;
};

// Neighbouring query tokens that all read one extent, as PrefixGroup in vllm/ops/attention/metadata.py. The groups of one
// token come in the order of its extents. Each of these begins where the one before it ends, and the last one ends where
// the token's own blocks begin.
struct Group {
  int64_t first_token, num_tokens, first_slot, length;
};

struct Batch {
  int64_t num_tokens;
  const int64_t* positions;  // [num_tokens]
  const int64_t* slots;      // [num_tokens]; those of one tile are neighbours, ascending
  int64_t num_seqs;
  const int64_t* query_lens;    // [num_seqs]
  const int64_t* context_lens;  // [num_seqs]
  const int64_t* block_tables;  // [...][table_stride]
  int64_t table_stride;
  const int64_t* table_rows;  // [num_seqs]; null: in order
  int64_t block_size;  // a multiple of 16
  int64_t num_groups;
  const Group* groups;
  // Tokens whose states are wanted, ascending; null: all. The others only leave K and V.
  int64_t num_wanted;
  const int64_t* wanted;
  // The batch as layers with a window see it: their slots, block tables and groups (vllm/kv_cache/windows.py). What of
  // the block tables lies behind the windows of all query tokens is not read. Null: they see what the others do.
  const Batch* within;
};

// The batch as a layer sees it.
inline const Batch& seen_by(const Attention& attention, const Batch& batch) {
  return attention.window && batch.within ? *batch.within : batch;
}

// The sequences of an engine, a row each, in memory that stays where it is.
struct Rows {
  int64_t* token_ids;  // [rows][token_stride]
  int64_t token_stride;
  const int64_t* block_tables;  // [rows][table_stride]
  int64_t table_stride;
  const int64_t* prefix_lens;  // [rows]: tokens in pinned extents; the row's own blocks hold those after them
  int64_t block_size;
  const int64_t* window_tables;  // [rows][window_stride]: of the layers with a window; null: the same as of the others
  int64_t window_stride;
};

// A whole network.
struct Network {
  Stack stack;
  Projection head;
  const void* embeddings;  // [vocabulary][hidden_size]; kBlocks: a Matrix
  int32_t embedding_format;
};

// What rows ask of the sampler; vllm/ops/sampling.py says what the columns mean and in which order
// they work.
struct SamplingTables {
  const float* floats;   // [rows][kNumFloats]
  const int64_t* ints;   // [rows][kNumInts]
  const int32_t* bias_ids;  // [rows][max_bias], and so on
  const float* bias_values;
  const int32_t *stop_ids, *bad_tokens, *bad_ends, *allowed;
  int16_t* counts;
  int64_t max_bias, max_stops, max_bad_tokens, max_bad_sequences, allowed_words;
  int64_t vocab_size;
};

enum FloatColumn { kTemperature, kTopP, kMinP, kPresence, kFrequency, kRepetition, kNumFloats };
enum IntColumn {
  kSeed, kNumPromptTokens, kTopK, kMinTokens, kNumBias, kNumStops, kNumBadSequences, kFlags, kNumInts
};
enum Flag { kPenalties = 1, kAllowed = 2, kBias = 4, kStops = 8, kBadWords = 16 };

// Which tokens the form of an answer allows: bit i % 32 of word i / 32 allows token i.
struct TokenMasks {
  const int32_t* words;  // [masks][stride]; null: there are none
  int64_t stride;
  const int64_t* of;  // which one each entry that draws obeys; -1: none
};

// The draw of next tokens, which are put into their rows and counted where penalties need that.
struct Sampling {
  const SamplingTables* tables;
  TokenMasks masks;
  int64_t* drawn;  // out: [rows that draw]; null: nothing is drawn
  float* logits;   // out: [rows that draw][vocabulary], as the network made them; null: not wanted
};

// Entry i computes the tokens starts[i] ... starts[i] + counts[i] of row rows[i].
struct Step {
  int64_t num_entries;
  const int64_t *rows, *starts, *counts;
  const int64_t* samples;  // [num_entries]: whether its last token is followed by a new one; null: all states are wanted
  int64_t num_groups;
  const Group* groups;
  int64_t num_window_groups;  // of the layers with a window, where they have block tables of their own
  const Group* window_groups;
  float* hidden;  // out: states [entries that sample, or tokens][hidden_size]; null: not wanted
  Sampling sampling;  // of the entries that sample
};

// Decided once a step, for all layers of a kind ------------------------------------------------------------------------

// The queries of neighbouring tokens against a run of keys; every KV head is done apart.
struct AttentionUnit {
  int64_t first_token, num_tokens;
  int64_t first_key, end_key;  // a run of 512 keys begins at a multiple of 512
  const int64_t* table;        // blocks of the keys; null for an extent
  int64_t first_slot;          // of an extent
  int64_t first_position;      // causal: place among the keys of the first token
  bool causal;
  int64_t first_row;  // of its results, [KVH][num_tokens][heads per KV head]
  // The lowest key that each token sees, which may lie before or behind all keys; null: each sees the first.
  const int64_t* lowest;
};

// Queries of a unit, heads counted apart; more only where one token has more. With some keys and values, these and
// their sums fit the caches.
constexpr int64_t kUnitQueries = 128;

struct AttentionPlan {
  int64_t num_units;
  const AttentionUnit* units;
  const int64_t* parts_of;  // [num_tokens + 1]; the units that a token is in are parts[parts_of[t] ... parts_of[t+1])
  const int64_t* parts;
};

// Columns of a unit of a matrix product: their weights stay in the second-level cache while the rows pass.
constexpr int64_t kUnitColumns = 64;

struct Buffers {
  void *x, *q, *attended, *inner;  // left operands of products
  float* qkv;  // or the results of products that a norm follows
  // Results of attention units: [row][head_dim] unnormalised sums, bases and sums of weights.
  float *sums, *bases, *totals;
  int64_t* indices;
  uint16_t* panels;  // [threads][panel_size]: int8 weights made bfloat16, decoded blocks
  int64_t panel_size;
};

// Draws ---------------------------------------------------------------------------------------------------------------

// Columns of logits that one thread does at a time. Sums are made of the sums of chunks, so that what is drawn does not
// depend on the number of threads.
constexpr int64_t kChunk = 2048;
constexpr int64_t kThresholds = 4;  // among the scores, tried in one pass

// Working memory for one row. Scores are followed by -inf up to a multiple of 16.
struct ScoreSpace {
  float *scores, *weights;            // [vocabulary]
  float *near_scores, *near_weights;  // [vocabulary]: those of each chunk that are still in question
  double* sums;                       // [chunks][kThresholds]
  double* totals;                     // [chunks]
  float *lows, *highs;                // [chunks]
  int64_t* counts;                    // [chunks]
};

struct Draw {
  int64_t num_rows;
  const float* const* logits;  // [num_rows]; null for rows whose token is known by other means
  const int64_t* rows;         // [num_rows]: of the tables
  const int64_t* num_tokens;   // [num_rows]: so far
  const int64_t* token_ids;    // [rows of the tables][token_stride]
  int64_t token_stride;
  const SamplingTables* tables;
  TokenMasks masks;
  int64_t* drawn;            // [num_rows]
  const ScoreSpace* spaces;  // one a thread
};

// The logits of `num_rows` states, and their next tokens. Rows without logits take the most likely one.
struct Head {
  const float* x;
  const Projection& projection;
  int32_t arithmetic;
  float* const* logits;  // out, as Draw's
};

struct Logprobs {
  const float* logits;  // [num_rows][vocab_size]
  int64_t num_rows, vocab_size;
  const int64_t* tokens;  // [num_rows]
  int64_t k;              // at most vocab_size
  float* values;          // [num_rows]: log-probability of the token
  int64_t* ranks;         // [num_rows]: one more than the tokens that are likelier
  float* top_values;      // [num_rows][k], falling
  int64_t* top_tokens;    // [num_rows][k]; of equals the lower first
  const ScoreSpace* spaces;
};

// Entry points of one instruction set. Every thread of a team calls the same one, with its own index.
struct Team;
struct Kernels {
  void (*run_stack)(Team&, int, const Stack&, const Batch&, const AttentionPlan* const* plans, const Buffers&,
                    float* hidden);  // a plan for each layer
  void (*linear)(Team&, int, const float* x, int64_t rows, const Projection&, const Buffers&, int32_t arithmetic,
                 float* out);
  // The first half of an MLP.
  void (*activated)(Team&, int, const float* x, int64_t rows, const Matrix&, int32_t activation, int32_t gated,
                    const Buffers&, int32_t arithmetic, float* out);
  // out [rows]: column of the highest
  void (*most_likely)(Team&, int, const float* x, int64_t rows, const Projection&, const Buffers&, int32_t arithmetic,
                      int64_t* out);
  void (*head)(Team&, int, const Head&, const Buffers&, const Draw&);
  void (*draw)(Team&, int, const Draw&);
  void (*logprobs)(Team&, int, const Logprobs&);
  void (*norm)(Team&, int, const float* x, int64_t rows, const Norm&, float* out);
  // q [num_tokens][heads][D], normalised and turned, neither scaled nor narrowed
  void (*rope_and_write)(Team&, int, const Attention&, const Batch&, const float* qkv, int32_t cache_format,
                         void* k_cache, void* v_cache, float* q);
  void (*attention)(Team&, int, const Attention&, const Batch&, const AttentionPlan&, const Buffers&, const float* q,
                    int32_t cache_format, int32_t arithmetic, const void* k_cache, const void* v_cache, float* out);
};

extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
// Takes bfloat16 and int8 operands whose depths are multiples of 32, in tile registers, and nothing else; null where the
// compiler does not know AMX.
extern const Kernels* const kAmxKernels;

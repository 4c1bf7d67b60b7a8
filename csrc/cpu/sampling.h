// Draws of next tokens, and log-probabilities. What a row asks for, and in which order that works, is stated with the
// plain reference in vllm/ops/sampling.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "scores.h"

namespace {

constexpr float kBanned = -1e30f;      // never drawn beside others, yet above what a mask forbids
constexpr float kNotAllowed = -1e34f;  // below these, so that of allowed tokens that are all banned one is drawn

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// In [0, 1), by two rounds of the SplitMix64 finaliser (Steele, Lea and Flood, 2014).
inline double uniform(uint64_t seed, uint64_t counter) {
  const uint64_t x = mix(mix(seed + 0x9E3779B97F4A7C15u) + (counter + 1) * 0x9E3779B97F4A7C15u);
  return double(x >> 11) * 0x1p-53;
}

// What one row asks for.
struct Wishes {
  Wishes(const Draw& draw, int64_t i)
      : tables(*draw.tables), row(draw.rows[i]), floats(tables.floats + row * kNumFloats),
        ints(tables.ints + row * kNumInts), token_ids(draw.token_ids + row * draw.token_stride),
        num_tokens(draw.num_tokens[i]), num_outputs(num_tokens - ints[kNumPromptTokens]), flags(ints[kFlags]) {
    if (draw.masks.words && draw.masks.of[i] >= 0) mask = draw.masks.words + draw.masks.of[i] * draw.masks.stride;
    if (num_outputs >= ints[kMinTokens]) flags &= ~int64_t(kStops);
  }

  const SamplingTables& tables;
  const int64_t row;
  const float* floats;
  const int64_t* ints;
  const int64_t* token_ids;
  const int64_t num_tokens, num_outputs;
  int64_t flags;
  const int32_t* mask = nullptr;
};

// The bits of a mask for 16 columns from `i` on.
ALWAYS_INLINE Simd::Mask mask_at(const int32_t* words, int64_t i) {
  return Simd::from_bits(uint32_t(words[i / 32]) >> i % 32 & 0xffff);
}

// Single tokens: what is added to them, and which of them are banned.
inline void adjust_tokens(const Wishes& wishes, int64_t size, float* x) {
  const SamplingTables& tables = wishes.tables;
  const int64_t row = wishes.row;
  auto ban = [&](int64_t token) {
    if (uint64_t(token) < uint64_t(size)) x[token] = std::min(x[token], kBanned);  // what is -inf stays so
  };
  if (wishes.flags & kBias)
    for (int64_t i = row * tables.max_bias, end = i + wishes.ints[kNumBias]; i < end; ++i)
      if (uint64_t(tables.bias_ids[i]) < uint64_t(size)) x[tables.bias_ids[i]] += tables.bias_values[i];
  if (wishes.flags & kStops)
    for (int64_t i = 0; i < wishes.ints[kNumStops]; ++i) ban(tables.stop_ids[row * tables.max_stops + i]);
  if (wishes.flags & kBadWords) {
    const int32_t* tokens = tables.bad_tokens + row * tables.max_bad_tokens;
    const int32_t* ends = tables.bad_ends + row * tables.max_bad_sequences;
    int64_t start = 0;
    for (int64_t word = 0; word < wishes.ints[kNumBadSequences]; start = ends[word++]) {
      const int64_t head = ends[word] - start - 1;
      if (head < 0 || head > wishes.num_outputs) continue;
      const int64_t* last = wishes.token_ids + wishes.num_tokens - head;
      if (std::equal(last, last + head, tokens + start)) ban(tokens[start + head]);
    }
  }
}

// Repetition over prompt and output (Keskar et al., 2019), frequency and presence over the output; each operation rounds
// as the reference's does.
ALWAYS_INLINE V penalise(V x, const int16_t* stored, const float* wishes) {
  const auto counts = Simd::load_int16(stored);
  const V count = Simd::to_float(Simd::and_with(counts, 0x7fff)), zero = Simd::zero();
  const auto in_output = Simd::above(count, zero);
  const auto seen = Simd::either(in_output, Simd::above(zero, Simd::to_float(counts)));
  if (Simd::bits(seen) == 0) return x;
  const V repetition = Simd::set1(wishes[kRepetition]);
  const V repeated = Simd::choose(Simd::above(x, zero), Simd::div(x, repetition), Simd::mul(x, repetition));
  x = Simd::choose(seen, repeated, x);
  x = Simd::sub(x, Simd::product(count, Simd::set1(wishes[kFrequency])));
  return Simd::sub(x, Simd::choose(in_output, Simd::set1(wishes[kPresence]), zero));
}

// The scores before the temperature: the logits themselves where nothing is asked that changes them.
template <class Crew>
const float* adjust(Crew& crew, const Wishes& wishes, const float* logits, int64_t size, const ScoreSpace& space) {
  if (wishes.flags == 0 && wishes.mask == nullptr) return logits;
  float* x = space.scores;
  const V forbidden = Simd::set1(-kInfinity), not_allowed = Simd::set1(kNotAllowed);
  const int32_t* allowed =
      wishes.flags & kAllowed ? wishes.tables.allowed + wishes.row * wishes.tables.allowed_words : nullptr;
  crew.for_each(num_chunks(size), [&](int64_t chunk) {
    for_columns(chunk, size, [&](auto at) {
      const V v = load(logits, at);
      Simd::store(x + at.first, allowed ? Simd::choose(mask_at(allowed, at.first), v, Simd::min(v, not_allowed)) : v);
    });
  });
  if (wishes.flags & (kBias | kStops | kBadWords))
    crew.for_each(1, [&](int64_t) { adjust_tokens(wishes, size, x); });
  const int16_t* counts = wishes.flags & kPenalties ? wishes.tables.counts + wishes.row * size : nullptr;
  if (counts == nullptr && wishes.mask == nullptr) return x;
  crew.for_each(num_chunks(size), [&](int64_t chunk) {
    for_columns(chunk, size, [&](auto at) {
      V v = Simd::load(x + at.first);
      if (counts && at.count == kLanes) {
        v = penalise(v, counts + at.first, wishes.floats);
      } else if (counts) {
        int16_t some[kLanes] = {};
        std::memcpy(some, counts + at.first, at.count * sizeof(int16_t));
        v = penalise(v, some, wishes.floats);
      }
      Simd::store(x + at.first, wishes.mask ? Simd::choose(mask_at(wishes.mask, at.first), v, forbidden) : v);
    });
  });
  return x;
}

// The first column at which the running sum of the weights exceeds u times all of them.
template <class WeightsAt>
int64_t choose_column(double u, double total, int64_t size, const ScoreSpace& space, WeightsAt&& weights_at) {
  const double target = u * total;
  double sum = 0;
  int64_t last = -1;  // chunk that has any weight: rounding may leave the target at the whole sum
  for (int64_t chunk = 0; chunk < num_chunks(size); ++chunk) {
    if (space.totals[chunk] <= 0) continue;
    if (last >= 0) sum += space.totals[last];
    last = chunk;
    if (sum + space.totals[chunk] > target) break;
  }
  if (last < 0) return 0;
  alignas(64) float weights[kChunk];
  for_columns(last, size, [&](auto at) { Simd::store(weights + at.first - last * kChunk, weights_at(at)); });
  int64_t column = 0;
  for (int64_t i = 0; i < std::min(kChunk, size - last * kChunk); ++i) {
    if (weights[i] <= 0) continue;
    column = last * kChunk + i;
    if ((sum += weights[i]) > target) break;
  }
  return column;
}

// The lowest float32 that is no less than top + log(min_p).
inline float cut_of_min_p(float top, float min_p) {
  if (min_p <= 0) return -kInfinity;
  const double bound = double(top) + std::log(double(min_p));
  const float cut = float(bound);
  return std::min(top, double(cut) < bound ? std::nextafter(cut, kInfinity) : cut);
}

template <class Crew>
void draw_row(Crew& crew, const Draw& draw, int64_t row, const ScoreSpace& space) {
  const int64_t size = draw.tables->vocab_size;
  const Wishes wishes(draw, row);
  const float* x = adjust(crew, wishes, draw.logits[row], size, space);
  const float highest = highest_of(crew, x, size, space), temperature = wishes.floats[kTemperature];
  const float top = highest / temperature;
  if (temperature == 0 || !std::isfinite(top)) {
    crew.for_each(1, [&](int64_t) { draw.drawn[row] = first_of(x, size, highest); });
    return;
  }
  const V divisor = Simd::set1(temperature), tops = Simd::set1(top);
  const double u = uniform(uint64_t(wishes.ints[kSeed]), uint64_t(wishes.num_outputs));
  auto scaled_at = [&](auto at) {
    const V v = load(x, at);
    return temperature == 1.0f ? v : Simd::div(v, divisor);
  };
  // From space.totals, the sums of `weights_at`.
  auto choose = [&](double total, auto&& weights_at) {
    crew.for_each(1, [&](int64_t) { draw.drawn[row] = choose_column(u, total, size, space, weights_at); });
  };
  float cut = cut_of_min_p(top, wishes.floats[kMinP]);
  const int64_t top_k = wishes.ints[kTopK];
  const float top_p = wishes.floats[kTopP];
  const bool by_count = top_k > 0 && top_k < size, by_mass = top_p < 1.0f;
  if (!by_count && !by_mass) {
    auto weights_at = [&](auto at) {
      const V v = scaled_at(at);
      return Simd::choose(Simd::at_least(v, Simd::set1(cut)), weigh(v, tops), Simd::zero());
    };
    choose(sum_chunks(crew, size, space, weights_at), weights_at);
    return;
  }
  double mass = sum_chunks(crew, size, space, [&](auto at) {
    const V v = scaled_at(at), weights = weigh(v, tops);
    Simd::store(space.scores + at.first, v);
    Simd::store(space.weights + at.first, weights);
    return weights;
  });
  auto kept_above = [&](float cut) {
    return [&space, cut](auto at) {
      const V v = Simd::load(space.scores + at.first);
      return Simd::choose(Simd::at_least(v, Simd::set1(cut)), Simd::load(space.weights + at.first), Simd::zero());
    };
  };
  float cut_of_count = -kInfinity;
  if (by_count) {
    cut_of_count = find_threshold<Count>(crew, size, {double(top_k), double(size)}, space);
    cut = std::max(cut, cut_of_count);
    if (by_mass) mass = sum_chunks(crew, size, space, kept_above(cut_of_count));
  }
  if (by_mass) {
    const Wanted wanted = {double(top_p) * mass, mass, cut_of_count};
    const float cut_of_mass = find_threshold<Mass>(crew, size, wanted, space);
    if (cut_of_mass >= cut) return choose(sum_totals(size, space), kept_above(cut_of_mass));
  }
  choose(sum_chunks(crew, size, space, kept_above(cut)), kept_above(cut));
}

// Rows by themselves where there are enough for all threads, else one after the other, by all threads.
template <class RowOf>
void for_each_row(Member& member, int64_t rows, const ScoreSpace* spaces, RowOf&& row_of) {
  if (rows >= member.team_size()) {
    member.for_each(rows, [&](int64_t row) {
      Alone alone;
      row_of(alone, row, spaces[member.index]);
    });
  } else {
    for (int64_t row = 0; row < rows; ++row) row_of(member, row, spaces[0]);
  }
}

inline void draw_rows(Member& member, const Draw& draw) {
  for_each_row(member, draw.num_rows, draw.spaces, [&](auto& crew, int64_t row, const ScoreSpace& space) {
    if (draw.logits[row]) draw_row(crew, draw, row, space);
  });
}

// Log-probabilities ---------------------------------------------------------------------------------------------------

// The `k` highest of a row, of equals the lower columns.
inline void take_highest(const float* x, int64_t size, float cut, int64_t k, double normaliser, float* values,
                         int64_t* columns) {
  std::vector<std::pair<float, int64_t>> found;
  int64_t equal = 0;
  for (int64_t i = 0; i < size; i += kLanes)
    for (unsigned bits = Simd::bits(Simd::at_least(Simd::load(x + i), Simd::set1(cut))); bits; bits &= bits - 1) {
      const int64_t column = i + __builtin_ctz(bits);
      // Of those at the cut, no more than k can be among the highest.
      if (x[column] == cut && ++equal > k) continue;
      found.emplace_back(x[column], column);
    }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  int64_t taken = std::min<int64_t>(k, found.size());
  for (int64_t i = 0; i < taken; ++i) {
    values[i] = float(found[i].first - normaliser);
    columns[i] = found[i].second;
  }
  // Fewer are finite.
  for (int64_t i = 0; taken < k && i < size; ++i)
    if (!(x[i] >= cut)) {
      values[taken] = -kInfinity;
      columns[taken++] = i;
    }
}

template <class Crew>
void logprobs_of_row(Crew& crew, const Logprobs& wanted, int64_t row, const ScoreSpace& space) {
  const int64_t size = wanted.vocab_size, k = wanted.k;
  const float* logits = wanted.logits + row * size;
  const float top = highest_of(crew, logits, size, space), chosen = logits[wanted.tokens[row]];
  const double sum = sum_chunks(crew, size, space, [&](auto at) {
    const V v = load(logits, at);
    Simd::store(space.scores + at.first, v);
    return weigh(v, Simd::set1(top));
  });
  const double normaliser = top + std::log(sum);
  crew.for_each(num_chunks(size), [&](int64_t chunk) {
    auto likelier = Simd::none();
    for_columns(chunk, size, [&](auto at) {
      likelier = Simd::count_where(likelier, Simd::above(Simd::load(space.scores + at.first), Simd::set1(chosen)));
    });
    space.counts[chunk] = Simd::sum(likelier);
  });
  int64_t rank = 1;
  for (int64_t chunk = 0; chunk < num_chunks(size); ++chunk) rank += space.counts[chunk];
  const bool selects = k > 0 && k < size && std::isfinite(top);
  const float cut = selects ? find_threshold<Count>(crew, size, {double(k), double(size)}, space) : kLeast;
  crew.for_each(1, [&](int64_t) {
    wanted.values[row] = float(chosen - normaliser);
    wanted.ranks[row] = rank;
    if (k > 0)
      take_highest(space.scores, size, cut, k, normaliser, wanted.top_values + row * k, wanted.top_tokens + row * k);
  });
}

}  // namespace

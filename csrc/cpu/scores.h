// Rows of scores: their highest, their weights, and the threshold that keeps a count or a mass of them.
//
// A row is done in chunks, by one thread (`Alone`) or by a team (`Member`): every thread takes the same decisions from
// the results of all chunks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "operands.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeast = std::numeric_limits<float>::lowest();  // -inf is below it

// A thread that does a row by itself; called as Member is.
struct Alone {
  template <class F>
  void for_each(int64_t count, F&& f) {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
};

// In float32 no more numbers are added to each other than a lane has in so many columns; their sums, in float64.
constexpr int64_t kRun = 32 * kLanes;

inline int64_t num_chunks(int64_t size) { return ceil_div(size, kChunk); }
inline int64_t padded(int64_t count) { return ceil_div(count, kLanes) * kLanes; }

// Sixteen columns from the first on, of which `count` are there.
template <int lanes>
struct Columns {
  int64_t first;
  int count = lanes;
};
using AllLanes = Columns<kLanes>;
using SomeLanes = Columns<0>;

inline V load(const float* x, AllLanes at) { return Simd::load(x + at.first); }
// -inf where there is no column.
inline V load(const float* x, SomeLanes at) {
  alignas(64) float some[kLanes];
  std::fill(some, some + kLanes, -kInfinity);
  std::memcpy(some, x + at.first, at.count * sizeof(float));
  return Simd::load(some);
}

// Calls f(columns) for every 16 columns of a chunk.
template <class F>
ALWAYS_INLINE void for_columns(int64_t chunk, int64_t size, F&& f) {
  const int64_t end = std::min(size, (chunk + 1) * kChunk);
  int64_t i = chunk * kChunk;
  for (; i + kLanes <= end; i += kLanes) f(AllLanes{i});
  if (i < end) f(SomeLanes{i, int(end - i)});
}

// -inf where there is nothing else; a NaN is passed over.
template <class Crew>
float highest_of(Crew& crew, const float* x, int64_t size, const ScoreSpace& space) {
  crew.for_each(num_chunks(size), [&](int64_t chunk) {
    V top = Simd::set1(-kInfinity);
    // The second operand is the result where the first is a NaN.
    for_columns(chunk, size, [&](auto at) { top = Simd::max(load(x, at), top); });
    space.highs[chunk] = Simd::highest(top);
  });
  return *std::max_element(space.highs, space.highs + num_chunks(size));
}

// The first column that equals `value`; 0 if none does.
inline int64_t first_of(const float* x, int64_t size, float value) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const unsigned found = Simd::bits(Simd::at_least(Simd::load(x + i), Simd::set1(value)));
    if (found) return i + __builtin_ctz(found);
  }
  for (; i < size; ++i)
    if (x[i] >= value) return i;
  return 0;
}

// e^(x - top); 0 below the smallest normal number, beyond which processors are slow, and for NaN. Its error: 1e-7 of
// exp2, and 6e-8 (top - x) of the difference.
ALWAYS_INLINE V weigh(V x, V top) {
  const V power = Simd::mul(Simd::sub(x, top), Simd::set1(kLog2E)), least = Simd::set1(-125.0f);
  return Simd::choose(Simd::at_least(power, least), exp2<float>(Simd::max(power, least)), Simd::zero());
}

inline double sum_totals(int64_t size, const ScoreSpace& space) {
  double total = 0;
  for (int64_t chunk = 0; chunk < num_chunks(size); ++chunk) total += space.totals[chunk];
  return total;
}

// Sums `weights_at(columns)` by chunks, and all of them.
template <class Crew, class WeightsAt>
double sum_chunks(Crew& crew, int64_t size, const ScoreSpace& space, WeightsAt&& weights_at) {
  crew.for_each(num_chunks(size), [&](int64_t chunk) {
    auto sum = Simd::wide_zero();
    V part = Simd::zero();
    for_columns(chunk, size, [&](auto at) {
      part = Simd::add(part, weights_at(at));
      if (at.first % kRun) return;
      sum = Simd::add(sum, part);
      part = Simd::zero();
    });
    space.totals[chunk] = Simd::sum(Simd::add(sum, part));
  });
  return sum_totals(size, space);
}

// The threshold -------------------------------------------------------------------------------------------------------

// What is measured of the scores at or above a threshold.
struct Count {
  using Sum = Simd::Whole;
  static Sum zero() { return Simd::none(); }
  static ALWAYS_INLINE Sum add(Sum sum, Simd::Mask m, const float*) { return Simd::count_where(sum, m); }
  static double total(Sum sum) { return double(Simd::sum(sum)); }
  static double of(const float*) { return 1; }
};

struct Mass {
  using Sum = V;
  static Sum zero() { return Simd::zero(); }
  static ALWAYS_INLINE Sum add(Sum sum, Simd::Mask m, const float* w) {
    return Simd::add_where(sum, m, Simd::load(w));
  }
  static double total(Sum sum) { return Simd::sum(Simd::add(Simd::wide_zero(), sum)); }
  static double of(const float* w) { return *w; }
};

struct Scores {
  const float *x, *w;  // -inf behind the last one, up to a multiple of 16
  int64_t count;
};

// Adds to sums[j] what lies at or above thresholds[j].
template <class Measure, int count = kThresholds>
void measure(const Scores& scores, const float* thresholds, double* sums) {
  constexpr int kTogether = Simd::kTiles == 1 && count > 1 ? count / 2 : count;  // what the registers hold
  for (int64_t from = 0; from < scores.count; from += kRun) {
    const int64_t end = std::min(scores.count, from + kRun);
    for (int first = 0; first < count; first += kTogether) {
      typename Measure::Sum sum[kTogether];
      for (auto& s : sum) s = Measure::zero();
      for (int64_t i = from; i < end; i += kLanes) {
        const V x = Simd::load(scores.x + i);
        for (int j = 0; j < kTogether; ++j)
          sum[j] = Measure::add(sum[j], Simd::at_least(x, Simd::set1(thresholds[first + j])), scores.w + i);
      }
      for (int j = 0; j < kTogether; ++j) sums[first + j] += Measure::total(sum[j]);
    }
  }
}

struct Range {
  float low = kInfinity, high = -kInfinity;  // both belong to it
};

// Copies the scores in [low, high); returns how many they are. They may be written over those that they come from.
template <class Measure>
int64_t keep_between(const Scores& scores, float low, float high, float* x_to, float* w_to, Range& found) {
  V least = Simd::set1(kInfinity), most = Simd::set1(-kInfinity);
  int64_t kept = 0;
  for (int64_t i = 0; i < scores.count; i += kLanes) {
    const V x = Simd::load(scores.x + i);
    // -inf is below every `low`, so the padding never is among them.
    const auto inside = Simd::both(Simd::at_least(x, Simd::set1(low)), Simd::above(Simd::set1(high), x));
    if (Simd::bits(inside) == 0) continue;
    least = Simd::min(Simd::choose(inside, x, least), least);
    most = Simd::max(Simd::choose(inside, x, most), most);
    if constexpr (std::is_same_v<Measure, Mass>) Simd::compress(w_to + kept, Simd::load(scores.w + i), inside);
    kept += Simd::compress(x_to + kept, x, inside);
  }
  std::fill(x_to + kept, x_to + padded(kept), -kInfinity);
  found = {Simd::lowest(least), Simd::highest(most)};
  return kept;
}

// Where the threshold is looked for: at least `low` and below `high`, above which lies `above` already.
struct Search {
  double target;
  double above = 0;
  float low = kLeast, high = kInfinity;
  bool even = true;

  // Returns which threshold is the new `high`; kThresholds: none.
  int narrow(const float* thresholds, const double* sums) {
    int j = 0;
    while (j < kThresholds && above + sums[j] >= target) ++j;
    if (j > 0) low = thresholds[j - 1];
    if (j < kThresholds) {
      high = thresholds[j];
      above += sums[j];
    }
    return j;
  }

  // Rising, above range.low and at most range.high, so that each pass takes something away: evenly spaced among the
  // numbers, next time among their bits. The latter needs few passes whatever the scores; the former is faster for most.
  void split(const Range& range, float* thresholds) {
    const float least = std::nextafter(range.low, kInfinity);
    for (int j = 0; j < kThresholds; ++j) {
      const double part = double(j + 1) / (kThresholds + 1);
      const float t = even ? float(range.low + part * (double(range.high) - range.low))
                           : from_order(order(range.low) + int64_t(part * (order(range.high) - order(range.low))));
      thresholds[j] = std::min(std::max(t, least), range.high);
    }
    even = !even;
  }

 private:
  // Whole numbers in the order of the floats.
  static int64_t order(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits < 0 ? int64_t(-1) - (bits & 0x7fffffff) : bits;
  }
  static float from_order(int64_t at) {
    const int32_t bits = at < 0 ? int32_t(uint32_t(-1 - at) | 0x80000000u) : int32_t(at);
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
};

// The end of a search, in memory of this thread's own, which the scores are in already.
template <class Measure>
float finish(Search& search, float* x, float* w, int64_t count, Range range) {
  constexpr int64_t kFew = 32;
  float thresholds[kThresholds];
  while (count > kFew && range.low < range.high) {
    double sums[kThresholds] = {};
    search.split(range, thresholds);
    measure<Measure>({x, w, count}, thresholds, sums);
    search.narrow(thresholds, sums);
    count = keep_between<Measure>({x, w, count}, search.low, search.high, x, w, range);
  }
  if (count == 0) return search.low;
  if (range.low == range.high) return range.low;
  // Falling.
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = i; j > 0 && x[j] > x[j - 1]; --j) {
      std::swap(x[j], x[j - 1]);
      std::swap(w[j], w[j - 1]);
    }
  for (int64_t i = 0; i < count; ++i) {
    search.above += Measure::of(w + i);
    if (search.above >= search.target) return x[i];
  }
  return x[count - 1];
}

// How much shall lie at or above a threshold.
struct Wanted {
  double target, total;  // of all scores at or above `floor`
  float floor = -kInfinity;
};

// Thresholds near the one that is looked for, found among a sample. Of a mass, what lies *below* the threshold is
// estimated: much of what lies above may be in few scores, which a sample misses.
template <class Measure>
void guess(const float* x, const float* w, int64_t size, const Wanted& wanted, float* thresholds) {
  constexpr int64_t kSampled = 128, kFew = 64;  // times 16 scores; scores
  const int64_t blocks = size / kLanes, sampled = std::min(kSampled, blocks);
  alignas(64) float own_x[kSampled * kLanes], own_w[kSampled * kLanes];
  const V floor = Simd::set1(wanted.floor);
  auto mass = Simd::wide_zero();
  for (int64_t i = 0; i < sampled; ++i) {
    const int64_t from = i * blocks / sampled * kLanes, to = i * kLanes;
    const V v = Simd::load(x + from);
    Simd::store(own_x + to, v);
    if constexpr (!std::is_same_v<Measure, Mass>) continue;
    const V weights = Simd::choose(Simd::at_least(v, floor), Simd::load(w + from), Simd::zero());
    Simd::store(own_w + to, weights);
    mass = Simd::add(mass, weights);
  }
  int64_t count = sampled * kLanes;
  const double total = std::is_same_v<Measure, Mass> ? Simd::sum(mass) : double(count);
  Search search{total - (wanted.total - wanted.target) * double(count) / double(size)};
  Range range;
  count = keep_between<Measure>({own_x, own_w, count}, kLeast, kInfinity, own_x, own_w, range);
  std::fill(thresholds, thresholds + kThresholds, range.low);
  while (count > kFew && range.low < range.high) {
    // The outer ones are the bounds that are known.
    float all[kThresholds + 2] = {range.low};
    double sums[kThresholds] = {};
    search.split(range, all + 1);
    all[kThresholds + 1] = range.high;
    measure<Measure>({own_x, own_w, count}, all + 1, sums);
    const int end = search.narrow(all + 1, sums);
    const int start = std::clamp(end + 1 - int(kThresholds) / 2, 0, 2);
    std::copy(all + start, all + start + kThresholds, thresholds);
    count = keep_between<Measure>({own_x, own_w, count}, search.low, search.high, own_x, own_w, range);
  }
}

// The highest t with measure(scores >= t) >= target, which is one of the scores; the lowest finite one where all of them
// are less than that. No more is sorted than 32 scores: a pass over the row measures at several thresholds, the next
// passes look at the scores between two of them alone. Leaves in space.totals the mass that each chunk has at or above
// the threshold, where mass is the measure.
template <class Measure, class Crew>
float find_threshold(Crew& crew, int64_t size, const Wanted& wanted, const ScoreSpace& space) {
  const int64_t chunks = num_chunks(size);
  Search search{wanted.target};
  float thresholds[kThresholds], found;
  const float *x = space.scores, *w = space.weights;
  guess<Measure>(x, w, size, wanted, thresholds);
  for (bool first = true;; first = false) {
    auto of_chunk = [&](int64_t chunk) -> Scores {
      const int64_t from = chunk * kChunk;
      return {x + from, w + from, first ? std::min(kChunk, size - from) : space.counts[chunk]};
    };
    crew.for_each(chunks, [&](int64_t chunk) {
      double* sums = space.sums + chunk * kThresholds;
      std::fill(sums, sums + kThresholds, 0.0);
      measure<Measure>(of_chunk(chunk), thresholds, sums);
    });
    double sums[kThresholds] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int j = 0; j < kThresholds; ++j) sums[j] += space.sums[chunk * kThresholds + j];
    const int end = search.narrow(thresholds, sums);
    crew.for_each(chunks, [&](int64_t chunk) {
      Range range;
      const int64_t from = chunk * kChunk;
      space.counts[chunk] = keep_between<Measure>(of_chunk(chunk), search.low, search.high, space.near_scores + from,
                                                  space.near_weights + from, range);
      space.lows[chunk] = range.low;
      space.highs[chunk] = range.high;
      if (first) space.totals[chunk] = 0;
      if (end < kThresholds) space.totals[chunk] += space.sums[chunk * kThresholds + end];
    });
    int64_t count = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) count += space.counts[chunk];
    const Range range = {*std::min_element(space.lows, space.lows + chunks),
                         *std::max_element(space.highs, space.highs + chunks)};
    if (count <= kChunk) {
      alignas(64) float own_x[kChunk], own_w[kChunk];
      int64_t at = 0;
      for (int64_t chunk = 0; chunk < chunks; at += space.counts[chunk++]) {
        std::memcpy(own_x + at, space.near_scores + chunk * kChunk, space.counts[chunk] * sizeof(float));
        std::memcpy(own_w + at, space.near_weights + chunk * kChunk, space.counts[chunk] * sizeof(float));
      }
      std::fill(own_x + count, own_x + padded(count), -kInfinity);
      found = finish<Measure>(search, own_x, own_w, count, range);
      break;
    }
    if (range.low == range.high) {
      found = range.low;
      break;
    }
    search.split(range, thresholds);
    x = space.near_scores;
    w = space.near_weights;
  }
  if constexpr (std::is_same_v<Measure, Mass>)
    crew.for_each(chunks, [&](int64_t chunk) {
      const int64_t from = chunk * kChunk;
      measure<Mass, 1>({space.near_scores + from, space.near_weights + from, space.counts[chunk]}, &found,
                       &space.totals[chunk]);
    });
  return found;
}

}  // namespace

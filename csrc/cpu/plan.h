// How the attention of a batch is cut into units of work, for all layers of one kind.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "api.h"

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kRun = 512;        // keys of a unit, where there are few queries
constexpr int64_t kFewTokens = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a plan depends on beside the batch; layers that agree in it share one.
struct PlanShape {
  int64_t num_heads, heads_per_kv, window;

  static PlanShape of(const Attention& attention) {
    return {attention.num_heads, attention.num_heads / attention.num_kv_heads, attention.window};
  }
  bool operator==(const PlanShape&) const = default;
};

// A plan and the memory it lies in, kept between steps.
class PlanMemory {
 public:
  PlanShape shape{};
  AttentionPlan plan{};
  int64_t num_rows = 0;  // of results

  void make(const PlanShape& for_shape, const Batch& batch) {
    shape = for_shape;
    units_.clear();
    lowest_.clear();
    own_.clear();
    int64_t first = 0;
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
      const int64_t count = batch.query_lens[s], length = batch.context_lens[s];
      const int64_t* table = batch.block_tables + (batch.table_rows ? batch.table_rows[s] : s) * batch.table_stride;
      const int64_t low = int64_t(lowest_.size());
      if (shape.window)
        for (int64_t t = length - count; t < length; ++t) {
          own_.push_back(t);
          lowest_.push_back(t - shape.window + 1);
        }
      add_units({first, count, 0, 0, table, 0, length - count, true, 0, nullptr}, length, low);
      first += count;
    }
    if (shape.window) {
      add_groups_within_windows(batch);
    } else {
      for (int64_t g = 0; g < batch.num_groups; ++g) {
        const Group& group = batch.groups[g];
        add_units({group.first_token, group.num_tokens, 0, 0, nullptr, group.first_slot, 0, false, 0, nullptr},
                  group.length, 0);
      }
    }
    finish(batch.num_tokens);
  }

 private:
  struct Unit {
    AttentionUnit unit;
    int64_t low;  // where its lowest keys begin in lowest_
  };
  std::vector<Unit> units_;
  std::vector<AttentionUnit> sorted_;
  std::vector<int64_t> parts_of_, parts_, next_;
  // With a window. The lowest key that tokens see, those of one sequence or group side by side; of each token its place
  // among its own, and how many keys lie between the start of the extent at hand and the first of these.
  std::vector<int64_t> lowest_, own_, behind_;

  void add_units(const AttentionUnit& whole, int64_t length, int64_t low) {
    // As even as can be: a unit of a few left over would read all keys for little.
    const int64_t most = std::max<int64_t>(1, kUnitQueries / shape.heads_per_kv);
    const int64_t end_token = whole.first_token + whole.num_tokens;
    const int64_t step = ceil_div(whole.num_tokens, std::max<int64_t>(1, ceil_div(whole.num_tokens, most)));
    // Runs of keys give every thread work when there are few queries; their results must be kept until they are joined.
    const int64_t run = whole.num_tokens <= kFewTokens ? kRun : std::max<int64_t>(length, 1);
    for (int64_t token = whole.first_token; token < end_token; token += step, low += step) {
      AttentionUnit unit = whole;
      unit.first_token = token;
      unit.num_tokens = std::min(step, end_token - token);
      unit.first_position = whole.first_position + token - whole.first_token;
      const int64_t seen = whole.causal ? unit.first_position + unit.num_tokens : length;
      int64_t key = 0;
      if (shape.window) {
        const auto lows = lowest_.begin() + low;
        key = std::max<int64_t>(0, *std::min_element(lows, lows + unit.num_tokens)) / kLanes * kLanes;
      }
      while (key < seen) {
        unit.first_key = key;
        key = unit.end_key = std::min(seen, (key / run + 1) * run);
        units_.push_back({unit, low});
      }
    }
  }

  // From the last group to the first, since the extents of a token lie before its own keys, the last the nearest.
  void add_groups_within_windows(const Batch& batch) {
    behind_.assign(batch.num_tokens, 0);
    for (int64_t g = batch.num_groups; g-- > 0;) {
      const Group& group = batch.groups[g];
      const int64_t low = int64_t(lowest_.size()), end = group.first_token + group.num_tokens;
      for (int64_t t = group.first_token; t < end; ++t) {
        behind_[t] += group.length;
        lowest_.push_back(own_[t] + behind_[t] - shape.window + 1);
      }
      // Only the tokens that see something of it.
      for (int64_t t = group.first_token; t < end;) {
        auto sees = [&](int64_t token) { return lowest_[low + token - group.first_token] < group.length; };
        int64_t after = t;
        while (after < end && sees(after)) ++after;
        if (after > t)
          add_units({t, after - t, 0, 0, nullptr, group.first_slot, 0, false, 0, nullptr}, group.length,
                    low + t - group.first_token);
        t = after + 1;
      }
    }
  }

  void finish(int64_t num_tokens) {
    // The heaviest go first, so that the threads end together.
    std::stable_sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) {
      return a.unit.num_tokens * (a.unit.end_key - a.unit.first_key) >
             b.unit.num_tokens * (b.unit.end_key - b.unit.first_key);
    });
    sorted_.clear();
    num_rows = 0;
    parts_of_.assign(num_tokens + 1, 0);
    for (const auto& [made, low] : units_) {
      AttentionUnit unit = made;
      unit.first_row = num_rows;
      if (shape.window) unit.lowest = lowest_.data() + low;
      num_rows += unit.num_tokens * shape.num_heads;
      for (int64_t t = 0; t < unit.num_tokens; ++t) ++parts_of_[unit.first_token + t + 1];
      sorted_.push_back(unit);
    }
    for (int64_t t = 0; t < num_tokens; ++t) parts_of_[t + 1] += parts_of_[t];
    parts_.resize(parts_of_[num_tokens]);
    next_.assign(parts_of_.begin(), parts_of_.end() - 1);
    for (size_t u = 0; u < sorted_.size(); ++u)
      for (int64_t t = 0; t < sorted_[u].num_tokens; ++t)
        parts_[next_[sorted_[u].first_token + t]++] = int64_t(u);
    plan = {int64_t(sorted_.size()), sorted_.data(), parts_of_.data(), parts_.data()};
  }
};

}  // namespace

// Gradients of attention's bias and of its ALiBi slopes: sums of dS over everything that shares an element.
//
// A bias's gradient is summed in the bias's own shape, in the accumulator type. Tasks that share its elements form a
// chain, which one thread runs in order, but the splits of a head run side by side: where they share elements, each
// sums into a copy of its own. Slopes are summed by head and split, in fp64.
#pragma once

#include "attention.h"

namespace {

// The results of the op, uninitialised.
template <class Storage>
struct Gradients {
  View<Storage, 4> query, key, value;
  void* bias = nullptr;  // contiguous; null when nobody asks
  bool bias_in_storage = false;
  int64_t bias_size[4] = {};
  AccOf<Storage>* slopes = nullptr;  // [slope_batches, H] contiguous; null when nobody asks
  int64_t slope_batches = 0;

  // Whether the bias is broadcast over a dimension.
  bool shares_bias(int dim) const { return bias && bias_size[dim] == 1; }
};

// The distance of a row to the nearest key that it may see.
inline int64_t nearest_distance(const Row& row) {
  return std::abs(row.position - std::clamp(row.position, row.keys.first, row.keys.last - 1));
}

// Σ dS · (|p − j| − nearest) of one row and keys key0 ..
template <class Acc>
Acc distance_sum(const Row& row, int64_t key0, const Acc* ds) {
  const Acc nearest = nearest_distance(row);
  Vec<Acc> sum = {}, distance = broadcast(static_cast<Acc>(row.position - key0)) - iota<Acc>();
  for (int64_t j = 0; j < KEYS; j += lanes<Acc>, distance -= static_cast<Acc>(lanes<Acc>))
    sum += load<Vec<Acc>>(ds + j) * (max<Acc>(distance, -distance) - nearest);
  return reduce_add<Acc>(sum);
}

template <class Storage>
class ScoreGradients {
  using Acc = AccOf<Storage>;

 public:
  // heads: sequences times key heads that have rows. splits: the most that one of them is split into.
  ScoreGradients(const Inputs<Storage>& inputs, const Gradients<Storage>& gradients, int64_t heads, int64_t splits)
      : in(inputs), grad(gradients), splits(splits), copies(grad.shares_bias(2) ? splits : 1), count(bias_count()),
        in_place(!grad.bias_in_storage && copies == 1), own_bias(grad.bias && !in_place ? copies * count : 0),
        bias(in_place ? static_cast<Acc*>(grad.bias) : own_bias.get()),
        slopes(grad.slopes ? heads * splits * in.group() : 0) {
    int64_t step = 1;
    for (int d = 3; d >= 0; --d) {
      stride[d] = grad.shares_bias(d) ? 0 : step;
      step *= grad.bias_size[d];
    }
    if (grad.bias) std::fill_n(bias, copies * count, Acc(0));
  }

  bool wanted() const { return grad.bias || grad.slopes; }

  // Before a task's first row.
  void begin(int64_t head, int64_t split) const {
    if (grad.slopes) std::fill_n(slopes_of(head, split), in.group(), 0.0);
  }

  // ds: of one row and keys key0 .. key0+count-1, zero beyond.
  void add(int64_t head, int64_t split, int64_t batch, const Row& row, int64_t key0, int64_t count,
           const Acc* ds) const {
    if (grad.bias && !grad.shares_bias(3)) {
      Acc* sum = bias_at(split, batch, row, key0);
      for (int64_t j = 0; j < count; ++j) sum[j] += ds[j];
    }
    if (grad.slopes) slope_of(head, split, row) += distance_sum(row, key0, ds);
  }

  // A number added to all scores of a row moves lse alone, so Σ dS is grad_lse: exactly, where a sum of dS would have
  // the rounding of out in it. `total` is that number: the gradient of a bias that is broadcast over the keys, and the
  // part of a slope's gradient that the nearest key's distance contributes.
  void add_total(int64_t head, int64_t split, int64_t batch, const Row& row, Acc total) const {
    if (grad.shares_bias(3)) *bias_at(split, batch, row, 0) += total;
    if (grad.slopes) slope_of(head, split, row) += static_cast<double>(nearest_distance(row)) * total;
  }

  // After all tasks. heads: each with its number of splits.
  template <class Heads>
  void finish(const Heads& heads) const {
    if (grad.slopes) finish_slopes(heads);
    if (grad.bias && !in_place) finish_bias();
  }

 private:
  const Inputs<Storage>& in;
  const Gradients<Storage>& grad;
  const int64_t splits;
  const int64_t copies, count;  // of the bias's gradient, one for each split where splits share elements; its elements
  const bool in_place;          // whether the result itself holds the sums
  const Buffer<Acc> own_bias;
  Acc* const bias;
  int64_t stride[4] = {};       // 0 where broadcast
  const Buffer<double> slopes;  // [heads][splits][G]

  int64_t bias_count() const {
    return grad.bias_size[0] * grad.bias_size[1] * grad.bias_size[2] * grad.bias_size[3];
  }

  Acc* bias_at(int64_t split, int64_t batch, const Row& row, int64_t key) const {
    return bias + (copies > 1 ? split * count : 0) + batch * stride[0] + row.head * stride[1] + row.query * stride[2] +
           key * stride[3];
  }

  double* slopes_of(int64_t head, int64_t split) const { return slopes.get() + (head * splits + split) * in.group(); }
  double& slope_of(int64_t head, int64_t split, const Row& row) const {
    return slopes_of(head, split)[row.head % in.group()];
  }

  template <class Heads>
  void finish_slopes(const Heads& heads) const {
    const int64_t H = in.query.size[1];
    std::vector<double> sums(grad.slope_batches * H, 0.0);
    for (size_t h = 0; h < heads.size(); ++h) {
      const int64_t batch = grad.slope_batches == 1 ? 0 : in.sequence_of(heads[h]).batch;
      for (int64_t split = 0; split < heads[h].splits; ++split)
        for (int64_t g = 0; g < in.group(); ++g)
          sums[batch * H + heads[h].key_head * in.group() + g] -= slopes_of(h, split)[g];
    }
    std::copy(sums.begin(), sums.end(), grad.slopes);
  }

  void finish_bias() const {
    constexpr int64_t PIECE = 1 << 14;  // elements of a task
    run_tasks(ceil_div(count, PIECE), double(count) * copies, [&](int64_t, int64_t i) {
      for (int64_t j = i * PIECE; j < std::min(count, (i + 1) * PIECE); ++j) {
        Acc sum = bias[j];
        for (int64_t copy = 1; copy < copies; ++copy) sum += bias[copy * count + j];
        if (grad.bias_in_storage) static_cast<Storage*>(grad.bias)[j] = static_cast<Storage>(sum);
        else static_cast<Acc*>(grad.bias)[j] = sum;
      }
    });
  }
};

}  // namespace

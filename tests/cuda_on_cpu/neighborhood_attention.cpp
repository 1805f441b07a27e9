// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of neighborhood_attention, run on the host, against the definition in double.
// Usage: neighborhood_attention <dtype> zeros|mask|shift tiled|general|batch|large|numbers|device
#include "neighborhood_attention/neighborhood_attention.h"

#include "compare.h"

namespace {

using namespace compare;
using ctxops::Border;

struct Case {
  int64_t B, C, Cv, H, W, heads;
  int64_t kh, kw, dh, dw;
  const char* layout;
  bool positions_inner = false;  // of the weights, as CUDA has them; else the neighbours are
  bool biased = false;
};

// Square windows of 3, 5 and 7.
const std::vector<Case> kTiled = {
    {1, 4, 4, 4, 4, 1, 3, 3, 1, 1, "dense", true},
    {2, 20, 12, 9, 7, 1, 3, 3, 2, 1, "dense", true},  // a chunk and a part
    {1, 36, 8, 5, 34, 1, 3, 3, 1, 1, "dense", true},  // three chunks, several tiles across
    {1, 4, 4, 35, 6, 1, 5, 5, 1, 1, "wide"},          // several tiles down
    {1, 24, 16, 9, 11, 2, 5, 5, 2, 3, "wide", true},
    {1, 16, 4, 3, 8, 1, 7, 7, 1, 1, "dense"},          // a window larger than the map
    {1, 12, 24, 7, 10, 3, 7, 7, 1, 2, "dense", true},  // heads of one and two packs
    {1, 8, 4, 9, 13, 1, 7, 7, 1, 1, "dense", true},    // several tiles
    {1, 8, 0, 6, 5, 2, 3, 3, 1, 1, "dense", true},     // only the weights
    {2, 8, 4, 9, 7, 2, 3, 3, 2, 1, "dense", true, true},
    {1, 4, 8, 6, 7, 1, 5, 5, 1, 2, "wide", false, true},
    {1, 4, 4, 5, 9, 1, 7, 7, 1, 1, "dense", true, true},
    {1, 8, 8, 7, 15, 2, 7, 7, 1, 2, "dense", true, true},  // classes as long as a window
};
// Everything else.
const std::vector<Case> kGeneral = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, "dense", true},
    {2, 3, 5, 3, 4, 1, 3, 3, 1, 1, "dense", true},    // odd channels
    {1, 8, 8, 3, 3, 1, 3, 3, 1, 1, "odd"},            // unaligned positions
    {1, 16, 16, 2, 3, 2, 3, 3, 4, 9, "dense", true},  // steps beyond the map
    {1, 6, 9, 1, 9, 3, 1, 4, 1, 2, "wide", true},     // 1 x N, an even window
    {1, 48, 40, 4, 3, 1, 2, 3, 2, 1, "dense"},
    {1, 8, 16, 3, 11, 1, 3, 5, 1, 2, "wide", true},
    {1, 300, 264, 2, 2, 1, 2, 2, 1, 1, "dense", true},  // more channels than a warp's packs
    {1, 2, 3, 3, 11, 1, 3, 11, 1, 1, "odd", true},      // more neighbours than a warp has lanes
    {1, 4, 0, 2, 5, 1, 2, 2, 2, 2, "odd"},
    {2, 6, 4, 7, 8, 2, 2, 3, 1, 2, "dense", true, true},
    {1, 3, 5, 6, 7, 1, 3, 3, 2, 1, "odd", false, true},
    {1, 2, 3, 3, 40, 1, 3, 11, 1, 1, "dense", true, true},  // wider than a warp
};
const std::vector<Case> kBatch = {{100, 1, 1, 1, 1, 1, 1, 1, 1, 1, "dense"}};
const std::vector<Case> kLarge = {{1, 1, 1, 2, 1, 1, 64, 64, 1, 1, "dense", true}};

const std::vector<Case>& cases_named(const std::string& name) {
  if (name == "tiled") return kTiled;
  if (name == "general") return kGeneral;
  if (name == "batch") return kBatch;
  if (name == "large") return kLarge;
  fail("no cases " + name);
}

struct Problem {
  Case shape;
  DType dtype;
  Border border;
  double scale;

  DType accumulator() const { return ctxops::accumulator_dtype(dtype); }
  int64_t K() const { return shape.kh * shape.kw; }
  int64_t biased_rows() const { return 2 * shape.kh - 1; }
  int64_t biased_columns() const { return 2 * shape.kw - 1; }
};

// All but the tensors.
ctxops::NeighborhoodAttentionForward window_of(const Problem& p) {
  ctxops::NeighborhoodAttentionForward forward = {};
  forward.kernel_size = {2, {p.shape.kh, p.shape.kw}};
  forward.dilation = {2, {p.shape.dh, p.shape.dw}};
  forward.scale = p.scale;
  forward.border = p.border;
  forward.num_heads = p.shape.heads;
  return forward;
}

Tensor map_of(const Problem& p, int64_t channels) {
  if (channels == 0) return Tensor(p.dtype, {0});
  const std::string layout = p.shape.layout;
  Layout steps = {{1, 3, 2, 0}, {0, 0, 0, 0}};
  if (layout == "wide") steps.gap = {8, 16, 24, 0};
  if (layout == "odd") steps = {{1, 2, 3, 0}, {3, 1, 5, 0}, 1};
  return Tensor(p.dtype, {p.shape.B, channels, p.shape.H, p.shape.W}, steps);
}

Tensor weights_of(const Problem& p, DType dtype) {
  Layout layout = row_major(5);
  if (!p.shape.positions_inner) layout = {{2, 1, 4, 3, 0}, {1, 0, 2, 0, 0}};
  return Tensor(dtype, {p.shape.B, p.shape.heads, p.K(), p.shape.H, p.shape.W}, layout);
}

Tensor bias_of(const Problem& p, DType dtype) {
  if (!p.shape.biased) return Tensor(dtype, {0});
  return Tensor(dtype, {p.shape.heads, p.biased_rows(), p.biased_columns()});
}

// Element (i0, i1, ...) of a tensor.
int64_t place(const TensorView& view, int64_t offset, std::initializer_list<int64_t> index) {
  const int64_t* stride = view.stride;
  for (const int64_t i : index) offset += i * *stride++;
  return offset;
}

class Elements {
 public:
  explicit Elements(Tensor& tensor, int64_t offset)
      : tensor_(tensor), view_(tensor.view()), offset_(offset) {}
  template <typename... Index>
  double get(Index... index) const {
    return tensor_.get(place(view_, offset_, {index...}));
  }
  template <typename... Index>
  void set(double x, Index... index) {
    tensor_.set(place(view_, offset_, {index...}), x);
  }
  template <typename... Index>
  void add(double x, Index... index) {
    set(get(index...) + x, index...);
  }

 private:
  Tensor& tensor_;
  TensorView view_;
  int64_t offset_;
};

Elements map_elements(const Problem& p, Tensor& tensor) {
  return Elements(tensor, std::string(p.shape.layout) == "odd" ? 1 : 0);
}

struct Inputs {
  Tensor query, key, value, grad, bias;
};

struct Results {
  Tensor output, weights, grad_logits, grad_query, grad_key, grad_value, grad_bias;
};

Results new_results(const Problem& p) {
  const Case& s = p.shape;
  return {map_of(p, s.Cv),
          weights_of(p, p.accumulator()),
          weights_of(p, p.accumulator()),
          map_of(p, s.C),
          map_of(p, s.C),
          map_of(p, s.Cv),
          bias_of(p, p.accumulator())};
}

// f(neighbour n of position (h, w), its row, its column, is it inside?, its entry of a head's
// bias), straight from the definition.
template <typename F>
void for_neighbours(const Problem& p, int64_t h, int64_t w, const F& f) {
  const Case& s = p.shape;
  const auto first = [&](int64_t position, int64_t extent, int64_t kernel, int64_t dilation) {
    int64_t at = position - kernel / 2 * dilation;
    if (p.border != Border::shift) return at;
    while (at < 0) at += dilation;
    while (at + (kernel - 1) * dilation >= extent) at -= dilation;
    return at;
  };
  const int64_t top = first(h, s.H, s.kh, s.dh), left = first(w, s.W, s.kw, s.dw);
  for (int64_t n = 0; n < p.K(); ++n) {
    const int64_t i = top + n / s.kw * s.dh, j = left + n % s.kw * s.dw;
    const int64_t down = (i - h) / s.dh + s.kh - 1, across = (j - w) / s.dw + s.kw - 1;
    f(n, i, j, i >= 0 && i < s.H && j >= 0 && j < s.W, down * p.biased_columns() + across);
  }
}

// The operator and its gradients in double, in the layouts of p.
Results expected(Problem p, const Inputs& in) {
  p.dtype = DType::float64;
  const Case& s = p.shape;
  Tensor exact[] = {in.query.to(p.dtype), in.key.to(p.dtype), in.value.to(p.dtype),
                    in.grad.to(p.dtype), in.bias.to(p.dtype)};
  const Elements query = map_elements(p, exact[0]), key = map_elements(p, exact[1]);
  const Elements value = map_elements(p, exact[2]), grad = map_elements(p, exact[3]);
  Results r = new_results(p);
  Elements output = map_elements(p, r.output), grad_query = map_elements(p, r.grad_query);
  Elements grad_key = map_elements(p, r.grad_key), grad_value = map_elements(p, r.grad_value);
  Elements weights(r.weights, 0), grad_logits(r.grad_logits, 0);
  const int64_t D = s.C / s.heads, E = s.Cv / s.heads;
  const Tensor& bias = exact[4];
  const int64_t entries = p.biased_rows() * p.biased_columns();
  for (int64_t n = 0; n < r.grad_bias.stored(); ++n) r.grad_bias.set(n, 0);

  const auto everywhere = [&](const auto& f) {
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t m = 0; m < s.heads; ++m) {
        for (int64_t h = 0; h < s.H; ++h) {
          for (int64_t w = 0; w < s.W; ++w) f(b, m, h, w);
        }
      }
    }
  };
  everywhere([&](int64_t b, int64_t m, int64_t h, int64_t w) {
    for (int64_t c = m * D; c < (m + 1) * D; ++c) {
      grad_query.set(0, b, c, h, w);
      grad_key.set(0, b, c, h, w);
    }
    for (int64_t c = m * E; c < (m + 1) * E; ++c) {
      output.set(0, b, c, h, w);
      grad_value.set(0, b, c, h, w);
    }
  });
  everywhere([&](int64_t b, int64_t m, int64_t h, int64_t w) {
    std::vector<double> x(p.K()), dx(p.K(), 0.0);
    double largest = -INFINITY, total = 0, mean = 0;
    for_neighbours(p, h, w, [&](int64_t n, int64_t i, int64_t j, bool inside, int64_t entry) {
      x[n] = p.border == Border::mask && !inside ? -INFINITY : 0.0;
      if (inside && s.biased) x[n] = bias.get(m * entries + entry);
      for (int64_t c = m * D; inside && c < (m + 1) * D; ++c) {
        x[n] += p.scale * query.get(b, c, h, w) * key.get(b, c, i, j);
      }
      largest = std::fmax(largest, x[n]);
    });
    for (double& e : x) total += e = std::exp(e - largest);
    for_neighbours(p, h, w, [&](int64_t n, int64_t i, int64_t j, bool inside, int64_t) {
      weights.set(x[n] /= total, b, m, n, h, w);
      for (int64_t c = m * E; inside && c < (m + 1) * E; ++c) {
        output.add(x[n] * value.get(b, c, i, j), b, c, h, w);
        grad_value.add(x[n] * grad.get(b, c, h, w), b, c, i, j);
        dx[n] += grad.get(b, c, h, w) * value.get(b, c, i, j);
      }
      mean += x[n] * dx[n];
    });
    for_neighbours(p, h, w, [&](int64_t n, int64_t i, int64_t j, bool inside, int64_t entry) {
      const double g = inside ? x[n] * (dx[n] - mean) : 0;
      grad_logits.set(g, b, m, n, h, w);
      for (int64_t c = m * D; inside && c < (m + 1) * D; ++c) {
        grad_query.add(p.scale * g * key.get(b, c, i, j), b, c, h, w);
        grad_key.add(p.scale * g * query.get(b, c, h, w), b, c, i, j);
      }
      if (!inside || !s.biased) return;
      r.grad_bias.set(m * entries + entry, r.grad_bias.get(m * entries + entry) + g);
    });
  });
  return r;
}

Results run(const Problem& p, Inputs& in, bool save, int32_t device = 0, Stream stream = {}) {
  Results r = new_results(p);
  Tensor unwanted(p.accumulator(), {0});
  const auto view = [&](Tensor& tensor) { return on_device(device, tensor); };
  ctxops::NeighborhoodAttentionForward forward = window_of(p);
  forward.query = view(in.query);
  forward.key = view(in.key);
  forward.value = view(in.value);
  forward.output = view(r.output);
  forward.weights = view(save ? r.weights : unwanted);
  forward.bias = view(in.bias);
  const char* error = ctxops::cuda::neighborhood_attention_forward(forward, stream);
  expect_launched("forward", error, device, stream);
  if (!save || p.shape.Cv == 0) return r;
  error = ctxops::cuda::neighborhood_attention_backward({.grad = view(in.grad),
                                                         .query = forward.query,
                                                         .key = forward.key,
                                                         .value = forward.value,
                                                         .weights = forward.weights,
                                                         .grad_logits = view(r.grad_logits),
                                                         .grad_query = view(r.grad_query),
                                                         .grad_key = view(r.grad_key),
                                                         .grad_value = view(r.grad_value),
                                                         .kernel_size = forward.kernel_size,
                                                         .dilation = forward.dilation,
                                                         .scale = forward.scale,
                                                         .border = forward.border,
                                                         .num_heads = forward.num_heads,
                                                         .grad_bias = view(r.grad_bias)},
                                                        stream);
  expect_launched("backward", error, device, stream);
  return r;
}

Inputs random_inputs(const Problem& p, uint64_t seed) {
  Random random(seed);
  Inputs in = {map_of(p, p.shape.C), map_of(p, p.shape.C), map_of(p, p.shape.Cv),
               map_of(p, p.shape.Cv), bias_of(p, p.accumulator())};
  for (Tensor* tensor : {&in.query, &in.key, &in.value, &in.grad, &in.bias}) {
    tensor->fill([&] { return random.in_unit(); });
  }
  return in;
}

// Sums of `terms` products, rounded in the accumulator and then in the dtype.
void expect_rounded(const std::string& what, const Problem& p, const Tensor& exact,
                    const Tensor& actual, int64_t terms) {
  expect_close(what, exact.to(actual.dtype()), actual, 2 * epsilon(actual.dtype()),
               static_cast<double>(8 + terms) * epsilon(p.accumulator()));
}

// Gaps hold what nobody wrote in either tensor: NaN, in every dtype.
void check(const Problem& p, Inputs& in) {
  const Case& s = p.shape;
  Results exact = expected(p, in);
  auto [one, other] = in_both_orders([&] { return run(p, in, true); });
  const int64_t forward = s.C / s.heads + p.K(), backward = forward + s.Cv / s.heads + p.K();
  expect_rounded("weights", p, exact.weights, one.weights, forward);
  expect_same_bits("weights", one.weights, other.weights);
  if (s.Cv == 0) return;
  expect_rounded("output", p, exact.output, one.output, forward);
  expect_same_bits("output", one.output, other.output);
  expect_rounded("grad_query", p, exact.grad_query, one.grad_query, backward);
  expect_rounded("grad_key", p, exact.grad_key, one.grad_key, backward);
  expect_rounded("grad_value", p, exact.grad_value, one.grad_value, backward);
  expect_same_bits("grad_query", one.grad_query, other.grad_query);
  expect_same_bits("grad_key", one.grad_key, other.grad_key);
  expect_same_bits("grad_value", one.grad_value, other.grad_value);
  expect_rounded("grad_bias", p, exact.grad_bias, one.grad_bias, backward);
  expect_same_bits("grad_bias", one.grad_bias, other.grad_bias);

  Results without = run(p, in, false);
  expect_same_bits("output without weights", one.output, without.output);
}

bool possible(const Problem& p) {
  Tensor query = map_of(p, p.shape.C);
  ctxops::NeighborhoodAttentionForward forward = window_of(p);
  forward.query = query.view();
  return ctxops::check_window(forward) == nullptr;
}

// A NaN or an infinity reaches the positions whose windows hold it, and no others.
void check_numbers(Problem p) {
  for (const Case& shape : {Case{1, 8, 8, 5, 9, 2, 3, 3, 1, 2, "dense", true},
                            Case{1, 5, 5, 3, 7, 1, 3, 3, 1, 2, "dense", true}}) {
    p.shape = shape;
    for (const double number : {NAN, INFINITY}) {
      for (int which = 0; which < 4; ++which) {
        Inputs in = random_inputs(p, 5);
        Tensor* const maps[] = {&in.query, &in.key, &in.value, &in.grad};
        map_elements(p, *maps[which]).set(number, 0, 2, 0, 3);
        Results exact = expected(p, in);
        Results actual = run(p, in, true);
        const std::string what = "input " + std::to_string(which) + ", ";
        expect_rounded(what + "weights", p, exact.weights, actual.weights, 64);
        expect_rounded(what + "output", p, exact.output, actual.output, 64);
        expect_rounded(what + "grad_query", p, exact.grad_query, actual.grad_query, 64);
        expect_rounded(what + "grad_key", p, exact.grad_key, actual.grad_key, 64);
        expect_rounded(what + "grad_value", p, exact.grad_value, actual.grad_value, 64);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: neighborhood_attention <dtype> zeros|mask|shift <cases>");
  const std::string border = argv[2], cases = argv[3];
  Problem p = {kTiled[0], dtype_named(argv[1]),
               border == "zeros"  ? Border::zeros
               : border == "mask" ? Border::mask
                                  : Border::shift,
               0.7};
  if (cases == "numbers") return check_numbers(p), 0;
  if (cases == "device") {
    Inputs in = random_inputs(p, 1);
    cudaSetDevice(1);
    return run(p, in, true, 1, {7}), 0;
  }
  uint64_t seed = 0;
  for (const Case& s : cases_named(cases)) {
    p.shape = s;
    ++seed;
    if (!possible(p)) continue;
    std::printf("(%ld, %ld | %ld, %ld, %ld), %ld heads, %ld x %ld, dilation %ld, %ld\n", s.B, s.C,
                s.Cv, s.H, s.W, s.heads, s.kh, s.kw, s.dh, s.dw);
    std::fflush(stdout);
    Inputs in = random_inputs(p, seed);
    check(p, in);
  }
}

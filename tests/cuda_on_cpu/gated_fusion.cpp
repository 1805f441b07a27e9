// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of gated_fusion, run on the host, against the definition in double.
// Usage: gated_fusion <dtype> one_size|sizes|many|drawn|device given|computed
#include "gated_fusion/gated_fusion.h"

#include "compare.h"

namespace {

using namespace compare;
using ctxops::TensorList;

struct Size {
  int64_t H, W;
};

// How maps lie in memory: channels inner or planar; dense, with gaps that leave packs aligned, or
// with gaps that do not.
struct Case {
  int64_t B, C;
  std::vector<Size> sizes;  // of the levels
  const char* layout;
  bool align_corners = false;
};

const std::vector<Case> kOneSize = {
    {1, 1, {{1, 1}, {1, 1}}, "planes"},
    {2, 8, {{3, 4}, {3, 4}}, "pixels"},
    {2, 8, {{3, 4}, {3, 4}}, "planes"},
    {1, 5, {{7, 5}, {7, 5}, {7, 5}}, "odd_pixels"},
    {1, 5, {{7, 5}, {7, 5}, {7, 5}}, "odd_planes"},
    {2, 40, {{3, 8}, {3, 8}, {3, 8}, {3, 8}}, "wide_pixels"},
    {2, 36, {{3, 8}, {3, 8}, {3, 8}, {3, 8}}, "wide_planes"},
    {1, 8, {{2, 8}, {2, 8}, {2, 8}, {2, 8}, {2, 8}}, "pixels"},  // more than four levels
    {1, 7, {{2, 8}, {2, 8}, {2, 8}, {2, 8}, {2, 8}, {2, 8}, {2, 8}, {2, 8}}, "planes"},
    {1, 296, {{3, 3}, {3, 3}}, "pixels"},  // more channels than a team has at once
    {1, 130, {{2, 4}, {2, 4}}, "planes"},
    {1, 67, {{3, 7}, {3, 7}}, "pixels"},
    {1, 37, {{3, 7}, {3, 7}}, "planes"},
    {2, 8, {{6, 12}, {6, 12}}, "pixels"},  // several parts of an image, the last not whole
    {2, 3, {{6, 12}, {6, 12}}, "planes"},
    // Few channels: several positions a warp, the last warp's not all there.
    {1, 1, {{5, 13}, {5, 13}}, "pixels"},
    {1, 4, {{5, 15}, {5, 15}}, "pixels"},
    {1, 12, {{7, 11}, {7, 11}, {7, 11}}, "pixels"},
    {1, 20, {{7, 7}, {7, 7}}, "wide_pixels"},
    {1, 60, {{3, 13}, {3, 13}}, "pixels"},
    {1, 72, {{3, 7}, {3, 7}}, "pixels"},
};
const std::vector<Case> kSizes = {
    {1, 4, {{4, 4}, {2, 2}}, "pixels"},
    {1, 4, {{4, 4}, {2, 4}}, "planes"},
    {2, 3, {{9, 7}, {1, 1}, {5, 4}}, "odd_pixels"},
    {2, 3, {{9, 7}, {1, 1}, {5, 4}}, "odd_planes", true},
    {1, 8, {{5, 8}, {9, 4}, {5, 8}, {3, 12}}, "wide_pixels", true},  // two of one size
    {1, 8, {{5, 8}, {9, 4}, {5, 8}, {3, 12}}, "wide_planes"},
    {1, 264, {{3, 3}, {2, 4}}, "pixels"},
    {1, 66, {{3, 4}, {2, 8}}, "planes"},
    {1, 2, {{1, 9}, {7, 1}, {3, 3}, {2, 2}, {1, 1}, {5, 2}, {4, 6}, {1, 9}}, "planes"},
    {1, 4, {{1, 9}, {7, 1}, {3, 3}, {2, 2}, {1, 1}, {5, 2}, {4, 6}, {1, 9}}, "pixels", true},
    {2, 8, {{9, 8}, {3, 4}, {9, 8}}, "pixels"},  // parts that only the large levels have
    {2, 3, {{3, 4}, {9, 8}, {3, 4}}, "planes"},
    {1, 16, {{7, 11}, {3, 5}}, "pixels"},  // few channels, as above
    {2, 28, {{5, 9}, {4, 3}, {5, 9}}, "pixels", true},
    {1, 52, {{5, 7}, {3, 3}}, "wide_pixels"},
};
// Very many positions receive from one.
const std::vector<Case> kMany = {
    {1, 4, {{17, 20}, {1, 1}, {2, 3}}, "pixels"},
    {1, 2, {{17, 20}, {1, 1}, {2, 3}}, "planes"},
    {1, 1, {{1, 1}, {33, 32}}, "planes"},
    {1, 2, {{1, 1}, {33, 32}}, "planes"},           // teams of several warps
    {2, 64, {{17, 20}, {1, 1}, {2, 3}}, "pixels"},  // several teams, each with several positions
};

std::vector<Case> drawn_cases() {
  const char* const layouts[] = {"pixels",      "planes",     "wide_pixels",
                                 "wide_planes", "odd_pixels", "odd_planes"};
  std::vector<Case> cases;
  Random random(2);
  for (int n = 0; n < 12; ++n) {
    Case drawn = {1 + random.below(2),
                  1 + random.below(n % 3 == 0 ? 80 : 12),
                  {},
                  layouts[random.below(6)],
                  random.below(2) == 0};
    if (random.below(2) == 0) drawn.C = (drawn.C + 3) / 4 * 4;
    const int64_t levels = 2 + random.below(7), different = 1 + random.below(4);
    std::vector<Size> sizes;
    for (int64_t i = 0; i < different; ++i) {
      sizes.push_back({1 + random.below(9),
                       random.below(2) == 0 ? 4 * (1 + random.below(3)) : 1 + random.below(12)});
    }
    for (int64_t l = 0; l < levels; ++l) drawn.sizes.push_back(sizes[random.below(different)]);
    cases.push_back(drawn);
  }
  return cases;
}

struct Problem {
  Case shape;
  DType dtype;
  bool computed;

  DType accumulator() const { return ctxops::accumulator_dtype(dtype); }
  int64_t L() const { return static_cast<int64_t>(shape.sizes.size()); }
  int64_t positions(int64_t l) const { return shape.sizes[l].H * shape.sizes[l].W; }
  int64_t all_gates() const {
    int64_t count = 0;
    for (int64_t l = 0; l < L(); ++l) count += shape.B * positions(l);
    return count;
  }
  // Elements of one map of every size, or none where there is but one.
  int64_t all_sums() const {
    int64_t count = 0, different = 0;
    for (int64_t l = 0; l < L(); ++l) {
      bool first = true;
      for (int64_t i = 0; i < l; ++i) {
        first =
            first && (shape.sizes[i].H != shape.sizes[l].H || shape.sizes[i].W != shape.sizes[l].W);
      }
      if (!first) continue;
      ++different;
      count += shape.B * shape.C * positions(l);
    }
    return different == 1 ? 0 : count;
  }
  int64_t parts() const {
    int64_t most = 0;
    for (int64_t l = 0; l < L(); ++l) {
      const int64_t own = shape.B * ((positions(l) + ctxops::kPart - 1) / ctxops::kPart);
      most = own > most ? own : most;
    }
    return most;
  }
};

Layout layout_named(const std::string& name) {
  if (name == "pixels") return {{1, 3, 2, 0}, {0, 0, 0, 0}};
  if (name == "planes") return {{3, 2, 1, 0}, {0, 0, 0, 0}};
  if (name == "wide_pixels") return {{1, 3, 2, 0}, {8, 16, 24, 0}};
  if (name == "wide_planes") return {{3, 2, 1, 0}, {0, 8, 16, 0}};
  if (name == "odd_pixels") return {{1, 3, 2, 0}, {3, 1, 5, 0}, 1};
  if (name == "odd_planes") return {{3, 2, 1, 0}, {0, 3, 5, 0}, 1};
  fail("no layout " + name);
}

using Maps = std::vector<Tensor>;

Maps new_maps(const Problem& p, DType dtype) {
  Maps maps;
  for (const Size& size : p.shape.sizes) {
    maps.emplace_back(dtype, std::vector<int64_t>{p.shape.B, p.shape.C, size.H, size.W},
                      layout_named(p.shape.layout));
  }
  return maps;
}

TensorList views(Maps& maps, int32_t device = 0) {
  TensorList list = {};
  for (Tensor& map : maps) list.value[list.count++] = on_device(device, map);
  return list;
}

Tensor buffer(DType dtype, int64_t count) { return Tensor(dtype, {count}); }

struct Inputs {
  Maps features, grads;
  Tensor gates, weight, bias;
};

struct Results {
  Maps outputs, grad_features;
  Tensor gates, grad_gates, grad_weight;  // grad_weight: summed over the parts
  double largest = 1;  // of the sums that a position receives and of their gradients, at least 1
};

Inputs random_inputs(const Problem& p, uint64_t seed) {
  Random random(seed);
  Inputs in = {new_maps(p, p.dtype), new_maps(p, p.dtype), buffer(p.accumulator(), p.all_gates()),
               Tensor(p.accumulator(), {p.L(), p.shape.C}), buffer(p.accumulator(), p.L())};
  for (Maps* maps : {&in.features, &in.grads}) {
    for (Tensor& map : *maps) map.fill([&] { return random.in_unit(); });
  }
  in.gates.fill([&] { return (1 + random.in_unit()) / 2; });
  // Logits of a few, however many channels.
  in.weight.fill([&] { return random.in_unit() * 3 / std::sqrt(p.shape.C); });
  in.bias.fill([&] { return random.in_unit(); });
  return in;
}

// ------------------------------------------------------------------------------ the definition

// A level of one batch element in double, (C, H, W); a gate is one with a single channel.
using Plane = std::vector<double>;

class Definition {
 public:
  explicit Definition(const Problem& p) : p_(p), s_(p.shape) {}

  Results operator()(Inputs& in) const {
    Results r = {new_maps(p_, DType::float64), new_maps(p_, DType::float64),
                 buffer(DType::float64, p_.all_gates()), buffer(DType::float64, p_.all_gates()),
                 Tensor(DType::float64, {p_.L(), s_.C})};
    r.grad_weight.fill([] { return 0.0; });
    for (int64_t b = 0; b < s_.B; ++b) element(b, in, &r);
    return r;
  }

 private:
  int64_t place(Tensor& map, int64_t b, int64_t c, int64_t n, int64_t l) const {
    const TensorView view = map.view();
    return layout_named(s_.layout).offset + b * view.stride[0] + c * view.stride[1] +
           n / s_.sizes[l].W * view.stride[2] + n % s_.sizes[l].W * view.stride[3];
  }
  int64_t gate_at(int64_t b, int64_t l, int64_t n) const {
    int64_t at = b * p_.positions(l) + n;
    for (int64_t i = 0; i < l; ++i) at += s_.B * p_.positions(i);
    return at;
  }

  // The share of position i of `from` in position j of `to`: a hat around where j falls.
  double share(int64_t from, int64_t to, int64_t j, int64_t i) const {
    double x = s_.align_corners ? (to > 1 ? static_cast<double>(j) * (from - 1) / (to - 1) : 0)
                                : (j + 0.5) * from / to - 0.5;
    x = std::fmin(std::fmax(x, 0), from - 1);
    return std::fmax(0, 1 - std::fabs(x - i));
  }

  // f(position of level `to`, position of level `from`, share) where there is one.
  template <typename F>
  void for_shares(int64_t from, int64_t to, const F& f) const {
    const Size &source = s_.sizes[from], &target = s_.sizes[to];
    for (int64_t h = 0; h < target.H; ++h) {
      for (int64_t i = 0; i < source.H; ++i) {
        const double row = share(source.H, target.H, h, i);
        for (int64_t w = 0; row > 0 && w < target.W; ++w) {
          for (int64_t j = 0; j < source.W; ++j) {
            const double column = share(source.W, target.W, w, j);
            if (column > 0) f(h * target.W + w, i * source.W + j, row * column);
          }
        }
      }
    }
  }

  void element(int64_t b, Inputs& in, Results* r) const {
    const int64_t L = p_.L(), C = s_.C;
    std::vector<Plane> x(L), dy(L), gate(L), received(L), grad_received(L), grad_sent(L);
    for (int64_t l = 0; l < L; ++l) {
      const int64_t N = p_.positions(l);
      x[l].resize(C * N);
      dy[l].resize(C * N);
      gate[l].resize(N);
      received[l].assign(C * N, 0);
      grad_received[l].assign(C * N, 0);
      grad_sent[l].assign(C * N, 0);
      for (int64_t n = 0; n < N; ++n) {
        double z = p_.computed ? in.bias.get(l) : 0;
        for (int64_t c = 0; c < C; ++c) {
          x[l][c * N + n] = in.features[l].get(place(in.features[l], b, c, n, l));
          dy[l][c * N + n] = in.grads[l].get(place(in.grads[l], b, c, n, l));
          z += in.weight.get(l * C + c) * x[l][c * N + n];
        }
        gate[l][n] = p_.computed ? 1 / (1 + std::exp(-z)) : in.gates.get(gate_at(b, l, n));
        r->gates.set(gate_at(b, l, n), gate[l][n]);
      }
    }
    for (int64_t to = 0; to < L; ++to) {
      for (int64_t from = 0; from < L; ++from) {
        if (from == to) continue;
        const int64_t N = p_.positions(from), M = p_.positions(to);
        for_shares(from, to, [&](int64_t m, int64_t n, double share) {
          for (int64_t c = 0; c < C; ++c) {
            received[to][c * M + m] += share * gate[from][n] * x[from][c * N + n];
            grad_sent[from][c * N + n] += share * (1 - gate[to][m]) * dy[to][c * M + m];
          }
        });
      }
    }
    for (int64_t l = 0; l < L; ++l) {
      const int64_t N = p_.positions(l);
      for (const double sum : received[l]) r->largest = std::fmax(r->largest, std::fabs(sum));
      for (const double sum : grad_sent[l]) r->largest = std::fmax(r->largest, std::fabs(sum));
      for (int64_t n = 0; n < N; ++n) {
        const double g = gate[l][n];
        double grad = 0;
        for (int64_t c = 0; c < C; ++c) {
          const int64_t e = c * N + n;
          r->outputs[l].set(place(r->outputs[l], b, c, n, l),
                            (1 + g) * x[l][e] + (1 - g) * received[l][e]);
          grad += (x[l][e] - received[l][e]) * dy[l][e] + x[l][e] * grad_sent[l][e];
        }
        if (p_.computed) grad *= g * (1 - g);
        r->grad_gates.set(gate_at(b, l, n), grad);
        for (int64_t c = 0; c < C; ++c) {
          const int64_t e = c * N + n;
          double dx = (1 + g) * dy[l][e] + g * grad_sent[l][e];
          if (p_.computed) {
            dx += grad * in.weight.get(l * C + c);
            r->grad_weight.set(l * C + c, r->grad_weight.get(l * C + c) + grad * x[l][e]);
          }
          r->grad_features[l].set(place(r->grad_features[l], b, c, n, l), dx);
        }
      }
    }
  }

  const Problem& p_;
  const Case& s_;
};

// --------------------------------------------------------------------------------- the kernels

Results run(const Problem& p, Inputs& in, int32_t device = 0, Stream stream = {}) {
  const DType A = p.accumulator();
  const int64_t L = p.L(), C = p.shape.C, sums_count = p.all_sums(), parts = p.parts();
  Results r = {new_maps(p, p.dtype), new_maps(p, p.dtype), buffer(A, p.all_gates()),
               buffer(A, p.all_gates()), Tensor(DType::float64, {L, C})};
  if (!p.computed) r.gates = in.gates;
  Tensor nothing = buffer(A, 0), sums = buffer(A, sums_count), grad_sums = buffer(A, sums_count);
  Tensor grad_sent = buffer(A, sums_count);
  Tensor partial = p.computed ? Tensor(A, {L, parts, C}) : nothing;
  Tensor &weight = p.computed ? in.weight : nothing, &bias = p.computed ? in.bias : nothing;
  const auto view = [&](Tensor& tensor) { return on_device(device, tensor); };

  const char* error = ctxops::cuda::gated_fusion_forward({.features = views(in.features, device),
                                                          .gates = view(r.gates),
                                                          .weight = view(weight),
                                                          .bias = view(bias),
                                                          .outputs = views(r.outputs, device),
                                                          .sums = view(sums),
                                                          .align_corners = p.shape.align_corners},
                                                         stream);
  expect_launched("forward", error, device, stream);
  error = ctxops::cuda::gated_fusion_backward({.grads = views(in.grads, device),
                                               .features = views(in.features, device),
                                               .gates = view(r.gates),
                                               .weight = view(weight),
                                               .sums = view(sums),
                                               .grad_sums = view(grad_sums),
                                               .grad_sent = view(grad_sent),
                                               .grad_gates = view(r.grad_gates),
                                               .grad_features = views(r.grad_features, device),
                                               .grad_weight = view(partial),
                                               .align_corners = p.shape.align_corners},
                                              stream);
  expect_launched("backward", error, device, stream);
  r.grad_weight.fill([] { return 0.0; });
  for (int64_t i = 0; i < partial.stored(); ++i) {
    const int64_t at = i / C / parts * C + i % C;
    r.grad_weight.set(at, r.grad_weight.get(at) + partial.get(i));
  }
  return r;
}

// Sums of `terms` products of numbers up to `largest`, rounded in the accumulator, then in the
// dtype.
void expect_rounded(const std::string& what, const Problem& p, const Tensor& exact,
                    const Tensor& actual, double largest, int64_t terms) {
  expect_close(what, exact.to(actual.dtype()), actual, 2 * epsilon(actual.dtype()),
               largest * static_cast<double>(terms) * epsilon(p.accumulator()));
}

void expect_results(const Problem& p, Inputs& in, const Results& actual) {
  Results exact = Definition(p)(in);
  const int64_t C = p.shape.C, L = p.L();
  int64_t N = 0;
  for (int64_t l = 0; l < L; ++l) N = p.positions(l) > N ? p.positions(l) : N;
  for (int64_t l = 0; l < L; ++l) {
    const std::string level = " of level " + std::to_string(l);
    expect_rounded("output" + level, p, exact.outputs[l], actual.outputs[l], exact.largest,
                   8 + L + C / 8);
    expect_rounded("grad_features" + level, p, exact.grad_features[l], actual.grad_features[l],
                   exact.largest, 8 + L + C);
  }
  expect_rounded("gates", p, exact.gates, actual.gates, 1, 8 + C / 8);
  expect_rounded("grad_gates", p, exact.grad_gates, actual.grad_gates, exact.largest, 8 + L + C);
  if (!p.computed) return;
  // Held in double, but made of sums in the accumulator.
  expect_close("grad_weight", exact.grad_weight, actual.grad_weight, 2 * epsilon(p.accumulator()),
               exact.largest * static_cast<double>(8 + L + C + N) * epsilon(p.accumulator()));
}

void check(const Problem& p, uint64_t seed) {
  Inputs in = random_inputs(p, seed);
  auto [one, other] = in_both_orders([&] { return run(p, in); });
  expect_results(p, in, one);
  for (int64_t l = 0; l < p.L(); ++l) {
    expect_same_bits("output", one.outputs[l], other.outputs[l]);
    expect_same_bits("grad_features", one.grad_features[l], other.grad_features[l]);
  }
  expect_same_bits("gates", one.gates, other.gates);
  expect_same_bits("grad_gates", one.grad_gates, other.grad_gates);
  expect_same_bits("grad_weight", one.grad_weight, other.grad_weight);

  // Of one size, gates that nobody wants are not written.
  if (!p.computed || p.all_sums() > 0) return;
  Maps outputs = new_maps(p, p.dtype);
  Tensor nothing = buffer(p.accumulator(), 0);
  const char* error = ctxops::cuda::gated_fusion_forward({.features = views(in.features),
                                                          .gates = nothing.view(),
                                                          .weight = in.weight.view(),
                                                          .bias = in.bias.view(),
                                                          .outputs = views(outputs),
                                                          .sums = nothing.view(),
                                                          .align_corners = p.shape.align_corners},
                                                         {});
  if (error != nullptr) fail(std::string("forward without gates: ") + error);
  for (int64_t l = 0; l < p.L(); ++l) {
    expect_same_bits("output without gates", one.outputs[l], outputs[l]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: gated_fusion <dtype> <cases> given|computed");
  const std::string cases = argv[2];
  Problem p = {kSizes[0], dtype_named(argv[1]), std::string(argv[3]) == "computed"};
  if (cases == "device") {
    Inputs in = random_inputs(p, 1);
    cudaSetDevice(1);
    expect_results(p, in, run(p, in, 1, {7}));
    return 0;
  }
  uint64_t seed = 0;
  for (const Case& s : cases == "one_size" ? kOneSize
                       : cases == "sizes"  ? kSizes
                       : cases == "many"   ? kMany
                                           : drawn_cases()) {
    p.shape = s;
    std::printf("(%ld, %ld) %s %s\n", s.B, s.C, s.layout, s.align_corners ? "corners" : "");
    for (const Size& size : s.sizes) std::printf("  %ld x %ld\n", size.H, size.W);
    std::fflush(stdout);
    check(p, ++seed);
  }
}

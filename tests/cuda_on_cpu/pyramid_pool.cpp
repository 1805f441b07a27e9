// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of pyramid_pool, run on the host, against the CPU kernels.
// Usage: pyramid_pool <dtype> avg|max <layout> small|boundaries|batch|large
#include "pyramid_pool/pyramid_pool.h"

#include "compare.h"

namespace {

using namespace compare;
using ctxops::IntList;

struct Case {
  int64_t B, C, H, W;
  std::vector<int64_t> sizes;
};

const std::vector<Case> kSmall = {
    {1, 1, 1, 1, {1}},         {2, 3, 7, 5, {1, 2, 3, 6}}, {2, 16, 12, 16, {1, 3, 6}},
    {3, 8, 8, 24, {4, 4}},     {2, 5, 1, 13, {1, 3}},      {3, 9, 17, 1, {1, 3, 5}},
    {1, 6, 3, 4, {5, 9}},       // grids larger than the map
    {1, 300, 3, 4, {1, 2}},     // more channels than a tile
    {1, 3, 4, 300, {1, 3, 6}},  // more columns than a strip
    {1, 8, 5, 576, {1, 7}},     // likewise, in packs
    {1, 2, 64, 8, {1, 2}},      // few planes: several teams
    {1, 3, 40, 300, {1, 3}},    // likewise, and more columns than a strip
    {1, 16, 24, 24, {1, 8}},    // few bins, one with far more cells than the others
    {0, 3, 4, 4, {1, 2}},
};
const std::vector<Case> kBoundaries = {{1, 1, 1, 263, {131}}};  // more than kMaxCells
const std::vector<Case> kBatch = {{70000, 1, 1, 1, {1}}};       // more maps than a grid has rows

Layout layout_named(const std::string& name) {
  if (name == "contiguous") return {{3, 2, 1, 0}, {0, 0, 0, 0}};
  if (name == "channels_last") return {{1, 3, 2, 0}, {0, 0, 0, 0}};
  if (name == "wide_rows") return {{3, 2, 1, 0}, {8, 16, 24, 0}};
  if (name == "wide_pixels") return {{1, 3, 2, 0}, {8, 16, 24, 0}};
  if (name == "odd_rows") return {{3, 1, 2, 0}, {3, 1, 5, 0}, 1};
  if (name == "odd_pixels") return {{1, 2, 3, 0}, {3, 1, 5, 0}, 1};
  fail("no layout " + name);
}

IntList int_list(const std::vector<int64_t>& values) {
  IntList list = {};
  for (const int64_t value : values) list.value[list.count++] = value;
  return list;
}

struct Problem {
  Case shape;
  DType dtype;
  bool maximum, save;
  Layout layout;

  int64_t bins() const { return ctxops::grid_bins(int_list(shape.sizes)); }
  std::vector<int64_t> cells() const {
    const IntList sizes = int_list(shape.sizes);
    return {shape.B, ctxops::make_cell_axis(shape.H, sizes).count,
            ctxops::make_cell_axis(shape.W, sizes).count, shape.C};
  }
  DType accumulator() const { return ctxops::accumulator_dtype(dtype); }
};

struct Forward {
  Tensor output, argmax, cells, cell_argmax;

  explicit Forward(const Problem& p)
      : output(p.dtype, {p.shape.B, p.shape.C, p.bins()}),
        argmax(saved(p, {p.shape.B, p.bins(), p.shape.C})),
        cells(p.accumulator(), p.cells()),
        cell_argmax(saved(p, p.cells())) {}

  static Tensor saved(const Problem& p, const std::vector<int64_t>& sizes) {
    return p.save ? Tensor(DType::int32, sizes) : Tensor(DType::int32, {0});
  }
};

struct Backward {
  Tensor grad_cells, grad_input;

  // Without positions, as for an empty batch, the kernel takes the gradient for one of means.
  explicit Backward(const Problem& p)
      : grad_cells(p.accumulator(),
                   p.maximum && p.shape.B > 0 ? std::vector<int64_t>{0} : p.cells()),
        grad_input(p.dtype, {p.shape.B, p.shape.C, p.shape.H, p.shape.W}, p.layout) {}
};

template <typename Executor>
Forward run_forward(const Problem& p, Tensor& input,
                    const char* (*kernel)(const ctxops::PyramidPoolForward&, Executor)) {
  Forward result(p);
  const char* error = kernel({.input = input.view(),
                              .output = result.output.view(),
                              .argmax = result.argmax.view(),
                              .cells = result.cells.view(),
                              .cell_argmax = result.cell_argmax.view(),
                              .sizes = int_list(p.shape.sizes),
                              .maximum = p.maximum},
                             Executor{});
  if (error != nullptr) fail(std::string("forward: ") + error);
  return result;
}

template <typename Executor>
Backward run_backward(const Problem& p, Tensor& grad_output, Tensor& argmax,
                      const char* (*kernel)(const ctxops::PyramidPoolBackward&, Executor)) {
  Backward result(p);
  const char* error = kernel({.grad_output = grad_output.view(),
                              .argmax = argmax.view(),
                              .grad_cells = result.grad_cells.view(),
                              .grad_input = result.grad_input.view(),
                              .sizes = int_list(p.shape.sizes)},
                             Executor{});
  if (error != nullptr) fail(std::string("backward: ") + error);
  return result;
}

// Sums differ by rounding: in the accumulator, then in the output's dtype.
void expect_rounded(const std::string& what, const Problem& p, const Tensor& expected,
                    const Tensor& actual) {
  if (p.maximum) return expect_equal(what, expected, actual);
  expect_close(what, expected, actual, 2 * epsilon(expected.dtype()),
               64 * epsilon(p.accumulator()));
}

void check(const Problem& p, uint64_t seed) {
  Random random(seed);
  // Few different values, so that maxima tie, and some that are no numbers.
  const auto value = [&]() -> double {
    switch (random.below(300)) {
      case 0: return NAN;
      case 1: return INFINITY;
      case 2: return -INFINITY;
      default: return p.maximum ? std::floor(random.in_unit() * 8) / 4 : random.in_unit();
    }
  };
  Tensor input(p.dtype, {p.shape.B, p.shape.C, p.shape.H, p.shape.W}, p.layout);
  input.fill(value);

  Forward expected = run_forward(p, input, ctxops::baseline::pyramid_pool_forward);
  auto [one, other] =
      in_both_orders([&] { return run_forward(p, input, ctxops::cuda::pyramid_pool_forward); });
  expect_rounded("output", p, expected.output, one.output);
  expect_rounded("cells", p, expected.cells, one.cells);
  expect_equal("argmax", expected.argmax, one.argmax);
  expect_same_bits("output", one.output, other.output);
  expect_same_bits("argmax", one.argmax, other.argmax);
  if (p.maximum && !p.save) return;

  Tensor grad_output(p.dtype, {p.shape.B, p.bins(), p.shape.C});
  grad_output.fill(value);
  // The CPU's kernel adds maxima in the map itself, which must not be of half precision.
  Problem exact = p;
  if (p.maximum) exact.dtype = p.accumulator();
  Tensor exact_grad = grad_output.to(exact.dtype);
  Backward expected_back =
      run_backward(exact, exact_grad, expected.argmax, ctxops::baseline::pyramid_pool_backward);
  auto [back, other_back] = in_both_orders([&] {
    return run_backward(p, grad_output, expected.argmax, ctxops::cuda::pyramid_pool_backward);
  });
  expect_rounded("grad_input", p, expected_back.grad_input.to(p.dtype), back.grad_input);
  expect_same_bits("grad_input", back.grad_input, other_back.grad_input);
}

// Sums of very many values, as accurate as those of a few.
const std::vector<Case> kLarge = {
    {1, 4, 300, 400, {1}},       // large cells
    {1, 4, 120, 110, {1, 100}},  // small cells, many of them in a bin
};

void check_sums(const Problem& p, bool constant) {
  Random random(1);
  Tensor input(p.dtype, {p.shape.B, p.shape.C, p.shape.H, p.shape.W}, p.layout);
  input.fill([&] { return constant ? 0.1 : std::fabs(random.in_unit()); });
  auto [one, other] =
      in_both_orders([&] { return run_forward(p, input, ctxops::cuda::pyramid_pool_forward); });
  expect_same_bits("output", one.output, other.output);

  const int64_t positions = p.shape.H * p.shape.W;
  const TensorView map = input.view();
  for (int64_t c = 0; c < p.shape.C; ++c) {
    const int64_t plane = p.layout.offset + c * map.stride[1];
    double sum = 0, sum_of_cells = 0;
    for (int64_t i = 0; i < positions; ++i) {
      const int64_t h = i / p.shape.W, w = i % p.shape.W;
      sum += input.get(plane + h * map.stride[2] + w * map.stride[3]);
    }
    for (int64_t i = c; i < one.cells.stored(); i += p.shape.C) sum_of_cells += one.cells.get(i);
    const double mean = sum / positions, output = one.output.get(c * p.bins());
    if (std::fabs(sum_of_cells - sum) > 4 * epsilon(p.accumulator()) * sum)
      fail("cells: sums too inaccurate");
    if (std::fabs(output - mean) > 4 * epsilon(p.dtype) * mean) fail("output: sums too inaccurate");
  }
}

#if defined(CTXOPS_CUDA_ON_CPU)  // of a GPU's two devices and streams torch's tests know
void check_device(const Problem& p) {
  Forward result(p);
  Tensor input(p.dtype, {p.shape.B, p.shape.C, p.shape.H, p.shape.W}, p.layout);
  const auto view = [](Tensor& tensor) { return on_device(1, tensor); };
  const Stream stream = {7};
  const auto forward = [&] {
    return ctxops::cuda::pyramid_pool_forward({.input = view(input),
                                               .output = view(result.output),
                                               .argmax = view(result.argmax),
                                               .cells = view(result.cells),
                                               .cell_argmax = view(result.cell_argmax),
                                               .sizes = int_list(p.shape.sizes),
                                               .maximum = p.maximum},
                                              stream);
  };
  if (forward() == nullptr) fail("a kernel ran on tensors of a device that is not the current one");
  cudaSetDevice(1);
  expect_launched("forward", forward(), 1, stream);
}
#else
void check_device(const Problem&) {}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) fail("usage: pyramid_pool <dtype> avg|max <layout> small|boundaries|batch|large");
  const std::string cases = argv[4];
  const bool maximum = std::string(argv[2]) == "max";
  Problem p = {{}, dtype_named(argv[1]), maximum, false, layout_named(argv[3])};
  if (cases == "large") {
    for (const Case& shape : kLarge) {
      p.shape = shape;
      check_sums(p, true);
      check_sums(p, false);
    }
    return 0;
  }
  uint64_t seed = 0;
  for (const Case& shape : cases == "small"        ? kSmall
                           : cases == "boundaries" ? kBoundaries
                                                   : kBatch) {
    p.shape = shape;
    for (const bool save : {false, true}) {
      if (save && !maximum) continue;
      std::printf("(%ld, %ld, %ld, %ld)%s\n", shape.B, shape.C, shape.H, shape.W,
                  save ? " with positions" : "");
      std::fflush(stdout);
      p.save = save;
      check(p, ++seed);
    }
  }
  p.shape = kSmall[1];
  check_device(p);
}

// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of category_statistics, run on the host, against the CPU kernel.
// Usage: category_statistics <dtype> plain|weighted small|labels|numbers|many|drawn|device
#include "category_statistics/category_statistics.h"

#include <type_traits>

#include "compare.h"

namespace {

using namespace compare;

struct Case {
  int64_t B, C, K, h, w, H, W, parts;
  bool align_corners = false;
  const char* content = "noise";  // of the labels: also blobs, ignored, outside
  DType labels = DType::int64;
  int64_t ignore_index = 255;
  const char* layout = "pixels";
  const char* label_layout = "rows";
  const char* numbers = "usual";  // in the features: also nan, infinity, short, zero, opposed
};

const std::vector<Case> kSmall = {
    {1, 1, 1, 1, 1, 1, 1, 1},
    {2, 5, 3, 3, 4, 7, 9, 3},
    {1, 33, 4, 5, 3, 11, 8, 4, true, "blobs"},
    {1, 70, 6, 2, 3, 5, 7, 2, false, "noise", DType::uint8, 255, "odd_pixels"},
    {1, 4, 5, 1, 1, 5, 6, 1, true},
    {1, 6, 5, 1, 6, 4, 13, 3, false, "blobs"},
    {1, 6, 5, 6, 1, 13, 4, 3, true},
    {2, 3, 5, 4, 5, 3, 2, 2},        // labels smaller than the map
    {1, 3, 4, 4, 3, 1, 1, 2, true},  // one label
    {1, 3, 2, 3, 3, 3, 3, 12},       // of one size, more parts than cells
    {0, 3, 2, 3, 3, 6, 6, 1},
};
const std::vector<Case> kLabels = {
    {2, 3, 4, 3, 4, 7, 9, 2, false, "noise", DType::uint8, 255, "pixels", "columns"},
    {2, 3, 4, 3, 4, 7, 9, 2, true, "blobs", DType::int8, -1, "wide_pixels", "wide_rows"},
    {2, 3, 4, 3, 4, 7, 9, 2, false, "noise", DType::int16, 300, "odd_pixels", "wide_columns"},
    {2, 3, 4, 3, 4, 7, 9, 2, true, "noise", DType::int32, -100000, "pixels", "one_row"},
    {2, 3, 4, 3, 4, 7, 9, 2, false, "noise", DType::int64, int64_t{1} << 40, "pixels", "columns"},
    {2, 3, 4, 3, 4, 7, 9, 2, false, "noise", DType::int64, 2},  // ignores a class
    {2, 3, 4, 3, 4, 7, 9, 2, false, "ignored", DType::uint8},
    {2, 3, 4, 3, 4, 7, 9, 3, false, "outside", DType::uint8},
    {2, 3, 4, 3, 4, 7, 9, 3, true, "outside", DType::int64, -1},
    {1, 300, 4, 3, 4, 7, 9, 3, true, "outside", DType::int8, -1},
};
const std::vector<Case> kNumbers = {
    {1, 3, 9, 3, 4, 3, 4, 2, false, "noise", DType::int64, 255, "pixels", "rows", "nan"},
    {2, 3, 40, 3, 4, 7, 9, 2, false, "noise", DType::int64, 255, "pixels", "rows", "nan"},
    {2, 3, 40, 3, 4, 7, 9, 2, true, "noise", DType::int64, 255, "pixels", "rows", "infinity"},
    {2, 3, 4, 3, 4, 7, 9, 2, false, "noise", DType::int64, 255, "pixels", "rows", "short"},
    {2, 3, 4, 3, 4, 7, 9, 2, false, "noise", DType::int64, 255, "pixels", "rows", "zero"},
    {1, 3, 3, 2, 9, 6, 27, 2, false, "noise", DType::int64, 255, "pixels", "rows", "opposed"},
};
const std::vector<Case> kMany = {
    {1, 300, 3, 2, 3, 6, 7, 2},    // channels for more than one block
    {1, 3, 300, 2, 2, 17, 18, 1},  // classes in a cell, and more than threads
    {1, 3, 300, 2, 2, 17, 18, 2, true, "blobs"},
    {1, 2, 3, 9, 11, 18, 22, 1, false, "blobs"},  // cells in a part
    {1, 2, 3, 9, 11, 18, 22, 2},
    {1, 1, 2, 2, 2, 4, 4, 70},    // parts
    {1, 300, 3, 3, 4, 9, 9, 70},  // both: larger tiles of channels
    {1, 300, 3, 3, 4, 9, 9, 130},
    {1, 40, 1, 9, 11, 18, 22, 2},  // terms of one class, which all teams have
    {1, 40, 2, 9, 11, 18, 22, 1, true, "blobs"},
};

std::vector<Case> drawn_cases() {
  const char* const layouts[] = {"pixels", "wide_pixels", "odd_pixels"};
  const char* const label_layouts[] = {"rows", "columns", "wide_rows", "wide_columns", "one_row"};
  const DType dtypes[] = {DType::uint8, DType::int8, DType::int16, DType::int32, DType::int64};
  std::vector<Case> cases;
  Random random(3);
  for (int n = 0; n < 12; ++n) {
    const int64_t C = 1 + random.below(n % 3 == 0 ? 80 : 8);
    cases.push_back(
        {1 + random.below(2), C, 1 + random.below(12), 1 + random.below(5), 1 + random.below(5),
         1 + random.below(14), 1 + random.below(14), 1 + random.below(6), random.below(2) == 0,
         random.below(2) == 0 ? "noise" : "blobs", dtypes[random.below(5)],
         random.below(2) == 0 ? 100 : 1, layouts[random.below(3)], label_layouts[random.below(5)]});
  }
  return cases;
}

struct Problem {
  Case shape;
  DType dtype;
  bool weighted;

  DType accumulator() const { return ctxops::accumulator_dtype(dtype); }
};

Layout layout_named(const std::string& name) {
  if (name == "pixels") return {{1, 3, 2, 0}, {0, 0, 0, 0}};
  if (name == "wide_pixels") return {{1, 3, 2, 0}, {8, 16, 24, 0}};
  if (name == "odd_pixels") return {{1, 2, 3, 0}, {3, 1, 5, 0}, 1};
  if (name == "rows") return {{2, 1, 0}, {0, 0, 0}};
  if (name == "columns") return {{1, 2, 0}, {0, 0, 0}};
  if (name == "wide_rows") return {{2, 1, 0}, {3, 5, 0}, 1};
  if (name == "wide_columns") return {{0, 1, 2}, {1, 2, 0}, 2};
  if (name == "one_row") return {{2, 1, 0}, {0, 0, 0}};  // for all: see new_labels
  fail("no layout " + name);
}

struct Inputs {
  Tensor features, labels, directions;
  int64_t outside = 0;  // labels
};

int64_t label_of(const Case& s, Random& random, int64_t b, int64_t Y, int64_t X) {
  const std::string content = s.content;
  if (content == "ignored" || random.below(9) == 0) return s.ignore_index;
  if (content == "outside" && random.below(9) == 0) return random.below(2) == 0 ? s.K : -3;
  if (content == "blobs") return (b + Y / 4 * 3 + X / 5) % s.K;
  return random.below(s.K);
}

Tensor new_labels(const Case& s, Random& random, int64_t* outside) {
  const Layout layout = layout_named(s.label_layout);
  Tensor labels(s.labels, {s.B, s.H, s.W}, layout);
  labels.fill([] { return 0; });  // a class, in gaps that nobody should see
  const TensorView view = labels.view();
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t Y = 0; Y < s.H; ++Y) {
      for (int64_t X = 0; X < s.W; ++X) {
        const int64_t label = label_of(s, random, b, Y, X);
        *outside += label != s.ignore_index && (label < 0 || label >= s.K);
        labels.set(layout.offset + b * view.stride[0] + Y * view.stride[1] + X * view.stride[2],
                   static_cast<double>(label));
      }
    }
  }
  return labels;
}

// One vector of length 1 per class; the last class has zeros.
Tensor new_directions(const Problem& p, Random& random) {
  const int64_t K = p.shape.K, C = p.shape.C;
  if (!p.weighted) return Tensor(DType::float64, {0});
  Tensor directions(DType::float64, {K, C});
  for (int64_t k = 0; k < K; ++k) {
    double square = 0;
    for (int64_t c = 0; c < C; ++c) {
      directions.set(k * C + c, random.in_unit());
      square += directions.get(k * C + c) * directions.get(k * C + c);
    }
    const double factor = k > 0 && k == K - 1 ? 0 : 1 / std::sqrt(square);
    for (int64_t c = 0; c < C; ++c) directions.set(k * C + c, directions.get(k * C + c) * factor);
  }
  return directions;
}

Inputs random_inputs(const Problem& p, uint64_t seed) {
  const Case& s = p.shape;
  Random random(seed);
  int64_t outside = 0;
  Tensor features(p.dtype, {s.B, s.C, s.h, s.w}, layout_named(s.layout));
  const std::string numbers = s.numbers;
  const double size = numbers == "zero" ? 0 : numbers == "short" ? 3e-8 : 1;
  features.fill([&] { return random.in_unit() * size; });
  // Thirds of the way between them the map is 0, but for rounding.
  for (int64_t i = 0; numbers == "opposed" && i < features.stored(); ++i) {
    features.set(i, (i / s.C % s.w % 2 == 0 ? 2 : -1) * std::sin(i % s.C + 1.0));
  }
  if (numbers == "nan") features.set(s.C * s.w + 1, NAN);
  if (numbers == "infinity") features.set(s.C * s.w + 1, INFINITY);
  Tensor labels = new_labels(s, random, &outside);
  return {features, labels, new_directions(p, random), outside};
}

struct Results {
  Tensor sums, weights, counts, outside;
};

template <typename Executor>
Results call(const Problem& p, Inputs& in, Tensor scratch, int32_t device, Executor executor,
             const char* (*kernel)(const ctxops::CategoryStatistics&, Executor)) {
  const Case& s = p.shape;
  const DType A = p.accumulator();
  Results r = {Tensor(A, {s.K, s.C}), Tensor(A, {s.K}), Tensor(DType::int64, {s.K}),
               Tensor(DType::int64, {2})};
  Tensor part_sums(DType::float64, {s.parts, s.K, s.C}),
      part_weights(DType::float64, {s.parts, s.K});
  Tensor part_counts(DType::int64, {s.parts, s.K});
  const auto view = [&](Tensor& tensor) { return on_device(device, tensor); };
  TensorView labels = view(in.labels);
  if (std::string(s.label_layout) == "one_row") labels.stride[1] = 0;
  const char* error = kernel({.features = view(in.features),
                              .labels = labels,
                              .directions = view(in.directions),
                              .sums = view(r.sums),
                              .weights = view(r.weights),
                              .counts = view(r.counts),
                              .outside = view(r.outside),
                              .part_sums = view(part_sums),
                              .part_weights = view(part_weights),
                              .part_counts = view(part_counts),
                              .scratch = view(scratch),
                              .ignore_index = s.ignore_index,
                              .align_corners = s.align_corners},
                             executor);
  if constexpr (std::is_same_v<Executor, Stream>) {
    expect_launched("category_statistics", error, device, executor);
  } else if (error != nullptr) {
    fail(error);
  }
  return r;
}

Results run(const Problem& p, Inputs& in, int32_t device = 0, Stream stream = {}) {
  const Case& s = p.shape;
  Tensor scratch(p.accumulator(), {p.weighted ? s.B : 0, s.H, s.W});
  return call(p, in, scratch, device, stream, ctxops::cuda::category_statistics);
}

Results run_cpu(const Problem& p, Inputs& in) {
  const Case& s = p.shape;
  const int64_t columns = s.w + 1;
  const int64_t values =
      ctxops::scratch_of_position(p.dtype == DType::float64, s.C, s.K, s.W, columns);
  Tensor scratch(DType::float64, {s.parts, columns, values});
  return call(p, in, scratch, -1, Threads{}, ctxops::baseline::category_statistics);
}

void expect_results(const Problem& p, Inputs& in, const Results& actual) {
  Results expected = run_cpu(p, in);
  expect_equal("counts", expected.counts, actual.counts);
  if (actual.outside.get(0) != expected.outside.get(0)) fail("labels outside are miscounted");
  if (actual.outside.get(0) > 0) {
    for (Tensor* poisoned : {&expected.sums, &expected.weights}) {
      poisoned->fill([] { return NAN; });
    }
  }
  // Both sum in double, but on CUDA a of a pixel, up to 2, is rounded to the accumulator. In double
  // it is the root of an inexact square that counts.
  double pixels = 0;
  for (int64_t k = 0; k < p.shape.K; ++k) pixels = std::fmax(pixels, expected.counts.get(k));
  const double rounding = epsilon(p.accumulator());
  const double of_one = !p.weighted                         ? epsilon(DType::float64)
                        : p.accumulator() == DType::float64 ? 1e-12
                                                            : rounding;
  expect_close("sums", expected.sums, actual.sums, rounding, pixels * of_one);
  expect_close("weights", expected.weights, actual.weights, rounding, pixels * of_one);
}

void check(const Problem& p, uint64_t seed) {
  Inputs in = random_inputs(p, seed);
  if ((in.outside > 0) != (std::string(p.shape.content) == "outside")) fail("wrong labels");
  auto [one, other] = in_both_orders([&] { return run(p, in); });
  expect_results(p, in, one);
  expect_same_bits("sums", one.sums, other.sums);
  expect_same_bits("weights", one.weights, other.weights);
  expect_same_bits("counts", one.counts, other.counts);
  expect_same_bits("outside", one.outside, other.outside);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: category_statistics <dtype> plain|weighted <cases>");
  const std::string cases = argv[3];
  Problem p = {kSmall[1], dtype_named(argv[1]), std::string(argv[2]) == "weighted"};
  if (cases == "device") {
    Inputs in = random_inputs(p, 1);
    cudaSetDevice(1);
    expect_results(p, in, run(p, in, 1, {7}));
    return 0;
  }
  uint64_t seed = 0;
  for (const Case& s : cases == "small"     ? kSmall
                       : cases == "labels"  ? kLabels
                       : cases == "numbers" ? kNumbers
                       : cases == "many"    ? kMany
                                            : drawn_cases()) {
    p.shape = s;
    std::printf("(%ld, %ld, %ld x %ld), %ld classes in %ld x %ld %s, %ld parts\n", s.B, s.C, s.h,
                s.w, s.K, s.H, s.W, s.content, s.parts);
    std::fflush(stdout);
    check(p, ++seed);
  }
}

// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"
#include "common/simd.h"
#include "gated_fusion/gated_fusion.h"

namespace ctxops {
namespace CTXOPS_ISA {
namespace {

// Positions of a planar map that are computed together, each with all its channels: a page of
// memory of every channel. Shorter runs cost twice the time. Where the channels lie side by side it
// is one position.
constexpr int64_t kPlanarBlock = 1024;
static_assert(kPlanarBlock % kPart == 0);

struct Problem {
  Levels levels;
  TensorList features, outputs, grads, grad_features;
  // Without elements: nullptr.
  void *gates, *weight, *bias, *sums, *grad_sums, *grad_sent, *grad_gates, *grad_weight;
  int64_t parts;  // P
  bool align_corners;
  Threads threads;
};

template <typename A>
void add(A* __restrict to, const A* __restrict from, A factor, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] += factor * from[k];
}

// A: float or double, of maps and accumulators.
template <typename A, bool kChannelsInner>
class Fusion {
  using V = Vector<A>;
  using Whole = std::integral_constant<int64_t, kLanes<A>>;

  // A block has kBlock positions. Vectors of it hold neighbouring channels of the position, or
  // neighbouring positions of a channel: what belongs to positions takes kVectors of them, and in
  // the first case the position's number stands in all lanes.
  static constexpr int64_t kBlock = kChannelsInner ? 1 : kPlanarBlock;
  static constexpr int64_t kVectors = kChannelsInner ? 1 : kPlanarBlock / kLanes<A>;
  struct OfPositions {
    V vector[kVectors];
  };

  // The first position and channel of a block in the maps of the group's levels, in their order.
  struct Maps {
    A* first[kMaxTensors];
    int64_t channel[kMaxTensors];  // elements from one channel to the next
  };

  struct Block {
    const Group* group;
    int64_t b, position, count;  // h * W + w of the first position, and how many they are
    Maps x, y, dy, dx;           // in features, outputs, grads, grad_features
  };

  // Where the positions of a block are made of the four around a point of another group's map.
  struct Taps {
    int64_t down, right;  // from the first of the four to those below and beside it
    int64_t first[kBlock];
    A below[kBlock], beside[kBlock];  // the shares of the lower and of the right two
  };

 public:
  explicit Fusion(const Problem& problem)
      : p_(problem),
        C_(problem.levels.channels),
        one_size_(problem.levels.groups == 1),
        stream_(bytes_of_results() > kCache) {}

  void forward() const {
    if (!one_size_) {
      for_blocks([&](const Block& block, int64_t) {
        OfPositions gate[kMaxTensors];
        fetch_ahead(block, block.x);
        make_gates(block, gate);
        for_vectors(block, [&](int64_t c, int64_t v, auto count) CTXOPS_INLINE_LAMBDA {
          put(in_sums(p_.sums, block, c, v), sum_sent(block, gate, c, v, count), count);
        });
      });
    }
    for_blocks([&](const Block& block, int64_t) {
      OfPositions gate[kMaxTensors];
      Taps taps[kMaxTensors];
      fetch_ahead(block, block.x);
      if (one_size_) {
        make_gates(block, gate);
      } else {
        load_gates(block, gate);
        make_taps(block, taps);
      }
      for_vectors(block, [&](int64_t c, int64_t v, auto count) CTXOPS_INLINE_LAMBDA {
        const V received =
            one_size_ ? sum_sent(block, gate, c, v, count) : sum_resized(block, taps, c, v, count);
        for_levels(block, [&](int i) CTXOPS_INLINE_LAMBDA {
          const V g = gate[i].vector[v], x = get(at(block.x, i, c, v), count);
          put_result(at(block.y, i, c, v), x + g * g * x + (1 - g) * received, count);
        });
      });
    });
  }

  void backward() const {
    if (!one_size_) {
      for_blocks([&](const Block& block, int64_t) {
        OfPositions gate[kMaxTensors];
        fetch_ahead(block, block.dy);
        load_gates(block, gate);
        for_vectors(block, [&](int64_t c, int64_t v, auto count) CTXOPS_INLINE_LAMBDA {
          put(in_sums(p_.grad_sums, block, c, v), sum_grads(block, gate, c, v, count), count);
        });
      });
      gather_sent();
    }
    for_blocks([&](const Block& block, int64_t part) {
      OfPositions gate[kMaxTensors], grad_gate[kMaxTensors];
      Taps taps[kMaxTensors];
      fetch_ahead(block, block.x);
      fetch_ahead(block, block.dy);
      load_gates(block, gate);
      make_taps(block, taps);
      backward_of_gates(block, gate, taps, grad_gate);
      backward_of_features(block, part, gate, grad_gate);
    });
  }

 private:
  int64_t bytes_of_results() const {
    int64_t elements = 0;
    for (int l = 0; l < p_.levels.count; ++l) elements += element_count(p_.features.value[l]);
    return elements * static_cast<int64_t>(sizeof(A));
  }

  // f(block, number of its first part) for all blocks of all groups. The blocks of a part are
  // visited in their order by one thread.
  template <typename F>
  void for_blocks(const F& f) const {
    constexpr int64_t kItem = kBlock > kPart ? kBlock : kPart;
    const auto items_of_image = [](const Group& group) {
      return (group.height * group.width + kItem - 1) / kItem;
    };
    int64_t items = 0, elements = 0;
    for (int g = 0; g < p_.levels.groups; ++g) {
      const Group& group = p_.levels.group[g];
      items += p_.levels.batch * items_of_image(group);
      elements += p_.levels.batch * C_ * group.height * group.width * group.count;
    }
    parallel_for(items, elements, p_.threads, [&](int64_t item) {
      const Group* group = p_.levels.group;
      while (item >= p_.levels.batch * items_of_image(*group)) {
        item -= p_.levels.batch * items_of_image(*group);
        ++group;
      }
      const int64_t b = item / items_of_image(*group),
                    first = item % items_of_image(*group) * kItem;
      const int64_t part = b * parts_of_image(*group) + first / kPart;
      const int64_t end = smaller(first + kItem, group->height * group->width);
      for (int64_t n = first; n < end; n += kBlock) {
        Block block{group, b, n, smaller(kBlock, end - n), {}, {}, {}, {}};
        block.x = in_maps(p_.features, block);
        block.y = in_maps(p_.outputs, block);
        block.dy = in_maps(p_.grads, block);
        block.dx = in_maps(p_.grad_features, block);
        f(block, part);
      }
      stream_fence();
    });
  }

  // Fetches the position a page behind the block's. Planes are long enough to look ahead in them.
  CTXOPS_INLINE void fetch_ahead(const Block& block, const Maps& maps) const {
    constexpr int64_t kPage = 4096 / sizeof(A);
    if constexpr (kChannelsInner) {
      for_levels(block, [&](int i) { fetch(maps.first[i] + kPage, C_); });
    }
  }

  // f(channel, which of the positions' vectors, lanes in use) for all vectors of a block.
  template <typename F>
  void for_vectors(const Block& block, const F& f) const {
    if constexpr (kChannelsInner) {
      int64_t c = 0;
      for (; c + kLanes<A> <= C_; c += kLanes<A>) f(c, 0, Whole{});
      if (c < C_) f(c, 0, C_ - c);
    } else {
      const int64_t whole = block.count / kLanes<A>, rest = block.count % kLanes<A>;
      for (int64_t c = 0; c < C_; ++c) {
        for (int64_t v = 0; v < whole; ++v) f(c, v, Whole{});
        if (rest > 0) f(c, whole, rest);
      }
    }
  }

  // f(i) for the levels of the block's group, in their order.
  template <typename F>
  static CTXOPS_INLINE void for_levels(const Block& block, const F& f) {
    for (int i = 0; i < block.group->count; ++i) f(i);
  }

  // f(group, slot) for the groups of other sizes.
  template <typename F>
  CTXOPS_INLINE void for_others(const Group& group, const F& f) const {
    for (int g = 0; g < p_.levels.groups; ++g) {
      if (p_.levels.group + g != &group) f(p_.levels.group[g], g);
    }
  }

  static CTXOPS_INLINE V get(const A* from, Whole) { return load_vector<A>(from); }
  static V get(const A* from, int64_t count) { return load_vector<A>(from, count); }
  static CTXOPS_INLINE void put(A* to, V vector, Whole) { store_vector<A>(to, vector); }
  static void put(A* to, V vector, int64_t count) { store_vector<A>(to, vector, count); }

  // Into a map that is larger than the caches: past them.
  CTXOPS_INLINE void put_result(A* to, V vector, Whole count) const {
    if (stream_ && is_aligned(to)) {
      stream_vector<A>(to, vector);
    } else {
      put(to, vector, count);
    }
  }
  void put_result(A* to, V vector, int64_t count) const { put(to, vector, count); }

  static Maps in_maps(const TensorList& maps, const Block& block) {
    Maps result;
    const int64_t h = block.position / block.group->width, w = block.position % block.group->width;
    for (int i = 0; i < (maps.count > 0 ? block.group->count : 0); ++i) {
      const TensorView& map = maps.value[block.group->level[i]];
      result.first[i] = static_cast<A*>(map.data) + block.b * map.stride[0] +
                        (kChannelsInner ? h * map.stride[2] + w * map.stride[3] : block.position);
      result.channel[i] = map.stride[1];
    }
    return result;
  }

  static CTXOPS_INLINE A* at(const Maps& maps, int i, int64_t c, int64_t v) {
    return maps.first[i] + (kChannelsInner ? c : c * maps.channel[i] + v * kLanes<A>);
  }

  A* in_sums(void* sums, const Group& group, int64_t b, int64_t position, int64_t c) const {
    const int64_t N = group.height * group.width;
    return static_cast<A*>(sums) + group.sums +
           (kChannelsInner ? (b * N + position) * C_ + c : (b * C_ + c) * N + position);
  }
  A* in_sums(void* sums, const Block& block, int64_t c, int64_t v) const {
    return in_sums(sums, *block.group, block.b, block.position + v * kLanes<A>, c);
  }

  A* in_gates(void* gates, int i, const Block& block) const {
    const int64_t N = block.group->height * block.group->width;
    const int64_t first = p_.levels.gates[block.group->level[i]];
    return static_cast<A*>(gates) + first + block.b * N + block.position;
  }

  // A number for every position of the block -> for every lane of its vectors.
  static void spread(const A* from, const Block& block, OfPositions* to) {
    if constexpr (kChannelsInner) {
      to->vector[0] = V{} + from[0];
    } else {
      A lanes[kBlock] = {};
      memcpy(lanes, from, block.count * sizeof(A));
      for (int64_t v = 0; v < kVectors; ++v) to->vector[v] = load_vector<A>(lanes + v * kLanes<A>);
    }
  }

  // What the lanes of the vectors have added up -> a sum for every position of the block.
  static void collect(const OfPositions& from, A* to) {
    if constexpr (kChannelsInner) {
      *to = sum_of_lanes(from.vector[0]);
    } else {
      for (int64_t v = 0; v < kVectors; ++v) store_vector<A>(to + v * kLanes<A>, from.vector[v]);
    }
  }

  static CTXOPS_INLINE A sum_of_lanes(V v) {
    return reduce_lanes<1, A>(v, [](V a, V b) { return a + b; })[0];
  }

  // w_l of a vector.
  template <typename Count>
  CTXOPS_INLINE V weight_of(const Block& block, int i, int64_t c, Count count) const {
    const A* weight = static_cast<const A*>(p_.weight) + block.group->level[i] * C_ + c;
    if constexpr (kChannelsInner) return get(weight, count);
    return V{} + *weight;
  }

  void load_gates(const Block& block, OfPositions* gate) const {
    for_levels(block, [&](int i) { spread(in_gates(p_.gates, i, block), block, gate + i); });
  }

  void make_gates(const Block& block, OfPositions* gate) const {
    if (p_.weight == nullptr) return load_gates(block, gate);
    for_levels(block, [&](int i) {
      OfPositions sum = {};
      for_vectors(block, [&](int64_t c, int64_t v, auto count) CTXOPS_INLINE_LAMBDA {
        sum.vector[v] += weight_of(block, i, c, count) * get(at(block.x, i, c, v), count);
      });
      const A bias = p_.bias == nullptr ? 0 : static_cast<const A*>(p_.bias)[block.group->level[i]];
      A value[kBlock];
      collect(sum, value);
      for (int64_t k = 0; k < block.count; ++k) value[k] = sigmoid(value[k] + bias);
      spread(value, block, gate + i);
      if (p_.gates != nullptr) memcpy(in_gates(p_.gates, i, block), value, block.count * sizeof(A));
    });
  }

  void make_taps(const Block& block, Taps* taps) const {
    for_others(*block.group, [&](const Group& other, int slot) {
      const auto rows = make_resize_axis(other.height, block.group->height, p_.align_corners);
      const auto columns = make_resize_axis(other.width, block.group->width, p_.align_corners);
      taps[slot].down = other.height > 1 ? other.width : 0;
      taps[slot].right = other.width > 1 ? 1 : 0;
      for (int64_t k = 0; k < block.count; ++k) {
        const int64_t n = block.position + k;
        const Tap row = inner(tap_at(rows, n / block.group->width));
        const Tap column = inner(tap_at(columns, n % block.group->width));
        taps[slot].first[k] = row.low * other.width + column.low;
        taps[slot].below[k] = static_cast<A>(row.weight);
        taps[slot].beside[k] = static_cast<A>(column.weight);
      }
    });
  }

  // The same tap with high behind low, where there are two positions.
  static Tap inner(const Tap& tap) {
    return tap.low == tap.high && tap.low > 0 ? Tap{tap.low - 1, tap.low, 1} : tap;
  }

  // S: what the levels of the group send.
  template <typename Count>
  CTXOPS_INLINE V sum_sent(const Block& block, const OfPositions* gate, int64_t c, int64_t v,
                           Count count) const {
    V sum = {};
    for_levels(block, [&](int i) CTXOPS_INLINE_LAMBDA {
      sum += gate[i].vector[v] * get(at(block.x, i, c, v), count);
    });
    return sum;
  }

  // T: the group's own S, and all others resized.
  template <typename Count>
  V sum_resized(const Block& block, const Taps* taps, int64_t c, int64_t v, Count count) const {
    V sum = get(in_sums(p_.sums, block, c, v), count);
    for_others(*block.group, [&](const Group& other, int slot) {
      const Taps& tap = taps[slot];
      const A* from = in_sums(p_.sums, other, block.b, 0, c);
      if constexpr (kChannelsInner) {
        const A* corner = from + tap.first[0] * C_;
        const A below = tap.below[0], beside = tap.beside[0];
        const int64_t down = tap.down * C_, right = tap.right * C_;
        const V top = (1 - beside) * get(corner, count) + beside * get(corner + right, count);
        const V bottom =
            (1 - beside) * get(corner + down, count) + beside * get(corner + down + right, count);
        sum += (1 - below) * top + below * bottom;
      } else {
        for (int64_t k = 0; k < count; ++k) {
          const int64_t n = v * kLanes<A> + k;
          const A* corner = from + tap.first[n];
          const A below = tap.below[n], beside = tap.beside[n];
          const A top = (1 - beside) * corner[0] + beside * corner[tap.right];
          const A bottom = (1 - beside) * corner[tap.down] + beside * corner[tap.down + tap.right];
          sum[k] += (1 - below) * top + below * bottom;
        }
      }
    });
    return sum;
  }

  // dT: the gradient of what the group receives.
  template <typename Count>
  CTXOPS_INLINE V sum_grads(const Block& block, const OfPositions* gate, int64_t c, int64_t v,
                            Count count) const {
    V sum = {};
    for_levels(block, [&](int i) CTXOPS_INLINE_LAMBDA {
      sum += (1 - gate[i].vector[v]) * get(at(block.dy, i, c, v), count);
    });
    return sum;
  }

  // dS of a vector.
  template <typename Count>
  CTXOPS_INLINE V grad_sent(const Block& block, const OfPositions* gate, int64_t c, int64_t v,
                            Count count) const {
    if (one_size_) return sum_grads(block, gate, c, v, count);
    return get(in_sums(p_.grad_sent, block, c, v), count);
  }

  // dgate, or with weight dz: in memory and in vectors.
  void backward_of_gates(const Block& block, const OfPositions* gate, const Taps* taps,
                         OfPositions* grad_gate) const {
    for_levels(block, [&](int i) { grad_gate[i] = {}; });
    for_vectors(block, [&](int64_t c, int64_t v, auto count) CTXOPS_INLINE_LAMBDA {
      const V received =
          one_size_ ? sum_sent(block, gate, c, v, count) : sum_resized(block, taps, c, v, count);
      const V sent = grad_sent(block, gate, c, v, count);
      for_levels(block, [&](int i) CTXOPS_INLINE_LAMBDA {
        const V x = get(at(block.x, i, c, v), count);
        const V dy = get(at(block.dy, i, c, v), count);
        grad_gate[i].vector[v] += (2 * gate[i].vector[v] * x - received) * dy + x * sent;
      });
    });
    for_levels(block, [&](int i) {
      A value[kBlock];
      collect(grad_gate[i], value);
      if (p_.weight != nullptr) {
        const A* g = in_gates(p_.gates, i, block);
        for (int64_t k = 0; k < block.count; ++k) value[k] *= g[k] * (1 - g[k]);
      }
      memcpy(in_gates(p_.grad_gates, i, block), value, block.count * sizeof(A));
      spread(value, block, grad_gate + i);
    });
  }

  void backward_of_features(const Block& block, int64_t part, const OfPositions* gate,
                            const OfPositions* grad_gate) const {
    if (p_.weight != nullptr && block.position % kPart == 0) clear_weight(block, part);
    const int64_t last = (block.count - 1) / kLanes<A>;
    V grad_weight[kMaxTensors];
    for_vectors(block, [&](int64_t c, int64_t v, auto count) CTXOPS_INLINE_LAMBDA {
      const V sent = grad_sent(block, gate, c, v, count);
      for_levels(block, [&](int i) CTXOPS_INLINE_LAMBDA {
        const V g = gate[i].vector[v], dy = get(at(block.dy, i, c, v), count);
        V dx = dy + g * g * dy + g * sent;
        if (p_.weight != nullptr) {
          const V dz = grad_gate[i].vector[v];
          dx += dz * weight_of(block, i, c, count);
          const V dw = dz * get(at(block.x, i, c, v), count);
          A* to = in_weight(block, i, part) + c;
          if constexpr (kChannelsInner) {
            put(to, get(to, count) + dw, count);
          } else {
            grad_weight[i] = v == 0 ? dw : grad_weight[i] + dw;
            if (v == last) *to = sum_of_lanes(grad_weight[i]);
          }
        }
        put_result(at(block.dx, i, c, v), dx, count);
      });
    });
  }

  // Sums start at zero: those of the block's parts, of which the first gets them all, and with the
  // first part of a level those that only larger levels have.
  void clear_weight(const Block& block, int64_t part) const {
    const int64_t own = p_.levels.batch * parts_of_image(*block.group);
    const int64_t count = (block.count + kPart - 1) / kPart;
    for_levels(block, [&](int i) {
      memset(in_weight(block, i, part), 0, count * C_ * sizeof(A));
      if (part == 0) memset(in_weight(block, i, own), 0, (p_.parts - own) * C_ * sizeof(A));
    });
  }

  A* in_weight(const Block& block, int i, int64_t part) const {
    return static_cast<A*>(p_.grad_weight) + (block.group->level[i] * p_.parts + part) * C_;
  }

  // What gather_sent adds up at a time, channels or positions.
  static constexpr int64_t kStrip = 64;

  // dS of all groups. Every row of a map collects what the rows of the other maps took from it.
  void gather_sent() const {
    int64_t items = 0;
    for (int g = 0; g < p_.levels.groups; ++g) {
      items += p_.levels.batch * p_.levels.group[g].height;
    }
    parallel_for(items, p_.levels.sums, p_.threads, [&](int64_t item) {
      const Group* group = p_.levels.group;
      while (item >= p_.levels.batch * group->height) {
        item -= p_.levels.batch * group->height;
        ++group;
      }
      const int64_t b = item / group->height, h = item % group->height;
      const int64_t row = h * group->width;
      for (int64_t c = 0; c < (kChannelsInner ? 1 : C_); ++c) {
        memcpy(in_sums(p_.grad_sent, *group, b, row, c), in_sums(p_.grad_sums, *group, b, row, c),
               group->width * (kChannelsInner ? C_ : 1) * sizeof(A));
      }
      for_others(*group, [&](const Group& target, int) {
        if constexpr (kChannelsInner) {
          gather_row_of_channels(*group, target, b, h);
        } else {
          gather_row_of_planes(*group, target, b, h);
        }
      });
    });
  }

  void gather_row_of_channels(const Group& group, const Group& target, int64_t b, int64_t h) const {
    const auto rows = make_resize_axis(group.height, target.height, p_.align_corners);
    const auto columns = make_resize_axis(group.width, target.width, p_.align_corners);
    const TargetRange range = targets_of(rows, h);
    for (int64_t w = 0; w < group.width; ++w) {
      const TargetRange inner = targets_of(columns, w);
      for (int64_t c = 0; c < C_; c += kStrip) {
        const int64_t count = smaller(kStrip, C_ - c);
        A* to = in_sums(p_.grad_sent, group, b, h * group.width + w, c);
        for (int64_t i = range.begin; i < range.end; ++i) {
          A line[kStrip] = {};  // a row's sum first: of thousands of targets, all sums stay short
          for (int64_t j = inner.begin; j < inner.end; ++j) {
            const A* from = in_sums(p_.grad_sums, target, b, i * target.width + j, c);
            add(line, from, static_cast<A>(share_of(tap_at(columns, j), w)), count);
          }
          add(to, line, static_cast<A>(share_of(tap_at(rows, i), h)), count);
        }
      }
    }
  }

  void gather_row_of_planes(const Group& group, const Group& target, int64_t b, int64_t h) const {
    const auto rows = make_resize_axis(group.height, target.height, p_.align_corners);
    const auto columns = make_resize_axis(group.width, target.width, p_.align_corners);
    const TargetRange range = targets_of(rows, h);
    for (int64_t first = 0; first < target.width; first += kStrip) {
      const int64_t count = smaller(kStrip, target.width - first);
      Tap tap[kStrip];
      for (int64_t k = 0; k < count; ++k) tap[k] = tap_at(columns, first + k);
      for (int64_t c = 0; c < C_; ++c) {
        A line[kStrip] = {};
        for (int64_t i = range.begin; i < range.end; ++i) {
          add(line, in_sums(p_.grad_sums, target, b, i * target.width + first, c),
              static_cast<A>(share_of(tap_at(rows, i), h)), count);
        }
        A* to = in_sums(p_.grad_sent, group, b, h * group.width, c);
        for (int64_t k = 0; k < count; ++k) {
          const A weight = static_cast<A>(tap[k].weight);
          to[tap[k].low] += (1 - weight) * line[k];
          to[tap[k].high] += weight * line[k];
        }
      }
    }
  }

  const Problem& p_;
  const int64_t C_;
  const bool one_size_;
  const bool stream_;
};

inline void* data_of(const TensorView& view) {
  return element_count(view) > 0 ? view.data : nullptr;
}

Problem problem_of(const GatedFusionForward& params, Threads threads) {
  Problem p{};
  p.levels = make_levels(params.features);
  p.features = params.features;
  p.outputs = params.outputs;
  p.gates = data_of(params.gates);
  p.weight = data_of(params.weight);
  p.bias = data_of(params.bias);
  p.sums = data_of(params.sums);
  p.align_corners = params.align_corners;
  p.threads = threads;
  return p;
}

Problem problem_of(const GatedFusionBackward& params, Threads threads) {
  Problem p{};
  p.levels = make_levels(params.features);
  p.features = params.features;
  p.grads = params.grads;
  p.grad_features = params.grad_features;
  p.gates = data_of(params.gates);
  p.weight = data_of(params.weight);
  p.sums = data_of(params.sums);
  p.grad_sums = data_of(params.grad_sums);
  p.grad_sent = data_of(params.grad_sent);
  p.grad_gates = data_of(params.grad_gates);
  p.grad_weight = data_of(params.grad_weight);
  if (p.weight != nullptr) p.parts = params.grad_weight.size[1];
  p.align_corners = params.align_corners;
  p.threads = threads;
  return p;
}

// f(Fusion of the dtype and the layout of the levels)
template <typename Params, typename F>
const char* with_fusion(const Params& params, Threads threads, const F& f) {
  return dispatch(params, [&](auto tag) -> const char* {
    using A = typename decltype(tag)::type;
    if constexpr (std::is_floating_point_v<A>) {
      const Problem problem = problem_of(params, threads);
      if (problem.levels.channels_inner) {
        f(Fusion<A, true>(problem));
      } else {
        f(Fusion<A, false>(problem));
      }
      return nullptr;
    }
    return "on the CPU the maps must be float32 or float64";
  });
}

}  // namespace

const char* gated_fusion_forward(const GatedFusionForward& params, Threads threads) {
  return with_fusion(params, threads, [](const auto& fusion) { fusion.forward(); });
}

const char* gated_fusion_backward(const GatedFusionBackward& params, Threads threads) {
  return with_fusion(params, threads, [](const auto& fusion) { fusion.backward(); });
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops

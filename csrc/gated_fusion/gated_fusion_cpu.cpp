// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"
#include "gated_fusion/gated_fusion.h"

namespace ctxops {
namespace CTXOPS_ISA {
namespace {

// A block is what is computed together while it lies in cache: one position with all its channels
// where those lie side by side, else kStrip positions of every channel. It is walked in strips of
// kStrip neighbouring elements: channels of the position, or positions of a channel.
constexpr int64_t kStrip = 64;

struct Problem {
  Levels levels;
  TensorList features, outputs, grads, grad_features;
  // Without elements: nullptr.
  void *gates, *weight, *bias, *sums, *grad_sums, *grad_sent, *grad_gates, *grad_weight;
  int64_t parts;  // P
  bool align_corners;
  int64_t threads;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline double exp_of(double x) { return __builtin_exp(x); }
inline float exp_of(float x) { return __builtin_expf(x); }

// Without overflow: of large |z| the exponential vanishes.
template <typename A>
A sigmoid(A z) {
  const A e = exp_of(z < 0 ? z : -z);
  return z < 0 ? e / (1 + e) : 1 / (1 + e);
}

// One number for every element of a strip.
template <typename A>
struct Strip {
  A value[kStrip];
};

template <typename A>
void clear(Strip<A>* strip) {
  for (int64_t k = 0; k < kStrip; ++k) strip->value[k] = 0;
}

template <typename A>
void add(A* __restrict to, const A* __restrict from, A factor, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] += factor * from[k];
}

template <typename T, bool kChannelsInner>
class Fusion {
  using A = Accumulator<T>;

  // Up to kPart positions of an image of a group: an item of the parallel loop.
  struct Part {
    const Group* group;
    int64_t b, begin, end;
    int64_t number;  // among the group's parts
  };

  struct Block {
    const Group* group;
    int64_t b, h, w;
    int64_t position, count;  // h * W + w of the first position, and how many they are
  };

  // The four positions of another group's map that a position is made of, and their shares; one
  // entry for every position of a block.
  static constexpr int64_t kBlock = kChannelsInner ? 1 : kStrip;
  struct Taps {
    int64_t at[4][kBlock];
    A share[4][kBlock];
  };

 public:
  explicit Fusion(const Problem& problem)
      : p_(problem), C_(problem.levels.channels), one_size_(problem.levels.groups == 1) {}

  void forward() const {
    if (!one_size_) {
      for_blocks([&](const Block& block, int64_t) {
        Strip<A> gate[kMaxTensors];
        make_gates(block, gate);
        for_strips(block, [&](int64_t c, int64_t count) {
          Strip<A> sum;
          sum_sent(block, gate, c, count, &sum);
          memcpy(in_sums(p_.sums, block, c), sum.value, count * sizeof(A));
        });
      });
    }
    for_blocks([&](const Block& block, int64_t) {
      Strip<A> gate[kMaxTensors];
      Taps taps[kMaxTensors];
      if (one_size_) {
        make_gates(block, gate);
      } else {
        load_gates(block, gate);
        make_taps(block, taps);
      }
      for_strips(block, [&](int64_t c, int64_t count) {
        Strip<A> received;
        sum_received(block, gate, taps, c, count, &received);
        for_levels(block, [&](int l) {
          const T* __restrict x = in_map(p_.features, l, block, c);
          T* __restrict y = in_map(p_.outputs, l, block, c);
          const A* __restrict g = gate[l].value;
          for (int64_t k = 0; k < count; ++k) {
            store(y + k, (1 + g[k] * g[k]) * load(x[k]) + (1 - g[k]) * received.value[k]);
          }
        });
      });
    });
  }

  void backward() const {
    if (!one_size_) {
      for_blocks([&](const Block& block, int64_t) {
        Strip<A> gate[kMaxTensors];
        load_gates(block, gate);
        for_strips(block, [&](int64_t c, int64_t count) {
          Strip<A> sum;
          sum_grads(block, gate, c, count, &sum);
          memcpy(in_sums(p_.grad_sums, block, c), sum.value, count * sizeof(A));
        });
      });
      gather_sent();
    }
    for_blocks([&](const Block& block, int64_t part) {
      Strip<A> gate[kMaxTensors], grad_gate[kMaxTensors];
      Taps taps[kMaxTensors];
      load_gates(block, gate);
      make_taps(block, taps);
      backward_of_gates(block, gate, taps, grad_gate);
      backward_of_features(block, part, gate, grad_gate);
    });
  }

 private:
  // f(block, number of its part) for all blocks of all groups. The blocks of a part are visited in
  // their order by one thread.
  template <typename F>
  void for_blocks(const F& f) const {
    int64_t items = 0, elements = 0;
    for (int g = 0; g < p_.levels.groups; ++g) {
      const Group& group = p_.levels.group[g];
      items += p_.levels.batch * parts_of_image(group);
      elements += p_.levels.batch * C_ * group.height * group.width * group.count;
    }
    parallel_for(items, elements, p_.threads, [&](int64_t item) {
      const Group* group = p_.levels.group;
      while (item >= p_.levels.batch * parts_of_image(*group)) {
        item -= p_.levels.batch * parts_of_image(*group);
        ++group;
      }
      const int64_t parts = parts_of_image(*group), W = group->width;
      const int64_t begin = item % parts * kPart;
      const int64_t end = smaller(begin + kPart, group->height * W);
      for (int64_t n = begin; n < end; n += kBlock) {
        f(Block{group, item / parts, n / W, n % W, n, smaller(kBlock, end - n)}, item);
      }
    });
  }

  // f(channel, count) for the strips of a block.
  template <typename F>
  void for_strips(const Block& block, const F& f) const {
    for (int64_t c = 0; c < C_; c += kChannelsInner ? kStrip : 1) {
      f(c, kChannelsInner ? smaller(kStrip, C_ - c) : block.count);
    }
  }

  template <typename F>
  void for_levels(const Block& block, const F& f) const {
    for (int i = 0; i < block.group->count; ++i) f(block.group->level[i]);
  }

  // f(group, slot) for the groups of other sizes.
  template <typename F>
  void for_others(const Group& group, const F& f) const {
    for (int g = 0; g < p_.levels.groups; ++g) {
      if (p_.levels.group + g != &group) f(p_.levels.group[g], g);
    }
  }

  static T* in_map(const TensorList& maps, int l, const Block& block, int64_t c) {
    const TensorView& map = maps.value[l];
    const int64_t at = kChannelsInner ? block.h * map.stride[2] + block.w * map.stride[3] + c
                                      : block.position + c * map.stride[1];
    return static_cast<T*>(map.data) + block.b * map.stride[0] + at;
  }

  A* in_sums(void* sums, const Group& group, int64_t b, int64_t position, int64_t c) const {
    const int64_t N = group.height * group.width;
    return static_cast<A*>(sums) + group.sums +
           (kChannelsInner ? (b * N + position) * C_ + c : (b * C_ + c) * N + position);
  }
  A* in_sums(void* sums, const Block& block, int64_t c) const {
    return in_sums(sums, *block.group, block.b, block.position, c);
  }

  A* in_gates(void* gates, int l, const Block& block) const {
    const int64_t N = block.group->height * block.group->width;
    return static_cast<A*>(gates) + p_.levels.gates[l] + block.b * N + block.position;
  }

  // A number for every position of the block -> for every element of its strips.
  static void spread(const A* from, const Block& block, Strip<A>* to) {
    for (int64_t k = 0; k < (kChannelsInner ? kStrip : block.count); ++k) {
      to->value[k] = from[kChannelsInner ? 0 : k];
    }
  }

  // The sums that the elements of strips have added up -> a sum for every position of the block.
  static void collect(const Strip<A>& from, const Block& block, A* to) {
    if constexpr (kChannelsInner) {
      A sum = 0;
      for (int64_t k = 0; k < kStrip; ++k) sum += from.value[k];
      *to = sum;
    } else {
      memcpy(to, from.value, block.count * sizeof(A));
    }
  }

  void load_gates(const Block& block, Strip<A>* gate) const {
    for_levels(block, [&](int l) { spread(in_gates(p_.gates, l, block), block, gate + l); });
  }

  void make_gates(const Block& block, Strip<A>* gate) const {
    if (p_.weight == nullptr) return load_gates(block, gate);
    for_levels(block, [&](int l) {
      Strip<A> sum;
      clear(&sum);
      for_strips(block, [&](int64_t c, int64_t count) {
        const T* __restrict x = in_map(p_.features, l, block, c);
        const A* __restrict w = static_cast<const A*>(p_.weight) + l * C_ + c;
        for (int64_t k = 0; k < count; ++k) {
          sum.value[k] += w[kChannelsInner ? k : 0] * load(x[k]);
        }
      });
      const A bias = p_.bias == nullptr ? 0 : static_cast<const A*>(p_.bias)[l];
      A value[kBlock];
      collect(sum, block, value);
      for (int64_t k = 0; k < block.count; ++k) value[k] = sigmoid(value[k] + bias);
      spread(value, block, gate + l);
      if (p_.gates != nullptr) memcpy(in_gates(p_.gates, l, block), value, block.count * sizeof(A));
    });
  }

  void make_taps(const Block& block, Taps* taps) const {
    for_others(*block.group, [&](const Group& other, int slot) {
      const auto rows = make_resize_axis(other.height, block.group->height, p_.align_corners);
      const auto columns = make_resize_axis(other.width, block.group->width, p_.align_corners);
      for (int64_t k = 0; k < block.count; ++k) {
        const int64_t n = block.position + k;
        const Tap row = tap_at(rows, n / block.group->width);
        const Tap column = tap_at(columns, n % block.group->width);
        for (int t = 0; t < 4; ++t) {
          taps[slot].at[t][k] =
              (t < 2 ? row.low : row.high) * other.width + (t % 2 == 0 ? column.low : column.high);
          taps[slot].share[t][k] = static_cast<A>((t < 2 ? 1 - row.weight : row.weight) *
                                                  (t % 2 == 0 ? 1 - column.weight : column.weight));
        }
      }
    });
  }

  // S: what the levels of the group send.
  void sum_sent(const Block& block, const Strip<A>* gate, int64_t c, int64_t count,
                Strip<A>* sum) const {
    clear(sum);
    for_levels(block, [&](int l) {
      const T* __restrict x = in_map(p_.features, l, block, c);
      const A* __restrict g = gate[l].value;
      for (int64_t k = 0; k < count; ++k) sum->value[k] += g[k] * load(x[k]);
    });
  }

  // T: what all levels send to the group.
  void sum_received(const Block& block, const Strip<A>* gate, const Taps* taps, int64_t c,
                    int64_t count, Strip<A>* sum) const {
    if (one_size_) return sum_sent(block, gate, c, count, sum);
    memcpy(sum->value, in_sums(p_.sums, block, c), count * sizeof(A));
    for_others(*block.group, [&](const Group& other, int slot) {
      const A* __restrict from = in_sums(p_.sums, other, block.b, 0, c);
      for (int t = 0; t < 4; ++t) {
        const int64_t* __restrict at = taps[slot].at[t];
        const A* __restrict share = taps[slot].share[t];
        if constexpr (kChannelsInner) {
          add(sum->value, from + at[0] * C_, share[0], count);
        } else {
          for (int64_t k = 0; k < count; ++k) sum->value[k] += share[k] * from[at[k]];
        }
      }
    });
  }

  // dT: the gradient of what the group receives.
  void sum_grads(const Block& block, const Strip<A>* gate, int64_t c, int64_t count,
                 Strip<A>* sum) const {
    clear(sum);
    for_levels(block, [&](int l) {
      const T* __restrict dy = in_map(p_.grads, l, block, c);
      const A* __restrict g = gate[l].value;
      for (int64_t k = 0; k < count; ++k) sum->value[k] += (1 - g[k]) * load(dy[k]);
    });
  }

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
          Strip<A> line;  // a row's sum first: of thousands of targets every sum stays short
          clear(&line);
          for (int64_t j = inner.begin; j < inner.end; ++j) {
            const A* from = in_sums(p_.grad_sums, target, b, i * target.width + j, c);
            add(line.value, from, static_cast<A>(share_of(tap_at(columns, j), w)), count);
          }
          add(to, line.value, static_cast<A>(share_of(tap_at(rows, i), h)), count);
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
        Strip<A> line;
        clear(&line);
        for (int64_t i = range.begin; i < range.end; ++i) {
          add(line.value, in_sums(p_.grad_sums, target, b, i * target.width + first, c),
              static_cast<A>(share_of(tap_at(rows, i), h)), count);
        }
        A* to = in_sums(p_.grad_sent, group, b, h * group.width, c);
        for (int64_t k = 0; k < count; ++k) {
          const A weight = static_cast<A>(tap[k].weight);
          to[tap[k].low] += (1 - weight) * line.value[k];
          to[tap[k].high] += weight * line.value[k];
        }
      }
    }
  }

  // dS of a strip.
  void load_sent(const Block& block, const Strip<A>* gate, int64_t c, int64_t count,
                 Strip<A>* sent) const {
    if (one_size_) return sum_grads(block, gate, c, count, sent);
    memcpy(sent->value, in_sums(p_.grad_sent, block, c), count * sizeof(A));
  }

  // dgate, or with weight dz: in memory, and for every element of a strip.
  void backward_of_gates(const Block& block, const Strip<A>* gate, const Taps* taps,
                         Strip<A>* grad_gate) const {
    for_levels(block, [&](int l) { clear(grad_gate + l); });
    for_strips(block, [&](int64_t c, int64_t count) {
      Strip<A> received, sent;
      sum_received(block, gate, taps, c, count, &received);
      load_sent(block, gate, c, count, &sent);
      for_levels(block, [&](int l) {
        const T* __restrict x = in_map(p_.features, l, block, c);
        const T* __restrict dy = in_map(p_.grads, l, block, c);
        const A* __restrict g = gate[l].value;
        A* __restrict sum = grad_gate[l].value;
        for (int64_t k = 0; k < count; ++k) {
          sum[k] += (2 * g[k] * load(x[k]) - received.value[k]) * load(dy[k]) +
                    load(x[k]) * sent.value[k];
        }
      });
    });
    for_levels(block, [&](int l) {
      A value[kBlock];
      collect(grad_gate[l], block, value);
      if (p_.weight != nullptr) {
        const A* g = in_gates(p_.gates, l, block);
        for (int64_t k = 0; k < block.count; ++k) value[k] *= g[k] * (1 - g[k]);
      }
      memcpy(in_gates(p_.grad_gates, l, block), value, block.count * sizeof(A));
      spread(value, block, grad_gate + l);
    });
  }

  void backward_of_features(const Block& block, int64_t part, const Strip<A>* gate,
                            const Strip<A>* grad_gate) const {
    const bool first_of_part = block.position % kPart == 0;
    if (p_.weight != nullptr && first_of_part) {
      // The first part of a small level clears those that only larger levels have.
      const int64_t own = p_.levels.batch * parts_of_image(*block.group);
      for_levels(block, [&](int l) {
        memset(in_weight(l, part), 0, C_ * sizeof(A));
        if (part == 0) memset(in_weight(l, own), 0, (p_.parts - own) * C_ * sizeof(A));
      });
    }
    for_strips(block, [&](int64_t c, int64_t count) {
      Strip<A> sent;
      load_sent(block, gate, c, count, &sent);
      for_levels(block, [&](int l) {
        const T* __restrict dy = in_map(p_.grads, l, block, c);
        T* __restrict dx = in_map(p_.grad_features, l, block, c);
        const A* __restrict g = gate[l].value;
        if (p_.weight == nullptr) {
          for (int64_t k = 0; k < count; ++k) {
            store(dx + k, (1 + g[k] * g[k]) * load(dy[k]) + g[k] * sent.value[k]);
          }
          return;
        }
        const T* __restrict x = in_map(p_.features, l, block, c);
        const A* __restrict dz = grad_gate[l].value;
        const A* __restrict w = static_cast<const A*>(p_.weight) + l * C_ + c;
        for (int64_t k = 0; k < count; ++k) {
          store(dx + k, (1 + g[k] * g[k]) * load(dy[k]) + g[k] * sent.value[k] +
                            dz[k] * w[kChannelsInner ? k : 0]);
        }
        A* __restrict dw = in_weight(l, part) + c;
        if constexpr (kChannelsInner) {
          for (int64_t k = 0; k < count; ++k) dw[k] += dz[k] * load(x[k]);
        } else {
          *dw += dot(dz, x, count);
        }
      });
    });
  }

  A* in_weight(int l, int64_t part) const {
    return static_cast<A*>(p_.grad_weight) + (l * p_.parts + part) * C_;
  }

  // In so many running sums that they fit the widest vectors.
  static A dot(const A* __restrict a, const T* __restrict b, int64_t count) {
    constexpr int64_t kSums = 16;
    A sum[kSums] = {};
    int64_t k = 0;
    for (; k + kSums <= count; k += kSums) {
      for (int64_t i = 0; i < kSums; ++i) sum[i] += a[k + i] * load(b[k + i]);
    }
    for (; k < count; ++k) sum[0] += a[k] * load(b[k]);
    A total = 0;
    for (int64_t i = 0; i < kSums; ++i) total += sum[i];
    return total;
  }

  const Problem& p_;
  const int64_t C_;
  const bool one_size_;
};

inline void* data_of(const TensorView& view) {
  return element_count(view) > 0 ? view.data : nullptr;
}

// f(Fusion of the dtype and the layout of the levels)
template <typename F>
void with_fusion(const Problem& problem, const F& f) {
  dispatch_floating(problem.features.value[0].dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (problem.levels.channels_inner) return f(Fusion<T, true>(problem));
    return f(Fusion<T, false>(problem));
  });
}

}  // namespace

const char* gated_fusion_forward(const TensorList& features, const TensorView& gates,
                                 const TensorView& weight, const TensorView& bias,
                                 const TensorList& outputs, const TensorView& sums,
                                 bool align_corners, int64_t threads) {
  if (const char* error = check_forward(features, gates, weight, bias, outputs, sums)) return error;
  Problem p{};
  p.levels = make_levels(features);
  p.features = features;
  p.outputs = outputs;
  p.gates = data_of(gates);
  p.weight = data_of(weight);
  p.bias = data_of(bias);
  p.sums = data_of(sums);
  p.align_corners = align_corners;
  p.threads = threads;
  with_fusion(p, [](const auto& fusion) { fusion.forward(); });
  return nullptr;
}

const char* gated_fusion_backward(const TensorList& grads, const TensorList& features,
                                  const TensorView& gates, const TensorView& weight,
                                  const TensorView& sums, const TensorView& grad_sums,
                                  const TensorView& grad_sent, const TensorView& grad_gates,
                                  const TensorList& grad_features, const TensorView& grad_weight,
                                  bool align_corners, int64_t threads) {
  if (const char* error = check_backward(grads, features, gates, weight, sums, grad_sums, grad_sent,
                                         grad_gates, grad_features, grad_weight)) {
    return error;
  }
  Problem p{};
  p.levels = make_levels(features);
  p.features = features;
  p.grads = grads;
  p.grad_features = grad_features;
  p.gates = data_of(gates);
  p.weight = data_of(weight);
  p.sums = data_of(sums);
  p.grad_sums = data_of(grad_sums);
  p.grad_sent = data_of(grad_sent);
  p.grad_gates = data_of(grad_gates);
  p.grad_weight = data_of(grad_weight);
  if (p.weight != nullptr) p.parts = grad_weight.size[1];
  p.align_corners = align_corners;
  p.threads = threads;
  with_fusion(p, [](const auto& fusion) { fusion.backward(); });
  return nullptr;
}

}  // namespace CTXOPS_ISA
}  // namespace ctxops

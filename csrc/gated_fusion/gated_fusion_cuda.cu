// SPDX-License-Identifier: Apache-2.0
//
// The kernels are bound by memory. Of one size, a forward reads every map once and writes every
// output once, a backward reads features and gradients once: a team of threads takes a few
// positions with all their channels, makes the products that its gates (or their gradients) need,
// and then the outputs, for which it reads the positions a second time, out of the cache. The
// positions that a multiprocessor has in work at a time are few enough for that.
//
// Of several sizes, the sums of all groups are made first, then everything that needs the sums of
// other groups.
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "common/cuda.h"
#include "common/pack.h"
#include "common/warp.h"
#include "gated_fusion/gated_fusion.h"

namespace ctxops {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Of packs. A thread has a sum for every position of a planar one; with 8 channels in half
// precision it runs out of registers.
constexpr int kWidth = 4;

// Where channels lie side by side, a team is a warp: it has one position, or several where its
// lanes are more than the channels need; neighbouring lanes have neighbouring channels. Of planes,
// it is a block on the positions of 64 bytes: neighbouring threads have neighbouring positions of a
// channel. Peers are threads of a team with the same positions, each with its channels. A tile is
// what a block has in work between two barriers.
template <typename T_, int V_, bool kInner_, int kLevels_>
struct Shape {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int V = V_;              // neighbours in memory that a thread loads at once
  static constexpr bool kInner = kInner_;   // channels are inner
  static constexpr int kLevels = kLevels_;  // of a group, at most; loops over them are unrolled
  static constexpr int kTile = kInner ? kPart : 64 / static_cast<int>(sizeof(T));  // at most
  static constexpr int kOwn = kInner ? 1 : V;                  // positions of a thread
  static constexpr int kTeam = kInner ? kWarp : kThreads;      // threads
  static constexpr int kLanes = kInner ? 1 : kTile / V;        // from a peer to the next
  static constexpr int kPeers = kTeam / kLanes;                // at most
  static constexpr int64_t kStep = kPeers * (kInner ? V : 1);  // channels, all of fewer peers
  static_assert(kPart % kTile == 0, "a part is made of whole tiles");

  // Which of its positions element k of a thread's pack belongs to.
  __device__ static constexpr int own(int k) { return kInner ? 0 : k; }
};

struct Map {
  void* data;
  int64_t stride[4];  // B, C, H, W
};

// The items that blocks take: so many neighbouring positions of an image of a group.
struct Work {
  Levels levels;
  int peers;
  int at_once, tile;  // positions: of all teams of a block, of a tile
  int64_t positions;
  int64_t items[kMaxTensors];  // of an image of a group
  int64_t numbers;             // of the items of the group that has most
  bool align_corners;
};

struct Item {
  int group;
  int64_t b, begin, end;  // no positions: the group has fewer items
};

__device__ Item item_at(const Work& work, int group, int64_t number) {
  const int64_t items = work.items[group];
  const int64_t N = work.levels.group[group].height * work.levels.group[group].width;
  const int64_t b = number / items, begin = (number - b * items) * work.positions;
  if (b >= work.levels.batch) return {group, b, 0, 0};
  return {group, b, begin, begin + work.positions < N ? begin + work.positions : N};
}

// What the levels of a group send and receive; fuse is both, where there is one group.
enum class Step { fuse, send, receive };

struct Forward {
  Work work;
  Step step;
  bool keep;  // send (1 - gate) instead of gate: the sums of gradients
  Map from[kMaxTensors], to[kMaxTensors];
  void* gates;   // sum of N_l; nullptr: not wanted
  void* weight;  // (L, C); nullptr: the gates are given
  void* bias;    // (L,) or nullptr
  void* sums;    // of all groups
};

struct Backward {
  Work work;
  Map grads[kMaxTensors], features[kMaxTensors], grad_features[kMaxTensors];
  void* gates;        // sum of N_l
  void* weight;       // (L, C); nullptr: the gates were given
  void* sums;         // of all groups; nullptr: there is one
  void* grad_sent;    // likewise
  void* grad_gates;   // sum of N_l
  void* grad_weight;  // (L, numbers, C)
};

// One group's part of grad_sent.
struct Gather {
  Levels levels;
  int group;
  int teams;  // of threads that share the targets of a position
  ResizeAxis rows[kMaxTensors], columns[kMaxTensors];  // from this group to the others
  void* grad_sums;                                     // of all groups
  void* grad_sent;
};

// The four positions of another group's map that a position is made of, and their shares.
template <typename A>
struct Taps {
  int64_t at[4];
  A share[4];
};

// A thread and the positions that its team is at.
template <typename S>
struct Team {
  using T = typename S::T;
  using A = typename S::A;
  static constexpr int V = S::V;
  using Packs = Pack<T, V>[S::kLevels];
  using Products = A[S::kLevels][S::kOwn];

  const Work& work;
  A* partial;         // (warps of a team, levels, kTile), shared
  Taps<A>* taps;      // (groups, tile), shared
  int rank, channel;  // the thread's first
  int first, own;     // the position that the team starts at in a tile; the thread's in the team's

  int g;                    // of the group
  int64_t b, n, end, h, w;  // n: the thread's first position; end: of the item
  int64_t C, channels;      // all of them; none where the thread has no position
  int slot;                 // the place of that position in a tile

  __device__ Team(const Work& work, A* partial, Taps<A>* taps)
      : work(work), partial(partial), taps(taps), C(work.levels.channels) {
    const int thread = static_cast<int>(threadIdx.x);
    rank = thread % S::kTeam;
    first = S::kInner ? thread / kWarp * at_once() / kWarps : 0;
    channel = S::kInner ? rank % peers() * V : rank / S::kLanes;
    own = S::kInner ? rank * at_once() / kThreads : rank % S::kLanes * V;
  }

  __device__ int peers() const { return S::kInner ? work.peers : S::kPeers; }
  __device__ int peer() const { return S::kInner ? channel / V : channel; }
  __device__ int at_once() const { return S::kInner ? work.at_once : S::kTile; }
  __device__ int tile() const { return S::kInner ? work.tile : S::kTile; }

  __device__ void sync() const {
    if constexpr (S::kInner) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ void go_to(const Item& item, int64_t tile, int64_t position) {
    g = item.group;
    b = item.b;
    end = item.end;
    n = position + own;
    h = n / group().width;
    w = n - h * group().width;
    slot = static_cast<int>(n - tile);
    channels = n < end ? C : 0;
  }

  __device__ const Group& group() const { return work.levels.group[g]; }
  __device__ T* at(const Map& map, int64_t c) const {
    const int64_t offset =
        S::kInner ? h * map.stride[2] + w * map.stride[3] + c : n + c * map.stride[1];
    return static_cast<T*>(map.data) + b * map.stride[0] + offset;
  }
  __device__ A* in_sums(void* sums, const Group& of, int64_t position, int64_t c) const {
    const int64_t N = of.height * of.width;
    return static_cast<A*>(sums) + of.sums +
           (S::kInner ? (b * N + position) * C + c : (b * C + c) * N + position);
  }
  __device__ A* in_sums(void* sums, int64_t c) const { return in_sums(sums, group(), n, c); }

  __device__ void load(const Map* maps, int64_t c, Packs& x) const {
#pragma unroll
    for (int l = 0; l < S::kLevels; ++l) {
      if (l < group().count) x[l] = load_pack<V>(at(maps[group().level[l]], c));
    }
  }

  // f(level of the group, slot, place among the gates of all levels) for all levels and positions
  // of the team, each in one of its threads.
  template <typename F>
  __device__ void for_gates(const F& f) const {
    const int64_t N = group().height * group().width;
    for (int i = peer(); i < group().count * S::kOwn; i += peers()) {
      const int l = i / S::kOwn, k = i % S::kOwn;
      if (n + k < end) f(l, slot + k, work.levels.gates[group().level[l]] + b * N + n + k);
    }
  }

  // Adds up the products of the team; f(level, slot, place, sum) as above. All its threads call it.
  template <typename F>
  __device__ void collect(Products& products, const F& f) const {
    const int across = S::kInner ? peers() : kWarp;  // lanes among which a warp's peers are
    for (int lanes = S::kLanes; lanes < across; lanes *= 2) {
#pragma unroll
      for (int l = 0; l < S::kLevels; ++l) {  // absent ones as well: no branch between the shuffles
#pragma unroll
        for (int k = 0; k < S::kOwn; ++k) {
          products[l][k] += __shfl_xor_sync(kAllLanes, products[l][k], lanes);
        }
      }
    }
    if (rank % across < S::kLanes) {
#pragma unroll
      for (int l = 0; l < S::kLevels; ++l) {
#pragma unroll
        for (int k = 0; k < S::kOwn; ++k) {
          partial[(rank / kWarp * kMaxTensors + l) * S::kTile + slot + k] = products[l][k];
        }
      }
    }
    sync();
    for_gates([&](int l, int at, int64_t place) {
      A sum = 0;
      for (int i = 0; i < S::kTeam / kWarp; ++i) {
        sum += partial[(i * kMaxTensors + l) * S::kTile + at];
      }
      f(l, at, place, sum);
    });
    sync();
  }

  __device__ void make_taps() const {
    for (int i = peer(); i < work.levels.groups * S::kOwn; i += peers()) {
      const int o = i / S::kOwn, k = i % S::kOwn;
      const Group& other = work.levels.group[o];
      const int64_t position = n + k;
      if (o == g || position >= end) continue;
      const bool corners = work.align_corners;
      const Tap row =
          tap_at(make_resize_axis(other.height, group().height, corners), position / group().width);
      const Tap column =
          tap_at(make_resize_axis(other.width, group().width, corners), position % group().width);
      Taps<A>& tap = taps[o * tile() + slot + k];
      for (int t = 0; t < 4; ++t) {
        tap.at[t] =
            (t < 2 ? row.low : row.high) * other.width + (t % 2 == 0 ? column.low : column.high);
        tap.share[t] = static_cast<A>((t < 2 ? 1 - row.weight : row.weight) *
                                      (t % 2 == 0 ? 1 - column.weight : column.weight));
      }
    }
  }

  // T from the sums of all groups.
  __device__ Pack<A, V> receive(void* sums, int64_t c) const {
    Pack<A, V> sum = load_pack<V>(in_sums(sums, c));
#pragma unroll 1
    for (int o = 0; o < work.levels.groups; ++o) {
      const Group& other = work.levels.group[o];
      if (o == g) continue;
      const A* const from = in_sums(sums, other, 0, c);
      const Taps<A>* const tap = taps + o * tile() + slot;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if constexpr (S::kInner) {
          const Pack<A, V> x = load_pack<V>(from + tap->at[t] * C);
#pragma unroll
          for (int k = 0; k < V; ++k) sum.x[k] += tap->share[t] * x.x[k];
        } else {
#pragma unroll
          for (int k = 0; k < V; ++k) sum.x[k] += tap[k].share[t] * from[tap[k].at[t]];
        }
      }
    }
    return sum;
  }

  // The sum of a group's maps, each times factor(level, k), k < V.
  template <typename F>
  __device__ Pack<A, V> sum(const Packs& maps, const F& factor) const {
    Pack<A, V> total = {};
#pragma unroll
    for (int l = 0; l < S::kLevels; ++l) {
      if (l >= group().count) break;
#pragma unroll
      for (int k = 0; k < V; ++k) total.x[k] += factor(l, k) * maps[l].value(k);
    }
    return total;
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kInner || S::V == 1 ? 3 : 2)
    forward_kernel(const __grid_constant__ Forward p) {
  using T = typename S::T;
  using A = typename S::A;
  constexpr int V = S::V;
  CTXOPS_SHARED(A, partial, S::kTeam / kWarp * kMaxTensors * S::kTile);
  CTXOPS_SHARED(A, gates, kMaxTensors * S::kTile);
  CTXOPS_DYNAMIC_SHARED(Taps<A>, taps);
  Team<S> me(p.work, partial, taps);
  A* const all_gates = static_cast<A*>(p.gates);
  const A* const weight = static_cast<const A*>(p.weight);
  const A* const bias = static_cast<const A*>(p.bias);
  const int64_t C = me.C;

  for (int64_t number = blockIdx.x; number < p.work.numbers; number += gridDim.x) {
    const Item item = item_at(p.work, blockIdx.y, number);
    for (int64_t n = item.begin + me.first; n < item.end; n += me.at_once()) {
      me.go_to(item, item.begin, n);
      const Group& group = p.work.levels.group[item.group];
      typename Team<S>::Packs x;
      if (weight) {
        typename Team<S>::Products products = {};
        for (int64_t c = me.channel; c < me.channels; c += S::kStep) {
          me.load(p.from, c, x);
#pragma unroll
          for (int l = 0; l < S::kLevels; ++l) {
            if (l >= group.count) break;
            const auto w = load_pack<S::kInner ? V : 1>(weight + group.level[l] * C + c);
#pragma unroll
            for (int k = 0; k < V; ++k) {
              products[l][S::own(k)] += w.x[S::kInner ? k : 0] * x[l].value(k);
            }
          }
        }
        me.collect(products, [&](int l, int slot, int64_t place, A sum) {
          const A gate = sigmoid(bias ? sum + bias[group.level[l]] : sum);
          gates[l * S::kTile + slot] = gate;
          if (all_gates) all_gates[place] = gate;
        });
      } else {
        me.for_gates(
            [&](int l, int slot, int64_t place) { gates[l * S::kTile + slot] = all_gates[place]; });
        if (p.step == Step::receive) me.make_taps();
        me.sync();
      }

      const auto gate = [&](int l, int k) { return gates[l * S::kTile + me.slot + S::own(k)]; };
      for (int64_t c = me.channel; c < me.channels; c += S::kStep) {
        me.load(p.from, c, x);
        const Pack<A, V> sum =
            p.step == Step::receive
                ? me.receive(p.sums, c)
                : me.sum(x, [&](int l, int k) { return p.keep ? 1 - gate(l, k) : gate(l, k); });
        if (p.step == Step::send) {
          store_pack(me.in_sums(p.sums, c), sum);
          continue;
        }
#pragma unroll
        for (int l = 0; l < S::kLevels; ++l) {
          if (l >= group.count) break;
          Pack<T, V> y;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const A g = gate(l, k);
            store(&y.x[k], (1 + g * g) * x[l].value(k) + (1 - g) * sum.x[k]);
          }
          store_pack(me.at(p.to[group.level[l]], c), y);
        }
      }
      me.sync();
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kLevels <= 4 ? 2 : 1)
    backward_kernel(const __grid_constant__ Backward p) {
  using T = typename S::T;
  using A = typename S::A;
  constexpr int V = S::V;
  CTXOPS_SHARED(A, partial, S::kTeam / kWarp * kMaxTensors * S::kTile);
  CTXOPS_SHARED(A, gates, kMaxTensors * S::kTile);
  CTXOPS_SHARED(A, grad_gates, kMaxTensors * S::kTile);
  CTXOPS_DYNAMIC_SHARED(Taps<A>, taps);
  Team<S> me(p.work, partial, taps);
  const A* const all_gates = static_cast<const A*>(p.gates);
  A* const all_grad_gates = static_cast<A*>(p.grad_gates);
  const A* const weight = static_cast<const A*>(p.weight);
  const int64_t C = me.C;

  const auto gate = [&](int l, int k) { return gates[l * S::kTile + me.slot + S::own(k)]; };
  const auto grad_gate = [&](int l, int k) {
    return grad_gates[l * S::kTile + me.slot + S::own(k)];
  };
  // dS of a pack.
  const auto sent = [&](const typename Team<S>::Packs& dy, int64_t c) {
    if (p.grad_sent) return load_pack<V>(me.in_sums(p.grad_sent, c));
    return me.sum(dy, [&](int l, int k) { return 1 - gate(l, k); });
  };

  for (int64_t number = blockIdx.x; number < p.work.numbers; number += gridDim.x) {
    const Item item = item_at(p.work, blockIdx.y, number);
    const Group& group = p.work.levels.group[item.group];
    // The item's sums for a level of the group, (C,).
    const auto in_weight = [&](int l) {
      return static_cast<A*>(p.grad_weight) + (group.level[l] * p.work.numbers + number) * C;
    };
    if (weight && item.begin == item.end) {
      for (int l = 0; l < group.count; ++l) {
        for (int64_t c = threadIdx.x; c < C; c += kThreads) in_weight(l)[c] = 0;
      }
    }

    for (int64_t tile = item.begin; tile < item.end; tile += me.tile()) {
      const int64_t tile_end = tile + me.tile() < item.end ? tile + me.tile() : item.end;
      for (int64_t n = tile + me.first; n < tile_end; n += me.at_once()) {
        me.go_to(item, tile, n);
        me.for_gates(
            [&](int l, int slot, int64_t place) { gates[l * S::kTile + slot] = all_gates[place]; });
        if (p.sums) me.make_taps();
        me.sync();

        typename Team<S>::Packs x, dy;
        typename Team<S>::Products products = {};
        for (int64_t c = me.channel; c < me.channels; c += S::kStep) {
          Pack<A, V> t;
          if (p.sums) t = me.receive(p.sums, c);  // while no maps fill the registers
          me.load(p.features, c, x);
          if (!p.sums) t = me.sum(x, gate);
          me.load(p.grads, c, dy);
          const Pack<A, V> ds = sent(dy, c);
#pragma unroll
          for (int l = 0; l < S::kLevels; ++l) {
            if (l >= group.count) break;
            Pack<T, V> dx;
#pragma unroll
            for (int k = 0; k < V; ++k) {
              const A g = gate(l, k), xk = x[l].value(k), dyk = dy[l].value(k);
              products[l][S::own(k)] += (2 * g * xk - t.x[k]) * dyk + xk * ds.x[k];
              store(&dx.x[k], (1 + g * g) * dyk + g * ds.x[k]);
            }
            if (!weight) store_pack(me.at(p.grad_features[group.level[l]], c), dx);
          }
        }
        me.collect(products, [&](int l, int slot, int64_t place, A sum) {
          const A g = gates[l * S::kTile + slot];
          if (weight) sum *= g * (1 - g);
          grad_gates[l * S::kTile + slot] = sum;
          all_grad_gates[place] = sum;
        });
        if (!weight) continue;

        // All lanes of a warp stay together: where they have positions, they add up over them.
        for (int64_t first = 0; first < C; first += S::kStep) {
          const int64_t c = first + me.channel;
          const bool valid = c < me.channels;
          Pack<A, V> ds;
          if (valid) {
            me.load(p.grads, c, dy);
            if constexpr (!S::kInner) me.load(p.features, c, x);
            ds = sent(dy, c);
          }
#pragma unroll
          for (int l = 0; l < S::kLevels; ++l) {
            if (l >= group.count) break;
            A dw = 0;
            if (valid) {
              const auto w = load_pack<S::kInner ? V : 1>(weight + group.level[l] * C + c);
              Pack<T, V> dx;
#pragma unroll
              for (int k = 0; k < V; ++k) {
                const A g = gate(l, k), dz = grad_gate(l, k);
                store(&dx.x[k],
                      (1 + g * g) * dy[l].value(k) + g * ds.x[k] + dz * w.x[S::kInner ? k : 0]);
                if constexpr (!S::kInner) dw += dz * x[l].value(k);
              }
              store_pack(me.at(p.grad_features[group.level[l]], c), dx);
            }
            if constexpr (!S::kInner) {
#pragma unroll
              for (int lanes = 1; lanes < S::kLanes; lanes *= 2) {
                dw += __shfl_xor_sync(kAllLanes, dw, lanes);
              }
              // Of all tiles of the item it is the same thread that comes here.
              if (me.own == 0 && c < C) {
                A* const to = in_weight(l) + c;
                *to = tile == item.begin ? dw : *to + dw;
              }
            }
          }
        }
        me.sync();
      }
      if constexpr (S::kInner) {
        // A thread for a pack of channels: it reads the tile's positions once more, while they are
        // in the cache.
        if (!weight) continue;
        __syncthreads();
        const int64_t packs = C / V;
        for (int64_t i = threadIdx.x; i < group.count * packs; i += kThreads) {
          const int l = static_cast<int>(i / packs);
          const int64_t c = i % packs * V;
          const Map& map = p.features[group.level[l]];
          A* const to = in_weight(l) + c;
          Pack<A, V> dw = {};
          if (tile > item.begin) dw = load_pack<V>(to);
          const int64_t h = tile / group.width;
          int64_t w = tile - h * group.width;
          const T* x = static_cast<const T*>(map.data) + item.b * map.stride[0] +
                       h * map.stride[2] + w * map.stride[3] + c;
          const int64_t to_next_row = map.stride[2] - (group.width - 1) * map.stride[3];
#pragma unroll 8
          for (int n = 0; n < tile_end - tile; ++n) {
            const Pack<T, V> pack = load_pack<V>(x);
            const A dz = grad_gates[l * S::kTile + n];
#pragma unroll
            for (int k = 0; k < V; ++k) dw.x[k] += dz * pack.value(k);
            const bool row_ends = ++w == group.width;
            x += row_ends ? to_next_row : map.stride[3];
            w = row_ends ? 0 : w;
          }
          store_pack(to, dw);
        }
        __syncthreads();
      }
    }
  }
}

// A thread adds at most so many floats one to the other; the sums of such runs are added in double.
constexpr int kRun = 16;
constexpr int kMaxTeams = kThreads / 2;

// dS of a group: of every position, its own dT and its shares in what other groups' positions
// received. A small map's positions may have very many of those.
template <typename A, int V, bool kInner>
__global__ void __launch_bounds__(kThreads, 2) gather_kernel(const __grid_constant__ Gather p) {
  CTXOPS_SHARED(double, partial, kThreads* V);
  const Group& group = p.levels.group[p.group];
  const int64_t C = p.levels.channels, W = group.width, N = group.height * W;
  const A* const grad_sums = static_cast<const A*>(p.grad_sums);
  // Neighbouring threads have neighbouring channels, or neighbouring targets.
  const int thread = static_cast<int>(threadIdx.x), packs = kThreads / p.teams;
  const int team = kInner ? thread / packs : thread % p.teams;
  const int pack = kInner ? thread % packs : thread / p.teams;
  // A warp has so many of a pack's teams, so many lanes apart, and adds up what they found: so many
  // pieces are left.
  const int in_warp =
      kInner ? (p.teams > kWarps ? p.teams / kWarps : 1) : (p.teams < kWarp ? p.teams : kWarp);
  const int apart = kInner ? packs : 1;
  const int pieces = p.teams / in_warp;

  const int64_t all_packs = p.levels.batch * C * N / V;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * packs; first < all_packs;
       first += static_cast<int64_t>(gridDim.x) * packs) {
    const bool valid = first + pack < all_packs;
    const int64_t element = (first + pack) * V;
    const int64_t n = kInner ? element / C % N : element % N;
    const int64_t c = kInner ? element % C : element / N % C;
    const int64_t b = element / C / N;
    const A* const own = grad_sums + group.sums + element;
    double total[V] = {};
    for (int o = 0; valid && o < p.levels.groups; ++o) {
      if (o == p.group) continue;
      const Group& target = p.levels.group[o];
      const int64_t M = target.height * target.width;
      const TargetRange rows = targets_of(p.rows[o], n / W);
      const TargetRange columns = targets_of(p.columns[o], n % W);
      const int64_t count = (rows.end - rows.begin) * (columns.end - columns.begin);
      if (count == 0) continue;
      const A* const from = grad_sums + target.sums + (kInner ? b * M * C + c : (b * C + c) * M);
      Walk walk(team, p.teams, static_cast<int>(columns.end - columns.begin));
      for (int64_t m = team; m < count;) {
        A run[V] = {};
#pragma unroll 4
        for (int r = 0; r < kRun && m < count; ++r, m += p.teams, walk.next()) {
          const int64_t i = rows.begin + walk.row(), j = columns.begin + walk.column();
          const A share = static_cast<A>(share_of(tap_at(p.rows[o], i), n / W) *
                                         share_of(tap_at(p.columns[o], j), n % W));
          const Pack<A, V> x = load_pack<V>(from + (i * target.width + j) * (kInner ? C : 1));
#pragma unroll
          for (int k = 0; k < V; ++k) run[k] += share * x.x[k];
        }
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] += run[k];
      }
    }
    for (int lanes = apart; lanes < apart * in_warp; lanes *= 2) {
#pragma unroll
      for (int k = 0; k < V; ++k) total[k] += __shfl_xor_sync(kAllLanes, total[k], lanes);
    }
    if (pieces > 1) {
      double* const found = partial + pack * V * pieces;
      if (team % in_warp == 0) {
#pragma unroll
        for (int k = 0; k < V; ++k) found[k * pieces + team / in_warp] = total[k];
      }
      __syncthreads();
      for (int i = 1; team == 0 && i < pieces; ++i) {
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] += found[k * pieces + i];
      }
      __syncthreads();
    }
    if (!valid || team > 0) continue;
    Pack<A, V> sum = load_pack<V>(own);
#pragma unroll
    for (int k = 0; k < V; ++k) sum.x[k] = static_cast<A>(sum.x[k] + total[k]);
    store_pack(static_cast<A*>(p.grad_sent) + group.sums + element, sum);
  }
}

void* data_of(const TensorView& view) { return element_count(view) > 0 ? view.data : nullptr; }

void set_maps(Map* maps, const TensorList& list) {
  for (int l = 0; l < list.count; ++l) {
    const TensorView& view = list.value[l];
    maps[l] = {view.data, {view.stride[0], view.stride[1], view.stride[2], view.stride[3]}};
  }
}

// Are there packs everywhere: in all maps, and in the buffers that are read along them?
template <typename T>
bool all_packs_fit(const Levels& levels, std::initializer_list<const TensorList*> lists,
                   std::initializer_list<const TensorView*> buffers) {
  bool fit = true;
  for (const TensorList* list : lists) {
    for (int l = 0; l < list->count; ++l) {
      fit = fit && packs_fit<T, kWidth>(list->value[l], levels.channels_inner ? 1 : 3);
    }
  }
  for (const TensorView* buffer : buffers) {
    fit = fit && aligned(*buffer, kWidth * sizeof(Accumulator<T>));
  }
  return fit;
}

// f(Shape<...>{}). Packs are for up to four levels of one size: more are rare, and each kernel is
// compiled for four dtypes, two layouts and four architectures.
template <typename T, typename F>
const char* with_shape(const Levels& levels, bool packs, const F& f) {
  const bool inner = levels.channels_inner;
  if constexpr (sizeof(T) < 8) {
    int most = 0;
    for (int g = 0; g < levels.groups; ++g) {
      most = levels.group[g].count > most ? levels.group[g].count : most;
    }
    if (packs && most <= 4) {
      return inner ? f(Shape<T, kWidth, true, 4>{}) : f(Shape<T, kWidth, false, 4>{});
    }
  }
  return inner ? f(Shape<T, 1, true, 8>{}) : f(Shape<T, 1, false, 8>{});
}

// Items that are parts, or tiles: one block for each, and for each of the groups.
template <typename S>
dim3 divide(Work* work, bool parts) {
  work->peers = S::kInner ? lanes_on(work->levels.channels, S::V) : S::kPeers;
  work->at_once = kThreads / work->peers * S::kOwn;
  work->tile = 2 * work->at_once < S::kTile ? 2 * work->at_once : S::kTile;
  work->positions = parts ? kPart : work->tile;
  for (int g = 0; g < work->levels.groups; ++g) {
    const Group& group = work->levels.group[g];
    work->items[g] = divide_up(group.height * group.width, work->positions);
    const int64_t numbers = work->levels.batch * work->items[g];
    work->numbers = numbers > work->numbers ? numbers : work->numbers;
  }
  return dim3(grid_size(work->numbers), work->levels.groups);
}

template <typename S>
size_t taps_bytes(const Work& work) {
  using A = typename S::A;
  constexpr size_t most = sizeof(Taps<A>) + (S::kTeam / kWarp + 2) * sizeof(A);  // with the gates
  static_assert(kMaxTensors * S::kTile * most <= 48 * 1024, "shared memory of a block");
  const int groups = work.levels.groups;
  return groups == 1 ? 0 : groups * work.tile * sizeof(Taps<A>);
}

template <typename T>
const char* launch(Forward p, bool packs, cudaStream_t stream) {
  return with_shape<T>(p.work.levels, packs, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid = divide<S>(&p.work, false);
    return CTXOPS_LAUNCH((forward_kernel<S>), grid, kThreads, taps_bytes<S>(p.work), stream, p);
  });
}

template <typename T>
const char* launch(Backward p, bool packs, cudaStream_t stream) {
  return with_shape<T>(p.work.levels, packs, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid = divide<S>(&p.work, p.weight != nullptr);
    return CTXOPS_LAUNCH((backward_kernel<S>), grid, kThreads, taps_bytes<S>(p.work), stream, p);
  });
}

// dS of all groups from their dT.
template <typename A>
const char* gather(const Work& work, bool packs, void* grad_sums, void* grad_sent,
                   cudaStream_t stream) {
  Gather p{work.levels, 0, 1, {}, {}, grad_sums, grad_sent};
  for (p.group = 0; p.group < work.levels.groups; ++p.group) {
    const Group& group = work.levels.group[p.group];
    const int64_t N = group.height * group.width;
    int64_t targets = 0;  // of a position, about
    for (int o = 0; o < work.levels.groups; ++o) {
      const Group& other = work.levels.group[o];
      p.rows[o] = make_resize_axis(group.height, other.height, work.align_corners);
      p.columns[o] = make_resize_axis(group.width, other.width, work.align_corners);
      targets += other.height * other.width / N;
    }
    p.teams = 1;
    while (p.teams < kMaxTeams && p.teams * kRun < targets) p.teams *= 2;
    const auto run = [&](auto width, auto inner) {
      constexpr int V = decltype(width)::value;
      const int64_t count = work.levels.batch * work.levels.channels * N / V;
      return CTXOPS_LAUNCH((gather_kernel<A, V, decltype(inner)::value>),
                           grid_size(divide_up(count, kThreads / p.teams)), kThreads, 0, stream, p);
    };
    constexpr std::integral_constant<int, 1> one{};
    const char* error = nullptr;
    if (!work.levels.channels_inner) {
      error = run(one, std::false_type{});
    } else if (packs) {
      error = run(std::integral_constant<int, sizeof(A) < 8 ? kWidth : 1>{}, std::true_type{});
    } else {
      error = run(one, std::true_type{});
    }
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <typename T>
const char* forward(Forward p, bool packs, cudaStream_t stream) {
  if (p.work.levels.groups == 1) return launch<T>(p, packs, stream);
  p.step = Step::send;
  if (const char* error = launch<T>(p, packs, stream)) return error;
  p.step = Step::receive;
  p.weight = nullptr;  // the gates are made
  return launch<T>(p, packs, stream);
}

template <typename T>
const char* backward(const Backward& p, bool packs, void* grad_sums, cudaStream_t stream) {
  if (p.work.levels.groups > 1) {
    Forward sum{p.work, Step::send, true, {}, {}, p.gates, nullptr, nullptr, grad_sums};
    for (int l = 0; l < p.work.levels.count; ++l) sum.from[l] = p.grads[l];
    if (const char* error = launch<T>(sum, packs, stream)) return error;
    if (const char* error = gather<Accumulator<T>>(p.work, packs, grad_sums, p.grad_sent, stream)) {
      return error;
    }
  }
  return launch<T>(p, packs, stream);
}

}  // namespace

const char* gated_fusion_forward(const GatedFusionForward& params, Stream stream) {
  return dispatch(params, stream, [&](auto tag, cudaStream_t on) {
    using T = typename decltype(tag)::type;
    Forward p{};
    p.work.levels = make_levels(params.features);
    p.work.align_corners = params.align_corners;
    set_maps(p.from, params.features);
    set_maps(p.to, params.outputs);
    p.gates = data_of(params.gates);
    p.weight = data_of(params.weight);
    p.bias = data_of(params.bias);
    p.sums = data_of(params.sums);
    const bool packs = all_packs_fit<T>(p.work.levels, {&params.features, &params.outputs},
                                        {&params.weight, &params.sums});
    return forward<T>(p, packs, on);
  });
}

const char* gated_fusion_backward(const GatedFusionBackward& params, Stream stream) {
  return dispatch(params, stream, [&](auto tag, cudaStream_t on) {
    using T = typename decltype(tag)::type;
    Backward p{};
    p.work.levels = make_levels(params.features);
    p.work.align_corners = params.align_corners;
    set_maps(p.grads, params.grads);
    set_maps(p.features, params.features);
    set_maps(p.grad_features, params.grad_features);
    p.gates = data_of(params.gates);
    p.weight = data_of(params.weight);
    p.sums = data_of(params.sums);
    p.grad_sent = data_of(params.grad_sent);
    p.grad_gates = data_of(params.grad_gates);
    p.grad_weight = data_of(params.grad_weight);
    const bool packs = all_packs_fit<T>(
        p.work.levels, {&params.grads, &params.features, &params.grad_features},
        {&params.weight, &params.sums, &params.grad_sums, &params.grad_sent, &params.grad_weight});
    return backward<T>(p, packs, params.grad_sums.data, on);
  });
}

}  // namespace cuda
}  // namespace ctxops

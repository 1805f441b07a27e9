// SPDX-License-Identifier: Apache-2.0
// gated_fusion: L maps send what their gates let out, and take in what their gates leave room for.
//
//   gate_l  given, or sigmoid(<weight_l, x_l> + bias_l)
//   y_l     = (1 + gate_l) x_l + (1 - gate_l) * sum over i != l of resize(gate_i x_i)
//
// Levels of one size form a group. With S, the sum of a group's gate_i x_i, and T, the group's S
// plus all other groups' S resized bilinearly to its size,
//
//   y_l     = (1 + gate_l^2) x_l + (1 - gate_l) T,
//
// which takes nothing away again that was added before. The backward, with dT = the group's sum of
// (1 - gate_l) dy_l, and dS = dT plus all other groups' dT through the transposed resize:
//
//   dx_l    = (1 + gate_l^2) dy_l + gate_l dS + dz_l weight_l
//   dgate_l = <2 gate_l x_l - T, dy_l> + <x_l, dS>        dz_l = dgate_l gate_l (1 - gate_l)
//
//   L        levels, 2 ... 8                   B, C, H_l, W_l   the map of level l
//   N_l      B * H_l * W_l positions           accumulator      float, or double for double
//
// Maps are all channels-inner (unit stride along C) or all planar (H and W contiguous). Buffers of
// all levels or groups are flat, one after the other: gates (N_l) in (B, H, W) order; a group's
// sums in the order of the maps, (B, H, W, C) channels-inner or (B, C, H, W) planar. The groups
// come in the order of their first levels.
#pragma once

#include "common/bilinear.h"
#include "common/dtype.h"
#include "common/kernel.h"
#include "common/tensor.h"

CTXOPS_DECLARE_KERNEL(gated_fusion_forward, GatedFusionForward)
CTXOPS_DECLARE_KERNEL(gated_fusion_backward, GatedFusionBackward)

namespace ctxops {

struct GatedFusionForward {
  TensorList features;  // L maps
  TensorView gates;     // sum of N_l, accumulator. Without weight: given. With weight: the computed
                        // ones are written; without elements: not wanted, where all levels have
                        // one size
  TensorView weight;    // (L, C) accumulator, or without elements: the gates are given
  TensorView bias;      // (L,) accumulator, or without elements: none
  TensorList outputs;   // as features
  TensorView sums;      // the S of all groups, accumulator: written for the backward; without
                        // elements where all levels have one size
  bool align_corners;

  CTXOPS_MEMBERS(features, gates, weight, bias, outputs, sums, align_corners);
  CTXOPS_INLINE const TensorView& like() const { return features.value[0]; }
  CTXOPS_INLINE bool empty() const { return element_count(outputs.value[0]) == 0; }
  const char* check() const;
};

struct GatedFusionBackward {
  TensorList grads;          // the gradients of the outputs, as features
  TensorList features;       // as the forward took them
  TensorView gates;          // as the forward took and left them
  TensorView weight;         // likewise
  TensorView sums;           // likewise
  TensorView grad_sums;      // like sums, workspace: dT
  TensorView grad_sent;      // like sums, workspace: dS
  TensorView grad_gates;     // sum of N_l, accumulator: dgate, or with weight dz
  TensorList grad_features;  // as features
  TensorView grad_weight;    // (L, P, C) accumulator: sums of dz x over parts of the positions, to
                             // be added by the caller. P = max over l of B * ceil(H_l * W_l /
                             // kPart); without elements: no weight
  bool align_corners;

  CTXOPS_MEMBERS(grads, features, gates, weight, sums, grad_sums, grad_sent, grad_gates,
                 grad_features, grad_weight, align_corners);
  CTXOPS_INLINE const TensorView& like() const { return features.value[0]; }
  CTXOPS_INLINE bool empty() const { return element_count(grad_features.value[0]) == 0; }
  const char* check() const;
};

namespace {

// The positions that one item of the work covers, consecutive ones of one image.
constexpr int64_t kPart = 64;

// Without overflow: of large |z| the exponential vanishes.
template <typename A>
CTXOPS_HD A sigmoid(A z) {
  const A e = exponential(z < 0 ? z : -z);
  return (z < 0 ? e : 1) / (1 + e);
}

struct Group {
  int64_t height, width;
  int64_t sums;  // where its sums start, in elements
  int32_t count;
  int32_t level[kMaxTensors];
};

struct Levels {
  int32_t count, groups;
  int64_t batch, channels;
  bool channels_inner;
  int64_t gates[kMaxTensors + 1];  // where a level's gates start, in elements; the last: their end
  int64_t sums;                    // elements of all sums
  Group group[kMaxTensors];
};

inline Levels make_levels(const TensorList& maps) {
  Levels levels{};
  levels.count = maps.count;
  levels.batch = maps.value[0].size[0];
  levels.channels = maps.value[0].size[1];
  levels.channels_inner = true;
  for (int l = 0; l < maps.count; ++l) {
    const TensorView& map = maps.value[l];
    levels.channels_inner = levels.channels_inner && unit_stride(map, 1);
    levels.gates[l + 1] = levels.gates[l] + levels.batch * map.size[2] * map.size[3];
    int g = 0;
    while (g < levels.groups &&
           (levels.group[g].height != map.size[2] || levels.group[g].width != map.size[3])) {
      ++g;
    }
    Group& group = levels.group[g];
    if (g == levels.groups) {
      ++levels.groups;
      group = {map.size[2], map.size[3], levels.sums, 0, {}};
      levels.sums += element_count(map);
    }
    group.level[group.count++] = l;
  }
  return levels;
}

inline int64_t parts_of_image(const Group& group) {
  return (group.height * group.width + kPart - 1) / kPart;
}

inline bool planar(const TensorView& map) {
  return unit_stride(map, 3) && (map.size[2] <= 1 || map.stride[2] == map.size[3]);
}

inline const char* check_features(const TensorList& maps) {
  if (maps.count < 2) return "there must be at least two levels";
  bool channels_inner = true, all_planar = true;
  const TensorView& first = maps.value[0];
  for (int l = 0; l < maps.count; ++l) {
    const TensorView& map = maps.value[l];
    if (map.ndim != 4 || !is_floating(map.dtype)) return "a level must be a floating (B, C, H, W)";
    if (map.dtype != first.dtype || map.cuda_device != first.cuda_device) {
      return "levels must have one dtype and device";
    }
    if (map.size[0] != first.size[0] || map.size[1] != first.size[1]) {
      return "levels must have one batch and as many channels";
    }
    if (map.size[2] < 1 || map.size[3] < 1) return "levels must have H, W >= 1";
    channels_inner = channels_inner && unit_stride(map, 1);
    all_planar = all_planar && planar(map);
  }
  return channels_inner || all_planar ? nullptr : "levels must be all channels-inner or all planar";
}

inline bool same_maps(const TensorList& maps, const TensorList& features) {
  if (maps.count != features.count || check_features(maps) != nullptr) return false;
  const bool channels_inner = make_levels(features).channels_inner;
  for (int l = 0; l < maps.count; ++l) {
    const TensorView &map = maps.value[l], &feature = features.value[l];
    if (map.dtype != feature.dtype || map.cuda_device != feature.cuda_device) return false;
    for (int i = 0; i < 4; ++i) {
      if (map.size[i] != feature.size[i]) return false;
    }
    if (channels_inner ? !unit_stride(map, 1) : !planar(map)) return false;
  }
  return true;
}

inline const char* check_buffers(const TensorList& features, const TensorView& gates,
                                 const TensorView& weight, const TensorView& sums) {
  if (const char* error = check_features(features)) return error;
  const Levels levels = make_levels(features);
  const TensorView& like = features.value[0];
  const DType accumulator = accumulator_dtype(like.dtype);
  const bool weighted = element_count(weight) > 0, one_size = levels.groups == 1;
  if (weighted && !is_dense(weight, like, accumulator, features.count, levels.channels)) {
    return "weight must be (L, C) in the accumulator's dtype";
  }
  const bool no_gates = weighted && one_size && element_count(gates) == 0;
  if (!no_gates && !is_dense(gates, like, accumulator, levels.gates[features.count])) {
    return "gates must hold one accumulator for every position of every level";
  }
  if (!is_dense(sums, like, accumulator, one_size ? 0 : levels.sums)) {
    return "sums must hold the accumulators of one map for every size";
  }
  return nullptr;
}

}  // namespace

CTXOPS_INLINE const char* GatedFusionForward::check() const {
  if (const char* error = check_buffers(features, gates, weight, sums)) return error;
  const TensorView& first = like();
  if (element_count(bias) > 0 &&
      !is_dense(bias, first, accumulator_dtype(first.dtype), features.count)) {
    return "bias must be (L,) in the accumulator's dtype";
  }
  return same_maps(outputs, features) ? nullptr : "outputs must be maps like the features";
}

CTXOPS_INLINE const char* GatedFusionBackward::check() const {
  if (const char* error = check_buffers(features, gates, weight, sums)) return error;
  const Levels levels = make_levels(features);
  const TensorView& first = like();
  const DType accumulator = accumulator_dtype(first.dtype);
  const int64_t sums_count = levels.groups == 1 ? 0 : levels.sums;
  const int64_t gates_count = levels.gates[features.count];
  if (!is_dense(gates, first, accumulator, gates_count)) return "the backward needs the gates";
  if (!is_dense(grad_gates, first, accumulator, gates_count))
    return "grad_gates must be like gates";
  if (!is_dense(grad_sums, first, accumulator, sums_count) ||
      !is_dense(grad_sent, first, accumulator, sums_count)) {
    return "grad_sums and grad_sent must be like sums";
  }
  if (!same_maps(grads, features)) return "grads must be maps like the features";
  if (!same_maps(grad_features, features)) return "grad_features must be maps like the features";
  if (element_count(weight) == 0) return nullptr;
  int64_t parts = 0;
  for (int g = 0; g < levels.groups; ++g) {
    const int64_t own = levels.batch * parts_of_image(levels.group[g]);
    if (own > parts) parts = own;
  }
  return is_dense(grad_weight, first, accumulator, features.count, parts, levels.channels)
             ? nullptr
             : "grad_weight must be (L, P, C) in the accumulator's dtype";
}

}  // namespace ctxops

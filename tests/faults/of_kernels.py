# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults of the kernels: C++, CUDA and Triton."""

from faults.fault import faults_in

CPU = [
    *faults_in(
        "csrc/bindings.cpp",
        "tests/build/test_extension.py",
        (
            "binding-unknown-argument",
            "a misspelt argument of a kernel is passed over",
            "if (arguments.size() > members_.size()) refuse_unknown(arguments);",
            "if (arguments.size() < members_.size()) refuse_unknown(arguments);",
        ),
    ),
    *faults_in(
        "csrc/common/kernel.h",
        "tests/build/test_extension.py",
        (
            "kernel-unchecked",
            "a kernel computes with arguments that do not fit together",
            "if (const char* error = params.check()) return error;",
            "",
        ),
    ),
    *faults_in(
        "csrc/common/bins.h",
        "tests/ops/test_pyramid_pool.py",
        (
            "bins-floor-end",
            "neighbouring bins no longer overlap where the grid does not divide the map",
            "return ((i + 1) * extent + n - 1) / n;",
            "return (i + 1) * extent / n;",
        ),
    ),
    *faults_in(
        "csrc/common/window.h",
        "tests/ops/test_neighborhood_attention.py",
        (
            "window-shift-last-key",
            "border=shift: the first key of the last window misses most of its gradient",
            "if (key >= steps - axis.kernel) range.end = steps;",
            "if (key > steps - axis.kernel) range.end = steps;",
        ),
        (
            "window-even-centre",
            "an even window reaches one step too far to the right",
            "const int64_t centred = query - axis.kernel / 2;",
            "const int64_t centred = query - (axis.kernel - 1) / 2;",
        ),
        (
            "window-bias-outside",
            "the bias's gradient takes in what stands outside the map",
            "neighbour >= inside.begin && neighbour < inside.end",
            "neighbour >= start && neighbour < start + axis.kernel",
        ),
    ),
    *faults_in(
        "csrc/common/bilinear.h",
        "tests/ops/test_gated_fusion.py",
        (
            "bilinear-align-corners",
            "align_corners=True resizes with the scale of False",
            "to > 1 ? static_cast<double>(from - 1) / (to - 1) : 0.0",
            "to > 1 ? static_cast<double>(from) / to : 0.0",
        ),
        (
            "bilinear-first-border",
            "align_corners=False extrapolates at the upper and left border",
            "return x < 0 ? 0 : x;",
            "return x;",
        ),
        (
            "bilinear-next-target",
            "a target in front of a position counts as its first",
            "while (target < axis.to && tap_at(axis, target).low < position) ++target;",
            "",
        ),
    ),
    *faults_in(
        "csrc/common/dtype.h",
        "tests/ops/test_pyramid_pool.py",
        (
            "half-subnormal",
            "float16 on the CPU: values below 6e-5 are read as something else",
            "const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;",
            "const uint32_t finite = magnitude < 0x0001u ? subnormal : normal;",
        ),
        (
            "half-nan",
            "float16 on the CPU: NaN comes out as infinity",
            "half = magnitude > 0x7f800000u ? 0x7e00u : half;",
            "half = magnitude > 0x7fffffffu ? 0x7e00u : half;",
        ),
    ),
    *faults_in(
        "csrc/pyramid_pool/pyramid_pool.h",
        "tests/ops/test_pyramid_pool.py",
        (
            "pool-last-of-equals",
            "the gradient of a maximum goes to the last of equal positions, not to the first",
            "(equal & (at < best_at))",
            "(equal & (at > best_at))",
        ),
        (
            "pool-cells-of-overlaps",
            "cells do not end where a bin ends inside another",
            "if (end > here && end < next) next = end;",
            "if (end > here && end < here) next = end;",
        ),
    ),
    *faults_in(
        "csrc/pyramid_pool/pyramid_pool_cpu.cpp",
        "tests/ops/test_pyramid_pool.py",
        (
            "pool-nan-without-gradient",
            "a maximum without gradient loses NaN",
            "sum[k] = value > sum[k] || value != value ? value : sum[k];",
            "sum[k] = value > sum[k] ? value : sum[k];",
        ),
        (
            "pool-wide-positions",
            "contiguous maps of more than 512 columns: positions of maxima to the right are wrong",
            "accumulate<kMaximum, kIndex, 1>(run, run_at, x, h * W + left, count);",
            "accumulate<kMaximum, kIndex, 1>(run, run_at, x, h * W, count);",
        ),
        (
            "pool-many-channels",
            "more than 256 channels: the mean's gradient leaves the rest unwritten",
            "for (int64_t first = 0; first < C; first += kChannelTile) {",
            "for (int64_t first = 0; first < smaller(C, kChannelTile); first += kChannelTile) {",
        ),
        (
            "pool-float-totals",
            "means of very many float values stop counting",
            "struct TotalOf {\n  using type = double;",
            "struct TotalOf {\n  using type = A;",
        ),
        (
            "pool-last-row-of-a-cell",
            "contiguous maps: the gradient's last row of every cell is not written",
            "for (int64_t h = top + 1; h < bottom; ++h) {",
            "for (int64_t h = top + 1; h < bottom - 1; ++h) {",
        ),
    ),
    *faults_in(
        "csrc/neighborhood_attention/neighborhood_attention_cpu.cpp",
        "tests/ops/test_neighborhood_attention.py",
        (
            "window-one-channel-left",
            "channels that fill the vectors but for one: the last is not written",
            "if (const int64_t rest = channels - c; rest > 0) {",
            "if (const int64_t rest = channels - c; rest > 1) {",
        ),
        (
            "window-past-the-caches",
            "channels_last results that are larger than the caches: their vectors are not written",
            "stream_vector<A>(to, v);",
            "(void)to;",
        ),
        (
            "window-gradient-scale",
            "the gradient of the query lacks the scale",
            "row[n * Q + q] = static_cast<A>(p.scale) * to[n];",
            "row[n * Q + q] = to[n];",
        ),
        (
            "window-bias-heads",
            "every head gets the bias of the first",
            "block.head * bias.stride[0] +",
            "0 * bias.stride[0] +",
        ),
        (
            "window-bias-gradient",
            "the rows of the bias's gradient stand upside down",
            "down = item % height - (rows.kernel - 1);",
            "down = rows.kernel - 1 - item % height;",
        ),
        (
            "window-zeros-share",
            "border=zeros: what is outside takes no share of the softmax",
            "sum = reduce_lanes<Q, A>(sum, plus) + static_cast<A>(outside) * rest;",
            "sum = reduce_lanes<Q, A>(sum, plus);",
        ),
    ),
    *faults_in(
        "csrc/neighborhood_attention/neighborhood_attention_columns_cpu.cpp",
        "tests/ops/test_neighborhood_attention.py",
        (
            "window-columns-last-vector",
            "contiguous maps with an odd number of vectors to a row: the last one is not computed",
            "for (; t < tile.lanes; t += kLanes<A>) f(",
            "for (; t > tile.lanes; t += kLanes<A>) f(",
        ),
        (
            "window-columns-many-channels",
            "contiguous maps of more than 64 channels: the logits are of the last ones alone",
            "now, c > 0, c + now",
            "now, c < 0, c + now",
        ),
        (
            "window-columns-sliding-keys",
            "contiguous maps, border=shift: keys near the border miss some of their queries",
            "const bool sees = j < tile.count[t];",
            "const bool sees = j < smaller(kernel, tile.count[t]);",
        ),
        (
            "window-columns-sliding-bias",
            "contiguous maps, border=shift: positions near the border get the bias of other steps",
            "const int64_t left = (tile.first[t] - tile.left - t) / columns.dilation;",
            "const int64_t left = (tile.first[t] - tile.left - t) / columns.kernel;",
        ),
    ),
    *faults_in(
        "csrc/gated_fusion/gated_fusion_cpu.cpp",
        "tests/ops/test_gated_fusion.py",
        (
            "gates-smaller-level-weight",
            "the weight's gradient of the smaller levels holds memory that nobody wrote",
            "if (part == 0) memset(in_weight(block, i, own), 0,",
            "if (part < 0) memset(in_weight(block, i, own), 0,",
        ),
        (
            "gates-sigmoid-derivative",
            "gradients of weight and bias: g instead of g (1 - g)",
            "value[k] *= g[k] * (1 - g[k]);",
            "value[k] *= g[k];",
        ),
        (
            "gates-planar-right-tap",
            "contiguous maps of several sizes: no gradient through the right of two taps",
            "to[tap[k].high] += weight * line[k];",
            "to[tap[k].high] += 0 * weight * line[k];",
        ),
    ),
    *faults_in(
        "csrc/category_statistics/category_statistics_cpu.cpp",
        "tests/ops/test_category_statistics.py",
        (
            "category-norm-diagonals",
            "the length of a resized vector counts one diagonal of its cell twice",
            "ul * (diagonal_[i] + anti_[i])",
            "2 * ul * diagonal_[i]",
        ),
        (
            "category-first-label-outside",
            "the error names not the first label out of range",
            "if (found[0] == 0) found[1] = of_part[1];",
            "if (of_part[0] > 0) found[1] = of_part[1];",
        ),
    ),
]

_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu.py -k "
CUDA = [
    *faults_in(
        "csrc/common/pack.h",
        _ON_CPU + "category_statistics",
        (
            "cuda-walk-row-end",
            "threads step one column beyond a rectangle before they start the next row",
            "if (column_ >= columns_) {",
            "if (column_ > columns_) {",
        ),
    ),
    *faults_in(
        "csrc/pyramid_pool/pyramid_pool_cuda.cu",
        _ON_CPU + "pyramid_pool",
        (
            "cuda-pool-barrier",
            "contiguous maps: the gradient is read from shared memory before it is there",
            "slot_of<V>(k, layout.lanes)] = value;\n        }\n      }\n      __syncthreads();",
            "slot_of<V>(k, layout.lanes)] = value;\n        }\n      }",
        ),
        (
            "cuda-pool-shared-maximum",
            "a position that is the maximum of several bins gets one gradient only",
            "sum += load(*row<T>(p.grad_output, my.b, s, my.c));",
            "sum = load(*row<T>(p.grad_output, my.b, s, my.c));",
        ),
        (
            "cuda-pool-square-area",
            "means of bins that are not square are wrong",
            "const A area = static_cast<A>((bottom - top) * (right - left));",
            "const A area = static_cast<A>((bottom - top) * (bottom - top));",
        ),
        (
            "cuda-pool-wide-cells",
            "a cell that is wider than a strip keeps only its last strip",
            "if (start >= left) total = {};",
            "total = {};",
        ),
        (
            "cuda-pool-teams",
            "a cell or a bin that several teams share lacks the part of the last",
            "for (int team = 0; team < teams; ++team) {",
            "for (int team = 0; team < teams - 1; ++team) {",
        ),
        (
            "cuda-pool-columns-of-teams",
            "contiguous maps: a cell whose rows several teams share lacks the rows of the last",
            "for (int team = 0; team < layout.teams; ++team) {\n"
            "            partials.add_to(&column,",
            "for (int team = 0; team < layout.teams - 1; ++team) {\n"
            "            partials.add_to(&column,",
        ),
    ),
    *faults_in(
        "csrc/neighborhood_attention/neighborhood_attention_cuda.cu",
        _ON_CPU + "neighborhood_attention",
        (
            "cuda-window-mask",
            "border=mask is taken for zeros, except by the tiled kernels",
            "const A outside = rows.border == Border::mask ? -static_cast<A>(INFINITY) : A(0);",
            "const A outside = A(0);",
        ),
        (
            "cuda-window-mirror",
            "tiled: keys and values get the coefficient of the mirrored neighbour",
            "*coefficients.at(k * k - 1 - n, row, column)",
            "*coefficients.at(n, row, column)",
        ),
        (
            "cuda-window-barrier",
            "tiled: products are made before the chunk has arrived in shared memory",
            "copy_wait<kStages - 1>();\n    __syncthreads();",
            "copy_wait<kStages - 1>();",
        ),
        (
            "cuda-window-heads",
            "several heads read each other's channels",
            "at.b * map.stride[0] + at.head * (map.size[1] / heads) +",
            "at.b * map.stride[0] + at.head * heads +",
        ),
        (
            "cuda-window-bias",
            "tiled: a neighbour gets the bias of one k / 2 steps to the left",
            "(k - 1) * (kAcross + 1);",
            "(k - 1) * kAcross;",
        ),
        (
            "cuda-window-shift",
            "tiled: windows that shift lack the last of what stands beyond the border",
            "return step < 0 ? step + k : step >= steps ? step - k : step;",
            "return step < 0 ? step + k : step > steps ? step - k : step;",
        ),
        (
            "cuda-window-bias-shift",
            "not tiled: the bias is that of a window in whose middle the query stands",
            "const int64_t first_column = left - my.column + kw - 1;",
            "const int64_t first_column = kw - 1 - kw / 2;",
        ),
        (
            "cuda-window-bias-gradient",
            "the bias's gradient is the sum over the rows of one warp",
            "for (int i = 1; i < warps; ++i) sum += of_warps[i];",
            "",
        ),
    ),
    *faults_in(
        "csrc/gated_fusion/gated_fusion_cuda.cu",
        _ON_CPU + "gated_fusion",
        (
            "cuda-gates-weight-tiles",
            "channels_last: the weight's gradient is that of the last tile alone",
            "if (tile > item.begin) dw = load_pack<V>(to);",
            "if (tile < item.begin) dw = load_pack<V>(to);",
        ),
        (
            "cuda-gates-last-team",
            "small maps beside large ones lose a part of their gradient",
            "for (int i = 1; team == 0 && i < pieces; ++i) {",
            "for (int i = 1; team == 0 && i < pieces - 1; ++i) {",
        ),
        (
            "cuda-gates-teams-of-a-warp",
            "small maps beside much larger ones get the gradient of one team a warp",
            "for (int lanes = apart; lanes < apart * in_warp; lanes *= 2) {",
            "for (int lanes = apart; lanes < apart; lanes *= 2) {",
        ),
        (
            "cuda-gates-sigmoid-derivative",
            "gradients of weight and bias lack g (1 - g)",
            "if (weight) sum *= g * (1 - g);",
            "if (!weight) sum *= g * (1 - g);",
        ),
        (
            "cuda-gates-few-channels",
            "channels_last: of few channels a gate is made of all positions of a warp",
            "const int across = S::kInner ? peers() : kWarp;",
            "const int across = kWarp;",
        ),
        (
            "cuda-gates-absent-positions",
            "a warp or a block goes on beyond the last position of its item",
            "channels = n < end ? C : 0;",
            "channels = C;",
        ),
    ),
    *faults_in(
        "csrc/category_statistics/category_statistics_cuda.cu",
        _ON_CPU + "category_statistics",
        (
            "cuda-category-weights",
            "weights hold only the last terms of every part",
            "p.part_weights[part * K + classes[thread]] += weight;",
            "p.part_weights[part * K + classes[thread]] = weight;",
        ),
        (
            "cuda-category-handed-on",
            "of a class whose terms two teams have, both write the sum at once",
            "bool hands_on = goes_on(team);",
            "bool hands_on = false;",
        ),
        (
            "cuda-category-length",
            "the length of a resized vector lacks the product of opposite corners",
            "square[1][1] += f[0] * f[3] + f[1] * f[2];",
            "square[1][1] += f[0] * f[3];",
        ),
        (
            "cuda-category-outside",
            "labels out of range do not turn the sums into NaN",
            "if (p.outside[0] > 0) sum = NAN;",
            "if (p.outside[0] < 0) sum = NAN;",
        ),
        (
            "cuda-category-ignored",
            "ignored labels count as out of range",
            "count += k == kNone && label != p.ignore_index;",
            "count += k == kNone;",
        ),
        (
            "cuda-category-barrier",
            "the parts' sums are added before all warps have them",
            "partial[threadIdx.x] = sum;\n    __syncthreads();",
            "partial[threadIdx.x] = sum;",
        ),
    ),
]

TRITON = [
    *faults_in(
        "ctxops/ops/asymmetric_attention/triton_kernels.py",
        "tests/ops/test_asymmetric_attention_triton.py",
        (
            "triton-anchors-denominator",
            "more than 256 anchors: the former tiles' sum is not brought to the new maximum",
            "b_l = b_l * b_r + tl.sum(b_p, 1)",
            "b_l = b_l + tl.sum(b_p, 1)",
        ),
        (
            "triton-anchors-padding",
            "the padding takes a share of the softmax where anchors fill no whole tile",
            'return tl.where((o_s < S)[None, :], b_s, float("-inf"))',
            "return b_s",
        ),
        (
            "triton-anchors-row-sum",
            "more than 128 anchors: the softmax's gradient sees the last tile's sum alone",
            "b_d += tl.sum(b_p * b_ds, 1)",
            "b_d = tl.sum(b_p * b_ds, 1)",
        ),
        (
            "triton-anchors-blocks",
            "maps that do not fit the workspace: the keys' gradient is that of the last block",
            "sum_key += part_key",
            "sum_key.copy_(part_key)",
        ),
        (
            "triton-anchors-key-scale",
            "the gradient of the keys lacks the scale",
            "torch.baddbmm(part_key, n_query, ds, **scaled, out=part_key)",
            "torch.baddbmm(part_key, n_query, ds, beta=0, out=part_key)",
        ),
        (
            "triton-anchors-value-slice",
            "the second slice of value channels starts at the first",
            "v_begin = tl.program_id(1) * v_slice",
            "v_begin = tl.program_id(1) * 0",
        ),
    ),
    *faults_in(
        "ctxops/ops/criss_cross_attention/triton_kernels.py",
        "tests/ops/test_criss_cross_attention_triton.py",
        (
            "triton-cross-column-share",
            "the row forgets the weight of the column",
            "b_l = tl.full([BN], 1.0, dtype=tl.float32)",
            "b_l = tl.full([BN], 0.0, dtype=tl.float32)",
        ),
        (
            "triton-cross-empty-column",
            "a column of which nothing counts leaves NaN in the row",
            'b_o = tl.where((b_m == float("-inf"))[:, None], 0.0, b_o)',
            "b_o = b_o * 1.0",
        ),
        (
            "triton-cross-itself-twice",
            "backward: every position counts itself twice",
            "m_p = m_p & (o_n[:, None] != o_s[None, :])",
            "m_p = m_p & (o_s[None, :] >= 0)",
        ),
        (
            "triton-cross-contiguous-gradient",
            "contiguous maps: the gradients are computed and not handed back",
            "if result is not written:\n            result.copy_(written)",
            "if result is written:\n            result.copy_(written)",
        ),
        (
            "triton-cross-one-row",
            "maps of one row attend to nothing but themselves",
            "return [columns, rows] if width > 1 else [columns]",
            "return [columns, rows] if height > 1 else [columns]",
        ),
    ),
]

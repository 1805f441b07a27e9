# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults, and the tests that are responsible for the file each one is in.

``run.py`` injects them one at a time: what the tests let pass, they do not test.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str
    effect: str  # what a user sees of it
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # arguments of pytest: files, perhaps with -k


def _in(file: str, tests: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    return [Fault(name, file, *rest, tuple(tests.split())) for name, *rest in faults]


_CPU = [
    *_in(
        "csrc/bindings.cpp",
        "tests/build/test_extension.py",
        (
            "binding-unknown-argument",
            "a misspelt argument of a kernel is passed over",
            "if (arguments.size() > members_.size()) refuse_unknown(arguments);",
            "if (arguments.size() < members_.size()) refuse_unknown(arguments);",
        ),
    ),
    *_in(
        "csrc/common/kernel.h",
        "tests/build/test_extension.py",
        (
            "kernel-unchecked",
            "a kernel computes with arguments that do not fit together",
            "if (const char* error = params.check()) return error;",
            "",
        ),
    ),
    *_in(
        "csrc/common/bins.h",
        "tests/ops/test_pyramid_pool.py",
        (
            "bins-floor-end",
            "neighbouring bins no longer overlap where the grid does not divide the map",
            "return ((i + 1) * extent + n - 1) / n;",
            "return (i + 1) * extent / n;",
        ),
    ),
    *_in(
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
    *_in(
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
    ),
    *_in(
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
    *_in(
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
    *_in(
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
    *_in(
        "csrc/neighborhood_attention/neighborhood_attention_cpu.cpp",
        "tests/ops/test_neighborhood_attention.py",
        (
            "window-one-channel-left",
            "channels that fill the vectors but for one: the last is not written",
            "if (const int64_t rest = channels - c; rest > 0) {",
            "if (const int64_t rest = channels - c; rest > 1) {",
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
    *_in(
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
    *_in(
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
    *_in(
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
_CUDA = [
    *_in(
        "csrc/common/pack.h",
        _ON_CPU + "category_statistics",
        (
            "cuda-walk-row-end",
            "threads step one column beyond a rectangle before they start the next row",
            "if (column_ >= columns_) {",
            "if (column_ > columns_) {",
        ),
    ),
    *_in(
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
    ),
    *_in(
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
            "k / 2 * (kAcross + 1);",
            "k / 2 * kAcross;",
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
    *_in(
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
            "for (int i = 1; team == 0 && i < p.teams; ++i) {",
            "for (int i = 1; team == 0 && i < p.teams - 1; ++i) {",
        ),
        (
            "cuda-gates-sigmoid-derivative",
            "gradients of weight and bias lack g (1 - g)",
            "if (weight) sum *= g * (1 - g);",
            "if (!weight) sum *= g * (1 - g);",
        ),
    ),
    *_in(
        "csrc/category_statistics/category_statistics_cuda.cu",
        _ON_CPU + "category_statistics",
        (
            "cuda-category-weights",
            "weights hold only the last terms of every part",
            "p.part_weights[part * K + j] += weight;",
            "p.part_weights[part * K + j] = weight;",
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

_TRITON = [
    *_in(
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
    *_in(
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

_OPS = [
    *_in(
        "ctxops/_layout.py",
        "tests/test_library.py tests/ops/test_asymmetric_attention.py",
        (
            "library-ambiguous-format",
            "a contiguous map of one channel comes out channels_last",
            "if x.is_contiguous() or is_transformed():",
            "if is_transformed():",
        ),
    ),
    *_in(
        "ctxops/_autocast.py",
        "tests/test_library.py tests/ops/test_asymmetric_attention.py",
        (
            "library-autocast-double",
            "autocast casts float64 down",
            "if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t",
            "if t is not None and t.is_floating_point() else t",
        ),
        (
            "library-kernel-under-autocast",
            "under autocast the products inside a kernel are rounded once more",
            "with torch.autocast(device, enabled=False):",
            "with torch.autocast(device, enabled=True):",
        ),
    ),
    *_in(
        "ctxops/_operator.py",
        "tests/test_library.py tests/ops/test_asymmetric_attention.py",
        (
            "library-nested-reference",
            "the end of an inner use_reference() ends the outer one",
            "reference_active = _reference_depth > 0",
            "reference_active = False",
        ),
        (
            "library-old-gpu",
            "a GPU without machine code for it fails instead of taking the reference",
            "and (not tensor.is_cuda or has_kernels(tensor.device))",
            "",
        ),
    ),
    *_in(
        "ctxops/_checks.py",
        "tests/test_library.py tests/ops/test_asymmetric_attention.py",
        (
            "library-forward-mode",
            "forward-mode derivatives are silently zero",
            "if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:",
            "if tensor is None and forward_ad.unpack_dual(tensor).tangent is not None:",
        ),
    ),
    *_in(
        "ctxops/ops/asymmetric_attention/op.py",
        "tests/ops/test_asymmetric_attention.py tests/ops/test_memory.py tests/test_flops.py",
        (
            "anchors-backward-flops",
            "FlopCounterMode counts one product of the backward less",
            "(3 * channels + 2 * grad[1])",
            "(2 * channels + 2 * grad[1])",
        ),
        (
            "anchors-one-block",
            "the CPU takes the logits of all positions at once: memory grows with the map",
            "count = -(-positions * bytes_each // BLOCK_BYTES)",
            "count = 1",
        ),
        (
            "anchors-last-block",
            "several blocks: the gradient of the keys is that of the last",
            "dk.addmm_(q_block.t(), dlogits)",
            "torch.mm(q_block.t(), dlogits, out=dk)",
        ),
    ),
    *_in(
        "ctxops/ops/nonlocal_attention/op.py",
        "tests/ops/test_nonlocal_attention.py",
        (
            "nonlocal-scale-zero",
            "scale=0.0 is taken for the default",
            "(q, k, _sequence(v, head), scale=scale)",
            "(q, k, _sequence(v, head), scale=scale or None)",
        ),
    ),
    *_in(
        "ctxops/ops/criss_cross_attention/op.py",
        "tests/ops/test_criss_cross_attention.py",
        (
            "cross-empty-column",
            "a column whose logits are all -inf leaves NaN in the row",
            "total.clamp_(min=1)",
            "total.clamp_(min=0)",
        ),
        (
            "cross-gradient-scale",
            "the gradients of query and key lack the scale",
            "dlogits.sub_(delta[block][:, :, None]).mul_(weights).mul_(scale)",
            "dlogits.sub_(delta[block][:, :, None]).mul_(weights)",
        ),
    ),
    *_in(
        "ctxops/ops/gated_fusion/op.py",
        "tests/ops/test_gated_fusion.py",
        (
            "gates-bias-by-threads",
            "the gradient of the bias depends on the number of threads",
            "return values[:whole].view(-1, part).sum(dim=0).sum() + values[whole:].sum()",
            "return values.sum()",
        ),
        (
            "gates-format-of-each",
            "the results are in the format of their own level, not in that of the first",
            "fused = [_layout.empty_map(x.shape, x, layout) for x in features]",
            "fused = [_layout.empty_map(x.shape, x) for x in features]",
        ),
        (
            "gates-autocast-first",
            "under autocast the first level's dtype counts instead of the widest",
            "dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))",
            "dtype = tensors[0].dtype",
        ),
    ),
    *_in(
        "ctxops/ops/neighborhood_attention/reference.py",
        "tests/compat/test_natten.py",
        (
            "natten-dilated-bias",
            "the bias is taken by positions, not by steps of the dilation",
            "positions // dilation - own // dilation + kernel - 1",
            "positions - own + kernel - 1",
        ),
    ),
    *_in(
        "ctxops/compat/natten.py",
        "tests/compat/test_natten.py",
        (
            "natten-bias",
            "na2d leaves the bias out",
            "rel_pos_bias=rpb,",
            "rel_pos_bias=None,",
        ),
        (
            "natten-border",
            "the window is cut off at the border, as in other libraries",
            'border="shift", num_heads=heads',
            'border="mask", num_heads=heads',
        ),
    ),
    *_in(
        "ctxops/ops/neighborhood_attention/op.py",
        "tests/ops/test_neighborhood_attention.py",
        (
            "window-moved-weights",
            "hooks on saved tensors that change strides make the backward fail",
            "if weights.stride() != grad_logits.stride():",
            "if weights.shape != grad_logits.shape:",
        ),
        (
            "window-error-argument",
            "the error of a wrong dilation names kernel_size",
            'steps = check_pair("dilation", dilation)',
            'steps = check_pair("kernel_size", dilation)',
        ),
        (
            "window-bias-recomputed",
            "weights that the backward takes anew lack the bias",
            "*ctx.options, True, bias)[1]",
            "*ctx.options, True)[1]",
        ),
        (
            "window-half-output",
            "half precision on the CPU: the result is computed and not handed back",
            "if target is not output:\n        output.copy_(target)",
            "if target is output:\n        output.copy_(target)",
        ),
    ),
    *_in(
        "ctxops/ops/pyramid_pool/op.py",
        "tests/ops/test_pyramid_pool.py",
        (
            "pool-fine-grid-gradient",
            "maxima of a grid that is finer than the map: the gradient loses small parts",
            "finer = max(sizes) > min(height, width) and grad.dtype != torch.float64",
            "finer = False",
        ),
        (
            "pool-gradient-format",
            "the gradient of a channels_last map is contiguous",
            "ctx.channels_last = _layout.memory_format(input) == torch.channels_last",
            "ctx.channels_last = False",
        ),
    ),
    *_in(
        "ctxops/ops/category_statistics/op.py",
        "tests/ops/test_category_statistics.py",
        (
            "category-parts-by-threads",
            "the sums depend on the number of threads",
            "parts = batch * -(-height // _PART_ROWS)",
            "parts = torch.get_num_threads()",
        ),
        (
            "category-label-wraps",
            "the reference compares labels in uint8: an ignored 256 ignores 0",
            "labels = labels.long()  #",
            "labels = labels.clone()  #",
        ),
    ),
    *_in(
        "ctxops/ops/category_context/op.py",
        "tests/ops/test_category_context.py",
        (
            "context-softmax-axis",
            "channels_last: the softmax is over the columns instead of the classes",
            "weights = logits.permute(0, 2, 3, 1).softmax(dim=3)",
            "weights = logits.permute(0, 2, 3, 1).softmax(dim=2)",
        ),
    ),
    *_in(
        "ctxops/ops/sample_anchors/op.py",
        "tests/ops/test_sample_anchors.py",
        (
            "sample-one-behind",
            "the position behind the last passes the check",
            "if low < 0 or high >= positions:",
            "if low < 0 or high > positions:",
        ),
    ),
]

_MODULES = [
    *_in(
        "ctxops/_checks.py",
        "tests/nn/test_pruned.py",
        (
            "pruned-convolution",
            "a module whose convolutions a tool has pruned takes no map any more",
            "        if takers and x.shape[1] != channels:\n",
            "        if False:\n",
        ),
        (
            "pruned-concatenation",
            "two maps are refused although the pruned convolution takes both together",
            "    if taken in (None, sum(channels for _, channels in maps.values())):\n",
            "    if True:\n",
        ),
    ),
    *_in(
        "ctxops/_torch.py",
        "tests/models/test_sharded.py",
        (
            "sharded-methods",
            "a method besides forward has no weights in a unit of fully_shard",
            "if fsdp and isinstance(module, fsdp.FSDPModule) and",
            "if False and",
        ),
    ),
    *_in(
        "ctxops/nn/plain.py",
        "tests/nn/test_plain.py tests/nn/test_non_local.py",
        (
            "plain-pre-hooks",
            "forward pre-hooks, of which pruning is one, are passed over by folded weights",
            '"_forward_hooks", "_forward_pre_hooks", "_backward_hooks"',
            '"_forward_hooks", "_backward_hooks"',
        ),
        (
            "plain-replaced-forward",
            "a forward that an adapter has put into the instance is passed over",
            'and "forward" not in module.__dict__\n',
            "\n",
        ),
        (
            "plain-forward-of-the-class",
            "a forward that a tool has given to a class of torch is passed over",
            "        and _is_written_in(type(module).forward, type(module).__module__)\n",
            "",
        ),
        (
            "plain-call-of-all",
            "a tool that replaces the call of all modules does not see the children",
            "_is_written_in(type(module).__call__, *_CALLS)\n        and ",
            "",
        ),
        (
            "plain-derived-class",
            "a class derived from a known one is read",
            "type(module) in kinds",
            "isinstance(module, kinds)",
        ),
    ),
    *_in(
        "ctxops/nn/pointwise.py",
        "tests/nn/test_local_distribution.py tests/nn/test_non_local.py",
        (
            "pointwise-order-of-parts",
            "the first map of a concatenation is left out",
            "for x, weight in zip(maps[:-1], parts, strict=True):",
            "for x, weight in zip(maps[1:], parts, strict=True):",
        ),
    ),
    *_in(
        "ctxops/patching/forwards.py",
        "tests/test_patching.py",
        (
            "patching-shared-norm",
            "training: the norm that query and key share counts the map once, not twice",
            "not child.training and is_plain(child, type(child))",
            "is_plain(child, type(child))",
        ),
        (
            "patching-hooked-stage",
            "a block of ANN passes over the hooks of its attention",
            "is self_attention and is_unwatched(stage)",
            "is self_attention",
        ),
        (
            "patching-scale",
            "non-local blocks without a scale are scaled",
            "return self.inter_channels**-0.5 if self.use_scale else 1.0",
            "return self.inter_channels**-0.5",
        ),
    ),
    *_in(
        "ctxops/patching/__init__.py",
        "tests/test_patching.py",
        (
            "patching-replaced-forward",
            "a forward that another tool has put into a module is lost",
            'if "forward" in module.__dict__:',
            "if False:",
        ),
    ),
    *_in(
        "ctxops/nn/folding.py",
        "tests/nn/test_non_local.py",
        (
            "nonlocal-folded-bias",
            "evaluation: the convolution's bias is lost where the norm is folded into it",
            "bias = 0 if convolution.bias is None else convolution.bias",
            "bias = 0",
        ),
        (
            "nonlocal-folded-training",
            "training: the norm takes its running statistics instead of the batch's",
            "and not norm.training\n",
            "\n",
        ),
    ),
    *_in(
        "ctxops/nn/non_local.py",
        "tests/nn/test_non_local.py",
        (
            "nonlocal-paper-scale",
            'variant="paper" scales its logits',
            'self.scale = (released_scale if variant == "released" else 1.0) if scale is None',
            "self.scale = released_scale if scale is None",
        ),
        (
            "nonlocal-query-bias",
            "folded into the keys, the query's bias is not scaled",
            'bias = self.scale * torch.einsum("c,bcs->bs", embedding.bias, key)',
            'bias = torch.einsum("c,bcs->bs", embedding.bias, key)',
        ),
    ),
    *_in(
        "ctxops/nn/aspp.py",
        "tests/nn/test_aspp.py tests/nn/test_contexts.py",
        (
            "aspp-dilations",
            "the dilations are ignored",
            "cbr(in_channels, channels, 3, norm_layer, dilation=dilation)",
            "cbr(in_channels, channels, 3, norm_layer)",
        ),
        (
            "aspp-order",
            "the image's context is the last of the branches, not the first",
            "torch.cat([image, *maps], dim=1)",
            "torch.cat([*maps, image], dim=1)",
        ),
    ),
    *_in(
        "ctxops/nn/dense_aspp.py",
        "tests/nn/test_dense_aspp.py tests/nn/test_contexts.py",
        (
            "dense-aspp-order",
            "what a block adds stands behind its input",
            "x = torch.cat([block(x), x], dim=1)",
            "x = torch.cat([x, block(x)], dim=1)",
        ),
    ),
    *_in(
        "ctxops/nn/dual_attention.py",
        "tests/nn/test_dual_attention.py",
        (
            "dual-channel-sign",
            "channels attend to those that resemble them, not to the others",
            "weights = total(_products, x).neg().softmax(dim=2)",
            "weights = total(_products, x).softmax(dim=2)",
        ),
    ),
    *_in(
        "ctxops/nn/disentangled_non_local.py",
        "tests/nn/test_disentangled_non_local.py",
        (
            "disentangled-flag",
            "use_scale=False is ignored",
            "scale = (self.key_channels**-0.5 if self.use_scale else 1.0) / self.temperature",
            "scale = self.key_channels**-0.5 / self.temperature",
        ),
    ),
    *_in(
        "ctxops/nn/cgnl.py",
        "tests/nn/test_cgnl.py",
        (
            "cgnl-half-affinity",
            "half precision: the affinity leaves the range",
            "return (phi.to(torch.promote_types(phi.dtype, torch.float32)) * g).sum((2, 3, 4))",
            "return (phi * g).sum((2, 3, 4))",
        ),
    ),
    *_in(
        "ctxops/nn/criss_cross.py",
        "tests/nn/test_criss_cross.py",
        (
            "cross-recurrence",
            "recurrence is ignored",
            "for _ in range(self.recurrence):",
            "for _ in range(2):",
        ),
    ),
    *_in(
        "ctxops/nn/dataset_context.py",
        "tests/nn/test_dataset_context.py",
        (
            "dataset-memory-copy",
            "an update of the memory before the backward breaks it",
            "memory = memory.to(logits.dtype, copy=True)",
            "memory = memory.to(logits.dtype)",
        ),
        (
            "dataset-kernel-default",
            "the default of kernel_size with within_channels is 3",
            "kernel_size = 1 if within_channels else 3",
            "kernel_size = 3",
        ),
    ),
    *_in(
        "ctxops/nn/feature_memory.py",
        "tests/nn/test_feature_memory.py",
        (
            "memory-after-the-last-step",
            "beyond total_steps the momentum is NaN",
            "left = 1 - (self.step.double() / self.total_steps).clamp_max(1)",
            "left = 1 - self.step.double() / self.total_steps",
        ),
        (
            "memory-half",
            ".half() of the network rounds the memory",
            "return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)",
            "return moved",
        ),
    ),
    *_in(
        "ctxops/nn/gated_fusion.py",
        "tests/nn/test_gated_fusion.py",
        (
            "gff-closed",
            'gate_from="reduced" leaves closed gates open',
            "torch.full_like(gate.bias, -torch.inf) if level in closed else gate.bias",
            "gate.bias",
        ),
        (
            "pyramid-order",
            "the dense pyramid begins with the finest level",
            "maps = [y, *reversed(features)]",
            "maps = [y, *features]",
        ),
    ),
    *_in(
        "ctxops/nn/feature_fusion.py",
        "tests/nn/test_gated_fusion.py",
        (
            "fpn-order",
            "the levels of a feature pyramid come back in reverse",
            "return tuple(reversed(fused))",
            "return tuple(fused)",
        ),
    ),
    *_in(
        "ctxops/nn/global_convolution.py",
        "tests/nn/test_global_convolution.py",
        (
            "gcn-orders",
            "both branches are vertical first",
            "first, second = shapes if vertical_first else reversed(shapes)",
            "first, second = shapes",
        ),
    ),
    *_in(
        "ctxops/nn/local_distribution.py",
        "tests/nn/test_local_distribution.py",
        (
            "ldv1-zero-padding",
            'downsample="avg" averages the border with zeros',
            'F.pad(x, (0, lacking, 0, lacking), mode="replicate")',
            "F.pad(x, (0, lacking, 0, lacking))",
        ),
        (
            "ldv2-scale-of-heads",
            "scale=None ignores the heads",
            "self.scale = resolve_scale(scale, key_channels // num_heads)",
            "self.scale = resolve_scale(scale, key_channels)",
        ),
        (
            "gald-residual-default",
            "GALD does not add the map to LDv1's",
            "residual = isinstance(local_distribution, LDv1)",
            "residual = False",
        ),
    ),
    *_in(
        "ctxops/nn/object_context.py",
        "tests/nn/test_object_context.py",
        (
            "object-scale",
            "scale is ignored",
            "weights = softmax_over_positions(self.scale * logits)",
            "weights = softmax_over_positions(logits)",
        ),
    ),
    *_in(
        "ctxops/nn/pointwise_spatial_attention.py",
        "tests/nn/test_pointwise_spatial_attention.py",
        (
            "psa-collect-transposed",
            "collecting positions distribute",
            "collected.mT.softmax(dim=2)",
            "collected.softmax(dim=2)",
        ),
    ),
    *_in(
        "ctxops/nn/adaptive_context.py",
        "tests/nn/test_adaptive_context.py",
        (
            "adaptive-image",
            "the affinity does not see the image's mean",
            "self.affinity(x + self.image(F.adaptive_avg_pool2d(x, 1)))",
            "self.affinity(x)",
        ),
    ),
    *_in(
        "ctxops/nn/pyramid_pooling.py",
        "tests/nn/test_pyramid_pooling.py tests/test_defaults.py",
        (
            "ppm-corners-default",
            "the default of align_corners is True",
            "align_corners: bool = False",
            "align_corners: bool = True",
        ),
    ),
    *_in(
        "ctxops/nn/score_pyramid.py",
        "tests/nn/test_score_pyramid.py",
        (
            "gcn-taps",
            "the score maps do not grow bilinearly at first",
            "taps = torch.tensor([0.5, 1.0, 0.5])",
            "taps = torch.tensor([0.25, 1.0, 0.75])",
        ),
        (
            "score-pyramid-refinement",
            "the sums of score maps are not refined",
            "y = refine(x + upsample(y, x.shape[2:]))",
            "y = x + upsample(y, x.shape[2:])",
        ),
    ),
    *_in(
        "ctxops/nn/asymmetric_context.py",
        "tests/nn/test_asymmetric_context.py",
        (
            "fused-context-dropout",
            "the dropout follows the reduction",
            "self.context(self.reduce(self.dropout(self.fusion(*maps))))",
            "self.context(self.dropout(self.reduce(self.fusion(*maps))))",
        ),
    ),
    *_in(
        "ctxops/nn/uper_decoder.py",
        "tests/nn/test_uper_decoder.py",
        (
            "uper-refined-sum",
            "a level of the pyramid receives what the one above has refined",
            "levels.insert(0, refine(y))",
            "levels.insert(0, y := refine(y))",
        ),
        (
            "uper-corners",
            "the levels are always resized without aligned corners",
            "resize(y, x.shape[2:], self.align_corners)",
            "resize(y, x.shape[2:], False)",
        ),
    ),
    *_in(
        "ctxops/nn/level_fusion_decoder.py",
        "tests/models/test_gff.py",
        (
            "level-decoder-levels",
            "with a context map among the levels, each is taken for the one below",
            "fused[: len(maps)]",
            "fused[-len(maps) :]",
        ),
    ),
]

_IMPORT = (
    "tests/models/test_convert.py tests/models/test_convert_mmsegmentation.py "
    "tests/models/test_convert_sssegmentation.py tests/models/test_convert_torchvision.py"
)
_IMPORTERS = [
    *_in(
        "models/importers/mmsegmentation.py",
        _IMPORT,
        (
            "importer-dnlnet-swapped",
            "DNLNet: the weights of query and key are exchanged",
            '"decode_head.dnl_block.theta.conv": "decoder.context.1.query",\n'
            '            "decode_head.dnl_block.phi.conv": "decoder.context.1.key",',
            '"decode_head.dnl_block.theta.conv": "decoder.context.1.key",\n'
            '            "decode_head.dnl_block.phi.conv": "decoder.context.1.query",',
        ),
    ),
    *_in(
        "models/importers/importer.py",
        _IMPORT,
        (
            "importer-hrnet-branches",
            "HRNets: the branches are resized to the nearest",
            '"output_stride": 4, "bilinear_branches": True}',
            '"output_stride": 4, "bilinear_branches": False}',
        ),
        (
            "importer-pools-on-shortcuts",
            "the shortcuts of dilated stages keep timm's pooling in imported ResNets",
            'arguments["shortcut_pools"] = False',
            'arguments["shortcut_pools"] = True',
        ),
        (
            "importer-basic-blocks",
            "mmsegmentation's ResNet-18 and -34: both convolutions of a block are dilated",
            'arguments["dilate_both"] = False',
            'arguments["dilate_both"] = True',
        ),
        (
            "importer-aspp-order",
            "sssegmentation: ASPP's fusion takes the branches in their order",
            "weight.roll(weight.shape[0], dims=1)",
            "weight.roll(0, dims=1)",
        ),
    ),
    *_in(
        "models/importers/sssegmentation.py",
        "tests/models/test_convert_sssegmentation.py",
        (
            "importer-psanet-swapped",
            "sssegmentation's PSANet: the masks of collection and distribution are exchanged",
            '{"attention.3": f"{_PSA}.collect.1", "attention_p.3": f"{_PSA}.distribute.1"}',
            '{"attention.3": f"{_PSA}.distribute.1", "attention_p.3": f"{_PSA}.collect.1"}',
        ),
        (
            "importer-mcibi-aspp-order",
            "MCIBI over ASPP: its fusion takes the branches in sssegmentation's order",
            '        {"within.fuse.0.weight": image_branch_first},\n',
            "",
        ),
        (
            "importer-mcibi-memory",
            "MCIBI: the memory keeps an axis of sssegmentation, so no file is read",
            "return memory[:, 0] if memory.dim() == 3",
            "return memory if memory.dim() == 3",
        ),
        (
            "importer-sssegmentation-corners",
            "sssegmentation's networks are built with align_corners=True",
            '"align_corners": False,',
            '"align_corners": True,',
        ),
    ),
    *_in(
        "models/importers/segmentation_models_pytorch.py",
        "tests/models/test_convert_torchvision.py",
        (
            "importer-pyramid-order",
            "segmentation_models.pytorch's PSPNet: the fusion takes the map for the branches",
            "weight.roll(weight.shape[1] // 2, dims=1) if weight.dim() == 4 else weight",
            "weight",
        ),
        (
            "importer-contracted",
            "segmentation_models.pytorch: the first block of a stage has half the dilation",
            '"contract_dilation": False,',
            '"contract_dilation": True,',
        ),
    ),
    *_in(
        "models/importers/torchvision.py",
        "tests/models/test_convert_torchvision.py",
        (
            "importer-lraspp",
            "torchvision's LR-ASPP is refused as a file of nobody's",
            '("backbone.", "classifier.cbr.")',
            '("backbone.", "classifier.low_classifier.cbr.")',
        ),
    ),
    *_in(
        "models/importers/mmsegmentation_config.py",
        _IMPORT,
        (
            "importer-corners",
            "mmsegmentation's networks are built with align_corners=True",
            '"align_corners": head.get("align_corners", False),\n        "dropout"',
            '"align_corners": head.get("align_corners", True),\n        "dropout"',
        ),
        (
            "config-classes",
            "a configuration's head may be another than the checkpoint's",
            'if _type(part) not in values["type"]:',
            'if "type" not in part:',
        ),
        (
            "config-multi-grid",
            "a configuration's multi-grid multiplies the dilation of the stage",
            "dilations = (*dilations[:3], 1)",
            "dilations = (*dilations[:3], dilations[3])",
        ),
        (
            "config-unknown",
            "arguments of a configuration that nothing here knows are ignored",
            "wrong += [argument for argument in part if argument not in known]",
            "wrong += [argument for argument in part if argument in ()]",
        ),
        (
            "config-statements",
            "a configuration's statements other than assignments are ignored",
            "names |= dict.fromkeys(mentioned, ",
            "names | dict.fromkeys(mentioned, ",
        ),
    ),
    *_in(
        "models/encoder.py",
        _IMPORT,
        (
            "encoder-hrnet-factors",
            "HRNets: a coarser branch is cut to the finer one's size, not resized",
            "resize(layer(x), like.shape[2:], align_corners=False)\n",
            "layer(x)[:, :, : like.shape[2], : like.shape[3]]\n",
        ),
    ),
    *_in(
        "models/importers/released_gald.py",
        _IMPORT,
        (
            "importer-gald-swapped",
            "GALD: the weights of theta and phi are exchanged",
            'theta",\n            "head.a2block.long_relation.p": '
            '"decoder.context.1.global_aggregation.phi"',
            'phi",\n            "head.a2block.long_relation.p": '
            '"decoder.context.1.global_aggregation.theta"',
        ),
        (
            "importer-gald-multi-grid",
            "GALD: imported without its multi-grid",
            '            "multi_grid": (1, 2, 4),\n',
            "",
        ),
    ),
    *_in(
        "models/convert.py",
        _IMPORT,
        (
            "convert-unexpected",
            "weights that the network has no place for are dropped in silence",
            "if missing or unexpected or misshapen:\n        raise _misfit",
            "if missing or misshapen:\n        raise _misfit",
        ),
        (
            "convert-names",
            "the error about weights too many spells our names, not theirs",
            "else unexpected).append(theirs)",
            "else unexpected).append(ours)",
        ),
        (
            "convert-unused",
            "load_backbone does not say what it left out of a whole network",
            "return [*unused, *others]",
            "return [*unused]",
        ),
        (
            "convert-averaged",
            "the averaged copies in a state dict are not taken",
            "tensors |= {name: tensors.pop(copy)",
            "tensors |= {copy: tensors.pop(copy)",
        ),
    ),
    *_in(
        "models/checksum.py",
        _IMPORT,
        (
            "check-range",
            "the image of a check is not divided by 255",
            "pixels / 255 - mean",
            "pixels - mean",
        ),
        (
            "check-classes",
            "a check counts the least likely class of each pixel",
            "logits.argmax(1)",
            "logits.argmin(1)",
        ),
    ),
    *_in(
        "models/checkpoint_files.py",
        _IMPORT,
        (
            "convert-unpickles",
            "a checkpoint may run code",
            "weights_only=True",
            "weights_only=False",
        ),
        (
            "convert-protocol",
            "a file of a newer protocol of pickle is refused for the wrong reason",
            "_PROTOCOLS = (2, 3)",
            "_PROTOCOLS = (2, 3, 4)",
        ),
        (
            "convert-legacy-objects",
            "objects in a file of an old torch are not found",
            "return pickles[-1]",
            "return pickles[0]",
        ),
    ),
]

_PAPERS = "tests/models/test_networks.py tests/models/test_papers.py tests/models/test_options.py"
_NETWORKS = [
    *_in(
        "models/encoder.py",
        "tests/models/test_encoder.py",
        (
            "encoder-padding-stays",
            "HRNets: the map keeps what the padding of the image added",
            "x[:, :, : (height + stride - 1) // stride, : (width + stride - 1) // stride]",
            "x",
        ),
        (
            "encoder-multi-grid",
            "multi_grid replaces the dilation of the stage",
            "_dilate(convolution, dilation * factor)",
            "_dilate(convolution, factor)",
        ),
        (
            "encoder-stage-dilations",
            "stage_dilations: the first block of a stage has all of the dilation",
            "_dilate(blocks[0][0], max(1, dilation // 2))",
            "_dilate(blocks[0][0], dilation)",
        ),
    ),
    *_in(
        "models/base.py",
        "tests/models/test_networks.py tests/models/test_registry.py tests/models/test_options.py",
        (
            "network-auxiliary-in-evaluation",
            "evaluation pays for the auxiliary head",
            "if self.training and self.auxiliary is not None:",
            "if self.auxiliary is not None:",
        ),
        (
            "network-corners",
            "align_corners is ignored when the logits are resized",
            'F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)',
            'F.interpolate(logits, size, mode="bilinear", align_corners=True)',
        ),
    ),
    *_in(
        "models/registry.py",
        "tests/models/test_registry.py",
        (
            "registry-sync-batchnorm",
            "sync_batchnorm is ignored",
            "    if sync_batchnorm:\n",
            "    if sync_batchnorm is None:\n",
        ),
        (
            "registry-shared-options",
            "what builder and network name reaches the builder alone",
            "shared |= {option: values[option] for option in _COMMON if option in values}",
            "shared |= {}",
        ),
        (
            "registry-defaults",
            "the defaults of a registration are ignored",
            "{**defaults, **entry.defaults}.items()",
            "defaults.items()",
        ),
        (
            "registry-encoder",
            "an argument beside an Encoder is dropped in silence",
            "if value != defaults[argument].default:",
            "if False:",
        ),
    ),
    *_in(
        "models/ann.py",
        "tests/models/test_ann.py",
        (
            "ann-dropout-without-fusion",
            "without a fusion there is a dropout more",
            "dropout if fusions else 0.0,",
            "dropout,",
        ),
    ),
    *_in(
        "models/danet.py",
        _PAPERS,
        (
            "danet-classifier",
            "the channel branch is judged by the classifier of the position branch",
            "self.channel_classifier(channel)",
            "self.position_classifier(channel)",
        ),
    ),
    *_in(
        "models/gff.py",
        "tests/models/test_gff.py",
        (
            "gff-context-level",
            "gated_fpn does not fuse the context map",
            '_PYRAMIDS = ("fpn", "gated_fpn")',
            '_PYRAMIDS = ("fpn",)',
        ),
    ),
    *_in(
        "models/mcibi.py",
        "tests/models/test_mcibi.py",
        (
            "mcibi-features-attached",
            "the features for the memory keep the graph",
            'output.auxiliary["first"], output.features = first, r.detach()',
            'output.auxiliary["first"], output.features = first, r',
        ),
    ),
    *_in(
        "models/pspnet.py",
        _PAPERS + " tests/models/test_registry.py",
        (
            "pspnet-activation",
            "branch_activation=False is ignored",
            "activation=branch_activation,",
            "activation=True,",
        ),
    ),
    *_in(
        "models/deeplabv3.py",
        "tests/test_defaults.py tests/models/test_convert.py",
        (
            "deeplab-dilations",
            "the default dilations are those of output stride 16",
            "dilations: Sequence[int] = (12, 24, 36)",
            "dilations: Sequence[int] = (6, 12, 18)",
        ),
    ),
    *_in(
        "models/non_local.py",
        _PAPERS + " tests/models/test_convert.py",
        (
            "nonlocal-network-flag",
            "use_scale=False is ignored",
            "scale=key_channels**-0.5 if use_scale else 1.0,",
            "scale=key_channels**-0.5,",
        ),
    ),
    *_in(
        "models/fcn.py",
        _PAPERS + " tests/models/test_convert.py",
        (
            "fcn-convolutions",
            "there is one convolution more than convolutions says",
            "for i in range(convolutions)",
            "for i in range(convolutions + 1)",
        ),
        (
            "fcn-dilation",
            "the convolutions of an FCN are not dilated",
            "norm_layer, dilation=dilation)",
            "norm_layer)",
        ),
    ),
]

_TRAINING = [
    *_in(
        "models/data/scenes.py",
        "tests/models/data/test_scenes.py",
        (
            "scenes-colour-tells",
            "the colour of the ground tells the place without the landmark",
            "canvas.colour(70, 150), _GROUND, True)",
            "canvas.colour(70, 150) - 9 * canvas.places[0], _GROUND, True)",
        ),
        (
            "scenes-one-place",
            "two zones are one place",
            "self.places[self.zone[x]]",
            "self.places[0]",
        ),
        (
            "right-places-other-pairs",
            "a house that is taken for a tree counts as one in the wrong place",
            " & (truth // 2 == predicted // 2)",
            "",
        ),
    ),
    *_in(
        "models/data/order.py",
        "tests/models/data/test_order.py",
        (
            "order-first-epoch-again",
            "every epoch sees the samples of the first one",
            "range(self.epoch * self.steps, (self.epoch + 1) * self.steps)",
            "range(self.steps)",
        ),
        (
            "order-processes",
            "all processes see the samples of the first one",
            "step * self.batch_size + self.rank * self.share",
            "step * self.batch_size",
        ),
    ),
    *_in(
        "models/data/files.py",
        "tests/models/data/test_files.py",
        (
            "files-bad-reported-always",
            "a pair that is passed over is reported in every epoch",
            "if not self._bad[index]:",
            "if True:",
        ),
        (
            "files-tiff-turned",
            "a TIFF that is to be turned is segmented as it is stored",
            'turned = "Orientation" in page.tags and page.tags["Orientation"].value != 1',
            "turned = False",
        ),
        (
            "files-tiff-lower-bits",
            "of a TIFF of 16 bits the lower 8 are used",
            "part >> 8 * (part.itemsize - 1)",
            "part",
        ),
    ),
    *_in(
        "models/training/datamodule.py",
        "tests/models/training/test_fit.py -k continues_bitwise",
        (
            "resumed-workers-first-epoch",
            "a resumed run with workers begins with the samples of the first epoch",
            "sampler.set_epoch(self._epoch)",
            "",
        ),
    ),
    *_in(
        "models/data/augment.py",
        "tests/models/data/test_augment.py",
        (
            "augment-first-instead-of-next",
            "one sample takes the place of all that are passed over",
            "(*range(first, len(self)), *range(first))",
            "(first, *range(len(self)))",
        ),
        (
            "augment-left-stays-left",
            "in a mirror image a left arm stays a left arm",
            "for left, right in self.mirrored:",
            "for left, right in ():",
        ),
        (
            "augment-labels-not-flipped",
            "a mirror image keeps its labels",
            "image, labels = image.flip(-1), labels.flip(-1)",
            "image, labels = image.flip(-1), labels",
        ),
        (
            "augment-padding-is-a-class",
            "padding counts as class 0",
            "transforms.pad(labels[None], padding, fill=IGNORE)[0]",
            "transforms.pad(labels[None], padding)[0]",
        ),
    ),
    *_in(
        "models/data/spec.py",
        "tests/models/data/test_files.py",
        (
            "spec-unknown-is-ignored",
            "numbers that the data set does not know are ignored without a word",
            "unknown = classes == _UNKNOWN",
            "unknown = classes == 1 << 14",
        ),
        (
            "spec-label-without-image",
            "a label without an image is passed over in silence",
            "for path in found - known",
            "for path in found & known",
        ),
    ),
    *_in(
        "models/data/coco_stuff.py",
        "tests/models/data/test_files.py",
        (
            "coco-stuff-numbers",
            "the numbers that no pixel has are not left out",
            "{number - 1: k for k, number in enumerate(_NUMBERS)}",
            "{k: k for k, number in enumerate(_NUMBERS)}",
        ),
    ),
    *_in(
        "models/data/pascal_context.py",
        "tests/models/data/test_files.py",
        (
            "pascal-context-59-background",
            "the background is the first of the 59 classes",
            "{0: IGNORE} | {k + 1: k for k in range(59)}",
            "{k: k for k in range(59)} | {59: IGNORE}",
        ),
    ),
    *_in(
        "models/training/losses.py",
        "tests/models/training/test_losses.py",
        (
            "loss-mean-over-ignored",
            "ignored pixels count in the mean",
            "return losses / (labels != IGNORE).sum().clamp_min(1)",
            "return losses / labels.numel()",
        ),
        (
            "ohem-share-of-all",
            "OHEM keeps a share of all pixels, ignored ones included",
            "rank < (keep * labelled.sum()).ceil()",
            "rank < keep * labelled.numel()",
        ),
    ),
    *_in(
        "models/training/metrics.py",
        "tests/models/training/test_metrics.py",
        (
            "absent-class-counts",
            "a class that no label has counts as 0 where it was predicted",
            "present = labelled > 0",
            "present = union > 0",
        ),
    ),
    *_in(
        "models/training/boundaries.py",
        "tests/models/training/test_boundaries.py",
        (
            "dilation-square",
            "the neighbourhood of a boundary is a square",
            "math.isqrt(radius**2 - dy**2)",
            "radius",
        ),
        (
            "boundary-f-precision-alone",
            "the F-score of a boundary knows no recall",
            "precision, recall = hits / count.clamp_min(1)",
            "precision = recall = (hits / count.clamp_min(1))[0]",
        ),
        (
            "region-one-sided",
            "a pixel is near a boundary on the side of the smaller class alone",
            "(largest != own) | (-negative != own)",
            "largest != own",
        ),
    ),
    *_in(
        "models/training/stages.py",
        "tests/models/training/test_stages.py",
        (
            "stage-from-nothing",
            "a stage does not start from the weights of the one before it",
            'yield [*told, "--model.init_from", str(weights)]',
            "yield told",
        ),
    ),
    *_in(
        "models/convert.py",
        "tests/models/test_load_weights.py",
        (
            "weights-in-part-unasked",
            "weights that do not fit are left out where all were asked for",
            "if (strict and left) or not fitting:",
            "if not fitting:",
        ),
    ),
    *_in(
        "models/training/optimization.py",
        "tests/models/training/test_optimization.py",
        (
            "norms-decay",
            "decay_norms=False is ignored",
            '{"params": flat, "weight_decay": 0.0},',
            '{"params": flat},',
        ),
    ),
    *_in(
        "models/pictures/attention.py",
        "tests/models/test_pictures.py -k criss_cross",
        (
            "look-first-round-alone",
            "the picture after two recurrences is that after the last one alone",
            "for query, key in rounds:",
            "for query, key in rounds[-1:]:",
        ),
    ),
    *_in(
        "models/pictures/gates.py",
        "tests/models/test_pictures.py -k gates",
        (
            "look-gates-stay-open",
            "closing a gate closes the first one",
            'options | {"closed": (level,)}',
            'options | {"closed": (0,)}',
        ),
    ),
    *_in(
        "models/pictures/inside.py",
        "tests/models/test_pictures.py -k receptive",
        (
            "look-field-of-all-classes",
            "the receptive field is that of the sum of all scores",
            "image)[0, :, at[0], at[1]].max()",
            "image)[0, :, at[0], at[1]].sum()",
        ),
    ),
    *_in(
        "models/inference.py",
        "tests/models/test_inference.py",
        (
            "tiles-without-halo",
            "the encoder sees nothing around a tile below and on the right",
            "image[:, :, top : bottom + halo, left : right + halo]",
            "image[:, :, top:bottom, left:right]",
        ),
        (
            "flip-stays-mirrored",
            "scores of the mirror image are not mirrored back",
            "passes.append(_mirrored(rows) if mirrored else rows)",
            "passes.append(rows)",
        ),
        (
            "sliding-rows-kept",
            "rows of the sum over windows are counted twice",
            "unfinished = total[:, :, finished:]",
            "unfinished = total",
        ),
        (
            "decoder-bands-halo",
            "the decoder sees nothing around a band",
            "return map_in_bands(predict, maps, rows, around, multiples)",
            "return map_in_bands(predict, maps, rows, 0, multiples)",
        ),
    ),
    *_in(
        "ctxops/nn/resize.py",
        "tests/models/test_inference.py tests/nn/test_bands.py",
        (
            "bands-corners",
            "align_corners=True is ignored along the height",
            "    if align_corners:\n        position = row",
            "    if not align_corners:\n        position = row",
        ),
    ),
    *_in(
        "ctxops/nn/bands.py",
        "tests/nn/test_bands.py",
        (
            "bands-count-halos",
            "sums over positions count the rows of the halo too",
            "part = summand(*map(self.core, maps))",
            "part = summand(*maps)",
        ),
        (
            "bands-trust-derived",
            "a forward that overrides the known one is taken in bands",
            'if "forward" in vars(kind) or "predict" in vars(kind):',
            "if kind is nn.Module:",
        ),
        (
            "bands-place",
            "a grid of the whole image is resized as if each band were the first",
            "rows = range(place.first, place.first + height)",
            "rows = range(height)",
        ),
    ),
]

FAULTS = [
    *_CPU,
    *_CUDA,
    *_TRITON,
    *_OPS,
    *_MODULES,
    *_IMPORTERS,
    *_NETWORKS,
    *_TRAINING,
]

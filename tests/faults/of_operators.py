# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults of the operators in Python."""

from faults.fault import faults_in

OPERATORS = [
    *faults_in(
        "ctxops/_layout.py",
        "tests/test_library.py tests/ops/test_asymmetric_attention.py",
        (
            "library-ambiguous-format",
            "a contiguous map of one channel comes out channels_last",
            "if x.is_contiguous() or is_transformed():",
            "if is_transformed():",
        ),
    ),
    *faults_in(
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
    *faults_in(
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
    *faults_in(
        "ctxops/_checks.py",
        "tests/test_library.py tests/ops/test_asymmetric_attention.py",
        (
            "library-forward-mode",
            "forward-mode derivatives are silently zero",
            "if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:",
            "if tensor is None and forward_ad.unpack_dual(tensor).tangent is not None:",
        ),
    ),
    *faults_in(
        "ctxops/ops/asymmetric_attention/op.py",
        "tests/ops/test_asymmetric_attention.py tests/ops/test_memory.py tests/test_flops.py",
        (
            "anchors-backward-flops",
            "FlopCounterMode counts one product of the backward less",
            "(2 if len(kept) == 3 else 3) * channels",
            "2 * channels",
        ),
        (
            "anchors-kept-always",
            "all weights are kept for the backward, however large they are",
            "save = save and math.prod(kept) * dtype.itemsize <= KEPT_BYTES",
            "pass",
        ),
        (
            "anchors-one-block",
            "the CPU takes the logits of all positions at once: memory grows with the map",
            "most = max(1, min(most, BLOCK_POSITIONS))",
            "most = positions",
        ),
        (
            "anchors-last-block",
            "several blocks: the gradient of the keys is that of the last",
            "dk.addmm_(q_block.t(), dlogits)",
            "torch.mm(q_block.t(), dlogits, out=dk)",
        ),
        (
            "anchors-padding",
            "the anchors added to fill lines of the cache take a share of the weights",
            "(0, missing), value=-math.inf)",
            "(0, missing))",
        ),
    ),
    *faults_in(
        "ctxops/ops/nonlocal_attention/op.py",
        "tests/ops/test_nonlocal_attention.py",
        (
            "nonlocal-scale-zero",
            "scale=0.0 is taken for the default",
            "(q, k, _sequence(v, head), scale=scale)",
            "(q, k, _sequence(v, head), scale=scale or None)",
        ),
    ),
    *faults_in(
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
    *faults_in(
        "ctxops/ops/criss_cross_attention/op.py",
        "tests/ops/test_memory.py -k criss",
        (
            "cross-block-rounding",
            "a block of lines takes up to twice its bytes",
            "most = max(1, BLOCK_BYTES // (values * lines.element_size()))",
            "most = 1 + BLOCK_BYTES // (values * lines.element_size())",
        ),
    ),
    *faults_in(
        "csrc/common/transpose.h",
        "tests/ops/test_criss_cross_attention.py",
        (
            "cross-turn-lanes",
            "two vectors exchange the same halves twice",
            "kUpper ? (second ? lane + lanes : lane + kWidth)",
            "kUpper ? (second ? lane + lanes : lane)",
        ),
        (
            "cross-turn-rest",
            "the last columns, which fill no vector, are left out",
            "for (; left < width; ++left) {",
            "for (; left + kSide <= width; ++left) {",
        ),
    ),
    *faults_in(
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
    *faults_in(
        "ctxops/ops/neighborhood_attention/reference.py",
        "tests/compat/test_natten.py",
        (
            "natten-dilated-bias",
            "the bias is taken by positions, not by steps of the dilation",
            "positions // dilation - own // dilation + kernel - 1",
            "positions - own + kernel - 1",
        ),
    ),
    *faults_in(
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
    *faults_in(
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
    *faults_in(
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
    *faults_in(
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
    *faults_in(
        "ctxops/ops/category_context/op.py",
        "tests/ops/test_category_context.py",
        (
            "context-softmax-axis",
            "channels_last: the softmax is over the columns instead of the classes",
            "weights = logits.permute(0, 2, 3, 1).softmax(dim=3)",
            "weights = logits.permute(0, 2, 3, 1).softmax(dim=2)",
        ),
    ),
    *faults_in(
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

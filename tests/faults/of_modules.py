# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults of the modules."""

from faults.fault import faults_in

MODULES = [
    *faults_in(
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
    *faults_in(
        "ctxops/_torch.py",
        "tests/models/test_sharded.py",
        (
            "sharded-methods",
            "a method besides forward has no weights in a unit of fully_shard",
            "if fsdp and isinstance(module, fsdp.FSDPModule) and",
            "if False and",
        ),
    ),
    *faults_in(
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
    *faults_in(
        "ctxops/nn/pointwise.py",
        "tests/nn/test_local_distribution.py tests/nn/test_non_local.py",
        (
            "pointwise-order-of-parts",
            "the first map of a concatenation is left out",
            "for x, weight in zip(maps[:-1], parts, strict=True):",
            "for x, weight in zip(maps[1:], parts, strict=True):",
        ),
    ),
    *faults_in(
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
    *faults_in(
        "ctxops/patching/__init__.py",
        "tests/test_patching.py",
        (
            "patching-replaced-forward",
            "a forward that another tool has put into a module is lost",
            'if "forward" in module.__dict__:',
            "if False:",
        ),
    ),
    *faults_in(
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
    *faults_in(
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
    *faults_in(
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
    *faults_in(
        "ctxops/nn/dense_aspp.py",
        "tests/nn/test_dense_aspp.py tests/nn/test_contexts.py",
        (
            "dense-aspp-order",
            "what a block adds stands behind its input",
            "x = torch.cat([block(x), x], dim=1)",
            "x = torch.cat([x, block(x)], dim=1)",
        ),
    ),
    *faults_in(
        "ctxops/nn/dual_attention.py",
        "tests/nn/test_dual_attention.py",
        (
            "dual-channel-sign",
            "channels attend to those that resemble them, not to the others",
            "weights = total(_products, x).neg().softmax(dim=2)",
            "weights = total(_products, x).softmax(dim=2)",
        ),
    ),
    *faults_in(
        "ctxops/nn/disentangled_non_local.py",
        "tests/nn/test_disentangled_non_local.py",
        (
            "disentangled-flag",
            "use_scale=False is ignored",
            "scale = (self.key_channels**-0.5 if self.use_scale else 1.0) / self.temperature",
            "scale = self.key_channels**-0.5 / self.temperature",
        ),
    ),
    *faults_in(
        "ctxops/nn/cgnl.py",
        "tests/nn/test_cgnl.py",
        (
            "cgnl-half-affinity",
            "half precision: the affinity leaves the range",
            "return (phi.to(torch.promote_types(phi.dtype, torch.float32)) * g).sum((2, 3, 4))",
            "return (phi * g).sum((2, 3, 4))",
        ),
    ),
    *faults_in(
        "ctxops/nn/criss_cross.py",
        "tests/nn/test_criss_cross.py",
        (
            "cross-recurrence",
            "recurrence is ignored",
            "for _ in range(self.recurrence):",
            "for _ in range(2):",
        ),
    ),
    *faults_in(
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
    *faults_in(
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
    *faults_in(
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
    *faults_in(
        "ctxops/nn/feature_fusion.py",
        "tests/nn/test_gated_fusion.py",
        (
            "fpn-order",
            "the levels of a feature pyramid come back in reverse",
            "return tuple(reversed(fused))",
            "return tuple(fused)",
        ),
    ),
    *faults_in(
        "ctxops/nn/global_convolution.py",
        "tests/nn/test_global_convolution.py",
        (
            "gcn-orders",
            "both branches are vertical first",
            "first, second = shapes if vertical_first else reversed(shapes)",
            "first, second = shapes",
        ),
    ),
    *faults_in(
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
    *faults_in(
        "ctxops/nn/object_context.py",
        "tests/nn/test_object_context.py",
        (
            "object-scale",
            "scale is ignored",
            "weights = softmax_over_positions(self.scale * logits)",
            "weights = softmax_over_positions(logits)",
        ),
    ),
    *faults_in(
        "ctxops/nn/pointwise_spatial_attention.py",
        "tests/nn/test_pointwise_spatial_attention.py",
        (
            "psa-collect-transposed",
            "collecting positions distribute",
            "collected.mT.softmax(dim=2)",
            "collected.softmax(dim=2)",
        ),
    ),
    *faults_in(
        "ctxops/nn/adaptive_context.py",
        "tests/nn/test_adaptive_context.py",
        (
            "adaptive-image",
            "the affinity does not see the image's mean",
            "self.affinity(x + self.image(F.adaptive_avg_pool2d(x, 1)))",
            "self.affinity(x)",
        ),
    ),
    *faults_in(
        "ctxops/nn/pyramid_pooling.py",
        "tests/nn/test_pyramid_pooling.py tests/test_defaults.py",
        (
            "ppm-corners-default",
            "the default of align_corners is True",
            "align_corners: bool = False",
            "align_corners: bool = True",
        ),
    ),
    *faults_in(
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
    *faults_in(
        "ctxops/nn/asymmetric_context.py",
        "tests/nn/test_asymmetric_context.py",
        (
            "fused-context-dropout",
            "the dropout follows the reduction",
            "self.context(self.reduce(self.dropout(self.fusion(*maps))))",
            "self.context(self.dropout(self.reduce(self.fusion(*maps))))",
        ),
    ),
    *faults_in(
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
    *faults_in(
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

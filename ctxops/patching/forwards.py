# SPDX-License-Identifier: Apache-2.0
"""What computes the known modules: ``self`` is theirs, and so are the names of the arguments."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ctxops.nn import disentangled_non_local, dual_attention
from ctxops.nn.folding import is_cheaper, on_anchors
from ctxops.nn.plain import is_plain, is_unwatched
from ctxops.nn.pointwise import accumulate, convolve_concatenation, is_readable, pointwise
from ctxops.nn.pyramid_pooling import pyramid_grids
from ctxops.nn.resize import resize_like
from ctxops.ops.asymmetric_attention import asymmetric_attention
from ctxops.ops.criss_cross_attention import criss_cross_attention
from ctxops.ops.nonlocal_attention import nonlocal_attention
from ctxops.ops.pyramid_pool import pyramid_pool

_PYRAMIDS = (
    "mmseg.models.decode_heads.ann_head.PPMConcat",
    "ssseg.modules.models.segmentors.annnet.ppm.PPMConcat",
)


def class_name(module: nn.Module) -> str:
    """The name of its class, with the package and file that it comes from."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


# Non-local blocks


def criss_cross(self: Any, x: Tensor) -> Tensor:
    query, key, value = (
        _call(child, x) for child in (self.query_conv, self.key_conv, self.value_conv)
    )
    return self.gamma(criss_cross_attention(query, key, value, scale=1.0)) + x


def non_local(self: Any, x: Tensor) -> Tensor:
    value = _call(self.g, x)
    if self.mode == "gaussian":
        query, key, scale = x, self.phi(x) if self.sub_sample else x, 1.0
    else:
        query, key, scale = _call(self.theta, x), _call(self.phi, x), _non_local_scale(self)
    return x + _call(self.conv_out, nonlocal_attention(query, key, value, scale=scale))


def disentangled(self: Any, x: Tensor) -> Tensor:
    children = (self.theta, self.phi, self.g, self.conv_mask)
    query, key, value, mask = (_call(child, x) for child in children)
    scale = _non_local_scale(self) / self.temperature
    attended = disentangled_non_local.disentangled_attention(query, key, value, mask, scale)
    return x + _call(self.conv_out, attended)


def _non_local_scale(self: Any) -> float:
    return self.inter_channels**-0.5 if self.use_scale else 1.0


def normed_non_local(self: Any, x: Tensor) -> Tensor:
    query, key, value = (_call(child, x) for child in (self.t, self.p, self.g))
    attended = nonlocal_attention(query, key, value, scale=self.scale)
    return self.norm(_call(self.z, attended)) + x


def position_attention(self: Any, x: Tensor) -> Tensor:
    return self.gamma(_attend(self, x, x)) + x


def channel_attention(self: Any, x: Tensor) -> Tensor:
    return self.gamma(dual_attention.channel_attention(x)) + x


# Attention to anchors


def self_attention(self: Any, query_feats: Tensor, key_feats: Tensor) -> Tensor:
    return _attend(self, query_feats, key_feats)


def object_attention(self: Any, query_feats: Tensor, key_feats: Tensor) -> Tensor:
    context = _attend(self, query_feats, key_feats)
    first, *rest = _steps(self.bottleneck, query_feats)
    return _run(rest, convolve_concatenation(first, context, query_feats))


def asymmetric_fusion(self: Any, low_feats: Tensor, high_feats: Tensor) -> Tensor:
    return _fuse_contexts(self, high_feats, low_feats)


def asymmetric_pyramid(self: Any, feats: Tensor) -> Tensor:
    return _fuse_contexts(self, feats, feats)


def _fuse_contexts(self: Any, x: Tensor, context: Tensor) -> Tensor:
    """``bottleneck(cat([sum of the stages, x]))``; the concatenation's convolution is split."""
    first, *rest = _steps(self.bottleneck, x)
    if not is_readable(first, x):
        attended = sum(stage(x, context) for stage in self.stages)
        return self.bottleneck(torch.cat([attended, x], dim=1))
    channels = x.shape[1]
    parts = first.weight.split([first.in_channels - channels, channels], dim=1)
    y = pointwise(x, parts[1], first.bias)
    for stage in self.stages:
        forward = stage.__dict__.get("forward")
        if getattr(forward, "func", None) is self_attention and is_unwatched(stage):
            y = accumulate(y, _attend(stage, x, context, parts[0]))
        else:
            y = accumulate(y, pointwise(stage(x, context), parts[0]))
    return _run(rest, y)


def _attend(self: Any, x: Tensor, context: Tensor, weight: Tensor | None = None) -> Tensor:
    """The self-attention of ``x`` to the context; ``weight``: of a 1 x 1 convolution behind it."""
    scale = 1.0
    if self.matmul_norm:
        scale = getattr(self, "transform_channels", None) or self.channels
        scale **= -0.5
    query = _call(self.query_project, x)
    shared = self.key_project is self.query_project and context is x
    if shared and all(
        not child.training and is_plain(child, type(child)) for child in self.key_project.modules()
    ):
        key = query  # in training its norm counts the map twice, and hooks are to fire twice
    else:
        key = _call(self.key_project, context)

    sizes = _grids(self.key_downsample)
    if self.key_downsample is None and context.shape[3] > 1:
        value = _call(self.value_project, context)
        if query.is_cuda or query.shape[1] == value.shape[1]:
            attended = nonlocal_attention(query, key, value, scale=scale)
        else:
            # The fused kernel of the CPU pads all to one width: 64 and 512 channels at 64 x 64 take
            # it 839 ms, and blocks 390.
            anchors = key.flatten(2), value.flatten(2)
            attended = asymmetric_attention(query, *anchors, scale=scale)
        return _project(self.out_project, attended, weight)

    def pool(x: Tensor) -> Tensor:
        if sizes:
            return pyramid_pool(x, sizes)
        return (x if self.key_downsample is None else self.key_downsample(x)).flatten(2)

    values = _linear(self.value_project, x)
    if sizes and values is not None:
        value = on_anchors(values, pool(context))
    else:
        value = pool(_call(self.value_project, context))
    out, folded = self.out_project, _linear(self.out_project, x)
    # The weights of a position sum to one: so do what follows them on the anchors.
    if folded is not None and is_cheaper(value.shape[2], folded.in_channels, folded.out_channels):
        value, out = on_anchors(folded, value), None
    if out is None and weight is not None:
        value, weight = pointwise(value.unsqueeze(3), weight).squeeze(3), None
    attended = asymmetric_attention(query, pool(key), value, scale=scale)
    return _project(out, attended, weight)


def _project(out: nn.Module | None, x: Tensor, weight: Tensor | None) -> Tensor:
    x = x if out is None else _call(out, x)
    return x if weight is None else pointwise(x, weight)


def _grids(pool: Any) -> list[int]:
    """The sizes n of a plain pyramid that flattens and concatenates its n x n means, or none."""
    if pool is None or class_name(pool) not in _PYRAMIDS or not is_plain(pool, type(pool)):
        return []
    sizes = [_grid(child) for child in getattr(pool, "pool_nets", pool)]
    return [] if 0 in sizes else sizes


# Pyramid pooling


def pyramid_maps(self: Any, x: Tensor) -> list[Tensor]:
    return _pyramid(self, x, self.align_corners)


def pyramid_context(self: Any, x: Tensor) -> Tensor:
    maps = _pyramid(self.branches, x, self.align_corners)
    return self.bottleneck(torch.cat([x, *maps], dim=1))


def pyramid_blocks(self: Any, x: Tensor) -> Tensor:
    branches = [block.pool if is_plain(block, type(block)) else block for block in self.blocks]
    return torch.cat([*_pyramid(branches, x, True), x], dim=1)


def _pyramid(branches: Iterable[Any], x: Tensor, align_corners: bool) -> list[Tensor]:
    """What each branch makes of the map, in its size; one pass takes the means of plain ones."""
    sizes = [_grid(b[0]) if is_plain(b, nn.Sequential) and len(b) else 0 for b in branches]
    pooled = iter(pyramid_grids(x, [n for n in sizes if n]) if any(sizes) else ())
    maps = []
    for branch, n in zip(branches, sizes, strict=True):
        y = _run(list(branch)[1:], next(pooled)) if n else branch(x)
        maps.append(resize_like(y, x, align_corners))
    return maps


def _grid(pool: nn.Module) -> int:
    """The n of a plain average pooling to n x n positions; 0 for anything else."""
    if not is_plain(pool, nn.AdaptiveAvgPool2d):
        return 0
    size = pool.output_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return height if height == width and height is not None else 0


# Their children


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, its plain 1 x 1 convolutions in the product that suits the map."""
    return _run(_steps(module, x), x)


def _run(steps: Iterable[nn.Module], x: Tensor) -> Tensor:
    for step in steps:
        x = pointwise(x, step.weight, step.bias) if is_readable(step, x) else step(x)
    return x


def _linear(module: nn.Module | None, like: Tensor) -> nn.Conv2d | None:
    """The 1 x 1 convolution that the module is, if its weights may be read."""
    steps = [] if module is None else _steps(module, like)
    return steps[0] if len(steps) == 1 and is_readable(steps[0], like) else None


def _steps(module: Any, like: Tensor) -> list[nn.Module]:
    """The modules that a plain sequence calls one after another; any other module is one step."""
    if is_plain(module, nn.Sequential):
        return [step for child in module for step in _steps(child, like)]
    if (
        class_name(module) == "mmcv.cnn.bricks.conv_module.ConvModule"
        and is_plain(module, type(module))
        and module.order == ("conv", "norm", "act")
        and not module.with_explicit_padding
        and getattr(module, "efficient_conv_bn_eval_forward", None) is None
    ):
        parts = [module.conv]
        parts += [module.norm] if module.with_norm else []
        return parts + ([module.activate] if module.with_activation else [])
    return [module]

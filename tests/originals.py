# SPDX-License-Identifier: Apache-2.0
"""What ``ctxops.patch`` knows of other packages, in plain torch, under the names of their classes.

Names, children and arguments are theirs; the computation is written out here.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = {}


def published(name):
    """Makes a class look as if the package had defined it."""

    def rename(cls):
        cls.__module__, _, cls.__qualname__ = name.rpartition(".")
        own = cls.__dict__.get("forward")
        if own is not None:
            scope = {**own.__globals__, "__name__": cls.__module__}
            cls.forward = types.FunctionType(
                own.__code__, scope, own.__name__, own.__defaults__, own.__closure__
            )
        CLASSES[name] = cls
        return cls

    return rename


def attend(query, key, value, scale=1.0):
    """Softmax attention of maps, by the N x S matrix."""
    q, k, v = (x.flatten(2) for x in (query, key, value))
    weights = (scale * q.transpose(1, 2) @ k).softmax(dim=2)
    return (v @ weights.transpose(1, 2)).unflatten(2, query.shape[2:])


@published("mmcv.cnn.bricks.scale.Scale")
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return x * self.scale


@published("mmcv.cnn.bricks.conv_module.ConvModule")
class ConvModule(nn.Module):
    def __init__(self, channels, out_channels, norm=True, act=True, kernel_size=1):
        super().__init__()
        self.with_norm, self.with_activation = norm, act
        self.with_explicit_padding, self.order = False, ("conv", "norm", "act")
        padding = kernel_size // 2
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, padding=padding, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(out_channels)
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return self.bn

    def forward(self, x, activate=True, norm=True):
        steps = {"conv": self.conv}
        if self.with_norm:
            steps["norm"] = self.bn
        if self.with_activation:
            steps["act"] = self.activate
        for name in self.order:
            x = steps[name](x) if name in steps else x
        return x


def sequence(channels, out_channels, norm=True, act=True, kernel_size=1):
    """What sssegmentation has where mmsegmentation has a ConvModule."""
    convolution = nn.Conv2d(
        channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm
    )
    layers = [convolution, *[nn.BatchNorm2d(out_channels)] * norm, *[nn.ReLU(inplace=True)] * act]
    return nn.Sequential(*layers)


@published("mmcv.ops.cc_attention.CrissCrossAttention")
class CrissCrossAttention(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.query_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.key_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = Scale()

    def forward(self, x):
        height, width = x.shape[2:]
        row, column = torch.arange(height), torch.arange(width)
        same_row = (row[:, None] == row).repeat_interleave(width, 0).repeat_interleave(width, 1)
        cross = same_row | (column[:, None] == column).repeat(height, height)
        q, k, v = (f(x).flatten(2) for f in (self.query_conv, self.key_conv, self.value_conv))
        logits = (q.transpose(1, 2) @ k).masked_fill(~cross, float("-inf"))
        y = (v @ logits.softmax(2).transpose(1, 2)).unflatten(2, x.shape[2:])
        return self.gamma(y) + x


class _NonLocal(nn.Module):
    def build(self, channels, block, mode="embedded_gaussian", use_scale=True, sub_sample=False):
        self.mode, self.use_scale, self.sub_sample = mode, use_scale, sub_sample
        self.in_channels, self.inter_channels = channels, channels // 2
        pool = [nn.MaxPool2d(2)] * sub_sample

        def projection():
            made = block(channels, channels // 2, False, False)
            return nn.Sequential(made, *pool) if pool else made

        self.g = projection()
        self.conv_out = block(channels // 2, channels, True, False)
        if mode != "gaussian":
            self.theta, self.phi = block(channels, channels // 2, False, False), projection()
        elif sub_sample:
            self.phi = pool[0]

    def forward(self, x):
        if self.mode == "gaussian":
            query, key, scale = x, self.phi(x) if self.sub_sample else x, 1.0
        else:
            query, key = self.theta(x), self.phi(x)
            scale = self.inter_channels**-0.5 if self.use_scale else 1.0
        return x + self.conv_out(attend(query, key, self.g(x), scale))


@published("mmcv.cnn.bricks.non_local.NonLocal2d")
class NonLocal2d(_NonLocal):
    def __init__(self, channels, **options):
        super().__init__()
        self.build(channels, ConvModule, **options)


@published("ssseg.modules.models.segmentors.nonlocalnet.nonlocalblock.NonLocal2d")
class NonLocal2dOfSequences(_NonLocal):
    def __init__(self, channels, mode="embeddedgaussian", **options):
        super().__init__()
        self.build(channels, sequence, mode, **options)


def disentangled(self, x):
    query, key, value = self.theta(x), self.phi(x), self.g(x)
    query = query - query.mean((2, 3), keepdim=True)
    key = key - key.mean((2, 3), keepdim=True)
    scale = (self.inter_channels**-0.5 if self.use_scale else 1.0) / self.temperature
    weights = self.conv_mask(x).flatten(2).softmax(2)
    unary = (value.flatten(2) * weights).sum(2)[:, :, None, None]
    return x + self.conv_out(attend(query, key, value, scale) + unary)


@published("mmseg.models.decode_heads.dnl_head.DisentangledNonLocal2d")
class Disentangled(NonLocal2d):
    def __init__(self, channels, temperature=0.05, **options):
        super().__init__(channels, **options)
        self.temperature, self.conv_mask = temperature, nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        return disentangled(self, x)


@published("ssseg.modules.models.segmentors.dnlnet.dnlblock.DisentangledNonLocal2d")
class DisentangledOfSequences(NonLocal2dOfSequences):
    def __init__(self, channels, temperature=0.05, **options):
        super().__init__(channels, **options)
        self.temperature, self.conv_mask = temperature, nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        return disentangled(self, x)


class _SelfAttention(nn.Module):
    """Query, key, value and out; each of ``convs`` blocks, or a bare convolution without norm."""

    def build(
        self, block, key_channels, query_channels, channels, out_channels, share=False, pool=None,
        convs=1, key_norm=True, value_norm=False, scaled=True, with_out=True, bias=True,
    ):  # fmt: skip
        def project(channels, out_channels, count, norm):
            if not norm:
                return nn.Conv2d(channels, out_channels, 1, bias=bias)
            made = [block(channels if i == 0 else out_channels, out_channels) for i in range(count)]
            return made[0] if count == 1 else nn.Sequential(*made)

        self.key_project = project(key_channels, channels, convs, key_norm)
        self.query_project = (
            self.key_project if share else project(query_channels, channels, convs, key_norm)
        )
        width = channels if with_out else out_channels
        self.value_project = project(key_channels, width, 1, value_norm)
        self.out_project = project(channels, out_channels, 1, value_norm) if with_out else None
        self.query_downsample, self.key_downsample, self.matmul_norm = None, pool, scaled

    def forward(self, query_feats, key_feats):
        query = self.query_project(query_feats)
        key, value = self.key_project(key_feats), self.value_project(key_feats)
        if self.key_downsample is not None:
            key, value = self.key_downsample(key), self.key_downsample(value)
        y = attend(query, key, value, self.width**-0.5 if self.matmul_norm else 1.0)
        return y if self.out_project is None else self.out_project(y)


@published("mmseg.models.utils.self_attention_block.SelfAttentionBlock")
class SelfAttentionBlock(_SelfAttention):
    def __init__(self, key_channels, query_channels, channels, *args, **options):
        super().__init__()
        self.width = self.channels = channels
        self.build(ConvModule, key_channels, query_channels, channels, *args, **options)


@published("ssseg.modules.models.segmentors.base.selfattention.SelfAttentionBlock")
class SelfAttentionOfSequences(_SelfAttention):
    def __init__(self, key_channels, query_channels, channels, *args, **options):
        super().__init__()
        self.width = self.transform_channels = channels
        self.build(sequence, key_channels, query_channels, channels, *args, bias=False, **options)


@published("mmseg.models.decode_heads.ann_head.PPMConcat")
class PPMConcat(nn.ModuleList):
    def __init__(self, sizes):
        super().__init__([nn.AdaptiveAvgPool2d(n) for n in sizes])

    def forward(self, feats):
        return torch.cat([pool(feats).flatten(2) for pool in self], dim=2)


@published("ssseg.modules.models.segmentors.annnet.ppm.PPMConcat")
class PPMConcatOfNets(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.pool_nets = nn.ModuleList([nn.AdaptiveAvgPool2d(n) for n in sizes])

    def forward(self, x):
        return torch.cat([pool(x).flatten(2) for pool in self.pool_nets], dim=2)


@published("mmseg.models.decode_heads.ann_head.SelfAttentionBlock")
class AnchorAttention(SelfAttentionBlock):
    def __init__(self, low, high, channels, out_channels, share, sizes):
        super().__init__(low, high, channels, out_channels, share, PPMConcat(sizes))


def fuse(self, query_feats, key_feats):
    context = sum(stage(query_feats, key_feats) for stage in self.stages)
    return self.bottleneck(torch.cat([context, query_feats], dim=1))


@published("mmseg.models.decode_heads.ann_head.AFNB")
class AFNB(nn.Module):
    def __init__(self, low, high, channels, out_channels, stages=1, sizes=(1, 3)):
        super().__init__()
        self.stages = nn.ModuleList(
            AnchorAttention(low, high, channels, out_channels, False, sizes) for _ in range(stages)
        )
        self.bottleneck = ConvModule(out_channels + high, out_channels, act=False)

    def forward(self, low_feats, high_feats):
        return fuse(self, high_feats, low_feats)


@published("mmseg.models.decode_heads.ann_head.APNB")
class APNB(nn.Module):
    def __init__(self, in_channels, channels, out_channels, stages=1, sizes=(1, 3)):
        super().__init__()
        self.stages = nn.ModuleList(
            AnchorAttention(in_channels, in_channels, channels, out_channels, True, sizes)
            for _ in range(stages)
        )
        self.bottleneck = ConvModule(2 * in_channels, out_channels)

    def forward(self, feats):
        return fuse(self, feats, feats)


@published("ssseg.modules.models.segmentors.annnet.afnblock.AFNBlock")
class AFNBlock(nn.Module):
    def __init__(self, low, high, channels, out_channels, sizes=(1, 3)):
        super().__init__()
        pool = PPMConcatOfNets(sizes)
        stage = SelfAttentionOfSequences(low, high, channels, out_channels, False, pool)
        self.stages = nn.ModuleList([stage])
        self.bottleneck = sequence(out_channels + high, out_channels, act=False)

    def forward(self, low_feats, high_feats):
        return fuse(self, high_feats, low_feats)


@published("ssseg.modules.models.segmentors.annnet.apnblock.APNBlock")
class APNBlock(nn.Module):
    def __init__(self, in_channels, channels, out_channels, sizes=(1, 3)):
        super().__init__()
        pool = PPMConcatOfNets(sizes)
        stage = SelfAttentionOfSequences(
            in_channels, in_channels, channels, out_channels, True, pool
        )
        self.stages = nn.ModuleList([stage])
        self.bottleneck = sequence(2 * in_channels, out_channels)

    def forward(self, feats):
        return fuse(self, feats, feats)


_POSITION = {"key_norm": False, "scaled": False, "with_out": False}


@published("mmseg.models.decode_heads.da_head.PAM")
class PAM(SelfAttentionBlock):
    def __init__(self, in_channels, channels):
        super().__init__(in_channels, in_channels, channels, in_channels, **_POSITION)
        self.gamma = Scale()

    def forward(self, x):
        return self.gamma(super().forward(x, x)) + x


@published("ssseg.modules.models.segmentors.danet.pam.PositionAttentionModule")
class PositionAttentionModule(SelfAttentionOfSequences):
    def __init__(self, in_channels, channels):
        super().__init__(in_channels, in_channels, channels, in_channels, **_POSITION)
        self.gamma = Scale()

    def forward(self, x):
        return self.gamma(super().forward(x, x)) + x


class _ChannelAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = Scale()


def attend_channels(self, x):
    rows = x.flatten(2)
    products = rows @ rows.transpose(1, 2)
    weights = (products.amax(2, keepdim=True) - products).softmax(2)
    return self.gamma((weights @ rows).unflatten(2, x.shape[2:])) + x


@published("mmseg.models.decode_heads.da_head.CAM")
class CAM(_ChannelAttention):
    def forward(self, x):
        return attend_channels(self, x)


@published("ssseg.modules.models.segmentors.danet.cam.ChannelAttentionModule")
class ChannelAttentionModule(_ChannelAttention):
    def forward(self, x):
        return attend_channels(self, x)


_OBJECT = {"convs": 2, "value_norm": True}


@published("mmseg.models.decode_heads.ocr_head.ObjectAttentionBlock")
class ObjectAttentionBlock(SelfAttentionBlock):
    def __init__(self, in_channels, channels):
        super().__init__(in_channels, in_channels, channels, in_channels, **_OBJECT)
        self.bottleneck = ConvModule(2 * in_channels, in_channels)

    def forward(self, query_feats, key_feats):
        context = super().forward(query_feats, key_feats)
        return self.bottleneck(torch.cat([context, query_feats], dim=1))


@published("ssseg.modules.models.segmentors.ocrnet.objectcontext.ObjectContextBlock")
class ObjectContextBlock(SelfAttentionOfSequences):
    def __init__(self, in_channels, channels):
        super().__init__(in_channels, in_channels, channels, in_channels, **_OBJECT)
        self.bottleneck = sequence(2 * in_channels, in_channels, kernel_size=3)

    def forward(self, query_feats, key_feats):
        context = super().forward(query_feats, key_feats)
        return self.bottleneck(torch.cat([context, query_feats], dim=1))


def resized(x, like, align_corners):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)


@published("mmseg.models.decode_heads.psp_head.PPM")
class PPM(nn.ModuleList):
    def __init__(self, sizes, in_channels, channels, align_corners=False):
        branches = [(nn.AdaptiveAvgPool2d(n), ConvModule(in_channels, channels)) for n in sizes]
        super().__init__(nn.Sequential(*branch) for branch in branches)
        self.align_corners = align_corners

    def forward(self, x):
        return [resized(branch(x), x, self.align_corners) for branch in self]


@published("ssseg.modules.models.segmentors.pspnet.ppm.PyramidPoolingModule")
class PyramidPoolingModule(nn.Module):
    def __init__(self, in_channels, out_channels, sizes, align_corners=False):
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), *sequence(in_channels, out_channels))
            for n in sizes
        )
        width = in_channels + len(sizes) * out_channels
        self.bottleneck = sequence(width, out_channels, kernel_size=3)

    def forward(self, x):
        maps = [resized(branch(x), x, self.align_corners) for branch in self.branches]
        return self.bottleneck(torch.cat([x, *maps], dim=1))


@published("segmentation_models_pytorch.decoders.pspnet.decoder.PSPBlock")
class PSPBlock(nn.Module):
    def __init__(self, in_channels, out_channels, n):
        super().__init__()
        convolution = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU(inplace=True))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((n, n)), convolution)

    def forward(self, x):
        return resized(self.pool(x), x, True)


@published("segmentation_models_pytorch.decoders.pspnet.decoder.PSPModule")
class PSPModule(nn.Module):
    def __init__(self, in_channels, sizes):
        super().__init__()
        width = in_channels // len(sizes)
        self.blocks = nn.ModuleList([PSPBlock(in_channels, width, n) for n in sizes])

    def forward(self, x):
        return torch.cat([*(block(x) for block in self.blocks), x], dim=1)


@published("timm.layers.non_local_attn.NonLocalAttn")
class NonLocalAttn(nn.Module):
    def __init__(self, in_channels, channels):
        super().__init__()
        self.scale = in_channels**-0.5
        self.t, self.p, self.g = (nn.Conv2d(in_channels, channels, 1) for _ in range(3))
        self.z, self.norm = nn.Conv2d(channels, in_channels, 1), nn.BatchNorm2d(in_channels)

    def forward(self, x):
        return self.norm(self.z(attend(self.t(x), self.p(x), self.g(x), self.scale))) + x

"""Checkpoints of other code, as lists of modules: what the importers are tested on."""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F


def listing(state_dict):
    """The modules of a state dict, one a line: convolutions, norms, tensors, single numbers."""
    shapes = {name: tuple(x.shape) for name, x in state_dict.items()}
    lines = []
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if len(shape) == 4:
            bias = " bias" if f"{module}.bias" in shapes else ""
            lines.append(f"conv {module} {' '.join(map(str, shape))}{bias}")
        elif leaf == "running_mean":
            lines.append(f"norm {module} {shape[0]}")
        elif len(shape) == 3:
            lines.append(f"tensor {name} {' '.join(map(str, shape))}")
        elif shape == ():
            if leaf != "num_batches_tracked":
                lines.append(f"number {name}")
    return lines


def read_listings(path):
    """The lists in a file, by name. The first is what all others begin with."""
    sections = {}
    for line in Path(path).read_text().splitlines():
        if line.startswith("["):
            sections[line[1:-1]] = lines = []
        elif not line.startswith("#"):
            lines.append(line)
    (_, common), *others = sections.items()
    return {name: common + lines for name, lines in others}


def random_state_dict(lines, seed=0):
    """A checkpoint with the modules of a list; its maps neither vanish nor grow."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=-1.0, high=1.0):
        return torch.empty(shape).uniform_(low, high, generator=generator)

    state_dict = {}
    for line in lines:
        kind, module, *rest = line.split()
        if kind == "number":
            state_dict[module] = uniform(low=0.5)
        elif kind == "tensor":
            state_dict[module] = uniform(*map(int, rest))
        elif kind == "affine":
            state_dict[f"{module}.weight"] = uniform(int(rest[0]), low=0.4, high=1.2)
            state_dict[f"{module}.bias"] = uniform(int(rest[0]), low=-0.3, high=0.3)
        elif kind == "norm":
            channels = int(rest[0])
            state_dict |= {
                f"{module}.weight": uniform(channels, low=0.4, high=1.2),
                f"{module}.bias": uniform(channels, low=-0.3, high=0.3),
                f"{module}.running_mean": uniform(channels, low=-0.3, high=0.3),
                f"{module}.running_var": uniform(channels, low=0.7, high=1.5),
                f"{module}.num_batches_tracked": torch.tensor(7),
            }
        else:
            shape = [int(n) for n in rest[:4]]
            bound = math.sqrt(3 / math.prod(shape[1:]))
            state_dict[f"{module}.weight"] = uniform(*shape, low=-bound, high=bound)
            if rest[4:] == ["bias"]:
                state_dict[f"{module}.bias"] = uniform(shape[0], low=-0.3, high=0.3)
    return state_dict


# Their networks, written out ----------------------------------------------------------------------


class Original:
    """Layers by the names of a checkpoint, and the ways in which it names a convolution's norm."""

    def __init__(self, state_dict, *, conv="{}.conv", norm="{}.bn", align_corners=False):
        self.tensors = state_dict
        self.names = conv, norm
        self.align_corners = align_corners

    def conv(self, name, x, *, stride=1, padding=0, dilation=1):
        weight = self.tensors[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        bias = self.tensors.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def norm(self, name, x):
        t = self.tensors
        statistics = t[f"{name}.running_mean"], t[f"{name}.running_var"]
        return F.batch_norm(x, *statistics, t[f"{name}.weight"], t[f"{name}.bias"])

    def cb(self, name, x, dilation=1):
        conv, norm = (pattern.format(name) for pattern in self.names)
        padding = dilation * (self.tensors[f"{conv}.weight"].shape[2] // 2)
        return self.norm(norm, self.conv(conv, x, padding=padding, dilation=dilation))

    def cbr(self, name, x, dilation=1):
        return self.cb(name, x, dilation).relu()

    def resize(self, x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def stages(self, prefix, x, dilations, strides=(1, 2, 1, 1)):
        """ResNet-50 or ResNeSt-50 behind its stem; ``dilations`` of each block, by stage."""
        maps = []
        for stage, rates in enumerate(dilations, 1):
            for i, rate in enumerate(rates):
                name = f"{prefix}layer{stage}.{i}"
                stride = strides[stage - 1] if i == 0 else 1
                y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
                if f"{name}.conv2.fc1.weight" in self.tensors:
                    y = self.split_attention(f"{name}.conv2", y, rate)
                    y = F.avg_pool2d(y, 3, stride, 1) if stride > 1 else y
                else:
                    y = self.conv(f"{name}.conv2", y, stride=stride, padding=rate, dilation=rate)
                    y = self.norm(f"{name}.bn2", y).relu()
                y = self.norm(f"{name}.bn3", self.conv(f"{name}.conv3", y))
                if f"{name}.downsample.2.weight" in self.tensors:
                    x = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
                    x = self.norm(f"{name}.downsample.2", self.conv(f"{name}.downsample.1", x))
                elif i == 0:
                    x = self.conv(f"{name}.downsample.0", x, stride=stride)
                    x = self.norm(f"{name}.downsample.1", x)
                x = (x + y).relu()
            maps.append(x)
        return maps

    def split_attention(self, name, x, dilation):
        """Of a ResNeSt, with two halves."""
        y = self.conv(f"{name}.conv", x, padding=dilation, dilation=dilation)
        halves = self.norm(f"{name}.bn0", y).relu().unflatten(1, (2, -1))
        mean = self.conv(f"{name}.fc1", halves.sum(1).mean((2, 3), keepdim=True))
        weights = self.conv(f"{name}.fc2", self.norm(f"{name}.bn1", mean).relu())
        return (halves * weights.unflatten(1, (2, -1)).softmax(1)).sum(1)

    def stem(self, convs, norms, x):
        for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
            x = self.norm(norm, self.conv(conv, x, stride=2 if i == 0 else 1, padding=1)).relu()
        return x


def attention(query, key, value, scale=1.0):
    """Softmax over the keys' positions; maps or sequences of anchors."""
    weights = (scale * query.flatten(2).mT @ key.flatten(2)).softmax(2)
    return (value.flatten(2) @ weights.mT).unflatten(2, query.shape[2:])


def anchors(x, sizes=(1, 3, 6, 8)):
    return torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in sizes], 2)


def psa_mask(kind, mask, mask_size):
    """mmcv's: logits of pairs of positions, softmax over channels, from those of their offsets."""
    batch, _, height, width = mask.shape
    mask = mask.unflatten(1, mask_size)
    logits = mask.new_zeros(batch, height * width, height, width)
    positions = list(itertools.product(range(height), range(width)))
    for (y, x), (v, u) in itertools.product(positions, repeat=2):
        i, j = v - y + (mask_size[0] - 1) // 2, u - x + (mask_size[1] - 1) // 2
        if 0 <= i < mask_size[0] and 0 <= j < mask_size[1]:
            if kind == "collect":
                logits[:, v * width + u, y, x] = mask[:, i, j, y, x]
            else:
                logits[:, y * width + x, v, u] = mask[:, i, j, y, x]
    return logits

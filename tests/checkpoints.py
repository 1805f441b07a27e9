"""Checkpoints of other code, as lists of modules: what the importers are tested on."""

import math
from pathlib import Path

import torch


def listing(state_dict):
    """The modules of a state dict, one a line: convolutions, norms, single numbers."""
    shapes = {name: tuple(x.shape) for name, x in state_dict.items()}
    lines = []
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if len(shape) == 4:
            bias = " bias" if f"{module}.bias" in shapes else ""
            lines.append(f"conv {module} {' '.join(map(str, shape))}{bias}")
        elif leaf == "running_mean":
            lines.append(f"norm {module} {shape[0]}")
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

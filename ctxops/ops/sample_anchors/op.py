# SPDX-License-Identifier: Apache-2.0
"""sample_anchors: the vectors of a map at chosen positions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxops import _operator
from ctxops._checks import check_map
from ctxops.ops.pyramid_pool import check_output_sizes
from ctxops.ops.sample_anchors.reference import reference


@_operator.served_by(cpu="torch", cuda="torch")
def sample_anchors(input: Tensor, indices: Tensor) -> Tensor:
    r"""Takes the vectors of a map at the given positions.

    .. math::
        y_{b,c,s} = x_{b,c,\lfloor i_s / W \rfloor,\, i_s \bmod W}

    Args:
        input: map of shape ``(B, C, H, W)``.
        indices: ``(S,)`` int64 positions ``h * W + w`` in 0 ... H * W - 1, on the map's device;
            repetitions are legal. :func:`random_anchor_indices` draws them.

    Returns:
        ``(B, C, S)``.

    Raises:
        TypeError: ``input`` is no floating tensor, ``indices`` no int64 tensor.
        ValueError: wrong ranks, differing devices, a position outside the map. Positions are
            checked on the CPU outside torch.compile. On CUDA that would cost a synchronisation:
            torch's indexing counts negative positions from the end, and asserts on the others.

    Source: Zhu et al., Asymmetric Non-local Neural Networks, ICCV 2019, Table 7 (random sampling).

    Dtypes: float32, float64, float16, bfloat16. Autocast keeps the dtype.
    Gradients: input, of any order.
    Deterministic: as torch's indexing.
    Memory: S int64 twice; the gradient is a map.
    """
    check_map("input", input)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, got {got}")
    if indices.dim() != 1:
        raise ValueError(f"indices must have shape (S,), got {tuple(indices.shape)}")
    if indices.device != input.device:
        raise ValueError(
            f"indices must be on the map's device {input.device}, got {indices.device}"
        )
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel() > 0:
        low, high = (int(x) for x in indices.aminmax())
        positions = input.shape[2] * input.shape[3]
        if low < 0 or high >= positions:
            raise ValueError(f"indices must be in 0 ... {positions - 1}, got {low} ... {high}")
    return reference(input, indices)


def random_anchor_indices(
    height: int,
    width: int,
    output_sizes: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws ``n * n`` positions for each n of ``output_sizes``, with replacement, from all H * W.

    Returns int64 ``(S,)`` with ``S = sum(n * n)``, on ``device`` (the generator's, by default).
    Draw once and use the result for the key and for the value.
    """
    if not all(isinstance(n, (int, torch.SymInt)) and n >= 1 for n in (height, width)):
        raise ValueError(
            f"height and width must be integers of at least 1, got {height!r} and {width!r}"
        )
    sizes = check_output_sizes(output_sizes)
    if device is None and generator is not None:
        device = generator.device
    # Not randint, whose bound an exported graph keeps: its positions would fit one size alone.
    fraction = torch.rand(
        sum(n * n for n in sizes), generator=generator, device=device, dtype=torch.float64
    )
    return (fraction * (height * width)).long().clamp(max=height * width - 1)

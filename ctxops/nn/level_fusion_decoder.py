# SPDX-License-Identifier: Apache-2.0
"""A context map and all fused levels, for one classifier (Li et al., GFF, AAAI 2020)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ctxops._checks import check_module
from ctxops.nn.gated_fusion import DenseFeaturePyramid
from ctxops.nn.resize import resize


class LevelFusionDecoder(nn.Module):
    r"""Context of the last map, all levels fused and refined, and both brought together.

    .. math::
        Y = \operatorname{cat}(\operatorname{pyramid}(\operatorname{refine}_l(F_l)
            \text{ for each } l,\, C)), \qquad
        F = \operatorname{fusion}(X_1, \ldots, X_L), \qquad C = \operatorname{context}(X_L)

    at the size of the finest map.

    Args:
        context: from the last map to its context.
        fusion: from a tuple of maps to as many, such as :class:`GatedFullyFusion`.
        refine: a module for the fused map of each level.
        pyramid: None: the context map and the refined levels themselves are concatenated.
        fuse_context: the context map is one more level of the fusion, the last, as in the feature
            pyramids; what the fusion makes of it is not used.
        align_corners: of the bilinear resizes.

    Shape: maps ``(B, C_l, H_l, W_l)``, the finest first, one argument each
        -> ``(B, C, H_0, W_0)``, the context's channels and those of all refined levels.

    Raises:
        TypeError: parts that are no modules.

    Source: Li et al., Gated Fully Fusion for Semantic Segmentation, AAAI 2020, Figure 3.
    """

    def __init__(
        self,
        context: nn.Module,
        fusion: nn.Module,
        refine: Iterable[nn.Module],
        pyramid: DenseFeaturePyramid | None = None,
        *,
        fuse_context: bool = False,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        check_module("pyramid", pyramid, (DenseFeaturePyramid,))
        self.context, self.fusion, self.pyramid = context, fusion, pyramid
        self.refine = nn.ModuleList(refine)
        self.fuse_context, self.align_corners = fuse_context, align_corners

    def extra_repr(self) -> str:
        return f"fuse_context={self.fuse_context}, align_corners={self.align_corners}"

    def forward(self, *maps: Tensor) -> Tensor:
        context = self.context(maps[-1])
        fused = self.fusion((*maps, context) if self.fuse_context else maps)
        # The context map itself, the last level of a feature pyramid, follows as it is.
        levels = [refine(x) for refine, x in zip(self.refine, fused[: len(maps)], strict=True)]
        parts = [context, *levels] if self.pyramid is None else self.pyramid(levels, context)
        size = levels[0].shape[2:]
        return torch.cat([resize(x, size, self.align_corners) for x in parts], dim=1)

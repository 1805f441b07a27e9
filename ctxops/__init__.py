# SPDX-License-Identifier: Apache-2.0
"""Context operators for semantic segmentation, with kernels for the CPU and for CUDA."""

from ctxops._library import use_reference
from ctxops._native import build_info
from ctxops.ops.pyramid_pool import pyramid_pool

__version__ = "0.1.0"

__all__ = ["build_info", "pyramid_pool", "use_reference"]

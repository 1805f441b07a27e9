# SPDX-License-Identifier: Apache-2.0
"""Modules: parameters, and calls of the operators."""

from ctxops.nn.non_local import AFNB, APNB, FusionNonLocal2d, NonLocal2d

__all__ = ["AFNB", "APNB", "FusionNonLocal2d", "NonLocal2d"]

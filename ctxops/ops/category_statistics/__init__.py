# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.category_statistics.op import category_statistics

__all__ = ["category_statistics"]

# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.pyramid_pool.op import check_output_sizes, pyramid_pool

__all__ = ["check_output_sizes", "pyramid_pool"]

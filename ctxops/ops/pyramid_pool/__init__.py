# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.pyramid_pool.op import pyramid_pool

__all__ = ["pyramid_pool"]

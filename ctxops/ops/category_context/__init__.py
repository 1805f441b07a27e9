# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.category_context.op import category_context

__all__ = ["category_context"]

# SPDX-License-Identifier: Apache-2.0
"""What Triton's interpreter (TRITON_INTERPRET=1, kernels on CPU tensors) gets wrong, put right.

Every function may be called again without harm.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen_bfloat16_dot() -> None:
    """Let `tl.dot` multiply bfloat16: Triton 3.4 to 3.9 multiplies the bit patterns as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot
    if getattr(create_dot, "widens_bfloat16", False):
        return

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_widened_dot(self, a, b, *args, **kwargs):
        return create_dot(self, widen(a), widen(b), *args, **kwargs)

    create_widened_dot.widens_bfloat16 = True
    interpreter.InterpreterBuilder.create_dot = create_widened_dot


def index_with_scalars() -> None:
    """Let `range` take runtime scalars: Triton 3.4 relies on what numpy 2.4 dropped."""
    patch_tensor = interpreter._patch_lang_tensor
    if getattr(patch_tensor, "indexes_with_scalars", False):
        return

    def patch_tensor_and_index(tensor, *args):
        patch_tensor(tensor, *args)
        tensor.__index__ = lambda self: self.handle.data.item()

    patch_tensor_and_index.indexes_with_scalars = True
    interpreter._patch_lang_tensor = patch_tensor_and_index

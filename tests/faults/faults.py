# SPDX-License-Identifier: Apache-2.0
"""All deliberate faults.

``run.py`` injects them one at a time: what the tests let pass, they do not test.
"""

from faults.of_importers import IMPORTERS
from faults.of_kernels import CPU, CUDA, TRITON
from faults.of_modules import MODULES
from faults.of_networks import NETWORKS
from faults.of_operators import OPERATORS
from faults.of_training import TRAINING

FAULTS = [
    *CPU,
    *CUDA,
    *TRITON,
    *OPERATORS,
    *MODULES,
    *IMPORTERS,
    *NETWORKS,
    *TRAINING,
]

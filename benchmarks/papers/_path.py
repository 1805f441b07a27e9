# SPDX-License-Identifier: Apache-2.0
"""The first import of every program here: harness and baselines lie beside this folder, and Python
looks for modules only beside the program itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# SPDX-License-Identifier: Apache-2.0
"""Training and validation. Losses, metrics and optimization are plain functions; the rest needs
Lightning: ``pip install "ctxops[train]"``."""

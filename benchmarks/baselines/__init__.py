# SPDX-License-Identifier: Apache-2.0
"""What ctxops is compared with: the same functions and modules in plain torch."""

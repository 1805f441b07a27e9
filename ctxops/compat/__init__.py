# SPDX-License-Identifier: Apache-2.0
"""The names of other packages, served by the operators of this one."""

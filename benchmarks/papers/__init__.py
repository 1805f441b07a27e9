# SPDX-License-Identifier: Apache-2.0
"""The tables of the papers: one program a paper, and what the programs share."""

# SPDX-License-Identifier: Apache-2.0
"""torch's profiler, without what its backend writes to the terminal."""

import os

import torch
from torch.profiler import ProfilerActivity, profile


def make_profiler(device: torch.device, profile_memory: bool = False) -> profile:
    # Read when the first profiler starts; by default it announces every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    return profile(activities=activities, profile_memory=profile_memory)

# SPDX-License-Identifier: Apache-2.0
import pytest

pytest.importorskip("torchvision")

from ctxops.models.data import StreamSampler


def epochs(count, **options):
    sampler = StreamSampler(10, **{"batch_size": 4, "steps": 3} | options)
    for epoch in range(count):
        sampler.set_epoch(epoch)
        yield list(sampler)


def test_rounds_are_permutations_that_differ():
    stream = [sample for epoch in epochs(5) for sample in epoch]  # 60 samples: six rounds
    assert [position for _, position in stream] == list(range(60))
    rounds = [tuple(index for index, _ in stream[i : i + 10]) for i in range(0, 60, 10)]
    assert all(sorted(r) == list(range(10)) for r in rounds)
    assert len(set(rounds)) == 6


def test_a_later_epoch_alone_is_that_of_the_whole_run():
    *_, last = epochs(4)
    sampler = StreamSampler(10, 4, 3)
    sampler.set_epoch(3)
    assert list(sampler) == last


def test_processes_share_each_step():
    whole = [s for epoch in epochs(3) for s in epoch]
    parts = [[s for epoch in epochs(3, rank=r, processes=2) for s in epoch] for r in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 18
    together = []
    for step in range(9):
        for part in parts:
            together += part[2 * step : 2 * step + 2]
    assert together == whole


def test_the_seed_counts():
    assert list(epochs(1)) != list(epochs(1, seed=1))


def test_bad_input():
    with pytest.raises(ValueError, match="batch_size is of all processes together: 3 of them"):
        StreamSampler(10, 4, 3, processes=3)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        StreamSampler(0, 4, 3)

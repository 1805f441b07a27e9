# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import sys

import pytest
import torch

from harness import (
    Case,
    Contender,
    Effort,
    MismatchError,
    Options,
    Oracle,
    both_formats,
    check_case,
    peak_memory,
    relative_error,
    run_benchmark,
    time_by_operation,
)
from harness import options as harness_options
from harness.check import Entry
from harness.contender import Runner
from harness.interference import Interference
from harness.measure import Result, Row
from harness.memory import available_memory
from harness.report import _significant, summarize
from harness.roofline import Roofline
from harness.timing import Timing, interleave, percentile

CPU = torch.device("cpu")
SHAPE = (1, 4, 6, 5)
# Bytes that torch allocates for the numbers in an expression.
SCALARS = 64


def contender(name: str, function=torch.relu, **fields) -> Contender:
    return Contender(name, lambda: function, **{"peak_bytes": 1000} | fields)


def case(*contenders: Contender, **fields) -> Case:
    return Case("a case", lambda: (torch.randn(SHAPE),), SHAPE, contenders, **fields)


def options(**fields) -> Options:
    return Options(CPU, torch.float32, Effort(0.01, 2, 3), **fields)


def wrong(x: torch.Tensor) -> torch.Tensor:
    return x.relu() * 1.001


class TestMemory:
    def test_counts_what_lives_beside_the_result(self):
        x = torch.randn(1000)
        # x * 2 is alive while relu writes the result: 4000 bytes beyond it.
        assert peak_memory(lambda: ((x * 2).relu(),), CPU) == pytest.approx(4000, abs=SCALARS)

    def test_counts_only_the_most_that_is_alive_at_once(self):
        x = torch.randn(1000)

        def call():
            for _ in range(5):
                y = x + 1
                del y
            return (x.sum().reshape(1),)

        assert peak_memory(call, CPU) == pytest.approx(4000, abs=SCALARS)

    def test_does_not_count_a_result_twice_that_is_returned_twice(self):
        x = torch.randn(1000)

        def call():
            y = (x + 1) * 2
            return y, y.view(10, 100)

        assert peak_memory(call, CPU) == pytest.approx(4000, abs=SCALARS)

    def test_gradients_are_results(self):
        x = torch.randn(SHAPE)
        runner = Runner(lambda x: x * 2, (x,), (torch.ones(SHAPE),))
        assert peak_memory(runner, CPU) <= SCALARS

    def test_the_machine_has_some(self):
        assert 2**20 < available_memory(CPU) < 2**50


class TestTiming:
    @pytest.mark.parametrize(
        ("q", "expected"), [(0, 1.0), (20, 1.8), (50, 3.0), (80, 4.2), (100, 5.0)]
    )
    def test_percentile(self, q, expected):
        assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], q) == pytest.approx(expected)

    def test_percentile_of_one_sample(self):
        assert percentile([7.0], 80) == 7.0

    def test_rounds_are_interleaved(self):
        calls = []
        members = [lambda i=i: calls.append(i) for i in range(4)]

        def clock(call):
            call()
            return float(calls[-1])

        timings = interleave(members, clock, Effort(seconds=1e-9, fewest=6, most=9))
        rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
        assert len(rounds) == 6
        assert all(sorted(r) == [0, 1, 2, 3] for r in rounds)
        assert len({tuple(r) for r in rounds}) > 1
        assert [t.samples for t in timings] == [(float(i),) * 6 for i in range(4)]

    def test_rounds_end_at_the_most(self):
        shares = []
        effort = Effort(seconds=1000.0, fewest=2, most=3)
        (timing,) = interleave([lambda: None], lambda call: 1.0, effort, shares.append)
        assert len(timing.samples) == 3
        assert shares == sorted(shares)
        assert shares[-1] == 1.0

    def test_other_programs(self):
        cores = Interference().cores()
        assert cores is None or cores >= 0.0


class TestCheck:
    def test_relative_error(self):
        assert relative_error(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) == pytest.approx(
            0.02, rel=1e-5
        )

    def test_first_row_is_the_reference(self):
        first, second = check_case(
            case(contender("a"), contender("b", lambda x: x.clamp(min=0))), CPU, torch.float32
        )
        assert first.error is None
        assert (second.error, second.against) == (0.0, "a (contiguous)")

    def test_oracle_runs_in_float64(self):
        oracle = Oracle(lambda: torch.exp, 1000)
        (entry,) = check_case(
            case(contender("a", torch.exp), oracles={"": oracle}), CPU, torch.float32
        )
        assert entry.against == "float64"
        assert 0 < entry.error < 1e-6

    def test_oracle_without_room_is_left_out(self):
        oracle = Oracle(lambda: torch.exp, 2**60)
        (entry,) = check_case(case(contender("a"), oracles={"": oracle}), CPU, torch.float32)
        assert entry.against == ""

    def test_families_are_apart(self):
        rows = contender("a", family="x"), contender("b", torch.exp, family="y")
        assert len(check_case(case(*rows), CPU, torch.float32)) == 2

    def test_memory_format_reaches_the_contender(self):
        seen = []

        def look(x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x * 1

        check_case(case(*both_formats(contender("a", look))), CPU, torch.float32)
        assert seen == [False, True]

    @pytest.mark.parametrize(
        "function", [wrong, lambda x: x.relu() / 0.0, lambda x: x.relu()[..., :1]]
    )
    def test_another_result_is_a_mismatch(self, function):
        with pytest.raises(MismatchError, match=r"b \(contiguous\) at a case: output"):
            check_case(case(contender("a"), contender("b", function)), CPU, torch.float32)

    def test_another_gradient_is_a_mismatch(self):
        def half(x):
            return x.detach() + 0.5 * (x - x.detach())

        rows = contender("a", torch.clone), contender("b", half)
        check_case(case(*rows), CPU, torch.float32)
        with pytest.raises(MismatchError, match="gradient of input 0"):
            check_case(case(*rows, backward=True), CPU, torch.float32)

    def test_another_parameter_gradient_is_a_mismatch(self):
        class Scale(torch.nn.Module):
            def __init__(self, slope: float):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.tensor(2.0))
                self.slope = slope

            def forward(self, x):
                fixed = self.weight.detach()
                return x * (fixed + self.slope * (self.weight - fixed))

        rows = contender("a", Scale(1.0)), contender("b", Scale(0.9))
        with pytest.raises(MismatchError, match="gradient of the parameters"):
            check_case(case(*rows, backward=True), CPU, torch.float32)

    def test_flops_and_traffic(self):
        layer = torch.nn.Conv2d(4, 8, 1)
        (entry,) = check_case(case(contender("a", layer)), CPU, torch.float32)
        assert entry.flops == 2 * 4 * 8 * 30
        assert entry.traffic == 4 * (4 * 30 + 4 * 8 + 8 + 8 * 30)


def row(name: str, seconds: float, memory: int, channels_last: bool = False, **fields) -> Row:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = contender(name, memory_format=layout, **fields)
    entry = Entry(made, flops=6 * 10**9, traffic=10**9)
    return Row(entry, Timing((seconds, 2 * seconds, 0.1 * seconds)), memory)


class TestResult:
    def test_ratio_is_of_medians(self):
        result = Result(case(), (row("a", 6.0, 1), row("b", 2.0, 1)))
        assert result.ratio(result.rows[1]) == 3.0
        assert result.ratio(result.rows[0]) == 1.0

    def test_reference_is_the_first_that_ran(self):
        absent = Row(Entry(contender("a"), needs=2**40))
        result = Result(case(), (absent, row("b", 2.0, 1), row("c", 1.0, 1)))
        assert result.reference.name == "b"
        assert result.ratio(result.rows[2]) == 2.0

    def test_summary_takes_the_faster_format_of_each(self):
        rows = (
            row("a", 12.0, 80_000),
            row("a", 8.0, 60_000, channels_last=True),
            row("c", 3.0, 2_500),
            row("ours", 2.0, 5_000, ours=True),
            row("ours", 4.0, 1_000, channels_last=True, ours=True),
            Row(Entry(contender("b"), needs=3 * 2**30)),
        )
        assert summarize(Result(case(), rows)) == [
            "ours is 4.00 x a, 1.50 x c.",
            "its memory is 1/12.0 of a, 2.0 x that of c.",
            "b does not fit (needs 3.0 GiB).",
        ]

    def test_summary_of_no_memory(self):
        rows = (row("a", 8.0, 60_000), row("ours", 2.0, 16, ours=True))
        assert summarize(Result(case(), rows)) == [
            "ours is 4.00 x a.",
            "it needs no memory beyond inputs and results.",
        ]

    @pytest.mark.parametrize(
        ("roof", "share"), [(Roofline(2e9, 6e9, ""), 0.5), (Roofline(1e9, 60e9, ""), 0.5)]
    )
    def test_roofline_share(self, roof, share):
        assert row("a", 2.0, 1).roofline_share(roof) == pytest.approx(share)


@pytest.mark.parametrize(
    ("value", "text"), [(3011.15, "3011"), (93.416, "93.42"), (0.05221, "0.05221"), (0.0, "0")]
)
def test_significant_digits(value, text):
    assert _significant(value) == text


class TestProgram:
    def test_a_mismatch_prints_no_timing(self, capsys, tmp_path):
        file = tmp_path / "out.json"
        rows = contender("a"), contender("b", wrong)
        status = run_benchmark("test", [case(*rows)], options(json=file), {})
        printed = capsys.readouterr()
        assert status == 1
        assert printed.out == ""
        assert "b (contiguous) at a case: output differs" in printed.err
        assert "0.001" in printed.err
        assert not file.exists()

    def test_a_mismatch_in_the_last_case_stops_the_first(self, capsys):
        good = case(contender("a"), contender("b"))
        bad = dataclasses.replace(good, contenders=(contender("a"), contender("c", wrong)))
        assert run_benchmark("test", [good, bad], options(), {}) == 1
        assert capsys.readouterr().out == ""

    def test_what_does_not_fit_is_a_row(self, capsys, tmp_path):
        files = tmp_path / "out.json", tmp_path / "out.png"
        rows = (
            contender("large", peak_bytes=2**50),
            contender("small"),
            contender("ours", ours=True),
        )
        chosen = options(json=files[0], plot=files[1])
        assert run_benchmark("test", [case(*rows)], chosen, {"kind": "test"}) == 0
        printed = capsys.readouterr().out
        assert "does not fit" in printed
        assert f"{2**20:.1f} GiB" in printed
        assert "large does not fit" in printed
        large, small, _ = json.loads(files[0].read_text())["cases"][0]["rows"]
        assert large["needs_bytes"] == 2**50
        assert "median_ms" not in large
        assert small["ratio"] == 1.0
        assert files[1].stat().st_size > 1000

    def test_a_missing_extra_names_the_install_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "rich", None)
        with pytest.raises(SystemExit, match=r'pip install "ctxops\[bench\]"'):
            harness_options.require("rich")


def test_time_by_operation():
    x, w = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 1, 1)

    def call():
        y = torch.nn.functional.conv2d(x, w).relu().flatten(2)
        return (y.transpose(1, 2) @ y).softmax(-1)

    times = time_by_operation(call, CPU)
    worked = {group for group, seconds in times.items() if seconds > 0}
    assert {"convolution", "norm + ReLU", "matmul", "softmax"} <= worked
    assert times["pooling"] == times["fused attention"] == 0.0

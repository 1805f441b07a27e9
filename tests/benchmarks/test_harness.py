# SPDX-License-Identifier: Apache-2.0
import contextlib
import dataclasses
import io
import json
import re
import sys
import time
import types

import pytest
import torch

from harness import (
    Case,
    Contender,
    Effort,
    MismatchError,
    Options,
    Oracle,
    Paper,
    Rival,
    both_formats,
    check,
    check_case,
    compare,
    peak_memory,
    percentile,
    relative_error,
    run_benchmark,
    time_by_operation,
)
from harness.case import Runner
from harness.check import Entry, check_rows, why_it_fails
from harness.machine import Interference, Roofline, available_memory
from harness.measure import Result, Row, Timing, interleave, plan
from harness.meters import Launches, _capture, make_clock, make_launches
from harness.report import _significant, require, result_table, summarize

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


def test_an_operator_meets_its_rivals():
    rivals = [
        Rival("a", lambda: torch.relu, peak_bytes=(7, 8)),
        Rival("b", lambda: torch.relu, eager=False),
        Rival("c", lambda: torch.relu, compiled=False, backward=False),
    ]
    inputs = case().inputs
    numbers = {"peak_bytes": (1, 2), "traffic": (3, 4)}
    forward, both = compare("op", SHAPE, torch.relu, rivals, inputs, SHAPE, **numbers)
    assert (forward.title, forward.backward) == ("op, 1 x 4 x 6 x 5, forward", False)
    assert (both.title, both.backward) == ("op, 1 x 4 x 6 x 5, forward + backward", True)
    names = ["a", "a compiled", "b compiled", "c", "ctxops"]
    assert [row.name for row in forward.contenders[::2]] == names
    assert [row.name for row in both.contenders[1::2]] == [*names[:3], "ctxops"]
    assert [row.compile for row in forward.contenders[::2]] == [False, True, True, False, False]
    assert [row.peak_bytes for row in forward.contenders[::2]] == [7, 7, 1, 1, 1]
    assert [row.peak_bytes for row in both.contenders[::2]] == [8, 8, 2, 2]
    assert {(row.traffic, row.flops) for row in both.contenders} == {(4, None)}
    assert [row.name for row in forward.contenders if row.ours] == ["ctxops", "ctxops"]
    (alone,) = compare("op", SHAPE, torch.relu, rivals, inputs, SHAPE, peak_bytes=(1,))
    assert not alone.backward


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

    @pytest.mark.parametrize("counts", [(6, 6, 6, 6), (6, 2, 3, 1)])
    def test_rounds_are_interleaved(self, counts):
        order, seconds = [], []
        members = [lambda i=i: order.append(i) for i in range(4)]

        def clock(call):
            call()
            return float(order[-1])

        interleave(members, counts, clock, lambda i, s: seconds.append((i, s)))
        assert [order.count(i) for i in range(4)] == list(counts)
        assert seconds == [(i, float(i)) for i in order]
        if counts == (6, 6, 6, 6):
            rounds = [order[i : i + 4] for i in range(0, 24, 4)]
            assert all(sorted(r) == [0, 1, 2, 3] for r in rounds)
            assert len({tuple(r) for r in rounds}) > 1
        else:  # the two samples of the second call lie in the second and in the fifth round
            first, second = (i for i, call in enumerate(order) if call == 1)
            assert order[:first].count(0) in (1, 2)
            assert order[:second].count(0) in (4, 5)

    def test_every_call_gets_the_same_share_of_the_time(self):
        effort = Effort(fewest=3, most=50)
        counts = plan([1.0, 0.1, 0.01], 30.0, effort)
        assert counts[1:] == [50, 50]
        assert 20 <= counts[0] <= 25
        assert plan([1.0, 0.1, 0.01], 0.001, effort) == [3, 3, 3]
        assert plan([1.0, 0.1, 0.01], 1e9, effort) == [50, 50, 50]
        assert plan([], 10.0, effort) == []

    def test_with_a_budget_a_row_is_timed_for_two_seconds_and_twice(self):
        effort = Effort(fewest=3, most=20, budget=60.0)
        assert plan([19.0, 1.1, 0.1], 1.0, effort) == [2, 2, 3]
        assert plan([19.0, 5.0, 0.1], 56.0, effort) == [2, 3, 20]
        assert plan([0.6, 0.3], 1.0, Effort(fewest=5, budget=60.0)) == [3, 5]
        assert plan([19.0, 1.1, 0.1], 1.0, Effort(fewest=3)) == [3, 3, 3]

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

    def test_an_oracle_at_some_positions(self):
        """They are judged against it, all positions against the first row."""
        positions = torch.tensor([3, 17])

        def at(x):
            return x.exp().flatten(2)[..., positions]

        def wrong_elsewhere(x):
            y = x.exp()
            y.flatten(2)[..., 5] += 1
            return y

        oracles = {"": Oracle(lambda: at, 1000, positions)}
        rows = contender("a", torch.exp), contender("b", torch.exp)
        entries = check_case(case(*rows, oracles=oracles), CPU, torch.float32)
        assert [entry.against for entry in entries] == ["float64", "float64"]
        rows = contender("a", torch.exp), contender("b", wrong_elsewhere)
        with pytest.raises(MismatchError, match=r"differs from a \(contiguous\)"):
            check_case(case(*rows, oracles=oracles), CPU, torch.float32)
        with pytest.raises(MismatchError, match="differs from float64"):
            check_case(case(contender("a", wrong), oracles=oracles), CPU, torch.float32)

    def test_a_slow_row_runs_in_its_faster_format_alone(self):
        def sleep(x):
            time.sleep(0.05 if x.is_contiguous() else 0.03)
            return x * 1

        rows = *both_formats(contender("slow", sleep)), *both_formats(contender("fast", torch.relu))
        probed = case(*both_formats(contender("slow", sleep)))
        whole = case(*rows, probe=lambda: dataclasses.replace(probed, title="1 x 1"))
        whole = dataclasses.replace(whole, contenders=tuple(
            dataclasses.replace(row, family=row.name) for row in rows))  # fmt: skip
        entries = {e.contender.label: e for e in check_rows(whole, CPU, torch.float32, long=0.02)}
        assert entries["slow (channels_last)"].runner is not None
        assert entries["slow (contiguous)"].runner is None
        reason = r"1\.\d\d x as slow as channels_last in a probe at 1 x 1"
        assert re.fullmatch(reason, entries["slow (contiguous)"].left_out)
        assert all(entries[f"fast ({layout})"].runner for layout in ("contiguous", "channels_last"))
        entries = check_rows(whole, CPU, torch.float32, long=1.0)
        assert all(entry.runner is not None for entry in entries)

    def test_a_compiled_row_runs_in_the_faster_format_of_its_eager_form(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)

        def sleep(x):
            time.sleep(0.05 if x.is_contiguous() else 0.03)
            return x * 1

        eager = contender("eager", sleep)
        compiled = dataclasses.replace(eager, name="compiled", compile=True)
        whole = case(*both_formats(eager), *both_formats(compiled))
        *_, slower, faster = check_rows(whole, CPU, torch.float32, long=1.0)
        assert faster.runner is not None
        assert slower.runner is None
        reason = r"uncompiled it is 1\.\d\d x as slow as channels_last"
        assert re.fullmatch(reason, slower.left_out)
        assert all(entry.runner for entry in check_rows(whole, CPU, torch.float32))
        alone = case(*both_formats(compiled))
        assert all(entry.runner for entry in check_rows(alone, CPU, torch.float32, long=1.0))

    def test_a_row_that_is_compiled_has_the_flops_of_its_eager_form(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        layer = torch.nn.Conv2d(4, 8, 1)
        eager = contender("a", layer)
        rows = eager, dataclasses.replace(eager, name="b", compile=True)
        for chosen in (rows, rows[1:]):
            entries = check_case(case(*chosen), CPU, torch.float32)
            assert {entry.flops for entry in entries} == {2 * 4 * 8 * 30}

    def test_a_rival_that_torch_cannot_compile_is_left_out(self):
        def fail(x):
            raise torch._dynamo.exc.TorchDynamoException

        rows = contender("a"), contender("b", fail)
        _, entry = check_case(case(*rows), CPU, torch.float32)
        assert (entry.runner, entry.left_out) == (None, "torch cannot compile it here")
        ours = contender("b", fail, ours=True)
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            check_case(case(contender("a"), ours), CPU, torch.float32)

    def test_on_a_gpu_a_rival_that_fails_is_left_out(self):
        error = RuntimeError("No available kernel.\nAborting.")
        gpu = torch.device("cuda")
        said = "it fails here with RuntimeError: No available kernel."
        assert why_it_fails(contender("a"), error, gpu) == said
        assert not why_it_fails(contender("a", ours=True), error, gpu)
        assert not why_it_fails(contender("a"), error, CPU)

        def fail(x):
            raise error

        with pytest.raises(RuntimeError):
            check_case(case(contender("a"), contender("b", fail)), CPU, torch.float32)

    def test_a_rival_that_fails_is_not_probed(self, monkeypatch):
        monkeypatch.setattr(check, "why_it_fails", lambda *_: "it fails here")

        def fail(x):
            raise RuntimeError

        rows = both_formats(contender("a"), contender("b", fail))
        probed = case(*rows)
        entries = list(check_rows(case(*rows, probe=lambda: probed), CPU, torch.float32, long=1.0))
        assert [bool(entry.left_out) for entry in entries] == [False, False, True, True]

    def test_families_are_apart(self):
        rows = contender("a", family="x"), contender("b", torch.exp, family="y")
        assert len(check_case(case(*rows), CPU, torch.float32)) == 2

    def test_memory_format_reaches_the_contender(self):
        seen = []

        def look(x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x * 1

        check_case(case(*both_formats(contender("a", look))), CPU, torch.float32)
        assert list(dict.fromkeys(seen)) == [False, True]

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

    def test_the_gradients_of_kinked_cases_may_differ_by_a_little(self):
        def tilted(slope):
            return lambda x: x.detach() + slope * (x - x.detach())

        for slope, kinked in ((1 + 1e-4, False), (1.1, True)):
            rows = contender("a", torch.clone), contender("b", tilted(slope))
            with pytest.raises(MismatchError, match="gradient of input 0"):
                check_case(case(*rows, backward=True, kinked=kinked), CPU, torch.float32)
        rows = contender("a", torch.clone), contender("b", tilted(1 + 1e-4))
        check_case(case(*rows, backward=True, kinked=True), CPU, torch.float32)

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


class FakeStream:
    def wait_stream(self, other):
        pass


class TestLaunches:
    """On a machine without a GPU torch's functions are replaced."""

    @pytest.fixture
    def _no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def test_on_the_cpu_calls_are_their_own(self):
        calls = [torch.relu]
        assert make_launches(calls, CPU) == Launches(calls, None, None)

    @pytest.mark.usefixtures("_no_gpu")
    def test_by_graphs_all_rows_or_none(self, monkeypatch):
        calls, shared = [lambda: "a", lambda: "b", lambda: "c"], set()

        def capture(call, stream, pool):
            shared.add((stream, pool))
            if call is refused:
                raise RuntimeError("operation not permitted when stream is capturing")
            return types.SimpleNamespace(replay=lambda: f"replay of {call()}")

        monkeypatch.setattr("harness.meters._capture", capture)
        refused = None
        launches = make_launches(calls, torch.device("cuda"))
        assert [call() for call in launches.calls] == [f"replay of {x}" for x in "abc"]
        assert (launches.how, launches.uncaptured) == ("graph", None)
        assert len(shared) == 1
        refused = calls[1]
        assert make_launches(calls, torch.device("cuda")) == Launches(calls, "events", 1)

    def test_a_call_is_warm_before_it_is_captured(self, monkeypatch):
        calls, now = [], []

        @contextlib.contextmanager
        def doing(what):
            now.append(what)
            yield
            now.pop()

        side = FakeStream()
        monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: doing(("runs", stream)))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
        monkeypatch.setattr(
            torch.cuda, "graph", lambda graph, pool, stream: doing((graph, pool, stream))
        )
        assert _capture(lambda: calls.append(now[-1]), side, "a pool") == "a graph"
        assert calls == [("runs", side)] * 3 + [("a graph", "a pool", side)]

    @pytest.mark.cuda
    def test_graphs_on_a_gpu(self):
        device = torch.device("cuda")
        x, y, z = torch.randn(3, 1000, device=device)

        def into(result):
            return lambda: result.copy_(2 * x + 1)

        launches = make_launches([into(y), into(z)], device)
        assert launches.how == "graph"
        x += 1
        clock = make_clock(device)
        assert all(0 < clock(call) < 1 for call in launches.calls)
        assert y.equal(2 * x + 1)
        assert z.equal(y)
        waits = [into(y), lambda: x.sum().item()]
        assert make_launches(waits, device) == Launches(waits, "events", 1)
        x += 1
        assert clock(waits[0]) > 0
        assert y.equal(2 * x + 1)


def row(name: str, seconds: float, memory: int, channels_last: bool = False, **fields) -> Row:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = contender(name, memory_format=layout, **fields)
    entry = Entry(made, flops=6 * 10**9, traffic=10**9)
    samples = (seconds, 2 * seconds, 0.1 * seconds, seconds, seconds)
    return Row(entry, Timing(samples), memory)


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
            "against the best rival in each format it is 1.50 x c in NCHW, 2.00 x a in NHWC: "
            "1.50 x at the least.",
            "its memory is 1/12.0 of a, 2.0 x that of c.",
            "b does not fit (needs 3.0 GiB).",
        ]
        entry = Entry(contender("a"), left_out="2 x as slow")
        lines = summarize(Result(case(), (*rows, Row(entry))))
        assert lines[3] == "a NCHW is not measured: 2 x as slow."

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
    @pytest.fixture(autouse=True)
    def _roofline(self, monkeypatch):
        """A measurement of it takes seconds; test_nonlocal_vs_apnb.py makes one."""
        roof = Roofline(1e10, 1e11, "matrix product")
        monkeypatch.setattr("harness.measure.measure_roofline", lambda *measured: roof)

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

    def test_a_row_of_few_runs_says_so(self, capsys):
        rows = contender("a"), contender("ours", ours=True)
        assert run_benchmark("test", [case(*rows)], options(), {}) == 0
        printed = capsys.readouterr()
        few = r"Measured fewer than 5 times: a NCHW \(\d runs\), ours NCHW \(\d runs\)\."
        assert re.search(few, printed.out)
        assert "checked a (contiguous)" in printed.err
        assert re.search(r"timed ours \(contiguous\): .* ms, median of \d .* left\]", printed.err)

    def test_a_long_call_of_the_check_is_a_sample(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("harness.check.NEEDS_NO_WARM_UP", 0.02)
        calls = []

        def sleep(x):
            calls.append(x)
            time.sleep(0.03)
            return x.relu()

        file = tmp_path / "out.json"
        rows = contender("a", sleep), contender("b")
        chosen = dataclasses.replace(options(json=file), effort=Effort(0.01, 4, 4))
        assert run_benchmark("test", [case(*rows)], chosen, {}) == 0
        slow, fast = json.loads(file.read_text())["cases"][0]["rows"]
        assert len(calls) == len(slow["samples_ms"]) == len(fast["samples_ms"]) == 4
        assert min(slow["samples_ms"]) > 29

    def test_a_row_that_cannot_be_captured(self, capsys, tmp_path, monkeypatch):
        file = tmp_path / "out.json"

        def launches(calls, device):
            return Launches(calls, "events", 1)

        monkeypatch.setattr("harness.measure.make_launches", launches)
        rows = contender("a"), contender("b")
        assert run_benchmark("test", [case(*rows)], options(json=file), {}) == 0
        (written,) = json.loads(file.read_text())["cases"]
        assert [row["launch"] for row in written["rows"]] == ["events", "events"]
        line = "Python launches every row: b (contiguous) cannot be captured in a CUDA graph."
        assert line in written["summary"]
        assert line in capsys.readouterr().out

    def test_interrupted(self, capsys, tmp_path):
        """What has been measured is printed; no file is written."""
        calls = []

        def interrupt(x):
            calls.append(x)
            if len(calls) == 5:  # two of the check, then it is timed
                raise KeyboardInterrupt
            return x.relu()

        file = tmp_path / "out.json"
        rows = contender("a"), contender("ours", interrupt, ours=True)
        assert run_benchmark("test", [case(*rows)], options(json=file), {}) == 130
        printed = capsys.readouterr()
        assert "ours is" in printed.out
        assert "interrupted: the rows above" in printed.err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("at", [1, 2])
    def test_interrupted_before_anything_is_timed(self, at, capsys):
        calls = []

        def interrupt(x):
            calls.append(x)
            if len(calls) == at:
                raise KeyboardInterrupt
            return x.relu()

        rows = contender("a"), contender("b", interrupt)
        assert run_benchmark("test", [case(*rows), case(*rows)], options(), {}) == 130
        assert "a  " in capsys.readouterr().out
        assert run_benchmark("test", [case(contender("a", interrupt))], options(), {}) in (0, 130)

    def test_a_budget_that_is_too_small_is_told(self, capsys):
        def sleep(x):
            time.sleep(0.02)
            return x * 1

        chosen = dataclasses.replace(options(), effort=Effort(fewest=2, most=3, budget=0.01))
        assert run_benchmark("test", [case(contender("a", sleep))], chosen, {}) == 0
        assert "a budget of 0.01 s is too small for the fewest samples" in capsys.readouterr().out

    @pytest.mark.parametrize("width", [60, 250])
    def test_a_terminal_gets_the_columns_that_it_has_room_for(self, width):
        rich_console = pytest.importorskip("rich.console")
        page = io.StringIO()
        terminal = {"force_terminal": True, "color_system": None}
        console = rich_console.Console(file=page, width=width, **terminal)
        papers = dataclasses.replace(contender("a"), paper=Paper(1.0, 2, 3.0))
        entry = Entry(papers, flops=6 * 10**9, traffic=10**9)
        result = Result(case(), (Row(entry, Timing((6.0,)), 1), row("b", 2.0, 1)))
        console.print(result_table(result, Roofline(1e9, 1e9, ""), console))
        lines = page.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        header = next(line for line in lines if "MiB" in line)
        assert {"ms", "faster", "MiB", "error"} <= set(header.split())
        assert ("GB/s" in header) == (width > 60)
        assert ("A wider terminal" in page.getvalue()) == (width == 60)

    def test_a_terminal_shows_the_table_while_it_grows(self, monkeypatch):
        rich_console = pytest.importorskip("rich.console")
        page, make = io.StringIO(), rich_console.Console

        def terminal(**fields):
            fields.pop("stderr", None)
            return make(file=page, width=120, force_terminal=True, **fields)

        monkeypatch.setattr(rich_console, "Console", terminal)
        rows = contender("a"), contender("ours", ours=True)
        assert run_benchmark("test", [case(*rows)], options(), {}) == 0
        assert "timed ours (contiguous)" in page.getvalue()
        assert "about 0 s left" in page.getvalue()

    def test_a_missing_extra_names_the_install_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "rich", None)
        with pytest.raises(SystemExit, match=r'pip install "ctxops\[bench\]"'):
            require("rich")


def test_time_by_operation():
    x, w = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 1, 1)

    def call():
        y = torch.nn.functional.conv2d(x, w).relu().flatten(2)
        return (y.transpose(1, 2) @ y).softmax(-1)

    times = time_by_operation(call, CPU)
    worked = {group for group, seconds in times.items() if seconds > 0}
    assert {"convolution", "norm + ReLU", "matmul", "softmax"} <= worked
    assert times["pooling"] == times["fused attention"] == 0.0

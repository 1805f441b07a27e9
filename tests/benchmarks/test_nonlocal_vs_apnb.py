# SPDX-License-Identifier: Apache-2.0
import argparse
import dataclasses
import functools
import json

import pytest
import torch
import torch.nn.functional as F

import nonlocal_vs_apnb
from baselines.released import ReleasedAPNB, ReleasedNonLocal2d, SdpaNonLocal2d, randomize
from ctxops.nn import APNB
from harness import Effort, Options, check_case, relative_error
from modules import flop_counter
from nonlocal_vs_apnb import Block

TINY = ["--size", "9x7", "--channels", "24", "--key-channels", "8", "--seconds", "0.1"]
ROW_KEYS = {
    "name", "format", "ours", "paper", "needs_bytes", "median_ms", "p20_ms", "p80_ms",
    "launch", "samples_ms", "ratio", "lead", "left_out", "memory_bytes", "flops", "bytes",
    "bytes_per_second", "flops_per_second", "roofline_share", "relative_error", "error_against",
}  # fmt: skip
NAMES = [
    "NB as released", "NB on SDPA", "APNB as released", "APNB compiled", "ctxops APNB",
]  # fmt: skip


def block(kind, train: bool = False):
    return randomize(kind(12, 8, 6, 10)).double().train(train)


class TestReleased:
    def test_the_block_is_not_trivial(self):
        module = block(ReleasedNonLocal2d)
        x = torch.randn(2, 12, 5, 4, dtype=torch.double)
        assert module(x).std() > 0.01
        assert module.query is module.key
        assert {name.partition(".")[0] for name in module.state_dict()} == {
            "query", "key", "value", "out",
        }  # fmt: skip

    @pytest.mark.parametrize("train", [False, True])
    def test_non_local_block(self, train):
        module = block(ReleasedNonLocal2d, train)
        x = torch.randn(2, 12, 5, 4, dtype=torch.double)
        query, value = module.query(x).flatten(2), module.value(x).flatten(2)
        weights = torch.einsum("bcn,bcm->bnm", query, query).mul(8**-0.5).softmax(2)
        context = torch.einsum("bnm,bcm->bcn", weights, value).unflatten(2, (5, 4))
        torch.testing.assert_close(module(x), module.out(context))

    def test_apnb(self):
        module = block(ReleasedAPNB)
        x = torch.randn(2, 12, 9, 7, dtype=torch.double)
        pooled = [
            torch.cat([F.adaptive_avg_pool2d(y, n).flatten(2) for n in (1, 3, 6, 8)], 2)
            for y in (module.query(x), module.value(x))
        ]
        assert pooled[0].shape == (2, 8, 110)
        query = module.query(x).flatten(2)
        weights = torch.einsum("bcn,bcm->bnm", query, pooled[0]).mul(8**-0.5).softmax(2)
        context = torch.einsum("bnm,bcm->bcn", weights, pooled[1]).unflatten(2, (9, 7))
        torch.testing.assert_close(module(x), module.out(context))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_sdpa_agrees(self, layout):
        x = torch.randn(2, 12, 5, 4, dtype=torch.double).contiguous(memory_format=layout)
        torch.testing.assert_close(block(SdpaNonLocal2d)(x), block(ReleasedNonLocal2d)(x))


class TestCounts:
    @pytest.mark.parametrize(
        ("family", "size", "expected"),
        [
            ("NB", (96, 96), 58.013),
            ("NB", (256, 128), 601.404),
            ("APNB", (96, 96), 15.574),
            ("APNB", (256, 128), 55.373),
        ],
    )
    def test_paper_count(self, family, size, expected):
        count = Block(1, 2048, 256, *size).paper_count(family) / 1e9
        assert count == pytest.approx(expected, abs=1e-3)

    def test_our_count(self):
        block = APNB(2048, 256, 256).to("meta")
        with flop_counter() as counter:
            block(torch.empty(1, 2048, 256, 128, device="meta"))
        assert counter.get_total_flops() / 2e9 == pytest.approx(25.6, abs=0.05)

    def test_inputs_tell_a_wrong_attention_from_the_right_one(self):
        options = argparse.Namespace(device=torch.device("cpu"), dtype=torch.float32)
        case = nonlocal_vs_apnb.build_case(Block(1, 512, 64, 24, 24), options, False, False)
        (x,) = case.inputs()
        block = randomize(ReleasedAPNB(512, 64, 64)).eval()
        with torch.no_grad():
            expected = block(x)
            block.scale *= 2
            sharper = block(x)
            block.scale = 0.0
            uniform = block(x)
        # The widest tolerance, that of bfloat16, is 0.04.
        assert relative_error(sharper, expected) > 0.2
        assert relative_error(uniform, expected) > 0.2

    def test_paper_figures_belong_to_table_1(self):
        assert Block(1, 2048, 256, 96, 96).paper("NB").milliseconds == 19.5
        assert Block(1, 2048, 256, 48, 48).paper("NB") is None
        assert Block(2, 2048, 256, 96, 96).paper("NB") is None

    def test_says_that_43_5_does_not_follow(self):
        (count, doubt) = nonlocal_vs_apnb.counting_lines(Block(1, 2048, 256, 256, 128))
        assert "NB has 601.4 and APNB 55.4 GFLOPs" in count
        assert "43.5" in doubt
        assert "51.5" in doubt
        assert len(nonlocal_vs_apnb.counting_lines(Block(1, 2048, 256, 96, 96))) == 1


def test_quick_writes_every_number(tmp_path, capsys, monkeypatch):
    # The tracing of torch.compile without its code generation, which takes half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    file = tmp_path / "table.json"
    arguments = ["--quick", "--device", "cpu", "--json", str(file), "--breakdown", *TINY]
    assert nonlocal_vs_apnb.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "ctxops APNB is" in printed
    assert "relative L2 error against the released APNB in float64" in printed
    written = json.loads(file.read_text())
    assert written["benchmark"] == "nonlocal_vs_apnb"
    assert {"device", "driver", "threads", "torch", "triton", "ctxops", "commit"} <= set(
        written["machine"]
    )
    assert written["settings"]["sizes"] == [[9, 7]]
    assert written["roofline"]["bytes_per_second"] > 0
    (case,) = written["cases"]
    assert [(r["name"], r["format"]) for r in case["rows"]] == [
        (name, layout) for name in NAMES for layout in ("contiguous", "channels_last")
    ]
    for row in case["rows"]:
        assert set(row) == ROW_KEYS
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["flops"] > 0
        assert row["relative_error"] < 5e-6
    assert set(case["breakdown_seconds"]) == {"NB as released", "APNB as released", "ctxops APNB"}


BAD = [
    ["--size", "96"], ["--size", "0x9"], ["--json", "/no/x"], ["--budget", "x"], ["--budget", "-1"],
    ["--budget", "inf"], ["--budget", "9", "--thorough"], ["--rounds", "0"],
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "budget", "fewest"),
    [
        ([], 150.0, 5),
        (["--budget", "1"], 1.0, 5),
        (["--budget", "9", "--quick"], 9.0, 3),
        (["--thorough"], None, 5),
        (["--seconds", "9"], None, 5),
        (["--quick"], None, 3),
        (["--rounds", "2"], 150.0, 2),
    ],
    ids=str,
)
def test_effort(arguments, budget, fewest, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        nonlocal_vs_apnb,
        "run_benchmark",
        lambda name, cases, options, *more: seen.update(o=options),
    )
    nonlocal_vs_apnb.main([*arguments, "--device", "cpu"])
    effort = seen["o"].effort
    assert (effort.budget, effort.fewest) == (budget, fewest)
    assert (effort.long == 1.0) == (budget is not None)


class TestOracle:
    @pytest.mark.parametrize("kind", [ReleasedNonLocal2d, ReleasedAPNB])
    @pytest.mark.parametrize("train", [False, True])
    def test_the_output_at_some_positions(self, kind, train):
        module, positions = block(kind, train), torch.tensor([0, 62, 17, 17])
        x = torch.randn(2, 12, 9, 7, dtype=torch.double)
        expected = module(x).flatten(2)[..., positions]
        torch.testing.assert_close(module.at(x, positions), expected)

    def test_every_row_is_judged_by_float64(self):
        options = argparse.Namespace(device=torch.device("cpu"), dtype=torch.float32)
        case = nonlocal_vs_apnb.build_case(Block(1, 24, 8, 30, 25), options, False, False)
        case = dataclasses.replace(
            case, contenders=tuple(c for c in case.contenders if not c.compile)
        )
        for entry in check_case(case, options.device, options.dtype):
            assert entry.against == "float64"
            assert 0 < entry.error < 5e-6

    def test_large_maps_have_a_probe(self):
        options = Options(torch.device("cpu"), torch.float32, Effort())
        probes = set()
        for size, title in (((64, 64), None), ((96, 96), "48 x 48"), ((256, 128), "48 x 48")):
            case = nonlocal_vs_apnb.build_case(Block(1, 24, 8, *size), options, False, False)
            assert (case.probe and case.probe().title) == title
            probes.add(case.probe)
        assert len(probes) == 2  # None, and one that both sizes share


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        nonlocal_vs_apnb.main(arguments)
    assert "error: argument" in capsys.readouterr().err

"""Rounds in turns, medians, limits, memory, records. No test asserts a time."""
import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import timing
from common import UserError

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")


def test_calls_take_turns_and_the_first_round_does_not_count():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = timing.interleave(variants, 3)
    assert "".join(calls) == "AB" * 4
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"A": 3, "B": 3}


def test_ratio_is_the_median_of_the_rounds():
    assert timing.median_ratio([1, 10, 100], [2, 10, 50]) == 1.0
    assert timing.median_ratio([6, 30], [2, 10]) == 3.0
    assert timing.median_ratio([1, 9, 1], [1, 3, 4]) == 1.0              # the ratio of medians would be 1/3


def test_seconds_are_the_clock_s(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def wait(seconds):
        clock.now += seconds

    assert timing.seconds_of(lambda: wait(7)) == 7
    assert timing.interleave({"A": lambda: wait(2), "B": lambda: wait(5)}, 2) == {"A": [2, 2], "B": [5, 5]}


def test_limits_do_the_work_that_they_count():
    call, flops = timing.matmul(torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == flops == 2 * 512**3
    for name, (call, size) in timing.traffic("cpu").items():
        assert {"copy": 2, "read": 1}[name] * 2**20 == size
        call()


@needs_proc
def test_memory_is_that_of_the_block():
    with timing.peak("cpu") as memory:
        block = torch.ones(2**23)                                            # 32 MB
    assert memory["peak_bytes"] - memory["before_bytes"] >= 2**25 * .9
    assert block.sum() == 2**23
    assert 2**20 < timing.process_memory("VmRSS") <= timing.process_memory("VmHWM") < 2**38


def test_a_killed_process_is_a_user_error():
    with pytest.raises(UserError, match="the process of _exit was ended, .* smaller --micro-batch"):
        timing.own_process(os._exit, 9)
    with pytest.raises(ZeroDivisionError):
        timing.own_process(divmod, 1, 0)


def test_measured_cells_are_left_alone(tmp_path, capsys):
    """But not with other settings, on another machine, or by another commit."""
    records = timing.Records(tmp_path / "new" / "records.jsonl")
    calls = []

    def measure():
        calls.append(1)
        return {"rows": [{"x": len(calls)}], "note": "; as it is"}

    about = {"settings": {"rounds": 2, "disk": (1, 8)}, "machine": {"device": "d", "threads": 1}, "code": "c0de"}
    assert records.measure("train", "toy", about, measure)
    assert records.measure("train", "toy", about, measure)
    assert "in " in capsys.readouterr().out and len(calls) == 1
    for other in ({"settings": {"rounds": 3}}, {"code": "1e55"}, {"machine": {"device": "d", "threads": 2}}):
        assert records.measure("train", "toy", {**about, **other}, measure)
    assert records.measure("kd", "toy", about, measure)
    assert len(calls) == len(records.all()) == 5
    text = timing.tables(records.all())
    assert text.count("**train**") == 4 and "medians of 2 rounds" in text and "| 5 |" in text
    assert "threads 1, code c0de; as it is):" in text and "code 1e55" in text


def test_rows_of_a_cell_may_belong_to_several_tables():
    about = {"settings": {}, "machine": {"device": "d"}, "code": "c0de"}
    rows = [{"table": "a", "x": 1}, {"table": "b", "y": None}, {"table": "a", "z": "text"}]
    text = timing.tables([json.loads(json.dumps({"suite": "s", "about": about, "rows": rows}))])
    first, second = text.split("\n\n**")
    assert first.startswith("**s, a** (device d, code c0de):\n\n| x | z |") and first.endswith("| 1 |  |\n|  | text |")
    assert second.startswith("s, b** (device d, code c0de):\n\n| y |")


def test_numbers_have_three_digits():
    shown = {None: "", "x": "x", 1234567: "1,234,567", 0.0123456: "0.0123", 4567.8: "4,568", 2e12: "2e+12"}
    assert {value: timing.show(value) for value in shown} == shown
    assert timing.show(True) == "True"

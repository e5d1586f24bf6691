"""The command line of the benchmarks: suites, cells, refusals, failures, the limit of time."""
import dataclasses
import json
import time

import pytest
import torch

from bench import __main__ as bench
from bench import timing, variants
from common import UserError, parse, read_records


def test_a_cell_that_breaks_is_recorded_and_tried_again(tmp_path, monkeypatch, capsys):
    broken = [True]

    def fails():
        if broken[0]:
            raise torch.OutOfMemoryError("no room\nfor 8 GB")
        return {"rows": [{"x": "well"}]}

    monkeypatch.setattr(bench, "cells", lambda settings: [("a", fails), ("b", lambda: {"rows": [{"x": "b's"}]})])
    command = bench.Bench("scale", out=str(tmp_path / "records.jsonl"))
    with pytest.raises(SystemExit) as ended:
        bench.main(command)
    text = capsys.readouterr().out
    assert ended.value.code == 1
    assert text.count("OutOfMemoryError: no room") == 2 and "for 8 GB" not in text
    assert "**scale, failed, the same command tries again**" in text and "b's" in text
    broken[0] = False
    bench.main(command)
    text = capsys.readouterr().out
    assert "scale, b: in " in text and "well" in text and "failed" not in text
    assert len(read_records(tmp_path / "records.jsonl")) == 3


def test_time_ends_a_suite_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    slow = [True]
    done = []
    swallowed = []

    def cell(name):
        def measure():
            while slow[0] and name == "b":
                try:
                    time.sleep(.01)
                except BaseException:                                        # as a compiler might
                    if swallowed:
                        raise
                    swallowed.append(1)
            done.append(name)
            return {"rows": [{"cell": name}]}
        return name, measure

    monkeypatch.setattr(bench, "cells", lambda settings: [cell(name) for name in "abc"])
    monkeypatch.setattr(bench, "ALARM_SECONDS", .05)
    command = bench.Bench("gpu", out=str(tmp_path / "records.jsonl"), device="cpu", minutes=.05)
    bench.main(command)
    assert done == ["a"] and swallowed and "the same command goes on" in capsys.readouterr().out
    slow[0] = False
    bench.main(dataclasses.replace(command, minutes=8.0))                    # minutes are no part of what is measured
    assert done == ["a", "b", "c"] and "gpu, a: in " in capsys.readouterr().out


def test_settings_are_recorded_without_shapes_and_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "cells", lambda settings: [("a", lambda: {"rows": []})])
    bench.main(bench.Bench("gpu", out=str(tmp_path / "records.jsonl"), device="cpu", steps=7))
    about = json.loads((tmp_path / "records.jsonl").read_text())["about"]
    assert {*about["settings"]} == {*bench.TRAINING, *bench.INFERENCE}
    assert about["settings"]["steps"] == 7 and about["settings"]["rounds"] == 3


def test_threads_hold_for_a_suite_and_its_processes_and_are_recorded(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    used = []

    def measure():
        used.append((torch.get_num_threads(), timing.own_process(torch.get_num_threads)))
        return {"rows": []}

    monkeypatch.setattr(bench, "cells", lambda settings: [("a", measure)])
    try:
        bench.main(bench.Bench("kd", out=str(tmp_path / "records.jsonl"), threads=3))
    finally:
        torch.set_num_threads(before)
    (record,) = read_records(tmp_path / "records.jsonl")
    assert used == [(3, 3)] and record["about"]["machine"]["threads"] == 3
    for suite in ("train", "dtypes", "kd", "cuts", "infer", "ddp", "gpu"):
        assert bench.resolve(bench.Bench(suite, threads=3)).threads == 3
        assert bench.resolve(bench.Bench(suite)).threads == before


def test_block_size_holds_for_both_sizes_of_a_shape():
    flags = bench.resolve(bench.Bench("train", device="cpu", block_size=32))
    load, target, enlarged = variants.fitted(flags, "laptop", 256)
    assert (target.block_size, enlarged.block_size, load.micro_batch) == (32, 32, 64)


def test_default_vocabulary_is_the_shape_s():
    names = [name for name, _ in bench.cells(bench.resolve(bench.Bench("cuts")))]
    assert names == ["1m, V = 256", "135m, V = 49152"]
    params = [variants.shapes(name, v, 2.6)[1].num_params()["total"] for name, v in (("1m", 256), ("135m", 49152))]
    assert params == [1_017_216, 134_515_008]
    assert len(bench.cells(bench.resolve(bench.Bench("train", presets=("toy", "1m"))))) == 4
    assert len(bench.cells(bench.resolve(bench.Bench("gpu", device="cpu")))) == 2 * 4


REFUSED = {
    "train --minutes 3": "--minutes has no effect in train; leave it out",
    "scale --rounds 3": "--rounds has no effect in scale",
    "start --vocab 300": "--vocab has no effect in start",
    "report --presets toy": "--presets has no effect in report",
    "train --rounds 0": "--rounds 0 must be at least 1",
    "train --vocab 1": "--vocab 1 must be at least 2",
    "train --micro-batch 0": "--micro-batch 0 must be at least 1",
    "infer --keep 1.5": "--keep 1.5 must be above 0 and at most 1",
    "infer --keep 0": "--keep 0.0 must be above 0",
    "infer --decode 1": "--decode 1 must be at least 2",
    "cuts --steps 1": "--steps 1 must be at least 2",
    "kd --threads 0": "--threads 0 must be at least 1",
    "train --block-size 0": "--block-size 0 must be at least 1",
    "train --no-peers": "--peers has no effect in train",
    "infer --block-size 64": "--block-size has no effect in infer",
    "gpu --minutes 0": "--minutes 0.0 must be above 0",
    "train --enlarge-ff 0.5": "--enlarge-ff 0.5 must be at least 1",
    "train --device tpu": "device 'tpu' is not available",
}


@pytest.mark.parametrize("command, message", REFUSED.items())
def test_refusals_are_one_sentence_with_the_numbers_and_the_remedy(command, message):
    with pytest.raises(UserError, match=message) as problem:
        bench.main(parse(bench.Bench, command.split()))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("command, word", [("fast", "fast"), ("train --presets huge", "huge"),
                                           ("train --dtype int8", "int8")])
def test_unknown_names_end_with_code_2(command, word, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(bench.Bench, command.split())
    assert ended.value.code == 2 and word in capsys.readouterr().err


def test_every_flag_is_read_by_a_suite():
    flags = {flag.name for flag in dataclasses.fields(bench.Bench)} - {"suite", "out"}
    assert flags == set().union(*(suite.reads for suite in bench.SUITES.values()))


def test_report_needs_records(tmp_path):
    with pytest.raises(UserError, match="has no records; give the --out of a suite that ran"):
        bench.main(bench.Bench("report", out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()

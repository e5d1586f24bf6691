"""Runs side by side: all are run, late ones not, stopped ones are saved and go on; and when to evaluate."""
import os
import signal
import time
from pathlib import Path

import pytest

import report
import schedule
import sweep
from common import UserError, read_records

TOY = dict(plan="scratch", preset="toy", batch_tokens=256, micro_batch=4, eval_windows=4)


def note(folder, text):
    Path(folder, text).write_text(str(os.getpid()))


def leave(folder, text):
    note(folder, text)
    if text == "b":
        raise SystemExit(1)


def refuse(folder):
    raise UserError("a sentence")



def test_each_job_has_a_process_of_its_own(tmp_path):
    assert sweep.side_by_side(note, [(tmp_path, name) for name in "abc"], 2) == 3
    assert len({(tmp_path / name).read_text() for name in "abc"} | {str(os.getpid())}) == 4


def test_none_begins_too_late_and_one_that_ends_early_stops_no_other(tmp_path):
    assert sweep.side_by_side(note, [(tmp_path, "late")], 1, until=time.time() - 1) == 0
    assert not (tmp_path / "late").exists()
    assert sweep.side_by_side(leave, [(tmp_path, name) for name in "abc"], 1) == 2
    assert (tmp_path / "c").exists()


def test_what_a_job_raises_reaches_the_caller(tmp_path):
    with pytest.raises(UserError, match="a sentence"):
        sweep.side_by_side(refuse, [(tmp_path,)], 1)


def test_time_ends_a_job_that_does_not_train():
    before = signal.getsignal(signal.SIGTERM)
    try:
        begin = time.time()
        assert not sweep.call((time.sleep, (30,), begin + .5))
        assert time.time() - begin < 20
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_time_stopped_is_saved_and_goes_on(tmp_path, monkeypatch):
    """Stopped in the middle by the clock: what it ends with is what an undisturbed run ends with."""
    before, folder = signal.getsignal(signal.SIGTERM), tmp_path / "a"
    real = schedule.lr_at

    def stop_here(step, *rest):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, *rest)

    monkeypatch.setattr(schedule, "lr_at", stop_here)
    try:
        assert not sweep.call((sweep.one, (folder, dict(TOY, steps=12)), None))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "summary" not in report.records(folder)
    monkeypatch.setattr(schedule, "lr_at", real)
    sweep.one(folder, dict(TOY, steps=12))
    sweep.one(tmp_path / "b", dict(TOY, steps=12))
    a, b = (report.records(tmp_path / name)["summary"][0] for name in "ab")
    assert a["val_loss"] == b["val_loss"]


def test_records_are_kept_without_training_steps(tmp_path):
    sweep.one(tmp_path / "a", dict(TOY, steps=12))
    sweep.keep_records(tmp_path / "a", tmp_path / "kept" / "a.jsonl")
    every, kept = read_records(tmp_path / "a" / "metrics.jsonl"), read_records(tmp_path / "kept" / "a.jsonl")
    assert kept == [r for r in every if r["tag"] != "step"] and len(kept) < len(every)


def test_evaluations_by_growth_are_evenly_spaced_on_a_logarithmic_axis():
    assert [s for s in range(26) if schedule.eval_at(s, 10)] == [0, 10, 20]
    at = [s for s in range(2000) if schedule.eval_at(s, 8, 1.2)]
    assert at[:8] == [0, 8, 10, 12, 14, 17, 20, 24] and at[-1] == 1899            # 8 · 1.2^30
    assert [s for s in range(20) if schedule.eval_at(s, 1, 2.)] == [0, 1, 2, 4, 8, 16]
    assert all(abs(b / a - 1.2) < .05 for a, b in zip(at[12:], at[13:]))

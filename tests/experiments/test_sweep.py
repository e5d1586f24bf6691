"""Runs side by side: all are run, late ones not, stopped ones are saved and go on; and when to evaluate."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import report
import schedule
import train
from common import UserError, read_records
from experiments import sweep

ROOT = Path(__file__).parents[2]
TOY = dict(plan="scratch", preset="toy", batch_tokens=256, micro_batch=4, eval_windows=4)


def note(folder, text):
    Path(folder, text).write_text(str(os.getpid()))


def leave(folder, text):
    note(folder, text)
    if text == "b":
        raise SystemExit(143)


def refuse(folder):
    raise UserError("a sentence")


def die(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def stay(folder):
    note(folder, "begun")
    time.sleep(120)


def alive(pid):
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(.1)
    return condition()


def test_each_job_has_a_process_of_its_own(tmp_path):
    assert sweep.side_by_side(note, [(tmp_path, name) for name in "abc"], 2) == 3
    assert len({(tmp_path / name).read_text() for name in "abc"} | {str(os.getpid())}) == 4


def test_late_and_stopped_jobs(tmp_path):
    assert sweep.side_by_side(note, [(tmp_path, "late")], 1, until=time.time() - 1) == 0
    assert not (tmp_path / "late").exists()
    assert sweep.side_by_side(leave, [(tmp_path, name) for name in "abc"], 1) == 2
    assert (tmp_path / "c").exists()


@pytest.mark.parametrize("function, code", [(refuse, 2), (die, -9)])
def test_a_failed_job_ends_the_others(tmp_path, function, code, capfd):
    """Nobody waits for a process that the system killed."""
    with pytest.raises(UserError, match=f"exit code {code}"):
        sweep.side_by_side(function, [(tmp_path,)], 1)
    assert function is die or "error: a sentence" in capfd.readouterr().err


def test_time_ends_a_job_that_does_not_train(tmp_path):
    assert sweep.side_by_side(stay, [(tmp_path,)], 1, until=time.time() + 8) == 0
    assert (tmp_path / "begun").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_end_with_their_parent(tmp_path, number):
    """A job that went on alone would write into the folder of the one that the same command starts again."""
    folders = [str(ROOT), str(ROOT / "tests" / "experiments")]
    code = f"""import sys
sys.path[:0] = {folders}
import test_sweep
from experiments import sweep
if __name__ == "__main__":
    sweep.side_by_side(test_sweep.stay, [({str(tmp_path)!r},)], 1)
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stderr=subprocess.DEVNULL)
    assert until((tmp_path / "begun").exists)
    time.sleep(.2)
    pid = int((tmp_path / "begun").read_text())
    parent.send_signal(number)
    parent.wait()
    assert until(lambda: not alive(pid))


def test_a_run_that_was_stopped_is_saved_and_goes_on(tmp_path, monkeypatch):
    """What it ends with is what an undisturbed run ends with; its records are kept once it is finished."""
    folder, real = tmp_path / "a", schedule.lr_at

    def stop_here(step, *rest, **named):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, *rest, **named)

    monkeypatch.setattr(schedule, "lr_at", stop_here)
    with pytest.raises(SystemExit) as end:
        sweep.run_plan(folder, dict(TOY, steps=12))
    assert end.value.code in sweep.STOPPED and "summary" not in report.records(folder)
    with pytest.raises(UserError, match="is not finished"):
        sweep.without_steps(folder)
    monkeypatch.setattr(schedule, "lr_at", real)
    sweep.run_plan(folder, dict(TOY, steps=12))
    sweep.run_plan(tmp_path / "b", dict(TOY, steps=12))
    a, b = (report.records(tmp_path / name)["summary"][0] for name in "ab")
    assert a["val_loss"] == b["val_loss"]


def test_a_run_does_not_depend_on_what_the_machine_is_fast_at(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(train, "BFLOAT16_WIDTH", 1)
    sweep.run_plan(tmp_path / "a", dict(TOY, steps=3))
    sweep.run_plan(tmp_path / "b", dict(TOY, steps=3, dtype="bfloat16"))
    dtypes = [report.records(tmp_path / name)["config"][0]["dtype"] for name in "ab"]
    assert dtypes == ["float32", "bfloat16"]


def test_a_run_without_a_newer_flag_goes_on(tmp_path):
    """Its folder does not name the flag: it is taken to have run with the default, and with no other value."""
    sweep.run_plan(tmp_path / "a", dict(TOY, steps=6))
    path = max((tmp_path / "a").glob("ckpt_*.pt"))
    saved = torch.load(path, weights_only=True)
    del saved["run"]["eval_growth"]
    torch.save(saved, path)
    sweep.run_plan(tmp_path / "a", dict(TOY, steps=6))
    with pytest.raises(UserError, match="eval_growth is 1.0 there and 1.5 here"):
        sweep.run_plan(tmp_path / "a", dict(TOY, steps=6, eval_growth=1.5))


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    with sweep.locked(tmp_path / "a"), pytest.raises(UserError, match="another process is at work in .*; wait for it"):
        sweep.run_plan(tmp_path / "a", dict(TOY, steps=6))
    assert not list((tmp_path / "a").iterdir())
    sweep.run_plan(tmp_path / "a", dict(TOY, steps=6))                      # it was let go
    assert "summary" in report.records(tmp_path / "a")


def test_a_model_of_another_cut_is_made_again(tmp_path):
    """Its name says only whose it is; the same cut is not made twice."""
    cut = dict(init=str(tmp_path / "a"), structure="ffn", score="magnitude", keep=.7, windows=4, block_size=64)
    sweep.run_plan(tmp_path / "a", dict(TOY, steps=3))
    after = dict(TOY, steps=3, init=str(tmp_path / "from-b"), preset="laptop", lr=1e-2)
    sweep.run_plan(tmp_path / "b", after, cut=cut)
    made = tmp_path / "from-b" / "ckpt_00000000.pt"
    was, d_ff = made.stat().st_mtime_ns, report.records(tmp_path / "b")["summary"][0]["d_ff"]
    sweep.run_plan(tmp_path / "b", after, cut=dict(cut, init="moved"))
    assert made.stat().st_mtime_ns == was
    sweep.run_plan(tmp_path / "b", after, cut=dict(cut, keep=.6))
    records = report.records(tmp_path / "b")
    assert made.stat().st_mtime_ns > was and records["config"][0]["cut"]["recipe"]["keep"] == .6
    assert sum(records["summary"][0]["d_ff"]) < sum(d_ff)


def test_records_are_kept_without_training_steps(tmp_path):
    sweep.run_plan(tmp_path / "a", dict(TOY, steps=12))
    every, kept = read_records(tmp_path / "a" / "metrics.jsonl"), sweep.without_steps(tmp_path / "a")
    assert kept == [r for r in every if r["tag"] != "step"] and len(kept) < len(every)


def keep(file, name):
    for loss in (2., 1.):                                              # the second time in place of the first
        sweep.put_runs(file, {name: [{"tag": "config"}, {"tag": "summary", "loss": loss}]})


def test_runs_that_end_together_are_all_kept(tmp_path):
    file = tmp_path / "new" / "all.jsonl"
    names = [f"run-{i}" for i in range(6)]
    assert sweep.side_by_side(keep, [(file, name) for name in names], 6) == 6
    runs = report.finished(file)
    assert [*runs] == names and all(run["summary"][0]["loss"] == 1 for run in runs.values())
    assert len(file.read_text().splitlines()) == 12
    sweep.put_runs(file, dict.fromkeys(names[1:], ()))
    assert [*report.finished(file)] == names[:1] and report.records(file) == runs["run-0"]
    assert report.finished(tmp_path / "none.jsonl") == {}


def test_evaluations_by_growth():
    assert [s for s in range(26) if schedule.eval_at(s, 10)] == [0, 10, 20]
    at = [s for s in range(2000) if schedule.eval_at(s, 8, 1.2)]
    assert at[:8] == [0, 8, 10, 12, 14, 17, 20, 24] and at[-1] == 1899            # 8 · 1.2^30
    assert [s for s in range(20) if schedule.eval_at(s, 1, 2.)] == [0, 1, 2, 4, 8, 16]
    assert all(abs(b / a - 1.2) < .05 for a, b in zip(at[12:], at[13:]))

"""Nothing lost, nothing silent: damaged checkpoints and records, full disks, two processes in one folder, signals."""
import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_train import ENVIRONMENT, ROOT, TORCHRUN, result, same, start, toy, train_toy

import checkpoint
import common
from common import UserError, read_records, write_atomic
from model import GPT, GPTConfig

MODEL = GPTConfig(64, 16, 16, 8, (2, 2), (1, 1), (24, 24))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train_toy(out, plan="idea")
    return result(out)


def flip(file, position):
    """Turn one bit of a file over."""
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def a_tensor_in(file):
    """A position in the file where weights lie: the last third of a checkpoint is tensors."""
    return file.stat().st_size * 2 // 3


# -- checkpoints

@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_newest_checkpoint_makes_room_and_the_run_is_the_same(tmp_path, whole, capsys, damage):
    train_toy(tmp_path / "run", plan="idea")
    newest = checkpoint.newest(tmp_path / "run")
    if damage == "flipped":
        flip(newest, a_tensor_in(newest))
    else:
        newest.write_bytes(newest.read_bytes()[:5000 if damage == "truncated" else 0])
    train_toy(tmp_path / "run", plan="idea")
    warning = capsys.readouterr().err
    assert newest.name in warning and "going on from ckpt_00000056.pt" in warning
    assert same(result(tmp_path / "run"), whole)
    assert newest.with_suffix(".damaged").exists()


def test_where_both_checkpoints_are_damaged_one_sentence_names_both_and_nothing_is_changed(tmp_path):
    train_toy(tmp_path / "run", plan="idea")
    files = checkpoint.checkpoints(tmp_path / "run")
    for file in files:
        flip(file, a_tensor_in(file))
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=f"{files[1].name} is damaged.*{files[0].name} is damaged.*restore") as refusal:
        train_toy(tmp_path / "run", plan="idea")
    assert "\n" not in str(refusal.value)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_no_flipped_bit_of_a_checkpoint_is_silent(tmp_path):
    """Each flip is refused in a sentence, or changes nothing that is read."""
    file = tmp_path / "model.pt"
    state = {"step": 7, "seconds": {"train": 1.5}, "alive": [(0, "ffn", torch.arange(24))], "flags": [True, None, "x"]}
    checkpoint.save(file, GPT(MODEL), **state)
    content = file.read_bytes()
    model, about = checkpoint.load(file)
    digest = checkpoint.digest_of({"model": model.state_dict(), **about})
    dice = random.Random(0)
    refused = 0
    for _ in range(300):
        file.write_bytes(content)
        flip(file, dice.randrange(len(content)))
        try:
            model, about = checkpoint.load(file)
        except UserError as refusal:
            assert "\n" not in str(refusal)
            refused += 1
        else:
            assert checkpoint.digest_of({"model": model.state_dict(), **about}) == digest
    assert refused > 150


def test_a_checkpoint_from_before_digests_is_read(tmp_path):
    checkpoint.save(tmp_path / "model.pt", GPT(MODEL), step=1)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    del content["digest"]
    torch.save(content, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt")[1]["step"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_tensor_s_name(tmp_path, value):
    model = GPT(MODEL)
    model.blocks[1].ffn.up.weight.data[3, 5] = value
    checkpoint.save(tmp_path / "model.pt", model)
    with pytest.raises(UserError, match=r"1 of 384 values of blocks\.1\.ffn\.up\.weight are infinite or not a number"):
        checkpoint.load(tmp_path / "model.pt")


def test_a_checkpoint_that_is_no_run_s_is_refused_in_a_sentence(tmp_path):
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    newest = checkpoint.newest(tmp_path / "run")
    for broken in ("alive", "optimizer", "judged", "step", "window", "flops"):
        model, about = checkpoint.load(newest)
        good = newest.read_bytes()
        about[broken] = {"alive": 3, "optimizer": {}}.get(broken)
        if broken not in ("alive", "optimizer"):
            del about[broken]
        checkpoint.save(newest, model, **about)
        with pytest.raises(UserError, match="does not hold the state of a run"):
            train_toy(tmp_path / "run", plan="scratch", steps=10)
        newest.write_bytes(good)


@pytest.mark.parametrize("problem", [RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"),
                                     OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_is_a_sentence_with_the_bytes_and_keeps_what_was_there(tmp_path, monkeypatch, problem):
    file = tmp_path / "model.pt"
    checkpoint.save(file, GPT(MODEL), step=1)

    def full(content, target):
        target.write(b"half of it")
        raise problem

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"model.pt was not written \(.*\): it needs [\d,]+ bytes and [\d,]+ are free"):
        checkpoint.save(file, GPT(MODEL), step=2)
    monkeypatch.undo()
    assert checkpoint.load(file)[1]["step"] == 1 and [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_temporary_file_follows_no_planted_link(tmp_path, monkeypatch):
    monkeypatch.setattr(common.secrets, "token_hex", lambda _: "known")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".target.known.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "target", lambda file: file.write(b"x"))
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "target").exists()


# -- records

def test_damaged_and_missing_records_are_named_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    train_toy(out, plan="idea", stage="prune")
    metrics = out / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    cases = {
        "line 5 of .*metrics.jsonl is damaged": [*lines[:4], b'{"tag": "st\xff\n', *lines[5:]],
        f"has {len(lines) - 2} of the {len(lines) - 1} records": [*lines[:4], *lines[5:]],
        f"has other than the {len(lines) - 1} records": [*lines[:4], lines[4].replace(b"2", b"3"), *lines[5:]],
        f"has 0 of the {len(lines) - 1} records": [],
    }
    for sentence, damaged in cases.items():
        metrics.write_bytes(b"".join(damaged))
        with pytest.raises(UserError, match=sentence) as refusal:
            train_toy(out, plan="idea")
        assert "\n" not in str(refusal.value) and metrics.read_bytes() == b"".join(damaged)
    metrics.unlink()
    with pytest.raises(UserError, match=f"has 0 of the {len(lines) - 1} records"):
        train_toy(out, plan="idea")


def test_what_is_no_record_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"tag": "config"}\n[1, 2]\n')
    with pytest.raises(UserError, match=r"line 2 of .*records.jsonl is no record but '\[1, 2\]'"):
        read_records(tmp_path / "records.jsonl")
    (tmp_path / "records.jsonl").write_text('{"a": ' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match="line 1 of .*records.jsonl is damaged"):
        read_records(tmp_path / "records.jsonl")


# -- processes and signals

def test_two_processes_cannot_work_in_one_folder(tmp_path, whole):
    first = start(plan="idea", out=tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.005)
    second = start(plan="idea", out=tmp_path / "run")
    _, errors = second.communicate()
    assert second.returncode == 2 and "another process works in" in errors and "Traceback" not in errors
    assert first.wait() == 0, first.stderr.read()
    assert same(result(tmp_path / "run"), whole)


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".ckpt_00000007.pt.0123456789abcdef.tmp").write_text("half of it")
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_sighup_saves_like_sigterm(tmp_path, whole):
    out = tmp_path / "run"
    process = start(plan="idea", out=out)
    while not any(record["tag"] == "step" for record in read_records(out / "metrics.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    printed, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP and "the same command goes on" in printed
    train_toy(out, plan="idea")
    assert same(result(out), whole)


def test_ctrl_c_before_the_loop_is_one_line(tmp_path):
    process = start(plan="idea", out=tmp_path / "run")
    while not (tmp_path / "run" / ".lock").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    # The loop may have been reached: then it saves, says so and ends with the same code.
    assert process.returncode == 130 and "Traceback" not in errors


def test_processes_with_folders_of_their_own_are_refused(tmp_path):
    """As on two nodes without a common file system: the first process has a checkpoint, the second one has none."""
    code = ("import os, sys; os.chdir(sys.argv.pop(1) + os.environ['RANK']); sys.path.insert(0, sys.argv.pop(1)); "
            "import common, train; common.run(train.main, common.parse(train.Train))")
    for rank in "01":
        (tmp_path / f"node{rank}").mkdir()
    train_toy(tmp_path / "node0" / "run", plan="idea", stage="enlarge")
    (tmp_path / "both.py").write_text(code)
    settings = toy(plan="idea", out="run")
    words = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    done = subprocess.run([*TORCHRUN, tmp_path / "both.py", tmp_path / "node", ROOT, *words], env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "the 2 processes resume at steps 0, 30" in done.stderr
    assert "on a file system that all of them share" in done.stderr
    assert [path.name for path in (tmp_path / "node1").iterdir()] == []


def test_kills_during_saves_and_rotation_lose_nothing(tmp_path):
    """A checkpoint every step, killed at random moments. `python tests/test_faults.py 200` does it 200 times."""
    kill_often(tmp_path / "run", times=4, seed=0)
    train_toy(tmp_path / "whole", plan="idea", save_every=1)
    assert same(result(tmp_path / "run"), result(tmp_path / "whole"))


def kill_often(out, times, seed):
    """Start the run again and again and kill it at random moments; then let it end."""
    dice = random.Random(seed)
    settings = dict(plan="idea", out=out, save_every=1)
    for _ in range(times):
        process = start(**settings)
        seen = len(checkpoint.checkpoints(out)) and checkpoint.newest(out).name
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            newest = checkpoint.newest(out)
            if newest is not None and newest.name != seen:
                break
            time.sleep(0.001)
        time.sleep(dice.random() * 0.1)
        process.kill()
        process.communicate()
    process = start(**settings)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        kill_often(f"{folder}/run", times=int(sys.argv[1]), seed=1)
        train_toy(f"{folder}/whole", plan="idea", save_every=1)
        assert same(result(f"{folder}/run"), result(f"{folder}/whole"))
        print(f"killed {sys.argv[1]} times, and bit for bit the run that was not", sorted(os.listdir(f"{folder}/run")))

"""Checkpoints that several processes write: the same run in 1, 2 and 3 processes, killed, damaged and sent."""
import dataclasses
import os
import pickle
import random
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from helpers import CONFIGS, batch, loss_of, new
from test_shard import sharded_copy
from test_shard import start as start_worker

import checkpoint
import prune
import shard
import train
from checkpoint import State
from common import UserError
from formats import dcp
from model import GPT

# Odd widths, so that the last process has fewer rows than the others, or none.
CONFIG = dataclasses.replace(CONFIGS["all"], vocab_size=260)
SETTINGS = train.Train(lr=5e-3, weight_decay=0.1)


def run_in(world, worker, folder):
    """Run worker(folder) in so many processes. They are forked: another import of torch in each would take longer
    than all that they do."""
    torch.multiprocessing.start_processes(start_worker, (world, worker, str(folder), (folder,)), nprocs=world,
                                          start_method="fork")


def run_folder(path):
    """The folder of a run, as each of its processes has it."""
    writes = not dist.is_initialized() or dist.get_rank() == 0
    folder = checkpoint.RunFolder(path, {"tokenizer": "bytes", "seed": 3}, {}, 256, {}, writes=writes)
    if writes and not folder.metrics.exists():
        path.mkdir(exist_ok=True)
        folder.rewind(0)
    return folder


def trained_state(step=7):
    """A whole model with Adam's moments, the same in every process."""
    model, optimizer = new(CONFIG)
    for number in range(2):
        loss_of(model, *batch(CONFIG, number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    averages = {key: torch.rand(2, n) for key, n in CONFIG.widths().items()}
    return State(model, optimizer, prune.everything(CONFIG), averages, step=step, window={"ce": 1.5})


def sharded_state(step, kind="fsdp", local_world=1):
    """The same state over the processes, and the whole one."""
    whole = trained_state(step)
    model, optimizer = sharded_copy(whole.model, whole.optimizer, kind, local_world)
    for p, sharded in zip(whole.model.parameters(), model.parameters()):
        state = whole.optimizer.state[p]
        moments = {key: shard.spread_rows(state[key], sharded) for key in checkpoint.MOMENTS}
        optimizer.state[sharded] = {"step": state["step"].clone(), **moments}
    return State(model, optimizer, whole.alive, whole.averages, step=step, window=whole.window), whole


def tensors_of(state):
    """Weights, moments and step counts by name, whole."""
    tensors = {}
    shard.release(state.model)
    for name, p in state.model.named_parameters():
        tensors[name] = shard.whole(p.detach())
        for key, value in state.optimizer.state[p].items():
            tensors[f"{key}.{name}"] = shard.whole(value)
    return tensors


def assert_same(state, expected):
    ours, others = tensors_of(state), tensors_of(expected)
    assert ours.keys() == others.keys()
    for name in ours:
        assert ours[name].dtype == others[name].dtype and torch.equal(ours[name], others[name]), name
    assert (state.step, state.window) == (expected.step, expected.window)
    for own, other in ((state.alive, expected.alive), (state.averages, expected.averages)):
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def build(config):
    mesh = shard.make_mesh("fsdp", "cpu", dist.get_world_size(), dist.get_world_size())
    return shard.build(config, mesh, "cpu", torch.float64)


def make_optimizer(model):
    return train.make_optimizer(model, SETTINGS)


def resume(path):
    return run_folder(path).resume("cpu", make_optimizer, build if dist.is_initialized() else None)


def two_write(folder):
    """Two processes save, with a copy of the model each and with half of it each."""
    for kind in ("hsdp", "fsdp"):
        state, whole = sharded_state(7, kind, local_world=1)
        run = run_folder(folder / kind)
        with torch.no_grad():
            state.model.hidden(batch(CONFIG, 0)[0])              # leaves the embedding whole: save drops it
        run.save(state, {})
        assert_same(resume(folder / kind), whole)
        run.save_teacher(state.model, 7)
        files = sorted(file.name for file in (folder / kind / "ckpt_00000007" / "model").iterdir())
        assert files == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def three_go_on(folder):
    """Three processes resume what one and two wrote, and save; the last save is killed."""
    for name in ("one", "fsdp", "hsdp"):
        assert_same(resume(folder / name), trained_state(7))
    state = resume(folder / "fsdp")
    run = run_folder(folder / "fsdp")
    for path in (folder / "fsdp" / "teacher", folder / "one" / "teacher.pt"):
        run.open_teacher(path, state, build)
        assert_same_weights(state.teacher, trained_state().model)
    assert state.teacher_file["sha256"] == checkpoint.fingerprint(trained_state().model)
    for step in (8, 9):
        state.step = step
        run.save(state, {})
        run.save(state, {})                                     # the same one
    state.step = 10
    if dist.get_rank() == 1:
        dcp.digests_of_own = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run.save(state, {})


def assert_same_weights(model, expected):
    shard.release(model)
    for p, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(shard.whole(p.detach()), other)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs that 1, 2 and 3 processes have written."""
    folder = tmp_path_factory.mktemp("runs")
    run_folder(folder / "one").save(trained_state(7), {})
    run_folder(folder / "one").save_teacher(trained_state(7).model, 7)
    run_in(2, two_write, folder)
    (folder / "store").unlink()
    shutil.copytree(folder / "fsdp", folder / "two")
    with pytest.raises(Exception, match="process 1 terminated with signal SIGKILL"):
        run_in(3, three_go_on, folder)
    return folder


def test_one_two_and_three_processes_go_on_from_each_other(runs):
    for name, step in (("one", 7), ("hsdp", 7), ("two", 7), ("fsdp", 9)):
        assert_same(resume(runs / name), trained_state(step))
        model, about = checkpoint.load(runs / name)
        assert about["step"] == step and type(model) is GPT
        assert_same_weights(model, trained_state().model)


def test_the_newest_two_stay_and_what_a_killed_process_left_goes(runs):
    names = {path.name for path in (runs / "fsdp").iterdir()}
    assert names == {"ckpt_00000008", "ckpt_00000009", "ckpt_00000010.tmp", "metrics.jsonl", "teacher"}
    shutil.copytree(runs / "fsdp", runs / "killed")
    with checkpoint.locked(runs / "killed"):
        assert not (runs / "killed" / "ckpt_00000010.tmp").exists()
    state = trained_state(10)
    run_folder(runs / "killed").save(state, {})                  # files and folders mixed
    assert [path.name for path in checkpoint.checkpoints(runs / "killed")] == ["ckpt_00000009", "ckpt_00000010.pt"]
    assert_same(resume(runs / "killed"), state)

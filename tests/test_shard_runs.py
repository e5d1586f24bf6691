"""Runs whose processes share the model: the same records, cuts and weights as one process, whatever their number was
when the run began, and what is refused."""
import gc
import math
import os
import re
import socket
from pathlib import Path

import pytest
import torch
import tyro
from helpers import masks_of
from test_train import ROOT, TORCHRUN, result, start, toy, train_toy

import checkpoint
import model as models
import shard
import train
from common import UserError
from methods import sparse

pytestmark = pytest.mark.skipif(torch.__version__ < shard.OLDEST_ON_CPU, reason="FSDP2 on CPUs needs a newer PyTorch")
BATCH = dict(batch_tokens=12 * 64, dtype="float64")            # 12 windows: for 1, 2 and 3 processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def process(rank, world, runs):
    torch.set_num_threads(1)
    for port, local_world, settings in runs:
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank % local_world),
                           LOCAL_WORLD_SIZE=str(local_world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        train.main(train.Train(**toy(**settings)), quiet=True)
    os._exit(0)                               # gloo's threads have been seen to abort a process that ended normally


def train_shared(world, *runs, local_world=None):
    """Run these settings one after the other, each in so many processes that share the model."""
    calls = [(free_port(), local_world or world, {"shard": "fsdp", **settings}) for settings in runs]
    torch.multiprocessing.start_processes(process, (world, calls), nprocs=world, start_method="fork")


def assert_alike(one, many, near=1e-9):
    """Two folders hold the same run but for rounding: every record, all weights."""
    (weights_one, state_one, records_one), (weights_many, state_many, records_many) = result(one), result(many)
    assert state_one["run"] == state_many["run"] and len(records_one) == len(records_many)
    for a, b in zip(records_one, records_many):
        assert a["tag"] == b["tag"] and a.get("d_ff") == b.get("d_ff") and a.get("n_kv_head") == b.get("n_kv_head")
        assert a.get("text") == b.get("text")
        for key in ("loss", "kl", "val_loss", "grad_norm", "flops_executed"):
            assert (a.get(key) or 0) == pytest.approx(b.get(key) or 0, rel=near, abs=near)
    assert weights_one.keys() == weights_many.keys()
    for name, weight in weights_one.items():
        assert weight.shape == weights_many[name].shape and (weight - weights_many[name]).abs().max() < 1e-6, name


def test_two_processes_that_share_a_model_are_one(tmp_path):
    settings = dict(dtype="float64")
    taught = dict(plan="idea-kd", recompute=True, **settings)
    interleaved = dict(plan="adapt", **settings)
    train_shared(2, dict(out=str(tmp_path / "taught"), **taught), dict(out=str(tmp_path / "adapt"), **interleaved))
    train_toy(tmp_path / "taught-one", **taught)
    assert_alike(tmp_path / "taught-one", tmp_path / "taught")
    train_toy(tmp_path / "adapt-one", **interleaved)
    assert_alike(tmp_path / "adapt-one", tmp_path / "adapt", near=1e-6)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """One, two and three of them; sharded or not."""
    out = str(tmp_path / "run")
    settings = dict(plan="idea-kd", **BATCH)
    train_toy(out, stage="enlarge", **settings)
    assert checkpoint.newest(Path(out)).is_file()
    train_shared(2, dict(out=out, stage="prune", **settings))
    assert checkpoint.newest(Path(out)).is_dir() and Path(out, "teacher").is_dir()
    train_shared(3, dict(out=out, stage="recover", **settings))
    Path(checkpoint.newest(Path(out)), "state.pt").unlink()              # damaged: one process takes the one before
    train_toy(out, **settings)
    assert checkpoint.newest(Path(out)).is_file()
    train_toy(tmp_path / "one", **settings)
    assert_alike(tmp_path / "one", tmp_path / "run")


def test_models_that_were_sliced_or_dropped_are_freed_at_once(tmp_path, monkeypatch):
    """Python by itself would free a sharded model only when it next looks for cycles, which never happens here."""
    count_flops = train.count_flops

    def count_models(setup, state, *args):
        count_flops(setup, state, *args)
        if state.step == 0:
            gc.collect()                      # importing PyTorch's compiler leaves a cycle around the first frames
        held = [thing for thing in gpts() if not any(thing is other for other in before)]
        assert len(held) == 1 + (state.teacher is not None)

    def gpts():
        return [thing for thing in gc.get_objects() if issubclass(type(thing), models.GPT)]

    monkeypatch.setattr(train, "count_flops", count_models)
    monkeypatch.setattr(train.distill, "overtaken", lambda steps, **_: steps == 3)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 1)
    settings = dict(plan="idea-kd", steps=20, prune_share=0.3, eval_windows=1, save_every=99, eval_every=99, **BATCH)
    gc.collect()
    before = gpts()                           # those that other tests hold
    gc.disable()
    try:
        train_shared(2, dict(out=str(tmp_path / "many"), **settings))
        train_toy(tmp_path / "one", **settings)
    finally:
        gc.enable()
    for name in ("one", "many"):
        tags = [record["tag"] for record in result(tmp_path / name)[2]]
        assert tags.count("slice") == 1 and tags.count("teacher") == 2


def test_resuming_moves_no_bit(tmp_path):
    """With the same number of processes a run in stages is the run in one go, bit for bit."""
    settings = dict(plan="idea", steps=40)
    stages = [dict(out=str(tmp_path / "parts"), stage=stage, **settings) for stage in ("enlarge", "prune", "recover")]
    train_shared(2, dict(out=str(tmp_path / "whole"), **settings), *stages)
    weights, _, records = result(tmp_path / "whole")
    again, _, records_again = result(tmp_path / "parts")
    assert all(torch.equal(weights[name], again[name]) for name in weights) and records == records_again


def test_two_machines_with_a_copy_each_and_a_given_sparse_model(tmp_path):
    """HSDP over 2 x 2 processes; and 2:4 weights, whose zeros stay."""
    train_toy(tmp_path / "dense", plan="scratch", steps=10)
    model, about = checkpoint.load(tmp_path / "dense")
    masks = masks_of(model, sparse.Pattern(2, 4))
    sparse.hold_(model, None, masks)
    checkpoint.save(tmp_path / "sparse.pt", model, run=about["run"], tokenizer_files=about["tokenizer_files"],
                    masks=sparse.pack(masks))
    settings = dict(plan="scratch", init=str(tmp_path / "sparse.pt"), preset="laptop", steps=12, block_size=64,
                    save_every=5, **BATCH)
    train_shared(4, dict(out=str(tmp_path / "hsdp"), shard="hsdp", **settings), local_world=2)
    train_toy(tmp_path / "one", **settings)
    assert_alike(tmp_path / "one", tmp_path / "hsdp")
    weights, state, _ = result(tmp_path / "hsdp")
    kept = sparse.unpack(state["masks"])
    for name, mask in masks.items():
        assert torch.equal(kept[name], mask) and (weights[name][~mask] == 0).all()


def test_zeros_at_random_are_those_of_one_process(tmp_path):
    settings = dict(plan="scratch", sparse=0.5, steps=6, **BATCH)
    train_shared(2, dict(out=str(tmp_path / "many"), **settings))
    train_toy(tmp_path / "one", **settings)
    assert_alike(tmp_path / "one", tmp_path / "many")
    _, state, _ = result(tmp_path / "one")
    _, state_of_many, _ = result(tmp_path / "many")
    masks = sparse.unpack(state["masks"])
    masks_of_many = sparse.unpack(state_of_many["masks"])
    assert masks and all(torch.equal(masks[name], masks_of_many[name]) for name in masks)


def test_calibration_text_that_cannot_be_dealt_out_is_refused_before_the_run_begins(tmp_path):
    sentence = "--calibration-windows 5 in batches of 1 cannot be dealt out to 2 processes; try 6"
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=sentence):
        train_shared(2, dict(out=str(tmp_path / "run"), plan="adapt", calibration_windows=5))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["train.py", "shard.py", "README.md"])
def test_batches_of_the_commands_that_are_shown_can_be_dealt_out(file):
    commands = re.findall(r"torchrun (.*)train.py (.*--preset.*)", (ROOT / file).read_text())
    assert commands
    for launcher, flags in commands:
        world = math.prod(int(number) for number in re.findall(r"--(?:nnodes|nproc-per-node) (\d+)", launcher))
        config = train.resolve(tyro.cli(train.Train, args=flags.split("  #")[0].split()), "cpu")
        target, _ = models.preset(config.preset, 256, config.enlarge_ff, config.enlarge_kv)
        train.check_batch(config, config.block_size or target.block_size, world)


def test_one_process_has_nobody_to_share_with(tmp_path):
    with pytest.raises(UserError, match="--shard fsdp .* this is the only one; start several with torchrun"):
        train_toy(tmp_path / "run", plan="scratch", shard="fsdp")
    assert not (tmp_path / "run").exists()


def test_one_machine_has_no_copies(tmp_path):
    launched = start(*TORCHRUN, Path(train.__file__), plan="scratch", shard="hsdp", out=tmp_path / "run")
    _, errors = launched.communicate()
    assert launched.returncode != 0 and "2 of 2 processes are on this one" in errors and "--shard fsdp" in errors

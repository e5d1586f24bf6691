"""The suites memory and fit: the accounting counts what two processes exchange and hold, byte for byte."""
import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import sharded_step
import torch
from bench_helpers import settings

import distill
import shard
from bench import __main__ as bench
from bench import accounting, memory
from bench.accounting import Job
from bench.variants import SHAPES
from model import GPT, GPTConfig

# Widths that two processes cannot share evenly, and layers without attention.
UNEVEN = GPTConfig(61, 16, 24, 8, (4, 0, 2), (2, 0, 1), (37, 31, 9), qkv_bias=True, qk_norm=True)
UNTIED = dataclasses.replace(UNEVEN, tie_embeddings=False)
JOBS = [Job(UNEVEN, "fsdp", 2, block_bytes=4), Job(UNTIED, "fsdp", 2, recompute=True, teacher=UNEVEN),
        Job(UNEVEN, "hsdp", 2, machines=2, block_bytes=4)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """[[what a process counted of each job]]"""
    if torch.__version__ < shard.OLDEST_ON_CPU:
        pytest.skip("FSDP2 on CPUs needs a newer PyTorch")
    folder = tmp_path_factory.mktemp("counted")
    torch.multiprocessing.start_processes(sharded_step.worker, (JOBS, str(folder)), nprocs=2,
                                          start_method="fork")            # spares the imports of torch
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(JOBS)), ids=["fsdp", "fsdp, bfloat16, recompute, teacher", "hsdp"])
def test_accounted_communications_are_those_that_are_called(counted, number):
    expected = Counter((call.kind, call.bytes) for call in accounting.collectives(JOBS[number]))
    for of_process in counted:
        assert Counter(tuple(call) for call in of_process[number]["calls"]) == expected


def test_accounted_states_are_what_processes_hold(counted):
    for number, job in enumerate(JOBS):
        parts = accounting.memory(job)
        fullest = counted[0][number]["held"]
        assert fullest == {name: parts[name] for name in ("weights", "gradients", "moments")}
        for of_process in counted:
            # Rows that others lack are stored, too.
            stored = of_process[number]["stored"]
            assert (stored["weights"], stored["gradients"]) == (parts["weights"], parts["gradients"])
            if job.teacher is not None:
                root, _ = accounting.groups(job.teacher)
                hidden = job.tokens * job.teacher.d_model * 2
                assert stored["teacher"] == parts["teacher"] - 4 * root.held(2) - hidden
            assert of_process[number]["held"]["moments"] <= parts["moments"]
        if job.sharers == 2:
            everything = sum(sum(of_process[number]["held"].values()) for of_process in counted)
            assert everything == 16 * job.config.num_params()["total"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_accounted_activations_are_what_autograd_keeps(recompute, size):
    config = GPTConfig(256, 64, 96, 64, (6, 4, 2), (2, 4, 1), (128, 200, 60))
    model = GPT(config)
    for block in model.blocks:
        block.recompute = recompute
    outside = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage               # held, so that no address comes twice
        return tensor

    x = torch.randint(config.vocab_size, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=size == 2):
            loss, _ = distill.chunked_loss(model.hidden(x), model.head_weight, x)
    assert loss.requires_grad
    job = Job(config, micro_batch=4, block_bytes=size, recompute=recompute, device="cpu")
    parts = accounting.memory(job)
    expected = parts["activations"] + parts["head's gradient"]
    # Angles of the rotation; without recomputing the cast matrices as well.
    expected += 2 * 64 * 64 * size
    if not recompute:
        expected += parts["cast blocks"]
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(expected, rel=.01)


def test_the_block_that_is_recomputed_is_the_one_that_keeps_most():
    job = Job(UNTIED, micro_batch=2, device="cpu")
    again = dataclasses.replace(job, recompute=True)
    whole, _ = accounting.activations(job)
    kept, one_block = accounting.activations(again)
    inputs = job.tokens * 3 * 24 * 2                         # of three blocks, bfloat16
    alone = []
    for layer in range(3):
        widths = {name: (getattr(UNTIED, name)[layer],) for name in ("n_head", "n_kv_head", "d_ff")}
        config = dataclasses.replace(UNTIED, **widths)
        alone.append(accounting.activations(dataclasses.replace(job, config=config))[0] - (kept - inputs))
    assert sum(alone) == whole - (kept - inputs)
    assert one_block == max(alone)


def test_bytes_of_a_peak_are_those_held_at_one_moment():
    parts = dict.fromkeys(accounting.memory(Job(UNEVEN)), 1)
    assert accounting.fullest(parts | {"loss": 99})[0] == "the loss"
    moment, held = accounting.fullest(parts | {"root's gradients": 99})
    assert moment == "the end of the backward pass" and "loss" not in held and held["weights"] == 1
    names = {name for names in accounting.MOMENTS.values() for name in names}
    assert names | {*accounting.STANDING} == {*parts}
    assert {name for names in accounting.COLUMNS.values() for name in names} == {*parts} - {"teacher"}


def test_the_large_models_by_hand():
    """8B: 32 layers, C = 4096, 32 heads and 8 KV heads of 128, d_ff 14,336, V = 128,256, untied."""
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    root = 2 * 128256 * 4096 + 4096
    assert SHAPES["8b"].num_params()["total"] == 32 * block + root == 8_030_261_248
    assert SHAPES["2.8b"].num_params()["total"] == 2_809_139_200
    one, _, eight, *_ = accounting.jobs(SHAPES["8b"])
    parts = accounting.memory(eight)
    assert parts["weights"] == parts["moments"] / 2 == 4 * (32 * block + root) / 8
    assert parts["whole root"] == 4 * root and parts["whole blocks"] == 2 * 2 * block
    assert parts["a block's gradients"] == (2 + 4) * block
    tokens = 4096
    inside = 4096 * 2 + (4096 + 4 * 4096) + 4096 + 4 * 14336         # inputs of norms, attention, FFN
    kept = (32 * inside + 2 * 4096) * 2 + 4 * (65 + 32 * 32)
    assert parts["activations"] == tokens * kept
    # A teacher on one GPU: blocks, head and hidden states in bfloat16, the embedding in float32.
    taught = accounting.memory(dataclasses.replace(one, teacher=one.config))["teacher"]
    assert taught == 2 * 32 * block + 4 * root - 2 * 128256 * 4096 + 2 * tokens * 4096
    assert not accounting.memory_row(one)["fits"] and accounting.memory_row(eight)["fits"]
    row = accounting.memory_row(eight)
    assert row["sum"] == pytest.approx(sum(row[column] for column in accounting.COLUMNS))


def test_seconds_of_communication_by_hand():
    """The whole model is gathered twice in bfloat16 and reduced in float32, the root once in float32."""
    config = dataclasses.replace(SHAPES["2.8b"], vocab_size=50304, d_ff=(16384,) * 24)
    _, _, eight, _, flat, _, copies, _ = accounting.jobs(config)
    root, blocks = accounting.groups(config)
    inside = sum(block.values for block in blocks)
    all_bytes = 4 * root.values + 2 * 2 * inside + 4 * (root.values + inside)
    assert accounting.exchange_seconds(eight) == pytest.approx(all_bytes * 7 / 8 / 450e9)
    assert accounting.exchange_seconds(flat) == pytest.approx(all_bytes * 63 / 64 / 400e9)
    assert accounting.slowest_seconds(flat) == pytest.approx(all_bytes * 7 / 8 / 50e9)
    rows_of_one = 4 * (root.values + inside) / 8
    over_machines = 2 * rows_of_one * 7 / 8 / 50e9
    assert accounting.exchange_seconds(copies) == pytest.approx(accounting.exchange_seconds(eight) + over_machines)
    assert accounting.slowest_seconds(copies) == accounting.exchange_seconds(copies)
    row = accounting.exchange_row(eight)
    assert row["compute, s"] == pytest.approx(4096 * config.flops_per_token(4096) / (989e12 * .4))
    again = accounting.compute_seconds(dataclasses.replace(eight, recompute=True))
    assert again == pytest.approx(4096 * config.flops_per_token(4096, recompute=True) / (989e12 * .4))
    assert row["exchange ÷ compute"] == pytest.approx(row["exchange, s"] / row["compute, s"])


def test_a_measured_row_has_the_fullest_process(monkeypatch):
    """The suite at toy size, with processes that report other numbers in turn."""
    started = []

    def spawn(function, arguments, nprocs):
        job, folder = arguments
        assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "131072"
        started.append(job)
        for rank in range(nprocs):
            record = {"before_bytes": 10**9, "peak_bytes": 10**9 + (5 + rank) * 10**6, "weights": 10**6 - rank,
                      "gradients": 10**6, "moments": 2 * 10**6}
            Path(folder, f"{rank}.json").write_text(json.dumps(record))

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    flags = settings("memory", block_size=32)
    names = [name for name, _ in bench.cells(flags)]
    assert names == ["toy, V = 300, world 1", "toy, V = 300, world 2", "toy, V = 300, world 4"]
    for _, measure in bench.cells(flags):
        measure()
    assert [(job.world, job.shard, job.recompute) for job in started] == [
        (1, "none", False), (1, "none", True), (2, "fsdp", False), (2, "fsdp", True), (4, "fsdp", False),
        (4, "fsdp", True)]
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ
    row = memory.measured(2, flags, "toy", 300)["rows"][0]
    assert row["measured peak"] == pytest.approx(0.006) and row["weights, gradients, moments"] == pytest.approx(0.004)
    assert row["tokens"] == 2 * 32
    assert row["measured ÷ accounted"] == pytest.approx(0.006 / row["peak by accounting"])


def test_measured_steps_are_two_updates_that_keep_their_gradients():
    job = Job(UNEVEN, micro_batch=2, block_bytes=4, device="cpu")
    model, optimizer = memory.run_steps(job, mesh=None)
    assert memory.held_bytes(model, optimizer) == {
        name: accounting.memory(job)[name] for name in ("weights", "gradients", "moments")}
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_fit_accounts_for_every_place():
    rows = memory.fit(settings("fit", presets=("toy",), vocab=(300,)), "toy", 300)["rows"]
    places = [(row["GPUs"], row["--shard"], row["--recompute"]) for row in rows if "fits" in row]
    assert places == [(world, shard, recompute) for world, _, shard in accounting.PLACES for recompute in (False, True)]
    assert len(rows) == 8 + 6

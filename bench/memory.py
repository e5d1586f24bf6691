"""The suites memory and fit of `python -m bench`: what a process of a sharded run holds.

    python -m bench memory                                     # measured on 1, 2 and 4 processes
    python -m bench fit                                        # 2.8B and 8B on GPUs, by accounting alone

`memory` starts processes that train as train.py does (shard.build, distill.Objective, AdamW) on random
weights and tokens, one thread each, and prints the peak of a process beside bench/accounting.py. The
process is a CPU's, so the buffers of gloo and of the kernels are in it, too.
"""
import dataclasses
import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import shard
import train
from bench import accounting
from bench.accounting import Job
from bench.timing import freed_at_once, peak
from bench.variants import shapes
from distill import Objective
from model import GPT, GPTConfig

SECONDS = 600                # that a process waits for the others
WARM_UP = GPTConfig(64, 8, 16, 8, (2,), (2,), (32,))


# -- the suite memory

def empty_model(job, mesh):
    """The model of a Job with weights that are still to be filled, whole or over the mesh."""
    if mesh is not None:
        return shard.build(job.config, mesh, "cpu", torch.float32)
    with torch.device("meta"):
        model = GPT(job.config)
    return model.to_empty(device="cpu")


@torch.no_grad()
def draw_(model):
    """Fill the weights with random numbers, those of each process as it likes."""
    for p in model.parameters():
        shard.local(p).normal_(std=0.02)


def micro_batch(objective, tokens):
    """Forward and backward on random tokens (B, T). The gradients are added to those that are there."""
    loss, _ = objective(tokens, tokens)
    loss.backward()


def update(model, optimizer):
    """Clip the gradients and take a step with them, as train.py does."""
    norm = shard.whole(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    optimizer.step()


def run_steps(job, mesh):
    """Two steps: -> the model and its optimizer. The first one has few tokens and makes the moments.
    Its gradients are kept, so that the second one is like the last micro-batch of a step."""
    model = empty_model(job, mesh)
    draw_(model)
    for block in model.blocks:
        block.recompute = job.recompute
    objective = Objective(model, kd_weight=0.5, temperature=1.0)
    optimizer = train.make_optimizer(model, train.Train(lr=1e-4))
    config = job.config
    for shape in ((1, 2), (job.micro_batch, config.block_size)):
        micro_batch(objective, torch.randint(config.vocab_size, shape))
        update(model, optimizer)
    return model, optimizer


def held_bytes(model, optimizer):
    """{part: bytes} of the tensors that this process holds: weights, gradients, Adam's moments."""
    held = {"weights": 0, "gradients": 0, "moments": 0}
    for p in model.parameters():
        held["weights"] += shard.local(p).nbytes
        held["gradients"] += shard.local(p.grad).nbytes
        for moment in ("exp_avg", "exp_avg_sq"):
            held["moments"] += shard.local(optimizer.state[p][moment]).nbytes
    return held


def worker(rank, job, folder):
    """One of the processes. It writes its memory before the model was made and at the peak, and what
    it holds, into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=job.world,
                            timeout=timedelta(seconds=SECONDS))
    mesh = None
    if job.shard != "none":
        mesh = shard.make_mesh(job.shard, "cpu", job.world, job.world // job.machines)
    # What a first step loads and starts is no part of the model's memory.
    run_steps(dataclasses.replace(job, config=WARM_UP), mesh)
    with peak("cpu") as memory:
        model, optimizer = run_steps(job, mesh)
    Path(folder, f"{rank}.json").write_text(json.dumps({**memory, **held_bytes(model, optimizer)}))
    dist.barrier()
    os._exit(0)              # gloo's threads have been seen to abort a process that ended normally


def measured(processes, settings, preset, vocab_size):
    """The peak of the fullest of so many processes, with and without --recompute, above what it held
    before there was a model. One process holds the whole model."""
    config, _ = shapes(preset, vocab_size)
    if settings.block_size is not None:
        config = dataclasses.replace(config, block_size=settings.block_size)
    rows = []
    for recompute in (False, True):
        job = Job(config, "fsdp" if processes > 1 else "none", processes, micro_batch=settings.micro_batch,
                  block_bytes=4, recompute=recompute, device="cpu")
        with tempfile.TemporaryDirectory() as folder, freed_at_once():
            torch.multiprocessing.spawn(worker, (job, folder), nprocs=processes)
            of_ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
        peaks = [record["peak_bytes"] - record["before_bytes"] for record in of_ranks]
        held = max(record["weights"] + record["gradients"] + record["moments"] for record in of_ranks)
        params = config.num_params()["total"]
        accounted = accounting.peak_bytes(job)
        rows.append({"shape": preset, "V": vocab_size, "params": params, "tokens": job.tokens,
                     "processes": processes, "--shard": job.shard, "--recompute": recompute,
                     "16 bytes a parameter ÷ processes": 16 * params / processes / 1e9,
                     "weights, gradients, moments": held / 1e9, "peak by accounting": accounted / 1e9,
                     "measured peak": max(peaks) / 1e9, "measured ÷ accounted": max(peaks) / accounted})
    return {"rows": rows, "note": "; GB"}


# -- the suite fit

def fit(settings, preset, vocab_size):
    """What a GPU holds and exchanges, for one device, one machine of 8 and 8 machines of 8."""
    config, _ = shapes(preset, vocab_size)
    if settings.block_size is not None:
        config = dataclasses.replace(config, block_size=settings.block_size)
    params = config.num_params()["total"]
    jobs = accounting.jobs(config, settings.micro_batch)
    about = {"model": preset, "params": params, "tokens": jobs[0].tokens}
    rows = []
    for job in jobs:
        rows.append({"table": "memory of a GPU, GB", **about, **accounting.memory_row(job)})
    for job in jobs:
        if job.world > 1:
            rows.append({"table": "communication of a GPU in a micro-batch", **about,
                         **accounting.exchange_row(job)})
    return {"rows": rows}

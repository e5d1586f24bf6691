"""The suites of `python -m bench` that train: train, kd, cuts and ddp.

    python -m bench train --presets laptop --rounds 5 --steps 15

`stages`, `cuts` and `ddp` each measure one cell (bench/timing.py): settings, a shape's name, a
vocabulary -> {"rows": [{column: value}], and the measurements behind them}. What is timed, and how
its FLOPs are counted: bench/variants.py.
"""
import contextlib
import dataclasses
import functools
import json
import statistics
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

import schedule
from bench.timing import interleave, matmul, median_ratio, own_process
from bench.variants import (
    CUT_EVERY,
    GPT2,
    LLAMA,
    PARTS,
    STAGES,
    fitted,
    flops_per_step,
    memory_of,
    peer_variant,
    plain_loop,
    scored_steps,
    spend,
    stage_variant,
    take_apart,
)
from train import Train

KD = ("recover", "recover, KD")              # the variants that tell what distillation costs
PLAIN = "GPT-2 in nanoGPT's loop"            # the model and optimizer of GPT2, without our loop
APART = 2                                    # rounds that are taken apart, after the timed ones
median = statistics.median


# -- the suites train and kd

@dataclass
class Measured:
    """All that was measured of one shape. The keys of the dictionaries are names of variants."""
    about: dict                  # the first columns of every row
    steps: int                   # in a round
    variants: dict
    seconds: dict                # of each round; also of "matmul"
    matmul_flops: int
    parts: dict                  # [{part: seconds}] of the rounds that were taken apart
    memory: dict                 # of the variants in KD, or empty


def stages(settings, preset, vocab_size, names, memory=False):
    """Time the named stages and peers in turns, with a matrix product as their limit. With `memory`
    also measure the peaks of the steps without and with distillation."""
    load, target, enlarged = fitted(settings, preset, vocab_size)
    peaks = {}
    if memory:
        # Each in a process of its own: memory that one has freed would count for the next.
        peaks = {name: own_process(memory_of, load, name, target, enlarged) for name in KD}
    variants = {}
    rounds = 1 + load.rounds + APART
    for name in names:
        if name in STAGES:
            variants[name] = stage_variant(load, name, target, enlarged, rounds)
        elif name != LLAMA or find_spec("transformers"):
            variants[name] = peer_variant(load, name, target, rounds)

    product, product_flops = matmul(getattr(torch, load.dtype), load.device)
    calls = {"matmul": product}
    for name, variant in variants.items():
        calls[name] = functools.partial(variant.go, load.steps)
    if GPT2 in variants:
        calls[PLAIN] = functools.partial(plain_loop, variants[GPT2], load.steps)
    seconds = interleave(calls, load.rounds, load.device)
    parts = {}
    for name, variant in variants.items():
        parts[name] = [take_apart(variant, load.steps) for _ in range(APART)]

    about = {"table": "training", "shape": preset, "V": vocab_size, "dtype": load.dtype,
             "compiled": load.compile}
    measured = Measured(about, load.steps, variants, seconds, product_flops, parts, peaks)
    rows = [row(measured, name) for name in calls if name != "matmul"]
    for name in names:
        if name not in variants:
            rows.append({**about, "variant": name, "note": "pip install transformers"})
    note = (f"; FLOPs with causal attention; train.py's default run cuts every {CUT_EVERY} steps "
            f"and scores every {Train.score_every}; the roofline: the FLOPs at recover's rate")
    return {"rows": rows, "note": note, "seconds": seconds, "breakdown": parts,
            "matmul_flops": product_flops, "memory": peaks}


def row(measured, name):
    """One stage or peer as a row of the table."""
    variant = measured.variants[GPT2 if name == PLAIN else name]
    start = variant.setup.start
    params = start.num_params()["total"]
    tokens = variant.setup.config.batch_tokens
    flops = flops_per_step(variant)
    rounds = measured.seconds[name]
    steps_per_second = measured.steps / median(rounds)
    # The time that matrix products with the FLOPs of a round would take, over that of the round.
    reached = measured.steps * flops / measured.matmul_flops
    reached *= median_ratio(measured.seconds["matmul"], rounds)
    columns = {**measured.about, "variant": name, "params": params,
               "of them embedding %": 100 * start.vocab_size * start.d_model / params,
               "tokens/step": tokens, "FLOPs/step, causal": float(flops),
               "tokens/s": steps_per_second * tokens, "FLOP/s, causal": steps_per_second * flops,
               "of matmul's FLOP/s, causal": reached}
    if "recover" in measured.variants:
        slower = median_ratio(rounds, measured.seconds["recover"])
        more_flops = flops / flops_per_step(measured.variants["recover"])
        columns["tokens/s: recover's ÷ this"] = slower
        columns["time over the roofline"] = slower / more_flops
    if name in measured.memory:
        columns |= memory_columns(measured.memory[name], measured.memory["recover"])
    if variant.setup.timeline.events:
        columns["scores per cut"] = scored_steps(variant, measured.steps)
    if name in measured.parts:
        for part in PARTS:
            shares = [seconds[part] / sum(seconds.values()) for seconds in measured.parts[name]]
            columns[f"{part} %"] = 100 * median(shares)
    return columns


def memory_columns(memory, plain):
    """The peak of a variant beside that of the step without distillation, `plain`."""
    without_teacher = memory["peak_bytes"] - memory["teacher_bytes"]
    raised = memory["peak_bytes"] - memory["before_bytes"]
    plain_raised = plain["peak_bytes"] - plain["before_bytes"]
    return {"peak bytes": memory["peak_bytes"], "teacher bytes": memory["teacher_bytes"],
            "(peak − teacher) ÷ CE's peak": without_teacher / plain["peak_bytes"],
            "raised by": raised, "raised ÷ CE's raised": raised / max(1, plain_raised)}


# -- the suite cuts

def cuts(settings, preset, vocab_size):
    """The pauses of scoring, cutting and slicing, the time of the prune stage at train.py's own
    cadence, and what the moment of slicing is worth in a run with plan idea's shares. Ratios are
    within a round, as zeros may change a GPU's clock."""
    load, target, enlarged = fitted(settings, preset, vocab_size)
    steps = load.steps
    pruned = stage_variant(load, "prune", target, enlarged, 1 + load.rounds)
    sliced = stage_variant(load, "recover", target, enlarged, 1 + load.rounds)
    # `pruned` shrinks by zeros only. `sliced` has the shape that it will have behind the slice.
    spent = []
    calls = {"not sliced": lambda: spent.append(spend(pruned, steps)),
             "sliced": lambda: sliced.go(steps)}
    seconds = interleave(calls, load.rounds, load.device)
    spent = spent[1:]                        # the first round does not count
    slicing, first = slice_pause(pruned)

    # Seconds of a step, a score and a cut in each round; the prune stage over plain steps.
    before = [(each["whole"] - each["score"] - each["cut"]) / steps for each in spent]
    behind = [whole / steps for whole in seconds["sliced"]]
    score = [each["score"] / scored_steps(pruned, steps) for each in spent]
    cut = [each["cut"] for each in spent]
    longer = []
    for i in range(load.rounds):
        pauses = cut[i] + CUT_EVERY / Train.score_every * score[i]
        longer.append(1 + pauses / (CUT_EVERY * before[i]))

    step_before = median(before)
    step_behind = step_before / median_ratio(before, behind)
    compiling = max(0.0, first - step_behind)
    about = {"shape": preset, "V": vocab_size, "dtype": load.dtype, "compiled": load.compile}
    rows = [{"table": "pauses", **about, "params": enlarged.num_params()["total"],
             "s/step": step_before, "score ms": 1000 * median(score), "cut ms": 1000 * median(cut),
             "slice ms": 1000 * slicing, "first step behind it, less a later one: s": compiling,
             f"prune stage ÷ none (a cut per {CUT_EVERY} steps, a score per {Train.score_every})":
             median(longer)}]
    for moment in moments_of_slicing(step_before, step_behind, slicing + compiling):
        rows.append({"table": "--slice-at, from two step times", **about, **moment})
    return {"rows": rows, "seconds": seconds, "spent": spent, "slice_seconds": slicing,
            "first_step": first}


def slice_pause(variant):
    """Take the step that begins with the slice: -> seconds of the slice, seconds of the rest of the
    step. With torch.compile the rest holds a compilation, which finds nothing on the disk."""
    cache = contextlib.nullcontext()
    if variant.setup.config.compile:
        from torch._inductor.utils import fresh_inductor_cache
        cache = fresh_inductor_cache()
    with cache:
        spent = spend(variant, 1)
    return spent["slice"], spent["whole"] - spent["slice"]


def moments_of_slicing(before, behind, pause):
    """The time of a run that slices at the last cut of plan idea, half way through recovery, or
    never. `before` and `behind` are seconds per step on either side of the slice, and `pause` is
    the seconds of the slice itself."""
    shares = {stage.name: stage.share for stage in schedule.PLANS["idea"]}
    last_cut = shares["enlarge"] + shares["prune"]
    gain = before - behind
    rows = []
    for share in (last_cut, (1 + last_cut) / 2, 1.0):
        mean = behind + share * gain
        rows.append({"slice at (share of the run)": share, "s/step before": before,
                     "s/step behind": behind, "mean s/step of the run": mean,
                     "÷ at the last cut": mean / (behind + last_cut * gain),
                     "pays after steps": pause / gain if gain > 0 else None})
    return rows


# -- the suite ddp

def ddp_worker(rank, load, folder, target, threads):
    """One of two gloo processes. In turns: the first process alone with the whole batch in two
    micro-steps, both with one micro-step each, and both only exchanging as many bytes as there are
    gradients. The first process writes {name: [seconds]} into the folder."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(minutes=10))
    alone = stage_variant(load, "recover", target, target, 1 + load.rounds)
    both = stage_variant(load, "recover", target, target, 1 + load.rounds, rank, world=2)
    gradient = torch.zeros(target.num_params()["total"])

    def one_process():
        if rank == 0:
            alone.go(load.steps)
        dist.barrier()

    def exchange():
        for _ in range(load.steps):
            dist.all_reduce(gradient)

    calls = {"one process": one_process, "two": lambda: both.go(load.steps), "all-reduce": exchange}
    seconds = interleave(calls, load.rounds)
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def ddp(settings, preset, vocab_size):
    """Two processes with half of the batch each against one process with all of it; every process
    has as many threads. An efficiency of 1 would be twice as fast. An overlap of 1 would be an
    exchange that is never waited for."""
    settings = dataclasses.replace(settings, micro_steps=2)
    load, target, _ = fitted(settings, preset, vocab_size)
    threads = max(1, torch.get_num_threads() // 2)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(ddp_worker, (load, folder, target, threads), nprocs=2)
        seconds = json.loads(Path(folder, "seconds").read_text())
    row = {"shape": preset, "V": vocab_size, "params": target.num_params()["total"],
           "tokens/step": 2 * load.micro_batch * target.block_size, "threads each": threads}
    for name, rounds in seconds.items():
        row[f"{name}: s/step"] = median(rounds) / load.steps
    alone, both, exchange = seconds.values()
    row["efficiency"] = median_ratio(alone, both) / 2
    overlaps = []
    for i in range(load.rounds):
        overlaps.append(1 - (both[i] - alone[i] / 2) / exchange[i])
    row["overlap of the exchange"] = median(overlaps)
    return {"rows": [row], "seconds": seconds}

"""The suites of `python -m bench` that train: train, kd, cuts and ddp.

    python -m bench train --presets laptop --rounds 5 --steps 15

What is timed is `train.train`, the loop of a real run. Its Setup has no folder, so nothing is evaluated, recorded or
saved, and its tokens and weights are random. A *variant* is a row of a table: a stage, which the loop then never leaves,
or a peer, which is another project's model with its own loss. FLOPs are those that the loop counts, less half of
attention's T x T square, which causal kernels leave out. `stages`, `cuts` and `ddp` each measure one cell
(bench/timing.py): settings, a shape's name, a vocabulary -> {"rows": [{column: value}]}.
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F

import distill
import model as models
import prune
import schedule
import train
from bench import gpt2_peer
from bench.timing import interleave, matmul, median_ratio, own_process, peak, seconds_of
from checkpoint import State
from formats.huggingface import write_config

SHAPES = {   # besides model.PRESETS; these are enlarged models, and their targets follow from --enlarge-ff
    "1m": models.GPTConfig(256, 128, 128, 32, (4,) * 5, (2,) * 5, (384,) * 5),
    "135m": models.GPTConfig(49152, 512, 576, 64, (9,) * 30, (3,) * 30, (1536,) * 30),      # SmolLM2-135M's
}
STAGES = {   # names of variants
    "enlarge": schedule.Stage("enlarge", share=1.0),
    "prune": schedule.Stage("prune", share=1.0),
    "prune, KD": schedule.Stage("prune", share=1.0, kd=True),
    "recover": schedule.Stage("recover", share=1.0),
    "recover, KD": schedule.Stage("recover", share=1.0, kd=True),
}
KD = ("recover", "recover, KD")              # the variants that tell what distillation costs
GPT2 = "GPT-2 (nanoGPT's block)"
PLAIN = "GPT-2 in nanoGPT's loop"            # the same model and optimizer, without our loop
LLAMA = "LlamaForCausalLM (transformers)"

PARTS = ("data", "teacher", "forward", "backward", "optimizer", "scoring", "cut")
APART = 2                                    # rounds that are taken apart, behind those that are timed
CUT_EVERY = 15                               # steps, in train.py's default run: 1,500 · 0.2 / 20
SCORES_PER_CUT = CUT_EVERY // train.Train.score_every
median = statistics.median


# -- shapes

def shapes(name, vocab_size, enlarge_ff=1.0):
    """The target and the enlarged GPTConfig of a shape: -> target, enlarged."""
    if name not in SHAPES:
        return models.preset(name, vocab_size, enlarge_ff)
    enlarged = dataclasses.replace(SHAPES[name], vocab_size=vocab_size)
    return models.shrunk(enlarged, enlarge_ff), enlarged


def tokens_per_forward(device, params, vocab_size):
    """How many tokens the forward pass of an enlarged model takes where --micro-batch is left out."""
    if device.startswith("cuda"):
        return 2**14 if params < 1e9 else 2**13
    if params > 5e7:
        return 256
    return 2048 if vocab_size < 4096 else 1024


def fitted(settings, preset, vocab_size):
    """The settings with --micro-batch and --steps filled in, alike for all of a cell: -> settings, target, enlarged."""
    target, enlarged = shapes(preset, vocab_size, settings.enlarge_ff)
    tokens = tokens_per_forward(settings.device, enlarged.num_params()["total"], vocab_size)
    micro_batch = settings.micro_batch or max(1, tokens // enlarged.block_size)
    steps = settings.steps or (CUT_EVERY if vocab_size < 4096 else 3)
    return dataclasses.replace(settings, micro_batch=micro_batch, steps=steps), target, enlarged


# -- variants

class Llama(nn.Module):
    """transformers' Llama with the shape of a GPTConfig. The account of FLOPs reads that config."""
    def __init__(self, config):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        self.config = config
        self.inner = LlamaForCausalLM(LlamaConfig(**write_config(config, "llama", "float32", {"use_cache": False})))

    def forward(self, idx):
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.inner(idx).logits


class WholeLogits(nn.Module):
    """The peers' loss in the place of distill.Objective: cross-entropy on whole float32 logits, as nanoGPT and
    transformers form it."""
    def __init__(self, model, kd_weight, temperature):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        """Token ids and targets (B, T) -> loss, (its value, 0, 0)."""
        logits = self.model(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return loss, torch.stack((loss.detach(), *loss.new_zeros(2)))


@dataclass
class Variant:
    """A run of train.train that goes on round after round."""
    setup: train.Setup
    state: State
    objective_of: type = distill.Objective

    def go(self, steps):
        """Train for so many steps more."""
        train.train(self.setup, self.state, self.state.step + steps, objective_of=self.objective_of)


def one_stage(stage, steps, cuts=(), slice_at=None):
    """A Timeline that never leaves this stage."""
    return schedule.Timeline(steps, ((stage, 0, steps),), cuts, ((0, steps),), slice_at)


def bare_setup(settings, timeline, start, target, rank=0, world=1):
    """The Setup of a run on random tokens that evaluates, records and saves nothing."""
    T = start.block_size
    config = train.Train(
        steps=timeline.steps, micro_batch=settings.micro_batch, lr=1e-4, device=settings.device, dtype=settings.dtype,
        compile=settings.compile, batch_tokens=settings.micro_batch * settings.micro_steps * T,
        # The variant brings its teacher, so the loop does not make one at the first cut.
        teacher="random weights", drop_teacher=False)
    width = np.uint16 if start.vocab_size <= 2**16 else np.uint32
    tokens = np.random.default_rng(0).integers(start.vocab_size, size=1024 * T + 1, dtype=width)
    return train.Setup(train.resolve(config, settings.device), timeline, start, target, SimpleNamespace(train=tokens),
                       None, settings.device, rank, world)


def stage_variant(settings, name, target, enlarged, rounds, rank=0, world=1):
    """A Variant that stays in the stage `name` of STAGES for `rounds` rounds of --steps steps and a few steps more. In
    "prune" the last step of every round begins with a cut. The last cut ends at the target size, and the step behind it
    begins with the slice."""
    stage = STAGES[name]
    prunes = stage.name == "prune"
    start = target if stage.name == "recover" else enlarged
    final = target.removable_params() / enlarged.removable_params()
    cuts = []
    for i in range(1, rounds + 1):
        cuts.append((i * settings.steps - 1, 1 - (1 - final) * i / rounds))
    steps = (rounds + 1) * settings.steps + 8
    timeline = one_stage(stage, steps, tuple(cuts), rounds * settings.steps) if prunes else one_stage(stage, steps)
    setup = bare_setup(settings, timeline, start, target if prunes else start, rank, world)

    torch.manual_seed(0)
    teacher = None
    with torch.device(settings.device):          # a CPU takes a minute for 2.8B random numbers
        model = models.GPT(start)
        if stage.kd:
            teacher = distill.freeze(models.GPT(enlarged))
    if teacher and settings.dtype == "bfloat16" and settings.device.startswith("cuda"):
        train.halve_matrices(teacher)            # as train.open_teacher does
    optimizer = train.make_optimizer(model, setup.config)
    return Variant(setup, State(model, optimizer, prune.everything(start), teacher=teacher))


def peer_variant(settings, name, target, rounds):
    """A Variant with a peer of the target in its place, trained as in stage "recover"."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = Llama(target) if name == LLAMA else gpt2_peer.GPT2(gpt2_peer.peer_of(target))
    timeline = one_stage(STAGES["recover"], (rounds + 1) * settings.steps + 8)
    setup = bare_setup(settings, timeline, model.config, model.config)
    return Variant(setup, State(model, train.make_optimizer(model, setup.config), alive={}), WholeLogits)


# -- what is measured of a variant

def plain_loop(variant, steps):
    """So many steps of nanoGPT's loop on the model and optimizer of a variant: random windows, forward, backward, clip,
    AdamW. Nothing is counted or recorded, and the loss is not waited for."""
    setup = variant.setup
    state = variant.state
    objective = train.wrap(setup, state.model, variant.objective_of)
    for _ in range(steps):
        for _ in range(setup.micro_steps):
            x, y = random_windows(setup)
            with setup.autocast():
                loss, _ = objective(x, y)
            (loss / setup.micro_steps).backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), setup.config.clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)


def random_windows(setup):
    """Token ids and targets, (B, T) each, from random places of the corpus."""
    tokens = setup.corpus.train
    T = setup.block_size
    starts = torch.randint(len(tokens) - T, (setup.config.micro_batch,)).tolist()
    windows = np.stack([tokens[start:start + T + 1] for start in starts]).astype(np.int64)
    x = torch.from_numpy(windows[:, :-1]).to(setup.device, non_blocking=True)
    y = torch.from_numpy(windows[:, 1:]).to(setup.device, non_blocking=True)
    return x, y


def spend(variant, steps):
    """Train for so many steps: -> {part: seconds by the loop's own count, "whole": by the clock}."""
    before = dict(variant.state.seconds)
    whole = seconds_of(lambda: variant.go(steps), variant.setup.device)
    spent = {part: seconds - before[part] for part, seconds in variant.state.seconds.items()}
    return {**spent, "whole": whole}


def take_apart(variant, steps):
    """The seconds of each of PARTS in so many steps. The parts of a step are called here one by one, outside of the
    loop. Scoring and cuts are those of as many steps of the loop, by its own count. "forward" holds the gradient of the
    head and the teacher's logits, too, which distill.py forms there; "teacher" is the teacher's blocks."""
    setup = variant.setup
    state = variant.state
    objective = train.wrap(setup, state.model, variant.objective_of)
    read_teacher = train.compile_teacher(setup, state.teacher)
    seconds = dict.fromkeys(PARTS, 0.0)
    clock = train.Clock(seconds, setup.device)
    for step in range(state.step, state.step + steps):
        for micro in range(setup.micro_steps):
            x, y = setup.batch(step, micro)
            clock.lap("data")
            with setup.autocast():
                taught = ()
                if state.teacher:
                    with torch.no_grad():
                        taught = (read_teacher(x), state.teacher.head_weight)
                    clock.lap("teacher")
                loss, _ = objective(x, y, *taught)
            clock.lap("forward")
            (loss / setup.micro_steps).backward()
            clock.lap("backward")
        nn.utils.clip_grad_norm_(state.model.parameters(), setup.config.clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")
    spent = spend(variant, steps)
    seconds["scoring"] = spent["score"]
    seconds["cut"] = spent["cut"]
    return seconds


def scored_steps(variant, steps):
    """How many of the first so many steps score units."""
    setup = variant.setup
    scored = [schedule.score_at(step, setup.timeline, setup.config.score_every, setup.config.score_window)
              for step in range(steps)]
    return sum(scored)


def attention_square(config, T, backward=True):
    """The FLOPs per token of attention over the whole T x T square."""
    return config.flops_per_token(T, backward=backward) - config.flops_per_token(0, backward=backward)


def flops_per_step(variant):
    """The FLOPs that the loop counted as executed, as a mean over its steps so far, with causal attention."""
    state = variant.state
    T = variant.setup.block_size
    square = attention_square(state.model.config, T)
    if state.teacher:
        square += attention_square(state.teacher.config, T, backward=False)
    return state.flops["executed"] / state.step - variant.setup.config.batch_tokens * square / 2


def memory_of(settings, name, target, enlarged):
    """The bytes before two steps of a stage and at their peak, with gradients, activations and logits, and the bytes of
    the teacher. To be called in a process of its own."""
    variant = stage_variant(settings, name, target, enlarged, rounds=2)
    variant.go(1)
    with peak(settings.device) as memory:
        variant.go(2)
    teacher = variant.state.teacher
    return {**memory, "teacher_bytes": sum(p.nbytes for p in teacher.parameters()) if teacher else 0}


# -- the suites train and kd

@dataclass
class Measured:
    """All that was measured of one shape. The dictionaries have the names of variants as keys."""
    about: dict                  # the first columns of every row
    steps: int                   # in a round
    variants: dict
    seconds: dict                # of each round; also of "matmul"
    matmul_flops: int
    parts: dict                  # [{part: seconds}] of the rounds that were taken apart
    memory: dict                 # of the variants in KD, or empty


def stages(settings, preset, vocab_size, names, memory=False):
    """Time the named stages and peers in turns, with a matrix product as their limit. With `memory` also measure the
    peaks of the steps without and with distillation."""
    settings, target, enlarged = fitted(settings, preset, vocab_size)
    peaks = {}
    if memory:
        peaks = {name: own_process(memory_of, settings, name, target, enlarged) for name in KD}
    variants = {}
    rounds = 1 + settings.rounds + APART
    for name in names:
        if name in STAGES:
            variants[name] = stage_variant(settings, name, target, enlarged, rounds)
        elif name != LLAMA or find_spec("transformers"):
            variants[name] = peer_variant(settings, name, target, rounds)

    product, product_flops = matmul(getattr(torch, settings.dtype), settings.device)
    calls = {"matmul": product}
    for name, variant in variants.items():
        calls[name] = functools.partial(variant.go, settings.steps)
    if GPT2 in variants:
        calls[PLAIN] = functools.partial(plain_loop, variants[GPT2], settings.steps)
    seconds = interleave(calls, settings.rounds, settings.device)
    parts = {}
    for name, variant in variants.items():
        parts[name] = [take_apart(variant, settings.steps) for _ in range(APART)]

    about = {"shape": preset, "V": vocab_size, "dtype": settings.dtype, "compiled": settings.compile}
    measured = Measured(about, settings.steps, variants, seconds, product_flops, parts, peaks)
    rows = [{"table": "training", **row(measured, name)} for name in calls if name != "matmul"]
    for name in names:
        if name not in variants:
            rows.append({"table": "training", **about, "variant": name, "note": "pip install transformers"})
    note = (f"; FLOPs with causal attention; train.py's default run cuts every {CUT_EVERY} steps and scores every "
            f"{train.Train.score_every}; the roofline: the FLOPs at recover's rate")
    return {"rows": rows, "note": note, "seconds": seconds, "breakdown": parts, "matmul_flops": product_flops,
            "memory": peaks}


def row(measured, name):
    """One stage or peer as a row of the table."""
    variant = measured.variants[GPT2 if name == PLAIN else name]
    start = variant.setup.start
    params = start.num_params()["total"]
    tokens = variant.setup.config.batch_tokens
    flops = flops_per_step(variant)
    rounds = measured.seconds[name]
    rate = measured.steps / median(rounds)                           # steps per second
    product_rate = measured.matmul_flops * median_ratio(rounds, measured.seconds["matmul"])
    columns = {**measured.about, "variant": name, "params": params,
               "of them embedding %": 100 * start.vocab_size * start.d_model / params,
               "tokens/step": tokens, "FLOPs/step, causal": float(flops), "tokens/s": rate * tokens,
               "FLOP/s, causal": rate * flops}
    columns["of matmul's FLOP/s, causal"] = measured.steps * flops / product_rate
    if "recover" in measured.variants:
        slower = median_ratio(rounds, measured.seconds["recover"])
        columns["tokens/s: recover's ÷ this"] = slower
        columns["time over the roofline"] = slower * flops_per_step(measured.variants["recover"]) / flops
    if name in measured.memory:
        columns |= memory_columns(measured.memory[name], measured.memory["recover"])
    if variant.setup.timeline.events:
        columns["steps per cut"] = measured.steps
        columns["scores per cut"] = scored_steps(variant, measured.steps)
    for part in PARTS if name in measured.parts else ():
        shares = [seconds[part] / sum(seconds.values()) for seconds in measured.parts[name]]
        columns[f"{part} %"] = 100 * median(shares)
    return columns


def memory_columns(memory, plain):
    """The peak of a variant beside that of the step without distillation."""
    raised = memory["peak_bytes"] - memory["before_bytes"]
    plain_raised = plain["peak_bytes"] - plain["before_bytes"]
    return {"peak bytes": memory["peak_bytes"], "teacher bytes": memory["teacher_bytes"],
            "(peak − teacher) ÷ CE's peak": (memory["peak_bytes"] - memory["teacher_bytes"]) / plain["peak_bytes"],
            "raised by": raised, "raised ÷ CE's raised": raised / max(1, plain_raised)}


# -- the suite cuts

def slice_pause(variant):
    """Take the step that begins with the slice: -> seconds of the slice, seconds of the rest of the step. With
    torch.compile the rest holds a compilation that finds nothing in the compiler's cache on the disk."""
    cache = contextlib.nullcontext()
    if variant.setup.config.compile:
        from torch._inductor.utils import fresh_inductor_cache
        cache = fresh_inductor_cache()
    with cache:
        spent = spend(variant, 1)
    return spent["slice"], spent["whole"] - spent["slice"]


def cuts(settings, preset, vocab_size):
    """The pauses of scoring, cutting and slicing; the time of the prune stage at train.py's own cadence; what the moment
    of slicing is worth in a run with plan idea's shares. Ratios are within a round, as zeros may change a GPU's clock."""
    settings, target, enlarged = fitted(settings, preset, vocab_size)
    steps = settings.steps
    late = stage_variant(settings, "prune", target, enlarged, 1 + settings.rounds)
    early = stage_variant(settings, "recover", target, enlarged, 1 + settings.rounds)
    spent = []
    calls = {"not sliced": lambda: spent.append(spend(late, steps)), "sliced": lambda: early.go(steps)}
    seconds = interleave(calls, settings.rounds, settings.device)
    spent = spent[1:]                                    # the first round does not count
    slicing, first = slice_pause(late)

    scored = scored_steps(late, steps)
    before = [(each["whole"] - each["score"] - each["cut"]) / steps for each in spent]      # s per step, not sliced
    behind = [whole / steps for whole in seconds["sliced"]]                                 # s per step, sliced
    longer = []                                          # a prune stage over the same steps without pruning
    for each, step_seconds in zip(spent, before):
        pauses = each["cut"] + SCORES_PER_CUT * each["score"] / scored
        longer.append(1 + pauses / (CUT_EVERY * step_seconds))
    about = {"shape": preset, "V": vocab_size, "dtype": settings.dtype, "compiled": settings.compile}
    step_before = median(before)
    step_behind = step_before / median_ratio(before, behind)
    compiling = max(0.0, first - step_behind)
    rows = [{"table": "pauses", **about, "params": enlarged.num_params()["total"], "s/step": step_before,
             "score ms": 1000 * median([each["score"] / scored for each in spent]),
             "cut ms": 1000 * median([each["cut"] for each in spent]), "slice ms": 1000 * slicing,
             "first step behind it, less a later one: s": compiling,
             f"prune stage ÷ none (a cut per {CUT_EVERY} steps, a score per {train.Train.score_every})": median(longer)}]
    for moment in moments_of_slicing(step_before, step_behind, slicing + compiling):
        rows.append({"table": "--slice-at, from two step times", **about, **moment})
    return {"rows": rows, "seconds": seconds, "spent": spent, "slice_seconds": slicing, "first_step": first}


def moments_of_slicing(before, behind, pause):
    """The time of a run that slices at the last cut of plan idea, half way through recovery, or never. `before` and
    `behind` are seconds per step on either side of the slice, `pause` those of the slice."""
    shares = {stage.name: stage.share for stage in schedule.PLANS["idea"]}
    last_cut = shares["enlarge"] + shares["prune"]
    gain = before - behind
    rows = []
    for share in (last_cut, (1 + last_cut) / 2, 1.0):
        mean = behind + share * gain
        rows.append({"slice at (share of the run)": share, "s/step before": before, "s/step behind": behind,
                     "mean s/step of the run": mean, "÷ at the last cut": mean / (behind + last_cut * gain),
                     "pays after steps": pause / gain if gain > 0 else None})
    return rows


# -- the suite ddp

def ddp_worker(rank, settings, folder, target, threads):
    """One of two gloo processes. In turns: the first process alone with the whole batch in two micro-steps, both with
    one micro-step each, both only exchanging as many bytes as there are gradients. The first process writes
    {name: [seconds]}."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(minutes=10))
    alone = stage_variant(settings, "recover", target, target, 1 + settings.rounds)
    both = stage_variant(settings, "recover", target, target, 1 + settings.rounds, rank, world=2)
    gradient = torch.zeros(target.num_params()["total"])

    def one_process():
        if rank == 0:
            alone.go(settings.steps)
        dist.barrier()

    def exchange():
        for _ in range(settings.steps):
            dist.all_reduce(gradient)

    calls = {"one process": one_process, "two": lambda: both.go(settings.steps), "all-reduce": exchange}
    seconds = interleave(calls, settings.rounds)
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def ddp(settings, preset, vocab_size):
    """Two processes with half of the batch each against one process with all of it; every process has as many threads.
    An efficiency of 1 would be twice as fast. An overlap of 1 would be an exchange that is never waited for."""
    settings, target, _ = fitted(dataclasses.replace(settings, micro_steps=2), preset, vocab_size)
    threads = max(1, torch.get_num_threads() // 2)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(ddp_worker, (settings, folder, target, threads), nprocs=2)
        seconds = json.loads(Path(folder, "seconds").read_text())
    one, two, exchange = seconds.values()
    overlaps = [1 - (both - alone / 2) / transfer for alone, both, transfer in zip(one, two, exchange)]
    row = {"shape": preset, "V": vocab_size, "params": target.num_params()["total"],
           "tokens/step": 2 * settings.micro_batch * target.block_size, "threads each": threads}
    for name, rounds in seconds.items():
        row[f"{name}: s/step"] = median(rounds) / settings.steps
    row["efficiency"] = median_ratio(one, two) / 2
    row["overlap of the exchange"] = median(overlaps)
    return {"rows": [row], "seconds": seconds}

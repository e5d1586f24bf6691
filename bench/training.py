"""The training suites of bench/__main__.py: what is timed is `train.loop` itself, on random tokens.

    python -m bench train --presets laptop --rounds 5 --steps 15

`Bare` is steps.Run without corpus, folder, evaluation and records, so that backward, cut, slice, accounting and the
order of them are the loop's own and cannot drift from it. A stage is a Timeline that stays in it. FLOPs are the loop's
less half of attention's T x T square, which causal kernels leave out. Each function here measures one cell (bench/timing.py):
settings, a shape's name, a vocabulary -> {"rows": …}.
"""
import contextlib
import copy
import dataclasses
import functools
import json
import os
import statistics
import tempfile
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

import data
import distill
import model as models
import prune
import schedule
import train
from bench import gpt2_peer
from bench.timing import interleave, matmul, median_ratio, own_process, peak, seconds_of, stopwatch
from flags import resolve
from folder import State
from formats.huggingface import write_config
from steps import Run, make_optimizer

SHAPES = {  # besides model.PRESETS; the enlarged model's, its target follows from --enlarge-ff
    "1m": models.GPTConfig(256, 128, 128, 32, (4,) * 5, (2,) * 5, (384,) * 5),
    "135m": models.GPTConfig(49152, 512, 576, 64, (9,) * 30, (3,) * 30, (1536,) * 30)}      # SmolLM2-135M's
PARTS = ("data", "teacher", "forward", "backward", "optimizer", "scoring", "cut")
STAGES = ("enlarge", "prune", "prune, KD", "recover", "recover, KD")
KD = ("recover", "recover, KD")
GPT2, LLAMA = "GPT-2 (nanoGPT's block)", "LlamaForCausalLM (transformers)"
PLAIN = "GPT-2 in nanoGPT's loop"            # the same model and optimizer, without our loop
APART = 2                                    # rounds that are taken apart, behind those that are timed
CUT_EVERY = 15                               # steps, in train.py's default run: 1,500 · 0.2 / 20
median = statistics.median


def shapes(name, vocab_size, enlarge_ff=None):
    """-> (target, enlarged) GPTConfigs of a shape, by default the same. UserError: unknown."""
    if name not in SHAPES:
        return models.preset(name, vocab_size, enlarge_ff or 1.0)
    enlarged = dataclasses.replace(SHAPES[name], vocab_size=vocab_size)
    return models.shrunk(enlarged, enlarge_ff or 1.0), enlarged


def fitted(c, preset, vocab_size):
    """-> c with what --micro-batch 0 and --steps 0 choose, the same for all of a cell; target; enlarged. Tokens per
    forward pass by the enlarged model: 16,384 on a GPU, above 1B parameters 8,192; 2,048 on a CPU, with a large
    vocabulary 1,024, above 50M parameters 256."""
    target, enlarged = shapes(preset, vocab_size, c.enlarge_ff)
    params, small = enlarged.num_params()["total"], vocab_size < 4096
    tokens = (2**14 if params < 1e9 else 2**13) if c.device.startswith("cuda") else \
        256 if params > 5e7 else 2048 if small else 1024
    return dataclasses.replace(c, micro_batch=c.micro_batch or max(1, tokens // enlarged.block_size),
                               steps=c.steps or (CUT_EVERY if small else 3)), target, enlarged


class Bare(Run):
    """steps.Run around a model that is given: random tokens, no folder, nothing evaluated, logged or saved."""
    def __init__(self, c, model, timeline, target=None, teacher=None, rank=0, world=1):
        self.rank, self.world, self.device = rank, world, c.device
        config, on_gpu = model.config, c.device.startswith("cuda")
        self.config = resolve(train.Train(
            steps=timeline.steps, micro_batch=c.micro_batch, lr=1e-4, device=c.device, dtype=c.dtype, compile=c.compile,
            batch_tokens=c.micro_batch * c.micro_steps * config.block_size, drop_teacher=False), on_gpu)
        self.start, self.target, self.timeline, self.T = config, target or config, timeline, config.block_size
        self.micro_steps = c.micro_steps // world
        draw = np.random.default_rng(0)
        kind = np.uint16 if config.vocab_size <= 2**16 else np.uint32
        self.corpus = SimpleNamespace(train=draw.integers(config.vocab_size, size=1024 * self.T + 1, dtype=kind))
        self.signal, self.interrupted = 0, False
        self.folder = SimpleNamespace(save=lambda state: None, path=os.devnull)
        keep = prune.everything(config) if isinstance(model, models.GPT) else {}
        self.state = State(model, make_optimizer(model, self.config), keep, teacher=teacher)
        if teacher:
            self.wrap_teacher()
        self.wrap()

    def evaluate(self, *_, **__):
        pass

    sample = log = capture_teacher = evaluate

    def wrap(self):
        if isinstance(self.state.model, models.GPT):
            return super().wrap()
        self.objective = torch.compile(self.state.model, dynamic=False) if self.config.compile else self.state.model

    def go(self, steps):
        """So many steps of train.loop."""
        progress = SimpleNamespace(update=lambda: None, set_postfix_str=lambda text: None)
        train.loop(self, self.state.step + steps, progress)

    def plain(self, steps):
        """So many steps of nanoGPT's loop instead: random windows, forward, backward, clip, AdamW, zero_grad; no
        record, no account, no wait for the loss."""
        tokens, s = self.corpus.train, self.state
        for _ in range(steps):
            for _ in range(self.micro_steps):
                at = torch.randint(len(tokens) - self.T, (self.config.micro_batch,)).tolist()
                x, y = (torch.from_numpy(np.stack([tokens[i + k:i + k + self.T] for i in at]).astype(np.int64)).to(
                    self.device, non_blocking=True) for k in (0, 1))
                with self.autocast():
                    loss, _ = self.objective(x, y)
                (loss / self.micro_steps).backward()
            nn.utils.clip_grad_norm_(s.model.parameters(), self.config.clip)
            s.optimizer.step()
            s.optimizer.zero_grad(set_to_none=True)

    def spend(self, steps):
        """So many steps of train.loop -> {part: seconds by the loop's own count, "whole": by the clock}."""
        before = dict(self.state.seconds)
        whole = seconds_of(lambda: self.go(steps), self.device)
        return {part: self.state.seconds[part] - before[part] for part in before} | {"whole": whole}

    def breakdown(self, steps):
        """So many steps -> {part: seconds, "whole": seconds}. forward holds the head's gradient and the teacher's
        logits, too, which distill.py forms there; teacher is its blocks; backward holds the gradient's norm."""
        teacher = self.state.teacher
        places = [(data, "batch", "data"), (self, "objective", "forward"), (self, "backward", "backward")]
        places += [(teacher, "hidden", "teacher")] if teacher else []
        with stopwatch(self.device, *places) as found:
            spent = self.spend(steps)
        found["optimizer"] = spent["train"] - found["backward"]
        found["backward"] -= sum(found.get(part, 0) for part in ("data", "teacher", "forward"))
        return {part: 0.0 for part in PARTS} | found | {"scoring": spent["score"], "cut": spent["cut"],
                                                        "whole": spent["whole"]}

    def scores(self, steps):
        """How many of the first so many steps score units."""
        return sum(schedule.score_at(s, self.timeline, self.config.score_every, self.config.score_window)
                   for s in range(steps))

    def flops_per_step(self):
        """Executed ones by the loop's own account, mean over the steps so far, less the half of attention's T x T
        square that causal kernels leave out."""
        s, square = self.state, lambda config, **back: config.flops_per_token(self.T, **back) - config.flops_per_token(
            0, **back)
        left_out = (square(s.model.config) + (square(s.teacher.config, backward=False) if s.teacher else 0)) / 2
        return s.flops[0] / s.step - self.config.batch_tokens * left_out


class Peer(nn.Module):
    """Another model, at the parameter count of `target`, with its own loss in the place of Objective:
    cross-entropy on whole float32 logits, as nanoGPT and transformers form it."""
    def __init__(self, name, target):
        super().__init__()
        self.config = c = target if name == LLAMA else gpt2_peer.peer_of(target)
        if name == LLAMA:
            from transformers import LlamaConfig, LlamaForCausalLM
            self.inner = LlamaForCausalLM(LlamaConfig(**write_config(c, "llama", "float32", {"use_cache": False})))
        else:
            self.inner = gpt2_peer.GPT2(c)

    def forward(self, x, y):
        logits = self.inner(x)
        logits = getattr(logits, "logits", logits).float()            # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return loss, torch.stack((loss.detach(), *loss.new_zeros(2)))


def stage_run(c, name, target, enlarged, rounds):
    """-> Bare that stays in a stage of STAGES, or a peer that trains as `recover` does, for `rounds` of c.steps steps
    and some more. In `prune` the last step of every round begins with a cut; the last cut ends at the target size."""
    stage, _, kd = name.partition(", ") if name in STAGES else ("recover", "", "")
    end, events = (rounds + 1) * c.steps + 8, ()
    if stage == "prune":
        final = target.removable_params() / enlarged.removable_params()
        events = tuple(((i + 1) * c.steps - 1, 1 - (1 - final) * (i + 1) / rounds) for i in range(rounds))
    timeline = schedule.Timeline(end, ((schedule.Stage(stage, None, kd=bool(kd)), 0, end),), events, ((0, end),), None)
    torch.manual_seed(0)
    with torch.device(c.device):                                      # 2.8B random numbers take a CPU a minute
        config = target if stage == "recover" else enlarged
        model = models.GPT(config) if name in STAGES else Peer(name, config)
        teacher = distill.freeze(models.GPT(enlarged)) if kd else None
    return Bare(c, model, timeline, target if stage == "prune" else None, teacher)


# -- suites

def stages(c, preset, vocab_size, names, memory=False):
    """Steps of the named stages and peers in turns, with a matrix product as their limit; with `memory` also the peaks
    of the steps without and with KD."""
    c, target, enlarged = fitted(c, preset, vocab_size)
    missing = [name for name in names if name == LLAMA and not find_spec("transformers")]
    peaks = {}
    if memory and not c.device.startswith("cuda"):
        peaks = {name: own_process(memory_alone, c, name, target, enlarged) for name in KD}
    runs = {name: stage_run(c, name, target, enlarged, 1 + c.rounds + APART) for name in names if name not in missing}
    product, product_flops = matmul(getattr(torch, c.dtype), c.device)
    calls = {"matmul": product, **{name: functools.partial(r.go, c.steps) for name, r in runs.items()}}
    if GPT2 in runs:
        calls[PLAIN] = functools.partial(runs[GPT2].plain, c.steps)
    seconds = interleave(calls, c.rounds, c.device)
    apart = {name: [r.breakdown(c.steps) for _ in range(APART)] for name, r in runs.items()}
    if memory and not peaks:
        peaks = {name: memory_of(runs[name]) for name in KD}
    rows = [row(c, preset, name, runs, seconds, product_flops, apart.get(name), peaks) for name in calls
            if name != "matmul"]
    rows += [{"shape": preset, "V": vocab_size, "variant": name, "note": "pip install transformers"}
             for name in missing]
    note = (f"; FLOPs with causal attention; train.py's default run cuts every {CUT_EVERY} steps and scores every "
            f"{train.Train.score_every}; the roofline: the FLOPs at recover's rate")
    return {"rows": [{"table": "training", **each} for each in rows], "note": note, "seconds": seconds,
            "breakdown": apart, "matmul_flops": product_flops, "memory": peaks}


def row(c, preset, name, runs, seconds, product_flops, apart, peaks):
    """One stage or peer as a row of the table."""
    r, mine = runs[GPT2 if name == PLAIN else name], seconds[name]
    tokens, flops, params = r.config.batch_tokens, r.flops_per_step(), r.start.num_params()["total"]
    found = {"shape": preset, "V": r.start.vocab_size, "variant": name, "dtype": c.dtype, "compiled": c.compile,
             "params": params, "of them embedding %": 100 * r.start.vocab_size * r.start.d_model / params,
             "tokens/step": tokens, "FLOPs/step, causal": float(flops), "tokens/s": c.steps * tokens / median(mine),
             "FLOP/s, causal": c.steps * flops / median(mine),
             "of matmul's FLOP/s, causal": c.steps * flops / product_flops * median_ratio(seconds["matmul"], mine)}
    if "recover" in runs:
        more = median_ratio(mine, seconds["recover"])
        found |= {"tokens/s: recover's ÷ this": more,
                  "time over the roofline": more * runs["recover"].flops_per_step() / flops}
    if name in peaks:
        size, ce = peaks[name], peaks["recover"]
        raised = [each["peak_bytes"] - each["before_bytes"] for each in (size, ce)]
        found |= {"peak bytes": size["peak_bytes"], "teacher bytes": size["teacher_bytes"],
                  "(peak − teacher) ÷ CE's peak": (size["peak_bytes"] - size["teacher_bytes"]) / ce["peak_bytes"],
                  "raised by": raised[0], "raised ÷ CE's raised": raised[0] / max(1, raised[1])}
    if r.timeline.events:
        found |= {"steps per cut": c.steps, "scores per cut": r.scores(c.steps)}
    if apart:
        found |= {f"{part} %": 100 * median([each[part] / each["whole"] for each in apart]) for part in PARTS}
        found["other %"] = 100 * median([1 - sum(each[part] for part in PARTS) / each["whole"] for each in apart])
    return found


def memory_of(r):
    """Behind a step of r: bytes before two more and at their peak, with gradients, activations, logits. On a GPU those
    of r alone, whatever else is there."""
    with peak(r.device) as found:
        r.go(2)
    s, size_of = r.state, lambda tensors: sum(t.nbytes for t in tensors)
    teacher = size_of(s.teacher.parameters()) if s.teacher else 0
    held = teacher + size_of(s.model.parameters()) + sum(size_of(m.values()) for m in s.optimizer.state.values())
    others = found["before_bytes"] - held if r.device.startswith("cuda") else 0
    return {name: size - others for name, size in found.items()} | {"teacher_bytes": teacher}


def memory_alone(c, name, target, enlarged):
    """memory_of a stage, in a process of its own."""
    r = stage_run(c, name, target, enlarged, 2)
    r.go(1)
    return memory_of(r)


def slice_pause(r):
    """The seconds of r.slice and of the first step behind it, compilation with nothing in the compiler's cache
    included."""
    before, cache = r.state.seconds["slice"], contextlib.nullcontext
    if r.config.compile:
        from torch._inductor import utils
        cache = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache          # the older name
    with cache():
        r.slice()
        first = seconds_of(lambda: r.go(1), r.device)
    return r.state.seconds["slice"] - before, first


def cuts(c, preset, vocab_size):
    """Pauses per score, cut and slice; their share of the prune stage at train.py's own cadence; what the moment of
    slicing is worth in a run of plan idea's shares. All ratios are of one round: zeros may change a GPU's clock."""
    c, target, enlarged = fitted(c, preset, vocab_size)
    late = stage_run(c, "prune", target, enlarged, 1 + c.rounds)
    early = stage_run(c, "recover", target, enlarged, 1 + c.rounds)
    spent = []
    seconds = interleave({"not sliced": lambda: spent.append(late.spend(c.steps)),
                          "sliced": lambda: early.go(c.steps)}, c.rounds, c.device)
    spent, scores = spent[1:], late.scores(c.steps)
    plain = [(each["whole"] - each["score"] - each["cut"]) / c.steps for each in spent]
    score, cut = [each["score"] / scores for each in spent], [each["cut"] for each in spent]
    slicing, first = slice_pause(late)
    before, faster = median(plain), median_ratio(plain, [s / c.steps for s in seconds["sliced"]])
    behind, per_cut = before / faster, CUT_EVERY / train.Train.score_every
    compiling = max(0.0, first - behind)
    about = {"shape": preset, "V": vocab_size, "dtype": c.dtype, "compiled": c.compile}
    rows = [{"table": "pauses", **about, "params": enlarged.num_params()["total"], "s/step": before,
             "score ms": 1000 * median(score), "cut ms": 1000 * median(cut), "slice ms": 1000 * slicing,
             "first step behind it, less a later one: s": compiling,
             f"prune stage ÷ none (a cut per {CUT_EVERY} steps, a score per {train.Train.score_every})":
             median([1 + (b + per_cut * a) / (CUT_EVERY * s) for a, b, s in zip(score, cut, plain)])}]
    idea = {each.name: each.share for each in schedule.PLANS["idea"]}
    last_cut, gain = idea["enlarge"] + idea["prune"], before - behind
    for share in (last_cut, (1 + last_cut) / 2, 1.0):
        rows.append({"table": "--slice-at, from two step times", **about, "slice at (share of the run)": share,
                     "s/step before": before, "s/step behind": behind, "mean s/step of the run": behind + share * gain,
                     "÷ at the last cut": (behind + share * gain) / (behind + last_cut * gain),
                     "pays after steps": (slicing + compiling) / gain if gain > 0 else None})
    return {"rows": rows, "seconds": seconds, "spent": spent, "slice_seconds": slicing, "first_step": first}


# -- two processes

def ddp_worker(rank, c, folder, target, threads):
    """One of two gloo processes. Rounds in turns: rank 0 alone with the whole batch in two micro-steps, both with one
    micro-step each, both only exchanging as many bytes as there are gradients. Rank 0 writes {name: [seconds]}."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(minutes=10))
    timeline = schedule.Timeline(10**6, ((schedule.Stage("recover", 1.0), 0, 10**6),), (), ((0, 10**6),), None)
    torch.manual_seed(0)
    model, gradient = models.GPT(target), torch.zeros(target.num_params()["total"])
    alone, both = Bare(c, copy.deepcopy(model), timeline), Bare(c, model, timeline, rank=rank, world=2)

    def one():
        if rank == 0:
            alone.go(c.steps)
        dist.barrier()

    def exchange():
        for _ in range(c.steps):
            dist.all_reduce(gradient)

    seconds = interleave({"one process": one, "two": lambda: both.go(c.steps), "all-reduce": exchange}, c.rounds)
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def ddp(c, preset, vocab_size):
    """Two processes with half of the batch each against one with all of it, each with as many threads: an efficiency of
    1 would be twice as fast, an overlap of 1 an exchange that is never waited for."""
    c, target, _ = fitted(dataclasses.replace(c, micro_steps=2), preset, vocab_size)
    threads = max(1, torch.get_num_threads() // 2)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(ddp_worker, (c, folder, target, threads), nprocs=2)
        seconds = json.loads(Path(folder, "seconds").read_text())
    one, two, exchange = (seconds[name] for name in ("one process", "two", "all-reduce"))
    return {"rows": [{"shape": preset, "V": vocab_size, "params": target.num_params()["total"],
                      "tokens/step": 2 * c.micro_batch * target.block_size, "threads each": threads,
                      **{f"{name}: s/step": median(s) / c.steps for name, s in seconds.items()},
                      "efficiency": median_ratio(one, two) / 2,
                      "overlap of the exchange": median([1 - (b - a / 2) / e for a, b, e in zip(one, two, exchange)])}],
            "seconds": seconds}

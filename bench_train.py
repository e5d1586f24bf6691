"""The training suites of bench.py: what is timed is `train.loop` itself, on random tokens.

    python bench.py train --presets laptop --rounds 5 --steps 15

`Bare` is train.Run without corpus, folder, evaluation and records, so that backward, cut, slice, accounting and the
order of them are the loop's own and cannot drift from it. A stage is a Timeline that stays in it. Each function here
measures one cell (timing.py): settings, a shape's name, a vocabulary -> {"rows": …}.
"""
import copy
import dataclasses
import functools
import os
import socket
import statistics
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import allocate
import data
import distill
import gpt2_peer
import model as models
import prune
import schedule
import score
import train
from folder import State
from timing import interleave, matmul, median_ratio, own_process, peak, seconds_of, stopwatch

SHAPES = {  # besides model.PRESETS; the enlarged model's, its target follows from --enlarge-ff
    "1m": models.GPTConfig(256, 128, 128, 32, (4,) * 5, (2,) * 5, (384,) * 5),
    "135m": models.GPTConfig(49152, 512, 576, 64, (9,) * 30, (3,) * 30, (1536,) * 30)}      # SmolLM2-135M's
PARTS = ("data", "teacher", "forward", "backward", "optimizer", "scoring", "cut")
STAGES = ("enlarge", "prune", "prune, KD", "recover", "recover, KD")
GPT2, LLAMA = "GPT-2 (nanoGPT's block)", "LlamaForCausalLM (transformers)"
median = statistics.median


def shapes(name, vocab_size, enlarge_ff):
    """-> (target, enlarged) GPTConfigs of a shape. UserError: unknown."""
    if name not in SHAPES:
        return models.preset(name, vocab_size, enlarge_ff)
    enlarged = dataclasses.replace(SHAPES[name], vocab_size=vocab_size)
    return models.shrunk(enlarged, enlarge_ff), enlarged


def micro_batch(c, config, device):
    """Sequences per forward pass: --micro-batch, or what makes 16,384 tokens on a GPU, above 1B parameters 8,192; 2,048
    on a CPU, above 50M parameters 256."""
    params = config.num_params()["total"]
    tokens = (2**14 if params < 1e9 else 2**13) if device.startswith("cuda") else 2048 if params < 5e7 else 256
    return c.micro_batch or max(1, tokens // config.block_size)


class Bare(train.Run):
    """train.Run around a model that is given: random tokens, no folder, nothing evaluated, logged or saved."""
    def __init__(self, c, model, timeline, target=None, teacher=None, rank=0, world=1, window=100):
        self.rank, self.world, self.device = rank, world, c.device
        config, on_gpu = model.config, c.device.startswith("cuda")
        size = micro_batch(c, config, c.device)
        self.config = train.resolve(train.Train(
            steps=timeline.steps, micro_batch=size, batch_tokens=size * c.micro_steps * config.block_size, lr=1e-4,
            device=c.device, dtype=c.dtype, compile=c.compile, drop_teacher=False, score_window=window), on_gpu)
        self.start, self.target, self.timeline, self.T = config, target or config, timeline, config.block_size
        self.micro_steps = c.micro_steps // world
        draw = np.random.default_rng(0)
        kind = np.uint16 if config.vocab_size <= 2**16 else np.uint32
        self.corpus = SimpleNamespace(train=draw.integers(config.vocab_size, size=1024 * self.T + 1, dtype=kind))
        self.signal, self.interrupted = 0, False
        self.folder = SimpleNamespace(save=lambda state: None, path=os.devnull)
        keep = prune.everything(config) if isinstance(model, models.GPT) else {}
        self.state = State(model, train.make_optimizer(model, self.config), keep, teacher=teacher)
        self.wrap()

    def evaluate(self, *_, **__):
        pass

    sample = log = capture_teacher = evaluate

    def live(self):
        return super().live() if self.state.keep else self.state.model.config

    def wrap(self):
        if isinstance(self.state.model, models.GPT):
            return super().wrap()
        self.objective = torch.compile(self.state.model, dynamic=False) if self.config.compile else self.state.model

    def go(self, steps):
        """So many steps of train.loop."""
        progress = SimpleNamespace(update=lambda: None, set_postfix_str=lambda text: None)
        train.loop(self, self.state.step + steps, progress)

    def breakdown(self, steps):
        """So many steps -> {part: seconds, "whole": seconds}. forward holds the head's gradient and the teacher's
        logits, too, which distill.py forms there; teacher is its blocks; backward holds the gradient's norm."""
        teacher, before = self.state.teacher, dict(self.state.seconds)
        places = [(data, "batch", "data"), (self, "objective", "forward"), (self, "backward", "backward")]
        places += [(teacher, "hidden", "teacher")] if teacher else []
        with stopwatch(self.device, *places) as found:
            whole = seconds_of(lambda: self.go(steps), self.device)
        spent = {part: self.state.seconds[part] - before[part] for part in before}
        found["optimizer"] = spent["train"] - found["backward"]
        found["backward"] -= sum(found.get(part, 0) for part in ("data", "teacher", "forward"))
        return {part: 0.0 for part in PARTS} | found | {"scoring": spent["score"], "cut": spent["cut"], "whole": whole}

    def flops_per_step(self):
        """Executed ones by the loop's own account, mean over the steps so far."""
        return self.state.flops[0] / self.state.step


class Peer(nn.Module):
    """Another model with its own loss in the place of train.Objective: cross-entropy on whole float32 logits, as
    nanoGPT and transformers form it."""
    def __init__(self, inner, config):
        super().__init__()
        self.inner, self.config = inner, config

    def forward(self, x, y):
        logits = self.inner(x).float()                                # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return loss, torch.stack((loss.detach(), *loss.new_zeros(2)))


class Logits(nn.Module):
    """transformers' LlamaForCausalLM of an even GPTConfig: token ids (B, T) -> logits (B, T, V)."""
    def __init__(self, c):
        from transformers import LlamaConfig, LlamaForCausalLM
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff[0], num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head[0], num_key_value_heads=c.n_kv_head[0], head_dim=c.head_dim,
            max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
            attention_bias=c.qkv_bias, use_cache=False))

    def forward(self, idx):
        return self.model(input_ids=idx, use_cache=False).logits


def peer(name, target):
    """-> the Peer at `target`'s parameter count."""
    if name == LLAMA:
        return Peer(Logits(target), target)
    config = gpt2_peer.peer_of(target)
    return Peer(gpt2_peer.GPT2(config), config)


def stage_run(c, name, target, enlarged, rounds, every=1):
    """-> Bare that stays in a stage of STAGES, or a peer that trains as `recover` does, for `rounds` of c.steps steps
    and some more. In `prune` the last step of every `every`-th round, from the first one on, begins with a cut, and the
    last cut ends at the target size; with `every` above 1 rounds without a cut do not score either."""
    stage, _, kd = name.partition(", ")
    end, events = (rounds + 1) * c.steps + 8, ()
    stage = "recover" if name in (GPT2, LLAMA) else stage
    if stage == "prune":
        final, at = target.removable_params() / enlarged.removable_params(), range(0, rounds, every)
        events = tuple(((i + 1) * c.steps - 1, 1 - (1 - final) * (k + 1) / len(at)) for k, i in enumerate(at))
        if c.steps == 1:                                              # the first cut needs a step's score before it
            events = tuple((step + 1, size) for step, size in events)
    rows = ((schedule.Stage(stage, None, kd=bool(kd)), 0, end),)
    timeline = schedule.Timeline(end, rows, events, ((0, end),), None)
    torch.manual_seed(0)
    with torch.device(c.device):                                      # 2.8B random numbers take a CPU a minute
        config = target if stage == "recover" else enlarged
        model = peer(name, config) if name in (GPT2, LLAMA) else models.GPT(config)
        teacher = distill.freeze(models.GPT(enlarged)) if kd else None
    return Bare(c, model, timeline, target if stage == "prune" else None, teacher,
                window=100 if every == 1 else c.steps - 1)


def watched(c):
    """Rounds that are taken apart: half as many again."""
    return c.rounds // 2 + 1


# -- suites

def stages(c, preset, vocab_size, names):
    """Steps of the named stages and peers in turns, with a matrix product as their limit."""
    target, enlarged = shapes(preset, vocab_size, c.enlarge_ff)
    missing = [LLAMA] if LLAMA in names and not find_spec("transformers") else []
    rounds = 1 + c.rounds + watched(c)
    runs = {name: stage_run(c, name, target, enlarged, rounds) for name in names if name not in missing}
    product, product_flops = matmul(c.matmul, getattr(torch, c.dtype), c.device)
    calls = {"matmul": product, **{name: functools.partial(r.go, c.steps) for name, r in runs.items()}}
    seconds = interleave(calls, c.rounds, c.device)
    apart = {name: [] for name in runs}
    for _ in range(watched(c)):
        for name, r in runs.items():
            apart[name].append(r.breakdown(c.steps))
    rows = [row(c, preset, name, r, seconds, product_flops, apart[name]) for name, r in runs.items()]
    rows += [{"table": "training", "shape": preset, "V": vocab_size, "variant": name, **how(c),
              "note": "pip install transformers"} for name in missing]
    return {"rows": rows, "seconds": seconds, "breakdown": apart, "matmul_flops": product_flops}


def how(c):
    """What else a row's numbers depend on, as columns."""
    return {"dtype": c.dtype, "compiled": c.compile}


def row(c, preset, name, r, seconds, product_flops, apart):
    tokens, flops = r.config.batch_tokens * c.steps, r.flops_per_step() * c.steps
    whole = median([found["whole"] for found in apart])
    beside = {"tokens/s ÷ recover's": median_ratio(seconds["recover"], seconds[name])} if "recover" in seconds else {}
    return {"table": "training", "shape": preset, "V": r.start.vocab_size, "variant": name, **how(c),
            "params": r.start.num_params()["total"], "tokens/step": r.config.batch_tokens,
            "FLOPs/step": float(r.flops_per_step()),
            "tokens/s": tokens / median(seconds[name]), "FLOP/s": flops / median(seconds[name]),
            "of matmul's FLOP/s": flops / product_flops * median_ratio(seconds["matmul"], seconds[name]),
            **beside, **{f"{part} %": 100 * median([found[part] for found in apart]) / whole for part in PARTS},
            "other %": 100 * median([found["whole"] - sum(found[p] for p in PARTS) for found in apart]) / whole}


def step_memory(c, name, target, enlarged):
    """In a process of its own: bytes before the first step of a stage (weights, teacher, tokens) and at the peak of
    three, with gradients, moments, activations, logits."""
    r = stage_run(c, name, target, enlarged, 3)
    with peak(c.device) as found:
        r.go(3)
    return found


def kd(c, preset, vocab_size):
    """The KD step's time over the time that its FLOPs take at the rate of the CE step; the peak memory of both."""
    target, enlarged = shapes(preset, vocab_size, c.enlarge_ff)
    names = ("recover", "recover, KD")
    memory = {name: own_process(step_memory, c, name, target, enlarged) for name in names}
    runs = {name: stage_run(c, name, target, enlarged, 1 + c.rounds) for name in names}
    seconds = interleave({name: functools.partial(r.go, c.steps) for name, r in runs.items()}, c.rounds, c.device)
    flops = {name: r.flops_per_step() for name, r in runs.items()}
    rows = []
    for name in names:
        more = median_ratio(seconds[name], seconds["recover"])
        rows.append({"table": "KD", "shape": preset, "V": vocab_size, "variant": name, **how(c),
                     "params": target.num_params()["total"],
                     "teacher's": enlarged.num_params()["total"] if "KD" in name else None,
                     "s/step": median(seconds[name]) / c.steps, "FLOPs/step": float(flops[name]),
                     "time ÷ CE's": more, "FLOPs ÷ CE's": flops[name] / flops["recover"],
                     "time over the roofline": more * flops["recover"] / flops[name],
                     "peak bytes": memory[name]["peak_bytes"],
                     "raised by": memory[name]["peak_bytes"] - memory[name]["before_bytes"],
                     "peak ÷ CE's": memory[name]["peak_bytes"] / memory["recover"]["peak_bytes"]})
    return {"rows": rows, "seconds": seconds, "memory": memory}


def cut_pauses(c, target, enlarged):
    """One cut per step -> [{"score", "allocate", "choose", "zero": seconds}], one per event; the first, which warms up,
    and the last, behind which nothing is scored, left out."""
    r = stage_run(dataclasses.replace(c, steps=1), "prune", target, enlarged, c.rounds + 2)
    r.go(1)                                                           # scores for the first cut
    found = []
    for _ in r.timeline.events:
        places = ((score, "sensitivity", "score"), (score, "average", "score"), (allocate, "towards", "allocate"),
                  (score, "ranking", "choose"), (prune, "choose", "choose"), (prune, "zero_", "zero"))
        with stopwatch(c.device, *places) as parts:
            r.go(1)
        found.append(dict(parts))
    return found[1:-1]


def slice_pause(r):
    """The seconds of r.slice and of the first step behind it, compilation included."""
    before = r.state.seconds["slice"]
    r.slice()
    first = seconds_of(lambda: r.go(1), r.device)
    return r.state.seconds["slice"] - before, first


def cuts(c, preset, vocab_size):
    """Pauses per event and per slice; rounds with a cut and its scoring against rounds of the same model without them;
    what the moment of slicing is worth in a run of plan idea's shares."""
    target, enlarged = shapes(preset, vocab_size, c.enlarge_ff)
    pauses = cut_pauses(c, target, enlarged)
    late = stage_run(c, "prune", target, enlarged, 2 * (1 + c.rounds), every=2)           # a cut, none, a cut, none …
    early = stage_run(c, "recover", target, enlarged, 1 + c.rounds)
    seconds = interleave({"with a cut": lambda: late.go(c.steps), "without": lambda: late.go(c.steps),
                          "sliced": lambda: early.go(c.steps)}, c.rounds, c.device)
    slicing, first = slice_pause(late)
    step = {name: median(s) / c.steps for name, s in seconds.items()}
    per_event = {part: median([p[part] for p in pauses]) for part in pauses[0]}
    compiling = max(0.0, first - step["sliced"])
    params = enlarged.num_params()["total"]
    rows = [{"table": "pauses", "shape": preset, **how(c), "params": params, **{f"{part} ms": 1000 * s for part, s in
             per_event.items()}, "event ms": 1000 * median([sum(p.values()) for p in pauses]),
             "slice ms": 1000 * slicing, "first step behind it, less a later one: s": compiling,
             "s/step": step["without"], f"prune stage ÷ none (a cut per {c.steps} steps)":
             median_ratio(seconds["with a cut"], seconds["without"])}]
    gain = step["without"] - step["sliced"]
    idea = {row.name: row.share for row in schedule.PLANS["idea"]}
    last_cut = idea["enlarge"] + idea["prune"]
    for share in (last_cut, (1 + last_cut) / 2, 1.0):
        rows.append({"table": "--slice-at, from two step times", "shape": preset, **how(c),
                     "slice at (share of the run)": share, "s/step before": step["without"],
                     "s/step behind": step["sliced"], "mean s/step of the run":
                     share * step["without"] + (1 - share) * step["sliced"],
                     "÷ at the last cut": (step["sliced"] + share * gain) / (step["sliced"] + last_cut * gain),
                     "pays after steps": (slicing + compiling) / gain if gain > 0 else None})
    return {"rows": rows, "seconds": seconds, "pauses": pauses, "slice_seconds": slicing, "first_step": first}


# -- two processes

def ddp_worker(rank, c, port, target, threads, answer):
    """One of two gloo processes. Rounds in turns: rank 0 alone with the whole batch in two micro-steps, then both with
    one micro-step each. Rank 0 sends {name: [seconds]}."""
    torch.set_num_threads(threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=10))
    c = dataclasses.replace(c, micro_steps=2)
    timeline = schedule.Timeline(10**6, ((schedule.Stage("recover", 1.0), 0, 10**6),), (), ((0, 10**6),), None)
    torch.manual_seed(0)
    model = models.GPT(target)
    alone, both = Bare(c, copy.deepcopy(model), timeline), Bare(c, model, timeline, rank=rank, world=2)

    def one():
        if rank == 0:
            alone.go(c.steps)
        dist.barrier()

    seconds = interleave({"one process": one, "two": lambda: both.go(c.steps)}, c.rounds)
    if rank == 0:
        answer.put((seconds, both.config.batch_tokens, both.micro_steps))
    dist.barrier()
    dist.destroy_process_group()


def ddp(c, preset, vocab_size):
    """Two processes with half of the batch each against one with all of it, each with as many threads: 1.0 would be
    twice as fast."""
    target, _ = shapes(preset, vocab_size, 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    answer = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // 2)
    processes = [context.Process(target=ddp_worker, args=(rank, c, port, target, threads, answer))
                 for rank in (0, 1)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    if any(p.exitcode for p in processes):
        raise RuntimeError(f"a gloo process ended with {[p.exitcode for p in processes]}; its lines are above")
    seconds, tokens, micro_steps = answer.get()
    return {"rows": [{"shape": preset, "V": vocab_size, "params": target.num_params()["total"], "tokens/step": tokens,
                      "micro-steps each": micro_steps, "threads each": threads,
                      **{f"{name}: s/step": median(s) / c.steps for name, s in seconds.items()},
                      "efficiency": median_ratio(seconds["one process"], seconds["two"]) / 2}], "seconds": seconds}

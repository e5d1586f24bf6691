"""Learned masks: gates over KV groups, neurons, layers and channels train with the weights until as many
are open as a target shape has.

    python train.py --plan naive --stage enlarge --out runs/large
    python -m methods.sheared --init runs/large --target laptop --lr 1e-3 --out runs/sheared
    python -m methods.sheared --init MODEL --keep 0.8              # any model, the same share of every layer
    python train.py --init runs/sheared --plan scratch --lr 1e-2   # the published second phase: a new cycle
    python -m pytest tests/methods/test_sheared.py

Sheared LLaMA (arXiv 2310.06694, section 2.1) prunes to a shape that is given and uniform, and learns
which units, layers and channels make it up. A gate z has one parameter, log_alpha, and is drawn anew
in each micro-batch (methods/gates.py).

    loss = cross-entropy + Σ over kinds of mean over layers of  m1 · (s - t) + m2 · (s - t)²

s is the share of closed gates, 1 - mean P(z > 0), and t the target's, reached on a line over the first
fifth of the steps. The multipliers m1, m2 ascend. In the end each layer's gates with the largest
log_alpha stay, so the shape is met exactly, and the multipliers only decide how far the model has got
used to it. Gates are folded into the weights: the result is a plain checkpoint.

As in the release: the constants, one cosine for all rates, one gate for both sub-blocks of a layer. Ours:
KV groups in place of heads; gates only where something is to go; channels' gates apply once, everywhere
(methods/gates.py); the weights' gradient is clipped by itself; and gates and multipliers learn at a rate
of 0.3. The release has 1.0, which is for its 3,200 steps: a gate then crosses its range in 10 steps, and
those that no loss holds are the first to come back when too many are closed. In 400 steps a model of 0.5
million parameters, halved, ended at 2.260 nats with 1.0 and at 2.225 with 0.3 (one seed).

A stopped run does not go on: a whole run has a few hundred steps. Not here: recovery (train.py), other
weights for texts that lag behind (methods/dynamic_batches.py).
"""
import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

import checkpoint
import data
import model as models
import schedule
import train
from common import UserError, check_init, check_positive, check_seed, parse, pick_device, progress, refuse_idle, run
from distill import Objective
from eval import evaluate
from formats.origin import hand_on
from methods.gates import LIMIT, closed_shares, draw, fold, gated, new_gates, settled, undecided, with_gates
from methods.target_shape import kept_of, kind_of, shape_of, sizes_of, target_of

WARMUP_SHARE = 0.1           # of the learning rates
TARGET_WARMUP_SHARE = 0.2    # of the target
# Against a toy loss 400 steps end within 0.04 of a target of one half, with at most 4 % of the gates
# undecided. 200 steps end up to 0.13 away, or with 80 % undecided.
FEWEST_STEPS = 300
DRAWS = 4                    # of the gates, for the loss before they settle
RECORDS = 20                 # of a run


# -- the penalty

def lagrangian(log_alphas, goals, multipliers, reached):
    """The penalty, (). `goals` {key: share of closed gates in the end}; `reached`, from 0 to 1, is how
    much of it is asked for now."""
    closed = closed_shares(log_alphas)
    penalty = 0
    for kind, (first, second) in multipliers.items():
        excess = torch.stack([closed[key] - reached * goals[key] for key in closed if kind_of(key) == kind])
        penalty = penalty + (first * excess + second * excess.square()).mean()
    return penalty


# -- training

def shear_(model, kept, batch, settings, micro_steps=1, autocast=contextlib.nullcontext, log=None):
    """Train the model in place together with its gates, so that in the end kept[key] gates of each key
    are open: -> log_alphas. `batch(step, micro)` gives token ids and targets (B, T), `log` is called
    some twenty times. Raises UserError if the loss is no finite number."""
    device = model.embed.weight.device
    log_alphas = new_gates(sizes_of(model.config), kept, device)
    multipliers = {kind: torch.zeros(2, device=device).requires_grad_() for kind in map(kind_of, kept)}
    goals = {key: 1 - n / len(log_alphas[key]) for key, n in kept.items()}
    weights = torch.optim.AdamW(model.parameters(), settings.lr, betas=(0.9, 0.95), weight_decay=0)
    groups = [{"params": [*log_alphas.values()]}, {"params": [*multipliers.values()], "maximize": True}]
    masks = torch.optim.Adam(groups, settings.gate_lr, betas=(0.9, 0.95))
    # Without a teacher this is cross-entropy.
    objective = Objective(model, 0.0, 1.0)
    timeline = schedule.resolve("scratch", settings.steps, 1.0)
    for step in progress(range(settings.steps), "shear"):
        # All rates follow one cosine to a tenth of their peaks.
        factor = schedule.lr_at(step, timeline, 1.0, 0.1, WARMUP_SHARE)
        for optimizer, peak in ((weights, settings.lr), (masks, settings.gate_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

        # Every micro-batch draws its own gates, which makes the gates' gradient less noisy.
        total = 0.0
        for micro in range(micro_steps):
            x, y = batch(step, micro)
            changed = gated(model, draw(log_alphas, settings.seed, step, micro))
            changed = {f"model.{name}": weight for name, weight in changed.items()}
            with autocast():
                loss, _ = torch.func.functional_call(objective, changed, (x.to(device), y.to(device)))
            (loss / micro_steps).backward()
            total += loss.item() / micro_steps
        if not math.isfinite(total):
            raise UserError(f"step {step}: the loss is {total}; lower --lr, now {settings.lr:g}")
        reached = min(1.0, step / (TARGET_WARMUP_SHARE * settings.steps))
        lagrangian(log_alphas, goals, multipliers, reached).backward()

        # Adam takes no notice of the scale of the gates' gradient.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (weights, masks):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for log_alpha in log_alphas.values():
                log_alpha.clamp_(-LIMIT, LIMIT)
        if log and (step + 1) % max(1, settings.steps // RECORDS) == 0:
            log(step + 1, total, log_alphas, {key: reached * goal for key, goal in goals.items()})
    return log_alphas


def print_progress(step, loss, log_alphas, goals):
    """Print the loss of a step, and the share of closed gates of each kind beside what is asked for now."""
    words = []
    with torch.no_grad():
        closed = closed_shares(log_alphas)
    for kind in dict.fromkeys(map(kind_of, goals)):
        keys = [key for key in goals if kind_of(key) == kind]
        share = sum(closed[key].item() for key in keys) / len(keys)
        goal = sum(goals[key] for key in keys) / len(keys)
        words.append(f"{kind} {share:.3f} of {goal:.3f}")
    print(f"step {step:5}   loss {loss:.4f}   closed: {', '.join(words)}")


# -- the command

@dataclass(frozen=True)
class Shear:
    init: str | None = None              # a checkpoint, run folder, Hugging Face folder or hub id
    target: train.PresetName | None = None    # its shape in the end: a size of model.py
    enlarge_ff: float = 1.0              # instead: the given model has so many times the target's FFN neurons
    enlarge_kv: float = 1.0              # and so many times its KV groups
    keep: float | None = None            # instead: kept fraction of what all FFN neurons and KV groups cost
    layers: int | None = None            # of the target, if it is no preset
    channels: int | None = None          # of the target's residual stream, if it is no preset
    steps: int = 400                     # with gates; the release has 3,200
    lr: float = 1e-4                     # peak, of the weights (the release's)
    gate_lr: float = 0.3                 # peak, of gates and multipliers; the release has 1.0 in 3,200 steps
    data: tuple[str, ...] = ("stdlib",)  # texts, A:2 B (data.py)
    out: str | None = None               # folder; default runs/sheared-NAME
    block_size: int | None = None        # tokens in a window; default: the model's context, at most 512
    batch_tokens: int | None = None      # tokens per step; default: about 4096
    micro_batch: int | None = None       # windows per forward pass; default: 16 or fewer
    eval_windows: int = 32               # of each text's hold-out, for the losses that are printed
    seed: int = 0                        # of the gates and the order of the data
    device: str = "auto"                 # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # of the products; auto: the faster one


def check(settings):
    """Raise UserError for settings that mean nothing."""
    check_init(settings, "to shear")
    check_positive(settings, ("steps", "lr", "gate_lr", "layers", "channels", "block_size", "batch_tokens",
                              "micro_batch", "eval_windows"))
    if settings.steps < FEWEST_STEPS:
        raise UserError(f"--steps {settings.steps} are too few for gates to open or close, and what is then cut off "
                        f"was in use; give at least {FEWEST_STEPS}")
    check_seed(settings)
    if settings.target:
        refuse_idle(settings, ("enlarge_ff", "enlarge_kv", "keep", "layers", "channels"),
                    f"with --target {settings.target}")
    if settings.keep is not None:
        refuse_idle(settings, ("enlarge_ff", "enlarge_kv"), f"with --keep {settings.keep}")
        if not 0 < settings.keep < 1:
            raise UserError(f"--keep {settings.keep} must be between 0 and 1")


def main(settings):
    check(settings)
    settings = dataclasses.replace(settings, data=data.recorded(settings.data))
    out = Path(settings.out or f"runs/sheared-{Path(settings.init).name}")
    with checkpoint.new_folder(out):
        shear_and_save(settings, out)


def shear_and_save(settings, out):
    """`main`, with the folder `out` held."""
    device = pick_device(settings.device)
    model, about = checkpoint.load(settings.init, device, torch.float32)
    if about.get("masks"):
        raise UserError(f"{settings.init} is a sparse model, whose zeros would not stay; shear first")
    start = models.with_context(model.config, settings.block_size, settings.init)
    target = target_of(model.config, settings)
    kept = kept_of(model.config, target)
    settings = train.fit_to(settings, start.block_size)
    settings = dataclasses.replace(settings, dtype=train.dtype_for(settings, start, device))
    T = settings.block_size or start.block_size
    micro_steps = settings.batch_tokens // (settings.micro_batch * T)
    if micro_steps * settings.micro_batch * T != settings.batch_tokens:
        raise UserError(f"--batch-tokens {settings.batch_tokens} must be a multiple of --micro-batch "
                        f"{settings.micro_batch} windows of {T} tokens")
    tokenizer = checkpoint.tokenizer_of(model, about, settings.init)
    corpus = data.load_mixture(settings.data, tokenizer, block_size=T)
    autocast = functools.partial(train.autocast, settings, device)

    def batch(step, micro):
        return data.batch(corpus.train, T, settings.seed, step, micro, micro_batch=settings.micro_batch,
                          micro_steps=micro_steps)

    def loss_of(gpt):
        losses = []
        for name, tokens in corpus.domains.items():
            with autocast():
                measured = evaluate(gpt, tokens, tokenizer.byte_lengths(), settings.eval_windows,
                                    batch=settings.micro_batch, block_size=T)
            losses.append(corpus.shares[name] * measured["loss"])
        return sum(losses)

    print(f"{shape_of(model.config)}, to be {shape_of(target)}")
    losses = {"before": loss_of(model)}
    log_alphas = shear_(model, kept, batch, settings, micro_steps, autocast, print_progress)
    with torch.no_grad():
        draws = [draw(log_alphas, settings.seed, settings.steps, number) for number in range(DRAWS)]
    # What settling does to the loss: the model has trained with gates that are drawn.
    losses["sampled"] = float(np.mean([loss_of(with_gates(model, gates)) for gates in draws]))
    small = fold(model, settled(log_alphas, kept))
    losses["settled"] = loss_of(small)
    tokens = settings.steps * settings.batch_tokens
    flops = tokens * start.flops_per_token(T)
    made = {"data": settings.data, "fingerprint": corpus.fingerprint, "cut_from": settings.init, "losses": losses,
            "flops_executed": flops, "recipe": {"command": "methods.sheared", **dataclasses.asdict(settings)}}
    checkpoint.save_made(out, small, tokenizer, hand_on(about), made)
    print(f"hold-out, nats per token: {losses['before']:.4f} before, {losses['sampled']:.4f} with sampled gates, "
          f"{losses['settled']:.4f} settled: a jump of {losses['settled'] - losses['sampled']:+.4f}, with "
          f"{undecided(log_alphas):.0%} of the gates undecided")
    print(f"{model.config.num_params()['total']:,} -> {small.config.num_params()['total']:,} parameters, "
          f"{tokens:,} tokens, {flops:.3g} FLOPs; saved in {out}")


if __name__ == "__main__":
    run(main, parse(Shear))

"""LoRA: train a cut model back through matrices of low rank, which then become part of its weights.

    python -m methods.lora --init CUT --data texts/brown.jsonl --steps 300 --out runs/back      # --teacher MODEL
    python -m methods.lora --init MODEL --keep 0.8 --data texts/brown.jsonl --steps 1000 --out runs/loraprune
    python -m pytest tests/methods/test_lora.py

LoRA (arXiv 2106.09685) trains y = W x + α/r · B A x, where only A and B learn (methods/adapters.py).
LLM-Pruner and Shortened LLaMA recover with it: rank 8, α 16, peak rate 1e-4, all seven matrices of a
block. In the end B A becomes part of W, so that the result is a plain checkpoint.

With --keep units are cut on the way (methods/loraprune.py). Dropout (0.05 in the releases) is left out, as
no model of this project has any. A sparse model is refused, as B A would fill its zeros.
"""
import contextlib
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

import checkpoint
import data
import distill
import prune
import schedule
from checkpoint import State
from common import (
    UserError,
    check_choices,
    check_init,
    check_multiple,
    check_positive,
    check_seed,
    parse,
    peak_memory,
    pick_device,
    progress,
    refuse_idle,
    run,
)
from formats.origin import hand_on
from methods import adapters, loraprune

CLIP = 1.0                    # gradient norm, as in the trainer that both papers use
SAVE_EVERY = 50               # steps that a killed run loses at most


# -- training

def begin(model, settings):
    """Put adapters into the model, in place. Returns the State before the first step."""
    parameters = adapters.adapt(model, settings.rank, settings.alpha, settings.seed)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    return State(model, optimizer, prune.everything(model.config))


def train(state, text, settings, teacher=None, autocast=contextlib.nullcontext, save=None):
    """Train the adapters on the tokens `text`, a `data.Corpus.train`, up to the last step. Below --keep 1
    units die on the way. `save(state)` is called every SAVE_EVERY steps. Raises UserError if a gradient is
    not finite."""
    model = state.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    objective = distill.Objective(model, settings.kd_weight, 1.0)
    timeline = schedule.resolve("scratch", settings.steps, 1.0)
    cuts = loraprune.cuts_of(settings.steps, settings.keep)
    last_cut = max(cuts, default=0)
    for step in progress(range(state.step, settings.steps), "lora"):
        if step in cuts:
            state.alive = loraprune.living(model.config, cuts[step], settings.allocate, state.averages, state.alive)
            loraprune.zero_(model, state.optimizer, state.alive)
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.lr_at(step, timeline, settings.lr, settings.lr / 10)
        loss = backward(objective, text, settings, step, teacher, autocast)
        if step < last_cut:
            state.averages = loraprune.average(state.averages, model)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP).item()
        if not math.isfinite(norm):
            raise UserError(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; lower --lr, now "
                            f"{settings.lr:g}, or check the data")
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step = step + 1
        if save and state.step % SAVE_EVERY == 0:
            save(state)


def backward(objective, text, settings, step, teacher, autocast):
    """The gradients of one step, in place. Returns its mean loss."""
    model = objective.model
    T = prune.window_of(settings, model)
    micro_steps = settings.batch // settings.micro_batch
    mean = 0
    for micro in range(micro_steps):
        batch = data.batch(text, T, settings.seed, step, micro, micro_batch=settings.micro_batch,
                           micro_steps=micro_steps)
        x, y = (tokens.to(model.embed.weight.device) for tokens in batch)
        taught = ()
        with autocast():
            if teacher is not None:
                with torch.no_grad():
                    taught = (teacher.hidden(x), teacher.head_weight)
            loss, _ = objective(x, y, *taught)
        (loss / micro_steps).backward()
        mean += loss.item() / micro_steps
    return mean


# -- the command

@dataclass(frozen=True)
class Lora:
    init: str | None = None       # what is trained back, or with --keep cut: a checkpoint, run, HF folder or hub id
    out: str | None = None        # folder; default runs/lora-NAME, or runs/loraprune-NAME-KEEP
    keep: float = 1.0             # below 1: LoRAPrune, and the kept fraction of what all units cost in parameters
    allocate: Literal["middle", "uniform", "global"] = "middle"    # of --keep: which layers lose units
    data: tuple[str, ...] = ("stdlib",)    # stdlib; packages; files; hf:NAME[:CONFIG]; or several, as A:2 B
    teacher: str | None = None    # a model with the same tokenizer to learn from as well
    kd_weight: float = 0.5        # share of the teacher's KL in the loss
    rank: int = 8                 # of the adapters
    alpha: float = 16.0           # the adapters' product counts alpha / rank times
    lr: float = 1e-4              # peak; it falls on a cosine to a tenth
    steps: int = 256              # optimizer steps
    batch: int = 8                # windows per step
    micro_batch: int = 4          # windows per forward pass
    block_size: int | None = None    # tokens in a window; default: the model's context, at most 512
    eval_windows: int = 32        # of the hold-out, before and after
    seed: int = 0                 # of the adapters and the order of the data
    device: str = "auto"          # auto, cpu, cuda, mps
    # of products in training and of losses; auto: bfloat16 where it is faster
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def check(settings):
    """Raise UserError for settings that mean nothing."""
    check_init(settings, "to train")
    check_choices(settings)
    check_positive(settings, ("rank", "alpha", "lr", "steps", "batch", "micro_batch", "block_size", "eval_windows"))
    if not 0 < settings.keep <= 1:
        raise UserError(f"--keep {settings.keep} must be above 0 and at most 1")
    if not 0 <= settings.kd_weight <= 1:
        raise UserError(f"--kd-weight {settings.kd_weight} must be between 0 and 1")
    check_seed(settings)
    check_multiple("--batch", settings.batch, settings.micro_batch)
    if settings.teacher is None:
        refuse_idle(settings, ("kd_weight",), "without --teacher")
    if settings.keep == 1:
        refuse_idle(settings, ("allocate",), "without --keep")
    loraprune.cuts_of(settings.steps, settings.keep)


def open_model(settings, device):
    """The model in float32 and what its file says besides. Raises UserError for a sparse model."""
    model, about = checkpoint.load(settings.init, device, torch.float32)
    if about.get("masks"):
        raise UserError(f"{settings.init} is sparse, and adapters would fill its zeros; train it by train.py --init "
                        f"{settings.init} --plan scratch")
    T = prune.window_of(settings, model)
    if T > model.config.block_size:
        raise UserError(f"{settings.init} was trained with a context of {model.config.block_size} tokens, not {T}; "
                        "give --block-size of at most that")
    if settings.keep < 1:
        loraprune.check_budget(model.config, settings.keep, settings.allocate)
    return model, about


def open_teacher(settings, model, tokenizer, dtype):
    """The frozen model of --teacher, or None. Raises UserError for one with another tokenizer or a shorter
    context."""
    if settings.teacher is None:
        return None
    teacher, about = checkpoint.load(settings.teacher, model.embed.weight.device, torch.float32)
    own = checkpoint.tokenizer_of(teacher, about, settings.teacher)
    T = prune.window_of(settings, model)
    if own.name != tokenizer.name or teacher.config.block_size < T:
        raise UserError(f"the teacher {settings.teacher} has tokens of {own.name!r} and a context of "
                        f"{teacher.config.block_size}, the model has those of {tokenizer.name!r} and windows of {T}; "
                        "give a teacher with the same tokenizer and at least that context")
    if teacher.config.vocab_size != model.config.vocab_size:
        teacher = checkpoint.without_padding(teacher, tokenizer.vocab_size)
    if dtype == torch.bfloat16:
        distill.halve_matrices(teacher)
    return distill.freeze(teacher)


def main(settings):
    check(settings)
    settings = dataclasses.replace(settings, data=data.recorded(settings.data))
    name = Path(settings.init).name
    usual = f"runs/lora-{name}" if settings.keep == 1 else f"runs/loraprune-{name}-{settings.keep:g}"
    out = Path(settings.out or usual)
    with checkpoint.locked(out):
        # What a killed run left is gone on with.
        if checkpoint.newest(out) or not (out / adapters.UNFINISHED).exists():
            checkpoint.refuse_existing(out)
        train_and_save(settings, out)


def train_and_save(settings, out):
    """`main`, with the folder `out` held."""
    device = pick_device(settings.device)
    model, about = open_model(settings, device)
    tokenizer = checkpoint.tokenizer_of(model, about, settings.init)
    dtype = prune.measuring_dtype(settings, model, device)
    teacher = open_teacher(settings, model, tokenizer, dtype)
    T = prune.window_of(settings, model)
    corpus = data.load_mixture(settings.data, tokenizer, block_size=T)
    start = model.config
    made = {"data": settings.data, "fingerprint": corpus.fingerprint,
            "recipe": {"command": "methods.lora", **dataclasses.asdict(settings)}}
    identity = {name: value for name, value in dataclasses.asdict(settings).items()
                if name not in ("device", "out", "eval_windows")}
    identity |= {"dtype": str(dtype), "text": corpus.fingerprint, "model": checkpoint.fingerprint(model)}
    prune.print_losses(settings, model, corpus, "before", dtype)

    state = begin(model, settings)
    unfinished = out / adapters.UNFINISHED
    if unfinished.exists():
        adapters.resume(unfinished, identity, state)
        print(f"going on from step {state.step}")
    clock = time.perf_counter()
    steps = settings.steps - state.step
    autocast = functools.partial(torch.autocast, device.split(":")[0], torch.bfloat16, dtype == torch.bfloat16)
    train(state, corpus.train, settings, teacher, autocast, functools.partial(adapters.save, unfinished, identity))
    seconds = time.perf_counter() - clock

    small, _ = prune.slice(adapters.merge(model), None, state.alive)
    # What the model that was trained back was cut from stays known. How it was cut is a step of the origin.
    cut_from = settings.init if settings.keep < 1 else about.get("run", {}).get("cut_from")
    if cut_from:
        made["cut_from"] = cut_from
    checkpoint.save_made(out, small, tokenizer, hand_on(about), made)
    unfinished.unlink(missing_ok=True)
    prune.print_losses(settings, small, corpus, "after", dtype)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trained {trained:,} parameters of adapters on {steps * settings.batch * T:,} tokens in {seconds:.1f} "
          f"seconds, peak memory {peak_memory(device) / 1e9:.2f} GB")
    if settings.keep < 1:
        whole = start.removable_params()
        left = small.config.removable_params()
        print(f"{left:,} of {whole:,} params kept: {left / whole:.4f}, asked {settings.keep:g}")
    print(f"saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Lora)))

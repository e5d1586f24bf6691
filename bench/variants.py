"""What the training suites time: `train.train`, the loop of a real run, on random weights and
tokens.

    python -m bench train --presets toy --vocab 300 --device cpu

A *variant* is a row of a table: a stage, which the loop then never leaves, or a peer, which is
another project's model with its own loss. Its Setup has no folder, so nothing is evaluated,
recorded or saved. The functions below measure one variant. Not here: which variants stand beside
each other (bench/training.py).
"""
import dataclasses
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import distill
import model as models
import prune
import schedule
import train
from bench import gpt2_peer
from bench.timing import peak, seconds_of
from checkpoint import State
from formats.huggingface import write_config

# Besides model.PRESETS. These are enlarged models; their targets follow from --enlarge-ff.
SHAPES = {
    "1m": models.GPTConfig(256, 128, 128, 32, (4,) * 5, (2,) * 5, (384,) * 5),
    "135m": models.GPTConfig(49152, 512, 576, 64, (9,) * 30, (3,) * 30, (1536,) * 30),   # SmolLM2's
    "2.8b": models.preset("1.3b", vocab_size=50257)[1],
    # LLaMA-3.1-8B's, with a shorter context.
    "8b": models.GPTConfig(128256, 4096, 4096, 128, (32,) * 32, (8,) * 32, (14336,) * 32, tie_embeddings=False,
                           rope_theta=5e5, rope_scaling=(8.0, 1.0, 4.0, 8192)),
}

# Names of variants.
STAGES = {
    "enlarge": schedule.Stage("enlarge", share=1.0),
    "prune": schedule.Stage("prune", share=1.0),
    "prune, KD": schedule.Stage("prune", share=1.0, kd=True),
    "recover": schedule.Stage("recover", share=1.0),
    "recover, KD": schedule.Stage("recover", share=1.0, kd=True),
}
GPT2 = "GPT-2 (nanoGPT's block)"
LLAMA = "LlamaForCausalLM (transformers)"

PARTS = ("data", "teacher", "forward", "backward", "optimizer", "scoring", "cut")
CUT_EVERY = 15                   # steps, in train.py's default run: 1,500 · 0.2 / 20
median = statistics.median


# -- sizes

def shapes(name, vocab_size, enlarge_ff=1.0):
    """The GPTConfigs of a shape: -> target, enlarged."""
    if name not in SHAPES:
        return models.preset(name, vocab_size, enlarge_ff)
    enlarged = dataclasses.replace(SHAPES[name], vocab_size=vocab_size)
    return models.shrunk(enlarged, enlarge_ff), enlarged


@dataclass(frozen=True)
class Load:
    """How variants train, and how often each is timed. Other processes are sent this."""
    device: str
    dtype: str
    compile: bool
    micro_batch: int
    micro_steps: int
    steps: int                   # in a round
    rounds: int


def fitted(settings, preset, vocab_size):
    """What to train, with --micro-batch and --steps filled in alike for all variants of a cell:
    -> Load, target, enlarged."""
    target, enlarged = shapes(preset, vocab_size, settings.enlarge_ff)
    if settings.block_size is not None:
        target = dataclasses.replace(target, block_size=settings.block_size)
        enlarged = dataclasses.replace(enlarged, block_size=settings.block_size)
    tokens = tokens_per_forward(settings.device, enlarged.num_params()["total"], vocab_size)
    load = Load(settings.device, settings.dtype, settings.compile,
                micro_batch=settings.micro_batch or max(1, tokens // enlarged.block_size),
                micro_steps=settings.micro_steps,
                steps=settings.steps or (CUT_EVERY if vocab_size < 4096 else 3),
                rounds=settings.rounds)
    return load, target, enlarged


def tokens_per_forward(device, params, vocab_size):
    """How many tokens a forward pass of the enlarged model takes without --micro-batch."""
    if device.startswith("cuda"):
        return 2**14 if params < 1e9 else 2**13
    if params > 5e7:
        return 256
    return 2048 if vocab_size < 4096 else 1024


# -- peers

class Llama(nn.Module):
    """transformers' Llama with the shape of a GPTConfig, which the count of FLOPs reads."""
    def __init__(self, config):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        settings = write_config(config, "llama", "float32", {"use_cache": False})
        self.config = config
        self.inner = LlamaForCausalLM(LlamaConfig(**settings))

    def forward(self, idx):
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.inner(idx).logits


class WholeLogits(nn.Module):
    """The loss of the peers, in the place of distill.Objective: cross-entropy on whole float32
    logits, as nanoGPT and transformers form it."""
    def __init__(self, model, kd_weight, temperature):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        """Token ids and targets (B, T) -> loss, (its value, 0, 0)."""
        logits = self.model(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return loss, torch.stack((loss.detach(), *loss.new_zeros(2)))


# -- variants

@dataclass
class Variant:
    """A run of train.train that goes on round after round."""
    setup: train.Setup
    state: State
    objective_of: type = distill.Objective

    def go(self, steps):
        """Train for so many steps more."""
        stop = self.state.step + steps
        train.train(self.setup, self.state, stop, objective_of=self.objective_of)


def one_stage(stage, steps, cuts=(), slice_at=None):
    """A Timeline that never leaves this stage."""
    return schedule.Timeline(steps, ((stage, 0, steps),), cuts, ((0, steps),), slice_at)


def bare_setup(load, timeline, start, target, rank=0, world=1):
    """The Setup of a run that has a corpus of random tokens and no folder."""
    T = start.block_size
    config = train.Train(
        steps=timeline.steps, micro_batch=load.micro_batch,
        batch_tokens=load.micro_batch * load.micro_steps * T, lr=1e-4, device=load.device,
        dtype=load.dtype, compile=load.compile,
        # A given teacher: else the loop would make one at the first cut, in the folder.
        teacher="random weights", drop_teacher=False)
    dtype = np.uint16 if start.vocab_size <= 2**16 else np.uint32
    tokens = np.random.default_rng(0).integers(start.vocab_size, size=1024 * T + 1, dtype=dtype)
    return train.Setup(train.resolve(config, load.device), timeline, start, target,
                       SimpleNamespace(train=tokens), byte_lengths=None, device=load.device,
                       rank=rank, world=world)


def stage_variant(load, name, target, enlarged, rounds, rank=0, world=1):
    """A Variant that stays in the stage `name` for so many rounds and a few steps more. In "prune"
    the last step of every round begins with a cut. The last cut ends at the target size, and the
    step behind it begins with the slice."""
    stage = STAGES[name]
    start = target if stage.name == "recover" else enlarged
    steps = (rounds + 1) * load.steps + 8
    timeline = one_stage(stage, steps)
    if stage.name == "prune":
        final = target.removable_params() / enlarged.removable_params()
        cuts = []
        for i in range(1, rounds + 1):
            cuts.append((i * load.steps - 1, 1 - (1 - final) * i / rounds))
        timeline = one_stage(stage, steps, tuple(cuts), slice_at=rounds * load.steps)
    setup = bare_setup(load, timeline, start, target, rank, world)

    torch.manual_seed(0)
    teacher = None
    with torch.device(load.device):          # a CPU takes a minute for 2.8B random numbers
        model = models.GPT(start)
        if stage.kd:
            teacher = distill.freeze(models.GPT(enlarged))
    if teacher and load.dtype == "bfloat16" and load.device.startswith("cuda"):
        distill.halve_matrices(teacher)        # as train.open_teacher does
    optimizer = train.make_optimizer(model, setup.config)
    return Variant(setup, State(model, optimizer, prune.everything(start), teacher=teacher))


def peer_variant(load, name, target, rounds):
    """A Variant that trains a peer of the target, as stage "recover" trains the target."""
    torch.manual_seed(0)
    with torch.device(load.device):
        model = Llama(target) if name == LLAMA else gpt2_peer.GPT2(gpt2_peer.peer_of(target))
    timeline = one_stage(STAGES["recover"], (rounds + 1) * load.steps + 8)
    setup = bare_setup(load, timeline, model.config, model.config)
    optimizer = train.make_optimizer(model, setup.config)
    return Variant(setup, State(model, optimizer, alive={}), WholeLogits)


# -- what is measured of a variant: time

def spend(variant, steps):
    """Train for so many steps: -> {part: seconds by the loop's own count, "whole": by the
    clock}."""
    before = dict(variant.state.seconds)
    whole = seconds_of(lambda: variant.go(steps), variant.setup.device)
    spent = {part: seconds - before[part] for part, seconds in variant.state.seconds.items()}
    return {**spent, "whole": whole}


def take_apart(variant, steps):
    """The seconds of each of PARTS in so many steps.

    The parts of a step are called here one by one, outside of the loop; scoring and cuts are those
    of as many steps of the loop, by its own count. "forward" holds the gradient of the head and the
    teacher's logits, too, which distill.py forms there. "teacher" is the rest of the teacher."""
    setup = variant.setup
    state = variant.state
    objective = train.wrap(setup, state.model, variant.objective_of)
    read_teacher = train.teacher_reader(setup, state.teacher)
    seconds = dict.fromkeys(PARTS, 0.0)
    clock = train.Clock(seconds, setup.device)
    for step in range(state.step, state.step + steps):
        for micro in range(setup.micro_steps):
            x, y = setup.batch(step, micro)
            clock.lap("data")
            with setup.autocast():
                taught = ()
                if state.teacher:
                    taught = read_teacher(x, step, micro)
                    clock.lap("teacher")
                loss, _ = objective(x, y, *taught)
            clock.lap("forward")
            (loss / setup.micro_steps).backward()
            clock.lap("backward")
        update(variant)
        clock.lap("optimizer")
    spent = spend(variant, steps)
    seconds["scoring"] = spent["score"]
    seconds["cut"] = spent["cut"]
    return seconds


def plain_loop(variant, steps):
    """So many steps of nanoGPT's loop on the model and optimizer of a variant: random windows,
    forward, backward, clip, AdamW. Nothing is counted or recorded, and the loss is not waited
    for."""
    setup = variant.setup
    objective = train.wrap(setup, variant.state.model, variant.objective_of)
    for _ in range(steps):
        for _ in range(setup.micro_steps):
            x, y = random_windows(setup)
            with setup.autocast():
                loss, _ = objective(x, y)
            (loss / setup.micro_steps).backward()
        update(variant)


def update(variant):
    """Clip the gradients, take a step with them and forget them."""
    nn.utils.clip_grad_norm_(variant.state.model.parameters(), variant.setup.config.clip)
    variant.state.optimizer.step()
    variant.state.optimizer.zero_grad(set_to_none=True)


def random_windows(setup):
    """Token ids and targets, (B, T) each, from random places of the corpus."""
    tokens = setup.corpus.train
    T = setup.block_size
    starts = torch.randint(len(tokens) - T, (setup.config.micro_batch,)).tolist()
    windows = np.stack([tokens[start:start + T + 1] for start in starts]).astype(np.int64)
    x = torch.from_numpy(windows[:, :-1]).to(setup.device, non_blocking=True)
    y = torch.from_numpy(windows[:, 1:]).to(setup.device, non_blocking=True)
    return x, y


# -- what is measured of a variant: work and memory

def scored_steps(variant, steps):
    """How many of the first so many steps score units."""
    timeline = variant.setup.timeline
    config = variant.setup.config
    return sum(schedule.score_at(step, timeline, config.score_every, config.score_window)
               for step in range(steps))


def attention_square(config, T, backward=True):
    """The FLOPs per token of attention over the whole T x T square."""
    everything = config.flops_per_token(T, backward=backward)
    return everything - config.flops_per_token(0, backward=backward)


def flops_per_step(variant):
    """The FLOPs that the loop counted as executed, as a mean over its steps so far, less half of
    attention's T x T square, which causal kernels leave out."""
    state = variant.state
    T = variant.setup.block_size
    square = attention_square(state.model.config, T)
    if state.teacher:
        square += attention_square(state.teacher.config, T, backward=False)
    return state.flops["executed"] / state.step - variant.setup.config.batch_tokens * square / 2


def memory_of(load, name, target, enlarged):
    """The bytes before two steps of a stage and at their peak, with gradients, activations and
    logits, and the bytes of its teacher. To be called in a process of its own."""
    variant = stage_variant(load, name, target, enlarged, rounds=2)
    variant.go(1)
    with peak(load.device) as memory:
        variant.go(2)
    teacher = 0
    if variant.state.teacher:
        teacher = sum(p.nbytes for p in variant.state.teacher.parameters())
    return {**memory, "teacher_bytes": teacher}

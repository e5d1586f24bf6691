"""Enlarge, prune, recover: the one loop, in one run, under one learning-rate schedule.

    python train.py                                   # plan "idea", laptop preset, embedded corpus
    python train.py --plan naive --seed 1             # any other row of schedule.PLANS through the same loop
    python train.py --plan adapt                      # Adapt-Pruner: cut a little, train, cut again (arXiv 2502.03460)
    python train.py --init FOLDER --enlarge-ff 1.25                    # the large one is given
    python train.py --init CUT --teacher FOLDER --plan recover         # a cut model is trained back
    torchrun --nproc-per-node 8 train.py --preset 124m --tokenizer gpt2 --batch-tokens 524288
    torchrun --nproc-per-node 8 train.py --preset 1.3b --shard fsdp --recompute --micro-batch 1 --batch-tokens 524288

A larger model than wanted is trained. It loses units while it trains (prune.py) and recovers at the
target size. If the plan says so, a teacher helps: the model itself as it stood before the first cut
(distill.py). This is IDEA Prune, arXiv 2503.05920. `train` is the method; read it first. A run is a
folder (checkpoint.py), and the same command goes on where a killed run stopped, bit for bit on a
CPU.

The records that a run writes into metrics.jsonl are listed in docs/records.md. How several processes
share one model: shard.py and docs/scale.md.
"""
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import allocate
import checkpoint
import data
import distill
import model as models
import prune
import report
import schedule
import score
import shard
from checkpoint import State
from common import (
    UserError,
    check_choices,
    check_positive,
    has_fast_bfloat16,
    parse,
    peak_memory,
    pick_device,
    printable,
    progress_file,
    refuse_idle,
    run,
)
from eval import evaluate, sample
from formats import pt, top_k
from formats.origin import hand_on
from formats.tokenizer import open_tokenizer
from methods import dynamic_batches, sparse

LOG_EVERY = 10               # steps between "step" records, which hold means over them
# How many of the newest steps stay unread. A GPU is then still at work on the newest while Python
# records the step before and queues the next. Elsewhere nothing is queued.
STAY_UNREAD = {"cpu": 0, "mps": 0, "cuda": 1}
SAMPLE_TOKENS = 200
INIT_LR = 2e-5               # peak learning rate for pretrained models (Adapt-Pruner's scripts)
# The same in plan recover, whose model a cut has damaged. SmolLM2-135M at 0.8, 65,536 tokens, one seed:
# 3.166, 3.150 and 3.164 nats with 1.5e-4, 3e-4 and 6e-4.
RECOVER_LR = 3e-4

LEARNING_RATES = {           # the peak for each preset
    "toy": 1e-2,
    "laptop": 1e-2,
    "10m": 1e-3,
    "124m": 6e-4,            # this rate and the next are GPT-3's (arXiv 2005.14165)
    "1.3b": 2e-4,
    # the experiments' own sizes, layers x width
    "4x16": 2e-2,            # half and twice of it: claim 13, results/claims/report.md
    "8x16": 1e-2, "8x32": 1e-2, "8x48": 1e-2, "8x64": 1e-2,
    "4x256": 2e-3,
    "12x128": 1e-3, "12x192": 1e-3, "12x320": 1e-3, "12x512": 1e-3,
}


# What these settings are where they are left open.
USUAL = {"steps": 1500, "batch_tokens": 4096, "micro_batch": 16, "eval_every": 100, "eval_growth": 1.0,
         "eval_windows": 256, "save_every": 500}
# The same with --init, for a model of some hundred million parameters on a CPU: a step takes ten
# seconds, and the evaluations about a twentieth of the run.
USUAL_WITH_INIT = {"steps": 256, "eval_every": 16, "eval_growth": 2.0, "eval_windows": 16, "save_every": 64}
# With --init: the longest context, and the most tokens of a micro-batch.
INIT_BLOCK_SIZE = 512
INIT_MICRO_TOKENS = 2048

# The narrowest model that --dtype auto trains in bfloat16 on a CPU that multiplies it fast. At d_model
# 16, 32, 64, 128, 192 and 256 a step is then 0.9, 1.05, 1.4, 1.9, 2.1 and 2.4 times as fast as in
# float32 (bench dtypes, V = 256, one thread). Nothing is compiled on a CPU without --compile True: a
# step becomes 0.96 to 1.2 times as fast, and each size takes 7 to 20 seconds to compile.
BFLOAT16_WIDTH = 64

PlanName = Literal[tuple(schedule.PLANS)]
PresetName = Literal[tuple(models.PRESETS)]
SizeCurveName = Literal[tuple(schedule.SIZE_CURVES)]
ScoreName = Literal[tuple(score.SCORES)]


@dataclass(frozen=True)
class Train:
    plan: PlanName = "idea"                  # a row of schedule.PLANS
    stage: Literal["all", "enlarge", "prune", "recover"] = "all"    # stop after this stage; the next call goes on
    preset: PresetName = "laptop"            # size of the target
    init: str | None = None                  # instead of a preset: start with this checkpoint, run, HF folder or hub id
    block_size: int | None = None            # tokens of a window; default: the preset's, with --init at most 512
    enlarge_ff: float = 2.6                  # the enlarged model has so many times the target's FFN neurons
    enlarge_kv: float = 1.0                  # the enlarged model has so many times the target's KV groups
    # stdlib; packages; files as text, .jsonl, .parquet; hf:NAME[:CONFIG]; or several of them, as A:2 B
    data: tuple[str, ...] = ("stdlib",)
    # of several texts: those whose loss is furthest above this come more often (methods/dynamic_batches.py): auto,
    # their losses before training, or a .json file {text: nats per token}
    reference: str | None = None
    tokenizer: str | None = None             # bytes, a tiktoken encoding, a folder; default: bytes, or that of --init
    out: str | None = None                   # run folder; default runs/PLAN-PRESET-SEED, or --init's name for PRESET
    seed: int = 0                            # of the initial weights and the order of the data
    steps: int | None = None                 # optimizer steps of the whole plan; default: 1500, with --init 256
    batch_tokens: int | None = None          # tokens per step, over all processes; default: about 4096
    micro_batch: int | None = None           # sequences in a process's forward pass; default: 16, with --init fewer
    lr: float | None = None                  # peak; default: the preset's, with --init 2e-5, in plan recover 3e-4
    min_lr: float | None = None              # at the end of a cycle; default: a tenth of the peak
    shape: Literal["cosine", "wsd"] | None = None        # of the learning rate; default: wsd in adapt, else cosine
    warmup_share: float = 0.05               # of a cycle
    rewarm: bool = True                      # warm up in plan naive's second cycle too; without: it begins at the peak
    sparse: float | None = None              # hold this share of the layers' weights at zero, chosen at random (SPDF)
    dense: bool = False                      # let the zeros of a sparse --init learn (SPDF's fine-tuning)
    weight_decay: float = 0.1                # of matrices (AdamW)
    clip: float = 1.0                        # gradient norm
    enlarge_share: float | None = None       # of the run; default: the plan's, 0 in adapt with --init
    prune_share: float | None = None         # of the run; default: the plan's
    size_curve: SizeCurveName | None = None  # how the size falls from cut to cut; default: the plan's
    cuts: int | None = None                  # number of cuts; default: 20, in adapt one for each 5 % removed
    slice_at: int | None = None              # step at which dead units are physically cut off; default: the last cut
    score: ScoreName | None = None           # of units, measured at every cut; default: IDEA's moving average
    score_every: int = 5                     # steps between gradient scores
    score_window: int = 100                  # score only so many steps before a cut
    uncertainty: bool = False                # multiply the score by its variation (PLATON)
    calibration_windows: int = 64            # windows of text to measure on at each cut (plan adapt, or --score)
    forget_moments: bool = False             # a new optimizer at every cut of adapt, as in Adapt-Pruner's scripts
    # a checkpoint, or a folder that experiments.teacher wrote; default: the enlarged model at the first cut
    teacher: str | None = None
    kd_weight: float = 0.5                   # share of the teacher's KL in the loss
    kd_temperature: float = 1.0              # of the softmax in the teacher's share
    drop_teacher: bool = True                # drop the teacher for good once the student has overtaken it
    eval_every: int | None = None            # steps; default: 100, with --init 16
    # above 1: the step of an evaluation is so many times that of the one before, from --eval-every on;
    # default: 1, with --init and without --eval-every 2
    eval_growth: float | None = None
    eval_windows: int | None = None          # windows of the hold-out (eval.py); default: 256, with --init 16
    save_every: int | None = None            # steps; default: 500, with --init 64
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"    # bfloat16 is autocast; auto: the faster one
    compile: bool | None = None              # torch.compile, True or False; default: on a GPU only
    # how several processes hold the model: each all of it; each a share of it; the processes of a machine share it
    shard: Literal["none", "fsdp", "hsdp"] = "none"
    recompute: bool = False                  # compute each layer again in the backward pass: less memory, slower


# -- the method

def train(setup, state, stop, progress=None, objective_of=distill.Objective):     # noqa: C901, PLR0912, PLR0915
    """Enlarge, prune, recover: one optimizer step after the other, up to the step `stop`. Returns
    True if a signal ended the loop early. `setup` never changes; every change of `state` is visible
    here. `objective_of(model, kd_weight, temperature)` makes the loss module; benchmarks pass their
    own."""
    config = setup.config
    timeline = setup.timeline
    stage_starts = [start for _, start, _ in timeline.stages]
    objective = wrap(setup, state.model, objective_of)
    read_teacher = teacher_reader(setup, state.teacher)
    clock = Clock(state.seconds, setup.device)
    unread = []                              # steps whose numbers a GPU may still be computing
    first_step = state.step

    while True:
        # 1. Record the steps before; evaluate and save. A checkpoint is the state *before* the
        # events of its step. After the last step there is no stage, so the last one counts; at a
        # boundary it is the one that begins.
        stage = schedule.stage_at(min(state.step, config.steps - 1), timeline)
        stage_begins = state.step in stage_starts
        at_boundary = stage_begins or state.step == stop
        evaluates = at_boundary or schedule.eval_at(state.step, config.eval_every, config.eval_growth)
        saves = at_boundary or state.step % config.save_every == 0
        interrupted = read_steps(setup, state, unread, clock, progress, everything=evaluates or saves)
        if evaluates:
            with clock.part("eval"):
                log_eval(setup, state, "eval", stage=stage.name)
        if saves or interrupted:
            with clock.part("save"):
                save(setup, state)
        if state.step == stop or interrupted:
            return interrupted
        if progress is not None and state.step == first_step:
            progress.unpause()               # its estimate counts from here

        # 2. Events: a fresh optimizer, the teacher, a cut, the slice.
        size = schedule.size_at(state.step, timeline)
        shrinks = size < schedule.size_at(state.step - 1, timeline)
        is_first_cut = shrinks and state.step == timeline.events[0][0]
        is_last_cut = shrinks and state.step == timeline.events[-1][0]
        if (stage_begins and stage.restart) or (shrinks and config.forget_moments):
            state.optimizer = make_optimizer(state.model, config)      # Adam forgets
        if is_first_cut:
            with clock.part("eval"):
                log_sample(setup, state, "before the first cut")
        if is_first_cut and stage.kd and not config.teacher:
            with clock.part("save"):
                capture_teacher(setup, state)                          # the enlarged model, frozen
                read_teacher = teacher_reader(setup, state.teacher)
        if shrinks:
            with clock.part("score"):
                scores, importance = score_units(setup, state)
            with clock.part("cut"):
                widths = widths_at(setup, state, size, scores, importance)
                alive = prune.choose(score.mask_dead(scores, state.alive), widths)
                state.alive = from_first_process(setup, alive)
                prune.zero_(state.model, state.optimizer, state.alive) # in place; nothing else changes
            with clock.part("eval"):
                log_eval(setup, state, "prune", size=size)
                if is_last_cut:
                    log_sample(setup, state, "after the last cut")
        if state.step == timeline.slice_at or (shrinks and timeline.interleaved):
            with clock.part("slice"):
                state.model, state.optimizer = prune.slice(state.model, state.optimizer, state.alive)
                state.alive = prune.everything(state.model.config)
                state.averages = None        # they are of units that are gone; no later cut reads them
                assert timeline.interleaved or state.model.config == setup.target
                if config.compile:
                    # The compiler gives up on a function after 8 graphs; plan adapt has as many sizes.
                    torch.compiler.reset()
                objective = wrap(setup, state.model, objective_of)     # around the smaller model
                shard.free_unused(state.model)
                setup.log("slice", state.step, **shape_record(state))

        # 3. The learning rate.
        lr = schedule.lr_at(state.step, timeline, config.lr, config.min_lr, config.warmup_share,
                            config.shape, rewarm=config.rewarm)
        for group in state.optimizer.param_groups:
            group["lr"] = lr

        # 4. Forward and backward over the micro-batches: cross-entropy, or a mix with distillation.
        # `means` adds up the loss, cross-entropy, KL and the teacher's cross-entropy. Each micro-batch
        # counts alike, however many of its targets are IGNORED, as in transformers before 4.46.
        teacher = state.teacher if stage.kd else None
        if state.teacher is None and read_teacher is not None:
            read_teacher = None              # nothing else holds a dropped teacher
            shard.free_unused(state.model)
        means = setup.zeros(4)
        for micro in range(setup.micro_steps):
            x, y = setup.batch(state.step, micro, state.balance)   # (B, T) each, a pure function of its arguments
            exchange_gradients(setup, objective, is_last=micro == setup.micro_steps - 1)
            with setup.autocast():
                from_teacher = read_teacher(x, state.step, micro) if teacher else ()
                loss, parts = objective(x, y, *from_teacher)
            (loss / setup.micro_steps).backward()
            means += torch.cat((loss.detach()[None], parts)) / setup.micro_steps
            del loss                         # its graph holds the model, which a slice is to free
        norm = shard.whole(nn.utils.get_total_norm([p.grad for p in state.model.parameters()]))
        numbers = agree(setup, means, norm)

        # 5. Score the units while their gradients are there; clip; update.
        score_due = setup.scores_while_training and schedule.score_at(
            state.step, timeline, config.score_every, config.score_window)
        if score_due:
            with clock.part("score"):
                state.averages = score.average(state.averages, score.sensitivity(state.model))
        nn.utils.clip_grads_with_norm_(state.model.parameters(), config.clip, norm)
        skip_if_not_finite(state.optimizer, numbers)
        state.optimizer.step()
        sparse.hold_(state.model, state.optimizer, state.masks)      # single zeros do get gradients
        state.optimizer.zero_grad(set_to_none=True)

        # 6. Count FLOPs. The numbers are read, judged and recorded when the loop begins again.
        count_flops(setup, state, teacher, score_due)
        unread.append(UnreadStep(state.step, stage.name, lr, teacher is not None, numbers))
        state.step += 1


class NotFinite(UserError):
    """The loss or the gradient of a step is infinite or not a number."""


def skip_if_not_finite(optimizer, numbers):
    """Let the optimizer's next step change nothing if one of the numbers is not finite. The device
    decides, and Python does not wait for it: fused AdamW reads `found_inf`. On Apple's GPUs AdamW
    is not fused, and the run ends before such weights are saved."""
    if optimizer.param_groups[0]["fused"]:
        optimizer.found_inf = numbers.isfinite().all().logical_not().float()


# -- what never changes in a run

@dataclass(frozen=True)
class Setup:
    """The fixed surroundings of a run. Every process of a run has one with the same numbers."""
    config: Train                            # resolved: no default is left open
    timeline: schedule.Timeline
    start: models.GPTConfig                  # the model that the run starts with
    target: models.GPTConfig                 # and the one that it ends with
    corpus: data.Corpus
    byte_lengths: np.ndarray | None          # bytes of each token of the vocabulary
    device: str
    rank: int = 0
    world: int = 1
    folder: checkpoint.RunFolder | None = None     # None: nothing is evaluated, recorded or saved
    cut_before: dict | None = None           # what the file of --init says of the cut or growth that made it
    waiting: object = None                   # the process group for long waits, see `join_processes`
    mesh: object = None                      # the processes that share the model; None: each has all of it
    signals: list = field(default_factory=list)    # those that this process has received

    @property
    def block_size(self):
        """Tokens of a training window. A given model (--init) may have a longer context, and keeps it."""
        return self.config.block_size or self.target.block_size

    @property
    def micro_steps(self):
        return self.config.batch_tokens // (self.config.micro_batch * self.block_size * self.world)

    @property
    def scores_while_training(self):
        """Whether units are scored from the training gradients (IDEA Prune), and not by a pass at
        each cut."""
        return calibration_score(self.config) is None

    def batch(self, step, micro, balance=None):
        """Token ids and targets, (B, T) each, on the device; `balance`: State.balance. A GPU is still at
        the step before, or at the micro-step before, when its next batch is built."""
        x, y = data.batch(self.corpus.train, self.block_size, self.config.seed, step, micro, self.rank,
                          world=self.world, micro_batch=self.config.micro_batch, micro_steps=self.micro_steps,
                          weights=balance and balance["weights"])
        if self.device.startswith("cuda"):
            # From pinned memory the copy waits for nothing.
            x = x.pin_memory()
            y = y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def first_sample(self, step, micro):
        """The number of the sample in the first row of `batch(step, micro)`, see data.batch."""
        return ((step * self.micro_steps + micro) * self.world + self.rank) * self.config.micro_batch

    def autocast(self):
        return autocast(self.config, self.device)

    def measuring(self):
        """What a model runs under outside of training. The blocks of a sharded one are bfloat16 there,
        too, if it trains in bfloat16; a whole one is then float32."""
        return contextlib.nullcontext() if self.mesh is None else self.autocast()

    def build(self, config, halve=False):
        """A sharded GPT with weights that are still to be filled; see shard.build."""
        dtype = torch.float64 if self.config.dtype == "float64" else torch.float32
        block_dtype = torch.bfloat16 if self.config.dtype == "bfloat16" else None
        return shard.build(config, self.mesh, self.device, dtype, block_dtype, halve and block_dtype is not None)

    def zeros(self, n):
        """Room for sums: float64 wherever the device has it."""
        dtype = torch.float32 if self.device.startswith("mps") else torch.float64
        return torch.zeros(n, device=self.device, dtype=dtype)

    def log(self, tag, step, **record):
        if self.folder:
            self.folder.log(tag, step, **record)

    def calibration_batches(self, step):
        """Windows of the training text for the cut at `step`. The seed is the pair (seed, step), so
        that they are drawn differently from the training batches. The processes that share a model deal
        them out. A gradient is then one of `world` batches together, so the scores that take its size
        batch by batch (sensitivity, taylor2) are not those of one process."""
        batches = score.batches(self.corpus.train, self.block_size, self.config.calibration_windows,
                                self.config.micro_batch, (self.config.seed, step), "--calibration-windows")
        if self.mesh is None:
            return batches
        if len(batches) % self.world:
            enough = math.ceil(len(batches) / self.world) * self.world * self.config.micro_batch
            raise UserError(f"--calibration-windows {self.config.calibration_windows} in batches of "
                            f"{self.config.micro_batch} cannot be dealt out to {self.world} processes; try {enough}")
        return batches[self.rank::self.world]


class Clock:
    """Divides the wall time of a run among its parts. A lap waits for the GPU, so that work counts
    for the part that queued it. Training steps have no laps, as the GPU's queue would run empty
    between them: training is the time that no other part took."""
    def __init__(self, seconds, device):
        self.seconds = seconds               # {part: seconds}, filled in place
        self.on_gpu = device.startswith("cuda")
        self.last = self.now()

    def now(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, part):
        """Count the time since the last lap for `part`."""
        now = self.now()
        self.seconds[part] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def part(self, name):
        """Count what happens inside for the part `name`, and what came before for training."""
        self.lap("train")
        yield
        self.lap(name)


# -- what the loop calls: modules

def make_optimizer(model, config):
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = matrices[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def wrap(setup, model, objective_of=distill.Objective):
    """The module of a training step around the model as it is now: compiled and made parallel as
    the settings say."""
    objective = objective_of(model, setup.config.kd_weight, setup.config.kd_temperature)
    if setup.config.recompute:
        for block in model.blocks:
            block.recompute = True
    if setup.mesh is not None:
        if setup.config.compile:
            compile_blocks(model)
        return objective
    if setup.config.compile:
        objective = torch.compile(objective, dynamic=False)
    if setup.world > 1:
        # Gradients are views of DDP's buckets: no second copy of them.
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    return objective


def exchange_gradients(setup, objective, is_last):
    """What is exchanged only behind the last micro-batch of a step: all gradients in DDP; in HSDP the
    sums over machines. Among the processes that share a model, each micro-batch's gradients are added
    up at once, as none of them has room for whole ones."""
    if setup.mesh is not None:
        objective.model.set_requires_all_reduce(is_last)
    elif setup.world > 1:
        objective.require_backward_grad_sync = is_last


def compile_blocks(model):
    """Compile each block of a sharded model by itself: the compiler cannot see into the gathering of
    weights between them. Blocks of one shape share the code."""
    shapes = len(set(zip(model.config.n_head, model.config.n_kv_head, model.config.d_ff)))
    torch._dynamo.config.cache_size_limit = max(8, shapes)
    for block in model.blocks:
        block.compiled = torch.compile(block.apply_parts, dynamic=False)


def teacher_reader(setup, teacher):
    """The function from token ids (B, T), step and micro-step to what the loss takes of the teacher:
    its hidden states (B, T, C') and projection (V, C'), or a TopK from a cache."""
    if teacher is None:
        return None

    def read_cache(x, step, micro):
        top = teacher.read(setup.first_sample(step, micro), len(x))
        return None, None, top.map(lambda values: values.to(setup.device))

    @torch.no_grad()
    def read_model(x, step, micro):
        return hidden(x), teacher.head_weight

    if isinstance(teacher, top_k.CachedTeacher):
        return read_cache
    is_compiled = setup.config.compile and setup.mesh is None
    hidden = torch.compile(teacher.hidden, dynamic=False) if is_compiled else teacher.hidden
    return read_model


def open_teacher(setup, state, path):
    """Load the teacher into the state. On a GPU with bfloat16 its matrices are stored in bfloat16:
    autocast would cast them to the same values in every step, as it caches casts only for
    parameters that need gradients."""
    if top_k.is_cache(path):
        state.teacher = open_cache(setup, state, path)
        return
    if setup.mesh is not None:
        setup.folder.open_teacher(path, state, functools.partial(setup.build, halve=True))
        return
    setup.folder.open_teacher(path, state)
    if setup.config.dtype == "bfloat16" and setup.device.startswith("cuda"):
        distill.halve_matrices(state.teacher)


def open_cache(setup, state, path):
    """The CachedTeacher at `path`. Raises UserError if it does not hold the samples of this run, or
    has changed since the run began."""
    config = setup.config
    if config.kd_temperature != 1:
        raise UserError(f"--kd-temperature {config.kd_temperature} needs the teacher itself, and {path} holds its "
                        "likeliest tokens at temperature 1; leave the flag out, or give the model as --teacher")
    teacher = top_k.CachedTeacher(path)
    if teacher.index["vocab_size"] > setup.start.vocab_size:
        raise UserError(f"{path} holds probabilities of {teacher.index['vocab_size']:,} tokens, and the model has "
                        f"{setup.start.vocab_size:,}; write them with a teacher of the model's tokenizer")
    if config.reference:
        raise UserError(f"{path} holds a teacher's answers to windows in a fixed order, and --reference changes which "
                        "come next; give the teacher itself, or leave --reference out")
    top_k.refuse_another(path, teacher.index, {"tokenizer": config.tokenizer, "fingerprint": setup.corpus.fingerprint,
                                               "block_size": setup.block_size, "seed": config.seed})
    teacher.refuse_fewer(config.steps * config.batch_tokens // setup.block_size)
    setup.folder.remember_teacher(state, {"file": str(path), "sha256": teacher.fingerprint()})
    return teacher


def capture_teacher(setup, state):
    """Write the model to teacher.pt and load it as the frozen teacher, so that a resumed run and
    every process have the same one."""
    path = setup.folder.save_teacher(state.model, state.step)
    if setup.world > 1:
        dist.barrier(setup.waiting)          # until the first process has written it
    open_teacher(setup, state, path)
    setup.log("teacher", state.step, **state.teacher_file)


def agree(setup, means, norm):
    """The numbers of a step, (6,) on the device: its four losses as means over all processes, the
    share of processes that have received a signal, and the gradient's norm, which is the same in
    all processes. If one has received a signal, all stop."""
    means = torch.cat((means, means.new_full((1,), bool(setup.signals))))
    if setup.world > 1:
        dist.all_reduce(means)
        means /= setup.world
    return torch.cat((means, norm[None]))


# -- what the loop calls: the numbers of a step

class UnreadStep:
    """A step that was queued, and its numbers (see `agree`) on their way to main memory."""
    def __init__(self, number, stage_name, lr, had_teacher, numbers):
        self.number = number                 # 0 is the first step of a run
        self.stage_name = stage_name
        self.lr = lr
        self.had_teacher = had_teacher
        # The copy is queued behind this step. Queued at reading, it would wait for the next step.
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self.arrival = None
        if numbers.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(numbers.device))

    def read(self):
        """Wait for the step: -> its four losses, the gradient's norm, whether a process has
        received a signal."""
        if self.arrival:
            self.arrival.synchronize()
        *losses, signalled, norm = self.numbers.tolist()
        return losses, norm, signalled > 0


def read_steps(setup, state, unread, clock, progress, everything):
    """Take the steps from the list `unread`, the oldest first, and read them: refuse, judge the
    teacher, record. Returns whether a process has received a signal.

    On a GPU the newest step stays in the list, so that what follows from its numbers happens one
    step late. With `everything`, when a record is due and after a signal no step stays."""
    stay = STAY_UNREAD[setup.device.split(":")[0]]
    if everything or state.step % LOG_EVERY == 0:
        stay = 0
    interrupted = False
    while len(unread) > stay:
        step = unread.pop(0)
        losses, norm, signalled = step.read()
        refuse_non_finite(setup, step, losses, norm)
        if step.had_teacher and not state.dropped:
            judge_teacher(setup, state, step, losses)
        log_step(setup, state, step, losses, norm, clock, progress)
        if signalled:
            interrupted = True
            stay = 0
    return interrupted


def refuse_non_finite(setup, step, losses, norm):
    """Raise NotFinite if the loss or the gradient's norm is not finite. The step was not applied,
    see `skip_if_not_finite`."""
    if all(map(math.isfinite, (*losses, norm))):
        return
    newest = setup.folder and checkpoint.newest(setup.folder.path)
    raise NotFinite(f"step {step.number}: loss {losses[0]:.4g}, gradient norm {norm:.4g}: not applied; lower --lr, now "
                    f"{step.lr:.2g}, or check the data; last checkpoint: {newest}")


def judge_teacher(setup, state, step, losses):
    """Drop the teacher for good once the student's smoothed loss on the same batches is as low as
    the teacher's, after at least 50 steps with it (distill.overtaken)."""
    _, student_ce, _, teacher_ce = losses
    before = state.judged
    state.judged = {"student": distill.smooth(before["student"], student_ce),
                    "teacher": distill.smooth(before["teacher"], teacher_ce), "steps": before["steps"] + 1}
    if setup.config.drop_teacher and distill.overtaken(**state.judged):
        setup.log("teacher", step.number, dropped=True, student_ce=state.judged["student"],
                  teacher_ce=state.judged["teacher"])
        state.teacher = None
        state.dropped = True


def log_step(setup, state, step, losses, norm, clock, progress):
    """Add a step to the window; every LOG_EVERY steps record the window's means and begin
    another."""
    added = dict(zip(("loss", "ce", "kl", "teacher_ce"), losses))
    added |= {"grad_norm": norm, "steps": 1, "taught": step.had_teacher}
    window = state.window | {key: state.window.get(key, 0) + value for key, value in added.items()}
    state.window = window
    steps_done = step.number + 1
    if steps_done % LOG_EVERY == 0:
        clock.lap("train")
        seconds = state.seconds["train"] - window.get("seconds_before", 0.0)
        state.window = {"seconds_before": state.seconds["train"]}
        record = {key: window[key] / window["steps"] for key in ("loss", "ce", "grad_norm")}
        # Steps without a teacher have no KL: these two are means over the others.
        for key in ("kl", "teacher_ce"):
            record[key] = window[key] / window["taught"] if window["taught"] else None
        record |= {"lr": step.lr, "stage": step.stage_name, "params": live_config(state).num_params()["total"],
                   "tokens_per_second": window["steps"] * setup.config.batch_tokens / seconds,
                   "flops_executed": state.flops["executed"], "flops_credited": state.flops["credited"]}
        setup.log("step", steps_done, **record)
        if progress is not None:
            progress.set_postfix_str(
                f"{step.stage_name} loss {record['ce']:.3f} lr {step.lr:.1e} {record['params'] / 1e6:.2f}M params "
                f"{rate_text(record['tokens_per_second'])}", refresh=False)
    if progress is not None:
        progress.update()


def rate_text(tokens_per_second):
    """A speed, as in "412 tok/s" or "12.3k tok/s"."""
    if tokens_per_second < 1000:
        return f"{tokens_per_second:.0f} tok/s"
    return f"{tokens_per_second / 1e3:.1f}k tok/s"


# -- what the loop calls: a cut

def calibration_score(config):
    """The name of the score that a cut measures on calibration text; None where it is the moving
    average of the training steps' |w · g| (IDEA Prune). Adapt-Pruner's is taylor."""
    if config.score is None and schedule.interleaved(config.plan):
        return "taylor"
    return config.score


def calibration_needs(config):
    """The statistics that a cut asks of score.collect. If there are none, no calibration text is
    run."""
    needs = set()
    if schedule.interleaved(config.plan):
        needs.add("cosine")                  # the importance of layers
    if calibration_score(config):
        needs |= score.SCORES[calibration_score(config)].needs
    return needs


def score_units(setup, state):
    """What each unit is worth, {(layer, kind): (units,)}, and in plan adapt the importance of each
    layer, else None."""
    if setup.scores_while_training:
        return score.ranking(state.averages, setup.config.uncertainty), None

    # One process measures for all, unless all share the model.
    measured = None
    with setup.autocast():
        if setup.rank == 0 or setup.mesh is not None:
            measured = calibrate(setup, state)
    count_calibration(setup, state)
    return from_first_process(setup, measured)


def from_first_process(setup, value):
    """Send the first process's value to all, as theirs could differ by a rounding error."""
    if setup.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=setup.waiting)
    return values[0]


def calibrate(setup, state):
    """Run the calibration text through the model as it is: -> scores, importance."""
    config = setup.config
    needs = calibration_needs(config)
    stats = score.Stats()
    if needs:
        stats = score.collect(state.model, setup.calibration_batches(state.step), needs)
    # The score "random" draws anew at each cut: another number for each pair (seed, step).
    stats.seed = (config.seed * (config.steps + 1) + state.step) % 2**63
    scores = score.SCORES[calibration_score(config)].function(state.model, stats)
    importance = score.importance(stats, state.model.config.n_layer) if setup.timeline.interleaved else None
    return {key: worth.cpu() for key, worth in scores.items()}, importance


def widths_at(setup, state, size, scores, importance):
    """How many units each layer keeps when at most `size` of the removable parameters stays. In
    plan adapt a layer loses the more units the less it changes the residual stream; otherwise every
    layer is on the straight way to the target."""
    if setup.timeline.interleaved:
        budget = math.floor(size * setup.start.removable_params() + 1e-6)     # as in allocate.widths_on_the_way
        return allocate.widths_for(state.model.config, budget, "adaptive", scores, importance=importance,
                                   original=setup.start.widths())
    live = {key: len(indices) for key, indices in state.alive.items()}
    return allocate.widths_on_the_way(setup.start, setup.target, size, live)


# -- what the loop calls: accounts and records

def live_config(state):
    """The model's config with live units only."""
    return state.model.config.resized({key: len(indices) for key, indices in state.alive.items()})


def shape_record(state):
    live = live_config(state)
    return {"params": live.num_params()["total"], "n_kv_head": live.n_kv_head, "d_ff": live.d_ff}


def count_flops(setup, state, teacher, scored):
    """Add the FLOPs of a step: executed (the model as it is, its teacher, scoring) and credited
    (live units). A teacher that was cached costs none."""
    tokens = setup.config.batch_tokens
    options = dict(recompute=True) if setup.config.recompute else {}
    per_token = state.model.config.flops_per_token(setup.block_size, **options)
    if isinstance(teacher, models.GPT):
        per_token += teacher.config.flops_per_token(setup.block_size, backward=False)
    state.flops["executed"] += tokens * per_token
    if scored:
        # A multiplication, an absolute value and an addition for each weight.
        state.flops["executed"] += 3 * state.model.config.removable_params()
    state.flops["credited"] += tokens * live_config(state).flops_per_token(setup.block_size)


def count_calibration(setup, state):
    """Add the FLOPs of a calibration pass, if the cut needed one."""
    needs = calibration_needs(setup.config)
    if not needs:
        return
    backward = bool({"grad", "grad_sq", "sensitivity"} & needs)
    tokens = setup.config.calibration_windows * setup.block_size
    state.flops["executed"] += tokens * state.model.config.flops_per_token(setup.block_size, backward)


def log_eval(setup, state, tag, **about):
    """Record the loss of the hold-out. In a mixture the sources share the windows, and the loss is the
    mean of theirs, weighted as their training text is."""
    if setup.folder is None:
        return
    corpus = setup.corpus
    windows = max(1, setup.config.eval_windows // len(corpus.domains))
    val_losses = {}
    bits_per_byte = 0.0
    for name, tokens in corpus.domains.items():
        with setup.measuring():
            measured = evaluate(state.model, tokens, setup.byte_lengths, windows, batch=setup.config.micro_batch,
                                rank=setup.rank, world=setup.world, block_size=setup.block_size)
        val_losses[name] = measured["loss"]
        bits_per_byte += corpus.shares[name] * measured["bits_per_byte"]
    val_loss = sum(corpus.shares[name] * loss for name, loss in val_losses.items())
    if len(val_losses) > 1:
        about["val_losses"] = val_losses
    if setup.config.reference and tag == "eval":
        state.balance = from_first_process(setup, weighed_anew(setup, state, list(val_losses.values())))
        about["weights"] = dict(zip(val_losses, state.balance["weights"]))
    setup.log(tag, state.step, val_loss=val_loss, bits_per_byte=bits_per_byte, **shape_record(state),
              flops_executed=state.flops["executed"], **about)


def weighed_anew(setup, state, losses):
    """State.balance after an evaluation: the losses of the texts, in nats per token, decide how often each
    comes until the next one. A step that a resumed run evaluates again changes nothing."""
    balance = state.balance
    if balance is None:
        reference = losses if setup.config.reference == "auto" else read_reference(setup)
        shares = list(setup.corpus.shares.values())
        return {"weights": shares, "reference": reference, "drawn": [0.0] * len(shares), "step": state.step}
    if state.step == balance["step"]:
        return balance
    weights = dynamic_batches.reweigh(balance["weights"], losses, balance["reference"]).tolist()
    drawn = drawn_until(setup, balance, state.step)
    return {**balance, "weights": weights, "drawn": drawn, "step": state.step}


def drawn_until(setup, balance, step):
    """How many windows of each text have been drawn before this step, in expectation."""
    windows = (step - balance["step"]) * setup.config.batch_tokens / setup.block_size
    return [before + weight * windows for before, weight in zip(balance["drawn"], balance["weights"])]


def read_reference(setup):
    """The losses in the file of --reference, in the order of the texts. Raises UserError if it is not
    about these texts."""
    file = Path(setup.config.reference)
    names = list(setup.corpus.domains)
    try:
        losses = json.loads(file.read_text())
        numbers = [float(losses[name]) for name in names]
    except (ValueError, TypeError, LookupError) as problem:
        raise UserError(f"{file} must hold nats per token of {', '.join(names)}, as {{\"{names[0]}\": 2.1, …}} "
                        f"({type(problem).__name__}: {problem}); give such a file, or --reference auto") from None
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{file} holds losses that are not finite; give finite ones, or --reference auto")
    return numbers


def log_sample(setup, state, when):
    """Record how the model continues the hold-out's first half window."""
    if setup.folder is None or (setup.rank > 0 and setup.mesh is None):
        return
    tokenizer = setup.corpus.tokenizer
    prompt = data.without_marks(setup.corpus.val[:setup.block_size // 2])
    with setup.measuring():
        [text] = sample(state.model, tokenizer, [prompt], SAMPLE_TOKENS, seed=setup.config.seed)
    setup.log("sample", state.step, when=when, prompt=tokenizer.decode(prompt), text=text)


def save(setup, state):
    if setup.folder:
        setup.folder.save(state, sparse.pack(state.masks))


# -- from a command line to a run

def resolve(config, device):
    """Fill the defaults that depend on the machine or on other settings. Raises UserError for
    values that no later check would name."""
    check_choices(config)
    on_gpu = device.startswith("cuda")
    interleaved = schedule.interleaved(config.plan)
    # With --init the batch depends on the model's context: see `fit_to`.
    usual = USUAL_WITH_INIT if config.init else USUAL
    filled = {name: value for name, value in usual.items() if getattr(config, name) is None}
    if config.eval_every is not None and config.eval_growth is None:
        filled["eval_growth"] = 1.0
    if config.lr is None:
        filled["lr"] = peak_lr(config)
    if config.min_lr is None:
        filled["min_lr"] = filled.get("lr", config.lr) / 10
    if config.shape is None:
        filled["shape"] = "wsd" if interleaved else "cosine"
    if config.enlarge_share is None and interleaved and config.init:
        filled["enlarge_share"] = 0.0        # a pretrained model is the enlarged one
    if config.compile is None:
        filled["compile"] = on_gpu
    config = dataclasses.replace(config, **filled, data=data.recorded(config.data))
    check_ranges(config)
    return config


def peak_lr(config):
    """The peak learning rate where none is given."""
    if not config.init:
        return LEARNING_RATES[config.preset]
    return RECOVER_LR if config.plan == "recover" else INIT_LR


def fit_to(config, context):
    """The settings with the context and the batch for a given model, whose own context has so many
    tokens. What is left open is chosen so that a step is a whole number of micro-batches."""
    if config.block_size is None and context > INIT_BLOCK_SIZE:
        config = dataclasses.replace(config, block_size=INIT_BLOCK_SIZE)
    block_size = config.block_size or context
    batch_tokens = config.batch_tokens or USUAL["batch_tokens"]
    micro_batch = config.micro_batch
    if micro_batch is None:
        micro_batch = USUAL["micro_batch"]
        while micro_batch > 1 and micro_batch * block_size > INIT_MICRO_TOKENS:
            micro_batch //= 2
        while config.batch_tokens and batch_tokens // block_size % micro_batch:
            micro_batch //= 2
    if config.batch_tokens is None:
        micro_tokens = micro_batch * block_size
        batch_tokens = max(1, round(batch_tokens / micro_tokens)) * micro_tokens
    return dataclasses.replace(config, micro_batch=micro_batch, batch_tokens=batch_tokens)


def dtype_for(config, model_config, device):
    """The run's --dtype: as it is given, or the faster one for this model on this device."""
    if config.dtype != "auto":
        return config.dtype
    wide_enough = device.startswith("cuda") or model_config.d_model >= BFLOAT16_WIDTH
    return "bfloat16" if wide_enough and has_fast_bfloat16(device) else "float32"


def autocast(config, device):
    """What training and its measurements run under: with --dtype bfloat16 products are in bfloat16."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=config.dtype == "bfloat16")


def check_ranges(config):
    """Raise UserError for numbers that mean nothing."""
    positive = ("steps", "batch_tokens", "micro_batch", "lr", "clip", "cuts", "score_every", "score_window",
                "calibration_windows", "kd_temperature", "eval_every", "eval_windows", "save_every")
    check_positive(config, positive)
    # AdamW multiplies by 1 - lr · weight_decay, which must not be negative.
    largest = {"seed": 2**63 - 1, "kd_weight": 1, "warmup_share": 1, "min_lr": config.lr, "weight_decay": 1 / config.lr}
    for name, limit in largest.items():
        if not 0 <= getattr(config, name) <= limit:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be between 0 and {limit:g}")
    if config.sparse is not None and not 0 < config.sparse < 1:
        raise UserError(f"--sparse {config.sparse} must be between 0 and 1")
    if config.sparse is not None and schedule.prunes(config.plan):
        raise UserError(f"--sparse {config.sparse} holds single weights at zero, and plan {config.plan!r} cuts units; "
                        "give --plan scratch")
    if not 1 <= config.eval_growth < math.inf:
        raise UserError(f"--eval-growth {config.eval_growth} must be a factor of at least 1")


def refuse_idle_flags(config):
    """Raise UserError for a flag that the plan has no use for: it would be believed to have had an
    effect."""
    stages = schedule.PLANS[config.plan]
    prunes = schedule.prunes(config.plan)
    has_teacher = any(stage.kd for stage in stages)
    where = f"in plan {config.plan!r}"
    if config.init and config.preset != Train.preset:
        raise UserError(f"--preset {config.preset} has no effect with --init {config.init}; leave one of them out")
    if not has_teacher:
        refuse_idle(config, ("teacher", "kd_weight", "kd_temperature", "drop_teacher"), where)
    if not any(stage.restart for stage in stages):
        refuse_idle(config, ("rewarm",), where)
    if not schedule.interleaved(config.plan):
        refuse_idle(config, ("forget_moments",), where)
    if not prunes:
        refuse_idle(config, ("enlarge_ff", "enlarge_kv", "score", "cuts"), where)
    elif "oneshot" in (config.size_curve or stages[1].size_curve):
        refuse_idle(config, ("cuts",), f"{where} with one cut")

    # Moving averages of the score and measuring at the cuts exclude each other.
    scored = f"{where} with --score {config.score}" if config.score else where
    if calibration_score(config) or not prunes:
        refuse_idle(config, ("score_every", "score_window", "uncertainty"), scored)
    if not calibration_needs(config):
        refuse_idle(config, ("calibration_windows",), scored)


def refuse_missing(config):
    """Raise UserError if the plan, or a flag, needs a model or a text that is not given."""
    if len(data.weights_of(config.data)) < 2:
        refuse_idle(config, ("reference",), "with one text")
    if not config.init:
        refuse_idle(config, ("dense",), "without --init")
    if config.plan == "recover" and not (config.init and config.teacher):
        raise UserError("plan 'recover' trains a cut model back and needs both --init CUT and --teacher MODEL, what it "
                        "was cut from; plan 'kd' teaches a new model")
    if config.plan == "kd" and not config.teacher:
        raise UserError("plan 'kd' needs --teacher CHECKPOINT, a trained model with the same tokenizer")


def open_init(config):
    """The run's Tokenizer, the GPTConfig of --init, what its file says of the cut or growth that made it,
    and its origin (the last three None without --init). Raises UserError if model and tokenizer, or a
    sparse model and the plan, do not fit each other."""
    if not config.init:
        return open_tokenizer(config.tokenizer or "bytes"), None, None, None
    model, about = checkpoint.load(config.init, "meta")
    models.with_context(model.config, config.block_size, config.init)      # refuses longer windows than its context
    check_sparse_init(config, bool(about.get("masks")))
    if config.tokenizer:
        tokenizer = open_tokenizer(config.tokenizer)
        tokenizer.refuse_fewer_rows(model.config.vocab_size, config.init)
    else:
        tokenizer = checkpoint.tokenizer_of(model, about, config.init)
    made_by = ("cut_from", "recipe", "grown_from", "growth")
    cut = {key: value for key, value in about.get("run", {}).items() if key in made_by}
    return tokenizer, model.config, cut or None, hand_on(about)


def check_sparse_init(config, has_masks):
    """Raise UserError if the plan, --sparse or --dense does not fit an --init with or without masks."""
    if has_masks and not config.dense and schedule.prunes(config.plan):
        raise UserError(f"{config.init} is a sparse model, whose units cannot be cut while it trains, and plan "
                        f"{config.plan!r} prunes; give --plan scratch, or --dense to let its zeros learn")
    if has_masks and config.sparse is not None:
        raise UserError(f"{config.init} is sparse already, and --sparse would choose other zeros; leave it out")
    if config.dense and not has_masks:
        raise UserError(f"--dense has no effect, as {config.init} holds no zeros; leave it out")


def plan_run(config, vocab_size, given=None):
    """The GPTConfigs that the run starts and ends with, and its Timeline: -> start, target,
    timeline. `given` is the config of --init. Raises UserError if the plan and the sizes do not fit
    each other."""
    if given:
        enlarged = given
        target = models.shrunk(given, config.enlarge_ff, config.enlarge_kv)
    else:
        target, enlarged = models.preset(config.preset, vocab_size, config.enlarge_ff, config.enlarge_kv)
        if config.block_size is not None:
            target = dataclasses.replace(target, block_size=config.block_size)
            enlarged = dataclasses.replace(enlarged, block_size=config.block_size)
    prunes = schedule.prunes(config.plan)
    if prunes and enlarged == target:
        raise UserError(f"plan {config.plan!r} prunes, but the enlarged model is the target; give --enlarge-ff above 1")
    start = enlarged if prunes or given else target
    target = target if prunes else start

    def flops_at_size(size):
        widths = allocate.widths_on_the_way(start, target, size, start.widths())
        return start.resized(widths).flops_per_token(config.block_size or target.block_size)

    try:
        timeline = schedule.resolve(
            config.plan, config.steps, target.removable_params() / start.removable_params(), cuts=config.cuts,
            enlarge_share=config.enlarge_share, prune_share=config.prune_share, size_curve=config.size_curve,
            slice_at=config.slice_at, flops_at_size=flops_at_size)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if config.uncertainty:
        check_uncertainty(config, timeline)
    if config.stage not in ("all", *(stage.name for stage, _, _ in timeline.stages)):
        raise UserError(f"plan {config.plan!r} has no stage {config.stage!r}; leave --stage out")
    return start, target, timeline


def check_uncertainty(config, timeline):
    """Raise UserError if there is only one score before the first cut: it has no variation, and all
    units would rank alike."""
    first_cut, _ = timeline.events[0]
    scores = sum(schedule.score_at(step, timeline, config.score_every, config.score_window)
                 for step in range(first_cut))
    if scores < 2:
        raise UserError(f"--uncertainty needs two scores before the first cut, at step {first_cut}, and there are "
                        f"{scores}; give a smaller --score-every or a larger --score-window")


def join_processes(device):
    """Join the processes that torchrun started: -> rank, world, this process's device, and the
    group for long waits.

    Gradients are exchanged within minutes or not at all. For one process's work on data or scores
    the others may have to wait for hours; that is what the second group, with a limit of a day, is
    for."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device)
    if world == 1:
        return rank, world, device, None
    if ":" in device:
        raise UserError(f"--device {device} puts all {world} processes on one GPU; give --device cuda")
    if device == "cuda":
        # Launchers other than torchrun may not say which process of its machine this is.
        local_rank = int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count()))
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    return rank, world, device, dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def share_model(config, device, world):
    """The mesh of the processes that share the model, None with --shard none. Raises UserError if they
    cannot."""
    if config.shard == "none":
        return None
    if world == 1:
        raise UserError(f"--shard {config.shard} shares a model among processes, and this is the only one; start "
                        "several with torchrun --nproc-per-node N train.py, or leave --shard out")
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if config.shard == "hsdp" and (local_world == world or world % local_world):
        raise UserError(f"--shard hsdp holds a copy of the model on each machine, and {local_world} of {world} "
                        "processes are on this one; start equally many on several machines, or give --shard fsdp")
    return shard.make_mesh(config.shard, device, world, local_world)


def check_batch(config, block_size, world):
    """Raise UserError if the batch is not a whole number of micro-batches."""
    micro_tokens = config.micro_batch * block_size * world
    if config.batch_tokens % micro_tokens:
        nearest = max(1, round(config.batch_tokens / micro_tokens)) * micro_tokens
        raise UserError(f"--batch-tokens {config.batch_tokens} is not a multiple of {config.micro_batch} sequences x "
                        f"{block_size} tokens x {world} processes = {micro_tokens}; try {nearest}, or a smaller "
                        "--micro-batch or --block-size")


def load_corpus(config, tokenizer, block_size, rank, waiting):
    """The corpus. The first process prepares it for all."""
    if rank > 0:
        dist.barrier(waiting)
    corpus = data.load_mixture(config.data, tokenizer, block_size=block_size)
    if rank == 0 and waiting is not None:
        dist.barrier(waiting)
    return corpus


def refuse_disagreement(setup, state):
    """Raise UserError if the processes of a run did not resume alike: their folders are not one."""
    mine = (state.step, pt.digest_of({"alive": checkpoint.listed(state.alive)}))
    all_processes = [None] * setup.world
    dist.all_gather_object(all_processes, mine, group=setup.waiting)
    if len(set(all_processes)) > 1:
        steps = sorted({step for step, _ in all_processes})
        raise UserError(f"the {setup.world} processes resume at steps {', '.join(map(str, steps))} and do not hold the "
                        f"same units; put {setup.folder.path} on a file system that all of them share")


def size_name(config):
    """What the run's size is called."""
    return Path(config.init).name if config.init else config.preset


def run_path(config):
    """The folder of the run."""
    return Path(config.out or f"runs/{config.plan}-{size_name(config)}-{config.seed}")


def prepare(config):
    """Everything that a run needs: -> setup, state. Raises UserError before anything is written."""
    rank, world, device, waiting = join_processes(config.device)
    config = resolve(config, device)
    refuse_idle_flags(config)
    refuse_missing(config)
    tokenizer, given, cut_before, origin = open_init(config)
    if given:
        config = fit_to(config, given.block_size)
    start, target, timeline = plan_run(config, tokenizer.vocab_size, given)
    config = dataclasses.replace(config, tokenizer=tokenizer.name, cuts=len(timeline.events),
                                 dtype=dtype_for(config, start, device))
    if device.startswith("cuda") and config.dtype == "bfloat16":
        # Outside of autocast, in evaluations, samples and cuts, float32 products are rounded to
        # TF32: 10 bits of mantissa to bfloat16's 7. With --dtype float32 they are not.
        torch.set_float32_matmul_precision("high")
    window = config.block_size or target.block_size
    check_batch(config, window, world)
    mesh = share_model(config, device, world)
    corpus = load_corpus(config, tokenizer, window, rank, waiting)

    identity = checkpoint.identity_of(config, corpus.fingerprint)
    if given:
        # The path of --init may come to hold another model.
        identity["start"] = json.loads(json.dumps(asdict(start)))
    defaults = {setting.name: setting.default for setting in dataclasses.fields(config)} | USUAL
    folder = checkpoint.RunFolder(run_path(config), identity, defaults, config.batch_tokens, tokenizer.files,
                                  writes=rank == 0, origin=origin, waiting=waiting)
    setup = Setup(config, timeline, start, target, corpus, corpus.tokenizer.byte_lengths(), device, rank, world, folder,
                  cut_before, waiting, mesh=mesh)
    if calibration_needs(config):
        setup.calibration_batches(0)         # too little text is an error now, not at the first cut

    state = folder.resume(device, lambda model: make_optimizer(model, config), setup.build if mesh else None)
    if state is None:
        state = fresh_state(setup)
    else:
        state.masks = masks_of(state.model, state.masks)
    if world > 1:
        refuse_disagreement(setup, state)
    if (config.teacher or state.teacher_file) and not state.dropped:
        open_teacher(setup, state, config.teacher or folder.teacher)
    return setup, state


def fresh_state(setup):
    """The State at step 0."""
    config = setup.config
    dtype = torch.float64 if config.dtype == "float64" else torch.float32      # bfloat16 is autocast's
    torch.manual_seed(config.seed)
    about = {}
    if setup.mesh is not None:
        model, about = fresh_shards(setup)
    elif config.init:
        model, about = checkpoint.load(config.init, setup.device, dtype)
    else:
        model = models.GPT(setup.start).to(setup.device, dtype)
    masks = {} if config.dense else masks_of(model, about.get("masks"))
    if config.sparse is not None:
        masks = sparse.random_masks(model, config.sparse, config.seed)
        sparse.hold_(model, None, masks)
    return State(model, make_optimizer(model, config), prune.everything(setup.start), masks=masks)


def fresh_shards(setup):
    """The sharded model at step 0, with the weights that a whole one would have, and what the file of
    --init says besides. A process holds no more than its rows and one tensor."""
    model = setup.build(setup.start)
    if setup.config.init:
        weights = checkpoint.open_weights(setup.config.init)
        rows_of = functools.partial(weights.rows, dtype=model.embed.weight.dtype)
        return shard.fill_(model, rows_of), weights.about
    drawn = models.initial_weights(setup.start)

    def rows_of(name, start, stop):
        drawn_name, weight = next(drawn)
        assert drawn_name == name
        return weight[start:stop]

    return shard.fill_(model, rows_of), {}


def masks_of(model, packed):
    """The masks of a sparse model, spread as its parameters are."""
    masks = sparse.unpack(packed, model.embed.weight.device)
    return {name: shard.spread_rows(mask, model.get_parameter(name)) for name, mask in masks.items()}


def main(config, quiet=False):
    """Run a plan, or one stage of it, from where its folder stands: -> setup, state."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    with checkpoint.locked(run_path(config)) if is_first else contextlib.nullcontext():
        return run_locked(config, quiet)


def run_locked(config, quiet):
    """`main`, with the folder held."""
    setup, state = prepare(config)
    config = setup.config
    folder = setup.folder
    stop = config.steps
    if config.stage != "all":
        stop = next(stage_stop for stage, _, stage_stop in setup.timeline.stages if stage.name == config.stage)
    if state.step >= stop and (stop < config.steps or "summary" in report.records(folder.path)):
        print(f"{folder.path} is finished up to step {state.step} of {config.steps}; records: {folder.metrics}")
        return setup, state
    if not quiet and setup.rank == 0:
        print(surroundings(setup))
    folder.rewind(state.step, target=asdict(setup.target), start=asdict(setup.start), documents=setup.corpus.documents,
                  corpus_tokens=[len(setup.corpus.train), len(setup.corpus.val)], cut=setup.cut_before)

    refresh = 0.5 if sys.stderr.isatty() else 20      # seconds
    hidden = quiet or setup.rank > 0
    try:
        # Whatever happens, a checkpoint that is being written is written to its end.
        with stop_on_signals(setup.signals), folder.background.thread, tqdm(
                total=stop, initial=state.step, disable=hidden, mininterval=refresh, file=progress_file()) as progress:
            interrupted = train(setup, state, stop, progress)
        folder.background.wait()
    except torch.OutOfMemoryError as problem:
        raise UserError(f"out of memory on {setup.device} at step {state.step}: lower --micro-batch, now "
                        f"{config.micro_batch} ({str(problem).splitlines()[0][:120]})") from None
    if state.step == config.steps and not interrupted:
        finish(setup, state, quiet)
    if setup.world > 1:
        # Without the barrier the last process would find its peers gone.
        dist.barrier()
        dist.destroy_process_group()
    if interrupted:
        if setup.rank == 0:
            print(f"stopped at step {state.step} of {config.steps}, saved in {folder.path}; the same command goes on")
        # Where another process got the signal, this one exits as for SIGTERM.
        received = setup.signals[0] if setup.signals else signal.SIGTERM
        sys.exit(128 + received)
    return setup, state


def surroundings(setup):
    """A line about what the run was given and what was chosen for it."""
    config = setup.config
    where = setup.device
    if where == "cpu":
        speed = "fast" if has_fast_bfloat16("cpu") else "slow"
        where = f"a CPU with {torch.get_num_threads()} threads and {speed} bfloat16"
    if setup.world > 1:
        parts = {"none": "", "fsdp": " that share the model", "hsdp": " that share the model machine by machine"}
        where = f"{setup.world} processes{parts[config.shard]}, this one on {where}"
    sizes = " -> ".join(f"{size.num_params()['total']:,}" for size in dict.fromkeys((setup.start, setup.target)))
    compiled = "compiled" if config.compile else "not compiled"
    return f"{setup.folder.path}: {sizes} parameters on {where}; trained in {config.dtype}, {compiled}"


def finish(setup, state, quiet):
    """Write the last sample, the summary record and the picture of a finished plan, and print the
    summary."""
    log_sample(setup, state, "recovered")
    zeros = sum(int((~shard.whole(mask)).sum()) for mask in state.masks.values())
    if setup.rank > 0:
        return
    config = setup.config
    last = report.records(setup.folder.path)["eval"][-1]
    final = {key: last[key] for key in ("val_loss", "bits_per_byte", "params", "n_kv_head", "d_ff")}
    epochs = data.epochs(setup.corpus, setup.block_size, config.steps * config.batch_tokens / setup.block_size)
    if state.balance:
        drawn = drawn_until(setup, state.balance, state.step)
        epochs = {part.name: number / data.windows(part.train, setup.block_size)
                  for part, number in zip(setup.corpus.parts, drawn)}
    if len(epochs) > 1:
        final |= {"val_losses": last["val_losses"], "epochs_of": epochs}
    if zeros:
        # What hardware that skips zeros would have done: a zero saves a multiply-add in the forward pass
        # and two in the backward pass of each token.
        tokens = config.steps * config.batch_tokens
        final |= {"zeros": zeros, "flops_if_sparse": state.flops["executed"] - 6 * zeros * tokens}
    pruning = sum(state.seconds[part] for part in ("score", "cut", "slice"))
    setup.log("summary", state.step, plan=config.plan, preset=size_name(config),
              seed=config.seed, **final, epochs=max(epochs.values()),
              flops_executed=state.flops["executed"], flops_credited=state.flops["credited"], seconds=state.seconds,
              peak_bytes=peak_memory(setup.device), pruning_share=pruning / sum(state.seconds.values()),
              device=setup.device)
    text = report.summary(setup.folder.path)
    if not quiet:
        print(printable(text))


@contextlib.contextmanager
def stop_on_signals(received):
    """Ctrl-C, SIGTERM and SIGHUP are only noted in the list `received`; the loop then finishes its
    step, saves and returns. A second signal ends the run at once."""
    handlers = {}

    def note(number, _):
        received.append(number)
        signal.signal(number, handlers[number])

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):         # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores it
                handlers[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run(main, parse(Train))

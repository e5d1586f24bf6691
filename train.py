"""Enlarge, prune, recover: the one loop, in one run, under one learning-rate schedule.

    python train.py                                   # plan "idea", laptop preset, embedded corpus
    python train.py --plan naive --seed 1             # any other row of schedule.PLANS through the same loop
    python train.py --plan adapt                      # Adapt-Pruner: cut a little, train, cut again (arXiv 2502.03460)
    python train.py --init FOLDER --enlarge-ff 1.25 --block-size 512 --micro-batch 2       # the large one is given
    torchrun --nproc-per-node 8 train.py --preset 124m --tokenizer gpt2 --data hf:HuggingFaceFW/fineweb-edu:sample-10BT

A larger model than wanted is trained, loses units while it trains (prune.py) and recovers at the target size, taught,
if the plan says so, by itself as it stood before the first cut (distill.py): IDEA Prune, arXiv 2503.05920. A run is a
folder (folder.py); the same command goes on where a killed one stopped, bit for bit on a CPU. `loop` is the method.

metrics.jsonl, one JSON object a line with `tag`, `step` (updates done before it) and `tokens` (trained on by then):
  config   the resolved settings, `target` and `start` model configs, corpus `fingerprint`, `documents` and
           `corpus_tokens` (train, hold-out), `cut`: the `recipe` and `cut_from` of an --init that prune.py wrote,
           `code`: a hash of the sources that a run goes through (folder.code; joined by + if they changed on the way)
           (adapt: of `target` only the number of removable parameters counts, the last cut ends at most there)
  step     `loss` `ce` `grad_norm`, means since the last such record, and `kl` (times temperature²) `teacher_ce`, means
           of the steps with a teacher, null without; losses in nats per token; `lr` `stage` `params` (live)
           `tokens_per_second` (of forward, backward and update) `flops_executed` `flops_credited` (so far)
  eval     `val_loss` (nats per token) `bits_per_byte` `stage` `params` `n_kv_head` `d_ff` `flops_executed`
  prune    `size` (kept fraction of removable parameters) and, right after the cut, what eval records
  slice    `params` `n_kv_head` `d_ff`; in plan adapt at every cut
  teacher  `file` `sha256` when captured; `dropped` `student_ce` `teacher_ce` when the student has overtaken it
  sample   `when` `prompt` `text`
  summary  final loss and sizes, `epochs`, FLOPs, `seconds` by part, `pruning_share` of them, `peak_bytes`, `device`
FLOPs are model.flops_per_token times tokens. `executed` counts what the hardware did: units that are dead and not yet
sliced off, the teacher's forward passes, scoring, calibration; `credited` counts live units only. Neither counts
evaluation, nor the training of a teacher that was given. The zeros of a 2:4 model (two_four.py), which a run keeps if
its --init has them, count in `params` and as executed and credited: no sparse kernels run here.
Not here: sharding of one model over several devices.
"""
import contextlib
import dataclasses
import datetime
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
import two_four
from common import UserError, parse, peak_rss, pick_device, run
from eval import evaluate, sample
from folder import Folder, State, code
from tokenizer import open_tokenizer

LOG_EVERY = 10                               # steps per "step" record, which holds means over them
INIT_LR = 2e-5                               # peak learning rate for pretrained models (Adapt-Pruner's scripts)


class NotFinite(UserError):
    """A step's loss or gradient is not a number, or infinite."""


@dataclass(frozen=True)
class Train:
    plan: str = "idea"                       # scratch, naive, oneshot, idea, idea-kd, journey, adapt, kd (schedule.py)
    stage: str = "all"                       # stop behind this stage: enlarge, prune, recover; the next call goes on
    preset: str = "laptop"                   # size of the target: toy, laptop, 10m, 124m, 1.3b …
    init: str | None = None                  # instead of a preset: start with this checkpoint, run, HF folder or hub id
    block_size: int | None = None            # tokens of context; default: the preset's, or the trained one of --init
    enlarge_ff: float = 2.6                  # the enlarged model has so many times the target's FFN neurons
    enlarge_kv: float = 1.0                  # and so many times its KV groups
    data: str = "stdlib"                     # stdlib; packages; files as text, .jsonl, .parquet; hf:NAME[:CONFIG]
    tokenizer: str | None = None             # bytes, a tiktoken encoding, a folder; default: bytes, or that of --init
    out: str | None = None                   # run folder; default runs/PLAN-PRESET-SEED, or --init's name for PRESET
    seed: int = 0                            # of the initial weights and the order of the data
    steps: int = 1500                        # optimizer steps of the whole plan
    batch_tokens: int = 4096                 # tokens per step, over all processes
    micro_batch: int = 16                    # sequences per forward pass of a process; the rest is accumulated
    lr: float | None = None                  # peak learning rate; default: the preset's, 2e-5 for --init
    min_lr: float | None = None              # at the end of a cycle; default: a tenth of the peak
    shape: str | None = None                 # of the learning rate: cosine or wsd; default: wsd in adapt, else cosine
    warmup_share: float = 0.05               # of a cycle
    rewarm: bool = True                      # warm up in plan naive's second cycle too; without: it begins at the peak
    weight_decay: float = 0.1                # of matrices (AdamW)
    clip: float = 1.0                        # gradient norm
    enlarge_share: float | None = None       # of the run; default: the plan's, 0 in adapt with --init
    prune_share: float | None = None         # of the run; default: the plan's
    law: str | None = None                   # of the sizes: cubic, linear, geometric, oneshot; default: the plan's
    cuts: int | None = None                  # events of the prune stage; default: 20, in adapt one per 5 % that go
    slice_at: int | None = None              # step at which dead units are physically cut off; default: the last cut
    score: str | None = None                 # of units: score.SCORES, measured at every cut; default: IDEA's average
    score_every: int = 5                     # steps between gradient scores
    score_window: int = 100                  # score only so many steps before a cut
    uncertainty: bool = False                # multiply the score by its variation (PLATON)
    calibration_windows: int = 64            # of the training text, measured on at every cut of adapt and of --score
    forget_moments: bool = False             # a new optimizer at every cut of adapt, as in Adapt-Pruner's scripts
    teacher: str | None = None               # a checkpoint; default: the enlarged model at the first cut
    kd_weight: float = 0.5                   # of the teacher's share in the loss
    kd_temperature: float = 1.0              # of the softmax in the teacher's share
    drop_teacher: bool = True                # for good, once the student has overtaken it
    eval_every: int = 100                    # steps
    eval_growth: float = 1.0                 # above 1: from then on whenever the steps have grown by this factor
    eval_windows: int = 256                  # windows of the hold-out (eval.py)
    save_every: int = 500                    # steps
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # float32, bfloat16 (autocast), float64; auto: bfloat16 only on a GPU
    compile: bool | None = None              # torch.compile; default: on a GPU only


def resolve(config, on_gpu):
    """Fill the defaults that depend on the machine or on other settings; refuse what no later check would name."""
    for name, allowed in (("plan", tuple(schedule.PLANS)), ("stage", ("all", "enlarge", "prune", "recover")),
                          ("preset", tuple(models.PRESETS)), ("shape", ("cosine", "wsd")),
                          ("score", tuple(score.SCORES)),
                          ("dtype", ("auto", "float32", "bfloat16", "float64"))):
        if getattr(config, name) not in (*allowed, None):             # None: the plan's own
            raise UserError(f"--{name} {getattr(config, name)!r} is not one of {', '.join(allowed)}")
    usual = INIT_LR if config.init else models.PRESETS[config.preset][-1]
    lr, adaptive = usual if config.lr is None else config.lr, schedule.adaptive(config.plan)
    given = adaptive and config.init and config.enlarge_share is None  # a pretrained model is the enlarged one
    config = dataclasses.replace(
        config, lr=lr, shape=config.shape or ("wsd" if adaptive else "cosine"),
        enlarge_share=0.0 if given else config.enlarge_share,
        min_lr=lr / 10 if config.min_lr is None else config.min_lr,
        dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
        compile=on_gpu if config.compile is None else config.compile)
    for name in ("steps", "batch_tokens", "micro_batch", "lr", "clip", "cuts", "score_every", "score_window",
                 "calibration_windows", "kd_temperature", "eval_every", "eval_windows", "save_every"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be positive")
    for name, most in (("seed", 2**63 - 1), ("kd_weight", 1), ("warmup_share", 1), ("min_lr", config.lr),
                       ("weight_decay", 1 / config.lr)):
        if not 0 <= getattr(config, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be between 0 and {most:g}")
    if not 1 <= config.eval_growth < math.inf:
        raise UserError(f"--eval-growth {config.eval_growth} must be a factor of at least 1")
    return config


def measured(config):
    """The name of the score that cuts measure on calibration text, None where it is the moving average of the training
    steps' |w · g| (IDEA Prune). Adapt-Pruner's is taylor."""
    return config.score or ("taylor" if schedule.adaptive(config.plan) else None)


def calibrates(config):
    """What cuts need of score.collect; nothing: no calibration text is run."""
    importance = {"cosine"} if schedule.adaptive(config.plan) else set()
    return importance | (score.SCORES[measured(config)][1] if measured(config) else set())


def refuse_idle_flags(config):
    """A setting that the plan has no use for is a mistake: it would be believed to have had an effect."""
    rows = schedule.PLANS[config.plan]
    prunes, taught = any(row.name == "prune" for row in rows), any(row.kd for row in rows)
    once = prunes and "oneshot" in (config.law or next(row.law for row in rows if row.name == "prune"))
    idle = [] if taught else ["teacher", "kd_weight", "kd_temperature", "drop_teacher"]
    idle += [] if prunes else ["enlarge_ff", "enlarge_kv", "score"]
    idle += [] if any(row.restart for row in rows) else ["rewarm"]
    idle += ["cuts"] if once or not prunes else []
    idle += ["score_every", "score_window", "uncertainty"] if measured(config) or not prunes else []
    idle += [] if calibrates(config) else ["calibration_windows"]
    idle += [] if schedule.adaptive(config.plan) else ["forget_moments"]
    if config.init and config.preset != Train.preset:
        raise UserError(f"--preset {config.preset} has no effect with --init {config.init}; leave one of them out")
    for name in idle:
        if getattr(config, name) != Train.__dataclass_fields__[name].default:
            because = " with one cut" if name == "cuts" and once else \
                f" with --score {config.score}" if config.score and name.startswith(("score_", "unc", "cal")) else ""
            raise UserError(f"--{name.replace('_', '-')} has no effect in plan {config.plan!r}{because}; leave it out")
    if config.uncertainty and config.score_window <= config.score_every:
        raise UserError(f"--uncertainty needs two scores before the first cut: --score-window {config.score_window} "
                        f"must be above --score-every {config.score_every}")
    if taught and not prunes and not config.teacher:
        raise UserError(f"plan {config.plan!r} needs --teacher CHECKPOINT, a trained model with the same tokenizer")


def plan(config, vocab_size, given=None):
    """-> the target's GPTConfig, the one that the run starts with, the Timeline. `given`: the config of --init."""
    if given:
        target, enlarged = models.shrunk(given, config.enlarge_ff, config.enlarge_kv), given
    else:
        pair = models.preset(config.preset, vocab_size, config.enlarge_ff, config.enlarge_kv)
        shorter = {} if config.block_size is None else {"block_size": config.block_size}
        target, enlarged = (dataclasses.replace(c, **shorter) for c in pair)
    prunes = any(row.name == "prune" for row in schedule.PLANS[config.plan])
    if prunes and enlarged == target:
        raise UserError(f"plan {config.plan!r} prunes, but the enlarged model is the target; give --enlarge-ff above 1")
    start = enlarged if prunes or given else target
    target = target if prunes else start

    def flops_at_size(size):
        at_size = start.resized(allocate.towards(start, target, size, start.widths()))
        return at_size.flops_per_token(target.block_size)

    try:
        timeline = schedule.resolve(
            config.plan, config.steps, target.removable_params() / start.removable_params(), cuts=config.cuts,
            enlarge_share=config.enlarge_share, prune_share=config.prune_share, law=config.law,
            slice_at=config.slice_at, flops_at_size=flops_at_size)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if config.stage not in ("all", *(stage.name for stage, _, _ in timeline.stages)):
        raise UserError(f"plan {config.plan!r} has no stage {config.stage!r}; leave --stage out")
    return target, start, timeline


def open_init(config):
    """-> the run's Tokenizer, the GPTConfig of --init and what prune.py wrote of the cut that made it (None without).
    UserError: model and tokenizer do not fit, or 2:4 and the plan do not."""
    if not config.init:
        return open_tokenizer(config.tokenizer or "bytes"), None, None
    model, about = checkpoint.load(config.init, "meta", block_size=config.block_size)
    if about.get("masks") and any(row.name == "prune" for row in schedule.PLANS[config.plan]):
        raise UserError(f"{config.init} is a 2:4 model, whose units cannot be cut while it trains, and plan "
                        f"{config.plan!r} prunes; give --plan scratch")
    tokenizer = open_tokenizer(config.tokenizer) if config.tokenizer else checkpoint.tokenizer_of(about, config.init)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, {config.init} only "
                        f"{model.config.vocab_size}; leave --tokenizer out to take the model's own")
    cut = {k: v for k, v in about.get("run", {}).items() if k in ("cut_from", "recipe")}
    return tokenizer, model.config, cut or None


class Objective(nn.Module):
    """Cross-entropy | distillation | both, formed inside one forward, so that DDP and torch.compile see all of it."""
    def __init__(self, model, kd_weight, temperature):
        super().__init__()
        self.model, self.kd_weight, self.temperature = model, kd_weight, temperature

    def forward(self, x, y, teacher_hidden=None, teacher_weight=None):
        return distill.chunked_loss(self.model.hidden(x), self.model.head_weight, y, teacher_hidden, teacher_weight,
                                    self.kd_weight, self.temperature)


def make_optimizer(model, config):
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8,
                             fused=matrices[0].device.type in ("cpu", "cuda"))


class Run:
    """A plan's fixed surroundings (settings, timeline, corpus, processes, folder), its State, what the loop calls."""
    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # from torchrun
        self.device = pick_device(config.device)
        if self.device == "cuda" and self.world > 1:
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        on_gpu = self.device.startswith("cuda")
        if self.world > 1 and not dist.is_initialized():              # others wait while one prepares data or evaluates
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1))
        self.config = c = resolve(config, on_gpu)
        refuse_idle_flags(c)
        tokenizer, given, self.cut_before = open_init(c)
        self.target, self.start, self.timeline = plan(c, tokenizer.vocab_size, given)
        self.config = c = dataclasses.replace(c, tokenizer=tokenizer.name, cuts=len(self.timeline.events))
        self.T = self.target.block_size
        unit = c.micro_batch * self.T * self.world
        if c.batch_tokens % unit:
            raise UserError(f"--batch-tokens {c.batch_tokens} is not a multiple of {c.micro_batch} sequences x "
                            f"{self.T} tokens x {self.world} processes = {unit}; "
                            f"try {max(1, round(c.batch_tokens / unit)) * unit}, or a smaller --micro-batch or "
                            "--block-size")
        self.micro_steps = c.batch_tokens // unit
        if self.rank:
            dist.barrier()                                            # the first process prepares the corpus for all
        self.corpus = data.load(c.data, tokenizer, block_size=self.T)
        if self.world > 1 and not self.rank:
            dist.barrier()
        self.byte_lengths = self.corpus.tokenizer.byte_lengths()
        if calibrates(c):
            self.calibration(0)                                       # what it refuses it refuses now
        self.signal, self.interrupted = 0, False                      # received here; agreed on by all processes
        out = Path(c.out or f"runs/{c.plan}-{Path(c.init).name if c.init else c.preset}-{c.seed}")
        self.folder = Folder(out, c, self.corpus.fingerprint, tokenizer.files, writes=self.rank == 0)
        if given:                                                     # a path may come to hold another model
            self.folder.identity["start"] = json.loads(json.dumps(asdict(self.start)))
        self.state = self.folder.resume(self.device, lambda model: make_optimizer(model, c)) or self.fresh()
        if (c.teacher or self.state.teacher_file) and not self.state.dropped:
            self.folder.open_teacher(c.teacher or self.folder.path / "teacher.pt", self.state)
            self.wrap_teacher()
        self.wrap()

    def fresh(self):
        torch.manual_seed(self.config.seed)
        dtype = torch.float64 if self.config.dtype == "float64" else torch.float32      # bfloat16 is autocast's
        if self.config.init:
            model, about = checkpoint.load(self.config.init, self.device, dtype, self.config.block_size)
        else:
            model, about = models.GPT(self.start).to(self.device, dtype), {}
        return State(model, make_optimizer(model, self.config), prune.everything(self.start),
                     masks=two_four.unpack(about.get("masks")))

    def wrap(self):
        """The training step's module around the model as it is now; anew after a slice."""
        objective = Objective(self.state.model, self.config.kd_weight, self.config.kd_temperature)
        if self.config.compile:
            torch.compiler.reset()                                    # or after 8 graphs, as many sizes, it gives up
            objective = torch.compile(objective, dynamic=False)
        self.objective = DistributedDataParallel(objective) if self.world > 1 else objective

    def wrap_teacher(self):
        """The teacher as steps read it: compiled too; on a GPU its matrices are held in bfloat16 where autocast would
        cast them, the same values, anew at every use, as it remembers only casts of what takes a gradient."""
        teacher = self.state.teacher
        if self.config.dtype == "bfloat16" and self.device.startswith("cuda"):
            for module in teacher.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        if self.config.compile:
            teacher.hidden = torch.compile(teacher.hidden, dynamic=False)

    @contextlib.contextmanager
    def timed(self, part):
        """Add the seconds of a block to state.seconds[part], GPU work included."""
        sync = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        sync()
        start = time.perf_counter()
        yield
        sync()
        self.state.seconds[part] += time.perf_counter() - start

    def log(self, tag, **record):
        self.folder.log(tag, self.state.step, **record)

    def live(self):
        """The config that counts live units only."""
        return self.state.model.config.resized({key: len(i) for key, i in self.state.keep.items()})

    def shape(self):
        live = self.live()
        return {"params": live.num_params()["total"], "n_kv_head": live.n_kv_head, "d_ff": live.d_ff}

    def evaluate(self, tag, **about):
        """Record the hold-out's loss."""
        if self.rank == 0:
            with self.timed("eval"):
                found = evaluate(self.state.model, self.corpus.val, self.byte_lengths, self.config.eval_windows,
                                 batch=self.config.micro_batch)
            self.log(tag, val_loss=found["loss"], bits_per_byte=found["bits_per_byte"], **self.shape(),
                     flops_executed=self.state.flops[0], **about)

    def sample(self, when):
        """Record how the model continues the hold-out's first half window."""
        if self.rank == 0:
            prompt = self.corpus.val[:self.T // 2]
            with self.timed("eval"):
                text = sample(self.state.model, self.corpus.tokenizer, prompt, 200, seed=self.config.seed)
            self.log("sample", when=when, prompt=self.corpus.tokenizer.decode(prompt), text=text)

    def capture_teacher(self):
        """The model as it is becomes the frozen teacher, through a file."""
        with self.timed("save"):
            path = self.folder.save_teacher(self.state.model, self.state.step)
            if self.world > 1:
                dist.barrier()
            self.folder.open_teacher(path, self.state)
        self.wrap_teacher()
        self.log("teacher", **self.state.teacher_file)

    def calibrate(self):
        """Measure the model as it is -> {(layer, kind): (units,) scores}, [importance of each layer] (plan adapt, else
        None). One process does it for all, so that they cannot differ."""
        c, s, found, needs = self.config, self.state, [None], calibrates(self.config)
        with self.timed("score"), self.autocast():
            if self.rank == 0:
                stats = score.collect(s.model, self.calibration(s.step), needs) if needs else score.Stats()
                stats.seed = (c.seed * (c.steps + 1) + s.step) % 2**63                 # of the score "random"
                found_scores = score.SCORES[measured(c)][0](s.model, stats)
                found = [({key: values.cpu() for key, values in found_scores.items()},
                          score.importance(stats, s.model.config.n_layer) if self.timeline.adaptive else None)]
            if self.world > 1:
                dist.broadcast_object_list(found)
        backward = bool({"grad", "grad_sq", "sensitivity"} & needs)
        s.flops[0] += bool(needs) * c.calibration_windows * self.T * s.model.config.flops_per_token(self.T, backward)
        return found[0]

    def calibration(self, step):
        """Windows of the training text, others at every step; no training batch's seed is a pair."""
        c = self.config
        return score.batches(self.corpus.train, self.T, c.calibration_windows, c.micro_batch, (c.seed, step),
                             "--calibration-windows")

    def cut(self, size):
        """Kill the lowest-scored units, so that at most `size` of the removable parameters stays alive. In plan adapt
        those of the layers that turn the residual stream least go first (allocate.adaptive)."""
        s, c, start = self.state, self.config, self.start
        scores, importance = self.calibrate() if measured(c) else (score.ranking(s.averages, c.uncertainty), None)
        with self.timed("cut"):
            if self.timeline.adaptive:
                most = math.floor(size * start.removable_params() + 1e-6)              # as in allocate.towards
                widths = allocate.once(s.model.config, most, "adaptive", scores, importance=importance,
                                       whole=start.widths())
            else:
                widths = allocate.towards(start, self.target, size, {key: len(i) for key, i in s.keep.items()})
            s.keep = prune.choose(score.of_living(scores, s.keep), widths)
            prune.zero_(s.model, s.optimizer, s.keep)
        self.evaluate("prune", size=size)

    def slice(self):
        """Cut the dead units off: a smaller model of the same class, its optimizer, a new training step around them."""
        s = self.state
        with self.timed("slice"):
            s.model, s.optimizer = prune.slice(s.model, s.optimizer, s.keep)
            s.keep, s.averages = prune.everything(s.model.config), None
            self.wrap()
        assert self.timeline.adaptive or s.model.config == self.target, (s.model.config, self.target)
        self.log("slice", **self.shape())

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def backward(self, teacher):
        """Micro-steps: leaves the mean gradient over the global batch in .grad; -> means of (loss, cross-entropy, KL,
        teacher's cross-entropy) in nats per token, and the gradient's norm. All processes get the same numbers."""
        c, s = self.config, self.state
        sums = torch.zeros(5, device=self.device, dtype=torch.float32 if "mps" in self.device else torch.float64)
        for micro in range(self.micro_steps):
            x, y = (t.to(self.device, non_blocking=True) for t in data.batch(
                self.corpus.train, self.T, c.seed, s.step, micro, self.rank, world=self.world,
                micro_batch=c.micro_batch, micro_steps=self.micro_steps))
            waits = self.world > 1 and micro < self.micro_steps - 1        # processes exchange gradients once a step
            with self.objective.no_sync() if waits else contextlib.nullcontext():
                with self.autocast():
                    with torch.no_grad():
                        taught = (teacher.hidden(x), teacher.head_weight) if teacher else ()
                    loss, stats = self.objective(x, y, *taught)
                (loss / self.micro_steps).backward()
            sums[:4] += torch.cat((loss.detach()[None], stats)) / self.micro_steps
        sums[4] = self.signal > 0
        if self.world > 1:
            dist.all_reduce(sums)
            sums /= self.world
        *means, signalled = sums.tolist()
        self.interrupted = signalled > 0                              # any of us: all stop after this step
        return means, nn.utils.get_total_norm([p.grad for p in s.model.parameters()])

    def account(self, teacher, scored):
        """Add this step's FLOPs: executed (the model as it is, its teacher, scoring) and credited (live units)."""
        s, tokens = self.state, self.config.batch_tokens
        taught = teacher.config.flops_per_token(self.T, backward=False) if teacher else 0
        s.flops[0] += tokens * (s.model.config.flops_per_token(self.T) + taught)
        s.flops[0] += 3 * s.model.config.removable_params() * scored
        s.flops[1] += tokens * self.live().flops_per_token(self.T)

    def judge_teacher(self, ce, teacher_ce):
        """Drop the teacher for good once the student's smoothed loss on the same batches is as low."""
        s, was = self.state, self.state.judged
        s.judged = {"student": distill.smooth(was["student"], ce), "steps": was["steps"] + 1,
                    "teacher": distill.smooth(was["teacher"], teacher_ce)}
        if self.config.drop_teacher and distill.overtaken(**s.judged):
            self.log("teacher", dropped=True, student_ce=s.judged["student"], teacher_ce=s.judged["teacher"])
            s.teacher, s.dropped = None, True

    def tally(self, teacher, means, norm, seconds, lr, stage):
        """Add a step to the window; every LOG_EVERY steps record its means and begin another. -> that record or None"""
        s = self.state
        step = dict(zip(("loss", "ce", "kl", "teacher_ce"), means), grad_norm=norm, seconds=seconds, steps=1,
                    taught=teacher is not None)
        s.window = {key: s.window.get(key, 0) + value for key, value in step.items()}
        if s.step % LOG_EVERY:
            return None
        w, s.window = s.window, {}
        record = {key: w[key] / w["steps"] for key in ("loss", "ce", "grad_norm")}
        record |= {key: w[key] / w["taught"] if w["taught"] else None for key in ("kl", "teacher_ce")}
        record |= dict(lr=lr, stage=stage.name, params=self.live().num_params()["total"],
                       tokens_per_second=w["steps"] * self.config.batch_tokens / w["seconds"],
                       flops_executed=s.flops[0], flops_credited=s.flops[1])
        self.log("step", **record)
        return record

    def finish(self, quiet):
        """The summary record, table and picture of a finished plan."""
        s, c = self.state, self.config
        self.sample("recovered")
        last = report.records(self.folder.path)["eval"][-1]
        peak = torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else \
            peak_rss()
        self.log("summary", plan=c.plan, preset=Path(c.init).name if c.init else c.preset, seed=c.seed,
                 **{key: last[key] for key in ("val_loss", "bits_per_byte", "params", "n_kv_head", "d_ff")},
                 epochs=data.epochs(self.corpus.train, self.T, c.steps * c.batch_tokens / self.T),
                 flops_executed=s.flops[0], flops_credited=s.flops[1], seconds=s.seconds, peak_bytes=peak,
                 pruning_share=sum(s.seconds[part] for part in ("score", "cut", "slice")) / sum(s.seconds.values()),
                 device=self.device)
        text = report.summary(self.folder.path)
        if not quiet:
            print(text)


def main(config, quiet=False):
    """Run a plan, or one stage of it, from where its folder stands. -> the Run."""
    r = Run(config)
    s, t, c = r.state, r.timeline, r.config
    stop = c.steps if c.stage == "all" else next(b for stage, _, b in t.stages if stage.name == c.stage)
    if s.step >= stop and (stop < c.steps or "summary" in report.records(r.folder.path)):
        print(f"{r.folder.path} is finished up to step {s.step} of {c.steps}; records: {r.folder.metrics}")
        return r
    r.folder.rewind(s.step, target=asdict(r.target), start=asdict(r.start), documents=r.corpus.documents,
                    corpus_tokens=[len(r.corpus.train), len(r.corpus.val)], cut=r.cut_before, code=code())
    try:
        with stop_on_signals(r), tqdm(total=stop, initial=s.step, disable=quiet or r.rank > 0,
                                      mininterval=.5 if sys.stderr.isatty() else 20) as progress:
            loop(r, stop, progress)
    except torch.OutOfMemoryError as problem:
        raise UserError(f"out of memory on {r.device} at step {s.step}: lower --micro-batch, now {c.micro_batch} "
                        f"({str(problem).splitlines()[0][:120]})") from None
    if s.step == c.steps and r.rank == 0 and not r.interrupted:
        r.finish(quiet)
    if r.world > 1:                                                   # leave together, or the last one's peers are gone
        dist.barrier()
        dist.destroy_process_group()
    if r.interrupted:
        if r.rank == 0:
            print(f"stopped at step {s.step} of {c.steps}, saved in {r.folder.path}; the same command goes on")
        sys.exit(128 + (r.signal or signal.SIGTERM))
    return r


def loop(r, stop, progress):
    """The method: enlarge, prune, recover, step by step up to `stop`."""
    s, t, c = r.state, r.timeline, r.config
    begins = {begin for _, begin, _ in t.stages}

    while True:
        # evaluate, save: a checkpoint is the state before this step's events
        boundary = s.step in begins or s.step == stop
        if boundary or schedule.eval_at(s.step, c.eval_every, c.eval_growth):
            r.evaluate("eval", stage=schedule.stage_at(min(s.step, c.steps - 1), t).name)
        if boundary or s.step % c.save_every == 0 or r.interrupted:
            with r.timed("save"):
                r.folder.save(s)
        if s.step == stop or r.interrupted:
            return

        # events
        stage, size, size_before = schedule.stage_at(s.step, t), *(schedule.size_at(i, t) for i in (s.step, s.step - 1))
        shrinks = size < size_before
        if s.step in begins and stage.restart or shrinks and c.forget_moments:
            s.optimizer = make_optimizer(s.model, c)                  # Adam forgets
        if shrinks and size_before == 1:
            r.sample("before the first cut")
            if stage.kd and not c.teacher:
                r.capture_teacher()
        if shrinks:
            r.cut(size)                                               # zeros in place
            if s.step == t.events[-1][0]:
                r.sample("after the last cut")
        if s.step == t.slice_at or shrinks and t.adaptive:
            r.slice()                                                 # the physically smaller model

        # learning rate
        lr = schedule.lr_at(s.step, t, c.lr, c.min_lr, c.warmup_share, c.shape, rewarm=c.rewarm)
        for group in s.optimizer.param_groups:
            group["lr"] = lr

        # micro-steps: cross-entropy | distillation | both
        teacher, before = s.teacher if stage.kd else None, s.seconds["train"]
        with r.timed("train"):
            means, norm = r.backward(teacher)
        if not all(map(math.isfinite, (*means, norm))):
            raise NotFinite(f"step {s.step}: loss {means[0]:.4g}, gradient norm {norm:.4g}: not applied; lower --lr, "
                            f"now {lr:.2g}, or check the data; last checkpoint: {checkpoint.newest(r.folder.path)}")

        # score while the gradients are there, clip, update
        scored = not measured(c) and schedule.score_at(s.step, t, c.score_every, c.score_window)
        if scored:
            with r.timed("score"):
                s.averages = score.average(s.averages, score.sensitivity(s.model))
        with r.timed("train"):
            nn.utils.clip_grads_with_norm_(s.model.parameters(), c.clip, norm)
            s.optimizer.step()
            two_four.hold_(s.model, s.optimizer, s.masks)             # 2:4 zeros get gradients; no masks: nothing
            s.optimizer.zero_grad(set_to_none=True)

        # log
        r.account(teacher, scored)
        if teacher:
            r.judge_teacher(means[1], means[3])
        s.step += 1
        if record := r.tally(teacher, means, norm.item(), s.seconds["train"] - before, lr, stage):
            progress.set_postfix_str(f"{stage.name} loss {record['ce']:.3f} lr {lr:.1e} {record['params'] / 1e6:.2f}M "
                                     f"params {record['tokens_per_second'] / 1e3:.1f}k tok/s")
        progress.update()


@contextlib.contextmanager
def stop_on_signals(r):
    """Ctrl-C and SIGTERM let the step finish, save and end the run; a second one ends it at once."""
    def stop(number, _):
        r.signal = number
        signal.signal(number, before[number])

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run(lambda: main(parse(Train)))

"""Enlarge, prune, recover: the one loop, in one run, under one learning-rate schedule.

    python train.py                                   # plan "idea" on the laptop preset and the embedded corpus
    python train.py --plan naive --seed 1             # any other row of schedule.PLANS through the same loop
    torchrun --nproc-per-node 8 train.py --preset 124m --data hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer gpt2

A larger model than wanted is trained, loses units while it trains (prune.py) and recovers at the target size, optionally taught
by itself as it stood before the first cut (distill.py): IDEA Prune, arXiv 2503.05920. A run is a folder: `ckpt_*.pt` (the last
two), `teacher.pt`, `metrics.jsonl`, `run.png`. The same command goes on where a killed one stopped, bit for bit on CPU.

metrics.jsonl, one JSON object a line with `tag`, `step` (updates done) and `tokens` (trained on so far):
  config   the resolved configuration, `target` and `start` model configs, corpus `fingerprint` and `documents`
  step     `loss` `ce` `kl` `teacher_ce` (nats per token, means since the last such record) `lr` `grad_norm` `stage` `params`
           `tokens_per_second` `flops_executed` `flops_credited` (both so far)
  eval     `val_loss` (nats per token) `bits_per_byte` `stage` `params`
  prune    `size` (kept fraction of removable parameters) `params` (live) `n_kv_head` `d_ff`; `val_loss` right after the cut
  slice    `params` `n_kv_head` `d_ff`       teacher  captured (`file`, `sha256`) or `dropped`       sample   `when` `text`
  summary  final loss, sizes, epochs, FLOPs, seconds by part, peak memory
FLOPs: model.flops_per_token. `executed` counts what the hardware did (dead units not yet sliced off, teacher forwards, scoring),
`credited` the same with live units only. Neither counts evaluation. Not here: sharding of one model over several devices.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import distill
import model as models
import prune
import report
import schedule
from common import UserError, append_record, parse, pick_device, read_records, run, write_atomic
from eval import evaluate, sample

LOG_EVERY = 10                               # steps per "step" record, which holds means over them
NOT_IDENTITY = ("stage", "device", "out", "compile")
PLAIN = ("step", "teacher_file", "dropped", "smooth", "window", "flops", "seconds")      # State's plain numbers, saved as they are


@dataclass(frozen=True)
class Train:
    plan: str = "idea"                       # scratch, naive, oneshot, idea, idea-kd, journey, kd: the rows of schedule.PLANS
    stage: str = "all"                       # stop behind this stage: enlarge, prune, recover; the next call goes on
    preset: str = "laptop"                   # size of the target: toy, laptop, 10m, 124m, 1.3b
    enlarge_ff: float = 2.6                  # the enlarged model has so many times the target's FFN neurons
    enlarge_kv: float = 1.0                  # and so many times its KV groups
    data: str = "stdlib"                     # stdlib, a file, folder or glob (text, .jsonl, .parquet), or hf:NAME[:CONFIG]
    tokenizer: str = "bytes"                 # bytes, or a tiktoken encoding: gpt2, cl100k_base, ...
    out: str | None = None                   # run folder; default runs/PLAN-PRESET-SEED
    seed: int = 0                            # of the initial weights and the order of the data
    steps: int = 1500                        # optimizer steps of the whole plan
    batch_tokens: int = 4096                 # tokens per step, over all processes
    micro_batch: int = 16                    # sequences per forward pass of one process; the rest is gradient accumulation
    lr: float = 3e-3                         # peak learning rate
    min_lr: float = 3e-4                     # at the end of the cosine
    shape: str = "cosine"                    # of the learning rate: cosine or wsd
    warmup_share: float = 0.05               # of a cycle
    weight_decay: float = 0.1                # of matrices; AdamW
    clip: float = 1.0                        # gradient norm
    enlarge_share: float | None = None       # of the run; default: the plan's
    prune_share: float | None = None         # of the run; default: the plan's
    law: str | None = None                   # of the sizes: cubic, linear, geometric, oneshot; default: the plan's
    cuts: int = 20                           # events of the prune stage
    slice_at: int | None = None              # step at which dead units are cut off physically; default: the last cut
    score_every: int = 5                     # steps between gradient scores
    score_window: int = 100                  # score only so many steps before a cut
    uncertainty: bool = False                # multiply the score by its variation (PLATON)
    teacher: str | None = None               # a checkpoint; default: the enlarged model at the first cut
    kd_weight: float = 0.5                   # of the teacher's share in the loss
    kd_temperature: float = 1.0              # of the softmax in the teacher's share
    drop_teacher: bool = True                # for good, once the student has overtaken it
    eval_every: int = 100                    # steps
    eval_windows: int = 256                  # windows of the hold-out (eval.py)
    save_every: int = 500                    # steps
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # float32, bfloat16 (autocast), float64; auto: bfloat16 on a GPU, else float32
    compile: bool | None = None              # torch.compile; default: on a GPU only (on our CPUs it gains nothing)


@dataclass
class State:
    """All that a step changes, and so all that a checkpoint must hold."""
    model: models.GPT
    optimizer: torch.optim.Optimizer
    keep: dict                               # {(layer, kind): indices of live units} in the model as it is now
    step: int = 0
    averages: dict | None = None             # the score's moving averages (prune.average)
    teacher: models.GPT | None = None
    teacher_file: dict | None = None         # {"file", "sha256"}; kept after the teacher is dropped
    dropped: bool = False                    # the teacher, for good
    smooth: list = field(default_factory=lambda: [None, None])      # smoothed cross-entropy of student and teacher
    window: list = field(default_factory=lambda: [0.0] * 7)         # sums since the last "step" record, see the end of the loop
    flops: list = field(default_factory=lambda: [0.0, 0.0])         # executed, credited
    seconds: dict = field(default_factory=lambda: dict.fromkeys(("train", "score", "cut", "slice", "eval", "save"), 0.0))


class Objective(nn.Module):
    """The loss formed inside one forward, so that DDP and torch.compile see all of it."""
    def __init__(self, model, kd_weight, temperature):
        super().__init__()
        self.model, self.kd_weight, self.temperature = model, kd_weight, temperature

    def forward(self, x, y, teacher_hidden=None, teacher_weight=None):
        return distill.chunked_loss(self.model.hidden(x), self.model.head_weight, y, teacher_hidden, teacher_weight,
                                    self.kd_weight, self.temperature)


def make_optimizer(model, config):
    """AdamW; weight decay on matrices only."""
    matrices, vectors = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=matrices[0].device.type in ("cpu", "cuda"))


def check(config):
    """Refuse values that no later check would name."""
    for name, allowed in (("dtype", ("float32", "bfloat16", "float64")), ("shape", ("cosine", "wsd")), ("plan", tuple(schedule.PLANS)),
                          ("stage", ("all", "enlarge", "prune", "recover"))):
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name} {getattr(config, name)!r} is not one of {', '.join(allowed)}")
    for name in ("steps", "batch_tokens", "micro_batch", "cuts", "score_every", "score_window", "eval_every", "eval_windows",
                 "save_every", "lr", "clip", "kd_temperature"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be positive")
    if not 0 <= config.kd_weight <= 1 or not 0 <= config.min_lr <= config.lr or not 0 <= config.warmup_share <= 1:
        raise UserError(f"--kd-weight {config.kd_weight} and --warmup-share {config.warmup_share} must be within 0 and 1, --min-lr "
                        f"{config.min_lr} within 0 and --lr {config.lr}")


def plan(config, vocab_size):
    """-> the target's GPTConfig, the one the run starts with, the Timeline."""
    target, enlarged = models.preset(config.preset, vocab_size, config.enlarge_ff, config.enlarge_kv)
    rows = schedule.PLANS[config.plan]
    prunes, taught = any(row.name == "prune" for row in rows), any(row.kd for row in rows)
    if prunes and enlarged == target:
        raise UserError(f"plan {config.plan!r} prunes, but the enlarged model is the target; give --enlarge-ff above 1")
    if config.teacher and not taught:
        raise UserError(f"plan {config.plan!r} has no use for --teacher; leave it out, or try --plan idea-kd or kd")
    if taught and not prunes and not config.teacher:
        raise UserError(f"plan {config.plan!r} needs --teacher CHECKPOINT, a trained model with the same tokenizer")
    start = enlarged if prunes else target

    def flops_at_size(size):
        return start.resized(prune.allocate(start, target, size, start.widths())).flops_per_token(target.block_size)

    try:
        timeline = schedule.resolve(config.plan, config.steps, target.removable_params() / start.removable_params(),
                                    enlarge_share=config.enlarge_share, prune_share=config.prune_share, law=config.law,
                                    cuts=config.cuts, slice_at=config.slice_at, flops_at_size=flops_at_size)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    names = [stage.name for stage, _, _ in timeline.stages]
    if config.stage not in ("all", *names):
        raise UserError(f"--stage {config.stage} is not in plan {config.plan!r}, which has {', '.join(names)}")
    return target, start, timeline


def git_commit():
    """The commit this code is at, for the checkpoint's provenance; "unknown" outside of a git checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Run:
    """One run: its fixed surroundings (configuration, timeline, corpus, processes), its folder, its State. The loop is `main`."""
    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun's
        self.device = pick_device(config.device)
        if self.device == "cuda" and self.world > 1:
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.startswith("cuda") else "gloo")
        on_gpu = self.device.startswith("cuda")
        self.compile = on_gpu if config.compile is None else config.compile
        dtype = ("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype
        self.config = config = dataclasses.replace(config, dtype=dtype)
        check(config)
        if self.rank:
            dist.barrier()                                            # the first process prepares the corpus for all
        self.corpus = data.load(config.data, config.tokenizer)
        if self.world > 1 and not self.rank:
            dist.barrier()
        self.byte_lengths = self.corpus.tokenizer.byte_lengths()
        self.target, self.start, self.timeline = plan(config, self.corpus.tokenizer.vocab_size)
        self.T = self.target.block_size
        data.check(self.corpus, self.T)
        unit = config.micro_batch * self.T * self.world
        if config.batch_tokens < unit or config.batch_tokens % unit:
            raise UserError(f"--batch-tokens {config.batch_tokens} is not a multiple of {config.micro_batch} sequences x {self.T} "
                            f"tokens x {self.world} processes = {unit}; try {max(1, round(config.batch_tokens / unit)) * unit}")
        self.micro_steps = config.batch_tokens // unit
        self.out = Path(config.out or f"runs/{config.plan}-{config.preset}-{config.seed}")
        self.metrics = self.out / "metrics.jsonl"
        self.interrupted = None
        self.state = self.resume() or self.fresh()
        self.wrap()

    # -- the run's folder

    def identity(self):
        """What two calls must share to be the same run."""
        return {k: v for k, v in dataclasses.asdict(self.config).items() if k not in NOT_IDENTITY} | {
            "fingerprint": self.corpus.fingerprint}

    def check_same(self, found):
        mine = self.identity()
        differ = [f"{k} is {found.get(k)!r} there and {v!r} here" for k, v in mine.items() if found.get(k) != v]
        if differ:
            raise UserError(f"{self.out} holds a run of another configuration ({'; '.join(differ)}); give another --out or delete it")

    def fresh(self):
        if self.metrics.exists():                                     # killed before its first checkpoint, or not ours
            records = read_records(self.metrics)
            self.check_same(records[0] if records else {})
        torch.manual_seed(self.config.seed)
        model = models.GPT(self.start)
        model = (model.double() if self.config.dtype == "float64" else model).to(self.device)
        state = State(model, make_optimizer(model, self.config), prune.everything(self.start))
        if self.config.teacher:
            state.teacher = self.open_teacher(self.config.teacher, state)
        return state

    def resume(self):
        """The State in the folder's newest checkpoint, or None where there is none. Refuses another configuration."""
        if not models.newest(self.out):
            return None
        model, saved = models.load(self.out, self.device)
        self.check_same(saved["run"])
        state = State(model, make_optimizer(model, self.config), {(l, kind): i for l, kind, i in saved["keep"]})
        state.optimizer.load_state_dict(saved["optimizer"])
        state.averages = saved["averages"] and {(l, kind): v for l, kind, v in saved["averages"]}
        for name in PLAIN:
            setattr(state, name, saved[name])
        if state.teacher_file and not state.dropped:
            state.teacher = self.open_teacher(state.teacher_file["file"], state)
        return state

    def begin_records(self):
        """metrics.jsonl as it was when the checkpoint was saved: a resumed run writes what came after it again."""
        if self.rank == 0:
            step = self.state.step
            kept = [r for r in read_records(self.metrics)[1:] if r["step"] < step or r["step"] == step and r["tag"] == "step"]
            first = {"tag": "config", "step": 0, "tokens": 0, **self.identity(), "target": dataclasses.asdict(self.target),
                     "start": dataclasses.asdict(self.start), "documents": self.corpus.documents}
            write_atomic(self.metrics, lambda file: file.write("".join(json.dumps(r) + "\n" for r in [first, *kept]).encode()))

    def log(self, tag, **record):
        if self.rank == 0:
            step = self.state.step
            append_record(self.metrics, tag=tag, step=step, tokens=step * self.config.batch_tokens, **record)

    def save(self):
        """Write ckpt_<step>.pt, the state before this step's events; keep the newest two."""
        s, path = self.state, self.out / f"ckpt_{self.state.step:08d}.pt"
        if self.rank or path.exists():
            return
        with self.timed("save"):
            models.save(path, s.model, run=self.identity(), optimizer=s.optimizer.state_dict(),
                        keep=[(*key, i) for key, i in s.keep.items()],
                        averages=s.averages and [(*key, v) for key, v in s.averages.items()],
                        **{name: getattr(s, name) for name in PLAIN},
                        provenance={"torch": torch.__version__, "python": sys.version.split()[0], "commit": git_commit()})
        for old in sorted(self.out.glob("ckpt_*.pt"))[:-2]:
            old.unlink()

    def open_teacher(self, path, state):
        """Load a frozen teacher; refuse one of another tokenizer, or one that has changed since the run began."""
        teacher, saved = models.load(path, self.device)
        theirs = saved.get("run", {}).get("tokenizer")
        if teacher.config.vocab_size != self.start.vocab_size or theirs != self.config.tokenizer:
            raise UserError(f"the teacher {path} has {teacher.config.vocab_size} tokens of {theirs!r}, the student "
                            f"{self.start.vocab_size} of {self.config.tokenizer!r}; give a teacher with the same tokenizer")
        file = models.newest(path) if Path(path).is_dir() else Path(path)
        found = {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        if (state.teacher_file or found) != found:
            raise UserError(f"the teacher {file} has changed since the run began (sha256 {found['sha256'][:12]}, then "
                            f"{state.teacher_file['sha256'][:12]}); restore it or begin anew with another --out")
        state.teacher_file = found
        return distill.freeze(teacher.to(state.model.embed.weight.dtype))

    # -- what the loop calls

    def wrap(self):
        """The training step's module around the model as it is now; anew after a slice."""
        objective = Objective(self.state.model, self.config.kd_weight, self.config.kd_temperature)
        objective = torch.compile(objective, dynamic=False) if self.compile else objective
        self.objective = DistributedDataParallel(objective) if self.world > 1 else objective

    @contextlib.contextmanager
    def timed(self, part):
        """Add the seconds of a block to state.seconds[part], GPU work included."""
        sync = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        sync()
        start = time.perf_counter()
        yield
        sync()
        self.state.seconds[part] += time.perf_counter() - start

    def live(self):
        """The config that counts live units only."""
        return self.state.model.config.resized({key: len(i) for key, i in self.state.keep.items()})

    def evaluate(self):
        with self.timed("eval"):
            found = evaluate(self.state.model, self.corpus.val, self.byte_lengths, self.config.eval_windows)
        return {"val_loss": found["loss"], "bits_per_byte": found["bits_per_byte"]}

    def shape(self):
        live = self.live()
        return {"params": live.num_params()["total"], "n_kv_head": live.n_kv_head, "d_ff": live.d_ff}

    def sample(self, when):
        if self.rank == 0:
            prompt = self.corpus.val[:self.T // 2]
            text = sample(self.state.model, self.corpus.tokenizer, prompt, 200, seed=self.config.seed)
            self.log("sample", when=when, prompt=self.corpus.tokenizer.decode(prompt), text=text)

    def capture_teacher(self):
        """The enlarged model before the first cut becomes the teacher, in a file of its own that is never rotated away."""
        s, path = self.state, self.out / "teacher.pt"
        if self.rank == 0:
            models.save(path, s.model, run=self.identity(), step=s.step)
        if self.world > 1:
            dist.barrier()
        s.teacher_file = None
        s.teacher = self.open_teacher(path, s)
        self.log("teacher", **s.teacher_file)

    def cut(self, size):
        """Zero the lowest-scored units, so that `size` of the removable parameters stays alive."""
        s = self.state
        with self.timed("cut"):
            widths = prune.allocate(self.start, self.target, size, {key: len(i) for key, i in s.keep.items()})
            s.keep = prune.choose(prune.ranking(s.averages, s.keep, self.config.uncertainty), widths)
            prune.zero_(s.model, s.optimizer, s.keep)
        if self.rank == 0:
            self.log("prune", size=size, **self.shape(), **self.evaluate())

    def slice(self):
        """Cut the dead units off: a smaller model of the same class, its optimizer, and a new training step around it."""
        s = self.state
        with self.timed("slice"):
            s.model, s.optimizer = prune.slice(s.model, s.optimizer, s.keep)
            s.keep, s.averages = prune.everything(s.model.config), None
            self.wrap()
        assert s.model.config == self.target, (s.model.config, self.target)
        self.log("slice", **self.shape())

    def backward(self, teacher):
        """Micro-steps: leaves the mean gradient over the global batch in .grad and returns the means of loss, cross-entropy, KL
        and the teacher's cross-entropy (nats per token), and the gradient's norm."""
        c, s = self.config, self.state
        sums = torch.zeros(5, device=self.device, dtype=torch.float32 if self.device == "mps" else torch.float64)
        for micro in range(self.micro_steps):
            x, y = (t.to(self.device, non_blocking=True) for t in data.batch(
                self.corpus.train, self.T, c.seed, s.step, micro, self.rank, world=self.world, micro_batch=c.micro_batch,
                micro_steps=self.micro_steps))
            waits = self.world > 1 and micro < self.micro_steps - 1   # processes exchange gradients once a step
            with self.objective.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=c.dtype == "bfloat16"):
                    with torch.no_grad():
                        taught = (teacher.hidden(x), teacher.head_weight) if teacher else ()
                    loss, stats = self.objective(x, y, *taught)
                (loss / self.micro_steps).backward()
            sums[:4] += torch.cat((loss.detach()[None], stats)) / self.micro_steps
        sums[4] = bool(self.interrupted)
        if self.world > 1:
            dist.all_reduce(sums)
            sums /= self.world
        *means, interrupted = sums.tolist()
        self.interrupted = self.interrupted or (signal.SIGTERM if interrupted else None)      # all processes stop together
        norm = nn.utils.get_total_norm([p.grad for p in s.model.parameters()])
        return means, norm

    def account(self, teacher, scored):
        """Add this step's FLOPs: executed and credited."""
        s, c = self.state, self.config
        for i, config in enumerate((s.model.config, self.live())):
            s.flops[i] += c.batch_tokens * config.flops_per_token(self.T) + 3 * config.removable_params() * scored
            s.flops[i] += c.batch_tokens * teacher.config.flops_per_token(self.T, backward=False) if teacher else 0

    def judge_teacher(self, ce, teacher_ce):
        """Drop the teacher for good once the student's smoothed loss on the same batches is as low."""
        s = self.state
        s.smooth = [distill.smooth(old, new) for old, new in zip(s.smooth, (ce, teacher_ce))]
        if self.config.drop_teacher and distill.overtaken(*s.smooth):
            self.log("teacher", dropped=True, student_ce=s.smooth[0], teacher_ce=s.smooth[1])
            s.teacher, s.dropped = None, True

    def finish(self):
        """The summary record, table and picture of a finished plan."""
        s, c = self.state, self.config
        self.sample("recovered")
        last = [r for r in read_records(self.metrics) if r["tag"] == "eval"][-1]
        pruning = sum(s.seconds[part] for part in ("score", "cut", "slice"))
        peak = torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.log("summary", plan=c.plan, preset=c.preset, seed=c.seed, params=last["params"], val_loss=last["val_loss"],
                 bits_per_byte=last["bits_per_byte"], epochs=data.epochs(self.corpus.train, self.T, c.steps * c.batch_tokens // self.T),
                 flops_executed=s.flops[0], flops_credited=s.flops[1], seconds=s.seconds,
                 pruning_share=pruning / (sum(s.seconds.values()) - s.seconds["score"]), peak_bytes=peak, device=self.device)
        print(report.summary(self.out))


def main(config, bar=True):
    """Run a plan, or one stage of it, from where its folder stands. Returns the Run."""
    r = Run(config)
    s, t = r.state, r.timeline
    stop = config.steps if config.stage == "all" else next(b for stage, _, b in t.stages if stage.name == config.stage)
    if s.step >= stop and (stop < config.steps or any(record["tag"] == "summary" for record in read_records(r.metrics))):
        print(f"{r.out} is finished up to step {s.step} of {config.steps}; see {r.metrics}")
        return r
    r.begin_records()
    stop_signals(r)
    cuts = dict(t.events)
    progress = tqdm(total=stop, initial=s.step, disable=not bar or r.rank > 0, mininterval=.5 if sys.stderr.isatty() else 20)

    while True:
        # evaluate, save: a checkpoint is the state before this step's events
        boundary = s.step == stop or any(s.step == begin for _, begin, _ in t.stages)
        if r.rank == 0 and (boundary or s.step % config.eval_every == 0):
            r.log("eval", stage=schedule.stage_at(min(s.step, config.steps - 1), t).name, **r.shape(), **r.evaluate())
        if boundary or s.step % config.save_every == 0 or r.interrupted:
            r.save()
        if s.step == stop or r.interrupted:
            break

        # events
        stage = schedule.stage_at(s.step, t)
        if stage.restart and boundary:
            s.optimizer = make_optimizer(s.model, config)             # forgets Adam's moments; the learning rate warms up again
        if cuts and s.step == min(cuts):
            r.sample("before the first cut")
            if stage.kd and not config.teacher:
                r.capture_teacher()
        if s.step in cuts:
            r.cut(cuts[s.step])
            if s.step == max(cuts):
                r.sample("after the last cut")
        if s.step == t.slice_at:
            r.slice()

        # learning rate
        lr = schedule.lr_at(s.step, t, config.lr, config.min_lr, config.warmup_share, config.shape)
        for group in s.optimizer.param_groups:
            group["lr"] = lr

        seconds = s.seconds["train"]
        with r.timed("train"):
            # micro-steps: cross-entropy | distillation | both
            teacher = s.teacher if stage.kd else None
            means, norm = r.backward(teacher)
            if not all(map(math.isfinite, (*means, norm))):
                raise UserError(f"step {s.step}: loss {means[0]:.4g}, gradient norm {norm:.4g}, so the update was not applied; lower "
                                f"--lr (now {lr:.2g}) or check the data; the last checkpoint is {models.newest(r.out)}")
            # score while the gradients are there, clip, update
            scored = schedule.score_at(s.step, t, config.score_every, config.score_window)
            if scored:
                with r.timed("score"):
                    s.averages = prune.average(s.averages, prune.sensitivity(s.model))
            nn.utils.clip_grads_with_norm_(s.model.parameters(), config.clip, norm)
            s.optimizer.step()
            s.optimizer.zero_grad(set_to_none=True)

        # log
        r.account(teacher, scored)
        if teacher:
            r.judge_teacher(means[1], means[3])
        s.step += 1
        s.window = [a + b for a, b in zip(s.window, (*means, norm.item(), s.seconds["train"] - seconds, 1))]
        if s.step % LOG_EVERY == 0:
            loss, ce, kl, teacher_ce, norm, seconds = (total / s.window[-1] for total in s.window[:-1])
            speed, params = config.batch_tokens / seconds, r.live().num_params()["total"]
            r.log("step", loss=loss, ce=ce, kl=kl, teacher_ce=teacher_ce, grad_norm=norm, lr=lr, stage=stage.name, params=params,
                  tokens_per_second=speed, flops_executed=s.flops[0], flops_credited=s.flops[1])
            progress.set_postfix_str(f"{stage.name} loss {ce:.3f} lr {lr:.1e} {params / 1e6:.2f}M {speed / 1e3:.1f}k tok/s")
            s.window = [0.0] * 7
        progress.update()

    progress.close()
    if r.interrupted:
        if r.rank == 0:
            print(f"stopped at step {s.step} of {config.steps}, saved in {r.out}; the same command goes on from there")
        sys.exit(128 + r.interrupted)
    if s.step == config.steps and r.rank == 0:
        r.finish()
    return r


def stop_signals(r):
    """Ctrl-C and SIGTERM let the step finish, save, and end the run; a second one ends it at once."""
    def stop(number, _):
        r.interrupted = number
        signal.signal(number, signal.SIG_DFL)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)


if __name__ == "__main__":
    run(lambda: main(parse(Train)))

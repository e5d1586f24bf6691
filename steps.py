"""What the loop's lines do: a training step, a cut, a slice, an evaluation, and what all of them share, a Run.

A Run is a plan's fixed surroundings (settings, timeline, corpus, processes, folder), its State (folder.py: all that a
step changes), and one method for each line of `train.loop`. Every process of a DDP run has one; they hold the same
numbers. Not here: when something is done (train.py, schedule.py), which units go (score.py, allocate.py, prune.py).
"""
import contextlib
import dataclasses
import datetime
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import allocate
import checkpoint
import data
import distill
import model as models
import prune
import report
import score
from common import UserError, peak_rss, pick_device
from eval import evaluate, sample
from flags import calibrates, measured, open_init, plan, refuse_idle_flags, resolve
from folder import Folder, State
from methods import two_four

LOG_EVERY = 10                               # steps per "step" record, which holds means over them


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
        if ":" in self.device and self.world > 1:
            raise UserError(f"--device {self.device} puts all {self.world} processes on one GPU; give --device cuda")
        if self.device == "cuda" and self.world > 1:
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        on_gpu = self.device.startswith("cuda")
        if self.world > 1 and not dist.is_initialized():              # others wait while one prepares data or scores
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
                     masks=two_four.unpack(about.get("masks"), self.device))

    def wrap(self):
        """The training step's module around the model as it is now; anew after a slice."""
        objective = distill.Objective(self.state.model, self.config.kd_weight, self.config.kd_temperature)
        if self.config.compile:
            torch.compiler.reset()                                    # or after 8 graphs, as many sizes, it gives up
            objective = torch.compile(objective, dynamic=False)
        if self.world > 1:
            objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)     # no second copy of them
        self.objective = objective

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
        with self.timed("eval"):
            found = evaluate(self.state.model, self.corpus.val, self.byte_lengths, self.config.eval_windows,
                             batch=self.config.micro_batch, rank=self.rank, world=self.world)
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
                found_scores = score.SCORES[measured(c)].function(s.model, stats)
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
                most = math.floor(size * start.removable_params() + 1e-6)        # as in allocate.widths_on_the_way
                widths = allocate.widths_for(s.model.config, most, "adaptive", scores, importance=importance,
                                             whole=start.widths())
            else:
                at_most = {key: len(indices) for key, indices in s.keep.items()}
                widths = allocate.widths_on_the_way(start, self.target, size, at_most)
            s.keep = prune.choose(score.mask_dead(scores, s.keep), widths)
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
            x, y = data.batch(self.corpus.train, self.T, c.seed, s.step, micro, self.rank, world=self.world,
                              micro_batch=c.micro_batch, micro_steps=self.micro_steps)
            if self.device.startswith("cuda"):                        # from pinned memory the copy waits for nothing
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
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

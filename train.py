"""Enlarge, prune, recover: the one loop, in one run, under one learning-rate schedule.

    python train.py                                   # plan "idea", laptop preset, embedded corpus
    python train.py --plan naive --seed 1             # any other row of schedule.PLANS through the same loop
    python train.py --plan adapt                      # Adapt-Pruner: cut a little, train, cut again (arXiv 2502.03460)
    python train.py --init FOLDER --enlarge-ff 1.25 --block-size 512 --micro-batch 2       # the large one is given
    torchrun --nproc-per-node 8 train.py --preset 124m --tokenizer gpt2 --batch-tokens 524288

A larger model than wanted is trained, loses units while it trains (prune.py) and recovers at the target size, taught,
if the plan says so, by itself as it stood before the first cut (distill.py): IDEA Prune, arXiv 2503.05920. A run is a
folder (folder.py); the same command goes on where a killed one stopped, bit for bit on a CPU. `loop` is the method.

metrics.jsonl, one JSON object a line with `tag`, `step` (updates done before it) and `tokens` (trained on by then):
  config   the resolved settings, `target` and `start` model configs, corpus `fingerprint`, `documents` and
           `corpus_tokens` (train, hold-out), `cut`: the `recipe` and `cut_from` of an --init that prune.py wrote,
           `code`: the git commit (common.commit; joined by + if it changed on the way)
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
evaluation, nor the training of a teacher that was given. The zeros of a 2:4 model (methods/two_four.py), which a run keeps if
its --init has them, count in `params` and as executed and credited: no sparse kernels run here.
Not here: sharding of one model over several devices.
"""
import contextlib
import math
import signal
import sys
import threading
from dataclasses import asdict

from common import UserError, commit, parse, run
from flags import Train, measured

if __name__ == "__main__":
    CONFIG = parse(Train, about=__doc__)     # before torch, which takes seconds to import

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import checkpoint
import report
import schedule
import score
from methods import two_four
from steps import Run, make_optimizer


class NotFinite(UserError):
    """A step's loss or gradient is not a number, or infinite."""


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


def main(config, quiet=False):
    """Run a plan, or one stage of it, from where its folder stands. -> the Run."""
    r = Run(config)
    s, t, c = r.state, r.timeline, r.config
    stop = c.steps if c.stage == "all" else next(b for stage, _, b in t.stages if stage.name == c.stage)
    if s.step >= stop and (stop < c.steps or "summary" in report.records(r.folder.path)):
        print(f"{r.folder.path} is finished up to step {s.step} of {c.steps}; records: {r.folder.metrics}")
        return r
    r.folder.rewind(s.step, target=asdict(r.target), start=asdict(r.start), documents=r.corpus.documents,
                    corpus_tokens=[len(r.corpus.train), len(r.corpus.val)], cut=r.cut_before, code=commit())
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
    run(main, CONFIG)

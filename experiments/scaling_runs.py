"""The runs that a scaling law of recovery is fitted to: trainings, cuts and recoveries.

    python -m experiments.scaling run         # 4 hours on 2 cores; the same command goes on
    python -c "from experiments.scaling_runs import *; print(len(waves(Grid())[1]))"

Models of several sizes N0 (parameters of attention and FFNs) are trained on more than 20 tokens per
parameter. They are cut by width (FFN neurons, equal shares), by depth (whole layers, ShortGPT's
influence) or to 2:4 (Wanda). Then they are trained on at a constant learning rate, the one at which
the training before the cut ended. So every evaluation on the way could be the end of a shorter
recovery, and one run gives a whole curve. The control is a model that was not cut but trained on as
well; its loss falls, too. Whole trainings on 1/2, 1/4 and 1/8 of the tokens, and plans idea and
journey, serve the laws of whole trainings. Not here: what the records say
(experiments/scaling_curves.py, experiments/scaling.py), the runs (train.py), the cuts (prune.py).
"""
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import checkpoint
import data
import prune
import report
import train
from common import UserError, check_choices, check_positive, pick_device, write_atomic
from experiments import sweep
from formats.tokenizer import open_tokenizer
from train import INIT_LR, LEARNING_RATES


@dataclass(frozen=True)
class Grid:
    preset: Literal["toy", "cpu", "gpu"] = "cpu"    # sizes and tokens; gpu takes about a day, toy a few minutes
    init: tuple[str, ...] = ()        # trained models (folders, hub ids) to use instead of training some
    data: str = "stdlib"              # data.py's sources; at most 4 epochs of it
    tokenizer: str | None = None      # bytes, a tiktoken encoding, a folder; default: bytes, or that of --init
    tokens: int | None = None         # of the training before the cut; default: the preset's
    recover_tokens: int | None = None    # of the training after it; default: the preset's
    batch_tokens: int | None = None   # per step; default: the preset's
    micro_batch: int | None = None    # sequences per forward pass; default: the preset's
    block_size: int | None = None     # tokens of context; default: the preset's, or the trained one of --init
    eval_windows: int | None = None   # of the hold-out; default: the preset's
    lr: float | None = None           # of the recovery; default: a tenth of the size's peak, 2e-5 for --init
    seeds: int = 2                    # of whole trainings, controls and width cuts; depth and 2:4 have one
    minutes: float | None = None      # stop then, and save; the same command goes on
    jobs: int | None = None           # runs side by side; default: one a core, 3 with preset gpu
    device: str | None = None         # cpu, cuda, mps; default: the preset's
    out: str = "results/scaling.jsonl"    # file of the finished runs' records
    runs: str = "runs/scaling"        # folder of the run folders


# What may differ between two calls that make the same grid.
NOT_IDENTITY = ("seeds", "minutes", "jobs", "device", "out", "runs")


@dataclass(frozen=True)
class Preset:
    sizes: tuple[str, ...]            # presets of model.py
    tokens: int
    recover_tokens: int
    batch_tokens: int
    micro_batch: int
    eval_windows: int


PRESETS = {
    "toy": Preset(("8x16", "8x32"), 2**18, 2**15, 2**9, 4, 4),
    "cpu": Preset(("8x16", "8x32", "8x48", "8x64"), 2**24, 2**21, 2**12, 32, 256),
    # at least 43 tokens per parameter
    "gpu": Preset(("12x128", "12x192", "12x320", "12x512"), 2**31, 2**28, 2**17, 64, 512),
}
CUTS = {  # the settings of prune.py; the depth cuts take 1, 2 and 3 layers of 8
    "control": None,
    "width-0.15": dict(structure="ffn", score="sensitivity", allocate="uniform", mend="none", keep=1 - .15),
    "width-0.25": dict(structure="ffn", score="sensitivity", allocate="uniform", mend="none", keep=1 - .25),
    "width-0.35": dict(structure="ffn", score="sensitivity", allocate="uniform", mend="none", keep=1 - .35),
    "depth-0.125": dict(structure="layer", score="influence", keep=1 - .125),
    "depth-0.25": dict(structure="layer", score="influence", keep=1 - .25),
    "depth-0.375": dict(structure="layer", score="influence", keep=1 - .375),
    "2-4": dict(structure="2:4", score="wanda"),
}
RECOVERY_SEED = 100                   # and above, for another order of the data than before the cut
MAX_EPOCHS = 4


class Job(NamedTuple):
    name: str
    settings: dict                    # of train.py
    cut: dict | None = None           # the settings of prune.py for the cut before the run


def filled(config):
    """The settings with all defaults filled in. Raises UserError for settings that mean nothing."""
    check_choices(config)
    check_positive(config, ("tokens", "recover_tokens", "batch_tokens", "micro_batch", "block_size",
                            "eval_windows", "lr", "seeds", "minutes", "jobs"))
    if config.init and config.tokens is not None:
        raise UserError(f"--tokens {config.tokens} has no effect with --init, whose models are "
                        "trained; leave it out")
    if len({Path(path).name for path in config.init}) < len(config.init):
        raise UserError(f"--init {' '.join(config.init)}: their folders have the same name; rename "
                        "one")
    chosen = {}
    for name in ("tokens", "recover_tokens", "batch_tokens", "micro_batch", "eval_windows"):
        if getattr(config, name) is None:
            chosen[name] = getattr(PRESETS[config.preset], name)
    on_gpu = config.preset == "gpu"
    if config.device is None:
        chosen["device"] = "cuda" if on_gpu else "cpu"
    if config.jobs is None:
        chosen["jobs"] = 3 if on_gpu else os.cpu_count() or 1
    config = replace(config, **chosen)
    steps = config.tokens // config.batch_tokens
    recover_steps = round(config.recover_tokens / config.batch_tokens)
    # The shortest whole training has a fourth of the steps, in which plan idea makes 20 cuts.
    if recover_steps < 8 or (not config.init and steps < 400):
        raise UserError(f"{config.tokens:,} tokens before the cut and {config.recover_tokens:,} "
                        f"after it are {steps} and {recover_steps} steps of "
                        f"{config.batch_tokens:,}; give at least 400 and 8, or a smaller "
                        "--batch-tokens")
    return config


def waves(config):
    """The Jobs in two lists: trainings of the models that are cut, and what can only come after
    them."""
    config = filled(config)
    common = dict(data=config.data, tokenizer=config.tokenizer, batch_tokens=config.batch_tokens,
                  micro_batch=config.micro_batch, block_size=config.block_size,
                  eval_windows=config.eval_windows)

    def whole(name, share=1, **settings):
        steps = round(config.tokens * share / config.batch_tokens)
        return Job(name, dict(common, steps=steps, eval_every=steps, **settings))

    trained = []
    recovered = []
    others = []
    for path in config.init:
        recovered += recoveries(config, path, path, common)
    if config.init:
        return trained, recovered
    # The largest size comes first, so that the last runs are short.
    for size in reversed(PRESETS[config.preset].sizes):
        for seed in range(config.seeds):
            trained.append(whole(f"{size}-{seed}", plan="scratch", preset=size, seed=seed))
        recovered += recoveries(config, size, f"{config.runs}/{size}", common)
        for k in (2, 4, 8):
            others.append(whole(f"{size}-0-of-{k}", 1 / k, plan="scratch", preset=size))
        for plan in ("idea", "journey"):
            others.append(whole(f"{plan}-{size}-0-of-4", 1 / 4, plan=plan, preset=size))

    def price(job):
        return job.settings["steps"], job.settings["plan"] != "scratch", job.settings["preset"]

    return trained, recovered + sorted(others, key=price)


def recoveries(config, size, start, common):
    """The recoveries of one size, or of one model of --init: Jobs for every seed and cut. `start`
    is the model, for a size without the seed that its folder's name ends with."""
    if config.lr is not None:
        lr = config.lr
    else:
        lr = INIT_LR if config.init else LEARNING_RATES[size] / 10
    steps = round(config.recover_tokens / config.batch_tokens)
    jobs = []
    for seed in range(config.seeds):
        init = start if config.init else f"{start}-{seed}"
        settings = dict(common, plan="scratch", init=init, seed=RECOVERY_SEED + seed, steps=steps,
                        lr=lr, min_lr=lr, warmup_share=.01, eval_every=max(1, steps // 128),
                        eval_growth=1.2)
        for kind, cut in CUTS.items():
            if seed > 0 and not kind.startswith(("control", "width")):
                continue
            name = f"{kind}-{Path(size).name}-{seed}"
            if cut is None:
                jobs.append(Job(name, settings))
                continue
            # The run starts with what the cut leaves.
            recipe = dict(cut, init=init, data=config.data, block_size=config.block_size, seed=seed)
            jobs.append(Job(name, dict(settings, init=f"{config.runs}/cut-{name}"), recipe))
    return jobs


def make(config, job):
    """Cut if need be, train, keep the records."""
    sweep.run_plan(f"{config.runs}/{job.name}", job.settings, config.device, job.cut)
    sweep.put_runs(config.out, {job.name: sweep.without_steps(f"{config.runs}/{job.name}")})


def refuse_another_grid(config, jobs):
    """Raise UserError if the folder of runs belongs to a grid of other settings, as the names of
    runs do not tell the models of two grids apart, or if the text is too short for this one.
    `config` is as it was given."""
    file = Path(config.runs) / "grid.json"
    identity = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    identity = json.loads(json.dumps(identity))
    if file.exists():
        differ = sweep.differences("", json.loads(file.read_text()), identity)
        if differ:
            raise UserError(f"{config.runs} holds another grid ({'; '.join(differ)}); give another "
                            "--runs, and another --out")
    if not config.init:
        tokens = max(job.settings["steps"] * job.settings["batch_tokens"] for job in jobs)
        corpus = data.load(config.data, open_tokenizer(config.tokenizer or "bytes"))
        if tokens > MAX_EPOCHS * len(corpus.train):
            raise UserError(f"{tokens:,} tokens are {tokens / len(corpus.train):.0f} epochs of "
                            f"{config.data}, more than {MAX_EPOCHS}; give more text by --data, or "
                            "fewer --tokens")
    write_atomic(file, lambda out: out.write(json.dumps(identity, indent=1).encode()))


def check_jobs(config, jobs):
    """Raise UserError for a setting that train.py or prune.py would refuse inside a run."""
    device = pick_device(config.device)
    vocab_size = open_tokenizer(config.tokenizer or "bytes").vocab_size
    for job in jobs:
        try:
            settings = train.resolve(train.Train(**job.settings), device)
            train.refuse_idle_flags(settings)
            if job.cut:
                prune.check(prune.Prune(**job.cut))
            if not settings.init:
                _, target, _ = train.plan_run(settings, vocab_size)
                train.check_batch(settings, target.block_size, world=1)
        except UserError as problem:
            raise UserError(f"{job.name}: {problem}") from None


def run_grid(config):
    """Make what is missing, wave by wave."""
    until = None
    if config.minutes is not None:
        until = time.time() + 60 * config.minutes
    trained, recovered = waves(config)
    check_jobs(filled(config), [*trained, *recovered])
    refuse_another_grid(config, [*trained, *recovered])
    config = filled(config)
    for wave in (trained, recovered):
        missing = missing_jobs(config, wave)
        done = sweep.side_by_side(make, [(config, job) for job in missing], config.jobs, until)
        if done < len(missing):
            print(f"{len(missing) - done} runs of this wave are left; the same command goes on")
            return
    print(f"all runs are finished; python -m experiments.scaling fit {config.out}")


def missing_jobs(config, wave):
    """The Jobs of a wave that have no records. Raises UserError if one of them begins with a model
    that is gone."""
    runs = report.finished(config.out)
    missing = []
    for job in wave:
        if sweep.is_finished(f"{job.name} in {config.out}", runs.get(job.name), job.settings, "--out"):
            continue
        model = job.cut["init"] if job.cut else job.settings.get("init")
        if model and not config.init and not checkpoint.checkpoints(model):
            raise UserError(f"{model} is gone, with which {job.name} begins; delete the records of "
                            f"that training in {config.out} to have it again")
        missing.append(job)
    return missing

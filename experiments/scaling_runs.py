"""The runs that a scaling law of recovery is fitted to: trainings, cuts and recoveries, gone on with any time.

    python -m experiments.scaling run             # 4 hours on 2 cores; experiments/scaling.py is the command
    python -c "import grid; print(*[name for wave in grid.jobs(grid.Grid()) for name, *_ in wave])"

Models of several sizes N₀ (parameters of attention and FFNs) are trained on more than 20 tokens per parameter, cut by
width (FFN neurons, equal shares), by depth (whole layers, ShortGPT's influence) and to 2:4 (Wanda), and trained on at a
constant rate, the one that the training before ended with. So every evaluation on the way is an end that so many tokens
could have, and one run is one curve. Where nothing was cut (the control) the loss falls as well: continued training.
Beside them whole trainings of 1/2, 1/4 and 1/8 of the tokens, plans idea and journey, for the laws of whole trainings.
Not here: what the records say (experiments/scaling_curves.py, experiments/scaling.py), the runs (train.py), the cuts (prune.py).
"""
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flags import INIT_LR, LEARNING_RATES

import checkpoint
import data
import report
from common import UserError, write_atomic
from experiments import sweep
from formats.tokenizer import open_tokenizer


@dataclass(frozen=True)
class Grid:
    preset: str = "cpu"               # sizes and tokens: cpu, gpu (about a day), toy (minutes, to see it work)
    init: tuple[str, ...] = ()        # instead of training them: models that are there (folders, hub ids)
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
    runs: str = "runs/scaling"        # where the run folders go


GRIDS = {  # sizes (model.PRESETS), tokens before and after the cut, tokens per step, sequences at once, eval windows
    "toy": (("8x16", "8x32"), 2**18, 2**15, 2**9, 4, 4),
    "cpu": (("8x16", "8x32", "8x48", "8x64"), 2**24, 2**21, 2**12, 32, 256),
    "gpu": (("12x128", "12x192", "12x320", "12x512"), 2**31, 2**28, 2**17, 64, 512),       # 43 per parameter at least
}
CUTS = {  # settings of prune.py; depth: 1, 2 and 3 layers of 8
    "control": None,
    **{f"width-{rho:g}": dict(structure="ffn", allocate="uniform", keep=1 - rho) for rho in (.15, .25, .35)},
    **{f"depth-{rho:g}": dict(structure="layer", score="influence", keep=1 - rho) for rho in (.125, .25, .375)},
    "2-4": dict(structure="2:4", score="wanda"),
}
RECOVERY_SEED = 100                   # and above: not the order of the data that the model was trained in


def jobs(c):
    """-> whole trainings of the models to cut, and what comes after them: lists of (the run's name, settings of
    train.py, settings of the cut before it or None)."""
    if c.preset not in GRIDS:
        raise UserError(f"--preset {c.preset!r} is not one of {', '.join(GRIDS)}")
    if c.init and c.tokens is not None:
        raise UserError(f"--tokens {c.tokens} has no effect with --init, whose models are trained; leave it out")
    if len({Path(path).name for path in c.init}) < len(c.init):
        raise UserError(f"--init {' '.join(c.init)}: their folders have the same name; rename one")
    chosen = c.tokens, c.recover_tokens, c.batch_tokens, c.micro_batch, c.eval_windows
    sizes, *usual = GRIDS[c.preset]
    tokens, after, batch_tokens, micro_batch, windows = (b if a is None else a for a, b in zip(chosen, usual))
    both = dict(data=c.data, tokenizer=c.tokenizer, batch_tokens=batch_tokens, micro_batch=micro_batch,
                block_size=c.block_size, eval_windows=windows)

    def whole(name, share=1, **settings):
        steps = round(tokens * share / batch_tokens)
        return name, dict(both, steps=steps, eval_every=steps, **settings), None

    wholes, recoveries, others, steps = [], [], [], round(after / batch_tokens)
    if steps < 8 or not c.init and tokens / batch_tokens < 400:                   # a fourth of it has idea's 20 cuts
        raise UserError(f"{tokens:,} tokens before the cut and {after:,} after it are {tokens // batch_tokens} and "
                        f"{steps} steps of {batch_tokens:,}; give at least 400 and 8, or a smaller --batch-tokens")
    for size in c.init or reversed(sizes):                          # the largest first, so that the last ones are short
        for seed in range(c.seeds):
            name, start = f"{Path(size).name}-{seed}", size if c.init else f"{c.runs}/{Path(size).name}-{seed}"
            lr = c.lr if c.lr is not None else INIT_LR if c.init else LEARNING_RATES[size] / 10
            if not c.init:
                wholes.append(whole(name, plan="scratch", preset=size, seed=seed))
            settings = dict(both, plan="scratch", init=start, seed=RECOVERY_SEED + seed, steps=steps, lr=lr, min_lr=lr,
                            warmup_share=.01, eval_every=max(1, steps // 128), eval_growth=1.2)
            recoveries += [
                (f"{kind}-{name}", settings, cut and dict(cut, init=start, data=c.data, block_size=c.block_size,
                                                          seed=seed))
                for kind, cut in CUTS.items() if seed == 0 or kind == "control" or kind.startswith("width")]
        if not c.init:
            others += [whole(f"{size}-0-of-{k}", 1 / k, plan="scratch", preset=size) for k in (2, 4, 8)]
            others += [whole(f"{plan}-{size}-0-of-4", 1 / 4, plan=plan, preset=size)
                       for plan in ("idea", "journey")]
    others.sort(key=lambda run: (run[1]["steps"], run[1]["plan"] != "scratch", run[1]["preset"]))     # cheapest first
    return wholes, recoveries + others


def job(c, name, settings, cut):
    """Cut if need be, train, keep the records."""
    sweep.one(f"{c.runs}/{name}", settings, c.device, cut)
    sweep.keep_run(c.out, name, sweep.without_steps(f"{c.runs}/{name}"))


def after_cut(c, name, settings, cut):
    """The settings of a run that starts with what the cut leaves, if there is one."""
    return dict(settings, init=f"{c.runs}/cut-{name}") if cut else settings


def refuse_another_grid(c, waves):
    """UserError: the runs folder belongs to a grid of other settings (the names of runs do not tell its models apart),
    or the text is too short for this one."""
    file, told = Path(c.runs) / "grid.json", {k: v for k, v in asdict(c).items() if k not in (
        "seeds", "minutes", "jobs", "device", "out", "runs")}
    told = json.loads(json.dumps(told))
    found = json.loads(file.read_text()) if file.exists() else told
    differ = [f"{k} is {found.get(k)!r} there and {v!r} here" for k, v in told.items() if found.get(k) != v]
    if differ:
        raise UserError(f"{c.runs} holds another grid ({'; '.join(differ)}); give another --runs, and another --out")
    settings = max((settings for wave in waves for _, settings, _ in wave), key=lambda s: s["steps"])
    tokens = settings["steps"] * settings["batch_tokens"]
    if not c.init:
        corpus = data.load(c.data, open_tokenizer(c.tokenizer or "bytes"))
        if tokens > 4 * len(corpus.train):
            raise UserError(f"{tokens:,} tokens are {tokens / len(corpus.train):.0f} epochs of {c.data}, more than 4; "
                            "give more text by --data, or fewer --tokens")
    write_atomic(file, lambda out: out.write(json.dumps(told, indent=1).encode()))


def filled(c):
    """With the device and the number of jobs that a preset has by default."""
    on_gpu = c.preset == "gpu"
    return replace(c, device=c.device or ("cuda" if on_gpu else "cpu"),
                   jobs=(3 if on_gpu else os.cpu_count() or 1) if c.jobs is None else c.jobs)


def run_grid(c):
    c = filled(c)
    if c.seeds < 1 or c.jobs < 1 or c.minutes is not None and c.minutes <= 0:
        raise UserError(f"--seeds {c.seeds} and --jobs {c.jobs} must be at least 1, --minutes {c.minutes} above 0")
    until = None if c.minutes is None else time.time() + 60 * c.minutes
    waves = jobs(c)
    refuse_another_grid(c, waves)
    for wave in waves:
        todo, finished = [], report.finished(c.out)
        for name, given, cut in wave:
            settings = after_cut(c, name, given, cut)
            if sweep.finished(f"{name} in {c.out}", finished.get(name), settings, "--out"):
                continue
            if not c.init and "init" in given and not checkpoint.checkpoints(given["init"]):
                raise UserError(f"{given['init']} is gone, with which {name} begins; delete the records of that "
                                f"training in {c.out} to have it again")
            todo.append((c, name, settings, cut))
        done = sweep.side_by_side(job, todo, c.jobs, until)
        if done < len(todo):
            return print(f"{len(todo) - done} runs of this wave are left; the same command goes on")
    print(f"all runs are finished; python -m experiments.scaling fit {c.out}")

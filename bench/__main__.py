"""How fast it is: every figure a ratio to a limit, a peer or itself, measured in turns (A B A B …) in one run.

    python -m bench train                          # tokens/s, share of the matmul rate, where the time goes, peers
    python -m bench kd                             # the KD step over its roofline; peak memory
    python -m bench cuts --presets 1m 135m         # pauses per cut and slice, the prune stage against none
    python -m bench infer                          # prefill, decoding, memory; ours and llama.cpp's; dense and pruned
    python -m bench start                          # seconds to --help, and to the first step; likewise disk and ddp
    python -m bench scale                          # the paper's 2.8B -> 1.3B at 2T tokens, by accounting alone
    python -m bench gpu --minutes 8 --out results/gpu.jsonl     # what matters on a GPU; the same command goes on
    python -m bench report --out results/gpu.jsonl       # the tables again, from these records

Limits are measured in the same run: a large matrix product in the same dtype, a large copy. Medians over --rounds, of
ratios taken within a round. Random weights and tokens; a GPU draws less power on zeros, so its clock rises behind cuts:
compare within a round only. A cell that --out has, by the same code and settings on the same machine, is not measured
again; one that fails is recorded as such, and the exit code is 1.
"""
import contextlib
import dataclasses
import functools
import gc
import math
import signal
import sys
import time
from dataclasses import dataclass

import torch

import model as models
from bench import inference, system, training
from bench.timing import Records, machine, tables
from common import UserError, commit, parse, pick_device, refuse_idle, run


@dataclass(frozen=True)
class Bench:
    suite: str                             # train, kd, cuts, infer, start, disk, ddp, scale, gpu; report: the tables
    out: str = "runs/bench.jsonl"          # file of records
    presets: tuple[str, ...] = ()          # shapes: 1m, 135m, those of train.py --preset; () and None: see above
    vocab: tuple[int, ...] = ()            # tokens in the vocabulary; still (): 49,152 for 135m, else 256
    rounds: int | None = None              # that count, behind one that does not
    steps: int | None = None               # in a round, which in the prune stage has one cut; 0: 15, 3 from V = 4,096
    micro_batch: int | None = None         # sequences per forward pass; 0: bench_train.fitted chooses
    micro_steps: int | None = None         # forward passes per step
    enlarge_ff: float | None = None        # the enlarged model has so many times the target's FFN neurons
    keep: float | None = None              # infer: kept fraction of the removable parameters
    prompt: int | None = None              # infer: tokens
    decode: int | None = None              # infer: tokens
    disk: str | None = None                # disk: a folder on it; "": that of --out
    minutes: float | None = None           # gpu: then it stops; the same command goes on
    dtype: str | None = None               # float32, bfloat16 (autocast); auto: bfloat16 only on a GPU
    compile: bool | None = None            # torch.compile, ours and the peers'
    device: str | None = None              # auto, cpu, cuda, mps


RUN = dict(rounds=5, steps=0, micro_batch=0, micro_steps=1, dtype="auto", device="auto", compile=False)
INFER = dict(keep=0.8, prompt=128, decode=64)
SUITES = {  # suite: the flags it reads, and their defaults there
    "train": dict(presets=("laptop",), vocab=(256, 50257), enlarge_ff=2.6, **RUN),
    "kd": dict(presets=("laptop",), vocab=(49152,), enlarge_ff=2.6, **RUN),
    "cuts": dict(presets=("1m", "135m"), vocab=(), enlarge_ff=2.6, **RUN | dict(rounds=3)),
    "infer": dict(presets=("135m",), vocab=(), rounds=5, **INFER, dtype="auto", device="auto"),
    "start": dict(presets=("laptop",), rounds=3, device="auto"),
    "disk": dict(presets=("124m",), vocab=(50257,), rounds=5, disk=""),
    "ddp": dict(presets=("laptop",), vocab=(256,), rounds=5, steps=15, micro_batch=0),
    "scale": dict(presets=("1.3b",), vocab=(50257,), enlarge_ff=2.6, micro_batch=1),
    "gpu": dict(presets=("124m", "1.3b"), vocab=(50304,), enlarge_ff=2.6, minutes=8.0, **INFER,
                **RUN | dict(rounds=3, steps=5, compile=True)),
    "report": {}}


__doc__ += "\nFlags by suite, with their defaults there:\n" + "\n".join(f"  {suite:6} " + ", ".join(
    f"{name.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, tuple) else v}".strip()
    for name, v in uses.items()) for suite, uses in SUITES.items() if uses)

RANGES = {"micro_batch": (0, math.inf), "steps": (0, math.inf), "vocab": (2, 2**32), "decode": (2, math.inf),
          "keep": (1e-6, 1), "minutes": (1e-6, math.inf)}


def resolve(c):
    """Fill the suite's defaults and those that depend on the machine (without --device: the CPU); refuse what the suite
    has no use for or what means nothing."""
    if c.suite not in SUITES:
        raise UserError(f"{c.suite!r} is not one of {', '.join(SUITES)}")
    uses, names = SUITES[c.suite], [f.name for f in dataclasses.fields(c) if f.name not in ("suite", "out")]
    refuse_idle(c, [name for name in names if name not in uses], f"in {c.suite}")
    c = dataclasses.replace(c, **{name: default if getattr(c, name) in (None, ()) else getattr(c, name)
                                  for name, default in uses.items()})
    for name in uses:
        low, high = RANGES.get(name, (1, math.inf))
        for value in getattr(c, name) if type(getattr(c, name)) in (list, tuple) else [getattr(c, name)]:
            if type(value) in (int, float) and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {low:g}"
                                + (f" and at most {high:g}" if high < math.inf else ""))
    known = (*(() if c.suite == "start" else training.SHAPES), *models.PRESETS)       # start runs train.py
    for name in c.presets:
        if name not in known:
            raise UserError(f"{c.suite} knows no shape {name!r}; there are {', '.join(known)}")
    if c.steps == 1:
        raise UserError("--steps 1 must be 0 or at least 2, as a cut is scored in the step before")
    if c.dtype not in (None, "auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {c.dtype!r} is not one of auto, float32, bfloat16")
    device = pick_device(c.device or "cpu")
    dtype = c.dtype if c.dtype in ("float32", "bfloat16") else "bfloat16" if device.startswith("cuda") else "float32"
    return dataclasses.replace(c, device=device, dtype=dtype, compile=bool(c.compile), micro_steps=c.micro_steps or 1)


# -- cells

def cells(c):
    """[(name, function without arguments -> {"rows": ...})] of a suite, in the order in which they are measured. gpu:
    torch and numpy only; what two cells train alike is compiled once, as the compiler keeps it on disk."""
    stages, KD = functools.partial(functools.partial, training.stages), training.KD
    measures = {
        "train": {"": stages(names=(*training.STAGES, training.GPT2, training.LLAMA))},
        "kd": {"": stages(names=KD, memory=True)}, "cuts": {"": training.cuts}, "ddp": {"": training.ddp},
        "infer": {"": inference.infer}, "start": {"": system.start}, "disk": {"": system.disk},
        "scale": {"": system.scale},
        "gpu": {", infer": inference.infer, ", recover": stages(names=(*KD, training.GPT2), memory=True),
                ", prune": stages(names=("prune", "prune, KD")), ", cuts": training.cuts}}[c.suite]
    own = {name: config.vocab_size for name, config in training.SHAPES.items()}
    return [(f"{preset}, V = {V}{which}", functools.partial(measure, c, preset, V))
            for preset in c.presets for V in c.vocab or (own.get(preset, 256),) for which, measure in measures.items()]


AGAIN = 15                                 # seconds between alarms: a compiler may swallow one


class TimeIsUp(BaseException):
    """Not to be caught by what a cell calls."""


@contextlib.contextmanager
def at_most(minutes):
    """End the block after so many minutes (None: never): the cell under way is lost, finished ones are written."""
    def stop(*_):
        raise TimeIsUp

    if minutes is None:
        yield
        return
    before, began = signal.signal(signal.SIGALRM, stop), time.time()
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, AGAIN)
    try:
        yield
    except TimeIsUp:
        print(f"stopped after {(time.time() - began) / 60:.1f} minutes; the same command goes on")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(c):
    c = resolve(c)
    records = Records(c.out)
    if c.suite == "report":
        if not records.all():
            raise UserError(f"{records.file} has no records; give the --out of a suite that ran")
        return print(tables(records.all()))
    uses = {name: getattr(c, name) for name in SUITES[c.suite] if name not in ("presets", "vocab", "minutes")}
    about, failed = {"settings": uses, "machine": machine(c.device), "code": commit()}, False
    with at_most(c.minutes):
        for name, measure in cells(c):
            failed |= not records.cell(c.suite, name, about, measure)
            gc.collect()
            if c.device.startswith("cuda"):
                torch.compiler.reset()                                # compiled graphs keep their models
                torch.cuda.empty_cache()
    print(tables([r for r in records.all() if r["suite"] == c.suite and r["about"]["code"] == about["code"]]))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(lambda: main(parse(Bench)))

"""How fast it is: every figure a ratio to a limit, a peer or itself, measured in turns (A B A B …) in one run.

    python bench.py train                          # tokens/s, share of the matmul rate, where the time goes, peers
    python bench.py kd --vocab 50257               # the KD step over its roofline; peak memory
    python bench.py cuts --presets 1m 135m         # pauses per cut and slice, the prune stage against none
    python bench.py infer                          # prefill, decoding, memory; ours and llama.cpp's; dense and pruned
    python bench.py start                          # seconds to --help, and to the first step; likewise disk and ddp
    python bench.py scale                          # the paper's 2.8B -> 1.3B at 2T tokens, by accounting alone
    python bench.py gpu --minutes 8 --out results/gpu     # all of it that matters on a GPU; the same command goes on
    python bench.py report --out results/bench     # the tables again, from the records

Limits are measured in the same run: a large matrix product in the same dtype, a large copy. Medians over --rounds, of
ratios taken within a round. Random weights and tokens: neither changes the speed of dense arithmetic. A cell that --out
has with the same settings on the same machine is not measured again. FLOPs are model.flops_per_token's, executed ones.
"""
import contextlib
import dataclasses
import functools
import gc
import math
import signal
import statistics
import threading
import time
from dataclasses import dataclass

import torch

import bench_infer
import bench_system
import bench_train
import model as models
from common import UserError, parse, pick_device, run
from timing import Records, interleave, machine, tables, traffic


@dataclass(frozen=True)
class Bench:
    suite: str                             # train, kd, cuts, infer, start, disk, ddp, scale, gpu; report: the tables
    out: str = "runs/bench"                # folder of records.jsonl
    presets: tuple[str, ...] = ()          # shapes: 1m, 135m, those of train.py --preset; () and None: see above
    vocab: tuple[int, ...] = ()            # tokens in the vocabulary; still (): 49,152 for 135m, else 256
    rounds: int | None = None              # that count, behind one that does not
    steps: int | None = None               # in a round, which in the prune stage has one cut (train.py's own: 15 steps)
    micro_batch: int | None = None         # sequences per forward pass; 0: bench_train.micro_batch chooses
    micro_steps: int | None = None         # forward passes per step
    enlarge_ff: float | None = None        # the enlarged model has so many times the target's FFN neurons
    keep: float | None = None              # infer: kept fraction of the removable parameters
    prompt: int | None = None              # infer: tokens
    decode: int | None = None              # infer: tokens
    matmul: int | None = None              # rows of the square matrices; 0: 2,048, on a GPU 8,192
    megabytes: int | None = None           # of the copy that measures the bandwidth
    disk: str | None = None                # disk: a folder on it; "": the system's temporary one
    minutes: float | None = None           # gpu: then it stops; the same command goes on
    tokens: float | None = None            # scale: of the run
    gpus: tuple[int, ...] = ()             # scale: numbers of them
    peak_flops: float | None = None        # scale: of one GPU, per second, in the dtype of the matrices
    utilisation: float | None = None       # scale: the fraction of it that training reaches
    weight_bytes: int | None = None        # scale: of a weight, its gradient and each of its two moments
    activation_bytes: int | None = None    # scale: of a value kept for the backward pass
    dtype: str | None = None               # float32, bfloat16 (autocast); auto: bfloat16 only on a GPU
    compile: bool | None = None            # torch.compile, ours and the peers'
    device: str | None = None              # auto, cpu, cuda, mps


RUN = dict(rounds=5, steps=5, micro_batch=0, micro_steps=2, dtype="auto", device="auto", compile=False)
LIMIT = dict(matmul=0)
SUITES = {  # suite: the flags it reads, and their defaults there; 1e15 FLOP/s and 40 % are round numbers, no card's
    "train": dict(presets=("laptop",), vocab=(256, 50257), enlarge_ff=2.6, **RUN, **LIMIT),
    "kd": dict(presets=("laptop",), vocab=(50257,), enlarge_ff=2.6, **RUN),
    "cuts": dict(presets=("1m", "135m"), vocab=(), enlarge_ff=2.6, **RUN | dict(rounds=3, steps=15, micro_steps=1)),
    "infer": dict(presets=("135m",), vocab=(), rounds=5, keep=0.8, prompt=128, decode=64, megabytes=512,
                  dtype="auto", device="auto"),
    "start": dict(presets=("laptop",), rounds=3, device="auto"),
    "disk": dict(presets=("124m",), vocab=(50257,), rounds=3, disk=""),
    "ddp": dict(presets=("laptop",), vocab=(256,), rounds=5, steps=15, micro_batch=0),
    "scale": dict(presets=("1.3b",), vocab=(50257,), enlarge_ff=2.6, micro_batch=1, tokens=2e12, gpus=(1, 8, 512),
                  peak_flops=1e15, utilisation=0.4, weight_bytes=4, activation_bytes=2),
    "gpu": dict(presets=("124m", "1.3b"), vocab=(50257,), enlarge_ff=2.6, minutes=8.0, megabytes=2048,
                **RUN | dict(rounds=3, compile=True), **LIMIT),
    "report": {}}


def shown(default):
    """A default as it is written on the command line."""
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v)
                    for v in (default if isinstance(default, tuple) else (default,)))


__doc__ += "\nFlags by suite, with their defaults there:\n" + "\n".join(
    f"  {suite:6} " + ", ".join(f"{name.replace('_', '-')} {shown(default)}".strip() for name, default in uses.items())
    for suite, uses in SUITES.items() if uses)

RANGES = {"micro_batch": (0, math.inf), "matmul": (0, math.inf), "vocab": (2, 2**32), "decode": (2, math.inf),
          "keep": (1e-6, 1), "utilisation": (1e-6, 1), "minutes": (1e-6, math.inf), "enlarge_ff": (1, math.inf)}


def resolve(c):
    """Fill the suite's defaults; refuse what it has no use for or what means nothing."""
    if c.suite not in SUITES:
        raise UserError(f"{c.suite!r} is not one of {', '.join(SUITES)}")
    uses, names = SUITES[c.suite], [f.name for f in dataclasses.fields(c) if f.name not in ("suite", "out")]
    for name in names:
        if name not in uses and getattr(c, name) != getattr(Bench, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect in {c.suite}; leave it out")
    c = dataclasses.replace(c, **{name: default if getattr(c, name) in (None, ()) else getattr(c, name)
                                  for name, default in uses.items()})
    for name in uses:
        low, high = RANGES.get(name, (1, math.inf))
        for value in getattr(c, name) if type(getattr(c, name)) in (list, tuple) else [getattr(c, name)]:
            if type(value) in (int, float) and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {low:g}"
                                + (f" and at most {high:g}" if high < math.inf else ""))
    known = (*(() if c.suite == "start" else bench_train.SHAPES), *models.PRESETS)       # start runs train.py
    for name in c.presets:
        if name not in known:
            raise UserError(f"{c.suite} knows no shape {name!r}; there are {', '.join(known)}")
    if c.suite in ("cuts", "gpu") and c.steps < 2:
        raise UserError(f"--steps {c.steps} must be at least 2 for cuts, which are scored in the step before")
    return on_machine(c)


def on_machine(c):
    """The defaults that depend on the machine; a suite without --device or --dtype runs in float32 on the CPU."""
    device = pick_device(c.device or "cpu")
    on_gpu = device.startswith("cuda")
    if c.dtype not in (None, "auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {c.dtype!r} is not one of auto, float32, bfloat16")
    dtype = c.dtype if c.dtype in ("float32", "bfloat16") else "bfloat16" if on_gpu else "float32"
    return dataclasses.replace(c, device=device, dtype=dtype, compile=bool(c.compile), micro_steps=c.micro_steps or 1,
                               matmul=c.matmul or (8192 if on_gpu else 2048))


# -- cells: (name, function without arguments -> {"rows": ...})

def cells(c):
    """The cells of a suite, in the order in which they are measured."""
    each = {"kd": bench_train.kd, "cuts": bench_train.cuts, "ddp": bench_train.ddp, "infer": bench_infer.infer,
            "disk": bench_system.disk, "scale": bench_system.scale}
    if c.suite == "gpu":
        return gpu(c)
    if c.suite == "start":
        return [(preset, functools.partial(bench_system.start, c, preset)) for preset in c.presets]
    if c.suite == "train":
        names = (*bench_train.STAGES, bench_train.GPT2, bench_train.LLAMA)
        each["train"] = functools.partial(bench_train.stages, names=names)
    own = {name: config.vocab_size for name, config in bench_train.SHAPES.items()}
    return [(f"{preset}, V = {V}", functools.partial(each[c.suite], c, preset, V))
            for preset in c.presets for V in c.vocab or (own.get(preset, 256),)]


def bandwidth(c):
    """The rates of a large copy and a large matrix-vector product."""
    moves = traffic(c.megabytes, c.device)
    seconds = interleave({name: call for name, (call, _) in moves.items()}, 10 * c.rounds, c.device)
    return {"rows": [{"table": "bandwidth", **{f"{name} GB/s": size / statistics.median(seconds[name]) / 1e9
                                               for name, (_, size) in moves.items()}}], "seconds": seconds}


def gpu(c):
    """What fits into minutes, one model in memory at a time where they are large; torch and numpy only."""
    found = [("bandwidth", functools.partial(bandwidth, c))]
    for preset in c.presets:
        for V in c.vocab:
            groups = [("enlarge",), ("recover", bench_train.GPT2), ("prune",), ("recover, KD",), ("prune, KD",)]
            for names in groups:
                found.append((f"{preset}, V = {V}, {' and '.join(names)}",
                              functools.partial(bench_train.stages, c, preset, V, names)))
            found += [(f"{preset}, V = {V}, {name}", functools.partial(call, c, preset, V))
                      for name, call in (("KD", bench_train.kd), ("cuts", bench_train.cuts))]
    return found


class TimeIsUp(BaseException):
    """Not to be caught by what a cell calls."""


@contextlib.contextmanager
def at_most(minutes):
    """End the block after so many minutes (None: never): the cell under way is lost, finished ones are written."""
    def stop(*_):
        raise TimeIsUp

    if minutes is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, began = signal.signal(signal.SIGALRM, stop), time.time()
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
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
    about = {"settings": uses, "machine": machine(c.device)}
    with at_most(c.minutes):
        for name, measure in cells(c):
            try:
                records.cell(c.suite, name, about, measure)
            except torch.OutOfMemoryError as problem:
                print(f"{c.suite}, {name}: out of memory, lower --micro-batch ({str(problem).splitlines()[0][:100]})")
            gc.collect()
            if c.device.startswith("cuda"):
                torch.compiler.reset()                                # compiled graphs keep their models
                torch.cuda.empty_cache()
    print(tables([r for r in records.all() if r["suite"] == c.suite]))


if __name__ == "__main__":
    run(lambda: main(parse(Bench)))

"""How fast it is: every figure a ratio to a limit, to a peer or to itself, measured in turns (A B A B …) in one run.

    python -m bench train                          # tokens/s, share of the matmul rate, where the time goes, peers
    python -m bench kd                             # the step of distillation over its roofline; peak memory
    python -m bench cuts --presets 1m 135m         # pauses for a cut and a slice; the prune stage against none
    python -m bench infer                          # prefill, decoding, memory; ours and llama.cpp's; dense and pruned
    python -m bench start                          # seconds to --help and of a run of one step
    python -m bench disk                           # checkpoints against plain files
    python -m bench ddp                            # two processes against one
    python -m bench scale                          # the paper's 2.8B -> 1.3B at 2T tokens, by accounting alone
    python -m bench gpu --minutes 8 --out results/gpu.jsonl     # what matters on a GPU; the same command goes on
    python -m bench report --out results/gpu.jsonl # the tables again, from these records

Limits are measured in the same run. Figures are medians over --rounds, of ratios taken within a round. Weights and tokens
are random. A GPU draws less power on zeros, so its clock rises behind cuts: compare within a round only. A cell that --out
has from the same commit, settings and machine is not measured again. A cell that fails is recorded as such, and the exit
code is 1.
"""
import contextlib
import dataclasses
import gc
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

import model as models
from bench import inference, system, training
from bench.timing import Records, machine, tables
from common import UserError, commit, parse, pick_device, refuse_idle, run

# -- suites

SHAPE = ("presets", "vocab")               # flags by what they are about
TRAINING = ("enlarge_ff", "micro_batch", "micro_steps", "steps", "rounds", "dtype", "compile", "device")
INFERENCE = ("keep", "prompt", "decode")


@dataclass(frozen=True)
class Suite:
    """Which cells a suite has, and what it reads of the command line."""
    measures: dict                         # {end of a cell's name: function of (settings, shape, vocabulary)}
    reads: tuple[str, ...]                 # flags
    presets: tuple[str, ...] = ()          # default of --presets
    vocab: tuple[int, ...] = ()            # default of --vocab; (): the shape's own
    defaults: dict = field(default_factory=dict)     # of flags that have another one here


EVERY_VARIANT = (*training.STAGES, training.GPT2, training.LLAMA)
SUITES = {
    "train": Suite({"": partial(training.stages, names=EVERY_VARIANT)}, (*SHAPE, *TRAINING), ("laptop",), (256, 50257)),
    "kd": Suite({"": partial(training.stages, names=training.KD, memory=True)}, (*SHAPE, *TRAINING), ("laptop",), (49152,)),
    "cuts": Suite({"": training.cuts}, (*SHAPE, *TRAINING), ("1m", "135m"), defaults={"rounds": 3}),
    "infer": Suite({"": inference.infer}, (*SHAPE, *INFERENCE, "rounds", "dtype", "device"), ("135m",)),
    "start": Suite({"": system.start}, ("presets", "rounds", "device"), ("laptop",), defaults={"rounds": 3}),
    "disk": Suite({"": system.disk}, (*SHAPE, "rounds", "disk"), ("124m",), (50257,)),
    "ddp": Suite({"": training.ddp}, (*SHAPE, "rounds", "steps", "micro_batch"), ("laptop",), (256,)),
    "scale": Suite({"": system.scale}, (*SHAPE, "enlarge_ff", "micro_batch"), ("1.3b",), (50257,), {"micro_batch": 1}),
    # What two of these cells train alike is compiled once, as the compiler keeps it on the disk.
    "gpu": Suite({", infer": inference.infer,
                  ", recover": partial(training.stages, names=(*training.KD, training.GPT2), memory=True),
                  ", prune": partial(training.stages, names=("prune", "prune, KD")), ", cuts": training.cuts},
                 (*SHAPE, *INFERENCE, *TRAINING, "minutes"), ("124m", "1.3b"), (50304,),
                 {"rounds": 3, "steps": 5, "compile": True}),
    "report": Suite({}, ()),
}
SuiteName = Literal[tuple(SUITES)]
ShapeName = Literal[(*training.SHAPES, *models.PRESETS)]


# -- settings

@dataclass(frozen=True)
class Bench:
    suite: SuiteName                       # what to measure; report: print the tables of --out
    out: str = "runs/bench.jsonl"          # file of records
    presets: tuple[ShapeName, ...] = ()    # shapes: 1m, 135m, those of train.py --preset; default: the suite's
    vocab: tuple[int, ...] = ()            # tokens in the vocabulary; default: the suite's, or the shape's own
    rounds: int | None = None              # that count, behind one that does not; default: 5, or the suite's
    steps: int | None = None               # in a round; in the prune stage each has a cut; default: 15, large vocab: 3
    micro_batch: int | None = None         # sequences per forward pass; default: training.tokens_per_forward
    micro_steps: int = 1                   # forward passes per step
    enlarge_ff: float = 2.6                # the enlarged model has so many times the target's FFN neurons
    keep: float = 0.8                      # infer: kept fraction of the removable parameters
    prompt: int = 128                      # infer: tokens
    decode: int = 64                       # infer: tokens
    disk: str | None = None                # disk: a folder on it; default: that of --out
    minutes: float = 8.0                   # gpu: then it stops; the same command goes on
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # bfloat16 is autocast; auto: that on a GPU
    compile: bool | None = None            # torch.compile, ours and the peers'; default: in gpu only
    device: str = "auto"                   # auto, cpu, cuda, mps


LEAST = {"rounds": 1, "steps": 2, "micro_batch": 1, "micro_steps": 1, "enlarge_ff": 1, "prompt": 1, "decode": 2}


def check_ranges(settings):
    """Raise UserError for numbers that mean nothing. A step before a cut is needed to score in: --steps 2."""
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if min(settings.vocab, default=2) < 2:
        raise UserError(f"--vocab {min(settings.vocab)} must be at least 2")
    if not 0 < settings.keep <= 1:
        raise UserError(f"--keep {settings.keep} must be above 0 and at most 1")
    if not settings.minutes > 0:
        raise UserError(f"--minutes {settings.minutes} must be above 0")


def resolve(settings):
    """Fill the suite's defaults and those that depend on the machine. Raises UserError for a flag that the suite does not
    read, and for a number that means nothing."""
    suite = SUITES[settings.suite]
    names = [flag.name for flag in dataclasses.fields(settings)]
    idle = [name for name in names if name not in ("suite", "out", *suite.reads)]
    refuse_idle(settings, idle, f"in {settings.suite}")
    check_ranges(settings)
    defaults = {"rounds": 5, "compile": False, **suite.defaults}
    filled = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    filled["presets"] = settings.presets or suite.presets
    filled["vocab"] = settings.vocab or suite.vocab
    filled["device"] = pick_device(settings.device) if "device" in suite.reads else "cpu"
    if settings.dtype == "auto":
        filled["dtype"] = "bfloat16" if filled["device"].startswith("cuda") else "float32"
    return dataclasses.replace(settings, **filled)


def cells(settings):
    """The cells of a suite in the order in which they are measured: [(name, function without arguments)]."""
    planned = []
    for preset in settings.presets:
        shape = training.SHAPES.get(preset)
        for vocab_size in settings.vocab or (shape.vocab_size if shape else 256,):
            for end, measure in SUITES[settings.suite].measures.items():
                planned.append((f"{preset}, V = {vocab_size}{end}", partial(measure, settings, preset, vocab_size)))
    return planned


# -- a run of a suite

ALARM_SECONDS = 15           # between two alarms, as a compiler may swallow the first one


class TimeIsUp(BaseException):
    """Not an Exception, so that nothing that a cell calls catches it."""


@contextlib.contextmanager
def at_most(minutes):
    """End the block after so many minutes. The cell that is being measured is lost; finished ones have been written."""
    def stop(*_):
        raise TimeIsUp

    handler = signal.signal(signal.SIGALRM, stop)
    start = time.time()
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, ALARM_SECONDS)
    try:
        yield
    except TimeIsUp:
        print(f"stopped after {(time.time() - start) / 60:.1f} minutes; the same command goes on")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def free_memory(settings):
    """Give up what the last cell held. Compiled graphs keep their models."""
    gc.collect()
    if settings.compile:
        torch.compiler.reset()
    if settings.device.startswith("cuda"):
        torch.cuda.empty_cache()


def main(settings):
    settings = resolve(settings)
    records = Records(settings.out)
    if settings.suite == "report":
        if not records.all():
            raise UserError(f"{records.file} has no records; give the --out of a suite that ran")
        print(tables(records.all()))
        return
    flags = [name for name in SUITES[settings.suite].reads if name not in ("presets", "vocab", "minutes")]
    about = {"settings": {name: getattr(settings, name) for name in flags}, "machine": machine(settings.device),
             "code": commit()}
    failed = []
    with at_most(settings.minutes) if settings.suite == "gpu" else contextlib.nullcontext():
        for name, measure in cells(settings):
            if not records.measure(settings.suite, name, about, measure):
                failed.append(name)
            free_memory(settings)
    of_this_code = [record for record in records.all()
                    if record["suite"] == settings.suite and record["about"]["code"] == about["code"]]
    print(tables(of_this_code))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse(Bench))

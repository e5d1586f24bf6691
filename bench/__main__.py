"""How fast it is: every figure a ratio to a limit, to a peer or to itself, measured in one run.

    python -m bench train                     # tokens/s, share of the matmul rate, parts, peers
    python -m bench dtypes --threads 1        # float32 and bfloat16, eager and compiled, and peers
    python -m bench kd                        # a step of distillation over its roofline; memory
    python -m bench cuts --presets 1m 135m    # pauses of a cut and a slice; the prune stage
    python -m bench infer                     # prefill, decoding, memory; ours and llama.cpp's
    python -m bench start                     # seconds to --help and of a run of one step
    python -m bench disk                      # checkpoints against plain files
    python -m bench ddp                       # two processes against one
    python -m bench memory                    # peak of a process that shares a model, on 1, 2 and 4
    python -m bench scale                     # 2.8B -> 1.3B at 2T tokens, by accounting alone
    python -m bench fit                       # 2.8B and 8B on 1, 8 and 64 GPUs, by accounting alone
    python -m bench gpu --compile --out results/gpu.jsonl      # what matters on a GPU
    python -m bench report --out results/gpu.jsonl             # the tables again

What is compared takes turns (A B A B …), and so do the limits, which are measured in the same run.
Figures are medians over --rounds, of ratios taken within a round. Weights and tokens are random. A
GPU draws less power on zeros, so its clock rises behind cuts: compare within a round only. A cell
that --out has from the same commit, settings and machine is not measured again, so a command that
was stopped goes on. A cell that fails is recorded as such, and the exit code is 1.
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
from bench import dtypes, inference, memory, system, training
from bench.timing import Records, machine, tables
from bench.variants import GPT2, LLAMA, SHAPES, STAGES
from common import UserError, commit, parse, pick_device, refuse_idle, run

# -- suites

# Groups of flags.
SHAPE = ("presets", "vocab")
STEPS = ("block_size", "micro_batch", "micro_steps", "steps", "rounds", "threads", "device")
TRAINING = ("enlarge_ff", *STEPS, "dtype", "compile")
INFERENCE = ("keep", "prompt", "decode", "rounds", "threads", "dtype", "device")


@dataclass(frozen=True)
class Suite:
    """The cells of a suite, and what the suite reads of the command line."""
    measures: dict                   # {end of a cell's name: function(settings, shape, vocabulary)}
    reads: tuple[str, ...]           # flags
    presets: tuple[str, ...] = ()    # default of --presets
    vocab: tuple[int, ...] = ()      # default of --vocab; (): the shape's own
    defaults: dict = field(default_factory=dict)     # other defaults that only hold here


train = partial(training.stages, names=(*STAGES, GPT2, LLAMA))
distillation = partial(training.stages, names=training.KD, memory=True)
gpu = {
    ", infer": inference.infer,
    ", recover": partial(training.stages, names=(*training.KD, GPT2), memory=True),
    # What two cells train alike is compiled once, as the compiler keeps it on the disk.
    ", prune": partial(training.stages, names=("prune", "prune, KD")),
    ", cuts": training.cuts,
}
# A cell for each number of processes, so that a command that was stopped goes on with the next one.
processes = {f", world {n}": partial(memory.measured, n) for n in (1, 2, 4)}
SUITES = {
    "train": Suite({"": train}, (*SHAPE, *TRAINING), ("laptop",), (256, 50257)),
    "dtypes": Suite({"": dtypes.dtypes}, (*SHAPE, *STEPS, "peers", "eager"), ("laptop", "4x256"), (256,)),
    "kd": Suite({"": distillation}, (*SHAPE, *TRAINING), ("laptop",), (49152,)),
    "cuts": Suite({"": training.cuts}, (*SHAPE, *TRAINING), ("1m", "135m"), (), {"rounds": 3}),
    "infer": Suite({"": inference.infer}, (*SHAPE, *INFERENCE), ("135m",)),
    "start": Suite({"": system.start}, ("presets", "rounds", "device"), ("laptop",), (), {"rounds": 3}),
    "disk": Suite({"": system.disk}, (*SHAPE, "disk", "rounds"), ("124m",), (50257,)),
    "ddp": Suite({"": training.ddp}, (*SHAPE, "block_size", "micro_batch", "steps", "rounds", "threads"),
                 ("laptop",), (256,)),
    "memory": Suite(processes, (*SHAPE, "block_size", "micro_batch"), ("124m",), (256,),
                    {"block_size": 128, "micro_batch": 2}),
    "scale": Suite({"": system.scale}, (*SHAPE, "enlarge_ff", "micro_batch"), ("1.3b",), (50257,),
                   {"micro_batch": 1}),
    "fit": Suite({"": memory.fit}, (*SHAPE, "block_size", "micro_batch"), ("2.8b", "8b"), (), {"micro_batch": 1}),
    "gpu": Suite(gpu, (*SHAPE, *INFERENCE, *TRAINING, "minutes"), ("124m", "1.3b"), (50304,),
                 {"rounds": 3, "steps": 5}),
    "report": Suite({}, ()),
}
SuiteName = Literal[tuple(SUITES)]
ShapeName = Literal[(*SHAPES, *models.PRESETS)]


# -- settings

@dataclass(frozen=True)
class Bench:
    suite: SuiteName                       # what to measure; report: print the tables of --out
    out: str = "runs/bench.jsonl"          # file of records
    presets: tuple[ShapeName, ...] = ()    # shapes; default: the suite's
    vocab: tuple[int, ...] = ()            # sizes of the vocabulary; default: the suite's or shape's
    rounds: int | None = None              # timed ones, after one that is not; default: 5 or 3
    steps: int | None = None               # in a round; default: 15, large vocabulary: 3, gpu: 5, dtypes: a second's
    block_size: int | None = None          # tokens of context; default: the shape's
    micro_batch: int | None = None         # sequences per forward pass; default: by the shape's size
    micro_steps: int = 1                   # forward passes per step
    enlarge_ff: float = 2.6                # times the target's FFN neurons, in the enlarged model
    keep: float = 0.8                      # infer: kept fraction of the removable parameters
    prompt: tuple[int, ...] = (128, 1024)  # infer: tokens; a table's row for each
    decode: int = 64                       # infer: tokens
    disk: str | None = None                # disk: a folder on it; default: that of --out
    minutes: float = 8.0                   # gpu: then it stops; the same command goes on
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # bfloat16 is autocast; auto: on a GPU
    compile: bool = False                  # torch.compile, ours and the peers'
    peers: bool = True                     # dtypes: nanoGPT's and transformers' models as well
    eager: bool = False                    # dtypes: nothing compiled
    threads: int | None = None             # of a process; default: PyTorch's own number
    device: str = "auto"                   # auto, cpu, cuda, mps


LEAST = {"rounds": 1, "steps": 2, "block_size": 1, "micro_batch": 1, "micro_steps": 1, "enlarge_ff": 1,
         "prompt": 1, "decode": 2, "threads": 1}


def check_ranges(settings):
    """Raise UserError for numbers that mean nothing. A round has at least 2 steps, as units are
    scored in the step before a cut."""
    for name, least in LEAST.items():
        value = getattr(settings, name)
        smallest = min(value, default=0) if isinstance(value, tuple) else value
        if smallest is not None and not smallest >= least:
            raise UserError(f"--{name.replace('_', '-')} {smallest} must be at least {least}")
    if min(settings.vocab, default=2) < 2:
        raise UserError(f"--vocab {min(settings.vocab)} must be at least 2")
    if not 0 < settings.keep <= 1:
        raise UserError(f"--keep {settings.keep} must be above 0 and at most 1")
    if not settings.minutes > 0:
        raise UserError(f"--minutes {settings.minutes} must be above 0")


def resolve(settings):
    """Fill the suite's defaults and those that depend on the machine. Raises UserError for a flag
    that the suite does not read, and for a number that means nothing."""
    suite = SUITES[settings.suite]
    names = [flag.name for flag in dataclasses.fields(settings)]
    idle = [name for name in names if name not in ("suite", "out", *suite.reads)]
    refuse_idle(settings, idle, f"in {settings.suite}")
    check_ranges(settings)
    defaults = {"rounds": 5, **suite.defaults}
    filled = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    filled["presets"] = settings.presets or suite.presets
    filled["vocab"] = settings.vocab or suite.vocab
    filled["threads"] = settings.threads or torch.get_num_threads()
    filled["device"] = pick_device(settings.device) if "device" in suite.reads else "cpu"
    if settings.dtype == "auto":
        filled["dtype"] = "bfloat16" if filled["device"].startswith("cuda") else "float32"
    return dataclasses.replace(settings, **filled)


def cells(settings):
    """The cells of a suite, in the order in which they are measured: [(name, function)]."""
    planned = []
    for preset in settings.presets:
        own = SHAPES[preset].vocab_size if preset in SHAPES else 256
        for vocab_size in settings.vocab or (own,):
            for end, measure in SUITES[settings.suite].measures.items():
                name = f"{preset}, V = {vocab_size}{end}"
                planned.append((name, partial(measure, settings, preset, vocab_size)))
    return planned


# -- a run of a suite

ALARM_SECONDS = 15           # between two alarms, as a compiler may swallow the first one


class TimeIsUp(BaseException):
    """Not an Exception, so that nothing that a cell calls catches it."""


@contextlib.contextmanager
def at_most(minutes):
    """End the block after so many minutes. The cell that is being measured is lost; finished ones
    have been written."""
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
    if settings.compile or settings.suite == "dtypes":
        torch.compiler.reset()
    if settings.device.startswith("cuda"):
        torch.cuda.empty_cache()


def main(settings):
    settings = resolve(settings)
    torch.set_num_threads(settings.threads)
    suite = settings.suite
    records = Records(settings.out)
    if suite == "report":
        if not records.all():
            raise UserError(f"{records.file} has no records; give the --out of a suite that ran")
        print(tables(records.all()))
        return
    recorded = [name for name in SUITES[suite].reads if name not in (*SHAPE, "minutes")]
    about = {"settings": {name: getattr(settings, name) for name in recorded},
             "machine": machine(settings.device), "code": commit()}
    failed = []
    with at_most(settings.minutes) if suite == "gpu" else contextlib.nullcontext():
        for name, measure in cells(settings):
            if not records.measure(suite, name, about, measure):
                failed.append(name)
            free_memory(settings)
    of_suite = [record for record in records.all() if record["suite"] == suite]
    print(tables([record for record in of_suite if record["about"]["code"] == about["code"]]))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse(Bench))

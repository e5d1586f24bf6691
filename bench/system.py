"""Suites of bench/__main__.py about what surrounds the steps: how soon a run begins, the disk, and what a large run would take.

    python -m bench scale                          # 2.8B -> 1.3B at 2T tokens, by the model's own accounting

`scale` measures nothing: every number that it assumes stands here and in the table.
"""
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import checkpoint
import model as models
import train
from bench.timing import interleave, median_ratio, own_process, peak
from bench.training import shapes
from common import UserError, write_atomic
from distill import CHUNK_VALUES
from schedule import PLANS
from steps import make_optimizer

ROOT = Path(__file__).parent.parent
TOKENS, GPUS = 2e12, (1, 8, 512)              # `scale`: the paper's tokens; numbers of GPUs
PEAK_FLOPS, UTILISATION = 1e15, 0.4           # per second, of a GPU in bfloat16; reached of it: round, no card's
WEIGHT_BYTES, ACTIVATION_BYTES = 4, 2         # of a weight, its gradient, each moment; of a value kept for backward
FIRST_STEP = """import json, os, steps, time, train
steps.Run.account = lambda r, *_: print(json.dumps([time.time(), r.state.seconds]), flush=True) or os._exit(0)
train.run(lambda: train.main(train.parse(train.Train), quiet=True))"""       # account is called right behind the update
median = statistics.median


# -- start

def first_step(flags, empty=False):
    """Launch train.py -> (seconds to the end of its first step, {part: seconds} of them that the run itself counts);
    `empty`: in an empty folder, where no corpus is cached."""
    with tempfile.TemporaryDirectory() as folder:
        launched = time.time()
        done = subprocess.run([sys.executable, "-c", FIRST_STEP, "--out", f"{folder}/run", *flags],
                              cwd=folder if empty else ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train.py {' '.join(flags)} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    at, parts = json.loads(done.stdout.splitlines()[-1])
    return at - launched, parts


def start(c, preset, _):
    """Seconds of `train.py --help`, and of the default run from its launch to the end of its first step."""
    flags, runs = ["--preset", preset, "--device", c.device], []
    cold, _ = first_step(flags, empty=True)
    command = [sys.executable, "train.py", "--help"]
    calls = {"help": lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL),
             "first step": lambda: runs.append(first_step(flags))}
    helps = interleave(calls, c.rounds)["help"]
    runs = runs[1:]                                                   # the first one filled the caches
    parts = {part: median([found[part] for _, found in runs]) for part in runs[0][1]}
    rows = [{"what": "python train.py --help", "s": median(helps)},
            {"what": "the first launch, in an empty folder, to the end of step 1", "s": cold},
            {"what": f"python train.py --preset {preset}, to the end of step 1", "s": median([s for s, _ in runs]),
             **{f"of which {part}": s for part, s in parts.items() if s}}]
    return {"rows": rows, "seconds": {"help": helps, "first step": [s for s, _ in runs]}}


# -- disk

def sync(path):
    """Out to the disk, and out of the page cache where the system can be asked for that (Linux)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rounds(c, config):
    """In turns: checkpoint.save, a plain file of the same size written; checkpoint.load, that file read. -> bytes,
    {name: [seconds]}, {"save" | "load": peak memory}"""
    model = models.GPT(config)
    optimizer = make_optimizer(model, train.Train(lr=1e-4))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()                                                   # now it has its moments
    optimizer.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory(dir=c.disk) as folder:
        ours, plain = Path(folder) / "ckpt_00000000.pt", Path(folder) / "plain"

        def save():
            checkpoint.save(ours, model, optimizer=optimizer.state_dict())

        def write():                                                   # a new file too: an old one's memory is warm
            write_atomic(plain, lambda file: file.write(content))

        def read():
            with open(plain, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

        with peak("cpu") as saving:
            save()
        size = ours.stat().st_size
        with peak("cpu") as loading:
            checkpoint.load(ours)
        content, buffer = os.urandom(size), bytearray(2**24)           # random: no disk compresses it
        writing = interleave({"save": save, "write": write}, c.rounds)
        reading = interleave({"forget": lambda: (sync(ours), sync(plain)), "load": lambda: checkpoint.load(ours),
                              "read": read}, c.rounds)
    return size, writing | reading, {"save": saving, "load": loading}


def disk(c, preset, vocab_size):
    """Checkpoints with the optimizer's moments against a plain file of the same size on the same disk (a new one
    written, fsynced and renamed; read, from the disk where the system can be asked to forget it). Random weights."""
    c = dataclasses.replace(c, disk=c.disk or str(Path(c.out).parent))
    Path(c.disk).mkdir(parents=True, exist_ok=True)
    size, seconds, memory = own_process(disk_rounds, c, shapes(preset, vocab_size)[0])
    rows = []
    for ours, plain in (("save", "write"), ("load", "read")):
        raised = memory[ours]["peak_bytes"] - memory[ours]["before_bytes"]
        rows.append({"shape": preset, "V": vocab_size, "what": f"checkpoint.{ours}", "bytes": size,
                     "s": median(seconds[ours]), "bytes/s": size / median(seconds[ours]),
                     "plain file's bytes/s": size / median(seconds[plain]),
                     "share of it": median_ratio(seconds[plain], seconds[ours]),
                     "peak raised by": raised, "÷ file": raised / size})
    return {"rows": rows, "seconds": seconds, "memory": memory}


# -- scale

def kept_bytes(config, weight_bytes, activation_bytes):
    """Bytes per token that an eager training step keeps for the backward pass, nothing recomputed; torch.compile keeps
    fewer. In the weights' dtype: each norm's input and its normalised form, the loss's gradient in hidden states. In
    the matrices': what each matrix reads, once for every reader where autocast casts it; q, k, v as the attention
    kernel takes them (k and v repeated for every query head) and its output; gate, up, silu(gate)."""
    C, D, casts = config.d_model, config.head_dim, activation_bytes != weight_bytes
    attention, ffn = [h for h in config.n_head if h], [f for f in config.d_ff if f]
    stream = 2 * C * (len(attention) + len(ffn) + 1) + C
    others = sum((3 if casts else 1) * C + 4 * h * D for h in attention) + sum((1 + casts) * C + 4 * f for f in ffn)
    return stream * weight_bytes + others * activation_bytes


def step_bytes(config, micro_batch, weight_bytes=WEIGHT_BYTES, activation_bytes=ACTIVATION_BYTES):
    """{part: bytes} of one process that trains `config`: weights, gradients, Adam's two moments; what a micro-batch
    keeps; the blocks' matrices cast to another dtype, as autocast does; of the loss the head's gradient and one chunk's
    logits, 4 arrays in float32."""
    p, n = config.num_params(), config.num_params()["total"]
    cast = (p["attention"] + p["ffn"]) * activation_bytes * (activation_bytes != weight_bytes)
    return {"weights": n * weight_bytes, "gradients": n * weight_bytes, "Adam": 2 * n * weight_bytes,
            "activations": micro_batch * config.block_size * kept_bytes(config, weight_bytes, activation_bytes),
            "cast weights": cast,
            "loss": config.vocab_size * config.d_model * weight_bytes + 4 * 4 * CHUNK_VALUES["gpu"]}


def plan_flops(plan, target, enlarged):
    """Training FLOPs per token of a plan, mean over its stages, attention over the whole T x T square: the enlarged
    model until the last cut, then the target; the teacher, the enlarged model, forward where a stage has one."""
    T, total = target.block_size, 0.0
    for stage in PLANS[plan]:
        model = target if stage.name == "recover" else enlarged
        total += stage.share * (model.flops_per_token(T) + stage.kd * enlarged.flops_per_token(T, backward=False))
    return total


def scale(c, preset, vocab_size):
    """Memory per GPU (nothing is sharded: DDP holds all on each) and days of training, at most: causal attention does
    half of the square that is counted."""
    target, enlarged = shapes(preset, vocab_size, c.enlarge_ff)
    rows = []
    for name, config in (("enlarged", enlarged), ("target", target)):
        parts = step_bytes(config, c.micro_batch)
        rows.append({"table": "memory per GPU, GB", "model": name, "params": config.num_params()["total"],
                     **{part: size / 1e9 for part, size in parts.items()}, "sum": sum(parts.values()) / 1e9,
                     "sequences": c.micro_batch, "bytes per weight": WEIGHT_BYTES,
                     "bytes per activation": ACTIVATION_BYTES})
    for plan in ("scratch", "idea", "idea-kd"):
        flops = TOKENS * plan_flops(plan, target, enlarged)
        for gpus in GPUS:
            days = flops / (gpus * PEAK_FLOPS * UTILISATION) / 86400
            rows.append({"table": "time", "plan": plan, "tokens": TOKENS, "FLOPs at most": flops, "GPUs": gpus,
                         "peak FLOP/s of one": PEAK_FLOPS, "utilisation": UTILISATION, "days at most": days,
                         "GPU-days at most": days * gpus})
    return {"rows": rows}

"""The suites of `python -m bench` about what surrounds the steps: start, disk and scale.

    python -m bench scale          # 2.8B -> 1.3B at 2T tokens, by the model's own accounting

`scale` measures nothing. Every number that it assumes is below and in its table.
"""
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
import report
import train
from bench.timing import interleave, median_ratio, own_process, peak
from bench.variants import shapes
from common import UserError, write_atomic
from distill import CHUNK_VALUES
from formats.pt import on_host
from schedule import PLANS

ROOT = Path(__file__).parent.parent
ONE_STEP = ("train.py", "--plan", "scratch", "--steps", "1")
TOKENS = 2e12                # the paper's tokens
GPUS = (1, 8, 512)
PEAK_FLOPS = 1e15            # per second, of a GPU in bfloat16: a round number, no card's
UTILISATION = 0.4            # what is reached of it
WEIGHT_BYTES = 4             # of a weight, its gradient and each of its moments
ACTIVATION_BYTES = 2         # of a value that is kept for the backward pass
median = statistics.median


# -- start

def one_step_run(flags):
    """Run train.py for one step in a process of its own, with the corpus, two evaluations,
    checkpoints and a summary: -> seconds from launch to exit, {part: seconds} that the run counts
    itself. Raises UserError if the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *ONE_STEP, "--out", folder, *flags]
        start = time.perf_counter()
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if ended.returncode:
            raise UserError(f"train.py {' '.join(flags)} ended with {ended.returncode}: "
                            f"{ended.stderr.strip()[-200:]}")
        return seconds, report.records(folder)["summary"][0]["seconds"]


def start(settings, preset, vocab_size):
    """The seconds of `train.py --help`, and of a whole run of one step. The tokens are bytes,
    whatever `vocab_size`."""
    runs = []
    command = [sys.executable, "train.py", "--help"]
    flags = ("--preset", preset, "--device", settings.device)
    calls = {"help": lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True),
             "one step": lambda: runs.append(one_step_run(flags))}
    seconds = interleave(calls, settings.rounds)
    help_row = {"what": "python train.py --help", "s": median(seconds["help"])}
    step_row = {"what": f"python {' '.join(ONE_STEP)} --preset {preset}",
                "s": median(seconds["one step"])}
    counted = [parts for _, parts in runs[1:]]           # the first round does not count
    for part in counted[0]:
        part_seconds = median([parts[part] for parts in counted])
        if part_seconds:
            step_row[f"of which {part}"] = part_seconds
    return {"rows": [help_row, step_row], "seconds": seconds}


# -- disk

def forget(path):
    """Write a file out to the disk, and out of the page cache where the system can be asked for
    that (Linux)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def trained(config):
    """A model with random weights and its optimizer, which has moments."""
    model = models.GPT(config)
    optimizer = train.make_optimizer(model, train.Train(lr=1e-4))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def disk_rounds(folder, rounds, config):
    """In turns: save a checkpoint, write a plain file of the same size; load the checkpoint, read
    the file. -> bytes of the file, {name: [seconds]}, {"save" and "load": memory}."""
    model, optimizer = trained(config)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        saved = Path(scratch) / "ckpt_00000000.pt"
        plain = Path(scratch) / "plain"

        def save():
            checkpoint.save(saved, model, optimizer=optimizer.state_dict())

        def load():
            _, about = checkpoint.load(saved)
            # The moments stay in the file until they are used.
            on_host(about["optimizer"])

        def write():
            # A new file, as the memory of an old one is warm.
            write_atomic(plain, lambda file: file.write(content))

        def read():
            with open(plain, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

        def forget_both():
            forget(saved)
            forget(plain)

        with peak("cpu") as saving:
            save()
        with peak("cpu") as loading:
            load()
        size = saved.stat().st_size
        content = os.urandom(size)                       # random, so that no disk compresses it
        buffer = bytearray(2**24)
        seconds = interleave({"save": save, "write": write}, rounds)
        seconds |= interleave({"forget": forget_both, "load": load, "read": read}, rounds)
    return size, seconds, {"save": saving, "load": loading}


def disk(settings, preset, vocab_size):
    """Checkpoints with the optimizer's moments against a plain file of the same size on the same
    disk. The plain file is written anew, fsynced and renamed, and read from the disk where the
    system can be asked to forget it."""
    folder = settings.disk or str(Path(settings.out).parent)
    Path(folder).mkdir(parents=True, exist_ok=True)
    config, _ = shapes(preset, vocab_size)
    size, seconds, memory = own_process(disk_rounds, folder, settings.rounds, config)
    rows = []
    for action, plain in (("save", "write"), ("load", "read")):
        raised = memory[action]["peak_bytes"] - memory[action]["before_bytes"]
        rows.append({"shape": preset, "V": vocab_size, "what": f"checkpoint.{action}", "bytes": size,
                     "s": median(seconds[action]), "bytes/s": size / median(seconds[action]),
                     "plain file's bytes/s": size / median(seconds[plain]),
                     "share of it": median_ratio(seconds[plain], seconds[action]),
                     "peak raised by": raised, "÷ file": raised / size})
    return {"rows": rows, "seconds": seconds, "memory": memory}


# -- scale

def kept_bytes(config, activation_bytes):
    """The bytes per token that an eager training step keeps for the backward pass if nothing is
    recomputed. A compiled step keeps fewer."""
    C = config.d_model
    D = config.head_dim
    attention = [heads for heads in config.n_head if heads]
    ffn = [d_ff for d_ff in config.d_ff if d_ff]

    # The input of each norm, and the loss's gradient in hidden states.
    kept = C * (len(attention) + len(ffn) + 1) + C
    # What the matrices read; q, k, v as the attention kernel takes them (k and v for every query
    # head) and its output; gate, up, silu(gate) and their product.
    for heads in attention:
        kept += C + 4 * heads * D
    for d_ff in ffn:
        kept += C + 4 * d_ff
    # In float32 a number for each norm and each head.
    rows = len(attention) + len(ffn) + 1 + sum(attention)
    return kept * activation_bytes + rows * 4


def step_bytes(config, micro_batch, weight_bytes=WEIGHT_BYTES, activation_bytes=ACTIVATION_BYTES):
    """{part: bytes} of a process that trains this model. Autocast casts the matrices of the blocks.
    The loss holds the gradient of the head and four float32 arrays of a chunk's logits."""
    params = config.num_params()
    weights = params["total"] * weight_bytes
    tokens = micro_batch * config.block_size
    cast = 0
    if activation_bytes != weight_bytes:
        cast = (params["attention"] + params["ffn"]) * activation_bytes
    return {"weights": weights, "gradients": weights, "Adam": 2 * weights,
            "activations": tokens * kept_bytes(config, activation_bytes),
            "cast weights": cast,
            "loss": config.vocab_size * config.d_model * weight_bytes + 4 * 4 * CHUNK_VALUES["gpu"]}


def plan_flops(plan, target, enlarged):
    """The training FLOPs per token of a plan, as a mean over its stages, with attention over the
    whole T x T square: the enlarged model until the last cut, then the target; in a stage with
    distillation a forward pass of the enlarged model as well."""
    T = target.block_size
    total = 0.0
    for stage in PLANS[plan]:
        model = target if stage.name == "recover" else enlarged
        flops = model.flops_per_token(T)
        if stage.kd:
            flops += enlarged.flops_per_token(T, backward=False)
        total += stage.share * flops
    return total


def scale(settings, preset, vocab_size):
    """The memory per GPU (nothing is sharded: DDP holds all on each) and the days of training, at
    most, as causal attention does half of the square that is counted."""
    target, enlarged = shapes(preset, vocab_size, settings.enlarge_ff)
    rows = []
    for name, config in (("enlarged", enlarged), ("target", target)):
        parts = step_bytes(config, settings.micro_batch)
        gigabytes = {part: size / 1e9 for part, size in parts.items()}
        rows.append({"table": "memory per GPU, GB", "model": name,
                     "params": config.num_params()["total"], **gigabytes,
                     "sum": sum(gigabytes.values()), "sequences": settings.micro_batch,
                     "bytes per weight": WEIGHT_BYTES, "bytes per activation": ACTIVATION_BYTES})
    for plan in ("scratch", "idea", "idea-kd"):
        flops = TOKENS * plan_flops(plan, target, enlarged)
        gpu_days = flops / (PEAK_FLOPS * UTILISATION) / 86400
        for gpus in GPUS:
            rows.append({"table": "time", "plan": plan, "tokens": TOKENS, "FLOPs at most": flops,
                         "GPUs": gpus, "peak FLOP/s of one": PEAK_FLOPS,
                         "utilisation": UTILISATION, "days at most": gpu_days / gpus,
                         "GPU-days at most": gpu_days})
    return {"rows": rows}

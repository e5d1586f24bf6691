"""How much memory it takes to cut a model: by accounting for any size, and measured where it fits.

    python -m bench.cut_memory --shape 8b --weights bfloat16          # accounting alone
    python -m bench.cut_memory --shape 100m --measure                 # and measured in a process of its own
    python -m bench.cut_memory --shape 70b --weights bfloat16 --offload

The five phases of prune.py are loading, the calibration pass, the cut, sequential mending and the loss
of the smaller model. Weights and sums are counted to the byte; what a pass, a fit and a loss hold
besides is counted by their largest tensors. Weights and tokens of the measured model are random.
"""
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import prune
from bench.timing import own_process, peak
from common import parse, pick_device, refuse_idle, run
from distill import CHUNK_VALUES
from model import GPT, GPTConfig
from report import markdown
from score import GRADIENTS, SCORES

SHAPES = {
    "100m": GPTConfig(32768, 1024, 768, 64, (12,) * 12, (4,) * 12, (2048,) * 12),
    # LLaMA-3.1-8B and 70B.
    "8b": GPTConfig(128256, 131072, 4096, 128, (32,) * 32, (8,) * 32, (14336,) * 32, tie_embeddings=False),
    "70b": GPTConfig(128256, 131072, 8192, 128, (64,) * 80, (8,) * 80, (28672,) * 80, tie_embeddings=False),
}


@dataclass(frozen=True)
class CutMemory:
    shape: Literal[tuple(SHAPES)] = "100m"
    weights: Literal["float32", "bfloat16"] = "float32"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"    # of the passes and losses
    offload: bool = False         # the layers in main memory, one at a time on the device
    score: Literal[tuple(SCORES)] = "taylor"
    keep: float = 0.5
    windows: int = 32             # of the calibration text
    block_size: int = 512         # tokens in a window
    micro_batch: int = 4          # windows per forward pass
    measure: bool = False         # cut a random model as well
    device: str = "cpu"           # of the measured cut


def recipe_of(settings):
    names = ("weights", "dtype", "offload", "score", "keep", "windows", "block_size", "micro_batch")
    return prune.Prune(mend="sequential", **{name: getattr(settings, name) for name in names})


# -- accounting

@dataclass
class Memory:
    """Bytes in the memory of the device, and in main memory beside it."""
    device: float = 0
    host: float = 0


def sums_bytes(config, needs):
    """Of the sums of a calibration pass, as far as they are of a matrix's size."""
    gradients = 4 * config.removable_params() * len(needs & {"grad", "grad_sq"})
    inputs = [*config.d_ff, *(config.head_dim * heads for heads in config.n_head)]
    return gradients + 4 * sum(n * n for n in inputs) * ("gram" in needs)


def activations_bytes(config, layer, bytes_each):
    """What one token leaves behind in a layer for the backward pass."""
    heads = config.head_dim * config.n_head[layer]
    kv_heads = config.head_dim * config.n_kv_head[layer]
    # The stream and its norm, twice; q, k, v and what attention puts out; gate, up, silu(gate) and the
    # product.
    values = 4 * config.d_model + 2 * heads + 2 * kv_heads + 4 * config.d_ff[layer]
    return values * bytes_each


def layer_params(config, layer):
    """Parameters of one layer, without its norms."""
    return sum(n * config.unit_params(*key) for key, n in config.widths().items() if key[0] == layer)


def accounting(config, small, settings, kind="gpu"):
    """{phase: Memory} of cutting `config` to `small`. `kind`: see distill.CHUNK_VALUES."""
    weight = getattr(torch, settings.weights).itemsize
    product = getattr(torch, settings.dtype).itemsize
    # In the passes, weights of another dtype than the products' are there a second time.
    in_passes = weight if product == weight else weight + product
    layers = range(config.n_layer)
    total = config.num_params()["total"]
    left = small.num_params()["total"]
    needs = prune.needs(recipe_of(settings))
    sums = sums_bytes(config, needs)

    batch = settings.micro_batch * settings.block_size
    tokens = settings.windows * settings.block_size
    activations = [batch * activations_bytes(config, layer, product) for layer in layers]
    backward = not GRADIENTS.isdisjoint(needs)
    logits = CHUNK_VALUES[kind] * (product + 4)
    # The streams of both models in front of a sub-block and those behind it; Gram matrices of two parts
    # of the text and their sum in float32, and what solves them in float64.
    widest = max(*small.d_ff, small.head_dim * max(small.n_head))
    fit = 3 * 4 * tokens * config.d_model + 3 * (4 + 8) * widest**2

    if not settings.offload:
        kept = sum(activations) if backward else max(activations)
        return {"load": Memory(weight * total), "calibrate": Memory(in_passes * total + sums + kept + logits),
                "cut": Memory(weight * (total + left) + sums), "mend": Memory(weight * (total + left) + fit),
                "measure": Memory(in_passes * left + logits)}

    blocks = sum(layer_params(config, layer) for layer in layers)
    left_blocks = sum(layer_params(small, layer) for layer in layers)
    largest = max(layer_params(config, layer) for layer in layers)
    outside = total - blocks
    # In main memory: the stream in front of each layer, and its gradient behind the last one.
    streams = (config.n_layer + 2) * tokens * config.d_model * product
    layer_pass = product * largest + sums / config.n_layer + max(activations) + logits
    return {
        "load": Memory(weight * outside, weight * blocks),
        "calibrate": Memory(in_passes * outside + layer_pass, in_passes * blocks + sums + streams),
        "cut": Memory(2 * weight * outside, weight * (blocks + left_blocks) + sums),
        "mend": Memory(2 * weight * outside + weight * largest + fit, weight * (blocks + left_blocks)),
        "measure": Memory(in_passes * outside + product * largest + logits, in_passes * left_blocks)}


# -- measured

def measured(settings, file, device):
    """{phase: the most bytes in use} of cutting the model in `file`, in this process, above what it
    held before; and the smaller model's config."""
    recipe = dataclasses.replace(recipe_of(settings), init=file)
    config = SHAPES[settings.shape]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (settings.windows, settings.block_size + 1), generator=generator)
    batches = [(rows[:, :-1], rows[:, 1:]) for rows in tokens.split(settings.micro_batch)]
    dtype = getattr(torch, settings.dtype)
    peaks = {}
    with peak(device) as memory:
        model, _ = prune.load(recipe, device)
    before = memory["before_bytes"]
    peaks["load"] = memory["peak_bytes"]
    with peak(device) as memory:
        stats = prune.collect(model, batches, recipe, dtype)
    peaks["calibrate"] = memory["peak_bytes"]
    with peak(device) as memory:
        small = prune.cut_once(model, stats, recipe, int(settings.keep * config.removable_params()))
        del stats
    peaks["cut"] = memory["peak_bytes"]
    with peak(device) as memory:
        prune.mend_side_by_side_(recipe, small, model, batches, dtype, is_last=True)
        del model
    peaks["mend"] = memory["peak_bytes"]
    with peak(device) as memory:
        prune.evaluate(prune.in_dtype(small, dtype), tokens.flatten().numpy(), np.ones(config.vocab_size),
                       settings.windows, batch=settings.micro_batch, block_size=settings.block_size)
    peaks["measure"] = memory["peak_bytes"]
    return {phase: most - before for phase, most in peaks.items()}, small.config


def save_random(file, config, dtype):
    """A random model, as a checkpoint."""
    torch.manual_seed(0)
    checkpoint.save(file, GPT(config).to(dtype))


def rows_of(settings, device):
    """A table's row for each phase."""
    config = SHAPES[settings.shape]
    peaks = {}
    small = config.resized({key: round(settings.keep * n) for key, n in config.widths().items()})
    if settings.measure:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "random.pt")
            own_process(save_random, file, config, torch.bfloat16)
            peaks, small = own_process(measured, settings, file, device)
    kind = "gpu" if not settings.measure or device != "cpu" else "cpu, bfloat16"
    params = config.num_params()["total"]
    rows = []
    for phase, memory in accounting(config, small, settings, kind).items():
        row = [phase, *(f"{part / 1e9:.2f}" for part in (memory.device, memory.host)),
               f"{(memory.device + memory.host) / params:.1f}"]
        if peaks:
            row += [f"{peaks[phase] / 1e9:.2f}", f"{peaks[phase] / params:.1f}"]
        rows.append(row)
    return rows


def check(settings):
    """Raise UserError for settings that mean nothing."""
    prune.check(recipe_of(settings))
    if not settings.measure:
        refuse_idle(settings, ("device",), "without --measure")


def main(settings):
    check(settings)
    head = ["phase", "device GB", "host GB", "bytes a parameter"]
    if settings.measure:
        head += ["measured GB", "bytes a parameter"]
    print(markdown(head, rows_of(settings, pick_device(settings.device))))


if __name__ == "__main__":
    run(lambda: main(parse(CutMemory)))

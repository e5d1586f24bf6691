"""Decode time as a budget: what a layer, a neuron and a KV group cost when llama.cpp writes a token.

    python prune.py --init smollm2 --keep 0.8 --budget ms --multiple-of 32      # needs gguf, xllamacpp
    python -m pytest tests/methods/test_latency.py      # planted costs come out exactly

Models with layers like those of the given one, narrower ones and shallower ones are written as GGUF
files in f16. llama.cpp decodes with all of them in turns, and least squares fits

    time of a token = constant + layers · (layer + neurons · neuron + groups · group)

in nanoseconds. The constant (embedding, head, sampling) cannot be removed, so these models have a
small vocabulary, and it does not drown what can. What a layer costs besides its units (norms,
waiting for threads) goes only with the whole layer: export.py leaves absent layers out of a GGUF,
and writes an absent sub-block of another layer as one unit of zeros. The costs are whole numbers, as
allocate.py's budgets need them. They hold for this machine, its number of threads and a short
context. ZipLM (arXiv 2302.04089) looks latencies up in a table of layer widths; a straight line is
our choice.
"""
import dataclasses
import importlib.util
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, progress
from formats import gguf_export, llamacpp
from formats.tokenizer import open_tokenizer
from model import GPT

# Tokens in front of those that are timed, tokens that are timed, and how often. The first time does
# not count (llamacpp.speed).
PROMPT = 32
TOKENS = 32
ROUNDS = 8
# Bytes of the largest measured model. With few layers the smallest ones would fit into a CPU's cache,
# decode at another speed, and bend the line (by 33 % with 6 of SmolLM2's 30 layers).
MOST_BYTES = 2**28


@dataclass(frozen=True)
class DecodeTime:
    """A resource for allocate.py: nanoseconds that llama.cpp takes for a token."""
    layer: int                    # of a layer, whatever its widths are
    neuron: int                   # of one FFN neuron of one layer
    group: int                    # of one KV group of one layer
    error: float = 0.0            # how far the fit misses a measured time at most, as a fraction

    def __str__(self):
        return "ns of a token"

    def unit(self, kind):
        """What one unit costs."""
        return self.neuron if kind == "ffn" else self.group

    def of(self, config):
        """The time of a token in all layers of a model."""
        units = sum(config.n_kv_head) * self.group + sum(config.d_ff) * self.neuron
        return depth_of(config) * self.layer + units

    def describe(self):
        return (f"llama.cpp's time of a token (f16, {torch.get_num_threads()} threads): {self.layer / 1e3:.1f} µs "
                f"for a layer, {32 * self.neuron / 1e3:.1f} µs for 32 of its neurons, {self.group / 1e3:.1f} µs "
                f"for a KV group; this misses what was measured by {self.error:.1%} at most")


def depth_of(config):
    """The number of layers that have a sub-block."""
    return sum(1 for units in zip(config.n_kv_head, config.d_ff) if any(units))


# -- measure

def shapes(config):
    """What is measured: [(layers, neurons, KV groups)], all layers of a model alike. The widest layer
    of `config` gives the largest shape, which comes first."""
    neurons = max(config.d_ff)
    groups = max(config.n_kv_head)
    in_f16 = 2 * of_shape(config, (1, neurons, groups)).removable_params()
    depth = min(depth_of(config), max(4, MOST_BYTES // in_f16))
    narrower = [(depth, round_to_32(neurons * share / 4), groups) for share in (2, 3)]
    fewer = sorted({groups * share // 4 for share in (1, 2, 3)} - {0, groups})
    fewer = [(depth, neurons, count) for count in fewer]
    largest = (depth, neurons, groups)
    less = math.ceil(depth * 2 / 3)
    shallow = [(less, neurons, groups), (less, narrower[0][1], max(1, groups // 4))]
    return list(dict.fromkeys([largest, *narrower, *fewer, *shallow]))


def round_to_32(neurons):
    """The nearest multiple of 32, as quantizers and vector units like it; at least one neuron."""
    return round(neurons / 32) * 32 or max(1, round(neurons))


def of_shape(config, shape):
    """The config with layers of this shape, and with a vocabulary of bytes."""
    depth, neurons, groups = shape
    widest = config.n_kv_head.index(max(config.n_kv_head))
    queries = groups * config.queries_per_group(widest)
    return dataclasses.replace(config, vocab_size=256, n_head=[queries] * depth,
                               n_kv_head=[groups] * depth, d_ff=[neurons] * depth)


def write(config, tokenizer, path):
    """Write a model of this config as a GGUF file. Its weights do not matter for its speed."""
    context = max(config.block_size, PROMPT + TOKENS + 1)
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config, block_size=context))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    gguf_export.write_gguf(model, tokenizer, path, "f16")


def decode_times(configs, tokenizer, speed=llamacpp.speed, rounds=ROUNDS):
    """The nanoseconds that llama.cpp takes for a token of models of these configs: [number].
    `speed(path, …)` measures a file. Raises UserError if xllamacpp is missing.

    Every round measures all models. The fastest round of each counts, since whatever else the
    machine does can only add to a time."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("decode time is measured in llama.cpp through the package xllamacpp; pip install "
                        "xllamacpp gguf, or give another --budget")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.gguf" for number in range(len(configs))]
        for config, path in zip(configs, paths):
            write(config, tokenizer, path)
        highest = [0.0] * len(paths)
        for _ in progress(range(rounds), "decode"):
            for number, path in enumerate(paths):
                rates = speed(path, prompt=PROMPT, tokens=TOKENS, repeats=1)
                highest[number] = max(highest[number], rates["decode"])
    return [1e9 / rate for rate in highest]


# -- fit

def fit(times):
    """{(layers, neurons, KV groups): nanoseconds} -> DecodeTime, by least squares of the relative
    errors. What did not vary counts as part of the layer, or of the constant. Raises UserError if a
    unit would cost nothing, where it varied: the timings are noise."""
    columns = {"constant": [], "layer": [], "neuron": [], "group": []}
    for depth, neurons, groups in times:
        for name, count in zip(columns, (1, depth, depth * neurons, depth * groups)):
            columns[name].append(count)
    depths, widths, counts = map(set, zip(*times))
    varied = {"constant": True, "layer": len(depths) > 1, "neuron": len(widths) > 1, "group": len(counts) > 1}
    columns = {name: counts for name, counts in columns.items() if varied[name]}
    costs, error = least_squares(columns, list(times.values()))
    # Nothing is quicker for having more layers, or a vocabulary: below 0 there is noise only.
    for name in ("layer", "constant"):
        if costs.get(name, 0) < 0:
            del columns[name]
            costs, error = least_squares(columns, list(times.values()))
    for name in ("neuron", "group"):
        if varied[name] and round(costs[name]) < 1:
            raise UserError(f"a {name} would cost {costs[name]:.1f} ns of decode time: the timings are noise, or "
                            "time is no straight line in the widths here; try again when the machine is idle, "
                            "with another number of threads (OMP_NUM_THREADS), or give another --budget")
    layer, neuron, group = (max(0, round(costs.get(name, 0))) for name in ("layer", "neuron", "group"))
    return DecodeTime(layer, neuron, group, error)


def least_squares(columns, times):
    """({name: cost}, the largest relative error) of the costs that explain times (n,) best, in relative
    errors. `columns` are {name: how often each time holds this cost, (n,)}."""
    times = torch.tensor(times, dtype=torch.float64)
    a = torch.tensor(list(columns.values()), dtype=torch.float64).T / times[:, None]
    # Columns of one size: the counts differ by a factor of ten thousands.
    sizes = a.norm(dim=0)
    solution = torch.linalg.lstsq(a / sizes, torch.ones_like(times)).solution / sizes
    error = (a @ solution - 1).abs().max().item()
    return dict(zip(columns, solution.tolist())), error


def measure(config, speed=llamacpp.speed, rounds=ROUNDS):
    """The DecodeTime of models of the shape of `config`."""
    measured_shapes = shapes(config)
    configs = [of_shape(config, shape) for shape in measured_shapes]
    times = decode_times(configs, open_tokenizer("bytes"), speed, rounds)
    return fit(dict(zip(measured_shapes, times)))


def report(cost, before, after, tokenizer, speed=llamacpp.speed, rounds=ROUNDS):
    """A sentence about the decode time of whole models of two configs, measured, and by how much it
    should differ by `cost`."""
    start, end = decode_times([before, after], tokenizer, speed, rounds)
    predicted = cost.of(before) - cost.of(after)
    return (f"llama.cpp decodes a token in {start / 1e6:.2f} -> {end / 1e6:.2f} ms, {end / start:.3f} of the "
            f"time: {(start - end) / 1e6:.2f} ms less, predicted were {predicted / 1e6:.2f}")

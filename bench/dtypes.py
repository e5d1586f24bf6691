"""The suite dtypes of `python -m bench`: float32 and bfloat16, eager and compiled, ours and the
peers', all in one run.

    python -m bench dtypes --presets laptop 4x256 --vocab 256 --threads 1
    python -m bench dtypes --presets toy 8x64 12x128 --vocab 256 --no-peers

Every model has one set of weights and moments, which all of its rows train in turns: bfloat16 is
autocast, so the weights are float32 in all rows. Ours trains in train.train, a peer in nanoGPT's
plain loop. The second command prints what --dtype auto and --compile may be chosen by. Not here:
what a row trains (bench/variants.py).
"""
import dataclasses
import statistics
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from bench.timing import interleave, kind_of, matmul, median_ratio
from bench.variants import GPT2, LLAMA, attention_square, fitted, peer_variant, plain_loop, stage_variant
from common import has_fast_bfloat16

OURS = "ours"
DTYPES = ("float32", "bfloat16")
ROUND_FLOPS = {"cpu": 5e10, "gpu": 2e13}       # in a round without --steps: about a second, as we chose
COLUMNS = {GPT2: "÷ nanoGPT's", LLAMA: "÷ transformers'"}    # ours over a peer's, like for like


@dataclass(frozen=True)
class Way:
    """How a row of the table trains."""
    model: str                   # OURS, GPT2 or LLAMA
    dtype: str
    compiled: bool

    @property
    def name(self):
        return f"{self.model}, {self.dtype}, {'compiled' if self.compiled else 'eager'}"


BASE = Way(OURS, "float32", compiled=False)


@dataclass
class Measured:
    """All that was measured of one shape."""
    about: dict                  # the first columns of every row
    steps: int                   # in a round
    variants: dict               # {model: Variant}
    seconds: dict                # {name of a Way, or matmul with a dtype: [seconds of each round]}
    matmul_flops: int

    def faster(self, way, other):
        """How many times as fast one Way is as another in each round."""
        rounds = zip(self.seconds[other.name], self.seconds[way.name])
        return [slow / fast for slow, fast in rounds]


def dtypes(settings, preset, vocab_size):
    """Time all ways of training a shape in turns, with a matrix product of each dtype as their
    limit."""
    # With a factor of 1 the shape is trained as it is named, and nothing is enlarged.
    load, target, _ = fitted(dataclasses.replace(settings, enlarge_ff=1.0), preset, vocab_size)
    flops = load.micro_batch * load.micro_steps * target.block_size * causal_flops(target)
    steps = settings.steps or max(1, round(ROUND_FLOPS[kind_of(load.device)] / flops))
    load = dataclasses.replace(load, steps=steps)
    compilations = (False,) if settings.eager else (False, True)
    variants = open_variants(load, target, settings.peers)
    ways = []
    for model in variants:
        for dtype in DTYPES:
            ways += [Way(model, dtype, compiled) for compiled in compilations]

    calls = {}
    for dtype in DTYPES:
        calls[f"matmul, {dtype}"], matmul_flops = matmul(getattr(torch, dtype), load.device)
    for way in ways:
        calls[way.name] = call_of(variants[way.model], way, load.steps)
    seconds = interleave(calls, load.rounds, load.device)

    about = {"shape": preset, "V": vocab_size, "d_model": target.d_model, "head_dim": target.head_dim,
             "tokens/step": load.micro_batch * load.micro_steps * target.block_size}
    measured = Measured(about, load.steps, variants, seconds, matmul_flops)
    rows = [row(measured, way) for way in ways]
    if settings.peers and LLAMA not in variants:
        rows.append({**about, "model": LLAMA, "note": "pip install transformers"})
    speed = "fast" if has_fast_bfloat16(load.device) else "slow"
    note = (f"; the device's bfloat16 is {speed}; ÷: how many times as fast, nanoGPT's and "
            "transformers' in the same dtype and compiled alike; FLOPs with causal attention")
    return {"rows": rows, "note": note, "seconds": seconds, "matmul_flops": matmul_flops}


def causal_flops(config):
    """The FLOPs per token of a training step, with half of attention's T x T square."""
    T = config.block_size
    return config.flops_per_token(T) - attention_square(config, T) / 2


def open_variants(load, target, peers):
    """{model: Variant}, each with enough steps for all ways of training it."""
    rounds = 2 * len(DTYPES) * (1 + load.rounds)
    variants = {OURS: stage_variant(load, "recover", target, target, rounds)}
    if peers:
        variants[GPT2] = peer_variant(load, GPT2, target, rounds)
    if peers and find_spec("transformers"):
        variants[LLAMA] = peer_variant(load, LLAMA, target, rounds)
    return variants


def call_of(variant, way, steps):
    """The function that trains a Variant this way for so many steps."""
    config = dataclasses.replace(variant.setup.config, dtype=way.dtype, compile=way.compiled)
    setup = dataclasses.replace(variant.setup, config=config)
    variant = dataclasses.replace(variant, setup=setup)
    if way.model == OURS:
        return partial(variant.go, steps)
    return partial(plain_loop, variant, steps)


def row(measured, way):
    """One way of training as a row of the table."""
    variant = measured.variants[way.model]
    config = variant.setup.start
    rounds = measured.seconds[way.name]
    tokens = measured.steps * measured.about["tokens/step"]
    columns = {**measured.about, "model": way.model, "params": config.num_params()["total"],
               "dtype": way.dtype, "compiled": way.compiled,
               "tokens/s": tokens / statistics.median(rounds)}

    if way.model == OURS:
        for peer in measured.variants:
            if peer != OURS:
                same = dataclasses.replace(way, model=peer)
                columns[COLUMNS[peer]] = statistics.median(measured.faster(way, same))
    gains = measured.faster(way, BASE)
    columns["÷ ours in float32, eager"] = statistics.median(gains)
    columns["lowest to highest of it"] = f"{min(gains):.2f} to {max(gains):.2f}"
    if way.compiled:
        eager = dataclasses.replace(way, compiled=False)
        columns["compiled ÷ eager"] = statistics.median(measured.faster(way, eager))

    # The time that matrix products with the FLOPs of a round would take, over that of the round.
    flops = tokens * causal_flops(config)
    limit = measured.seconds[f"matmul, {way.dtype}"]
    columns["FLOP/s, causal"] = flops / statistics.median(rounds)
    columns["of matmul's FLOP/s, causal"] = flops / measured.matmul_flops * median_ratio(limit, rounds)
    return columns

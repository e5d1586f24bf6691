"""Decode time as a budget: planted costs come out of the fit exactly, through real files; a budget in nanoseconds is
met; and what llama.cpp measures lies on the line.
"""
import dataclasses
import importlib.util
import random

import pytest
import torch
from helpers import EQUAL, SHAPE, new, random_config, random_scores, text

import allocate
import prune
from common import UserError
from formats.tokenizer import open_tokenizer
from methods import depth, latency
from model import GPTConfig

CONSTANT = 900_123
PLANTED = latency.DecodeTime(layer=41_007, neuron=13, group=5_003)
COST = dataclasses.replace(PLANTED, neuron=1_301)
BYTES = GPTConfig(**SHAPE | dict(vocab_size=256), n_head=(8,) * 6, n_kv_head=(4,) * 6, d_ff=(192,) * 6)


@pytest.fixture
def planted(monkeypatch):
    """llama.cpp that takes exactly the planted time, and a different multiple of it in all but one round."""
    configs, calls = {}, []

    def write(model, tokenizer, path, dtype):
        assert dtype == "f16" and all(p.isfinite().all() for p in model.parameters())
        configs[path] = model.config

    def speed(path, **_):
        calls.append(path)
        slow = 1 + (len(calls) * 7 % 5) / 10 if len(calls) > len(configs) else 1
        return {"decode": 1e9 / (CONSTANT + PLANTED.of(configs[path])) / slow}
    monkeypatch.setattr(latency.gguf_export, "write_gguf", write)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def measure(config):
        configs.clear()
        calls.clear()
        return latency.measure(config, speed, rounds=3)
    return measure


def test_planted_costs_come_out_exactly(planted):
    cost = planted(BYTES)
    assert cost.error < 1e-9
    assert dataclasses.replace(cost, error=0) == PLANTED
    holes = dataclasses.replace(BYTES, n_head=(8, 0) * 3, n_kv_head=(4, 0) * 3, d_ff=(192, 0, 192, 0, 64, 0))
    assert dataclasses.replace(planted(holes), error=0) == PLANTED


def test_what_cannot_vary_is_part_of_the_layer_and_of_the_constant(planted):
    config = GPTConfig(**SHAPE, n_head=(3,), n_kv_head=(1,), d_ff=(192,))
    cost = planted(config)
    assert (cost.layer, cost.group, cost.neuron) == (0, 0, PLANTED.neuron)


def test_noise_is_refused():
    times = {shape: 1e6 - shape[1] * 10 for shape in latency.shapes(BYTES)}
    with pytest.raises(UserError, match="a neuron would cost .* noise, or .*; try again when the machine is idle"):
        latency.fit(times)


@pytest.mark.parametrize("structure", ["ffn", "ffn,kv", "layer", "sublayer", "layer,ffn,kv"])
def test_a_budget_in_nanoseconds_is_met(structure):
    model, _ = new(EQUAL, torch.float32)
    whole = allocate.total(EQUAL, COST)
    assert whole == COST.of(EQUAL)
    recipe = prune.Prune(keep=.85, budget="ms", structure=structure, score="taylor", block_size=8)
    small, _ = prune.cut_in_stages(model, text(EQUAL, 4), recipe, resource=COST)
    left = COST.of(small.config)
    # What is missing to the budget is less than the largest unit or part that went.
    largest = COST.group
    if structure in ("layer", "sublayer"):
        largest = max(depth.price(EQUAL, 0, part, COST) for part in depth.PARTS[structure])
    assert .85 * whole - largest <= left <= .85 * whole
    assert left == allocate.total(small.config, COST)


@pytest.mark.parametrize("seed", range(20))
def test_units_and_layers_cost_what_the_whole_model_says_they_do(seed):
    config = random_config(random.Random(seed))
    assert allocate.total(config, COST) == COST.of(config)
    layers = sum(depth.price(config, layer, "layer", COST) for layer in range(config.n_layer))
    assert layers == allocate.total(config, COST)
    costs, left, widths = allocate.split_budget(config, layers, ("ffn", "kv"), COST)
    assert left == sum(n * costs[key] for key, n in config.widths().items()) and not any(widths.values())
    scores = random_scores(config, seed)
    widths = allocate.widths_for(config, layers, "global", scores, resource=COST)
    assert widths == config.widths()


def test_without_xllamacpp_there_is_a_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install xllamacpp"):
        latency.measure(BYTES)


def test_llama_cpp_is_timed():
    """On a toy the times are mostly the constant: only that real files are written, run and reported."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    shorter = BYTES.resized({(0, "ffn"): 0, (0, "kv"): 0})
    times = latency.decode_times([BYTES, shorter], open_tokenizer("bytes"), rounds=1)
    assert all(1e3 < nanoseconds < 1e9 for nanoseconds in times)

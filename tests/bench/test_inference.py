"""The suite infer is held against bytes: those of the weights, the cache and the bandwidth."""
import dataclasses
import statistics
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from bench_helpers import UNEVEN, as_recorded, by, same_process, settings

from bench import inference, timing, variants
from common import UserError
from model import GPT


@pytest.fixture(scope="module")
def inferred():
    torch.set_num_threads(1)
    toy = settings("infer", prompt=(12, 20), decode=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "own_process", same_process)
        return as_recorded(inference.infer(toy, "toy", 300))


@pytest.mark.parametrize("name, keep", [("toy", .8), ("135m", .8), ("135m", .5), ("1.3b", .6), ("124m", .9)])
def test_pruned_models_have_equal_parameters(name, keep):
    dense, _ = variants.shapes(name, 300)
    neuron = dense.unit_params(0, "ffn")
    configs = inference.pruned(dense, keep)
    even = configs["even"]
    uneven = configs["uneven"]
    assert {*configs} == {"dense", "even", "uneven"} and configs["dense"] == dense
    assert 0 <= keep * dense.removable_params() - even.removable_params() < dense.n_layer * neuron
    assert abs(uneven.removable_params() - even.removable_params()) <= neuron
    assert len({*even.d_ff}) == 1 and len({*uneven.d_ff}) > 1
    assert 0 < min(uneven.d_ff) and max(uneven.d_ff) <= max(dense.d_ff)
    assert uneven.n_kv_head != dense.n_kv_head
    with pytest.raises(UserError, match="--keep 0.1 leaves .* no neurons.*give --keep above"):
        inference.pruned(dense, .1)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_per_token_are_those_of_the_weights_and_the_cache(tied):
    model = GPT(dataclasses.replace(UNEVEN, tie_embeddings=tied))
    cached = sum(layer.nbytes for layer in model.empty_cache(1, 7))
    weights = sum(p.nbytes for name, p in model.named_parameters() if tied or "embed" not in name)
    assert inference.bytes_per_token(model.config, 7, 4) == weights + cached


def test_generation_is_timed_by_token(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock.now)
    model, prompts = inference.build(UNEVEN, "cpu", "float32", 12, 3)
    hidden = model.hidden
    lengths = []

    def slow(idx, *args, **kwargs):
        lengths.append(idx.size(1))
        clock.now += 10 if idx.size(1) > 1 else 2
        return hidden(idx, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", slow)
    assert prompts.shape == (3, 12)
    assert inference.generate(model, prompts, 5) == {"first": 10.0, "decode": 2.0}
    assert lengths == [12, 1, 1, 1, 1]


def test_rows_are_held_against_their_bytes(inferred):
    rows = by(inferred["rows"], "runtime", "model", "prompt")
    rates = {(runtime, name, prompt): rounds for runtime, name, prompt, rounds in inferred["rates"]}
    runtimes = ("ours", "llama.cpp") if find_spec("xllamacpp") else ("ours",)
    expected = {("ours", "dense, 8 prompts", 12)}
    for name in ("dense", "even", "uneven"):
        expected |= {(runtime, name, prompt) for runtime in runtimes for prompt in (12, 20)}
    assert {*rates} == {*rows} == {tuple(key) for *key, _ in inferred["memory"]} == expected
    for (runtime, name, prompt), rounds in rates.items():
        row = rows[runtime, name, prompt]
        dense = rows[runtime, "dense", prompt]
        prompts = 8 if "8" in name else 1
        faster = [prompts * b["decode"] / a["decode"] for a, b in zip(rounds, rates[runtime, "dense", prompt])]
        allowed = dense["bytes read per token"] / row["bytes read per token"]
        bandwidth = inferred["bandwidth"][(12, 20).index(prompt)]
        roofline = row["decode tokens/s"] * row["bytes read per token"] / bandwidth
        assert len(rounds) == 1 and row["params"] <= dense["params"]
        assert row["prefill tokens/s"] == pytest.approx(prompts * prompt / rounds[0]["first"])
        assert row["bytes allow"] == pytest.approx(allowed, rel=1e-4)
        assert row["decode ÷ dense's"] == pytest.approx(statistics.median(faster))
        assert row["of the bytes"] == pytest.approx(statistics.median(faster) / row["bytes allow"])
        assert row["of the roofline"] == pytest.approx(roofline, rel=1e-3)
        assert row["peak bytes"] > 2**20
    config = variants.shapes("toy", 300)[0]
    assert rows["ours", "dense, 8 prompts", 12]["bytes read per token"] == round(
        config.num_params()["total"] * 4 / 8 + 14.5 * config.kv_bytes_per_token(4))
    assert "ours in float32, llama.cpp's files in f16" in inferred["note"]


def test_llamacpp_is_asked_on_the_cpu_only(monkeypatch):
    """As on a GPU, whose row says so."""
    build = inference.build
    monkeypatch.setattr(inference, "build", lambda config, device, *args: build(config, "cpu", *args))
    monkeypatch.setattr(inference, "own_process", same_process)
    for name in ("traffic", "interleave", "peak"):
        original = getattr(timing, name)
        monkeypatch.setattr(inference, name, lambda *args, original=original: original(*args[:-1], "cpu"))
    toy = dataclasses.replace(settings("infer", prompt=(12,), decode=5), device="cuda")
    rows = inference.infer(toy, "toy", 300)["rows"]
    assert [row["runtime"] for row in rows] == ["ours"] * 4 + ["llama.cpp"]
    assert "CPU only" in rows[-1]["note"]

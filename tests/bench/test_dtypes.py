"""The suite dtypes: every way of training is the one that its row names, and ratios are like for like."""
import dataclasses
import statistics
from importlib.util import find_spec

import pytest
import torch
from bench_helpers import as_recorded, by, settings

from bench import __main__ as bench
from bench import dtypes, gpt2_peer, variants
from bench.dtypes import BASE, OURS, Way
from bench.variants import GPT2, LLAMA

TARGET, _ = variants.shapes("toy", 300)
MODELS = [OURS, GPT2] + [LLAMA] * bool(find_spec("transformers"))


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """torch.compile that finds the graphs and then runs them as they are."""
    compile = torch.compile
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda module, **options: compile(module, backend="eager", **options))
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def measured():
    """The only cell of the suite at toy size."""
    torch.set_num_threads(1)
    ((name, measure),) = bench.cells(settings("dtypes", rounds=2))
    assert name == "toy, V = 300"
    return as_recorded(measure())


def test_rows_are_all_models_dtypes_and_compilations(measured):
    ways = [(row["model"], row["dtype"], row["compiled"]) for row in measured["rows"] if "note" not in row]
    assert ways == [(model, dtype, compiled) for model in MODELS for dtype in ("float32", "bfloat16")
                    for compiled in (False, True)]
    assert all(len(rounds) == 2 for rounds in measured["seconds"].values())


def test_ratios_are_like_for_like(measured):
    seconds = measured["seconds"]
    rows = by(measured["rows"], "model", "dtype", "compiled")

    def faster(way, other):
        return statistics.median([b / a for a, b in zip(seconds[way.name], seconds[other.name])])

    for (model, dtype, compiled), row in rows.items():
        way = Way(model, dtype, compiled)
        assert row["tokens/step"] == 2 * 2 * 64 and row["d_model"] == 32 and row["head_dim"] == 8
        assert row["tokens/s"] == pytest.approx(2 * 256 / statistics.median(seconds[way.name]))
        assert row["÷ ours in float32, eager"] == pytest.approx(faster(way, BASE))
        for peer, column in ((GPT2, "÷ nanoGPT's"), (LLAMA, "÷ transformers'")):
            if model == OURS and peer in MODELS:
                assert row[column] == pytest.approx(faster(way, Way(peer, dtype, compiled)))
            else:
                assert column not in row
        if compiled:
            assert row["compiled ÷ eager"] == pytest.approx(faster(way, Way(model, dtype, False)))
        else:
            assert "compiled ÷ eager" not in row

        config = gpt2_peer.peer_of(TARGET) if model == GPT2 else TARGET
        half_square = 3 * 2 * 64 * sum(TARGET.n_head) * 8 if model != GPT2 else 3 * 2 * 64 * 32 * 2
        flops = 2 * 256 * (config.flops_per_token(64) - half_square)
        assert row["FLOP/s, causal"] == pytest.approx(flops / statistics.median(seconds[way.name]))
        limits = [measured["matmul_flops"] / product for product in seconds[f"matmul, {dtype}"]]
        shares = [flops / whole / limit for whole, limit in zip(seconds[way.name], limits)]
        assert row["of matmul's FLOP/s, causal"] == pytest.approx(statistics.median(shares))
    first = rows[OURS, "float32", False]
    assert first["÷ ours in float32, eager"] == 1 and first["lowest to highest of it"] == "1.00 to 1.00"


@pytest.mark.parametrize("model", MODELS)
def test_a_way_is_trained_as_it_is_named(model, monkeypatch):
    """In autocast or not, compiled or not, always the same weights; ours in train.train, a peer
    outside of it."""
    load, _, _ = variants.fitted(settings("dtypes", rounds=1), "toy", 300)
    variant = dtypes.open_variants(load, TARGET, peers=True)[model]
    compiled = []
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(1) or compile(module, **options))
    autocast = []

    def note(module, arguments):
        autocast.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)

    norm = next(module for name, module in variant.state.model.named_modules() if "norm" in name or "ln" in name)
    norm.register_forward_pre_hook(note)
    for way in (Way(model, "float32", False), Way(model, "bfloat16", False)):
        before = [p.clone() for p in variant.state.model.parameters()]
        dtypes.call_of(variant, way, 2)()
        assert {*autocast} == {getattr(torch, way.dtype)} and not compiled
        assert all(p.dtype == torch.float32 and p.grad is None for p in variant.state.model.parameters())
        moved = [not torch.equal(p, old) for p, old in zip(variant.state.model.parameters(), before)]
        assert any(moved)
        autocast.clear()
    dtypes.call_of(variant, Way(model, "bfloat16", True), 1)()
    assert len(compiled) == 1
    assert variant.state.step == (5 if model == OURS else 0)
    assert variant.setup.config.dtype == "float32" and not variant.setup.config.compile


def test_peers_and_compiled_rows_can_be_left_out(monkeypatch):
    toy = settings("dtypes", micro_steps=1)
    few = dataclasses.replace(toy, peers=False, eager=True)
    rows = dtypes.dtypes(few, "toy", 300)["rows"]
    assert [(row["model"], row["dtype"], row["compiled"]) for row in rows] == [
        (OURS, "float32", False), (OURS, "bfloat16", False)]
    assert not {"÷ nanoGPT's", "compiled ÷ eager"} & {*rows[1]}
    monkeypatch.setattr(dtypes, "find_spec", lambda name: None)
    *rows, missing = dtypes.dtypes(dataclasses.replace(toy, eager=True), "toy", 300)["rows"]
    assert missing["note"] == "pip install transformers" and missing["model"] == LLAMA
    assert "÷ nanoGPT's" in rows[0] and "÷ transformers'" not in rows[0]


@pytest.mark.parametrize("preset, vocab_size, block_size, tokens, steps", [
    ("toy", 256, None, 2048, 132), ("laptop", 256, None, 2048, 17), ("4x256", 256, None, 2048, 1),
    ("124m", 50257, 256, 256, 1), ("135m", 49152, None, 512, 1)])
def test_a_round_takes_about_a_second(preset, vocab_size, block_size, tokens, steps, monkeypatch):
    calls = []
    monkeypatch.setattr(dtypes, "open_variants", lambda load, target, peers: {OURS: (load, target)})
    monkeypatch.setattr(dtypes, "call_of", lambda variant, way, steps: lambda: calls.append((*variant, steps)))
    monkeypatch.setattr(dtypes, "row", lambda *_: {})
    flags = bench.resolve(bench.Bench("dtypes", block_size=block_size, rounds=1, device="cpu"))
    dtypes.dtypes(flags, preset, vocab_size)
    (load, target, used), *_ = calls
    assert target.block_size == block_size or block_size is None
    assert load.micro_batch * target.block_size == tokens and used == steps

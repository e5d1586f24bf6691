"""A grown model computes what the small one did, a slice gives that one back, and which copies stay copies."""
import dataclasses
import json

import pytest
import torch
import transformers
from helpers import CONFIGS, WITH_HOLES, batch, entries, loss_of, masks_of, new, untouched
from helpers import fingerprint as as_it_was

import checkpoint
import export
import prune
import train
from common import UserError, parse
from formats import huggingface, origin
from formats.model_card import model_card
from formats.tokenizer import open_tokenizer
from methods import grow as command
from methods.grow import Grow, grow, shares
from methods.sparse import Pattern, pack
from methods.target_shape import grown_config, source_layers
from model import GPT, GPTConfig, reader_of

ONE_DIMENSION = {"ffn": dict(enlarge_ff=3.), "kv": dict(enlarge_kv=2.), "layers": dict(enlarge_layers=1.5),
                 "channels": dict(enlarge_channels=2)}
EVERYTHING = dict(enlarge_ff=3., enlarge_kv=2., enlarge_layers=2., enlarge_channels=3)
DIMENSIONS = {**ONE_DIMENSION, "everything": EVERYTHING}


def grown(model, how, seed=0, **factors):
    return grow(model, grown_config(model.config, Grow(how=how, **factors)), how, seed)


def difference(larger, model):
    idx = batch(model.config, 0)[0]
    return (larger(idx) - model(idx)).abs().max()


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("name", WITH_HOLES)
def test_fresh_and_copied_units_keep_the_logits(name, dimension):
    model, _ = new(WITH_HOLES[name])
    before = as_it_was(model)
    for how in ("fresh", "copy"):
        larger = grown(model, how, **DIMENSIONS[dimension])
        assert larger.config.num_params()["total"] > model.config.num_params()["total"]
        assert difference(larger, model) <= 1e-12, how
    untouched(model, before)


def test_the_other_ways_change_the_logits_and_split_hardly():
    model, _ = new(CONFIGS["plain"])
    for dimension in ("ffn", "kv", "everything"):
        split = difference(grown(model, "split", **DIMENSIONS[dimension]), model)
        aki = difference(grown(model, "aki", **DIMENSIONS[dimension]), model)
        assert 1e-3 < split < aki / 3 and aki > 1e-2, dimension


@pytest.mark.parametrize("name", WITH_HOLES)
def test_slicing_fresh_units_off_gives_the_small_model_back(name):
    model, _ = new(WITH_HOLES[name])
    small, _ = prune.slice(grown(model, "fresh", enlarge_ff=3, enlarge_kv=2), None, prune.everything(model.config))
    assert small.config == model.config
    for (key, p), other in zip(model.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(p, other), key


def of_unit(model, layer, kind, unit, what=lambda p: p):
    """The entries of a unit's rows, without the columns that read it, as one vector."""
    reader = reader_of(model.config, layer, kind)
    rows = [(name, index) for name, index in entries(model.config, layer, kind, unit) if name != reader]
    return torch.cat([what(model.get_parameter(name))[index].flatten() for name, index in rows]).detach()


@pytest.mark.parametrize("how", ["copy", "split", "aki", "fresh"])
@pytest.mark.parametrize("kind, factors", [("ffn", dict(enlarge_ff=3)), ("kv", dict(enlarge_kv=2))])
def test_only_units_of_copy_stay_copies(how, kind, factors):
    """20 steps of AdamW: each new unit moves, and stays what an old one is in `copy` only. (In `aki` new units that are
    copies of one unit stay copies of each other.)"""
    config = GPTConfig(vocab_size=13, block_size=8, d_model=12, head_dim=4, n_head=(2, 2), n_kv_head=(1, 1),
                       d_ff=(8, 8))
    larger = grown(new(config)[0], how, **factors)
    old, units = config.widths()[0, kind], larger.config.widths()[0, kind]
    before = [of_unit(larger, 0, kind, unit) for unit in range(units)]
    optimizer = torch.optim.AdamW(larger.parameters(), lr=1e-2)
    gradient = None
    for step in range(20):
        optimizer.zero_grad()
        loss_of(larger, *batch(config, step)).backward()
        gradient = gradient or [of_unit(larger, 0, kind, unit, lambda p: p.grad) for unit in range(units)]
        optimizer.step()
    after = [of_unit(larger, 0, kind, unit) for unit in range(units)]
    for unit in range(old, units):
        assert (after[unit] - before[unit]).abs().max() > 1e-3                                      # it lives
        nearest = min(range(old), key=lambda i: (after[unit] - after[i]).abs().max())
        distance = (after[unit] - after[nearest]).abs().max()
        same = (gradient[unit] - gradient[nearest]).abs().max()
        if how == "copy":
            assert torch.equal(before[unit], before[nearest]) and same < 1e-15 and distance < 1e-9
        else:
            assert distance > 1e-3 and same > 1e-6


@pytest.mark.parametrize("how, parts", [("fresh", True), ("split", True), ("aki", True), ("copy", False)])
def test_copied_channels_part_unless_all_copies_are_alike(how, parts):
    model, _ = new(CONFIGS["plain"])
    larger = grown(model, how, enlarge_channels=2)
    assert difference(larger, model) <= 1e-12
    optimizer = torch.optim.AdamW(larger.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(larger, *batch(model.config, step)).backward()
        optimizer.step()
    left, right = larger.embed.weight.detach().chunk(2, 1)
    apart = (left - right).abs().max()
    assert apart > 1e-3 if parts else apart < 1e-12


def test_new_layers_live():
    """Their matrices that write get gradients at once, the others when these have moved."""
    model, _ = new(CONFIGS["gqa+bias"])
    larger = grown(model, "fresh", enlarge_layers=2)
    assert source_layers(2, 4, "fresh") == [0, 0, 1, 1]
    before = {name: p.detach().clone() for name, p in larger.named_parameters() if name.startswith("blocks.1.")}
    assert not before["blocks.1.ffn.down.weight"].any() and not before["blocks.1.attn.o.weight"].any()
    optimizer = torch.optim.AdamW(larger.parameters(), lr=1e-2, weight_decay=0)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(larger, *batch(model.config, step)).backward()
        optimizer.step()
    for name, value in before.items():
        assert not torch.equal(value, larger.get_parameter(name)), name


@pytest.mark.parametrize("old, new, how, sources", [
    (2, 5, "fresh", [0, 0, 0, 1, 1]), (3, 4, "copy", [0, 0, 1, 2]), (3, 3, "split", [0, 1, 2]),
    (2, 4, "aki", [0, 1, 0, 1]), (3, 8, "aki", [0, 1, 2, 0, 1, 2, 1, 2])])
def test_which_layer_is_made_of_which(old, new, how, sources):
    assert source_layers(old, new, how) == sources


def test_aki_takes_new_rows_from_the_layer_above():
    model, _ = new(WITH_HOLES["plain"])                    # neurons 5, 7; KV groups 2, 3
    larger = grown(model, "aki", enlarge_ff=3, enlarge_kv=2)
    for kind in ("ffn", "kv"):
        old, units = model.config.widths()[0, kind], larger.config.widths()[0, kind]
        above = torch.stack([of_unit(model, 1, kind, unit) for unit in range(old)])
        for unit in range(old, units):
            assert (above == of_unit(larger, 0, kind, unit)).all(1).sum() == 1
        for unit in range(old):
            assert torch.equal(of_unit(larger, 0, kind, unit), of_unit(model, 0, kind, unit))


@pytest.mark.parametrize("how", ["copy", "split", "aki", "fresh"])
def test_shares_of_a_unit_s_copies_sum_to_one(how):
    source = torch.tensor([0, 1, 2, 1, 1, 0])
    share = shares(source, 3, how, torch.Generator().manual_seed(0))
    totals = [sum(share[source == unit]).item() for unit in range(3)]
    assert totals == pytest.approx([1, 1, 1], abs=1e-15) and share[2] == 1
    assert (share[0] == share[5]).item() == (how in ("copy", "aki"))


@pytest.mark.parametrize("how", ["fresh", "split", "copy", "aki"])
def test_a_seed_says_what_is_drawn(how):
    model, _ = new(CONFIGS["gqa"])
    first, again, other = (grown(model, how, seed, **EVERYTHING).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("changes, words", [
    (dict(d_ff=(5, 6)), "layer 1 would have 6 ffn units, fewer than the 7 that it grows from"),
    (dict(head_dim=8), "its head_dim stays 4, not 8"), (dict(vocab_size=14), "its vocab_size stays 13, not 14"),
    (dict(d_model=18), "18 channels are no whole multiple of 12, .* give 24"),
    (dict(n_head=(8, 9)), "layer 0 has 2 query heads to a KV head, which stay, and not 4"),
    (dict(n_head=(4,), n_kv_head=(2,), d_ff=(5,)), "1 layers are fewer than the model's 2")])
def test_other_shapes_are_refused(changes, words):
    model, _ = new(CONFIGS["gqa"])
    with pytest.raises(UserError, match=words):
        grow(model, dataclasses.replace(model.config, **changes))


def test_an_absent_part_stays_absent():
    model, _ = new(WITH_HOLES["holes"])
    with pytest.raises(UserError, match="layer 2 has no ffn units that could grow into 3"):
        grow(model, model.config.resized({(2, "ffn"): 3}))


# -- the command

@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a small model, and a text beside it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=32, d_model=16, head_dim=8, n_head=(2, 2), n_kv_head=(1, 1),
                          d_ff=(24, 24)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    huggingface.save(tmp_path / "small", model, "llama", open_tokenizer("bytes").as_files())
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    return tmp_path


def test_the_command_writes_a_checkpoint_that_everything_reads(folder, capsys):
    flags = ["--init", f"{folder}/small", "--data", f"{folder}/text.txt", "--eval-windows", "4", "--device", "cpu"]
    command.main(parse(Grow, [*flags, "--enlarge-ff", "2.6", "--enlarge-kv", "2", "--enlarge-layers", "2",
                              "--enlarge-channels", "2", "--out", f"{folder}/grown"]))
    before, after = [line.split()[3] for line in capsys.readouterr().out.splitlines() if "nats per token" in line]
    assert float(before) == pytest.approx(float(after), abs=2e-6)
    model, about = checkpoint.load(folder / "grown")
    assert model.config.d_ff == (64,) * 4 and model.config.n_kv_head == (2,) * 4 and model.config.d_model == 32
    assert about["run"]["grown_from"] == f"{folder}/small" and about["run"]["growth"]["how"] == "fresh"
    # A run that begins with it records where it comes from.
    _, _, made, _ = train.open_init(train.Train(init=f"{folder}/grown"))
    assert made == {key: about["run"][key] for key in ("grown_from", "growth")}
    export.main(export.Export(f"{folder}/grown", f"{folder}/out"))
    again, _ = checkpoint.load(folder / "out")
    assert again.config == model.config
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), again.parameters(), strict=True))
    idx = torch.arange(32)[None]
    peers = [transformers.AutoModelForCausalLM.from_pretrained(folder / name)(idx).logits for name in ("small", "out")]
    torch.testing.assert_close(*peers, rtol=0, atol=1e-5)
    steps = origin.hand_on(about)["steps"]
    assert steps[-1]["command"] == "methods.grow" and steps[-1]["enlarge_ff"] == 2.6
    assert "Grown, with new units by way `fresh` (`methods.grow`)" in model_card("grown", model.config,
                                                                                 origin.hand_on(about))
    command.main(parse(Grow, [*flags[:2], "--enlarge-ff", "2.6", "--how", "copy", "--eval-windows", "0", "--out",
                              f"{folder}/copy"]))
    out = capsys.readouterr().out
    assert "nats" not in out and "the copies never differ" in out
    assert json.loads((folder / "out" / "config.json").read_text())["hidden_size"] == 32


@pytest.mark.parametrize("settings, words", [
    (dict(), "nothing grows; give --enlarge-ff"),
    (dict(enlarge_ff=.5), "--enlarge-ff 0.5 must be finite and at least 1"),
    (dict(enlarge_kv=float("inf")), "--enlarge-kv inf must be finite"),
    (dict(enlarge_ff=1.1), "--enlarge-ff 1.1 of 24 units rounds to 24; give a larger factor"),
    (dict(enlarge_ff=2, how="more"), "--how 'more' is not one of fresh, copy, split, aki"),
    (dict(enlarge_ff=2, eval_windows=-1), "--eval-windows -1 must be 0 or more"),
    (dict(enlarge_ff=2, seed=-1), "--seed -1 must be between 0"), (dict(init=None), "say what grows by --init"),
    (dict(enlarge_ff=2, out="small"), "small is there already; give another --out")])
def test_refusals_are_one_sentence(folder, settings, words, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=words) as refusal:
        command.main(Grow(**{"init": "small", "out": "new", "eval_windows": 0, "device": "cpu", **settings}))
    assert "\n" not in str(refusal.value) and not (folder / "new").exists()


def test_a_masked_model_does_not_grow(folder):
    model, about = checkpoint.load(folder / "small")
    checkpoint.save(folder / "ckpt_00000000.pt", model, step=0, masks=pack(masks_of(model, Pattern(2, 4))),
                    tokenizer_files=about["tokenizer_files"], run={"tokenizer": "bytes"})
    with pytest.raises(UserError, match="has weights that a mask holds at zero.*grow the dense model"):
        command.main(Grow(init=str(folder / "ckpt_00000000.pt"), out=str(folder / "new"), enlarge_ff=2, device="cpu"))
    assert not (folder / "new").exists()

"""Sheared LLaMA: the distribution of a gate, the penalty and what it reaches, useless units, and a folded model that is
the gated one."""
import copy
import dataclasses
import json
import math

import pytest
import torch
from helpers import SHAPE, WITH_HOLES, batch, close, loss_of, new
from torch.func import functional_call

import checkpoint
import train
from common import UserError, parse
from formats import model_card
from formats.origin import hand_on
from methods import sheared
from methods.gates import (
    EDGE,
    LIMIT,
    closed_shares,
    draw,
    fold,
    gated,
    new_gates,
    open_probability,
    sample,
    settled,
    undecided,
    with_gates,
)
from methods.target_shape import kept_of, kind_of, sizes_of, target_of
from model import GPTConfig

# Four layers alike, of which everything may go.
ALIKE = GPTConfig(**SHAPE | dict(d_model=24), n_head=(8,) * 4, n_kv_head=(4,) * 4, d_ff=(32,) * 4)
HALF = sheared.Shear(init="m", enlarge_ff=2, enlarge_kv=2, layers=2, channels=12, steps=300, lr=1e-12)


def random_gates(config, closed=True):
    """Gates of all kinds in float64; some are closed, among them a layer."""
    g = torch.Generator().manual_seed(2)
    gates = {key: torch.rand(n, generator=g, dtype=torch.float64) for key, n in config.widths().items() if n}
    gates |= {"channels": torch.rand(config.d_model, generator=g, dtype=torch.float64),
              "layers": torch.rand(config.n_layer, generator=g, dtype=torch.float64)}
    if closed:
        for gate in gates.values():
            gate[torch.arange(len(gate)) % 3 == 1] = 0
    return gates


# -- one gate

@pytest.mark.parametrize("log_alpha", [-LIMIT, -2, 0, 1, 3, LIMIT])
def test_a_gate_is_open_as_often_as_its_probability_says(log_alpha):
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = sample(torch.tensor(log_alpha, dtype=torch.float64), u.clamp(EDGE, 1 - EDGE))
    assert 0 <= z.min() and z.max() <= 1
    chance = open_probability(torch.tensor(float(log_alpha))).item()
    assert (z > 0).double().mean().item() == pytest.approx(chance, abs=2.5e-3)
    # E[z] = ∫ P(z > t) dt: the chance that the stretched number lies above t.
    t = (torch.arange(10_000) + .5) / 10_000
    above = torch.sigmoid(log_alpha - 2 / 3 * torch.logit((t + .1) / 1.2))
    assert z.mean().item() == pytest.approx(above.mean().item(), abs=2.5e-3)


def test_what_the_release_computes():
    """P(z > 0) at both limits, and the end's gates: not stretched, so that no gate is 1."""
    limits = torch.tensor([-LIMIT, LIMIT])
    assert open_probability(limits).tolist() == pytest.approx([.0471, .998], abs=5e-5)
    gates = settled({"layers": torch.tensor([LIMIT, 0., -1., LIMIT])}, {"layers": 3})["layers"]
    assert gates.tolist() == pytest.approx([.996, .5, 0, .996], abs=5e-5)


def test_the_gradient_of_a_sample_is_its_slope():
    log_alpha = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    u = torch.rand(33, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient, = torch.autograd.grad(sample(log_alpha, u).sum(), log_alpha)
    slope = (sample(log_alpha + 1e-6, u) - sample(log_alpha - 1e-6, u)) / 2e-6
    assert (gradient - slope).abs().max() <= 1e-8 and 5 < (gradient > 0).sum() < 28          # others are cut off


def test_settled_gates_are_the_target_in_each_layer():
    g = torch.Generator().manual_seed(0)
    log_alphas = {(layer, "ffn"): torch.randn(9, generator=g) for layer in range(3)} | {"channels": torch.zeros(5)}
    kept = {(0, "ffn"): 9, (1, "ffn"): 4, (2, "ffn"): 0, "channels": 3}
    gates = settled(log_alphas, kept)
    assert {key: int((gate > 0).sum()) for key, gate in gates.items()} == kept
    assert gates["channels"].tolist() == [.5, .5, .5, 0, 0]                        # ties go to the lower index
    is_open = gates[1, "ffn"] > 0
    assert log_alphas[1, "ffn"][is_open].min() > log_alphas[1, "ffn"][~is_open].max()


# -- a gated model

@pytest.mark.parametrize("name", WITH_HOLES)
@pytest.mark.parametrize("tied", [True, False])
def test_open_gates_change_nothing_and_a_folded_model_is_the_gated_one(name, tied):
    model, _ = new(dataclasses.replace(WITH_HOLES[name], tie_embeddings=tied))
    x, _ = batch(model.config, 0)
    gates = random_gates(model.config)
    ones = {key: torch.ones_like(gate) for key, gate in gates.items()}
    assert torch.equal(functional_call(model, gated(model, ones), x), model(x))
    for kinds in (("ffn", "kv"), ("layers",), ("channels",), ("ffn", "kv", "layers", "channels")):
        some = {key: gate for key, gate in gates.items() if kind_of(key) in kinds}
        expected = functional_call(model, gated(model, some), x)
        small = fold(model, some)
        assert (small(x) - expected).abs().max() <= 1e-12 < 1e-3 < (expected - model(x)).abs().max()
        assert torch.equal(with_gates(model, some)(x), expected)
        assert small.config.num_params()["total"] == sum(p.numel() for p in small.parameters())
    assert small.config.d_model == 8 and small.config.n_layer == model.config.n_layer - 1
    assert small.config.d_ff[0] == int((gates[0, "ffn"] > 0).sum())


def test_a_gate_scales_what_its_unit_or_layer_writes():
    """The oracle scales outputs and streams by hooks, not weights; norms see the open channels only."""
    model, _ = new(WITH_HOLES["all"])                                              # its head is its own
    gates, config = random_gates(model.config), model.config
    channels = gates["channels"]
    count = (channels > 0).sum().item()

    def norm_of_open_channels(module, args, out):
        x = args[0]
        square = x[..., channels > 0].square().sum(-1, keepdim=True) / count
        return x * (square + module.eps * config.d_model / count).rsqrt() * module.weight * channels

    model.embed.register_forward_hook(lambda _, args, out: out * channels)
    for layer, block in enumerate(model.blocks):
        block.ffn.down.register_forward_pre_hook(lambda _, args, layer=layer: args[0] * gates[layer, "ffn"])
        heads = gates[layer, "kv"].repeat_interleave(config.queries_per_group(layer) * config.head_dim)
        block.attn.o.register_forward_pre_hook(lambda _, args, heads=heads: args[0] * heads)
        for part in (block.attn, block.ffn):
            part.register_forward_hook(lambda _, args, out, layer=layer: out * gates["layers"][layer] * channels)
    for norm in [model.norm, *(n for b in model.blocks for n in (b.attn_norm, b.ffn_norm))]:
        norm.register_forward_hook(norm_of_open_channels)
    x, _ = batch(config, 1)
    plain, _ = new(WITH_HOLES["all"])
    # The hooks' eps is that of the narrower stream.
    assert (model(x) - with_gates(plain, gates)(x)).abs().max() <= 1e-12


def test_gates_get_the_gradients_of_the_loss():
    model, _ = new(WITH_HOLES["gqa"])
    gates = {key: gate.requires_grad_() for key, gate in random_gates(model.config, closed=False).items()}
    x, y = batch(model.config, 0)
    gradients = torch.autograd.grad(sheared_loss(model, gates, x, y), [*gates.values()])
    for (key, gate), gradient in zip(gates.items(), gradients):
        nudge = torch.zeros_like(gate)
        nudge[1] = 1e-6
        above, below = (sheared_loss(model, gates | {key: gate.detach() + step}, x, y) for step in (nudge, -nudge))
        assert gradient[1].item() == pytest.approx((above - below).item() / 2e-6, rel=1e-5, abs=1e-8)


def sheared_loss(model, gates, x, y):
    return loss_of(lambda idx: functional_call(model, gated(model, gates), idx), x, y)


# -- the penalty

def test_the_penalty_by_hand():
    log_alphas = {(0, "ffn"): torch.tensor([LIMIT, -1.]), (1, "ffn"): torch.tensor([0., 2.]),
                  "layers": torch.tensor([1., 1.])}
    goals = {(0, "ffn"): .5, (1, "ffn"): .25, "layers": .5}
    shift = 2 / 3 * math.log(11)
    chance = lambda a: 1 / (1 + math.exp(-a - shift))
    s = [1 - (chance(LIMIT) + chance(-1)) / 2 - .2, 1 - (chance(0) + chance(2)) / 2 - .1, 1 - chance(1) - .2]
    multipliers = {"ffn": torch.tensor([3., 7.]), "layers": torch.tensor([-2., 5.])}
    expected = (3 * (s[0] + s[1]) + 7 * (s[0]**2 + s[1]**2)) / 2 - 2 * s[2] + 5 * s[2]**2
    assert sheared.lagrangian(log_alphas, goals, multipliers, .4).item() == pytest.approx(expected, rel=1e-5)
    # Without multipliers it does not pull, and they themselves begin to move.
    for log_alpha in log_alphas.values():
        log_alpha.requires_grad_()
    zeros = {kind: torch.zeros(2, requires_grad=True) for kind in multipliers}
    sheared.lagrangian(log_alphas, goals, zeros, .4).backward()
    assert all((log_alpha.grad == 0).all() for log_alpha in log_alphas.values())
    close(zeros["layers"].grad, torch.tensor([s[2], s[2]**2]), 1e-5)


def learned(model, settings, tokens=batch):
    """The gates that `shear_` learns for a model, and what is to stay of each."""
    kept = kept_of(model.config, target_of(model.config, settings))
    return sheared.shear_(model, kept, lambda step, micro: tokens(model.config, step), settings), kept


def test_the_penalty_alone_reaches_the_target():
    """The loss says nothing, as what sub-blocks write is 0 and all tokens are embedded alike."""
    model, _ = new(ALIKE, torch.float32)
    with torch.no_grad():
        model.embed.weight.fill_(.1)
        for block in model.blocks:
            block.attn.o.weight.zero_()
            block.ffn.down.weight.zero_()
    before = copy.deepcopy(model)
    log_alphas, kept = learned(model, HALF)
    assert len(log_alphas) == 10
    for key, share in closed_shares(log_alphas).items():
        assert share.item() == pytest.approx(1 - kept[key] / len(log_alphas[key]), abs=.02)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), before.parameters()))


def test_useless_units_are_closed():
    """Neurons whose gates never open, and a KV group whose values are 0. All other units are wanted by a model that
    knows its text by heart."""
    config = dataclasses.replace(ALIKE, n_head=(8,) * 2, n_kv_head=(4,) * 2, d_ff=(16,) * 2)
    model, optimizer = new(config, torch.float32)
    useless = {(0, "ffn"): [1, 2, 7, 15], (1, "ffn"): [0, 4, 5, 6], (0, "kv"): [2], (1, "kv"): [0]}
    text = lambda config, step: batch(config, step % 8)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(.4 if p.dim() == 2 else 1)
    for step in range(200):
        loss_of(model, *text(config, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for (layer, kind), units in useless.items():
                block = model.blocks[layer]
                if kind == "ffn":
                    block.ffn.up.weight[units] = 0
                else:
                    block.attn.v.weight.unflatten(0, (4, -1))[units] = 0
    settings = dataclasses.replace(HALF, enlarge_ff=1, enlarge_kv=1, layers=None, channels=None, keep=.75)
    log_alphas, kept = learned(model, settings, text)
    assert kept == {(0, "ffn"): 12, (1, "ffn"): 12, (0, "kv"): 3, (1, "kv"): 3}
    gates = settled(log_alphas, kept)
    assert {key: (gate == 0).nonzero().flatten().tolist() for key, gate in gates.items()} == useless
    assert undecided(log_alphas) < .2


def test_draws_are_a_function_of_seed_step_and_micro_batch():
    log_alphas = new_gates(sizes_of(ALIKE), {(0, "ffn"): 3, "channels": 5}, "cpu")
    log_alphas["channels"].data.zero_()
    first = draw(log_alphas, 0, 1, 2)
    again = draw(log_alphas, 0, 1, 2)
    assert all(torch.equal(first[key], again[key]) for key in log_alphas)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(first["channels"], draw(log_alphas, *other)["channels"])


# -- shapes and the command

@pytest.mark.parametrize("flags, shape", [
    (dict(enlarge_ff=2, enlarge_kv=2), (4, 24, 2, 16)), (dict(keep=.75), (4, 24, 3, 24)),
    (dict(layers=3, channels=20, enlarge_ff=4), (3, 20, 4, 8))])
def test_targets(flags, shape):
    target = target_of(ALIKE, sheared.Shear(init="m", **flags))
    L, C, kv, ff = shape
    assert target == dataclasses.replace(ALIKE, d_model=C, n_head=(2 * kv,) * L, n_kv_head=(kv,) * L, d_ff=(ff,) * L)


@pytest.mark.parametrize("flags, words", [
    (dict(), "has the shape of m already"), (dict(layers=5), "5 layers and m only 4"),
    (dict(channels=25), "25 channels and m only 24"), (dict(target="toy"), "heads of 8 channels, 2 query heads")])
def test_targets_that_are_no_part_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        target_of(ALIKE, sheared.Shear(init="m", **flags))


def test_which_of_uneven_layers_stay_is_not_known():
    with pytest.raises(UserError, match="layers of m differ in width, .* a target of 2 layers"):
        target_of(WITH_HOLES["plain"], sheared.Shear(init="m", layers=1))
    uneven = target_of(WITH_HOLES["plain"], sheared.Shear(init="m", keep=.7))          # each layer its own share
    assert .6 < uneven.removable_params() / WITH_HOLES["plain"].removable_params() <= .7


def test_a_loss_that_is_no_number_ends_the_run():
    model, _ = new(ALIKE, torch.float32)
    model.embed.weight.data.fill_(math.inf)
    with pytest.raises(UserError, match="step 0: the loss is nan; lower --lr"):
        learned(model, HALF)


@pytest.mark.parametrize("flags, words", [
    ("", "say what to shear"), ("--init m --steps 299", "--steps 299 are too few .* at least 300"),
    ("--init m --target toy --keep .5", "--keep has no effect with --target toy"),
    ("--init m --keep .5 --enlarge-ff 2", "--enlarge-ff has no effect with --keep"), ("--init m --keep 1", "--keep 1"),
    ("--init m --lr 0", "--lr 0"), ("--init m --seed -1", "--seed -1")])
def test_settings_that_mean_nothing_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        sheared.main(parse(sheared.Shear, flags.split()))


def test_the_command_writes_a_plain_checkpoint_of_the_target(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sheared, "FEWEST_STEPS", 20)
    rows = [json.dumps({"text": f"one two three {i} " * 30}) for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    toy = dict(preset="toy", batch_tokens=256, micro_batch=2, eval_windows=4, device="cpu", data="t.jsonl")
    train.main(train.Train(plan="naive", stage="enlarge", enlarge_kv=2, steps=6, out="big", **toy), quiet=True)
    words = ("--init big --target toy --steps 20 --batch-tokens 256 --micro-batch 2 --eval-windows 4 --data t.jsonl "
             "--device cpu --out small")
    sheared.main(parse(sheared.Shear, words.split()))
    output = capsys.readouterr().out
    assert "2 layers of 4 KV groups and 168 neurons, 32 channels, to be 2 layers of 2 KV groups and 64" in output
    small, about = checkpoint.load("small")
    assert small.config == train.models.preset("toy", 256, 1)[0] and about["run"]["cut_from"] == "big"
    step = hand_on(about)["steps"][-1]
    assert model_card.sentence(step) == "Made by `python -m methods.sheared`." and step["target"] == "toy"
    losses = about["run"]["losses"]
    assert f"a jump of {losses['settled'] - losses['sampled']:+.4f}" in output
    big, _ = checkpoint.load("big")
    assert about["run"]["flops_executed"] == 20 * 256 * big.config.flops_per_token(64)
    with pytest.raises(UserError, match="small is there already"):
        sheared.main(parse(sheared.Shear, words.split()))
    with pytest.raises(UserError, match="--batch-tokens 300 must be a multiple"):
        sheared.main(parse(sheared.Shear, words.replace("256", "300").replace("small", "other").split()))
    # The second phase is a run as any other.
    train.main(train.Train(plan="scratch", init="small", steps=2, out="on", **toy | dict(preset="laptop")), quiet=True)

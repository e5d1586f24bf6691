"""Invariants of score.py: scores take exactly a unit's entries, useless units rank last, and good scores agree with
leaving units out. Its statistics: test_statistics.py.

Oracles: `entries` of helpers.py (explicit indices), and formulas on the inputs that a plain forward pass shows.
"""
import copy
import math

import pytest
import torch
from helpers import (
    FIELDS,
    SHAPE,
    WITH_HOLES,
    batch,
    channels_of_unit,
    close,
    entries,
    gradients,
    inputs,
    loss_of,
    new,
    text,
    without,
)

import prune
import score
from model import GPT, GPTConfig, coupled

DATA_AWARE = [name for name in score.SCORES if name not in ("magnitude", "random")]


@pytest.mark.parametrize("name", WITH_HOLES)
def test_scores_take_exactly_the_entries_of_a_unit(name):
    model, _ = new(WITH_HOLES[name])
    config, batches, w = model.config, text(model.config), {n: p.detach() for n, p in model.named_parameters()}
    stats, seen = score.collect(model, batches, FIELDS), inputs(model, batches)
    each = [gradients(model, x, y) for x, y in batches]
    mean = {n: sum(g[n] for g in each) / 3 for n in w}
    by_entry = {"magnitude": lambda n: w[n].abs(), "taylor": lambda n: (w[n] * mean[n]).abs(),
                "sensitivity": lambda n: sum((w[n] * g[n]).abs() for g in each) / 3,
                "taylor2": lambda n: (w[n] * mean[n] - w[n]**2 * 4 * sum(g[n]**2 for g in each) / 6).abs()}
    def flap(n, power=1):
        metric = (seen[n].flatten(0, 1).var(0, correction=0) * w[n].square().sum(0))**power
        return (metric - metric.mean()) / metric.std(correction=0)
    by_channel = {"wanda": lambda n: seen[n].square().mean((0, 1)).sqrt() * w[n].abs().sum(0), "flap": flap,
                  "flap-squared": lambda n: flap(n, 2 if "attn" in n else 1)}
    found = {name: score.SCORES[name].function(model, stats) for name in score.SCORES}
    for scores in found.values():
        assert {key: len(s) for key, s in scores.items()} == config.widths()
    for (layer, kind), n in config.widths().items():
        for unit in range(n):
            own, channels = entries(config, layer, kind, unit), channels_of_unit(config, layer, kind, unit)
            reader = coupled(config, layer, kind)[-1][0]
            for name, entry in by_entry.items():
                values = torch.cat([entry(key)[index].flatten() for key, index in own])
                assert len(values) == config.unit_params(layer, kind) and values.abs().sum() > 0
                assert found[name][layer, kind].dtype == torch.float32
                close(found[name][layer, kind][unit], values.mean(), 1e-5)
            for name, channel in by_channel.items():
                torch.testing.assert_close(found[name][layer, kind][unit].double(), channel(reader)[channels].mean(),
                                           rtol=1e-3, atol=1e-3)
            x = seen[reader][..., channels]                                            # (windows, T, channels)
            windows = x.abs().mean(1)                                                  # (windows, channels)
            close(found["minitron"][layer, kind][unit], windows.square().sum(0).mean().sqrt(), 1e-4)
            close(found["activation"][layer, kind][unit], x.square().sum(0).mean(-1).sqrt().mean(0), 1e-4)


@pytest.mark.parametrize("name", ["gqa", "gqa+bias"])
def test_query_heads_by_h_modulo_K_would_give_other_scores(name):
    """The misaligned sum in released code: query head h belongs to KV head h // (H/K), not to h % K."""
    model, _ = new(WITH_HOLES[name])
    H, K, D = model.config.n_head[1], model.config.n_kv_head[1], model.config.head_dim
    right, heads = score.magnitude(model, None)[1, "kv"], torch.arange(H * D) // D
    attn, misaligned = model.blocks[1].attn, []
    for unit in range(K):
        own, served = torch.arange(K * D) // D == unit, heads % K == unit
        parts = [attn.o.weight[:, served]] + [part[rows] for linear, rows in ((attn.q, served), (attn.k, own),
                                              (attn.v, own)) for part in linear.parameters()]
        misaligned.append(torch.cat([part.flatten() for part in parts]).abs().mean().item())
    assert (right - torch.tensor(misaligned)).abs().max() > 1e-3


def test_sensitivity_of_gradients_in_place_is_that_of_one_batch():
    model, _ = new(WITH_HOLES["all"])
    one = score.collect(model, text(model.config, 1), {"sensitivity"}).sensitivity
    loss_of(model, *batch(model.config, 0)).backward()
    for key, scores in score.sensitivity(model).items():
        close(scores, one[key])


def test_written_examples_of_each_criterion():
    """Two channels with W = [[3, 1], [-4, 1]]: sums |.| 7, 2; squares 25, 2."""
    model = GPT(GPTConfig(vocab_size=3, block_size=2, d_model=2, head_dim=2, n_head=(0,), n_kv_head=(0,), d_ff=(2,)))
    gate, up, down = (f"blocks.0.ffn.{name}.weight" for name in ("gate", "up", "down"))
    for name, values in ((gate, [[1, 2], [1, 1]]), (up, [[0, 1], [2, 0]]), (down, [[3, 1], [-4, 1]])):
        model.get_parameter(name).data = torch.tensor(values, dtype=torch.float32)
    g = {gate: [[1, 1], [0, 1]], up: [[5, -1], [1, 9]], down: [[1, 0], [1, 0]]}
    h = {gate: [[2, 1], [0, 4]], up: [[9, 2], [1, 9]], down: [[2, 2], [1, 2]]}
    stats = score.Stats(grad={name: torch.tensor(v, dtype=torch.float32) for name, v in g.items()},
                        grad_sq={name: torch.tensor(v, dtype=torch.float32) for name, v in h.items()},
                        mean={down: torch.tensor([2., 0])}, square={down: torch.tensor([5., 9])},
                        position={down: torch.tensor([[4., 1], [16, 0]])}, size={down: torch.tensor([9., 4])})
    expected = {"magnitude": [(3 + 1 + 7) / 6, (2 + 2 + 2) / 6],
                "taylor": [(1 + 2 + 0 + 1 + 3 + 4) / 6, (0 + 1 + 2 + 0 + 0 + 0) / 6],
                # gate: |1-1| |2-2|, |0-0| |1-2|; up: 0 |-1-1|, |2-2| 0; down: |3-9| |-4-8|, |0-1| |0-1|
                "taylor2": [(0 + 0 + 0 + 2 + 6 + 12) / 6, (0 + 1 + 0 + 0 + 1 + 1) / 6],
                "wanda": [7 * math.sqrt(5), 2 * 3],
                "flap": [1, -1], "flap-squared": [1, -1],                         # 25 · (5 - 4) and 2 · 9
                "activation": [(2 + 4) / 2, (1 + 0) / 2], "minitron": [3, 2]}
    for name, values in expected.items():
        assert score.SCORES[name].function(model, stats)[0, "ffn"].tolist() == pytest.approx(values), name


def test_flap_of_a_single_channel_is_a_number():
    model, _ = new(WITH_HOLES["plain"].resized({(0, "ffn"): 1}))
    assert score.flap(model, score.collect(model, text(model.config), {"mean", "square"}))[0, "ffn"].tolist() == [0]


def test_random_is_its_seeds():
    model, _ = new(WITH_HOLES["all"])
    a, b, c = (score.random(model, score.Stats(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) and not torch.equal(a[key], c[key]) for key in a)


# -- do scores mean anything?

@pytest.fixture(scope="module")
def planted():
    """A model with neurons whose gates never open, and a KV group whose values are always 0; all their weights are
    large."""
    model, _ = new(GPTConfig(**SHAPE | dict(d_model=24), n_head=(4, 8), n_kv_head=(4, 4), d_ff=(16, 32)), torch.float32)
    block, heads, group = model.blocks[1], range(8, 16), range(4, 8)           # KV group 1 serves query heads 2 and 3
    with torch.no_grad():
        for linear, units in ((block.ffn.up, [8, 30]), (block.attn.q, heads), (block.attn.k, group)):
            linear.weight[list(units)] *= 5
        block.ffn.down.weight[:, [8, 30]] *= 5
        block.attn.o.weight[:, heads] *= 5
        model.embed.weight[:, 0], block.ffn_norm.weight[0] = 5, 1              # a channel that is always positive
        block.ffn.gate.weight[[8, 30]] = torch.tensor([-100.] + [0.] * 23)     # so silu(gate) <= 100·exp(-100)
        block.attn_norm.weight[1] = 0                                          # a channel that attention never hears,
        block.attn.v.weight[group] = torch.tensor([0., 20] + [0.] * 22)        # and what these hear alone
    return model, score.collect(model, text(model.config), FIELDS)


@pytest.mark.parametrize("name", [*DATA_AWARE, "magnitude"])
def test_useless_units_rank_last(planted, name):
    found = score.SCORES[name].function(*planted)
    neurons, groups = (found[1, kind].argsort().tolist() for kind in ("ffn", "kv"))
    if name == "magnitude":
        assert {*neurons[-2:]} == {8, 30} and groups[-1] == 1                  # the plants are real
    else:
        assert {*neurons[:2]} == {8, 30} and groups[0] == 1


@pytest.fixture(scope="module")
def learned():
    """A model after 60 steps of "the next token is the sum of the last two, mod 11"; 8 batches of the task."""
    config = GPTConfig(vocab_size=11, block_size=16, d_model=24, head_dim=12, n_head=(2,), n_kv_head=(2,), d_ff=(32,))
    tokens = torch.randint(11, (8, 32, 17), generator=torch.Generator().manual_seed(1))
    for i in range(2, 17):
        tokens[..., i] = (tokens[..., i - 1] + tokens[..., i - 2]) % 11
    model, optimizer = new(config, torch.float32)
    with torch.no_grad():
        for p in optimizer.param_groups[0]["params"]:
            p *= 0.4                                                           # large weights learn by heart
    batches = [(rows[:, :-1], rows[:, 1:]) for rows in tokens]
    for step in range(60):
        optimizer.zero_grad()
        loss_of(model, *batches[step % 8]).backward()
        optimizer.step()
    return model, batches


def spearman(a, b):
    ranks = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in (a, b)]).argsort().argsort()
    return torch.corrcoef(ranks.double())[0, 1].item()


def test_scores_agree_with_leaving_one_out(learned):
    model, batches = learned
    x, y = (torch.cat(parts) for parts in zip(*batches))
    stats, base, change = score.collect(model, batches, FIELDS), loss_of(model, x, y).item(), []
    for unit in range(32):
        prune.zero_(lone := copy.deepcopy(model), None, without(model.config, 0, "ffn", unit))
        change.append(loss_of(lone, x, y).item() - base)
    found = {name: spearman(row.function(model, stats)[0, "ffn"], change) for name, row in score.SCORES.items()}
    print(f"loss {base:.3f} of {math.log(11):.3f} nats per token; Spearman of score and loss change over 32 neurons: "
          + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    assert base < math.log(11) - .5 and min(found[name] for name in DATA_AWARE) >= .5 > found["random"]


def test_a_layer_that_is_gone_moves_no_other_s_importance():
    """Its input is its output: a cosine of 1 that would be the least important of all."""
    cosines = [.9, 1., .5, .7]
    stats = score.Stats(cosine={(layer, "layer"): value for layer, value in enumerate(cosines)})
    without = score.Stats(cosine={(layer, "layer"): value for layer, value in enumerate((.9, .5, .7))})
    first, *rest = score.importance(without, 3)
    assert score.importance(stats, 4, absent=[1]) == [first, 0, *rest]


# -- moving averages while a model trains

def test_moving_averages_against_written_out_numbers():
    key, averages = (0, "ffn"), [None]
    for fresh in ([1., 4.], [2., 2.], [3., 1.]):
        averages.append(score.average(averages[-1], {key: torch.tensor(fresh, dtype=torch.float64)}))
    expected = [[1, 4], [0, 0]], \
        [[1.15, 3.7], [.0425, .085]], \
        [[1.4275, 3.295], [.119, .1955]]
    # 0.85·1 + 0.15·2, 0.85·4 + 0.15·2; the change is from the new mean: 0.05·|2 - 1.15|, 0.05·|2 - 3.7|
    # 0.85·1.15 + 0.15·3, 0.85·3.7 + 0.15·1; 0.95·0.0425 + 0.05·|3 - 1.4275|, 0.95·0.085 + 0.05·|1 - 3.295|
    for found, numbers in zip(averages[1:], expected):                         # earlier ones were not overwritten
        torch.testing.assert_close(found[key], torch.tensor(numbers, dtype=torch.float64))


def test_ranking_with_dead_units_and_uncertainty():
    key, averages = (0, "kv"), {(0, "kv"): torch.tensor([[3., 2., 9., 1.], [.1, 1., 5., .5]])}
    alive = {key: torch.tensor([0, 1, 3])}
    plain, uncertain = (score.mask_dead(score.ranking(averages, twice), alive) for twice in (False, True))
    assert plain[key].tolist() == [3, 2, -math.inf, 1]
    torch.testing.assert_close(uncertain[key], torch.tensor([.3, 2., -math.inf, .5]))
    assert [prune.choose(scores, {key: 2})[key].tolist() for scores in (plain, uncertain)] == [[0, 1], [1, 3]]

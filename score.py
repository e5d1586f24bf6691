"""What a unit is worth: the statistics of one calibration pass, and the criteria that rank units by them.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --score flap          # any name in SCORES
    python -m pytest tests/test_score.py           # against leave-one-out, and against units that are planted useless

`collect` runs the model over the calibration windows and keeps only what the asked scores need. A score is a small
pure function (model, stats) -> {(layer, kind): (units,)}, higher is better. **A new criterion is one function and one
row of SCORES.** Scores are means over a unit's entries or channels, so that kinds compare. A KV group's score takes
the entries of the query heads it serves (the released code of Adapt-Pruner and LLM-Pruner sums other ones).

Shapes: B windows, T tokens, C d_model, n inputs of a matrix, "units" of one (layer, kind). Not here: how much each
layer keeps (allocate.py), the cut (prune.py).
"""
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from common import UserError
from distill import chunked_loss
from model import by_unit, coupled, rotary

READERS = ("attn.o", "ffn.down")                  # the matrices that read the units' outputs: their inputs are channels


# -- statistics

@dataclass
class Stats:
    """Of one calibration pass; empty where not asked for. Names are those of parameters."""
    tokens: int = 0
    windows: int = 0
    seed: int = 0                                         # of the score "random"
    grad: dict = field(default_factory=dict)              # {name: dL/dw (shape of w), mean over batches}
    grad_sq: dict = field(default_factory=dict)           # {name: mean square of one window's gradient, as far as the
    #                                                        windows of a batch are independent}
    sensitivity: dict = field(default_factory=dict)       # {(layer, kind): (units,), mean over batches of |w · dL/dw|}
    mean: dict = field(default_factory=dict)              # {name: (n,), of a matrix's inputs over tokens}
    square: dict = field(default_factory=dict)            # {name: (n,), mean square of them}
    position: dict = field(default_factory=dict)          # {name: (T, n), sum over windows of their squares}
    gram: dict = field(default_factory=dict)              # {name: (n, n), mean over tokens of x xᵀ}
    cosine: dict = field(default_factory=dict)            # {(layer, "layer" | kind): the residual stream's, mean over
    #                                                        tokens, in front of and behind the layer or sub-block}
    channel: dict = field(default_factory=dict)           # {norm: (T, C), sum over windows of its outputs' squares}


def sums_by_unit(tensor, dim, units):
    """(units,): sum over the entries of each unit."""
    return by_unit(tensor, dim, units).movedim(dim, 0).flatten(1).sum(1)


def collect(model, batches, needs, readers=READERS):
    """One pass over `batches`, a list of token ids (x, y), each (B, T) -> Stats with the fields named in `needs`.

    Peak memory: weights, the sums asked for (gradients are freed one by one as they come), activations of one batch.
    A batch's loss is its mean in nats per token. `readers`: ends of the names of the matrices whose inputs are taken.
    Leaves the model, its gradients and their flags as they were."""
    stats, device = Stats(), model.embed.weight.device
    wants_grad = bool({"grad", "grad_sq", "sensitivity"} & {*needs})
    owner = {name: (key, dim, n) for key, n in model.config.widths().items() if n
             for name, dim in coupled(model.config, *key)}
    parameters = dict(model.named_parameters())
    saved = {p: (p.requires_grad, p.grad) for p in parameters.values()}
    with contextlib.ExitStack() as hooks:
        for name, p in parameters.items():
            p.requires_grad_(wants_grad and name in owner)
            p.grad = None
            if p.requires_grad:
                hooks.callback(p.register_post_accumulate_grad_hook(take_gradient(stats, needs, name, owner)).remove)
        for name, module in model.named_modules():
            if name.endswith(readers) and {"mean", "square", "position", "gram"} & {*needs}:
                hooks.callback(module.register_forward_pre_hook(take_inputs(stats, needs, f"{name}.weight")).remove)
            if name.endswith("norm") and not name.endswith(("q_norm", "k_norm")) and "channel" in needs:
                hooks.callback(module.register_forward_hook(take_channels(stats, name)).remove)
        for layer, block in enumerate(model.blocks) if "cosine" in needs else ():
            for module, take in take_cosines(stats, layer, block):
                hooks.callback(module.register_forward_hook(take).remove)
        try:
            for x, y in batches:                                                # a list, or a progress bar around one
                with torch.set_grad_enabled(wants_grad):
                    hidden = model.hidden(x.to(device))
                    if wants_grad:
                        chunked_loss(hidden, model.head_weight, y.to(device))[0].backward()
                stats.tokens, stats.windows = stats.tokens + x.numel(), stats.windows + len(x)
        finally:
            for p, (flag, grad) in saved.items():
                p.requires_grad_(flag)
                p.grad = grad
    return averaged(stats, model.config, len(batches))


def averaged(stats, config, n):
    """Sums -> means: of gradients over the n batches, of everything else over tokens. The mean of m independent
    windows' gradients has 1/m of the mean square of one's."""
    for sums, count in ((stats.grad, n), (stats.grad_sq, n * n / stats.windows), (stats.mean, stats.tokens),
                        (stats.square, stats.tokens), (stats.gram, stats.tokens), (stats.cosine, stats.tokens)):
        for key in sums:
            sums[key] = sums[key] / count
    if stats.sensitivity:
        stats.sensitivity = means_by_unit(config, lambda name, dim, units: stats.sensitivity[name] / n)
    return stats


def add(sums, key, value):
    sums[key] = sums[key].add_(value) if key in sums else value


def take_gradient(stats, needs, name, owner):
    """Hook: as soon as a parameter's gradient is whole it goes into the sums and is freed."""
    _, dim, units = owner[name]

    @torch.no_grad()
    def hook(p):
        g, p.grad = p.grad, None
        if "sensitivity" in needs:
            add(stats.sensitivity, name, sums_by_unit((p * g).abs(), dim, units))
        if "grad_sq" in needs:
            add(stats.grad_sq, name, g * g)
        if "grad" in needs:
            add(stats.grad, name, g)
    return hook


def take_inputs(stats, needs, name):
    @torch.no_grad()
    def hook(module, args):
        x = args[0].detach().float()                                            # (B, T, n)
        rows = x.flatten(0, 1)
        if "mean" in needs:
            add(stats.mean, name, rows.sum(0))
        if "square" in needs:
            add(stats.square, name, rows.square().sum(0))
        if "position" in needs:
            add(stats.position, name, x.square().sum(0))
        if "gram" in needs:
            with torch.autocast(x.device.type, enabled=False):
                add(stats.gram, name, rows.T @ rows)
    return hook


def take_channels(stats, name):
    @torch.no_grad()
    def hook(module, args, out):
        add(stats.channel, name, out.detach().float().square().sum(0))
    return hook


def take_cosines(stats, layer, block):
    """[(module, hook)]: the residual stream in front of a layer, between its sub-blocks, and behind it."""
    stream = {}

    def cosine(a, b):
        return F.cosine_similarity(a.float(), b.float(), dim=-1).sum().item()

    @torch.no_grad()
    def attention(module, args, out):
        stream["attn"] = out.detach()

    @torch.no_grad()
    def whole(module, args, out):
        middle = args[0] + stream.pop("attn") if block.attn is not None else args[0]
        for key, a, b in (("kv", args[0], middle), ("ffn", middle, out), ("layer", args[0], out)):
            stats.cosine[layer, key] = stats.cosine.get((layer, key), 0.0) + cosine(a.detach(), b.detach())

    return ([(block.attn, attention)] if block.attn is not None else []) + [(block, whole)]


def batches(tokens, block_size, windows, micro_batch, seed, flag="--windows"):
    """`windows` windows of `tokens` as a list of (x, y), each (micro_batch, block_size); which ones: `seed`. UserError,
    which names the `flag`: the text holds fewer, or they do not fill whole batches."""
    if data.windows(tokens, block_size, "the calibration text") < windows:
        raise UserError(f"the calibration text has {len(tokens):,} tokens, {windows} windows of {block_size} need "
                        f"{windows * block_size + 1:,}: give more text, or fewer {flag}")
    if windows % micro_batch:
        raise UserError(f"{flag} {windows} is no multiple of --micro-batch {micro_batch}; try "
                        f"{-(-windows // micro_batch) * micro_batch}")
    return [data.batch(tokens, block_size, seed, step, 0, micro_batch=micro_batch, micro_steps=1)
            for step in range(windows // micro_batch)]


# -- means over units

def means_by_unit(config, sums):
    """{(layer, kind): (units,) float32}: mean over each unit's entries in all its parameters, of `sums(name, dim,
    units)`, which gives their sum (units,). An absent sub-block gives an empty tensor."""
    scores = {}
    for (layer, kind), units in config.widths().items():
        parts = [sums(name, dim, units) for name, dim in coupled(config, layer, kind)] if units else []
        scores[layer, kind] = sum(parts).float() / config.unit_params(layer, kind) if parts else torch.zeros(0)
    return scores


@torch.no_grad()
def by_entry(model, entry):
    """Score units by their weights: mean of `entry(name, w)`, which has w's shape, over a unit's entries."""
    parameters = dict(model.named_parameters())
    return means_by_unit(model.config, lambda name, dim, units: sums_by_unit(entry(name, parameters[name]), dim, units))


@torch.no_grad()
def by_channel(model, channels):
    """Score units by their outputs: mean of `channels(name, w)`, (n,), over a unit's channels, where w (C, n) is the
    matrix that reads them."""
    parameters, scores = dict(model.named_parameters()), {}
    for (layer, kind), units in model.config.widths().items():
        name = coupled(model.config, layer, kind)[-1][0]
        scores[layer, kind] = channels(name, parameters[name]).float().unflatten(0, (units, -1)).mean(1) \
            if units else torch.zeros(0)
    return scores


# -- the criteria

def magnitude(model, stats):
    """|w|."""
    return by_entry(model, lambda name, w: w.abs())


def random(model, stats):
    """Uniform in [0, 1), by stats.seed: what any other must beat."""
    generator = torch.Generator().manual_seed(stats.seed)
    return {key: torch.rand(units, generator=generator) for key, units in model.config.widths().items()}


def taylor(model, stats):
    """|w · g| with the gradient g of the whole calibration text: LLM-Pruner's first order (arXiv 2305.11627, eq. 3-5),
    and Adapt-Pruner's (arXiv 2502.03460)."""
    return by_entry(model, lambda name, w: (w * stats.grad[name]).abs())


def taylor2(model, stats):
    """|w · g - w² · H / 2| with H ≈ mean of g² over windows: LLM-Pruner's second order (arXiv 2305.11627, eq. 5)."""
    return by_entry(model, lambda name, w: (w * stats.grad[name] - w.square() * stats.grad_sq[name] / 2).abs())


def sensitivity(model, stats=None):
    """|w · g| per batch, averaged over batches: what IDEA Prune (arXiv 2503.05920) is known to use, in the form of
    LoSparse (arXiv 2306.11222). Without stats: from the gradients in place (train.py, averaged by `average`)."""
    return stats.sensitivity if stats else by_entry(model, lambda name, w: (w * w.grad).abs())


def activation(model, stats):
    """Size of a unit's output: L2 over windows (and a head's channels), mean over positions. Minitron
    (arXiv 2407.14679, eq. 1 and section 2.2)."""
    scores = {}
    for (layer, kind), units in model.config.widths().items():
        name = coupled(model.config, layer, kind)[-1][0]
        scores[layer, kind] = stats.position[name].unflatten(1, (units, -1)).mean(2).sqrt().mean(0) \
            if units else torch.zeros(0)
    return scores


def wanda(model, stats):
    """‖x_j‖ · |W_:j|, x_j the unit's outputs over the calibration text, W what reads them: Wanda-sp, the structured
    form of Wanda (arXiv 2306.11695) that FLAP compares with."""
    return by_channel(model, lambda name, w: stats.square[name].sqrt() * w.abs().sum(0))


def flap(model, stats):
    """Var(x_j) · ‖W_:j‖², standardised over the channels of one layer and kind, so that layers and kinds compete: FLAP
    (arXiv 2312.11983, eq. 5-6)."""
    def channels(name, w):
        metric = (stats.square[name] - stats.mean[name].square()).clamp(min=0) * w.square().sum(0)
        return (metric - metric.mean()) / metric.std(correction=0).clamp(min=1e-30)
    return by_channel(model, channels)


@dataclass(frozen=True)
class Score:
    function: Callable        # (model, stats) -> {(layer, kind): (units,)}
    needs: frozenset          # the fields of Stats that it reads, as `collect` takes them


SCORES = {
    "sensitivity": Score(sensitivity, frozenset({"sensitivity"})),
    "taylor": Score(taylor, frozenset({"grad"})),
    "taylor2": Score(taylor2, frozenset({"grad", "grad_sq"})),
    "activation": Score(activation, frozenset({"position"})),
    "wanda": Score(wanda, frozenset({"square"})),
    "flap": Score(flap, frozenset({"mean", "square"})),
    "magnitude": Score(magnitude, frozenset()),
    "random": Score(random, frozenset()),
}


# -- whole layers

def influence(stats, layer, kind="layer"):
    """1 - cos(residual stream in front of a layer or sub-block, behind it), mean over tokens: ShortGPT's block
    influence (arXiv 2403.03853, eq. 1)."""
    return 1 - stats.cosine[layer, kind]


def importance(stats, layers):
    """[I_l in [-1, 1]]: -cos of layer input and output, less its mean over layers, by the largest size: Adapt-Pruner's
    relative importance (arXiv 2502.03460)."""
    cosine = torch.tensor([-stats.cosine[layer, "layer"] for layer in range(layers)], dtype=torch.float64)
    cosine = cosine - cosine.mean()
    return (cosine / cosine.abs().max().clamp(min=1e-30)).tolist()


# -- measured: the model with something left out, run again from there on

@torch.no_grad()
def reruns(model, x, y, every=1):
    """-> run(layer, block) -> (loss, KL(dense ‖ it)), nats per token: the model with `block` as it is now in the place
    of that layer, run from there on. Losses of every so many tokens: logits are half of the work."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    x, y = x.to(device), y.to(device)
    cos, sin = rotary(model.config, 0, x.size(1), device, dtype)
    streams = [model.embed(x)]
    for block in model.blocks:
        streams.append(block(streams[-1], cos, sin))
    dense, y = model.norm(streams[-1])[:, ::every], y[:, ::every]

    def run(layer, block):
        stream = block(streams[layer], cos, sin)
        for later in model.blocks[layer + 1:]:
            stream = later(stream, cos, sin)
        hidden = model.norm(stream)[:, ::every]
        ce, kl, _ = chunked_loss(hidden, model.head_weight, y, dense, model.head_weight)[1].tolist()
        return ce, kl
    return run


def without(model, batches, kinds=("layer",)):
    """{(layer, kind): by how many nats per token the loss rises without that layer or sub-block}: Shortened LLaMA's
    perplexity criterion (arXiv 2402.02834, section 3.2). kinds: "layer", "kv" (the attention), "ffn"."""
    found = {(layer, kind): 0.0 for layer in range(model.config.n_layer) for kind in kinds}
    for x, y in batches:
        run = reruns(model, x, y)
        dense = run(model.config.n_layer - 1, model.blocks[-1])[0]
        for layer, kind in tqdm(found, desc="measure", leave=False, disable=None):
            block = model.blocks[layer]
            with absent(block, kind):
                found[layer, kind] += (run(layer, block)[0] - dense) / len(batches)
    return found


@contextlib.contextmanager
def absent(block, kind):
    """A layer's attention, its FFN or both switched off."""
    was = block.attn, block.ffn
    block.attn, block.ffn = was[0] if kind == "ffn" else None, was[1] if kind == "kv" else None
    try:
        yield
    finally:
        block.attn, block.ffn = was


def damage(model, batches, scores, widths, reader):
    """{(layer, kind): [(units, nats per token)]}: KL(model ‖ model whose one sub-block keeps only its best units), for
    the numbers of units widths[layer, kind], and 0 for all. `reader(name, w, kept)` gives the columns, (C, kept), that
    read the channels which are left. Our choice: a KL needs fewer tokens than a difference of losses; every 4th."""
    config, found = model.config, {key: [(n, 0.0)] for key, n in model.config.widths().items() if n and key in widths}
    runs = [reruns(model, x, y, every=4) for x, y in batches]
    for (layer, kind), points in tqdm(found.items(), desc="measure", leave=False, disable=None):
        name = coupled(config, layer, kind)[-1][0]
        p = model.get_parameter(name)
        ranked = scores[layer, kind].argsort(descending=True, stable=True).to(p.device)
        whole = p.data
        for units in widths[layer, kind]:
            kept = channels_of(ranked[:units], p.size(1) // points[0][0])
            p.data = torch.zeros_like(whole).index_copy_(1, kept, reader(name, whole, kept))
            torch.clear_autocast_cache()                                        # autocast goes on with its copy of p
            points.append((units, sum(run(layer, model.blocks[layer])[1] for run in runs) / len(runs)))
        p.data = whole
        torch.clear_autocast_cache()
    return found


def channels_of(units, each):
    """Indices of the channels of these units, `each` of them side by side: (units,) -> (units · each,)."""
    return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


# -- channels of the residual stream

@torch.no_grad()
def residual_channels(model, stats, name):
    """(C,): what each channel of the residual stream is worth, by the score of that name: magnitude or taylor, means
    over the entries that read or write it (LLM-Pruner's channel-wise cut; embeddings left out: our choice), or
    activation, the norms' outputs, L2 over windows, mean over positions, summed over norms (Minitron, arXiv
    2407.14679)."""
    if name == "activation":
        return sum(square.sqrt().mean(0) for square in stats.channel.values())
    entry = {"magnitude": lambda name, w: w.abs(), "taylor": lambda name, w: (w * stats.grad[name]).abs()}[name]
    return sum(entry(name, w).sum(dim).float() for name, w in model.named_parameters()
               for dim in [0 if name.endswith(("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight")) else 1]
               if name.startswith("blocks.") and w.dim() == 2)


# -- moving averages while a model trains

def average(averages, fresh, beta=0.85, beta_uncertainty=0.95):
    """Moving averages of the score I and of its change U (PLATON, arXiv 2206.12562, eq. 6-7): Ī <- β Ī + (1-β) I, U <-
    β' U + (1-β') |I - Ī|. {(layer, kind): (2, units)}; the first call starts at (I, 0). Returns new tensors."""
    if averages is None:
        return {key: torch.stack((i, torch.zeros_like(i))) for key, i in fresh.items()}
    new = {}
    for key, i in fresh.items():
        mean = beta * averages[key][0] + (1 - beta) * i
        new[key] = torch.stack((mean, beta_uncertainty * averages[key][1] + (1 - beta_uncertainty) * (i - mean).abs()))
    return new


def ranking(averages, uncertainty=False):
    """What `choose` ranks by: Ī (LoSparse), or Ī · U with `uncertainty` (PLATON; there by weight, here by unit, our
    choice: changes that cancel within a unit are none)."""
    return {key: mean * change if uncertainty else mean for key, (mean, change) in averages.items()}


def mask_dead(scores, alive):
    """The scores of the units in `alive`, {(layer, kind): indices}; of all others, which are dead already, -inf."""
    masked = {}
    for key, worth in scores.items():
        living = alive[key].to(worth.device)
        masked[key] = torch.full_like(worth, -math.inf).index_copy_(0, living, worth[living])
    return masked

"""What a unit is worth: the statistics of one calibration pass, and criteria that rank units by
them.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --score flap      # any name in SCORES
    python -m pytest tests/test_score.py      # against leave-one-out and planted useless units

`collect` runs the model over the calibration windows and keeps only the statistics that a score
needs. A score is a small pure function (model, stats) -> {(layer, kind): (units,)}; higher is
better. **A new criterion is one function and one row of SCORES.** Scores are means over a unit's
entries or channels, so that neurons and KV groups compare. A KV group's score takes the entries of
the query heads that the group serves (the released code of Adapt-Pruner and LLM-Pruner sums other
ones). While a model trains, scores of single steps go into a moving average (`average`).

Shapes: B windows, T tokens, C d_model, n inputs of a matrix, "units" of one (layer, kind). Not
here: how much each layer keeps (allocate.py), the cut (prune.py), scores of whole layers
(methods/depth.py).
"""
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import data
import shard
from common import UserError, check_multiple
from distill import chunked_loss
from model import coupled, reader_of

# The matrices that read the outputs of units.
READERS = ("attn.o", "ffn.down")
# Fields of Stats that take a backward pass, and fields about what comes into a matrix.
GRADIENTS = {"grad", "grad_sq", "sensitivity"}
INPUTS = {"mean", "square", "position", "size", "gram"}


# -- statistics

@dataclass
class Stats:
    """Statistics of one calibration pass. A field that was not asked for is empty. Names are those
    of parameters."""
    tokens: int = 0
    windows: int = 0
    # The seed of the score "random".
    seed: int = 0
    # {name: dL/dw (shape of w)}, the mean over batches.
    grad: dict = field(default_factory=dict)
    # {name: (shape of w)}, the mean square of one window's gradient, if the windows of a batch are
    # independent.
    grad_sq: dict = field(default_factory=dict)
    # {(layer, kind): (units,)}, the mean over batches of |w · dL/dw|.
    sensitivity: dict = field(default_factory=dict)
    # {name: (n,)}, mean and mean square over tokens of a matrix's inputs.
    mean: dict = field(default_factory=dict)
    square: dict = field(default_factory=dict)
    # {name: (T, n)}, the sum over windows of the inputs' squares at each position.
    position: dict = field(default_factory=dict)
    # {name: (n,)}, the sum over windows of the square of the inputs' mean size in the window.
    size: dict = field(default_factory=dict)
    # {name: (n, n)}, the mean over tokens of x xᵀ for the inputs x.
    gram: dict = field(default_factory=dict)
    # {(layer, "layer" | kind): number}, the cosine of the residual stream in front of a layer or
    # sub-block and behind it, mean over tokens.
    cosine: dict = field(default_factory=dict)
    # {norm: (T, C)}, the sum over windows of the squares of a norm's outputs at each position.
    channel: dict = field(default_factory=dict)


def cross_entropy(model, x, y):
    """The mean loss in nats of the targets y (B, T) that count, behind the tokens x (B, T)."""
    hidden = model.hidden(x)
    loss, _ = chunked_loss(hidden, model.head_weight, y.to(hidden.device))
    return loss


def collect(model, batches, needs, readers=READERS, loss=cross_entropy):
    """One pass over `batches`, an iterable of token ids (x, y), each (B, T). Returns Stats with the
    fields in `needs`. Gradients are those of loss(model, x, y), and y is whatever it reads.

    Memory: the weights, the sums that were asked for, and the activations of one batch. Gradients
    are freed one by one as they come. The model may be of bfloat16: sums are in float32 at least.
    `readers`: ends of the names of the matrices whose inputs are taken. The model, its gradients and
    their flags are left as they were."""
    stats = Stats()
    device = model.embed.weight.device
    backward = not GRADIENTS.isdisjoint(needs)
    count = 0
    with restored_gradients(model), plain_blocks(model), contextlib.ExitStack() as hooks:
        if backward:
            hook_gradients(model, stats, needs, hooks)
        else:
            model.requires_grad_(False)
        hook_activations(model, stats, needs, readers, hooks)
        # The hooks do the work while the model runs: nothing is kept but their sums.
        for x, y in batches:
            with torch.set_grad_enabled(backward):
                if backward:
                    loss(model, x.to(device), y).backward()
                else:
                    model.hidden(x.to(device))
            stats.tokens += x.numel()
            # Rows of a text are independent samples, those of another loss are not.
            stats.windows += len(x) if loss is cross_entropy else 1
            count += 1
    shard.release(model)
    add_up_processes(stats, model)
    return averaged(stats, model, count)


def add_up_processes(stats, model):
    """Add up, in place, the sums that each process of a sharded model took of its own batches. The
    gradients of a batch are means over all processes already."""
    if not shard.is_sharded(model):
        return
    counts = torch.tensor([stats.tokens, stats.windows], device=model.embed.weight.device)
    tensors = [counts]
    for sums in (stats.mean, stats.square, stats.position, stats.size, stats.gram, stats.channel):
        tensors += sums.values()
    for key, cosines in stats.cosine.items():
        stats.cosine[key] = [torch.stack(cosines).sum()]
        tensors += stats.cosine[key]
    for tensor in tensors:
        shard.add_up_(model, tensor)
    stats.tokens, stats.windows = counts.tolist()


@contextlib.contextmanager
def restored_gradients(model):
    """Inside of a `with` no parameter has a gradient; afterwards all gradients and requires_grad
    flags are back."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    for p in before:
        p.grad = None
    try:
        yield
    finally:
        for p, (flag, grad) in before.items():
            p.requires_grad_(flag)
            p.grad = grad


@contextlib.contextmanager
def plain_blocks(model):
    """Inside of a `with` no layer is compiled, as its hooks would not be called, nor recomputed in the
    backward pass, as they would count twice."""
    before = [(block, block.recompute, block.compiled) for block in model.blocks]
    for block in model.blocks:
        block.recompute = False
        block.compiled = None
    try:
        yield
    finally:
        for block, recompute, compiled in before:
            block.recompute = recompute
            block.compiled = compiled


def hook_gradients(model, stats, needs, hooks):
    """Take the gradients of all entries of units, frozen ones too, and of nothing else."""
    model.requires_grad_(False)
    for (layer, kind), units in model.config.widths().items():
        if units == 0:
            continue
        for name, dim in coupled(model.config, layer, kind):
            p = model.get_parameter(name).requires_grad_(True)
            hook = take_gradient(stats, needs, name, dim, units)
            hooks.callback(p.register_post_accumulate_grad_hook(hook).remove)


def hook_activations(model, stats, needs, readers, hooks):
    """Watch the inputs of the matrices in `readers`, the outputs of norms and the residual stream,
    as far as needed."""
    for name, module in model.named_modules():
        if name.endswith(readers) and not INPUTS.isdisjoint(needs):
            hook = take_inputs(stats, needs, f"{name}.weight")
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        if "channel" in needs and name.endswith("norm") and not name.endswith(("q_norm", "k_norm")):
            hooks.callback(module.register_forward_hook(take_channels(stats, name)).remove)
    if "cosine" in needs:
        for layer, block in enumerate(model.blocks):
            for module, hook in take_cosines(stats, layer, block):
                hooks.callback(module.register_forward_hook(hook).remove)


def take_gradient(stats, needs, name, dim, units):
    """Hook of a parameter: as soon as its gradient is complete, it goes into the sums and is
    freed."""
    @torch.no_grad()
    def hook(p):
        # Sums over many gradients need more digits than bfloat16 has.
        g = p.grad.to(torch.promote_types(p.dtype, torch.float32))
        p.grad = None
        if "sensitivity" in needs:
            add(stats.sensitivity, name, shard.sums_by_unit((p * g).abs(), dim, units))
        if "grad_sq" in needs:
            add(stats.grad_sq, name, g * g)
        if "grad" in needs:
            add(stats.grad, name, g)
    return hook


def take_inputs(stats, needs, name):
    """Hook of a matrix: sums over its inputs (B, T, n)."""
    @torch.no_grad()
    def hook(module, args):
        x = args[0].detach().float()
        rows = x.flatten(0, 1)
        if "mean" in needs:
            add(stats.mean, name, rows.sum(0))
        if "square" in needs:
            add(stats.square, name, rows.square().sum(0))
        if "position" in needs:
            add(stats.position, name, x.square().sum(0))
        if "size" in needs:
            add(stats.size, name, x.abs().mean(1).square().sum(0))
        if "gram" in needs:
            # Autocast would round the products to bfloat16.
            with torch.autocast(x.device.type, enabled=False):
                add(stats.gram, name, rows.T @ rows)
    return hook


def take_channels(stats, name):
    """Hook of a norm: sums over its outputs (B, T, C)."""
    @torch.no_grad()
    def hook(module, args, out):
        add(stats.channel, name, out.detach().float().square().sum(0))
    return hook


def take_cosines(stats, layer, block):
    """[(module, hook)] that compare the residual stream (B, T, C) in front of a layer, between its
    sub-blocks, and behind the layer."""
    outputs = {}

    @torch.no_grad()
    def attention_hook(module, args, out):
        outputs["attention"] = out.detach()

    @torch.no_grad()
    def block_hook(module, args, out):
        before = args[0].detach()
        # The stream between the two sub-blocks is not a module's output: it is added up here.
        middle = before if block.attn is None else before + outputs.pop("attention")
        after = out.detach()
        add_cosine("kv", before, middle)
        add_cosine("ffn", middle, after)
        add_cosine("layer", before, after)

    def add_cosine(part, a, b):
        cosines = F.cosine_similarity(a.float(), b.float(), dim=-1)
        # Numbers are read at the end: a GPU would have to stop for each.
        stats.cosine.setdefault((layer, part), []).append(cosines.sum())

    if block.attn is None:
        return [(block, block_hook)]
    return [(block.attn, attention_hook), (block, block_hook)]


def add(sums, key, value):
    """sums[key] += value, in place from the second time on."""
    sums[key] = sums[key].add_(value) if key in sums else value


def averaged(stats, model, count):
    """Turn sums into means: of gradients over `count` batches, of everything else over tokens."""
    divide(stats.grad, count)
    for key, sums in stats.cosine.items():
        stats.cosine[key] = sum(cosine.item() for cosine in sums)
    # The mean of m independent windows' gradients has 1/m of the mean square of one window's
    # gradient.
    divide(stats.grad_sq, count * count / stats.windows)
    for sums in (stats.mean, stats.square, stats.gram, stats.cosine):
        divide(sums, stats.tokens)
    if stats.sensitivity:
        sums = stats.sensitivity
        stats.sensitivity = means_by_unit(model, lambda name, dim, units: sums[name] / count)
    return stats


def divide(sums, count):
    for key in sums:
        sums[key] = sums[key] / count


def batches(tokens, block_size, windows, micro_batch, seed, flag="--windows"):
    """So many windows of `tokens` (N,), chosen by `seed`, as a list of (x, y), each (micro_batch,
    block_size). Raises UserError, which names the `flag`, if the text holds fewer windows or if
    they do not fill whole batches. In a Mixture the windows of its parts take turns."""
    available = data.windows(tokens, block_size, "the calibration text")
    if available < windows and isinstance(tokens, data.Mixture):
        raise UserError(f"a text of the mixture is over after {available} of {windows} windows of {block_size}: give "
                        f"more of it, a smaller weight to it, or fewer {flag}")
    if available < windows:
        raise UserError(f"the calibration text has {len(tokens):,} tokens, {windows} windows of "
                        f"{block_size} need {windows * block_size + 1:,}: give more text, or fewer "
                        f"{flag}")
    check_multiple(flag, windows, micro_batch)
    return [data.batch(tokens, block_size, seed, step, 0, micro_batch=micro_batch, micro_steps=1)
            for step in range(windows // micro_batch)]


# -- from entries and channels to units

def wide(p):
    """The parameter in float32 at least: scores of bfloat16 would have 8 bits, and many ties."""
    return p.to(torch.promote_types(p.dtype, torch.float32))


def means_by_unit(model, sums):
    """The mean over each unit's entries in all of its parameters: {(layer, kind): (units,)
    float32}. A function sums(name, dim, units) -> (units,) gives the sums over one parameter, as far
    as this process holds it. An absent sub-block gives an empty tensor."""
    config = model.config
    totals = {}
    for (layer, kind), units in config.widths().items():
        if units:
            totals[layer, kind] = sum(sums(name, dim, units) for name, dim in coupled(config, layer, kind))
    shard.add_up_units_(model, totals)
    scores = {}
    for key in config.widths():
        scores[key] = totals[key].float() / config.unit_params(*key) if key in totals else torch.zeros(0)
    return scores


@torch.no_grad()
def by_entry(model, entry):
    """Score units by their weights: the mean of entry(name, w), which has w's shape, over a unit's
    entries."""
    def sums(name, dim, units):
        return shard.sums_by_unit(entry(name, wide(model.get_parameter(name))), dim, units)
    return means_by_unit(model, sums)


@torch.no_grad()
def by_channel(model, channels):
    """Score units by their outputs: the mean of channels(name, w) -> (n,) over a unit's channels.
    The matrix w (C, n) reads the channels."""
    scores = {}
    for (layer, kind), units in model.config.widths().items():
        if units == 0:
            scores[layer, kind] = torch.zeros(0)
            continue
        name = reader_of(model.config, layer, kind)
        values = shard.whole(channels(name, wide(model.get_parameter(name)))).float()
        scores[layer, kind] = values.unflatten(0, (units, -1)).mean(1)
    return scores


# -- the criteria

def magnitude(model, stats):
    """|w|."""
    return by_entry(model, lambda name, w: w.abs())


def random(model, stats):
    """Uniform in [0, 1), by stats.seed: what any other must beat."""
    generator = torch.Generator().manual_seed(stats.seed)
    widths = model.config.widths()
    return {key: torch.rand(units, generator=generator) for key, units in widths.items()}


def taylor(model, stats):
    """|w · g| with the gradient g of the whole calibration text: LLM-Pruner's first order (arXiv
    2305.11627, eq. 3-5), and Adapt-Pruner's (arXiv 2502.03460)."""
    return by_entry(model, lambda name, w: (w * stats.grad[name]).abs())


def taylor2(model, stats):
    """|w · g - w² · H / 2| with H ≈ mean of g² over windows: LLM-Pruner's second order (arXiv
    2305.11627, eq. 5)."""
    def entry(name, w):
        return (w * stats.grad[name] - w.square() * stats.grad_sq[name] / 2).abs()
    return by_entry(model, entry)


def sensitivity(model, stats=None):
    """|w · g| per batch, averaged over batches: what IDEA Prune (arXiv 2503.05920) is known to use,
    in the form of LoSparse (arXiv 2306.11222). Without stats: from the gradients in place
    (train.py, averaged by `average`)."""
    if stats is not None:
        return stats.sensitivity
    return by_entry(model, lambda name, w: (w * w.grad).abs())


def activation(model, stats):
    """Size of a unit's output: L2 over windows, mean over positions, and over a head's channels in
    between. Minitron (arXiv 2407.14679, eq. 1 and section 2.2)."""
    scores = {}
    for (layer, kind), units in model.config.widths().items():
        if units == 0:
            scores[layer, kind] = torch.zeros(0)
            continue
        squares = stats.position[reader_of(model.config, layer, kind)]              # (T, n)
        scores[layer, kind] = squares.unflatten(1, (units, -1)).mean(2).sqrt().mean(0)
    return scores


def minitron(model, stats):
    """Size of a unit's output: mean of the absolute values over a window, then L2 over windows and over
    a head's channels. Minitron's order as its release has it (NVIDIA's Model-Optimizer); there query
    heads go, here whole KV groups."""
    scores = by_channel(model, lambda name, w: stats.size[name])
    return {key: squares.sqrt() for key, squares in scores.items()}


def wanda(model, stats):
    """‖x_j‖ · |W_:j|, x_j the unit's outputs over the calibration text, W what reads them:
    Wanda-sp, the structured form of Wanda (arXiv 2306.11695) that FLAP compares with."""
    return by_channel(model, lambda name, w: stats.square[name].sqrt() * shard.whole(w.abs().sum(0)))


def flap(model, stats):
    """Var(x_j) · ‖W_:j‖², standardised over the channels of one layer and kind, so that layers and
    kinds compete: FLAP (arXiv 2312.11983, eq. 5-6)."""
    return by_channel(model, lambda name, w: standardised(fluctuation(stats, name, w)))


def flap_squared(model, stats):
    """As `flap`, but the number of an attention's channel is squared before it is standardised, as in
    FLAP's released code, which the paper does not say."""
    def channels(name, w):
        metric = fluctuation(stats, name, w)
        return standardised(metric.square() if name.endswith("attn.o.weight") else metric)
    return by_channel(model, channels)


def fluctuation(stats, name, w):
    """FLAP's Var(x_j) · ‖W_:j‖² of the channels that the matrix w (C, n) reads, (n,)."""
    variance = (stats.square[name] - stats.mean[name].square()).clamp(min=0)
    return variance * shard.whole(w.square().sum(0))


def standardised(metric):
    return (metric - metric.mean()) / metric.std(correction=0).clamp(min=1e-30)


@dataclass(frozen=True)
class Score:
    """A criterion: the function (model, stats) -> {(layer, kind): (units,)}, and the fields of
    Stats that it reads."""
    function: Callable
    needs: set


SCORES = {
    "sensitivity": Score(sensitivity, {"sensitivity"}),
    "taylor": Score(taylor, {"grad"}),
    "taylor2": Score(taylor2, {"grad", "grad_sq"}),
    "activation": Score(activation, {"position"}),
    "minitron": Score(minitron, {"size"}),
    "wanda": Score(wanda, {"square"}),
    "flap": Score(flap, {"mean", "square"}),
    "flap-squared": Score(flap_squared, {"mean", "square"}),
    "magnitude": Score(magnitude, set()),
    "random": Score(random, set()),
}


def importance(stats, n_layer, absent=()):
    """How much each layer turns the residual stream, [I_l in [-1, 1]]: -cos of layer input and
    output, less its mean over layers, divided by the largest size. Adapt-Pruner's relative
    importance (arXiv 2502.03460). Layers in `absent` have neither sub-block: they are left out of
    the mean and get 0."""
    cosines = [stats.cosine[layer, "layer"] for layer in range(n_layer)]
    turns = -torch.tensor(cosines, dtype=torch.float64)
    is_present = torch.ones(n_layer, dtype=torch.bool)
    is_present[list(absent)] = False
    turns = torch.where(is_present, turns - turns[is_present].mean(), 0)
    return (turns / turns.abs().max().clamp(min=1e-30)).tolist()


# -- moving averages while a model trains

def average(averages, fresh, beta=0.85, beta_uncertainty=0.95):
    """Moving averages of the score I and of its change U (PLATON, arXiv 2206.12562, eq. 6-7): Ī <-
    β Ī + (1-β) I and U <- β' U + (1-β') |I - Ī|. Both are held in {(layer, kind): (2, units)}. The
    first call, with averages None, starts at (I, 0). Returns new tensors."""
    new = {}
    for key, score in fresh.items():
        if averages is None:
            new[key] = torch.stack((score, torch.zeros_like(score)))
            continue
        old_mean, old_change = averages[key]
        mean = beta * old_mean + (1 - beta) * score
        change = beta_uncertainty * old_change + (1 - beta_uncertainty) * (score - mean).abs()
        new[key] = torch.stack((mean, change))
    return new


def ranking(averages, uncertainty=False):
    """What `choose` ranks by: the mean Ī (LoSparse), or with `uncertainty` Ī · U. PLATON multiplies
    weight by weight. Multiplying by unit is our choice: changes that cancel within a unit count as
    none."""
    scores = {}
    for key, (mean, change) in averages.items():
        scores[key] = mean * change if uncertainty else mean
    return scores


def mask_dead(scores, alive):
    """The scores of the units in `alive`, {(layer, kind): indices}. All other units are dead
    already and get -inf."""
    masked = {}
    for key, values in scores.items():
        indices = alive[key].to(values.device)
        masked[key] = torch.full_like(values, -math.inf).index_copy_(0, indices, values[indices])
    return masked

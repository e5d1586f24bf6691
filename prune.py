"""Structured pruning while a model trains: score units, choose who stays, zero the others in place, slice them off.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5          # one cut of a trained model, no training after it
    python -m pytest tests/test_prune.py           # the two facts below, and what breaks them

A *unit* is an FFN neuron (gate row, up row, down column) or a KV group (one KV head with the query heads it serves:
k, v and q rows and biases, o columns). Two facts make pruning inside a training loop simple:
  1. A dead unit stays dead. Where all of a unit's entries are 0, its output and every one of its gradients are
     exactly 0; with its Adam moments set to 0 as well, AdamW (eps > 0, decay multiplies) leaves it at 0. So a cut
     only writes zeros: no masks, no new optimizer, nothing for torch.compile or DDP to notice.
  2. So slicing is exact, whenever it comes: the smaller model has the same logits and takes the same next AdamW step.
Score, as far as IDEA Prune (arXiv 2503.05920) is known: |w · dL/dw|, averaged over the unit's entries and over time.
The exact form is unpublished; ours is that of LoSparse (arXiv 2306.11222) and, with `uncertainty`, that of PLATON
(arXiv 2206.12562), on units instead of weights. To change the criterion, change `sensitivity`.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import data
from common import UserError, parse, pick_device, run
from distill import chunked_loss
from eval import evaluate
from model import GPT


def coupled(config, layer, kind):
    """Parameters that a unit of this layer has entries in: [(name, dimension that runs over the units)]. A unit's
    entries are consecutive along it: 1 row of a neuron, D rows of a KV head, (H_l/K_l)·D rows of the query heads it
    serves."""
    if kind == "ffn":
        return [(f"blocks.{layer}.ffn.{name}.weight", dim) for name, dim in (("gate", 0), ("up", 0), ("down", 1))]
    bias = [("q.bias", 0), ("k.bias", 0), ("v.bias", 0)] if config.qkv_bias else []
    return [(f"blocks.{layer}.attn.{name}", dim)
            for name, dim in [("q.weight", 0), ("k.weight", 0), ("v.weight", 0), ("o.weight", 1)] + bias]


def by_unit(tensor, dim, units):
    """View with the dimension split: (…, units · r, …) -> (…, units, r, …); dimension `dim` now counts units."""
    return tensor.unflatten(dim, (units, -1))


def everything(config):
    """The keep that keeps all: {(layer, kind): indices (units,)}."""
    return {key: torch.arange(n) for key, n in config.widths().items()}


# -- score

@torch.no_grad()
def sensitivity(model):
    """First-order estimate of what the loss loses with each unit: mean over its entries of |w · dL/dw|, from the
    gradients in place (averaged over micro-batches and processes). -> {(layer, kind): (units,) float32}; a mean, so
    that kinds compare."""
    parameters, scores = dict(model.named_parameters()), {}
    for (layer, kind), units in model.config.widths().items():
        total, entries = torch.zeros(units, device=model.embed.weight.device), 0
        for name, dim in coupled(model.config, layer, kind) if units else ():
            p = parameters[name]
            sums = by_unit((p * p.grad).abs(), dim, units).movedim(dim, 0).flatten(1).sum(1)
            total, entries = total + sums, entries + p.numel() // units
        scores[layer, kind] = (total / max(1, entries)).float()
    return scores


def average(averages, fresh, beta=0.85, beta_uncertainty=0.95):
    """Moving averages of the score I and of its change U (PLATON, eq. 6-7): Ī <- β Ī + (1-β) I, U <- β' U + (1-β') |I
    - Ī|. {(layer, kind): (2, units)}; the first call starts at (I, 0). Returns new tensors."""
    if averages is None:
        return {key: torch.stack((i, torch.zeros_like(i))) for key, i in fresh.items()}
    new = {}
    for key, i in fresh.items():
        mean = beta * averages[key][0] + (1 - beta) * i
        new[key] = torch.stack((mean, beta_uncertainty * averages[key][1] + (1 - beta_uncertainty) * (i - mean).abs()))
    return new


def ranking(averages, keep, uncertainty=False):
    """What `choose` ranks by: Ī (LoSparse), or Ī · U with `uncertainty` (PLATON); -inf for units that are dead
    already."""
    scores = {}
    for key, (mean, change) in averages.items():
        alive = keep[key].to(mean.device)
        scores[key] = torch.full_like(mean, -math.inf)
        scores[key][alive] = (mean * change if uncertainty else mean)[alive]
    return scores


# -- allocate and choose

def allocate(start, target, size, at_most):
    """How many units each layer keeps when `size` of the removable parameters of config `start` may stay, on the
    straight way to config `target`: -> {(layer, kind): units}, none above at_most[key]. The sum is at most the budget
    and short of it by less than the cheapest unit that could still have stayed; at the target's own size it is
    exactly the target."""
    whole, least = start.removable_params(), target.removable_params()
    budget = math.floor(size * whole + 1e-6)                                    # (least / whole) * whole may round down
    share = (budget - least) / (whole - least) if whole > least else 0.0        # of what goes, how much is still there
    first, last = start.widths(), target.widths()
    exact = {key: last[key] + share * (first[key] - last[key]) for key in first}
    widths = {key: min(at_most[key], math.floor(exact[key] + 1e-9)) for key in first}
    left = budget - start.resized(widths).removable_params()
    while True:                                                                 # fill up, where most is missing first
        allowed = [key for key in first if widths[key] < at_most[key] and start.unit_params(*key) <= left]
        if not allowed:
            return widths
        key = max(allowed, key=lambda k: exact[k] - widths[k])                  # ties: the first layer
        widths[key], left = widths[key] + 1, left - start.unit_params(*key)


SHARES = ("global", "uniform", "uniform-strict")


def allocate_once(config, size, how, scores=None, kinds=("ffn", "kv"), multiple_of=1):
    """How many units each layer of `config` keeps when `size` of its removable parameters may stay and only `kinds` are
    cut: -> {(layer, kind): units}. global: the best-scored stay, layers and kinds compete; uniform: the same share of
    every layer; uniform-strict: the same width in every layer, as a stock class needs. Neurons go in blocks of
    `multiple_of` (runtimes like 32, quantizers 256). The sum is at most the budget, short of it by less than the
    cheapest block that had to go. UserError: the budget is below what is not cut, or strict layers differ."""
    start = config.widths()
    widths = {key: 0 if key[1] in kinds else n for key, n in start.items()}
    left = math.floor(size * config.removable_params() + 1e-6) - config.resized(widths).removable_params()
    if left < 0:
        raise UserError(f"--keep {size} leaves {-left:,} parameters too few, as only {', '.join(kinds)} may go; keep "
                        "more or cut more by --structure")
    blocks = []                                              # (order, layers' keys, units): the lowest stay first
    for key in (key for key in start if key[1] in kinds):
        step = multiple_of if key[1] == "ffn" else 1
        best = sorted(scores[key].tolist(), reverse=True) if how == "global" else None
        for first in range(0, start[key], step):
            units = min(step, start[key] - first)
            order = -sum(best[first:first + units]) / units if best else (first + units) / start[key]
            blocks.append((order, (key,), units))
    if how == "uniform-strict":
        if any(start[layer, kind] != start[0, kind] for layer, kind in start):
            raise UserError("uniform-strict keeps layers equal, and these differ already; give --allocate uniform")
        blocks = [(order, tuple((layer, kind) for layer in range(config.n_layer)), units)
                  for order, ((layer, kind),), units in blocks if layer == 0]
    closed = set()
    for _, keys, units in sorted(blocks, key=lambda block: block[0]):                  # stable: ties to the first layer
        cost = sum(units * config.unit_params(*key) for key in keys)
        if cost <= left and not closed & {*keys}:
            widths |= {key: widths[key] + units for key in keys}
            left -= cost
        else:
            closed |= {*keys}                                # nothing smaller of this layer behind it: a last odd block
    return widths


def choose(scores, widths):
    """The best-scored units of each layer: {(layer, kind): indices (widths[layer, kind],), ascending}. Pure; ties by
    index."""
    return {key: score.cpu().argsort(descending=True, stable=True)[:widths[key]].sort().values
            for key, score in scores.items()}


# -- zero and slice

@torch.no_grad()
def zero_(model, optimizer, keep):
    """Kill, in place, every unit that is not in `keep`: its weights and its Adam moments become 0. optimizer may be
    None."""
    parameters = dict(model.named_parameters())
    for (layer, kind), units in model.config.widths().items():
        alive = keep.get((layer, kind), torch.arange(units))
        dead = torch.ones(units, dtype=torch.bool).index_fill_(0, alive, False).nonzero().flatten()
        if dead.numel() == 0:
            continue
        for name, dim in coupled(model.config, layer, kind):
            p = parameters[name]
            moments = optimizer.state.get(p, {}).values() if optimizer else ()
            for tensor in (p, *(m for m in moments if m.shape == p.shape)):
                by_unit(tensor, dim, units).index_fill_(dim, dead.to(p.device), 0)


@torch.no_grad()
def slice(model, optimizer, keep):
    """Cut dead units off for good: -> (model, optimizer) with only the entries in `keep`, same dtype, device,
    hyperparameters, moments and step counts. optimizer may be None. A sub-block that keeps no unit goes, with the
    norm in front of it."""
    config = model.config.resized({key: len(indices) for key, indices in keep.items()})
    units = model.config.widths()
    cuts = {name: (dim, units[key], indices) for key, indices in keep.items()
            for name, dim in coupled(model.config, *key)}

    def cut(name, tensor):
        if name not in cuts:
            return tensor.clone()
        dim, n, indices = cuts[name]
        return by_unit(tensor, dim, n).index_select(dim, indices.to(tensor.device)).flatten(dim, dim + 1)

    with torch.device("meta"):
        small = GPT(config)
    old = dict(model.named_parameters())
    small.load_state_dict({name: cut(name, old[name]) for name, _ in small.named_parameters()}, assign=True)
    for name, p in small.named_parameters():
        p.requires_grad_(old[name].requires_grad)
    if optimizer is None:
        return small, None
    new, name_of = dict(small.named_parameters()), {p: name for name, p in old.items()}
    groups = [{**group, "params": [new[name_of[p]] for p in group["params"] if name_of[p] in new]}
              for group in optimizer.param_groups]
    smaller = type(optimizer)(groups)
    for p, state in optimizer.state.items():
        if (name := name_of[p]) in new:
            smaller.state[new[name]] = {k: cut(name, v) if v.shape == p.shape else v.clone() for k, v in state.items()}
    return small, smaller


# -- the command: one cut of a model that is there

@dataclass(frozen=True)
class Prune:
    init: str | None = None       # what to cut: a checkpoint, run folder, Hugging Face folder or hub id
    keep: float = 0.8             # kept fraction of the removable parameters (all FFN neurons and KV groups)
    allocate: str = "global"      # global: units of all layers compete; uniform: equal shares; uniform-strict: widths
    structure: str = "ffn,kv"     # what may go: ffn (neurons), kv (KV groups with their query heads)
    multiple_of: int = 1          # FFN widths that runtimes like: 32; quantizers: 256
    out: str | None = None        # folder of the smaller model; default runs/pruned-NAME-KEEP
    data: str = "stdlib"          # calibration text; its hold-out measures the loss (data.py's sources)
    windows: int = 32             # of the calibration text
    eval_windows: int = 32        # of the hold-out, before and after
    block_size: int | None = None    # tokens in a window; default: the model's context, at most 512
    micro_batch: int = 4          # windows per forward pass
    seed: int = 0                 # which windows
    device: str = "auto"          # auto, cpu, cuda, mps


def calibrate(model, tokens, windows, micro_batch, seed):
    """Sensitivity of every unit, summed over batches that make up `windows` windows of `tokens`; a batch's gradient is
    the mean over its micro_batch windows."""
    from tqdm import tqdm
    scores, device = {}, model.embed.weight.device
    for step in tqdm(range(windows // micro_batch), desc="calibrate", leave=False, disable=None):
        x, y = data.batch(tokens, model.config.block_size, seed, step, 0, micro_batch=micro_batch, micro_steps=1)
        chunked_loss(model.hidden(x.to(device)), model.head_weight, y.to(device))[0].backward()
        scores = {key: scores.get(key, 0) + score for key, score in sensitivity(model).items()}
        model.zero_grad(set_to_none=True)
    return scores


def main(config):
    if config.init is None:
        raise UserError("say what to cut by --init: a checkpoint, a run folder, a Hugging Face folder or a hub id")
    kinds = config.structure.split(",")
    if config.allocate not in SHARES or not {*kinds} <= {"ffn", "kv"} or not 0 < config.keep < 1:
        raise UserError(f"--allocate {config.allocate!r} must be one of {', '.join(SHARES)}, --structure "
                        f"{config.structure!r} of ffn,kv, --keep {config.keep} between 0 and 1")
    for name in ("windows", "eval_windows", "micro_batch", "multiple_of"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1")
    if config.windows % config.micro_batch:
        raise UserError(f"--windows {config.windows} is no multiple of --micro-batch {config.micro_batch}; try "
                        f"{-(-config.windows // config.micro_batch) * config.micro_batch}")
    out = Path(config.out or f"runs/pruned-{Path(config.init).name}-{config.keep:g}")
    if out.exists():
        raise UserError(f"{out} is there already; give another --out or delete it")
    context = checkpoint.load(config.init, "meta")[0].config.block_size
    T = config.block_size if config.block_size is not None else min(512, context)
    model, about = checkpoint.load(config.init, pick_device(config.device), torch.float32, T)
    tokenizer = checkpoint.tokenizer_of(about, config.init)
    corpus = data.load(config.data, tokenizer, block_size=T)

    def measure(model, what):
        found = evaluate(model, corpus.val, tokenizer.byte_lengths(), config.eval_windows, batch=config.micro_batch)
        print(f"{what:6} {model.config.num_params()['total']:13,} parameters   {found['loss']:.4f} nats per token   "
              f"perplexity {found['perplexity']:.2f}   (hold-out of {config.data}, {found['tokens']:,} tokens)")

    measure(model, "before")
    start = model.config
    scores = calibrate(model, corpus.train, config.windows, config.micro_batch, config.seed)
    widths = allocate_once(start, config.keep, config.allocate, scores, kinds, config.multiple_of)
    keep = choose(scores, widths)
    zero_(model, None, keep)
    model, _ = slice(model, None, keep)
    measure(model, "after")
    print(f"KV heads {' '.join(map(str, model.config.n_kv_head))}\nneurons  {' '.join(map(str, model.config.d_ff))}")
    model.config = dataclasses.replace(model.config, block_size=context)    # windows were shorter, the model is not
    checkpoint.save(out / "ckpt_00000000.pt", model, step=0, tokenizer_files=tokenizer.files, run={
        "tokenizer": tokenizer.name, "data": config.data, "fingerprint": corpus.fingerprint, "cut_from": config.init})
    print(f"saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Prune)))

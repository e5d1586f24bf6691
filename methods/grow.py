"""A larger model that begins as a smaller one: enlarging without training the enlarged model from scratch.

    python -m methods.grow --init runs/scratch-laptop-0 --enlarge-ff 2.6 --out runs/grown
    python train.py --init runs/grown --plan idea        # back to the widths of the small model: 192 -> 496 -> 192
    python -m pytest tests/methods/test_grow.py          # the same logits, and which copies stay copies

bert2BERT (arXiv 2110.07143, section 3.3) maps every unit i of the large model to a unit g(i) of the
small one: an old unit to itself, a new one to an old one that is drawn. C(u) units copy unit u:

    the rows that make a unit's output, and biases     U[i] = W[g(i)]
    the columns that read it (o, down)                 U[:, i] = W[:, g(i)] / C(g(i))

A unit is an FFN neuron or a KV group, so both are exact here: SwiGLU and attention treat units alike.
Four ways to grow:

    fresh   New units are drawn and read by zeros. Exact. prune.slice of the old units gives the small
            model back, bit for bit (ours).
    copy    The map above, bert2BERT's function-preserving initialisation. Exact. A unit and its copy get
            the same gradients and stay copies for ever, so training gains nothing from them.
    split   The same with unequal shares in place of 1/C, and noise on the new rows. Nearly exact.
    aki     bert2BERT's advanced knowledge initialisation: the new rows of a layer are copied from the layer
            above, U[i] = W_above[g(i)]. Not exact. New units with the same g(i) stay copies of each other.

Layers: a new one is a copy of the one below that writes zeros into the residual stream, which is exact
(LLaMA Pro, arXiv 2401.02415); "aki" stacks the layers as bert2BERT does. Channels grow exactly in all
four ways (methods/channels.py).

Not here: bert2BERT's second stage (training the lower layers first), the optimizer's moments, and another
head_dim, vocabulary or number of query heads to a KV head.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import data
from common import UserError, check_choices, check_init, check_seed, parse, pick_device, run
from eval import evaluate
from formats.origin import hand_on
from methods.channels import more_channels
from methods.target_shape import grown_config, refuse_misfit, source_layers
from model import by_unit, coupled, from_weights, reader_of, shapes_of

How = Literal["fresh", "copy", "split", "aki"]

# The standard deviation of what is drawn, that of model.init_weight_.
STD = 0.02
# Of "split" (our choices): noise on a new row, times the standard deviation of its matrix, and the
# range in which each copy's share is drawn before the shares of a unit are divided by their sum.
NOISE = 0.1
SHARES = (0.5, 1.5)


@torch.no_grad()
def grow(model, config, how="fresh", seed=0):
    """The GPT of this larger config that begins as `model`, which stays as it is. Raises UserError if
    the config is no larger one of the same kind."""
    old = model.config
    sources = source_layers(old.n_layer, config.n_layer, how)
    refuse_misfit(old, config, sources)
    generator = torch.Generator().manual_seed(seed)

    small = dict(model.named_parameters())
    weights = {name: small[source_name(name, sources)].clone() for name in shapes_of(config)}
    for (layer, kind), units in config.widths().items():
        if units == 0:
            continue
        grown = grown_units(model, sources[layer], kind, units, how, generator)
        for (name, _), tensor in zip(coupled(config, layer, kind), grown):
            weights[name] = tensor
        if how != "aki" and sources[layer] in sources[:layer]:
            weights[reader_of(config, layer, kind)].zero_()
    copies = config.d_model // old.d_model
    if copies > 1:
        noise = None if how == "copy" else functools.partial(fresh, generator=generator)
        weights = {name: more_channels(name, w, copies, noise) for name, w in weights.items()}
    return from_weights(config, weights)


# -- layers

def source_name(name, sources):
    """The parameter of the small model that stands where this one does in the large model."""
    if not name.startswith("blocks."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"blocks.{sources[int(layer)]}.{rest}"


def layer_above(config, layer, kind):
    """The layer that "aki" takes new rows from: the next one if its units have the same shape, else the
    layer itself."""
    above = layer + 1
    if above == config.n_layer or config.widths()[above, kind] == 0:
        return layer
    is_alike = kind == "ffn" or config.queries_per_group(above) == config.queries_per_group(layer)
    return above if is_alike else layer


# -- units

def grown_units(model, layer, kind, units, how, generator):
    """The parameters of a layer's units when there are `units` of them: tensors in the order of
    `coupled`."""
    config = model.config
    widths = config.widths()
    old = widths[layer, kind]
    donor = layer_above(config, layer, kind) if how == "aki" else layer
    copied = torch.randint(min(old, widths[donor, kind]), (units - old,), generator=generator)
    source = torch.cat((torch.arange(old), copied))                    # g of the docstring
    share = shares(source, old, how, generator)

    tensors = []
    names = zip(coupled(config, layer, kind), coupled(config, donor, kind))
    for (name, dim), (donor_name, _) in names:
        w = by_unit(model.get_parameter(name), dim, old)
        if name == reader_of(config, layer, kind):
            grown = w.index_select(dim, source.to(w.device)) * share[:, None].to(w)
        else:
            rows = by_unit(model.get_parameter(donor_name), dim, widths[donor, kind])
            rows = rows.index_select(dim, copied.to(w.device))
            grown = torch.cat((w, changed_rows(rows, w, how, generator)))
        tensors.append(grown.flatten(dim, dim + 1))
    return tensors


def shares(source, old, how, generator):
    """What each unit's columns are multiplied by: (units,) float64. Those of one unit's copies sum to 1.
    With "fresh" the first `old` units keep theirs and the new ones have 0."""
    weight = torch.ones(len(source), dtype=torch.float64)
    if how == "split":
        weight.uniform_(*SHARES, generator=generator)
    elif how == "fresh":
        weight[old:] = 0
    total = torch.zeros_like(weight).index_add_(0, source, weight)
    return weight / total[source]


def changed_rows(rows, w, how, generator):
    """The rows of new units, of which `rows` (new, …) are copies. `w` holds those of the old units. A
    bias has no noise, and is 0 in fresh units, as in a new model."""
    is_bias = w.dim() == 2                                             # (units, entries)
    if how == "fresh":
        return torch.zeros_like(rows) if is_bias else fresh(rows, generator)
    if how == "split" and not is_bias:
        return rows + NOISE * w.std() * drawn(rows, generator)
    return rows


def drawn(like, generator):
    """Standard normal numbers, the same ones on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def fresh(like, generator):
    """Weights as a new model has them."""
    return STD * drawn(like, generator)


# -- the command

@dataclass(frozen=True)
class Grow:
    init: str | None = None        # a checkpoint, run folder, Hugging Face folder or hub id
    enlarge_ff: float = 1.0        # so many times the FFN neurons of each layer, rounded to a multiple of 8
    enlarge_kv: float = 1.0        # so many times the KV groups of each layer
    enlarge_layers: float = 1.0    # so many times the layers
    enlarge_channels: int = 1      # so many times the channels (d_model), a whole number
    how: How = "fresh"             # fresh, copy, split, aki: see above
    out: str | None = None         # folder; default runs/grown-NAME
    seed: int = 0                  # of what is drawn
    data: tuple[str, ...] = ("stdlib",)    # texts (data.py), whose hold-out measures the loss
    eval_windows: int = 32         # of the hold-out, before and after; 0: the loss is not measured
    device: str = "auto"           # auto, cpu, cuda, mps


def check(settings):
    """Raise UserError for settings that mean nothing."""
    check_choices(settings)
    check_init(settings, "grows")
    factors = {name: getattr(settings, name) for name in ("enlarge_ff", "enlarge_kv", "enlarge_layers",
                                                          "enlarge_channels")}
    for name, factor in factors.items():
        if not 1 <= factor < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {factor:g} must be finite and at least 1; prune.py makes a "
                            "model smaller")
    if set(factors.values()) == {1}:
        raise UserError("nothing grows; give --enlarge-ff, --enlarge-kv, --enlarge-layers or --enlarge-channels above "
                        "1")
    if settings.eval_windows < 0:
        raise UserError(f"--eval-windows {settings.eval_windows} must be 0 or more")
    check_seed(settings)


def print_loss(settings, model, corpus, when):
    """Print the size and, if there is a corpus, the loss on its hold-out."""
    size = f"{when:6} {model.config.num_params()['total']:13,} parameters"
    if corpus is None:
        print(size)
        return
    result = evaluate(model, corpus.val, corpus.tokenizer.byte_lengths(), settings.eval_windows, batch=4,
                      block_size=min(512, model.config.block_size))
    print(f"{size}   {result['loss']:.6f} nats per token   perplexity {result['perplexity']:.4f}   (hold-out of "
          f"{corpus.name}, {result['tokens']:,} tokens)")


def main(settings):
    check(settings)
    settings = dataclasses.replace(settings, data=data.recorded(settings.data))
    out = Path(settings.out or f"runs/grown-{Path(settings.init).name}")
    with checkpoint.new_folder(out):
        grow_and_save(settings, out)


def grow_and_save(settings, out):
    """`main`, with the folder `out` held."""
    model, about = checkpoint.load(settings.init, pick_device(settings.device), torch.float32)
    if about.get("masks"):
        raise UserError(f"{settings.init} has weights that a mask holds at zero, and a larger model would have no "
                        "mask; grow the dense model, then prune.py")
    tokenizer = checkpoint.tokenizer_of(model, about, settings.init)
    larger = grow(model, grown_config(model.config, settings), settings.how, settings.seed)
    made = {"grown_from": settings.init, "growth": dataclasses.asdict(settings)}
    corpus = None
    if settings.eval_windows:
        corpus = data.load_mixture(settings.data, tokenizer, block_size=min(512, model.config.block_size))
        made |= {"data": settings.data, "fingerprint": corpus.fingerprint}
    print_loss(settings, model, corpus, "before")
    print_loss(settings, larger, corpus, "after")
    checkpoint.save_made(out, larger, tokenizer, hand_on(about), made)
    if settings.how == "copy":
        print("a copied unit gets the gradients of the unit that it copies: the copies never differ, however long they "
              "train; --how fresh or split parts them")
    print(f"saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Grow)))

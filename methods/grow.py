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
(LLaMA Pro, arXiv 2401.02415); "aki" stacks the layers as bert2BERT does. Channels grow by a whole factor
r, in every way of growing exactly: RMSNorm sees the same mean of squares only if all channels have
equally many copies. bert2BERT takes any factor, which changes what its norms put out.

Not here: bert2BERT's second stage (training the lower layers first), the optimizer's moments, and another
head_dim, vocabulary or number of query heads to a KV head.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import data
from common import UserError, check_choices, parse, pick_device, run
from eval import evaluate
from formats.origin import hand_on
from methods.channels import READ_THE_STREAM
from model import GPT, by_unit, coupled, reader_of, times

How = Literal["fresh", "copy", "split", "aki"]

# The standard deviation of what is drawn, that of model.init_weight_.
STD = 0.02
# Of "split" (our choices): noise on a new row, times the standard deviation of its matrix, and the
# range in which each copy's share is drawn before the shares of a unit are divided by their sum.
NOISE = 0.1
SHARES = (0.5, 1.5)
# What growing leaves as it is.
FIXED = ("vocab_size", "block_size", "head_dim", "tie_embeddings", "qkv_bias", "qk_norm", "norm_eps", "rope_theta",
         "rope_scaling")


@torch.no_grad()
def grow(model, config, how="fresh", seed=0):
    """The GPT of this larger config that begins as `model`, which stays as it is. Raises UserError if
    the config is no larger one of the same kind."""
    old = model.config
    sources = source_layers(old.n_layer, config.n_layer, how)
    refuse_misfit(old, config, sources)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        large = GPT(config)

    small = dict(model.named_parameters())
    weights = {name: small[source_name(name, sources)].clone() for name, _ in large.named_parameters()}
    for (layer, kind), units in config.widths().items():
        if units == 0:
            continue
        grown = grown_units(model, sources[layer], kind, units, how, generator)
        for (name, _), tensor in zip(coupled(config, layer, kind), grown):
            weights[name] = tensor
        if how != "aki" and sources[layer] in sources[:layer]:
            weights[reader_of(config, layer, kind)].zero_()
    times_channels = config.d_model // old.d_model
    if times_channels > 1:
        weights = {name: more_channels(name, w, times_channels, how, generator) for name, w in weights.items()}
    large.load_state_dict(weights, assign=True)
    return large


# -- layers

def source_layers(old, new, how):
    """The layer that each of `new` layers is made of, as a list. New layers are spread evenly, each
    behind the one that it copies; "aki" stacks the model as a whole, and fills up with its top."""
    if how == "aki":
        whole = new // old * old
        return [layer % old for layer in range(whole)] + list(range(old - new + whole, old))
    return [layer * old // new for layer in range(new)]


def source_name(name, sources):
    """The parameter of the small model that stands where this one does in the large model."""
    if not name.startswith("blocks."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"blocks.{sources[int(layer)]}.{rest}"


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


def layer_above(config, layer, kind):
    """The layer that "aki" takes new rows from: the next one if its units have the same shape, else the
    layer itself."""
    above = layer + 1
    if above == config.n_layer or config.widths()[above, kind] == 0:
        return layer
    is_alike = kind == "ffn" or config.queries_per_group(above) == config.queries_per_group(layer)
    return above if is_alike else layer


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
        return torch.zeros_like(rows) if is_bias else STD * drawn(rows, generator)
    if how == "split" and not is_bias:
        return rows + NOISE * w.std() * drawn(rows, generator)
    return rows


def drawn(like, generator):
    """Standard normal numbers, the same ones on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


# -- channels

def more_channels(name, w, r, how, generator):
    """A parameter of a model with r times as many channels. The residual stream and the norms' outputs
    are r copies of what they were.

    A matrix that reads the stream has W / r in each copy. Apart from "copy", numbers that sum to 0 over
    the copies are added to that: they read differences of copies, which are 0 at first, and give the
    copies different gradients. The head reads 1/r of the stream by the gain of the norm before it, as
    it may be the embedding."""
    if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
        return w
    if name.endswith(("o.weight", "down.weight")):
        return w.repeat(r, 1)
    if w.dim() == 1:
        return w.repeat(r) / (r if name == "norm.weight" else 1)
    tiled = w.repeat(1, r)
    if not name.endswith(READ_THE_STREAM):
        return tiled
    tiled = tiled / r
    if how != "copy":
        noise = by_unit(STD * drawn(tiled, generator), 1, r)           # (out, r, C)
        tiled += (noise - noise.mean(1, keepdim=True)).flatten(1)
    return tiled


# -- refusals

def refuse_misfit(old, config, sources):
    """Raise UserError if a model of the config `old` cannot grow into one of the other config."""
    for name in FIXED:
        if getattr(old, name) != getattr(config, name):
            raise UserError(f"a model grows in units, layers and channels, and its {name} stays {getattr(old, name)}, "
                            f"not {getattr(config, name)}; train another model")
    if config.d_model % old.d_model:
        raise UserError(f"{config.d_model} channels are no whole multiple of {old.d_model}, and RMSNorm would see "
                        f"another mean of squares; give {old.d_model * math.ceil(config.d_model / old.d_model)}")
    if config.n_layer < old.n_layer:
        raise UserError(f"{config.n_layer} layers are fewer than the model's {old.n_layer}; cut by prune.py instead")
    for (layer, kind), units in config.widths().items():
        source = sources[layer]
        before = old.widths()[source, kind]
        if units < before:
            raise UserError(f"layer {layer} would have {units} {kind} units, fewer than the {before} that it grows "
                            "from; cut by prune.py instead")
        if before == 0 and units > 0:
            raise UserError(f"layer {layer} has no {kind} units that could grow into {units}; leave it without")
        if kind == "kv" and config.queries_per_group(layer) != old.queries_per_group(source):
            raise UserError(f"layer {layer} has {old.queries_per_group(source)} query heads to a KV head, which stay, "
                            f"and not {config.queries_per_group(layer)}; grow the KV heads")


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
    if settings.init is None:
        raise UserError("say what grows by --init: a checkpoint, a run folder, a Hugging Face folder or a hub id")
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
    if not 0 <= settings.seed < 2**63:
        raise UserError(f"--seed {settings.seed} must be between 0 and {2**63 - 1}")


def grown_config(config, settings):
    """The larger GPTConfig that the settings ask for."""
    layers = times(config.n_layer, settings.enlarge_layers, 1, "--enlarge-layers")
    sources = source_layers(config.n_layer, layers, settings.how)
    groups = [widened(config.n_kv_head[layer], settings.enlarge_kv, 1, "--enlarge-kv") for layer in sources]
    return dataclasses.replace(
        config,
        d_ff=[widened(config.d_ff[layer], settings.enlarge_ff, 8, "--enlarge-ff") for layer in sources],
        n_kv_head=groups,
        n_head=[config.queries_per_group(layer) * n for layer, n in zip(sources, groups)],
        d_model=config.d_model * settings.enlarge_channels)


def widened(units, factor, multiple, flag):
    """`times`, where an absent sub-block stays absent."""
    return times(units, factor, multiple, flag) if units else 0


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
    saved = {"tokenizer": tokenizer.name, "grown_from": settings.init, "growth": dataclasses.asdict(settings)}
    corpus = None
    if settings.eval_windows:
        corpus = data.load_mixture(settings.data, tokenizer, block_size=min(512, model.config.block_size))
        saved |= {"data": settings.data, "fingerprint": corpus.fingerprint}
    print_loss(settings, model, corpus, "before")
    print_loss(settings, larger, corpus, "after")
    checkpoint.save(out / "ckpt_00000000.pt", larger, step=0, tokenizer_files=tokenizer.files, origin=hand_on(about),
                    run=saved)
    if settings.how == "copy":
        print("a copied unit gets the gradients of the unit that it copies: the copies never differ, however long they "
              "train; --how fresh or split parts them")
    print(f"saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Grow)))

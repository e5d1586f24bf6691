"""The shape that a model is to have in the end: smaller for methods/sheared.py, larger for methods/grow.py.

    python -m methods.sheared --init MODEL --keep 0.8
    python -m methods.grow --init MODEL --enlarge-ff 2.6

A smaller shape is a preset, narrower layers, fewer layers or channels. It is given before anybody knows
which units, layers and channels will make it up. Where layers go, all layers of model and target are
alike. A larger shape comes with the layer that each of its layers is made of. Not here: shapes that
follow from scores (allocate.py).
"""
import dataclasses
import math

import torch

import allocate
import model as models
from common import UserError

# What growing leaves as it is.
FIXED = ("vocab_size", "block_size", "head_dim", "tie_embeddings", "qkv_bias", "qk_norm", "norm_eps", "rope_theta",
         "rope_scaling")


# -- smaller

def sizes_of(config):
    """What a model has of all that may go: {(layer, "ffn" | "kv"): units, "layers": L, "channels": C}."""
    return {**config.widths(), "layers": config.n_layer, "channels": config.d_model}


def kind_of(key):
    """What a key of `sizes_of` counts: "kv", "ffn", "layers" or "channels"."""
    return key if isinstance(key, str) else key[1]


def goals_of(config, target):
    """What stays of each of `sizes_of(config)`. If layers go, all layers of the target are alike."""
    goals = sizes_of(target)
    if target.n_layer < config.n_layer:
        for layer, kind in config.widths():
            goals[layer, kind] = target.widths()[0, kind]
    return goals


def kept_of(config, target):
    """The same for all of which something goes: {key: number that stays}."""
    goals = goals_of(config, target)
    return {key: goals[key] for key, size in sizes_of(config).items() if goals[key] < size}


def target_of(config, settings):
    """The GPTConfig to shear a model of `config` to. Raises UserError if it is no smaller part of the
    model."""
    if settings.target:
        size = models.PRESETS[settings.target]
        L = size.n_layer
        target = dataclasses.replace(config, d_model=size.d_model, head_dim=size.head_dim, n_head=(size.n_head,) * L,
                                     n_kv_head=(size.n_kv_head,) * L, d_ff=(size.d_ff,) * L)
    else:
        target = narrower(config, settings)
        if settings.layers is not None:
            refuse_larger(settings.init, settings.layers, config.n_layer, "layers")
            target = with_layers(target, range(settings.layers))
        target = dataclasses.replace(target, d_model=settings.channels or target.d_model)
    refuse_no_part(config, target, settings)
    return target


def narrower(config, settings):
    """The config with fewer neurons and KV groups, as --keep or --enlarge-ff and --enlarge-kv say."""
    if settings.keep is None:
        return models.shrunk(config, settings.enlarge_ff, settings.enlarge_kv)
    budget = math.floor(settings.keep * config.removable_params() + 1e-6)
    alike = len({*config.d_ff}) == len({*config.n_kv_head}) == 1
    no_scores = {key: torch.zeros(n) for key, n in config.widths().items()}
    return config.resized(allocate.widths_for(config, budget, "uniform-strict" if alike else "uniform", no_scores))


def refuse_no_part(config, target, settings):
    """Raise UserError unless the target is smaller than the model somewhere and larger nowhere."""
    if heads_of(target) != heads_of(config):
        raise UserError(f"preset {settings.target} has {heads_of(target)} and {settings.init} has {heads_of(config)}; "
                        "give --enlarge-ff, --keep, --layers or --channels")
    refuse_larger(settings.init, target.n_layer, config.n_layer, "layers")
    if target.n_layer < config.n_layer and len({*zip(config.n_kv_head, config.d_ff)}) > 1:
        raise UserError(f"the layers of {settings.init} differ in width, and which of them stay is not known yet; give "
                        f"a target of {config.n_layer} layers")
    goals = goals_of(config, target)
    names = {"ffn": "neurons", "kv": "KV groups"}
    for key, size in sizes_of(config).items():
        refuse_larger(settings.init, goals[key], size, names.get(kind_of(key), key))
    if not kept_of(config, target):
        raise UserError(f"the target has the shape of {settings.init} already; give another --target, or --enlarge-ff, "
                        "--enlarge-kv, --keep, --layers or --channels")


def refuse_larger(init, asked, size, name):
    if asked > size:
        raise UserError(f"the target has {asked:,} {name} and {init} only {size:,}; give a smaller target")


def heads_of(config):
    """What a target cannot change, in words."""
    queries = max(config.queries_per_group(layer) for layer in range(config.n_layer))
    return f"heads of {config.head_dim} channels, {queries} query heads to a KV head"


def with_layers(config, layers):
    """The config of the model that has these layers only."""
    return dataclasses.replace(
        config,
        n_head=[config.n_head[layer] for layer in layers],
        n_kv_head=[config.n_kv_head[layer] for layer in layers],
        d_ff=[config.d_ff[layer] for layer in layers])


def shape_of(config):
    """The shape of a model in words."""
    neurons = "/".join(map(str, dict.fromkeys(config.d_ff)))
    groups = "/".join(map(str, dict.fromkeys(config.n_kv_head)))
    return f"{config.n_layer} layers of {groups} KV groups and {neurons} neurons, {config.d_model} channels"


# -- larger

def source_layers(old, new, how):
    """The layer that each of `new` layers is made of, as a list. New layers are spread evenly, each
    behind the one that it copies; "aki" stacks the model as a whole, and fills up with its top."""
    if how == "aki":
        whole = new // old * old
        return [layer % old for layer in range(whole)] + list(range(old - new + whole, old))
    return [layer * old // new for layer in range(new)]


def grown_config(config, settings):
    """The larger GPTConfig that the settings ask for."""
    layers = models.times(config.n_layer, settings.enlarge_layers, 1, "--enlarge-layers")
    sources = source_layers(config.n_layer, layers, settings.how)
    groups = [widened(config.n_kv_head[layer], settings.enlarge_kv, 1, "--enlarge-kv") for layer in sources]
    return dataclasses.replace(
        config,
        d_ff=[widened(config.d_ff[layer], settings.enlarge_ff, 8, "--enlarge-ff") for layer in sources],
        n_kv_head=groups,
        n_head=[config.queries_per_group(layer) * n for layer, n in zip(sources, groups)],
        d_model=config.d_model * settings.enlarge_channels)


def widened(units, factor, multiple, flag):
    """`model.times`, where an absent sub-block stays absent."""
    return models.times(units, factor, multiple, flag) if units else 0


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

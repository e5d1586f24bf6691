"""The shape that a model is to have in the end: a preset, narrower layers, fewer layers or channels.

    python -m methods.sheared --init MODEL --keep 0.8

methods/sheared.py trains towards it. The shape is given before anybody knows which units, layers and
channels will make it up. Where layers go, all layers of model and target are alike. Not here: shapes
that follow from scores (allocate.py).
"""
import dataclasses
import math

import torch

import allocate
import model as models
from common import UserError


def sizes_of(config):
    """What a model has of all that may go: {(layer, "ffn" | "kv"): units, "layers": L, "channels": C}."""
    return {**config.widths(), "layers": config.n_layer, "channels": config.d_model}


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
    for key, size in sizes_of(config).items():
        name = key if isinstance(key, str) else {"ffn": "neurons", "kv": "KV groups"}[key[1]]
        refuse_larger(settings.init, goals[key], size, name)
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

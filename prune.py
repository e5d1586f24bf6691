"""Structured pruning: choose units, zero them in place, slice them off.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --score taylor --allocate adaptive
    python -m pytest tests/test_prune.py      # the two facts below, and what breaks them

A *unit* is an FFN neuron (gate row, up row, down column) or a KV group (one KV head with the query
heads it serves: k, v and q rows and biases, o columns). Two facts make pruning inside a training
loop simple:
  1. A dead unit stays dead. Where all of a unit's entries are 0, its output and every one of its
     gradients are exactly 0. With its Adam moments set to 0 as well, AdamW (eps > 0, decay
     multiplies) leaves it at 0. So a cut only writes zeros: no masks, no new optimizer, nothing for
     torch.compile, DDP or FSDP to notice.
  2. Slicing is exact. At any time after the cut the smaller model has the same logits, up to
     rounding, and takes the same next step.
`choose`, `zero_` and `slice` are all that training needs. The rest is the command: it cuts a given
model once, or in several --iterations, and saves it. What a unit is worth: score.py. How a budget
is shared: allocate.py. Whole layers, channels, single weights, learned masks, measured damage,
mending, local distillation, a model that does not fit the device: methods/. Not here: training
(train.py), all methods compared (experiments/compare.py).
"""
import copy
import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

import allocate
import checkpoint
import data
import score
import shard
from allocate import ALLOCATIONS, RESOURCES
from common import (
    UserError,
    check_choices,
    check_init,
    check_seed,
    has_fast_bfloat16,
    parse,
    pick_device,
    progress,
    refuse_idle,
    run,
)
from eval import dtype_name, evaluate
from formats.origin import hand_on
from methods import channels, depth, latency, local, margin, measured, mend, offload, policy, self_text, sparse
from model import GPT, coupled, with_context
from score import GRADIENTS, SCORES
from tasks.questions import read_questions


def everything(config):
    """Every unit, alive: {(layer, kind): indices (units,)}."""
    return {key: torch.arange(n) for key, n in config.widths().items()}


# -- choose

def choose(scores, widths):
    """The best-scored units of each layer: {(layer, kind): indices (widths[layer, kind],)}, indices
    ascending. A pure function; ties go to the lower index."""
    alive = {}
    for key, values in scores.items():
        # On the CPU, so that ties are broken alike on every device.
        ranked = values.cpu().argsort(descending=True, stable=True)
        alive[key] = ranked[:widths[key]].sort().values
    return alive


# -- zero and slice

@torch.no_grad()
def zero_(model, optimizer, alive):
    """Kill, in place, every unit that is not in `alive`: its weights and its Adam moments become 0.
    `optimizer` may be None."""
    parameters = dict(model.named_parameters())
    for (layer, kind), units in model.config.widths().items():
        is_dead = torch.ones(units, dtype=torch.bool)
        is_dead[alive.get((layer, kind), torch.arange(units))] = False
        dead = is_dead.nonzero().flatten()
        if dead.numel() == 0:
            continue
        for name, dim in coupled(model.config, layer, kind):
            p = parameters[name]
            # Of a sharded model each process holds some rows, and no other process is asked.
            entries = is_dead[shard.unit_of_entry(p, dim, units)].nonzero().flatten()
            state = optimizer.state.get(p, {}) if optimizer else {}
            # Moments have the parameter's shape. AdamW's step count has not.
            moments = [value for value in state.values() if value.shape == p.shape]
            for tensor in (p, *moments):
                shard.local(tensor).index_fill_(dim, entries.to(p.device), 0)


@torch.no_grad()
def slice(model, optimizer, alive):
    """Cut dead units off for good. Returns (model, optimizer) with only the entries of the units in
    `alive`, and the same dtype, device, hyperparameters, moments and step counts. `optimizer` may
    be None. A sub-block that keeps no unit goes, together with the norm in front of it."""
    # How each parameter is cut: the dimension that runs over units, their number, the living ones.
    widths = model.config.widths()
    cuts = {}
    for key, indices in alive.items():
        for name, dim in coupled(model.config, *key):
            cuts[name] = (dim, widths[key], indices)

    def smaller(name, tensor):
        """The entries that stay of a parameter, or of a moment of that parameter."""
        if name not in cuts:
            return tensor.clone()
        return shard.select_units(tensor, *cuts[name])

    # On the meta device no weights are made that would be thrown away at once.
    with torch.device("meta"):
        small = GPT(model.config.resized({key: len(indices) for key, indices in alive.items()}))
    # A sharded model becomes a smaller sharded model.
    small = shard.spread_like(small, model)
    large = dict(model.named_parameters())
    weights = {name: smaller(name, large[name]) for name, _ in small.named_parameters()}
    small.load_state_dict(weights, assign=True)
    # A frozen parameter stays frozen.
    for name, p in small.named_parameters():
        p.requires_grad_(large[name].requires_grad)
    if optimizer is None:
        return small, None
    return small, slice_optimizer(optimizer, large, dict(small.named_parameters()), smaller)


def slice_optimizer(optimizer, large, small, smaller):
    """The same optimizer around other parameters: `large` and `small` are {name: parameter} before
    and after the cut, smaller(name, tensor) cuts a moment."""
    name_of = {p: name for name, p in large.items()}
    groups = []
    for group in optimizer.param_groups:
        names = [name_of[p] for p in group["params"]]
        groups.append({**group, "params": [small[name] for name in names if name in small]})
    small_optimizer = type(optimizer)(groups)
    for p, state in optimizer.state.items():
        name = name_of[p]
        # The norm in front of an absent sub-block is gone.
        if name not in small:
            continue
        small_state = small_optimizer.state[small[name]]
        for key, value in state.items():
            is_moment = value.shape == p.shape
            small_state[key] = smaller(name, value) if is_moment else value.clone()
    return small_optimizer


# -- the command: cut a model that is there

@dataclass(frozen=True)
class Prune:
    init: str | None = None       # a checkpoint, run folder, Hugging Face folder or hub id
    keep: float = 0.8             # kept fraction of what all FFN neurons and KV groups cost
    # params; flops (per token, forward); kv_bytes (per token); ms (llama.cpp's time of a token, measured)
    budget: str = "params"
    # ffn, kv (neurons, KV groups); layer, sublayer; layer,ffn,kv (layers first, then widths); channel;
    # 2:4 or any n:m (n of each m weights stay); weights (the fraction --keep of each row)
    structure: str = "ffn,kv"
    # score.SCORES; policy (learned masks); for layer and sublayer also influence, perplexity; for n:m
    # and weights sparse.SCORES
    score: str = "taylor"
    allocate: str = "global"      # allocate.ALLOCATIONS, or measured
    amplitude: float = 1.0        # of allocate adaptive: how far the layers' shares differ
    multiple_of: int = 1          # of neurons, or channels; runtimes like 32, quantizers 256
    iterations: int = 1           # cut in so many equal parts, each measured anew
    layer_share: float = 0.5      # of layer,ffn,kv: the part of what goes that whole layers make up, 0 to 1
    layer_score: Literal["influence", "perplexity"] = "influence"    # of layer,ffn,kv: ranks the layers
    # make up for what went: none, least-squares, sequential, local; bias (FLAP's); dsnot (n:m and weights).
    # default: sequential for widths
    mend: str | None = None
    # of n:m and weights: calibrate each layer behind layers that are sparse already, as released
    layer_by_layer: bool = False
    local_steps: int = 100        # of mend local: steps of each block against the dense block
    out: str | None = None        # folder; default runs/pruned-NAME-KEEP, or -2-4
    # calibration texts, A:2 B (data.py), self: the model's own (methods/self_text.py); their hold-outs measure the loss
    data: tuple[str, ...] = ("stdlib",)
    prompts: str | None = None    # of data self: a prompt a line, or .jsonl with a field "prompt"
    choices: str | None = None    # questions whose margin the gradients are of, and not the text's loss
    windows: int = 32             # of the calibration text
    measured_windows: int = 4     # of those, for allocate measured and score perplexity
    policy_steps: int = 300       # of score policy, each of two forward passes over a micro-batch
    policy_lr: float = 0.002      # of score policy, falling to 0 along a cosine
    policy_update: Literal["released", "unbiased"] = "released"    # of score policy (methods/policy.py)
    eval_windows: int = 32        # of the hold-out, before and after
    block_size: int | None = None    # tokens in a window; default: the model's context, at most 512
    micro_batch: int = 4          # windows per forward pass
    seed: int = 0                 # which windows
    device: str = "auto"          # auto, cpu, cuda, mps
    # of calibration, measured damage and losses, not of what is saved; auto: bfloat16 where it is faster
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # of what is cut and saved; auto: float32, but on a GPU bfloat16 where they are stored so
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    offload: bool = False         # the layers stay in main memory, and come to the device one at a time


@dataclass(frozen=True)
class Structure:
    """What a --structure may be combined with; each field is named as its flag."""
    score: tuple[str, ...]
    allocate: tuple[str, ...] = ("global",)
    budget: tuple[str, ...] = ("params",)
    mend: tuple[str, ...] = ("none",)


# From this d_model on, --dtype auto measures in bfloat16 where the device is fast at it. At d_model
# 32, 64, 128, 192, 256 and 576 calibration with gradients is 0.57, 0.95, 2.2, 2.6, 2.8 and 2.7 times
# as fast as in float32 (one thread with AVX512-BF16).
BFLOAT16_WIDTH = 128

# Taken from the tables, so that a new row of SCORES or ALLOCATIONS is allowed here at once.
BUDGETS = (*RESOURCES, "ms")
UNITS = Structure((*SCORES, "policy"), (*ALLOCATIONS, "measured"), BUDGETS,
                  ("none", "bias", "least-squares", "sequential", "local"))
# Ways of mending that run the cut model beside the dense one, and all that begin with least squares.
SIDE_BY_SIDE = ("sequential", "local")
LEAST_SQUARES = ("least-squares", *SIDE_BY_SIDE)
# FLAP's scores sum to 0 in every layer, so they cannot rank layers.
LAYER_SCORES = [name for name in SCORES if not name.startswith("flap")]
DEPTH = Structure((*LAYER_SCORES, "influence", "perplexity"), ("global", "middle"), BUDGETS,
                  ("none", "sequential", "local"))
STRUCTURES = {
    "ffn": UNITS,
    "kv": UNITS,
    "ffn,kv": UNITS,
    "kv,ffn": UNITS,
    "layer": DEPTH,
    "sublayer": DEPTH,
    # Whole layers first, then widths: these rows are about the widths.
    "layer,ffn,kv": UNITS,
    "sublayer,ffn,kv": UNITS,
    "channel": Structure(("activation", "magnitude", "taylor")),
    # "2:4" stands for any n:m.
    "2:4": Structure(tuple(sparse.SCORES), mend=sparse.MENDS),
    "weights": Structure(("magnitude", "wanda", "sparsegpt"), mend=sparse.MENDS),
}


def rules_of(structure):
    """The row of STRUCTURES that holds for a --structure, None if it is none."""
    is_pattern = sparse.is_sparse(structure) and structure != "weights"
    return STRUCTURES.get("2:4" if is_pattern else structure)


def check(recipe):
    """Raise UserError for a recipe that means nothing."""
    check_choices(recipe)
    rules = rules_of(recipe.structure)
    if rules is None:
        raise UserError(f"--structure {recipe.structure!r} must be ffn, kv, ffn,kv, layer, sublayer, "
                        "layer,ffn,kv, sublayer,ffn,kv, channel, 2:4 (or any n:m) or weights")
    for flag in ("score", "allocate", "budget", "mend"):
        value = getattr(recipe, flag)
        allowed = getattr(rules, flag)
        if value is not None and value not in allowed:
            raise UserError(f"--{flag} {value!r} with --structure {recipe.structure} must be one of "
                            f"{', '.join(allowed)}")
    check_numbers(recipe)
    is_sparse = sparse.is_sparse(recipe.structure)
    if is_sparse:
        sparse.check(recipe.structure, recipe.score)
    if recipe.score == "policy":
        check_policy(recipe)

    # A flag that nothing will read is a mistake.
    has_layers_and_widths = len(parts_of(recipe)) > 1
    is_read = {
        "keep": not is_sparse or recipe.structure == "weights",
        "iterations": not is_sparse,
        # Without statistics there is nothing to take layer by layer.
        "layer_by_layer": is_sparse and bool(sparse.needs(recipe.score, recipe.mend)),
        "amplitude": recipe.allocate == "adaptive",
        "multiple_of": recipe.structure not in ("kv", "layer", "sublayer") and not is_sparse,
        "layer_share": has_layers_and_widths,
        "layer_score": has_layers_and_widths,
        "measured_windows": leaves_parts_out(recipe),
        "policy_steps": recipe.score == "policy",
        "policy_lr": recipe.score == "policy",
        "policy_update": recipe.score == "policy",
        "local_steps": recipe.mend == "local",
        "choices": not GRADIENTS.isdisjoint(needs(recipe)),
    }
    idle = [name for name, has_reader in is_read.items() if not has_reader]
    if not writes_itself(recipe):
        refuse_idle(recipe, ["prompts"], "without --data self")
    check_memory(recipe)
    words = [f"--{flag} {getattr(recipe, flag)}" for flag in ("structure", "score", "allocate", "mend")
             if getattr(recipe, flag) is not None]
    refuse_idle(recipe, idle, f"with {' '.join(words)}")


def check_policy(recipe):
    """Raise UserError if score policy could not learn."""
    if not 0 < recipe.policy_lr < math.inf:
        raise UserError(f"--policy-lr {recipe.policy_lr} must be positive and finite")
    if recipe.allocate == "measured":
        raise UserError("--score policy learns what each unit is worth at one budget, and --allocate measured needs to "
                        "know it at all widths; give --allocate global")


def check_numbers(recipe):
    """Raise UserError for a number out of its range."""
    if not 0 < recipe.keep < 1:
        raise UserError(f"--keep {recipe.keep} must be between 0 and 1")
    if not 0 <= recipe.amplitude < math.inf:
        raise UserError(f"--amplitude {recipe.amplitude} must be finite and not negative")
    if not 0 <= recipe.layer_share <= 1:
        raise UserError(f"--layer-share {recipe.layer_share} must be between 0 and 1")
    if recipe.mend == "bias" and recipe.iterations > 1:
        raise UserError("--mend bias makes a model that cannot be cut again; --iterations "
                        f"{recipe.iterations} must be 1")
    for name in ("windows", "measured_windows", "eval_windows", "micro_batch", "multiple_of",
                 "iterations", "local_steps", "policy_steps", "block_size"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    check_seed(recipe)
    if leaves_parts_out(recipe):
        windows = recipe.measured_windows
        if windows % recipe.micro_batch or windows > recipe.windows:
            raise UserError(f"--measured-windows {windows} must be a multiple of --micro-batch "
                            f"{recipe.micro_batch} and at most --windows {recipe.windows}")


def check_memory(recipe):
    """Raise UserError for what --weights or --offload cannot do."""
    if recipe.weights == "bfloat16" and recipe.dtype == "float32":
        raise UserError("--weights bfloat16 are not measured in --dtype float32; leave out one of the two")
    if recipe.offload and writes_itself(recipe):
        raise UserError("--data self with --offload would bring every layer to the device for every token that it "
                        "writes; write the text first (python -m methods.self_text) and give the file by --data")
    if recipe.offload and recipe.choices is not None:
        raise UserError("--choices needs gradients through the whole model at once, and --offload has one layer at a "
                        "time; leave out one of the two")


def with_mend(recipe, device):
    """The recipe with a way of mending where it names none. Widths are mended by sequential least
    squares, the best that was measured (docs/recover.md), except on Apple's GPUs, which lack float64.
    Nothing else is mended: it was not measured."""
    if recipe.mend is not None:
        return recipe
    has_widths = rules_of(recipe.structure) is UNITS
    usual = "sequential" if has_widths and torch.device(device).type != "mps" else "none"
    return dataclasses.replace(recipe, mend=usual)


def parts_of(recipe):
    """A recipe of layers and widths as two: [recipe of the layers, recipe of the widths]. Any other
    recipe is its only part."""
    first, _, kinds = recipe.structure.partition(",")
    if first not in depth.PARTS or not kinds:
        return [recipe]
    layers = dataclasses.replace(recipe, structure=first, score=recipe.layer_score, allocate="global",
                                 mend="none", multiple_of=1)
    return [layers, dataclasses.replace(recipe, structure=kinds)]


def runs_again(recipe):
    """Whether the recipe runs the model again behind the calibration pass."""
    return recipe.score == "policy" or leaves_parts_out(recipe)


def leaves_parts_out(recipe):
    """Whether the recipe measures by running the model with something left out."""
    return any(part.allocate == "measured" or part.score == "perplexity" for part in parts_of(recipe))


def window_of(recipe, model):
    """Tokens of a window."""
    return min(512, model.config.block_size) if recipe.block_size is None else recipe.block_size


def priced(recipe, model):
    """The model's config at the window's length, at which the FLOPs of a budget are counted."""
    return dataclasses.replace(model.config, block_size=window_of(recipe, model))


# -- the command, step by step

def measuring_dtype(recipe, model, device):
    """The dtype of everything that only measures."""
    if model.embed.weight.dtype == torch.bfloat16:
        return torch.bfloat16
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    is_faster = has_fast_bfloat16(device) and model.config.d_model >= BFLOAT16_WIDTH
    return torch.bfloat16 if is_faster else torch.float32


def resource_of(recipe, model):
    """What the budget is counted in: a name in RESOURCES or, for --budget ms, decode time measured
    now (latency.DecodeTime)."""
    if recipe.budget != "ms":
        return recipe.budget
    resource = latency.measure(model.config)
    print(resource.describe())
    return resource


def in_dtype(model, dtype):
    """A copy of the model with its weights cast once. If they are of this dtype, the model
    itself."""
    if model.embed.weight.dtype == dtype:
        return model
    # What `deepcopy` would otherwise copy whole: {id: what stands in its place}.
    cast = {id(p): nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, cast)


def needs(recipe):
    """The fields of score.Stats that the recipe reads."""
    # The table at the end always prints the cosines.
    fields = {"cosine"}
    if sparse.is_sparse(recipe.structure):
        return fields | sparse.needs(recipe.score, recipe.mend)
    if recipe.structure == "channel" and recipe.score == "activation":
        fields.add("channel")
    elif recipe.score in SCORES:
        fields |= SCORES[recipe.score].needs
    elif recipe.score == "policy":
        fields |= SCORES["wanda"].needs
    measures_mended = recipe.mend in LEAST_SQUARES and recipe.allocate == "measured"
    if recipe.mend == "least-squares" or measures_mended:
        fields.add("gram")
    elif recipe.mend == "bias":
        fields.add("mean")
    return fields


def calibration_pass(recipe):
    """The function that takes the statistics: all layers at once, or one after the other."""
    return offload.collect if recipe.offload else score.collect


def collect(model, batches, recipe, dtype=torch.float32, questions=()):
    """The recipe's statistics of one calibration pass, which runs in `dtype`. If there are
    `questions` (margin.batches), the gradients are those of their margin."""
    readers = sparse.READERS if sparse.is_sparse(recipe.structure) else score.READERS
    running = in_dtype(model, dtype)
    fields = needs(recipe)
    of_margin = fields & GRADIENTS if questions else set()
    stats = calibration_pass(recipe)(running, progress(batches, "calibrate"), fields - of_margin, readers)
    if of_margin:
        judged = score.collect(running, progress(questions, "questions"), of_margin, loss=margin.loss)
        for name in of_margin:
            setattr(stats, name, getattr(judged, name))
    stats.seed = recipe.seed
    return stats


@torch.no_grad()
def measure(model, stats, batches, recipe, dtype=torch.float32, budget=None, resource=None):
    """What the recipe learns by running the model again, in `dtype`, on its measured_windows: how
    the loss rises without each layer or sub-block (depth.without), or the damage of several widths
    of each sub-block (measured.damage). Score policy learns on all windows which units stay under
    `budget` (policy.learn)."""
    if recipe.score == "policy":
        kinds = recipe.structure.split(",")
        costs, left, _ = allocate.split_budget(priced(recipe, model), budget, kinds, resource or recipe.budget)
        of_kinds = {key: cost for key, cost in costs.items() if key[1] in kinds}
        return policy.learn(in_dtype(model, dtype), batches, SCORES["wanda"].function(model, stats), of_kinds, left,
                            recipe.policy_steps, recipe.policy_lr, recipe.seed, recipe.policy_update)

    # The model runs once for each layer, or for each width of each sub-block: few windows must do.
    batches = batches[:recipe.measured_windows // batches[0][0].size(0)]
    running = in_dtype(model, dtype)
    if recipe.score == "perplexity":
        return depth.without(running, batches, depth.PARTS[recipe.structure])

    # Measure with the same mending as the final cut: of one sub-block, all begin with least squares.
    def reader(name, w, kept):
        if recipe.mend in LEAST_SQUARES:
            return mend.mended(w, stats.gram[name], kept)
        return w[:, kept]

    scores = SCORES[recipe.score].function(model, stats)
    widths = measured.widths_to_measure(model.config, recipe.structure.split(","))
    return measured.damage(running, batches, scores, widths, reader)


def stages(recipe, config, resource=None):
    """The recipe as single cuts, one after the other: [(recipe of the cut, budget)]. Whole layers go
    first and all at once, then widths in `iterations` equal parts. `config` is the model's before
    the first cut. `resource`: measured decode time, for --budget ms."""
    resource = resource or recipe.budget
    total = allocate.total(config, resource)
    cuts = []
    begin = 1
    *layers, widths = parts_of(recipe)
    if layers:
        begin = 1 - (1 - recipe.keep) * recipe.layer_share
        budget = depth.budget_of_share(config, recipe.keep, recipe.layer_share, layers[0].structure, resource)
        # The share may round to no layer at all.
        if budget < total:
            cuts.append((layers[0], budget))
    for i in range(1, recipe.iterations + 1):
        keep = begin - (begin - recipe.keep) * i / recipe.iterations
        cuts.append((widths, math.floor(total * keep + 1e-6)))
    return cuts


@torch.no_grad()
def decide(model, stats, recipe, budget, original=None, damage=None, resource=None):
    """The units that stay under the budget: {(layer, kind): indices}.

    `damage`: what `measure` returned, for a recipe that runs the model again. `original`: the
    widths before earlier cuts. `resource`: measured decode time, for --budget ms. Raises UserError
    if the budget cannot be met."""
    config = priced(recipe, model)
    resource = resource or recipe.budget
    # Whole layers or sub-blocks: all of their units stay, or none.
    if recipe.structure in depth.PARTS:
        scores = depth.part_scores(model, stats, damage, recipe.structure, recipe.score)
        widths = depth.widths_for(config, budget, recipe.allocate, scores, recipe.structure, resource)
        refuse_nothing_left(widths, budget, recipe)
        return {key: torch.arange(n) for key, n in widths.items()}

    # Units: first how many of each layer, then which.
    scores = damage if recipe.score == "policy" else SCORES[recipe.score].function(model, stats)
    options = dict(structure=recipe.structure.split(","), multiple_of=recipe.multiple_of,
                   resource=resource)
    if recipe.allocate == "measured":
        widths = measured.widths_for(config, budget, damage, **options)
    else:
        importance = None
        if recipe.allocate == "adaptive":
            absent = [layer for layer in range(config.n_layer) if not depth.units_of(config, layer, "layer")]
            importance = score.importance(stats, config.n_layer, absent)
        widths = allocate.widths_for(config, budget, recipe.allocate, scores, **options,
                                     importance=importance, amplitude=recipe.amplitude, original=original)
    refuse_nothing_left(widths, budget, recipe)
    return choose(scores, widths)


def refuse_nothing_left(widths, budget, recipe):
    """Raise UserError if not a single unit stays."""
    if not any(widths.values()):
        raise UserError(f"a budget of {budget:,} {recipe.budget} keeps no unit of any layer; keep more than "
                        f"{recipe.keep:g}")


@torch.no_grad()
def cut(model, alive, mend_by="none", stats=None):
    """The smaller model that keeps the units in `alive`; the given model stays as it is. With `mend_by`
    "least-squares" it is mended by stats.gram, and with "bias" it becomes a mend.BiasedGPT by
    stats.mean. The other ways of mending come behind the cut, see `mend_side_by_side_`."""
    small, _ = slice(model, None, alive)
    if mend_by == "least-squares":
        mend.mend_by_least_squares_(small, model, alive, stats.gram)
    elif mend_by == "bias":
        small = mend.with_biases(small, model, alive, stats.mean)
    return offload.keep_like(small, model)


def cut_once(model, stats, recipe, budget, original=None, damage=None, resource=None):
    """The smaller model of one cut (see `decide`). Where single weights go it is the given model, with
    zeros."""
    if sparse.is_sparse(recipe.structure):
        pattern = sparse.pattern_of(recipe.structure, recipe.keep)
        sparse.cut_(model, stats, pattern, recipe.score, recipe.mend)
        return model
    if recipe.structure == "channel":
        small = channels.narrowed(model, stats, recipe.score, budget, recipe.multiple_of)
        return offload.keep_like(small, model)
    alive = decide(model, stats, recipe, budget, original, damage, resource)
    return cut(model, alive, recipe.mend, stats)


def mend_side_by_side_(recipe, small, model, batches, dtype, is_last):
    """Mend, in place, a model that was cut from `model` by running both: see mend.mend_sequentially_
    and local.distil_. Local distillation follows the last cut only."""
    windows = torch.cat([x for x, _ in batches])
    mend.mend_sequentially_(small, model, windows, dtype, micro_batch=recipe.micro_batch)
    if recipe.mend == "local" and is_last:
        local.distil_(small, model, windows, recipe.local_steps, seed=recipe.seed, dtype=dtype,
                      micro_batch=recipe.micro_batch)


def cut_in_stages(model, batches, recipe, dtype=torch.float32, resource=None, collect=collect, written_anew=None):
    """All cuts of the recipe, each measured anew on the model that the last one left: (smaller
    model, the cosines of the last calibration pass as Stats). A caller that has statistics already hands in
    its own `collect`. `written_anew(smaller model)` returns the batches behind the first cut."""
    dense = model
    recipe = with_mend(recipe, model.embed.weight.device)
    if recipe.layer_by_layer:
        pattern = sparse.pattern_of(recipe.structure, recipe.keep)
        return model, sparse.cut_layer_by_layer_(model, batches, pattern, recipe.score, recipe.mend, dtype)
    start = priced(recipe, model)
    cuts = stages(recipe, start, resource)
    for number, (stage, budget) in enumerate(cuts, start=1):
        if written_anew and number > 1:
            batches = written_anew(model)
        stats = collect(model, batches, stage, dtype)
        damage = None
        if runs_again(stage):
            damage = measure(model, stats, batches, stage, dtype, budget, resource)
        model = cut_once(model, stats, stage, budget, start.widths(), damage, resource)
        # Sums of gradients take as much memory as the weights in float32, and nobody reads them any more.
        stats = score.Stats(cosine=stats.cosine)
        if stage.mend in SIDE_BY_SIDE:
            mend_side_by_side_(stage, model, dense, batches, dtype, is_last=number == len(cuts))
        if stage.structure != recipe.structure and stage.structure in depth.PARTS:
            share = depth.share_gone(start, priced(recipe, model), recipe.keep, resource or recipe.budget)
            print(f"went whole: {depth.names_gone(start, model.config)}; {share:.2f} of what is to go, asked "
                  f"{recipe.layer_share:g}")
    return model, stats


def open_model(recipe, device):
    """The model with weights as --weights has them, as (GPT, what its file says besides). Raises
    UserError if the recipe cannot cut it."""
    model, about = load(recipe, device)
    if about.get("masks"):
        raise UserError(f"{recipe.init} is sparse already, and what is cut from it would be sparse no "
                        "longer; cut first, and make the smaller model sparse")
    check_fits(recipe, model, device)
    return model, about


def load(recipe, device, block_size=None):
    """The model of --init, as (GPT, what its file says besides), with its weights where and as the
    recipe has them. `block_size`: see checkpoint.load."""
    dtype = loading_dtype(recipe, device)
    model, about = checkpoint.load(recipe.init, "cpu" if recipe.offload else device, dtype, block_size)
    if dtype is None and any(p.dtype != torch.bfloat16 for p in model.parameters()):
        model.to(torch.float32)
    if recipe.offload:
        offload.keep_layers_off(model, torch.device(device))
    return model, about


def loading_dtype(recipe, device):
    """The dtype that the weights are loaded in; None for bfloat16 where they are stored so, and
    float32 otherwise.

    Our numbers are made with float32 weights on a CPU. On a GPU memory is what ends first, and
    float32 weights of a model that is stored in bfloat16 hold no more than that."""
    if recipe.weights != "auto":
        return getattr(torch, recipe.weights)
    halves = device.startswith("cuda") and has_fast_bfloat16(device) and recipe.dtype != "float32"
    return None if halves else torch.float32


def check_fits(recipe, model, device):
    """Raise UserError if this model cannot be cut by the recipe."""
    T = window_of(recipe, model)
    with_context(model.config, T, recipe.init)         # refuses longer windows than its context
    widest = max(model.config.d_ff)
    if recipe.structure != "channel" and recipe.multiple_of > max(1, widest):
        raise UserError(f"--multiple-of {recipe.multiple_of} is more than the {widest} neurons of the "
                        "widest layer; give at most that")
    if sparse.is_sparse(recipe.structure):
        sparse.check_widths(model, sparse.pattern_of(recipe.structure, recipe.keep))
    if recipe.mend in LEAST_SQUARES:
        check_least_squares(f"--mend {recipe.mend}", recipe, model.config, T, device)
    elif "gram" in needs(recipe):
        check_least_squares(f"--score {recipe.score}", recipe, model.config, T, device)
    if recipe.mend in SIDE_BY_SIDE and recipe.windows < mend.HOLD_OUT:
        enough = math.ceil(mend.HOLD_OUT / recipe.micro_batch) * recipe.micro_batch
        raise UserError(f"--mend {recipe.mend} fits to some windows and tries on others, and --windows "
                        f"{recipe.windows} is too few; give --windows {enough} or, better, many more")


def check_least_squares(setting, recipe, config, T, device):
    """Raise UserError if the least squares of a `setting` lack float64, or tokens to fit matrices to."""
    if device == "mps":
        raise UserError(f"{setting} is solved in float64, which Apple's GPUs lack; give "
                        "--device cpu")
    # With fewer tokens than inputs the Gram matrix has no full rank: the fit would be to noise.
    widest = max(*config.d_ff, config.head_dim * max(config.n_head))
    # Where single weights go, the matrices that read the residual stream are fitted, too.
    if sparse.is_sparse(recipe.structure):
        widest = max(widest, config.d_model)
    tokens = recipe.windows * T
    if tokens < widest:
        enough = math.ceil(widest / T / recipe.micro_batch) * recipe.micro_batch
        raise UserError(f"{setting} fits matrices of {widest:,} inputs to "
                        f"{recipe.windows} windows x {T} = {tokens:,} tokens; give --windows "
                        f"{enough} or, better, several times as many")


def writes_itself(recipe):
    """Whether the model that is cut writes calibration text."""
    return "self" in data.weights_of(recipe.data)


def text_for(recipe, model, tokenizer, dtype):
    """The corpus to calibrate and measure on. For --data self the model writes it, as it is now."""
    T = window_of(recipe, model)
    opened = {}
    if writes_itself(recipe):
        weights = data.weights_of(recipe.data)
        # No more windows than the mixture takes of them.
        windows = math.ceil(recipe.windows / sum(weights.values())) * weights["self"]
        running = in_dtype(model, dtype)
        opened["self"] = self_text.load(running, tokenizer, windows, T, recipe.seed, recipe.prompts)
    return data.load_mixture(recipe.data, tokenizer, block_size=T, opened=opened)


def print_losses(recipe, model, corpus, when, dtype):
    """Print the size and the loss of each source's hold-out, computed in `dtype`."""
    running = in_dtype(model, dtype)
    params = model.config.num_params()["total"]
    for name, tokens in corpus.domains.items():
        result = evaluate(running, tokens, corpus.tokenizer.byte_lengths(), recipe.eval_windows,
                          batch=recipe.micro_batch, block_size=window_of(recipe, model), show_progress=True)
        print(f"{when:6} {params:13,} parameters   {result['loss']:.4f} nats per token   "
              f"perplexity {result['perplexity']:.2f}   "
              f"(hold-out of {name}, {result['tokens']:,} tokens, {dtype_name(running)})")


def calibrated_on(recipe, corpus, T):
    """A sentence that names the text which decided the cut."""
    sources = " and ".join(f"{name} ({share:.0%})" for name, share in corpus.shares.items())
    if len(corpus.shares) == 1:
        sources = corpus.name
    questions = f" and, by gradients, on the questions of {recipe.choices}" if recipe.choices else ""
    return (f"the cut was decided on {recipe.windows} windows of {T} tokens of {sources}{questions}; other kinds of "
            "text may have lost more than the hold-outs above tell")


def table(before, after, stats):
    """Layer by layer: ShortGPT's influence 1 - cos(in, out) as measured last, and the widths."""
    lines = ["layer  influence  KV groups   neurons"]
    old = before.widths()
    new = after.widths()
    for layer in range(before.n_layer):
        kv = f"{old[layer, 'kv']:3} -> {new[layer, 'kv']:<3}"
        ffn = f"{old[layer, 'ffn']:5} -> {new[layer, 'ffn']}"
        lines.append(f"{layer:5}  {depth.influence(stats, layer):9.4f}  {kv}  {ffn}")
    return "\n".join(lines)


def picture(path, before, after):
    """Widths by layer, what is kept in front of what was there, as a PNG file. Without matplotlib
    a sentence is printed instead."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(8, 4), layout="constrained")
    neurons, groups = figure.subplots(2, 1, sharex=True)
    bars(neurons, "neurons", before.d_ff, after.d_ff)
    bars(groups, "KV groups", before.n_kv_head, after.n_kv_head)
    groups.set_xlabel("layer")
    figure.savefig(path, dpi=120)


def bars(axis, name, before, after):
    axis.bar(range(len(before)), before, color="0.88")
    axis.bar(range(len(after)), after, color="tab:blue")
    axis.set_ylabel(name)


def save(recipe, model, out, tokenizer, fingerprint, origin=None):
    """Write the smaller model as a checkpoint that says what made it and, by `origin`, where the whole
    one came from. A sparse model has its masks beside it."""
    masks = sparse.pack(sparse.nonzero(model)) if sparse.is_sparse(recipe.structure) else None
    made = {"data": recipe.data, "fingerprint": fingerprint, "cut_from": recipe.init,
            "recipe": dataclasses.asdict(recipe)}
    # Nobody else can read the hold-out of a text that the whole model wrote.
    if writes_itself(recipe):
        del made["data"]
    checkpoint.save_made(out, model, tokenizer, origin, made, masks=masks)


def main(recipe):
    check_init(recipe, "to cut")
    check(recipe)
    # As files record it.
    recipe = dataclasses.replace(recipe, data=data.recorded(recipe.data))
    name = recipe.structure.replace(":", "-") if ":" in recipe.structure else f"{recipe.keep:g}"
    out = Path(recipe.out or f"runs/pruned-{Path(recipe.init).name}-{name}")
    with checkpoint.new_folder(out):
        cut_and_save(recipe, out)


def cut_and_save(recipe, out):
    """`main`, with the folder `out` held."""
    device = pick_device(recipe.device)
    recipe = with_mend(recipe, device)
    model, about = open_model(recipe, device)
    dtype = measuring_dtype(recipe, model, device)
    # The file of the smaller model will say it.
    recipe = dataclasses.replace(recipe, dtype=str(dtype).removeprefix("torch."), weights=dtype_name(model))
    tokenizer = checkpoint.tokenizer_of(model, about, recipe.init)
    origin = hand_on(about)
    T = window_of(recipe, model)
    questions = ()
    if recipe.choices is not None:
        questions = margin.batches(model, tokenizer, read_questions(recipe.choices))
    corpus = text_for(recipe, model, tokenizer, dtype)
    batches = score.batches(corpus.train, T, recipe.windows, recipe.micro_batch, recipe.seed)
    start = model.config
    resource = resource_of(recipe, model)
    total = allocate.total(priced(recipe, model), resource)
    # Refuse an impossible budget before the work begins.
    kinds = recipe.structure.split(",")
    if {"ffn", "kv"}.issuperset(kinds):
        budget = math.floor(recipe.keep * total + 1e-6)
        allocate.split_budget(priced(recipe, model), budget, kinds, resource)

    print_losses(recipe, model, corpus, "before", dtype)
    begin = time.perf_counter()

    def written_anew(smaller):
        fresh = text_for(recipe, smaller, tokenizer, dtype)
        return score.batches(fresh.train, T, recipe.windows, recipe.micro_batch, recipe.seed)

    collect_both = functools.partial(collect, questions=questions)
    model, stats = cut_in_stages(model, batches, recipe, dtype, resource, collect_both,
                                 written_anew if writes_itself(recipe) else None)
    print(f"calibrated and cut in {time.perf_counter() - begin:.1f} seconds")
    # A model that is more than its GPTConfig (mend.BiasedGPT) does not fit into a checkpoint. What fits
    # is saved before measuring, which takes its time and may fail.
    is_saved = type(model) is GPT
    if is_saved:
        save(recipe, model, out, tokenizer, corpus.fingerprint, origin)
    print(table(start, model.config, stats))
    print_losses(recipe, model, corpus, "after", dtype)
    print(calibrated_on(recipe, corpus, T))
    if writes_itself(recipe):
        print("the text of self was written by the whole model: on it the loss rises by the KL divergence of the cut "
              "model from the whole one, as far as the tokens tell")

    if sparse.is_sparse(recipe.structure):
        print(sparse.describe(model, sparse.pattern_of(recipe.structure, recipe.keep)))
    else:
        left = allocate.total(priced(recipe, model), resource)
        print(f"{left:,} of {total:,} {resource} kept: {left / total:.4f}, asked {recipe.keep:g}")
    if recipe.budget == "ms":
        print(latency.report(resource, start, model.config, tokenizer))
    if not is_saved:
        print(f"not saved, as {model.evaluation_only}, which no GPTConfig and no runtime has")
        return
    picture(out / "widths.png", start, model.config)
    print(f"saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Prune)))

"""Structured pruning: choose units, zero them in place or slice them off, mend what is left; while training or once.

    python prune.py --init runs/scratch-laptop-0 --keep 0.5 --score taylor --allocate adaptive
    python -m pytest tests/test_prune.py           # the two facts below, and what breaks them

A *unit* is an FFN neuron (gate row, up row, down column) or a KV group (one KV head with the query heads it serves:
k, v and q rows and biases, o columns). Two facts make pruning inside a training loop simple:
  1. A dead unit stays dead. Where all of a unit's entries are 0, its output and every one of its gradients are
     exactly 0; with its Adam moments set to 0 as well, AdamW (eps > 0, decay multiplies) leaves it at 0. So a cut
     only writes zeros: no masks, no new optimizer, nothing for torch.compile or DDP to notice.
  2. So slicing is exact, whenever it comes: the smaller model has the same logits and takes the same next step.
The command cuts a model once, or in --iterations, and saves it. What a unit is worth: score.py;
who pays: allocate.py. Not here: training (train.py), SliceGPT (methods/slicegpt.py), the baselines side by side (experiments/compare.py).
"""
import contextlib
import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import allocate
import checkpoint
import data
import score
from common import UserError, parse, peak_memory, pick_device, refuse_idle, run
from eval import evaluate
from methods import two_four
from model import GPT, by_unit, coupled


def everything(config):
    """Every unit, alive: {(layer, kind): indices (units,)}."""
    return {key: torch.arange(n) for key, n in config.widths().items()}


# -- choose

def choose(scores, widths):
    """The best-scored units of each layer: {(layer, kind): indices (widths[layer, kind],), ascending}. Pure; ties by
    index."""
    return {key: worth.cpu().argsort(descending=True, stable=True)[:widths[key]].sort().values
            for key, worth in scores.items()}


# -- zero and slice

@torch.no_grad()
def zero_(model, optimizer, alive):
    """Kill, in place, every unit that is not in `alive`: its weights and its Adam moments become 0. optimizer may be
    None."""
    parameters = dict(model.named_parameters())
    for (layer, kind), units in model.config.widths().items():
        living = alive.get((layer, kind), torch.arange(units))
        dead = torch.ones(units, dtype=torch.bool).index_fill_(0, living, False).nonzero().flatten()
        if dead.numel() == 0:
            continue
        for name, dim in coupled(model.config, layer, kind):
            p = parameters[name]
            moments = optimizer.state.get(p, {}).values() if optimizer else ()
            for tensor in (p, *(m for m in moments if m.shape == p.shape)):
                by_unit(tensor, dim, units).index_fill_(dim, dead.to(p.device), 0)


@torch.no_grad()
def slice(model, optimizer, alive):
    """Cut dead units off for good: -> (model, optimizer) with only the entries of units in `alive`, same dtype, device,
    hyperparameters, moments and step counts. optimizer may be None. A sub-block that keeps no unit goes, with the
    norm in front of it."""
    config = model.config.resized({key: len(indices) for key, indices in alive.items()})
    units = model.config.widths()
    cuts = {name: (dim, units[key], indices) for key, indices in alive.items()
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


# -- mend: what the readers make of the channels that are left

def mended(w, gram, kept, damping=0.01):
    """Least squares: the columns `kept` of the matrix w (C, n) that reads a sub-block's channels, changed so that over
    the calibration text they give what all of w gave: W_S + W_D G_DS (G_SS + λ I)^-1, D what goes, G = gram (n, n), λ =
    damping · mean of G's diagonal. -> (C, kept). Channel pruning's closed form (arXiv 1707.06168, eq. 3)."""
    g = gram.double()
    gone = torch.ones(w.size(1), dtype=torch.bool, device=w.device).index_fill_(0, kept, False).nonzero().flatten()
    g_ss = g[kept][:, kept]
    g_ss.diagonal().add_(damping * g.diagonal().mean())
    change = torch.linalg.solve(g_ss, g[kept][:, gone] @ w[:, gone].double().T)               # (kept, C)
    return w[:, kept] + change.T.to(w.dtype)


class Constant(nn.Module):
    """An absent sub-block whose mean output stays: whatever comes in, (C,) comes out."""
    def __init__(self, bias):
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x, *_):
        return self.bias


@torch.no_grad()
def cut(model, alive, mend="none", stats=None):
    """-> the smaller GPT that keeps the units in `alive`; the model given stays as it is. mend "least-squares": what
    reads the units that are left makes up for the others (`mended`, from stats.gram). "bias": FLAP's compensation
    (arXiv 2312.11983, section 3.3), the mean output of what went (stats.mean) as an explicit bias behind `o` and
    `down`; a GPTConfig has no such bias, so that model is for evaluation only."""
    small, _ = slice(model, None, alive)
    for (layer, kind), kept in alive.items() if mend != "none" else ():
        units, sub_block = model.config.widths()[layer, kind], "attn" if kind == "kv" else "ffn"
        if len(kept) == units:
            continue
        name = coupled(model.config, layer, kind)[-1][0]
        w, block = model.get_parameter(name), small.blocks[layer]
        channels = score.channels_of(kept.to(w.device), w.size(1) // units)
        if mend == "bias":
            bias = w @ stats.mean[name].index_fill(0, channels, 0).to(w.dtype)
            small.evaluation_only = "it has FLAP's biases behind o and down"
            if len(kept):
                getattr(block, sub_block).get_submodule(name.split(".")[-2]).bias = nn.Parameter(bias)
            else:
                setattr(block, sub_block, Constant(bias))
                setattr(block, f"{sub_block}_norm", nn.Identity())
        elif len(kept):
            small.get_parameter(name).copy_(mended(w, stats.gram[name], channels))
    return small


@torch.no_grad()
def slice_channels(model, kept):
    """-> GPT with the channels `kept` (C',) of the residual stream. A dead channel is 0 everywhere in the stream; the
    norms' mean of squares then runs over C' channels instead of C, so gains · √(C/C') and eps · C/C' give the same
    logits. Of QK norms, whose eps is the same number, the q and k before them are scaled by √(C/C') instead."""
    C, n = model.config.d_model, len(kept)
    config = dataclasses.replace(model.config, d_model=n, norm_eps=model.config.norm_eps * C / n)
    with torch.device("meta"):
        small = GPT(config)
    weights = {}
    for name, w in model.named_parameters():
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if part in ("attn_norm", "ffn_norm", "norm"):
            w = w[kept] * math.sqrt(C / n)
        elif part in ("o", "down"):
            w = w[kept]
        elif w.dim() == 2:
            w = w[:, kept]
        if config.qk_norm and ".attn.q." in name or config.qk_norm and ".attn.k." in name:
            w = w * math.sqrt(C / n)
        weights[name] = w.clone()
    small.load_state_dict(weights, assign=True)
    return small


# -- the command: one cut of a model that is there

@dataclass(frozen=True)
class Prune:
    init: str | None = None       # what to cut: a checkpoint, run folder, Hugging Face folder or hub id
    keep: float = 0.8             # kept fraction of the budget that all FFN neurons and KV groups take
    budget: str = "params"        # params; flops (per token, forward, at the block size); kv_bytes (per token)
    structure: str = "ffn,kv"     # ffn (neurons), kv (KV groups and their queries); or layer, sublayer, channel, 2:4
    score: str = "sensitivity"    # score.SCORES; for whole layers also influence, perplexity
    allocate: str = "global"      # allocate.ALLOCATIONS, or measured
    amplitude: float = 1.0        # of allocate adaptive: how far the layers' shares differ
    multiple_of: int = 1          # of neurons, or channels; runtimes like 32, quantizers 256
    iterations: int = 1           # cut in so many equal parts, each measured anew (and each within its budget)
    mend: str = "none"            # least-squares: what reads the units left makes up for the others; bias: FLAP's
    out: str | None = None        # folder of the smaller model; default runs/pruned-NAME-KEEP, or -2-4
    data: str = "stdlib"          # calibration text; its hold-out measures the loss (data.py's sources)
    windows: int = 32             # of the calibration text
    measured_windows: int = 4     # of those, for allocate measured and score perplexity, which run the model often
    eval_windows: int = 32        # of the hold-out, before and after
    block_size: int | None = None    # tokens in a window; default: the model's context, at most 512
    micro_batch: int = 4          # windows per forward pass
    seed: int = 0                 # which windows
    device: str = "auto"          # auto, cpu, cuda, mps


SHARES = (0, .4, .7, .85)         # of a sub-block's width: where allocate measured measures


def check(c):
    """Refuse a recipe that means nothing."""
    kinds = tuple(c.structure.split(","))
    alone = kinds[0] if len(kinds) == 1 and kinds[0] in ("layer", "sublayer", "channel", "2:4") else None
    depth = alone in ("layer", "sublayer")
    scores = {"channel": ("activation", "magnitude", "taylor"), "2:4": ("magnitude", "wanda")}.get(alone, score.SCORES)
    if depth:                                                # flap's sum to 0 in every layer
        scores = [name for name in (*scores, "influence", "perplexity") if name != "flap"]
    ways = ("global", "middle") if depth else ("global",) if alone else (*allocate.ALLOCATIONS, "measured")
    for name, value, allowed in (("score", c.score, scores), ("allocate", c.allocate, ways),
                                 ("budget", c.budget, allocate.RESOURCES[:1 if alone and not depth else None]),
                                 ("mend", c.mend, ("none",) if alone else ("none", "bias", "least-squares"))):
        if value not in allowed:
            raise UserError(f"--{name} {value!r} with --structure {c.structure} must be one of {', '.join(allowed)}")
    if not alone and not {*kinds} <= {"ffn", "kv"} or not 0 < c.keep < 1 or not 0 <= c.amplitude < math.inf:
        raise UserError(f"--structure {c.structure!r} must be ffn, kv, ffn,kv, layer, sublayer, channel or 2:4, --keep "
                        f"{c.keep} between 0 and 1, --amplitude {c.amplitude} finite and not negative")
    if c.mend == "bias" and c.iterations > 1:
        raise UserError(f"--mend bias makes a model that cannot be cut again; --iterations {c.iterations} must be 1")
    for name in ("windows", "measured_windows", "eval_windows", "micro_batch", "multiple_of", "iterations"):
        if getattr(c, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)} must be at least 1")
    if not 0 <= c.seed < 2**63:
        raise UserError(f"--seed {c.seed} must be between 0 and {2**63 - 1}")
    again = c.allocate == "measured" or c.score == "perplexity"
    if again and (c.measured_windows % c.micro_batch or c.measured_windows > c.windows):
        raise UserError(f"--measured-windows {c.measured_windows} must be a multiple of --micro-batch {c.micro_batch} "
                        f"and at most --windows {c.windows}")
    for name, used in (("amplitude", c.allocate == "adaptive"), ("multiple_of", "ffn" in kinds or alone == "channel"),
                       ("keep", alone != "2:4"), ("iterations", alone != "2:4"),
                       ("measured_windows", again)):
        refuse_idle(c, [] if used else [name],
                    f"with --structure {c.structure} --score {c.score} --allocate {c.allocate}")


def needs(c):
    """What the recipe asks of score.collect. The layers' cosines are always among it, for the table."""
    of_score = set(score.SCORES[c.score].needs) if c.score in score.SCORES else set()
    if c.structure == "channel" and c.score == "activation":
        of_score = {"channel"}
    return of_score | {"cosine"} | {"least-squares": {"gram"}, "bias": {"mean"}, "none": set()}[c.mend]


@torch.no_grad()
def measure(model, stats, batches, c):
    """What the recipe wants to see by running the model again, on its measured_windows: score.without of layers or
    sub-blocks; score.damage at SHARES of each FFN and every number of KV groups."""
    batches = batches[:c.measured_windows // batches[0][0].size(0)]
    if c.score == "perplexity":
        return score.without(model, batches, ("layer",) if c.structure == "layer" else ("kv", "ffn"))
    kinds, scores = c.structure.split(","), score.SCORES[c.score].function(model, stats)
    at = {(layer, kind): sorted({round(share * n) for share in SHARES} if kind == "ffn" else {*range(n)})
          for (layer, kind), n in model.config.widths().items() if kind in kinds}
    return score.damage(model, batches, scores, at, lambda name, w, kept: mended(w, stats.gram[name], kept)
                        if c.mend == "least-squares" else w[:, kept])


@torch.no_grad()
def decide(model, stats, batches, c, most, whole=None, damage=None):
    """The units that the recipe leaves alive: {(layer, kind): indices}, for a budget of `most`; `batches` is what it may
    measure on, `damage` what `measure` found already, `whole` the widths before earlier cuts. UserError: what allocate refuses."""
    kinds, config = c.structure.split(","), model.config
    if c.allocate == "measured" or c.score == "perplexity":
        damage = damage or measure(model, stats, batches, c)
    if kinds[0] in ("layer", "sublayer"):
        scores = layer_scores(model, stats, damage, c)
        widths = allocate.widths_for(config, most, c.allocate, scores, kinds, resource=c.budget)
        return {key: torch.arange(n) for key, n in widths.items()}
    scores = score.SCORES[c.score].function(model, stats)
    if c.allocate == "measured":
        widths = allocate.measured(config, most, damage, kinds, multiple_of=c.multiple_of, resource=c.budget)
    else:
        importance = score.importance(stats, config.n_layer) if c.allocate == "adaptive" else None
        widths = allocate.widths_for(config, most, c.allocate, scores, kinds, multiple_of=c.multiple_of,
                                     resource=c.budget, importance=importance, amplitude=c.amplitude, whole=whole)
    return choose(scores, widths)


def layer_scores(model, stats, damage, c):
    """{(layer, "layer" | kind): what the whole of it is worth}: for layers as published; for sub-blocks, which differ
    in size, per parameter (our choice)."""
    kinds, config = ("layer",) if c.structure == "layer" else ("kv", "ffn"), model.config
    parts = {(layer, kind): [(layer, k) for k in ("ffn", "kv") if kind in ("layer", k)]
             for layer in range(config.n_layer) for kind in kinds}
    params = {key: sum(config.widths()[part] * config.unit_params(*part) for part in part_of)
              for key, part_of in parts.items()}
    if c.score == "influence":
        worth = {key: score.influence(stats, *key) for key in parts}
    elif c.score == "perplexity":
        worth = damage
    else:                                                                       # the sum over all their entries
        units = score.SCORES[c.score].function(model, stats)
        worth = {key: sum(units[part].sum().item() * config.unit_params(*part) for part in part_of)
                 for key, part_of in parts.items()}
    return {key: worth[key] / (1 if c.structure == "layer" else max(1, params[key])) for key in parts}


def collect(model, batches, c):
    """The recipe's statistics of one calibration pass."""
    readers = two_four.MATRICES if c.structure == "2:4" else score.READERS
    stats = score.collect(model, tqdm(batches, desc="calibrate", leave=False, disable=None), needs(c), readers)
    stats.seed = c.seed
    return stats


def one_shot(model, stats, batches, c, most, whole=None, damage=None):
    """-> the smaller GPT of the recipe c; with 2:4 the same one, with zeros."""
    if c.structure == "2:4":
        norms = {name: square.sqrt() for name, square in stats.square.items()} if c.score == "wanda" else None
        two_four.hold_(model, None, two_four.masks(model, norms))
        return model
    if c.structure != "channel":
        return cut(model, decide(model, stats, batches, c, most, whole, damage), c.mend, stats)
    C, block = model.config.d_model, c.multiple_of
    n = max((n for n in range(block, C + 1, block)                              # biases do not shrink with C
             if dataclasses.replace(model.config, d_model=n).removable_params() <= most), default=0)
    if not n:
        raise UserError(f"a budget of {most:,} parameters is less than {block} of the {C} channels; keep more")
    worth = score.residual_channels(model, stats, c.score)
    return slice_channels(model, worth.argsort(descending=True, stable=True)[:n].sort().values)


class Phases:
    """Seconds and peak memory (bytes, of the whole process; on a GPU of its memory) of named parts of a program,
    printed as they end and kept in `last`."""
    def __init__(self, device):
        self.device, self.last = device, {}

    @contextlib.contextmanager
    def __call__(self, name):
        on_gpu = self.device.startswith("cuda")
        own = Path("/proc/self/clear_refs")                  # Linux: 5 resets the process's own peak
        own = own if os.access(own, os.W_OK) and not on_gpu else None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif own:
            own.write_text("5")
        start = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
        elif own:
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        else:                                                # elsewhere: of the program so far
            peak = peak_memory()
        self.last[name] = seconds, peak
        print(f"  {name:10} {seconds:8.1f} s   peak {peak / 2**30:.2f} GiB", flush=True)


def table(before, after, stats):
    """Layer by layer: ShortGPT's influence 1 - cos(in, out) as measured last, and the widths."""
    lines = ["layer  influence  KV groups   neurons"]
    for layer, (k, k_left, f, f_left) in enumerate(zip(before.n_kv_head, after.n_kv_head, before.d_ff, after.d_ff)):
        lines.append(f"{layer:5}  {score.influence(stats, layer):9.4f}  {k:3} -> {k_left:<3}  {f:5} -> {f_left}")
    return "\n".join(lines)


def picture(path, before, after):
    """Widths by layer, kept in front of what was there, as a PNG file; a sentence where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: pip install matplotlib")
    axes = Figure(figsize=(8, 4), layout="constrained").subplots(2, 1, sharex=True)
    for axis, name, was, now in ((axes[0], "neurons", before.d_ff, after.d_ff),
                                 (axes[1], "KV groups", before.n_kv_head, after.n_kv_head)):
        axis.bar(range(len(was)), was, color="0.88")
        axis.bar(range(len(now)), now, color="tab:blue")
        axis.set_ylabel(name)
    axes[1].set_xlabel("layer")
    axes[0].figure.savefig(path, dpi=120)


def main(c):
    if c.init is None:
        raise UserError("say what to cut by --init: a checkpoint, a run folder, a Hugging Face folder or a hub id")
    check(c)
    what = c.structure.replace(":", "-") if c.structure == "2:4" else f"{c.keep:g}"
    out = Path(c.out or f"runs/pruned-{Path(c.init).name}-{what}")
    if out.exists():
        raise UserError(f"{out} is there already; give another --out or delete it")
    context = checkpoint.load(c.init, "meta")[0].config.block_size
    T, device = c.block_size if c.block_size is not None else min(512, context), pick_device(c.device)
    model, about = checkpoint.load(c.init, device, torch.float32, T)
    if about.get("masks"):
        raise UserError(f"{c.init} is 2:4 already, and what is cut from it would be no longer; cut first")
    tokenizer = checkpoint.tokenizer_of(about, c.init)
    corpus = data.load(c.data, tokenizer, block_size=T)
    batches = score.batches(corpus.train, T, c.windows, c.micro_batch, c.seed)
    start, phase = model.config, Phases(device)
    if c.mend == "least-squares" and device == "mps":
        raise UserError("--mend least-squares is solved in float64, which Apple's GPUs lack; give --device cpu")
    widest = max(*start.d_ff, *(h * start.head_dim for h in start.n_head))
    if c.mend == "least-squares" and c.windows * T < widest:
        raise UserError(f"--mend least-squares fits matrices of {widest:,} inputs to {c.windows} windows x {T} = "
                        f"{c.windows * T:,} tokens; give --windows {-(-widest // T // c.micro_batch) * c.micro_batch} "
                        "or, better, several times as many")
    total = allocate.total(start, c.budget)

    def report(model, what):
        with phase("evaluate"):
            found = evaluate(model, corpus.val, tokenizer.byte_lengths(), c.eval_windows, batch=c.micro_batch)
        print(f"{what:6} {model.config.num_params()['total']:13,} parameters   {found['loss']:.4f} nats per token   "
              f"perplexity {found['perplexity']:.2f}   (hold-out of {c.data}, {found['tokens']:,} tokens)")

    if c.structure not in ("channel", "2:4"):               # what no calibration can mend
        allocate.split_budget(start, math.floor(c.keep * total + 1e-6), c.structure.split(","), c.budget)
    report(model, "before")
    for i in range(1, c.iterations + 1):
        with phase("calibrate"):
            stats = collect(model, batches, c)
        with phase("cut"):
            most = math.floor(total * (1 - (1 - c.keep) * i / c.iterations) + 1e-6)
            model = one_shot(model, stats, batches, c, most, start.widths())
    print(table(start, model.config, stats))
    report(model, "after")
    left = allocate.total(model.config, c.budget)
    print(f"2 of each 4 weights are zero in {two_four.share(model):.0%} of the blocks' matrices" if c.structure == "2:4"
          else f"{left:,} of {total:,} {c.budget} kept: {left / total:.4f}, asked {c.keep:g}")
    if hasattr(model, "evaluation_only"):
        return print(f"not saved, as {model.evaluation_only}, which no GPTConfig and no runtime has")
    model.config = dataclasses.replace(model.config, block_size=context)    # windows were shorter, the model is not
    masks = two_four.pack(two_four.masks(model)) if c.structure == "2:4" else None
    checkpoint.save(out / "ckpt_00000000.pt", model, step=0, tokenizer_files=tokenizer.files, masks=masks, run={
        "tokenizer": tokenizer.name, "data": c.data, "fingerprint": corpus.fingerprint, "cut_from": c.init,
        "recipe": dataclasses.asdict(c)})
    picture(out / "widths.png", start, model.config)
    print(f"saved in {out}")


if __name__ == "__main__":
    run(lambda: main(parse(Prune)))

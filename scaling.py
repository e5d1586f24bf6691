"""How many tokens a pruned model needs to recover: a grid of runs, the laws fitted to it, a plan made from them.

    python scaling.py run                                     # the grid, about 4 hours on 2 cores; goes on where killed
    python scaling.py run --minutes 20                        # a piece of it
    python scaling.py fit results/scaling                     # constants, held-out errors and figures, in seconds
    python scaling.py plan --n0 4e5 --rho 0.25 --target-loss 1.4         # tokens that this cut needs for this loss

P² law (arXiv 2411.10272). Models of several sizes N₀ (parameters of attention and FFNs) are trained far beyond 20
tokens per parameter, cut by width (FFN neurons, equal shares), by depth (whole layers, ShortGPT's influence) and to 2:4
(Wanda), and trained on at a constant rate, the one that the training before ended with. So every evaluation on the way
is an end that so many tokens could have, and one run is one curve. Where nothing was cut (the control) the loss falls
as well: continued training. Beside them whole trainings of 1/2, 1/4 and 1/8 of the tokens, plans idea and journey, for
the laws of whole trainings. Not here: the laws and their fit (laws.py), the runs (train.py), the cuts (prune.py).
"""
import contextlib
import io
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import curves
import laws
import prune
import sweep
from common import UserError, parse, read_records, run
from model import PRESETS
from report import markdown
from train import INIT_LR


@dataclass(frozen=True)
class Grid:
    preset: str = "cpu"               # sizes and tokens: cpu, gpu (about a day), toy (minutes, to see it work)
    init: tuple[str, ...] = ()        # instead of training them: models that are there (folders, hub ids)
    data: str = "stdlib"              # data.py's sources
    tokens: int | None = None         # of the training before the cut; default: the preset's
    recover_tokens: int | None = None    # of the training after it; default: the preset's
    batch_tokens: int | None = None   # per step; default: the preset's
    micro_batch: int | None = None    # sequences per forward pass; default: the preset's
    block_size: int | None = None     # tokens of context; default: the preset's, or the trained one of --init
    eval_windows: int | None = None   # of the hold-out; default: the preset's
    lr: float | None = None           # of the recovery; default: a tenth of the size's peak, 2e-5 for --init
    seeds: int = 2                    # of whole trainings, controls and width cuts; depth and 2:4 have one
    minutes: float | None = None      # stop then, and save; the same command goes on
    jobs: int = os.cpu_count() or 1   # runs side by side
    device: str = "cpu"               # cpu, cuda, mps
    out: str = "results/scaling"      # a file of records for each finished run
    runs: str = "runs/scaling"        # where the run folders go


GRIDS = {  # sizes (model.PRESETS), tokens before and after the cut, tokens per step, sequences at once, eval windows
    "toy": (("8x16", "8x32"), 2**18, 2**15, 2**9, 4, 4),
    "cpu": (("8x16", "8x32", "8x48", "8x64"), 2**24, 2**22, 2**12, 32, 256),
    "gpu": (("12x256", "12x384", "12x640", "12x1024"), 2**32, 2**29, 2**17, 64, 512),
}
CUTS = {  # settings of prune.py; depth: 1, 2 and 3 layers of 8
    "control": None,
    **{f"width-{rho:g}": dict(structure="ffn", allocate="uniform", keep=1 - rho) for rho in (.15, .25, .35)},
    **{f"depth-{rho:g}": dict(structure="layer", score="influence", keep=1 - rho) for rho in (.125, .25, .375)},
    "2-4": dict(structure="2:4", score="wanda"),
}
RECOVERY_SEED = 100                   # and above: not the order of the data that the model was trained in


# -- run: the grid

def jobs(c):
    """-> whole trainings of the models to cut, and what comes after them: lists of (the run's name, settings of
    train.py, settings of the cut before it or None)."""
    if c.preset not in GRIDS:
        raise UserError(f"--preset {c.preset!r} is not one of {', '.join(GRIDS)}")
    chosen = c.tokens, c.recover_tokens, c.batch_tokens, c.micro_batch, c.eval_windows
    sizes, *usual = GRIDS[c.preset]
    tokens, after, batch_tokens, micro_batch, windows = (b if a is None else a for a, b in zip(chosen, usual))
    both = dict(data=c.data, batch_tokens=batch_tokens, micro_batch=micro_batch, block_size=c.block_size,
                eval_windows=windows)

    def whole(name, share=1, **settings):
        steps = round(tokens * share / batch_tokens)
        return name, dict(both, steps=steps, eval_every=steps, **settings), None

    wholes, recoveries, steps = [], [], round(after / batch_tokens)
    if steps < 8 or not c.init and tokens / batch_tokens < 400:                   # a fourth of it has idea's 20 cuts
        raise UserError(f"{tokens:,} tokens before the cut and {after:,} after it are {tokens // batch_tokens} and "
                        f"{steps} steps of {batch_tokens:,}; give at least 400 and 8, or a smaller --batch-tokens")
    for size in c.init or reversed(sizes):                          # the largest first, so that the last ones are short
        for seed in range(c.seeds):
            name, start = f"{Path(size).name}-{seed}", size if c.init else f"{c.runs}/{Path(size).name}-{seed}"
            lr = c.lr or (INIT_LR if c.init else PRESETS[size][-1] / 10)
            if not c.init:
                wholes.append(whole(name, plan="scratch", preset=size, seed=seed))
            settings = dict(both, plan="scratch", init=start, seed=RECOVERY_SEED + seed, steps=steps, lr=lr, min_lr=lr,
                            warmup_share=.01, eval_every=max(1, steps // 128), eval_growth=1.2)
            recoveries += [
                (f"{kind}-{name}", settings, cut and dict(cut, init=start, data=c.data, block_size=c.block_size,
                                                          seed=seed, device=c.device))
                for kind, cut in CUTS.items() if seed == 0 or kind == "control" or kind.startswith("width")]
        if not c.init:
            recoveries += [whole(f"{size}-0-of-{k}", 1 / k, plan="scratch", preset=size) for k in (2, 4, 8)]
            recoveries += [whole(f"{plan}-{size}-0-of-4", 1 / 4, plan=plan, preset=size)
                           for plan in ("idea", "journey")]
    return wholes, recoveries


def finished(file, settings):
    """Whether the records of this run are there. UserError: they are of another run."""
    found = next(iter(read_records(file)), {})
    differ = [f"{k} is {found.get(k)!r} there and {v!r} here" for k, v in settings.items()
              if v is not None and found.get(k) != v]
    if found and differ:
        raise UserError(f"{file} holds another run ({'; '.join(differ)}); give another --out, and another --runs")
    return bool(found)


def job(c, name, settings, cut):
    """Cut if need be, train, keep the records."""
    if cut and not checkpoint.checkpoints(settings["init"]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prune.main(prune.Prune(out=settings["init"], **cut))
    sweep.one(f"{c.runs}/{name}", settings, c.device)
    sweep.keep_records(f"{c.runs}/{name}", f"{c.out}/{name}.jsonl")


def after_cut(c, name, settings, cut):
    """The settings of a run that starts with what the cut leaves, if there is one."""
    return dict(settings, init=f"{c.runs}/cut-{name}") if cut else settings


def run_grid(c):
    if c.seeds < 1 or c.jobs < 1 or c.minutes is not None and c.minutes <= 0:
        raise UserError(f"--seeds {c.seeds} and --jobs {c.jobs} must be at least 1, --minutes {c.minutes} above 0")
    until = None if c.minutes is None else time.time() + 60 * c.minutes
    for wave in jobs(c):
        todo = []
        for name, settings, cut in wave:
            settings = after_cut(c, name, settings, cut)
            if not finished(f"{c.out}/{name}.jsonl", settings):
                todo.append((c, name, settings, cut))
        done = sweep.side_by_side(job, todo, c.jobs, until)
        if done < len(todo):
            return print(f"{len(todo) - done} runs of this wave are left; the same command goes on")
    print(f"all runs are finished; python scaling.py fit {c.out}")


# -- fit: the laws and the records

@dataclass(frozen=True)
class Fit:
    folder: str                       # of records, as `run` keeps them
    first: float = 0.05               # points before this share of a recovery are left out
    loss: str = "linear"              # of the fits: linear (least squares), or huber beyond 0.01 nats
    starts: int = 32                  # of every fit
    samples: int = 200                # bootstrap samples, for intervals of 90 %


def allows(name, points):
    """Whether the law can be fitted to these points: enough of them, rates, sizes."""
    try:
        laws.check(laws.LAWS[name], points)
    except UserError:
        return False
    return True


def constants(kind, fit, points, samples):
    """One row: the constants with intervals, and how well the law fits what it was fitted to."""
    low, high = laws.interval(fit.law.values(samples)[:, 0])
    told = {name: f"{value:.3g} [{a:.3g}, {b:.3g}]" for (name, value), a, b in zip(fit.constants.items(), low, high)}
    judged = laws.judge(fit, points)
    return [kind, len(points.loss), *(told.get(name, "") for name in P2),
            *(f"{judged[key]:.4f}" for key in ("r2", "nats", "asd"))]


P2 = ("gamma", "delta", "alpha", "beta", "N_C", "D_C", "E")
RIVALS = ("p2, outside", "p2, rate only", "chinchilla", "power")


def form_of_p2(points):
    """The name of the P² law without the constants that these points leave without meaning; None: too few points."""
    return next((name for name in ("p2", "p2, one rate", "p2, one size") if allows(name, points)), None)


def errors(kind, points, c):
    """A row for each law that these points allow: its mean error, in nats and per cent, where it was fitted and on each
    part held out."""
    show = lambda judged: f"{judged['nats']:.4f} ({judged['percent']:.2f} %)" if judged else "-"
    p2 = form_of_p2(points)
    for law in (p2, f"{p2}, control", *RIVALS) if p2 else RIVALS:
        if not allows(law, points):                                # too few rates or sizes
            continue
        how = dict(loss=c.loss, starts=c.starts)
        fitted = laws.judge(laws.fit(law, points, **how), points)
        yield [kind, law, show(fitted), *map(show, laws.held_out(law, points, **how).values())]


def fit_report(c, runs):
    """Every table and verdict, as Markdown."""
    kinds, whole, parts = curves.recoveries(runs, c.first), curves.wholes(runs), []
    scratch = whole.get("scratch", [])
    longest = {(r["n"], r["seed"]): r for r in sorted(scratch, key=lambda r: r["tokens"])}
    if longest:
        parts.append(markdown(["N₀", "seed", "tokens", "per parameter", "epochs", "L₀"], [
            [f"{n:,}", seed, f"{r['tokens']:,}", f"{r['tokens'] / n:.0f}", f"{r['epochs']:.2f}", f"{r['loss']:.4f}"]
            for (n, seed), r in sorted(longest.items())]))
    rows, said, tested = [], [], []
    for kind, records in sorted(kinds.items()):
        points = laws.Points.of(records)
        law = form_of_p2(points)
        tested += errors(kind, points, c)
        if not math.isnan(noise := curves.noise(records)):
            said.append(f"- {kind}: two seeds differ by {noise:.4f} nats in what the same cut costs")
        if law:
            fit = laws.fit(law, points, c.loss, c.starts)
            samples = laws.bootstrap(fit, points, n=c.samples)
            rows.append(constants(kind, fit, points, samples))
            said += [f"- {kind}: {text}" for text in laws.unpinned(fit, points, samples)]
    if not kinds:
        return "\n\n".join([*parts, *average_law(whole)])
    parts += [f"P² law, {c.loss} loss, in brackets 90 % of the bootstrap over runs:",
              markdown(["cut", "points", *P2, "R²", "mean error (nats)", "ASD"], rows), "\n".join(said),
              "Mean error in nats, where the law was fitted and where it was not:",
              markdown(["cut", "law", "fitted", *laws.HELD_OUT], tested)]
    for kind, records in sorted(kinds.items()):
        parts.append("\n".join([f"{kind}, tokens measured (in brackets per parameter left):", *curves.trends(records)]))
    return "\n\n".join([*parts, *average_law(whole)])


def average_law(whole):
    """The law of The Journey Matters on the trainings that prune, fitted to those that do not: with the average N and
    with the final one. -> [Markdown], empty without such runs."""
    pruned = [dict(r, plan=plan) for plan in whole if plan != "scratch" for r in whole[plan]]
    if not pruned or not allows("chinchilla", laws.Points.of(whole.get("scratch", []))):
        return []
    fit = laws.fit("chinchilla", laws.Points.of(whole["scratch"]))
    rows = []
    for r in pruned:
        final, average = (fit.law.predict(fit.theta, laws.Points.of([dict(r, n=n)]))[0] for n in (r["n"], r["average"]))
        rows.append([r["plan"], f"{r['n']:,}", f"{r['average']:,.0f}", f"{r['tokens']:,}", f"{r['loss']:.4f}",
                     f"{final - r['loss']:+.4f}", f"{average - r['loss']:+.4f}"])
    told = ", ".join(f"{name} {value:.3g}" for name, value in fit.constants.items())
    return [f"Whole trainings from scratch, A/N^alpha + B/D^beta + E: {told}; mean error "
            f"{laws.judge(fit, laws.Points.of(whole['scratch']))['nats']:.4f} nats. What it says of those that prune:",
            markdown(["plan", "N at the end", "N on average", "tokens", "loss", "law with N at the end, error",
                      "law with the average N, error"], rows)]


def main_fit(c):
    if not 0 <= c.first < 1 or min(c.starts, c.samples) < 1:
        raise UserError(f"--first {c.first} must be at least 0 and below 1, --starts {c.starts} and --samples "
                        f"{c.samples} at least 1")
    runs = curves.read(c.folder)
    print(fit_report(c, runs))
    print(f"\n{picture(c, runs) if curves.recoveries(runs, c.first) else 'no recoveries yet, so no pictures'}")


def picture(c, runs):
    """The curves with the law fitted to their first 80 %, and its predictions of what was held out -> a sentence."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no pictures: pip install matplotlib draws them"
    kinds = sorted(curves.recoveries(runs, c.first).items())
    models = sorted({(r["n0"], r["model"]) for _, records in kinds for r in records})
    figure = Figure(figsize=(3 * len(models) + 1, 3 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(models), squeeze=False, sharex=True)
    against = Figure(figsize=(5 * len(laws.HELD_OUT), 5), layout="constrained")
    panels = against.subplots(1, len(laws.HELD_OUT), squeeze=False)[0]
    for row, (kind, records) in zip(axes, kinds):
        points = laws.Points.of(records)
        law = form_of_p2(points) or "power"
        late = laws.HELD_OUT["last 20 %"](points)
        fit = laws.fit(law, points.where(~late), c.loss, c.starts)
        fitted = fit.law.predict(fit.theta, points)
        for axis, (n0, model) in zip(row, models):
            for shade, n in enumerate(sorted({r["n"] for r in records if r["model"] == model}, reverse=True)):
                i = np.array([r["model"] == model and r["n"] == n for r in records])
                color = f"C{shade}"
                axis.plot(points.tokens[i], fitted[i], color=color, lw=1,
                          label=f"ρ {points.rho[i][0]:.3f}")
                axis.plot(points.tokens[i & ~late], points.loss[i & ~late], "o", ms=3, color=color)
                axis.plot(points.tokens[i & late], points.loss[i & late], "o", ms=4, mfc="white", color=color)
            axis.set_xscale("log")
            axis.set_title(f"{kind}, N₀ {n0:,}, seed {model[1] - RECOVERY_SEED}", fontsize=8)
            axis.legend(fontsize=7)
        row[0].set_ylabel("loss (nats per token)")
        for panel, (part, mask) in zip(panels, laws.HELD_OUT.items()):
            test = mask(points)
            if allows(law, points.where(~test)) and law != "power":
                seen = laws.fit(law, points.where(~test), c.loss, c.starts)
                panel.plot(points.loss[test], seen.law.predict(seen.theta, points.where(test)), "o", ms=3, label=kind)
            panel.set_title(f"{part}, held out")
            panel.set_xlabel("measured (nats per token)")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of recovery (hollow: held out)")
    for panel in panels:
        low, high = min(*panel.get_xlim(), *panel.get_ylim()), max(*panel.get_xlim(), *panel.get_ylim())
        panel.plot([low, high], [low, high], color="0.7", lw=1, zorder=0)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("predicted")
    for name, drawn in (("curves", figure), ("predicted", against)):
        drawn.savefig(Path(c.folder) / f"{name}.png", dpi=100)
    return f"pictures in {c.folder}/curves.png and predicted.png"


# -- plan: what the fitted law says

@dataclass(frozen=True)
class Plan:
    n0: float | None = None           # parameters of attention and FFNs before the cut
    rho: float | None = None          # share of them that goes
    kind: str = "width"               # width, depth, 2:4 (which takes no --rho)
    target_loss: float | None = None     # nats per token; or:
    budget_tokens: float | None = None   # of recovery
    before: float | None = None       # the loss before the cut; default: what the law of whole trainings says of n0
    records: str = "results/scaling"  # of a grid: the law is fitted anew
    first: float = 0.05               # points before this share of a recovery are left out
    samples: int = 200                # bootstrap samples, for intervals of 90 %
    extrapolate: bool = False         # answer outside of what the grid measured


def between(what, value, measured, extrapolate):
    """UserError: outside of the measured range, and extrapolation was not asked for."""
    low, high = min(measured), max(measured)
    if not extrapolate and not low / 1.0001 <= value <= high * 1.0001:
        raise UserError(f"{what} {value:,.4g} is outside of what was measured, {low:,.4g} to {high:,.4g}; give "
                        "--extrapolate to have the law's answer all the same")


def main_plan(c):
    semi = c.kind == "2:4"
    if not c.n0 or semi == (c.rho is not None) or (c.target_loss is None) == (c.budget_tokens is None):
        raise UserError("plan needs --n0, --rho (but not with --kind 2:4) and one of --target-loss, --budget-tokens")
    runs = curves.read(c.records)
    found, ends = curves.recoveries(runs, c.first), laws.Points.of(curves.wholes(runs).get("scratch", []))
    if c.kind not in found:
        raise UserError(f"--kind {c.kind!r} was not measured in {c.records}; there are {', '.join(sorted(found))}")
    points, rho = laws.Points.of(found[c.kind]), .5 if semi else c.rho
    between("--n0", c.n0, points.n0, c.extrapolate)
    between("--rho", rho, points.rho, c.extrapolate)
    fit, scratch = laws.fit("p2, one rate" if semi else "p2", points), laws.fit("chinchilla", ends)
    samples, n, trained = laws.bootstrap(fit, points, n=c.samples), c.n0 * (1 - rho), ends.tokens.max()
    before = c.before or float(scratch.law.predict(scratch.theta, laws.Points.of([dict(n=c.n0, tokens=trained)]))[0])
    told = f"trained on {trained:,.0f} tokens, by the law of whole trainings" if c.before is None else "as given"
    print(f"N₀ {c.n0:,.0f}, L₀ {before:.4f} ({told}); {c.kind} cut of {rho:.1%}, {n:,.0f} parameters left")
    if c.budget_tokens is not None:
        between("--budget-tokens", c.budget_tokens, points.tokens, c.extrapolate)
        here = laws.Points.of([dict(n0=c.n0, n=n, rho=rho, before=before, tokens=c.budget_tokens)])
        low, high = laws.interval(fit.law.predict(samples, here)[:, 0])
        target, tokens = float(fit.law.predict(fit.theta, here)[0]), c.budget_tokens
        print(f"after {tokens:,.0f} tokens: {target:.4f} nats per token (90 %: {low:.4f} to {high:.4f})")
    else:
        about, target = dict(n0=c.n0, rho=rho, before=before), c.target_loss
        tokens = float(laws.tokens_needed(fit, target, **about))
        if tokens < math.inf:
            between(f"for {target} nats per token the tokens needed,", tokens, points.tokens, c.extrapolate)
        print(f"for {target} nats per token: {needed(fit, samples, target, **about)}")
    of = c.n0 if semi else n                                     # zeros of 2:4 are multiplied as well
    alone = float(laws.tokens_needed(scratch, target, n=n))
    print(f"{tokens / n:.1f} tokens per parameter left, {6 * of * tokens:.3g} FLOPs (6 N D)\n"
          f"{n:,.0f} parameters from scratch to {target:.4f}: "
          f"{needed(scratch, laws.bootstrap(scratch, ends, n=c.samples), target, n=n)}, {6 * n * alone:.3g} FLOPs\n"
          f"the recovery's FLOPs are {of * tokens / (n * alone):.1%} of those; with the {trained:,.0f} tokens before "
          f"the cut {(c.n0 * trained + of * tokens) / (n * alone):.2f} times those")


def needed(fit, samples, target, **about):
    """Tokens for a loss, with an interval, in words."""
    low, high = laws.interval(laws.tokens_needed(fit, target, **about, theta=samples))
    return f"{laws.tokens_needed(fit, target, **about):,.0f} tokens (90 %: {low:,.0f} to {high:,.0f})"


COMMANDS = {"run": (Grid, run_grid), "fit": (Fit, main_fit), "plan": (Plan, main_plan)}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"say what to do: python scaling.py {' | '.join(COMMANDS)} (--help behind it lists the flags)")
    settings, command = COMMANDS[argv[0]]
    command(parse(settings, argv[1:]))


if __name__ == "__main__":
    run(main, sys.argv[1:])

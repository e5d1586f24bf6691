"""How many tokens a pruned model needs to recover: the P² law (arXiv 2411.10272) and its rivals, fitted, tested, used.

    python -m experiments.scaling run                                     # the grid, 4 hours on 2 cores; goes on where killed
    python -m experiments.scaling run --minutes 20                        # a piece of it
    python -m experiments.scaling fit results/scaling.jsonl               # constants, held-out errors and figures; 90 s
    python -m experiments.scaling plan --n0 4e5 --rho 0.25 --before 1.14 --target-loss 1.19      # tokens for this loss

Not here: the runs (experiments/scaling_runs.py), what they say without a law (experiments/scaling_curves.py), the laws and their fit (experiments/scaling_laws.py).
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UserError, parse, run, write_atomic
from experiments import scaling_curves, scaling_laws, scaling_runs
from report import markdown

# -- fit: the laws and the records

@dataclass(frozen=True)
class Fit:
    records: str                      # file of records, as `run` keeps them
    first: float = 0.05               # points before this share of a recovery are left out
    loss: str = "linear"              # of the fits: linear (least squares), or huber beyond 0.01 nats
    starts: int = 32                  # of every fit
    samples: int = 200                # bootstrap samples, for intervals of 90 %


def allows(name, points):
    """Whether the law can be fitted to these points: enough of them, rates, sizes."""
    try:
        scaling_laws.check(scaling_laws.LAWS[name], points)
    except UserError:
        return False
    return True


def constants(kind, fit, points, samples):
    """One row: the constants with intervals, and how well the law fits what it was fitted to."""
    low, high = scaling_laws.interval(fit.law.values(samples)[:, 0])
    told = {name: f"{value:.3g} [{a:.3g}, {b:.3g}]" for (name, value), a, b in zip(fit.constants.items(), low, high)}
    judged, cost = scaling_laws.judge(fit, points), points.loss - points.before
    r2 = 1 - fit.sse / ((cost - cost.mean()) ** 2).sum()
    return [kind, len(points.loss), *(told.get(name, "") for name in P2), f"{r2:.4f}",
            *(f"{judged[key]:.2g}" for key in ("nats", "huber", "asd"))]


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
        fitted = scaling_laws.judge(scaling_laws.fit(law, points, **how), points)
        yield [kind, law, show(fitted), *map(show, scaling_laws.held_out(law, points, **how).values())]


def fit_report(c, runs):
    """Every table and verdict, as Markdown."""
    kinds, whole, parts = scaling_curves.recoveries(runs, c.first), scaling_curves.wholes(runs), []
    scratch = whole.get("scratch", [])
    longest = {(r["n"], r["seed"]): r for r in sorted(scratch, key=lambda r: r["tokens"])}
    if longest:
        parts.append(markdown(["N₀", "seed", "tokens", "per parameter", "epochs", "L₀"], [
            [f"{n:,}", seed, f"{r['tokens']:,}", f"{r['tokens'] / n:.0f}", f"{r['epochs']:.2f}", f"{r['loss']:.4f}"]
            for (n, seed), r in sorted(longest.items())]))
    rows, said, tested = [], [], []
    for kind, records in sorted(kinds.items()):
        points = scaling_laws.Points.of(records)
        law = form_of_p2(points)
        tested += errors(kind, points, c)
        if not math.isnan(noise := scaling_curves.noise(records)):
            said.append(f"- {kind}: two seeds differ by {noise:.4f} nats in what the same cut costs")
        if law:
            fit = scaling_laws.fit(law, points, c.loss, c.starts)
            samples = scaling_laws.bootstrap(fit, points, n=c.samples)
            rows.append(constants(kind, fit, points, samples))
            said += [] if fit.converged else [f"- {kind}: the fit did not converge, its constants are some of many"]
            said += dict.fromkeys(f"- {kind}: {text}" for text in scaling_laws.unpinned(fit, points, samples))
    if not kinds:
        return "\n\n".join([*parts, *average_law(whole, c)])
    parts += [f"P² law, {c.loss} loss, in brackets 90 % of the bootstrap over curves (those of one "
              "model share its L₀, so that these are rather too narrow):",
              markdown(["cut", "points", *P2, "R² of loss - L₀", "mean error (nats)", "Huber", "ASD"], rows),
              "\n".join(said),
              "Mean error in nats, where the law was fitted and where it was not (the laws against the control are "
              "given its measured loss at every point, held out or not):",
              markdown(["cut", "law", "fitted", *scaling_laws.HELD_OUT], tested)]
    for kind, records in sorted(kinds.items()):
        parts.append("\n".join([f"{kind}, tokens measured (in brackets per parameter left):", *scaling_curves.trends(records)]))
    return "\n\n".join([*parts, *average_law(whole, c)])


def average_law(whole, c):
    """The law of The Journey Matters on the trainings that prune, fitted to those that do not: with the average N and
    with the final one. -> [Markdown], empty without such runs."""
    pruned = [dict(r, plan=plan) for plan in whole if plan != "scratch" for r in whole[plan]]
    if not pruned or not allows("chinchilla", scaling_laws.Points.of(whole.get("scratch", []))):
        return []
    fit = scaling_laws.fit("chinchilla", scaling_laws.Points.of(whole["scratch"]), c.loss, c.starts)
    rows = []
    for r in pruned:
        final, average = (fit.law.predict(fit.theta, scaling_laws.Points.of([dict(r, n=n)]))[0] for n in (r["n"], r["average"]))
        rows.append([r["plan"], f"{r['n']:,}", f"{r['average']:,.0f}", f"{r['tokens']:,}", f"{r['loss']:.4f}",
                     f"{final - r['loss']:+.4f}", f"{average - r['loss']:+.4f}"])
    told = ", ".join(f"{name} {value:.3g}" for name, value in fit.constants.items())
    return [f"Whole trainings from scratch, A/N^alpha + B/D^beta + E: {told}; mean error "
            f"{scaling_laws.judge(fit, scaling_laws.Points.of(whole['scratch']))['nats']:.4f} nats. What it says of those that prune:",
            markdown(["plan", "N at the end", "N on average", "tokens", "loss", "law with N at the end, error",
                      "law with the average N, error"], rows)]


def page_of(c, name):
    """The path of a page beside the records: of results/scaling.jsonl it is in results/scaling."""
    return Path(c.records).with_suffix("") / name


def main_fit(c):
    if not 0 <= c.first < 1 or min(c.starts, c.samples) < 1:
        raise UserError(f"--first {c.first} must be at least 0 and below 1, --starts {c.starts} and --samples "
                        f"{c.samples} at least 1")
    runs = scaling_curves.read(c.records)
    text = fit_report(c, runs)
    write_atomic(page_of(c, "report.md"), lambda file: file.write(f"{text}\n".encode()))
    print(text)
    print(f"\n{picture(c, runs) if scaling_curves.recoveries(runs, c.first) else 'no recoveries yet, so no pictures'}")


def picture(c, runs):
    """The curves with the law fitted to their first 80 %, and its predictions of what was held out -> a sentence."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no pictures: pip install matplotlib draws them"
    kinds = sorted(scaling_curves.recoveries(runs, c.first).items())
    models = sorted({(r["n0"], r["model"]) for _, records in kinds for r in records})
    figure = Figure(figsize=(3 * len(models) + 1, 3 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(models), squeeze=False, sharex=True)
    against = Figure(figsize=(5 * len(scaling_laws.HELD_OUT), 5), layout="constrained")
    panels = against.subplots(1, len(scaling_laws.HELD_OUT), squeeze=False)[0]
    for row, (kind, records) in zip(axes, kinds):
        points = scaling_laws.Points.of(records)
        law = form_of_p2(points) or "power"
        late = scaling_laws.HELD_OUT["last 20 %"](points)
        fit = scaling_laws.fit(law, points.where(~late), c.loss, c.starts)
        fitted, tested = fit.law.predict(fit.theta, points), scaling_laws.held_out(law, points, loss=c.loss, starts=c.starts)
        for axis, (n0, model) in zip(row, models):
            for shade, n in enumerate(sorted({r["n"] for r in records if r["model"] == model}, reverse=True)):
                i = np.array([r["model"] == model and r["n"] == n for r in records])
                color = f"C{shade}"
                axis.plot(points.tokens[i], fitted[i], color=color, lw=1,
                          label=f"ρ {points.rho[i][0]:.3f}")
                axis.plot(points.tokens[i & ~late], points.loss[i & ~late], "o", ms=3, color=color)
                axis.plot(points.tokens[i & late], points.loss[i & late], "o", ms=4, mfc="white", color=color)
            axis.set_visible(any(r["model"] == model for r in records))
            axis.set_xscale("log")
            axis.tick_params(which="minor", labelbottom=False)
            axis.set_title(f"{kind}, N₀ {n0:,}, seed {model[1] - scaling_runs.RECOVERY_SEED}", fontsize=8)
            axis.get_lines() and axis.legend(fontsize=7)
        row[0].set_ylabel("loss (nats per token)")
        for panel, (part, mask) in zip(panels, scaling_laws.HELD_OUT.items()):
            test = mask(points)
            if tested[part]:
                seen = scaling_laws.fit(law, points.where(~test), c.loss, c.starts)
                panel.plot(points.loss[test], seen.law.predict(seen.theta, points.where(test)), "o", ms=3, label=kind)
            panel.set_title(f"{part}, held out")
            panel.set_xlabel("measured (nats per token)")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of recovery (hollow: held out)")
    for panel in panels:
        low, high = min(*panel.get_xlim(), *panel.get_ylim()), max(*panel.get_xlim(), *panel.get_ylim())
        panel.plot([low, high], [low, high], color="0.7", lw=1, zorder=0)
        panel.get_legend_handles_labels()[0] and panel.legend(fontsize=7)
    panels[0].set_ylabel("predicted")
    for name, drawn in (("curves", figure), ("predicted", against)):
        drawn.savefig(page_of(c, f"{name}.png"), dpi=100)
    return f"pictures in {page_of(c, 'curves.png')} and predicted.png"


# -- plan: what the fitted law says

@dataclass(frozen=True)
class Plan:
    n0: float | None = None           # parameters of attention and FFNs before the cut
    rho: float | None = None          # share of them that goes
    kind: str = "width"               # width, depth, 2:4 (which takes no --rho)
    target_loss: float | None = None     # nats per token; or:
    budget_tokens: float | None = None   # of recovery
    before: float | None = None       # the loss before the cut; default: what the law of whole trainings says of n0
    records: str = "results/scaling.jsonl"  # of a grid: the law is fitted anew
    first: float = 0.05               # points before this share of a recovery are left out
    samples: int = 200                # bootstrap samples, for intervals of 90 %
    extrapolate: bool = False         # answer outside of what the grid measured


def between(what, value, measured, extrapolate, slack=1.0001):
    """UserError: outside of the measured range, and extrapolation was not asked for."""
    low, high = min(measured), max(measured)
    if not extrapolate and not low / slack <= value <= high * slack:
        raise UserError(f"{what} {value:,.4g} is outside of what was measured, {low:,.4g} to {high:,.4g}; give "
                        "--extrapolate to have the law's answer all the same")


def main_plan(c):
    semi = c.kind == "2:4"
    if not c.n0 or semi == (c.rho is not None) or (c.target_loss is None) == (c.budget_tokens is None):
        raise UserError("plan needs --n0, --rho (but not with --kind 2:4) and one of --target-loss, --budget-tokens")
    if not 0 <= c.first < 1 or c.samples < 1:
        raise UserError(f"--first {c.first} must be at least 0 and below 1, --samples {c.samples} at least 1")
    for name in ("n0", "rho", "before", "target_loss", "budget_tokens"):
        value, most = getattr(c, name), 1 if name == "rho" else math.inf
        if value is not None and not 0 < value < most:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0 and below {most}")
    runs = scaling_curves.read(c.records)
    found, ends = scaling_curves.recoveries(runs, c.first), scaling_laws.Points.of(scaling_curves.wholes(runs).get("scratch", []))
    if c.kind not in found:
        raise UserError(f"--kind {c.kind!r} was not measured in {c.records}; there are {', '.join(sorted(found))}")
    points, rho, alone = scaling_laws.Points.of(found[c.kind]), .5 if semi else c.rho, None
    between("--n0", c.n0, points.n0, c.extrapolate)
    between("--rho", rho, points.rho, c.extrapolate, scaling_laws.NEAR)
    fit, n = scaling_laws.fit(form_of_p2(points) or "p2", points), c.n0 * (1 - rho)
    samples = scaling_laws.bootstrap(fit, points, n=c.samples)
    if allows("chinchilla", ends):
        scratch = scaling_laws.fit("chinchilla", ends)
        alone = scratch, scaling_laws.bootstrap(scratch, ends, n=c.samples), ends
    before, befores, told = c.before, np.full(c.samples, c.before), "as given"
    if c.before is None:
        if not alone:
            raise UserError(f"{c.records} has too few whole trainings to say the loss before the cut; give --before")
        here, told = scaling_laws.Points.of([dict(n=c.n0, tokens=ends.tokens.max())]), \
            f"trained on {ends.tokens.max():,.0f} tokens, by the law of whole trainings"
        before, befores = scratch.law.predict(scratch.theta, here)[0], scratch.law.predict(alone[1], here)[:, 0]
    between("the loss before the cut,", before, points.before, c.extrapolate)
    print(f"N₀ {c.n0:,.0f}, L₀ {before:.4f} ({told}); {c.kind} cut of {rho:.1%}, {n:,.0f} parameters left")
    target, tokens = c.target_loss, c.budget_tokens
    if tokens is not None:
        between("--budget-tokens", tokens, points.tokens, c.extrapolate)
        here = scaling_laws.Points.of([dict(n0=c.n0, n=n, rho=rho, before=0, tokens=tokens)])
        target = float(before + fit.law.predict(fit.theta, here)[0])
        low, high = scaling_laws.interval(befores + fit.law.predict(samples, here)[:, 0])
        print(f"after {tokens:,.0f} tokens: {target:.4f} nats per token (90 %: {low:.4f} to {high:.4f})")
    else:
        tokens = float(scaling_laws.tokens_needed(fit, target, n0=c.n0, rho=rho, before=before))
        if tokens == math.inf:
            return print(f"for {target} nats per token: not by this recovery, however long, says the law")
        between(f"for {target} nats per token the tokens needed,", tokens, points.tokens, c.extrapolate)
        low, high = scaling_laws.interval(np.array([scaling_laws.tokens_needed(fit, target, n0=c.n0, rho=rho, before=b, theta=theta)
                                            for b, theta in zip(befores, samples)]))
        print(f"for {target} nats per token: {tokens:,.0f} tokens (90 %: {low:,.0f} to {high:,.0f})")
    flops = 6 * (c.n0 if semi else n) * tokens                   # the zeros of 2:4 are multiplied as well
    print(f"{tokens / n:.1f} tokens per parameter left, {flops:.3g} FLOPs (6 N D)")
    if alone:
        print(from_scratch(c, n, target, flops, *alone))


def from_scratch(c, n, target, flops, fit, samples, ends):
    """What the same loss costs without a larger model, as a sentence."""
    tokens = float(scaling_laws.tokens_needed(fit, target, n=n))
    if tokens == math.inf:
        return f"{n:,.0f} parameters from scratch do not reach {target:.4f}, however long, says the law"
    if not c.extrapolate and not (ends.n.min() <= n <= ends.n.max() and tokens <= ends.tokens.max()):
        return f"{n:,.0f} parameters from scratch to {target:.4f}: outside of what was measured; see --extrapolate"
    low, high = scaling_laws.interval(scaling_laws.tokens_needed(fit, target, n=n, theta=samples))
    theirs, before = 6 * n * tokens, 6 * c.n0 * ends.tokens.max()
    both = f", with the training before the cut {(before + flops) / theirs:.2f} times those" * (c.before is None)
    return (f"{n:,.0f} parameters from scratch to {target:.4f}: {tokens:,.0f} tokens (90 %: {low:,.0f} to "
            f"{high:,.0f}), {theirs:.3g} FLOPs; the recovery's are {flops / theirs:.1%} of those{both}")


COMMANDS = {"run": (scaling_runs.Grid, scaling_runs.run_grid), "fit": (Fit, main_fit), "plan": (Plan, main_plan)}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"say what to do: python -m experiments.scaling {' | '.join(COMMANDS)} (--help behind it lists the flags)")
    settings, command = COMMANDS[argv[0]]
    command(parse(settings, argv[1:]))


if __name__ == "__main__":
    run(main, sys.argv[1:])

"""How many tokens a pruned model needs to recover: the P² law and its rivals, fitted and used.

    python -m experiments.scaling run                         # the grid, 4 hours on 2 cores
    python -m experiments.scaling run --minutes 20            # a piece of it; the same command goes on
    python -m experiments.scaling fit results/scaling.jsonl   # constants, errors, figures; 2 minutes
    python -m experiments.scaling plan --n0 4e5 --rho 0.25 --before 1.14 --target-loss 1.19

Not here: the runs (experiments/scaling_runs.py), what they say without a law
(experiments/scaling_curves.py), the laws and their fit (experiments/scaling_laws.py).
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common import UserError, check_choices, parse, printable, run, write_atomic
from experiments import scaling_curves, scaling_laws, scaling_runs
from experiments.scaling_laws import HELD_OUT, NEAR, Points
from report import markdown

P2_CONSTANTS = ("gamma", "delta", "alpha", "beta", "N_C", "D_C", "E")
RIVALS = ("p2, outside", "p2, rate only", "chinchilla", "over-trained", "compute", "power")
LABEL = "nats per token"
# The split whose final losses are judged by themselves: a small model's runs predict a large one's end.
LARGEST = "largest model"


# -- fit: the laws and the records

@dataclass(frozen=True)
class FitGrid:
    records: str                      # file of records, as `run` keeps them
    first: float = 0.05               # points before this share of a recovery are left out
    loss: Literal["linear", "huber"] = "linear"    # of the fits: least squares, or linear beyond 0.01 nats
    starts: int = 32                  # of every fit
    samples: int = 200                # bootstrap samples, for intervals of 90 %


def page_of(config, name):
    """The path of a page beside the records: those of results/scaling.jsonl are in
    results/scaling."""
    return Path(config.records).with_suffix("") / name


def allows(name, points):
    """Whether the law can be fitted to these points: whether there are enough of them, of rates and
    of sizes."""
    try:
        scaling_laws.check(scaling_laws.LAWS[name], points)
    except UserError:
        return False
    return True


def form_of_p2(points):
    """The name of the P² law without the constants that mean nothing for these points, or None if
    they are too few."""
    for name in ("p2", "p2, one rate", "p2, one size"):
        if allows(name, points):
            return name
    return None


def fit_report(config, runs):
    """Every table and verdict, as Markdown."""
    wholes = scaling_curves.wholes(runs)
    kinds = sorted(scaling_curves.recoveries(runs, config.first).items())
    blocks = trained_models(wholes.get("scratch", []))
    if kinds:
        blocks += recovery_tables(config, kinds)
    for kind, records in kinds:
        lines = [f"{kind}, tokens measured (in brackets per parameter left):",
                 *scaling_curves.trends(records)]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *average_law(wholes, config)])


def trained_models(scratch):
    """The table of the longest whole trainings, as a list of blocks."""
    longest = {(end["n"], end["seed"]): end for end in sorted(scratch, key=lambda end: end["tokens"])}
    rows = []
    for (n, seed), end in sorted(longest.items()):
        rows.append([f"{n:,}", seed, f"{end['tokens']:,}", f"{end['tokens'] / n:.0f}",
                     f"{end['epochs']:.2f}", f"{end['loss']:.4f}"])
    if not rows:
        return []
    return [markdown(["N₀", "seed", "tokens", "per parameter", "epochs", "L₀"], rows)]


def recovery_tables(config, kinds):
    """The constants of the P² law, what is not pinned, and the errors of all laws."""
    fitted = []
    remarks = []
    tested = []
    for kind, records in kinds:
        points = Points.of(records)
        tested += error_rows(config, kind, points)
        noise = scaling_curves.noise(records)
        if not math.isnan(noise):
            remarks.append(f"- {kind}: two seeds differ by {noise:.4f} nats in what the same cut "
                           "costs")
        law = form_of_p2(points)
        if law is None:
            continue
        fit = scaling_laws.fit(law, points, config.loss, config.starts)
        samples = scaling_laws.bootstrap(fit, points, n=config.samples)
        fitted.append(constants_row(kind, fit, points, samples))
        if not fit.converged:
            remarks.append(f"- {kind}: the fit did not converge; other constants fit as well")
        for sentence in dict.fromkeys(scaling_laws.unpinned(fit, points, samples)):
            remarks.append(f"- {kind}: {sentence}")
    constants = markdown(["cut", "points", *P2_CONSTANTS, "R² of loss - L₀", "mean error (nats)",
                          "Huber", "ASD"], fitted)
    errors = markdown(["cut", "law", "fitted", *HELD_OUT, f"{LARGEST}, final loss",
                       "the same without the first tenth"], tested)
    return [f"Constants of the P² law, fitted with {config.loss} loss. In brackets stand 90 % of a "
            "bootstrap over curves; curves of one model share its L₀, so these intervals are "
            "rather too narrow.",
            constants, "\n".join(remarks),
            "Mean error in nats, where a law was fitted and on the points that were held out. The "
            "laws against the control are given its measured loss at every point, also at those "
            "held out. \"No law: straight line\" continues every curve along a line over log(tokens) "
            f"through its last {scaling_curves.LINE_POINTS} seen points. \"No law: neighbour\" gives a "
            "curve its own L₀ plus what the nearest seen cut cost after as many tokens: that of the "
            "next smaller model at the same rate, or of the same model at the next smaller rate. The "
            "last two columns are the absolute relative error of the last losses of the largest model's "
            "curves, fitted to those of the others, and to these without the first tenth of the tokens "
            "of each.",
            errors]


def constants_row(kind, fit, points, samples):
    """The constants with intervals, and how well the law fits what it was fitted to."""
    lows, highs = scaling_laws.interval(fit.law.values(samples)[:, 0])
    cells = dict.fromkeys(P2_CONSTANTS, "")
    for (name, value), low, high in zip(fit.constants.items(), lows, highs):
        cells[name] = f"{value:.3g} [{low:.3g}, {high:.3g}]"
    judged = scaling_laws.judge(fit, points)
    cost = points.loss - points.before
    r2 = 1 - fit.sse / ((cost - cost.mean()) ** 2).sum()
    return [kind, len(points.loss), *cells.values(), f"{r2:.4f}", f"{judged['nats']:.2g}",
            f"{judged['huber']:.2g}", f"{judged['asd']:.2g}"]


def error_rows(config, kind, points):
    """A row for each law that these points allow, and for each guess without a law: its mean error,
    in nats and per cent, where it was fitted and on each part held out; and the error of the final
    losses of the largest model, with the first tenth of the tokens and without."""
    def show(judged):
        return f"{judged['nats']:.4f} ({judged['percent']:.2f} %)" if judged else "-"

    def show_final(judged):
        return f"{judged['final']:.2f} %" if judged else "-"

    late = points.where(scaling_laws.without_start(points))

    laws = list(RIVALS)
    p2 = form_of_p2(points)
    if p2:
        laws = [p2, f"{p2}, control", *laws]
    rows = []
    for law in laws:
        if not allows(law, points):
            continue
        fit = scaling_laws.fit(law, points, config.loss, config.starts)
        held_out = scaling_laws.held_out(law, points, loss=config.loss, starts=config.starts)
        of_late = scaling_laws.held_out(law, late, (LARGEST,), loss=config.loss, starts=config.starts)
        cells = [show(judged) for judged in held_out.values()]
        finals = [show_final(judged[LARGEST]) for judged in (held_out, of_late)]
        rows.append([kind, law, show(scaling_laws.judge(fit, points)), *cells, *finals])
    for name, guess in scaling_curves.GUESSES.items():
        guessed = [scaling_curves.judged_guesses(guess, some) for some in (points, late)]
        cells = [show(judged) for judged in guessed[0].values()]
        rows.append([kind, name, "-", *cells, *[show_final(judged[LARGEST]) for judged in guessed]])
    return rows


def average_law(wholes, config):
    """The law of The Journey Matters on the trainings that prune, fitted to those that do not: with
    the average N and with the final one. A list of blocks, empty without such runs."""
    scratch = Points.of(wholes.get("scratch", []))
    pruned = [plan for plan in wholes if plan != "scratch"]
    if not pruned or not allows("chinchilla", scratch):
        return []
    fit = scaling_laws.fit("chinchilla", scratch, config.loss, config.starts)

    def predicted(end, n):
        return fit.law.predict(fit.theta, Points.of([dict(end, n=n)]))[0]

    rows = []
    for plan in pruned:
        for end in wholes[plan]:
            rows.append([plan, f"{end['n']:,}", f"{end['average']:,.0f}", f"{end['tokens']:,}",
                         f"{end['loss']:.4f}", f"{predicted(end, end['n']) - end['loss']:+.4f}",
                         f"{predicted(end, end['average']) - end['loss']:+.4f}"])
    constants = ", ".join(f"{name} {value:.3g}" for name, value in fit.constants.items())
    error = scaling_laws.judge(fit, scratch)["nats"]
    table = markdown(["plan", "N at the end", "N on average", "tokens", "loss",
                      "law with N at the end, error", "law with the average N, error"], rows)
    return [f"The law of whole trainings from scratch, A/N^alpha + B/D^beta + E: {constants}; mean "
            f"error {error:.4f} nats. What it predicts for the trainings that prune:", table]


def main_fit(config):
    check_choices(config)
    if not 0 <= config.first < 1 or min(config.starts, config.samples) < 1:
        raise UserError(f"--first {config.first} must be at least 0 and below 1, --starts "
                        f"{config.starts} and --samples {config.samples} at least 1")
    runs = scaling_curves.read(config.records)
    text = fit_report(config, runs)
    write_atomic(page_of(config, "report.md"), lambda file: file.write(f"{text}\n".encode()))
    print(printable(text))
    kinds = scaling_curves.recoveries(runs, config.first)
    if kinds:
        draw_curves(config, kinds)
        draw_predictions(config, kinds)
        print(f"\npictures in {page_of(config, 'curves.png')} and predicted.png")
    else:
        print("\nno recoveries yet, so no pictures")


# -- pictures

def draw_curves(config, kinds):
    """curves.png: every recovery, with the law fitted to its first 80 %."""
    from matplotlib.figure import Figure  # slow to import, and only needed here
    models = set()
    for records in kinds.values():
        models |= {(record["n0"], record["model"]) for record in records}
    models = sorted(models)
    figure = Figure(figsize=(3 * len(models) + 1, 3 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(models), squeeze=False, sharex=True)
    for row, (kind, records) in zip(axes, sorted(kinds.items())):
        points = Points.of(records)
        late = HELD_OUT["last 20 %"](points)
        fit = scaling_laws.fit(form_of_p2(points) or "power", points.where(~late), config.loss,
                               config.starts)
        fitted = fit.law.predict(fit.theta, points)
        for axis, (n0, model) in zip(row, models):
            own = np.array([record["model"] == model for record in records])
            axis.set_visible(own.any())
            for shade, n in enumerate(np.unique(points.n[own])[::-1]):
                curve = own & (points.n == n)
                draw_curve(axis, points, curve, late, fitted, f"C{shade}")
            axis.set_xscale("log")
            axis.tick_params(which="minor", labelbottom=False)
            axis.set_title(f"{kind}, N₀ {n0:,}, seed {model[1] - scaling_runs.RECOVERY_SEED}",
                           fontsize=8)
            if own.any():
                axis.legend(fontsize=7)
        row[0].set_ylabel(f"loss ({LABEL})")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of recovery (hollow: held out)")
    figure.savefig(page_of(config, "curves.png"), dpi=100)


def draw_curve(axis, points, curve, late, fitted, color):
    """One recovery, the points of the mask `curve`; those in `late` were held out."""
    seen = curve & ~late
    hidden = curve & late
    axis.plot(points.tokens[curve], fitted[curve], color=color, lw=1,
              label=f"ρ {points.rho[curve][0]:.3f}")
    axis.plot(points.tokens[seen], points.loss[seen], "o", ms=3, color=color)
    axis.plot(points.tokens[hidden], points.loss[hidden], "o", ms=4, mfc="white", color=color)


def draw_predictions(config, kinds):
    """predicted.png: predicted against measured losses of what was held out."""
    from matplotlib.figure import Figure  # slow to import, and only needed here
    figure = Figure(figsize=(5 * len(HELD_OUT), 5), layout="constrained")
    panels = figure.subplots(1, len(HELD_OUT), squeeze=False)[0]
    for kind, records in sorted(kinds.items()):
        points = Points.of(records)
        law = form_of_p2(points) or "power"
        judged = scaling_laws.held_out(law, points, loss=config.loss, starts=config.starts)
        for panel, (part, split) in zip(panels, HELD_OUT.items()):
            tested = split(points)
            if judged[part]:
                fit = scaling_laws.fit(law, points.where(~tested), config.loss, config.starts)
                predicted = fit.law.predict(fit.theta, points.where(tested))
                panel.plot(points.loss[tested], predicted, "o", ms=3, label=kind)
    for panel, part in zip(panels, HELD_OUT):
        panel.set_title(f"{part}, held out")
        panel.set_xlabel(f"measured ({LABEL})")
        limits = [*panel.get_xlim(), *panel.get_ylim()]
        panel.plot([min(limits), max(limits)], [min(limits), max(limits)], color="0.7", lw=1, zorder=0)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    panels[0].set_ylabel("predicted")
    figure.savefig(page_of(config, "predicted.png"), dpi=100)


# -- plan: what the fitted law says

@dataclass(frozen=True)
class Plan:
    n0: float | None = None           # parameters of attention and FFNs before the cut
    rho: float | None = None          # share of them that is cut
    kind: Literal["width", "depth", "2:4"] = "width"     # of the cut; 2:4 takes no --rho
    target_loss: float | None = None     # nats per token; or:
    budget_tokens: float | None = None   # of recovery
    before: float | None = None       # the loss before the cut; default: by the law of trainings
    records: str = "results/scaling.jsonl"  # of a grid: the law is fitted anew
    first: float = 0.05               # points before this share of a recovery are left out
    samples: int = 200                # bootstrap samples, for intervals of 90 %
    extrapolate: bool = False         # answer outside of what the grid measured


@dataclass(frozen=True)
class Scratch:
    """The law of whole trainings, fitted."""
    fit: scaling_laws.Fit
    samples: np.ndarray               # of the bootstrap, (n, constants)
    ends: Points                      # the trainings

    @property
    def tokens(self):
        """Of the longest training."""
        return self.ends.tokens.max()


def check_plan(config):
    """Raise UserError for a plan that means nothing."""
    check_choices(config)
    rho_fits = (config.rho is None) == (config.kind == "2:4")
    one_goal = (config.target_loss is None) != (config.budget_tokens is None)
    if not config.n0 or not rho_fits or not one_goal:
        raise UserError("plan needs --n0, --rho (but not with --kind 2:4) and one of "
                        "--target-loss, --budget-tokens")
    if not 0 <= config.first < 1 or config.samples < 1:
        raise UserError(f"--first {config.first} must be at least 0 and below 1, --samples "
                        f"{config.samples} at least 1")
    for name in ("n0", "rho", "before", "target_loss", "budget_tokens"):
        value = getattr(config, name)
        limit = 1 if name == "rho" else math.inf
        if value is not None and not 0 < value < limit:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0 and below {limit}")


def refuse_outside(what, value, measured, extrapolate, slack=1.0001):
    """Raise UserError if a value is outside of the measured range and --extrapolate was not
    given."""
    low = min(measured)
    high = max(measured)
    if not extrapolate and not low / slack <= value <= high * slack:
        raise UserError(f"{what} {value:,.4g} is outside of what was measured, {low:,.4g} to "
                        f"{high:,.4g}; give --extrapolate to have the law's answer all the same")


def main_plan(config):
    check_plan(config)
    runs = scaling_curves.read(config.records)
    kinds = scaling_curves.recoveries(runs, config.first)
    if config.kind not in kinds:
        raise UserError(f"--kind {config.kind!r} was not measured in {config.records}; there are "
                        f"{', '.join(sorted(kinds))}")
    points = Points.of(kinds[config.kind])
    rho = .5 if config.kind == "2:4" else config.rho
    n = config.n0 * (1 - rho)
    refuse_outside("--n0", config.n0, points.n0, config.extrapolate)
    refuse_outside("--rho", rho, points.rho, config.extrapolate, NEAR)
    fit = scaling_laws.fit(form_of_p2(points) or "p2", points)
    samples = scaling_laws.bootstrap(fit, points, n=config.samples)
    scratch = fit_scratch(config, scaling_curves.wholes(runs))

    before, befores, source = loss_before(config, scratch)
    refuse_outside("the loss before the cut,", before, points.before, config.extrapolate)
    print(f"N₀ {config.n0:,.0f}, L₀ {before:.4f} ({source}); {config.kind} cut of {rho:.1%}, "
          f"{n:,.0f} parameters left")
    if config.budget_tokens is not None:
        tokens = config.budget_tokens
        refuse_outside("--budget-tokens", tokens, points.tokens, config.extrapolate)
        planned = Points.of([dict(n0=config.n0, n=n, rho=rho, before=0, tokens=tokens)])
        target = float(before + fit.law.predict(fit.theta, planned)[0])
        low, high = scaling_laws.interval(befores + fit.law.predict(samples, planned)[:, 0])
        print(f"after {tokens:,.0f} tokens: {target:.4f} {LABEL} (90 %: {low:.4f} to {high:.4f})")
    else:
        target = config.target_loss
        tokens = float(scaling_laws.tokens_needed(fit, target, config.n0, rho, before))
        if tokens == math.inf:
            print(f"the law says that no recovery reaches {target} {LABEL}, however long it is")
            return
        refuse_outside(f"for {target} {LABEL} the tokens needed,", tokens, points.tokens,
                       config.extrapolate)
        needed = []
        for loss, theta in zip(befores, samples):
            needed.append(scaling_laws.tokens_needed(fit, target, config.n0, rho, loss, theta=theta))
        low, high = scaling_laws.interval(np.array(needed))
        print(f"for {target} {LABEL}: {tokens:,.0f} tokens (90 %: {low:,.0f} to {high:,.0f})")
    # The zeros of a 2:4 model are multiplied as well.
    flops = 6 * (config.n0 if config.kind == "2:4" else n) * tokens
    print(f"{tokens / n:.1f} tokens per parameter left, {flops:.3g} FLOPs (6 N D)")
    if scratch:
        print(from_scratch(config, scratch, n, target, flops))


def fit_scratch(config, wholes):
    """The Scratch of the whole trainings, or None if they are too few."""
    ends = Points.of(wholes.get("scratch", []))
    if not allows("chinchilla", ends):
        return None
    fit = scaling_laws.fit("chinchilla", ends)
    return Scratch(fit, scaling_laws.bootstrap(fit, ends, n=config.samples), ends)


def loss_before(config, scratch):
    """The loss before the cut, as many samples of it as the bootstrap has, and where it comes
    from."""
    if config.before is not None:
        return config.before, np.full(config.samples, config.before), "as given"
    if not scratch:
        raise UserError(f"{config.records} has too few whole trainings to say the loss before the "
                        "cut; give --before")
    longest = Points.of([dict(n=config.n0, tokens=scratch.tokens)])
    law = scratch.fit.law
    source = f"trained on {scratch.tokens:,.0f} tokens, by the law of whole trainings"
    return law.predict(scratch.fit.theta, longest)[0], law.predict(scratch.samples, longest)[:, 0], source


def from_scratch(config, scratch, n, target, flops):
    """What the same loss costs without a larger model, as a sentence. `flops` are those of the
    recovery."""
    what = f"{n:,.0f} parameters from scratch"
    tokens = float(scaling_laws.tokens_needed(scratch.fit, target, n=n))
    if tokens == math.inf:
        return f"the law says that {what} do not reach {target:.4f}, however long they are trained"
    ends = scratch.ends
    measured = ends.n.min() <= n <= ends.n.max() and tokens <= scratch.tokens
    if not config.extrapolate and not measured:
        return f"{what} to {target:.4f}: outside of what was measured; see --extrapolate"
    samples = scaling_laws.tokens_needed(scratch.fit, target, n=n, theta=scratch.samples)
    low, high = scaling_laws.interval(samples)
    scratch_flops = 6 * n * tokens
    sentence = (f"{what} to {target:.4f}: {tokens:,.0f} tokens (90 %: {low:,.0f} to {high:,.0f}), "
                f"{scratch_flops:.3g} FLOPs; the recovery's are {flops / scratch_flops:.1%} of "
                "those")
    if config.before is None:
        both = 6 * config.n0 * scratch.tokens + flops
        sentence += f", with the training before the cut {both / scratch_flops:.2f} times those"
    return sentence


COMMANDS = {"run": (scaling_runs.Grid, scaling_runs.run_grid), "fit": (FitGrid, main_fit),
            "plan": (Plan, main_plan)}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"say what to do: python -m experiments.scaling {' | '.join(COMMANDS)} "
                        "(--help behind it lists the flags)")
    settings, command = COMMANDS[argv[0]]
    command(parse(settings, argv[1:]))


if __name__ == "__main__":
    run(main, sys.argv[1:])

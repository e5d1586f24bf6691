"""What a grid's records say without any law: recoveries, whole trainings, trends, noise of seeds.

    python -c "from experiments.scaling_curves import *; print(*wholes(read('results/scaling.jsonl')))"

A run's records are train.py's metrics.jsonl. Those of a recovery hold the recipe of the cut before
it. Its control is the recovery of the same model without a cut, with the same data in the same
order. N is the number of parameters of attention and FFNs. Not here: making the records
(experiments/scaling_runs.py), fitting (experiments/scaling_laws.py).
"""
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd

import report
from common import UserError
from experiments.scaling_laws import HELD_OUT, NEAR, judge_losses
from model import GPTConfig

LINE_POINTS = 5                        # a straight line goes through so many points (our choice)
KINDS = {"ffn": "width", "layer": "depth", "2:4": "2:4"}      # by the structure that was cut


def read(path):
    """The finished runs in a file: {name: {tag: [records]}}. Raises UserError if there are none."""
    runs = report.finished(path)
    if not runs:
        raise UserError(f"no finished runs in {path}; python -m experiments.scaling run --out "
                        f"{path} makes them")
    return runs


def removable(config):
    """N of a model config as the records hold it."""
    return GPTConfig(**config).removable_params()


# -- the points

def recoveries(runs, first):
    """Every evaluation of every recovery from `first`, a share of its tokens, on: {kind:
    [records]}.

    A record has the fields of scaling_laws.Points and `model`, the path and seed of what was cut. A
    recovery whose control has no records yet is left out. Raises UserError for another model's
    control."""
    recovered = {name: run for name, run in runs.items() if run["config"][0].get("init")}
    controls = controls_of(runs, recovered)
    points = {}
    for curve, run in enumerate(recovered.values()):
        config = run["config"][0]
        cut = config.get("cut")
        model = (cut or {}).get("cut_from"), config["seed"]
        if model not in controls:
            continue
        n0, before, losses = controls[model]
        kind = KINDS[cut["recipe"]["structure"]]
        n = removable(config["start"])
        if kind == "2:4":
            n //= 2                          # half of the weights are zeros
        first_tokens = max(1, first * run["eval"][-1]["tokens"])
        for evaluation in run["eval"]:
            tokens = evaluation["tokens"]
            if tokens >= first_tokens:
                points.setdefault(kind, []).append(dict(curve=curve, loss=evaluation["val_loss"],
                                                        tokens=tokens, n0=n0, n=n, rho=1 - n / n0,
                                                        before=before,
                                                        control=losses.get(tokens, math.nan),
                                                        model=model))
    return points


def controls_of(runs, recovered):
    """{(path of the model, seed): (its N, its loss before, {tokens: loss as it trains on})} of the
    runs that are named control-…. Raises UserError if one does not begin with the loss at which the
    training of its model ended."""
    controls = {}
    for name, run in recovered.items():
        if not name.startswith("control"):
            continue
        config = run["config"][0]
        losses = {evaluation["tokens"]: evaluation["val_loss"] for evaluation in run["eval"]}
        begin = run["eval"][0]["val_loss"]
        trained = runs.get(Path(config["init"]).name)
        if trained and abs(trained["summary"][0]["val_loss"] - begin) > 1e-3:
            raise UserError(f"{name} begins at {begin:.6f} nats, and the training of its model "
                            f"ended at {trained['summary'][0]['val_loss']:.6f}: it is another "
                            f"model's; delete {name} and all recoveries of it, records and run "
                            "folders")
        controls[config["init"], config["seed"]] = removable(config["start"]), losses[0], losses
    return controls


def wholes(runs):
    """The ends of whole trainings, which begin without an --init: {plan: [records]}. A record has
    `n` at the end, `average` n over the steps, `tokens`, `loss`, `epochs` and `seed`."""
    ends = {}
    for run in runs.values():
        config = run["config"][0]
        summary = run["summary"][0]
        if config.get("init"):
            continue
        n = removable(config["start"])
        total = GPTConfig(**config["start"]).num_params()["total"]
        sizes = [(0, n)]
        for cut in run.get("prune", ()):
            sizes.append((cut["step"], n - (total - cut["params"])))
        until = [step for step, _ in sizes[1:]] + [summary["step"]]
        average = sum(size * (end - step) for (step, size), end in zip(sizes, until)) / summary["step"]
        ends.setdefault(config["plan"], []).append(dict(n=removable(config["target"]),
                                                        average=average, tokens=summary["tokens"],
                                                        loss=summary["val_loss"],
                                                        epochs=summary["epochs"],
                                                        seed=config["seed"]))
    return ends


# -- what they say

def reach(curve, height):
    """The tokens at which a curve [(tokens, excess)] first comes down to `height`, by straight
    lines over the logarithm of the tokens; its first tokens if it begins below; inf if it never
    comes down."""
    before = curve[0]
    for after in curve:
        if after[1] <= height:
            if before[1] <= height:
                return before[0]
            share = (before[1] - height) / (before[1] - after[1])
            return before[0] * (after[0] / before[0]) ** share
        before = after
    return math.inf


def trends(records):
    """The paper's two trends on the measured curves, without a law, as lines of Markdown.

    Curves are compared that differ only in the rate, or only in the model. Each is followed until
    its loss is as near to the control's as the worst of them ends; a curve that begins nearer
    counts with its first tokens. Rates within scaling_laws.NEAR count as one."""
    points = pd.DataFrame(records)
    points["excess"] = points.loss - points.control
    curves = []
    for (model, n0, n, rho), own in points.groupby(["model", "n0", "n", "rho"], sort=False):
        curves.append(dict(model=model, n0=n0, n=n, rho=rho, points=list(zip(own.tokens, own.excess))))
    curves.sort(key=lambda curve: (curve["n0"], curve["rho"]))
    by_model = {}
    by_rate = {}
    for curve in curves:
        by_model.setdefault(curve["model"], []).append(curve)
        by_rate.setdefault((near_rate(curve, by_rate), curve["model"][1]), []).append(curve)
    rates = [compared(group, "n0", "rho") for group in by_model.values() if len(group) > 1]
    sizes = [compared(group, "rho", "n0") for group in by_rate.values() if len(group) > 1]
    rise = sum(is_falling(tokens[::-1]) for tokens, _, _ in rates)
    fall = sum(is_falling(tokens) for tokens, _, _ in sizes)
    fall_relative = sum(is_falling(relative) for _, relative, _ in sizes)
    return [f"- *A higher ρ needs more tokens*: in {rise} of {len(rates)} models",
            *[line for _, _, line in rates], f"- *A larger model needs fewer tokens*: in {fall} of "
            f"{len(sizes)} rates and seeds; *fewer per parameter left* (in brackets): in "
            f"{fall_relative}", *[line for _, _, line in sizes]]


def near_rate(curve, by_rate):
    """The rate under which a curve is grouped: one that is near its own, with the same seed, or its
    own."""
    for rho, seed in by_rate:
        if seed == curve["model"][1] and max(rho / curve["rho"], curve["rho"] / rho) < NEAR:
            return rho
    return curve["rho"]


def compared(group, same, differs):
    """Curves that differ in one thing: their tokens to one height, the tokens per parameter left,
    and a line."""
    labels = {"n0": "N₀ {:,}", "rho": "ρ {:.3f}"}
    height = max(curve["points"][-1][1] for curve in group)
    tokens = [reach(curve["points"], height) for curve in group]
    relative = [needed / curve["n"] for needed, curve in zip(tokens, group)]
    parts = []
    for curve, needed, per_parameter in zip(group, tokens, relative):
        parts.append(f"{labels[differs].format(curve[differs])}: {needed / 1e6:.2f}M "
                     f"({per_parameter:.1f})")
    title = labels[same].format(group[0][same])
    return tokens, relative, f"  - {title}, to {height:+.3f} nats: {', '.join(parts)}"


def is_falling(numbers):
    return all(first >= second for first, second in zip(numbers, numbers[1:]))


def noise(records):
    """The mean |difference between two seeds| of what a cut costs (loss less L0) at the same size,
    rate and tokens; nan if there is one seed."""
    points = pd.DataFrame(records)
    points["cost"] = points.loss - points.before
    differences = []
    for _, costs in points.groupby(["n0", "n", "tokens"]).cost:
        differences += [abs(first - second) for first, second in itertools.combinations(costs, 2)]
    return sum(differences) / len(differences) if differences else math.nan


# -- guesses without a law: points and a mask (points,) of those that were seen -> losses (points,),
# nan where the guess says nothing

def straight_line(points, seen):
    """Every curve goes on along the straight line over log(tokens), by least squares, through its
    last LINE_POINTS seen points."""
    guessed = np.full(len(points.loss), np.nan)
    for curve in np.unique(points.curve):
        own = points.curve == curve
        before = np.flatnonzero(own & seen)
        last = before[np.argsort(points.tokens[before])][-LINE_POINTS:]
        if len(last) == LINE_POINTS:
            line = np.polyfit(np.log(points.tokens[last]), points.loss[last], 1)
            guessed[own] = np.polyval(line, np.log(points.tokens[own]))
    return guessed


def neighbour(points, seen):
    """A curve of which nothing was seen costs (loss less L0) what the nearest seen cut costs after
    as many tokens: its loss is its own L0 plus that cost.

    Near is a small |log of the ratio of N0| + |log of the ratio of rho|, so for a larger model it
    is the next smaller one at the same rate, and for a larger rate the next smaller one of the same
    model. Seeds of the nearest cut are averaged. Between its points the cost is interpolated over
    log(tokens); beyond them it stays."""
    guessed = np.full(len(points.loss), np.nan)
    cost = points.loss - points.before
    place = np.stack([np.log(points.n0), np.log(points.rho)], -1)
    for curve in np.unique(points.curve):
        own = points.curve == curve
        if (own & seen).any() or not seen.any():
            continue
        distance = np.abs(place - place[own][0]).sum(-1)
        nearest = seen & np.isclose(distance, distance[seen].min())
        costs = []
        for other in np.unique(points.curve[nearest]):
            seed = np.flatnonzero(nearest & (points.curve == other))
            seed = seed[np.argsort(points.tokens[seed])]
            costs.append(np.interp(np.log(points.tokens[own]), np.log(points.tokens[seed]), cost[seed]))
        guessed[own] = points.before[own] + np.mean(costs, axis=0)
    return guessed


GUESSES = {"no law: straight line": straight_line, "no law: neighbour": neighbour}


def judged_guesses(guess, points):
    """{split: `judge_losses` on its held-out points}, as `scaling_laws.held_out` gives of a law;
    None where the guess says nothing of one of them."""
    judged = {}
    for name, split in HELD_OUT.items():
        tested = split(points)
        losses = guess(points, ~tested)[tested]
        known = tested.any() and np.isfinite(losses).all()
        judged[name] = judge_losses(losses, points.where(tested)) if known else None
    return judged

"""What a grid's records say without any law: recovery curves, whole trainings, two trends, the noise of seeds.

    python -c "import curves; print(curves.wholes(curves.read('results/scaling.jsonl')).keys())"

A run's records are train.py's metrics.jsonl; a recovery's hold the recipe of the cut before it, and its control is the
recovery of the same model without one, with the same data in the same order. N is `removable`: parameters of attention
and FFNs. Not here: making the records (experiments/scaling_runs.py), fitting (experiments/scaling_laws.py).
"""
import itertools
import math
from pathlib import Path

import report
from common import UserError
from experiments import scaling_laws
from model import GPTConfig


def read(path):
    """report.finished: {name: {tag: [records]}}. UserError: none, too."""
    runs = report.finished(path)
    if not runs:
        raise UserError(f"no finished runs in {path}; python -m experiments.scaling run --out {path} makes them")
    return runs


def removable(config):
    """N of a config as the records hold it: parameters of attention and FFNs."""
    return GPTConfig(**config).removable_params()


def recoveries(runs, first):
    """Every evaluation of every recovery from `first` (a share of its tokens) on -> {kind: [records]} with the fields
    of laws.Points and `model` (path and seed of what was cut). Recoveries whose control, the run named control-…, is
    not there yet are left out. UserError: a control that does not begin where the training of its model ended."""
    found, controls = {}, {}
    starts = {name: r for name, r in runs.items() if r["config"][0].get("init")}
    for name, r in starts.items():
        c = r["config"][0]
        if name.startswith("control"):
            controls[c["init"], c["seed"]] = removable(c["start"]), {e["tokens"]: e["val_loss"] for e in r["eval"]}
            whole = runs.get(Path(c["init"]).name)
            if whole and abs(whole["summary"][0]["val_loss"] - r["eval"][0]["val_loss"]) > 1e-3:
                raise UserError(f"{name} begins at {r['eval'][0]['val_loss']:.6f} nats, and the training of its model "
                                f"ended at {whole['summary'][0]['val_loss']:.6f}: it is another model's; delete {name} "
                                "and all recoveries of it, records and run folders")
    for curve, (name, r) in enumerate(starts.items()):
        c = r["config"][0]
        model = (c["cut"]["cut_from"], c["seed"]) if c.get("cut") else None
        if name.startswith("control") or model not in controls:
            continue
        n0, control = controls[model]
        structure = c["cut"]["recipe"]["structure"]
        kind = {"layer": "depth", "2:4": "2:4"}.get(structure, "width")
        n = removable(c["start"]) // (2 if kind == "2:4" else 1)
        last = r["eval"][-1]["tokens"]
        found.setdefault(kind, []).extend(
            dict(curve=curve, loss=e["val_loss"], tokens=e["tokens"], n0=n0, n=n, rho=1 - n / n0, before=control[0],
                 control=control.get(e["tokens"], math.nan), model=model)
            for e in r["eval"] if e["tokens"] >= max(1, first * last))
    return found


def wholes(runs):
    """The ends of whole trainings, not of those from --init -> {plan: [records]} with `n` at the end, `average` n over
    the steps, `tokens`, `loss`, `epochs`, `seed`."""
    found = {}
    for r in runs.values():
        c, s = r["config"][0], r["summary"][0]
        if c.get("init"):
            continue
        n, total = removable(c["start"]), GPTConfig(**c["start"]).num_params()["total"]
        sizes = [(0, n), *((e["step"], n - (total - e["params"])) for e in r.get("prune", ()))]
        ends = [step for step, _ in sizes[1:]] + [s["step"]]
        average = sum(n * (end - step) for (step, n), end in zip(sizes, ends)) / s["step"]
        found.setdefault(c["plan"], []).append(dict(
            n=removable(c["target"]), average=average, tokens=s["tokens"], loss=s["val_loss"], epochs=s["epochs"],
            seed=c["seed"]))
    return found


def reach(curve, height):
    """Tokens at which a curve [(tokens, excess)] first is down to `height`, between its points straight over the
    logarithm of the tokens; its first tokens where it begins lower; inf: never."""
    for (d0, e0), (d1, e1) in zip([curve[0], *curve], curve):
        if e1 <= height:
            return d0 * (d1 / d0) ** ((e0 - height) / (e0 - e1)) if e0 > height else d0
    return math.inf


def trends(records):
    """The paper's two trends on the measured curves, no law between: of curves that differ in the rate (or the model)
    only, the tokens until the loss is as near to the control's as the worst of them ends, its first tokens for a curve
    that begins nearer. Rates within laws.NEAR count as one. -> lines of Markdown"""
    curves, by_model, by_rate = {}, {}, {}
    for r in records:
        curves.setdefault((r["model"], r["n0"], r["n"], r["rho"]), []).append((r["tokens"], r["loss"] - r["control"]))
    for (model, n0, n, rho), curve in sorted(curves.items(), key=lambda item: (item[0][1], item[0][3])):
        by_model.setdefault(model, []).append((n0, n, rho, curve))
        near = next((key for key in by_rate if key[1] == model[1] and max(key[0] / rho, rho / key[0]) < scaling_laws.NEAR),
                    (rho, model[1]))
        by_rate.setdefault(near, []).append((n0, n, rho, curve))

    def compared(groups, title, label):
        """-> for every group of several curves its tokens, those per parameter left, and a line."""
        for group in groups.values():
            height = max(curve[-1][1] for *_, curve in group)
            tokens = [reach(curve, height) for *_, curve in group]
            each = [f"{label(*about)}: {t / 1e6:.2f}M ({t / about[1]:.1f})" for t, about in zip(tokens, group)]
            if len(group) > 1:
                yield (tokens, [t / about[1] for t, about in zip(tokens, group)],
                       f"  - {title(*group[0])}, to {height:+.3f} nats: {', '.join(each)}")

    n0_of, rho_of = lambda n0, *_: f"N₀ {n0:,}", lambda n0, n, rho, _: f"ρ {rho:.3f}"
    rates, sizes = list(compared(by_model, n0_of, rho_of)), list(compared(by_rate, rho_of, n0_of))
    falling = lambda numbers: all(a >= b for a, b in zip(numbers, numbers[1:]))
    rise = sum(falling(tokens[::-1]) for tokens, _, _ in rates)
    fall, relative = (sum(falling(row[i]) for row in sizes) for i in (0, 1))
    lines = [f"- *A higher ρ needs more tokens*: in {rise} of {len(rates)} models", *(line for *_, line in rates)]
    lines += [f"- *A larger model needs fewer tokens*: in {fall} of {len(sizes)} rates and seeds; *fewer per "
              f"parameter left* (in brackets): in {relative}", *(line for *_, line in sizes)]
    return lines


def noise(records):
    """Mean |difference between two seeds| of what a cut costs (loss less L₀) at the same size, rate and tokens; nan
    where there is one seed."""
    found = {}
    for r in records:
        found.setdefault((r["n0"], r["n"], r["tokens"]), []).append(r["loss"] - r["before"])
    pairs = [abs(a - b) for costs in found.values() for a, b in itertools.combinations(costs, 2)]
    return sum(pairs) / len(pairs) if pairs else math.nan

"""Scaling laws for the loss of a pruned model in recovery: fit, judge, bootstrap, hold out, invert. No files, no torch.

    python -c "from laws import *;print(fit('power',Points.of([dict(loss=3+9/d,tokens=d) for d in (1,2,4)])).constants)"

Every law is a row of `LAWS`: loss = base + a sum of terms, each a coefficient times powers of a point's numbers.
Prediction, Jacobian, change of units, starts and the inverse in the tokens are written once, for all rows.
- P² law (arXiv 2411.10272): L = L0 + (1/rho)^gamma (1/N0)^delta (N_C/N0^alpha + D_C/D^beta + E), E of either sign,
  fitted by Levenberg–Marquardt. The loss rises with rho, so gamma < 0 is expected; it is left free (our note). 2:4 has
  one rate: its fit leaves the factor of rho out. That paper has rival forms, which we do not know: "outside" and "rate
  only" are of the same kind and our choice. So is "control": what the cut costs against going on training.
- Chinchilla (arXiv 2203.15556): L = A/n^alpha + B/D^beta + E; with n the average over training it is the law of The
  Journey Matters (arXiv 2501.12486).
Not here: reading runs, tables (experiments/scaling.py). Losses are in nats per token, logarithms natural.
"""
import dataclasses
from dataclasses import dataclass

import numpy as np

from common import UserError

HUBER = .01      # nats: beyond this an error counts linearly. Our choice: about twice the noise of an evaluation
NEAR = 1.08      # rates (or sizes) within 8 % of each other count as one: depth is cut in whole layers. Our choice
STARTS = {"alpha": (.05, 2.), "beta": (.05, 2.), "gamma": (-4., 1.), "delta": (-1., 1.)}    # exponents are drawn here


@dataclass(frozen=True)
class Points:
    """Measured losses; every field is an array (points,)."""
    loss: np.ndarray       # nats per token
    tokens: np.ndarray     # D: of recovery; for "chinchilla" of the whole training
    n0: np.ndarray         # non-embedding parameters before the cut
    n: np.ndarray          # after it; for The Journey Matters the average over training
    rho: np.ndarray        # cut share of n0, in (0, 1)
    before: np.ndarray     # L0: the loss before the cut
    control: np.ndarray    # loss of the uncut model trained on as many more tokens; nan: not measured
    curve: np.ndarray      # 0, 1, …: the run; its points are not independent

    @classmethod
    def of(cls, records):
        """[{field: number}] -> Points. What a record does not have is nan, its curve 0."""
        return cls(*(np.array([r.get(f.name, 0 if f.name == "curve" else np.nan) for r in records],
                              int if f.name == "curve" else float) for f in dataclasses.fields(cls)))

    def where(self, mask):
        """The points of a mask (points,), or of an array of indices."""
        return Points(*(getattr(self, f.name)[mask] for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Law:
    """loss = base + Σ over terms of coefficient · Π over the term's exponents of variable^-exponent.

    theta (constants,): the coefficients in the order of `terms`, then the exponents. The `signed` stand as they are,
    the others as their logarithms and so stay positive (alpha, beta: more parameters and tokens never harm) without
    bounds, which Levenberg–Marquardt does not know. With `per_curve` theta holds that for curve 0, 1, … in turn."""
    name: str
    base: str | None                            # the field of Points that the sum is added to
    exponents: dict[str, str]                   # exponent: the field of Points that it is over
    terms: dict[str, str]                       # coefficient: its exponents
    signed: tuple[str, ...] = ("E", "gamma", "delta")
    per_curve: bool = False                     # every curve has constants of its own

    def __post_init__(self):
        names = (*self.terms, *self.exponents)                                              # in the order of theta
        mask = [[float(e in text.split()) for e in self.exponents] for text in self.terms.values()]
        vars(self).update(names=names, free=np.isin(names, self.signed), mask=np.array(mask))   # (terms, exponents)

    def split(self, points):
        """-> base (points,), the logarithms of the exponents' variables (points, exponents)."""
        logs = np.log(np.stack([getattr(points, field) for field in self.exponents.values()], -1))
        return getattr(points, self.base) if self.base else np.zeros(len(logs)), logs

    def values(self, theta):
        """theta (..., constants) -> the constants, logarithms undone: (..., curves or 1, names)."""
        theta = np.reshape(theta, (*np.shape(theta)[:-1], -1, len(self.names)))
        with np.errstate(over="ignore"):
            return np.where(self.free, theta, np.exp(theta))

    def each(self, theta, points):
        """The constants of every point: (..., points or 1, names); nan where its curve has none."""
        values = self.values(theta)
        padded = np.concatenate([values, np.full_like(values[..., :1, :], np.nan)], -2)
        return padded[..., np.minimum(points.curve, padded.shape[-2] - 1), :] if self.per_curve else values

    def pieces(self, values, logs):
        """values (..., points or 1, names), logs (points, exponents) -> the terms (..., points, terms) and the
        derivatives of their sum by theta (..., points, names)."""
        c, p = np.split(values, [len(self.terms)], -1)
        with np.errstate(over="ignore", invalid="ignore"):
            powers = np.exp(-(p * logs) @ self.mask.T)
            slopes = np.concatenate([powers, -logs * (c * powers @ self.mask)], -1) * np.where(self.free, 1, values)
            return c * powers, slopes

    def predict(self, theta, points):
        """theta (..., constants) -> losses (..., points) in nats per token; nan where a curve has no constants."""
        base, logs = self.split(points)
        return base + self.pieces(self.each(theta, points), logs)[0].sum(-1)

    def jacobian(self, theta, points):
        """theta (constants,) -> d loss / d theta, (points, constants)."""
        n, k = len(points.loss), len(self.names)
        out, (_, logs) = np.zeros((n, len(theta) // k, k)), self.split(points)
        out[range(n), points.curve * self.per_curve] = self.pieces(self.each(theta, points), logs)[1]
        return out.reshape(n, -1)

    def in_units(self, theta, log_units):
        """theta for variables x -> theta for x / exp(log_units), (exponents,), of the same losses: only coefficients
        change. We fit in units of the points' geometric means, where constants are far less correlated."""
        c, p = np.split(theta, [len(self.terms)], -1)
        with np.errstate(over="ignore", invalid="ignore"):
            by = -(np.where(self.free[c.shape[-1]:], p, np.exp(p)) * log_units) @ self.mask.T
            return np.concatenate([np.where(self.free[:c.shape[-1]], c * np.exp(by), c + by), p], -1)


P2 = {"gamma": "rho", "delta": "n0", "alpha": "n0", "beta": "tokens"}
AFTER_CUT = (
    Law("p2", "before", P2, {"N_C": "gamma delta alpha", "D_C": "gamma delta beta", "E": "gamma delta"}),
    Law("p2, one rate", "before", {e: P2[e] for e in ("delta", "alpha", "beta")},
        {"N_C": "delta alpha", "D_C": "delta beta", "E": "delta"}),
    Law("p2, one size", "before", {e: P2[e] for e in ("gamma", "beta")},        # N_C/N0^alpha + E is one number (ours)
        {"D_C": "gamma beta", "E": "gamma"}))
LAWS = {law.name: law for law in (
    *AFTER_CUT, *(dataclasses.replace(law, name=f"{law.name}, control", base="control") for law in AFTER_CUT),
    Law("p2, outside", "before", P2, {"N_C": "gamma delta alpha", "D_C": "gamma delta beta", "E": ""}),
    Law("p2, rate only", "before", {e: P2[e] for e in ("gamma", "alpha", "beta")},
        {"N_C": "gamma alpha", "D_C": "gamma beta", "E": "gamma"}),
    # E > 0, what endless parameters and tokens leave: no loss is below 0 (our choice; of "power" too)
    Law("chinchilla", None, {"alpha": "n", "beta": "tokens"}, {"A": "alpha", "B": "beta", "E": ""}, signed=()),
    Law("power", None, {"beta": "tokens"}, {"B": "beta", "E": ""}, signed=(), per_curve=True))}


@dataclass(frozen=True)
class Fit:
    """A law with constants; `fit` makes one, and constants from elsewhere can be given."""
    law: Law
    theta: np.ndarray     # (constants,)
    loss: str             # "linear" or "huber"
    sse: float            # sum of squared errors, nats²
    converged: bool       # the best of the starts ended by itself, not by its limit of evaluations

    @property
    def constants(self):
        """{name: constant}, logarithms undone; of a law per curve {name: [of curve 0, …]}."""
        values = self.law.values(self.theta).T.tolist()
        return {name: v if self.law.per_curve else v[0] for name, v in zip(self.law.names, values)}


def check(law, points):
    """UserError: numbers the law cannot take, too few points, or all at one rate, size or D where that leaves an
    exponent without meaning. Where losses are pinned and single constants are not (two sizes: N_C, alpha and E) a law
    is fitted, and `unpinned` says so."""
    why = {"rho": "runs that cut nothing are the control: ", "tokens": "right after the cut there are 0: "}
    for field in ("loss", *[law.base] * bool(law.base), *law.exponents.values()):
        value, verb = getattr(points, field), "divides by" if field in law.exponents.values() else "needs"
        if (wrong := ~np.isfinite(value) | (verb == "divides by") & (value <= 0)).any():
            raise UserError(f"{wrong.sum()} of {len(value)} points have {value[wrong][0]:g} as {field}, which law "
                            f"{law.name!r} {verb}; {why.get(field, '')}leave them out")
    for p in [points.where(points.curve == c) for c in np.unique(points.curve) if law.per_curve] or [points]:
        if len(p.loss) < len(law.names):
            raise UserError(f"{len(p.loss)} points{' of a curve' * law.per_curve} are too few for the {len(law.names)} "
                            f"constants of law {law.name!r}; evaluate more often or add runs")
        ascending = {field: np.sort(getattr(p, field)) for field in ("rho", "n0", "n", "tokens")}
        same = [field for field, v in ascending.items() if (v[1:] <= v[:-1] * NEAR).all()]
        fits = [f", or fit law {other.name!r}" for other in LAWS.values()
                if (other.base == law.base or other.per_curve) and not {*other.exponents.values()} & {*same}]
        if idle := [e for e, field in law.exponents.items() if field in same]:
            numbers = dict.fromkeys(f"{law.exponents[e]} {ascending[law.exponents[e]][0]:g}" for e in idle)
            raise UserError(f"all points have {', '.join(numbers)}, which leaves {', '.join(idle)} of law {law.name!r} "
                            f"open; add runs that differ by over {NEAR - 1:.0%}{''.join(fits[:1])}")


def fit(law, points, loss="linear", starts=32, seed=0):
    """Law or its name -> Fit: loss="linear" of least squared error, by Levenberg–Marquardt as in arXiv 2411.10272;
    "huber" of least Huber loss (linear beyond HUBER nats), by scipy's trust region. From `starts` drawn starts (ours),
    the same for the same seed. UserError: an unknown law or loss, points that `check` refuses, no scipy."""
    law = LAWS.get(law) if isinstance(law, str) else law
    if law is None or loss not in ("linear", "huber"):
        raise UserError(f"a law is one of {'; '.join(LAWS)}, and a loss linear or huber")
    check(law, points)
    if law.per_curve:
        own = dataclasses.replace(law, per_curve=False)
        fits = {c: fit(own, points.where(points.curve == c), loss, starts, seed) for c in np.unique(points.curve)}
        theta = [fits[c].theta if c in fits else np.full(len(law.names), np.nan) for c in range(max(fits) + 1)]
        return Fit(law, np.concatenate(theta), loss, sum(f.sse for f in fits.values()),
                   all(f.converged for f in fits.values()))
    (base, logs), rng = law.split(points), np.random.default_rng(seed)
    middle = logs.mean(0)
    start = [draw(law, logs - middle, points.loss - base, rng) for _ in range(starts)]
    best = refine(law, logs - middle, points.loss - base, loss, start)
    theta = law.in_units(best.x, -middle)
    return Fit(law, theta, loss, float(((law.predict(theta, points) - points.loss) ** 2).sum()), best.status > 0)


def draw(law, logs, y, rng):
    """A start -> theta: exponents from STARTS, and as every law is linear in its coefficients these by least squares;
    the positive ones above 0, from where their logarithm would not return."""
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise UserError("fitting a law needs scipy: pip install scipy") from None
    k, signed = len(law.terms), law.free[:len(law.terms)]
    p = [rng.uniform(*STARTS[e]) if e in law.signed else np.exp(rng.uniform(*np.log(STARTS[e]))) for e in law.exponents]
    powers = np.exp(-(p * logs) @ law.mask.T)
    c = nnls(np.hstack([powers, -powers[:, signed]]), y, maxiter=1000)[0]
    c = np.where(signed, c[:k] - (np.eye(k)[:, signed] @ c[k:]), np.maximum(c[:k], 1e-3 * np.abs(y).mean() + 1e-12))
    values = np.concatenate([c, p])
    return np.where(law.free, values, np.log(np.where(law.free, 1, values)))


def refine(law, logs, y, loss, thetas):
    """The best optimum (scipy's) that is reached from `thetas`, where the law's terms are to sum to y (points,)."""
    from scipy.optimize import least_squares
    how = {"method": "lm"} if loss == "linear" else {"method": "trf", "loss": "huber", "f_scale": HUBER}
    with np.errstate(all="ignore"):                                       # a step too far gives inf and is taken back
        return min((least_squares(lambda theta: law.pieces(law.values(theta), logs)[0].sum(-1) - y, theta,
                                  lambda theta: law.pieces(law.values(theta), logs)[1], x_scale="jac", max_nfev=300,
                                  ftol=1e-10, xtol=1e-10, gtol=1e-10, **how) for theta in thetas), key=lambda o: o.cost)


def judge(fit, points):
    """How a Fit predicts these points -> dict: r2 (differences between curves count in it), huber (mean, nats²), asd
    (average slope difference: mean over neighbouring points of a curve of |predicted − measured slope|, nats per
    million tokens; the name is of arXiv 2411.10272, the formula ours; nan without neighbours), nats (mean |error|),
    percent (of the loss), worst (largest |error|, nats)."""
    errors, order = fit.law.predict(fit.theta, points) - points.loss, np.lexsort((points.tokens, points.curve))
    size, variation = np.abs(errors), ((points.loss - points.loss.mean()) ** 2).sum()
    millions = np.diff(points.tokens[order]) / 1e6
    pairs = (np.diff(points.curve[order]) == 0) & (millions > 0)
    found = {"r2": 1 - (errors ** 2).sum() / variation if variation else np.nan,
             "huber": np.where(size < HUBER, size ** 2 / 2, HUBER * (size - HUBER / 2)).mean(),
             "asd": np.abs(np.diff(errors[order])[pairs] / millions[pairs]).mean() if pairs.any() else np.nan,
             "nats": size.mean(), "percent": 100 * (size / points.loss).mean(), "worst": size.max()}
    return {name: float(value) for name, value in found.items()}


def bootstrap(fit, points, n=200, seed=0, perturbed=2):
    """Refits to n data sets that might as well have been measured -> theta, (n, constants). Points of a curve are not
    independent: its errors, as if it had not been fitted (linearised), come back together, with one random sign and
    size for all (wild cluster bootstrap, jackknifed: MacKinnon, Nielsen and Webb 2023; Webb's weights). With fewer than
    3 curves every point counts by itself. On 100 planted sets of 9 curves, 90 % intervals held the truth 79-97 % of the
    time, with noise shared within curves or not; drawing curves 75-93 %, points 25-100 %. They are too narrow where the
    constants suffice to fit every curve's level. Refits start from the fit and `perturbed` places around it. UserError:
    a law with constants for every curve."""
    law, rng = fit.law, np.random.default_rng(seed)
    if law.per_curve:
        raise UserError(f"law {law.name!r} is not bootstrapped: a single curve does not tell how much curves differ")
    (base, logs), (curves, group) = law.split(points), np.unique(points.curve, return_inverse=True)
    logs, middle, group = logs - logs.mean(0), logs.mean(0), group if len(curves) >= 3 else np.arange(len(group))
    theta = law.in_units(fit.theta, middle)
    pieces, slopes = law.pieces(law.values(theta), logs)
    fitted, errors = pieces.sum(-1), points.loss - base - pieces.sum(-1)
    u, size, _ = np.linalg.svd(slopes, full_matrices=False)
    u = u[:, size > 1e-9 * size[0]]                                                         # u u' is the hat matrix
    for i in (group == g for g in range(group.max() + 1)):
        errors[i] = np.linalg.lstsq(np.eye(i.sum()) - u[i] @ u[i].T, errors[i], rcond=1e-3)[0]
    samples = np.empty((n, len(theta)))
    for sample in samples:
        weights = rng.choice([-1, 1], group.max() + 1) * np.sqrt(rng.choice([.5, 1, 1.5], group.max() + 1))
        around = theta + .3 * rng.standard_normal((perturbed, len(theta)))
        sample[:] = refine(law, logs, fitted + errors * weights[group], fit.loss, [theta, *around]).x
    return law.in_units(samples, -middle)


def interval(samples, level=.9):
    """Samples (n, ...) -> (2, ...): those between which the middle `level` of them lie; may be inf."""
    return np.sort(samples, axis=0)[[round((len(samples) - 1) * (1 + side * level) / 2) for side in (-1, 1)]]


def unmoving(law, theta, points, floor=1e-6):
    """The directions (directions, constants), in units of each constant's effect (at least `floor` nats), in which
    theta moves no loss of these points."""
    slopes = law.jacobian(theta, points)
    _, size, directions = np.linalg.svd(slopes / np.maximum(np.linalg.norm(slopes, axis=0), floor))
    return directions[(size > 1e-9).sum():]


def unpinned(fit, points, samples, level=.9):
    """What the data do not pin, in sentences: constants that change without effect on any loss, an open sign, an
    interval wider than the value, pairs correlated beyond .95 over `samples` (n, constants) of the bootstrap."""
    law, names = fit.law, np.array(fit.law.names)
    said = [f"{', '.join(names[np.abs(v) > 1e-6])} can change with no loss changing"
            for v in unmoving(law, fit.theta, points)]
    bounds = interval(law.values(samples)[:, 0], level)
    for name, signed, value, low, high in zip(names, law.free, law.values(fit.theta)[0], *bounds):
        if signed and low <= 0 <= high:
            said.append(f"{name} lies between {low:.3g} and {high:.3g}: its sign is open")
        elif not high - low <= abs(value):
            said.append(f"{name} lies between {low:.3g} and {high:.3g}, a range wider than its value, {value:.3g}")
    with np.errstate(all="ignore"):
        r, label = np.corrcoef(samples, rowvar=False), np.where(law.free, names, np.char.add("log ", names))
    return said + [f"{label[j]} and {label[i]} move together (correlation {r[i, j]:.3f}), only jointly pinned"
                   for i in range(len(names)) for j in range(i) if abs(r[i, j]) > .95]


def last_fifth(points):
    """The last 20 % of the points of every curve by tokens, at least one."""
    mask = np.zeros(len(points.loss), bool)
    for i in (np.flatnonzero(points.curve == c) for c in np.unique(points.curve)):
        mask[i[np.argsort(points.tokens[i], kind="stable")][-max(1, round(.2 * len(i))):]] = True
    return mask


def largest_rate(points):
    """Every model's own largest rate (and those within NEAR of it), of the models whose largest is within NEAR of the
    largest of all: where whole layers go, models reach a rate only about."""
    own = np.array([points.rho[points.n0 == n0].max(initial=-np.inf) for n0 in points.n0])
    return (points.rho * NEAR >= own) & (own * NEAR >= points.rho.max())


# split: Points -> mask of the test points, (points,); the splits of arXiv 2411.10272
HELD_OUT = {"last 20 %": last_fifth, "largest model": lambda p: p.n0 == p.n0.max(), "largest rate": largest_rate}


def held_out(law, points, **how):
    """{split: judge on its test points of a fit (**how: as for `fit`) to the others}. None where `check` refuses the
    others, and where they leave the test open: a curve that "power" has not seen, or the third size, where "p2" has
    three constants (N_C, alpha, E) for what it sees of two. UserError: no scipy."""
    law, found = LAWS[law] if isinstance(law, str) else law, dict.fromkeys(HELD_OUT)
    for name, split in HELD_OUT.items():
        test, rest = points.where(split(points)), points.where(~split(points))
        try:
            check(law, points), check(law, rest)
        except UserError:
            continue
        if law.per_curve:
            known = np.isin(test.curve, rest.curve).all()
        else:                                                   # at constants as good as any, for points about 1
            theta = law.in_units(np.full(len(law.names), .3), -law.split(points)[1].mean(0))
            known = len(unmoving(law, theta, rest)) == len(unmoving(law, theta, points))
        if known and len(test.loss):
            found[name] = judge(fit(law, rest, **how), test)
    return found


def tokens_needed(fit, target, n0=np.nan, rho=np.nan, before=np.nan, *, n=np.nan, control=np.nan, curve=0, theta=None):
    """The D at which the law reaches the loss `target`, in closed form. target … curve: numbers or arrays that
    broadcast to a shape S; theta: fit.theta, or samples (n, constants) of the bootstrap -> tokens, theta's leading
    shape + S. inf: endless tokens do not reach it. Never 0, as the law is infinite at D -> 0: a target that the model
    meets right after the cut gives few tokens, fewer than any measured. nan: something that the law needs is not given.
    A control's loss is taken as it is given, though it falls with D."""
    law, theta = fit.law, fit.theta if theta is None else theta
    fields = np.broadcast_arrays(target, 1., n0, n, rho, before, control, curve)
    at = Points(*map(np.ravel, fields))
    base, logs = law.split(at)
    values, moving = law.each(theta, at), law.mask[:, [*law.exponents].index("beta")] > 0
    pieces = law.pieces(values, logs)[0]                                                        # at D = 1
    left = np.maximum(at.loss - base - pieces[..., ~moving].sum(-1), 0)
    with np.errstate(all="ignore"):
        found = (pieces[..., moving].sum(-1) / left) ** (1 / values[..., law.names.index("beta")])
    found = np.where(left == 0, np.inf, found)
    return found.reshape(np.shape(theta)[:-1] + fields[0].shape)[()]

"""The laws against formulas written out, planted constants, central differences and numbers computed by hand."""
import dataclasses
import re

import numpy as np
import pytest
from scipy import stats

from common import UserError
from experiments import scaling_laws
from experiments.scaling_laws import (
    HELD_OUT,
    HUBER,
    LAWS,
    Fit,
    Points,
    bootstrap,
    fit,
    held_out,
    interval,
    judge,
    tokens_needed,
    unpinned,
)

SIZES, RATES, TOKENS = (1e8, 3e8, 1e9), (.15, .25, .35), np.geomspace(2e6, 2e8, 10)
PLANTED = {"N_C": 3e3, "D_C": 400., "E": -.5, "gamma": -1.3, "delta": .05, "alpha": .4, "beta": .3,    # of P² laws
           "A": 90., "B": 300.}
FORMULAS = {  # by hand, of constants c and points p
    "p2": lambda c, p: p.before + (1 / p.rho) ** c["gamma"] * (1 / p.n0) ** c["delta"] * (
        c["N_C"] / p.n0 ** c["alpha"] + c["D_C"] / p.tokens ** c["beta"] + c["E"]),
    "p2, one rate": lambda c, p: p.before + (1 / p.n0) ** c["delta"] * (
        c["N_C"] / p.n0 ** c["alpha"] + c["D_C"] / p.tokens ** c["beta"] + c["E"]),
    "p2, one size": lambda c, p: p.before + (1 / p.rho) ** c["gamma"] * (c["D_C"] / p.tokens ** c["beta"] + c["E"]),
    "p2, outside": lambda c, p: p.before + c["E"] + (1 / p.rho) ** c["gamma"] * (1 / p.n0) ** c["delta"] * (
        c["N_C"] / p.n0 ** c["alpha"] + c["D_C"] / p.tokens ** c["beta"]),
    "p2, rate only": lambda c, p: p.before + (1 / p.rho) ** c["gamma"] * (
        c["N_C"] / p.n0 ** c["alpha"] + c["D_C"] / p.tokens ** c["beta"] + c["E"]),
    "chinchilla": lambda c, p: c["E"] + c["A"] / p.n ** c["alpha"] + c["B"] / p.tokens ** c["beta"],
    "over-trained": lambda c, p: c["E"] + c["A"] / p.n ** c["beta"] + c["B"] / p.tokens ** c["beta"],
    "compute": lambda c, p: c["E"] + c["B"] / (p.n * p.tokens) ** c["beta"]}
for name in ("p2", "p2, one rate", "p2, one size"):
    FORMULAS[f"{name}, control"] = lambda c, p, name=name: FORMULAS[name](c, p) - p.before + p.control
EXPONENTS = {"alpha", "beta", "gamma", "delta"}


def constants_of(name):
    planted = PLANTED | ({} if name.startswith("p2") else {"E": 1.7}) | ({"B": 3e4} if name == "compute" else {})
    return {constant: planted[constant] for constant in LAWS[name].names}


def grid(sizes=SIZES, rates=RATES, tokens=TOKENS):
    """One curve per size and rate; the losses are still 0."""
    return Points.of([dict(loss=0., tokens=d, n0=n0, n=n0 * (1 - rho), rho=rho, before=3 - .1 * np.log(n0 / 1e8),
                           control=2.9 - .1 * np.log(n0 / 1e8) - .02 * np.log(d / 1e6), curve=len(rates) * i + j)
                      for i, n0 in enumerate(sizes) for j, rho in enumerate(rates) for d in tokens])


def planted(name, points=None, noise=0., seed=0, **constants):
    """Points whose losses are the formula's, and noise (nats)."""
    points = points or grid((3e8,) if "one size" in name else SIZES, (.25,) if "one rate" in name else RATES)
    errors = noise * np.random.default_rng(seed).standard_normal(len(points.loss))
    return with_loss(points, FORMULAS[name](constants_of(name) | constants, points) + errors)


def with_loss(points, loss):
    return dataclasses.replace(points, loss=loss)


def theta_of(name):
    """The fitted parameterization of the planted constants: logarithms of all but E, gamma and delta of the P² laws."""
    signed = {"gamma", "delta"} | ({"E"} if name.startswith("p2") else set())
    return np.array([v if constant in signed else np.log(v) for constant, v in constants_of(name).items()])


# -- the laws

@pytest.mark.parametrize("name", FORMULAS)
def test_predictions_are_the_written_formulas(name):
    points = grid()
    expected = FORMULAS[name](constants_of(name), points)
    np.testing.assert_allclose(LAWS[name].predict(theta_of(name), points), expected, rtol=1e-12)
    several = LAWS[name].predict(np.stack([theta_of(name)] * 2), points)                   # samples of a bootstrap
    np.testing.assert_allclose(several, np.stack([expected] * 2), rtol=1e-12)
    assert Fit(LAWS[name], theta_of(name), "linear", 0, True).constants == pytest.approx(constants_of(name))
    assert {*FORMULAS, "power"} == {*LAWS}


def test_power_law_has_constants_of_every_curve():
    points = Points.of([dict(loss=0., tokens=d, curve=c) for c in (0, 2, 1) for d in (4., 16.)])
    theta = np.log([2, 1, .5, 8, 3, 1])                                     # B, E, beta of curve 0, of curve 1
    assert LAWS["power"].predict(theta, points) == pytest.approx([2, 1.5, np.nan, np.nan, 5, 3.5], nan_ok=True)


@pytest.mark.parametrize("name", FORMULAS)
def test_jacobians_are_the_central_differences(name):
    law, rng = LAWS[name], np.random.default_rng(0)
    points = grid(sizes=(2., 5.), rates=(.2, .5), tokens=np.array([1.5, 3., 9.]))     # small: differences are exact
    for _ in range(5):
        theta = rng.normal(0, .6, len(law.names))
        step = 1e-5 * np.eye(len(theta))
        expected = (law.predict(theta + step, points) - law.predict(theta - step, points)).T / 2e-5
        np.testing.assert_allclose(law.jacobian(theta, points), expected, rtol=1e-6, atol=1e-7)
        assert np.abs(expected).max(0).min() > 0                                      # every constant has an effect


# -- fit

@pytest.mark.parametrize("name", FORMULAS)
def test_planted_constants_are_found_without_noise(name):
    points = planted(name)
    found = fit(name, points, starts=12)
    assert found.converged and found.sse < 1e-12 and judge(found, points)["r2"] > 1 - 1e-9
    np.testing.assert_allclose(found.law.predict(found.theta, points), points.loss, rtol=1e-6)
    for constant, value in constants_of(name).items():
        assert found.constants[constant] == pytest.approx(value, rel=1e-3), constant
    if "one" not in name:
        far = planted(name, grid(sizes=(3e9,), rates=(.5,), tokens=np.array([1e9, 1e10])))
        np.testing.assert_allclose(found.law.predict(found.theta, far), far.loss, rtol=1e-4)


def test_power_law_is_fitted_curve_by_curve():
    tokens, c = np.tile(TOKENS, 2), np.repeat([1, 3], 10)
    points = Points.of([dict(loss=2 + k + 50 * k * d ** -.4, tokens=d, curve=k) for k, d in zip(c, tokens)])
    found = fit("power", points, starts=8)
    assert found.constants["E"] == pytest.approx([np.nan, 3, np.nan, 5], rel=1e-4, nan_ok=True)
    assert found.constants["B"] == pytest.approx([np.nan, 50, np.nan, 150], rel=1e-3, nan_ok=True)
    assert np.isnan(found.law.predict(found.theta, dataclasses.replace(points, curve=c + 1))).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_start_with_planted_exponents(name, monkeypatch):
    points = planted(name)
    scaled, units = LAWS[name].scaled(points)
    monkeypatch.setattr(scaling_laws, "STARTS", {e: (PLANTED[e], PLANTED[e]) for e in EXPONENTS})
    start = scaling_laws.draw(LAWS[name], scaled, np.random.default_rng(0))
    np.testing.assert_allclose(LAWS[name].rescaled(start, units, -1), theta_of(name), rtol=1e-6)
    there_and_back = LAWS[name].rescaled(LAWS[name].rescaled(start, units, -1), units, 1)
    np.testing.assert_allclose(there_and_back, start, rtol=1e-9)


@pytest.mark.parametrize("E", [-2., -.5, .8])
def test_e_of_either_sign_is_found(E):
    assert fit("p2", planted("p2", E=E), starts=12).constants["E"] == pytest.approx(E, rel=1e-4)


def test_exponents_are_inside_their_intervals_under_noise():
    points = planted("p2", noise=.005)
    found = fit("p2", points, starts=8)
    low, high = interval(bootstrap(found, points, 200), .98)
    for constant, a, b, value in zip(found.law.names, low, high, theta_of("p2")):
        if constant in EXPONENTS:
            assert a <= value <= b, constant
            assert b - a < {"alpha": 5, "beta": .3, "gamma": .2, "delta": .1}[constant]          # and these are short
    assert judge(found, points)["nats"] == pytest.approx(.004, abs=.0008)                        # σ √(2/π)


def test_intervals_cover_the_planted_constants():
    """Of 60 data sets 47 to 59, the middle 99 % of a binomial at .9: intervals neither short nor endless. (Of 240 it
    was 85 % for beta and 93 % for the loss at a model, and a D, larger than any in the data.)"""
    low, high = stats.binom.interval(.99, 60, .9)
    assert (low, high) == (47, 59)
    far = planted("p2", grid(sizes=(2e9,), rates=(.35,), tokens=np.array([5e8])))
    covered = np.zeros(2)
    for seed in range(60):
        points = planted("p2", noise=.005, seed=seed)
        found = fit("p2", points, starts=4, seed=seed)
        samples = bootstrap(found, points, 60, seed, perturbed=0)
        (a, c), (b, d) = interval(np.stack([samples[:, -1], found.law.predict(samples, far)[:, 0]], 1))
        covered += a <= np.log(PLANTED["beta"]) <= b, c <= far.loss[0] <= d
    assert (low <= covered).all() and (covered <= high).all(), covered


def test_fits_repeat_and_order_does_not_matter():
    points = planted("p2", noise=.005)
    found = fit("p2", points, starts=8)
    assert (fit("p2", points, starts=8).theta == found.theta).all()
    order = np.random.default_rng(0).permutation(len(points.loss))
    for other in (fit("p2", points, starts=8, seed=5), fit("p2", points.where(order), starts=8)):
        np.testing.assert_allclose(other.theta, found.theta, rtol=1e-3)
        assert other.sse == pytest.approx(found.sse, rel=1e-9)
    samples = bootstrap(found, points, 3)
    assert (bootstrap(found, points, 3) == samples).all() and (bootstrap(found, points, 3, seed=1) != samples).all()


@pytest.mark.parametrize("name, coefficient", [("p2", "D_C"), ("p2, outside", "D_C"), ("chinchilla", "B")])
def test_tokens_in_millions_rescale_one_constant_only(name, coefficient):
    points = planted(name, noise=.005)
    one = fit(name, points, starts=8)
    other = fit(name, dataclasses.replace(points, tokens=points.tokens / 1e6), starts=8)
    for constant, value in one.constants.items():
        factor = 1e6 ** -one.constants["beta"] if constant == coefficient else 1
        assert other.constants[constant] == pytest.approx(value * factor, rel=1e-3), constant


def test_huber_loss_and_an_outlier():
    clean = planted("p2", noise=.002)
    spoiled = with_loss(clean, clean.loss + .3 * (np.arange(len(clean.loss)) == 42))
    apart = {loss: np.abs(np.subtract(*(f.law.predict(f.theta, clean) for f in (
        fit("p2", points, loss, starts=6) for points in (clean, spoiled))))).max() for loss in ("linear", "huber")}
    assert apart["huber"] < apart["linear"] / 3, apart
    least, squares = (judge(fit("p2", spoiled, loss, starts=6), spoiled) for loss in ("huber", "linear"))
    assert least["huber"] < .9 * squares["huber"]                                          # what it is to minimise
    same = [fit("p2", clean, loss, starts=6).theta for loss in ("linear", "huber")]         # all errors are below HUBER
    assert judge(fit("p2", clean, starts=6), clean)["worst"] < HUBER
    np.testing.assert_allclose(*same, rtol=1e-2)


def test_a_curve_that_only_falls_is_fitted_too():
    """The logarithm is the limit of a power law with beta -> 0 and E -> -inf: constants may run away, losses not."""
    points = dataclasses.replace(grid(sizes=(3e8,)), before=np.zeros(30))
    points = with_loss(points, (6 - .2 * np.log(points.tokens)) * points.rho)
    found = fit("p2, one size", points, starts=8)
    assert judge(found, points)["worst"] < 1e-3 and np.isfinite([*found.theta, *found.constants.values()]).all()


def test_the_over_trained_law_is_chinchillas_with_one_exponent_and_the_papers():
    """On chinchilla's own losses with alpha = beta it finds chinchilla's constants; its losses are those of the formula
    in C and M; and where the exponents differ it is off."""
    one = planted("chinchilla", alpha=.3)
    found = fit("over-trained", one, starts=8)
    assert found.constants == pytest.approx({"A": 90, "B": 300, "E": 1.7, "beta": .3}, rel=1e-3)
    C, M, eta = 6 * one.n * one.tokens, one.tokens / one.n, .15
    a, b = 90 * 6 ** eta, 300 * 6 ** eta
    np.testing.assert_allclose(one.loss, 1.7 + (a * M ** eta + b * M ** -eta) * C ** -eta, rtol=1e-12)
    two = planted("chinchilla", alpha=.05, A=9.)
    assert judge(fit("over-trained", two, starts=8), two)["nats"] > 3 * judge(fit("chinchilla", two, starts=8),
                                                                             two)["nats"]


def test_the_compute_law_is_off_where_the_share_of_tokens_counts():
    same = planted("compute")
    assert judge(fit("chinchilla", same, starts=8), same)["nats"] > 1e-3             # a product is no sum
    points = planted("chinchilla", A=0.)                                             # only tokens count
    assert judge(fit("compute", points, starts=8), points)["nats"] > .1
    # At one size it is the power law of the tokens, and is fitted.
    alone = planted("compute", grid(sizes=(3e8,), rates=(.25,)))
    assert fit("compute", alone, starts=8).constants["beta"] == pytest.approx(.3, rel=1e-3)


# -- what is refused

RUN = dict(loss=3., tokens=2e6, n0=1e8, n=8e7, rho=.2, before=2.8, control=2.7, curve=0)


def changed(index=slice(0, 2), **fields):
    points = planted("p2")
    for field, value in fields.items():
        values = getattr(points, field).copy()
        values[index] = value
        points = dataclasses.replace(points, **{field: values})
    return points


@pytest.mark.parametrize("name, points, says", [
    ("p3", grid(), "a law is one of p2; p2, one rate;"),
    ("p2", changed(rho=0), "2 of 90 points have 0 as rho, which .* divides by; runs that cut nothing are the control"),
    ("p2", changed(tokens=0), "2 of 90 points have 0 as tokens.*right after the cut there are 0: leave them out"),
    ("p2", changed(n0=-1), "2 of 90 points have -1 as n0"),
    ("p2", changed(loss=np.nan), "2 of 90 points have nan as loss, which law 'p2' needs"),
    ("p2", changed(before=np.inf), "have inf as before"),
    ("p2, control", changed(control=np.nan), "2 of 90 points have nan as control, which law 'p2, control' needs"),
    ("chinchilla", changed(n=np.nan), "have nan as n, which law 'chinchilla' divides by"),
    ("p2", planted("p2").where(slice(0, 90, 15)), "6 points are too few for the 7 constants of law 'p2'; evaluate"),
    ("power", grid(tokens=TOKENS[:2]), "2 points of a curve are too few for the 3 constants of law 'power'"),
    ("power", grid().where(slice(0)), "0 points of a curve are too few"),
    ("p2", grid(rates=(.25,)), "all points have rho 0.25, which leaves gamma .*; add .* 8%, or fit law 'p2, one rate'"),
    ("p2", grid(rates=(.25, .26)), "all points have rho 0.25, which leaves gamma"),        # rounding is not two rates
    ("p2, rate only", grid(rates=(.25,)), "leaves gamma of law 'p2, rate only' open.*'p2, one rate'"),
    ("p2, control", grid(rates=(.25,)), "or fit law 'p2, one rate, control'"),
    ("p2", grid(sizes=(3e8,)), "all points have n0 3e.08, which leaves delta, alpha .*or fit law 'p2, one size'"),
    ("p2, outside", grid(sizes=(3e8,), rates=(.25,)), "rho 0.25, n0 3e.08, which leaves gamma, delta, alpha.*'power'"),
    ("p2, one rate", grid(sizes=(3e8,), rates=(.25,)), "leaves delta, alpha of law.*or fit law 'power'"),
    ("chinchilla", grid(sizes=(1e8,), rates=(.25,)), "all points have n 7.5e.07, which leaves alpha.* law 'power'"),
    ("compute", grid(sizes=(1e8,), rates=(.25,), tokens=TOKENS[[0, 0, 0]]),
     "all points have n 7.5e.07, tokens 2e.06, which leaves beta of law 'compute' open"),
    ("over-trained", changed(n=0), "2 of 90 points have 0 as n, which law 'over-trained' divides by"),
    ("p2", grid(tokens=TOKENS[:1]), "all points have tokens 2e.06, which leaves beta of law 'p2' open; .* over 8%$")])
def test_refusals_give_numbers_and_a_remedy(name, points, says):
    with pytest.raises(UserError, match=says) as problem:
        fit(name, points)
    assert "\n" not in str(problem.value)


def test_other_refusals():
    with pytest.raises(UserError, match="a loss linear or huber"):
        fit("p2", planted("p2"), "cauchy")
    with pytest.raises(UserError, match="law 'power' is not bootstrapped"):
        bootstrap(fit("power", planted("p2"), starts=1), planted("p2"))


# -- judge

def test_judge_gives_the_numbers_computed_by_hand():
    law = LAWS["power"]                                      # one curve, D^-.5: predicts 3 + 1000 / sqrt(D)
    points = Points.of([dict(loss=loss, tokens=d, curve=c) for loss, d, c in (
        (3.505, 4e6, 0), (4.02, 1e6, 0), (3.25, 16e6, 0), (3.18, 25e6, 1), (3.1, 1e8, 1))])
    found = judge(Fit(law, np.log([1000, 3, .5] * 2), "linear", 0, True), points)
    # errors -.005 -.02 0 .02 0; mean loss 3.411; squared deviations .008836 .370881 .025921 .053361 .096721
    assert found["r2"] == pytest.approx(1 - .000825 / .55572)
    assert found["huber"] == pytest.approx((.0000125 + 2 * (.01 * .02 - .00005)) / 5)
    # slopes of the error: curve 0 (.015 / 3, .005 / 12), curve 1 (-.02 / 75); not from curve to curve
    assert found["asd"] == pytest.approx((.015 / 3 + .005 / 12 + .02 / 75) / 3)
    assert found["nats"] == pytest.approx(.009) and found["worst"] == pytest.approx(.02)
    assert found["percent"] == pytest.approx(20 * (.005 / 3.505 + .02 / 4.02 + .02 / 3.18))
    assert found["final"] == pytest.approx(100 * (0 / 3.25 + 0 / 3.1) / 2, abs=1e-9)       # the last of each curve
    early = judge(Fit(law, np.log([1000, 3, .5] * 2), "linear", 0, True), points.where([0, 1, 3]))
    assert early["final"] == pytest.approx(100 * (.005 / 3.505 + .02 / 3.18) / 2)
    alone = judge(Fit(law, np.log([1000, 3, .5] * 2), "linear", 0, True), points.where([1, 3]))
    assert np.isnan(alone["asd"]) and np.isfinite(alone["r2"])
    assert np.isnan(judge(Fit(law, np.log([1000, 3, .5]), "linear", 0, True), points)["nats"])      # curve 1 is unknown


# -- bootstrap

@pytest.mark.parametrize("sizes", [3, 2])                                                # two leave N_C, alpha, E open
def test_bootstrap_redraws_the_errors_of_whole_curves(sizes, monkeypatch):
    points = planted("p2", grid(sizes=SIZES[:sizes]), noise=.005)
    found, seen = fit("p2", points, starts=8), []
    refine = scaling_laws.refine

    def noted(law, points, *how):
        seen.append(points.loss)
        return refine(law, points, *how)

    monkeypatch.setattr(scaling_laws, "refine", noted)
    bootstrap(found, points, 30, perturbed=0)
    fitted, slopes = found.law.predict(found.theta, points), found.law.jacobian(found.theta, points)
    errors, drawn = points.loss - fitted, np.array(seen) - fitted
    slopes /= np.linalg.norm(slopes, axis=0)
    for c in range(3 * sizes):
        own = points.curve == c
        step = np.linalg.lstsq(slopes[~own], errors[~own], rcond=1e-9)[0]              # fitted without the curve
        left_out = errors[own] - slopes[own] @ step
        weights = drawn[:, own] @ left_out / (left_out @ left_out)
        np.testing.assert_allclose(drawn[:, own], np.outer(weights, left_out), atol=1e-5)
        assert {*np.round(weights ** 2, 2)} == {.5, 1., 1.5} and weights.min() < 0 < weights.max()
    two = points.where(points.curve < 2)
    few = fit("p2, one size", two, starts=4)
    seen.clear()
    bootstrap(few, two, 4, perturbed=0)                                  # two curves: every point by itself
    assert np.linalg.matrix_rank(np.array(seen) - few.law.predict(few.theta, two), tol=1e-6) == 4


def test_interval_is_the_middle_of_the_samples():
    samples = np.stack([np.arange(101.), -np.arange(101.)], 1)
    np.testing.assert_allclose(interval(samples), [[5, -95], [95, -5]])
    np.testing.assert_allclose(interval(samples, .5), [[25, -75], [75, -25]])
    assert interval(np.array([2., np.inf, 1., np.inf, 3.])).tolist() == [1, np.inf]


def test_noise_that_a_curve_shares_makes_intervals_wider():
    rng, quiet = np.random.default_rng(0), planted("p2", noise=.003)
    width = {}
    for shared in (0, .02):
        points = with_loss(quiet, quiet.loss + shared * rng.standard_normal(9)[quiet.curve])
        found = fit("p2", points, starts=8)
        losses = found.law.predict(bootstrap(found, points, 30, perturbed=0), points)
        width[shared] = np.ptp(interval(losses), axis=0)
    assert np.median(width[.02] / width[0]) > 3


# -- unpinned

def sentences(name, points, n=40):
    found = fit(name, points, starts=8)
    return unpinned(found, points, bootstrap(found, points, n, perturbed=0))


def test_two_sizes_leave_three_constants_open():
    two = "\n".join(sentences("p2", planted("p2", grid(sizes=SIZES[:2]), noise=.005)))
    assert re.search("^N_C, E, alpha can change with no loss changing$", two, re.M)
    three = "\n".join(sentences("p2", planted("p2", noise=.001)))
    assert "no loss changing" not in three and not re.search("^(beta|gamma) lies", three, re.M)
    wide = planted("p2, one size", grid(sizes=(3e8,), tokens=np.geomspace(1e5, 1e10, 30)), noise=1e-4)
    assert all("move together" in sentence for sentence in sentences("p2, one size", wide))


def test_unpinned_sentences():
    flat = planted("p2, one size", noise=.03, gamma=-.02)
    assert re.search("gamma lies between -.*: its sign is open", "\n".join(sentences("p2, one size", flat)))
    noisy = "\n".join(sentences("p2, one size", planted("p2, one size", noise=.1)))
    assert re.search("beta lies between .*, a range wider than its value", noisy)
    found = Fit(LAWS["chinchilla"], np.log([1e-30, 300., 1.7, .4, .3]), "linear", 0, True)
    samples = found.theta + .001 * np.random.default_rng(0).standard_normal((50, 5))
    away = samples - found.theta
    samples[:, 4] = found.theta[4] + away[:, 1] + .2 * away[:, 4]           # correlation 1 / √1.04, about
    samples[:, 2] = found.theta[2] + away[:, 1] + .6 * away[:, 2]           # 1 / √1.36
    assert [re.sub("0.9[78].", "0.98", sentence) for sentence in unpinned(found, planted("chinchilla"), samples)] == [
        "A can change with no loss changing", "alpha can change with no loss changing",
        "log B and log beta move together (correlation 0.98), only jointly pinned"]


# -- hold out

TINY = Points.of([RUN | dict(tokens=d, n0=n0, rho=rho, curve=c) for c, n0, rho, tokens in (
    (0, 1e8, .20, (3, 1, 2)), (1, 1e8, .36, (1, 2, 3, 4, 5, 6, 7, 8)), (2, 2e8, .20, (4,)), (3, 2e8, .34, (2, 1)),
    (4, 2e8, .35, (1,)), (5, 3e8, .20, (1,))) for d in tokens])


def test_held_out_masks_are_the_written_ones():
    marks = {name: "".join(".x"[int(m)] for m in split(TINY)) for name, split in HELD_OUT.items()}
    assert marks == {"last 20 %": "x.." + "......xx" + "x" + "x." + "x" + "x",
                     "largest model": "..." + "........" + "." + ".." + "." + "x",
                     # each model's own largest and what rounding leaves near it, but not .20 of the third model
                     "largest rate": "..." + "xxxxxxxx" + "." + "xx" + "x" + "."}
    ten = grid(sizes=(1e8,), rates=(.25,))
    assert HELD_OUT["last 20 %"](ten).tolist() == [False] * 8 + [True] * 2
    assert HELD_OUT["last 20 %"](ten.where(slice(None, None, -1))).tolist() == [True] * 2 + [False] * 8


def test_the_first_tenth_is_that_of_each_curves_tokens():
    points = Points.of([dict(loss=1., tokens=d, curve=c) for c, tokens in enumerate(((1, 10, 5), (99, 100, 1000, 101)))
                        for d in tokens])
    assert scaling_laws.without_start(points).tolist() == [False, True, True, False, False, True, True]
    assert scaling_laws.without_start(points, .5).tolist() == [False, True, False, False, False, True, False]
    # A start that follows no law spoils the fit, and its end is predicted without.
    whole = planted("chinchilla", grid(tokens=np.geomspace(2e6, 2e8, 10)))
    late = scaling_laws.without_start(whole)
    spoiled = with_loss(whole, whole.loss + .5 * ~late)
    [before] = held_out("chinchilla", spoiled, ("largest model",), starts=4).values()
    [after] = held_out("chinchilla", spoiled.where(late), ("largest model",), starts=4).values()
    assert after["final"] < 1e-3 < .1 < before["final"]


def test_test_points_are_not_seen():
    points = planted("p2", grid(sizes=(*SIZES, 3e9)), noise=.005)
    whole = held_out("p2", points, starts=4)
    for name, split in HELD_OUT.items():
        test = split(points)
        moved = held_out("p2", with_loss(points, points.loss + 1. * test), starts=4)[name]
        apart = fit("p2", points.where(~test), starts=4)
        assert whole[name] == pytest.approx(judge(apart, points.where(test)), rel=1e-6)
        errors = apart.law.predict(apart.theta, points.where(test)) - points.loss[test]
        assert moved["nats"] == pytest.approx(np.abs(errors - 1).mean(), rel=1e-6)
        assert whole[name]["nats"] < .02


def test_open_splits_are_not_judged():
    def judged(name, points):
        return "".join(".x"[found is not None] for found in held_out(name, points, starts=1).values())
    points = planted("p2", noise=.005)
    assert judged("power", points) == "x.."                                             # curves that it has not seen
    assert judged("p2", points) == "x.x"                        # two sizes leave N_C, alpha and E open: no third
    assert judged("p2, outside", points) == judged("chinchilla", points) == "xxx"       # these they pin
    assert judged("p2", planted("p2", grid(sizes=(*SIZES, 3e9)))) == "xxx"
    assert judged("p2", points.where((points.n0 < 1e9) & (points.rho < .3))) == "x.."  # without the largest one is left
    assert judged("p2", points.where(points.rho == .25)) == judged("p2, control", changed(control=np.nan)) == "..."
    assert judged("p2, one size", points.where(points.n0 == 3e8)) == "x.x"
    bare = Points.of([dict(loss=2 + d ** -.1 + n ** -.1, tokens=d, n=n, curve=i) for i, n in enumerate(SIZES)
                      for d in TOKENS])
    assert judged("chinchilla", bare) == "x.."                                          # no n0 and no rho: no largest


# -- plan

@pytest.mark.parametrize("name", FORMULAS)
def test_tokens_needed_inverts_the_prediction(name):
    points = planted(name, grid())
    planned = tokens_needed(Fit(LAWS[name], theta_of(name), "linear", 0, True), points.loss, points.n0, points.rho,
                            points.before, n=points.n, control=points.control)
    np.testing.assert_allclose(planned, points.tokens, rtol=1e-9)


def test_tokens_needed_at_its_limits():
    found, p = Fit(LAWS["p2"], theta_of("p2"), "linear", 0, True), planted("p2").where([0])
    floor = FORMULAS["p2"](constants_of("p2"), dataclasses.replace(p, tokens=np.array([np.inf])))[0]
    at = dict(n0=1e8, rho=.15, before=3.)
    tokens = tokens_needed(found, [0., floor - 1e-6, floor + 1e-6, floor + .1, 50.], **at)
    assert tokens.shape == (5,) and np.isinf(tokens).tolist() == [True, True, False, False, False]
    assert (np.diff(tokens[1:]) < 0).all() and 0 < tokens[4] < 1
    assert np.ndim(tokens_needed(found, 3.1, **at)) == 0 and tokens_needed(found, p.loss[0], **at) == pytest.approx(2e6)
    assert np.isnan(tokens_needed(found, 3.1, n0=1e8, rho=.15))
    chinchilla = Fit(LAWS["chinchilla"], theta_of("chinchilla"), "linear", 0, True)
    assert tokens_needed(chinchilla, 1.7 + 90 * 1e8 ** -.4 + .5, n=1e8) == pytest.approx((300 / .5) ** (1 / .3))
    power = Fit(LAWS["power"], np.log([1, 1, 1, 8, 3, 1]), "linear", 0, True)
    assert tokens_needed(power, [5., 2.], curve=1) == pytest.approx([4, np.inf])


def test_bootstrapped_tokens_needed_surround_the_planted_number():
    points = planted("p2", noise=.003)
    found = fit("p2", points, starts=8)
    target, at = points.loss[5] + np.array([0, .05]), dict(n0=1e8, rho=.15, before=3.)
    samples = tokens_needed(found, target, theta=bootstrap(found, points, 60, perturbed=0), **at)
    (low, _), (high, _) = interval(samples)
    assert samples.shape == (60, 2) and low < tokens_needed(found, target, **at)[0] < high < 2 * low


# -- trends of arXiv 2411.10272

def test_the_trends_of_the_law_are_found():
    """A higher rate costs loss and tokens; a larger model needs fewer tokens relative to its size."""
    points = planted("p2", noise=.005)
    found = fit("p2", points, starts=8)
    rates, sizes = grid(sizes=(3e8,), rates=(.1, .2, .3, .4), tokens=[1e7]), grid(rates=(.25,), tokens=[1e7])
    assert (np.diff(found.law.predict(found.theta, rates) - rates.before) > 0).all()
    assert (np.diff(found.law.predict(found.theta, sizes) - sizes.before) < 0).all()
    assert (np.diff(found.law.predict(found.theta, grid(sizes=(3e8,), rates=(.25,)))) < 0).all()
    needed = tokens_needed(found, 2.9 + .2, 3e8, rates.rho, 2.9)
    assert (np.diff(needed) > 0).all() and np.isfinite(needed[:2]).all()
    assert (np.diff(tokens_needed(found, .2, sizes.n0, .25, 0.) / sizes.n0) < 0).all()

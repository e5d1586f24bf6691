"""What the papers claim, and which runs can tell: kinds of runs, and claims as pairs of kinds.

    python -c "from experiments.claims_runs import CLAIMS; print(*CLAIMS.values(), sep='\\n')"

A run is a *kind* (how it is trained: a row of KINDS) at a *place* (a size, and a number of tokens
per parameter of the target: `Scale`) with a seed. A run may need others: a teacher, or a model that
is cut or grown for it. They are runs of the same place and seed, so that all of their cost is counted. A
claim is a list of pairs: it says that the first kind ends with a lower loss than the second, or at
most `margin` above it. Claims 1 to 6 and 11 are from IDEA Prune (arXiv 2503.05920), 7 and 9 from
Adapt-Pruner (2502.03460), 8 from The Journey Matters (2501.12486), 10 from the sources that
score.py names, 14 from bert2BERT (2110.07143), 16 and 17 from SPDF (2303.10464); 12, 13, 15 and 18
are ours. Not here: running (experiments/claims.py), statistics (experiments/claims_statistics.py).
"""
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import allocate
import data
import model as models
import prune
import train
from common import UserError
from formats.tokenizer import open_tokenizer
from methods import grow, target_shape
from schedule import PLANS

RECOVERY_SEED = 100                    # is added behind a cut, for another order of the data
WARM = 70                              # steps: the shortest first warm-up
MAX_EPOCHS = 4                         # so far repeated text is as good as new (arXiv 2305.16264)


@dataclass(frozen=True)
class Scale:
    """A size (a preset of model.py), tokens and seeds. Ratios are tokens per parameter of the
    target."""
    size: str
    ratio: float                       # of all claims but 9
    long: float                        # of claim 9
    ratios: tuple[float, ...]          # of claim 5
    batch_tokens: int                  # per step
    micro_batch: int                   # sequences per forward pass
    seeds: int                         # `experiments.claims power` says what so many can see
    eval_windows: int = 64             # of the hold-out, while a run trains
    final_windows: int = 2048          # of the hold-out at the end, by which claims are judged
    data: str = "stdlib"
    claims: tuple[int, ...] = (1, 3, 4, 5, 2, 11, 13, 10, 6, 7, 8, 9, 12)      # in order of work
    # Claims that run only if --claims names them. No report shows them.
    on_request: tuple[int, ...] = (14, 15, 16, 17, 18)
    only: tuple[str, ...] = ()         # the only kinds to run; empty: all that the claims compare


# The kinds that are a plan with its own settings, and those that claim 13 also runs at other
# learning rates.
PLAIN = ("scratch", "naive", "oneshot", "idea", "idea-kd")
RIVAL_SCORES = ("activation", "taylor", "flap", "random")
WAYS = ("fresh", "copy", "split", "aki")               # to grow
SHEAR_RATE = .1                        # of the weights while masks are learned, times the preset's
SPARSE = (.5, .75)                                     # shares of weights that SPDF holds at zero
RATED = ("scratch", "kd", "naive", "idea", "adapt", "cut-annealed", "scratch-wsd", "idea-wsd")
SCALES = {
    # With batches of 4,096 tokens (404 steps at 4x16 and 100) all kinds ended 0.26 to 0.40 nats
    # higher.
    "cpu": Scale("4x16", 100, 400, (25, 100, 400), 2**10, 8, 5),
    "gpu": Scale("10m", 14, 14, (3.5, 7, 14), 2**16, 64, 3, data="packages"),
    "quick": Scale("toy", 60, 60, (60,), 2**11, 32, 1, final_windows=256, claims=(1, 3, 4, 5),
                   on_request=(), only=PLAIN),
}


# -- kinds

@dataclass(frozen=True)
class Kind:
    """How a run is trained."""
    plan: str
    settings: dict = field(default_factory=dict)      # of train.py, beside those of the place
    teacher: str | None = None         # the kind that teaches
    # The kind whose model is trained on, and what is done to it before: it is cut to the target, grown,
    # or cut by learned masks, by these settings of prune.py, methods.grow or methods.sheared.
    init: str | None = None
    cut: dict | None = None
    grow: dict | None = None
    shear: dict | None = None
    share: float = 1                   # of the place's tokens
    rate: float = 1                    # times the preset's peak learning rate
    floor: float = .1                  # the last learning rate, as a share of the peak
    # Instead of `share`: spend as much of this ("flops_executed" or "flops_credited") as that kind
    # spent. Of what the two kinds need only the model that one grows from is counted.
    equal: tuple[str, str] | None = None


def kd(**settings):
    """IDEA with distillation from the enlarged model at the end of a cosine of its own."""
    return Kind("idea-kd", settings, teacher="annealed")


def cut(init, share=.5, allocation="uniform-strict", score="sensitivity"):
    """A model of another kind, cut once and trained on."""
    return Kind("scratch", init=init, share=share,
                cut=dict(structure="ffn", score=score, allocate=allocation, mend="none"))


def grown(how, plan="scratch", **more):
    """The target trained on a quarter of the tokens, grown to the enlarged model and trained on."""
    return Kind(plan, init="short", grow=dict(how=how, enlarge_ff=train.Train.enlarge_ff), **more)


def window(enlarge_share, prune_share):
    """Plan journey with another window of pruning, in shares of the credited FLOPs. It spends as
    many of them as with the paper's window."""
    shares = dict(enlarge_share=enlarge_share, prune_share=prune_share)
    return Kind("journey", shares, equal=("journey", "flops_credited"))


KINDS = {
    **{plan: Kind(plan) for plan in (*PLAIN, "journey", "adapt")},
    "naive-cold": Kind("naive", dict(rewarm=False)),
    # The enlarged model after half of the tokens: at the end of a cosine of its own; half way along
    # the whole cosine at the same rate; and as it stands in kind idea-kd before the first cut.
    "annealed": Kind("naive", dict(stage="enlarge")),
    "halfway": Kind("idea", dict(stage="enlarge")),
    "captured": Kind("idea-kd", dict(stage="enlarge")),
    "cut-annealed": cut("annealed"),
    "cut-halfway": cut("halfway"),
    "idea-kd-annealed": kd(),
    "kd": Kind("kd", teacher="annealed"),
    "kd-flops": Kind("kd", teacher="annealed", equal=("idea-kd-annealed", "flops_executed")),
    "kd-captured": Kind("kd", teacher="captured"),
    "scratch-flops": Kind("scratch", equal=("idea", "flops_executed")),
    "scratch-kd-flops": Kind("scratch", equal=("idea-kd", "flops_executed")),
    "idea-1.3x": Kind("idea", dict(enlarge_ff=1.3)),
    "idea-5.3x": Kind("idea", dict(enlarge_ff=5.3)),
    "idea-25%": Kind("idea", dict(enlarge_share=.25, prune_share=.3)),     # prune : recover is 2 : 3
    "idea-75%": Kind("idea", dict(enlarge_share=.75, prune_share=.1)),
    "idea-wsd": Kind("idea", dict(shape="wsd"), rate=.5),
    "scratch-wsd": Kind("scratch", dict(shape="wsd"), rate=.5),
    "cut-uniform": cut("annealed", allocation="uniform", score="taylor"),
    "cut-adaptive": cut("annealed", allocation="adaptive", score="taylor"),
    "adapt-1cut": Kind("adapt", dict(cuts=1)),
    "journey-5-25%": window(.05, .2),
    "journey-25-30%": window(.25, .05),
    "journey-50-75%": window(.5, .25),
    "journey-5-75%": window(.05, .7),
    "large": Kind("naive", dict(stage="enlarge", enlarge_ff=5.3), share=2),    # scratch's tokens
    **{f"large-cut-1/{k}": cut("large", 1 / k) for k in (64, 16, 4, 1)},
    **{f"idea-{name}": Kind("idea", dict(score=name)) for name in RIVAL_SCORES},
    "kd-weight-0.9": kd(kd_weight=.9),
    "kd-temperature-2": kd(kd_temperature=2.),
    "kd-to-the-end": kd(drop_teacher=False),
    "kd-linear-40%": kd(size_curve="linear", prune_share=.4),
    "annealed-longer": Kind("naive", dict(stage="enlarge"), share=4),
    "kd-annealed-longer": replace(kd(), teacher="annealed-longer"),
    "kd-floor-1%": replace(kd(), floor=.01),
    "scratch-floor-1%": Kind("scratch", floor=.01),
    "short": Kind("scratch", share=.25),
    # The enlarged model at the end of a cosine over scratch's tokens.
    "enlarged-scratch": Kind("naive", dict(stage="enlarge"), share=2),
    **{f"grown-{how}": grown(how, equal=("enlarged-scratch", "flops_executed")) for how in WAYS},
    # Plan idea with the first half of its enlarged stage spent on the target: .25 before the growth,
    # then .25, .2 and .3 of all tokens.
    "grown-idea": grown("fresh", "idea", settings=dict(enlarge_share=.3333, prune_share=.2667), share=.75),
    "scratch-grown-flops": Kind("scratch", equal=("grown-idea", "flops_executed")),
    # Half of the tokens with random zeros, half with or without them.
    "half": Kind("scratch", share=.5),
    "half-again": Kind("scratch", init="half", share=.5),
    **{f"sparse-{share:.0%}": Kind("scratch", dict(sparse=share), share=.5) for share in SPARSE},
    **{f"sparse-{share:.0%}-kept": Kind("scratch", init=f"sparse-{share:.0%}", share=.5) for share in SPARSE},
    **{f"sparse-{share:.0%}-freed": Kind("scratch", dict(dense=True), init=f"sparse-{share:.0%}", share=.5)
       for share in SPARSE},
    "shear-annealed": Kind("scratch", init="annealed", shear=dict(steps=400), equal=("cut-annealed", "flops_executed")),
}

# Claim 13 compares these kinds at half and at twice of their rate.
RATE_PAIRS = []
for name in RATED:
    for times in (.5, 2):
        other = f"{name}-lr-{times:g}x"
        KINDS[other] = replace(KINDS[name], rate=times * KINDS[name].rate)
        RATE_PAIRS.append((name, other))


# -- claims

@dataclass(frozen=True)
class Claim:
    number: int
    text: str
    pairs: tuple[tuple[str, str], ...]    # of kinds
    by_factor: bool = False            # the verdict is about tokens to equal loss, not about pairs
    margin: float = 0                  # nats per token: "near-optimal" is at most so far above (ours)
    place: Literal["ratio", "long", "ratios"] = "ratio"                # which of Scale's
    # Pairs that have records at Scale's other lengths are judged there too; no run is made for that.
    elsewhere: bool = False
    ours: bool = False                 # not from a paper, and not in the short table


ALL_CLAIMS = (
    Claim(1, "one integrated cosine beats two cycles, at equal tokens",
          (("oneshot", "naive"), ("idea", "naive"))),
    Claim(2, "an intermediate checkpoint is a better seed for pruning than the converged one",
          (("cut-halfway", "cut-annealed"),)),
    Claim(3, "iterative removal beats one-shot", (("idea", "oneshot"),)),
    Claim(4, "pruning with distillation beats pruning alone, and distillation from scratch with the "
             "same teacher",
          (("idea-kd", "idea"), ("idea-kd-annealed", "idea"), ("idea-kd", "kd-captured"),
           ("idea-kd-annealed", "kd"), ("idea-kd-annealed", "kd-flops"),
           ("kd-annealed-longer", "idea")), elsewhere=True),
    Claim(5, "IDEA with distillation beats training from scratch, at equal own tokens and at equal "
             "FLOPs",
          (("idea", "scratch"), ("idea-kd", "scratch"), ("idea-kd-annealed", "scratch"),
           ("idea", "scratch-flops"), ("idea-kd", "scratch-kd-flops")), place="ratios"),
    Claim(6, "enlarging 2.6 times for half of the tokens is near-optimal, and so is a cosine",
          (*[("idea", f"idea-{other}") for other in ("1.3x", "5.3x", "25%", "75%", "wsd")],
           ("scratch", "scratch-wsd")), margin=.01),
    Claim(7, "adaptive shares beat uniform ones, and incremental cuts one, through a whole recovery",
          (("cut-adaptive", "cut-uniform"), ("adapt", "adapt-1cut"))),
    Claim(8, "pruning from 25 % to 75 % of the compute is near-optimal, at equal credited FLOPs",
          tuple(("journey", f"journey-{other}") for other in ("5-25%", "25-30%", "50-75%", "5-75%")),
          margin=.01),
    Claim(9, "cut from a larger trained model, recovery needs far fewer tokens than scratch",
          tuple((f"large-cut-1/{k}", "scratch") for k in (64, 16, 4, 1)), by_factor=True,
          place="long"),
    Claim(10, "IDEA's score is better inside the pipeline than Minitron's, LLM-Pruner's, FLAP's and a "
              "random one",
          tuple(("idea", f"idea-{name}") for name in RIVAL_SCORES)),
    Claim(11, "the mechanism: the second warm-up costs, and so does a second cycle (Adam forgets "
              "before both)",
          (("naive-cold", "naive"), ("oneshot", "naive-cold"))),
    Claim(12, "another teacher, distillation, schedule or learning-rate floor is better (our own "
              "claim)",
          (("kd-weight-0.9", "idea-kd-annealed"), ("kd-temperature-2", "idea-kd-annealed"),
           ("kd-to-the-end", "idea-kd-annealed"), ("kd-linear-40%", "idea-kd-annealed"),
           ("kd-floor-1%", "idea-kd-annealed"), ("kd-annealed-longer", "idea-kd-annealed"),
           ("kd-annealed-longer", "idea"), ("kd-floor-1%", "scratch-floor-1%")), ours=True),
    Claim(13, "the peak learning rates are near-optimal, against half and twice of them (our own "
              "claim; the rates were chosen by these runs)", tuple(RATE_PAIRS), margin=.01, ours=True),
    Claim(14, "a model that grew from a smaller one beats the same model trained from scratch, at equal FLOPs "
              "with those of the smaller one",
          tuple((f"grown-{how}", "enlarged-scratch") for how in WAYS)),
    Claim(15, "an enlarged stage that begins with the grown target costs no loss against plan idea at equal tokens, "
              "nor against scratch at equal FLOPs (our own claim)",
          (("grown-idea", "idea"), ("grown-idea", "scratch-grown-flops")), margin=.01, ours=True),
    Claim(16, "after sparse pretraining, training goes better with the zeros free than held (on the same text)",
          tuple((f"sparse-{share:.0%}-freed", f"sparse-{share:.0%}-kept") for share in SPARSE)),
    Claim(17, "sparse pretraining and dense training after it lose nothing against dense training in two cycles of the "
              "same lengths (on the same text)",
          tuple((f"sparse-{share:.0%}-freed", "half-again") for share in SPARSE), margin=.01),
    Claim(18, "learned masks beat a one-shot cut to the same shape that is not mended, at equal FLOPs with those of "
              "learning (our own claim)",
          (("shear-annealed", "cut-annealed"),), place="long", ours=True),
)
CLAIMS = {claim.number: claim for claim in ALL_CLAIMS}


# -- runs

@dataclass(frozen=True)
class Run:
    """A kind at a place, with a seed."""
    kind: str
    size: str
    ratio: float
    seed: int

    @property
    def name(self):
        return f"{self.kind}-{self.size}-{self.ratio:g}-s{self.seed}".replace("/", "of").replace("%", "")

    def of(self, kind):
        """Another kind at the same place with the same seed."""
        return replace(self, kind=kind)

    def needs(self):
        """The runs whose folders this one begins with or learns from."""
        kind = KINDS[self.kind]
        return [self.of(name) for name in (kind.init, kind.teacher) if name]


def places(claim, scale):
    """The places of a claim's pairs, as a list of (size, ratio)."""
    ratios = getattr(scale, claim.place)
    if not isinstance(ratios, tuple):
        ratios = (ratios,)
    return [(scale.size, ratio) for ratio in ratios]


def pairs(claim, scale):
    """The pairs of a claim that the scale has, as a list of (first kind, second kind, size,
    ratio)."""
    rows = []
    for size, ratio in places(claim, scale):
        for first, second in claim.pairs:
            if not scale.only or {first, second} <= {*scale.only}:
                rows.append((first, second, size, ratio))
    return rows


def runs_of(claim, scale, seeds):
    """The runs that a claim compares, without what they need."""
    runs = []
    for first, second, size, ratio in pairs(claim, scale):
        for seed in range(seeds):
            runs += [Run(first, size, ratio, seed), Run(second, size, ratio, seed)]
    return list(dict.fromkeys(runs))


def in_order(scale, seeds):
    """The order of work: a list of (number of a claim, the runs that it compares at one place).

    The cheapest place comes first and the claims come in the scale's order. So a day's work that is
    stopped after an hour has said something about most of the claims."""
    groups = {}
    for number in scale.claims:
        for run in runs_of(CLAIMS[number], scale, seeds):
            groups.setdefault((number, run.size, run.ratio), []).append(run)

    def price(group):
        _, size, ratio = group
        _, flops = expected(Run("scratch", size, ratio, 0), scale)
        return flops["flops_executed"]

    return [(group[0], groups[group]) for group in sorted(groups, key=price)]


def measures(run):
    """The runs whose records say how many steps this one takes."""
    kind = KINDS[run.kind]
    if kind.equal is None:
        return []
    measuring = [kind.equal[0]]
    if kind.teacher:
        measuring.append(kind.plan)
    # The budget has to pay for the model that one of them grows from.
    measuring += [KINDS[name].init for name in (run.kind, kind.equal[0]) if KINDS[name].grow]
    return [run.of(name) for name in measuring]


def requires(run):
    """All runs whose records must exist before this one can begin."""
    return [*run.needs(), *measures(run)]


def everything(runs):
    """These runs and all that they require, each once, what is required first."""
    ordered = {}

    def visit(run):
        if run not in ordered:
            for other in requires(run):
                visit(other)
            ordered[run] = None

    for run in runs:
        visit(run)
    return list(ordered)


def all_runs(scale, seeds):
    """All runs of the scale's claims with all that they require, each once, what is required
    first."""
    compared = []
    for _, group in in_order(scale, seeds):
        compared += group
    return everything(compared)


# -- settings of a run

def peak_rate(run):
    """The peak learning rate."""
    return train.LEARNING_RATES[run.size] * KINDS[run.kind].rate


def settings_of(run, scale, records, folder="runs/claims"):
    """The settings of train.py for a run, and those of prune.py, methods.grow or methods.sheared for what
    is done to the model before it, or None.

    `records` holds {name: {tag: [records]}} of the runs that this one requires. `folder` is where
    run folders lie."""
    kind = KINDS[run.kind]
    lr = peak_rate(run)
    target, _ = models.preset(run.size, vocabulary(), 1)
    place_steps = run.ratio * target.num_params()["total"] / scale.batch_tokens
    seed = run.seed + (RECOVERY_SEED if kind.init else 0)
    settings = dict(plan=kind.plan, preset=run.size, seed=seed,
               steps=max(1, round(place_steps * kind.share)), lr=lr, min_lr=lr * kind.floor,
               data=scale.data, batch_tokens=scale.batch_tokens, micro_batch=scale.micro_batch,
               eval_windows=scale.eval_windows, compile=False, **kind.settings)
    if kind.equal:
        settings["steps"] = equal_steps(run, settings, records, shear_flops(run, scale))
    warmup = first_warmup(kind, settings["steps"], settings["steps"] if kind.init else place_steps)
    if warmup:
        settings["warmup_share"] = warmup
    settings["eval_every"] = max(1, settings["steps"] // 10)
    if kind.teacher:
        settings["teacher"] = f"{folder}/{run.of(kind.teacher).name}"
    if not kind.init:
        return settings, None

    # The run begins with a given model instead of a preset.
    del settings["preset"]
    if not (kind.cut or kind.grow or kind.shear):
        settings["init"] = f"{folder}/{run.of(kind.init).name}"
        return settings, None
    settings["init"] = f"{folder}/from-{run.name}"
    if kind.shear:
        # Another order of the data than the recovery's.
        return settings, dict(kind.shear, init=f"{folder}/{run.of(kind.init).name}", target=run.size, data=scale.data,
                              seed=seed + RECOVERY_SEED, batch_tokens=scale.batch_tokens, micro_batch=scale.micro_batch,
                              lr=lr * SHEAR_RATE)
    if kind.grow:
        return settings, dict(kind.grow, init=f"{folder}/{run.of(kind.init).name}", seed=seed, eval_windows=0)
    keep = target.removable_params() / uncut(run).removable_params()
    recipe = dict(kind.cut, init=f"{folder}/{run.of(kind.init).name}", data=scale.data, seed=seed,
                  windows=64, keep=keep, micro_batch=scale.micro_batch)
    return settings, recipe


def equal_steps(run, settings, records, spent_before=0):
    """In how many steps a run with these settings spends what the kind it is compared with spent, if
    `spent_before` is spent already."""
    kind = KINDS[run.kind]
    other, cost = kind.equal
    budget = spent_by(run.of(other), records, cost) - spent_before
    if kind.grow:
        budget -= spent_by(run.of(kind.init), records, cost)
    steps = settings["steps"]
    if kind.teacher:
        # When the teacher is dropped is not known in advance; the run of the plan itself shows it.
        spent = records[run.of(kind.plan).name]["summary"][0][cost]
        return max(1, round(steps * budget / spent))
    for _ in range(4):                 # steps and FLOPs are nearly proportional: this converges
        spent = predicted(dict(settings, steps=steps), given=grown_config(run))[cost]
        steps = max(1, round(steps * budget / spent))
    return steps


def spent_by(run, records, cost):
    """What a run spent by its records, together with the model that it grew from."""
    spent = records[run.name]["summary"][0][cost]
    kind = KINDS[run.kind]
    if kind.grow:
        spent += spent_by(run.of(kind.init), records, cost)
    return spent


def first_warmup(kind, steps, whole):
    """The warmup_share that makes a run's first warm-up as long as those of the runs it is compared
    with, or None if the default does.

    A warm-up takes a share of `whole`: the steps of a plan of this place with one cycle, or those
    behind a cut. It has at least WARM steps and takes at most .4 of its cycle. Plan naive's first
    cycle is half as long as others; with the default share its warm-up would be half as long, too,
    and naive would lose by that alone."""
    stages = PLANS[kind.plan]
    restarts = [i for i, stage in enumerate(stages) if stage.restart]
    cycle = steps
    if restarts:
        cycle = steps * sum(stage.share for stage in stages[:restarts[0]])
    usual = train.Train.warmup_share
    share = min(.4, max(WARM, usual * whole) / cycle)
    return round(share, 4) if share > 1.01 * usual else None


def uncut(run):
    """The config of the model that is cut before this run."""
    factor = KINDS[KINDS[run.kind].init].settings.get("enlarge_ff", train.Train.enlarge_ff)
    return models.preset(run.size, vocabulary(), factor)[1]


def grown_config(run):
    """The config of the grown model that this run begins with, or None."""
    settings = KINDS[run.kind].grow
    if settings is None:
        return None
    target, _ = models.preset(run.size, vocabulary(), 1)
    return target_shape.grown_config(target, grow.Grow(**settings))


def vocabulary():
    """How many tokens the tokenizer of all these runs has: it is bytes."""
    return open_tokenizer("bytes").vocab_size


# -- what a run costs

def calibration_flops(run, recipe):
    """What prune.py or methods.sheared executes with this recipe before the run, without evaluations; 0
    without a recipe. Growing computes nothing."""
    if not recipe or KINDS[run.kind].grow:
        return 0
    if KINDS[run.kind].shear:
        return recipe["steps"] * recipe["batch_tokens"] * uncut(run).flops_per_token(uncut(run).block_size)
    large = uncut(run)
    backward = not {"grad", "grad_sq", "sensitivity"}.isdisjoint(prune.needs(prune.Prune(**recipe)))
    tokens = min(512, large.block_size)          # in a window
    return recipe["windows"] * tokens * large.flops_per_token(tokens, backward)


def shear_flops(run, scale):
    """What learning masks before the run takes; 0 without."""
    shear = KINDS[run.kind].shear
    return calibration_flops(run, dict(shear, batch_tokens=scale.batch_tokens)) if shear else 0


def plan_of(settings, preset=None, given=None):
    """Settings of train.py, or a record of them -> (the settings resolved, the model config at the
    start, the one at the end, schedule.Timeline). `preset` is the size of the target behind an
    --init, `given` the config of a grown model that the run begins with."""
    known = {setting.name for setting in fields(train.Train)} - {"init", "teacher"}
    if not settings.get("cuts"):
        known -= {"cuts"}              # the record of a plan without cuts
    chosen = {name: value for name, value in settings.items() if name in known}
    if preset:
        chosen["preset"] = preset
    config = train.resolve(train.Train(**chosen), "cpu")
    return config, *train.plan_run(config, vocabulary(), given)


def config_at(start, target, size):
    """The model config while this fraction of the removable parameters is kept."""
    if size == 1:
        return start
    return start.resized(allocate.widths_on_the_way(start, target, size, start.widths()))


def predicted(settings, preset=None, given=None):
    """FLOPs of a run with these settings of train.py: {"flops_executed", "flops_credited"}. `preset`,
    `given`: see plan_of.

    Scoring is not counted. A teacher counts as if it were never dropped and as large as the
    enlarged model."""
    config, start, target, timeline = plan_of(settings, preset, given)
    length = target.block_size
    stop = config.steps
    for stage, _, end in timeline.stages:
        if stage.name == config.stage:
            stop = end
    executed = 0
    credited = 0
    edges = [(0, 1.0), *timeline.events, (config.steps, None)]
    for (begin, size), (end, _) in zip(edges, edges[1:]):
        steps = max(0, min(end, stop) - begin)
        live = config_at(start, target, size)
        sliced = timeline.interleaved or (timeline.events and begin >= timeline.slice_at)
        physical = live if sliced else start
        executed += steps * physical.flops_per_token(length)
        credited += steps * live.flops_per_token(length)
    _, enlarged = models.preset(config.preset, vocabulary(), config.enlarge_ff, config.enlarge_kv)
    teacher_flops = enlarged.flops_per_token(length, backward=False)
    for stage, begin, end in timeline.stages:
        if stage.kd:
            executed += max(0, min(end, stop) - begin) * teacher_flops
    return {"flops_executed": executed * config.batch_tokens,
            "flops_credited": credited * config.batch_tokens}


def expected(run, scale):
    """(settings of train.py, FLOPs as `predicted`) of a run before any other has been made."""
    records = {other.name: {"summary": [expected(other, scale)[1]]} for other in measures(run)}
    settings, _ = settings_of(run, scale, records)
    return settings, predicted(settings, run.size if KINDS[run.kind].init else None, grown_config(run))


def fingerprint_of(runs, scale):
    """The fingerprint of the text that these runs read. Tokenizes the text, which runs side by side
    would all do at once. Raises UserError if a run would read it too often, or has too few steps
    for its cuts."""
    corpus = data.load(scale.data, open_tokenizer("bytes"))
    for run in runs:
        try:
            settings, _ = expected(run, scale)
        except UserError as problem:
            raise UserError(f"{run.name}: {problem}; more steps come by a larger --tokens") from None
        stopped = .5 if settings.get("stage") == "enlarge" else 1
        tokens = settings["steps"] * settings["batch_tokens"] * stopped
        if tokens > MAX_EPOCHS * len(corpus.train):
            raise UserError(f"{run.name} takes {tokens:,.0f} tokens, "
                            f"{tokens / len(corpus.train):.1f} epochs of {scale.data} and more "
                            f"than {MAX_EPOCHS}; give more text by --data (packages, a folder, "
                            "hf:NAME), or fewer --tokens")
    return corpus.fingerprint

"""What the papers claim, and which runs can tell: kinds of runs, the claims as pairs of them, sizes and tokens. Pure.

    python -c "import claims; print(*claims.CLAIMS, sep='\\n')"

A run is a *kind* (how it is trained: a row of KINDS) at a *place* (a size and how many tokens per parameter of the
target: `Scale`) with a seed. What a run needs, the teacher or the model that is cut for it, is another run of the same
place and seed, so that all of it is counted. A claim is a list of pairs: the loss of the first kind is said to be below
the second's, or at most `margin` above it. Claims 1 to 6, 11: IDEA Prune (arXiv 2503.05920); 7, 9: Adapt-Pruner
(2502.03460); 8: The Journey Matters (2501.12486); 10: score.py's sources; 12 and 13 are ours.
Not here: running (experiments/claims.py), statistics (experiments/claims_report.py).
"""
from dataclasses import dataclass, field, fields, replace

import allocate
import data
import flags
import model as models
import prune
import schedule
from common import UserError
from formats.tokenizer import open_tokenizer

RECOVERY_SEED = 100                    # is added after a cut: not the order of data of before it (as in experiments/scaling_runs.py)
WARM = 70                              # steps, of a first warm-up, at least
MOST_EPOCHS = 4                        # repeated text is nearly as good as new text up to here (arXiv 2305.16264)


@dataclass(frozen=True)
class Scale:
    """A size (model.PRESETS), tokens and seeds. Ratios are tokens per parameter of the target, all of them counted."""
    size: str
    ratio: float                       # of all claims but 9
    long: float                        # of claim 9
    ratios: tuple[float, ...]          # of claim 5
    batch_tokens: int                  # per step
    micro_batch: int                   # sequences per forward pass
    seeds: int                         # python -m experiments.claims power says how small an effect so many see
    eval_windows: int = 64             # of the hold-out, while a run trains
    final_windows: int = 2048          # of the hold-out at its end: rates are chosen and claims compared by these
    data: str = "stdlib"
    claims: tuple[int, ...] = (1, 3, 4, 5, 2, 11, 13, 10, 6, 7, 8, 9, 12)             # in this order at each place
    only: tuple[str, ...] = ()         # kinds; none: all that the claims compare


PLAIN = ("scratch", "naive", "oneshot", "idea", "idea-kd")
RATED = "scratch", "kd", "naive", "idea", "adapt", "cut-annealed", "scratch-wsd", "idea-wsd"    # at other rates, too
SCALES = {  # batches of 4,096 tokens, 404 steps at 4x16 and 100, ended 0.26 to 0.40 nats higher
    "cpu": Scale("4x16", 100, 400, (25, 100, 400), 2**10, 8, 5),
    "gpu": Scale("10m", 14, 14, (3.5, 7, 14), 2**16, 64, 3, data="packages"),
    "quick": Scale("toy", 60, 60, (60,), 2**11, 32, 1, final_windows=256, claims=(1, 3, 4, 5), only=PLAIN),
}


@dataclass(frozen=True)
class Kind:
    """How a run is trained. `settings` are train.py's, beside those of the place."""
    plan: str
    settings: dict = field(default_factory=dict)
    teacher: str | None = None         # the kind that teaches
    init: str | None = None            # the kind whose model is cut to the target by `cut`, to begin with
    cut: dict | None = None            # prune.py's settings
    share: float = 1                   # of the place's tokens
    like: tuple[str, str] | None = None    # instead: as many as spend what this kind spent: (kind, "flops_executed"
    #                                        or "flops_credited"), both without what they need; with a teacher: so many
    #                                        times the steps of kind `plan` as its FLOPs go into that
    rate: float = 1                    # times the preset's peak learning rate
    floor: float = .1                  # the last learning rate, as a share of the peak


def kd(**settings):
    """IDEA with distillation from the enlarged model whose own cosine has ended."""
    return Kind("idea-kd", settings, teacher="annealed")


def cut(init, share=.5, allocation="uniform-strict", score="sensitivity"):
    """A model that is there, cut once and trained on."""
    return Kind("scratch", init=init, share=share, cut=dict(structure="ffn", allocate=allocation, score=score))


def window(enlarge_share, prune_share):
    """Plan journey with another window of pruning, shares of the credited FLOPs; as many of them as the paper's."""
    shares = dict(enlarge_share=enlarge_share, prune_share=prune_share)
    return Kind("journey", shares, like=("journey", "flops_credited"))


KINDS = {
    **{plan: Kind(plan) for plan in (*PLAIN, "journey", "adapt")},
    "naive-cold": Kind("naive", dict(rewarm=False)),
    # the enlarged model after half of the tokens: at the end of a cosine of its own, half way along the whole one at
    # the same rate, and as it stands in kind idea-kd before the first cut
    "annealed": Kind("naive", dict(stage="enlarge")),
    "halfway": Kind("idea", dict(stage="enlarge")),
    "captured": Kind("idea-kd", dict(stage="enlarge")),
    "cut-annealed": cut("annealed"),
    "cut-halfway": cut("halfway"),
    "idea-kd-annealed": kd(),
    "kd": Kind("kd", teacher="annealed"),
    "kd-flops": Kind("kd", teacher="annealed", like=("idea-kd-annealed", "flops_executed")),
    "kd-captured": Kind("kd", teacher="captured"),
    "scratch-flops": Kind("scratch", like=("idea", "flops_executed")),
    "scratch-kd-flops": Kind("scratch", like=("idea-kd", "flops_executed")),
    "idea-1.3x": Kind("idea", dict(enlarge_ff=1.3)),
    "idea-5.3x": Kind("idea", dict(enlarge_ff=5.3)),
    "idea-25%": Kind("idea", dict(enlarge_share=.25, prune_share=.3)),              # prune : recover stay 2 : 3
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
    "large": Kind("naive", dict(stage="enlarge", enlarge_ff=5.3), share=2),         # as many tokens as scratch
    **{f"large-cut-1/{k}": cut("large", 1 / k) for k in (64, 16, 4, 1)},
    **{f"idea-{name}": Kind("idea", dict(score=name)) for name in ("activation", "taylor", "flap", "random")},
    "kd-weight-0.9": kd(kd_weight=.9),
    "kd-temperature-2": kd(kd_temperature=2.),
    "kd-to-the-end": kd(drop_teacher=False),
    "kd-linear-40%": kd(law="linear", prune_share=.4),
    "annealed-longer": Kind("naive", dict(stage="enlarge"), share=4),
    "kd-annealed-longer": replace(kd(), teacher="annealed-longer"),
    "kd-floor-1%": replace(kd(), floor=.01),
    "scratch-floor-1%": Kind("scratch", floor=.01),
}
KINDS |= {f"{name}-lr-{times:g}x": replace(KINDS[name], rate=times * KINDS[name].rate)
          for name in RATED for times in (.5, 2)}


@dataclass(frozen=True)
class Claim:
    number: int
    text: str
    pairs: tuple[tuple[str, str], ...]    # of kinds
    by_factor: bool = False            # its verdict is of tokens to equal loss; pairs are shown without one
    margin: float = 0                  # nats per token: "near-optimal" is at most so much above the other (ours)
    place: str = "ratio"               # which of Scale's: ratio, long, ratios
    ours: bool = False                 # no paper's: not in the README's table


CLAIMS = {claim.number: claim for claim in (
    Claim(1, "one integrated cosine beats two cycles, at equal tokens",
          (("oneshot", "naive"), ("idea", "naive"))),
    Claim(2, "an intermediate checkpoint is a better seed for pruning than the converged one",
          (("cut-halfway", "cut-annealed"),)),
    Claim(3, "iterative removal beats one-shot", (("idea", "oneshot"),)),
    Claim(4, "pruning with distillation beats pruning alone, and distillation from scratch with the same teacher",
          (("idea-kd", "idea"), ("idea-kd-annealed", "idea"), ("idea-kd", "kd-captured"), ("idea-kd-annealed", "kd"),
           ("idea-kd-annealed", "kd-flops"))),
    Claim(5, "IDEA with distillation beats training from scratch, at equal own tokens and at equal FLOPs",
          (("idea", "scratch"), ("idea-kd", "scratch"), ("idea-kd-annealed", "scratch"), ("idea", "scratch-flops"),
           ("idea-kd", "scratch-kd-flops")), place="ratios"),
    Claim(6, "enlarging 2.6 times for half of the tokens is near-optimal, and so is a cosine",
          tuple(("idea", f"idea-{other}") for other in ("1.3x", "5.3x", "25%", "75%", "wsd"))
          + (("scratch", "scratch-wsd"),), margin=.01),
    Claim(7, "adaptive shares beat uniform ones, and incremental cuts one, through a whole recovery",
          (("cut-adaptive", "cut-uniform"), ("adapt", "adapt-1cut"))),
    Claim(8, "pruning from 25 % to 75 % of the compute is near-optimal, at equal credited FLOPs",
          tuple(("journey", f"journey-{other}") for other in ("5-25%", "25-30%", "50-75%", "5-75%")), margin=.01),
    Claim(9, "cut from a larger trained model, recovery needs far fewer tokens than scratch",
          tuple((f"large-cut-1/{k}", "scratch") for k in (64, 16, 4, 1)), by_factor=True, place="long"),
    Claim(10, "IDEA's score is better inside the pipeline than Minitron's, LLM-Pruner's, FLAP's and a coin",
          tuple(("idea", f"idea-{name}") for name in ("activation", "taylor", "flap", "random"))),
    Claim(11, "the mechanism: the second warm-up costs, and so does a second cycle (Adam forgets before both)",
          (("naive-cold", "naive"), ("oneshot", "naive-cold"))),
    Claim(12, "another teacher, distillation, schedule or learning-rate floor is better (ours, no paper's claim)",
          (*((name, "idea-kd-annealed") for name in ("kd-weight-0.9", "kd-temperature-2", "kd-to-the-end",
                                                     "kd-linear-40%", "kd-floor-1%", "kd-annealed-longer")),
           ("kd-annealed-longer", "idea"),
           ("kd-floor-1%", "scratch-floor-1%")), ours=True),
    Claim(13, "the peak learning rates are near-optimal, against half and twice of them (ours; these runs chose them)",
          tuple((name, f"{name}-lr-{times:g}x") for name in RATED for times in (.5, 2)), margin=.01,
          ours=True),
)}


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
    """[(size, ratio)] of a claim's pairs."""
    found = getattr(scale, claim.place)
    return [(scale.size, ratio) for ratio in (found if isinstance(found, tuple) else (found,))]


def pairs(claim, scale):
    """[(first kind, second kind, size, ratio)], those of them that the scale has."""
    return [(a, b, *place) for place in places(claim, scale) for a, b in claim.pairs
            if not scale.only or {a, b} <= {*scale.only}]


def runs_of(claim, scale, seeds):
    """The runs that a claim compares, without what they need."""
    return list(dict.fromkeys(Run(kind, size, ratio, seed) for a, b, size, ratio in pairs(claim, scale)
                              for seed in range(seeds) for kind in (a, b)))


def in_order(scale, seeds):
    """[(claim's number, the runs that it compares at one place)]: what is cheap first, the scale's claims in their
    order, so that a day's work that is stopped after an hour has said something of most of them."""
    found = {}
    for number in scale.claims:
        for run in runs_of(CLAIMS[number], scale, seeds):
            found.setdefault((number, run.size, run.ratio), []).append(run)
    ordered = sorted(found, key=lambda key: expected(Run("scratch", *key[1:], 0), scale)[1]["flops_executed"])
    return [(key[0], found[key]) for key in ordered]


def measures(run):
    """The runs whose records say how long this one is."""
    kind = KINDS[run.kind]
    return [run.of(name) for name in (kind.like[0], kind.teacher and kind.plan) if name] if kind.like else []


def requires(run):
    """All runs whose records must be there before this one's settings are known."""
    return [*run.needs(), *measures(run)]


def rate(run):
    """The peak learning rate."""
    return models.PRESETS[run.size][-1] * KINDS[run.kind].rate


def settings(run, scale, records, folder="runs/claims"):
    """-> (settings of train.py, settings of prune.py's cut before it or None). A number of steps that depends on other
    runs is read from their records."""
    kind, lr = KINDS[run.kind], rate(run)
    target = models.preset(run.size, vocabulary(), 1)[0]
    steps = max(1, round(run.ratio * kind.share * target.num_params()["total"] / scale.batch_tokens))
    seed = run.seed + RECOVERY_SEED * bool(kind.init)
    found = dict(plan=kind.plan, seed=seed, steps=steps, lr=lr, min_lr=lr * kind.floor, data=scale.data,
                 batch_tokens=scale.batch_tokens, micro_batch=scale.micro_batch, eval_windows=scale.eval_windows,
                 compile=False, **kind.settings)
    if kind.like:
        of = {other.kind: records[other.name]["summary"][0] for other in measures(run)}
        for _ in range(1 if kind.teacher else 4):                  # steps and FLOPs are nearly proportional
            spent = of[kind.plan] if kind.teacher else predicted(dict(found, preset=run.size))
            found["steps"] = max(1, round(found["steps"] * of[kind.like[0]][kind.like[1]] / spent[kind.like[1]]))
    found |= first_warmup(kind, found["steps"], found["steps"] if kind.init else
                          run.ratio * target.num_params()["total"] / scale.batch_tokens)
    found["eval_every"] = max(1, found["steps"] // 10)
    if kind.teacher:
        found["teacher"] = f"{folder}/{run.of(kind.teacher).name}"
    if not kind.init:
        return dict(found, preset=run.size), None
    recipe = dict(kind.cut, init=f"{folder}/{run.of(kind.init).name}", data=scale.data, seed=seed, windows=64,
                  keep=target.removable_params() / uncut(run).removable_params(), micro_batch=scale.micro_batch)
    return dict(found, init=f"{folder}/from-{run.name}"), recipe


def first_warmup(kind, steps, whole):
    """The setting that makes a run's first warm-up no shorter than those of runs it is compared with: a share of
    `whole`, the steps of a plan of this place with one cycle, or of what follows a cut, WARM steps at least, .4 of its
    cycle at most. Without it plan naive, whose first cycle is half as long, would warm up half as long, too, and lose
    by that alone."""
    rows = schedule.PLANS[kind.plan]
    first = next((i for i, row in enumerate(rows) if row.restart), None)
    cycle = steps if first is None else steps * sum(row.share for row in rows[:first])
    share = min(.4, max(WARM, flags.Train.warmup_share * whole) / cycle)
    return {"warmup_share": round(share, 4)} if share > 1.01 * flags.Train.warmup_share else {}


def uncut(run):
    """The config of the model that is cut before this run."""
    factor = KINDS[KINDS[run.kind].init].settings.get("enlarge_ff", flags.Train.enlarge_ff)
    return models.preset(run.size, vocabulary(), factor)[1]


def calibration_flops(run, recipe):
    """What prune.py executes with this recipe before the run, evaluation not counted; without a recipe 0."""
    if not recipe:
        return 0
    large, backward = uncut(run), not {"grad", "grad_sq", "sensitivity"}.isdisjoint(prune.needs(prune.Prune(**recipe)))
    T = min(512, large.block_size)
    return recipe["windows"] * T * large.flops_per_token(T, backward)


def vocabulary():
    """Tokens of the tokenizer of all these runs: bytes."""
    return open_tokenizer("bytes").vocab_size


def timeline(found, size=None):
    """Settings of train.py, or a record of them -> (they resolved, target's GPTConfig, the one at the start,
    schedule.Timeline). `size`: the preset whose target an --init is."""
    known = {f.name for f in fields(flags.Train)} - {"init", "teacher"} - ({"cuts"} if not found.get("cuts") else set())
    shown = {k: v for k, v in found.items() if k in known}
    c = flags.resolve(flags.Train(**shown, **({"preset": size} if size else {})), on_gpu=False)
    return c, *flags.plan(c, vocabulary())


def live(start, target, kept):
    """The config when so much of the removable parameters stays."""
    return start.resized(allocate.widths_on_the_way(start, target, kept, start.widths())) if kept < 1 else start


def predicted(found, size=None):
    """FLOPs of a run with these settings of train.py -> {"flops_executed", "flops_credited"}, without scoring; a
    teacher counts as if it were never dropped, and as large as the enlarged model."""
    c, target, start, t = timeline(found, size)
    large = models.preset(c.preset, vocabulary(), c.enlarge_ff, c.enlarge_kv)[1]
    stop, T = next((b for stage, _, b in t.stages if stage.name == c.stage), c.steps), target.block_size
    executed = credited = 0
    edges = [(0, 1.0), *t.events, (c.steps, None)]
    for (a, kept), (b, _) in zip(edges, edges[1:]):
        steps, alive = max(0, min(b, stop) - a), live(start, target, kept)
        physical = alive if t.adaptive or t.events and a >= t.slice_at else start
        executed += steps * physical.flops_per_token(T)
        credited += steps * alive.flops_per_token(T)
    executed += sum(max(0, min(b, stop) - a) for stage, a, b in t.stages if stage.kd) \
        * large.flops_per_token(T, backward=False)
    return {"flops_executed": executed * c.batch_tokens, "flops_credited": credited * c.batch_tokens}


def expected(run, scale):
    """-> (settings of train.py, FLOPs as `predicted`) of a run before any other has been made."""
    records = {other.name: {"summary": [expected(other, scale)[1]]} for other in measures(run)}
    found, _ = settings(run, scale, records)
    return found, predicted(found, run.size if KINDS[run.kind].init else None)


def everything(wanted):
    """These runs and all that they require, each once, what is required first."""
    found = {}

    def visit(run):
        if run not in found:
            for other in requires(run):
                visit(other)
            found[run] = None

    for run in wanted:
        visit(run)
    return list(found)


def corpus_of(wanted, scale):
    """-> the fingerprint of the text that these runs read. Tokenizes it, which runs side by side would all do at once.
    UserError where one would read it too often, or has too few steps for its cuts."""
    corpus = data.load(scale.data, open_tokenizer("bytes"))
    for run in wanted:
        try:
            found = expected(run, scale)[0]
        except UserError as problem:
            raise UserError(f"{run.name}: {problem}; more steps come by a larger --tokens") from None
        tokens = found["steps"] * found["batch_tokens"] * (.5 if found.get("stage") == "enlarge" else 1)
        if tokens > MOST_EPOCHS * len(corpus.train):
            raise UserError(f"{run.name} takes {tokens:,.0f} tokens, {tokens / len(corpus.train):.1f} epochs of "
                            f"{scale.data} and more than {MOST_EPOCHS}; give more text by --data (packages, a folder, "
                            "hf:NAME), or fewer --tokens")
    return corpus.fingerprint

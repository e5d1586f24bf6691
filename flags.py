"""What a run is told: every flag of train.py with its default, what is refused, and the plan that comes of it.

Three steps from a command line to a run, each a function: `resolve` fills the defaults that depend on others,
`refuse_idle_flags` refuses a flag that would have no effect, `plan` turns them into two model configs, the target's and
the one at the start, and a Timeline (schedule.py). They import what needs torch themselves, so that --help and a
misspelled flag do not wait for it. Not here: what a run holds (steps.py), the loop (train.py).
"""
import dataclasses
import math
from dataclasses import dataclass

import schedule
from common import UserError, refuse_idle

INIT_LR = 2e-5                               # peak learning rate for pretrained models (Adapt-Pruner's scripts)
LEARNING_RATES = {                           # peak learning rate of each preset
    "toy": 1e-2,
    "laptop": 1e-2,                          # best for plan scratch when it was tried
    "10m": 1e-3,
    "124m": 6e-4,                            # this rate and the next: GPT-3's (arXiv 2005.14165)
    "1.3b": 2e-4,
    "4x16": 2e-2,                            # claim 13 of experiments/claims.py is about this rate
    "8x16": 1e-2, "8x32": 1e-2, "8x48": 1e-2, "8x64": 1e-2,
    "12x128": 1e-3, "12x192": 1e-3, "12x320": 1e-3, "12x512": 1e-3,
}


@dataclass(frozen=True)
class Train:
    plan: str = "idea"                       # scratch, naive, oneshot, idea, idea-kd, journey, adapt, kd (schedule.py)
    stage: str = "all"                       # stop behind this stage: enlarge, prune, recover; the next call goes on
    preset: str = "laptop"                   # size of the target: toy, laptop, 10m, 124m, 1.3b …
    init: str | None = None                  # instead of a preset: start with this checkpoint, run, HF folder or hub id
    block_size: int | None = None            # tokens of context; default: the preset's, or the trained one of --init
    enlarge_ff: float = 2.6                  # the enlarged model has so many times the target's FFN neurons
    enlarge_kv: float = 1.0                  # and so many times its KV groups
    data: str = "stdlib"                     # stdlib; packages; files as text, .jsonl, .parquet; hf:NAME[:CONFIG]
    tokenizer: str | None = None             # bytes, a tiktoken encoding, a folder; default: bytes, or that of --init
    out: str | None = None                   # run folder; default runs/PLAN-PRESET-SEED, or --init's name for PRESET
    seed: int = 0                            # of the initial weights and the order of the data
    steps: int = 1500                        # optimizer steps of the whole plan
    batch_tokens: int = 4096                 # tokens per step, over all processes
    micro_batch: int = 16                    # sequences per forward pass of a process; the rest is accumulated
    lr: float | None = None                  # peak learning rate; default: the preset's, 2e-5 for --init
    min_lr: float | None = None              # at the end of a cycle; default: a tenth of the peak
    shape: str | None = None                 # of the learning rate: cosine or wsd; default: wsd in adapt, else cosine
    warmup_share: float = 0.05               # of a cycle
    rewarm: bool = True                      # warm up in plan naive's second cycle too; without: it begins at the peak
    weight_decay: float = 0.1                # of matrices (AdamW)
    clip: float = 1.0                        # gradient norm
    enlarge_share: float | None = None       # of the run; default: the plan's, 0 in adapt with --init
    prune_share: float | None = None         # of the run; default: the plan's
    law: str | None = None                   # of the sizes: cubic, linear, geometric, oneshot; default: the plan's
    cuts: int | None = None                  # events of the prune stage; default: 20, in adapt one per 5 % that go
    slice_at: int | None = None              # step at which dead units are physically cut off; default: the last cut
    score: str | None = None                 # of units: score.SCORES, measured at every cut; default: IDEA's average
    score_every: int = 5                     # steps between gradient scores
    score_window: int = 100                  # score only so many steps before a cut
    uncertainty: bool = False                # multiply the score by its variation (PLATON)
    calibration_windows: int = 64            # of the training text, measured on at every cut of adapt and of --score
    forget_moments: bool = False             # a new optimizer at every cut of adapt, as in Adapt-Pruner's scripts
    teacher: str | None = None               # a checkpoint; default: the enlarged model at the first cut
    kd_weight: float = 0.5                   # of the teacher's share in the loss
    kd_temperature: float = 1.0              # of the softmax in the teacher's share
    drop_teacher: bool = True                # for good, once the student has overtaken it
    eval_every: int = 100                    # steps
    eval_growth: float = 1.0                 # above 1: from then on whenever the steps have grown by this factor
    eval_windows: int = 256                  # windows of the hold-out (eval.py)
    save_every: int = 500                    # steps
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # float32, bfloat16 (autocast), float64; auto: bfloat16 only on a GPU
    compile: bool | None = None              # torch.compile; default: on a GPU only


def resolve(config, on_gpu):
    """Fill the defaults that depend on the machine or on other settings; refuse what no later check would name."""
    import model as models
    import score
    for name, allowed in (("plan", tuple(schedule.PLANS)), ("stage", ("all", "enlarge", "prune", "recover")),
                          ("preset", tuple(models.PRESETS)), ("shape", ("cosine", "wsd")),
                          ("score", tuple(score.SCORES)),
                          ("dtype", ("auto", "float32", "bfloat16", "float64"))):
        if getattr(config, name) not in (*allowed, None):             # None: the plan's own
            raise UserError(f"--{name} {getattr(config, name)!r} is not one of {', '.join(allowed)}")
    for name in ("init", "teacher", "tokenizer", "out"):
        if getattr(config, name) == "":                               # --init "$UNSET" would train from scratch
            raise UserError(f"--{name} is empty; give a value or leave it out")
    usual = INIT_LR if config.init else LEARNING_RATES[config.preset]
    lr, adaptive = usual if config.lr is None else config.lr, schedule.adaptive(config.plan)
    given = adaptive and config.init and config.enlarge_share is None  # a pretrained model is the enlarged one
    config = dataclasses.replace(
        config, lr=lr, shape=config.shape or ("wsd" if adaptive else "cosine"),
        enlarge_share=0.0 if given else config.enlarge_share,
        min_lr=lr / 10 if config.min_lr is None else config.min_lr,
        dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
        compile=on_gpu if config.compile is None else config.compile)
    for name in ("steps", "batch_tokens", "micro_batch", "lr", "clip", "cuts", "score_every", "score_window",
                 "calibration_windows", "kd_temperature", "eval_every", "eval_windows", "save_every"):
        if getattr(config, name) is not None and not 0 < getattr(config, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be positive and finite")
    for name, most in (("seed", 2**63 - 1), ("kd_weight", 1), ("warmup_share", 1), ("min_lr", config.lr),
                       ("weight_decay", 1 / config.lr)):
        if not 0 <= getattr(config, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be between 0 and {most:g}")
    if not 1 <= config.eval_growth < math.inf:
        raise UserError(f"--eval-growth {config.eval_growth} must be a factor of at least 1")
    return config


def measured(config):
    """The name of the score that cuts measure on calibration text, None where it is the moving average of the training
    steps' |w · g| (IDEA Prune). Adapt-Pruner's is taylor."""
    return config.score or ("taylor" if schedule.adaptive(config.plan) else None)


def calibrates(config):
    """What cuts need of score.collect; nothing: no calibration text is run."""
    import score
    importance = {"cosine"} if schedule.adaptive(config.plan) else set()
    return importance | (score.SCORES[measured(config)].needs if measured(config) else set())


def refuse_idle_flags(config):
    """A setting that the plan has no use for is a mistake."""
    rows = schedule.PLANS[config.plan]
    prunes, taught = any(row.name == "prune" for row in rows), any(row.kd for row in rows)
    once = prunes and "oneshot" in (config.law or next(row.law for row in rows if row.name == "prune"))
    idle = [] if taught else ["teacher", "kd_weight", "kd_temperature", "drop_teacher"]
    idle += [] if prunes else ["enlarge_ff", "enlarge_kv", "score"]
    idle += [] if any(row.restart for row in rows) else ["rewarm"]
    idle += ["cuts"] if once or not prunes else []
    idle += ["score_every", "score_window", "uncertainty"] if measured(config) or not prunes else []
    idle += [] if calibrates(config) else ["calibration_windows"]
    idle += [] if schedule.adaptive(config.plan) else ["forget_moments"]
    if config.init and config.preset != Train.preset:
        raise UserError(f"--preset {config.preset} has no effect with --init {config.init}; leave one of them out")
    for name in idle:
        because = " with one cut" if name == "cuts" and once else \
            f" with --score {config.score}" if config.score and name.startswith(("score_", "unc", "cal")) else ""
        refuse_idle(config, [name], f"in plan {config.plan!r}{because}")
    if taught and not prunes and not config.teacher:
        raise UserError(f"plan {config.plan!r} needs --teacher CHECKPOINT, a trained model with the same tokenizer")


def plan(config, vocab_size, given=None):
    """-> the target's GPTConfig, the one that the run starts with, the Timeline. `given`: the config of --init."""
    import allocate
    import model as models
    if given:
        target, enlarged = models.shrunk(given, config.enlarge_ff, config.enlarge_kv), given
    else:
        pair = models.preset(config.preset, vocab_size, config.enlarge_ff, config.enlarge_kv)
        shorter = {} if config.block_size is None else {"block_size": config.block_size}
        target, enlarged = (dataclasses.replace(c, **shorter) for c in pair)
    prunes = any(row.name == "prune" for row in schedule.PLANS[config.plan])
    if prunes and enlarged == target:
        raise UserError(f"plan {config.plan!r} prunes, but the enlarged model is the target; give --enlarge-ff above 1")
    start = enlarged if prunes or given else target
    target = target if prunes else start

    def flops_at_size(size):
        at_size = start.resized(allocate.widths_on_the_way(start, target, size, start.widths()))
        return at_size.flops_per_token(target.block_size)

    try:
        timeline = schedule.resolve(
            config.plan, config.steps, target.removable_params() / start.removable_params(), cuts=config.cuts,
            enlarge_share=config.enlarge_share, prune_share=config.prune_share, law=config.law,
            slice_at=config.slice_at, flops_at_size=flops_at_size)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    scores = sum(schedule.score_at(s, timeline, config.score_every, config.score_window)
                 for s in range(timeline.events[0][0] if config.uncertainty else 0))
    if config.uncertainty and scores < 2:                             # of one score there is no variation: all are 0
        raise UserError(f"--uncertainty needs two scores before the first cut, at step {timeline.events[0][0]}, and "
                        f"there are {scores}; give a smaller --score-every or a larger --score-window")
    if config.stage not in ("all", *(stage.name for stage, _, _ in timeline.stages)):
        raise UserError(f"plan {config.plan!r} has no stage {config.stage!r}; leave --stage out")
    return target, start, timeline


def open_init(config):
    """-> the run's Tokenizer, the GPTConfig of --init and what prune.py wrote of the cut that made it (None without).
    UserError: model and tokenizer do not fit, or 2:4 and the plan do not."""
    import checkpoint
    from formats.tokenizer import open_tokenizer
    if not config.init:
        return open_tokenizer(config.tokenizer or "bytes"), None, None
    model, about = checkpoint.load(config.init, "meta", block_size=config.block_size)
    if about.get("masks") and any(row.name == "prune" for row in schedule.PLANS[config.plan]):
        raise UserError(f"{config.init} is a 2:4 model, whose units cannot be cut while it trains, and plan "
                        f"{config.plan!r} prunes; give --plan scratch")
    tokenizer = open_tokenizer(config.tokenizer) if config.tokenizer else checkpoint.tokenizer_of(about, config.init)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, {config.init} only "
                        f"{model.config.vocab_size}; leave --tokenizer out to take the model's own")
    cut = {k: v for k, v in about.get("run", {}).items() if k in ("cut_from", "recipe")}
    return tokenizer, model.config, cut or None

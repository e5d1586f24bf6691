"""Which recipe? A handful of cuts to the same budget, compared before the long training.

    python -m experiments.candidates smollm2 --questions questions.jsonl
    python -m experiments.candidates smollm2 --common="--keep 0.6 --multiple-of 32" \\
        --recipes="--score flap --allocate standardised; --structure layer,ffn,kv --layer-share 0.25"

Every candidate is a recipe of prune.py. All cut the same model by the same calibration text.
Statistics of the uncut model are collected once for all of them, and so are those of a model that
lacks whole layers. Each smaller model is judged, untrained, by its loss on the hold-outs (the mean
over texts, each counting once) and by the questions that it answers.

The rule (our choice): the lowest mean loss wins, unless another candidate answers more questions
right by more than two standard errors of the paired difference. Of those, the one with the most
right answers wins. Two, because one of a handful of equal candidates is often better by one.
"""
import shlex
import statistics
import time
from dataclasses import dataclass

import torch

import data
import prune
import score
from checkpoint import tokenizer_of
from common import UserError, check_positive, parse, pick_device, progress, refuse_idle, run
from eval import evaluate
from model import GPT
from tasks import questions

# Settings that all candidates have in common, as they are cut by the same text.
SHARED = ("init", "data", "prompts", "choices", "windows", "block_size", "micro_batch", "eval_windows", "seed",
          "device", "dtype", "weights", "offload", "budget")
# In standard errors: by how much a candidate must answer better than the one with the lowest loss.
CLEARLY = 2
RECIPES = (
    "--score taylor --allocate global",
    "--score taylor --allocate adaptive",
    "--score flap --allocate standardised",
    "--score wanda --allocate uniform",
    "--score taylor --structure layer,ffn,kv --layer-share 0.25",
    "--score taylor --structure layer,ffn,kv --layer-share 0.5",
    "--score taylor --structure layer,ffn,kv --layer-share 1",
)


@dataclass(frozen=True)
class Candidates:
    model: str                    # a checkpoint, run folder, Hugging Face folder or hub id
    common: str = "--keep 0.8 --multiple-of 32 --mend least-squares"    # flags of prune.py for all candidates
    recipes: str | None = None    # flags of prune.py for each, with a ; between two; default: RECIPES
    questions: str | None = None  # a file: JSON lines of query, choices, gold, or a BIG-bench task.json
    limit: int | None = None      # number of questions; default: all


@dataclass
class Candidate:
    """A recipe, what it made, and how good that is."""
    name: str
    recipe: prune.Prune
    model: GPT
    losses: dict                  # {text: nats per token}
    right: torch.Tensor           # (questions,) 1 where its answer is right, by acc_norm
    seconds: float                # to calibrate, cut and mend; what was shared counts once

    @property
    def loss(self):
        """The mean over texts."""
        return statistics.mean(self.losses.values())


class Calibration:
    """prune.collect for several recipes. A model whose sub-blocks are whole or absent is calibrated
    once, with all statistics that any of the recipes reads."""

    def __init__(self, config, recipes):
        self.widths = config.widths()
        self.needs = set()
        for recipe in recipes:
            for part in prune.parts_of(recipe):
                self.needs |= prune.needs(part)
        self.stats = {}

    def __call__(self, model, batches, recipe, dtype):
        widths = model.config.widths()
        if any(n not in (0, self.widths[key]) for key, n in widths.items()):
            return prune.collect(model, batches, recipe, dtype)
        key = tuple(widths.values())
        if key not in self.stats:
            # Gradients and Gram matrices are large: those of one model besides the uncut one stay.
            uncut = tuple(self.widths.values())
            self.stats = {old: stats for old, stats in self.stats.items() if old == uncut}
            running = prune.in_dtype(model, dtype)
            calibrate = prune.calibration_pass(recipe)
            self.stats[key] = calibrate(running, progress(batches, "calibrate"), self.needs)
            self.stats[key].seed = recipe.seed
        return self.stats[key]


# -- compare

def choose(model, recipes, batches, texts, tokenizer, some=(), dtype=torch.float32, resource=None):
    """Cut `model` by each of the recipes {name: prune.Prune} and judge it: -> (the best Candidate,
    all of them).

    batches   the calibration text of all recipes, a list of token ids (x, y)
    texts     {name: tokens (N,)} that the losses are of
    some      [questions.Question]
    resource  measured decode time, for --budget ms

    All smaller models are in memory at the end. Raises UserError for a structure that is neither
    layers nor widths."""
    for recipe in recipes.values():
        if prune.rules_of(recipe.structure) not in (prune.UNITS, prune.DEPTH):
            raise UserError(f"candidates cut layers or widths, not --structure {recipe.structure}; leave it out")
    device = model.embed.weight.device
    recipes = {name: prune.with_mend(recipe, device) for name, recipe in recipes.items()}
    calibration = Calibration(model.config, recipes.values())
    candidates = []
    for name, recipe in recipes.items():
        begin = time.perf_counter()
        small, _ = prune.cut_in_stages(model, batches, recipe, dtype, resource, calibration)
        seconds = time.perf_counter() - begin
        running = prune.in_dtype(small, dtype)
        losses = {}
        for text, tokens in texts.items():
            result = evaluate(running, tokens, tokenizer.byte_lengths(), recipe.eval_windows, batch=recipe.micro_batch,
                              block_size=prune.window_of(recipe, model), show_progress=True)
            losses[text] = result["loss"]
        right = right_answers(running, tokenizer, some)
        candidates.append(Candidate(name, recipe, small, losses, right, seconds))
    return best(candidates), candidates


def right_answers(model, tokenizer, some):
    """Which questions the model answers right: (questions,) of 0 and 1. The log-probability of a
    choice is divided by its characters, as for acc_norm."""
    if not some:
        return torch.zeros(0)
    answers = questions.multiple_choice(model, tokenizer, some)["loglikelihoods"]
    right = torch.zeros(len(some))
    for number, (question, nats) in enumerate(zip(some, answers)):
        scores = [value / questions.divisor("acc_norm", choice) for value, choice in zip(nats, question.choices)]
        right[number] = scores.index(max(scores)) == question.gold
    return right


def gain(candidate, other):
    """By what share of the questions a candidate is better than another: (mean, standard error of
    the paired difference); (0, 0) without questions."""
    difference = candidate.right - other.right
    if len(difference) < 2:
        return 0.0, 0.0
    return difference.mean().item(), (difference.std() / len(difference)**0.5).item()


def best(candidates):
    """The winner by the rule of this file. Ties go to the first."""
    leader = min(candidates, key=lambda candidate: candidate.loss)
    better = []
    for candidate in candidates:
        mean, error = gain(candidate, leader)
        if mean > CLEARLY * error:
            better.append(candidate)
    return max(better, key=lambda candidate: candidate.right.sum().item(), default=leader)


def table(candidates, winner):
    """A line for each candidate, the lowest mean loss first."""
    ordered = sorted(candidates, key=lambda candidate: candidate.loss)
    leader = ordered[0]
    texts = "  ".join(f"{text[-16:]:>16}" for text in leader.losses)
    lines = [f"   mean loss  {texts}  acc_norm  against the first  parameters  seconds  recipe"]
    for candidate in ordered:
        mark = "->" if candidate is winner else "  "
        losses = "  ".join(f"{nats:16.4f}" for nats in candidate.losses.values())
        answers = " " * 27
        if len(candidate.right):
            mean, error = gain(candidate, leader)
            answers = f"{candidate.right.mean():8.4f}  {mean:+8.4f} ± {error:.4f}"
        params = candidate.model.config.num_params()["total"]
        lines.append(f"{mark} {candidate.loss:9.4f}  {losses}  {answers:27}  {params:10,}  {candidate.seconds:7.1f}  "
                     f"{candidate.name}")
    lines.append(f"-> has the lowest mean loss, or answers more questions by over {CLEARLY} standard errors")
    return "\n".join(lines)


# -- the command

def read_recipes(config):
    """What all candidates have in common, and {flags: recipe}. Raises UserError if a recipe means
    nothing, or changes what all must share."""
    common = parse(prune.Prune, ["--init", config.model, *shlex.split(config.common)])
    if common.choices is not None or prune.writes_itself(common):
        raise UserError("candidates are calibrated on given texts; leave --choices and --data self out")
    recipes = {}
    for flags in config.recipes.split(";") if config.recipes else RECIPES:
        flags = flags.strip()
        words = ["--init", config.model, *shlex.split(config.common), *shlex.split(flags)]
        recipe = parse(prune.Prune, words)
        prune.check(recipe)
        for name in SHARED:
            if getattr(recipe, name) != getattr(common, name):
                raise UserError(f"all candidates share --{name.replace('_', '-')}; take it out of {flags!r} and give "
                                "it in --common")
        recipes[flags] = recipe
    return common, recipes


def main(config):
    check_positive(config, ["limit"])
    if config.questions is None:
        refuse_idle(config, ["limit"], "without --questions")
    common, recipes = read_recipes(config)
    some = questions.read_questions(config.questions)[:config.limit] if config.questions else ()

    device = pick_device(common.device)
    model, about = prune.open_model(common, device)
    for recipe in recipes.values():
        prune.check_fits(prune.with_mend(recipe, device), model, device)
    dtype = prune.measuring_dtype(common, model, device)
    tokenizer = tokenizer_of(model, about, config.model)
    T = prune.window_of(common, model)
    corpus = data.load_mixture(common.data, tokenizer, block_size=T)
    batches = score.batches(corpus.train, T, common.windows, common.micro_batch, common.seed)
    resource = prune.resource_of(common, model)
    winner, candidates = choose(model, recipes, batches, corpus.domains, tokenizer, some, dtype, resource)
    print(table(candidates, winner))
    print(f"python prune.py --init {shlex.quote(config.model)} {config.common} {winner.name}")


if __name__ == "__main__":
    run(lambda: main(parse(Candidates, verbatim=("common", "recipes"))))

"""From a model you have to a smaller one that still answers, by one command.

    python -m experiments.smollm2 fetch smollm2
    python -m experiments.recover smollm2 --keep 0.8 --minutes 60 --out runs/smollm2-0.8

It chooses among a few recipes, cuts, mends, distils each block, trains the smaller model against the
large one (plan recover), measures what that model can do before and after, and exports it: OUT/hf for
transformers, with a model card that holds the figures, and OUT/model.gguf and OUT/model-q8_0.gguf for
llama.cpp.

Every step leaves its record in OUT/recover.jsonl or its folder in OUT. The same command goes on
behind the last of them; the training goes on inside (train.py). `--minutes` is the time of the whole
command, the recorded steps of earlier calls included. The training gets what the other steps leave: its
length follows from the measured seconds of a step, so another machine trains on more or fewer tokens,
and the card says on how many.
"""
import dataclasses
import shlex
import shutil
import statistics
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import data
import distill
import export
import prune
import score
import train
from common import (
    UserError,
    append_record,
    check_choices,
    check_positive,
    parse,
    pick_device,
    printable,
    read_records,
    refuse_idle,
    run,
)
from experiments import candidates, measure, texts
from experiments.measure import Protocol
from formats import gguf_export, gguf_vocabulary, llamacpp
from prune import Prune
from tasks import questions
from train import Train

# The share of --minutes that the training leaves for the measurements behind it, beside what the
# measurement of the dense model took.
RESERVE = 0.03
MIN_STEPS = 4
CALIBRATION_WINDOWS = 64             # of CALIBRATION_BLOCK tokens
CALIBRATION_BLOCK = 256
MULTIPLE_OF = 32                     # neurons: runtimes and quantizers work in such blocks
CHOICE_QUESTIONS = 200               # of each file, to choose a recipe by
SPEED_ROUNDS = 5
DEFAULT_TEXTS = ("brown", "anarchism", "git")    # of experiments/texts.py, besides Python
# What is tried. The first is the best of the study (docs/recover.md).
RECIPES = {
    "widths": dict(score="taylor", allocate="global"),
    "widths, by layer": dict(score="taylor", allocate="adaptive"),
    "layers, then widths": dict(score="taylor", structure="layer,ffn,kv", layer_share=0.25),
    # Whole layers have no widths to round.
    "layers": dict(score="influence", structure="layer", multiple_of=1),
}
FIRST = next(iter(RECIPES))


@dataclass(frozen=True)
class Recover:
    model: str                    # what to make smaller: a Hugging Face folder, a hub id or a checkpoint
    out: str = "runs/recovered"   # folder of everything; the same command goes on there
    keep: float = 0.8             # kept fraction of what all FFN neurons and KV groups cost
    budget: Literal["params", "flops", "kv_bytes", "ms"] = "params"    # what `keep` is a fraction of
    minutes: float = 60.0         # of the whole command
    steps: int | None = None      # of the training; default: as many as the minutes allow
    # texts to calibrate and train on, even or NAME:WEIGHT; default: Python, fiction and news, essays, manuals
    data: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()  # texts to be measured on only
    questions: tuple[str, ...] = ("own",)    # files of questions to be measured on only
    limit: int = 500              # questions of each file
    windows: int = 8              # of 2,048 tokens of each text, for its perplexity
    choose: bool = True           # try RECIPES and go on with the best; without: the first of them
    local_steps: int = 32         # of local distillation of each block
    seed: int = 0
    device: str = "auto"          # auto, cpu, cuda, mps


class Journal:
    """The records of a command that goes on: OUT/recover.jsonl. Raises UserError if they are those
    of another command."""
    def __init__(self, folder, identity):
        self.file = Path(folder) / "recover.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.records = {record["tag"]: record for record in read_records(self.file)}
        # What the steps of earlier calls took.
        self.earlier_seconds = sum(record.get("seconds", 0) for record in self.records.values())
        if "config" not in self.records:
            self.add("config", **identity)
        recorded = self.records["config"]
        for name, value in identity.items():
            if recorded.get(name) != value:
                raise UserError(f"{self.file} is of another command (--{name.replace('_', '-')} {recorded.get(name)!r} "
                                f"there, {value!r} here); give another --out")

    def add(self, tag, **record):
        append_record(self.file, tag=tag, **record)
        self.records[tag] = record

    def once(self, tag, make, announce):
        """The record `tag`: an old one, or the dictionary that make() returns, with its seconds."""
        if tag not in self.records:
            print(announce, flush=True)
            start = time.perf_counter()
            record = make()
            self.add(tag, **{"seconds": time.perf_counter() - start, **record})
        return self.records[tag]


# -- what the command works on

@dataclass(frozen=True)
class Work:
    """Everything that the steps share."""
    config: Recover
    out: Path
    journal: Journal
    tokenizer: object
    corpus: data.Corpus
    texts: measure.Texts
    protocol: Protocol
    block_size: int               # tokens of a calibration window
    device: str
    start: float                  # when this call began, seconds of time.perf_counter

    @property
    def minutes_of_call(self):
        return (time.perf_counter() - self.start) / 60

    @property
    def minutes_gone(self):
        """Those of this call and of the recorded steps of earlier ones."""
        return self.minutes_of_call + self.journal.earlier_seconds / 60


def sources(config):
    """The texts that the command calibrates and trains on. By default those are Python and three
    kinds of English, which are fetched once."""
    if config.data:
        return config.data
    folder = Path("data_cache/texts")
    missing = [name for name in DEFAULT_TEXTS if not (folder / f"{name}.jsonl").exists()]
    if missing:
        print(f"fetching {', '.join(missing)} into {folder}", flush=True)
        try:
            texts.main(texts.Texts(str(folder), tuple(missing)))
        except UserError as problem:
            raise UserError(f"{problem}; or give your own texts by --data") from None
    return ("stdlib", *[str(folder / f"{name}.jsonl") for name in DEFAULT_TEXTS])


def open_work(config):
    """Read everything that the steps need, before anything takes long: -> Work, the dense model.
    Raises UserError for what they could not work with."""
    start = time.perf_counter()
    device = pick_device(config.device)
    names = sources(config)
    model, about = checkpoint.load(config.model, device, torch.float32)
    block_size = min(CALIBRATION_BLOCK, model.config.block_size)
    for recipe in recipes(config, names, block_size).values():
        recipe = with_repair(recipe, config)
        prune.check(recipe)
        prune.check_fits(recipe, model, device)
    tokenizer = checkpoint.tokenizer_of(model, about, config.model)
    corpus = data.load_mixture(names, tokenizer, block_size=block_size)
    test_texts = measure.open_texts(corpus, config.unseen, tokenizer)
    protocol = Protocol(config.windows, config.questions, config.limit, seed=config.seed).read()
    identity = dataclasses.asdict(dataclasses.replace(config, data=names))
    # Where it runs and how long it may take are no part of what it is.
    for name in ("out", "device", "minutes"):
        del identity[name]
    identity = {name: list(value) if isinstance(value, tuple) else value for name, value in identity.items()}
    journal = Journal(config.out, {**identity, "fingerprint": corpus.fingerprint,
                                   "weights": checkpoint.fingerprint(model)[:16]})
    config = dataclasses.replace(config, data=names)
    work = Work(config, Path(config.out), journal, tokenizer, corpus, test_texts, protocol, block_size, device, start)
    return work, model


# -- the steps

def measured(work, tag, path, announce):
    """The full measurement of the model at `path`, in the dtype in which the device is fastest."""
    def make():
        model, _ = checkpoint.load(path, work.device, torch.float32)
        running = prune.in_dtype(model, prune.measuring_dtype(Prune(), model, work.device))
        return measure.measure(running, work.tokenizer, work.texts, work.protocol)
    return work.journal.once(tag, make, announce)


def cut(work, model):
    """Cut by the best recipe and repair, in OUT/cut."""
    folder = work.out / "cut"
    chosen = work.journal.once("choice", lambda: choose(work, model), "trying the recipes")
    if not checkpoint.newest(folder):
        recipe = with_repair(recipes(work.config, work.config.data, work.block_size)[chosen["recipe"]], work.config)
        recipe = dataclasses.replace(recipe, out=str(folder))
        print(f"cut: python prune.py {command_of(recipe)}", flush=True)
        begin = time.perf_counter()
        prune.main(recipe)
        work.journal.add("prune", seconds=time.perf_counter() - begin)
    return folder


def windows_of(block_size):
    """How many calibration windows: of shorter ones more, with as many tokens together."""
    return CALIBRATION_WINDOWS * max(1, CALIBRATION_BLOCK // block_size)


def recipes(config, texts, block_size):
    """The recipes to choose from: {name: prune.Prune}."""
    common = Prune(init=config.model, keep=config.keep, budget=config.budget, data=texts, mend="sequential",
                   windows=windows_of(block_size), block_size=block_size, multiple_of=MULTIPLE_OF, seed=config.seed,
                   device=config.device)
    named = {name: dataclasses.replace(common, **fields) for name, fields in RECIPES.items()}
    return named if config.choose else {FIRST: named[FIRST]}


def with_repair(recipe, config):
    """The recipe as the cut that stays is made: with local distillation, which is too long for all of them."""
    return dataclasses.replace(recipe, mend="local", local_steps=config.local_steps)


def choose(work, model):
    """The recipe that goes on: the record of its name."""
    named = recipes(work.config, work.config.data, work.block_size)
    if len(named) == 1:
        return {"recipe": FIRST}
    batches = score.batches(work.corpus.train, work.block_size, windows_of(work.block_size), Prune.micro_batch,
                            work.config.seed)
    # Questions that are not reported: those behind the first `limit` of each file.
    limit = work.protocol.limit
    unreported = []
    for file in work.protocol.questions:
        unreported += questions.read_questions(file)[limit:limit + CHOICE_QUESTIONS]
    dtype = prune.measuring_dtype(Prune(), model, work.device)
    resource = prune.resource_of(next(iter(named.values())), model)
    best, tried = candidates.choose(model, named, batches, work.texts.validation, work.tokenizer,
                                    unreported, dtype, resource)
    print(candidates.table(tried, best), flush=True)
    return {"recipe": best.name, "losses": {candidate.name: candidate.losses for candidate in tried}}


def command_of(settings):
    """The flags that make these settings, a frozen dataclass, from its defaults."""
    words = []
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        if value == setting.default:
            continue
        words.append(f"--{setting.name.replace('_', '-')}")
        words += map(str, value) if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


def training(work, steps=None):
    """The settings of the training of OUT/cut."""
    return Train(plan="recover", init=str(work.out / "cut"), teacher=work.config.model, data=work.config.data,
                 out=str(work.out / "recovered"), seed=work.config.seed, device=work.config.device, steps=steps)


def steps_that_fit(work):
    """How many steps the training may have, from the seconds of one step, measured here: a record.
    The first micro-batch warms up and is not counted."""
    if work.config.steps:
        return {"steps": work.config.steps}
    context = checkpoint.load(work.config.model, "meta")[0].config.block_size
    settings = train.fit_to(training(work), context)
    block_size = settings.block_size or context
    student, _ = checkpoint.load(work.out / "cut", work.device, torch.float32)
    teacher, _ = checkpoint.load(work.config.model, work.device, torch.float32)
    distill.freeze(teacher)
    dtype = train.dtype_for(settings, student.config, work.device)
    objective = distill.Objective(student, settings.kd_weight, settings.kd_temperature)
    x = torch.randint(student.config.vocab_size, (settings.micro_batch, block_size), device=work.device)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            with torch.no_grad():
                hidden = teacher.hidden(x)
            loss, _ = objective(x, x, hidden, teacher.head_weight)
        loss.backward()
        loss.item()                  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    micro_steps = settings.batch_tokens // (settings.micro_batch * block_size)
    per_step = min(seconds[1:]) * micro_steps
    behind = work.journal.records["dense"]["seconds"] / 60 + RESERVE * work.config.minutes
    left = work.config.minutes - work.minutes_gone - behind
    steps = max(MIN_STEPS, int(left * 60 / per_step))
    return {"steps": steps, "seconds_per_step": per_step, "batch_tokens": settings.batch_tokens,
            "minutes": work.config.minutes}


def recover(work):
    """Train OUT/cut back, in OUT/recovered."""
    plan = work.journal.once("training", lambda: steps_that_fit(work), "measuring the seconds of a step")
    settings = training(work, plan["steps"])
    if plan.get("minutes", work.config.minutes) != work.config.minutes:
        print(f"--minutes {work.config.minutes:g} comes too late: the training has had {plan['steps']} steps since "
              f"--minutes {plan['minutes']:g}; for another length give another --out", flush=True)
    if "seconds_per_step" in plan:
        print(f"train: {plan['steps']} steps of {plan['batch_tokens']:,} tokens, about "
              f"{plan['steps'] * plan['seconds_per_step'] / 60:.0f} minutes: python train.py {command_of(settings)}",
              flush=True)
    train.main(settings)
    return work.out / "recovered"


# -- out

def exports(work, figures):
    """Write the recovered model for transformers and, where xllamacpp is installed, for llama.cpp."""
    source = str(work.out / "recovered")
    export_once(export.Export(source, str(work.out / "hf")), figures)
    if find_spec("xllamacpp") is None:
        print("no GGUF: pip install xllamacpp, and run the same command again", flush=True)
        return {}
    try:
        gguf_vocabulary.vocabulary_of(work.tokenizer)
    except UserError as problem:
        print(f"no GGUF: {problem}", flush=True)
        return {}
    export_once(export.Export(source, str(work.out / "model.gguf"), "gguf"))
    width = checkpoint.load(source, "meta")[0].config.d_model
    if width % gguf_export.Q8_BLOCK:
        print(f"no model-q8_0.gguf: {gguf_export.Q8_BLOCK} does not divide the model's rows of {width}", flush=True)
    else:
        export_once(export.Export(source, str(work.out / "model-q8_0.gguf"), "gguf", "q8_0"))
    dense = work.out / "dense.gguf"
    export_once(export.Export(work.config.model, str(dense), "gguf"))
    return work.journal.once("speed", lambda: speeds(work), "measuring llama.cpp's speed")


def export_once(config, figures=None):
    """Export, unless it is done. What has the final name is whole and checked."""
    out = Path(config.out)
    if out.exists():
        return
    # What a killed call left.
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    export.main(config, figures)


def speeds(work):
    """Tokens per second of llama.cpp, in rounds that run the files in turns: medians, and ratios to the dense
    model's within a round."""
    files = [name for name in ("dense.gguf", "model.gguf", "model-q8_0.gguf") if (work.out / name).exists()]
    rates = {name: [] for name in files}
    for _ in range(SPEED_ROUNDS):
        for name in files:
            rates[name].append(llamacpp.speed(str(work.out / name), repeats=1)["decode"])
    result = {}
    for name in files:
        ratios = [rate / dense for rate, dense in zip(rates[name], rates["dense.gguf"])]
        result[name] = {"decode": statistics.median(rates[name]), "ratio": statistics.median(ratios),
                        "bytes": (work.out / name).stat().st_size}
    return {"files": result, "threads": torch.get_num_threads()}


def figures_of(work):
    """The tables of the model card, as Markdown."""
    records = {label: work.journal.records[tag] for label, tag in
               (("dense", "dense"), ("cut and repaired", "cut"), ("recovered", "recovered"))}
    protocol = work.protocol
    seen = ", ".join(map(measure.short_name, work.config.data))
    remarks = [f"Perplexity (ppl) is over {protocol.windows} x {measure.WINDOW:,} tokens of each text, in windows of "
               "so many tokens or of the model's context, if that is shorter.",
               f"The model was calibrated and trained on other documents of {seen}."]
    if work.texts.unseen:
        remarks.append(f"It was neither calibrated nor trained on {', '.join(work.texts.unseen)}.")
    remarks += [f"Questions: {', '.join(protocol.questions_of)}, at most {protocol.limit} of each.",
                "Intervals are paired bootstraps over these questions, for one model and one seed.",
                f"The last columns are a generative probe of {protocol.probe_items} items of each kind."]
    parts = [measure.table(records), " ".join(remarks), "Greedy continuations:",
             measure.sample_table(records)]
    return "\n\n".join(parts)


def speed_lines(record):
    """What `speeds` measured, a line for each file."""
    lines = [f"llama.cpp, threads: {record['threads']}"] if record.get("files") else []
    for name, result in record.get("files", {}).items():
        lines.append(f"{name:18} {result['bytes'] / 1e6:7.1f} MB   {result['decode']:6.1f} tokens/s   "
                     f"{result['ratio']:.2f} of dense")
    return "\n".join(lines)


# -- the command

def check(config):
    """Raise UserError for settings that mean nothing."""
    check_choices(config)
    check_positive(config, ("minutes", "steps", "limit", "windows", "local_steps"))
    if not 0 < config.keep < 1:
        raise UserError(f"--keep {config.keep} must be between 0 and 1")
    if not config.questions:
        raise UserError("--questions is empty; name at least one file of questions, or own")
    if config.steps is not None:
        refuse_idle(config, ("minutes",), f"with --steps {config.steps}")
    if find_spec("transformers") is None:
        raise UserError("transformers, which checks the export, is not installed: pip install transformers")


def main(config):
    check(config)
    with checkpoint.locked(Path(config.out)):
        make_all(config)


def make_all(config):
    """`main`, with the folder held."""
    work, model = open_work(config)
    dense = measured(work, "dense", config.model, "measuring the dense model")
    if config.steps is None:
        print(f"that took {dense['seconds']:.0f} s; three such measurements, the cut and the export leave the rest of "
              f"{config.minutes:g} minutes to the training", flush=True)
    folder = cut(work, model)
    del model
    measured(work, "cut", folder, "measuring the cut model")
    measured(work, "recovered", recover(work), "measuring the recovered model")
    figures = figures_of(work)
    # First, as a model may have no GGUF: then the export ends the command.
    print(printable(f"\n{figures}\n"), flush=True)
    speed = exports(work, figures)
    made = [name for name in ("hf", "model.gguf", "model-q8_0.gguf") if (work.out / name).exists()]
    print(printable(f"{speed_lines(speed)}\n{work.out}: {', '.join(made)}; {work.minutes_of_call:.0f} minutes of this "
                    "call"))


if __name__ == "__main__":
    run(lambda: main(parse(Recover)))

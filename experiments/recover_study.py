"""Which cut recovers best: published methods and ours on one pretrained model, with equal texts,
equal local repair and equal training behind the cut; and what each part of our recipe is worth.

    python -m experiments.smollm2 fetch smollm2
    python -m experiments.texts texts
    python -m experiments.recover_study smollm2 --questions FILE …       # hours; the same command goes on
    python -m experiments.recover_study smollm2 --part report            # tables and pictures only

A row is cut, then repaired block by block (methods/local.py), then trained against the dense model
for the same number of tokens. It is measured behind each of these stages (experiments/measure.py). All
rows read the same windows in the same order, and one pass of the dense model teaches all of them: its
top-k probabilities are written once (experiments/teacher.py).

Adapt-Pruner is cut in steps of 5 %, measured anew each time, and trained behind the last cut, as all
rows are; its paper trains between the cuts as well. Minitron is its width pruning without the
embedding channels. Not here: the command for one model (experiments/recover.py), the tables
(experiments/recover_report.py).
"""
import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import data
import export
import prune
import score
import train
from common import UserError, append_record, check_choices, check_positive, parse, read_records, refuse_idle, run
from experiments import measure, recover_report, teacher
from experiments.measure import Protocol
from formats import llamacpp
from methods import local
from prune import Prune
from train import Train

BLOCK_SIZE = 256                      # tokens of a calibration window
ADAPT_STEP = 0.05                     # Adapt-Pruner removes about 5 % at a time (arXiv 2502.03460)
SPEED_ROUNDS = 5

OURS = Prune(score="taylor", allocate="global", mend="sequential")
CUTS = {
    "ours": OURS,
    "LLM-Pruner": Prune(score="taylor", allocate="middle", mend="none"),
    "Minitron": Prune(score="activation", allocate="uniform", mend="none"),
    "ShortGPT": Prune(score="influence", structure="layer", mend="none"),
    "Adapt-Pruner": Prune(score="taylor", allocate="adaptive", mend="none"),
}


@dataclass(frozen=True)
class Study:
    model: str                    # the dense model: a Hugging Face folder
    out: str = "results/recover.jsonl"    # file of records
    runs: str = "runs/recover-study"      # folder of the models, about 1 GB a row
    part: Literal["all", "rows", "ablations", "tokens", "speed", "report"] = "all"
    keeps: tuple[float, ...] = (0.8, 0.6)
    data: tuple[str, ...] = ("stdlib", "texts/brown.jsonl", "texts/anarchism.jsonl", "texts/git.jsonl")
    unseen: tuple[str, ...] = ("texts/handbook.jsonl",)
    questions: tuple[str, ...] = ("own",)    # files of questions
    limit: int = 500              # questions of each file
    eval_windows: int = 4         # of 2,048 tokens of each text
    windows: int = 64             # of calibration, 256 tokens each
    steps: int = 16               # of training, 4,096 tokens each
    longer: tuple[int, ...] = (4, 8, 64)    # other numbers of steps, for the curve over tokens
    local_steps: int = 32         # of each block
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """A model of the study, and the stage at which it ends."""
    name: str
    keep: float
    recipe: Prune
    data: tuple[str, ...] = ()    # what the cut is calibrated on; default: the study's texts
    until: str = "recovered"      # cut, local or recovered
    repaired: bool = True         # local distillation before the training
    plan: str = "recover"         # or scratch: cross-entropy alone
    cached: bool = True           # the teacher's top-k probabilities; else the teacher itself
    steps: int | None = None      # of training; default: the study's

    def folder(self, work, stage):
        """Where the model of a stage is kept. Rows that agree up to a stage share it."""
        recipe = self.recipe
        words = [f"{self.keep:g}", recipe.structure.replace(",", "+"), recipe.score, recipe.allocate, recipe.mend]
        words += [Path(name).stem for name in self.data]
        if stage != "cut":
            words.append("local" if self.repaired else "not-repaired")
        if stage == "recovered":
            words += [self.plan, "cached" if self.cached else "live", f"{self.steps or work.config.steps}"]
        return Path(work.config.runs) / "-".join(words)


@dataclass(frozen=True)
class Work:
    """What all rows share."""
    config: Study
    dense: object                 # the GPT in float32
    tokenizer: object
    corpus: data.Corpus
    texts: measure.Texts
    protocol: Protocol
    records: list

    def find(self, **fields):
        for record in self.records:
            if all(record.get(name) == value for name, value in fields.items()):
                return record
        return None

    def add(self, **record):
        append_record(self.config.out, run="recover", **record)
        self.records.append(record)

    @property
    def dtype(self):
        return prune.measuring_dtype(Prune(), self.dense, "cpu")


def open_work(config):
    """Read model, texts and records. Raises UserError if the records are of another study."""
    dense, about = checkpoint.load(config.model, "cpu", torch.float32)
    tokenizer = checkpoint.tokenizer_of(dense, about, config.model)
    corpus = data.load_mixture(config.data, tokenizer, block_size=train.INIT_BLOCK_SIZE)
    texts = measure.open_texts(corpus, config.unseen, tokenizer)
    protocol = Protocol(config.eval_windows, config.questions, config.limit, seed=config.seed).read()
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    work = Work(config, dense, tokenizer, corpus, texts, protocol, read_records(config.out))
    identity = {"model": checkpoint.fingerprint(dense)[:16], "fingerprint": corpus.fingerprint,
                "questions": {name: len(rows) for name, rows in protocol.questions_of.items()},
                "texts": list(texts.test), "unseen": list(texts.unseen), "keeps": list(config.keeps)}
    for name in ("limit", "eval_windows", "windows", "steps", "local_steps", "seed"):
        identity[name] = getattr(config, name)
    settings = train.fit_to(Train(init=config.model), dense.config.block_size)
    identity["tokens"] = config.steps * settings.batch_tokens
    recorded = work.find(tag="config")
    if recorded is None:
        work.add(tag="config", **identity, methods=list(CUTS), torch=str(torch.__version__))
        return work
    for name, value in identity.items():
        if recorded[name] != value:
            raise UserError(f"{config.out} holds another study ({name} is {recorded[name]!r} there and {value!r} "
                            "here); give another --out and another --runs")
    return work


# -- the stages of a row

def make_cut(work, row, folder):
    """Cut the dense model: -> what it took."""
    config = work.config
    iterations = round((1 - row.keep) / ADAPT_STEP) if row.recipe.allocate == "adaptive" else 1
    recipe = dataclasses.replace(row.recipe, init=config.model, out=str(folder), keep=row.keep, seed=config.seed,
                                 data=row.data or config.data, windows=config.windows, block_size=BLOCK_SIZE,
                                 iterations=iterations, eval_windows=4)
    start = time.perf_counter()
    prune.main(recipe)
    return {"seconds": time.perf_counter() - start}


def make_local(work, row, folder):
    """Repair the cut model block by block: -> what it took."""
    config = work.config
    small, about = checkpoint.load(row.folder(work, "cut"), "cpu", torch.float32)
    batches = score.batches(work.corpus.train, BLOCK_SIZE, config.windows, Prune.micro_batch, config.seed)
    windows = torch.cat([x for x, _ in batches])
    start = time.perf_counter()
    local.distil_(small, work.dense, windows, config.local_steps, seed=config.seed, dtype=work.dtype)
    seconds = time.perf_counter() - start
    checkpoint.save(folder / "ckpt_00000000.pt", small, **about)
    return {"seconds": seconds}


def make_recovered(work, row, folder):
    """Train the repaired model: -> what it took."""
    config = work.config
    taught = {}
    if row.plan == "recover":
        taught["teacher"] = str(teacher_folder(work)) if row.cached else config.model
    stage = "local" if row.repaired else "cut"
    settings = Train(plan=row.plan, init=str(row.folder(work, stage)), data=config.data, out=str(folder),
                     seed=config.seed, steps=row.steps or config.steps, lr=train.RECOVER_LR, **taught)
    train.main(settings)
    summary = [record for record in read_records(folder / "metrics.jsonl") if record["tag"] == "summary"][-1]
    return {"seconds": summary["seconds"]["train"], "flops": summary["flops_executed"], "tokens": summary["tokens"]}


STAGES = {"cut": make_cut, "local": make_local, "recovered": make_recovered}


def run_row(work, row):
    """Bring a row to its last stage and measure it behind each, as far as the records lack it."""
    for stage, make in STAGES.items():
        if stage == "local" and not row.repaired:
            continue
        folder = row.folder(work, stage)
        about = dict(tag="model", folder=folder.name, stage=stage)
        if not work.find(**about):
            # A folder without a record was measured by nobody. A training goes on where it was; what
            # takes a minute or two is made again.
            if stage != "recovered":
                shutil.rmtree(folder, ignore_errors=True)
            cost = make(work, row, folder)
            model, _ = checkpoint.load(folder, "cpu", torch.float32)
            # Local repair is a step on the way, so its answers are not asked for.
            result = measure.measure(prune.in_dtype(model, work.dtype), work.tokenizer, work.texts, work.protocol,
                                     only_losses=stage == "local")
            work.add(**about, name=row.name, keep=row.keep, cost=cost, **shape(model), **result)
            print(f"{row.name}, keep {row.keep:g}, {stage}: " + ", ".join(
                f"{text} {loss:.4f}" for text, loss in result["losses"].items()), flush=True)
        if stage == row.until:
            return


def shape(model):
    return {"n_kv_head": list(model.config.n_kv_head), "d_ff": list(model.config.d_ff)}


def teacher_folder(work):
    return Path(work.config.runs) / "teacher"


def write_teacher(work):
    """Write the dense model's top-k probabilities for the longest training, unless the records say so."""
    folder = teacher_folder(work)
    if work.find(tag="teacher"):
        return
    config = work.config
    steps = max(config.steps, *config.longer)
    settings = train.fit_to(Train(init=config.model), work.dense.config.block_size)
    start = time.perf_counter()
    teacher.main(teacher.Teacher(config.model, out=str(folder), data=config.data, seed=config.seed,
                                 tokens=steps * settings.batch_tokens, block_size=settings.block_size))
    size = sum(file.stat().st_size for file in folder.iterdir())
    work.add(tag="teacher", seconds=time.perf_counter() - start, tokens=steps * settings.batch_tokens, bytes=size)


# -- the rows

def rows(config):
    """Every method at every kept fraction."""
    result = []
    for keep in config.keeps:
        result += [Row(name, keep, recipe) for name, recipe in CUTS.items()]
    return result


def ablations(config):
    """Ours with one part changed, at the first kept fraction. What only changes the cut ends there."""
    keep = config.keeps[0]
    prose = tuple(name for name in config.data if name != "stdlib")
    texts = {"calibrated on code": ("stdlib",), "calibrated on prose": prose, "calibrated on its own text": ("self",)}
    result = [Row(name, keep, OURS, data=sources, until="cut") for name, sources in texts.items()]
    result += [Row("one-pass least squares", keep, dataclasses.replace(OURS, mend="least-squares"), until="cut"),
               Row("not mended", keep, dataclasses.replace(OURS, mend="none")),
               Row("no local repair", keep, OURS, repaired=False),
               Row("cross-entropy alone", keep, OURS, plan="scratch"),
               Row("live teacher", keep, OURS, cached=False)]
    return result


def other_lengths(config):
    """Ours, trained for other numbers of steps."""
    return [Row("ours", config.keeps[0], OURS, steps=steps) for steps in config.longer]


def measure_dense(work):
    if not work.find(tag="dense"):
        result = measure.measure(prune.in_dtype(work.dense, work.dtype), work.tokenizer, work.texts, work.protocol)
        work.add(tag="dense", **shape(work.dense), **result)


def measure_speed(work):
    """llama.cpp's decoding speed of all recovered rows beside the dense model's, in rounds that run
    them in turns; and the sizes of their files."""
    folders = {"dense": Path(work.config.model)}
    for row in rows(work.config):
        folder = row.folder(work, "recovered")
        if checkpoint.newest(folder):
            folders[f"{row.name}, keep {row.keep:g}"] = folder
    files = {}
    for name, folder in folders.items():
        files[name] = Path(work.config.runs) / f"{folder.name}.gguf"
        if not files[name].exists():
            export.main(export.Export(str(folder), str(files[name]), "gguf", "float16"))
    rates = {name: [] for name in files}
    for _ in range(SPEED_ROUNDS):
        for name, file in files.items():
            rates[name].append(llamacpp.speed(str(file), repeats=1)["decode"])
    work.add(tag="speed", threads=torch.get_num_threads(), decode=rates,
             bytes={name: file.stat().st_size for name, file in files.items()})


# -- the command

def check(config):
    """Raise UserError for settings that mean nothing."""
    check_choices(config)
    check_positive(config, ("limit", "eval_windows", "windows", "steps", "local_steps"))
    if not config.keeps or not all(0 < keep < 1 for keep in config.keeps):
        raise UserError(f"--keeps {config.keeps} must be between 0 and 1")
    if config.part == "report":
        used = ("model", "out", "part")
        unused = [setting.name for setting in dataclasses.fields(config) if setting.name not in used]
        refuse_idle(config, unused, "on a report")


def main(config):
    check(config)
    if config.part != "report":
        work = open_work(config)
        measure_dense(work)
        write_teacher(work)
        parts = {"rows": rows, "ablations": ablations, "tokens": other_lengths}
        for part, rows_of in parts.items():
            if config.part in (part, "all"):
                for row in rows_of(config):
                    run_row(work, row)
        if config.part in ("speed", "all"):
            measure_speed(work)
    print(recover_report.write(config.out))


if __name__ == "__main__":
    run(lambda: main(parse(Study)))

"""Every criterion and allocation and the published methods on one pretrained model, on equal terms.

    python -m experiments.compare smollm2 --out runs/compare.jsonl --tokens 8192      # 14 core-hours
    python -m experiments.compare smollm2 --out results/smollm2.jsonl --part report   # tables only

There are two texts: the standard library's Python source, and English prose (the language reference
in `pydoc_data.topics`). Each has three parts that share no document: for calibration (one pass for
all methods and a seed), for validation (the grid, and so our choices) and for the test (the
reported rows). Budgets are in the parameters of FFNs and attention; embeddings are not counted.
Nothing is trained after the cut, unless by --part recovery. Losses are nats per token in windows of
--block-size. Models run in bf16 autocast (their losses differ by 2e-4 from float32's), SliceGPT's in float32.
On a GPU weights that are stored in bfloat16 stay so. A cell's `peak_bytes` are those of a process that holds
what earlier rows left; --part alone measures each cut by itself.

compare_report.DIFFERS says for each row what it does otherwise than its release, and the report prints
it. With 3 KV groups in a layer, equal shares take whole groups of some layers, whichever they are, so
methods of equal shares are also shown with FFNs alone. Not here: the training after a cut
(experiments/compare_recovery.py).
"""
import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import platform
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import torch

import allocate
import checkpoint
import data
import model as models
import prune
import score
from bench import timing
from common import (
    UserError,
    append_record,
    check_choices,
    parse,
    pick_device,
    printable,
    read_records,
    refuse_idle,
    run,
    write_atomic,
)
from distill import chunked_loss
from eval import evaluate
from experiments import compare_recovery, compare_report
from experiments.compare_report import ADAPT_STEP, GRID, HALF, OWN_BUDGET, PUBLISHED, name_of
from formats.tokenizer import Tokenizer
from methods import measured, sparse, torch_pruning_peer
from methods.slicegpt import Sliced, slicegpt
from prune import Prune
from report import markdown
from tasks import questions


@dataclass(frozen=True)
class Compare:
    init: str                     # the model: a Hugging Face folder or hub id, or a checkpoint
    out: str = "runs/compare.jsonl"    # file of records
    # what to make; recovery: cuts that are trained back; alone: seconds and memory of each row's cut in a
    # process of its own; cost: beside plain passes
    part: Literal["all", "grid", "rows", "questions", "recovery", "report", "alone", "cost"] = "all"
    keeps: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)    # kept fractions of the reported rows
    grid_keep: float = 0.8        # of the grid, and of the questions
    seeds: int = 2                # calibrations of the reported rows
    windows: int = 64             # of calibration, half of them from each text
    block_size: int = 256         # tokens in a window
    micro_batch: int = 2          # calibration windows per batch
    tokens: int = 32768           # evaluated of each text
    questions: tuple[str, ...] = ()    # files of questions (tasks/questions.py)
    limit: int = 500              # questions per file
    best: int = 6                 # of the grid's cells go into the reported rows
    recovery_tokens: int = 65536    # that each cut is trained on
    recovery_lr: float = 1e-4     # peak rate of full training: the best of 2e-5, 1e-4 and 3e-4 for one row
    lora_lr: float = 3e-3         # peak rate of adapters: the best of 1e-4, 1e-3 and 3e-3
    device: str = "auto"          # auto, cpu, cuda, mps
    weights: Literal["auto", "float32", "bfloat16"] = "auto"    # see prune.py
    offload: bool = False         # see prune.py


# -- the texts

def families(documents, words=20):
    """Group documents so that no run of so many words occurs in two groups; the language reference
    holds documents inside of documents. Returns lists of indices, those with the most letters
    first."""
    group_of = list(range(len(documents)))
    first_seen = {}
    for i, text in enumerate(documents):
        split = text.split()
        for begin in range(max(1, len(split) - words + 1)):
            j = first_seen.setdefault(" ".join(split[begin:begin + words]), i)
            if group_of[i] != group_of[j]:
                old = group_of[i]
                new = group_of[j]
                group_of = [new if group == old else group for group in group_of]
    members = {}
    for i, group in enumerate(group_of):
        members.setdefault(group, []).append(i)
    return sorted(members.values(), key=lambda indices: -sum(len(documents[i]) for i in indices))


def texts(tokenizer, block_size):
    """{text: {"calibration" | "validation" | "test": token ids}}; no document is in two parts."""
    import pydoc_data.topics
    code = data.load("stdlib", tokenizer, block_size=block_size)
    held_out = code.val[0:len(code.val)]
    ends = np.flatnonzero(held_out == tokenizer.eot) + 1
    middle = ends[np.abs(ends - len(held_out) // 2).argmin()]                   # between two documents
    python = {"calibration": code.train, "validation": held_out[:middle], "test": held_out[middle:]}

    prose = {"calibration": [], "validation": [], "test": []}
    sizes = dict.fromkeys(prose, 0)
    topics = [text + "\n\n" for _, text in sorted(pydoc_data.topics.topics.items())]
    for family in families(topics):
        shortest = min(sizes, key=sizes.get)
        for i in family:
            ids = tokenizer.encode(topics[i])
            prose[shortest].append(ids)
            sizes[shortest] += len(ids)
    return {"python": python, "prose": {part: np.concatenate(ids) for part, ids in prose.items()}}


# -- the records

RUN = "compare"                       # the name of these records in a file that holds other runs, too


def read(file):
    """The records of the comparison in a file."""
    return [record for record in read_records(file) if record.get("run", RUN) == RUN]


class Records:
    """A file of records of one comparison. Raises UserError if the file holds another one."""
    def __init__(self, file, identity):
        self.file = Path(file)
        self.all = read(file)
        if not self.all:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.add(tag="config", **identity, torch=str(torch.__version__))
        # Records from before there was a choice were made on a CPU.
        config = {"device": "cpu", **self.all[0]}
        differ = [f"{name} is {config.get(name)!r} there and {value!r} here"
                  for name, value in identity.items() if config.get(name) != value]
        if differ:
            raise UserError(f"{file} holds another comparison ({'; '.join(differ)}); give another "
                            "--out")

    def add(self, **record):
        append_record(self.file, run=RUN, **record)
        self.all.append(record)

    def find(self, **fields):
        """The first record that has all of these fields, or None."""
        for record in self.all:
            if all(record.get(name) == value for name, value in fields.items()):
                return record
        return None


# -- cuts

@dataclass(frozen=True)
class Subject:
    """The model that is cut, and the texts that it is measured on."""
    config: Compare
    model: models.GPT
    tokenizer: Tokenizer
    texts: dict                       # see `texts`

    @property
    def total(self):
        """What budgets are fractions of: the parameters of FFNs and attention."""
        return allocate.total(self.model.config)

    def autocast(self):
        """The context in which models run."""
        return torch.autocast(self.model.embed.weight.device.type, torch.bfloat16)

    def identity(self):
        """What the numbers depend on."""
        config = self.config
        available = {}
        for text, parts in self.texts.items():
            available[text] = {part: len(ids) for part, ids in parts.items()}
        return {"model": checkpoint.fingerprint(self.model)[:16], "windows": config.windows,
                "block_size": config.block_size, "micro_batch": config.micro_batch,
                "tokens": config.tokens, "device": config.device, "params": self.model.config.num_params()["total"],
                "python": platform.python_version(), "available": available}


def open_subject(config):
    """Load the model and the texts. Raises UserError if a text is too short."""
    config = dataclasses.replace(config, device=pick_device(config.device))
    recipe = Prune(config.init, weights=config.weights, offload=config.offload)
    model, about = prune.load(recipe, config.device, config.block_size)
    tokenizer = checkpoint.tokenizer_of(model, about, config.init)
    subject = Subject(config, model, tokenizer, texts(tokenizer, config.block_size))
    for text, parts in subject.texts.items():
        for part in ("validation", "test"):
            if len(parts[part]) <= config.tokens:
                raise UserError(f"{text} has {len(parts[part]):,} tokens of {part}; give --tokens "
                                "below that")
    return subject


class Cuts:
    """Makes the smaller models. What several of them need is made once: the calibration of a seed,
    Adapt-Pruner's models on the way, and what the recipes measure, which goes into the records. A
    calibration has the `fields` of score.Stats: by default all that any method needs."""
    def __init__(self, subject, records=None, fields=None):
        self.subject = subject
        self.records = records
        self.fields = fields
        if fields is None:
            self.fields = {"cosine", "channel", "gram"}.union(*(row.needs for row in score.SCORES.values()))
        self.calibrated = None                   # (seed, Stats) of the last seed
        self.on_the_way = {}                     # {(name, seed): [(keep, Adapt-Pruner's model)]}
        self.last = (None, None)                 # of `cut`: (name, keep, seed) and the model

    def batches(self, seed):
        """The calibration windows of a seed, from one text and the other in turns: [(x, y)]."""
        config = self.subject.config
        halves = []
        for parts in self.subject.texts.values():
            halves.append(score.batches(parts["calibration"], config.block_size, config.windows // 2,
                                        config.micro_batch, seed))
        return list(itertools.chain(*zip(*halves)))

    def calibration(self, seed):
        """The Stats of a seed."""
        if self.calibrated and self.calibrated[0] == seed:
            return self.calibrated[1]
        start = time.perf_counter()
        with self.subject.autocast():
            stats = prune.calibration_pass(self.subject.config)(self.subject.model, self.batches(seed), self.fields)
        stats.seed = seed
        print(f"calibrated on {stats.tokens:,} tokens, seed {seed}: "
              f"{time.perf_counter() - start:.0f} s", flush=True)
        self.calibrated = seed, stats
        return stats

    def cut(self, name, recipe, keep, seed):
        """The smaller model of a row, which is kept until another row's is made: its losses and its
        questions are measured one after the other. Raises UserError if there is none."""
        key = (name, keep, seed)
        if self.last[0] != key:
            self.last = (None, None)
            self.last = (key, self.cut_anew(name, recipe, keep, seed))
        return self.last[1]

    def cut_anew(self, name, recipe, keep, seed):
        """The smaller model of a recipe; SliceGPT's and torch-pruning's by name. Raises UserError
        if there is none."""
        model = self.subject.model
        budget = math.floor(keep * self.subject.total + 1e-6)
        if name == "torch-pruning":
            peer = torch_pruning_peer.cut(self.subject.config.init, keep, self.subject.config.block_size)[0]
            return peer.to(model.embed.weight.device, model.embed.weight.dtype)
        batches = self.batches(seed)
        if name.startswith("SliceGPT"):
            if self.subject.config.offload:
                raise UserError("SliceGPT turns the whole model on the device; leave out --offload")
            whole = prune.in_dtype(model, torch.float32)
            return slicegpt(whole, [x for x, _ in batches], keep, counts_directions=name in OWN_BUDGET)
        if recipe.iterations > 1:
            return self.little_by_little(name, recipe, keep, seed, batches)
        if sparse.is_sparse(recipe.structure):
            return self.with_zeros(recipe, batches, budget)
        stats = self.calibration(seed)
        damage = None
        if recipe.score == "policy":
            # The probabilities hold for one budget.
            with self.subject.autocast():
                damage = prune.measure(model, stats, batches, recipe, model.embed.weight.dtype, budget)
        elif prune.runs_again(recipe):
            damage = self.damage(recipe, seed, batches, stats)
        return prune.cut_once(model, stats, recipe, budget, damage=damage)

    def with_zeros(self, recipe, batches, budget):
        """A copy of the model with zeros. Its scores need statistics of their own."""
        recipe = dataclasses.replace(recipe, offload=self.subject.config.offload)
        model = copy.deepcopy(self.subject.model)
        with self.subject.autocast():
            if recipe.layer_by_layer:
                pattern = sparse.pattern_of(recipe.structure, recipe.keep)
                sparse.cut_layer_by_layer_(model, batches, pattern, recipe.score, recipe.mend)
                return model
            stats = prune.collect(model, batches, recipe, model.embed.weight.dtype)
        return prune.cut_once(model, stats, recipe, budget)

    def little_by_little(self, name, recipe, keep, seed, batches):
        """Adapt-Pruner cuts ADAPT_STEP of the model at a time and measures anew each time, on one
        half of the windows and then on the other. A larger cut goes on from a smaller one."""
        whole = self.subject.model
        models = self.on_the_way.setdefault((name, seed), [(1.0, whole)])
        at, model = min((pair for pair in models if pair[0] >= keep - 1e-9), key=lambda pair: pair[0])
        while at > keep + 1e-9:
            steps_done = round((1 - at) / ADAPT_STEP)
            begin = steps_done % 2 * len(batches) // 2
            half = batches[begin:begin + len(batches) // 2]
            at = max(keep, at - ADAPT_STEP)
            with self.subject.autocast():
                stats = prune.calibration_pass(self.subject.config)(model, half, prune.needs(recipe))
            budget = math.floor(at * self.subject.total + 1e-6)
            model = prune.cut_once(model, stats, recipe, budget, whole.config.widths())
        models.append((keep, model))
        return model

    def damage(self, recipe, seed, batches, stats):
        """prune.measure of a recipe, from the records or into them, if there are any."""
        about = dict(tag="measured", score=recipe.score, mend=recipe.mend,
                     structure=recipe.structure, seed=seed, shares=list(measured.SHARES),
                     windows=recipe.measured_windows)
        recorded = self.records and self.records.find(**about)
        if recorded:
            return {(layer, kind): value for layer, kind, value in recorded["found"]}
        start = time.perf_counter()
        model = self.subject.model
        with self.subject.autocast():
            damage = prune.measure(model, stats, batches, recipe, model.embed.weight.dtype)
        if self.records:
            rows = [[*key, value] for key, value in damage.items()]
            self.records.add(**about, seconds=time.perf_counter() - start, found=rows)
        return damage


# -- evaluation

def can_run(name):
    """Whether the package that a row needs is installed."""
    return name != "torch-pruning" or find_spec("torch_pruning") is not None


def precision(subject, model):
    """The context in which a model runs: SliceGPT's rotations are not for bf16."""
    return contextlib.nullcontext() if isinstance(model, Sliced) else subject.autocast()


def losses_of(subject, model, part):
    """{text: nats per token}."""
    windows = subject.config.tokens // subject.config.block_size
    byte_lengths = subject.tokenizer.byte_lengths()
    losses = {}
    with precision(subject, model):
        for text, parts in subject.texts.items():
            losses[text] = evaluate(model, parts[part], byte_lengths, windows, batch=8)["loss"]
    return losses


def size_of(subject, model):
    """The record's fields on a model's size."""
    if isinstance(model, Sliced):
        params = model.params()
        left = params["attention"] + params["ffn"] + params["shortcut"]
        return {"kept": left / subject.total, "params": params["total"]}
    config = model.config
    return {"kept": allocate.total(config) / subject.total, "params": config.num_params()["total"],
            "n_kv_head": config.n_kv_head, "d_ff": config.d_ff}


def run_cell(cuts, part, name, recipe, keep, seed):
    """Make one cut and evaluate it on `part` of the texts, unless the records have it. A method
    that cannot cut so much is recorded as refused, which is a finding, too."""
    subject = cuts.subject
    about = dict(tag="cell", part=part, name=name, keep=keep, seed=seed)
    if cuts.records.find(**about):
        return
    where = f"{part:10} {name:34} keep {keep:g} seed {seed}"
    if recipe is not None and not sparse.is_sparse(recipe.structure):
        cuts.calibration(seed)      # the methods of a seed share it, so its seconds are not theirs
    start = time.perf_counter()
    try:
        with timing.peak(subject.config.device) as memory:
            model = subject.model if name == "dense" else cuts.cut(name, recipe, keep, seed)
    except UserError as problem:
        print(f"{where}: {problem}", flush=True)
        cuts.records.add(**about, refused=str(problem))
        return
    seconds = time.perf_counter() - start
    losses = losses_of(subject, model, part)
    size = size_of(subject, model)
    if name in HALF:
        nonzero = sum(p.count_nonzero().item() for _, p in sparse.matrices(model))
        size["kept"] = nonzero / subject.total
    cuts.records.add(**about, losses=losses, perplexity=math.exp(fmean(losses.values())),
                     seconds=seconds, peak_bytes=memory["peak_bytes"], **size)
    print(f"{where}: " + "  ".join(f"{text} {loss:.4f}" for text, loss in losses.items()), flush=True)


def ask(cuts, name, recipe, keep):
    """Record the shares of the questions that a model of the first calibration answers, of each file
    that the records lack."""
    subject = cuts.subject
    limit = subject.config.limit
    cell = cuts.records.find(tag="cell", part="test", name=name, keep=keep, seed=0)
    if not cell or "refused" in cell or not can_run(name):
        return
    for file in subject.config.questions:
        about = dict(tag="questions", name=name, keep=keep, seed=0, file=Path(file).stem, limit=limit)
        if cuts.records.find(**about):
            continue
        model = cuts.cut(name, recipe, keep, 0) if keep < 1 else subject.model
        with precision(subject, model):
            result = questions.multiple_choice(model, subject.tokenizer,
                                               questions.read_questions(file)[:limit], progress=False)
        cuts.records.add(**about, **{key: result[key]
                                     for key in ("questions", "acc", "acc_norm", "acc_norm_stderr")})
        print(f"questions  {name:34} keep {keep:g}: {Path(file).stem} {result['acc_norm']:.4f}",
              flush=True)


def best_of_grid(records, config):
    """The best cells of the grid so far that are no published method: {name: recipe}."""
    table = compare_report.cells(records, "validation")
    table = table[(table.keep == config.grid_keep) & (table.seed == 0)].set_index("name")
    candidates = {name_of(recipe): recipe for recipe in GRID if recipe not in PUBLISHED.values()}
    ranked = table.perplexity[table.index.isin(candidates)].sort_values(kind="stable")
    return {name: candidates[name] for name in ranked.index[:config.best]}


# -- the command

def check(config):
    """Raise UserError for settings that mean nothing."""
    if config.block_size < 1:
        raise UserError(f"--block-size {config.block_size} must be at least 1")
    fractions = all(0 < keep < 1 for keep in (*config.keeps, config.grid_keep))
    if not fractions or min(config.seeds, config.limit, config.tokens // config.block_size) < 1:
        raise UserError(f"--keeps {config.keeps} and --grid-keep {config.grid_keep} must be "
                        f"between 0 and 1, --seeds {config.seeds} and --limit {config.limit} at "
                        f"least 1, --tokens {config.tokens} at least --block-size "
                        f"{config.block_size}")
    if min(config.micro_batch, config.windows) < 1 or config.windows % (4 * config.micro_batch):
        raise UserError(f"--windows {config.windows} must be a multiple of 4 x --micro-batch "
                        f"{config.micro_batch}: of two texts, and of halves of them")
    if config.part == "questions" and not config.questions:
        raise UserError("--part questions needs --questions FILE ...")
    if config.part == "cost" and config.offload:
        raise UserError("--part cost takes its times with the whole model on the device; leave out --offload")
    if config.best < 0:
        raise UserError(f"--best {config.best} must be 0 or more")
    compare_recovery.check(config)
    for file in config.questions:            # before the hours that come first
        questions.read_questions(file)


def main(config):
    check_choices(config)
    if config.part == "report":
        used = ("init", "out", "part", "grid_keep")
        unused = [setting.name for setting in dataclasses.fields(config) if setting.name not in used]
        refuse_idle(config, unused, "on a report")
        print_report(config)
        return
    check(config)
    subject = open_subject(config)
    if config.part == "cost":
        print(cost(subject))
        return
    cuts = Cuts(subject, Records(config.out, subject.identity()))
    run_cell(cuts, "validation", "dense", None, 1.0, 0)
    if config.part in ("grid", "all"):
        for recipe in GRID:
            run_cell(cuts, "validation", name_of(recipe), recipe, config.grid_keep, 0)
    rows = {**PUBLISHED, **best_of_grid(cuts.records.all, config)}
    if config.part in ("rows", "all"):
        run_rows(cuts, rows)
    if config.part == "questions":
        ask_rows(cuts, rows)
    if config.part == "alone":
        for name, recipe in {**rows, **HALF}.items():
            run_alone(cuts.records, config, name, recipe)
    if config.part == "recovery":
        compare_recovery.recover(cuts, losses_of)
    print_report(config)


def run_alone(records, config, name, recipe):
    """Record what the cut of a row takes, unless the records have it: its seconds in a process of its own,
    and its memory in another one, since freeing memory at once takes time. Where a process was ended from
    outside there is no record, and the same command tries again."""
    keep = 0.5 if name in HALF else config.grid_keep
    about = dict(tag="alone", name=name, keep=keep)
    if records.find(**about) or not can_run(name):
        return
    try:
        took = timing.own_process(cut_alone, config, name, recipe, keep)
        if "refused" not in took:
            with timing.freed_at_once():
                took["peak_bytes"] = timing.own_process(cut_alone, config, name, recipe, keep)["peak_bytes"]
    except UserError as problem:
        print(f"alone      {name:34} {problem}", flush=True)
        return
    records.add(**about, **took)
    print(f"alone      {name:34} " + "  ".join(f"{key} {value}" for key, value in took.items()), flush=True)


def cut_alone(config, name, recipe, keep):
    """{seconds, peak_bytes, threads} of one cut with the calibration that it needs, and no other; {refused}
    where there is no such cut."""
    subject = open_subject(config)
    cuts = Cuts(subject, fields=prune.needs(recipe) if recipe else None)
    start = time.perf_counter()
    try:
        with timing.peak(subject.config.device) as memory:
            cuts.cut(name, recipe, keep, seed=0)
    except UserError as problem:
        return {"refused": str(problem)}
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": memory["peak_bytes"], "threads": torch.get_num_threads()}


def run_rows(cuts, rows):
    """The reported rows: every method at every kept fraction with every calibration, and the questions
    of the first."""
    config = cuts.subject.config
    run_cell(cuts, "test", "dense", None, 1.0, 0)
    ask(cuts, "dense", None, 1.0)
    keeps = sorted(config.keeps, reverse=True)
    for seed, keep, (name, recipe) in itertools.product(range(config.seeds), keeps, rows.items()):
        repeats = name == "torch-pruning" and seed > 0       # it looks at no data, so seeds are alike
        if can_run(name) and not repeats:
            run_cell(cuts, "test", name, recipe, keep, seed)
            if keep == config.grid_keep and seed == 0:
                ask(cuts, name, recipe, keep)
    for seed, (name, recipe) in itertools.product(range(config.seeds), HALF.items()):
        run_cell(cuts, "test", name, recipe, 0.5, seed)      # half of the weights; all widths stay
        if seed == 0:
            ask(cuts, name, recipe, 0.5)


def ask_rows(cuts, rows):
    """The questions of all rows that have losses."""
    ask(cuts, "dense", None, 1.0)
    for name, recipe in rows.items():
        ask(cuts, name, recipe, cuts.subject.config.grid_keep)
    for name, recipe in HALF.items():
        ask(cuts, name, recipe, 0.5)


def print_report(config):
    """Print the report and write it beside the records: that of results/smollm2.jsonl into
    results/smollm2."""
    text = compare_report.report(read(config.out), config.grid_keep)
    page = Path(config.out).with_suffix("") / "report.md"
    write_atomic(page, lambda file: file.write(f"{text}\n".encode()))
    print(printable(text))


def cost(subject, windows=16, rounds=3):
    """A whole one-shot cut beside plain passes over the same calibration text, in the weights' dtype and in
    turns: medians of the ratios of seconds and of peak memory, as Markdown."""
    model = subject.model
    config = subject.config
    device = model.embed.weight.device
    for name, p in model.named_parameters():                # no more gradients than a score needs
        p.requires_grad_(name.startswith("blocks.") and p.dim() == 2)
    batches = score.batches(subject.texts["python"]["calibration"], config.block_size, windows,
                            config.micro_batch, 0)
    budget = math.floor(config.grid_keep * subject.total)

    def plain_passes(backward):
        with torch.set_grad_enabled(backward):
            for x, y in batches:
                loss = chunked_loss(model.hidden(x.to(device)), model.head_weight, y.to(device))[0]
                if backward:
                    loss.backward()

    def whole_cut(recipe):
        stats = prune.collect(model, batches, recipe, model.embed.weight.dtype)
        prune.cut_once(model, stats, recipe, budget)

    rows = []
    for name in ("flap", "taylor", "sensitivity", "taylor2"):
        backward = name != "flap"
        recipe = Prune(score=name, allocate="global", mend="none")
        ratios = []
        for _ in range(rounds):
            plain = seconds_and_memory(config.device, plain_passes, backward)
            for p in model.parameters():
                p.grad = None
            whole = seconds_and_memory(config.device, whole_cut, recipe)
            ratios.append((whole[0] / plain[0], whole[1] / plain[1]))
        seconds, memory = np.median(ratios, 0)
        rows.append([f"`{name}`", "forward, backward" if backward else "forward", f"{seconds:.2f}",
                     f"{memory:.2f}"])
    return markdown(["score", "plain passes", "seconds, ratio", "peak memory, ratio"], rows)


def seconds_and_memory(device, function, *args):
    """Call function(*args): -> seconds, and the peak memory in bytes (timing.peak)."""
    with timing.peak(device) as memory:
        seconds = timing.seconds_of(functools.partial(function, *args), device)
    return seconds, memory["peak_bytes"]


if __name__ == "__main__":
    run(lambda: main(parse(Compare)))

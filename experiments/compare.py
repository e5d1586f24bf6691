"""Every criterion, every allocation and the published methods on one pretrained model, under one budget and protocol.

    python -m experiments.compare smollm2 --out runs/compare.jsonl          # 9 core-hours at --tokens 8192; it can go on
    python -m experiments.compare smollm2 --out results/smollm2.jsonl --part report    # the tables from the committed records

Two texts (the standard library's Python source; English prose, the language reference in `pydoc_data.topics`), each in
three parts that share no document: calibration (one pass for all methods and a seed), validation (the grid, and so our
choices), test (the reported rows). Budgets are in the parameters of FFNs and attention, embeddings not counted. No
training after the cut; losses are nats per token in windows of --block-size. Models run in bf16 autocast (losses 2e-4
from float32's), SliceGPT's in float32. What is not as published: Adapt-Pruner measures anew every 2 % on half of the
calibration windows, in turns; Shortened LLaMA's perplexity and our `measured` run again on a few of them (below). With
3 KV groups in a layer an equal share means whole groups of some layers, whichever (allocate.Block), so methods of equal
shares are also shown with FFNs alone. Not here: recovery (train.py).
"""
import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import allocate
import checkpoint
import data
import prune
import score
from checkpoint import fingerprint
from common import UserError, append_record, parse, peak_memory, read_records, refuse_idle, run, write_atomic
from distill import chunked_loss
from eval import evaluate
from methods import measured, torch_pruning_peer, two_four
from methods.slicegpt import Sliced, slicegpt
from prune import Prune
from report import markdown
from tasks import questions


@dataclass(frozen=True)
class Compare:
    init: str                     # the model: a Hugging Face folder or hub id, or a checkpoint
    out: str = "runs/compare.jsonl"    # file of records
    part: str = "all"             # grid, rows, questions, report, or all of these; or cost (seconds and memory)
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


R = Prune
FFN = functools.partial(Prune, structure="ffn")
PUBLISHED = {  # score and allocation are the method's own
    "random": R(score="random", allocate="uniform"),
    "magnitude": R(score="magnitude", allocate="uniform"),
    "Wanda-sp": R(score="wanda", allocate="uniform"),
    "Wanda-sp, FFN": FFN(score="wanda", allocate="uniform"),
    "FLAP": R(score="flap", allocate="global", mend="bias"),
    "LLM-Pruner": R(score="taylor", allocate="middle"),
    "LLM-Pruner, FFN": FFN(score="taylor", allocate="middle"),
    "LLM-Pruner, channels": R(score="taylor", structure="channel"),
    "Minitron, width": R(score="activation", allocate="uniform"),
    "Minitron, FFN": FFN(score="activation", allocate="uniform"),
    "Minitron, channels": R(score="activation", structure="channel"),
    "Adapt-Pruner": R(score="taylor", allocate="adaptive", iterations=20),        # as many as ADAPT_STEP asks for
    "Adapt-Pruner, FFN": FFN(score="taylor", allocate="adaptive", iterations=20),
    "ShortGPT": R(score="influence", structure="layer"),
    "Shortened LLaMA, PPL": R(score="perplexity", structure="layer", measured_windows=16),
    "Shortened LLaMA, Taylor+": R(score="taylor", structure="layer", allocate="middle"),
    "SliceGPT": None,                 # no recipe of prune.py's
    "torch-pruning": None,
}
HALF = {"2:4, magnitude": R(score="magnitude", structure="2:4"), "2:4, Wanda": R(score="wanda", structure="2:4")}
DEPTH = ("ShortGPT", "Shortened LLaMA, PPL", "Shortened LLaMA, Taylor+")
ALLOCATIONS = [name for name in allocate.ALLOCATIONS if name != "uniform-strict"]
GRID = [R(score=s, allocate=a, mend=m) for ways, m in (                        # first what is quick to run
    (ALLOCATIONS, "none"), (ALLOCATIONS, "least-squares"), (["measured"], "least-squares"), (["measured"], "none"))
    for s in score.SCORES for a in ways]
ADAPT_STEP = 0.02                 # Adapt-Pruner's scripts


def name_of(recipe):
    return f"{recipe.score} / {recipe.allocate}" + (" / mended" if recipe.mend == "least-squares" else "")


def can_run(name):
    """Whether what a row needs is installed."""
    return name != "torch-pruning" or find_spec("torch_pruning") is not None


def families(documents, words=20):
    """Documents grouped so that no run of so many words occurs in two groups (the language reference holds documents
    inside of documents): lists of indices, the largest in letters first."""
    group, seen = list(range(len(documents))), {}
    for i, text in enumerate(documents):
        split = text.split()
        for a in range(max(1, len(split) - words + 1)):
            j = seen.setdefault(" ".join(split[a:a + words]), i)
            if group[i] != group[j]:
                old, new = group[i], group[j]
                group = [new if g == old else g for g in group]
    found = [[i for i, g in enumerate(group) if g == which] for which in dict.fromkeys(group)]
    return sorted(found, key=lambda indices: -sum(len(documents[i]) for i in indices))


def texts(tokenizer, block_size):
    """{text: {"calibration" | "validation" | "test": token ids}}; no document is in two parts."""
    import pydoc_data.topics
    code = data.load("stdlib", tokenizer, block_size=block_size)
    held_out = code.val[0:len(code.val)]
    ends = np.flatnonzero(held_out == tokenizer.eot) + 1
    half = ends[np.abs(ends - len(held_out) // 2).argmin()]                     # between two documents
    parts = {"calibration": [], "validation": [], "test": []}
    topics = [topic + "\n\n" for _, topic in sorted(pydoc_data.topics.topics.items())]
    for indices in families(topics):                                            # each into what is shortest by then
        part = min(parts, key=lambda part: sum(map(len, parts[part])))
        parts[part] += [tokenizer.encode(topics[i]) for i in indices]
    return {"python": {"calibration": code.train, "validation": held_out[:half], "test": held_out[half:]},
            "prose": {part: np.concatenate(ids) for part, ids in parts.items()}}


RUN = "compare"                   # the name of these records in a file that holds other runs, too


def read(file):
    """The records of the comparison in a file."""
    return [record for record in read_records(file) if record.get("run", RUN) == RUN]


class Bench:
    """One model, its texts, and the records so far."""
    def __init__(self, c):
        self.c, self.file = c, Path(c.out)
        self.model, about = checkpoint.load(c.init, "cpu", torch.float32, c.block_size)
        self.tokenizer = checkpoint.tokenizer_of(about, c.init)
        self.texts = texts(self.tokenizer, c.block_size)
        self.byte_lengths = self.tokenizer.byte_lengths()
        self.total = allocate.total(self.model.config)
        self.chains = {}                                             # {(name, seed): [(keep, Adapt-Pruner's model)]}
        for text, parts in self.texts.items():
            for part in ("validation", "test"):
                if len(parts[part]) <= c.tokens:
                    raise UserError(f"{text} has {len(parts[part]):,} tokens of {part}; give --tokens below that")
        identity = {"model": fingerprint(self.model)[:16], "windows": c.windows,
                    "block_size": c.block_size, "micro_batch": c.micro_batch, "tokens": c.tokens,
                    "params": self.model.config.num_params()["total"], "python": platform.python_version(),
                    "available": {text: {k: len(v) for k, v in parts.items()} for text, parts in self.texts.items()}}
        self.records = read(self.file)
        if not self.records:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.add(tag="config", **identity, torch=str(torch.__version__))
        differ = [f"{k} is {self.records[0].get(k)!r} there and {v!r} here" for k, v in identity.items()
                  if self.records[0].get(k) != v]
        if differ:
            raise UserError(f"{self.file} holds another comparison ({'; '.join(differ)}); give another --out")

    def add(self, **record):
        append_record(self.file, run=RUN, **record)
        self.records.append(record)

    def found(self, **wanted):
        return [r for r in self.records if all(r.get(k) == v for k, v in wanted.items())]

    @functools.lru_cache(maxsize=1)                                             # noqa: B019 (one Bench per program)
    def calibration(self, seed):
        """-> (batches, Stats with everything that any method asks for)."""
        c, halves = self.c, []
        for parts in self.texts.values():
            halves.append(score.batches(parts["calibration"], c.block_size, c.windows // 2, c.micro_batch, seed))
        batches = [batch for pair in zip(*halves) for batch in pair]
        wanted = set().union(*(row.needs for row in score.SCORES.values()), {"cosine", "channel", "gram"})
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            stats = score.collect(self.model, batches, wanted)
        stats.seed = seed
        print(f"calibrated on {stats.tokens:,} tokens, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        return batches, stats

    def cut(self, name, recipe, keep, seed):
        """The smaller model of a recipe; SliceGPT's and torch-pruning's by name. UserError: there is none."""
        most = math.floor(keep * self.total + 1e-6)
        if name == "torch-pruning":
            model, _, _ = torch_pruning_peer.cut(self.c.init, keep)
            model.config = dataclasses.replace(model.config, block_size=self.c.block_size)
            return model
        batches, stats = self.calibration(seed)
        if name == "SliceGPT":
            return slicegpt(self.model, [x for x, _ in batches], keep)
        if recipe.iterations > 1:
            return self.chain(name, recipe, keep, seed, batches)
        if recipe.structure == "2:4":                                           # which zeroes in place
            with torch.autocast("cpu", torch.bfloat16):
                stats = prune.collect(self.model, batches, recipe)
            return prune.one_shot(copy.deepcopy(self.model), stats, batches, recipe, most)
        damage = None
        if recipe.allocate == "measured" or recipe.score == "perplexity":
            damage = self.measure(recipe, seed, batches, stats)
        return prune.one_shot(self.model, stats, batches, recipe, most, damage=damage)

    def chain(self, name, recipe, keep, seed, batches):
        """Adapt-Pruner: ADAPT_STEP of the model at a time, each measured anew on one half of the windows, in turns; a
        larger cut goes on from a smaller one."""
        models = self.chains.setdefault((name, seed), [(1.0, self.model)])
        at, model = min((pair for pair in models if pair[0] >= keep - 1e-9), key=lambda pair: pair[0])
        while at > keep + 1e-9:
            half = batches[round((1 - at) / ADAPT_STEP) % 2 * len(batches) // 2:][:len(batches) // 2]
            at = max(keep, at - ADAPT_STEP)
            with torch.autocast("cpu", torch.bfloat16):
                stats = score.collect(model, half, prune.needs(recipe))
            model = prune.one_shot(model, stats, half, recipe, math.floor(at * self.total + 1e-6),
                                   self.model.config.widths())
        models.append((keep, model))
        return model

    def measure(self, recipe, seed, batches, stats):
        """prune.measure of a recipe, from the records or into them."""
        about = dict(tag="measured", score=recipe.score, mend=recipe.mend, structure=recipe.structure, seed=seed,
                     shares=list(measured.SHARES), windows=recipe.measured_windows)
        if not self.found(**about):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                found = prune.measure(self.model, stats, batches, recipe)
            self.add(**about, seconds=time.perf_counter() - start, found=[[*key, v] for key, v in found.items()])
        return {(layer, kind): value for layer, kind, value in self.found(**about)[0]["found"]}

    def evaluate(self, model, part):
        """{text: nats per token}."""
        exact = isinstance(model, Sliced)
        with contextlib.nullcontext() if exact else torch.autocast("cpu", torch.bfloat16):
            return {text: evaluate(model, parts[part], self.byte_lengths, self.c.tokens // self.c.block_size,
                                   batch=8)["loss"] for text, parts in self.texts.items()}

    def cell(self, part, name, recipe, keep, seed):
        """One cut, evaluated on `part` of the texts, unless the records have it."""
        about = dict(tag="cell", part=part, name=name, keep=keep, seed=seed)
        if self.found(**about):
            return
        if name not in ("dense", "torch-pruning"):
            self.calibration(seed)
        start = time.perf_counter()
        try:
            model = self.cut(name, recipe, keep, seed) if name != "dense" else self.model
        except UserError as problem:                                            # a finding, too
            print(f"{part:10} {name:34} keep {keep:g} seed {seed}: {problem}", flush=True)
            return self.add(**about, refused=str(problem))
        seconds = time.perf_counter() - start
        losses = self.evaluate(model, part)
        params = model.params() if name == "SliceGPT" else model.config.num_params()
        left = params["attention"] + params["ffn"] + params.get("shortcut", 0)
        if name in HALF:
            left = sum(p.count_nonzero().item() for _, p in two_four.matrices(model))
        widths = {} if name == "SliceGPT" else {"n_kv_head": model.config.n_kv_head, "d_ff": model.config.d_ff}
        self.add(**about, losses=losses, perplexity=math.exp(sum(losses.values()) / len(losses)), seconds=seconds,
                 kept=left / self.total, params=params["total"], **widths)
        print(f"{part:10} {name:34} keep {keep:g} seed {seed}: "
              + "  ".join(f"{text} {loss:.4f}" for text, loss in losses.items()), flush=True)

    def ask(self, name, recipe, keep, seed, file):
        """The share of a file's questions that a cut model answers, unless the records have it."""
        about = dict(tag="questions", name=name, keep=keep, seed=seed, file=Path(file).stem, limit=self.c.limit)
        row = self.found(tag="cell", part="test", name=name, keep=keep, seed=seed)
        if self.found(**about) or not row or "refused" in row[0] or not can_run(name):
            return
        model = self.cut(name, recipe, keep, seed) if keep < 1 else self.model
        with contextlib.nullcontext() if name == "SliceGPT" else torch.autocast("cpu", torch.bfloat16):
            r = questions.multiple_choice(model, self.tokenizer, questions.read_questions(file)[:self.c.limit], progress=False)
        self.add(**about, **{k: r[k] for k in ("questions", "acc", "acc_norm", "acc_norm_stderr")})
        print(f"questions  {name:34} keep {keep:g}: {Path(file).stem} {r['acc_norm']:.4f}", flush=True)

    def best(self):
        """The grid's best cells so far that are no published method: {name: recipe}."""
        cells = {r["name"]: r["perplexity"] for r in self.records if "perplexity" in r and r["part"] == "validation"
                 and (r["keep"], r["seed"]) == (self.c.grid_keep, 0)}
        ours = [g for g in GRID if name_of(g) in cells and g not in PUBLISHED.values()]
        return {name_of(g): g for g in sorted(ours, key=lambda g: cells[name_of(g)])[:self.c.best]}


def main(c):
    parts = ("grid", "rows", "questions", "report", "all", "cost")
    if c.part not in parts:
        raise UserError(f"--part {c.part!r} is not one of {', '.join(parts)}")
    if c.part == "report":
        used = ("init", "out", "part", "grid_keep")
        refuse_idle(c, [f.name for f in dataclasses.fields(c) if f.name not in used], "on a report")
        text = report(read(c.out), c.grid_keep)
        write_atomic(Path(c.out).with_suffix("") / "report.md", lambda file: file.write(f"{text}\n".encode()))
        return print(text)
    if c.block_size < 1:
        raise UserError(f"--block-size {c.block_size} must be at least 1")
    if not all(0 < k < 1 for k in (*c.keeps, c.grid_keep)) or min(c.seeds, c.limit, c.tokens // c.block_size) < 1:
        raise UserError(f"--keeps {c.keeps} and --grid-keep {c.grid_keep} must be between 0 and 1, --seeds {c.seeds} "
                        f"and --limit {c.limit} at least 1, --tokens {c.tokens} at least --block-size {c.block_size}")
    if min(c.micro_batch, c.windows) < 1 or c.windows % (4 * c.micro_batch):
        raise UserError(f"--windows {c.windows} must be a multiple of 4 x --micro-batch {c.micro_batch}: of two texts, "
                        "and of halves of them")
    if c.part == "questions" and not c.questions:
        raise UserError("--part questions needs --questions FILE ...")
    bench = Bench(c)
    if c.part == "cost":
        return print(cost(bench))
    bench.cell("validation", "dense", None, 1.0, 0)
    for recipe in GRID if c.part in ("grid", "all") else ():
        bench.cell("validation", name_of(recipe), recipe, c.grid_keep, 0)
    rows = {**PUBLISHED, **bench.best()}
    if c.part in ("rows", "all"):
        bench.cell("test", "dense", None, 1.0, 0)
        cuts = itertools.product(range(c.seeds), sorted(c.keeps, reverse=True), rows.items())
        for seed, keep, (name, recipe) in cuts:
            if can_run(name) and (name != "torch-pruning" or seed == 0):                 # it looks at no data
                bench.cell("test", name, recipe, keep, seed)
        for seed, (name, recipe) in itertools.product(range(c.seeds), HALF.items()):
            bench.cell("test", name, recipe, 0.5, seed)                         # of the weights, none of the widths
    for file in c.questions if c.part in ("questions", "all") else ():
        for name, recipe, keep in (("dense", None, 1.0), *((n, r, c.grid_keep) for n, r in rows.items())):
            bench.ask(name, recipe, keep, 0, file)
    print(report(bench.records, c.grid_keep))


class Phases:
    """Seconds and peak memory (bytes, of the whole process; on a GPU of its memory) of named parts of a program,
    printed as they end and kept in `last`."""
    def __init__(self, device):
        self.device, self.last = device, {}

    @contextlib.contextmanager
    def __call__(self, name):
        on_gpu = self.device.startswith("cuda")
        own = Path("/proc/self/clear_refs")                  # Linux: 5 resets the process's own peak
        own = own if os.access(own, os.W_OK) and not on_gpu else None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif own:
            own.write_text("5")
        start = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
        elif own:
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        else:                                                # elsewhere: of the program so far
            peak = peak_memory()
        self.last[name] = seconds, peak
        print(f"  {name:10} {seconds:8.1f} s   peak {peak / 2**30:.2f} GiB", flush=True)


def cost(bench, windows=16, rounds=3):
    """A whole one-shot cut beside the plain passes over the same calibration text, float32, in interleaved rounds ->
    medians of the ratios, as Markdown."""
    model, c, phase, rows = bench.model, bench.c, Phases("cpu"), []
    for name, p in model.named_parameters():                # no more gradients than a score needs
        p.requires_grad_(name.startswith("blocks.") and p.dim() == 2)
    batches = score.batches(bench.texts["python"]["calibration"], c.block_size, windows, c.micro_batch, 0)
    for name in ("flap", "taylor", "sensitivity", "taylor2"):
        backward, ratios = name != "flap", []
        recipe = R(score=name, allocate="global")
        for _ in range(rounds):
            with phase("plain"), torch.set_grad_enabled(backward):
                for x, y in batches:
                    loss = chunked_loss(model.hidden(x), model.head_weight, y)[0]
                    if backward:
                        loss.backward()
            for p in model.parameters():
                p.grad = None
            with phase(name):
                stats = prune.collect(model, batches, recipe)
                small = prune.one_shot(model, stats, batches, recipe, math.floor(c.grid_keep * bench.total))
            del stats, small
            ratios.append([ours / plain for ours, plain in zip(phase.last[name], phase.last["plain"])])
        rows.append([f"`{name}`", "forward, backward" if backward else "forward",
                     *(f"{sorted(column)[rounds // 2]:.2f}" for column in zip(*ratios))])
    return markdown(["score", "plain passes", "seconds, ratio", "peak memory, ratio"], rows)


# -- what the records say

def cells(records, part):
    """{(name, keep): {seed: record}} of the cells that were not refused."""
    found = {}
    for r in records:
        if r["tag"] == "cell" and r["part"] == part and "perplexity" in r:
            found.setdefault((r["name"], r["keep"]), {})[r["seed"]] = r
    return found


def mean(values):
    return sum(values) / len(values)


def short(perplexities):
    """The mean, and half of the range where there are several."""
    show = lambda x: f"{x:.2f}" if x < 1000 else f"{x:.3g}"
    spread = f" ± {show((max(perplexities) - min(perplexities)) / 2)}" if len(perplexities) > 1 else ""
    return show(mean(perplexities)) + spread


def grid_table(records, keep):
    """Perplexity on the validation parts, score by allocation; the second number with least squares."""
    found, rows = cells(records, "validation"), []

    def cell(s, a):
        each = [found.get((name_of(R(score=s, allocate=a, mend=m)), keep)) for m in ("none", "least-squares")]
        return " / ".join(short([x[0]["perplexity"]]) if x else "-" for x in each)

    ways = [*ALLOCATIONS, "measured"]
    for s in score.SCORES:
        rows.append([f"`{s}`", *(cell(s, a) for a in ways)])
    dense = found[("dense", 1.0)][0]["perplexity"]
    return (f"Validation perplexity at keep {keep:g}, as cut / with least squares (dense {dense:.2f}):\n\n"
            + markdown(["score", *(f"`{a}`" for a in ways)], rows))


def label(name):
    """A method in a table: ours bold; what stands for a library said."""
    if name == "torch-pruning":
        return "torch-pruning's LLM example (weight norms, no data)"
    return name if name in (*PUBLISHED, *HALF, "dense") else f"**{name}**"


def row_tables(records):
    """One table for each kept fraction: the reported rows on the test parts, best first."""
    found = cells(records, "test")
    asked = {(r["name"], r["keep"], f"{r['file']} ({r['limit']})"): r["acc_norm"] for r in records
             if r["tag"] == "questions"}
    for keep in sorted({keep for _, keep in found if keep < 1}, reverse=True):
        files, rows = sorted({file for _, k, file in asked if k == keep}), []
        for (name, k), seeds in found.items():
            if k not in (keep, 1):                                              # 1: the dense model, in every table
                continue
            column = lambda pick: [pick(r) for r in seeds.values()]
            rows.append((mean(column(lambda r: r["perplexity"])), [
                label(name), len(seeds),
                f"{mean(column(lambda r: r['kept'])):.3f}", f"{mean(column(lambda r: r['params'])) / 1e6:.1f}",
                *(short([math.exp(mean(column(lambda r: r["losses"][text])))]) for text in ("python", "prose")),
                short(column(lambda r: r["perplexity"])),
                *(f"{asked[name, k, f]:.3f}" if (name, k, f) in asked else "" for f in files)]))
        rows.sort(key=lambda row: row[0])
        yield f"Test perplexity, keep {keep:g} (bold: ours):\n\n" + markdown(
            ["method", "seeds", "kept", "params (M)", "python", "prose", "both", *files], [row for _, row in rows])


def overview(records, keep):
    """Every method by kept fraction, its test perplexity and the share of questions answered at `keep`, best there
    first; methods that did not run at it last."""
    found, answered = cells(records, "test"), {}
    for r in records:
        if r["tag"] == "questions" and r["keep"] in (keep, 1):
            answered.setdefault(r["name"], {})[r["file"], r["limit"]] = r["acc_norm"]
    all_files = set().union(*answered.values())
    asked = {name: f"{mean([*share.values()]):.3f}" for name, share in answered.items() if {*share} == all_files}
    keeps = sorted({k for _, k in found if k < 1}, reverse=True)
    value = lambda name, k: mean([r["perplexity"] for r in found[name, k].values()]) if (name, k) in found else math.inf
    names = sorted({name for name, _ in found}, key=lambda name: (name != "dense", value(name, keep), value(name, .5)))
    rows = [[label(name),
             *(short([r["perplexity"] for r in found[at].values()]) if (at := (name, 1.0 if name == "dense" else k))
               in found else "" for k in keeps), *([asked.get(name, "")] if asked else [])] for name in names]
    questions = [f"questions at {keep:g}"] if asked else []
    files = ", ".join(f"{n} of {file}" for file, n in sorted(all_files))
    files = f", and mean accuracy (acc_norm) on {files}" if asked else ""
    return (f"Test perplexity by kept fraction{files} (bold: ours; ±: half the range of calibration seeds):\n\n"
            + markdown(["method", *(f"keep {k:g}" for k in keeps), *questions], rows))


def verdict(differences):
    """Of relative differences in perplexity: whether all, none or some are below 0."""
    below = sum(d < 0 for d in differences)
    return "holds" if below == len(differences) else "does not hold" if below == 0 else "mixed"


def claims(records, keep):
    """Each claim of the papers against the records, as a list with verdicts. Ours is the grid's best by validation."""
    grid, test, lines = cells(records, "validation"), cells(records, "test"), []
    pairs = [(s, *(grid.get((name_of(R(score=s, allocate=a)), keep)) for a in ("adaptive", "uniform")))
             for s in score.SCORES]
    pairs = [(s, a[0]["perplexity"] / u[0]["perplexity"] - 1) for s, a, u in pairs if a and u]
    if pairs:
        lines.append(f"*Adaptive beats uniform* (keep {keep:g}, validation, one calibration): "
                     f"{verdict([d for _, d in pairs])}, " + ", ".join(f"`{s}` {d:+.1%}" for s, d in pairs))

    def against(a, b, k):
        """Relative differences of perplexity by the seeds that both have."""
        x, y = test.get((a, k), {}), test.get((b, k), {})
        return [x[s]["perplexity"] / y[s]["perplexity"] - 1 for s in sorted({*x} & {*y})]

    keeps = sorted({k for name, k in test if k < 1 and name not in HALF}, reverse=True)
    for rival in ("LLM-Pruner", "LLM-Pruner, FFN", "FLAP", "Wanda-sp", "Wanda-sp, FFN", "SliceGPT"):
        mine = "Adapt-Pruner, FFN" if rival.endswith("FFN") else "Adapt-Pruner"
        found = {k: ds for k in keeps if (ds := against(mine, rival, k))}
        if found:
            lines.append(f"*{mine} beats {rival}*: {verdict(sum(found.values(), []))}, " + "; ".join(
                f"keep {k:g} " + ", ".join(f"{d:+.1%}" for d in ds) for k, ds in found.items()))
    average = {key: mean([r["perplexity"] for r in seeds.values()]) for key, seeds in test.items()}
    chosen = min((r for (n, k), r in grid.items() if k == keep and 0 in r and any(n == name for name, _ in test)),
                 key=lambda r: r[0]["perplexity"], default={0: {"name": None}})[0]["name"]
    for k in keeps:
        published = {n: p for (n, at), p in average.items() if at == k and n in PUBLISHED}
        depth, width = ({n: p for n, p in published.items() if (n in DEPTH) == d} for d in (True, False))
        if depth and width:
            d, w = min(depth, key=depth.get), min(width, key=width.get)
            lines.append(f"*Width beats depth*, keep {k:g}: {verdict([width[w] / depth[d] - 1])}, best width {w} "
                         f"{width[w]:.2f}, best depth {d} {depth[d]:.2f}")
        if published and (chosen, k) in average:
            p = min(published, key=published.get)
            by_seed = ", ".join(f"{d:+.1%}" for d in against(chosen, p, k))
            lines.append(f"*Ours* (the grid's best by validation, {chosen}), keep {k:g}: {average[chosen, k]:.2f} "
                         f"against the best published, {p}, {published[p]:.2f}: {by_seed}")
    refused = {(r["name"], r["keep"]) for r in records if "refused" in r and r["part"] == "test"}
    if refused:
        lines.append("Refused: " + ", ".join(f"{name} at {k:g}" for name, k in sorted(refused)))
    return "\n".join(f"- {line}" for line in lines)


def report(records, keep):
    """The tables and what they say about each claim, as Markdown. UserError: no records."""
    if not cells(records, "validation"):
        raise UserError("no records there; give the --out of a comparison that ran")
    return "\n\n".join((overview(records, keep), grid_table(records, keep), claims(records, keep),
                        *row_tables(records)))


if __name__ == "__main__":
    run(lambda: main(parse(Compare)))

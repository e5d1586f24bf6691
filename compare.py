"""Every criterion, every allocation and the published methods on one pretrained model, under one budget and protocol.

    python compare.py smollm2 --out runs/compare                # about half a day on 2 cores; goes on where it stopped
    python compare.py smollm2 --out results/smollm2 --part report          # the tables from the committed records

Two texts (the standard library's Python source; English prose, the language reference in `pydoc_data.topics`), each in
three parts by document: calibration (one shared pass for all methods and a seed), validation (the grid, and so our
choices), test (reported rows, once). Budgets are in the parameters of FFNs and attention, embeddings not counted. Cuts
are made in one shot with no training after them; losses are nats per token in windows of --block-size. Models run in
bf16 autocast (losses 2e-4 from float32's), SliceGPT's in float32. Not here: recovery (train.py).
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
from pathlib import Path

import numpy as np
import torch

import allocate
import checkpoint
import data
import prune
import score
import tasks
import two_four
from common import UserError, append_record, parse, read_records, run
from distill import chunked_loss
from eval import evaluate
from prune import Prune
from slicegpt import slicegpt


@dataclass(frozen=True)
class Compare:
    init: str                     # the model: a Hugging Face folder or hub id, or a checkpoint
    out: str = "runs/compare"     # folder of records.jsonl
    part: str = "all"             # grid, rows, questions, report, or all of these; or cost (seconds and memory)
    keeps: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)    # kept fractions of the reported rows
    grid_keep: float = 0.8        # of the grid, and of the questions
    seeds: int = 2                # calibrations of the reported rows
    windows: int = 64             # of calibration, half of them from each text
    block_size: int = 256         # tokens in a window
    micro_batch: int = 2          # calibration windows per batch
    tokens: int = 32768           # evaluated of each text
    questions: tuple[str, ...] = ()    # files of questions (tasks.py)
    limit: int = 500              # questions per file
    best: int = 6                 # of the grid's cells go into the reported rows


R = functools.partial(Prune, mend="none")
PUBLISHED = {  # as published: score and allocation are the method's own
    "random": R(score="random", allocate="uniform"),
    "magnitude": R(score="magnitude", allocate="uniform"),
    "Wanda-sp": R(score="wanda", allocate="uniform"),
    "FLAP": R(score="flap", allocate="global", mend="bias"),
    "LLM-Pruner": R(score="taylor", allocate="middle"),
    "LLM-Pruner, 2nd order": R(score="taylor2", allocate="middle"),
    "LLM-Pruner, channels": R(score="taylor", structure="channel"),
    "Minitron, width": R(score="activation", allocate="uniform"),
    "Minitron, channels": R(score="activation", structure="channel"),
    "Adapt-Pruner": R(score="taylor", allocate="adaptive", iterations=20),        # 2 % of the model each
    "ShortGPT": R(score="influence", structure="layer"),
    "Shortened LLaMA, PPL": R(score="perplexity", structure="layer"),
    "Shortened LLaMA, Taylor+": R(score="taylor", structure="layer", allocate="middle"),
    "SliceGPT": None,
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


def texts(tokenizer, block_size):
    """{text: {"calibration" | "validation" | "test": token ids}}, disjoint by document."""
    import pydoc_data.topics
    code = data.load("stdlib", tokenizer, block_size=block_size)
    held_out = code.val[0:len(code.val)]
    ends = np.flatnonzero(held_out == tokenizer.eot) + 1
    half = ends[np.abs(ends - len(held_out) // 2).argmin()]                     # between two documents
    parts = {"calibration": [], "validation": [], "test": []}
    for i, (_, topic) in enumerate(sorted(pydoc_data.topics.topics.items())):
        parts[("calibration", "validation", "calibration", "test")[i % 4]].append(tokenizer.encode(topic + "\n\n"))
    return {"python": {"calibration": code.train, "validation": held_out[:half], "test": held_out[half:]},
            "prose": {part: np.concatenate(ids) for part, ids in parts.items()}}


class Bench:
    """One model, its texts, and the records so far."""
    def __init__(self, c):
        self.c, self.file = c, Path(c.out) / "records.jsonl"
        self.model, about = checkpoint.load(c.init, "cpu", torch.float32, c.block_size)
        self.tokenizer = checkpoint.tokenizer_of(about, c.init)
        self.texts = texts(self.tokenizer, c.block_size)
        self.byte_lengths = self.tokenizer.byte_lengths()
        self.total = allocate.total(self.model.config)
        self.chains = {}                                                        # {(seed, keep): Adapt-Pruner's model}
        identity = {"windows": c.windows, "block_size": c.block_size, "micro_batch": c.micro_batch, "tokens": c.tokens,
                    "params": self.model.config.num_params()["total"], "python": platform.python_version(),
                    "available": {text: {k: len(v) for k, v in parts.items()} for text, parts in self.texts.items()}}
        self.records = read_records(self.file)
        if not self.records:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.add(tag="config", **identity, torch=str(torch.__version__))
        differ = [f"{k} is {self.records[0].get(k)!r} there and {v!r} here" for k, v in identity.items()
                  if self.records[0].get(k) != v]
        if differ:
            raise UserError(f"{self.file} holds another comparison ({'; '.join(differ)}); give another --out")

    def add(self, **record):
        append_record(self.file, **record)
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
        wanted = set().union(*(need for _, need in score.SCORES.values()), {"cosine", "channel", "gram"})
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            stats = score.collect(self.model, batches, wanted)
        stats.seed = seed
        print(f"calibrated on {stats.tokens:,} tokens, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        return batches, stats

    def cut(self, name, recipe, keep, seed):
        """The smaller model of a recipe; SliceGPT's and torch-pruning's by name."""
        most = math.floor(keep * self.total + 1e-6)
        if name == "torch-pruning":
            import torch_pruning_peer
            model, _, _ = torch_pruning_peer.cut(self.c.init, keep)
            model.config = dataclasses.replace(model.config, block_size=self.c.block_size)
            return model
        batches, stats = self.calibration(seed)
        if name == "SliceGPT":
            return slicegpt(self.model, [x for x, _ in batches], keep)
        if recipe.iterations > 1:
            return self.chain(recipe, keep, seed, batches)
        if recipe.structure == "2:4":                                           # which zeroes in place
            with torch.autocast("cpu", torch.bfloat16):
                stats = prune.collect(self.model, batches, recipe)
            return prune.one_shot(copy.deepcopy(self.model), stats, batches, recipe, most)
        damage = None
        if recipe.allocate == "measured":
            damage = self.damage(recipe, seed, batches, stats)
        return prune.one_shot(self.model, stats, batches, recipe, most, damage=damage)

    def chain(self, recipe, keep, seed, batches):
        """Adapt-Pruner: ADAPT_STEP of the model at a time, measured anew on other windows each time; a larger cut goes
        on from a smaller one."""
        at, model = max(((k, m) for (s, k), m in self.chains.items() if s == seed and k >= keep - 1e-9),
                        key=lambda pair: -pair[0], default=(1.0, self.model))
        few = max(2, len(batches) // 4)
        while at > keep + 1e-9:
            first = round((1 - at) / ADAPT_STEP) * few
            at = max(keep, at - ADAPT_STEP)
            some = [batches[(first + i) % len(batches)] for i in range(few)]
            with torch.autocast("cpu", torch.bfloat16):
                stats = score.collect(model, some, prune.needs(recipe))
            model = prune.one_shot(model, stats, some, recipe, math.floor(at * self.total + 1e-6),
                                   self.model.config.widths())
        self.chains[seed, keep] = model
        return model

    def damage(self, recipe, seed, batches, stats):
        """The measured curves of a score, from the records or into them."""
        about = dict(tag="damage", score=recipe.score, mend=recipe.mend, seed=seed)
        if not self.found(**about):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                curves = prune.measure(self.model, stats, batches, recipe)
            self.add(**about, seconds=time.perf_counter() - start,
                     curves=[[*key, [[n, round(nats, 6)] for n, nats in points]] for key, points in curves.items()])
        return {(layer, kind): points for layer, kind, points in self.found(**about)[0]["curves"]}

    def evaluate(self, model, part):
        """{text: nats per token}."""
        exact = "SliceGPT" in getattr(model, "evaluation_only", "")
        with contextlib.nullcontext() if exact else torch.autocast("cpu", torch.bfloat16):
            return {text: evaluate(model, parts[part], self.byte_lengths, self.c.tokens // self.c.block_size,
                                   batch=8)["loss"] for text, parts in self.texts.items()}

    def cell(self, part, name, recipe, keep, seed):
        """One cut, evaluated on `part` of the texts, unless the records have it."""
        about = dict(tag="cell", part=part, name=name, keep=keep, seed=seed)
        if self.found(**about):
            return
        start = time.perf_counter()
        try:
            model = self.cut(name, recipe, keep, seed) if keep < 1 else self.model
        except UserError as problem:                                            # a finding, too
            return self.add(**about, refused=str(problem))
        seconds = time.perf_counter() - start
        losses = self.evaluate(model, part)
        widths = {} if name == "SliceGPT" else {"n_kv_head": model.config.n_kv_head, "d_ff": model.config.d_ff,
                                                "removable": allocate.total(model.config) if name not in HALF else
                                                sum(p.count_nonzero().item() for _, p in two_four.matrices(model))}
        self.add(**about, losses=losses, perplexity=math.exp(sum(losses.values()) / len(losses)), seconds=seconds,
                 **widths)
        print(f"{part:10} {name:34} keep {keep:g} seed {seed}: "
              + "  ".join(f"{text} {loss:.4f}" for text, loss in losses.items()), flush=True)

    def ask(self, name, recipe, keep, seed, file):
        """The share of a file's questions that a cut model answers, unless the records have it."""
        about = dict(tag="questions", name=name, keep=keep, seed=seed, file=Path(file).stem, limit=self.c.limit)
        row = self.found(tag="cell", part="test", name=name, keep=keep, seed=seed)
        if self.found(**about) or not row or "refused" in row[0]:
            return
        model = self.cut(name, recipe, keep, seed) if keep < 1 else self.model
        with contextlib.nullcontext() if name == "SliceGPT" else torch.autocast("cpu", torch.bfloat16):
            r = tasks.multiple_choice(model, self.tokenizer, tasks.read_questions(file)[:self.c.limit], progress=False)
        self.add(**about, **{k: r[k] for k in ("questions", "acc", "acc_norm", "acc_norm_stderr")})
        print(f"questions  {name:34} keep {keep:g}: {Path(file).stem} {r['acc_norm']:.4f}", flush=True)

    def best(self):
        """The grid's best cells so far that are no published method: {name: recipe}."""
        cells = {r["name"]: r["perplexity"] for r in self.found(tag="cell", part="validation") if "perplexity" in r}
        ours = [g for g in GRID if name_of(g) in cells and g not in PUBLISHED.values()]
        return {name_of(g): g for g in sorted(ours, key=lambda g: cells[name_of(g)])[:self.c.best]}


def main(c):
    parts = ("grid", "rows", "questions", "report", "all", "cost")
    if c.part not in parts:
        raise UserError(f"--part {c.part!r} is not one of {', '.join(parts)}")
    if c.part == "report":
        return print(report(read_records(Path(c.out) / "records.jsonl"), c.grid_keep))
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
            if name != "torch-pruning" or seed == 0:                            # it looks at no data
                bench.cell("test", name, recipe, keep, seed)
        for seed, (name, recipe) in itertools.product(range(c.seeds), HALF.items()):
            bench.cell("test", name, recipe, 0.5, seed)                         # of the weights, none of the widths
    for file in c.questions if c.part in ("questions", "all") else ():
        for name, recipe, keep in (("dense", None, 1.0), *((n, r, c.grid_keep) for n, r in rows.items())):
            bench.ask(name, recipe, keep, 0, file)
    print(report(bench.records, c.grid_keep))


def cost(bench, windows=16, rounds=3):
    """A whole one-shot cut beside the plain passes over the same calibration text, float32, in interleaved rounds ->
    medians of the ratios, as Markdown."""
    model, c, phase, rows = bench.model, bench.c, prune.Phases("cpu"), []
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


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def mean(values):
    return sum(values) / len(values)


def grid_table(records, keep):
    """Perplexity on the validation parts, score by allocation; the second number with least squares."""
    found, rows = cells(records, "validation"), []

    def cell(s, a):
        each = [found.get((name_of(R(score=s, allocate=a, mend=m)), keep)) for m in ("none", "least-squares")]
        return " / ".join(f"{x[0]['perplexity']:.2f}" if x else "-" for x in each)

    ways = [*ALLOCATIONS, "measured"]
    for s in score.SCORES:
        rows.append([f"`{s}`", *(cell(s, a) for a in ways)])
    dense = found[("dense", 1.0)][0]["perplexity"]
    return (f"Validation perplexity at keep {keep:g}, as cut / with least squares (dense {dense:.2f}):\n\n"
            + markdown(["score", *(f"`{a}`" for a in ways)], rows))


def row_tables(records):
    """One table for each kept fraction: the reported rows on the test parts, best first."""
    found = cells(records, "test")
    asked = {(r["name"], r["keep"], r["file"]): r["acc_norm"] for r in records if r["tag"] == "questions"}
    files = sorted({file for _, _, file in asked})
    for keep in sorted({keep for _, keep in found}, reverse=True):
        rows = []
        for (name, k), seeds in found.items():
            if k == keep:
                ppl = [r["perplexity"] for r in seeds.values()]
                accs = [f"{asked[name, keep, file]:.3f}" if (name, keep, file) in asked else "" for file in files]
                texts = [f"{math.exp(mean([r['losses'][text] for r in seeds.values()])):.2f}"
                         for text in ("python", "prose")]
                rows.append((mean(ppl), [name if name in (*PUBLISHED, *HALF, "dense") else f"**{name}**",
                                         len(seeds), *texts, f"{mean(ppl):.2f} ± {(max(ppl) - min(ppl)) / 2:.2f}",
                                         *(accs if any(accs) or any(key[1] == keep for key in asked) else [])]))
        extra = files if any(key[1] == keep for key in asked) else []
        rows.sort(key=lambda row: row[0])
        yield f"Test perplexity, keep {keep:g} (bold: ours):\n\n" + markdown(
            ["method", "seeds", "python", "prose", "both", *extra], [row for _, row in rows])


def claims(records, keep):
    """Each claim of the papers against the records, as a list."""
    grid, test, lines = cells(records, "validation"), cells(records, "test"), []
    pairs = [(s, *(grid.get((name_of(R(score=s, allocate=a)), keep)) for a in ("adaptive", "uniform")))
             for s in score.SCORES]
    pairs = [(s, a[0]["perplexity"] / u[0]["perplexity"] - 1) for s, a, u in pairs if a and u]
    if pairs:
        lines.append(f"adaptive better than uniform, keep {keep:g}, validation, one calibration: with "
                     f"{sum(d < 0 for _, d in pairs)} of {len(pairs)} scores ("
                     + ", ".join(f"{s} {d:+.1%}" for s, d in pairs) + ")")

    def against(a, b, k):
        """Relative differences of perplexity by the seeds that both have."""
        x, y = test.get((a, k), {}), test.get((b, k), {})
        return [x[s]["perplexity"] / y[s]["perplexity"] - 1 for s in sorted({*x} & {*y})]

    keeps = sorted({k for name, k in test if k < 1 and name not in HALF}, reverse=True)
    for rival in ("LLM-Pruner", "FLAP", "Wanda-sp", "SliceGPT"):
        found = {k: against("Adapt-Pruner", rival, k) for k in keeps}
        if any(found.values()):
            lines.append(f"Adapt-Pruner better than {rival}: " + "; ".join(
                f"keep {k:g} " + ", ".join(f"{d:+.1%}" for d in ds) for k, ds in found.items() if ds))
    average = {key: mean([r["perplexity"] for r in seeds.values()]) for key, seeds in test.items()}
    for k in keeps:
        published = {n: p for (n, at), p in average.items() if at == k and n in PUBLISHED}
        ours = {n: p for (n, at), p in average.items() if at == k and n not in PUBLISHED}
        depth, width = ({n: p for n, p in published.items() if (n in DEPTH) == d} for d in (True, False))
        if depth and width:
            d, w = min(depth, key=depth.get), min(width, key=width.get)
            lines.append(f"width better than depth, keep {k:g}: best width {w} {width[w]:.2f}, best depth {d} "
                         f"{depth[d]:.2f}")
        if published and ours:
            p, o = min(published, key=published.get), min(ours, key=ours.get)
            by_seed = ", ".join(f"{d:+.1%}" for d in against(o, p, k))
            lines.append(f"ours, keep {k:g}: {o} {ours[o]:.2f} against {p} {published[p]:.2f}: {by_seed}")
    return "\n".join(f"- {line}" for line in lines)


def report(records, keep):
    """The tables and what they say about each claim, as Markdown. UserError: no records."""
    if not records:
        raise UserError("no records there; give the --out of a comparison that ran")
    return "\n\n".join((grid_table(records, keep), *row_tables(records), claims(records, keep)))


if __name__ == "__main__":
    run(lambda: main(parse(Compare)))

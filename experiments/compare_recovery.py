"""One common recovery: a cut of each family is trained on equally many tokens, in two ways.

    python -m experiments.compare smollm2 --out runs/compare.jsonl --tokens 8192 --part recovery

Each row of RECOVERED is cut with the first calibration and saved as a checkpoint. Two commands train it,
each in a process of its own: `train.py --plan scratch` all weights, `methods.lora` adapters. The records
hold the commands. Both see the same windows in the same order, of Python and of prose in turns: the
calibration parts of the comparison, which share no document with the test. The dense model is trained
alike: what it gains is the text's doing. LoRAPrune, which cuts while adapters train, has the same tokens.

A sparse row has full training only, which keeps its zeros; adapters would fill them. FLAP, SliceGPT and
torch-pruning make models for evaluation only. Not here: cuts and losses (experiments/compare.py).
"""
import contextlib
import dataclasses
import io
import json
import math
import re
import shlex
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

import checkpoint
import data
import prune
import report
import train
from bench import timing
from common import UserError, check_positive, parse, refuse_idle, write_atomic
from experiments.compare_report import GRID, HALF, PUBLISHED, name_of
from methods import lora

LORAPRUNE = "LoRAPrune"       # the dense model, whose units go while its adapters train
RECOVERED = (
    "dense", LORAPRUNE, "taylor / global / mended", "LLM-Pruner, FFN", "Adapt-Pruner, FFN", "Minitron, FFN",
    "Shortened LLaMA, PPL", "Minitron, channels", "Bypass Back-propagation", "2:4, Wanda / mended",
    "half, SparseGPT / mended")
WAYS = {"full": "train.py", "lora": "-m methods.lora"}     # what follows "python" in a command
WINDOWS = 4                   # of an optimizer step
SEED = 0                      # of the calibration, the adapters and the order of the text
SETTINGS = ("recovery_tokens", "recovery_lr", "lora_lr")


def check(config):
    """Raise UserError for settings of the recovery that mean nothing, or that nothing reads."""
    if config.part != "recovery":
        refuse_idle(config, SETTINGS, "without --part recovery")
        return
    check_positive(config, SETTINGS)
    step = WINDOWS * config.block_size
    if config.recovery_tokens % step:
        raise UserError(f"--recovery-tokens {config.recovery_tokens} must be a multiple of the {step} tokens of an "
                        f"optimizer step; give {math.ceil(config.recovery_tokens / step) * step}")


def recipes(grid_keep):
    """{name: (recipe, kept fraction)} of RECOVERED. What begins with the dense model has no recipe."""
    table = {name_of(recipe): recipe for recipe in GRID} | PUBLISHED | HALF | {"dense": None, LORAPRUNE: None}
    keeps = {"dense": 1.0} | dict.fromkeys(HALF, 0.5)
    return {name: (table[name], keeps.get(name, grid_keep)) for name in RECOVERED}


def ways_of(name):
    """How a row can be trained: a name in WAYS each."""
    if name == LORAPRUNE:
        return ("lora",)
    return ("full",) if name in HALF else ("full", "lora")


def run_command(way, flags, out, device):
    """Run a command in this process: {seconds of the steps, trained parameters, peak_bytes}."""
    with timing.peak(device) as memory, contextlib.redirect_stdout(io.StringIO()) as printed:
        if way == "full":
            train.main(parse(train.Train, flags))
            summary = report.records(out)["summary"][0]
            seconds = summary["seconds"]["train"]
            trained = summary["params"] - summary.get("zeros", 0)
        else:
            lora.main(parse(lora.Lora, flags))
            sentence = re.search(r"trained ([\d,]+) parameters .* in ([\d.]+) seconds", printed.getvalue())
            trained = int(sentence[1].replace(",", ""))
            seconds = float(sentence[2])
    return {"seconds": seconds, "trained": trained, "peak_bytes": memory["peak_bytes"]}


class Recovery:
    """Trains cuts back. Raises UserError if the commands would read another text than the calibration."""
    def __init__(self, cuts, losses_of):
        self.cuts = cuts
        self.losses_of = losses_of                # experiments.compare.losses_of
        self.subject = cuts.subject
        self.config = cuts.subject.config
        self.folder = Path(self.config.out).with_suffix("") / "runs"
        python = self.subject.texts["python"]["calibration"]
        prose = self.subject.tokenizer.decode(self.subject.texts["prose"]["calibration"].tolist())
        line = json.dumps({"text": prose}).encode() + b"\n"
        file = self.folder / "prose.jsonl"
        if not file.exists():
            write_atomic(file, lambda opened: opened.write(line))
        self.sources = ("stdlib", str(file))      # as --data takes them: each as often as the other
        self.corpus = data.load_mixture(self.sources, self.subject.tokenizer, block_size=self.config.block_size)
        stdlib = self.corpus.parts[0].train
        is_calibration = np.array_equal(stdlib[0:len(stdlib)], python[0:len(python)])
        if not is_calibration or file.read_bytes() != line:
            raise UserError(f"stdlib or {file} is not the comparison's calibration text; delete {self.folder}")

    def path_of(self, name, recipe, keep):
        """Where the model is that a row's training begins with."""
        if recipe is None:
            return self.config.init
        return str(self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{keep:g}")

    def saved_recipe(self, recipe, keep):
        """The recipe that the file of a cut holds: with the settings of the comparison."""
        config = self.config
        return dataclasses.replace(recipe, init=config.init, keep=keep, windows=config.windows, seed=SEED,
                                   block_size=config.block_size, micro_batch=config.micro_batch,
                                   data=data.recorded(self.sources))

    def check_cut(self, path, recipe, keep, about):
        """Raise UserError if the file of a cut, whose content is `about`, was made by another recipe: by an
        earlier comparison with the same --out."""
        expected = dataclasses.asdict(self.saved_recipe(recipe, keep))
        actual = about["run"].get("recipe", {})
        differ = [name for name in {**expected, **actual} if actual.get(name) != expected.get(name)]
        if differ:
            raise UserError(f"{path} was cut with another {', '.join(differ)}; delete {self.folder}")

    def measured(self, path):
        """The losses of the model at `path` on the test parts, and what its file says."""
        # In bfloat16, which a GPU's cut may have, small steps would be rounded away.
        model, about = checkpoint.load(path, self.config.device, torch.float32, self.config.block_size)
        return self.losses_of(self.subject, model, "test"), about

    def flags(self, about, init, out):
        """The flags of the command that trains the model at `init` as the record `about` says."""
        T = self.config.block_size
        steps = about["tokens"] // (WINDOWS * T)
        flags = ["--init", init, "--out", out, "--data", *self.sources, "--lr", about["lr"], "--steps", steps,
                 "--seed", SEED, "--block-size", T, "--micro-batch", WINDOWS, "--eval-windows", WINDOWS,
                 "--device", self.config.device]
        if about["way"] == "full":
            flags += ["--plan", "scratch", "--batch-tokens", WINDOWS * T, "--eval-every", steps]
        else:
            flags += ["--rank", 8, "--batch", WINDOWS]
        if about["name"] == LORAPRUNE:
            flags += ["--keep", about["keep"]]
        return [str(flag) for flag in flags]

    def train(self, about, init, before):
        """Train the model at `init` as `about` says, and record that with its losses. Raises UserError if the
        process that a killed call began trains there still."""
        out = Path(f"{self.folder / Path(init).name}-{about['way']}-{about['keep']:g}")
        with checkpoint.locked(out):
            pass
        checkpoint.remove(out)                    # a killed call's: its seconds would be those of a part
        flags = self.flags(about, init, out)
        took = timing.own_process(run_command, about["way"], flags, out, self.config.device)
        losses, made = self.measured(out)
        if made["run"]["fingerprint"] != self.corpus.fingerprint:
            raise UserError(f"{out} was trained on another text than the comparison's; start again")
        perplexity = math.exp(fmean(losses.values()))
        self.cuts.records.add(**about, losses=losses, perplexity=perplexity, before=before, **took,
                              command=f"python {WAYS[about['way']]} {shlex.join(flags)}")
        print(f"recovered  {about['name']:34} {about['way']}: perplexity {perplexity:.2f}", flush=True)
        checkpoint.remove(out)                    # gigabytes, which the command makes again

    def run_row(self, name, recipe, keep, missing):
        """Make the records of a row that are missing. Where it cannot be cut they say so."""
        init = self.path_of(name, recipe, keep)
        if recipe is not None and not checkpoint.newest(init):
            try:
                model = self.cuts.cut(name, recipe, keep, SEED)
            except UserError as problem:
                for about in missing:
                    self.cuts.records.add(**about, refused=str(problem))
                return
            prune.save(self.saved_recipe(recipe, keep), model, Path(init), self.subject.tokenizer,
                       self.corpus.fingerprint)
        before = None
        if name != LORAPRUNE:
            losses, made = self.measured(init)
            if recipe is not None:
                self.check_cut(init, recipe, keep, made)
            before = math.exp(fmean(losses.values()))
        for about in missing:
            self.train(about, init, before)


def recover(cuts, losses_of):
    """Make the records of all rows and ways that are missing. `losses_of(subject, model, part)` measures."""
    config = cuts.subject.config
    recovery = Recovery(cuts, losses_of)
    rates = {"full": config.recovery_lr, "lora": config.lora_lr}
    for name, (recipe, keep) in recipes(config.grid_keep).items():
        missing = []
        for way in ways_of(name):
            about = dict(tag="recovered", name=name, keep=keep, seed=SEED, way=way,
                         tokens=config.recovery_tokens, lr=rates[way])
            if not cuts.records.find(**about):
                missing.append(about)
        if missing:
            recovery.run_row(name, recipe, keep, missing)

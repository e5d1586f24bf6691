"""A run is a folder: what it must remember to go on where it stopped, bit for bit, and what it refuses.

    ckpt_<step>.pt   the newest two; each is the state *before* that step's events and holds all that a step changes
    teacher.pt       the enlarged model before the first cut, where it became the teacher; never rotated away
    metrics.jsonl    records (train.py lists them), rewound on resume to the moment the checkpoint was taken

No random-number state is kept: after the initial weights nothing draws from one, batches are a function of the step.
Not here: the loop (train.py), the checkpoint's format (checkpoint.py).
"""
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import checkpoint
from common import UserError, append_record, commit, read_records, write_atomic
from distill import freeze
from methods import two_four
from model import GPT

NOT_IDENTITY = ("stage", "device", "out", "compile")     # two calls of the same run may differ in these


PARTS = ("train", "score", "cut", "slice", "eval", "save")           # of a run's wall time


@dataclass
class State:
    """All that a step changes, and so all that a checkpoint holds."""
    model: GPT
    optimizer: torch.optim.Optimizer
    keep: dict                               # {(layer, kind): indices of live units} in the model as it is now
    averages: dict | None = None             # {(layer, kind): (2, units)}, the score's moving averages (score.average)
    masks: dict = field(default_factory=dict)       # {parameter name: (out, in) bool} of a 2:4 model (two_four.masks)
    teacher: GPT | None = None        # frozen; its file is not in the checkpoint
    step: int = 0
    teacher_file: dict | None = None         # {"file", "sha256" of its weights}; stays when the teacher is dropped
    dropped: bool = False                    # the teacher, for good
    judged: dict = field(default_factory=lambda: {"student": None, "teacher": None, "steps": 0})   # smoothed losses
    window: dict = field(default_factory=dict)                      # sums since the last "step" record (Run.tally)
    flops: list = field(default_factory=lambda: [0.0, 0.0])         # executed, credited
    seconds: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


PLAIN = [f.name for f in fields(State) if f.name not in ("model", "optimizer", "keep", "averages", "masks", "teacher")]


class Folder:
    """The files of one run. `config`: the resolved Train settings; `writes`: only one process of a run does."""
    def __init__(self, path, config, fingerprint, tokenizer_files, writes):
        self.path, self.metrics, self.writes = path, path / "metrics.jsonl", writes
        self.batch_tokens, self.tokenizer_files = config.batch_tokens, tokenizer_files
        self.identity = {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY}
        self.identity["fingerprint"] = fingerprint
        self.usual = {f.name: f.default for f in fields(config)}

    def log(self, tag, step, **record):
        if self.writes:
            append_record(self.metrics, tag=tag, step=step, tokens=step * self.batch_tokens, **record)

    def refuse_others(self, found):
        """UserError where `found` is another configuration than ours. A setting that it does not have, as the code that
        wrote it had no such flag, is as by default."""
        found = {**self.usual, **found}
        differ = [f"{k} is {found.get(k)!r} there and {v!r} here"
                  for k, v in self.identity.items() if found.get(k) != v]
        if differ:
            raise UserError(f"{self.path} holds a run of another configuration ({'; '.join(differ)}); "
                            "give another --out or delete it")

    def resume(self, device, make_optimizer):
        """The State in the newest checkpoint, but for the teacher; None where the folder holds no checkpoint."""
        if not checkpoint.newest(self.path):
            if self.metrics.exists():                    # killed before its first checkpoint, or not ours
                self.refuse_others(next(iter(read_records(self.metrics)), {}))
            return None
        model, saved = checkpoint.load(self.path, device)
        self.refuse_others(saved["run"])
        state = State(model, make_optimizer(model), {(l, kind): i for l, kind, i in saved["keep"]},
                      saved["averages"] and {(l, kind): v.to(device) for l, kind, v in saved["averages"]},
                      two_four.unpack(saved.get("masks"), device))
        state.optimizer.load_state_dict(saved["optimizer"])
        for name in PLAIN:
            setattr(state, name, saved[name])
        return state

    def rewind(self, step, code, **about):
        """metrics.jsonl as it was when the checkpoint of `step` was taken; what came after is written again. `code`: of
        the steps to come, joined by + to another one of those before."""
        if self.writes:
            first, *rest = read_records(self.metrics) or [{}]
            before = first.get("code", "unknown").split("+") if step else []
            about["code"] = "+".join(dict.fromkeys([*before, code]))
            kept = [r for r in rest if r["step"] < step or r["step"] == step and r["tag"] == "step"]
            records = [{"tag": "config", "step": 0, "tokens": 0, **self.identity, **about}, *kept]
            write_atomic(self.metrics, lambda file: file.write("".join(json.dumps(r) + "\n" for r in records).encode()))

    def save(self, state):
        """Write ckpt_<step>.pt (a checkpoint of this step that is there already is the same one); keep the newest
        two."""
        path = self.path / f"ckpt_{state.step:08d}.pt"
        if self.writes and not path.exists():
            checkpoint.save(path, state.model, run=self.identity, optimizer=state.optimizer.state_dict(),
                        keep=[(*key, i) for key, i in state.keep.items()],
                        averages=state.averages and [(*key, v) for key, v in state.averages.items()],
                        masks=two_four.pack(state.masks), **{name: getattr(state, name) for name in PLAIN},
                            tokenizer_files=self.tokenizer_files, provenance=provenance())
            for old in checkpoint.checkpoints(self.path)[:-2]:
                old.unlink()

    def save_teacher(self, model, step):
        path = self.path / "teacher.pt"
        if self.writes:
            checkpoint.save(path, model, run=self.identity, step=step, tokenizer_files=self.tokenizer_files)
        return path

    def open_teacher(self, path, state):
        """Load the teacher into `state`; UserError for one of another tokenizer or changed since the run began."""
        device, dtype = state.model.embed.weight.device, state.model.embed.weight.dtype
        teacher, saved = checkpoint.load(path, device, dtype)
        mine, theirs = self.identity["tokenizer"], checkpoint.tokenizer_of(saved, path).name
        student = state.model.config
        if teacher.config.vocab_size != student.vocab_size or theirs != mine:
            raise UserError(f"the teacher {path} has {teacher.config.vocab_size} tokens of {theirs!r}, the student "
                            f"{student.vocab_size} of {mine!r}; give a teacher with the same tokenizer")
        if teacher.config.block_size < student.block_size:
            raise UserError(f"the teacher {path} was trained with a context of {teacher.config.block_size} tokens, the "
                            f"student has {student.block_size}; give a teacher with at least that")
        file = Path(path).is_dir() and checkpoint.newest(path) or path
        found = {"file": str(file), "sha256": fingerprint(teacher)}
        if state.teacher_file and state.teacher_file["sha256"] != found["sha256"]:
            raise UserError(f"the teacher {file} has changed since the run began (sha256 {found['sha256'][:12]}, then "
                            f"{state.teacher_file['sha256'][:12]}); restore it or begin anew with another --out")
        state.teacher_file, state.teacher = found, freeze(teacher)


def fingerprint(model):
    """sha256 over a model's config and weights (two files of the same model may differ in bytes)."""
    digest = hashlib.sha256(repr(model.config).encode())
    for p in model.parameters():
        digest.update(p.detach().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def provenance():
    """Which code wrote a checkpoint."""
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "commit": commit()}

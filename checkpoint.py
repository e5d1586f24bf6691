"""A model on disk and a run on disk: written whole or not at all, and read without running code.

    python -c "import checkpoint; print(checkpoint.load('runs/idea-laptop-0')[0].config)"

`load` opens every kind of model for every script: our checkpoint, a run's folder, a Hugging Face
folder or a hub id. Our checkpoint is one self-describing file. A run is a folder, and `RunFolder`
knows its files:

    ckpt_<step>.pt   the newest two; each is the state *before* that step's events, all that a step changes (`State`)
    teacher.pt       the enlarged model before the first cut, where it became the teacher; it is never rotated away
    metrics.jsonl    the records that docs/records.md lists, rewound on resume to the moment of the checkpoint

No state of a random-number generator is kept. After the initial weights nothing draws from one, and
batches are a function of the step. Not here: the loop (train.py), the files of Hugging Face
(formats/huggingface.py).
"""
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import xxhash
from filelock import FileLock, Timeout

from common import (
    Damaged,
    UserError,
    append_record,
    commit,
    first_line,
    read_pickled_tensors,
    read_records,
    write_atomic,
)
from distill import freeze
from formats import huggingface, origin
from formats.tokenizer import FILES, has_tokenizer, open_tokenizer
from model import GPT, check_values, config_from, with_context

FORMAT = "nanoprune checkpoint 1"

# What write_atomic calls a file until it is whole.
TEMPORARY = ".*." + "[0-9a-f]" * 16 + ".tmp"

# Two calls of the same run may differ in these settings.
NOT_IDENTITY = ("stage", "device", "out", "compile", "shard", "recompute")

# The parts that a run's wall time is divided into.
PARTS = ("train", "score", "cut", "slice", "eval", "save")


# -- a model on disk

def save(path, model, **state):
    """Write {"format", "config", "model", **state} to `path`. `state` is plain Python and tensors
    (the tokenizer's name, step, optimizer …), so that it loads with weights_only=True. Raises
    UserError for a model that no GPTConfig describes."""
    write(path, content_of(model, state))


def content_of(model, state):
    """What a checkpoint holds, except for its digest."""
    # torch.compile's wrapper would prefix every name.
    plain = getattr(model, "_orig_mod", model)
    refuse_evaluation_only(plain)
    return {"format": FORMAT, "config": asdict(plain.config), "model": plain.state_dict(), **state}


def write(path, content):
    """Write the content of a checkpoint with its digest, under a temporary name that is fsynced and
    then renamed. Raises UserError if the disk is full."""
    content["digest"] = digest_of(content)

    # torch.load never reads the checksums, and they would take a third of the time. (unzip misses
    # them.)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        write_atomic(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as problem:
        # torch reports a full disk as a RuntimeError of its own.
        if isinstance(problem, OSError) and problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        needed = sum(tensor.nbytes for tensor in tensors_in(content))
        free = shutil.disk_usage(Path(path).parent).free
        raise UserError(f"{path} was not written ({first_line(problem)}): it needs {needed:,} bytes and {free:,} are "
                        "free; what was there before is still there") from None
    finally:
        torch.serialization.set_crc32_options(checksums)


def digest_of(content):
    """A digest of plain values and tensors, whatever their nesting. It tells damage, not intent.
    Left out is the entry "digest" of the content itself."""
    digest = xxhash.xxh3_128()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            digest.update(f"dict{len(value)}".encode())
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"list{len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add({key: value for key, value in content.items() if key != "digest"})
    return digest.hexdigest()


def on_host(value):
    """A copy of plain values and tensors, whatever their nesting, in main memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(item) for item in value)
    return value


def tensors_in(value):
    """All tensors of a nesting of dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def refuse_evaluation_only(model):
    """Raise UserError for a baseline that is more than its GPTConfig: a subclass of GPT."""
    if type(model) is not GPT:
        raise UserError(f"this model is for evaluation only, as {model.evaluation_only}, which no GPTConfig and no "
                        "runtime has; cut another way to save or export it")


def checkpoints(folder):
    """The checkpoints in a run's folder, oldest first: files named ckpt_<step in 8 digits>.pt."""
    return sorted(Path(folder).glob("ckpt_" + "[0-9]" * 8 + ".pt"))


def newest(folder):
    """The checkpoint with the highest step in a run's folder, or None."""
    return max(checkpoints(folder), default=None)


def load(path, device="cpu", dtype=None, block_size=None):
    """Open a checkpoint, a run's folder (its newest), a Hugging Face folder or a hub id: -> (GPT,
    about).

    `dtype` None keeps the stored one. With the device "meta" no weights are read, only their
    config. `block_size` is the context that is wanted, at most the trained one; None takes all.
    `about` holds what `save` was given besides the model; for a Hugging Face folder {"huggingface":
    its config.json, "tokenizer_files", "origin": see formats/origin.py}. Raises UserError for a file
    that is missing, truncated, of another version or of another shape than it says."""
    folder = find(path)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        model, about = huggingface.load(folder, device, dtype, block_size)
        if folder != Path(path):
            about["origin"]["name"] = str(path)      # a hub id; the folder's name is a hash
        return model, about
    model, about = load_ours(folder, device, dtype, block_size)
    return model if dtype is None else model.to(dtype), about


def find(path):
    """`path` if it exists, else the local copy of the hub's repository of that name. Raises
    UserError if neither is to be had."""
    local = Path(path)
    could_be_a_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not local.parent.exists()
    if local.exists() or not could_be_a_hub_id:
        return local
    import huggingface_hub
    files = ["*config.json", "model*.safetensors*", *FILES, "additional_chat_templates/*", "README.md", *origin.LEGAL]
    try:
        folder = Path(huggingface_hub.snapshot_download(str(path), allow_patterns=files))
        if not list(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(str(path), allow_patterns=["pytorch_model*.bin*"])
        return folder
    except Exception as problem:             # whatever the hub and the network raise
        raise UserError(f"no checkpoint at {path}, and the hub does not give it ({type(problem).__name__}: "
                        f"{' '.join(str(problem).split())[:150]}); check the name and the network, or give a "
                        "folder that was downloaded before") from None


def tokenizer_of(model, about, path):
    """The Tokenizer of the model that `load(path)` returned with `about`. Raises UserError if it
    has none that we can read, or one with more tokens than the model."""
    if "huggingface" in about and not has_tokenizer(about["tokenizer_files"]):
        raise UserError(f"{path} has no tokenizer.json or tokenizer.model; add the file (train.py takes --tokenizer, "
                        "too)")
    name = str(path)
    files = about.get("tokenizer_files")
    if "run" in about:
        # A checkpoint that somebody sent does not choose a folder of this machine.
        name = str(about["run"].get("tokenizer", "of an unknown name"))
        files = {} if files is None else files
    tokenizer = open_tokenizer(name, files)
    tokenizer.refuse_fewer_rows(model.config.vocab_size, path)
    return tokenizer


def load_ours(path, device, dtype=None, block_size=None):
    """Open our own checkpoint, or the newest of a run's folder: -> (GPT on the device, everything
    else that `save` was given). What is not the model stays in main memory: a script that needs
    only the model has no optimizer on a GPU. If the newest checkpoint of a folder is damaged, the
    one before it is opened, and a sentence says so."""
    candidates = checkpoints(path)[::-1] if path.is_dir() else [path]
    if not candidates or not candidates[0].exists():
        raise UserError(f"no checkpoint at {path}; give a ckpt_*.pt file, the folder of a run, a Hugging Face folder "
                        "or a hub id such as HuggingFaceTB/SmolLM2-135M")
    damages = []
    for file in candidates:
        try:
            model, state = open_file(file, device, dtype, block_size)
        except Damaged as damage:
            damages.append(str(damage))
            continue
        for damage in damages:
            print(f"warning: {damage}; going on from {file.name}", file=sys.stderr)
        return model, state
    raise UserError(f"{'; '.join(damages)}; restore the file from a copy")


def open_file(file, device, dtype, block_size):
    """Open one checkpoint file: -> (GPT on the device, the rest). Raises Damaged for one that is
    truncated or changed, and UserError for one of another format or with weights that are not
    finite, now or in `dtype`."""
    on_meta = device == "meta"
    state = read_pickled_tensors(file, "use a file that train.py wrote", "meta" if on_meta else "cpu")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        form = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{file} has format {form!r}, this code reads {FORMAT!r}; use the code that wrote it")

    # Checkpoints from before the digest was kept have none.
    if not on_meta and state.get("digest", "") not in ("", digest_of(state)):
        raise Damaged(f"{file} is damaged: its content is not what was written")
    try:
        config = with_context(config_from(file, state.pop("config")), block_size, file)
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(state.pop("model"), assign=True)
    except (RuntimeError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{file}: config and weights disagree or are missing: "
                        f"{' '.join(str(problem).split())[:200]}") from None
    if not on_meta:
        for name, p in model.named_parameters():
            check_values(p, dtype or p.dtype, name, file)
    # Only `load` says that a model is Hugging Face's.
    state.pop("huggingface", None)
    if not isinstance(state.get("run", {}), dict):
        raise UserError(f"{file} has {state['run']!r:.60} where the settings of its run should be; use a file that "
                        "train.py or prune.py wrote")
    state["origin"] = origin.of_checkpoint(file, state)
    return model.to(device), state


def fingerprint(model):
    """sha256 over a model's config and weights. (Two files of the same model may differ in their
    bytes.)"""
    digest = hashlib.sha256(repr(model.config).encode())
    for p in model.parameters():
        digest.update(p.detach().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_existing(path):
    """Raise UserError if there is something at `path`. A folder with nothing but what a killed process
    left, its lock and temporary files, counts as nothing."""
    contents = path.iterdir() if path.is_dir() else []
    others = [file for file in contents if file.name != ".lock" and not file.match(TEMPORARY)]
    if others or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} is there already; give another --out or delete it")


@contextlib.contextmanager
def locked(path):
    """Hold the folder of a run for this process. Raises UserError if another process holds it.
    Temporary files that a killed process left there are removed; a folder that was made here and is
    empty in the end goes as well."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    file = path / ".lock"
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process works in {path} and holds {file}; wait until it has ended, or give another "
                        "--out") from None
    try:
        for leftover in path.glob(TEMPORARY):
            leftover.unlink()
        yield
    finally:
        if list(path.iterdir()) == [file]:
            file.unlink()
        lock.release()
        with contextlib.suppress(OSError):           # not empty
            for folder in created:
                folder.rmdir()


def provenance():
    """Which code wrote a checkpoint."""
    return {"torch": str(torch.__version__), "python": sys.version.split()[0], "commit": commit()}


# -- a run on disk

class Background:
    """Does one piece of work at a time in a thread of its own. `wait` raises what the work
    raised."""
    def __init__(self):
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.work = None

    def start(self, function, *args):
        self.work = self.thread.submit(function, *args)

    def wait(self):
        work = self.work
        self.work = None
        if work is not None:
            work.result()


def saves_in_background(model):
    """Whether checkpoints of the model are written while it trains on: where a GPU trains it. They
    are copied to main memory first."""
    return not model.embed.weight.is_cpu


@dataclass
class State:
    """All that a training step changes, and so all that a checkpoint of a run holds."""
    model: GPT
    optimizer: torch.optim.Optimizer
    alive: dict                                  # {(layer, kind): indices of live units in the model}
    averages: dict | None = None                 # {(layer, kind): (2, units)}, moving averages of the score
    masks: dict = field(default_factory=dict)    # {parameter name: (out, in) bool} of a 2:4 model
    teacher: GPT | None = None                   # frozen, or a top_k.CachedTeacher; it has a file of its own
    step: int = 0                                # optimizer steps done
    teacher_file: dict | None = None             # {"file", "sha256"}; it stays when the teacher is dropped
    dropped: bool = False                        # whether the teacher was dropped, for good
    judged: dict = field(default_factory=lambda: {"student": None, "teacher": None, "steps": 0})  # smoothed losses
    window: dict = field(default_factory=dict)   # sums since the last "step" record
    flops: dict = field(default_factory=lambda: {"executed": 0.0, "credited": 0.0})
    seconds: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


# The fields of State that are stored as they are.
PLAIN = ("step", "teacher_file", "dropped", "judged", "window", "flops", "seconds")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""
    path: Path
    identity: dict                # the resolved settings that make the run this one; see `identity_of`
    defaults: dict                # of the settings: what a run from before a setting existed had
    batch_tokens: int
    tokenizer_files: dict
    writes: bool                  # only one process of a run does
    origin: dict | None = None    # where the model of --init comes from
    background: Background = field(default_factory=Background)      # writes the newest checkpoint
    waiting: object = None        # the process group for long waits

    @property
    def metrics(self):
        return self.path / "metrics.jsonl"

    def log(self, tag, step, **record):
        """Append a record to metrics.jsonl."""
        if self.writes:
            append_record(self.metrics, tag=tag, step=step, tokens=step * self.batch_tokens, **record)

    def save(self, state, masks):
        """Write ckpt_<step>.pt and keep the newest two. A checkpoint of this step that exists is
        the same one. `masks`: those of the state, packed. Raises UserError if the disk is full; of
        a checkpoint that is written in the background, the next call or background.wait() does."""
        self.background.wait()
        path = self.path / f"ckpt_{state.step:08d}.pt"
        if not self.writes or path.exists():
            return
        held = {name: getattr(state, name) for name in PLAIN}
        held |= {"run": self.identity, "optimizer": state.optimizer.state_dict(), "alive": listed(state.alive),
                 "averages": listed(state.averages), "masks": masks, "tokenizer_files": self.tokenizer_files,
                 "origin": self.origin, "records": self.seal_records(), "provenance": provenance()}
        content = content_of(state.model, held)
        if saves_in_background(state.model):
            self.background.start(self.write_and_rotate, path, on_host(content))
        else:
            self.write_and_rotate(path, content)

    def write_and_rotate(self, path, content):
        """Write the checkpoint and remove all but the newest two."""
        write(path, content)
        for old in checkpoints(self.path)[:-2]:
            old.unlink()

    def resume(self, device, make_optimizer, build=None):
        """The State in the newest checkpoint, without its teacher and with packed masks; None if
        the folder holds no checkpoint. Raises UserError if the folder holds another run."""
        if newest(self.path) is None:
            if self.metrics.exists():
                # Killed before its first checkpoint, or not ours.
                records = read_records(self.metrics) or [{}]
                self.refuse_another_run(records[0])
            return None
        model, saved = load(self.path, device)
        try:
            self.refuse_another_run(saved["run"])
            if "alive" not in saved:
                raise UserError(f"{self.path} was begun by an older version of this code; finish it with that, or give "
                                "another --out")
            state = State(model, make_optimizer(model), by_key(saved["alive"]), by_key(saved["averages"], device),
                          saved.get("masks"))
            state.optimizer.load_state_dict(saved["optimizer"])
            for name in PLAIN:
                setattr(state, name, saved[name])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            raise UserError(f"the checkpoint in {self.path} does not hold the state of a run ({first_line(problem)}); "
                            "give another --out to begin anew") from None
        self.check_records(saved.get("records"), state.step)
        if self.writes:
            # Newer checkpoints are damaged, or `load` would have taken them. They make room.
            for file in checkpoints(self.path):
                if file.name > f"ckpt_{state.step:08d}.pt":
                    file.rename(file.with_suffix(".damaged"))
        return state

    def seal_records(self):
        """Write metrics.jsonl through to the disk: -> how many records a checkpoint counts on, and
        their digest. The config record is left out, as resuming writes it anew."""
        with open(self.metrics, "rb") as file:
            os.fsync(file.fileno())
            lines = file.read().splitlines(keepends=True)[1:]
        return {"count": len(lines), "digest": xxhash.xxh3_128(b"".join(lines)).hexdigest()}

    def check_records(self, sealed, step):
        """Raise UserError if metrics.jsonl has lost or changed a record that the checkpoint of
        `step` counts on."""
        if not self.writes or sealed is None:
            return                           # a checkpoint from before records were counted
        read_records(self.metrics)           # a line that cannot be read is named
        lines = self.metrics.read_bytes().splitlines(keepends=True)[1:] if self.metrics.exists() else []
        lines = lines[:sealed["count"]]
        if len(lines) < sealed["count"]:
            problem = f"has {len(lines)} of the {sealed['count']} records"
        elif xxhash.xxh3_128(b"".join(lines)).hexdigest() != sealed["digest"]:
            problem = f"has other than the {sealed['count']} records"
        else:
            return
        raise UserError(f"{self.metrics} {problem} that the checkpoint of step {step} counts on; restore it from a "
                        "copy, or give another --out to begin anew")

    def refuse_another_run(self, recorded):
        """Raise UserError if the recorded settings are not ours. A setting that is not recorded, as
        the code that wrote them did not have it, had its default."""
        recorded = {**self.defaults, **recorded}
        differ = [f"{name} is {recorded.get(name)!r} there and {value!r} here"
                  for name, value in self.identity.items() if recorded.get(name) != value]
        if differ:
            raise UserError(f"{self.path} holds a run of another configuration ({'; '.join(differ)}); "
                            "give another --out or delete it")

    def rewind(self, step, **about):
        """Make metrics.jsonl what it was when the checkpoint of `step` was taken. What came after
        it will be written again. `about` goes into the config record, with the commit of the code;
        if the run was begun by another one, both are named."""
        if not self.writes:
            return
        first, *rest = read_records(self.metrics) or [{}]
        commits = first.get("code", "unknown").split("+") if step else []
        if commit() not in commits:
            commits.append(commit())
        config = {"tag": "config", "step": 0, "tokens": 0, **self.identity, **about, "code": "+".join(commits)}

        # The step record of the checkpoint's own step was written before it, its other records
        # after it.
        kept = [r for r in rest if r["step"] < step or (r["step"] == step and r["tag"] == "step")]
        lines = [json.dumps(record) + "\n" for record in [config, *kept]]
        write_atomic(self.metrics, lambda file: file.write("".join(lines).encode()))

    def save_teacher(self, model, step):
        """Write the model as teacher.pt; -> its path."""
        self.background.wait()
        path = self.path / "teacher.pt"
        if self.writes:
            save(path, model, run=self.identity, step=step, tokenizer_files=self.tokenizer_files, origin=self.origin)
        return path

    def open_teacher(self, path, state):
        """Load the teacher at `path`, frozen, into the state. Raises UserError for one with another
        tokenizer or a shorter context, and for one that has changed since the run began."""
        student = state.model
        weight = student.embed.weight
        teacher, about = load(path, weight.device, weight.dtype)
        tokenizer = tokenizer_of(teacher, about, path)
        if tokenizer.name != self.identity["tokenizer"]:
            raise UserError(f"the teacher {path} has {tokenizer.vocab_size} tokens of {tokenizer.name!r}, the student "
                            f"those of {self.identity['tokenizer']!r}; give a teacher with the same tokenizer")
        window = self.identity.get("block_size") or student.config.block_size
        if teacher.config.block_size < window:
            raise UserError(f"the teacher {path} was trained with a context of {teacher.config.block_size} tokens, the "
                            f"student has {window}; give a teacher with at least that")
        file = newest(path) if Path(path).is_dir() else None
        self.remember_teacher(state, {"file": str(file or path), "sha256": fingerprint(teacher)})
        if teacher.config.vocab_size != student.config.vocab_size:
            # Models of one family differ in rows that no token has. The loss is over the others.
            teacher = without_padding(teacher, tokenizer.vocab_size)
        state.teacher = freeze(teacher)

    def remember_teacher(self, state, opened):
        """Put the teacher's {"file", "sha256"} into the state. Raises UserError if it has changed
        since the run began."""
        before = state.teacher_file
        if before and before["sha256"] != opened["sha256"]:
            raise UserError(f"the teacher {opened['file']} has changed since the run began (sha256 "
                            f"{opened['sha256'][:12]}, then {before['sha256'][:12]}); restore it or begin anew with "
                            "another --out")
        state.teacher_file = opened


def without_padding(model, rows):
    """The same model with the first `rows` rows of its embedding and head. The others are padding:
    no text has their tokens."""
    with torch.device("meta"):
        small = GPT(replace(model.config, vocab_size=rows))
    weights = model.state_dict()
    for name in ("embed.weight", "head.weight"):
        if name in weights:
            weights[name] = weights[name][:rows].clone()
    small.load_state_dict(weights, assign=True)
    return small


def identity_of(config, corpus_fingerprint):
    """What makes a run this run: its resolved settings and its corpus, without where and how far it
    is to run."""
    identity = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    return {**identity, "fingerprint": corpus_fingerprint}


def listed(tensors):
    """{(layer, kind): tensor} as a list of (layer, kind, tensor), which a checkpoint of plain
    values can hold."""
    return None if tensors is None else [(layer, kind, tensor) for (layer, kind), tensor in tensors.items()]


def by_key(rows, device=None):
    """The dictionary that `listed` was given."""
    return None if rows is None else {(layer, kind): tensor.to(device) for layer, kind, tensor in rows}

"""What every script shares: the command line, sentences for users, files that survive a crash, the
device.

This file knows nothing of GPTs, pruning or distillation. A script's settings are one frozen
dataclass; `parse` turns it into flags, with the comment behind each field as its help. Bad input
raises `UserError` with one sentence, which gives the numbers and the remedy; `run` prints it and
exits with code 2.
"""
import contextlib
import functools
import inspect
import io
import json
import math
import os
import pickle
import re
import secrets
import subprocess
import sys
import zipfile
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import tyro
from tqdm import tqdm

# A target that does not count, as torch's cross-entropy has it.
IGNORED = -100


class UserError(Exception):
    """Something that the user can mend: one sentence with the numbers and the remedy."""


# -- the command line

def parse(settings, argv=None, verbatim=()):
    """Read the command line into an instance of the frozen dataclass `settings`.

    A field without a default is positional, a bool field `x` becomes --x and --no-x, `T | None`
    takes a T, a tuple takes any number of values and a `Literal` one of its own. The help of a flag
    is the comment behind its field; the help begins with the docstring of the file. A command line
    that does not fit ends the program with one sentence and code 2.

    An empty value is refused, as it comes of --out "$UNSET" and would be taken for none. A path may
    begin with "~/" behind an equals sign, too, where no shell expands it. Both are left to fields in
    `verbatim`, which hold text.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            config = tyro.cli(settings, args=argv, description=inspect.getmodule(settings).__doc__,
                              config=(tyro.conf.PositionalRequiredArgs,))
    except SystemExit as end:
        if end.code:
            # tyro draws a box with a title around its message; our other refusals are sentences.
            _, *box = messages.getvalue().splitlines()
            print("error:", " ".join(re.sub("[╰╯│─]", " ", " ".join(box)).split()), file=sys.stderr)
        raise
    return tidied(config, verbatim)


def tidied(config, verbatim):
    """The settings without empty values, and with the home folder in place of "~/"."""
    expanded = {}
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.name in verbatim:
            continue
        if value == "" or (isinstance(value, tuple) and "" in value):
            dashes = "" if setting.default is MISSING else "--"
            stop(f"{dashes}{setting.name.replace('_', '-')} is empty; give a value or leave it out")
        expanded[setting.name] = tuple(map(at_home, value)) if isinstance(value, tuple) else at_home(value)
    return replace(config, **expanded)


def at_home(value):
    """The value with the home folder in place of "~/" at its beginning."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def check_positive(config, names):
    """Raise UserError for a number in `names` that is neither None nor positive and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive and finite")


def check_init(config, purpose):
    """Raise UserError if --init names no model. `purpose` completes the sentence "say what …"."""
    if config.init is None:
        raise UserError(f"say what {purpose} by --init: a checkpoint, a run folder, a Hugging Face folder or a hub id")


def check_seed(config):
    """Raise UserError for a --seed that random-number generators do not take."""
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed} must be between 0 and {2**63 - 1}")


def check_multiple(flag, windows, micro_batch):
    """Raise UserError if so many windows are no whole number of micro-batches."""
    if windows % micro_batch:
        raise UserError(f"{flag} {windows} is no multiple of --micro-batch {micro_batch}; try "
                        f"{math.ceil(windows / micro_batch) * micro_batch}")


def check_choices(config):
    """Raise UserError if a field whose type is a `Literal` has another value. `parse` refuses it on
    the command line; this is for callers that make their settings themselves."""
    for name, kind in get_type_hints(type(config)).items():
        options = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
        value = getattr(config, name)
        if options and value is not None and value not in get_args(options[0]):
            raise UserError(f"--{name.replace('_', '-')} {value!r} is not one of {', '.join(get_args(options[0]))}")


def refuse_idle(config, names, why):
    """Raise UserError if a flag in `names` was set although nothing will read it. `why` completes
    the sentence "--flag has no effect …"."""
    for name in names:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise UserError(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


def run(main, *args):
    """Call `main`. Report a UserError or an OSError (missing file, no permission, full disk) as one
    sentence and exit with code 2; let every other exception show its traceback."""
    try:
        main(*args)
    except Damaged as problem:
        stop(f"{problem}; restore the file from a copy")
    except UserError as problem:
        stop(problem)
    except KeyboardInterrupt:
        # Ctrl-C where nothing needs saving; train.py's loop catches the signal itself.
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as problem:
        # For main memory torch has no exception of its own.
        text = str(problem) or "out of memory"
        if not re.search("out of memory|allocate memory", text):
            raise
        stop(f"{text.splitlines()[0][:150]}: take a smaller model, smaller batches or a larger machine")
    except BrokenPipeError:
        # The reader of our output went away, as in `… | head`: there is nobody to tell.
        sys.stderr.close()
    except OSError as problem:
        if problem.errno is None:
            raise                            # a mistake of ours, not a refusal: show the traceback
        where = f" ({problem.filename})" if problem.filename else ""
        stop(f"{problem.strerror}{where}: check the path, its permissions and the free space")


def stop(sentence):
    """End the program with this sentence and exit code 2."""
    print(f"error: {printable(sentence)}", file=sys.stderr)
    sys.exit(2)


def printable(text):
    """The text as a terminal may get it: characters that would move its cursor, change its colours,
    or turn the direction of writing are spelled out, as \\x1b. Files that others sent hold such."""
    obeyed = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(obeyed, lambda match: match[0].encode("unicode_escape").decode(), str(text))


def progress(items, name, show=True):
    """Go through the items and show how far this is: on a terminal by a bar, elsewhere, as in a
    log, by a line every 5 seconds. `show` False hides it."""
    seconds = 0.1 if sys.stderr.isatty() else 5
    return tqdm(items, desc=name, leave=False, disable=not show, mininterval=seconds, delay=seconds,
                file=progress_file())


class LogLines:
    """A file for tqdm where stderr is no terminal: each state of a bar becomes a line."""
    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress_file():
    """Where a bar is written."""
    return sys.stderr if sys.stderr.isatty() else LogLines()


# -- files

def write_atomic(path, write):
    """Call `write(file)` on a temporary binary file beside `path`, fsync it and rename it, so that
    `path` is whole or as it was before. An OSError (disk full, no permission) passes through after
    the temporary file has been removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # "x" refuses a name that exists, so that no link that somebody planted is followed.
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_records(path):
    """Read a file of records, one JSON object a line, into a list of dictionaries; [] if there is
    no such file. A last line that a crash cut short is left out. Raises UserError for a damaged
    line, with its number."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise UserError(f"line {number} of {path} is damaged ({problem}); restore the file from "
                            "a copy, or delete what it belongs to and make it again") from None
        if not isinstance(record, dict):
            raise UserError(f"line {number} of {path} is no record but {str(record)[:40]!r}; give a "
                            "file of records, one JSON object a line")
        records.append(record)
    return records


def append_record(path, **record):
    """Append one JSON object as one line and flush it, so that a killed run leaves whole lines.
    What a crash left behind the last whole line is cut off first."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            ends_whole = file.read(1) == b"\n"
            if not ends_whole:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def first_line(problem):
    """The first line of what an exception says."""
    return (str(problem) or type(problem).__name__).splitlines()[0][:100]


class Damaged(UserError):
    """A file that is not what was written."""


def read_pickled_tensors(file, remedy, map_location="cpu", mmap=False, content=None):
    """What torch.save wrote, if it is plain tensors and numbers. No code that a file holds is run.
    With `mmap` a tensor is read when it is used, but of files from before torch 1.6, which are no zip
    archives, at once. `content`: a part of the file, opened, that
    torch.save wrote by itself. Raises Damaged for a file that is cut short, and UserError, which ends
    with `remedy`, for code."""
    import torch
    # What the system refuses (no permission) passes through here as an OSError and is not called
    # truncated below.
    open(file, "rb").close()
    mmap = mmap and zipfile.is_zipfile(file)
    try:
        return torch.load(content or file, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as problem:
        code = re.search(r"GLOBAL ([\w.]+)", str(problem))
        reason = f": it would run {code[1]}, and pickled code is never run" if code else ""
        raise UserError(f"{file} is not a checkpoint of plain tensors and numbers{reason}; {remedy}") from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError,
            OSError) as problem:
        raise Damaged(f"{file} is truncated or no checkpoint ({first_line(problem)})") from None


# -- the machine and the code

@functools.cache
def commit():
    """The git commit of this code, followed by "-modified" where files differ from it; "unknown"
    outside of a checkout. Git is asked once in a process."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=-modified"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True,
                                   cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def pick_device(name):
    """Resolve a device: "auto" is "cuda" if there is one, else "mps", else "cpu". Raises UserError
    for a device that was asked for and is absent."""
    import torch  # not every script needs it, and it takes seconds
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    usable = [kind for kind in available if available[kind]]
    if name == "auto":
        return usable[0]
    kind, colon, number = name.partition(":")
    exists = kind in usable and (number.isdigit() or not colon)
    if exists and kind == "cuda" and colon:
        exists = int(number) < torch.cuda.device_count()
    if not exists:
        raise UserError(f"device {name!r} is not available here; give auto or one of "
                        f"{', '.join(usable)}")
    if kind == "cuda" and colon:
        torch.cuda.set_device(int(number))   # memory and time are asked of the current device
    return name


def has_fast_bfloat16(device):
    """Whether the device's hardware multiplies bfloat16 matrices: GPUs that PyTorch says so of (NVIDIA's
    since Ampere), and CPUs with AVX512-BF16 or AMX. Where it is imitated, bfloat16 loses time."""
    import torch
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # These names are private, and the only ones that torch 2.6 has.
    return device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def peak_memory(device="cpu"):
    """The most memory in bytes that this process has held so far; for a GPU, of the GPU's
    memory."""
    if device.startswith("cuda"):
        import torch
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What every script shares, knowing nothing of GPTs: the command line, sentences for users, files that survive a crash.

A script's settings are one frozen dataclass; `parse` turns it into flags, with the comment behind each field as its
help. Bad input raises `UserError` with one sentence (the numbers and the remedy); `run` prints it and exits with 2.
"""
import argparse
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin, get_type_hints


class UserError(Exception):
    """Something the user can mend: one sentence with the numbers and the remedy. Scripts print it and exit with 2."""


def parse(cls, argv=None, about=None):
    """Command line -> instance of the frozen dataclass `cls`. Fields without a default are positional (a tuple takes
    all there are); a bool field `x` becomes --x / --no-x; `T | None` takes T, a tuple one or more; the comment behind
    each field is its help. about: what --help begins with; default: the docstring of the class's file."""
    help_text = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=about or inspect.getmodule(cls).__doc__,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = next((t for t in get_args(types[f.name]) if t is not type(None)), types[f.name])
        text = help_text.get(f.name, "").replace("%", "%%")
        several = "+" if get_origin(types[f.name]) is tuple else None
        if f.default is dataclasses.MISSING:
            parser.add_argument(f.name, type=kind, help=text, nargs=several)
            continue
        flag, text = "--" + f.name.replace("_", "-"), f"{text} [{f.default}]"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(flag, type=kind, default=f.default, help=text, metavar=kind.__name__.upper(),
                                nargs=several)
    return cls(**vars(parser.parse_args(argv)))


def refuse_idle(config, names, why):
    """UserError for the first flag of `names` that is not at its default: it would be believed to have had an effect.
    `why` it has none goes on "has no effect"."""
    for name in names:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise UserError(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


def run(main, *args):
    """Call `main`; a UserError, or a file the system will not give or take, ends the program as one sentence with
    exit code 2."""
    try:
        main(*args)
    except UserError as problem:
        sys.exit(print(f"error: {problem}", file=sys.stderr) or 2)
    except BrokenPipeError:
        sys.stderr.close()                   # the reader of our output went away, as in `… | head`: nothing to say
    except OSError as problem:
        if problem.errno is None:
            raise                            # not the system's: a bug of ours, show the traceback
        where = f" ({problem.filename})" if problem.filename else ""
        sys.exit(print(f"error: {problem.strerror}{where}: check the path, its permissions and the free disk space",
                       file=sys.stderr) or 2)


def write_atomic(path, write):
    """Call `write(file)` on a temporary binary file beside `path`, fsync it, rename it: `path` is whole or as it was.
    OSError (disk full, no permission) passes through after the temporary file is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_records(path):
    """metrics.jsonl -> list of dicts; a last line cut short by a crash is left out."""
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_record(path, **record):
    """One JSON object as one line, flushed, so that a killed run leaves whole lines; what a crash left behind the last
    of them is cut off first."""
    with open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def commit():
    """The git commit of this code, followed by "-modified" where files differ from it; "unknown" outside of a
    checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=-modified"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def peak_rss():
    """The most memory that this process has held so far, in bytes."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(name):
    """"auto" -> "cuda" if there is one, else "mps", else "cpu"; a device that is asked for and absent is an error."""
    import torch
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in available if available[k]) if name == "auto" else name.split(":")[0]
    number = name.partition(":")[2] or "0"
    if not available.get(kind) or not number.isdigit() or kind == "cuda" and int(number) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not available here; give auto or one of "
                        f"{', '.join(k for k in available if available[k])}")
    if kind == "cuda" and ":" in name:
        torch.cuda.set_device(int(number))                   # memory and time are asked of the current device
    return kind if name == "auto" else name

"""Where a model came from, and what was done to it since: what an export has to say of it.

    python -c "import checkpoint; print(checkpoint.load('runs/recover-cut-0', 'meta')[1]['origin'])"

An *origin* is a dictionary of plain values, which a checkpoint holds beside the weights:

    name        the Hugging Face folder or hub id that the first of these models was loaded from, or None
    dtype       that of its stored weights, such as "bfloat16", or None
    params      the number of its parameters, or None
    license, license_name, license_link     what the head of its README.md says, or None
    files       {name: text} of the legal texts beside it; their names are those of LEGAL
    steps       what was done to it, in order: a dictionary of settings each

prune.py and train.py hand it on, and export.py writes it back. Not here: chat templates and
generation_config.json, which go with the tokenizer's files (formats/tokenizer.py); the model card
(formats/model_card.py).
"""
import json
import re
import sys
from pathlib import Path

from common import UserError, printable

HEAD = ("license", "license_name", "license_link")
LEGAL = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md", "COPYING", "USE_POLICY.md")
DTYPES = ("float64", "float32", "float16", "bfloat16")
NOTHING = {"name": None, "dtype": None, "params": None, **dict.fromkeys(HEAD), "files": {}, "steps": []}

# In characters. (The GPL has 35,149. A step of prune.py has about 700.)
LONGEST_FILE = 2**18
LONGEST_LINE = 300
LONGEST_STEPS = 2**16

# What a card tells of a run of train.py.
RUN_SETTINGS = ("init", "plan", "preset", "steps", "batch_tokens", "block_size", "data", "teacher", "kd_weight",
                "kd_temperature", "lr", "dtype", "seed", "sparse", "dense")


def read(folder, name, dtype, params):
    """The origin of the model in a Hugging Face folder. A legal text that is too long, or no UTF-8, or a
    link out of the folder, is left out, and a sentence says so."""
    files = {}
    for legal in LEGAL:
        path = Path(folder, legal)
        if not path.is_file():
            continue
        text = None if leads_out(path) else read_text(path)
        if text is None:
            print(f"warning: {path} is no UTF-8 text of at most {LONGEST_FILE:,} bytes in its own folder and is not "
                  "handed on; add it to an export by hand", file=sys.stderr)
        else:
            files[legal] = text
    return {**NOTHING, "name": as_line(name), "dtype": dtype, "params": params, **read_head(folder), "files": files}


def as_line(name):
    """A name as `problem_of` lets it pass: blanks take the place of what is no printable character."""
    name = "".join(character if character.isprintable() else " " for character in printable(name))
    return name[:LONGEST_LINE]


def leads_out(path):
    """Whether a file is a link to another folder: in a model that somebody sent to a private file of the
    reader's, which an export would publish."""
    folder = path.parent.resolve()
    # The hub's cache links snapshots/REVISION/NAME to blobs/DIGEST.
    blobs = folder.parent.parent / "blobs"
    real = path.resolve()
    return real.parent != folder and not (folder.parent.name == "snapshots" and real.parent == blobs)


def read_text(path):
    """A file of UTF-8 as text; None for one that is too long or no UTF-8."""
    with open(path, "rb") as file:
        content = file.read(LONGEST_FILE + 1)
    try:
        return content.decode("utf-8") if len(content) <= LONGEST_FILE else None
    except UnicodeDecodeError:
        return None


def read_head(folder):
    """What the head of a folder's README.md says of the license, as the hub has it."""
    path = Path(folder, "README.md")
    beginning = ""
    if path.is_file():
        with open(path, "rb") as file:
            beginning = file.read(4096).decode(errors="replace").replace("\r\n", "\n")
    head = re.match(r"---\n((?:(?!---).*\n)*)", beginning)
    values = {}
    for key in HEAD:
        line = re.search(rf"""^{key}: *["']?([\w.:/+-]+)["']? *$""", head[1] if head else "", re.M)
        values[key] = line[1][:LONGEST_LINE] if line else None
    return values


def of_checkpoint(where, saved):
    """The origin in the content of our checkpoint `where`, or None. Files from before it was kept have
    the license only. Raises UserError for an origin that prune.py and train.py do not write."""
    origin = saved.get("origin")
    if origin is None:
        license = saved.get("license")
        cut_from = saved.get("run", {}).get("cut_from")
        if not isinstance(license, str) or not isinstance(cut_from, str):
            return None
        origin = {**NOTHING, "name": as_line(Path(cut_from).name), "license": license}
    problem = problem_of(origin)
    if problem:
        raise UserError(f"{where} has {problem} where it says what the model came from; use a file that prune.py or "
                        "train.py wrote")
    return origin


def write(folder, origin):
    """Write the legal texts into a folder of an export."""
    for name, text in origin["files"].items():
        # The names may come out of a checkpoint that somebody sent.
        if name in LEGAL:
            Path(folder, name).write_text(text, encoding="utf-8")


def problem_of(origin):
    """What is wrong with an origin that somebody sent, or None."""
    if not isinstance(origin, dict) or origin.keys() != NOTHING.keys():
        return f"{str(origin)[:60]!r}"
    for key in ("name", *HEAD):
        value = origin[key]
        is_line = isinstance(value, str) and value.isprintable() and len(value) <= LONGEST_LINE
        if value is not None and not is_line:
            return f"the {key} {str(value)[:60]!r}"
    if origin["dtype"] not in (None, *DTYPES):
        return f"the dtype {str(origin['dtype'])[:60]!r}"
    params = origin["params"]
    if params is not None and (type(params) is not int or params < 1):
        return f"{str(params)[:60]!r} parameters"
    if not isinstance(origin["files"], dict):
        return f"the files {str(origin['files'])[:60]!r}"
    for name, text in origin["files"].items():
        if name not in LEGAL or not is_writable(text):
            return f"the file {str(name)[:60]!r}"
    return problem_of_steps(origin["steps"])


def is_writable(text):
    """Whether this is a text of UTF-8 that is not too long."""
    if not isinstance(text, str) or len(text) > LONGEST_FILE:
        return False
    return not re.search("[\ud800-\udfff]", text)            # halves of a character


def problem_of_steps(steps):
    """What is wrong with the steps of an origin, or None."""
    try:
        text = json.dumps(steps)
    except (TypeError, ValueError, RecursionError):
        return "steps that are no plain values"
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return "steps that are no list of settings"
    if len(text) > LONGEST_STEPS:
        return f"steps of {len(text):,} characters"
    return None


def hand_on(about):
    """The origin of what is made of a model that checkpoint.load returned with `about`: the last step is
    the one that made this model itself. None if nothing is known. Raises UserError for settings that
    are no plain values."""
    origin = about.get("origin") or NOTHING
    run = about.get("run", {})
    steps = list(origin["steps"])
    if isinstance(run.get("recipe"), dict):
        settings = {name: value for name, value in run["recipe"].items() if value is not None}
        steps.append({"command": "prune.py", **settings})
    elif isinstance(run.get("growth"), dict):
        settings = {name: value for name, value in run["growth"].items() if value is not None}
        steps.append({"command": "methods.grow", **settings})
    elif "plan" in run:
        settings = {name: run[name] for name in RUN_SETTINGS if run.get(name) is not None}
        steps.append({"command": "train.py", **settings, "done": about.get("step")})
    problem = problem_of_steps(steps)
    if problem:
        raise UserError(f"the settings that made this model are {problem}; use a file that prune.py or train.py wrote")
    # Tuples become lists, as they would in a file.
    origin = {**origin, "steps": json.loads(json.dumps(steps))}
    return None if origin == NOTHING else origin

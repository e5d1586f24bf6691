"""What the records of a recovery study say: tables and pictures.

    python -m experiments.recover_study smollm2 --part report

Not here: making the records (experiments/recover_study.py).
"""
import math
from pathlib import Path
from statistics import median

import numpy as np

from common import UserError, read_records, write_atomic
from experiments import measure, scaling_laws
from experiments.scaling_laws import Points
from report import markdown
from tasks import statistics

STAGE_NAMES = {"cut": "cut", "local": "+ local repair", "recovered": "+ training"}
OURS = "ours"
NEAR_DENSE = (0.2, 0.1, 0.05)        # nats


def models(records):
    return [record for record in records if record["tag"] == "model"]


def dense_of(records):
    for record in records:
        if record["tag"] == "dense":
            return record
    raise UserError("the records hold no dense model; run the study first")


def config_of(records):
    """The settings of the study. Raises UserError if the file holds none."""
    for record in records:
        if record["tag"] == "config":
            return record
    raise UserError("this file holds no recovery study; run the study first")


def main_rows(records, keep):
    """The rows that every method has: {name: {stage: record}}, with the study's own tokens."""
    config = config_of(records)
    rows = {}
    for record in models(records):
        is_method = record["keep"] == keep and record["name"] in config["methods"]
        is_equal = record["stage"] != "recovered" or record["cost"]["tokens"] == config["tokens"]
        if is_method and is_equal:
            rows.setdefault(record["name"], {})[record["stage"]] = record
    return rows


# -- tables

def cells(record, dense):
    """The numbers of a measurement as they stand in a row of a table."""
    numbers = [f"{math.exp(loss):.2f}" for loss in record["losses"].values()]
    if "questions" not in record:
        return [*numbers, "", "", ""]
    accuracy, normed = (measure.share(record, "questions", metric) for metric in ("acc", "acc_norm"))
    ratio = measure.against(record, dense)
    probe = [f"{np.mean(measure.flags(result)):.2f}" for result in record["probe"].values()]
    return [*numbers, f"{accuracy:.3f}, {normed:.3f}", f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            ", ".join(probe)]


def head(dense, first):
    texts = [f"{name} ppl" for name in dense["losses"]]
    return [*first, *texts, "acc, acc_norm", "acc_norm, of dense [95 %]", ", ".join(dense["probe"])]


def named(name, record):
    return f"{name}, {record['params'] / 1e6:.2f}M"


def methods_table(records, keep):
    """Every method behind every stage."""
    dense = dense_of(records)
    lines = [[named("dense", dense), "", "", *cells(dense, dense)]]
    for name, stages in main_rows(records, keep).items():
        for stage, record in stages.items():
            minutes = f"{record['cost']['seconds'] / 60:.1f}"
            lines.append([named(name, record) if stage == "cut" else "", STAGE_NAMES[stage], minutes,
                          *cells(record, dense)])
    return markdown(head(dense, ["", "", "minutes"]), lines)


def compared(first, second, parts):
    """First minus second: the mean loss, and the share of right answers of each part, paired."""
    columns = [f"{measure.mean_loss(first) - measure.mean_loss(second):+.3f}"]
    for part in parts:
        pair = statistics.paired(measure.correct_answers(first, part), measure.correct_answers(second, part))
        difference = pair.difference
        columns.append(f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]")
    return columns


def paired_table(records, keep):
    """Ours against each other method behind the training: difference in questions and probe items."""
    rows = {name: stages["recovered"] for name, stages in main_rows(records, keep).items() if "recovered" in stages}
    if OURS not in rows:
        return ""
    ours = rows.pop(OURS)
    lines = [[name, *compared(ours, record, ("questions", "probe"))] for name, record in rows.items()]
    return markdown(["ours minus", "nats per token, mean of texts", "acc_norm [95 %]", "probe [95 %]"], lines)


def cost_line(records, keep):
    """What the training behind the cuts took."""
    rows = [stages["recovered"] for stages in main_rows(records, keep).values() if "recovered" in stages]
    if not rows:
        return ""
    flops = [record["cost"]["flops"] / 1e12 for record in rows]
    return (f"Every row was trained on {rows[0]['cost']['tokens']:,} tokens, which took {min(flops):.0f} to "
            f"{max(flops):.0f} TFLOPs without the teacher's.")


def ablation_table(records):
    """Ours, and ours with one part changed, behind the stage at which the row ends."""
    dense = dense_of(records)
    config = config_of(records)
    keep = config["keeps"][0]
    ours = main_rows(records, keep).get(OURS, {})
    lines = []
    for stage in ("cut", "recovered"):
        if stage not in ours:
            continue
        lines.append([OURS, STAGE_NAMES[stage], *cells(ours[stage], dense), "", ""])
        for record in models(records):
            if record["name"] not in config["methods"] and record["stage"] == stage:
                lines.append([record["name"], STAGE_NAMES[stage], *cells(record, dense),
                              *compared(ours[stage], record, ["questions"])])
    return markdown([*head(dense, ["", ""]), "ours minus this, nats", "ours minus this, acc_norm [95 %]"], lines)


def speed_table(records):
    """llama.cpp's speed and the size of the files; ratios are medians over rounds."""
    speeds = [record for record in records if record["tag"] == "speed"]
    if not speeds:
        return ""
    newest = speeds[-1]
    lines = []
    for name, rates in newest["decode"].items():
        ratio = median(rate / dense for rate, dense in zip(rates, newest["decode"]["dense"]))
        lines.append([name, f"{newest['bytes'][name] / 1e6:.0f} MB", f"{median(rates):.1f}", f"{ratio:.2f}"])
    return markdown([f"f16 GGUF, threads: {newest['threads']}", "file", "tokens/s", "of dense"], lines)


# -- the curve over tokens

def curve(records):
    """Ours at the first kept fraction, for every number of training tokens: [(tokens, record)]."""
    config = config_of(records)
    points = []
    for record in models(records):
        if record["name"] == OURS and record["keep"] == config["keeps"][0] and record["stage"] == "recovered":
            points.append((record["cost"]["tokens"], record))
    return sorted(points, key=lambda point: point[0])


def curve_text(records):
    """Every length of training; the power law fitted over them, and what it says that coming near the
    dense model takes."""
    points = curve(records)
    dense = dense_of(records)
    rows = [[f"{tokens:,}", f"{measure.mean_loss(record):.3f}", *cells(record, dense)] for tokens, record in points]
    lines = [markdown(head(dense, ["tokens", "nats, mean of texts"]), rows), ""]
    if len(points) < 4:
        return "\n".join([*lines, f"A fit of three constants needs at least 4 lengths; there are {len(points)}."])
    lengths = [tokens for tokens, _ in points]
    law = scaling_laws.fit("power", Points.of([{"loss": measure.mean_loss(record), "tokens": tokens}
                                               for tokens, record in points]))
    goal = measure.mean_loss(dense)
    lines += [f"`{law.law.name}` fitted to {len(points)} lengths of training, {lengths[0]:,} to {lengths[-1]:,} tokens "
              f"(mean over texts; dense: {goal:.3f} nats):", ""]
    for distance in NEAR_DENSE:
        tokens = float(scaling_laws.tokens_needed(law, goal + distance))
        amount = f"{tokens:,.0f} tokens" if math.isfinite(tokens) else "no number of tokens"
        lines.append(f"- {distance} nats above the dense model: {amount}")
    return "\n".join(lines)


def picture(records, path):
    """Left: loss over training tokens, a line for each text. Right: neurons by layer of ours and of
    every other method, at the first kept fraction."""
    from matplotlib.figure import Figure
    config = config_of(records)
    dense = dense_of(records)
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, widths = figure.subplots(1, 2)
    points = curve(records)
    for number, (text, dense_loss) in enumerate(dense["losses"].items()):
        color = f"C{number}"
        loss.plot([tokens for tokens, _ in points], [record["losses"][text] for _, record in points], "o-", color=color,
                  label=text)
        loss.axhline(dense_loss, color=color, linestyle=":")
    loss.set(xscale="log", xlabel="training tokens behind the cut", ylabel="nats per token (dotted: dense)")
    lengths = [tokens for tokens, _ in points]
    loss.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    loss.minorticks_off()
    # Room for the legend below the lines.
    loss.set_ylim(bottom=loss.get_ylim()[0] - 0.5)
    loss.legend(loc="lower center", ncols=3)
    for name, stages in main_rows(records, config["keeps"][0]).items():
        widths.step(range(len(dense["d_ff"])), stages["cut"]["d_ff"], where="mid", label=name)
    widths.set(xlabel="layer", ylabel="FFN neurons")
    widths.legend()
    figure.savefig(path, dpi=110)


# -- the page

def text(records):
    """The whole report, as Markdown."""
    config = config_of(records)
    parts = [f"# Recovery of {dense_of(records)['params']:,} parameters", ""]
    for keep in config["keeps"]:
        if main_rows(records, keep):
            parts += [f"## keep {keep:g}", "", methods_table(records, keep), "", cost_line(records, keep), "",
                      paired_table(records, keep), ""]
    sections = {"Ours with one part changed": ablation_table, "Over tokens": curve_text, "In llama.cpp": speed_table,
                "Samples": samples}
    for title, section in sections.items():
        parts += [f"## {title}", "", section(records), ""]
    return "\n".join(parts)


def write(path):
    """Write the report of a file of records into a folder beside it, and return its text. The
    report of results/recover.jsonl is results/recover/report.md."""
    records = read_records(path)
    report = text(records)
    folder = Path(path).with_suffix("")
    write_atomic(folder / "report.md", lambda file: file.write(f"{report}\n".encode()))
    if curve(records):
        picture(records, folder / "recovery.png")
    return report


def samples(records):
    """What the dense model and ours write, cut and recovered."""
    labelled = {"dense": dense_of(records)}
    ours = main_rows(records, config_of(records)["keeps"][0]).get(OURS, {})
    for stage in ("cut", "recovered"):
        if stage in ours:
            labelled[f"ours, {stage}"] = ours[stage]
    return measure.sample_table(labelled)

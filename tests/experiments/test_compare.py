"""The comparison on a tiny model: disjoint texts, kept budgets, records that go on where they stopped, claims."""
import dataclasses
import json
import math

import pytest

from common import UserError, append_record
from experiments import compare, compare_report
from formats import huggingface
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig

SMALL = dict(windows=8, block_size=32, micro_batch=2, tokens=256, seeds=2, keeps=(.8, .6), best=2, limit=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with bytes as tokens."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    model = GPT(GPTConfig(256, 64, 24, 4, (6,) * 4, (3,) * 4, (32,) * 4))
    huggingface.save(path, model, "llama", open_tokenizer("bytes").as_files())
    return path


@pytest.fixture
def few(monkeypatch):
    """A smaller grid: one cell of each kind."""
    chosen = [g for g in compare.GRID if (g.score, g.allocate, g.mend) in (
        ("taylor", "global", "none"), ("taylor", "adaptive", "none"), ("taylor", "uniform", "none"),
        ("wanda", "standardised", "least-squares"), ("flap", "measured", "least-squares"))]
    assert len(chosen) == 5
    monkeypatch.setattr(compare, "GRID", chosen)
    name = "Bypass Back-propagation"
    monkeypatch.setitem(compare.PUBLISHED, name, dataclasses.replace(compare.PUBLISHED[name], policy_steps=4))
    monkeypatch.delitem(compare.PUBLISHED, "torch-pruning")                     # half a minute a cut; has its own test


def test_parts_share_no_document():
    tokenizer = open_tokenizer("bytes")
    texts = compare.texts(tokenizer, 64)
    for name, parts in texts.items():
        assert {*parts} == {"calibration", "validation", "test"}, name
    import pydoc_data.topics
    runs = []                                                                   # of 20 words, by part
    for part in texts["prose"].values():
        words = tokenizer.decode(part.tolist()).split()
        runs.append({tuple(words[i:i + 20]) for i in range(len(words) - 19)})
    topics = [t.split() for t in pydoc_data.topics.topics.values()]             # other runs cross from one to the next
    inside = {tuple(words[i:i + 20]) for words in topics for i in range(len(words) - 19)}
    assert not any(a & b & inside for a, b in ((runs[0], runs[1]), (runs[0], runs[2]), (runs[1], runs[2])))
    sizes = [len(part) for part in texts["prose"].values()]
    assert sum(sizes) == sum(len(tokenizer.encode(t + "\n\n")) for t in pydoc_data.topics.topics.values())
    assert min(sizes) > .8 * max(sizes)
    assert texts["python"]["validation"][-1] == tokenizer.eot                   # a whole document ends there
    assert .3 < len(texts["python"]["validation"]) / len(texts["python"]["test"]) < 3


def test_budgets_and_going_on(folder, tmp_path, few, capsys, monkeypatch):
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"query": f"{i} is", "choices": [" odd", " even"], "gold": i % 2}) + "\n"
                                 for i in range(8)))
    settings = compare.Compare(str(folder), out=str(tmp_path / "all.jsonl"), questions=(str(questions),), **SMALL)
    compare.main(settings)
    printed, records = capsys.readouterr().out, compare.read(tmp_path / "all.jsonl")
    cells = [r for r in records if r["tag"] == "cell"]
    over = {r["name"] for r in cells if "perplexity" in r and r["kept"] > r["keep"]}
    assert over == {*compare_report.OWN_BUDGET}                                 # its shortcuts come on top
    assert all(math.isfinite(r["perplexity"]) for r in cells if "refused" not in r)
    names = {r["name"] for r in cells if r["part"] == "test"}
    assert names >= {*compare.PUBLISHED} and names >= {*compare_report.HALF}
    assert len(names) == len(compare.PUBLISHED) + len(compare_report.HALF) + 1 + SMALL["best"]
    for name in ("FLAP", "SliceGPT", "Adapt-Pruner", "ShortGPT"):               # every seed and size has its row
        assert sum("perplexity" in r for r in cells if r["name"] == name and r["part"] == "test") == 4, name
    asked = {r["name"] for r in records if r["tag"] == "questions"}
    assert asked >= {"dense", "FLAP", "SliceGPT", *compare_report.HALF}
    assert "flap / measured / mended" in {r["name"] for r in cells} and "| **" in printed

    monkeypatch.setattr(compare.Cuts, "cut_anew", None)                             # nothing is left to cut
    compare.main(settings)
    assert compare.read(tmp_path / "all.jsonl") == records
    monkeypatch.undo()

    compare.main(compare.Compare(str(folder), out=settings.out, part="report"))
    assert (tmp_path / "all" / "report.md").read_text() == capsys.readouterr().out.split("Test perplexity", 1)[0] + \
        compare_report.report(records, .8) + "\n"
    others = [{"run": "adapt", "tag": "config"}, {"run": "adapt", "tag": "cell"}]          # of another run
    for record in others:
        append_record(tmp_path / "all.jsonl", **record)
    assert compare.read(tmp_path / "all.jsonl") == records

    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)       # killed in the middle of a line
    cut_at = next(i for i, line in enumerate(lines) if '"part": "test"' in line) + 20
    (tmp_path / "killed.jsonl").write_text("".join(lines[:cut_at]) + lines[cut_at][:30])
    assert len(compare.read(tmp_path / "killed.jsonl")) == cut_at


def test_another_comparison_is_refused_and_its_records_stay(folder, tmp_path, few):
    file = tmp_path / "records.jsonl"
    first = compare.Compare(str(folder), out=str(file), part="grid", **SMALL)
    compare.main(first)
    before = file.read_bytes()
    with pytest.raises(UserError, match="tokens is 256 there and 512 here"):
        compare.main(compare.Compare(str(folder), out=str(file), part="grid", **{**SMALL, "tokens": 512}))
    with pytest.raises(UserError, match="--part 'nothing' is not one of all, grid, rows"):
        compare.main(compare.Compare(str(folder), out=str(file), part="nothing", **SMALL))
    with pytest.raises(UserError, match="--seeds has no effect on a report"):
        compare.main(compare.Compare(str(folder), out=str(file), part="report", seeds=7))
    assert file.read_bytes() == before


def test_families_of_documents():
    shared = " ".join(map(str, range(20)))
    documents = ["a " + shared, "b", "c " + shared + " d", "e " + " ".join(map(str, range(19))), shared + " b" * 90]
    assert compare.families(documents) == [[0, 2, 4], [3], [1]]


def cell(part, name, keep, seed, perplexity):
    return {"tag": "cell", "part": part, "name": name, "keep": keep, "seed": seed, "perplexity": perplexity,
            "n_kv_head": (3, 3), "losses": {"python": math.log(perplexity), "prose": math.log(perplexity)}}


def test_claims_are_the_written_numbers():
    records = [cell("validation", name, .8, 0, perplexity) for name, perplexity in (
        ("taylor / adaptive", 8.8), ("taylor / uniform", 8.), ("wanda / adaptive", 9.), ("wanda / uniform", 10.),
        ("dense", 7.))]
    for seed, (adapt, flap, short, mine) in enumerate(((20., 25., 40., 18.), (22., 20., 44., 11.))):
        records += [cell("test", "Adapt-Pruner", .8, seed, adapt), cell("test", "FLAP", .8, seed, flap),
                    cell("test", "ShortGPT", .8, seed, short), cell("test", "wanda / adaptive", .8, seed, 99.)]
        records += [cell("test", "taylor / adaptive", .8, seed, mine)]          # on test ours is not chosen again
    records.append({"tag": "cell", "part": "test", "name": "SliceGPT", "keep": .8, "seed": 0, "refused": "why"})
    text = compare_report.claims(records, .8)
    assert ("*Adaptive beats uniform* on FFN neurons and KV groups (a layer has 3 groups, and an equal share of them "
            "is 2.4), keep 0.8, validation, one calibration: mixed, `taylor` +10.0%, `wanda` -10.0%\n") in text
    assert "FFN neurons alone" not in text
    alone = [cell("validation", "taylor / adaptive, FFN", .8, 0, 9.5),
             cell("validation", "taylor / uniform, FFN", .8, 0, 10.)]
    assert ("*Adaptive beats uniform* on FFN neurons alone, keep 0.8, validation, one calibration: holds, `taylor` "
            "-5.0%\n") in compare_report.claims(records + alone, .8)
    assert "*Adapt-Pruner beats FLAP*: mixed, keep 0.8 -20.0%, +10.0%" in text
    assert "keep 0.8: holds, best width Adapt-Pruner 21.00, best depth ShortGPT 42.00" in text
    assert "taylor / adaptive), keep 0.8: 14.50; the best published method, Adapt-Pruner, has 21.00: -10.0%, -50.0%" \
        in text
    assert "worse" not in text and "Refused: SliceGPT at 0.8" in text


def test_overview_ranks_the_methods():
    records = [cell("test", *about) for about in (
        ("FLAP", .8, 0, 20.), ("FLAP", .8, 1, 22.), ("FLAP", .6, 0, 50.), ("dense", 1.0, 0, 10.),
        ("taylor / global", .8, 0, 15.), ("2:4, Wanda", .5, 0, 60.))]
    asked = (("dense", 1.0, "a", .5), ("dense", 1.0, "b", .25), ("FLAP", .8, "a", .4))
    records += [{"tag": "questions", "name": name, "keep": keep, "seed": 0, "file": file, "limit": 500, "acc_norm": x}
                for name, keep, file, x in asked]
    text = compare_report.overview(records, .8)
    assert "and mean accuracy (acc_norm) on 500 of a, 500 of b" in text
    assert text.splitlines()[2:] == [
        "| method | keep 0.8 | keep 0.6 | keep 0.5 | questions at 0.8, or 0.5 |", "| --- | --- | --- | --- | --- |",
        "| dense | 10.00 | 10.00 | 10.00 | 0.375 |", "| **taylor / global** | 15.00 |  |  |  |",
        "| FLAP | 21.00 ± 1.00 | 50.00 |  |  |", "| 2:4, Wanda |  |  | 60.00 |  |"]         # of FLAP not all files yet


def test_every_published_row_says_what_differs():
    ours = {name for name in compare_report.HALF if name.endswith("/ mended")}
    assert {*compare_report.DIFFERS} == {*compare_report.PUBLISHED, *compare_report.HALF} - ours
    records = [{"tag": "alone", "name": "FLAP", "keep": .8, "seconds": 61.4, "peak_bytes": 2.34e9},
               {"tag": "alone", "name": "taylor / global", "keep": .8, "seconds": 5., "peak_bytes": 1e9},
               {"tag": "alone", "name": "SliceGPT", "keep": .8, "refused": "why"}]
    lines = compare_report.cost_table(records).splitlines()
    assert f"| FLAP | {compare_report.DIFFERS['FLAP']} | 61 | 2.3 |" in lines
    assert f"| SliceGPT | {compare_report.DIFFERS['SliceGPT']} |  |  |" in lines
    assert lines[-1] == "| **taylor / global** | ours | 5 | 1.0 |"


def test_a_cut_in_a_process_of_its_own(folder, tmp_path, monkeypatch):
    """It is made and recorded once. A process that was ended leaves no record, a cut that is impossible does."""
    config = compare.Compare(str(folder), out=str(tmp_path / "alone.jsonl"), part="alone", **SMALL)
    records = compare.Records(config.out, {})
    for _ in range(2):
        compare.run_alone(records, config, "Wanda-sp", compare.PUBLISHED["Wanda-sp"])
    [row] = [record for record in compare.read(config.out) if record["tag"] == "alone"]
    assert row["name"] == "Wanda-sp" and row["seconds"] > 0 and row["peak_bytes"] > 1e7 and row["threads"]

    def ended(*_, **__):
        raise UserError("the process was ended")

    monkeypatch.setattr(compare.Cuts, "cut", ended)
    assert compare.cut_alone(config, "FLAP", compare.PUBLISHED["FLAP"], .8) == {"refused": "the process was ended"}
    monkeypatch.setattr(compare.timing, "own_process", ended)
    compare.run_alone(records, config, "FLAP", compare.PUBLISHED["FLAP"])
    assert records.find(tag="alone", name="FLAP") is None


def test_cost_is_a_ratio_of_one_run(folder, tmp_path):
    subject = compare.open_subject(compare.Compare(str(folder), **SMALL))
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    table = compare.cost(subject, windows=4, rounds=1)
    assert table.count("\n") == 5 and "| `taylor2` | forward, backward |" in table
    assert all((p == before[name]).all() and p.grad is None for name, p in subject.model.named_parameters())


def test_weights_in_bfloat16_and_in_main_memory_give_near_losses(folder, tmp_path, few):
    """Every row but those that need the whole model in float32. Each says the memory that it took."""
    records = []
    for flags in ({}, dict(weights="bfloat16", offload=True)):
        out = str(tmp_path / f"{len(records)}.jsonl")
        compare.main(compare.Compare(str(folder), out=out, **flags, **{**SMALL, "seeds": 1, "keeps": (.8,), "best": 0}))
        records.append([record for record in compare.read(out) if record["tag"] == "cell"])
    assert len(records[0]) == len(records[1])
    for whole, halved in zip(*records):
        if "refused" in halved:
            assert whole["name"].startswith("SliceGPT") or "refused" in whole
            continue
        assert whole["peak_bytes"] > 0 and halved["peak_bytes"] > 0
        assert abs(math.log(whole["perplexity"] / halved["perplexity"])) < .1, whole["name"]

"""Cuts of a tiny model that are trained back: the same text for all, zeros stay zero, records that go on, the table."""
import json
import math
import pydoc_data.topics
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import data
import report
import train
from common import UserError, parse
from experiments import compare, compare_recovery, compare_report
from formats import huggingface
from formats.tokenizer import open_tokenizer
from methods import lora, sparse
from model import GPT, GPTConfig

SMALL = dict(part="recovery", windows=8, block_size=32, micro_batch=2, tokens=256, recovery_tokens=1024,
             recovery_lr=1e-2, lora_lr=1e-2)
RECOVERED = compare_recovery.RECOVERED
ROWS = ("Minitron, FFN", "2:4, Wanda / mended")
WAYS = [("dense", "full"), ("dense", "lora"), (ROWS[0], "full"), (ROWS[0], "lora"), (ROWS[1], "full")]
WORDS = "let one thing of many be more than some other thing was".split()


def documents(number, first):
    """Documents of five lines; no two lines are alike."""
    generator = random.Random(first)
    lines = [f"{first + i}: {' '.join(generator.choices(WORDS, k=12))}\n" for i in range(5 * number)]
    return ["".join(lines[5 * i:5 * i + 5]) for i in range(number)]


class Watched(compare_recovery.Recovery):
    """Remembers the last recovery and, by the record's (name, way), the inputs and the file of the trained model."""
    inputs = {}
    trained = {}
    now = None

    def __init__(self, *args):
        super().__init__(*args)
        Watched.last = self

    def train(self, about, init, before):
        Watched.now = (about["name"], about["way"])
        super().train(about, init, before)
        Watched.now = None

    def measured(self, path):
        self.trained[self.now] = checkpoint.load(path, block_size=self.config.block_size)
        return super().measured(path)


@pytest.fixture(scope="module")
def recovery(tmp_path_factory):
    """The Watched recovery of the dense model and of two rows, on small texts in the place of the library and of its
    reference. The other tests of the module run among the same texts."""
    folder = tmp_path_factory.mktemp("recovery")
    for name in ("lib", "tiny"):
        (folder / name).mkdir()
    for i, text in enumerate(documents(200, 0)):
        (folder / "lib" / f"m{i}.py").write_text(text)
    topics = {str(i): text for i, text in enumerate(documents(40, 10**6))}
    model = GPT(GPTConfig(256, 64, 24, 4, (6,) * 2, (3,) * 2, (32,) * 2))
    huggingface.save(folder / "tiny", model, "llama", open_tokenizer("bytes").as_files())
    batch = data.batch

    def watched_batch(*args, **options):
        x, y = batch(*args, **options)
        Watched.inputs.setdefault(Watched.now, []).append(x)
        return x, y

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(folder / "lib")}))
        patch.setattr(pydoc_data.topics, "topics", topics)
        patch.setattr(data, "batch", watched_batch)
        patch.setattr(report, "picture", lambda *_: None)
        patch.setattr(compare_recovery, "RECOVERED", ("dense", *ROWS))
        patch.setattr(compare_recovery, "Recovery", Watched)
        patch.setattr(compare_recovery.timing, "own_process", lambda function, *args: function(*args))
        compare.main(compare.Compare("tiny", out="out/all.jsonl", **SMALL))
        yield Watched.last


def records_of(recovery):
    return {(record["name"], record["way"]): record for record in compare.read(recovery.config.out)
            if record["tag"] == "recovered"}


def lines_of(tokens):
    """The whole lines of a text, each of which stands in one document only."""
    text = open_tokenizer("bytes").decode(tokens[0:len(tokens)].tolist())
    return {line for line in re.split("[\n\0]", text) if re.fullmatch(r"\d+:( \w+){12}", line)}


def test_all_rows_see_the_same_windows_and_none_of_the_test(recovery):
    assert [*records_of(recovery)] == WAYS
    seen = {way: torch.cat(recovery.inputs[way]) for way in WAYS}
    for rows in seen.values():
        assert rows.numel() == SMALL["recovery_tokens"] and torch.equal(rows, seen[WAYS[0]])
    python, prose = recovery.corpus.parts
    for name, part in (("python", python), ("prose", prose)):
        parts = recovery.subject.texts[name]
        calibration = lines_of(parts["calibration"])
        assert len(lines_of(part.train)) > 50 and lines_of(part.train) <= calibration
        assert len(lines_of(parts["test"])) > 10 and not lines_of(parts["test"]) & calibration
    # Windows take turns; numbers from a million on are prose.
    is_prose = ["1000" in open_tokenizer("bytes").decode(row.tolist()) for row in seen[WAYS[0]]]
    assert recovery.corpus.shares == {"stdlib": .5, "out/all/runs/prose.jsonl": .5}
    assert any(is_prose[1::2]) and not any(is_prose[::2])


def test_a_record_says_what_was_trained(recovery):
    tiny, _ = checkpoint.load("tiny")
    for way, record in records_of(recovery).items():
        model, about = recovery.trained[way]
        losses = compare.losses_of(recovery.subject, model, "test")
        assert record["losses"] == losses and record["perplexity"] == math.exp(sum(losses.values()) / 2)
        assert record["perplexity"] < record["before"] and record["peak_bytes"] > 0
        assert about["run"]["fingerprint"] == recovery.corpus.fingerprint
        program, *flags = record["command"].removeprefix("python ").removeprefix("-m ").split()
        settings = {"train.py": train.Train, "methods.lora": lora.Lora}[program]
        assert parse(settings, flags).lr == record["lr"] == 1e-2
    assert records_of(recovery)[WAYS[0]]["trained"] == tiny.config.num_params()["total"]
    # Rank 8 beside q, k, v, o, gate, up and down: in + out of each.
    assert records_of(recovery)[WAYS[1]]["trained"] == 2 * 8 * (48 + 36 + 36 + 48 + 56 + 56 + 56)


def test_the_dense_model_is_measured_in_the_same_windows(recovery):
    losses = compare.losses_of(recovery.subject, recovery.subject.model, "test")
    assert records_of(recovery)["dense", "full"]["before"] == math.exp(sum(losses.values()) / 2)


def test_loraprune_is_told_what_to_keep(recovery):
    about = {"name": "LoRAPrune", "way": "lora", "lr": 1e-3, "tokens": 1024, "keep": .7}
    settings = parse(lora.Lora, recovery.flags(about, "tiny", "out/back"))
    assert settings.keep == .7 and settings.steps == 8 and settings.data == recovery.sources
    assert parse(lora.Lora, recovery.flags({**about, "name": "dense"}, "tiny", "out/back")).keep == 1


def test_the_cut_is_that_of_the_comparison(recovery):
    compare.run_cell(recovery.cuts, "test", ROWS[0], compare.PUBLISHED[ROWS[0]], .8, 0)
    cell = recovery.cuts.records.find(tag="cell", part="test", name=ROWS[0])
    for way in ("full", "lora"):
        assert records_of(recovery)[ROWS[0], way]["before"] == cell["perplexity"]
        trained, _ = recovery.trained[ROWS[0], way]
        assert trained.config.d_ff == tuple(cell["d_ff"]) and cell["kept"] <= .8


def test_zeros_stay_zero_while_the_rest_learns(recovery):
    model, _ = recovery.trained[ROWS[1], "full"]
    cut, _ = checkpoint.load(recovery.folder / "2-4-wanda-mended-0.5")
    zeros = 0
    for (name, before), (_, after) in zip(sparse.matrices(cut), sparse.matrices(model), strict=True):
        assert not after[before == 0].any() and not torch.equal(before, after), name
        zeros += (before == 0).sum().item()
    assert sparse.share(model, sparse.pattern_of("2:4", None)) == 1
    assert records_of(recovery)[ROWS[1], "full"]["trained"] == cut.config.num_params()["total"] - zeros


def test_what_has_a_record_is_not_made_again(recovery, monkeypatch):
    file = Path(recovery.config.out)
    lines = file.read_bytes().splitlines(keepends=True)
    assert sorted(path.name for path in recovery.folder.iterdir()) == [
        "2-4-wanda-mended-0.5", "minitron-ffn-0.8", "prose.jsonl"]               # trained models are deleted
    monkeypatch.setattr(compare.Cuts, "cut", None)                              # and the cuts are read again
    lost = next(i for i, line in enumerate(lines) if b'"lora"' in line and ROWS[0].encode() in line)
    file.write_bytes(b"".join(lines[:lost] + lines[lost + 1:]))
    compare.main(recovery.config)
    *kept, made = file.read_bytes().splitlines(keepends=True)
    assert kept == lines[:lost] + lines[lost + 1:]
    timed = ("seconds", "peak_bytes")
    assert all(value == json.loads(lines[lost])[name] for name, value in json.loads(made).items() if name not in timed)
    assert records_of(recovery)[ROWS[0], "full"] == json.loads(lines[lost - 1])


def test_refusals(recovery, tmp_path, monkeypatch):
    def refused(sentence, **flags):
        with pytest.raises(UserError, match=sentence):
            compare.main(compare.Compare("tiny", **{**SMALL, "out": str(tmp_path / "x.jsonl"), **flags}))

    refused("--recovery-tokens 1000 must be a multiple of the 128 tokens of an optimizer step; give 1024",
            recovery_tokens=1000)
    refused("--lora-lr 0 must be positive", lora_lr=0)
    refused("--recovery-tokens has no effect without --part recovery", part="grid")
    assert not (tmp_path / "x.jsonl").exists()
    # The process of a call that was killed may train on.
    about = {"name": "dense", "way": "full", "lr": 1e-2, "tokens": 128, "keep": 1.0}
    with checkpoint.locked(recovery.folder / "tiny-full-1"), pytest.raises(UserError, match="another process works in"):
        recovery.train(about, "tiny", None)
    # A row that cannot be cut is a finding.
    monkeypatch.setattr(compare_recovery, "RECOVERED", ("Minitron, channels",))

    def refuse(*_):
        raise UserError("no such budget")

    monkeypatch.setattr(compare.Cuts, "cut", refuse)
    compare.main(compare.Compare("tiny", **{**SMALL, "out": recovery.config.out}))
    assert {record["refused"] for (name, _), record in records_of(recovery).items() if "channels" in name} == {
        "no such budget"}
    # A full disk is none.
    before = Path(recovery.config.out).read_bytes()
    monkeypatch.setattr(compare_recovery, "RECOVERED", ("Minitron, width",))
    monkeypatch.setattr(compare.Cuts, "cut", lambda *_: recovery.subject.model)
    monkeypatch.setattr(compare_recovery.prune, "save", refuse)
    refused("no such budget", out=recovery.config.out)
    assert Path(recovery.config.out).read_bytes() == before
    # Nor may a cut be that of an earlier comparison, whose records are gone.
    monkeypatch.setattr(compare_recovery, "RECOVERED", (ROWS[0],))
    refused("minitron-ffn-0.8 was cut with another windows; delete out/all/runs", out="out/all.json", windows=16)
    # Neither text may be another part of the comparison.
    for text, parts in recovery.subject.texts.items():
        texts = {**recovery.subject.texts, text: {"calibration": parts["test"]}}
        subject = compare.Subject(recovery.config, recovery.subject.model, recovery.subject.tokenizer, texts)
        with pytest.raises(UserError, match="stdlib or .*prose.jsonl is not the comparison's calibration text"):
            compare_recovery.Recovery(compare.Cuts(subject, None), compare.losses_of)


def test_rows_and_their_recipes(monkeypatch):
    monkeypatch.setattr(compare_recovery, "RECOVERED", RECOVERED)
    rows = compare_recovery.recipes(.7)
    assert rows.pop("dense") == (None, 1.0) and rows.pop("LoRAPrune") == (None, .7) and len(rows) == 9
    assert all(keep == (.5 if sparse.is_sparse(recipe.structure) else .7) for recipe, keep in rows.values())
    assert all(recipe.mend != "bias" for recipe, _ in rows.values())            # those fit into no checkpoint


def test_the_table_is_the_written_numbers():
    def record(name, way, after, before, lr=1e-4, tokens=2048):
        return {"tag": "recovered", "name": name, "keep": .8, "seed": 0, "way": way, "lr": lr, "tokens": tokens,
                "perplexity": after, "before": before}

    records = [record("FLAP", "full", 30., 60.), record("FLAP", "lora", 20., 60.), record("dense", "full", 9., 10.),
               record("taylor / global", "full", 25., 40.), record("taylor / global", "full", 15., 40., 1e-3),
               record("LLM-Pruner", "full", 22., 50.), record("FLAP", "full", 12., 60., tokens=4096),
               {"tag": "recovered", "refused": "why"}]
    first, second = compare_report.recovery_tables(records)
    assert first.splitlines()[2:] == [
        "| method | keep | as cut | full training, rate 0.0001 | full training, rate 0.001 | LoRA, rate 0.0001 |",
        "| --- | --- | --- | --- | --- | --- |", "| dense | 0.8 | 10.00 | 9.00 |  |  |",
        "| LLM-Pruner | 0.8 | 50.00 | 22.00 |  |  |", "| **taylor / global** | 0.8 | 40.00 | 25.00 | 15.00 |  |",
        "| FLAP | 0.8 | 60.00 | 30.00 |  | 20.00 |"]
    assert "2,048 tokens" in first and "4,096 tokens" in second and "| FLAP | 0.8 | 60.00 | 12.00 |" in second
    assert compare_report.recovery_tables([]) == []

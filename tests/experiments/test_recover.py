"""Recovering a model by one command, and comparing cuts that recover: every step once, on a toy; the same command goes
on; what was chosen and what is reported share no document."""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import prune
import train
from common import UserError, read_records
from experiments import measure, recover, recover_report, recover_study
from formats import huggingface
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a random model whose tokenizer is the bytes, and two texts beside it."""
    folder = tmp_path_factory.mktemp("recover")
    torch.manual_seed(3)
    model = GPT(GPTConfig(260, 1024, 32, 8, n_head=(4, 4, 4), n_kv_head=(2, 2, 2), d_ff=(64, 64, 64)))
    (folder / "dense").mkdir()
    huggingface.save(folder / "dense", model, "llama", open_tokenizer("bytes").as_files())
    for name, words in {"animals": "the cat and the dog", "weather": "rain today, sun tomorrow"}.items():
        rows = [json.dumps({"text": f"{number}: {words}. " * 40}) for number in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def small(monkeypatch, folder):
    """Everything small enough for seconds."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(recover, "CALIBRATION_WINDOWS", 8)
    monkeypatch.setattr(recover, "MULTIPLE_OF", 8)
    monkeypatch.setattr(recover, "SPEED_ROUNDS", 1)
    monkeypatch.setattr(measure, "SAMPLE_TOKENS", 4)


def recovery(**changes):
    settings = dict(out="recovered", keep=.7, steps=2, data=("animals.jsonl", "stdlib"), unseen=("weather.jsonl",),
                    limit=8, windows=1, local_steps=2, device="cpu")
    return recover.Recover("dense", **{**settings, **changes})


# -- what is measured

def test_halves_are_cut_between_documents():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(0, 5, size=rng.integers(2, 60))
        first, second = measure.halves(tokens, eot=0)
        assert np.array_equal(np.concatenate((first, second)), tokens) and len(first) and len(second)
        if (tokens[:-1] == 0).any():
            assert first[-1] == 0
            ends = np.flatnonzero(tokens[:-1] == 0) + 1
            assert abs(len(first) - len(tokens) // 2) == min(abs(ends - len(tokens) // 2))


def test_answers_survive_as_text():
    flags = [True, False, False, True]
    assert measure.bits(flags) == "1001" and measure.flags("1001") == flags


def test_the_table_compares_each_model_with_the_first():
    def record(answers):
        return {"params": 5, "losses": {"a": 1.0, "b": 2.0}, "probe": {"sums": "1100"},
                "questions": {"q": {"acc": answers, "acc_norm": answers}}}

    lines = measure.table({"dense": record("1" * 8 + "0" * 2), "cut": record("1" * 4 + "0" * 6)}).splitlines()
    assert f"{math.e:.2f}" in lines[2] and "1.000 [1.000, 1.000]" in lines[2]
    # Four of the dense model's eight right answers are left.
    assert "| 0.400 | 0.500 [" in lines[3] and lines[3].endswith("| 0.50 |")


# -- one command

def test_one_command_recovers_exports_and_goes_on(small, capsys, monkeypatch):
    recover.main(recovery())
    said = capsys.readouterr().out
    for text in ("dense", "cut and repaired", "recovered", "weather ppl", "other documents of animals, stdlib"):
        assert text in said
    model, about = checkpoint.load("recovered/recovered")
    dense, _ = checkpoint.load("dense")
    assert about["step"] == 2 and about["run"]["teacher"] == "dense" and about["run"]["plan"] == "recover"
    assert model.config.num_params()["total"] < dense.config.num_params()["total"]
    assert model.config.block_size == dense.config.block_size
    exported, _ = checkpoint.load("recovered/hf")
    assert exported.config == model.config
    card = Path("recovered/hf/README.md").read_text()
    assert "cut and repaired" in card and "weather" in card

    # The same command does nothing twice, and another one is refused.
    for module, name in ((prune, "main"), (train, "train")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("was done twice"))
    recover.main(recovery(minutes=5))
    with pytest.raises(UserError, match="is of another command .--keep 0.7 there, 0.6 here.; give another --out"):
        recover.main(recovery(keep=.6))


def test_the_training_gets_the_minutes_that_are_left(small, monkeypatch):
    work, _ = recover.open_work(recovery(out="timed", steps=None, minutes=60))
    prune.main(prune.Prune(init="dense", keep=.7, data=("animals.jsonl",), windows=8, block_size=32, eval_windows=2,
                           out="timed/cut"))
    work.journal.records["dense"] = {"seconds": 120}
    ticks = iter(range(0, 10_000, 3))        # each micro-batch takes 3 seconds by this clock
    monkeypatch.setattr(recover.time, "perf_counter", lambda: next(ticks))
    work = dataclasses.replace(work, start=0)
    plan = recover.steps_that_fit(work)
    settings = train.fit_to(recover.training(work), 1024)
    micro_steps = settings.batch_tokens // (settings.micro_batch * settings.block_size)
    assert plan["seconds_per_step"] == 3 * micro_steps
    # 60 minutes less those gone, less the measurement behind the training and the reserve.
    left = 60 * 60 - 120 - 60 * 60 * recover.RESERVE
    assert left - 60 < plan["steps"] * plan["seconds_per_step"] <= left


# -- the study

def test_every_row_is_measured_behind_every_stage_and_only_once(small, monkeypatch):
    config = recover_study.Study(
        "dense", out="study.jsonl", runs="study", keeps=(.7,), data=("animals.jsonl", "stdlib"),
        unseen=("weather.jsonl",), limit=8, eval_windows=1, windows=8, steps=2, longer=(1,), local_steps=1, part="rows")
    monkeypatch.setattr(recover_study, "CUTS", {name: recover_study.CUTS[name] for name in ("ours", "ShortGPT")})
    recover_study.main(config)
    records = read_records("study.jsonl")
    stages = [(record["name"], record["stage"]) for record in records if record["tag"] == "model"]
    assert stages == [(name, stage) for name in ("ours", "ShortGPT") for stage in ("cut", "local", "recovered")]
    recovered = [record for record in records if record.get("stage") == "recovered"]
    assert all(record["cost"]["tokens"] == records[0]["tokens"] for record in recovered)

    recover_study.main(config)
    assert read_records("study.jsonl") == records

    # Killed between a stage and its record: the stage is made again, to the same answers.
    lines = Path("study.jsonl").read_text().splitlines(keepends=True)
    Path("study.jsonl").write_text("".join(lines[:-3]))
    recover_study.main(config)
    for before, after in zip(records, read_records("study.jsonl"), strict=True):
        assert before.get("losses") == after.get("losses")

    records = read_records("study.jsonl")
    recover_study.main(dataclasses.replace(config, part="tokens"))
    added = read_records("study.jsonl")[len(records):]
    assert [record["cost"]["tokens"] for record in added] == [records[0]["tokens"] // 2]
    report = recover_report.write("study.jsonl")
    assert "| ShortGPT, 0.03M | cut |" in report and "ours minus" in report
    with pytest.raises(UserError, match="holds another study .steps is 2 there and 3 here"):
        recover_study.main(dataclasses.replace(config, steps=3))

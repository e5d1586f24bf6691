"""Recovering a model by one command, and comparing cuts that recover: every step once, on a toy; the same command goes
on; what was chosen and what is reported share no document."""
import dataclasses
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import export
import prune
import train
from common import UserError, parse, read_records
from experiments import candidates, measure, recover, recover_report, recover_study
from formats import gguf_export, huggingface, llamacpp
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a random model whose tokenizer is the bytes, and two texts beside it."""
    folder = tmp_path_factory.mktemp("recover")
    for name, context, d_model in (("dense", 1024, 32), ("of-512", 512, 32), ("narrow", 1024, 36)):
        torch.manual_seed(3)
        model = GPT(GPTConfig(260, context, d_model, 8, n_head=(4, 4, 4), n_kv_head=(2, 2, 2), d_ff=(64, 64, 64)))
        (folder / name).mkdir()
        huggingface.save(folder / name, model, "llama", open_tokenizer("bytes").as_files())
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


def recovery(model="dense", **changes):
    settings = dict(out="recovered", keep=.7, steps=2, data=("animals.jsonl", "stdlib"), unseen=("weather.jsonl",),
                    limit=8, windows=1, local_steps=2, device="cpu")
    return recover.Recover(model, **{**settings, **changes})


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


def test_no_text_hides_another_of_its_name(small):
    with pytest.raises(UserError, match="two of animals.jsonl, stdlib, other/animals.jsonl are called 'animals'"):
        recover.main(recovery(out="alike", unseen=("other/animals.jsonl",)))
    with pytest.raises(UserError, match="are called 'own' in tables; rename"):
        measure.Protocol(questions=("own", "own")).read()
    assert not Path("alike").exists()


# -- one command

@pytest.mark.parametrize("settings, words", [
    (dict(questions=()), "--questions is empty"), (dict(minutes=5), "--minutes has no effect with --steps 2"),
    (dict(keep=1.), "--keep 1.0 must be")])
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        recover.check(recovery(**settings))


def test_what_would_end_the_command_late_is_refused_first(small, monkeypatch):
    monkeypatch.setattr(recover, "measured", lambda *_: pytest.fail("took long"))
    monkeypatch.setattr(recover, "MULTIPLE_OF", 128)
    with pytest.raises(UserError, match="--multiple-of 128 is more than the 64 neurons"):
        recover.main(recovery(out="never"))
    monkeypatch.setattr(recover, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers, .* is not installed: pip install"):
        recover.main(recovery(out="never"))
    assert not Path("never").exists()


def test_a_printed_command_makes_the_same_settings():
    config = recovery("my model", data=("animals.jsonl:2", "my text.jsonl"))
    for recipe in recover.recipes(config, config.data, 32).values():
        recipe = recover.with_repair(recipe, config)
        assert parse(prune.Prune, shlex.split(recover.command_of(recipe))) == recipe


@pytest.mark.parametrize("name", recover.RECIPES)
def test_every_recipe_can_be_the_one_that_goes_on(small, monkeypatch, name):
    work, model = recover.open_work(recovery(out=f"by {name}"))
    monkeypatch.setattr(candidates, "best", lambda tried: next(row for row in tried if row.name == name))
    cut, about = checkpoint.load(recover.cut(work, model))
    assert cut.config.num_params()["total"] < model.config.num_params()["total"]
    assert about["run"]["recipe"]["structure"] == recover.RECIPES[name].get("structure", "ffn,kv")
    assert work.journal.records["prune"]["seconds"] > 0


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

    # The same command does nothing twice, and another is refused.
    for module, name in ((prune, "main"), (train, "train")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("was done twice"))
    recover.main(recovery())
    with pytest.raises(UserError, match="is of another command .--keep 0.7 there, 0.6 here.; give another --out"):
        recover.main(recovery(keep=.6))


def test_a_killed_command_goes_on_from_every_step(small, monkeypatch):
    """The records are those of a command that nothing killed, and no temporary file stays."""
    recover.main(recovery(out="whole", choose=False))

    def killed(*_, **__):
        raise KeyboardInterrupt

    places = ((measure, "measure"), (prune, "save"), (prune, "picture"), (train, "save"), (train, "finish"),
              (export, "check"), (gguf_export, "write_tensor"), (llamacpp, "speed"))
    for module, name in places:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, killed)
            recover.main(recovery(out="killed", choose=False))
    # A process that is killed cannot remove what it began to write.
    Path("killed/.model.gguf.1.tmp").write_text("a part")
    Path("killed/model.gguf").unlink()
    recover.main(recovery(out="killed", choose=False))
    whole, again = ({r["tag"]: r for r in read_records(f"{out}/recover.jsonl")} for out in ("whole", "killed"))
    assert len(read_records("killed/recover.jsonl")) == len(again)
    # Killed behind the cut, the seconds of the cut are not known.
    assert whole.keys() - again.keys() == {"prune"}
    for tag in ("dense", "cut", "recovered"):
        for part in ("params", "losses", "questions", "probe", "samples"):
            assert again[tag][part] == whole[tag][part]
    assert {file.name for file in Path("killed").rglob(".*")} == {".lock"}


def test_a_model_that_q8_0_does_not_hold_has_its_other_files(small, capsys):
    recover.main(recovery("narrow", out="narrow-0.7", choose=False))
    assert "no model-q8_0.gguf: 32 does not divide the model's rows of 36" in capsys.readouterr().out
    assert Path("narrow-0.7/model.gguf").exists() and not Path("narrow-0.7/model-q8_0.gguf").exists()
    speed = read_records("narrow-0.7/recover.jsonl")[-1]
    assert speed["tag"] == "speed" and speed["files"].keys() == {"dense.gguf", "model.gguf"}


@pytest.mark.parametrize("context", [1024, 512])
def test_the_training_gets_the_minutes_that_are_left(small, monkeypatch, context):
    model = "dense" if context == 1024 else "of-512"
    work, _ = recover.open_work(recovery(model, out=f"timed-{model}", steps=None, minutes=60))
    prune.main(prune.Prune(init=model, keep=.7, data=("animals.jsonl",), windows=8, block_size=32, eval_windows=2,
                           out=f"timed-{model}/cut"))
    work.journal.records["dense"] = {"seconds": 120}
    ticks = iter(range(0, 10_000, 3))        # each micro-batch takes 3 seconds by this clock
    monkeypatch.setattr(recover.time, "perf_counter", lambda: next(ticks))
    work = dataclasses.replace(work, start=0)
    plan = recover.steps_that_fit(work)
    settings = train.fit_to(recover.training(work), context)
    micro_steps = settings.batch_tokens // (settings.micro_batch * 512)
    assert plan["seconds_per_step"] == 3 * micro_steps
    # 60 minutes less those gone, less the measurement behind the training and the reserve.
    left = 60 * 60 - 120 - 60 * 60 * recover.RESERVE
    assert left - 60 < plan["steps"] * plan["seconds_per_step"] <= left


def test_a_second_call_has_the_minutes_that_the_first_left(small, monkeypatch, capsys):
    first, _ = recover.open_work(recovery(out="twice", steps=None, minutes=60))
    first.journal.add("dense", seconds=120.0)
    first.journal.add("prune", seconds=480.0)
    assert first.minutes_gone < 5
    second, _ = recover.open_work(recovery(out="twice", steps=None, minutes=90))
    assert 10 <= second.minutes_gone < 15 and second.minutes_of_call < 5
    # When the training has its length, another number of minutes changes nothing, and a line says so.
    monkeypatch.setattr(train, "main", lambda settings: None)
    second.journal.add("training", steps=7, seconds_per_step=1.0, batch_tokens=4096, minutes=60)
    recover.recover(second)
    assert "--minutes 90 comes too late: the training has had 7 steps since --minutes 60" in capsys.readouterr().out


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
    for changes, words in ((dict(steps=3), "steps is 2 there and 3 here"), (dict(unseen=()), "texts is"),
                           (dict(keeps=(.7, .6)), "keeps is")):
        with pytest.raises(UserError, match=f"holds another study .{words}"):
            recover_study.main(dataclasses.replace(config, **changes))

"""Mixtures through train.py, prune.py and eval.py: what is recorded of each source, and that one source stays as it
was."""
import json
import math

import pytest
import torch

import checkpoint
import data
import eval as evaluation
import prune
import train
from common import UserError, parse
from methods import dynamic_batches

TOY = dict(plan="scratch", preset="toy", steps=6, batch_tokens=256, micro_batch=2, eval_windows=8, eval_every=3,
           save_every=3, device="cpu")
CUT = dict(windows=8, eval_windows=4, block_size=32, micro_batch=2, device="cpu")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two sources: counting, and one letter again and again."""
    monkeypatch.chdir(tmp_path)
    for name, row in (("a.jsonl", "one two three {} "), ("b.jsonl", "{} zzzzzzzzzzzzzz ")):
        (tmp_path / name).write_text("".join(json.dumps({"text": 30 * row.format(i)}) + "\n" for i in range(60)))
    return ("a.jsonl:3", "b.jsonl")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_and_a_cut_know_their_sources(texts, tmp_path, capsys):
    train.main(train.Train(**TOY, data=texts, out="run", stage="all"), quiet=True)
    config, *_, summary = records(tmp_path / "run")
    assert config["data"] == list(texts) and list(summary["val_losses"]) == ["a.jsonl", "b.jsonl"]
    model, about = checkpoint.load("run", "cpu")
    corpus = data.load_mixture(texts)
    losses = [evaluation.evaluate(model, tokens, corpus.tokenizer.byte_lengths(), 4, batch=2)["loss"]
              for tokens in corpus.domains.values()]
    assert list(summary["val_losses"].values()) == pytest.approx(losses, abs=1e-6)
    assert summary["val_loss"] == pytest.approx((3 * losses[0] + losses[1]) / 4, abs=1e-6)
    # A token is a byte here.
    assert summary["bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2), rel=.02)
    windows = [data.windows(part.train, 64) for part in corpus.parts]         # of 6 · 256 / 64 = 24
    assert list(summary["epochs_of"].values()) == [18 / windows[0], 6 / windows[1]]
    assert summary["epochs"] == max(summary["epochs_of"].values())

    # The same run again is finished, with other data it is another run.
    train.main(train.Train(**TOY, data=texts, out="run"), quiet=True)
    for other in (texts[::-1], ("a.jsonl", "b.jsonl"), ("a.jsonl",)):
        with pytest.raises(UserError, match="data|fingerprint"):
            train.main(train.Train(**TOY, data=other, out="run"), quiet=True)

    capsys.readouterr()
    prune.main(prune.Prune(init="run", data=texts, out="cut", keep=0.5, **CUT))
    output = capsys.readouterr().out
    for when in ("before", "after"):
        for name in ("a.jsonl", "b.jsonl"):
            assert sum(line.startswith(when) and f"hold-out of {name}" in line for line in output.splitlines()) == 1
    assert "8 windows of 32 tokens of a.jsonl (75%) and b.jsonl (25%)" in output
    _, about = checkpoint.load("cut", "cpu")
    assert about["run"]["data"] == about["run"]["recipe"]["data"] == list(texts)
    evaluation.main(parse(evaluation.Eval, ["cut"]))
    assert "hold-out of a.jsonl" in capsys.readouterr().out

    # As the run recorded them: each by itself, on the same windows.
    evaluation.main(parse(evaluation.Eval, ["run", "--windows", "8", "--batch", "2"]))
    lines = capsys.readouterr().out.splitlines()
    for name, loss, lines_of_source in zip(("a.jsonl", "b.jsonl"), losses, (lines[:2], lines[2:])):
        assert f"hold-out of {name}, 256 tokens" in lines_of_source[0]
        assert f"{loss:.4f} nats per token" in lines_of_source[1]


def test_a_run_learns_from_texts_and_from_answers(texts, tmp_path):
    rows = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}, which is more than {i}"} for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for sources in (("chats.jsonl",), ("chats.jsonl", "b.jsonl")):
        out = f"run-{len(sources)}"
        setup, _ = train.main(train.Train(**TOY, data=sources, out=out), quiet=True)
        sample, = [record for record in records(tmp_path / out) if record["tag"] == "sample"]
        assert " + 1 = " in sample["prompt"] and "which is more" in sample["prompt"]
        _, y = setup.batch(0, 0)
        assert (y == data.IGNORED).any() and (y >= 0).any()


def test_one_source_is_recorded_as_ever(texts, tmp_path):
    train.main(train.Train(**TOY, data=("a.jsonl",), out="run"), quiet=True)
    train.main(train.Train(**TOY, data="a.jsonl", out="as text"), quiet=True)
    runs = [records(tmp_path / name) for name in ("run", "as text")]
    assert [run[0]["data"] for run in runs] == ["a.jsonl"] * 2 and not any("val_losses" in record for record in runs[0])
    assert [record["val_loss"] for record in runs[0] if record["tag"] == "eval"] == [
        record["val_loss"] for record in runs[1] if record["tag"] == "eval"]
    prune.main(prune.Prune(init="run", data=("a.jsonl",), out="cut", **CUT))
    _, about = checkpoint.load("cut", "cpu")
    assert about["run"]["recipe"]["data"] == about["run"]["data"] == "a.jsonl"


def test_a_part_that_is_too_short_for_the_windows_is_named(texts):
    mixture = data.load_mixture(texts).train
    with pytest.raises(UserError, match=r"is over after \d+ of 9000 windows"):
        prune.score.batches(mixture, 32, 9000, 2, 0)


# -- texts that are weighed anew

def test_texts_that_lag_behind_come_more_often_and_a_stopped_run_goes_on(texts, tmp_path):
    """The weights are those of the formula, from the records; batches are those that the weights draw."""
    (tmp_path / "reference.json").write_text('{"a.jsonl": 1.0, "b.jsonl": 3.0, "another": 0}')
    settings = {**TOY, "steps": 12, "data": texts, "reference": "reference.json"}
    setup, state = train.main(train.Train(**settings, out="whole"), quiet=True)
    evaluations = [record for record in records(tmp_path / "whole") if record["tag"] == "eval"]
    assert [record["step"] for record in evaluations] == [0, 3, 6, 9, 12]
    weights = [0.75, 0.25]
    drawn = [0, 0]
    for number, record in enumerate(evaluations):
        if number:
            drawn = [before + 3 * 4 * weight for before, weight in zip(drawn, weights)]      # 4 windows a step
            weights = dynamic_batches.reweigh(weights, list(record["val_losses"].values()), [1.0, 3.0])
        assert list(record["weights"].values()) == pytest.approx(list(weights), abs=1e-12)
    assert weights[0] > 0.9                                              # a lags behind, b is ahead
    summary = records(tmp_path / "whole")[-1]
    windows = [data.windows(part.train, 64) for part in setup.corpus.parts]
    assert list(summary["epochs_of"].values()) == pytest.approx([n / w for n, w in zip(drawn, windows)])

    # Rows of batches come from the text that the hash draws.
    rows, _ = setup.batch(5, 0, {"weights": [0.5, 0.5]})
    is_b = torch.tensor([(row == ord("z")).sum() > 20 for row in rows])
    samples = range(setup.first_sample(5, 0), setup.first_sample(5, 0) + len(rows))
    assert is_b.tolist() == (dynamic_batches.domain_of(list(samples), [0.5, 0.5], 0) == 1).tolist()

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "count_flops", lambda setup, state, *rest: stop() if state.step == 7 else original(
            setup, state, *rest))
        with pytest.raises(KeyboardInterrupt):
            train.main(train.Train(**settings, out="stopped"), quiet=True)
    (tmp_path / "reference.json").write_text('{"a.jsonl": 9.0, "b.jsonl": 9.0}')       # it is in the checkpoint
    _, again = train.main(train.Train(**settings, out="stopped"), quiet=True)
    assert again.balance == state.balance
    assert all(map(torch.equal, again.model.parameters(), state.model.parameters()))


original = train.count_flops


@pytest.mark.parametrize("settings, says", [
    (dict(data=("a.jsonl",), reference="auto"), "--reference has no effect with one text"),
    (dict(reference="bad.json"), "must hold nats per token of a.jsonl, b.jsonl"),
    (dict(reference="nan.json"), "holds losses that are not finite")])
def test_references_that_say_nothing_are_refused(texts, tmp_path, settings, says):
    (tmp_path / "bad.json").write_text('{"a.jsonl": 1.0}')
    (tmp_path / "nan.json").write_text('{"a.jsonl": 1.0, "b.jsonl": NaN}')
    with pytest.raises(UserError, match=says):
        train.main(train.Train(**{**TOY, "data": texts, **settings}, out="run"), quiet=True)


def test_auto_holds_the_texts_against_their_losses_before_training(texts, tmp_path):
    _, state = train.main(train.Train(**TOY, data=texts, reference="auto", out="run"), quiet=True)
    first = next(record for record in records(tmp_path / "run") if record["tag"] == "eval")
    assert state.balance["reference"] == list(first["val_losses"].values())
    assert sum(state.balance["weights"]) == pytest.approx(1)

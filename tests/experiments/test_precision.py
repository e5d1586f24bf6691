"""Pairs of runs that differ in the dtype only, judged alike, and what the table says of them."""
import re
from pathlib import Path

import pytest
import torch
from scipy import stats

import checkpoint
import report
import train
from common import UserError, parse
from eval import evaluate
from experiments import precision
from experiments.precision import Precision

TOY = ["--preset", "toy", "--steps", "6", "--batch-tokens", "256", "--block-size", "64", "--eval-windows", "4"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The settings of an experiment of two pairs at toy size, which was run."""
    folder = tmp_path_factory.mktemp("precision")
    command = [*TOY, "--seeds", "2", "--jobs", "2", "--out", str(folder / "out.jsonl"), "--runs", str(folder / "runs")]
    config = parse(Precision, command)
    precision.main(config)
    return config


def test_a_pair_differs_in_the_dtype_only(toy):
    runs = report.read_runs(toy.out)
    assert [*runs] == ["bfloat16-s0", "bfloat16-s1", "float32-s0", "float32-s1"]
    for seed in range(2):
        exact = runs[f"float32-s{seed}"]
        rough = runs[f"bfloat16-s{seed}"]
        differ = {name for name, value in exact["config"][0].items() if rough["config"][0][name] != value}
        assert differ == {"run", "dtype"}
        # The same weights, evaluated alike, before the first step; others behind the last one.
        assert exact["eval"][0]["step"] == 0 and exact["eval"][0]["val_loss"] == rough["eval"][0]["val_loss"]
        assert exact["summary"][0]["val_loss"] != rough["summary"][0]["val_loss"]
        assert exact["summary"][0]["step"] == rough["summary"][0]["step"] == 6
        assert "step" not in exact


def test_a_bfloat16_run_is_judged_in_float32(toy):
    """By weights in float32 and outside of autocast."""
    folder = Path(toy.runs, "bfloat16-s0")
    newest = checkpoint.newest(folder)
    model, _ = checkpoint.load(newest, "cpu")
    setup, _ = train.main(train.Train(out=str(folder), device="cpu", **precision.settings_of(toy, "bfloat16", 0)),
                          quiet=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.set_num_threads(1)
    loss = evaluate(model, setup.corpus.val, setup.byte_lengths, 4, batch=setup.config.micro_batch)["loss"]
    assert precision.losses(toy)["bfloat16", 0] == pytest.approx(loss, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = evaluate(model, setup.corpus.val, setup.byte_lengths, 4)["loss"]
    assert abs(rounded - loss) > 1e-5


def test_finished_runs_are_not_run_again(toy, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(precision.sweep, "side_by_side",
                        lambda make, missing, jobs, until: started.append([job[1] for job in missing]) or len(missing))
    precision.main(toy)
    assert started == [[]]
    with pytest.raises(TypeError):                       # the third pair has no losses, as nothing was run
        precision.main(precision.Precision(**{**vars(toy), "seeds": 3}))
    assert started[1] == ["float32-s2", "bfloat16-s2"]
    with pytest.raises(UserError, match="float32-s0 in .* holds another run .steps is 6 there and 7 here.* --out"):
        precision.main(precision.Precision(**{**vars(toy), "steps": 7}))
    monkeypatch.setattr(precision.sweep, "side_by_side", lambda *_: 0)
    capsys.readouterr()
    precision.main(precision.Precision(**{**vars(toy), "seeds": 3}))
    assert capsys.readouterr().out == "2 runs are left; the same command goes on\n"


def test_the_defaults_are_the_experiment():
    settings = precision.settings_of(Precision(), "bfloat16", 3)
    config = train.resolve(train.Train(**settings), "cpu")
    assert (config.preset, config.plan, config.steps, config.lr) == ("4x256", "scratch", 300, 2e-3)
    assert (config.batch_tokens, config.block_size, config.micro_batch) == (1024, 128, 8)
    assert (config.dtype, config.seed) == ("bfloat16", 3)
    assert Precision().seeds == 8
    start, target, _ = train.plan_run(config, 256)
    assert start == target and 3.4e6 < target.num_params()["total"] < 3.5e6


def test_the_table_gives_student_s_interval():
    exact = [1.85, 1.92, 1.88, 1.9]
    rough = [1.84, 1.93, 1.90, 1.9]
    recorded = {("float32", seed): loss for seed, loss in enumerate(exact)}
    recorded |= {("bfloat16", seed): loss for seed, loss in enumerate(rough)}
    text = precision.table(recorded, 4)
    oracle = stats.ttest_rel(rough, exact).confidence_interval(.95)
    assert "| 0 | 1.8500 | 1.8400 | -0.0100 |" in text and "| mean | 1.8875 | 1.8925 | +0.0050 |" in text
    assert "| standard deviation | 0.0299 | 0.0377 | 0.0129 |" in text
    numbers = [float(number) for number in re.findall(r"[+-]\d\.\d{4}", text.splitlines()[-1])]
    assert numbers == [.005, round(oracle.low, 4), round(oracle.high, 4)]
    assert text.endswith(": no difference is shown, and none within the interval is excluded.")


@pytest.mark.parametrize("differences, verdict", [
    ((.01, .011, .012), "ends with a higher loss"), ((-.01, -.011, -.012), "ends with a lower loss"),
    ((-.01, .011, .012), "no difference is shown"), ((.3,), "says nothing")])
def test_the_sentence_says_no_more_than_the_interval(differences, verdict):
    recorded = {("float32", seed): 0. for seed in range(len(differences))}
    recorded |= {("bfloat16", seed): difference for seed, difference in enumerate(differences)}
    assert verdict in precision.table(recorded, len(differences)).splitlines()[-1]


def test_numbers_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="--seeds 0 must be positive"):
        precision.main(Precision(seeds=0))

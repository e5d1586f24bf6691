"""The loop: stages compose, killed runs go on, processes agree, cuts compile nothing, plans end where they promise."""
import copy
import dataclasses
import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import common
import distill
import model as models
import report
import schedule
import train
from common import UserError, read_records
from formats import huggingface, origin
from formats.tokenizer import open_tokenizer

ROOT = Path(__file__).parent.parent
TOY = dict(preset="toy", steps=60, batch_tokens=256, micro_batch=1, eval_windows=4, eval_every=20, save_every=7,
           lr=1e-2, min_lr=1e-3, device="cpu")
PRUNING = dict(enlarge_kv=2, score_window=10)                  # for plans that prune
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def toy(plan="idea", **settings):
    """Settings of a toy run of this plan."""
    laws = [row.size_curve for row in schedule.PLANS.get(plan, ()) if row.size_curve]
    several = dict(cuts=4) if laws and laws != ["oneshot"] else {}
    pruning = dict(enlarge_kv=2, calibration_windows=4) if plan == "adapt" else PRUNING if laws else {}
    return {**TOY, **pruning, **several, "plan": plan, **settings}


def start(*launcher, **settings):
    words = [word for k, v in toy(**settings).items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return subprocess.Popen([*(launcher or (sys.executable, ROOT / "train.py")), *words], env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=obey_signals)


def obey_signals():
    # A shell's background job ignores Ctrl-C, what nohup starts ignores SIGHUP, and their children would, too.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def train_toy(out, **settings):
    return train.main(train.Train(**toy(**settings), out=str(out)), quiet=True)


def result(out):
    """What must be the same bit for bit: all of the last checkpoint and all records, but for seconds."""
    model, state = checkpoint.load(out)
    state["window"].pop("seconds_before", None)
    timed = ("seconds", "provenance", "digest", "records")              # digests are of seconds, too
    without_time = {k: v for k, v in state.items() if k not in timed}
    records = [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second", "peak_bytes", "pruning_share",
                                                        "file")} for r in read_records(Path(out) / "metrics.jsonl")]
    without_time["teacher_file"] = state["teacher_file"] and state["teacher_file"]["sha256"]
    return model.state_dict(), without_time, records


def same(a, b):
    """Equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An idea-kd run in one go, as the reference."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train_toy(out, plan="idea-kd")
    return result(out)


@pytest.mark.parametrize("plan", ["idea-kd", "naive", "journey", "adapt"])
def test_stages_one_by_one_are_the_whole_run(tmp_path, whole, plan):
    for stage in ("enlarge", "prune", "recover"):
        train_toy(tmp_path / "run", plan=plan, stage=stage)
    if plan != "idea-kd":
        train_toy(tmp_path / "whole", plan=plan)
        whole = result(tmp_path / "whole")
    assert same(result(tmp_path / "run"), whole)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("plan, step, settings", [("naive", 30, {}), ("naive", 31, {}), ("idea", 43, dict(slice_at=50)),
                                                  ("kd", 57, dict(kd_weight=.3)), ("idea", 31, dict(uncertainty=True)),
                                                  ("adapt", 36, {}), ("naive", 31, dict(rewarm=False)),
                                                  ("idea", 33, dict(score="activation", score_window=100,
                                                                    calibration_windows=4))])
def test_killed_at_the_awkward_steps_is_never_killed(tmp_path, monkeypatch, plan, step, settings):
    """Right at and after a restart; between the last cut and the slice; after the teacher was dropped; between two
    cuts that slice at once."""
    if plan == "kd":
        train_toy(tmp_path / "teacher", plan="scratch", steps=1)
        settings = dict(settings, teacher=str(tmp_path / "teacher"))
    train_toy(tmp_path / "whole", plan=plan, save_every=1, **settings)
    count = train.count_flops

    def kill(setup, state, *args):
        if state.step == step:
            raise Killed
        count(setup, state, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "count_flops", kill)
        train_toy(tmp_path / "run", plan=plan, save_every=1, **settings)
    train_toy(tmp_path / "run", plan=plan, save_every=1, **settings)
    assert same(result(tmp_path / "run"), result(tmp_path / "whole"))
    assert plan != "kd" or result(tmp_path / "run")[1]["dropped"]


def test_another_seed_is_another_run(tmp_path, whole):
    train_toy(tmp_path / "run", plan="idea-kd", seed=1)
    assert not same(result(tmp_path / "run")[0], whole[0])


def test_killed_at_random_steps_is_never_killed(tmp_path, whole):
    out, dice = tmp_path / "run", random.Random()
    for kill_at in sorted(dice.sample(range(1, 60), 2)):
        process = start(plan="idea-kd", out=out)
        while process.poll() is None:
            if any(r["step"] >= kill_at for r in read_records(out / "metrics.jsonl")[1:]):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate()
    process = start(plan="idea-kd", out=out)
    assert process.wait() == 0, process.stderr.read()
    assert same(result(out), whole)


def test_sigterm_saves_says_how_to_go_on_and_loses_nothing(tmp_path, whole):
    out = tmp_path / "run"
    process = start(plan="idea-kd", out=out)
    while not any(r["tag"] == "step" for r in read_records(out / "metrics.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in printed
    assert 10 <= checkpoint.load(out)[1]["step"] < 60
    train_toy(out, plan="idea-kd")
    assert same(result(out), whole)


def test_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    assert "is finished" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EVERY_STEP = ("import common, train\ntrain.LOG_EVERY = 1\n"
              "common.run(lambda: train.main(common.parse(train.Train)))\n")


@pytest.mark.parametrize("plan, dtype, tolerance", [("idea", "float64", 1e-9), ("idea-kd", "float32", 1e-3),
                                                    ("adapt", "float64", 1e-6)])
def test_two_processes_are_one_through_cuts_and_slice(tmp_path, monkeypatch, plan, dtype, tolerance):
    """The loss of every step, the units that were cut; and in float64 all weights. Rounding grows from step to step, in
    plan adapt and torch 2.6 from 1e-12 at the first cut, step 30, to 1e-8 at the last step."""
    (tmp_path / "every_step.py").write_text(EVERY_STEP)
    process = start(*TORCHRUN, tmp_path / "every_step.py", plan=plan, dtype=dtype, out=tmp_path / "two")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    train_toy(tmp_path / "one", plan=plan, dtype=dtype)
    (one, state_one, records_one), (two, state_two, records_two) = result(tmp_path / "one"), result(tmp_path / "two")
    assert state_one["run"] == state_two["run"] and len(records_one) == len(records_two) > 60
    for a, b in zip(records_one, records_two):
        assert a["tag"] == b["tag"] and a.get("d_ff") == b.get("d_ff") and a.get("n_kv_head") == b.get("n_kv_head")
        for key in ("loss", "kl", "val_loss", "grad_norm"):
            near = 1e-9 if dtype == "float64" and a["step"] <= 33 else tolerance
            assert (a.get(key) or 0) == pytest.approx(b.get(key) or 0, rel=near, abs=near)
    for name in one:                       # another unit kept would be another row: as far off as weights are large
        assert (one[name] - two[name]).abs().max() < (1e-6 if dtype == "float64" else 0.1 * one[name].abs().max()), name


def test_two_processes_stop_together_and_go_on(tmp_path):
    out = tmp_path / "run"
    settings = dict(plan="idea-kd", steps=100, out=out)
    process = start(*TORCHRUN, ROOT / "train.py", **settings)
    while process.poll() is None and not any(r["tag"] == "step" for r in read_records(out / "metrics.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert 10 <= checkpoint.load(out)[1]["step"] < 100
    for folder_of, launcher in ((out, TORCHRUN), (tmp_path / "whole", TORCHRUN)):
        process = start(*launcher, ROOT / "train.py", **{**settings, "out": folder_of})
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert same(result(out), result(tmp_path / "whole"))


@pytest.mark.parametrize("plan, graphs", [("scratch", 1), ("idea", 2), ("naive", 2), ("idea-kd", 5), ("adapt", 10)])
def test_cuts_compile_nothing(tmp_path, monkeypatch, plan, graphs):
    """One graph before the slice, one after it; where a teacher joins in between one more, and its own before and
    after. (adapt slices at each of 9 cuts; of one function the compiler keeps 8 graphs.)"""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile(module, backend=counter, fullgraph=True,
                                                                           **options))
    late = {"scratch": {}, "adapt": dict(cuts=9)}.get(plan, dict(slice_at=50))
    train_toy(tmp_path / "run", plan=plan, compile=True, **late)
    assert counter.frame_count == graphs
    assert all("_orig_mod" not in key for key in result(tmp_path / "run")[0])


def test_a_compiled_teacher_teaches_the_same_and_is_found_again(tmp_path, monkeypatch):
    compile, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(module) or compile(
        module, backend="aot_eager", **options))
    settings = dict(plan="idea-kd", drop_teacher=False, dtype="float64")
    train_toy(tmp_path / "run", **settings, compile=True, stage="prune")
    train_toy(tmp_path / "run", **settings, compile=True)                # goes on, with the teacher from its file
    taught = [module for module in compiled if not isinstance(module, torch.nn.Module)]
    assert len(taught) == 2 and all(method.__name__ == "hidden" for method in taught)
    train_toy(tmp_path / "eager", **settings)
    (ours, *_), (eager, *_) = (checkpoint.load(tmp_path / name) for name in ("run", "eager"))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(ours.parameters(), eager.parameters()))


def test_a_teacher_in_bfloat16_says_what_autocast_says():
    """On a GPU: the matrices that autocast casts are held so, the residual stream, norms and embedding stay float32."""
    torch.manual_seed(0)
    for tied in (True, False):
        config = models.GPTConfig(300, 64, 32, 8, (4, 2), (2, 2), (64, 40), tie_embeddings=tied, qkv_bias=True)
        given = models.GPT(config)
        teacher = copy.deepcopy(given)
        distill.halve_matrices(teacher)
        assert teacher.embed.weight.dtype == teacher.norm.weight.dtype == torch.float32
        assert teacher.blocks[0].attn.q.weight.dtype == torch.bfloat16
        x = torch.randint(300, (2, 64))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(teacher(x), given(x))


@pytest.mark.parametrize("plan", [name for name in schedule.PLANS if name not in ("kd", "recover", "adapt")])
def test_every_plan_ends_at_the_target(tmp_path, plan):
    setup, state = train_toy(tmp_path / "run", plan=plan)
    model, _ = checkpoint.load(tmp_path / "run")
    assert model.config == setup.target == models.preset("toy", 256)[0]
    losses = [e["val_loss"] for e in report.records(tmp_path / "run")["eval"]]
    assert losses[-1] < losses[0] - 1


def test_journey_prunes_between_a_quarter_and_three_quarters_of_the_credited_flops(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    setup, state = train_toy(tmp_path / "run", plan="journey", steps=200, cuts=10, batch_tokens=64)
    records = report.records(tmp_path / "run")
    total = records["summary"][0]["flops_credited"]
    spent = {0: 0, **{e["step"]: e["flops_credited"] for e in records["step"]}}
    first, last = next(span for stage, *span in setup.timeline.stages if stage.name == "prune")
    assert abs(spent[first] - total / 4) <= spent[1] and abs(spent[last] - total * 3 / 4) <= spent[1]
    assert [e["step"] for e in records["prune"]][::9] == [first, last - 1]


def test_executed_flops_exceed_credited_ones_by_dead_units_teacher_and_scoring(tmp_path):
    cases = (dict(), dict(slice_at=55), dict(plan="idea-kd", drop_teacher=False))
    early, late, taught = (train_toy(tmp_path / str(i), **settings)[1].flops for i, settings in enumerate(cases))
    setup, state = train_toy(tmp_path / "0")
    full, live = (c.flops_per_token(64) * 256 for c in (setup.start, setup.target))
    assert early["credited"] == late["credited"] == taught["credited"]
    assert late["executed"] - early["executed"] == pytest.approx((55 - 41) * (full - live))
    teaching = setup.start.flops_per_token(64, backward=False) * 256
    assert taught["executed"] - early["executed"] == pytest.approx(30 * teaching)
    scored = sum(schedule.score_at(step, setup.timeline, 5, 10) for step in range(60))
    sizes = [schedule.size_at(step, setup.timeline) for step in range(60)]
    widths = [train.allocate.widths_on_the_way(setup.start, setup.target, size, setup.start.widths()) for size in sizes]
    live_at = [setup.start.resized(each) for each in widths]
    assert early["credited"] == pytest.approx(sum(256 * config.flops_per_token(64) for config in live_at))
    assert early["executed"] == pytest.approx(41 * full + 19 * live + 3 * scored * setup.start.removable_params())


def test_teacher_is_dropped_when_overtaken_and_both_losses_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    train_toy(tmp_path / "run", plan="idea-kd", steps=200, prune_share=.1)
    records = report.records(tmp_path / "run")
    captured, dropped = records["teacher"]
    assert dropped["teacher_ce"] >= dropped["student_ce"] and dropped["step"] - captured["step"] >= 49
    for e in records["step"]:
        taught = captured["step"] < e["step"] <= dropped["step"] + 1
        assert (e["kl"] is not None and e["kl"] > 0 and e["teacher_ce"] > 0) if taught else e["kl"] is None
    train_toy(tmp_path / "kept", plan="idea-kd", steps=200, prune_share=.1, drop_teacher=False)
    assert report.records(tmp_path / "kept")["step"][-1]["kl"] > 0


def test_given_teacher_teaches_and_must_not_change(tmp_path, monkeypatch):
    train_toy(tmp_path / "teacher", plan="scratch", seed=5)
    teacher = str(max((tmp_path / "teacher").glob("ckpt*")))
    setup, state = train_toy(tmp_path / "run", plan="kd", teacher=teacher, drop_teacher=False)
    assert all(e["kl"] > 0 for e in report.records(tmp_path / "run")["step"])
    assert all(p.grad is None and not p.requires_grad for p in state.teacher.parameters())
    for late in (tmp_path / "run").glob("ckpt_*60.pt"):
        late.unlink()
    model, state = checkpoint.load(teacher)
    model.embed.weight.data += 1
    checkpoint.save(teacher, model, **state)
    with pytest.raises(UserError, match="has changed since the run began"):
        train_toy(tmp_path / "run", plan="kd", teacher=teacher, drop_teacher=False)
    with pytest.raises(UserError, match="context of 64 tokens, the student has 128"):
        train_toy(tmp_path / "long", plan="kd", preset="laptop", teacher=teacher)


@pytest.fixture
def given(tmp_path):
    """A Hugging Face folder of an uneven model with a context of 64, its tokenizer the bytes."""
    torch.manual_seed(3)
    model = models.GPT(models.GPTConfig(260, 64, 32, 8, n_head=(4, 0, 2), n_kv_head=(2, 0, 1), d_ff=(24, 40, 0)))
    (tmp_path / "given").mkdir()
    huggingface.save(tmp_path / "given", model, "nanoprune", open_tokenizer("bytes").as_files())
    return tmp_path / "given", model


def test_init_starts_with_these_weights_and_ends_at_its_widths_divided(tmp_path, given):
    folder, model = given
    settings = dict(init=str(folder), preset="laptop", block_size=32, enlarge_ff=2, save_every=100)
    setup, _ = train_toy(tmp_path / "run", stage="enlarge", **settings)
    first, about = checkpoint.load(tmp_path / "run" / "ckpt_00000000.pt")
    # The windows are shorter than the model's context, which it keeps.
    assert setup.block_size == 32 and first.config.block_size == model.config.block_size == 64
    assert about["tokenizer_files"].keys() >= {"tokenizer.json"}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), model.parameters()))
    setup, state = train_toy(tmp_path / "run", **settings)
    last, about = checkpoint.load(tmp_path / "run")
    assert (last.config.n_head, last.config.n_kv_head, last.config.d_ff) == ((2, 0, 2), (1, 0, 1), (16, 16, 0))
    assert setup.target == last.config
    assert checkpoint.tokenizer_of(model, about, "run").encode("añ").tolist() == [*"añ".encode()]
    losses = [e["val_loss"] for e in report.records(tmp_path / "run")["eval"]]
    assert losses[-1] < losses[0] - 1
    config = json.loads((folder / "config.json").read_text())                  # the folder comes to hold another model
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": [16, 40, 0]}))
    with pytest.raises(UserError, match="holds a run of another configuration .*start is"):
        train_toy(tmp_path / "run", **settings)


def test_init_without_pruning_trains_on_and_a_run_is_a_teacher_for_it(tmp_path, given):
    folder, model = given
    settings = dict(init=str(folder), preset="laptop", block_size=32)
    setup, state = train_toy(tmp_path / "more", plan="scratch", **settings)
    assert setup.target == setup.start == state.model.config and setup.start.d_ff == model.config.d_ff
    settings |= dict(teacher=str(tmp_path / "more"), drop_teacher=False)
    setup, state = train_toy(tmp_path / "taught", plan="kd", **settings)
    assert state.teacher is not None
    # A teacher needs a context as long as the windows, and not as long as the student's.
    short = models.GPT(dataclasses.replace(model.config, block_size=32))
    huggingface.save(tmp_path / "short", short, "nanoprune", open_tokenizer("bytes").as_files())
    settings["teacher"] = str(tmp_path / "short")
    setup, state = train_toy(tmp_path / "by short", plan="kd", steps=2, **settings)
    assert state.teacher.config.block_size == 32 and state.model.config.block_size == 64


def test_plan_recover_needs_no_other_setting(tmp_path, given, capsys, monkeypatch):
    """Each length of context has a batch of whole micro-batches; the printed speed and epochs are not zero."""
    folder, model = given
    command = dict(init=str(folder), teacher=str(folder), plan="recover", out=str(tmp_path / "run"))
    monkeypatch.setitem(train.USUAL_WITH_INIT, "steps", 12)
    monkeypatch.setattr(train, "INIT_MICRO_TOKENS", 128)
    monkeypatch.setitem(train.USUAL, "batch_tokens", 256)
    setup, state = train.main(train.Train(**command))
    printed = capsys.readouterr()
    config = report.records(tmp_path / "run")["config"][0]
    expected = dict(block_size=None, micro_batch=2, batch_tokens=256, lr=train.RECOVER_LR,
                    min_lr=train.RECOVER_LR / 10, eval_growth=2)
    assert {name: config[name] for name in expected} == expected
    assert state.teacher is not None and [r["step"] for r in report.records(tmp_path / "run")["eval"]] == [0, 12]
    assert re.search(r"^100%.*\| 12/12 .*tok/s", printed.err, re.M) and "\r" not in printed.err
    assert re.search(r" 0\.00\d+ epochs", printed.out)
    assert train.resolve(train.Train(plan="recover", init="x", eval_every=5), "cpu").eval_growth == 1


@pytest.mark.parametrize("context, given, expected", [
    (8192, {}, (512, 4, 4096)), (8192, dict(block_size=8192), (8192, 1, 8192)), (300, {}, (None, 4, 3600)),
    (64, {}, (None, 16, 4096)), (513, dict(batch_tokens=3072), (512, 2, 3072)),
    (512, dict(micro_batch=3), (None, 3, 4608)),
    (512, dict(batch_tokens=1000), (None, 1, 1000))])         # `check_batch` says what does not fit
def test_batch_of_a_given_model(context, given, expected):
    config = train.resolve(train.Train(init="x", **given), "cpu")
    fitted = train.fit_to(config, context)
    assert (fitted.block_size, fitted.micro_batch, fitted.batch_tokens) == expected


def test_init_refuses_what_does_not_fit(tmp_path, given):
    for settings, sentence in ((dict(preset="toy"), "--preset toy has no effect with --init"),
                               (dict(preset="laptop", block_size=65), "context of 64 tokens, not 65"),
                               (dict(preset="laptop", enlarge_kv=.5), "at least 1"),
                               (dict(preset="laptop", enlarge_ff=1, enlarge_kv=1), "--enlarge-ff above 1")):
        with pytest.raises(UserError, match=sentence):
            train_toy(tmp_path / "run", init=str(given[0]), **settings)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no checkpoint at"):
        train_toy(tmp_path / "run", init=str(tmp_path / "nothing"), preset="laptop")


def test_adapt_meets_the_budget_at_every_cut_with_uneven_layers(tmp_path):
    setup, state = train_toy(tmp_path / "run", plan="adapt")
    records, whole = report.records(tmp_path / "run"), setup.start.removable_params()
    config, neuron = records["config"][0], setup.start.unit_params(0, "ffn")
    assert (config["cuts"], config["shape"], config["calibration_windows"]) == (4, "wsd", 4)
    assert [e["step"] for e in records["prune"]] == [e["step"] for e in records["slice"]] == [30, 33, 39, 48]
    shapes = [setup.start]
    for event, (_, size) in zip(records["prune"], setup.timeline.events):
        widths = {(layer, kind): n for kind, key in (("ffn", "d_ff"), ("kv", "n_kv_head"))
                  for layer, n in enumerate(event[key])}
        shapes.append(setup.start.resized(widths))
        assert 0 <= round(size * whole - shapes[-1].removable_params(), 6) < neuron + 1 and event["size"] == size
        assert all(0 < n <= shapes[-2].widths()[key] for key, n in widths.items())
    lost = [[a - b for a, b in zip(before.d_ff, after.d_ff)] for before, after in zip(shapes, shapes[1:4])]
    assert max(map(max, lost)) > 40 and all(max(n) - min(n) <= 1 for n in zip(*lost))   # shares are of the first width
    last = checkpoint.load(tmp_path / "run")[0].config
    assert last == shapes[-1] == state.model.config and len({*last.d_ff}) > 1
    assert 0 <= setup.target.removable_params() - last.removable_params() < neuron
    spent = [(a, b, config.flops_per_token(64) * 256) for a, b, config in zip((0, 30, 33, 39, 48), (30, 33, 39, 48, 60),
                                                                             shapes)]
    credited = sum((b - a) * flops for a, b, flops in spent)             # no dead units; 4 windows of 64 at every cut
    calibrated = sum(flops for _, _, flops in spent[:4])
    assert state.flops == pytest.approx({"executed": credited + calibrated, "credited": credited})
    losses = [e["val_loss"] for e in records["eval"]]
    assert losses[-1] < losses[0] - 1


def test_adapt_measures_other_windows_at_every_cut_and_for_every_seed(tmp_path, monkeypatch):
    seen, batches = [], train.score.batches
    monkeypatch.setattr(train.score, "batches", lambda *args: seen.append(batches(*args)) or seen[-1])
    for seed in (0, 1):
        train_toy(tmp_path / str(seed), plan="adapt", seed=seed, stage="prune")
    at_cuts = [torch.cat([x for x, _ in found]) for found in seen[1:5] + seen[6:]]          # [0] and [5]: the check
    assert len(at_cuts) == 8 and all(len(a) == 4 for a in at_cuts)
    assert all(not torch.equal(a, b) for i, a in enumerate(at_cuts) for b in at_cuts[:i])


@pytest.mark.parametrize("forget, updates", [(False, 49), (True, 1)])
def test_moments_outlive_the_cuts_of_adapt_unless_they_shall_not(tmp_path, forget, updates):
    # one step past the last cut
    setup, state = train_toy(tmp_path / "run", plan="adapt", stage="prune", forget_moments=forget)
    assert state.step == 49 and len(state.optimizer.state) == len([*state.model.parameters()])
    for p, moments in state.optimizer.state.items():
        assert moments["step"] == updates and moments["exp_avg"].shape == p.shape and moments["exp_avg_sq"].any()


def test_adapt_cuts_a_given_model_from_the_first_step_on(tmp_path, given):
    folder, model = given
    settings = dict(plan="adapt", init=str(folder), preset="laptop", block_size=32, enlarge_ff=2, enlarge_kv=1.,
                    cuts=None, save_every=100)
    with pytest.raises(UserError, match="plan 'adapt' has no stage 'enlarge'"):
        train_toy(tmp_path / "run", stage="enlarge", **settings)
    setup, state = train_toy(tmp_path / "run", **settings)
    cuts = report.records(tmp_path / "run")["prune"]
    assert (setup.config.enlarge_share, len(cuts), cuts[0]["step"]) == (0, 6, 0)                # 28.6 % go
    short = setup.target.removable_params() - state.model.config.removable_params()
    assert 0 <= short < setup.start.unit_params(0, "kv")                # the last cut took a group; none grow


def test_adapt_refuses_a_calibration_text_that_is_too_short(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_text("x = 1\n" * 12)
    with pytest.raises(UserError, match="64 windows of 64 need 4,097"):
        train_toy(tmp_path / "run", plan="adapt", data=str(tmp_path / "corpus"), calibration_windows=64, preset="toy")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["activation", "flap", "random"])
def test_a_named_score_is_measured_at_every_cut_and_cuts_what_it_says(tmp_path, monkeypatch, name):
    """Computed again here from the model as it was; of units that are dead already none comes back. Its FLOPs."""
    before, zero_ = [], train.prune.zero_

    def spy(model, optimizer, keep):
        before.append((copy.deepcopy(model), state.step, {key: i.clone() for key, i in state.alive.items()}, keep))
        return zero_(model, optimizer, keep)

    settings = dict(score=name, score_window=100, slice_at=45, **(dict(calibration_windows=4) if name != "random"
                                                                  else {}))
    setup, state = train.prepare(train.Train(**toy(**settings), out=str(tmp_path / "run")))
    with monkeypatch.context() as patch:
        patch.setattr(train, "prepare", lambda _: (setup, state))
        patch.setattr(train.prune, "zero_", spy)
        train.main(setup.config, quiet=True)
    criterion = train.score.SCORES[name]
    assert len(before) == 4
    for model, step, was, keep in before:
        batches = train.score.batches(setup.corpus.train, 64, 4, 1, (0, step))
        stats = train.score.collect(model, batches, criterion.needs)
        stats.seed = step
        for key, worth in criterion.function(model, stats).items():
            worth = [worth[i].item() if i in was[key] else -math.inf for i in range(len(worth))]
            best = sorted(range(len(worth)), key=lambda i: (-worth[i], i))[:len(keep[key])]
            assert sorted(best) == keep[key].tolist()
    train_toy(tmp_path / "plain", slice_at=45)
    plain = report.records(tmp_path / "plain")["summary"][0]["flops_executed"]
    scored = sum(schedule.score_at(step, setup.timeline, 5, 10) for step in range(60))
    scored *= 3 * setup.start.removable_params()
    calibrated = 0 if name == "random" else 4 * 4 * 64 * setup.start.flops_per_token(64, backward=False)
    assert state.flops["executed"] == pytest.approx(plain - scored + calibrated)


def test_naive_restarts_the_learning_rate_and_adam(tmp_path):
    setup, state = train_toy(tmp_path / "run", plan="naive", stage="prune")
    assert all(moments["step"] == 1 for moments in state.optimizer.state.values())        # one step since the restart
    lrs = [e["lr"] for e in report.records(train_toy(tmp_path / "run", plan="naive")[0].folder.path)["step"]]
    assert lrs[2] == pytest.approx(1e-3) and lrs[-1] == pytest.approx(1e-3) and max(lrs[3:]) > 5e-3


def test_a_run_records_the_commit_of_its_code(tmp_path):
    setup, _ = train_toy(tmp_path / "run", plan="scratch", stage="all", steps=20)
    config = report.records(tmp_path / "run")["config"][0]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert config["code"] in (head[:12], f"{head[:12]}-modified")
    assert config["corpus_tokens"] == [len(setup.corpus.train), len(setup.corpus.val)]


@pytest.mark.parametrize("device, preset, fast, given, chosen", [
    ("cpu", "laptop", True, "auto", "bfloat16"), ("cpu", "laptop", False, "auto", "float32"),
    ("cpu", "toy", True, "auto", "float32"), ("cpu", "laptop", True, "float32", "float32"),
    ("cpu", "toy", False, "bfloat16", "bfloat16"), ("cuda:0", "toy", True, "auto", "bfloat16"),
    ("cuda:0", "124m", False, "auto", "float32")])
def test_the_dtype_is_chosen_by_size_and_hardware(monkeypatch, device, preset, fast, given, chosen):
    monkeypatch.setattr(train, "has_fast_bfloat16", lambda device: fast)
    target, _ = models.preset(preset, 256)
    assert train.dtype_for(train.Train(dtype=given), target, device) == chosen


@pytest.mark.parametrize("avx, amx, fast", [(False, False, False), (True, False, True), (False, True, True)])
def test_bfloat16_is_fast_where_the_hardware_multiplies_it(monkeypatch, avx, amx, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    # Older GPUs imitate it, and PyTorch calls that supported unless it is asked.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or avx)
    assert common.has_fast_bfloat16("cpu") is fast
    assert common.has_fast_bfloat16("cuda:0") is avx
    assert not common.has_fast_bfloat16("mps")


def test_a_run_begins_with_what_was_chosen_and_resumes_with_it(tmp_path, monkeypatch, capsys):
    settings = toy("scratch", preset="laptop", steps=4, batch_tokens=128, eval_windows=1)
    monkeypatch.setattr(train, "has_fast_bfloat16", lambda device: True)
    run = train.Train(**settings, out=str(tmp_path / "a"))
    train.main(run)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (f"{tmp_path / 'a'}: 213,568 parameters on a CPU with {torch.get_num_threads()} threads and fast "
                     "bfloat16; trained in bfloat16, not compiled")
    assert report.records(tmp_path / "a")["config"][0]["dtype"] == "bfloat16"
    # On a machine that would choose another one the run is refused, and not mixed.
    monkeypatch.setattr(train, "has_fast_bfloat16", lambda device: False)
    with pytest.raises(UserError, match="dtype"):
        train.main(run, quiet=True)


def test_code_that_changed_on_the_way_is_told(tmp_path, monkeypatch):
    train_toy(tmp_path / "run", stage="enlarge")
    monkeypatch.setattr(checkpoint, "commit", lambda: "another")
    train_toy(tmp_path / "run")
    assert report.records(tmp_path / "run")["config"][0]["code"] == f"{common.commit()}+another"


def test_non_finite_loss_stops_before_the_update(tmp_path):
    with pytest.raises(UserError, match="not applied; lower --lr"):
        train_toy(tmp_path / "run", plan="scratch", lr=1e20, min_lr=1e20, clip=1e30, weight_decay=0., save_every=1)
    model, _ = checkpoint.load(tmp_path / "run")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def refused_at(out, monkeypatch, number, stay):
    """A run whose step `number` is not finite, and that leaves so many steps unread, as on a GPU: -> its State, and
    what it said."""
    monkeypatch.setitem(train.STAY_UNREAD, "cpu", stay)
    agree = train.agree
    setup, state = train.prepare(train.Train(**toy("scratch", save_every=4), out=str(out)))
    monkeypatch.setattr(train, "agree", lambda *args: agree(*args) * (math.inf if state.step == number else 1))
    monkeypatch.setattr(train, "prepare", lambda _: (setup, state))
    with pytest.raises(train.NotFinite) as refusal:
        train.main(setup.config, quiet=True)
    return state, str(refusal.value)


def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        state, sentence = refused_at(tmp_path / "run", patch, number=6, stay=0)
    assert sentence.startswith("step 6: loss inf") and sentence.endswith("ckpt_00000004.pt")
    setup, unharmed = train.prepare(train.Train(**toy("scratch", save_every=4), out=str(tmp_path / "another")))
    setup.folder.rewind(0)
    train.train(setup, unharmed, 6)
    assert same(state.model.state_dict(), unharmed.model.state_dict())
    for p, q in zip(state.model.parameters(), unharmed.model.parameters()):
        assert same(state.optimizer.state[p], unharmed.optimizer.state[q])


def test_a_gpu_refuses_one_step_late_and_saves_no_such_step(tmp_path, monkeypatch):
    state, sentence = refused_at(tmp_path / "run", monkeypatch, number=5, stay=1)
    assert sentence.startswith("step 5: loss inf") and sentence.endswith("ckpt_00000004.pt") and state.step == 7
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


@pytest.mark.parametrize("number", [7, 9])
def test_before_a_checkpoint_or_a_record_a_gpu_refuses_at_once(tmp_path, monkeypatch, number):
    state, sentence = refused_at(tmp_path / "run", monkeypatch, number, stay=1)
    assert sentence.startswith(f"step {number}: loss inf") and state.step == number + 1


@pytest.mark.parametrize("settings", [dict(plan="idea"), dict(plan="idea-kd", drop_teacher=False), dict(plan="adapt")])
def test_numbers_that_are_read_late_are_the_same(tmp_path, monkeypatch, settings):
    train_toy(tmp_path / "at once", **settings)
    monkeypatch.setitem(train.STAY_UNREAD, "cpu", 1)
    train_toy(tmp_path / "late", **settings, stage="prune")
    train_toy(tmp_path / "late", **settings)
    assert same(result(tmp_path / "late"), result(tmp_path / "at once"))


def test_a_signal_that_is_read_late_stops_the_run_a_step_later_with_all_its_records(tmp_path, monkeypatch):
    monkeypatch.setitem(train.STAY_UNREAD, "cpu", 1)
    setup, state = train.prepare(train.Train(**toy("scratch", save_every=100), out=str(tmp_path / "run")))
    monkeypatch.setattr(train, "prepare", lambda _: (setup, state))
    count = train.count_flops

    def signalled(*args):
        if state.step == 13:
            setup.signals.append(signal.SIGTERM)
        count(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "count_flops", signalled)
        train.main(setup.config, quiet=True)
    # Step 14 is the first that could tell of the signal, and is read when step 15 is queued.
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 16 and state.window["steps"] == 6


def test_the_parts_of_a_run_add_up_to_its_wall_time(tmp_path):
    setup, state = train.prepare(train.Train(**toy("idea"), out=str(tmp_path / "run")))
    setup.folder.rewind(0)
    start = time.perf_counter()
    train.train(setup, state, 60)
    spent = time.perf_counter() - start
    assert 0.95 * spent < sum(state.seconds.values()) <= spent
    assert all(state.seconds[part] > 0 for part in checkpoint.PARTS)
    records = report.records(tmp_path / "run")["step"]
    assert sum(10 * 256 / record["tokens_per_second"] for record in records) == pytest.approx(state.seconds["train"],
                                                                                              rel=0.05)


REFUSED = {
    "unknown plan": (dict(plan="ideal"), "'ideal' is not one of scratch, naive"),
    "unknown preset": (dict(preset="huge"), "'huge' is not one of toy"),
    "target larger than the enlarged": (dict(enlarge_ff=.5), "larger than the enlarged model"),
    "not a number": (dict(enlarge_ff=float("nan")), "must be finite"),
    "nothing to prune": (dict(enlarge_ff=1, enlarge_kv=1), "--enlarge-ff above 1"),
    "rounds to nothing": (dict(enlarge_kv=1.2), "--enlarge-kv 1.2 of 2 units rounds to 2"),
    "batch": (dict(batch_tokens=1000), "1000 is not a multiple of 1 sequences x 64 tokens x 1 processes = 64; try"),
    "too many cuts": (dict(cuts=30), "30 cuts need at least 30 steps"),
    "slice before the last cut": (dict(slice_at=31), "--slice-at 31 is outside of"),
    "stage": (dict(plan="scratch", stage="prune"), "no stage 'prune'"),
    "law without cuts": (dict(plan="scratch", size_curve="cubic"), "--size-curve has no effect in plan 'scratch'"),
    "cuts without cuts": (dict(plan="scratch", cuts=7), "--cuts has no effect in plan 'scratch'; leave"),
    "cuts of one cut": (dict(plan="oneshot", cuts=7), "--cuts has no effect in plan 'oneshot' with one cut"),
    "one cut by law": (dict(size_curve="oneshot"), "--cuts has no effect in plan 'idea' with one cut"),
    "law in adapt": (dict(plan="adapt", size_curve="cubic"), "--size-curve has no effect in plan 'adapt', which"),
    "slicing late in adapt": (dict(plan="adapt", slice_at=55), "--slice-at has no effect in plan 'adapt', which"),
    "scores in adapt": (dict(plan="adapt", score_every=3), "--score-every has no effect in plan 'adapt'"),
    "PLATON in adapt": (dict(plan="adapt", uncertainty=True), "--uncertainty has no effect in plan 'adapt'"),
    "teacher in adapt": (dict(plan="adapt", teacher="x.pt"), "--teacher has no effect in plan 'adapt'"),
    "cuts that do not fit": (dict(plan="adapt", cuts=15), "15 cuts.*do not fit into 30 steps, 120 are enough"),
    "part of a batch": (dict(plan="adapt", micro_batch=2, calibration_windows=3), "windows 3 is no multiple of --mic"),
    "no calibration": (dict(plan="adapt", calibration_windows=0), "--calibration-windows 0 must be positive"),
    "another score": (dict(score="best"), "--score 'best' is not one of sensitivity, taylor"),
    "score without cuts": (dict(plan="scratch", score="flap"), "--score has no effect in plan 'scratch'"),
    "average of a measured score": (dict(score="flap"), "score-window has no effect in plan 'idea' with --score flap"),
    "calibration of a coin": (dict(score="random", score_window=100, calibration_windows=4),
                              "--calibration-windows has no effect in plan 'idea' with --score random"),
    "no second cycle": (dict(rewarm=False), "--rewarm has no effect in plan 'idea'"),
    "calibration outside adapt": (dict(calibration_windows=8), "--calibration-windows has no effect in plan 'idea'"),
    "forgetting outside adapt": (dict(plan="naive", forget_moments=True), "--forget-moments has no effect in plan"),
    "another shape": (dict(shape="step"), "--shape 'step' is not one of cosine, wsd"),
    "enlarging what is not enlarged": (dict(plan="scratch", enlarge_ff=2.), "--enlarge-ff has no effect"),
    "distillation without teacher": (dict(kd_weight=.9), "--kd-weight has no effect in plan 'idea'"),
    "one score before the first cut": (dict(uncertainty=True, cuts=5, score_every=100, score_window=200),
                                       "needs two scores before the first cut, at step 30, and there are 1"),
    "far too wide": (dict(enlarge_ff=1e12), "--enlarge-ff 1e.12 of 64 units are 64,000,000,000,000, and at most"),
    "far too many heads": (dict(enlarge_kv=1e12), "--enlarge-kv 1e.12 of 2 units are 2,000,000,000,000"),
    "infinite": (dict(lr=math.inf), "--lr inf must be positive and finite"),
    "one uncertain score": (dict(uncertainty=True, score_window=5), "needs two scores before the first cut"),
    "teacher without use": (dict(teacher="x.pt"), "--teacher has no effect in plan 'idea'"),
    "teacher missing": (dict(plan="kd"), "needs --teacher"),
    "nothing to train back": (dict(plan="recover", teacher="x.pt"), "needs both --init CUT and --teacher MODEL"),
    "teacher not there": (dict(plan="kd", teacher="x.pt"), "no checkpoint at x.pt"),
    "negative": (dict(lr=-1.), "--lr -1.0 must be positive"),
    "seed": (dict(seed=2**64), "--seed 18446744073709551616 must be between"),
    "another dtype": (dict(dtype="float16"), "'float16' is not one of auto, float32"),
    "zero steps": (dict(steps=0), "--steps 0 must be positive"),
    "minimum above maximum": (dict(min_lr=1.), "--min-lr 1.0 must be between 0 and 0.01"),
    "missing corpus": (dict(data="nowhere/*.txt"), "nowhere"),
    "unknown tokenizer": (dict(tokenizer="words"), "no tokenizer 'words'"),
    "device": (dict(device="cuda:7"), "'cuda:7' is not available here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence_and_writes_nothing(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    settings, words = REFUSED[case]
    with pytest.raises(UserError, match=words) as refusal:
        train_toy(tmp_path / "run", **settings)
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "x = 1\n"])
def test_empty_and_one_line_corpora_are_refused(tmp_path, text):
    (tmp_path / "corpus.txt").write_text(text)
    with pytest.raises(UserError, match="give"):
        train_toy(tmp_path / "run", data=str(tmp_path / "corpus.txt"))
    assert not (tmp_path / "run").exists()


def test_run_of_another_configuration_is_refused_and_left_alone(tmp_path):
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="lr is 0.01 there and 0.02 here.*another --out"):
        train_toy(tmp_path / "run", plan="scratch", steps=10, lr=.02)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_a_run_from_before_a_setting_existed_is_the_same_run(tmp_path):
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    newest = max((tmp_path / "run").glob("ckpt*"))
    model, about = checkpoint.load(newest)
    del about["run"]["eval_growth"]
    checkpoint.save(newest, model, **about)
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    with pytest.raises(UserError, match="eval_growth is 1.0 there and 2 here"):
        train_toy(tmp_path / "run", plan="scratch", steps=10, eval_growth=2)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("room", [7, 8])     # metrics.jsonl when the run begins; then metrics and checkpoint, each time
def test_full_disk_ends_with_a_sentence_and_the_last_checkpoint_stays(tmp_path, monkeypatch, capsys, background, room):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint, "saves_in_background", lambda model: background)
    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: train_toy(tmp_path / "run", plan="scratch"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left on device" in error and len(error.splitlines()) == 1
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 14
    assert [file.name for file in (tmp_path / "run").glob(".*")] == [".lock"]


def test_command_line_says_one_sentence_and_exits_with_2(tmp_path):
    (tmp_path / "file").write_text("")
    for out, words in ((tmp_path / "file" / "run", "Not a directory"), ("/proc/run", "check the path")):
        process = start(plan="scratch", out=out)
        _, errors = process.communicate()
        assert process.returncode == 2 and words in errors and "Traceback" not in errors


def test_help_and_a_misspelled_flag_are_answered_in_the_file_s_own_words():
    for words, code, answer in ((["--help"], 0, train.__doc__.splitlines()[0]),
                                (["--stpes", "9"], 2, "error: Unrecognized options: --stpes")):
        done = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True)
        assert done.returncode == code and answer in done.stdout + done.stderr
        assert code == 0 or len(done.stderr.splitlines()) == 1


def test_a_model_of_the_hub_is_known_by_its_id(tmp_path, given, monkeypatch):
    monkeypatch.setattr(checkpoint, "find", lambda path: given[0])
    assert checkpoint.load("organisation/model")[1]["origin"]["name"] == "organisation/model"


def test_a_teacher_knows_where_its_model_came_from(tmp_path):
    came_from = {**origin.NOTHING, "name": "organisation/model", "license": "mit"}
    folder = checkpoint.RunFolder(tmp_path, {"tokenizer": "bytes"}, {}, 1, {}, writes=True, origin=came_from)
    path = folder.save_teacher(models.GPT(models.preset("toy", 256)[0]), 3)
    assert checkpoint.load(path)[1]["origin"] == came_from


def test_keeps_the_last_two_checkpoints_and_the_teacher(tmp_path):
    train_toy(tmp_path / "run", plan="idea-kd")
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [".lock", "ckpt_00000056.pt", "ckpt_00000060.pt", "metrics.jsonl", "run.png", "teacher.pt"]


def test_records_are_as_documented(tmp_path):
    documented = (ROOT / "docs" / "records.md").read_text()
    train_toy(tmp_path / "run", plan="idea-kd")
    for record in read_records(tmp_path / "run" / "metrics.jsonl"):
        for key in ("tag", "step", "tokens"):
            assert key in record
        if record["tag"] != "config":
            for key in record:
                assert key in ("tag", "step", "tokens", "plan", "preset", "seed") or f"`{key}`" in documented, key
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["tag"] == "summary"
    assert checkpoint.provenance()["torch"] == torch.__version__

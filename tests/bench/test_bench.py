"""bench/__main__.py measures what it says: train.loop itself, in turns, with the model's own FLOPs, bytes and parameters. No
test asserts a time."""
import contextlib
import copy
import dataclasses
import json
import os
import statistics
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from steps import make_optimizer

import checkpoint
import data
import distill
import schedule
import score
import train
from bench import __main__ as bench
from bench import gpt2_peer, inference, system, timing, training
from common import UserError, parse, read_records
from model import GPT, GPTConfig

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
UNEVEN = GPTConfig(256, 64, 96, 16, (6, 4, 0), (2, 4, 0), (128, 200, 60))


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    """Limits of toy size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROWS", {"cpu": 512})
        patch.setattr(timing, "MEGABYTES", {"cpu": 1})
        yield


def settings(suite, **given):
    """Resolved settings of a suite at toy size."""
    toy = dict(presets=("toy",), vocab=(300,), rounds=1, steps=2, micro_batch=2, micro_steps=2)
    uses = bench.SUITES[suite]
    return bench.resolve(bench.Bench(suite, **{k: v for k, v in {**toy, **given}.items() if k in uses}))


def record(suite, cell, measured):
    """What `measured` says, through the file."""
    return json.loads(json.dumps({"suite": suite, "cell": cell, **measured}))


def by(rows, *columns):
    return {tuple(row.get(c) for c in columns) if len(columns) > 1 else row[columns[0]]: row for row in rows}


# -- how it measures

def test_variants_are_called_in_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = timing.interleave({name: lambda name=name: calls.append(name) for name in "AB"}, 3)
    assert "".join(calls) == "AB" * 4
    assert {name: len(found) for name, found in seconds.items()} == {"A": 3, "B": 3}


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    assert timing.median_ratio([1, 10, 100], [2, 10, 50]) == 1.0 and timing.median_ratio([6, 30], [2, 10]) == 3.0
    assert timing.median_ratio([1, 9, 1], [1, 3, 4]) == 1.0              # no ratio of medians, which would be 1/3


def test_seconds_and_parts_are_the_clock_s(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    work = SimpleNamespace(wait=lambda n: setattr(clock, "now", clock.now + n) or n, rest=lambda: None)
    before = work.wait
    assert timing.seconds_of(lambda: work.wait(7)) == 7
    with timing.stopwatch("cpu", (work, "wait", "waiting"), (work, "rest", "resting")) as parts:
        assert work.wait(3) == 3
        work.wait(2)
    work.wait(50)
    assert parts == {"waiting": 5.0, "resting": 0.0} and work.wait is before
    assert timing.interleave({"A": lambda: work.wait(2), "B": lambda: work.wait(5)}, 2) == {"A": [2, 2], "B": [5, 5]}


def test_limits_do_the_work_that_they_count():
    from torch.utils.flop_counter import FlopCounterMode
    call, flops = timing.matmul(torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == flops == 2 * 512**3
    moves = timing.traffic("cpu")
    for name, (call, size) in moves.items():
        assert {"copy": 2, "read": 1}[name] * 2**20 == size
        call()


@needs_proc
def test_memory_is_that_of_the_block():
    with timing.peak("cpu") as found:
        block = torch.ones(2**23)                                            # 32 MB
    assert found["peak_bytes"] - found["before_bytes"] >= 2**25 * .9 and block.sum() == 2**23
    kept = timing.resident("VmRSS")
    assert 2**20 < kept < 2**38


def test_finished_cells_are_skipped_and_other_settings_and_other_code_are_not(tmp_path, capsys):
    records, calls = timing.Records(tmp_path / "new" / "records.jsonl"), []
    measure = lambda: calls.append(1) or {"rows": [{"x": len(calls)}], "note": "; as it is"}
    about = {"settings": {"rounds": 2, "disk": (1, 8)}, "machine": {"device": "d", "threads": 1}, "code": "c0de"}
    assert records.cell("train", "toy", about, measure) and records.cell("train", "toy", about, measure)
    assert "in " in capsys.readouterr().out and len(calls) == 1
    others = [{**about, **other} for other in ({"settings": {"rounds": 3}}, {"code": "1e55"},
                                               {"machine": {"device": "d", "threads": 2}})]
    assert all(records.cell("train", "toy", a, measure) for a in others) and records.cell("kd", "toy", about, measure)
    assert len(calls) == len(records.all()) == 5
    text = timing.tables(records.all())
    assert text.count("**train**") == 4 and "medians of 2 rounds" in text and "| 5 |" in text
    assert "threads 1, code c0de; as it is):" in text and "code 1e55" in text


def test_a_cell_that_fails_is_told_in_one_line_and_tried_again(tmp_path, monkeypatch, capsys):
    broken = [True]

    def fails():
        if broken[0]:
            raise torch.OutOfMemoryError("no room\nfor 8 GB")
        return {"rows": [{"x": "well"}]}

    monkeypatch.setattr(bench, "cells", lambda c: [("a", fails), ("b", lambda: {"rows": [{"x": "b's"}]})])
    command = bench.Bench("scale", out=str(tmp_path / "records.jsonl"))
    with pytest.raises(SystemExit) as ended:
        bench.main(command)
    text = capsys.readouterr().out
    assert ended.value.code == 1 and text.count("OutOfMemoryError: no room") == 2 and "for 8 GB" not in text
    assert "**scale, failed, the same command tries again**" in text and "b's" in text
    broken[0] = False
    bench.main(command)
    text = capsys.readouterr().out
    assert "scale, b: in " in text and "well" in text and "failed" not in text
    assert len(read_records(tmp_path / "records.jsonl")) == 3


def test_time_ends_a_suite_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    slow, done, swallowed = [True], [], []

    def cell(name):
        def measure():
            while slow[0] and name == "b":
                try:
                    time.sleep(.01)
                except BaseException:                                        # as a compiler might
                    if swallowed:
                        raise
                    swallowed.append(1)
            done.append(name)
            return {"rows": [{"cell": name}]}
        return name, measure

    monkeypatch.setattr(bench, "cells", lambda c: [cell(name) for name in "abc"])
    monkeypatch.setattr(bench, "AGAIN", .05)
    command = bench.Bench("gpu", out=str(tmp_path / "records.jsonl"), device="cpu", minutes=.01)
    bench.main(command)
    assert done == ["a"] and swallowed and "the same command goes on" in capsys.readouterr().out
    slow[0] = False
    bench.main(dataclasses.replace(command, minutes=8.0))                    # minutes are no part of what is measured
    assert done == ["a", "b", "c"] and "gpu, a: in " in capsys.readouterr().out


# -- what it times is the loop

def test_the_timed_steps_are_those_of_a_plain_loop():
    c = settings("train", steps=3)
    target = training.shapes("toy", 300, 2.6)[0]
    r = training.stage_run(c, "recover", target, None, 2)
    torch.manual_seed(0)
    model = GPT(target)
    plain = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.dim() == n], "weight_decay": w}
                               for n, w in ((2, .1), (1, 0))], betas=(.9, .95), eps=1e-8)
    for step in range(4):
        for micro in range(2):
            x, y = data.batch(r.corpus.train, 64, 0, step, micro, micro_batch=2, micro_steps=2)
            (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in plain.param_groups:
            group["lr"] = schedule.lr_at(step, r.timeline, 1e-4, 1e-5)
        plain.step()
        plain.zero_grad()
    r.go(3)
    parts = r.breakdown(1)                                                   # taken apart, it is the same step
    assert r.state.step == 4 and {*parts} == {*training.PARTS, "whole"}
    for a, b in zip(r.state.model.parameters(), model.parameters()):
        assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("steps, rounds, scores", [(5, 3, 1), (2, 2, 1), (15, 2, 3)])
def test_a_round_in_the_prune_stage_has_one_cut_and_its_scores(monkeypatch, steps, rounds, scores):
    c = settings("cuts", steps=steps, micro_steps=1)
    target, enlarged = training.shapes("toy", 300, 2.6)
    r = training.stage_run(c, "prune", target, enlarged, rounds)
    seen, cut, sensitivity = [], r.cut, score.sensitivity
    monkeypatch.setattr(r, "cut", lambda size: seen.append("cut") or cut(size))
    monkeypatch.setattr(score, "sensitivity", lambda model: seen.append("score") or sensitivity(model))
    for _ in range(rounds):
        r.go(steps)
    assert seen == (["score"] * scores + ["cut"]) * rounds and r.scores(steps) == scores
    assert r.live() == target and r.state.model.config == enlarged
    _, first = training.slice_pause(r)
    assert r.state.model.config == target and first > 0


def test_the_slice_compiles_with_an_empty_cache(monkeypatch):
    """Else the graph of the same shapes that another run compiled would be taken from the disk."""
    from torch._inductor import utils
    seen = []

    @contextlib.contextmanager
    def fresh():
        seen.append("begin")
        yield
        seen.append("end")

    monkeypatch.setattr(utils, "fresh_cache", fresh, raising=False)
    go = lambda steps: seen.append(steps)
    for compiled in (False, True):
        training.slice_pause(SimpleNamespace(
            state=SimpleNamespace(seconds={"slice": 0.0}), device="cpu", go=go, slice=lambda: seen.append("slice"),
            config=SimpleNamespace(compile=compiled)))
    assert seen == ["slice", 1, "begin", "slice", 1, "end"]


def test_one_choice_of_batch_and_steps_for_all_of_a_cell():
    chosen = lambda suite, *shape, **given: training.fitted(bench.resolve(bench.Bench(suite, **given)), *shape)[0]
    for suite, shape, expected in (("train", ("laptop", 256), (16, 15)), ("train", ("laptop", 50257), (8, 3)),
                                   ("cuts", ("135m", 49152), (1, 3)), ("cuts", ("1m", 256), (16, 15))):
        c = chosen(suite, *shape)
        assert (c.micro_batch, c.steps) == expected
    assert chosen("train", "laptop", 256, micro_batch=3, steps=7).micro_batch == 3


def test_the_plain_loop_trains_the_same_model(monkeypatch):
    c = settings("train", micro_steps=1)
    r = training.stage_run(c, training.GPT2, training.shapes("toy", 300)[0], None, 2)
    model, before = copy.deepcopy(r.state.model), r.state.step
    starts = iter([torch.tensor([5, 70]), torch.tensor([9, 64 * 64])])
    monkeypatch.setattr(training.torch, "randint", lambda high, size: next(starts))
    plain = make_optimizer(model, r.config)
    for at in ((5, 70), (9, 64 * 64)):
        x = torch.stack([torch.tensor(r.corpus.train[i:i + 65].astype("int64")) for i in at])
        F.cross_entropy(model.inner(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
    r.plain(2)
    assert r.state.step == before
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(r.state.model.parameters(), model.parameters()))


# -- the suites on training: their records

@pytest.fixture(scope="module")
def trained():
    """The train suite's only cell at toy size: settings, record."""
    torch.set_num_threads(1)
    c = settings("train", rounds=2)
    (name, measure), = bench.cells(c)
    return c, record("train", name, measure())


def test_flops_are_the_model_s_and_rates_are_flops_over_seconds(trained):
    c, r = trained
    T = 64
    target, enlarged = training.shapes("toy", 300, 2.6)
    tokens, half = 2 * 2 * T, 2 * T * 8 * 4 * 2                             # 2 T · head_dim · sum of n_head: causal
    forward = enlarged.flops_per_token(T, backward=False) - half
    big, small = (config.flops_per_token(T) - 3 * half for config in (enlarged, target))
    scoring = 3 * enlarged.removable_params() / 2                            # in one of the two steps of a round
    expected = {"enlarge": tokens * big, "recover": tokens * small, "recover, KD": tokens * (small + forward),
                "prune": tokens * big + scoring, "prune, KD": tokens * (big + forward) + scoring,
                training.LLAMA: tokens * small}
    theirs = tokens * (gpt2_peer.peer_of(target).flops_per_token(T) - 3 * 2 * T * 32 * 2)
    expected |= {training.GPT2: theirs, training.PLAIN: theirs}
    rows = by(r["rows"], "variant")
    assert {*rows} == {*expected} == {*training.STAGES, training.GPT2, training.PLAIN, training.LLAMA}
    assert r["matmul_flops"] % (2 * 512**3) == 0
    for name, row in rows.items():
        if "note" in row:
            continue
        seconds = r["seconds"][name]
        assert row["tokens/step"] == tokens and len(seconds) == c.rounds == 2
        assert row["FLOPs/step, causal"] == pytest.approx(expected[name], rel=1e-9), name
        assert row["tokens/s"] == pytest.approx(2 * tokens / statistics.median(seconds))
        assert row["FLOP/s, causal"] == pytest.approx(2 * expected[name] / statistics.median(seconds))
        share = [2 * expected[name] / s / (r["matmul_flops"] / m) for s, m in zip(seconds, r["seconds"]["matmul"])]
        assert row["of matmul's FLOP/s, causal"] == pytest.approx(statistics.median(share))
        ratios = [b / a for a, b in zip(r["seconds"]["recover"], seconds)]
        assert row["tokens/s: recover's ÷ this"] == pytest.approx(statistics.median(ratios))
        assert row.get("scores per cut") == (1 if "prune" in name else None)
        assert row["of them embedding %"] == pytest.approx(100 * 300 * 32 / row["params"])
    assert "cuts every 15 steps and scores every 5" in r["note"]


def test_the_parts_of_a_step_are_all_there_and_sum_to_at_most_the_whole(trained):
    _, r = trained
    assert training.PARTS == ("data", "teacher", "forward", "backward", "optimizer", "scoring", "cut")
    for name, rounds in r["breakdown"].items():
        for found in rounds:
            assert {*found} == {*training.PARTS, "whole"}
            assert sum(found[part] for part in training.PARTS) <= found["whole"]
            always = {"data", "forward", "backward", "optimizer"}
            pruning = {"scoring", "cut"} if name.startswith("prune") else set()
            taught = {"teacher"} if name.endswith("KD") else set()
            assert {part for part in training.PARTS if found[part] > 0} == always | pruning | taught, name
    for row in r["rows"]:
        if "note" not in row and row["variant"] != training.PLAIN:
            assert row["other %"] >= 0 and all(f"{part} %" in row for part in training.PARTS)


def test_without_transformers_its_row_says_so(monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    c = settings("train")
    (row,) = training.stages(c, "toy", 300, (training.LLAMA,))["rows"]
    assert row["note"] == "pip install transformers" and row["variant"] == training.LLAMA


PEERS = [("toy", 300), ("laptop", 256), ("laptop", 50257), ("10m", 256), ("124m", 50257), ("1m", 256), ("135m", 49152)]


@pytest.mark.parametrize("name, vocab_size", [*PEERS, ("1.3b", 50257)])
def test_peers_have_our_number_of_parameters(name, vocab_size):
    target = training.shapes(name, vocab_size, 2.6)[0]
    c, ours = gpt2_peer.peer_of(target), target.num_params()["total"]
    assert abs(c.num_params()["total"] / ours - 1) < .02
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt2_peer.GPT2(c).parameters()) == c.num_params()["total"]
        if find_spec("transformers") and name in ("toy", "124m"):
            assert sum(p.numel() for p in training.Peer(training.LLAMA, target).parameters()) == ours
    assert c.d_ff % (64 if c.d_model > 512 else 8) == 0
    assert abs(c.flops_per_token(64) / target.flops_per_token(64) - 1) < .1


def test_the_gpt2_peer_is_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    peer = training.Peer(training.GPT2, training.shapes("toy", 300, 2.6)[0])
    ours, c = peer.inner, peer.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=300, n_positions=c.block_size, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.d_ff,
        activation_function="gelu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    names = {"embed": "wte", "positions": "wpe", "norm": "ln_f", "qkv": "attn.c_attn", "o": "attn.c_proj",
             "up": "mlp.c_fc", "down": "mlp.c_proj", "ln_1": "ln_1", "ln_2": "ln_2"}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                p.zero_()                                                    # we have none
        for name, p in ours.named_parameters():
            p.normal_(mean=float(p.dim() == 1), std=.2)
            *block, part, _ = name.split(".")
            place = ".".join(["transformer", *(["h", block[1]] if block else []), names[part], "weight"])
            theirs.get_parameter(place).copy_(p.T if block and p.dim() == 2 else p)      # its matrices are (in, out)
    x, y = torch.randint(300, (2, 3, 64))
    loss, stats = peer(x, y)
    expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    assert expected > 6 and torch.allclose(loss, expected, atol=1e-5) and stats.tolist() == [loss.item(), 0, 0]


def test_the_llama_peer_is_our_model():
    pytest.importorskip("transformers")
    from formats import huggingface
    target = training.shapes("toy", 300, 2.6)[0]
    theirs, ours = training.Peer(training.LLAMA, target).eval(), GPT(target)
    named = dict(theirs.inner.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.normal_(mean="norm" in name, std=.2)
            named[huggingface.their_name(name)].copy_(p)
    x = torch.randint(300, (2, 64))
    assert torch.allclose(theirs.inner(x).logits, ours(x), atol=1e-4)
    assert torch.allclose(theirs(x, x)[0], F.cross_entropy(ours(x).flatten(0, 1), x.flatten()), atol=1e-4)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The gpu suite on the CPU, as if torch and numpy were all there is; KD's memory in this process."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("gpu") / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("transformers", "matplotlib", "tiktoken", "safetensors", "datasets", "xllamacpp", "gguf"):
            patch.setitem(os.sys.modules, name, None)
        for suite in (training, inference):
            patch.setattr(suite, "own_process", lambda function, *args: function(*args))
        flags = "--presets toy --vocab 300 --rounds 1 --steps 2 --micro-batch 2 --prompt 12 --decode 5 --device cpu"
        bench.main(parse(bench.Bench, ["gpu", "--out", str(out), "--no-compile", *flags.split()]))
    return out, {r["cell"]: r for r in read_records(out)}


def test_the_gpu_suite_needs_torch_only_and_prints_again(gpu, capsys):
    out, records = gpu
    cells = "infer", "recover", "prune", "cuts"
    assert [*records] == [f"toy, V = 300, {name}" for name in cells]
    assert not any("failed" in r for r in records.values())
    bench.main(bench.Bench("report", out=str(out)))
    text = capsys.readouterr().out
    assert text.strip() == timing.tables(read_records(out))
    assert all(f"**gpu, {table}**" in text for table in ("inference", "training", "pauses"))


def test_kd_is_held_against_the_flops_that_it_adds(gpu):
    r = gpu[1]["toy, V = 300, recover"]
    rows = by(r["rows"], "variant")
    target, enlarged = training.shapes("toy", 300, 2.6)
    half = 2 * 64 * 8 * 4 * 2
    ce = target.flops_per_token(64) - 3 * half
    kd = ce + enlarged.flops_per_token(64, backward=False) - half
    row = rows["recover, KD"]
    assert {*rows} == {*training.KD, training.GPT2, training.PLAIN}
    assert row["FLOPs/step, causal"] == pytest.approx(2 * 64 * kd)
    more = statistics.median(b / a for a, b in zip(r["seconds"]["recover"], r["seconds"]["recover, KD"]))
    assert row["time over the roofline"] == pytest.approx(more * ce / kd)
    assert rows["recover"]["time over the roofline"] == 1
    mine, base = r["memory"]["recover, KD"], r["memory"]["recover"]
    assert base["teacher_bytes"] == 0 and mine["teacher_bytes"] == 4 * enlarged.num_params()["total"]
    assert row["(peak − teacher) ÷ CE's peak"] == (mine["peak_bytes"] - mine["teacher_bytes"]) / base["peak_bytes"]
    raised = [m["peak_bytes"] - m["before_bytes"] for m in (mine, base)]
    assert min(raised) >= 0 and row["raised ÷ CE's raised"] == raised[0] / max(1, raised[1])


def test_what_a_gpu_s_allocator_counts_is_put_down_to_one_run(monkeypatch):
    r = training.stage_run(settings("kd"), "recover, KD", *training.shapes("toy", 300, 2.6), 2)
    r.go(1)
    target, enlarged = (config.num_params()["total"] for config in training.shapes("toy", 300, 2.6))
    teacher, steps = 4 * enlarged, 4 * len([*r.state.model.parameters()])     # AdamW counts them for each parameter
    held = teacher + 3 * 4 * target + steps

    @contextlib.contextmanager
    def peak(device):
        yield {"before_bytes": held + 1000, "peak_bytes": held + 1700}       # 1,000 of others

    monkeypatch.setattr(training, "peak", peak)
    monkeypatch.setattr(r, "go", lambda steps: None)
    monkeypatch.setattr(r, "device", "cuda")
    assert training.memory_of(r) == {"before_bytes": held, "peak_bytes": held + 700, "teacher_bytes": teacher}


def test_cuts_name_every_part_and_price_the_moment_of_slicing(gpu):
    r = gpu[1]["toy, V = 300, cuts"]
    (spent,), (sliced,) = r["spent"], r["seconds"]["sliced"]
    assert all(spent[part] > 0 for part in ("train", "score", "cut", "whole")) and r["slice_seconds"] > 0
    pauses, *moments = r["rows"]
    before, behind = (spent["whole"] - spent["score"] - spent["cut"]) / 2, sliced / 2
    assert pauses["score ms"] == 1000 * spent["score"] and pauses["cut ms"] == 1000 * spent["cut"]
    assert pauses["prune stage ÷ none (a cut per 15 steps, a score per 5)"] == pytest.approx(
        1 + (spent["cut"] + 3 * spent["score"]) / (15 * before))
    assert pauses["s/step"] == pytest.approx(before)
    assert [m["slice at (share of the run)"] for m in moments] == pytest.approx([.7, .85, 1])
    for m in moments:
        share, mean = m["slice at (share of the run)"], m["mean s/step of the run"]
        assert mean == pytest.approx(share * before + (1 - share) * behind)
        assert m["÷ at the last cut"] == pytest.approx(mean / moments[0]["mean s/step of the run"])


@needs_proc
def test_memory_of_a_step_is_a_process_s_own():
    """A larger vocabulary adds its weights, gradients and moments, and at least one chunk of logits, to the peak. What
    was freed before may be counted in both numbers of a process, so processes are compared, not these two."""
    c, found = settings("kd"), {}
    for V in (300, 40000):
        target, enlarged = training.shapes("toy", V, 2.6)
        found[V] = timing.own_process(training.memory_alone, c, "recover", target, enlarged)
    more = 4 * (40000 - 300) * target.d_model                                # bytes of the table of tokens
    logits = 4 * (40000 - 300) * c.micro_batch * target.block_size
    assert found[40000]["peak_bytes"] - found[300]["peak_bytes"] > 4 * more + logits
    assert all(each["peak_bytes"] >= each["before_bytes"] > 0 for each in found.values())


def test_what_ends_a_process_is_told():
    with pytest.raises(UserError, match="the process of _exit was ended, .* smaller --micro-batch"):
        timing.own_process(os._exit, 9)
    with pytest.raises(ZeroDivisionError):
        timing.own_process(divmod, 1, 0)


# -- the other suites

def test_two_processes_do_half_of_the_batch_each():
    c = settings("ddp", vocab=(256,))
    r = record("ddp", "toy", training.ddp(c, "toy", 256))
    (row,) = r["rows"]
    assert row["tokens/step"] == 2 * 2 * 64
    one, two, exchange = (r["seconds"][name] for name in ("one process", "two", "all-reduce"))
    assert row["overlap of the exchange"] == pytest.approx(1 - (two[0] - one[0] / 2) / exchange[0])
    assert row["efficiency"] == pytest.approx(statistics.median(a / b / 2 for a, b in zip(one, two)))


def test_start_times_the_end_of_the_first_step_of_the_real_run(monkeypatch):
    seconds, parts = system.first_step(["--preset", "toy", "--device", "cpu", "--eval-windows", "4"],
                                             empty=True)
    assert 0 < parts["train"] < seconds and parts["eval"] > 0 and parts["cut"] == 0
    with pytest.raises(UserError, match="train.py --preset huge ended with 2: error: --preset 'huge'"):
        system.first_step(["--preset", "huge"])
    monkeypatch.setattr(system, "first_step", lambda flags, empty=False: (float(len(flags)) + 5 * empty,
                                                                             {"train": 1.0, "cut": 0.0}))
    monkeypatch.setattr(system.subprocess, "run", lambda *_, **__: None)
    helps, cold, first = system.start(settings("start", device="cpu"), "toy", 256)["rows"]
    assert first["s"] == 4.0 and first["of which train"] == 1.0 and "of which cut" not in first and helps["s"] >= 0
    assert cold["s"] == 9.0


def test_disk_compares_files_of_one_size(tmp_path, monkeypatch):
    written = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, *args, **state: (save(path, *args, **state),
                                                                          written.append((path.stat().st_size, state))))
    monkeypatch.setattr(system, "own_process", lambda function, *args: function(*args))
    c = dataclasses.replace(settings("disk"), out=str(tmp_path / "out" / "records.jsonl"))
    r = system.disk(c, "toy", 300)
    size, state = written[0]
    config = training.shapes("toy", 300, 1.0)[0]
    assert size > 3 * 4 * config.num_params()["total"] and len(written) == 3       # memory, warm-up, a round
    assert len(state["optimizer"]["state"]) == len([*GPT(config).parameters()]) and not [*(tmp_path / "out").iterdir()]
    for row in r["rows"]:
        ours, plain = ("save", "write") if row["what"] == "checkpoint.save" else ("load", "read")
        assert row["bytes"] == size and row["bytes/s"] == size / statistics.median(r["seconds"][ours])
        assert row["share of it"] == timing.median_ratio(r["seconds"][plain], r["seconds"][ours])


@pytest.fixture(scope="module")
def inferred():
    torch.set_num_threads(1)
    c = settings("infer", prompt=12, decode=5, keep=.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "own_process", lambda function, *args: function(*args))
        return c, record("infer", "toy", inference.infer(c, "toy", 300))


@pytest.mark.parametrize("name, keep", [("toy", .8), ("135m", .8), ("135m", .5), ("1.3b", .6), ("124m", .9)])
def test_pruned_models_have_equal_parameters_in_even_and_in_uneven_widths(name, keep):
    dense = training.shapes(name, 300, 1.0)[0]
    found = inference.pruned(dense, keep)
    params = {n: c.removable_params() for n, c in found.items()}
    assert {*found} == {"dense", "even", "uneven"} and found["dense"] == dense
    assert 0 <= keep * params["dense"] - params["even"] < dense.n_layer * dense.unit_params(0, "ffn")
    assert abs(params["uneven"] - params["even"]) <= dense.unit_params(0, "ffn")
    assert len({*found["even"].d_ff}) == 1 and len({*found["uneven"].d_ff}) > 1 and min(found["uneven"].d_ff) > 0
    assert max(found["uneven"].d_ff) <= max(dense.d_ff) and found["uneven"].n_kv_head != dense.n_kv_head
    with pytest.raises(UserError, match="--keep 0.1 leaves .* no neurons.*give --keep above"):
        inference.pruned(dense, .1)


def test_bytes_per_token_are_those_of_the_weights_and_of_the_cache():
    for config in (UNEVEN, dataclasses.replace(UNEVEN, tie_embeddings=False)):
        model, cache = GPT(config), [[] for _ in range(3)]
        model.hidden(torch.zeros(1, 7, dtype=torch.long), cache)
        held = sum(t.nbytes for layer in cache for t in layer)
        read = sum(p.nbytes for name, p in model.named_parameters() if config.tie_embeddings or "embed" not in name)
        assert inference.bytes_per_token(config, 7, 4) == read + held


def test_generation_is_timed_by_token(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock.now)
    c = settings("infer", prompt=12, decode=5)
    model, prompt = inference.built(c, UNEVEN)
    hidden, seen = model.hidden, []

    def slow(idx, cache=None):
        seen.append(idx.size(1))
        clock.now += 10 if idx.size(1) > 1 else 2
        return hidden(idx, cache)

    monkeypatch.setattr(model, "hidden", slow)
    assert inference.generate(model, prompt, 5) == {"first": 10.0, "decode": 2.0} and seen == [12, 1, 1, 1, 1]


def test_inference_is_held_against_its_bytes(inferred):
    c, r = inferred
    rows, rates = by(r["rows"], "runtime", "model"), {(a, b): each for a, b, each in r["rates"]}
    runtimes = ["ours"] + ["llama.cpp"] * (find_spec("xllamacpp") is not None)
    assert {*rows} >= {(a, b) for a in runtimes for b in ("dense", "even", "uneven")} and {*rates} <= {*rows}
    for (runtime, name), each in rates.items():
        row, dense = rows[runtime, name], rates[runtime, "dense"]
        assert len(each) == c.rounds and row["params"] <= rows[runtime, "dense"]["params"]
        assert row["bytes allow"] == pytest.approx(
            rows[runtime, "dense"]["bytes read per token"] / row["bytes read per token"], rel=1e-4)
        faster = [b["decode"] / a["decode"] for a, b in zip(each, dense)]
        faster = faster if runtime == "ours" else [1 / f for f in faster]
        assert row["decode ÷ dense's"] == pytest.approx(statistics.median(faster))
        assert row["of the bytes"] == pytest.approx(statistics.median(faster) / row["bytes allow"])
        assert row["of the roofline"] == pytest.approx(
            row["decode tokens/s"] * row["bytes read per token"] / r["bandwidth"], rel=1e-3)
        assert row["peak bytes"] > 2**20
    assert "ours in float32, llama.cpp's files in f16" in r["note"]


def test_llamacpp_is_asked_on_the_cpu_only(monkeypatch):
    """As on a GPU: its row says so, ours are measured in this process."""
    c, built = settings("infer", prompt=12, decode=5), inference.built
    monkeypatch.setattr(inference, "built", lambda c, config: built(dataclasses.replace(c, device="cpu"), config))
    for name in ("traffic", "interleave", "peak"):
        plain = getattr(timing, name)
        monkeypatch.setattr(inference, name, lambda *args, plain=plain: plain(*args[:-1], "cpu"))
    monkeypatch.setattr(inference, "own_process", None)
    rows = inference.infer(dataclasses.replace(c, device="cuda"), "toy", 300)["rows"]
    assert [row["runtime"] for row in rows] == ["ours"] * 3 + ["llama.cpp"] and "CPU only" in rows[-1]["note"]


# -- scale

def test_the_scale_table_is_what_a_calculation_by_hand_gives():
    """1.3b: 24 layers, C = 2048, 16 heads and 8 KV heads of 128, d_ff 6,272; 2.6 times that to a multiple of 8."""
    r = system.scale(settings("scale", presets=("1.3b",), vocab=(50257,), micro_batch=1), "1.3b", 50257)
    memory, time_ = by(r["rows"][:2], "model"), by(r["rows"][2:], "plan", "GPUs")
    attention, V, C = 24 * 2048 * 128 * (2 * 16 + 2 * 8), 50257, 2048
    params = {name: attention + 24 * 3 * C * f + V * C + 49 * C for name, f in (("target", 6272), ("enlarged", 16304))}
    assert params == {"target": 1_329_860_608, "enlarged": 2_809_139_200}
    assert {name: row["params"] for name, row in memory.items()} == params
    row = memory["enlarged"]
    assert row["weights"] == row["gradients"] == row["Adam"] / 2 == pytest.approx(11.2365568)
    assert row["sum"] == pytest.approx(sum(row[k] for k in ("weights", "gradients", "Adam", "activations",
                                                           "cast weights", "loss")))
    square = 4 * 4096 * 128 * 16 * 24                                        # attention's FLOPs per token, forward
    flops = {name: 3 * (2 * (n - 49 * C) + square) for name, n in params.items()}
    days = lambda per_token, gpus: 2e12 * per_token / (gpus * 1e15 * .4) / 86400
    assert time_["scratch", 8]["days at most"] == pytest.approx(days(flops["target"], 8))
    idea = .7 * flops["enlarged"] + .3 * flops["target"]
    assert time_["idea", 512]["days at most"] == pytest.approx(days(idea, 512)) == pytest.approx(1.877, abs=1e-3)
    assert time_["idea-kd", 1]["days at most"] == pytest.approx(days(idea + .5 * flops["enlarged"] / 3, 1))


@pytest.mark.parametrize("config", [UNEVEN, training.shapes("toy", 300, 2.6)[0]], ids=["uneven", "toy"])
@pytest.mark.parametrize("autocast", [False, True])
def test_accounted_activations_are_what_autograd_keeps(config, autocast):
    model, held = GPT(config), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in weights:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage()       # kept: no address comes twice
        return t

    x = torch.randint(config.vocab_size, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = distill.chunked_loss(model.hidden(x), model.head_weight, x)
    assert loss.requires_grad
    size = 2 if autocast else 4
    parts = system.step_bytes(dataclasses.replace(config, block_size=64), 4, activation_bytes=size)
    expected = parts["activations"] + parts["cast weights"] + 4 * config.vocab_size * config.d_model
    repeated = 2 * config.head_dim * (sum(config.n_head) - sum(config.n_kv_head))     # on a GPU; here k, v are not
    expected -= 4 * 64 * repeated * size
    assert sum(s.nbytes() for s in held.values()) == pytest.approx(expected, rel=.02)


def test_the_mean_flops_of_a_plan_are_the_loop_s(tmp_path):
    """Executed FLOPs of a real run with the plan's shares, scoring left out."""
    r = train.main(train.Train(preset="toy", plan="idea", steps=40, cuts=4, batch_tokens=256, micro_batch=4,
                               eval_windows=4, device="cpu", score_every=100, out=str(tmp_path / "run")), quiet=True)
    scores = sum(schedule.score_at(s, r.timeline, 100, 100) for s in range(40)) * 3 * r.start.removable_params()
    assert r.timeline.slice_at == 27                                         # the last cut; the share says 28
    early = 256 * (r.start.flops_per_token(64) - r.target.flops_per_token(64))
    expected = 40 * 256 * system.plan_flops("idea", r.target, r.start) - early
    assert r.state.flops[0] - scores == pytest.approx(expected)


def test_vocabularies_left_out_are_the_shape_s_own():
    c = bench.resolve(bench.Bench("cuts"))
    assert [name for name, _ in bench.cells(c)] == ["1m, V = 256", "135m, V = 49152"]
    params = [training.shapes(name, v, 2.6)[1].num_params()["total"] for name, v in (("1m", 256), ("135m", 49152))]
    assert params == [1_017_216, 134_515_008]
    assert len(bench.cells(bench.resolve(bench.Bench("train", presets=("toy", "1m"))))) == 4
    assert len(bench.cells(bench.resolve(bench.Bench("gpu", device="cpu")))) == 2 * 4


# -- refusals

@pytest.mark.parametrize("command, says", [
    ("fast", "'fast' is not one of train, kd, cuts"),
    ("train --minutes 3", "--minutes has no effect in train; leave it out"),
    ("scale --rounds 3", "--rounds has no effect in scale"),
    ("report --rounds 3", "--rounds has no effect in report"),
    ("train --presets huge", "train knows no shape 'huge'; there are 1m, 135m, toy"),
    ("start --presets 1m", "start knows no shape '1m'; there are toy"),
    ("train --rounds 0", "--rounds 0 must be at least 1"),
    ("train --vocab 1", "--vocab 1 must be at least 2"),
    ("infer --keep 1.5", "--keep 1.5 must be at least .* at most 1"),
    ("infer --keep 0", "--keep 0.0 must be at least"),
    ("infer --decode 1", "--decode 1 must be at least 2"),
    ("cuts --steps 1", "--steps 1 must be 0 or at least 2"),
    ("gpu --minutes 0", "--minutes 0.0 must be at least"),
    ("train --enlarge-ff 0.5", "--enlarge-ff 0.5 must be at least 1"),
    ("train --dtype int8", "--dtype 'int8' is not one of"),
    ("train --device tpu", "device 'tpu' is not available")])
def test_refusals_are_one_sentence_with_the_numbers_and_the_remedy(command, says):
    with pytest.raises(UserError, match=says) as problem:
        bench.main(parse(bench.Bench, command.split()))
    assert "\n" not in str(problem.value)


def test_every_flag_has_an_effect_somewhere_and_the_report_needs_records(tmp_path):
    flags = {f.name for f in dataclasses.fields(bench.Bench)} - {"suite", "out"}
    assert flags == set().union(*bench.SUITES.values())
    with pytest.raises(UserError, match="has no records; give the --out of a suite that ran"):
        bench.main(bench.Bench("report", out=str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "none").exists()


def test_numbers_are_shown_with_three_digits():
    shown = {None: "", "x": "x", 1234567: "1,234,567", 0.0123456: "0.0123", 4567.8: "4,568", 2e12: "2e+12"}
    assert {value: timing.show(value) for value in shown} == shown and timing.show(True) == "True"

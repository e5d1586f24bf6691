"""What the benchmarks time is train.train itself, with the model's own FLOPs, bytes and
parameters."""
import copy
import os
import statistics
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_helpers import as_recorded, by, load, same_process, settings
from torch._dynamo.testing import CompileCounter

import data
import prune
import schedule
import score
import train
from bench import __main__ as bench
from bench import gpt2_peer, inference, timing, training, variants
from common import parse, read_records
from formats import huggingface
from model import GPT

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
TARGET, ENLARGED = variants.shapes("toy", 300, 2.6)
HALF_SQUARE = 2 * 64 * 8 * 4 * 2         # FLOPs per token of half a forward attention: 2 T · head_dim · sum of n_head


@pytest.fixture
def float64():
    """Models in float64: in float32 AdamW turns a gradient that is pure rounding into a whole step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- variants

def adamw(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": .1}, {"params": vectors, "weight_decay": 0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(.9, .95), eps=1e-8)


def assert_equal_models(a, b, atol):
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.allclose(p, q, atol=atol)


def test_timed_steps_are_those_of_a_plain_loop(float64):
    """And a step that is taken apart is the step of the loop at the same step number."""
    variant = variants.stage_variant(load(steps=3), "recover", TARGET, ENLARGED, rounds=2)
    torch.manual_seed(0)
    model = GPT(TARGET)
    optimizer = adamw(model)
    for step, lr_step in ((0, 0), (1, 1), (2, 2), (3, 2), (3, 3)):       # the fourth one is taken apart
        for micro in range(2):
            x, y = data.batch(variant.setup.corpus.train, 64, 0, step, micro, micro_batch=2, micro_steps=2)
            (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(lr_step, variant.setup.timeline, 1e-4, 1e-5)
        optimizer.step()
        optimizer.zero_grad()
    variant.go(3)
    seconds = variants.take_apart(variant, 1)
    assert variant.state.step == 4 and tuple(seconds) == variants.PARTS
    assert_equal_models(variant.state.model, model, atol=1e-9)


@pytest.mark.parametrize("steps, rounds, scores", [(5, 3, 1), (2, 2, 1), (15, 2, 3)])
def test_a_round_of_the_prune_stage_has_one_cut_and_its_scores(monkeypatch, steps, rounds, scores):
    variant = variants.stage_variant(load(steps=steps, micro_steps=1), "prune", TARGET, ENLARGED, rounds)
    calls = []
    zero_ = prune.zero_
    sensitivity = score.sensitivity
    monkeypatch.setattr(prune, "zero_", lambda *args: calls.append("cut") or zero_(*args))
    monkeypatch.setattr(score, "sensitivity", lambda model: calls.append("score") or sensitivity(model))
    for _ in range(rounds):
        variant.go(steps)
    assert calls == (["score"] * scores + ["cut"]) * rounds
    assert variants.scored_steps(variant, steps) == scores
    assert train.live_config(variant.state) == TARGET and variant.state.model.config == ENLARGED
    slicing, first = training.slice_pause(variant)
    assert variant.state.model.config == TARGET and slicing > 0 and first > 0


def test_another_round_compiles_nothing(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile(module, backend=counter, fullgraph=True,
                                                                            **options))
    runs = [variants.stage_variant(load(compile=True), name, TARGET, ENLARGED, 3) for name in variants.STAGES]
    runs.append(variants.peer_variant(load(compile=True), variants.GPT2, TARGET, 3))
    graphs = []
    for _ in range(3):
        for variant in runs:
            variant.go(2)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs[0] == graphs[1] == graphs[2]


def test_a_slice_compiles_with_an_empty_cache(monkeypatch):
    """Else the graph of the same shapes that another variant compiled would be taken from the
    disk."""
    from torch._inductor import utils
    calls = []

    class FreshCache:
        def __enter__(self):
            calls.append("begin")

        def __exit__(self, *_):
            calls.append("end")

    monkeypatch.setattr(utils, "fresh_inductor_cache", FreshCache)
    for compiled in (False, True):
        setup = SimpleNamespace(device="cpu", config=SimpleNamespace(compile=compiled))
        state = SimpleNamespace(seconds={"slice": 0.0})
        training.slice_pause(SimpleNamespace(setup=setup, state=state, go=lambda steps: calls.append(steps)))
    assert calls == [1, "begin", 1, "end"]


@pytest.mark.parametrize("suite, preset, vocab_size, micro_batch, steps", [
    ("train", "laptop", 256, 16, 15), ("train", "laptop", 50257, 8, 3), ("cuts", "135m", 49152, 1, 3),
    ("cuts", "1m", 256, 16, 15)])
def test_one_batch_and_number_of_steps_for_all_of_a_cell(suite, preset, vocab_size, micro_batch, steps):
    chosen, _, _ = variants.fitted(bench.resolve(bench.Bench(suite, device="cpu")), preset, vocab_size)
    assert (chosen.micro_batch, chosen.steps) == (micro_batch, steps)
    given = bench.resolve(bench.Bench(suite, device="cpu", micro_batch=3, steps=7))
    chosen, _, _ = variants.fitted(given, preset, vocab_size)
    assert (chosen.micro_batch, chosen.steps) == (3, 7)


# -- peers

def test_the_plain_loop_trains_the_same_model(float64):
    variant = variants.peer_variant(load(micro_steps=1), variants.GPT2, TARGET, rounds=2)
    model = copy.deepcopy(variant.state.model)
    tokens = variant.setup.corpus.train
    optimizer = adamw(model)
    torch.manual_seed(3)
    for _ in range(2):
        starts = torch.randint(len(tokens) - 64, (2,)).tolist()
        x = torch.stack([torch.tensor(tokens[start:start + 65].astype("int64")) for start in starts])
        logits = model(x[:, :-1]).float()           # as nanoGPT and the benchmark have it
        F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(3)
    variants.plain_loop(variant, 2)
    assert variant.state.step == 0
    assert_equal_models(variant.state.model, model, atol=1e-9)


PEERS = [("toy", 300), ("laptop", 256), ("laptop", 50257), ("10m", 256), ("124m", 50257), ("1m", 256), ("135m", 49152),
         ("1.3b", 50257)]


@pytest.mark.parametrize("name, vocab_size", PEERS)
def test_peers_have_our_number_of_parameters(name, vocab_size):
    target, _ = variants.shapes(name, vocab_size, 2.6)
    config = gpt2_peer.peer_of(target)
    ours = target.num_params()["total"]
    assert abs(config.num_params()["total"] / ours - 1) < .02
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt2_peer.GPT2(config).parameters()) == config.num_params()["total"]
        if find_spec("transformers") and name in ("toy", "124m"):
            assert sum(p.numel() for p in variants.Llama(target).parameters()) == ours
    assert config.d_ff % (64 if config.d_model > 512 else 8) == 0
    assert abs(config.flops_per_token(64) / target.flops_per_token(64) - 1) < .1


GPT2_NAMES = {"embed": "wte", "positions": "wpe", "norm": "ln_f", "qkv": "attn.c_attn", "o": "attn.c_proj",
              "up": "mlp.c_fc", "down": "mlp.c_proj", "ln_1": "ln_1", "ln_2": "ln_2"}


def test_the_gpt2_peer_is_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = gpt2_peer.peer_of(TARGET)
    model = gpt2_peer.GPT2(config)
    oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=300, n_positions=config.block_size, n_embd=config.d_model, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=config.d_ff, activation_function="gelu", resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0)).eval()
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if name.endswith("bias"):
                p.zero_()                                                    # ours has none
        for name, p in model.named_parameters():
            p.normal_(mean=float(p.dim() == 1), std=.2)
            *block, part, _ = name.split(".")
            layer = f"h.{block[1]}." if block else ""
            matrix = bool(block) and p.dim() == 2                            # theirs are (in, out)
            oracle.get_parameter(f"transformer.{layer}{GPT2_NAMES[part]}.weight").copy_(p.T if matrix else p)
    x, y = torch.randint(300, (2, 3, 64))
    loss, stats = variants.WholeLogits(model, 0.5, 1.0)(x, y)
    expected = F.cross_entropy(oracle(x).logits.flatten(0, 1), y.flatten())
    assert expected > 6 and torch.allclose(loss, expected, atol=1e-5)
    assert stats.tolist() == [loss.item(), 0, 0]


def test_the_llama_peer_is_our_model():
    pytest.importorskip("transformers")
    peer = variants.Llama(TARGET).eval()
    model = GPT(TARGET)
    parameters = dict(peer.inner.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean="norm" in name, std=.2)
            parameters[huggingface.their_name(name)].copy_(p)
    x = torch.randint(300, (2, 64))
    assert torch.allclose(peer(x), model(x), atol=1e-4)


def test_without_transformers_its_row_says_so(monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    (row,) = training.stages(settings("train"), "toy", 300, (variants.LLAMA,))["rows"]
    assert row["note"] == "pip install transformers" and row["variant"] == variants.LLAMA


# -- the suite train

@pytest.fixture(scope="module")
def trained():
    """The only cell of the train suite at toy size."""
    torch.set_num_threads(1)
    ((_, measure),) = bench.cells(settings("train", rounds=2))
    return as_recorded(measure())


def test_rates_are_flops_over_seconds(trained):
    tokens = 2 * 2 * 64
    forward = ENLARGED.flops_per_token(64, backward=False) - HALF_SQUARE
    enlarged = ENLARGED.flops_per_token(64) - 3 * HALF_SQUARE
    target = TARGET.flops_per_token(64) - 3 * HALF_SQUARE
    scoring = 3 * ENLARGED.removable_params() / 2                            # in one of the two steps of a round
    peer = gpt2_peer.peer_of(TARGET).flops_per_token(64) - 3 * 2 * 64 * 32 * 2
    expected = {"enlarge": tokens * enlarged, "recover": tokens * target, "recover, KD": tokens * (target + forward),
                "prune": tokens * enlarged + scoring, "prune, KD": tokens * (enlarged + forward) + scoring,
                variants.LLAMA: tokens * target, variants.GPT2: tokens * peer, training.PLAIN: tokens * peer}
    rows = by(trained["rows"], "variant")
    seconds = trained["seconds"]
    assert {*rows} == {*expected}
    assert trained["matmul_flops"] == 2 * 512**3
    for name, row in rows.items():
        if "note" in row:
            continue
        assert row["tokens/step"] == tokens and len(seconds[name]) == 2
        assert row["FLOPs/step, causal"] == pytest.approx(expected[name], rel=1e-9), name
        assert row["tokens/s"] == pytest.approx(2 * tokens / statistics.median(seconds[name]))
        assert row["FLOP/s, causal"] == pytest.approx(2 * expected[name] / statistics.median(seconds[name]))
        shares = [2 * expected[name] / whole / (trained["matmul_flops"] / product)
                  for whole, product in zip(seconds[name], seconds["matmul"])]
        assert row["of matmul's FLOP/s, causal"] == pytest.approx(statistics.median(shares))
        ratios = [whole / recover for whole, recover in zip(seconds[name], seconds["recover"])]
        assert row["tokens/s: recover's ÷ this"] == pytest.approx(statistics.median(ratios))
        assert row.get("scores per cut") == (1 if "prune" in name else None)
        assert row["of them embedding %"] == pytest.approx(100 * 300 * 32 / row["params"])
    assert "cuts every 15 steps and scores every 5" in trained["note"]


def test_the_parts_of_a_step_are_all_there(trained):
    assert variants.PARTS == ("data", "teacher", "forward", "backward", "optimizer", "scoring", "cut")
    rows = by(trained["rows"], "variant")
    for name, rounds in trained["breakdown"].items():
        expected = {"data", "forward", "backward", "optimizer"}
        if name.startswith("prune"):
            expected |= {"scoring", "cut"}
        if name.endswith("KD"):
            expected.add("teacher")
        assert len(rounds) == training.APART
        for seconds in rounds:
            assert {part for part in variants.PARTS if seconds[part] > 0} == expected, name
        shares = [seconds["forward"] / sum(seconds.values()) for seconds in rounds]
        assert rows[name]["forward %"] == pytest.approx(100 * statistics.median(shares))
        assert all(f"{part} %" in rows[name] for part in variants.PARTS)
    assert "forward %" not in rows[training.PLAIN]


# -- the suites kd, cuts and gpu

@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The file and the cells of the gpu suite on the CPU, as if torch and numpy were all there
    is."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("gpu") / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("transformers", "matplotlib", "tiktoken", "safetensors", "datasets", "xllamacpp", "gguf"):
            patch.setitem(sys.modules, name, None)
        for suite in (training, inference):
            patch.setattr(suite, "own_process", same_process)
        flags = "--presets toy --vocab 300 --rounds 1 --steps 2 --micro-batch 2 --prompt 12 --decode 5 --device cpu"
        bench.main(parse(bench.Bench, ["gpu", "--out", str(out), *flags.split()]))
    return out, by(read_records(out), "cell")


def test_the_gpu_suite_needs_torch_only_and_prints_again(gpu, capsys):
    out, records = gpu
    assert [*records] == [f"toy, V = 300, {name}" for name in ("infer", "recover", "prune", "cuts")]
    assert not any("failed" in record for record in records.values())
    bench.main(bench.Bench("report", out=str(out)))
    text = capsys.readouterr().out
    assert text.strip() == timing.tables(read_records(out))
    assert all(f"**gpu, {table}**" in text for table in ("inference", "training", "pauses"))


def test_distillation_is_held_against_the_flops_that_it_adds(gpu):
    record = gpu[1]["toy, V = 300, recover"]
    rows = by(record["rows"], "variant")
    plain_flops = TARGET.flops_per_token(64) - 3 * HALF_SQUARE
    kd_flops = plain_flops + ENLARGED.flops_per_token(64, backward=False) - HALF_SQUARE
    row = rows["recover, KD"]
    (plain_seconds,) = record["seconds"]["recover"]
    (kd_seconds,) = record["seconds"]["recover, KD"]
    assert {*rows} == {*training.KD, variants.GPT2, training.PLAIN}
    assert row["FLOPs/step, causal"] == pytest.approx(2 * 64 * kd_flops)
    assert row["time over the roofline"] == pytest.approx(kd_seconds / plain_seconds * plain_flops / kd_flops)
    assert rows["recover"]["time over the roofline"] == 1

    kd = record["memory"]["recover, KD"]
    plain = record["memory"]["recover"]
    assert plain["teacher_bytes"] == 0 and kd["teacher_bytes"] == 4 * ENLARGED.num_params()["total"]
    peak = (kd["peak_bytes"] - kd["teacher_bytes"]) / plain["peak_bytes"]
    assert row["(peak − teacher) ÷ CE's peak"] == peak
    raised = [memory["peak_bytes"] - memory["before_bytes"] for memory in (kd, plain)]
    assert min(raised) >= 0 and row["raised ÷ CE's raised"] == raised[0] / max(1, raised[1])


def test_cuts_name_every_part_and_price_the_moment_of_slicing(gpu):
    record = gpu[1]["toy, V = 300, cuts"]
    (spent,) = record["spent"]
    (sliced,) = record["seconds"]["sliced"]
    pauses, *moments = record["rows"]
    before = (spent["whole"] - spent["score"] - spent["cut"]) / 2
    behind = sliced / 2
    assert all(spent[part] > 0 for part in ("train", "score", "cut", "whole")) and record["slice_seconds"] > 0
    assert pauses["score ms"] == 1000 * spent["score"] and pauses["cut ms"] == 1000 * spent["cut"]
    assert pauses["prune stage ÷ none (a cut per 15 steps, a score per 5)"] == pytest.approx(
        1 + (spent["cut"] + 3 * spent["score"]) / (15 * before))
    assert pauses["s/step"] == pytest.approx(before)
    assert [row["slice at (share of the run)"] for row in moments] == pytest.approx([.7, .85, 1])
    for row in moments:
        share = row["slice at (share of the run)"]
        mean = row["mean s/step of the run"]
        assert mean == pytest.approx(share * before + (1 - share) * behind)
        assert row["÷ at the last cut"] == pytest.approx(mean / moments[0]["mean s/step of the run"])


@needs_proc
def test_memory_of_a_step_is_that_of_its_process():
    """A larger vocabulary adds its weights, gradients and moments, and at least a chunk of logits,
    to the peak. What was freed before may be counted in both numbers of a process, so processes are
    compared, not these two."""
    memory = {}
    for vocab_size in (300, 40000):
        target, enlarged = variants.shapes("toy", vocab_size, 2.6)
        memory[vocab_size] = timing.own_process(variants.memory_of, load(), "recover", target, enlarged)
    table = 4 * (40000 - 300) * TARGET.d_model                               # bytes of the embedding
    logits = 4 * (40000 - 300) * 2 * 64
    assert memory[40000]["peak_bytes"] - memory[300]["peak_bytes"] > 4 * table + logits
    assert all(each["peak_bytes"] >= each["before_bytes"] > 0 for each in memory.values())


# -- the suite ddp

def test_two_processes_do_half_of_the_batch_each():
    record = as_recorded(training.ddp(settings("ddp", vocab=(256,)), "toy", 256))
    (row,) = record["rows"]
    (one,), (two,), (exchange,) = (record["seconds"][name] for name in ("one process", "two", "all-reduce"))
    assert row["tokens/step"] == 2 * 2 * 64
    assert row["overlap of the exchange"] == pytest.approx(1 - (two - one / 2) / exchange)
    assert row["efficiency"] == pytest.approx(one / two / 2)
    both = variants.bare_setup(load(), variants.one_stage(None, 9), TARGET, TARGET, rank=1, world=2)
    assert both.micro_steps == 1 and both.config.batch_tokens == 256

"""The evaluation protocol against the plain formula, the command on files, the report's table and picture."""
import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import report
import train
from checkpoint import load, save
from common import UserError, progress
from formats.tokenizer import Tiktoken, open_tokenizer
from model import GPT, GPTConfig
from tasks import questions, statistics

ROOT = Path(__file__).parent.parent
CONFIG = GPTConfig(vocab_size=256, block_size=16, d_model=16, head_dim=8, n_head=(2,), n_kv_head=(1,), d_ff=(8,))
ONE_EACH = np.ones(256, dtype=np.int64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    m = GPT(CONFIG).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(20)                                       # losses that differ from token to token
    return m


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 256, 200).astype(np.uint16)


def plain(model, rows):
    """(N, T + 1) -> (N, T) nats, from full logits."""
    rows = torch.from_numpy(rows.astype(np.int64))
    losses = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1)


def test_windows_are_evenly_spaced(model, tokens):
    starts = [0, 48, 96, 144]                                # 4 of the 12 windows in 200 tokens
    expected = plain(model, np.stack([tokens[s:s + 17] for s in starts])).mean().item()
    result = evaluation.evaluate(model, tokens, ONE_EACH, windows=4, batch=3)
    assert result["loss"] == pytest.approx(expected, rel=1e-12) and result["tokens"] == 64
    assert result["perplexity"] == pytest.approx(math.exp(expected))
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2))
    every = evaluation.evaluate(model, tokens, ONE_EACH, windows=0)
    assert every["tokens"] == 12 * 16
    assert evaluation.evaluate(model, tokens, ONE_EACH, windows=99) == every


@pytest.mark.parametrize("stride, batch", [(1, 7), (5, 2), (16, 32)])
def test_stride_counts_every_token_once(model, tokens, stride, batch):
    starts = range(0, len(tokens) - 16, stride)
    losses = [plain(model, tokens[None, s:s + 17])[0, 0 if s == 0 else -stride:] for s in starts]
    result = evaluation.evaluate(model, tokens, ONE_EACH, stride=stride, batch=batch)
    assert result["tokens"] == 16 + stride * (len(starts) - 1)
    assert result["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-12)


def test_bits_per_byte_divides_by_counted_bytes(model):
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abab": 257}
    tokenizer = Tiktoken("pairs", tiktoken.Encoding("pairs", pat_str=r".+", mergeable_ranks=ranks,
                                                          special_tokens={"<|endoftext|>": 258}), 258)
    text = "abab xy ab äöü " * 20
    tokens = tokenizer.encode(text)
    torch.manual_seed(0)
    wide = GPT(GPTConfig(**{**CONFIG.__dict__, "vocab_size": tokenizer.vocab_size}))
    result = evaluation.evaluate(wide, tokens, tokenizer.byte_lengths(), windows=0)
    counted = tokens[1:result["tokens"] + 1]
    bits = result["loss"] * result["tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / sum(len(tokenizer.token_bytes(int(t))) for t in counted))
    assert result["bits_per_byte"] < result["loss"] / math.log(2)


@pytest.mark.parametrize("stride", [17, -1])
def test_bad_strides_and_short_texts_are_refused(model, tokens, stride):
    with pytest.raises(UserError, match=f"--stride {stride} must be between 1 and the context of 16"):
        evaluation.evaluate(model, tokens, ONE_EACH, stride=stride)
    with pytest.raises(UserError, match="16 tokens, one window takes 17"):
        evaluation.evaluate(model, tokens[:16], ONE_EACH)


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for plan in ("scratch", "idea"):
        for seed in (0, 1):
            train.main(train.Train(plan=plan, seed=seed, preset="toy", steps=30, batch_tokens=256, micro_batch=4,
                                   eval_windows=4, out=str(out / f"{plan}-{seed}"), device="cpu",
                                   **({"cuts": 3} if plan == "idea" else {})), quiet=True)
    return out


def evaluated(capsys, folder, **flags):
    """What the command prints, run in this process."""
    evaluation.main(evaluation.Eval(str(folder), device="cpu", **flags))
    return capsys.readouterr().out


def test_the_command_agrees_with_the_records_of_a_run_and_samples(toy_runs, capsys):
    output = evaluated(capsys, toy_runs / "idea-0", windows=4, sample=("def ", "class A"), tokens=20)
    recorded = report.records(toy_runs / "idea-0")["summary"][0]
    assert f"{recorded['val_loss']:.4f} nats per token" in output
    assert f"{recorded['params']:,} parameters" in output
    first, second = output.split("\n\ndef ")[1].split("\n\nclass A")
    assert len(first) >= 10 and len(second) >= 10
    assert load(toy_runs / "idea-0")[0].config.d_ff == (64, 64)


def test_the_command_reads_a_text(toy_runs, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("import os\n" * 50)
    output = evaluated(capsys, toy_runs / "scratch-0", data=(str(tmp_path / "text.txt"),), stride=32)
    assert "text.txt" in output and "nats per token" in output


def test_the_command_counts_the_tokens_that_data_py_counts(toy_runs, tmp_path, capsys):
    """Line ends stay as they are."""
    (tmp_path / "text.txt").write_bytes(b"import os\r\n" * 50)
    tokens = evaluation.read_tokens(str(tmp_path / "text.txt"), open_tokenizer("bytes"))
    corpus = data.load(str(tmp_path / "text.txt"), cache=None)
    assert len(tokens) == 550 == len(corpus.train) + len(corpus.val) - 2         # without their ends of text


def test_rows_are_the_documents_that_data_py_counts(tmp_path):
    texts = ["import os\r\n" * 9, "é", "", "def f():\n"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    tokenizer = open_tokenizer("bytes")
    tokens = evaluation.read_tokens(str(tmp_path / "rows.jsonl"), tokenizer)
    end = bytes([tokenizer.eot])
    assert bytes(tokens.tolist()) == b"".join(text.encode() + end for text in texts if text)
    corpus = data.load(str(tmp_path / "rows.jsonl"), cache=None)
    assert sorted(tokens) == sorted([*corpus.train[:], *corpus.val[:]])
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number}.txt").write_bytes(text.encode())
    assert evaluation.read_tokens(str(tmp_path / "folder"), tokenizer).tolist() == tokens.tolist()
    for content, sentence in (('{"text": ""}\n', "holds no text"), ('{"x": 1}\n', "rows.jsonl:1 has no text in field")):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(UserError, match=sentence):
            evaluation.read_tokens(str(tmp_path / "rows.jsonl"), tokenizer)


def test_of_chats_the_answers_count(tmp_path):
    """As data.py marks them; and no line of a chat is continued."""
    tokenizer = open_tokenizer("bytes")
    rows = [{"prompt": "two", "completion": answer} for answer in ("2", "zwei")]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = evaluation.read_tokens(str(file), tokenizer)
    counted = bytes(tokens[tokens < data.CONTEXT_ONLY].tolist())
    end = bytes([tokenizer.eot])
    assert counted == b"2" + end + b"zwei" + end and len(tokens) == len(counted) + 6
    with pytest.raises(UserError, match="holds chats, and --probe continues lines"):
        evaluation.read_lines(str(file))


def test_what_the_answers_need_is_refused_before_the_first_question(tmp_path, model, capsys, monkeypatch):
    save(tmp_path / "m.pt", model, run={"tokenizer": "bytes"})
    (tmp_path / "chats.jsonl").write_text('{"prompt": "two", "completion": "2"}\n' * 2)
    monkeypatch.setattr(questions, "print_choices", lambda *_: 1 / 0)
    for flags, sentence in ((dict(probe=True, data=(str(tmp_path / "chats.jsonl"),)), "holds chats, and --probe"),
                            (dict(against=str(tmp_path / "nothing.pt")), "no checkpoint at .*nothing.pt")):
        with pytest.raises(UserError, match=sentence):
            evaluated(capsys, tmp_path / "m.pt", multiple_choice=("own",), **flags)


def test_several_texts_in_windows_of_2048_where_they_are_long_enough(tmp_path, model, capsys, monkeypatch):
    save(tmp_path / "m.pt", GPT(GPTConfig(**{**CONFIG.__dict__, "block_size": 64})), run={"tokenizer": "bytes"})
    monkeypatch.setattr(evaluation, "WINDOW", 32)
    for name, repeats in (("long.txt", 50), ("short.txt", 2)):
        (tmp_path / name).write_text("import os\n" * repeats)
    names = (str(tmp_path / "long.txt"), str(tmp_path / "short.txt"))
    lines = [line for line in evaluated(capsys, tmp_path / "m.pt", data=names).splitlines() if "windows of" in line]
    assert "long.txt, 480 tokens in windows of 32" in lines[0]
    assert "short.txt, 19 tokens in windows of 19" in lines[1]
    assert "windows of 16," in evaluated(capsys, tmp_path / "m.pt", data=names, block_size=16)
    with pytest.raises(UserError, match="the text has 20 tokens, one window takes 65"):
        evaluated(capsys, tmp_path / "m.pt", data=names, block_size=64)


def test_the_hold_out_is_read_in_the_windows_of_training(tmp_path, model, capsys):
    """A given model may have a longer context."""
    corpus = data.load("stdlib")
    run = {"tokenizer": "bytes", "data": "stdlib", "fingerprint": corpus.fingerprint, "block_size": 8}
    save(tmp_path / "m.pt", model, run=run)
    assert "24 tokens in windows of 8," in evaluated(capsys, tmp_path / "m.pt", windows=3)
    assert "48 tokens in windows of 16," in evaluated(capsys, tmp_path / "m.pt", windows=3, block_size=16)
    save(tmp_path / "old.pt", model, run=run | {"block_size": None})
    assert "48 tokens in windows of 16," in evaluated(capsys, tmp_path / "old.pt", windows=3)


def test_two_models_are_compared_question_by_question(tmp_path, capsys):
    config = GPTConfig(**{**CONFIG.__dict__, "block_size": 1024})
    some = questions.read_questions("own")[:50]
    models = {}
    for seed, name in enumerate(("cut", "dense")):
        torch.manual_seed(seed)
        models[name] = GPT(config)
        save(tmp_path / name, models[name], run={"tokenizer": "bytes"})
    output = evaluated(capsys, tmp_path / "cut", against=str(tmp_path / "dense"), multiple_choice=("own",), limit=50,
                       probe=True)
    correct = {}
    for name in models:
        answered = questions.multiple_choice(models[name], open_tokenizer("bytes"), some)
        assert answered["acc_norm"] == sum(answered["correct"]["acc_norm"]) / 50
        correct[name] = answered["correct"]["acc_norm"]
    pair = statistics.paired(correct["cut"], correct["dense"])
    table = output.split("paired with")[1]
    line, = [line for line in table.splitlines() if line.startswith("own acc_norm")]
    assert f"{pair.difference.value:+.3f} [{pair.difference.low:+.3f}, {pair.difference.high:+.3f}]" in line
    assert line.endswith(f"{pair.gained:6}  {pair.lost:4}") and pair.gained and pair.lost
    assert [line.split()[1] for line in table.splitlines() if line.startswith("probe")] == \
        ["sums", "copying", "brackets", "phrases"]


REFUSALS = [("none", {}, "no checkpoint at"), ("text.txt", {}, "is not a checkpoint"),
            ("idea-0", {"data": "binary"}, "not UTF-8"), ("idea-0", {"dtype": "int8"}, "--dtype 'int8' is not one of"),
            ("idea-0", {"sample": ("x",), "temperature": math.nan}, "must be finite"),
            ("idea-0", {"sample": ("x",), "seed": -1}, "--seed -1 must be between"),
            ("idea-0", {"sample": ("x", "")}, "at least one token")]


@pytest.mark.parametrize("name, flags, sentence", REFUSALS)
def test_the_command_refuses_in_a_sentence(toy_runs, tmp_path, name, flags, sentence):
    (tmp_path / "text.txt").write_text("import os\n" * 50)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    if "data" in flags:
        flags = {"data": (str(tmp_path / flags["data"]),)}
    folder = tmp_path if name == "text.txt" else toy_runs
    with pytest.raises(UserError, match=sentence) as refusal:
        evaluation.main(evaluation.Eval(str(folder / name), device="cpu", **flags))
    assert "\n" not in str(refusal.value)


def test_the_command_line_ends_with_one_sentence_and_code_2(toy_runs):
    command = [sys.executable, str(ROOT / "eval.py"), str(toy_runs / "idea-0"), "--data", "gone"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and "No such file" in process.stderr and "Traceback" not in process.stderr


def test_a_report_pairs_runs_by_seed_and_draws(toy_runs):
    table = report.table(sorted(toy_runs.iterdir()))
    loss = {p.name: report.records(p)["summary"][0]["val_loss"] for p in toy_runs.iterdir()}
    row = next(line for line in table.splitlines() if line.startswith("| `idea`"))
    assert f"{loss['idea-0'] - loss['scratch-0']:+.4f}, {loss['idea-1'] - loss['scratch-1']:+.4f}" in row
    assert f"{(loss['idea-0'] + loss['idea-1']) / 2:.4f} ± {abs(loss['idea-0'] - loss['idea-1']) / 2:.4f}" in row
    (toy_runs / "idea-0" / "run.png").unlink()
    assert "recover ends" in report.summary(toy_runs / "idea-0")
    assert (toy_runs / "idea-0" / "run.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="no records of a run"):
        report.table([toy_runs])
    with pytest.raises(UserError, match="--against 'nieve' is none of these plans: idea, "):
        report.table(sorted(toy_runs.iterdir()), "nieve")
    with pytest.raises(UserError, match="give the folder of a run"):
        report.main(report.Report(()))
    with pytest.raises(UserError, match="--against has no effect on one run"):
        report.main(report.Report((str(toy_runs / "idea-0"),), "idea"))


def test_without_matplotlib_a_sentence_replaces_the_picture(toy_runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in report.summary(toy_runs / "idea-1")


def test_records_cut_short_are_continued(tmp_path):
    from common import append_record, read_records
    path = tmp_path / "metrics.jsonl"
    append_record(path, tag="config")
    path.write_text(path.read_text() + '{"tag": "st')
    assert read_records(path) == [{"tag": "config"}]
    append_record(path, tag="step")
    append_record(path, tag="eval")
    assert [r["tag"] for r in read_records(path)] == ["config", "step", "eval"]


def test_the_command_asks_questions_and_refuses_idle_flags(tmp_path, model, capsys):
    save(tmp_path / "m.pt", model.float(), run={"tokenizer": "bytes"})
    rows = [{"query": f"Q{i}", "choices": [" a", " bc", " é"], "gold": i % 3} for i in range(9)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = evaluated(capsys, tmp_path / "m.pt", multiple_choice=[str(tmp_path / "q.jsonl")], limit=7)
    some = questions.read_questions(tmp_path / "q.jsonl")[:7]
    result = questions.multiple_choice(model, open_tokenizer("bytes"), some)
    for metric in ("acc", "acc_norm", "acc_bytes"):
        assert f"{result[metric]:.4f} ± {result[metric + '_stderr']:.4f}" in output
    assert "nats per token" not in output and f"{7:9,}" in output
    for flags, sentence in ((dict(limit=3), "--limit has no effect without --tasks or"),
                            (dict(probe=True, limit=3), "--limit has no effect without --tasks or"),
                            (dict(tasks="x", against="y"), "--against has no effect without --multiple-choice or"),
                            (dict(include_path="x"), "--include-path has no effect without --tasks"),
                            (dict(multiple_choice=["x"], num_fewshot=1), "--num-fewshot has no effect without --tasks"),
                            (dict(multiple_choice=["x"], stride=2), "--stride has no effect on questions without"),
                            (dict(data=("x",), windows=3), "--windows has no effect with --data or --stride"),
                            (dict(seed=3), "--seed has no effect without --sample"),
                            (dict(multiple_choice=["x"], limit=0), "--limit 0 must be at least 1"),
                            (dict(tasks="x", num_fewshot=-1), "--num-fewshot -1 must be at least 0")):
        with pytest.raises(UserError, match=sentence):
            evaluated(capsys, tmp_path / "m.pt", **flags)


@pytest.mark.parametrize("stored, fast, flag, dtype", [
    ("bfloat16", True, "auto", "bfloat16"), ("bfloat16", False, "auto", "float32"),
    ("float16", True, "auto", "float32"), ("float16", False, "auto", "float32"),
    ("float32", True, "auto", "float32"), ("float32", False, "bfloat16", "bfloat16"),
    ("bfloat16", True, "float32", "float32")])
def test_the_dtype_is_chosen_by_weights_and_hardware_and_printed(tmp_path, model, capsys, monkeypatch,
                                                                 stored, fast, flag, dtype):
    monkeypatch.setattr(evaluation, "has_fast_bfloat16", lambda device: fast)
    save(tmp_path / "m.pt", model.to(getattr(torch, stored)), run={"tokenizer": "bytes"})
    (tmp_path / "text.txt").write_text("import os\n" * 50)
    (tmp_path / "q.jsonl").write_text('{"query": "Q", "choices": [" a", " b"], "gold": 0}\n')
    output = evaluated(capsys, tmp_path / "m.pt", data=(str(tmp_path / "text.txt"),), dtype=flag,
                       multiple_choice=[str(tmp_path / "q.jsonl")])
    assert f"m.pt, {dtype}:\nfile" in output and f"tokens in windows of 16, {dtype}\n" in output
    exact = evaluation.evaluate(load(tmp_path / "m.pt", dtype=torch.float32)[0],
                                np.frombuffer(b"import os\n" * 50, dtype=np.uint8), ONE_EACH, windows=0)["loss"]
    loss = float(output.split(" nats per token")[0].split()[-1])
    assert loss == pytest.approx(exact, rel=1e-6 if dtype == "float32" else 2e-3)


def test_progress_is_said_every_5_seconds_in_a_log(monkeypatch, capsys):
    seconds = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    def lines(items, name):
        for _ in progress(range(items), name):
            seconds[0] += 1
        return [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert not lines(4, "short")
    assert 3 <= len(lines(20, "long")) <= 4


def test_eval_imports_tasks_only_inside_main():
    top = ast.parse((ROOT / "eval.py").read_text()).body
    assert not any(node.module.startswith("tasks") for node in top if isinstance(node, ast.ImportFrom))

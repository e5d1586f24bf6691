"""Nothing lost, nothing silent: damaged checkpoints and records, full disks, two processes in one folder, signals."""
import dataclasses
import errno
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import ENVIRONMENT, ROOT, TORCHRUN, result, same, start, toy, train_toy

import checkpoint
import common
import eval as evaluation
import export
import model as models
import prune
import report
import train
from common import UserError, read_records, write_atomic
from formats import huggingface, pt
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig
from tasks import questions

MODEL = GPTConfig(64, 16, 16, 8, (2, 2), (1, 1), (24, 24))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train_toy(out, plan="idea")
    return result(out)


def flip(file, position):
    """Turn one bit of a file over."""
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def a_tensor_in(file):
    """A position in the file where weights lie: the last third of a checkpoint is tensors."""
    return file.stat().st_size * 2 // 3


# -- checkpoints

@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_newest_checkpoint_makes_room_and_the_run_is_the_same(tmp_path, whole, capsys, damage):
    train_toy(tmp_path / "run", plan="idea")
    newest = checkpoint.newest(tmp_path / "run")
    if damage == "flipped":
        flip(newest, a_tensor_in(newest))
    else:
        newest.write_bytes(newest.read_bytes()[:5000 if damage == "truncated" else 0])
    train_toy(tmp_path / "run", plan="idea")
    warning = capsys.readouterr().err
    assert newest.name in warning and "going on from ckpt_00000056.pt" in warning
    assert same(result(tmp_path / "run"), whole)
    assert newest.with_suffix(".damaged").exists()


def test_where_both_checkpoints_are_damaged_one_sentence_names_both_and_nothing_is_changed(tmp_path):
    train_toy(tmp_path / "run", plan="idea")
    files = checkpoint.checkpoints(tmp_path / "run")
    for file in files:
        flip(file, a_tensor_in(file))
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=f"{files[1].name} is damaged.*{files[0].name} is damaged.*restore") as refusal:
        train_toy(tmp_path / "run", plan="idea")
    assert "\n" not in str(refusal.value)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_no_flipped_bit_of_a_checkpoint_is_silent(tmp_path):
    """Each flip is refused in a sentence, or changes nothing that is read."""
    file = tmp_path / "model.pt"
    state = {"step": 7, "seconds": {"train": 1.5}, "alive": [(0, "ffn", torch.arange(24))], "flags": [True, None, "x"]}
    checkpoint.save(file, GPT(MODEL), **state)
    content = file.read_bytes()
    model, about = checkpoint.load(file)
    digest = pt.digest_of({"model": model.state_dict(), **about})
    dice = random.Random(0)
    refused = 0
    for _ in range(300):
        file.write_bytes(content)
        flip(file, dice.randrange(len(content)))
        try:
            model, about = checkpoint.load(file)
        except UserError as refusal:
            assert "\n" not in str(refusal)
            refused += 1
        else:
            assert pt.digest_of({"model": model.state_dict(), **about}) == digest
    assert refused > 150


def test_a_checkpoint_from_before_digests_is_read(tmp_path):
    checkpoint.save(tmp_path / "model.pt", GPT(MODEL), step=1)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    del content["digest"]
    torch.save(content, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt")[1]["step"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_tensor_s_name(tmp_path, value):
    model = GPT(MODEL)
    model.blocks[1].ffn.up.weight.data[3, 5] = value
    checkpoint.save(tmp_path / "model.pt", model)
    with pytest.raises(UserError, match=r"1 of 384 values of blocks\.1\.ffn\.up\.weight are infinite or not a number"):
        checkpoint.load(tmp_path / "model.pt")


def test_a_checkpoint_that_is_no_run_s_is_refused_in_a_sentence(tmp_path):
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    newest = checkpoint.newest(tmp_path / "run")
    for broken in ("alive", "optimizer", "judged", "step", "window", "flops"):
        model, about = checkpoint.load(newest)
        good = newest.read_bytes()
        about[broken] = {"alive": 3, "optimizer": {}}.get(broken)
        if broken not in ("alive", "optimizer"):
            del about[broken]
        checkpoint.save(newest, model, **about)
        with pytest.raises(UserError, match="does not hold the state of a run"):
            train_toy(tmp_path / "run", plan="scratch", steps=10)
        newest.write_bytes(good)


@pytest.mark.parametrize("problem", [RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"),
                                     OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_is_a_sentence_with_the_bytes_and_keeps_what_was_there(tmp_path, monkeypatch, problem):
    file = tmp_path / "model.pt"
    checkpoint.save(file, GPT(MODEL), step=1)

    def full(content, target):
        target.write(b"half of it")
        raise problem

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"model.pt was not written \(.*\): it needs [\d,]+ bytes and [\d,]+ are free"):
        checkpoint.save(file, GPT(MODEL), step=2)
    monkeypatch.undo()
    assert checkpoint.load(file)[1]["step"] == 1 and [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_temporary_file_follows_no_planted_link(tmp_path, monkeypatch):
    monkeypatch.setattr(common.secrets, "token_hex", lambda _: "known")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".target.known.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "target", lambda file: file.write(b"x"))
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "target").exists()


@pytest.fixture
def in_background(monkeypatch):
    """Checkpoints are written as where a GPU trains, and slowly."""
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "saves_in_background", lambda model: True)
    monkeypatch.setattr(checkpoint, "write", lambda *args: time.sleep(0.03) or write(*args))


def test_checkpoints_written_in_the_background_are_the_same(tmp_path, whole, in_background):
    """Both: what the newer one holds did not get into the older one while that was written."""
    train_toy(tmp_path / "run", plan="idea")
    assert same(result(tmp_path / "run"), whole)
    newest = checkpoint.newest(tmp_path / "run")
    newest.unlink()
    train_toy(tmp_path / "run", plan="idea")
    assert same(result(tmp_path / "run"), whole) and newest.exists()


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path, in_background, monkeypatch):
    seen = []
    write_and_rotate = checkpoint.RunFolder.write_and_rotate

    def spy(folder, path, content):
        write_and_rotate(folder, path, content)
        seen.append((content["step"], state.step))

    setup, state = train.prepare(train.Train(**toy("scratch", steps=60, save_every=30), out=str(tmp_path / "run")))
    monkeypatch.setattr(train, "prepare", lambda _: (setup, state))
    monkeypatch.setattr(checkpoint.RunFolder, "write_and_rotate", spy)
    train.main(setup.config, quiet=True)
    (first, during_first), (second, during_second), (last, at_the_end) = seen
    assert (first, second, last) == (0, 30, 60) and 0 < during_first <= 30 < during_second <= 60 == at_the_end


def test_an_error_of_the_loop_waits_for_the_checkpoint_and_is_the_one_to_be_told(tmp_path, in_background, monkeypatch):
    def fail(*args):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(train, "score_units", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train_toy(tmp_path / "run", plan="idea")
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 30


# -- records

def test_damaged_and_missing_records_are_named_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    train_toy(out, plan="idea", stage="prune")
    metrics = out / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    cases = {
        "line 5 of .*metrics.jsonl is damaged": [*lines[:4], b'{"tag": "st\xff\n', *lines[5:]],
        f"has {len(lines) - 2} of the {len(lines) - 1} records": [*lines[:4], *lines[5:]],
        f"has other than the {len(lines) - 1} records": [*lines[:4], lines[4].replace(b"2", b"3"), *lines[5:]],
        f"has 0 of the {len(lines) - 1} records": [],
    }
    for sentence, damaged in cases.items():
        metrics.write_bytes(b"".join(damaged))
        with pytest.raises(UserError, match=sentence) as refusal:
            train_toy(out, plan="idea")
        assert "\n" not in str(refusal.value) and metrics.read_bytes() == b"".join(damaged)
    metrics.unlink()
    with pytest.raises(UserError, match=f"has 0 of the {len(lines) - 1} records"):
        train_toy(out, plan="idea")


def test_what_is_no_record_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"tag": "config"}\n[1, 2]\n')
    with pytest.raises(UserError, match=r"line 2 of .*records.jsonl is no record but '\[1, 2\]'"):
        read_records(tmp_path / "records.jsonl")
    (tmp_path / "records.jsonl").write_text('{"a": ' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match="line 1 of .*records.jsonl is damaged"):
        read_records(tmp_path / "records.jsonl")


# -- numbers, tokenizers and teachers that do not fit

def saved(path, vocab_size=256, dtype=torch.float32, change=None, **about):
    """A checkpoint of a toy model whose tokenizer is the bytes; -> its path."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(models.preset("toy", 256)[0], vocab_size=vocab_size)).to(dtype)
    if change is not None:
        model.blocks[1].ffn.up.weight.data[3, 5] = change
    checkpoint.save(path, model, run={"tokenizer": "bytes", **about})
    return str(path)


def as_folder(path, out):
    """The same model as a Hugging Face folder."""
    model, _ = checkpoint.load(path)
    out.mkdir()
    huggingface.save(out, model, "llama", open_tokenizer("bytes").as_files())
    return str(out)


def refused(sentence, function, *args):
    with pytest.raises(UserError, match=sentence) as refusal:
        function(*args)
    assert "\n" not in str(refusal.value)


def test_a_teacher_that_is_not_finite_says_so_with_the_tensor_s_name(tmp_path):
    good = as_folder(saved(tmp_path / "m.pt"), tmp_path / "hf")
    weights = load_file(f"{good}/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, f"{good}/model.safetensors", metadata={"format": "pt"})
    for teacher, name in ((good, r"model\.layers\.1\.mlp\.up_proj\.weight"),
                          (saved(tmp_path / "nan.pt", change=float("nan")), r"blocks\.1\.ffn\.up\.weight")):
        refused(f"1 of 2,048 values of {name} are infinite or not a number", lambda path=teacher: train_toy(
            tmp_path / "run", plan="kd", teacher=path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("stored, value, dtype", [(torch.bfloat16, 70_000., "float16"), (torch.float64, 1e39, "auto")])
def test_a_value_beyond_the_dtype_of_an_export_says_so(tmp_path, to, stored, value, dtype):
    ours = saved(tmp_path / "m.pt", dtype=stored, change=value)
    sources = [ours, as_folder(ours, tmp_path / "folder")]
    for source in sources:
        config = export.Export(source, str(tmp_path / "out"), to, dtype)
        refused("up.*weight has a value of size (7|1e).*, and float(16|32) ends at .*; give", export.main, config)
    assert not (tmp_path / "out").exists()
    for value in (65504., -65504.):
        fits = saved(tmp_path / "fits.pt", change=value)
        assert checkpoint.load(fits, dtype=torch.float16)[0].blocks[1].ffn.up.weight[3, 5] == value


def test_a_config_of_endless_layers_is_refused_before_memory_goes(tmp_path):
    folder = as_folder(saved(tmp_path / "m.pt"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, sentence in ((dict(num_hidden_layers=10**9), "garbles num_hidden_layers, 1,000,000,000"),
                             (dict(vocab_size=10**12), "vocab_size is 1000000000000, and must be a whole number"),
                             (dict(max_position_embeddings=math.inf), "garbles cannot convert float infinity"),
                             (dict(rope_theta=-1.), "rope_theta is -1.0"), (dict(rms_norm_eps=0), "norm_eps is 0.0")):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
        refused(f"hf.*{sentence}", checkpoint.load, folder)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    del content["digest"]
    content["config"]["d_ff"] = (2**40, 64)
    torch.save(content, tmp_path / "m.pt")
    refused("m.pt: d_ff is 1099511627776, and must be", checkpoint.load, tmp_path / "m.pt")


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_every_command(tmp_path):
    ours = saved(tmp_path / "m.pt", vocab_size=200, data="stdlib")
    (tmp_path / "q.jsonl").write_text(questions.LINE)
    out = str(tmp_path / "out")
    for source in (ours, as_folder(ours, tmp_path / "hf")):
        commands = {
            "train": lambda path=source: train_toy(out, plan="scratch", init=path, preset="laptop"),
            "prune": lambda path=source: prune.main(prune.Prune(path, out=out, device="cpu")),
            "eval": lambda path=source: evaluation.main(
                evaluation.Eval(path, multiple_choice=(str(tmp_path / "q.jsonl"),), device="cpu")),
            "hf": lambda path=source: export.main(export.Export(path, out)),
            "gguf": lambda path=source: export.main(export.Export(path, out, "gguf"))}
        for command in commands.values():
            refused("the tokenizer .* has ids up to 255, the embedding of .* 200 rows; take the tokenizer", command)
    assert not (tmp_path / "out").exists()


def test_a_teacher_may_have_other_padding_rows(tmp_path):
    """The run with a padded teacher is, bit for bit, that with the teacher whose padding was cut off."""
    padded = saved(tmp_path / "padded.pt", vocab_size=300)
    model, about = checkpoint.load(padded)
    checkpoint.save(tmp_path / "cut.pt", checkpoint.without_padding(model, 256), run=about["run"])
    runs = []
    for teacher in ("padded", "cut"):
        settings = dict(plan="kd", teacher=str(tmp_path / f"{teacher}.pt"), drop_teacher=False, steps=10)
        setup, state = train_toy(tmp_path / teacher, **settings)
        assert state.teacher.config.vocab_size == 256
        runs.append([p for p in state.model.parameters()])
        assert all(record["kl"] > 0 for record in read_records(tmp_path / teacher / "metrics.jsonl")
                   if record["tag"] == "step")
    assert same(*runs)
    # A student with padding of its own, and the other way round.
    for student, teacher in ((260, "padded"), (300, "cut")):
        init = saved(tmp_path / f"student-{student}.pt", vocab_size=student)
        setup, state = train_toy(tmp_path / f"run-{student}", plan="kd", teacher=str(tmp_path / f"{teacher}.pt"),
                                 drop_teacher=False, steps=10, init=init, preset="laptop", weight_decay=0.)
        start, _ = checkpoint.load(init)
        assert torch.equal(state.model.embed.weight[256:], start.embed.weight[256:])
        assert not torch.equal(state.model.embed.weight[:256], start.embed.weight[:256])


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    files = dict(open_tokenizer("bytes").as_files())
    content = json.loads(files["tokenizer.json"])
    content["model"]["vocab"] = {text: 255 - token for text, token in content["model"]["vocab"].items()}
    files["tokenizer.json"] = json.dumps(content)
    model = GPT(dataclasses.replace(models.preset("toy", 256)[0], vocab_size=300))
    (tmp_path / "hf").mkdir()
    huggingface.save(tmp_path / "hf", model, "llama", files)
    refused("the teacher .* tokens of .*, the student those of 'bytes'; give a teacher with the same tokenizer",
            lambda: train_toy(tmp_path / "run", plan="kd", teacher=str(tmp_path / "hf")))


# -- flags and what is printed

@dataclasses.dataclass(frozen=True)
class Flags:
    name: str
    out: str | None = None
    files: tuple[str, ...] = ()
    text: str | None = None
    number: float = 1.


def test_an_empty_value_is_a_sentence_and_text_may_be_empty(capsys):
    for words, sentence in (([""], "error: name is empty"),
                            (["x", "--out", ""], "error: --out is empty; give a value or"),
                            (["x", "--files", "a", ""], "error: --files is empty")):
        with pytest.raises(SystemExit) as end:
            common.parse(Flags, words, verbatim=["text"])
        errors = capsys.readouterr().err
        assert end.value.code == 2 and errors.startswith(sentence) and len(errors.splitlines()) == 1
    assert common.parse(Flags, ["x", "--text", ""], verbatim=["text"]).text == ""


def test_the_home_folder_is_expanded_in_paths_and_not_in_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    config = common.parse(Flags, ["~/a", "--out=~/b", "--files", "~/c", "d~/e", "--text=~/f"], verbatim=["text"])
    assert config == Flags("/home/of/somebody/a", "/home/of/somebody/b", ("/home/of/somebody/c", "d~/e"), "~/f")


@pytest.mark.parametrize("number", [0, -1., float("nan"), float("inf")])
def test_what_must_be_positive_is(number):
    refused(f"--number {number} must be positive and finite", common.check_positive, Flags("x", number=number),
            ["number"])
    common.check_positive(Flags("x"), ["number", "out"])


@pytest.mark.parametrize("problem", [MemoryError(),
                                     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                     torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_too_little_memory_is_a_sentence(capsys, problem):
    def work():
        raise problem

    with pytest.raises(SystemExit) as end:
        common.run(work)
    assert end.value.code == 2 and "memory" in capsys.readouterr().err
    problem = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        common.run(work)


HOSTILE = "a\x1b[2Jb\r\x9b31m\u202ec\ud800"
SPELLED = r"a\x1b[2Jb\r\x9b31m\u202ec\ud800"


def test_control_characters_are_spelled_out_in_all_that_is_printed(tmp_path, monkeypatch, capsys):
    assert common.printable(HOSTILE) == SPELLED
    assert common.printable("tab\tline\nénaïve 日本\u3000🙂\u200d") == "tab\tline\nénaïve 日本\u3000🙂\u200d"
    with pytest.raises(SystemExit):
        common.stop(f"no file {HOSTILE}")
    assert SPELLED in capsys.readouterr().err

    train_toy(tmp_path / "run", plan="scratch", steps=10)
    metrics = tmp_path / "run" / "metrics.jsonl"
    records = read_records(metrics)
    for record in records:
        record |= {key: HOSTILE for key in ("text", "plan", "when") if key in record}
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    report.main(report.Report((str(tmp_path / "run"),)))
    printed = capsys.readouterr().out
    assert printed.count(SPELLED) == 3 and "\x1b" not in printed
    path = saved(tmp_path / "m.pt")
    monkeypatch.setattr(evaluation, "sample", lambda *_: [HOSTILE])
    monkeypatch.setattr(evaluation, "print_loss", lambda *_: None)
    evaluation.main(evaluation.Eval(path, sample=("def ",), device="cpu"))
    assert f"def {SPELLED}" in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    ("eval.py MODEL --tasks=", "--tasks is empty"), ("prune.py --init MODEL --out=", "--out is empty"),
    ("train.py --size-curve=", "'' for argument '--size-curve'"),
    ("prune.py --init MODEL --structure ffn,ffn", "--structure 'ffn,ffn' must be"),
    ("-m experiments.claims --quick --minutes nan", "--minutes nan must be positive"),
    ("-m experiments.claims --quick --device cuda:99", "'cuda:99' is not available here"),
    ("-m experiments.claims report --results nope", "there is no file nope; correct --results"),
    ("-m experiments.scaling run --preset toy --minutes nan", "--minutes nan must be positive"),
    ("-m experiments.scaling run --preset toy --batch-tokens 0", "--batch-tokens 0 must be positive"),
    ("-m experiments.scaling run --preset toy --micro-batch 3", "8x32-0: --batch-tokens 512 is not a multiple of 3"),
    ("-m experiments.scaling run --preset toy --device cuda:99", "'cuda:99' is not available here"),
    ("-m experiments.compare MODEL --part questions", "--part questions needs --questions"),
    ("-m experiments.compare MODEL --questions gone", "No such file or directory (gone)"),
    ("-m experiments.smollm2 check MODEL --keep 2", "--keep 2.0 must be between 0 and 1")])
def test_a_long_command_refuses_its_flags_before_it_works(tmp_path, words, sentence):
    program, *flags = words.replace("MODEL", "model.pt").split()
    program = [program] if program == "-m" else [str(ROOT / program)]
    done = subprocess.run([sys.executable, *program, *flags], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# -- processes and signals

SMALL_CUT = dict(windows=4, eval_windows=4, block_size=32, device="cpu")


def test_prune_holds_its_folder_and_finds_what_a_killed_process_left(tmp_path):
    out = tmp_path / "cut"
    recipe = prune.Prune(saved(tmp_path / "m.pt"), out=str(out), **SMALL_CUT)
    with checkpoint.locked(out):
        refused("another process works in .*cut and holds", prune.main, recipe)
    assert not out.exists()
    out.mkdir()
    for name in (".lock", ".ckpt_00000000.pt.0123456789abcdef.tmp"):
        (out / name).write_text("")
    prune.main(recipe)
    assert sorted(file.name for file in out.iterdir()) == [".lock", "ckpt_00000000.pt", "widths.png"]
    refused("is there already; give another --out or delete it", prune.main, recipe)


def test_prune_touches_no_folder_of_somebody_else(tmp_path):
    for name in ("notes.txt", ".notes.tmp"):
        out = tmp_path / name.strip(".")
        out.mkdir()
        (out / name).write_text("precious")
        refused("is there already", prune.main, prune.Prune("m.pt", out=str(out), **SMALL_CUT))
        with checkpoint.locked(out):
            pass
        assert (out / name).read_text() == "precious"
    refused("is there already", prune.main, prune.Prune("m.pt", out=str(tmp_path / "notes.txt" / "notes.txt")))


@pytest.mark.parametrize("structure", [{}, dict(structure="layer", score="influence"), dict(allocate="measured")])
def test_a_cut_that_leaves_nothing_is_refused(tmp_path, structure):
    recipe = prune.Prune(saved(tmp_path / "m.pt"), keep=1e-9, out=str(tmp_path / "cut"), **SMALL_CUT, **structure)
    refused("a budget of 0 params keeps no unit of any layer; keep more than 1e-09", prune.main, recipe)
    recipe = prune.Prune(recipe.init, multiple_of=65, out=recipe.out, **SMALL_CUT)
    refused("--multiple-of 65 is more than the 64 neurons of the widest layer", prune.main, recipe)
    assert not (tmp_path / "cut").exists()

def test_two_processes_cannot_work_in_one_folder(tmp_path, whole):
    first = start(plan="idea", out=tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.005)
    second = start(plan="idea", out=tmp_path / "run")
    _, errors = second.communicate()
    assert second.returncode == 2 and "another process works in" in errors and "Traceback" not in errors
    assert first.wait() == 0, first.stderr.read()
    assert same(result(tmp_path / "run"), whole)


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".ckpt_00000007.pt.0123456789abcdef.tmp").write_text("half of it")
    train_toy(tmp_path / "run", plan="scratch", steps=10)
    assert not list((tmp_path / "run").glob(".*.tmp"))


BACKGROUND = ("import checkpoint, common, train\ncheckpoint.saves_in_background = lambda model: True\n"
              "common.run(train.main, common.parse(train.Train))\n")


def launcher(folder, background):
    """What starts train.py, and lets it save as where a GPU trains."""
    if not background:
        return ()
    (folder / "background.py").write_text(BACKGROUND)
    return sys.executable, folder / "background.py"


@pytest.mark.parametrize("background", [False, True])
def test_sighup_saves_like_sigterm(tmp_path, whole, background):
    out = tmp_path / "run"
    process = start(*launcher(tmp_path, background), plan="idea", out=out)
    while not any(record["tag"] == "step" for record in read_records(out / "metrics.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    printed, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP and "the same command goes on" in printed
    train_toy(out, plan="idea")
    assert same(result(out), whole)


def test_ctrl_c_before_the_loop_is_one_line(tmp_path):
    process = start(plan="idea", out=tmp_path / "run")
    while not (tmp_path / "run" / ".lock").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    # The loop may have been reached: then it saves, says so and ends with the same code.
    assert process.returncode == 130 and "Traceback" not in errors


def test_processes_with_folders_of_their_own_are_refused(tmp_path):
    """As on two nodes without a common file system: the first process has a checkpoint, the second one has none."""
    code = ("import os, sys; os.chdir(sys.argv.pop(1) + os.environ['RANK']); sys.path.insert(0, sys.argv.pop(1)); "
            "import common, train; common.run(train.main, common.parse(train.Train))")
    for rank in "01":
        (tmp_path / f"node{rank}").mkdir()
    train_toy(tmp_path / "node0" / "run", plan="idea", stage="enlarge")
    (tmp_path / "both.py").write_text(code)
    settings = toy(plan="idea", out="run")
    words = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    done = subprocess.run([*TORCHRUN, tmp_path / "both.py", tmp_path / "node", ROOT, *words], env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "the 2 processes resume at steps 0, 30" in done.stderr
    assert "on a file system that all of them share" in done.stderr
    assert [path.name for path in (tmp_path / "node1").iterdir()] == []


@pytest.mark.parametrize("background", [False, True])
def test_kills_during_saves_and_rotation_lose_nothing(tmp_path, background):
    """A checkpoint every step, killed at random moments. `python tests/test_faults.py 200 0` does it 200 times."""
    kill_often(tmp_path / "run", times=4, seed=0, background=background)
    train_toy(tmp_path / "whole", plan="idea", save_every=1)
    assert same(result(tmp_path / "run"), result(tmp_path / "whole"))


def kill_often(out, times, seed, background):
    """Start the run again and again and kill it at random moments; then let it end."""
    dice = random.Random(seed)
    settings = dict(plan="idea", out=out, save_every=1)
    command = launcher(Path(out).parent, background)
    for _ in range(times):
        process = start(*command, **settings)
        seen = len(checkpoint.checkpoints(out)) and checkpoint.newest(out).name
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            newest = checkpoint.newest(out)
            if newest is not None and newest.name != seen:
                break
            time.sleep(0.001)
        time.sleep(dice.random() * 0.1)
        process.kill()
        process.communicate()
    process = start(*command, **settings)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_a_damaged_run_folder_is_refused_in_a_sentence_or_ends_the_same(tmp_path, whole):
    """`python tests/test_faults.py 0 100` damages a hundred."""
    assert sum(damage_often(tmp_path, whole, times=5, seed=0).values()) == 5


def damage_often(folder, whole, times, seed):
    """Damage a file of a run that is half done, and go on: -> {what came of it: how often}."""
    dice = random.Random(seed)
    train_toy(Path(folder) / "half", plan="idea", stage="prune")
    outcomes = {"refused": 0, "the same end": 0}
    for number in range(times):
        out = Path(folder) / f"damaged-{number}"
        shutil.copytree(Path(folder) / "half", out)
        file = dice.choice([path for path in sorted(out.iterdir()) if path.name != ".lock"])
        size = file.stat().st_size
        way = dice.choice(["flip", "truncate", "remove", "zeros"])
        if way == "flip":
            flip(file, dice.randrange(size))
        elif way == "truncate":
            file.write_bytes(file.read_bytes()[:dice.randrange(size)])
        elif way == "remove":
            file.unlink()
        else:
            start = dice.randrange(size)
            content = bytearray(file.read_bytes())
            content[start:start + 512] = bytes(len(content[start:start + 512]))
            file.write_bytes(content)
        try:
            train_toy(out, plan="idea")
        except UserError as refusal:
            assert "\n" not in str(refusal)
            outcomes["refused"] += 1
        else:
            assert same(result(out), whole), (file.name, way)
            outcomes["the same end"] += 1
        shutil.rmtree(out)
    return outcomes


if __name__ == "__main__":
    import tempfile
    kills, damages = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        train_toy(f"{place}/whole", plan="idea")
        print(f"{damages} damaged run folders:", damage_often(place, result(f"{place}/whole"), damages, seed=1))
        train_toy(f"{place}/saved", plan="idea", save_every=1)
        for background in (False, True):
            out = Path(place) / f"run-{background}"
            kill_often(out, kills // 2, seed=1, background=background)
            assert same(result(out), result(f"{place}/saved"))
        print(f"killed {kills} times, and bit for bit the run that was not")

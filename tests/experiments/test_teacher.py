"""A cached teacher: its records are the model's own likeliest tokens, and a run reads those of its samples."""
import json
import shutil

import numpy as np
import pytest
import torch

import checkpoint
import data
import distill
import model as models
import train
from common import Damaged, UserError, read_records
from experiments import teacher
from formats import huggingface, top_k
from formats.tokenizer import open_tokenizer
from model import GPT

T, V, K = 32, 256, 8
TOKENS = 24 * T
RUN = dict(plan="recover", block_size=T, batch_tokens=4 * T, micro_batch=2, steps=6, lr=1e-3, eval_windows=2,
           dtype="float32", device="cpu", drop_teacher=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher of bytes with padding rows, what it says of 24 samples (all of it, and its 8 likeliest tokens), and a
    student."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    for name, padding in (("model", 4), ("student", 8)):
        torch.manual_seed(padding)
        model = GPT(models.GPTConfig(V + padding, 2 * T, 32, 8, (4, 2), (2, 1), (24, 40)))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() == 2 else 1)
        (folder / name).mkdir()
        huggingface.save(folder / name, model, "nanoprune", open_tokenizer("bytes").as_files())
    for k in (V, K):
        write(folder, f"top-{k}", top=k)
    return folder


def write(folder, name, **settings):
    settings = {"tokens": TOKENS, "block_size": T, "top": K, "dtype": "float32", "device": "cpu", **settings}
    teacher.main(teacher.Teacher(str(folder / "model"), out=str(folder / name), **settings))


def run(folder, out, cache, **settings):
    settings = {**RUN, **settings, "init": str(folder / "student"), "teacher": str(folder / cache), "out": str(out)}
    return train.main(train.Train(**settings), quiet=True)


def test_records_are_the_model_s_likeliest_tokens(folder):
    model, _ = checkpoint.load(folder / "model")
    corpus = data.load()
    for k in (K, V):
        cache = top_k.CachedTeacher(folder / f"top-{k}")
        assert cache.records.dtype.itemsize == T * (4 * k + 8) + 8
        assert (folder / f"top-{k}" / "teacher.bin").stat().st_size == 24 * cache.records.dtype.itemsize
        for step, micro in ((0, 0), (2, 1)):
            x, y = data.batch(corpus.train, T, 0, step, micro, micro_batch=2, micro_steps=2)
            q = model(x)[..., :V].double().softmax(-1)
            top = cache.read(4 * step + 2 * micro, 2)
            probs, indices = q.topk(k)
            assert torch.equal(top.indices[..., :2], indices[..., :2])
            assert (top.probs.double() - q.gather(-1, top.indices)).abs().max() < 2**-9 and (top.probs > 0).all()
            assert (top.tail - (1 - probs.sum(-1))).abs().max() < 1e-6
            assert (top.probs.sum(-1) + top.tail - 1).abs().max() < 1e-6
            assert (top.target_log_probs - q.gather(-1, y[..., None]).squeeze(-1).log()).abs().max() < 1e-4


def test_a_run_with_all_tokens_cached_is_the_run_with_the_model(folder, tmp_path):
    """Any micro-batch reads the same samples. The cached teacher costs no FLOPs, and is judged by the same numbers."""
    _, live = run(folder, tmp_path / "live", "model")
    _, cached = run(folder, tmp_path / "cached", f"top-{V}", micro_batch=4)
    start, _ = checkpoint.load(folder / "student")
    for before, ours, expected in zip(start.parameters(), cached.model.parameters(), live.model.parameters()):
        assert (ours - expected).norm() < 0.02 * (expected - before).norm()
    assert cached.judged["teacher"] == pytest.approx(live.judged["teacher"], abs=1e-4)
    assert cached.judged["student"] == pytest.approx(live.judged["student"], abs=1e-3)
    setup, few = run(folder, tmp_path / "few", f"top-{K}")
    assert few.flops["executed"] == few.flops["credited"] < live.flops["executed"]
    assert few.judged["teacher"] == pytest.approx(live.judged["teacher"], abs=1e-4)
    assert any("seconds" in record for record in read_records(setup.folder.metrics))     # it came to its end


@pytest.mark.parametrize("world, micro_batch", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_processes_read_the_rows_of_their_batches(folder, world, micro_batch):
    corpus = data.load()
    cache = top_k.CachedTeacher(folder / f"top-{V}")
    config = train.Train(micro_batch=micro_batch, batch_tokens=4 * T, block_size=T)
    seen = []
    for rank in range(world):
        size = models.GPTConfig(V, T, 32, 8, (4,), (2,), (24,))
        setup = train.Setup(config, None, size, size, corpus, None, "cpu", rank, world)
        for micro in range(setup.micro_steps):
            x, y = setup.batch(3, micro)
            _, _, top = train.teacher_reader(setup, cache)(x, 3, micro)
            first = setup.first_sample(3, micro)
            seen += range(first, first + micro_batch)
            log_probs = torch.zeros(micro_batch, T, V).scatter(-1, top.indices, top.probs.log())
            assert (log_probs.gather(-1, y[..., None]).squeeze(-1) - top.target_log_probs).abs().max() < 1e-1
    assert sorted(seen) == [12, 13, 14, 15]


def test_interrupted_and_extended_is_the_whole(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "teacher.bin").write_bytes(b"killed in front of the first index")
    write(tmp_path, "cache", tokens=6 * T)
    before = top_k.CachedTeacher(tmp_path / "cache").fingerprint()
    with open(tmp_path / "cache" / "teacher.bin", "ab") as file:
        file.write(b"part of a record")
    append = top_k.append

    def killed(folder, identity, samples, records):
        if samples == 12:
            raise KeyboardInterrupt
        append(folder, identity, samples, records)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(top_k, "append", killed)
        write(tmp_path, "cache")
    assert top_k.CachedTeacher(tmp_path / "cache").samples == 12
    write(tmp_path, "cache")
    same = [(where / "teacher.bin").read_bytes() for where in (tmp_path / "cache", folder / f"top-{K}")]
    assert same[0] == same[1] and top_k.CachedTeacher(tmp_path / "cache").fingerprint() == before
    write(tmp_path, "cache", tokens=T)                                       # nothing is taken away
    assert top_k.CachedTeacher(tmp_path / "cache").samples == 24
    with pytest.raises(UserError, match="model is there already"):
        write(tmp_path, "model")


@pytest.mark.parametrize("settings, words", [
    (dict(seed=1), "seed is 0 there and 1 here"), (dict(block_size=16), "block_size is 32 there and 16 here"),
    (dict(steps=7), "24 samples of 32 tokens, the run reads 28; go on .* --tokens 896, or give fewer --steps"),
    (dict(data="TEXT"), "fingerprint is"), (dict(kd_temperature=2.), "--kd-temperature 2.0 needs the teacher itself")])
def test_a_cache_of_other_samples_is_refused(folder, tmp_path, settings, words):
    (tmp_path / "text.txt").write_text("x = 1\n" * 200)
    settings = {name: str(tmp_path / "text.txt") if value == "TEXT" else value for name, value in settings.items()}
    with pytest.raises(UserError, match=words) as refusal:
        run(folder, tmp_path / "run", f"top-{K}", **settings)
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("k", [K, V])
def test_the_records_hold_all_but_what_the_tail_hides(folder, k):
    """The formulas on whole logits in float64."""
    given, student = (checkpoint.load(folder / name)[0] for name in ("model", "student"))
    given = checkpoint.without_padding(given, V)
    x, y = data.batch(data.load().train, T, 0, 0, 0, micro_batch=2, micro_steps=1)
    known, full = teacher.held(given, student, x, y, k)
    with torch.no_grad():
        q = given(x).double().softmax(-1).flatten(0, 1)
        logits = student(x)[..., :V].double().flatten(0, 1)
    probs, indices = q.topk(k)
    top = distill.TopK(indices, probs, (1 - probs.sum(-1)).clamp(min=0), probs[:, 0], V)
    assert known == pytest.approx(distill.top_kd_loss(logits, top, y.flatten(), 1.).item(), rel=1e-4)
    assert full == pytest.approx(distill.kd_loss(logits, q.log(), y.flatten(), 1.).item(), rel=1e-4)
    assert known == pytest.approx(full, rel=1e-5) if k == V else 0 < known < 0.99 * full


def test_damage_and_another_teacher_are_told(folder, tmp_path):
    cache = tmp_path / f"top-{K}"
    shutil.copytree(folder / f"top-{K}", cache)
    for name in ("model", "student"):
        shutil.copytree(folder / name, tmp_path / name)
    with pytest.raises(UserError, match="top is 8 there and 9 here"):
        write(tmp_path, cache.name, top=9)
    index = json.loads((cache / "teacher.json").read_text())
    (cache / "teacher.json").write_text(json.dumps({**index, "vocab_size": 60_000}))
    with pytest.raises(UserError, match="holds probabilities of 60,000 tokens, and the model has 264"):
        run(tmp_path, tmp_path / "other", cache.name, steps=6)
    (cache / "teacher.json").write_text(json.dumps(index))
    run(tmp_path, tmp_path / "run", cache.name, steps=6, save_every=2, stage="all")
    (tmp_path / "run" / "ckpt_00000006.pt").unlink()
    (cache / "teacher.json").write_text(json.dumps({**index, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="has changed since the run began"):
        run(tmp_path, tmp_path / "run", cache.name, steps=6, save_every=2)
    (cache / "teacher.json").write_text(json.dumps(index))
    records = np.memmap(cache / "teacher.bin", top_k.record_type(index), mode="r+")
    records[5]["log_probs"][0, 0] = -1
    records.flush()
    with pytest.raises(Damaged, match="sample 5 in .* is damaged; delete"):
        top_k.CachedTeacher(cache).read(4, 2)
    with open(cache / "teacher.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="teacher.bin has 100 bytes, and 24 samples take"):
        top_k.CachedTeacher(cache)
    (cache / "teacher.json").write_text('{"magic": "nanoprune teacher", "version": 9}')
    with pytest.raises(UserError, match="damaged or of another version .version 9"):
        top_k.read_index(cache)

"""Invariants of data.py: every window once, one global batch for any world, a hold-out by document, whole shards."""
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken

import data
from common import UserError

TEXT = "".join(f"line {i} of a text with é and 日本\n" for i in range(400))


@pytest.fixture
def bpe(monkeypatch):
    """A hand-made byte-level BPE with two merges, a gap in its ids, and a special token."""
    ranks = {bytes([i]): i for i in range(256)} | {b"li": 256, b"ne": 257}
    encoding = tiktoken.Encoding("toy", pat_str=r"\s?\S+|\s+", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 70000})
    real = tiktoken.get_encoding
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding if name == "toy" else real(name))
    return data.open_tokenizer("toy")


@pytest.fixture
def folder(tmp_path):
    """60 text files of different contents in two folders."""
    for i in range(60):
        path = tmp_path / "texts" / "ab"[i % 2] / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}\n" * (i + 1))
    return tmp_path / "texts"


def split_documents(corpus):
    """-> the two sides as lists of texts."""
    return [corpus.tokenizer.decode(side[:]).split(corpus.tokenizer.decode([corpus.tokenizer.eot]))[:-1]
            for side in (corpus.train, corpus.val)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permutation_is_a_bijection_for_every_n(n):
    for seed, epoch in [(0, 0), (0, 1), (7, 0)]:
        assert sorted(data.permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_orders_of_other_seeds_and_epochs_look_unrelated():
    n = 4000
    orders = [data.permute(np.arange(n), n, seed, epoch) for seed in (0, 1) for epoch in (0, 1)] + [np.arange(n)]
    for i, a in enumerate(orders):
        for b in orders[:i]:  # 5 standard errors of a correlation; fixed points are Poisson(1); neighbours part
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5
            assert (a == b).sum() < 10
    assert all(abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 5 / n**0.5 for a in orders[:-1])
    firsts = [data.permute(np.arange(1), 10, seed, 0)[0] for seed in range(2000)]  # and uniform over seeds
    assert np.bincount(firsts, minlength=10).min() > 140
    assert len({tuple(data.permute(np.arange(3), 3, 0, epoch)) for epoch in range(100)}) == 6


def test_an_epoch_holds_every_window_once_and_y_is_the_next_token():
    tokens, block_size = np.arange(1003, dtype=np.uint16), 10  # 100 windows, the last 2 tokens unused
    for epoch in range(3):
        seen = []
        for step in range(epoch * 5, epoch * 5 + 5):
            x, y = data.batch(tokens, block_size, 1, step, 0, micro_batch=20, micro_steps=1)
            assert x.shape == y.shape == (20, 10) and x.dtype == y.dtype and x.is_contiguous() and y.is_contiguous()
            assert (y == x + 1).all()
            seen += x[:, 0].tolist()
        assert sorted(seen) == list(range(0, 1000, 10))
    corpus = data.Corpus(tokens, tokens, None, "", (1, 1), None, "text")
    assert data.epochs(corpus, block_size, 250) == {"text": 2.5}


def test_global_batch_is_the_same_for_any_world_and_crosses_epochs():
    tokens = data.Shards([np.arange(130), np.arange(130, 331)])  # 33 windows: batches of 16 straddle epochs
    for step in range(5):
        batches = []
        for world, micro_steps, micro_batch in [(1, 1, 16), (1, 4, 4), (2, 2, 4), (4, 1, 4), (4, 2, 2)]:
            batches.append([data.batch(tokens, 10, 3, step, micro, rank, world=world, micro_batch=micro_batch,
                                       micro_steps=micro_steps)[0].tolist()
                            for micro in range(micro_steps) for rank in range(world)])
        flat = [[row for part in b for row in part] for b in batches]
        assert all(rows == flat[0] for rows in flat)


def test_batch_is_pure_and_depends_on_seed_and_step():
    def first(seed, step):
        return data.batch(np.arange(5000), 10, seed, step, 0, micro_batch=8, micro_steps=1)[0].tolist()
    assert first(0, 3) == first(0, 3)
    assert len({str(first(seed, step)) for seed in (0, 1) for step in (0, 1, 2)}) == 6


@pytest.mark.parametrize("weights, turn", [((2, 1), "ABA"), ((4, 2), "ABA"), ((1, 1, 1), "ABC"), ((1, 3), "BABB"),
                                           ((2, 3), "BABAB")])
def test_a_mixture_takes_turns_and_each_part_is_read_as_it_is_alone(weights, turn):
    sizes = (71, 211, 101)                                     # 7, 21 and 10 windows: all of them begin anew
    parts = [np.arange(10_000 * i, 10_000 * i + sizes[i]) for i in range(len(weights))]
    mixture = data.Mixture(parts, weights)
    own = dict.fromkeys(range(len(parts)), 0)
    rows = []
    for sample in range(60):
        part = "ABC".index(turn[sample % len(turn)])
        x, y = data.batch(parts[part], 10, (5, part), own[part], 0, micro_batch=1, micro_steps=1)
        rows.append(x[0].tolist() + y[0, -1:].tolist())
        own[part] += 1
    for world, micro_steps, micro_batch in [(1, 1, 12), (2, 3, 2), (3, 1, 4)]:
        read = [data.batch(mixture, 10, 5, step, micro, rank, world=world, micro_batch=micro_batch,
                           micro_steps=micro_steps)
                for step in range(5) for micro in range(micro_steps) for rank in range(world)]
        assert [row + last[-1:] for x, y in read for row, last in zip(x.tolist(), y.tolist())] == rows
    repeats = data.windows(mixture, 10)                        # before a part begins anew, and not one later
    firsts = [row[0] for row in rows]
    assert len(set(firsts[:repeats])) == repeats and len(set(firsts[:repeats + 1])) == repeats


def test_sources_of_a_mixture(folder, tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"row {i} " * 9}) + "\n" for i in range(90)))
    names = (f"{folder}:4", f"{tmp_path}/b.jsonl:2")
    mixed = data.load_mixture(names, cache=tmp_path / "cache")
    parts = [data.load(name[:-2], cache=tmp_path / "cache") for name in names]
    assert list(mixed.domains) == [part.name for part in parts] == [str(folder), f"{tmp_path}/b.jsonl"]
    assert [list(tokens[:]) for tokens in mixed.domains.values()] == [list(part.val[:]) for part in parts]
    assert mixed.val[:].tolist() == np.concatenate([part.val[:] for part in parts]).tolist()
    assert mixed.train.weights == [2, 1] and list(mixed.shares.values()) == [2 / 3, 1 / 3]
    assert mixed.documents == tuple(np.add(parts[0].documents, parts[1].documents))
    fingerprints = {data.load_mixture(entries, cache=tmp_path / "cache").fingerprint
                    for entries in (names, names[::-1], (names[0], parts[1].name), names[:1])}
    assert len(fingerprints) == 4 and mixed.fingerprint in fingerprints and parts[0].fingerprint in fingerprints
    assert data.recorded(names) == list(names) and data.recorded(("stdlib",)) == data.recorded("stdlib") == "stdlib"
    assert data.load_mixture(("stdlib",)).fingerprint == data.load("stdlib").fingerprint


@pytest.mark.parametrize("names, message", [
    ((), "--data names no text: give stdlib"),
    (("a:0", "b"), "weight in --data a:0 must be a whole number between 1 and 1000"),
    (("hf:news:2019",), "between 1 and 1000; where 2019 is part of the name, give hf:news:2019:1"),
    (("a", "a:2"), "names a twice; give one name with a weight, as a:2")])
def test_weights_that_mean_nothing_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        data.weights_of(names)


def test_a_name_that_ends_in_digits_is_a_file_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.weights_of(("notes:3", "hf:a/b:c", "x:y:7")) == {"notes": 3, "hf:a/b:c": 1, "x:y": 7}
    (tmp_path / "notes:3").write_text("text")
    assert data.weights_of(("notes:3", "notes:3:2")[:1]) == {"notes:3": 1}


def test_a_chat_is_encoded_alike_wherever_a_block_ends(tmp_path, monkeypatch):
    """The end of a text behind an answer counts, behind a mere prompt it does not."""
    rows = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}" * (i % 2)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = data.load(str(tmp_path / "rows.jsonl"), cache=None)
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", 1)
    in_blocks = data.load(str(tmp_path / "rows.jsonl"), cache=None)
    assert whole.train[:].tolist() == in_blocks.train[:].tolist()
    ends = whole.train[:][data.without_marks(whole.train[:]) == whole.tokenizer.eot]
    assert 20 < (ends >= data.CONTEXT_ONLY).sum() < len(ends) - 20
    assert data.count_bytes(whole.train, whole.tokenizer) == len(whole.train) - len(ends)


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 1), b"an image"])
def test_a_chat_with_more_than_text_is_refused(tmp_path, value):
    rows = [{"messages": [{"role": "user", "content": "a", "more": value}]}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    with pytest.raises(UserError, match="chats.parquet:1 has a chat that no JSON holds .*: leave out this field"):
        data.load(str(tmp_path / "chats.parquet"), cache=None)


def test_shards_read_like_one_array():
    whole = np.arange(23)
    shards = data.Shards([whole[:5], whole[5:6], whole[6:23]])
    for start in range(24):
        for stop in range(start, 25):
            assert shards[start:stop].tolist() == whole[start:stop].tolist()
    assert len(shards) == 23 and shards[-3:].tolist() == [20, 21, 22]


def test_bytes_round_trip_and_drop_nul():
    tok = data.open_tokenizer("bytes")
    assert tok.decode(tok.encode(TEXT)) == TEXT and tok.encode("a").dtype == np.uint16
    assert len(tok.encode("a\0b\0")) == 2
    assert tok.decode([0xFF, 300]) == "\ufffd" and tok.encode("\ud800").tolist() == [ord("?")]
    assert tok.byte_lengths()[tok.encode(TEXT)].sum() == len(TEXT.encode()) and tok.byte_lengths()[tok.eot] == 0


def test_bpe_lengths_gaps_and_no_special_tokens_from_text(bpe):
    text = TEXT + "<|endoftext|> line\ud800"
    ids = bpe.encode(text)
    assert bpe.eot == 70000 and bpe.vocab_size == 70001 and ids.dtype == np.uint32 and 256 in ids and 257 in ids
    assert bpe.eot not in ids and bpe.decode(ids) == text.replace("\ud800", "?")
    lengths = bpe.byte_lengths()
    assert lengths.shape == (70001,) and lengths[ids].sum() == len(text.encode(errors="replace"))
    assert lengths[bpe.eot] == lengths[300] == 0 and bpe.decode([300, 97, 80000]) == "a"


def test_stdlib_is_split_by_file_without_tests_or_packages():
    root, files = data.list_files("stdlib")
    folders = {part for f in files for part in f.relative_to(root).parts}
    assert len(files) > 300 and not {"test", "tests", "site-packages"} & folders
    corpus = data.load(block_size=1024)
    assert corpus.documents[0] > 10 * corpus.documents[1] > 0 and 0.01 < len(corpus.val) / len(corpus.train) < 0.15
    assert (corpus.val[:] == 0).sum() == corpus.documents[1]


def test_hold_out_is_by_document_and_follows_the_stated_rule(folder):
    import hashlib
    corpus = data.load(str(folder), cache=None)
    train, val = split_documents(corpus)
    expected = {p.read_text() for p in folder.rglob("*.txt")
                if int(hashlib.sha256(p.relative_to(folder).as_posix().encode()).hexdigest(), 16) % 20 == 0}
    assert set(val) == expected != set() and not set(train) & set(val) and len(train) + len(val) == 60
    assert corpus.documents == (len(train), len(val))
    (folder / "zz_new.txt").write_text("more")  # adding a document moves no other, but is recorded
    more = data.load(str(folder), cache=None)
    assert set(split_documents(more)[1]) - {"more"} == expected and more.fingerprint != corpus.fingerprint


def test_corpora_too_small_for_the_hash_rule(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    one = data.load(str(tmp_path / "one.txt"), cache=None)
    assert split_documents(one) == [["0123456789" * 9], ["0123456789"]] and one.documents == (1, 1)
    (tmp_path / "two.txt").write_text("another")
    two = data.load(str(tmp_path / "*.txt"), cache=None)
    smallest = min(["one.txt", "two.txt"], key=lambda name: data.sha256(name))
    assert two.documents == (1, 1) and split_documents(two)[1] == [(tmp_path / smallest).read_text()]


def test_shards_equal_memory_for_any_number_of_threads(folder, tmp_path, bpe, monkeypatch):
    memory = data.load(str(folder), bpe, cache=None)
    monkeypatch.setattr(data, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", 1000)
    for workers in (1, 3):
        shards = data.load(str(folder), "toy", tmp_path / f"cache{workers}", workers)
        assert len(shards.train.parts) > 2 and isinstance(shards.train.parts[0], np.memmap)
        for side in ("train", "val"):
            assert np.array_equal(getattr(shards, side)[:], getattr(memory, side)[:])
        assert (shards.fingerprint, shards.documents) == (memory.fingerprint, memory.documents)
    prepared = next((tmp_path / "cache1").iterdir())  # a folder of finished shards is a source too
    assert np.array_equal(data.load(str(prepared), "toy").train[:], memory.train[:])
    assert data.load(str(folder), "bytes", cache=None).fingerprint == memory.fingerprint


def test_unfinished_cache_is_rebuilt_and_a_finished_one_is_read(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = data.load(str(folder), "bytes", cache).train[:].tolist()  # a copy, as the mapped file is damaged below
    (made,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(data, "tokenize", lambda *_: pytest.fail("tokenized a finished corpus again"))
        data.load(str(folder), "bytes", cache)
    (made / "index.json").unlink()  # killed before the end ...
    (made / "train_000.bin").write_bytes(b"half")
    with pytest.raises(UserError, match="unfinished"):
        data.load(str(made))
    assert data.load(str(folder), "bytes", cache).train[:].tolist() == first
    (folder / "new.txt").write_text("a changed source is another corpus")
    data.load(str(folder), "bytes", cache)
    assert len(list(cache.iterdir())) == 2


def test_killed_in_the_middle_leaves_no_corpus(folder, tmp_path, monkeypatch):
    real, calls = data.write_atomic, []

    def dies_at_the_second(path, write):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, write)
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_atomic", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            data.load(str(folder), "bytes", tmp_path / "cache")
    assert calls[0].exists() and not calls[0].with_name("index.json").exists()
    assert data.load(str(folder), "bytes", tmp_path / "cache").documents[0] > 50


@pytest.mark.parametrize("damage", ["cut", "odd", "version", "gone", "index"])
def test_damaged_shards_are_refused(folder, tmp_path, damage):
    data.load(str(folder), "bytes", tmp_path / "cache")
    (made,) = (tmp_path / "cache").iterdir()
    shard = made / "train_000.bin"
    raw = shard.read_bytes()
    if damage in ("cut", "odd"):
        shard.write_bytes(raw[:-2 if damage == "cut" else -1])
    elif damage == "version":
        shard.write_bytes(raw.replace(b'"version": 1', b'"version": 9', 1))
    elif damage == "gone":
        shard.unlink()
    else:
        (made / "index.json").write_text("{")
    with pytest.raises(UserError, match="delete"):
        data.load(str(folder), "bytes", tmp_path / "cache")


def test_jsonl_parquet_and_hugging_face_rows_give_the_same_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows = [{"id": i, "body": f"row {i} é\n" * (i % 7 + 1)} for i in range(100)] + [{"id": 100, "body": ""}]
    for name in ("lines", "table", "saved"):
        (tmp_path / name).mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table" / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved" / "set")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved" / "dict")
    corpora = [data.load(str(source), cache=tmp_path / "cache", field="body", stream=stream) for source, stream in [
        (tmp_path / "lines" / "a.jsonl", False), (tmp_path / "table", False), (f"hf:{tmp_path}/lines", False),
        (f"hf:{tmp_path}/table", True), (f"hf:{tmp_path}/saved/set", False), (f"hf:{tmp_path}/saved/dict", False)]]
    for corpus in corpora:
        assert sum(corpus.documents) == 100 and corpus.fingerprint == corpora[0].fingerprint
        assert np.array_equal(corpus.train[:], corpora[0].train[:]) and np.array_equal(corpus.val[:], corpora[0].val[:])
    for source in (tmp_path / "table", f"hf:{tmp_path}/lines"):
        with pytest.raises(UserError, match=r":1 has no text in field 'text' \(its fields: id, body\)"):
            data.load(str(source), cache=None)
    with pytest.raises(UserError, match="split 'nope'"):
        data.load(f"hf:{tmp_path}/lines", cache=None, split="nope")


@pytest.mark.parametrize("name, content, match", [
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl:2 is not JSON"),
    ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"bad.jsonl:2 has no text in field 'text' \(its fields: txt\)"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": null}\n', r"bad.jsonl:2 has no text"),
    ("bad.jsonl", b'{"text": "a"}\n"b"\n', r"bad.jsonl:2 has no text"),
    ("bad.txt", b"ok \xff", r"bad.txt is not UTF-8 text \(byte 3\)"),
    ("empty.txt", b"", "holds no text"),
    ("short.txt", b"0123456789", r"val \(1 of 2 documents of '.*short.txt'\) has 2 tokens, .* block_size \+ 1 = 9"),
])
def test_bad_sources_are_refused_in_one_sentence(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        data.load(str(tmp_path / name), cache=None, block_size=8)


def test_what_cannot_be_had_names_the_remedy(tmp_path, folder, monkeypatch, bpe):
    for source in (tmp_path / "nothing.txt", tmp_path / "*.nothing"):
        with pytest.raises(UserError, match="no file matches"):
            data.load(str(source))
    with pytest.raises(UserError, match="give one of bytes, gpt2"):
        data.open_tokenizer("gpt22")

    def offline(name):
        raise ConnectionError
    with pytest.raises(UserError, match="leave --stream out"):
        data.load("stdlib", stream=True)
    data.load(str(folder), "toy", tmp_path / "cache")
    with pytest.raises(UserError, match="give --tokenizer toy"):
        data.load(str(next((tmp_path / "cache").iterdir())), "bytes")
    with pytest.raises(UserError, match="5 tokens, a window needs"):
        data.batch(np.arange(5), 5, 0, 0, 0, micro_batch=1, micro_steps=1)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="--tokenizer bytes"):
        data.open_tokenizer("gpt2")


def test_the_sources_of_installed_packages_are_a_corpus_of_python_files_without_their_tests(tmp_path, monkeypatch):
    """Any folder may be theirs; a file that is not UTF-8 is left out, as in the standard library."""
    for i in range(60):
        for path in (f"a/{i}.py", f"b/c/{i}.py", f"b/tests/{i}.py", f"a/{i}.so", f".hidden/{i}.py"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"x = '{path}'\n")
    (tmp_path / "a" / "latin.py").write_bytes(b"x = '\xe9'\n")
    real = data.sysconfig.get_paths()
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {**real, "purelib": str(tmp_path)})
    corpus = data.load("packages", cache=tmp_path / "cache")
    texts = [text for side in split_documents(corpus) for text in side]
    assert sorted(texts) == sorted(f"x = '{name}/{i}.py'\n" for name in ("a", "b/c") for i in range(60))
    assert sum(corpus.documents) == 120 and data.load("packages", cache=tmp_path / "cache").folder == corpus.folder


# -- large text files are read in pieces

LINES = "".join(f"line {i}: a text\r\n with é and 日本🙂,\n/\n\n   \t\n{i}\n" for i in range(300))


@pytest.mark.parametrize("text", [LINES, "a\n\n" * 700, "no line end " * 200, "\n" * 2000, "a\nb" * 500, "é\nb" * 500])
@pytest.mark.parametrize("size", [7, 64, 1000])
def test_a_text_in_pieces_has_the_tokens_and_fingerprint_of_the_whole(text, size, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    tok = data.open_tokenizer("bytes")
    whole = data.load(str(path), tok, cache=None)
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", size)
    pieces = list(data.TextFile(path, True))
    assert "".join(pieces) == text and list(data.TextFile(path, False)) == [text]
    assert len(pieces) > 5 or size == 1000 or text.startswith(("no", "\n", "a\n\n"))
    corpus = data.load(str(path), tok, cache=None)
    assert corpus.fingerprint == whole.fingerprint and corpus.documents == whole.documents
    for side in ("train", "val"):
        assert np.array_equal(getattr(corpus, side)[:], getattr(whole, side)[:])
    monkeypatch.setattr(data.Tokenizer, "splits_at_lines", False)
    monkeypatch.setattr(type(tok), "splits_at_lines", False)
    assert np.array_equal(data.load(str(path), tok, cache=None).train[:], whole.train[:])


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("content, byte", [(b"a\nb\nc\xff\n", 5), ("a\nbé".encode()[:-1], 3),
                                           ("日本".encode()[1:], 0)])
def test_the_byte_that_is_not_utf_8_is_counted_from_the_beginning(content, byte, size, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", size)
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x.txt is not UTF-8 text \(byte {byte}\)"):
        data.load(str(tmp_path / "x.txt"), cache=None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM, which Linux has")
def test_the_memory_that_a_text_takes_does_not_grow_with_it(tmp_path):
    (tmp_path / "x.txt").write_text("🙂\n" + "some words of a text\n" * 2_000_000)
    script = ("import sys, data\n"
              "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
              "tok = data.open_tokenizer('bytes'); data.SHARD_TOKENS = 2**20; before = peak()\n"
              f"data.load({str(tmp_path / 'x.txt')!r}, tok, {str(tmp_path / 'cache')!r}, 2)\n"
              "print((peak() - before) / 50e6)")
    root = Path(data.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2            # read whole it is 14


# -- what is no text

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_in_a_folder_is_named_and_not_waited_for(folder):
    os.mkfifo(folder / "pipe")
    for source in (folder, folder / "pipe", folder / "pi*"):
        with pytest.raises(UserError, match="pipe is no file but a pipe, socket or device: remove it"):
            data.load(str(source), cache=None)


def test_a_link_to_nothing_is_called_a_link(folder):
    (folder / "gone").symlink_to("nowhere")
    for source in (folder, folder / "gone", folder / "go*"):
        with pytest.raises(UserError, match="gone is a link to nowhere, which is not there: mend or remove the link"):
            data.load(str(source), cache=None)
    (folder / "gone").unlink()
    (folder / "good").symlink_to(folder / "a" / "0.txt")
    assert sum(data.load(str(folder), cache=None).documents) == 61


def test_deep_json_is_a_sentence(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match="deep.jsonl:2 is not JSON"):
        data.load(str(tmp_path / "deep.jsonl"), cache=None)


def test_no_changed_byte_of_a_parquet_file_is_a_traceback(tmp_path):
    """Some change a text unseen, as the format's checksums are seldom written; the others are a sentence."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(50)]}), path, compression="none")
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1:])
        try:
            data.load(str(path), cache=None)
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("count", [2, 400])
def test_equal_documents_cannot_be_held_out_from_each_other(count, tmp_path):
    (tmp_path / "same.jsonl").write_text('{"text": "the same"}\n' * count)
    with pytest.raises(UserError, match=rf"the {count} documents of .* all have the same text, so that none can"):
        data.load(str(tmp_path / "same.jsonl"), cache=None)


def test_no_source_is_not_this_folder():
    with pytest.raises(UserError, match="the source of a corpus has no name: give stdlib"):
        data.load("", cache=None)


def test_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = data.load("~/texts", cache="~/cache").folder
    assert made.parent == tmp_path / "cache"
    assert len(data.load(f"~/cache/{made.name}").train) == len(data.load(str(folder), cache=None).train)


def test_flags_without_an_effect_are_refused(folder, tmp_path):
    for flags, sentence in ((dict(split="val"), "--split is for hf: sources, .* has no split 'val'"),
                            (dict(field="body"), "--field body is for rows .* holds none: leave --field out")):
        with pytest.raises(UserError, match=sentence):
            data.load(str(folder), cache=None, **flags)
    made = data.load(str(folder), cache=tmp_path / "cache").folder
    for flags in (dict(split="val"), dict(field="body"), dict(stream=True)):
        with pytest.raises(UserError, match="holds finished tokens, on which --field, --split and --stream have"):
            data.load(str(made), **flags)

"""formats/tokenizer.py: the ids of `tokenizers`, sentencepiece and transformers; documents that cannot end themselves;
bytes of tokens; a sentence for what is refused."""
import copy
import functools
import json
import pickle
import random
import sys
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizer_toys as toys
import tokenizers
import transformers
from hypothesis import given, settings, strategies
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

import data
from common import UserError
from formats import tokenizer, tokenizer_json
from formats.tokenizer import Bytes, Tiktoken, open_tokenizer

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")  # as in Llama-3's published tokenizer.json; Qwen's has \p{N} for \p{N}{1,3}
KINDS = ["gpt2", "llama3", "qwen2", "smollm2"]
TOOL = AddedToken("<tool_call>", special=False, normalized=False)
SCRIPTS = ["αβγδεζηθικλμνξοπρστυφχψω", "абвгдежзийклмнопрстуфхцчшщъыьэюя", "אבגדהוזחטי", "ابتثجحخدذرزسشصضطظعغ٠١٢٣",
           "अआइईउऊकखगघचछजझटठडढणतथ्िीुूे०१२३", "กขคงจฉชซญฎะาิีึุูเแโ่้", "的一是不了人我在有他这为之大来以个中上们。，",
           "あいうえおかきくけこアイウエオ゛゜ー", "가각간갇갈감갑값갓강나다라마바사아자차", "ăâîșțéèêëàçñüößøåæðþł",
           "\U0001F600\U0001F389\U0001F469\u200D\U0001F4BB\U0001F1E9\U0001F1EA→≤∑½²Ⅷ"]
ENDS = [" ", " ", " ", ", ", ".\n", "  ", "\r\n", " 12", "'s ", "\t"]


@pytest.fixture(scope="module")
def text():
    """5 MB and more: the standard library and 1 MB of made-up words in many scripts, in pieces of about 10 kB."""
    rng, parts, size = random.Random(0), [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if size < 4.1e6 and not {"site-packages", "test"} & {*path.parts}:
            parts.append(path.read_bytes().decode("utf-8", "replace").replace("<|", "< |"))
            size += len(parts[-1].encode())
    while size < 5.1e6:
        script = rng.choice(SCRIPTS)
        words = ["".join(rng.choices(script, k=rng.randint(1, 9))) for _ in range(400)]
        parts.append("".join(word + rng.choice(ENDS) for word in words))
        size += len(parts[-1].encode())
    return [part[i:i + 10_000] for part in parts for i in range(0, len(part), 10_000)]


def all_splits(model):
    """The `model` as Llama-3's: every pair that makes a token is listed, and a token that none makes is in it."""
    vocab = {**model["vocab"], "Ġxylophonist": len(model["vocab"])}
    merges = []
    for token, _ in sorted(vocab.items(), key=lambda item: item[1]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += sorted((p for p in pairs if vocab.keys() >= {*p}), key=lambda p: (vocab[p[0]], vocab[p[1]]))
    return {**model, "vocab": vocab, "merges": merges, "ignore_merges": True}


@pytest.fixture(scope="module")
def contents(text):
    """{kind: its tokenizer.json, as a dict}, each trained in half a second."""
    made = {}
    for kind in KINDS:
        t = tokenizers.Tokenizer(models.BPE())
        digits = {"llama3": SPLIT, "qwen2": SPLIT.replace("{1,3}", "")}
        if kind in digits:
            steps = [pre_tokenizers.Split(Regex(digits[kind]), "isolated"),
                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            t.pre_tokenizer = pre_tokenizers.Sequence(steps)
        else:
            t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        first = ["<|endoftext|>"] if kind == "gpt2" else []
        if kind == "smollm2":  # as published: special tokens first, and only the bytes that the training text has
            t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), t.pre_tokenizer])
            first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        if kind == "qwen2":
            t.normalizer = normalizers.NFC()
        alphabet = [] if kind == "smollm2" else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=first, initial_alphabet=alphabet,
                                      show_progress=False)
        t.train_from_iterator(text[::17], trainer)
        if kind in digits:  # as published: after the others
            if kind == "llama3":
                content = json.loads(t.to_str())
                t = tokenizers.Tokenizer.from_str(json.dumps({**content, "model": all_splits(content["model"])}))
            t.add_special_tokens(["<|begin_of_text|>", "<|endoftext|>", "<|end|>"])
            t.add_tokens([TOOL])
        made[kind] = json.loads(t.to_str())
    return made


def ours(content, **config):
    return tokenizer.open_tokenizer("toy", {"tokenizer.json": json.dumps(content),
                                            "tokenizer_config.json": json.dumps(config)})


def theirs(content):
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, contents):
    """(kind, our Tokenizer, theirs)"""
    return request.param, ours(contents[request.param]), theirs(contents[request.param])


@pytest.fixture(scope="module", params=[*toys.KINDS, "tokenizer.model"])
def pieces(request):
    """A Tokenizer with SentencePiece's pieces, and its files."""
    files = toys.model_files() if request.param == "tokenizer.model" else toys.json_files(request.param)
    return open_tokenizer(request.param, files), files


@functools.cache
def pools():
    """Lists of characters that pre-tokenizers, normalizers and missing bytes treat in different ways."""
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    kinds = [unicodedata.category(chr(c)) for c in points]
    marks = [*range(0x300, 0x370), *range(0x591, 0x5BE), 0x93C, 0x94D, 0x3099]  # of before Unicode 10
    plain = [c for c, kind in zip(points, kinds) if kind not in ("Cn", "Co") and not unicodedata.combining(chr(c))]
    return [points, plain, range(128), range(32, 0x300), [c for c, kind in zip(points, kinds) if kind[0] == "N"], marks,
            [c for c in points if chr(c).isspace()], [*range(0x1100, 0x1200), *range(0xAC00, 0xD7A4, 31)],
            [*range(0x1E00, 0x2000), *range(0xF900, 0xFAD0)], [0x20, 0x0A, 0x0D, 0x09, 0x27, 0x31, 0x61, 0x2E],
            [0x200B, 0x200D, 0xA0, 0x85, 0xFEFF, 0x180E, 0x17F, 0x212A], [*range(0x11DE0, 0x11DEA), 0x16FF5],
            [0x04, 0x06, 0x13, 0x14, 0x1D, 0x41234, 0x81234, 0x3E613]]


def random_strings(count, seed=0):
    rng = random.Random(seed)
    bits = ["'s", "'S", "'ll", "'VE", "'\u017F", " '", "''", "\r\n", "\n\n", "   ", " \n", "\t ", " 12", "1234", " the",
            "==", "'re1", "1's"]
    for _ in range(count):
        mine = [rng.choice(pools()) for _ in range(rng.randint(1, 4))]
        parts = [chr(rng.choice(rng.choice(mine))) * rng.choice([1] * 9 + [7]) for _ in range(rng.choice([3, 8, 25]))]
        yield "".join(rng.choice(bits) if rng.random() < 0.15 else part for part in parts)


def test_ids_are_those_of_tokenizers_on_text(pair, text):
    _, a, b = pair
    for part, expected in zip(text[::10], b.encode_batch_fast(text[::10], add_special_tokens=False)):
        assert a.encode(part).tolist() == expected.ids, part


def test_ids_are_those_of_tokenizers_on_random_unicode(pair):
    _, a, b = pair
    for s in random_strings(1500):
        assert a.encode(s).tolist() == b.encode(s, add_special_tokens=False).ids, ascii(s)


def test_special_texts_become_ids_only_when_asked(pair):
    kind, a, b = pair
    rng, plain = random.Random(1), [*random_strings(300, seed=1)]
    for _ in range(100):  # U+0338 behind ">" would compose to one character, were NFC taken first
        s = "".join(rng.choice([*a.specials, "<|endof", "\u0338", *rng.sample(plain, 3)]) for _ in range(6))
        assert a.encode(s, special=True).tolist() == b.encode(s, add_special_tokens=False).ids, ascii(s)
        assert not {*a.encode(s).tolist()} & {*a.specials.values()}
    assert ("<tool_call>" in a.specials) == (kind in ("llama3", "qwen2"))  # not special, but never forged either
    assert (a.byte_lengths()[[*a.specials.values()]] == 0).all()


@pytest.mark.parametrize("tokens, late, expected", [
    (["<a>", "x<a>"], [], ["<a>", "x<a>", "y"]),  # the leftmost first
    (["<a>", "<a>x", "<a>x<"], [], ["<a>x<", "a", ">", "y"]),  # of these the longest
    (["<a>", "x<a>"], ["x<a>"], ["<a>", "x", "<a>", "y"]),  # what is "normalized" only in what the others leave
    (["<a>", "x<a>"], ["<a>"], ["<a>", "x<a>", "y"])])
def test_special_texts_that_overlap_are_found_in_the_order_of_tokenizers(contents, tokens, late, expected):
    t = theirs(contents["gpt2"])
    t.add_special_tokens([AddedToken(s, normalized=s in late) for s in tokens])
    a = ours(json.loads(t.to_str()))
    ids = a.encode("<a>x<a>y", special=True).tolist()
    assert ids == t.encode("<a>x<a>y").ids and [a.decode([i]) for i in ids] == expected


def test_lengths_count_the_bytes_that_tokens_stand_for(pair, text):
    kind, a, b = pair
    s = "".join(text[::17][:9] + text[::17][-9:]) + "e\u0301" * (kind == "qwen2")  # trained on: no byte is missing
    ids, kept = a.encode(s), unicodedata.normalize("NFC", s) if kind == "qwen2" else s
    assert (kept != s) == (kind == "qwen2")
    assert a.decode(ids) == kept and a.byte_lengths()[ids].sum() == len(kept.encode())
    assert a.vocab_size == len(a.byte_lengths()) == max(b.get_vocab(with_added_tokens=True).values()) + 1
    assert ids.dtype == a.dtype == np.uint16 and a.encode("").dtype == np.uint16 and len(a.encode("")) == 0
    assert a.encode("a\ud800b").tolist() == a.encode("a?b").tolist()
    assert a.token_bytes(a.vocab_size + 7) == b""


def test_bytes_that_a_vocabulary_lacks_are_dropped_and_their_neighbours_merge(contents):
    a, b = ours(contents["smollm2"]), theirs(contents["smollm2"])
    vocab = contents["smollm2"]["model"]["vocab"]
    left, right = next(t for t in vocab if len(t) == 2 and {*t} <= {*"().,:=#*"})
    assert "\u0100" not in vocab  # byte 0, spelled
    for s in (f"a {left}\0{right}\0 1", f"{left}\0{right}", f"a{left}\0{right}\n", f"1{left}\0\0{right}9"):
        assert a.encode(s).tolist() == b.encode(s).ids and vocab[left + right] in a.encode(s)
        assert a.decode(a.encode(s)) == s.replace("\0", "")
    assert a.encode("\0").tolist() == b.encode("\0").ids == []


def test_an_unreachable_token_is_produced_only_as_a_whole_piece(contents):
    a, b = ours(contents["llama3"]), theirs(contents["llama3"])
    i = contents["llama3"]["model"]["vocab"]["Ġxylophonist"]
    for s in (" xylophonist", " xylophonists", "a xylophonist."):
        assert a.encode(s).tolist() == b.encode(s).ids
    assert a.encode(" xylophonist").tolist() == [i] and i not in a.encode(" xylophonists")


def test_long_runs_merge_alike(pair):
    _, a, b = pair
    for s in (" " * 20_000 + "x", "\n" * 999, "a" * 5000, "=" * 777, "1" * 1000, "'" * 99, "\t \n" * 333 + "1"):
        assert a.encode(s).tolist() == b.encode(s, add_special_tokens=False).ids, s[:9]


def test_a_name_stands_for_one_vocabulary(contents):
    seen = {ours(content).name: kind for kind, content in contents.items()}
    content = contents["gpt2"]
    name = ours(content).name
    assert len(seen) == 4 and all(len(n) == 21 and n.startswith("json-") for n in seen)
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": contents["qwen2"]["pre_tokenizer"]}):
        assert ours({**content, **change}).name not in seen
    other = copy.deepcopy(content)
    first, second = ["!", '"']
    vocab = other["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    assert ours(other).name not in seen
    more = theirs(content)
    more.add_special_tokens(["<|end|>"])
    more = json.loads(more.to_str())
    names = {ours(more, **config).name for config in ({}, {"eos_token": "<|end|>"}, {"bos_token": "<|end|>"})}
    assert len(names) == 3 and not names & {*seen}
    same = copy.deepcopy(content)  # the older spelling of merges, another layout: the same ids
    same["model"]["merges"] = [" ".join(merge) for merge in same["model"]["merges"]]
    again = tokenizer.open_tokenizer("toy", {"tokenizer.json": json.dumps(same, indent=4)})
    assert again.name == name and again.encode("the same").tolist() == ours(content).encode("the same").tolist()


@pytest.mark.parametrize("config, eot, bos", [
    ({"eos_token": "<|end|>", "bos_token": None}, "<|end|>", None),
    ({"eos_token": {"content": "<|end|>"}, "bos_token": {"content": "<|begin_of_text|>"}}, "<|end|>",
     "<|begin_of_text|>"),
    ({}, "<|endoftext|>", None), ({"eos_token": None, "bos_token": "<|end|>"}, "<|endoftext|>", "<|end|>")])
def test_the_config_names_the_ends_of_a_document(contents, config, eot, bos):
    a = ours(contents["qwen2"], **config)
    assert a.eot == a.specials[eot] and a.bos == a.specials.get(bos)


def test_a_folder_a_file_and_their_texts_are_one_tokenizer(tmp_path, contents, monkeypatch):
    for name, content in {"tokenizer.json": json.dumps(contents["gpt2"]), "merges.txt": "#é\r\n", "README.md": "no",
                          "tokenizer_config.json": "{}", "config.json": '{"eos_token_id": 5}'}.items():
        (tmp_path / name).write_bytes(content.encode())
    files = tokenizer.read_files(tmp_path)
    assert [*files] == ["tokenizer.json", "tokenizer_config.json", "merges.txt"] and files["merges.txt"] == "#é\r\n"
    made = [tokenizer.open_tokenizer(str(tmp_path)), tokenizer.open_tokenizer(str(tmp_path / "tokenizer.json")),
            tokenizer.open_tokenizer("anything", files)]
    assert len({t.name for t in made}) == 1 and all(t.files == files for t in made)
    monkeypatch.chdir(tmp_path.parent)
    assert tokenizer.open_tokenizer(tmp_path.name).name == made[0].name
    assert tokenizer.open_tokenizer("bytes", {}).files == {}
    Path("gpt2").mkdir()  # a name that tiktoken knows stays its own
    encoding = tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={"<|endoftext|>": 1})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    assert tokenizer.open_tokenizer("gpt2").name == "gpt2"
    with pytest.raises(UserError, match="./gpt2 holds no tokenizer.json"):
        tokenizer.open_tokenizer("./gpt2")
    monkeypatch.undo()
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer.read_files(tmp_path) == {}
    with pytest.raises(UserError, match="holds no tokenizer.json: give the folder .* or one with a tokenizer.model"):
        tokenizer.open_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="or a folder with a tokenizer.json"):
        tokenizer.open_tokenizer("no/such/folder")


@pytest.mark.parametrize("config, expected", [
    ('{"eos_token_id": 1, "bos_token_id": 2}', {"bos_token": "<|im_end|>", "eos_token": "<|im_start|>"}),
    ('{"eos_token_id": [2, 0], "bos_token_id": null}', {"eos_token": "<|im_end|>"}),
    ('{"eos_token_id": 700}', None), ('{"eos_token_id": []}', None), ("{}", None), (None, None)])
def test_a_missing_tokenizer_config_is_made_from_the_config(tmp_path, contents, config, expected):
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents["smollm2"]))
    if config:
        (tmp_path / "config.json").write_text(config)
    files = tokenizer.read_files(tmp_path)
    if expected is None:
        assert [*files] == ["tokenizer.json"]
    else:
        made = json.loads(files["tokenizer_config.json"])
        assert made == {**expected, "tokenizer_class": "PreTrainedTokenizerFast"}
        assert tokenizer.open_tokenizer(str(tmp_path)).eot == contents["smollm2"]["model"]["vocab"][made["eos_token"]]


def changed(content, path, value):
    """A copy of `content` with the entry at "a.0.b" replaced, or removed where `value` is None."""
    place = content = copy.deepcopy(content)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in way:
        place = place[key]
    place[last] = value
    if value is None:
        del place[last]
    return content


def refused(content, sentence, **config):
    with pytest.raises(UserError) as caught:
        ours(content, **config)
    message = str(caught.value)
    assert message.startswith("toy") and "tokenizer" in message and sentence in message and "\n" not in message, message
    assert ";" in message or ": copy it again" in message  # what to do about it


@pytest.mark.parametrize("path, value, sentence", [
    ("model.type", "WordPiece", "has a WordPiece model; give one with byte-level BPE"),
    ("model.dropout", 0.1, "has dropout 0.1"),
    ("model.end_of_word_suffix", "</w>", "has end_of_word_suffix '</w>'"),
    ("pre_tokenizer", None, "has pre-tokenizer null, and does not say how its tokens spell blanks"),
    ("pre_tokenizer", {"type": "Metaspace", "replacement": "_"}, 'has pre-tokenizer {"type": "Metaspace"'),
    ("pre_tokenizer", {"type": "NoSuch"}, 'has pre-tokenizer {"type": "NoSuch"}'),
    ("model.vocab.\u0120aa", 7, "has one id for two tokens"),
    ("model.vocab.\u0120the", None, "is damaged"),
    ("model.merges", None, "is damaged"),
    ("model.vocab", [], "is damaged"),
    ("added_tokens.0", 5, "is damaged"),
    ("model", "BPE", "is damaged (AttributeError"),
    ("pre_tokenizer", 5, "is damaged (AttributeError")])
def test_what_says_no_bytes_or_is_damaged_is_refused_in_a_sentence(contents, path, value, sentence):
    refused(changed(contents["gpt2"], path, value), sentence)


GPT2_STEPS = tokenizer_json.PRE_TOKENIZERS[tokenizer_json.GPT2]


def toy(*tokens, steps=GPT2_STEPS, **model):
    """A tokenizer.json of the 256 bytes, `tokens` from id 256 on, and <|endoftext|>."""
    vocab = {char: byte for char, byte in tokenizer_json.BYTES.items()} | {t: 256 + i for i, t in enumerate(tokens)}
    about = {"dropout": None, "unk_token": None, "byte_fallback": False, "ignore_merges": False, **model}
    steps = [{"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step for step in steps]
    return {"version": "1.0", "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "model": {"type": "BPE", "vocab": vocab, **about},
            "added_tokens": [{"id": len(vocab), "content": "<|endoftext|>", "special": True, "normalized": False,
                              "lstrip": False, "rstrip": False, "single_word": False}]}


def test_a_name_goes_by_what_makes_ids_and_not_by_the_spelling_of_the_file():
    content = toy("ab", "abc", merges=[["a", "b"], ["ab", "c"]])
    name = ours(content).name
    assert ours({key: content[key] for key in reversed(content)}).name == name
    assert ours(toy("ab", "abc", merges=["a b", "ab c"])).name == name
    assert ours({**content, "normalizer": {"type": "NFC"}}).name != name
    digits = tokenizer_json.PRE_TOKENIZERS[tokenizer_json.SMOLLM2]
    assert ours(toy("ab", "abc", merges=[["a", "b"], ["ab", "c"]], steps=digits)).name != name


def test_vocabularies_that_differ_in_merges_alone_have_different_names():
    tokens = ("ab", "bc", "abc")
    merges = [["a", "b"], ["b", "c"], ["ab", "c"]]
    reordered = [["b", "c"], ["a", "b"], ["ab", "c"]]
    made = [ours(toy(*tokens, merges=some)) for some in (merges, reordered, merges[:2])]
    assert len({t.name for t in made}) == 3
    assert [t.encode("abc").tolist() for t in made] == [[258], [97, 257], [256, 99]]


def test_random_vocabularies_are_read_as_by_tokenizers():
    rng = random.Random(0)
    for _ in range(200):
        tokens, merges = ["a", "b"], []
        for _ in range(rng.randint(1, 7)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            if left + right not in tokens or rng.random() < 0.2:
                merges.append([left, right])
                tokens += [left + right] * (left + right not in tokens)
        if rng.random() < 0.1:
            rng.shuffle(merges)
        content = toy(*tokens[2:], merges=merges, ignore_merges=rng.random() < 0.5)
        a, b = ours(content), theirs(content)
        for _ in range(20):
            s = "".join(rng.choices("ab", k=rng.randint(1, 14)))
            assert a.encode(s).tolist() == b.encode(s).ids, (s, merges)


def test_damaged_and_incomplete_folders_are_named(tmp_path, contents):
    refused(contents["gpt2"], "eos_token '<eos>' of tokenizer_config.json is not among the 1 added", eos_token="<eos>")
    content = changed(contents["gpt2"], "added_tokens", [])
    content["model"]["vocab"]["\u0100\u0100"] = content["model"]["vocab"].pop("<|endoftext|>")
    content["model"]["merges"].insert(0, ["\u0100", "\u0100"])
    refused(content, "does not say which token ends a document")
    for text in ("{", "[1]", ""):
        with pytest.raises(UserError, match="toy: tokenizer.json is not a JSON object .*: copy it again"):
            tokenizer.open_tokenizer("toy", {"tokenizer.json": text})
    with pytest.raises(UserError, match="toy holds no tokenizer.json"):
        tokenizer.open_tokenizer("toy", {"vocab.json": "{}"})
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(UserError, match=r"tokenizer.json is not UTF-8 text \(byte 2\)"):
        tokenizer.read_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents["gpt2"]))
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(UserError, match="config.json is not a JSON object"):
        tokenizer.read_files(tmp_path)


def test_special_texts_of_bytes_and_of_tiktoken():
    assert open_tokenizer("bytes").encode("a\0<b>", special=True).tolist() == [97, 60, 98, 62]
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("toy", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
    a = Tiktoken("toy", encoding)
    assert (a.eot, a.bos, a.files, a.specials, a.vocab_size) == (300, None, {}, {"<|endoftext|>": 300}, 301)
    assert a.encode("a<|endoftext|>", special=True).tolist() == [97, 300] and len(a.encode("a<|endoftext|>")) == 14


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_files_made_of_a_vocabulary_have_its_ids_in_tokenizers_and_here(kind, contents, text):
    """What export.py writes for a model trained on bytes or with one of tiktoken's own vocabularies."""
    bare = Bytes()
    if kind != "bytes":
        read = ours(contents[kind])
        ranks = {read.token_bytes(i): i for i in range(read.vocab_size) if i not in read.specials.values()}
        ranks |= {bytes([b]): 1600 + b for b in range(256) if bytes([b]) not in ranks}        # tiktoken has all bytes
        pattern = {"gpt2": tokenizer_json.GPT2, "smollm2": tokenizer_json.SMOLLM2, "llama3": SPLIT,
                   "qwen2": tokenizer_json.QWEN2}[kind]
        bare = Tiktoken(kind, tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks,
                                                special_tokens=read.specials), read.specials["<|endoftext|>"])
    files = bare.as_files()
    again, b = open_tokenizer("made", files), theirs(json.loads(files["tokenizer.json"]))
    assert (again.eot, again.vocab_size) == (bare.eot, bare.vocab_size) and again.as_files() is again.files
    for part in [*text[::40], *random_strings(300, seed=9), tokenizer.PROBE]:
        part = part.replace("\0", "")
        ids = bare.encode(part).tolist()
        assert ids == again.encode(part).tolist() == b.encode(part, add_special_tokens=False).ids


def test_no_files_are_made_of_a_vocabulary_that_tokenizers_would_read_in_another_way():
    ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("odd", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    assert Tiktoken("odd", encoding).as_files() == {}                   # tiktoken drops the blanks


# -- SentencePiece

def test_ids_of_pieces_are_those_of_transformers(pieces, tmp_path):
    a, files = pieces
    if "tokenizer.model" in files:
        pytest.importorskip("google.protobuf")
    b = transformers.AutoTokenizer.from_pretrained(toys.write_files(tmp_path, files))
    for s in [*random_strings(1000), *toys.TEXTS[:5], tokenizer.PROBE]:
        # Before a text that begins with a blank, sentencepiece puts another one, and transformers 5 does not.
        s = s.lstrip(" ") if "tokenizer.model" in files else s
        assert a.encode(s).tolist() == b.encode(s, add_special_tokens=False), ascii(s)


def test_transformers_own_class_for_llama_has_the_same_ids(tmp_path):
    files = toys.json_files("mistral", tokenizer_class="LlamaTokenizer", legacy=False, unk_token="<unk>")
    a, b = open_tokenizer("x", files), transformers.AutoTokenizer.from_pretrained(toys.write_files(tmp_path, files))
    assert type(b).__name__ == "LlamaTokenizer"
    for s in [*random_strings(1000), *toys.TEXTS[:5]]:
        assert a.encode(s).tolist() == b.encode(s, add_special_tokens=False), ascii(s)


@pytest.mark.parametrize("kind", ["llama2", "gemma", "mistral", "unigram with bytes", "bpe", "unigram.model"])
def test_pieces_say_their_bytes_and_give_the_text_back(kind):
    files = toys.json_files(kind) if kind in toys.KINDS else toys.model_files(kind.split(".")[0])
    a = open_tokenizer(kind, files)
    lengths = a.byte_lengths()
    assert a.adds_blank == (kind != "gemma")
    # Metaspace puts a blank only before a text that begins with none, so a blank in front is lost in these two.
    metaspace = kind in ("mistral", "unigram with bytes")
    for s in [*random_strings(500), *toys.TEXTS[:5], "", " ", "  a", tokenizer.PROBE]:
        s = s.replace(toys.BLANK, "_")
        ids = a.encode(s)
        kept = s[1:] if metaspace and s.startswith(" ") else s
        assert a.decode(ids) == kept, ascii(s)
        assert lengths[ids].sum() == len(kept.encode()) + (a.adds_blank and len(ids) > 0), ascii(s)
    documents = ["the one", " the other", "a\nthird"]
    ids = [i for s in documents for i in (*a.encode(s), a.eot)]
    assert a.decode(ids).split("</s>")[:-1] == [s.lstrip(" ") if metaspace else s for s in documents]
    assert lengths[a.eot] == 0 and a.token_bytes(a.vocab_size + 7) == b""
    assert a.token_bytes(a.encode("\n\x01")[-1]) == b"\x01"                             # <0x01>


def test_a_unigram_model_without_bytes_says_unknown():
    a = open_tokenizer("x", toys.json_files("unigram"))
    ids = a.encode("the \u4e01\u4e02 text")
    assert a.specials["<unk>"] in ids and a.byte_lengths()[ids].sum() == len(" the  text")
    assert a.decode(ids) == "the <unk> text"


def test_the_ends_and_openings_of_a_tokenizer_model_are_those_of_its_files(monkeypatch):
    files = toys.model_files()
    a = open_tokenizer("x", files)
    assert (a.eot, a.bos, a.opening, a.specials) == (2, 1, [1], {"<unk>": 0, "<s>": 1, "</s>": 2})
    assert open_tokenizer("other", {"tokenizer.model": files["tokenizer.model"]}).name == a.name     # its own ends
    config = {"eos_token": "<pad>", "add_bos_token": False, "added_tokens_decoder": {
        str(a.vocab_size): {"content": "<pad>"}, str(a.vocab_size + 3): {"content": "<|im_end|>"}}}
    b = open_tokenizer("x", {**files, "tokenizer_config.json": json.dumps(config)})
    assert (b.eot, b.opening, b.vocab_size) == (a.vocab_size, [], a.vocab_size + 4) and b.name != a.name
    assert b.decode([b.eot, b.eot + 1, b.eot + 3]) == "<pad><|im_end|>"
    c = open_tokenizer("x", {**files, "added_tokens.json": json.dumps({"<pad>": a.vocab_size})})
    assert c.encode("a<pad></s>", special=True).tolist() == [*a.encode("a"), a.vocab_size, 2]
    for name, content, sentence in [
            ("tokenizer.model", b"", "tokenizer.model is damaged .INTERNAL"),
            ("tokenizer.model", b"nonsense", "tokenizer.model is damaged .INTERNAL"),
            ("tokenizer.model", files["tokenizer.model"][:5000], "tokenizer.model is damaged"),
            ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tokenizer.model is a list of tiktoken's tokens and not Sentence"),
            ("added_tokens.json", '{"<pad>": "x"}', "the added tokens are damaged .ValueError"),
            ("added_tokens.json", '{"<pad>": -1}', "the added tokens are damaged .ValueError: an id of -1"),
            ("added_tokens.json", '{"<pad>": Infinity}', "the added tokens are damaged .OverflowError"),
            ("added_tokens.json", '{"<pad>": 99999999999}', "has an id 99,999,999,999, and ids up to 16,777,216"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"5": 7}}', "the added tokens are damaged .TypeError"),
            ("tokenizer_config.json", '{"eos_token": "<end>"}', "eos_token '<end>' of tokenizer_config.json is not")]:
        with pytest.raises(UserError, match=sentence):
            open_tokenizer("x", {**files, name: content})
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="x has a tokenizer.model and no tokenizer.json, .* pip install sentencepiece"):
        open_tokenizer("x", files)


def test_a_folder_with_a_tokenizer_model_alone_is_read_from_its_files(tmp_path):
    files = toys.model_files()
    toys.write_files(tmp_path, files)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert tokenizer.read_files(tmp_path) == files
    name = open_tokenizer("x", files).name
    assert open_tokenizer(str(tmp_path)).name == open_tokenizer(str(tmp_path / "tokenizer.model")).name == name
    (tmp_path / "tokenizer.json").write_text(toys.json_files("llama2")["tokenizer.json"])     # as Llama 2: has both
    assert {*tokenizer.read_files(tmp_path)} == {"tokenizer.json", "tokenizer_config.json"}


# -- no document ends itself

def forged(a):
    """Texts that spell special tokens, in many surroundings."""
    for text in a.specials:
        yield from (text, "a" + text, text + "b", " " + text, text + text, "\n" + text)
        yield from (text[:-1] + text, text[1:] + text)
    yield "".join(a.specials)


def all_kinds(contents):
    yield from (ours(content) for content in contents.values())
    yield from (open_tokenizer(kind, toys.json_files(kind)) for kind in toys.KINDS)
    yield from (open_tokenizer(kind, toys.model_files(kind)) for kind in ("bpe", "unigram"))
    yield open_tokenizer("made", Bytes().as_files())
    yield ours(toy("<", "<end>", merges=[], ignore_merges=True) | {"added_tokens": [
        {"id": 257, "content": "<end>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}]}, eos_token="<end>")          # a word that is a token stays one


def test_no_document_spells_a_special_token(contents):
    for a in all_kinds(contents):
        special_ids = {*a.specials.values()} - {a.specials.get("<unk>")}
        assert special_ids and a.eot in special_ids
        texts = [*forged(a)]
        for b in (a, pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
            assert b.name == a.name
            for s, ids in zip(texts, b.encode_batch(texts)):
                assert ids.tolist() == b.encode(s).tolist() and not special_ids & {*ids.tolist()}, (a.name, s)


@pytest.mark.parametrize("text, special, eos, comes_out", [
    ("<think>", False, None, False), ("[TOOL]", False, None, False), ("\n\n", False, None, True),
    ("END", False, None, True), ("END", False, "END", False), ("END", True, None, False)])
def test_added_tokens_come_out_of_text_unless_they_look_special_or_end_it(text, special, eos, comes_out):
    made = toys.gemma()
    made.add_tokens([AddedToken(text, special=special, normalized=False)])
    files = {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps({"eos_token": eos or "</s>"})}
    a, i = open_tokenizer("x", files), made.token_to_id(text)
    assert (i in a.encode(f"a{text}b")) == comes_out and i in a.encode(f"a{text}b", special=True)
    assert a.byte_lengths()[i] == (len(text) if comes_out else 0)
    assert a.decode(a.encode(f"a{text}b")) == f"a{text}b"


@pytest.mark.parametrize("unknown, expected", [("<|endoftext|>", [97, 98]), ("<unk>", [97, 257, 98])])
def test_an_unknown_byte_does_not_end_a_document(unknown, expected):
    """SmolLM2's tokenizer.json lacks 21 bytes and names <|endoftext|> for them."""
    content = toy(merges=[], unk_token=unknown)
    content["model"]["vocab"] = {text: i for text, i in content["model"]["vocab"].items() if text != "\u0104"} | {
        "<|endoftext|>": 256, "<unk>": 257}
    assert ours(content).encode("a\x04b").tolist() == expected
    assert ours(content, bos_token="<|endoftext|>").encode("a\x04b").tolist() == expected
    assert theirs(content).encode("a\x04b").ids == [97, content["model"]["vocab"][unknown], 98]
    content = json.loads(toys.unigram().to_str())
    with pytest.raises(UserError, match="the token for unknown characters is the one that ends a document"):
        ours(content, eos_token="<unk>")


def test_a_text_that_ends_documents_and_cannot_be_kept_out_is_refused():
    made = toys.unigram()
    made.add_special_tokens(["."])
    files = {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps({"eos_token": "."})}
    with pytest.raises(UserError, match="the special token '.' is a single character, which any document may hold"):
        open_tokenizer("x", files)
    files = toys.model_files(user_defined_symbols=["<|im_end|>"])
    assert 3 in open_tokenizer("x", files).encode("a<|im_end|>")                 # as in transformers; it ends nothing
    for text in ("<|im_end|>", "<unk>", "e"):
        i = {"<|im_end|>": 3, "<unk>": 0}.get(text) or open_tokenizer("x", files).encode("here")[-1]
        config = {"eos_token": text, "added_tokens_decoder": {str(i): {"content": text}}}
        with pytest.raises(UserError, match="a document may spell the token that ends it, '.*', as it is no control"):
            open_tokenizer("x", files | {"tokenizer_config.json": json.dumps(config)})


@pytest.mark.parametrize("flag", ["normalized", "lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", *toys.KINDS])
def test_no_flag_of_a_special_token_lets_a_document_spell_it(kind, flag, contents):
    made = toys.KINDS[kind]() if kind in toys.KINDS else theirs(contents[kind])
    made.add_special_tokens([AddedToken("<end>", special=True, **{flag: True})])
    a = ours(json.loads(made.to_str()), eos_token="<end>")
    assert a.eot in a.encode("a <end> b", special=True)
    for text in [*forged(a), "a <end> b"]:
        assert a.eot not in a.encode(text), text


def test_truncation_and_padding_of_a_file_do_not_change_ids(contents):
    made = theirs(contents["gpt2"])
    made.enable_truncation(3)
    made.enable_padding(length=9)
    a, b = ours(json.loads(made.to_str())), ours(contents["gpt2"])
    assert a.encode("a longer text than three").tolist() == b.encode("a longer text than three").tolist()
    assert a.encode("a", special=True).tolist() == b.encode("a").tolist()
    assert a.encode_batch(["a", "a longer text"])[0].tolist() == b.encode("a").tolist() and a.opening == []


def test_files_outside_of_the_folder_are_not_read(tmp_path):
    outside, folder = tmp_path / "outside.json", tmp_path / "folder"
    outside.write_text("secret")
    files = toys.json_files("llama2", chat_template=str(outside), vocab_file="../outside.json",
                            auto_map={"AutoTokenizer": ["../outside.Evil", None]})
    toys.write_files(folder, files | {"../outside.py": "1 / 0"})
    read = tokenizer.read_files(folder)
    assert read == files and "secret" not in str(open_tokenizer(str(folder)).files)


# -- where a text may be cut

def openai_encodings(monkeypatch):
    """tiktoken's own regular expressions, each with a vocabulary of all pairs of these bytes."""
    from tiktoken_ext import openai_public
    some = [bytes([byte]) for byte in b"\n\r \tab1'./"] + ["é".encode(), "日".encode()]
    tokens = [bytes([byte]) for byte in range(256)] + [a + b for a in some for b in some]
    ranks = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
    for name in tokenizer.LINES_SPLIT:
        settings = openai_public.ENCODING_CONSTRUCTORS[name]()
        settings.pop("explicit_n_vocab", None)
        special = {text: len(ranks) + i for i, text in enumerate(settings["special_tokens"])}
        yield name, tokenizer.Tiktoken(name, tiktoken.Encoding(**{**settings, "special_tokens": special}))


def test_a_text_cut_behind_lines_has_the_ids_of_the_whole(contents, monkeypatch):
    kinds = {kind: ours(content) for kind, content in contents.items()} | {"bytes": Bytes()}
    kinds |= dict(openai_encodings(monkeypatch))
    assert all(tok.splits_at_lines for tok in kinds.values())
    tried = 0
    any_text = strategies.text(strategies.sampled_from("\n\n\r \tab1'./é日\u0301\u00a0\u180e🙂ſ"), max_size=12)
    ends = ["a\na", ".\nb", ".\n/", "'\ns", "1\n1", "\u0301\n日", "\r\n1", " \na", "\n\nb", "a\n/", "🙂\nſ", "/\né"]

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(any_text, strategies.sampled_from(ends), any_text)
    def cut_anywhere(left, end, right):
        nonlocal tried
        text = left + end + right
        place = data.last_line_end(left + end)
        tried += place > 0
        for name, tok in kinds.items():
            parts = [*tok.encode(text[:place]), *tok.encode(text[place:])]
            assert parts == tok.encode(text).tolist(), (name, text, place)
    cut_anywhere()
    assert tried > 200


@pytest.mark.parametrize("path, value", [
    ("normalizer", {"type": "Lowercase"}), ("pre_tokenizer", {"type": "Whitespace"}),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", "\\s+"), ("pre_tokenizer.pretokenizers.0.behavior", "Removed"),
    ("pre_tokenizer.pretokenizers.1.add_prefix_space", True),
    ("added_tokens.3.rstrip", True), ("added_tokens.3.content", "a\nb")])
def test_a_text_is_kept_whole_where_a_cut_may_change_ids(path, value, contents):
    content = contents["qwen2"]
    assert tokenizer_json.splits_at_lines(content) and not tokenizer_json.splits_at_lines(changed(content, path, value))


def test_pieces_of_sentencepiece_reach_across_lines(pieces):
    assert not pieces[0].splits_at_lines

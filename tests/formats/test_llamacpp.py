"""formats/gguf_export.py, gguf_vocabulary.py and llamacpp.py: llama.cpp itself is the oracle of values and tokens."""
import json
import resource
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import gguf
import pytest
import tiktoken
import tokenizers
import torch

from common import UserError
from formats import gguf_export, gguf_vocabulary, llamacpp
from formats.gguf_export import write_gguf
from formats.llamacpp import Gap, ask, check_gguf, open_server, speed, tokenize
from formats.tokenizer import PROBE, Tiktoken, open_tokenizer
from formats.tokenizer_json import LLAMA3 as LLAMA3_WORDS
from formats.tokenizer_json import PRE_TOKENIZERS, QWEN2
from model import GPT, GPTConfig

BYTES = open_tokenizer("bytes")
LLAMA3 = (8.0, 0.5, 4.0, 32.0)                  # frequencies on both sides of and between the two factors
EVEN = dict(n_head=(6, 6, 6), n_kv_head=(2, 2, 2), d_ff=(80, 80, 80))
ALL = dict(qkv_bias=True, rope_scaling=LLAMA3, tie_embeddings=False, rope_theta=5e5, norm_eps=1e-3)
NO_FIRST = dict(n_head=(0, 2, 3), n_kv_head=(0, 1, 3), d_ff=(0, 32, 160))
NO_MIDDLE = dict(n_head=(4, 0, 3), n_kv_head=(2, 0, 3), d_ff=(96, 0, 160))
NO_LAST = dict(n_head=(4, 2, 0), n_kv_head=(2, 1, 0), d_ff=(96, 32, 0))
NO_ATTENTION = dict(n_head=(4, 2, 0), n_kv_head=(2, 1, 0))
EVEN_BUT_NO_MIDDLE = dict(n_head=(6, 0, 6), n_kv_head=(2, 0, 2), d_ff=(80, 0, 80))
NOTHING = dict(n_head=(0, 0, 0), n_kv_head=(0, 0, 0), d_ff=(0, 0, 0))
CASES = [  # llama.cpp's architecture, and what differs from `shape`
    ("deci", {}), ("deci", dict(qkv_bias=True)), ("deci", dict(rope_scaling=LLAMA3)), ("deci", ALL),
    ("deci", dict(head_dim=32)), ("deci", NO_FIRST), ("deci", NO_MIDDLE), ("deci", NO_LAST), ("deci", NO_MIDDLE | ALL),
    ("deci", dict(n_head=(4, 2, 3), n_kv_head=(1, 1, 1))), ("deci", NO_FIRST | dict(d_ff=(7, 0, 1))),
    ("llama", EVEN), ("llama", EVEN | ALL), ("llama", EVEN | dict(head_dim=32)), ("llama", NOTHING),
    ("llama", EVEN_BUT_NO_MIDDLE | ALL), ("deci", NO_ATTENTION),
    ("llama", EVEN | dict(qkv_bias=True)), ("llama", EVEN | dict(qkv_bias=True, head_dim=8, rope_scaling=LLAMA3)),
    ("qwen2", EVEN | dict(qkv_bias=True, head_dim=8, tie_embeddings=False)),
    ("qwen3", EVEN | dict(qk_norm=True, tie_embeddings=False)), ("qwen3", EVEN | dict(qk_norm=True, head_dim=32)),
    ("openelm", dict(qk_norm=True)), ("openelm", dict(qk_norm=True, head_dim=32) | NO_FIRST),
    ("openelm", dict(qk_norm=True, norm_eps=1e-3) | NO_LAST)]


def shape(**changes):
    """A pruned model: other widths in each layer, heads that do not make d_model, more rows than the bytes need."""
    return GPTConfig(**dict(vocab_size=300, block_size=160, d_model=48, head_dim=16, n_head=(4, 2, 3),
                            n_kv_head=(2, 1, 3), d_ff=(96, 32, 160)) | changes)


def wild(config):
    """A model with large random weights, so that nothing is near to its value at initialisation."""
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


@pytest.mark.parametrize("arch, changes", CASES)
def test_llama_cpp_computes_the_same_and_says_the_same(arch, changes, tmp_path):
    model, path = wild(shape(**changes)), tmp_path / "model.gguf"
    before = torch.get_rng_state()
    write_gguf(model, BYTES, path, "f32")
    assert torch.equal(torch.get_rng_state(), before)                          # a run that exports draws what it would
    assert bytes(gguf.GGUFReader(path).fields["general.architecture"].parts[-1]).decode() == arch
    assert check_gguf(path, model, dtype="f32", tokenizer=BYTES) <= 1e-3
    prompt = torch.randint(256, (100,)).tolist()
    said = ask(path, prompt, tokens=20, top=3)
    expected = model.generate(torch.tensor([prompt]), 20, temperature=0)[0, 100:].tolist()
    assert [token for token, _ in said] == expected and len(set(expected)) > 1
    with torch.no_grad():
        best = model(torch.tensor([prompt]))[0, -1].log_softmax(-1).topk(3)
    assert [token for token, _ in said[0][1]] == best.indices.tolist()
    assert [logprob for _, logprob in said[0][1]] == pytest.approx(best.values.tolist(), abs=1e-3)


def unpaired(name, tensor):
    """q and k as we have them: neighbours 2i, 2i + 1 put back to i, i + D/2."""
    if "attn_q." in name or "attn_k." in name:
        return tensor.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
    return tensor


FAULTS = {
    "rows not paired": ({}, unpaired),
    "rope_freqs missing": (dict(rope_scaling=LLAMA3), lambda name, t: None if "rope_freqs" in name else t),
    "rope_freqs inverted": (dict(rope_scaling=LLAMA3), lambda name, t: 1 / t if "rope_freqs" in name else t),
    "absent FFN not zero": (dict(d_ff=(96, 0, 160)), lambda name, t: t + 1 if name.startswith("blk.1.ffn") else t),
    "absent attention not zero": (NO_ATTENTION, lambda name, t: t + 1 if name.startswith("blk.2.attn") else t),
    "bias left out": (dict(qkv_bias=True), lambda name, t: 0 * t if "attn_v.bias" in name else t),
    "one row wrong": ({}, lambda name, t: torch.cat((t[:-1], -t[-1:])) if name == "blk.2.attn_output.weight" else t),
    "head not the model's": (dict(tie_embeddings=False), lambda name, t: t.flip(0) if name == "output.weight" else t),
    "not finite": ({}, lambda name, t: t * 1e30 if "ffn_up" in name or "ffn_gate" in name else t)}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_refuses_a_file_with_a_wrong_tensor(fault, tmp_path, monkeypatch):
    changes, change = FAULTS[fault]
    model, right = wild(shape(**changes)), gguf_export.tensors
    monkeypatch.setattr(gguf_export, "tensors", lambda *a: (
        (name, new) for name, t in right(*a) if (new := change(name, t.detach())) is not None))
    write_gguf(model, BYTES, tmp_path / "model.gguf", "f32")
    with pytest.raises(UserError, match="is not the model: .* nats apart, more than 0.01; most at .*; report it"):
        check_gguf(tmp_path / "model.gguf", model, dtype="f32")


@pytest.mark.parametrize("key", ["rope.freq_base", "attention.layer_norm_rms_epsilon"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_check_refuses_a_file_with_a_wrong_number(key, dtype, tmp_path, monkeypatch):
    model, right = wild(shape()), gguf_export.add_shapes
    value = {"rope.freq_base": 5000.0, "attention.layer_norm_rms_epsilon": 0.5}[key]

    def wrong(writer, *rest):
        right(writer, *rest)
        writer.kv_data[0][f"deci.{key}"].value = value
    monkeypatch.setattr(gguf_export, "add_shapes", wrong)
    write_gguf(model, BYTES, tmp_path / "model.gguf", dtype)
    with pytest.raises(UserError, match="is not the model"):
        check_gguf(tmp_path / "model.gguf", model, dtype=dtype)


@pytest.mark.parametrize("changes", [{}, NO_MIDDLE | ALL, EVEN | dict(qk_norm=True)])
@pytest.mark.parametrize("dtype, rows", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounded_files_hold_the_rounded_matrices_and_pass_by_their_tolerance(dtype, rows, changes, tmp_path):
    model, path = wild(shape(**changes)), tmp_path / "model.gguf"
    write_gguf(model, BYTES, path, dtype)
    assert 0 < check_gguf(path, model, dtype=dtype, tokenizer=BYTES) < 1
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, tensor in gguf_export.tensors(model, gguf_export.architecture(model.config)):
        wanted = rows if tensor.dim() == 2 else torch.float32
        assert found[name].tensor_type.name == {torch.float32: "F32"}.get(wanted, dtype.upper())
        assert found[name].shape.tolist() == list(reversed(tensor.shape))
        assert found[name].data.tobytes() == tensor.to(wanted).contiguous().view(torch.uint8).numpy().tobytes(), name
    write_gguf(model.bfloat16(), BYTES, path, "f32")                           # a model in bf16 is written as it is
    assert check_gguf(path, model.float(), dtype="f32") <= 1e-3


def test_q8_0_refuses_what_its_scale_does_not_hold(tmp_path):
    model = GPT(shape(d_model=64))
    with torch.no_grad():
        model.blocks[0].ffn.gate.weight[0, 0] = 1e7
    with pytest.raises(UserError, match="has an entry of 1e[+]07, which q8_0 does not hold; give bf16 or f32"):
        write_gguf(model, BYTES, tmp_path / "model.gguf", "q8_0")


@pytest.mark.parametrize("changes", [dict(d_model=64, d_ff=(96, 33, 0)), EVEN | dict(d_model=64, qk_norm=True)])
def test_q8_0_is_the_library_s_and_what_llama_cpp_computes_with(changes, tmp_path):
    model, path = wild(shape(**changes)), tmp_path / "model.gguf"
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5 if p.dim() == 2 else 1)
    write_gguf(model.bfloat16(), BYTES, path, "q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, tensor in gguf_export.tensors(model, gguf_export.architecture(model.config)):
        plain, fits = tensor.detach().float().numpy(), tensor.shape[-1] % 32 == 0
        expected = gguf.quants.quantize(plain, kind) if fits else plain.astype("float16")
        expected, type_name = (plain, "F32") if tensor.dim() == 1 else (expected, "Q8_0" if fits else "F16")
        assert read[name].tensor_type.name == type_name and read[name].data.tobytes() == expected.tobytes(), name
        assert read[name].shape.tolist() == list(reversed(tensor.shape))
    rounded = gguf_export.as_in_q8_0(model)
    for p, q in zip(model.parameters(), rounded.parameters()):
        assert (p.float() - q).abs().max() <= p.float().abs().max() / 225      # half a step of 1/127, and f16's scale
    server, prompts = open_server(path, 140), llamacpp.random_prompts(model.config, 16)
    to_file, to_model = (statistics.median(gap.nats for gap in llamacpp.gaps(server, peer, prompts, 16))
                         for peer in (rounded, model.float()))
    assert to_file < to_model < 0.1
    assert check_gguf(path, rounded, dtype="q8_0", tokenizer=BYTES) < 0.5
    with torch.no_grad():
        rounded.blocks[0].ffn.down.weight.neg_()
    with pytest.raises(UserError, match="is not the model: .* nats apart .median., more than 0.5"):
        check_gguf(path, rounded, dtype="q8_0")


# -- tokens

TEXTS = [
    "", "Don't we'll I'M they'RE 'quoted' x's", "1234567 12 3.14 ٣٤٥ x9y  8", "\n\n\ta \n b\r\n\r\n   c    d\n",
    "naïve Ελληνικά русский 日本語かな。한국어 हिन्दी עברית ไทย", "🙂👩‍👩‍👧‍👦🇫🇷 ½²Ⅷ ﬁ", "a b\u00a0c\u3000d\u2028e\x85f",
    "if x[0]:\n    y += f(z)  # $5", "Ā Ġ č <|endoftext|> <|im_end|> [PAD299]", "the the there then bother other",
    "\x01\x7f\u0378\U000e0001", "....!!!\n---\n", PROBE]
TRAINING = [*TEXTS, llamacpp.__doc__, "def read(path):\n    return open(path).read()\n" * 3, "It's the other's."]
TIKTOKEN = {  # as tiktoken 0.14 spells them: what gpt2 and r50k_base have, and cl100k_base
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "llama-bpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
                 r"\s*[\r\n]|\s+(?!\S)|\s"}


def trained(steps, added=()):
    """A Hugging Face folder's files: byte-level BPE of 400 tokens, and of `added`, behind these pre-tokenizers."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    blank = json.loads(tokenizer.to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step for step in steps]}}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(blank))
    tokenizer.train_from_iterator(TRAINING, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    config = json.dumps({"eos_token": "<|endoftext|>"})
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": config}


def served(tokenizer, path, vocab_size=450):
    """A small model with that tokenizer, written and opened in llama.cpp: the server, and the file as gguf reads it."""
    write_gguf(wild(shape(vocab_size=vocab_size)), tokenizer, path)
    return open_server(path, 64), {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def decoded(server, ids):
    """llama.cpp's text of token ids."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    reply = direct.open(f"{server.listening_address}/detokenize", json.dumps({"tokens": ids}).encode(), timeout=60)
    return json.load(reply)["content"]


def same_tokens(server, tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert tokenize(server, text) == ids, text
        assert decoded(server, ids) == tokenizer.decode(ids) == text
    return True


def test_bytes_are_tokens_in_llama_cpp_too(tmp_path):
    server, found = served(BYTES, tmp_path / "model.gguf", 300)
    assert same_tokens(server, BYTES)
    assert tokenize(server, "a\0b") == [97, 98] == BYTES.encode("a\0b").tolist()
    every = [*range(1, 256)]
    assert decoded(server, every) == BYTES.decode(every)                       # what is no UTF-8 becomes U+FFFD
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.tokens"][256:] == [f"[PAD{i}]" for i in range(256, 300)]
    assert found["tokenizer.ggml.token_type"] == [3] + [1] * 255 + [5] * 44
    assert not found["tokenizer.ggml.add_bos_token"] and "tokenizer.chat_template" not in found


@pytest.mark.parametrize("name, pattern", [(name, p) for name, p in gguf_vocabulary.RULES.items()])
def test_a_tokenizer_json_gives_the_same_ids_and_text_in_llama_cpp(name, pattern, tmp_path):
    tokenizer = open_tokenizer("x", trained(PRE_TOKENIZERS[pattern]))
    server, found = served(tokenizer, tmp_path / "model.gguf")
    assert found["tokenizer.ggml.pre"] == name and same_tokens(server, tokenizer)
    assert len(tokenizer.encode(TEXTS[1])) < len(TEXTS[1]) - 5                 # something merged


@pytest.mark.parametrize("name", TIKTOKEN)
def test_a_tiktoken_vocabulary_gives_the_same_ids_and_text_in_llama_cpp(name, tmp_path):
    base = open_tokenizer("x", trained(PRE_TOKENIZERS[gguf_vocabulary.RULES[name]]))
    ranks = {base.token_bytes(i): i - 1 for i in range(1, 400)}
    specials = {"<|endoftext|>": len(ranks), "<|fim|>": len(ranks) + 7}        # as in cl100k_base, ids are left out
    tokenizer = Tiktoken(name, tiktoken.Encoding(name, pat_str=TIKTOKEN[name], mergeable_ranks=ranks,
                                                  special_tokens=specials))
    server, found = served(tokenizer, tmp_path / "model.gguf")
    for text in (text.rstrip() for text in TEXTS):                             # blank lines at the end: see `rule`
        assert tokenize(server, text) == tokenizer.encode(text).tolist(), text
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"] == len(ranks)
    assert found["tokenizer.ggml.tokens"][len(ranks):len(ranks) + 9] == [
        "<|endoftext|>", *(f"[PAD{len(ranks) + i}]" for i in range(1, 7)), "<|fim|>", f"[PAD{len(ranks) + 8}]"]


def test_special_tokens_templates_and_opening_tokens_are_those_of_the_files(tmp_path):
    files = trained(PRE_TOKENIZERS[LLAMA3_WORDS], added=["<think>"])
    content, config = json.loads(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])
    opens = {"type": "TemplateProcessing", "pair": [], "single": [
        {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [400], "tokens": ["<|im_end|>"]}}}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    for post, bos, add in [(None, 0, False), (level, 0, False), (opens, 400, True), ({
            "type": "Sequence", "processors": [level, opens]}, 400, True),
            (opens | {"single": opens["single"][1:]}, 0, False)]:
        files["tokenizer.json"] = json.dumps(content | {"post_processor": post})
        tokenizer = open_tokenizer("x", files)
        server, found = served(tokenizer, tmp_path / "model.gguf")
        assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (bos, add)
        assert same_tokens(server, tokenizer)
        assert len(ask(tmp_path / "model.gguf", [5, 6], 3)) == 3
    assert [found["tokenizer.ggml.token_type"][i] for i in (0, 1, 399, 400, 401, 402)] == [3, 1, 1, 3, 4, 5]
    assert found["tokenizer.ggml.tokens"][400:403] == ["<|im_end|>", "<think>", "[PAD402]"]
    assert tokenize(server, "a<think>") == [*tokenizer.encode("a").tolist(), 401]
    for more, template in [({"tokenizer_config.json": json.dumps(config | {"chat_template": "{{ a }}"})}, "{{ a }}"),
                           ({"chat_template.jinja": "{{ b }}"}, "{{ b }}"),
                           ({"tokenizer_config.json": json.dumps(config | {"bos_token": "<|im_end|>"})}, None)]:
        _, found = served(open_tokenizer("x", files | more), tmp_path / "model.gguf")
        assert found.get("tokenizer.chat_template") == template
    assert found["tokenizer.ggml.bos_token_id"] == 400 and not found["tokenizer.ggml.add_bos_token"]


# -- refusals

@pytest.mark.parametrize("changes, says", [
    (dict(qk_norm=True, rope_scaling=LLAMA3), "no architecture with QK norm and Llama 3's RoPE scaling; export with"),
    (EVEN | dict(qk_norm=True, qkv_bias=True), "no architecture with QK norm and a QKV bias; export with --to hf"),
    (dict(qk_norm=True, tie_embeddings=False), "layer 1 has .2, 1, 32. query heads, KV heads and neurons, layer 0 "
     ".4, 2, 96.: .* openelm, whose head is the embedding, and this model's is not; prune all layers to one width, or"),
    (dict(vocab_size=255), "tokenizer 'bytes' has ids up to 255, the embedding of the model 255 rows; take the tok")])
def test_what_llama_cpp_cannot_hold_is_refused_with_layer_reason_and_remedy(changes, says, tmp_path):
    with pytest.raises(UserError, match=says):
        write_gguf(GPT(shape(**changes)), BYTES, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


PATTERNS = [  # near to known ones: an alternative left out, which nothing else matches in the same way; a change
    *("|".join(parts[:i] + parts[i + 1:]) for parts in (p.split("|") for p in gguf_vocabulary.RULES.values())
      for i, part in enumerate(parts) if "(" not in part and ")" not in part),
    r"\S+|\s+", *(QWEN2.replace(*change) for change in [
        (r"\p{N}|", r"\p{N}{1,2}|"), (r"]+[\r\n]*", r"]+[\r\n/]*"), (r"\p{L}+|", r"[\p{L}\p{M}]+|"), ("(?i:", "(?:"),
        (r"\s+(?!\S)|", "")])]


def test_other_dtypes_and_unknown_word_rules_are_refused(tmp_path):
    for dtype in ("q4_k", "float16", ""):
        with pytest.raises(UserError, match=f"written in f32, f16, bf16, q8_0, not '{dtype}'; llama-quantize"):
            write_gguf(GPT(shape()), BYTES, tmp_path / "model.gguf", dtype)
    ranks = {bytes([b]): b for b in range(256)}
    assert len(PATTERNS) > 30
    for pattern in PATTERNS:
        other = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<end>": 256})
        with pytest.raises(UserError, match="'other' cuts text into words by .* gpt-2, smollm, llama-bpe, qwen2 only"):
            write_gguf(GPT(shape()), Tiktoken("other", other, eot=256), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_the_check_refuses_other_tokens(tmp_path, monkeypatch):
    tokenizer = open_tokenizer("x", trained(PRE_TOKENIZERS[QWEN2]))
    model, path = wild(shape(vocab_size=450)), tmp_path / "model.gguf"
    monkeypatch.setattr(gguf_vocabulary, "rule_of", lambda *_: "gpt-2")
    write_gguf(model, tokenizer, path)
    assert check_gguf(path, model, tokens=2) < 0.1
    with pytest.raises(UserError, match="llama.cpp's tokens of a text differ from ours, .*; give it ids, no text"):
        check_gguf(path, model, tokenizer=tokenizer)


def test_llama_cpp_is_silent_where_all_is_well(tmp_path, capfd):
    write_gguf(wild(shape(block_size=32)), BYTES, tmp_path / "model.gguf")
    assert len(ask(tmp_path / "model.gguf", [1] * 30, tokens=2)) == 2
    time.sleep(0.3)                                                            # it writes in a thread of its own
    assert capfd.readouterr() == ("", "")


def test_llama_cpp_s_own_refusals_are_sentences(tmp_path, monkeypatch, capfd):
    model, path = wild(shape(block_size=32)), tmp_path / "model.gguf"
    with pytest.raises(UserError, match="llama.cpp does not load .*model.gguf; its lines here say why"):
        ask(path, [1])
    time.sleep(0.3)
    assert "No such file" in capfd.readouterr().err
    write_gguf(model, BYTES, path)
    with pytest.raises(UserError, match="refuses 32 tokens: .* exceeds the available context size .*; a file's"):
        ask(path, [1] * 31, tokens=2)
    with pytest.raises(UserError, match="refuses 0 tokens"):
        ask(path, [])
    with pytest.raises(UserError, match="refuses 2 tokens: .* invalid tokens"):
        ask(path, [1, 300])
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UserError, match="package xllamacpp; pip install xllamacpp"):
        check_gguf(path, model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="written by the package gguf: pip install gguf"):
        write_gguf(model, BYTES, path)


def test_a_server_closed_at_once_does_not_hang(tmp_path):
    write_gguf(wild(shape()), BYTES, tmp_path / "model.gguf")
    subprocess.run([sys.executable, "-c",
                    f"from formats import llamacpp; llamacpp.open_server({str(tmp_path / 'model.gguf')!r}, 8)"],
                   check=True, timeout=60, cwd=Path(llamacpp.__file__).parent.parent)


def test_one_position_in_two_may_be_off_where_llama_cpp_rounds_and_none_in_float32(tmp_path, monkeypatch):
    model, path = wild(shape()), tmp_path / "model.gguf"
    write_gguf(model, BYTES, path)
    far, near = Gap(15.0, 0, 7, 3, -1.0, -16.0), Gap(0.01, 1, 2, 3, -1.0, -1.01)
    for dtype, off, passes in [("f32", 1, False), ("f16", 1, True), ("bf16", 3, True), ("f16", 5, False)]:
        monkeypatch.setattr(llamacpp, "gaps", lambda *a, off=off: iter([far] * off + [near] * 4))
        if passes:
            assert check_gguf(path, model, dtype=dtype) == 15
        else:
            says = (f"15 nats apart{' .median.' * (dtype == 'f16')}, more than .*; most at position 7 of prompt 0, "
                    "where token 3 has log-probability -1.0 in ours and -16.0 in llama.cpp; ")
            with pytest.raises(UserError, match=says):
                check_gguf(path, model, dtype=dtype)


@pytest.mark.parametrize("other", ["the second token", "not a number"])
def test_our_best_token_must_be_llama_cpp_s_and_every_probability_a_number(other, tmp_path, monkeypatch):
    model, path, right = wild(shape()), tmp_path / "model.gguf", llamacpp.greedy

    def wrong(*a):
        said = right(*a)
        if other == "not a number":
            return [(token, [*best[:4], (best[4][0], float("nan"))]) for token, best in said]
        return [*said[:-1], (said[-1][1][1][0], said[-1][1][1:])]              # all that it says is true
    write_gguf(model, BYTES, path, "f32")
    monkeypatch.setattr(llamacpp, "greedy", wrong)
    with pytest.raises(UserError, match="is not the model"):
        check_gguf(path, model, dtype="f32")


# -- the file, and the rest

def test_nothing_is_left_where_writing_fails_and_the_old_file_stays(tmp_path, monkeypatch):
    model, path = wild(shape()), tmp_path / "model.gguf"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60000, before[1]))          # the disk is full in mid-tensor
        with pytest.raises(OSError) as problem:
            write_gguf(model, BYTES, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem.value.errno                                                 # so that common.run makes it a sentence
    with torch.no_grad():
        model.blocks[1].attn.o.weight[3, 4] = -70000.0
    with pytest.raises(UserError, match="blk.1.attn_output.weight has an entry of 70000, which f16 does not hold;"):
        write_gguf(model, BYTES, path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    for dtype in ("bf16", "f32"):
        write_gguf(model, BYTES, path, dtype)
    monkeypatch.setattr(torch, "cat", lambda *a: 1 / 0)                        # in the second half of the tensors
    model, old = wild(shape(qk_norm=True)), path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_gguf(model, BYTES, path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_tie_is_no_difference_and_certainty_is_a_number(tmp_path):
    model, path = wild(shape(tie_embeddings=False)), tmp_path / "model.gguf"
    with torch.no_grad():
        model.head.weight[150:] = model.head.weight[:150]                      # every token has an equal
    write_gguf(model, BYTES, path, "f32")
    assert check_gguf(path, model, dtype="f32") <= 1e-3
    with torch.no_grad():
        model.head.weight.copy_(wild(shape(tie_embeddings=False)).head.weight * 200)
    write_gguf(model, BYTES, path, "f32")
    assert max(best[0][1] for _, best in ask(path, [1, 2, 3])) == 0            # log 1; the others' float32 is 0
    assert check_gguf(path, model, dtype="f32") <= 1e-2


def test_a_model_that_wants_the_end_of_text_is_asked_on(tmp_path):
    model, path = wild(shape(tie_embeddings=False)), tmp_path / "model.gguf"
    with torch.no_grad():
        model.head.weight[0] = model.head.weight[1:].sum(0) * 3
    write_gguf(model, BYTES, path, "f32")
    said = [token for token, _ in ask(path, [5, 9], 20)]
    assert 0 in said[:-1] and said == model.generate(torch.tensor([[5, 9]]), 20, temperature=0)[0, 2:].tolist()


@pytest.mark.parametrize("block_size", [2, 3, 8, 20])
def test_short_contexts_are_checked_with_shorter_prompts(block_size, tmp_path):
    model = wild(shape(block_size=block_size))
    write_gguf(model, BYTES, tmp_path / "model.gguf", "f32")
    assert check_gguf(tmp_path / "model.gguf", model, dtype="f32") <= 1e-3
    assert check_gguf(tmp_path / "model.gguf", model, [[1], [2]], dtype="f32") <= 1e-3


def test_speed_counts_tokens(tmp_path):
    write_gguf(wild(shape()), BYTES, tmp_path / "model.gguf")
    found = speed(tmp_path / "model.gguf", prompt=64, tokens=32, repeats=2)
    assert set(found) == {"prompt", "decode"} and min(found.values()) > 10

"""experiments/glassllm.py: the oracle is the package's model and tokenizer, written once more in NumPy."""
import importlib.resources
import io
import json
import re
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
import transformers

import checkpoint
from common import UserError
from experiments import glassllm
from formats.tokenizer import PROBE, open_tokenizer

SHAPE = dict(vocab_size=22, d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, max_len=16, rope_base=100.0, eps=1e-3,
             init_std=0.02)
TOKENIZER = {"version": 1, "alphabet": ["\n", "a", "b", "c", "é", "▁"],
             "merges": [["a", "b"], ["▁", "a"], ["b", "c"], ["▁a", "bc"], ["ab", "c"], ["a", "bc"], ["▁", "▁"],
                        ["▁▁", "▁▁"], ["\n", "a"], ["c", "c"], ["cc", "c"], ["é", "é"]]}
TEXTS = ["", "abc  ab\n\nabcabc", " a bc", "    a", "ababab bcbc\nabc ", "e\u0301\u00e9e\u0301x", "a▁b ▁", "xyz <eos>",
         "cccc ccccc", "\t\r\na", PROBE]


def arrays_of(shape):
    rng = np.random.default_rng(0)
    d, head = shape["d_model"], shape["d_model"] // shape["n_heads"]
    sizes = {"norm1.gamma": (d,), "norm2.gamma": (d,), "attn.W_Q": (d, d), "attn.W_O": (d, d),
             "attn.W_K": (d, shape["n_kv_heads"] * head), "attn.W_V": (d, shape["n_kv_heads"] * head),
             "ffn.W1": (d, 37), "ffn.W3": (d, 37), "ffn.W2": (37, d)}
    arrays = {"E": (shape["vocab_size"], d), "norm_f.gamma": (d,)}
    arrays |= {f"blocks.{layer}.{name}": size for layer in range(shape["n_layers"]) for name, size in sizes.items()}
    return {name: rng.normal(size=size).astype(np.float16) for name, size in arrays.items()}


def npz(shape, arrays):
    file = io.BytesIO()
    np.savez_compressed(file, __config__=np.array(json.dumps(shape)), **arrays)
    return file.getvalue()


def forward(shape, arrays, ids):
    """The package's model in float64: (T,) ids -> (T, V) logits. Its RoPE turns the neighbours of a head."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    heads, groups, T = shape["n_heads"], shape["n_kv_heads"], len(ids)
    D = shape["d_model"] // heads
    angles = np.outer(np.arange(T), shape["rope_base"] ** (-2.0 * np.arange(D // 2) / D))

    def norm(x, gain):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + shape["eps"]) * gain

    def turn(x):
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = arrays["E"][ids]
    for layer in range(shape["n_layers"]):
        w = {name.split(".", 2)[2]: array for name, array in arrays.items() if name.startswith(f"blocks.{layer}.")}
        h = norm(x, w["norm1.gamma"])
        q, k = turn((h @ w["attn.W_Q"]).reshape(T, heads, D)), turn((h @ w["attn.W_K"]).reshape(T, groups, D))
        v = (h @ w["attn.W_V"]).reshape(T, groups, D)
        k, v = (np.repeat(y, heads // groups, axis=1) for y in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / D**0.5 + np.triu(np.full((T, T), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v).reshape(T, -1)
        x = x + mixed @ w["attn.W_O"]
        h = norm(x, w["norm2.gamma"])
        gate = h @ w["ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn.W3"])) @ w["ffn.W2"]
    return norm(x, arrays["norm_f.gamma"]) @ arrays["E"].T


def encode(content, text):
    """The package's tokenizer: the pair of the lowest rank is merged, everywhere in a word, until none is left."""
    merges = {tuple(pair): rank for rank, pair in enumerate(content["merges"])}
    texts = [*glassllm.SPECIALS, *content["alphabet"], *("".join(pair) for pair in content["merges"])]
    ids = {text: i for i, text in enumerate(texts)}
    found = []
    for word in re.findall(r"\n|▁*[^▁\n]+|▁+", unicodedata.normalize("NFC", text).replace(" ", "▁")):
        parts = list(word)
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in merges]:
            best, merged = min(pairs, key=merges.get), []
            for part in parts:                     # from left to right
                if merged and (merged[-1], part) == best:
                    merged[-1:] = ["".join(best), None]
                else:
                    merged.append(part)
            parts = [part for part in merged if part is not None]
        found += [ids.get(part, 1) for part in parts]
    return found


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package of the same form, in place of PyPI's: what it holds may be changed before it is fetched."""
    members = {"glassllm/weights/en.npz": npz(SHAPE, arrays_of(SHAPE)), glassllm.LICENSE: b"MIT License",
               "glassllm/weights/en.tokenizer.json": json.dumps(TOKENIZER).encode(), "../escaped": b"x",
               "glassllm/__init__.py": b"open('ran', 'w')"}

    def download(package, folder):
        with zipfile.ZipFile(tmp_path / "package.whl", "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        return tmp_path / "package.whl"
    monkeypatch.setattr(glassllm, "download", download)
    return members


def test_the_folder_computes_and_tokenizes_as_the_package(wheel, tmp_path):
    folder = tmp_path / "in" / "glass"
    glassllm.main(glassllm.Glass("fetch", str(folder)))
    model, about = checkpoint.load(folder)
    tokenizer = checkpoint.tokenizer_of(model, about, folder)
    assert model.embed.weight.dtype == torch.float16 and about["origin"]["license"] == "mit"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "package.whl"]
    ids = np.random.default_rng(1).integers(22, size=16)
    expected = forward(SHAPE, arrays_of(SHAPE), ids)
    for computed in (model.double()(torch.from_numpy(ids)[None]), transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float64)(torch.from_numpy(ids)[None]).logits):
        np.testing.assert_allclose(computed[0].detach().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == encode(TOKENIZER, text), text
        assert "<" in text or peer(text).input_ids == encode(TOKENIZER, text), text
    assert tokenizer.decode(tokenizer.encode("abc  ab\n a")) == "abc  ab\n a"
    assert (tokenizer.bos, tokenizer.eot) == (2, 3)


@pytest.mark.parametrize("name, content, says", [
    ("glassllm/weights/en.npz", npz(SHAPE, arrays_of(SHAPE) | {"E": np.array([{}], object)}), "not of the form"),
    ("glassllm/weights/en.npz", npz(SHAPE | {"n_heads": 0}, arrays_of(SHAPE)), "not of the form"),
    ("glassllm/weights/en.npz", npz(SHAPE | {"d_model": 12}, arrays_of(SHAPE)), "not of the form"),
    ("glassllm/weights/en.npz", npz(SHAPE, {}), "not of the form"),
    ("glassllm/weights/en.npz", b"x", "not of the form"),
    ("glassllm/weights/en.tokenizer.json", b'{"alphabet": [], "merges": [["a", "b"]]}', "tokenizer of .* not of the"),
    ("glassllm/weights/en.tokenizer.json", b"[", "is not a JSON object")])
def test_another_form_is_refused_and_nothing_is_left(name, content, says, wheel, tmp_path):
    wheel[name] = content
    with pytest.raises(UserError, match=says):
        glassllm.main(glassllm.Glass("fetch", str(tmp_path / "glass")))
    assert [path.name for path in tmp_path.iterdir()] == ["package.whl"]


@pytest.mark.parametrize("language", ["en", "pt"])
def test_against_the_package_itself(language):
    package = pytest.importorskip("glassllm", reason="pip install glassllm: it is the oracle")
    theirs, their_tokenizer = package.load_pretrained(language)
    weights = importlib.resources.files("glassllm") / "weights"
    model = glassllm.read_model(io.BytesIO((weights / f"{language}.npz").read_bytes())).float()
    assert model.config.num_params()["total"] == 852_608
    tokenizer = open_tokenizer("glassllm", glassllm.tokenizer_files(
        json.loads((weights / f"{language}.tokenizer.json").read_text(encoding="utf-8"))))
    text = "“Curiouser and curiouser!” cried Alice — Capitu olhou para mim, não é?\n  Ela   disse: «sim» 123\n"
    for sample in (text, *TEXTS):
        assert tokenizer.encode(sample).tolist() == their_tokenizer.encode(sample)
    ids = tokenizer.encode(text)[:100].astype(np.int64)
    logits = model(torch.from_numpy(ids)[None])[0].detach().numpy()
    np.testing.assert_allclose(logits, theirs.forward(ids).data[0], atol=1e-4)

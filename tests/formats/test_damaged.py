"""Files that somebody sent, with any part replaced: a UserError or nothing, and no file outside is touched."""
import contextlib
import copy
import json
import sys
import threading

import pytest
import tokenizer_toys as toys
import torch
from hypothesis import HealthCheck, given, settings, strategies
from safetensors.torch import save_file

import checkpoint
import export
from common import UserError
from formats import gguf_vocabulary, huggingface
from formats.tokenizer import Bytes, open_tokenizer, special_ids
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=300, block_size=16, d_model=12, head_dim=4, n_head=(3, 3), n_kv_head=(1, 1), d_ff=(5, 5))
QUICK = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
OPENED = threading.local()


def record(event, arguments):
    """Python reports every file that it opens."""
    if event == "open" and getattr(OPENED, "paths", None) is not None:
        OPENED.paths.append(str(arguments[0]))


sys.addaudithook(record)


@contextlib.contextmanager
def only_inside(folder, monkeypatch):
    """Nothing but a UserError comes out, and no file whose name has "outside" in it is opened."""
    OPENED.paths = []
    real = huggingface.open_shard
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "open_shard", lambda file: OPENED.paths.append(str(file)) or real(file))
        with contextlib.suppress(UserError):
            yield
    paths = OPENED.paths
    OPENED.paths = None
    assert not [path for path in paths if "outside" in path]
    assert not (folder / "outside" / "new").exists()


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """A folder with files of all kinds, and beside it weights that would load."""
    root = tmp_path_factory.mktemp("damaged")
    (root / "outside").mkdir()
    (root / "sent").mkdir()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    huggingface.save(root / "sent", model, "llama", Bytes().as_files())
    weights = {huggingface.their_name(name): p.detach() for name, p in model.named_parameters()}
    for folder in (root / "outside", root / "sent"):
        save_file(weights, folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    (root / "sent" / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint.save(root / "model.pt", model, step=3, tokenizer_files=toys.json_files("gemma"), license="mit",
                    run={"tokenizer": "bytes", "data": "stdlib"})
    return root


def anything(root):
    """A value of JSON: odd numbers, names of files elsewhere, nests."""
    names = [f"{where}/{file}" for where in ("../outside", root / "outside", "..", "/etc", "sub")
             for file in ("part.safetensors", "new", "passwd")]
    numbers = [0, -1, 1, 2, 3, 5, 13, 2**31, 2**63, 10**9, 10**30, 0.5, 1e300, float("nan"), float("inf")]
    plain = strategies.one_of(strategies.none(), strategies.booleans(), strategies.sampled_from(numbers),
                              strategies.sampled_from(names), strategies.text(max_size=5))
    return strategies.recursive(plain, lambda inner: strategies.one_of(
        strategies.lists(inner, max_size=3), strategies.dictionaries(strategies.text(max_size=3), inner, max_size=3)),
        max_leaves=5)


def replaced(content, draw, value):
    """A copy of `content`, a nest of lists and dictionaries, in which one entry is `value`, new or missing."""
    content = copy.deepcopy(content)
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(strategies.sampled_from([*keys, "new"] if isinstance(place, dict) else keys))
        inner = place.get(key) if isinstance(place, dict) else place[key]
        if isinstance(inner, (dict, list)) and inner and draw(strategies.integers(0, 3)):
            place = inner
            continue
        place[key] = value
        if draw(strategies.integers(0, 4)) == 0:
            del place[key]
        return content


KEYS = ["model_type", "num_hidden_layers", "hidden_size", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
        "sliding_window", "use_sliding_window", "eos_token_id", "block_configs", "n_head", "vocab_size", "auto_map",
        "tie_word_embeddings", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "quantization_config"]


@QUICK
@given(drawn=strategies.data())
def test_a_config_is_read_or_refused(drawn, sent, monkeypatch):
    config = json.loads((sent / "sent" / "config.json").read_text())
    changed = replaced(config, drawn.draw, drawn.draw(anything(sent)))
    for key in drawn.draw(strategies.lists(strategies.sampled_from(KEYS), max_size=2)):
        changed[key] = drawn.draw(anything(sent))
    with only_inside(sent, monkeypatch):
        huggingface.read_config(changed, "x")
    with only_inside(sent, monkeypatch):
        (sent / "sent" / "config.json").write_text(json.dumps(changed))
        try:
            model, about = checkpoint.load(sent / "sent")
            export.tokenizer_files(model, about, "x")
        finally:
            (sent / "sent" / "config.json").write_text(json.dumps(config))


@QUICK
@given(drawn=strategies.data())
def test_an_index_is_read_or_refused(drawn, sent, monkeypatch):
    index = sent / "sent" / "model.safetensors.index.json"
    single = sent / "sent" / "model.safetensors"
    content = index.read_text()
    if single.exists():
        single.rename(sent / "whole")
    with only_inside(sent, monkeypatch):
        index.write_text(json.dumps(replaced(json.loads(content), drawn.draw, drawn.draw(anything(sent)))))
        try:
            checkpoint.load(sent / "sent")
        finally:
            index.write_text(content)
            (sent / "whole").rename(single)


@pytest.mark.parametrize("kind", ["gemma", "unigram", "bytes"])
def test_a_tokenizer_is_read_or_refused(kind, sent, monkeypatch):
    files = Bytes().as_files() if kind == "bytes" else toys.json_files(kind)

    @settings(QUICK, max_examples=60)
    @given(drawn=strategies.data())
    def check(drawn):
        name = drawn.draw(strategies.sampled_from([*["tokenizer.json"] * 3, "tokenizer_config.json"]))
        changed = replaced(json.loads(files[name]), drawn.draw, drawn.draw(anything(sent)))
        with only_inside(sent, monkeypatch):
            tokenizer = open_tokenizer("x", {**files, name: json.dumps(changed)})
            tokenizer.decode(tokenizer.encode("a text 1\n"))
            tokenizer.encode("a</s>", special=True)
            tokenizer.byte_lengths()
            special_ids(tokenizer.files, 300, "x")
            gguf_vocabulary.chat_template(tokenizer)
            gguf_vocabulary.named_padding(tokenizer)
    check()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                  "adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", "[1]", "", "\xff"])
def test_deep_and_broken_json_is_a_sentence(name, content, sent, tmp_path):
    for file in (sent / "sent").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if name.startswith("model"):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{name} is not"):
        model, about = checkpoint.load(tmp_path)
        checkpoint.tokenizer_of(model, about, tmp_path)


def test_a_checkpoint_names_no_folder(sent):
    folder = sent / "sent"
    for run in ({"tokenizer": str(folder)}, {}):
        checkpoint.save(sent / "named.pt", GPT(GPTConfig(**SHAPE)), run=run)
        model, about = checkpoint.load(sent / "named.pt")
        with pytest.raises(UserError, match="no tokenizer '"):
            checkpoint.tokenizer_of(model, about, sent / "named.pt")
    assert open_tokenizer(str(folder)).eot == 0


@QUICK
@given(drawn=strategies.data())
def test_a_checkpoint_s_state_is_read_or_refused(drawn, sent, monkeypatch):
    state = torch.load(sent / "model.pt", weights_only=True)
    del state["digest"]
    value = drawn.draw(strategies.one_of(anything(sent), strategies.just(torch.ones(2)), strategies.just(b"x")))
    torch.save(replaced(state, drawn.draw, value), sent / "changed.pt")
    with only_inside(sent, monkeypatch):
        model, about = checkpoint.load(sent / "changed.pt")
        checkpoint.tokenizer_of(model, about, "x")
        files, _ = export.tokenizer_files(model, about, "x")
        (sent / "out").mkdir(exist_ok=True)
        huggingface.save(sent / "out", GPT(GPTConfig(**SHAPE)), "llama", files)

"""Hugging Face folders in and out: transformers is the oracle of values and gradients, and loads what we write."""
import copy
import functools
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import checkpoint
import export
import prune
from common import UserError
from formats import gguf_vocabulary, huggingface, origin
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
LLAMA3 = dict(factor=8.0, low_freq_factor=0.5, high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES = {  # transformers' class, and what differs from the shape below
    "llama-2": ("Llama", dict(num_key_value_heads=6, tie_word_embeddings=False)),
    "llama-3": ("Llama", dict(rope_scaling=dict(rope_type="llama3", **LLAMA3))),
    "smollm2": ("Llama", dict(num_key_value_heads=1, rope_theta=100000.0)),
    "mistral": ("Mistral", dict(sliding_window=None, tie_word_embeddings=False)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
}


def oracle(family, **changes):
    """A tiny random transformers model of the family, gains and biases random too."""
    torch.manual_seed(0)
    kind, differences = FAMILIES[family]
    shape = dict(vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3, rope_theta=500.0,
                 tie_word_embeddings=True, bos_token_id=1, eos_token_id=2) | differences | changes
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean="norm" in name, std=0.2)
    return model


def wild(**shape):
    """A model of ours with large random weights."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**dict(vocab_size=256, block_size=64, d_model=48, head_dim=8) | shape))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean="norm" in name, std=0.2)
    return model


def close(logits, expected):
    """Equal but for float32's rounding: less than 100 times its step at the largest logit. (Two orders of summation
    differ by about the root of the number of terms, here some ten steps.)"""
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 100 * torch.finfo(torch.float32).eps * expected.abs().max()


def config_of(folder, **changes):
    """Change config.json in place; a value of None removes the key."""
    path = folder / "config.json"
    c = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in c.items() if v is not None}))
    return c


# -- in

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_transformers(family, tmp_path):
    peer = oracle(family)
    peer.save_pretrained(tmp_path)
    model, about = checkpoint.load(tmp_path)
    assert about["huggingface"]["model_type"] == FAMILIES[family][0].lower()
    idx, upstream = torch.randint(61, (2, 40)), torch.randn(2, 40, 61)
    expected, logits = peer(idx).logits, model(idx)
    assert expected.std() > 0.5
    close(logits, expected)
    for logits in (expected, logits):
        (logits * upstream).sum().backward()
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    assert gradients.keys() == {huggingface.their_name(name) for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        g = gradients[huggingface.their_name(name)]
        assert g.norm() > 0 and (p.grad - g).norm() <= 1e-4 * g.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_and_out_again_is_bitwise(family, tmp_path):
    peer = oracle(family).bfloat16()
    peer.save_pretrained(tmp_path / "in")
    model, _ = checkpoint.load(tmp_path / "in")
    assert model.embed.weight.dtype == torch.bfloat16
    export.main(export.Export(str(tmp_path / "in"), str(tmp_path / "out")))
    again, about = checkpoint.load(tmp_path / "out")
    assert again.config == model.config and about["huggingface"]["architectures"][0].endswith("ForCausalLM")
    for (name, a), b in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()
    assert type(stock).__name__ == {"mistral": "LlamaForCausalLM"}.get(family, type(peer).__name__)
    idx = torch.randint(61, (2, 40))
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").float()
    close(stock(idx).logits, before(idx).logits)


def test_both_spellings_of_configs_are_read(tmp_path):
    oracle("llama-3").save_pretrained(tmp_path)
    c = json.loads((tmp_path / "config.json").read_text())
    new = {**c, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}
    old = {k: v for k, v in c.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}, "torch_dtype": "float32"}
    configs = [huggingface.read_config(x, "x") for x in (new, old)]
    assert configs[0] == configs[1] and configs[0].rope_scaling == (8.0, 0.5, 4.0, 32.0)
    assert configs[0].rope_theta == 500.0


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_transformers_defaults(family):
    kind = FAMILIES[family][0]
    bare = dict(vocab_size=61, hidden_size=256, num_attention_heads=8, num_hidden_layers=2, intermediate_size=40,
                num_key_value_heads=2)
    peer = getattr(transformers, f"{kind}Config")(**bare)
    ours = huggingface.read_config({"model_type": peer.model_type, **bare}, "x", block_size=64)
    assert ours.norm_eps == peer.rms_norm_eps and ours.tie_embeddings == peer.tie_word_embeddings
    assert ours.head_dim == (getattr(peer, "head_dim", None) or 256 // 8)
    in_version_5 = getattr(peer, "rope_parameters", None)
    assert ours.rope_theta == (in_version_5["rope_theta"] if in_version_5 else peer.rope_theta)


def test_mobilellm_is_llama_under_another_name(tmp_path):
    peer = oracle("smollm2")
    peer.save_pretrained(tmp_path)
    config_of(tmp_path, model_type="mobilellm", share_embedding=True, tie_word_embeddings=None, layer_sharing=False)
    idx = torch.randint(61, (1, 40))
    close(checkpoint.load(tmp_path)[0](idx), peer(idx).logits)


def test_shards_are_read_through_their_index(tmp_path):
    peer = oracle("qwen2")
    peer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    model, _ = checkpoint.load(tmp_path, dtype=torch.float64, block_size=16)
    assert model.config.block_size == 16 and all(p.dtype == torch.float64 for p in model.parameters())
    assert torch.equal(model.blocks[1].ffn.down.weight, peer.model.layers[1].mlp.down_proj.weight.double())
    assert all(p.is_meta for p in checkpoint.load(tmp_path, "meta")[0].parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM, which Linux has")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory_is_the_model_and_little_more(kind, tmp_path):
    """A bf16 file of 100 MB read as float32: 200 MB are the model's own."""
    model = wild(vocab_size=8000, d_model=1024, head_dim=64, n_head=(16,) * 4, n_kv_head=(16,) * 4, d_ff=(2816,) * 4)
    huggingface.save(tmp_path, model.bfloat16(), "llama")
    if kind == "bin":
        as_bin(tmp_path, load_file(tmp_path / "model.safetensors"))
    script = ("import torch, checkpoint, safetensors.torch\n"
              "lines = lambda: open('/proc/self/status').read().splitlines()\n"
              "peak = lambda: next(int(s.split()[1]) * 1024 for s in lines() if s.startswith('VmHWM'))\n"
              "before = peak()\n"
              f"model, _ = checkpoint.load({str(tmp_path)!r}, dtype=torch.float32)\n"
              "print((peak() - before) / sum(4 * p.numel() for p in model.parameters()))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.8 < float(done.stdout) <= 1.2


# -- refusals: one sentence with the file, the tensor or the reason

@pytest.fixture
def folder(tmp_path):
    oracle("qwen2").save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path


@pytest.mark.parametrize("changes, sentence", [
    (dict(model_type="gemma2"), "model_type 'gemma2' is another decoder"),
    (dict(num_local_experts=8), "mixture of experts"),
    (dict(quantization_config={"bits": 4}), "quantized"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(attention_bias=True), "attention_bias is True"),
    (dict(rope_theta="x", rope_parameters=None), "lacks or garbles could not convert"),
    (dict(num_attention_heads=0, head_dim=None), "lacks or garbles .*zero"),
    (dict(rms_norm_eps=[]), "lacks or garbles"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "scaled by 'yarn'"),
    (dict(partial_rotary_factor=0.5), "rotated in part"),
    (dict(hidden_size=None), "lacks or garbles 'hidden_size'"),
    (dict(num_attention_heads=5), "query heads must be a multiple"),
    (dict(intermediate_size=44), r"mlp.gate_proj.weight is \(40, 48\), config.json asks for \(44, 48\)"),
    (dict(num_hidden_layers=3), "has no tensor model.layers.2."),
    (dict(num_hidden_layers=1), r"holds model.layers.1.*no place"),
    (dict(model_type="llama"), "q_proj.bias.*no place|_proj.bias.*no place"),
])
def test_other_models_are_refused_with_the_reason(folder, changes, sentence):
    config_of(folder, **changes)
    with pytest.raises(UserError, match=sentence):
        checkpoint.load(folder)


def test_a_sliding_window_limits_the_context(tmp_path):
    peer = oracle("mistral", sliding_window=32)
    peer.save_pretrained(tmp_path)
    model, _ = checkpoint.load(tmp_path, block_size=32)
    idx = torch.randint(61, (1, 32))
    close(model(idx), peer(idx).logits)
    assert checkpoint.load(tmp_path)[0].config.block_size == 32    # none asked for: all that is right
    with pytest.raises(UserError, match="32 tokens by a sliding window, fewer than the context of 33; ask"):
        checkpoint.load(tmp_path, block_size=33)
    export.main(export.Export(str(tmp_path), str(tmp_path / "out")))
    assert checkpoint.load(tmp_path / "out")[0].config.block_size == 32


def test_an_unused_sliding_window_is_ignored():
    bare = dict(model_type="qwen2", vocab_size=61, hidden_size=64, num_attention_heads=8, num_hidden_layers=2,
                intermediate_size=40, num_key_value_heads=2, max_position_embeddings=8192)

    def context(**more):
        return huggingface.read_config({**bare, **more}, "x").block_size
    assert context(sliding_window=16) == context(use_sliding_window=False, sliding_window=16) == 8192
    assert context(use_sliding_window=True) == 4096 and context(use_sliding_window=True, sliding_window=16) == 16


def test_one_file_goes_before_a_stale_index(tmp_path):
    oracle("qwen2").save_pretrained(tmp_path, max_shard_size="10KB")
    peer = oracle("qwen2", rope_theta=1000.0)
    with torch.no_grad():
        peer.model.norm.weight.add_(1)
    save_file({k: v.clone() for k, v in peer.state_dict().items() if k != "lm_head.weight"}, tmp_path /
              "model.safetensors", metadata={"format": "pt"})
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    idx = torch.randint(61, (1, 40))
    close(checkpoint.load(tmp_path)[0](idx), stock(idx).logits)
    assert torch.equal(checkpoint.load(tmp_path)[0].norm.weight, peer.model.norm.weight)


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    oracle("smollm2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              tmp_path / "model.safetensors")
    assert checkpoint.load(tmp_path)[0].head is None
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="ties head and embedding, but holds two different ones"):
        checkpoint.load(tmp_path)


def test_a_longer_context_is_refused(folder):
    with pytest.raises(UserError, match="trained with a context of 64 tokens, not 65"):
        checkpoint.load(folder, block_size=65)


def test_broken_files_are_named(folder):
    index = folder / "model.safetensors.index.json"
    first = sorted(folder.glob("model-*.safetensors"))[0]
    whole, names = first.read_bytes(), json.loads(index.read_text())["weight_map"]
    for cut in (len(whole) - 5, 40, 3):
        first.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"{first.name} \({cut:,} bytes\) is truncated"):
            checkpoint.load(folder)
    tensors = load_file(folder / names["model.norm.weight"])
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"} or {"other": torch.zeros(1)},
              folder / names["model.norm.weight"])
    first.write_bytes(whole)
    with pytest.raises(UserError, match="has no tensor model.norm.weight, though the index says so"):
        checkpoint.load(folder)
    first.unlink()
    with pytest.raises(UserError, match=rf"index.json names {first.name}, which is not there"):
        checkpoint.load(folder)
    for text, sentence in (("{", "is not a JSON object"), ("[1]", "is not a JSON object"), ("{}", "has no weight_map"),
                           ('{"weight_map": []}', "has no weight_map")):
        index.write_text(text)
        with pytest.raises(UserError, match=f"index.json {sentence}"):
            checkpoint.load(folder)
    index.unlink()
    with pytest.raises(UserError, match="has no model.safetensors nor its index, and no pytorch_model.bin"):
        checkpoint.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin is truncated"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/{}/secret.safetensors", "sub/x.safetensors", "..",
                                  "config.json", "x\0.safetensors"])
def test_an_index_leads_nowhere_else(name, tmp_path):
    folder = tmp_path / "sent"
    oracle("qwen2").save_pretrained(folder, max_shard_size="10KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    tensor, file = next(iter(content["weight_map"].items()))
    shutil.copy(folder / file, tmp_path / "secret.safetensors")           # it would load
    content["weight_map"][tensor] = name.format(str(tmp_path).strip("/"))
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index.json names .*, and only \*.safetensors files beside it are read"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/{}/outside", "sub/tokenizer.json", "config.json", "own_code.py", "..",
                                  "model.safetensors", "modeling_nanoprune.py"])
def test_a_checkpoint_leads_export_nowhere_else(name, tmp_path):
    """Outside of the folder, or in place of one of ours: config.json could name code, which our own check would run."""
    sent, out = tmp_path / "sent.pt", tmp_path / "deep" / "out"
    for about in (dict(huggingface={}), dict(run={"tokenizer": "x"})):
        files = {**open_tokenizer("bytes").as_files(), name.format(str(tmp_path).strip("/")): "{}"}
        checkpoint.save(sent, wild(**EVEN), tokenizer_files=files, **about)
        with pytest.raises(UserError, match="is no file of a tokenizer; those are tokenizer.json, "):
            export.main(export.Export(str(sent), str(out)))
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sent.pt"]


@pytest.mark.parametrize("change", ["the file", "the class", "the module", "the family", "an adapter", "no file"])
def test_a_sent_folder_runs_no_code_but_ours(change, tmp_path):
    model = wild(n_head=(6, 0), n_kv_head=(2, 0), d_ff=(40, 40))
    huggingface.save(tmp_path, model, "nanoprune")
    assert type(export.in_transformers(tmp_path)).__name__ == "NanopruneForCausalLM"
    file = tmp_path / "modeling_nanoprune.py"
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    runs = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "other.py").write_text(f"{runs}\nfrom modeling_nanoprune import *")
    if change == "the file":
        file.write_text(file.read_text() + runs)
    elif change == "the class":
        config_of(tmp_path, auto_map={**auto_map, "AutoConfig": "modeling_nanoprune.Block"})
    elif change == "the module":
        config_of(tmp_path, auto_map={**auto_map, "AutoModelForCausalLM": "other.NanopruneForCausalLM"})
    elif change == "the family":
        config_of(tmp_path, model_type="llama")
    elif change == "an adapter":
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    else:
        file.unlink()
    with pytest.raises(UserError, match="such code is never run|an adapter .* for elsewhere, not a model; merge"):
        export.in_transformers(tmp_path)
    assert not (tmp_path / "ran").exists()


# -- weights in pytorch_model.bin

def as_bin(folder, tensors, shards=1, **how):
    """Replace the weights of a folder by pytorch_model.bin, or by shards of it with an index."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **how)
        return
    names = [f"pytorch_model-{i}.bin" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards, how", [(1, {}), (3, {}), (1, {"_use_new_zipfile_serialization": False})])
def test_pickled_weights_are_read_as_transformers_reads_them(shards, how, tmp_path):
    peer = oracle("llama-2").bfloat16()
    peer.save_pretrained(tmp_path)
    as_bin(tmp_path, peer.state_dict(), shards, **how)
    model, _ = checkpoint.load(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[huggingface.their_name(name)]) and p.is_contiguous()
    assert checkpoint.load(tmp_path, dtype=torch.float32)[0].embed.weight.dtype == torch.float32


def test_safetensors_go_before_pickled_weights(tmp_path):
    peer = oracle("smollm2")
    peer.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert torch.equal(checkpoint.load(tmp_path)[0].norm.weight, peer.model.norm.weight)


class Runs:
    """What pickle would call when it is read."""
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {"system": Runs(os.system, "touch ran"), "eval": Runs(eval, "1"),
           "exec": Runs(exec, "1"), "Popen": Runs(subprocess.Popen, ["true"]),
           "getattr": Runs(getattr, 1, "real"), "partial": Runs(functools.partial, print),
           "open": Runs(open, "ran", "w"), "import_module": Runs(importlib.import_module, "os"),
           "rmtree": Runs(shutil.rmtree, "absent"), "serialization.load": Runs(torch.load, "absent"),
           "hub.load": Runs(torch.hub.load, "a/b", "c"), "run_path": Runs(runpy.run_path, "absent"),
           "linear.Linear": torch.nn.Linear(1, 1)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_pickled_code_is_refused_by_its_function_s_name(name, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peer = oracle("smollm2")
    peer.save_pretrained(tmp_path)
    as_bin(tmp_path, {**peer.state_dict(), "x": HOSTILE[name]}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"pytorch_model.bin .* would run [\w.]*{name}, and pickled code is never run"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content, sentence", [
    ([1], "holds no dictionary of tensors by name"), ({1: torch.zeros(1)}, "holds no dictionary of tensors by name"),
    ({"model.norm.weight": 3}, "holds no dictionary of tensors by name"),
    ({"model.norm.weight": torch.zeros(1).expand(10**12)}, r"model.norm.weight is \(1000000000000,\), config.json"),
    ({"model.norm.weight": torch.ones(48).to_sparse()}, "model.norm.weight is torch.sparse_coo; only"),
    ({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, "model.norm.weight is torch.int8; only F64, F32")])
def test_pickled_weights_that_are_no_model_s_are_refused(content, sentence, tmp_path):
    peer = oracle("smollm2")
    peer.save_pretrained(tmp_path)
    as_bin(tmp_path, {**peer.state_dict(), **content} if isinstance(content, dict) else content)
    with pytest.raises(UserError, match=sentence):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["../secret.bin", "sub/x.bin", "config.json", "x.safetensors", "/etc/passwd"])
def test_an_index_of_pickled_weights_leads_nowhere_else(name, tmp_path):
    peer = oracle("smollm2")
    peer.save_pretrained(tmp_path)
    as_bin(tmp_path, peer.state_dict(), 2)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match=r"names .*, and only \*.bin files beside it are read"):
        checkpoint.load(tmp_path)


# -- what else belongs to a model

TEMPLATES = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/tool_use.jinja": "{{ tools }}"}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3, 0], "pad_token_id": 5, "do_sample": True, "temperature": 0.6}


def chat_model(folder, generation, **config):
    """A folder whose tokenizer has bytes as tokens, with templates."""
    huggingface.save(folder, wild(n_head=(6,), n_kv_head=(2,), d_ff=(40,), vocab_size=256), "llama",
                     {**open_tokenizer("bytes").as_files(), **TEMPLATES})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    config_of(folder, **config)
    return folder


def pruned(folder, out):
    """What prune.py makes of a folder, without the cut."""
    model, about = checkpoint.load(folder)
    prune.save(prune.Prune(), model, out, checkpoint.tokenizer_of(model, about, folder), "", origin.hand_on(about))
    return out


@pytest.mark.parametrize("generation, config, expected", [
    (GENERATION, {}, GENERATION),
    (None, dict(eos_token_id=[2, 3], pad_token_id=4), {"eos_token_id": [2, 3], "pad_token_id": 4}),
    ({"temperature": 0.6}, dict(eos_token_id=[2, 3]), {"temperature": 0.6, "eos_token_id": [2, 3]})])
def test_ends_of_text_and_templates_survive_a_cut_and_an_export(generation, config, expected, tmp_path):
    sent = chat_model(tmp_path / "in", generation, **config)
    for source in (sent, pruned(sent, tmp_path / "cut")):
        out = tmp_path / f"out of {source.name}"
        export.main(export.Export(str(source), str(out)))
        written = json.loads((out / "generation_config.json").read_text())
        assert {key: written.get(key) for key in expected} == expected
        peer = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert peer.generation_config.eos_token_id == expected["eos_token_id"] == peer.config.eos_token_id
        assert peer.generation_config.pad_token_id == expected.get("pad_token_id") == peer.config.pad_token_id
        assert {name: (out / name).read_text() for name in TEMPLATES} == TEMPLATES
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [256, -2, "2", 2.0, True, [2, None], {"a": 1}, 10**30])
@pytest.mark.parametrize("place", ["config", "generation"])
def test_odd_token_ids_are_refused(key, value, place, tmp_path):
    ids = {key: value}
    sent = chat_model(tmp_path / "in", ids if place == "generation" else {}, **(ids if place == "config" else {}))
    with pytest.raises(UserError, match=f"{key} .* is none of the model's 256 token ids; correct it"):
        export.main(export.Export(str(sent), str(tmp_path / "out")))


def test_a_padding_of_minus_one_is_none(tmp_path):
    sent = chat_model(tmp_path / "in", None, pad_token_id=-1)
    export.main(export.Export(str(sent), str(tmp_path / "out")))
    assert "pad_token_id" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_gguf_has_name_license_file_type_ends_and_padding(tmp_path):
    gguf = pytest.importorskip("gguf")
    sent = chat_model(tmp_path / "in", GENERATION)
    for source in (sent, pruned(sent, tmp_path / "cut")):
        export.main(export.Export(str(source), str(tmp_path / "out.gguf"), "gguf", "float16", unchecked=True))
        fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
        values = {name: field.contents() for name, field in fields.items()}
        (tmp_path / "out.gguf").unlink()
        expected = {"general.name": source.name, "general.license": "apache-2.0",
                    "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
                    "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2,
                    "tokenizer.ggml.eom_token_id": 3, "tokenizer.ggml.padding_token_id": 5,
                    "tokenizer.chat_template": "{{ messages }}", "tokenizer.chat_template.tool_use": "{{ tools }}"}
        assert {name: values[name] for name in expected} == expected


def test_a_template_with_an_odd_name_is_refused_by_it(tmp_path):
    sent = chat_model(tmp_path, None)
    (sent / "additional_chat_templates" / "odd name.jinja").write_text("x")
    with pytest.raises(UserError, match="'additional_chat_templates/odd name.jinja' is no file of a tokenizer"):
        checkpoint.load(sent)


@pytest.mark.parametrize("template", [[{"name": "a"}], [{"name": "a", "template": "x"}, {"name": "a", "template": "y"}],
                                      ["x"], [{"name": 3, "template": "x"}]])
def test_a_template_that_a_gguf_cannot_hold_is_refused(template):
    files = open_tokenizer("bytes").as_files()
    config = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = json.dumps({**config, "chat_template": template})
    with pytest.raises(UserError, match="the chat template .* has no text, or no name of its own"):
        gguf_vocabulary.chat_template(open_tokenizer("x", files))


# -- other spellings, and sentences with the right remedy

@pytest.mark.parametrize("rename", [lambda name: name.removeprefix("model."), lambda name: "_orig_mod." + name,
                                    lambda name: name.replace("model.", "model._orig_mod.")])
def test_names_of_bare_and_of_compiled_models_are_read(rename, tmp_path):
    peer = oracle("llama-2")
    peer.save_pretrained(tmp_path)
    tensors = {rename(name): tensor for name, tensor in peer.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    idx = torch.randint(61, (1, 40))
    close(checkpoint.load(tmp_path)[0](idx), peer(idx).logits)
    save_file({**tensors, "model.norm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds model.norm.weight twice"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("tied", [False, None])
def test_a_tied_model_that_does_not_say_so_is_told_to(tied, tmp_path):
    oracle("smollm2").save_pretrained(tmp_path)
    config_of(tmp_path, tie_word_embeddings=tied)
    with pytest.raises(UserError, match=r"no tensor lm_head.weight, .* set tie_word_embeddings to true in config.json"):
        checkpoint.load(tmp_path)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    with pytest.raises(UserError, match=r"holds an adapter \(LoRA\) for somebody/base, not a model; merge the two"):
        checkpoint.load(tmp_path)


def test_the_hub_is_asked_for_pickled_weights_only_where_there_are_no_others(tmp_path, monkeypatch):
    import huggingface_hub
    patterns = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns:
                        patterns.append(allow_patterns) or str(tmp_path))
    checkpoint.find("somebody/model")
    (tmp_path / "model.safetensors").touch()
    checkpoint.find("somebody/model")
    assert len(patterns) == 3 and patterns[1] == ["pytorch_model*.bin*"] and patterns[0] == patterns[2]


def test_mixed_and_quantized_dtypes_are_refused(tmp_path):
    model = wild(n_head=(6,), n_kv_head=(2,), d_ff=(40,))
    model.norm.bfloat16()
    huggingface.save(tmp_path, model, "llama")
    with pytest.raises(UserError, match="mixes torch.bfloat16 and torch.float32; choose one"):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path, dtype=torch.float16)[0].norm.weight.dtype == torch.float16
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight is F8_E4M3; only"):
        checkpoint.load(tmp_path)


def test_a_hub_id_is_fetched_or_the_network_blamed(tmp_path, monkeypatch):
    import huggingface_hub
    oracle("smollm2").save_pretrained(tmp_path / "copy")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / "copy"))
    model, about = checkpoint.load("somebody/SmolLM2-135M")
    assert model.config.vocab_size == 61 and about["origin"]["name"] == "somebody/SmolLM2-135M"

    def offline(name, allow_patterns):
        raise ConnectionError("no route")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"no checkpoint at somebody/model, and the hub does not give it \(Connection"):
        checkpoint.load("somebody/model")
    with pytest.raises(UserError, match="no checkpoint at"):              # a folder that is there has no such run
        checkpoint.load(f"{tmp_path}/absent")


# -- out

EVEN = dict(n_head=(6, 6), n_kv_head=(2, 2), d_ff=(40, 40))
SHAPES = {  # shape, --to, class
    "even": (EVEN, "hf", "LlamaForCausalLM"),
    "even, heads not a divisor of d_model": (dict(n_head=(5, 5), n_kv_head=(1, 1), d_ff=(40, 40)), "hf",
                                             "NanopruneForCausalLM"),
    "even, bias": (dict(n_head=(5, 5), n_kv_head=(1, 1), d_ff=(40, 40), qkv_bias=True), "hf", "Qwen2ForCausalLM"),
    "even, QK norm": (dict(n_head=(5, 5), n_kv_head=(5, 5), d_ff=(8, 8), qk_norm=True), "hf", "Qwen3ForCausalLM"),
    "uneven": (dict(n_head=(0, 6, 4, 0, 3), n_kv_head=(0, 2, 1, 0, 3), d_ff=(10, 0, 40, 0, 7),
                    rope_scaling=(8., 1., 4., 32.)), "hf", "NanopruneForCausalLM"),
    "uneven, bias, untied": (dict(n_head=(5, 6, 0), n_kv_head=(5, 2, 0), d_ff=(0, 10, 0), qkv_bias=True,
                                  tie_embeddings=False), "hf", "NanopruneForCausalLM"),
    "uneven, QK norm": (dict(n_head=(5, 0, 5), n_kv_head=(5, 0, 1), d_ff=(10, 0, 3), qk_norm=True), "hf",
                        "NanopruneForCausalLM"),
    "no attention at all": (dict(n_head=(0, 0), n_kv_head=(0, 0), d_ff=(10, 0)), "hf", "NanopruneForCausalLM"),
    "deci": (dict(n_head=(6, 6, 0, 6), n_kv_head=(2, 3, 0, 6), d_ff=(512, 0, 40, 7)), "deci", "DeciLMForCausalLM"),
    "deci, bias": (EVEN | dict(qkv_bias=True), "deci", "DeciLMForCausalLM"),
}


@pytest.fixture(scope="module", params=SHAPES)
def exported(request, tmp_path_factory):
    """(our model, transformers' model from the folder that export.py wrote of it)"""
    widths, to, kind = SHAPES[request.param]
    model, folder = wild(**widths), tmp_path_factory.mktemp("exported")
    checkpoint.save(folder / "m.pt", model, run={"tokenizer": "bytes"})
    with redirect_stdout(StringIO()) as output:
        export.main(export.Export(str(folder / "m.pt"), str(folder / "out"), to))
    assert kind in output.getvalue() and "the same in transformers: logits at most" in output.getvalue()
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True).eval()
    assert type(peer).__name__ == kind
    return model, peer


def prompts():
    """Ids of a prompt of 20 tokens and of one of 15."""
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(2))
    return ids[0], ids[1, :15]


def greedy(model, prompt):
    """Our continuation by 20 tokens. None of its choices hinges on rounding."""
    ids = model.generate(prompt[None], 20, temperature=0)[0]
    logits = model(ids[None, :-1])[0, len(prompt) - 1:]
    best, second = logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 100 * torch.finfo(torch.float32).eps * logits.abs().max()
    return ids


def padded(side, width):
    """The two prompts in one batch, padded on one side -> (ids, mask), each (2, width)."""
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, prompt in enumerate(prompts()):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("cache", [{"use_cache": False}, {}, {"cache_implementation": "static"}], ids=str)
def test_exported_models_generate_as_ours(exported, cache):
    """Greedily, a prompt by itself and a batch padded on the left."""
    model, peer = exported
    own_code = type(peer).__module__.startswith("transformers_modules")
    if own_code and "cache_implementation" in cache and VERSION < (4, 56):
        pytest.skip("transformers before 4.56 allocates a static cache with one width for all layers")
    expected = [greedy(model, prompt) for prompt in prompts()]
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0, **cache)
    first = prompts()[0][None]
    alone = peer.generate(first, attention_mask=torch.ones_like(first), **settings)
    assert torch.equal(alone[0], expected[0])
    ids, mask = padded("left", 24)
    batch = peer.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(batch[0, 4:], expected[0]) and torch.equal(batch[1, 9:], expected[1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_exported_models_compute_padded_batches(exported, side):
    """The logits of a padded batch, and those of one more token behind its cache."""
    model, peer = exported
    ids, mask = padded(side, 24)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    output = peer(ids, attention_mask=mask, position_ids=position_ids, use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"                # from transformers 5.24 on
    new = torch.tensor([[3], [4]])
    more = peer(new, attention_mask=F.pad(mask, (0, 1), value=1), position_ids=position_ids.max(1, True).values + 1,
                  **{name: output[name]})
    for row, prompt in enumerate(prompts()):
        expected = model(torch.cat((prompt, new[row]))[None])[0]
        close(output.logits[row][mask[row] == 1], expected[:-1])
        close(more.logits[row], expected[-1:])


@pytest.mark.parametrize("widths, sentence", [
    (dict(n_head=(0, 6), n_kv_head=(0, 2), d_ff=(40, 40)), "layer 0 has no attention"),
    (dict(n_head=(6, 4), n_kv_head=(2, 2), d_ff=(40, 40)), "layer 1 has 4 and others 6"),
    (EVEN | dict(qk_norm=True), "no QK norm, which layer 0"),
    (dict(n_head=(5, 5), n_kv_head=(5, 1), d_ff=(8, 8)), "5 query heads, which do not divide d_model 48"),
])
def test_decilm_refuses_and_leaves_nothing(widths, sentence, tmp_path):
    checkpoint.save(tmp_path / "m.pt", wild(**widths), run={"tokenizer": "bytes"})
    with pytest.raises(UserError, match=sentence):
        export.main(export.Export(str(tmp_path / "m.pt"), str(tmp_path / "out"), "deci"))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_decilm_configs_read_as_vllm_reads_them(tmp_path):
    """By attribute, with ffn_mult only where its rounding gives the width."""
    huggingface.save(tmp_path, wild(n_head=(6, 6), n_kv_head=(2, 3), d_ff=(512, 7)), "nemotron-nas")
    config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    first, second = config.block_configs
    assert (first.attention.n_heads_in_group, second.attention.n_heads_in_group) == (3, 2)
    assert huggingface.deci_d_ff(first.ffn.ffn_mult, 48) == 512 and not hasattr(first.ffn, "intermediate_size")
    assert second.ffn.intermediate_size == 7 and not hasattr(second.ffn, "ffn_mult") and not second.ffn.no_op
    again = copy.deepcopy(config)                                       # as vLLM's processes do
    assert again.block_configs[0].ffn.ffn_mult == first.ffn.ffn_mult and json.loads(config.to_json_string())


def test_export_refuses_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "m.pt", wild(**EVEN), run={"tokenizer": "bytes"})
    source, out = str(tmp_path / "m.pt"), tmp_path / "out"
    for settings, sentence in ((dict(to="onnx"), "--to 'onnx' is not one of hf, gguf, deci"),
                               (dict(dtype="int8"), "--dtype 'int8' is not one of auto, float32")):
        with pytest.raises(UserError, match=sentence):
            export.main(export.Export(source, str(out), **settings))
    out.mkdir()
    with pytest.raises(UserError, match="is there already"):
        export.main(export.Export(source, str(out)))
    out.rmdir()

    load = transformers.AutoModelForCausalLM.from_pretrained

    def damaged(folder, **settings):
        peer = load(folder, **settings)
        with torch.no_grad():
            peer.model.norm.weight[0] += 0.01
        return peer
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", damaged)
        with pytest.raises(UserError, match="transformers computes other logits"):
            export.main(export.Export(source, str(out)))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers, which would check the result, is not installed: pip install"):
        export.main(export.Export(source, str(out)))
    export.main(export.Export(source, str(out), unchecked=True))
    assert (out / "config.json").exists()

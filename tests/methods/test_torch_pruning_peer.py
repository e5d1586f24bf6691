"""Torch-Pruning's model handed back as ours: the budget, the same logits, a checkpoint that loads."""
import json
from importlib.util import find_spec

import pytest
import torch

import checkpoint
from common import UserError
from formats import huggingface
from methods import torch_pruning_peer as peer
from model import GPT, GPTConfig

needs_peer = pytest.mark.skipif(not find_spec("torch_pruning"), reason="pip install torch-pruning")


def folder(path, n_kv_head=2, tie=True):
    """A tiny random Llama as a Hugging Face folder, its tokenizer the 256 bytes."""
    from tokenizers import pre_tokenizers
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 64, 48, 8, (6, 6), (n_kv_head,) * 2, (64, 64), tie_embeddings=tie, rope_theta=500.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean="norm" in name, std=0.2)
    path.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    huggingface.save(path, model, "llama", {"tokenizer.json": json.dumps({
        "version": "1.0", "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True, "lstrip": False,
                                            "rstrip": False, "normalized": False, "single_word": False}],
        "normalizer": None, "post_processor": None, "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate(alphabet)}, "merges": []}})})
    return path


@needs_peer
@pytest.mark.parametrize("keep, n_kv_head, tie", [(.9, 2, True), (.7, 2, False), (.6, 6, True), (.2, 1, True)])
def test_budget_is_met_and_logits_are_the_same(keep, n_kv_head, tie, tmp_path):
    source = folder(tmp_path / "hf", n_kv_head, tie)
    dense = checkpoint.load(source)[0].config
    model, seconds, ratio = peer.cut(str(source), keep)
    c = model.config
    assert .6 * keep < c.removable_params() / dense.removable_params() <= keep and seconds > 0
    assert c.d_model < 48 and c.n_head[0] < 6 and c.d_ff[0] < 64 and (c.head_dim, c.rope_theta) == (8, 500.0)
    theirs = peer.open_llama(source)
    peer.prune(theirs, ratio)
    ids = torch.randint(257, (3, 60))
    expected = theirs(ids).logits
    assert expected.std() > .5 and (model(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    looser = peer.open_llama(source)
    peer.prune(looser, ratio - 2 ** -14)                              # one step of the search less is too much
    assert huggingface.read_config(looser.config.to_dict(), "x").removable_params() > keep * dense.removable_params()


@needs_peer
def test_the_command_writes_a_checkpoint_that_loads_with_its_tokenizer(tmp_path, capsys, monkeypatch):
    source, out = folder(tmp_path / "hf"), tmp_path / "out"
    monkeypatch.setattr(peer.data, "load", lambda *_: type("Corpus", (), {"fingerprint": "f"}))
    peer.main(peer.Peer(str(source), .8, str(out)))
    model, about = checkpoint.load(out)
    assert f"{model.config.num_params()['total']:,} parameters" in capsys.readouterr().out
    ids = torch.arange(60)[None]
    assert torch.equal(model(ids), peer.cut(str(source), .8)[0](ids))                 # and the cut repeats
    assert about["run"].items() >= {"data": "stdlib", "fingerprint": "f", "cut_from": str(source)}.items()
    tokenizer = checkpoint.tokenizer_of(model, about, out)
    assert tokenizer.decode(tokenizer.encode("def f():")) == "def f():"
    with pytest.raises(UserError, match="out is there already"):
        peer.main(peer.Peer(str(source), .8, str(out)))


def test_refusals_are_sentences_with_the_remedy(tmp_path, monkeypatch):
    source = folder(tmp_path / "hf")
    if find_spec("torch_pruning"):
        for keep in (0, 1):
            with pytest.raises(UserError, match=f"--keep {keep} between 0 and 1"):
                peer.cut(str(source), keep)
        with pytest.raises(UserError, match="cannot cut .* down to --keep 0.001; keep more"):
            peer.cut(str(source), .001)
        path = source / "config.json"
        path.write_text(path.read_text().replace('"llama"', '"mistral"'))
        with pytest.raises(UserError, match="of model_type 'llama'"):
            peer.cut(str(source), .5)
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch-pruning transformers"):
        peer.cut(str(source), .5)

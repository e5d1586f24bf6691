"""Invariants of model.py: the real parameters are the oracle of its costs; values against transformers are
test_huggingface.py's."""
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import FORMAT, load, save
from common import UserError
from model import GPT, PRESETS, GPTConfig, RMSNorm, RMSNormOnCPU, attend, preset

LLAMA3 = (8.0, 0.5, 4.0, 32.0)                  # frequencies on both sides of and between the two factors


def tiny(**changes):
    """A pruned shape: another number of heads, groups and neurons in every layer."""
    shape = dict(vocab_size=37, block_size=8, d_model=12, head_dim=4, n_head=(4, 6, 2, 3), n_kv_head=(2, 6, 1, 1),
                 d_ff=(5, 24, 1, 8)) | changes
    return GPTConfig(**shape)


def wild(config, dtype=torch.float64):
    """A model with large random weights, so that nothing is near to its value at initialisation."""
    torch.manual_seed(1)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


VARIANTS = [dict(), dict(qkv_bias=True, tie_embeddings=False), dict(qk_norm=True, rope_scaling=LLAMA3)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("kinds", [("ffn",), ("kv",), ("ffn", "kv")])
def test_an_absent_sub_block_is_a_zeroed_one(layer, kinds, variant):
    full = wild(tiny(**variant))
    cut = GPT(full.config.resized({(layer, kind): 0 for kind in kinds})).double()
    gone = tuple(f"blocks.{layer}.{part}" for kind in kinds for part in {"ffn": ("ffn",), "kv": ("attn",)}[kind])
    assert {n for n, _ in full.named_parameters() if not n.startswith(gone)} == {n for n, _ in cut.named_parameters()}
    cut.load_state_dict({name: p for name, p in full.state_dict().items() if not name.startswith(gone)})
    with torch.no_grad():
        for kind in kinds:
            {"ffn": full.blocks[layer].ffn.down, "kv": full.blocks[layer].attn.o}[kind].weight.zero_()
        idx = torch.randint(37, (2, 8))
        torch.testing.assert_close(cut(idx), full(idx), rtol=0, atol=1e-12)
    assert cut.config.n_head[layer] == (0 if "kv" in kinds else full.config.n_head[layer])


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def test_the_norm_with_a_fused_gradient_is_rms_norm_in_float64():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    expected = F.rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(RMSNormOnCPU.apply(x, weight, 1e-5), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda *inputs: RMSNormOnCPU.apply(*inputs, 1e-5), (x, weight))
    apart = x[:, :, ::2].transpose(1, 2).detach().requires_grad_()              # not contiguous
    assert torch.autograd.gradcheck(lambda *inputs: RMSNormOnCPU.apply(*inputs, 1e-5), (apart, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_s_gradients_in_16_bits_lose_no_more_than_rounding(dtype):
    # With many rows, as layer norm's own kernel is wrong by 18 % here: it adds the rows up in bfloat16.
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-5).to(dtype)
    x = torch.randn(8192, 64).bfloat16().requires_grad_()
    g = torch.randn(8192, 64).bfloat16() + x.detach()
    y = norm(x)
    y.backward(g)
    exact_x = x.detach().double().requires_grad_()
    exact_weight = norm.weight.detach().double().requires_grad_()
    exact = F.rms_norm(exact_x, (64,), exact_weight, 1e-5)
    exact.backward(g.double())
    assert (y.dtype, x.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, dtype)
    assert error(y, exact) < 5e-3 and error(x.grad, exact_x.grad) < 5e-3
    assert error(norm.weight.grad, exact_weight.grad) < 5e-3


@pytest.mark.parametrize("head_dim, kernel", [(16, torch.float32), (64, torch.bfloat16)])
def test_small_heads_in_16_bits_train_in_float32(monkeypatch, head_dim, kernel):
    kernels = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        kernels.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, head_dim).bfloat16().requires_grad_() for heads in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(q, k, v, None, True)
    y.float().square().sum().backward()
    exact = [p.detach().double().requires_grad_() for p in (q, k, v)]
    attention(*exact, is_causal=True, enable_gqa=True).square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert kernels == [(kernel, kernel == torch.bfloat16)]       # autocast would round float32 again
    assert all(error(p.grad, e.grad) < 0.02 for p, e in zip((q, k, v), exact))


def test_autocast_rounds_the_residual_stream_once():
    model = wild(tiny(), torch.float32)
    streams = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: streams.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(torch.zeros(1, 8, dtype=torch.int64))
    hidden.float().sum().backward()
    assert {hidden.dtype, *streams} == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("empty", [{}, {(0, "kv"): 0, (0, "ffn"): 0, (3, "kv"): 0}, {(l, "kv"): 0 for l in range(4)}])
def test_costs_are_those_of_the_real_tensors(variant, empty):
    config = tiny(**variant).resized(empty)
    model, T, B = GPT(config), 7, 2
    count = dict.fromkeys(("embedding", "attention", "ffn", "norm", "head"), 0)
    for name, p in model.named_parameters():
        group = [g for g, part in (("norm", "norm"), ("attention", ".attn."), ("ffn", ".ffn."), ("head", "head"),
                                   ("embedding", "embed")) if part in name][0]
        count[group] += p.numel()
    assert config.num_params() == count | {"total": sum(p.numel() for p in model.parameters())}
    one_less = {(l, kind): n - 1 for (l, kind), n in config.widths().items() if n > 1}    # so that no norm goes
    for unit, n in one_less.items():
        smaller = GPT(config.resized({unit: n}))
        assert config.unit_params(*unit) == count_all(model) - count_all(smaller)
    assert config.removable_params() == count["attention"] + count["ffn"]
    idx = torch.randint(37, (B, T))
    for backward in (False, True):           # the counter sees matrix products, and attention's with the math kernel
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = model(idx).sum()
            if backward:
                loss.backward()
        assert counter.get_total_flops() == config.flops_per_token(T, backward) * B * T
    for block in model.blocks:
        block.recompute = True
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx).sum().backward()
    assert counter.get_total_flops() == config.flops_per_token(T, recompute=True) * B * T
    assert sum(layer.nbytes for layer in model.empty_cache(B, T)) == config.kv_bytes_per_token(4) * B * T
    assert config.kv_bytes_per_token() * 2 == config.kv_bytes_per_token(4)


def count_all(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("widths", [{}, {(0, "kv"): 0, (2, "ffn"): 0}])
def test_prefill_in_chunks_gives_the_logits_of_one_forward(widths):
    model = wild(tiny(qk_norm=True).resized(widths))
    idx, cache, start = torch.randint(37, (2, 12)), model.empty_cache(2, 15), 0
    for layer in cache:
        layer.fill_(math.nan)                              # room that nobody may read
    with torch.no_grad():
        expected = model(idx)
        for part in idx.split((5, 1, 4, 2), dim=1):
            end = start + part.size(1)
            torch.testing.assert_close(model(part, cache, start), expected[:, start:end], rtol=0, atol=1e-11)
            start = end


@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [1, 5, 8, 13])
def test_generation_with_a_cache_equals_that_without_beyond_block_size(block_size, prompt):
    model = wild(tiny(block_size=block_size, n_head=(0, 6, 2, 3), n_kv_head=(0, 6, 1, 1)))
    idx = torch.randint(37, (2, prompt))
    expected, context = idx, idx[:, -block_size:]
    for _ in range(21):
        new = model(context)[:, -1:].argmax(-1)
        expected, context = torch.cat((expected, new), 1), torch.cat((context, new), 1)
        if context.size(1) > block_size:                   # starts again from its last half
            context = context[:, -max(1, block_size // 2):]
    assert torch.equal(model.generate(idx, 21, temperature=0), expected)
    assert torch.equal(model.generate(idx, 21, temperature=2.0, top_k=1), expected)
    assert torch.equal(model.generate(idx, 21, temperature=1e-4, top_k=99), expected)


@pytest.mark.parametrize("block_size", [1, 8, 20, 64])
@pytest.mark.parametrize("kv_heads", [(0, 6, 1, 1), (0, 6, 2, 3)])
def test_a_padded_batch_continues_each_row_as_alone(block_size, kv_heads):
    model = wild(tiny(block_size=block_size, n_head=(0, 6, 2, 3), n_kv_head=kv_heads))
    lengths = [3, 24, 1, 11, 19]
    prompts = [torch.randint(37, (length,)) for length in lengths]
    idx = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=36)
    continued = model.generate(idx, 30, temperature=0, lengths=lengths)
    assert torch.equal(continued[:, :24], idx)
    for row, prompt in zip(continued, prompts):
        assert torch.equal(row[24:], model.generate(prompt[None], 30, temperature=0)[0, len(prompt):])
    assert torch.equal(model.generate(idx, 30, temperature=0, lengths=[24] * 5), model.generate(idx, 30, temperature=0))


def test_a_cache_has_room_for_what_the_generation_can_reach(monkeypatch):
    model, rooms = wild(tiny()), []
    allocate = model.empty_cache
    monkeypatch.setattr(model, "empty_cache", lambda B, S: rooms.append((B, S)) or allocate(B, S))
    for prompt, tokens in ((3, 5), (8, 1), (3, 9), (20, 4)):
        model.generate(torch.randint(37, (2, prompt)), tokens)
    assert rooms == [(2, 7), (2, 8), (2, 8), (2, 6), (2, 8), (2, 6)]


def test_generation_under_autocast_runs_with_a_cache_of_the_weights():
    model = wild(tiny(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(torch.randint(37, (2, 3)), 9).shape == (2, 12)


def test_sampling_repeats_with_its_generator_and_stays_within_top_k():
    model, idx = wild(tiny(block_size=64)), torch.randint(37, (3, 5))
    a, b, c = (model.generate(idx, 30, 3.0, 4, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(a[:, :5], idx)
    top = model(a)[:, 4:-1].float().topk(4).indices                                        # (B, 30, 4)
    rank = (top == a[:, 5:, None]).int()
    assert (rank.sum(-1) == 1).all() and (rank.sum((0, 1)) > 0).all()             # only, and all, of the first four


@pytest.mark.parametrize("changes, says", [
    (dict(n_head=(4, 6, 2)), "one number per layer, got 3, 4 and 4"),
    (dict(n_head=(), n_kv_head=(), d_ff=()), "one number per layer, got 0, 0 and 0"),
    (dict(n_head=(4, 6, 3, 3), n_kv_head=(2, 6, 2, 1)), "layer 2: 3 query heads over 2 KV heads"),
    (dict(n_kv_head=(2, 0, 1, 1)), "layer 1: 6 query heads over 0 KV heads"),
    (dict(n_head=(4, 6, 2, 0)), "layer 3: 0 query heads over 1 KV heads"),
    (dict(d_ff=(-1, 24, 1, 8)), "d_ff is -1, and must be a whole number between 0 and"),
    (dict(head_dim=5), "head_dim 5 must be even"), (dict(d_model=0), "d_model is 0, and must be"),
    (dict(vocab_size=0), "vocab_size is 0"), (dict(block_size=0), "block_size is 0"),
    (dict(d_model=True), "d_model is True, and must be a whole number"), (dict(d_model="48"), "d_model is '48'"),
    (dict(d_model=48.), "d_model is 48.0, and must be a whole number"), (dict(head_dim=2**40), "head_dim is 10995"),
    (dict(d_ff=(10**15, 24, 1, 8)), "d_ff is 1000000000000000, and must be"),
    (dict(d_ff=(8, 24., 1, 8)), "d_ff is 24.0"),
    (dict(n_head=(1,) * 20_000, n_kv_head=(1,) * 20_000, d_ff=(1,) * 20_000), "20,000 layers are more than 16,384"),
    (dict(norm_eps=0.), "norm_eps is 0.0, and must be a number between 1e-20 and 1.0"),
    (dict(norm_eps=math.nan), "norm_eps is nan"), (dict(norm_eps="1e-5"), "norm_eps is '1e-5'"),
    (dict(rope_theta=-1e4), "rope_theta is -10000.0"), (dict(rope_theta=math.inf), "rope_theta is inf"),
    (dict(tie_embeddings="no"), "tie_embeddings is 'no', and must be true or false"), (dict(qk_norm=1), "qk_norm is 1"),
    (dict(rope_scaling=(8., 1., 1., 32.)), "rope_scaling is .* a higher frequency factor"),
    (dict(rope_scaling=(8., 1., 4.)), "rope_scaling is"),
    (dict(rope_scaling=(math.nan, 1., 4., 32.)), "rope_scaling is"),
    (dict(rope_scaling=(8., 1., 4., 0)), "rope_scaling is"), (dict(rope_scaling="8142"), "rope_scaling is")])
def test_shapes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        tiny(**changes)


def test_presets_build_and_meet_the_papers_sizes():
    for name in PRESETS:
        target, enlarged = preset(name, 50257)
        with torch.device("meta"):
            assert count_all(GPT(target)) < count_all(GPT(enlarged))
    target, enlarged = preset("1.3b", 50257)
    assert 1.25e9 < target.num_params()["total"] < 1.4e9 and 2.7e9 < enlarged.num_params()["total"] < 2.9e9
    assert dataclasses.replace(enlarged, d_ff=target.d_ff) == target
    target, enlarged = preset("toy", 256, enlarge_ff=1, enlarge_kv=2)
    assert enlarged == dataclasses.replace(target, n_head=(8, 8), n_kv_head=(4, 4))
    for refused, says in [(dict(name="2b"), "no preset '2b'; there are toy,"), (dict(enlarge_ff=0.5), "--enlarge-ff"),
                          (dict(enlarge_ff=0.99), "--enlarge-ff"), (dict(enlarge_kv=0.9), "--enlarge-kv")]:
        with pytest.raises(UserError, match=says):
            preset(**dict(name="toy", vocab_size=256) | refused)


def test_save_and_load_round_trip_bitwise(tmp_path):
    model = wild(tiny(qkv_bias=True, rope_scaling=LLAMA3), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = torch.compile(model, backend="eager")
    compiled(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    state = dict(step=7, plan="idea", shares=[0.5, None], optimizer=optimizer.state_dict())
    save(tmp_path / "ckpt_00000009.pt", GPT(tiny()), step=6)
    for wrapped in (model, compiled):
        save(tmp_path / "ckpt_00000010.pt", wrapped, **state)
        found, other = load(tmp_path)                                # the newest
        assert found.config == model.config and type(found) is GPT and all(p.requires_grad for p in found.parameters())
        assert list(found.state_dict()) == list(model.state_dict())
        assert set(other) == {"format", "digest", "origin", *state}
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values()))
        assert {k: other[k] for k in ("step", "plan", "shares")} == {k: state[k] for k in ("step", "plan", "shares")}
        moments = [o["state"][3]["exp_avg"] for o in (other["optimizer"], state["optimizer"])]
        assert torch.equal(*moments) and moments[0].any()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ckpt_00000009.pt", "ckpt_00000010.pt"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_load_refuses_other_files_and_never_runs_code(tmp_path):
    model, whole, file, marker = GPT(tiny()), tmp_path / "whole.pt", tmp_path / "bad.pt", tmp_path / "ran"
    save(whole, model)
    content = torch.load(whole, weights_only=True)
    del content["digest"]                                            # or each change would be damage

    def refused(says):
        with pytest.raises(UserError, match=says) as problem:
            load(file)
        assert "\n" not in str(problem.value) and "bad.pt" in str(problem.value) and len(str(problem.value)) < 500

    refused("no checkpoint at .*; give")
    raw = whole.read_bytes()
    for length in (0, 1, 2, 10, 100, len(raw) // 2, len(raw) - 100, len(raw) - 1):
        file.write_bytes(raw[:length])
        refused("truncated or no checkpoint|not a checkpoint")
    for text in (b"hello", b"\x80\x02.", b"PK\x03\x04" + bytes(999), bytes(range(256)) * 9):
        file.write_bytes(text)
        refused("truncated or no checkpoint|not a checkpoint")
    for other, says in [({"format": "nanoprune checkpoint 0"}, "format 'nanoprune checkpoint 0', this code reads"),
                        ({"format": None}, "format None"), ({"config": {"n_layer": 3}}, "config"),
                        ({"model": {k: v for k, v in content["model"].items() if "up" not in k}}, "ffn.up"),
                        ({"model": content["model"] | {"blocks.0.attn.q.weight": torch.ones(3)}}, "attn.q")]:
        torch.save(content | other, file)
        refused(says)
    for missing in ("config", "model"):
        torch.save({k: v for k, v in content.items() if k != missing}, file)
        refused(missing)
    torch.save([1, 2], file)
    refused("format 'list'")
    for dump in (torch.save, lambda o, f: f.write_bytes(pickle.dumps(o, 2))):
        dump({"format": FORMAT, "step": Bomb(marker)}, file)
        refused("it would run [a-z_]*io.open, and pickled code is never run")
        assert not marker.exists()
    pickle.loads(file.read_bytes()).clear()
    assert marker.exists()                                           # the bomb was live


def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "ckpt_1.pt"
    save(path, GPT(tiny()), step=1)
    old = path.read_bytes()

    def half(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save(path, GPT(tiny()), step=2)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["ckpt_1.pt"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_layers_give_the_same_gradients_and_keep_less(variant):
    model = wild(tiny(**variant))
    x = torch.randint(37, (2, 8), generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (False, True):
        for block in model.blocks:
            block.recompute = recompute
        kept = []
        count = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
        with count:
            loss = model(x).logsumexp(-1).mean()
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()], sum(kept)))
        model.zero_grad()
    (loss, gradients, kept), (again, recomputed, fewer) = results
    assert loss == again and all(map(torch.equal, gradients, recomputed)) and fewer < kept / 2

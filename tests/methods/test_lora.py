"""LoRA: merged is unmerged, only adapters move, the loop is AdamW on the stated loss, a killed run goes on bit for bit,
and the result is a plain checkpoint."""
import copy
import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import CONFIGS, WITH_HOLES, batch, loss_of, new

import checkpoint
import data
import distill
import prune
import schedule
import train
from common import UserError, parse
from formats.origin import hand_on
from methods import adapters, lora
from model import GPT

SMALL = dict(steps=6, batch=4, micro_batch=2, block_size=8, eval_windows=4, device="cpu", dtype="float32", lr=1e-2)


def adapted(config, rank=3, seed=0, moved=True):
    """A model with adapters, whose B are far from 0 if they have `moved`."""
    model, _ = new(config)
    adapters.adapt(model, rank, alpha=2 * rank, seed=seed)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, adapters.Adapted) and moved:
            module.B.data = torch.randn(module.B.shape, generator=generator, dtype=torch.float64) / 4
    return model


@pytest.mark.parametrize("name", WITH_HOLES)
def test_merged_is_unmerged_and_zeros_change_nothing(name):
    config = WITH_HOLES[name]
    x, _ = batch(config, 0)
    base, _ = new(config)
    assert torch.equal(adapted(config, moved=False)(x), base(x))
    model = adapted(config)
    plain = adapters.merge(model)
    assert type(plain) is GPT and plain.config == config
    assert (plain(x) - model(x)).abs().max() < 1e-12 < 1e-3 < (plain(x) - base(x)).abs().max()
    assert all(p.requires_grad for p in plain.parameters())
    # As the formula has it, matrix by matrix; nothing else has changed.
    for name, p in plain.named_parameters():
        expected = base.get_parameter(name)
        if p.dim() == 2 and name.startswith("blocks."):
            module = model.get_submodule(name.removesuffix(".weight"))
            expected = expected + 2 * module.B @ module.A
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-14)


def test_a_is_kaimings_and_the_seed_is_all_the_chance():
    linear = nn.Linear(400, 7)
    module, again, other = (adapters.Adapted(linear, 50, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    expected = torch.empty(50, 400)
    nn.init.kaiming_uniform_(expected, a=5**.5)
    assert abs(module.A.std() / expected.std() - 1) < .02 and module.A.abs().max() <= 1 / 20
    assert torch.equal(module.A, again.A) and not torch.equal(module.A, other.A) and not module.B.any()


def test_only_adapters_have_gradients_and_move():
    config = CONFIGS["gqa+bias"]
    model = adapted(config)
    before = copy.deepcopy(model.state_dict())
    state = lora.State(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), {})
    x, y = batch(config, 0)
    loss_of(model, x, y).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == name.endswith((".A", ".B")), name
    state.optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.endswith((".A", ".B")), name
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * config.n_layer


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_step_is_adamw_on_the_stated_loss(with_teacher):
    """Two steps by hand, on whole batches and whole logits."""
    config = CONFIGS["gqa"]
    settings = lora.Lora(**SMALL | dict(steps=2, rank=3, kd_weight=.3, lr=1e-3))
    tokens = torch.randint(13, (200,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    teacher = distill.freeze(new(config, seed=5)[0]) if with_teacher else None
    state = lora.begin(new(config)[0], settings)
    by_hand = lora.begin(new(config)[0], settings).model
    lora.train(state, tokens, settings, teacher)
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    timeline = schedule.Timeline(2, (), (), ((0, 2),), None)
    for step in range(2):
        x, y = data.batch(tokens, 8, 0, step, 0, micro_batch=4, micro_steps=1)
        logits = by_hand(x).flatten(0, 1)
        loss = F.cross_entropy(logits, y.flatten())
        if with_teacher:
            loss = distill.kd_loss(logits, teacher(x).flatten(0, 1), y.flatten(), .3)
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for p, g in zip(parameters, grads):
            p.grad = g * min(1, 1 / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step, timeline, 1e-3, 1e-4)
        optimizer.step()
    for p, q in zip(parameters, (p for p in state.model.parameters() if p.requires_grad)):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert state.step == 2 and len(parameters) > 0


# -- the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs: "run", trained for a moment; "cut" of it; "two-four"."""
    path = tmp_path_factory.mktemp("lora")
    train.main(train.Train(plan="scratch", preset="toy", steps=60, batch_tokens=512, micro_batch=8, eval_windows=8,
                           device="cpu", out=str(path / "run")), quiet=True)
    common = dict(init=str(path / "run"), windows=8, eval_windows=4, block_size=32, device="cpu")
    prune.main(prune.Prune(**common, keep=.6, mend="none", out=str(path / "cut")))
    prune.main(prune.Prune(**common, structure="2:4", score="magnitude", mend="none", out=str(path / "two-four")))
    return path


def command(folder, **flags):
    """Run it through the command line: -> the model and what its file says."""
    words = {**SMALL, "init": folder / "cut", **flags}
    argv = [str(word) for flag, value in words.items() for word in ("--" + flag.replace("_", "-"), value)]
    lora.main(parse(lora.Lora, argv))
    return checkpoint.load(words["out"])


def test_a_cut_model_comes_back_as_a_plain_checkpoint(folder, tmp_path, capsys):
    flags = dict(steps=60, batch=8, micro_batch=4, block_size=32, teacher=folder / "run")
    model, about = command(folder, out=tmp_path / "back", **flags)
    said = capsys.readouterr().out.split()
    losses = [float(word) for word, unit in zip(said, said[1:]) if unit == "nats"]
    assert losses[1] < losses[0] - .03
    cut, _ = checkpoint.load(folder / "cut")
    assert type(model) is GPT and model.config == cut.config
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.embed.weight, cut.embed.weight) and not torch.equal(
        model.blocks[0].ffn.down.weight, cut.blocks[0].ffn.down.weight)
    assert about["run"]["recipe"]["steps"] == 60 and about["run"]["cut_from"] == str(folder / "run")
    steps = hand_on(about)["steps"]
    assert [step["command"] for step in steps] == ["train.py", "prune.py", "methods.lora"] and steps[2]["rank"] == 8
    assert not (tmp_path / "back" / adapters.UNFINISHED).exists()
    # Everything else reads it.
    prune.main(prune.Prune(init=str(tmp_path / "back"), windows=4, eval_windows=4, block_size=32, device="cpu",
                           mend="none", out=str(tmp_path / "again")))


@pytest.mark.parametrize("keep", [1, .7])
def test_a_killed_run_goes_on_bit_for_bit(folder, tmp_path, monkeypatch, capsys, keep):
    flags = dict(steps=40, init=folder / "run", keep=keep, **{"allocate": "uniform"} if keep < 1 else {})
    whole, _ = command(folder, out=tmp_path / "whole", **flags)
    monkeypatch.setattr(lora, "SAVE_EVERY", 23)
    real = lora.backward

    def killed(objective, text, settings, step, *rest):
        if step == 30:
            raise KeyboardInterrupt
        return real(objective, text, settings, step, *rest)

    monkeypatch.setattr(lora, "backward", killed)
    with pytest.raises(KeyboardInterrupt):
        command(folder, out=tmp_path / "killed", **flags)
    monkeypatch.setattr(lora, "backward", real)
    with pytest.raises(UserError, match="of a run with another lr; give another --out"):
        command(folder, out=tmp_path / "killed", **flags | {"lr": 2e-2})
    capsys.readouterr()
    resumed, _ = command(folder, out=tmp_path / "killed", **flags)
    assert "going on from step 23" in capsys.readouterr().out
    assert checkpoint.fingerprint(resumed) == checkpoint.fingerprint(whole)
    with pytest.raises(UserError, match="is there already"):
        command(folder, out=tmp_path / "killed", **flags)


def test_a_damaged_file_of_a_killed_run_is_refused(folder, tmp_path):
    settings = lora.Lora(rank=2)
    state = lora.begin(checkpoint.load(folder / "run")[0], settings)
    adapters.save(tmp_path / "adapters.pt", {}, state)
    content = torch.load(tmp_path / "adapters.pt", weights_only=True)
    content["content"]["step"] = 7
    torch.save(content, tmp_path / "adapters.pt")
    with pytest.raises(UserError, match="is damaged; delete it"):
        adapters.resume(tmp_path / "adapters.pt", {}, state)


@pytest.mark.parametrize("crafted", [
    {"adapters": {}}, {"adapters": {"blocks.0.attn.nothing": torch.zeros(1)}},
    {"adapters": {"embed.weight": torch.zeros(3, 5)}}, {"alive": [(0, "ffn", torch.tensor([10**6]))]},
    {"optimizer": {}}, {"step": None}, {"identity": 3}, None])
def test_a_file_that_somebody_made_ends_in_a_sentence(folder, tmp_path, crafted):
    """Its digest is right."""
    state = lora.begin(checkpoint.load(folder / "run")[0], lora.Lora(rank=2))
    adapters.save(tmp_path / "adapters.pt", {"lr": 1}, state)
    content = torch.load(tmp_path / "adapters.pt", weights_only=True)["content"] | (crafted or {})
    if crafted == {"step": None}:
        del content["step"]
    file = {"content": content, "content_digest": adapters.digest_of(content)} if crafted else [1, 2]
    torch.save(file, tmp_path / "adapters.pt")
    with pytest.raises(UserError, match="to begin anew"):
        adapters.resume(tmp_path / "adapters.pt", {"lr": 1}, state)


@pytest.mark.parametrize("flags, message", [
    (dict(init="two-four"), "is sparse, and adapters would fill its zeros; train it by"),
    (dict(kd_weight=.2), "--kd-weight has no effect without --teacher"),
    (dict(allocate="uniform"), "--allocate has no effect without --keep"),
    (dict(batch=5), "--batch 5 is no multiple of --micro-batch 2; try 6"),
    (dict(keep=0), "--keep 0.0 must be above 0"),
    (dict(keep=.5, steps=2), "--keep 0.5 is cut between the first and the last tenth of --steps 2"),
    (dict(keep=.1, steps=40), "the layers that middle keeps whole cost"),
    (dict(block_size=65), "was trained with a context of 64 tokens, not 65"),
    (dict(lr=0), "--lr 0.0 must be positive"),
    (dict(seed=-1), "--seed -1 must be between 0"),
    (dict(lr=1e30, steps=9), "gradient norm .*; lower --lr"),
])
def test_what_means_nothing_is_refused_and_leaves_nothing(folder, tmp_path, flags, message):
    flags = {name: folder / value if name == "init" else value for name, value in flags.items()}
    with pytest.raises(UserError, match=message):
        command(folder, out=tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="say what to train by --init"):
        lora.main(lora.Lora())


def test_a_teacher_of_another_tokenizer_is_refused(folder, tmp_path):
    model, about = checkpoint.load(folder / "run")
    run = about["run"] | {"tokenizer": "bytes"}
    short = GPT(dataclasses.replace(model.config, block_size=4))
    checkpoint.save(tmp_path / "short.pt", short, run=run, tokenizer_files={}, step=0)
    with pytest.raises(UserError, match="a context of 4, the model has those of 'bytes' and windows of 8"):
        command(folder, out=tmp_path / "out", teacher=tmp_path / "short.pt")

"""Models on disk that are opened without reading them, and what reading and checking leaves out."""
import dataclasses
import errno
from types import SimpleNamespace

import pytest
import torch
from helpers import CONFIGS, batch, loss_of, masks_of, new
from safetensors.torch import load_file, save_file

import checkpoint
import prune
import train
from common import Damaged, UserError
from formats import huggingface, pt
from formats.tokenizer import open_tokenizer
from methods import sparse
from model import GPT

TIED = dataclasses.replace(CONFIGS["gqa"], vocab_size=260)
UNTIED = dataclasses.replace(CONFIGS["all"], vocab_size=260)
RUN = {"tokenizer": "bytes"}


def trained(config, dtype=torch.float32):
    model, optimizer = new(config, dtype)
    loss_of(model, *batch(config, 0)).backward()
    optimizer.step()
    return model, optimizer


def stored_in(kind, model, folder):
    """The model on disk as this kind; -> its path."""
    path = folder / kind
    if kind == "run":
        checkpoint.save(path / "ckpt_00000007.pt", model, run=RUN)
        return path
    if kind == "file":
        checkpoint.save(path, model, run=RUN)
        return path
    path.mkdir()
    family = "nanoprune" if len(set(model.config.d_ff)) > 1 else "llama"
    huggingface.save(path, model, family, open_tokenizer("bytes").as_files())
    if kind == "bin":
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize("config", [TIED, UNTIED])
@pytest.mark.parametrize("kind", ["file", "run", "safetensors", "bin"])
def test_rows_are_those_of_the_loaded_model(kind, config, tmp_path):
    model, _ = trained(config)
    path = stored_in(kind, model.bfloat16(), tmp_path)
    loaded, about = checkpoint.load(path, dtype=torch.float32)
    weights = checkpoint.open_weights(path)
    assert weights.config == loaded.config == model.config and weights.about == about
    for name, p in loaded.named_parameters():
        assert weights.shapes[name] == p.shape
        for start, stop in ((0, len(p)), (1, 3), (len(p), len(p))):
            rows = weights.rows(name, start, stop)
            assert rows.dtype == torch.bfloat16 and torch.equal(rows, p[start:stop].bfloat16())
    assert checkpoint.fingerprint_of(weights, torch.float32) == checkpoint.fingerprint(loaded)
    assert checkpoint.open_weights(path, block_size=4).config.block_size == 4


@pytest.mark.parametrize("kind", ["file", "safetensors"])
def test_opening_reads_no_weights_and_rows_are_checked(kind, tmp_path):
    model, _ = trained(UNTIED)
    model.blocks[1].ffn.up.weight.data[2, 5] = float("nan")
    path = stored_in(kind, model, tmp_path)
    weights = checkpoint.open_weights(path)
    weights.rows("blocks.0.ffn.up.weight", 0, 3)
    weights.rows("blocks.1.ffn.up.weight", 0, 2)
    with pytest.raises(UserError, match=r"1 of 12 values of .*1\..*up.*weight are infinite or not a number"):
        weights.rows("blocks.1.ffn.up.weight", 2, 3)


def test_another_head_of_a_tied_folder_is_refused_where_its_rows_are_read(tmp_path):
    model, _ = trained(TIED)
    path = stored_in("safetensors", model, tmp_path)
    content = load_file(path / "model.safetensors")
    head = content["model.embed_tokens.weight"].clone()
    head[200, 3] += 1
    save_file(content | {"lm_head.weight": head}, path / "model.safetensors", metadata={"format": "pt"})
    weights = checkpoint.open_weights(path)
    weights.rows("embed.weight", 0, 200)
    with pytest.raises(UserError, match="ties head and embedding, but holds two different ones"):
        weights.rows("embed.weight", 130, 260)


# -- the optimizer's state stays in the file

def run_with(tmp_path):
    """The folder of a run with one checkpoint of step 7 and one of step 8; -> RunFolder, the second file."""
    folder = checkpoint.RunFolder(tmp_path, {"tokenizer": "bytes"}, {}, 256, {}, writes=True)
    folder.rewind(0)
    model, optimizer = trained(UNTIED)
    for step in (7, 8):
        folder.save(checkpoint.State(model, optimizer, prune.everything(UNTIED), step=step), {})
    return folder, checkpoint.newest(tmp_path)


def overwrite(file, tensor):
    """Put zeros where the bytes of a tensor lie in the file."""
    content = file.read_bytes()
    raw = tensor.numpy().tobytes()
    assert content.count(raw) == 1
    file.write_bytes(content.replace(raw, bytes(len(raw))))


def resume(folder):
    return folder.resume("cpu", lambda model: train.make_optimizer(model, train.Train(lr=1e-2, weight_decay=0.1)))


def test_a_model_is_evaluated_without_its_optimizer(tmp_path, capsys):
    """Where the moments are zeros that nobody wrote, `load` does not see it. Resuming does."""
    folder, file = run_with(tmp_path)
    expected, about = checkpoint.load(file)
    moment = about["optimizer"]["state"][0]["exp_avg"].clone()
    overwrite(file, moment)
    model, about = checkpoint.load(tmp_path)
    assert about["step"] == 8 and all(map(torch.equal, model.parameters(), expected.parameters()))
    assert not about["optimizer"]["state"][0]["exp_avg"].any()           # it is read when it is used
    state = resume(folder)
    assert state.step == 7 and "ckpt_00000008.pt is damaged" in capsys.readouterr().err
    assert torch.equal(state.optimizer.state[state.optimizer.param_groups[0]["params"][0]]["exp_avg"], moment)


def test_nothing_of_a_resumed_state_lies_in_its_file(tmp_path):
    """The file is overwritten while the state is used."""
    folder, file = run_with(tmp_path)
    state = resume(folder)
    model, about = checkpoint.load(file)
    tensors = [*state.model.parameters(), *model.parameters(), *state.alive.values()]
    for entry in state.optimizer.state.values():
        tensors += entry.values()
    before = [tensor.detach().clone() for tensor in tensors]
    del about
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert all(map(torch.equal, tensors, before))


def test_a_damaged_weight_is_found_where_it_is_read(tmp_path):
    _, file = run_with(tmp_path)
    model, _ = checkpoint.load(file)
    overwrite(file, model.blocks[1].ffn.up.weight.detach())
    weights = checkpoint.open_weights(file)
    weights.rows("blocks.0.ffn.up.weight", 0, 3)
    with pytest.raises(Damaged, match="ckpt_00000008.pt is damaged: its content is not what was written"):
        weights.rows("blocks.1.ffn.up.weight", 0, 0)


def test_a_checkpoint_with_one_digest_is_read_and_checked_as_a_whole(tmp_path):
    """As they were written before weights and moments had digests of their own."""
    folder, file = run_with(tmp_path)
    expected = resume(folder)
    content = torch.load(file, weights_only=True)
    del content["digests"], content["digest"]
    content["format"] = checkpoint.FORMATS[0]
    torch.save(content | {"digest": pt.digest_of(content)}, file)
    state = resume(folder)
    assert state.step == 8 and all(map(torch.equal, state.model.parameters(), expected.model.parameters()))
    overwrite(file, content["optimizer"]["state"][0]["exp_avg"])
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(file)


def sent(tmp_path, **content):
    """A file of a model that somebody sent."""
    model, _ = trained(TIED)
    state = {"format": checkpoint.FORMAT, "config": dataclasses.asdict(TIED), "model": model.state_dict(), "run": RUN}
    torch.save({**state, **content}, tmp_path / "sent.pt")
    return tmp_path / "sent.pt", model


def test_a_tensor_larger_than_its_file_is_refused_before_memory_goes(tmp_path):
    expanded = torch.zeros(1).expand(10**13)
    entry = {"state": {0: {"exp_avg": expanded}}, "param_groups": []}
    for content in (dict(averages=[(0, "ffn", expanded)]), dict(optimizer=entry), dict(other={"a": (expanded,)})):
        file, _ = sent(tmp_path, **content)
        with pytest.raises(Damaged, match="sent.pt is damaged: a tensor of 40,000,000,000,000 bytes has only 4 in it"):
            checkpoint.open_checkpoint(file)


@pytest.mark.parametrize("change", [
    lambda name, mask: {"nothing": mask}, lambda name, mask: {name: (10**13, mask[1])},
    lambda name, mask: {name: (-3, mask[1])}, lambda name, mask: {name: (mask[0], mask[1].float())},
    lambda name, mask: {name: (mask[0], mask[1][1:])}, lambda name, mask: {name: 5}, lambda name, mask: 3])
def test_masks_that_are_not_the_model_s_are_refused(change, tmp_path):
    _, model = sent(tmp_path)
    masks = sparse.pack(masks_of(model, sparse.Pattern(0.5)))
    file, _ = sent(tmp_path, masks=masks)
    assert sparse.unpack(checkpoint.load(file)[1]["masks"]).keys() == masks.keys()
    file, _ = sent(tmp_path, masks=change("blocks.0.ffn.up.weight", masks["blocks.0.ffn.up.weight"]))
    with pytest.raises(UserError, match="sent.pt: config and weights disagree or are missing"):
        checkpoint.load(file)


def test_weights_of_a_sharded_run_are_refused_where_its_dtype_ends(tmp_path):
    model, _ = trained(TIED, torch.float64)
    model.embed.weight.data[3, 1] = 1e300
    checkpoint.save(tmp_path / "large.pt", model, run=RUN)

    setup = SimpleNamespace(build=GPT, start=TIED, config=SimpleNamespace(init=tmp_path / "large.pt"))
    with pytest.raises(UserError, match="embed.weight has a value of size 1e[+]300, and float32 ends at"):
        train.fresh_shards(setup)


def test_a_folder_that_does_not_fit_the_disk_leaves_nothing(tmp_path, monkeypatch):
    """The last file of a folder of shards."""
    model, _ = trained(TIED)
    run = checkpoint.RunFolder(tmp_path, RUN, {}, 256, {}, writes=True)

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", full_disk)
    with pytest.raises(UserError, match="state.pt was not written"):
        run.write_shards(tmp_path / "teacher", model, {})
    assert not list(tmp_path.iterdir())

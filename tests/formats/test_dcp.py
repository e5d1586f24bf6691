"""Checkpoints that several processes write: the same run in 1, 2 and 3 processes, killed, damaged and sent."""
import dataclasses
import errno
import io
import os
import pickle
import random
import shutil
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
import xxhash
from helpers import CONFIGS, batch, loss_of, new
from test_shard import sharded_copy
from test_shard import start as start_worker

import checkpoint
import prune
import shard
import train
from checkpoint import State
from common import UserError
from formats import dcp, pt
from model import GPT

pytestmark = pytest.mark.skipif(torch.__version__ < shard.OLDEST_ON_CPU, reason="FSDP2 on CPUs needs a newer PyTorch")

# Odd widths, so that the last process has fewer rows than the others, or none.
CONFIG = dataclasses.replace(CONFIGS["all"], vocab_size=260)
SETTINGS = train.Train(lr=5e-3, weight_decay=0.1)


def run_in(world, worker, folder):
    """Run worker(folder) in so many processes. They are forked: another import of torch in each would take longer
    than all that they do."""
    torch.multiprocessing.start_processes(start_worker, (world, worker, str(folder), (folder,)), nprocs=world,
                                          start_method="fork")


def run_folder(path):
    """The folder of a run, as each of its processes has it."""
    writes = not dist.is_initialized() or dist.get_rank() == 0
    folder = checkpoint.RunFolder(path, {"tokenizer": "bytes", "seed": 3}, {}, 256, {}, writes=writes)
    if writes and not folder.metrics.exists():
        path.mkdir(exist_ok=True)
        folder.rewind(0)
    return folder


def trained_state(step=7):
    """A whole model with Adam's moments, the same in every process."""
    model, optimizer = new(CONFIG)
    for number in range(2):
        loss_of(model, *batch(CONFIG, number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    averages = {key: torch.rand(2, n) for key, n in CONFIG.widths().items()}
    return State(model, optimizer, prune.everything(CONFIG), averages, step=step, window={"ce": 1.5})


def sharded_state(step, kind="fsdp", local_world=1):
    """The same state over the processes, and the whole one."""
    whole = trained_state(step)
    model, optimizer = sharded_copy(whole.model, whole.optimizer, kind, local_world)
    for p, sharded in zip(whole.model.parameters(), model.parameters()):
        state = whole.optimizer.state[p]
        moments = {key: shard.spread_rows(state[key], sharded) for key in checkpoint.MOMENTS}
        optimizer.state[sharded] = {"step": state["step"].clone(), **moments}
    return State(model, optimizer, whole.alive, whole.averages, step=step, window=whole.window), whole


def tensors_of(state):
    """Weights, moments and step counts by name, whole."""
    tensors = {}
    shard.release(state.model)
    for name, p in state.model.named_parameters():
        tensors[name] = shard.whole(p.detach())
        for key, value in state.optimizer.state[p].items():
            tensors[f"{key}.{name}"] = shard.whole(value)
    return tensors


def assert_same(state, expected):
    ours, others = tensors_of(state), tensors_of(expected)
    assert ours.keys() == others.keys()
    for name in ours:
        assert ours[name].dtype == others[name].dtype and torch.equal(ours[name], others[name]), name
    assert (state.step, state.window) == (expected.step, expected.window)
    for own, other in ((state.alive, expected.alive), (state.averages, expected.averages)):
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def build(config):
    mesh = shard.make_mesh("fsdp", "cpu", dist.get_world_size(), dist.get_world_size())
    return shard.build(config, mesh, "cpu", torch.float64)


def make_optimizer(model):
    return train.make_optimizer(model, SETTINGS)


def resume(path):
    return run_folder(path).resume("cpu", make_optimizer, build if dist.is_initialized() else None)


def two_write(folder):
    """Two processes save, with a copy of the model each and with half of it each."""
    for kind in ("hsdp", "fsdp"):
        state, whole = sharded_state(7, kind, local_world=1)
        run = run_folder(folder / kind)
        with torch.no_grad():
            state.model.hidden(batch(CONFIG, 0)[0])              # leaves the embedding whole: save drops it
        run.save(state, {})
        assert_same(resume(folder / kind), whole)
        run.save_teacher(state.model, 7)
        files = sorted(file.name for file in (folder / kind / "ckpt_00000007" / "model").iterdir())
        assert files == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    one_disk_is_full(run, state)
    with pytest.raises(UserError, match="the 2 processes do not see the same checkpoints in .*file system that all"):
        resume(folder / ("fsdp" if dist.get_rank() else "nothing"))


def one_disk_is_full(run, state):
    """Every process says so, and the checkpoint before is the newest."""
    written = distributed_checkpoint.FileSystemWriter.write_data
    if dist.get_rank() == 1:
        distributed_checkpoint.FileSystemWriter.write_data = full_disk
    state.step = 8
    with pytest.raises(UserError, match=r"ckpt_00000008 was not written \(.*No space.*\): it needs [\d,]+ bytes and"):
        run.save(state, {})
    distributed_checkpoint.FileSystemWriter.write_data = written
    assert checkpoint.newest(run.path).name == "ckpt_00000007"
    dist.barrier()
    assert not list(run.path.glob(".*"))


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def three_go_on(folder):
    """Three processes resume what one and two wrote, and save; the last save is killed."""
    for name in ("one", "fsdp", "hsdp"):
        assert_same(resume(folder / name), trained_state(7))
    state = resume(folder / "fsdp")
    run = run_folder(folder / "fsdp")
    run.identity["block_size"] = CONFIG.block_size
    for path in (folder / "fsdp" / "teacher", folder / "one" / "teacher.pt"):
        run.open_teacher(path, state, build)
        assert_same_weights(state.teacher, trained_state().model)
    assert state.teacher_file["sha256"] == checkpoint.fingerprint(trained_state().model)
    state.teacher_file = None
    run.open_teacher(folder / "padded.pt", state, build)         # models of a family differ in rows of padding
    assert state.teacher.config.vocab_size == 256
    assert torch.equal(shard.whole(state.teacher.embed.weight), trained_state().model.embed.weight[:256])
    for step in (8, 9):
        state.step = step
        run.save(state, {})
        run.save(state, {})                                     # the same one
    one_process_reads_damage(folder)
    state.step = 10
    if dist.get_rank() == 1:
        dcp.digests_of_own = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run.save(state, {})


def one_process_reads_damage(folder):
    """All fall back to the checkpoint before."""
    if dist.get_rank() == 0:
        shutil.copytree(folder / "fsdp", folder / "hurt")
        flip(folder / "hurt" / "ckpt_00000009" / "optimizer" / "__2_0.distcp", 1000)
    dist.barrier()
    assert_same(resume(folder / "hurt"), trained_state(8))
    dist.barrier()
    assert (folder / "hurt" / "ckpt_00000009.damaged").is_dir()


def flip(file, position):
    """Turn one bit of a file over."""
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def assert_same_weights(model, expected):
    shard.release(model)
    for p, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(shard.whole(p.detach()), other)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs that 1, 2 and 3 processes have written."""
    folder = tmp_path_factory.mktemp("runs")
    run_folder(folder / "one").save(trained_state(7), {})
    run_folder(folder / "one").save_teacher(trained_state(7).model, 7)
    padded, _ = new(dataclasses.replace(CONFIG, vocab_size=300))
    padded.embed.weight.data[:256] = trained_state().model.embed.weight[:256].detach()
    checkpoint.save(folder / "padded.pt", padded, run={"tokenizer": "bytes"})
    run_in(2, two_write, folder)
    (folder / "store").unlink()
    shutil.copytree(folder / "fsdp", folder / "two")
    with pytest.raises(Exception, match="process 1 terminated with signal SIGKILL"):
        run_in(3, three_go_on, folder)
    return folder


def test_one_two_and_three_processes_go_on_from_each_other(runs):
    for name, step in (("one", 7), ("hsdp", 7), ("two", 7), ("fsdp", 9)):
        assert_same(resume(runs / name), trained_state(step))
        model, about = checkpoint.load(runs / name)
        assert about["step"] == step and type(model) is GPT
        assert_same_weights(model, trained_state().model)


def test_the_newest_two_stay_and_what_a_killed_process_left_goes(runs):
    kept = {"ckpt_00000008", "ckpt_00000009", "metrics.jsonl", "teacher"}
    [half] = {path.name for path in (runs / "fsdp").iterdir()} - kept
    assert half.startswith(".ckpt_00000010.") and half.endswith(".tmp")
    shutil.copytree(runs / "fsdp", runs / "killed")
    with checkpoint.locked(runs / "killed"):
        assert {path.name for path in (runs / "killed").iterdir()} == {*kept, ".lock"}
    state = trained_state(10)
    run_folder(runs / "killed").save(state, {})                  # files and folders mixed
    assert [path.name for path in checkpoint.checkpoints(runs / "killed")] == ["ckpt_00000009", "ckpt_00000010.pt"]
    assert_same(resume(runs / "killed"), state)


# -- files that are damaged, or that somebody sent

@pytest.fixture
def folder(runs, tmp_path):
    """A copy of a checkpoint of two processes."""
    shutil.copytree(runs / "two" / "ckpt_00000007", tmp_path / "ckpt_00000007")
    return tmp_path / "ckpt_00000007"


def refused(path, sentence):
    with pytest.raises(UserError, match=sentence) as refusal:
        checkpoint.load(path)
    assert "\n" not in str(refusal.value)


def test_no_flipped_bit_is_silent(folder):
    """Each flip is refused in a sentence, or changes nothing that is read."""
    expected = trained_state().model
    _, about = checkpoint.load(folder)
    dice = random.Random(0)
    refusals = 0
    files = [folder / "state.pt", *(folder / "model").glob("*.distcp")]
    for _ in range(60):
        file = dice.choice(files)
        content = file.read_bytes()
        flip(file, dice.randrange(len(content)))
        try:
            model, about_flipped = checkpoint.load(folder)
        except UserError as refusal:
            assert "\n" not in str(refusal)
            refusals += 1
        else:
            assert_same_weights(model, expected)
            assert pt.digest_of(about_flipped) == pt.digest_of(about)
        file.write_bytes(content)
    assert refusals > 40


@pytest.mark.parametrize("file", ["state.pt", "model/__1_0.distcp", "optimizer/__0_0.distcp"])
@pytest.mark.parametrize("length", [None, 0, 300])
def test_a_folder_with_a_missing_or_short_file_makes_room_for_the_one_before(file, length, runs, tmp_path, capsys):
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    damaged = tmp_path / "run" / "ckpt_00000009" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if length is not None:
        damaged.write_bytes(content[:length])
    assert resume(tmp_path / "run").step == 8
    assert "going on from ckpt_00000008" in capsys.readouterr().err
    assert (tmp_path / "run" / "ckpt_00000009.damaged").is_dir()


class Bomb:
    """Pickled, it makes a file when it is read."""
    def __reduce__(self):
        return open, ("ran", "w")


def test_no_code_of_a_folder_is_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for part in ("model", "optimizer"):
        (folder / part / ".metadata").write_bytes(pickle.dumps(Bomb()))       # PyTorch would run this
    assert_same_weights(checkpoint.load(folder)[0], trained_state().model)
    # A piece with a bomb in it, and its digest put right.
    bomb = io.BytesIO()
    torch.save({"": Bomb()}, bomb)
    (folder / "model" / "__9_9.distcp").write_bytes(bomb.getvalue())
    digest = xxhash.xxh3_128(bomb.getvalue()).hexdigest()
    change_index(folder, lambda entry: (*entry[:2], [(0, 260, "__9_9.distcp", 0, len(bomb.getvalue()), digest)]))
    refused(folder, "it would run [a-z_]*io.open, and pickled code is never run")
    assert not (folder / "ran").exists()
    pickle.loads((folder / "model" / ".metadata").read_bytes()).close()
    assert (folder / "ran").exists()                                          # the bomb was live


def change_index(folder, change, name="embed.weight"):
    """Change a tensor's entry in the index, and put the digest right."""
    state = torch.load(folder / "state.pt", weights_only=True)
    state["shards"]["model"][name] = change(state["shards"]["model"][name])
    checkpoint.write(folder / "state.pt", state)


@pytest.mark.parametrize("name", ["../optimizer/__0_0.distcp", "/etc/passwd", "linked/__0_0.distcp", ".metadata",
                                  "__7_0.distcp", 3, None])
def test_an_index_leads_nowhere_else(name, folder, tmp_path):
    (tmp_path / "secret").write_bytes((folder / "model" / "__0_0.distcp").read_bytes())
    (folder / "model" / "__7_0.distcp").symlink_to(tmp_path / "secret")
    (folder / "model" / "linked").symlink_to(folder / "optimizer")

    def change(entry):
        shape, dtype, [(first, rows, _, *rest), *others] = entry
        return shape, dtype, [(first, rows, name, *rest), *others]

    change_index(folder, change)
    refused(folder, r"names .*, and only \*.distcp files in the folder itself are read; do not use it")


def test_a_folder_that_is_a_link_is_not_followed(folder, tmp_path):
    (folder / "model").rename(tmp_path / "elsewhere")
    (folder / "model").symlink_to(tmp_path / "elsewhere")
    refused(folder, "only \\*.distcp files in the folder itself are read")
    (folder / "state.pt").rename(tmp_path / "state.pt")
    (folder / "state.pt").symlink_to(tmp_path / "state.pt")
    refused(folder, "has no file state.pt")


@pytest.mark.parametrize("change", [
    lambda entry: ((260.0, 12.0), *entry[1:]), lambda entry: ((260, 13), *entry[1:]),
    lambda entry: ((10**15, 12), *entry[1:]), lambda entry: ((), *entry[1:]),
    lambda entry: (entry[0], torch.int8, entry[2]), lambda entry: (entry[0], "float64", entry[2]),
    lambda entry: (entry[0], torch.float32, entry[2]), lambda entry: (*entry[:2], entry[2][1:]),
    lambda entry: (*entry[:2], entry[2] * 2), lambda entry: (*entry[:2], [(0, 260, *entry[2][0][2:])]),
    lambda entry: (*entry[:2], [(0, -5, *entry[2][0][2:]), (-5, 265, *entry[2][0][2:])]),
    lambda entry: (*entry[:2], [(*piece[:4], 10**15, piece[5]) for piece in entry[2]]), lambda entry: 3,
    lambda entry: (*entry[:2], 3), lambda entry: (*entry[:2], [(0, 1)])])
def test_an_index_that_garbles_a_tensor_is_refused(change, folder):
    change_index(folder, change)
    refused(folder, "garbles its tensors|disagree|holds another tensor|missing or truncated")


def test_pytorch_reads_what_we_write(folder):
    tensors = {name: torch.zeros_like(p) for name, p in trained_state().model.named_parameters()}
    with warnings.catch_warnings(action="ignore"):               # that this is one process
        distributed_checkpoint.load(tensors, checkpoint_id=folder / "model")
    assert all(torch.equal(tensors[name], p) for name, p in trained_state().model.named_parameters())
    # Nothing in it tells on which machine it was written.
    assert os.fsencode(folder.parent.parent) not in (folder / "model" / ".metadata").read_bytes()

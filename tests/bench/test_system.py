"""The suites start, disk and scale: a whole run, files of one size, a calculation by hand."""
import dataclasses
import statistics

import pytest
import torch
from bench_helpers import UNEVEN, by, same_process, settings

import checkpoint
import distill
import schedule
import train
from bench import system, timing, variants
from common import UserError
from model import GPT


def test_start_times_a_whole_run_of_one_step():
    seconds, parts = system.one_step_run(["--preset", "toy", "--device", "cpu", "--eval-windows", "4"])
    assert 0 < parts["train"] + parts["eval"] + parts["save"] < seconds
    assert min(parts["train"], parts["eval"], parts["save"]) > 0 and parts["cut"] == 0
    with pytest.raises(UserError, match="train.py --preset huge ended with 2: .*--preset"):
        system.one_step_run(["--preset", "huge"])


def test_the_first_run_does_not_count(monkeypatch):
    runs = iter([(9.0, {"train": 5.0, "cut": 0.0}), (4.0, {"train": 1.0, "cut": 0.0})])
    monkeypatch.setattr(system, "one_step_run", lambda flags: next(runs))
    monkeypatch.setattr(system.subprocess, "run", lambda *_, **__: None)
    helps, step = system.start(settings("start", device="cpu"), "toy", 256)["rows"]
    assert helps["s"] >= 0 and step["s"] >= 0
    assert step["of which train"] == 1.0 and "of which cut" not in step


def test_disk_compares_files_of_one_size(tmp_path, monkeypatch):
    sizes = []
    states = []
    save = checkpoint.save

    def saved(path, model, **state):
        save(path, model, **state)
        sizes.append(path.stat().st_size)
        states.append(state)

    monkeypatch.setattr(checkpoint, "save", saved)
    monkeypatch.setattr(system, "own_process", same_process)
    record = system.disk(dataclasses.replace(settings("disk"), out=str(tmp_path / "new" / "out.jsonl")), "toy", 300)
    config, _ = variants.shapes("toy", 300)
    assert len(sizes) == 3                                               # memory, a round that does not count, a round
    assert sizes[0] > 3 * 4 * config.num_params()["total"]
    assert len(states[0]["optimizer"]["state"]) == len([*GPT(config).parameters()])
    assert not [*(tmp_path / "new").iterdir()]
    for row, ours, plain in zip(record["rows"], ("save", "load"), ("write", "read")):
        assert row["what"] == f"checkpoint.{ours}" and row["bytes"] == sizes[0]
        assert row["bytes/s"] == sizes[0] / statistics.median(record["seconds"][ours])
        assert row["share of it"] == timing.median_ratio(record["seconds"][plain], record["seconds"][ours])


def test_the_scale_table_is_what_a_calculation_by_hand_gives():
    """1.3b: 24 layers, C = 2048, 16 heads and 8 KV heads of 128, d_ff 6,272; 2.6 times that to a
    multiple of 8."""
    rows = system.scale(settings("scale", presets=("1.3b",), vocab=(50257,), micro_batch=1), "1.3b", 50257)["rows"]
    memory = by(rows[:2], "model")
    days = by(rows[2:], "plan", "GPUs")
    attention = 24 * 2048 * 128 * (2 * 16 + 2 * 8)
    V = 50257
    C = 2048
    params = {name: attention + 24 * 3 * C * d_ff + V * C + 49 * C
              for name, d_ff in (("target", 6272), ("enlarged", 16304))}
    assert params == {"target": 1_329_860_608, "enlarged": 2_809_139_200}
    assert {name: row["params"] for name, row in memory.items()} == params
    row = memory["enlarged"]
    assert row["weights"] == row["gradients"] == row["Adam"] / 2 == pytest.approx(11.2365568)
    parts = ("weights", "gradients", "Adam", "activations", "cast weights", "loss")
    assert row["sum"] == pytest.approx(sum(row[part] for part in parts))

    square = 4 * 4096 * 128 * 16 * 24                                    # attention's FLOPs per token, forward
    flops = {name: 3 * (2 * (n - 49 * C) + square) for name, n in params.items()}
    idea = .7 * flops["enlarged"] + .3 * flops["target"]
    kd = .5 * flops["enlarged"] / 3
    for plan, gpus, per_token in (("scratch", 8, flops["target"]), ("idea", 512, idea), ("idea-kd", 1, idea + kd)):
        expected = 2e12 * per_token / (gpus * 1e15 * .4) / 86400
        assert days[plan, gpus]["days at most"] == pytest.approx(expected)
    assert days["idea", 512]["days at most"] == pytest.approx(1.877, abs=1e-3)


@pytest.mark.parametrize("config", [UNEVEN, variants.shapes("toy", 300, 2.6)[0]], ids=["uneven", "toy"])
@pytest.mark.parametrize("autocast", [False, True])
def test_accounted_activations_are_what_autograd_keeps(config, autocast):
    config = dataclasses.replace(config, head_dim=64)                        # a CPU widens smaller heads
    model = GPT(config)
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage                           # held, so that no address comes twice
        return tensor

    x = torch.randint(config.vocab_size, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = distill.chunked_loss(model.hidden(x), model.head_weight, x)
    assert loss.requires_grad
    size = 2 if autocast else 4
    parts = system.step_bytes(dataclasses.replace(config, block_size=64), 4, activation_bytes=size)
    expected = parts["activations"] + parts["cast weights"] + 4 * config.vocab_size * config.d_model
    # A GPU's kernel takes k and v for every query head; a CPU's does not.
    expected -= 4 * 64 * 2 * config.head_dim * (sum(config.n_head) - sum(config.n_kv_head)) * size
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(expected, rel=.02)


def test_the_mean_flops_of_a_plan_are_the_loop_s(tmp_path):
    """Executed FLOPs of a real run with the plan's shares, scoring left out."""
    setup, state = train.main(train.Train(preset="toy", plan="idea", steps=40, cuts=4, batch_tokens=256, micro_batch=4,
                                          eval_windows=4, device="cpu", score_every=100, out=str(tmp_path / "run")),
                              quiet=True)
    scored = [schedule.score_at(step, setup.timeline, 100, 100) for step in range(40)]
    scoring = sum(scored) * 3 * setup.start.removable_params()
    assert setup.timeline.slice_at == 27                                 # the last cut; the share says 28
    early = 256 * (setup.start.flops_per_token(64) - setup.target.flops_per_token(64))
    expected = 40 * 256 * system.plan_flops("idea", setup.target, setup.start) - early
    assert state.flops["executed"] - scoring == pytest.approx(expected)

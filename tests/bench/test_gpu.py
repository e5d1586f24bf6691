"""Every line of the suite gpu that asks for a GPU, on a CPU which pretends to be one."""

import pytest
import torch
from bench_helpers import by, same_process

from bench import __main__ as bench
from bench import inference, training, variants
from common import parse, read_records

FLAGS = "--presets toy --vocab 300 --rounds 1 --steps 2 --micro-batch 2 --prompt 12 --decode 5"


class PretendedGPU(str):
    """The device "cpu" for PyTorch, and "cuda" for whoever looks at its name."""

    def startswith(self, prefix, *places):
        return prefix == "cuda"


def pretend(patch):
    """Put a GPU of a CPU's memory in the place of torch.cuda: -> the names that were called."""
    called = []

    def fake(name, returned):
        def call(*_):
            called.append(name)
            return returned
        patch.setattr(torch.cuda, name, call)

    fake("synchronize", None)
    fake("reset_peak_memory_stats", None)
    fake("memory_allocated", 1000)
    fake("max_memory_allocated", 5000)
    fake("get_device_name", "pretended")
    fake("empty_cache", None)
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: called.append("pin_memory") or tensor)
    patch.setattr(bench, "pick_device", lambda name: PretendedGPU("cpu"))
    return called


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """The names that `bench gpu --compile` asked of torch.cuda, and its cells."""
    out = tmp_path_factory.mktemp("gpu") / "records.jsonl"
    compile = torch.compile
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        called = pretend(patch)
        patch.setattr(torch, "compile", lambda module, **options: compile(module, backend="eager", **options))
        for suite in (training, inference):
            patch.setattr(suite, "own_process", same_process)
        bench.main(parse(bench.Bench, ["gpu", "--compile", "--out", str(out), *FLAGS.split()]))
    torch.compiler.reset()
    return called, by(read_records(out), "cell")


def test_all_of_the_gpu_suite_runs(pretended):
    called, records = pretended
    assert [*records] == [f"toy, V = 300, {name}" for name in ("infer", "recover", "prune", "cuts")]
    assert not any("failed" in record for record in records.values())
    assert {*called} == {"synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated",
                         "get_device_name", "empty_cache", "pin_memory"}
    for record in records.values():
        assert record["about"]["machine"]["device"] == "pretended"
        assert record["about"]["settings"]["dtype"] == "bfloat16" and record["about"]["settings"]["compile"]
    assert records["toy, V = 300, recover"]["matmul_flops"] == 16 * 2 * 256**3


def test_the_teacher_on_a_gpu_is_held_in_bfloat16(pretended):
    _, enlarged = variants.shapes("toy", 300, 2.6)
    params = enlarged.num_params()
    memory = pretended[1]["toy, V = 300, recover"]["memory"]["recover, KD"]
    assert memory["before_bytes"] == 1000 and memory["peak_bytes"] == 5000
    assert 2 * params["total"] <= memory["teacher_bytes"] < 3 * params["total"]


def test_the_gpu_command_as_documented():
    """README and the help name it with these flags."""
    command = parse(bench.Bench, ["gpu", "--compile", "--out", "results/gpu.jsonl"])
    names = [name for name, _ in bench.cells(bench.resolve(command))]
    assert len(names) == 8 and names[0] == "124m, V = 50304, infer" and names[-1] == "1.3b, V = 50304, cuts"

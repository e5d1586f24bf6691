"""The tree: which files the root holds, and that every file imports only what stands above it in the list below."""
import re
from pathlib import Path

import pytest
from helpers import imports

ROOT = Path(__file__).parent.parent
LESSON = "model schedule score allocate prune distill shard train data checkpoint eval export report common".split()
PACKAGES = ("methods", "formats", "tasks", "experiments", "bench")
ROWS = [      # a file imports only from rows above its own
    "common schedule bench.gpt2_peer formats.modeling_nanoprune methods.dsnot methods.dynamic_batches "
    "tasks.statistics",
    "allocate distill model report experiments.scaling_laws experiments.texts formats.chat formats.origin "
    "formats.pt formats.tokenizer_json tasks.own_questions",
    "shard bench.timing experiments.scaling_curves formats.dcp formats.model_card formats.tokenizer "
    "formats.top_k methods.slicegpt methods.target_shape tasks.questions",
    "data formats.gguf_vocabulary formats.huggingface formats.llamacpp methods.margin tasks.probe",
    "checkpoint score formats.gguf_export",
    "eval export methods.channels methods.depth methods.latency methods.offload methods.policy "
    "methods.self_text methods.torch_pruning_peer",
    "experiments.measure methods.grow methods.mend",
    "experiments.recover_report methods.local methods.measured methods.refit methods.sparsegpt",
    "methods.sparse",
    "prune",
    "train bench.cut_memory experiments.candidates experiments.compare_report experiments.smollm2 methods.gates "
    "methods.loraprune",
    "bench.variants experiments.claims_runs experiments.glassllm experiments.recover experiments.teacher "
    "methods.adapters methods.sheared",
    "bench.dtypes bench.inference bench.system bench.training experiments.claims_statistics "
    "experiments.recover_study experiments.sweep methods.lora",
    "bench.accounting experiments.claims_report experiments.compare_recovery experiments.precision "
    "experiments.scaling_runs",
    "bench.memory experiments.claims experiments.compare experiments.scaling",
    "bench.__main__"]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()}
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file
         for folder in (".", *PACKAGES) for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_stands_above_it(name):
    assert name in ROW_OF, f"give {name} a row in this test"
    wrong = {other for other in imports(FILES[name]) if other != name and ROW_OF.get(other, -1) >= ROW_OF[name]}
    assert not wrong, f"{name} must not import {wrong}"


def test_the_root_holds_the_lesson_only():
    assert sorted(file.stem for file in ROOT.glob("*.py")) == sorted(LESSON)


@pytest.mark.parametrize("name", LESSON)
def test_the_lesson_imports_neither_experiments_nor_benchmarks(name):
    assert not {other.split(".")[0] for other in imports(FILES[name])} & {"experiments", "bench"}


def test_an_installed_project_holds_every_module_and_folder():
    project = (ROOT / "pyproject.toml").read_text()
    modules = re.search(r"py-modules = \[(.*?)\]", project, re.S)[1]
    packages = re.search(r"packages = \[(.*?)\]", project)[1]
    assert sorted(re.findall(r'"(\w+)"', modules)) == sorted(LESSON)
    assert sorted(re.findall(r'"(\w+)"', packages)) == sorted(PACKAGES)
    assert sorted(PACKAGES) == sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))

"""The tree: which files the root holds, and that every file imports only what stands further down."""
from pathlib import Path

import pytest
from helpers import imports

ROOT = Path(__file__).parent.parent
PACKAGES = ("methods", "formats", "tasks", "experiments", "bench")
ROWS = [      # a file imports only from rows above its own
    "common",
    "model schedule distill report allocate methods.two_four formats.tokenizer_json formats.modeling_nanoprune "
    "experiments.scaling_laws bench.gpt2_peer",
    "formats.tokenizer",
    "data formats.huggingface formats.llamacpp formats.gguf_vocabulary experiments.scaling_curves bench.timing",
    "checkpoint score formats.gguf_export",
    "tasks.questions",
    "eval methods.slicegpt",
    "prune folder",
    "flags",
    "steps experiments.claims_runs",
    "train methods.torch_pruning_peer",
    "export experiments.sweep bench.training",
    "experiments.scaling_runs experiments.claims_report bench.system bench.inference",
    "experiments.scaling bench.__main__",
    "experiments.claims experiments.compare experiments.smollm2"]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()}
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file
         for folder in (".", *PACKAGES) for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_stands_above_it(name):
    assert name in ROW_OF, f"give {name} a row in this test"
    wrong = {other for other in imports(FILES[name]) if other != name and ROW_OF.get(other, -1) >= ROW_OF[name]}
    assert not wrong, f"{name} must not import {wrong}"

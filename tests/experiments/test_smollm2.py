"""The checks of a folder against transformers run no code that came with it."""
import json

import pytest
from helpers import CONFIGS

import checkpoint
from common import UserError
from experiments import smollm2
from formats import huggingface
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig


@pytest.mark.parametrize("task", ["check", "questions"])
def test_a_run_folder_is_refused_with_the_remedy(task, tmp_path):
    checkpoint.save(tmp_path / "ckpt_00000000.pt", GPT(CONFIGS["plain"]), run={"tokenizer": "bytes"})
    with pytest.raises(UserError, match=f"is no Hugging Face folder, which {task} needs .* python export.py"):
        smollm2.main(smollm2.SmolLM2(task, str(tmp_path)))


@pytest.mark.parametrize("of", ["model", "tokenizer"])
def test_a_folder_s_own_code_is_not_run(of, tmp_path):
    shape = dict(vocab_size=256, block_size=64, d_model=12, head_dim=4, n_head=(3,), n_kv_head=(3,), d_ff=(5,))
    model = GPT(GPTConfig(**shape))
    huggingface.save(tmp_path, model, "llama", open_tokenizer("bytes").as_files())
    (tmp_path / "sent.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = tmp_path / ("config.json" if of == "model" else "tokenizer_config.json")
    auto_map = {"AutoModelForCausalLM": "sent.Sent"} if of == "model" else {"AutoTokenizer": ["sent.Sent", None]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "Sent", "auto_map": auto_map}))
    with pytest.raises(UserError, match="never run"):
        smollm2.main(smollm2.SmolLM2("check", str(tmp_path)))
    assert not (tmp_path / "ran").exists()

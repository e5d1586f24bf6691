"""formats/chat.py against transformers: the ids of chats, which of them are learned; and templates that mean harm."""
import importlib.metadata
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizer_toys import json_files, model_files, write_files

import data
from common import UserError
from eval import evaluate
from formats.tokenizer import open_tokenizer
from formats.tokenizer_json import byte_level_files
from model import GPT, GPTConfig

PLAIN = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
Be brief<|im_end|>
{% endif %}
{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""                                              # SmolLM2's, with lines that trim_blocks removes
MARKED = """{{ bos_token }}{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>' }}{% generation %}{{ message.content | trim }}<|im_end|>{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.content + ' ' + message | tojson + ' ' + loop.index0 % 2 * '-' }}
        {%- if message.content == 'stop' %}{% break %}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>{% endif %}"""
ENDS = {"<|endoftext|>": 400, "<|im_start|>": 401, "<|im_end|>": 402}


def byte_level(template):
    """A byte-level BPE with a few merges, as SmolLM2's."""
    ranks = {bytes([i]): i for i in range(256)} | {b" b": 256, b"li": 257, b"ne": 258, b"line": 259, b"\n\n": 260}
    files = byte_level_files(ranks, r"\s?\S+|\s+", ENDS, 400)
    config = json.loads(files["tokenizer_config.json"]) | {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return files | {"tokenizer_config.json": json.dumps(config), "chat_template.jinja": template}


def pieces(template):
    """A tokenizer that puts a blank before a text, as Llama 2's, with the template in its config."""
    return json_files("llama2", chat_template=[{"name": "rag", "template": "no"},
                                               {"name": "default", "template": template}])


def say(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    roles = roles[:1] * (first == "system") + roles[-2:] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


CHATS = [say("line 1 é日", "  a line\nand b  "), say("Be a bot", "x", "y", "z", "stop", first="system"),
         say("a", "b", "<|im_end|> c", "日本語\n\n", "", "e"), say("only a question")]


@pytest.mark.parametrize("kind", [byte_level, pieces])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_ids_and_masks_are_those_of_transformers(tmp_path, template, kind):
    from transformers import AutoTokenizer
    folder = write_files(tmp_path / "model", kind(template))
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = open_tokenizer(str(folder))
    for messages in CHATS:
        ids, is_context = data.chat.encode(ours, {"messages": messages})
        done = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=template == MARKED)
        assert ids.tolist() == done["input_ids"]
        if template == MARKED:
            assert (~is_context).astype(int).tolist() == done["assistant_masks"]
        else:                          # what each answer adds, by whole renderings
            learned = np.zeros(len(ids), bool)
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = theirs.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
                    behind = theirs.apply_chat_template(messages[:i + 1], return_dict=False)
                    learned[len(before):len(behind)] = True
            if kind == byte_level:     # a piece may join the line end of the question to the answer
                assert (~is_context).tolist() == learned.tolist()


@pytest.mark.parametrize("files", [byte_level(PLAIN), pieces(PLAIN), None])
def test_of_prompt_and_completion_the_completion_is_learned(files):
    tokenizer = open_tokenizer("bytes") if files is None else open_tokenizer("toy", files)
    for prompt, completion in (("a line é:", " b line"), ("</s> 2+2=", "4 日"), ("", "x"), ("x", "")):
        ids, is_context = data.chat.encode(tokenizer, {"prompt": prompt, "completion": completion})
        assert ids.tolist() == tokenizer.encode(prompt + completion).tolist()     # which no text can end
        assert tokenizer.decode(ids[~is_context]).strip() == completion.strip()
    if files and "chat_template.jinja" in files:
        messages = CHATS[0]
        halves = data.chat.encode(tokenizer, {"prompt": messages[:1], "completion": messages[1:]})
        for half, whole in zip(halves, data.chat.encode(tokenizer, {"messages": messages}), strict=True):
            assert half.tolist() == whole.tolist()


def test_rows_become_a_corpus_whose_batches_have_the_answers_as_targets(tmp_path):
    tokenizer = open_tokenizer("toy", byte_level(PLAIN))
    rows = [{"messages": say(f"question {i}", f"answer {i}")} for i in range(50)]
    rows += [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(50)] + [{"text": f"text {i}"}
                                                                                         for i in range(50)]
    rows += [{"messages": say(f"{i}, nobody answers")} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpora = [data.load(str(tmp_path / "rows.jsonl"), tokenizer, cache) for cache in (None, tmp_path, tmp_path)]
    assert len({corpus.train[:].tobytes() for corpus in corpora}) == 1 and corpora[2].train.parts[0].dtype == "<u4"
    tokens = corpora[2].train[:]
    x, y = data.batch(tokens, len(tokens) - 1, 0, 0, 0, micro_batch=1, micro_steps=1)
    learned = tokenizer.decode(y[y != data.IGNORED].tolist())
    assert x.max() < 500 and (x[0, 1:] == y[0, :-1])[y[0, :-1] != data.IGNORED].all()
    assert "answer 7<|im_end|>\n<|im_end|>" in learned and "text 7<|im_end|>" in learned and "8<|im_end|>" in learned
    assert not any(word in learned for word in ("question", "+", "nobody", "user", "Be brief"))
    whole = data.without_marks(tokens)
    assert tokenizer.decode(whole).count("nobody") > 40
    others = [data.load(str(tmp_path / "rows.jsonl"), open_tokenizer("toy", byte_level(template)), tmp_path)
              for template in (PLAIN, MARKED)]
    assert others[0].folder == corpora[1].folder != others[1].folder and others[0].fingerprint == others[1].fingerprint


def test_evaluation_counts_the_answers_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=8, d_model=8, head_dim=4, n_head=(2,), n_kv_head=(2,), d_ff=(9,)))
    tokens = np.random.default_rng(0).integers(50, size=49).astype("<u4")
    is_context = np.random.default_rng(1).random(49) < 0.6
    x, y = torch.from_numpy(tokens[:48].astype(int)).view(6, 8), torch.from_numpy(tokens[1:].astype(int)).view(6, 8)
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").detach()[~is_context[1:]]
    marked = tokens | np.where(is_context, data.CONTEXT_ONLY, 0).astype("<u4")
    for batch in (1, 4):
        result = evaluate(model, marked, np.arange(50), 0, batch=batch)
        assert result["tokens"] == len(losses) and abs(result["loss"] - losses.mean().item()) < 1e-5
        bits = losses.sum().item() / math.log(2) / tokens[1:][~is_context[1:]].sum()
        assert abs(result["bits_per_byte"] - bits) < 1e-5
    with pytest.raises(UserError, match="no answer is among the windows"):
        evaluate(model, tokens | np.uint32(data.CONTEXT_ONLY), np.arange(50), 0)


@pytest.mark.parametrize("template, message", [
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ cycler.__init__.__globals__.os }}", "SecurityError|UndefinedError"),
    ("{% for i in range(999999999) %}{% endfor %}", "OverflowError|SecurityError"),
    ("{{ 'a' * 999999999 }}", "not allowed"),
    ("{{ 10 ** 999999999 }}", "not allowed"),
    ("{{ '%999999999d' % 1 }}", "not allowed"),
    ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "writes more than"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}", "within another"),
    ("{{ ('{0.__globals__[json]}'|attr('format'))(raise_exception) }}", "SecurityError"),
    ("{% if %}", "TemplateSyntaxError")])
def test_a_template_that_means_harm_is_a_sentence(template, message):
    tokenizer = open_tokenizer("toy", byte_level(template))
    with pytest.raises(UserError, match=message):
        data.chat.encode(tokenizer, {"messages": say("a", "b")})


def test_a_jinja_that_templates_can_leave_is_refused(monkeypatch):
    monkeypatch.setattr(data.chat, "environment", data.chat.environment.__wrapped__)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.1.5")
    with pytest.raises(UserError, match="^jinja2 3.1.5 does not hold .*; pip install --upgrade jinja2 to .* 3.1.6"):
        data.chat.Template(PLAIN, {}, "toy")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2rc1")
    assert data.chat.Template(PLAIN, {}, "toy").text == PLAIN


def test_what_is_missing_is_named(tmp_path):
    files = byte_level(PLAIN)
    del files["chat_template.jinja"]
    with pytest.raises(UserError, match="no chat template, which rows of messages need: put a chat_template.jinja"):
        data.chat.encode(open_tokenizer("toy", files), {"messages": say("a")})
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    with pytest.raises(UserError, match="writes message 2 of 4 in another way when others follow"):
        data.chat.encode(open_tokenizer("toy", byte_level(forgetful)), {"messages": say("a", "b", "c", "d")})
    pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match="changes texts.* give a folder with a tokenizer.json"):
        data.chat.encode(open_tokenizer("toy", model_files()), {"prompt": "a", "completion": "b"})
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"content": "no role"}]}) + "\n")
    with pytest.raises(UserError, match="nor messages with roles"):
        data.load(str(tmp_path / "a.jsonl"), cache=None)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(UserError, match="is one chat, of which no part can be held out"):
        data.load(str(tmp_path / "a.jsonl"), cache=None)

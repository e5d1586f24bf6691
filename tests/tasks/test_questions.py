"""Log-likelihoods against the plain formula; questions and tasks against lm-evaluation-harness with transformers."""
import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
import transformers

from checkpoint import load, tokenizer_of
from common import UserError, parse
from formats.tokenizer import Bytes, Tiktoken, open_tokenizer
from model import GPT, GPTConfig
from tasks import questions
from tasks.questions import Question, grow, loglikelihoods, multiple_choice, read_questions

UNEVEN = GPTConfig(vocab_size=5, block_size=16, d_model=12, head_dim=4, n_head=(4, 0, 2), n_kv_head=(2, 0, 1),
                   d_ff=(8, 16, 0), tie_embeddings=False)


def wild(config, dtype=torch.float64):
    """A model with large random weights: log-probabilities that differ from token to token."""
    torch.manual_seed(1)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
    return model


@torch.no_grad()
def plain(model, context, continuation):
    """One request as lm_eval runs it: the last block_size + 1 tokens, whole logits, no other request near."""
    whole = torch.tensor([*context, *continuation])[-model.config.block_size - 1:]
    n = len(continuation)
    logits = model(whole[None, :-1])[0, -n:]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats = logits.log_softmax(-1).gather(1, whole[-n:, None]).sum().item()
    return nats, bool((logits.argmax(-1) == whole[-n:]).all())


def some_requests(count=300):
    """Of few different tokens, so that many share prefixes and some are the same; contexts to twice the block_size."""
    rng = np.random.default_rng(0)
    lists = [(rng.integers(0, 2, rng.integers(1, 33)), rng.integers(0, 5, rng.integers(1, 6))) for _ in range(count)]
    longest = [(rng.integers(0, 5, n), rng.integers(0, 5, 16)) for n in (1, 3)]         # leaves 1 token of context
    return [*lists, *longest, ((0, 1), [2]), ([0, 1], (2,)), ([0, 1], [2, 3]), ([0, 1, 2], [3])]


@pytest.fixture(scope="module")
def expected():
    return [plain(wild(UNEVEN), *request) for request in some_requests()]


def near(scores, expected, tolerance=1e-9):
    assert len(scores) == len(expected)
    for (nats, greedy), (right, is_greedy) in zip(scores, expected):
        assert nats == pytest.approx(right, abs=tolerance) and greedy is is_greedy


@pytest.mark.parametrize("batch_tokens, row", [(None, 256), (1, 256), (37, 20), (10**6, 256), (500, 0)])
def test_loglikelihoods_are_the_plain_formula(expected, monkeypatch, batch_tokens, row):
    monkeypatch.setattr(questions, "ROW", row)
    near(loglikelihoods(wild(UNEVEN), some_requests(), batch_tokens), expected)
    assert {greedy for _, greedy in expected} == {True, False}


def test_logits_are_formed_for_predicted_tokens_only(expected, monkeypatch):
    rows, model = [], wild(UNEVEN)
    monkeypatch.setattr(questions, "chunk_tokens", lambda _: 10)
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *bias: rows.append(len(x) * (w is model.head_weight)) or
                        linear(x, w, *bias))
    near(loglikelihoods(model, some_requests()), expected)
    assert max(rows) == 10 and sum(rows) == sum(len(continuation) for _, continuation in some_requests())


def test_bfloat16_weights_get_a_float32_softmax():
    config = GPTConfig(**{**UNEVEN.__dict__, "vocab_size": 4000})
    model, rng = wild(config, torch.bfloat16), np.random.default_rng(0)
    requests = [(rng.integers(0, 4000, 5), rng.integers(0, 4000, 4)) for _ in range(20)]
    scores = [loglikelihoods(model, [request])[0] for request in requests]  # each alone: the same rounding inside
    near(scores, [plain(model, *request) for request in requests], 1e-4)
    coarse = model(torch.tensor([[*requests[0][0], *requests[0][1]]]))[0, 4:-1].log_softmax(-1)
    assert abs(coarse.gather(1, torch.tensor(requests[0][1])[:, None]).float().sum().item() - scores[0][0]) > 1e-3


def nodes(requests, block_size=4096):
    return sum(len(tree.ids) for tree in grow(requests, block_size))


def test_what_requests_share_is_run_once():
    first, second = list(range(10)), list(range(10, 20))
    assert nodes([(first, [c]) for c in range(4)]) == 10                   # one token predicted: nothing behind context
    assert nodes([(first, [1, 2, 3]), (first, [4, 5]), (second, [1, 2])]) == 10 + 2 + 1 + 10 + 1
    assert nodes([(first, [1, 2, 3]), (first, [1, 2, 4]), (first, [1, 2, 3])]) == 10 + 2
    shots = list(range(100, 400))
    few = [([*shots, *range(q, q + 10)], [choice]) for q in range(10) for choice in (1, 2)]
    assert nodes(few) == 300 + 10 * 10
    assert len(grow([([0, *range(q, q + 300)], [1]) for q in (1, 500)], 4096)) == 2  # one token is not worth a mask
    assert questions.batch_of(grow([(shots, [1])], 4096), torch.device("cpu"))[1] == {}


def test_requests_that_cannot_be_scored_are_refused():
    for request, sentence in (((), [1]), "request 1 has 0 tokens of context and 1 of"), \
            (([1], ()), "1 tokens of context and 0 of"), (([1], [2] * 17), "17 of continuation; .* 1 to 16"):
        with pytest.raises(UserError, match=sentence):
            loglikelihoods(wild(UNEVEN), [([1], [2]), request])


# -- questions from files
ROWS = [{"query": "Q: 1 + 1 is\nA:", "choices": [" 2", " 3"], "gold": 0},
        {"query": "Ü\u2028?", "choices": [" é", " ee", " x"], "gold": 2}]


def test_questions_are_read_from_json_lines(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    assert read_questions(tmp_path / "q.jsonl") == [Question(r["query"], tuple(r["choices"]), r["gold"]) for r in ROWS]
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[0]))
    assert len(read_questions(tmp_path / "q.jsonl")) == 1


def bigbench(tmp_path, example, **task):
    (tmp_path / "task.json").write_text(json.dumps({"name": "t", "examples": [example], **task}, indent=1))
    return read_questions(tmp_path / "task.json")


def test_questions_are_read_from_bigbench(tmp_path):
    example = {"input": "Why? ", "target_scores": {"So": 0, "Thus ": 1, "No": 0.5}}
    spaced = (" So", " Thus", " No")
    assert bigbench(tmp_path, example, append_choices_to_input=True) == [Question("Q: Why? \nA:", spaced, 1)]
    assert bigbench(tmp_path, example, task_prefix="Go.\n", example_input_prefix="", example_output_prefix="") == \
        [Question("Go.\nWhy?", spaced, 1)]
    assert bigbench(tmp_path, example, example_output_prefix="\n->") == \
        [Question("Q: Why? \n->", ("So", "Thus", "No"), 1)]


@pytest.mark.parametrize("line, sentence", [
    ("{", r"q.jsonl:2 is no question \(JSONDecodeError: .*; a line is \{\"query"), ("[1]", "q.jsonl:2 is no question"),
    ('{"query": "a", "gold": 0}', r"q.jsonl:2 is no question \(KeyError: 'choices'\)"),
    ('{"query": 1, "choices": ["a", "b"], "gold": 0}', "q.jsonl:2: query must be a text"),
    ('{"query": "a", "choices": "ab", "gold": 0}', "q.jsonl:2: query must be a text, and choices a list"),
    ('{"query": "a", "choices": ["a", " "], "gold": 0}', "q.jsonl:2: .* not blank"),
    ('{"query": "a", "choices": ["a"], "gold": 0}', "q.jsonl:2: 1 choices, and a question needs at least 2"),
    ('{"query": "a", "choices": ["a", "b"], "gold": 2}', "q.jsonl:2: gold is 2, and .* 2 choices, 0 to 1"),
    ('{"query": "a", "choices": ["a", "b"], "gold": true}', "q.jsonl:2: gold is True")])
def test_bad_rows_are_refused_by_line(tmp_path, line, sentence):
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=sentence):
        read_questions(tmp_path / "q.jsonl")


def test_bad_files_are_refused(tmp_path):
    for content, sentence in ((b"\xff", "not UTF-8"), (b"\n", "holds no questions"),
                              (b'{"name": "all"}', "nor a BIG-bench task with examples; give the task.json")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            read_questions(tmp_path / "file")
    for example, sentence in (({"input": "a", "target": "b"}, "task.json: example 1 has no target_scores"),
                              ({"input": "a", "target_scores": {"b": 1, "c": 1, "d": 0}}, "2 of 3 choices have the"),
                              ({"input": "a", "target_scores": {"b": 1, "c": "2"}}, "1 has no target_scores"),
                              ({"input": "a", "target_scores": {"b": 1}}, "example 1: 1 choices")):
        with pytest.raises(UserError, match=sentence):
            bigbench(tmp_path, example)


def test_multiple_choice_has_three_metrics():
    model = wild(GPTConfig(**{**UNEVEN.__dict__, "vocab_size": 256, "block_size": 64}))
    tokenizer = Bytes()
    questions = [Question(f"Q{n}: ", ("a", " bb", " éé", " dddd ee"), n % 4) for n in range(40)]
    result = multiple_choice(model, tokenizer, questions)
    picks = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for q, row in zip(questions, result["loglikelihoods"]):
        nats = [plain(model, list(q.query.rstrip().encode()), list((" " + choice).encode()))[0] for choice in q.choices]
        assert row == pytest.approx(nats)
        for name, lengths in (("acc", (1, 1, 1, 1)), ("acc_norm", (1, 2, 2, 7)), ("acc_bytes", (1, 2, 4, 7))):
            picks[name].append(max(range(4), key=lambda i: nats[i] / lengths[i]))
    assert result["questions"] == 40 and len(set(map(tuple, picks.values()))) == 3
    for name, row in picks.items():
        p = sum(pick == q.gold for pick, q in zip(row, questions)) / 40
        assert result[name] == p and result[name + "_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 39))
    assert result["tokens"] == sum(len(f"Q{n}:") * 4 + 1 + 3 + 5 + 8 for n in range(40))
    assert result["tokens_run"] < result["tokens"] / 2 and result["seconds"] > 0
    assert math.isnan(multiple_choice(model, tokenizer, questions[:1])["acc_stderr"])


# -- lm-evaluation-harness as the oracle: HFLM with transformers' Llama against our reading of the same folder
TEXT = ["Why is the sky blue?", "Q: Who wrote it?\nA: She did, and they read it.",
        "def read(path):\n    return open(path)"]


@pytest.fixture(scope="module", params=["", "bos"])
def twin(request, tmp_path_factory):
    """(our model, our tokenizer, HFLM, folder), read from one folder; with "bos" the tokenizer opens each text."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("twin" + request.param)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(TEXT * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>", "<|begin|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if request.param:
        bpe.post_processor = tokenizers.processors.Sequence([
            tokenizers.processors.ByteLevel(trim_offsets=False), tokenizers.processors.TemplateProcessing(
                single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", **({"bos_token": "<|begin|>"} if request.param else {}))
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, eos_token_id=0, bos_token_id=1, pad_token_id=0)).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.normal_(std=0.3)
        oracle.lm_head.weight[2:258] *= 0.3                               # fewer single bytes, more words and ends
    oracle.save_pretrained(folder)
    model, about = load(folder)
    from lm_eval.models.huggingface import HFLM
    return model, tokenizer_of(model, about, folder), HFLM(oracle, tokenizer=fast), folder


def write_tasks(folder, questions):
    """Three tasks of lm_eval's own YAML over local files; doc_to_choice without the space that target_delimiter is."""
    rows = [{"query": q.query, "choices": [c.removeprefix(" ") for c in q.choices], "gold": q.gold,
             "text": q.query * 5 + "!"} for q in questions]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
"""
    (folder / "choice.yaml").write_text(data + """task: own_choice
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""")
    (folder / "rolling.yaml").write_text(data + """task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
""")
    (folder / "generate.yaml").write_text(data + """task: own_generate
output_type: generate_until
doc_to_text: text
doc_to_target: query
generation_kwargs: {until: [" it", "ho"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""")


def answers(results, name):
    """What the model answered to each document of a task, in order: [(nats, greedy)] or texts."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["filtered_resps"]]


QUESTIONS = [Question(query, choices, n % 2) for n, query in enumerate(
    ["", "Why", "Why is the sky", *TEXT, "def ", "Q: Who \n", "<|begin|>Why", "<|end|> is", TEXT[2] * 4, "é" * 60])
    for choices in [(" a", " blue sky"), (" read", " é", " they read it", " a")]]


def test_questions_and_tasks_agree_with_lm_eval(twin, tmp_path):
    model, tokenizer, oracle, _ = twin
    write_tasks(tmp_path, QUESTIONS)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = ["own_choice", "own_rolling", "own_generate"]
    peer = simple_evaluate(oracle, tasks=names, task_manager=manager, bootstrap_iters=1)
    result = multiple_choice(model, tokenizer, QUESTIONS)                                # our reading of the questions
    assert [x for row in result["loglikelihoods"] for x in row] == \
        pytest.approx([nats for nats, _ in answers(peer, "own_choice")], abs=1e-4)
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert result[name] == peer["results"]["own_choice"][name + ",none"]
        assert result[name + "_stderr"] == pytest.approx(peer["results"]["own_choice"][name + "_stderr,none"])
    tasks, table = questions.run_tasks(model, tokenizer, names, include_path=str(tmp_path), bootstrap_iters=1)
    near(answers(tasks, "own_choice"), answers(peer, "own_choice"), 1e-4)
    # Sums over up to some thousand tokens: float32 may round a hundred times.
    rounding = 100 * torch.finfo(torch.float32).eps
    assert answers(tasks, "own_rolling") == pytest.approx(answers(peer, "own_rolling"), rel=rounding)
    texts = answers(tasks, "own_generate")
    assert texts == answers(peer, "own_generate")
    assert len({len(tokenizer.encode(text)) for text in texts}) > 1                       # some of them were stopped
    assert "own_generate" in table and f"{result['acc_norm']:.4f}" in table


def test_ids_are_those_of_lm_evals_transformers(twin, tmp_path):
    _, tokenizer, oracle, folder = twin
    encoder = questions.Encoder(tokenizer)
    assert encoder.prefix == oracle.prefix_token_id
    for text in [*TEXT, "", "<|begin|>Why", "Why<|end|> is", " ", "é\n "]:
        assert encoder(text) == oracle.tok_encode(text), text
        if text.strip():
            assert encoder.pair(text, " blue") == oracle._encode_pair(text, " blue")
    context, continuation = encoder.pair("Why is the s", "ky blue? Why?")  # " sky" is one token, " s" is two
    assert (context, continuation) == oracle._encode_pair("Why is the s", "ky blue? Why?") and continuation
    assert context + continuation != encoder("Why is the sky blue? Why?")
    opening = oracle.tokenizer.decode([encoder.prefix])                    # brings its own: it is not put there twice
    assert encoder.pair("", opening + "Why") == ([encoder.prefix], encoder.plain("Why"))
    assert encoder.pair(" \n", "x") == encoder.pair("", " \nx")          # lm_eval fails here without a BOS
    for add in (True, False):                                             # void beside a tokenizer.json
        for name, content in tokenizer.files.items():
            (tmp_path / name).write_text(content)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": add}))
        assert questions.Encoder(open_tokenizer(str(tmp_path)))("Why") == \
            transformers.AutoTokenizer.from_pretrained(tmp_path).encode("Why")


def greedy(model, text, n):
    idx = torch.tensor([list(text.encode())])
    return bytes(model.generate(idx, n, temperature=0)[0, idx.size(1):].tolist())


def test_generation_stops_and_cuts_the_prompt():
    model = wild(GPTConfig(**{**UNEVEN.__dict__, "vocab_size": 128, "block_size": 64}))
    text = greedy(model, "Q: ", 12)
    tokenizer = Bytes()
    ids = tokenizer.encode("Q: ").tolist()
    complete = lambda tokenizer, ids, *until: questions.complete(
        model, tokenizer, [ids], questions.Options(until, 12))[0].encode()
    assert len(set(text)) > 5 and complete(tokenizer, ids) == text
    stop = text[4:6].decode()
    assert complete(tokenizer, ids, "never", stop) == text[:text.index(text[4:6])]
    calls, forward = [], model.hidden
    model.hidden = lambda *a, **options: calls.append(1) or forward(*a, **options)
    complete(tokenizer, ids, stop)
    assert len(calls) == text.index(text[4:6]) + 2                         # it does not go on behind the stop
    assert complete(Bytes(eot=text[5]), ids) == text[:text.index(text[5])]
    long = "a question " * 20
    assert complete(tokenizer, list(long.encode())) == greedy(model, long[-52:], 12)
    with pytest.raises(UserError, match="max_gen_toks 64 must be between 1 and 63, as the context has 64 tokens"):
        questions.complete(model, tokenizer, [ids], questions.Options((), 64))


@pytest.mark.parametrize("batch_tokens", [1, 60, 200, None])
def test_generation_in_batches_answers_each_prompt_as_alone(batch_tokens, monkeypatch):
    model = wild(GPTConfig(**{**UNEVEN.__dict__, "vocab_size": 128, "block_size": 64}))
    texts = ["Q: ", "Why is the sky blue? ", "a", "a question " * 9, "they read it", "Q: ", "def "]
    stops = [greedy(model, text[-52:], 12)[5:7].decode() for text in texts]
    requests = []
    for text in texts:
        for until in (tuple(stops), ()):
            requests.append((list(text.encode()), questions.Options(until, 12)))
    tokenizer = Bytes(eot=greedy(model, "def ", 12)[8])
    alone = [questions.complete(model, tokenizer, [ids], options)[0] for ids, options in requests]
    assert len({len(text) for text in alone}) > 3                                         # some of them were stopped
    sizes, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda idx, *a, **b: sizes.append(idx.shape) or generate(idx, *a, **b))
    assert questions.complete_all(model, tokenizer, requests, batch_tokens) == alone
    if batch_tokens is not None:
        assert all(rows == 1 or rows * (width + 12) <= batch_tokens for rows, width in sizes)
    assert len(sizes) == {1: 14, 60: 8, 200: 4, None: 2}[batch_tokens]


def test_sampled_generation_repeats_by_seed():
    model = wild(GPTConfig(**{**UNEVEN.__dict__, "vocab_size": 128, "block_size": 64}))
    adapter = lambda seed: questions.lm_eval_adapter(model, Bytes(), seed=seed)
    from lm_eval.api.instance import Instance
    ask = lambda seed, **options: adapter(seed).generate_until(
        [Instance("generate_until", {}, ("Q: ", {"max_gen_toks": 8, **options}), 0)])[0]
    sampled = [ask(seed, do_sample=True, temperature=5.0) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert ask(1) == ask(1, temperature=0.0, top_p=0.9) == greedy(model, "Q: ", 8).decode() != sampled[0]
    assert ask(1, do_sample=True, temperature=5.0, top_k=1) == ask(1)
    with pytest.raises(UserError, match="generation options top_p are not here"):
        ask(1, do_sample=True, temperature=5.0, top_p=0.9)


def test_tasks_that_cannot_run_are_refused(twin, tmp_path, monkeypatch):
    model, tokenizer, *_ = twin
    import huggingface_hub.constants
    import lm_eval.tasks
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path=None, include_defaults=False: real(
        include_path=include_path, include_defaults=False))               # lm_eval's own 14,000 take it 10 seconds
    for task, where in (("far", "nobody/nothing"), ("gone", f"json\ndataset_kwargs: {{data_files: {tmp_path}/gone}}")):
        (tmp_path / f"{task}.yaml").write_text(f"task: {task}\ndataset_path: {where}\ntest_split: test\n"
                                               "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_target: b\n")
        with pytest.raises(UserError, match=f"the data of {task} cannot be had .*; run it once with a network"):
            questions.run_tasks(model, tokenizer, [task], include_path=str(tmp_path))
    with pytest.raises(UserError, match="lm_eval has no task 'nosuch'; `lm_eval ls tasks` lists 2, and --include-path"):
        questions.run_tasks(model, tokenizer, ["far", "nosuch"], include_path=str(tmp_path))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="lm-evaluation-harness, which cannot be imported .*: pip install 'lm_eval"):
        questions.run_tasks(model, tokenizer, ["far"])


@dataclass(frozen=True)
class Flags:
    model: str
    files: tuple[str, ...] = ()   # files to read


def test_a_flag_with_a_tuple_takes_one_or_more():
    assert parse(Flags, ["m"]).files == () and list(parse(Flags, ["m", "--files", "a", "b"]).files) == ["a", "b"]


# -- tokens that span the question and the choice

def words_of(*tokens):
    """A tokenizer with these tokens beside bytes, in which any token may span words."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in tokens:
        for end in range(2, len(token) + 1):
            ranks.setdefault(token[:end].encode(), len(ranks))
    return Tiktoken("toy", tiktoken.Encoding("toy", pat_str=r"(?s).+", mergeable_ranks=ranks,
                                             special_tokens={"<|endoftext|>": len(ranks)}))


@pytest.mark.parametrize("context, choice", [("ans", "wer"), ("ans ", "wer"), ("hello wor", "ld")])
def test_a_choice_that_a_token_swallows_is_encoded_alone(context, choice):
    tokenizer = words_of("answer", "ans wer", "hello world")
    ids, behind = questions.Encoder(tokenizer).pair(context, choice)
    assert ids == tokenizer.encode(context.rstrip()).tolist()
    assert behind == tokenizer.encode(" " * (len(context) - len(context.rstrip())) + choice).tolist() != []
    model = wild(GPTConfig(**{**UNEVEN.__dict__, "vocab_size": tokenizer.vocab_size}))
    result = multiple_choice(model, tokenizer, [Question(context, (choice, " x"), 0)])
    near([(result["loglikelihoods"][0][0], True)], [(plain(model, ids, behind)[0], True)])


def test_a_choice_that_cannot_be_scored_is_named_by_file_and_line(tmp_path):
    config = GPTConfig(**{**UNEVEN.__dict__, "vocab_size": 256})
    for choice, sentence in (("\0", "has 0 tokens, and must have 1 to 16"), ("x" * 17, "has 17 tokens, and must")):
        rows = [{"query": "Q", "choices": [" a", text], "gold": 0} for text in (" b", choice)]
        (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(UserError, match=f"q.jsonl:2: the choice .* {sentence}"):
            multiple_choice(wild(config), Bytes(), read_questions(tmp_path / "q.jsonl"))


def test_deep_json_is_no_question(tmp_path):
    (tmp_path / "q.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"q.jsonl:1 is no question \(RecursionError"):
        read_questions(tmp_path / "q.jsonl")

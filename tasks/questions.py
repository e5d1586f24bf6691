"""Questions with choices: log-likelihoods of continuations, scored as lm-evaluation-harness does,
each prefix run once.

    python eval.py MODEL --multiple-choice FILE     # JSON lines, or the task.json of a BIG-bench task
    python eval.py MODEL --multiple-choice own      # our own 500 questions, tasks/own_questions.py
    python eval.py MODEL --tasks piqa,arc_easy      # any task of lm_eval, run by lm_eval through our model

The score of a choice is the summed log-probability of its tokens behind the question. lm_eval runs
the question again for every choice. Here, token sequences that begin alike share a *tree*, in which
each node is run once. A mask lets a node see its ancestors only, and its position is its depth. So
choices share their question, and questions share their few-shot examples.

Tokens, truncation and metrics are those of lm_eval 0.4.13 with transformers
(tests/tasks/test_questions.py compares them). One thing differs: the log-softmax of bfloat16
weights is float32 here.

Not here: prompts other than the file's, chat templates, tokenizers that put EOS behind a text.
"""
import itertools
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import UserError
from distill import chunk_tokens
from tasks import own_questions

# Sequences that share little share a tree, too, up to so many tokens: fewer and fuller rows are
# faster.
ROW = 256
LINE = '{"query": "Q: 1 + 1 is\\nA:", "choices": [" 2", " 3"], "gold": 0}'


# -- log-likelihoods

@dataclass
class Tree:
    """N different prefixes of sequences that begin alike, depth first: node j is seen by the nodes
    j to ends[j] - 1."""
    # The token of each node, (N,), its depth, and the number of the node behind its last descendant.
    ids: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    ends: list = field(default_factory=list)
    # Per request: its number, n nodes, and the n tokens that are predicted there.
    answers: list = field(default_factory=list)


@dataclass(frozen=True)
class Sequence:
    """A request as it is run."""
    number: int                   # of the request
    tokens: np.ndarray            # context and continuation, the last block_size + 1 tokens of them
    predicted: int                # tokens of the continuation

    @property
    def inputs(self):
        return self.tokens[:-1]


def sequences_of(requests, block_size):
    """[(context ids, continuation ids)] -> [Sequence]. Raises UserError if one side has no tokens,
    or if a continuation is longer than block_size."""
    sequences = []
    for number, (context, continuation) in enumerate(requests):
        n = len(continuation)
        if not len(context) or not n or n > block_size:
            raise UserError(f"request {number} has {len(context)} tokens of context and {n} of "
                            f"continuation; it needs at least 1 of context and 1 to {block_size} "
                            "of continuation, so shorten or remove it")
        tokens = np.concatenate((context, continuation))[-block_size - 1:].astype(np.uint32)
        sequences.append(Sequence(number, tokens, n))
    return sequences


def common_prefix(a, b):
    """Number of tokens with which both sequences begin."""
    shortest = min(len(a), len(b))
    different = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(different[0]) if len(different) else shortest


def grow(requests, block_size):
    """[(context ids, continuation ids)] -> [Tree]. Raises UserError as `sequences_of` does."""
    # Sorted by its tokens' bytes, a sequence shares most with the one before it.
    sequences = sequences_of(requests, block_size)
    sequences.sort(key=lambda sequence: (sequence.inputs.tobytes(), sequence.number))
    trees = []
    path = []                                            # nodes of the sequence before, in the last tree
    before = np.empty(0, np.uint32)                      # its tokens
    for sequence in sequences:
        inputs = sequence.inputs
        shared = common_prefix(inputs, before)
        # Attention grows with the square of a row, so long rows pay only where much is shared.
        room = ROW if 2 * shared < len(inputs) else max(ROW, 2 * len(inputs))
        if not trees or len(trees[-1].ids) + len(inputs) - shared > room:
            trees.append(Tree())
            path = []
            shared = 0
        tree = trees[-1]
        first = len(tree.ids)
        behind = first + len(inputs) - shared
        path = path[:shared] + list(range(first, behind))
        tree.ids += inputs[shared:].tolist()
        tree.positions += range(shared, len(inputs))
        tree.ends += [0] * (behind - first)
        for node in path:
            tree.ends[node] = behind
        predicted = sequence.tokens[-sequence.predicted:].tolist()
        tree.answers.append((sequence.number, path[-sequence.predicted:], predicted))
        before = inputs
    return trees


def batch_of(trees, device):
    """Trees, the longest first, as one batch.

    -> idx (B, T); the arguments with which model.hidden sees them as trees; and three arrays with
    an entry for each predicted token: number of its request, row of the hidden states (B·T, C) that
    predicts it, its id."""
    B = len(trees)
    T = len(trees[0].ids)
    # Padding stands last, where nobody sees it.
    idx = np.zeros((B, T), np.int64)
    positions = np.tile(np.arange(T), (B, 1))
    ends = np.full((B, T), T)
    answers = []
    for b, tree in enumerate(trees):
        N = len(tree.ids)
        idx[b, :N] = tree.ids
        positions[b, :N] = tree.positions
        ends[b, :N] = tree.ends
        for number, nodes, tokens in tree.answers:
            for node, token in zip(nodes, tokens):
                answers.append((number, b * T + node, token))
    arguments = {}
    # Trees that are single paths need no mask: attention is causal anyway.
    if (positions != np.arange(T)).any():
        t = torch.arange(T, device=device)
        ends = torch.from_numpy(ends).to(device)
        sees = (t <= t[:, None]) & (t[:, None] < ends[:, None])                # (B, T, T)
        arguments = {"positions": torch.from_numpy(positions).to(device), "mask": sees[:, None]}
    owners, nodes, tokens = np.array(answers).T
    return torch.from_numpy(idx).to(device), arguments, owners, nodes, tokens


@torch.no_grad()
def loglikelihoods(model, requests, batch_tokens=None, progress=True):
    """Score continuations: [(context ids, continuation ids)] -> [(nats, greedy)], in the same
    order.

    `nats` is the summed log-probability of the continuation, `greedy` says whether each of its
    tokens is the most likely one. Logits exist for predicted tokens only, and in chunks.
    `batch_tokens` is the number of tokens per forward pass; the default is 512 on a CPU, for its
    caches, and 16,384 elsewhere (our guess, not measured). Raises UserError as `sequences_of`
    does."""
    device = model.embed.weight.device
    if batch_tokens is None:
        batch_tokens = 512 if device.type == "cpu" else 16384
    count = len(requests)
    nats = np.zeros(count)
    misses = np.zeros(count)
    trees = sorted(grow(requests, model.config.block_size), key=lambda tree: -len(tree.ids))
    with tqdm(total=count, desc="loglikelihoods", leave=False, disable=None if progress else True) as bar:
        while trees:
            rows = max(1, batch_tokens // len(trees[0].ids))
            batch = trees[:rows]
            trees = trees[rows:]
            idx, arguments, owners, nodes, tokens = batch_of(batch, device)
            hidden = model.hidden(idx, **arguments).flatten(0, 1)              # (B·T, C)
            log_p, hits = predictions(model, hidden, nodes, tokens)
            nats += np.bincount(owners, log_p, count)
            misses += np.bincount(owners, ~hits, count)
            bar.update(sum(len(tree.answers) for tree in batch))
    return list(zip(nats.tolist(), (misses == 0).tolist()))


def predictions(model, hidden, nodes, tokens):
    """Log-probabilities of `tokens` at the rows `nodes` of `hidden`, and whether each token is the
    most likely one: two arrays. Logits are formed chunk by chunk, in float32 at least."""
    weight = model.head_weight
    chunk = chunk_tokens(weight)
    nodes = torch.from_numpy(nodes).to(hidden.device)
    tokens = torch.from_numpy(tokens).to(hidden.device)
    log_p = []
    hits = []
    for rows, y in zip(nodes.split(chunk), tokens.split(chunk)):
        logits = F.linear(hidden[rows], weight)                                # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p.append(logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(-1))
        hits.append(logits.argmax(-1) == y)
    return torch.cat(log_p).cpu().numpy(), torch.cat(hits).cpu().numpy()


# -- text -> requests, as in lm_eval/api/model.py and lm_eval/models/huggingface.py

class Encoder:
    """Text -> ids as lm_eval's HFLM has them: a text that spells special tokens gets their ids, and
    every text begins with what transformers puts there (Llama 3's BOS)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # Stands for a context that is empty.
        self.prefix = tokenizer.eot if tokenizer.bos is None else tokenizer.bos

    def plain(self, text):
        return self.tokenizer.encode(text, special=True).tolist()

    def __call__(self, text):
        ids = self.plain(text)
        # A text may bring its own BOS.
        return ids if ids[:1] == [self.prefix] else self.tokenizer.opening + ids

    def pair(self, context, continuation):
        """-> (context ids, continuation ids). Blanks that end the context move to the continuation.
        The ids of the continuation are those of both texts together, without as many as the context
        alone has. Where a token spans both, that may be none: then the continuation is encoded alone
        (lm_eval's pull request 4055). An empty context becomes BOS, or EOT for a tokenizer without
        BOS."""
        stem = context.rstrip()
        if stem:
            ids = self(stem)
            behind = self(context + continuation)[len(ids):]
            return ids, behind or self.plain(context[len(stem):] + continuation)
        ids = self.plain(context + continuation)
        if ids[:1] == [self.prefix]:
            return ids[:1], ids[1:]
        return [self.prefix], ids


# -- questions

@dataclass(frozen=True)
class Question:
    query: str
    choices: tuple[str, ...]        # each with its leading space
    gold: int                       # index of the right one
    where: str = field(default="", compare=False)    # file and line, for messages


def is_text_list(choices):
    return isinstance(choices, list) and all(isinstance(text, str) and text.strip() for text in choices)


def question(where, query, choices, gold):
    """-> Question. Raises UserError, with `where` (file and line) in it, if query or choices are no
    texts, if there are fewer than 2 choices, or if none of them is the right one."""
    if not isinstance(query, str) or not is_text_list(choices):
        problem = "query must be a text, and choices a list of texts that are not blank"
    elif len(choices) < 2:
        problem = f"{len(choices)} choices, and a question needs at least 2"
    elif type(gold) is not int or not 0 <= gold < len(choices):
        problem = f"gold is {gold!r}, and must be the index of one of {len(choices)} choices, 0 to {len(choices) - 1}"
    else:
        return Question(query, tuple(choices), gold, where)
    raise UserError(f"{where}: {problem}; mend or remove it, a good one is {LINE}")


def read_questions(path):
    """A file -> [Question]. The file has JSON lines such as LINE, or is the task.json of one
    BIG-bench task. "own" is no file but our own questions. Raises UserError, with file and line, for
    what is no question."""
    if path == "own":
        rows = enumerate(own_questions.rows(), 1)
        return [question(f"own:{number}", row["query"], row["choices"], row["gold"]) for number, row in rows]
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict) and "query" not in whole:
        return read_bigbench(path, whole)
    questions = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            questions.append(question(f"{path}:{number}", row["query"], row["choices"], row["gold"]))
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise UserError(f"{path}:{number} is no question ({type(problem).__name__}: "
                            f"{problem}); a line is {LINE}"
                            ) from None
    if not questions:
        raise UserError(f"{path} holds no questions; a line is {LINE}")
    return questions


def read_bigbench(path, task):
    """The content of a BIG-bench task.json -> [Question], zero-shot (bigbench/api/json_task.py).

    A question is task_prefix, "Q: ", input and "\\nA:", a choice is " X", in the order of the file;
    example_input_prefix and example_output_prefix are heeded. Unlike there, choices are not listed
    in the question (append_choices_to_input): models of our size do not choose from lists. Raises
    UserError for a task without examples, and for an example that has not one best choice."""
    examples = task.get("examples")
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path} is neither JSON lines as {LINE} nor a BIG-bench task with "
                        "examples; give the task.json of one of its subtasks")
    before = str(task.get("task_prefix", "")) + task.get("example_input_prefix", "\nQ: ")
    behind = task.get("example_output_prefix", "\nA: ")
    questions = []
    for number, example in enumerate(examples, 1):
        where = f"{path}: example {number}"
        try:
            scores = {**example["target_scores"]}
            highest = max(scores.values(), default=0)
        except (KeyError, TypeError):
            raise UserError(f"{where} has no target_scores {{choice: score}}, so it is no question "
                            "with choices; give another task or remove it") from None
        best = [i for i, value in enumerate(scores.values()) if value == highest]
        if len(best) > 1:
            raise UserError(f"{where}: {len(best)} of {len(scores)} choices have the highest "
                            f"score, {highest}, and one must; give another task or remove it")
        query = (before + str(example.get("input", "")) + behind).lstrip("\n")
        # A blank that ends the question begins its choices.
        space = query[len(query.rstrip(" ")):]
        choices = [space + choice.strip() for choice in scores]
        questions.append(question(where, query.rstrip(" "), choices, best[0] if best else None))
    return questions


METRICS = ("acc", "acc_norm", "acc_bytes")


def divisor(metric, choice):
    """What a metric divides the log-probability of a choice by (lm_eval/api/task.py)."""
    text = choice.removeprefix(" ")
    return {"acc": 1, "acc_norm": len(text), "acc_bytes": len(text.encode())}[metric]


def multiple_choice(model, tokenizer, questions, batch_tokens=None, progress=True):
    """Answer questions: [Question] -> a dictionary.

    "acc" is the share of right answers by the summed log-probability of a choice, "acc_norm" by
    that per character, "acc_bytes" per UTF-8 byte, both without the leading space of the choice.
    Each has "_stderr", the standard error of the mean (NaN for one question). "correct" says for each
    metric which questions were answered rightly, {metric: [bool]}. "loglikelihoods" are the nats, a
    list per question. "tokens" are those that a loop over all choices runs,
    "tokens_run" the nodes of our trees, "seconds" our time."""
    start = time.perf_counter()
    encoder = Encoder(tokenizer)
    block_size = model.config.block_size
    requests = []
    for q in questions:
        for choice in q.choices:
            context, continuation = encoder.pair(q.query, choice)
            if not 0 < len(continuation) <= block_size:
                raise UserError(f"{q.where}: the choice {choice[:40]!r} has {len(continuation)} tokens, and must have "
                                f"1 to {block_size}, the model's context; shorten or remove it")
            requests.append((context, continuation))
    scores = iter(loglikelihoods(model, requests, batch_tokens, progress))
    nats = []
    for q in questions:
        nats.append([next(scores)[0] for _ in q.choices])
    seconds = time.perf_counter() - start
    lengths = [len(context) + len(continuation) - 1 for context, continuation in requests]
    result = {"questions": len(questions), "loglikelihoods": nats, "seconds": seconds, "correct": {},
              "tokens": sum(min(length, block_size) for length in lengths),
              "tokens_run": sum(len(tree.ids) for tree in grow(requests, block_size))}
    for metric in METRICS:
        right = []
        for q, row in zip(questions, nats):
            divisors = [divisor(metric, choice) for choice in q.choices]
            right.append(bool(np.argmax(np.array(row) / divisors) == q.gold))
        result["correct"][metric] = right
        result[metric] = float(np.mean(right))
        result[metric + "_stderr"] = math.nan
        if len(right) > 1:
            result[metric + "_stderr"] = float(np.std(right, ddof=1)) / len(right)**0.5
    return result


# -- lm_eval itself, with our model inside

@dataclass(frozen=True)
class Options:
    """How lm_eval wants a prompt continued."""
    until: tuple[str, ...]        # texts that end it
    budget: int                   # tokens
    temperature: float = 0.0      # 0: greedy
    top_k: int = 0                # 0: all tokens


def read_options(tokenizer, options):
    """lm_eval's generation options -> Options. Raises UserError for one that we do not have."""
    from lm_eval.models.utils import normalize_gen_kwargs
    # 256 tokens are HFLM's default; without do_sample lm_eval makes the temperature 0.
    options = dict(normalize_gen_kwargs(options, 256))
    options.pop("do_sample")
    until = [*options.pop("until"), tokenizer.decode([tokenizer.eot])]
    until = tuple(stop for stop in until if stop)
    known = Options(until, options.pop("max_gen_toks"), options.pop("temperature", 0), options.pop("top_k", 0))
    if known.temperature and options:
        raise UserError(f"generation options {', '.join(options)} are not here; drop them, or do_sample")
    return known


def complete(model, tokenizer, prompts, options, generator=None):
    """Continue the ids of each prompt, all in one batch: -> [text]. A text ends before the first of
    the texts `until` and before EOT, and special tokens are left out of it. A prompt that leaves no
    room in the context is cut from the left. Raises UserError if the context has no room for the
    budget."""
    block_size = model.config.block_size
    budget = options.budget
    if not 0 < budget < block_size:
        raise UserError(f"max_gen_toks {budget} must be between 1 and {block_size - 1}, as the "
                        f"context has {block_size} tokens; lower it by gen_kwargs")
    rows = [torch.tensor(ids[-(block_size - budget):]) for ids in prompts]
    idx = pad_sequence(rows, batch_first=True, padding_side="left").to(model.embed.weight.device)
    special = {tokenizer.eot, *tokenizer.specials.values()}
    texts = [""] * len(rows)
    running = set(range(len(rows)))

    def done(continued):
        for row in sorted(running):
            ids = continued[row, idx.size(1):].tolist()
            texts[row] = tokenizer.decode(i for i in ids if i not in special)
            if ids[-1] == tokenizer.eot or any(stop in texts[row] for stop in options.until):
                running.remove(row)
        return not running

    model.generate(idx, budget, options.temperature, options.top_k, generator, done, lengths=[len(row) for row in rows])
    for stop in options.until:
        texts = [text.split(stop)[0] for text in texts]
    return texts


def complete_all(model, tokenizer, requests, batch_tokens=None, generator=None):
    """Continue prompts, those with equal options and similar lengths in one batch: [(ids, Options)]
    -> [text], in the same order. `batch_tokens` is the number of tokens of a batch, prompts and
    continuations; the default is 4,096 on a CPU and 16,384 elsewhere (our guess, not measured)."""
    if batch_tokens is None:
        batch_tokens = 4096 if model.embed.weight.is_cpu else 16384
    groups = {}
    for number, (ids, options) in enumerate(requests):
        groups.setdefault(options, []).append((number, ids))
    texts = {}
    with tqdm(total=len(requests), desc="generate_until", leave=False, disable=None) as bar:
        for options, group in groups.items():
            group.sort(key=lambda member: -len(member[1]))
            while group:
                rows = max(1, batch_tokens // (len(group[0][1]) + options.budget))
                numbers, prompts = zip(*group[:rows])
                group = group[rows:]
                texts |= zip(numbers, complete(model, tokenizer, prompts, options, generator))
                bar.update(len(numbers))
    return [texts[number] for number in range(len(requests))]


def lm_eval_adapter(model, tokenizer, batch_tokens=None, seed=1234):
    """-> an lm_eval.api.model.LM that is our model. `seed` is that of sampled generation. Raises
    UserError if lm_eval cannot be imported."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as problem:
        raise UserError("tasks are run by lm-evaluation-harness, which cannot be imported "
                        f"({problem}): pip install 'lm_eval>=0.4.10'") from problem
    encoder = Encoder(tokenizer)
    device = model.embed.weight.device

    class Adapter(LM):
        def loglikelihood(self, requests):
            return loglikelihoods(model, [encoder.pair(*request.args) for request in requests], batch_tokens)

        def loglikelihood_rolling(self, requests):
            texts = []
            for request in requests:
                ids = encoder(request.args[0])
                windows = get_rolling_token_windows(ids, encoder.prefix, model.config.block_size, 1)
                texts.append([make_disjoint_window(window) for window in windows])
            scores = iter(loglikelihoods(model, list(itertools.chain(*texts)), batch_tokens))
            nats = []
            for windows in texts:
                nats.append(sum(next(scores)[0] for _ in windows))
            return nats

        def generate_until(self, requests):
            prompts = []
            for request in requests:
                prompt, options = request.args
                prompts.append((encoder(prompt) or [encoder.prefix], read_options(tokenizer, options)))
            generator = torch.Generator(device).manual_seed(seed)
            return complete_all(model, tokenizer, prompts, batch_tokens, generator)

    return Adapter()


def run_tasks(model, tokenizer, names, include_path=None, batch_tokens=None, **options):
    """Run tasks of lm_eval, or of the YAML files under include_path: -> (lm_eval's results, its
    table as text). `options` are those of simple_evaluate: limit, num_fewshot, … Raises UserError
    if lm_eval, a task or its data is missing."""
    adapter = lm_eval_adapter(model, tokenizer, batch_tokens)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    # lm_eval needs many seconds to list its own 14,000 tasks.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm_eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists "
                        f"{len(manager.all_tasks)}, and --include-path adds a folder of your own")
    try:
        results = simple_evaluate(adapter, tasks=list(names), task_manager=manager, **options)
    except (ConnectionError, FileNotFoundError) as problem:
        raise UserError(f"the data of {', '.join(names)} cannot be had "
                        f"({' '.join(str(problem).split())[:150]}); run it once with a network, "
                        "which caches it, or give a task with local data by --include-path"
                        ) from problem
    tables = [make_table(results, kind) for kind in ("results", "groups") if results.get(kind)]
    return results, "\n".join(tables)


# -- the command: eval.py hands over its flags

def check(config):
    """Raise UserError if --limit, --num-fewshot or --batch-tokens is too small."""
    for name, least in {"limit": 1, "num_fewshot": 0, "batch_tokens": 1}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def print_tasks(config, model, tokenizer):
    """Run and print the tasks of lm_eval that --tasks asks for."""
    _, table = run_tasks(model, tokenizer, config.tasks.split(","), config.include_path,
                         config.batch_tokens, limit=config.limit, num_fewshot=config.num_fewshot)
    print(table)


def print_choices(config, model, tokenizer):
    """Answer the files of --multiple-choice and print a line for each: -> {"FILE METRIC": [bool]},
    which questions were answered rightly."""
    correct = {}
    # All files are read before the first is answered, so that a bad one is refused at once.
    files = [(file, read_questions(file)[:config.limit]) for file in config.multiple_choice]
    print(f"{'file':40} questions  acc              acc_norm         acc_bytes        tokens/s")
    for file, questions in files:
        result = multiple_choice(model, tokenizer, questions, config.batch_tokens)
        metrics = "  ".join(f"{result[m]:.4f} ± {result[m + '_stderr']:.4f}" for m in METRICS)
        rate = result["tokens"] / result["seconds"]
        print(f"{file:40} {result['questions']:9,}  {metrics}  {rate:8,.0f}")
        for metric in ("acc", "acc_norm"):
            correct[f"{file} {metric}"] = result["correct"][metric]
    return correct

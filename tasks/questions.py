"""Questions with choices: log-likelihood of continuations, scored as lm-evaluation-harness does, each prefix run once.

    python eval.py MODEL --multiple-choice FILE     # JSON lines, or the task.json of a BIG-bench task
    python eval.py MODEL --tasks piqa,arc_easy      # any task of lm_eval, run by lm_eval through our model

A choice's score is the summed log-probability of its tokens behind the question. lm_eval runs the question again for
every choice; here token sequences that begin alike share a *tree*, where each node is run once: a mask shows it its
ancestors only, and its position is its depth. So the choices share their question, and questions their few shots.
Tokens, truncation and metrics are those of lm_eval 0.4.13 with transformers (tests/tasks/test_questions.py compares), except that
log-softmax is float32 for bfloat16 weights, too.

Not here: prompts other than the file's, chat templates, tokenizers that put EOS behind a text, generation in batches.
"""
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError
from distill import chunk_tokens

ROW = 256                 # tokens up to which sequences that share little share a row, too: fewer and fuller rows
LINE = '{"query": "Q: 1 + 1 is\\nA:", "choices": [" 2", " 3"], "gold": 0}'


@dataclass
class Tree:
    """Sequences that begin alike, N different prefixes of theirs, depth first: node j is seen by j … ends[j] - 1."""
    ids: list = field(default_factory=list)              # (N,) token of each node
    positions: list = field(default_factory=list)        # (N,) its depth
    ends: list = field(default_factory=list)             # (N,) behind its last descendant
    answers: list = field(default_factory=list)          # (request's number, n nodes, the n tokens predicted there)


def grow(requests, block_size):
    """[(context ids, continuation ids)] -> [Tree]. The last block_size + 1 tokens of both together count, and of these
    all but the last are run. Sorted (as bytes, 4 a token), a sequence shares most with the one before it. UserError: no
    tokens on one side, or a continuation longer than block_size."""
    sequences = []
    for number, (context, continuation) in enumerate(requests):
        n = len(continuation)
        if not len(context) or not n or n > block_size:
            raise UserError(f"request {number} has {len(context)} tokens of context and {n} of continuation; it needs "
                            f"at least 1 of context and 1 to {block_size} of continuation, so shorten or remove it")
        whole = np.concatenate((context, continuation))[-block_size - 1:].astype(np.uint32)
        sequences.append((whole[:-1].tobytes(), number, whole, n))
    trees, tree, path, before = [], None, [], np.empty(0, np.uint32)
    for _, number, whole, n in sorted(sequences, key=lambda s: s[:2]):
        inputs, most = whole[:-1], min(len(whole) - 1, len(before))
        differ = np.flatnonzero(inputs[:most] != before[:most])
        shared = int(differ[0]) if len(differ) else most
        room = ROW if 2 * shared < len(inputs) else max(ROW, 2 * len(inputs))      # attention grows with the square
        if tree is None or len(tree.ids) + len(inputs) - shared > room:
            tree, path, shared = Tree(), [], 0
            trees.append(tree)
        start, new = len(tree.ids), len(inputs) - shared
        path = [*path[:shared], *range(start, start + new)]
        tree.ids += inputs[shared:].tolist()
        tree.positions += range(shared, len(inputs))
        tree.ends += [0] * new
        for node in path:
            tree.ends[node] = start + new
        tree.answers.append((number, path[-n:], whole[-n:].tolist()))
        before = inputs
    return trees


def batch_of(trees, device):
    """Trees, the longest first -> idx (B, T), what model.hidden needs to see them as trees, and per predicted token its
    request, row of hidden (B·T, C), and id."""
    T = len(trees[0].ids)
    idx = np.zeros((len(trees), T), np.int64)                             # padding stands last: nobody sees it
    positions, ends = idx + np.arange(T), np.full_like(idx, T)
    for b, tree in enumerate(trees):
        N = len(tree.ids)
        idx[b, :N], positions[b, :N], ends[b, :N] = tree.ids, tree.positions, tree.ends
    answers = [(number, b * T + node, token) for b, tree in enumerate(trees)
               for number, nodes, tokens in tree.answers for node, token in zip(nodes, tokens)]
    where = {}                                                            # all of them single paths: plainly causal
    if (positions != np.arange(T)).any():
        t, ends = torch.arange(T, device=device), torch.from_numpy(ends).to(device)
        where = {"positions": torch.from_numpy(positions).to(device),
                 "mask": ((t <= t[:, None]) & (t[:, None] < ends[:, None]))[:, None]}     # (B, 1, T, T)
    return torch.from_numpy(idx).to(device), where, np.array(answers).T


@torch.no_grad()
def loglikelihoods(model, requests, batch_tokens=None, progress=True):
    """[(context ids, continuation ids)] -> [(summed log-probability of the continuation in nats, whether each of its
    tokens is the most likely one)], in the same order. Logits exist for predicted tokens only, in chunks. batch_tokens:
    per forward pass; default 512 on a CPU (caches), else 16,384 (our guess, not measured). UserError: see `grow`."""
    device, weight = model.embed.weight.device, model.head_weight
    batch_tokens = batch_tokens or (512 if device.type == "cpu" else 16384)
    chunk, count = chunk_tokens(weight), len(requests)
    trees, sums, misses = grow(requests, model.config.block_size), np.zeros(count), np.zeros(count)
    trees.sort(key=lambda tree: -len(tree.ids))
    with tqdm(total=count, desc="loglikelihoods", leave=False, disable=None if progress else True) as bar:
        while trees:
            rows = max(1, batch_tokens // len(trees[0].ids))
            now, trees = trees[:rows], trees[rows:]
            idx, where, (owner, node, token) = batch_of(now, device)
            hidden = model.hidden(idx, **where).flatten(0, 1)                          # (B·T, C)
            for a in range(0, len(owner), chunk):
                part = slice(a, a + chunk)
                y = torch.from_numpy(token[part]).to(device)
                logits = F.linear(hidden[torch.from_numpy(node[part]).to(device)], weight)         # (chunk, V)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                log_p = logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(-1)
                sums += np.bincount(owner[part], log_p.cpu().numpy(), count)
                misses += np.bincount(owner[part], (logits.argmax(-1) != y).cpu().numpy(), count)
            bar.update(sum(len(tree.answers) for tree in now))
    return [(nats, miss == 0) for nats, miss in zip(sums.tolist(), misses.tolist())]


# -- text -> requests, as lm_eval/api/model.py and lm_eval/models/huggingface.py have it
class Encoder:
    """Text -> ids as lm_eval's HFLM: spelled special tokens are their ids, and before a text goes what the tokenizer's
    post_processor puts there, Llama-3's BOS; "add_bos_token" beside a tokenizer.json is void, as in transformers 5."""
    def __init__(self, tokenizer):
        self.tokenizer, self.opening = tokenizer, []
        self.prefix = tokenizer.eot if tokenizer.bos is None else tokenizer.bos          # stands in for no context
        post = json.loads(tokenizer.files.get("tokenizer.json", "{}")).get("post_processor") or {}
        for step in post.get("processors", [post]):
            for piece in step["single"] if step.get("type") == "TemplateProcessing" else []:
                if "SpecialToken" not in piece:
                    break
                self.opening += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]

    def plain(self, text):
        return self.tokenizer.encode(text, special=True).tolist()

    def __call__(self, text):
        ids = self.plain(text)
        return ids if ids[:1] == [self.prefix] else self.opening + ids       # a text may bring its own BOS

    def pair(self, context, continuation):
        """-> (context ids, continuation ids): blanks that end the context move to the continuation, whose ids are those
        of both texts together but for as many as the context alone has. No context: BOS, or EOT where there is none."""
        stem = context.rstrip()
        if not stem:
            ids = self.plain(context + continuation)
            return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])
        ids = self(stem)
        return ids, self(context + continuation)[len(ids):]


# -- questions
@dataclass(frozen=True)
class Question:
    query: str
    choices: tuple[str, ...]        # each with its leading space
    gold: int                       # index of the right one


def question(where, query, choices, gold):
    """-> Question. UserError, with `where` (file and line) in it: not texts, fewer than 2 choices, none right."""
    if not isinstance(query, str) or not isinstance(choices, list) or \
            not all(isinstance(choice, str) and choice.strip() for choice in choices):
        problem = "query must be a text, and choices a list of texts that are not blank"
    elif len(choices) < 2:
        problem = f"{len(choices)} choices, and a question needs at least 2"
    elif type(gold) is not int or not 0 <= gold < len(choices):
        problem = f"gold is {gold!r}, and must be the index of one of {len(choices)} choices, 0 to {len(choices) - 1}"
    else:
        return Question(query, tuple(choices), gold)
    raise UserError(f"{where}: {problem}; mend or remove it, a good one is {LINE}")


def read_questions(path):
    """A file -> [Question]: JSON lines as LINE, or one BIG-bench task.json. UserError names file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "query" not in whole:
        return read_bigbench(path, whole)
    questions = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                questions.append(question(f"{path}:{number}", row["query"], row["choices"], row["gold"]))
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{path}:{number} is no question ({type(problem).__name__}: {problem}); a line is {LINE}"
                            ) from None
    if not questions:
        raise UserError(f"{path} holds no questions; a line is {LINE}")
    return questions


def read_bigbench(path, task):
    """BIG-bench's task.json -> [Question], zero-shot: task_prefix, "Q: ", input, "\\nA:" and choices " X" in the file's
    order; example_input_prefix and example_output_prefix are heeded (bigbench/api/json_task.py). Unlike there, choices
    are not listed in the question (append_choices_to_input): models of our size do not choose from lists."""
    examples, questions = task.get("examples"), []
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path} is neither JSON lines as {LINE} nor a BIG-bench task with examples; give the "
                        "task.json of one of its subtasks")
    before = str(task.get("task_prefix", "")) + task.get("example_input_prefix", "\nQ: ")
    for number, example in enumerate(examples, 1):
        where = f"{path}: example {number}"
        try:
            scores = {**example["target_scores"]}
            best = [i for i, value in enumerate(scores.values()) if value == max(scores.values())]
        except (KeyError, TypeError):
            raise UserError(f"{where} has no target_scores {{choice: score}}, so it is no question with choices; give "
                            "another task or remove it") from None
        if len(best) > 1:
            raise UserError(f"{where}: {len(best)} of {len(scores)} choices have the highest score, "
                            f"{max(scores.values())}, and one must; give another task or remove it")
        query = (before + str(example.get("input", "")) + task.get("example_output_prefix", "\nA: ")).lstrip("\n")
        space = query[len(query.rstrip(" ")):]           # where a question ends in a blank, its choices begin with it
        questions.append(question(where, query.rstrip(" "), [space + c.strip() for c in scores], best[0]))
    return questions


def multiple_choice(model, tokenizer, questions, batch_tokens=None, progress=True):
    """[Question] -> dict: "acc" by summed log-probability, "acc_norm" by it per character and "acc_bytes" per UTF-8
    byte of a choice without its leading space (lm_eval/api/task.py); each with "_stderr", the mean's standard error
    (NaN for one question). "tokens": what a loop over all choices runs; "tokens_run": nodes of our trees; "seconds";
    "loglikelihoods": nats, a list per question."""
    start, encoder, T = time.perf_counter(), Encoder(tokenizer), model.config.block_size
    requests = [encoder.pair(q.query, choice) for q in questions for choice in q.choices]
    scores = iter(loglikelihoods(model, requests, batch_tokens, progress))
    nats = [[next(scores)[0] for _ in q.choices] for q in questions]
    result = {"questions": len(questions), "loglikelihoods": nats, "seconds": time.perf_counter() - start,
              "tokens": sum(min(len(context) + len(continuation) - 1, T) for context, continuation in requests),
              "tokens_run": sum(len(tree.ids) for tree in grow(requests, T))}
    for name, length in {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}.items():
        right = [np.argmax([x / length(c.removeprefix(" ")) for x, c in zip(row, q.choices)]) == q.gold
                 for row, q in zip(nats, questions)]
        result[name] = float(np.mean(right))
        result[name + "_stderr"] = math.nan if len(right) < 2 else float(np.std(right, ddof=1)) / len(right)**0.5
    return result


# -- lm_eval itself, with our model inside
def complete(model, tokenizer, ids, until, most, temperature=0.0, top_k=0, generator=None):
    """Continue the prompt's ids by up to `most` tokens, to the first of the texts `until` or EOT, which are left out,
    as are special tokens -> text. A prompt that leaves no room in the context is cut from the left."""
    if not 0 < most < model.config.block_size:
        raise UserError(f"max_gen_toks {most} must be between 1 and {model.config.block_size - 1}, as the context has "
                        f"{model.config.block_size} tokens; lower it by gen_kwargs")
    ids = ids[-(model.config.block_size - most):]
    skip = {tokenizer.eot, *tokenizer.specials.values()}
    text = lambda idx: tokenizer.decode(i for i in idx[0, len(ids):].tolist() if i not in skip)
    done = lambda idx: idx[0, -1] == tokenizer.eot or any(stop in text(idx) for stop in until)
    idx = torch.tensor([ids], device=model.embed.weight.device)
    found = text(model.generate(idx, most, temperature, top_k, generator, done))
    for stop in until:
        found = found.split(stop)[0]
    return found


def lm_eval_adapter(model, tokenizer, batch_tokens=None, seed=1234):
    """-> an lm_eval.api.model.LM that is our model. `seed`: of sampled generation. UserError: lm_eval is missing."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as problem:
        raise UserError(f"tasks are run by lm-evaluation-harness, which cannot be imported ({problem}): pip install "
                        "'lm_eval>=0.4.10'") from problem
    encoder, device = Encoder(tokenizer), model.embed.weight.device

    class Adapter(LM):
        def loglikelihood(self, requests):
            return loglikelihoods(model, [encoder.pair(*request.args) for request in requests], batch_tokens)

        def loglikelihood_rolling(self, requests):
            windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(
                encoder(request.args[0]), encoder.prefix, model.config.block_size, 1)] for request in requests]
            scores = iter(loglikelihoods(model, [window for row in windows for window in row], batch_tokens))
            return [sum(next(scores)[0] for _ in row) for row in windows]

        def generate_until(self, requests):
            generator = torch.Generator(device).manual_seed(seed)
            return [self.generated(*request.args, generator) for request in tqdm(requests, leave=False, disable=None)]

        def generated(self, prompt, options, generator):
            options = dict(normalize_gen_kwargs(options, 256))   # 256: HFLM's default; without do_sample temperature 0
            until, most, temperature = options.pop("until"), options.pop("max_gen_toks"), options.pop("temperature", 0)
            top_k = options.pop("top_k", 0)
            options.pop("do_sample")
            if temperature and options:
                raise UserError(f"generation options {', '.join(options)} are not here; drop them, or do_sample")
            until = [stop for stop in [*until, tokenizer.decode([tokenizer.eot])] if stop]
            return complete(model, tokenizer, encoder(prompt) or [encoder.prefix], until, most, temperature, top_k,
                            generator)

    return Adapter()


def run_tasks(model, tokenizer, names, include_path=None, batch_tokens=None, **options):
    """Run lm_eval's tasks, or those of the YAML files under include_path -> (lm_eval's results, its table as text).
    `options` are simple_evaluate's: limit, num_fewshot, … UserError: no lm_eval, no such task, no data."""
    adapter = lm_eval_adapter(model, tokenizer, batch_tokens)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
    manager = TaskManager(include_path=include_path, include_defaults=False)     # its own 14,000 take it many seconds
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"lm_eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists {len(manager.all_tasks)}, and "
                        "--include-path adds a folder of your own")
    try:
        results = simple_evaluate(adapter, tasks=list(names), task_manager=manager, **options)
    except (ConnectionError, FileNotFoundError) as problem:
        raise UserError(f"the data of {', '.join(names)} cannot be had ({' '.join(str(problem).split())[:150]}); run "
                        "it once with a network, which caches it, or give a task with local data by --include-path"
                        ) from problem
    return results, "\n".join(make_table(results, kind) for kind in ("results", "groups") if results.get(kind))


# -- the command: eval.py hands over its flags
def check(config):
    """Raise UserError if --limit, --num-fewshot or --batch-tokens is too small."""
    for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_tokens", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def main(config, model, tokenizer):
    """Print what --multiple-choice and --tasks ask for."""
    if config.multiple_choice:
        print_choices(config, model, tokenizer)
    if config.tasks:
        _, table = run_tasks(model, tokenizer, config.tasks.split(","), config.include_path, config.batch_tokens,
                             limit=config.limit, num_fewshot=config.num_fewshot)
        print(table)


def print_choices(config, model, tokenizer):
    # All files are read before the first is answered, so that a bad one is refused at once.
    files = [(file, read_questions(file)[:config.limit]) for file in config.multiple_choice]
    print(f"{'file':40} questions  acc              acc_norm         acc_bytes        tokens/s")
    for file, questions in files:
        result = multiple_choice(model, tokenizer, questions, config.batch_tokens)
        metrics = "  ".join(f"{result[m]:.4f} ± {result[m + '_stderr']:.4f}" for m in ("acc", "acc_norm", "acc_bytes"))
        rate = result["tokens"] / result["seconds"]
        print(f"{file:40} {result['questions']:9,}  {metrics}  {rate:8,.0f}")

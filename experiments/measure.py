"""What a real model can do, measured the same way before and after it is cut: losses on several
texts, questions with choices, a generative probe, and samples.

    python -m experiments.recover smollm2 --out runs/recovered      # measures dense, cut and recovered

The hold-out of each text that a recipe calibrates or trains on has two halves that share no
document: `validation` is for choices between recipes, `test` for what is reported. Texts given as
`unseen` are test texts as a whole: nothing is calibrated or trained on them.

A measurement is a plain dictionary, one record of a file. It keeps the answer to every question and
probe item as a string of 0 and 1, so that any two models can be compared item by item later.
"""
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
from common import UserError
from eval import evaluate, sample
from report import markdown
from tasks import questions, statistics
from tasks.probe import probe

WINDOW = 2048                        # tokens of context at which perplexities are reported
SAMPLE_TOKENS = 48
PROMPTS = ("The old man walked down to the harbour and",
           "def mean(values):\n",
           "Question: Why do leaves fall in autumn?\nAnswer:")


@dataclass(frozen=True)
class Texts:
    """Token ids of each text, {name: (N,)}."""
    validation: dict
    test: dict
    unseen: tuple[str, ...] = ()     # names of `test` of which nothing was calibrated or trained on


@dataclass(frozen=True)
class Protocol:
    """How every model of a comparison is measured."""
    windows: int = 8                 # of WINDOW tokens, of each text
    questions: tuple[str, ...] = ("own",)    # files of questions (tasks/questions.py)
    limit: int = 500                 # questions of each file
    probe_items: int = 100           # of each kind
    seed: int = 0                    # of probe items and samples
    questions_of: dict = field(default_factory=dict, compare=False)    # {file: [Question]}, read once

    def read(self):
        """The same protocol with its questions in memory. Raises UserError for a file that holds
        none, and for two of one name."""
        refuse_one_name(self.questions)
        for file in self.questions:
            self.questions_of[short_name(file)] = questions.read_questions(file)[:self.limit]
        return self


def halves(tokens, eot):
    """A row of documents (N,) in two parts of about equal length, cut behind an end-of-text token.
    A single document is cut in its middle."""
    tokens = np.asarray(tokens[0:len(tokens)])
    middle = len(tokens) // 2
    ends = np.flatnonzero(tokens[:-1] == eot) + 1
    if len(ends):
        middle = int(ends[np.abs(ends - middle).argmin()])
    return tokens[:middle], tokens[middle:]


def open_texts(corpus, unseen, tokenizer):
    """The texts of a corpus (data.load_mixture) and of the sources `unseen`: -> Texts. Raises
    UserError if two have one name, or if a part is too short to predict a token of it."""
    refuse_one_name((*corpus.domains, *unseen))
    validation = {}
    test = {}
    for name, held_out in corpus.domains.items():
        validation[short_name(name)], test[short_name(name)] = halves(held_out, tokenizer.eot)
    for name in unseen:
        whole = data.load(name, tokenizer)
        # Nothing of this text was seen, so the larger side serves as well as the hold-out.
        test[short_name(name)] = np.concatenate((whole.val[0:len(whole.val)], whole.train[0:len(whole.train)]))
    for part, texts in (("validation half", validation), ("test text", test)):
        for name, tokens in texts.items():
            if len(tokens) < 2:
                raise UserError(f"the {part} of {name!r} has {len(tokens)} tokens; give a longer text")
    return Texts(validation, test, tuple(map(short_name, unseen)))


def refuse_one_name(sources):
    """Raise UserError if two sources are called alike in tables: one would hide the other."""
    names = [short_name(source) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of {', '.join(map(str, sources))} are called {name!r} in tables; rename one file, or "
                            "leave one out")


def short_name(source):
    """How a text is called in tables: the file's name without its ending."""
    return Path(source).stem


def bits(flags):
    return "".join("1" if flag else "0" for flag in flags)


def flags(text):
    return [bit == "1" for bit in text]


def losses(model, tokenizer, texts, windows, block_size=WINDOW):
    """{text: nats per token} in windows of `block_size` tokens, or of the model's context or the
    text if that is shorter."""
    result = {}
    for name, tokens in texts.items():
        T = min(block_size, model.config.block_size, len(tokens) - 1)
        # The batch holds the same number of tokens, however long a window is.
        result[name] = evaluate(model, tokens, tokenizer.byte_lengths(), windows * block_size // T,
                                batch=max(1, 4096 // T), block_size=T)["loss"]
    return result


def measure(model, tokenizer, texts, protocol, only_losses=False):
    """Measure a model: -> a record of plain values. `model` runs in the dtype of its weights."""
    start = time.perf_counter()
    record = {"params": model.config.num_params()["total"],
              "losses": losses(model, tokenizer, texts.test, protocol.windows)}
    if not only_losses:
        record["questions"] = {}
        for file, rows in protocol.questions_of.items():
            answers = questions.multiple_choice(model, tokenizer, rows, progress=False)
            record["questions"][file] = {metric: bits(answers["correct"][metric]) for metric in ("acc", "acc_norm")}
        answers = probe(model, tokenizer, protocol.probe_items, protocol.seed, skips_long=True)
        record["probe"] = {kind: bits(result["correct"]) for kind, result in answers.items()}
        ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
        record["samples"] = sample(model, tokenizer, ids, SAMPLE_TOKENS, temperature=0)
    record["seconds"] = time.perf_counter() - start
    return record


# -- comparing measurements

def correct_answers(record, part, metric="acc_norm"):
    """All answers of a part, "questions" or "probe", in one row: [bool]."""
    answers = []
    for result in record[part].values():
        answers += flags(result[metric] if part == "questions" else result)
    return answers


def mean_loss(record):
    """The mean over texts, in nats per token."""
    return float(np.mean(list(record["losses"].values())))


def share(record, part, metric="acc_norm"):
    """The share of right answers in all files of questions, or in all kinds of the probe."""
    return float(np.mean(correct_answers(record, part, metric)))


def against(record, dense):
    """The share of the dense model's question score that is left, with its 95 % interval, over all
    questions paired."""
    return statistics.paired(correct_answers(record, "questions"), correct_answers(dense, "questions")).ratio


def table(records):
    """A Markdown table of full measurements {label: record}; the first is the dense model's."""
    dense = next(iter(records.values()))
    head = ["", "parameters", *[f"{name} ppl" for name in dense["losses"]],
            "questions (acc_norm)", "of dense [95 %]", *dense["probe"]]
    rows = []
    for label, record in records.items():
        perplexities = [f"{math.exp(loss):.2f}" for loss in record["losses"].values()]
        shares = [f"{np.mean(flags(result)):.2f}" for result in record["probe"].values()]
        ratio = against(record, dense)
        rows.append([label, f"{record['params']:,}", *perplexities, f"{share(record, 'questions'):.3f}",
                     f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", *shares])
    return markdown(head, rows)


def sample_table(records):
    """What the models {label: record} write behind PROMPTS, greedily, as Markdown."""
    lines = []
    for number, prompt in enumerate(PROMPTS):
        lines.append(f"**{' '.join(prompt.split())}**\n")
        for label, record in records.items():
            if "samples" in record:
                words = " ".join(record["samples"][number].split()).replace("`", "'")
                lines.append(f"- {label}: `{words}`")
        lines.append("")
    return "\n".join(lines)

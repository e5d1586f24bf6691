"""A generative probe: short tasks with one right answer, which the model must write itself.

    python eval.py MODEL --probe                    # sums, copying, brackets and phrases: no file, no network
    python eval.py MODEL --probe --data text.txt    # also the last words of lines of this text, the first of --data

Questions with choices hide what a cut destroys: a model that lost its arithmetic still prefers the
likelier of four endings. Here it answers by greedy decoding behind a few solved examples, which base
and instruct models continue alike. An answer is right if it is the expected text exactly.

    sums       "Question: What is 12 + 37? Answer: 49": two numbers from 10 to 49
    copying    "river apple stone -> river apple stone": a row of three to seven words, written again
    brackets   "( [ { = } ] )": closing two to four brackets in the right order
    phrases    "The capital of France is Paris": our own list of proverbs, sayings and facts
    lines      the last word of a line of a text that is given, behind what stands before it

The difficulties were chosen on SmolLM2-135M-Instruct, so that it is neither perfect nor helpless.
Items are drawn from a seed: they are the same for every model, so that two models can be compared
item by item (tasks/statistics.py).
"""
import itertools
import random
import re
from collections import Counter
from typing import NamedTuple

from common import UserError
from tasks.questions import Encoder, Options, complete_all
from tasks.statistics import wilson

SHOTS = 4                            # solved examples in front of an item
CONTEXT = 400                        # characters of a text in front of the hidden word of a line
BLANK = re.compile(r"\s")
LEAST_WORDS = 3                      # words in front of the hidden one in its line

BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
WORDS = """apple river stone garden yellow winter music paper silver window bridge candle forest market
    button mirror pencil rabbit school ticket village weather basket castle dinner engine finger
    guitar hammer island jacket kitten ladder monkey needle orange pocket ribbon shadow table
    uncle valley wagon blanket circle dragon""".split()

# The last word of each is the answer.
PHRASES = """
Actions speak louder than words
A picture is worth a thousand words
Better late than never
The early bird catches the worm
Practice makes perfect
When in Rome, do as the Romans do
Two wrongs don't make a right
The pen is mightier than the sword
Honesty is the best policy
Beauty is in the eye of the beholder
Curiosity killed the cat
Don't judge a book by its cover
Every cloud has a silver lining
Rome was not built in a day
Where there is smoke, there is fire
You can't teach an old dog new tricks
An apple a day keeps the doctor away
All that glitters is not gold
Don't count your chickens before they hatch
A penny saved is a penny earned
Birds of a feather flock together
The grass is always greener on the other side
Time flies when you are having fun
Once upon a time
They lived happily ever after
To be, or not to be, that is the question
I came, I saw, I conquered
I think, therefore I am
Ladies and gentlemen
Last but not least
Twinkle, twinkle, little star
Mary had a little lamb
Happy birthday to you
The United States of America
Life, liberty and the pursuit of happiness
The capital of France is Paris
The capital of England is London
The capital of Germany is Berlin
The capital of Italy is Rome
The capital of Spain is Madrid
The capital of Japan is Tokyo
The capital of Russia is Moscow
The capital of Egypt is Cairo
The capital of Greece is Athens
The capital of Austria is Vienna
The capital of Portugal is Lisbon
The capital of Ireland is Dublin
The capital of Cuba is Havana
The capital of Norway is Oslo
The capital of Poland is Warsaw
The sun rises in the east
The sun sets in the west
The opposite of black is white
The opposite of hot is cold
The opposite of up is down
The opposite of left is right
The color of the sky is blue
The color of grass is green
The color of snow is white
The color of blood is red
The color of a lemon is yellow
Water freezes and becomes ice
Cows give us milk
Bees make honey
Hens lay eggs
Spiders spin webs
A baby dog is called a puppy
A baby cat is called a kitten
A baby cow is called a calf
A baby sheep is called a lamb
The king and the queen
Knife and fork
Salt and pepper
Bread and butter
Black and white
Ladies first and gentlemen last
Romeo and Juliet
Adam and Eve
The planet closest to the Sun is Mercury
The largest planet in the solar system is Jupiter
The planet known as the Red Planet is Mars
The largest ocean on Earth is the Pacific
The longest river in Africa is the Nile
The largest animal in the world is the blue whale
The tallest animal in the world is the giraffe
The first president of the United States was George Washington
The author of Romeo and Juliet was William Shakespeare
The theory of relativity was developed by Albert Einstein
The telephone was invented by Alexander Graham Bell
The painter of the Mona Lisa was Leonardo da Vinci
The theory of evolution was proposed by Charles Darwin
The law of gravity was discovered by Isaac Newton
The chemical formula of water is H2O
Plants take in carbon dioxide and release oxygen
The heart pumps blood
We see with our eyes
We hear with our ears
We smell with our nose
The day after Monday is Tuesday
The day after Friday is Saturday
The month after January is February
The month after April is May
The season after spring is summer
A triangle has three sides
A week has seven days
A year has twelve months
One, two, three, four, five
Monday, Tuesday, Wednesday, Thursday
""".strip().split("\n")


class Item(NamedTuple):
    prompt: str
    answer: str
    # Whether only the first word of what the model writes counts, else its whole line.
    is_word: bool = False


# -- items

def solved(make, random_source):
    """SHOTS solved examples of a task and an unsolved one, a line each. `make(random_source)` returns
    (line without its answer, answer)."""
    lines = []
    for _ in range(SHOTS):
        question, answer = make(random_source)
        lines.append(f"{question} {answer}\n")
    question, answer = make(random_source)
    return Item("".join(lines) + question, answer)


def make_sum(random_source):
    first = random_source.randint(10, 49)
    second = random_source.randint(10, 49)
    # SmolLM2 solves twice as many of these as of "12 + 37 =".
    return f"Question: What is {first} + {second}? Answer:", str(first + second)


def make_copy(random_source):
    row = " ".join(random_source.sample(WORDS, random_source.randint(3, 7)))
    return f"{row} ->", row


def make_brackets(random_source):
    opening = random_source.choices(list(BRACKETS), k=random_source.randint(2, 4))
    closing = [BRACKETS[bracket] for bracket in reversed(opening)]
    return " ".join(opening) + " =", " ".join(closing)


TASKS = {"sums": make_sum, "copying": make_copy, "brackets": make_brackets}


def phrase_items(count, random_source):
    """At most `count` phrases, the last word of each hidden, behind others that are whole."""
    chosen = random_source.sample(PHRASES, min(count, len(PHRASES)))
    items = []
    for phrase in chosen:
        others = [other for other in PHRASES if other != phrase]
        shown = random_source.sample(others, SHOTS)
        start, answer = phrase.rsplit(" ", 1)
        items.append(Item("".join(line + "\n" for line in shown) + start, answer, is_word=True))
    return items


def line_items(text, count, random_source):
    """At most `count` lines of a text, the last word of each hidden, behind CONTEXT characters of the
    text. Only letters, digits and underscores count as a word: punctuation that ends a line is left
    off."""
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    items = []
    for number in random_source.sample(range(len(lines)), len(lines)):
        if len(items) == count:
            break
        last = re.fullmatch(r"(.*\S)\s+(\w+)\W*", lines[number])
        if not last or len(last[1].split()) < LEAST_WORDS:
            continue
        end = starts[number] + len(last[1])
        start = max(0, end - CONTEXT)
        # The context begins with a whole word, unless that is longer.
        blank = BLANK.search(text, start, end)
        if start and blank:
            start = blank.end()
        items.append(Item(text[start:end], last[2], is_word=True))
    return items


def make_items(count=100, seed=0, text=None):
    """The items of the probe: {kind: [Item]}, a pure function of its arguments. "lines" exists only
    where a text is given."""
    items = {}
    for kind, make in TASKS.items():
        random_source = random.Random(f"{kind} {seed}")
        items[kind] = [solved(make, random_source) for _ in range(count)]
    items["phrases"] = phrase_items(count, random.Random(f"phrases {seed}"))
    if text is not None:
        items["lines"] = line_items(text, count, random.Random(f"lines {seed}"))
        if not items["lines"]:
            raise UserError(f"the text has no line of {LEAST_WORDS + 1} words whose last word could be asked for; "
                            "give a longer text, or --probe without --data")
    return items


# -- answers

def is_right(item, continuation):
    """Whether what the model wrote behind the prompt is the answer."""
    line = continuation.split("\n")[0].strip()
    if not item.is_word:
        return line == item.answer
    word = re.match(r"\w+", line)
    return word is not None and word[0] == item.answer


def commonest_share(items):
    """The share of items that a model gets right which always gives the answer that is right most
    often."""
    (_, count), = Counter(item.answer for item in items).most_common(1)
    return count / len(items)


def requests_of(encoder, items):
    """Requests for the answers to items of one kind, and the context that the longest of them needs."""
    # A token more than the longest answer has, so that a longer one is seen to be wrong.
    budget = 1 + max(len(encoder.plain(f" {item.answer}\n")) for item in items)
    options = Options(until=("\n",), budget=budget)
    prompts = [encoder(item.prompt) for item in items]
    return [(prompt, options) for prompt in prompts], max(map(len, prompts)) + budget


def probe(model, tokenizer, count=100, seed=0, text=None, batch_tokens=None, skips_long=False):
    """Let the model answer about `count` items of each kind, greedily and in batches.

    -> {kind: {"accuracy", "correct" ([bool], an entry for each item), "items" (how many), "commonest"
    (the accuracy of always giving the commonest answer), "answers" (what the model wrote)}}. `text`
    adds the kind "lines". A kind whose items the model's context does not hold is left out if
    `skips_long`; else it raises UserError."""
    encoder = Encoder(tokenizer)
    requests = []
    items = make_items(count, seed, text)
    for kind, of_kind in list(items.items()):
        requests_of_kind, context = requests_of(encoder, of_kind)
        if kind != "lines" and context > model.config.block_size:
            if not skips_long:
                raise UserError(f"--probe needs a context of {context} tokens for its {kind}, the model has "
                                f"{model.config.block_size}; measure it by --data or --multiple-choice")
            del items[kind]
            continue
        requests += requests_of_kind
    continuations = iter(complete_all(model, tokenizer, requests, batch_tokens))
    result = {}
    for kind, of_kind in items.items():
        answers = [next(continuations) for _ in of_kind]
        correct = [is_right(item, answer) for item, answer in zip(of_kind, answers)]
        result[kind] = {"accuracy": sum(correct) / len(correct), "correct": correct, "items": len(correct),
                        "commonest": commonest_share(of_kind), "answers": answers}
    return result


def print_probe(config, model, tokenizer, text=None):
    """Print a line for each kind of --probe: -> {"probe KIND": [bool]}, which items were answered
    rightly."""
    result = probe(model, tokenizer, text=text, batch_tokens=config.batch_tokens)
    correct = {}
    print(f"{'probe':40}     items  accuracy, 95 %        always the commonest answer")
    for kind, answered in result.items():
        print(f"{kind:40} {answered['items']:9,}  {wilson(answered['correct'])}  {answered['commonest']:.3f}")
        correct[f"probe {kind}"] = answered["correct"]
    return correct

"""Chats and prompts -> token ids, and which of them the model is to learn to say.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2=", "completion": "4"}          # texts, or lists of messages

A row of messages is rendered by the chat template of the tokenizer's folder, as transformers does it.
The model learns what stands between {% generation %} and {% endgeneration %}. If the template has no
such marks, it learns what each message of the assistant adds to the text, with the token that ends the
turn. Of a prompt and its completion it learns the completion. A token that is partly of what is learned
is learned. As in transformers, a message that spells a special token becomes this token.

A template comes with a model that somebody sent. It runs in jinja2's sandbox: it reaches no files, no
network and no attribute that begins with "_", its ranges end at 100,000, a text that it multiplies and
what it writes at LARGEST characters. A jinja2 with known ways out of its sandbox is refused. A template
can still waste time: nested loops that write nothing do not end, and texts that it joins or pads fill
the memory. Then stop the program and look into the template.
The time of day, which a template may ask for, is always TODAY, so that rows do not change.
"""
import datetime
import functools
import importlib.metadata
import json
import re
import secrets

import numpy as np

from common import UserError, first_line

LARGEST = 2**24                      # characters of a rendered chat (our choice)
# Through the filter "attr" of 3.1.5 a template reads the variables of any module.
SAFE_JINJA = (3, 1, 6)
TODAY = datetime.datetime(2024, 7, 26)    # the date that Llama 3's template takes where it can't ask


# -- templates

@functools.cache
def environment():
    """-> the jinja2 environment of all templates, and the two texts that stand around what is
    generated. Raises UserError if jinja2 is too old."""
    refuse_unsafe_jinja()
    import jinja2.ext
    import jinja2.sandbox
    # Nobody who writes a message can know these.
    begin = f"\0{secrets.token_hex(8)}<"
    end = f"\0{secrets.token_hex(8)}>"

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context, operator, left, right):
            if not is_small(operator, left, right):
                raise jinja2.sandbox.SecurityError(f"{operator} of such values is not allowed")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller):
            return begin + caller() + end

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = TODAY.strftime
    return sandbox, begin, end


def refuse_unsafe_jinja():
    version = importlib.metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < SAFE_JINJA:
        raise UserError(f"jinja2 {version} does not hold a chat template in its sandbox; pip install --upgrade jinja2 "
                        f"to at least {'.'.join(map(str, SAFE_JINJA))}")


def is_small(operator, left, right):
    """Whether a template may compute this: no number or text that would fill the memory."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return max(abs(left), abs(right)) < 2**64 and (operator != "**" or abs(right) < 64)
    if operator != "*":
        return False
    sizes = [value if isinstance(value, int) else len(value) for value in (left, right)]
    return sizes[0] * sizes[1] <= LARGEST


class Template:
    """A chat template. `tokens`: {"bos_token": text, …}, which it may write. Raises UserError, with
    `where` in it, if it is damaged."""

    def __init__(self, text, tokens, where):
        self.text = text
        self.tokens = tokens
        self.where = where
        sandbox, _, _ = environment()
        self.compiled = self.guarded(lambda: sandbox.from_string(text))

    def guarded(self, make):
        try:
            return make()
        except Exception as problem:             # a template raises what it likes
            raise UserError(f"{self.where}: the chat template fails ({type(problem).__name__}: {first_line(problem)}); "
                            "mend the template, or leave out or mend such rows") from problem

    def render(self, messages, add_generation_prompt=False):
        """Messages -> their text, and where it was generated: [(start, stop), …]. Raises UserError if the
        template fails."""
        _, begin, end = environment()
        marked = self.guarded(lambda: self.written(messages, add_generation_prompt))
        text, *parts = marked.split(begin)
        spans = []
        for part in parts:
            generated, *after = part.split(end)
            if len(after) != 1:
                raise UserError(f"{self.where}: the chat template has {{% generation %}} within another, or changes "
                                "what stands in it as a whole; mend the template")
            spans.append((len(text), len(text) + len(generated)))
            text += generated + after[0]
        return text, spans

    def written(self, messages, add_generation_prompt):
        parts = []
        characters = 0
        for part in self.compiled.generate(messages=messages, tools=None, documents=None,
                                           add_generation_prompt=add_generation_prompt, **self.tokens):
            characters += len(part)
            if characters > LARGEST:
                raise ValueError(f"it writes more than {LARGEST:,} characters")
            parts.append(part)
        return "".join(parts)

    def answers(self, messages):
        """Messages -> their text, and which parts of it the assistant says. Raises UserError if the
        template renders earlier messages in another way once there are later ones."""
        text, spans = self.render(messages)
        if spans or "endgeneration" in self.text:
            return text, spans
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self.render(messages[:number], add_generation_prompt=True)
                behind, _ = self.render(messages[:number + 1])
                if not (text.startswith(behind) and behind.startswith(before)):
                    raise UserError(f"{self.where}: the chat template writes message {number + 1} of {len(messages)} "
                                    "in another way when others follow; put {% generation %} and {% endgeneration %} "
                                    "around what the assistant says")
                spans.append((len(before), len(behind)))
        return text, spans


# -- rows

def chat_of(row):
    """The chat in a row, as {"messages"} or {"prompt", "completion"}; None if there is none."""
    if not isinstance(row, dict):
        return None
    if is_messages(row.get("messages")):
        return {"messages": row["messages"]}
    prompt = row.get("prompt")
    completion = row.get("completion")
    are_texts = isinstance(prompt, str) and isinstance(completion, str)
    if are_texts or (is_messages(prompt) and is_messages(completion)):
        return {"prompt": prompt, "completion": completion}
    return None


def is_messages(value):
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)


def encode(tokenizer, chat):
    """What `chat_of` returned -> (N,) ids, and which of them are only context, (N,) bool. Raises
    UserError if messages need a template and the tokenizer has none."""
    if isinstance(chat.get("prompt"), str):
        text = chat["prompt"] + chat["completion"]
        spans = [(len(chat["prompt"]), len(text))]
        return marked_ids(tokenizer, text, spans, special=False)
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f"the tokenizer {tokenizer.name!r} has no chat template, which rows of messages need: put a "
                        "chat_template.jinja beside its tokenizer.json, or give rows of texts as prompt and completion")
    if "messages" in chat:
        text, spans = template.answers(chat["messages"])
    else:
        before, _ = template.render(chat["prompt"], add_generation_prompt=True)
        text, _ = template.render(chat["prompt"] + chat["completion"])
        if not text.startswith(before):
            raise UserError(f"{template.where}: the chat template writes a prompt in another way when its completion "
                            "follows; give rows of messages")
        spans = [(len(before), len(text))]
    return marked_ids(tokenizer, text, spans, special=True)


def marked_ids(tokenizer, text, spans, special):
    ids, begins, ends = tokenizer.encode_with_places(text, special)
    is_learned = np.zeros(len(ids), bool)
    for start, stop in spans:
        is_learned |= (begins < stop) & (ends > start)
    return ids, ~is_learned

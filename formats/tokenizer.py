"""Text <-> token ids: UTF-8 bytes, a tiktoken vocabulary, or the tokenizer.json of a Hugging Face model.

    python -c "from tokenizer import open_tokenizer; print(open_tokenizer('bytes').encode('abc'))"
    python -c "from tokenizer import open_tokenizer; print(open_tokenizer('a/model/folder').encode('abc'))"

A tokenizer.json is read if it is byte-level BPE as GPT-2, Llama-3, Qwen2/2.5/3 and SmolLM2 have it. Its ids are then
those of Hugging Face's `tokenizers`, of which nothing is needed: `check_merges` shows for each vocabulary that tiktoken
merges alike, tests/formats/test_tokenizer.py compares. All else is refused in a sentence, never read approximately.

Not done here: SentencePiece, Unigram, WordPiece; chat templates; what a post-processor, truncation or padding does to
ids; texts with a million blanks in a row, at which tiktoken panics. Two known differences from `tokenizers`: added
tokens ("<think>", special or not) never come out of plain text, only out of encode(special=True); and our NFC is
Python's, theirs is Unicode 9's, so that a newer combining mark (there are 98 in Python 3.11) may end up in another
order with the marks beside it.
"""
import functools
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import numpy as np

from common import UserError

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
         "added_tokens.json", "chat_template.jinja"]
ABSENT = 2**31  # ids from here on are bytes that the vocabulary lacks (SmolLM2's has no U+0004, U+001D and 19 others)

# Byte-level BPE spells bytes as printable characters (openai/gpt-2, encoder.py): themselves, or from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}

# The pre-tokenizers that we know, behind the pattern whose matches are the same pieces and leave nothing of a text out.
# Every \p{} and \s of the first two stands in brackets, for `pieces`. Digits cuts before GPT-2's pattern looks, which
# so takes all blanks before a digit; and it asks Rust, which knows 13 digits of Unicode 17 more than \p{N}.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s])|[\s]+"
DIGIT = "\\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6"
SMOLLM2 = (rf"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{{L}}]+|[{DIGIT}]| ?[^\s\p{{L}}{DIGIT}]+"
           rf"|[\s]+(?=[{DIGIT}])|[\s]+(?![^\s])|[\s]+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PRE_TOKENIZERS = {GPT2: [LEVEL], SMOLLM2: [{"type": "Digits", "individual_digits": True}, LEVEL]} | {
    pattern: [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
              {**LEVEL, "use_regex": False}] for pattern in (LLAMA3, QWEN2)}


PROBE = ("It's a'tb a'sb a'reb a'veb a'mb a'llb a'db I'LL A'TB A'LLB 1234567 x12 ٣٤٥  6 camelCase's q\u0301x naïve/\n\n"
         " (ok)!?\r\n/\t\tif x\n    y  +=   1 \n \n z 日本語かな、。한국어 हिन्दी 🙂 a\u00a0b\u3000c ... $5 #a_b <|x|>")


class Unsupported(Exception):
    """What a tokenizer.json has that we would not read exactly: the rest of a sentence that begins with the file."""


class Tokenizer:
    """Text <-> token ids. No `encoding`: UTF-8 bytes, and NUL, which text does not contain (`encode` drops it), is the
    end of text. Else a tiktoken.Encoding; `name` must identify the vocabulary, as cached shards go by it. `eot` closes
    a document, `bos` (or None) opens one, `specials` is {text: id}, `files` {file name: text} what it was read from.
    `nfc`: text is normalized first, and then that is what tokens and their bytes stand for. `late`: specials that are
    looked for in what the others leave (`tokenizers` does so where "normalized" is true)."""

    def __init__(self, name, encoding=None, eot=None, bos=None, files=None, nfc=False, late=()):
        self.name, self.encoding, self.bos, self.files, self.nfc = name, encoding, bos, files or {}, nfc
        self.specials = dict(encoding._special_tokens) if encoding else {}
        ids = [*encoding._mergeable_ranks.values(), *self.specials.values()] if encoding else range(256)
        self.vocab_size = 1 + max(i for i in ids if i < ABSENT)
        self.eot = eot if eot is not None else encoding.eot_token if encoding else 0
        self.dtype = np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")
        groups = [sorted(g, key=len, reverse=True) for g in (self.specials.keys() - {*late}, late)]  # longest first
        self.passes = [re.compile(f"({'|'.join(map(re.escape, group))})") for group in groups if group]

    def encode(self, text, special=False):
        """str -> (N,) uint16 or uint32. A text that spells "<|endoftext|>" gets ordinary tokens: documents cannot forge
        their own end; `special` makes such texts their ids. A lone surrogate, which UTF-8 cannot express, becomes "?".
        Bytes that a vocabulary lacks are dropped, as `tokenizers` does, and what is around them merges."""
        parts = [text.encode("utf-8", errors="replace").decode()]
        for pattern in self.passes if special else ():
            parts = [s for part in parts for s in ([part] if part in self.specials else pattern.split(part))]
        ids = [[self.specials[s]] if special and s in self.specials else self.encode_plain(s) for s in parts]
        return np.concatenate([np.asarray(part).astype(self.dtype) for part in ids])

    def encode_plain(self, text):
        """str without surrogates -> (N,) ids, none of them special."""
        if not self.encoding:
            return np.frombuffer(text.encode().replace(b"\0", b""), np.uint8)
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        encode = getattr(self.encoding, "encode_to_numpy", self.encoding.encode)  # tiktoken 0.7 has not the faster one
        ids = np.asarray(encode(text, disallowed_special=()), np.uint32)
        if not (ids >= ABSENT).any():
            return ids
        absent = bytes(b for b in range(256) if self.encoding.encode_single_token(bytes([b])) >= ABSENT)
        found = [piece.encode().translate(None, absent) for piece in pieces(self.encoding._pat_str, text)]
        return np.array([i for piece in found if piece for i in self.encoding._encode_single_piece(piece)], np.uint32)

    def token_bytes(self, token):
        """One id -> bytes; none for ids that the vocabulary skips or does not reach (a padded embedding)."""
        try:
            return self.encoding.decode_single_token_bytes(token) if self.encoding else bytes([token])
        except (KeyError, ValueError):
            return b""

    def decode(self, ids):
        """Sequence of ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def as_files(self):
        """-> {file name: text} that Hugging Face's tokenizers load: `files`, or for bytes and tiktoken's vocabularies
        the same made anew; {} where tiktoken cuts text in a way that PRE_TOKENIZERS has not."""
        pattern = known_pattern(self.encoding) if self.encoding else GPT2     # bytes: nothing to merge, any will do
        if self.files or pattern is None:
            return self.files
        letters = {byte: char for char, byte in BYTES.items()}
        spelled = lambda token: "".join(letters[byte] for byte in token)
        ranks = self.encoding._mergeable_ranks if self.encoding else {bytes([b]): b for b in range(1, 256)}
        specials = self.specials or {"<|endoftext|>": self.eot}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                 "ignore_merges": self.encoding is not None,         # as tiktoken: a piece that is a token stays
                 "vocab": {spelled(token): i for token, i in ranks.items()} | specials,
                 "merges": [[spelled(left), spelled(right)] for left, right in merges(ranks)]}
        added = [{"id": i, "content": text, "special": True, **flags} for text, i in specials.items()]
        trim = lambda step: step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step
        steps = [trim(step) for step in PRE_TOKENIZERS[pattern]]
        content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                   "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": None,
                   "decoder": LEVEL | {"trim_offsets": True}, "model": model}
        end = next(text for text, i in specials.items() if i == self.eot)
        return {"tokenizer.json": json.dumps(content, ensure_ascii=False), "tokenizer_config.json": json.dumps(
            {"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"})}

    def byte_lengths(self):
        """-> (vocab_size,) int64: the UTF-8 bytes of text that each token stands for, 0 for special ones. Their sum
        over a text is the denominator of bits per byte."""
        special = {self.eot, *self.specials.values()}
        return np.array([0 if i in special else len(self.token_bytes(i)) for i in range(self.vocab_size)])


@functools.cache
def only(kind):
    """A regular expression -> Encoding that keeps the characters which match, each UTF-8 byte as its own id."""
    import tiktoken
    return tiktoken.Encoding(kind, pat_str=kind, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={})


def pieces(pattern, text):
    """-> the strings which tiktoken's `pattern`, GPT2 or SMOLLM2, cuts `text` into. tiktoken does not say; so Python's
    `re` matches, with the classes spelled out as those characters of `text` that are in them by tiktoken's Unicode."""
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        inside = bytes(only(kind).encode_ordinary("".join({*text, *"a1 "}))).decode()  # never none, as [] is no class
        pattern = pattern.replace(kind, re.escape(inside))
    return re.findall(pattern, text)


def known_pattern(encoding):
    """The one of PRE_TOKENIZERS that cuts PROBE into pieces as the encoding's does, or None. Compared is what patterns
    do: tiktoken spells its own in another way in each version. (cl100k_base so counts as Llama-3's; it differs in blank
    lines at the very end of a text, which it leaves one piece.)"""
    import regex  # tiktoken depends on it
    return next((pattern for pattern in PRE_TOKENIZERS
                 if regex.findall(pattern, PROBE) == regex.findall(encoding._pat_str, PROBE)), None)


def merges(ranks):
    """{token: rank} -> every pair of tokens whose union is a token, by its rank: what tiktoken merges, as a list. (Of
    the pairs for one token only one ever meets, see `check_merges`; the others do no harm.)"""
    return [(token[:i], token[i:]) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks]


def open_tokenizer(name, files=None):
    """"bytes", a tiktoken encoding's name, or a Hugging Face folder or its tokenizer.json -> Tokenizer; with `files`,
    {file name: text}, from these, and `name` is for messages. UserError: unknown, not supported, or no download."""
    if files:
        return from_files(name, files)
    if name == "bytes":
        return Tokenizer("bytes")
    import tiktoken
    known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
    if name not in known.split(", ") and Path(name).exists():
        folder = Path(name).parent if Path(name).name == "tokenizer.json" else Path(name)
        return from_files(name, read_files(folder))
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except ValueError as problem:
        raise UserError(f"no tokenizer {name!r} ({str(problem).splitlines()[0]}): give one of {known}, or a folder "
                        "with a tokenizer.json") from problem
    except OSError as problem:
        raise UserError(f"vocabulary {name!r} cannot be downloaded ({type(problem).__name__}): connect once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bytes") from problem


def read_json(text, where):
    """-> dict. UserError: `text` (str or bytes), the content of the file `where`, is not a JSON object."""
    try:
        return {**json.loads(text)}
    except (ValueError, TypeError) as problem:
        raise UserError(f"{where} is not a JSON object ({problem}): copy it again") from problem


def read_files(folder):
    """A Hugging Face folder -> {file name: text} of those of FILES that it has; {} without tokenizer.json. Where
    tokenizer_config.json is missing and config.json has bos_token_id or eos_token_id (of a list the first), a minimal
    one is made of the texts that tokenizer.json has for these ids. UserError: a file is not UTF-8 or not JSON."""
    files = {}
    for path in (Path(folder, name) for name in [*FILES, "config.json"]):
        try:
            if path.is_file():
                files[path.name] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as problem:
            raise UserError(f"{path} is not UTF-8 text (byte {problem.start}): copy it again") from problem
    config = files.pop("config.json", "{}")
    if "tokenizer.json" not in files:
        return {}
    if "tokenizer_config.json" not in files:
        config = read_json(config, f"{folder}/config.json")
        added = read_json(files["tokenizer.json"], f"{folder}/tokenizer.json").get("added_tokens") or []
        texts, made = {token.get("id"): token.get("content") for token in added if isinstance(token, dict)}, {}
        for key in ("bos_token", "eos_token"):
            i = config.get(key + "_id")
            i = i[0] if isinstance(i, list) and i else i
            if isinstance(i, int) and i in texts:
                made[key] = texts[i]
        if made:
            made["tokenizer_class"] = "PreTrainedTokenizerFast"
            files["tokenizer_config.json"] = json.dumps(made)
    return files


def from_files(name, files):
    """{file name: text} of a Hugging Face folder -> Tokenizer "json-<16 hex digits of sha256 over what makes ids>".
    UserError, with `name` in it: a file is missing or damaged, or of a kind that is not read exactly."""
    if "tokenizer.json" not in files:
        raise UserError(f"{name} holds no tokenizer.json: give the folder of a Hugging Face model that does")
    config = read_json(files.get("tokenizer_config.json", "{}"), f"{name}: tokenizer_config.json")
    content = read_json(files["tokenizer.json"], f"{name}: tokenizer.json")
    try:
        pattern, ranks, specials, late = understand(content)
    except Unsupported as problem:
        raise UserError(f"{name}: tokenizer.json {problem}; give one with byte-level BPE as GPT-2, Llama-3, "
                        "Qwen2/2.5/3 and SmolLM2 have it") from problem
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise UserError(f"{name}: tokenizer.json is damaged ({type(problem).__name__}: {problem}): copy it again"
                        ) from problem
    ends = {}
    for key, usual in {"eos_token": ["<|endoftext|>", "<|end_of_text|>", "</s>"], "bos_token": []}.items():
        text = config.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text is not None and text not in specials:
            raise UserError(f"{name}: {key} {text!r} of tokenizer_config.json is not among the {len(specials)} added "
                            "tokens of tokenizer.json; correct one of the two")
        ends[key] = next((specials[s] for s in [text, *usual] if s in specials), None)
    if ends["eos_token"] is None:
        raise UserError(f"{name} does not say which token ends a document; put \"eos_token\", one of the "
                        f"{len(specials)} added tokens of tokenizer.json, into tokenizer_config.json")
    nfc = bool(content.get("normalizer"))
    parts = [pattern, nfc, sorted((i, b.hex()) for b, i in ranks.items()), sorted(specials.items()), late, ends]
    name = f"json-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    import tiktoken
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    return Tokenizer(name, encoding, ends["eos_token"], ends["bos_token"], files, nfc, late)


def understand(content):
    """tokenizer.json -> pattern of the pieces, {bytes: id} for tiktoken, {text: id} of the added tokens, and of these
    the texts that are looked for last. Raises Unsupported; KeyError and its like where the file is damaged."""
    model, normalizer, pre = content["model"], content.get("normalizer"), content.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE":
        raise Unsupported(f"has a {model['type']} model")
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Unsupported(f"has {key} {model[key]!r}")
    if normalizer not in (None, {"type": "NFC"}):
        raise Unsupported(f"has normalizer {json.dumps(normalizer)[:100]}")
    steps = [{"use_regex": True, **step} if step["type"] == "ByteLevel" else step
             for step in (pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre] if pre else [])]
    steps = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]  # offsets: no matter for ids
    if steps not in PRE_TOKENIZERS.values():
        raise Unsupported(f"has pre-tokenizer {json.dumps(pre)[:200]}")
    pattern = next(pattern for pattern, known in PRE_TOKENIZERS.items() if known == steps)
    specials, late = added_tokens(content.get("added_tokens") or [], model["vocab"], normalizer)
    vocab = {text: i for text, i in model["vocab"].items() if text not in specials}
    if foreign := [text for text in vocab if not text or not BYTES.keys() >= set(text)]:
        raise Unsupported(f"has {len(foreign)} tokens that do not spell bytes, as {foreign[0]!r}")
    if len({*vocab.values(), *specials.values()}) < len(vocab) + len(specials):
        raise Unsupported("has one id for two tokens")
    absent = [char for char in BYTES if char not in vocab]
    if absent and (model.get("unk_token") or model.get("ignore_merges") or pattern not in (GPT2, SMOLLM2)):
        raise Unsupported(f"lacks {len(absent)} of the 256 bytes, and is not as simple as SmolLM2's")
    check_merges(vocab, model["merges"], model.get("ignore_merges"))
    vocab |= {char: ABSENT + BYTES[char] for char in absent}
    return pattern, {bytes(BYTES[char] for char in text): i for text, i in vocab.items()}, specials, late


def added_tokens(tokens, vocab, normalizer):
    """"added_tokens" -> {text: id}, [texts with "normalized"]. Those that are not special are treated like special
    ones, so they must look like it. Unsupported: they do not; or `tokenizers`, which numbers anew, has other ids."""
    specials, late = {}, []
    for token in (token for token in tokens if token["content"]):  # `tokenizers` leaves empty ones out, too
        text, i = token["content"], token["id"]
        if flags := [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]:
            raise Unsupported(f"has added token {text!r} with {flags[0]}")
        if token.get("normalized") and normalizer:
            raise Unsupported(f"has added token {text!r} with normalized, and a normalizer")
        if not token.get("special") and not re.fullmatch(r"<.+>|\[.+\]", text):
            raise Unsupported(f"has added token {text!r}, neither special nor in <> or [], which plain text may hold")
        fresh = max(len(vocab), *(n + 1 for n in specials.values()), 0)
        if i != (expected := specials.get(text, vocab.get(text, fresh))):
            raise Unsupported(f"has added token {text!r} with id {i}, which `tokenizers` would number {expected}")
        specials[text] = i
        late += [text] * bool(token.get("normalized"))
    return specials, late


def check_merges(vocab, merges, ignore_merges):
    """Unsupported, unless for every text tiktoken's merges, by id, are those of `tokenizers`, by the list `merges`.

    `tokenizers` merges the adjacent pair that is first in its list, tiktoken the one whose union has the smallest id,
    listed or not; the leftmost of equals. If ids of unions never fall along the list, the orders agree. And in a
    stretch of text that becomes token t, both merge as in t alone, so the last merge is of the one pair that t alone
    comes down to: it must be listed. Where t alone gets stuck before, no merge makes t; tiktoken still gives t for a
    piece that is t, so that `tokenizers` must, too: `ignore_merges` (Llama-3 has 588 such tokens)."""
    pairs, last = {}, -1
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= vocab.keys():
            raise Unsupported(f"merges {left!r} and {right!r}, of which one or the union is no token")
        before, last = last, pairs.setdefault((left, right), vocab[left + right])
        if last < before:
            raise Unsupported(f"merges {left!r} and {right!r} (id {last}) after id {before}, not in the order of ids")
    never = max(vocab.values()) + 1
    for text, i in vocab.items():
        parts = list(text)
        while len(parts) > 2:
            ids = [pairs.get(pair, never) for pair in zip(parts, parts[1:])]
            if (best := min(ids)) == never:
                break
            at = ids.index(best)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and tuple(parts) not in pairs or len(parts) > 2 and not ignore_merges:
            raise Unsupported(f"has token {text!r} (id {i}), of which the merges make {parts}")

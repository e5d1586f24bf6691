"""Text <-> token ids: UTF-8 bytes, a tiktoken vocabulary, or the tokenizer of a Hugging Face model.

    python -c "from formats.tokenizer import open_tokenizer; print(open_tokenizer('bytes').encode('abc'))"
    python -c "from formats.tokenizer import open_tokenizer; print(open_tokenizer('a/model/folder').encode('abc'))"

A folder's tokenizer.json is read by the library `tokenizers`, a folder that has only tokenizer.model by the library
`sentencepiece`. The ids are those of transformers, with one exception. A document must not be able to end itself or to
begin a turn of a chat. So a text that spells a special token ("</s>") is encoded as ordinary text. Three kinds of added
tokens are special: those that the file marks as special, those that look like "<think>" or "[INST]", and those that
tokenizer_config.json names as the beginning or end of a text.

A file of somebody else runs no code, and only the files named in FILES are read, in the folder itself.

Not done here: WordPiece, whose tokens do not say where blanks were; chat templates; what a post-processor, truncation
or padding does to ids.
"""
import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from common import UserError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
         "merges.txt", "added_tokens.json", "chat_template.jinja")

# Byte-level BPE spells bytes as printable characters (openai/gpt-2, encoder.py): themselves, or from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE = sorted(set(range(256)) - set(PRINTABLE))
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + number): byte for number, byte in enumerate(UNPRINTABLE)}
LETTERS = {byte: letter for letter, byte in BYTES.items()}

# SentencePiece spells a blank as this character, and a byte of a character that has no token as <0x00> to <0xFF>.
BLANK = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

# A text in which most ways to cut text into words, and so most tokenizers, differ.
PROBE = ("It's a'tb a'sb a'reb a'veb a'mb a'llb a'db I'LL A'TB A'LLB 1234567 x12 ٣٤٥  6 camelCase's q\u0301x naïve/\n\n"
         " (ok)!?\r\n/\t\tif x\n    y  +=   1 \n \n z 日本語かな、。한국어 हिन्दी 🙂 a\u00a0b\u3000c ... $5 #a_b <|x|>")


class Tokenizer:
    """What all kinds of tokenizers share; a kind adds `ids` and `token_bytes`.

    name        identifies the vocabulary: cached corpora and run folders go by it
    vocab_size  1 + the largest id
    eot, bos    the ids that close and open a document; bos may be None
    specials    {text: id} of the tokens that no document can spell
    files       {file name: content} that it was read from; {} for bytes and tiktoken's vocabularies
    opening     ids that transformers puts in front of every text"""

    def __init__(self, name, vocab_size, eot, bos=None, specials=None, files=None, opening=()):
        self.name = name
        self.vocab_size = vocab_size
        self.eot = eot
        self.bos = bos
        self.specials = specials or {}
        self.files = files or {}
        self.opening = list(opening)
        self.dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")

    def encode(self, text, special=False):
        """str -> (N,) uint16 or uint32. With `special`, texts that spell special tokens become their ids. A lone
        surrogate, which UTF-8 cannot express, becomes "?"."""
        return np.asarray(self.ids(replace_surrogates(text), special)).astype(self.dtype)

    def encode_batch(self, texts):
        """List of str -> list of (N,) arrays."""
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """Sequence of ids -> str. Bytes that are not UTF-8 become U+FFFD. Where `encode` puts a blank before a text,
        that blank is left out."""
        spelled = []
        text_begins = self.adds_blank
        for token in map(int, ids):
            part = self.token_bytes(token)
            spelled.append(part.removeprefix(b" ") if text_begins else part)
            text_begins = self.adds_blank and token in (self.eot, self.bos)
        return b"".join(spelled).decode("utf-8", errors="replace")

    @functools.cached_property
    def adds_blank(self):
        """Whether `encode` puts a blank before a text, as Llama 2 does: "a" then has the tokens of " a"."""
        first = self.encode("a")[:1]
        return len(first) == 1 and self.token_bytes(int(first[0])).startswith(b" ")

    def byte_lengths(self):
        """-> (vocab_size,) int64: the UTF-8 bytes of text that each token stands for, 0 for special tokens.

        Their sum over a text is the denominator of bits per byte. The sum is exact for a text without characters that
        the tokenizer changes or lacks. A blank that `encode` puts before a text counts: one byte a document."""
        lengths = np.array([len(self.token_bytes(token)) for token in range(self.vocab_size)])
        lengths[[self.eot, *self.specials.values()]] = 0
        return lengths

    def as_files(self):
        """-> {file name: content} that Hugging Face's libraries load; {} if tiktoken's rules cannot be written so."""
        return self.files


def replace_surrogates(text):
    return text.encode("utf-8", errors="replace").decode()


class Bytes(Tokenizer):
    """UTF-8 bytes. Text does not contain NUL (`encode` drops it), so NUL is the end of a text."""

    def __init__(self, eot=0):
        super().__init__("bytes", 256, eot)

    def ids(self, text, special):
        return np.frombuffer(text.encode().replace(b"\0", b""), np.uint8)

    def token_bytes(self, token):
        """One id -> bytes; none for ids beyond the vocabulary (a padded embedding)."""
        return bytes([token]) if token < 256 else b""

    def as_files(self):
        tokens = {bytes([byte]): byte for byte in range(1, 256)}
        return byte_level_files(tokens, None, {"<|endoftext|>": self.eot}, self.eot)


class Tiktoken(Tokenizer):
    """A tiktoken.Encoding."""

    def __init__(self, name, encoding, eot=None):
        self.encoding = encoding
        specials = dict(encoding._special_tokens)
        vocab_size = 1 + max(*encoding._mergeable_ranks.values(), *specials.values())
        super().__init__(name, vocab_size, encoding.eot_token if eot is None else eot, specials=specials)

    def ids(self, text, special):
        if special:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode_ordinary(text)

    def token_bytes(self, token):
        """One id -> bytes; none for ids that the vocabulary skips or does not reach."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""

    def as_files(self):
        # Oniguruma, the regular expressions of `tokenizers`, reads "{1,3}+" as a repetition of {1,3}. tiktoken means
        # that nothing is given back, which is of no importance at the end of an alternative.
        pattern = self.encoding._pat_str.replace("{1,3}+", "{1,3}")
        files = byte_level_files(self.encoding._mergeable_ranks, pattern, self.specials, self.eot)
        same = HuggingFace(self.name, files).encode(PROBE).tolist() == self.encode(PROBE).tolist()
        return files if same else {}


class HuggingFace(Tokenizer):
    """A tokenizer.json, read by the library `tokenizers`. Raises UserError, with `where` in the message, if a file is
    damaged or its tokens do not say which bytes they stand for."""

    def __init__(self, where, files):
        import tokenizers
        content = read_json(files["tokenizer.json"], f"{where}: tokenizer.json")
        config = read_json(files.get("tokenizer_config.json", "{}"), f"{where}: tokenizer_config.json")
        refuse_unknown_spelling(content, where)
        try:
            self.plain = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as problem:            # the library raises nothing more special
            raise UserError(f"{where}: tokenizer.json is damaged ({problem}): copy it again") from problem
        self.plain.no_truncation()
        self.plain.no_padding()
        self.is_byte_level = spells_bytes(content)
        self.added = self.plain.get_added_tokens_decoder()

        added = {token.content: i for i, token in self.added.items() if token.content}
        eot, bos = named_ends(config, added, where)
        if eot is None:
            raise UserError(f"{where} does not say which token ends a document; put \"eos_token\", one of the "
                            f"{len(added)} added tokens of tokenizer.json, into tokenizer_config.json")
        specials = {token.content: i for i, token in self.added.items()
                    if token.content and (looks_special(token) or i in (eot, bos))}
        self.forbid(specials, where)
        ids = self.plain.get_vocab(with_added_tokens=True).values()
        if len(set(ids)) < len(ids):
            raise UserError(f"{where}: tokenizer.json has one id for two tokens; correct it, or copy it again")
        vocab_size = 1 + max(ids)
        super().__init__(name_of(content, specials, eot, bos), vocab_size, eot, bos, specials, files,
                         opening_ids(self.plain))

    def forbid(self, specials, where):
        """Make sure that `plain` encodes a text that spells a special token as ordinary text."""
        import tokenizers
        from tokenizers import pre_tokenizers
        self.plain.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in specials])
        self.plain.encode_special_tokens = True

        # That keeps the library from looking for special tokens in a text. But a Unigram model has them among its
        # tokens, with the best score of all, and finds them itself. So a text is cut behind the first character of
        # each, after all other steps and only where the model would find it.
        patterns = []
        for text, token in specials.items():
            if [found.id for found in self.plain.model.tokenize(text)] != [token]:
                continue
            if len(text) == 1:
                raise UserError(f"{where}: the special token {text!r} is a single character, which any document may "
                                "hold; make it a longer text in tokenizer.json")
            patterns.append(f"{re.escape(text[0])}(?={re.escape(text[1:])})")
        if patterns:
            steps = [] if self.plain.pre_tokenizer is None else [self.plain.pre_tokenizer]
            cut = pre_tokenizers.Split(tokenizers.Regex("|".join(patterns)), "merged_with_previous")
            self.plain.pre_tokenizer = pre_tokenizers.Sequence([*steps, cut])

    @functools.cached_property
    def finds_specials(self):
        """The same tokenizer as the library reads it: texts that spell special tokens become their ids."""
        import tokenizers
        backend = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"])
        backend.no_truncation()
        backend.no_padding()
        return backend

    def ids(self, text, special):
        backend = self.finds_specials if special else self.plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        # The library works on the documents of a batch in parallel.
        texts = [replace_surrogates(text) for text in texts]
        encodings = self.plain.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids).astype(self.dtype) for encoding in encodings]

    def token_bytes(self, token):
        """One id -> bytes; none for ids that the vocabulary skips or does not reach."""
        text = self.plain.id_to_token(token) or ""
        if not self.is_byte_level:
            return piece_bytes(text)
        if token in self.added or not BYTES.keys() >= set(text):
            return text.encode()
        return bytes(BYTES[letter] for letter in text)

    def __reduce__(self):
        # A pickled tokenizers.Tokenizer forgets `encode_special_tokens`: read the files again.
        return HuggingFace, (self.name, self.files)


class SentencePiece(Tokenizer):
    """A tokenizer.model, read by the library `sentencepiece`; tokenizer_config.json and added_tokens.json may add
    tokens. Raises UserError, with `where` in the message, if a file is damaged or the library is missing."""

    def __init__(self, where, files):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"{where} has a tokenizer.model and no tokenizer.json, which the package sentencepiece "
                            "reads: pip install sentencepiece") from None
        proto = files["tokenizer.model"]
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(proto)
        except RuntimeError as problem:
            raise UserError(f"{where}: tokenizer.model is damaged ({' '.join(str(problem).split())}): copy it again"
                            ) from problem
        size = self.model.piece_size()
        config = read_json(files.get("tokenizer_config.json", "{}"), f"{where}: tokenizer_config.json")
        self.added = added_tokens(files, config, where)
        specials = {self.model.id_to_piece(i): i for i in range(size)
                    if self.model.is_control(i) or self.model.is_unknown(i)}
        specials |= {text: i for text, i in self.added.items() if i >= size}
        eot, bos = named_ends(config, specials | self.added, where)
        if eot is None and self.model.eos_id() >= 0:
            eot = self.model.eos_id()
        if bos is None and self.model.bos_id() >= 0:
            bos = self.model.bos_id()
        if eot is None:
            raise UserError(f"{where} does not say which token ends a document; put \"eos_token\" into "
                            "tokenizer_config.json")
        if eot < size and eot in self.model.encode(self.model.id_to_piece(eot)):
            raise UserError(f"{where}: a document may spell the token that ends it, {self.model.id_to_piece(eot)!r}, "
                            "as tokenizer.model has it as a user-defined symbol; name another \"eos_token\" in "
                            "tokenizer_config.json")
        self.texts = {i: text for text, i in specials.items()}
        vocab_size = max(size, 1 + max(self.texts, default=0))
        digest = hashlib.sha256(proto + json.dumps([sorted(specials.items()), eot, bos]).encode())
        opens = bos is not None and config.get("add_bos_token", True)
        super().__init__(f"spm-{digest.hexdigest()[:16]}", vocab_size, eot, bos, specials, files,
                         [bos] if opens else [])

    def ids(self, text, special):
        if not special:
            return self.model.encode(text)
        longest_first = sorted(self.specials, key=len, reverse=True)
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            if part in self.specials:
                ids.append(self.specials[part])
            else:
                ids += self.model.encode(part)
        return ids

    def token_bytes(self, token):
        """One id -> bytes; none for ids that the vocabulary skips or does not reach."""
        if token in self.texts:
            return self.texts[token].encode()
        return piece_bytes(self.model.id_to_piece(token)) if token < self.model.piece_size() else b""

    def __reduce__(self):
        return SentencePiece, (self.name, self.files)


def piece_bytes(piece):
    """SentencePiece's spelling of a token -> the bytes it stands for."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(BLANK, " ").encode()


# -- opening one

def open_tokenizer(name, files=None):
    """"bytes", the name of a tiktoken encoding, or a Hugging Face folder or its tokenizer.json -> Tokenizer. With
    `files`, {file name: content}, it is read from these, and `name` is for messages. Raises UserError if the name is
    unknown, the tokenizer not supported, or a vocabulary cannot be downloaded."""
    if files:
        return from_files(name, files)
    if name == "bytes":
        return Bytes()
    import tiktoken
    names = ["bytes", *tiktoken.list_encoding_names()]
    if name not in names and Path(name).exists():
        folder = Path(name).parent if Path(name).name in ("tokenizer.json", "tokenizer.model") else Path(name)
        return from_files(name, read_files(folder))
    try:
        return Tiktoken(name, tiktoken.get_encoding(name))
    except ValueError as problem:
        raise UserError(f"no tokenizer {name!r} ({str(problem).splitlines()[0]}): give one of {', '.join(names)}, or a "
                        "folder with a tokenizer.json") from problem
    except OSError as problem:
        raise UserError(f"vocabulary {name!r} cannot be downloaded ({type(problem).__name__}): connect once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bytes") from problem


def from_files(where, files):
    """{file name: content} of a Hugging Face folder -> Tokenizer."""
    if "tokenizer.json" in files:
        return HuggingFace(where, files)
    if "tokenizer.model" in files:
        return SentencePiece(where, files)
    raise UserError(f"{where} holds no tokenizer.json: give the folder of a Hugging Face model that does")


def read_json(text, where):
    """-> dict. Raises UserError if `text` (str or bytes), the content of the file `where`, is not a JSON object."""
    try:
        return {**json.loads(text)}
    except (ValueError, TypeError) as problem:
        raise UserError(f"{where} is not a JSON object ({problem}): copy it again") from problem


def read_files(folder):
    """A Hugging Face folder -> {file name: content} of those of FILES that it has; {} without a tokenizer.

    Contents are str, that of tokenizer.model bytes; where there is a tokenizer.json it is left out. If
    tokenizer_config.json is missing, a minimal one is made from config.json, see `config_from_ids`. Raises UserError
    if a file is not UTF-8 or not JSON."""
    files = {}
    for path in [Path(folder, name) for name in (*FILES, "config.json")]:
        if not path.is_file():
            continue
        content = path.read_bytes()
        try:
            files[path.name] = content if path.suffix == ".model" else content.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise UserError(f"{path} is not UTF-8 text (byte {problem.start}): copy it again") from problem
    config = files.pop("config.json", "{}")
    if "tokenizer.json" in files:
        files.pop("tokenizer.model", None)
    elif "tokenizer.model" not in files:
        return {}
    if "tokenizer.json" in files and "tokenizer_config.json" not in files:
        content = read_json(files["tokenizer.json"], f"{folder}/tokenizer.json")
        made = config_from_ids(read_json(config, f"{folder}/config.json"), content)
        if made:
            files["tokenizer_config.json"] = json.dumps(made)
    return files


def config_from_ids(config, content):
    """A model's config.json and its tokenizer.json -> a tokenizer_config.json (dict) that names the added tokens of
    config's bos_token_id and eos_token_id (of a list the first); {} if it has none."""
    added = [token for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    texts = {token.get("id"): token.get("content") for token in added}
    made = {}
    for key in ("bos_token", "eos_token"):
        token = config.get(key + "_id")
        if isinstance(token, list) and token:
            token = token[0]
        if isinstance(token, int) and token in texts:
            made[key] = texts[token]
    if made:
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    return made


# -- what the files say

def looks_special(token):
    """Whether no text may spell this added token: it is marked as special, or looks like "<think>" or "[INST]"."""
    return token.special or re.fullmatch(r"<.+>|\[.+\]", token.content) is not None


def named_ends(config, added, where):
    """The ids of the tokens that close and open a document, or None. tokenizer_config.json names them; the closing
    one may go by a usual name. Raises UserError if a named one is not among `added`, {text: id}."""
    ends = []
    for key, usual in (("eos_token", ("<|endoftext|>", "<|end_of_text|>", "</s>")), ("bos_token", ())):
        text = config.get(key)
        if isinstance(text, dict):
            text = text.get("content")
        if text is not None and text not in added:
            raise UserError(f"{where}: {key} {text!r} of tokenizer_config.json is not among the {len(added)} added "
                            "tokens of the tokenizer; correct one of the two")
        names = usual if text is None else (text,)
        ends.append(next((added[name] for name in names if name in added), None))
    return ends


def added_tokens(files, config, where):
    """{text: id} of what tokenizer_config.json and added_tokens.json add to a tokenizer.model."""
    added = read_json(files.get("added_tokens.json", "{}"), f"{where}: added_tokens.json")
    try:
        for token, entry in (config.get("added_tokens_decoder") or {}).items():
            added[entry["content"]] = int(token)
        return {str(text): int(token) for text, token in added.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{where}: the added tokens are damaged ({type(problem).__name__}: {problem}): copy "
                        "tokenizer_config.json and added_tokens.json again") from problem


def opening_ids(backend):
    """The ids that a tokenizer's post-processor puts in front of a text, as Llama 3's <|begin_of_text|>."""
    encoding = backend.encode("a")
    ids = []
    for token, sequence in zip(encoding.ids, encoding.sequence_ids):
        if sequence is not None:
            break
        ids.append(token)
    return ids


def steps_of(step, name):
    """The steps of a normalizer, pre-tokenizer or decoder as a list of dicts: of a sequence its members."""
    if step is None:
        return []
    return step[name] if step.get("type") == "Sequence" else [step]


def spells_bytes(content):
    """Whether a tokenizer.json spells bytes as GPT-2 does."""
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers") + steps_of(content.get("decoder"), "decoders")
    return any(step.get("type") == "ByteLevel" for step in steps)


def refuse_unknown_spelling(content, where):
    """Raise UserError if the tokens of a tokenizer.json do not say which bytes of text they stand for, or if its ids
    are drawn at random."""
    remedy = ("give one with byte-level BPE as GPT-2, Llama 3, Qwen and SmolLM2 have it, or with SentencePiece's BPE "
              "or Unigram as Llama 2, Mistral and Gemma")
    try:
        model = content["model"]
        kind = model.get("type", "BPE")
        by_bytes = spells_bytes(content)
        steps = [content.get("normalizer"), content.get("pre_tokenizer"), content.get("decoder")]
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{where}: tokenizer.json is damaged ({type(problem).__name__}: {problem}): copy it again"
                        ) from problem
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"{where}: tokenizer.json has a {kind} model; {remedy}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{where}: tokenizer.json has {key} {model[key]!r}; {remedy}")
    if not by_bytes and BLANK not in json.dumps(steps, ensure_ascii=False):
        raise UserError(f"{where}: tokenizer.json has pre-tokenizer {json.dumps(steps[1])[:200]}, and does not say "
                        f"how its tokens spell blanks; {remedy}")


# -- names, which caches and run folders go by

# The four families of byte-level BPE are known by their tokens alone: what cuts their text into words is named by one
# regular expression each, which makes the same pieces. Digits cuts before GPT-2's pattern looks, which so takes all
# blanks before a digit; and Rust knows 13 digits of Unicode 17 more than \p{N}.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s])|[\s]+"
DIGIT = "\\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6"
SMOLLM2 = (rf"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{{L}}]+|[{DIGIT}]| ?[^\s\p{{L}}{DIGIT}]+"
           rf"|[\s]+(?=[{DIGIT}])|[\s]+(?![^\s])|[\s]+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LEVEL_ONLY = {**LEVEL, "use_regex": False}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = {GPT2: [LEVEL],
                  SMOLLM2: [{"type": "Digits", "individual_digits": True}, LEVEL],
                  LLAMA3: [split(LLAMA3), LEVEL_ONLY],
                  QWEN2: [split(QWEN2), LEVEL_ONLY]}
ABSENT = 2**31      # in a name, ids from here on are bytes that the vocabulary lacks


def name_of(content, specials, eot, bos):
    """"json-" and 16 hex digits of the sha256 over what makes ids. Layout, spelling and order in a tokenizer.json do
    not change the name."""
    ends = {"eos_token": eot, "bos_token": bos}
    pattern = family(content, specials)
    if pattern:
        has_nfc = bool(content.get("normalizer"))
        normalized_last = [token["content"] for token in content.get("added_tokens") or []
                           if token["content"] and token.get("normalized")]
        parts = [pattern, has_nfc, ranks_of(content, specials), sorted(specials.items()), normalized_last, ends]
    else:
        model = {**content["model"], "merges": pairs_of(content["model"])}
        parts = {"model": model, "ends": ends}
        for key in ("normalizer", "pre_tokenizer", "added_tokens"):
            parts[key] = content.get(key)
    return f"json-{hashlib.sha256(json.dumps(parts, sort_keys=not pattern).encode()).hexdigest()[:16]}"


def pairs_of(model):
    """The merges of a BPE model as pairs; they are spelled as pairs or as "left right"."""
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]


def ranks_of(content, specials):
    """Tokens of byte-level BPE as sorted pairs (id, hex digits of the bytes). A byte without a token has ABSENT + byte
    as its id."""
    vocab = content["model"]["vocab"]
    absent = {letter: ABSENT + byte for letter, byte in BYTES.items() if letter not in vocab}
    return sorted((i, bytes(BYTES[letter] for letter in text).hex())
                  for text, i in {**vocab, **absent}.items() if text not in specials)


def family(content, specials):
    """The key of PRE_TOKENIZERS for a tokenizer.json whose ids follow from its tokens alone, or None.

    The ids follow from the tokens if merges stand in the order of the tokens that they make, and if each longer token
    has a merge (or is one only as a whole word: `ignore_merges`)."""
    model = content["model"]
    steps = [{"use_regex": True, **step} if step.get("type") == "ByteLevel" else step
             for step in steps_of(content.get("pre_tokenizer"), "pretokenizers")]
    steps = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]    # concerns no ids
    pattern = next((pattern for pattern, known in PRE_TOKENIZERS.items() if known == steps), None)
    if pattern is None or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return None
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    if any(token["content"] and token["content"] not in specials for token in content.get("added_tokens") or []):
        return None

    texts = [text for text in model["vocab"] if text not in specials]
    if not all(text and BYTES.keys() >= set(text) for text in texts):
        return None
    complete = model["vocab"].keys() >= BYTES.keys()
    if not complete and (model.get("unk_token") or model.get("ignore_merges")):
        return None
    made = [left + right for left, right in pairs_of(model)]
    ids = [model["vocab"][text] for text in made]
    reachable = model.get("ignore_merges") or {text for text in texts if len(text) > 1} <= set(made)
    return pattern if reachable and ids == sorted(ids) else None


# -- tokenizer.json for bytes and tiktoken's vocabularies

def merges_of(tokens):
    """{token: id} -> all pairs of tokens whose union is a token, by its id: what tiktoken merges, as a list. (Of the
    pairs for one token only one ever meets; the others do no harm.)"""
    pairs = []
    for token in sorted(tokens, key=tokens.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs += [(left, right) for left, right in cuts if left in tokens and right in tokens]
    return pairs


def byte_level_files(tokens, pattern, specials, eot):
    """{token: id} of bytes, the regular expression whose matches are the words (None: GPT-2's) and {text: id} of
    special tokens -> {file name: text} that Hugging Face's libraries load."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def spell(token):
        return "".join(LETTERS[byte] for byte in token)

    vocab = {spell(token): i for token, i in tokens.items()} | specials
    merges = [(spell(left), spell(right)) for left, right in merges_of(tokens)]
    # tiktoken never splits a word that is a token.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pattern is not None))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(specials))
    end = next(text for text, i in specials.items() if i == eot)
    return {"tokenizer.json": backend.to_str(),
            "tokenizer_config.json": json.dumps({"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"})}

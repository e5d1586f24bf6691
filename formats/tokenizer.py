"""Text <-> token ids: UTF-8 bytes, a tiktoken vocabulary, or the tokenizer of a Hugging Face model.

    python -c "from formats.tokenizer import open_tokenizer; print(open_tokenizer('gpt2').encode('abc'))"

The library `tokenizers` reads a folder's tokenizer.json. A folder that has only tokenizer.model is
read by the library `sentencepiece`. The ids are those of transformers, with three exceptions:

1. A document must not be able to end itself, or to begin a turn of a chat. So a text that spells a
   special token ("</s>") is encoded as ordinary text. Three kinds of added tokens are special: those
   that the file marks as special, those that look like "<think>" or "[INST]", and those that
   tokenizer_config.json names as the beginning or end of a text.
2. If the token for unknown characters is the one that ends a text, such characters are left out.
3. With a tokenizer.model, a text that begins with a blank gets another blank in front, as every text
   does. sentencepiece does so, and transformers 5 does not.

A file that somebody sends runs no code. Only the files in FILES are read, from the folder itself.

Not done here: WordPiece, whose tokens do not say where blanks were; what a post-processor, truncation
or padding does to ids. What chat templates do: formats/chat.py.
"""
import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from common import UserError
from formats.chat import Template
from formats.tokenizer_json import (
    BLANK,
    BYTE_PIECE,
    BYTES,
    byte_level_files,
    name_of,
    refuse_unknown_spelling,
    spells_bytes,
    splits_at_lines,
)

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
         "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json")
# transformers keeps a chat template that has a name in a file of this folder.
NAMED_TEMPLATE = re.compile(r"additional_chat_templates/([\w-]+)\.jinja")

# Larger ids would be a table of gigabytes, and are some mistake (our choice; Gemma has 262,144 tokens).
LARGEST_VOCABULARY = 2**24

# The encodings of tiktoken whose regular expressions let no word reach across a line end before a
# letter or digit, and look no farther than that.
LINES_SPLIT = ("gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony")

# A text in which most ways to cut text into words, and so most tokenizers, differ.
PROBE = ("It's a'tb a'sb a'reb a'veb a'mb a'llb a'db I'LL A'TB A'LLB 1234567 x12 ٣٤٥  6 camelCase's "
         "q\u0301x naïve/\n\n (ok)!?\r\n/\t\tif x\n    y  +=   1 \n \n z 日本語かな、。한국어 हिन्दी 🙂 "
         "a\u00a0b\u3000c ... $5 #a_b <|x|>")


class Tokenizer:
    """What the four kinds of tokenizers share. A kind adds two methods: `ids(text, special)`, and
    `token_bytes(id)`, which is empty for an id that the vocabulary skips or does not reach.

    name        identifies the vocabulary: cached corpora and run folders go by it
    vocab_size  1 + the largest id
    eot, bos    the ids that close and open a document; bos may be None
    specials    {text: id} of the tokens that no document can spell
    splits_at_lines     whether a text may be cut behind a line end that stands between a character
                        that is no blank and a letter or digit: both parts have the ids of the whole
    files       {file name: content} that it was read from; {} for bytes and tiktoken's vocabularies
    opening     the ids that transformers puts in front of every text"""

    splits_at_lines = False

    def __init__(self, name, vocab_size, eot, bos=None, specials=None, files=None, opening=()):
        if vocab_size > LARGEST_VOCABULARY:
            raise UserError(f"the tokenizer {name!r} has an id {vocab_size - 1:,}, and ids up to "
                            f"{LARGEST_VOCABULARY:,} are read; correct the ids of its added tokens")
        self.name = name
        self.vocab_size = vocab_size
        self.eot = eot
        self.bos = bos
        self.specials = specials or {}
        self.files = files or {}
        self.opening = list(opening)
        self.dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")

    def encode(self, text, special=False):
        """str -> (N,) uint16 or uint32. With `special`, texts that spell special tokens become their
        ids. A lone surrogate, which UTF-8 cannot express, becomes "?"."""
        return np.asarray(self.ids(replace_surrogates(text), special)).astype(self.dtype)

    def encode_batch(self, texts):
        """List of str -> list of (N,) arrays."""
        return [self.encode(text) for text in texts]

    def encode_with_places(self, text, special=False):
        """-> what `encode` returns, and where each token begins and ends in the text, (N,) each, in
        characters. Raises UserError if the tokens do not add up to the text."""
        ids = self.encode(text, special)
        text = replace_surrogates(text)
        character_of_byte = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
        sizes = np.array([len(self.token_bytes(int(token))) for token in ids], int)
        ends = sizes.cumsum()
        if sizes.sum() != len(character_of_byte) or not sizes.all():
            raise UserError(f"the tokenizer {self.name!r} changes texts, so that prompts and answers cannot be told "
                            "apart; give a folder with a tokenizer.json")
        return ids, character_of_byte[ends - sizes], character_of_byte[ends - 1] + 1

    @functools.cached_property
    def chat_template(self):
        """The Template of the files, or None. Raises UserError if it is damaged."""
        config = read_json(self.files.get("tokenizer_config.json", "{}"), f"{self.name}: tokenizer_config.json")
        text = self.files.get("chat_template.jinja", config.get("chat_template"))
        if isinstance(text, list):               # of templates with names
            named = [entry for entry in text if isinstance(entry, dict) and entry.get("name") == "default"]
            text = named[0].get("template") if named else None
        if not isinstance(text, str):
            return None
        tokens = {}
        for key, token in config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(token, str):
                tokens[key] = token
        return Template(text, tokens, self.name)

    def decode(self, ids):
        """Sequence of ids -> str. Bytes that are not UTF-8 become U+FFFD. A blank that `encode` put
        before a text is left out again."""
        parts = []
        text_begins = self.adds_blank
        for token in map(int, ids):
            part = self.token_bytes(token)
            parts.append(part.removeprefix(b" ") if text_begins else part)
            text_begins = self.adds_blank and token in (self.eot, self.bos)
        return b"".join(parts).decode("utf-8", errors="replace")

    @functools.cached_property
    def adds_blank(self):
        """Whether `encode` puts a blank before a text, as Llama 2 does, whose "a" is " a"."""
        first = self.encode("a")[:1]
        return len(first) == 1 and self.token_bytes(int(first[0])).startswith(b" ")

    def byte_lengths(self):
        """-> (vocab_size,) int64: how many UTF-8 bytes of text each token stands for; 0 for special
        tokens.

        The sum over a text is the denominator of bits per byte. It is exact unless the tokenizer
        changes or lacks characters of the text. A blank that `encode` puts before a text counts as
        one byte a document."""
        lengths = np.array([len(self.token_bytes(token)) for token in range(self.vocab_size)])
        lengths[[self.eot, *self.specials.values()]] = 0
        return lengths

    def refuse_fewer_rows(self, rows, path):
        """Raise UserError if the model at `path`, whose embedding has so many rows, lacks one for some
        token."""
        if self.vocab_size > rows:
            raise UserError(f"the tokenizer {self.name!r} has ids up to {self.vocab_size - 1}, the embedding of {path} "
                            f"{rows} rows; take the tokenizer that the model was trained with")

    def as_files(self):
        """-> {file name: content} that Hugging Face's libraries load; {} if they would make other
        ids of it, as they may of a tiktoken vocabulary."""
        return self.files


def replace_surrogates(text):
    return text.encode("utf-8", errors="replace").decode()


class Bytes(Tokenizer):
    """UTF-8 bytes. NUL is the end of a text; `encode` drops a NUL that a text holds."""

    splits_at_lines = True

    def __init__(self, eot=0):
        super().__init__("bytes", 256, eot)

    def ids(self, text, special):
        return np.frombuffer(text.encode().replace(b"\0", b""), np.uint8)

    def token_bytes(self, token):
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
        eot = encoding.eot_token if eot is None else eot
        self.splits_at_lines = name in LINES_SPLIT
        super().__init__(name, vocab_size, eot, specials=specials)

    def ids(self, text, special):
        if special:
            return self.encoding.encode(text, allowed_special="all")
        # (tiktoken finds special tokens here before version 0.11.)
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def token_bytes(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""

    def as_files(self):
        # tiktoken's "{1,3}+" takes up to three and gives none back. To `tokenizers` it would mean
        # {1,3} again and again. At the end of an alternative plain {1,3} is the same as tiktoken's.
        pattern = self.encoding._pat_str.replace("{1,3}+", "{1,3}")
        files = byte_level_files(self.encoding._mergeable_ranks, pattern, self.specials, self.eot)
        ids = HuggingFace(self.name, files).encode(PROBE)
        return files if ids.tolist() == self.encode(PROBE).tolist() else {}


class HuggingFace(Tokenizer):
    """A tokenizer.json, read by the library `tokenizers`. Raises UserError, with `where` in it, if a
    file is damaged or the tokens do not say which bytes they stand for.

    backend  the library's tokenizer, which finds no special tokens in a text
    added    {id: the library's AddedToken}, as the file has them"""

    def __init__(self, where, files):
        content = read_json(files["tokenizer.json"], f"{where}: tokenizer.json")
        config = read_json(files.get("tokenizer_config.json", "{}"), f"{where}: tokenizer_config.json")
        refuse_unknown_spelling(content, where)
        try:
            self.backend = open_backend(files)
        except Exception as problem:             # the library raises nothing more specific
            raise UserError(f"{where}: tokenizer.json is damaged ({problem}): copy it again") from problem
        self.is_byte_level = spells_bytes(content)
        self.splits_at_lines = splits_at_lines(content)
        self.added = self.backend.get_added_tokens_decoder()

        added = {token.content: i for i, token in self.added.items() if token.content}
        eot, bos = named_ends(config, added, where)
        if eot is None:
            raise UserError(f"{where} does not say which token ends a document; put \"eos_token\", one "
                            f"of the {len(added)} added tokens of tokenizer.json, into "
                            "tokenizer_config.json")
        specials = {text: i for text, i in added.items()
                    if looks_special(self.added[i]) or i in (eot, bos)}
        if content["model"].get("unk_id") == eot:
            raise UserError(f"{where}: the token for unknown characters is the one that ends a document; "
                            "name another \"eos_token\" in tokenizer_config.json")
        if content["model"].get("type") == "Unigram" and content["model"].get("unk_id") is None:
            raise UserError(f"{where}: the Unigram model of tokenizer.json has no \"unk_id\", so that no unknown "
                            "character can be encoded; copy it again")
        forbid(self.backend, specials, (eot, bos), where)
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        if len(set(ids)) < len(ids):
            raise UserError(f"{where}: tokenizer.json has one id for two tokens; copy it again")
        super().__init__(name_of(content, specials, eot, bos), 1 + max(ids), eot, bos, specials, files,
                         opening_ids(self.backend))

    @functools.cached_property
    def unguarded(self):
        """The library's tokenizer as the file has it, which does find special tokens in a text."""
        return open_backend(self.files)

    def ids(self, text, special):
        backend = self.unguarded if special else self.backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text, special=False):
        backend = self.unguarded if special else self.backend
        encoding = backend.encode(replace_surrogates(text), add_special_tokens=False)
        begins, ends = np.array(encoding.offsets, int).reshape(-1, 2).T
        # The library may leave out a token's first blank. The tokens of one character all have its place.
        begins = np.minimum(begins, np.concatenate([[0], ends])[:-1])
        return np.asarray(encoding.ids).astype(self.dtype), begins, ends

    def encode_batch(self, texts):
        # The library encodes the texts of a batch in parallel, on all cores.
        texts = [replace_surrogates(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids).astype(self.dtype) for encoding in encodings]

    def token_bytes(self, token):
        text = self.backend.id_to_token(token) or ""
        if not self.is_byte_level:
            return piece_bytes(text)
        if token in self.added or not BYTES.keys() >= set(text):
            return text.encode()
        return bytes(BYTES[letter] for letter in text)

    def __reduce__(self):
        # The library's own pickle forgets `encode_special_tokens`, so the files are read again.
        return HuggingFace, (self.name, self.files)


class SentencePiece(Tokenizer):
    """A tokenizer.model, read by the library `sentencepiece`. tokenizer_config.json and
    added_tokens.json may add tokens, which come behind its own. Raises UserError, with `where` in it,
    if a file is damaged, the library is missing, or documents could end themselves."""

    def __init__(self, where, files):
        self.model = open_model(files["tokenizer.model"], where)
        config = read_json(files.get("tokenizer_config.json", "{}"), f"{where}: tokenizer_config.json")
        added = added_tokens(files, config, where)
        size = self.model.piece_size()
        own = [i for i in range(size) if self.model.is_control(i) or self.model.is_unknown(i)]
        specials = {self.model.id_to_piece(i): i for i in own}
        specials |= {text: i for text, i in added.items() if i >= size}
        eot, bos = named_ends(config, specials | added, where)
        if eot is None:
            eot = self.model.eos_id()
        if bos is None and self.model.bos_id() >= 0:
            bos = self.model.bos_id()
        if eot < 0:                              # the library's way to say none
            raise UserError(f"{where} does not say which token ends a document; put \"eos_token\" into "
                            "tokenizer_config.json")
        if eot < size and not self.model.is_control(eot):
            raise UserError(f"{where}: a document may spell the token that ends it, "
                            f"{self.model.id_to_piece(eot)!r}, as it is no control symbol of "
                            "tokenizer.model; name another \"eos_token\" in tokenizer_config.json")
        self.texts = {i: text for text, i in specials.items()}
        vocab_size = max(size, 1 + max(self.texts, default=0))
        makes_ids = files["tokenizer.model"] + json.dumps([sorted(specials.items()), eot, bos]).encode()
        name = f"spm-{hashlib.sha256(makes_ids).hexdigest()[:16]}"
        # Llama's tokenizers put the beginning of a text in front unless the file says otherwise.
        opening = [bos] if bos is not None and config.get("add_bos_token", True) else []
        super().__init__(name, vocab_size, eot, bos, specials, files, opening)

    def ids(self, text, special):
        if not special:
            return self.model.encode(text)
        longest_first = sorted(self.specials, key=len, reverse=True)
        any_special = "|".join(re.escape(text) for text in longest_first)
        ids = []
        for part in re.split(f"({any_special})", text):
            ids += [self.specials[part]] if part in self.specials else self.model.encode(part)
        return ids

    def token_bytes(self, token):
        if token in self.texts:
            return self.texts[token].encode()
        return piece_bytes(self.model.id_to_piece(token)) if token < self.model.piece_size() else b""

    def __reduce__(self):
        return SentencePiece, (self.name, self.files)


# -- the two libraries

def open_backend(files):
    """The library's tokenizer of a tokenizer.json, which neither cuts nor fills up texts."""
    import tokenizers
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    backend.no_truncation()
    backend.no_padding()
    return backend


def forbid(backend, specials, ends, where):
    """Make the library's tokenizer encode texts that spell special tokens as ordinary text.
    specials: {text: id}. ends: the ids that close and open a document. Raises UserError, with `where`
    in it, if that cannot be done."""
    import tokenizers
    from tokenizers import pre_tokenizers
    unknown = getattr(backend.model, "unk_token", None)
    if unknown in specials and specials[unknown] in ends:
        backend.model.unk_token = None
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in specials])
    backend.encode_special_tokens = True

    # Now the library does not look for special tokens. But a model may find one among its own tokens:
    # a Unigram model does, as it has them with the best score of all. So after all other steps a text
    # is cut behind the first character of each special token that the model would find.
    patterns = []
    for text, token in specials.items():
        if [piece.id for piece in backend.model.tokenize(text)] != [token]:
            continue
        if len(text) == 1:
            raise UserError(f"{where}: the special token {text!r} is a single character, which any "
                            "document may hold; make it a longer text in tokenizer.json")
        patterns.append(f"{re.escape(text[0])}(?={re.escape(text[1:])})")
    if patterns:
        steps = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        cut = pre_tokenizers.Split(tokenizers.Regex("|".join(patterns)), "merged_with_previous")
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, cut])


def opening_ids(backend):
    """The ids that a post-processor puts in front of a text, as Llama 3's <|begin_of_text|>."""
    encoding = backend.encode("a")
    ids = []
    for token, sequence in zip(encoding.ids, encoding.sequence_ids):
        if sequence is not None:                 # the text begins
            break
        ids.append(token)
    return ids


def open_model(content, where):
    """The content of a tokenizer.model -> the library's SentencePieceProcessor."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError(f"{where} has a tokenizer.model and no tokenizer.json, which the package "
                        "sentencepiece reads: pip install sentencepiece") from None
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError as problem:
        # Llama 3's original file of this name is tiktoken's: a token in base64 and its rank in each line.
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content):
            raise UserError(f"{where}: tokenizer.model is a list of tiktoken's tokens and not SentencePiece's file; "
                            "give the folder that has a tokenizer.json, too") from problem
        reason = " ".join(str(problem).split())
        raise UserError(f"{where}: tokenizer.model is damaged ({reason}): copy it again") from problem
    return model


def piece_bytes(piece):
    """SentencePiece's spelling of a token -> the bytes that it stands for."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(BLANK, " ").encode()


# -- files and folders

def open_tokenizer(name, files=None):
    """"bytes", the name of a tiktoken encoding, or a Hugging Face folder or its tokenizer.json ->
    Tokenizer. With `files`, {file name: content}, it is made of these, and `name` is for messages; with
    {} the name is never a folder's. Raises UserError if the name is unknown, the tokenizer not
    supported, or a vocabulary cannot be downloaded."""
    if files is not None:
        check_files(name, files)
    if files:
        return from_files(name, files)
    if name == "bytes":
        return Bytes()
    import tiktoken
    names = ["bytes", *tiktoken.list_encoding_names()]
    path = Path(name)
    if files is None and name not in names and path.exists():
        is_file = path.name in ("tokenizer.json", "tokenizer.model")
        return from_files(name, read_files(path.parent if is_file else path))
    try:
        return Tiktoken(name, tiktoken.get_encoding(name))
    except ValueError as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(f"no tokenizer {name!r} ({reason}): give one of {', '.join(names)}, or a folder "
                        "with a tokenizer.json") from problem
    except OSError as problem:
        raise UserError(f"vocabulary {name!r} cannot be downloaded ({type(problem).__name__}): connect "
                        "once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer "
                        "bytes") from problem


def check_files(where, files):
    """Raise UserError if `files`, which may come out of a checkpoint that somebody sent, is no {file
    name: content} with the names of FILES."""
    if not isinstance(files, dict):
        raise UserError(f"{where}: the tokenizer's files are {type(files).__name__} and no dictionary; take the "
                        "tokenizer from another checkpoint")
    for name, content in files.items():
        if name not in FILES and not NAMED_TEMPLATE.fullmatch(str(name)):
            raise UserError(f"{where}: {name!r} is no file of a tokenizer; those are {', '.join(FILES)}: "
                            "take the tokenizer from another checkpoint")
        kind = bytes if name == "tokenizer.model" else str
        if not isinstance(content, kind):
            raise UserError(f"{where}: {name} is {type(content).__name__}, and must be {kind.__name__}; take the "
                            "tokenizer from another checkpoint")


def has_tokenizer(files):
    """Whether `files`, {file name: content}, hold a tokenizer."""
    return "tokenizer.json" in files or "tokenizer.model" in files


def from_files(where, files):
    """{file name: content} of a Hugging Face folder -> Tokenizer."""
    if "tokenizer.json" in files:
        return HuggingFace(where, files)
    if "tokenizer.model" in files:
        return SentencePiece(where, files)
    raise UserError(f"{where} holds no tokenizer.json: give the folder of a Hugging Face model that does, or one with "
                    "a tokenizer.model")


def read_json(text, where):
    """-> dict. Raises UserError if `text` (str or bytes), the content of the file `where`, is not a
    JSON object."""
    try:
        return {**json.loads(text)}
    except (ValueError, TypeError, RecursionError) as problem:
        raise UserError(f"{where} is not a JSON object ({problem}): copy it again") from problem


def read_files(folder):
    """A Hugging Face folder -> {file name: content} of those of FILES that it has, and of its named chat
    templates.

    Contents are str. That of tokenizer.model is bytes; it is left out if there is a tokenizer.json.
    If there is no tokenizer_config.json, `config_from_ids` makes a minimal one. Without a tokenizer
    only generation_config.json is left, which `with_ids` completes. Raises UserError if a file is not
    UTF-8 or not JSON, or if a chat template has an odd name."""
    files = {}
    templates = [f"additional_chat_templates/{path.name}" for path in Path(folder).glob("additional_chat_templates/*")]
    for name in (*FILES, *sorted(templates), "config.json"):
        path = Path(folder, name)
        if not path.is_file():
            continue
        content = path.read_bytes()
        try:
            files[name] = content if path.suffix == ".model" else content.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise UserError(f"{path} is not UTF-8 text (byte {problem.start}): copy it again") from problem
    config = read_json(files.pop("config.json", "{}"), f"{folder}/config.json")
    check_files(folder, files)
    generation = with_ids(files.get("generation_config.json"), config, f"{folder}/generation_config.json")
    if generation:
        files["generation_config.json"] = generation
    if not has_tokenizer(files):
        return {name: files[name] for name in files if name == "generation_config.json"}
    if "tokenizer.json" not in files:
        return files
    files.pop("tokenizer.model", None)
    if "tokenizer_config.json" not in files:
        content = read_json(files["tokenizer.json"], f"{folder}/tokenizer.json")
        made = config_from_ids(config, content)
        if made:
            files["tokenizer_config.json"] = json.dumps(made)
    return files


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_ids(text, config, where):
    """The text of a generation_config.json or None, with the ids that only config.json has: a list of
    ends of a text, and the padding, which a tokenizer does not know."""
    ids = {key: config[key] for key in SPECIAL_IDS if config.get(key) not in (None, [])}
    if text is None:
        says_more = isinstance(ids.get("eos_token_id"), list) or "pad_token_id" in ids
        return json.dumps(ids) if says_more else None
    generation = read_json(text, where)
    missing = [key for key in ids if generation.get(key) is None]
    if not missing:
        return text
    return json.dumps({**generation, **{key: ids[key] for key in missing}})


def special_ids(files, vocab_size, where):
    """{"eos_token_id": id or list of ids, …} of a generation_config.json among `files`. Raises
    UserError if an id is none of the `vocab_size` tokens. (A padding of -1 means none.)"""
    generation = read_json(files.get("generation_config.json", "{}"), f"{where}: generation_config.json")
    ids = {}
    for key in SPECIAL_IDS:
        value = generation.get(key)
        if value is None or value == [] or (key == "pad_token_id" and value == -1):
            continue
        for token in value if isinstance(value, list) else [value]:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise UserError(f"{where}: {key} {value!r:.80} of generation_config.json or config.json is none of "
                                f"the model's {vocab_size} token ids; correct it")
        ids[key] = value
    return ids


def config_from_ids(config, content):
    """A model's config.json and its tokenizer.json -> a tokenizer_config.json (dict) with the texts of
    config's bos_token_id and eos_token_id (of a list the first); {} if it names no added tokens."""
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
    """Whether no text may spell this added token: it is marked as special, or looks like "<think>" or
    "[INST]"."""
    return token.special or re.fullmatch(r"<.+>|\[.+\]", token.content) is not None


def named_ends(config, added, where):
    """The ids of the tokens that close and open a document, each an id or None. tokenizer_config.json
    names them; if it does not name the closing one, it goes by a usual name. Raises UserError if a
    named one is not among `added`, {text: id}."""
    ends = []
    for key, usual in (("eos_token", ("<|endoftext|>", "<|end_of_text|>", "</s>")), ("bos_token", ())):
        text = config.get(key)
        if isinstance(text, dict):
            text = text.get("content")
        if text is not None and (not isinstance(text, str) or text not in added):
            raise UserError(f"{where}: {key} {text!r} of tokenizer_config.json is not among the "
                            f"{len(added)} added tokens of the tokenizer; correct one of the two")
        names = usual if text is None else (text,)
        ends.append(next((added[name] for name in names if name in added), None))
    return ends


def added_tokens(files, config, where):
    """{text: id} of what tokenizer_config.json and added_tokens.json add to a tokenizer.model."""
    added = read_json(files.get("added_tokens.json", "{}"), f"{where}: added_tokens.json")
    try:
        for token, entry in (config.get("added_tokens_decoder") or {}).items():
            added[entry["content"]] = int(token)
        added = {str(text): int(token) for text, token in added.items()}
        if min(added.values(), default=0) < 0:
            raise ValueError(f"an id of {min(added.values())}")
        return added
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
        raise UserError(f"{where}: the added tokens are damaged ({type(problem).__name__}: {problem}): "
                        "copy tokenizer_config.json and added_tokens.json again") from problem

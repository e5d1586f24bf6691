"""A tokenizer in llama.cpp's terms, as a GGUF file holds it.

llama.cpp has a tokenizer of its own for each kind. It reads byte-level BPE as "gpt2", SentencePiece's
BPE as "llama" and its Unigram as "t5". formats/gguf_export.py adds the vocabulary to the file that it
writes; formats/llamacpp.py compares llama.cpp's ids with ours.

Two differences are known. Added tokens that are not special ("<think>") come out of plain text in
llama.cpp, as at Hugging Face, and not in ours. llama.cpp puts a blank before a text that begins with a
blank; a tokenizer.json with the pre-tokenizer Metaspace does not.
"""
import base64
import json
import re
from dataclasses import dataclass, field

from common import UserError
from formats.tokenizer import NAMED_TEMPLATE, PROBE, from_files, special_ids
from formats.tokenizer_json import (
    BYTE_PIECE,
    GPT2,
    LETTERS,
    LLAMA3,
    PRE_TOKENIZERS,
    QWEN2,
    SMOLLM2,
    pairs_of,
    spells_bytes,
    steps_of,
)

# llama.cpp's names for the ways to cut text into words.
RULES = {"gpt-2": GPT2, "smollm": SMOLLM2, "llama-bpe": LLAMA3, "qwen2": QWEN2}


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file is written by the package gguf: pip install gguf") from None
    return gguf


@dataclass
class Vocabulary:
    """`texts`, `types` and `scores` go by id."""
    kind: str                                    # "gpt2", "llama" or "t5"
    texts: dict[int, str]
    types: dict[int, int]                        # gguf.TokenType, where it is not NORMAL
    scores: dict[int, float] = field(default_factory=dict)      # of SentencePiece's tokens
    merges: list[str] = field(default_factory=list)             # of byte-level BPE
    rule: str = "default"                        # of RULES, for byte-level BPE
    charsmap: bytes = b""                        # SentencePiece's table of characters to replace
    removes_blanks: bool = False                 # whether several blanks in a row become one


def add_vocabulary(writer, tokenizer, size):
    """Add the key-values of a tokenizer to a gguf.GGUFWriter, for an embedding of `size` rows. Rows that
    no token has are called [PAD<id>]. Raises UserError if there are too few rows, or if llama.cpp does
    not tokenize as `tokenizer`."""
    tokenizer.refuse_fewer_rows(size, "the model")
    kinds = import_gguf().TokenType
    vocabulary = vocabulary_of(tokenizer)
    types = {**dict.fromkeys(vocabulary.texts, kinds.NORMAL), **vocabulary.types}
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list([vocabulary.texts.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([int(types.get(i, kinds.UNUSED)) for i in range(size)])
    if vocabulary.kind == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores([float(vocabulary.scores.get(i, -1000)) for i in range(size)])
        writer.add_add_space_prefix(tokenizer.adds_blank)
        writer.add_remove_extra_whitespaces(vocabulary.removes_blanks)
        unknown = next((i for i, kind in types.items() if kind == kinds.UNKNOWN), None)
        if unknown is not None:
            writer.add_unk_token_id(unknown)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)

    ids = special_ids(tokenizer.files, size, tokenizer.name)
    add_ends(writer, tokenizer, ids)
    # A beginning of text is always given, because llama.cpp would choose one by itself.
    beginnings = [*tokenizer.opening[:1], tokenizer.bos, tokenizer.eot]
    writer.add_bos_token_id(next(i for i in beginnings if i is not None))
    writer.add_add_bos_token(bool(tokenizer.opening))
    padding = ids.get("pad_token_id", tokenizer.specials.get(named_padding(tokenizer)))
    if padding is not None:
        writer.add_pad_token_id(padding)
    template = chat_template(tokenizer)
    if template:
        writer.add_chat_template(template)


def add_ends(writer, tokenizer, ids):
    """Add the tokens that end a text. llama.cpp has names for three: of a text, a turn and a message. It
    stops at any, and at others that it knows by their texts."""
    writer.add_eos_token_id(tokenizer.eot)
    ends = ids.get("eos_token_id", [])
    others = [token for token in (ends if isinstance(ends, list) else [ends]) if token != tokenizer.eot]
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others):
        add(token)


def named_padding(tokenizer):
    """The text of the padding token that tokenizer_config.json names, or None."""
    token = json.loads(tokenizer.files.get("tokenizer_config.json", "{}")).get("pad_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def chat_template(tokenizer):
    """A model's chat template: a text; a list of {"name", "template"} if some have names; or None. Raises
    UserError for a template that a GGUF file cannot hold, and names it."""
    config = json.loads(tokenizer.files.get("tokenizer_config.json", "{}"))
    given = tokenizer.files.get("chat_template.jinja") or config.get("chat_template") or []
    templates = [{"name": "default", "template": given}] if isinstance(given, str) else list(given)
    for file, content in tokenizer.files.items():
        named = NAMED_TEMPLATE.fullmatch(file)
        if named:
            templates.append({"name": named[1], "template": content})
    keys = set()
    for template in templates:
        is_plain = isinstance(template, dict) and isinstance(template.get("template"), str)
        name = template.get("name") if is_plain else None
        if not isinstance(name, str) or re.sub(r"\W", "_", name) in keys:
            raise UserError(f"the chat template {str(template)[:60]!r} of {tokenizer.name!r} has no text, or no name "
                            "of its own; correct tokenizer_config.json, or export with --to hf")
        keys.add(re.sub(r"\W", "_", name))
    if keys == {"default"}:
        return templates[0]["template"]
    return templates


def vocabulary_of(tokenizer):
    """A Tokenizer -> Vocabulary. Raises UserError if llama.cpp does not tokenize so."""
    files = tokenizer.as_files()
    if not files:
        raise unknown_rule(tokenizer.name, tokenizer.encoding._pat_str)
    if "tokenizer.json" not in files:
        return model_vocabulary(tokenizer)
    name = tokenizer.name
    if tokenizer.files != files:                 # bytes, or a tiktoken vocabulary
        tokenizer = from_files(name, files)
    content = json.loads(files["tokenizer.json"])
    if content["model"].get("type") == "Unigram":
        return unigram_vocabulary(name, content, tokenizer)
    if spells_bytes(content):
        return byte_level_vocabulary(name, content, tokenizer)
    return bpe_vocabulary(name, content, tokenizer)


# -- what is refused

def unknown_rule(name, how):
    return UserError(f"the vocabulary {name!r} cuts text into words by {how}, and we know llama.cpp's "
                     f"rules {', '.join(RULES)} only; export with --to hf")


def unigram_with_bytes(name):
    return UserError(f"the vocabulary {name!r} is a Unigram model that spells unknown characters as bytes, "
                     "and llama.cpp's has no such tokens; export with --to hf")


def changed_characters(name, how):
    return UserError(f"the vocabulary {name!r} changes the characters of a text by {how}, and llama.cpp "
                     "does not with this kind; export with --to hf")


# -- the kinds

def texts_and_types(tokenizer):
    """The tokens of a tokenizer.json: {id: text}, {id: type}. Added tokens are CONTROL if the file calls
    them special, else USER_DEFINED."""
    kinds = import_gguf().TokenType
    texts = {}
    for i in range(tokenizer.vocab_size):
        text = tokenizer.backend.id_to_token(i)
        if text is not None:
            texts[i] = text
    types = {}
    for i, token in tokenizer.added.items():
        types[i] = kinds.CONTROL if token.special else kinds.USER_DEFINED
    return texts, types


def pieces_and_types(tokenizer, unknown):
    """The same of SentencePiece's tokens. unknown: the id for unknown characters, or None."""
    kinds = import_gguf().TokenType
    texts, types = texts_and_types(tokenizer)
    for i, text in texts.items():
        if BYTE_PIECE.fullmatch(text):
            types[i] = kinds.BYTE
    if unknown is not None:
        types[unknown] = kinds.UNKNOWN
    return texts, types


def byte_level_vocabulary(name, content, tokenizer):
    """Byte-level BPE, as GPT-2's."""
    texts, types = texts_and_types(tokenizer)
    merges = [" ".join(pair) for pair in pairs_of(content["model"])]
    if not merges:
        # Bytes have none, and the library writes no empty list. No text holds NUL twice.
        merges = [f"{LETTERS[0]} {LETTERS[0]}"]
    return Vocabulary("gpt2", texts, types, merges=merges, rule=rule_of(name, tokenizer))


def rule_of(name, tokenizer):
    """The key of RULES that cuts PROBE into the same words as `tokenizer`. Raises UserError if there is
    none. (cl100k_base counts as "llama-bpe". The two differ in blank lines at the very end of a text,
    which cl100k_base leaves one word.)"""
    import tokenizers
    pre_tokenizer = tokenizer.unguarded.pre_tokenizer
    words = pre_tokenizer.pre_tokenize_str(PROBE)
    empty = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    for rule, pattern in RULES.items():
        steps = [{"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step
                 for step in PRE_TOKENIZERS[pattern]]
        empty["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        known = tokenizers.Tokenizer.from_str(json.dumps(empty)).pre_tokenizer
        if known.pre_tokenize_str(PROBE) == words:
            return rule
    raise unknown_rule(name, pre_tokenizer)


def bpe_vocabulary(name, content, tokenizer):
    """SentencePiece's BPE. llama.cpp merges the two tokens whose union has the best score, so a token's
    score is minus the number of the merge that makes it."""
    model = content["model"]
    if not model.get("byte_fallback"):
        raise UserError(f"the vocabulary {name!r} has no tokens for single bytes, which llama.cpp needs "
                        "with SentencePiece's BPE; export with --to hf")
    for step in steps_of(content.get("normalizer"), "normalizers"):
        if step["type"] not in ("Prepend", "Replace"):
            raise changed_characters(name, step["type"])
    texts, types = pieces_and_types(tokenizer, model["vocab"].get(model.get("unk_token")))
    pairs = pairs_of(model)
    scores = dict.fromkeys(texts, -len(pairs))   # tokens that no merge makes
    # The first merge of a token counts, so it is set last.
    for number, (left, right) in reversed(list(enumerate(pairs))):
        scores[model["vocab"][left + right]] = -number
    return Vocabulary("llama", texts, types, scores)


def unigram_vocabulary(name, content, tokenizer):
    """SentencePiece's Unigram model."""
    model = content["model"]
    if model.get("byte_fallback"):
        raise unigram_with_bytes(name)
    texts, types = pieces_and_types(tokenizer, model.get("unk_id"))
    scores = {i: score for i, (_, score) in enumerate(model["vocab"])}
    vocabulary = Vocabulary("t5", texts, types, scores)
    for step in steps_of(content.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            vocabulary.charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            vocabulary.removes_blanks = True
        elif step["type"] not in ("Strip", "Prepend", "Replace"):
            raise changed_characters(name, step["type"])
    return vocabulary


def model_vocabulary(tokenizer):
    """A tokenizer.model. It holds what llama.cpp wants, and its types have the same numbers."""
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    except ImportError:
        raise UserError("the tokens of a tokenizer.model are read by the packages sentencepiece and "
                        "protobuf: pip install sentencepiece protobuf") from None
    proto = ModelProto.FromString(tokenizer.files["tokenizer.model"])
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        kind = "t5"
        if proto.trainer_spec.byte_fallback:
            raise unigram_with_bytes(tokenizer.name)
    elif proto.trainer_spec.model_type == TrainerSpec.BPE:
        kind = "llama"
        if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
            raise changed_characters(tokenizer.name, normalizer.name)
    else:
        raise UserError(f"the vocabulary {tokenizer.name!r} is neither BPE nor Unigram; export with --to hf")
    vocabulary = Vocabulary(kind, {}, {}, charsmap=normalizer.precompiled_charsmap,
                            removes_blanks=normalizer.remove_extra_whitespaces)
    for i, piece in enumerate(proto.pieces):
        vocabulary.texts[i] = piece.piece
        vocabulary.types[i] = piece.type
        vocabulary.scores[i] = piece.score
    for text, i in tokenizer.specials.items():
        if i not in vocabulary.texts:            # an added token
            vocabulary.texts[i] = text
            vocabulary.types[i] = import_gguf().TokenType.CONTROL
    return vocabulary

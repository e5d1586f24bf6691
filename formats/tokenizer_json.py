"""What a tokenizer.json says besides what the library `tokenizers` reads: how its tokens spell bytes, and
a name for what it does. And a tokenizer.json for bytes and for tiktoken's vocabularies.

    python -c "from formats import tokenizer; print(tokenizer.open_tokenizer('a/model/folder').name)"

Here a tokenizer.json is `content`, the dict that json.loads makes of it.
"""
import hashlib
import json
import re

from common import UserError

# Byte-level BPE spells bytes as printable characters (openai/gpt-2, encoder.py): a printable byte as
# itself, the others as U+0100, U+0101, …
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE = sorted(set(range(256)) - set(PRINTABLE))
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + number): byte for number, byte in enumerate(UNPRINTABLE)}
LETTERS = {byte: letter for letter, byte in BYTES.items()}

# SentencePiece spells a blank as U+2581. The bytes of a character without a token are <0x00> … <0xFF>.
BLANK = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


# -- how tokens are spelled

def steps_of(step, members):
    """A normalizer, pre-tokenizer or decoder as a list of steps (dicts): of a sequence its members."""
    if step is None:
        return []
    return step[members] if step.get("type") == "Sequence" else [step]


def spells_bytes(content):
    """Whether a tokenizer.json spells bytes as GPT-2 does."""
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    steps = steps + steps_of(content.get("decoder"), "decoders")
    return any(step.get("type") == "ByteLevel" for step in steps)


def refuse_unknown_spelling(content, where):
    """Raise UserError if the tokens of a tokenizer.json do not say which bytes of text they stand for,
    or if its ids are drawn at random."""
    remedy = ("give one with byte-level BPE as GPT-2, Llama 3, Qwen and SmolLM2 have it, or with "
              "SentencePiece's BPE or Unigram as Llama 2, Mistral and Gemma")
    try:
        model = content["model"]
        kind = model.get("type", "BPE")
        steps = [content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
        says_bytes = spells_bytes(content) or BLANK in json.dumps(steps, ensure_ascii=False)
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{where}: tokenizer.json is damaged ({type(problem).__name__}: {problem}): "
                        "copy it again") from problem
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"{where}: tokenizer.json has a {kind} model; {remedy}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{where}: tokenizer.json has {key} {model[key]!r}; {remedy}")
    if not says_bytes:
        pre_tokenizer = json.dumps(content.get("pre_tokenizer"))[:200]
        raise UserError(f"{where}: tokenizer.json has pre-tokenizer {pre_tokenizer}, and does not say "
                        f"how its tokens spell blanks; {remedy}")


# -- a name

def name_of(content, specials, eot, bos):
    """The name of a tokenizer.json: "json-" and 16 hex digits of a sha256 over what makes ids. Caches and
    run folders go by it. Neither the layout of the file nor the spelling of its merges matters."""
    model = {**content["model"], "merges": pairs_of(content["model"])}
    steps = [content.get("normalizer"), content.get("pre_tokenizer"), content.get("added_tokens")]
    parts = json.dumps([model, steps, sorted(specials.items()), eot, bos], sort_keys=True)
    return f"json-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def pairs_of(model):
    """The merges of a BPE model as pairs. Files spell them as pairs or as "left right"."""
    merges = model.get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]


# -- four ways to cut text into words, each as one regular expression and as the steps of a file

# (In SmolLM2's the digits are cut first, so that all blanks before a digit are one word. Its library
# knows 13 digits of Unicode 17 that are not yet in \\p{N}.)
GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s])|[\s]+")
DIGIT = "\\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6"
SMOLLM2 = (rf"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{{L}}]+|[{DIGIT}]| ?[^\s\p{{L}}{DIGIT}]+"
           rf"|[\s]+(?=[{DIGIT}])|[\s]+(?![^\s])|[\s]+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = {GPT2: [byte_level(True)],
                  SMOLLM2: [{"type": "Digits", "individual_digits": True}, byte_level(True)],
                  LLAMA3: [split(LLAMA3), byte_level(False)],
                  QWEN2: [split(QWEN2), byte_level(False)]}


def splits_at_lines(content):
    """Whether a tokenizer.json cuts text into words in one of these ways, of which none lets a word
    reach across a line end before a letter or digit, and no added token has or takes blanks."""
    patterns = []
    for step in steps_of(content.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2] if step.get("use_regex", True) else []
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step.get("pattern", {}).get("Regex"))
        elif step.get("type") != "Digits":
            return False
    keeps_lines = content.get("normalizer") in (None, {"type": "NFC"})
    for token in content.get("added_tokens") or []:
        takes_blanks = token.get("lstrip") or token.get("rstrip")
        keeps_lines = keeps_lines and not takes_blanks and not re.search(r"\s", token.get("content", ""))
    return keeps_lines and bool(patterns) and {GPT2, LLAMA3, QWEN2} >= set(patterns)


# -- a tokenizer.json for bytes and for tiktoken's vocabularies

def merges_of(tokens):
    """{token: id} -> all pairs of tokens whose union is a token, in the order of its id. That is what
    tiktoken merges. (Of the pairs for one token only one ever meets; the others do no harm.)"""
    pairs = []
    for token in sorted(tokens, key=tokens.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs += [(left, right) for left, right in cuts if left in tokens and right in tokens]
    return pairs


def byte_level_files(tokens, pattern, specials, eot):
    """-> {file name: text} that Hugging Face's libraries load. tokens: {bytes: id}. pattern: the regular
    expression whose matches are the words; None for GPT-2's. specials: {text: id}."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def spell(token):
        return "".join(LETTERS[byte] for byte in token)

    vocab = {spell(token): i for token, i in tokens.items()} | specials
    merges = [(spell(left), spell(right)) for left, right in merges_of(tokens)]
    # A word that is a token stays one, as in tiktoken.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pattern is not None))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(specials))
    end = next(text for text, i in specials.items() if i == eot)
    config = {"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config)}

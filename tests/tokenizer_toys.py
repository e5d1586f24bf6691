"""Small SentencePiece tokenizers, trained in a second, for the tests of formats/tokenizer.py and its exports."""
import io
import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

BLANK = "\u2581"
TEXTS = ["def read(path):\n    return open(path).read()\n", "the other thing is the reader of the text, there and here",
         "It's the reader's: 1234 and 56.7, naïve café", "日本語の文 and かな, русский текст",
         "a  b\tc   d\n\n\ne  f"] * 20
ENDS = ["<unk>", "<s>", "</s>"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
BLANKS_AND_BYTES = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]


def trained_tokens(size):
    """A BPE model of `size` tokens whose words begin with BLANK, as the dict "model" of a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=60))
    return json.loads(tokenizer.to_str())["model"]


def bpe():
    """Llama's model: unknown, begin, end, 256 bytes, and then what was trained."""
    model = trained_tokens(300)
    tokens = ENDS + BYTE_PIECES + sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ENDS])
    return tokenizer


def llama2():
    """As in Llama 2's and TinyLlama's tokenizer.json: a blank before every text, and no words."""
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence([*BLANKS_AND_BYTES, decoders.Strip(" ", 1, 0)])
    return tokenizer


def mistral():
    """As in Mistral's newer files and as transformers 5 writes Llama 2's: a blank before a text that has none."""
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([*BLANKS_AND_BYTES, decoders.Strip(" ", 1, 0)])
    return tokenizer


def gemma():
    """As in Gemma's: no blank before a text; line ends and tags are added tokens that are not special."""
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(BLANKS_AND_BYTES)
    tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False),
                          AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def unigram(byte_fallback=False):
    """As in T5's: a Unigram model, which has its special tokens among its own with the best scores. (Not trained: the
    trainer makes another one each time. Without "aa" there are no two equally good ways to cut "aaa".)"""
    tokens = trained_tokens(300)["vocab"]
    tokens = [token for token in sorted(tokens, key=tokens.get) if all(a != b for a, b in zip(token, token[1:]))]
    vocab = [(text, 0.0) for text in ENDS] + [(token, -2 - 0.73 * i**0.5) for i, token in enumerate(reversed(tokens))]
    if byte_fallback:
        vocab += [(piece, -30.0) for piece in BYTE_PIECES]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, 0, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ENDS])
    return tokenizer


KINDS = {"llama2": llama2, "mistral": mistral, "gemma": gemma, "unigram": unigram,
         "unigram with bytes": lambda: unigram(byte_fallback=True)}


def json_files(kind, **config):
    """The files of a folder with tokenizer.json."""
    config = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    return {"tokenizer.json": KINDS[kind]().to_str(), "tokenizer_config.json": json.dumps(config)}


def model_files(model_type="bpe", **options):
    """The files of a folder that has only tokenizer.model, as MobileLLM's and older Llama's."""
    import sentencepiece
    settings = dict(vocab_size=600, model_type=model_type, byte_fallback=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, character_coverage=0.98, hard_vocab_limit=False,
                    max_sentence_length=10_000, minloglevel=2)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings | options)
    config = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer",
              "legacy": False}
    return {"tokenizer.model": model.getvalue(), "tokenizer_config.json": json.dumps(config)}


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder

"""Text <-> token ids: UTF-8 bytes, or a tiktoken vocabulary.

    python -c "from tokenizer import open_tokenizer; print(open_tokenizer('bytes').encode('abc'))"
"""
import numpy as np

from common import UserError


class Tokenizer:
    """Text <-> token ids. No `encoding`: UTF-8 bytes, and NUL, which text does not contain (`encode` drops it), is the
    end of text. Else a tiktoken.Encoding; its `name` must identify the vocabulary, as cached shards go by it."""

    def __init__(self, name, encoding=None, eot=None):
        self.name, self.encoding = name, encoding
        self.vocab_size = encoding.n_vocab if encoding else 256
        self.eot = eot if eot is not None else encoding.eot_token if encoding else 0
        self.dtype = np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")

    def encode(self, text):
        """str -> (N,) uint16 or uint32. A text that spells "<|endoftext|>" gets ordinary tokens: documents cannot forge
        their own end. A lone surrogate, which UTF-8 cannot express, becomes "?"."""
        utf8 = text.encode("utf-8", errors="replace")
        if self.encoding:
            return self.encoding.encode_to_numpy(utf8.decode(), disallowed_special=()).astype(self.dtype)
        return np.frombuffer(utf8.replace(b"\0", b""), np.uint8).astype(self.dtype)

    def token_bytes(self, token):
        """One id -> bytes; none for ids that the vocabulary skips or does not reach (a padded embedding)."""
        try:
            return self.encoding.decode_single_token_bytes(token) if self.encoding else bytes([token])
        except (KeyError, ValueError):
            return b""

    def decode(self, ids):
        """Sequence of ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def byte_lengths(self):
        """-> (vocab_size,) int64: the UTF-8 bytes of text that each token stands for, 0 for special ones. Their sum
        over a text is the denominator of bits per byte."""
        special = {self.eot} | (set(self.encoding._special_tokens.values()) if self.encoding else set())
        return np.array([0 if i in special else len(self.token_bytes(i)) for i in range(self.vocab_size)])


def open_tokenizer(name):
    """"bytes" or a tiktoken encoding's name -> Tokenizer. UserError: unknown, or it cannot be downloaded."""
    if name == "bytes":
        return Tokenizer("bytes")
    import tiktoken
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except ValueError as problem:
        known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise UserError(f"no tokenizer {name!r} ({str(problem).splitlines()[0]}): give one of {known}") from problem
    except OSError as problem:
        raise UserError(f"vocabulary {name!r} cannot be downloaded ({type(problem).__name__}): connect once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bytes") from problem

"""Byte-pair vocabularies as other programs write and read them: bytes as characters, tokenizer.json, tiktoken's ranks."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regpt.tokenizers import END_OF_TEXT
from regpt.tokenizers.patterns import PATTERNS

JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
RANKS_FILE = "ranks.tiktoken"

Merge = tuple[str, str]
"""Two tokens as vocabulary files write them, each a byte's character or an earlier merge's token."""


def _byte_of_char() -> dict[str, int]:
    """Bytes by the character that vocabulary files write: itself if printable, else one from U+0100 on."""
    hidden = iter(range(256, 512))
    printable = [chr(b).isprintable() and b != ord(" ") for b in range(256)]
    return {chr(b if printable[b] else next(hidden)): b for b in range(256)}


BYTE_OF_CHAR = _byte_of_char()
CHAR_OF_BYTE = {b: c for c, b in BYTE_OF_CHAR.items()}
# To the character of the byte's own value; what stands for no byte, to one that Latin-1 lacks.
_LATIN_1 = dict.fromkeys(range(256), "\N{REPLACEMENT CHARACTER}") | {
    ord(c): chr(b) for c, b in BYTE_OF_CHAR.items()
}
ALPHABET = sorted(BYTE_OF_CHAR)
"""Of the ids 0 to 255, in GPT-2's order: that of the characters."""


def token_bytes(written: str) -> bytes:
    """The bytes of a token as vocabulary files write it. Raises KeyError for what stands for no byte."""
    try:
        return written.translate(_LATIN_1).encode("latin-1")
    except UnicodeEncodeError as e:
        raise KeyError(written[e.start]) from None


def written_token(token: bytes) -> str:
    """A token as vocabulary files write it."""
    return "".join([CHAR_OF_BYTE[b] for b in token])


def vocabulary(merges: Iterable[Merge]) -> dict[str, int]:
    """Ids by token as vocabulary files write it: 256 bytes, then what each merge makes."""
    return {token: i for i, token in enumerate([*ALPHABET, *(a + b for a, b in merges)])}


def splitting(pattern: str) -> dict[str, Any]:
    """tokenizer.json's `pre_tokenizer`."""
    return _split(PATTERNS[pattern].json)


def _split(regex: str | None) -> dict[str, Any]:
    """By a regular expression; None: as the format's own byte level does."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex is None}
    if regex is None:
        return level
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def tokenizer_json(
    merges: Sequence[Merge], special_tokens: Mapping[str, int], pre_tokenizer: Mapping[str, Any]
) -> bytes:
    """tokenizer.json, the format of the library `tokenizers`, which transformers and many others read."""
    added = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token, i in special_tokens.items()
    ]
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        "vocab": vocabulary(merges) | dict(special_tokens),
        "merges": merges,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False).encode()


def gigatoken_json(merges: Sequence[Merge], pattern: str) -> bytes:
    """tokenizer.json for gigatoken, which knows splits by their exact spelling; without special tokens."""
    return tokenizer_json(merges, {}, _split(PATTERNS[pattern].gigatoken or PATTERNS[pattern].json))


def transformers_config(special_tokens: Sequence[str]) -> bytes:
    """tokenizer_config.json, for `transformers.AutoTokenizer.from_pretrained`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "additional_special_tokens": list(special_tokens),
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=2).encode() + b"\n"


def tiktoken_ranks(tokens: Iterable[bytes]) -> bytes:
    """A file for `tiktoken.load.load_tiktoken_bpe`: each token in base64, and its rank."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))

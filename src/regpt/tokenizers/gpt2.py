"""GPT-2's own tokenizer, token for token: OpenAI's two files, from a folder, a cache or the network."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from regpt.paths import user_path
from regpt.tokenizers.byte_pairs import BytePairTokenizer
from regpt.tokenizers.download import cache_folder, fetch, kept
from regpt.tokenizers.files import read_file, require_sha256

# As OpenAI published them and tiktoken pins them (tiktoken_ext/openai_public.py).
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
FOLDER_VARIABLE = "REGPT_GPT2_FILES"
URL_VARIABLE = "REGPT_GPT2_URL"
"""Environment: a mirror to download from instead of URL."""
BY_HAND = (
    f"where there is a network, get {' and '.join(f'{URL}/{name}' for name in SHA256)}; "
    f"then name their folder by --tokenizer-files FOLDER (of train: --tokenizer.files) or {FOLDER_VARIABLE}=FOLDER"
)


class GPT2Tokenizer(BytePairTokenizer):
    """50,257 ids: 256 bytes, 50,000 merges, `<|endoftext|>`.

    Args:
        contents: the published files by name. encoder.json adds nothing to vocab.bpe; other programs want it.
    """

    kind = "gpt2"

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self._contents = contents
        _version, *merges = contents["vocab.bpe"].decode().splitlines()
        super().__init__([(a, b) for a, b in (merge.split(" ") for merge in merges)])

    def _files(self) -> Mapping[str, bytes]:
        return self._contents


def open_gpt2(files: str | None = None) -> GPT2Tokenizer:
    """GPT-2's tokenizer. A folder that is named must have the two files; without one they are looked for.

    In order: the folder `files` (setting tokenizer.files); the folder REGPT_GPT2_FILES; tiktoken's cache, if
    TIKTOKEN_CACHE_DIR is set; regpt's; the network. Raises DataError naming the file or URL, and a way out.
    """
    if folder := files or os.environ.get(FOLDER_VARIABLE):
        return load(user_path(folder))
    return GPT2Tokenizer({name: _found(name) for name in SHA256})


def load(folder: Path) -> GPT2Tokenizer:
    """The tokenizer whose files lie in `folder`. Raises DataError: one is missing or not the published one."""
    contents = {}
    for name, sha256 in SHA256.items():
        contents[name] = read_file(folder / name, BY_HAND)
        require_sha256(contents[name], sha256, folder / name, BY_HAND)
    return GPT2Tokenizer(contents)


def gpt2_is_here() -> bool:
    """Whether open_gpt2() would find both files, as published, on this machine. Touches no network."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return all(kept(user_path(folder) / name, sha256) for name, sha256 in SHA256.items())
    return all(_kept(name) for name in SHA256)


def _kept(name: str) -> bytes | None:
    """The file out of tiktoken's cache or ours."""
    if theirs := os.environ.get("TIKTOKEN_CACHE_DIR"):  # where a file is named by the sha1 of its URL
        sha1 = hashlib.sha1(f"{URL}/{name}".encode(), usedforsecurity=False)
        if (content := kept(Path(theirs) / sha1.hexdigest(), SHA256[name])) is not None:
            return content
    return kept(cache_folder() / "gpt2" / name, SHA256[name])


def _found(name: str) -> bytes:
    if (content := _kept(name)) is not None:
        return content
    url = f"{os.environ.get(URL_VARIABLE) or URL}/{name}"
    return fetch(url, sha256=SHA256[name], keep=cache_folder() / "gpt2" / name, hint=BY_HAND)

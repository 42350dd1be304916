"""Data sets by a short name: where on the hub they lie, what they hold, and what they were published as."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A published data set. Sizes are rounded, from its page."""

    about: str
    spec: str | None = None
    """`hf:…`, as `--data.source` takes it. None: regpt gets it another way."""
    val_spec: str | None = None
    """Where its own validation text lies, if not in a split of `spec`."""
    val_split: str | None = None
    """Its own validation split. None: it has none."""
    download: str
    tokens: str
    """Of GPT-2's tokenizer, in the training text."""
    licence: str


EDU = "hf:HuggingFaceFW/fineweb-edu"
STORIES = "hf:roneneldan/TinyStories"
NAMED_SETS = {
    "shakespeare": NamedSet(
        about="Tiny Shakespeare: one text, split by position (for characters and for BPE)",
        download="1.1 MB",
        tokens="0.30 M",
        licence="public domain",
    ),
    "python-stdlib": NamedSet(
        about="the Python library's source on this machine",
        download="nothing",
        tokens="2 to 5 M",
        licence="PSF",
    ),
    "tinystories": NamedSet(
        about="short stories in a child's words, by GPT-3.5 and GPT-4",
        spec=STORIES,
        val_split="validation",
        download="1.0 GB",
        tokens="474 M",
        licence="CDLA-Sharing-1.0",
    ),
    "tinystories-v2": NamedSet(
        about="the same by GPT-4 alone",
        spec=f"{STORIES}:TinyStoriesV2-GPT4-train.txt",
        val_spec=f"{STORIES}:TinyStoriesV2-GPT4-valid.txt",
        val_split="validation",
        download="2.2 GB",
        tokens="540 M",
        licence="CDLA-Sharing-1.0",
    ),
    "wikitext-103": NamedSet(
        about="good and featured articles of Wikipedia, raw; rows are joined into articles",
        spec="hf:Salesforce/wikitext:wikitext-103-raw-v1",
        val_split="validation",
        download="0.3 GB",
        tokens="118 M",
        licence="CC-BY-SA-3.0 and GFDL",
    ),
    "openwebtext": NamedSet(
        about="pages that Reddit linked to: WebText, rebuilt",
        spec="hf:Skylion007/openwebtext",
        download="24 GB",
        tokens="9.04 G",
        licence="CC0-1.0 (the packaging; the pages are their authors')",
    ),
    "fineweb-edu-10bt": NamedSet(
        about="educational web pages, a sample of 10 G tokens",
        spec=f"{EDU}:sample-10BT",
        download="28 GB",
        tokens="10 G",
        licence="ODC-By-1.0",
    ),
    "fineweb-edu-100bt": NamedSet(
        about="the same, 100 G tokens",
        spec=f"{EDU}:sample-100BT",
        download="280 GB",
        tokens="100 G",
        licence="ODC-By-1.0",
    ),
    "fineweb-edu-350bt": NamedSet(
        about="the same, 350 G tokens",
        spec=f"{EDU}:sample-350BT",
        download="1 TB",
        tokens="350 G",
        licence="ODC-By-1.0",
    ),
    "fineweb-edu": NamedSet(
        about="the same, all of it",
        spec=f"{EDU}:default",
        download="4 TB or more",
        tokens="1.3 T or more",
        licence="ODC-By-1.0",
    ),
}
ROWS_ARE_LINES = ("Salesforce/wikitext", "wikitext")
"""Repositories whose rows are lines of articles, not documents."""

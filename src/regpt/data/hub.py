"""Data sets of the Hugging Face hub, or of a mirror of it: `hf:owner/name[:config][@revision]` as a list of files.

What a repository holds is asked once a commit and kept; its files are downloaded one by one when they are reached, the
next one meanwhile, and are checked against the hashes that the hub lists. Everything lies in regpt's cache folder:

    hub/<owner>--<name>/refs/<revision>.json      the commit that a revision was last seen at
    hub/<owner>--<name>/trees/<commit>.json       its files with sizes and hashes, and its README
    hub/<owner>--<name>/files/<hash>/<file>       a file, whole: the same in all commits that have it

unless the files are only to pass (`Files.passing`: at most two of them lie in a folder of the caller's), or are read where
they are (`Files.ranged`).

Heard from the environment: HF_ENDPOINT (a mirror), HF_TOKEN (gated and private sets), HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import quote, urlsplit

from regpt.data.download import (
    ATTEMPTS,
    HUB,
    LOCK,
    PART,
    Client,
    Note,
    RemoteFile,
    Unreachable,
    beside,
    offline,
    size_of,
    unheard,
)
from regpt.data.layout import choose
from regpt.data.ranged import RangedFile
from regpt.errors import ConfigError, DataError
from regpt.tokenizers.download import cache_folder
from regpt.tokenizers.files import write_file
from regpt.train.durable import make_folder

PREFIX = "hf:"
SPEC = re.compile(r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>[^@]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
MAIN = "main"
CONVERTED = "refs/convert/parquet"  # the branch where the hub keeps its own conversion of what is no parquet
TREE_FORMAT = 1
ELSEWHERE = "REGPT_CACHE=FOLDER on another disk"
MOST_PAGES = 10_000  # of a thousand files each
SAID_S = 10.0  # between two sentences about one download
RANGED_FILES = 8  # whose footers are kept in memory


class _NotThere(DataError):
    """The hub has no such data set, revision or file."""


@dataclass(frozen=True)
class Spec:
    """What `hf:…` asks for."""

    repo: str
    config: str | None
    revision: str

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Of `hf:owner/name[:config][@revision]`. Raises ConfigError where it is something else."""
        match = SPEC.fullmatch(text)
        if match is None or ".." in text:
            raise ConfigError(
                f"{text!r} does not name a data set of the hub.",
                expected="hf:owner/name[:config][@revision]",
                hint="hf:roneneldan/TinyStories, hf:HuggingFaceFW/fineweb-edu:sample-10BT",
            )
        return cls(match["repo"], match["config"], match["revision"] or MAIN)


@dataclass(frozen=True)
class Entry:
    """A file of a repository."""

    path: str
    size: int
    digest: str
    """sha256 of the content, or git's sha1 of a small file."""


@dataclass(frozen=True)
class Tree:
    """A repository at one commit."""

    commit: str
    files: tuple[Entry, ...]
    readme: str | None


@dataclass
class Files:
    """The files of one split, here or to come."""

    spec: str
    """With the commit: what is asked for again finds the same."""
    commit: str
    entries: tuple[Entry, ...]
    folder: Path
    url: str
    """Of the repository at the commit; a file's path follows."""
    client: Client | None
    """None: offline; what is not here cannot be had."""
    note: Note
    passing: Path | None = None
    """Where a file that is not in the cache comes to, until it is discarded. None: into the cache, to stay."""
    _coming: dict[int, threading.Thread] = field(default_factory=dict, init=False)
    _failed: dict[int, BaseException] = field(default_factory=dict, init=False)
    _ranged: OrderedDict[int, RangedFile] = field(default_factory=OrderedDict, init=False)
    _given: set[int] = field(default_factory=set, init=False)
    """Files that somebody reads, if they are only to pass."""
    _discarded: int = field(default=0, init=False)
    """So many files from the first on are done with."""

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which download and read by themselves."""
        of_this_process: dict[str, Any] = {
            "_coming": {},
            "_failed": {},
            "_ranged": OrderedDict(),
            "_given": set(),
        }
        return self.__dict__ | of_this_process

    def path(self, number: int) -> Path:
        """Where the file lies or will lie."""
        entry = self.entries[number]
        within = Path(entry.digest[:16], entry.path.rpartition("/")[2])
        if self.passing is None or _has_size(self.folder / within, entry.size):
            return self.folder / within
        return self.passing / within

    @property
    def landing(self) -> Path:
        """The folder that files are downloaded into."""
        return self.passing or self.folder

    def is_here(self, number: int) -> bool:
        """Whether it is here, whole."""
        return _has_size(self.path(number), self.entries[number].size)

    @property
    def missing_bytes(self) -> int:
        """What is still to be downloaded, parts that are here counted as here."""
        return sum(map(self._missing, range(self._discarded, len(self.entries))))

    @property
    def room_bytes(self) -> int:
        """What the disk must have free for that: of files that only pass, for the largest two that follow each other."""
        if self.passing is None:
            return self.missing_bytes
        missing = [self._missing(n) for n in range(self._discarded, len(self.entries))]
        return max(map(sum, zip(missing, [*missing[1:], 0], strict=True)), default=0)

    def _missing(self, number: int) -> int:
        if self.is_here(number):
            return 0
        size = self.entries[number].size
        return size - min(size_of(beside(self.path(number), PART)), size)

    def local(self, number: int) -> Path:
        """The file on this machine, downloaded now if need be; the one after it begins to come.

        Of files that only pass, it begins when no other one lies here.

        Raises:
            DataError: it cannot be had; the message says how to get it otherwise.
        """
        if (thread := self._coming.pop(number, None)) is not None:
            thread.join()
            if (error := self._failed.pop(number, None)) is not None:
                raise error
        if not self.is_here(number):
            self._fetch(number, check_room=True)
        self._given.add(number)
        if self.passing is None or len(self._given) == 1:
            self._begin(number + 1)
        return self.path(number)

    def ranged(self, number: int) -> RangedFile | None:
        """The file to read from its server without a copy; None where it is on this machine."""
        if self.is_here(number):
            return None
        file = self._ranged.pop(number, None)
        if file is None:
            client, entry = self._online(number), self.entries[number]
            file = RangedFile(client, self._remote(entry), f"{entry.path} of {self.spec}")
        self._ranged[number] = file  # the one that was used last stands last
        if len(self._ranged) > RANGED_FILES:
            self._ranged.popitem(last=False)
        return file

    def discard_before(self, number: int) -> None:
        """Remove what came only to pass, up to this file; the one behind those that are read begins to come."""
        if self.passing is None:
            return
        number = min(number, len(self.entries))
        done, self._discarded = range(self._discarded, number), max(number, self._discarded)
        self._given -= set(done)
        # Equal files of one name share a place.
        needed = {self.path(n) for n in {*self._given, *self._coming}}
        for path in {self.path(n) for n in done} - needed:
            if path.is_relative_to(self.passing):
                for suffix in ("", PART, LOCK):
                    beside(path, suffix).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
        if len(self._given) == 1:
            self._begin(max(self._given) + 1)

    def _begin(self, number: int) -> None:
        if number < len(self.entries) and not self.is_here(number) and number not in self._coming:
            self._coming[number] = threading.Thread(target=self._ahead, args=(number,), daemon=True)
            self._coming[number].start()

    def _ahead(self, number: int) -> None:
        try:
            self._fetch(number)
        except BaseException as e:  # said when the file is needed
            self._failed[number] = e

    def _fetch(self, number: int, *, check_room: bool = False) -> None:
        entry, client = self.entries[number], self._online(number)
        began = said = monotonic()
        began_with: int | None = None

        def progress(have: int) -> None:
            nonlocal said, began_with
            began_with = have if began_with is None else began_with
            if (now := monotonic()) - said > SAID_S:
                said, rate = now, (have - began_with) / (now - began)
                left = f", {self.missing_bytes / rate / 60:,.0f} min left for all" if rate else ""
                self.note(
                    f"downloading {entry.path}: {have / 1e6:,.0f} of {entry.size / 1e6:,.0f} MB, file {number + 1} of "
                    f"{len(self.entries)}, {rate / 1e6:,.1f} MB/s{left}"
                )

        try:
            if check_room:
                self._check_room()
            client.fetch(self._remote(entry), self.path(number), progress)
        except OSError as e:  # of the disk; those of the network are told apart before
            raise DataError(
                f"cannot write {e.filename or self.path(number)}: {e.strerror or e}.", hint=self._elsewhere
            ) from None

    def _remote(self, entry: Entry) -> RemoteFile:
        return RemoteFile(self.url + quote(entry.path), entry.size, entry.digest)

    def _online(self, number: int) -> Client:
        """Who asks for the file; raises DataError where nobody may."""
        if self.client is None:
            raise DataError(
                f"{self.entries[number].path} of {self.spec} is not on this machine, and HF_HUB_OFFLINE is set.",
                got=f"{sum(map(self.is_here, range(len(self.entries))))} of {len(self.entries)} files in {self.folder}",
                hint="unset HF_HUB_OFFLINE once, or copy regpt's cache folder from a machine that has them",
            )
        return self.client

    @property
    def _elsewhere(self) -> str:
        return ELSEWHERE if self.passing is None else "free some space, or --out on another disk"

    def _check_room(self) -> None:
        """Refuse before the first byte what cannot fit."""
        make_folder(self.landing)
        free, needed = shutil.disk_usage(self.landing).free, self.room_bytes
        if needed > free:
            raise DataError(
                f"disk full: {self.spec} takes {needed / 1e9:,.1f} GB more in {self.landing}.",
                got=f"{free / 1e9:,.1f} GB free",
                hint=self._elsewhere,
            )


def find(
    text: str,
    split: str = "train",
    *,
    network: bool = True,
    note: Note = unheard,
) -> Files:
    """The files of a split of a data set; none is downloaded yet.

    Args:
        text: `hf:owner/name[:config][@revision]`.
        network: False asks nobody and knows only what was asked before; nothing is written.

    Raises:
        DataError: there is no such data set, configuration or split, or nothing that can be read; no network.
    """
    spec = Spec.parse(text)
    hub = _Hub(spec.repo, network and not offline(), note)
    tree = hub.tree(hub.commit(spec.revision))
    chosen = _choose(tree, spec, split)
    if chosen is None:
        if spec.revision != MAIN and tree.commit != hub.commit(MAIN):
            raise DataError(
                f"{spec.repo} has no files at {spec.revision} that are read without a script, and the hub's own conversion "
                f"to parquet is of {MAIN} as it is now.",
                hint=f"{PREFIX}{spec.repo} takes that conversion; or convert {spec.revision}, then name the folder",
            )
        note(
            f"{spec.repo} has no files that are read without a script: taking the hub's own conversion to parquet"
        )
        with contextlib.suppress(_NotThere):
            tree = hub.tree(hub.commit(CONVERTED))
            chosen = _choose(tree, spec, split)
    if chosen is None:
        raise DataError(
            f"{spec.repo} holds nothing that regpt reads.",
            expected=f"parquet, JSONL or text, or a conversion in the branch {CONVERTED}",
            hint="download and convert it, then name the folder: regpt prepare FOLDER …",
        )
    at = f"{PREFIX}{spec.repo}{f':{spec.config}' if spec.config else ''}@{tree.commit}"
    url = f"{hub.endpoint}/datasets/{spec.repo}/resolve/{tree.commit}/"
    return Files(at, tree.commit, chosen, hub.folder / "files", url, hub.client, note)


def _choose(tree: Tree, spec: Spec, split: str) -> tuple[Entry, ...] | None:
    by_path = {e.path: e for e in tree.files if e.size}
    chosen = choose(list(by_path), tree.readme, spec.repo, spec.config, split)
    for path in chosen or ():
        if set("\\:") & set(path.rpartition("/")[2]):  # a folder or a drive where Windows keeps the cache
            raise DataError(
                f"{spec.repo} has a file whose name leads elsewhere on some systems.",
                got=path,
                hint="download it under another name, then name its folder: regpt prepare FOLDER …",
            )
    return None if chosen is None else tuple(by_path[p] for p in chosen)


class _Hub:
    """One repository, as the hub and our cache know it."""

    def __init__(self, repo: str, network: bool, note: Note) -> None:
        self.repo, self.note = repo, note
        self.endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        if not self.endpoint.startswith(("https://", "http://")):
            raise ConfigError(
                "HF_ENDPOINT is not an address.",
                got=self.endpoint[:80],
                expected="https://… of a mirror of the hub",
            )
        self.folder = cache_folder() / "hub" / repo.replace("/", "--")
        by_hand = (
            f"a mirror (HF_ENDPOINT=https://…); or download the files of {self.endpoint}/datasets/{repo}/tree/main by any "
            "means and name their folder: regpt prepare FOLDER …"
        )
        token = os.environ.get("HF_TOKEN") or None
        self.client = Client(self._refused, by_hand, token, note, sleep) if network else None

    def commit(self, revision: str) -> str:
        """The commit that a branch, tag or commit is now; without network, or an answer, the one it last was."""
        if COMMIT.fullmatch(revision):
            return revision
        kept = self.folder / "refs" / f"{quote(revision, safe='')}.json"
        before = _kept(kept).get("commit")
        if self.client is None:
            if not isinstance(before, str):
                raise self._unknown(f"the revision {revision}")
            return before
        url = f"{self.endpoint}/api/datasets/{self.repo}/revision/{quote(revision, safe='')}"
        try:
            now = self._json(url, attempts=2 if before else ATTEMPTS)[0].get("sha")
        except Unreachable as e:
            if not isinstance(before, str):
                raise
            self.note(f"{e.what} Going on with the commit that {revision} was before, {before[:8]}")
            return before
        if not isinstance(now, str) or not COMMIT.fullmatch(now):
            raise DataError(f"{url} names no commit.", got=repr(now), expected="40 hex digits under 'sha'")
        write_file(kept, json.dumps({"commit": now}).encode())
        return now

    def tree(self, commit: str) -> Tree:
        """The files at a commit: asked once, since a commit never changes."""
        kept = self.folder / "trees" / f"{commit}.json"
        values = _kept(kept)
        if values.get("format") != TREE_FORMAT:
            if self.client is None:
                raise self._unknown(f"the files at {commit[:8]}")
            values = self._ask_tree(commit)
            write_file(kept, json.dumps(values).encode())
        return Tree(commit, tuple(Entry(*f) for f in values["files"]), values["readme"])

    def _ask_tree(self, commit: str) -> dict[str, Any]:
        base = f"{self.endpoint}/api/datasets/{self.repo}/tree/{commit}"
        query = "recursive=true&expand=false"
        files: list[tuple[str, int, str]] = []
        for _ in range(MOST_PAGES):
            url = f"{base}?{query}"
            listed, headers = self._json(url, of=list)
            files += [
                _entry(f, url) for f in listed if not isinstance(f, dict) or f.get("type") != "directory"
            ]
            following = re.search(r'<([^>]+)>;\s*rel="?next', headers.get("Link") or "")
            if following is None:
                break
            query = urlsplit(
                following[1]
            ).query  # no more of it: a mirror may pass on links to the hub itself
        else:
            raise DataError(f"{base} has no end.", got=f"{len(files):,} files so far")
        readme = None
        if any(path == "README.md" for path, _, _ in files) and self.client:
            content, _ = self.client.get(f"{self.endpoint}/datasets/{self.repo}/resolve/{commit}/README.md")
            readme = content.decode("utf-8", "replace")
        return {"format": TREE_FORMAT, "files": files, "readme": readme}

    def _json(self, url: str, *, of: type = dict, attempts: int = ATTEMPTS) -> tuple[Any, Message]:
        assert self.client is not None
        content, headers = dataclasses.replace(self.client, attempts=attempts).get(url)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, of):
            kind = headers.get("Content-Type", "something of no type")
            raise DataError(
                f"{url} answers with something that is not the hub's API.",
                got=f"{kind}: {content[:60]!r}",
                hint="is HF_ENDPOINT right, or is a proxy's page in the way?",
            )
        return value, headers

    def _unknown(self, what: str) -> DataError:
        return DataError(
            f"{what} of {PREFIX}{self.repo} was never asked for on this machine, and the network is not to be used.",
            hint="unset HF_HUB_OFFLINE once, or copy regpt's cache folder from a machine that has it",
        )

    def _refused(self, url: str, status: int, headers: Message) -> DataError:
        """The error for an answer that will be the same the next time."""
        page, code = f"{self.endpoint}/datasets/{self.repo}", headers.get("X-Error-Code") or ""
        got = headers.get("X-Error-Message") or f"HTTP {status} at {url}"
        sent = "HF_TOKEN was sent" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
        if code == "GatedRepo" or status == 403:
            return DataError(
                f"{self.repo} is given only to those who accept its terms; {sent}.",
                got=got,
                hint=f"accept them at {page}, make a token at {self.endpoint}/settings/tokens, then HF_TOKEN=… regpt …",
            )
        if status == 401:
            return DataError(
                f"there is no data set {self.repo} at {self.endpoint}, or it is private; {sent}.",
                got=got,
                hint=f"look whether {page} is there; for a private one HF_TOKEN=… regpt …",
            )
        if status == 404:
            what = {
                "RepoNotFound": f"there is no data set {self.repo} at {self.endpoint}",
                "RevisionNotFound": f"{self.repo} has no such revision",
                "EntryNotFound": f"{self.repo} has no such file",
            }.get(code, f"{self.repo}: the data set, its revision or the file is not there")
            return _NotThere(f"{what}.", got=got, hint=f"look at {page}")
        return DataError(f"{self.endpoint} refuses {self.repo}.", got=got, hint=f"look at {page}")


def _entry(listed: Any, url: str) -> tuple[str, int, str]:
    """Path, size and hash of a file in the hub's list."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        large = listed.get("lfs") or {}
        path, size, digest = listed["path"], listed["size"], large.get("oid") or listed["oid"]
        plain = (
            isinstance(path, str)
            and path.isprintable()
            and not path.startswith("/")
            and ".." not in path.split("/")
        )
        if plain and isinstance(size, int) and size >= 0 and HASH.fullmatch(digest.removeprefix("sha256:")):
            return path, size, digest.removeprefix("sha256:")
    raise DataError(f"{url} lists a file without path, size or hash.", got=repr(listed)[:200])


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _kept(path: Path) -> dict[str, Any]:
    """What was kept there; {} where there is nothing, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    return {}

"""Which files of a repository are which part of its data set: by what its README says, else by how files are usually named.

A data set has configurations (subsets, languages, sizes), each of them splits (train, validation, test), each of them
files. The rules are those of the `datasets` library, whose loading scripts are left out: nothing of a repository is run.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from regpt.errors import DataError, did_you_mean, missing_package

DEFAULT = "default"
SHARDED = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}.*\..*")
CONVERTED = re.compile(r"([^/]+)/(partial[-/])?([^/]+)/\d{4,}\.parquet")
"""How the hub itself converts data sets: configuration, split; `partial` where it stopped at 5 GB."""
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
READABLE = re.compile(r"\.(parquet|(jsonl|ndjson|json|txt)(\.gz|\.xz|\.zst)?)$", re.IGNORECASE)
NOT_DATA = re.compile(
    r"(^|/)(dataset_infos?|dataset_dict|state|config|requirements|licen[cs]e|readme)\.(json|txt)$",
    re.IGNORECASE,
)
NOTHING = ("", "~", "null", "Null", "NULL")  # in YAML
TRUE = ("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON")
MOST_FRONT_MATTER = (
    2 << 20
)  # characters, some of a thousand languages have half a million; YAML is read slowly
MOST_NAME = 1000  # characters
MOST_PATTERNS = 10_000  # of one configuration

Splits = Mapping[str, Sequence[str]]
"""Paths of files, by split."""
Find = Callable[[], Splits]


def choose(
    paths: Sequence[str], readme: str | None, repo: str, config: str | None, split: str
) -> tuple[str, ...] | None:
    """The files of one split, in their order; None where the repository holds nothing that can be read without a script.

    Args:
        config: a configuration, or the path of a file or folder, or a glob; None: the only one, or the default.

    Raises:
        DataError: there is no such configuration or split, or several and none is named.
    """
    data = [p for p in paths if READABLE.search(p) and not NOT_DATA.search(p) and not _is_hidden(p)]
    configs = _declared(readme, data, repo) or _converted(data)
    if config is not None and config not in configs:
        if named := matching(data, config):
            return tuple(named)
        inside = config.rstrip("/") + "/"
        if under := [p for p in data if p.startswith(inside)]:
            configs = {config: partial(_usual, under, inside)}
    if not configs and data and f"{repo.rpartition('/')[2]}.py" not in paths:
        configs = {DEFAULT: partial(_usual, data, "")}
    if not configs:
        return None
    splits = configs[_pick(configs, config, repo)]()
    found = _one_form(splits.get(split, ()))
    if not splits or (split in splits and not found):
        return None
    if not found:
        at = f"{repo}{f':{config}' if config else ''}"
        if split == "train" and any(s.startswith("partial-") for s in splits):
            hint = "--split partial-train takes that part"
            raise DataError(
                f"{at} has only been converted in part.", got=f"the splits {', '.join(splits)}", hint=hint
            )
        raise DataError(
            f"{at} has no split {split!r}.{did_you_mean(split, splits)}",
            got=f"the splits {', '.join(splits)}",
            hint=f"--split {next(iter(splits))} (regpt train: --data.split)",
        )
    return tuple(found)


def _pick(configs: Mapping[str, Find], config: str | None, repo: str) -> str:
    """The configuration that is meant."""
    several = f"the configurations {', '.join(list(configs)[:40])}{' …' if len(configs) > 40 else ''}"
    if config is not None:
        if config not in configs:
            what = f"{repo} has no configuration {config!r}, and no such file.{did_you_mean(config, configs)}"
            raise DataError(what, got=several, hint=f"hf:{repo}:{next(iter(configs))}")
        return config
    if len(configs) == 1 or DEFAULT in configs:
        return DEFAULT if DEFAULT in configs else next(iter(configs))
    raise DataError(
        f"{repo} has several configurations.", got=several, hint=f"hf:{repo}:{next(iter(configs))}"
    )


# --- what the README says ---------------------------------------------------------------------------------------------


def _declared(readme: str | None, data: Sequence[str], repo: str) -> dict[str, Find]:
    """The configurations under `configs:` in the README's front matter."""
    front = re.match(r"---[ \t\r]*\n(.*?)\n---[ \t\r]*(\n|$)", readme or "", re.DOTALL)
    if front is None or not re.search(r"^configs:", front[1], re.MULTILINE):
        return {}
    try:
        import yaml
    except ImportError:
        raise missing_package("pyyaml", "data", "reading what a data set's README says") from None
    try:
        if len(front[1]) > MOST_FRONT_MATTER:
            raise ValueError(f"it has {len(front[1]):,} characters, more than {MOST_FRONT_MATTER:,}")
        # Texts, lists and mappings, nothing else: no merge (`<<`) that multiplies what the file holds.
        listed = yaml.load(front[1], Loader=yaml.BaseLoader)["configs"]
        if not isinstance(listed, list) or not all(isinstance(c, Mapping) for c in listed):
            raise ValueError("configs is not a list of configurations")
        configs = [{k: v for k, v in c.items() if v not in NOTHING} for c in listed]
        names = [_text(c.get("config_name", DEFAULT)) for c in configs]
        found = {name: _finder(c, data) for name, c in zip(names, configs, strict=True)}
        default = [n for n, c in zip(names, configs, strict=True) if c.get("default") in TRUE]
    except (yaml.YAMLError, TypeError, KeyError, ValueError, RecursionError) as e:
        said = f"there is no {e}" if isinstance(e, KeyError) else str(e)
        raise DataError(
            f"{repo}: the front matter of README.md cannot be read: {' '.join(said.split())[:300]}",
            hint=f"name the files: hf:{repo}:FOLDER, or a glob",
        ) from None
    return found | ({DEFAULT: found[default[0]]} if default else {})


def _finder(declared: Mapping[str, Any], data: Sequence[str]) -> Find:
    if "<<" in declared:
        raise ValueError("a configuration is merged from others by <<")
    folder = _text(declared.get("data_dir", "")).strip("/")
    inside = f"{folder}/" if folder and folder != "." else ""
    files = declared.get("data_files")
    patterns = None if files is None else _patterns(files)
    if patterns is not None and (count := sum(map(len, patterns.values()))) > MOST_PATTERNS:
        raise ValueError(f"data_files has {count:,} patterns, more than {MOST_PATTERNS:,}")

    def find() -> Splits:
        if patterns is None:
            return _usual([p for p in data if p.startswith(inside)], inside)
        return {s: [p for one in of for p in matching(data, inside + one)] for s, of in patterns.items()}

    return find


def _patterns(files: Any) -> dict[str, list[str]]:
    """data_files as a text, a list of texts, or a list of {split, path}."""
    if isinstance(files, Mapping):
        return {_text(split): _texts(of) for split, of in files.items()}
    if isinstance(files, list) and files and isinstance(files[0], Mapping):
        return {_text(f["split"]): _texts(f["path"]) for f in files}
    return {"train": _texts(files)}


def _texts(value: Any) -> list[str]:
    return [_text(v).removeprefix("./") for v in (value if isinstance(value, list) else [value])]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} stands where a name or a pattern should")
    if len(value) > MOST_NAME:
        raise ValueError(f"a name or pattern of {len(value):,} characters, more than {MOST_NAME:,}")
    return value


# --- how files are named ----------------------------------------------------------------------------------------------


def _converted(data: Sequence[str]) -> dict[str, Find]:
    """The hub's own conversion to parquet: <configuration>/<split>/0000.parquet."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(data):
        match = CONVERTED.fullmatch(path)
        if match is None:
            return {}
        split = f"{'partial-' if match[2] else ''}{match[3]}"
        found.setdefault(match[1], {}).setdefault(split, []).append(path)
    return {config: partial(dict, splits) for config, splits in found.items()}


def _usual(data: Sequence[str], inside: str) -> Splits:
    """The splits of files that nobody declared."""
    sharded: dict[str, list[str]] = {}
    for path in sorted(data):
        if match := SHARDED.fullmatch(path.removeprefix(inside)):
            sharded.setdefault(match[1], []).append(path)
    if sharded:
        return sharded
    for place in (_folders, _file_name):
        found = {s: [p for p in sorted(data) if _says(place(p.removeprefix(inside)), s)] for s in KEYWORDS}
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {"train": sorted(data)} if data else {}


def _folders(path: str) -> list[str]:
    return path.split("/")[:-1]


def _file_name(path: str) -> list[str]:
    return [path.rpartition("/")[2]]


def _says(names: Iterable[str], split: str) -> bool:
    words = "|".join(KEYWORDS[split])
    return any(re.search(rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)", name) for name in names)


def _one_form(paths: Sequence[str]) -> list[str]:
    """Of files in several forms those of the commonest, parquet before others."""
    form = {p: READABLE.search(p)[1].lower().partition(".")[0] for p in paths}  # type: ignore[index]
    counts = Counter(form.values())
    if not counts:
        return []
    kept = max(counts, key=lambda f: (counts[f], f == "parquet", f))
    return [p for p in paths if form[p] == kept]


def _is_hidden(path: str) -> bool:
    return any(name.startswith((".", "__")) for name in path.split("/"))


def matching(paths: Sequence[str], pattern: str) -> list[str]:
    """The paths that a glob names, sorted: `*` and `?` stay within a folder, `**` between slashes is any folders."""
    head = re.match(r"[^*?\[]*", pattern)[0]  # type: ignore[index]
    if head == pattern:
        return [pattern] if pattern in paths else []
    if len(pattern) > MOST_NAME:
        return []
    names = pattern.split("/") + (["*"] if pattern.endswith("/**") or pattern == "**" else [])
    fits = [None if name == "**" else re.compile(fnmatch.translate(name)).match for name in names]
    return sorted(p for p in paths if p.startswith(head) and _fit(p.split("/"), fits))


def _fit(names: Sequence[str], fits: Sequence[Callable[[str], object] | None]) -> bool:
    """Whether one name after the other fits; None: any number of them do."""
    ends = {0}  # how many names may be taken so far
    for fit in fits:
        if fit is None:
            ends = set(range(min(ends), len(names) + 1))
        else:
            ends = {n + 1 for n in ends if n < len(names) and fit(names[n])}
        if not ends:
            return False
    return len(names) in ends

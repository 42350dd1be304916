"""EleutherAI's evaluation harness on our models: any of its tasks, by `regpt eval --harness`, offline with local files too.

The harness brings tasks, prompts and figures; we answer its three questions with our own scoring and generation: how likely
is this continuation, how likely is this whole text, what comes next. Answers equal its Hugging Face model's on the same
weights: log-probabilities to rounding, greedy text exactly. One process; of a distributed run it asks rank 0 alone.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.errors import ConfigError, DataError, RegptError, did_you_mean, missing_package

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "lm_eval":
        raise
    raise missing_package("lm-eval", "eval", "--harness") from None

from regpt.evals.likelihood import Request, Scored, score
from regpt.infer.engine import complete
from regpt.infer.settings import SamplingSettings
from regpt.models import LanguageModel
from regpt.tokenizers import Tokenizer

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is finished, and of how much."""
NEW_TOKENS = 256  # where a task does not say how much to generate; lm-eval's own default
RESAMPLES = 1000  # of the bootstrap, for figures whose standard error has no formula (perplexity)
OFF: dict[
    str, tuple[object, ...]
] = {  # ways of generating that we lack, and the values that do not ask for them
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1, 1.0),
    "length_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "num_return_sequences": (None, 1),
}


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-eval with their rows in memory."""

    manager: Any
    loaded: list[Any]
    """lm-eval's own objects: tasks and groups of them."""
    names: tuple[str, ...]
    """As they were asked for."""


def open_tasks(
    names: Sequence[str], folder: Path | None = None, *, say: Callable[[str], None] = lambda text: None
) -> HarnessTasks:
    """The tasks by name, with their data: before any model is loaded.

    Args:
        names: tasks, groups or tags of lm-eval; * stands for anything.
        folder: task files (YAML) of one's own, beside lm-eval's; they may name local data (`dataset_path: json`) and may
            run code that lies beside them.
        say: told lm-eval's warnings.

    Raises:
        ConfigError: there is no such task, or no such folder; a task asks for a way of generating that we lack.
        DataError: a task's data cannot be had, or its file is not one.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"--harness-tasks {folder} is not a folder.", expected="a folder of task files (YAML)"
        )
    with _heard(say):
        manager = _manager(names, folder)
        known = manager.all_tasks
        loaded: list[Any] = []
        for name in names:
            found = sorted(manager.match_tasks([name])) if "*" in name else [name] * (name in known)
            if not found:
                raise ConfigError(
                    f"lm-eval has no task {name!r}.{did_you_mean(name, known)}",
                    hint="--harness-tasks DIR for a task file of your own; lm-eval ls tasks lists its own",
                )
            loaded += [item for one in found for item in _load(manager, one)]
    return HarnessTasks(manager, loaded, tuple(names))


def evaluate(
    tasks: HarnessTasks,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    num_fewshot: int | None = None,
    rows: int | None = None,
    device: str = "cpu",
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    batch_tokens: int | None = None,
    progress: Progress = lambda doing, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """lm-eval's figures by task: {"piqa": {"acc": 0.6, "acc_stderr": 0.01, …, "rows": 1838, "num_fewshot": 0}}.

    Args:
        num_fewshot: solved examples before each question; None: as each task says.
        rows: the first so many of each task; None: all.
        batch_tokens: in one forward pass; None: as suits the device.
        progress: told how far it is; say: told lm-eval's warnings.

    Raises:
        ConfigError: a task asks for a way of generating that we lack.
        DataError: a text has characters that the tokenizer lacks, or the rows are not what the task expects.
    """
    with _heard(say) as stderr:

        def shown(doing: str, done: int, total: int) -> None:
            with contextlib.redirect_stderr(stderr):  # which lm-eval does not have for now
                progress(doing, done, total)

        ours = HarnessModel(
            model, tokenizer, device=device, autocast=autocast, batch_tokens=batch_tokens, progress=shown
        )
        try:
            found = simple_evaluate(
                ours,
                tasks=tasks.loaded,
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=rows,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
        except RegptError:
            raise
        except Exception as e:
            if ours.at_work:
                raise  # a fault of ours
            raise DataError(
                f"lm-eval stops at {', '.join(tasks.names)}: {_said(e)}.",
                expected="rows with the fields that the task file names",
            ) from e
    return _figures(found)


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval brings no types
    """A model of ours as lm-eval asks for one."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        device: str = "cpu",
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        batch_tokens: int | None = None,
        progress: Progress = lambda doing, done, total: None,
    ) -> None:
        super().__init__()
        self.model, self.ids_of = model, tokenizer
        self._device, self.autocast, self.batch_tokens = device, autocast, batch_tokens
        self.progress, self.at_work = progress, False

    @property
    def eot_token_id(self) -> int:
        """What stands before an empty context."""
        return self.ids_of.eot_id

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        return self.model.config.block_size

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say."""
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches know it by."""
        return self.ids_of.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; `<|endoftext|>` written in it is text."""
        return self.ids_of.encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether every token is the likeliest) of each (context, continuation)."""
        with self._work():
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text in nats, in the windows that lm-eval prescribes."""
        with self._work():
            parts: list[Request] = []
            ends = [0]
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                parts += [Request(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, windows)]
                ends.append(len(parts))
            logprobs = [s.logprob for s in self._scored("reading texts", parts)]
            return [math.fsum(logprobs[a:b]) for a, b in itertools.pairwise(ends)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop string, `<|endoftext|>` or the most tokens asked for.

        A sampled request has its place for a seed: repeats of one differ, and another time all come out the same.
        """
        with self._work():
            texts = []
            for done, request in enumerate(requests):
                self.progress("generating", done, len(requests))
                texts.append(self._generated(request, seed=done))
            self.progress("generating", len(requests), len(requests))
            return texts

    def _generated(self, request: Any, seed: int) -> str:
        context, asked = request.args
        settings = generation(asked, seed)
        ids = self.tok_encode(context)
        # The context's end, with room for the answer, as lm-eval's own models cut it; where the model has less room than
        # was asked for, half of it, and generation slides on.
        room = self.max_length - settings.max_new_tokens
        kept = ids[-(room if room > 0 else max(1, self.max_length // 2)) :]
        with self.autocast():
            text = complete(self.model, self.ids_of, kept, settings)[0].text
        return str(postprocess_generated_text(text, list(settings.stop), None))

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        asked = []
        for (context, continuation), context_ids, ids in requests:
            if not ids:
                raise DataError(
                    f"the tokenizer leaves nothing of the answer {continuation!r} after {context[-40:]!r}.",
                    expected="an answer of its own tokens",
                )
            asked.append(Request(tuple(context_ids), tuple(ids)))
        return [(s.logprob, s.greedy) for s in self._scored("scoring answers", asked)]

    def _scored(self, doing: str, requests: list[Request]) -> list[Scored]:
        return score(
            self.model,
            requests,
            device=self._device,
            autocast=self.autocast,
            batch_tokens=self.batch_tokens,
            progress=lambda done, total: self.progress(doing, done, total),
        )

    @contextlib.contextmanager
    def _work(self) -> Iterator[None]:
        """While open, what goes wrong is ours and not lm-eval's; still so after it went wrong."""
        self.at_work = True
        yield
        self.at_work = False


def generation(asked: dict[str, Any], seed: int = 0) -> SamplingSettings:
    """lm-eval's words for how to generate, as ours. Raises ConfigError for a way that we lack."""
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
    until, sampled = kwargs.pop("until"), bool(kwargs.pop("do_sample"))
    temperature = float(kwargs.pop("temperature", 1.0))
    drawing = {name: kwargs.pop(name, None) for name in ("top_k", "top_p", "min_p")}
    drawing["top_k"] = drawing["top_k"] or None  # 0 is off
    settings = SamplingSettings(
        max_new_tokens=int(kwargs.pop("max_gen_toks")),
        temperature=temperature if sampled else 0.0,
        stop=tuple(dict.fromkeys(stop for stop in until if stop)),
        seed=seed,
        **(drawing if sampled else {}),
    )
    for name, value in kwargs.items():
        if value not in OFF.get(name, ()):
            raise ConfigError(
                f"a task of lm-eval asks for generation with {name}, which regpt does not have.",
                got=value,
                hint="a task file of your own without it: --harness-tasks DIR",
            )
    return settings


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of task files. Reading its own takes seconds, so they are left out where `folder` has every name."""
    try:
        if folder is not None:
            own = TaskManager(include_path=str(folder), include_defaults=False)
            if set(names) <= set(own.all_subtasks):
                return own
        return TaskManager(include_path=str(folder) if folder is not None else None)
    except Exception as e:
        raise DataError(f"lm-eval cannot read the task files in {folder}: {_said(e)}.") from e


def _load(manager: Any, name: str) -> list[Any]:
    """What lm-eval calls by that name, with its rows."""
    try:
        found = manager.load([name])
    except Exception as e:
        raise DataError(
            f"lm-eval cannot load the task {name}: {_said(e)}.",
            hint="its rows come from the Hugging Face hub: a machine that reaches it, or --harness-tasks DIR with a task "
            "file whose rows lie here (dataset_path: json, dataset_kwargs: data_files)",
        ) from e
    for task in found["tasks"].values():  # those within groups, too
        if task.OUTPUT_TYPE == "generate_until":
            generation(task.config.generation_kwargs or {})
    in_groups = {child for children in found["group_map"].values() for child in children}
    tops = [group for key, group in found["groups"].items() if key not in in_groups]
    return tops or list(found["tasks"].values())


def _figures(found: Any) -> dict[str, dict[str, Any]]:
    """lm-eval's results, keys as in `regpt eval --json`: the filter is named where it is not the only one."""
    made: dict[str, dict[str, Any]] = {}
    for task, results in found["results"].items():
        values: dict[str, Any] = {}
        for key, value in results.items():
            figure, comma, kind = key.partition(",")
            if not comma or isinstance(value, str):  # names, and errors that are N/A
                continue
            values[figure if kind == "none" else key] = value if value is None else float(value)
        counts = found.get("n-samples", {}).get(task)
        if counts is not None:
            values["rows"] = int(counts["effective"])
        values["num_fewshot"] = found.get("n-shot", {}).get(task)
        made[task] = {key: value for key, value in values.items() if value is not None}
    return made


@contextlib.contextmanager
def _heard(say: Callable[[str], None]) -> Iterator[Any]:
    """While open, what lm-eval prints is kept from the terminal, its warnings are told, each once. Yields standard error."""
    stderr, logger = sys.stderr, logging.getLogger("lm_eval")
    told: set[str] = set()

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in told:
                told.add(text)
                with contextlib.redirect_stderr(stderr):
                    say(f"lm-eval: {text}")

    teller = Teller(logging.WARNING)
    before = logger.propagate, os.environ.get("DISABLE_MULTIPROC")
    logger.addHandler(teller)
    logger.propagate = False
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would start a process for each core
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield stderr
    finally:
        logger.removeHandler(teller)
        logger.propagate = before[0]
        os.environ.pop("DISABLE_MULTIPROC")
        if before[1] is not None:
            os.environ["DISABLE_MULTIPROC"] = before[1]


def _said(error: BaseException) -> str:
    """The first line of what another library raised, and its kind."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(" .:")

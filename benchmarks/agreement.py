"""The same weights by our tasks and by lm-eval's, over whole files: log-probabilities, greedy answers, figures.

    python benchmarks/agreement.py RUN --data DIR --tokenizer DIR [--tasks hellaswag,…] [--rows N] [--batch 16] [--threads N]

RUN is a run of GPT-2's shape with GPT-2's tokenizer; lm-eval scores its weights in transformers' GPT2LMHeadModel, by its own
definitions of the tasks, as `tests/harness.py` has it. --data is a folder with hellaswag_val.jsonl.xz,
lambada_openai_test.jsonl.xz and wiki.test.raw; rows of ARC and PIQA are made of HellaSwag's. --tokenizer is a folder with
GPT-2's encoder.json and vocab.bpe. Prints the table of docs/evaluation.md. Without --rows it takes as long as it takes: lm-eval
needs a pass for every choice.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for harness
TASKS = ("hellaswag", "arc_easy", "piqa", "lambada", "wikitext")
ALL_ROWS = 1_000_000  # more than any file has
HEAD = """\
| task | rows | largest difference of a log-probability, nats | same greedy answers, of them greedy | figures: ours, lm-eval's |
| --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rows", type=int, default=ALL_ROWS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before lm-eval reads it: nothing here asks the hub
    import torch

    from regpt.models.gpt2 import GPT2
    from regpt.tokenizers import open_tokenizer
    from regpt.train.load import load_model

    torch.set_num_threads(args.threads)
    loaded = load_model(args.run)
    tokenizer = open_tokenizer("gpt2", files=str(args.tokenizer))
    if not isinstance(loaded.model, GPT2) or loaded.tokenizer.fingerprint != tokenizer.fingerprint:
        parser.error(f"{args.run} is no GPT-2 with GPT-2's tokenizer, which is what both programs can score")
    print(HEAD)
    for task in args.tasks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(line(task, loaded.model, tokenizer, args, Path(folder)), flush=True)


def line(task: str, model: Any, tokenizer: Any, args: argparse.Namespace, folder: Path) -> str:
    """One task's row of the table."""
    from harness import lm_eval, rows_of
    from regpt.evals.likelihood import score
    from regpt.evals.tasks import open_task

    rows = rows_of(task, args.data, args.rows)
    theirs = lm_eval(model, args.tokenizer, task, rows, folder, args.batch)
    ours = open_task(task, folder / f"{task}.jsonl")
    parts = ours.requests(tokenizer, model.config.block_size)
    ours.check(model, parts)
    scored = iter(score(model, [r for rows_ in parts.values() for row in rows_ for r in row]))
    answers = {part: [[next(scored) for _ in row] for row in rows_] for part, rows_ in parts.items()}
    first = next(iter(answers.values()))  # the part that lm-eval has, too
    if task == "wikitext":  # it tells the sum of a page
        pairs = [
            (sum(s.logprob for s in row), t[0][0]) for row, t in zip(first, theirs.logprobs, strict=True)
        ]
        largest, greedy = max(abs(a / b - 1) for a, b in pairs), "–"
        difference = f"{largest:.0e} of the page's sum"
    else:
        both = [p for row, t in zip(first, theirs.logprobs, strict=True) for p in zip(row, t, strict=True)]
        difference = f"{max(abs(s.logprob - logprob) for s, (logprob, _) in both):.0e}"
        same = sum(s.greedy == best for s, (_, best) in both)
        greedy = f"{same:,} of {len(both):,}, {sum(s.greedy for s, _ in both):,}"
    figures = [
        f"{name} {figure.value:.6g}, {theirs.figures[f'{name},none']:.6g}"
        for name, figure in ours.figures(answers).items()
        if f"{name},none" in theirs.figures
    ]
    return f"| {task} | {len(rows):,} | {difference} | {greedy} | {'; '.join(figures)} |"


if __name__ == "__main__":
    main()

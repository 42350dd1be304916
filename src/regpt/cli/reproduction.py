"""Writes docs/reproduction.md, the page of all published figures, from evals/published.toml: `make docs`; a test compares."""

from __future__ import annotations

from regpt.config import preset_names
from regpt.evals.compare import count, written
from regpt.evals.names import LOSS, TASK_NAMES
from regpt.evals.published import Published, figures, of_preset

TITLES = {
    LOSS: "Loss over a validation split",
    "hellaswag": "HellaSwag",
    "lambada": "LAMBADA",
    "wikitext": "WikiText",
    "arc_easy": "ARC-easy",
    "piqa": "PIQA",
}
assert set(TITLES) == {LOSS, *TASK_NAMES}
HEAD = """\
# Published figures, and reproducing them

Made from `src/regpt/evals/published.toml` by `make docs`.

```
regpt reproduce gpt2-124m-fineweb-edu          # the whole recipe, the evaluation, the table; stopped, the same command goes on
regpt reproduce shakespeare-char-cpu           # about a minute
regpt eval runs/demo --published all           # every published figure of the evaluated tasks beside a run's
```

`regpt reproduce` trains a preset as `regpt train` does, evaluates its last checkpoint on the validation split and on the \
tasks below that the preset has figures for, and prints *published, ours, difference, within noise?*, then why they differ, \
where that is known: other data, fewer tokens, another size, other settings than the recipe's, fewer rows, another \
normalisation. The same lies in the run as `reproduction.md` and `reproduction.json`. A task whose rows cannot be had is \
skipped, and says so.

**Within noise?** A share of right answers, and a perplexity over rows, is an estimate: two differ by more than chance where \
they are further apart than 1.96 standard errors of their difference. The published one's is as published, or of a share from \
its number of rows; a perplexity that was published without one is taken to have ours, in proportion. (Rows are the same for \
both, and models err on the same ones: the difference is known better than that, so a "no" holds and a "yes" is cautious.) A \
loss over a whole split is exact for its run: one more run lies within 1.96 s √(1 + 1/n) of the mean of n, with s the standard \
deviation of runs that differ only in their seed, where somebody measured it; elsewhere the answer is *not known*.

**Not comparable** is what measures another thing: a loss of other text, other tokens or another held-out part, a task by \
another rule (*another rule* below). So is a figure with nothing behind it (*unsupported*), or of text that its model was \
trained on (*contaminated*). All are shown with what stands against them, and none is judged.

Of the reproductions of build-nanogpt that are known, JulienRineau/gpt2-workflow (8dcdea4) publishes no figure, so none of \
it stands here.

A loss in nats a token compares models on the same text in the same tokens, and nothing else. Of HellaSwag there are three \
accuracies, which differ by up to two points on the same answers: `acc_norm` divides by characters (lm-eval), `acc_bytes` by \
bytes, `acc_norm_tokens` by tokens, on the text as it is (build-nanogpt, llm.c).

## Any task of lm-eval

```
regpt eval runs/mine --harness arc_easy,piqa --num-fewshot 5      # lm-eval's own tasks, their rows from the hub
regpt eval runs/mine --harness animals --harness-tasks my/tasks   # a task file of one's own, offline
```

EleutherAI's harness (the extra `eval`) brings tasks, prompts and figures; regpt answers for the model, with the same \
log-probabilities as the harness's own Hugging Face model of the same weights (to 1e-4), the same accuracies and the same \
greedy text (`tests/adapters/test_lm_eval.py`). A task file that names its rows by `dataset_path: json` and `dataset_kwargs: \
{data_files: …}` needs no network. Task files may run code that lies beside them: use those that you trust.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD]
    for task, title in TITLES.items():
        parts.append(f"## {title}\n\n{_table(figures(task))}")
    rows = [
        f"| `{name}` | {'; '.join(map(_short, of_preset(name))) or 'none yet'} |" for name in preset_names()
    ]
    parts.append("## By preset\n\n| preset | figures beside it |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _short(p: Published) -> str:
    return f"{p.model} {p.task} {p.figure} {written(p.figure, p.value)}"


def _table(found: list[Published]) -> str:
    head = "| model | figure | value | of | how, and where it stands | mind |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "".join(f"| {' | '.join(_row(p))} |\n" for p in found)


def _row(p: Published) -> list[str]:
    value = written(p.figure, p.value)
    if p.error is not None:
        value = written(p.figure, p.value, p.error)
    if p.seed_sd is not None:
        value += f", over seeds ± {p.seed_sd:g} ({p.seeds})"
    mind = "; ".join(
        part
        for part in (
            "" if p.standing == "published" else f"*{p.standing}*",
            "" if p.comparable else "*another rule*",
            p.caveat,
        )
        if part
    )
    of = p.data + (f"; trained on {count(p.tokens)} tokens" if p.tokens else "")
    return [p.model, f"`{p.figure}`", value, of, f"{p.method}. {p.source}", mind]


if __name__ == "__main__":
    print(page(), end="")

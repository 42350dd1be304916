"""Published figures beside a run's: what chance explains, what is known to differ, and how it is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from regpt.evals.chance import ratio_interval, share_difference
from regpt.evals.compare import (
    Comparison,
    Run,
    beside,
    columns,
    compare,
    count,
    held_out,
    markdown,
    sources,
    table,
    tokens_of,
)
from regpt.evals.figures import Figure, TaskResult, with_interval
from regpt.evals.published import Published, figures, of_preset

GPT2_124M = 124_439_808
CHARS = {"corpus": "shakespeare", "tokenizer": "chars", "held_out": "0.1"}  # what nanoGPT's figures are of


def one(**more: object) -> Published:
    base = next(f for f in figures("hellaswag") if f.model == "GPT-2 124M" and f.figure == "acc_norm")
    return Published(**(vars(base) | more))  # type: ignore[arg-type]


def compared(published: Published, values: dict[str, float], run: Run | None = None) -> Comparison:
    return compare([published], {published.task: values}, run or Run(parameters=GPT2_124M), {})[0]


def test_a_share_is_judged_by_the_interval_of_the_difference() -> None:
    """Two of 10,042 rows each, near 0.31, differ by more than chance from 0.0128 on."""
    found = compared(one(), {"acc_norm": 0.3240, "rows": 10_042})
    assert found.interval == share_difference(0.3240, 10_042, 0.3114, 10_042)
    assert found.interval == pytest.approx((0.0126 - 0.0129, 0.0126 + 0.0129), abs=1e-4)
    assert found.within_noise is True and found.better is True
    assert compared(one(), {"acc_norm": 0.3250, "rows": 10_042}).within_noise is False
    assert compared(one(), {"acc_norm": 0.30}).within_noise is None, "of how many rows nobody knows"


def test_no_right_answer_of_five_is_no_proof() -> None:
    """At 0.3256, five wrong ones are to be met once in seven times; twenty are not."""
    theirs = next(f for f in figures("lambada") if f.value == 0.3256)
    assert compared(theirs, {"acc": 0.0, "acc_stderr": 0.0, "rows": 5}).within_noise is True
    assert compared(theirs, {"acc": 0.0, "acc_stderr": 0.0, "rows": 20}).within_noise is False


def test_a_huge_perplexity_is_not_explained_by_its_own_error() -> None:
    theirs = next(f for f in figures("lambada") if f.value == 40.0554)
    found = compared(theirs, {"perplexity": 211_385.6, "perplexity_stderr": 186_163.5, "rows": 20})
    assert found.within_noise is False and found.better is False


def test_a_loss_is_judged_by_the_spread_over_seeds() -> None:
    loss = next(f for f in of_preset("shakespeare-char-cpu") if f.model.startswith("regpt"))
    assert (loss.seed_sd, loss.runs) == (0.0036, 5)
    run = Run(parameters=loss.parameters, tokens=loss.tokens, **CHARS)
    near, far = (compare([loss], {"loss": {"nats": v}}, run, {})[0] for v in (1.9110, 1.9130))
    reach = 1.96 * 0.0036 * math.sqrt(6 / 5)  # one more run, from the middle of five
    assert near.interval == pytest.approx((1.9110 - 1.9036 - reach, 1.9110 - 1.9036 + reach))
    single = next(f for f in of_preset("shakespeare-char-cpu") if f.value == 1.8983)
    found = compare([single], {"loss": {"nats": 1.9}}, run, {})[0]
    reach = 1.96 * 0.0036 * math.sqrt(2)  # two single runs
    assert found.interval == pytest.approx((0.0017 - reach, 0.0017 + reach))
    assert (near.within_noise, far.within_noise, far.better, near.why) == (True, False, False, ())
    unknown = next(f for f in of_preset("shakespeare-char"))
    found = compare([unknown], {"loss": {"nats": 1.5}}, run, {})[0]
    assert found.within_noise is None and "no spread over seeds is known" in found.why


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"corpus": "my.txt"}, "other data: theirs is Tiny Shakespeare by character, the last tenth, this run's is my.txt"),
        ({"corpus": None}, "other data: theirs is Tiny Shakespeare by character, the last tenth, this run's is not known"),
        ({"tokenizer": "bpe of 512"}, "other tokens: theirs are chars, this run's bpe of 512"),
        ({"tokenizer": None}, "other tokens: theirs are chars, this run's not known"),
        ({"held_out": "0.5"}, "another part held out: theirs is 0.1, this run's 0.5"),
        ({"windows": (64, 16)}, "other windows: theirs of 64 tokens, end to end, this run's of 64, 16 apart"),
        ({"changed": {"data.dedup": (False, True)}}, "other targets than the recipe's: data.dedup"),
        ({"changed": {"tokenizer.name": ("chars", "bpe")}}, "other targets than the recipe's: tokenizer.name"),
        ({"changed": {"data.val_source": (None, "x")}}, "other targets than the recipe's: data.val_source"),
    ],
)  # fmt: skip
def test_a_loss_over_other_targets_is_not_judged(other: dict[str, object], why: str) -> None:
    """Neither in the table nor beside: however near the two numbers lie."""
    run = Run(**({"parameters": 804_224} | CHARS | other))  # type: ignore[arg-type]
    ours = {"loss": {"nats": 1.9036}}
    loss = next(f for f in of_preset("shakespeare-char-cpu") if f.value == 1.9036)
    found = compare([loss], ours, run, {})[0]
    assert (found.comparable, found.within_noise, found.interval) == (False, None, None) and why in found.why
    assert found.as_dict()["comparable"] is False and "not comparable" in table([found]).splitlines()[1]
    assert loss not in [c.published for c in beside(ours, run, every=True)]


def test_another_rule_is_not_judged() -> None:
    """GPT-2's LAMBADA with its filter of stop words, GPT-3's HellaSwag on its own prompt; lm-eval's own figure is."""
    filtered, plain = (f for f in figures("lambada") if (f.model, f.figure) == ("GPT-2 124M", "acc"))
    values = {"acc": 0.4599, "acc_stderr": 0.0069, "rows": 5_153}
    found = compared(filtered, values)
    assert (found.within_noise, found.interval, found.comparable) == (None, None, False)
    assert found.why[0] == f"not comparable: {filtered.caveat}" and "not comparable" in table([found])
    assert compared(plain, values).within_noise is False
    gpt3 = next(f for f in figures("hellaswag") if f.model == "GPT-3 125M")
    assert compared(gpt3, {"acc_norm_tokens": 0.337, "acc_norm_tokens_stderr": 0.0047}).within_noise is None


def test_a_perplexity_without_a_standard_error_has_ours_in_proportion() -> None:
    """Not none: it is an estimate from as many rows."""
    theirs = next(f for f in figures("lambada") if f.value == 10.634)
    found = compared(theirs, {"perplexity": 20.0, "perplexity_stderr": 0.4})
    low, high = ratio_interval(20.0, 0.4, 10.634, 10.634 * 0.4 / 20.0)
    assert found.interval == pytest.approx((10.634 * (low - 1), 10.634 * (high - 1)))
    assert "its standard error was not published: taken as ours in proportion" in found.why
    known = next(f for f in figures("lambada") if f.value == 40.0554)
    low, high = ratio_interval(20.0, 0.4, 40.0554, 1.4787)
    assert compared(known, {"perplexity": 20.0, "perplexity_stderr": 0.4}).interval == pytest.approx(
        (40.0554 * (low - 1), 40.0554 * (high - 1))
    )
    assert compared(theirs, {"perplexity": 20.0}).interval is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_judged(value: float) -> None:
    found = compared(one(), {"acc_norm": value, "acc_norm_stderr": math.nan})
    assert (found.within_noise, found.better) == (None, None)
    assert "not finite" in table([found]).splitlines()[1] and "worse" not in table([found])
    assert "this run's acc_norm is not finite" in found.why
    unsure = compared(one(), {"acc_norm": 0.3, "acc_norm_stderr": math.nan})
    assert unsure.within_noise is None and "not known" in table([unsure])


def test_tokens_and_parts_by_name() -> None:
    assert [tokens_of("bpe", 8192), tokens_of("gpt2", 50_257)] == ["bpe of 8,192", "gpt2"]
    assert held_out({}, None) == "0.005" and held_out({}, "validation") == "validation"
    assert held_out({"val_fraction": 0.1}, "validation") == "0.1"
    assert held_out({"val_split": "test"}, "validation") == "test"
    assert held_out({"val_source": "b.txt", "val_fraction": 0.1}, None) == "b.txt validation"


def test_what_is_claimed_without_support_is_never_within_noise() -> None:
    for claim in (f for f in figures() if not f.trusted):
        values = {claim.figure: claim.value, f"{claim.figure}_stderr": 0.0046}
        found = compared(claim, values)
        assert found.difference == 0 and found.within_noise is None
        assert found.why[0] == f"{claim.standing}: {claim.caveat}"
        assert "not comparable" in table([found])


def test_the_reasons_that_are_known_are_said() -> None:
    loss = next(f for f in of_preset("gpt2-124m-tinystories"))
    run = Run(
        parameters=804_224,
        corpus="texts/mine.txt",
        tokenizer="gpt2",
        held_out="validation",
        tokens=1_000_000,
        changed={"train.steps": (3000, 5)},
    )
    why = compare([loss], {"loss": {"nats": 3.0}}, run, {})[0].why
    assert (
        why[0] == "other data: theirs is TinyStories, its own validation split, this run's is texts/mine.txt"
    )
    assert why[1] == "another size: 804 K parameters, theirs 124 M"
    assert why[2] == "fewer tokens: trained on 1 M, theirs on 1.57 B"
    assert why[3] == "other settings than the recipe's: train.steps 5 instead of 3000"
    assert "bfloat16 logits" in why[4]
    few = compared(one(), {"acc_norm": 0.3, "acc_norm_stderr": 0.05, "rows": 100})
    assert "other rows: 100 of them, theirs 10,042" in few.why


def test_what_was_not_evaluated_says_why() -> None:
    found = compare([one()], {}, Run(parameters=GPT2_124M), {"hellaswag": "no network here"})[0]
    assert (found.ours, found.difference, found.within_noise) == (None, None, None)
    assert found.why == ("not evaluated: no network here",)
    assert "not evaluated" in table([found])


def test_the_tables_say_the_same() -> None:
    found = compare(
        of_preset("gpt2-124m-fineweb-edu"),
        {
            "loss": {"nats": 3.30},
            "hellaswag": {"acc_norm_tokens": 0.30, "acc_norm_tokens_stderr": 0.0046, "rows": 10_042},
        },
        Run(parameters=GPT2_124M, corpus="fineweb-edu-10bt", tokenizer="gpt2", tokens=10**10),
        {},
    )
    text, page = table(found), markdown("a title", found)
    for part in ("3.2924", "+0.0076", "0.3000 ± 0.0046", "(unsupported)", "(contaminated)", "within noise?"):
        assert part in text and part in page
    assert page.startswith("# a title\n\n|  | published | ours | difference | within noise? |\n| --- |")
    assert all(c.published.source in page for c in found)
    assert max(len(line) for line in text.splitlines()[: len(found) + 1]) < 140


def test_a_reason_that_all_share_is_said_once() -> None:
    run = Run(parameters=804_224, corpus="mine.txt", changed={"train.steps": (2000, 5)})
    found = compare(of_preset("shakespeare-char-cpu"), {"loss": {"nats": 3.0}}, run, {})
    assert len(found) == 3 and table(found).count("train.steps 5 instead of 2000") == 1
    assert markdown("t", found).count("train.steps 5 instead of 2000") == 1


def test_beside_a_run_stands_the_gpt2_of_its_size() -> None:
    ours = {
        "loss": {"nats": 3.2, "perplexity": 24.5, "tokens": 10},
        "hellaswag": {
            "acc_norm": 0.31,
            "acc_norm_stderr": 0.0046,
            "acc": 0.29,
            "rows": 10_042,
            "seconds": 3.0,
        },
        "lambada": {"acc": 0.33, "perplexity": 39.0},
    }
    web = Run(parameters=GPT2_124M, corpus="openwebtext", tokenizer="gpt2", held_out="0.0005")
    found = beside(ours, web)
    assert {c.published.model for c in found} == {"GPT-2 124M"}
    assert {(c.published.task, c.published.figure): c.published.value for c in found} == {
        ("loss", "nats"): 3.12,
        ("hellaswag", "acc_norm"): 0.3114,
        ("hellaswag", "acc"): 0.2892,
        ("lambada", "acc"): 0.3256,  # lm-eval's, which ours equals by definition; the paper's has a filter
        ("lambada", "perplexity"): 40.0554,
    }
    scored = TaskResult(
        task="hellaswag",
        figures={"acc_norm": with_interval(0.31, 0.0046), "acc_bytes": Figure(0.25)},
        headline="acc_norm",
        rows=10_042,
        seconds=3.0,
    )
    guessed = {"perplexity": Figure(39.0, 1.0, (37.1, 41.0))}
    last_words = TaskResult(task="lambada", figures=guessed, headline="perplexity", rows=9, seconds=1.0)
    assert columns([scored, last_words], found) == [
        ["", "this run", "95 %", "GPT-2 124M"],
        ["hellaswag acc_norm", "0.3100 ± 0.0046", "[0.3010, 0.3190]", "0.3114"],
        ["hellaswag acc_bytes", "0.2500", "", ""],
        ["lambada perplexity", "39.00 ± 1.00", "[37.10, 41.00]", "40.06"],
    ]
    assert beside(ours, Run(parameters=1_500_000_000))[0].published.model == "GPT-2 1558M"
    every = beside(ours, web, every=True)
    assert {0.3256, 0.4599} <= {c.published.value for c in every if c.published.model == "GPT-2 124M"}
    assert len(sources(every)) == len(every) > 20
    assert sum("; not comparable: the stop-word filter" in line for line in sources(every)) == 8
    small = beside({"loss": {"nats": 2.0}}, Run(parameters=804_224, **CHARS))
    assert [(c.published.model, c.published.value) for c in small] == [
        ("nanoGPT shakespeare-char, CPU", 1.8983),
        ("regpt shakespeare-char-cpu", 1.9036),
    ]
    elsewhere = beside(ours, Run(parameters=GPT2_124M, corpus="my.txt"), every=True)
    assert not [c for c in elsewhere if c.published.task == "loss"], "the loss of another text says nothing"


def test_numbers_as_a_person_says_them() -> None:
    assert [count(n) for n in (5, 804_224, 124_439_808, 1_572_864_000)] == ["5", "804 K", "124 M", "1.57 B"]


def test_a_file_with_the_bytes_of_a_named_set_is_that_set(tmp_path: Path, test_data: Path) -> None:
    from regpt.data.sources import known_text

    (tmp_path / "other.txt").write_text("To be, or not to be\n")
    assert known_text(str(test_data / "small" / "tinyshakespeare.txt")) == "shakespeare"
    assert known_text(str(tmp_path / "other.txt")) == str(tmp_path / "other.txt")
    assert known_text("openwebtext") == "openwebtext"

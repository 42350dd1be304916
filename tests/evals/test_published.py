"""The published figures: well formed, each with its source, and the well-known ones as their authors give them."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from regpt.config import load_preset, preset_names
from regpt.data.named import NAMED_SETS
from regpt.errors import ConfigError
from regpt.evals.compare import Run, compare, held_out, tokens_of
from regpt.evals.names import LOSS, TASK_NAMES
from regpt.evals.published import (
    GPT2,
    LOWER_IS_BETTER,
    SHARES,
    Published,
    figures,
    nearest_gpt2,
    of_preset,
    read,
    tasks_of,
)
from regpt.models.count import count_parameters

TASKS = {LOSS, *TASK_NAMES}


@pytest.mark.parametrize("figure", figures(), ids=lambda f: f"{f.model} {f.task} {f.figure} {f.value}")
def test_every_entry_says_what_it_is_and_where_it_stands(figure: Published) -> None:
    assert figure.task in TASKS and figure.figure in SHARES | LOWER_IS_BETTER
    assert figure.model and figure.data and figure.method and len(figure.source) > 10
    assert figure.parameters > 100_000 and math.isfinite(figure.value)
    assert 0 < figure.value < 1 if figure.figure in SHARES else figure.value > 0
    assert not set(figure.presets) - set(preset_names())
    if not figure.trusted:
        assert figure.caveat, "why it cannot be trusted"
    if figure.seed_sd is not None:
        assert figure.seeds and figure.seed_sd > 0
    assert figure.comparable or figure.caveat, "which other rule"
    if figure.task == "loss":
        assert figure.corpus in NAMED_SETS or figure.corpus == "fineweb-10bt"
        assert figure.tokenizer
    else:
        assert (figure.corpus, figure.tokenizer, figure.held_out) == (None, None, None)


def value(model: str, task: str, figure: str) -> list[float]:
    return [f.value for f in figures(task) if (f.model, f.figure) == (model, figure)]


def test_well_known_values() -> None:
    """GPT-2's table 3, nanoGPT's README, build-nanogpt's notebook, GPT-3's table H.1."""
    assert [value(m, "wikitext", "word_perplexity_strided")[0] for m in GPT2] == [37.50, 26.37, 22.05, 17.48]
    assert [value(m, "lambada", "acc")[0] for m in GPT2] == [0.4599, 0.5548, 0.6012, 0.6324]
    assert [value(m, "lambada", "perplexity")[0] for m in GPT2] == [35.13, 15.60, 10.87, 8.63]
    assert [value(m, "loss", "nats")[0] for m in GPT2] == [3.12, 2.84, 2.67, 2.54]
    assert value("GPT-2 124M", "hellaswag", "acc_norm_tokens") == [0.294463]
    assert value("GPT-2 124M", "hellaswag", "acc_norm") == [0.3114]
    assert value("GPT-3 125M", "hellaswag", "acc_norm_tokens") == [0.337]
    assert 3.2924 in value("GPT-2 124M", "loss", "nats")
    assert value("nanoGPT shakespeare-char", "loss", "nats") == [1.4697]


def test_parameters_are_those_of_our_own_models_of_these_shapes() -> None:
    others = [f"gpt2-{size}-openwebtext" for size in ("medium", "large", "xl")]
    shapes = dict(zip(GPT2, ["gpt2-124m-fineweb-edu", *others], strict=True))
    for figure in figures():
        if figure.model in shapes:
            config = dataclasses.replace(load_preset(shapes[figure.model]).config.model, bias=True)
            assert figure.parameters == count_parameters(config, 50_257).total


def test_claims_with_nothing_behind_them_are_marked() -> None:
    """The two seeds' figures that nobody should aim at."""
    marked = {(f.model, f.value): f.standing for f in figures() if not f.trusted}
    assert marked == {
        ("AkoZhu/nanogpt", 3.029973): "contaminated",
        ("Addi-11/build-nanogpt", 2.9478): "unsupported",
        ("Addi-11/build-nanogpt", 0.3337): "unsupported",
    }


def test_every_source_is_used() -> None:
    text = (resources.files("regpt") / "evals" / "published.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    used = {(group | own)["source"] for group in document["figures"] for own in group["values"]}
    assert used == set(document["sources"])
    assert {(group | own)["model"] for group in document["figures"] for own in group["values"]} == set(
        document["parameters"]
    )


def test_a_presets_own_run_can_be_compared_with_its_losses() -> None:
    """The recipe's text, tokens and held-out part are those of the figures that stand beside it, unless a caveat says no."""
    for name in preset_names():
        config = load_preset(name).config
        named = NAMED_SETS[config.data.source]
        run = Run(
            parameters=1,
            corpus=config.data.source,
            tokenizer=tokens_of(config.tokenizer.name, config.tokenizer.vocab_size),
            held_out=held_out(dataclasses.asdict(config.data), named.val_split),
        )
        for found in compare(of_preset(name), {"loss": {"nats": 3.0}}, run, {}):
            if found.published.task == LOSS and found.published.trusted:
                assert found.comparable or found.published.corpus != config.data.source, found.why


def test_every_preset_that_was_run_has_a_figure() -> None:
    without = [name for name in preset_names() if not of_preset(name)]
    assert without == ["modern-30m"]  # not run yet
    for name in preset_names():
        corpus = load_preset(name).config.data.source
        for figure in of_preset(name):
            other_text = figure.task == "loss" and figure.corpus != corpus
            assert not other_text or figure.caveat, f"{figure.model} for {name}: another text, unsaid"


def test_the_error_of_a_share_follows_from_its_rows() -> None:
    gpt2 = next(f for f in figures("hellaswag") if f.model == "GPT-2 124M")
    assert gpt2.error == pytest.approx(0.004549, abs=1e-6)  # sqrt(0.294463 x 0.705537 / 10,042)
    assert next(f for f in figures("loss")).error is None


def test_the_nearest_size_and_the_tasks_of_a_preset() -> None:
    assert [nearest_gpt2(n) for n in (1, 124_439_808, 300_000_000, 10**12)] == [
        GPT2[0],
        GPT2[0],
        GPT2[1],
        GPT2[3],
    ]
    assert tasks_of("gpt2-124m-fineweb-edu") == ["loss", "hellaswag"]
    assert tasks_of("modern-30m") == ["loss"]


def test_an_unknown_key_in_the_file_is_named() -> None:
    text = (resources.files("regpt") / "evals" / "published.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    document["figures"][0]["vlaue"] = 1
    with pytest.raises(ConfigError, match=r"published.toml: there is no setting vlaue. Did you mean value\?"):
        list(read(document))


def test_the_page_of_figures_is_current() -> None:
    """docs/reproduction.md is what `make docs` writes."""
    from regpt.cli.reproduction import page

    assert page() == (Path(__file__).parents[2] / "docs/reproduction.md").read_text(encoding="utf-8"), (
        "run `make docs`"
    )

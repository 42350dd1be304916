"""Settings: strict names and types, presets, precedence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from regpt.config import (
    Config,
    ModelConfig,
    build,
    differences,
    load_preset,
    preset_names,
    setting_names,
    to_dict,
    type_name,
)
from regpt.errors import ConfigError


def test_the_tree_survives_json() -> None:
    config = load_preset("shakespeare-char").config
    assert build(Config, to_dict(config), where="x") == config


def test_values_fill_only_what_they_name() -> None:
    base = Config(model=ModelConfig(n_layer=3))
    got = build(Config, {"model": {"n_head": 5}, "optim": {"lr": 1}}, where="x", base=base)
    assert (got.model.n_layer, got.model.n_head, got.optim.lr) == (3, 5, 1.0)
    assert isinstance(got.optim.lr, float)


def test_none_is_written_as_a_word_in_toml() -> None:
    assert build(Config, {"optim": {"clip_norm": "none"}}, where="x").optim.clip_norm is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_lyer": 3}}, "f.toml: there is no setting model.n_lyer. Did you mean model.n_layer?"),
        ({"modle": {}}, "f.toml: there is no setting modle. Did you mean model?"),
        ({"zzz": 1}, "f.toml: there is no setting zzz."),
        ({"model": 3}, "f.toml: model is a section, not a value.\n  got: 3"),
        (
            {"model": {"n_layer": "3"}},
            "f.toml: model.n_layer has the wrong type.\n  got: '3'\n  expected: a whole number",
        ),
        (
            {"model": {"n_layer": True}},
            "f.toml: model.n_layer has the wrong type.\n  got: True\n  expected: a whole number",
        ),
        (
            {"train": {"compile": "yes"}},
            "f.toml: train.compile has the wrong type.\n  got: 'yes'\n  expected: 'auto', 'on' or 'off'",
        ),
        (
            {"optim": {"clip_norm": "1"}},
            "f.toml: optim.clip_norm has the wrong type.\n  got: '1'\n  expected: a number or none",
        ),
    ],
)
def test_messages(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        build(Config, values, where="f.toml")
    assert str(e.value) == message


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_describes_itself(name: str) -> None:
    preset = load_preset(name)
    assert all(dataclasses.asdict(preset.about).values())
    assert preset.config.data.source
    assert preset.config.train.batch_tokens % preset.config.model.block_size == 0
    assert preset.config.model.n_embd % preset.config.model.n_head == 0


def test_published_recipes() -> None:
    """Figures that the recipes' authors published."""
    owt, edu = load_preset("gpt2-124m-openwebtext").config, load_preset("gpt2-124m-fineweb-edu").config
    assert owt.train.batch_tokens == 12 * 1024 * 5 * 8
    assert (edu.train.batch_tokens, edu.train.steps, edu.optim.warmup_steps) == (2**19, 19_073, 715)
    stories = load_preset("gpt2-124m-tinystories").config
    assert (stories.train.batch_tokens, stories.train.steps) == (64 * 8 * 1024, 3000)
    xl = load_preset("gpt2-xl-openwebtext").config
    assert (xl.model.n_layer, xl.model.n_head, xl.model.n_embd) == (48, 25, 1600)
    assert xl.train == owt.train


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as e:
        load_preset("shakespear-char")
    assert (
        str(e.value)
        == "there is no preset 'shakespear-char'. Did you mean shakespeare-char?\n  try: regpt presets"
    )


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine é.toml"
    path.write_text('extends = "demo"\n[optim]\nlr = 0.5\n', encoding="utf-8")
    preset = load_preset(str(path))
    assert (preset.name, preset.config.optim.lr) == ("mine é", 0.5)
    assert preset.config.model == load_preset("demo").config.model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [", "is not valid TOML"),
        ('extends = "nope"', "there is no preset 'nope'."),
        ("extends = 3", "extends must name another preset."),
        ("[optim]\nlrr = 1", "there is no setting optim.lrr. Did you mean optim.lr?"),
    ],
)
def test_damaged_presets(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("?", r"\?")):
        load_preset(str(path))


def test_presets_that_extend_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text('extends = "b.toml"')
    Path("b.toml").write_text('extends = "a.toml"')
    with pytest.raises(ConfigError, match=r"in a circle: a\.toml -> b\.toml -> a\.toml"):
        load_preset("a.toml")


def test_missing_preset_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the preset file"):
        load_preset(str(tmp_path / "none.toml"))


def test_differences_and_names() -> None:
    a, b = Config(), Config(seed=2, model=ModelConfig(n_layer=1))
    assert differences(a, b) == {"seed": (1337, 2), "model.n_layer": (12, 1)}
    assert {"seed", "optim.lr", "data.source"} <= set(setting_names())
    assert type_name(float | None) == "a number or none"

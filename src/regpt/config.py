"""Every setting of a run, in one tree: its name, type, default and meaning; and how presets and overrides fill it.

Precedence: defaults < preset TOML < command line. `None` means off or "decide for me", never -1. The docstring under a
field is its `--help` text. No torch here: `regpt --help` must answer at once.

Why one file: docs/decisions/0001-settings-in-one-file.md.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from regpt.errors import ConfigError, did_you_mean

SHARD_TOKENS = 100_000_000  # ids in one file of shards, unless asked otherwise

# --- the tree --------------------------------------------------------------------------------------------------------


VAL_FRACTION = 0.005  # held out where nobody says how much, and there is no validation text


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is split and sampled."""

    source: str = ""
    """A file, folder, glob, named set (shakespeare, tinystories, fineweb-edu-10bt …: docs/data.md), a data set of the
    hub (hf:owner/name[:config][@revision]), prepared shards, or token files of another program."""
    dir: str | None = None
    """Where prepared shards are kept. None: data/<source>-<tokenizer>-<fingerprint>."""
    text_field: str = "text"
    """The field that holds the text in JSONL and parquet sources."""
    split: str = "train"
    """The split of a hub data set to train on."""
    val_fraction: float | None = None
    """Share of documents held out for validation; of a single text, or of token files, the last part by position. None:
    the validation split of a named set that has one, else 0.005."""
    val_source: str | None = None
    """A separate source for validation. None: split off `source`."""
    val_split: str | None = None
    """The split of a hub data set to validate on: of `val_source`, or of `source` if that is not set."""
    dedup: bool = False
    """Leave out documents whose text is that of an earlier one."""
    min_chars: int = 0
    """Leave out documents with fewer characters."""
    shuffle_seed: int | None = None
    """Shuffle the training documents across shards, in an order drawn by this seed. None: they stay in the source's order."""
    verify: bool = True
    """Before the first step, compare prepared shards with their checksums, and the ids of other token files with the
    vocabulary. False: sizes only."""
    keep_downloads: bool = True
    """Files of the hub stay in regpt's cache folder. False: preparation holds two of them at a time and removes each when it
    is done with it; a tokenizer that is trained on the text reads it from the server."""
    workers: int | None = None
    """Processes that tokenise during preparation. None: one for each core."""
    order: Literal["permuted", "replacement"] = "permuted"
    """permuted: every window once an epoch. replacement: random windows, as nanoGPT samples."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text to ids."""

    name: str = "gpt2"
    """gpt2, chars, bytes, bpe (trained on the source), or a folder with a saved tokenizer."""
    vocab_size: int = 4096
    """Entries of a `bpe` tokenizer trained for this run, <|endoftext|> included."""
    pattern: Literal["gpt2", "gpt4"] = "gpt2"
    """Of a `bpe` tokenizer trained for this run: whose split into words its entries stay inside of."""
    min_frequency: int = 2
    """Of a `bpe` tokenizer trained for this run: how often a pair must occur to become an entry."""
    files: str | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe, for use offline."""


@dataclass(frozen=True, kw_only=True)
class ModernConfig:
    """The techniques of model.arch=modern, each a switch of its own."""

    rope: bool = True
    """Rotary positions in queries and keys. False: learned positions, added to the embedding as in GPT-2."""
    rope_fraction: float = 0.5
    """Share of each head's dimensions that rotate; the others carry content at any distance."""
    rope_base: float = 10_000.0
    """The slowest rotation takes 2 pi times almost so many positions."""
    qk_norm: bool = True
    """Every query and key is divided by its root mean square."""
    attention_scale: float | None = None
    """What q.k is multiplied by. None: 1.44 / sqrt(head size) with qk_norm, 1 / sqrt(head size) without."""
    norm: Literal["rms", "layer"] = "rms"
    """rms: divide by the root mean square; layer: subtract the mean first. Neither has parameters."""
    embed_norm: bool = True
    """Normalise the embedding too, before the first layer."""
    activation: Literal["relu2", "gelu"] = "relu2"
    """Inside the MLP: the square of ReLU, or GPT-2's tanh GELU."""
    zero_init: bool = True
    """Projections into the stream, and an untied head, begin at zero: the model begins as its embedding alone."""
    value_embeddings: bool = True
    """In every other layer, the last included, a second embedding of the token is added to the values, by a gate a head."""
    residual_scalars: bool = True
    """Each layer multiplies the stream by a learned number before it reads it."""
    x0_scalars: bool = True
    """Each layer adds the embedding to the stream once more, times a learned number."""
    softcap: float | None = 15.0
    """Logits z become cap * tanh(z / cap). None: they stay as they are."""
    tied: bool = False
    """One matrix for embedding and head, as in GPT-2."""
    bigram: bool = False
    """An exact embedding of the last two tokens is added to the token's; vocabularies up to 1,024."""
    trigram: int | None = None
    """Entries of a table of embeddings that the last three tokens are hashed into. None: no such table."""
    window: int | None = None
    """Positions that every other layer attends to, itself included; the last layer sees all. None: all see all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model's shape. The vocabulary size follows from the tokenizer."""

    arch: Literal["gpt2", "modern"] = "gpt2"
    """gpt2: GPT-2 to the letter; modern: the fast recipe, whose switches are model.modern.*."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; divides n_embd."""
    n_embd: int = 768
    """Channels."""
    block_size: int = 1024
    """Context length in tokens."""
    dropout: float = 0.0
    """Probability of dropping an activation during training."""
    bias: bool = True
    """gpt2: biases in linear layers and layer norms. False is a little faster. modern has none either way."""
    modern: ModernConfig = field(default_factory=ModernConfig)
    """Of model.arch=modern alone."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large the batch, on what."""

    steps: int = 1000
    """Optimizer updates."""
    minutes: float | None = None
    """Wall time to train for, over all sittings, evaluations and saves included; `steps` is then not looked at. The
    schedule follows the measured speed, so such a run does not repeat to the bit. None: train.steps."""
    batch_tokens: int = 8192
    """Tokens in one update, over all micro-batches and ranks."""
    batch_ramp_steps: int = 0
    """Steps with smaller batches: a quarter of `batch_tokens` in the first half of them, then a half, then all. 0: none."""
    micro_rows: int | None = None
    """Rows in one forward pass of one rank. None: the largest that divides the batch and fits."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of matrix products; weights and optimizer stay float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the training step. auto: on CUDA, and on a CPU where a run is long enough for it; a failure is
    logged, and training goes on without."""
    threads: int | None = None
    """CPU threads of one rank. None: PyTorch's own choice, or this host's cores shared among its ranks."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Above one rank. ddp: each holds the whole model; fsdp: each holds a part of every tensor (FSDP2)."""
    shard_group: int | None = None
    """fsdp: ranks among which one copy of the model is sharded (hybrid sharding). None: all of them."""
    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are added up. exact: in one fixed tree order, the same to the bit on any number of ranks."""
    checkpoint_activations: bool = False
    """Keep only the stream between layers and compute the rest again in the backward pass: less memory, a third slower."""
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is not finite, or a spike. stop: exit 3; skip: leave the update out; rollback: go back to
    the last checkpoint and pass over the rows between it and here. After 10 close together, stop."""
    spike_sigma: float | None = None
    """A loss so many standard deviations above the mean of the last 100 is a bad step too. None: it is not."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the layers' matrices, AdamW for embeddings, head, norms and scalars."""
    lr: float = 6e-4
    """Peak learning rate of AdamW."""
    min_lr: float = 6e-5
    """Learning rate at the end of a cosine or linear schedule; all other rates come down in proportion."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """cosine; linear: constant, then linearly down over the last `decay_fraction`; constant."""
    decay_fraction: float = 0.4
    """Share of the steps over which `linear` comes down."""
    decay_steps: int | None = None
    """Step at which the schedule reaches min_lr. None: train.steps."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay: Literal["matrices", "linear", "all"] = "matrices"
    """What decays. matrices: everything of two dimensions, embeddings too; linear: embeddings not; all."""
    clip_norm: float | None = 1.0
    """Largest gradient norm. None: no clipping."""
    muon_lr: float = 0.03
    """muon: peak learning rate of the matrices; of a tall one times sqrt(rows / columns)."""
    muon_momentum: float = 0.95
    """muon: momentum, in Nesterov's form."""
    muon_momentum_start: float = 0.85
    """muon: momentum of the first step, from where it rises evenly."""
    muon_momentum_steps: int = 300
    """muon: steps until it is `muon_momentum`; 0: from the beginning."""
    orthogonalize: Literal["newton_schulz", "polar_express"] = "newton_schulz"
    """muon: the iteration, of five steps, that takes the singular values of an update to about 1."""
    cautious_decay: bool = False
    """muon: a weight decays only where its update points to zero as well. Of the matrices, not of AdamW's groups."""
    embed_lr: float | None = None
    """muon: peak rate of embeddings, n-gram tables and value embeddings. None: optim.lr."""
    head_lr: float | None = None
    """muon: peak rate of an untied head. None: optim.lr."""
    scalar_lr: float | None = None
    """muon: peak rate of scalars, gates, norms and biases. None: optim.lr."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during training, always over the whole split."""

    every: int | None = 250
    """Steps between evaluations; the last step is always evaluated. None: only at the end."""
    micro_rows: int | None = None
    """Rows in one forward pass. None: as many as the training micro-batch, or more where that is small."""
    tasks: str | None = None
    """Tasks to evaluate beside the loss, with commas between them: hellaswag,lambada … (docs/evaluation.md). None: none."""
    tasks_every: int | None = None
    """Steps between evaluations of the tasks; the last step is always evaluated. None: only at the end."""
    tasks_rows: int | None = None
    """Evaluate on the first so many rows of each task. None: on all."""
    tasks_data: str | None = None
    """A task's file, or the folder of several. None: by name, downloaded before the first step."""
    tasks_required: bool = True
    """False: a task whose file cannot be downloaded is left out, aloud, instead of ending the run before it begins."""


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Checkpoints."""

    every: int | None = None
    """Steps between checkpoints. None: at every evaluation. The last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay; the best one by validation loss stays too."""
    in_background: bool = True
    """Write while training goes on: it waits only for the copy in memory. The last one is always waited for."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text generated while training."""

    every: int | None = None
    """Steps between samples. None: at every evaluation."""
    prompt: str = ""
    """What each sample continues. Empty: a new document begins."""
    tokens: int = 64
    """New tokens in each sample; 0 turns sampling off."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = 50
    """Sample among the k likeliest tokens. None: among all."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where numbers go beside log.jsonl, which is always written."""

    log_every: int = 10
    """Steps between lines of training loss."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run directory."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = 1337
    """Seeds the weights, the order of the data, dropout and samples."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


# --- filling it ------------------------------------------------------------------------------------------------------


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def setting_names(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every setting by its full name: `seed`, `data.source`, …"""
    for f in dataclasses.fields(cls):
        kind = _hints(cls)[f.name]
        if dataclasses.is_dataclass(kind):
            yield from setting_names(typing.cast(type, kind), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def type_name(kind: Any) -> str:
    """A type as a person would say it: `float`, `int or none`, `'auto', 'on' or 'off'`."""
    if typing.get_origin(kind) is Literal:
        *most, last = [repr(a) for a in typing.get_args(kind)]
        return f"{', '.join(most)} or {last}" if most else last
    if isinstance(kind, types.UnionType):
        return " or ".join(type_name(a) for a in typing.get_args(kind))
    return {
        type(None): "none",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
    }.get(kind, str(kind))


def _fits(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_fits(value, a) for a in typing.get_args(kind))
    if kind is float:  # TOML writes 1 for 1.0; a bool is not a number
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def build(
    cls: type[Any], values: Mapping[str, Any], *, where: str, base: Any = None, prefix: str = ""
) -> Any:
    """A `cls` from nested plain values, strictly: unknown names and wrong types are errors that name the setting.

    Args:
        values: as TOML or JSON gives them. The string "none" stands for None, which TOML lacks.
        where: the file that they come from, for the message.
        base: an instance whose values hold where `values` says nothing; None: the defaults.
    """
    hints = _hints(cls)
    made: dict[str, Any] = {}
    for name, value in values.items():
        full = prefix + name
        if name not in hints:
            known = list(setting_names(cls, prefix)) + [prefix + f.name for f in dataclasses.fields(cls)]
            raise ConfigError(f"{where}: there is no setting {full}.{did_you_mean(full, known)}")
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {full} is a section, not a value.", got=repr(value))
            made[name] = build(
                typing.cast(type, kind), value, where=where, base=getattr(base, name, None), prefix=full + "."
            )
            continue
        value = None if value == "none" else value
        if not _fits(value, kind):
            raise ConfigError(
                f"{where}: {full} has the wrong type.", got=repr(value), expected=type_name(kind)
            )
        made[name] = float(value) if kind is float and isinstance(value, int) else value
    return dataclasses.replace(base, **made) if base is not None else cls(**made)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, ready for JSON; `build` turns them back."""
    return dataclasses.asdict(config)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings whose values differ: {"optim.lr": (0.001, 0.003)}."""
    before, after = flat(old, prefix), flat(new, prefix)
    return {name: (before[name], value) for name, value in after.items() if before[name] != value}


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting under its dotted name: {"optim.lr": 0.001, …}; of a tree of dataclasses or one of dicts."""
    found: dict[str, Any] = {}
    tree = isinstance(settings, Mapping)
    names = settings if tree else [f.name for f in dataclasses.fields(settings)]
    for name in names:
        value = settings[name] if tree else getattr(settings, name)
        section = isinstance(value, Mapping) or dataclasses.is_dataclass(value)
        found |= flat(value, f"{prefix}{name}.") if section else {prefix + name: value}
    return found


# --- presets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class About:
    """What a preset's page says of itself before its settings."""

    summary: str
    """One line: what it trains."""
    hardware: str
    """What it was meant for or measured on."""
    time: str
    """How long it takes there."""
    expected: str
    """The result to expect, and where that figure comes from."""


@dataclass(frozen=True)
class Preset:
    """A named page of settings."""

    name: str
    about: About
    config: Config


DEFAULT_PRESET = "demo"


def preset_names() -> list[str]:
    """The presets that come with regpt, sorted."""
    folder = resources.files("regpt") / "presets"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load_preset(name: str, *, heirs: tuple[str, ...] = ()) -> Preset:
    """The preset `name`: one of ours, or a TOML file (a name that ends in .toml) in the same form.

    Args:
        heirs: presets that are being read and extend this one.
    """
    if name in heirs:
        raise ConfigError(f"presets extend each other in a circle: {' -> '.join([*heirs, name])}.")
    if name.endswith(".toml"):
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"cannot read the preset file {name}: {e}") from None
        return _parse_preset(path.stem, text, name, (*heirs, name))
    if name not in preset_names():
        raise ConfigError(
            f"there is no preset {name!r}.{did_you_mean(name, preset_names())}", hint="regpt presets"
        )
    text = (resources.files("regpt") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return _parse_preset(name, text, f"preset {name}", (*heirs, name))


def _parse_preset(name: str, text: str, where: str, heirs: tuple[str, ...]) -> Preset:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{where} is not valid TOML: {e}") from None
    parent = values.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise ConfigError(f"{where}: extends must name another preset.", got=repr(parent))
    base = load_preset(parent, heirs=heirs).config if parent is not None else None
    about = values.pop("about", {"summary": name, "hardware": "", "time": "", "expected": ""})
    return Preset(
        name,
        build(About, about, where=where, prefix="about."),
        build(Config, values, where=where, base=base),
    )

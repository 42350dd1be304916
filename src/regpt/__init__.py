"""regpt: GPT-2, from raw text to a served model.

The public names; each is imported when it is first asked for, so that `import regpt` costs nothing:

    load, generate            a trained model, and text from it
    train_model, Config, load_preset    settings, and a run of them
    GPT2, Modern, ModelConfig the models, plain torch.nn.Modules
    open_tokenizer, load_tokenizer, prepare, open_source, Shards, Loader    text to batches
    RegptError                what goes wrong, with what to try
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regpt.errors import ConfigError, did_you_mean
from regpt.threads import rest_soon

__version__ = "0.1.0"

rest_soon()  # before anything loads torch

_WHERE = {
    "load": ("regpt.train.load", "load_model"),
    "train_model": ("regpt.train.session", "train"),
    "Config": ("regpt.config", "Config"),
    "ModelConfig": ("regpt.config", "ModelConfig"),
    "load_preset": ("regpt.config", "load_preset"),
    "GPT2": ("regpt.models.gpt2", "GPT2"),
    "Modern": ("regpt.models.modern", "Modern"),
    "open_tokenizer": ("regpt.tokenizers", "open_tokenizer"),
    "load_tokenizer": ("regpt.tokenizers", "load_tokenizer"),
    "open_source": ("regpt.data.sources", "open_source"),
    "prepare": ("regpt.data.prepare", "prepare"),
    "Shards": ("regpt.data.shards", "Shards"),
    "Loader": ("regpt.data.loader", "Loader"),
    "RegptError": ("regpt.errors", "RegptError"),
}
__all__ = ["__version__", "generate", *_WHERE]

if TYPE_CHECKING:
    from regpt.infer.engine import Completion
    from regpt.train.load import Loaded


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'regpt' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)


def generate(
    loaded: Loaded | str | Path, prompt: str | Sequence[int] = "", **settings: Any
) -> list[Completion]:
    """Completions of `prompt` by a model that `load` returned: `generate(run, "def ", max_new_tokens=50)[0].text`.

    Args:
        loaded: or the folder of a run, loaded for this call alone.
        prompt: text, or token ids.
        settings: fields of `regpt.infer.settings.SamplingSettings`: max_new_tokens, temperature, top_k, top_p, min_p,
            stop, seed, n.
    """
    from regpt.infer.engine import complete
    from regpt.infer.settings import SamplingSettings
    from regpt.train.load import load_model

    names = [f.name for f in dataclasses.fields(SamplingSettings)]
    for name in settings:
        if name not in names:
            raise ConfigError(f"there is no sampling setting {name}.{did_you_mean(name, names)}")
    if isinstance(loaded, str | Path):
        loaded = load_model(loaded)
    return complete(loaded.model, loaded.tokenizer, prompt, SamplingSettings(**settings))

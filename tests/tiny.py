"""The settings of a run that takes a second, its text, and a task on it."""

from __future__ import annotations

import json

from regpt.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    SaveConfig,
    TokenizerConfig,
    TrackConfig,
    TrainConfig,
)

TINY_TEXT = "".join(f"{i} little ducks went out one day, over the hills and far away. " for i in range(400))


def tiny_config() -> Config:
    """On text.txt in the current folder, dropout on."""
    return Config(
        data=DataConfig(source="text.txt", val_fraction=0.1, workers=1),
        tokenizer=TokenizerConfig(name="bytes"),
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.1),
        train=TrainConfig(steps=12, batch_tokens=256, device="cpu", dtype="float32"),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        eval=EvalConfig(every=4),
        save=SaveConfig(keep=2),
        sample=SampleConfig(tokens=4),
        track=TrackConfig(log_every=1),
    )


def tiny_hellaswag(n: int) -> str:
    """Rows as they are published, of the text's own words."""
    endings = ["went out one day", "far away", "over hills", "and the"]
    return "".join(
        json.dumps(
            {
                "ind": i,
                "activity_label": "Ducks",
                "ctx_a": f"{i} little",
                "ctx_b": "ducks",
                "ctx": f"{i} little ducks",
                "endings": endings[i % 4 :] + endings[: i % 4],
                "label": i % 3,
            }
        )
        + "\n"
        for i in range(n)
    )

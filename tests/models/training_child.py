"""A process that trains random tokens as the loop does, and prints its peak resident memory in bytes."""

from __future__ import annotations

import json
import resource
import sys

from regpt.train.allocator import keep_memory

KEPT = keep_memory()  # before torch is imported, as in a real run

import torch  # noqa: E402

from regpt.config import ModelConfig, OptimConfig  # noqa: E402
from regpt.models.gpt2 import GPT2  # noqa: E402
from regpt.optim.groups import adamw  # noqa: E402


def main(shape: dict[str, int | float], vocab: int, rows: int, dtype: str, n_micro: int, steps: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**shape)  # type: ignore[arg-type]
    if config.n_embd < 256:
        torch.set_num_threads(1)  # models this small are fastest on one
    model = GPT2(config, vocab)
    optimizer = adamw(model, OptimConfig(), "cpu")
    for _ in range(steps):
        for _ in range(n_micro):
            ids = torch.randint(0, vocab, (rows, config.block_size + 1))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(ids[:, :-1], ids[:, 1:]) / n_micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"kept": KEPT, "peak": peak}))


main(**json.loads(sys.argv[1]))

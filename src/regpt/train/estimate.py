"""How long a run will take, by timing steps of the model's first one and two layers on this machine, now.

A layer's time is their difference; all else (embedding, head, loss) is what remains. Measured at the run's own shapes,
because no single rate describes a processor: a layer's products, attention and norms all reach other shares of it.
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from regpt.config import Config, ModelConfig
from regpt.models import build_model
from regpt.models.count import flops_per_token
from regpt.models.memory import memory_estimate
from regpt.optim.groups import make_optimizer
from regpt.train.machine import Machine, autocast
from regpt.train.plan import LARGEST, Plan, with_steps

TRIAL_TOKENS = 2048  # of one timed pass at most,
TRIAL_FLOPS = 4e11  # and arithmetic: a second or so on a slow machine; what is longer is scaled by it
TRIAL_S = 0.15  # spent on timing each model, once it is warm


def with_time(plan: Plan, config: Config, machine: Machine) -> Plan:
    """The plan with `time_s`: as it is where a data sheet gave it, measured elsewhere; at most a few seconds of work.

    With train.minutes, of as many steps as fit. What the machine has no room for is not tried: its time stays unknown.
    The generator's state is left as it was.
    """
    plan = plan if plan.time_s is not None else _measured(plan, config, machine)
    if config.train.minutes is None or plan.time_s is None:
        return plan
    # In whole batches; where they are ramped up, there are more steps in them.
    fitting = 60 * config.train.minutes / plan.time_s * (plan.batches.before(plan.steps) / plan.batch_rows)
    steps = plan.batches.steps_in(fitting)
    return with_steps(plan, min(max(steps, 1), LARGEST))


def _measured(plan: Plan, config: Config, machine: Machine) -> Plan:
    """The plan with `time_s` by timing passes and updates, where there is room for them."""
    two_layers = dataclasses.replace(config.model, n_layer=2)
    T = config.model.block_size
    while T > 64 and (T > TRIAL_TOKENS or T * _flops(two_layers, T, plan) > TRIAL_FLOPS):
        T //= 2
    rows = max(1, min(plan.micro_rows, TRIAL_TOKENS // T))
    tried = dataclasses.replace(two_layers, block_size=T)
    needed = memory_estimate(
        tried, plan.vocab_size, micro_rows=rows, dtype=plan.dtype, device_type=machine.kind
    )
    if needed.total > (machine.memory_bytes or math.inf):
        return plan
    with torch.random.fork_rng(devices=[]):
        one, two = (_pass_and_update_s(n, rows, T, plan, config, machine) for n in (1, 2))
    layers = config.model.n_layer - 1
    pass_s, update_s = (max(a, a + layers * (b - a)) for a, b in zip(one, two, strict=True))
    # On average: a ramp's batches have fewer tokens, and as much of an update.
    ramped = plan.batches.before(plan.steps) / (plan.steps * plan.batch_rows)
    tokens = plan.n_micro * plan.micro_rows * config.model.block_size * ramped
    longer = plan.flops_per_token / _flops(config.model, T, plan)
    step_s = pass_s * tokens / (rows * T) * longer + update_s
    return dataclasses.replace(plan, time_s=plan.steps * step_s)


def _flops(model: ModelConfig, block_size: int, plan: Plan) -> float:
    """Of one token, forward and backward, at that context."""
    return flops_per_token(dataclasses.replace(model, block_size=block_size), plan.vocab_size)


def _pass_and_update_s(
    n_layer: int, rows: int, block_size: int, plan: Plan, config: Config, machine: Machine
) -> tuple[float, float]:
    """Seconds of a forward and backward pass over `rows` of `block_size`, and of an update: each the best of some."""
    shape = dataclasses.replace(config.model, n_layer=n_layer, block_size=block_size)
    model = build_model(shape, plan.vocab_size).to(machine.device)
    optimizer = make_optimizer(model, config.optim, machine.kind, dtype=plan.dtype)
    ids = torch.zeros(rows, shape.block_size, dtype=torch.int64, device=machine.device)
    best_pass = best_update = float("inf")
    began = None
    while began is None or time.perf_counter() - began < TRIAL_S:
        marks = [time.perf_counter()]
        with autocast(machine, plan.dtype):
            loss = model(ids, ids)
        loss.backward()
        loss.item()  # waits for the device
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        next(model.parameters()).sum().item()  # waits for the device
        marks.append(time.perf_counter())
        if began is not None:  # the first time through warms up
            best_pass = min(best_pass, marks[1] - marks[0])
            best_update = min(best_update, marks[2] - marks[1])
        began = began or marks[-1]
    return best_pass, best_update

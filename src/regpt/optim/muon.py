"""Muon: momentum whose matrices are made orthogonal before they are applied; AdamW for what is not a matrix, in one optimizer.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (https://kellerjordan.github.io/posts/muon/).
With B = lerp(B, G, 1 - momentum) and Nesterov's U = lerp(G, B, momentum), the update is U's polar factor: U S Vᵀ -> U Vᵀ, by
five steps of an iteration in matrix products alone. One step with `newton_schulz` equals `torch.optim.Muon`'s, but matrices
of one shape go through it together, and of several ranks each takes its share of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from regpt.train.dist import Ranks, is_sharded, sharded_like

Coefficients = Sequence[tuple[float, float, float]]
# X -> aX + b(XXᵀ)X + c(XXᵀ)²X. Jordan's numbers rise fastest near 0 and end within 0.7 to 1.2, which is near enough.
NEWTON_SCHULZ: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
# Amsel et al. 2025, "The Polar Express" (arXiv:2505.16932): the best step for what the steps before it left. As
# modded-nanogpt has them in train_gpt.py, for inputs scaled to 1 / 1.02.
POLAR_EXPRESS: Coefficients = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
ITERATIONS = {"newton_schulz": (NEWTON_SCHULZ, 1.0), "polar_express": (POLAR_EXPRESS, 1.02)}
NORM_EPS = 1e-7  # a smaller norm counts as this, so that zero stays zero


def orthogonalize(
    matrices: Tensor, coefficients: Coefficients = NEWTON_SCHULZ, margin: float = 1.0
) -> Tensor:
    """The polar factors of matrices (N, rows, columns), computed in their dtype, all at once.

    A matrix's result does not depend on its neighbours in the batch, on a CPU to the bit (tests/optim/test_muon.py).

    Args:
        coefficients: (a, b, c) of each step.
        margin: the Frobenius norm, which is at least the largest singular value, is multiplied by it beforehand.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller product
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) * margin).clamp(min=NORM_EPS)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for groups of kind "muon", fused AdamW for groups of kind "adam".

    Args:
        groups: each with `params`, or (name, parameter) pairs, `kind`, `lr`, `weight_decay`, and of kind muon `momentum`,
            `cautious` and `parts`, parallel to the parameters: into how many matrices, one upon the other, each splits;
            of kind adam `betas`, `eps` and `fused`.
        method: newton_schulz or polar_express.
        dtype: of the iteration; where bfloat16 has hardware, it is precise enough (modded-nanogpt never used another).
        ranks: who shares the work; their gradients are equal, or shards of one. None: everyone does all of it.

    Momentum is a "momentum_buffer" beside each matrix, as of `torch.optim.Muon`; AdamW's state is `torch.optim.AdamW`'s.
    A sharded parameter (FSDP2) is gathered for the iteration, and of the result every rank keeps its shard.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        method: str = "newton_schulz",
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
    ) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "capturable": False, "fused": False}
        super().__init__(groups, defaults)
        self.method, self.dtype, self.ranks = method, dtype, ranks or Ranks()

    # PyTorch hides these from Dynamo, and imports it to do so: a second of every start that only a compiled run needs.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                self._muon(group, params)
            else:
                self._adam(group, params)

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        split = {id(p): n for p, n in zip(group["params"], group["parts"], strict=True)}
        pieces = [part for p in params for part in self._whole_update(group, p).chunk(split[id(p)])]
        results = iter(self._orthogonal(pieces))
        for p in params:
            parts = [next(results) for _ in range(split[id(p)])]
            rows, columns = parts[0].shape
            update = torch.cat(parts).to(p.dtype)
            if is_sharded(p):
                update = sharded_like(update, p)
            decay = group["lr"] * group["weight_decay"]
            if decay and group["cautious"]:
                p.sub_(p * (update * p >= 0), alpha=decay)
            elif decay:
                p.mul_(1 - decay)
            p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _whole_update(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """The momentum's step of one parameter, put together where it is sharded."""
        grad, state, momentum = cast(Tensor, p.grad), self.state[p], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum)
        return update.full_tensor() if is_sharded(update) else update

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """Each matrix's polar factor; those of one shape, or its transpose, in one batch, of which we compute our share."""
        kinds: dict[tuple[int, ...], list[int]] = {}
        for i, matrix in enumerate(matrices):
            kinds.setdefault(tuple(sorted(matrix.shape)), []).append(i)
        results = list(matrices)
        for members in kinds.values():
            share = -(-len(members) // self.ranks.world)
            ours = members[self.ranks.rank * share : (self.ranks.rank + 1) * share]
            first = matrices[members[0]]
            batch = torch.zeros(share, *sorted(first.shape), dtype=self.dtype, device=first.device)
            for row, i in enumerate(ours):
                batch[row].copy_(_wide(matrices[i]))
            done = torch.cat(self.ranks.gathered(orthogonalize(batch, *ITERATIONS[self.method])))
            for i, result in zip(members, done, strict=False):  # what is left over only filled the last share
                results[i] = result.mT if matrices[i].shape[0] > matrices[i].shape[1] else result
        return results

    def _adam(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device if group["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [cast(Tensor, p.grad) for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix

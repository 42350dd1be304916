"""One model over several ranks: DDP or FSDP2, how gradients are added up, and whole tensors in and out of shards.

`Gradients` is what the loop sees. Its three ways to the gradient of the mean loss of a global batch:
- one rank: autograd adds up micro-batches by itself.
- fast, the default above one rank: PyTorch's DDP or FSDP2 averages over ranks, at the last micro-batch.
- exact: micro-batches are the leaves of one binary tree over the global batch, whose sums are formed in the same order on
  any number of ranks, so the result is the same to the bit.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regpt.config import Config
from regpt.train.dist import Ranks, is_sharded, never_free, sharded_like
from regpt.train.plan import Plan

BUCKET_BYTES = 25 << 20  # of gradients gathered at a time by the exact sum


class TreeSum:
    """A sum of lists of tensors, added one after another, formed as a binary tree over their places.

    Like the carries of a binary counter: two sums of 2^k leaves become one of 2^(k+1). The sum of a block of 2^k leaves at a
    multiple of 2^k is therefore a node of the tree over all, so ranks that each hold such a block add the same numbers in
    the same order as one rank that holds them all. Memory: one list for each bit of the number of leaves.
    """

    def __init__(self) -> None:
        self._nodes: list[tuple[int, list[Tensor]]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """The next leaf. It is taken over, and changed in place."""
        size = 1
        while self._nodes and self._nodes[-1][0] == size:
            _, left = self._nodes.pop()
            torch._foreach_add_(left, tensors)
            tensors, size = left, 2 * size
        self._nodes.append((size, tensors))

    def result(self) -> list[Tensor]:
        """The sum of all leaves; what does not fill a power of two is added from the right."""
        _, total = self._nodes.pop()
        while self._nodes:
            _, left = self._nodes.pop()
            torch._foreach_add_(left, total)
            total = left
        return total


class Gradients:
    """The gradient of the mean loss over a global batch, micro-batch by micro-batch.

    `module` computes the loss: the model, inside DDP where that averages its gradients.
    """

    def __init__(self, model: nn.Module, plan: Plan, ranks: Ranks) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.n_micro = plan.n_micro
        """Micro-batches of this update on this rank; the loop sets it where batches grow."""
        self.ranks, self.model = ranks, model
        self.exact = plan.reduction == "exact"
        self.sharded = plan.strategy == "fsdp"
        self.ddp: DistributedDataParallel | None = None
        if ranks.world > 1 and not self.exact and not self.sharded:
            # Our one buffer is a constant. PyTorch 2.13 renamed the setting that stops it being sent before every pass.
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            no_buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **no_buffers)  # type: ignore[arg-type]
        self.module: nn.Module = self.ddp if self.ddp is not None else model
        self._tree = TreeSum()
        self._losses: list[Tensor] = []

    def before(self, micro: int) -> None:
        """Before the forward pass, which is where DDP and FSDP look whether this micro-batch will be the last."""
        last = micro == self.n_micro - 1
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = last
        elif self.sharded:
            cast(Any, self.model).set_requires_gradient_sync(last)

    def after(self, micro_loss: Tensor) -> None:
        """After the backward pass of one micro-batch whose mean loss is `micro_loss`, undivided."""
        self._losses.append(micro_loss.detach().float())
        if self.exact:
            self._tree.add([cast(Tensor, p.grad) for p in self.parameters])
            for p in self.parameters:
                p.grad = None

    @property
    def scale(self) -> float:
        """What a micro-batch's mean loss is multiplied by before its backward pass."""
        return 1.0 if self.exact else 1.0 / self.n_micro

    def finish(self) -> float:
        """Leave the global gradient in every parameter's `.grad`; the mean loss over the global batch."""
        losses = torch.stack(self._losses).cpu()
        self._losses = []
        everyone = [x for part in self.ranks.gathered(losses) for x in part]
        if self.exact:
            self._exact()
            tree = TreeSum()
            for x in everyone:
                tree.add([x.clone()])
            return float(tree.result()[0]) / len(everyone)
        return float(torch.stack(everyone).double().mean())

    def drop(self) -> None:
        """Forget a batch that was left in the middle."""
        self._losses, self._tree = [], TreeSum()

    def local_parameters(self) -> list[Tensor]:
        """What this rank holds of every parameter."""
        return [p.to_local() if is_sharded(p) else p for p in self.parameters]

    def _exact(self) -> None:
        local, self._tree = self._tree.result(), TreeSum()
        leaves = self.n_micro * self.ranks.world
        if self.ranks.world > 1:
            for bucket in _buckets(local):
                tree = TreeSum()
                for part in self.ranks.gathered(torch.cat([t.reshape(-1) for t in bucket])):
                    tree.add([part])
                total, at = tree.result()[0], 0
                for t in bucket:
                    t.copy_(total[at : at + t.numel()].view_as(t))
                    at += t.numel()
        for p, t in zip(self.parameters, local, strict=True):
            p.grad = t.div_(leaves)


def shard(model: nn.Module, config: Config, ranks: Ranks, device: str) -> None:
    """FSDP2 in place: each block, then the rest; every rank keeps its part of each tensor.

    With `train.shard_group` n, groups of n ranks hold a whole model each (hybrid sharding): gathering stays inside a group.
    """
    # These imports take a second, which only a sharded run has to spend.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # It warns of in-place operations on what a model returns; there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    kind = device.partition(":")[0]
    group = config.train.shard_group or ranks.world
    if group == ranks.world:
        mesh = init_device_mesh(kind, (ranks.world,))
    else:
        mesh = init_device_mesh(kind, (ranks.world // group, group), mesh_dim_names=("replicate", "shard"))
    for mesh_group in mesh.get_all_groups():
        never_free(mesh_group)
    for block in cast(Iterable[nn.Module], model.h):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # `named_parameters` then always are the shards
    # Each leaves shards behind, so they are gathered for the next too.
    for method in ("hidden", "head", "loss"):
        register_fsdp_forward_method(model, method)


def whole(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Sharded tensors put together on rank 0's host, one at a time, others as they are; nothing on the other ranks.

    All ranks call it.
    """
    out = {}
    for name, t in tensors.items():
        full = t.full_tensor() if is_sharded(t) else t
        if ranks.main:
            out[name] = full.cpu() if is_sharded(t) else full
    return out


def spread(
    tensors: Mapping[str, Tensor] | None, names: Iterable[str], like: Mapping[str, Tensor], ranks: Ranks
) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's whole `tensors` on every rank, one at a time, each sharded as the tensor of that name in `like` is.

    Args:
        tensors: None on the other ranks.
        names: in the same order on all.
        like: those that are missing, or of another shape, are given whole.
    """
    if tensors is not None and ranks.world == 1:
        yield from ((name, tensors[name]) for name in names)
        return
    for name in names:
        full = None if tensors is None else tensors[name]
        shape, dtype = ranks.from_main([list(full.shape), str(full.dtype)] if full is not None else None)
        model = like.get(name)
        device = model.device if model is not None else torch.device("cpu")
        received = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
        if full is not None:
            received.copy_(full)
        ranks.broadcast(received)
        if model is not None and is_sharded(model) and model.shape == received.shape:
            received = sharded_like(received, model)
        yield name, received


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for t in tensors:
        bucket.append(t)
        if sum(x.nbytes for x in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def grad_norm(parameters: Iterable[Tensor], clip: float) -> float:
    """Clip the gradients to the norm `clip`; the norm they had, over all ranks' parts."""
    norm: Any = nn.utils.clip_grad_norm_(parameters, clip)
    return float(norm.full_tensor() if is_sharded(norm) else norm)

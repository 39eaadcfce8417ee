"""A model that the processes train together: their gradients, averaged."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..processes import Processes


def parallel(model: nn.Module, group: Processes) -> nn.Module:
    """The model, its gradients averaged over the processes."""
    return model if group.count == 1 else DistributedDataParallel(model)


def averaging(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """While a part's gradient is computed: whether this is the ``now`` to average it."""
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


def mean(tensor: Tensor, group: Processes) -> Tensor:
    """The mean of each process's tensor, on all of them."""
    if group.count > 1:
        dist.all_reduce(tensor)
        tensor /= group.count
    return tensor

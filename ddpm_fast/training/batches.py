"""What each step shows the network, as a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Dataset
from ..processes import Processes
from .config import TrainConfig
from .seeds import derived_seed


class Part(NamedTuple):
    """A part of a step's batch, on the device that trains.

    Attributes:
        images: ``[n, C, H, W]`` in [-1, 1].
        t: int64 ``[n]``, the timesteps.
        position: int64 ``[n]``, the indices of the pictures among all that the run shows.
        labels: int64 ``[n]``, dropped ones null; None for a network without classes.
        dropout_seed: of the network's own randomness.
        is_last: whether this process has no further part of the batch.
    """

    images: Tensor
    t: Tensor
    position: Tensor
    labels: Tensor | None
    dropout_seed: int
    is_last: bool


class Batches:
    """The batches of a run, each divided among its processes and into ``config.accumulate`` parts.

    Raises:
        ValueError: a batch has fewer pictures than parts.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: TrainConfig,
        num_timesteps: int,
        num_classes: int | None,
        device: torch.device,
        group: Processes,
    ) -> None:
        count, size = group.count * config.accumulate, config.batch_size
        if size < count:
            raise ValueError(
                f"batch_size must be at least {count}, a picture for each of {config.accumulate}"
                f" parts on each of {group.count} processes; got {size}"
            )
        self.dataset = dataset
        self.config = config
        self.num_timesteps = num_timesteps
        self.num_classes = num_classes
        self.device = device
        bounds = [size * i // count for i in range(count + 1)]
        parts = list(zip(bounds[:-1], bounds[1:], strict=True))
        self._ours = parts[group.rank * config.accumulate : (group.rank + 1) * config.accumulate]
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def parts(self, step: int) -> Iterator[Part]:
        """This process's parts of a step's batch."""
        size = self.config.batch_size
        # For the whole batch, so that they do not depend on how it is divided.
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, "batch", step))
        t = torch.randint(self.num_timesteps, (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < self.config.label_dropout
        for first, end in self._ours:
            position = step * size + first
            seeds = [step] if first == 0 else [step, first]
            augmentation = torch.Generator().manual_seed(
                derived_seed(self.config.seed, "augmentation", *seeds)
            )
            indices = self._indices(position, end - first)
            images, labels = self.dataset.batch(indices, augmentation)
            if self.num_classes is not None:
                assert labels is not None
                labels = self._sent(labels.masked_fill(dropped[first:end], self.num_classes))
            yield Part(
                self._sent(images),
                self._sent(t[first:end]),
                torch.arange(position, position + end - first, device=self.device),
                labels if self.num_classes is not None else None,
                derived_seed(self.config.seed, "dropout", *seeds),
                is_last=end == self._ours[-1][1],
            )

    def _indices(self, position: int, count: int) -> Tensor:
        """Which pictures stand there in the endless sequence of shuffled epochs."""
        pieces = []
        while count > 0:
            epoch, start = divmod(position, len(self.dataset))
            pieces.append(self._epoch(epoch)[start : start + count])
            position, count = position + len(pieces[-1]), count - len(pieces[-1])
        return torch.cat(pieces)

    def _epoch(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            seed = derived_seed(self.config.seed, "epoch", epoch)
            generator = torch.Generator().manual_seed(seed)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return self._order[1]

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the device; a GPU's queue goes on meanwhile, for which memory has to be pinned."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

"""Continuous batching: requests join and leave a batch between its steps."""

from __future__ import annotations

import itertools
import operator
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from . import ops
from .conditioning import checked_labels, null_label, with_null
from .diffusion import GaussianDiffusion
from .evaluating import evaluating
from .guidance import check_guidance, rescale_factor, scale_table
from .network import Model, Network, check_has_variance
from .ops import ROW
from .solvers import Spacing, StepTable, step_table


@dataclass
class _Request:
    ticket: int
    seed: Tensor
    index: int
    table: StepTable
    first_row: int
    steps_left: int
    label: Tensor | None
    guidance_scale: float


class ContinuousSampler:
    """Draws samples that each have a seed, a sampler and a number of steps of their own, together.

    Every step is one call of the network and one of the kernel for all requests under way, each at
    its own timestep. A request that is done makes room for the next one at once. Its sample is
    that of :func:`sample` for the same seed and index, whoever shared its batches, up to what the
    network's own arithmetic makes of a batch. The batch changes, so nothing is captured. One
    thread steps; any thread may submit.

    Args:
        model, diffusion, guidance_rescale, device, precision, compile, backend: as for
            :func:`sample`.
        shape: ``(C, ...)`` of one sample.
        max_batch: how many requests are under way at most; the others wait.
        guided: requests have labels and a guidance scale.

    Raises:
        ValueError, RuntimeError: as :func:`sample`.
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        max_batch: int,
        diffusion: GaussianDiffusion | None = None,
        guided: bool = False,
        guidance_rescale: float = 0.0,
        device: torch.device | str | None = None,
        precision: str | None = None,
        compile: bool = False,
        backend: str = "auto",
    ) -> None:
        self.shape = tuple(operator.index(size) for size in shape)
        if not self.shape or min(self.shape) < 1 or max_batch < 1:
            raise ValueError(
                "shape must be (C, ...) and max_batch a number, each at least 1; "
                f"got {self.shape} and {max_batch}"
            )
        check_guidance(1.0 if guided else None, guidance_rescale)
        if guided:
            null_label(model)
        self.max_batch = max_batch
        self.diffusion = diffusion or GaussianDiffusion()
        self.guided = guided
        self.guidance_rescale = guidance_rescale
        self.network = Network(model, device=device, precision=precision, compile=compile)
        self.backend = backend
        ops.serves_natively(self.network.device, backend)
        self._lock = threading.Lock()  # of all that submit changes or reads
        self._tickets = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._active: list[_Request] = []
        self._tables: dict[tuple[object, ...], tuple[int, StepTable]] = {}
        self._turn = 0
        self._copies = 2 if guided else 1  # of each sample, for the network to look at
        with torch.inference_mode(False):  # a sampler serves in any mode
            self._prepare_buffers()

    def submit(
        self,
        *,
        seed: SupportsIndex | None = None,
        index: SupportsIndex = 0,
        sampler: str = "ddpm",
        num_steps: int | None = None,
        eta: float = 0.0,
        timestep_spacing: Spacing = "trailing",
        class_label: int | None = None,
        guidance_scale: float = 1.0,
    ) -> int:
        """Asks for a sample, which is begun at the next step if there is room; returns its ticket.

        Args:
            seed, sampler, num_steps, eta, timestep_spacing: as for :func:`sample`.
            index: of the sample in the run of this seed, :func:`sample`'s ``first_index``.
            class_label: as one of :func:`sample`'s ``class_labels``; all requests have one, or
                none has.
            guidance_scale: w of classifier-free guidance, where the sampler is ``guided``.

        Raises:
            ValueError, TypeError: as :func:`sample`.
        """
        number = operator.index(index)
        if not 0 <= number < 1 << 48:
            raise ValueError(f"index must lie in [0, 2**48); got {number}")
        if not self.guided and guidance_scale != 1:
            raise ValueError("guidance_scale needs a sampler that is guided")
        scale = float(scale_table(guidance_scale, 1, 1, self.rows))
        with self._lock:
            first_row, table = self._table(sampler, num_steps, eta, timestep_spacing)
            request = _Request(
                ticket=next(self._tickets),
                seed=ops.seed_tensor(seed, self.network.device),
                index=number,
                table=table,
                first_row=first_row,
                steps_left=len(table),
                label=self._checked_label(class_label),
                guidance_scale=scale,
            )
            self._waiting.append(request)
        return request.ticket

    def step(self) -> dict[int, Tensor]:
        """One step of all requests under way; the samples that it finished, by their tickets.

        Each is ``shape``, float32 (float64 for a float64 model).
        """
        with self._lock:
            self._admit()
        if not self._active:
            return {}
        with evaluating(self.network.model), torch.inference_mode(), self.network.autocast():
            self._advance()
        self._turn = 1 - self._turn
        for request in self._active:
            request.steps_left -= 1
        with self._lock:
            return self._release()

    def run(self) -> Iterator[tuple[int, Tensor]]:
        """Steps until nothing is left, and yields tickets and samples ``[C, ...]`` as they end."""
        while len(self):
            yield from self.step().items()

    def __len__(self) -> int:
        """The requests that are not finished, under way or waiting."""
        return len(self._active) + len(self._waiting)

    def _prepare_buffers(self) -> None:
        network, slots = self.network, self.max_batch
        dtype, device = ops.compute_dtype(network.dtype), network.device
        layout = network.memory_format(1 + len(self.shape))
        asked = slots * self._copies
        self.rows = torch.empty((0, len(ROW)), dtype=dtype, device=device)
        like = {"dtype": dtype, "device": device, "memory_format": layout}
        self._x = torch.empty((slots, *self.shape), **like)  # type: ignore[call-overload]
        self._history = torch.empty_like(self._x)
        self._input = torch.empty(
            (asked, *self.shape), dtype=network.dtype, device=device, memory_format=layout
        )
        self._steps = torch.zeros((2, slots), dtype=torch.int64, device=device)
        self._seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        self._indices = torch.zeros_like(self._seeds)
        self._labels = torch.zeros_like(self._seeds)
        self._scales = torch.ones(slots, dtype=dtype, device=device)
        self._t = torch.empty(asked, dtype=torch.int64, device=device)

    def _slots(self) -> list[Tensor]:
        """All that belongs to a request, a slot each."""
        of_both_turns = self._steps.unbind()
        numbers = self._seeds, self._indices, self._labels, self._scales
        return [self._x, self._history, *of_both_turns, *numbers]

    def _table(
        self, sampler: str, num_steps: int | None, eta: float, spacing: Spacing
    ) -> tuple[int, StepTable]:
        """A table and its first row among those of all tables."""
        spacing = spacing if isinstance(spacing, str) else tuple(map(operator.index, spacing))
        key = sampler, num_steps, eta, spacing
        if key not in self._tables:
            table = step_table(
                self.diffusion, sampler, num_steps, eta=eta, timestep_spacing=spacing
            )
            rows = table.to(self.rows.device, self.rows.dtype)
            first_row, self.rows = len(self.rows), torch.cat([self.rows, rows])
            self._tables[key] = first_row, table
        return self._tables[key]

    def _checked_label(self, label: int | None) -> Tensor | None:
        others = self._active or self._waiting
        if others and (others[0].label is None) != (label is None):
            raise ValueError("all requests that share a sampler have a class_label, or none has")
        if label is None:
            if self.guided:
                raise ValueError("guidance needs a class_label to guide towards")
            return None
        return checked_labels(label, 1, self.network.model)[0]

    def _admit(self) -> None:
        room = self.max_batch - len(self._active)
        joining = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        for slot, request in enumerate(joining, len(self._active)):
            self._begin(request, slot)
        self._active += joining
        if joining:
            self._gather()

    def _begin(self, request: _Request, slot: int) -> None:
        self._seeds[slot] = request.seed
        self._indices[slot] = request.index
        self._steps[self._turn, slot] = request.first_row
        self._scales[slot] = request.guidance_scale
        if request.label is not None:
            self._labels[slot] = request.label
        self._x[slot] = ops.philox_normal(
            (1, *self.shape),
            seed=request.seed,
            sample_index=self._indices[slot : slot + 1],
            timestep=torch.zeros_like(request.seed),
            dtype=self._x.dtype,
            backend=self.backend,
        )[0]

    def _release(self) -> dict[int, Tensor]:
        finished = {}
        # From the last on, so that the slot that fills a gap is of a request under way.
        for slot in reversed(range(len(self._active))):
            if self._active[slot].steps_left == 0:
                finished[self._active[slot].ticket] = self._x[slot].clone()
                last = len(self._active) - 1
                for buffer in self._slots():
                    buffer[slot].copy_(buffer[last])
                self._active[slot] = self._active[last]
                self._active.pop()
        if finished:
            self._gather()
        return dict(sorted(finished.items()))

    def _gather(self) -> None:
        """What the network is asked next, after the batch has changed."""
        count = len(self._active)
        timestep = self.rows[:, ROW.index("timestep")]
        t = timestep.index_select(0, self._steps[self._turn, :count]).long()
        self._asked(self._t).view(self._copies, count).copy_(t)
        self._asked(self._input).view(self._copies, *self._x[:count].shape).copy_(self._x[:count])

    def _asked(self, buffer: Tensor) -> Tensor:
        return buffer[: len(self._active) * self._copies]

    def _labels_asked(self) -> dict[str, Tensor]:
        if self._active[0].label is None:
            return {}
        labels = self._labels[: len(self._active)]
        if self.guided:
            labels = with_null(labels, self.network.model)
        return {"class_labels": labels}

    def _advance(self) -> None:
        count = len(self._active)
        model_input, t = self._asked(self._input), self._asked(self._t)
        output = self.network(model_input, t, self._labels_asked())
        # All tables are of one diffusion: they clamp alike, and read a variance or do not.
        table = self._active[0].table
        if table.reads_variance:
            check_has_variance(output, self.shape[0])
        x, step = self._x[:count], self._steps[self._turn, :count]
        scale = self._scales[None, :count] if self.guided else None
        factor = None
        if scale is not None and self.guidance_rescale:
            factor = rescale_factor(output, scale, step, x, self.guidance_rescale)
        threshold = None
        if table.thresholding is not None:
            threshold = table.thresholding.threshold(x, output, self.rows, step, scale, factor)
        ops.reverse_step(
            x,
            output,
            self.rows,
            step,
            seed=self._seeds[:count],
            sample_index=self._indices[:count],
            x0_prev=self._history[:count],
            guidance_scale=scale,
            guidance_factor=factor,
            threshold=threshold,
            clip=table.clip,
            out=x,
            pred_xstart=self._history[:count],
            next_input=model_input,
            next_step=self._steps[1 - self._turn, :count],
            next_t=t,
            backend=self.backend,
        )

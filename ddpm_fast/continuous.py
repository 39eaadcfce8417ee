"""Continuous batching: requests join and leave a batch between its steps."""

from __future__ import annotations

import itertools
import operator
import threading
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import ops
from .conditioning import checked_labels, null_label, with_null
from .diffusion import GaussianDiffusion
from .evaluating import evaluating
from .guidance import check_guidance, rescale_factor, scale_table
from .network import Model, Network, check_has_variance
from .ops import ROW
from .solvers import Spacing, StepTable, check_sampler, step_table


@dataclass
class _Request:
    ticket: int
    seed: Tensor
    index: int
    key: Hashable  # of its table
    table: StepTable  # its rows rounded
    steps_left: int
    label: Tensor | None
    guidance_scale: float
    cancelled: bool = False


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
        self._finished: dict[int, Tensor] = {}
        # Those that some request needs, and where in the rows those of the steps under way begin.
        self._tables: WeakValueDictionary[Hashable, StepTable] = WeakValueDictionary()
        self._first_rows: dict[Hashable, int] = {}
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
        scale = float(scale_table(guidance_scale, 1, 1, self._x.new_empty(0, device="cpu")))
        if not self.guided and scale != 1:
            raise ValueError("guidance_scale needs a sampler that is guided")
        with self._lock:
            key, table = self._table(sampler, num_steps, eta, timestep_spacing)
            request = _Request(
                ticket=next(self._tickets),
                seed=ops.seed_tensor(seed, "cpu"),
                index=number,
                key=key,
                table=table,
                steps_left=len(table),
                label=self._checked_label(class_label),
                guidance_scale=scale,
            )
            self._waiting.append(request)
        return request.ticket

    def cancel(self, ticket: int) -> bool:
        """Gives the request of a ticket up, before the next step; whether it had been going on."""
        with self._lock:
            for request in (*self._waiting, *self._active):
                if request.ticket == ticket and not request.cancelled:
                    request.cancelled = True
                    return True
        return False

    def step(self) -> dict[int, Tensor]:
        """One step of all requests under way; the samples that are finished, by their tickets.

        Each is ``shape``, float32 (float64 for a float64 model). Where the network raises, the
        step has not been taken: all requests are as they were.
        """
        self._step()
        with self._lock:
            finished, self._finished = self._finished, {}
        return finished

    def run(self) -> Iterator[tuple[int, Tensor]]:
        """Steps until nothing is left, and yields tickets and samples ``[C, ...]`` as they end.

        What it has not yielded when it is left, the next ``run`` or ``step`` gives.
        """
        while len(self):
            if not self._finished:
                self._step()
            while self._finished:
                ticket = next(iter(self._finished))
                yield ticket, self._finished.pop(ticket)

    def __len__(self) -> int:
        """The requests whose samples have not been given out: waiting, under way or finished."""
        with self._lock:
            asked = sum(not request.cancelled for request in (*self._waiting, *self._active))
            return asked + len(self._finished)

    def _step(self) -> None:
        with self._lock:
            self._release()
            self._admit()
        if not self._active:
            return
        with evaluating(self.network.model), torch.inference_mode(), self.network.autocast():
            self._advance()
        self._turn = 1 - self._turn
        for request in self._active:
            request.steps_left -= 1
        with self._lock:
            self._release()

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
    ) -> tuple[Hashable, StepTable]:
        """A table, made once for all requests that want it at a time, and what it is known by."""
        check_sampler(sampler)
        spacing = spacing if isinstance(spacing, str) else tuple(map(operator.index, spacing))
        key = sampler, num_steps, eta, spacing
        table = self._tables.get(key)
        if table is None:
            options = {"eta": eta, "timestep_spacing": spacing}
            table = step_table(self.diffusion, sampler, num_steps, **options)  # type: ignore[arg-type]
            # Here, not when it is laid out: what cannot be rounded would then fail all requests.
            table = replace(table, rows=table.to(torch.device("cpu"), self.rows.dtype))
            self._tables[key] = table
        return key, table

    def _checked_label(self, label: int | None) -> Tensor | None:
        others = itertools.chain(self._active, self._waiting)
        other = next((request for request in others if not request.cancelled), None)
        if other is not None and (other.label is None) != (label is None):
            raise ValueError("all requests that share a sampler have a class_label, or none has")
        if label is None:
            if self.guided:
                raise ValueError("guidance needs a class_label to guide towards")
            return None
        return checked_labels(label, 1, self.network.model)[0]

    def _admit(self) -> None:
        room = self.max_batch - len(self._active)
        joining = list(itertools.islice(self._waiting, room))
        if any(request.key not in self._first_rows for request in joining):
            self._lay_out([*self._active, *joining])
        for request in joining:
            self._begin(request, len(self._active))
            self._active.append(self._waiting.popleft())
        if joining:
            self._gather()

    def _lay_out(self, requests: Sequence[_Request]) -> None:
        """The rows of these requests' tables one behind the other, and no others."""
        tables = {request.key: request.table for request in requests}
        starts = itertools.accumulate(map(len, tables.values()), initial=0)
        self.rows = torch.cat([table.rows for table in tables.values()]).to(self.rows.device)
        self._first_rows = dict(zip(tables, starts, strict=False))
        for slot, request in enumerate(self._active):
            self._steps[self._turn, slot] = self._row_of(request)

    def _row_of(self, request: _Request) -> int:
        return self._first_rows[request.key] + len(request.table) - request.steps_left

    def _begin(self, request: _Request, slot: int) -> None:
        self._seeds[slot] = request.seed
        self._indices[slot] = request.index
        self._steps[self._turn, slot] = self._row_of(request)
        self._scales[slot] = request.guidance_scale
        if request.label is not None:
            self._labels[slot] = request.label
        self._x[slot] = ops.philox_normal(
            (1, *self.shape),
            seed=self._seeds[slot],
            sample_index=self._indices[slot : slot + 1],
            timestep=torch.zeros_like(self._seeds[slot]),
            dtype=self._x.dtype,
            backend=self.backend,
        )[0]

    def _release(self) -> None:
        """Lets those leave that are done or cancelled."""
        leaving = [slot for slot, request in enumerate(self._active) if _leaves(request)]
        for slot in sorted(leaving, key=lambda slot: self._active[slot].ticket):
            if not self._active[slot].cancelled:
                self._finished[self._active[slot].ticket] = self._x[slot].clone()
        # From the last on, so that the slot that fills a gap is of a request under way.
        for slot in reversed(leaving):
            last = len(self._active) - 1
            for buffer in self._slots():
                buffer[slot].copy_(buffer[last])
            self._active[slot] = self._active[last]
            self._active.pop()
        if leaving:
            self._gather()
        self._waiting = deque(request for request in self._waiting if not request.cancelled)

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


def _leaves(request: _Request) -> bool:
    return request.cancelled or request.steps_left == 0

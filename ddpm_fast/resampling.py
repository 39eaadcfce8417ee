"""RePaint's schedule, which goes back and forth, as one more table."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .diffusion import GaussianDiffusion
from .ops import ROW, STREAMS
from .solvers import StepTable


def resampled(
    table: StepTable,
    diffusion: GaussianDiffusion,
    *,
    jump_length: int = 10,
    jump_n_sample: int = 10,
) -> StepTable:
    """Takes ``table``'s steps again and again: Lugmayr et al. 2022 (arXiv 2201.09865), appendix B.

    After every ``jump_length`` steps the run goes as many back, ``jump_n_sample`` - 1 times, so
    that what is drawn can come to agree with what is known. A jump back diffuses the state, and
    two Gaussians in a row are one: it is folded into the step that it follows, and costs nothing.
    There, a variance of ``learned_range`` is taken at its lower end, next to the jump's own.

    Args:
        table: of :func:`ddpm_fast.solvers.ddpm` or ``ddim``.
        diffusion: the one that the table was made for.
        jump_length: at least 1; a table of no more steps has none to jump back.
        jump_n_sample: how often each stretch is taken, at least 1.

    Raises:
        ValueError: a number below 1, a table that goes back already, or reads its history, which a
            jump would outdate, or a ``learned`` variance, which cannot be folded.
    """
    jump_length, jump_n_sample = operator.index(jump_length), operator.index(jump_n_sample)
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(
            f"jump_length and jump_n_sample must be at least 1; got {jump_length}, {jump_n_sample}"
        )
    order, jumps = _order(len(table), jump_length, jump_n_sample)
    if len(order) == len(table):
        return table
    if any(a <= b for a, b in pairwise(table.timesteps)):
        raise ValueError("only a table whose timesteps decrease can be resampled, and only once")
    if table.has_history:
        raise ValueError("a sampler that reads its history cannot jump back; take ddpm or ddim")
    if diffusion.variance_type == "learned":
        raise ValueError("a learned variance cannot be resampled; learned_range and fixed ones can")

    timesteps = [table.timesteps[row] for row in order]
    columns = dict(zip(ROW, table.rows[order].unbind(1), strict=True))
    ends = columns["known_from_x0"].square()
    targets = ends.clone()
    for position, row in jumps.items():
        targets[position] = diffusion.alphas_cumprod[table.timesteps[row]]
    _fold(columns, targets / ends, reads_variance=table.reads_variance)
    columns["stream"] = _streams(order)
    rows = torch.stack([columns[name] for name in ROW], dim=1)
    return replace(table, timesteps=tuple(timesteps), rows=rows)


def _order(steps: int, length: int, times: int) -> tuple[list[int], dict[int, int]]:
    """The rows in the order they are taken; and, after which of these, a jump to which row."""
    left_to_jump = {1 + end: times - 1 for end in range(0, steps - length, length)}
    order: list[int] = []
    jumps = {}
    remaining = steps
    while remaining > 0:
        order.append(steps - remaining)
        remaining -= 1
        if left_to_jump.get(remaining, 0) > 0:
            left_to_jump[remaining] -= 1
            remaining += length
            jumps[len(order) - 1] = steps - remaining
    return order, jumps


def _fold(columns: dict[str, Tensor], ratio: Tensor, *, reads_variance: bool) -> None:
    """Each step, then x -> sqrt(ratio) x + sqrt(1 - ratio) noise; no jump where ratio is 1."""
    jumps = ratio < 1
    for name in ("mean_from_x0", "mean_from_xt", "mean_from_out", "known_from_x0"):
        columns[name] = columns[name] * ratio.sqrt()
    columns["known_sigma"] = (1 - columns["known_from_x0"].square()).clamp(min=0).sqrt()
    if not reads_variance:
        columns["sigma"] = (ratio * columns["sigma"].square() + 1 - ratio).sqrt()
        return
    smallest = columns["sigma"].square() * columns["min_log_variance"].exp()
    log_variance = (ratio * smallest + 1 - ratio).log()
    for name in ("min_log_variance", "max_log_variance"):
        columns[name] = torch.where(jumps, log_variance, columns[name])
    columns["sigma"] = torch.where(jumps, 1.0, columns["sigma"])


def _streams(order: list[int]) -> Tensor:
    """A step that is taken again draws from another stream."""
    visits: dict[int, int] = {}
    streams = []
    for row in order:
        again = visits.get(row, 0)
        streams.append(STREAMS["resampled"] + again - 1 if again else STREAMS["reverse"])
        visits[row] = again + 1
    return torch.tensor(streams, dtype=torch.float64, device="cpu")

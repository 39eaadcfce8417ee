"""The states that a run passed through, for those who want to see more of it than its end."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

# How many moments to keep, or which.
Moments = SupportsIndex | Sequence[SupportsIndex]


class Intermediates(NamedTuple):
    """K moments of a run of S steps, counted in the steps taken: 0 is the start, S the end.

    Moment k < S is what step k was given and what it made of it, so that ``x_t`` and
    ``pred_xstart`` belong to one timestep.

    Attributes:
        steps: The moments, K of 0 ... S.
        timesteps: What the network was told there; -1 at the end, where it is not asked.
        x_t: ``[K, N, C, ...]``, the states: x_T at moment 0, the samples at moment S.
        pred_xstart: ``[K, N, C, ...]``, the x_start predicted from each, clamped as the step
            clamps it; at the end, where none is, that of the last step.
    """

    steps: tuple[int, ...]
    timesteps: tuple[int, ...]
    x_t: Tensor
    pred_xstart: Tensor

    def captions(self) -> list[str]:
        """What to write beside the moments: ``t = 999`` and so on, ``sample`` at the end."""
        return ["sample" if t < 0 else f"t = {t}" for t in self.timesteps]


def checked_moments(asked: Moments | None, num_steps: int) -> tuple[int, ...]:
    """The moments that ``return_intermediates`` of a run of ``num_steps`` asks for.

    A number K stands for as many, evenly spaced over the run, both ends included.

    Raises:
        ValueError: K outside [2, num_steps + 1]; no moment at all, one outside [0, num_steps], or
            moments that do not increase.
        TypeError: something other than integers.
    """
    if asked is None:
        return ()
    if not isinstance(asked, Sequence):
        count = operator.index(asked)
        if not 2 <= count <= num_steps + 1:
            raise ValueError(
                f"return_intermediates must be a number of moments in [2, {num_steps + 1}], "
                f"or a list of them; got {asked}"
            )
        return tuple(round(i * num_steps / (count - 1)) for i in range(count))
    moments = tuple(map(operator.index, asked))
    increase = all(a < b for a, b in pairwise(moments))
    if not (moments and increase and moments[0] >= 0 and moments[-1] <= num_steps):
        raise ValueError(
            f"return_intermediates must list moments in [0, {num_steps}], each above the one "
            f"before; got {list(moments)}"
        )
    return moments


class Recorder:
    """Copies the moments asked for as a run passes through them; has memory for no more."""

    def __init__(self, moments: tuple[int, ...], timesteps: Sequence[int], x_T: Tensor) -> None:
        self._moments = moments
        self._place = {moment: place for place, moment in enumerate(moments)}
        self._timesteps = (*timesteps, -1)
        self._x_t = x_T.new_empty((len(moments), *x_T.shape))
        self._pred_xstart = torch.empty_like(self._x_t)
        self._reached = 0
        self._keep(self._x_t, 0, x_T)

    def step_taken(self, step: int, x: Tensor, pred_xstart: Tensor) -> None:
        """Step number ``step`` led to ``x`` by way of ``pred_xstart``."""
        end = len(self._timesteps) - 1
        self._keep(self._pred_xstart, step, pred_xstart)
        self._keep(self._x_t, step + 1, x)
        if step + 1 == end:
            self._keep(self._pred_xstart, end, pred_xstart)
        self._reached = sum(moment <= step or step + 1 == end for moment in self._moments)

    def _keep(self, kept: Tensor, moment: int, values: Tensor) -> None:
        if moment in self._place:
            kept[self._place[moment]].copy_(values)

    def intermediates(self) -> Intermediates:
        """The moments that the run has reached, which is all of them unless it was stopped."""
        steps = self._moments[: self._reached]
        return Intermediates(
            steps=steps,
            timesteps=tuple(self._timesteps[step] for step in steps),
            x_t=self._x_t[: self._reached],
            pred_xstart=self._pred_xstart[: self._reached],
        )

"""Samplers as tables: one row of numbers per sampling step, for the one kernel that executes them.

Every sampler here is linear around one clamp, so a sampler is a function that fills rows; see
:func:`ddpm_fast.ops.reverse_step` for what the kernel makes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .checks import dtype_name
from .diffusion import GaussianDiffusion
from .ops import ROW, STREAMS
from .schedules import respace
from .thresholding import Thresholding

Spacing = str | Sequence[int]


@dataclass(frozen=True)
class StepTable:
    """A run, step by step: sampling goes from the noisiest timestep to the cleanest.

    Attributes:
        timesteps: what the network is told, strictly decreasing, or, for
            :func:`ddim_inversion`, strictly increasing.
        rows: float64 ``[S, len(ROW)]`` on the CPU; rounded once, by :meth:`to`.
        clip: the clamp on the predicted x_start, or None.
        reads_variance: the rows expect a model with twice the channels.
        thresholding: clamps the predicted x_start by its own size; ``clip`` is None then.
        draws_noise: some row's sigma is above zero.
        has_history: some row reads the x_start that the step before it predicted.
    """

    timesteps: tuple[int, ...]
    rows: Tensor
    clip: float | None
    reads_variance: bool
    thresholding: Thresholding | None = None

    @cached_property
    def draws_noise(self) -> bool:  # noqa: D102
        return bool((self.rows[:, ROW.index("sigma")] > 0).any())

    @cached_property
    def has_history(self) -> bool:  # noqa: D102
        return bool((self.rows[:, ROW.index("mean_from_x0_prev")] != 0).any())

    def __len__(self) -> int:
        return len(self.timesteps)

    def tail(self, start: int) -> StepTable:
        """The steps from number ``start`` on, for a state that is already so far."""
        rows = self.rows[start:].clone()
        columns = dict(zip(ROW, rows[:1].unbind(1), strict=True))
        # Its first step has no history: its own prediction stands in.
        columns["mean_from_x0"] += columns["mean_from_x0_prev"]
        columns["mean_from_x0_prev"].zero_()
        return replace(self, timesteps=self.timesteps[start:], rows=rows)

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rows as a kernel reads them, ``[S, len(ROW)]`` on ``device``, rounded once.

        Raises:
            ValueError: a row is not finite in that dtype: hardly any signal is left, or the betas
                are degenerate.
        """
        rounded = self.rows.to(dtype)
        broken = (~rounded.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"the schedule gives a step at timestep {self.timesteps[broken[0]]} that is not "
                f"finite in {dtype_name(dtype)}"
            )
        return rounded.to(device)


def ddpm(
    diffusion: GaussianDiffusion,
    num_steps: int | None = None,
    *,
    timestep_spacing: Spacing = "trailing",
) -> StepTable:
    """Ancestral sampling, Ho et al. 2020, algorithm 2; with fewer than T steps, respaced.

    Respacing makes a chain of the timesteps visited, whose betas follow from their abar (Nichol &
    Dhariwal 2021, section 4). The last step adds no noise, whatever its timestep.

    Args:
        diffusion: the process to reverse.
        num_steps: as for :func:`ddpm_fast.schedules.respace`.
        timestep_spacing: as for :func:`ddpm_fast.schedules.respace`.

    Raises:
        ValueError: as :func:`ddpm_fast.schedules.respace`.
    """
    chain = _Chain(diffusion, num_steps, timestep_spacing)
    abar, prev = chain.abar, chain.abar_prev
    alpha = abar / prev
    beta = 1 - alpha
    posterior_variance = beta * (1 - prev) / (1 - abar)

    rows = chain.rows()
    rows["mean_from_x0"] = beta * prev.sqrt() / (1 - abar)
    rows["mean_from_xt"] = (1 - prev) * alpha.sqrt() / (1 - abar)

    variance_type = variance_type_of(diffusion, len(chain.timesteps))
    if variance_type == "fixed_small":
        rows["sigma"] = posterior_variance.sqrt()
    elif variance_type == "fixed_large":
        rows["sigma"] = beta.sqrt()
    else:
        rows["sigma"] = torch.ones_like(beta)
        if variance_type == "learned":
            rows["min_log_variance"] = -torch.ones_like(beta)
            rows["max_log_variance"] = torch.ones_like(beta)
        else:
            # The last posterior variance is 0, so its logarithm copies its neighbour's.
            floor = posterior_variance[-2:-1] if len(beta) > 1 else beta
            rows["min_log_variance"] = torch.cat([posterior_variance[:-1], floor]).log()
            rows["max_log_variance"] = beta.log()
    rows["sigma"][-1] = 0
    return chain.table(rows, reads_variance=variance_type.startswith("learned"))


def variance_type_of(diffusion: GaussianDiffusion, num_steps: int) -> str:
    """The diffusion's variance_type, or what None stands for in a chain of ``num_steps``."""
    whole = num_steps == diffusion.num_timesteps
    return diffusion.variance_type or ("fixed_large" if whole else "fixed_small")


def ddim(
    diffusion: GaussianDiffusion,
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
) -> StepTable:
    """DDIM, Song et al. 2021 (arXiv 2010.02502), eqs. 12 and 16.

    The noise direction is re-derived from the clamped x_start, and the step leads to the next
    timestep of the actual list; behind the last, abar is 1.

    Args:
        diffusion: the process to reverse.
        num_steps: as for :func:`ddpm_fast.schedules.respace`.
        eta: 0 is deterministic; 1 gives the variances of DDPM with ``fixed_small``.
        timestep_spacing: as for :func:`ddpm_fast.schedules.respace`.

    Raises:
        ValueError: ``eta`` outside [0, 1], and as :func:`ddpm_fast.schedules.respace`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}")
    chain = _Chain(diffusion, num_steps, timestep_spacing)
    abar, prev = chain.abar, chain.abar_prev
    variance = eta**2 * (1 - prev) / (1 - abar) * (1 - abar / prev)
    from_eps = (1 - prev - variance).clamp(min=0).sqrt()

    rows = chain.rows()
    # eps = (x_t - sqrt(abar) x_start) / sqrt(1 - abar)
    rows["mean_from_x0"] = prev.sqrt() - from_eps * (abar / (1 - abar)).sqrt()
    rows["mean_from_xt"] = from_eps / (1 - abar).sqrt()
    rows["sigma"] = variance.sqrt()
    rows["sigma"][-1] = 0
    return chain.table(rows, reads_variance=chain.learned)


def dpmpp_2m(
    diffusion: GaussianDiffusion,
    num_steps: int | None = None,
    *,
    timestep_spacing: Spacing = "trailing",
) -> StepTable:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2: few steps, no noise.

    A multistep solver of the second order in lambda = log(sqrt(abar) / sqrt(1 - abar)), which
    reads the previous step's clamped x_start. The first step, which has none, and the last,
    which leads to an infinite lambda, are of the first order.

    Args:
        diffusion: the process to reverse.
        num_steps: as for :func:`ddpm_fast.schedules.respace`.
        timestep_spacing: as for :func:`ddpm_fast.schedules.respace`.

    Raises:
        ValueError: as :func:`ddpm_fast.schedules.respace`.
    """
    chain = _Chain(diffusion, num_steps, timestep_spacing)
    abar, prev = chain.abar, chain.abar_prev
    h = _half_log_snr(prev) - _half_log_snr(abar)
    # 1 / 2r with r = h_{i-1} / h_i; it is 0 behind a step out of pure noise, whose h is infinite.
    extrapolation = torch.zeros_like(h)
    extrapolation[1:-1] = h[1:-1] / (2 * h[:-2])
    from_x0 = -prev.sqrt() * torch.expm1(-h)

    rows = chain.rows()
    rows["mean_from_x0"] = from_x0 * (1 + extrapolation)
    rows["mean_from_x0_prev"] = -from_x0 * extrapolation
    rows["mean_from_xt"] = ((1 - prev) / (1 - abar)).sqrt()
    return chain.table(rows, reads_variance=chain.learned)


def _half_log_snr(abar: Tensor) -> Tensor:
    return (abar.log() - (1 - abar).log()) / 2


def ddim_inversion(
    diffusion: GaussianDiffusion,
    num_steps: int | None = None,
    *,
    timestep_spacing: Spacing = "trailing",
) -> StepTable:
    """The noise that deterministic DDIM makes a sample of: its steps run backwards.

    From x_0, where abar is 1, each step leads to the next noisier timestep, at which the network
    is asked for eps (Song et al. 2021, section 4.3); what it predicts is read as at that timestep,
    so that networks of all prediction types lead to one x_T. There is no clamp. With the same
    arguments :func:`ddim` goes the same way back: exactly where the eps that the network predicts
    does not change along a step, and else the more closely, the more steps there are.

    Args:
        diffusion: the process to follow.
        num_steps: as for :func:`ddpm_fast.schedules.respace`.
        timestep_spacing: as for :func:`ddpm_fast.schedules.respace`; a list decreases here too.

    Raises:
        ValueError: as :func:`ddpm_fast.schedules.respace`.
    """
    chain = _Chain(diffusion, num_steps, timestep_spacing)
    abar, ahead = chain.abar_prev, chain.abar
    eps_from_xt, eps_from_out = diffusion.eps_coefs(ahead)
    rows = chain.rows(start=abar, end=ahead)
    # x_0 of x_t and eps, Song et al. 2021, eq. 12, and on from there with the same eps.
    rows["x0_from_xt"] = (1 - (1 - abar).sqrt() * eps_from_xt) / abar.sqrt()
    rows["x0_from_out"] = -(1 / abar - 1).sqrt() * eps_from_out
    rows["mean_from_x0"] = ahead.sqrt()
    rows["mean_from_xt"] = (1 - ahead).sqrt() * eps_from_xt
    rows["mean_from_out"] = (1 - ahead).sqrt() * eps_from_out
    table = chain.table(rows, reads_variance=chain.learned)
    return replace(
        table,
        timesteps=table.timesteps[::-1],
        rows=table.rows.flip(0),
        clip=None,
        thresholding=None,
    )


class _Chain:
    """The timesteps visited, each with its abar and that of the next one, behind the last 1."""

    def __init__(
        self, diffusion: GaussianDiffusion, num_steps: int | None, spacing: Spacing
    ) -> None:
        self.diffusion = diffusion
        self.timesteps = respace(diffusion.num_timesteps, num_steps, spacing)
        self.abar = diffusion.alphas_cumprod[self.timesteps]
        self.abar_prev = torch.cat([self.abar[1:], self.abar.new_ones(1)])
        self.learned = (diffusion.variance_type or "").startswith("learned")

    def rows(self, start: Tensor | None = None, end: Tensor | None = None) -> dict[str, Tensor]:
        """All columns, zero but for the prediction of x_start, the noise's key and what is known.

        ``start`` and ``end`` are the abar that each step starts at and leads to.
        """
        start, end = self.abar if start is None else start, self.abar_prev if end is None else end
        if self.diffusion.prediction_type == "epsilon" and not start.all():
            raise ValueError(
                f"no step can start at timestep {self.timesteps[int(start.argmin())]} with epsilon "
                "prediction: alphas_cumprod is 0 there, and noise alone tells nothing of x_start; "
                "use v_prediction or sample, or timesteps that leave it out"
            )
        columns = {name: torch.zeros_like(start) for name in ROW}
        columns["x0_from_xt"], columns["x0_from_out"] = self.diffusion.xstart_coefs(start)
        columns["timestep"] = torch.tensor(self.timesteps, dtype=torch.float64, device="cpu")
        columns["stream"] += STREAMS["reverse"]
        columns["known_from_x0"] = end.sqrt()
        columns["known_sigma"] = (1 - end).sqrt()
        return columns

    def table(self, columns: dict[str, Tensor], *, reads_variance: bool) -> StepTable:
        thresholding = None
        if self.diffusion.dynamic_thresholding_ratio is not None:
            thresholding = Thresholding(
                self.diffusion.dynamic_thresholding_ratio, self.diffusion.sample_max_value
            )
        return StepTable(
            timesteps=tuple(self.timesteps),
            rows=torch.stack([columns[name] for name in ROW], dim=1),
            clip=1.0 if self.diffusion.clip_denoised and thresholding is None else None,
            reads_variance=reads_variance,
            thresholding=thresholding,
        )


SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")


def check_sampler(sampler: object) -> None:
    """ValueError for what is not the name of a sampler."""
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        got = repr(sampler) if isinstance(sampler, str) else f"a {type(sampler).__name__}"
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {got}")


def step_table(
    diffusion: GaussianDiffusion,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
) -> StepTable:
    """The table of a sampler by its name: ``ddpm``, ``ddim`` or ``dpmpp_2m``.

    ``diffusion``, ``num_steps``, ``eta`` and ``timestep_spacing`` are those of :func:`ddim`, which
    alone has an ``eta``.

    Raises:
        ValueError: an unknown sampler, ``eta`` for a sampler that has none, and what the
            sampler's own function raises.
    """
    check_sampler(sampler)
    if sampler == "ddim":
        return ddim(diffusion, num_steps, eta=eta, timestep_spacing=timestep_spacing)
    if eta != 0:
        raise ValueError(f"eta belongs to ddim; got {eta} for {sampler}")
    make = dpmpp_2m if sampler == "dpmpp_2m" else ddpm
    return make(diffusion, num_steps, timestep_spacing=timestep_spacing)

"""Samplers as tables: one row of numbers per sampling step, for the one kernel that executes them.

Every sampler here is linear around one clamp, so a sampler is a function that fills rows; see
:func:`ddpm_fast.ops.reverse_step` for what the kernel makes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .diffusion import GaussianDiffusion
from .ops import ROW
from .schedules import respace

Spacing = str | Sequence[int]


@dataclass(frozen=True)
class StepTable:
    """A sampling run, step by step, from the noisiest timestep to the cleanest.

    Attributes:
        timesteps: what the network is told, strictly decreasing.
        rows: float64 ``[S, len(ROW)]`` on the CPU; rounded once, by :meth:`to`.
        clip: the clamp on the predicted x_start, or None.
        reads_variance: the rows expect a model with twice the channels.
        draws_noise: some row's sigma is above zero.
    """

    timesteps: tuple[int, ...]
    rows: Tensor
    clip: float | None
    reads_variance: bool

    @cached_property
    def draws_noise(self) -> bool:  # noqa: D102
        return bool((self.rows[:, ROW.index("sigma")] > 0).any())

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rows as a kernel reads them, rounded once.

        Raises:
            ValueError: a row is not finite in that dtype: hardly any signal is left, or the betas
                are degenerate.
        """
        rounded = self.rows.to(dtype)
        broken = (~rounded.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"the schedule gives a step at timestep {self.timesteps[broken[0]]} that is not "
                f"finite in {str(dtype).removeprefix('torch.')}"
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

    variance_type = diffusion.variance_type
    if variance_type is None:
        whole = len(chain.timesteps) == diffusion.num_timesteps
        variance_type = "fixed_large" if whole else "fixed_small"
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

    def rows(self) -> dict[str, Tensor]:
        """All columns, zero but for the timestep and the prediction of x_start."""
        columns = {name: torch.zeros_like(self.abar) for name in ROW}
        from_xt, from_out = self.diffusion.xstart_coefs()
        columns["x0_from_xt"] = from_xt[self.timesteps]
        columns["x0_from_out"] = from_out[self.timesteps]
        columns["timestep"] = torch.tensor(self.timesteps, dtype=torch.float64, device="cpu")
        return columns

    def table(self, columns: dict[str, Tensor], *, reads_variance: bool) -> StepTable:
        return StepTable(
            timesteps=tuple(self.timesteps),
            rows=torch.stack([columns[name] for name in ROW], dim=1),
            clip=1.0 if self.diffusion.clip_denoised else None,
            reads_variance=reads_variance,
        )


SAMPLERS = ("ddpm", "ddim")


def step_table(
    diffusion: GaussianDiffusion,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
) -> StepTable:
    """The table of a sampler by its name, ``ddpm`` or ``ddim``.

    Raises:
        ValueError: an unknown sampler, ``eta`` for a sampler that has none, and what the
            sampler's own function raises.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    if sampler == "ddim":
        return ddim(diffusion, num_steps, eta=eta, timestep_spacing=timestep_spacing)
    if eta != 0:
        raise ValueError(f"eta belongs to ddim; got {eta} for {sampler}")
    return ddpm(diffusion, num_steps, timestep_spacing=timestep_spacing)

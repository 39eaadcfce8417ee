"""Inputs for the ops and models with known answers, shared by the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast import GaussianDiffusion, ops
from ddpm_fast.ops import ROW, compute_dtype
from ddpm_fast.solvers import StepTable

LAYOUTS = ("contiguous", "channels_last", "slice_of_batch", "slice_of_channels")
INPUT_LAYOUTS = (*LAYOUTS, "expanded")

# Shapes and layouts that the CUDA kernels reach each in another way, and how.
ACCESSES = {
    "vectors": ((2, 4, 8, 8), "contiguous"),
    "pixels of a channel": ((3, 5, 6, 6), "channels_last"),
    "elements": ((3, 3, 5, 7), "contiguous"),
}


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout; channels_last falls back where it has no sense."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last" and x.dim() == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    if layout == "slice_of_batch":
        padded = x.new_full((2 * x.shape[0] + 1, *x.shape[1:]), torch.nan)
        padded[1::2] = x
        return padded[1::2]
    if layout == "slice_of_channels":
        padded = x.new_full((x.shape[0], x.shape[1] + 2, *x.shape[2:]), torch.nan)
        padded[:, 1:-1] = x
        return padded[:, 1:-1]
    if layout == "expanded":  # each channel's first pixel, standing for all of them
        return x[(slice(None), slice(None), *[slice(0, 1)] * (x.dim() - 2))].expand(x.shape)
    return x.contiguous()


@dataclass
class ReverseStepCase:
    """Arguments of ops.reverse_step: ``op(*case.args, **case.kwargs)``."""

    args: tuple[Tensor, Tensor, Tensor, Tensor]
    kwargs: dict[str, Any]

    @property
    def x_t(self) -> Tensor:
        return self.args[0]


def reverse_step_case(
    shape: tuple[int, ...] = (2, 3, 8, 8),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    learned: bool = False,
    noise: str = "given",
    x0_prev: bool = False,
    per_sample: bool = False,
    guided: bool = False,
    rescaled: bool = False,
    thresholded: bool = False,
    masked: bool = False,
    clip: float | None = 1.0,
    device: torch.device | str = "cpu",
) -> ReverseStepCase:
    """A step with random rows, so that every coefficient takes part.

    ``noise`` is "given", "drawn" or "none"; ``per_sample`` gives every sample a step, a seed and,
    for each row, a guidance scale of its own. ``rescaled`` adds to a guided step a factor,
    ``thresholded`` puts a threshold in place of the clamp, and ``masked`` keeps what is known.
    """
    samples, channels = shape[:2]
    asked = samples * (2 if guided else 1)
    output_shape = (asked, channels * (2 if learned else 1), *shape[2:])
    rows = randn((5, len(ROW)), seed + 1, compute_dtype(dtype))
    rows[:, ROW.index("timestep")] = torch.tensor([999.0, 500.0, 17.0, 1.0, 0.0], dtype=rows.dtype)
    rows[:, ROW.index("stream")] = torch.tensor([1.0, 1.0, 65535.0, 3.0, 4.0], dtype=rows.dtype)
    rows[:, ROW.index("sigma")].abs_()
    rows[2, ROW.index("sigma")] = 0
    rows[3, ROW.index("mean_from_x0_prev")] = 0
    rows[3, ROW.index("known_sigma")] = 0
    step = torch.arange(samples) % 5 if per_sample else torch.tensor(seed % 5)

    kwargs: dict[str, Any] = {"clip": clip}
    if noise == "given":
        kwargs["noise"] = laid_out(randn(shape, seed + 2, dtype), layout).to(device)
    if noise == "drawn":
        seeds = torch.arange(samples) - 7 if per_sample else torch.tensor(seed)
        kwargs["seed"] = seeds.to(device)
        kwargs["sample_index"] = (torch.arange(samples) * 3 + 2**33).to(device)
    if guided:
        scale_shape = (5, samples) if per_sample else (1, 1)
        kwargs["guidance_scale"] = randn(scale_shape, seed + 6, rows.dtype).to(device)
    if guided and rescaled:
        kwargs["guidance_factor"] = randn((samples,), seed + 7, rows.dtype).to(device)
    if thresholded:
        kwargs["threshold"] = 0.5 + randn((samples,), seed + 8, rows.dtype).abs().to(device)
        kwargs["clip"] = None
    if masked:
        kwargs["known"] = laid_out(randn(shape, seed + 9, dtype), layout).to(device)
        mask = (2 * randn(shape, seed + 10)).clamp(0, 1)  # mostly zeros and ones
        kwargs["mask"] = laid_out(mask.to(dtype), layout).to(device)
    if x0_prev:
        kwargs["x0_prev"] = laid_out(randn(shape, seed + 3, dtype), layout).to(device)
    x_t = laid_out(randn(shape, seed + 4, dtype).to(device), layout)
    output = randn(output_shape, seed + 5, output_dtype or dtype).to(device)
    return ReverseStepCase(
        (x_t, laid_out(output, layout), rows.to(device), step.to(device)), kwargs
    )


def written_tensors(case: ReverseStepCase) -> dict[str, Tensor]:
    """What reverse_step can write beside x_prev; the network's next input in the output's type."""
    output, step = case.args[1], case.args[3]
    asked = len(output)
    return {
        "pred_xstart": torch.full_like(case.x_t, 7),
        "next_input": output.new_full((asked, *case.x_t.shape[1:]), 7),
        "next_step": torch.full_like(step, 7),
        "next_t": step.new_full((asked,), 7),
    }


def walk(
    table: StepTable,
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Sequence[Tensor] | None = None,
) -> Iterator[Tensor]:
    """The states that a table's steps lead to from ``x``, with a step's noise where it is given."""
    rows = table.to(x.device, compute_dtype(x.dtype))
    pred_xstart = torch.zeros_like(x)
    for i, t in enumerate(table.timesteps):
        output = model(x, torch.full((len(x),), t, device=x.device))
        x = ops.reverse_step(
            x,
            output,
            rows,
            torch.tensor(i, device=x.device),
            noise=None if noise is None else noise[i],
            x0_prev=pred_xstart,
            pred_xstart=pred_xstart,
            clip=table.clip,
        )
        yield x


class GaussianModel(nn.Module):
    """The right network for data N(mean, std^2), elementwise: E[target | x_t] in closed form.

    It treats samples separately, in float64, so that no batch changes its rounding.
    """

    def __init__(self, diffusion: GaussianDiffusion, mean: float = 0.3, std: float = 0.2) -> None:
        super().__init__()
        self.diffusion, self.mean, self.std = diffusion, mean, std
        self.alphas_cumprod = diffusion.alphas_cumprod

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(x_t.device)  # once: a graph cannot capture it
        abar = self.alphas_cumprod[t]
        abar = abar.reshape(-1, *[1] * (x_t.dim() - 1))
        x = x_t.double()
        variance = abar * self.std**2 + 1 - abar
        x_start = self.mean + abar.sqrt() * self.std**2 / variance * (x - abar.sqrt() * self.mean)
        eps = (x - abar.sqrt() * x_start) / (1 - abar).sqrt()
        target = {
            "sample": x_start,
            "epsilon": eps,
            "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x_start,
        }[self.diffusion.prediction_type]
        return target.to(x_t.dtype)

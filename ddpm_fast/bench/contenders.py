"""What is compared: the same work, done by eager PyTorch, by the reference and by the kernels.

A contender is a function that takes a problem, prepares what a user would prepare once, and
returns the call to be timed. Each is the best form of its kind that we know: nothing is allocated
or computed in the call that a careful user would have taken out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import graphs, ops
from ..diffusion import GaussianDiffusion
from ..network import Model
from ..ops import ROW
from ..sampler import Sampler
from ..solvers import StepTable, ddim, ddpm

TIMESTEP = 500
GUIDANCE_SCALE = 3.0
SEED = 0  # of the noise; the inputs must not be made of the same numbers
INPUT_SEED = 1


@dataclass(frozen=True)
class StepProblem:
    """One reverse step in the middle of a chain of 1000, epsilon prediction, x_start clamped.

    With noise it is DDPM's (Ho et al. 2020, ``fixed_small`` variance), without it DDIM's.

    Attributes:
        x_t: ``[N, C, H, W]``.
        model_output: ``[N, C, H, W]``; guided ``[2N, C, H, W]``, the conditional half first.
        table: the sampler's rows, of which this step is number ``index``.
        guidance_scale: w of classifier-free guidance, or None.
    """

    x_t: Tensor
    model_output: Tensor
    table: StepTable
    index: int
    guidance_scale: float | None

    @property
    def row(self) -> dict[str, float]:
        """The step's coefficients by name, as Python floats."""
        return dict(zip(ROW, self.table.rows[self.index].tolist(), strict=True))

    @property
    def noisy(self) -> bool:  # noqa: D102
        return self.row["sigma"] > 0

    @property
    def bytes(self) -> int:
        """The least that a step moves: x_t and the output read once, x_prev written once."""
        tensors = (self.x_t, self.model_output, self.x_t)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def noise_source(self) -> dict[str, Any]:
        """The arguments of the op that have it draw the noise, or none."""
        if not self.noisy:
            return {}
        device = self.x_t.device
        index = torch.arange(len(self.x_t), device=device)
        return {"seed": ops.seed_tensor(SEED, device), "sample_index": index}


def step_problem(
    shape: tuple[int, ...],
    *,
    noise: bool = True,
    guided: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StepProblem:
    """A step from random tensors of that shape ``(N, C, H, W)``."""
    diffusion = GaussianDiffusion(variance_type="fixed_small")
    table = ddpm(diffusion) if noise else ddim(diffusion)
    generator = torch.Generator(device).manual_seed(INPUT_SEED)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    asked = shape[0] * (2 if guided else 1)
    return StepProblem(
        x_t=randn(*shape),
        model_output=randn(asked, *shape[1:]),
        table=table,
        index=table.timesteps.index(TIMESTEP),
        guidance_scale=GUIDANCE_SCALE if guided else None,
    )


Step = Callable[[], Tensor]


def textbook_formula(
    x_t: Tensor,
    model_output: Tensor,
    row: Mapping[str, float | Tensor],
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    """A reverse step as the equations are written, tensor by tensor."""
    if guidance_scale is not None:
        cond, uncond = model_output.chunk(2)
        model_output = uncond + guidance_scale * (cond - uncond)
    xstart = (row["x0_from_xt"] * x_t + row["x0_from_out"] * model_output).clamp(-1, 1)
    mean = row["mean_from_x0"] * xstart + row["mean_from_xt"] * x_t
    return mean if noise is None else mean + row["sigma"] * noise


def textbook(p: StepProblem) -> Step:
    """Eager PyTorch as textbooks write it; the coefficients are Python floats all the same."""
    row, noisy = p.row, p.noisy

    def step() -> Tensor:
        noise = torch.randn_like(p.x_t) if noisy else None
        return textbook_formula(p.x_t, p.model_output, row, p.guidance_scale, noise)

    return step


def in_place(p: StepProblem) -> Step:
    """Eager PyTorch in place, in buffers allocated once: six passes over memory with noise."""
    row, noisy, w, n = p.row, p.noisy, p.guidance_scale, len(p.x_t)
    xstart, x_prev, eps = (torch.empty_like(p.x_t) for _ in range(3))
    cond, uncond = p.model_output[:n], p.model_output[n:]

    def step() -> Tensor:
        output = cond if w is None else torch.lerp(uncond, cond, w, out=eps)
        torch.mul(p.x_t, row["x0_from_xt"], out=xstart)
        xstart.add_(output, alpha=row["x0_from_out"]).clamp_(-1, 1)
        if noisy:
            x_prev.normal_(0, row["sigma"]).add_(p.x_t, alpha=row["mean_from_xt"])
        else:
            torch.mul(p.x_t, row["mean_from_xt"], out=x_prev)
        return x_prev.add_(xstart, alpha=row["mean_from_x0"])

    return step


def reference(p: StepProblem) -> Step:
    """The pure-PyTorch fallback, in place as the sampler calls it."""
    return _op(p, "reference")


def native(p: StepProblem) -> Step:
    """The compiled kernel, through the public op, in place as the sampler calls it."""
    return _op(p, "native")


def _op(p: StepProblem, backend: str) -> Step:
    x, source = p.x_t.clone(), p.noise_source()
    rows = p.table.to(x.device, ops.compute_dtype(x.dtype))
    step = torch.tensor(p.index, device=x.device)
    scale = None if p.guidance_scale is None else rows.new_full((1, 1), p.guidance_scale)
    return lambda: ops.reverse_step(
        x, p.model_output, rows, step, guidance_scale=scale, out=x, backend=backend, **source
    )


EAGER_STEPS = {"textbook": textbook, "in_place": in_place}
OUR_STEPS = {"reference": reference, "native": native}


@dataclass(frozen=True)
class ForwardProblem:
    """Noising a batch for training, each sample to a timestep of its own.

    Attributes:
        x_start: ``[N, C, H, W]``.
        t: int64 ``[N]``.
        diffusion: the process.
    """

    x_start: Tensor
    t: Tensor
    diffusion: GaussianDiffusion

    @property
    def bytes(self) -> int:
        """The least that it moves: x_start read, x_t and the noise written."""
        return 3 * self.x_start.numel() * self.x_start.element_size()


def forward_problem(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ForwardProblem:
    """Noising of a random batch of that shape ``(N, C, H, W)``, at timesteps spread over T."""
    diffusion = GaussianDiffusion()
    generator = torch.Generator(device).manual_seed(INPUT_SEED)
    x_start = torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1).to(dtype)
    t = torch.linspace(0, diffusion.num_timesteps - 1, shape[0], device=device).long()
    return ForwardProblem(x_start, t, diffusion)


Forward = Callable[[], tuple[Tensor, Tensor]]


def eager_q_sample(p: ForwardProblem) -> Forward:
    """Eager PyTorch in buffers allocated once: the noise, one product, one product and sum."""
    shape = (-1, *[1] * (p.x_start.dim() - 1))
    signal, scale = (
        table.to(p.x_start)[p.t].reshape(shape)
        for table in (p.diffusion.sqrt_alphas_cumprod, p.diffusion.sqrt_one_minus_alphas_cumprod)
    )
    x_t, noise = torch.empty_like(p.x_start), torch.empty_like(p.x_start)

    def noising() -> tuple[Tensor, Tensor]:
        noise.normal_()
        torch.mul(p.x_start, signal, out=x_t)
        return x_t.addcmul_(noise, scale), noise

    return noising


def reference_q_sample(p: ForwardProblem) -> Forward:
    """The pure-PyTorch fallback, through the public method."""
    return _q_sample(p, "reference")


def native_q_sample(p: ForwardProblem) -> Forward:
    """The compiled kernel, through the public method."""
    return _q_sample(p, "native")


def _q_sample(p: ForwardProblem, backend: str) -> Forward:
    index = torch.arange(len(p.x_start), device=p.x_start.device)
    x_t, noise = torch.empty_like(p.x_start), torch.empty_like(p.x_start)
    return lambda: p.diffusion.q_sample(
        p.x_start,
        p.t,
        seed=SEED,
        sample_index=index,
        out=x_t,
        noise_out=noise,
        backend=backend,
    )


EAGER_FORWARDS = {"in_place": eager_q_sample}
OUR_FORWARDS = {"reference": reference_q_sample, "native": native_q_sample}


@dataclass(frozen=True)
class LoopProblem:
    """A batch to draw, in as many steps as the diffusion has timesteps.

    Attributes:
        network: called as ``network(x_t, t)``, in eval mode and on its device.
        shape: ``(N, C, H, W)`` of the batch.
        diffusion: with ``fixed_small`` variance, the only one that all contenders know.
        dtype: of the network's input.
        device: where all of it is.
    """

    network: Model
    shape: tuple[int, ...]
    diffusion: GaussianDiffusion
    dtype: torch.dtype
    device: torch.device


def loop_problem(
    network: torch.nn.Module, shape: tuple[int, ...], num_steps: int, *, device: torch.device
) -> LoopProblem:
    """A whole chain of ``num_steps``, at least 21, with betas scaled so that it begins in noise."""
    scale = 1000 / num_steps
    diffusion = GaussianDiffusion.from_schedule(
        "linear",
        num_steps,
        beta_start=scale * 1e-4,
        beta_end=scale * 0.02,
        variance_type="fixed_small",
    )
    network = network.to(device).eval()
    dtype = next(network.parameters()).dtype
    return LoopProblem(network, shape, diffusion, dtype, device)


def bare_network(p: LoopProblem) -> Callable[[], None]:
    """The floor: the network and nothing else, as often as there are steps; on CUDA its graph."""
    x_t = torch.randn(p.shape, device=p.device).to(p.dtype)
    t = torch.full((p.shape[0],), TIMESTEP % p.diffusion.num_timesteps, device=p.device)

    def call() -> object:
        return p.network(x_t, t)

    if p.device.type == "cuda":
        call = _captured(call, p.device)

    def loop() -> None:
        with torch.inference_mode():
            for _ in range(p.diffusion.num_timesteps):
                call()

    return loop


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    with torch.inference_mode(), graphs.beside_the_current_stream(device):
        call()
    with torch.inference_mode():
        graph = graphs.capture(call)
    if graph is None:
        raise RuntimeError("the network cannot be captured")

    def replay(read_by_the_graph: Callable[[], object] = call) -> None:  # or it would be freed
        graph.replay()

    return replay


def native_loop(p: LoopProblem) -> Step:
    """A :class:`Sampler` that is kept between the calls, with the compiled kernels."""
    return _sampler_loop(p, "native")


def reference_loop(p: LoopProblem) -> Step:
    """The same with the pure-PyTorch fallback."""
    return _sampler_loop(p, "reference")


def _sampler_loop(p: LoopProblem, backend: str) -> Step:
    run = Sampler(p.network, p.shape, diffusion=p.diffusion, device=p.device, backend=backend)
    return lambda: run(seed=SEED)


OUR_LOOPS = {"reference": reference_loop, "native": native_loop}

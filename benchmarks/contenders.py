"""What the kernels are compared with, beside what `ddpm_fast.bench.contenders` has: compilers,
other libraries, and the floors below which no step can fall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast import graphs
from ddpm_fast.bench import contenders as ours
from ddpm_fast.bench.contenders import (
    TIMESTEP,
    Forward,
    ForwardProblem,
    LoopProblem,
    Step,
    StepProblem,
    textbook_formula,
)
from ddpm_fast.ops import ROW, compute_dtype

GRAPH_STEPS = 100


@dataclass(frozen=True)
class Contender:
    """How to prepare a call, who draws its noise (see `check_step`), and what it needs."""

    make: Callable[[Any], Callable[[], Any]]
    drawn_by: str = "torch"
    needs: str | None = None

    def prepare(self, problem: Any) -> Callable[[], Any]:
        if self.needs is not None and find_spec(self.needs) is None:
            pytest.skip(f"{self.needs} is not installed: pip install 'ddpm_fast[benchmarks]'")
        return self.make(problem)


# --- one reverse step -------------------------------------------------------------------------


def compiled(p: StepProblem) -> Step:
    """The textbook's step under torch.compile, its noise included, for this one shape.

    The coefficients are a tensor, so that one compilation serves all steps.
    """
    torch.compiler.reset()
    row, w, noisy = _row(p), p.guidance_scale, p.noisy

    @torch.compile(dynamic=False, fullgraph=True)
    def step(x_t: Tensor, model_output: Tensor, row: Tensor) -> Tensor:
        noise = torch.randn_like(x_t) if noisy else None
        return textbook_formula(x_t, model_output, _named(row), w, noise)

    return lambda: step(p.x_t, p.model_output, row)


def compiled_after_randn(p: StepProblem) -> Step:
    """The same with the noise drawn by torch.randn: better on the CPU, whose generator inductor
    does not vectorise."""
    torch.compiler.reset()
    row, w, noise = _row(p), p.guidance_scale, torch.empty_like(p.x_t)

    @torch.compile(dynamic=False, fullgraph=True)
    def step(x_t: Tensor, model_output: Tensor, row: Tensor, noise: Tensor) -> Tensor:
        return textbook_formula(x_t, model_output, _named(row), w, noise)

    return lambda: step(p.x_t, p.model_output, row, noise.normal_())


def _row(p: StepProblem) -> Tensor:
    return p.table.to(p.x_t.device, compute_dtype(p.x_t.dtype))[p.index]


def _named(row: Tensor) -> dict[str, Tensor]:
    return dict(zip(ROW, row.unbind(), strict=True))


def diffusers_step(p: StepProblem) -> Step:
    """`DDPMScheduler.step`, or DDIM's with the same clipping; guidance as its pipelines do it."""
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler = DDPMScheduler() if p.noisy else DDIMScheduler()
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    options = {} if p.noisy else {"use_clipped_model_output": True}

    def step() -> Tensor:
        output = p.model_output
        if p.guidance_scale is not None:
            cond, uncond = output.chunk(2)
            output = uncond + p.guidance_scale * (cond - uncond)
        return scheduler.step(output, TIMESTEP, p.x_t, return_dict=False, **options)[0]

    return step


def native_after_lerp(p: StepProblem) -> Step:
    """Guidance in PyTorch, in one pass into a buffer allocated once, and then our op without it."""
    cond, uncond = p.model_output.chunk(2)
    w, guided = p.guidance_scale, torch.empty_like(p.x_t)
    advance = ours.native(replace(p, model_output=guided, guidance_scale=None))

    def step() -> Tensor:
        torch.lerp(uncond, cond, w, out=guided)
        return advance()

    return step


STEPS = {
    "textbook": Contender(ours.textbook),
    "in_place": Contender(ours.in_place),
    "compiled": Contender(compiled, drawn_by="unknown"),
    "compiled_after_randn": Contender(compiled_after_randn),
    "diffusers": Contender(diffusers_step, needs="diffusers"),
    "reference": Contender(ours.reference, drawn_by="counter"),
    "native": Contender(ours.native, drawn_by="counter"),
    "native_after_lerp": Contender(native_after_lerp, drawn_by="counter"),
}


def native_graph(p: StepProblem) -> Step:
    """`GRAPH_STEPS` native steps in a CUDA graph, which one call replays; one was taken before."""
    step = ours.native(p)
    with graphs.beside_the_current_stream(p.x_t.device):
        x = step()
    graph = graphs.capture(lambda: [step() for _ in range(GRAPH_STEPS)])
    assert graph is not None

    def steps(read_by_the_graph: Step = step) -> Tensor:  # or its tensors would be freed
        graph.replay()
        return x

    return steps


# --- floors: the least that a step contains, or moves -----------------------------------------


def randn(p: StepProblem) -> Step:
    """The noise alone."""
    noise = torch.empty_like(p.x_t)
    return noise.normal_


def add(p: StepProblem) -> Step:
    """As much memory as a step without noise: two tensors read, one of them written."""
    x, other = p.x_t.clone(), p.model_output[: len(p.x_t)].clone()
    return lambda: torch.add(x, other, out=x)


def copy(x: Tensor) -> Step:
    """What the bandwidth is measured by: one tensor read, one written."""
    source, destination = x.clone(), torch.empty_like(x)
    return lambda: destination.copy_(source)


KINDS_OF = {
    "compiled_after_randn": ("noise", "guided"),
    "randn": ("noise",),
    "native_after_lerp": ("guided",),
}
"""Those contenders that have no part in steps of every kind."""

FLOORS = {"randn": (randn, 1), "add": (add, 3), "copy": (lambda p: copy(p.x_t), 2)}
"""Each with the number of tensors that it moves."""


# --- q_sample ---------------------------------------------------------------------------------


def diffusers_q_sample(p: ForwardProblem) -> Forward:
    """`DDPMScheduler.add_noise`, of noise from torch.randn, as its training scripts do it."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()

    def noising() -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(p.x_start)
        return scheduler.add_noise(p.x_start, noise, p.t), noise

    return noising


def lucidrains_q_sample(p: ForwardProblem) -> Forward:
    """`GaussianDiffusion.q_sample`, of noise from torch.randn, as its `p_losses` does it."""
    no_network = _Network(lambda x, t: x, p.x_start.shape[1], p.x_start.dtype)
    diffusion = _lucidrains(no_network, p.x_start, p.diffusion.num_timesteps)

    def noising() -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(p.x_start)
        return diffusion.q_sample(p.x_start, p.t, noise), noise

    return noising


FORWARDS = {
    "in_place": Contender(ours.eager_q_sample),
    "diffusers": Contender(diffusers_q_sample, needs="diffusers"),
    "lucidrains": Contender(lucidrains_q_sample, needs="denoising_diffusion_pytorch"),
    "reference": Contender(ours.reference_q_sample, drawn_by="counter"),
    "native": Contender(ours.native_q_sample, drawn_by="counter"),
}


# --- the loop ---------------------------------------------------------------------------------


def diffusers_loop(p: LoopProblem) -> Step:
    """The loop of `DDPMPipeline`, without its progress bar and its conversion to pictures."""
    from diffusers import DDPMScheduler

    num_steps = p.diffusion.num_timesteps
    scheduler = DDPMScheduler(num_steps, trained_betas=p.diffusion.betas.numpy())

    def loop() -> Tensor:
        with torch.inference_mode():
            x = torch.randn(p.shape, device=p.device, dtype=p.dtype)
            scheduler.set_timesteps(num_steps)
            for t in scheduler.timesteps:
                output = p.network(x, t.to(p.device).expand(p.shape[0]))
                x = scheduler.step(output, t, x).prev_sample
            return x

    return loop


def lucidrains_loop(p: LoopProblem) -> Step:
    """The loop of `GaussianDiffusion.p_sample_loop`, without its progress bar."""
    x = torch.empty(p.shape, device=p.device)
    diffusion = _lucidrains(_Network(p.network, p.shape[1], p.dtype), x, p.diffusion.num_timesteps)

    def loop() -> Tensor:
        with torch.inference_mode():
            x = torch.randn(p.shape, device=p.device)
            for t in reversed(range(diffusion.num_timesteps)):
                x, _ = diffusion.p_sample(x, t)
            return x

    return loop


class _Network(SimpleNamespace):
    """A network as lucidrains' GaussianDiffusion calls it: its state is float32 in any case."""

    def __init__(self, network: Callable[..., Tensor], channels: int, dtype: torch.dtype) -> None:
        super().__init__(network=network, channels=channels, out_dim=channels, dtype=dtype)
        self.self_condition = False

    def __call__(self, x: Tensor, t: Tensor, x_self_cond: None) -> Tensor:
        return self.network(x.to(self.dtype), t)


def _lucidrains(network: _Network, x: Tensor, num_steps: int) -> Any:
    from denoising_diffusion_pytorch import GaussianDiffusion

    return GaussianDiffusion(
        network,
        image_size=tuple(x.shape[2:]),
        timesteps=num_steps,
        objective="pred_noise",
        beta_schedule="linear",
    ).to(x.device)


LOOPS = {
    "diffusers": Contender(diffusers_loop, needs="diffusers"),
    "lucidrains": Contender(lucidrains_loop, needs="denoising_diffusion_pytorch"),
    "reference": Contender(ours.reference_loop, drawn_by="counter"),
    "native": Contender(ours.native_loop, drawn_by="counter"),
}

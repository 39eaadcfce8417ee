"""The same numbers as diffusers and OpenAI's formulas, and by name each place where they differ.

diffusers is 0.42: where a test says "theirs", it shows what that version does. The numbers are
those of the issues of huggingface/diffusers, unless another repository is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fractions import Fraction
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddpm
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import randn, walk
from ddpm_fast import GaussianDiffusion, ops, sample
from ddpm_fast.diffusion import PREDICTION_TYPES
from ddpm_fast.ops import ROW
from ddpm_fast.schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, respace
from ddpm_fast.solvers import (
    SAMPLERS,
    StepTable,
    ddim,
    ddim_inversion,
    ddpm,
    dpmpp_2m,
    step_table,
)

# numpy 2 wants more of a tensor than DPMSolverMultistepScheduler.set_timesteps asks it for.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 3, 5)
CPU = torch.device("cpu")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
UNIFORM = ("leading", "trailing")

# Of the size of the terms that a step adds up: some 10^5 and 100 roundings.
TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
precisions = pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32"])


@st.composite
def runs(
    draw: st.DrawFn,
    variances: Sequence[str] = ("fixed_small",),
    spacings: Sequence[str] = TIMESTEP_SPACINGS,
    predictions: Sequence[str] = PREDICTION_TYPES,
) -> tuple[GaussianDiffusion, list[int]]:
    """A diffusion, and the timesteps of a run through it that is not refused."""
    num_timesteps = draw(st.integers(1, 60))
    steps = draw(st.integers(1, num_timesteps))
    timesteps = respace(num_timesteps, steps, draw(st.sampled_from(spacings)))
    prediction_type = draw(st.sampled_from(predictions))
    possible = prediction_type != "epsilon" or timesteps[0] < num_timesteps - 1
    diffusion = GaussianDiffusion.from_schedule(
        draw(st.sampled_from(BETA_SCHEDULES)),
        num_timesteps,
        rescale_betas_zero_snr=num_timesteps > 1 and possible and draw(st.booleans()),
        prediction_type=prediction_type,
        variance_type=draw(st.sampled_from(variances)),
        clip_denoised=draw(st.booleans()),
    )
    return diffusion, timesteps


def peer(scheduler_class: Any, diffusion: GaussianDiffusion, **options: Any) -> Any:
    """A scheduler of theirs for a diffusion of ours, with tables in float64.

    Theirs are float32, which hides all that is smaller than a thousandth; see
    test_float32_tables_lose_digits.
    """
    scheduler = scheduler_class(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=diffusion.betas.tolist(),
        prediction_type=diffusion.prediction_type,
        **options,
    )
    scheduler.betas = diffusion.betas
    scheduler.alphas = 1 - diffusion.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = scheduler.one
    return scheduler


Step = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def ddpm_peer(diffusion: GaussianDiffusion, timesteps: list[int]) -> Step:
    scheduler = peer(
        DDPMScheduler,
        diffusion,
        variance_type=diffusion.variance_type,
        clip_sample=diffusion.clip_denoised,
    )
    scheduler.set_timesteps(timesteps=timesteps)

    def step(x: Tensor, i: int, output: Tensor, noise: Tensor) -> Tensor:
        if diffusion.variance_type == "learned":  # theirs is the variance, ours its logarithm
            prediction, log_variance = output.chunk(2, dim=1)
            output = torch.cat([prediction, log_variance.exp()], dim=1)
        with mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise):
            return scheduler.step(output, timesteps[i], x).prev_sample

    return step


def ddim_peer(diffusion: GaussianDiffusion, timesteps: list[int], eta: float) -> Step:
    scheduler = peer(DDIMScheduler, diffusion, clip_sample=diffusion.clip_denoised)

    def step(x: Tensor, i: int, output: Tensor, noise: Tensor) -> Tensor:
        # Theirs leads to t - T // N; with N = 1, T can say where our list goes on.
        following = timesteps[i + 1] if i + 1 < len(timesteps) else -1
        scheduler.num_inference_steps = 1
        scheduler.register_to_config(num_train_timesteps=timesteps[i] - following)
        return scheduler.step(
            output,
            timesteps[i],
            x,
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=noise if eta > 0 else None,
        ).prev_sample

    return step


def dpm_peer(diffusion: GaussianDiffusion, timesteps: list[int], first_abar: float = 0.0) -> Step:
    """``first_abar`` is the least that the first timestep starts with."""
    # It has no static clamp, but dynamic thresholding up to 1 is one.
    scheduler = peer(DPMSolverMultistepScheduler, diffusion, thresholding=diffusion.clip_denoised)
    scheduler.set_timesteps(timesteps=timesteps)
    abar = diffusion.alphas_cumprod[timesteps].clamp(min=first_abar)
    scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), abar.new_zeros(1)])

    def step(x: Tensor, i: int, output: Tensor, noise: Tensor) -> Tensor:
        # Its step casts the state to torch.float32, by that name.
        double = x.dtype == torch.float64
        wider = mock.patch.object(torch, "float32", torch.float64) if double else nullcontext()
        with wider:
            return scheduler.step(output, timesteps[i], x).prev_sample

    return step


def noises(timesteps: list[int], dtype: torch.dtype) -> list[Tensor]:
    """One for each step, and none in the last: there theirs asks for t > 0, ours for the place."""
    drawn = [randn(SHAPE, 10 + i, dtype) for i in range(len(timesteps))]
    return [*drawn[:-1], torch.zeros_like(drawn[-1])]


def smooth_network(diffusion: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """Depends on x and t, and hardly enlarges an error in x."""
    learned = (diffusion.variance_type or "").startswith("learned")

    def network(x: Tensor, t: Tensor) -> Tensor:
        output = 0.5 * torch.tanh(x) + torch.cos(t.to(x.dtype)).reshape(-1, 1, 1)
        return torch.cat([output, torch.sin(x + 1)], dim=1) if learned else output

    return network


def size_of_step(table: StepTable, i: int, x: Tensor, output: Tensor, x0_prev: Tensor) -> float:
    """The largest sum of the sizes of the terms of a step: what its rounding is relative to."""
    row = dict(zip(ROW, table.rows[i].abs().tolist(), strict=True))
    output = output[:, : x.shape[1]]
    x, output, x0_prev = (value.double().abs() for value in (x, output, x0_prev))
    xstart = row["x0_from_xt"] * x + row["x0_from_out"] * output
    total = row["mean_from_x0"] * xstart + row["mean_from_x0_prev"] * x0_prev
    total += row["mean_from_xt"] * x + row["mean_from_out"] * output
    return max(1.0, float(total.max()))


def check_step(table: StepTable, step: Step, i: int, dtype: torch.dtype, tolerance: float) -> None:
    """One step of DDPM or DDIM, on any state and any output."""
    x = randn(SHAPE, 0, dtype)
    channels = SHAPE[1] * (2 if table.reads_variance else 1)
    output = randn((SHAPE[0], channels, SHAPE[2]), 1, dtype)
    noise = noises(list(table.timesteps), dtype)[i]
    ours = ops.reverse_step(
        x, output, table.to(CPU, dtype), torch.tensor(i), noise=noise, clip=table.clip
    )
    theirs = step(x, i, output, noise)
    assert ours.dtype == theirs.dtype == dtype
    size = size_of_step(table, i, x, output, torch.zeros_like(x))
    assert float((ours - theirs).abs().max()) <= tolerance * size


def check_loop(
    diffusion: GaussianDiffusion,
    table: StepTable,
    step: Step,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """All steps, each from where the last one led to, on both sides."""
    network = smooth_network(diffusion)
    x = theirs = randn(SHAPE, 0, dtype)
    noise, size = noises(list(table.timesteps), dtype), 1.0
    for i, ours in enumerate(walk(table, network, x, noise)):
        output = network(theirs, torch.full((len(x),), table.timesteps[i]))
        size = max(size, size_of_step(table, i, theirs, output, torch.ones_like(x)))
        theirs = step(theirs, i, output, noise[i])
        assert ours.dtype == theirs.dtype == dtype
        assert float((ours - theirs).abs().max()) <= tolerance * size, i


@precisions
@given(runs(VARIANCES), st.data())
def test_ddpm_step(dtype: torch.dtype, tolerance: float, run: Any, data: st.DataObject) -> None:
    diffusion, timesteps = run
    table = ddpm(diffusion, timestep_spacing=timesteps)
    i = data.draw(st.integers(0, len(table) - 1))
    check_step(table, ddpm_peer(diffusion, timesteps), i, dtype, tolerance)


@precisions
@given(runs(VARIANCES))
def test_ddpm_loop(dtype: torch.dtype, tolerance: float, run: Any) -> None:
    diffusion, timesteps = run
    table = ddpm(diffusion, timestep_spacing=timesteps)
    check_loop(diffusion, table, ddpm_peer(diffusion, timesteps), dtype, tolerance)


# Theirs takes the root of 1 - abar_prev - sigma^2, which with eta = 1 can round to less than 0;
# see test_ddim_of_eta_1_from_pure_noise_hangs_on_a_rounding_error_in_theirs.
etas = st.sampled_from([0.0, 0.3, 0.99])


@precisions
@given(runs(), etas, st.data())
def test_ddim_step(
    dtype: torch.dtype, tolerance: float, run: Any, eta: float, data: st.DataObject
) -> None:
    diffusion, timesteps = run
    table = ddim(diffusion, eta=eta, timestep_spacing=timesteps)
    i = data.draw(st.integers(0, len(table) - 1))
    check_step(table, ddim_peer(diffusion, timesteps, eta), i, dtype, tolerance)


@precisions
@given(runs(), etas)
def test_ddim_loop(dtype: torch.dtype, tolerance: float, run: Any, eta: float) -> None:
    diffusion, timesteps = run
    table = ddim(diffusion, eta=eta, timestep_spacing=timesteps)
    check_loop(diffusion, table, ddim_peer(diffusion, timesteps, eta), dtype, tolerance)


@precisions
@given(runs())
def test_dpmpp_2m_loop(dtype: torch.dtype, tolerance: float, run: Any) -> None:
    diffusion, timesteps = run
    assume(diffusion.alphas_cumprod[timesteps[0]] > 0)  # see test_dpmpp_2m_takes_the_limit
    table = dpmpp_2m(diffusion, timestep_spacing=timesteps)
    check_loop(diffusion, table, dpm_peer(diffusion, timesteps), dtype, tolerance)


@given(runs(predictions=["epsilon"], spacings=UNIFORM))
def test_ddim_inversion_loop(run: Any) -> None:
    """Where N divides T, or with ``leading``: theirs starts each step at t - T // N.

    For epsilon: see test_inversion_depends_on_the_prediction_type_in_theirs.
    """
    diffusion, timesteps = run
    stride = diffusion.num_timesteps // len(timesteps)
    assume(all(a - b == stride for a, b in pairwise(timesteps)) and timesteps[-1] < stride)
    table = ddim_inversion(diffusion, timestep_spacing=timesteps)
    scheduler = peer(DDIMInverseScheduler, diffusion, clip_sample=False)
    scheduler.set_timesteps(len(timesteps))

    def step(x: Tensor, i: int, output: Tensor, noise: Tensor) -> Tensor:
        return scheduler.step(output, timesteps[::-1][i], x).prev_sample

    check_loop(diffusion, table, step, torch.float64, 1e-10)


class Network(nn.Module):
    """Lets ``sample`` know the precision that it asks for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.weight * torch.tanh(x_t) + torch.cos(t.to(x_t.dtype)).reshape(-1, 1, 1)


@precisions
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@torch.no_grad()
def test_samples_of_a_generator(dtype: torch.dtype, tolerance: float, spacing: str) -> None:
    """`sample` and their loop read the same numbers of a torch.Generator in the same order."""
    diffusion, model = GaussianDiffusion(variance_type="fixed_small"), Network(dtype)
    x_T = randn(SHAPE, 0, dtype)
    ours = sample(
        model,
        SHAPE,
        diffusion=diffusion,
        num_steps=50,
        timestep_spacing=spacing,
        x_T=x_T,
        generator=torch.Generator().manual_seed(3),
    )
    scheduler = peer(DDPMScheduler, diffusion, timestep_spacing=spacing)
    scheduler.set_timesteps(50)
    x, generator = x_T, torch.Generator().manual_seed(3)
    for t in scheduler.timesteps.tolist():
        output = model(x, torch.full((len(x),), t))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    assert ours.dtype == dtype
    assert float((ours - x).abs().max()) <= tolerance


# OpenAI's learned_range, written out from Nichol & Dhariwal 2021 (arXiv 2102.09672)


def respaced_betas(diffusion: GaussianDiffusion, timesteps: list[int]) -> Tensor:
    """Section 4: a chain of the timesteps visited, rebuilt from their abar, in rising order."""
    abar = diffusion.alphas_cumprod[timesteps[::-1]].tolist()
    return torch.tensor([1 - a / b for b, a in pairwise([1.0, *abar])], dtype=torch.float64)


@given(runs(["learned_range"]), st.data())
def test_learned_range_is_that_of_openai(run: Any, data: st.DataObject) -> None:
    diffusion, timesteps = run
    betas = respaced_betas(diffusion, timesteps)
    abar = torch.cumprod(1 - betas, dim=0)
    prev = torch.cat([abar.new_ones(1), abar[:-1]])
    posterior_variance = betas * (1 - prev) / (1 - abar)
    floor = posterior_variance[1:2] if len(betas) > 1 else betas
    log_clipped = torch.cat([floor, posterior_variance[1:]]).log()

    table = ddpm(diffusion, timestep_spacing=timesteps)
    i = data.draw(st.integers(0, len(table) - 1))
    k = len(table) - 1 - i  # theirs counts from the cleanest
    x, noise = randn(SHAPE, 0, torch.float64), randn(SHAPE, 2, torch.float64)
    output = randn((SHAPE[0], 2 * SHAPE[1], SHAPE[2]), 1, torch.float64)
    prediction, v = output.chunk(2, dim=1)
    x0 = diffusion.predict_xstart(x, torch.full((len(x),), timesteps[i]), prediction)
    x0 = x0.clamp(-1, 1) if diffusion.clip_denoised else x0
    coef1 = betas[k] * prev[k].sqrt() / (1 - abar[k])
    coef2 = (1 - prev[k]) * (1 - betas[k]).sqrt() / (1 - abar[k])
    fraction = (v + 1) / 2
    log_variance = fraction * betas[k].log() + (1 - fraction) * log_clipped[k]
    expected = coef1 * x0 + coef2 * x + (k > 0) * (log_variance / 2).exp() * noise

    ours = ops.reverse_step(
        x, output, table.to(CPU, torch.float64), torch.tensor(i), noise=noise, clip=table.clip
    )
    size = size_of_step(table, i, x, prediction, torch.zeros_like(x))
    assert float((ours - expected).abs().max()) <= 1e-10 * size


# Timesteps


def their_timesteps(num_timesteps: int, steps: int, spacing: str) -> list[int]:
    scheduler = DDPMScheduler(num_train_timesteps=num_timesteps, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return list(scheduler.timesteps.tolist())


def exact_timesteps(num_timesteps: int, steps: int, spacing: str) -> list[Fraction]:
    """Before rounding: Lin et al. 2023, table 2, for more than one step."""
    if spacing == "leading":
        return [Fraction(i * (num_timesteps // steps)) for i in reversed(range(steps))]
    if spacing == "linspace":
        return [Fraction(i * (num_timesteps - 1), steps - 1) for i in reversed(range(steps))]
    return [Fraction(i * num_timesteps, steps) - 1 for i in range(steps, 0, -1)]


@pytest.mark.parametrize("num_timesteps", [7, 50, 1000])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_timesteps_are_theirs_but_for_ties(spacing: str, num_timesteps: int) -> None:
    """Of any number of steps. Exact halves go either way: a rounding error decides them.

    The trailing ones that theirs has too many are told of below.
    """
    compared = 0
    for steps in range(2, num_timesteps + 1):
        ours = respace(num_timesteps, steps, spacing)
        theirs = their_timesteps(num_timesteps, steps, spacing)
        if spacing == "trailing" and len(theirs) > steps:
            continue
        compared += 1
        exact = exact_timesteps(num_timesteps, steps, spacing)
        for a, b, t in zip(ours, theirs, exact, strict=True):
            assert a == b or (abs(a - b) == 1 and t.denominator == 2), (steps, t)
    assert compared > 0.9 * (num_timesteps - 2)


def test_one_linspace_step_starts_at_noise() -> None:
    """One point of [0, 999] is 0 for numpy, where a sample of noise does not belong."""
    assert respace(1000, 1, "linspace") == [999] and their_timesteps(1000, 1, "linspace") == [0]


def test_trailing_has_as_many_steps_as_asked_for() -> None:
    """61 steps of theirs are 62, of which the last is timestep -1: a table's noisiest row.

    Its range of floats runs past the end by a rounding error, for 62 numbers of steps of 1000.
    """
    theirs = their_timesteps(1000, 61, "trailing")
    assert len(theirs) == 62 and theirs[-2:] == [15, -1]
    assert respace(1000, 61, "trailing") == theirs[:-1]
    too_many = [n for n in range(1, 1001) if len(their_timesteps(1000, n, "trailing")) != n]
    assert len(too_many) == 62
    assert all(len(respace(1000, n, "trailing")) == n for n in too_many)


def test_dpmpp_2m_visits_the_timesteps_of_every_other_sampler() -> None:
    """Theirs leaves 0 out, of a grid of one more: 10 linspace steps end at 100, ours at 0."""
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    for spacing in TIMESTEP_SPACINGS:
        visited = [
            step_table(GaussianDiffusion(), sampler, 10, timestep_spacing=spacing).timesteps
            for sampler in SAMPLERS
        ]
        assert visited == [visited[0]] * len(SAMPLERS)


def test_leading_stays_in_range_issue_10003() -> None:
    """Their steps_offset of 1 leads out of the table; a list of ours is checked."""
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[0] == 1000
    x = randn(SHAPE, 0)
    with pytest.raises(IndexError):
        scheduler.step(x, scheduler.timesteps[0], x)
    assert max(respace(1000, 1000, "leading")) == 999
    with pytest.raises(ValueError, match=r"must be strictly decreasing and lie in \[0, 999\]"):
        respace(1000, None, range(1000, 0, -1))


# Where theirs and ours differ on purpose


def one_step(
    table: StepTable, i: int, x: Tensor, output: Tensor, noise: Tensor | None = None
) -> Tensor:
    rows = table.to(CPU, ops.compute_dtype(x.dtype))
    return ops.reverse_step(x, output, rows, torch.tensor(i), noise=noise, clip=table.clip)


STATE, OUTPUT, NOISE = (randn((2, 3, 64), k, torch.float64) for k in range(3))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [1, 10, 61])
def test_no_noise_is_left_in_the_final_image_issues_5689_6068(
    sampler: str, spacing: str, steps: int
) -> None:
    """The last step of every sampler gives the predicted x_start, whatever its timestep."""
    diffusion = GaussianDiffusion(variance_type="fixed_large")
    table = step_table(diffusion, sampler, steps, timestep_spacing=spacing)
    last = len(table) - 1
    t = torch.full((2,), table.timesteps[last])
    x0 = diffusion.predict_xstart(STATE, t, OUTPUT).clamp(-1, 1)
    torch.testing.assert_close(one_step(table, last, STATE, OUTPUT, NOISE), x0)


def test_the_last_step_is_told_by_its_place() -> None:
    """Theirs asks whether t > 0: with trailing steps, noise of 0.28 ends up in the image."""
    diffusion = GaussianDiffusion(variance_type="fixed_large")
    scheduler = peer(DDPMScheduler, diffusion, variance_type="fixed_large")
    timesteps = respace(1000, 10, "trailing")
    scheduler.set_timesteps(timesteps=timesteps)
    zero = torch.zeros_like(STATE)
    generator = torch.Generator().manual_seed(0)
    theirs = scheduler.step(zero, timesteps[-1], zero, generator=generator).prev_sample
    left = math.sqrt(1 - float(diffusion.alphas_cumprod[99]))
    assert left == pytest.approx(0.28, abs=0.05)
    assert float(theirs.std()) == pytest.approx(left, rel=0.1)
    assert not one_step(ddpm(diffusion, 10), 9, zero, zero, NOISE).any()


def test_ddim_rederives_eps_from_the_clamped_x_start() -> None:
    """Theirs does so on request only; else x_0 and eps do not add up to x_t where it clamps."""
    diffusion = GaussianDiffusion()
    scheduler = peer(DDIMScheduler, diffusion, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    ours = one_step(ddim(diffusion, 10), 0, STATE, OUTPUT)
    kept = scheduler.step(OUTPUT, 999, STATE).prev_sample
    rederived = scheduler.step(OUTPUT, 999, STATE, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, rederived, rtol=1e-10, atol=1e-10)
    assert float((ours - kept).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("spacing", "steps", "i", "t", "ours_next", "theirs_next"),
    [("linspace", 10, 0, 999, 888, 899), ("trailing", 300, 1, 996, 992, 993)],
    ids=["linspace", "N does not divide T"],
)
def test_ddim_leads_to_the_next_timestep_issues_12633_11347(
    spacing: str, steps: int, i: int, t: int, ours_next: int, theirs_next: int
) -> None:
    """Theirs leads to t - T // N, where the next step then does not start."""
    diffusion = GaussianDiffusion(clip_denoised=False)
    table = ddim(diffusion, steps, timestep_spacing=spacing)
    scheduler = peer(DDIMScheduler, diffusion, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert table.timesteps[i : i + 2] == (t, ours_next)
    assert scheduler.timesteps[i : i + 2].tolist() == [t, ours_next]

    x0 = diffusion.predict_xstart(STATE, torch.tensor([t, t]), OUTPUT)
    ours = one_step(table, i, STATE, OUTPUT)
    theirs = scheduler.step(OUTPUT, t, STATE).prev_sample
    for stepped, following in ((ours, ours_next), (theirs, theirs_next)):
        expected, _ = diffusion.q_sample(x0, torch.tensor([following] * 2), OUTPUT)
        torch.testing.assert_close(stepped, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 300])
def test_ddpm_leads_to_the_next_trailing_timestep_issue_9261(steps: int) -> None:
    """Theirs does too by now, also where N does not divide T."""
    diffusion = GaussianDiffusion(variance_type="fixed_small")
    table = ddpm(diffusion, steps)
    scheduler = peer(DDPMScheduler, diffusion, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert tuple(scheduler.timesteps.tolist()) == table.timesteps
    for i in (0, 1, steps // 2):
        with mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *_, **__: NOISE):
            theirs = scheduler.step(OUTPUT, table.timesteps[i], STATE).prev_sample
        ours = one_step(table, i, STATE, OUTPUT, NOISE)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_default_variance_depends_on_the_number_of_steps() -> None:
    """Theirs is fixed_small for any; for all T steps, fixed_large is the better one.

    Song et al. 2021 (arXiv 2010.02502), table 1.
    """
    assert DDPMScheduler().config.variance_type == "fixed_small"
    for steps, ours in ((1000, "fixed_large"), (100, "fixed_small")):
        fixed = GaussianDiffusion(variance_type=ours)
        assert torch.equal(ddpm(GaussianDiffusion(), steps).rows, ddpm(fixed, steps).rows)


def test_a_learned_variance_is_a_logarithm() -> None:
    """As in OpenAI's code; their "learned" is the variance, of which a network gives negatives."""
    diffusion = GaussianDiffusion(variance_type="learned", prediction_type="sample")
    output = torch.cat([OUTPUT, torch.full_like(OUTPUT, -4.0)], dim=1)
    added = one_step(ddpm(diffusion), 500, STATE, output, NOISE) - one_step(
        ddpm(diffusion), 500, STATE, output
    )
    torch.testing.assert_close(added, math.exp(-2) * NOISE)
    scheduler = peer(DDPMScheduler, diffusion, variance_type="learned")
    scheduler.set_timesteps(1000)
    assert scheduler.step(output, 499, STATE).prev_sample.isnan().all()


def test_fixed_large_is_finite_issue_14569() -> None:
    """Their fixed_large_log takes the root of a logarithm: NaN. A variance of ours is one number,
    which both of their names mean.
    """
    diffusion = GaussianDiffusion(variance_type="fixed_large")
    scheduler = peer(DDPMScheduler, diffusion, variance_type="fixed_large_log")
    scheduler.set_timesteps(1000)
    assert scheduler.step(OUTPUT, 500, STATE).prev_sample.isnan().all()
    table = ddpm(diffusion)
    expected = (0.5 * diffusion.betas.log()).exp().flip(0)
    sigma = table.rows[:, ROW.index("sigma")]
    torch.testing.assert_close(sigma[:-1], expected[:-1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("steps", range(1, 16))
def test_few_steps_are_finite_issue_9007(steps: int) -> None:
    """Their singlestep solvers gave NaN where lambda is infinite, at the end or the start."""
    for zero_snr in (False, True):
        diffusion = GaussianDiffusion.from_schedule(
            "scaled_linear", rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
        )
        for sampler in SAMPLERS:
            table = step_table(diffusion, sampler, steps)
            *_, x = walk(table, smooth_network(diffusion), randn(SHAPE, 0))
            assert x.isfinite().all() and x.abs().max() <= 1


def test_betas_do_not_depend_on_the_number_of_timesteps_pull_12341() -> None:
    """Theirs do not either: at T = 100 the same ends leave half of the signal in x_T.

    Ends scaled by 1000 / T, as OpenAI's and lucidrains' are, leave what T = 1000 does.
    """
    whole = GaussianDiffusion().sqrt_alphas_cumprod[-1]
    short = GaussianDiffusion.from_schedule("linear", 100)
    theirs = DDPMScheduler(num_train_timesteps=100).alphas_cumprod.double().sqrt()
    torch.testing.assert_close(short.sqrt_alphas_cumprod, theirs, rtol=1e-5, atol=0)
    assert whole < 0.01 and short.sqrt_alphas_cumprod[-1] > 0.5
    scaled = GaussianDiffusion.from_schedule("linear", 100, beta_start=1e-3, beta_end=0.2)
    assert scaled.sqrt_alphas_cumprod[-1] < 0.01


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_half_precision_is_not_black_guided_diffusion_50_lucidrains_101(sampler: str) -> None:
    """A float16 state and output, at every timestep: finite, and as near as float16 can be."""
    diffusion = GaussianDiffusion.from_schedule("squaredcos_cap_v2", variance_type="fixed_small")
    table = step_table(diffusion, sampler, timestep_spacing=range(999, -1, -1))
    x, output, noise = (value.half() for value in (STATE, OUTPUT, NOISE))
    for i in range(len(table)):
        half = one_step(table, i, x, output, noise)
        exact = one_step(table, i, x.double(), output.double(), noise.double())
        assert half.dtype == torch.float16 and half.isfinite().all()
        torch.testing.assert_close(half.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_ddim_of_a_learned_variance_lucidrains_209_292(sampler: str, variance_type: str) -> None:
    """Without noise there is none to scale: the second half of the channels is passed over."""
    learned = GaussianDiffusion(variance_type=variance_type)
    table = step_table(learned, sampler, 10)
    assert table.reads_variance and not table.draws_noise
    variance = torch.full_like(OUTPUT, torch.nan)
    plain = step_table(GaussianDiffusion(), sampler, 10)
    for i in range(10):
        ours = one_step(table, i, STATE, torch.cat([OUTPUT, variance], dim=1))
        assert torch.equal(ours, one_step(plain, i, STATE, OUTPUT))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddim_brings_its_own_variance_lucidrains_209_292(variance_type: str) -> None:
    """With eta above 0, sigma is eq. 16's of Song et al. 2021, whatever the network learned."""
    table = ddim(GaussianDiffusion(variance_type=variance_type), 10, eta=0.5)
    plain = ddim(GaussianDiffusion(), 10, eta=0.5)
    for fill in (-1.0, 3.0):
        output = torch.cat([OUTPUT, torch.full_like(OUTPUT, fill)], dim=1)
        for i in range(10):
            ours = one_step(table, i, STATE, output, NOISE)
            torch.testing.assert_close(ours, one_step(plain, i, STATE, OUTPUT, NOISE))


@pytest.mark.parametrize("steps", [4, 5, 8, 10, 20, 40])
def test_ddim_of_eta_1_from_pure_noise_hangs_on_a_rounding_error_in_theirs(steps: int) -> None:
    """1 - abar_prev - sigma^2 is 0 there; theirs takes the root of what is left of it."""
    diffusion = GaussianDiffusion.from_schedule(
        rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    theirs = scheduler.step(OUTPUT.float(), 999, STATE.float(), eta=1.0).prev_sample
    previous = 999 - 1000 // steps
    sigma = scheduler._get_variance(999, previous) ** 0.5
    left = 1 - scheduler.alphas_cumprod[previous] - sigma**2
    assert abs(left) < 1e-6 and theirs.isnan().all() == (left < 0)
    assert one_step(ddim(diffusion, steps, eta=1.0), 0, STATE, OUTPUT, NOISE).isfinite().all()


def test_dpmpp_2m_takes_the_limit() -> None:
    """From pure noise, where theirs puts an abar of 2^-24: with less of it, theirs tends to ours.

    Slowly: the second step extrapolates by the first one's h, which goes as log(1 / abar).
    """
    diffusion = GaussianDiffusion.from_schedule(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_denoised=False
    )
    table = dpmpp_2m(diffusion, 10)
    assert DPMSolverMultistepScheduler(rescale_betas_zero_snr=True).alphas_cumprod[-1] == 2**-24
    network = smooth_network(diffusion)
    *_, ours = walk(table, network, STATE)
    distances = []
    for abar in (2.0**-24, 1e-30, 1e-300):
        step, x = dpm_peer(diffusion, list(table.timesteps), first_abar=abar), STATE
        for i, t in enumerate(table.timesteps):
            x = step(x, i, network(x, torch.full((len(x),), t)), NOISE)
        distances.append(float((x - ours).abs().max()))
    assert 1e-3 > distances[0] > 10 * distances[1] > 80 * distances[2]


def test_inversion_depends_on_the_prediction_type_in_theirs() -> None:
    """Theirs reads v and x_0 as of where a step starts, though the network was told where it ends.

    So one eps, told in three ways, leads to three states, of which that of x_0 is a division by
    zero in the first step. Ours is one.
    """
    first = 99
    abar = GaussianDiffusion().alphas_cumprod[first]
    x0 = (STATE - (1 - abar).sqrt() * OUTPUT) / abar.sqrt()
    told = {
        "epsilon": OUTPUT,
        "v_prediction": abar.sqrt() * OUTPUT - (1 - abar).sqrt() * x0,
        "sample": x0,
    }
    ours, theirs = {}, {}
    for prediction_type, output in told.items():
        diffusion = GaussianDiffusion(prediction_type=prediction_type)
        ours[prediction_type] = one_step(ddim_inversion(diffusion, 10), 0, STATE, output)
        scheduler = peer(DDIMInverseScheduler, diffusion, clip_sample=False)
        scheduler.config.timestep_spacing = "trailing"
        scheduler.set_timesteps(10)
        theirs[prediction_type] = scheduler.step(output, first, STATE).prev_sample
    for found in ours.values():
        torch.testing.assert_close(found, theirs["epsilon"], rtol=1e-10, atol=1e-10)
    assert float((theirs["v_prediction"] - theirs["epsilon"]).abs().max()) > 0.1
    assert not theirs["sample"].isfinite().any()


def test_float32_tables_lose_digits() -> None:
    """1 - abar cancels where t is small: their step is off by 1e-4, ours by its own rounding."""
    diffusion = GaussianDiffusion(variance_type="fixed_small")
    table, t = ddpm(diffusion), 2
    exact = one_step(table, 999 - t, STATE, OUTPUT, NOISE)
    scheduler = DDPMScheduler(variance_type="fixed_small")
    with mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *_, **__: NOISE.float()):
        theirs = scheduler.step(OUTPUT.float(), t, STATE.float()).prev_sample
    ours = one_step(table, 999 - t, STATE.float(), OUTPUT.float(), NOISE.float())
    assert float((theirs - exact).abs().max()) > 1e-4
    assert float((ours - exact).abs().max()) < 1e-6

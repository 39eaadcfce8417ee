"""Step tables: what a step of each sampler comes to, against the papers' formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import randn
from ddpm_fast import GaussianDiffusion, ops, sample
from ddpm_fast.diffusion import PREDICTION_TYPES
from ddpm_fast.ops import ROW
from ddpm_fast.schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, named_betas
from ddpm_fast.solvers import StepTable, ddim, ddpm, step_table

SHAPE = (2, 3, 5)


def run(
    table: StepTable, i: int, x_t: torch.Tensor, output: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    rows = table.to(torch.device("cpu"), torch.float64)
    return ops.reverse_step(
        x_t, output, rows, torch.tensor(i), noise=noise, clip=table.clip, backend="reference"
    )


def column(table: StepTable, name: str) -> torch.Tensor:
    return table.rows[:, ROW.index(name)]


diffusions = st.builds(
    GaussianDiffusion.from_schedule,
    st.sampled_from(BETA_SCHEDULES),
    st.integers(2, 60),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    variance_type=st.sampled_from(["fixed_small", "fixed_large"]),
    clip_denoised=st.booleans(),
)
spacings = st.sampled_from(TIMESTEP_SPACINGS)


@given(diffusions, spacings, st.data())
def test_ddpm_step(diffusion: GaussianDiffusion, spacing: str, data: st.DataObject) -> None:
    """Ho et al. 2020, eqs. 7 and 15, on the betas that respacing leaves."""
    steps = data.draw(st.integers(1, diffusion.num_timesteps))
    table = ddpm(diffusion, steps, timestep_spacing=spacing)
    i = data.draw(st.integers(0, steps - 1))
    x_t, output, noise = (randn(SHAPE, k, torch.float64) for k in range(3))

    t = table.timesteps[i]
    abar = diffusion.alphas_cumprod[t]
    last = i == steps - 1
    prev = torch.tensor(1.0).double() if last else diffusion.alphas_cumprod[table.timesteps[i + 1]]
    beta = 1 - abar / prev
    x0 = diffusion.predict_xstart(x_t, torch.full((2,), t), output)
    x0 = x0.clamp(-1, 1) if diffusion.clip_denoised else x0
    mean = beta * prev.sqrt() / (1 - abar) * x0
    mean += (1 - prev) * (1 - beta).sqrt() / (1 - abar) * x_t
    small = beta * (1 - prev) / (1 - abar)
    variance = beta if diffusion.variance_type == "fixed_large" else small
    expected = mean + (0 if last else variance.sqrt()) * noise
    torch.testing.assert_close(run(table, i, x_t, output, noise), expected, rtol=1e-9, atol=1e-9)


@given(diffusions, spacings, st.floats(0, 1), st.data())
def test_ddim_step(
    diffusion: GaussianDiffusion, spacing: str, eta: float, data: st.DataObject
) -> None:
    """Song et al. 2021, eqs. 12 and 16, with eps re-derived from the clamped x_start."""
    steps = data.draw(st.integers(1, diffusion.num_timesteps))
    table = ddim(diffusion, steps, eta=eta, timestep_spacing=spacing)
    i = data.draw(st.integers(0, steps - 1))
    x_t, output, noise = (randn(SHAPE, k, torch.float64) for k in range(3))

    t = table.timesteps[i]
    abar = diffusion.alphas_cumprod[t]
    last = i == steps - 1
    prev = torch.tensor(1.0).double() if last else diffusion.alphas_cumprod[table.timesteps[i + 1]]
    x0 = diffusion.predict_xstart(x_t, torch.full((2,), t), output)
    x0 = x0.clamp(-1, 1) if diffusion.clip_denoised else x0
    eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
    sigma = eta * ((1 - prev) / (1 - abar)).sqrt() * (1 - abar / prev).sqrt()
    expected = prev.sqrt() * x0 + (1 - prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        run(table, i, x_t, output, noise), expected, rtol=1e-7, atol=1e-9 * scale
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_the_last_step_gives_x_start_and_no_noise(sampler: str, spacing: str) -> None:
    """Whatever its timestep: with ``trailing`` it is not 0, and its sigma would be large."""
    diffusion = GaussianDiffusion(variance_type="fixed_large")
    table = step_table(diffusion, sampler, 10, timestep_spacing=spacing)
    last = dict(zip(ROW, table.rows[-1].tolist(), strict=True))
    assert last["sigma"] == 0
    assert last["mean_from_x0"] == pytest.approx(1, abs=1e-12)
    assert last["mean_from_xt"] == pytest.approx(0, abs=1e-12)


def test_the_default_variance_depends_on_the_number_of_steps() -> None:
    """Song et al. 2021, table 1: the larger variance is the better one for the whole chain only."""
    free = GaussianDiffusion()
    for steps, same in ((None, "fixed_large"), (1000, "fixed_large"), (100, "fixed_small")):
        fixed = GaussianDiffusion(variance_type=same)
        assert torch.equal(ddpm(free, steps).rows, ddpm(fixed, steps).rows)


def test_ddim_with_eta_1_has_the_small_variance() -> None:
    diffusion = GaussianDiffusion(variance_type="fixed_small")
    ours, ancestral = ddim(diffusion, 50, eta=1.0), ddpm(diffusion, 50)
    torch.testing.assert_close(column(ours, "sigma"), column(ancestral, "sigma"))
    for name in ("mean_from_x0", "mean_from_xt"):
        torch.testing.assert_close(
            column(ours, name), column(ancestral, name), rtol=1e-6, atol=1e-6
        )


def test_only_noisy_tables_draw_noise() -> None:
    diffusion = GaussianDiffusion()
    assert ddpm(diffusion, 10).draws_noise and ddim(diffusion, 10, eta=0.1).draws_noise
    assert not ddim(diffusion, 10).draws_noise and not ddpm(diffusion, 1).draws_noise


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_learned_variance(variance_type: str, steps: int) -> None:
    """Nichol & Dhariwal 2021, eq. 15; a learned variance is the log-variance itself."""
    diffusion = GaussianDiffusion(variance_type=variance_type)
    table = ddpm(diffusion, steps)
    assert table.reads_variance and table.rows.isfinite().all()
    x_t, v, noise = (randn(SHAPE, k, torch.float64) for k in range(3))
    v = v.clamp(-1, 1)
    output = torch.cat([torch.zeros_like(x_t), v], dim=1)
    for i in {0, steps // 2, steps - 1}:
        added = run(table, i, x_t, output, noise) - run(table, i, x_t, output, 0 * noise)
        if i == steps - 1:
            assert not added.any()
            continue
        t, following = table.timesteps[i], table.timesteps[i + 1]
        abar, prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[following]
        beta = 1 - abar / prev
        low, high = (beta * (1 - prev) / (1 - abar)).log(), beta.log()
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        if variance_type == "learned":
            log_variance = v
        torch.testing.assert_close(added, (log_variance / 2).exp() * noise, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("betas", "prediction_type", "timestep"),
    [
        ([0.1, 1.0], "epsilon", 1),
        ([0.1, 1.0, 0.1], "v_prediction", 2),
        ([1e-20, 0.1], "epsilon", 0),
        (named_betas("linear", 20_000).tolist(), "epsilon", 19_999),
    ],
    ids=["no signal left", "nothing after it", "too small", "T = 20000"],
)
def test_a_table_that_is_not_finite_is_refused(
    betas: list[float], prediction_type: str, timestep: int
) -> None:
    """An error that names the timestep, where pictures of NaN would come out."""
    diffusion = GaussianDiffusion(
        torch.tensor(betas, dtype=torch.float64), prediction_type=prediction_type
    )
    sentence = f"the schedule gives a step at timestep {timestep} that is not finite in float32"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        sample(lambda x, t: x, (1, 1, 2), diffusion=diffusion)


def test_tables_ignore_the_default_device() -> None:
    with torch.device("meta"):
        table = ddim(GaussianDiffusion(), 5)
    assert table.rows.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim; got 'euler'"),
        ({"eta": 0.5}, "eta belongs to ddim; got 0.5 for ddpm"),
        ({"sampler": "ddim", "eta": 1.5}, "eta must lie in [0, 1]; got 1.5"),
        ({"num_steps": 1001}, "num_steps must lie in [1, 1000]; got 1001"),
    ],
)
def test_bad_options(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        step_table(GaussianDiffusion(), **arguments)
    assert str(error.value) == sentence

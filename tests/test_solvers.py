"""Step tables: what a step of each sampler comes to, against the papers' formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import GaussianModel, randn, walk
from ddpm_fast import GaussianDiffusion, ops, sample
from ddpm_fast.diffusion import PREDICTION_TYPES
from ddpm_fast.ops import ROW
from ddpm_fast.schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, named_betas
from ddpm_fast.solvers import (
    SAMPLERS,
    StepTable,
    Thresholding,
    ddim,
    ddim_inversion,
    ddpm,
    dpmpp_2m,
    step_table,
)

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


@given(diffusions, spacings, st.data())
def test_dpmpp_2m_step(diffusion: GaussianDiffusion, spacing: str, data: st.DataObject) -> None:
    """Lu et al. 2022, algorithm 2, in their names; first and last step are of the first order."""
    steps = data.draw(st.integers(1, diffusion.num_timesteps))
    table = dpmpp_2m(diffusion, steps, timestep_spacing=spacing)
    i = data.draw(st.integers(0, steps - 1))
    x_s, output, x0_prev = (randn(SHAPE, k, torch.float64) for k in range(3))
    rows = table.to(torch.device("cpu"), torch.float64)
    stepped = ops.reverse_step(
        x_s, output, rows, torch.tensor(i), x0_prev=x0_prev, clip=table.clip, backend="reference"
    )

    abars = [*diffusion.alphas_cumprod[list(table.timesteps)].tolist(), 1.0]
    alpha = [math.sqrt(abar) for abar in abars]
    sigma = [math.sqrt(1 - abar) for abar in abars]
    x0 = diffusion.predict_xstart(x_s, torch.full((2,), table.timesteps[i]), output)
    x0 = x0.clamp(-1, 1) if diffusion.clip_denoised else x0
    if i == steps - 1:
        expected = x0
    else:
        lambdas = [math.log(a / s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
        h = lambdas[i + 1] - lambdas[i]
        if i > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            x0 = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_prev
        expected = sigma[i + 1] / sigma[i] * x_s - alpha[i + 1] * math.expm1(-h) * x0
    torch.testing.assert_close(stepped, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_knows_x_start_gets_there(sampler: str, steps: int) -> None:
    diffusion = GaussianDiffusion(prediction_type="sample")
    x_start = randn(SHAPE, 0, torch.float64).clamp(-1, 1)
    *_, last = walk(
        step_table(diffusion, sampler, steps), lambda x, t: x_start, randn(SHAPE, 1, torch.float64)
    )
    torch.testing.assert_close(last, x_start, rtol=1e-12, atol=1e-12)


def solved_to(x: torch.Tensor, model: GaussianModel, start: int, end: int) -> torch.Tensor:
    """The probability-flow ODE in closed form: a Gaussian's quantiles stay what they are."""

    def moments(abar: float) -> tuple[float, float]:
        return math.sqrt(abar) * model.mean, math.sqrt(abar * model.std**2 + 1 - abar)

    (mean0, std0), (mean1, std1) = (
        moments(float(model.diffusion.alphas_cumprod[t])) for t in (start, end)
    )
    return mean1 + std1 * (x - mean0) / std0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (dpmpp_2m, 2)])
def test_order_of_convergence(solver: Any, order: int, prediction_type: str) -> None:
    """Halving the steps' size divides the error by 2 to the order.

    Up to the last step but one: the last, to lambda = inf, has no order.
    """
    diffusion = GaussianDiffusion(prediction_type=prediction_type, clip_denoised=False)
    model, x_T = GaussianModel(diffusion), randn(SHAPE, 0, torch.float64)
    exact = solved_to(x_T, model, 999, 99)
    errors = []
    for stride in (20, 10, 5):
        table = solver(diffusion, timestep_spacing=range(999, 98, -stride))
        *_, x, _ = walk(table, model, x_T)
        errors.append(float((x - exact).abs().max()))
    for error, halved in zip(errors, errors[1:], strict=False):
        assert math.log2(error / halved) == pytest.approx(order, abs=0.02)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_is_undone_by_ddim(prediction_type: str) -> None:
    """To x_T and back, up to errors of the first order in the steps' size."""
    diffusion = GaussianDiffusion(prediction_type=prediction_type, clip_denoised=False)
    model = GaussianModel(diffusion)
    x_start = model.mean + model.std * randn(SHAPE, 0, torch.float64)
    errors = []
    for steps in (125, 250, 500, 1000):
        *_, x_T = walk(ddim_inversion(diffusion, steps), model, x_start)
        *_, x = walk(ddim(diffusion, steps), model, x_T)
        errors.append(float((x - x_start).abs().max()))
    for error, halved in zip(errors, errors[1:], strict=False):
        assert math.log2(error / halved) == pytest.approx(1, abs=0.05)
    assert errors[-1] < 0.01


@given(diffusions, spacings, st.data())
def test_inversion_of_constant_noise_is_undone_exactly(
    diffusion: GaussianDiffusion, spacing: str, data: st.DataObject
) -> None:
    """Where eps does not change along a step, both ways are the same straight line.

    However the network tells of its eps: networks of all types that have the same lead to one x_T.
    """
    steps = data.draw(st.integers(1, diffusion.num_timesteps))
    options = {"clip_denoised": False, "prediction_type": diffusion.prediction_type}
    diffusion = GaussianDiffusion(diffusion.betas, **options)
    x_start, eps = (randn(SHAPE, k, torch.float64) for k in range(2))

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1)
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
        return {"epsilon": eps, "sample": x0, "v_prediction": v}[diffusion.prediction_type]

    inversion = ddim_inversion(diffusion, steps, timestep_spacing=spacing)
    *_, x_T = walk(inversion, network, x_start)
    there, _ = diffusion.q_sample(x_start, torch.tensor(inversion.timesteps[-1]), eps)
    torch.testing.assert_close(x_T, there, rtol=1e-9, atol=1e-9)
    table = ddim(diffusion, steps, timestep_spacing=spacing)
    *_, x = walk(table, network, x_T)
    # Rounding errors in x_T are divided by sqrt(abar_T).
    room = 1e-13 * float(diffusion.sqrt_recip_alphas_cumprod[inversion.timesteps[-1]])
    torch.testing.assert_close(x, x_start, rtol=0, atol=max(1e-11, room))


def test_inversion_goes_up_and_does_not_clamp() -> None:
    diffusion = GaussianDiffusion(dynamic_thresholding_ratio=0.9)
    table = ddim_inversion(diffusion, 4, timestep_spacing="leading")
    assert table.timesteps == (0, 250, 500, 750)
    assert table.rows[:, ROW.index("timestep")].tolist() == [0, 250, 500, 750]
    assert table.clip is None and table.thresholding is None and not table.draws_noise


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_rows_are_finite_for_any_number_of_steps(
    sampler: str, schedule: str, zero_snr: bool
) -> None:
    for prediction_type in PREDICTION_TYPES[1:] if zero_snr else PREDICTION_TYPES:
        for variance_type in (None, "fixed_large", "learned_range"):
            diffusion = GaussianDiffusion.from_schedule(
                schedule,
                40,
                rescale_betas_zero_snr=zero_snr,
                prediction_type=prediction_type,
                variance_type=variance_type,
            )
            for spacing in TIMESTEP_SPACINGS:
                for steps in range(1, 41):
                    table = step_table(diffusion, sampler, steps, timestep_spacing=spacing)
                    assert table.to(torch.device("cpu"), torch.float32).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_first_step_from_pure_noise(sampler: str, prediction_type: str, steps: int) -> None:
    """With abar = 0, lambda is -inf: the step is one of q(x_prev | x_0), whatever the sampler."""
    diffusion = GaussianDiffusion.from_schedule(
        rescale_betas_zero_snr=True, prediction_type=prediction_type
    )
    table = step_table(diffusion, sampler, steps)
    row = dict(zip(ROW, table.rows[0].tolist(), strict=True))
    prev = float(diffusion.alphas_cumprod[table.timesteps[1]]) if steps > 1 else 1.0
    assert row["x0_from_xt"] == 0 and abs(row["x0_from_out"]) == 1
    assert row["mean_from_x0"] == pytest.approx(math.sqrt(prev), rel=1e-12)
    noise = math.hypot(row["mean_from_xt"], row["sigma"])
    assert noise == pytest.approx(math.sqrt(1 - prev), rel=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_epsilon_says_nothing_where_no_signal_is_left(sampler: str) -> None:
    diffusion = GaussianDiffusion.from_schedule(rescale_betas_zero_snr=True)
    sentence = (
        "no step can start at timestep 999 with epsilon prediction: alphas_cumprod is 0 there, "
        "and noise alone tells nothing of x_start; "
        "use v_prediction or sample, or timesteps that leave it out"
    )
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        step_table(diffusion, sampler, 10)
    assert step_table(diffusion, sampler, 10, timestep_spacing="leading").rows.isfinite().all()
    # An inversion only ends there.
    assert ddim_inversion(diffusion, 10).rows.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_thresholding_takes_the_place_of_the_clamp(sampler: str) -> None:
    dynamic = GaussianDiffusion(dynamic_thresholding_ratio=0.995, sample_max_value=1.5)
    table, plain = step_table(dynamic, sampler, 10), step_table(GaussianDiffusion(), sampler, 10)
    assert table.thresholding == Thresholding(ratio=0.995, max_value=1.5) and table.clip is None
    assert plain.thresholding is None and plain.clip == 1.0
    assert torch.equal(table.rows, plain.rows)


@pytest.mark.parametrize("sampler", SAMPLERS)
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
        ([0.1, 1.0, 0.1], "v_prediction", 2),
        ([1e-20, 0.1], "epsilon", 0),
        (named_betas("linear", 20_000).tolist(), "epsilon", 19_999),
    ],
    ids=["nothing after it", "too small", "T = 20000"],
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
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, dpmpp_2m; got 'euler'"),
        ({"eta": 0.5}, "eta belongs to ddim; got 0.5 for ddpm"),
        ({"sampler": "dpmpp_2m", "eta": 1}, "eta belongs to ddim; got 1 for dpmpp_2m"),
        ({"sampler": "ddim", "eta": 1.5}, "eta must lie in [0, 1]; got 1.5"),
        ({"num_steps": 1001}, "num_steps must lie in [1, 1000]; got 1001"),
    ],
)
def test_bad_options(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        step_table(GaussianDiffusion(), **arguments)
    assert str(error.value) == sentence

"""Guidance: classifier-free in the kernel, its rescaling, and a classifier's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import GaussianModel, randn, reverse_step_case
from ddpm_fast import GaussianDiffusion, Sampler, ops, sample
from ddpm_fast.guidance import rescale_factor, score_coefs
from ddpm_fast.solvers import ddim, ddpm

SHAPE = (3, 2, 5, 7)


class LabelledModel(nn.Module):
    """An x_start that depends on the label, the pixel and the timestep."""

    num_classes = 10

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        number = class_labels.to(x.dtype) + t.to(x.dtype) / 50
        return 0.02 * number.reshape(-1, 1, 1, 1) * (1 + x.tanh()) + 0.1 * x


DIFFUSION = GaussianDiffusion.from_schedule("linear", 20, prediction_type="sample")
LABELS = [1, 5, 9]


def draw(**options: Any) -> torch.Tensor:
    options = {"diffusion": DIFFUSION, "class_labels": LABELS, "seed": 0} | options
    return sample(LabelledModel(), SHAPE, **options)


# --- classifier-free --------------------------------------------------------------------------


def by_hand(scale: torch.Tensor, rescale: float = 0.0, **options: Any) -> torch.Tensor:
    """Guidance in PyTorch around the network, by the formulas of the papers; scale [S, N]."""
    model, steps = LabelledModel(), []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        w = scale[len(steps)].reshape(-1, 1, 1, 1)
        steps.append(t)
        cond = model(x, t, torch.tensor(LABELS))
        uncond = model(x, t, torch.full((3,), 10))
        guided = uncond + w * (cond - uncond)
        ratio = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        return rescale * guided * ratio + (1 - rescale) * guided

    return sample(network, SHAPE, diffusion=DIFFUSION, seed=0, **options)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    ("scale", "table"),
    [
        (3.0, torch.full((4, 3), 3.0)),
        ([0.0, 1.0, -2.5], torch.tensor([[0.0, 1.0, -2.5]]).expand(4, 3)),
        ([[1.0], [2.0], [4.0], [0.5]], torch.tensor([[1.0], [2.0], [4.0], [0.5]]).expand(4, 3)),
        (torch.arange(12.0).reshape(4, 3), torch.arange(12.0).reshape(4, 3)),
    ],
    ids=["one", "per sample", "per step", "per step and sample"],
)
def test_guidance_is_the_formula(
    scale: Any, table: torch.Tensor, rescale: float, backend: str
) -> None:
    options: dict[str, Any] = {"num_steps": 4, "backend": backend}
    drawn = draw(guidance_scale=scale, guidance_rescale=rescale, **options)
    expected = by_hand(table, rescale, **options)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-6)


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_in_the_kernel_as_in_pytorch(seed: int, learned: bool, per_sample: bool) -> None:
    """Guidance in the kernel and guidance in PyTorch before it: equal within rounding."""
    options: dict[str, Any] = {"seed": seed, "learned": learned, "per_sample": per_sample}
    case = reverse_step_case((4, 3, 8, 8), guided=True, noise="none", **options)
    x_t, output, rows, step = case.args
    inside = ops.reverse_step(*case.args, **case.kwargs)
    scale = case.kwargs.pop("guidance_scale")
    w = scale[step, torch.arange(4)].reshape(-1, 1, 1, 1) if per_sample else scale
    cond, uncond = output.chunk(2)
    guided = torch.cat([torch.lerp(uncond[:, :3], cond[:, :3], w), cond[:, 3:]], dim=1)
    outside = ops.reverse_step(x_t, guided, rows, step, **case.kwargs)
    size = float(rows.abs().max() ** 2) * (1 + float(scale.abs().max())) * 10
    torch.testing.assert_close(inside, outside, rtol=0, atol=size * 2**-22)


def test_rescaling_gives_the_conditional_deviation() -> None:
    output, x_t = randn((6, 4, 9, 9), 1), randn((3, 2, 9, 9), 2)
    scale, step = torch.full((1, 1), 7.5), torch.tensor(0)
    factor = rescale_factor(output, scale, step, x_t, 1.0)
    cond, uncond = output[:, :2].chunk(2)
    guided = (uncond + 7.5 * (cond - uncond)) * factor.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(guided.flatten(1).std(1), cond.flatten(1).std(1))


def test_a_constant_prediction_is_left_as_it_is(backend: str) -> None:
    """A fresh U-Net answers 0 everywhere, whose standard deviation is 0."""
    model = LabelledModel()
    model.forward = lambda x, t, class_labels: torch.zeros_like(x)  # type: ignore[assignment]
    options: dict[str, Any] = {"guidance_scale": 3.0, "guidance_rescale": 0.7}
    options |= {"class_labels": LABELS, "diffusion": DIFFUSION, "backend": backend}
    assert sample(model, SHAPE, **options).isfinite().all()


def test_a_scale_that_changes_stays_with_its_sampler(backend: str) -> None:
    options: dict[str, Any] = {"guidance_scale": [1.0, 2.0, 3.0], "guidance_rescale": 0.5}
    options |= {"diffusion": DIFFUSION, "backend": backend, "num_steps": 4}
    run = Sampler(LabelledModel(), SHAPE, **options)
    first, second = (run(class_labels=LABELS, seed=0) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, draw(**options))


def test_a_table_of_scales_is_the_samplers_own() -> None:
    scale = torch.full((1, 1), 2.0)
    run = Sampler(LabelledModel(), SHAPE, diffusion=DIFFUSION, guidance_scale=scale)
    scale.fill_(5.0)
    assert torch.equal(run(class_labels=LABELS, seed=0), draw(guidance_scale=2.0))


# --- a classifier's gradient ------------------------------------------------------------------


def gaussian_classifier(diffusion: GaussianDiffusion, data: GaussianModel) -> Any:
    """log p(y | x_t), up to a constant, of y = x_0 + N(0, 0.1^2) seen as 0.5, by autograd."""

    def cond_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        abar = diffusion.alphas_cumprod.to(x.device)[t].reshape(-1, 1, 1, 1)
        total = abar * data.std**2 + 1 - abar
        mean = data.mean + abar.sqrt() * data.std**2 / total * (x - abar.sqrt() * data.mean)
        variance = data.std**2 * (1 - abar) / total + 0.1**2
        log_p = -((0.5 - mean) ** 2) / (2 * variance)
        return torch.autograd.grad(log_p.sum(), x)[0]

    return cond_fn


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("prediction_type", "sampler"),
    [
        ("epsilon", "ddpm"),
        ("epsilon", "ddim"),
        ("sample", "ddpm"),
        ("v_prediction", "dpmpp_2m"),
    ],
)
def test_a_classifier_turns_the_prior_into_the_posterior(
    prediction_type: str, sampler: str, backend: str
) -> None:
    """N(0.3, 0.2^2) seen through N(0, 0.1^2) as 0.5 is N(0.46, 0.2^2 0.1^2 / (0.2^2 + 0.1^2))."""
    diffusion = GaussianDiffusion(prediction_type=prediction_type, clip_denoised=False)
    model = GaussianModel(diffusion)
    drawn = sample(
        model,
        (64, 1, 8, 8),
        diffusion=diffusion,
        sampler=sampler,
        cond_fn=gaussian_classifier(diffusion, model),
        seed=0,
        backend=backend,
    )
    assert float(drawn.mean()) == pytest.approx(0.46, abs=0.006)
    assert float(drawn.std()) == pytest.approx(0.2 * 0.1 / 0.05**0.5, abs=0.006)


def test_a_gradient_shifts_the_mean_by_the_variance() -> None:
    """As Dhariwal & Nichol 2021, algorithm 1, up to 1 / sqrt(alpha): mean + beta gradient."""
    diffusion = GaussianDiffusion(clip_denoised=False)
    table = ddpm(diffusion)
    coef = score_coefs(diffusion, table)
    rows = dict(zip(ops.ROW, table.rows.unbind(1), strict=True))
    shift = rows["mean_from_x0"] * rows["x0_from_out"] * coef
    beta = diffusion.betas.flip(0)
    torch.testing.assert_close(shift, beta / (1 - beta).sqrt())


def test_a_gradient_shifts_eps_as_in_ddim() -> None:
    """Dhariwal & Nichol 2021, algorithm 2: eps - sqrt(1 - abar) gradient."""
    diffusion = GaussianDiffusion()
    table = ddim(diffusion, 10)
    abar = diffusion.alphas_cumprod[list(table.timesteps)]
    torch.testing.assert_close(score_coefs(diffusion, table), -(1 - abar).sqrt())


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_pure_noise_tells_a_classifier_nothing(prediction_type: str, backend: str) -> None:
    """With zero-terminal SNR the first step's gradient would count infinitely."""
    diffusion = GaussianDiffusion.from_schedule(
        prediction_type=prediction_type, rescale_betas_zero_snr=True
    )

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.1 * x

    def cond_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """That of a classifier which looks at x_0 = x_t / sqrt(abar)."""
        return -x / diffusion.alphas_cumprod[t].sqrt().reshape(-1, 1, 1, 1)

    options: dict[str, Any] = {"diffusion": diffusion, "num_steps": 4, "seed": 0}
    drawn = sample(model, SHAPE, cond_fn=cond_fn, backend=backend, **options)
    assert drawn.isfinite().all()


READS = ("aten.item.default", "aten._local_scalar_dense.default")


def test_a_gradient_is_taken_without_reading_on_the_host(device: torch.device, native: str) -> None:
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            read.extend([func] if str(func) in READS else [])
            return func(*args, **(kwargs or {}))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.1 * x

    options: dict[str, Any] = {"cond_fn": lambda x, t: -x, "device": device, "backend": native}
    run = Sampler(model, SHAPE, num_steps=4, **options)
    steps = run.progressive(seed=0)
    with Reads():
        assert len(list(steps)) == 4
    assert not read


def test_a_gradient_needs_the_diffusion_of_the_table() -> None:
    table = ddpm(GaussianDiffusion())
    with pytest.raises(ValueError, match="was made for: timestep 999 is not among 20$"):
        sample(lambda x, t: x, SHAPE, sampler=table, diffusion=DIFFUSION, cond_fn=lambda x, t: x)


def test_a_gradient_is_a_tensor() -> None:
    with pytest.raises(TypeError, match="cond_fn must return a tensor; got NoneType"):
        sample(lambda x, t: x, SHAPE, cond_fn=lambda x, t: None)


def test_cond_fn_sees_what_the_model_sees(backend: str) -> None:
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor, flag: str) -> torch.Tensor:
        seen.append((x.clone(), t.clone(), flag))
        return torch.cat([x, x], dim=1)

    def cond_fn(x: torch.Tensor, t: torch.Tensor, flag: str) -> torch.Tensor:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        x_seen, t_seen, flag_seen = seen[-1]
        assert torch.equal(x, x_seen) and torch.equal(t, t_seen) and flag == flag_seen
        return torch.zeros_like(x)

    options: dict[str, Any] = {
        "diffusion": GaussianDiffusion(variance_type="learned_range"),
        "model_kwargs": {"flag": "yes"},
        "num_steps": 3,
        "seed": 0,
        "backend": backend,
    }
    drawn = sample(model, SHAPE, cond_fn=cond_fn, **options)
    assert len(seen) == 3 and torch.equal(drawn, sample(model, SHAPE, **options))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale must be one number or have shape [3] or "
         "[1 or 20, 1 or 3]; got [2]"),
        ({"guidance_scale": torch.ones(4, 3)}, "guidance_scale must be one number or have shape "
         "[3] or [1 or 20, 1 or 3]; got [4, 3]"),
        ({"guidance_scale": torch.ones(1, 1, 1)}, "guidance_scale must be one number or have "
         "shape [3] or [1 or 20, 1 or 3]; got [1, 1, 1]"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite; got inf"),
        ({"guidance_scale": "3"}, "guidance_scale must be numbers; got '3'"),
        ({"guidance_rescale": 0.5}, "guidance_rescale needs a guidance_scale"),
        ({"guidance_scale": 2.0, "guidance_rescale": 1.5},
         "guidance_rescale must lie in [0, 1]; got 1.5"),
        ({"guidance_scale": 2.0, "cond_fn": lambda x, t: x},
         "give guidance_scale or cond_fn, not both"),
        ({"cond_fn": lambda x, t, class_labels: x[:1]},
         "cond_fn must return a gradient of the shape of x_t; got [1, 2, 5, 7]"),
    ],
)  # fmt: skip
def test_bad_guidance_is_refused(options: dict[str, Any], sentence: str, backend: str) -> None:
    with pytest.raises(ValueError) as error:
        draw(backend=backend, **options)
    assert str(error.value) == sentence

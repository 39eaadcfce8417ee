"""Inpainting, image to image, inversion and interpolation, with models whose answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import GaussianModel, randn
from ddpm_fast import GaussianDiffusion, ops, sample
from ddpm_fast.editing import (
    image_to_image,
    initial_noise,
    inpaint,
    interpolate,
    invert,
    slerp,
)
from ddpm_fast.ops import ROW
from ddpm_fast.resampling import resampled
from ddpm_fast.solvers import StepTable, ddim, ddim_inversion, ddpm, dpmpp_2m

DIFFUSION = GaussianDiffusion.from_schedule("linear", 50, beta_end=0.2, clip_denoised=False)
MODEL = GaussianModel(DIFFUSION)
SHAPE = (3, 2, 5, 7)
IMAGE = randn(SHAPE, 1).clamp(-1, 1)
LEFT = (torch.arange(7) < 3).float()


def column(table: StepTable, name: str) -> torch.Tensor:
    return table.rows[:, ROW.index(name)]


# --- inpainting -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_what_is_known_comes_back_to_the_bit(sampler: str, backend: str) -> None:
    options: dict[str, Any] = {"sampler": sampler, "jump_n_sample": 1, "backend": backend}
    drawn = inpaint(MODEL, IMAGE, LEFT, diffusion=DIFFUSION, num_steps=10, seed=0, **options)
    assert torch.equal(drawn[..., :3], IMAGE[..., :3])
    assert not torch.isclose(drawn[..., 3:], IMAGE[..., 3:], atol=1e-3).all()


def test_a_mask_of_nothing_samples(backend: str) -> None:
    options: dict[str, Any] = {"diffusion": DIFFUSION, "seed": 4, "backend": backend}
    nothing = torch.zeros(1)
    drawn = inpaint(MODEL, IMAGE, nothing, jump_n_sample=1, **options)
    assert torch.equal(drawn, sample(MODEL, SHAPE, **options))


def test_the_network_sees_what_is_known_at_its_noise_level(backend: str) -> None:
    """At each step the known part is q(x_t | x_0) of what is known: Lugmayr et al. 2022, eq. 8a."""
    shape, seen = (64, 1, 8, 8), []
    known = torch.full(shape, 0.5)

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((int(t[0]), x.clone()))
        return MODEL(x, t)

    options: dict[str, Any] = {"jump_length": 5, "jump_n_sample": 3, "backend": backend}
    inpaint(model, known, torch.ones(1), diffusion=DIFFUSION, num_steps=20, seed=1, **options)
    assert len(seen) > 20
    for t, x in seen[1:]:  # the first is x_T
        signal = DIFFUSION.sqrt_alphas_cumprod[t]
        noise = (x - signal * 0.5) / DIFFUSION.sqrt_one_minus_alphas_cumprod[t]
        assert abs(float(noise.mean())) < 0.08 and abs(float(noise.std()) - 1) < 0.06


def test_soft_masks_blend_at_the_last_step(backend: str) -> None:
    half = torch.full((1,), 0.5)
    drawn = inpaint(MODEL, IMAGE, half, diffusion=DIFFUSION, num_steps=1, seed=0, backend=backend)
    alone = sample(MODEL, SHAPE, diffusion=DIFFUSION, num_steps=1, seed=0, backend=backend)
    torch.testing.assert_close(drawn, (alone + IMAGE) / 2)


def by_the_papers_schedule(steps: int, length: int, times: int) -> list[int]:
    """How many steps are left, over time; from the pseudo-code of Lugmayr et al., appendix B."""
    jumps = dict.fromkeys(range(0, steps - length, length), times - 1)
    t, levels = steps, [steps]
    while t >= 1:
        t -= 1
        levels.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(length):
                t += 1
                levels.append(t)
    return [*levels, -1]


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 4))
def test_resampling_takes_the_steps_of_the_paper(steps: int, length: int, times: int) -> None:
    """diffusers#12588: with any spacing, a jump leads to a timestep that the chain visits."""
    table = ddpm(DIFFUSION, steps)
    levels = by_the_papers_schedule(steps, length, times)[1:]  # theirs starts above the first
    asked = [table.timesteps[steps - 1 - a] for a, b in itertools.pairwise(levels) if b < a]
    found = resampled(table, DIFFUSION, jump_length=length, jump_n_sample=times)
    assert list(found.timesteps) == asked


@given(st.integers(12, 50), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 5))
def test_a_jump_is_a_step_and_a_diffusion(steps: int, eta: float, length: int) -> None:
    """The folded row is the step's Gaussian, diffused from its abar to the one jumped to."""
    plain = ddim(DIFFUSION, steps, eta=eta)
    table = resampled(plain, DIFFUSION, jump_length=length, jump_n_sample=2)
    jumps = [
        (i, plain.timesteps.index(t), u)
        for i, (t, u) in enumerate(itertools.pairwise(table.timesteps))
        if u >= t
    ]
    assert len(jumps) == len(range(0, steps - length, length))
    for i, row, target in jumps:
        reached = DIFFUSION.alphas_cumprod[plain.timesteps[row + 1]]
        ratio = DIFFUSION.alphas_cumprod[target] / reached
        for name in ("mean_from_x0", "mean_from_xt"):
            expected = ratio.sqrt() * column(plain, name)[row]
            torch.testing.assert_close(column(table, name)[i], expected)
        variance = ratio * column(plain, "sigma")[row] ** 2 + 1 - ratio
        torch.testing.assert_close(column(table, "sigma")[i], variance.sqrt())


def test_a_learned_variance_is_folded_at_its_lower_end() -> None:
    learned = GaussianDiffusion(variance_type="learned_range")
    plain, fixed = ddpm(learned, 50), ddpm(GaussianDiffusion(variance_type="fixed_small"), 50)
    table = resampled(plain, learned)
    expected = resampled(fixed, GaussianDiffusion())
    jumps = torch.tensor([b > a for a, b in itertools.pairwise([*table.timesteps, -1])])
    low, high = column(table, "min_log_variance"), column(table, "max_log_variance")
    stddev = column(table, "sigma") * (low / 2).exp()
    torch.testing.assert_close(stddev[jumps], column(expected, "sigma")[jumps])
    assert torch.equal(low[jumps], high[jumps]) and not torch.equal(low[~jumps], high[~jumps])


def test_a_step_taken_again_draws_other_noise() -> None:
    table = resampled(ddpm(DIFFUSION, 50), DIFFUSION, jump_length=5, jump_n_sample=4)
    keys = list(zip(table.timesteps, column(table, "stream").tolist(), strict=True))
    assert len(set(keys)) == len(keys) > 50
    assert column(table, "stream").min() == ops.STREAMS["reverse"]


def test_resampling_makes_the_parts_agree() -> None:
    """With jumps, pixels that the data ties to known ones come closer to them."""

    class TiedPixels(torch.nn.Module):
        """All pixels of a picture are one number, N(0, 1): E[x_0 | x_t] from their mean."""

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            abar = DIFFUSION.alphas_cumprod[t].reshape(-1, 1, 1, 1).to(x)
            pixels = x[0].numel()
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            x_start = abar.sqrt() * mean / (abar + (1 - abar) / pixels)
            return (x - abar.sqrt() * x_start) / (1 - abar).sqrt()

    known = randn((200, 1, 1, 1), 5).expand(200, 1, 1, 4).contiguous()
    mask = torch.tensor([1.0, 0.0, 0.0, 0.0])
    errors = [
        float(
            (inpaint(TiedPixels(), known, mask, diffusion=DIFFUSION, seed=0, jump_n_sample=n))
            .sub(known)[..., 1:]
            .square()
            .mean()
        )
        for n in (1, 10)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"jump_length": 0}, "jump_length and jump_n_sample must be at least 1; got 0, 10"),
        ({"jump_n_sample": 0}, "jump_length and jump_n_sample must be at least 1; got 10, 0"),
        ({"sampler": "dpmpp_2m"}, "a sampler that reads its history cannot jump back"),
        ({"mask": torch.ones(4)}, r"mask must broadcast to shape \[3, 2, 5, 7\]; got \[4\]"),
        ({"mask": torch.full((1,), 1.5)}, r"mask must lie in \[0, 1\]"),
        ({"mask": torch.full((1,), torch.nan)}, r"mask must lie in \[0, 1\]"),
        (
            {"image": torch.ones(SHAPE, dtype=torch.uint8)},
            r"known must hold floating-point numbers; got torch.uint8",
        ),
    ],
)
def test_bad_inpainting_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        inpaint(MODEL, **{"image": IMAGE, "mask": LEFT, "diffusion": DIFFUSION} | options)


@pytest.mark.parametrize(
    "table", [resampled(ddpm(DIFFUSION), DIFFUSION), ddim_inversion(DIFFUSION)]
)
def test_a_table_that_goes_back_cannot_be_resampled(table: StepTable) -> None:
    """Steps of one timestep would draw the same noise."""
    with pytest.raises(ValueError, match="only a table whose timesteps decrease can be resampled"):
        resampled(table, DIFFUSION)


def test_a_learned_log_variance_cannot_be_resampled() -> None:
    learned = GaussianDiffusion(variance_type="learned")
    with pytest.raises(ValueError, match="a learned variance cannot be resampled"):
        resampled(ddpm(learned, 50), learned)


@pytest.mark.parametrize("name", ["known", "mask"])
def test_known_and_mask_go_together(name: str) -> None:
    with pytest.raises(ValueError, match="known and mask must be given together"):
        sample(MODEL, SHAPE, diffusion=DIFFUSION, **{name: IMAGE})


# --- image to image ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_image_to_image_takes_the_last_steps(sampler: str, backend: str) -> None:
    asked = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t[0]))
        return MODEL(x, t)

    options: dict[str, Any] = {"diffusion": DIFFUSION, "sampler": sampler, "backend": backend}
    drawn = image_to_image(model, IMAGE, strength=0.4, num_steps=10, seed=3, **options)
    assert asked == [19, 14, 9, 4] and drawn.shape == IMAGE.shape

    start, _ = DIFFUSION.q_sample(IMAGE, torch.tensor(19), seed=3)
    spacing = [19, 14, 9, 4]
    options |= {"timestep_spacing": spacing, "x_T": start}
    torch.testing.assert_close(drawn, sample(MODEL, SHAPE, seed=3, **options))


def test_more_strength_goes_further() -> None:
    """Towards the data of the model, away from the picture."""
    picture = torch.full((16, 1, 8, 8), -0.9)
    means = [
        float(image_to_image(MODEL, picture, strength=s, diffusion=DIFFUSION, seed=0).mean())
        for s in (0.02, 0.3, 1.0)
    ]
    assert means[0] < -0.8 and means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(MODEL.mean, abs=0.05)


def test_image_to_image_is_independent_of_its_batch(backend: str) -> None:
    options: dict[str, Any] = {"diffusion": DIFFUSION, "seed": 9, "backend": backend}
    whole = image_to_image(MODEL, IMAGE, first_index=5, **options)
    assert torch.equal(image_to_image(MODEL, IMAGE[1:2], first_index=6, **options), whole[1:2])


def test_image_to_image_with_a_generator_repeats(backend: str) -> None:
    a, b = (
        image_to_image(
            MODEL,
            IMAGE,
            diffusion=DIFFUSION,
            generator=torch.Generator().manual_seed(2),
            backend=backend,
        )
        for _ in range(2)
    )
    assert torch.equal(a, b)


def test_what_is_settled_cannot_be_given(backend: str) -> None:
    """It would have been dropped without a word."""
    options: dict[str, Any] = {"diffusion": DIFFUSION, "backend": backend}
    with pytest.raises(TypeError, match="x_T"):
        image_to_image(MODEL, IMAGE, x_T=IMAGE, **options)
    with pytest.raises(TypeError, match="known"):
        inpaint(MODEL, IMAGE, LEFT, known=IMAGE, **options)


def test_the_start_is_of_the_backend_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    q_sample = GaussianDiffusion.q_sample

    def spy(*args: Any, backend: str, **options: Any) -> Any:
        asked.append(backend)
        return q_sample(*args, backend=backend, **options)

    monkeypatch.setattr(GaussianDiffusion, "q_sample", spy)
    for options in ({"seed": 0}, {"generator": torch.Generator().manual_seed(0)}):
        image_to_image(MODEL, IMAGE, diffusion=DIFFUSION, backend="reference", **options)
    assert asked == ["reference", "reference"]


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_strength_is_checked(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\]"):
        image_to_image(MODEL, IMAGE, strength=strength, diffusion=DIFFUSION)


@pytest.mark.parametrize("percent", range(1, 101))
def test_strength_is_the_part_of_the_steps(percent: int) -> None:
    """0.29 of 100 steps is 29, though 0.29 * 100 is less in binary."""
    taken = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        taken.append(t)
        return x

    options: dict[str, Any] = {"num_steps": 100, "seed": 0, "diffusion": GaussianDiffusion()}
    image_to_image(network, IMAGE[:1, :1, :1], strength=percent / 100, **options)
    assert len(taken) == percent


def test_any_layout_of_a_picture_will_do(backend: str) -> None:
    options: dict[str, Any] = {"diffusion": DIFFUSION, "seed": 0, "backend": backend}
    turned = IMAGE.transpose(-1, -2)
    expected = image_to_image(MODEL, turned.contiguous(), **options)
    assert torch.equal(image_to_image(MODEL, turned, **options), expected)


def test_strength_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="strength 0.05 of 10 steps is less than one"):
        image_to_image(MODEL, IMAGE, strength=0.05, num_steps=10, diffusion=DIFFUSION)


@given(st.integers(1, 50), st.data())
def test_a_tail_starts_without_history(steps: int, data: st.DataObject) -> None:
    """The same rows as of the chain of its timesteps alone."""
    table = dpmpp_2m(DIFFUSION, steps)
    start = data.draw(st.integers(0, steps - 1))
    tail, alone = table.tail(start), dpmpp_2m(DIFFUSION, timestep_spacing=table.timesteps[start:])
    assert tail.timesteps == alone.timesteps
    torch.testing.assert_close(tail.rows, alone.rows)


# --- inversion and interpolation --------------------------------------------------------------


def test_inversion_finds_the_noise_of_a_picture(backend: str) -> None:
    """There and back again; the error is of the first order in the number of steps."""
    diffusion = GaussianDiffusion(clip_denoised=False)
    model, picture = GaussianModel(diffusion), 0.3 + 0.2 * randn(SHAPE, 2)
    errors = []
    for steps in (20, 200):
        options: dict[str, Any] = {"diffusion": diffusion, "num_steps": steps, "backend": backend}
        noise = invert(model, picture, **options)
        again = sample(model, SHAPE, sampler="ddim", x_T=noise, **options)
        errors.append(float((again - picture).abs().max()))
    assert errors[1] < 0.05 and 5 < errors[0] / errors[1] < 20
    assert abs(float(noise.mean())) < 0.25 and abs(float(noise.std()) - 1) < 0.2


def test_interpolation_begins_and_ends_at_the_samples(backend: str) -> None:
    options: dict[str, Any] = {"diffusion": DIFFUSION, "num_steps": 10, "backend": backend}
    noise = initial_noise(SHAPE, seed=7)
    between = interpolate(MODEL, noise[0], noise[2], 5, **options)
    ends = sample(MODEL, SHAPE, sampler="ddim", seed=7, **options)
    torch.testing.assert_close(between[[0, -1]], ends[[0, 2]], rtol=0, atol=1e-5)
    steps = (between[1:] - between[:-1]).flatten(1).norm(dim=1)
    assert float(steps.max()) < 1.5 * float(steps.min())


def test_an_inversion_draws_nothing() -> None:
    before = torch.get_rng_state()
    invert(MODEL, IMAGE, diffusion=DIFFUSION, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("second", [torch.zeros(4), -torch.ones(4)], ids=["zero", "opposite"])
def test_ends_that_no_arc_joins_are_refused(second: torch.Tensor) -> None:
    sentence = "first and second must not be zero, nor opposite: no one arc joins these"
    for pair in ((torch.ones(4), second), (second, torch.ones(4))):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            slerp(*pair, [0.5])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: inpaint(MODEL, x, torch.ones(1)), "image must be a tensor; got ndarray"),
        (lambda x: image_to_image(MODEL, x), "image must be a tensor; got ndarray"),
        (lambda x: invert(MODEL, x), "image must be a tensor; got ndarray"),
        (lambda x: inpaint(MODEL, IMAGE, x), "mask must be a tensor; got ndarray"),
        (lambda x: sample(MODEL, SHAPE, x_T=x), "x_T must be a tensor; got ndarray"),
    ],
)
def test_only_tensors_are_edited(call: Any, sentence: str) -> None:
    with pytest.raises(TypeError) as error:
        call(IMAGE.numpy())
    assert str(error.value) == sentence


@pytest.mark.parametrize("shape", [(), (3,), (-1, 2)])
def test_the_shape_of_noise_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^shape must be \(N, C, ...\), each at least 1; got"):
        initial_noise(shape, seed=0)


@given(st.floats(0, 1), st.integers(0, 100))
def test_an_arc_keeps_the_length(weight: float, seed: int) -> None:
    a, b = randn((2, 30), seed, torch.float64)
    b = b * a.norm() / b.norm()
    (point,) = slerp(a, b, [weight])
    torch.testing.assert_close(point.norm(), a.norm())


def test_an_arc_between_equal_ends_stays_there() -> None:
    a = randn((30,), 1)
    torch.testing.assert_close(slerp(a, a, [0.0, 0.4, 1.0]), a.expand(3, 30))


@pytest.mark.parametrize("first", [-1, 2**48 - 2])
def test_noise_is_of_samples_that_have_an_index(first: int) -> None:
    with pytest.raises(
        ValueError, match=rf"first_index must lie in \[0, 2\*\*48 - 3\]; got {first}"
    ):
        initial_noise(SHAPE, seed=0, first_index=first)


def test_ends_of_an_interpolation_are_checked() -> None:
    with pytest.raises(ValueError, match="num must be at least 2; got 1"):
        interpolate(MODEL, IMAGE[0], IMAGE[1], 1)
    with pytest.raises(ValueError, match=r"must have one shape; got \[2, 5, 7\] and \[5, 7\]"):
        interpolate(MODEL, IMAGE[0], IMAGE[0, 0], 3)

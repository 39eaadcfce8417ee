"""Betas and respacing against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_fast.schedules import (
    BETA_SCHEDULES,
    TIMESTEP_SPACINGS,
    named_betas,
    rescale_zero_terminal_snr,
    respace,
)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_betas_rise_within_their_range(name: str, num_timesteps: int) -> None:
    betas = named_betas(name, num_timesteps)
    assert betas.dtype == torch.float64 and betas.shape == (num_timesteps,)
    assert ((betas > 0) & (betas < 1)).all() and (betas.diff() >= 0).all()


def test_linear_is_that_of_the_paper() -> None:
    betas = named_betas("linear", 1000)
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    torch.testing.assert_close(betas.diff(), torch.full((999,), 0.0199 / 999, dtype=torch.float64))


def test_scaled_linear_is_linear_in_the_root() -> None:
    steps = named_betas("scaled_linear", 100, beta_start=0.00085, beta_end=0.012).sqrt().diff()
    torch.testing.assert_close(steps, steps[:1].expand(99))


def test_cosine_follows_its_alphas_cumprod() -> None:
    """Nichol & Dhariwal 2021, eq. 17, wherever the cap on beta does not act."""
    betas = named_betas("squaredcos_cap_v2", 1000)
    abar = torch.cumprod(1 - betas, 0)
    for t in (0, 100, 500, 900):
        f = [math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in (t + 1, 0)]
        assert float(abar[t]) == pytest.approx(f[0] / f[1], rel=1e-12)
    assert betas[-1] == 0.999


def test_sigmoid_is_symmetric_about_its_middle() -> None:
    betas = named_betas("sigmoid", 101, beta_start=0.1, beta_end=0.3)
    torch.testing.assert_close(betas + betas.flip(0), torch.full_like(betas, 0.4))
    assert float(betas[0]) == pytest.approx(0.1 + 0.2 / (1 + math.exp(6)))


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [2, 10, 1000])
def test_zero_terminal_snr(name: str, num_timesteps: int) -> None:
    """Lin et al. 2023, section 3.1: sqrt(abar) keeps its start and its shape, and ends at 0."""
    betas = named_betas(name, num_timesteps)
    rescaled = rescale_zero_terminal_snr(betas)
    assert rescaled.dtype == torch.float64 and ((rescaled > 0) & (rescaled <= 1)).all()
    before, after = (torch.cumprod(1 - b, 0).sqrt() for b in (betas, rescaled))
    assert rescaled[-1] == 1 and after[-1] == 0
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-14)
    shape = [(x - x[-1]) / (x[0] - x[-1]) for x in (before, after)]
    torch.testing.assert_close(shape[1], shape[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "betas", [[], [0.1], [0.1, 1.0], [0.0, 0.1], [0.1, math.nan], [[0.1, 0.2]]], ids=str
)
def test_what_has_no_zero_terminal_snr(betas: list[float]) -> None:
    sentence = "only two betas or more, each in (0, 1), rescale to zero terminal SNR"
    with pytest.raises(ValueError) as error:
        rescale_zero_terminal_snr(torch.tensor(betas))
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"beta_schedule": "cosine"},
            "beta_schedule must be one of linear, scaled_linear, squaredcos_cap_v2, sigmoid; "
            "got 'cosine'",
        ),
        ({"num_timesteps": 0}, "num_timesteps must be at least 1; got 0"),
        (
            {"beta_end": math.nan},
            "betas must satisfy 0 < beta_start <= beta_end < 1; "
            "got beta_start=0.0001 and beta_end=nan",
        ),
        (
            {"beta_start": 0.5, "beta_end": 0.1},
            "betas must satisfy 0 < beta_start <= beta_end < 1; "
            "got beta_start=0.5 and beta_end=0.1",
        ),
    ],
)
def test_bad_schedules(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        named_betas(**{"beta_schedule": "linear", "num_timesteps": 10, **arguments})
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("linspace", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ],
)
def test_ten_of_a_thousand(spacing: str, timesteps: list[int]) -> None:
    """Lin et al. 2023, table 2."""
    assert respace(1000, 10, spacing) == timesteps


@given(st.integers(1, 1500), st.data(), st.sampled_from(TIMESTEP_SPACINGS))
def test_any_number_of_steps(num_timesteps: int, data: st.DataObject, spacing: str) -> None:
    """As many timesteps as asked for, each once, in range, with the spacing's end in place."""
    steps = data.draw(st.integers(1, num_timesteps))
    timesteps = respace(num_timesteps, steps, spacing)
    assert len(timesteps) == steps
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] < num_timesteps and timesteps[-1] >= 0
    if spacing == "leading" or (spacing == "linspace" and steps > 1):
        assert timesteps[-1] == 0
    if spacing != "leading":
        assert timesteps[0] == num_timesteps - 1
    assert respace(num_timesteps, None, spacing) == list(range(num_timesteps))[::-1]


def test_a_list_is_taken_as_it_is() -> None:
    assert respace(1000, None, [999, 500, 3]) == [999, 500, 3]
    assert respace(1000, 3, (999, 500, 3)) == [999, 500, 3]


def test_timesteps_are_integers() -> None:
    assert respace(10, None, np.array([9, 5], dtype=np.uint8)) == [9, 5]
    assert respace(10, None, torch.tensor([9, 5])) == [9, 5]
    with pytest.raises(TypeError):
        respace(10, None, [9.0, 5.5])


@pytest.mark.parametrize(
    ("num_steps", "spacing", "sentence"),
    [
        (0, "leading", "num_steps must lie in [1, 10]; got 0"),
        (11, "trailing", "num_steps must lie in [1, 10]; got 11"),
        (
            5,
            "quad",
            "timestep_spacing must be one of leading, linspace, trailing or a list; got 'quad'",
        ),
        (
            None,
            [],
            "a list of timesteps must be strictly decreasing and lie in [0, 9]; got []",
        ),
        (
            None,
            [3, 3],
            "a list of timesteps must be strictly decreasing and lie in [0, 9]; got [3, 3]",
        ),
        (
            None,
            [10, 1],
            "a list of timesteps must be strictly decreasing and lie in [0, 9]; got [10, 1]",
        ),
        (3, [5, 1], "num_steps is 3, but 2 timesteps were given"),
    ],
)
def test_bad_spacings(num_steps: int | None, spacing: str | list[int], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        respace(10, num_steps, spacing)
    assert str(error.value) == sentence

"""Moments of a run: which are kept, what they hold, and runs that a callback stops."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from cases import GaussianModel
from ddpm_fast import (
    GaussianDiffusion,
    Intermediates,
    Sampler,
    sample,
    sample_progressive,
)
from ddpm_fast.editing import initial_noise
from ddpm_fast.intermediates import checked_moments
from ddpm_fast.options import CallOptions, SampleOptions
from ddpm_fast.solvers import SAMPLERS, ddim_inversion

SHAPE = (3, 2, 5, 7)
DIFFUSION = GaussianDiffusion.from_schedule("linear", 20, beta_end=0.3)
MODEL = GaussianModel(DIFFUSION)


def draw(asked: Any, **options: Any) -> tuple[torch.Tensor, Intermediates]:
    options = {"diffusion": DIFFUSION, "seed": 0} | options
    return sample(MODEL, SHAPE, return_intermediates=asked, **options)


# --- which moments ----------------------------------------------------------------------------


@given(st.data())
def test_a_number_of_moments_is_spread_evenly_over_the_run(data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, 4000))
    count = data.draw(st.integers(2, num_steps + 1))
    moments = checked_moments(count, num_steps)
    assert len(moments) == count
    assert (moments[0], moments[-1]) == (0, num_steps)
    apart = [b - a for a, b in pairwise(moments)]
    assert min(apart) >= 1 and max(apart) - min(apart) <= 2
    for i, moment in enumerate(moments):
        assert abs(moment * (count - 1) - i * num_steps) <= (count - 1) / 2


@pytest.mark.parametrize(
    ("asked", "moments"),
    [
        (2, (0, 20)),
        (3, (0, 10, 20)),
        (21, tuple(range(21))),
        (np.int64(3), (0, 10, 20)),
        (torch.tensor(3), (0, 10, 20)),
        ([7], (7,)),
        ([0, 19, 20], (0, 19, 20)),
        (range(5, 8), (5, 6, 7)),
        ((np.int64(0), torch.tensor(20)), (0, 20)),
    ],
)
def test_moments_are_numbered_in_steps_taken(asked: Any, moments: tuple[int, ...]) -> None:
    images, kept = draw(asked)
    timesteps = (*range(19, -1, -1), -1)
    assert kept.steps == moments
    assert kept.timesteps == tuple(timesteps[moment] for moment in moments)
    assert images.shape == SHAPE
    assert kept.x_t.shape == kept.pred_xstart.shape == (len(moments), *SHAPE)


WANTED = "be a number of moments in [2, 21], or a list of them"
LISTED = "list moments in [0, 20], each above the one before"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (1, f"{WANTED}; got 1"),
        (22, f"{WANTED}; got 22"),
        (-3, f"{WANTED}; got -3"),
        (True, f"{WANTED}; got True"),
        ([], f"{LISTED}; got []"),
        ([0, 21], f"{LISTED}; got [0, 21]"),
        ([-1, 20], f"{LISTED}; got [-1, 20]"),
        ([3, 3], f"{LISTED}; got [3, 3]"),
        ([4, 3], f"{LISTED}; got [4, 3]"),
    ],
    ids=str,
)
def test_moments_that_a_run_does_not_have_are_refused(asked: Any, sentence: str) -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        pytest.fail("refused before any work")

    with pytest.raises(ValueError) as error:
        sample(model, SHAPE, diffusion=DIFFUSION, return_intermediates=asked)
    assert str(error.value) == f"return_intermediates must {sentence}"


@pytest.mark.parametrize("asked", [0.5, "all", [0.0, 1.0], np.arange(3)])
def test_moments_are_integers(asked: Any) -> None:
    with pytest.raises(TypeError):
        draw(asked)


# --- what they hold ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_moments_are_the_states_that_the_run_passes_through(sampler: str, backend: str) -> None:
    """And asking for them changes no picture."""
    options: dict[str, Any] = {"sampler": sampler, "backend": backend}
    images, kept = draw(range(21), **options)
    assert torch.equal(images, sample(MODEL, SHAPE, diffusion=DIFFUSION, seed=0, **options))
    torch.testing.assert_close(kept.x_t[0], initial_noise(SHAPE, seed=0))
    assert torch.equal(kept.x_t[-1], images)
    steps = sample_progressive(MODEL, SHAPE, diffusion=DIFFUSION, seed=0, **options)
    for step, x, pred_xstart in steps:
        assert torch.equal(kept.x_t[step + 1], x)
        assert torch.equal(kept.pred_xstart[step], pred_xstart)
    assert torch.equal(kept.pred_xstart[20], kept.pred_xstart[19])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_prediction_is_that_of_its_state(sampler: str, backend: str) -> None:
    """pred_xstart[k] is the clamped x_start that the network sees in x_t[k] at timesteps[k]."""
    _, kept = draw([0, 7, 19], sampler=sampler, backend=backend)
    for t, x_t, pred_xstart in zip(kept.timesteps, kept.x_t, kept.pred_xstart, strict=True):
        at = torch.full((len(x_t),), t)
        expected = DIFFUSION.predict_xstart(x_t, at, MODEL(x_t, at)).clamp(-1, 1)
        torch.testing.assert_close(pred_xstart, expected, rtol=0, atol=1e-5)


def test_moments_are_a_part_of_all_moments(device: torch.device, backend: str) -> None:
    options: dict[str, Any] = {"device": device, "backend": backend}
    _, every = draw(21, **options)
    _, some = draw([0, 3, 4, 20], **options)
    for kept, whole in ((some.x_t, every.x_t), (some.pred_xstart, every.pred_xstart)):
        assert torch.equal(kept, whole[[0, 3, 4, 20]])


def test_memory_is_that_of_the_moments_and_the_callers_own() -> None:
    sampler = Sampler(MODEL, SHAPE, diffusion=DIFFUSION)
    _, kept = sampler(seed=0, return_intermediates=5)
    before = kept.x_t.clone()
    for tensor in (kept.x_t, kept.pred_xstart):
        assert tensor.untyped_storage().nbytes() == 5 * 4 * np.prod(SHAPE)
        assert not tensor.requires_grad and not tensor.is_inference()
    sampler(seed=1, return_intermediates=5)
    assert torch.equal(kept.x_t, before)


def test_none_gives_the_samples_alone() -> None:
    images = sample(MODEL, SHAPE, diffusion=DIFFUSION, seed=0, return_intermediates=None)
    assert isinstance(images, torch.Tensor)


def test_a_run_backwards_ends_where_no_network_is_asked() -> None:
    table = ddim_inversion(DIFFUSION, 4)
    noise, kept = draw(5, sampler=table, x_T=torch.zeros(SHAPE))
    assert kept.timesteps == (*table.timesteps, -1)
    assert torch.equal(kept.x_t[0], torch.zeros(SHAPE)) and torch.equal(kept.x_t[-1], noise)


def test_captions() -> None:
    _, kept = draw(3, num_steps=4)
    assert kept.captions() == ["t = 19", "t = 9", "sample"]


# --- callbacks that stop the run ----------------------------------------------------------------


def stop_after(last: int) -> Any:
    return lambda step, t, x, pred_xstart: step == last


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("last", [0, 6, 19])
def test_true_stops_the_run_and_gives_the_state_reached(
    sampler: str, last: int, backend: str
) -> None:
    options: dict[str, Any] = {
        "diffusion": DIFFUSION,
        "seed": 0,
        "sampler": sampler,
        "backend": backend,
    }
    states = [x for _, x, _ in sample_progressive(MODEL, SHAPE, **options)]
    asked: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t[0]))
        return MODEL(x, t)

    x = sample(model, SHAPE, callback=stop_after(last), **options)
    assert torch.equal(x, states[last])
    assert asked == list(range(19, 18 - last, -1))


@pytest.mark.parametrize("answer", [None, False, 1, "stop", np.True_, torch.tensor(True)])
def test_nothing_but_true_stops_it(answer: Any) -> None:
    x = sample(MODEL, SHAPE, diffusion=DIFFUSION, seed=0, callback=lambda *_: answer)
    assert torch.equal(x, sample(MODEL, SHAPE, diffusion=DIFFUSION, seed=0))


def test_a_callback_sees_what_it_stops_at(backend: str) -> None:
    """Such as a threshold: the run ends at the first state that is close to its prediction."""
    seen: list[tuple[int, int, float]] = []

    def close(step: int, t: int, x: torch.Tensor, pred_xstart: torch.Tensor) -> bool:
        seen.append((step, t, float((x - pred_xstart).abs().mean())))
        return seen[-1][2] < 0.2

    x = sample(MODEL, SHAPE, diffusion=DIFFUSION, seed=0, backend=backend, callback=close)
    distances = [distance for _, _, distance in seen]
    assert 1 < len(seen) < 20
    assert [(step, t) for step, t, _ in seen] == [(i, 19 - i) for i in range(len(seen))]
    assert min(distances[:-1]) >= 0.2 > distances[-1]
    assert x.shape == SHAPE


def test_a_stopped_run_leaves_all_as_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    """The bar is closed, the model in its own mode, and the sampler ready for the next batch."""
    model = GaussianModel(DIFFUSION).train()
    sampler = Sampler(model, SHAPE, diffusion=DIFFUSION)
    sampler(seed=0, progress=True, callback=stop_after(2))
    assert "3/20" in (bar := capsys.readouterr().err) and bar.endswith("\n")
    assert not tqdm._instances  # type: ignore[attr-defined]
    assert model.training
    assert torch.equal(sampler(seed=1), sample(model, SHAPE, diffusion=DIFFUSION, seed=1))


@pytest.mark.parametrize(("last", "steps"), [(0, (0,)), (9, (0, 5)), (10, (0, 5, 10)), (19, None)])
def test_a_stopped_run_has_the_moments_before_its_end(
    last: int, steps: tuple[int, ...] | None, backend: str
) -> None:
    options: dict[str, Any] = {"backend": backend}
    _, whole = draw(5, **options)
    steps = whole.steps if steps is None else steps
    x, kept = draw(5, callback=stop_after(last), **options)
    assert kept.steps == steps and kept.timesteps == whole.timesteps[: len(steps)]
    assert torch.equal(kept.x_t, whole.x_t[: len(steps)])
    assert torch.equal(kept.pred_xstart, whole.pred_xstart[: len(steps)])
    _, every = draw(21, **options)
    assert torch.equal(x, every.x_t[last + 1])


# --- types --------------------------------------------------------------------------------------


def test_the_overloads_know_all_options_of_sample() -> None:
    hints, call_hints = get_type_hints(sample), get_type_hints(Sampler.__call__)
    assert get_type_hints(SampleOptions) == {
        name: hints[name]
        for name in signature(sample).parameters
        if name not in ("model", "shape", "return_intermediates")
    }
    assert get_type_hints(CallOptions) == {
        name: call_hints[name]
        for name in signature(Sampler.__call__).parameters
        if name not in ("self", "return_intermediates")
    }


TYPED = """
import torch
from torch import Tensor
from typing_extensions import assert_type
from ddpm_fast import Intermediates, Sampler, sample

def model(x: Tensor, t: Tensor) -> Tensor:
    return x

def draw(asked: int | None) -> None:
    shape, run = (1, 1, 4, 4), Sampler(model, (1, 1, 4, 4))
    assert_type(sample(model, shape, seed=0), Tensor)
    assert_type(run(seed=0), Tensor)
    assert_type(sample(model, shape, return_intermediates=3), tuple[Tensor, Intermediates])
    assert_type(run(return_intermediates=[0, 1]), tuple[Tensor, Intermediates])
    assert_type(run(return_intermediates=asked), Tensor | tuple[Tensor, Intermediates])
    sample(model, shape, sede=0)  # type: ignore[call-overload]
"""


@pytest.mark.slow
def test_type_checkers_know_what_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "typed.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "typed.py")]
    root = Path(__file__).parent.parent
    told = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert told.returncode == 0, told.stdout

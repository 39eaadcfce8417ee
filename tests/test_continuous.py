"""Continuous batching: a request's picture is its own, whoever comes and goes beside it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cases import GaussianModel
from ddpm_fast import GaussianDiffusion, ops, sample
from ddpm_fast.continuous import ContinuousSampler

SHAPE = (2, 5, 7)
DIFFUSION = GaussianDiffusion.from_schedule("linear", 20, beta_end=0.3)
MODEL = GaussianModel(DIFFUSION)
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")


class LabelledModel(nn.Module):
    """Every pixel of x_start is a tenth of the label, for predictions of x_start."""

    num_classes = 10

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        colour = 0.1 * class_labels.to(x.dtype) + 0.001 * t.to(x.dtype)
        return colour.reshape(-1, *[1] * (x.dim() - 1)) + 0.1 * x.mean(dim=1, keepdim=True) * x


LABELLED = GaussianDiffusion.from_schedule("linear", 20, prediction_type="sample")

requests = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "index": st.integers(0, 2**48 - 1),
        "sampler": st.sampled_from(SAMPLERS),
        "num_steps": st.integers(1, 20),
    }
)


def alone(model: Any, request: dict[str, Any], **options: Any) -> torch.Tensor:
    """The request's sample, drawn by itself."""
    options |= request
    options["first_index"] = options.pop("index")
    return sample(model, (1, *SHAPE), **options)[0]


@given(st.lists(st.tuples(requests, st.integers(0, 4)), min_size=1, max_size=8), st.integers(1, 4))
def test_a_picture_is_its_own(arrivals: list[tuple[dict[str, Any], int]], max_batch: int) -> None:
    """Requests come at random moments and leave when they are done: the same bytes as alone."""
    sampler = ContinuousSampler(MODEL, SHAPE, max_batch=max_batch, diffusion=DIFFUSION)
    asked, finished = {}, {}
    for request, steps_before_the_next in arrivals:
        asked[sampler.submit(**request)] = request
        for _ in range(steps_before_the_next):
            finished |= sampler.step()
    finished |= dict(sampler.run())
    assert finished.keys() == asked.keys() and len(sampler) == 0
    for ticket, request in asked.items():
        assert torch.equal(finished[ticket], alone(MODEL, request, diffusion=DIFFUSION))


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}])
def test_guided_requests_have_a_label_and_a_scale_each(
    options: dict[str, Any], device: torch.device, backend: str
) -> None:
    options = {"diffusion": LABELLED, "device": device, "backend": backend, **options}
    model = LabelledModel().double()
    sampler = ContinuousSampler(model, SHAPE, max_batch=3, guided=True, **options)
    asked = {}
    for number, scale in enumerate((1.0, 3.0, 0.0, 2.0, -1.0)):
        request: dict[str, Any] = {"seed": 5, "index": number, "num_steps": 4 + number}
        ticket = sampler.submit(**request, class_label=number, guidance_scale=scale)
        asked[ticket] = request | {"class_labels": number, "guidance_scale": scale}
        sampler.step()
    for ticket, picture in sampler.run():
        assert torch.equal(picture, alone(model, asked[ticket], **options))


@pytest.mark.parametrize("variance_type", [None, "learned_range"])
def test_thresholds_and_variances_are_a_samples_own(
    variance_type: str | None, backend: str
) -> None:
    diffusion = GaussianDiffusion(dynamic_thresholding_ratio=0.9, variance_type=variance_type)

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = x + t.reshape(-1, 1, 1, 1) / 1000
        return torch.cat([output, output.tanh()], dim=1) if variance_type else output

    options: dict[str, Any] = {"diffusion": diffusion, "backend": backend}
    sampler = ContinuousSampler(model, SHAPE, max_batch=2, **options)
    asked = {}
    for number in range(4):
        request = {"seed": 5, "index": number, "num_steps": 3 + number}
        asked[sampler.submit(**request)] = request
    for ticket, picture in sampler.run():
        assert torch.equal(picture, alone(model, asked[ticket], **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_models_dtype(dtype: torch.dtype, backend: str) -> None:
    model = LabelledModel()
    model.register_parameter("weight", nn.Parameter(torch.ones(1, dtype=dtype)))
    options: dict[str, Any] = {"diffusion": LABELLED, "backend": backend}
    sampler = ContinuousSampler(model, SHAPE, max_batch=2, **options)
    for number in range(3):
        sampler.submit(seed=1, index=number, num_steps=5, class_label=4)
    for ticket, picture in sampler.run():
        request = {"seed": 1, "index": ticket, "num_steps": 5, "class_labels": 4}
        assert torch.equal(picture, alone(model, request, **options))


def test_a_network_with_rounding_of_its_own_stays_close() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1))

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x)

    sampler = ContinuousSampler(network, SHAPE, max_batch=4, diffusion=DIFFUSION)
    for number in range(6):
        sampler.submit(seed=1, index=number, num_steps=5 + number)
        sampler.step()
    for ticket, picture in sampler.run():
        request = {"seed": 1, "index": ticket, "num_steps": 5 + ticket}
        expected = alone(network, request, diffusion=DIFFUSION)
        torch.testing.assert_close(picture, expected, rtol=0, atol=1e-4)


def test_a_place_is_filled_at_once() -> None:
    batches = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        batches.append(t.tolist())
        return MODEL(x, t)

    sampler = ContinuousSampler(network, SHAPE, max_batch=2, diffusion=DIFFUSION)
    tickets = [sampler.submit(seed=0, num_steps=steps) for steps in (1, 2, 1)]
    assert len(sampler) == 3
    assert list(sampler.step()) == tickets[:1] and len(sampler) == 2
    assert list(sampler.step()) == tickets[1:] and len(sampler) == 0
    assert sampler.step() == {}
    assert batches == [[19, 19], [9, 19]]


def test_manual_seed_governs_where_no_seed_is_given() -> None:
    drawn = []
    for global_seed in (3, 3, 4):
        torch.manual_seed(global_seed)
        sampler = ContinuousSampler(MODEL, SHAPE, max_batch=1, diffusion=DIFFUSION)
        sampler.submit(num_steps=2)
        drawn += [picture for _, picture in sampler.run()]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"shape": ()},
            "shape must be (C, ...) and max_batch a number, each at least 1; got () and 2",
        ),
        (
            {"max_batch": 0},
            f"shape must be (C, ...) and max_batch a number, each at least 1; got {SHAPE} and 0",
        ),
        ({"guidance_rescale": 0.5}, "guidance_rescale needs a guidance_scale"),
        ({"guided": True}, "guidance_scale needs a model with num_classes, the null label"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16; got 'int8'"),
        ({"backend": "gpu"}, "backend must be one of auto, native, reference; got 'gpu'"),
    ],
)
def test_bad_samplers_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        ContinuousSampler(MODEL, **{"shape": SHAPE, "max_batch": 2} | options)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"index": -1}, "index must lie in [0, 2**48); got -1"),
        ({"seed": -1}, "seed must lie in [0, 2**64); got -1"),
        ({"num_steps": 0}, "num_steps must lie in [1, 20]; got 0"),
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, dpmpp_2m; got 'euler'"),
        ({"sampler": ["ddim"]}, "sampler must be one of ddpm, ddim, dpmpp_2m; got a list"),
        (
            {"guidance_scale": [1.0, 2.0]},
            "guidance_scale must be one number or have shape [1] or [1 or 1, 1 or 1]; got [2]",
        ),
        ({"guidance_scale": 2.0}, "guidance_scale needs a sampler that is guided"),
        ({"class_label": 1}, "all requests that share a sampler have a class_label, or none has"),
    ],
)
def test_bad_requests_are_refused(request_: dict[str, Any], sentence: str) -> None:
    sampler = ContinuousSampler(MODEL, SHAPE, max_batch=2, diffusion=DIFFUSION)
    sampler.submit(seed=0)
    with pytest.raises(ValueError) as error:
        sampler.submit(**request_)
    assert str(error.value) == sentence and len(sampler) == 1


def test_a_table_that_cannot_be_rounded_is_refused_before_it_fails_others() -> None:
    diffusion = GaussianDiffusion.from_schedule("linear", 20_000)
    sampler = ContinuousSampler(lambda x, t: x, SHAPE, max_batch=2, diffusion=diffusion)
    ticket = sampler.submit(seed=0, timestep_spacing=[50, 0])
    with pytest.raises(ValueError, match="step at timestep 19999 that is not finite in float32"):
        sampler.submit(seed=0, timestep_spacing=[19_999, 0])
    assert [number for number, _ in sampler.run()] == [ticket]


def test_a_learned_variance_needs_its_channels(backend: str) -> None:
    """A request is not lost by an error: it goes on where it was."""
    learned = GaussianDiffusion(variance_type="learned_range")
    channels = [2, 4, 4]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), channels.pop(0), *x.shape[2:])

    sampler = ContinuousSampler(network, SHAPE, max_batch=2, diffusion=learned, backend=backend)
    ticket = sampler.submit(seed=0, num_steps=2)
    sentence = "a learned variance needs a model with 4 output channels; got 2"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        sampler.step()
    assert [number for number, _ in sampler.run()] == [ticket] and not channels


def test_guidance_needs_a_label() -> None:
    sampler = ContinuousSampler(LabelledModel(), SHAPE, max_batch=2, guided=True)
    with pytest.raises(ValueError, match="guidance needs a class_label to guide towards"):
        sampler.submit(seed=0)
    with pytest.raises(ValueError, match="guidance_scale must be finite; got nan"):
        sampler.submit(seed=0, class_label=1, guidance_scale=float("nan"))
    with pytest.raises(ValueError, match="class_labels must lie in"):
        sampler.submit(seed=0, class_label=11)


@pytest.mark.parametrize("scale", [[2.0], torch.tensor([[2.0]])], ids=["list", "tensor"])
def test_a_scale_in_another_form_is_one_number(scale: Any) -> None:
    """What is submitted can be begun: an error then would cost others their place."""
    model = LabelledModel()
    pictures = []
    for one in (2.0, scale):
        sampler = ContinuousSampler(model, SHAPE, max_batch=2, diffusion=LABELLED, guided=True)
        sampler.submit(seed=1, num_steps=2, class_label=3, guidance_scale=one)
        pictures += [picture for _, picture in sampler.run()]
    assert torch.equal(*pictures)


def test_equal_timesteps_share_a_table() -> None:
    sampler = ContinuousSampler(MODEL, SHAPE, max_batch=3, diffusion=DIFFUSION)
    for _ in range(3):
        sampler.submit(seed=0, timestep_spacing=torch.tensor([19, 7, 0]))  # type: ignore[arg-type]
    sampler.step()
    assert len(sampler.rows) == 3


def test_a_table_goes_with_its_last_request() -> None:
    """Clients choose eta and timesteps: a server must not keep all that it was ever asked for."""
    sampler = ContinuousSampler(MODEL, SHAPE, max_batch=2, diffusion=DIFFUSION)
    for number in range(50):
        sampler.submit(seed=0, sampler="ddim", eta=number / 50, num_steps=3)
        sampler.step()
    assert len(sampler.rows) <= 3 * 3 and len(sampler._tables) <= len(sampler)


def test_what_a_run_has_not_yielded_is_not_lost() -> None:
    sampler = ContinuousSampler(MODEL, SHAPE, max_batch=4, diffusion=DIFFUSION)
    tickets = [sampler.submit(seed=0, index=n, num_steps=3) for n in range(4)]
    given_out = [next(sampler.run())[0]]
    assert len(sampler) == 3
    given_out += [next(sampler.run())[0], *sampler.step()]
    assert given_out == tickets and len(sampler) == 0


def test_requests_may_be_cancelled() -> None:
    """Waiting, under way or not at all; the others do not notice."""
    sampler = ContinuousSampler(MODEL, SHAPE, max_batch=2, diffusion=DIFFUSION)
    requests = [{"seed": 3, "index": n, "num_steps": 4 + n} for n in range(4)]
    tickets = [sampler.submit(**request) for request in requests]
    sampler.step()
    assert sampler.cancel(tickets[0]) and sampler.cancel(tickets[3])
    assert not sampler.cancel(tickets[0]) and not sampler.cancel(99) and len(sampler) == 2
    finished = dict(sampler.run())
    assert sorted(finished) == tickets[1:3]
    for ticket, picture in finished.items():
        assert torch.equal(picture, alone(MODEL, requests[ticket], diffusion=DIFFUSION))
    assert not sampler.cancel(tickets[1])


@pytest.mark.parametrize("under_way", [False, True])
@pytest.mark.parametrize(("first", "second"), [(None, 3), (3, None)])
def test_labels_need_not_be_as_those_of_cancelled_requests(
    first: int | None, second: int | None, under_way: bool
) -> None:
    def network(
        x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        labels.append(None if class_labels is None else class_labels.tolist())
        return x

    labels: list[list[int] | None] = []
    sampler = ContinuousSampler(network, SHAPE, max_batch=2, diffusion=DIFFUSION)
    cancelled = sampler.submit(seed=0, num_steps=2, class_label=first)
    if under_way:
        sampler.step()
    assert sampler.cancel(cancelled)
    labels.clear()
    ticket = sampler.submit(seed=0, num_steps=1, class_label=second)
    assert [number for number, _ in sampler.run()] == [ticket]
    assert labels == [None if second is None else [second]]


def test_a_request_that_could_not_be_begun_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that join, memory runs out for the second: neither is lost."""
    sampler = ContinuousSampler(MODEL, SHAPE, max_batch=2, diffusion=DIFFUSION)
    requests = [{"seed": 3, "index": n, "num_steps": 2} for n in range(2)]
    tickets = [sampler.submit(**request) for request in requests]
    draw, drawn = ops.philox_normal, []

    def scarce(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(args)
        if len(drawn) == 2:
            raise torch.OutOfMemoryError
        return draw(*args, **kwargs)

    monkeypatch.setattr(ops, "philox_normal", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        sampler.step()
    assert len(sampler) == 2
    finished = dict(sampler.run())
    assert sorted(finished) == tickets
    for ticket, request in zip(tickets, requests, strict=True):
        assert torch.equal(finished[ticket], alone(MODEL, request, diffusion=DIFFUSION))


def test_a_sampler_made_in_inference_mode_serves_outside() -> None:
    with torch.inference_mode():
        sampler = ContinuousSampler(MODEL, SHAPE, max_batch=1, diffusion=DIFFUSION)
    request = {"seed": 1, "index": 2}
    sampler.submit(**request)
    ((_, picture),) = sampler.run()
    assert torch.equal(picture, alone(MODEL, request, diffusion=DIFFUSION))


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads that take turns as often as they can, so that a race shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_any_thread_may_submit() -> None:
    """While another steps: each request gets the rows of its own table."""
    expected = {
        n: alone(MODEL, {"seed": 0, "index": 0, "num_steps": n}, diffusion=DIFFUSION)
        for n in range(1, 21)
    }

    def submit(numbers: range) -> None:
        start.wait()
        for number in numbers:
            asked[sampler.submit(seed=0, num_steps=number)] = number

    for _ in range(20):
        sampler = ContinuousSampler(MODEL, SHAPE, max_batch=8, diffusion=DIFFUSION)
        start, asked, finished = threading.Barrier(5), dict[int, int](), dict[int, torch.Tensor]()
        threads = [threading.Thread(target=submit, args=(range(n, 21, 5),)) for n in range(1, 6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or len(sampler):
            finished |= sampler.step()
        assert sorted(asked.values()) == sorted(expected)
        for ticket, number in asked.items():
            assert torch.equal(finished[ticket], expected[number])

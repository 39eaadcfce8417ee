"""Captured steps: the same pictures as step by step, whatever has changed since the capture.

On the CPU a graph is played by the function that would be captured; what CUDA alone can show is
marked so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from cases import GaussianModel
from conftest import waiting_is_an_error
from ddpm_fast import GaussianDiffusion, Sampler, graphs, sample
from ddpm_fast.models import LightweightUNet

SHAPE = (3, 2, 5, 7)
DIFFUSION = GaussianDiffusion.from_schedule("linear", 20, beta_end=0.3)


class PlayedGraph:
    """Does again what was captured, as a graph would: with the tensors of then."""

    def __init__(self, steps: Callable[[], object]) -> None:
        self.steps, self.replays = steps, 0

    def replay(self) -> None:
        self.replays += 1
        self.steps()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[PlayedGraph]:
    """Lets samplers capture on the CPU, short graphs alone; the graphs that they made."""
    made: list[PlayedGraph] = []

    def capture(steps: Callable[[], object], beside: PlayedGraph | None) -> PlayedGraph:
        made.append(PlayedGraph(steps))
        return made[-1]

    @contextlib.contextmanager
    def nothing(_: torch.device) -> Iterator[None]:
        yield

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "beside_the_current_stream", nothing)
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(Sampler, "_captures", lambda self: not self._uncapturable)
    monkeypatch.setattr("ddpm_fast.sampler._QUICK", -1)
    return made


class Scaled(nn.Module):
    """x times a weight, plus what the keyword arguments say."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        shift = kwargs.get("shift", 0.0)
        labels = kwargs.get("class_labels")
        if labels is not None:
            shift = shift + 0.01 * labels.reshape(-1, 1, 1, 1)
        return x * self.weight + shift + 1e-3 * t.reshape(-1, 1, 1, 1)


def replays_in_two_runs(num_steps: int, quick: bool) -> list[int]:
    """Of the graph of two steps, and of twenty, if there are any; the first run has a warm-up."""
    if num_steps < 6:
        return []
    runs = (num_steps - 4, num_steps)
    if not quick or num_steps < 24:
        return [sum(steps // 2 for steps in runs)]
    return [sum(steps % 20 // 2 for steps in runs), sum(steps // 20 for steps in runs)]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("num_steps", [*range(1, 15), 20, 23, 24, 45])
def test_replayed_steps_are_the_steps(
    num_steps: int,
    quick: bool,
    captures: list[PlayedGraph],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Odd and even numbers, too few to capture, enough for a quick network's long graph; twice."""
    if quick:
        monkeypatch.setattr("ddpm_fast.sampler._QUICK", math.inf)
    diffusion = GaussianDiffusion.from_schedule("linear", 50, beta_end=0.3)
    model = GaussianModel(diffusion)
    options: dict[str, Any] = {"diffusion": diffusion, "num_steps": num_steps, "backend": backend}
    sampler = Sampler(model, SHAPE, **options)
    drawn = [sampler(seed=seed) for seed in (0, 1)]
    assert len(captures) == (num_steps >= 6) + (quick and num_steps >= 24)
    assert [graph.replays for graph in captures] == replays_in_two_runs(num_steps, quick)
    monkeypatch.setattr(Sampler, "_captures", lambda self: False)
    for seed in (0, 1):
        assert torch.equal(drawn[seed], sample(model, SHAPE, **options, seed=seed))


def test_one_capture_serves_new_labels_seeds_and_numbers(captures: list[PlayedGraph]) -> None:
    model = Scaled()
    sampler = Sampler(model, SHAPE, diffusion=DIFFUSION, guidance_scale=2.0)
    for labels, shift in ((1, 0.0), ([4, 5, 6], 0.1), (9, -0.3)):
        call: dict[str, Any] = {
            "seed": labels if isinstance(labels, int) else 0,
            "class_labels": labels,
            "model_kwargs": {"shift": torch.full((6, 1, 1, 1), shift)},
        }
        fresh = sample(model, SHAPE, diffusion=DIFFUSION, guidance_scale=2.0, **call)
        assert torch.equal(sampler(**call), fresh)
    assert len(captures) == 4  # one of the sampler, and one a sample()


@pytest.mark.parametrize("change", ["weights", "shape", "kind", "list"])
def test_what_a_graph_cannot_serve_is_captured_anew(
    change: str, captures: list[PlayedGraph]
) -> None:
    model = Scaled()
    sampler = Sampler(model, SHAPE, diffusion=DIFFUSION)
    shift = [0.1] if change == "list" else torch.tensor(0.1)
    model.forward = lambda x, t, shift: (
        x * model.weight
        + (  # type: ignore[method-assign]
            shift[0] if isinstance(shift, list) else shift
        )
    )
    first = sampler(seed=0, model_kwargs={"shift": shift})
    if change == "weights":
        model.weight.data = torch.tensor(0.7)
    if change == "shape":
        shift = torch.full((1, 1), 0.3)
    if change == "kind":
        shift = 0.4
    if change == "list":
        shift[0] = 0.2
    second = sampler(seed=0, model_kwargs={"shift": shift})
    assert len(captures) == 2 and not torch.equal(first, second)
    assert torch.equal(
        second, sample(model, SHAPE, diffusion=DIFFUSION, seed=0, model_kwargs={"shift": shift})
    )


def test_the_callers_tensors_stay_as_they_are(captures: list[PlayedGraph]) -> None:
    sampler = Sampler(Scaled(), SHAPE, diffusion=DIFFUSION)
    shifts = [torch.tensor(0.1), torch.tensor(0.2)]
    for shift in shifts:
        sampler(seed=0, model_kwargs={"shift": shift})
    assert shifts[0] == 0.1 and shifts[1] == 0.2 and len(captures) == 1


def test_a_failed_capture_is_not_tried_again(
    captures: list[PlayedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    monkeypatch.setattr(graphs, "capture", lambda steps, beside: tries.append(steps))
    model = GaussianModel(DIFFUSION)
    sampler = Sampler(model, SHAPE, diffusion=DIFFUSION)
    expected = sample(model, SHAPE, diffusion=DIFFUSION, seed=0, callback=lambda *_: None)
    assert torch.equal(sampler(seed=0), expected) and torch.equal(sampler(seed=0), expected)
    assert len(tries) == 1


@pytest.fixture
def failing_captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Captures whose end fails once the work has, as torch's do; the streams that were restored."""

    @contextlib.contextmanager
    def failing(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    restored: list[object] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(graphs, "_recover", lambda graph, stream: restored.append(stream))
    return restored


def raised(error: BaseException) -> Callable[[], object]:
    def steps() -> object:
        raise error

    return steps


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            RuntimeError("operation not permitted when stream is capturing\nmore"),
            "operation not .*ing",
        ),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_failed_capture_warns_with_its_cause(
    error: RuntimeError, cause: str, failing_captures: list[object]
) -> None:
    """With what the work said, not the end of the capture, nor what the caller is handling."""
    with pytest.warns(UserWarning, match=f"captured: {cause}$"):
        try:
            raise KeyError
        except KeyError:
            assert graphs.capture(raised(error)) is None
    assert failing_captures == ["before"]


def test_an_interrupted_capture_is_no_failed_one(failing_captures: list[object]) -> None:
    with pytest.raises(KeyboardInterrupt):
        graphs.capture(raised(KeyboardInterrupt()))
    assert failing_captures == ["before"]


@pytest.mark.cuda
class TestOnCuda:
    """With real graphs."""

    @pytest.fixture(autouse=True)
    def cuda(self) -> torch.device:
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return torch.device("cuda")

    @pytest.mark.parametrize("num_steps", [3, 19, 20])
    @pytest.mark.parametrize("guidance_scale", [None, 2.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_replayed_steps_are_the_steps(
        self, num_steps: int, guidance_scale: float | None, dtype: torch.dtype
    ) -> None:
        model = Scaled().to("cuda", dtype)
        options: dict[str, Any] = {"diffusion": DIFFUSION, "num_steps": num_steps}
        options["guidance_scale"] = guidance_scale
        sampler = Sampler(model, SHAPE, **options)
        for seed in (0, 1):
            call: dict[str, Any] = {"seed": seed, "class_labels": seed + 3}
            eager = sample(model, SHAPE, **options, **call, callback=lambda *_: None)
            assert torch.equal(sampler(**call), eager)

    def test_on_another_stream(self) -> None:
        model = LightweightUNet(2, 8, 2).cuda()
        expected = sample(model, SHAPE, diffusion=DIFFUSION, seed=0)
        sampler = Sampler(model, SHAPE, diffusion=DIFFUSION)
        stream = torch.cuda.Stream()
        for _ in range(2):
            with torch.cuda.stream(stream):
                x = sampler(seed=0)
            torch.cuda.current_stream().wait_stream(stream)
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)

    def test_the_host_never_waits(self) -> None:
        sampler = Sampler(LightweightUNet(2, 8, 2).cuda(), SHAPE, diffusion=DIFFUSION)
        sampler(seed=0)
        with waiting_is_an_error():
            sampler._run(None, lambda steps: None)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_autocast_in_a_graph(self, precision: str) -> None:
        """The weights that autocast casts must not be freed behind a graph's back."""
        model = LightweightUNet(2, 8, 2).cuda()
        sampler = Sampler(model, SHAPE, diffusion=DIFFUSION, precision=precision)
        first = sampler(seed=0)
        junk = [torch.full((1 << 16,), torch.nan, device="cuda") for _ in range(64)]
        assert torch.equal(sampler(seed=0), first) and len(junk) == 64

    def test_a_network_that_waits_runs_eagerly(self) -> None:
        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x * float(x.mean() < 100)

        expected = sample(lambda x, t: x, SHAPE, diffusion=DIFFUSION, seed=0, device="cuda")
        with pytest.warns(UserWarning, match="^ddpm_fast samples without a CUDA graph"):
            x = sample(network, SHAPE, diffusion=DIFFUSION, seed=0, device="cuda")
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
        # torch itself leaves the stream of the capture behind, and a generator that does not draw.
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.randn(3, device="cuda").isfinite().all()

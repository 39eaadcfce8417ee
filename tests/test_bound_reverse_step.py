"""bound_reverse_step: reverse_step in place, its checks left out where nothing can have changed."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cases import ReverseStepCase, laid_out, reverse_step_case
from ddpm_fast import Sampler, ops
from ddpm_fast.models import LightweightUNet
from ddpm_fast.network import ready


class Ready:
    """The preparation of an output, counted."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.calls = x, 0

    def __call__(self, returned: object) -> Tensor:
        self.calls += 1
        return ready(returned, self.x)


def bound(case: ReverseStepCase, backend: str) -> tuple[Callable[[Any], object], Ready]:
    x_t, _, rows, step = case.args
    prepare = Ready(x_t)
    options = case.kwargs | {"backend": backend}
    return ops.bound_reverse_step(x_t, rows, step, ready=prepare, **options), prepare


def stepped(case: ReverseStepCase, output: Tensor, backend: str) -> Tensor:
    x_t, _, rows, step = case.args
    return ops.reverse_step(x_t, output, rows, step, **case.kwargs, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("noise", ["given", "drawn"])
@pytest.mark.parametrize("guided", [False, True])
def test_outputs_alike_are_checked_once(
    dtype: torch.dtype, noise: str, guided: bool, device: torch.device, backend: str
) -> None:
    case = reverse_step_case(dtype=dtype, noise=noise, guided=guided, device=device)
    advance, prepare = bound(case, backend)
    for number in range(4):
        output = case.args[1] / (number + 1)
        expected = stepped(case, output, backend)
        with torch.inference_mode():
            advance(output)
        assert torch.equal(case.x_t, expected)
    assert prepare.calls == (1 if backend == "native" else 4)


def transposed(output: Tensor) -> Tensor:
    return output.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize(
    "change",
    [
        Tensor.half,
        Tensor.bfloat16,
        transposed,
        lambda output: laid_out(output, "channels_last"),
        lambda output: laid_out(output, "slice_of_channels"),
        lambda output: torch.cat([output, output], dim=1),
        lambda output: output.as_subclass(torch.nn.Buffer),
    ],
    ids=["half", "bfloat16", "transposed", "channels_last", "slice", "variance", "subclass"],
)
def test_outputs_may_change(
    change: Callable[[Tensor], Tensor], device: torch.device, backend: str
) -> None:
    case = reverse_step_case(noise="drawn", device=device)
    advance, _ = bound(case, backend)
    for output in (case.args[1], change(case.args[1]), change(case.args[1]), case.args[1]):
        expected = stepped(case, ready(output, case.x_t), backend)
        with torch.inference_mode():
            advance(output)
        assert torch.equal(case.x_t, expected)


def test_what_is_written_may_be_returned(device: torch.device, backend: str) -> None:
    """A network that returns its input, or a part of what it is to read next."""
    case = reverse_step_case(noise="drawn", device=device)
    next_input = torch.ones_like(case.x_t)
    case.kwargs["next_input"] = next_input
    advance, prepare = bound(case, backend)
    prepare.x = next_input
    with torch.inference_mode():
        advance(case.args[1])
    for output in (next_input, next_input.flip(0), next_input):
        before = case.x_t.clone()
        expected = ops.reverse_step(
            before,
            output.clone(),
            *case.args[2:],
            **case.kwargs | {"next_input": None},
            backend=backend,
        )
        with torch.inference_mode():
            advance(output)
        assert torch.equal(case.x_t, expected) and torch.equal(next_input, expected)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        ((1, 2), "TypeError: the model must return a tensor; got tuple"),
        (
            torch.zeros(2, 4, 8, 8),
            "ValueError: reverse_step: model_output must have the shape of x_t, or twice its "
            "channels; got [2, 4, 8, 8] and [2, 3, 8, 8]",
        ),
        (
            torch.zeros(4, 3, 8, 8),
            "ValueError: reverse_step: model_output must have the shape of x_t, or twice its "
            "channels; got [4, 3, 8, 8] and [2, 3, 8, 8]",
        ),
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.int32),
            "TypeError: reverse_step: model_output must be float32, float64, bfloat16 or float16; "
            "got int32",
        ),
    ],
)
def test_wrong_outputs_are_refused_at_any_call(
    returned: object, error: str, device: torch.device, backend: str
) -> None:
    case = reverse_step_case(device=device)
    advance, _ = bound(case, backend)
    wrong = returned.to(device) if isinstance(returned, Tensor) else returned
    kind, sentence = error.split(": ", 1)
    with torch.inference_mode():
        for _ in range(2):
            before = case.x_t.clone()
            with pytest.raises((TypeError, ValueError), match=f"^{re.escape(sentence)}$") as raised:
                advance(wrong)
            assert raised.typename == kind and torch.equal(case.x_t, before)
            advance(case.args[1])


@pytest.mark.parametrize("written", ["out", "pred_xstart", "next_input"])
def test_an_output_that_overlaps_what_is_written_is_refused(
    written: str, device: torch.device, backend: str
) -> None:
    case = reverse_step_case(device=device)
    memory = torch.zeros(3, *case.x_t.shape[1:], device=device)
    if written == "out":
        memory[1:] = case.x_t
        case = ReverseStepCase((memory[1:], *case.args[1:]), case.kwargs)
    else:
        case.kwargs[written] = memory[1:]
    advance, _ = bound(case, backend)
    with torch.inference_mode():
        advance(case.args[1])
        sentence = f"reverse_step: {written} must not overlap the memory of model_output"
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            advance(memory[:2])


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_step_out_of_range_is_refused(per_sample: bool, backend: str) -> None:
    case = reverse_step_case(per_sample=per_sample)
    advance, _ = bound(case, backend)
    with torch.inference_mode():
        advance(case.args[1])
        for step in (5, -1):
            case.args[3].view(-1)[-1] = step
            sentence = f"reverse_step: step must lie in [0, 4]; got {step}"
            with pytest.raises(IndexError, match=f"^{re.escape(sentence)}$"):
                advance(case.args[1])


class Seen(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_every_step(device: torch.device, native: str) -> None:
    case = reverse_step_case(device=device)
    advance, _ = bound(case, native)
    with torch.inference_mode():
        advance(case.args[1])
        with Seen() as seen:
            advance(case.args[1])
        with torch.profiler.profile(acc_events=True) as profile:
            advance(case.args[1])
    assert seen.names == ["ddpm_fast::reverse_step_"]
    assert "ddpm_fast::reverse_step_" in [event.name for event in profile.events()]


def test_autograd_notices_every_step(device: torch.device, backend: str) -> None:
    case = reverse_step_case(device=device)
    advance, _ = bound(case, backend)
    for _ in range(2):
        weight = torch.ones_like(case.x_t, requires_grad=True)
        loss = (weight * case.x_t).sum()
        with torch.inference_mode():
            advance(case.args[1])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_sampler_is_let_go(device: torch.device, backend: str) -> None:
    """What is bound holds buffers, and nothing that holds it."""
    model = LightweightUNet().to(device)
    sampler = Sampler(model, (1, 3, 8, 8), num_steps=3, backend=backend)
    sampler(seed=0)
    gone = weakref.ref(sampler)
    del sampler
    gc.collect()
    assert gone() is None

"""q_sample: forward noising at per-sample t, its noise given, or drawn and returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import ACCESSES, INPUT_LAYOUTS, LAYOUTS, laid_out, randn
from conftest import needs_native
from ddpm_fast import GaussianDiffusion, ops
from ddpm_fast.ops import compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
shapes = st.tuples(
    st.integers(0, 4), st.integers(1, 4), st.lists(st.integers(0, 40), max_size=3)
).map(lambda s: (s[0], s[1], *s[2]))


def q_sample_case(
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    drawn: bool = True,
    per_sample: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    samples = shape[0]
    rows = randn((10, 2), seed, compute_dtype(dtype)).to(device)
    t = torch.arange(samples) * 7 % 10 if per_sample else torch.tensor(3)
    x_start = laid_out(randn(shape, seed + 1, dtype), layout).to(device)
    if not drawn:
        noise = laid_out(randn(shape, seed + 2, dtype), layout).to(device)
        return (x_start, t.to(device), rows), {"noise": noise}
    index = torch.arange(samples, device=device) + 2**34
    return (x_start, t.to(device), rows), {
        "seed": torch.tensor(seed, device=device),
        "sample_index": index,
    }


def assert_native_matches(args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
    x_t, noise = ops.q_sample(*args, **kwargs, backend="native")
    expected_x_t, expected_noise = ops.q_sample(*args, **kwargs, backend="reference")
    assert x_t.stride() == expected_x_t.stride()
    if "noise" in kwargs:
        assert torch.equal(x_t, expected_x_t) and noise is kwargs["noise"]
        return
    eps = max(torch.finfo(x_t.dtype).eps, 1e-6)
    torch.testing.assert_close(noise, expected_noise, rtol=eps, atol=0)
    torch.testing.assert_close(x_t, expected_x_t, rtol=eps, atol=16 * eps)


@needs_native
@given(
    shapes,
    st.integers(0, 2**31),
    st.sampled_from(DTYPES),
    st.sampled_from(INPUT_LAYOUTS),
    st.booleans(),
    st.booleans(),
)
def test_native_matches_reference(
    shape: tuple[int, ...],
    seed: int,
    dtype: torch.dtype,
    layout: str,
    drawn: bool,
    per_sample: bool,
) -> None:
    args, kwargs = q_sample_case(
        shape, seed=seed, dtype=dtype, layout=layout, drawn=drawn, per_sample=per_sample
    )
    assert_native_matches(args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("drawn", [False, True])
def test_every_kernel_matches_reference(
    dtype: torch.dtype, access: str, drawn: bool, device: torch.device, native: str
) -> None:
    shape, layout = ACCESSES[access]
    case = q_sample_case(shape, dtype=dtype, layout=layout, drawn=drawn, device=device)
    assert_native_matches(*case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_returned_noise_is_what_x_t_holds(
    dtype: torch.dtype, layout: str, device: torch.device, backend: str
) -> None:
    args, kwargs = q_sample_case((3, 3, 9, 7), dtype=dtype, layout=layout, device=device)
    x_t, noise = ops.q_sample(*args, **kwargs, backend=backend)
    again, _ = ops.q_sample(*args, noise=noise, backend=backend)
    assert torch.equal(x_t, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_t_is_the_formula(dtype: torch.dtype, device: torch.device, backend: str) -> None:
    args, kwargs = q_sample_case((5, 3, 9), dtype=dtype, drawn=False, device=device)
    x_t, _ = ops.q_sample(*args, **kwargs, backend=backend)
    x_start, t, rows = (a.cpu() for a in args)
    signal, scale = rows.double()[t].reshape(-1, 2, 1, 1).unbind(1)
    expected = signal * x_start.double() + scale * kwargs["noise"].double().cpu()
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(x_t.double().cpu(), expected, rtol=eps, atol=4 * eps)


def test_noise_depends_on_seed_sample_and_timestep_alone(
    device: torch.device, backend: str
) -> None:
    """A sample's noise is the same in another batch, beside others, at another place."""
    diffusion = GaussianDiffusion()
    x = randn((6, 1, 8, 8), 0).to(device)
    t = torch.tensor([0, 10, 999, 10, 500, 3], device=device)
    index = torch.tensor([5, 2**40, 7, 5, 0, 1], device=device)
    options: dict[str, Any] = {"seed": 11, "backend": backend}
    x_t, noise = diffusion.q_sample(x, t, sample_index=index, **options)
    for i in range(6):
        one = diffusion.q_sample(
            x[i : i + 1], t[i : i + 1], sample_index=index[i : i + 1], **options
        )
        assert torch.equal(one[0], x_t[i : i + 1]) and torch.equal(one[1], noise[i : i + 1])
    assert not torch.equal(noise[0], noise[3])  # same sample, another timestep


@pytest.mark.parametrize("drawn", [False, True])
def test_gradients(drawn: bool, device: torch.device, backend: str) -> None:
    args, kwargs = q_sample_case((2, 2, 3), dtype=torch.float64, drawn=drawn, device=device)
    x_start, t, rows = args
    tensors = [x_start.requires_grad_()]
    if not drawn:
        tensors.append(kwargs.pop("noise").requires_grad_())

    def noised(x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        given_noise = {} if noise is None else {"noise": noise}
        return ops.q_sample(x, t, rows, **kwargs, **given_noise, backend=backend)[0]

    assert torch.autograd.gradcheck(noised, tensors)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(drawn: bool, layout: str, grad: bool, device: torch.device, native: str) -> None:
    args, kwargs = q_sample_case((2, 3, 4, 5), layout=layout, drawn=drawn, device=device)
    args[0].requires_grad_(grad)
    op = torch.ops.ddpm_fast.q_sample
    torch.library.opcheck(op.drawn if drawn else op.default, (*args, *kwargs.values()))
    if not grad:
        inputs = (kwargs.get(name) for name in ("noise", "seed", "sample_index"))
        noise = torch.empty_like(args[0]) if drawn else None
        torch.library.opcheck(op.out, (*args, *inputs, torch.empty_like(args[0]), noise))


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_where_told(
    drawn: bool, layout: str, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    """Into given memory, over x_start and over the noise: the same bytes."""
    args, kwargs = q_sample_case((3, 3, 9, 7), dtype=dtype, drawn=drawn, device=device)
    expected = ops.q_sample(*args, **kwargs, backend=backend)
    places = {name: laid_out(torch.full_like(args[0], 7), layout) for name in ("out", "noise_out")}
    if not drawn:
        del places["noise_out"]
    found = ops.q_sample(*args, **kwargs, **places, backend=backend)
    assert found[0] is places["out"] and found[1] is places.get("noise_out", kwargs.get("noise"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    over = args[0].clone() if drawn else kwargs["noise"].clone()
    if drawn:
        ops.q_sample(over, *args[1:], **kwargs, out=over, backend=backend)
    else:
        ops.q_sample(*args, noise=over, out=over, backend=backend)
    assert torch.equal(over, expected[0])


@pytest.mark.parametrize("drawn", [False, True])
def test_with_and_without_gradients_alike(drawn: bool, device: torch.device, backend: str) -> None:
    args, kwargs = q_sample_case((2, 3, 4, 5), drawn=drawn, device=device)
    without = ops.q_sample(*args, **kwargs, backend=backend)
    args[0].requires_grad_()
    x_t, noise = ops.q_sample(*args, **kwargs, backend=backend)
    assert torch.equal(x_t, without[0]) and torch.equal(noise, without[1])
    assert x_t.requires_grad and not noise.requires_grad


def test_opcheck_of_the_noise(device: torch.device, native: str) -> None:
    op = torch.ops.ddpm_fast
    index = torch.arange(2, device=device)
    seed = torch.tensor(3, device=device)
    torch.library.opcheck(
        op.philox_normal.default, ((2, 3, 5), seed, index, seed, 1, torch.bfloat16)
    )
    words = torch.arange(8, device=device).reshape(2, 4)
    torch.library.opcheck(op.philox.default, (words, words[:, :2]))
    torch.library.opcheck(op.philox.default, (words.reshape(4, 2).t(), words[:, :2]))

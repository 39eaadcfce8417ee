"""reverse_step: the reference against plain formulas, the native kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import (
    ACCESSES,
    INPUT_LAYOUTS,
    LAYOUTS,
    ReverseStepCase,
    laid_out,
    randn,
    reverse_step_case,
    written_tensors,
)
from conftest import needs_native
from ddpm_fast import ops
from ddpm_fast.ops import ROW

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = [(a, b) for a in FLOATS for b in FLOATS] + [(torch.float64, torch.float64)]

shapes = st.tuples(
    st.integers(0, 4), st.integers(1, 4), st.lists(st.integers(0, 40), max_size=3)
).map(lambda s: (s[0], s[1], *s[2]))


@st.composite
def cases(draw: st.DrawFn, device: str = "cpu") -> ReverseStepCase:
    dtype, output_dtype = draw(st.sampled_from(DTYPE_PAIRS))
    return reverse_step_case(
        draw(shapes),
        seed=draw(st.integers(0, 2**31)),
        dtype=dtype,
        output_dtype=output_dtype,
        layout=draw(st.sampled_from(INPUT_LAYOUTS)),
        learned=draw(st.booleans()),
        noise=draw(st.sampled_from(["given", "drawn", "none"])),
        x0_prev=draw(st.booleans()),
        per_sample=draw(st.booleans()),
        guided=draw(st.booleans()),
        rescaled=draw(st.booleans()),
        thresholded=draw(st.booleans()),
        masked=draw(st.booleans()),
        clip=draw(st.sampled_from([None, 0.5, 1.0])),
        device=device,
    )


def assert_native_matches(case: ReverseStepCase) -> None:
    ours, spec = written_tensors(case), written_tensors(case)
    x_prev = ops.reverse_step(*case.args, **case.kwargs, backend="native", **ours)
    expected = ops.reverse_step(*case.args, **case.kwargs, backend="reference", **spec)
    for name in ("pred_xstart", "next_step", "next_t"):
        assert torch.equal(ours[name], spec[name])
    for halves, x in ((ours, x_prev), (spec, expected)):
        for half in halves["next_input"].split(max(1, len(x))):
            assert torch.equal(half, x.to(half.dtype))
    assert_same_step(case, x_prev, expected)


def assert_same_step(case: ReverseStepCase, x_prev: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for noise that was drawn and learned variances."""
    assert x_prev.stride() == expected.stride()
    learned = case.args[1].shape[1] != case.x_t.shape[1]
    if not learned and case.kwargs.get("seed") is None:
        assert torch.equal(x_prev, expected)
        return
    # The noise and the exponential may differ by 2 ulp each, of terms no larger than the bound.
    bound = (4 * torch.finfo(case.args[2].dtype).eps) if case.x_t.dtype == torch.float64 else 1e-6
    tolerance = max(bound, torch.finfo(case.x_t.dtype).eps)
    scale = 8 * max(1.0, float(expected.float().abs().max())) if expected.numel() else 1.0
    if case.kwargs.get("seed") is not None:
        tolerance = max(tolerance, 1e-6)
    torch.testing.assert_close(x_prev, expected, rtol=tolerance, atol=tolerance * scale)


@needs_native
@given(cases())
def test_native_matches_reference(case: ReverseStepCase) -> None:
    assert_native_matches(case)


@pytest.mark.cuda
@given(st.data())
def test_native_matches_reference_on_cuda(data: st.DataObject) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert_native_matches(data.draw(cases("cuda")))


@pytest.mark.parametrize(("dtype", "output_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_every_kernel_matches_reference(
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    access: str,
    noise: str,
    device: torch.device,
    native: str,
) -> None:
    shape, layout = ACCESSES[access]
    case = reverse_step_case(
        shape, dtype=dtype, output_dtype=output_dtype, layout=layout, noise=noise, device=device
    )
    x_prev = ops.reverse_step(*case.args, **case.kwargs, backend=native)
    expected = ops.reverse_step(*case.args, **case.kwargs, backend="reference")
    assert_same_step(case, x_prev, expected)


def assert_plain_step_is_the_same(case: ReverseStepCase, native: str) -> None:
    """With noise drawn and nothing more to write, CUDA has kernels of their own for the step."""
    plain = ops.reverse_step(*case.args, **case.kwargs, backend=native)
    written = written_tensors(case)
    assert torch.equal(
        plain, ops.reverse_step(*case.args, **case.kwargs, **written, backend=native)
    )
    x, (_, *others) = case.x_t.clone(), case.args
    moved = {name: torch.zeros_like(written[name]) for name in ("next_step", "next_t")}
    ops.reverse_step(x, *others, **case.kwargs, **moved, out=x, backend=native)
    assert torch.equal(plain, x)
    assert all(torch.equal(tensor, written[name]) for name, tensor in moved.items())


LARGE = [(2, 4, 32, 32), (4, 5, 256, 256)]  # in the eyes of the kernels, or of test_cuda_on_cpu


@pytest.mark.parametrize(("dtype", "output_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(
    ("shape", "layout"), [*ACCESSES.values(), *((shape, "contiguous") for shape in LARGE)]
)
def test_what_else_is_written_does_not_matter(
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    device: torch.device,
    native: str,
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "output_dtype": output_dtype, "layout": layout}
    case = reverse_step_case(shape, noise="drawn", per_sample=True, device=device, **options)
    assert_plain_step_is_the_same(case, native)


@pytest.mark.parametrize(("dtype", "output_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("shape", LARGE)
def test_a_large_batch_matches_reference(
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    native: str,
) -> None:
    """With all that a step can read beside x_t and the output."""
    names = ("learned", "x0_prev", "per_sample", "guided", "rescaled", "thresholded", "masked")
    options: dict[str, Any] = {"dtype": dtype, "output_dtype": output_dtype, "device": device}
    case = reverse_step_case(shape, noise="drawn", **options, **dict.fromkeys(names, True))
    assert_native_matches(case)


@needs_native
@given(cases())
def test_drawn_noise_is_philox_normal(case: ReverseStepCase) -> None:
    """Drawing in the kernel and passing philox_normal's numbers are the same to the bit."""
    x_t, _, rows, step = case.args
    if case.kwargs.get("seed") is None or x_t.dtype not in (torch.float32, torch.float64):
        return
    rows[:, ROW.index("stream")] = ops.STREAMS["resampled"]
    drawn = ops.reverse_step(*case.args, **case.kwargs)
    noise = ops.philox_normal(
        tuple(x_t.shape),
        seed=case.kwargs["seed"],
        sample_index=case.kwargs["sample_index"],
        timestep=rows[:, ROW.index("timestep")].long()[step],
        stream=ops.STREAMS["resampled"],
        dtype=x_t.dtype,
    )
    given_noise = {k: v for k, v in case.kwargs.items() if k not in ("seed", "sample_index")}
    assert torch.equal(drawn, ops.reverse_step(*case.args, **given_noise, noise=noise))


def formula(case: ReverseStepCase) -> torch.Tensor:
    """The docstring's equations, sample by sample, in float64."""
    x_t, output, rows, step = (tensor.double().cpu() for tensor in case.args)
    result = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    for n in range(len(x_t)):
        i = int(step[n] if step.dim() else step)
        row = dict(zip(ROW, rows[i].tolist(), strict=True))
        out, v = output[n, : x_t.shape[1]], output[n, x_t.shape[1] :]
        if "guidance_scale" in case.kwargs:
            scale = case.kwargs["guidance_scale"].double().cpu()
            uncond = output[n + len(x_t), : x_t.shape[1]]
            out = uncond + scale[i % len(scale), n % scale.shape[1]] * (out - uncond)
        if "guidance_factor" in case.kwargs:
            out = out * case.kwargs["guidance_factor"][n].double().cpu()
        x0 = row["x0_from_xt"] * x_t[n] + row["x0_from_out"] * out
        if case.kwargs["clip"] is not None:
            x0 = x0.clamp(-case.kwargs["clip"], case.kwargs["clip"])
        if "threshold" in case.kwargs:
            s = case.kwargs["threshold"][n].double().cpu()
            x0 = x0.clamp(-s, s) / s
        x = row["mean_from_x0"] * x0 + row["mean_from_xt"] * x_t[n] + row["mean_from_out"] * out
        if "x0_prev" in case.kwargs:
            x += row["mean_from_x0_prev"] * case.kwargs["x0_prev"][n].double().cpu()
        stddev = torch.tensor(row["sigma"], dtype=torch.float64)
        if v.numel():
            low, high = row["min_log_variance"], row["max_log_variance"]
            stddev = stddev * torch.exp((low + (v + 1) / 2 * (high - low)) / 2)
        noise = case.kwargs["noise"][n].double().cpu()
        x += stddev * noise
        if "mask" in case.kwargs:
            mask, known = (case.kwargs[name][n].double().cpu() for name in ("mask", "known"))
            kept = row["known_from_x0"] * known + row["known_sigma"] * noise
            x = mask * kept + (1 - mask) * x
        result[n] = x
    return result


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_step_is_the_formula(
    dtype: torch.dtype,
    learned: bool,
    per_sample: bool,
    guided: bool,
    edited: bool,
    device: torch.device,
    backend: str,
) -> None:
    options: dict[str, Any] = {
        "learned": learned,
        "per_sample": per_sample,
        "guided": guided,
        "rescaled": edited,
        "thresholded": edited,
        "masked": edited,
        "x0_prev": True,
    }
    case = reverse_step_case((5, 3, 7, 9), dtype=dtype, device=device, seed=3, **options)
    x_prev = ops.reverse_step(*case.args, **case.kwargs, backend=backend)
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    expected = formula(case)
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        x_prev.double().cpu(), expected, rtol=tolerance, atol=8 * scale * max(tolerance / 8, 1e-15)
    )


def test_learned_stddev_is_within_2_ulp(device: torch.device, backend: str) -> None:
    v = torch.linspace(-1, 1, 20_001, device=device).reshape(1, 1, -1)
    for low, high in [(-1.0, 1.0), (-40.0, -2.0), (-9.2, -9.1), (0.0, 50.0)]:
        rows = torch.zeros(1, len(ROW), device=device)
        rows[0, 6:9] = torch.tensor([1.0, low, high])
        zero = torch.zeros_like(v)
        stddev = ops.reverse_step(
            zero,
            torch.cat([zero, v], dim=1),
            rows,
            torch.zeros((), dtype=torch.int64, device=device),
            noise=torch.ones_like(v),
            backend=backend,
        )
        # From the float32 log-variance on, so that its own rounding is not counted.
        fraction = (v + 1) * 0.5
        log_variance = fraction * high + (1 - fraction) * low
        expected = (0.5 * log_variance).double().exp().float()
        assert int((stddev.view(torch.int32) - expected.view(torch.int32)).abs().max()) <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise", ["given", "drawn", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_and_layouts_agree(
    layout: str, noise: str, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    """Functional, out and in place, in every layout: the same bytes."""
    options: dict[str, Any] = {"dtype": dtype, "noise": noise, "x0_prev": True, "learned": True}
    options |= {"masked": True}
    shape = (3, 3, 9, 7)
    plain = reverse_step_case(shape, device=device, **options)
    case = reverse_step_case(shape, layout=layout, device=device, **options)
    expected = ops.reverse_step(*plain.args, **plain.kwargs, backend=backend)
    assert torch.equal(ops.reverse_step(*case.args, **case.kwargs, backend=backend), expected)

    out = laid_out(torch.full_like(plain.x_t, 7), layout)
    returned = ops.reverse_step(*case.args, **case.kwargs, out=out, backend=backend)
    assert returned is out and torch.equal(out, expected)

    x_t = case.x_t
    returned = ops.reverse_step(*case.args, **case.kwargs, out=x_t, backend=backend)
    assert returned is x_t and torch.equal(x_t, expected)


@pytest.mark.parametrize("layout", ["slice_of_batch", "slice_of_channels"])
def test_nothing_is_written_beside_the_output(
    layout: str, device: torch.device, backend: str
) -> None:
    case = reverse_step_case((3, 3, 5, 7), noise="drawn", device=device)
    buffers = []
    for _ in range(2):
        buffer = torch.full((7, 5, 5, 7), 42.0, device=device)
        view = buffer[1::2, :3] if layout == "slice_of_batch" else buffer[:3, 1:4]
        buffers.append((buffer, view))
    (out_buffer, out), (xstart_buffer, xstart) = buffers
    ops.reverse_step(*case.args, **case.kwargs, out=out, pred_xstart=xstart, backend=backend)
    for buffer, view in ((out_buffer, out), (xstart_buffer, xstart)):
        assert not (view == 42).any()
        view.fill_(42)
        assert (buffer == 42).all()


def test_history_may_be_updated_in_place(device: torch.device, backend: str) -> None:
    case = reverse_step_case(x0_prev=True, device=device)
    fresh = torch.empty_like(case.x_t)
    expected = ops.reverse_step(*case.args, **case.kwargs, pred_xstart=fresh, backend=backend)
    history = case.kwargs["x0_prev"]
    x_prev = ops.reverse_step(*case.args, **case.kwargs, pred_xstart=history, backend=backend)
    assert torch.equal(x_prev, expected) and torch.equal(history, fresh)


def test_a_network_may_return_its_input(device: torch.device, backend: str) -> None:
    case = reverse_step_case(device=device)
    x_t, _, rows, step = case.args
    expected = ops.reverse_step(x_t, x_t.clone(), rows, step, **case.kwargs, backend=backend)
    ops.reverse_step(x_t, x_t, rows, step, **case.kwargs, out=x_t, backend=backend)
    assert torch.equal(x_t, expected)


def test_a_variance_that_is_not_used_is_not_read(device: torch.device, backend: str) -> None:
    """In the last step sigma is 0, and the learned variance may be anything."""
    case = reverse_step_case(learned=True, seed=2, device=device)
    expected = ops.reverse_step(*case.args, **case.kwargs, backend=backend)
    case.args[1][:, 3:] = torch.tensor([torch.nan, torch.inf, 1e30], device=device)[:, None, None]
    assert torch.equal(ops.reverse_step(*case.args, **case.kwargs, backend=backend), expected)


def test_autograd_notices_what_was_written(device: torch.device, backend: str) -> None:
    """Overwriting what a graph has saved is an error at backward, never a wrong gradient."""
    case = reverse_step_case(device=device)
    weight = torch.ones_like(case.x_t, requires_grad=True)
    pred_xstart = torch.ones_like(case.x_t)
    for written in (case.x_t, pred_xstart):
        loss = (weight * written).sum()
        with torch.no_grad():
            ops.reverse_step(
                *case.args, **case.kwargs, out=case.x_t, pred_xstart=pred_xstart, backend=backend
            )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_clamp_passes_nan_on(device: torch.device, backend: str) -> None:
    case = reverse_step_case(device=device)
    case.args[1][0, 0, 0, 0] = torch.nan
    xstart = torch.empty_like(case.x_t)
    x_prev = ops.reverse_step(*case.args, **case.kwargs, pred_xstart=xstart, backend=backend)
    assert xstart[0, 0, 0, 0].isnan() and x_prev[0, 0, 0, 0].isnan()
    assert int(x_prev.isnan().sum()) == 1


def test_a_mask_chooses_what_is_read(device: torch.device, backend: str) -> None:
    """Where it is 0, what is known may be anything; where it is 1, the network's output may."""
    case = reverse_step_case(masked=True, device=device)
    x_t, output, rows, _ = case.args
    mask = (torch.arange(x_t.numel(), device=device) % 2).to(x_t).reshape(x_t.shape)
    case.kwargs["mask"] = mask
    expected = ops.reverse_step(*case.args, **case.kwargs, backend=backend)
    case.kwargs["known"][mask == 0] = torch.nan
    output[mask == 1] = torch.nan
    assert torch.equal(ops.reverse_step(*case.args, **case.kwargs, backend=backend), expected)

    row = dict(zip(ROW, rows[0], strict=True))
    known, noise = case.kwargs["known"], case.kwargs["noise"]
    kept = row["known_from_x0"] * known + row["known_sigma"] * noise
    torch.testing.assert_close(expected[mask == 1], kept[mask == 1])


def test_what_is_known_is_noised_by_a_step_without_noise(
    device: torch.device, backend: str
) -> None:
    """DDIM's sigma is 0, yet what is known must come as noisy as the rest."""
    case = reverse_step_case(masked=True, seed=2, noise="drawn", device=device)
    case.kwargs["mask"].fill_(1)
    known = ops.reverse_step(*case.args, **case.kwargs, backend=backend)
    row = dict(zip(ROW, case.args[2][2], strict=True))
    assert row["sigma"] == 0
    noise = (known - row["known_from_x0"] * case.kwargs["known"]) / row["known_sigma"]
    assert 0.8 < float(noise.std()) < 1.2 and float(noise.mean().abs()) < 0.2


def test_a_mask_may_be_expanded(device: torch.device, backend: str) -> None:
    case = reverse_step_case(masked=True, noise="drawn", device=device)
    flat = case.kwargs["mask"][:1, :1].clone()
    case.kwargs["mask"] = flat.expand(case.x_t.shape)
    spread = ops.reverse_step(*case.args, **case.kwargs, backend=backend)
    case.kwargs["mask"] = flat.expand(case.x_t.shape).contiguous()
    assert torch.equal(spread, ops.reverse_step(*case.args, **case.kwargs, backend=backend))


@pytest.mark.parametrize("name", ["mask", "guidance_scale", "guidance_factor", "threshold"])
def test_numbers_carry_no_gradient(name: str, device: torch.device, backend: str) -> None:
    options = {"masked": True, "guided": True, "rescaled": True, "thresholded": True}
    case = reverse_step_case(**options, device=device)  # type: ignore[arg-type]
    case.kwargs[name].requires_grad_()
    assert not ops.reverse_step(*case.args, **case.kwargs, backend=backend).requires_grad
    output = case.args[1].requires_grad_()
    ops.reverse_step(*case.args, **case.kwargs, backend=backend).sum().backward()
    assert output.grad is not None and case.kwargs[name].grad is None


def test_zero_coefficients_read_nothing(device: torch.device, backend: str) -> None:
    """Infinite outputs are clamped, and unwritten noise and history do not matter."""
    case = reverse_step_case(x0_prev=True, device=device)
    x_t, output, rows, _ = case.args
    row = dict(zip(ROW, range(len(ROW)), strict=True))
    rows[0, row["mean_from_out"]] = 0
    rows[0, row["mean_from_x0_prev"]] = 0
    rows[0, row["sigma"]] = 0
    output.fill_(torch.inf)
    case.kwargs["noise"].fill_(torch.nan)
    case.kwargs["x0_prev"].fill_(torch.nan)
    step = torch.tensor(0, device=device)
    x_prev = ops.reverse_step(x_t, output, rows, step, **case.kwargs, backend=backend)
    sign = torch.sign(rows[0, row["x0_from_out"]])
    expected = rows[0, row["mean_from_x0"]] * sign + rows[0, row["mean_from_xt"]] * x_t
    torch.testing.assert_close(x_prev, expected)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0)])
def test_empty_batches(shape: tuple[int, ...], device: torch.device, backend: str) -> None:
    case = reverse_step_case(shape, device=device, noise="drawn")
    assert ops.reverse_step(*case.args, **case.kwargs, backend=backend).shape == shape


@pytest.mark.slow
def test_more_than_2_to_31_bytes(device: torch.device, native: str) -> None:
    """Past 2^31 bytes, and past 2^31 elements in float16, offsets need 64 bits."""
    dtype, shape = torch.float16, (1, 2, 2**15, 2**15 + 1)
    x = torch.zeros(shape, dtype=dtype, device=device)
    rows = torch.zeros(1, len(ROW), device=device)
    rows[0, ROW.index("sigma")], rows[0, ROW.index("stream")] = 1, 1
    seed, index = torch.tensor(3, device=device), torch.tensor([5], device=device)
    step = torch.tensor(0, device=device)
    ops.reverse_step(x, x.clone(), rows, step, seed=seed, sample_index=index, out=x, backend=native)
    assert x.numel() > 2**31
    drawn = ops.philox_normal(
        (1, 64), seed=seed, sample_index=index, timestep=step, stream=1, dtype=dtype
    )
    assert torch.equal(x.flatten()[:64], drawn[0])
    # The last elements hold the normals of their own place in the sample.
    counter = torch.tensor([[x.numel() // 4 - 1, 5, 0, 1]])
    w = ops.philox(counter, torch.tensor([[3, 0]]), backend="reference")[0].double()
    radius = (-2 * ((w[2] / 2).floor() * 2.0**-31 + 2.0**-32).log()).sqrt()
    angle = (w[3] / 64).floor() * 2.0**-26 * 2 * torch.pi
    tail = torch.stack([radius * angle.cos(), radius * angle.sin()]).to(dtype)
    torch.testing.assert_close(x.flatten()[-2:].cpu(), tail, rtol=1e-3, atol=0)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("noise", ["given", "drawn", "none"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_gradients(
    learned: bool, noise: str, guided: bool, edited: bool, device: torch.device, backend: str
) -> None:
    options: dict[str, Any] = {"learned": learned, "noise": noise, "guided": guided}
    options |= {"rescaled": edited, "thresholded": edited, "masked": edited}
    options |= {"x0_prev": True, "per_sample": guided}
    case = reverse_step_case((2, 2, 3), dtype=torch.float64, device=device, **options)
    x_t, output, rows, step = case.args
    names = [name for name in ("x0_prev", "noise", "known") if name in case.kwargs]
    tensors = [x_t, output, *(case.kwargs[name] for name in names)]

    def step_of(x: torch.Tensor, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        kwargs = case.kwargs | dict(zip(names, inputs, strict=True))
        return ops.reverse_step(x, out, rows, step, **kwargs, backend=backend)

    assert torch.autograd.gradcheck(step_of, [t.requires_grad_() for t in tensors])


def test_gradients_stop_at_the_clamp(device: torch.device, backend: str) -> None:
    case = reverse_step_case(clip=0.5, noise="none", device=device)
    x_t, output, rows, _ = case.args
    row = dict(zip(ROW, rows[0], strict=True))
    x_prev = ops.reverse_step(
        x_t.requires_grad_(), output.requires_grad_(), *case.args[2:], clip=0.5, backend=backend
    )
    grads = torch.autograd.grad(x_prev.sum(), (x_t, output))
    inside = (row["x0_from_xt"] * x_t + row["x0_from_out"] * output).abs() <= 0.5
    assert 0 < int(inside.sum()) < inside.numel()
    for grad, part in zip(grads, ("xt", "out"), strict=True):
        through_xstart = row["mean_from_x0"] * row[f"x0_from_{part}"]
        torch.testing.assert_close(grad, through_xstart * inside + row[f"mean_from_{part}"])


SOURCES = ("noise", "seed", "sample_index", "x0_prev")
NUMBERS = ("guidance_scale", "guidance_factor", "threshold")
OPTIONS = (*SOURCES, *NUMBERS, "known", "mask", "clip")
OPCHECK_CASES = [
    {"noise": "drawn", "learned": True, "x0_prev": True},
    {"noise": "given", "layout": "channels_last"},
    {"noise": "none", "dtype": torch.bfloat16, "per_sample": True},
    {"noise": "drawn", "guided": True, "rescaled": True, "thresholded": True, "masked": True},
]


@pytest.mark.parametrize("options", OPCHECK_CASES)
@pytest.mark.parametrize("form", ["functional", "in_place", "out"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(
    options: dict[str, Any], form: str, grad: bool, device: torch.device, native: str
) -> None:
    if grad and form != "functional":
        pytest.skip("only the functional form carries gradients")
    case = reverse_step_case(device=device, **options)
    inputs = *case.args, *(case.kwargs.get(name) for name in OPTIONS)
    if grad:
        inputs[0].requires_grad_(), inputs[1].requires_grad_()
    op = torch.ops.ddpm_fast
    out = torch.empty_like(case.x_t)
    written = tuple(written_tensors(case).values())
    if form == "functional":
        torch.library.opcheck(op.reverse_step.default, inputs)
    elif form == "in_place":
        torch.library.opcheck(op.reverse_step_.default, (*inputs, *written))
    else:
        torch.library.opcheck(op.reverse_step.out, (*inputs, out, *written))


@pytest.mark.parametrize(
    "backend",
    ["native", pytest.param("reference", marks=pytest.mark.slow)],  # its graph is of hundreds
    indirect=True,
)
def test_no_recompilation_when_the_batch_changes(device: torch.device, backend: str) -> None:
    torch._dynamo.reset()

    def chain(case: ReverseStepCase) -> torch.Tensor:
        return ops.reverse_step(*case.args, **case.kwargs, backend=backend).mul(2)

    compiled = torch.compile(chain, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 7):
            case = reverse_step_case((batch, 3, 8, 8), noise="drawn", device=device)
            torch.testing.assert_close(compiled(case), chain(case))


def test_random_inputs_are_not_all_alike() -> None:
    """The factory's rows exercise each coefficient: none is zero in the row that tests use most."""
    rows = reverse_step_case().args[2]
    assert (rows[0] != 0).all() and randn((3,), 0).std() > 0

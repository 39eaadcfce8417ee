"""Bad input to the ops: the exact sentence of each case, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from cases import reverse_step_case, written_tensors
from ddpm_fast import ops

Arguments = dict[str, Any]


def step_arguments() -> Arguments:
    case = reverse_step_case((2, 3, 4, 4))
    names = ("x_t", "model_output", "rows", "step")
    return dict(zip(names, case.args, strict=True)) | case.kwargs


def drawn_step_arguments() -> Arguments:
    options = {"x0_prev": True, "guided": True, "rescaled": True, "masked": True}
    case = reverse_step_case((2, 3, 4, 4), noise="drawn", thresholded=True, **options)
    names = ("x_t", "model_output", "rows", "step")
    written = {"out": torch.zeros(2, 3, 4, 4), **written_tensors(case)}
    return dict(zip(names, case.args, strict=True)) | case.kwargs | written


def noising_arguments() -> Arguments:
    x = torch.zeros(2, 3, 4, 4)
    return {"x_start": x, "t": torch.tensor([0, 1]), "rows": torch.zeros(5, 2), "noise": x + 1}


def drawn_noising_arguments() -> Arguments:
    given = noising_arguments()
    del given["noise"]
    return given | {"seed": torch.tensor(0), "sample_index": torch.arange(2)}


def normal_arguments() -> Arguments:
    zero = torch.tensor(0)
    return {"shape": (2, 3), "seed": zero, "sample_index": torch.arange(2), "timestep": zero}


def word_arguments() -> Arguments:
    return {"counter": torch.zeros(2, 4).long(), "key": torch.zeros(2, 2).long()}


class Case(NamedTuple):
    op: Callable[..., Any]
    arguments: Callable[[], Arguments]
    change: Callable[[Arguments], Arguments]
    error: type[Exception]
    sentence: str


def step(change: Callable[[Arguments], Arguments], error: type[Exception], sentence: str) -> Case:
    return Case(ops.reverse_step, step_arguments, change, error, f"reverse_step: {sentence}")


def noising(
    change: Callable[[Arguments], Arguments], error: type[Exception], sentence: str
) -> Case:
    return Case(ops.q_sample, noising_arguments, change, error, f"q_sample: {sentence}")


def normal(change: Callable[[Arguments], Arguments], error: type[Exception], sentence: str) -> Case:
    return Case(ops.philox_normal, normal_arguments, change, error, f"philox_normal: {sentence}")


def word(change: Callable[[Arguments], Arguments], error: type[Exception], sentence: str) -> Case:
    return Case(ops.philox, word_arguments, change, error, f"philox: {sentence}")


SEED = {"seed": torch.tensor(0), "sample_index": torch.arange(2)}
META = torch.zeros(2, 3, 4, 4, device="meta")
WIDE = torch.zeros(2, 3, 8, 8)
INDEX = torch.zeros(4, dtype=torch.int64)
SCALE = torch.ones(1, 1)
GUIDED = {"guidance_scale": SCALE, "model_output": torch.zeros(4, 3, 4, 4)}
FLAT, SHIFTED = (WIDE.flatten()[i : i + 96].view(2, 3, 4, 4) for i in (0, 5))

CASES = [
    step(
        lambda a: {"x_t": a["x_t"].long()},
        TypeError,
        "x_t must be float32, float64, bfloat16 or float16; got int64",
    ),
    step(
        lambda a: {"x_t": a["x_t"][0, 0, 0]},
        ValueError,
        "x_t must have at least two dimensions, [N, C, ...]; got [4]",
    ),
    step(
        lambda a: {"x_t": WIDE[:, :, ::2, ::2]},
        ValueError,
        "x_t must be contiguous or channels_last within each sample; "
        "got shape [2, 3, 4, 4] with strides [192, 64, 16, 2]",
    ),
    step(
        lambda a: {"model_output": a["x_t"].bool()},
        TypeError,
        "model_output must be float32, float64, bfloat16 or float16; got bool",
    ),
    step(
        lambda a: {"model_output": a["x_t"].double()},
        TypeError,
        "model_output and x_t must both be float64, or neither; got float64 and float32",
    ),
    step(
        lambda a: {"x_t": a["x_t"].double()},
        TypeError,
        "model_output and x_t must both be float64, or neither; got float32 and float64",
    ),
    step(
        lambda a: {"model_output": META},
        ValueError,
        "model_output must be on the device of x_t; got meta and cpu",
    ),
    step(
        lambda a: {"model_output": torch.zeros(2, 4, 4, 4)},
        ValueError,
        "model_output must have the shape of x_t, or twice its channels; "
        "got [2, 4, 4, 4] and [2, 3, 4, 4]",
    ),
    step(
        lambda a: {"model_output": WIDE[:, :, ::2, ::2]},
        ValueError,
        "model_output must be contiguous or channels_last within each sample; "
        "got shape [2, 3, 4, 4] with strides [192, 64, 16, 2]",
    ),
    step(lambda a: {"rows": a["rows"].double()}, TypeError, "rows must be float32; got float64"),
    step(
        lambda a: {"rows": a["rows"][:, :12]},
        ValueError,
        "rows must be contiguous with shape [number of rows, 13]; got [5, 12] with strides [13, 1]",
    ),
    step(
        lambda a: {"rows": a["rows"].t().contiguous().t()},
        ValueError,
        "rows must be contiguous with shape [number of rows, 13]; got [5, 13] with strides [1, 5]",
    ),
    step(lambda a: {"step": a["step"].int()}, TypeError, "step must be int64; got int32"),
    step(
        lambda a: {"step": torch.tensor([0, 1, 2])},
        ValueError,
        "step must have shape [] or [2]; got [3]",
    ),
    step(lambda a: {"step": torch.tensor(5)}, IndexError, "step must lie in [0, 4]; got 5"),
    step(lambda a: {"step": torch.tensor([0, -1])}, IndexError, "step must lie in [0, 4]; got -1"),
    step(
        lambda a: {"seed": torch.tensor(0), "noise": None},
        ValueError,
        "seed and sample_index must be given together",
    ),
    step(lambda a: SEED, ValueError, "give noise or a seed, not both"),
    step(
        lambda a: {**SEED, "noise": None, "seed": torch.tensor(0.0)},
        TypeError,
        "seed must be int64; got float32",
    ),
    step(
        lambda a: {**SEED, "noise": None, "sample_index": torch.tensor(0)},
        ValueError,
        "sample_index must have shape [2]; got []",
    ),
    step(
        lambda a: {"noise": a["noise"].bfloat16()},
        TypeError,
        "noise must be float32; got bfloat16",
    ),
    step(
        lambda a: {"noise": a["noise"][:1]},
        ValueError,
        "noise must have the shape of x_t; got [1, 3, 4, 4] and [2, 3, 4, 4]",
    ),
    step(
        lambda a: {"x0_prev": WIDE[:, :, ::2, ::2]},
        ValueError,
        "x0_prev must be contiguous or channels_last within each sample; "
        "got shape [2, 3, 4, 4] with strides [192, 64, 16, 2]",
    ),
    step(lambda a: {"clip": -1.0}, ValueError, "clip must be positive, or None; got -1"),
    step(lambda a: {"threshold": torch.ones(2)}, ValueError, "give clip or threshold, not both"),
    step(
        lambda a: {"threshold": torch.ones(3), "clip": None},
        ValueError,
        "threshold must have shape [2]; got [3]",
    ),
    step(
        lambda a: {"threshold": torch.ones(2).half(), "clip": None},
        TypeError,
        "threshold must be float32; got float16",
    ),
    step(
        lambda a: {"guidance_factor": torch.ones(2)},
        ValueError,
        "guidance_factor needs a guidance_scale",
    ),
    step(
        lambda a: {"guidance_factor": SCALE} | GUIDED,
        ValueError,
        "guidance_factor must have shape [2]; got [1, 1]",
    ),
    step(lambda a: {"known": a["x_t"]}, ValueError, "known and mask must be given together"),
    step(lambda a: {"mask": a["x_t"]}, ValueError, "known and mask must be given together"),
    step(
        lambda a: {"known": a["x_t"], "mask": a["x_t"].bool()},
        TypeError,
        "mask must be float32; got bool",
    ),
    step(
        lambda a: {"known": a["x_t"], "mask": a["x_t"][:, :1]},
        ValueError,
        "mask must have the shape of x_t; got [2, 1, 4, 4] and [2, 3, 4, 4]",
    ),
    step(
        lambda a: {"known": META, "mask": a["x_t"]},
        ValueError,
        "known must be on the device of x_t; got meta and cpu",
    ),
    step(
        lambda a: {"known": FLAT, "mask": a["noise"], "out": FLAT},
        ValueError,
        "out must not overlap the memory of known",
    ),
    step(
        lambda a: {"known": FLAT, "mask": a["noise"], "pred_xstart": a["noise"]},
        ValueError,
        "pred_xstart must not overlap the memory of noise",
    ),
    step(lambda a: {"clip": 0.0}, ValueError, "clip must be positive, or None; got 0"),
    step(lambda a: {"clip": float("nan")}, ValueError, "clip must be positive, or None; got nan"),
    step(
        lambda a: {"out": torch.zeros(2, 3, 4)},
        ValueError,
        "out must have the shape of x_t; got [2, 3, 4] and [2, 3, 4, 4]",
    ),
    step(lambda a: {"out": a["x_t"].half()}, TypeError, "out must be float32; got float16"),
    step(
        lambda a: {"out": torch.zeros(1, 3, 4, 4).expand(2, -1, -1, -1)},
        ValueError,
        "out must not share memory among its elements; got strides [0, 16, 4, 1]",
    ),
    step(
        lambda a: {"model_output": FLAT, "out": SHIFTED},
        ValueError,
        "out must not overlap the memory of model_output",
    ),
    step(
        lambda a: {"x_t": FLAT, "out": SHIFTED},
        ValueError,
        "out must not overlap the memory of x_t",
    ),
    step(lambda a: {"out": a["noise"]}, ValueError, "out must not overlap the memory of noise"),
    step(
        lambda a: {"out": torch.zeros(64).as_strided((2, 3, 4, 4), (16, 16, 4, 1))},
        ValueError,
        "out must not share memory among its elements; got strides [16, 16, 4, 1]",
    ),
    step(
        lambda a: {"pred_xstart": WIDE[:, :, ::2, ::2]},
        ValueError,
        "pred_xstart must be contiguous or channels_last within each sample; "
        "got shape [2, 3, 4, 4] with strides [192, 64, 16, 2]",
    ),
    step(
        lambda a: {"out": FLAT, "pred_xstart": SHIFTED},
        ValueError,
        "pred_xstart must not overlap the memory of out",
    ),
    step(
        lambda a: {"x0_prev": FLAT, "pred_xstart": SHIFTED},
        ValueError,
        "pred_xstart must not overlap the memory of x0_prev",
    ),
    step(
        lambda a: {
            "model_output": FLAT.view(torch.bfloat16)[..., :4].clone(),
            "x0_prev": FLAT,
            "out": FLAT,
        },
        ValueError,
        "out must not overlap the memory of x0_prev",
    ),
    step(
        lambda a: {"pred_xstart": a["x_t"]},
        ValueError,
        "pred_xstart must not overlap the memory of x_t",
    ),
    step(
        lambda a: {"out": WIDE[:, :, :4, :4].contiguous(), "pred_xstart": a["noise"]},
        ValueError,
        "pred_xstart must not overlap the memory of noise",
    ),
    step(
        lambda a: {"guidance_scale": SCALE},
        ValueError,
        "model_output must have twice the samples of x_t, or twice its channels; "
        "got [2, 3, 4, 4] and [2, 3, 4, 4]",
    ),
    step(
        lambda a: {"guidance_scale": SCALE.double(), "model_output": torch.zeros(4, 3, 4, 4)},
        TypeError,
        "guidance_scale must be float32; got float64",
    ),
    step(
        lambda a: {"guidance_scale": SCALE[0], "model_output": torch.zeros(4, 3, 4, 4)},
        ValueError,
        "guidance_scale must have shape [1 or 5, 1 or 2]; got [1]",
    ),
    step(
        lambda a: {"guidance_scale": torch.ones(2, 2), "model_output": torch.zeros(4, 3, 4, 4)},
        ValueError,
        "guidance_scale must have shape [1 or 5, 1 or 2]; got [2, 2]",
    ),
    step(
        lambda a: {"next_input": INDEX},
        TypeError,
        "next_input must be float32, float64, bfloat16 or float16; got int64",
    ),
    step(
        lambda a: {"next_input": a["x_t"].double()},
        TypeError,
        "next_input and x_t must both be float64, or neither; got float64 and float32",
    ),
    step(
        lambda a: {"next_input": torch.zeros(3, 3, 4, 4)},
        ValueError,
        "next_input must have the shape of x_t, or twice its samples; "
        "got [3, 3, 4, 4] and [2, 3, 4, 4]",
    ),
    step(
        lambda a: {"next_input": torch.zeros(1, 3, 4, 4).expand(4, -1, -1, -1)},
        ValueError,
        "next_input must not share memory among its elements; got strides [0, 16, 4, 1]",
    ),
    step(
        lambda a: {"next_input": a["x_t"]},
        ValueError,
        "next_input must not overlap the memory of x_t",
    ),
    step(
        lambda a: {"next_input": a["model_output"]},
        ValueError,
        "next_input must not overlap the memory of model_output",
    ),
    step(
        lambda a: {"out": FLAT, "next_input": SHIFTED},
        ValueError,
        "next_input must not overlap the memory of out",
    ),
    step(lambda a: {"next_step": INDEX[0].int()}, TypeError, "next_step must be int64; got int32"),
    step(
        lambda a: {"next_step": INDEX[:2]},
        ValueError,
        "next_step must have the shape of step; got [2] and []",
    ),
    step(
        lambda a: {"next_step": a["step"]},
        ValueError,
        "next_step must not overlap the memory of step",
    ),
    step(
        lambda a: {"step": INDEX[:2], "next_step": INDEX[:1].expand(2)},
        ValueError,
        "next_step must not share memory among its elements; got strides [0]",
    ),
    step(
        lambda a: {"next_step": INDEX[3], "next_t": INDEX},
        ValueError,
        "next_t must not overlap the memory of next_step",
    ),
    step(lambda a: {"next_t": INDEX[:3]}, ValueError, "next_t must have shape [2] or [4]; got [3]"),
    step(lambda a: {"next_t": INDEX.float()}, TypeError, "next_t must be int64; got float32"),
    step(
        lambda a: {**SEED, "noise": None, "seed": INDEX[1], "next_t": INDEX},
        ValueError,
        "next_t must not overlap the memory of seed",
    ),
    noising(lambda a: {"noise_out": FLAT}, ValueError, "give noise, or noise_out to write it into"),
    noising(
        lambda a: {"out": WIDE},
        ValueError,
        "out must have the shape of x_start; got [2, 3, 8, 8] and [2, 3, 4, 4]",
    ),
    noising(
        lambda a: {"x_start": FLAT, "out": SHIFTED},
        ValueError,
        "out must not overlap the memory of x_start",
    ),
    noising(
        lambda a: {"noise": FLAT, "out": SHIFTED},
        ValueError,
        "out must not overlap the memory of noise",
    ),
    noising(
        lambda a: {**SEED, "noise": None, "noise_out": a["x_start"]},
        ValueError,
        "noise_out must not overlap the memory of x_start",
    ),
    noising(
        lambda a: {**SEED, "noise": None, "out": FLAT, "noise_out": FLAT},
        ValueError,
        "noise_out must not overlap the memory of out",
    ),
    noising(
        lambda a: {**SEED, "noise": None, "noise_out": FLAT.double()},
        TypeError,
        "noise_out must be float32; got float64",
    ),
    noising(
        lambda a: {"x_start": a["x_start"].int()},
        TypeError,
        "x_start must be float32, float64, bfloat16 or float16; got int32",
    ),
    noising(
        lambda a: {"x_start": a["x_start"][0, 0, 0]},
        ValueError,
        "x_start must have at least two dimensions, [N, C, ...]; got [4]",
    ),
    noising(
        lambda a: {"rows": torch.zeros(5, 3)},
        ValueError,
        "rows must be contiguous with shape [number of rows, 2]; got [5, 3] with strides [3, 1]",
    ),
    noising(lambda a: {"t": torch.tensor([0.0, 1.0])}, TypeError, "t must be int64; got float32"),
    noising(lambda a: {"t": torch.tensor([1])}, ValueError, "t must have shape [] or [2]; got [1]"),
    noising(lambda a: {"t": torch.tensor([0, 5])}, IndexError, "t must lie in [0, 4]; got 5"),
    noising(
        lambda a: {"noise": a["noise"].double()}, TypeError, "noise must be float32; got float64"
    ),
    noising(lambda a: {"noise": None}, ValueError, "give noise, or seed and sample_index"),
    noising(lambda a: SEED, ValueError, "give noise or a seed, not both"),
    noising(
        lambda a: {"noise": None, "seed": torch.tensor(0)},
        ValueError,
        "seed and sample_index must be given together",
    ),
    noising(
        lambda a: {"seed": torch.tensor(0), "t": a["t"].int()},
        ValueError,
        "seed and sample_index must be given together",
    ),
    noising(
        lambda a: {"noise": WIDE[:, :, ::2, ::2]},
        ValueError,
        "noise must be contiguous or channels_last within each sample; "
        "got shape [2, 3, 4, 4] with strides [192, 64, 16, 2]",
    ),
    normal(lambda a: {"shape": ()}, ValueError, "shape must have at least one dimension; got []"),
    normal(
        lambda a: {"dtype": torch.int64},
        TypeError,
        "the result must be float32, float64, bfloat16 or float16; got int64",
    ),
    normal(lambda a: {"stream": 65536}, ValueError, "stream must lie in [0, 65535]; got 65536"),
    normal(
        lambda a: {"sample_index": torch.arange(3)},
        ValueError,
        "sample_index must have shape [2]; got [3]",
    ),
    normal(
        lambda a: {"timestep": torch.tensor(0.0)}, TypeError, "timestep must be int64; got float32"
    ),
    word(lambda a: {"counter": a["counter"].int()}, TypeError, "counter must be int64; got int32"),
    word(
        lambda a: {"counter": a["counter"][:, :3]},
        ValueError,
        "counter must have shape [K, 4]; got [2, 3]",
    ),
    word(lambda a: {"key": a["key"][:1]}, ValueError, "key must have shape [2, 2]; got [1, 2]"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.sentence[:60])
def test_sentence(case: Case, backend: str, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the cases lie on the CPU")
    arguments = case.arguments()
    arguments |= case.change(arguments)
    kept = {
        name: a.clone() for name, a in arguments.items() if torch.is_tensor(a) and not a.is_meta
    }
    with pytest.raises(case.error) as error:
        case.op(**arguments, backend=backend)
    assert str(error.value) == case.sentence
    assert all(torch.equal(arguments[name], a) for name, a in kept.items())


@pytest.mark.parametrize("name", ["out", "pred_xstart", "next_input"])
def test_gradients_do_not_flow_through_given_memory(name: str, backend: str) -> None:
    arguments = step_arguments()
    arguments["model_output"].requires_grad_()
    arguments[name] = torch.zeros(2, 3, 4, 4)
    sentence = "reverse_step: what is written into carries no gradient, but a tensor requires one"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        ops.reverse_step(**arguments, backend=backend)
    with torch.no_grad():
        ops.reverse_step(**arguments, backend=backend)


@pytest.mark.parametrize("name", ["out", "noise_out"])
def test_gradients_do_not_flow_through_given_memory_of_q_sample(name: str, backend: str) -> None:
    arguments = drawn_noising_arguments() | {name: torch.zeros(2, 3, 4, 4)}
    arguments["x_start"].requires_grad_()
    sentence = "q_sample: what is written into carries no gradient, but a tensor requires one"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        ops.q_sample(**arguments, backend=backend)
    with torch.no_grad():
        ops.q_sample(**arguments, backend=backend)


@pytest.mark.parametrize("name", ["out", "pred_xstart", "next_input"])
def test_negated_views_are_not_written(name: str, backend: str) -> None:
    view = torch.zeros(2, 3, 4, 4, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError) as error:
        ops.reverse_step(**step_arguments() | {name: view}, backend=backend)
    assert str(error.value) == f"reverse_step: {name} must not be a lazily negated view"


ELSEWHERE = [
    (op, arguments, name)
    for op, arguments in (
        (ops.reverse_step, step_arguments),
        (ops.reverse_step, drawn_step_arguments),
        (ops.q_sample, noising_arguments),
        (ops.q_sample, drawn_noising_arguments),
        (ops.philox_normal, normal_arguments),
        (ops.philox, word_arguments),
    )
    for name in list(arguments())[1:]
    if torch.is_tensor(arguments()[name]) and (op, name) != (ops.philox_normal, "seed")
]


@pytest.mark.parametrize(("op", "arguments", "name"), ELSEWHERE)
def test_tensors_elsewhere_are_refused(
    op: Callable[..., Any], arguments: Callable[[], Arguments], name: str, backend: str
) -> None:
    """No kernel computes with the memory of another device, and no stand-in answers for one."""
    given = arguments()
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError) as error:
        op(**given, backend=backend)
    like = "the result" if op is ops.philox_normal else next(iter(given))
    assert str(error.value) == (
        f"{op.__name__}: {name} must be on the device of {like}; got meta and cpu"
    )


@pytest.mark.cuda
def test_devices_are_not_mixed(backend: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs two devices")
    arguments = {k: v.cuda() if torch.is_tensor(v) else v for k, v in step_arguments().items()}
    with pytest.raises(ValueError) as error:
        ops.reverse_step(**arguments | {"model_output": torch.zeros(2, 3, 4, 4)}, backend=backend)
    assert str(error.value) == (
        "reverse_step: model_output must be on the device of x_t; got cpu and cuda:0"
    )

"""The sampling loop: what it is given, what it leaves alone, and on what its pictures depend."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cases import GaussianModel, walk
from ddpm_fast import GaussianDiffusion, Sampler, ops, sample, sample_progressive
from ddpm_fast.editing import initial_noise
from ddpm_fast.models import LightweightUNet
from ddpm_fast.solvers import SAMPLERS, step_table

SHAPE = (3, 2, 5, 7)
DIFFUSION = GaussianDiffusion.from_schedule("linear", 20, beta_end=0.3)


class ConstantModel(nn.Module):
    """Answers with a learnable constant, and remembers what it was asked."""

    def __init__(self, num_classes: int | None = None, out_channels: int = 2) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.dropout = nn.Dropout(0.9)
        self.num_classes = num_classes
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # The loop overwrites what it passes.
        self.calls.append(
            {"x": x.clone(), "t": t.clone(), "training": self.dropout.training, **kwargs}
        )
        bias = self.bias.reshape(1, -1, *[1] * (x.dim() - 2))
        labels = kwargs.get("class_labels")
        if labels is not None:
            bias = bias + 0.1 * labels.reshape(-1, *[1] * (x.dim() - 1))
        return self.dropout(bias.expand(len(x), -1, *x.shape[2:]))


def draw(model: Any = None, shape: tuple[int, ...] = SHAPE, **options: Any) -> torch.Tensor:
    options = {"diffusion": DIFFUSION, "seed": 0} | options
    return sample(GaussianModel(DIFFUSION) if model is None else model, shape, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(
    sampler: str, device: torch.device, backend: str
) -> None:
    """Sample 17 of seed 0, in a batch of 1 or 64, in any shard: the same bytes.

    Of diffusers#6222 and stable-diffusion-webui#376, #5210, where samplers with noise depend on it.
    """
    options: dict[str, Any] = {"sampler": sampler, "backend": backend, "device": device}
    if sampler == "ddim":
        options["eta"] = 0.5
    whole = draw(shape=(64, *SHAPE[1:]), **options)
    for first, count in ((0, 1), (17, 1), (17, 5), (60, 4)):
        part = draw(shape=(count, *SHAPE[1:]), first_index=first, **options)
        assert torch.equal(part, whole[first : first + count])


def test_a_sampler_draws_from_any_index_in_any_order(device: torch.device, backend: str) -> None:
    options: dict[str, Any] = {"device": device, "backend": backend}
    model = GaussianModel(DIFFUSION)
    run = Sampler(model, SHAPE, diffusion=DIFFUSION, num_steps=5, **options)
    for first in (5, 5, 0, 2**48 - 3, 5):
        expected = draw(model, num_steps=5, first_index=first, **options)
        assert torch.equal(run(seed=0, first_index=first), expected)


def test_a_chain_sees_nothing_of_the_one_before(device: torch.device, backend: str) -> None:
    options: dict[str, Any] = {"device": device, "backend": backend}
    run = Sampler(GaussianModel(DIFFUSION), SHAPE, diffusion=DIFFUSION, **options)
    assert run(x_T=torch.full(SHAPE, torch.nan)).isnan().all()
    assert torch.equal(run(seed=0), draw(**options))


def test_native_and_reference_draw_the_same_pictures(device: torch.device, native: str) -> None:
    ours = draw(backend=native, device=device)
    torch.testing.assert_close(ours, draw(backend="reference", device=device), rtol=0, atol=2e-5)


def test_seeds_differ_and_repeat(backend: str) -> None:
    a, b, c = (draw(seed=seed, backend=backend) for seed in (1, 1, 2**64 - 1))
    assert torch.equal(a, b) and not torch.isclose(a, c).all()


def test_manual_seed_governs_where_no_seed_is_given() -> None:
    drawn = []
    for global_seed in (3, 3, 4):
        torch.manual_seed(global_seed)
        drawn.append(draw(seed=None))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_generator_draws_for_the_last_of_the_first_steps(backend: str) -> None:
    """Noise is switched off by the table's row, and not by its place."""
    table = step_table(DIFFUSION, "ddpm", 5)
    head = replace(table, timesteps=table.timesteps[:2], rows=table.rows[:2])
    generator = torch.Generator().manual_seed(5)
    x = draw(seed=None, generator=generator, sampler=head, backend=backend)

    generator.manual_seed(5)
    x_T, *noise = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    *_, expected = walk(head, GaussianModel(DIFFUSION), x_T, noise)
    torch.testing.assert_close(x, expected)


def test_a_generator_draws_with_randn(backend: str) -> None:
    """The textbook's loop with torch.randn, draw by draw."""
    x = draw(seed=None, generator=torch.Generator().manual_seed(5), backend=backend)
    generator = torch.Generator().manual_seed(5)
    model = GaussianModel(DIFFUSION)
    expected = torch.randn(SHAPE, generator=generator)
    for i in reversed(range(20)):
        t = torch.full((3,), i)
        x0 = DIFFUSION.predict_xstart(expected, t, model(expected, t)).clamp(-1, 1)
        expected = DIFFUSION.q_posterior(x0, expected, t)[0]
        if i > 0:
            noise = torch.randn(SHAPE, generator=generator)
            expected = expected + DIFFUSION.betas[i].sqrt().float() * noise
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_x_T_is_where_it_starts(backend: str) -> None:
    x_T = torch.randn(SHAPE, dtype=torch.float64)
    kept = x_T.clone()
    options: dict[str, Any] = {"sampler": "ddim", "backend": backend}
    a, b = (draw(x_T=x_T, seed=seed, **options) for seed in (0, 1))
    assert torch.equal(a, b) and torch.equal(x_T, kept) and a.dtype == torch.float32


def test_the_network_sees_the_timesteps_in_eval_mode(backend: str) -> None:
    model = ConstantModel()
    draw(model, num_steps=5, timestep_spacing="leading", backend=backend)
    assert [call["t"].tolist() for call in model.calls] == [[t] * 3 for t in (16, 12, 8, 4, 0)]
    assert all(call["t"].dtype == torch.int64 for call in model.calls)
    assert not any(call["training"] for call in model.calls)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_modes_are_put_back_after_an_interruption(error: type[BaseException]) -> None:
    model = ConstantModel()
    model.train()
    model.dropout.eval()
    draw(model)
    assert model.training and not model.dropout.training

    def interrupt(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        draw(model, callback=interrupt)
    assert model.training and not model.dropout.training

    steps = sample_progressive(model, SHAPE, diffusion=DIFFUSION)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training


def test_a_model_in_eval_mode_is_left_alone() -> None:
    written = []

    class Part(nn.Dropout):
        def __setattr__(self, name: str, value: Any) -> None:
            written.append(name)
            super().__setattr__(name, value)

    model = ConstantModel()
    model.dropout = Part()
    model.eval()
    written.clear()
    draw(model)
    assert not written


def test_a_sampler_made_in_inference_mode_serves_outside(backend: str) -> None:
    with torch.inference_mode():
        options: dict[str, Any] = {"known": torch.zeros(SHAPE), "mask": torch.zeros(1)}
        run = Sampler(GaussianModel(DIFFUSION), SHAPE, diffusion=DIFFUSION, **options)
    assert torch.equal(run(seed=0), draw())


def test_runs_that_share_a_model_do_not_disturb_each_other() -> None:
    """Interleaved, and of different lengths: eval mode until the last ends, then as before."""
    model = ConstantModel()
    model.train()
    short, long = (
        sample_progressive(model, SHAPE, diffusion=DIFFUSION, num_steps=n, seed=0) for n in (2, 6)
    )
    for run in (short, long, short, short, long, long, long, long, long, long):
        next(run, None)
    assert len(model.calls) == 8 and not any(call["training"] for call in model.calls)
    assert model.training and model.dropout.training


def test_a_run_that_joins_another_finds_eval_mode_whatever_happened_between() -> None:
    model = ConstantModel().eval()
    first = sample_progressive(model, SHAPE, diffusion=DIFFUSION, num_steps=3)
    next(first)
    model.train()
    second = sample_progressive(model, SHAPE, diffusion=DIFFUSION, num_steps=3)
    next(second)
    assert not model.training and not model.dropout.training
    second.close()
    assert not model.training
    first.close()
    assert model.training and model.dropout.training


@pytest.mark.parametrize("change", ["crop", "transpose", "expand", "input"])
def test_outputs_of_any_layout(change: str, backend: str) -> None:
    """A network may crop what it padded, transpose, expand, or return what it was given."""
    changes: dict[str, Any] = {
        "crop": lambda x, t: nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        "transpose": lambda x, t: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expand": lambda x, t: x[:, :, :1, :1].expand_as(x),
        "input": lambda x, t: x,
    }
    expected = draw(lambda x, t: changes[change](x, t).clone(), backend=backend)
    assert torch.equal(draw(changes[change], backend=backend), expected)


@pytest.mark.parametrize(("output", "kind"), [((1,), "tuple"), (None, "NoneType")])
def test_an_output_that_is_no_tensor_is_named(output: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"^the model must return a tensor; got {kind}$"):
        draw(lambda x, t: output)


def test_integers_of_any_make() -> None:
    expected = draw(seed=5, first_index=2)
    for make in (np.int32, np.uint64, torch.tensor):
        x = draw(shape=torch.Size(SHAPE), seed=make(5), first_index=make(2))
        assert torch.equal(x, expected)
    with pytest.raises(TypeError):
        draw(seed=1.0)


def test_samples_are_ordinary_tensors(backend: str) -> None:
    """No gradient recorded, yet fit for autograd, unlike tensors of inference mode."""
    model = ConstantModel()
    x = draw(model, backend=backend)
    assert not x.requires_grad and not x.is_inference()
    (x * model.bias.reshape(1, 2, 1, 1)).sum().backward()
    assert model.bias.grad is not None and torch.is_grad_enabled()


def test_progressive_is_sample_step_by_step(backend: str) -> None:
    model = GaussianModel(DIFFUSION)
    steps = list(sample_progressive(model, SHAPE, diffusion=DIFFUSION, seed=0, backend=backend))
    assert [step for step, _, _ in steps] == list(range(20))
    assert torch.equal(steps[-1][1], draw(backend=backend))
    # The last step leads to its own prediction of x_start, which is clamped.
    torch.testing.assert_close(steps[-1][1], steps[-1][2])
    assert all(xstart.abs().max() <= 1 for _, _, xstart in steps)
    assert len({x.data_ptr() for _, x, _ in steps}) == 20
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_walks_the_table(sampler: str, backend: str) -> None:
    """A table runs as its rows say, history included; given by name, by itself, or step by step."""
    table = step_table(DIFFUSION, sampler, 7)
    options: dict[str, Any] = {"backend": backend, "x_T": initial_noise(SHAPE, seed=0)}
    expected = draw(sampler=sampler, num_steps=7, **options)
    assert torch.equal(draw(sampler=table, **options), expected)
    model = GaussianModel(DIFFUSION)
    options |= {"diffusion": DIFFUSION, "sampler": table}
    progressive = sample_progressive(model, SHAPE, seed=0, **options)
    assert torch.equal(list(progressive)[-1][1], expected)

    rows = table.to(torch.device("cpu"), torch.float32)
    x, history = options["x_T"], None
    noise: dict[str, Any] = {"seed": torch.tensor(0), "sample_index": torch.arange(len(x))}
    for step, t in enumerate(table.timesteps):
        xstart = torch.empty_like(x)
        output = model(x, torch.full((len(x),), t))
        index = torch.tensor(step)
        x = ops.reverse_step(
            x, output, rows, index, x0_prev=history, pred_xstart=xstart, **noise, backend=backend
        )
        history = xstart
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    "option", [{"num_steps": 5}, {"eta": 1.0}, {"timestep_spacing": "leading"}]
)
def test_a_table_settles_its_steps(option: dict[str, Any]) -> None:
    sentence = "a step table settles num_steps, eta and timestep_spacing itself"
    with pytest.raises(ValueError, match=sentence):
        draw(sampler=step_table(DIFFUSION, "ddim", 5), **option)


def test_progressive_refuses_at_the_call() -> None:
    with pytest.raises(ValueError, match="sampler must be one of"):
        sample_progressive(ConstantModel(), SHAPE, sampler="euler")


def test_callback_sees_every_step(backend: str) -> None:
    seen: list[tuple[int, int, float]] = []
    x = draw(
        num_steps=4,
        backend=backend,
        callback=lambda step, t, x, xstart: seen.append((step, t, float(x.mean()))),
    )
    assert [(step, t) for step, t, _ in seen] == [(0, 19), (1, 14), (2, 9), (3, 4)]
    assert seen[-1][2] == float(x.mean())


def test_labels_and_keywords_reach_the_network() -> None:
    model = ConstantModel(num_classes=10)
    for labels in ([1, 2, 3], torch.tensor([1, 2, 3]), 7):
        draw(model, num_steps=1, class_labels=labels, model_kwargs={"flag": "yes"})
        call = model.calls[-1]
        assert call["flag"] == "yes" and call["class_labels"].dtype == torch.int64
        assert call["class_labels"].tolist() == (
            [7, 7, 7] if isinstance(labels, int) else [1, 2, 3]
        )


def test_guidance_mixes_outputs_before_the_clamp(backend: str) -> None:
    """uncond + w (cond - uncond): here 0.1 (10 + w (label - 10)) for every element."""
    diffusion = GaussianDiffusion.from_schedule(
        "linear", 20, prediction_type="sample", clip_denoised=True
    )
    model = ConstantModel(num_classes=10)
    options: dict[str, Any] = {"diffusion": diffusion, "num_steps": 1, "backend": backend}
    x = draw(model, class_labels=[10, 9, 8], guidance_scale=3.0, **options)
    assert model.calls[-1]["class_labels"].tolist() == [10, 9, 8, 10, 10, 10]
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([1.0, 0.7, 0.4]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_the_networks_not_the_states(
    precision: str, device: torch.device, backend: str
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 2, 3, padding=1).to(device)
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = model(x)
        seen.append(output.dtype)
        return output

    options: dict[str, Any] = {"device": device, "backend": backend}
    exact = draw(network, **options)
    x = draw(network, precision=precision, **options)
    assert x.dtype == torch.float32
    assert seen[-1] == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.testing.assert_close(x, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_models_dtype(dtype: torch.dtype, backend: str) -> None:
    """A float64 model gets a float64 state; a half-precision one a float32 state, cast for it."""
    model = ConstantModel().to(dtype)
    x = draw(model, backend=backend)
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(call["x"].dtype == dtype for call in model.calls)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_learned_variance_reads_twice_the_channels(
    variance_type: str, sampler: str, backend: str
) -> None:
    diffusion = GaussianDiffusion(variance_type=variance_type)
    options: dict[str, Any] = {"diffusion": diffusion, "num_steps": 5, "sampler": sampler}
    x = draw(ConstantModel(out_channels=4), backend=backend, **options)
    assert x.shape == SHAPE and x.isfinite().all()
    sentence = "a learned variance needs a model with 4 output channels; got 2"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        draw(ConstantModel(), backend=backend, **options)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 9), (2, 1, 4, 4), (1, 2, 3, 4, 5)])
def test_any_number_of_dimensions(shape: tuple[int, ...], backend: str) -> None:
    x = draw(shape=shape, backend=backend)
    assert x.shape == shape and x.isfinite().all() and x.abs().max() <= 1


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    draw(num_steps=3, progress=True)
    captured = capsys.readouterr()
    assert "3/3" in captured.err and captured.out == ""
    draw(num_steps=3)
    assert capsys.readouterr().err == ""


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"shape": (3,)}, "shape must be (N, C, ...), each at least 1; got (3,)"),
    ({"shape": (0, 3, 4)}, "shape must be (N, C, ...), each at least 1; got (0, 3, 4)"),
    ({"seed": -1}, "seed must lie in [0, 2**64); got -1"),
    ({"seed": 2**64}, f"seed must lie in [0, 2**64); got {2**64}"),
    ({"generator": torch.Generator()}, "give seed or generator, not both"),
    ({"first_index": -1}, "first_index must lie in [0, 2**48 - 3]; got -1"),
    ({"first_index": 2**48 - 2}, f"first_index must lie in [0, 2**48 - 3]; got {2**48 - 2}"),
    ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, dpmpp_2m; got 'euler'"),
    ({"num_steps": 0}, "num_steps must lie in [1, 20]; got 0"),
    ({"eta": 0.1}, "eta belongs to ddim; got 0.1 for ddpm"),
    ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16; got 'int8'"),
    ({"backend": "cuda"}, "backend must be one of auto, native, reference; got 'cuda'"),
    ({"x_T": torch.zeros(1, 2)}, "x_T must have shape [3, 2, 5, 7]; got [1, 2]"),
    (
        {"x_T": torch.zeros(SHAPE, dtype=torch.int64)},
        "x_T must hold floating-point numbers; got torch.int64",
    ),
    ({"class_labels": [1, 2]}, "class_labels must have shape [3]; got [2]"),
    ({"class_labels": [0.5] * 3}, "class_labels must be integers; got torch.float32"),
    (
        {"class_labels": [0, 1, 11]},
        "class_labels must lie in [0, 9], or be the null label 10",
    ),
    ({"guidance_scale": 2.0}, "guidance_scale needs class_labels to guide towards"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be finite; got nan"),
    (
        {"class_labels": 1, "model_kwargs": {"class_labels": 2}},
        "give class_labels by itself or in model_kwargs, not both",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_OPTIONS, ids=lambda x: str(x)[:40])
def test_bad_options_are_refused_before_any_work(options: dict[str, Any], sentence: str) -> None:
    model = ConstantModel(num_classes=10)
    with pytest.raises(ValueError) as error:
        draw(model, **options)
    assert str(error.value) == sentence and not model.calls


def test_guidance_needs_a_null_label() -> None:
    with pytest.raises(ValueError, match=r"^guidance_scale needs a model with num_classes"):
        draw(ConstantModel(), class_labels=1, guidance_scale=2.0)


def test_a_network_of_another_shape_is_named(backend: str) -> None:
    with pytest.raises(ValueError, match=r"^reverse_step: model_output must have the shape of x_t"):
        draw(ConstantModel(out_channels=3), backend=backend)


def test_interrupted_runs_go_on_where_they_were(backend: str) -> None:
    """Half of the steps now, the other half from the state reached: the same picture."""
    model = GaussianModel(DIFFUSION)
    diffusion = GaussianDiffusion(DIFFUSION.betas, variance_type="fixed_large")
    options: dict[str, Any] = {"diffusion": diffusion, "seed": 0, "backend": backend}
    whole = sample(model, SHAPE, **options)
    half = itertools.islice(sample_progressive(model, SHAPE, **options), 10)
    *_, (_, x, _) = half
    rest = sample(model, SHAPE, x_T=x, timestep_spacing=list(range(10))[::-1], **options)
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-6)


def test_a_sampler_draws_what_sample_draws(device: torch.device, backend: str) -> None:
    """Batch after batch from the same buffers, which none of the pictures handed out shares."""
    options: dict[str, Any] = {"diffusion": DIFFUSION, "device": device, "backend": backend}
    model = GaussianModel(DIFFUSION)
    sampler = Sampler(model, SHAPE, **options)
    calls = [{"seed": 0}, {"seed": 1, "first_index": 7}, {"seed": 0}, {"x_T": torch.ones(SHAPE)}]
    drawn = [sampler(**{"seed": 3} | call) for call in calls]
    for call, x in zip(calls, drawn, strict=True):
        assert torch.equal(x, sample(model, SHAPE, **options, **{"seed": 3} | call))


def test_the_loop_allocates_nothing(backend: str) -> None:
    """The network is called with the same two tensors at every step of every batch."""
    seen = set()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.add((x.data_ptr(), t.data_ptr()))
        return torch.zeros_like(x)

    sampler = Sampler(network, SHAPE, diffusion=DIFFUSION, backend=backend)
    sampler(seed=0)
    sampler(seed=1)
    assert len(seen) == 1


def test_channels_last_models_are_fed_channels_last(device: torch.device, backend: str) -> None:
    model = LightweightUNet(2, 8, 2).to(device)
    layouts = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    plain = draw(model, backend=backend)
    model.to(memory_format=torch.channels_last).register_forward_pre_hook(look)
    watched = draw(model, backend=backend, callback=lambda *_: None)  # of a graph no hook hears
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-4)
    assert all(layouts) and len(layouts) == 20


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_pictures(device: torch.device, backend: str) -> None:
    model = LightweightUNet(2, 8, 2).to(device)
    compiled = draw(model, compile=True, backend=backend)
    torch.testing.assert_close(compiled, draw(model, backend=backend), rtol=0, atol=1e-4)

"""The drop-in schedulers against diffusers' own: the same numbers, from the same generators."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cases import laid_out, randn
from conftest import waiting_is_an_error
from ddpm_fast.integrations import schedulers
from ddpm_fast.integrations.schedulers import FusedDDIMScheduler, FusedDDPMScheduler

PAIRS = [(DDPMScheduler, FusedDDPMScheduler), (DDIMScheduler, FusedDDIMScheduler)]
FUSED = [FusedDDPMScheduler, FusedDDIMScheduler]
HALVES = (torch.bfloat16, torch.float16)

# What two orders of rounding may differ by, relative to the size of the state.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 3e-3}

shared_configs = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.sampled_from([7, 50, 1000]),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([0.5, 1.0, 3.0]),
        "thresholding": st.sampled_from([False, False, True]),
        "dynamic_thresholding_ratio": st.sampled_from([0.3, 0.995, 1.0]),
        "sample_max_value": st.sampled_from([0.5, 1.0, 2.5]),
        "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
        "steps_offset": st.sampled_from([0, 1]),
        "rescale_betas_zero_snr": st.booleans(),
    }
)
VARIANCE_TYPES = [
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "learned",
    "learned_range",
    "a word that diffusers does not know",
]


def in_dtype(scheduler: Any, dtype: torch.dtype) -> Any:
    """The scheduler with tables of another type; one of its constructor's are float32."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(dtype)
    else:
        scheduler.one = scheduler.one.to(dtype)
    return scheduler


def start(scheduler: Any, run: dict[str, Any]) -> None:
    if run:
        scheduler.set_timesteps(**run)
    assume(int(scheduler.timesteps.max()) < len(scheduler))


def assert_matches(ours: Any, theirs: Any, size: float, gain: float) -> None:
    """``gain``: how much larger than x_t the predicted x_0, and with it each rounding, can be."""
    assert type(ours) is type(theirs)
    for name in ("prev_sample", "pred_original_sample"):
        mine, expected = ours[name], theirs[name]
        assert mine.dtype == expected.dtype and mine.shape == expected.shape
        bound = size * max(TOLERANCE[mine.dtype], 8 * torch.finfo(mine.dtype).eps * gain)
        torch.testing.assert_close(mine, expected, rtol=0, atol=bound, equal_nan=True)


def gain_at(scheduler: Any, t: int) -> float:
    signal = float(scheduler.alphas_cumprod[t]) ** 0.5
    return 1 / signal if scheduler.config.prediction_type == "epsilon" and signal > 0 else 1.0


def assume_finite(config: dict[str, Any]) -> None:
    """Where no signal is left to divide by, diffusers' x_0 is finite only behind its clamp."""
    divides = config["rescale_betas_zero_snr"] and config["prediction_type"] == "epsilon"
    assume(not divides or (config["clip_sample"] and not config["thresholding"]))


shapes = st.sampled_from([(1, 1, 1), (2, 3, 4, 5), (3, 2, 6), (2, 4, 1)])
layouts = st.sampled_from(["contiguous", "channels_last", "slice_of_channels", "cropped"])
dtypes = st.sampled_from([torch.float32, torch.float64, *HALVES])


def laid(x: Tensor, layout: str) -> Tensor:
    """As :func:`cases.laid_out`, or a crop, which no kernel walks."""
    if layout != "cropped" or x.dim() < 4:
        return laid_out(x, layout)
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    padded[..., 1:-2] = x
    return padded[..., 1:-2]


def generators(kind: str, samples: int) -> Any:
    if kind == "one":
        return torch.Generator().manual_seed(7)
    return [torch.Generator().manual_seed(7 + n) for n in range(samples)]


@given(
    config=shared_configs,
    variance_type=st.sampled_from(VARIANCE_TYPES),
    run=st.sampled_from(["none", "steps", "custom"]),
    shape=shapes,
    layout=layouts,
    dtype=dtypes,
    form=st.sampled_from(["int", "tensor", "one-element tensor"]),
    kind=st.sampled_from(["one", "list"]),
    data=st.data(),
)
def test_ddpm_step_is_that_of_diffusers(
    config: dict[str, Any],
    variance_type: str,
    run: str,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    form: str,
    kind: str,
    data: st.DataObject,
) -> None:
    assume_finite(config)
    config |= {"variance_type": variance_type}
    train = config["num_train_timesteps"]
    options: dict[str, Any] = {}
    if run == "steps":
        options["num_inference_steps"] = data.draw(st.integers(1, train))
    if run == "custom":
        chosen = data.draw(st.sets(st.integers(0, train - 1), min_size=1, max_size=9))
        options["timesteps"] = sorted(chosen, reverse=True)
    theirs, ours = DDPMScheduler(**config), FusedDDPMScheduler(**config)
    for scheduler in (theirs, ours):
        in_dtype(scheduler, torch.float64 if dtype == torch.float64 else torch.float32)
        start(scheduler, options)

    channels = shape[1] * (2 if variance_type.startswith("learned") else 1)
    x_t = laid(randn(shape, 1, dtype), layout)
    output = randn((shape[0], channels, *shape[2:]), 2, dtype)
    output[:, shape[1] :] = output[:, shape[1] :].tanh()  # between the ends of the range
    if variance_type == "learned":
        output[:, shape[1] :].abs_()
    output = laid(output, layout)
    kept = x_t.clone(), output.clone()
    t = data.draw(st.sampled_from(list(theirs.timesteps)))
    given_t = {"int": int(t), "tensor": t, "one-element tensor": t[None]}[form]
    if form == "one-element tensor":
        assume(dtype not in HALVES)  # diffusers' result is float32 then
    results = [
        scheduler.step(output, given_t, x_t, generator=generators(kind, shape[0]))
        for scheduler in (ours, theirs)
    ]
    assert_matches(*results, size=10.0, gain=gain_at(theirs, int(t)))
    assert torch.equal(x_t, kept[0]) and torch.equal(output, kept[1])


@given(
    config=shared_configs,
    set_alpha_to_one=st.booleans(),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    clipped=st.sampled_from([False, True, None]),
    shape=shapes,
    layout=layouts,
    dtype=dtypes,
    noise=st.sampled_from(["one", "list", "given"]),
    data=st.data(),
)
def test_ddim_step_is_that_of_diffusers(
    config: dict[str, Any],
    set_alpha_to_one: bool,
    eta: float,
    clipped: bool | None,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    noise: str,
    data: st.DataObject,
) -> None:
    assume_finite(config)
    config |= {"set_alpha_to_one": set_alpha_to_one}
    steps = data.draw(st.integers(1, config["num_train_timesteps"]))
    theirs, ours = DDIMScheduler(**config), FusedDDIMScheduler(**config)
    for scheduler in (theirs, ours):
        in_dtype(scheduler, torch.float64 if dtype == torch.float64 else torch.float32)
        start(scheduler, {"num_inference_steps": steps})

    x_t = laid(randn(shape, 1, dtype), layout)
    output = laid(randn(shape, 2, dtype), layout)
    kept = x_t.clone(), output.clone()
    # DDIM takes any timestep, visited or not.
    t = data.draw(st.integers(0, config["num_train_timesteps"] - 1) | st.just(0))
    results = []
    for scheduler in (ours, theirs):
        options: dict[str, Any] = {"eta": eta, "use_clipped_model_output": clipped}
        if noise == "given":
            options["variance_noise"] = laid(randn(shape, 3, dtype), layout)
        else:
            options["generator"] = generators(noise, shape[0])
        results.append(scheduler.step(output, t, x_t, **options))
    # eps is the larger, the less noise it is derived from.
    beta_bar = 1 - float(theirs.alphas_cumprod[t])
    gain = gain_at(theirs, t) * (1 if beta_bar == 0 else beta_bar**-0.5)
    assert_matches(*results, size=10.0, gain=gain)
    assert torch.equal(x_t, kept[0]) and torch.equal(output, kept[1])


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_a_run_that_ends_above_0_ends_in_noise_as_in_diffusers(variance_type: str) -> None:
    """Their gate is t > 0; a posterior variance of 0 is 1e-20 to them."""
    channels = 6 if variance_type.startswith("learned") else 3
    x, output = randn((2, 3, 4), 0), randn((2, channels, 4), 1).sigmoid()
    results = []
    for cls in (FusedDDPMScheduler, DDPMScheduler):
        scheduler = cls(variance_type=variance_type)
        scheduler.set_timesteps(timesteps=[100, 40])
        results.append(scheduler.step(output, 40, x, generator=torch.Generator().manual_seed(0)))
    assert_matches(*results, size=1.0, gain=1.0)


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995])
@pytest.mark.parametrize("ceiling", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_thresholds_are_those_of_diffusers(
    plain: Any,
    fused: Any,
    prediction_type: str,
    ratio: float,
    ceiling: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of samples whose largest values lie below 1, between 1 and the ceilings, and above."""
    sizes = torch.tensor([0.1, 1.0, 20.0]).reshape(3, 1, 1, 1)
    x = (sizes * randn((3, 2, 5, 5), 0)).to(dtype)
    output = (sizes * randn((3, 2, 5, 5), 1)).to(dtype)
    config = {
        "prediction_type": prediction_type,
        "thresholding": True,
        "dynamic_thresholding_ratio": ratio,
        "sample_max_value": ceiling,
        "clip_sample_range": 0.1,  # has no say
    }
    options = [{}]
    if plain is DDIMScheduler:
        options = [{"eta": 0.5, "use_clipped_model_output": clipped} for clipped in (False, True)]
    theirs, ours = started(plain, **config), started(fused, **config)
    for option in options:
        expected, result = (
            scheduler.step(output, 300, x, generator=torch.Generator().manual_seed(0), **option)
            for scheduler in (theirs, ours)
        )
        for name in ("prev_sample", "pred_original_sample"):
            mine, wanted = (each[name].double() / sizes.clamp(min=1) for each in (result, expected))
            # Theirs rounds to a half after each operation, values above 1 more coarsely.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(mine, wanted, rtol=eps, atol=TOLERANCE[dtype])
    monkeypatch.setattr(plain, "step", lambda *_, **__: pytest.fail("diffusers was asked"))
    ours.step(output, 300, x, **options[-1])


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_step_from_no_signal_is_that_of_diffusers(
    plain: Any, fused: Any, prediction_type: str
) -> None:
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    results = []
    for cls in (fused, plain):
        scheduler = cls(
            rescale_betas_zero_snr=True,
            prediction_type=prediction_type,
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(10)
        results.append(scheduler.step(output, 999, x, generator=torch.Generator().manual_seed(0)))
    assert scheduler.alphas_cumprod[999] == 0
    assert_matches(*results, size=1.0, gain=1.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_coefficients_are_those_of_diffusers(prediction_type: str, variance_type: str) -> None:
    """Whole float64 chains by the float32 tables: no coefficient differs in its float32 bits."""
    config = {"prediction_type": prediction_type, "variance_type": variance_type}
    x = y = randn((2, 3, 4), 0, torch.float64)
    theirs, ours = DDPMScheduler(**config), FusedDDPMScheduler(**config)
    for t in range(999, -1, -1):
        x = theirs.step(x.tanh(), t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        y = ours.step(y.tanh(), t, y, generator=torch.Generator().manual_seed(t)).prev_sample
    torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 10, 61, 1000])
def test_loops_are_those_of_diffusers(plain: Any, fused: Any, spacing: str, steps: int) -> None:
    """61 steps of "trailing" are 62 to diffusers, the last at t = -1, and so to the drop-in."""
    options = {"eta": 0.5} if plain is DDIMScheduler else {}
    ends = []
    for cls in (fused, plain):
        scheduler = cls(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(3)
        x = randn((2, 3, 8, 8), 0)
        for t in scheduler.timesteps:
            x = scheduler.step(x.tanh(), t, x, generator=generator, **options).prev_sample
        ends.append((x, generator.get_state()))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-5)
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fused", FUSED)
def test_halves_are_rounded_once(fused: Any, dtype: torch.dtype) -> None:
    x, output = randn((2, 3, 8, 8), 0, dtype), randn((2, 3, 8, 8), 1, dtype)
    scheduler = fused(num_train_timesteps=10)
    scheduler.set_timesteps(10)
    narrow = scheduler.step(output, 0, x)
    wide = scheduler.step(output.float(), 0, x.float())
    assert torch.equal(narrow.prev_sample, wide.prev_sample.to(dtype))
    assert torch.equal(narrow.pred_original_sample, wide.pred_original_sample.to(dtype))


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_mixed_dtypes_are_promoted_as_in_diffusers(
    plain: Any,
    fused: Any,
    sample_dtype: torch.dtype,
    output_dtype: torch.dtype,
    prediction_type: str,
) -> None:
    x, output = randn((2, 3, 4), 0, sample_dtype), randn((2, 3, 4), 1, output_dtype)
    results = []
    for cls in (fused, plain):
        scheduler = started(cls, prediction_type=prediction_type)
        noise = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, 100, x, generator=noise, return_dict=False))
    tolerance = max(TOLERANCE[sample_dtype], TOLERANCE[output_dtype])
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@given(
    shape=shapes,
    layout=layouts,
    dtype=dtypes,
    noise_dtype=dtypes,
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    one_for_all=st.booleans(),
    data=st.data(),
)
def test_noising_is_that_of_diffusers(
    plain: Any,
    fused: Any,
    method: str,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    noise_dtype: torch.dtype,
    index_dtype: torch.dtype,
    one_for_all: bool,
    data: st.DataObject,
) -> None:
    x, noise = laid(randn(shape, 0, dtype), layout), laid(randn(shape, 1, noise_dtype), layout)
    count = 1 if one_for_all else shape[0]
    drawn = data.draw(st.lists(st.integers(0, 999), min_size=count, max_size=count))
    t = torch.tensor(drawn, dtype=index_dtype)
    mine, expected = (getattr(cls(), method)(x, noise, t) for cls in (fused, plain))
    assert mine.dtype == expected.dtype
    tolerance = 4 * max(torch.finfo(d).eps for d in (dtype, noise_dtype))
    torch.testing.assert_close(mine, expected, rtol=0, atol=5 * tolerance)


@pytest.mark.parametrize("fused", FUSED)
def test_noising_leaves_the_table_where_it_is(fused: Any) -> None:
    scheduler = fused()
    table = scheduler.alphas_cumprod
    scheduler.add_noise(randn((1, 3, 4), 0), randn((1, 3, 4), 1), torch.tensor([3]))
    assert scheduler.alphas_cumprod is table


def test_fixed_large_log_is_fixed_large() -> None:
    """In diffusers it is the square root of a logarithm: NaN (huggingface/diffusers#14569)."""
    x, output = randn((1, 3, 4), 0), randn((1, 3, 4), 1)
    theirs, ours, plain = (
        cls(variance_type=name).step(output, 500, x, generator=torch.Generator().manual_seed(0))
        for cls, name in [
            (DDPMScheduler, "fixed_large_log"),
            (FusedDDPMScheduler, "fixed_large_log"),
            (DDPMScheduler, "fixed_large"),
        ]
    )
    assert theirs.prev_sample.isnan().all()
    torch.testing.assert_close(ours.prev_sample, plain.prev_sample)


# Noise without a generator.


def stepped(scheduler: Any, x: Tensor, t: int = 500) -> Tensor:
    options = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
    prev_sample: Tensor = scheduler.step(x, t, x, **options, return_dict=False)[0]
    return prev_sample


def started(fused: Any, **config: Any) -> Any:
    scheduler = fused(**config)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("fused", FUSED)
def test_no_two_steps_share_noise(fused: Any) -> None:
    scheduler, x = started(fused), randn((2, 3, 4), 0)
    drawn = [stepped(scheduler, x) for _ in range(3)]
    scheduler.set_timesteps(10)
    drawn += [stepped(scheduler, x), stepped(started(fused), x)]
    flat = torch.cat(drawn).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


@pytest.mark.parametrize("fused", FUSED)
def test_manual_seed_governs(fused: Any) -> None:
    scheduler, x = started(fused), randn((4, 3, 4), 0)
    runs = []
    for samples in (4, 4, 2):
        torch.manual_seed(5)
        runs.append([stepped(scheduler, x[:samples], t) for t in (900, 800)])
    for first, again, fewer in zip(*runs, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first[:2], fewer)  # a sample's noise does not depend on its batch


@pytest.mark.parametrize("fused", FUSED)
def test_noise_is_drawn_as_widely_as_by_diffusers(fused: Any) -> None:
    """Beside the generator's step, of which the mean and the scale are tested above."""
    torch.manual_seed(0)
    scheduler = started(fused)
    x = torch.zeros(1, 1, 100_000)
    options = {"eta": 1.0} if fused is FusedDDIMScheduler else {}
    drawn = scheduler.step(x, 500, x, **options).prev_sample
    given_noise = scheduler.step(x, 500, x, generator=torch.Generator().manual_seed(0), **options)
    expected = given_noise.prev_sample
    # Six standard errors of the mean, and of the standard deviation, of 100,000 normals.
    assert abs(float(drawn.mean() / drawn.std())) < 6 * 100_000**-0.5
    assert abs(float(drawn.std() / expected.std()) - 1) < 6 * 100_000**-0.5


@pytest.mark.parametrize("fused", FUSED)
def test_only_noise_without_a_generator_moves_the_global_one(fused: Any) -> None:
    scheduler, x = started(fused), randn((1, 3, 4), 0)
    options = {"eta": 1.0} if fused is FusedDDIMScheduler else {}
    before = torch.get_rng_state()
    scheduler.step(x, 500, x, generator=torch.Generator(), **options)
    scheduler.step(x, 0, x)
    scheduler.add_noise(x, x, torch.tensor([3]))
    assert torch.equal(torch.get_rng_state(), before)
    stepped(scheduler, x)
    assert not torch.equal(torch.get_rng_state(), before)


# Tables and devices.


@pytest.mark.parametrize("fused", FUSED)
def test_tables_are_made_once_for_a_run(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, x = started(fused), randn((1, 3, 4), 0)
    made = []
    make = fused._columns
    monkeypatch.setattr(fused, "_columns", lambda *a: made.append(1) or make(*a))
    for _ in range(2):
        for t in scheduler.timesteps:
            stepped(scheduler, x, t)
    assert len(made) == 1


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("change", ["set_timesteps", "alphas_cumprod", "config"])
def test_tables_follow_the_scheduler(plain: Any, fused: Any, change: str) -> None:
    x, output = randn((1, 3, 4), 0), randn((1, 3, 4), 1)
    results = []
    for cls in (fused, plain):
        scheduler = started(cls)
        scheduler.step(output, 0, x)
        if change == "set_timesteps":
            scheduler.set_timesteps(4)
        elif change == "alphas_cumprod":
            scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
        else:
            scheduler.register_to_config(prediction_type="v_prediction", clip_sample=False)
        results.append(
            scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("thresholding", [False, True])
def test_a_timestep_on_the_device_is_not_read(
    fused: Any, thresholding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the kernel: nothing can be read of a meta tensor, as nothing should be on a GPU."""
    monkeypatch.setattr(schedulers, "reverse_step", lambda x, *_, **__: torch.empty_like(x))
    x = torch.empty(2, 3, 4, device="meta")
    scheduler = started(fused, thresholding=thresholding)
    t = torch.empty((), dtype=torch.int64, device="meta")
    assert stepped(scheduler, x, t).shape == x.shape


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_a_timestep_that_is_not_read_has_no_noise_at_0(
    variance_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, x = FusedDDPMScheduler(variance_type=variance_type), randn((2, 3, 4), 0)
    output = torch.cat([x, x], dim=1) if variance_type == "learned_range" else x
    t = torch.tensor(0)
    read = scheduler.step(output, t, x).prev_sample
    monkeypatch.setattr(schedulers, "_read", lambda timestep, _: timestep)
    assert torch.equal(scheduler.step(output, t, x).prev_sample, read)


def test_a_timestep_that_is_neither_read_nor_passed_gives_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler, x = started(FusedDDPMScheduler), randn((2, 3, 4), 0)
    monkeypatch.setattr(schedulers, "_read", lambda timestep, _: timestep)
    assert scheduler.step(x, torch.tensor(501), x).prev_sample.isnan().all()


def test_visited_timesteps_are_known_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = started(FusedDDPMScheduler)
    timesteps = list(scheduler.timesteps[2:])
    assert scheduler._number(timesteps[0].clone()) == 700
    monkeypatch.setattr(Tensor, "__int__", lambda _: pytest.fail("was read"), raising=False)
    assert [scheduler._number(t) for t in timesteps] == [700, 600, 500, 400, 300, 200, 100, 0]


@pytest.mark.cuda
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("thresholding", [False, True])
def test_a_run_on_a_gpu_waits_for_nothing(fused: Any, seeded: bool, thresholding: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    scheduler = fused(thresholding=thresholding)
    scheduler.set_timesteps(5, device="cuda")
    x = torch.zeros(2, 3, 8, 8, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0) if seeded else None
    options = {"eta": 1.0} if fused is FusedDDIMScheduler else {}
    scheduler.step(x, scheduler.timesteps[0], x, generator=generator, **options)
    with waiting_is_an_error():
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x, generator=generator, **options).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("fused", FUSED)
def test_all_forms_of_a_timestep_are_one(fused: Any, dtype: torch.dtype) -> None:
    scheduler, x = started(fused), randn((2, 3, 4), 0)
    t = torch.tensor(500, dtype=dtype)
    forms = [
        scheduler.step(x, form, x, generator=torch.Generator().manual_seed(0)).prev_sample
        for form in (500, t, t[None], t.numpy()[()])
    ]
    assert all(torch.equal(forms[0], form) for form in forms)


# What is left to diffusers, and errors.


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_gradients_are_those_of_diffusers(plain: Any, fused: Any) -> None:
    grads = []
    for cls in (fused, plain):
        x, output = randn((1, 3, 4), 0).requires_grad_(), randn((1, 3, 4), 1).requires_grad_()
        step = started(cls).step(output, 500, x, generator=torch.Generator().manual_seed(0))
        loss = (step.prev_sample + step.pred_original_sample).square().sum()
        noisy = started(cls).add_noise(x, output, torch.tensor([500]))
        grads.append(torch.autograd.grad(loss + noisy.square().sum(), (x, output)))
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_forward_gradients_are_those_of_diffusers(plain: Any, fused: Any) -> None:
    x, tangent, t = randn((1, 3, 4), 0), randn((1, 3, 4), 1), torch.tensor([500])
    moved = []
    for cls in (fused, plain):
        scheduler = started(cls)

        def both(x: Tensor, scheduler: Any = scheduler) -> tuple[Tensor, Tensor]:
            noise = torch.Generator().manual_seed(0)
            step = scheduler.step(x, 500, x, generator=noise, return_dict=False)[0]
            return step, scheduler.add_noise(x, torch.ones_like(x), t)

        moved.append(torch.func.jvp(both, (x,), (tangent,))[1])
    torch.testing.assert_close(*moved)
    assert all(part.any() for part in moved[0])


def equally_seeded(plain: Any, fused: Any, x: Tensor, output: Tensor, **config: Any) -> None:
    """A step of both, with equal generators: the same samples."""
    results = [
        started(cls, **config).step(output, 500, x, generator=torch.Generator().manual_seed(0))
        for cls in (fused, plain)
    ]
    torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_shapes_are_broadcast_as_in_diffusers(plain: Any, fused: Any) -> None:
    equally_seeded(plain, fused, randn((1, 3, 4), 0), randn((2, 3, 4), 1))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_samples_without_channels_are_those_of_diffusers(shape: tuple[int, ...]) -> None:
    """Its DDIM takes them, its DDPM does not."""
    equally_seeded(DDIMScheduler, FusedDDIMScheduler, randn(shape, 0), randn(shape, 1))


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_a_default_device_does_not_matter(plain: Any, fused: Any) -> None:
    x, output, results = randn((2, 3, 4), 0), randn((2, 3, 4), 1), []
    for cls in (fused, plain):
        scheduler, noise = started(cls), torch.Generator().manual_seed(0)
        with torch.device("meta"):
            results.append(scheduler.step(output, 500, x, generator=noise).prev_sample)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_a_clamp_at_0_is_that_of_diffusers(plain: Any, fused: Any) -> None:
    equally_seeded(plain, fused, randn((2, 3), 0), randn((2, 3), 1), clip_sample_range=0.0)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize(
    ("samples", "t"), [(1, [10, 3, 3, 2]), (2, [10.0, 3.0])], ids=["broadcast", "no integers"]
)
@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_timesteps_are_taken_as_by_diffusers(
    plain: Any, fused: Any, method: str, samples: int, t: list[float]
) -> None:
    x, noise = randn((samples, 3, 4), 0), randn((samples, 3, 4), 1)
    found = []
    for cls in (fused, plain):
        try:
            found.append(getattr(cls(), method)(x, noise, torch.tensor(t)))
        except IndexError as error:
            found.append(str(error))
    assert type(found[0]) is type(found[1])
    torch.testing.assert_close(*found) if isinstance(found[0], Tensor) else None


def test_an_offset_past_the_table_is_passed_over() -> None:
    """Their set_timesteps leads to T itself; a run that is begun later does not notice."""
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    results = []
    for cls in (FusedDDPMScheduler, DDPMScheduler):
        scheduler = cls(steps_offset=1)
        scheduler.set_timesteps(1000)
        noise = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, 500, x, generator=noise).prev_sample)
    torch.testing.assert_close(*results)


def test_timesteps_that_come_twice_are_those_of_diffusers() -> None:
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    results = []
    for cls in (FusedDDPMScheduler, DDPMScheduler):
        scheduler = cls()
        scheduler.set_timesteps(timesteps=[5, 3, 1])
        scheduler.timesteps = torch.tensor([3, 2, 3, 2, 1, 0])
        noise = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, 2, x, generator=noise).prev_sample)
    assert torch.equal(*results)


def test_a_type_of_variance_that_was_changed_is_that_of_diffusers() -> None:
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    results = []
    for cls in (FusedDDPMScheduler, DDPMScheduler):
        scheduler = started(cls)
        scheduler.variance_type = "fixed_large"
        noise = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, 500, x, generator=noise).prev_sample)
    assert torch.equal(*results)


def test_what_is_kept_has_a_bound() -> None:
    """An eta of its own for each step makes a table for each."""
    scheduler, x = started(FusedDDIMScheduler), randn((1, 3, 4), 0)
    for number in range(200):
        scheduler.step(x, 500, x, eta=number / 200)
    assert len(scheduler._made[1]) <= 64


def test_a_fixed_variance_does_not_take_doubled_channels_for_one() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        started(FusedDDPMScheduler).step(randn((2, 6, 4), 0), 500, randn((2, 3, 4), 0))


def test_timesteps_that_a_run_does_not_pass() -> None:
    x = randn((1, 3, 4), 0)
    for t in (501, torch.tensor(501), 1000, -1):
        with pytest.raises(IndexError, match=rf"timestep {int(t)} is not among those"):
            started(FusedDDPMScheduler).step(x, t, x)
    with pytest.raises(IndexError, match="timestep 1000 is not among those"):
        started(FusedDDIMScheduler).step(x, 1000, x)


def test_errors_of_diffusers_stay() -> None:
    x = randn((1, 3, 4), 0)
    with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
        FusedDDIMScheduler().step(x, 1, x)
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        started(FusedDDIMScheduler).step(
            x, 1, x, eta=1.0, generator=torch.Generator(), variance_noise=x
        )
    for fused in FUSED:
        scheduler = fused(prediction_type="flow")
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="prediction_type given as flow must be one of"):
            scheduler.step(x, 100, x)
        scheduler = started(fused, thresholding=True, dynamic_thresholding_ratio=1.5)
        with pytest.raises(RuntimeError, match=r"q must be in the range \[0, 1\] but got 1.5"):
            scheduler.step(x, 100, x)


# Configurations.


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_config_goes_there_and_back(plain: Any, fused: Any, tmp_path: Path) -> None:
    original = plain(num_train_timesteps=123, beta_schedule="scaled_linear", steps_offset=1)
    ours = fused.from_config(original.config)
    ours.save_pretrained(tmp_path)
    loaded = fused.from_pretrained(tmp_path)
    back = plain.from_config(loaded.config)

    hidden = ("_class_name", "_diffusers_version", "_use_default_values")
    configs = [
        {name: value for name, value in scheduler.config.items() if name not in hidden}
        for scheduler in (original, ours, loaded, back)
    ]
    assert all(config == configs[0] for config in configs)
    assert f'"_class_name": "{fused.__name__}"' in (tmp_path / "scheduler_config.json").read_text()
    assert type(plain.from_pretrained(tmp_path)) is plain


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_in_the_middle_of_a_run(fused: Any, copied: Any) -> None:
    scheduler, x = started(fused), randn((1, 3, 4), 0)
    stepped(scheduler, x)
    results = []
    for each in (scheduler, copied(scheduler)):
        torch.manual_seed(0)
        results.append(stepped(each, x, 400))
    assert torch.equal(*results)


@pytest.mark.parametrize("fused", FUSED)
def test_a_table_made_in_inference_mode_serves_training(fused: Any) -> None:
    scheduler, t, noise = fused(), torch.tensor([5]), randn((1, 2, 3, 3), 1)
    with torch.inference_mode():
        scheduler.add_noise(noise, noise, t)
    x_start = randn((1, 2, 3, 3), 0).requires_grad_()
    scheduler.add_noise(x_start, noise, t).sum().backward()
    expected = scheduler.alphas_cumprod[5].sqrt().expand(x_start.shape)
    torch.testing.assert_close(x_start.grad, expected)

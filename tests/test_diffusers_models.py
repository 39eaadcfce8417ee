"""Folders that diffusers wrote, and its modules: the same networks, the same processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm_fast import GaussianDiffusion, load, sample
from ddpm_fast.integrations.diffusers_models import (
    DiffusersModel,
    _joined,
    _names,
    _unet_config,
    diffusion_of,
)
from ddpm_fast.integrations.weights import build, fill
from ddpm_fast.models import UNet
from ddpm_fast.models.unet import timestep_embedding

pytestmark = pytest.mark.usefixtures("one_thread")

DDPM = {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6}
OPENAI = {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "norm_eps": 1e-5}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    **DDPM,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def unet2d(**options: Any) -> UNet2DModel:
    """A network whose every parameter counts."""
    torch.manual_seed(0)
    unet = UNet2DModel(**{**SMALL, **options})
    for parameter in unet.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return unet.eval()


def save_pipeline(
    folder: Path, unet: UNet2DModel, scheduler: DDPMScheduler | None = None
) -> UNet2DModel:
    DDPMPipeline(unet, scheduler or DDPMScheduler()).save_pretrained(folder)
    return unet


def save_flat(folder: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)


def largest_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


class OurSinusoids(nn.Module):
    """The two codebases round the float32 frequencies differently; float64 tells all else."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model = [model]

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.model[0].model_channels, self.model[0].conventions)


@st.composite
def unet_options(draw: st.DrawFn) -> dict[str, Any]:
    attends = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    first = draw(st.sampled_from([8, 16]))
    groups = draw(st.sampled_from([1, 4, 8]))
    prefix = draw(st.sampled_from(["", "UNetRes"]))
    resizing = draw(st.sampled_from(["conv", "resnet"]))
    plain = {
        "conv": (f"{prefix}DownBlock2D", f"{prefix}UpBlock2D"),
        "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    }
    down, up = plain[resizing]
    options = {
        "sample_size": 8,
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 6)),
        "block_out_channels": tuple(first * draw(st.integers(1, 3)) for _ in attends[1:]),
        "down_block_types": tuple(f"{prefix}AttnDownBlock2D" if a else down for a in attends),
        "up_block_types": tuple(f"{prefix}AttnUpBlock2D" if a else up for a in attends[::-1]),
        "downsample_type": resizing,
        "upsample_type": resizing,
        "layers_per_block": draw(st.integers(1, 3)),
        "norm_num_groups": groups,
        "attention_head_dim": draw(st.sampled_from([None, 4, 8])),
        "num_class_embeds": draw(st.sampled_from([None, 5])),
        "act_fn": draw(st.sampled_from(["silu", "swish"])),
        **draw(st.sampled_from([DDPM, OPENAI])),
    }
    options["block_out_channels"] = (first, *options["block_out_channels"])
    if draw(st.booleans()):
        options |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": groups}
    return options


@given(unet_options())
def test_our_unet_is_the_same_network(options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        theirs = save_pipeline(Path(folder), unet2d(**options))
        ours, _ = load(folder)
    assert type(ours) is UNet and not ours.training
    size = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == size

    x, t = torch.randn(3, options["in_channels"], 8, 8), torch.tensor([0, 321, 999])
    classes = options["num_class_embeds"]
    labels = None if classes is None else torch.tensor([0, 2, classes - 1])
    with torch.no_grad():
        assert largest_error(ours(x, t, labels), theirs(x, t, labels).sample) < 2e-4
        theirs.time_proj = OurSinusoids(ours)
        ours, theirs, x = ours.double(), theirs.double(), x.double()
        assert largest_error(ours(x, t, labels), theirs(x, t, labels).sample) < 1e-10


CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": None,
    **DDPM,
}
CELEBA = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}


@pytest.mark.parametrize(
    ("options", "size"), [(CIFAR10, 35_746_307), (CELEBA, 113_673_219)], ids=["cifar10", "celeba"]
)
def test_networks_of_the_paper(options: dict[str, Any], size: int) -> None:
    with torch.device("meta"):
        theirs = UNet2DModel(**options)
    model = build(_unet_config(dict(theirs.config)) or {}, Path("config.json"))
    fill(model, _names(model), _joined(theirs.state_dict(), Path("a")), Path("a"))
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    paper = {"norm_groups": 32, "image_size": options["sample_size"]}
    if size == 35_746_307:
        assert model.config() == UNet.cifar10(dropout=0.0).config() | paper
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {32}


def flat(folder: Path, unet: UNet2DModel) -> None:
    save_flat(folder, unet)


def sharded(folder: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1


def binary(folder: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(folder / "unet", safe_serialization=False)
    DDPMScheduler().save_pretrained(folder / "scheduler")
    assert (folder / "unet" / "diffusion_pytorch_model.bin").is_file()


def sharded_binary(folder: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(folder / "unet", safe_serialization=False, max_shard_size="20KB")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    assert len(list((folder / "unet").glob("*.bin"))) > 1


def with_old_names(folder: Path, unet: UNet2DModel) -> None:
    save_flat(folder, unet)
    tensors = load_file(folder / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, then in old.items():
        tensors = {name.replace(f".{now}.", f".{then}."): x for name, x in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, folder / WEIGHTS)


def of_a_variant(folder: Path, unet: UNet2DModel) -> None:
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    unet.float()
    DDPMScheduler().save_pretrained(folder / "scheduler")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()


def of_a_sharded_variant(folder: Path, unet: UNet2DModel) -> None:
    unet.bfloat16().save_pretrained(folder / "unet", variant="bf16", max_shard_size="20KB")
    unet.float()
    DDPMScheduler().save_pretrained(folder / "scheduler")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.bf16.json").is_file()


def of_half_precision(folder: Path, unet: UNet2DModel) -> None:
    save_flat(folder, unet)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    unet.half().float()


LAYOUTS = [
    flat,
    sharded,
    binary,
    sharded_binary,
    with_old_names,
    of_half_precision,
    of_a_variant,
    of_a_sharded_variant,
]


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"class_embed_type": "timestep"}], ids=["ours", "theirs"])
def test_layouts(
    tmp_path: Path, write: Callable[[Path, UNet2DModel], None], options: dict[str, Any]
) -> None:
    unet = unet2d(**options)
    write(tmp_path, unet)
    model, diffusion = load(tmp_path)
    assert type(model) is (DiffusersModel if options else UNet)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    labels = torch.tensor([1.0, 2.0]) if options else None
    with torch.no_grad():
        found = model(x, t, class_labels=labels)
        wanted = unet(x, t, class_labels=labels).sample
    assert found.dtype == torch.float32 and largest_error(found, wanted) < 1e-4
    assert diffusion.num_timesteps == 1000 and diffusion.variance_type == "fixed_small"


@pytest.mark.parametrize(
    "options",
    [
        {"norm_eps": 1e-5},
        {"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D")},
        {"up_block_types": ("UpBlock2D", "UpBlock2D")},
        {"block_out_channels": (8, 12)},
        {"time_embedding_type": "fourier"},
        {"time_embedding_dim": 16},
        {"center_input_sample": True},
        {"act_fn": "relu"},
        {"mid_block_type": None},
        {"add_attention": False},
        {"mid_block_scale_factor": 2},
        {"resnet_time_scale_shift": "scale_shift"},
        {"attn_norm_num_groups": 2},
        {"downsample_type": "resnet", "down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
        {"sample_size": None},
        {"attention_head_dim": 5, "block_out_channels": (12, 24)},
    ],
    ids=str,
)
def test_other_networks_are_run_by_diffusers(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = save_pipeline(tmp_path, unet2d(**options))
    before = torch.get_rng_state()
    model, _ = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model) is DiffusersModel and not model.training
    assert (model.in_channels, model.num_classes) == (3, None)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(model(x, t), theirs(x, t).sample)


def ddpm_loop(model: Callable[..., Tensor], diffusion: GaussianDiffusion, seed: int) -> Tensor:
    """Ho et al. 2020, algorithm 2, from the public methods of the diffusion, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, generator=generator).double()
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((2,), step)
        predicted = diffusion.predict_xstart(x, t, model(x.float(), t).double()).clamp(-1, 1)
        x, variance, _ = diffusion.q_posterior(predicted, x, t)
        if step:
            x = x + variance.sqrt() * torch.randn(2, 3, 8, 8, generator=generator)
    return x


@pytest.mark.parametrize("options", [{}, {"norm_eps": 1e-5}], ids=["ours", "theirs"])
def test_the_same_pictures(tmp_path: Path, options: dict[str, Any]) -> None:
    """As from a loop written out around diffusers' model, and as from diffusers' own pipeline."""
    unet = save_pipeline(tmp_path, unet2d(**options), DDPMScheduler(num_train_timesteps=40))
    model, diffusion = load(tmp_path)
    found = sample(model, (2, 3, 8, 8), diffusion=diffusion, generator=torch.manual_seed(5))
    with torch.no_grad():
        wanted = ddpm_loop(lambda x, t: unet(x, t).sample, diffusion, seed=5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)

    pipeline = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=40))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        2, torch.Generator().manual_seed(5), num_inference_steps=40, output_type="np"
    ).images
    theirs = 2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1
    # Their tables are float32, products of 40 of which are some 1e-6 off.
    torch.testing.assert_close(found.clamp(-1, 1), theirs, rtol=0, atol=1e-3)


def test_a_model_in_memory_is_sampled_from() -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=50, prediction_type="v_prediction")
    model = DiffusersModel(unet2d(norm_eps=1e-3))
    images = sample(
        model,
        (2, model.in_channels, 8, 8),
        diffusion=diffusion_of(scheduler),
        sampler="ddim",
        num_steps=5,
        seed=0,
    )
    assert model.image_size == 8
    assert images.shape == (2, 3, 8, 8) and images.abs().max() <= 1 and images.std() > 0.1
    with pytest.raises(ValueError, match=r"must have shape \[N, 3, H, W\]; got \[2, 1, 8, 8\]"):
        sample(model, (2, 1, 8, 8), diffusion=diffusion_of(scheduler), seed=0)


@pytest.mark.parametrize("options", [{}, {"norm_eps": 1e-5}], ids=["ours", "theirs"])
def test_all_labels_are_classes(tmp_path: Path, options: dict[str, Any]) -> None:
    save_pipeline(tmp_path, unet2d(num_class_embeds=4, **options))
    model, diffusion = load(tmp_path)
    assert (model.num_classes, model.null_label) == (4, False)

    def draw(label: int, **guidance: float) -> Tensor:
        labels, shape = [0, label], (2, 3, 8, 8)
        run = {"diffusion": diffusion, "num_steps": 2, "seed": 0, "class_labels": labels}
        return sample(model, shape, **run, **guidance)

    assert draw(3).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^class_labels must lie in \[0, 3\]$"):
        draw(4)
    wanted = (
        "guidance_scale needs a model with a null label;"
        " this one has 4 classes and no label beside them"
    )
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        draw(3, guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels"):
        sample(model, (2, 3, 8, 8), diffusion=diffusion, num_steps=2)


def test_a_label_can_be_said_to_stand_for_none() -> None:
    unet = unet2d(num_class_embeds=4)
    model = DiffusersModel(unet, num_classes=3)
    x, t, none = torch.randn(2, 3, 8, 8), torch.tensor([3, 9]), torch.tensor([3, 3])
    with torch.no_grad():
        assert torch.equal(model(x, t), unet(x, t, none).sample)
    guided = sample(model, (2, 3, 8, 8), num_steps=2, seed=0, class_labels=1, guidance_scale=2.0)
    assert guided.isfinite().all()
    with pytest.raises(ValueError) as caught:
        DiffusersModel(unet, num_classes=4)
    sentence = "num_classes must leave one of the network's 4 labels to stand for none; got 4"
    assert str(caught.value) == sentence


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError) as caught:
        DiffusersModel(nn.Linear(1, 1))
    assert str(caught.value) == "unet must be a diffusers.UNet2DModel; got Linear"


@pytest.mark.parametrize(
    "beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
)
@pytest.mark.parametrize("steps", [50, 1000])
def test_betas_are_those_of_diffusers_before_their_rounding(beta_schedule: str, steps: int) -> None:
    scheduler = DDPMScheduler(steps, beta_schedule=beta_schedule, beta_end=0.03)
    diffusion = diffusion_of(scheduler)
    torch.testing.assert_close(diffusion.betas.float(), scheduler.betas, rtol=2e-5, atol=1e-8)
    # The size that the docstring of diffusion_of names.
    relative = scheduler.alphas_cumprod.double() / diffusion.alphas_cumprod - 1
    assert relative[:-1].abs().max() < 2e-5


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]
)
def test_a_process_is_taken_from_any_scheduler(name: str) -> None:
    fields = {"beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 77}
    scheduler = getattr(diffusers, name)(**fields, prediction_type="v_prediction")
    # The last writes the class into the config, so it comes last.
    sources = (lambda: scheduler, lambda: scheduler.config, scheduler.to_json_string)
    for source in sources:
        made = source()
        config = diffusion_of(json.loads(made) if isinstance(made, str) else made).config()
        assert config["num_timesteps"] == 77 and config["beta_end"] == 0.01
        assert config["prediction_type"] == "v_prediction"
        assert config["clip_denoised"] == (name in ("DDPMScheduler", "DDIMScheduler"))
        assert config["variance_type"] == ("fixed_small" if name == "DDPMScheduler" else None)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "IPNDMScheduler"]
)
def test_a_process_without_betas_is_refused(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    sentence = " without beta_schedule or trained_betas is of another process"
    with pytest.raises(ValueError, match="^a scheduler" + sentence):
        diffusion_of(scheduler)
    with pytest.raises(ValueError, match=f"^{name}{sentence}"):
        diffusion_of(json.loads(scheduler.to_json_string()))


def test_flow_matching_on_betas_is_refused() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    with pytest.raises(ValueError, match="with use_flow_sigmas is of another process$"):
        diffusion_of(json.loads(scheduler.to_json_string()))


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_variants_of_a_scheduler_have_its_defaults(name: str) -> None:
    kinds = [f"{name}Scheduler", f"Fused{name}Scheduler", f"{name}ParallelScheduler"]
    first, *others = (diffusion_of({"_class_name": kind}).config() for kind in kinds)
    assert others == [first, first]


def test_a_shifted_process_is_refused() -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    with pytest.raises(ValueError, match=r"^snr_shift_scale must be 1; got 3\.0$"):
        diffusion_of(scheduler)
    scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0)
    expected = scheduler.alphas_cumprod.double()
    found = diffusion_of(scheduler).alphas_cumprod
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("fixed_small", "fixed_small"),
        ("fixed_small_log", "fixed_small"),
        ("fixed_large", "fixed_large"),
        ("fixed_large_log", "fixed_large"),
        ("learned_range", "learned_range"),
    ],
)
def test_variance_types(theirs: str, ours: str) -> None:
    assert diffusion_of(DDPMScheduler(variance_type=theirs)).variance_type == ours


def test_an_empty_config_is_the_papers_process() -> None:
    config = GaussianDiffusion(variance_type="fixed_small").config()
    assert diffusion_of({}).config() == config == diffusion_of(DDPMScheduler()).config()


def test_thresholding_goes_before_the_clamp() -> None:
    options = {"thresholding": True, "clip_sample": False, "sample_max_value": 1.5}
    for clip_range in (1.0, 2.0):
        scheduler = DDPMScheduler(**options, clip_sample_range=clip_range)
        diffusion = diffusion_of(scheduler)
        assert diffusion.clip_denoised
        assert diffusion.dynamic_thresholding_ratio == 0.995
        assert diffusion.sample_max_value == 1.5
    assert diffusion_of({"thresholding": True}).sample_max_value == 1.0


@pytest.mark.parametrize("trained_betas", [None, torch.linspace(1e-3, 0.2, 50).tolist()])
def test_betas_of_zero_terminal_snr(trained_betas: list[float] | None) -> None:
    scheduler = DDPMScheduler(
        50, trained_betas=trained_betas, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    diffusion = diffusion_of(scheduler)
    assert diffusion.alphas_cumprod[-1] == 0
    torch.testing.assert_close(diffusion.betas.float(), scheduler.betas, rtol=1e-4, atol=1e-6)


def test_given_betas_and_no_clamp() -> None:
    diffusion = diffusion_of(DDPMScheduler(trained_betas=[0.1, 0.2, 0.3], clip_sample=False))
    assert diffusion.betas.tolist() == [0.1, 0.2, 0.3]
    assert not diffusion.clip_denoised


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"variance_type": "learned"},
            "variance_type learned is a variance in diffusers and a log-variance in ddpm_fast;"
            " learned_range is the same in both",
        ),
        ({"clip_sample_range": 2.0}, "clip_sample_range must be 1; got 2.0"),
        (
            {"beta_schedule": "laplace"},
            "beta_schedule must be one of linear, scaled_linear, squaredcos_cap_v2, sigmoid;"
            " got 'laplace'",
        ),
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type must be one of epsilon, sample, v_prediction; got 'flow_prediction'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_processes_that_are_not_ours(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        diffusion_of(options)
    assert str(caught.value) == sentence
    save_pipeline(tmp_path, unet2d())
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(options))
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{path}: {sentence}"


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def changed(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


configured = partial(changed, "config.json")
process = partial(changed, "scheduler_config.json")


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


def without_block_types(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if "block_types" not in k}))


def pickled(content: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "diffusion_pytorch_model.bin")

    return write


def half_pickled(size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "diffusion_pytorch_model.bin"
        pickled({"conv_in.weight": torch.zeros(100_000)})(folder)
        path.write_bytes(path.read_bytes()[:size])

    return write


def nested(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("[" * 100_000)

    return write


def indexed(content: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

    return write


NOT_THESE = f"{WEIGHTS}: not the weights of this U-Net: "
UNREADABLE = [
    (removed("config.json"), "config.json: no such file, which a folder of diffusers has"),
    (
        removed("scheduler_config.json"),
        "scheduler_config.json: no such file, which a folder of diffusers has",
    ),
    (removed(WEIGHTS), f"{WEIGHTS}: no such file"),
    (cut("config.json"), "config.json: truncated, or not JSON"),
    (cut("scheduler_config.json"), "scheduler_config.json: truncated, or not JSON"),
    (cut(WEIGHTS), f"{WEIGHTS}: truncated, or not a safetensors file ("),
    (
        configured(_class_name="UNet2DConditionModel"),
        "config.json: must describe a UNet2DModel; got UNet2DConditionModel",
    ),
    (without_block_types, "config.json: diffusers cannot build this network: Must provide"),
    (
        configured(block_out_channels=["8", "16"]),
        "config.json: one of its options is no value for it",
    ),
    (
        configured(norm_eps=0.1, act_fn=None),
        "config.json: diffusers cannot build this network: 'NoneType' object has no attribute",
    ),
    (
        configured(norm_eps=0.1, time_embedding_type="x"),
        "config.json: diffusers cannot build this network: ",
    ),
    (
        process(num_train_timesteps=3.5),
        "scheduler_config.json: 'float' object cannot be interpreted as an integer",
    ),
    (nested("scheduler_config.json"), "scheduler_config.json: truncated, or not JSON"),
    (
        configured(layers_per_block=-1),
        f"{WEIGHTS}: not the weights of its config.json: Unexpected key(s)",
    ),
    (
        configured(norm_num_groups=16),
        "config.json: describes a U-Net that cannot be built: UNet: norm_groups must divide",
    ),
    (
        configured(block_out_channels=[8, 24]),
        f"{NOT_THESE}down_blocks.1.resnets.0.conv1.weight has shape",
    ),
    (configured(layers_per_block=2), f"{NOT_THESE}down_blocks.0.resnets.1.norm1.weight is missing"),
    (configured(norm_eps=0.1, in_channels=1), f"{WEIGHTS}: not the weights of its config.json: "),
    (weights(lambda x: x.pop("conv_in.bias")), f"{NOT_THESE}conv_in.bias is missing"),
    (weights(lambda x: x.update(more=torch.ones(1))), f"{NOT_THESE}it has no more"),
    (
        weights(lambda x: x.pop("mid_block.attentions.0.to_k.weight")),
        f"{NOT_THESE}the parts of mid_block.attentions.0.qkv.weight are not three alike",
    ),
    (
        pickled({"conv_in.weight": sys.exit}),
        "diffusion_pytorch_model.bin: truncated, or not a file of nothing but tensors",
    ),
    *(
        (half_pickled(size), "diffusion_pytorch_model.bin: truncated, or not a file of nothing")
        for size in (100, 5_000, 50_000)
    ),
    (
        pickled({"conv_in.weight": 3}),
        "diffusion_pytorch_model.bin: must hold a state_dict, tensors by name, and nothing else",
    ),
    (
        indexed({"weight_map": {"conv_in.weight": "../elsewhere"}}),
        f"{WEIGHTS}.index.json: its weight_map must name files beside it",
    ),
    (indexed({"weight_map": {"conv_in.weight": "absent"}}), "absent: no such file"),
    (indexed([]), f"{WEIGHTS}.index.json: must hold a JSON object"),
]


@pytest.mark.parametrize(("damage", "sentence"), UNREADABLE, ids=[s[:60] for _, s in UNREADABLE])
def test_unreadable_folders(tmp_path: Path, damage: Callable[[Path], None], sentence: str) -> None:
    save_flat(tmp_path, unet2d())
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{sentence}")
    assert "\n" not in message


def test_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_flat(tmp_path / "ours", unet2d())
    save_flat(tmp_path / "theirs", unet2d(norm_eps=1e-3))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert type(load(tmp_path / "ours")[0]) is UNet
    with pytest.raises(ImportError) as caught:
        load(tmp_path / "theirs")
    assert str(caught.value) == (
        f"{tmp_path / 'theirs' / 'config.json'}: this network is not one that ddpm_fast's UNet can"
        " be, and is run by diffusers, which is not installed: pip install diffusers"
    )
    with pytest.raises(ImportError, match="^DiffusersModel needs diffusers: pip install diffusers"):
        DiffusersModel(nn.Linear(1, 1))


def test_diffusers_is_imported_by_those_alone_who_need_it(tmp_path: Path) -> None:
    save_flat(tmp_path, unet2d())
    code = f"""import sys, ddpm_fast
ddpm_fast.load({str(tmp_path)!r})
print("diffusers" in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"

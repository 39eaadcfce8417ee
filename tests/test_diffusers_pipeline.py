"""Pipelines of diffusers with the drop-in schedulers: a small random network, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_fast.integrations.schedulers import FusedDDIMScheduler, FusedDDPMScheduler

pytestmark = pytest.mark.usefixtures("one_thread")

PIPELINES = [
    pytest.param(DDPMPipeline, DDPMScheduler, FusedDDPMScheduler, {}, id="ddpm"),
    pytest.param(DDIMPipeline, DDIMScheduler, FusedDDIMScheduler, {}, id="ddim"),
    pytest.param(
        DDIMPipeline,
        DDIMScheduler,
        FusedDDIMScheduler,
        {"eta": 1.0, "use_clipped_model_output": True},
        id="ddim-stochastic",
    ),
]


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def drawn(pipe: Any, generator: Any = None, batch_size: int = 3, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe(
        batch_size=batch_size,
        generator=generator,
        num_inference_steps=7,
        output_type="pt",
        **options,
    ).images
    return images


@pytest.mark.parametrize(("pipeline", "plain", "fused", "options"), PIPELINES)
def test_pictures_are_those_of_diffusers(
    pipeline: Any, plain: Any, fused: Any, options: dict[str, Any], unet: Any, tmp_path: Path
) -> None:
    pipeline(unet, plain()).save_pretrained(tmp_path)
    pipe = pipeline.from_pretrained(tmp_path)
    expected = drawn(pipe, torch.Generator().manual_seed(5), **options)
    pipe.scheduler = fused.from_config(pipe.scheduler.config)
    images = drawn(pipe, torch.Generator().manual_seed(5), **options)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pipeline", "plain", "fused", "options"), PIPELINES)
def test_without_a_generator_manual_seed_governs(
    pipeline: Any, plain: Any, fused: Any, options: dict[str, Any], unet: Any
) -> None:
    pipe = pipeline(unet, plain())
    pipe.scheduler = fused.from_config(pipe.scheduler.config)
    images = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        images.append(drawn(pipe, **options))
    assert type(pipe.scheduler) is fused
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_list_of_generators_makes_each_sample_reproducible(unet: Any) -> None:
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.scheduler = FusedDDIMScheduler.from_config(pipe.scheduler.config)
    seeds = [5, 6, 7]
    images = drawn(pipe, [torch.Generator().manual_seed(seed) for seed in seeds], eta=1.0)
    alone = drawn(pipe, [torch.Generator().manual_seed(6)], batch_size=1, eta=1.0)
    torch.testing.assert_close(alone[0], images[1], rtol=0, atol=1e-5)


def test_a_saved_pipeline_names_the_drop_in(unet: Any, tmp_path: Path) -> None:
    """diffusers loads it where the module is imported; the scheduler's folder is diffusers' own."""
    pipe = DDPMPipeline(unet, FusedDDPMScheduler())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["ddpm_fast.integrations.schedulers", "FusedDDPMScheduler"]
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler) is FusedDDPMScheduler
    assert type(DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")) is DDPMScheduler

    # A DDIMPipeline makes its own of whatever it is given.
    assert type(DDIMPipeline(unet, FusedDDIMScheduler()).scheduler) is DDIMScheduler

    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]

"""Checkpoint files: what goes in comes out, and what cannot be read is refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm_fast import GaussianDiffusion, checkpoint
from ddpm_fast.models import LightweightUNet, UNet


def small_unet() -> UNet:
    return UNet(image_size=8, model_channels=8, channel_mult=(1, 2), attention_resolutions=(4,))


def averaged(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("make", [small_unet, lambda: LightweightUNet(hidden_channels=4)])
def test_round_trip(tmp_path: Path, make: Callable[[], checkpoint.Network]) -> None:
    path, model = tmp_path / "a.safetensors", make()
    diffusion = GaussianDiffusion.from_schedule("sigmoid", 50, prediction_type="v_prediction")
    checkpoint.save(path, model, diffusion, training={"seed": 3}, step=7)
    loaded, loaded_diffusion = checkpoint.load(path)
    assert type(loaded) is type(model) and loaded.config() == model.config()
    assert not loaded.training
    assert loaded_diffusion.config() == diffusion.config()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert checkpoint.read(path).step == 7
    assert checkpoint.read(path).training == {"seed": 3}


def test_load_takes_the_averaged_weights_and_export_keeps_only_those(tmp_path: Path) -> None:
    path, exported, model = tmp_path / "a.safetensors", tmp_path / "b.safetensors", small_unet()
    ema = averaged(model)
    optimizer = {"conv_in.weight.step": torch.tensor(3.0)}
    checkpoint.save(path, model, GaussianDiffusion(), ema=ema, optimizer=optimizer, step=3)
    checkpoint.export(path, exported)
    for file in (path, exported):
        assert torch.equal(checkpoint.load(file)[0].conv_in.weight, ema["conv_in.weight"])
    assert {name.split(".")[0] for name in load_file(exported)} == {"ema"}
    assert checkpoint.read(exported).step == 3


def test_load_draws_no_random_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_unet(), GaussianDiffusion())
    before = torch.get_rng_state()
    checkpoint.load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_channels_last_weights_are_saved(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", small_unet()
    checkpoint.save(path, model.to(memory_format=torch.channels_last), GaussianDiffusion())
    assert torch.equal(checkpoint.load(path)[0].conv_in.weight, model.conv_in.weight)


def test_bundled_model() -> None:
    model, diffusion = checkpoint.load("digits")
    assert (model.config()["num_classes"], diffusion.num_timesteps) == (10, 1000)
    x = torch.zeros(2, 1, 8, 8)
    assert model(x, torch.tensor([0, 999])).shape == x.shape


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_old_file_survives_an_interrupted_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_unet(), GaussianDiffusion(), step=1)
    old = path.read_bytes()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, failing, killed)
        checkpoint.save(path, small_unet(), GaussianDiffusion(), step=2)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def truncated_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def truncated_tensors(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"conv1.weight": [0.0] * 100}))


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, path)


def metadata(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        about: dict[str, object] = json.loads(file.metadata()["ddpm_fast"])
    return about


def rewritten(**changes: object) -> Callable[[Path], None]:
    """Replace entries of the metadata's JSON object."""

    def rewrite(path: Path) -> None:
        about = {**metadata(path), **changes}
        save_file(load_file(path), path, {"ddpm_fast": json.dumps(about)})

    return rewrite


def damaged_json(path: Path) -> None:
    save_file(load_file(path), path, {"ddpm_fast": "{"})


def without_a_tensor(path: Path) -> None:
    saved = checkpoint.read(path)
    kept = {name: tensor for name, tensor in saved.model.items() if name != "conv_in.bias"}
    checkpoint.write(path, checkpoint.Checkpoint(**{**vars(saved), "model": kept}))


def with_another_tensor(path: Path) -> None:
    saved = checkpoint.read(path)
    more = {**saved.model, "conv_between.bias": torch.zeros(1)}
    checkpoint.write(path, checkpoint.Checkpoint(**{**vars(saved), "model": more}))


def with_a_stray_tensor(path: Path) -> None:
    about = {"ddpm_fast": json.dumps(metadata(path))}
    save_file({**load_file(path), "stray": torch.zeros(1)}, path, about)


SMALL_CONFIG = small_unet().config()
UNREADABLE = [
    (truncated_header, "truncated, or not a safetensors file ("),
    (truncated_tensors, "truncated, or not a safetensors file ("),
    (empty, "truncated, or not a safetensors file ("),
    (pickled, "truncated, or not a safetensors file ("),
    (foreign, "a safetensors file, but not a checkpoint of ddpm_fast"),
    (damaged_json, "its ddpm_fast metadata is damaged"),
    (rewritten(format_version="?"), "its ddpm_fast metadata is damaged"),
    (rewritten(step="?"), "its ddpm_fast metadata is damaged"),
    (
        rewritten(format_version=2),
        "written in format 2, newer than the 1 that this ddpm_fast reads; upgrade ddpm_fast",
    ),
    (
        rewritten(architecture="Transformer"),
        "holds a Transformer; known architectures: LightweightUNet, UNet",
    ),
    (
        rewritten(architecture="LightweightUNet", model={}),
        "not the weights of this LightweightUNet: conv1.weight is missing",
    ),
    (
        rewritten(model={**SMALL_CONFIG, "in_channels": 1}),
        "not the weights of this UNet: conv_in.weight has shape [8, 3, 3, 3], wanted [8, 1, 3, 3]",
    ),
    (without_a_tensor, "not the weights of this UNet: conv_in.bias is missing"),
    (with_another_tensor, "not the weights of this UNet: it has no conv_between.bias"),
    (with_a_stray_tensor, "holds a tensor that no checkpoint has, stray"),
    (rewritten(model={"depth": 3}), "its model configuration cannot be built: UNet.__init__() got"),
    (
        rewritten(diffusion={"betas": [2.0]}),
        "its diffusion configuration cannot be built: betas must be finite and lie in (0, 1]",
    ),
]


@pytest.mark.parametrize(("damage", "sentence"), UNREADABLE, ids=[s[:50] for _, s in UNREADABLE])
def test_unreadable_files(tmp_path: Path, damage: Callable[[Path], None], sentence: str) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_unet(), GaussianDiffusion())
    damage(path)
    with pytest.raises(ValueError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {sentence}")
    assert "\n" not in message


def test_absent_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        checkpoint.load(path)
    assert str(caught.value) == f"{path}: no such checkpoint file (bundled models: digits)"


def test_other_classes_are_not_saved(tmp_path: Path) -> None:
    sentence = "a checkpoint cannot hold a Linear; known architectures: LightweightUNet, UNet"
    with pytest.raises(ValueError) as caught:
        checkpoint.save(tmp_path / "a", nn.Linear(1, 1), GaussianDiffusion())  # type: ignore[arg-type]
    assert str(caught.value) == sentence

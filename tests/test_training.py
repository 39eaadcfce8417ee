"""Training: it learns, resumes bit for bit, and stops cleanly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_fast import GaussianDiffusion, checkpoint, models
from ddpm_fast.data import TensorDataset
from ddpm_fast.models import LightweightUNet, UNet
from ddpm_fast.training import (
    Recipe,
    TrainConfig,
    digits_recipe,
    ema_decay,
    folder_recipe,
    seeded_unet,
    train,
)

QUICK = TrainConfig(
    num_steps=12, batch_size=4, learning_rate=1e-3, warmup_steps=2, checkpoint_every=5
)


pytestmark = pytest.mark.usefixtures("one_thread")


class Pictures(TensorDataset):
    """Ten 4x4 pictures of two classes, augmented; can call something before a given batch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            torch.rand(10, 1, 4, 4, generator=generator) * 2 - 1, torch.arange(10) % 2, 2
        )
        self.batches = 0
        self.seen: list[Tensor] = []
        self.before: dict[int, Callable[[], object]] = {}

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        self.before.get(self.batches, lambda: None)()
        self.batches += 1
        self.seen.append(indices)
        images, labels = super().batch(indices, generator)
        return images * torch.rand(len(images), 1, 1, 1, generator=generator), labels


def quick_recipe(**options: object) -> Recipe:
    model = seeded_unet(
        0,
        in_channels=1,
        image_size=4,
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.3,
        num_classes=2,
    )
    return Recipe(model, GaussianDiffusion(), Pictures(), replace(QUICK, **options))


def test_the_uninterrupted_run_repeats_itself(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        torch.manual_seed(hash(path))  # the global generator does not matter
        assert train(*quick_recipe(), out=path, progress=False) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()
    other = train(*quick_recipe(seed=1), out=tmp_path / "c.safetensors", progress=False)
    assert other.read_bytes() != paths[0].read_bytes()


@pytest.mark.parametrize("stop", [3, 5, 11])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = train(*quick_recipe(), out=tmp_path / "whole.safetensors", progress=False)
    parts = tmp_path / "parts.safetensors"
    train(*quick_recipe(num_steps=stop), out=parts, progress=False)
    recipe = quick_recipe()
    torch.nn.init.normal_(recipe.model.conv_in.weight)  # what is restored replaces it
    train(*recipe, out=parts, resume=True, progress=False)
    assert parts.read_bytes() == whole.read_bytes()


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(*quick_recipe(), out=tmp_path / "a.safetensors", progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_shows_every_picture_once(tmp_path: Path) -> None:
    recipe = quick_recipe(num_steps=15)  # 60 pictures shown: six epochs of ten
    train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    epochs = torch.cat(recipe.dataset.seen).reshape(6, 10)
    assert (epochs.sort(dim=1).values == torch.arange(10)).all()
    assert len(epochs.unique(dim=0)) == 6


def test_a_batch_may_be_larger_than_the_data_set(tmp_path: Path) -> None:
    recipe = quick_recipe(batch_size=25, num_steps=2)
    train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    assert (torch.cat(recipe.dataset.seen).bincount() == 5).all()


def test_the_loss_falls(tmp_path: Path) -> None:
    recipe = quick_recipe(num_steps=100, batch_size=16, learning_rate=5e-3)
    model, diffusion, dataset, _ = recipe

    def loss(network: torch.nn.Module) -> float:
        t = torch.arange(0, 1000, 100)
        with torch.no_grad():
            losses = diffusion.training_losses(network.eval(), dataset.images, t, seed=99)
        return losses.mean().item()

    before = loss(model)
    path = train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    assert loss(checkpoint.load(path)[0]) < 0.6 * before


def test_ema_warms_up() -> None:
    found = [ema_decay(step, 0.999) for step in (0, 8, 90, 10_000, 10_000_000)]
    assert found == [1 / 10, 9 / 18, 91 / 100, 0.999, 0.999]


def test_averaged_weights_lie_between_first_and_last(tmp_path: Path) -> None:
    model = LightweightUNet(in_channels=1, hidden_channels=2, out_channels=1)
    start = model.conv1.bias.detach().clone()
    config = replace(QUICK, num_steps=1)
    path = train(
        model,
        GaussianDiffusion(),
        Pictures(),
        config,
        out=tmp_path / "a.safetensors",
        progress=False,
    )
    saved = checkpoint.read(path)
    wanted = 0.1 * start + 0.9 * saved.model["conv1.bias"]  # decay (1 + 0) / (10 + 0)
    torch.testing.assert_close(saved.ema["conv1.bias"], wanted)
    assert torch.equal(saved.model["conv1.bias"], model.conv1.bias.detach())


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.25, 60, 140), (1.0, 400, 400)])
def test_label_dropout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, low: int, high: int
) -> None:
    labels: list[Tensor] = []
    forward = UNet.forward

    def listening(self: UNet, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        labels.append(class_labels)
        return forward(self, x, t, class_labels)

    monkeypatch.setattr(UNet, "forward", listening)
    recipe = quick_recipe(num_steps=4, batch_size=100, label_dropout=share)
    train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    dropped = torch.cat(labels) == 2
    assert low <= int(dropped.sum()) <= high
    shown = torch.cat(recipe.dataset.seen) % 2
    assert torch.equal(torch.cat(labels)[~dropped], shown[~dropped])


def test_ctrl_c_saves_and_the_run_can_go_on(tmp_path: Path) -> None:
    path, recipe = tmp_path / "a.safetensors", quick_recipe()
    recipe.dataset.before[7] = lambda: os.kill(os.getpid(), signal.SIGINT)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        KeyboardInterrupt, match=r"training stopped at step 8 of 12; resume .*a.saf"
    ):
        train(*recipe, out=path, progress=False)
    assert signal.getsignal(signal.SIGINT) == handler
    assert checkpoint.read(path).step == 8
    train(*quick_recipe(), out=path, resume=True, progress=False)
    whole = train(*quick_recipe(), out=tmp_path / "whole.safetensors", progress=False)
    assert path.read_bytes() == whole.read_bytes()


def test_a_diverged_run_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    path, recipe = tmp_path / "a.safetensors", quick_recipe()
    recipe.dataset.before[7] = lambda: recipe.dataset.images.fill_(float("nan"))
    with pytest.raises(FloatingPointError) as caught:
        train(*recipe, out=path, progress=False)
    assert str(caught.value) == (
        "training diverged in step 7: loss nan, gradient norm nan; the last checkpoint was kept"
    )
    saved = checkpoint.read(path)
    assert saved.step == 5
    assert all(tensor.isfinite().all() for tensor in saved.model.values())


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists already; resume it, or choose another path"):
        train(*quick_recipe(), out=path, progress=False)
    assert path.read_text() == "precious"


def test_nothing_to_resume_and_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        train(*quick_recipe(), out=tmp_path / "a.safetensors", resume=True)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        train(*quick_recipe(), out=tmp_path / "absent" / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "its seed is 0, this run's is 1"),
        ({"learning_rate": 0.5}, "its learning_rate is 0.001, this run's is 0.5"),
    ],
    ids=str,
)
def test_only_the_same_run_is_resumed(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    path = train(*quick_recipe(num_steps=1), out=tmp_path / "a.safetensors", progress=False)
    with pytest.raises(ValueError) as caught:
        train(*quick_recipe(**change), out=path, resume=True, progress=False)
    assert str(caught.value) == f"{path}: cannot be resumed: {sentence}"


def test_an_inference_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    path = train(*quick_recipe(num_steps=1), out=tmp_path / "a.safetensors", progress=False)
    checkpoint.export(path, path)
    with pytest.raises(ValueError, match="cannot be resumed: it holds no optimizer state"):
        train(*quick_recipe(), out=path, resume=True, progress=False)


def test_classes_of_model_and_data_must_agree(tmp_path: Path) -> None:
    recipe = quick_recipe()
    unlabelled = TensorDataset(recipe.dataset.images)
    with pytest.raises(ValueError, match="the model has 2 classes, the data set none"):
        train(*recipe._replace(dataset=unlabelled), out=tmp_path / "a.safetensors")


def test_label_dropout_needs_a_null_label(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    recipe = quick_recipe()
    model = UNet(**recipe.model.config() | {"null_label": False})
    with pytest.raises(ValueError) as caught:
        train(*recipe._replace(model=model), out=path)
    sentence = "label_dropout must be 0 for a model without a null label; got 0.1"
    assert str(caught.value) == sentence and not path.exists()
    config = replace(recipe.config, num_steps=1, label_dropout=0.0)
    train(*recipe._replace(model=model, config=config), out=path, progress=False)
    assert checkpoint.load(path)[0].config() == model.config()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_steps": 0}, "TrainConfig: num_steps must be above 0; got 0"),
        ({"learning_rate": float("nan")}, "TrainConfig: learning_rate must be above 0; got nan"),
        ({"seed": -1}, "TrainConfig: seed must not be negative; got -1"),
        ({"label_dropout": 1.5}, "TrainConfig: label_dropout must be in [0, 1]; got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_options(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        TrainConfig(**options)
    assert str(caught.value) == sentence


def test_digits_recipe_is_the_bundled_models() -> None:
    pytest.importorskip("sklearn")
    model, diffusion, dataset, config = digits_recipe()
    bundled = checkpoint.read(Path(models.__file__).with_name("digits.safetensors"))
    assert bundled.model_config == model.config()
    assert bundled.diffusion_config == diffusion.config()
    assert bundled.step == config.num_steps
    assert TrainConfig.from_description(bundled.training) == config
    assert bundled.training == config.description() | {
        "dataset_size": len(dataset),
        "torch": bundled.training["torch"],
    }


@pytest.mark.parametrize(
    ("size", "levels", "attention"), [(4, 1, []), (8, 2, []), (28, 3, [14]), (64, 4, [16])]
)
def test_folder_recipe_fits_the_picture_size(
    tmp_path: Path, size: int, levels: int, attention: list[int]
) -> None:
    from PIL import Image

    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "a.png")
    recipe = folder_recipe(
        tmp_path,
        image_size=size,
        class_labels=True,
        model_options={"model_channels": 8, "in_channels": 1},
        num_steps=3,
    )
    assert len(recipe.model.channel_mult) == levels
    assert list(recipe.model.attention_resolutions) == attention
    assert (recipe.model.num_classes, recipe.model.in_channels) == (1, 1)
    assert (recipe.config.num_steps, recipe.config.learning_rate) == (3, 2e-4)

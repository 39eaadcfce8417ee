"""Training: it learns, resumes bit for bit, and stops cleanly."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import GaussianDiffusion, checkpoint, models, sample
from ddpm_fast.atomic import atomic_write
from ddpm_fast.data import TensorDataset
from ddpm_fast.models import LightweightUNet, UNet
from ddpm_fast.processes import Processes, local_device
from ddpm_fast.training import (
    TrainConfig,
    digits_recipe,
    ema_decay,
    folder_recipe,
    train,
)
from ddpm_fast.training.averaging import decay_ceiling
from ddpm_fast.training.batches import Batches, Part
from ddpm_fast.training.learning_rate import learning_rate
from ddpm_fast.training.run import Run
from small_training import QUICK, Pictures, quick_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    out, of_another = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    with atomic_write(out):
        (left,) = tmp_path.iterdir()
    (tmp_path / "m.safetensors").unlink()
    left.write_bytes(b"half")
    with atomic_write(of_another):
        train(*quick_recipe(num_steps=1), out=out, progress=False)
    assert set(tmp_path.iterdir()) == {out, of_another}


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


def test_a_run_that_diverges_at_once_says_that_nothing_was_written(tmp_path: Path) -> None:
    recipe = quick_recipe()
    recipe.dataset.images.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0: .* norm nan; nothing was written$"):
        train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    assert not list(tmp_path.iterdir())


class Described(Pictures):
    """Pictures that tell something of themselves."""

    def __init__(self, told: object) -> None:
        super().__init__()
        self.told = told

    def description(self) -> dict[str, Any]:
        return {"size": self.told}


def test_a_description_is_compared_as_it_is_saved(tmp_path: Path) -> None:
    recipe = quick_recipe(num_steps=1)._replace(dataset=Described((4, 4)))
    path = train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    train(*recipe, out=path, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"its dataset's size is \[4, 4\], this run's is 5"):
        train(*recipe._replace(dataset=Described(5)), out=path, resume=True, progress=False)


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for recipe in (
        quick_recipe()._replace(dataset=Described(np.int64(4))),
        quick_recipe(seed=np.int64(4)),
    ):
        with pytest.raises(ValueError, match="a checkpoint cannot tell of this run: .*int64"):
            train(*recipe, out=tmp_path / "a.safetensors", progress=False)
        assert recipe.dataset.batches == 0


def test_a_run_of_more_steps_is_not_resumed_for_fewer(tmp_path: Path) -> None:
    path = train(*quick_recipe(num_steps=3), out=tmp_path / "a.safetensors", progress=False)
    with pytest.raises(ValueError) as caught:
        train(*quick_recipe(num_steps=2), out=path, resume=True, progress=False)
    assert str(caught.value) == f"{path}: has had 3 steps, more than this run's 2"


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
        ({"loss": "l1"}, "its loss is mse, this run's is l1"),
        ({"min_snr_gamma": 5.0}, "its min_snr_gamma is None, this run's is 5.0"),
        ({"precision": "bf16"}, "its precision is fp32, this run's is bf16"),
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


def test_other_data_are_not_resumed_on(tmp_path: Path) -> None:
    """As many other pictures, or the same ones mirrored."""
    path, options = tmp_path / "a.safetensors", {"num_steps": 1, "batch_size": 2}
    model = {"model_channels": 8}

    def go(place: str, flip: bool = True, resume: bool = True) -> None:
        recipe = folder_recipe(
            tmp_path / place, image_size=8, flip=flip, model_options=model, **options
        )
        train(*recipe, out=path, resume=resume, progress=False)

    for name, value in (("one.npz", 1), ("other.npz", 2)):
        np.savez(tmp_path / name, np.full((2, 8, 8, 3), value, np.uint8))
    go("one.npz", resume=False)
    go("one.npz")
    with pytest.raises(ValueError, match="its dataset's flip is True, this run's is False"):
        go("one.npz", flip=False)
    with pytest.raises(ValueError, match=r"its dataset's fingerprint is \w{16}, this run's is \w"):
        go("other.npz")


@pytest.mark.parametrize("told_by", ["both", "the checkpoint", "the data", "neither"])
def test_data_need_not_describe_themselves(tmp_path: Path, told_by: str) -> None:
    """Neither those of others nor those of old checkpoints do."""
    recipe, again = quick_recipe(num_steps=1), quick_recipe()
    for pictures, tells in ((recipe, "the checkpoint"), (again, "the data")):
        if told_by not in (tells, "both"):
            pictures.dataset.description = dict  # type: ignore[method-assign]
    path = train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    told = checkpoint.read(path).training.keys()
    assert ("dataset" in told) == (told_by in ("both", "the checkpoint"))
    train(*again, out=path, resume=True, progress=False)
    assert checkpoint.read(path).step == QUICK.num_steps


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
        ({"loss": "l2"}, "TrainConfig: loss must be one of mse, l1, huber; got l2"),
        ({"lr_schedule": "no"}, "TrainConfig: lr_schedule must be one of constant, cosine; got no"),
        ({"precision": "fp16"}, "TrainConfig: precision must be one of fp32, bf16; got fp16"),
        ({"min_snr_gamma": 0.0}, "TrainConfig: min_snr_gamma must be above 0; got 0.0"),
        ({"ema_half_life": -1.0}, "TrainConfig: ema_half_life must be above 0; got -1.0"),
        ({"accumulate": 0}, "TrainConfig: accumulate must be above 0; got 0"),
        ({"offset_noise": -0.1}, "TrainConfig: offset_noise must not be negative; got -0.1"),
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
        "dataset": dataset.description(),
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


# --- choices ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without any choice."""
    out = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    return train(*quick_recipe(), out=out, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "l1", "min_snr_gamma": 5.0},
        {"loss": "huber", "offset_noise": 0.1},
        {"lr_schedule": "cosine", "ema_half_life": 8.0},
        {"accumulate": 2},
        {"precision": "bf16"},
        {"diffusion": GaussianDiffusion(variance_type="learned_range")},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_choice_changes_the_run_and_resumes_bit_for_bit(
    tmp_path: Path, plain: Path, options: dict[str, object]
) -> None:
    whole = train(*quick_recipe(**options), out=tmp_path / "whole.safetensors", progress=False)
    parts, recipe = tmp_path / "parts.safetensors", quick_recipe(**options)
    recipe.dataset.before[5 * recipe.config.accumulate] = lambda: os.kill(
        os.getpid(), signal.SIGINT
    )
    with pytest.raises(KeyboardInterrupt):
        train(*recipe, out=parts, progress=False)
    train(*quick_recipe(**options), out=parts, resume=True, progress=False)
    assert parts.read_bytes() == whole.read_bytes()
    ours, theirs = checkpoint.read(whole), checkpoint.read(plain)
    assert any(not torch.equal(ours.ema[name], theirs.ema[name]) for name in ours.ema)


def test_an_old_checkpoint_is_resumed_with_the_defaults(tmp_path: Path) -> None:
    """A checkpoint that tells nothing of newer options, as those before them do not."""
    path = train(*quick_recipe(num_steps=3), out=tmp_path / "a.safetensors", progress=False)
    old = set(checkpoint.read(path).training)
    assert old.isdisjoint({"loss", "lr_schedule", "precision", "accumulate", "ema_half_life"})
    train(*quick_recipe(), out=path, resume=True, progress=False)
    assert checkpoint.read(path).step == QUICK.num_steps


def test_options_are_read_back_from_their_description() -> None:
    config = replace(QUICK, loss="l1", accumulate=3, ema_half_life=100.0)
    assert TrainConfig.from_description(config.description()) == config


def test_a_cosine_run_keeps_its_length(tmp_path: Path) -> None:
    options = {"lr_schedule": "cosine", "num_steps": 2}
    path = train(*quick_recipe(**options), out=tmp_path / "a.safetensors", progress=False)
    with pytest.raises(ValueError, match="its num_steps is 2, this run's is 3"):
        train(*quick_recipe(**(options | {"num_steps": 3})), out=path, resume=True)


def test_the_learning_rate() -> None:
    """Linear warm-up to 1; then half a cosine that would be 0 in the step behind the last."""
    constant = TrainConfig(num_steps=10, learning_rate=1.0, warmup_steps=4)
    cosine = replace(constant, lr_schedule="cosine")
    warm_up = [0.25, 0.5, 0.75, 1]
    assert [learning_rate(step, constant) for step in range(10)] == warm_up + 6 * [1]
    found = [learning_rate(step, cosine) for step in range(10)]
    assert found[:5] == [*warm_up, 1]
    assert found[4:] == pytest.approx([(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert learning_rate(3, replace(cosine, warmup_steps=20)) == 0.2


@pytest.mark.parametrize("batch_size", [4, 32])
def test_half_life_is_counted_in_pictures(batch_size: int) -> None:
    config = replace(QUICK, batch_size=batch_size, ema_half_life=640.0)
    assert decay_ceiling(config) ** (640 / batch_size) == pytest.approx(0.5)
    assert decay_ceiling(QUICK) == QUICK.ema_decay


@pytest.mark.parametrize("parts", [(1, 3), (2, 1), (2, 2), (4, 1)], ids=str)
def test_a_batch_is_the_same_however_it_is_divided(parts: tuple[int, int]) -> None:
    size, accumulate = parts
    config = replace(QUICK, batch_size=5)

    def batch(group: Processes, accumulate: int) -> list[Part]:
        pictures = Pictures(augmented=False)
        divided = replace(config, accumulate=accumulate)
        return list(Batches(pictures, divided, 1000, 2, torch.device("cpu"), group).parts(step=3))

    (whole,) = batch(Processes(), 1)
    divided = [batch(Processes(rank, size), accumulate) for rank in range(size)]
    assert all(
        [part.is_last for part in own] == [False] * (accumulate - 1) + [True] for own in divided
    )
    for name in ("images", "t", "position", "labels"):
        together = torch.cat([getattr(part, name) for own in divided for part in own])
        assert torch.equal(together, getattr(whole, name)), name
    assert len({part.dropout_seed for own in divided for part in own}) == size * accumulate


@pytest.mark.parametrize("accumulate", [2, 3, 5])
@pytest.mark.parametrize("loss", [{}, {"diffusion": GaussianDiffusion(variance_type="learned")}])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    accumulate: int, loss: dict[str, object]
) -> None:
    gradients = []
    for divided in (1, accumulate):
        model, *rest, config = quick_recipe(
            deterministic=True, batch_size=5, accumulate=divided, grad_clip=1e9, **loss
        )
        run = Run(model, *rest, config, torch.device("cpu"), Processes())
        run.advance()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_batch_must_have_a_picture_for_each_part(tmp_path: Path) -> None:
    sentence = "batch_size must be at least 5, a picture for each of 5 parts on each of 1 processes"
    with pytest.raises(ValueError, match=f"^{sentence}; got 4$"):
        train(*quick_recipe(accumulate=5), out=tmp_path / "a.safetensors")


def test_a_learned_variance_is_trained_and_drawn_with(tmp_path: Path) -> None:
    recipe = quick_recipe(diffusion=GaussianDiffusion(variance_type="learned_range"), num_steps=30)
    path = train(*recipe, out=tmp_path / "a.safetensors", progress=False)
    model, diffusion = checkpoint.load(path)
    images = sample(model, (2, 1, 4, 4), diffusion=diffusion, num_steps=10, seed=0)
    assert diffusion.variance_type == "learned_range" and images.isfinite().all()


@pytest.mark.parametrize(
    ("local_rank", "device", "wanted"),
    [
        (1, "cuda", "cuda:1"),
        (1, "cuda:1", "cuda:1"),
        (1, "cpu", "cpu"),
        (2, "cuda", "process 2 of this machine has no GPU of its own among 2"),
        (1, "cuda:0", "processes cannot share cuda:0; ask for cuda, and each has its own"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, device: str, wanted: str
) -> None:
    assert local_device(device) == torch.device(device)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        found = str(local_device(device))
    except ValueError as error:
        found = str(error)
    assert found == wanted

"""What a run tells TensorBoard, and the samples it draws on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_fast import GaussianDiffusion, checkpoint, load, sample
from ddpm_fast.training import train
from small_training import curves, quick_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

TAGS = ["gradient_norm", "images_per_s", "learning_rate", "loss"]


def test_curves(tmp_path: Path) -> None:
    recipe = quick_recipe(lr_schedule="cosine")
    told = {"out": tmp_path / "a.safetensors", "progress": False, "log_dir": tmp_path / "logs"}
    train(*recipe, **told)
    found = curves(tmp_path / "logs")
    assert sorted(found) == TAGS
    assert all([step for step, _ in curve] == [5, 10, 12] for curve in found.values())
    assert all(value > 0 for curve in found.values() for _, value in curve)
    rates = [value for _, value in found["learning_rate"]]
    assert rates == sorted(rates, reverse=True) and rates[0] < recipe.config.learning_rate


def test_logs_change_nothing_and_grids_are_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logs = tmp_path / "logs"
    plain = train(*quick_recipe(), out=tmp_path / "plain.safetensors", progress=False)
    logged = train(
        *quick_recipe(),
        out=tmp_path / "logged.safetensors",
        progress=False,
        log_dir=logs,
        sample_every=5,
    )
    assert logged.read_bytes() == plain.read_bytes()
    grids = sorted(path.name for path in logs.glob("*.png"))
    assert grids == ["samples-0000005.png", "samples-0000010.png"]
    with Image.open(logs / grids[0]) as picture:
        assert picture.mode == "L"


def test_a_resumed_run_withdraws_what_was_told_of_later_steps(tmp_path: Path) -> None:
    logs, out = tmp_path / "logs", tmp_path / "a.safetensors"
    recipe = quick_recipe()
    recipe.dataset.before[6] = lambda: recipe.dataset.images.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        train(*recipe, out=out, progress=False, log_dir=logs, sample_every=6)
    train(*quick_recipe(), out=out, resume=True, progress=False, log_dir=logs, sample_every=6)
    assert [step for step, _ in curves(logs)["loss"]] == [5, 6, 10, 12]


@pytest.mark.parametrize("variance_type", [None, "learned_range"])
def test_samples_are_those_of_the_averaged_weights(
    tmp_path: Path, variance_type: str | None
) -> None:
    pytest.importorskip("tensorboard")
    diffusion = GaussianDiffusion(variance_type=variance_type)
    out, logs = tmp_path / "a.safetensors", tmp_path / "logs"
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_fast.training.logs.save_grid", lambda x, *_, **__: seen.append(x))
        recipe = quick_recipe(diffusion=diffusion)
        train(*recipe, out=out, progress=False, log_dir=logs, sample_every=12)
    model, diffusion = load(out)
    options = {"sampler": "ddim", "num_steps": 50, "seed": 0}
    labels = torch.arange(16) % 2
    wanted = sample(model, (16, 1, 4, 4), diffusion=diffusion, class_labels=labels, **options)
    (found,) = seen
    torch.testing.assert_close(found, wanted)
    assert recipe.model.training


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sample_every": 5}, "sample_every needs a log_dir"),
        ({"sample_every": 0, "log_dir": "logs"}, "sample_every must be above 0; got 0"),
    ],
    ids=str,
)
def test_impossible_logs(tmp_path: Path, options: dict[str, object], sentence: str) -> None:
    recipe = quick_recipe()
    with pytest.raises(ValueError) as caught:
        train(*recipe, out=tmp_path / "a.safetensors", **options)
    assert str(caught.value) == sentence
    assert recipe.dataset.batches == 0


def test_without_tensorboard_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    recipe = quick_recipe()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ddpm-fast\[tensorboard\]'$"):
        train(*recipe, out=tmp_path / "a.safetensors", log_dir=tmp_path / "logs")
    assert recipe.dataset.batches == 0 and list(tmp_path.iterdir()) == []


def test_an_interrupted_run_has_told_all(tmp_path: Path) -> None:
    recipe = quick_recipe()
    recipe.dataset.before[7] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(*recipe, out=tmp_path / "a.safetensors", progress=False, log_dir=tmp_path / "logs")
    assert [step for step, _ in curves(tmp_path / "logs")["loss"]] == [5, 8]


def test_a_foreign_network_is_refused_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = quick_recipe()._replace(model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a checkpoint cannot hold a Linear; known"):
        train(*recipe, out=tmp_path / "a.safetensors", log_dir=tmp_path / "logs", sample_every=5)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_is_written_before_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def full(*arguments: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("ddpm_fast.training.logs.save_grid", full)
    out = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match="No space left"):
        train(*quick_recipe(), out=out, log_dir=tmp_path / "logs", sample_every=5, progress=False)
    assert checkpoint.read(out).step == 5

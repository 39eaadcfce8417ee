"""The command line that measures: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_fast import GaussianDiffusion, checkpoint, cli, image_io, ops
from ddpm_fast.cli.eval.bpd import evenly, table
from ddpm_fast.data import digits
from ddpm_fast.frechet import FeatureStatistics, frechet_distance, pixels
from ddpm_fast.likelihood import BitsPerDim, bits_per_dim
from ddpm_fast.models import LightweightUNet

pytest.importorskip("sklearn")


def run(line: str) -> int:
    return cli.main(shlex.split(f"eval {line}"))


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(ops, "_warned", {"cpu", "cuda"})  # the suite also runs without kernels
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class SeparateModel(nn.Module):
    """Arithmetic pixel by pixel; its classes are visible."""

    in_channels, image_size, num_classes = 1, 8, 10

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        labels = torch.full_like(t, 10) if class_labels is None else class_labels
        return 0.5 * x - 0.05 * labels[:, None, None, None]


@pytest.fixture
def separate_model(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, GaussianDiffusion]:
    """Stands in for every checkpoint, with a diffusion of twelve steps."""
    loaded = SeparateModel(), GaussianDiffusion.from_schedule("squaredcos_cap_v2", 12)
    monkeypatch.setattr(cli.options, "load", lambda name, device: loaded)
    return loaded


@pytest.fixture
def colour_folder(current_folder: Path) -> Path:
    """Nine colour pictures of 8x8, in two classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(9, 3, 8, 8, generator=generator) * 2 - 1
    image_io.save_images(images[:4], current_folder / "colours" / "a")
    image_io.save_images(images[4:], current_folder / "colours" / "b", first_index=4)
    return current_folder / "colours"


# --- bits per dimension -----------------------------------------------------------------------


def test_the_bound_is_that_of_the_library(
    separate_model: tuple[nn.Module, GaussianDiffusion], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bpd --num 5 --seed 3 --batch 2 --json bpd.json") == 0
    half = digits("held_out")
    chosen = evenly(len(half), 5)
    wanted = bits_per_dim(
        *separate_model, half.images[chosen], levels=17, class_labels=half.labels[chosen], seed=3
    )
    found = json.loads(Path("bpd.json").read_text())
    assert found["totals"] == pytest.approx(wanted.total.tolist())
    assert found["terms"] == pytest.approx(wanted.terms.mean(0).tolist())
    assert found["timesteps"] == list(wanted.timesteps) and found["levels"] == 17
    assert found["options"]["seed"] == 3 and found["labels"]
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "digits: 5 pictures of digits, with labels, 17 levels, seed 3"
    assert lines == table(wanted).splitlines()


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 448, 897])])
def test_pictures_are_taken_evenly(count: int, chosen: list[int]) -> None:
    assert evenly(898, count).tolist() == chosen


def test_too_large_a_batch_is_a_sentence(
    separate_model: tuple[nn.Module, GaussianDiffusion],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def out_of_memory(*args: object, **options: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(separate_model[0], "forward", out_of_memory)
    assert run("bpd --num 5 --batch 3 --device cpu") == 2
    sentence = "--batch 3: cpu has too little memory for so many pictures at a time"
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"

    monkeypatch.setattr(cli.options, "load", out_of_memory)
    assert run("bpd --device cpu") == 2
    sentence = "digits: cpu has too little memory for it"
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"


def test_the_table_puts_terms_together() -> None:
    timesteps = tuple(range(20, -1, -1))
    terms = torch.arange(21.0).flip(0).double().expand(3, -1) / 100  # t / 100
    found = BitsPerDim(terms.sum(1) + 0.5, torch.full((3,), 0.5).double(), terms, timesteps)
    assert [line.split("  ")[0] for line in table(found).splitlines()[1:]] == [
        "the prior",
        "t = 20 ... 16",
        "t = 15 ... 8",
        "t = 7 ... 4",
        "t = 3 ... 2",
        "t = 1",
        "t = 0, the decoder",
        "total",
    ]
    values = [float(line[24:32]) for line in table(found).splitlines()[1:]]
    assert values == pytest.approx([0.5, 0.9, 0.92, 0.22, 0.05, 0.01, 0, 2.6])
    alone = BitsPerDim(*(part[:1] for part in found[:3]), timesteps=timesteps)
    assert "±" in table(found) and "±" not in table(alone)


def test_a_shorter_chain_and_pictures_without_labels(
    separate_model: tuple[nn.Module, GaussianDiffusion],
    colour_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("bpd --data colours --steps 3 --spacing leading --json bpd.json") == 0
    assert "9 pictures of colours, no labels, 256 levels" in capsys.readouterr().out
    assert json.loads(Path("bpd.json").read_text())["timesteps"] == [8, 4, 0]
    assert run("bpd --data colours --steps 3 --classes-from-folders") == 0
    assert "9 pictures of colours, with labels" in capsys.readouterr().out


@pytest.mark.usefixtures("separate_model")
def test_labels_of_an_npz(capsys: pytest.CaptureFixture[str]) -> None:
    train = digits("train")
    image_io.save_npz(train.images[:4], "four.npz", labels=train.labels[:4])
    assert run("bpd --data four.npz --label-column arr_1 --steps 2") == 0
    assert "4 pictures of four.npz, with labels, 256 levels" in capsys.readouterr().out


@pytest.mark.usefixtures("separate_model")
@pytest.mark.parametrize(("classes", "status"), [(10, 0), (11, 2)])
def test_a_class_that_the_model_does_not_know_is_not_its_null_label(
    current_folder: Path, classes: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(classes):
        image_io.save_images(torch.zeros(1, 1, 8, 8), current_folder / "data" / f"{number:02}")
    assert run("bpd --data data --classes-from-folders --steps 2") == status
    sentence = "ddpm-fast: error: data: has 11 classes, of which the model knows 10\n"
    assert capsys.readouterr().err == (sentence if status else "")


def test_a_checkpoint_file_without_classes(
    colour_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(
        "colour.safetensors", LightweightUNet(), GaussianDiffusion.from_schedule("linear", 10)
    )
    assert run("bpd --checkpoint colour.safetensors --data colours --image-size 8 --num 1") == 0
    assert "1 pictures of colours, no labels" in capsys.readouterr().out


# --- Fréchet distance -------------------------------------------------------------------------


def test_the_distance_on_pixels_is_that_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    held_out, train = digits("held_out").images, digits("train").images
    assert run("frechet digits digits-train --batch 100") == 0
    *counts, distance = capsys.readouterr().out.splitlines()
    assert counts == ["digits: 899 pictures", "digits-train: 898 pictures"]
    wanted = frechet_distance(pixels(held_out), pixels(train))
    assert distance == f"Fréchet distance on pixels, 64 features: {wanted:.4f}"


FEATURES = """
import torch

class Means(torch.nn.Module):
    def forward(self, images):
        assert not self.training
        return images.mean(dim=(2, 3))

network = Means()
number = 3

class Large(torch.nn.Linear):
    def to(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

large = Large(1, 1)

def many(images):
    return torch.empty(10**15)

def broken(images):
    raise RuntimeError("expected 3 channels\\nbut got 1")

class Inside:
    @staticmethod
    def halves(images):
        return torch.stack([images.mean(dim=(1, 2, 3)), images.std(dim=(1, 2, 3))], dim=1)
"""


@pytest.mark.parametrize(("name", "dimensions"), [("network", 3), ("Inside.halves", 2)])
def test_features_that_the_user_names(
    current_folder: Path,
    colour_folder: Path,
    name: str,
    dimensions: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (current_folder / "my_features.py").write_text(FEATURES)
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    line = f"frechet colours colours --image-size 8 --features my_features:{name}"
    assert run(line) == 0
    captured = capsys.readouterr()
    assert f"on my_features:{name}, {dimensions} features: " in captured.out
    assert abs(float(captured.out.split()[-1])) < 1e-3 and captured.err == ""


@pytest.mark.filterwarnings("default")
def test_too_few_pictures_for_the_features_are_a_warning(
    colour_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("frechet colours colours --image-size 4 --channels 1") == 0
    assert capsys.readouterr().err == (
        "ddpm-fast: warning: 16 features want more than 16 pictures in each set, "
        "for which there are 9 and 9\n"
    )


def test_too_few_pictures_are_told_before_the_work_with_the_covariance(
    colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(statistics: FeatureStatistics, features: Tensor) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(FeatureStatistics, "update", update)
    with pytest.warns(UserWarning, match="16 features want more"), pytest.raises(AssertionError):
        cli.eval.frechet.run(
            cli._parser().parse_args(
                shlex.split("eval frechet colours colours --image-size 4 --channels 1")
            )
        )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("broken", "--features my_features:broken failed: RuntimeError: expected 3 channels"),
        ("large", "--features my_features:large: cpu has too little memory for it"),
        ("many", "--batch 64: cpu has too little memory for so many pictures at a time"),
    ],
)
def test_an_extractor_that_fails_is_a_sentence(
    name: str,
    sentence: str,
    current_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (current_folder / "my_features.py").write_text(FEATURES)
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    assert run(f"frechet digits digits --device cpu --features my_features:{name}") == 2
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"


@pytest.mark.parametrize("line", ["one.npz digits", "digits one.npz"])
def test_one_picture_is_refused_before_any_features_are_extracted(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def extractor(images: Tensor) -> Tensor:
        raise AssertionError("extracted")

    monkeypatch.setattr(cli.eval.frechet, "pixels", extractor)
    image_io.save_npz(torch.zeros(1, 1, 8, 8), "one.npz")
    assert run(f"frechet {line}") == 2
    assert capsys.readouterr().err == (
        "ddpm-fast: error: one.npz: the distance needs two pictures or more; got 1\n"
    )


# --- the npz of FID tools ---------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "shape"), [(1, (9, 8, 8, 1)), (3, (9, 8, 8, 3))])
def test_a_folder_becomes_an_npz(
    colour_folder: Path, channels: int, shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"npz colours --image-size 8 --channels {channels} --out reference.npz") == 0
    with np.load("reference.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].shape == shape and archive["arr_0"].dtype == np.uint8
    assert f"9 pictures of colours, uint8 {list(shape)}" in capsys.readouterr().out
    assert run(f"npz reference.npz --image-size 8 --channels {channels} --out again.npz") == 0
    assert Path("again.npz").read_bytes() == Path("reference.npz").read_bytes()


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("separate_model", "colour_folder")
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("bpd --levels 16 --num 2", "bits_per_dim: each pixel must be one of 16 levels"),
        ("bpd --image-size 16", "digits: the digits are grey, of 8x8 pixels, with their own"),
        ("bpd --label-column y", "digits: the digits are grey, of 8x8 pixels, with their own"),
        ("bpd --data nothing", "nothing: not a folder of pictures"),
        ("bpd --json no/bpd.json", "--json no/bpd.json: cannot write in no"),
        ("bpd --json colours", "--json colours is a folder; name the file to write"),
        ("bpd --steps 13", "num_steps"),
        ("frechet digits colours --image-size 9", "digits: the digits are grey"),
        ("frechet colours colours", "colours: choose the size of its pictures with --image-size"),
        ("frechet digits digits --features inception", "--features inception is neither pixels"),
        ("frechet digits digits --features net.pt", "--features net.pt is neither pixels"),
        ("frechet digits digits --features nowhere:f", "--features nowhere:f cannot be imported: "),
        ("frechet digits digits --features math:f", "--features math:f cannot be imported: "),
        ("frechet digits digits --features math:pi", "--features math:pi cannot be called: it is"),
        (
            "frechet digits digits --features torch:exp",
            "the extractor must return features [64, D]",
        ),
        (
            "frechet colours colours --image-size 128",
            "49152 features are more than the 32768 whose covariance can be worked with: "
            "take smaller pictures or another extractor (--image-size, --features)",
        ),
        ("npz colours --out x.npz", "colours: choose the size of its pictures with --image-size"),
        ("npz digits --out x.png", "--out x.png must end in .npz"),
        ("npz digits --out no/x.npz", "--out no/x.npz: cannot write in no"),
        ("npz digits --out folder.npz", "--out folder.npz is a folder; name the file to write"),
    ],
)
def test_bad_input_is_a_sentence(
    line: str, sentence: str, current_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.npz").mkdir()
    assert run(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ddpm-fast: error: ") and captured.err.count("\n") == 1
    assert sentence in captured.err
    assert {path.name for path in current_folder.iterdir()} == {"colours", "folder.npz"}


@pytest.mark.parametrize("measure", ["", *cli.eval.MEASURES])
def test_help_shows_examples_that_parse(measure: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(f"{measure} --help")
    assert end.value.code == 0
    lines = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    assert lines
    for line in lines:
        assert line.startswith(f"  ddpm-fast eval {measure}")
        arguments: Any = cli._parser().parse_args(shlex.split(line)[1:])
        assert callable(arguments.measure.run)

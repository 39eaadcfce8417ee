"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm_fast import GaussianDiffusion, atomic, checkpoint, cli, image_io, ops, sampler
from ddpm_fast.image_io import to_uint8
from ddpm_fast.image_io.painting import GAP, LABEL_HEIGHT, READABLE_SIZE
from ddpm_fast.models import LightweightUNet, UNet
from ddpm_fast.training import TrainConfig, digits_recipe, folder_recipe

COMMANDS = ("sample", "train", "bench", "info")


def run(*options: object) -> int:
    return cli.main([str(option) for option in options])


class SeparateModel(nn.Module):
    """Arithmetic pixel by pixel, so that no batch changes the rounding; its classes are visible."""

    in_channels, image_size, num_classes = 1, 8, 10

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        return 0.5 * x - 0.05 * class_labels[:, None, None, None]


@pytest.fixture
def separate_model(monkeypatch: pytest.MonkeyPatch) -> SeparateModel:
    """Stands in for every checkpoint, with a diffusion of ten steps."""
    model = SeparateModel()
    diffusion = GaussianDiffusion.from_schedule("linear", 10)
    monkeypatch.setattr(cli.options, "load", lambda name, device: (model, diffusion))
    return model


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny class-conditional network."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(
            in_channels=1,
            image_size=8,
            model_channels=8,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            num_classes=10,
        )
    checkpoint.save(path, model, GaussianDiffusion.from_schedule("linear", 10))
    return path


@pytest.fixture(scope="session")
def colour_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network without classes and without a size of its own."""
    path = tmp_path_factory.mktemp("checkpoints") / "colour.safetensors"
    checkpoint.save(path, LightweightUNet(), GaussianDiffusion.from_schedule("linear", 10))
    return path


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For networks as small as these, more threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def already_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite also runs with the extension hidden, of which each process is told once."""
    monkeypatch.setattr(ops, "_warned", {"cpu", "cuda"})


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_npz(path: str) -> tuple[np.ndarray[Any, Any], list[int]]:
    with np.load(path) as archive:
        return archive["arr_0"], archive["arr_1"].tolist()


def tiles(path: str, count: int, columns: int) -> list[np.ndarray[Any, Any]]:
    """The 8x8 pictures in a labelled grid."""
    with Image.open(path) as picture:
        grid = np.array(picture)
    corners = [
        (
            GAP + i // columns * (READABLE_SIZE + LABEL_HEIGHT + GAP),
            GAP + i % columns * (READABLE_SIZE + GAP),
        )
        for i in range(count)
    ]
    scale = READABLE_SIZE // 8
    return [grid[y : y + READABLE_SIZE : scale, x : x + READABLE_SIZE : scale] for y, x in corners]


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("3", [3]),
        ("0-9", list(range(10))),
        ("1,7,7", [1, 7, 7]),
        ("0-2,9,4-4", [0, 1, 2, 9, 4]),
        (" 1 , 2 - 3 ", [1, 2, 3]),
    ],
)
def test_class_lists(text: str, classes: list[int]) -> None:
    assert cli.sample.parse_classes(text, 10) == classes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a", "'a' is neither a class, such as 3, nor a range, such as 0-9"),
        ("", "'' is neither a class, such as 3, nor a range, such as 0-9"),
        ("1,,2", "'' is neither a class, such as 3, nor a range, such as 0-9"),
        ("-1", "'-1' is neither a class, such as 3, nor a range, such as 0-9"),
        ("1.5", "'1.5' is neither a class, such as 3, nor a range, such as 0-9"),
        ("1-2-3", "'1-2-3' is neither a class, such as 3, nor a range, such as 0-9"),
        ("5-3", "the range 5-3 runs backwards"),
        ("10", "the classes of this model are 0-9"),
        ("0-999999999999", "the classes of this model are 0-9"),
    ],
)
def test_bad_class_lists(text: str, complaint: str) -> None:
    with pytest.raises(ValueError) as error:
        cli.sample.parse_classes(text, 10)
    assert str(error.value) == f"--classes {text}: {complaint}"


@pytest.mark.parametrize(
    ("out", "kind"),
    [
        ("a.png", ".png"),
        ("b/a.PNG", ".png"),
        ("a.npz", ".npz"),
        ("a.gif", ".gif"),
        ("a.WebP", ".webp"),
        ("folder/", "folder"),
        ("folder.png/", "folder"),
        (".", "folder"),
    ],
)
def test_output_kinds(out: str, kind: str) -> None:
    assert cli.options.output_kind(out) == kind


def help_text(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(command, capsys)
    examples = re.findall(r"^  ddpm-fast (.*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert example.startswith(command)
        cli._parser().parse_args(shlex.split(example))


def test_help_of_train_tells_the_defaults_of_the_recipes(
    capsys: pytest.CaptureFixture[str], picture_folder: Path
) -> None:
    pytest.importorskip("sklearn")
    text = " ".join(help_text("train", capsys).split())
    digits, folder = digits_recipe().config, TrainConfig()
    assert list(cli.train.TRAIN_OPTIONS) == [field.name for field in fields(TrainConfig)]
    for name, (flag, meaning) in cli.train.TRAIN_OPTIONS.items():
        ours, theirs = getattr(digits, name), getattr(folder, name)
        default = f"{ours}" if ours == theirs else f"{ours} for digits, else {theirs}"
        default = "off" if ours is None else default
        values = "[NX]" if name not in cli.train.CHOICES else r"{[\w,]+}"
        assert re.search(rf"{flag} {values} {re.escape(f'{meaning} (default: {default})')}", text)
    size = signature(folder_recipe).parameters["image_size"].default
    model = signature(UNet).parameters
    assert f"height and width to train at (default: {size})" in text
    assert f"3 for colour (default: {model['in_channels'].default})" in text
    assert f"less is faster (default: {model['model_channels'].default})" in text


def test_defaults_are_those_of_the_library() -> None:
    options = cli._parser().parse_args(["sample"])
    defaults = {name: p.default for name, p in signature(sampler.sample).parameters.items()}
    assert options.sampler == defaults["sampler"]
    assert options.spacing == defaults["timestep_spacing"]
    assert options.eta == defaults["eta"]
    assert options.backend == defaults["backend"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "the following arguments are required: COMMAND (see ddpm-fast --help)"),
        ("sample --num 0", "argument --num/--num-samples: must be at least 1; got 0"),
        ("sample --num many", "argument --num/--num-samples: must be a whole number; got 'many'"),
        ("sample --first-index -1", "argument --first-index: must be at least 0; got -1"),
        ("sample --bogus", "unrecognized arguments: --bogus (see ddpm-fast --help)"),
        ("train digits", "the following arguments are required: --out (see ddpm-fast train"),
    ],
)
def test_mistaken_options(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(*line.split())
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"ddpm-fast: error: {sentence}")
    assert captured.err.count("\n") == 1


# --- sample -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("separate_model")
def test_sample_without_options_draws_a_labelled_grid_of_8_by_8(
    capsys: pytest.CaptureFixture[str], current_folder: Path
) -> None:
    assert run("sample") == 0
    assert [path.name for path in current_folder.iterdir()] == ["samples.png"]
    with Image.open("samples.png") as picture:
        side = GAP + 8 * (READABLE_SIZE + GAP)
        assert picture.size == (side, side + 8 * LABEL_HEIGHT)
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first == "samples.png: 64 samples of digits, seed 0"
    assert re.fullmatch(
        r"ddpm with 10 steps, (native|reference) backend on (cpu|cuda): [\d.]+ s, [\d.]+ steps/s",
        second,
    )
    assert captured.err == "", "no progress bar where there is no terminal"


def test_pictures_are_those_of_the_library(separate_model: SeparateModel) -> None:
    expected = sampler.sample(
        separate_model,
        (5, 1, 8, 8),
        diffusion=GaussianDiffusion.from_schedule("linear", 10),
        sampler="ddim",
        num_steps=4,
        eta=0.5,
        timestep_spacing="leading",
        seed=7,
        first_index=3,
        class_labels=[1, 7, 7, 1, 7],
        guidance_scale=2.0,
    )
    options = "--sampler ddim --steps 4 --eta 0.5 --spacing leading --seed 7 --first-index 3 "
    options += "--num 5 --classes 1,7,7 --guidance 2 --device cpu --out a.npz"
    assert run("sample", *options.split()) == 0
    images, labels = read_npz("a.npz")
    assert labels == [1, 7, 7, 1, 7]
    assert (images == to_uint8(expected)).all()


@pytest.mark.usefixtures("separate_model")
@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_pictures_do_not_depend_on_the_batch_size_or_the_kind_of_file(
    batch: int, current_folder: Path
) -> None:
    options = ("--num", 7, "--seed", 5, "--first-index", 40, "--batch", batch)
    assert run("sample", "--num", 50, "--seed", 5, "--out", "all.npz") == 0
    assert run("sample", *options, "--out", "part.npz") == 0
    assert run("sample", *options, "--out", "part.png") == 0
    assert run("sample", *options, "--out", "part/") == 0

    images, labels = read_npz("all.npz")
    part, part_labels = read_npz("part.npz")
    assert part_labels == labels[40:47] == [0, 1, 2, 3, 4, 5, 6]
    assert (part == images[40:47]).all()
    files = sorted((current_folder / "part").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(40, 47)]
    for image, file, tile in zip(part, files, tiles("part.png", 7, 3), strict=True):
        with Image.open(file) as picture:
            assert (np.array(picture) == image[:, :, 0]).all()
        assert (tile == image[:, :, 0]).all()


def frames_of(path: str) -> list[np.ndarray[Any, Any]]:
    with Image.open(path) as animation:
        frames = []
        for i in range(animation.n_frames):
            animation.seek(i)
            frames.append(np.array(animation.convert("L")))
        return frames


@pytest.mark.parametrize("out", ["a.gif", "a.webp"])
@pytest.mark.parametrize(("options", "moments"), [("", range(11)), ("--frames 3", [0, 5, 10])])
def test_an_animation_shows_the_denoising(
    separate_model: SeparateModel, out: str, options: str, moments: Any
) -> None:
    """Noise first, samples last, whatever the batch; a class below each picture."""
    _, kept = sampler.sample(
        separate_model,
        (5, 1, 8, 8),
        diffusion=GaussianDiffusion.from_schedule("linear", 10),
        seed=3,
        class_labels=range(5),
        return_intermediates=list(moments),
    )
    words = ["--num", 5, "--batch", 2, "--seed", 3, "--device", "cpu", *options.split()]
    assert run("sample", *words, "--out", out) == 0
    image_io.save_animation(kept.x_t, f"own{out}", captions=kept.captions(), labels=range(5))
    assert Path(out).read_bytes() == Path(f"own{out}").read_bytes()
    assert len(frames_of(out)) == len(moments)


@pytest.mark.usefixtures("separate_model")
@pytest.mark.parametrize("out", ["a.png", "a.npz", "a/", "a.gif"])
def test_a_strip_is_written_besides(
    out: str, capsys: pytest.CaptureFixture[str], current_folder: Path
) -> None:
    options = ("--num", 3, "--batch", 2, "--frames", 4)
    assert run("sample", *options, "--out", out, "--strip", "s.png") == 0
    assert sorted(path.name for path in current_folder.iterdir()) == [out.strip("/"), "s.png"]
    assert capsys.readouterr().out.splitlines()[1] == "s.png: their denoising in 4 moments"
    with Image.open("s.png") as picture:
        strip = np.array(picture)
    left = strip.shape[1] - 4 * (READABLE_SIZE + GAP)
    assert strip.shape[0] == GAP + LABEL_HEIGHT + 3 * (READABLE_SIZE + GAP)
    assert run("sample", "--num", 3, "--out", "samples.npz") == 0
    for row, image in enumerate(read_npz("samples.npz")[0]):
        y, x = GAP + LABEL_HEIGHT + row * (READABLE_SIZE + GAP), left + 3 * (READABLE_SIZE + GAP)
        assert (strip[y : y + READABLE_SIZE : 8, x : x + READABLE_SIZE : 8] == image[:, :, 0]).all()


@pytest.mark.usefixtures("separate_model")
def test_a_strip_shows_fewer_moments_than_an_animation() -> None:
    """Evenly spaced among those of the animation: the same run serves both."""
    options = ("--num", 2, "--seed", 1)
    assert run("sample", *options, "--out", "a.gif", "--strip", "both.png") == 0
    assert run("sample", *options, "--strip", "alone.png") == 0
    assert len(frames_of("a.gif")) == 11
    assert Path("both.png").read_bytes() == Path("alone.png").read_bytes()


@pytest.mark.usefixtures("separate_model")
def test_an_existing_folder_needs_no_slash(current_folder: Path) -> None:
    (current_folder / "pictures").mkdir()
    assert run("sample", "--num", 2, "--out", "pictures") == 0
    assert len(list((current_folder / "pictures").iterdir())) == 2


def test_a_checkpoint_file_is_drawn_from(digits_file: Path) -> None:
    options = ("--checkpoint", digits_file, "--num", 12)
    runs = {"a": "", "b": "", "c": "--seed 1", "d": "--backend reference"}
    for name, more in runs.items():
        assert run("sample", *options, *more.split(), "--out", f"{name}.npz") == 0
    images, labels = read_npz("a.npz")
    assert images.shape == (12, 8, 8, 1)
    assert labels == [*range(10), 0, 1]
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    assert (images != read_npz("c.npz")[0]).any()
    difference = images.astype(int) - read_npz("d.npz")[0]
    assert abs(difference).max() <= 1


def test_models_without_classes_or_size(colour_file: Path) -> None:
    options = ("--checkpoint", colour_file, "--num", 2, "--image-size", 9)
    assert run("sample", *options, "--out", "a.npz") == 0
    with np.load("a.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].shape == (2, 9, 9, 3)
    assert run("sample", *options, "--out", "a.png") == 0
    with Image.open("a.png") as picture:
        assert picture.mode == "RGB"
        assert picture.height == 2 * GAP + 72, "no labels, and no room for them"


@pytest.mark.parametrize("options", ["--out a.png", "--out a/", "--out a.npz --strip s.png"])
def test_what_is_no_picture_is_not_drawn(
    options: str,
    separate_model: SeparateModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(separate_model, "in_channels", 4)
    assert run("sample", "--num", 2, "--out", "latents.npz") == 0
    monkeypatch.setattr(cli.sample, "sample", pytest.fail)
    assert run("sample", "--num", 2, *options.split()) == 2
    sentence = "this model draws 4 channels, and pictures have 1 or 3: take --out FILE.npz, and "
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}no --strip\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "--out a.jpg",
            "--out a.jpg has the extension .jpg; known are .png (a grid), .gif and .webp "
            "(an animation), .npz (arrays), and a folder, written with a slash: a.jpg/",
        ),
        (
            "--out pictures",
            "--out pictures has no extension; known are .png (a grid), .gif and .webp "
            "(an animation), .npz (arrays), and a folder, written with a slash: pictures/",
        ),
        ("--out no/a.png", "--out no/a.png: cannot write in no: No such file or directory"),
        ("--out file/", "--out file/: cannot write in file: Not a directory"),
        ("--out file/a/", "--out file/a/: cannot write in {here}/file: Not a directory"),
        ("--out fifo.png", "--out fifo.png exists and is not a regular file"),
        ("--strip fifo.png", "--strip fifo.png exists and is not a regular file"),
        ("--strip no/a.png", "--strip no/a.png: cannot write in no: No such file or directory"),
        ("--strip folder.png", "--strip folder.png is a folder; name the file to write"),
        ("--strip new.png/", "--strip new.png/ is a folder; name the file to write"),
        ("--strip a.gif", "--strip a.gif must end in .png"),
        ("--strip samples.png", "--strip and --out are one file, samples.png"),
        ("--strip ./a.png --out a.png", "--strip and --out are one file, ./a.png"),
        (
            "--frames 5",
            "--frames 5 is for an animation, --out FILE.gif or .webp, and for --strip",
        ),
        (
            "--frames 5 --out a/",
            "--frames 5 is for an animation, --out FILE.gif or .webp, and for --strip",
        ),
        (
            "--frames 1 --out a.gif",
            "--frames must be at least 2, the noise and the samples; got 1",
        ),
        (
            "--frames 12 --out a.webp",
            "--frames 12: a run of 10 steps has 11 moments to show",
        ),
        (
            "--frames 6 --steps 4 --strip a.png",
            "--frames 6: a run of 4 steps has 5 moments to show",
        ),
        (
            "--checkpoint no.safetensors",
            "no.safetensors: no such checkpoint file (bundled models: digits)",
        ),
        ("--checkpoint {colour} --classes 3", "--classes 3: this model has no classes"),
        (
            "--checkpoint {colour}",
            "this model draws pictures of any size: choose one with --image-size",
        ),
        (
            "--classes 3,x",
            "--classes 3,x: 'x' is neither a class, such as 3, nor a range, such as 0-9",
        ),
        ("--classes 10", "--classes 10: the classes of this model are 0-9"),
        ("--seed -1", "seed must lie in [0, 2**64); got -1"),
        ("--steps 11", "num_steps must lie in [1, 10]; got 11"),
        ("--eta 0.5", "eta belongs to ddim; got 0.5 for ddpm"),
        ("--device nonsense", "--device nonsense: {why}"),
        ("--device meta", "--device meta: {why}"),
        ("--first-index 99999999999999999999999", "first_index must lie in {why}"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    options: str,
    sentence: str,
    digits_file: Path,
    colour_file: Path,
    current_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (current_folder / "file").touch()
    os.mkfifo("fifo.png")
    os.mkdir("folder.png")
    words = options.format(colour=colour_file).split()
    if "--checkpoint" not in words:
        words += ["--checkpoint", str(digits_file)]
    assert run("sample", *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = re.escape(sentence.replace("{here}", str(current_folder))).replace(r"\{why\}", ".+")
    assert re.fullmatch(f"ddpm-fast: error: {expected}\n", captured.err)
    left = sorted(path.name for path in current_folder.rglob("*"))
    assert left == ["fifo.png", "file", "folder.png"]


def test_outputs_are_checked_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    monkeypatch.setattr(cli.options, "load", pytest.fail)
    for command in (("sample", "--out"), ("train", "digits", "--out")):
        assert run(*command, "a.png") == 2
        sentence = "--out a.png: cannot write in .: Read-only file system"
        assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast._extension.native_devices", frozenset())
    monkeypatch.setattr("ddpm_fast._extension.reason", "it is not there")
    monkeypatch.setattr(ops, "_warned", set())


@pytest.mark.usefixtures("separate_model", "no_extension")
@pytest.mark.filterwarnings("default:ddpm_fast computes on")
def test_the_native_backend_is_not_silently_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", "cpu", "--num", 2, "--batch", 1)
    assert run("sample", *options, "--backend", "native") == 2
    why = "backend 'native' cannot serve cpu tensors: it is not there"
    assert capsys.readouterr().err == f"ddpm-fast: error: {why}\n"

    assert run("sample", *options) == 0
    captured = capsys.readouterr()
    why = "ddpm_fast computes on cpu in plain PyTorch: it is not there"
    assert captured.err == f"ddpm-fast: warning: {why}\n"
    assert "reference backend on cpu" in captured.out


@pytest.mark.usefixtures("separate_model")
@pytest.mark.parametrize(("batch", "progress"), [(4, "10/10"), (2, "4/4")])
def test_a_terminal_sees_progress(
    batch: int, progress: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("sample", "--num", 4, "--batch", batch) == 0
    bar = capsys.readouterr().err
    assert progress in bar
    assert bar.count("\n") == 1, "one bar, whatever the number of batches"


def out_of_memory(*args: object, **options: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_large_a_batch_is_a_sentence(
    separate_model: SeparateModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(separate_model, "forward", out_of_memory)
    assert run("sample", "--device", "cpu", "--batch", 16) == 2
    sentence = "--batch 16: cpu has too little memory for so many samples at a time"
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"


@pytest.mark.usefixtures("separate_model")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "--batch 64: cpu has too little memory for so many samples at a time"),
        ("--shard-size 64 --out run", "shard_size 64: the device has too little memory for so"),
    ],
)
def test_too_large_pictures_are_a_sentence(
    options: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The CPU's own error, which has no class to itself: 256 TB have no room in 47 bits."""
    assert run("sample", "--device", "cpu", "--image-size", 1_000_000, *options.split()) == 2
    assert capsys.readouterr().err.startswith(f"ddpm-fast: error: {sentence}")


@pytest.mark.parametrize("options", ["", "--shard-size 5 --out run"])
def test_too_large_a_checkpoint_is_a_sentence(
    options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.options, "load", out_of_memory)
    assert run("sample", "--device", "cpu", *options.split()) == 2
    sentence = "digits: cpu has too little memory for it"
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"


class FullDisk(io.FileIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("separate_model")
@pytest.mark.parametrize("out", ["a.png", "a.npz", "a.gif", "a.webp", "a/"])
def test_a_full_disk_is_a_sentence_and_leaves_no_file(
    out: str,
    current_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(atomic, "open", FullDisk, raising=False)
    assert run("sample", "--num", 2, "--out", out) == 2
    file = "a/000000.png" if out == "a/" else out
    assert capsys.readouterr().err == f"ddpm-fast: error: {file}: No space left on device\n"
    assert [path for path in current_folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("out", ["a.png", "a.npz", "a.gif", "a/"])
def test_ctrl_c_ends_with_130_and_whole_files(
    out: str,
    separate_model: SeparateModel,
    current_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = iter(range(15))

    def interrupted(*args: Tensor, **labels: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return SeparateModel.forward(separate_model, *args, **labels)

    monkeypatch.setattr(separate_model, "forward", interrupted)
    # On a GPU a graph would be replayed, and the network not called.
    options = ("--num", 4, "--batch", 2, "--device", "cpu", "--out", out)
    assert run("sample", *options) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "ddpm-fast: interrupted\n")
    files = [path.name for path in current_folder.rglob("*") if path.is_file()]
    assert sorted(files) == (["000000.png", "000001.png"] if out == "a/" else [])


# --- train ------------------------------------------------------------------------------------


@pytest.fixture
def picture_folder(current_folder: Path) -> Path:
    for i, name in enumerate(("cats", "dogs")):
        (current_folder / "pictures" / name).mkdir(parents=True)
        for j in range(3):
            picture = Image.new("RGB", (12, 10), (80 * i, 40 * j, 200))
            picture.save(current_folder / "pictures" / name / f"{j}.png")
    return current_folder / "pictures"


SMALL = "--image-size 8 --model-channels 8 --batch-size 4 --warmup-steps 2"


@pytest.mark.parametrize("classes", [True, False])
def test_train_on_a_folder_then_sample(
    classes: bool, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL.split(), "--out", "m.safetensors", *["--classes-from-folders"] * classes]
    assert run("train", picture_folder, *options, "--steps", 2, "--seed", 3) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("m.safetensors: trained to step 2 on ")
    assert captured.out.endswith("ddpm-fast sample --checkpoint m.safetensors\n")
    assert captured.err == ""
    saved = checkpoint.read("m.safetensors")
    assert saved.step == 2
    assert saved.model_config["num_classes"] == (2 if classes else None)
    assert saved.model_config["in_channels"] == 3
    assert (saved.training["batch_size"], saved.training["seed"]) == (4, 3)

    assert run("sample", "--checkpoint", "m.safetensors", "--num", 2, "--steps", 2) == 0
    with Image.open("samples.png") as picture:
        assert picture.mode == "RGB"


def test_train_resumes_and_does_not_overwrite(
    picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("train", picture_folder, *SMALL.split(), "--channels", 1, "--out", "m.safetensors")
    assert run(*options, "--steps", 1) == 0
    before = Path("m.safetensors").read_bytes()
    assert run(*options, "--steps", 2) == 2
    assert Path("m.safetensors").read_bytes() == before
    capsys.readouterr()
    assert run(*options, "--steps", 2, "--resume") == 0
    assert checkpoint.read("m.safetensors").step == 2


@pytest.mark.parametrize("kind", ["npz", "datasets"])
def test_train_on_other_pictures(
    kind: str, current_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, labels = np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 2, 1]
    if kind == "npz":
        np.savez("data.npz", pictures, kind=labels)
    else:
        hf = pytest.importorskip("datasets")
        columns = {"p": [Image.fromarray(picture) for picture in pictures], "kind": labels}
        hf.Dataset.from_dict(columns).save_to_disk("data")
    path = "data.npz" if kind == "npz" else "data"
    column = "arr_0" if kind == "npz" else "p"
    options = [*SMALL.split(), "--steps", 1, "--no-flip", "--out", "m.safetensors"]
    columns = ["--image-column", column, "--label-column", "kind"]
    assert run("train", path, *options, *columns) == 0
    assert checkpoint.read("m.safetensors").model_config["num_classes"] == 3


def test_train_on_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert run("train", "digits", "--steps", 1, "--batch-size", 2, "--out", "d.safetensors") == 0
    saved = checkpoint.read("d.safetensors")
    assert saved.model_config["num_classes"] == 10
    assert saved.training["learning_rate"] == digits_recipe().config.learning_rate


def test_too_large_a_training_batch_is_a_sentence(
    picture_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(UNet, "forward", out_of_memory)
    options = [*SMALL.split(), "--device", "cpu", "--out", "m.safetensors"]
    assert run("train", picture_folder, *options) == 2
    assert capsys.readouterr().err == (
        "ddpm-fast: error: --batch-size 4: cpu has too little memory for so many pictures"
        " at a time; take fewer, or more parts with --accumulate\n"
    )
    assert not Path("m.safetensors").exists()


def test_train_with_every_choice(picture_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    choices = (
        "--loss huber --min-snr-gamma 5 --offset-noise 0.1 --accumulate 2 --lr-schedule cosine"
        " --ema-half-life 100 --precision bf16 --variance-type learned_range"
        " --prediction-type v_prediction --beta-schedule squaredcos_cap_v2"
        " --log-dir logs --sample-every 2"
    )
    options = [*SMALL.split(), *choices.split(), "--out", "m.safetensors", "--steps", 2]
    assert run("train", picture_folder, *options) == 0
    saved = checkpoint.read("m.safetensors")
    told = {"loss": "huber", "min_snr_gamma": 5.0, "accumulate": 2, "precision": "bf16"}
    assert told.items() <= saved.training.items()
    assert saved.model_config["out_channels"] == 6
    assert saved.diffusion_config["variance_type"] == "learned_range"
    with Image.open("logs/samples-0000002.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("digits --sample-every 5", "sample_every needs a log_dir"),
        (
            "digits --image-size 16",
            "--image-size is for other data; the digits have their own recipe",
        ),
        ("digits --lr 0", "TrainConfig: learning_rate must be above 0; got 0.0"),
        (
            "digits --ema-half-life 500 --ema-decay 0.99",
            "--ema-half-life is instead of --ema-decay; give one of them",
        ),
        ("digits --out t7/", "--out t7/ is a folder; name the file to write"),
        ("digits --out .", "--out . is a folder; name the file to write"),
        ("no", "no: not a folder of pictures"),
        ("no.npz", "no.npz: No such file or directory"),
        ("digits --no-flip", "--no-flip is for other data; the digits have their own recipe"),
    ],
)
def test_bad_training_input(
    options: str, sentence: str, current_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--out", "m.safetensors", *options.split()) == 2
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"
    assert list(current_folder.iterdir()) == []


# --- info, and the process --------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["backends"]) == {"cpu", "cuda"}
    assert facts["models"] == ["digits"]
    assert run("info") == 0
    text = capsys.readouterr().out
    for fact in (facts["version"], facts["torch"], *facts["build"].values(), "digits"):
        assert fact in text
    assert f"on cpu     {facts['backends']['cpu']}" in text


@pytest.mark.slow
def test_the_process_returns_the_exit_code(digits_file: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", "sample", "--checkpoint", str(digits_file)]
    done = subprocess.run([*command, "--classes", "no"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ddpm-fast: error: --classes no: " in done.stderr

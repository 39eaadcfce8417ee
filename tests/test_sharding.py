"""Shards of a run: whole or not there, of this run or redone, and in the end the same bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import small_training
from ddpm_fast import GaussianDiffusion, atomic, cli, load, ops, processes, sample, shards
from ddpm_fast.image_io import save_npz, to_uint8
from ddpm_fast.sharding import sample_sharded, turns
from ddpm_fast.shards import difference

pytestmark = pytest.mark.usefixtures("one_thread")

DIFFUSION = GaussianDiffusion.from_schedule("linear", 10)
NUM, SHARD = 23, 5
WAS_DAMAGED = "cut short, altered, or of another run; it is drawn again"


class Pixelwise(nn.Module):
    """Arithmetic pixel by pixel, so that no batch changes the rounding; its classes are visible."""

    num_classes = 10

    def __init__(self, slope: float = 0.5) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        shift = 0 if class_labels is None else 0.05 * class_labels[:, None, None, None]
        return self.slope * x - shift


OPTIONS: dict[str, Any] = {
    "diffusion": DIFFUSION,
    "shard_size": SHARD,
    "num_steps": 2,
    "seed": 3,
    "first_index": 40,
    "class_labels": [index % 10 for index in range(NUM)],
}


def draw(out: Path, model: nn.Module | None = None, num: int = NUM, **options: Any) -> Path:
    return sample_sharded(model or Pixelwise(), (num, 3, 4, 2), out, **OPTIONS | options)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    draw(folder)
    return files(folder)


@pytest.fixture
def folder(tmp_path: Path, finished: dict[str, bytes]) -> Path:
    """The finished run, to be damaged."""
    put(tmp_path, finished)
    return tmp_path


def put(folder: Path, finished: dict[str, bytes]) -> None:
    (folder / "shards").mkdir()
    for name, content in finished.items():
        (folder / name).write_bytes(content)


# --- what is written ----------------------------------------------------------------------------


@given(
    num=st.integers(1, 40),
    shard_size=st.integers(1, 45),
    channels=st.integers(1, 5),
    labelled=st.booleans(),
    first_index=st.sampled_from([0, 999_990, 2**48 - 40]),
)
def test_the_merged_file_is_that_of_one_batch(
    num: int, shard_size: int, channels: int, labelled: bool, first_index: int
) -> None:
    """Byte for byte what save_npz makes of the samples, however the run is cut into shards."""
    model, shape = Pixelwise(), (num, channels, 3, 2)
    options: dict[str, Any] = {"diffusion": DIFFUSION, "num_steps": 2, "seed": 5}
    labels = [index % 7 for index in range(num)] if labelled else None
    options |= {"first_index": first_index, "class_labels": labels}
    with tempfile.TemporaryDirectory() as name:
        images = sample(model, shape, **options)
        save_npz(images, f"{name}/whole.npz", labels=labels)
        merged = sample_sharded(model, shape, f"{name}/run", shard_size=shard_size, **options)
        assert merged == Path(name, "run", "samples.npz")
        assert merged.read_bytes() == Path(name, "whole.npz").read_bytes()
        assert len(list(Path(name, "run", "shards").iterdir())) == -(-num // shard_size)


def test_a_shard_is_an_npz_of_its_part(finished: dict[str, bytes]) -> None:
    assert list(finished) == [
        "run.json",
        "samples.npz",
        "shards/000040-000044.npz",
        "shards/000045-000049.npz",
        "shards/000050-000054.npz",
        "shards/000055-000059.npz",
        "shards/000060-000062.npz",
    ]
    options = {name: value for name, value in OPTIONS.items() if name != "shard_size"}
    images = to_uint8(sample(Pixelwise(), (NUM, 3, 4, 2), **options))
    for start, name in enumerate(list(finished)[2:]):
        part = slice(start * SHARD, (start + 1) * SHARD)
        with np.load(io.BytesIO(finished[name])) as archive:
            assert archive.files == ["arr_0", "arr_1"]
            assert (archive["arr_0"] == images[part]).all()
            assert archive["arr_1"].tolist() == OPTIONS["class_labels"][part]


def test_a_run_says_what_it_is(finished: dict[str, bytes]) -> None:
    about = json.loads(finished["run.json"])
    assert about["diffusion"] == DIFFUSION.config()
    assert about["model"]["architecture"] == "Pixelwise" and len(about["model"]["weights"]) == 64
    for name in ("shard_size", "num_steps", "seed", "first_index", "class_labels"):
        assert about[name] == OPTIONS[name]
    assert (about["num"], about["image_shape"]) == (NUM, [3, 4, 2])


@given(
    st.lists(st.integers(1, 5), max_size=30).map(lambda sizes: [range(size) for size in sizes]),
    st.integers(1, 9),
)
def test_each_missing_shard_is_drawn_once_and_all_processes_are_busy(
    missing: list[range], count: int
) -> None:
    dealt = turns(missing, count)
    assert [shard for turn in dealt for shard in turn] == missing
    assert all(len(turn) == count for turn in dealt[:-1])


def test_merging_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    options: dict[str, Any] = {"diffusion": DIFFUSION, "num_steps": 1, "shard_size": 1}
    merged = sample_sharded(Pixelwise(), (64, 3, 64, 64), tmp_path, **options)
    one, total = 3 * 64 * 64, merged.stat().st_size
    tracemalloc.start()
    sample_sharded(Pixelwise(), (64, 3, 64, 64), tmp_path, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 64 * one and peak < 12 * one


# --- going on -----------------------------------------------------------------------------------


@given(data=st.data())
def test_what_is_missing_or_damaged_is_drawn_again_and_nothing_else(
    finished: dict[str, bytes], data: st.DataObject
) -> None:
    """Each shard is whole, missing, cut short at any byte, or altered in any one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder, finished)
        redrawn, damaged = [], 0
        for path in sorted((folder / "shards").iterdir()):
            fate = data.draw(st.sampled_from(["whole", "missing", "cut", "altered"]))
            content = bytearray(path.read_bytes())
            if fate == "missing":
                path.unlink()
            if fate == "cut":
                path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
            if fate == "altered":
                content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(
                    st.integers(1, 255)
                )
                path.write_bytes(content)
            damaged += fate in ("cut", "altered")
            if fate != "whole":
                redrawn.append(min(SHARD, 40 + NUM - int(path.name[:6])))

        model = Pixelwise()
        batches: list[int] = []
        model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
        with told_of(damaged):
            draw(folder, model)
        assert batches == [size for size in redrawn for _ in range(OPTIONS["num_steps"])]
        assert files(folder) == finished


@contextmanager
def told_of(count: int) -> Iterator[None]:
    """One line about each damaged shard, and no other."""
    if not count:
        yield
        return
    with pytest.warns(UserWarning) as caught:
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == count
    assert all(re.fullmatch(rf"\S+\.npz: {WAS_DAMAGED}", message) for message in messages)


@pytest.mark.parametrize("other", ["another run's", "another place's"])
def test_a_foreign_shard_is_drawn_again(
    other: str, folder: Path, finished: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whole, of the same samples of a run with another seed; or of other samples of this run."""
    name = "shards/000045-000049.npz"
    foreign = finished["shards/000050-000054.npz"]
    if other == "another run's":
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        draw(elsewhere, seed=4)
        foreign = (elsewhere / name).read_bytes()
    (folder / name).write_bytes(foreign)
    with told_of(1):
        draw(folder)
    assert files(folder) == finished


def test_what_is_made_of_the_shards_is_made_again(folder: Path, finished: dict[str, bytes]) -> None:
    (folder / "samples.npz").unlink()
    draw(folder)
    assert files(folder) == finished


def test_what_killed_writers_left_is_removed_and_nothing_else(
    folder: Path, finished: dict[str, bytes]
) -> None:
    for name in ("run.json", "samples.npz", "shards/000040-000044.npz", "shards/another-size.npz"):
        left_by_a_killed_writer(folder / name)
    (folder / "notes.txt").write_text("mine")
    with atomic.atomic_write(folder / "another's") as file:
        file.write(b"theirs")
        draw(folder)
    assert files(folder) == finished | {"notes.txt": b"mine", "another's": b"theirs"}


def left_by_a_killed_writer(path: Path) -> None:
    path.with_name(atomic._BESIDE.format(atomic._mark(path), "0" * 16)).write_bytes(b"half")


CHANGES: dict[str, tuple[dict[str, Any], str, object, object]] = {
    "seed": ({"seed": 4}, "seed", 3, 4),
    "num": ({"num": 22, "class_labels": OPTIONS["class_labels"][:22]}, "num", 23, 22),
    "first_index": ({"first_index": 0}, "first_index", 40, 0),
    "shard_size": ({"shard_size": 6}, "shard_size", 5, 6),
    "steps": ({"num_steps": 3}, "num_steps", 2, 3),
    "sampler": ({"sampler": "ddim"}, "sampler", "ddpm", "ddim"),
    "spacing": ({"timestep_spacing": [7, 1]}, "timestep_spacing", "trailing", [7, 1]),
    "classes": ({"class_labels": [*range(9), 0] * 2 + [0, 1, 2]}, "class_labels[9]", 9, 0),
    "no classes": ({"class_labels": None}, "class_labels", OPTIONS["class_labels"], None),
    "guidance": ({"guidance_scale": 2}, "guidance_scale", None, 2.0),
    "precision": ({"precision": "bf16"}, "precision", None, "bf16"),
    "diffusion": (
        {"diffusion": GaussianDiffusion.from_schedule("linear", 10, beta_end=0.03)},
        "diffusion.beta_end",
        0.02,
        0.03,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_by_the_option_that_differs(
    change: str, folder: Path, finished: dict[str, bytes]
) -> None:
    options, name, theirs, ours = CHANGES[change]
    with pytest.raises(ValueError) as error:
        draw(folder, **options)
    assert str(error.value) == (
        f"{folder}: cannot be resumed: its {name} is {theirs}, this run's is {ours};"
        " give the same options, or another folder"
    )
    assert files(folder) == finished


def test_a_number_that_is_written_otherwise_is_of_another_run(tmp_path: Path) -> None:
    """Else the shards' seals are of another description, and all would be drawn again."""
    two, other = (
        GaussianDiffusion.from_schedule(
            "linear", 10, dynamic_thresholding_ratio=0.9, sample_max_value=value
        )
        for value in (2, 2.0)
    )
    draw(tmp_path, diffusion=two)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"\.sample_max_value is 2, this run's is 2\.0"):
        draw(tmp_path, diffusion=other)
    assert files(tmp_path) == before


def test_other_weights_are_another_run(folder: Path, finished: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"cannot be resumed: its model\.weights is \w{64}, this"):
        draw(folder, Pixelwise(slope=0.25))
    with pytest.raises(ValueError, match=r"its model\.architecture is Pixelwise, this run's is S"):
        draw(folder, nn.Sequential(Pixelwise()))
    assert files(folder) == finished


def test_a_folder_without_samples_is_any_runs(tmp_path: Path, finished: dict[str, bytes]) -> None:
    """As after shards that were too large for the memory: nothing is lost by another size."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "run.json").write_bytes(finished["run.json"].replace(b'"seed": 3', b'"seed": 4'))
    draw(tmp_path)
    assert files(tmp_path) == finished


@pytest.mark.parametrize("content", [b"", b"{", b"7", b"[1]", b"\xff", b'{"lr": 1}'])
@pytest.mark.parametrize("has_samples", [True, False])
def test_a_description_that_is_damaged_or_foreign_is_refused(
    has_samples: bool, content: bytes, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    if has_samples:
        put(tmp_path, finished)
    (tmp_path / "run.json").write_bytes(content)
    before = files(tmp_path)
    with pytest.raises(ValueError) as error:
        draw(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'run.json'}: damaged, or not as this version writes it; choose another folder"
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["samples.npz", "shards/000040-000044.npz", "shards/mine.npz"])
@pytest.mark.parametrize("num", [NUM, NUM - 1])
def test_samples_that_nothing_describes_are_refused(num: int, name: str, tmp_path: Path) -> None:
    """Someone's own, or of a run whose description is lost: none is drawn over."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError) as error:
        draw(tmp_path, num=num, class_labels=3)
    assert str(error.value) == (
        f"{tmp_path}: holds samples, and no run.json that says of what run; choose another folder"
    )
    assert files(tmp_path) == {name: b"mine"}


def test_foreign_networks_are_known_by_their_options(tmp_path: Path) -> None:
    """Those that diffusers runs: their weights alone do not tell all that they do."""
    diffusers = pytest.importorskip("diffusers")
    from ddpm_fast.integrations.diffusers_models import DiffusersModel

    def network(eps: float) -> DiffusersModel:
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
        return DiffusersModel(
            diffusers.UNet2DModel(
                sample_size=8,
                block_out_channels=[8],
                layers_per_block=1,
                norm_num_groups=4,
                norm_eps=eps,
                attention_head_dim=4,
                **blocks,
            )
        )

    options: dict[str, Any] = {"shard_size": 2, "num_steps": 1, "diffusion": DIFFUSION}
    merged = sample_sharded(network(1e-5), (3, 3, 8, 8), tmp_path, **options)
    merged.unlink()
    assert sample_sharded(network(1e-5), (3, 3, 8, 8), tmp_path, **options).exists()
    with pytest.raises(ValueError, match=r"its model\.config\.norm_eps is 1e-05, this run's is 0"):
        sample_sharded(network(1e-3), (3, 3, 8, 8), tmp_path, **options)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": 1}, {"a": 1}, "None"),
        ({"a": 1, "b": 2}, {"b": 3, "a": 0}, "('a', 1, 0)"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, "('a.b[1]', 2, 3)"),
        ({"a": [1]}, {"a": [1, 2]}, "('a[1]', missing, 2)"),
        ({}, {"a": 1}, "('a', missing, 1)"),
        ({"a": None}, {}, "('a', None, missing)"),
        ({"a": None}, {"a": [1]}, "('a', None, [1])"),
        ({"a": 2}, {"a": 2.0}, "('a', 2, 2.0)"),
        ({"a": float("nan")}, {"a": float("nan")}, "None"),
    ],
)
def test_the_first_difference(ours: Any, theirs: Any, expected: str) -> None:
    """Of the texts, of which the fingerprints are made."""
    assert repr(difference(ours, theirs)) == expected
    texts = [json.dumps(each, sort_keys=True) for each in (ours, theirs)]
    assert (texts[0] == texts[1]) == (expected == "None")


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shard_size": 0}, "sample_sharded: shard_size must be at least 1; got 0"),
        ({"num": 0}, "sample_sharded: shape must be (num, C, H, W), each at least 1; got (0, 3"),
        ({"seed": -1}, "seed must lie in [0, 2**64); got -1"),
        ({"first_index": 2**48}, "first_index must lie in [0, 2**48 - 23]; got"),
        ({"class_labels": 11}, "class_labels must lie in [0, 9], or be the null label 10"),
        ({"class_labels": [1, 2]}, "class_labels must have shape [23]; got [2]"),
        ({"class_labels": None, "guidance_scale": 2.0}, "guidance_scale needs class_labels"),
        ({"guidance_scale": [1.0, 2.0]}, "sample_sharded: guidance_scale must be one number; got"),
        ({"num_steps": 11}, "num_steps must lie in [1, 10]; got 11"),
        ({"eta": 0.5}, "eta belongs to ddim; got 0.5 for ddpm"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16; got 'fp8'"),
        ({"sampler": object()}, "sample_sharded: sampler must be the name of one; got object"),
        ({"model": lambda x, t: x}, "sample_sharded: model must be a torch.nn.Module, whose"),
    ],
)
def test_mistakes_are_told_before_any_work(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        draw(tmp_path / "run", **options)
    assert str(error.value).startswith(sentence)
    assert not list(tmp_path.iterdir())


def full_after(count: int) -> Callable[..., io.FileIO]:
    """The ``open`` of a disk that takes so many files more."""
    left = iter(range(count))

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str) -> Any:
        return FullDisk(path, mode) if next(left, None) is None else open(path, mode)

    return opened


@pytest.mark.parametrize(
    ("count", "name"),
    [(0, "run.json"), (1, "shards/000040-000044.npz"), (4, "shards/000055-000059.npz")]
    + [(6, "samples.npz")],
)
def test_a_full_disk_is_an_error_and_leaves_whole_files(
    count: int,
    name: str,
    tmp_path: Path,
    finished: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "open", full_after(count), raising=False)
        with pytest.raises(OSError) as error:
            draw(tmp_path)
    assert processes.sentence(error.value) == f"{tmp_path / name}: No space left on device"
    left = files(tmp_path)
    assert len(left) == count and left.items() <= finished.items()
    draw(tmp_path)
    assert files(tmp_path) == finished


def test_too_large_a_shard_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Tensor, **labels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = Pixelwise()
    monkeypatch.setattr(model, "forward", out_of_memory)
    with pytest.raises(ValueError, match="^shard_size 5: the device has too little memory for so"):
        draw(tmp_path, model)


def test_a_shard_that_changes_before_it_is_merged_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = shards.ShardFolder.merge

    def altered(folder: shards.ShardFolder) -> None:
        (tmp_path / "shards" / "000045-000049.npz").write_bytes(b"")
        merge(folder)

    monkeypatch.setattr(shards.ShardFolder, "merge", altered)
    with pytest.raises(ValueError, match="45-000049.npz: cut short, altered, or of another run$"):
        draw(tmp_path)
    assert "samples.npz" not in files(tmp_path)


def test_ctrl_c_tells_how_to_go_on(tmp_path: Path, finished: dict[str, bytes]) -> None:
    calls = iter(range(3))

    def interrupt_the_fourth(*args: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    model = Pixelwise()
    model.register_forward_pre_hook(interrupt_the_fourth)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        draw(tmp_path, model)
    assert str(interrupt.value) == (
        f"interrupted; the same command goes on with what is in {tmp_path}"
    )
    assert list(files(tmp_path)) == ["run.json", "shards/000040-000044.npz"]
    draw(tmp_path)
    assert files(tmp_path) == finished


# --- the command line ---------------------------------------------------------------------------


def run(*options: object) -> int:
    return cli.main([str(option) for option in options])


@pytest.fixture(autouse=True)
def already_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite also runs with the extension hidden, of which each process is told once."""
    monkeypatch.setattr(ops, "_warned", {"cpu", "cuda"})


@pytest.fixture
def pixelwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pixelwise:
    """Stands in for every checkpoint."""
    model = Pixelwise()
    model.in_channels, model.image_size = 1, 4  # type: ignore[assignment]
    monkeypatch.setattr(cli.options, "load", lambda name, device: (model, DIFFUSION))
    monkeypatch.chdir(tmp_path)
    return model


DRAWN = ("--num", 13, "--seed", 2, "--first-index", 5, "--classes", "1,7,7", "--device", "cpu")


@pytest.mark.usefixtures("pixelwise")
@pytest.mark.filterwarnings(f"default:.*{WAS_DAMAGED}")
def test_shards_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*DRAWN, "--sampler", "ddim", "--steps", 3, "--eta", 1, "--guidance", 2)
    assert run("sample", *options, "--out", "whole.npz") == 0
    capsys.readouterr()
    for _ in range(2):
        assert run("sample", *options, "--shard-size", 4, "--out", "run") == 0
        captured = capsys.readouterr()
        first, second = captured.out.splitlines()
        assert first == "run/samples.npz: 13 samples of digits, seed 2"
        assert re.fullmatch(r"1 x cpu, (native|reference) backend: [\d.]+ s", second)
        assert captured.err == "", "no progress bar where there is no terminal"
    assert len(list(Path("run/shards").iterdir())) == 4
    assert Path("run/samples.npz").read_bytes() == Path("whole.npz").read_bytes()

    Path("run/shards/000005-000008.npz").write_bytes(b"")
    assert run("sample", *options, "--shard-size", 4, "--out", "run") == 0
    said = f"ddpm-fast: warning: run/shards/000005-000008.npz: {WAS_DAMAGED}\n"
    assert capsys.readouterr().err == said


@pytest.mark.usefixtures("pixelwise")
def test_the_precision_that_is_the_default_may_be_named() -> None:
    for precision in ((), ("--precision", "fp32"), ()):
        assert run("sample", *DRAWN, *precision, "--shard-size", 4, "--out", "run") == 0
    other = ("--precision", "bf16")
    assert run("sample", *DRAWN, *other, "--shard-size", 4, "--out", "run") == 2


@pytest.mark.usefixtures("pixelwise")
def test_under_torchrun_a_run_is_of_shards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of --batch samples each, where nothing else is said; one process leaves no group behind."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert run("sample", *DRAWN, "--batch", 5, "--out", "run/") == 0
    assert capsys.readouterr().out.startswith("run/samples.npz: 13 samples of digits, seed 2\n")
    assert len(list(Path("run/shards").iterdir())) == 3
    assert run("sample", *DRAWN, "--out", "a.png") == 2
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("pixelwise")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "--out samples.png: shards are written into a folder; give one, such as run/"),
        ("--out file", "--out file: cannot write in file: Not a directory"),
        ("--out run --classes x", "--classes x: 'x' is neither a class, such as 3, nor a "),
        ("--out run --steps 11", "num_steps must lie in [1, 10]; got 11"),
    ],
)
def test_mistakes_are_a_sentence_and_write_nothing(
    options: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("file").touch()
    assert run("sample", "--shard-size", 4, *options.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"ddpm-fast: error: {sentence}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("pixelwise")
@pytest.mark.filterwarnings(f"default:.*{WAS_DAMAGED}")
@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_a_warning_is_said_once_on_each_machine(
    local_rank: str,
    lines: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a machine may be the only one that lacks the kernels."""
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    options = ("sample", *DRAWN, "--shard-size", 4, "--out", "run")
    assert run(*options) == 0
    Path("run/shards/000005-000008.npz").write_bytes(b"")
    assert run(*options) == 0
    assert capsys.readouterr().err.count("ddpm-fast: warning: ") == lines


@pytest.mark.usefixtures("pixelwise")
def test_a_terminal_sees_all_that_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = ("sample", *DRAWN, "--shard-size", 4, "--out", "run")
    assert run(*options) == 0
    assert "13/13" in capsys.readouterr().err
    Path("run/shards/000009-000012.npz").unlink()
    assert run(*options) == 0
    assert "9/13" in capsys.readouterr().err, "what is there counts as done"


ROOT = Path(__file__).parent.parent


def test_torchrun_takes_the_commands_that_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Not so ``--num``, in which it sees an option of its own, abbreviated: pytorch#120601."""
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        run("sample", "--help")
    shown = capsys.readouterr().out + (ROOT / "docs" / "many-machines.md").read_text()
    commands = re.findall(r"^ *torchrun (.*)$", shown.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(re.sub(r"\$\w+", "1", command), comments=True)
        parsed = get_args_parser().parse_args(words)
        assert parsed.training_script == "ddpm_fast" and parsed.module
        cli._parser().parse_args(parsed.training_script_args)


def test_torchrun_leaves_the_number_of_samples_alone() -> None:
    from torch.distributed.run import get_args_parser

    words = ["-m", "ddpm_fast", "sample", "--num-samples", "5"]
    parsed = get_args_parser().parse_args(words)
    assert cli._parser().parse_args(parsed.training_script_args).num == 5


# --- many processes -----------------------------------------------------------------------------

SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from test_sharding import Pixelwise, draw

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

def broken(module, args, output):
    return [output, torch.nan * output][rank]

def killed(module, args, output):
    if rank == 1:
        os._exit(9)

def network(hook):
    model = Pixelwise()
    model.register_forward_hook(hook)
    return model

for run, options in [
    ("whole", {}),
    ("seeds", {"seed": rank}),
    ("weights", {"model": Pixelwise(0.5 + rank)}),
    ("broken", {"model": network(broken)}),
    ("whole", {}),
    ("killed", {"model": network(killed)}),
]:
    try:
        draw(f"{folder}/{run}", **options)
        told = "done"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    print(json.dumps(told), flush=True)
"""


def test_processes_share_a_run_and_its_errors(tmp_path: Path, finished: dict[str, bytes]) -> None:
    """Two processes of a script that has a group of its own."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (
        [json.loads(line) for line in process.communicate(timeout=300)[0].splitlines()]
        for process in both
    )
    assert files(tmp_path / "whole") == finished
    assert list(files(tmp_path / "broken")) == ["run.json", "shards/000040-000044.npz"]
    assert first[0] == second[0] == first[4] == second[4] == "done"
    seeds, weights, broken = second[1:4]
    assert seeds == "ValueError: its seed is 1, that of process 0 is 0"
    assert re.fullmatch(r"ValueError: its model.weights is \w+, that of process 0 is \w+", weights)
    assert broken.startswith("ValueError: to_uint8: images must not hold NaN; 5 of 5 do")
    for ours, theirs in zip(first[1:4], second[1:4], strict=True):
        assert ours == theirs.replace("ValueError: ", "OtherProcessError: process 1: ")
    lost = "ConnectionError: the connection to another process was lost"
    assert first[5:] == [lost] and second[5:] == []


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        slow("train digits --out a --bogus", "unrecognized arguments: --bogus"),
        slow("train digits --out a --lr 0", "TrainConfig: learning_rate must be above 0; got 0.0"),
        slow("eval npz digits --out a.npz", "this command works in one process; run it without"),
        slow("sample --num 0", "argument --num/--num-samples: must be at least 1; got 0"),
        slow("sample --out a/b.png", "--out a/b.png: shards are written into a folder"),
    ],
)
def test_one_process_alone_tells_a_mistake(command: str, sentence: str, tmp_path: Path) -> None:
    both = small_training.commands(command, small_training.environments(2), tmp_path)
    told = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    (line,) = lines_of("".join(told))
    assert line.startswith(f"ddpm-fast: error: {sentence}")


@pytest.mark.slow
def test_processes_that_are_asked_for_help_succeed() -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "ddpm_fast", "sample", "--help"],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
        )
        for environment in small_training.environments(2)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]


DIES = """
import os
from ddpm_fast.processes import processes

with processes() as group:
    group.gather(None)
    os._exit(9)
"""


@pytest.mark.slow
def test_that_a_process_was_killed_is_told_by_one_that_is_left(tmp_path: Path) -> None:
    environments = small_training.environments(3)
    dying = subprocess.Popen([sys.executable, "-c", DIES], env=os.environ | environments.pop())
    left = small_training.commands(f"{DIGITS} --device=cpu --out=run/", environments, tmp_path)
    told = [process.communicate(timeout=300)[1] for process in left]
    assert [process.wait() for process in (*left, dying)] == [2, 2, 9]
    lost = "ddpm-fast: error: the connection to another process was lost"
    assert lines_of("".join(told)) == [lost]


TWO_GROUPS = """
from ddpm_fast.processes import processes

for number in range(2):
    with processes() as group:
        assert group.gather(number + group.rank) == [number, number + 1]
"""


ENDS_WITH_THE_BLOCK = """
import weakref
import torch.distributed
from ddpm_fast.processes import processes

with processes():
    group = weakref.ref(torch.distributed.group.WORLD)
    import torch._dynamo  # and with it what keeps the group that is there
assert group() is None
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [TWO_GROUPS, ENDS_WITH_THE_BLOCK], ids=["two", "one"])
def test_groups_of_a_script_under_torchrun_end_with_their_blocks(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(script)
    command = [*TORCHRUN, "2", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
DIGITS = "sample --num-samples 2000 --shard-size 125 --sampler ddim --steps 2 --seed 1"


@contextmanager
def torchrun(count: int, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A run of 2,000 digits by ``count`` processes, none of which outlives the block."""
    command = [*TORCHRUN, str(count), "-m", "ddpm_fast", *DIGITS.split(), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--device", "cpu", "--out", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            yield launcher
        finally:
            kill(launcher)


def kill(launcher: subprocess.Popen[str]) -> None:
    """SIGKILL for torchrun and for its workers, which have sessions of their own."""
    if launcher.poll() is not None:
        return
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    launcher.kill()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def lines_of(told: str) -> list[str]:
    """What our processes say on stderr, among torchrun's lines; not that kernels are hidden."""
    lines = re.findall(r"^ddpm-fast: .*$", told, re.MULTILINE)
    return [line for line in lines if "computes on cpu in plain PyTorch" not in line]


def whole_shards(out: Path) -> int:
    return len(list((out / "shards").glob("*.npz")))


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    while not condition() and launcher.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of 2,000 digits, drawn by the library in one process and never interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, diffusion = load("digits")
    merged = sample_sharded(
        model,
        (2000, 1, 8, 8),
        tmp_path_factory.mktemp("digits"),
        diffusion=diffusion,
        shard_size=125,
        sampler="ddim",
        num_steps=2,
        seed=1,
        class_labels=[index % 10 for index in range(2000)],
    )
    torch.set_num_threads(threads)
    return merged.read_bytes()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds torchrun's workers in /proc"
)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_runs_of_any_number_of_processes_give_the_same_file(
    count: int, digits: bytes, tmp_path: Path
) -> None:
    """SIGKILL at random moments, then a shard cut short and one altered, then the rest."""
    moments, out = random.Random(count), tmp_path / "run"
    for _ in range(3):
        before = whole_shards(out)
        wanted = before + moments.randint(1, max(1, (16 - before) // 2))
        with torchrun(count, out) as launcher:
            wait_for(lambda wanted=wanted: whole_shards(out) >= wanted, launcher)
            time.sleep(moments.uniform(0, 0.3))
            kill(launcher)
        assert before < whole_shards(out)

    cut, altered = sorted((out / "shards").glob("*.npz"))[:2]
    cut.write_bytes(cut.read_bytes()[: moments.randrange(cut.stat().st_size)])
    content = bytearray(altered.read_bytes())
    content[moments.randrange(len(content))] ^= 0xFF
    altered.write_bytes(content)
    left_by_a_killed_writer(cut)

    with torchrun(count, out) as launcher:
        said, told = launcher.communicate()
    assert launcher.returncode == 0, told
    assert said.startswith(f"{out}/samples.npz: 2000 samples of digits, seed 1\n{count} x cpu, ")
    assert lines_of(told) == [f"ddpm-fast: warning: {p}: {WAS_DAMAGED}" for p in (cut, altered)]
    assert (out / "samples.npz").read_bytes() == digits
    assert whole_shards(out) == len(list((out / "shards").iterdir())) == 16


@pytest.mark.slow
@needs_proc
def test_ctrl_c_ends_all_processes_with_one_sentence(digits: bytes, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with torchrun(2, out) as launcher:
        wait_for(lambda: whole_shards(out) >= 2, launcher)
        launcher.send_signal(signal.SIGINT)
        said, told = launcher.communicate(timeout=60)
    assert said == ""
    sentence = f"ddpm-fast: interrupted; the same command goes on with what is in {out}"
    assert lines_of(told) == [sentence]
    assert not list(out.rglob("*.tmp")) and not (out / "samples.npz").exists()
    with torchrun(2, out) as launcher:
        assert launcher.wait() == 0
    assert (out / "samples.npz").read_bytes() == digits


@pytest.mark.slow
def test_an_error_ends_all_processes_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with torchrun(2, tmp_path / "file") as launcher:
        said, told = launcher.communicate()
    assert said == "" and launcher.returncode != 0
    why = f"--out {tmp_path}/file: cannot write in {tmp_path}/file: Not a directory"
    assert lines_of(told) == [f"ddpm-fast: error: {why}"]
    assert "exitcode  : 2 " in told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 KiB; the digits' shards take some 10 KiB each."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_real_full_disk_is_an_error_and_leaves_whole_files(
    digits: bytes, small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "run"
    with torchrun(2, out) as launcher:
        said, told = launcher.communicate()
    assert said == "" and launcher.returncode != 0
    (sentence,) = lines_of(told)
    expected = rf"ddpm-fast: error: (process 1: )?{out}/shards/\d+-\d+.npz: No space left on device"
    assert re.fullmatch(expected, sentence)
    assert "exitcode  : 2 " in told and "Exception ignored" not in told
    assert 0 < whole_shards(out) == len(list((out / "shards").iterdir())) < 16

    roomy = Path(shutil.copytree(out, tmp_path / "roomy"))
    with torchrun(2, roomy) as launcher:
        said, told = launcher.communicate()
    assert launcher.returncode == 0 and lines_of(told) == []
    assert (roomy / "samples.npz").read_bytes() == digits

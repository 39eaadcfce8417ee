"""Pictures as files: their content, equal bytes for equal input, and none ever cut off."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import atomic
from ddpm_fast.image_io import (
    save_animation,
    save_grid,
    save_images,
    save_npz,
    save_strip,
    to_uint8,
)
from ddpm_fast.image_io.npz import write_npz
from ddpm_fast.image_io.painting import GAP, LABEL_HEIGHT, PAPER

WRITERS = {
    "grid": lambda images, folder: save_grid(images, folder / "a.png"),
    "images": lambda images, folder: save_images(images, folder),
    "npz": lambda images, folder: save_npz(images, folder / "a.npz"),
    "strip": lambda images, folder: save_strip([images] * 2, folder / "a.png"),
    "gif": lambda images, folder: save_animation([images, -images], folder / "a.gif"),
    "webp": lambda images, folder: save_animation([images, -images], folder / "a.webp"),
}


def some_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pixels_of(path: Path) -> np.ndarray[Any, Any]:
    """A PNG as [H, W, C]."""
    with Image.open(path) as picture:
        pixels = np.array(picture)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


# --- to_uint8 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "byte"),
    [
        (-1.0, 0),
        (1.0, 255),
        (-1.5, 0),
        (3.0, 255),
        (-np.inf, 0),
        (np.inf, 255),
        (1 / 255, 128),
        (-1 / 255, 127),
        (-1 + 2 / 255 * 0.49, 0),
        (-1 + 2 / 255 * 0.51, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_rounded_to_the_nearest_and_clamped(
    value: float, byte: int, dtype: torch.dtype
) -> None:
    assert to_uint8(torch.full((1, 1, 1, 1), value, dtype=dtype)).item() == byte


def test_every_byte_comes_back() -> None:
    byte = torch.arange(256).reshape(1, 1, 16, 16)
    assert (to_uint8(byte / 127.5 - 1).ravel() == np.arange(256)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layout_is_nhwc_for_any_type_and_memory_format(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    images = some_images(2, 3, 4, 5).to(dtype).to(memory_format=memory_format)
    pixels = to_uint8(images)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.flags.c_contiguous
    expected = ((images[1, 2, 3, 4].float() + 1) * 127.5).round()
    assert pixels[1, 3, 4, 2] == expected


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 3, 0, 4)])
def test_empty_images_give_an_empty_array(shape: tuple[int, ...]) -> None:
    assert to_uint8(torch.empty(shape)).size == 0


def with_nan() -> torch.Tensor:
    images = torch.zeros(4, 1, 2, 2)
    images[2:, 0, 1, 0] = torch.nan
    return images


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda _: to_uint8(torch.zeros(1, 8, 8)),
            "to_uint8: images must be [N, C, H, W]; got the shape [1, 8, 8]",
        ),
        (
            lambda _: to_uint8(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
            "to_uint8: images must be floating-point; got torch.uint8",
        ),
        (
            lambda _: to_uint8(with_nan()),
            "to_uint8: images must not hold NaN; 2 of 4 do, the first at index 2",
        ),
        (
            lambda folder: save_grid(with_nan(), folder / "a.png"),
            "to_uint8: images must not hold NaN; 2 of 4 do, the first at index 2",
        ),
        (
            lambda folder: save_grid(torch.zeros(0, 1, 8, 8), folder / "a.png"),
            "save_grid: images must hold at least one image",
        ),
        (
            lambda folder: save_grid(torch.zeros(1, 2, 8, 8), folder / "a.png"),
            "save_grid: a picture has 1 channel (grey) or 3 (RGB); the images have 2",
        ),
        (
            lambda folder: save_grid(torch.zeros(3, 1, 8, 8), folder / "a.png", labels=[1, 2]),
            "save_grid: labels must be one per image, 3; got 2 of them",
        ),
        (
            lambda folder: save_grid(torch.zeros(3, 1, 8, 8), folder / "a.png", columns=0),
            "save_grid: columns must be at least 1; got 0",
        ),
        (
            lambda folder: save_grid(torch.zeros(3, 1, 8, 8), folder / "a.png", scale=-1),
            "save_grid: scale must be at least 1; got -1",
        ),
        (
            lambda folder: save_images(torch.zeros(1, 4, 8, 8), folder),
            "save_images: a picture has 1 channel (grey) or 3 (RGB); the images have 4",
        ),
        (
            lambda folder: save_npz(
                torch.zeros(3, 1, 8, 8), folder / "a.npz", labels=torch.ones(1, 3)
            ),
            "save_npz: labels must be one per image, [3]; got the shape [1, 3]",
        ),
        (
            lambda folder: save_strip(torch.zeros(4, 1, 8, 8), folder / "a.png"),
            "to_uint8: images must be [N, C, H, W]; got the shape [1, 8, 8]",
        ),
        (
            lambda folder: save_strip([torch.zeros(4, 1, 2, 2), with_nan()], folder / "a.png"),
            "to_uint8: images must not hold NaN; 2 of 4 do, the first at index 2",
        ),
        (
            lambda folder: save_strip(torch.zeros(2, 0, 1, 8, 8), folder / "a.png"),
            "save_strip: frames must hold at least one image",
        ),
        (
            lambda folder: save_strip(torch.zeros(2, 3, 1, 8, 8), folder / "a.png", captions=[1]),
            "save_strip: captions must be one per frame, 2; got 1 of them",
        ),
        (
            lambda folder: save_strip(torch.zeros(2, 3, 1, 8, 8), folder / "a.png", labels=[1, 2]),
            "save_strip: labels must be one per sample, 3; got 2 of them",
        ),
        (
            lambda folder: save_strip(torch.zeros(2, 3, 1, 8, 8), folder / "a.png", scale=0),
            "save_strip: scale must be at least 1; got 0",
        ),
        (
            lambda folder: save_animation([], folder / "a.gif"),
            "save_animation: frames must hold at least one image",
        ),
        (
            lambda folder: save_animation(
                [torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8)], folder / "a.gif"
            ),
            "save_animation: frames must have one shape; got [1, 1, 8, 8] and [2, 1, 8, 8]",
        ),
        (
            lambda folder: save_animation([torch.zeros(1, 4, 8, 8)], folder / "a.gif"),
            "save_animation: a picture has 1 channel (grey) or 3 (RGB); the images have 4",
        ),
        (
            lambda folder: save_animation([with_nan()], folder / "a.webp"),
            "to_uint8: images must not hold NaN; 2 of 4 do, the first at index 2",
        ),
        (
            lambda _: save_animation([torch.zeros(1, 1, 8, 8)], "a.mp4"),
            "save_animation: the file must end in .gif or .webp; got a.mp4",
        ),
        (
            lambda folder: save_animation(
                [torch.zeros(1, 1, 8, 8)], folder / "a.gif", captions=[1, 2]
            ),
            "save_animation: captions must be one per frame, 1; got 2 of them",
        ),
        (
            lambda folder: save_animation([torch.zeros(1, 1, 8, 8)], folder / "a.gif", labels=[]),
            "save_animation: labels must be one per image, 1; got 0 of them",
        ),
        (
            lambda folder: save_animation([torch.zeros(1, 1, 8, 8)], folder / "a.gif", columns=0),
            "save_animation: columns must be at least 1; got 0",
        ),
        (
            lambda folder: save_animation([torch.zeros(1, 1, 8, 8)], folder / "a.gif", duration=19),
            "save_animation: duration must lie in [20, 600000] milliseconds; got 19",
        ),
        (
            lambda folder: save_animation(
                [torch.zeros(1, 1, 8, 8)], folder / "a.gif", last_duration=600_001
            ),
            "save_animation: last_duration must lie in [20, 600000] milliseconds; got 600001",
        ),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    call: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        call(tmp_path)
    assert str(error.value) == sentence
    assert list(tmp_path.iterdir()) == []


# --- the grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("count", "columns", "shape_of_grid"),
    [(1, None, (1, 1)), (5, None, (2, 3)), (64, None, (8, 8)), (5, 2, (3, 2)), (3, 9, (1, 3))],
)
def test_grid_holds_the_images_where_they_belong(
    tmp_path: Path,
    channels: int,
    labelled: bool,
    count: int,
    columns: int | None,
    shape_of_grid: tuple[int, int],
) -> None:
    height, width, scale = 4, 6, 3
    images = some_images(count, channels, height, width)
    labels = range(count) if labelled else None
    save_grid(images, tmp_path / "a.png", labels=labels, columns=columns, scale=scale)
    grid = pixels_of(tmp_path / "a.png")

    step_x = width * scale + GAP
    step_y = height * scale + GAP + labelled * LABEL_HEIGHT
    rows, columns = shape_of_grid
    if not labelled:  # a label may be wider than such a small image
        assert grid.shape == (GAP + rows * step_y, GAP + columns * step_x, channels)
    step_x = (grid.shape[1] - GAP) // columns
    inset = (step_x - GAP - width * scale) // 2
    for i, pixels in enumerate(to_uint8(images)):
        top = GAP + i // columns * step_y
        left = GAP + i % columns * step_x + inset
        magnified = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
        cell = grid[top : top + height * scale, left : left + width * scale]
        assert (cell == magnified).all()
        grid[top : top + height * scale, left : left + width * scale] = PAPER
    if not labelled:
        assert (grid == PAPER).all()


@pytest.mark.parametrize(
    ("shape", "scale"), [((1, 1, 8, 8), 8), ((1, 3, 28, 28), 3), ((1, 3, 64, 64), 1)]
)
def test_small_images_are_magnified_to_be_readable(
    tmp_path: Path, shape: tuple[int, ...], scale: int
) -> None:
    save_grid(some_images(*shape), tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png").shape[:2] == (2 * GAP + scale * shape[2],) * 2


def label_strips(path: Path, count: int, side: int) -> list[np.ndarray[Any, Any]]:
    """The strips below the pictures of a one-row grid, each as wide as its picture."""
    grid = pixels_of(path)
    lefts = range(GAP, GAP + count * (side + GAP), side + GAP)
    return [grid[GAP + side : GAP + side + LABEL_HEIGHT, left : left + side] for left in lefts]


@pytest.mark.parametrize("labels", [[3, 7, 3], ["3", "7", "3"], torch.tensor([3, 7, 3])])
def test_labels_are_drawn_below_their_images(tmp_path: Path, labels: Any) -> None:
    save_grid(torch.ones(3, 1, 64, 64), tmp_path / "a.png", labels=labels, columns=3)
    three, seven, again = label_strips(tmp_path / "a.png", 3, 64)
    for strip in (three, seven):
        assert strip.min() < 100, "a label has dark ink"
        assert (strip < PAPER).sum() > 20, "and enough of it to be read"
        assert (strip[[0, -1]] == PAPER).all(), "and stays within its strip"
    assert (three == again).all()
    assert (three != seven).any()


def test_long_labels_make_the_cells_wider(tmp_path: Path) -> None:
    images = some_images(2, 3, 8, 8)
    for name, label in (("short", "3"), ("long", "a label as wide as that")):
        save_grid(images, tmp_path / name, labels=[label, "3"])
    short, long = (pixels_of(tmp_path / name) for name in ("short", "long"))
    assert long.shape[1] > short.shape[1]
    assert (long[:, [0, -1]] == PAPER).all(), "nothing runs over the edges"


# --- the strip --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("captioned", [False, True])
def test_strip_has_a_row_per_sample_and_a_column_per_moment(
    tmp_path: Path, channels: int, captioned: bool
) -> None:
    frames = 2 * some_images(4, 3, channels, 5, 6)  # as noisy states, beyond [-1, 1]
    captions = torch.arange(4) if captioned else None
    save_strip(frames, tmp_path / "a.png", captions=captions, scale=3)
    strip = pixels_of(tmp_path / "a.png")
    top = GAP + captioned * LABEL_HEIGHT
    step_y, step_x = 5 * 3 + GAP, 6 * 3 + GAP
    assert strip.shape == (top + 3 * step_y, GAP + 4 * step_x, channels)
    if captioned:
        heads = strip[:top].copy()
        strip[:top] = PAPER
        for column in range(4):
            left = GAP + column * step_x
            assert heads[:, left : left + 18].min() < 100, "each column has its caption"
        assert (heads[:, :GAP] == PAPER).all()
    for column, frame in enumerate(frames):
        for row, pixels in enumerate(to_uint8(frame)):
            y, x = top + row * step_y, GAP + column * step_x
            magnified = pixels.repeat(3, axis=0).repeat(3, axis=1)
            assert (strip[y : y + 15, x : x + 18] == magnified).all()
            strip[y : y + 15, x : x + 18] = PAPER
    assert (strip == PAPER).all()


def test_labels_of_a_strip_stand_left_of_their_rows(tmp_path: Path) -> None:
    frames = torch.ones(2, 3, 1, 64, 64)
    save_strip(frames, tmp_path / "a.png", labels=["3", "seven", "3"])
    strip = pixels_of(tmp_path / "a.png")
    margin = strip.shape[1] - 2 * (64 + GAP)
    three, seven, again = (strip[GAP + 76 * row :, GAP : margin - GAP][:64] for row in range(3))
    assert all(label.min() < 100 for label in (three, seven, again))
    assert (three == again).all() and (three < PAPER).sum() < (seven < PAPER).sum()
    assert (strip[:, :GAP] == PAPER).all() and (strip[:, margin - GAP : margin] == PAPER).all()


def test_a_strip_takes_a_tensor_or_a_list(tmp_path: Path) -> None:
    frames = some_images(3, 2, 3, 8, 8)
    save_strip(frames, tmp_path / "tensor.png")
    save_strip(list(frames.double()), tmp_path / "list.png")
    assert (tmp_path / "tensor.png").read_bytes() == (tmp_path / "list.png").read_bytes()


# --- the animation ----------------------------------------------------------------------------


def animation_of(path: Path) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    """The frames of a file, RGB [H, W, 3], and how long each is shown."""
    frames, durations = [], []
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0, "for ever"
        for i in range(animation.n_frames):
            animation.seek(i)
            frames.append(np.array(animation.convert("RGB")))
            durations.append(animation.info["duration"])
    return frames, durations


@pytest.mark.parametrize("extension", [".gif", ".webp", ".GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_frames_are_the_grids_of_their_moments(
    tmp_path: Path, extension: str, channels: int
) -> None:
    """Each as ``save_grid`` writes it; but GIF has 256 colours a frame, fewer than noise in RGB."""
    frames = 2 * some_images(4, 5, channels, 8, 8)  # as noisy states, beyond [-1, 1]
    path = tmp_path / f"a{extension}"
    save_animation(frames, path, labels=range(5), duration=120, last_duration=1500)
    painted, durations = animation_of(path)
    assert durations == [120, 120, 120, 1500]
    tolerance = 64 if channels == 3 and extension != ".webp" else 0
    for frame, found in zip(frames, painted, strict=True):
        save_grid(frame, tmp_path / "grid.png", labels=range(5))
        grid = pixels_of(tmp_path / "grid.png")
        assert found.shape == (*grid.shape[:2], 3)
        assert abs(found.astype(int) - grid).max() <= tolerance


@pytest.mark.parametrize("extension", ["gif", "webp"])
def test_captions_stand_above_frames_of_one_size(tmp_path: Path, extension: str) -> None:
    frames = torch.ones(3, 1, 1, 64, 64)
    captions = ["t = 7", "t = 3", "a caption wider than its picture"]
    path = tmp_path / f"a.{extension}"
    save_animation(frames, path, captions=captions)
    painted, _ = animation_of(path)
    assert len({frame.shape for frame in painted}) == 1
    first, second, last = (frame[: GAP + LABEL_HEIGHT] for frame in painted)
    assert all(head.min() < 100 for head in (first, second, last))
    assert (first != second).any()
    assert (last[:, -GAP:] == PAPER).all(), "nothing runs over the edge"
    assert (painted[0][GAP + LABEL_HEIGHT :] == painted[1][GAP + LABEL_HEIGHT :]).all()


def test_one_frame_is_an_animation_too(tmp_path: Path) -> None:
    save_animation(some_images(1, 1, 1, 8, 8), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.format == "GIF" and picture.n_frames == 1


# --- one PNG per image, and npz ---------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_named_by_their_index(tmp_path: Path, channels: int) -> None:
    images = some_images(3, channels, 5, 4)
    paths = save_images(images, tmp_path / "new" / "folder", first_index=16)
    assert [path.name for path in paths] == ["000016.png", "000017.png", "000018.png"]
    assert sorted((tmp_path / "new" / "folder").iterdir()) == paths
    for path, pixels in zip(paths, to_uint8(images), strict=True):
        assert (pixels_of(path) == pixels).all()


@pytest.mark.parametrize("labels", [None, [4, 9, 4], torch.tensor([4, 9, 4])])
def test_npz_reads_back(tmp_path: Path, labels: Any) -> None:
    images = some_images(3, 3, 5, 4)
    save_npz(images, tmp_path / "samples.npz", labels=labels)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert (archive["arr_0"] == to_uint8(images)).all()
        if labels is None:
            assert archive.files == ["arr_0"]
        else:
            assert archive.files == ["arr_0", "arr_1"]
            assert archive["arr_1"].dtype == np.int64
            assert archive["arr_1"].tolist() == [4, 9, 4]


@pytest.mark.parametrize("labels", [None, [4, 9, 4, 0, 1]])
@pytest.mark.parametrize("sizes", [[5], [2, 2, 1]])
def test_an_npz_in_parts_is_numpys_own(sizes: list[int], labels: list[int] | None) -> None:
    images = to_uint8(some_images(5, 3, 4, 2))
    whole, in_parts = io.BytesIO(), io.BytesIO()
    np.savez(whole, *([images] if labels is None else [images, np.array(labels)]))
    parts = iter(np.split(images, np.cumsum(sizes)[:-1]))
    assert write_npz(in_parts, parts, 5, labels) == images.shape
    assert in_parts.getvalue() == whole.getvalue()


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_equal_images_give_equal_bytes_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[[torch.Tensor, Path], object]
) -> None:
    contents = []
    for year in (2001, 2031):
        monkeypatch.setattr("time.time", lambda year=year: (year - 1970) * 365.25 * 86400.0)
        folder = tmp_path / str(year)
        folder.mkdir()
        writer(some_images(2, 3, 8, 8), folder)
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]


# --- whole or not at all ----------------------------------------------------------------------


class FullDisk(io.FileIO):
    """A file on a disk with room for 50 more bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "open", FullDisk, raising=False)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("old", [b"the old file", None])
def test_a_full_disk_leaves_the_folder_as_it_was(
    tmp_path: Path, writer: Callable[[torch.Tensor, Path], object], old: bytes | None
) -> None:
    names = ["000000.png", "a.png", "a.npz", "a.gif", "a.webp"]
    if old is not None:
        for name in names:
            (tmp_path / name).write_bytes(old)
    with pytest.raises(OSError, match=r"No space left on device: '.*(png|npz|gif|webp)'"):
        writer(some_images(1, 3, 8, 8), tmp_path)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({} if old is None else dict.fromkeys(names, old))


def test_ctrl_c_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"the old file")
    with pytest.raises(KeyboardInterrupt), atomic.atomic_write(tmp_path / "a") as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old file"]


def test_the_first_error_is_told_where_the_hidden_file_cannot_be_removed(tmp_path: Path) -> None:
    """Here its folder has gone, and a file has the folder's name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="^why$"), atomic.atomic_write(folder / "a"):
        folder.rename(tmp_path / "elsewhere")
        folder.touch()
        raise ValueError("why")


def test_a_folder_that_cannot_be_flushed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some file systems of networks; the file itself is always flushed."""
    flush, are_folders = os.fsync, []

    def files_alone(descriptor: int) -> None:
        are_folders.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if are_folders[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with atomic.atomic_write(tmp_path / "a") as file:
        file.write(b"all")
    assert are_folders == [False, True] and (tmp_path / "a").read_bytes() == b"all"


def test_leftovers_of_a_file_are_removed_and_no_others(tmp_path: Path) -> None:
    """Those of others may be of writers that are at work."""
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with atomic.atomic_write(tmp_path / "link"):
        (of_a,) = tmp_path.glob(".*")
        with atomic.atomic_write(tmp_path / ("b" * 255)) as file:
            file.write(b"b")
            atomic.remove_leftovers(tmp_path / "a")
            assert len(list(tmp_path.glob(".*"))) == 1 and not of_a.exists()
        of_a.touch()
    assert (tmp_path / ("b" * 255)).read_bytes() == b"b"


def test_atomic_write_replaces_the_file_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic.atomic_write(tmp_path / "link") as file:
        file.write(b"new")
        assert (tmp_path / "real").read_bytes() == b"old", "the name changes hands at the end"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("missing/a.png", r"No such file or directory: '.*missing/a.png'"),
        (".", "exists and is not a regular file"),
    ],
)
def test_atomic_write_refuses_what_it_cannot_write(
    tmp_path: Path, target: str, sentence: str
) -> None:
    with pytest.raises(OSError, match=sentence), atomic.atomic_write(tmp_path / target) as file:
        file.write(b"never")
    assert list(tmp_path.iterdir()) == []

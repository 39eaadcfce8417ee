"""The digits, folders of pictures, npz files, and Hugging Face's data sets."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import (
    HuggingFaceDataset,
    ImageFolder,
    NpzDataset,
    TensorDataset,
    digits,
    open_dataset,
)
from ddpm_fast.image_io import save_npz

if TYPE_CHECKING:
    import datasets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def save_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def colour(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_digits_are_scaled_and_split_in_two_halves() -> None:
    pytest.importorskip("sklearn")
    whole, train, held_out = digits(), digits("train"), digits("held_out")
    assert (len(whole), len(train), len(held_out)) == (1797, 898, 899)
    assert whole.images.dtype == torch.float32 and whole.images.shape == (1797, 1, 8, 8)
    assert whole.images.aminmax() == (-1, 1)
    assert torch.equal(torch.cat([train.images, held_out.images]), whole.images)
    assert train.labels is not None and train.labels.unique().tolist() == list(range(10))


def test_digits_batch_is_what_the_indices_say() -> None:
    pytest.importorskip("sklearn")
    dataset = digits("train")
    images, labels = dataset.batch(torch.tensor([5, 2]), generator())
    assert dataset.labels is not None and labels is not None
    assert torch.equal(images, dataset.images[[5, 2]])
    assert torch.equal(labels, dataset.labels[[5, 2]])


def test_digits_unknown_part() -> None:
    with pytest.raises(ValueError, match="part must be one of train, held_out, all; got 'test'"):
        digits("test")  # type: ignore[arg-type]


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ddpm-fast\[digits\]'"):
        digits()


def test_tensor_dataset_without_labels() -> None:
    dataset = TensorDataset(torch.zeros(3, 1, 2, 2))
    assert dataset.batch(torch.tensor([0]), generator())[1] is None


def test_pictures_of_the_right_size_come_unchanged(tmp_path: Path) -> None:
    save_picture(tmp_path / "b.png", colour(1))
    save_picture(tmp_path / "deep" / "a.PNG", colour(2))
    (tmp_path / "notes.txt").write_text("not a picture, and not taken for one")
    (tmp_path / ".b.png").write_bytes(b"hidden")
    dataset = ImageFolder(tmp_path, 8, flip=False)
    images, labels = dataset.batch(torch.arange(2), generator())
    assert labels is None and dataset.num_classes is None
    wanted = np.stack([colour(1), colour(2)]).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(images.numpy(), wanted, atol=1e-6)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (3, 5)])
def test_pictures_are_scaled_and_cropped_at_the_centre(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    pixels = np.zeros(shape, np.uint8)
    height, width = shape
    short = min(shape)
    top, left = (height - short) // 2, (width - short) // 2
    pixels[top : top + short, left : left + short] = 255
    save_picture(tmp_path / "a.png", pixels)
    images, _ = ImageFolder(tmp_path, 8, channels=1, flip=False).batch(
        torch.tensor([0]), generator()
    )
    assert images.shape == (1, 1, 8, 8)
    assert (images[..., 1:-1, 1:-1] == 1).all()  # the white middle square
    assert images.min() > 0  # whose edges the filter softens


def test_grey_pictures_in_colour_and_back(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", colour(0)[:, :, 0])
    images, _ = ImageFolder(tmp_path, 8, flip=False).batch(torch.tensor([0]), generator())
    assert images.shape == (1, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])


def test_sixteen_bit_pictures_keep_their_range(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    images, _ = ImageFolder(tmp_path, 8, channels=1, flip=False).batch(
        torch.tensor([0]), generator()
    )
    wanted = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    torch.testing.assert_close(images, wanted, rtol=0, atol=0.01)


def test_orientation_is_obeyed(tmp_path: Path) -> None:
    picture = Image.fromarray(colour(0))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    images, _ = ImageFolder(tmp_path, 8, flip=False).batch(torch.tensor([0]), generator())
    wanted = torch.tensor(colour(0)[::-1, ::-1].copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(images[0], wanted)


def test_flips_follow_the_generator(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", colour(0))
    dataset, indices = ImageFolder(tmp_path, 8), torch.zeros(64, dtype=torch.int64)
    images, _ = dataset.batch(indices, generator(3))
    assert torch.equal(images, dataset.batch(indices, generator(3))[0])
    assert not torch.equal(images, dataset.batch(indices, generator(4))[0])
    plain = ImageFolder(tmp_path, 8, flip=False).batch(indices[:1], generator())[0][0]
    upright = [torch.equal(image, plain) for image in images]
    mirrored = [torch.equal(image, plain.flip(-1)) for image in images]
    assert all(a != b for a, b in zip(upright, mirrored, strict=True))
    assert 10 < sum(mirrored) < 54


def test_class_folders_are_the_labels(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/young/2.png", "cat/1.png"):
        save_picture(tmp_path / name, colour(0))
    dataset = ImageFolder(tmp_path, 8, class_labels=True)
    assert (dataset.num_classes, dataset.class_names) == (2, ("cat", "dog"))
    _, labels = dataset.batch(torch.arange(3), generator())
    assert labels is not None and labels.tolist() == [0, 0, 1]
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"truncated"])
def test_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    if content == b"truncated":
        save_picture(path, colour(0, 64, 64))
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        ImageFolder(tmp_path, 8).batch(torch.tensor([0]), generator())
    assert str(caught.value).startswith(f"{path}: cannot be read as a picture (")


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.tif", np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match="floating-point numbers, of unknown range"):
        ImageFolder(tmp_path, 8).batch(torch.tensor([0]), generator())


def test_hidden_folders_are_left_out_and_links_are_followed(tmp_path: Path) -> None:
    save_picture(tmp_path / "elsewhere" / "1.png", colour(1))
    folder = tmp_path / "pictures"
    save_picture(folder / "a" / "0.png", colour(0))
    save_picture(folder / ".checkpoints" / "2.png", colour(2))
    (folder / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    dataset = ImageFolder(folder, 8, class_labels=True)
    assert dataset.class_names == ("a", "b")
    assert [str(file.relative_to(folder)) for file in dataset.files] == ["a/0.png", "b/1.png"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (10, 20, 30, 0)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = picture.getpixel((0, 0))
    picture.save(tmp_path / "a.png")
    images, _ = ImageFolder(tmp_path, 8, flip=False).batch(torch.tensor([0]), generator())
    assert (images == 1).all()


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="not a folder of pictures"):
        ImageFolder(tmp_path / "absent", 8)
    with pytest.raises(ValueError, match=f"^{tmp_path}: holds no pictures"):
        ImageFolder(tmp_path, 8)
    save_picture(tmp_path / "a.png", colour(0))
    with pytest.raises(ValueError, match=r"a.png: lies outside the class folders of"):
        ImageFolder(tmp_path, 8, class_labels=True)
    with pytest.raises(ValueError, match="channels must be 1 or 3; got 4"):
        ImageFolder(tmp_path, 8, channels=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_size must be at least 1; got 0"):
        ImageFolder(tmp_path, 0)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_of_tensors_are_below_the_number_of_classes(label: int) -> None:
    labels = torch.tensor([0, 1, label])
    with pytest.raises(ValueError) as caught:
        TensorDataset(torch.zeros(3, 1, 2, 2), labels, num_classes=2)
    assert str(caught.value) == (f"TensorDataset: labels must be classes from 0 to 1; got {label}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [torch.zeros(3, 2, 2)],
            "images must be float32 [N, C, H, W], none of these 0; got float32",
        ),
        (
            [torch.zeros(0, 1, 2, 2)],
            "images must be float32 [N, C, H, W], none of these 0; got float",
        ),
        (
            [torch.zeros(3, 1, 2, 2).byte()],
            "images must be float32 [N, C, H, W], none of these 0; got",
        ),
        (
            [torch.zeros(3, 1, 2, 2), torch.arange(3)],
            "labels and num_classes must be given together",
        ),
        ([torch.zeros(3, 1, 2, 2), None, 3], "labels and num_classes must be given together"),
        ([torch.zeros(3, 1, 2, 2), torch.arange(2), 3], "labels must be int64 [3]; got int64 [2]"),
        ([torch.zeros(3, 1, 2, 2), torch.zeros(3), 3], "labels must be int64 [3]; got float32 [3]"),
    ],
)
def test_tensors_are_pictures_and_their_labels(arguments: list[Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        TensorDataset(*arguments)
    assert str(caught.value).startswith(f"TensorDataset: {sentence}")


# --- npz files ------------------------------------------------------------------------------------


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8, 1), (8, 8)])
def test_npz_of_the_right_size_comes_unchanged(
    tmp_path: Path, shape: tuple[int, ...], save: Callable[..., None]
) -> None:
    held = pixels(5, *shape)
    save(tmp_path / "a.npz", held)
    channels = 3 if shape[2:] == (3,) else 1
    dataset = NpzDataset(tmp_path / "a.npz", 8, channels=channels, flip=False)
    images, labels = dataset.batch(torch.tensor([3, 0, 3]), generator())
    wanted = held[[3, 0, 3]].reshape(3, 8, 8, channels).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(images.numpy(), wanted, atol=1e-6)
    assert (len(dataset), dataset.num_classes, labels) == (5, None, None)


def test_npz_is_what_the_samples_are_written_to(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    save_npz(images, tmp_path / "a.npz", labels=[2, 0, 1, 2])
    dataset = NpzDataset(tmp_path / "a.npz", 8, flip=False, label_column="arr_1")
    read, labels = dataset.batch(torch.arange(4), generator())
    torch.testing.assert_close(read, images, rtol=0, atol=1 / 255)
    assert labels is not None and (labels.tolist(), labels.dtype) == ([2, 0, 1, 2], torch.int64)
    assert dataset.num_classes == 3


def test_npz_of_named_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_train=pixels(3, 28, 28), y_train=np.uint8([7, 0, 9]))
    columns = {"image_column": "x_train", "label_column": "y_train"}
    dataset = NpzDataset(tmp_path / "mnist.npz", 14, **columns)
    images, labels = dataset.batch(torch.tensor([2]), generator())
    assert images.shape == (1, 3, 14, 14) and torch.equal(images[:, 0], images[:, 2])
    assert labels is not None and labels.tolist() == [9] and dataset.num_classes == 10


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"a": pixels(2, 8, 8), "b": pixels(1, 8, 8)}, "holds no array arr_0 (it holds a, b)"),
        (
            {"arr_0": np.zeros((2, 8, 8, 3), np.float32)},
            "arr_0 must be pictures, uint8 [N, H, W, C] with C = 1 or 3, or [N, H, W]; "
            "got float32 [2, 8, 8, 3]",
        ),
        ({"arr_0": pixels(2, 8, 8, 4)}, "got uint8 [2, 8, 8, 4]"),
        ({"arr_0": pixels(2, 8)}, "got uint8 [2, 8]"),
        ({"arr_0": pixels(0, 8, 8, 3)}, "got uint8 [0, 8, 8, 3]"),
        (
            {"arr_0": pixels(2, 8, 8), "arr_1": np.arange(3)},
            "arr_1 must be integers, one for each of the 2 pictures; got int64 [3]",
        ),
        ({"arr_0": pixels(2, 8, 8), "arr_1": np.array([0.0, 1.0])}, "got float64 [2]"),
        (
            {"arr_0": pixels(2, 8, 8), "arr_1": np.array([0, -1])},
            "arr_1 must be classes from 0 to 1048575; got -1",
        ),
        (
            {"arr_0": pixels(2, 8, 8), "arr_1": np.array([0, 2**63], np.uint64)},
            "arr_1 must be classes from 0 to 1048575; got 9223372036854775808",
        ),
        (
            {"arr_0": pixels(2, 8, 8), "arr_1": np.array([0, 2**40])},
            "arr_1 must be classes from 0 to 1048575; got 1099511627776",
        ),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    label_column = "arr_1" if "arr_1" in arrays else None
    with pytest.raises(ValueError) as caught:
        NpzDataset(tmp_path / "a.npz", 8, label_column=label_column)
    assert str(caught.value).startswith(f"{tmp_path / 'a.npz'}: ")
    assert str(caught.value).endswith(sentence)


@pytest.mark.skipif(sys.platform == "win32" or not os.getuid(), reason="root may read all")
def test_npz_that_may_not_be_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels(2, 8, 8))
    (tmp_path / "a.npz").chmod(0)
    with pytest.raises(PermissionError):
        NpzDataset(tmp_path / "a.npz", 8)


def test_npz_that_is_not_whole(tmp_path: Path) -> None:
    """Wherever it was cut off, and with bytes changed in the middle."""
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError):
        NpzDataset(path, 8)
    np.savez(path, pixels(9, 8, 8, 3))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (b"", b"no archive", *(whole[:-cut] for cut in (1, 30, 200)), bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: "):
            NpzDataset(path, 8)


def npz_header(*shape: int) -> bytes:
    written = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(written, header)
    return written.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npz_header(2**46, 8, 8, 3), "Unable to allocate"),
        (npz_header(2**70, 8, 8, 3), "too large"),
        (npz_header(2, 8, 8).replace(b"}", b"("), ""),
        (b"garbage", "arr_0 is not an array"),
    ],
)
def test_npz_of_what_is_no_array(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content)
    with pytest.raises(ValueError, match=f"^{path}: .*{reason}"):
        NpzDataset(path, 8)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [(10, 9, "compression method is not supported"), (8, 1, "is encrypted")],
    ids=["deflate64", "encrypted"],
)
def test_npz_that_cannot_be_unpacked(tmp_path: Path, field: int, value: int, reason: str) -> None:
    """By what the archive's directory, and the header of the member, say of it."""
    path = tmp_path / "a.npz"
    np.savez(path, pixels(2, 8, 8))
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\1\2") + field] = value
    content[field - 2] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: .*{reason}"):
        NpzDataset(path, 8)


class Explosive:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, ("exploded", "w")


def test_npz_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", np.array([Explosive()], dtype=object))
    with pytest.raises(ValueError, match=r"^a.npz: Object arrays cannot be loaded"):
        NpzDataset("a.npz", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


# --- Hugging Face's datasets ----------------------------------------------------------------------


def table(count: int = 6, size: int = 8) -> datasets.Dataset:
    """Pictures with two columns of labels, of which one has names."""
    hf = pytest.importorskip("datasets")
    kinds = {"picture": hf.Image(), "kind": hf.ClassLabel(names=["cat", "dog", "owl"])}
    columns = {
        "picture": [Image.fromarray(colour(i, size, size)) for i in range(count)],
        "kind": [i % 2 for i in range(count)],
        "number": list(range(count)),
    }
    return hf.Dataset.from_dict(columns, hf.Features(**kinds, number=hf.Value("int32")))


def test_column_of_pictures_comes_unchanged() -> None:
    dataset = HuggingFaceDataset(table(), 8, flip=False)
    images, labels = dataset.batch(torch.tensor([4, 1]), generator())
    wanted = np.stack([colour(4), colour(1)]).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(images.numpy(), wanted, atol=1e-6)
    assert (len(dataset), dataset.num_classes, labels) == (6, None, None)


@pytest.mark.parametrize(("column", "classes"), [("kind", 3), ("number", 6)])
def test_columns_of_labels(column: str, classes: int) -> None:
    """Named classes count also where none is of them; integers up to the largest."""
    dataset = HuggingFaceDataset(table(), 8, label_column=column)
    _, labels = dataset.batch(torch.tensor([5, 0]), generator())
    assert labels is not None and labels.dtype == torch.int64
    assert labels.tolist() == ([1, 0] if column == "kind" else [5, 0])
    assert dataset.num_classes == classes


@pytest.mark.parametrize(
    ("column", "labels", "sentence"),
    [
        ("kind", [0, 1, 2, 3], "kind must be classes from 0 to 2; got 3"),
        ("number", [0, 1, 2, 2**63], "number must be classes from 0 to 1048575; got " + str(2**63)),
    ],
)
def test_labels_that_are_no_classes(column: str, labels: list[int], sentence: str) -> None:
    """An embedding's next row is the null label, which 3 would train unnoticed."""
    pa, whole = pytest.importorskip("pyarrow"), table(4)
    arrow = whole.data.table.set_column(
        whole.column_names.index(column),
        column,
        [pa.array(np.array(labels, np.int64 if column == "kind" else np.uint64))],
    )
    features = whole.features.copy()
    if column == "number":
        features[column] = sys.modules["datasets"].Value("uint64")
    held = type(whole)(arrow.replace_schema_metadata(None)).cast(features)
    with pytest.raises(ValueError) as caught:
        HuggingFaceDataset(held, 8, label_column=column)
    assert str(caught.value) == f"the data set: {sentence}"


def test_rows_chosen_and_formats_of_the_caller() -> None:
    chosen = table().select([5, 2]).with_format("torch")
    dataset = HuggingFaceDataset(chosen, 8, flip=False, label_column="number")
    images, labels = dataset.batch(torch.tensor([1]), generator())
    wanted = torch.tensor(colour(2)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(images[0], wanted)
    assert labels is not None and labels.tolist() == [2]
    assert chosen.format["type"] == "torch"


def test_batches_are_the_same_from_any_thread() -> None:
    dataset = HuggingFaceDataset(table(), 4)
    jobs = [(torch.randint(6, (9,), generator=generator(i)), i) for i in range(8)]

    def batch(job: tuple[torch.Tensor, int]) -> torch.Tensor:
        return dataset.batch(job[0], generator(job[1]))[0]

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(batch, jobs), map(batch, jobs)))


def test_saved_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets").DatasetDict(train=table()).save_to_disk(tmp_path)
    part = tmp_path / "train"
    indices = torch.arange(6)
    read = HuggingFaceDataset(part, 8, flip=False).batch(indices, generator())[0]
    held = HuggingFaceDataset(table(), 8, flip=False).batch(indices, generator())[0]
    assert torch.equal(read, held)
    with pytest.raises(ValueError) as caught:
        HuggingFaceDataset(tmp_path, 8)
    assert str(caught.value) == (
        f"{tmp_path}: holds the splits train; name the folder of one of them, such as {part}"
    )
    next(part.glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(ValueError, match=f"^{part}: cannot be read as a data set "):
        HuggingFaceDataset(part, 8)


def test_column_errors(tmp_path: Path) -> None:
    held = table()
    for columns, sentence in (
        ({"image_column": "x"}, "has no column x (its columns: picture, kind, number)"),
        ({"label_column": "y"}, "has no column y (its columns: picture, kind, number)"),
        (
            {"image_column": "kind"},
            "the column kind does not hold pictures (those that do: picture)",
        ),
        (
            {"label_column": "picture"},
            "the column picture does not hold integers or class labels",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            HuggingFaceDataset(held, 8, **columns)
        assert str(caught.value) == f"the data set: {sentence}"
    hole = pytest.importorskip("datasets").Dataset.from_dict(
        {"picture": held["picture"][:2], "kind": [1, None]}
    )
    with pytest.raises(ValueError, match="kind must be integers, one for each of the 2 pictures"):
        HuggingFaceDataset(hole, 8, label_column="kind")
    with pytest.raises(ValueError, match=r"name the column of pictures \(those .* some: none\)"):
        HuggingFaceDataset(held.select_columns("kind"), 8)
    with pytest.raises(ValueError, match="the data set: holds no pictures"):
        HuggingFaceDataset(held.select([]), 8)
    with pytest.raises(TypeError, match=r"a datasets.Dataset or a folder; got IterableDataset"):
        HuggingFaceDataset(held.to_iterable_dataset(), 8)
    with pytest.raises(FileNotFoundError, match="not a folder that save_to_disk of datasets wrote"):
        HuggingFaceDataset(tmp_path, 8)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_unreadable_row_is_named(content: bytes | None) -> None:
    hf = pytest.importorskip("datasets")
    picture = None if content is None else {"bytes": content, "path": None}
    held = hf.Dataset.from_dict({"p": [picture]}, hf.Features(p=hf.Image()))
    with pytest.raises(ValueError, match=r"^the data set: row 0 of p: cannot be read as a picture"):
        HuggingFaceDataset(held, 8).batch(torch.tensor([0]), generator())


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").touch()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ddpm-fast\[datasets\]'"):
        HuggingFaceDataset(tmp_path, 8)


# --- whichever of them ----------------------------------------------------------------------------


def test_open_dataset_knows_them_apart(tmp_path: Path) -> None:
    save_picture(tmp_path / "folder" / "a" / "1.png", colour(0))
    np.savez(tmp_path / "a.npz", pixels(2, 8, 8), [0, 1])
    folder = open_dataset(tmp_path / "folder", 4, class_labels=True, channels=1, flip=False)
    assert isinstance(folder, ImageFolder) and (folder.num_classes, folder.channels) == (1, 1)
    npz = open_dataset(tmp_path / "a.npz", 4, label_column="arr_1", flip=False)
    assert isinstance(npz, NpzDataset) and (npz.num_classes, npz.flip) == (2, False)
    with pytest.raises(ValueError, match=r"folder: has no columns, which are of npz files and of"):
        open_dataset(tmp_path / "folder", 4, label_column="kind")
    with pytest.raises(ValueError, match=r"a.npz: not a folder of image files, whose subfolders"):
        open_dataset(tmp_path / "a.npz", 4, class_labels=True)


def test_open_dataset_of_datasets(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path)
    dataset = open_dataset(tmp_path, 4, label_column="kind", image_column="picture")
    assert isinstance(dataset, HuggingFaceDataset) and dataset.num_classes == 3


@pytest.mark.parametrize("kind", ["folder", "npz", "datasets", "tensors"])
def test_the_fingerprint_is_of_the_contents(kind: str, tmp_path: Path) -> None:
    """The same for the same pictures in another place, another for as many others."""

    def fingerprint(place: str, seed: int, labels: list[int]) -> str:
        path, pictures = tmp_path / place, [colour(seed, size) for size in (8, 8)]
        if kind == "tensors":
            images = torch.from_numpy(np.stack(pictures)).float()
            return TensorDataset(images, torch.tensor(labels), 3).description()["fingerprint"]
        if kind == "folder":
            for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                save_picture(path / f"{label}" / f"{i}.png", picture)
        elif kind == "npz":
            path = path.with_suffix(".npz")
            np.savez(path, pictures, labels)
        else:
            hf = pytest.importorskip("datasets")
            columns = {"p": [Image.fromarray(p) for p in pictures], "arr_1": labels}
            hf.Dataset.from_dict(columns).save_to_disk(path)
        column = None if kind == "folder" else "arr_1"
        dataset = open_dataset(path, 8, class_labels=kind == "folder", label_column=column)
        return dataset.description()["fingerprint"]

    found = fingerprint("a", 0, [0, 1])
    assert fingerprint("b", 0, [0, 1]) == found
    assert fingerprint("c", 0, [1, 0]) != found
    if kind != "folder":  # whose files need not be read: their sizes tell
        assert fingerprint("d", 1, [0, 1]) != found


def test_a_folders_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    found = set()
    for name, content in (("a", b"1"), ("b", b"1"), ("b", b"12")):
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / f"{name}.png").write_bytes(content)
        found.add(ImageFolder(tmp_path, 8).description()["fingerprint"])
    assert len(found) == 3


def test_the_description_tells_the_options(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels(2, 8, 8), [0, 1])
    told = NpzDataset(tmp_path / "a.npz", 8, flip=False, label_column="arr_1").description()
    del told["fingerprint"]
    assert told == {"flip": False, "image_column": "arr_0", "label_column": "arr_1"}

"""The digits and the folder of pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import ImageFolder, TensorDataset, digits


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

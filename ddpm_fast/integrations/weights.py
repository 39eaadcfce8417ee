"""Tensors of foreign files: read without unpickling, and given the names of our U-Net's layers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..models import UNet

# What a damaged pickle, or one with more in it than tensors, makes torch.load raise.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by the way that its name says; errors are those of the two ways."""
    return read_state_dict(path) if path.suffix == ".bin" else read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or something else.
    """
    _check_exists(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a bare ``state_dict`` that torch.save wrote, on the CPU.

    It is read with ``weights_only=True``, which runs no code of the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, holds more than tensors, or is something else.
    """
    _check_exists(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except _UNREADABLE:
        raise ValueError(
            f"{path}: truncated, or not a file of nothing but tensors, as torch.save writes it"
        ) from None
    named = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: must hold a state_dict, tensors by name, and nothing else")
    return dict(tensors)


def build(config: Mapping[str, object], path: Path) -> UNet:
    """The network of a configuration, without memory for its weights; ``path`` is for errors.

    Raises:
        ValueError: no network has this configuration.
    """
    try:
        with torch.device("meta"):
            return UNet(**config)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: describes a U-Net that cannot be built: {error}") from None


def fill(model: UNet, names: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the layers of a network the tensors of a foreign file, made float32.

    Args:
        model: a network on the meta device.
        names: the foreign name of each layer; more layers than the network has may be named.
        tensors: by foreign name, each the counterpart of one tensor of the network.
        path: the file, for errors.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to no layer.
    """
    filled, unused = {}, set(tensors)
    for name, wanted in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        foreign = f"{names[layer]}.{kind}"
        if foreign not in tensors:
            raise ValueError(f"{path}: not the weights of this U-Net: {foreign} is missing")
        if tensors[foreign].shape != wanted.shape:
            raise ValueError(
                f"{path}: not the weights of this U-Net: {foreign} has shape"
                f" {list(tensors[foreign].shape)}, wanted {list(wanted.shape)}"
            )
        filled[name] = tensors[foreign].float()
        unused.remove(foreign)
    if unused:
        raise ValueError(f"{path}: not the weights of this U-Net: it has no {min(unused)}")
    model.load_state_dict(filled, assign=True)


def names_of(ours: str, theirs: str, layers: Mapping[str, str]) -> dict[str, str]:
    """The full foreign name of each of our layers, given those within a block."""
    return {f"{ours}.{layer}": f"{theirs}.{name}" for layer, name in layers.items()}


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")

"""Checkpoints: one safetensors file that holds weights, and as JSON everything needed to rebuild.

Layout, format version 1: tensors named ``model.*`` (the trained weights), ``ema.*`` (their moving
average, which is what samples are drawn with) and ``optimizer.*`` (Adam's state), of which an
inference checkpoint has only ``ema.*``; and in the file's metadata, under the key ``ddpm_fast``, a
JSON object with ``format_version``, ``architecture``, ``model``, ``diffusion``, ``training`` and
``step``. Nothing is ever unpickled. :func:`load` also reads folders that diffusers wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .atomic import atomic_write
from .diffusion import GaussianDiffusion
from .models import LightweightUNet, UNet

if TYPE_CHECKING:
    from .integrations.diffusers_models import DiffusersModel

FORMAT_VERSION = 1
Network: TypeAlias = LightweightUNet | UNet
Loaded: TypeAlias = "Network | DiffusersModel"
ARCHITECTURES: dict[str, type[Network]] = {
    "LightweightUNet": LightweightUNet,
    "UNet": UNet,
}
BUNDLED = ("digits",)

_METADATA_KEY = "ddpm_fast"
_TENSOR_GROUPS = ("model", "ema", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        architecture: name of the network's class, one of ``ARCHITECTURES``.
        model_config: the keyword arguments that rebuild the network.
        diffusion_config: what :meth:`GaussianDiffusion.from_config` takes.
        training: how it was trained, JSON-able; empty where that is not known.
        step: training steps done.
        model, ema, optimizer: tensors by name; any of them may be empty.
    """

    architecture: str
    model_config: Mapping[str, Any]
    diffusion_config: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    model: Mapping[str, Tensor] = field(default_factory=dict)
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


def load(
    name_or_path: str | os.PathLike[str], *, device: str | torch.device | None = None
) -> tuple[Loaded, GaussianDiffusion]:
    """Load a trained network, ready to draw samples with.

    Args:
        name_or_path: ``"digits"``, the bundled class-conditional model of 8x8 handwritten digits,
            or the path of a checkpoint. (A file of that name is ``"./digits"``.) Of a folder,
            it is one that diffusers' ``save_pretrained`` wrote of a DDPMPipeline.
        device: where to put the network; the CPU by default.

    Returns:
        The network, in eval mode and with its averaged (EMA) weights where the checkpoint has
        them, and its diffusion. Of a folder, our UNet where that is the same network, else one
        that diffusers runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign, of an unknown architecture or of a newer format.
        ImportError: diffusers is needed to run a folder's network, and not installed.
    """
    if Path(name_or_path).is_dir() and name_or_path not in BUNDLED:
        # Imported here, so that those who do not need it do not wait for it.
        from .integrations.diffusers_models import load_folder

        foreign, diffusion = load_folder(Path(name_or_path))
        return foreign.to(device), diffusion
    with _located(name_or_path) as path:
        checkpoint = read(path)
        model = build_model(checkpoint, path)
    diffusion = _build(
        "diffusion", GaussianDiffusion.from_config, checkpoint.diffusion_config, path
    )
    return model.to(device).eval(), diffusion


def save(
    path: str | os.PathLike[str],
    model: Network,
    diffusion: GaussianDiffusion,
    *,
    ema: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    step: int = 0,
) -> None:
    """Write a checkpoint, whole or not at all: an interrupted call leaves the old file as it was.

    Args:
        path: the file to write; an existing one is replaced.
        model: an instance of one of ``ARCHITECTURES``.
        diffusion: the diffusion it was trained for.
        ema: averaged weights, named as in ``model.state_dict()``.
        optimizer: the optimizer's tensors.
        training: how it was trained, JSON-able.
        step: training steps done.

    Raises:
        ValueError: the model is of another class.
        OSError: the file cannot be written.
    """
    write(
        path,
        Checkpoint(
            architecture=architecture_of(model),
            model_config=model.config(),
            diffusion_config=diffusion.config(),
            training=training or {},
            step=step,
            model=model.state_dict(),
            ema=ema or {},
            optimizer=optimizer or {},
        ),
    )


def export(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Write the inference checkpoint of a training checkpoint: its averaged weights alone.

    ``source`` is the file to read, ``destination`` the file to write, whole or not at all.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
        OSError: ``destination`` cannot be written.
    """
    with _located(source) as path:
        checkpoint = read(path)
        weights = checkpoint.ema or checkpoint.model
        write(destination, replace(checkpoint, model={}, ema=weights, optimizer={}))


def architecture_of(model: nn.Module) -> str:
    """The name of the class of ``model`` in ``ARCHITECTURES``; ValueError for other classes."""
    for name, architecture in ARCHITECTURES.items():
        if type(model) is architecture:
            return name
    raise ValueError(
        f"a checkpoint cannot hold a {type(model).__name__}; known architectures: {_known()}"
    )


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path``, whole or not at all; equal content gives equal bytes."""
    groups = (checkpoint.model, checkpoint.ema, checkpoint.optimizer)
    tensors = {
        f"{group}.{name}": tensor.detach().cpu().contiguous()
        for group, named in zip(_TENSOR_GROUPS, groups, strict=True)
        for name, tensor in named.items()
    }
    about = {
        "format_version": FORMAT_VERSION,
        "architecture": checkpoint.architecture,
        "model": dict(checkpoint.model_config),
        "diffusion": dict(checkpoint.diffusion_config),
        "training": dict(checkpoint.training),
        "step": checkpoint.step,
    }
    content = serialize(tensors, {_METADATA_KEY: json.dumps(about)})
    with atomic_write(path) as file:
        file.write(content)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the checkpoint file at ``path``, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign, of an unknown architecture or of a newer format.
    """
    if not Path(path).is_file():
        bundled = ", ".join(BUNDLED)
        raise FileNotFoundError(f"{path}: no such checkpoint file (bundled models: {bundled})")
    try:
        with safe_open(path, framework="pt") as file:
            about = _checked_metadata(file.metadata(), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from None
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _TENSOR_GROUPS}
    for full_name, tensor in tensors.items():
        group, _, name = full_name.partition(".")
        if group not in groups:
            raise ValueError(f"{path}: holds a tensor that no checkpoint has, {full_name}")
        groups[group][name] = tensor
    return Checkpoint(
        architecture=about["architecture"],
        model_config=about["model"],
        diffusion_config=about["diffusion"],
        training=about["training"],
        step=about["step"],
        model=groups["model"],
        ema=groups["ema"],
        optimizer=groups["optimizer"],
    )


def build_model(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Network:
    """The network of ``checkpoint``, with its averaged weights where it has them.

    ``path`` is named in errors.

    Raises:
        ValueError: its configuration or its tensors are not those of its architecture.
    """
    with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
        model: Network = _build(
            "model",
            lambda config: ARCHITECTURES[checkpoint.architecture](**config),
            checkpoint.model_config,
            path,
        )
    weights = checkpoint.ema or checkpoint.model
    check_tensors(weights, model.state_dict(), checkpoint.architecture, path)
    model.load_state_dict(weights, assign=True)
    return model


def check_tensors(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    architecture: str,
    path: str | os.PathLike[str],
) -> None:
    """Raise ValueError unless ``found`` has the names and shapes of ``wanted``.

    ``architecture`` and ``path`` are for its message.
    """
    for name, tensor in wanted.items():
        if name not in found:
            raise ValueError(f"{path}: not the weights of this {architecture}: {name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: not the weights of this {architecture}: {name} has shape"
                f" {list(found[name].shape)}, wanted {list(tensor.shape)}"
            )
    for name in found:
        if name not in wanted:
            raise ValueError(f"{path}: not the weights of this {architecture}: it has no {name}")


def _checked_metadata(metadata: Mapping[str, str] | None, path: Any) -> dict[str, Any]:
    """The JSON object in a file's metadata, once its format and architecture are known to us."""
    if not metadata or _METADATA_KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not a checkpoint of ddpm_fast")
    try:
        about = json.loads(metadata[_METADATA_KEY])
        version = int(about["format_version"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: its ddpm_fast metadata is damaged") from None
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: written in format {version}, newer than the {FORMAT_VERSION} that this"
            " ddpm_fast reads; upgrade ddpm_fast"
        )
    kinds = {"architecture": str, "model": dict, "diffusion": dict, "training": dict, "step": int}
    if not all(isinstance(about.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path}: its ddpm_fast metadata is damaged")
    if about["architecture"] not in ARCHITECTURES:
        raise ValueError(
            f"{path}: holds a {about['architecture']}; known architectures: {_known()}"
        )
    return dict(about)


def _known() -> str:
    return ", ".join(ARCHITECTURES)


def _build(what: str, build: Any, config: Mapping[str, Any], path: Any) -> Any:
    try:
        return build(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its {what} configuration cannot be built: {error}") from None


def _located(name_or_path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """The file of a bundled model (unpacked, should the package be a zip) or of a path."""
    if name_or_path in BUNDLED:
        return resources.as_file(
            resources.files("ddpm_fast.models").joinpath(f"{name_or_path}.safetensors")
        )
    return nullcontext(Path(name_or_path))

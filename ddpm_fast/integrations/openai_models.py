"""Checkpoints of OpenAI's improved-diffusion and guided-diffusion: a bare ``state_dict`` in a .pt.

Sources: github.com/openai/improved-diffusion (Nichol & Dhariwal 2021, arXiv 2102.09672) and
github.com/openai/guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion import GaussianDiffusion
from ..models import UNet
from .weights import build, fill, names_of, read_state_dict

# Our names of theirs; their linear schedule is scaled by the number of steps, ours is not.
NOISE_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}

_NORM_GROUPS = 32
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
# What doubles height and width: a convolution or a residual block, behind a block of the decoder.
_UPSAMPLING = re.compile(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.2)\.weight$")


def load_openai(
    path: str | os.PathLike[str],
    *,
    image_size: int,
    num_heads: int = 4,
    num_head_channels: int | None = None,
    use_new_attention_order: bool = False,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    rescale_timesteps: bool | None = None,
    predict_xstart: bool = False,
    sigma_small: bool = False,
    device: str | torch.device | None = None,
) -> tuple[UNet, GaussianDiffusion]:
    """Load a checkpoint of improved-diffusion or guided-diffusion, ready to draw samples with.

    The options are flags of their scripts, by the same names and with the same defaults: those
    that leave no trace in the weights. All others are read off the tensors' shapes. To have the
    model in our own format, :func:`ddpm_fast.checkpoint.save` what this returns.

    Their class-conditional models have no label that stands for none, so there is no guidance
    without a classifier.

    Args:
        path: the .pt file, ``ema_0.9999_*.pt`` rather than ``model*.pt``.
        image_size: height and width of the pictures.
        num_heads: heads of each self-attention.
        num_head_channels: channels of each head, instead of their number.
        use_new_attention_order: as guided-diffusion was told; improved-diffusion knows the old one.
        diffusion_steps: T.
        noise_schedule: ``linear``, 1e-4 ... 0.02 times 1000 / T, or ``cosine``.
        rescale_timesteps: whether the network is told t times 1000 / T. Needed unless T is 1000:
            improved-diffusion does unless told otherwise, guided-diffusion does not.
        predict_xstart: the network predicts x_start.
        sigma_small: a fixed variance is ``fixed_small``, instead of ``fixed_large``.
        device: where to put the network; the CPU by default.

    Returns:
        The network, in eval mode, and its diffusion, of ``learned_range`` variance where the
        network has twice as many output as input channels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an option is unknown or missing; the file is truncated or foreign, or holds a
            network that our UNet cannot be: an upsampler, a classifier, or one that resizes
            without convolutions (``conv_resample`` False).
    """
    path = Path(path)
    if diffusion_steps < 1:
        raise ValueError(f"diffusion_steps must be at least 1; got {diffusion_steps}")
    if noise_schedule not in NOISE_SCHEDULES:
        known = ", ".join(NOISE_SCHEDULES)
        raise ValueError(f"noise_schedule must be one of {known}; got {noise_schedule!r}")
    if rescale_timesteps is None and diffusion_steps != 1000:
        raise ValueError(
            f"rescale_timesteps must be given for diffusion_steps {diffusion_steps}:"
            " improved-diffusion's default is True, guided-diffusion's False"
        )
    tensors = read_state_dict(path)
    scale = 1000 / diffusion_steps
    model = build(
        {
            **_unet_config(tensors, image_size, path),
            "num_heads": 1 if num_head_channels else num_heads,
            "num_head_channels": num_head_channels,
            "timestep_scale": scale if rescale_timesteps else 1.0,
        },
        path,
    )
    fixed = "fixed_small" if sigma_small else "fixed_large"
    options: dict[str, Any] = {
        "prediction_type": "sample" if predict_xstart else "epsilon",
        "variance_type": "learned_range" if model.out_channels == 2 * model.in_channels else fixed,
    }
    if noise_schedule == "linear":
        options |= {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
    diffusion = GaussianDiffusion.from_schedule(
        NOISE_SCHEDULES[noise_schedule], diffusion_steps, **options
    )
    fill(model, _names(model), _as_linear(tensors), path)
    if not use_new_attention_order:
        _put_queries_first(model)
    return model.to(device).eval(), diffusion


def _unet_config(tensors: Mapping[str, Tensor], image_size: int, path: Path) -> dict[str, Any]:
    """The configuration of our UNet, as far as the shapes of the tensors tell it."""
    foreign = f"{path}: not a U-Net of improved-diffusion or guided-diffusion"
    wanted = {  # all with two dimensions or more
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "input_blocks.1.0.emb_layers.1.weight",
        "input_blocks.1.0.in_layers.2.weight",
        "out.2.weight",
    }
    for name in sorted(wanted):
        if name not in tensors or tensors[name].dim() < 2 or 0 in tensors[name].shape:
            raise ValueError(f"{foreign}: {name} is missing, or no weight")
    time_channels = tensors["time_embed.0.weight"].shape[1]
    model_channels, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    _check_expressible(tensors, in_channels, path)
    blocks, widths, attends = _levels(tensors, path)
    if any(width % model_channels for width in widths):
        raise ValueError(
            f"{path}: the widths of its levels, {widths}, are not multiples of the"
            f" {model_channels} channels behind its first convolution"
        )
    labels = tensors.get("label_emb.weight")
    return {
        "in_channels": in_channels,
        "out_channels": len(tensors["out.2.weight"]),
        "image_size": image_size,
        "model_channels": model_channels,
        "channel_mult": [width // model_channels for width in widths],
        "num_res_blocks": blocks,
        "attention_resolutions": [
            image_size >> level for level, attending in enumerate(attends) if attending
        ],
        "num_classes": None if labels is None else len(labels),
        "null_label": labels is None,
        "scale_shift_norm": len(tensors["input_blocks.1.0.emb_layers.1.weight"]) == 2 * widths[0],
        "norm_groups": _NORM_GROUPS,
        "conventions": "openai",
        "time_channels": None if time_channels == model_channels else time_channels,
        "resblock_updown": f"output_blocks.{blocks}.{1 + attends[-1]}.in_layers.2.weight"
        in tensors,
    }


def _check_expressible(tensors: Mapping[str, Tensor], in_channels: int, path: Path) -> None:
    if in_channels == 6:
        raise ValueError(
            f"{path}: an upsampler, which is told of a smaller picture, cannot be loaded"
        )
    numbers = _numbers(tensors, "input_blocks")
    if numbers != set(range(len(numbers))):
        raise ValueError(
            f"{path}: resizes without convolutions (conv_resample False), which our UNet cannot"
        )


def _levels(tensors: Mapping[str, Tensor], path: Path) -> tuple[int, list[int], list[bool]]:
    """Residual blocks per level; and of each level its width, and whether it attends.

    In the encoder, a residual block that halves looks like any other. So the decoder tells where
    levels end: what doubles there stands behind a block.
    """
    ends = sorted({int(found[1]) for found in map(_UPSAMPLING.match, tensors) if found})
    decoder = len(_numbers(tensors, "output_blocks"))
    period = ends[0] + 1 if ends else max(1, decoder)
    levels: list[set[tuple[int, bool]]] = []
    if ends == list(range(period - 1, decoder - period, period)) and decoder % period == 0:
        for start in range(1, decoder, period):
            names = [f"input_blocks.{number}" for number in range(start, start + period - 1)]
            levels.append({(_width(tensors, n), f"{n}.1.qkv.weight" in tensors) for n in names})
    if not levels or any(len(level) != 1 for level in levels):
        raise ValueError(f"{path}: its levels are not of equally many residual blocks, all alike")
    widths, attends = zip(*(level.pop() for level in levels), strict=True)
    return period - 1, list(widths), list(attends)


def _width(tensors: Mapping[str, Tensor], block: str) -> int:
    weight = tensors.get(f"{block}.0.in_layers.2.weight")
    return 0 if weight is None or weight.dim() == 0 else len(weight)


def _numbers(tensors: Mapping[str, Tensor], part: str) -> set[int]:
    """Those of the part's blocks that have weights."""
    found = (re.match(rf"{part}\.(\d+)\.", name) for name in tensors)
    return {int(match[1]) for match in found if match}


def _names(model: UNet) -> dict[str, str]:
    """OpenAI's name of each layer of our network."""
    names = {
        "time_embedding.0": "time_embed.0",
        "time_embedding.2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }

    def name_block(ours: str, residual: str, attention: str) -> None:
        names.update(names_of(ours, residual, _RESIDUAL))
        names.update(names_of(f"{ours}.attention", attention, _ATTENTION))

    name_block("middle.0", "middle_block.0", "middle_block.1")
    name_block("middle.1", "middle_block.2", "")
    for i in range(len(model.encoder)):
        block = f"input_blocks.{i + 1}"
        name_block(f"encoder.{i}", f"{block}.0", f"{block}.1")
        names[f"encoder.{i}.conv"] = f"{block}.0.op"
    last = model.num_res_blocks
    for i in range(len(model.decoder)):
        level, number = divmod(i, last + 2)
        block = f"output_blocks.{level * (last + 1) + min(number, last)}"
        if number <= last:
            name_block(f"decoder.{i}", f"{block}.0", f"{block}.1")
        else:
            part = 2 if hasattr(model.decoder[i - 1].attention, "qkv") else 1
            name_block(f"decoder.{i}", f"{block}.{part}", "")
            names[f"decoder.{i}.conv"] = f"{block}.{part}.conv"
    return names


def _as_linear(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention's layers as ours are: linear; theirs are convolutions of kernel size 1."""
    return {
        name: tensor.flatten(1)
        if re.search(r"\.(qkv|proj_out)\.weight$", name) and tensor.dim() == 3
        else tensor
        for name, tensor in tensors.items()
    }


def _put_queries_first(model: UNet) -> None:
    """Reorder qkv's channels, from the old [heads, 3, -1] to the new and our own [3, heads, -1]."""
    modules: Any = model.modules()
    for attention in modules:
        if hasattr(attention, "qkv"):
            for tensor in attention.qkv.parameters():
                split = tensor.data.reshape(attention.num_heads, 3, -1, *tensor.shape[1:])
                tensor.data = split.transpose(0, 1).reshape(tensor.shape)

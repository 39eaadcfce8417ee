"""Models in the form of diffusers: folders that its ``save_pretrained`` wrote, and modules.

Where a folder's network is one that our :class:`~ddpm_fast.models.UNet` can be, its weights go into
that one, and diffusers need not be installed. Every other UNet2DModel is run by diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import GaussianDiffusion
from ..models import UNet
from ..models.pictures import check_pictures
from ..schedules import rescale_zero_terminal_snr
from .weights import build, fill, names_of, read

_WEIGHTS = "diffusion_pytorch_model"

# UNet2DModel's own, for the keys that a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}

# (flip_sin_to_cos, freq_shift, downsample_padding, norm_eps) of our UNet's conventions
_CONVENTIONS = {(False, 1, 0, 1e-6): "ddpm", (True, 0, 1, 1e-5): "openai"}

# Options with one value that our UNet can be.
_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "class_embed_type": None,
}

# A level without attention, by the way in which those with it resize: downsample_type.
_PLAIN_BLOCKS = {"conv": "DownBlock2D", "resnet": "ResnetDownsampleBlock2D"}

_RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embedding": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "qkv", "out": "to_out.0"}
# The names that attention's layers had before diffusers 0.17.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Those that clamp by default.
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")

# What UNet2DModel raises for options that are no values for them.
_UNBUILDABLE = (
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    NameError,
)

_VARIANCE_TYPES = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}


class DiffusersModel(nn.Module):
    """A diffusers.UNet2DModel as the samplers here call a model.

    Args:
        unet: the network. Its parameters are shared, not copied.
        num_classes: for guidance, of a network that was trained to take the label ``num_classes``
            for none: how many classes come before that label. By default all ``num_class_embeds``
            labels are classes, and guidance is refused: nothing in the network says otherwise.

    Attributes:
        unet: the network.
        in_channels: channels of the pictures.
        image_size: their height and width; None where the network has no one size.
        num_classes: the number of classes; None where it takes no labels.
        null_label: whether the label ``num_classes`` stands for none.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: ``unet`` is something else.
        ValueError: ``num_classes`` leaves no label that could stand for none.
    """

    def __init__(self, unet: nn.Module, *, num_classes: int | None = None) -> None:
        super().__init__()
        if not isinstance(unet, _diffusers().UNet2DModel):
            raise TypeError(f"unet must be a diffusers.UNet2DModel; got {type(unet).__name__}")
        config: Any = unet.config
        labels = None if config.class_embed_type is not None else config.num_class_embeds
        if num_classes is not None and not 0 < num_classes < (labels or 0):
            raise ValueError(
                f"num_classes must leave one of the network's {labels or 0} labels to stand for"
                f" none; got {num_classes}"
            )
        self.unet = unet
        self.in_channels: int = config.in_channels
        size = config.sample_size
        self.image_size: int | None = size if isinstance(size, int) else None
        self.num_classes: int | None = labels if num_classes is None else num_classes
        self.null_label = num_classes is not None

    def config(self) -> dict[str, Any]:
        """The network's options, and the number of classes; not where it came from."""
        options = {name: value for name, value in dict(self.unet.config).items() if name[0] != "_"}
        return options | {"num_classes": self.num_classes}

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict from noised pictures ``x`` [N, C, H, W] at timesteps ``t`` [N].

        Without ``class_labels``, [N], a network with a null label takes that one for all.
        """
        check_pictures("DiffusersModel", x, self.in_channels)
        if class_labels is None and self.null_label and self.num_classes is not None:
            class_labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
        out: Tensor = self.unet(x, t, class_labels=class_labels).sample
        return out


def load_folder(folder: Path) -> tuple[UNet | DiffusersModel, GaussianDiffusion]:
    """The network and the diffusion of a folder that diffusers wrote, on the CPU, in float32.

    Two layouts are read: that of ``DDPMPipeline.save_pretrained``, with ``unet/`` and
    ``scheduler/``, and one with the same files side by side. Weights are safetensors, in one file
    or in shards, or else ``.bin``, of which nothing but tensors is unpickled; of the variants
    ``fp16`` and ``bf16`` where there are no others.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: one of them is damaged, or not of a UNet2DModel.
        ImportError: the network is not one that our UNet can be, and diffusers is not installed.
    """
    parts = {name: folder / name for name in ("unet", "scheduler")}
    unet, scheduler = (part if part.is_dir() else folder for part in parts.values())
    config_path, scheduler_path = unet / "config.json", scheduler / "scheduler_config.json"
    config = _read_json(config_path)
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"{config_path}: must describe a UNet2DModel; got {config.get('_class_name')}"
        )
    try:
        diffusion = diffusion_of(_read_json(scheduler_path))
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix(f"{scheduler_path}: ")
        raise ValueError(f"{scheduler_path}: {message}") from None
    try:
        ours = _unet_config(_DEFAULTS | config)
    except (TypeError, AttributeError, LookupError, ArithmeticError):
        raise ValueError(f"{config_path}: one of its options is no value for it") from None
    model: UNet | DiffusersModel
    if ours is None:
        model = _run_by_diffusers(unet, config)
    else:
        model = build(ours, config_path)
        path, tensors = _read_tensors(unet)
        fill(model, _names(model), _joined(tensors, path), path)
    return model.eval(), diffusion


def diffusion_of(scheduler: Any) -> GaussianDiffusion:
    """The process that a diffusers scheduler samples from, or that its config describes.

    The schedulers of one process share its fields, so it may be of any of them: DDPMScheduler,
    DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler and so on. What belongs to sampling
    rather than to the process (``timestep_spacing``, the solver's order) is left to
    :func:`ddpm_fast.sample`. The betas are computed in float64, those of diffusers in float32,
    which moves its alphas_cumprod of 1000 steps by up to some 1e-5 of their value.

    Args:
        scheduler: a scheduler, or its config, a mapping.

    Raises:
        ValueError: for a process that GaussianDiffusion is not: one without betas, as of flow
            matching, or with their alphas_cumprod shifted, ``learned`` variances (there a
            variance, here its logarithm), a clamp elsewhere than at 1, or an option unknown here.
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    # That of a scheduler in memory names no class, but has every option of its class.
    nameless = "a scheduler" if "_use_default_values" in config else "DDPMScheduler"
    name = config.get("_class_name", nameless)
    kind = name.removeprefix("Fused").replace("Parallel", "")
    _check_process(config, kind)
    variance_type = config.get("variance_type", "fixed_small" if kind == "DDPMScheduler" else None)
    options = {
        "prediction_type": config.get("prediction_type", "epsilon"),
        "variance_type": _VARIANCE_TYPES.get(variance_type, variance_type),
        "clip_denoised": config.get("clip_sample", kind in _CLIPPING),
    }
    if config.get("thresholding"):  # which there goes before clip_sample
        options |= {
            "clip_denoised": True,
            "dynamic_thresholding_ratio": config.get("dynamic_thresholding_ratio", 0.995),
            "sample_max_value": config.get("sample_max_value", 1.0),
        }
    rescale = bool(config.get("rescale_betas_zero_snr"))
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        return GaussianDiffusion(rescale_zero_terminal_snr(betas) if rescale else betas, **options)
    return GaussianDiffusion.from_schedule(
        config.get("beta_schedule", "linear"),
        config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 1e-4),
        beta_end=config.get("beta_end", 0.02),
        rescale_betas_zero_snr=rescale,
        **options,
    )


def _check_process(config: Mapping[str, Any], kind: str) -> None:
    has_betas = "beta_schedule" in config or config.get("trained_betas") is not None
    if not has_betas and kind not in _CLIPPING:
        raise ValueError(f"{kind} without beta_schedule or trained_betas is of another process")
    if config.get("use_flow_sigmas"):
        raise ValueError(f"{kind} with use_flow_sigmas is of another process")
    shift = config.get("snr_shift_scale", 1)
    if shift != 1:
        raise ValueError(f"snr_shift_scale must be 1; got {shift}")
    if config.get("variance_type") == "learned":
        raise ValueError(
            "variance_type learned is a variance in diffusers and a log-variance in ddpm_fast;"
            " learned_range is the same in both"
        )
    clip_range = config.get("clip_sample_range", 1.0)
    clips = config.get("clip_sample", True) and not config.get("thresholding")
    if clips and clip_range != 1:
        raise ValueError(f"clip_sample_range must be 1; got {clip_range}")


def _unet_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of our UNet that is the same network, or None where there is none."""
    down = [name.removeprefix("UNetRes") for name in config["down_block_types"]]
    up = [name.removeprefix("UNetRes") for name in config["up_block_types"]]
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    size, heads_of = config["sample_size"], config["attention_head_dim"]
    resizing = config["downsample_type"]
    conventions = _CONVENTIONS.get(
        tuple(
            config[key]
            for key in ("flip_sin_to_cos", "freq_shift", "downsample_padding", "norm_eps")
        )
    )
    scale_shift = config["resnet_time_scale_shift"]
    middle_groups = {"default": (None, groups), "scale_shift": (groups,)}.get(scale_shift, ())
    same = (
        all(config[key] == value for key, value in _FIXED.items())
        and config["act_fn"] in ("silu", "swish")
        and isinstance(groups, int)
        and config["layers_per_block"] > 0
        and len(down) == len(widths)
        and set(down) <= {_PLAIN_BLOCKS.get(resizing), "AttnDownBlock2D"}
        and config["upsample_type"] == resizing
        and up == [name.replace("Down", "Up") for name in reversed(down)]
        and conventions is not None
        and config["attn_norm_num_groups"] in middle_groups
        and config["time_embedding_dim"] in (None, 4 * widths[0])
        and isinstance(size, int)
        and size >> (len(widths) - 1) > 0
        and widths[0] % 2 == 0
        and all(width % widths[0] == 0 for width in widths)
        and all(width % (heads_of or 1) == 0 for width in widths)
    )
    if not same:
        return None
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "image_size": size,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [
            size >> level for level, name in enumerate(down) if name == "AttnDownBlock2D"
        ],
        "num_head_channels": heads_of,
        "dropout": config["dropout"],
        "num_classes": config["num_class_embeds"],
        "null_label": config["num_class_embeds"] is None,
        "scale_shift_norm": scale_shift == "scale_shift",
        "norm_groups": groups,
        "conventions": conventions,
        "resblock_updown": resizing == "resnet",
    }


def _names(model: UNet) -> dict[str, str]:
    """diffusers' name of each layer of our network."""
    names = {
        "time_embedding.0": "time_embedding.linear_1",
        "time_embedding.2": "time_embedding.linear_2",
        "class_embedding": "class_embedding",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }

    def name_block(ours: str, part: str, number: int) -> None:
        names.update(names_of(ours, f"{part}.resnets.{number}", _RESIDUAL))
        names.update(names_of(f"{ours}.attention", f"{part}.attentions.{number}", _ATTENTION))

    def name_resizing(ours: str, theirs: str) -> None:
        names.update(names_of(ours, theirs, _RESIDUAL | {"conv": "conv"}))

    for number in range(2):
        name_block(f"middle.{number}", "mid_block", number)
    blocks = model.num_res_blocks
    for i in range(len(model.encoder)):
        level, number = divmod(i, blocks + 1)
        if number < blocks:
            name_block(f"encoder.{i}", f"down_blocks.{level}", number)
        else:
            name_resizing(f"encoder.{i}", f"down_blocks.{level}.downsamplers.0")
    for i in range(len(model.decoder)):
        level, number = divmod(i, blocks + 2)
        if number < blocks + 1:
            name_block(f"decoder.{i}", f"up_blocks.{level}", number)
        else:
            name_resizing(f"decoder.{i}", f"up_blocks.{level}.upsamplers.0")
    return names


def _joined(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file with query, key and value in one, as our attention has them."""
    joined, parts = {}, {"to_q": 0, "to_k": 1, "to_v": 2}
    projections: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        attention, _, part = layer.rpartition(".")
        if part in parts:
            projections.setdefault(f"{attention}.qkv.{kind}", {})[parts[part]] = tensor
        else:
            joined[name] = tensor
    for name, three in projections.items():
        if len(three) < 3 or len({tensor.shape for tensor in three.values()}) > 1:
            raise ValueError(
                f"{path}: not the weights of this U-Net: the parts of {name} are not three alike"
            )
        joined[name] = torch.cat([three[part] for part in range(3)])
    return joined


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """All weights of a folder by their present names, and the file to name in errors."""
    path = _weights_file(folder)
    tensors: dict[str, Tensor] = {}
    if path.suffix == ".json":
        for shard in sorted(set(_shards(path))):
            tensors |= read(folder / shard)
    else:
        tensors = read(path)
    old = re.compile(rf"(attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.")
    return path, {
        old.sub(lambda found: f"{found[1]}.{_OLD_ATTENTION[found[2]]}.", name): tensor
        for name, tensor in tensors.items()
    }


def _weights_file(folder: Path) -> Path:
    """The first that is there: all precision before half of it, safetensors before pickles."""
    forms = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for variant in ("", ".fp16", ".bf16"):
        for form in forms:
            path = folder / f"{_WEIGHTS}{form}"
            path = path.with_suffix(f"{variant}{path.suffix}")
            if path.is_file():
                return path
    return folder / f"{_WEIGHTS}.safetensors"


def _shards(index: Path) -> list[str]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
    ):
        raise ValueError(f"{index}: its weight_map must name files beside it")
    return list(shards.values())


def _run_by_diffusers(folder: Path, config: Mapping[str, Any]) -> DiffusersModel:
    config_path = folder / "config.json"
    try:
        network = _diffusers().UNet2DModel
    except ImportError as error:
        raise ImportError(
            f"{config_path}: this network is not one that ddpm_fast's UNet can be, and is run by"
            " diffusers, which is not installed: pip install diffusers"
        ) from error
    path, tensors = _read_tensors(folder)
    try:
        with torch.random.fork_rng(devices=[]):  # for weights about to be replaced
            unet = network.from_config(config)
    except _UNBUILDABLE as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{config_path}: diffusers cannot build this network: {why}") from None
    try:
        unet.load_state_dict(tensors)
    except RuntimeError as error:
        first = " ".join(str(error).splitlines()[1].split())
        raise ValueError(f"{path}: not the weights of its config.json: {first}") from None
    return DiffusersModel(unet)


def _diffusers() -> Any:
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise ImportError("DiffusersModel needs diffusers: pip install diffusers") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, which a folder of diffusers has")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: truncated, or not JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content

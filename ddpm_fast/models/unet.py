"""The U-Net of Ho et al. 2020 (arXiv 2006.11239, appendix B), with optional class conditioning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NORM_EPS = 1e-6
_Layer = TypeVar("_Layer", bound=nn.Module)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps, float32 [N, dim].

    ``[sin(t w_0) ... sin(t w_{half-1}), cos(t w_0) ... cos(t w_{half-1})]`` with
    ``w_i = 10000^(-i / (half - 1))`` and ``half = dim // 2``: the convention of the paper's
    code. Weights trained under another one (cosines first, or ``i / half``) give wrong pictures
    without an error.

    Args:
        t: timesteps [N], of any integer or floating type.
        dim: width of the embedding; even and at least 4.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNet(nn.Module):
    """The paper's U-Net: residual blocks, GroupNorm, SiLU, self-attention, time embedding.

    Each level of the encoder holds ``num_res_blocks`` residual blocks; each level of the decoder
    holds one more, and each of its blocks takes a skip connection. Between levels the picture is
    halved by a convolution of stride 2, and doubled by nearest-neighbour copies and a convolution.
    The last convolution of each residual block, each attention's output and the network's output
    start at zero, so that a new network predicts zero.

    Args:
        in_channels: channels of the picture.
        out_channels: channels of the output; ``in_channels`` by default, twice that for learned
            variances.
        image_size: height and width of the pictures it is made for. Other sizes are accepted; this
            one decides which levels have attention, and is the size drawn by default.
        model_channels: width of the first level, even and at least 4.
        channel_mult: width of each level, as multiples of ``model_channels``.
        num_res_blocks: residual blocks per level.
        attention_resolutions: sizes, among those of the levels, at which each residual block is
            followed by self-attention. The middle always has it.
        num_heads: heads of each self-attention.
        dropout: probability of dropout within residual blocks.
        num_classes: makes it class-conditional. The embedding has one more row, label
            ``num_classes``, which stands for no label (label dropout, guidance).

    Raises:
        ValueError: for a configuration that cannot be built.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        image_size: int = 32,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        dropout: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        _check_config(image_size, model_channels, channel_mult, attention_resolutions, num_heads)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.image_size = image_size
        self.model_channels = model_channels
        self.channel_mult = tuple(channel_mult)
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = tuple(attention_resolutions)
        self.num_heads = num_heads
        self.dropout = dropout
        self.num_classes = num_classes

        embedding_channels = 4 * model_channels
        self.time_embedding = nn.Sequential(
            _linear(model_channels, embedding_channels),
            nn.SiLU(),
            _linear(embedding_channels, embedding_channels),
        )
        self.class_embedding = (
            None if num_classes is None else nn.Embedding(num_classes + 1, embedding_channels)
        )

        def block(channels: int, width: int, size: int) -> _Block:
            attends = size in self.attention_resolutions
            return _Block(channels, width, embedding_channels, dropout, num_heads if attends else 0)

        widths = [model_channels * multiple for multiple in channel_mult]
        sizes = [image_size >> level for level in range(len(widths))]
        last = len(widths) - 1

        self.conv_in = _conv(in_channels, model_channels)
        channels = model_channels
        skips = [channels]
        self.encoder = nn.ModuleList()
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            for _ in range(num_res_blocks):
                self.encoder.append(block(channels, width, size))
                channels = width
                skips.append(channels)
            if level < last:
                self.encoder.append(_Downsample(channels))
                skips.append(channels)

        self.middle = nn.ModuleList(
            [
                _Block(channels, channels, embedding_channels, dropout, num_heads),
                _Block(channels, channels, embedding_channels, dropout, 0),
            ]
        )

        self.decoder = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(num_res_blocks + 1):
                self.decoder.append(block(channels + skips.pop(), widths[level], sizes[level]))
                channels = widths[level]
            if level > 0:
                self.decoder.append(_Upsample(channels))

        self.norm_out = _norm(channels)
        self.conv_out = _zeroed(_conv(channels, self.out_channels))

    @classmethod
    def cifar10(cls, **overrides: Any) -> UNet:
        """The paper's CIFAR-10 network, of 35,746,307 parameters; ``overrides`` change options."""
        return cls(**({"dropout": 0.1} | overrides))

    def config(self) -> dict[str, Any]:
        """The keyword arguments that rebuild this network, as JSON-able values."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "image_size": self.image_size,
            "model_channels": self.model_channels,
            "channel_mult": list(self.channel_mult),
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": list(self.attention_resolutions),
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "num_classes": self.num_classes,
        }

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict from noised pictures.

        Args:
            x: pictures [N, in_channels, H, W], of the network's floating type.
            t: timesteps [N].
            class_labels: int64 [N], 0 ... num_classes; without them a class-conditional network
                takes the null label, ``num_classes``, for all.

        Returns:
            [N, out_channels, H, W], of the type of ``x``.

        Raises:
            ValueError: when labels are given to a network without classes.
        """
        embedding = self._embed(t, class_labels, x.dtype)
        h = self.conv_in(x)
        skips = [h]
        for module in self.encoder:
            h = module(h) if isinstance(module, _Downsample) else module(h, embedding)
            skips.append(h)
        for module in self.middle:
            h = module(h, embedding)
        for module in self.decoder:
            if isinstance(module, _Upsample):
                h = module(h, skips[-1].shape[-2:])
            else:
                h = module(torch.cat([h, skips.pop()], dim=1), embedding)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out

    def _embed(self, t: Tensor, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What every residual block is told of time and class, [N, 4 model_channels]."""
        embedding = self.time_embedding(timestep_embedding(t, self.model_channels).to(dtype))
        if self.num_classes is not None and self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.class_embedding(class_labels)
        elif class_labels is not None:
            raise ValueError("UNet: class_labels given, but this network has no classes")
        return F.silu(embedding)


class _Block(nn.Module):
    """A residual block, followed by self-attention when ``num_heads`` is not zero."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        dropout: float,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv(in_channels, out_channels)
        self.embedding = _linear(embedding_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(_conv(out_channels, out_channels))
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else _conv(in_channels, out_channels, kernel_size=1, padding=0)
        )
        self.attention = _Attention(out_channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embedding(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = self.attention(self.shortcut(x) + h)
        return out


class _Attention(nn.Module):
    """Self-attention over the positions of a picture, with a residual connection."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = _norm(channels)
        self.qkv = _linear(channels, 3 * channels)
        for weight in self.qkv.weight.data.chunk(3):
            nn.init.xavier_uniform_(weight)  # each as a layer of its own
        self.out = _zeroed(_linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        positions = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(positions).reshape(n, height * width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(query, key, value)
        h = self.out(h.transpose(1, 2).reshape(n, height * width, channels))
        out: Tensor = x + h.transpose(1, 2).reshape(x.shape)
        return out


class _Downsample(nn.Module):
    """Halve height and width, rounding down; pads right and below only, as the paper's code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Upsample(nn.Module):
    """Double height and width, or whatever the next skip connection has where it was odd."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, size=list(size), mode="nearest"))
        return out


def _norm(channels: int) -> nn.GroupNorm:
    """32 groups in the paper's widths; fewer in narrow layers, so that each has 4 channels or more.

    Groups of one channel would erase every channel's mean.
    """
    groups = max(1, math.gcd(128, channels) // 4)
    return nn.GroupNorm(groups, channels, eps=_NORM_EPS)


def _conv(
    in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Conv2d:
    return _initialised(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding))


def _linear(in_features: int, out_features: int) -> nn.Linear:
    return _initialised(nn.Linear(in_features, out_features))


def _initialised(layer: _Layer) -> _Layer:
    """Weights uniform with variance 2 / (fan_in + fan_out), as in the paper's code; no bias."""
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    return layer


def _zeroed(layer: _Layer) -> _Layer:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _check_config(
    image_size: int,
    model_channels: int,
    channel_mult: Sequence[int],
    attention_resolutions: Sequence[int],
    num_heads: int,
) -> None:
    """Raise ValueError for what would otherwise fail later, or silently not do what was asked."""
    if model_channels < 4 or model_channels % 2:
        raise ValueError(f"UNet: model_channels must be even and at least 4; got {model_channels}")
    if not channel_mult or min(channel_mult) < 1:
        raise ValueError(f"UNet: channel_mult must be positive numbers; got {list(channel_mult)}")
    sizes = [image_size >> level for level in range(len(channel_mult))]
    if sizes[-1] < 1:
        raise ValueError(
            f"UNet: image_size {image_size} cannot be halved {len(sizes) - 1} times"
            f" (channel_mult has {len(sizes)} levels)"
        )
    if not set(attention_resolutions) <= set(sizes):
        raise ValueError(
            f"UNet: attention_resolutions must be among the sizes of the levels, {sizes};"
            f" got {list(attention_resolutions)}"
        )
    if any(model_channels * multiple % num_heads for multiple in channel_mult):
        raise ValueError(f"UNet: num_heads must divide the channels of each level; got {num_heads}")

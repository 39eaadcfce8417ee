"""The U-Net of Ho et al. 2020 (arXiv 2006.11239, appendix B), with options of its successors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from .pictures import check_pictures

torch.fx.wrap("check_pictures")  # else a trace could not pass its question

_Layer = TypeVar("_Layer", bound=nn.Module)
_MakeNorm = Callable[[int], nn.GroupNorm]


class Conventions(NamedTuple):
    """Where codebases differ without a trace in the weights.

    Attributes:
        cosines_first: of the two halves of the time embedding.
        freq_shift: its frequencies are ``10000^(-i / (half - freq_shift))``.
        norm_eps: of every GroupNorm.
        symmetric_padding: of the convolution of stride 2, which else pads right and below only.
    """

    cosines_first: bool
    freq_shift: int
    norm_eps: float
    symmetric_padding: bool


# By whose code: that of Ho et al. 2020, or that of Nichol & Dhariwal 2021 and its descendants.
CONVENTIONS = {
    "ddpm": Conventions(False, 1, 1e-6, False),
    "openai": Conventions(True, 0, 1e-5, True),
}


def timestep_embedding(t: Tensor, dim: int, conventions: str = "ddpm") -> Tensor:
    """Sinusoidal embedding of timesteps, float32 [N, dim].

    ``[sin(t w_0) ... sin(t w_{half-1}), cos(t w_0) ... cos(t w_{half-1})]`` with
    ``w_i = 10000^(-i / (half - 1))`` and ``half = dim // 2``: the convention of the paper's
    code. OpenAI's has the cosines first, and ``i / half``. Weights trained under the other one
    give wrong pictures without an error.

    Args:
        t: timesteps [N], of any integer or floating type.
        dim: width of the embedding; even and at least 4.
        conventions: ``ddpm`` or ``openai``.
    """
    cosines_first, freq_shift, *_ = CONVENTIONS[conventions]
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    halves = [angles.sin(), angles.cos()]
    return torch.cat(halves[::-1] if cosines_first else halves, dim=1)


class UNet(nn.Module):
    """The paper's U-Net: residual blocks, GroupNorm, SiLU, self-attention, time embedding.

    Each level of the encoder holds ``num_res_blocks`` residual blocks; each level of the decoder
    holds one more, and each of its blocks takes a skip connection. Between levels the picture is
    halved by a convolution of stride 2, and doubled by nearest-neighbour copies and a convolution.
    The last convolution of each residual block, each attention's output and the network's output
    start at zero, so that a new network predicts zero.

    The options from ``null_label`` on are for weights that other code has trained.

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
        null_label: whether it has that row. Without it, labels are always needed.
        num_head_channels: channels of each head, instead of a number of heads.
        scale_shift_norm: time and class scale and shift what the second GroupNorm of a residual
            block gives (Nichol & Dhariwal 2021), instead of being added before it.
        norm_groups: groups of each GroupNorm; by default 32 in the paper's widths, and fewer in
            narrow layers.
        conventions: ``ddpm``, those of the paper's code, or ``openai``; see :class:`Conventions`.
        timestep_scale: timesteps are multiplied by it before they are embedded.
        time_channels: width of the sinusoids of time, even and at least 4; ``model_channels`` by
            default.
        resblock_updown: between levels the picture is halved, by averaging, and doubled, by
            copies, within a residual block of its own (Dhariwal & Nichol 2021, arXiv 2105.05233,
            section 3), instead of by a convolution.

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
        null_label: bool = True,
        num_head_channels: int | None = None,
        scale_shift_norm: bool = False,
        norm_groups: int | None = None,
        conventions: str = "ddpm",
        timestep_scale: float = 1.0,
        time_channels: int | None = None,
        resblock_updown: bool = False,
    ) -> None:
        super().__init__()
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
        self.null_label = null_label
        self.num_head_channels = num_head_channels
        self.scale_shift_norm = scale_shift_norm
        self.norm_groups = norm_groups
        self.conventions = conventions
        self.timestep_scale = timestep_scale
        self.time_channels = time_channels
        self.resblock_updown = resblock_updown
        self._check_config()

        self._build_embeddings()
        self.conv_in = _conv(in_channels, model_channels)
        self.encoder, skips = self._build_encoder()
        channels = skips[-1]
        self.middle = nn.ModuleList(
            [
                self._block(_Block, channels, channels, attends=True),
                self._block(_Block, channels, channels),
            ]
        )
        self.decoder, channels = self._build_decoder(skips)
        self.norm_out = self._norm(channels)
        self.conv_out = _zeroed(_conv(channels, self.out_channels))

    @classmethod
    def cifar10(cls, **overrides: Any) -> UNet:
        """The paper's CIFAR-10 network, of 35,746,307 parameters; ``overrides`` change options."""
        return cls(**({"dropout": 0.1} | overrides))

    def config(self) -> dict[str, Any]:
        """The keyword arguments that rebuild this network, as JSON-able values.

        The options for weights of other code are there only where they are not the default, so
        that networks without them have the configuration they have always had.
        """
        foreign = {
            "null_label": True,
            "num_head_channels": None,
            "scale_shift_norm": False,
            "norm_groups": None,
            "conventions": "ddpm",
            "timestep_scale": 1.0,
            "time_channels": None,
            "resblock_updown": False,
        }
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
            **{k: getattr(self, k) for k, v in foreign.items() if getattr(self, k) != v},
        }

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict from noised pictures.

        Args:
            x: pictures [N, in_channels, H, W], of the network's floating type.
            t: timesteps [N].
            class_labels: int64 [N], 0 ... num_classes; without them a class-conditional network
                takes the null label, ``num_classes``, for all, if it has one.

        Returns:
            [N, out_channels, H, W], of the type of ``x``.

        Raises:
            ValueError: another number of channels or of dimensions; labels given to a network
                without classes, or none to one without a null label.
        """
        check_pictures("UNet", x, self.in_channels)
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
            elif isinstance(module, _UpBlock):
                h = module(h, embedding, skips[-1].shape[-2:])
            else:
                h = module(torch.cat([h, skips.pop()], dim=1), embedding)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out

    def _embed(self, t: Tensor, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What every residual block is told of time and class, [N, 4 time_channels]."""
        times = t if self.timestep_scale == 1 else t.float() * self.timestep_scale
        sinusoids = timestep_embedding(times, self._sinusoids(), self.conventions)
        embedding = self.time_embedding(sinusoids.to(dtype))
        if self.num_classes is not None and self.class_embedding is not None:
            if class_labels is None:
                if not self.null_label:
                    raise ValueError("UNet: class_labels needed: this network has no null label")
                class_labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.class_embedding(class_labels)
        elif class_labels is not None:
            raise ValueError("UNet: class_labels given, but this network has no classes")
        return F.silu(embedding)

    def _build_embeddings(self) -> None:
        self._embedding_channels = 4 * self._sinusoids()
        self.time_embedding = nn.Sequential(
            _linear(self._sinusoids(), self._embedding_channels),
            nn.SiLU(),
            _linear(self._embedding_channels, self._embedding_channels),
        )
        self.class_embedding = (
            None
            if self.num_classes is None
            else nn.Embedding(self.num_classes + self.null_label, self._embedding_channels)
        )

    def _build_encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """Its layers, and the channels of each skip connection."""
        layers, skips = nn.ModuleList(), [self.model_channels]
        for level, (width, attends) in enumerate(self._levels()):
            if level > 0:
                layers.append(self._downsample(skips[-1]))
                skips.append(skips[-1])
            for _ in range(self.num_res_blocks):
                layers.append(self._block(_Block, skips[-1], width, attends=attends))
                skips.append(width)
        return layers, skips

    def _build_decoder(self, skips: Sequence[int]) -> tuple[nn.ModuleList, int]:
        """Its layers, and the channels that it ends with."""
        layers, channels, left = nn.ModuleList(), skips[-1], list(skips)
        for level, (width, attends) in reversed([*enumerate(self._levels())]):
            for _ in range(self.num_res_blocks + 1):
                layers.append(self._block(_Block, channels + left.pop(), width, attends=attends))
                channels = width
            if level > 0:
                layers.append(self._upsample(channels))
        return layers, channels

    def _levels(self) -> list[tuple[int, bool]]:
        """The width of each level, and whether it has attention."""
        return [
            (self.model_channels * multiple, size in self.attention_resolutions)
            for multiple, size in zip(self.channel_mult, self._sizes(), strict=True)
        ]

    def _block(
        self, kind: type[_Block], channels: int, width: int, *, attends: bool = False
    ) -> _Block:
        return kind(
            channels,
            width,
            self._embedding_channels,
            self.dropout,
            num_heads=self._heads(width) if attends else 0,
            scale_shift=self.scale_shift_norm,
            norm=self._norm,
        )

    def _downsample(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self._block(_DownBlock, channels, channels)
        return _Downsample(channels, CONVENTIONS[self.conventions].symmetric_padding)

    def _upsample(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self._block(_UpBlock, channels, channels)
        return _Upsample(channels)

    def _norm(self, channels: int) -> nn.GroupNorm:
        """By default 32 groups in the paper's widths, fewer in narrow layers, of 4 channels each.

        Groups of one channel would erase every channel's mean.
        """
        groups = self.norm_groups or max(1, math.gcd(128, channels) // 4)
        return nn.GroupNorm(groups, channels, eps=CONVENTIONS[self.conventions].norm_eps)

    def _sizes(self) -> list[int]:
        """The height and width of the pictures on each level."""
        return [self.image_size >> level for level in range(len(self.channel_mult))]

    def _sinusoids(self) -> int:
        return self.time_channels or self.model_channels

    def _heads(self, width: int) -> int:
        return width // self.num_head_channels if self.num_head_channels else self.num_heads

    def _check_config(self) -> None:
        """Raise ValueError for what would otherwise fail later, or silently not do as asked."""
        channels, multiples = self.model_channels, self.channel_mult
        for option in ("model_channels", "time_channels"):
            width = getattr(self, option)
            if width is not None and (width < 4 or width % 2):
                raise ValueError(f"UNet: {option} must be even and at least 4; got {width}")
        if not multiples or min(multiples) < 1:
            raise ValueError(f"UNet: channel_mult must be positive numbers; got {list(multiples)}")
        sizes = self._sizes()
        if sizes[-1] < 1:
            raise ValueError(
                f"UNet: image_size {self.image_size} cannot be halved {len(sizes) - 1} times"
                f" (channel_mult has {len(sizes)} levels)"
            )
        if not set(self.attention_resolutions) <= set(sizes):
            raise ValueError(
                f"UNet: attention_resolutions must be among the sizes of the levels, {sizes};"
                f" got {list(self.attention_resolutions)}"
            )
        for option in ("num_heads", "num_head_channels", "norm_groups"):
            divisor = getattr(self, option)
            if divisor is not None and (
                divisor < 1 or any(channels * multiple % divisor for multiple in multiples)
            ):
                raise ValueError(
                    f"UNet: {option} must divide the channels of each level; got {divisor}"
                )
        if self.conventions not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise ValueError(f"UNet: conventions must be one of {known}; got {self.conventions!r}")


class _Block(nn.Module):
    """A residual block, followed by self-attention when ``num_heads`` is not zero.

    The embedding is added to it, or scales and shifts it behind the second norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        dropout: float,
        *,
        num_heads: int,
        scale_shift: bool,
        norm: _MakeNorm,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = norm(in_channels)
        self.conv1 = _conv(in_channels, out_channels)
        self.embedding = _linear(embedding_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(_conv(out_channels, out_channels))
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else _conv(in_channels, out_channels, kernel_size=1, padding=0)
        )
        self.attention = _Attention(out_channels, num_heads, norm) if num_heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, size: Sequence[int] | None = None) -> Tensor:
        h = F.silu(self.norm1(x))
        x, h = self.resized(x, size), self.resized(h, size)
        h = self.conv1(h)
        told = self.embedding(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + told)
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = self.attention(self.shortcut(x) + h)
        return out

    def resized(self, x: Tensor, size: Sequence[int] | None) -> Tensor:
        """What goes on to the convolutions, and what the block's result is added to."""
        return x


class _DownBlock(_Block):
    """A residual block that halves height and width; odd ones are rounded down."""

    def resized(self, x: Tensor, size: Sequence[int] | None) -> Tensor:
        return F.avg_pool2d(x, 2)


class _UpBlock(_Block):
    """A residual block that brings height and width to the size of the next skip connection."""

    def resized(self, x: Tensor, size: Sequence[int] | None) -> Tensor:
        assert size is not None
        return F.interpolate(x, size=list(size), mode="nearest")


class _Attention(nn.Module):
    """Self-attention over the positions of a picture, with a residual connection."""

    def __init__(self, channels: int, num_heads: int, norm: _MakeNorm) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(channels)
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
    """Halve height and width by a convolution.

    Without symmetric padding, it pads right and below only, as the paper's code, and rounds down;
    with it, odd sizes are rounded up.
    """

    def __init__(self, channels: int, symmetric_padding: bool) -> None:
        super().__init__()
        self.symmetric_padding = symmetric_padding
        self.conv = _conv(channels, channels, stride=2, padding=int(symmetric_padding))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x if self.symmetric_padding else F.pad(x, (0, 1, 0, 1)))
        return out


class _Upsample(nn.Module):
    """Double height and width, or whatever the next skip connection has where it was odd."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, size=list(size), mode="nearest"))
        return out


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

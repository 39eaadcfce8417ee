"""Checkpoints of improved-diffusion and guided-diffusion, against their networks written out."""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ddpm_fast import load, sample
from ddpm_fast.checkpoint import save
from ddpm_fast.integrations.openai_models import load_openai
from ddpm_fast.models import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 8


@dataclass(frozen=True)
class Network:
    """A network of theirs, by the flags it is made of; ``attention`` says which levels attend."""

    channels: int = 32
    channel_mult: tuple[float, ...] = (1, 2)
    num_res_blocks: int = 1
    attention: tuple[bool, ...] = (False, True)
    scale_shift_norm: bool = True
    num_classes: int | None = None
    learn_sigma: bool = False
    num_heads: int = 4
    num_head_channels: int | None = None
    new_attention_order: bool = False
    resblock_updown: bool = False

    def widths(self) -> list[int]:
        return [int(multiple * self.channels) for multiple in self.channel_mult]

    def flags(self) -> dict[str, Any]:
        """What load_openai is told."""
        return {
            "image_size": SIZE,
            "num_heads": self.num_heads,
            "num_head_channels": self.num_head_channels,
            "use_new_attention_order": self.new_attention_order,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Random weights by their names."""
        generator = torch.Generator().manual_seed(0)
        tensors: dict[str, Tensor] = {}

        def layer(name: str, *shape: int) -> None:
            fan_in = math.prod(shape[1:])
            weight = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
            tensors[f"{name}.weight"] = weight
            tensors[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

        def block(name: str, inside: int, outside: int) -> None:
            layer(f"{name}.in_layers.0", inside)
            layer(f"{name}.in_layers.2", outside, inside, 3, 3)
            told = outside * (2 if self.scale_shift_norm else 1)
            layer(f"{name}.emb_layers.1", told, 4 * self.channels)
            layer(f"{name}.out_layers.0", outside)
            layer(f"{name}.out_layers.3", outside, outside, 3, 3)
            if inside != outside:
                layer(f"{name}.skip_connection", outside, inside, 1, 1)

        def attention(name: str, width: int) -> None:
            layer(f"{name}.norm", width)
            layer(f"{name}.qkv", 3 * width, width, 1)
            layer(f"{name}.proj_out", width, width, 1)

        layer("time_embed.0", 4 * self.channels, self.channels)
        layer("time_embed.2", 4 * self.channels, 4 * self.channels)
        if self.num_classes is not None:
            shape = self.num_classes, 4 * self.channels
            tensors["label_emb.weight"] = torch.randn(shape, generator=generator)
        width = self.widths()[0]
        layer("input_blocks.0.0", width, 3, 3, 3)
        skips, number = [width], 1
        for level, outside in enumerate(self.widths()):
            for _ in range(self.num_res_blocks):
                block(f"input_blocks.{number}.0", width, outside)
                width = outside
                if self.attention[level]:
                    attention(f"input_blocks.{number}.1", width)
                skips.append(width)
                number += 1
            if level + 1 < len(self.channel_mult):
                if self.resblock_updown:
                    block(f"input_blocks.{number}.0", width, width)
                else:
                    layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
                skips.append(width)
                number += 1
        block("middle_block.0", width, width)
        attention("middle_block.1", width)
        block("middle_block.2", width, width)
        number = 0
        for level, outside in reversed(list(enumerate(self.widths()))):
            for i in range(self.num_res_blocks + 1):
                name = f"output_blocks.{number}"
                block(f"{name}.0", width + skips.pop(), outside)
                width = outside
                if self.attention[level]:
                    attention(f"{name}.1", width)
                behind = f"{name}.{2 if self.attention[level] else 1}"
                if level and i == self.num_res_blocks:
                    if self.resblock_updown:
                        block(behind, width, width)
                    else:
                        layer(f"{behind}.conv", width, width, 3, 3)
                number += 1
        layer("out.0", width)
        layer("out.2", 6 if self.learn_sigma else 3, width, 3, 3)
        return tensors

    def predict(
        self, tensors: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """What their network makes of x: each layer that a name stands for, in their order."""

        def both(name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{name}.weight"].to(x), tensors[f"{name}.bias"].to(x)

        def norm(name: str, h: Tensor) -> Tensor:
            return F.group_norm(h, 32, *both(name), eps=1e-5)

        def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
            weight, bias = both(name)
            return F.conv2d(h, weight, bias, stride, weight.shape[-1] // 2)

        def halved(h: Tensor) -> Tensor:
            return (h[..., ::2] + h[..., 1::2]).unflatten(2, (-1, 2)).sum(3) / 4

        def doubled(h: Tensor) -> Tensor:
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

        def block(name: str, h: Tensor, resized: Callable[[Tensor], Tensor]) -> Tensor:
            kept = resized(h)
            if f"{name}.skip_connection.bias" in tensors:
                kept = conv(f"{name}.skip_connection", kept)
            h = conv(f"{name}.in_layers.2", resized(F.silu(norm(f"{name}.in_layers.0", h))))
            told = F.linear(F.silu(embedding), *both(f"{name}.emb_layers.1"))[:, :, None, None]
            if self.scale_shift_norm:
                scale, shift = told.chunk(2, dim=1)
                h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
            else:
                h = norm(f"{name}.out_layers.0", h + told)
            return kept + conv(f"{name}.out_layers.3", F.silu(h))

        def attention(name: str, h: Tensor) -> Tensor:
            n, width = h.shape[:2]
            weight, bias = both(f"{name}.qkv")
            qkv = F.conv1d(norm(f"{name}.norm", h).flatten(2), weight, bias)
            heads = width // self.num_head_channels if self.num_head_channels else self.num_heads
            order = (3, heads) if self.new_attention_order else (heads, 3)
            qkv = qkv.reshape(n, *order, width // heads, -1)
            query, key, value = qkv.unbind(1 if self.new_attention_order else 2)
            scores = torch.einsum("nhct,nhcs->nhts", query, key) / math.sqrt(width // heads)
            seen = torch.einsum("nhts,nhcs->nhct", scores.softmax(-1), value)
            weight, bias = both(f"{name}.proj_out")
            return h + F.conv1d(seen.reshape(n, width, -1), weight, bias).reshape(h.shape)

        def run(name: str, h: Tensor) -> Tensor:
            """The parts of one of their blocks, each known by the layers it has."""
            _, _, number = name.partition("input_blocks.")
            ends_level = number and int(number) % (self.num_res_blocks + 1) == 0
            for part in range(3):
                where = f"{name}.{part}"
                if f"{where}.in_layers.0.bias" in tensors:
                    doubles = part and name.startswith("output_blocks.")
                    h = block(
                        where, h, halved if ends_level else doubled if doubles else Tensor.clone
                    )
                elif f"{where}.qkv.bias" in tensors:
                    h = attention(where, h)
                elif f"{where}.op.bias" in tensors:
                    h = conv(f"{where}.op", h, stride=2)
                elif f"{where}.conv.bias" in tensors:
                    h = conv(f"{where}.conv", doubled(h))
            return h

        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1).to(x)
        embedding = F.silu(F.linear(embedding, *both("time_embed.0")))
        embedding = F.linear(embedding, *both("time_embed.2"))
        if labels is not None:
            embedding = embedding + tensors["label_emb.weight"].to(x)[labels]
        h = conv("input_blocks.0.0", x)
        kept, number = [h], 1
        while any(name.startswith(f"input_blocks.{number}.") for name in tensors):
            h = run(f"input_blocks.{number}", h)
            kept.append(h)
            number += 1
        h = run("middle_block", h)
        for number in range(len(kept)):
            h = run(f"output_blocks.{number}", torch.cat([h, kept.pop()], dim=1))
        return conv("out.2", F.silu(norm("out.0", h)))


def written(folder: Path, network: Network) -> Path:
    path = folder / "ema_0.9999_250000.pt"
    torch.save(network.state_dict(), path)
    return path


@st.composite
def networks(draw: st.DrawFn) -> Network:
    attention = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    channels, first = draw(st.sampled_from([(32, 1), (64, 0.5), (32, 2)]))
    return Network(
        channels=channels,
        channel_mult=(first, *(first * draw(st.integers(1, 3)) for _ in attention[1:])),
        num_res_blocks=draw(st.integers(1, 2)),
        attention=tuple(attention),
        scale_shift_norm=draw(st.booleans()),
        num_classes=draw(st.sampled_from([None, 5])),
        learn_sigma=draw(st.booleans()),
        num_heads=draw(st.sampled_from([1, 4])),
        num_head_channels=draw(st.sampled_from([None, 16])),
        new_attention_order=draw(st.booleans()),
        resblock_updown=draw(st.booleans()),
    )


# Those of guided-diffusion's README, fewer and narrower levels: 64x64, 128x128 and 512x512.
GUIDED = Network(
    channel_mult=(1, 2, 3),
    num_res_blocks=2,
    attention=(False, True, True),
    num_classes=5,
    learn_sigma=True,
    resblock_updown=True,
)


@example(replace(GUIDED, num_head_channels=16, new_attention_order=True))
@example(replace(GUIDED, attention=(False, False, True)))
@example(replace(GUIDED, channels=64, channel_mult=(0.5, 1, 1), num_head_channels=16))
@given(networks())
def test_our_unet_is_the_same_network(network: Network) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, diffusion = load_openai(written(Path(folder), network), **network.flags())
    tensors = network.state_dict()
    assert not model.training and (model.num_classes, model.image_size) == (network.num_classes, 8)
    assert diffusion.variance_type == ("learned_range" if network.learn_sigma else "fixed_large")
    size = sum(tensor.numel() for tensor in tensors.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == size

    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([1, 900])
    labels = None if network.num_classes is None else torch.tensor([0, network.num_classes - 1])
    with torch.no_grad():
        wanted = network.predict(tensors, x, t, labels)
        torch.testing.assert_close(model(x, t, labels), wanted, rtol=1e-4, atol=1e-4)
        wanted = network.predict(tensors, x.double(), t, labels)
        found = model.double()(x.double(), t, labels)
        assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_processes_are_theirs(tmp_path: Path, steps: int) -> None:
    path = written(tmp_path, Network())
    scale = 1000 / steps
    linear = np.linspace(1e-4 * scale, 0.02 * scale, steps)
    abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    for noise_schedule, betas in (("linear", linear), ("cosine", cosine)):
        _, diffusion = load_openai(
            path,
            image_size=SIZE,
            diffusion_steps=steps,
            noise_schedule=noise_schedule,
            rescale_timesteps=False,
            predict_xstart=True,
            sigma_small=True,
        )
        np.testing.assert_allclose(diffusion.betas.numpy(), betas, rtol=0, atol=1e-14)
        assert (diffusion.prediction_type, diffusion.variance_type) == ("sample", "fixed_small")


def test_rescaled_timesteps(tmp_path: Path) -> None:
    network = Network()
    path, x, t = written(tmp_path, network), torch.randn(2, 3, 8, 8), torch.tensor([7, 3999])
    model, _ = load_openai(path, image_size=SIZE, diffusion_steps=4000, rescale_timesteps=True)
    with torch.no_grad():
        wanted = network.predict(network.state_dict(), x, t * 0.25)
        torch.testing.assert_close(model(x, t), wanted, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_becomes_one_of_ours(tmp_path: Path) -> None:
    network = Network(num_classes=3, learn_sigma=True)
    options = {"diffusion_steps": 50, "rescale_timesteps": True}
    model, diffusion = load_openai(written(tmp_path, network), **network.flags(), **options)
    save(tmp_path / "ours.safetensors", model, diffusion)
    ours, its_diffusion = load(tmp_path / "ours.safetensors")
    assert type(ours) is UNet and its_diffusion.config() == diffusion.config()

    def draw(model: UNet) -> Tensor:
        labels, shape = [0, 2], (2, 3, SIZE, SIZE)
        return sample(model, shape, diffusion=diffusion, num_steps=5, seed=0, class_labels=labels)

    images = draw(model)
    assert torch.equal(images, draw(ours)) and images.std() > 0.1


def test_no_guidance_without_a_null_label(tmp_path: Path) -> None:
    model, diffusion = load_openai(written(tmp_path, Network(num_classes=3)), image_size=SIZE)
    run = {"diffusion": diffusion, "num_steps": 2}
    with pytest.raises(ValueError, match="needs a model with a null label; this one has 3 classes"):
        sample(model, (1, 3, SIZE, SIZE), **run, class_labels=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels needed: this network has no null label"):
        sample(model, (1, 3, SIZE, SIZE), **run)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({name: x.half() for name, x in Network().state_dict().items()}, path)
    model, _ = load_openai(path, image_size=SIZE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_options_of_the_process(tmp_path: Path) -> None:
    path = written(tmp_path, Network())
    for options, sentence in (
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1; got 0"),
        ({"noise_schedule": "sine"}, "noise_schedule must be one of linear, cosine; got 'sine'"),
        (
            {"diffusion_steps": 4000},
            "rescale_timesteps must be given for diffusion_steps 4000: improved-diffusion's"
            " default is True, guided-diffusion's False",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            load_openai(path, image_size=SIZE, **options)
        assert str(caught.value) == sentence


Change = Callable[[dict[str, Any]], object]


def resizing_without_convolutions(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if ".op." in name or name.startswith("output_blocks.2.2.conv"):
            del tensors[name]


def with_an_attending_block_less(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if name.startswith("input_blocks.5.1."):
            del tensors[name]


def wider_at_first(tensors: dict[str, Any]) -> None:
    tensors["input_blocks.0.0.weight"] = torch.zeros(64, 3, 3, 3)


def without_decoder(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if name.startswith("output_blocks."):
            del tensors[name]


def told_a_smaller_picture(tensors: dict[str, Any]) -> None:
    tensors["input_blocks.0.0.weight"] = torch.zeros(32, 6, 3, 3)


FOREIGN = "not a U-Net of improved-diffusion or guided-diffusion: "
REFUSED: list[tuple[Change, str]] = [
    (resizing_without_convolutions, "resizes without convolutions (conv_resample False), which"),
    (told_a_smaller_picture, "an upsampler, which is told of a smaller picture, cannot be loaded"),
    (
        wider_at_first,
        "the widths of its levels, [32, 64], are not multiples of the 64 channels behind its first",
    ),
    (
        with_an_attending_block_less,
        "its levels are not of equally many residual blocks, all alike",
    ),
    (without_decoder, "its levels are not of equally many residual blocks, all alike"),
    (
        lambda x: x.update({"output_blocks.1.1.conv.weight": torch.zeros(64, 64, 3, 3)}),
        "its levels are not of equally many residual blocks, all alike",
    ),
    (lambda x: x.pop("out.2.weight"), f"{FOREIGN}out.2.weight is missing, or no weight"),
    (
        lambda x: x.update({"time_embed.0.weight": torch.zeros(3)}),
        f"{FOREIGN}time_embed.0.weight is missing, or no weight",
    ),
    (lambda x: x.pop("out.0.bias"), "not the weights of this U-Net: out.0.bias is missing"),
    (
        lambda x: x.update({"out.0.bias": torch.zeros(2)}),
        "not the weights of this U-Net: out.0.bias has shape [2], wanted [32]",
    ),
    (lambda x: x.update(more=torch.zeros(1)), "not the weights of this U-Net: it has no more"),
    (lambda x: x.update(step=3), "must hold a state_dict, tensors by name, and nothing else"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=[s[:50] for _, s in REFUSED])
def test_networks_that_are_not_ours(tmp_path: Path, change: Change, sentence: str) -> None:
    path = tmp_path / "model.pt"
    tensors = Network(num_res_blocks=2).state_dict()
    change(tensors)
    torch.save(tensors, path)
    with pytest.raises(ValueError) as caught:
        load_openai(path, image_size=SIZE)
    assert str(caught.value).startswith(f"{path}: {sentence}")


class Unpickled:
    """What a hostile file would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a file was run",)


@pytest.mark.parametrize("content", ["cut", "empty", "text", "code"])
def test_unreadable_files(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, Network())
    whole = path.read_bytes()
    code = pickle.dumps(Unpickled(), protocol=2)  # as torch.save does
    path.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"weights", "code": code}[content])
    with pytest.raises(ValueError) as caught:
        load_openai(path, image_size=SIZE)
    sentence = "truncated, or not a file of nothing but tensors, as torch.save writes it"
    assert str(caught.value) == f"{path}: {sentence}"


def test_absent_file_and_impossible_options(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.pt: no such file$"):
        load_openai(tmp_path / "model.pt", image_size=SIZE)
    path = written(tmp_path, replace(Network(), channel_mult=(1, 3)))
    for options, sentence in (
        ({"num_heads": 5}, "UNet: num_heads must divide the channels of each level; got 5"),
        (
            {"num_head_channels": 64},
            "UNet: num_head_channels must divide the channels of each level; got 64",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            load_openai(path, image_size=SIZE, **options)
        assert str(caught.value) == f"{path}: describes a U-Net that cannot be built: {sentence}"

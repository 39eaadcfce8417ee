"""The two networks: shapes, sizes, conventions."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
import torch.fx
from torch import nn

from ddpm_fast.models import LightweightUNet, UNet
from ddpm_fast.models.unet import timestep_embedding

SMALL: dict[str, Any] = {
    "image_size": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "attention_resolutions": (4,),
}


def small_unet(**options: Any) -> UNet:
    """A little network whose zero-initialised layers are not zero, so that every path counts."""
    torch.manual_seed(0)
    model = UNet(**{**SMALL, **options})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_lightweight_is_three_plain_convolutions() -> None:
    model = LightweightUNet()
    plain = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 64, 3, padding=1),
            "conv2": nn.Conv2d(64, 64, 3, padding=1),
            "conv3": nn.Conv2d(64, 3, 3, padding=1),
        }
    )
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 7, 5)
    wanted = plain["conv3"](plain["conv2"](plain["conv1"](x).relu()).relu())
    torch.testing.assert_close(model(x, torch.tensor([1, 2])), wanted, rtol=0, atol=0)


def test_lightweight_ignores_the_timestep() -> None:
    model = LightweightUNet(in_channels=1, hidden_channels=4, out_channels=1)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(model(x, torch.tensor([0, 1])), model(x, torch.tensor([999, 5])))


def test_cifar10_has_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        assert count(UNet.cifar10()) == 35_746_307


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_channels": 1, "out_channels": 2, "image_size": 7, "channel_mult": (1, 2, 3)},
        {"model_channels": 12, "channel_mult": (2,), "attention_resolutions": ()},
        {
            "model_channels": 48,
            "num_res_blocks": 1,
            "attention_resolutions": (8, 4),
            "num_heads": 4,
        },
        {"num_res_blocks": 3, "num_classes": 2, "dropout": 0.5},
        {"attention_resolutions": (8, 4), "num_head_channels": 4, "scale_shift_norm": True},
        {"image_size": 7, "norm_groups": 2, "conventions": "openai", "timestep_scale": 0.25},
        {"image_size": 7, "attention_resolutions": (7, 3), "resblock_updown": True},
        {"time_channels": 20, "num_classes": 2, "resblock_updown": True, "dropout": 0.5},
    ],
    ids=str,
)
def test_unet_rebuilds_from_its_config_and_keeps_the_size(options: dict[str, Any]) -> None:
    options = {**SMALL, "attention_resolutions": (), **options}
    model = UNet(**options)
    config = json.loads(json.dumps(model.config()))
    rebuilt = UNet(**config)
    rebuilt.load_state_dict(model.state_dict())
    size = model.image_size
    x = torch.randn(3, model.in_channels, size, size)
    assert rebuilt(x, torch.tensor([0, 500, 999])).shape == (3, model.out_channels, size, size)
    assert rebuilt.config() == model.config()


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (5, 31), (2, 2)])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_unet_takes_other_sizes_than_its_own(size: tuple[int, int], resblock_updown: bool) -> None:
    model = small_unet(resblock_updown=resblock_updown)
    assert model(torch.randn(2, 3, *size), torch.tensor([1, 2])).shape == (2, 3, *size)


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_new_unet_predicts_zero(resblock_updown: bool) -> None:
    assert not UNet(**SMALL, resblock_updown=resblock_updown)(
        torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    ).any()


def test_unet_treats_samples_independently() -> None:
    model, x, t = small_unet(), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(model(x, t)[2:3], model(x[2:3], t[2:3]))


def test_time_embedding_is_the_papers() -> None:
    t, dim = 37, 8
    frequencies = [10000 ** (-i / 3) for i in range(4)]
    wanted = [math.sin(t * w) for w in frequencies] + [math.cos(t * w) for w in frequencies]
    found = timestep_embedding(torch.tensor([t]), dim)
    torch.testing.assert_close(found, torch.tensor([wanted]), rtol=0, atol=1e-5)


def test_output_depends_on_time_and_class() -> None:
    model, x = small_unet(num_classes=3), torch.randn(1, 3, 8, 8)
    t, labels = torch.tensor([5]), torch.tensor([1])
    out = model(x, t, class_labels=labels)
    assert not torch.allclose(out, model(x, t + 500, class_labels=labels))
    assert not torch.allclose(out, model(x, t, class_labels=labels + 1))


def test_no_label_is_the_null_label() -> None:
    model, x = small_unet(num_classes=3), torch.randn(2, 3, 8, 8)
    t = torch.tensor([5, 6])
    assert torch.equal(model(x, t), model(x, t, class_labels=torch.tensor([3, 3])))


def test_options_for_other_codes_weights_are_in_the_config_where_they_are_used() -> None:
    keys = UNet(**SMALL).config().keys()
    assert list(keys) == [
        "in_channels",
        "out_channels",
        "image_size",
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "attention_resolutions",
        "num_heads",
        "dropout",
        "num_classes",
    ]
    config = UNet(**SMALL, num_classes=3, null_label=False, conventions="openai").config()
    assert config.keys() - keys == {"null_label", "conventions"}


def test_openais_time_embedding() -> None:
    t, dim = 37, 8
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    wanted = [math.cos(t * w) for w in frequencies] + [math.sin(t * w) for w in frequencies]
    found = timestep_embedding(torch.tensor([t]), dim, "openai")
    torch.testing.assert_close(found, torch.tensor([wanted]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("model", [small_unet(), LightweightUNet()], ids=["unet", "lightweight"])
def test_pictures_of_another_shape(model: nn.Module, shape: tuple[int, ...]) -> None:
    sentence = rf"UNet: x must have shape \[N, 3, H, W\]; got {re.escape(str(list(shape)))}$"
    with pytest.raises(ValueError, match=sentence):
        model(torch.randn(shape), torch.ones(2))


def test_a_traced_network_asks_for_the_same_shape() -> None:
    traced = torch.fx.symbolic_trace(LightweightUNet())
    assert traced(torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="LightweightUNet: x must have shape"):
        traced(torch.randn(2, 1, 8, 8))


def test_no_null_label() -> None:
    model, x, t = (
        small_unet(num_classes=3, null_label=False),
        torch.randn(1, 3, 8, 8),
        torch.ones(1),
    )
    assert model.class_embedding is not None and model.class_embedding.num_embeddings == 3
    with pytest.raises(ValueError, match="class_labels needed: this network has no null label"):
        model(x, t)


def test_labels_for_a_network_without_classes() -> None:
    with pytest.raises(ValueError, match="this network has no classes"):
        small_unet()(torch.randn(1, 3, 8, 8), torch.tensor([1]), class_labels=torch.tensor([0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_unet_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    model, x, t = small_unet(num_classes=2), torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    labels = torch.tensor([0, 1])
    wanted = model(x, t, class_labels=labels)
    found = model.to(dtype)(x.to(dtype), t, class_labels=labels)
    assert found.dtype == dtype
    assert (found.float() - wanted).norm() <= tolerance * wanted.norm()


def test_unet_in_channels_last() -> None:
    model, x, t = small_unet(), torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    wanted = model(x, t)
    model = model.to(memory_format=torch.channels_last)
    found = model(x.to(memory_format=torch.channels_last), t)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_unet_compiles_to_one_graph(resblock_updown: bool) -> None:
    model = small_unet(num_classes=2, resblock_updown=resblock_updown)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), model(x, t))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_channels": 7}, "UNet: model_channels must be even and at least 4; got 7"),
        ({"time_channels": 2}, "UNet: time_channels must be even and at least 4; got 2"),
        ({"channel_mult": ()}, "UNet: channel_mult must be positive numbers; got []"),
        (
            {"image_size": 2, "channel_mult": (1, 2, 2)},
            "UNet: image_size 2 cannot be halved 2 times (channel_mult has 3 levels)",
        ),
        (
            {"attention_resolutions": (16,)},
            "UNet: attention_resolutions must be among the sizes of the levels, [8, 4]; got [16]",
        ),
        ({"num_heads": 3}, "UNet: num_heads must divide the channels of each level; got 3"),
        (
            {"num_head_channels": 16},
            "UNet: num_head_channels must divide the channels of each level; got 16",
        ),
        ({"norm_groups": 0}, "UNet: norm_groups must divide the channels of each level; got 0"),
        (
            {"conventions": "mine"},
            "UNet: conventions must be one of ddpm, openai; got 'mine'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_configurations(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        UNet(**{**SMALL, **options})
    assert str(caught.value) == sentence

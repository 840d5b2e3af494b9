"""The encoder wrapper: preprocessing, pooling of a backbone's output, and the probe of its shapes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tiny import TinyEncoder
from zepad.encoders import Encoder, Preprocessing, SmallResNet, probe
from zepad.errors import ConfigError, InputError


class Returns(nn.Module):
    """A backbone that is one function of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Seen(nn.Module):
    """A backbone that keeps what the wrapper hands to it."""

    def forward(self, x: Tensor) -> Tensor:
        self.images = x
        return x.flatten(1)


def prepared(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    backbone = Seen()
    Encoder(backbone, preprocessing=preprocessing)(images)
    return backbone.images


# output ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1, 1), (4, 5, 3, 2)])
def test_features_and_feature_maps_become_vectors(shape: tuple[int, ...]) -> None:
    output = torch.rand(shape)
    features = Encoder(Returns(lambda _: output))(torch.rand(4, 3, 8, 8))
    expected = torch.tensor([[output[n, d].mean().item() for d in range(5)] for n in range(4)])
    torch.testing.assert_close(features, expected)


def test_pooling_picks_the_first_token_or_averages_them() -> None:
    tokens, images = torch.rand(4, 7, 5), torch.rand(4, 3, 8, 8)
    backbone = Returns(lambda _: tokens)
    assert torch.equal(Encoder(backbone, pooling="class_token")(images), tokens[:, 0])
    torch.testing.assert_close(Encoder(backbone, pooling="mean")(images), tokens.sum(1) / 7)


def test_pooling_leaves_outputs_without_tokens_alone() -> None:
    maps = torch.rand(4, 5, 3, 3)
    features = [Encoder(Returns(lambda _: maps), pooling=p)(torch.rand(4, 3, 8, 8)) for p in ("class_token", None)]
    assert torch.equal(*features)


def test_tokens_without_pooling_are_refused_with_both_remedies() -> None:
    with pytest.raises(InputError, match=r"tokens of shape \(4, 7, 5\).*pooling=\"class_token\".*pooling=\"mean\""):
        Encoder(Returns(lambda _: torch.rand(4, 7, 5)))(torch.rand(4, 3, 8, 8))


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pooling must be .*got 'max'"):
        Encoder(nn.Identity(), pooling="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("output", [(torch.rand(4, 5),), {"x": torch.rand(4, 5)}, [torch.rand(4, 5)], None])
def test_output_that_is_no_tensor_is_refused_by_its_type(output: object) -> None:
    with pytest.raises(InputError, match=f"Returns returned {type(output).__name__}. Wrap it in a module"):
        Encoder(Returns(lambda _: output))(torch.rand(4, 3, 8, 8))


@pytest.mark.parametrize(
    "output",
    [torch.rand(3, 5), torch.rand(()), torch.rand(4), torch.rand(4, 2, 2, 2, 2), torch.ones(4, 5, dtype=torch.int64)],
    ids=["batch of 3", "0-d", "1-d", "5-d", "integers"],
)
def test_output_that_is_no_feature_tensor_is_refused_with_its_shape(output: Tensor) -> None:
    with pytest.raises(InputError, match="must map 4 images to floating-point features of shape") as error:
        Encoder(Returns(lambda _: output))(torch.rand(4, 3, 8, 8))
    assert f"{output.dtype} of shape {tuple(output.shape)}" in str(error.value)


# pixels ---------------------------------------------------------------------------------------------------------


def test_default_preprocessing_hands_pixels_through() -> None:
    images = torch.rand(2, 3, 9, 7)
    assert torch.equal(prepared(images, Preprocessing()), images)


def test_normalisation_is_per_channel() -> None:
    images = torch.rand(2, 3, 4, 5)
    result = prepared(images, Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)))
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
        torch.testing.assert_close(result[:, channel], (images[:, channel] - mean) / std)


def _kernel(mode: str, x: Tensor) -> Tensor:
    x = x.abs()
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    # Keys' cubic with a = -1/2, which antialiasing resamplers use.
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _resampling(mode: str, size_in: int, size_out: int) -> Tensor:
    """The matrix of a one-dimensional resize, written from its definition."""
    ratio = size_in / size_out
    centres, pixels = (torch.arange(size_out).double() + 0.5) * ratio, torch.arange(size_in).double() + 0.5
    if mode == "nearest":
        return F.one_hot((torch.arange(size_out) * ratio).long(), size_in).double()
    weights = _kernel(mode, (pixels - centres[:, None]) / max(ratio, 1.0))
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(24, 20), (4, 5), (6, 18)], ids=["larger", "smaller", "mixed"])
def test_resize_equals_its_definition(mode: Any, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 12, 10, dtype=torch.float64)
    rows, columns = _resampling(mode, 12, size[0]), _resampling(mode, 10, size[1])
    naive = (rows @ images @ columns.T).clamp(0, 1)
    torch.testing.assert_close(prepared(images, Preprocessing(size=size, interpolation=mode)), naive)


def test_resize_comes_before_normalisation() -> None:
    images = torch.rand(2, 3, 12, 12)
    both = prepared(images, Preprocessing.imagenet(size=(8, 8)))
    resized = prepared(images, Preprocessing(size=(8, 8)))
    assert torch.equal(both, prepared(resized, Preprocessing.imagenet()))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_images_of_the_right_size_are_not_resampled(mode: Any) -> None:
    images = torch.rand(2, 3, 16, 12)
    images[0, 0, 0, 0] = 1 + 5e-7  # rounding that a resize would clamp away
    assert torch.equal(prepared(images, Preprocessing(size=(16, 12), interpolation=mode)), images)


def test_bicubic_stays_in_the_unit_interval() -> None:
    board = (torch.arange(8)[:, None] + torch.arange(8) >= 8).float().expand(1, 3, 8, 8)
    raw = F.interpolate(board, (24, 24), mode="bicubic", align_corners=False, antialias=True)
    assert raw.min() < -0.01, "an edge this sharp overshoots, or the test shows nothing"
    assert raw.max() > 1.01
    resized = prepared(board, Preprocessing(size=(24, 24), interpolation="bicubic"))
    assert resized.min() == 0
    assert resized.max() == 1


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_can_be_resized(mode: Any, dtype: torch.dtype) -> None:
    # torch has no antialiased resize for these types on the CPU.
    images = torch.rand(2, 3, 12, 12).to(dtype)
    encoder = Encoder(nn.Conv2d(3, 4, 1).to(dtype), preprocessing=Preprocessing(size=(8, 8), interpolation=mode))
    single = copy.deepcopy(encoder).float()
    torch.testing.assert_close(encoder(images).float(), single(images.float()), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradient_reaches_the_raw_pixels(mode: Any) -> None:
    # Attacks differentiate through the preprocessing; finite differences are the judge.
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus()).double()
    encoder = Encoder(backbone, preprocessing=Preprocessing.imagenet(size=(6, 6), interpolation=mode)).double()
    images = (0.3 + 0.4 * torch.rand(1, 3, 5, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(encoder, images)


def test_preprocessing_is_no_part_of_the_weights() -> None:
    assert Encoder(TinyEncoder(), preprocessing=Preprocessing.imagenet()).state_dict().keys() == {
        f"backbone.{key}" for key in TinyEncoder().state_dict()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_normalisation_follows_the_backbone_to_another_precision(dtype: torch.dtype) -> None:
    # A backbone that comes in half precision must not be fed the float32 that mean and std would promote to.
    encoder = Encoder(TinyEncoder().to(dtype).eval(), preprocessing=Preprocessing.imagenet())
    assert encoder(torch.rand(2, 3, 16, 16, dtype=dtype)).dtype == dtype
    assert probe(encoder) == (3, 8)


def test_normalisation_lives_where_the_backbone_lives() -> None:
    # The meta device stands for any that is not the CPU.
    encoder = Encoder(TinyEncoder().to("meta"), preprocessing=Preprocessing.imagenet())
    assert encoder(torch.rand(2, 3, 16, 16, device="meta")).device.type == "meta"


def test_repr_tells_source_and_preprocessing() -> None:
    text = repr(Encoder(TinyEncoder(), preprocessing=Preprocessing(size=(8, 8)), pooling="mean"))
    assert "'custom'" in text
    assert "size=(8, 8)" in text
    assert "pooling='mean'" in text


def test_small_resnet_multiplies_its_width_by_eight() -> None:
    assert probe(Encoder(SmallResNet(width=2))) == (3, 16)


# the setting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"mean": (0.5,)}, "mean and std"),
        ({"std": (0.5,)}, "mean and std"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "mean and std"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "mean"),
        ({"mean": ("a",), "std": (1.0,)}, "mean"),
        ({"mean": (True,), "std": (1.0,)}, "mean"),
        ({"mean": (10**400,), "std": (1.0,)}, "mean"),
        ({"mean": 0.5, "std": 0.5}, "mean"),
        ({"mean": (), "std": ()}, "mean"),
        ({"mean": (0.5,), "std": (0.0,)}, "std"),
        ({"mean": (0.5,), "std": (-1.0,)}, "std"),
        ({"mean": (0.5,), "std": (float("inf"),)}, "std"),
        ({"size": 224}, "size"),
        ({"size": (224,)}, "size"),
        ({"size": (0, 8)}, "size"),
        ({"size": (8.0, 8.0)}, "size"),
        ({"size": (True, True)}, "size"),
        ({"interpolation": "lanczos"}, "interpolation"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}.* must be"):
        Preprocessing(**fields)


_finite = st.floats(-100, 100)
_settings = st.builds(
    lambda channels, size, mode: Preprocessing(
        mean=None if channels is None else tuple(m for m, _ in channels),
        std=None if channels is None else tuple(s for _, s in channels),
        size=size,
        interpolation=mode,
    ),
    st.none() | st.lists(st.tuples(_finite, st.floats(1e-6, 100)), min_size=1, max_size=4),
    st.none() | st.tuples(st.integers(1, 2048), st.integers(1, 2048)),
    st.sampled_from(["nearest", "bilinear", "bicubic"]),
)


@given(_settings)
def test_a_setting_survives_json(setting: Preprocessing) -> None:
    restored = Preprocessing.from_dict(json.loads(json.dumps(setting.to_dict())))
    assert restored == setting
    assert hash(restored) == hash(setting), "JSON lists must become tuples"


def test_imagenet_takes_other_fields_along() -> None:
    setting = Preprocessing.imagenet(size=(8, 8), interpolation="bicubic")
    assert (setting.size, setting.interpolation, setting.std) == ((8, 8), "bicubic", (0.229, 0.224, 0.225))


# the probe ------------------------------------------------------------------------------------------------------


def test_probe_leaves_weights_buffers_flags_and_the_generator_as_found() -> None:
    encoder = Encoder(nn.Sequential(nn.BatchNorm2d(3), TinyEncoder(), nn.Dropout(0.5)))
    encoder.train()
    encoder.backbone[1].eval()  # type: ignore[index]
    before = copy.deepcopy(encoder.state_dict())
    flags = [part.training for part in encoder.modules()]
    state = torch.get_rng_state()
    assert probe(encoder) == (3, 8)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert encoder.state_dict()["backbone.0.num_batches_tracked"] == 0
    assert [part.training for part in encoder.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("backbone", "preprocessing", "found"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), None, (3, 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), None, (3, 2)),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 7, 5)), Preprocessing(size=(6, 7)), (3, 5)),
        (nn.Conv2d(1, 6, 3), None, (1, 6)),
        (nn.Conv2d(1, 6, 3), Preprocessing(mean=(0.5,), std=(0.5,)), (1, 6)),
        (nn.Conv2d(5, 6, 3), Preprocessing(mean=(0.5,) * 5, std=(0.5,) * 5), (5, 6)),
    ],
    ids=["flat 32", "flat 64", "flat stated", "grey", "grey normalised", "five channels"],
)
def test_probe_finds_channels_and_features(
    backbone: nn.Module, preprocessing: Preprocessing | None, found: tuple[int, int]
) -> None:
    assert probe(Encoder(backbone, preprocessing=preprocessing)) == found


def test_probe_of_an_impossible_encoder_says_what_was_tried_and_what_to_do() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(InputError) as error:
        probe(Encoder(backbone))
    for part in (
        "Sequential",
        "32x32, 64x64, 224x224",
        "3 or 1 channels",
        "3072",
        "Preprocessing(size=(height, width))",
    ):
        assert part in str(error.value)
    with pytest.raises(InputError, match="no image of 9x9 with 3 channels"):
        probe(Encoder(backbone, preprocessing=Preprocessing.imagenet(size=(9, 9))))


def test_probe_reports_a_bad_output_as_the_output_not_as_the_size() -> None:
    with pytest.raises(InputError, match="returns tokens of shape") as error:
        probe(Encoder(Returns(lambda x: x.flatten(2))))
    assert "State its input size" not in str(error.value)

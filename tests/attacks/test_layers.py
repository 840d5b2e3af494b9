"""Layers by name and by stage, on common architectures."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from tiny import TinyEncoder
from zepad import Encoder
from zepad.attacks.layers import STAGES, capture_layers, find_layer, stage_layers
from zepad.encoders import SmallResNet
from zepad.errors import InputError


class CifarResNet(nn.Module):
    """Laid out like the public CIFAR ResNets: three numbered stages, functional activations."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        for stage in (1, 2, 3):
            setattr(self, f"layer{stage}", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))

    def forward(self, x):
        return self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3))


def vit_torchvision():
    return torchvision.models.VisionTransformer(16, 8, num_layers=4, num_heads=2, hidden_dim=8, mlp_dim=8)


def vit_timm(depth=8):
    return timm.models.VisionTransformer(img_size=16, patch_size=8, depth=depth, num_heads=2, embed_dim=8)


RESNET = ("bn1", "layer1", "layer2", "layer3", "layer4")
TORCHVISION_VIT = ("conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(4)))
ARCHITECTURES = {
    "torchvision": (torchvision.models.resnet18, RESNET),
    "timm": (lambda: timm.create_model("resnet18"), RESNET),
    "packaged": (SmallResNet, ("bn1", "stages.0", "stages.1", "stages.2", "stages.3")),
    "cifar": (CifarResNet, ("bn1", "layer1", "layer2", "layer3", "layer3")),
    "torchvision ViT": (vit_torchvision, TORCHVISION_VIT),
    "timm ViT": (vit_timm, ("patch_embed", "blocks.1", "blocks.3", "blocks.5", "blocks.7")),
    "timm ViT of six": (lambda: vit_timm(6), ("patch_embed", "blocks.1", "blocks.2", "blocks.4", "blocks.5")),
    "plain": (TinyEncoder, ("conv", "conv", "norm", "conv2", "conv2")),
    "sequence": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), ("1",) * 5),
}


@pytest.mark.parametrize(("build", "expected"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
@pytest.mark.parametrize("prefix", ["", *(pytest.param(p, marks=pytest.mark.slow) for p in ("backbone.", "1."))])
def test_stages_are_found_also_inside_wrappers(build, expected, prefix):
    with torch.device("meta"):
        model = build()
    wrapped = {"": lambda: model, "backbone.": lambda: Encoder(model), "1.": lambda: nn.Sequential(nn.ReLU(), model)}
    found = stage_layers(wrapped[prefix]())
    assert found == dict(zip(STAGES, (prefix + name for name in expected), strict=True))


def test_layers_are_found_by_full_name_by_name_inside_the_wrapper_and_by_stage():
    encoder = Encoder(SmallResNet(width=4))
    assert find_layer(encoder, "backbone.stages.1.conv2") == "backbone.stages.1.conv2"
    assert find_layer(encoder, "stages.1.conv2") == "backbone.stages.1.conv2"
    assert find_layer(encoder, "stage2") == "backbone.stages.1"
    assert find_layer(nn.ModuleDict({"stage2": nn.ReLU(), "x": nn.Linear(2, 2)}), "stage2") == "stage2"


def test_a_head_beside_the_encoder_does_not_hide_its_stages():
    assert stage_layers(nn.Sequential(SmallResNet(width=4), nn.Linear(32, 2)))["stage1"] == "0.stages.0"


def test_a_layer_that_does_not_exist_is_refused_with_a_bounded_list_of_those_that_do():
    with pytest.raises(
        InputError, match=r"SmallResNet has no layer 'layer9'.* stem, stage1.* conv1, bn1.* and \d+ more"
    ):
        find_layer(SmallResNet(), "layer9")
    with torch.device("meta"), pytest.raises(InputError) as caught:
        find_layer(torchvision.models.resnet152(), "nowhere")
    assert len(str(caught.value)) < 600
    with pytest.raises(InputError, match="no layer ''"):
        find_layer(SmallResNet(), "")


@pytest.mark.parametrize("ask", [stage_layers, lambda model: find_layer(model, "stem")])
def test_a_plain_callable_has_no_layers(ask):
    with pytest.raises(InputError, match=r"needs a torch\.nn\.Module whose layers it can read; got function"):
        ask(lambda images: images.mean((2, 3)))


def test_a_module_without_parameters_has_no_stages():
    with pytest.raises(InputError, match="Flatten has no part with parameters"):
        stage_layers(nn.Flatten())


def test_captured_outputs_are_those_of_the_layers(tiny):
    images = torch.rand(2, 3, 8, 8)
    tiny.eval()
    with capture_layers(tiny, ["norm", "stem", "norm"]) as read:
        norm, stem, again = read(images)
    torch.testing.assert_close(stem, tiny.conv(images))
    torch.testing.assert_close(norm, tiny.norm(tiny.conv(images)))
    assert torch.equal(norm, again)


def test_an_in_place_activation_behind_the_layer_does_not_reach_into_what_was_captured():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    with capture_layers(model, ["0"]) as read:
        (output,) = read(images)
    torch.testing.assert_close(output, model[0](images))
    assert (output < 0).any()
    assert torch.autograd.grad(output.sum(), images)[0].any()


def hooks(model):
    return sum(len(part._forward_hooks) for part in model.modules())


def test_hooks_are_removed_also_after_an_error(tiny):
    with capture_layers(tiny, ["stem", "stage2"]):
        assert hooks(tiny) == 2
    assert hooks(tiny) == 0
    with pytest.raises(RuntimeError, match="boom"), capture_layers(tiny, ["stem"]):
        raise RuntimeError("boom")
    with pytest.raises(InputError), capture_layers(tiny, ["stem", "nowhere"]):
        pass
    assert hooks(tiny) == 0


def test_a_layer_that_does_not_run_or_returns_no_tensor_is_refused(tiny):
    tiny.unused = nn.Linear(2, 2)
    with capture_layers(tiny, ["unused"]) as read, pytest.raises(InputError, match="layer unused .* did not run"):
        read(torch.rand(2, 3, 8, 8))
    pair = nn.Sequential(nn.MaxPool2d(2, return_indices=True))
    with capture_layers(pair, ["0"]) as read, pytest.raises(InputError, match="returned tuple"):
        read(torch.rand(2, 3, 8, 8))

"""An encoder that is given the very images again answers from memory, and never wrongly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zepad.attacks import DetectorEvading
from zepad.encoders import Encoder
from zepad.encoders.once import passing_once
from zepad.ensemble import BranchEnsemble
from zepad.evaluation.predictions import predict
from zepad.modules import Branch

CLASSES = 3


class Counting(nn.Module):
    """Maps images to features and counts how often it is asked."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)))
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        return images.flatten(1) @ self.weight


def ensemble(kind=BranchEnsemble):
    torch.manual_seed(0)
    branches = {
        name: Branch(Encoder(Counting(seed)), nn.Linear(4, CLASSES)).eval()
        for seed, name in enumerate(("victim", "auxiliary", "benign"))
    }
    return kind(branches, threshold=0.1)


def passes(model):
    return [branch.encoder.backbone.passes for branch in model.branches.values()]


IMAGES = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def test_decisions_and_scores_take_one_pass_through_every_encoder():
    model = ensemble()
    predicted = predict(model, IMAGES)
    assert passes(model) == [1, 1, 1]
    with torch.no_grad():
        assert torch.equal(predicted.scores, model.score(IMAGES))
        assert torch.equal(predicted.fused, model(IMAGES).argmax(1))


def test_an_overridden_score_is_heard():
    class Upside(BranchEnsemble):
        def score(self, images):
            return 1 - super().score(images)

    torch.testing.assert_close(predict(ensemble(Upside), IMAGES).scores, 1 - predict(ensemble(), IMAGES).scores)


def test_evading_a_detector_takes_half_the_passes_and_finds_the_same():
    class Copying(BranchEnsemble):
        """Gives its detector images of its own, so that no encoder is given a tensor twice."""

        def score(self, images):
            return super().score(images.clone())

    models = ensemble(), ensemble(Copying)
    labels = torch.arange(5) % CLASSES
    attacked = []
    for model in models:
        attack = DetectorEvading(eps=8 / 255, steps=4, score=model.score, threshold=-1.0)  # no score is as low
        attacked.append(attack(model, IMAGES, labels, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*attacked)
    once, twice = (passes(model) for model in models)
    assert [2 * count for count in once] == twice
    assert min(once) > 4


HOW = ("the same", "a copy", "written to", "features written to", "without gradients", "with a gradient of its own")


@given(st.lists(st.sampled_from(HOW), max_size=6))
def test_answers_inside_are_those_outside(asked):
    inside, outside = (Encoder(Counting(0)) for _ in range(2))
    images = IMAGES.clone()
    with passing_once(inside):
        for how in asked:
            with torch.no_grad():
                match how:
                    case "a copy":
                        images = images.clone()
                    case "written to":
                        images.mul_(0.5)
                    case "features written to":
                        with torch.enable_grad():
                            inside(images).detach().zero_()
                    case "without gradients":
                        inside(images)
                    case "with a gradient of its own":
                        images.requires_grad_()
            answer, expected = inside(images), outside(images)
            assert torch.equal(answer, expected)
            assert slopes(answer, inside, images) == slopes(expected, outside, images)


def slopes(features, encoder, images):
    inputs = [encoder.backbone.weight, images] if images.requires_grad else [encoder.backbone.weight]
    return [slope.tolist() for slope in torch.autograd.grad(features.sum(), inputs, retain_graph=True)]


def test_images_in_inference_mode_are_asked_again():
    encoder = Encoder(Counting(0))
    with torch.inference_mode(), passing_once(encoder):
        images = IMAGES.clone()
        assert torch.equal(encoder(images), encoder(images))
    assert encoder.backbone.passes == 2


@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_is_as_before_after_an_error_too(nested):
    encoder = Encoder(Counting(0))
    with pytest.raises(ZeroDivisionError), passing_once(encoder):
        if nested:
            with passing_once(encoder):
                encoder(IMAGES)
        raise ZeroDivisionError
    assert "forward" not in encoder.__dict__
    encoder(IMAGES), encoder(IMAGES)
    assert encoder.backbone.passes == 2 + nested


def test_an_encoder_keeps_a_forward_that_somebody_gave_it():
    encoder = Encoder(Counting(0))
    encoder.forward = lambda images: images.flatten(1)
    with passing_once(nn.Sequential(encoder)):
        assert encoder(IMAGES) is encoder(IMAGES)
    assert torch.equal(encoder(IMAGES), IMAGES.flatten(1))
    assert encoder(IMAGES) is not encoder(IMAGES)


def test_a_compiled_module_stays_compiled_in_one_piece():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(Encoder(nn.Flatten()), nn.Linear(12, CLASSES))
    model.compile(backend=backend)
    model(IMAGES)
    with passing_once(model):
        torch.testing.assert_close(model(IMAGES), model[1](IMAGES.flatten(1)))
    assert len(graphs) == 1


def test_a_plain_function_is_left_alone():
    with passing_once(torch.sigmoid):
        pass

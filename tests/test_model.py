"""The facade: order of calls, decisions, and the three lines of the README on real architectures."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zepad
from tiny import TinyEncoder, toy_data
from zepad import (
    BenignConfig,
    ConfigError,
    Encoder,
    HardenConfig,
    HeadConfig,
    InputError,
    Preprocessing,
    StageError,
    ZePAD,
)
from zepad.errors import InputWarning
from zepad.functional import detection_score
from zepad.fusion import Mean, fuse_logits, fusion_weights

QUICK = {
    "harden": HardenConfig(epochs=1, steps=1),
    "benign": BenignConfig(epochs=1),
    "heads": HeadConfig(epochs=1),
}


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def timm_resnet() -> nn.Module:
    import timm

    return timm.create_model("test_resnet", pretrained=False)


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("test_vit", pretrained=False)


def torchvision_resnet() -> nn.Module:
    from torchvision.models import resnet18

    model = resnet18()
    model.fc = nn.Identity()
    return Encoder(model, preprocessing=Preprocessing.imagenet(size=(32, 32)))


@pytest.mark.parametrize(
    "make",
    [plain, timm_vit, *(pytest.param(make, marks=pytest.mark.slow) for make in (timm_resnet, torchvision_resnet))],
    ids=lambda make: make.__name__,
)
def test_the_three_lines_of_the_readme(make, tmp_path) -> None:
    images, labels = toy_data(12)
    loader = DataLoader(TensorDataset(images, labels), batch_size=6)
    victim, auxiliary = make(), make()

    defense = ZePAD.from_encoders(victim, auxiliary)
    defense.harden(loader, QUICK["harden"], progress=False).fit_benign(
        loader, QUICK["benign"], head_config=QUICK["heads"], progress=False
    )
    labels, flagged = defense.predict(images), defense.detect(images)

    assert labels.shape == flagged.shape == (12,)
    assert labels.dtype == torch.int64
    assert flagged.dtype == torch.bool
    assert int(labels.max()) < 3
    gradient_in = images.clone().requires_grad_()
    defense(gradient_in).sum().backward()
    assert gradient_in.grad.abs().sum() > 0  # the honest attack surface: differentiable through every wrapper
    defense.save_pretrained(tmp_path)
    again = ZePAD.from_pretrained(tmp_path, victim=victim, auxiliary=auxiliary)
    assert torch.equal(again.predict_proba(images), defense.predict_proba(images))


def test_calls_out_of_order_name_the_call_to_make(loader: DataLoader) -> None:
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    images = toy_data(4)[0]
    with pytest.raises(StageError, match=r"needs hardened encoders. Call harden\(loader\) first"):
        defense.fit_benign(loader)
    for call in (defense.predict, defense.detect, defense.inspect, defense.forward, defense.calibrate):
        with pytest.raises(StageError, match=r"this one is built. Call harden\(loader\) first"):
            call(images)
    defense.harden(loader, QUICK["harden"], progress=False)
    with pytest.raises(StageError, match=r"this one is hardened. Call fit_benign\(loader\) first"):
        defense.predict(images)
    with pytest.raises(StageError, match=r"Call fit_benign\(loader\) first"):
        defense.fit_heads(loader)
    with pytest.raises(StageError, match=r"the benign branch has no head yet. Call fit_benign\(loader\) first"):
        defense.branch("benign")
    assert defense.branch("victim")(images).shape == (4, 3)


def test_forward_is_the_fusion_of_the_branches(fitted: ZePAD) -> None:
    images = toy_data(7, seed=2)[0]
    stacked = torch.stack([fitted.branch(role)(images) for role in ("victim", "auxiliary", "benign")])
    assert torch.equal(fitted.branch_logits(images), stacked)
    torch.testing.assert_close(fitted(images), fuse_logits(stacked))
    torch.testing.assert_close(fitted.predict_proba(images), fuse_logits(stacked).softmax(1))
    assert torch.equal(fitted.predict(images), fuse_logits(stacked).argmax(1))
    torch.testing.assert_close(fitted.detection_score(images), detection_score(stacked))


def test_predictions_do_not_depend_on_batch_or_source(fitted: ZePAD) -> None:
    images, labels = toy_data(30, seed=2)
    whole = fitted.predict_proba(images)
    singles = torch.cat([fitted.predict_proba(image[None]) for image in images])
    torch.testing.assert_close(whole, singles)
    batches = list(images.split(7))
    torch.testing.assert_close(whole, fitted.predict_proba(batches))
    torch.testing.assert_close(whole, fitted.predict_proba(list(zip(batches, labels.split(7), strict=True))))


def test_deciding_restores_the_training_flags_and_dropout_never_decides(fitted: ZePAD) -> None:
    images = toy_data(8)[0]
    expected = fitted.predict_proba(images)
    fitted.train()
    flags = {name: part.training for name, part in fitted.named_modules()}
    assert flags["branches.victim.head"]
    assert not flags["branches.victim.encoder"]  # encoders stay frozen whatever train() says
    assert torch.equal(fitted.predict_proba(images), expected)
    assert {name: part.training for name, part in fitted.named_modules()} == flags


def test_gradients_reach_the_image_through_every_branch(fitted: ZePAD) -> None:
    images = toy_data(4)[0].requires_grad_()
    logits = fitted.branch_logits(images)
    for branch in logits:
        (gradient,) = torch.autograd.grad(branch.square().sum(), images, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_inspect_reports_what_the_branches_do(fitted: ZePAD) -> None:
    images = toy_data(5, seed=6)[0]
    report = fitted.inspect(images)
    logits = fitted.branch_logits(images)
    assert torch.equal(report.labels, fitted.predict(images))
    assert torch.equal(report.branch_labels, logits.argmax(-1))
    torch.testing.assert_close(report.weights, fusion_weights(logits))
    assert torch.equal(report.flagged, fitted.detect(images))
    text = str(report)
    assert text.count("image ") == 5
    assert all(role in text for role in ("victim", "auxiliary", "benign"))
    assert f"{report.branch_probabilities[0, 0]:.1%}" in text


def test_calibrate_bounds_the_false_positives_on_the_images_it_saw(fitted: ZePAD) -> None:
    images = toy_data(90, seed=8)[0]
    assert fitted.threshold == 0.1
    fitted.calibrate(images, fpr=0.1)
    assert fitted.threshold != 0.1
    # Exactly floor((n + 1) fpr) of n distinct scores may exceed the conformal threshold.
    assert int(fitted.detect(images).sum()) <= 9
    threshold = fitted.threshold
    with pytest.raises(InputError, match="needs at least 99 benign images; got 90"):
        fitted.calibrate(images, fpr=0.01)
    assert fitted.threshold == threshold


def test_a_new_task_changes_heads_classes_and_threshold_but_no_encoder(fitted: ZePAD) -> None:
    before = {key: value.clone() for key, value in fitted.encoders.state_dict().items()}
    fitted.calibrate(toy_data(90, seed=8)[0], fpr=0.1)
    images, labels = toy_data(40, seed=3)
    loader = DataLoader(TensorDataset(images, labels % 2), batch_size=10)
    fitted.fit_heads(loader, QUICK["heads"], progress=False)
    assert fitted.num_classes == 2
    assert fitted(images).shape == (40, 2)
    assert fitted.threshold == 0.1
    assert all(torch.equal(value, before[key]) for key, value in fitted.encoders.state_dict().items())


def test_victim_and_auxiliary_may_be_the_same_object_and_are_copied(loader: DataLoader) -> None:
    encoder = TinyEncoder()
    with pytest.warns(InputWarning):
        defense = ZePAD.from_encoders(encoder, encoder)
    ids = {id(p) for role in ("victim", "auxiliary", "benign") for p in defense.encoder(role).parameters()}
    assert len(ids) == 3 * len(list(encoder.parameters()))
    assert ids.isdisjoint({id(p) for p in encoder.parameters()})
    defense.harden(loader, QUICK["harden"], progress=False)


def test_the_default_benign_encoder_is_the_clean_auxiliary_and_never_the_victim() -> None:
    victim, auxiliary = TinyEncoder(), TinyEncoder()
    benign = ZePAD.from_encoders(victim, auxiliary).encoder("benign").backbone
    assert torch.equal(benign.conv.weight, auxiliary.conv.weight)
    assert not torch.equal(benign.conv.weight, victim.conv.weight)
    own = TinyEncoder(width=4)
    assert ZePAD.from_encoders(victim, auxiliary, benign=own).encoder("benign").backbone.conv.out_channels == 4


class Wrong(nn.Module):
    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor):
        return self.output(x)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Wrong(lambda x: (x.mean((2, 3)),)), "victim: an encoder must return one feature tensor; Wrong returned tuple"),
        (
            Wrong(lambda x: x.mean()),
            r"victim: an encoder must map 2 images to floating-point features .* of shape \(\)",
        ),
        (Wrong(lambda x: x.flatten(2)), r"victim: Wrong returns tokens of shape .*pooling=\"class_token\""),
        (nn.Linear(7, 3), r"victim: Linear took no image of 32x32, 64x64, 224x224 with 3 or 1 channels"),
        (len, "victim must be a torch.nn.Module, an EncoderSpec or a string; got .* Wrap it in a torch.nn.Module"),
    ],
)
def test_what_is_no_encoder_is_refused(encoder, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ZePAD.from_encoders(encoder, TinyEncoder())


def test_encoders_of_different_channels_are_refused() -> None:
    with pytest.raises(InputError, match="same channels; got victim 3, auxiliary 1, benign 1"):
        ZePAD.from_encoders(TinyEncoder(), nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1)))


def test_settings_out_of_range_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"eps must lie in \(0, 1\].*got 8, which looks like 0..255 units. Write 8 / 255"
    ):
        HardenConfig(eps=8)
    with pytest.raises(ConfigError, match="HardenConfig has no field epoch; it has"):
        HardenConfig.from_dict({"epoch": 3})
    with pytest.raises(ConfigError, match='fusion must be "rfdm" or "mean" or .*; got \'vote\''):
        ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), fusion="vote")
    with pytest.raises(ConfigError, match="num_classes must be at least 2, or None to count them; got 1"):
        ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), num_classes=1)
    with pytest.raises(ConfigError, match="resume=True needs the checkpoint_dir"):
        ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).harden([], resume=True)


def test_configs_survive_json_and_the_paper_preset_holds_the_papers_values() -> None:
    paper = HardenConfig.paper()
    assert (paper.epochs, paper.lr, paper.head_lr, paper.weight_decay) == (20, 1e-4, 5e-3, 8e-4)
    assert (paper.eps, paper.step_size, paper.steps, paper.schedule) == (0.03, 0.007, 10, "exponential")
    assert HardenConfig.from_dict(paper.to_dict()) == paper
    assert HardenConfig.paper(epochs=2).epochs == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_predict_the_same(fitted: ZePAD, duplicate) -> None:
    images = toy_data(6)[0]
    assert torch.equal(duplicate(fitted).predict_proba(images), fitted.predict_proba(images))


def test_fusion_rules_can_be_chosen(loader: DataLoader) -> None:
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), fusion=Mean())
    defense.harden(loader, QUICK["harden"], progress=False)
    defense.fit_benign(loader, QUICK["benign"], head_config=QUICK["heads"], progress=False)
    images = toy_data(6)[0]
    torch.testing.assert_close(defense(images), defense.branch_logits(images).mean(0))


def test_class_names_come_from_the_data_set() -> None:
    from zepad.data import LabelledImages

    images, labels = toy_data(12)
    loader = DataLoader(LabelledImages(images, labels, ["red", "green", "blue"]), batch_size=6)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).harden(loader, QUICK["harden"], progress=False)
    assert defense.class_names == ("red", "green", "blue")
    assert defense.num_classes == 3


def test_the_progress_bar_shows_loss_accuracies_and_time_left(loader: DataLoader, terminal, capsys) -> None:
    ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper").harden(loader, QUICK["harden"])
    assert capsys.readouterr() == ("", "")
    for part in ("encoder 1 of 2", "harden victim", "harden auxiliary", "loss ", "adversarial ", "clean ", "epoch 1/1"):
        assert part in terminal.getvalue()
    assert re.search(r"\d:\d\d left", terminal.getvalue())


def test_the_public_names_are_these() -> None:
    assert sorted(zepad.__all__) == zepad.__all__ == [
        "BenignConfig", "BranchReport", "CardDetails", "CheckpointError", "ConfigError", "Encoder",
        "EncoderSpec", "HardenConfig", "HeadConfig", "HubError", "InputError", "Preprocessing",
        "StageError", "TrainingError", "ZePAD", "ZePADError", "ZeroShotHead", "__version__",
        "pipeline",
    ]  # fmt: skip
    found = {name: getattr(zepad, name) for name in zepad.__all__}  # they are imported when they are asked for
    public = {
        name for name, value in {**vars(zepad), **found}.items() if not name.startswith("_") and not _is_module(value)
    }
    assert public | {"__version__"} == set(zepad.__all__)


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"

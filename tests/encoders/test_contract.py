"""What `from_encoders` asks of an encoder: no branch disturbs another, and what cannot work is refused, with why."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, Encoder, HardenConfig, HeadConfig, InputError, Preprocessing, ZePAD
from zepad.ensemble import BranchEnsemble
from zepad.modules import Branch, MLPHead

IMAGES, LABELS = toy_data(12)


class Around(nn.Module):
    """The tiny encoder with a function before it or after it."""

    def __init__(
        self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Any] = lambda x: x
    ) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner = TinyEncoder()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(self.before(x)))


def fitted_on(*encoders: nn.Module, **settings: Any) -> ZePAD:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6)
    defense = ZePAD.from_encoders(*encoders, **settings)
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    return defense.fit_benign(
        loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1, batch_size=6), progress=False
    )


# encoders that work in place --------------------------------------------------------------------------------------


def _zero_red(x: Tensor) -> Tensor:
    x[:, 0].zero_()
    return x


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "arithmetic": (lambda x: x.mul_(2).sub_(1), lambda x: x * 2 - 1),
    "activation": (lambda x: F.threshold(x, 0.4, 0.0, inplace=True), lambda x: F.threshold(x, 0.4, 0.0)),
    "view": (_zero_red, lambda x: x * torch.tensor([0.0, 1.0, 1.0])[:, None, None]),
}


@pytest.mark.parametrize("size", [None, (16, 16), (12, 12)], ids=["as given", "of the size", "resized"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_an_encoder_may_work_in_place_on_what_it_is_given(kind: str, size: tuple[int, int] | None) -> None:
    setting = Preprocessing(size=size)
    in_place, clean = (Encoder(Around(function), preprocessing=setting).eval() for function in IN_PLACE[kind])
    given, gradients = IMAGES.clone(), []
    assert torch.equal(in_place(given), clean(given))
    assert torch.equal(given, IMAGES)
    for encoder in (in_place, clean):  # as an attack starts from a leaf
        moving = IMAGES.clone().requires_grad_()
        gradients.append(torch.autograd.grad(encoder(moving).square().sum(), moving)[0])
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_a_branch_that_works_in_place_disturbs_no_other() -> None:
    given = IMAGES.clone()
    defense = fitted_on(Around(IN_PLACE["arithmetic"][0]), TinyEncoder())
    alone = torch.stack([defense.branch(role)(IMAGES.clone()) for role in ("victim", "auxiliary", "benign")])
    assert torch.equal(defense.branch_logits(given), alone)
    defense.predict(given), defense.detect(given), defense.inspect(given)
    assert torch.equal(given, IMAGES)


@pytest.mark.parametrize("detector", ["gap", "features"])
def test_nor_does_a_bare_module_in_an_ensemble(detector: str) -> None:
    def head() -> MLPHead:
        return MLPHead(8, 3).eval()

    branches: dict[str, nn.Module] = {name: Branch(Around(lambda x: x.mul_(2)).eval(), head()) for name in "abc"}
    if detector == "gap":
        branches["a"] = nn.Sequential(Around(lambda x: x.mul_(2)), head()).eval()
    reference = Branch(Encoder(TinyEncoder()), head()).eval()
    ensemble = BranchEnsemble(branches, detector=detector, reference=reference)
    alone = torch.stack([branch(IMAGES.clone()) for branch in branches.values()])
    given = IMAGES.clone()
    assert torch.equal(ensemble.branch_logits(given), alone)
    assert torch.equal(ensemble.detector_inputs(given).logits, alone)
    assert torch.equal(given, IMAGES)


def test_features_never_share_memory_with_the_images() -> None:
    given = IMAGES.clone()
    Encoder(nn.Flatten())(given).zero_()
    assert torch.equal(given, IMAGES)


def test_encoders_that_share_a_trunk_are_separated() -> None:
    trunk = TinyEncoder()
    victim, auxiliary = nn.Sequential(trunk, nn.Linear(8, 4)), nn.Sequential(trunk, nn.Linear(8, 5))
    defense = ZePAD.from_encoders(victim, auxiliary)
    before = defense.encoder("auxiliary")(IMAGES)
    with torch.no_grad():
        for weight in (*trunk.parameters(), *defense.encoder("victim").parameters()):
            weight.zero_()
    assert torch.equal(defense.encoder("auxiliary")(IMAGES), before)


# precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_encoder_of_another_precision_trains_decides_and_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    victim = TinyEncoder().to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    built = ZePAD.from_encoders(victim, TinyEncoder()).encoder("victim")
    twin = Encoder(copy.deepcopy(victim).to(expected)).eval()
    assert torch.equal(built(IMAGES), twin(IMAGES))  # every number of half precision is one of float32
    assert built(IMAGES).dtype == expected
    assert next(victim.parameters()).dtype == dtype
    defense = fitted_on(victim, TinyEncoder())
    assert defense.predict(IMAGES).shape == defense.detect(IMAGES).shape == (12,)
    defense.save_pretrained(tmp_path)
    again = ZePAD.from_pretrained(tmp_path, victim=victim, auxiliary=TinyEncoder())
    assert torch.equal(again.predict_proba(IMAGES), defense.predict_proba(IMAGES))


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ torch.eye(8)


@pytest.mark.parametrize("after", [Tensor.half, Tensor.bfloat16, Tensor.double, _autocast])
def test_features_of_another_precision_than_the_weights_are_taken(after: Callable[[Tensor], Tensor]) -> None:
    defense = fitted_on(Around(after=after), TinyEncoder())
    assert defense.branch_logits(IMAGES).dtype == torch.float32
    assert defense.predict(IMAGES).shape == defense.detect(IMAGES).shape == (12,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_head_takes_features_of_another_precision(dtype: torch.dtype) -> None:
    head, features = MLPHead(8, 3).eval(), torch.rand(4, 8).to(dtype)
    assert torch.equal(head(features), head(features.float()))
    assert head(features).dtype == torch.float32


def test_a_module_that_insists_on_half_precision_is_refused_with_the_precision() -> None:
    with pytest.raises(InputError, match=r"victim: Around took no image of .* in torch.float32"):
        ZePAD.from_encoders(Around(before=Tensor.bfloat16).bfloat16(), TinyEncoder())


# what is refused --------------------------------------------------------------------------------------------------


class NoGrad(Around):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Inference(Around):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Counts(Around):
    """An encoder whose features depend on how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) + self.calls


class Remembers(Around):
    """An encoder that changes a buffer with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.inner(x)


class AlwaysTraining(Around):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(mode or True)


class Uncopyable(Around):
    def __deepcopy__(self, memo: dict[int, object]) -> None:
        raise TypeError("no copies")


def _without_statistics() -> nn.Module:
    module = Around()
    module.inner.norm = nn.BatchNorm2d(8, track_running_stats=False)
    return module


def _legacy_weight_norm() -> nn.Module:
    module = Around()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module.inner.conv)
    return module


def _damaged(key: str, value: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = TinyEncoder()
        module.state_dict()[key].view(-1)[1] = value
        return module

    return make


def _traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(TinyEncoder().eval(), torch.rand(2, 3, 32, 32))


def _scripted_part() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(TinyEncoder()), nn.Linear(8, 4))


def _on_two_devices() -> nn.Module:
    module = Around()
    module.inner.conv2.to("meta")
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "noise": (lambda: Around(after=lambda f: f + torch.randn_like(f)), "other features .* at each call .*F.dropout"),
    "functional dropout": (lambda: Around(after=lambda f: F.dropout(f, 0.3)), "other features .* at each call"),
    "noise of numpy": (lambda: Around(after=lambda f: f * np.random.rand()), "at each call"),  # noqa: NPY002
    "noise of python": (lambda: Around(after=lambda f: f * random.random()), "at each call"),
    "a count": (Counts, "at each call in evaluation mode"),
    "a buffer": (Remembers, "changes its own state .* in evaluation mode: seen.*self.training"),
    "BatchNorm that always trains": (AlwaysTraining, "changes its own state .*inner.norm.running_mean"),
    "BatchNorm without statistics": (_without_statistics, "other features alone .*running statistics"),
    "centred over the batch": (lambda: Around(after=lambda f: f - f.mean(0)), "other features alone"),
    "one size of batch": (
        lambda: Around(lambda x: x.view(2, 3, *x.shape[2:])),
        "could not be called for one image .*of any size",
    ),
    "detached": (lambda: Around(after=Tensor.detach), "without a gradient .*remove no_grad, .*detach"),
    "no_grad": (NoGrad, "without a gradient"),
    "inference_mode": (Inference, "without a gradient"),
    "through numpy": (lambda: Around(after=lambda f: torch.from_numpy(f.numpy())), "without a gradient.*numpy"),
    "rounded": (lambda: Around(lambda x: (x * 255).round() / 255), "gradient is zero everywhere, as after rounding"),
    "independent of the images": (lambda: Around(lambda x: torch.ones_like(x)), "without a gradient"),
    "no features": (lambda: Around(after=lambda f: f[:, :0]), "returns no features: the width .* is zero"),
    "NaN features": (lambda: Around(after=lambda f: f / 0 * 0), "gives features that are NaN or infinite"),
    "a NaN weight": (_damaged("conv.weight", float("nan")), "damaged: conv.weight holds 1 values of 216"),
    "an infinite weight": (_damaged("conv2.bias", float("inf")), "damaged: conv2.bias holds 1 values of 8"),
    "a NaN buffer": (_damaged("norm.running_mean", float("nan")), "damaged: norm.running_mean"),
    "a negative variance": (_damaged("norm.running_var", -0.5), "norm.running_var holds negative values"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten()), "lazy parameters .*Call it once"),
    "meta": (lambda: TinyEncoder().to("meta"), "meta device, which has no weights. .*to_empty"),
    "partly meta": (_on_two_devices, "meta device"),
    "traced": (_traced, "TorchScript, which cannot be trained as a copy. Pass the module"),
    "partly scripted": (_scripted_part, "TorchScript"),
    "legacy weight_norm": (_legacy_weight_norm, "cannot be copied .*parametrizations.weight_norm"),
    "no copies": (Uncopyable, r"cannot be copied \(no copies\)"),
}


@pytest.mark.filterwarnings("ignore:.*script.*")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_defense_would_silently_go_wrong_with_is_refused_by_its_reason(kind: str) -> None:
    make, message = REFUSED[kind]
    victim, encoder = TinyEncoder(), make()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with pytest.raises(InputError, match=re.compile(f"^auxiliary: .*{message}", re.DOTALL)):
        ZePAD.from_encoders(victim, encoder)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(states[0], after[0])
    assert np.array_equal(states[1], after[1])
    assert states[2] == after[2]


def test_a_module_that_keeps_what_it_computed_is_refused_when_it_gives_an_architecture(tmp_path: Path) -> None:
    module = Around()
    ZePAD.from_encoders(module, TinyEncoder()).save_pretrained(tmp_path)
    module.kept = module(IMAGES)
    with pytest.raises(InputError, match="victim: Around cannot be copied .*detach what hooks keep"):
        ZePAD.from_pretrained(tmp_path, victim=module, auxiliary=TinyEncoder())


# what is taken ----------------------------------------------------------------------------------------------------


class Masked(TinyEncoder):
    """An encoder with an attention mask, whose infinities are meant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))


def _weight_norm() -> nn.Module:
    module = TinyEncoder()
    nn.utils.parametrizations.weight_norm(module.conv)
    return module


def _spectral_norm() -> nn.Module:
    module = TinyEncoder()
    nn.utils.spectral_norm(module.conv)
    return module


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm and Dropout in training mode": lambda: nn.Sequential(TinyEncoder(), nn.Dropout(0.5)).train(),
    "a constant": lambda: Around(after=lambda f: f * 0),  # as a tiny network whose units are all dead
    "no parameters": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    "features normalised": lambda: Around(after=F.normalize),
    "features that sum to one": lambda: Around(after=lambda f: f.softmax(dim=1)),
    "an expanded output": lambda: Around(after=lambda f: f[:, :1].expand(-1, 5)),
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
    "a mask": Masked,
    "DataParallel": lambda: nn.DataParallel(TinyEncoder()),
    "traced by fx": lambda: torch.fx.symbolic_trace(TinyEncoder()),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_holds_to_the_contract_is_taken_and_left_as_it_was(kind: str) -> None:
    module = TAKEN[kind]()
    before = copy.deepcopy(module.state_dict())
    flags = [part.training for part in module.modules()]
    encoder = ZePAD.from_encoders(module, TinyEncoder()).encoder("victim")
    assert [part.training for part in module.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(weight.grad is None for weight in (*module.parameters(), *encoder.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in encoder.backbone.state_dict().items())


# a classifier in an Encoder ---------------------------------------------------------------------------------------


def _timm(classes: int) -> nn.Module:
    import timm

    return timm.create_model("test_resnet", num_classes=classes)


def _torchvision(classes: int) -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    model = mobilenet_v3_small(num_classes=max(classes, 1))
    if not classes:
        model.classifier[-1] = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (_timm, "the ResNet .*fc.bias, fc.weight"),
        (_torchvision, r"the MobileNetV3 .*\(classifier.3.bias, classifier.3.weight\)"),
    ],
)
def test_a_classifier_that_an_encoder_keeps_is_said_aloud(make: Callable[[int], nn.Module], kept: str) -> None:
    encoder = Encoder(make(7), preprocessing=Preprocessing(size=(32, 32)))
    with pytest.warns(UserWarning, match=f"victim: {kept}.*Pass the model itself") as caught:
        defense = ZePAD.from_encoders(encoder, TinyEncoder())
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    assert defense.encoder("victim")(IMAGES).shape == (12, 7)


@pytest.mark.parametrize("make", [_timm, _torchvision, lambda _: TinyEncoder()])
def test_an_encoder_without_a_classifier_says_nothing(make: Callable[[int], nn.Module]) -> None:
    encoder, other = Encoder(make(0), preprocessing=Preprocessing(size=(32, 32))), TinyEncoder()
    state = torch.get_rng_state()
    ZePAD.from_encoders(encoder, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_classifier_was_removed_keeps_the_layer_before_it() -> None:
    defense = ZePAD.from_encoders(_torchvision(0), TinyEncoder(), preprocess=Preprocessing(size=(32, 32)))
    assert defense.encoder("victim")(IMAGES).shape == (12, 1024)

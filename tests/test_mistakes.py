"""What users get wrong, call by call: each mistake is refused with a remedy, and the model stays as it was."""

# ruff: noqa: ARG005 - every mistake is made in a world, which some do not need

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from command_line import zepad
from tiny import TinyEncoder, toy_data
from zepad import (
    BenignConfig,
    CardDetails,
    ConfigError,
    Encoder,
    EncoderSpec,
    HardenConfig,
    HeadConfig,
    InputError,
    Preprocessing,
    StageError,
    ZePAD,
    ZePADError,
    ZeroShotHead,
    attacks,
    detectors,
    fusion,
    objectives,
    protocols,
    training,
)
from zepad.arguments import checked
from zepad.attacks import (
    APGD,
    PGD,
    SSP,
    UAP,
    AdvEncoder,
    DetectorEvading,
    FeaturePGD,
    JointAPGD,
    PAPBase,
    Square,
    TargetedAPGD,
    Transfer,
    UniversalFeatureAttack,
    UniversalPerturbation,
    WorstOf,
)
from zepad.data import load_data
from zepad.ensemble import BranchEnsemble
from zepad.errors import CalibrationWarning, CheckpointError, InputWarning
from zepad.evaluation import (
    Attacker,
    EvalReport,
    evaluate,
    published,
    replica,
    save_report,
    semi_black_box,
    semi_black_box_plus,
    universal_attacks,
    weights_digest,
    white_box,
)
from zepad.objectives import DAEMixture, Recipe

EPS = 8 / 255
IMAGES, LABELS = toy_data(12, size=8)
DATA = [(IMAGES, LABELS)]
NAN = float("nan")


@dataclass
class World:
    """What the mistakes are made with: a defense at each stage, an encoder, a classifier, and a folder."""

    built: ZePAD
    hardened: ZePAD
    fitted: ZePAD
    encoder: TinyEncoder
    folder: Path
    classifier: nn.Module = field(
        default_factory=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    )

    def state(self) -> list[Any]:
        """Return everything of the models that a call could change."""
        found: list[Any] = [sorted(path.name for path in self.folder.iterdir())]
        for model in (self.built, self.hardened, self.fitted, self.encoder, self.classifier):
            found += [weights_digest(model), [part.training for part in model.modules()]]
            found += [(weight.requires_grad, weight.grad is None) for weight in model.parameters()]
            if isinstance(model, ZePAD):
                found += [model.stage, model.num_classes, model.class_names, model.threshold, model.settings]
                found.append(copy.deepcopy(model.provenance))
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    built = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")
    hardened = copy.deepcopy(built).harden(DATA, HardenConfig(epochs=1, steps=1), progress=False)
    fitted = copy.deepcopy(hardened)
    fitted.fit_benign(DATA, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    return World(built, hardened, fitted, TinyEncoder(), tmp_path_factory.mktemp("mistakes"))


Mistake = tuple[str, str, Callable[[World], Any], type[ZePADError], str]
"""Call, kind of mistake, the mistake, the error, and words of the message that name the remedy."""


def attacked(attack: Any, *arguments: Any, **settings: Any) -> Callable[[World], Any]:
    """Call an attack on the classifier with wrong arguments."""
    return lambda world: attack(world.classifier, *(arguments or (IMAGES, LABELS)), **settings)


NUMBER, INTEGER, FLAG = "must be a number", "must be an integer", "must be True or False"
UNQUOTED = "Write a number, without quotes"
BAD_IMAGES = (
    ("an array with channels first", IMAGES.numpy(), r"torch.from_numpy\(array\)"),
    ("0..255", IMAGES * 255, r"Divide by 255"),
    ("int64", (IMAGES * 255).long(), r"images.float\(\) / 255"),
    ("one image in 0..255", IMAGES[0] * 255, r"Divide by 255"),
    ("normalised", IMAGES * 4 - 2, "Remove Normalize from .* do_normalize=False"),
    ("NaN", torch.full_like(IMAGES, NAN), "Check the data pipeline"),
)
MISTAKES: list[Mistake] = []


def add(call: str, kind: str, mistake: Callable[[World], Any], error: type[ZePADError], remedy: str) -> None:
    MISTAKES.append((call, kind, mistake, error, remedy))


# building ---------------------------------------------------------------------------------------------------------

for kind, settings, error, remedy in (
    ("10.0 classes", {"num_classes": 10.0}, ConfigError, "must be an integer or None; got 10.0. Write 10"),
    ("nan classes", {"num_classes": NAN}, ConfigError, "must be an integer or None; got nan"),
    ("'10' classes", {"num_classes": "10"}, ConfigError, UNQUOTED),
    ("a tensor of classes", {"num_classes": torch.tensor(3)}, ConfigError, r"Convert it with int\(...\)"),
    ("a NumPy number of classes", {"num_classes": np.int64(3)}, ConfigError, r"Convert it with int\(...\)"),
    ("True classes", {"num_classes": True}, ConfigError, INTEGER),
    ("one class", {"num_classes": 1}, ConfigError, "at least 2"),
    ("an unknown rule", {"fusion": "best"}, ConfigError, '"rfdm" or'),
    ("a rule that is a class", {"fusion": fusion.Bounded}, ConfigError, r"Bounded\(...\)"),
    ("a rule that is a number", {"fusion": 3}, ConfigError, "must be a FusionRule, a string or None"),
    ("a detector for a rule", {"fusion": detectors.ConfidenceGap()}, ConfigError, "must be a FusionRule"),
    ("an unknown detector", {"detector": "entropy"}, ConfigError, '"gap" or'),
    ("a detector that is a dict", {"detector": {"name": "gap"}}, ConfigError, "must be a Detector or a string"),
    ("preprocessing as a dict", {"preprocess": {"mean": 0.5}}, ConfigError, r"Preprocessing\(\*\*settings\)"),
    ("preprocessing as a number", {"preprocess": 224}, ConfigError, "must be a Preprocessing or None"),
    (
        "a benign path",
        {"benign": Path("encoder.pt")},
        InputError,
        "a torch.nn.Module, an EncoderSpec, a string or None",
    ),
    ("a benign function", {"benign": lambda x: x}, InputError, "Wrap it in a torch.nn.Module"),
    ("a list of encoders", {"benign": [TinyEncoder()]}, InputError, "must be a torch.nn.Module"),
):
    add(
        "from_encoders",
        kind,
        lambda world, settings=settings: ZePAD.from_encoders(world.encoder, TinyEncoder(), **settings),
        error,
        remedy,
    )
for kind, pair, error, remedy in (
    ("no victim", lambda w: (None, w.encoder), InputError, "victim must be a torch.nn.Module"),
    ("no auxiliary", lambda w: (w.encoder, None), InputError, "auxiliary must be a torch.nn.Module"),
    ("a class", lambda w: (TinyEncoder, w.encoder), InputError, r"such as TinyEncoder\(...\)"),
    ("an array", lambda w: (np.zeros(3), w.encoder), InputError, "victim must be a torch.nn.Module"),
    ("an unknown source", lambda w: ("hub:resnet", w.encoder), ConfigError, "must read"),
    ("a bare name", lambda w: ("resnet18", w.encoder), ConfigError, "must read"),
    ("an empty name", lambda w: ("", w.encoder), ConfigError, "must read"),
    ("a head for an encoder", lambda w: (nn.Linear(7, 3), w.encoder), InputError, "State its input size"),
):
    add("from_encoders", kind, lambda world, pair=pair: ZePAD.from_encoders(*pair(world)), error, remedy)

# configs ----------------------------------------------------------------------------------------------------------

for config, kind, settings, remedy in (
    *((c, "epochs as a string", {"epochs": "3"}, "at least 1, or None") for c in (HardenConfig, BenignConfig)),
    *((c, "no epochs", {"epochs": 0}, "at least 1, or None") for c in (HardenConfig, BenignConfig, HeadConfig)),
    *((c, "half epochs", {"epochs": 1.5}, "at least 1, or None") for c in (HardenConfig, BenignConfig, HeadConfig)),
    *((c, "a negative seed", {"seed": -1}, "an integer of zero") for c in (HardenConfig, BenignConfig, HeadConfig)),
    *((c, "half precision", {"precision": "fp16"}, '"auto", "fp32" or "bf16"') for c in (HardenConfig, HeadConfig)),
    *((c, "a rate of nan", {"head_lr": NAN}, "a positive number") for c in (HardenConfig, BenignConfig, HeadConfig)),
    (HardenConfig, "eps in 0..255", {"eps": 8}, "Write 8 / 255"),
    (HardenConfig, "eps as a string", {"eps": "8/255"}, "a positive number"),
    (HardenConfig, "eps of NumPy", {"eps": np.float32(0.03)}, "a positive number"),
    (HardenConfig, "a step of 2", {"step_size": 2}, "2 / 255"),
    (HardenConfig, "no step", {"steps": 0}, "at least 1"),
    (HardenConfig, "an unknown schedule", {"schedule": "linear"}, '"cosine", "exponential"'),
    (HardenConfig, "everything held out", {"val_fraction": 1.0}, r"in \[0, 1\)"),
    (BenignConfig, "frozen with a word", {"freeze_encoder": "yes"}, "True, False or None"),
    (BenignConfig, "a negative rate", {"lr": -1e-3}, "a positive number"),
    (HeadConfig, "an empty batch", {"batch_size": 0}, "at least 1"),
    (HeadConfig, "a batch of a half", {"batch_size": 0.5}, "at least 1"),
    (Preprocessing, "a mean alone", {"mean": (0.5,)}, "both of one length"),
    (Preprocessing, "a size of words", {"size": "224"}, r"a pair of positive integers"),
    (Preprocessing, "one side", {"size": 224}, "a pair of positive integers"),
    (Preprocessing, "a zero std", {"mean": (0.5,), "std": (0.0,)}, "positive"),
    (Preprocessing, "an unknown mode", {"interpolation": "area"}, "one of"),
    (EncoderSpec, "a path for a name", {"source": "timm", "name": "../x"}, "plain model name"),
    (EncoderSpec, "arguments as a list", {"source": "timm", "name": "x", "arguments": [1]}, "a mapping of names"),
    (EncoderSpec, "preprocessing as a dict", {"source": "timm", "name": "x", "preprocessing": {}}, "a Preprocessing"),
    (EncoderSpec, "another pooling", {"source": "timm", "name": "x", "pooling": "max"}, "one of"),
    (CardDetails, "a licence in words", {"license": "MIT License"}, 'such as "apache-2.0"'),
    (CardDetails, "data sets as a string", {"datasets": "a/b"}, "a tuple of Hub ids"),
    (CardDetails, "tags as numbers", {"tags": (1,)}, "a tuple of words"),
    (protocols.Protocol, "a config as a dict", {"harden": {"epochs": 1}}, r"HardenConfig\(\*\*settings\)"),
    (protocols.Protocol, "no step", {"steps": 0}, "at least 1"),
    (protocols.Protocol, "steps as a string", {"steps": "50"}, UNQUOTED),
    (protocols.Protocol, "universal as a list", {"universal": [SSP(eps=EPS)]}, "a dict"),
    (protocols.Protocol, "universal by name", {"universal": {"SSP": "SSP"}}, "an UniversalAttack"),
):
    add(config.__name__, kind, lambda _, c=config, s=settings: c(**s), ConfigError, remedy)
for config in (HardenConfig, BenignConfig, HeadConfig, Preprocessing, CardDetails):
    name = f"{config.__name__}.from_dict"
    add(name, "an unknown field", lambda _, c=config: c.from_dict({"learning_rate": 1}), ConfigError, "it has")
    add(name, "no dict", lambda _, c=config: c.from_dict("epochs=3"), ConfigError, "must be a dict")
add("EncoderSpec.parse", "a number", lambda _: EncoderSpec.parse(18), ConfigError, "text must be a string")

# training ---------------------------------------------------------------------------------------------------------

TRAINING = {
    "harden": ("built", HardenConfig(epochs=1, steps=1)),
    "fit_benign": ("hardened", BenignConfig(epochs=1)),
    "fit_heads": ("fitted", HeadConfig(epochs=1)),
}
for call, (stage, config) in TRAINING.items():

    def train(world: World, loader: Any = DATA, *positional: Any, call=call, stage=stage, config=config, **more: Any):
        return getattr(getattr(world, stage), call)(loader, *(positional or (config,)), **{"progress": False, **more})

    cls = type(config).__name__
    for kind, loader, remedy in (
        ("a path for a loader", Path("data"), "Wrap tensors in torch.utils.data.DataLoader"),
        ("a tensor for a loader", IMAGES, "Wrap tensors in torch.utils.data.DataLoader"),
        ("None for a loader", None, "Wrap tensors in torch.utils.data.DataLoader"),
        ("a generator", (batch for batch in DATA), "iterable more than once"),
        ("no batch", [], "Pass at least one"),
        ("no labels", [IMAGES], "must yield .images, labels."),
        ("a dict of other columns", [{"img": IMAGES, "fine_label": LABELS}], "zepad.data.columns"),
        ("labels as floats", [(IMAGES, LABELS.float())], "labels.long"),
        ("labels of one batch less", [(IMAGES, LABELS[:-1])], "one per image"),
        ("negative labels", [(IMAGES, LABELS - 1)], "0, 1, ..."),
        ("images in 0..255", [(IMAGES * 255, LABELS)], "Divide by 255"),
        ("another number of channels", [(IMAGES[:, :1], LABELS)], "Repeat the grey channel"),
    ):
        add(call, kind, lambda world, train=train, loader=loader: train(world, loader), InputError, remedy)
    for kind, given, remedy in (
        ("a dict for a config", {"epochs": 1}, rf"{cls}\(\*\*settings\)"),
        ("a class for a config", type(config), rf"{cls}\(...\)"),
        ("a number for a config", 3, f"must be an? {cls}"),
        ("another config", Preprocessing(), f"must be an? {cls}"),
    ):
        add(call, kind, lambda world, train=train, given=given: train(world, DATA, given), ConfigError, remedy)
    add(call, "progress as a word", lambda w, train=train: train(w, progress="no"), ConfigError, "without quotes")
for call in ("harden", "fit_benign"):
    stage, config = TRAINING[call]

    def train(world: World, call=call, stage=stage, config=config, **settings: Any):
        return getattr(getattr(world, stage), call)(DATA, config, progress=False, **settings)

    for kind, settings, error, remedy in (
        ("resume as a path", {"resume": "runs"}, ConfigError, FLAG),
        ("resume without a folder", {"resume": True}, ConfigError, "checkpoint_dir"),
        ("a module for a folder", {"checkpoint_dir": nn.Linear(1, 1)}, ConfigError, "a string, a Path or None"),
        ("a number for a folder", {"checkpoint_dir": 7}, ConfigError, "a string, a Path or None"),
        ("an empty val_loader", {"val_loader": []}, InputError, "empty"),
        ("a val_loader of tensors", {"val_loader": IMAGES}, InputError, "must yield .images, labels."),
    ):
        add(call, kind, lambda world, train=train, settings=settings: train(world, **settings), error, remedy)
for kind, settings, remedy in (
    ("an objective by name", {"objective": "trades"}, "a callable, a Recipe or None"),
    ("a class for an objective", {"objective": 6.0}, "a callable, a Recipe or None"),
    ("zero-shot heads as a list", {"zero_shot": [1]}, "must be a dict"),
    ("zero-shot heads of another kind", {"zero_shot": {"victim": nn.Linear(8, 3)}}, "ZeroShotHead"),
    ("half the zero-shot heads", {"zero_shot": {"victim": ZeroShotHead(torch.rand(3, 8))}}, "ZeroShotHead.from_text"),
    ("a number for a bank", {"bank_dir": 3}, "a string, a Path or None"),
):
    add(
        "harden",
        kind,
        lambda world, settings=settings: world.built.harden(DATA, HardenConfig(epochs=1), progress=False, **settings),
        InputError if "heads as" in kind or "of another" in kind else ConfigError,
        remedy,
    )
add("fit_benign", "too early", lambda w: w.built.fit_benign(DATA), StageError, r"Call harden\(loader\) first")
add(
    "fit_benign",
    "heads as a dict",
    lambda w: w.hardened.fit_benign(DATA, head_config={"epochs": 1}),
    ConfigError,
    r"HeadConfig\(\*\*settings\)",
)
add("fit_heads", "too early", lambda w: w.hardened.fit_heads(DATA), StageError, r"Call fit_benign\(loader\) first")
for count, remedy in (("3", UNQUOTED), (0, "at least 2"), (3.0, "Write 3"), (-1, "at least 2")):
    add(
        "fit_heads",
        f"{count!r} classes",
        lambda world, count=count: world.fitted.fit_heads(DATA, num_classes=count, progress=False),
        ConfigError,
        remedy,
    )
add("fit_zero_shot", "too early", lambda w: w.built.fit_zero_shot({}), StageError, r"Call harden\(loader\) first")
for kind, heads, error, remedy in (
    ("no heads", {}, ConfigError, "ZeroShotHead.from_text"),
    ("a list", [ZeroShotHead(torch.rand(3, 8))], InputError, "must be a dict"),
    ("text", "cat, dog", InputError, "must be a dict"),
    ("tensors", {"victim": torch.rand(3, 8)}, InputError, "ZeroShotHead"),
    (
        "another width",
        dict.fromkeys(("victim", "auxiliary", "benign"), ZeroShotHead(torch.rand(3, 5))),
        ConfigError,
        "text tower",
    ),
):
    add("fit_zero_shot", kind, lambda w, heads=heads: w.hardened.fit_zero_shot(heads), error, remedy)
for names, remedy in ((("a", "b"), "must name 3 classes"), ("abc", "must be a list"), ((1, 2, 3), "a string")):
    add(
        "fit_zero_shot",
        f"class names {names!r}",
        lambda world, names=names: world.hardened.fit_zero_shot(
            {role: ZeroShotHead(torch.rand(3, 8)) for role in ("victim", "auxiliary", "benign")}, class_names=names
        ),
        ConfigError,
        remedy,
    )
for kind, call, error, remedy in (
    ("no module", lambda w: training.harden_branch(3, DATA), InputError, "a torch.nn.Module"),
    ("a dict", lambda w: training.harden_branch(w.encoder, DATA, {}), ConfigError, r"HardenConfig\(\*\*settings\)"),
    ("classes", lambda w: training.harden_branch(w.encoder, DATA, num_classes="3"), ConfigError, UNQUOTED),
):
    add("harden_branch", kind, call, error, remedy)

# settling ---------------------------------------------------------------------------------------------------------

for kind, settings, error, remedy in (
    ("fpr as a string", {"fpr": "0.05"}, ConfigError, UNQUOTED),
    ("fpr in per cent", {"fpr": 5}, InputError, "in .0, 1."),
    ("fpr nan", {"fpr": NAN}, ConfigError, NUMBER),
    ("fpr for few images", {"fpr": 1e-6}, InputError, "at least"),
    ("a floor in per cent", {"benign_floor": 95}, ConfigError, r"in \[0, 1\]"),
    ("a floor as a string", {"benign_floor": "0.9"}, ConfigError, UNQUOTED),
    ("eps in 0..255", {"eps": 8}, ConfigError, "Write 8 / 255"),
    ("eps as a string", {"eps": "8/255"}, ConfigError, UNQUOTED),
):
    add("calibrate", kind, lambda w, s=settings: w.fitted.calibrate(DATA, **s), error, remedy)
for kind, images, remedy in (*BAD_IMAGES, ("a number", 3, "a loader of such batches"), ("nothing", [], "at least one")):
    add("calibrate", kind, lambda w, images=images: w.fitted.calibrate(images), InputError, remedy)
add("calibrate", "too early", lambda w: w.built.calibrate(IMAGES), StageError, r"Call harden\(loader\) first")
for settings, remedy in (
    ({"fusion": "no-such-rule"}, "fusion.register"),
    ({"fusion": 1.0}, "must be a FusionRule, a string or None"),
    ({"fusion": fusion.Mean}, r"Mean\(...\)"),
    ({"detector": "none"}, "detectors.register"),
    ({"detector": "combined"}, r"from_encoders\(..., detector=\"combined\"\)"),
    ({"detector": nn.Linear(1, 1)}, "must be a Detector, a string or None"),
):
    add("configure", str(settings)[:40], lambda w, s=settings: w.fitted.configure(**s), ConfigError, remedy)
for call in ("encoder", "branch"):
    add(call, "an unknown role", lambda w, c=call: getattr(w.fitted, c)("bening"), ConfigError, "this model has victim")
    add(call, "a number", lambda w, c=call: getattr(w.fitted, c)(0), ConfigError, "must be a string")
add("branch", "no head yet", lambda w: w.built.branch("victim"), StageError, r"Call harden\(loader\) first")
add("attach", "a dict", lambda w: w.fitted.attach({"accuracy": 1.0}), ConfigError, "must be an EvalReport")
add("attach", "a path", lambda w: w.fitted.attach("report.json"), ConfigError, "must be an EvalReport")

# deciding ---------------------------------------------------------------------------------------------------------

for call in ("predict", "predict_proba", "detect", "detection_score"):
    for kind, images, remedy in (
        *BAD_IMAGES,
        ("None", None, "a loader of such batches"),
        ("a path that leads nowhere", "cat.png", "cat.png is no image that can be read"),
        ("a folder", Path(__file__).parent, r"sorted\(Path\(.*glob"),
        ("the bytes of a file", b"\x89PNG", r"PIL.Image.open\(io.BytesIO"),
        ("an image with its label", (IMAGES[0], 1), "pass the image alone"),
        ("images of several sizes", [IMAGES[0], IMAGES[0, :, 1:]], r"image.resize\(\(width, height\)\)"),
        ("a dict of other columns", [{"img": IMAGES}], "zepad.data.columns"),
    ):
        if "one image" not in kind or call == "predict":
            add(call, kind, lambda w, c=call, i=images: getattr(w.fitted, c)(i), InputError, remedy)
    add(call, "too early", lambda w, c=call: getattr(w.built, c)(IMAGES), StageError, r"Call harden\(loader\) first")
for kind, images, remedy in BAD_IMAGES:
    add("inspect", kind, lambda w, i=images: w.fitted.inspect(i), InputError, remedy)
for call in ("forward", "branch_logits", "score"):
    for kind, images, remedy in (
        ("None", None, "torch.Tensor"),
        ("an array", IMAGES.numpy(), "torch.Tensor"),
        ("uint8", (IMAGES * 255).byte(), "images.float"),
        ("one image", IMAGES[0], r"images\[None\]"),
        ("grey images", IMAGES[:, :1], "Repeat the grey channel"),
    ):
        add(call, kind, lambda w, c=call, i=images: getattr(w.fitted, c)(i), InputError, remedy)

# saving and loading -----------------------------------------------------------------------------------------------

for kind, call, error, remedy in (
    ("a module", lambda w: w.fitted.save_pretrained(w.encoder), ConfigError, "a string or a Path"),
    ("None", lambda w: w.fitted.save_pretrained(None), ConfigError, "a string or a Path"),
    (
        "a card as a dict",
        lambda w: w.fitted.save_pretrained(w.folder, card={}),
        ConfigError,
        r"CardDetails\(\*\*settings\)",
    ),
    ("a card as text", lambda w: w.fitted.save_pretrained(w.folder, card="mit"), ConfigError, "a CardDetails"),
    (
        "heads_only as a word",
        lambda w: w.fitted.save_pretrained(w.folder, heads_only="yes"),
        ConfigError,
        "True or False",
    ),
    (
        "heads that are nowhere",
        lambda w: w.fitted.save_pretrained(w.folder, heads_only=True),
        StageError,
        "push_to_hub",
    ),
    ("a file in the way", lambda w: w.fitted.save_pretrained(Path(__file__) / "x"), CheckpointError, "writable folder"),
):
    add("save_pretrained", kind, call, error, remedy)
for kind, arguments, error, remedy in (
    ("a module", (TinyEncoder(),), ConfigError, "a string or a Path"),
    ("None", (None,), ConfigError, "a string or a Path"),
    ("no folder", ("./nowhere",), CheckpointError, "Pass the folder of a saved model"),
    ("a file", (__file__,), CheckpointError, "Pass the folder of a saved model"),
):
    add("from_pretrained", kind, lambda _, a=arguments: ZePAD.from_pretrained(*a), error, remedy)
for kind, settings, error, remedy in (
    ("a device that is not there", {"device": "cuda:99"}, ConfigError, 'Pass "cpu"'),
    ("a device of no kind", {"device": "gpu"}, ConfigError, 'Pass "cpu"'),
    ("a device as a number", {"device": 1.5}, ConfigError, "a string, a device or None"),
    ("an unknown branch", {"branches": ["main"]}, ConfigError, '"victim"'),
    ("branches as a string", {"branches": "victim"}, ConfigError, "must be a list"),
    ("no branch", {"branches": []}, ConfigError, "some of"),
    ("a victim by name", {"victim": "resnet18"}, InputError, "a torch.nn.Module"),
    ("a victim that is a class", {"victim": TinyEncoder}, InputError, r"such as TinyEncoder\(...\)"),
    ("a revision as a number", {"revision": 2}, ConfigError, "a string or None"),
    ("local_files_only as a word", {"local_files_only": "no"}, ConfigError, FLAG),
):
    add("from_pretrained", kind, lambda w, s=settings: ZePAD.from_pretrained(w.folder, **s), error, remedy)
for kind, call, error, remedy in (
    ("a path", lambda w: w.fitted.push_to_hub(w.folder), ConfigError, "must be a string"),
    ("no repository id", lambda w: w.fitted.push_to_hub("my model!"), ZePADError, "user/name"),
    ("private as a word", lambda w: w.fitted.push_to_hub("a/b", private="yes"), ConfigError, "True or False"),
    ("a card as a dict", lambda w: w.fitted.push_to_hub("a/b", card={"license": "mit"}), ConfigError, "CardDetails"),
    ("a message that is none", lambda w: w.fitted.push_to_hub("a/b", commit_message=None), ConfigError, "a string"),
):
    add("push_to_hub", kind, call, error, remedy)
for kind, call, error, remedy in (
    ("another suffix", lambda w: w.fitted.export(w.folder / "model.h5"), ConfigError, ".onnx"),
    ("a number", lambda w: w.fitted.export(3), ConfigError, "a string or a Path"),
    (
        "one side",
        lambda w: w.fitted.export(w.folder / "m.pt2", image_size=32),
        ConfigError,
        r"a tuple \(an integer, an integer\)",
    ),
    (
        "sides as words",
        lambda w: w.fitted.export(w.folder / "m.pt2", image_size=("8", "8")),
        ConfigError,
        UNQUOTED,
    ),
    ("too early", lambda w: w.built.export(w.folder / "m.pt2"), StageError, r"Call harden\(loader\) first"),
):
    add("export", kind, call, error, remedy)

# attacks ----------------------------------------------------------------------------------------------------------

PER_IMAGE = {
    "PGD": PGD,
    "APGD": APGD,
    "TargetedAPGD": TargetedAPGD,
    "Square": Square,
    "FeaturePGD": FeaturePGD,
    "SSP": SSP,
    "UAP": UAP,
    "PAPBase": PAPBase,
    "AdvEncoder": AdvEncoder,
    "UniversalFeatureAttack": UniversalFeatureAttack,
}
for name, attack in PER_IMAGE.items():
    for kind, eps, remedy in (
        ("eps as a string", "8/255", UNQUOTED),
        ("eps in 0..255", 8, "Write 8 / 255"),
        ("eps nan", NAN, NUMBER),
        ("eps None", None, NUMBER),
        ("eps as a tensor", torch.tensor(0.1), r"Convert it with float\(...\)"),
    ):
        add(name, kind, lambda _, a=attack, e=eps: a(eps=e), ConfigError, remedy)
for name, kind, settings, remedy in (
    ("PGD", "steps as a string", {"steps": "10"}, UNQUOTED),
    ("PGD", "half steps", {"steps": 2.5}, INTEGER),
    ("PGD", "steps nan", {"steps": NAN}, INTEGER),
    ("PGD", "an unknown norm", {"norm": "l0"}, "one of"),
    ("PGD", "a number for a norm", {"norm": math.inf}, "must be a string"),
    ("PGD", "a step as a string", {"step_size": "0.1"}, UNQUOTED),
    ("PGD", "momentum as a string", {"momentum": "1"}, UNQUOTED),
    ("PGD", "a start as a word", {"random_start": "no"}, FLAG),
    ("PGD", "a loss by name", {"loss_fn": "dlr"}, "must be a callable"),
    ("PGD", "restarts without a start", {"restarts": 2, "random_start": False}, "1 without a random start"),
    ("APGD", "no step", {"steps": 0}, "at least 1"),
    ("APGD", "steps as a string", {"steps": "10"}, UNQUOTED),
    ("APGD", "restarts as a list", {"restarts": [1]}, INTEGER),
    ("TargetedAPGD", "classes as a float", {"classes": 9.0}, "Write 9"),
    ("Square", "queries as a string", {"queries": "100"}, UNQUOTED),
    ("Square", "L2", {"norm": "l2"}, 'use APGD for "l2"'),
    ("Square", "a share in per cent", {"share": 80}, r"in \(0, 1\]"),
    ("FeaturePGD", "a kernel of even size", {"translation": 4}, "odd integer"),
    ("FeaturePGD", "a distance by name", {"distance": "cosine"}, "must be a callable"),
    ("UAP", "a head by name", {"head": "linear"}, "a torch.nn.Module or None"),
    ("UAP", "steps as a string", {"steps": "10"}, UNQUOTED),
    ("AdvEncoder", "a rate as a string", {"lr": "1e-3"}, UNQUOTED),
    ("AdvEncoder", "a width as a string", {"width": "8"}, UNQUOTED),
    ("SSP", "a layer by number", {"layer": 2}, "must be a string"),
    ("SSP", "a step as a string", {"step_size": "0.1"}, UNQUOTED),
):
    error = InputError if "head" in kind else ConfigError
    add(name, kind, lambda _, a=PER_IMAGE[name], s=settings: a(eps=EPS, **s), error, remedy)
FEW: dict[str, Any] = {
    "PGD": PGD(eps=EPS, steps=1),
    "APGD": APGD(eps=EPS, steps=1),
    "Square": Square(eps=EPS, queries=2),
    "FeaturePGD": FeaturePGD(eps=EPS, steps=1),
    "Transfer": Transfer(attack=PGD(eps=EPS, steps=1), surrogate=nn.Sequential(nn.Flatten(), nn.Linear(192, 3))),
    "WorstOf": WorstOf(attacks=(PGD(eps=EPS, steps=1),)),
}
for name, attack in FEW.items():
    for kind, arguments, remedy in (
        ("images as an array", (IMAGES.numpy(), LABELS), "images must be a torch.Tensor"),
        ("images in 0..255", (IMAGES * 255, LABELS), "Divide by 255"),
        ("one image", (IMAGES[0], LABELS), r"images\[None\]"),
        ("labels as a list", (IMAGES, LABELS.tolist()), "targets must be a torch.Tensor"),
        ("too few labels", (IMAGES, LABELS[:5]), "one per image"),
        ("an unknown label", (IMAGES, LABELS + 2), r"Set num_classes, or map the labels"),
        ("labels as floats", (IMAGES, LABELS.float()), r"labels.long\(\)"),
    ):
        if name == "FeaturePGD" and "label" in kind and "list" not in kind:
            continue  # it uses no labels
        add(f"{name}()", kind, attacked(attack, *arguments), InputError, remedy)
    add(f"{name}()", "a seed for a generator", attacked(attack, generator=0), ConfigError, "a Generator or None")
    add(f"{name}()", "a model by name", lambda w, a=attack: a("model", IMAGES, LABELS), InputError, "a callable")
for name, kind, make, error, remedy in (
    (
        "Transfer",
        "attack='PGD', surrogate=len",
        lambda: Transfer(attack="PGD", surrogate=len),
        ConfigError,
        "an Attack",
    ),
    (
        "Transfer",
        "attack=PGD(eps=EPS), surrogate=3",
        lambda: Transfer(attack=PGD(eps=EPS), surrogate=3),
        InputError,
        "a callable",
    ),
    (
        "WorstOf",
        "attacks=PGD(eps=EPS)",
        lambda: WorstOf(attacks=PGD(eps=EPS)),
        ConfigError,
        r"a tuple \[an Attack, ...\]",
    ),
    ("WorstOf", "attacks=(PGD,)", lambda: WorstOf(attacks=(PGD,)), ConfigError, r"such as PGD\(...\)"),
    ("WorstOf", "attacks=()", lambda: WorstOf(attacks=()), ConfigError, "at least one attack"),
    (
        "JointAPGD",
        "branch_logits=3, fuse=len",
        lambda: JointAPGD(eps=EPS, branch_logits=3, fuse=len),
        InputError,
        "a callable",
    ),
    (
        "JointAPGD",
        "branch_logits=len, fuse=len, cap='5'",
        lambda: JointAPGD(eps=EPS, branch_logits=len, fuse=len, cap="5"),
        ConfigError,
        UNQUOTED,
    ),
    (
        "DetectorEvading",
        "score=0.1, threshold=0.1",
        lambda: DetectorEvading(eps=EPS, score=0.1, threshold=0.1),
        InputError,
        "a callable",
    ),
    (
        "DetectorEvading",
        "score=len, threshold='0'",
        lambda: DetectorEvading(eps=EPS, score=len, threshold="0"),
        ConfigError,
        UNQUOTED,
    ),
    (
        "UniversalPerturbation",
        "delta=[0.0]",
        lambda: UniversalPerturbation(delta=[0.0], eps=EPS),
        InputError,
        "a torch.Tensor",
    ),
    (
        "UniversalPerturbation",
        "delta=torch.ones(1, 3, 2, 2)",
        lambda: UniversalPerturbation(delta=torch.ones(1, 3, 2, 2), eps=EPS),
        InputError,
        "Project it",
    ),
    ("UniversalPerturbation.load", "3", lambda: UniversalPerturbation.load(3), ConfigError, "a Path or a string"),
    (
        "UniversalPerturbation.load",
        "'nowhere'",
        lambda: UniversalPerturbation.load("nowhere"),
        CheckpointError,
        "cannot be read",
    ),
    (
        "art_classifier",
        "num_classes='3', image_shape=(3, 8, 8)",
        lambda: attacks.art_classifier(len, num_classes="3", image_shape=(3, 8, 8)),
        ConfigError,
        UNQUOTED,
    ),
    (
        "art_classifier",
        "num_classes=3, image_shape=(8, 8)",
        lambda: attacks.art_classifier(len, num_classes=3, image_shape=(8, 8)),
        ConfigError,
        "a tuple",
    ),
    ("foolbox_model", "'model'", lambda: attacks.foolbox_model("model"), InputError, "a callable"),
    ("mean_logits", "3", lambda: attacks.mean_logits(3), InputError, "a callable"),
    ("one_branch", "'victim'", lambda: attacks.one_branch(len, "victim"), ConfigError, INTEGER),
):
    add(name, kind, lambda _, make=make: make(), error, remedy)
for kind, arguments, error, remedy in (
    ("an encoder by name", ("resnet18", IMAGES), InputError, "a callable"),
    ("no encoder", ([], IMAGES), InputError, "empty list"),
    ("no images", (TinyEncoder(), None), InputError, "DataLoader"),
    ("images in 0..255", (TinyEncoder(), IMAGES * 255), InputError, "Divide by 255"),
    ("a generator", (TinyEncoder(), iter(DATA)), InputError, "iterable more than once"),
):
    add("SSP.fit", kind, lambda _, a=arguments: SSP(eps=EPS, epochs=1).fit(*a, progress=False), error, remedy)

# objectives, rules, detectors -------------------------------------------------------------------------------------

for name, kind, make, remedy in (
    ("trades", "beta='6'", lambda: objectives.trades(beta="6"), "a number of zero or more"),
    ("trades", "beta=-1", lambda: objectives.trades(beta=-1), "a number of zero or more"),
    ("mart", "beta=NAN", lambda: objectives.mart(beta=NAN), "a number of zero or more"),
    ("gen_af", "redundant_share='half'", lambda: objectives.gen_af(redundant_share="half"), "redundant_share must be"),
    ("restoration", "own_eps=8", lambda: objectives.restoration(own_eps=8), "Write 8 / 255"),
    (
        "restoration",
        "static={'steps': 3}",
        lambda: objectives.restoration(static={"steps": 3}),
        r"DAEMixture\(\*\*settings\)",
    ),
    ("restoration", "augmentation='flip'", lambda: objectives.restoration(augmentation="flip"), "a callable or None"),
    ("restoration", "own_steps='2'", lambda: objectives.restoration(own_steps="2"), "must be an integer"),
    (
        "static_adversarial_training",
        "restoration_weight='1'",
        lambda: objectives.static_adversarial_training(restoration_weight="1"),
        UNQUOTED,
    ),
    ("DAEMixture", "distances='cosine'", lambda: DAEMixture(distances="cosine"), r"a tuple \[a string, ...\]"),
    ("DAEMixture", "distances=('l1',)", lambda: DAEMixture(distances=("l1",)), "from"),
    ("DAEMixture", "budgets=1.0", lambda: DAEMixture(budgets=1.0), r"a tuple \[a number, ...\]"),
    ("DAEMixture", "steps='5'", lambda: DAEMixture(steps="5"), UNQUOTED),
    ("DAEMixture", "further={'other': 'resnet'}", lambda: DAEMixture(further={"other": "resnet"}), "a torch.nn.Module"),
    (
        "Recipe",
        "name='mine', objective='trades'",
        lambda: Recipe(name="mine", objective="trades"),
        "must be a callable",
    ),
    ("Recipe", "name=None, objective=len", lambda: Recipe(name=None, objective=len), "must be a string"),
    (
        "Recipe",
        "name='mine', objective=len, rates={'lr': 1}",
        lambda: Recipe(name="mine", objective=len, rates={"lr": 1}),
        r"Rates\(\*\*settings\)",
    ),
    ("FlipCrop", "padding='4'", lambda: objectives.FlipCrop(padding="4"), UNQUOTED),
    ("Bounded", "vote='0.5'", lambda: fusion.Bounded(vote="0.5"), "a number of zero or more"),
    ("Bounded", "vote=NAN", lambda: fusion.Bounded(vote=NAN), "a number of zero or more"),
    ("RFDM", "sharpness='3'", lambda: fusion.RFDM(sharpness="3"), "sharpness must be"),
    ("Temperature", "temperatures='1'", lambda: fusion.Temperature(temperatures="1"), "temperatures must be"),
    (
        "Temperature",
        "temperatures=(1.0, '2', 1.0)",
        lambda: fusion.Temperature(temperatures=(1.0, "2", 1.0)),
        "temperatures must be",
    ),
    ("MixedNUTS", "scale='1'", lambda: fusion.MixedNUTS(scale="1"), "scale must be"),
    ("MixedNUTS", "benign_weight=2", lambda: fusion.MixedNUTS(benign_weight=2), "benign_weight must be"),
    (
        "fuse_logits",
        "torch.rand(3, 2, 4), rule='no-such-rule'",
        lambda: fusion.fuse_logits(torch.rand(3, 2, 4), rule="no-such-rule"),
        "fusion.register",
    ),
    (
        "fuse_logits",
        "torch.rand(3, 2, 4), rule=3",
        lambda: fusion.fuse_logits(torch.rand(3, 2, 4), rule=3),
        "fusion.register",
    ),
    (
        "fuse_logits",
        "torch.rand(3, 2, 4), vote=1.0",
        lambda: fusion.fuse_logits(torch.rand(3, 2, 4), vote=1.0),
        "it has",
    ),
    ("fusion.register", "'My Rule', fusion.Mean", lambda: fusion.register("My Rule", fusion.Mean), "lower-case"),
    ("fusion.register", "'mine', fusion.Mean()", lambda: fusion.register("mine", fusion.Mean()), "must be a class"),
    ("detectors.register", "'mine', nn.Linear", lambda: detectors.register("mine", nn.Linear), "must be a class"),
):
    error = InputError if "a torch.nn.Module" in remedy else ConfigError
    add(name, kind, lambda _, make=make: make(), error, remedy)
for kind, branches, settings, remedy in (
    ("no branches", {}, {}, "one or more"),
    ("a list", [nn.Flatten()], {}, "must be a dict"),
    ("branches by name", {"a": "b"}, {}, "a torch.nn.Module"),
    ("a threshold as a string", {"a": nn.Flatten(), "b": nn.Flatten()}, {"threshold": "0.1"}, UNQUOTED),
    ("an infinite threshold", {"a": nn.Flatten(), "b": nn.Flatten()}, {"threshold": math.inf}, "a finite number"),
    ("an unknown rule", {"a": nn.Flatten()}, {"fusion": "x"}, "fusion.register"),
):
    error = InputError if "dict" in remedy or "Module" in remedy else ConfigError
    add("BranchEnsemble", kind, lambda _, b=branches, s=settings: BranchEnsemble(b, **s), error, remedy)

# encoders and data ------------------------------------------------------------------------------------------------

for kind, make, error, remedy in (
    ("a name", lambda: Encoder("resnet18"), InputError, "a torch.nn.Module"),
    ("a class", lambda: Encoder(TinyEncoder), InputError, r"such as TinyEncoder\(...\)"),
    ("preprocessing as a dict", lambda: Encoder(TinyEncoder(), preprocessing={}), ConfigError, r"\(\*\*settings\)"),
    ("another pooling", lambda: Encoder(TinyEncoder(), pooling="max"), ConfigError, '"class_token"'),
    ("a spec as a string", lambda: Encoder(TinyEncoder(), spec="timm:x"), ConfigError, "an EncoderSpec or None"),
):
    add("Encoder", kind, lambda _, make=make: make(), error, remedy)
for kind, arguments, settings, remedy in (
    ("an unknown source", ("mnist", "train"), {}, "'folder:PATH'"),
    ("a number", (10, "train"), {}, "a string or a Path"),
    ("an unknown split", ("digits", "val"), {}, '"train"'),
    ("a limit of 0", ("digits", "train"), {"limit": 0}, "at least 1, or None"),
    ("a limit as a string", ("digits", "train"), {"limit": "10"}, UNQUOTED),
    ("a size as a string", ("digits", "train"), {"size": "32"}, UNQUOTED),
    ("three sides", ("digits", "train"), {"size": (3, 32, 32)}, r"\(an integer, an integer\)"),
    ("a seed as a string", ("digits", "train"), {"seed": "0"}, UNQUOTED),
    ("a root as a number", ("digits", "train"), {"root": 3}, "a Path or None"),
    ("download as a word", ("digits", "train"), {"download": "no"}, FLAG),
):
    add("load_data", kind, lambda _, a=arguments, s=settings: load_data(*a, **s), ConfigError, remedy)

# evaluation -------------------------------------------------------------------------------------------------------

PGD1 = Attacker(name="PGD", threat_model="white-box", attack=PGD(eps=EPS, steps=1))
for kind, settings, error, remedy in (
    ("attackers by name", {"attackers": ["PGD"]}, ConfigError, r"attackers\[0\] must be an Attacker"),
    ("an attack for an attacker", {"attackers": [PGD(eps=EPS)]}, ConfigError, r"attackers\[0\] must be an Attacker"),
    ("one attacker", {"attackers": PGD1}, ConfigError, r"a list \[an Attacker, ...\]"),
    ("one name twice", {"attackers": [PGD1, PGD1]}, InputError, "a name of its own"),
    ("a model by name", {"model": "model"}, InputError, "a callable"),
    ("a generator", {"loader": iter(DATA)}, InputError, "iterable more than once"),
    ("no labels", {"loader": [IMAGES]}, InputError, "images, labels"),
    ("images in 0..255", {"loader": [(IMAGES * 255, LABELS)]}, InputError, "Divide by 255"),
    ("samples as a string", {"samples": "4"}, ConfigError, UNQUOTED),
    ("negative samples", {"samples": -1}, ConfigError, "zero or more"),
    ("a seed nan", {"seed": NAN}, ConfigError, INTEGER),
    ("a folder as a module", {"folder": nn.Flatten()}, ConfigError, "a string, a Path or None"),
    ("resume as a path", {"resume": "runs"}, ConfigError, FLAG),
    ("resume without a folder", {"resume": True}, ConfigError, "the one to resume from"),
    ("sanity as a word", {"sanity": "no"}, ConfigError, FLAG),
    ("a name as a number", {"name": 3}, ConfigError, "a string"),
):

    def measured(world: World, settings: dict[str, Any] = settings) -> EvalReport:
        given = {"model": world.classifier, "loader": DATA, "attackers": [PGD1], "progress": False, **settings}
        return evaluate(given.pop("model"), given.pop("loader"), given.pop("attackers"), **given)

    add("evaluate", kind, measured, error, remedy)
for kind, settings, remedy in (
    ("a name as a number", {"name": 1}, "must be a string"),
    ("an unknown threat model", {"threat_model": "grey-box"}, '"semi-black-box"'),
    ("an attack by name", {"attack": "PGD"}, "must be an Attack"),
    ("an attack that is a class", {"attack": PGD}, "must be an Attack"),
    ("a model for a target", {"target": 3}, "must be a callable"),
):
    given = {"name": "x", "threat_model": "white-box", "attack": PGD(eps=EPS), **settings}
    add("Attacker", kind, lambda _, given=given: Attacker(**given), ConfigError, remedy)
NO_UNIVERSAL: dict[str, Any] = {"universal": {}}
for name, kind, suite, error, remedy in (
    ("semi_black_box", "'victim'", lambda w: semi_black_box("victim", DATA, eps=EPS), InputError, "a callable"),
    ("semi_black_box", "eps='8/255'", lambda w: semi_black_box(w.encoder, DATA, eps="8/255"), ConfigError, UNQUOTED),
    (
        "semi_black_box",
        "eps=8",
        lambda w: semi_black_box(w.encoder, DATA, eps=8, **NO_UNIVERSAL),
        ConfigError,
        "Write 8 / 255",
    ),
    (
        "semi_black_box",
        "universal=[SSP]",
        lambda w: semi_black_box(w.encoder, DATA, eps=EPS, universal=[SSP]),
        ConfigError,
        "a dict",
    ),
    (
        "semi_black_box",
        "steps='20'",
        lambda w: semi_black_box(w.encoder, DATA, eps=EPS, steps="20", **NO_UNIVERSAL),
        ConfigError,
        UNQUOTED,
    ),
    (
        "semi_black_box_plus",
        "None",
        lambda w: semi_black_box_plus(w.encoder, None, DATA, eps=EPS),
        InputError,
        "a callable",
    ),
    ("replica", "[w.encoder], {}", lambda w: replica([w.encoder], {}, DATA, eps=EPS), InputError, "a dict"),
    ("replica", "{}, {}", lambda w: replica({}, {}, DATA, eps=EPS, **NO_UNIVERSAL), InputError, "at least one encoder"),
    ("published", "", lambda w: published(w.encoder, eps=EPS), InputError, "a dict"),
    (
        "published",
        "{'victim': w.encoder}, eps=NAN",
        lambda w: published({"victim": w.encoder}, eps=NAN),
        ConfigError,
        NUMBER,
    ),
    (
        "white_box",
        "num_classes='3'",
        lambda w: white_box(w.classifier, eps=EPS, num_classes="3"),
        ConfigError,
        UNQUOTED,
    ),
    (
        "white_box",
        "num_classes=3.0",
        lambda w: white_box(w.classifier, eps=EPS, num_classes=3.0),
        ConfigError,
        "Write 3",
    ),
    ("universal_attacks", "eps='10/255'", lambda w: universal_attacks(eps="10/255"), ConfigError, UNQUOTED),
    ("save_report", "{}, w.folder", lambda w: save_report({}, w.folder), ConfigError, "an EvalReport"),
    ("EvalReport.load", "3", lambda w: EvalReport.load(3), ConfigError, "a string or a Path"),
    ("EvalReport.load", "'nowhere'", lambda w: EvalReport.load("nowhere"), CheckpointError, "Check the path"),
    ("matched", "None", lambda w: protocols.matched(None, w.encoder, DATA, DATA), InputError, "a torch.nn.Module"),
    (
        "matched",
        "protocol={}",
        lambda w: protocols.matched(w.encoder, w.encoder, DATA, DATA, protocol={}),
        ConfigError,
        "Protocol",
    ),
    ("transfer", "3", lambda w: protocols.transfer(w.encoder, 3, DATA, DATA, DATA), InputError, "a torch.nn.Module"),
    (
        "train_replica",
        "{}",
        lambda w: protocols.train_replica(w.encoder, w.encoder, DATA, {}),
        ConfigError,
        "HardenConfig",
    ),
    ("replica_of", "'folder', {}", lambda w: protocols.replica_of("folder", {}, DATA), InputError, "a ZePAD"),
    ("replica_of", "{}", lambda w: protocols.replica_of(w.fitted, {}, DATA), ConfigError, "all public encoders"),
    (
        "replica_branches",
        "{}, num_classes=3.0",
        lambda w: protocols.replica_branches({}, DATA, num_classes=3.0),
        ConfigError,
        "Write 3",
    ),
    (
        "replica_branches",
        "{}, num_classes=3",
        lambda w: protocols.replica_branches({}, DATA, num_classes=3),
        InputError,
        "at least one",
    ),
):
    add(name, kind, suite, error, remedy)


@pytest.mark.parametrize(
    ("mistake", "error", "remedy"),
    [pytest.param(*rest, id=f"{call}: {kind}") for call, kind, *rest in MISTAKES],
)
def test_a_mistake_is_refused_with_its_remedy_and_changes_nothing(
    world: World, mistake: Callable[[World], Any], error: type[ZePADError], remedy: str
) -> None:
    before = world.state()
    with pytest.raises(error, match=remedy) as raised:
        mistake(world)
    assert raised.type in (error, *error.__subclasses__())
    assert world.state() == before


def test_the_table_is_long_and_no_mistake_is_in_it_twice() -> None:
    assert len(MISTAKES) >= 150
    assert len({(call, kind) for call, kind, *_ in MISTAKES}) == len(MISTAKES)


# what is allowed and probably not meant ---------------------------------------------------------------------------


def test_one_encoder_given_twice_is_warned_about_and_two_are_not() -> None:
    encoder = TinyEncoder()
    with pytest.warns(
        InputWarning, match=r"victim and auxiliary are the same encoder.* Pass two public encoders"
    ) as found:
        ZePAD.from_encoders(encoder, encoder)
    assert [Path(warning.filename).name for warning in found] == [Path(__file__).name]
    with pytest.warns(InputWarning, match="victim and benign are the same encoder"):
        ZePAD.from_encoders(encoder, TinyEncoder(), benign=copy.deepcopy(encoder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZePAD.from_encoders(encoder, TinyEncoder())


def test_labels_with_gaps_are_warned_about_until_their_number_is_confirmed(world: World) -> None:
    gaps = torch.tensor([5, 9]).repeat(6)
    defense, config = copy.deepcopy(world.fitted), HeadConfig(epochs=1)
    with pytest.warns(InputWarning, match=r"the labels 5, 9 make 10 classes, of which 8 have no image. Map") as found:
        defense.fit_heads([(IMAGES, gaps)], config, progress=False)
    assert [Path(warning.filename).name for warning in found] == [Path(__file__).name]
    assert defense.num_classes == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defense.fit_heads([(IMAGES, gaps)], config, num_classes=10, progress=False)


def test_a_warning_of_calibration_points_at_the_line_of_the_caller(world: World) -> None:
    defense = copy.deepcopy(world.fitted).configure(fusion="bounded")
    images, labels = toy_data(60, size=8)
    with pytest.warns(CalibrationWarning) as found:
        defense.calibrate([(images, labels.flip(0))], benign_floor=1.0, fpr=0.2)
    assert [Path(warning.filename).name for warning in found] == [Path(__file__).name]


# how the check is made --------------------------------------------------------------------------------------------


def test_a_checked_call_keeps_name_signature_and_documentation() -> None:
    assert inspect.signature(ZePAD.harden) == inspect.signature(inspect.unwrap(ZePAD.harden))
    assert list(inspect.signature(ZePAD.harden).parameters)[:3] == ["self", "loader", "config"]
    assert ZePAD.harden.__doc__.startswith("Adversarially fine-tune")
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'|got an unexpected"):
        ZePAD.harden(None, DATA, epochs=3)


KINDS: list[tuple[Any, list[Any], list[Any]]] = [
    (int, [0, -1, 10**400], [True, 1.0, NAN, "1", None, np.int64(1), torch.tensor(1)]),
    (float, [0, 1.5, math.inf, np.float64(1)], [True, NAN, "1", None, torch.tensor(1.0)]),
    (bool, [True, False], [0, 1, "True", None, np.bool_(True)]),
    (str | None, ["", None], [b"", 0, Path()]),
    (str | Path, ["x", Path()], [None, 3, nn.Flatten()]),
    (Literal["a", 2], ["a", 2], ["b", 2.0, True, None, ["a"], torch.zeros(2)]),
    (tuple[int, int], [(1, 2), [1, 2]], [(1,), (1, 2, 3), (1, "2"), 12, "12"]),
    (tuple[str, ...], [(), ("a",), ["a"]], ["a", (1,), {"a": 1}]),
    (Sequence[str], [[], ("a", "b")], ["ab", [1], {"a"}, None]),
    (Mapping[str, int], [{}, {"a": 1}], [{1: 1}, {"a": "1"}, [("a", 1)]]),
    (HardenConfig, [HardenConfig()], [HardenConfig, {}, BenignConfig(), None]),
    (nn.Module | None, [nn.Flatten(), None], [nn.Flatten, len, "x"]),
    (Callable[[Tensor], Tensor], [len, nn.Flatten(), TinyEncoder], [3, "len", None]),
    (Iterable[Any], [[], "any", 3], []),
    (Any, [None, 3], []),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), KINDS, ids=[str(kind) for kind, *_ in KINDS])
def test_a_value_is_taken_if_it_is_of_the_annotated_type(kind: Any, right: list[Any], wrong: list[Any]) -> None:
    def call(value):
        return value

    call.__annotations__["value"] = kind
    for value in right:
        assert checked(call)(value) is value
    for value in wrong:
        with pytest.raises(ZePADError, match=r"value(\[.*\])* must be .*; got "):
            checked(call)(value)


def test_no_value_breaks_or_floods_a_message() -> None:
    @checked
    def call(count: int) -> None:
        del count

    for value in ("\x1b[31m\n" * 1000, list(range(10**5)), {"a": "b" * 10**5}, nn.Sequential(*[nn.ReLU()] * 500)):
        with pytest.raises(ConfigError) as raised:
            call(value)
        assert len(str(raised.value)) < 250
        assert str(raised.value).isprintable()


# the command line -------------------------------------------------------------------------------------------------

HARDEN = ["harden", "zepad:digits-barlow-twins", "zepad:digits-simclr"]
COMMANDS: list[tuple[list[str], int, str]] = [
    (["attack", "resnet18", "--out", "p.safetensors"], 1, "an encoder spec must read"),
    (["attack", "zepad:digits-simclr", "--out", "p", "--method", "FGSM"], 1, "universal attacks are AdvEncoder"),
    (["attack", "zepad:digits-simclr", "--out", "p", "--eps", "10"], 1, "Write 10 / 255"),
    (["attack", "zepad:digits-simclr", "--out", "p", "--eps", "a/b"], 1, "a fraction such as 10/255"),
    (["attack", "zepad:digits-simclr", "--out", "p", "--data", "mnist"], 1, "'folder:PATH'"),
    (["attack", "zepad:digits-simclr", "--out", "p", "--split", "val"], 1, '"train"'),
    (["attack", "zepad:digits-simclr", "--out", "p", "--limit", "0"], 2, "Invalid value"),
    (["attack", "zepad:digits-simclr"], 2, "Missing option"),
    (["evaluate", "nowhere", "--out", "report"], 1, "an encoder spec must read"),
    (["evaluate", "nowhere", "--out", "report", "--eps", "1e999"], 1, "a positive number"),
    (["evaluate", "nowhere", "--out", "report", "--universal", "X"], 1, "universal attacks are"),
    (["evaluate", "nowhere", "--out", "report", "--perturbation", "nothing"], 1, "cannot be read"),
    (["evaluate", "nowhere", "--out", "report", "--replica", "digits"], 1, "an undefended encoder has none"),
    (["evaluate", "zepad:digits-simclr", "--out", "report", "--steps", "many"], 2, "Invalid value"),
    (["compare", "nowhere", "--out", "report"], 1, "an encoder spec must read"),
    (["info", "nowhere"], 1, "holds no config.json"),
    (["info", __file__], 1, "config.json"),
    (["predict", "nowhere", __file__], 1, "Pass the folder of a saved model"),
    (["card", "nowhere"], 1, "config.json"),
    (["push", "nowhere", "a/b"], 1, "config.json"),
    (["pull", "no such repository!", "folder"], 1, "user/name"),
    (["harden", "resnet18", "zepad:digits-simclr", "--data", "digits", "--out", "m"], 1, "an encoder spec must read"),
    ([*HARDEN, "--data", "digits"], 2, "Missing option"),
    ([*HARDEN, "--data", "mnist", "--out", "m"], 1, "'folder:PATH'"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--eps", "8"], 1, "Write 8 / 255"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--preset", "safe"], 1, "private, published, cautious, paper"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--resume"], 1, "--checkpoint-dir"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--device", "gpu"], 1, "device must be one that is there"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--device", "meta"], 1, "device must be one that computes"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--config", "no.yaml"], 1, "--save-config"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--save-config", "run.txt"], 1, ".yaml, .yml or .json"),
    ([*HARDEN, "--data", "digits", "--out", "m", "--val-data", "digits"], 1, "has train and test"),
    ([*HARDEN, "--data", "digits", "--out", f"{__file__}/m"], 1, "Choose another --out"),
    (["fit", "nowhere", "--data", "digits"], 1, "Pass the folder of a saved model"),
    (["fit", "nowhere", "--data", "digits", "--heads-only", "--keep-heads"], 1, "trains heads alone"),
    (["calibrate", "nowhere", "--data", "digits"], 1, "Pass the folder of a saved model"),
    (["calibrate", "nowhere", "--data", "digits", "--split", "train"], 1, "The train split was trained on"),
    (["export", "nowhere", "model.onnx"], 1, "Pass the folder of a saved model"),
    (["export", "nowhere"], 2, "Missing argument"),
    (["predict", "nowhere", __file__, "--out", "p.xlsx"], 1, ".csv, .jsonl, .parquet"),
    (["predict", "nowhere", "photos"], 2, "does not exist"),
    (["demo", "--seed", "x"], 2, "Invalid value"),
    (["hardne"], 2, "No such command"),
]


@pytest.mark.parametrize(("arguments", "code", "remedy"), COMMANDS, ids=[" ".join(words) for words, *_ in COMMANDS])
def test_a_mistake_in_a_command_gives_its_exit_code_and_remedy(
    arguments: list[str], code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.chdir(tmp_path)
    done = zepad(*arguments)
    assert done.returncode == code, done.stderr
    assert remedy in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []

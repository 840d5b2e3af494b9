"""A model that keeps the undefended victim as its reference, in memory and after loading."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, ConfigError, HardenConfig, HeadConfig, StageError, ZePAD, fusion
from zepad.detectors import resolve
from zepad.errors import CheckpointError, InputError
from zepad.evaluation import Attacker, evaluate, weights_digest
from zepad.functional import detection_score, hardened_log_probabilities, smoothed
from zepad.fusion import fuse_logits
from zepad.persistence import read_config
from zepad.persistence.config import Base
from zepad.persistence.contents import Home
from zepad.types import REFERENCE, ROLES

GUARDED = (*ROLES, REFERENCE)  # roles of a model whose detector needs the undefended victim
IMAGES, LABELS = toy_data(80, seed=5)
TRAINING = toy_data(48)
NAMES = ("gap", "features", "combined")
KEPT = ("features", "combined")
FITTED = ("features", "combined")
RULES = {
    "rfdm": {"sharpness": 2.5},
    "mean": {},
    "temperature": {"temperatures": (0.3, 1.7, 2.2)},
    "bounded": {"vote": 0.123456789012345678},
    "mixed": {"scale": 2.0, "power": 3.0, "bias": -0.5, "benign_weight": 0.1},
}


def build(rule):
    return fusion.RULES.get(rule)(**RULES[rule])


def harden(model):
    return model.harden([TRAINING], HardenConfig(epochs=1, steps=1), progress=False)


def fit_benign(model):
    return model.fit_benign([TRAINING], BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)


def fit_heads(model):
    return model.fit_heads([TRAINING], HeadConfig(epochs=1), progress=False)


@pytest.fixture(scope="module")
def public():
    """The encoders as they were published."""
    torch.manual_seed(1)
    return TinyEncoder().eval(), TinyEncoder().eval()


@pytest.fixture(scope="module")
def _guarded(public):
    torch.manual_seed(1)
    model = ZePAD.from_encoders(*public, detector="combined", preset="paper")
    loader = DataLoader(TensorDataset(*TRAINING), batch_size=16)
    model.harden(loader, HardenConfig(epochs=2, steps=1, lr=1e-2), progress=False)
    benign, heads = BenignConfig(epochs=5, lr=1e-2), HeadConfig(epochs=20)
    return model.fit_benign(loader, benign, head_config=heads, progress=False)


@pytest.fixture
def guarded(_guarded):
    """A fitted defense with a reference, not calibrated; a copy for each test."""
    return copy.deepcopy(_guarded)


def calibrated(model, name, **settings):
    return model.configure(detector=name, **settings).calibrate(IMAGES, fpr=0.1)


def load(path, **modules):
    return ZePAD.from_pretrained(path, **{"victim": TinyEncoder(), "auxiliary": TinyEncoder(), **modules})


def read(folder):
    return json.loads((folder / "config.json").read_text())


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))


def alter(folder, name, change):
    """Replace a weight file as someone would who can also write the config."""
    blob = write_tensors(change(read_tensors((folder / name).read_bytes())))
    (folder / name).write_bytes(blob)
    values = read(folder)
    values["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    write(folder, values)


@pytest.fixture
def saved(guarded, tmp_path):
    calibrated(guarded, "combined").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) and value.dtype == second[key].dtype for key, value in first.items())
    facts = ("stage", "num_classes", "class_names", "threshold", "provenance")
    assert [getattr(one, fact) for fact in facts] == [getattr(other, fact) for fact in facts]
    assert (one.fusion, one.detector.rule) == (other.fusion, other.detector.rule)


# the reference


@pytest.mark.parametrize("detector", ["gap", resolve("gap", argument="detector")])
def test_a_detector_that_needs_no_reference_keeps_none(detector):
    model = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), detector=detector, preset="paper")
    assert list(model.encoders) == list(ROLES)


@pytest.mark.parametrize("name", KEPT)
def test_the_reference_is_the_public_victim_before_and_after_hardening(name, public):
    model = ZePAD.from_encoders(*public, detector=name, preset="paper")
    assert list(model.encoders) == list(GUARDED)
    own = {id(parameter) for parameter in model.encoder("reference").parameters()}
    assert own.isdisjoint(map(id, public[0].parameters()))
    assert own.isdisjoint(map(id, model.encoder("victim").parameters()))
    fit_benign(harden(model))
    assert set(model.heads) == set(GUARDED)
    for key, value in public[0].state_dict().items():
        assert torch.equal(model.encoder("reference").backbone.state_dict()[key], value)
    assert not torch.equal(model.encoder("victim").backbone.conv.weight, public[0].conv.weight)


def test_a_reference_changes_no_branch(public):
    plain, guarded = (
        fit_benign(harden(ZePAD.from_encoders(*public, detector=name, preset="paper"))) for name in ("gap", "features")
    )
    assert torch.equal(plain.branch_logits(IMAGES), guarded.branch_logits(IMAGES))
    assert guarded.branch_names == plain.branch_names == ROLES
    assert torch.equal(plain.predict_proba(IMAGES), guarded.predict_proba(IMAGES))


def test_the_inputs_are_what_encoders_and_heads_say(guarded):
    seen = guarded.detector_inputs(IMAGES)
    features = {role: guarded.encoder(role)(IMAGES) for role in GUARDED}
    assert torch.equal(seen.logits, guarded.branch_logits(IMAGES))
    assert torch.equal(seen.reference_logits, guarded.branch("reference")(IMAGES))
    blurred = guarded.encoder("reference")(smoothed(IMAGES))
    assert torch.equal(seen.hardened_features, torch.cat([features["victim"], features["auxiliary"]], dim=1))
    assert torch.equal(seen.blurred_features, blurred)
    assert torch.equal(seen.reference_features, features["reference"])
    guarded.configure(detector="gap")
    assert guarded.detector_inputs(IMAGES)[1:] == (None,) * 4  # two passes are spared


def test_scores_are_those_of_the_functions(guarded):
    guarded.configure(detector="gap")
    expected = detection_score(guarded.branch_logits(IMAGES))
    torch.testing.assert_close(guarded.detection_score(IMAGES), expected)
    torch.testing.assert_close(guarded.score(IMAGES), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_the_batch_and_has_a_gradient(guarded, name):
    calibrated(guarded, name)
    whole = guarded.detection_score(IMAGES)
    torch.testing.assert_close(guarded.detection_score(IMAGES.split(7)), whole, rtol=1e-3, atol=1e-4)
    points = IMAGES[:9].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(guarded.score(points).sum(), points)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_an_attack_on_the_public_victim_wakes_the_detector_of_features(guarded, public):
    """The features of the public victim are moved where no benign image has them; the other encoders hardly follow."""
    calibrated(guarded, "features")
    points = IMAGES.clone()
    with torch.no_grad():
        target = public[0](IMAGES).roll(1, dims=0)
    for _ in range(20):
        points.requires_grad_()
        (gradient,) = torch.autograd.grad((public[0](points) - target).square().sum(), points)
        points = (IMAGES + (points.detach() - IMAGES - 0.02 * gradient.sign()).clamp(-0.1, 0.1)).clamp(0, 1)
    assert guarded.detection_score(points).median() > guarded.detection_score(IMAGES).median() + 1


@pytest.mark.parametrize("name", KEPT)
def test_new_heads_refit_that_of_the_reference_and_forget_the_detector(guarded, name):
    calibrated(guarded, name)
    encoders = {key: value.clone() for key, value in guarded.encoders.state_dict().items()}
    before = guarded.heads["reference"]
    loader = DataLoader(TensorDataset(TRAINING[0], TRAINING[1] % 2), batch_size=16)
    guarded.fit_heads(loader, HeadConfig(epochs=2), progress=False)
    assert set(guarded.heads) == set(GUARDED)
    assert guarded.heads["reference"] is not before
    assert guarded.branch("reference")(IMAGES).shape == (80, 2)
    assert all(torch.equal(value, encoders[key]) for key, value in guarded.encoders.state_dict().items())
    assert guarded.threshold is None
    assert guarded.detector.rule.name == name
    assert not guarded.detector.state_dict()
    with pytest.raises(StageError, match=r"Call calibrate\(benign_loader\) first"):
        guarded.detect(IMAGES)
    assert guarded.calibrate(IMAGES, fpr=0.1).detect(IMAGES).dtype == torch.bool


def test_a_hardened_model_knows_no_head_of_the_reference(public):
    model = ZePAD.from_encoders(*public, detector="features", preset="paper")
    harden(model)
    with pytest.raises(StageError, match=r"the reference branch has no head yet. Call fit_benign\(loader\) first"):
        model.branch("reference")


# stages and settings


@pytest.mark.parametrize("name", KEPT)
def test_a_detector_that_needs_a_reference_is_refused_where_there_is_none(fitted, name):
    before = (fitted.fusion, fitted.detector, fitted.threshold, fitted.provenance)
    with pytest.raises(
        ConfigError, match=rf"needs the undefended victim.*from_encoders\(\.\.\., detector=\"{name}\"\)"
    ):
        fitted.configure(fusion="mean", detector=name)
    assert (fitted.fusion, fitted.detector, fitted.threshold, fitted.provenance) == before


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gap"])
def test_detecting_before_calibration_names_the_call_to_make(guarded, name):
    guarded.configure(detector=name)
    assert guarded.threshold is None
    with pytest.raises(StageError, match=rf'the detector "{name}" has no threshold yet. Call calibrate\(benign_loader'):
        guarded.detect(IMAGES)
    if name in FITTED:
        for call in (guarded.detection_score, guarded.score):
            with pytest.raises(StageError, match=rf'"{name}" is not fitted. Call calibrate\(benign_loader\) first'):
                call(IMAGES)
    else:
        assert guarded.detection_score(IMAGES).shape == (80,)
    assert guarded.predict(IMAGES).shape == (80,)  # a decision needs no detector


def test_the_papers_detector_has_the_papers_threshold_from_the_start(guarded):
    assert guarded.configure(detector="gap").threshold == 0.1
    assert guarded.detect(IMAGES).shape == (80,)


@pytest.mark.parametrize("name", NAMES)
def test_inspecting_tells_what_there_is_to_tell(guarded, name):
    guarded.configure(fusion="bounded", detector=name)
    report = guarded.inspect(IMAGES[:3])
    assert report.weights is None
    assert "weight" not in str(report)
    assert (report.scores is None) == (name in FITTED)
    assert (report.flagged is None) == (name != "gap")
    assert ("not scored" in str(report)) == (name != "gap")
    guarded.calibrate(IMAGES, fpr=0.1)
    report = guarded.inspect(IMAGES[:3])
    torch.testing.assert_close(report.scores, guarded.detection_score(IMAGES[:3]))
    assert torch.equal(report.flagged, guarded.detect(IMAGES[:3]))
    assert report.threshold == guarded.threshold


@pytest.mark.parametrize("rule", RULES)
def test_another_rule_changes_the_decision_and_no_encoder_head_or_detector(guarded, rule):
    calibrated(guarded, "combined")
    guarded.provenance["evaluation"] = {"images": 1}
    state = {key: value.clone() for key, value in guarded.state_dict().items()}
    detector, threshold, scores = guarded.detector, guarded.threshold, guarded.detection_score(IMAGES)
    assert guarded.configure(fusion=build(rule)) is guarded
    assert guarded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in guarded.state_dict().items())
    assert guarded.detector is detector
    assert guarded.threshold == threshold
    assert torch.equal(guarded.detection_score(IMAGES), scores)  # the fusion has no part in it
    assert guarded.provenance.keys() == {"preset", "harden", "benign"}  # what was measured is forgotten
    expected = fuse_logits(guarded.branch_logits(IMAGES), rule=rule, **RULES[rule])
    torch.testing.assert_close(guarded(IMAGES), expected)
    torch.testing.assert_close(guarded.predict_proba(IMAGES), expected.softmax(dim=-1))
    assert torch.equal(guarded.fuse(guarded.branch_logits(IMAGES)), guarded(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_another_detector_changes_no_decision_and_has_no_threshold_yet(guarded, name):
    calibrated(guarded, "combined", fusion="bounded")
    state = {key: value.clone() for key, value in guarded.state_dict().items() if not key.startswith("detector.")}
    rule, decided = guarded.fusion, guarded.predict_proba(IMAGES)
    guarded.configure(detector=resolve(name, argument="detector"))
    assert guarded.fusion is rule
    assert torch.equal(guarded.predict_proba(IMAGES), decided)
    assert guarded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in guarded.state_dict().items())
    assert guarded.threshold == (0.1 if name == "gap" else None)
    assert "calibration" not in guarded.provenance


@pytest.mark.parametrize("setting", [{"fusion": "vote"}, {"detector": "vote"}, {"fusion": "mean", "detector": "vote"}])
def test_an_unknown_setting_is_refused_and_changes_nothing(guarded, setting):
    before = (guarded.fusion, guarded.detector, guarded.provenance)
    with pytest.raises(ConfigError, match="must be .* or .*; got 'vote'"):
        guarded.configure(**setting)
    with pytest.raises(ConfigError, match="must be .* or .*; got 'vote'"):
        ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), **setting, preset="paper")
    assert (guarded.fusion, guarded.detector, guarded.provenance) == before


def test_rule_and_detector_belong_to_the_identity_of_a_model(guarded):
    digests = {weights_digest(guarded.configure(fusion=rule)) for rule in RULES}
    digests |= {weights_digest(guarded.configure(detector=name)) for name in NAMES if name != "combined"}
    digests |= {weights_digest(guarded.configure(fusion=fusion.Bounded(vote=vote))) for vote in (1, 2)}
    assert len(digests) == len(RULES) + 2 + 2


def test_the_hardened_branches_are_safe_from_the_benign_one_in_a_whole_model(guarded):
    """The promise of `bounded` on a model: no head of the benign branch overturns a decision that leads enough."""
    guarded.configure(fusion=fusion.Bounded(vote=0.05))
    hardened = hardened_log_probabilities(guarded.branch_logits(IMAGES))
    best = hardened.topk(2, dim=-1).values
    safe = best[:, 0] - best[:, 1] > 0.05 + 1e-5
    assert safe.any()
    for label in range(3):
        with torch.no_grad():
            guarded.heads["benign"][-1].bias.copy_(1e6 * torch.nn.functional.one_hot(torch.tensor(label), 3))
        assert torch.equal(guarded.predict(IMAGES)[safe], hardened.argmax(dim=-1)[safe])
    assert (guarded.branch("benign")(IMAGES).argmax(dim=-1) == 2).all()


# saving and loading


@pytest.mark.parametrize("name", NAMES)
def test_every_detector_comes_back_bit_for_bit(guarded, tmp_path, name):
    calibrated(guarded, name, fusion="bounded").save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {f"{role}.safetensors" for role in (*GUARDED, "heads")} | (
        {"detector.safetensors"} if name in FITTED else set()
    )
    loaded = load(tmp_path)
    assert_same(loaded, guarded)
    assert loaded.threshold == guarded.threshold
    assert torch.equal(loaded.detection_score(IMAGES), guarded.detection_score(IMAGES))
    assert torch.equal(loaded.detect(IMAGES), guarded.detect(IMAGES))
    assert torch.equal(loaded.predict_proba(IMAGES), guarded.predict_proba(IMAGES))
    assert not any(part.training for part in loaded.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_that_is_not_calibrated_comes_back_so(guarded, tmp_path, name):
    guarded.configure(detector=name).save_pretrained(tmp_path)
    assert not (tmp_path / "detector.safetensors").exists()
    loaded = load(tmp_path)
    assert_same(loaded, guarded)
    assert loaded.threshold == (0.1 if name == "gap" else None)
    loaded.calibrate(IMAGES, fpr=0.1)
    guarded.calibrate(IMAGES, fpr=0.1)
    assert_same(loaded, guarded)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_comes_back_with_its_parameters(guarded, tmp_path, rule):
    guarded.configure(fusion=build(rule)).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.fusion == guarded.fusion
    assert torch.equal(loaded.predict_proba(IMAGES), guarded.predict_proba(IMAGES))


@pytest.mark.parametrize("stage", ["built", "hardened", "fitted"])
def test_a_model_with_a_reference_goes_on_from_the_stage_it_was_saved_at(public, tmp_path, stage):
    original = ZePAD.from_encoders(*public, detector="features", preset="paper")
    if stage != "built":
        harden(original)
    if stage == "fitted":
        fit_benign(original)
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, original)
    following = {"built": harden, "hardened": fit_benign, "fitted": fit_heads}[stage]
    assert_same(following(loaded), following(original))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", NAMES)
def test_copies_score_the_same(guarded, name, duplicate):
    twin = duplicate(calibrated(guarded, name))
    assert torch.equal(twin.detection_score(IMAGES), guarded.detection_score(IMAGES))
    assert twin.threshold == guarded.threshold


def test_a_victim_of_the_callers_is_the_architecture_of_the_reference_too(tmp_path):
    original = ZePAD.from_encoders(TinyEncoder(), "zepad:digits-simclr", detector="features", preset="paper")
    original.save_pretrained(tmp_path)
    records = read(tmp_path)["encoders"]
    assert records["reference"]["architecture_of"] == "victim"
    assert_same(ZePAD.from_pretrained(tmp_path, victim=TinyEncoder()), original)
    with pytest.raises(CheckpointError, match=r"the victim encoder is .*victim=module"):
        ZePAD.from_pretrained(tmp_path)


def test_encoders_of_known_sources_need_no_module(tmp_path):
    original = ZePAD.from_encoders(
        "zepad:digits-barlow-twins", "zepad:digits-simclr", detector="features", preset="paper"
    )
    original.save_pretrained(tmp_path)
    assert_same(ZePAD.from_pretrained(tmp_path), original)


def test_saving_over_a_model_with_a_reference_leaves_nothing_of_it(saved, fitted):
    fitted.save_pretrained(saved)
    assert {path.name for path in saved.glob("*.safetensors")} == {f"{role}.safetensors" for role in (*ROLES, "heads")}
    assert_same(load(saved), fitted)


def test_heads_alone_are_saved_with_the_references_and_the_detector(saved, guarded, tmp_path):
    calibrated(guarded, "combined")
    home = Base(repo_id="me/x", revision="0" * 40)
    guarded._home = Home(base=home, files=read_config(saved / "config.json").files)  # as a push would leave it
    folder = tmp_path / "heads"
    guarded.save_pretrained(folder, heads_only=True)
    assert {path.name for path in folder.glob("*.safetensors")} == {"heads.safetensors", "detector.safetensors"}
    stored = {key.partition(".")[0] for key in read_tensors((folder / "heads.safetensors").read_bytes())}
    assert stored == set(GUARDED)
    for role in GUARDED:
        shutil.copyfile(saved / f"{role}.safetensors", folder / f"{role}.safetensors")
    assert_same(load(folder), guarded)

    guarded.encoder("reference").backbone.conv.bias.add_(1)
    with pytest.raises(CheckpointError, match=r"reference.safetensors changed since the encoders were published"):
        guarded.save_pretrained(folder, heads_only=True)


def test_a_branch_alone_needs_no_reference_and_no_detector(saved, guarded):
    for name in ("reference", "heads", "detector", "auxiliary", "benign"):
        (saved / f"{name}.safetensors").unlink()
    part = load(saved, branches=["victim"])
    assert list(part.encoders) == ["victim"]
    assert torch.equal(part.encoder("victim")(IMAGES), guarded.encoder("victim")(IMAGES))
    with pytest.raises(StageError, match=r"needs all encoders, .* loaded with victim alone"):
        part.detect(IMAGES)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load(saved)


def test_all_branches_without_the_reference_are_no_whole_model(saved):
    part = load(saved, branches=list(ROLES))
    assert list(part.encoders) == list(ROLES)
    with pytest.raises(StageError, match=r"needs all encoders, .* loaded with victim, auxiliary, benign alone"):
        part.predict(IMAGES)


# damage


@pytest.mark.parametrize("name", ["reference.safetensors", "detector.safetensors"])
def test_a_file_that_is_missing_truncated_or_changed_is_refused(saved, name):
    path = saved / name
    blob = path.read_bytes()
    changed = bytearray(blob)
    changed[-1] ^= 1
    for content, message in ((blob[:-1], "it is truncated"), (changed, "its content was changed")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} .*{message}"):
            load(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: No such file"):
        load(saved)


@pytest.mark.parametrize("name", FITTED)
def test_a_detector_with_a_tensor_less_or_more_or_another_is_refused_although_the_digest_fits(guarded, tmp_path, name):
    calibrated(guarded, name).save_pretrained(tmp_path / "whole")
    keys = list(guarded.detector.state_dict())
    changes = [
        (lambda t: {**t, "extra": torch.ones(1)}, "unexpected keys: extra"),
        (lambda t: {**t, "weight": t["weight"].T.contiguous()}, r"shapes: weight is \(8, 24\), expected \(24, 8\)"),
        (lambda t: {**t, "output_mean": t["output_mean"][:-1]}, r"shapes: output_mean is \(7,\), expected \(8,\)"),
        (lambda t: {**t, "input_scale": t["input_scale"].int()}, "types: input_scale is torch.int32"),
    ] + [(lambda t, key=key: {k: v for k, v in t.items() if k != key}, f"missing keys: {key}") for key in keys]
    for index, (change, message) in enumerate(changes):
        folder = tmp_path / str(index)
        shutil.copytree(tmp_path / "whole", folder)
        alter(folder, "detector.safetensors", change)
        with pytest.raises(CheckpointError, match=rf"detector.safetensors does not fit FittedDetector: .*{message}"):
            load(folder)


@pytest.mark.parametrize("name", FITTED)
def test_a_detector_file_that_holds_nothing_is_refused(guarded, tmp_path, name):
    calibrated(guarded, name).save_pretrained(tmp_path)
    alter(tmp_path, "detector.safetensors", lambda _: {})
    with pytest.raises(CheckpointError, match="detector.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_detector_that_the_config_no_longer_lists_is_missed(guarded, tmp_path, name):
    """It has a threshold, so it was calibrated."""
    calibrated(guarded, name).save_pretrained(tmp_path)
    values = read(tmp_path)
    del values["files"]["detector.safetensors"]
    write(tmp_path, values)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("tensors", [{"weight": torch.ones(2)}, {}])
def test_a_detector_that_is_never_fitted_has_no_file(guarded, tmp_path, tensors):
    calibrated(guarded, "gap").save_pretrained(tmp_path)
    (tmp_path / "detector.safetensors").write_bytes(write_tensors({}))
    alter(tmp_path, "detector.safetensors", lambda _: tensors)
    with pytest.raises(CheckpointError, match="detector.safetensors|is damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("detector", "name"), "gap"),
        (("detector", "name"), "features"),
        (("detector", "surplus"), 1),
        (("encoders", "reference", "features"), 9),
        (("encoders", "reference", "architecture_of"), "reference"),
        (("encoders", "reference", "architecture_of"), None),
        (("heads", "reference"), "os.system"),
        (("encoders", "reference"), None),
        (("threshold",), float("inf")),
    ],
)
def test_a_config_whose_detector_does_not_fit_its_files_is_refused(saved, path, value):
    values = read(saved)
    owner = values
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    write(saved, values)
    with pytest.raises(CheckpointError):
        load(saved)


def fields(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict) and key not in ("provenance", "arguments"):
            yield from fields(value, (*prefix, key))


def test_every_field_of_a_model_with_a_reference_is_needed(saved):
    whole, accepted = read(saved), []
    for path in fields(whole):
        values = copy.deepcopy(whole)
        owner = values
        for key in path[:-1]:
            owner = owner[key]
        del owner[path[-1]]
        write(saved, values)
        try:
            load(saved)
        except CheckpointError:
            continue
        accepted.append(path)
    assert accepted == []


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_measures_the_detector_in_use(guarded, name):
    calibrated(guarded, name)
    report = evaluate(guarded, [(IMAGES, LABELS)], [NOISE], sanity=False, progress=False)
    assert report.threshold == guarded.threshold
    assert report.false_positive_rate.hits == int(guarded.detect(IMAGES).sum())
    generator = torch.Generator().manual_seed(0)
    moved = NOISE.attack(guarded, IMAGES, LABELS, generator=generator)
    expected = roc_auc_score(
        [0] * len(IMAGES) + [1] * len(IMAGES), torch.cat([guarded.detection_score(x) for x in (IMAGES, moved)])
    )
    assert report.attacks[0].detection.auroc == pytest.approx(expected, abs=1e-6)


def test_an_evaluation_of_a_detector_without_a_threshold_measures_none(guarded):
    guarded.configure(detector="features")
    report = evaluate(guarded, [(IMAGES, LABELS)], [NOISE], sanity=False, progress=False)
    assert report.threshold is None
    assert report.attacks[0].detection is None


@pytest.mark.parametrize("change", [{"fusion": "bounded"}, {"fusion": fusion.RFDM(sharpness=2.9)}])
def test_a_report_on_another_fusion_is_not_this_models(guarded, change):
    report = evaluate(guarded, [(IMAGES, LABELS)], [NOISE], sanity=False, progress=False)
    guarded.attach(report)
    guarded.configure(**change)
    assert "evaluation" not in guarded.provenance
    with pytest.raises(InputError, match="another model"):
        guarded.attach(report)


class _Noise:
    """An attack that knows nothing: the same change to every image, whatever the model."""

    eps, norm = 8 / 255, "linf"

    def __call__(self, model, images, targets, *, generator=None):
        del model, targets, generator
        signs = torch.sign(torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1)))
        return (images + self.eps * signs).clamp(0, 1)


NOISE = Attacker(name="noise", threat_model="semi-black-box", attack=_Noise())

"""The evaluation protocols on tiny encoders: the data of each training step, and the attackers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, CheckpointError, ConfigError, HardenConfig, HeadConfig, ZePAD
from zepad.attacks import PAPBase, UniversalFeatureAttack
from zepad.encoders import Encoder
from zepad.ensemble import BranchEnsemble
from zepad.evaluation import EvalReport, statistics
from zepad.evaluation.attackers import THREAT_MODELS
from zepad.fusion import RFDM
from zepad.objectives import DAEMixture, fare, restoration, static_adversarial_training, trades, zepad_recipe
from zepad.presets import PRESETS
from zepad.protocols import (
    Protocol,
    ablation,
    experiments,
    matched,
    measure,
    measuring,
    public_encoder,
    replica_branches,
    replica_of,
    replicas,
    train_replica,
    transfer,
)
from zepad.protocols.experiments import ABLATION
from zepad.protocols.measuring import slug

EPS = 8 / 255
QUICK = Protocol(
    eps=EPS,
    harden=HardenConfig(eps=EPS, epochs=1, steps=1),
    benign=BenignConfig(epochs=2),
    heads=HeadConfig(epochs=5, batch_size=32),
    steps=2,
    queries=3,
    universal={"PAP": PAPBase(eps=EPS, epochs=1), "cosine": UniversalFeatureAttack(eps=EPS, epochs=1)},
    progress=False,
)


FEW = replace(QUICK, plus=False, universal={})


@pytest.fixture(scope="module", autouse=True)
def _only_what_is_trained_and_attacked() -> Iterator[None]:
    """Neither sanity checks nor intervals depend on the experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "evaluate", partial(measuring.evaluate, sanity=False))
        patch.setattr(statistics, "_RESAMPLES", 20)
        yield


def make_encoders() -> tuple[TinyEncoder, TinyEncoder]:
    torch.manual_seed(2)
    return TinyEncoder(), TinyEncoder()


def make_loader(images, labels) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=12)


TRAIN, TEST = make_loader(*toy_data()), make_loader(*toy_data(24, seed=9))


@pytest.fixture(scope="module")
def taken_apart() -> dict[str, EvalReport]:
    return ablation(*make_encoders(), TRAIN, TEST, protocol=QUICK)


def test_matched_scores_both_models_and_saves_the_reports(tmp_path) -> None:
    encoders = make_encoders()
    before = [{k: v.clone() for k, v in encoder.state_dict().items()} for encoder in encoders]
    reports = matched(*encoders, TRAIN, TEST, protocol=FEW, folder=tmp_path)
    assert list(reports) == ["undefended", "ZePAD"]
    undefended, zepad = reports.values()
    assert undefended.images == zepad.images == 24
    assert set(zepad.benign_branches) == {"victim", "auxiliary", "benign"}
    assert not undefended.benign_branches
    assert zepad.groups == ("semi-black-box", "published", "white-box")  # without plus nobody attacks both encoders
    assert undefended.groups == ("semi-black-box", "white-box")  # and it publishes no hardened encoder
    for name, report in reports.items():
        assert EvalReport.load(tmp_path / slug(name)) == report
    for encoder, weights in zip(encoders, before, strict=True):  # copied, never modified
        assert all(torch.equal(weights[k], v) for k, v in encoder.state_dict().items())


def test_all_models_meet_the_same_public_attackers(taken_apart) -> None:
    undefended, zepad = taken_apart["nothing"], taken_apart["all"]
    for group, count in (("semi-black-box", 4), ("semi-black-box+", 3)):  # one universal attack suffices on both
        own = [[(a.name, a.settings) for a in report.group(group)] for report in (undefended, zepad)]
        assert own[0] == own[1]
        assert len(own[0]) == count
    assert len(zepad.group("published")) == 6  # the universal feature attack among them
    assert not undefended.group("published")
    assert len(zepad.group("white-box")) > len(undefended.group("white-box")) == 3


@pytest.fixture
def trained(monkeypatch) -> dict[str, torch.nn.Module]:
    """The models that an experiment trains. Nobody attacks them."""
    models: dict[str, torch.nn.Module] = {}
    monkeypatch.setattr(experiments, "measure", lambda given, *_, **__: models.update(given) or {})
    return models


def test_an_ablation_takes_parts_of_the_papers_method_away_and_changes_nothing_else(trained) -> None:
    ablation(*make_encoders(), TRAIN, TEST, protocol=FEW)
    assert tuple(trained) == ABLATION
    assert [m.fusion for m in trained.values() if isinstance(m, BranchEnsemble)] == [RFDM()] * 4
    assert trained["all"].provenance["harden"]["method"] == zepad_recipe().name


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(matched, id="matched"),
        pytest.param(partial(transfer, task_loader=TRAIN), id="transfer", marks=pytest.mark.slow),
    ],
)
def test_an_experiment_trains_the_preset_that_is_named(experiment, trained) -> None:
    loader = {"tune_loader" if isinstance(experiment, partial) else "train_loader": TRAIN}
    experiment(*make_encoders(), **loader, test_loader=TEST, preset="paper", protocol=FEW)
    assert trained["ZePAD"].preset is PRESETS["paper"]
    assert trained["ZePAD"].provenance["harden"]["method"] == zepad_recipe().name
    with pytest.raises(ConfigError, match="preset must be one of private, published, cautious, paper; got 'none'"):
        experiment(*make_encoders(), **loader, test_loader=TEST, preset="none", protocol=FEW)


def test_a_folder_of_other_models_is_refused(tmp_path) -> None:
    def run(seed: int) -> None:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(TinyEncoder(), torch.nn.Linear(8, 3))
        models = {"a model": model}
        measure(models, TEST, public={}, surrogate=TRAIN, num_classes=3, protocol=FEW, folder=tmp_path)

    run(0)
    run(0)
    with pytest.raises(CheckpointError, match="model_digest"):
        run(1)


@pytest.fixture(scope="module")
def defended() -> tuple[dict[str, Encoder], ZePAD]:
    """The public encoders, and a defense on them."""
    victim, auxiliary = make_encoders()
    defense = ZePAD.from_encoders(victim, auxiliary, preset="paper")
    public = {role: copy.deepcopy(defense.encoder(role)) for role in ("victim", "auxiliary")}
    defense.harden(TRAIN, QUICK.harden, progress=False)
    return public, defense.fit_benign(TRAIN, QUICK.benign, head_config=QUICK.heads, progress=False)


OTHER = make_loader(*toy_data(48, seed=4))
UNLABELLED = DataLoader(OTHER.dataset.tensors[0], batch_size=12)


def states(encoders) -> list[torch.Tensor]:
    return [tensor.clone() for encoder in encoders.values() for tensor in encoder.state_dict().values()]


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states(first), states(second), strict=True))


def test_a_replica_repeats_the_hardening_with_a_seed_and_images_of_its_own(defended) -> None:
    public, defense = defended
    before = states(public)
    copies = replica_of(defense, public, OTHER, progress=False)
    assert copies.pop("benign").state_dict().keys() == copies["auxiliary"].state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(before, states(public), strict=True))  # copied, never modified
    explicit = {"harden_config": QUICK.harden, "objective": None, "progress": False}
    assert same(copies, train_replica(*public.values(), OTHER, seed=QUICK.harden.seed + 1, **explicit))
    for changed in (public, train_replica(*public.values(), OTHER, seed=7, **explicit)):
        assert not same(copies, changed)
    assert not any(p.requires_grad or copies[role].training for role in copies for p in copies[role].parameters())


@pytest.fixture(scope="module")
def resistant() -> tuple[dict[str, Encoder], ZePAD]:
    """Three public encoders, and a defense whose benign branch is trained against attacks on the others."""
    victim, auxiliary = make_encoders()
    third = TinyEncoder(5)
    defense = ZePAD.from_encoders(victim, auxiliary, benign=third, preset="published")
    public = {role: copy.deepcopy(defense.encoder(role)) for role in ("victim", "auxiliary", "benign")}
    defense.harden(TRAIN, QUICK.harden, objective=SHORT, progress=False)
    return public, defense.fit_benign(TRAIN, RESISTANT, objective=STATIC, head_config=QUICK.heads, progress=False)


SHORT = restoration(static=DAEMixture(steps=1))
STATIC = static_adversarial_training(static=DAEMixture(steps=1))
RESISTANT = BenignConfig(epochs=1, lr=1e-2)
RECIPES = {"objective": SHORT, "benign_objective": STATIC}


def test_a_replica_repeats_the_benign_branch_against_the_copies(resistant, tmp_path) -> None:
    public, defense = resistant
    copies = replica_of(defense, public, OTHER, **RECIPES, folder=tmp_path, progress=False)
    seed = QUICK.harden.seed + 1
    alike = ZePAD.from_encoders(**public, preset="published")
    alike.harden(OTHER, replace(QUICK.harden, seed=seed), objective=SHORT, progress=False)
    alike.fit_benign(OTHER, replace(RESISTANT, seed=seed), objective=STATIC, progress=False)
    assert copies.keys() == {"victim", "auxiliary", "benign"}
    assert same(copies, {role: alike.encoder(role) for role in copies})
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("epoch-*.pt")}
    assert len(files) == 3
    assert same(copies, replica_of(defense, public, OTHER, **RECIPES, folder=tmp_path, progress=False))
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_a_benign_branch_is_repeated_from_labels_where_its_encoder_was_trained(resistant, defended) -> None:
    public, defense = resistant
    assert replica_of(defense, public, UNLABELLED, **RECIPES, progress=False).keys() == {"victim", "auxiliary"}
    public, tuned = defended
    assert replica_of(tuned, public, OTHER, progress=False).keys() == {"victim", "auxiliary", "benign"}
    frozen = copy.deepcopy(tuned)
    frozen.fit_benign(TRAIN, BenignConfig(epochs=1, freeze_encoder=True), progress=False)
    assert replica_of(frozen, public, OTHER, progress=False).keys() == {"victim", "auxiliary"}


def test_a_benign_branch_that_cannot_be_repeated_is_refused_before_anything_is_trained(resistant, tmp_path) -> None:
    public, defense = resistant
    with pytest.raises(ConfigError, match="benign is not known"):
        replica_of(defense, {role: public[role] for role in ("victim", "auxiliary")}, OTHER, **RECIPES)
    with pytest.raises(ConfigError, match=r"benign branch was trained by static_adversarial_training\(.* benign_obj"):
        replica_of(defense, public, OTHER, objective=SHORT, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("width", [None, 8, 5], ids=["none", "of the auxiliary's kind", "of another kind"])
def test_a_third_public_encoder_is_recognised(width: int | None, tmp_path: Path) -> None:
    victim, auxiliary = make_encoders()
    third = None if width is None else TinyEncoder(width)
    defense = ZePAD.from_encoders(victim, auxiliary, benign=third, num_classes=3)
    assert replicas.has_third(defense) == (third is not None)
    defense.save_pretrained(tmp_path)
    given = {} if third is None else {"benign": third}
    loaded = ZePAD.from_pretrained(tmp_path, victim=victim, auxiliary=auxiliary, **given)
    assert replicas.has_third(loaded) == (third is not None)
    del loaded.provenance["preset"]  # as models of earlier versions come
    assert replicas.has_third(loaded) == (width == 5)


@pytest.mark.slow
def test_a_third_public_encoder_is_attacked_alone_and_with_the_others(resistant) -> None:
    public, defense = resistant
    settings = {"public": public, "surrogate": OTHER, "num_classes": 3, "protocol": replace(FEW, plus=True)}
    report = measure({"ZePAD": defense}, TEST, **settings)["ZePAD"]
    assert [a.name for a in report.group("semi-black-box+")] == [
        *(f"feature {name} (both encoders)" for name in ("PGD-20", "MI-DI-30")),
        *(f"feature {name} (benign)" for name in ("PGD-20", "MI-DI-30")),
        *(f"feature {name} (all encoders)" for name in ("PGD-20", "MI-DI-30")),
    ]


def test_a_public_encoder_that_the_model_keeps_is_given_back(resistant) -> None:
    public, defense = resistant
    for role in ("victim", "benign"):
        assert same({role: public[role]}, {role: public_encoder(defense, role)})
    with pytest.raises(ConfigError):
        public_encoder(defense, "auxiliary")  # a module of the owner's


@pytest.mark.slow
def test_a_replica_is_trained_once_for_all_it_depends_on(defended, tmp_path, monkeypatch) -> None:
    public, _ = defended
    trained: list[Path] = []
    original = replicas.harden

    def spy(*args, checkpoint_dir, **settings):
        trained.append(checkpoint_dir)
        return original(*args, checkpoint_dir=checkpoint_dir, **settings)

    monkeypatch.setattr(replicas, "harden", spy)

    def train(**changes) -> dict[str, Encoder]:
        settings = {**public, "loader": OTHER, "harden_config": QUICK.harden, **changes}
        return train_replica(**settings, folder=tmp_path, progress=False)

    first = train()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("epoch-*.pt")}
    assert len(files) == 2
    assert same(first, train())
    assert {file: file.stat().st_mtime_ns for file in files} == files  # nothing was trained twice
    train(seed=2)
    train(loader=TRAIN)
    train(victim=public["auxiliary"])
    train(harden_config=replace(QUICK.harden, steps=2))
    train(objective=fare())
    train(objective=restoration())
    assert list((tmp_path / "bank").iterdir())  # adversarial examples for the last one, kept too
    assert trained[0] == trained[1]
    assert len(set(trained)) == 7


def test_a_defense_is_measured_under_all_five_attackers(defended) -> None:
    public, defense = defended
    copies = replica_of(defense, public, OTHER, progress=False)
    settings = {"public": public, "surrogate": OTHER, "num_classes": 3}
    ladder = replace(QUICK, universal={"cosine": UniversalFeatureAttack(eps=EPS, epochs=1)})
    reports = measure({"ZePAD": defense}, TEST, copies=copies, others={"third": copies["victim"]}, **settings,
                      protocol=ladder)  # fmt: skip
    report = reports["ZePAD"]
    assert report.groups == THREAT_MODELS
    assert [a.name for a in report.group("replica")] == [
        "universal feature attack (copies)",
        "feature PGD-20 (copy of victim)",
        "feature PGD-20 (copy of auxiliary)",
        "feature PGD-20 (copy of benign)",
        "feature PGD-20 (hardened copies)",
        "feature PGD-20 (copies)",
        "feature PGD-20 (copies and public encoders)",
        "feature MI-DI-30 (copies and public encoders)",
    ]
    assert "feature MI-DI-30 (third)" in {a.name for a in report.group("semi-black-box")}


def test_copies_with_heads_are_attacked_with_labels_too(defended) -> None:
    public, defense = defended
    bare = replica_of(defense, public, OTHER, progress=False)
    heads = HeadConfig(epochs=60, batch_size=12, head_lr=1e-2)
    copies = replica_branches(bare, OTHER, heads, num_classes=3, progress=False)
    images, labels = TEST.dataset.tensors
    with torch.no_grad():
        assert all((branch(images).argmax(1) == labels).float().mean() > 0.6 for branch in copies.values())
    protocol = replace(FEW, published=False)
    settings = {"public": public, "surrogate": OTHER, "num_classes": 3, "protocol": protocol}
    report = measure({"ZePAD": defense}, TEST, copies=copies, **settings)["ZePAD"]
    assert report.groups == ("semi-black-box", "replica", "white-box")
    assert [a.name for a in report.group("replica")[-2:]] == [
        "APGD-CE-2 (mean logits of the copies)",
        "APGD-CE-2 (mean logits of the hardened copies)",
    ]
    assert not any("universal" in a.name for a in report.attacks)  # the protocol has none


def test_a_second_evaluation_crafts_no_universal_perturbation_and_another_one_is_refused_before_it_would(
    defended, tmp_path, monkeypatch
) -> None:
    public, defense = defended
    crafted: list[str] = []
    original = UniversalFeatureAttack.fit

    def spy(self, *args, **settings):
        crafted.append(str(self))
        return original(self, *args, **settings)

    monkeypatch.setattr(UniversalFeatureAttack, "fit", spy)
    protocol = replace(QUICK, plus=False, universal={"cosine": UniversalFeatureAttack(eps=EPS, epochs=1)})

    def run(test=TEST, **changes) -> EvalReport:
        settings = {"public": public, "surrogate": OTHER, "num_classes": 3, "protocol": protocol, **changes}
        return measure({"ZePAD": defense}, test, folder=tmp_path, **settings)["ZePAD"]

    first = run()
    assert len(crafted) == 2  # on the public victim, and on the published encoders
    assert run().worst == first.worst
    assert len(crafted) == 2
    for changes, named in (
        ({"surrogate": TRAIN}, "images of the attacker"),
        ({"public": {**public, "auxiliary": public["victim"]}}, "public encoders"),
        ({"protocol": replace(protocol, eps=EPS / 2)}, "eps"),
        ({"protocol": replace(protocol, steps=9)}, "steps"),
        ({"protocol": replace(protocol, universal={"cosine": UniversalFeatureAttack(eps=EPS)})}, "universal attacks"),
    ):
        with pytest.raises(CheckpointError, match=rf"what differs: {named} \([^)]* then, [^)]* now\)\. Resume"):
            run(**changes)
    with pytest.raises(CheckpointError, match=r"what differs: the number of images \(\d+ then, 4 now\)\. Resume"):
        run(test=[[part[:4] for part in next(iter(TEST))]])
    assert len(crafted) == 2


def test_a_hardening_that_cannot_be_repeated_is_refused(defended) -> None:
    public, defense = defended
    with pytest.raises(ConfigError, match="auxiliary is not known"):
        replica_of(defense, {"victim": public["victim"]}, OTHER)
    other = copy.deepcopy(defense)
    other.provenance["harden"]["method"] = "trades(beta=5.5)"
    with pytest.raises(ConfigError, match=r"hardened by trades\(beta=5\.5\), which is no recipe of default settings"):
        replica_of(other, public, OTHER)
    with pytest.raises(ConfigError, match=r"which is not fare\(\)"):
        replica_of(other, public, OTHER, objective=fare())


@pytest.mark.parametrize("recipe", [fare, trades, restoration])
def test_a_replica_finds_the_recipe_by_the_record(defended, monkeypatch, recipe) -> None:
    public, defense = defended
    repeated: list[str] = []
    monkeypatch.setattr(replicas, "train_replica", lambda *_, objective, **__: repeated.append(objective.name))
    other = copy.deepcopy(defense)
    other.provenance["harden"]["method"] = recipe().name
    del other.provenance["benign"]
    replica_of(other, public, OTHER)
    replica_of(other, public, OTHER, objective=recipe())
    assert repeated == [recipe().name] * 2


def test_transfer_fits_heads_of_the_new_task_on_encoders_of_the_old() -> None:
    images, labels = toy_data(48, seed=5)
    task = make_loader(images, labels % 2)
    reports = transfer(*make_encoders(), TRAIN, task, task, protocol=FEW)
    assert list(reports) == ["undefended", "ZePAD"]
    assert reports["ZePAD"].images == 48
    # Chance is one half: heads of the old task, which has three classes, would not reach it.
    assert reports["ZePAD"].benign_accuracy.value > 0.6


def test_the_ablation_takes_each_part_away(taken_apart) -> None:
    reports = taken_apart
    assert tuple(reports) == ABLATION
    branches = {name: set(report.benign_branches) for name, report in reports.items()}
    assert branches == {
        "nothing": set(),
        "no adversarial tuning": {"victim", "auxiliary", "benign"},
        "no MPAE": {"victim", "benign"},
        "no BMP": {"victim", "auxiliary"},
        "all": {"victim", "auxiliary", "benign"},
    }
    everything, no_bmp, untuned = reports["all"], reports["no BMP"], reports["no adversarial tuning"]
    # The same trained parts, not new ones.
    assert no_bmp.benign_branches["victim"] == everything.benign_branches["victim"]
    assert untuned.benign_branches["benign"] == everything.benign_branches["benign"]
    assert untuned.benign_branches["victim"] == reports["nothing"].benign_accuracy
    assert no_bmp.threshold is None  # without the benign branch there is no confidence gap
    assert everything.threshold is not None


@pytest.mark.parametrize("change", [{"eps": 10}, {"steps": 0}, {"queries": 0}])
def test_a_bad_protocol_is_refused(change) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Protocol(**change)


def test_a_slug_is_one_part_of_a_path() -> None:
    assert slug("no BMP") == "no-bmp"
    assert slug("/tmp/a model") == "tmp-a-model"
    assert slug("../..") == "model"

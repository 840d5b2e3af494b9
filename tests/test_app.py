"""The app without a browser: which attackers it offers, what a trial holds, how it is shown, and the Space."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from command_line import zepad
from tiny import TinyEncoder, seeded, toy_data
from zepad import ConfigError, InputError, StageError, ZePAD, __version__
from zepad.app import Trial, attackers_for, build_app, export_space, try_attack
from zepad.app.page import answer_section, attackers_section, trial_page, trial_section
from zepad.attacks import FeaturePGD
from zepad.encoders import build_encoder
from zepad.modules import MLPHead
from zepad.protocols import public_encoder

FORMAT_3 = Path(__file__).parent / "data" / "format3"
EPS = 32 / 255
EVERY = ["no attack", "public victim", "both public encoders", "hardened encoders", "white box"]


@pytest.fixture
def calibrated() -> ZePAD:
    """A small model with class names and a threshold, which keeps the undefended victim."""
    return ZePAD.from_pretrained(FORMAT_3 / "recommended", victim=TinyEncoder(), auxiliary=TinyEncoder())


@pytest.fixture
def packaged() -> ZePAD:
    """A model on the packaged encoders that does not keep the victim, with the heads of another one."""
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr", preset="paper", num_classes=3)
    for role in ("victim", "auxiliary", "benign"):
        with torch.no_grad():
            next(defense.encoder(role).parameters()).add_(1)  # as if it were hardened
        defense.branches[role].head = MLPHead(128, 3)
    defense.stage = "fitted"
    return defense


def image() -> torch.Tensor:
    return toy_data()[0][0]


def trial(defense: ZePAD, attacker: str, eps: float = EPS) -> Trial:
    return try_attack(defense, attackers_for(defense).attackers[attacker], image(), eps=eps)


def test_a_trial_holds_what_its_parts_say_by_themselves(calibrated: ZePAD) -> None:
    found = trial(calibrated, "public victim")
    victim = calibrated.encoder("reference")
    attacked = FeaturePGD(eps=EPS, steps=20)(victim, image()[None], generator=seeded(0))
    assert torch.equal(found.attacked, attacked[0])
    assert torch.equal(found.clean, image())
    assert found.undefended is not None
    with torch.no_grad():
        undefended = calibrated.branch("reference")(attacked).softmax(dim=1)[0]
    for opinion, probabilities in (
        (found.undefended, undefended),
        (found.defended, calibrated.predict_proba(attacked)[0]),
    ):
        best = int(probabilities.argmax())
        assert opinion.attacked[0].label == ("red", "green", "blue")[best]
        assert opinion.attacked[0].probability == pytest.approx(float(probabilities[best]), abs=1e-5)
    assert found.flagged == bool(calibrated.detect(attacked)[0])
    assert found.scores == pytest.approx(
        calibrated.detection_score(torch.stack([image(), attacked[0]])).tolist(), abs=1e-4
    )


@pytest.mark.parametrize("attacker", ["no attack", "public victim", "hardened encoders", "white box"])
def test_an_attacked_image_keeps_to_the_budget(calibrated: ZePAD, attacker: str) -> None:
    found = trial(calibrated, attacker)
    assert found.largest_change <= EPS + 1e-6
    assert 0 <= found.attacked.min() <= found.attacked.max() <= 1
    assert (found.largest_change == 0) == (attacker == "no attack")
    assert torch.equal(found.attacked, trial(calibrated, attacker).attacked), "the same seed attacks alike"


def test_the_white_box_breaks_the_decision_where_the_budget_is_large(calibrated: ZePAD) -> None:
    found = trial(calibrated, "white box", eps=0.5)
    assert found.defended.changed
    assert found.defended.clean[0].label == "red"


def test_an_attacker_without_his_encoders_is_left_out_with_the_reason(fitted: ZePAD, calibrated, packaged) -> None:
    assert list(attackers_for(packaged).attackers) == EVERY
    assert attackers_for(packaged).missing == {}
    kept = attackers_for(calibrated)
    assert list(kept.attackers) == [name for name in EVERY if name != "both public encoders"]
    assert "public auxiliary" in kept.missing["both public encoders"]
    bare = attackers_for(fitted)
    assert list(bare.attackers) == ["no attack", "hardened encoders", "white box"]
    assert set(bare.missing) == {"public victim", "both public encoders"}
    assert all("only be built by its owner" in reason for reason in bare.missing.values())


def test_a_public_encoder_is_the_one_before_the_hardening(packaged: ZePAD) -> None:
    built = build_encoder(packaged.encoder("auxiliary").spec, pretrained=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, hardened = public_encoder(packaged, "auxiliary")(images), packaged.encoder("auxiliary")(images)
        assert torch.equal(found, built(images))
    assert not torch.allclose(found, hardened)


def test_a_model_without_a_reference_says_that_there_is_nothing_to_compare_with(fitted: ZePAD) -> None:
    found = trial(fitted, "hardened encoders")
    assert found.undefended is None
    assert "nothing to compare with" in trial_section(found)


def test_only_a_fitted_model_can_be_tried() -> None:
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    with pytest.raises(StageError, match="fit_benign"):
        attackers_for(defense)


def test_a_large_image_is_brought_to_the_size_of_the_encoders_and_a_small_one_is_left(calibrated, packaged) -> None:
    attacker = attackers_for(packaged).attackers["no attack"]
    for size, expected in (((40, 20), (32, 32)), ((32, 32), (32, 32)), ((8, 20), (8, 20))):
        found = try_attack(packaged, attacker, torch.rand(3, *size), eps=EPS)
        assert found.clean.shape == (3, *expected)
    assert all(encoder.preprocessing.size is None for encoder in calibrated.encoders.values())
    found = try_attack(calibrated, attacker, torch.rand(3, 1024, 256), eps=EPS)
    assert found.clean.shape == (3, 512, 128)


def test_the_page_has_every_number_and_loads_nothing(calibrated: ZePAD) -> None:
    found = trial(calibrated, "public victim")
    page = trial_page(found, calibrated)
    assert found.scores is not None
    assert found.undefended is not None
    for opinion in (found.undefended, found.defended, *found.branches.values()):
        assert f"{100 * opinion.attacked[0].probability:.1f} %" in page
    assert f"{found.scores[1]:.3f}" in page
    assert f"{found.threshold:.3f}" in page
    assert "32/255" in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page


def test_weights_are_shown_where_the_fusion_averages(calibrated: ZePAD, fitted: ZePAD) -> None:
    found = trial(fitted, "hardened encoders")
    weights = [opinion.weight for opinion in found.branches.values()]
    assert sum(weights) == pytest.approx(1)
    assert all(f"<td>{100 * weight:.1f} %</td>" in trial_section(found) for weight in weights)
    assert "branches have no weights" in trial_section(trial(calibrated, "no attack"))


def test_what_is_not_calibrated_says_so(calibrated: ZePAD) -> None:
    calibrated.configure(detector="features")
    found = trial(calibrated, "public victim")
    assert found.flagged is None
    assert "not calibrated" in trial_section(found)


def test_a_benign_branch_that_abstains_says_so(calibrated: ZePAD) -> None:
    with torch.no_grad():
        gap = float(calibrated.restoration_gap(image()[None]))
    calibrated.abstain_above = 2 * gap
    heard = try_attack(calibrated, attackers_for(calibrated).attackers["public victim"], image(), eps=EPS)
    assert heard.branches["benign"].clean
    calibrated.abstain_above = gap / 2
    found = try_attack(calibrated, attackers_for(calibrated).attackers["public victim"], image(), eps=EPS)
    assert found.branches["benign"].clean == ()
    assert found.branches["victim"].clean == heard.branches["victim"].clean
    assert "<td>abstains</td>" in trial_section(found)
    assert "abstains" not in trial_section(heard)


def test_a_score_not_above_the_threshold_is_not_flagged(calibrated: ZePAD) -> None:
    assert trial(calibrated, "public victim").flagged
    calibrated.threshold = trial(calibrated, "public victim").scores[1]
    found = trial(calibrated, "public victim")
    assert found.flagged is False
    assert "not flagged" in trial_section(found)
    assert "not above" in trial_section(found)


def test_names_of_strangers_are_escaped(calibrated: ZePAD) -> None:
    calibrated.class_names = ("<img src=x onerror=alert(1)>", '"><script>', "a\u001b[2Jb")
    found = trial(calibrated, "public victim")
    for page in (trial_section(found), trial_page(found, calibrated)):
        assert "<img src=x" not in page
        assert "<script>" not in page
        assert "\u001b" not in page


def test_reasons_are_escaped(fitted: ZePAD) -> None:
    choice = attackers_for(fitted)
    choice.missing["public victim"] = "<b>no</b>"
    assert "&lt;b&gt;no&lt;/b&gt;" in attackers_section(choice)


def test_a_file_becomes_an_answer_with_a_report_or_says_what_is_wrong(calibrated: ZePAD, tmp_path: Path) -> None:
    attacker = attackers_for(calibrated).attackers["public victim"]
    to_pil_image(image()).save(tmp_path / "image.png")
    answer = answer_section(calibrated, attacker, str(tmp_path / "image.png"), eps=EPS)
    assert "data:text/html" in answer
    assert "no image yet" in answer_section(calibrated, attacker, None, eps=EPS)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    wrong = answer_section(calibrated, attacker, str(tmp_path / "broken.png"), eps=EPS)
    assert "broken.png" in wrong
    assert str(tmp_path) not in wrong


def test_gradio_that_is_missing_is_named_with_its_extra(calibrated: ZePAD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=re.escape('pip install "zepad[app]"')):
        build_app(calibrated)


def test_the_command_without_a_model_names_the_demo() -> None:
    done = zepad("app")
    assert done.returncode == 1
    assert "zepad demo" in done.stderr


def test_a_space_holds_the_model_or_names_it(calibrated: ZePAD, packaged: ZePAD, tmp_path, monkeypatch) -> None:
    from huggingface_hub import SpaceCard

    monkeypatch.setattr("zepad.app.space.version", lambda _: "6.1.0")
    whole = export_space(packaged, tmp_path / "whole")
    assert sorted(path.name for path in whole.iterdir()) == ["README.md", "app.py", "model", "requirements.txt"]
    assert (whole / "requirements.txt").read_text() == f"zepad[app]=={__version__}\n"
    metadata = SpaceCard.load(whole / "README.md").data
    assert (metadata.sdk, metadata.sdk_version, metadata.app_file) == ("gradio", "6.1.0", "app.py")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ZePAD.from_pretrained(whole / "model")(images), packaged.eval()(images))
    named = export_space(packaged, tmp_path / "named", repo_id="me/hardened")
    assert not (named / "model").exists()
    for folder, source in ((whole, 'Path(__file__).parent / "model"'), (named, '"me/hardened"')):
        code = (folder / "app.py").read_text()
        compile(code, "app.py", "exec")
        assert f"from_pretrained({source})" in code


def test_a_space_is_not_written_over_anything_nor_of_an_unfitted_model(packaged: ZePAD, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export_space(packaged, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(StageError):
        export_space(ZePAD.from_encoders(TinyEncoder(), TinyEncoder()), tmp_path / "space")
    assert not (tmp_path / "space").exists()

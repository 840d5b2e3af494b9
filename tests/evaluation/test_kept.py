"""Perturbations that are kept: what made one finds it again, and nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad.attacks import UAPGD, UniversalFeatureAttack
from zepad.errors import CheckpointError, InputError
from zepad.evaluation import keeping, universal_attacker

EPS = 8 / 255
IMAGES, LABELS = toy_data(24, size=8)


class Counted(nn.Module):
    """An encoder that counts the passes through it."""

    passes = 0

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = TinyEncoder()

    def forward(self, x: Tensor) -> Tensor:
        Counted.passes += 1
        return self.inner(x)


def attack(**changes) -> UniversalFeatureAttack:
    return UniversalFeatureAttack(**{"eps": EPS, "epochs": 1, **changes})


def loader(images: Tensor = IMAGES, labels: Tensor = LABELS, *, batch_size: int = 12, shuffle: bool = True, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=shuffle, generator=generator)


def crafted(folder, encoder=None, data=None, **changes) -> tuple[int, Tensor]:
    """Fit, and return how many passes of the encoder that took."""
    Counted.passes = 0
    (kept,) = keeping({"one": attack(**changes)}, folder).values()
    perturbation = kept.fit([Counted()] if encoder is None else encoder, loader() if data is None else data)
    return Counted.passes, perturbation.delta


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "perturbations"
    assert crafted(folder)[0] > 0
    assert len(list(folder.iterdir())) == 1
    return folder


def test_a_second_run_crafts_nothing_and_finds_the_same(folder):
    plain = attack().fit([Counted()], loader(), progress=False)
    passes, delta = crafted(folder)
    assert passes == 0
    assert torch.equal(delta, plain.delta)


def test_an_attacker_is_the_same_crafted_or_found(tmp_path):
    first, second = (
        universal_attacker(keeping({"one": attack()}, tmp_path)["one"].fit([Counted()], loader(), progress=False))
        for _ in range(2)
    )
    assert first.settings == second.settings


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": 4 / 255},
        {"epochs": 2},
        {"seed": 1},
        {"step_size": 0.001},
        {"encoder": [Counted(1)]},
        {"encoder": [Counted(), Counted(1)]},
        {"data": loader(IMAGES.flip(0))},
        {"data": loader(labels=LABELS.flip(0) + 1)},
        {"data": loader(IMAGES[:12], LABELS[:12])},
        {"data": loader(batch_size=6)},
        {"data": loader(shuffle=False)},
        {"data": IMAGES},
    ],
    ids=lambda changes: str(list(changes)),
)
def test_another_setting_encoder_or_data_is_crafted_anew(folder, changes):
    assert crafted(folder, **changes)[0] > 0
    assert len(list(folder.iterdir())) == 2
    assert crafted(folder)[0] == 0  # and the first is still there


def test_weights_matter_and_not_the_object(folder):
    encoder = Counted()
    assert crafted(folder, [copy.deepcopy(encoder)])[0] == 0
    with torch.no_grad():
        encoder.inner.conv.weight[0, 0, 0, 0] += 1e-4
    assert crafted(folder, [encoder])[0] > 0


def test_two_attacks_of_the_same_settings_are_two(tmp_path):
    attacks = {"one": attack(), "other": UAPGD(eps=EPS, epochs=1)}
    for kept in keeping(attacks, tmp_path).values():
        kept.fit(TinyEncoder(), loader(), progress=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_reading_the_data_for_its_digest_leaves_the_loader_and_the_generators_as_they_were(tmp_path):
    plain = attack().fit([Counted()], loader(seed=5), progress=False)
    encoder, state = [Counted()], torch.get_rng_state()
    assert torch.equal(crafted(tmp_path, encoder, loader(seed=5))[1], plain.delta)
    assert torch.equal(torch.get_rng_state(), state)
    assert crafted(tmp_path, encoder, loader(seed=5))[0] == 0


def test_a_damaged_file_is_refused_with_what_to_do(folder):
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="delete the file"):
        crafted(folder)


@pytest.mark.parametrize("changes", [{"eps": 4 / 255}, {"seed": 1}, {"encoder": [Counted(1)]}])
def test_a_file_that_was_made_by_something_else_is_refused_by_name(folder, changes):
    (own,) = folder.iterdir()
    crafted(folder, **changes)
    (other,) = set(folder.iterdir()) - {own}
    own.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=f"{own.name} does not say that it was made by this attack"):
        crafted(folder)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        crafted(tmp_path / "file")


def test_an_interrupted_crafting_leaves_nothing(tmp_path):
    class Interrupted:
        def fit(self, encoder, images, *, progress=True):  # noqa: ARG002
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keeping({"one": Interrupted()}, tmp_path)["one"].fit([Counted()], loader())
    assert not list(tmp_path.iterdir())

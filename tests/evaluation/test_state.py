"""An interrupted evaluation resumes to the same report, and never from the files of another evaluation."""

import copy
import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from tiny import toy_data
from zepad.attacks import PGD
from zepad.ensemble import BranchEnsemble
from zepad.errors import CheckpointError, ConfigError, InputError
from zepad.evaluation import Attacker, evaluate

EPS = 0.2
IMAGES, LABELS = toy_data(25, size=4)
LOADER = list(zip(IMAGES.split(10), LABELS.split(10), strict=True))


def colours(scale, noise=0.0):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[2].weight.copy_(scale * torch.eye(3) + noise * torch.randn(3, 3, generator=generator))
        model[2].bias.zero_()
    return model


def ensemble(**changes):
    branches = {"one": colours(9.0), "two": colours(5.0, 0.5), "benign": colours(4.0, 1.0)}
    return BranchEnsemble(branches, **{"threshold": 0.05} | changes)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """PGD that counts its calls and raises at one of them."""

    eps: float = EPS
    norm: str = "linf"
    steps: int = 2
    _calls: list = field(default_factory=list)
    _raise_at: list = field(default_factory=list)

    def __call__(self, model, images, targets, *, generator=None):
        self._calls.append(len(images))
        if len(self._calls) in self._raise_at:
            raise KeyboardInterrupt
        return PGD(eps=self.eps, steps=self.steps)(model, images, targets, generator=generator)


def attackers(*attacks):
    return [Attacker(name=f"PGD {i}", threat_model="white-box", attack=attack) for i, attack in enumerate(attacks)]


def run(folder, crowd, model=None, loader=LOADER, **changes):
    settings = {"sanity": False, "progress": False, "folder": folder} | changes
    return evaluate(model or ensemble(), loader, crowd, **settings)


def strip(report):
    """The report without what time and machine put into it."""
    attacks = tuple(replace(result, cost=replace(result.cost, seconds=0)) for result in report.attacks)
    return replace(report, provenance={}, attacks=attacks)


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupted_evaluation_goes_on_to_the_same_report(tmp_path, at):
    """Of three batches and two attackers the second attacker is interrupted at its `at`-th batch."""
    undisturbed = run(None, attackers(Counted(), Counted(steps=3)), samples=12)
    first, second = Counted(), Counted(steps=3, _raise_at=[at])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, attackers(first, second), samples=12)
    assert (len(first._calls), len(second._calls)) == (at, at)
    again = Counted(), Counted(steps=3)
    resumed = run(tmp_path, attackers(*again), samples=12, resume=True)
    assert strip(resumed) == strip(undisturbed)
    assert len(resumed.samples) == 24
    assert [len(attack._calls) for attack in again] == [3 - at, 4 - at]
    final = Counted(), Counted(steps=3)
    assert strip(run(tmp_path, attackers(*final), samples=12, resume=True)) == strip(undisturbed)
    assert [attack._calls for attack in final] == [[], []]


def test_costs_are_those_of_the_first_time(tmp_path):
    first = run(tmp_path, attackers(Counted()))
    assert run(tmp_path, attackers(Counted()), resume=True).attacks == first.attacks


def test_resume_without_an_earlier_run_starts_one(tmp_path):
    folder = tmp_path / "deep" / "new"
    assert strip(run(folder, attackers(Counted()), resume=True)) == strip(run(None, attackers(Counted())))


def test_resume_needs_a_folder():
    with pytest.raises(ConfigError, match="folder"):
        run(None, attackers(Counted()), resume=True)


def test_a_folder_that_holds_an_evaluation_is_refused_without_resume(tmp_path):
    run(tmp_path, attackers(Counted()))
    held = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="resume=True"):
        run(tmp_path, attackers(Counted()))
    assert held == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def one_bit_off():
    model = ensemble()
    model.branches["two"][2].weight.data.view(torch.int32)[0, 1] ^= 1
    return model


def with_buffer_off():
    model = ensemble()
    model.branches["two"].append(nn.Identity())
    model.branches["two"][3].register_buffer("count", torch.tensor(1))
    return model


def relabelled():
    labels = LABELS.clone()
    labels[-1] = (labels[-1] + 1) % 3
    return list(zip(IMAGES.split(10), labels.split(10), strict=True))


def one_pixel_off():
    images = IMAGES.clone()
    images[-1, 0, 0, 0] += 1e-6
    return list(zip(images.split(10), LABELS.split(10), strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": one_bit_off()}, "model_digest"),
        ({"model": with_buffer_off()}, "model_digest"),
        ({"model": ensemble(threshold=0.06)}, "threshold"),
        ({"model": ensemble(threshold=None)}, "threshold"),
        ({"loader": relabelled()}, "data_digest"),
        ({"loader": one_pixel_off()}, "data_digest"),
        ({"loader": LOADER[:2]}, "batches"),
        ({"loader": list(zip(IMAGES.split(5), LABELS.split(5), strict=True))}, "batches"),
        ({"crowd": attackers(Counted(steps=3))}, "attackers_digest"),
        ({"crowd": attackers(Counted(eps=0.21))}, "attackers_digest"),
        ({"crowd": attackers(Counted(), Counted())}, "attackers_digest"),
        ({"crowd": [replace(attackers(Counted())[0], name="other")]}, "attackers_digest"),
        ({"crowd": [replace(attackers(Counted())[0], threat_model="semi-black-box")]}, "attackers_digest"),
        ({"crowd": [replace(attackers(Counted())[0], target=lambda m: m.branches["one"])]}, "attackers_digest"),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_evaluation_is_refused_and_what_differs_is_named(tmp_path, change, named):
    run(tmp_path, attackers(Counted()))
    held = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"was another; what differs: .*{named}"):
        run(tmp_path, **{"crowd": attackers(Counted()), "resume": True} | change)
    assert held == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def scaled(net, by):
    return lambda images: by * net(images)


def test_functions_are_told_apart_although_they_predict_the_same(tmp_path):
    net = colours(9.0)
    run(tmp_path, attackers(Counted()), model=scaled(net, 1.0))
    assert run(tmp_path, attackers(Counted()), model=scaled(copy.deepcopy(net), 1.0), resume=True)
    for other in (scaled(net, 2.0), scaled(colours(8.0), 1.0), lambda images: net(images)):
        with pytest.raises(CheckpointError, match="model_digest"):
            run(tmp_path, attackers(Counted()), model=other, resume=True)


def test_a_names_only_change_resumes(tmp_path):
    run(tmp_path, attackers(Counted()), name="one", data="x")
    report = run(tmp_path, attackers(Counted()), name="two", data="y", resume=True)
    assert (report.model, report.data) == ("two", "y")


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "one bit":
        content[-100] ^= 1
    else:
        content = b"not safetensors at all"
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "foreign"])
def test_a_damaged_file_is_named_and_can_be_computed_again(tmp_path, how):
    whole = run(tmp_path, attackers(Counted()))
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    damage(file, how)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged.*Delete it and resume"):
        run(tmp_path, attackers(Counted()), resume=True)
    file.unlink()
    attack = Counted()
    assert strip(run(tmp_path, attackers(attack), resume=True)) == strip(whole)
    assert attack._calls == [10]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff"])
def test_a_damaged_record_is_named(tmp_path, text):
    run(tmp_path, attackers(Counted()))
    (tmp_path / "evaluation.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged.*another folder"):
        run(tmp_path, attackers(Counted()), resume=True)


def test_the_record_says_what_was_evaluated(tmp_path):
    report = run(tmp_path, attackers(Counted()), seed=3)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["seed"] == 3
    assert record.items() <= report.provenance.items()
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "deeper"):
        with pytest.raises(InputError, match="cannot be written"):
            run(folder, attackers(Counted()))


def test_a_refused_attack_leaves_the_state_of_the_others(tmp_path):
    """An attack that leaves its ball stops the evaluation; nothing of it is kept."""

    @dataclass(frozen=True, kw_only=True)
    class Outside:
        eps: float = 0.01
        norm: str = "linf"

        def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
            return 1 - images

    with pytest.raises(InputError, match="left its ball"):
        run(tmp_path, attackers(Counted(), Outside()))
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["attacker-00-batch-00000.safetensors"]

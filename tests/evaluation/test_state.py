"""An interrupted evaluation resumes to the same report, and never from the files of another evaluation."""

import copy
import json
import os
import shutil
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from tiny import toy_data
from zepad._version import __version__
from zepad.attacks import PGD
from zepad.ensemble import BranchEnsemble
from zepad.errors import CheckpointError, ConfigError, InputError
from zepad.evaluation import Attacker, evaluate, resuming
from zepad.sealed import read_sealed, seal

EPS = 0.2
RECORD = "evaluation.json"
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


@pytest.mark.parametrize(
    "at", [pytest.param(1, marks=pytest.mark.exhaustive), 2, pytest.param(3, marks=pytest.mark.exhaustive)]
)
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


def test_the_time_of_a_resumed_evaluation_has_what_was_spent_before(tmp_path, monkeypatch):
    """A clock that stands still while the model is asked, and moves by one second for each batch that is attacked."""
    clock = iter(range(1000))
    monkeypatch.setattr("zepad.evaluation.crafting.time.perf_counter", lambda: float(next(clock)))
    first = run(tmp_path, attackers(Counted()))
    again = run(tmp_path, attackers(Counted()), resume=True)
    crafting = sum(result.cost.seconds for result in first.attacks)
    assert crafting == len(LOADER)
    assert crafting < first.provenance["seconds"]
    assert crafting < again.provenance["seconds"] < first.provenance["seconds"] + crafting


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


DATA = r"the images, their labels or their order \(data_digest\)"
THRESHOLD = r"threshold \(0\.05 then, {} now\)"


def another(what):
    return rf"the attackers \(attackers_digest; {what}\)"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": one_bit_off()}, r"the model \(model_digest\)"),
        ({"model": with_buffer_off()}, r"the model \(model_digest\)"),
        ({"model": ensemble(threshold=0.06)}, THRESHOLD.format(0.06) + ".*"),
        ({"model": ensemble(threshold=None)}, THRESHOLD.format(None) + ".*"),
        ({"loader": relabelled()}, DATA),
        ({"loader": one_pixel_off()}, DATA),
        ({"loader": LOADER[:2]}, r"the number of images \(25 then, 20 now\)"),
        (
            {"loader": list(zip(IMAGES.split(5), LABELS.split(5), strict=True))},
            r"the number of batches \(3 then, 5 now\)",
        ),
        ({"crowd": attackers(Counted(steps=3))}, another("others: PGD 0")),
        ({"crowd": attackers(Counted(eps=0.21))}, another("others: PGD 0")),
        ({"crowd": attackers(Counted(), Counted())}, another("new: PGD 1")),
        ({"crowd": []}, another("missing now: PGD 0")),
        ({"crowd": [replace(attackers(Counted())[0], name="other")]}, another("missing now: PGD 0; new: other")),
        (
            {"crowd": [replace(attackers(Counted())[0], threat_model="semi-black-box")]},
            another("others: PGD 0"),
        ),
        (
            {"crowd": [replace(attackers(Counted())[0], target=lambda m: m.branches["one"])]},
            another("others: PGD 0"),
        ),
        ({"seed": 1}, r"seed \(0 then, 1 now\)"),
        ({"seed": 1, "loader": LOADER[:2]}, r"seed \(0 then, 1 now\), the number of images \(25 then, 20 now\)"),
    ],
)
def test_another_evaluation_is_refused_before_any_work_and_the_causes_alone_are_named(tmp_path, change, named):
    run(tmp_path, attackers(Counted()))
    held = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    arguments = {"crowd": attackers(Counted()), "model": ensemble(), "resume": True} | change
    asked = []
    arguments["model"].register_forward_hook(lambda *_: asked.append(1))
    arguments["model"].branches["one"].register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(CheckpointError, match=rf"was another; what differs: {named}\. Resume"):
        run(tmp_path, **arguments)
    assert not asked
    assert held == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_attackers_in_another_order_are_others(tmp_path):
    crowd = attackers(Counted(), Counted(steps=3))
    run(tmp_path, crowd)
    with pytest.raises(CheckpointError, match="attackers_digest; in another order"):
        run(tmp_path, crowd[::-1], resume=True)


def test_another_version_of_the_library_is_refused(tmp_path, monkeypatch):
    run(tmp_path, attackers(Counted()))
    monkeypatch.setattr(resuming, "__version__", "9.9")
    with pytest.raises(CheckpointError, match=rf"differs: library_version \({__version__} then, 9\.9 now\)\. Resume"):
        run(tmp_path, attackers(Counted()), resume=True)


def test_a_module_that_decides_otherwise_by_other_code_is_refused(tmp_path, monkeypatch):
    """The weights, the settings and the name of the class are the same."""
    run(tmp_path, attackers(Counted()), model=colours(9.0))
    monkeypatch.setattr(nn.Flatten, "forward", lambda _, x: x.flatten(1) * torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(CheckpointError, match=r"differs: what the model says of the same images \(predictions"):
        run(tmp_path, attackers(Counted()), model=colours(9.0), resume=True)


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
    elif how == "longer":
        content += bytes(1 << 21)
    else:
        content = b"not safetensors at all"
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "longer", "foreign"])
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


SMALL = list(zip(IMAGES[:4].split(2), LABELS[:4].split(2), strict=True))


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_altered_byte_is_noticed(tmp_path, step):
    """Also one that changes no tensor: costs, digests, the spaces that fill up the header."""
    run(tmp_path, attackers(Counted()), loader=SMALL)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    content = file.read_bytes()
    for position in range(0, len(content), step):
        altered = bytearray(content)
        altered[position] ^= 0x29  # makes a tab of a space
        file.write_bytes(altered)
        with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
            run(tmp_path, attackers(Counted()), loader=SMALL, resume=True)


def test_a_fifo_is_refused_and_nobody_waits_for_a_writer(tmp_path):
    run(tmp_path, attackers(Counted()))
    for name, message in (("attacker-00-batch-00001.safetensors", "is damaged.*no regular"), (RECORD, "no regular")):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
            run(tmp_path, attackers(Counted()), resume=True)


def swapped(tmp_path, **changes):
    """The message of an evaluation that finds the files of another one among its own."""
    run(tmp_path / "own", attackers(Counted(), Counted(steps=3)))
    arguments = {"crowd": attackers(Counted(), Counted(steps=3))} | changes
    run(tmp_path / "other", **arguments)
    file = "attacker-00-batch-00000.safetensors"
    shutil.copy(tmp_path / "other" / file, tmp_path / "own" / file)
    with pytest.raises(CheckpointError, match=f"{file} is of another evaluation") as caught:
        run(tmp_path / "own", attackers(Counted(), Counted(steps=3)), resume=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": one_bit_off()}, "another model"),
        ({"model": ensemble(threshold=0.06)}, "other settings"),
        ({"crowd": attackers(Counted(eps=0.21), Counted(steps=3))}, "another attacker"),
        ({"crowd": attackers(Counted(steps=3), Counted(steps=3))}, "another attacker"),
        ({"loader": LOADER[:2]}, "other settings"),
        ({"loader": LOADER[::-1]}, "another batch"),
        ({"seed": 1}, "other settings"),
    ],
)
def test_a_file_of_another_evaluation_is_refused_by_name(tmp_path, change, named):
    assert named in swapped(tmp_path, **change)


@pytest.mark.parametrize(
    ("source", "named"),
    [("attacker-01-batch-00000", "another attacker"), ("attacker-00-batch-00001", "another batch")],
)
def test_a_file_in_the_place_of_another_is_refused_by_name(tmp_path, source, named):
    run(tmp_path, attackers(Counted(), Counted(steps=3)))
    shutil.copy(tmp_path / f"{source}.safetensors", tmp_path / "attacker-00-batch-00000.safetensors")
    with pytest.raises(
        CheckpointError,
        match=f"attacker-00-batch-00000.safetensors is of another evaluation: it was made with {named}\\.",
    ):
        run(tmp_path, attackers(Counted(), Counted(steps=3)), resume=True)


def test_two_batches_of_the_same_images_have_files_of_their_own(tmp_path):
    """Their attacks start at other random points."""
    twice = [LOADER[0], LOADER[0]]
    run(tmp_path, attackers(Counted()), loader=twice)
    shutil.copy(*(tmp_path / f"attacker-00-batch-0000{number}.safetensors" for number in (0, 1)))
    with pytest.raises(CheckpointError, match="another batch"):
        run(tmp_path, attackers(Counted()), loader=twice, resume=True)


def forge(file, change):
    """Change a file as someone does who knows how it is sealed."""
    content = read_sealed(file, limit=1 << 20)
    tensors, record = content.tensors, json.loads(content.record)
    change(tensors)
    del record["sha256"]
    file.write_bytes(seal(tensors, record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, None),
        (lambda t: t["images"].add_(0.3), "left its ball"),
        (lambda t: t["images"].fill_(torch.nan), "no finite images"),
        (lambda t: t.update(images=t["images"][:5]), "not the shapes"),
        (lambda t: t.update(images=t["images"].double()), "not the shapes"),
        (lambda t: t["predictions"].fill_(-1), "classes must not be negative"),
        (lambda t: t["confidences"].fill_(torch.nan), r"confidences must lie in \[0, 1\]"),
        (lambda t: t["scores"].fill_(torch.nan), "scores must not be NaN"),
        (lambda t: t.pop("scores"), "not the shapes"),
        (lambda t: t.update(more=torch.zeros(1)), "not the shapes"),
    ],
)
def test_what_no_evaluation_writes_is_refused_although_it_is_sealed(tmp_path, change, message):
    run(tmp_path, attackers(Counted()))
    file = tmp_path / "attacker-00-batch-00001.safetensors"
    forge(file, change)
    if message is None:
        run(tmp_path, attackers(Counted()), resume=True)
        return
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: .*{message}"):
        run(tmp_path, attackers(Counted()), resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\xff", "[" * 10**5, '{"seed": NaN}', '"\\ud800"'])
def test_a_damaged_record_is_named(tmp_path, text):
    run(tmp_path, attackers(Counted()))
    (tmp_path / RECORD).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged.*another folder"):
        run(tmp_path, attackers(Counted()), resume=True)


@pytest.mark.parametrize("name", ["attackers", "predictions_digest", "weights_digest", "threshold"])
def test_a_record_that_does_not_say_what_it_should_is_that_of_another(tmp_path, name):
    run(tmp_path, attackers(Counted()))
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, name: None}))
    with pytest.raises(CheckpointError, match="was another"):
        run(tmp_path, attackers(Counted()), resume=True)


def test_files_without_their_record_are_adopted_by_nobody(tmp_path):
    run(tmp_path, attackers(Counted()))
    (tmp_path / RECORD).unlink()
    with pytest.raises(InputError, match="resume=True"):
        run(tmp_path, attackers(Counted()))
    with pytest.raises(CheckpointError, match=r"but not evaluation\.json"):
        run(tmp_path, attackers(Counted()), resume=True)


def test_the_record_says_what_was_evaluated(tmp_path):
    report = run(tmp_path, attackers(Counted()), seed=3)
    record = json.loads((tmp_path / RECORD).read_text())
    assert (record["seed"], record["images"], list(record["attackers"])) == (3, 25, ["PGD 0"])
    for name in ("model_digest", "weights_digest", "threshold", "data_digest", "batches", "seed"):
        assert report.provenance[name] == record[name]
    assert {file.name for file in tmp_path.iterdir()} == {
        RECORD,
        *(f"attacker-00-batch-0000{number}.safetensors" for number in range(3)),
    }


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

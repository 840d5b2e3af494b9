"""Training against attacks on public encoders: the bank's promises, the objectives' equations, and what they reach."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, ConfigError, EncoderSpec, HardenConfig, HeadConfig, InputError, ZePAD
from zepad.attacks import FeaturePGD
from zepad.data import digits
from zepad.encoders import build_encoder
from zepad.encoders.given import as_encoder
from zepad.modules import Branch, MLPHead
from zepad.objectives import (
    Batch,
    DAEMixture,
    FlipCrop,
    ObjectiveOutput,
    Recipe,
    fare,
    pgd_at,
    restoration,
    static_adversarial_training,
)
from zepad.training import fit_heads, harden_branch
from zepad.training.bank import Crafter, DAEBank, static_daes
from zepad.training.bank.bank import _Record, draw_members
from zepad.training.bank.crafting import level, quantize
from zepad.training.bank.reading import Images
from zepad.training.bank.static import Banked, Streamed
from zepad.training.loop import rate_factor
from zepad.training.run import Run, resolved_settings

EPS = 8 / 255
QUICK = HardenConfig(eps=EPS, epochs=1, val_fraction=0.25)
SMALL = DAEMixture(steps=1, distances=("cosine",))
RECIPES = {
    "restoration": restoration(static=SMALL),
    "restoration, own": restoration(static=SMALL, own_eps=EPS, own_steps=1),
    "static": static_adversarial_training(static=SMALL),
    "static, all": static_adversarial_training(static=SMALL, restoration_weight=0.5, own_eps=EPS, own_steps=1),
}
QUICKLY = ("restoration", "static, all")
each_recipe = pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, id=name, marks=() if name in QUICKLY else pytest.mark.slow) for name, r in RECIPES.items()],
)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def loader_of(images: Tensor, labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)


def harsh_data() -> tuple[Tensor, Tensor]:
    """Toy images whose pixels lie at the edges of the box as often as inside."""
    images, labels = toy_data(48)
    return (3 * (images - 0.3)).clamp(0, 1), labels


def build(
    folder: Path,
    *,
    mixture: DAEMixture = SMALL,
    public: dict[str, nn.Module] | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    eps: float = EPS,
    seed: int = 0,
    precision: Any = "fp32",
) -> DAEBank:
    torch.manual_seed(3)
    public = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()} if public is None else public
    crafter = Crafter(public, mixture.members(tuple(public), eps), precision, torch.device("cpu"))
    images = Images.behind(loader_of(*(data or harsh_data())))
    assert images is not None
    return DAEBank.build(crafter, images, folder, per_image=mixture.per_image, seed=seed, progress=False)


def spying(recipe: Recipe, seen: list[Batch]) -> Recipe:
    """The same recipe, which notes its batches."""

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        seen.append(batch)
        return recipe.objective(branch, batch)

    return replace(recipe, objective=objective)


# residuals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1 / 255, 8 / 255, 0.3, 1.0])
def test_a_quantized_residual_stays_in_ball_and_box_exactly(radius: float) -> None:
    images = torch.cat([torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8).round()])
    attacked = (images + radius * (4 * torch.rand_like(images) - 2).clamp(-1, 1)).clamp(0, 1)
    kept = (images + quantize(attacked - images, radius).float() * level(radius)).clamp(0, 1)
    assert ((kept.double() - images.double()).abs() <= radius).all()
    assert (kept >= 0).all()
    assert (kept <= 1).all()
    assert (kept - attacked).abs().max() <= radius / 100  # little of the attack is lost


def test_every_image_of_a_bank_is_in_the_ball_of_its_own_attack(tmp_path: Path) -> None:
    mixture = DAEMixture(steps=2, per_image=3)
    bank, (images, _) = build(tmp_path, mixture=mixture), harsh_data()
    assert bank.members.shape == (48, 3)
    torch.manual_seed(0)
    for _ in range(4):  # a different one of three may be drawn each time
        for index, image in enumerate(images):
            attacked = (image + bank[index]).clamp(0, 1).double() - image.double()
            largest = float(bank.radii[bank.members[index]].max())
            assert 0.2 * EPS < float(attacked.abs().max()) <= largest


def test_attacks_are_drawn_uniformly_without_repetition_by_the_seed() -> None:
    drawn = draw_members(4000, 9, 2, seed=0)
    assert torch.equal(drawn, draw_members(4000, 9, 2, seed=0))
    assert not torch.equal(drawn, draw_members(4000, 9, 2, seed=1))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert drawn.flatten().bincount(minlength=9).float().sub(8000 / 9).abs().max() < 150


def test_the_attack_of_the_bank_is_feature_pgd_on_the_named_encoders(tmp_path: Path) -> None:
    mixture = DAEMixture(sources=(("auxiliary",),), distances=("l2",), budgets=(1.0,), steps=3)
    public: dict[str, nn.Module] = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}
    bank, (images, _) = build(tmp_path, mixture=mixture, public=public), harsh_data()
    attacked = torch.stack([image + bank[i] for i, image in enumerate(images)])

    def moved(batch: Tensor) -> float:
        with torch.no_grad():
            encoder = public["auxiliary"].eval()
            return float((encoder(batch) - encoder(images)).norm(dim=1).mean())

    random = images + EPS * (2 * torch.rand_like(images) - 1)
    assert moved(attacked.clamp(0, 1)) > 2 * moved(random.clamp(0, 1))


# digest and file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"mixture": replace(SMALL, distances=("l2",))},
        {"mixture": replace(SMALL, budgets=(0.75, 1.0))},
        {"mixture": replace(SMALL, steps=2)},
        {"mixture": replace(SMALL, sources=(("victim",),))},
        {"mixture": replace(SMALL, variants=({"momentum": 1.0},))},
        {"mixture": replace(SMALL, variants=({"diversity": 0.5},))},
        {"mixture": replace(SMALL, per_image=2)},
        {"mixture": replace(SMALL, eps=EPS / 2)},
        {"mixture": replace(SMALL, further={"third": TinyEncoder()})},
        {"eps": 2 * EPS},
        {"seed": 1},
        {"precision": "bf16"},
        {"public": {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}},
        {"data": (harsh_data()[0].clamp(0, 0.999), harsh_data()[1])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_digest_changes_with_any_setting(changed: dict[str, Any], tmp_path: Path) -> None:
    if "mixture" in changed and changed["mixture"].further:
        changed = {**changed, "public": {"victim": TinyEncoder(), "auxiliary": TinyEncoder(), "third": TinyEncoder()}}
    first, second = build(tmp_path), build(tmp_path, **changed)
    assert first.digest != second.digest
    assert first.file != second.file


def test_the_digest_does_not_change_with_the_order_or_the_labels_of_a_loader() -> None:
    images, labels = harsh_data()
    plain = DataLoader(TensorDataset(images, labels), batch_size=7)
    found = [Images.behind(x) for x in (plain, loader_of(images, labels), loader_of(images, labels.flip(0)))]
    assert len({x.digest for x in found if x is not None}) == 1


class Interrupted(Crafter):
    """A crafter that is killed after some batches."""

    left = 4

    def craft(self, *arguments: Any) -> Tensor:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().craft(*arguments)


def test_a_bank_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole")
    torch.manual_seed(3)
    public = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}
    images = Images.behind(loader_of(*harsh_data()))
    settings = (SMALL.members(tuple(public), EPS), "fp32", torch.device("cpu"))
    cut = Interrupted(public, *settings)
    with pytest.raises(KeyboardInterrupt):
        DAEBank.build(cut, images, tmp_path / "cut", progress=False)
    (half,) = (tmp_path / "cut").rglob("residuals.int8")
    assert half.read_bytes() != whole.file.read_bytes()
    rest = Interrupted(public, *settings)
    rest.left = 9 - 4  # nine attacks, one batch each: none is crafted twice
    resumed = DAEBank.build(rest, images, tmp_path / "cut", progress=False)
    assert rest.left == 0
    assert resumed.file.read_bytes() == whole.file.read_bytes()
    none = Interrupted(public, *settings)
    none.left = 0
    DAEBank.build(none, images, tmp_path / "cut", progress=False)  # found again, nothing is crafted


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 10**5,
        *(
            b'{"format": 2, "digest": "%s", "residuals": "", "chunks": ' + n + b"}"
            for n in (b"-1", b"1e999", b"NaN", b"null", b'"3"', b"true", b"2.5", b"[3]")
        ),
    ],
)
def test_a_damaged_record_of_a_bank_says_that_nothing_is_done(record: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bank.json"
    file.write_bytes(record.replace(b"%s", b"0" * 64))
    assert _Record(file, "0" * 64).read() == (0, "")
    _Record(file, "0" * 64).write(3, "ab")
    assert _Record(file, "0" * 64).read() == (3, "ab")
    assert _Record(file, "1" * 64).read() == (0, "")


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_of_a_bank_is_noticed_and_mended(where: float, bit: int, tmp_path: Path) -> None:
    bank = build(tmp_path)
    before = bank.file.read_bytes()
    rotten = bytearray(before)
    rotten[int(where * len(rotten))] ^= 1 << bit
    bank.file.write_bytes(rotten)
    assert build(tmp_path).file.read_bytes() == before


def test_the_record_of_a_lost_bank_does_not_vouch_for_the_next_one(tmp_path: Path) -> None:
    whole = build(tmp_path)
    before = whole.file.read_bytes()
    whole.file.unlink()
    torch.manual_seed(3)
    public = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}
    cut = Interrupted(public, SMALL.members(tuple(public), EPS), "fp32", torch.device("cpu"))
    cut.left = 0
    with pytest.raises(KeyboardInterrupt):
        DAEBank.build(cut, Images.behind(loader_of(*harsh_data())), tmp_path, progress=False)
    assert build(tmp_path).file.read_bytes() == before


def test_a_bank_that_finds_no_room_says_so_before_it_crafts(tmp_path: Path) -> None:
    """Writing to a mapped file that has no room on the disk would end the process."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with pytest.raises(InputError, match=r"bank_dir .* cannot be written: .*Choose a writable folder"):
            build(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert build(tmp_path).file.stat().st_size > 10_000


@pytest.mark.parametrize("fault", ["record", "file", "size"])
def test_a_damaged_bank_is_made_again(fault: str, tmp_path: Path) -> None:
    bank = build(tmp_path)
    before = bank.file.read_bytes()
    if fault == "record":
        (bank.file.parent / "bank.json").write_text("{")
    elif fault == "file":
        bank.file.unlink()
    else:
        bank.file.write_bytes(before[:-1])
    assert build(tmp_path).file.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="bank_dir .* cannot be written"):
        build(tmp_path / "taken")


# what reaches the loop --------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Images that are flipped at random inside the data set."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return (image.flip(2) if torch.rand(()) < 0.5 else image), self.labels[index]


class Endless(IterableDataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.labels, strict=True)


def loaders() -> dict[str, tuple[Any, type]]:
    images, labels = toy_data()
    data = TensorDataset(images, labels)
    weighted = WeightedRandomSampler(torch.rand(96).tolist(), 64)
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    return {
        "shuffled": (DataLoader(data, batch_size=16, shuffle=True), Banked),
        "weighted": (DataLoader(data, batch_size=16, sampler=weighted), Banked),
        "subset": (DataLoader(data, batch_size=16, sampler=SubsetRandomSampler(range(40))), Streamed),
        "own batches": (DataLoader(data, batch_sampler=[[5, 80, 3], [9, 1, 70]]), Streamed),
        "augmented": (DataLoader(Augmented(images, labels), batch_size=16, shuffle=True), Streamed),
        "iterable": (DataLoader(Endless(images, labels), batch_size=16), Streamed),
        "list": (batches, Streamed),
    }


@pytest.mark.parametrize("kind", loaders())
def test_static_examples_belong_to_the_images_of_their_batch(kind: str) -> None:
    loader, source = loaders()[kind]
    public = {"encoder": TinyEncoder()}
    with static_daes(SMALL, public, loader, QUICK, eps=QUICK.eps, folder=None, progress=False) as static:
        assert isinstance(static, source)
    seen: list[Batch] = []
    config = HardenConfig(eps=EPS, epochs=2)
    harden_branch(public["encoder"], loader, config, objective=spying(RECIPES["restoration"], seen), progress=False)
    for batch in seen:
        distance = (batch.static.double() - batch.images.double()).abs().flatten(1).max(dim=1).values
        assert (distance > 0.2 * EPS).all()  # any other image would be ten times as far
        assert (distance <= 1.25 * EPS).all()
        assert not batch.static.requires_grad
        assert 0 <= batch.static.min() <= batch.static.max() <= 1
    assert len(seen) > 2


@pytest.mark.slow
def test_workers_read_the_same_bank(tmp_path: Path) -> None:
    images, labels = toy_data()
    found = []
    for workers in (0, 2):
        loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True, num_workers=workers)
        config = replace(QUICK, epochs=2)
        torch.manual_seed(0)
        found.append(
            harden_branch(
                TinyEncoder(), loader, config, objective=RECIPES["restoration"], bank_dir=tmp_path, progress=False
            )
        )
    assert equal(state(found[0][0]), state(found[1][0]))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("given", [False, True])
def test_no_validation_image_is_in_the_bank(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = toy_data()
    crafted: list[Tensor] = []
    craft = Crafter.craft

    def spy(self: Crafter, member: int, batch: Tensor, generator: torch.Generator) -> Tensor:
        crafted.extend(batch)
        return craft(self, member, batch, generator)

    monkeypatch.setattr(Crafter, "craft", spy)
    seen: list[Batch] = []
    held_out = loader_of(images[:24], labels[:24]) if given else None
    train = loader_of(images[24:], labels[24:]) if given else loader_of(images, labels)
    recipe = spying(RECIPES["static"], seen)
    harden_branch(TinyEncoder(), train, QUICK, objective=recipe, val_loader=held_out, progress=False)
    trained = {image.numpy().tobytes() for batch in seen for image in batch.images}
    assert {image.numpy().tobytes() for image in crafted} == trained
    assert len(trained) == 72


def test_the_public_encoders_are_left_alone_and_get_no_gradient() -> None:
    victim, further = TinyEncoder(), TinyEncoder()
    before = state(victim), state(further)
    flags = [part.training for part in victim.modules()]
    found: list[list[Tensor | None]] = []
    base = restoration(static=replace(SMALL, further={"further": further}))

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        if not found:
            found.append([p.grad for p in branch.parameters()])
            assert not batch.public_features.requires_grad
        return base.objective(branch, batch)

    harden_branch(victim, loader_of(*toy_data()), QUICK, objective=replace(base, objective=objective), progress=False)
    assert found == [[None] * len(found[0])]
    assert equal(state(victim), before[0])
    assert equal(state(further), before[1])
    assert [part.training for part in victim.modules()] == flags
    assert all(p.grad is None for encoder in (victim, further) for p in encoder.parameters())


@each_recipe
def test_one_argument_of_harden_trains_and_resumes(recipe: Recipe, tmp_path: Path) -> None:
    config = HardenConfig(eps=EPS, epochs=2, val_fraction=0.25)
    encoders = TinyEncoder(), TinyEncoder()

    def hardened(folder: str, config: HardenConfig, **more: Any) -> ZePAD:
        defense, data = ZePAD.from_encoders(*encoders), loader_of(*toy_data())
        places = {"checkpoint_dir": tmp_path / folder, "bank_dir": tmp_path / "banks"}
        return defense.harden(data, config, objective=recipe, progress=False, **places, **more)

    whole = hardened("whole", config)
    assert whole.stage == "hardened"
    assert whole.provenance["harden"]["config"]["schedule"] == "onecycle"
    assert len(list((tmp_path / "banks").iterdir())) == 1  # one bank for both encoders
    hardened("cut", config)
    for last in (tmp_path / "cut").rglob("epoch-0001.pt"):
        last.unlink()
    resumed = hardened("cut", config, resume=True)
    assert equal(state(whole), state(resumed))


def test_restoration_takes_images_without_labels_and_never_looks_at_one() -> None:
    images, labels = toy_data()
    torch.manual_seed(0)
    encoder = TinyEncoder()
    bare = [(x,) for x in images.split(16)]
    labelled = [(x, y.flip(0)) for x, y in zip(images.split(16), labels.split(16), strict=True)]
    branches = [
        harden_branch(encoder, x, QUICK, objective=RECIPES["restoration"], progress=False)[0] for x in (bare, labelled)
    ]
    assert equal(state(branches[0].encoder), state(branches[1].encoder))
    assert isinstance(branches[0].head, nn.Identity)
    assert isinstance(branches[1].head, MLPHead)


# equations --------------------------------------------------------------------------------------------------------


def example() -> tuple[Branch, Batch]:
    branch = Branch(TinyEncoder(), MLPHead(8, 3)).double().eval()
    images, labels = toy_data(6)
    clean, static, own = (images.double() + 0.02 * i * torch.randn_like(images).double() for i in range(3))
    public, targets = torch.randn(2, 6, 8, dtype=torch.float64)
    return branch, Batch(clean, own, labels, targets, static, public)


def naive(branch: Branch, batch: Batch, parts: list[Tensor], target: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and mean squared distance from the target, of all parts."""
    losses, distances = [], []
    with torch.no_grad():
        for part in parts:
            for i in range(len(part)):
                features = branch.encoder(part[i : i + 1])[0].numpy()
                logits = branch.head(torch.from_numpy(features))[None].numpy()[0]
                losses.append(np.log(np.exp(logits).sum()) - logits[batch.labels[i]])
                distances.append(((features - target[i].numpy()) ** 2).sum())
    return float(np.mean(losses)), float(np.mean(distances))


def test_the_losses_are_their_equations() -> None:
    branch, batch = example()
    two, three = [batch.images, batch.static], [batch.images, batch.static, batch.adversarial]
    ce, _ = naive(branch, batch, two, batch.public_features)
    _, restored = naive(branch, batch, two, batch.public_features)
    _, own = naive(branch, batch, three, batch.targets)
    ce_own, joined = naive(branch, batch, three, batch.public_features)
    both = static_adversarial_training(restoration_weight=0.3, own_eps=EPS)
    for recipe, batched, expected in (
        (restoration(), batch, 2 * restored),
        (restoration(own_eps=EPS), batch._replace(public_features=None), 3 * own),
        (static_adversarial_training(), batch, ce),
        (both, batch, ce_own + 0.3 * joined),
    ):
        assert recipe.objective(branch, batched).loss.item() == pytest.approx(expected, rel=1e-5)


def test_restoration_of_an_untouched_encoder_on_clean_images_is_zero() -> None:
    branch = Branch(TinyEncoder(), nn.Identity()).eval()
    images, labels = toy_data(6)
    batch = Batch(images, images, labels, None, images, branch.encoder(images).detach())
    assert restoration().objective(branch, batch).loss.item() == pytest.approx(0, abs=1e-10)


def test_own_adversaries_have_a_budget_of_their_own() -> None:
    seen: list[Batch] = []
    recipe = spying(restoration(static=SMALL, own_eps=2 / 255, own_steps=3), seen)
    harden_branch(TinyEncoder(), loader_of(*toy_data()), QUICK, objective=recipe, progress=False)
    furthest = max(float((batch.adversarial - batch.images).abs().max()) for batch in seen)
    assert furthest == pytest.approx(2 / 255, rel=0.01)


def test_a_config_replaces_only_the_rates_that_it_states() -> None:
    rates = []
    for config in (QUICK, replace(QUICK, lr=0.5, schedule="cosine")):
        defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
        defense.harden(loader_of(*toy_data()), config, objective=RECIPES["restoration"], progress=False)
        settings = defense.provenance["harden"]["config"]
        rates.append([settings[name] for name in ("lr", "weight_decay", "schedule")])
    assert rates == [[1e-3, 0.0, "onecycle"], [0.5, 0.0, "cosine"]]
    assert (fare().rates.lr, fare().rates.schedule) == (2e-3, "cosine")


@pytest.mark.parametrize(
    ("recipe", "stated", "radius", "steps", "step_size"),
    [
        (restoration(own_eps=EPS / 2), {}, EPS / 2, 2, EPS / 2),
        (restoration(own_eps=EPS / 2, own_steps=4), {}, EPS / 2, 4, EPS / 4),
        (restoration(own_eps=EPS / 2, own_steps=4), {"steps": 10}, EPS / 2, 10, EPS / 10),
        (restoration(own_eps=EPS / 2), {"step_size": EPS / 8}, EPS / 2, 2, EPS / 8),
        (static_adversarial_training(own_eps=EPS), {"steps": 1}, EPS, 1, 2 * EPS),
        (pgd_at(), {}, EPS, 5, 2 * EPS / 5),
        (pgd_at(), {"steps": 10, "step_size": EPS / 4}, EPS, 10, EPS / 4),
    ],
)
def test_a_config_replaces_the_steps_that_it_states(
    recipe: Recipe, stated: dict[str, Any], radius: float, steps: int, step_size: float
) -> None:
    config = HardenConfig(eps=EPS, **stated)
    run = Run.on(
        as_encoder("victim", TinyEncoder()),
        name="harden",
        stage="hardening",
        branch="victim",
        index=0,
        recipe=recipe,
        config=config,
        num_classes=2,
    )
    assert run.attack is not None
    assert (run.attack.eps, run.attack.steps) == (radius, steps)
    assert run.attack.step_size == pytest.approx(step_size)
    assert resolved_settings(config, recipe)["steps"] == steps


def test_a_recipe_that_attacks_no_encoder_in_training_has_no_steps() -> None:
    assert resolved_settings(HardenConfig(steps=7), restoration())["steps"] is None


def test_one_cycle_rises_to_its_peak_and_falls_to_zero() -> None:
    factors = [rate_factor("onecycle", epoch=0, progress=i / 100) for i in range(101)]
    assert factors[0] == pytest.approx(1 / 25)
    assert factors.index(max(factors)) == 30
    assert max(factors) == pytest.approx(1)
    assert factors[100] == pytest.approx(0)
    assert sorted(factors[:31]) == factors[:31]
    assert sorted(factors[30:], reverse=True) == factors[30:]


# augmentation ---------------------------------------------------------------------------------------------------


def test_flip_and_crop_move_whole_images() -> None:
    images = torch.arange(1.0, 2 * 3 * 5 * 4 + 1).view(2, 3, 5, 4)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    possible = {
        (padded if not flip else padded.flip(3))[i, :, top : top + 5, left : left + 4].numpy().tobytes()
        for i in range(2)
        for flip in (False, True)
        for top in range(5)
        for left in range(5)
    }
    generator = torch.Generator().manual_seed(0)
    found = [x.numpy().tobytes() for _ in range(40) for x in FlipCrop(padding=2)(images, generator)]
    assert set(found) <= possible
    assert len(set(found)) > 40
    assert torch.equal(FlipCrop(flip=False, padding=0)(images, generator), images)


def test_augmentation_is_the_same_for_an_image_and_its_static_example() -> None:
    seen: list[Batch] = []
    images, labels = toy_data()
    recipe = spying(restoration(static=SMALL, augmentation=FlipCrop(padding=3)), seen)
    harden_branch(TinyEncoder(), loader_of(images, labels), QUICK, objective=recipe, progress=False)
    given = {image.numpy().tobytes() for image in images}
    for batch in seen:
        assert float((batch.static - batch.images).abs().max()) <= 1.25 * EPS
        assert sum(image.contiguous().numpy().tobytes() in given for image in batch.images) < 3


# settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distances": ("l1",)}, "distances must be from"),
        ({"budgets": (0.0,)}, "budgets must be positive"),
        ({"budgets": ()}, "budgets must be not empty"),
        ({"steps": 0}, "steps must be"),
        ({"per_image": 0}, "per_image must be"),
        ({"eps": 8}, "Write 8 / 255"),
    ],
)
def test_a_mixture_refuses_settings_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DAEMixture(**settings)


@pytest.mark.parametrize(
    ("mixture", "public", "eps", "message"),
    [
        (DAEMixture(sources=(("third",),)), ("victim",), EPS, "needs public encoders third; there are victim"),
        (DAEMixture(), (), EPS, "needs public encoders to attack; there are none"),
        (DAEMixture(), ("victim",), None, r"needs a radius. Pass DAEMixture\(eps=8 / 255\)"),
        (DAEMixture(variants=({"speed": 1},)), ("victim",), EPS, "settings of FeaturePGD"),
        (DAEMixture(variants=({"norm": "l2"},)), ("victim",), EPS, "L-infinity"),
        (DAEMixture(budgets=(3.0,)), ("victim",), 0.5, "eps must lie"),
    ],
)
def test_a_mixture_says_what_is_missing(mixture: DAEMixture, public: tuple[str, ...], eps: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture.members(public, eps)


def test_names_of_recipes_hold_what_differs_from_the_defaults() -> None:
    mixture = DAEMixture(steps=3, further={"third": TinyEncoder()})
    assert str(DAEMixture()) == "DAEMixture()"
    assert str(mixture) == "DAEMixture(steps=3, further=['third'])"
    assert "DAEMixture(steps=3" in restoration(static=mixture).name
    assert restoration().name != restoration(own_eps=EPS).name


@pytest.mark.parametrize("recipe", [restoration, static_adversarial_training])
def test_recipes_refuse_settings_by_name(recipe: Any) -> None:
    with pytest.raises(ConfigError, match="Write 8 / 255"):
        recipe(own_eps=8)
    with pytest.raises(ConfigError, match="own_steps must be"):
        recipe(own_steps=0)


# what it is for ---------------------------------------------------------------------------------------------------


def test_restored_digits_keep_the_old_head_and_withstand_attacks_on_the_public_victim() -> None:
    eps = 25 / 255
    train, test = digits("train"), digits("test")
    images, labels = test.images[:150], test.labels[:150]
    victim = build_encoder(EncoderSpec.parse("zepad:digits-barlow-twins"), pretrained=True)
    torch.manual_seed(0)
    loader = DataLoader(train, batch_size=128)
    heads = HeadConfig(epochs=10)
    head = fit_heads({"e": victim}, loader, heads, channels=3, num_classes=10, progress=False)["e"]
    static = DAEMixture(distances=("l2",), budgets=(1.0,), steps=2)  # not the attack of the test
    recipe = restoration(static=static)
    config = HardenConfig(eps=eps, epochs=3, val_fraction=0.0)
    unlabelled = DataLoader(TensorDataset(train.images), batch_size=128, shuffle=True)
    restored, _ = harden_branch(victim, unlabelled, config, objective=recipe, progress=False)
    attacked = FeaturePGD(eps=eps, steps=5)(victim, images, generator=torch.Generator().manual_seed(0))

    def accuracy(encoder: nn.Module, batch: Tensor) -> float:
        with torch.no_grad():
            return float((Branch(encoder, head).eval()(batch).argmax(1) == labels).float().mean())

    assert accuracy(victim, attacked) < 0.2
    assert accuracy(restored.encoder, attacked) > accuracy(victim, attacked) + 0.5
    assert accuracy(restored.encoder, images) > accuracy(victim, images) - 0.05


# the benign branch ----------------------------------------------------------------------------------------------

KEEPS_VICTIM = {"detector": "features"}  # the detector that looks at the undefended victim


def hardened_toy(**options: Any) -> tuple[ZePAD, DataLoader]:
    loader = loader_of(*toy_data(48))
    torch.manual_seed(5)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), num_classes=3, **options)
    return defense.harden(loader, QUICK, objective=RECIPES["restoration"], progress=False), loader


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ({"preset": "paper"}, {"victim", "auxiliary", "benign"}),
        (KEEPS_VICTIM, {"victim", "auxiliary", "benign", "reference"}),
    ],
)
def test_the_benign_branch_is_trained_against_every_encoder_that_others_may_have(
    options: dict[str, Any], sources: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defense, loader = hardened_toy(**options)
    public = {name: state(defense.encoder(name)) for name in sources}
    crafted_on: dict[str, Any] = {}
    build_bank = DAEBank.build

    def spy(crafter: Crafter, *arguments: Any, **named: Any) -> DAEBank:
        crafted_on.update({name: state(encoder) for name, encoder in crafter._encoders.items()})
        crafted_on["radii"] = sorted(set((crafter.radii / EPS).tolist()))
        return build_bank(crafter, *arguments, **named)

    monkeypatch.setattr(DAEBank, "build", spy)
    config = BenignConfig(epochs=1, val_fraction=0.25)
    defense.fit_benign(loader, config, objective=RECIPES["static"], bank_dir=tmp_path, progress=False)
    assert crafted_on.pop("radii") == pytest.approx([0.75, 1.0, 1.25])  # multiples of the radius of the hardening
    assert set(crafted_on) == sources
    assert all(equal(crafted_on[name], public[name]) for name in sources)
    assert not equal(state(defense.encoder("benign")), public["benign"])
    assert equal(state(defense.encoder("victim")), public["victim"])
    assert defense.provenance["benign"]["method"] == RECIPES["static"].name


def test_a_resistant_benign_branch_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, cut = (hardened_toy()[0] for _ in range(2))
    loader, base = loader_of(*toy_data(48)), RECIPES["static, all"]
    config = BenignConfig(epochs=2, val_fraction=0.25)
    calls = 0

    def interrupted(branch: Branch, batch: Batch) -> ObjectiveOutput:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second epoch
            raise KeyboardInterrupt
        return base.objective(branch, batch)

    common: dict[str, Any] = {"bank_dir": tmp_path / "bank", "progress": False}
    torch.manual_seed(0)
    whole.fit_benign(loader, config, objective=base, **common)
    common["checkpoint_dir"] = tmp_path / "epochs"
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        cut.fit_benign(loader, config, objective=replace(base, objective=interrupted), **common)
    cut.fit_benign(loader, config, objective=base, resume=True, **common)
    assert equal(state(whole.encoder("benign")), state(cut.encoder("benign")))


@pytest.mark.parametrize(
    ("config", "recipe", "message"),
    [
        (BenignConfig(freeze_encoder=True), RECIPES["static"], "freeze_encoder is True"),
        (BenignConfig(), RECIPES["restoration"], "trains no head"),
        (BenignConfig(), pgd_at(), "budget of HardenConfig"),
    ],
)
def test_a_recipe_that_does_not_suit_the_benign_branch_is_refused(
    config: BenignConfig, recipe: Recipe, message: str
) -> None:
    defense, loader = hardened_toy()
    before = state(defense)
    with pytest.raises(ConfigError, match=message):
        defense.fit_benign(loader, config, objective=recipe, progress=False)
    assert equal(before, state(defense))
    assert defense.stage == "hardened"

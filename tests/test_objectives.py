"""Objectives agree with the papers' equations, change only the modules they train, and make a model more robust."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import reference
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, CheckpointError, ConfigError, HardenConfig, HeadConfig, InputError, ZePAD
from zepad.attacks import PGD
from zepad.modules import Branch, MLPHead
from zepad.objectives import Batch, ObjectiveOutput, Recipe, fare, gen_af, mart, pgd_at, trades, zepad_recipe
from zepad.objectives.base import Inner
from zepad.objectives.gen_af import robust_criticality
from zepad.training import fit_heads, harden_branch

QUICK = HardenConfig(epochs=1, steps=1)
ONE_EPOCH = {"adaptation_epochs": 1, "probes": 16}
METHODS = {
    "pgd_at": pgd_at(),
    "trades": trades(),
    "mart": mart(),
    "gen_af": gen_af(**ONE_EPOCH),
    "fare": fare(),
    "zepad": zepad_recipe(structure_weight=1.0),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {key for key in a if not torch.equal(a[key], b[key])}


def tiny_branch() -> Branch:
    return Branch(TinyEncoder(), MLPHead(8, 3))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def data(labels: Tensor | None = None) -> DataLoader:
    images, own = toy_data()
    return DataLoader(TensorDataset(images, own if labels is None else labels), batch_size=16, shuffle=True)


# the equations --------------------------------------------------------------------------------------------------


def example() -> tuple[Branch, Batch]:
    """A branch in evaluation mode, in double precision, and a batch whose adversarial images are random."""
    branch = tiny_branch().double().eval()
    with torch.no_grad():
        branch.head[5].weight.mul_(100)  # or all probabilities would be alike
    images, labels = toy_data(12)
    images = images.double()
    attacked = (images + 0.3 * torch.randn_like(images)).clamp(0, 1)
    return branch, Batch(images, attacked, labels, torch.randn(12, 8, dtype=torch.float64))


def probabilities(branch: Branch, images: Tensor) -> np.ndarray:
    logits = branch(images).detach().numpy()
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def naive_pgd_at(branch: Branch, batch: Batch) -> float:
    q = probabilities(branch, batch.adversarial)
    return np.mean([-np.log(q[i, y]) for i, y in enumerate(batch.labels)])


def naive_divergences(branch: Branch, batch: Batch) -> np.ndarray:
    p, q = probabilities(branch, batch.images), probabilities(branch, batch.adversarial)
    return np.array([sum(a * np.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)])


def naive_trades(branch: Branch, batch: Batch) -> float:
    p = probabilities(branch, batch.images)
    natural = np.mean([-np.log(p[i, y]) for i, y in enumerate(batch.labels)])
    return natural + 4 * naive_divergences(branch, batch).mean()


def naive_mart(branch: Branch, batch: Batch) -> float:
    p, q = probabilities(branch, batch.images), probabilities(branch, batch.adversarial)
    total = 0.0
    for i, y in enumerate(batch.labels.tolist()):
        best_wrong = max(q[i, k] for k in range(q.shape[1]) if k != y)
        boosted = -np.log(q[i, y]) - np.log(1 - best_wrong)
        total += boosted + 4 * naive_divergences(branch, batch)[i] * (1 - p[i, y])
    return total / len(p)


def naive_gen_af(branch: Branch, batch: Batch) -> float:
    adversarial, benign = (branch(x).detach().numpy() for x in (batch.adversarial, batch.images))
    genetic = reference.genetic_regularization(adversarial, benign, batch.labels.numpy())
    return naive_pgd_at(branch, batch) + 4 * genetic / len(batch.labels)


def naive_fare(branch: Branch, batch: Batch) -> float:
    features = branch.encoder(batch.adversarial).detach().numpy()
    return np.mean([((a - b) ** 2).sum() for a, b in zip(features, batch.targets.numpy(), strict=True)])


@pytest.mark.parametrize(
    ("method", "naive"),
    [
        (pgd_at(), naive_pgd_at),
        (trades(beta=4), naive_trades),
        (mart(beta=4), naive_mart),
        (gen_af(genetic_weight=4), naive_gen_af),
        (fare(), naive_fare),
    ],
    ids=["pgd_at", "trades", "mart", "gen_af", "fare"],
)
def test_the_loss_is_the_papers_equation(method: Recipe, naive) -> None:
    branch, batch = example()
    # Half precision aside, objectives compute in float32 at least.
    assert method.objective(branch, batch).loss.item() == pytest.approx(naive(branch, batch), rel=1e-5)


def test_trades_of_unattacked_images_is_their_cross_entropy() -> None:
    branch, batch = example()
    unattacked = batch._replace(adversarial=batch.images)
    loss = trades(beta=1e6).objective(branch, unattacked).loss
    expected = nn.functional.cross_entropy(branch(batch.images), batch.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_mart_does_not_pull_an_image_that_is_surely_right() -> None:
    _, batch = example()
    logits = iter(())

    class Given(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return next(logits)

    certain = 50.0 * nn.functional.one_hot(batch.labels, 3)
    attacked = torch.randn(12, 3)
    losses = []
    for clean in (certain, certain.roll(1, dims=1)):  # surely right, surely wrong
        for beta in (0.0, 5.0):
            logits = iter((attacked, clean))
            losses.append(mart(beta=beta).objective(Branch(nn.Identity(), Given()), batch).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[3] > losses[2] + 1


# the inner problems ---------------------------------------------------------------------------------------------


@each_method
def test_the_inner_attack_touches_neither_gradients_nor_statistics(method: Recipe) -> None:
    found = []

    def spy(branch: Branch, batch: Batch) -> ObjectiveOutput:
        if not found:
            found.append(([p.grad for p in branch.parameters()], state(branch.encoder), batch, branch.head.training))
        return method.objective(branch, batch)

    encoder = TinyEncoder()
    # Dropout of a head that is not trained would make its clean logits, which FARE does not use, random.
    harden_branch(encoder, data(), QUICK, objective=replace(method, objective=spy, adaptation=None), progress=False)
    gradients, before, batch, head_trains = found[0]
    assert gradients == [None] * len(gradients)
    assert differing(before, {f"backbone.{k}": v for k, v in state(encoder).items()}) == set()
    assert head_trains == method.trains_head
    distance = (batch.adversarial - batch.images).abs().max()
    assert 0 < distance <= QUICK.eps + 1e-6
    assert 0 <= batch.adversarial.min() <= batch.adversarial.max() <= 1


def test_the_loop_attacks_with_the_methods_loss_model_and_targets() -> None:
    seen = []

    def spy(branch: Branch, batch: Batch) -> ObjectiveOutput:
        seen.append(batch)
        return pgd_at().objective(branch, batch)

    darkening = Inner(
        loss=lambda pixels, targets: -(pixels - targets).sum(dim=1),
        model=lambda _: lambda images: images.flatten(1),
        targets=lambda _: lambda _branch, images, _labels: images.flatten(1) + 1,
    )
    method = Recipe(name="dark", objective=spy, inner=darkening)
    harden_branch(TinyEncoder(), data(), HardenConfig(epochs=1, steps=4, eps=0.1), objective=method, progress=False)
    for batch in seen:
        torch.testing.assert_close(batch.adversarial, (batch.images - 0.1).clamp(0, 1))
        assert torch.equal(batch.targets, batch.images.flatten(1) + 1)


def inner_value(method: Recipe, branch: Branch, images: Tensor, attacked: Tensor, labels: Tensor) -> float:
    branch.eval()
    targets = method.inner.targets(branch)(branch, images, labels)
    return method.inner.loss(method.inner.model(branch)(attacked), targets).mean().item()


@each_method
def test_the_inner_attack_raises_what_the_method_says(method: Recipe) -> None:
    images, labels = toy_data(24)
    branch = tiny_branch().eval()
    targets = method.inner.targets(branch)(branch, images, labels)
    attack = PGD(eps=0.2, steps=5, loss_fn=method.inner.loss)
    attacked = attack(method.inner.model(branch), images, targets, generator=torch.Generator().manual_seed(0))
    random = (images + 0.2 * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    reached = inner_value(method, branch, images, attacked, labels)
    assert reached > inner_value(method, branch, images, images, labels)
    assert reached > inner_value(method, branch, images, random, labels)


def logit_pairing(branch: Branch, batch: Batch) -> ObjectiveOutput:
    """A third party's objective: adversarial logit pairing (Kannan et al. 2018)."""
    clean, attacked = branch(batch.images), branch(batch.adversarial)
    pairing = (clean - attacked).square().mean()
    loss = nn.functional.cross_entropy(attacked, batch.labels) + 0.5 * pairing
    return ObjectiveOutput(loss, attacked.detach(), clean.detach())


PAIRED_LOGITS = Recipe(  # the same, and the attack pulls the pair apart
    name="paired logits",
    objective=logit_pairing,
    inner=Inner(
        loss=lambda logits, clean: (logits - clean).square().sum(dim=1),
        targets=lambda _: lambda branch, images, _labels: branch(images).detach(),
    ),
)
CLEAN = Recipe(name="clean", objective=lambda branch, batch: logit_pairing(branch, batch), inner=None)


@pytest.mark.parametrize(
    ("objective", "name", "distance"),
    [(logit_pairing, "logit_pairing", QUICK.eps), (PAIRED_LOGITS, "paired logits", QUICK.eps), (CLEAN, "clean", 0.0)],
    ids=["function", "recipe", "recipe without an attack"],
)
def test_an_objective_of_a_third_party_is_one_argument(objective, name: str, distance: float, tmp_path: Path) -> None:
    batches = []

    def spy(branch: Branch, batch: Batch) -> ObjectiveOutput:
        batches.append(batch)
        return logit_pairing(branch, batch)

    spy.__qualname__ = name
    given = replace(objective, objective=spy) if isinstance(objective, Recipe) else spy
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    defense.harden(data(), QUICK, objective=given, checkpoint_dir=tmp_path, progress=False)
    assert defense.provenance["harden"]["method"] == name
    furthest = max((batch.adversarial - batch.images).abs().max().item() for batch in batches)
    assert furthest == pytest.approx(distance, abs=1e-6)
    with pytest.raises(CheckpointError, match=f"objective was '{name}', now 'trades"):
        defense.harden(data(), QUICK, objective=trades(), checkpoint_dir=tmp_path, resume=True, progress=False)


def test_fare_keeps_the_original_and_trades_follows_the_branch() -> None:
    images, labels = toy_data(8)
    branch = tiny_branch().eval()
    pinned, moving = fare().inner.targets(branch), trades().inner.targets(branch)
    features, logits = pinned(branch, images, labels), moving(branch, images, labels)
    torch.testing.assert_close(logits, branch(images))
    with torch.no_grad():
        branch.encoder.conv2.weight.mul_(2)
    assert torch.equal(pinned(branch, images, labels), features)
    assert not torch.equal(moving(branch, images, labels), logits)
    assert not any(target.requires_grad for target in (features, logits))


# BatchNorm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (pgd_at(), ["adversarial"]),
        (fare(), ["adversarial"]),
        (trades(), ["images", "adversarial"]),
        (mart(), ["adversarial", "images"]),
        (gen_af(), ["adversarial", "images"]),
    ],
    ids=["pgd_at", "fare", "trades", "mart", "gen_af"],
)
def test_which_images_train_the_statistics(method: Recipe, passes: list[str]) -> None:
    images, labels = toy_data(24)
    branch = tiny_branch()
    twin = copy.deepcopy(branch)
    batch = Batch(images, (images + 0.1).clamp(0, 1), labels, torch.zeros(24, 8))
    method.objective(branch, batch)
    for name in passes:
        twin.encoder(getattr(batch, name))
    assert differing(state(branch), state(twin)) == set()


# training -------------------------------------------------------------------------------------------------------


def fragile_data(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes told apart by stripes, which an attack can flip, and by a colour, which it cannot."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = 0.3 + 0.1 * torch.rand(count, 3, 16, 16, generator=generator)
    images = images + 0.2 * torch.rand(count, 3, 1, 1, generator=generator)
    images[torch.arange(count), labels] += 0.25
    line = (torch.arange(16) % 2) * 2.0 - 1
    stripes = torch.stack([line.expand(16, 16), line[:, None].expand(16, 16), torch.outer(line, line)])
    return (images + 0.1 * stripes[labels][:, None]).clamp(0, 1), labels


def robust_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    attack = PGD(eps=0.1, steps=10)
    return accuracy(model, attack(model, images, labels, generator=torch.Generator().manual_seed(0)), labels)


@pytest.fixture(scope="module")
def undefended() -> Branch:
    """An encoder that has learnt the fragile data as they are: FARE has features worth keeping."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*fragile_data()), batch_size=16, shuffle=True)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")
    defense.stage = "hardened"
    heads = HeadConfig(epochs=1)
    defense.fit_benign(loader, BenignConfig(epochs=10, lr=1e-2), head_config=heads, progress=False)
    encoder = defense.encoder("benign")
    return Branch(encoder, fit_heads({"e": encoder}, loader, HeadConfig(), channels=3, num_classes=3)["e"])


@each_method
def test_every_method_hardens(method: Recipe, undefended: Branch) -> None:
    held_out = fragile_data(120, seed=5)
    loader = DataLoader(TensorDataset(*fragile_data()), batch_size=16, shuffle=True)
    config = HardenConfig(eps=0.1, epochs=12, steps=3, lr=1e-2, head_lr=1e-2, val_fraction=0.2, precision="fp32")
    branch, history = harden_branch(undefended.encoder, loader, config, objective=method, progress=False)
    assert accuracy(branch, *held_out) > 0.95  # the statistics of evaluation fit, or this would be chance
    assert robust_accuracy(branch, *held_out) > robust_accuracy(undefended, *held_out) + 0.03
    assert len(history["hardening"]) == 12
    assert not any(part.training for part in branch.modules())
    assert not any(p.requires_grad for p in branch.encoder.parameters())


@pytest.mark.parametrize("method", [trades(), fare(), gen_af()], ids=["trades", "fare", "gen_af"])
def test_every_parameter_is_trained_in_mixed_precision(method: Recipe) -> None:
    # In older torch, targets computed without gradients fill autocast's cache; a shared one would freeze layers.
    encoder = TinyEncoder()
    config = replace(QUICK, precision="bf16")
    branch, _ = harden_branch(encoder, data(), config, objective=replace(method, adaptation=None), progress=False)
    before = {f"backbone.{key}": value for key, value in encoder.named_parameters()}
    assert [key for key, value in branch.encoder.named_parameters() if torch.equal(value, before[key])] == []


def test_fare_never_sees_a_label() -> None:
    _, labels = toy_data()
    config = HardenConfig(epochs=2, steps=1, lr=1e-2)
    encoder = TinyEncoder()
    branches, histories = zip(
        *(
            harden_branch(encoder, data(given), config, objective=fare(), num_classes=3, progress=False)
            for given in (labels, labels[torch.randperm(len(labels))])
        ),
        strict=True,
    )
    assert histories[0] == histories[1]
    assert [set(record) for record in histories[0]["hardening"]] == [
        {"loss", "lr", "step"}
    ] * 2  # no accuracy chose the epoch
    assert differing(state(branches[0].encoder), state(branches[1].encoder)) == set()
    assert differing(state(branches[0].head), state(branches[1].head)) != set()  # fitted afterwards, on labels


def test_one_encoder_is_hardened_as_in_the_defense_and_the_callers_stays() -> None:
    torch.manual_seed(4)
    encoder = TinyEncoder()
    before = state(encoder)
    branch, history = harden_branch(encoder, data(), QUICK, progress=False)
    defense = ZePAD.from_encoders(encoder, TinyEncoder(), preset="paper").harden(data(), QUICK, progress=False)
    assert differing(state(branch), state(defense.branch("victim"))) == set()
    assert history == {"hardening": defense.provenance["harden"]["history"]["victim"]}
    assert differing(state(encoder), before) == set()


@each_method
def test_every_method_is_one_argument_of_harden(method: Recipe, tmp_path: Path) -> None:
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    defense.harden(data(), QUICK, objective=method, progress=False)
    defense.fit_benign(data(), BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    record = defense.provenance["harden"]
    assert record["method"] == method.name
    assert ("victim adapted_layers" in record["history"]) == (method.adaptation is not None)
    defense.save_pretrained(tmp_path)
    again = ZePAD.from_pretrained(tmp_path, victim=TinyEncoder(), auxiliary=TinyEncoder())
    images = toy_data()[0]
    assert torch.equal(again.predict(images), defense.predict(images))
    assert again.provenance["harden"] == record


# the second stage of Gen-AF -------------------------------------------------------------------------------------


def test_the_second_stage_changes_the_chosen_layers_alone() -> None:
    method = gen_af(redundant_share=0.4, probes=40, adaptation_epochs=2)
    encoder = TinyEncoder()
    first, _ = harden_branch(encoder, data(), QUICK, objective=replace(method, adaptation=None), progress=False)
    both, history = harden_branch(encoder, data(), QUICK, objective=method, progress=False)
    layers = history["adapted_layers"]
    assert len(layers) == 2  # of two convolutions and three linear layers
    assert differing(state(first), state(both)) == {
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    }
    assert [sorted(record) for record in history["adaptation"]] == [
        ["benign_accuracy", "head_lr", "loss", "step", "val_benign_accuracy"]
    ] * 2


def batches_for(branch: Branch) -> list[Batch]:
    images, labels = toy_data(12)
    attacked = PGD(eps=0.1, steps=2)(branch, images, labels, generator=torch.Generator().manual_seed(0))
    return [Batch(*parts) for parts in zip(images.split(5), attacked.split(5), labels.split(5), strict=True)]


def test_criticality_of_a_small_ball_is_the_norm_of_the_gradient() -> None:
    branch = tiny_branch().double().eval()
    batches = [Batch(*(x.double() if x.is_floating_point() else x for x in b[:3])) for b in batches_for(tiny_branch())]
    radius = 1e-6
    found = robust_criticality(branch, batches, radius=radius)
    loss = sum(nn.functional.cross_entropy(branch(b.adversarial), b.labels, reduction="sum") for b in batches) / 12
    loss.backward()
    layers = {name: branch.get_submodule(name) for name in found}
    assert list(found) == ["encoder.conv", "encoder.conv2", "head.0", "head.3", "head.5"]
    for name, layer in layers.items():
        first_order = radius * layer.weight.norm() * layer.weight.grad.norm()
        assert found[name] == pytest.approx(first_order.item(), rel=1e-3)


def test_a_layer_that_nothing_depends_on_is_chosen_first_and_nothing_is_changed() -> None:
    branch = tiny_branch()
    with torch.no_grad():
        branch.head[5].weight.zero_()  # cuts off all that lies before it
        branch.head[5].bias.zero_()
    branch.head[5].weight.requires_grad_(False)
    before = state(branch)
    batches = batches_for(branch)
    costs = robust_criticality(branch, batches, radius=0.5)
    assert set(costs.values()) == {0.0}
    branch = tiny_branch().train()
    branch.head[3].weight.data.zero_()
    branch.head[3].bias.data.fill_(1)
    costs = robust_criticality(branch, batches, radius=0.5)
    assert costs["head.5"] > 0 == costs["head.0"] == costs["encoder.conv"] == costs["head.3"]
    assert all(cost >= 0 for cost in costs.values())
    assert gen_af(redundant_share=0.9).adaptation.choose(branch, batches) == [key for key in costs if key != "head.5"]
    branch = tiny_branch().train()
    before = state(branch)
    robust_criticality(branch, batches)
    assert differing(state(branch), before) == set()
    assert all(part.training for part in branch.modules())
    assert [p.grad for p in branch.parameters()] == [None] * len(list(branch.parameters()))


@pytest.mark.parametrize("lost", ["first stage", "second stage", "end of the second stage"])
def test_two_stages_resume_to_the_undisturbed_result(lost: str, tmp_path: Path) -> None:
    config = HardenConfig(epochs=2, steps=1)
    encoder = TinyEncoder()
    options = {"objective": gen_af(probes=16), "progress": False}
    straight, expected = harden_branch(encoder, data(), config, **options)
    harden_branch(encoder, data(), config, checkpoint_dir=tmp_path, **options)
    second = tmp_path / "adaptation"
    if lost != "end of the second stage":
        for path in second.iterdir():
            path.unlink()
    gone = {"first stage": tmp_path, "second stage": None, "end of the second stage": second}[lost]
    if gone is not None:
        (gone / "epoch-0001.pt").unlink()
    resumed, history = harden_branch(encoder, data(), config, checkpoint_dir=tmp_path, resume=True, **options)
    assert differing(state(resumed), state(straight)) == set()
    assert history == expected


def test_fare_resumes_against_the_encoder_it_started_from(tmp_path: Path) -> None:
    config = HardenConfig(epochs=3, steps=1, lr=1e-2)
    encoder = TinyEncoder()
    straight, _ = harden_branch(encoder, data(), config, objective=fare(), progress=False)
    harden_branch(encoder, data(), config, objective=fare(), checkpoint_dir=tmp_path, progress=False)
    (tmp_path / "epoch-0002.pt").unlink()
    resumed, _ = harden_branch(
        encoder, data(), config, objective=fare(), checkpoint_dir=tmp_path, resume=True, progress=False
    )
    assert differing(state(resumed), state(straight)) == set()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (trades(beta=6), trades(beta=1), r"objective was 'trades\(beta=6\)', now 'trades\(beta=1\)'"),
        (mart(), trades(), "objective was 'mart"),
        (gen_af(**ONE_EPOCH), gen_af(**ONE_EPOCH, redundant_share=0.5), "redundant_share=0.2"),
        (fare(), None, "objective was 'fare"),
    ],
    ids=["beta", "method", "gen_af", "default"],
)
def test_another_method_or_setting_refuses_to_resume(first, second, message: str, tmp_path: Path) -> None:
    harden_branch(TinyEncoder(), data(), QUICK, objective=first, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=message):
        harden_branch(
            TinyEncoder(), data(), QUICK, objective=second, checkpoint_dir=tmp_path, resume=True, progress=False
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trades(beta=-1), "beta must be a number of zero or more; got -1"),
        (lambda: trades(beta=True), "beta must be a number"),
        (lambda: mart(beta=float("nan")), "beta must be a number of zero or more; got nan"),
        (lambda: gen_af(redundant_share=0), r"redundant_share must be in \(0, 1\]; got 0"),
        (lambda: gen_af(genetic_weight="x"), "genetic_weight must be zero or more; got 'x'"),
        (lambda: gen_af(probes=1.5), "probes must be an integer of at least 1; got 1.5"),
        (lambda: gen_af(adaptation_epochs=0), "adaptation_epochs must be at least 1, or None; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


class Remembering(TinyEncoder):
    """An encoder whose state is more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        del state


def test_an_encoder_whose_state_is_no_tensor_is_refused() -> None:
    message = "the state of an encoder must be tensors alone; backbone._extra_state is dict"
    with pytest.raises(InputError, match=f"auxiliary: {message}"):
        ZePAD.from_encoders(TinyEncoder(), Remembering())
    with pytest.raises(InputError, match=message):
        harden_branch(Remembering(), data(), QUICK)

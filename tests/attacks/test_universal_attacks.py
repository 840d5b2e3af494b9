"""Properties of every universal attack, and agreement of each with a naive version of its definition."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from strategies import laws, seeds
from tiny import TinyEncoder
from zepad.attacks import UniversalFeatureAttack, UniversalPerturbation
from zepad.attacks.universal.advencoder import AdvEncoder, AdvEncoderPatch, advencoder_loss, high_frequencies, info_nce
from zepad.attacks.universal.crafting import ascend
from zepad.attacks.universal.pap import PAPUGS, PAPBase, PAPFuse, activation_energy, gaussian_images
from zepad.attacks.universal.probe import fit_probe
from zepad.attacks.universal.ssp import SSP, energy_distortion
from zepad.attacks.universal.uap import UAP, deepfool
from zepad.attacks.universal.uapgd import UAPGD, normalised_cross_entropy
from zepad.data import digits
from zepad.encoders import EncoderSpec, build_encoder
from zepad.errors import ConfigError, InputError

EPS = 10 / 255

LABEL_FREE = {
    "feature": lambda **k: UniversalFeatureAttack(**{"eps": EPS, "epochs": 2, **k}),
    "advencoder": lambda **k: AdvEncoder(**{"eps": EPS, "epochs": 2, "width": 8, "latents": 4, **k}),
    "patch": lambda **k: AdvEncoderPatch(**{"epochs": 2, "width": 8, "latents": 4, **k}),
    "pap": lambda **k: PAPBase(**{"eps": EPS, "epochs": 2, "layer": "stage1", **k}),
    "pap fuse": lambda **k: PAPFuse(**{"eps": EPS, "epochs": 2, **k}),
    "pap ugs": lambda **k: PAPUGS(**{"eps": EPS, "epochs": 2, **k}),
    "ssp": lambda **k: SSP(**{"eps": EPS, "epochs": 2, **k}),
}
ON_LOGITS = {
    "uap": lambda **k: UAP(**{"eps": EPS, "epochs": 2, "steps": 3, **k}),
    "uapgd": lambda **k: UAPGD(**{"eps": EPS, "epochs": 2, **k}),
}
ATTACKS = {**LABEL_FREE, **ON_LOGITS}
# Without a layer, PAP crafts a perturbation on every stage first.
CHOOSING = pytest.param(lambda **k: PAPBase(**{"eps": EPS, "epochs": 2, **k}), marks=pytest.mark.slow)
label_free = pytest.mark.parametrize("make", [*LABEL_FREE.values(), CHOOSING], ids=[*LABEL_FREE, "pap choosing"])
on_logits = pytest.mark.parametrize("make", ON_LOGITS.values(), ids=ON_LOGITS.keys())
every_attack = pytest.mark.parametrize("make", [*ATTACKS.values(), CHOOSING], ids=[*ATTACKS, "pap choosing"])
slow = pytest.mark.slow


def loader_of(data, *, batch_size=8, shuffle=True):
    return DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=shuffle)


def fit(attack, encoder, data):
    return attack.fit(encoder, data, progress=False)


# what every attack promises -------------------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("size", [pytest.param((8, 8), marks=slow), (5, 11), pytest.param((17, 6), marks=slow)])
def test_the_perturbation_is_one_image_in_its_budget(make, size):
    images = torch.rand(6, 3, *size)
    images[0], images[1] = 0, 1
    labels = torch.arange(6) % 3
    made = fit(make(), TinyEncoder(), [(images, labels)])
    assert made.delta.shape == (1, 3, *size)
    assert made.delta.dtype == torch.float32
    assert not made.delta.requires_grad
    attacked = made.apply(images)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    if made.norm == "linf":
        assert made.eps == EPS
        assert made.delta.abs().max() <= torch.tensor(EPS)
        assert (attacked - images).abs().max() <= EPS + 1e-6


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


@every_attack
def test_the_seed_alone_decides_and_the_global_generators_are_left_alone(make, toy):
    encoder, data = TinyEncoder(), loader_of(toy)
    torch.manual_seed(1)
    before = states()
    first = fit(make(seed=1, epochs=1), encoder, data).delta
    untouched = states() == before
    assert untouched
    torch.manual_seed(2)
    again, other = (fit(make(seed=seed, epochs=1), encoder, data).delta for seed in (1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def noticeable(model):
    return (
        [(part.training, len(part._forward_hooks)) for part in model.modules()],
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
    )


def used_encoder():
    """Half-way through somebody's training: mixed training flags, gradients pending, a part frozen."""
    model = TinyEncoder().train()
    model.conv.eval()
    model.conv2.requires_grad_(False)
    model.conv.weight.grad = torch.randn_like(model.conv.weight)
    return model


@every_attack
def test_the_encoders_are_left_as_found_and_attacked_in_evaluation_mode(make, toy):
    encoders = [used_encoder(), used_encoder()]
    modes = set()
    for encoder in encoders:
        encoder.conv2.register_forward_hook(
            lambda *_: modes.update(part.training for one in encoders for part in one.modules())
        )
    before = [noticeable(encoder) for encoder in encoders]
    with torch.no_grad():  # a caller's grad mode changes nothing
        fit(make(), encoders, loader_of(toy))
    assert modes == {False}
    untouched = [noticeable(encoder) for encoder in encoders] == before
    assert untouched  # pytest would take minutes to describe a difference


@every_attack
def test_the_encoders_are_asked_in_the_stated_precision(make, toy):
    encoder, seen = TinyEncoder(), []
    encoder.conv2.register_forward_hook(lambda *called: seen.append(called[-1].dtype))
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seen.clear()
        made = fit(make(precision=precision, epochs=1), encoder, loader_of(toy))
        assert set(seen) == {dtype}
        assert made.delta.dtype == torch.float32
        assert made.norm == "patch" or made.delta.abs().max() <= torch.tensor(EPS)
        assert made.provenance["precision"] == precision
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("make", [LABEL_FREE["advencoder"], LABEL_FREE["patch"]], ids=["advencoder", "patch"])
def test_a_generator_in_bfloat16_learns_as_in_float32(make, toy):
    """Autocast converts a weight once in its context unless told otherwise, and then an update is not seen."""
    encoder = TinyEncoder()
    whole, half, untrained = (
        fit(make(epochs=epochs, lr=1e-2, precision=precision), encoder, loader_of(toy)).delta
        for epochs, precision in ((20, "fp32"), (20, "bf16"), (1, "fp32"))
    )
    assert (half - whole).norm() < (untrained - whole).norm() / 2


@every_attack
def test_the_encoder_is_left_as_found_when_it_raises(make, toy):
    encoder, calls = used_encoder(), []

    def fail(*_):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("out of memory")

    encoder.conv2.register_forward_hook(fail)
    before, generators = noticeable(encoder), states()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(make(), encoder, loader_of(toy))
    untouched = noticeable(encoder) == before
    assert untouched
    untouched = states() == generators
    assert untouched


@on_logits
def test_the_head_is_left_as_found(make, toy):
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)).train()
    head[1].weight.grad = torch.ones_like(head[1].weight)
    before = noticeable(head)
    fit(make(head=head), TinyEncoder(), toy[0])
    untouched = noticeable(head) == before
    assert untouched


@label_free
def test_labels_do_not_matter(make, toy):
    encoder, (images, labels) = TinyEncoder(), toy
    data = [
        images,
        [images],
        [[images]],
        [(images, labels)],
        [(images, labels.flip(0))],
        [(images, ["no", "class"])],
        loader_of(toy, batch_size=24, shuffle=False),
    ]
    first, *others = [fit(make(epochs=1), encoder, one) for one in data]
    for other in others:
        assert torch.equal(other.delta, first.delta)
        assert other.provenance == first.provenance


@on_logits
def test_labels_do_not_matter_beside_a_head_and_do_without(make, toy):
    images, labels = toy
    encoder, head = TinyEncoder(), nn.Linear(8, 3)
    given = [
        fit(make(head=head), encoder, one).delta for one in (images, [(images, labels)], [(images, labels.flip(0))])
    ]
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])
    right, wrong = (
        fit(make(), encoder, [(images, y)]).delta for y in (labels, (labels + 1) % 3 * (images[:, 0, 0, 0] > 0.3))
    )
    assert not torch.equal(right, wrong)


@on_logits
def test_a_bare_encoder_needs_labels(make, toy):
    for data in (toy[0], [toy[0]], [(toy[0],)]):
        with pytest.raises(
            InputError, match=r"carry no labels to fit a linear probe on\. Pass a loader .*nn\.Identity\(\)"
        ):
            fit(make(), TinyEncoder(), data)
    with pytest.raises(InputError, match="labels must be integer class indices"):
        fit(make(), TinyEncoder(), [(toy[0], toy[1].float())])
    with pytest.raises(InputError, match="at least two classes; got the label 0 alone"):
        fit(make(), TinyEncoder(), [(toy[0], toy[1] * 0)])


@on_logits
def test_the_provenance_says_where_the_logits_come_from(make, toy):
    probed = fit(make(), TinyEncoder(), loader_of(toy)).provenance["logits"]
    assert probed == "linear probe on the attacker's data, 24 images, train accuracy 1.000"
    classifier = nn.Sequential(TinyEncoder(), nn.Linear(8, 3))
    given = fit(make(head=nn.Identity()), classifier, toy[0]).provenance
    assert given["logits"] == "given head Identity"
    assert "head" not in given


@every_attack
def test_the_provenance_tells_how_it_was_made_and_survives_a_file(make, toy, tmp_path):
    encoder = build_encoder(EncoderSpec.parse("zepad:digits-simclr"))
    made = fit(make(seed=7, epochs=1), [encoder, TinyEncoder()], loader_of(toy))
    provenance = made.provenance
    assert provenance["attack"] == type(make()).__name__
    assert provenance["images"] == 24
    assert provenance["seed"] == 7
    assert provenance["epochs"] == 1
    assert provenance["encoders"] == ["SmallResNet (zepad:digits-simclr)", "TinyEncoder"]
    settings = set(make().__dataclass_fields__) - {"head"}
    assert settings <= set(provenance)
    made.save(tmp_path / "one")
    assert UniversalPerturbation.load(tmp_path / "one").provenance == provenance


def test_the_provenance_names_the_layers(toy):
    encoders = [build_encoder(EncoderSpec.parse("zepad:digits-simclr")), TinyEncoder()]
    made = fit(PAPFuse(eps=EPS, epochs=1), encoders, toy[0])
    assert made.provenance["layers"] == ["stem", "stage1"]
    assert made.provenance["layers_used"] == [["backbone.bn1", "backbone.stages.0"], ["conv", "conv"]]


@every_attack
def test_a_sequence_of_one_is_that_encoder_and_of_two_attacks_both(make, toy):
    one, two, data = TinyEncoder(), TinyEncoder(), loader_of(toy)
    alone = fit(make(epochs=1), one, data).delta
    assert torch.equal(fit(make(epochs=1), [one], data).delta, alone)
    both = fit(make(epochs=1), (one, two), data).delta
    assert not torch.equal(both, alone)
    assert not torch.equal(both, fit(make(epochs=1), two, data).delta)


@pytest.mark.parametrize("make", [LABEL_FREE[name] for name in ("feature", "pap", "pap fuse", "pap ugs", "ssp")])
def test_an_encoder_named_twice_counts_as_once(make, toy):
    encoder = TinyEncoder()
    torch.testing.assert_close(fit(make(), [encoder] * 2, toy[0]).delta, fit(make(), encoder, toy[0]).delta)


@every_attack
@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(d, marks=slow) for d in (torch.bfloat16, torch.float64))]
)
def test_every_precision_works(make, toy, dtype):
    encoder = TinyEncoder().to(dtype)
    images = toy[0].to(dtype)
    made = fit(make(), encoder, [(images, toy[1])])
    assert made.delta.dtype in (torch.float32, dtype)
    assert made.delta.dtype in (torch.float32, torch.float64)
    assert made.delta.any()
    assert made.apply(images).dtype == dtype


@every_attack
def test_what_is_no_encoder_is_refused(make, toy):
    with pytest.raises(InputError, match="needs an encoder, images to features, or a list .*got an empty list"):
        fit(make(), [], toy[0])
    with pytest.raises(InputError, match=r"encoder must be a callable or a list \[a callable, ...\]; got 3"):
        fit(make(), 3, toy[0])
    with pytest.raises(InputError, match=r"encoder\[1\] must be a callable; got 'resnet'"):
        fit(make(), [TinyEncoder(), "resnet"], toy[0])


@pytest.mark.parametrize("make", [LABEL_FREE["feature"], LABEL_FREE["advencoder"], *ON_LOGITS.values()])
def test_attacks_on_the_output_take_any_callable(make, toy):
    encoder = TinyEncoder().eval()
    expected = fit(make(epochs=1), encoder, loader_of(toy)).delta
    assert torch.equal(fit(make(epochs=1), lambda images: encoder(images), loader_of(toy)).delta, expected)


@pytest.mark.parametrize("make", [LABEL_FREE["pap"], LABEL_FREE["pap fuse"], LABEL_FREE["pap ugs"], LABEL_FREE["ssp"]])
def test_attacks_on_layers_refuse_what_has_none(make, toy):
    with pytest.raises(InputError, match=r"needs a torch\.nn\.Module whose layers it can read"):
        fit(make(), lambda images: images.flatten(1), toy[0])


@every_attack
def test_images_that_do_not_fit_are_refused(make, toy):
    encoder = TinyEncoder()
    with pytest.raises(InputError, match="the loader is empty"):
        fit(make(), encoder, [])
    with pytest.raises(InputError, match="iterable more than once"):
        fit(make(), encoder, iter([toy]))
    with pytest.raises(InputError, match=r"looks like 0\.\.255"):
        fit(make(), encoder, toy[0] * 255)
    with pytest.raises(InputError, match=r"images of one size; got \(3, 8, 8\) and \(3, 4, 4\)"):
        fit(make(), encoder, [toy, (toy[0][..., :4, :4], toy[1])])


@every_attack
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, or None; got 0"),
        ({"epochs": 1.5}, "epochs must be an integer or None; got 1.5"),
        ({"seed": -1}, "seed must be an integer of zero or more; got -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


@pytest.mark.parametrize("make", [attack for name, attack in ATTACKS.items() if name != "patch"])
def test_budgets_out_of_units_are_refused(make):
    with pytest.raises(ConfigError, match=r"looks like 0\.\.255 units\. Write 8 / 255"):
        make(eps=8)


@pytest.mark.parametrize(
    ("attack", "settings", "name"),
    [
        (UAP, {"fooling_rate": 0}, "fooling_rate"),
        (UAP, {"fooling_rate": 1.1}, "fooling_rate"),
        (UAP, {"overshoot": -0.1}, "overshoot"),
        (UAP, {"steps": 0}, "steps"),
        (UAP, {"classes": 1}, "classes"),
        (UAP, {"group": 0}, "group"),
        (UAPGD, {"momentum": 1.0}, "momentum"),
        (UAPGD, {"step_size": 0.0}, "step_size"),
        (SSP, {"step_size": float("nan")}, "step_size"),
        (AdvEncoder, {"lr": 0}, "lr"),
        (AdvEncoder, {"width": 4}, "width"),
        (AdvEncoder, {"latents": 0}, "latents"),
        (AdvEncoderPatch, {"area": 0}, "area"),
        (AdvEncoderPatch, {"area": 3}, "area"),
        (PAPFuse, {"layers": ("stem",)}, "layers"),
        (PAPUGS, {"noise_mean": (0.6, 0.4)}, "noise_mean"),
        (PAPUGS, {"noise_std": (0.1,)}, "noise_std"),
    ],
)
def test_further_settings_out_of_range_are_refused(attack, settings, name):
    budget = {} if attack is AdvEncoderPatch else {"eps": EPS}
    with pytest.raises(ConfigError, match=f"{name} must be"):
        attack(**budget, **settings)


# how long an attack takes ---------------------------------------------------------------------------------------


class Counting:
    """Batches without a length, counted."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize(("epochs", "batches", "expected"), [(3, 4, 3), (None, 4, 50), (None, 300, 1)])
def test_whole_passes_until_the_least_number_of_updates(epochs, batches, expected):
    """200 updates for PAP where the user does not say: 50 passes over 4 batches, one over 300."""
    data = Counting([torch.rand(1, 3, 4, 4)] * batches)
    fit(PAPBase(eps=EPS, epochs=epochs, layer="stage1"), nn.Sequential(nn.Conv2d(3, 1, 1)), data)
    assert data.passes == expected


def test_pap_without_a_layer_takes_the_stage_that_moves_the_features_most(toy):
    """The choice is made on the attacker's images, and the rest is PAP on that stage."""
    torch.manual_seed(3)
    encoder = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)), nn.Flatten()).eval()
    images = toy[0]
    moved = {}
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        trial = fit(PAPBase(eps=EPS, epochs=40, step_size=EPS / 12, layer=stage), encoder, images)
        with torch.no_grad():
            features, attacked = encoder(images), encoder(trial.apply(images))
        moved[stage] = float(1 - nn.functional.cosine_similarity(attacked, features).mean())
    best = max(moved, key=moved.__getitem__)
    assert min(moved.values()) < max(moved.values())
    chosen, named = (fit(PAPBase(eps=EPS, epochs=4, layer=layer), encoder, images) for layer in (None, best))
    assert torch.equal(chosen.delta, named.delta)
    assert chosen.provenance["layers_used"] == named.provenance["layers_used"]


def test_a_tensor_is_read_in_batches():
    sizes = []
    encoder = nn.Conv2d(3, 1, 1)
    encoder.register_forward_hook(lambda _, __, output: sizes.append(len(output)))
    fit(PAPBase(eps=EPS, epochs=1, layer="stage1"), nn.Sequential(encoder), torch.rand(600, 3, 2, 2))
    assert sizes == [256, 256, 88]


@every_attack
def test_progress_is_shown_unless_it_is_unwanted(make, toy, terminal, capsys):
    make(epochs=1).fit(TinyEncoder(), [toy], progress=False)
    assert terminal.getvalue() == ""
    make(epochs=1).fit(TinyEncoder(), [toy])
    assert type(make()).__name__ in terminal.getvalue()
    assert capsys.readouterr() == ("", "")


# the ascent -----------------------------------------------------------------------------------------------------


def test_the_ascent_agrees_with_a_naive_one():
    batches = [torch.rand(4, 3, 2, 2) * 0.4 + 0.3 for _ in range(12)]
    weight, eps, step, momentum = 20 * torch.randn(3, 2, 2), 0.2, 0.07, 0.6

    def loss(_, attacked):
        return (attacked * weight).sin().sum()  # of many hills, so that the direction turns and momentum matters

    delta = (torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(5)) * 2 - 1) * eps
    velocity = 0
    for batch in batches:
        gradient = ((batch + delta) * weight).cos().mul(weight).sum(dim=0, keepdim=True)
        velocity = momentum * velocity + gradient / sum(abs(g) for g in gradient.flatten().tolist())
        delta = (delta + step * velocity.sign()).clamp(-eps, eps)
    made = ascend(loss, batches, eps=eps, step_size=step, seed=5, momentum=momentum)
    torch.testing.assert_close(made, delta)


@laws
@given(seeds)
def test_a_linear_loss_is_raised_to_its_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 3, 2, 2, generator=generator)
    images = torch.rand(2, 3, 2, 2, generator=generator) * 0.2 + 0.4
    made = ascend(lambda _, attacked: (attacked * weight).sum(), [images] * 12, eps=0.2, step_size=0.05, seed=seed)
    torch.testing.assert_close(made, 0.2 * weight.sign())


# AdvEncoder -----------------------------------------------------------------------------------------------------


@laws
@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.05, 2), seeds)
def test_info_nce_agrees_with_its_definition(rows, columns, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    f, g = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) + 0.1
    total = 0.0
    for i in range(rows):
        own = math.exp(float(f[i] @ g[i] / f[i].norm() / g[i].norm()) / temperature)
        every = sum(math.exp(float(f[i] @ g[j] / f[i].norm() / g[j].norm()) / temperature) for j in range(rows))
        total -= math.log(own / every) / rows
    assert info_nce(f, g, temperature).item() == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (12, 9), (7, 16)])
def test_the_high_frequencies_agree_with_a_naive_fourier_transform(size):
    height, width = size
    image = torch.rand(1, 2, height, width, dtype=torch.float64)

    def signed(k, n):
        return k if 2 * k < n else k - n

    expected = torch.zeros_like(image)
    rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    for u in range(height):
        for v in range(width):
            if math.hypot(signed(u, height) / height, signed(v, width) / width) <= 8 / 64:
                continue
            phase = 2 * math.pi * (u * rows / height + v * columns / width)
            real, imaginary = (image * phase.cos()).sum((2, 3)), (image * phase.sin()).sum((2, 3))
            wave = real[..., None, None] * phase.cos() + imaginary[..., None, None] * phase.sin()
            expected += wave / (height * width)
    torch.testing.assert_close(high_frequencies(image), expected)


def wave(cycles, size=64):
    phase = 2 * math.pi * cycles * torch.arange(size) / size
    return (0.5 + 0.4 * phase.sin()).expand(1, 1, size, size)


def test_the_filter_has_the_published_radius_at_64_pixels_and_scales():
    for size in (64, 128):
        inside, outside = 8 * size // 64, 8 * size // 64 + 1
        assert high_frequencies(wave(inside, size)).abs().max() < 1e-5
        torch.testing.assert_close(high_frequencies(wave(outside, size)), wave(outside, size) - 0.5, atol=1e-5, rtol=0)


def test_the_loss_of_advencoder_is_put_together_as_published():
    clean, attacked = torch.rand(2, 4, 3, 9, 9, dtype=torch.float64)
    one, two = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    contrast = (info_nce(one[0], one[1]) + info_nce(two[0], two[1])) / 2
    texture = (high_frequencies(clean) - high_frequencies(attacked)).square().mean()
    expected = -5 * contrast + (clean - attacked).square().mean() - texture
    made = advencoder_loss(clean, attacked, features=[one[0], two[0]], attacked_features=[one[1], two[1]])
    torch.testing.assert_close(made, expected)


def test_advencoder_needs_more_than_one_image_at_a_time():
    with pytest.raises(InputError, match="batches of two or more; got one image at a time"):
        fit(AdvEncoder(eps=EPS, epochs=1, width=8, latents=2), TinyEncoder(), [torch.rand(1, 3, 8, 8)] * 3)


@pytest.mark.parametrize(
    ("size", "area", "side"), [((8, 8), 0.03, 1), ((32, 32), 0.03, 5), ((20, 40), 0.05, 6), ((4, 30), 1.0, 4)]
)
def test_the_patch_is_a_square_in_the_corner_of_at_most_its_area(size, area, side):
    images = torch.rand(4, 3, *size)
    made = fit(AdvEncoderPatch(area=area, epochs=1, width=8, latents=2), TinyEncoder(), images)
    expected = torch.zeros(1, 1, *size)
    expected[..., size[0] - side :, size[1] - side :] = 1
    assert torch.equal(made.mask, expected)
    assert made.norm == "patch"
    assert made.eps == pytest.approx(side * side / size[0] / size[1])
    assert side == 1 or made.eps <= area


# PAP and SSP ----------------------------------------------------------------------------------------------------


def test_the_energies_agree_with_their_definitions():
    a, b = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    energy = [sum(x * x for x in t.flatten().tolist()) / t.numel() for t in (a, b[:1])]
    assert activation_energy([a, b[:1]]).item() == pytest.approx(sum(energy))
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    distortion = sum((x * x - y * y) ** 2 for x, y in pairs) / a.numel()
    assert energy_distortion(a, b).item() == pytest.approx(distortion)


@pytest.mark.parametrize("make", [LABEL_FREE["pap"], LABEL_FREE["pap fuse"], LABEL_FREE["pap ugs"]])
def test_pap_raises_the_energy_of_its_layer(make, toy):
    encoder = TinyEncoder().eval()
    attack = make(epochs=20, step_size=EPS / 4)
    made = fit(attack, encoder, toy[0])

    def energy(delta):
        return encoder.conv((toy[0] + delta).clamp(0, 1)).square().mean()

    noise = [EPS * torch.randn_like(made.delta).sign() for _ in range(10)]
    assert energy(made.delta) > max(map(energy, noise))


def test_ssp_distorts_its_layer_more_than_noise(toy):
    encoder = TinyEncoder().eval()
    made = fit(SSP(eps=EPS, layer="conv", epochs=20, step_size=EPS / 4), encoder, toy[0])

    def distortion(delta):
        return energy_distortion(encoder.conv(toy[0]), encoder.conv((toy[0] + delta).clamp(0, 1)))

    noise = [EPS * torch.randn_like(made.delta).sign() for _ in range(10)]
    assert distortion(made.delta) > max(map(distortion, noise))


def test_the_layer_is_the_one_asked_for(toy):
    deltas = [fit(PAPBase(eps=EPS, epochs=4, layer=layer), TinyEncoder(), toy[0]).delta for layer in ("conv", "conv2")]
    assert not torch.equal(*deltas)


def test_noise_images_have_their_own_mean_and_deviation():
    like = torch.zeros(200, 3, 16, 16)
    noise = gaussian_images(like, (0.4, 0.6), (0.05, 0.1), torch.Generator().manual_seed(0)).flatten(1)
    means, deviations = noise.mean(dim=1), noise.std(dim=1)
    assert ((means > 0.38) & (means < 0.62)).all()
    assert means.min() < 0.43
    assert means.max() > 0.57
    assert ((deviations > 0.045) & (deviations < 0.11)).all()
    assert deviations.std() > 0.01
    assert noise.min() >= 0
    assert noise.max() <= 1


def test_ugs_joins_as_many_noise_images_as_there_are():
    encoder, batches = nn.Sequential(nn.Conv2d(3, 1, 1)), []
    encoder.register_forward_hook(lambda _, inputs, __: batches.append(inputs[0]))
    images = torch.zeros(4, 3, 8, 8)
    fit(PAPUGS(eps=EPS, epochs=1), encoder, images)
    assert [len(batch) for batch in batches] == [8]
    assert batches[0][:4].max() <= EPS
    assert batches[0][4:].mean() > 0.3


# DeepFool, UAP and UAPGD ----------------------------------------------------------------------------------------


def naive_deepfool(model, image, label, overshoot, steps):
    total = torch.zeros_like(image)
    for _ in range(steps):
        point = image + (1 + overshoot) * total
        logits = model(point[None])[0]
        if logits.argmax() != label:
            break
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], point)
        best, step = math.inf, None
        for k in range(len(logits)):
            if k == label:
                continue
            w, gap = jacobian[k] - jacobian[label], float((logits[label] - logits[k]).detach()) + 1e-4
            if gap / w.norm() < best:
                best, step = gap / w.norm(), gap / w.norm() ** 2 * w
        total = total + step
    return (1 + overshoot) * total


def smooth_classifier(classes=4):
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, classes)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_batched_deepfool_agrees_with_a_naive_one(steps):
    model, images = smooth_classifier(), torch.rand(20, 3, 2, 2, dtype=torch.float64)
    labels = model(images).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % 4  # wrong already
    made = deepfool(model, images, labels, steps=steps)
    expected = [naive_deepfool(model, x, y, 0.02, steps) for x, y in zip(images, labels, strict=True)]
    torch.testing.assert_close(made, torch.stack(expected))
    assert not made[:3].any()
    if steps == 10:
        assert (model(images + made).argmax(dim=1) != labels).all()


def test_deepfool_differentiates_no_image_that_is_finished():
    model, said = smooth_classifier(), []

    def watched(points):
        logits = model(points)
        if torch.is_grad_enabled():
            said.append(logits.argmax(dim=1))
        return logits

    images = torch.rand(40, 3, 2, 2, dtype=torch.float64)
    common = model(images).argmax(dim=1).mode().values
    deepfool(watched, images, common.expand(40))  # wrong already where the model says another class
    assert 0 < len(said[-1]) <= len(said[0]) < 40
    assert all((predictions == common).all() for predictions in said)


def test_deepfool_is_exact_on_a_linear_binary_classifier():
    """The distance to the only boundary there is."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    images = torch.rand(8, 3, 2, 2, dtype=torch.float64)
    logits = model(images)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    distance = ((logits[:, 0] - logits[:, 1]).abs() + 1e-4) / w.norm()
    made = deepfool(model, images, logits.argmax(dim=1), overshoot=0.0)
    torch.testing.assert_close(made.flatten(1).norm(dim=1), distance.detach())


def test_uap_with_groups_of_one_agrees_with_a_naive_one():
    model, eps = smooth_classifier(), 0.1
    images = torch.rand(12, 3, 2, 2, dtype=torch.float64) * 0.6 + 0.2
    clean = model(images).argmax(dim=1)
    delta = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    for _ in range(2):
        for x, y in zip(images, clean, strict=True):
            point = (x + delta[0]).clamp(0, 1)
            if model(point[None]).argmax() == y:
                delta = (delta + naive_deepfool(model, point, y, 0.02, 10)).clamp(-eps, eps)
    attack = UAP(eps=eps, epochs=2, group=1, fooling_rate=1, head=nn.Identity())
    made = fit(attack, model, [images[:5], images[5:]])
    torch.testing.assert_close(made.delta, delta)
    fooled = (model((images + delta).clamp(0, 1)).argmax(dim=1) != clean).double().mean()
    assert made.provenance["fooled"] == pytest.approx(float(fooled))
    assert made.provenance["passes"] == 2


def test_uap_ends_once_enough_are_fooled():
    model, images = smooth_classifier().float(), torch.rand(12, 3, 2, 2)
    lazy, keen = (
        fit(UAP(eps=0.9, epochs=6, fooling_rate=rate, head=nn.Identity()), model, images).provenance
        for rate in (0.01, 1.0)
    )
    assert lazy["passes"] == 1
    assert lazy["fooled"] >= 0.01
    assert keen["passes"] > 1 or keen["fooled"] == 1


def test_the_loss_of_uapgd_agrees_with_its_definition():
    logits, labels = 30 * torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        unit = row / row.square().sum().sqrt()
        total -= float((unit.exp() / unit.exp().sum())[label].log()) / 6
    assert normalised_cross_entropy(logits, labels).item() == pytest.approx(total)


def test_the_probe_is_deterministic_separates_and_survives_dead_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 6, generator=generator) * 100
    features[:, 0] = 7.0  # dead
    features[torch.arange(90), labels + 1] += 500
    before = torch.get_rng_state()
    probe, again = fit_probe(features, labels), fit_probe(features, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(probe(features), again(features))
    assert torch.equal(probe(features).argmax(dim=1), labels)
    assert not any(parameter.requires_grad for parameter in probe.parameters())


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [5, 1, 9]], ids=["two", "three", "absent classes"])
def test_the_probe_minimises_the_penalised_cross_entropy(labels):
    """The gradient vanishes at the optimum of a convex function; a class that does not occur has no row."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(labels * 30)
    features = torch.randn(len(labels), 6, generator=generator, dtype=torch.float64) * 3 + 1
    probe = fit_probe(features, labels).requires_grad_()
    classes, targets = labels.unique(return_inverse=True)
    assert probe.weight.shape == (len(classes), 6)
    loss = nn.functional.cross_entropy(probe(features), targets) + 1e-3 * probe.weight.square().sum()
    for gradient in torch.autograd.grad(loss, [probe.weight, probe.bias]):
        assert gradient.abs().max() < 1e-4
    assert fit_probe(features.float(), labels).weight.dtype == torch.float32


# on a real encoder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim():
    """The packaged encoder, the attacker's images and a classifier on other ones."""
    encoder = build_encoder(EncoderSpec.parse("zepad:digits-barlow-twins"), pretrained=True).eval()
    data = digits("train")
    images, labels = data.images[:64], data.labels[:64]
    with torch.no_grad():
        probe = fit_probe(encoder(data.images[128:512]), data.labels[128:512])
    return encoder, (images, labels), probe


STRONG = {
    "feature": UniversalFeatureAttack(eps=40 / 255, epochs=4),
    "advencoder": AdvEncoder(eps=40 / 255, epochs=8, width=32, latents=8, lr=2e-3),
    "pap": PAPBase(eps=40 / 255, epochs=8, step_size=8 / 255, layer="stage3"),
    "pap choosing": PAPBase(eps=40 / 255, epochs=8, step_size=8 / 255),
    "ssp": SSP(eps=40 / 255, epochs=8, step_size=8 / 255),
    "uap": UAP(eps=40 / 255, epochs=1, steps=2, group=32),
    "uapgd": UAPGD(eps=40 / 255, epochs=6, step_size=8 / 255),
}


@pytest.mark.parametrize(
    "attack",
    [pytest.param(attack, id=name, marks=[slow] * (name == "pap choosing")) for name, attack in STRONG.items()],
)
def test_the_attack_beats_noise_of_the_same_budget_on_a_trained_encoder(victim, attack):
    encoder, (images, labels), probe = victim
    made = fit(attack, encoder, loader_of((images, labels), batch_size=32))
    noise = [
        40 / 255 * torch.randn(made.delta.shape, generator=torch.Generator().manual_seed(s)).sign() for s in (0, 1)
    ]

    def accuracy(x):
        with torch.no_grad():
            return (probe(encoder(x)).argmax(dim=1) == labels).float().mean().item()

    assert accuracy(images) > 0.9
    assert accuracy(made.apply(images)) < min(accuracy((images + n).clamp(0, 1)) for n in noise) - 0.02

"""The square attack uses scores alone, keeps its budget of queries, and changes squares."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies import images, laws, radii, seeds
from tiny import TinyEncoder, seeded
from zepad.attacks import Square, margin
from zepad.errors import ConfigError, InputError

EPS = 8 / 255
few = settings(laws, max_examples=20)  # each example runs an attack


def classifier(classes=3):
    return nn.Sequential(TinyEncoder(), nn.Linear(8, classes)).eval()


def linear(classes=3, pixels=192):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


class Shown:
    """A model that remembers what it was shown and how often; images are told apart by their order."""

    def __init__(self, model):
        self.model, self.batches, self.graphs = model, [], 0

    def __call__(self, images):
        self.batches.append(images.clone())
        self.graphs += torch.is_grad_enabled() or images.requires_grad
        return self.model(images)

    @property
    def total(self):
        return sum(map(len, self.batches))


@few
@given(images(), radii, st.integers(1, 12), st.floats(0.01, 1), seeds)
def test_attacked_images_lie_in_the_ball_and_in_range(clean, eps, queries, share, seed):
    model = classifier()
    attack = Square(eps=eps, queries=queries, share=share)
    attacked = attack(model, clean, model(clean).argmax(1), generator=seeded(seed))
    assert attacked.shape == clean.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - clean).abs().max() <= eps + 1e-6


@pytest.mark.parametrize("queries", [1, 2, 3, 20])
def test_the_budget_is_spent_on_those_that_hold_and_never_exceeded(toy, queries):
    clean = toy[0]
    model = Shown(lambda x: torch.eye(3)[torch.zeros(len(x), dtype=torch.long)])  # always says 0
    labels = torch.arange(24) % 3
    attacked = Square(eps=EPS, queries=queries)(model, clean, labels)
    standing = labels == 0
    assert torch.equal(attacked[~standing], clean[~standing])
    assert model.total == 24 + (queries - 1) * int(standing.sum())
    assert len(model.batches) == queries


def test_a_fallen_image_is_no_longer_shown(toy):
    model = linear()
    shown, labels = Shown(model), model(toy[0]).argmax(1)
    attacked = Square(eps=0.01, queries=60)(shown, toy[0], labels, generator=seeded())
    fallen = model(attacked).argmax(1) != labels
    sizes = [len(batch) for batch in shown.batches]
    assert 0 < fallen.sum() < 24
    assert sizes == sorted(sizes, reverse=True)
    assert int((~fallen).sum()) <= sizes[-1] < 24
    assert shown.total < 24 * 60


def test_gradients_are_never_asked_for(toy):
    """A model without any is attacked as well as its differentiable twin."""
    model = linear()
    shown = Shown(lambda x: torch.from_numpy(model(x).detach().numpy().copy()))
    labels = model(toy[0]).argmax(1)
    attack = Square(eps=0.01, queries=20)
    assert torch.equal(
        attack(shown, toy[0], labels, generator=seeded()), attack(model, toy[0], labels, generator=seeded())
    )
    assert shown.graphs == 0


def test_the_best_point_shown_is_the_result(toy):
    """Written out for one image at a time: remember everything, take the largest margin."""
    model = linear().double()
    for row in range(6):
        clean = toy[0][row : row + 1].double()
        label = model(clean).argmax(1)
        shown = Shown(model)
        attacked = Square(eps=EPS / 4, queries=40)(shown, clean, label, generator=seeded(row))
        seen = torch.cat(shown.batches)
        margins = margin(model(seen), label.expand(len(seen)))
        assert torch.equal(attacked[0], seen[margins.argmax()])


def test_every_query_is_one_square_at_a_corner_of_the_ball():
    """And it changes something; the first is stripes. Middle grey, so that pixels never clip."""
    eps, clean, seen = 0.1, torch.full((4, 3, 8, 8), 0.5), []

    def stubborn(images):  # every look beats the one before, none changes the label
        seen.append(images.clone())
        return torch.tensor([[1.0, 0.001 * len(seen), 0.0]]).expand(len(images), -1)

    attack = Square(eps=eps, queries=80)
    attack(stubborn, clean, torch.zeros(4, dtype=torch.long), generator=seeded())
    stripes = seen[1]
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    for query, (before, after) in enumerate(pairwise(seen[1:])):
        torch.testing.assert_close((after - clean).abs(), torch.full_like(clean, eps))
        changed, side = (before != after).any(dim=1), attack._side(query, clean)
        for image, was, now in zip(changed, before, after, strict=True):
            rows, columns = (image.any(dim=axis).nonzero().flatten() for axis in (1, 0))
            assert 1 <= len(rows) <= len(range(rows[0], rows[-1] + 1)) <= side
            assert 1 <= len(columns) <= len(range(columns[0], columns[-1] + 1)) <= side
            for channel_was, channel_now in zip(was, now, strict=True):  # one sign for each channel of a square
                assert channel_now[channel_was != channel_now].unique().numel() <= 1


def test_the_side_follows_the_schedule_of_the_paper():
    """The share of pixels starts at 0.8 and is halved after 0.1, 0.5, 2, 5, 10, 20, 40, 60 and 80 per cent."""
    attack, image = Square(eps=EPS, queries=10_000), torch.zeros(1, 3, 100, 100)
    after = {0: 1, 10: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
    for query, halved in after.items():
        assert attack._side(query, image) == max(1, round((0.8 / halved * 10_000) ** 0.5))
    half = Square(eps=EPS, queries=5000)
    assert all(half._side(query // 2, image) == attack._side(query, image) for query in range(0, 10_000, 250))
    assert attack._side(0, torch.zeros(1, 1, 2, 50)) == 2


def test_the_search_comes_near_the_optimum_of_a_linear_model(toy):
    """The right class is far ahead, so that nothing falls and the search goes on to its end."""
    model, eps, clean, labels = linear(2), 0.05, toy[0][:8], torch.zeros(8, dtype=torch.long)
    model[1].bias.data[0] += 100
    towards = (model[1].weight[1] - model[1].weight[0]).detach().view(3, 8, 8)
    best = (clean + eps * towards.sign()).clamp(0, 1)
    attacked = Square(eps=eps, queries=1500)(model, clean, labels, generator=seeded())
    start, reached, most = (margin(model(x), labels) for x in (clean, attacked, best))
    assert ((reached - start) / (most - start)).min() > 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l2"}, r'norm must be "linf", the only norm of this attack; use APGD for "l2"; got \'l2\''),
        ({"queries": 0}, "queries must be at least 1; got 0"),
        ({"share": 0}, r"share must be in \(0, 1\]; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Square(eps=EPS, **settings)


def test_labels_that_do_not_fit_are_refused(toy):
    with pytest.raises(InputError, match=r"labels must have shape \(24,\)"):
        Square(eps=EPS)(classifier(), toy[0], toy[1][:, None])

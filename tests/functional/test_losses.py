"""Properties of both forms of the structure loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import reference
from strategies import feature_pairs, laws
from zepad.functional import boosted_cross_entropy, genetic_regularization, kl_divergence, structure_loss

TOLERANCE = {"rel": 1e-10, "abs": 1e-10}


def labelled(pairs, classes=None):
    """Pairs of logits with a label per row."""
    return pairs.flatmap(
        lambda pair: st.tuples(
            st.just(pair),
            arrays("int64", len(pair[0]), elements=st.integers(0, (classes or pair[0].shape[1]) - 1)).map(
                torch.from_numpy
            ),
        )
    )


def far_from_ties(rows=5, columns=4):
    """Generic features: the nearest row is unique, so both losses are differentiable here."""
    return tuple(torch.randn(rows, columns, dtype=torch.float64, requires_grad=True) for _ in range(2))


@laws
@given(feature_pairs())
def test_structure_loss_agrees_with_the_equation(pair):
    adversarial, benign = pair
    expected = reference.structure_loss(adversarial.numpy(), benign.numpy())
    assert structure_loss(adversarial=adversarial, benign=benign).item() == pytest.approx(expected, **TOLERANCE)


@laws
@given(labelled(feature_pairs()))
def test_genetic_regularization_agrees_with_the_equation(example):
    (adversarial, benign), labels = example
    expected = reference.genetic_regularization(adversarial.numpy(), benign.numpy(), labels.numpy())
    actual = genetic_regularization(adversarial=adversarial, benign=benign, labels=labels)
    assert actual.item() == pytest.approx(expected, **TOLERANCE)


@laws
@given(feature_pairs())
def test_structure_loss_is_zero_for_equal_inputs_and_never_negative(pair):
    adversarial, benign = pair
    assert structure_loss(adversarial=benign, benign=benign) == 0
    assert structure_loss(adversarial=adversarial, benign=benign) >= -1e-12


def test_structure_loss_sees_a_changed_structure():
    benign = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert structure_loss(adversarial=benign[[0, 2, 1]], benign=benign) > 0.1


def test_structure_loss_ignores_the_length_of_rows():
    adversarial, benign = (tensor.detach() for tensor in far_from_ties())
    lengths = torch.rand(2, 5, 1, dtype=torch.float64) * 10 + 0.1
    expected = structure_loss(adversarial=adversarial, benign=benign).item()
    scaled = structure_loss(adversarial=lengths[0] * adversarial, benign=lengths[1] * benign)
    assert scaled.item() == pytest.approx(expected, **TOLERANCE)


@laws
@given(labelled(feature_pairs()), st.data())
def test_the_order_of_the_batch_does_not_matter(example, data):
    (adversarial, benign), labels = example
    order = data.draw(st.permutations(range(len(labels))))
    shuffled = {"adversarial": adversarial[order], "benign": benign[order]}
    expected = structure_loss(adversarial=adversarial, benign=benign).item()
    assert structure_loss(**shuffled).item() == pytest.approx(expected, **TOLERANCE)
    expected = genetic_regularization(adversarial=adversarial, benign=benign, labels=labels).item()
    assert genetic_regularization(**shuffled, labels=labels[order]).item() == pytest.approx(expected, **TOLERANCE)


def test_the_benign_structure_is_the_target():
    """P is benign and Q adversarial: the two arguments are not interchangeable."""
    collapsed = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    spread = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    assert structure_loss(adversarial=collapsed, benign=spread).item() == pytest.approx(13.5196, abs=1e-4)
    assert structure_loss(adversarial=spread, benign=collapsed).item() == pytest.approx(1.6575, abs=1e-4)


def test_genetic_regularization_uses_the_labels():
    adversarial, benign = (tensor.detach() for tensor in far_from_ties())
    one = genetic_regularization(adversarial=adversarial, benign=benign, labels=torch.zeros(5, dtype=torch.int64))
    several = genetic_regularization(adversarial=adversarial, benign=benign, labels=torch.tensor([0, 1, 2, 3, 0]))
    assert one != several


def test_a_single_row_has_no_structure():
    adversarial, benign = far_from_ties(rows=1)
    losses = (
        structure_loss(adversarial=adversarial, benign=benign),
        genetic_regularization(adversarial=adversarial, benign=benign, labels=torch.tensor([2])),
    )
    for loss in losses:
        assert loss == 0
        for gradient in torch.autograd.grad(loss, (adversarial, benign)):  # still part of the graph
            assert not gradient.any()


@pytest.mark.parametrize("rows", [torch.zeros(4, 3), torch.ones(4, 3), torch.eye(3)[[0, 0, 1, 1]]])
def test_duplicate_and_zero_rows_stay_finite(rows):
    adversarial, benign = rows.clone().requires_grad_(), rows.flip(0).requires_grad_()
    for loss in (
        structure_loss(adversarial=adversarial, benign=benign),
        genetic_regularization(adversarial=adversarial, benign=benign, labels=torch.tensor([0, 1, 2, 0])),
    ):
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, (adversarial, benign)):
            assert gradient.isfinite().all()


@laws
@given(labelled(feature_pairs(rows=st.integers(2, 6), columns=st.just(1)), classes=1))
def test_a_single_class_is_no_difficulty(example):
    (adversarial, benign), labels = example  # cross-entropy over one class is zero, and with it every bend
    bent = genetic_regularization(adversarial=adversarial, benign=benign, labels=labels)
    assert bent.item() == pytest.approx(structure_loss(adversarial=adversarial, benign=benign).item(), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_half_precision_is_computed_in_float32_and_finite(dtype, scale):
    adversarial, benign = (scale * torch.randn(2, 16, 8)).to(dtype)
    labels = torch.arange(16) % 8
    loss = structure_loss(adversarial=adversarial, benign=benign)
    bent = genetic_regularization(adversarial=adversarial, benign=benign, labels=labels)
    exact = {"adversarial": adversarial.double().numpy(), "benign": benign.double().numpy()}
    assert loss.dtype == bent.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.structure_loss(**exact), rel=1e-3)
    assert bent.item() == pytest.approx(reference.genetic_regularization(**exact, labels=labels.numpy()), rel=1e-3)


def test_gradients_are_those_of_the_equations():
    adversarial, benign = far_from_ties()
    labels = torch.tensor([0, 1, 2, 3, 0])
    assert torch.autograd.gradcheck(lambda a, b: structure_loss(adversarial=a, benign=b), (adversarial, benign))
    assert torch.autograd.gradcheck(
        lambda a, b: genetic_regularization(adversarial=a, benign=b, labels=labels), (adversarial, benign)
    )


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3), (3, 3)), ((4,), (4,)), ((2, 3, 1), (2, 3, 1))])
def test_mismatched_features_are_refused(shapes):
    adversarial, benign = map(torch.zeros, shapes)
    message = r"must be \(N, D\) tensors of the same shape; got \("
    with pytest.raises(ValueError, match=message):
        structure_loss(adversarial=adversarial, benign=benign)
    with pytest.raises(ValueError, match=message):
        genetic_regularization(adversarial=adversarial, benign=benign, labels=torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(3,), (4, 1), ()])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\); got \("):
        genetic_regularization(
            adversarial=torch.zeros(4, 3), benign=torch.zeros(4, 3), labels=torch.zeros(shape, dtype=torch.int64)
        )


@laws
@given(feature_pairs())
def test_kl_divergence_agrees_with_the_definition(pair):
    logits, target = (rows.clamp(-20, 20) for rows in pair)
    expected = [
        sum(p * math.log(p / q) for p, q in zip(reference.softmax(b), reference.softmax(a), strict=True))
        for a, b in zip(logits.numpy(), target.numpy(), strict=True)
    ]
    assert kl_divergence(logits=logits, target=target).tolist() == pytest.approx(expected, **TOLERANCE)


@laws
@given(feature_pairs())
def test_kl_divergence_is_zero_for_equal_rows_never_negative_and_blind_to_constants(pair):
    logits, target = pair
    divergence = kl_divergence(logits=logits, target=target)
    assert (divergence >= -1e-9).all()
    torch.testing.assert_close(kl_divergence(logits=logits + 3, target=target - 7), divergence, rtol=1e-6, atol=1e-6)
    assert kl_divergence(logits=target, target=target).abs().max() <= 1e-12


@laws
@given(labelled(feature_pairs(columns=st.integers(2, 6))))
def test_boosted_cross_entropy_agrees_with_the_equation(example):
    (logits, _), labels = example
    logits = logits.clamp(-20, 20)
    expected = []
    for row, label in zip(logits.numpy(), labels.tolist(), strict=True):
        p = [math.exp(value - row.max()) for value in row]
        wrong = max(range(len(p)), key=lambda k: -1 if k == label else p[k])
        rest = sum(value for k, value in enumerate(p) if k != wrong)  # 1 - p_wrong, without cancellation
        expected.append(-math.log(p[label] / sum(p)) - math.log(rest / sum(p)))
    actual = boosted_cross_entropy(logits, labels)
    assert actual.tolist() == pytest.approx(expected, **TOLERANCE)
    assert (actual >= 0).all()


def test_boosted_cross_entropy_and_its_gradient_stay_finite_when_the_wrong_class_is_certain():
    logits = torch.tensor([[200.0, 0.0, -5.0], [0.0, 200.0, 3.0]], requires_grad=True)
    loss = boosted_cross_entropy(logits, torch.tensor([1, 1]))
    assert loss.tolist() == pytest.approx([400 - math.log(1 + math.exp(-5)), 0], abs=1e-3)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: kl_divergence(logits=torch.zeros(2, 3), target=torch.zeros(2, 4)),
        lambda: kl_divergence(logits=torch.zeros(3), target=torch.zeros(3)),
        lambda: boosted_cross_entropy(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)),
        lambda: boosted_cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_divergences_of_half_precision_are_computed_in_float32(dtype):
    logits, target = torch.randn(2, 4, 5).to(dtype)
    labels = torch.arange(4)
    divergence, boosted = kl_divergence(logits=logits, target=target), boosted_cross_entropy(logits, labels)
    assert divergence.dtype == boosted.dtype == torch.float32
    assert torch.equal(divergence, kl_divergence(logits=logits.float(), target=target.float()))
    assert torch.equal(boosted, boosted_cross_entropy(logits.float(), labels))

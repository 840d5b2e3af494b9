"""The laws of confidence, fusion and detection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from strategies import MODERATE, RULES, laws, logits
from zepad import FusionConfig
from zepad.functional import FUSION_RULES, confidence, detection_score, fuse_logits, fusion_weights
from zepad.modules import Fusion

several = st.integers(2, 4)
rules = st.sampled_from(RULES)
sharpnesses = st.floats(0, 20)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def largest(z):
    return z.softmax(dim=-1).amax(dim=-1)


def test_every_rule_is_tested():
    assert set(FUSION_RULES) == set(RULES)


@laws
@given(logits(), rules, sharpnesses)
def test_agrees_with_the_equations(z, rule, sharpness):
    assert_close(confidence(z, sharpness=sharpness), reference.confidence(z.numpy(), sharpness))
    assert_close(fusion_weights(z, rule=rule, sharpness=sharpness), reference.weights(z.numpy(), rule, sharpness))
    assert_close(fuse_logits(z, rule=rule, sharpness=sharpness), reference.fuse(z.numpy(), rule, sharpness))


@laws
@given(logits())
def test_defaults_are_the_papers(z):
    assert_close(confidence(z), reference.confidence(z.numpy(), 3.0))
    assert_close(fusion_weights(z), reference.weights(z.numpy(), "rfdm", 3.0))
    assert_close(fuse_logits(z), reference.fuse(z.numpy(), "rfdm", 3.0))


@pytest.mark.parametrize(("m", "expected"), [(0.5, 0.5), (0.9, 2.99), (1.0, 4.48)])
def test_confidence_at_the_papers_points(m, expected):
    z = torch.tensor([[[m, 1 - m]]], dtype=torch.float64).log()
    assert confidence(z).item() == pytest.approx(expected, abs=0.005)


@laws
@given(logits(), rules)
def test_weights_are_positive_and_sum_to_one(z, rule):
    weights = fusion_weights(z, rule=rule)
    assert (weights > 0).all()
    assert_close(weights.sum(dim=0), torch.ones(z.shape[1], dtype=z.dtype))


@laws
@given(logits(several), rules, st.data())
def test_permuting_the_branches_permutes_the_weights(z, rule, data):
    order = data.draw(st.permutations(range(len(z))))
    assert_close(fusion_weights(z[order], rule=rule), fusion_weights(z, rule=rule)[order])
    assert_close(fuse_logits(z[order], rule=rule), fuse_logits(z, rule=rule))


@laws
@given(logits(scales=MODERATE), rules, st.data())
def test_a_constant_on_one_branch_changes_no_weight_and_no_decision(z, rule, data):
    shifted = z.clone()
    shifted[data.draw(st.integers(0, len(z) - 1))] += data.draw(st.floats(-100, 100))
    assert_close(fusion_weights(shifted, rule=rule), fusion_weights(z, rule=rule))
    moved = fuse_logits(shifted, rule=rule) - fuse_logits(z, rule=rule)
    assert_close(moved, moved[:, :1].expand_as(moved))  # all classes alike, so every comparison of classes stands


@laws
@given(logits(several))
def test_weights_are_ordered_as_the_largest_probabilities(z):
    m, weights = largest(z), fusion_weights(z)
    surer = m[:, None] > m[None] + 1e-9
    assert (weights[:, None] > weights[None])[surer].all()


@laws
@given(logits(), rules, st.integers(1, 5))
def test_equal_branches_weigh_exactly_the_same(z, rule, branches):
    weights = fusion_weights(z[:1].expand(branches, -1, -1), rule=rule)
    assert torch.equal(weights, torch.full_like(weights, 1 / branches))


@laws
@given(logits(several, scales=MODERATE), rules, st.floats(0.1, 5), st.data())
def test_certainty_increases_weight(z, rule, rise, data):
    branch = data.draw(st.integers(0, len(z) - 1))
    surer = z.clone()
    surer[branch] += rise * torch.nn.functional.one_hot(z[branch].argmax(dim=-1), z.shape[-1])
    before, after = fusion_weights(z, rule=rule), fusion_weights(surer, rule=rule)
    if rule == "mean":
        assert torch.equal(after, before)
    else:
        assert (after[branch] > before[branch]).all()


@laws
@given(logits())
def test_without_sharpness_weights_are_proportional_to_the_largest_probabilities(z):
    m = largest(z)
    assert_close(fusion_weights(z, sharpness=0.0), m / m.sum(dim=0))
    assert_close(confidence(z, sharpness=0.0), m)


def test_the_winner_takes_all_as_the_sharpness_grows():
    z = torch.tensor([[[2.0, 0.0]], [[1.9, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    shares = [fusion_weights(z, sharpness=k)[0].item() for k in (0.0, 3.0, 30.0, 300.0, 1e4, 1e9)]
    assert shares[:4] == sorted(set(shares[:4]))
    assert shares[-2:] == [1.0, 1.0]


@laws
@given(logits(), rules)
def test_fused_logits_lie_between_those_of_the_branches(z, rule):
    fused = fuse_logits(z, rule=rule)
    slack = 1e-12 * (1 + z.abs().max())
    assert (fused >= z.amin(dim=0) - slack).all()
    assert (fused <= z.amax(dim=0) + slack).all()


@laws
@given(logits(st.just(1)), rules)
def test_one_branch_is_itself(z, rule):
    assert torch.equal(fuse_logits(z, rule=rule), z[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_comes_back_and_half_is_computed_in_float32(dtype, rule):
    z = (3 * torch.randn(3, 50, 10)).to(dtype)
    precise = z.float() if dtype.itemsize == 2 else z
    for function in (confidence, detection_score):
        assert torch.equal(function(z), function(precise).to(dtype))
    for function in (fusion_weights, fuse_logits):
        assert torch.equal(function(z, rule=rule), function(precise, rule=rule).to(dtype))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite(dtype, rule):
    most = torch.finfo(dtype).max
    rows = [[most, -most, 0.0], [most, most, most], [-most, -most, -most], [0.0, 0.0, 0.0]]
    z = torch.tensor([rows, rows[1:] + rows[:1]], dtype=dtype)
    for result in (confidence(z), detection_score(z), fusion_weights(z, rule=rule), fuse_logits(z, rule=rule)):
        assert result.isfinite().all()
    loud = z.clamp(-6e4, 6e4).requires_grad_()
    (gradient,) = torch.autograd.grad(fuse_logits(loud, rule=rule).float().mean(), loud)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_an_impossible_class_does_not_count(rule):
    z = torch.randn(3, 2, 4)
    masked = torch.cat([z, torch.full((3, 2, 1), -torch.inf)], dim=-1)
    torch.testing.assert_close(fusion_weights(masked, rule=rule), fusion_weights(z, rule=rule))
    torch.testing.assert_close(fuse_logits(masked, rule=rule)[:, :4], fuse_logits(z, rule=rule))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_reach_every_branch(rule):
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(fuse_logits(z, rule=rule)[:, 0].sum(), z)
    assert (gradient[:, :, 0] != 0).all()
    assert torch.autograd.gradcheck(lambda z: fuse_logits(z, rule=rule), z)  # through the weights, too


def test_scaling_one_branch_can_change_the_decision():
    """A documented limit: confidence depends on the scale, although no branch changes its own mind."""
    z = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    louder = z * torch.tensor([1.0, 4.0])[:, None, None]
    torch.testing.assert_close(fusion_weights(z).flatten(), torch.tensor([0.654, 0.346]), atol=1e-3, rtol=0)
    torch.testing.assert_close(fusion_weights(louder).flatten(), torch.tensor([0.398, 0.602]), atol=1e-3, rtol=0)
    assert fuse_logits(z).argmax() == 0
    assert fuse_logits(louder).argmax() == 1


@laws
@given(logits(several))
def test_detection_score_agrees_with_its_definition(z):
    score = detection_score(z)
    assert_close(score, reference.detection_score(z.numpy()))
    assert (score.abs() <= 1).all()


def test_detection_suspects_images_on_which_the_benign_branch_alone_is_unsure():
    sure, unsure = torch.tensor([[9.0, -9.0]]), torch.tensor([[0.0, 0.0]])
    assert detection_score(torch.stack([sure, sure, unsure])).item() == pytest.approx(0.5)
    assert detection_score(torch.stack([unsure, unsure, sure])).item() == pytest.approx(-0.5)
    assert detection_score(torch.stack([sure, unsure, sure])).item() == pytest.approx(-0.25)


@pytest.mark.parametrize("rule", RULES)
def test_the_module_is_the_function(rule):
    z = torch.randn(3, 5, 4)
    fusion = Fusion(FusionConfig(rule=rule, sharpness=7.0))
    assert torch.equal(fusion(z), fuse_logits(z, rule=rule, sharpness=7.0))
    assert torch.equal(fusion.weights(z), fusion_weights(z, rule=rule, sharpness=7.0))
    assert torch.equal(Fusion()(z), fuse_logits(z))
    assert repr(fusion) == f"Fusion(rule={rule!r}, sharpness=7)"


@pytest.mark.parametrize("function", [fusion_weights, fuse_logits])
def test_an_unknown_rule_is_refused_by_name(function):
    with pytest.raises(ValueError, match=r"unknown fusion rule 'vote'; expected one of \['entropy', 'mean', 'rfdm'\]"):
        function(torch.zeros(2, 1, 3), rule="vote")


@pytest.mark.parametrize("function", [confidence, fusion_weights, fuse_logits, detection_score])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.zeros(2, 3), r"torch.float32 of shape \(2, 3\)"),
        (torch.zeros(1, 2, 3, 4), r"torch.float32 of shape \(1, 2, 3, 4\)"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), r"torch.int64 of shape \(2, 2, 3\)"),
    ],
)
def test_logits_of_another_form_are_refused(function, wrong, got):
    with pytest.raises(ValueError, match=rf"\(branches, images, classes\); got {got}.*torch\.stack"):
        function(wrong)


def test_detection_needs_two_branches():
    with pytest.raises(ValueError, match="needs at least 2; got 1"):
        detection_score(torch.zeros(1, 2, 3))

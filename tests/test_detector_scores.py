"""Properties of the detection scores, and of the detector that combines them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.transforms.functional import gaussian_blur

import reference
from strategies import MALFORMED_LOGITS, MODERATE, clear_logits, laws, logits, seeds
from tiny import assert_close
from zepad import StageError
from zepad.detectors import DetectorInput, DetectorInputs, FittedDetector, Widths, resolve
from zepad.detectors.combined import disagreement_score, reference_divergence
from zepad.detectors.features import feature_score, fit_features
from zepad.errors import ConfigError
from zepad.functional import detection_score, smoothed

several = st.integers(2, 4)
NAMES = ("gap", "features", "combined")
scores_of_branches = pytest.mark.parametrize("score", [detection_score, disagreement_score])


def undefended_for(data, z, scale=10.0):
    rows = data.draw(arrays(np.float64, tuple(z.shape[1:]), elements=st.floats(-scale, scale)))
    return torch.from_numpy(rows)


# scores of logits


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


@laws
@given(logits(several))
def test_disagreement_score_agrees_with_its_definition(z):
    score = disagreement_score(z)
    assert_close(score, reference.disagreement_score(z.numpy()))
    assert ((score >= 0) & (score <= 1)).all()


@laws
@given(logits(), st.data())
def test_reference_divergence_agrees_with_its_definition(z, data):
    undefended = undefended_for(data, z)
    score = reference_divergence(z, reference=undefended)
    assert_close(score, reference.reference_divergence(z.numpy(), undefended.numpy()), 1e-9)
    assert (score >= 0).all()


@laws
@given(logits(st.just(1)), st.integers(2, 4), st.lists(st.floats(-50, 50), min_size=5, max_size=5))
def test_equal_distributions_are_not_suspicious(z, branches, constants):
    """Whatever constant each branch adds to its logits: that changes no probability."""
    equal = z + torch.tensor(constants[:branches], dtype=z.dtype)[:, None, None]
    for score in (detection_score(equal), disagreement_score(equal)):
        assert_close(score, torch.zeros(z.shape[1], dtype=z.dtype))
    assert_close(reference_divergence(equal, reference=z[0] + constants[-1]), torch.zeros(z.shape[1], dtype=z.dtype))


@laws
@given(clear_logits(several), st.data())
def test_permuting_the_hardened_branches_or_the_classes_changes_no_score(z, data):
    undefended = undefended_for(data, z)
    branches = [*data.draw(st.permutations(range(len(z) - 1))), len(z) - 1]
    classes = data.draw(st.permutations(range(z.shape[-1])))
    other = z[branches][:, :, classes]
    for score in (detection_score, disagreement_score):
        assert_close(score(other), score(z))
    assert_close(
        reference_divergence(other, reference=undefended[:, classes]), reference_divergence(z, reference=undefended)
    )


@laws
@given(clear_logits(several), st.data())
def test_the_ensemble_of_the_reference_divergence_has_no_order(z, data):
    undefended, order = undefended_for(data, z), data.draw(st.permutations(range(len(z))))
    assert_close(reference_divergence(z[order], reference=undefended), reference_divergence(z, reference=undefended))


@laws
@given(logits(several, scales=MODERATE), st.data())
def test_each_image_is_scored_by_itself(z, data):
    undefended = undefended_for(data, z)
    for score in (
        lambda rows: detection_score(z[:, rows]),
        lambda rows: disagreement_score(z[:, rows]),
        lambda rows: reference_divergence(z[:, rows], reference=undefended[rows]),
    ):
        assert_close(torch.cat([score([row]) for row in range(z.shape[1])]), score(slice(None)))


def test_branches_that_share_no_class_disagree_entirely():
    z = torch.tensor([[[40.0, -40.0, 0.0]], [[-40.0, 40.0, 0.0]]], dtype=torch.float64)
    assert disagreement_score(z).item() == pytest.approx(1.0)
    assert reference_divergence(z[:1], reference=z[1]).item() == pytest.approx(80)


def test_an_undefended_victim_that_is_fooled_is_suspicious_and_one_that_is_not_is_not():
    says = torch.tensor([[[6.0, 0.0, 0.0]]] * 3)
    agrees, fooled = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0]])
    assert reference_divergence(says, reference=agrees) < 0.01 < 4 < reference_divergence(says, reference=fooled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_comes_back_and_half_is_computed_in_float32(dtype):
    z = (3 * torch.randn(3, 50, 10)).to(dtype)
    rows = (3 * torch.randn(50, 10)).to(dtype)
    precise, precise_rows = (t.float() if dtype.itemsize == 2 else t for t in (z, rows))
    for score in (detection_score, disagreement_score):
        assert torch.equal(score(z), score(precise).to(dtype))
    expected = reference_divergence(precise, reference=precise_rows).to(dtype)
    assert torch.equal(reference_divergence(z, reference=rows), expected)
    fitted = fit_features(precise[0], precise_rows)
    expected = feature_score(fitted, features=precise[0], undefended=precise_rows).to(dtype)
    assert torch.equal(feature_score(fit_features(z[0], rows), features=z[0], undefended=rows), expected)


@scores_of_branches
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite(score, dtype):
    most = torch.finfo(dtype).max
    rows = [[most, -most, 0.0], [most, most, most], [-most, -most, -most], [0.0, 0.0, 0.0]]
    z = torch.tensor([rows, rows[1:] + rows[:1]], dtype=dtype)
    assert score(z).isfinite().all()


@scores_of_branches
def test_gradients_reach_every_branch_and_are_finite(score):
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(z).sum(), z)
    assert (gradient != 0).any(dim=-1).all()
    assert torch.autograd.gradcheck(score, z)
    sure = (1000 * z.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(score(sure).sum(), sure)
    assert gradient.isfinite().all()


def test_the_gradient_of_the_reference_divergence_reaches_the_branches_and_the_reference():
    z, rows = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 4), (2, 4)))
    assert torch.autograd.gradcheck(lambda z, rows: reference_divergence(z, reference=rows), (z, rows))


@pytest.mark.parametrize("score", [detection_score, disagreement_score, reference_divergence])
@pytest.mark.parametrize(("wrong", "got"), MALFORMED_LOGITS)
def test_logits_of_another_form_are_refused(score, wrong, got):
    undefended = {"reference": torch.zeros(2, 3)} if score is reference_divergence else {}
    with pytest.raises(ValueError, match=rf"\(branches, images, classes\); got {got}.*torch\.stack"):
        score(wrong, **undefended)


@scores_of_branches
def test_a_score_of_two_sides_needs_two_branches(score):
    with pytest.raises(ValueError, match="at least 2 branches are needed.*; got 1"):
        score(torch.zeros(1, 2, 3))


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (1, 2, 3)])
def test_a_reference_of_other_images_or_classes_is_refused(shape):
    with pytest.raises(ValueError, match=r"shape \(images, classes\) of the branches' logits, \(2, 3\); got"):
        reference_divergence(torch.zeros(3, 2, 3), reference=torch.zeros(shape))


# features


def related(count=60, width=4, outputs=3, noise=0.0, seed=0):
    """Features and what follows from them linearly, by the same relation for every seed, in float64."""
    generator, law = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    inputs = torch.randn(count, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, outputs, generator=law, dtype=torch.float64)
    errors = torch.randn(count, outputs, generator=generator, dtype=torch.float64)
    return inputs, inputs @ weight + 2 + noise * errors


@laws
@given(seeds, st.integers(10, 40), st.integers(1, 6), st.integers(1, 5))
def test_a_feature_fit_is_ridge_regression(seed, count, width, outputs):
    inputs, targets = related(count, width, outputs, noise=0.5, seed=seed)
    fresh, moved = related(7, width, outputs, noise=2.0, seed=seed + 1)
    error = reference.feature_fit(inputs.numpy(), targets.numpy())
    model = fit_features(inputs, targets)
    for rows, undefended in ((inputs, targets), (fresh, moved)):
        actual = feature_score(model, features=rows, undefended=undefended).exp()
        expected = error(rows.numpy(), undefended.numpy()).clip(min=1e-6)  # below, a logarithm is of rounding
        assert_close(actual, expected, 1e-6)


def test_the_mean_squared_error_of_the_images_it_was_fitted_on_is_one():
    inputs, targets = related(noise=0.5)
    scores = feature_score(fit_features(inputs, targets), features=inputs, undefended=targets)
    assert scores.exp().mean() == pytest.approx(1, rel=0.01)


def test_a_linear_relation_is_recovered_and_its_breach_found():
    """The ridge takes a little of it: a tenth of a standard deviation, so a hundredth of the variance is left."""
    inputs, targets = related(400)
    model = fit_features(inputs[:300], targets[:300])
    assert (model.residual_scale < 0.12 * targets.std(dim=0)).all()
    benign = feature_score(model, features=inputs[300:], undefended=targets[300:])
    moved = feature_score(model, features=inputs[300:], undefended=targets[300:] + targets.std(dim=0))
    assert benign.median().abs() < 1
    assert (moved > benign.max()).float().mean() > 0.9
    assert moved.median() > benign.median() + 3


def test_moving_the_undefended_features_further_is_more_suspicious_without_bound():
    inputs, targets = related(noise=0.3)
    model = fit_features(inputs, targets)
    direction = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    scores = [
        feature_score(model, features=inputs, undefended=targets + far * direction).mean() for far in (1, 10, 1e2, 1e4)
    ]
    assert scores == sorted(scores)
    assert scores[-1] - scores[-2] == pytest.approx(2 * np.log(100), rel=0.01)


@laws
@given(seeds, st.lists(st.tuples(st.floats(0.01, 100), st.floats(-100, 100)), min_size=4, max_size=4))
def test_rescaled_inputs_change_no_score(seed, changes):
    inputs, targets = related(30, noise=0.5, seed=seed)
    scales, shifts = torch.tensor(changes, dtype=torch.float64).unbind(dim=1)
    other = inputs * scales + shifts
    before = feature_score(fit_features(inputs, targets), features=inputs, undefended=targets)
    assert_close(feature_score(fit_features(other, targets), features=other, undefended=targets), before, 1e-6)


@laws
@given(seeds, st.lists(st.tuples(st.floats(0.01, 100), st.floats(-100, 100)), min_size=3, max_size=3))
def test_rescaled_outputs_change_no_score(seed, changes):
    inputs, targets = related(30, noise=0.5, seed=seed)
    targets = targets / targets.std(dim=0)
    scales, shifts = torch.tensor(changes, dtype=torch.float64).unbind(dim=1)
    # One scale for all: of features of very different size the smallest errors are held up, for safety's sake.
    other = targets * scales[0] + shifts
    before = feature_score(fit_features(inputs, targets), features=inputs, undefended=targets)
    assert_close(feature_score(fit_features(inputs, other), features=inputs, undefended=other), before, 1e-2)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0, 1e3])
def test_a_feature_that_never_moves_does_no_harm(constant):
    inputs, targets = related(noise=0.5)
    dead = torch.full((len(inputs), 1), constant, dtype=torch.float64)
    before = feature_score(fit_features(inputs, targets), features=inputs, undefended=targets)
    wider = torch.cat([inputs, dead], dim=1)
    model = fit_features(wider, targets)
    assert_close(feature_score(model, features=wider, undefended=targets), before, 1e-5)
    awake = torch.cat([inputs, dead + 1], dim=1)  # it moves at last, of which nothing is known
    assert_close(feature_score(model, features=awake, undefended=targets), before, 0.05)
    both = torch.cat([targets, dead], dim=1)
    assert feature_score(fit_features(inputs, both), features=inputs, undefended=both).isfinite().all()


def test_features_that_are_all_constant_score_finitely():
    constant = torch.ones(20, 3)
    model = fit_features(constant, constant)
    assert all(part.isfinite().all() for part in model)
    assert feature_score(model, features=constant, undefended=constant).isfinite().all()
    assert (feature_score(model, features=constant, undefended=constant + 1) > 10).all()


def test_more_features_than_images_are_no_obstacle():
    inputs, targets = related(12, width=40, noise=0.5)
    model = fit_features(inputs, targets)
    assert all(part.isfinite().all() for part in model)
    assert feature_score(model, features=inputs, undefended=targets).isfinite().all()


def test_the_gradient_of_the_feature_score_reaches_both_sides():
    inputs, targets = related(noise=0.5)
    model = fit_features(inputs, targets)
    rows, undefended = inputs[:3].clone().requires_grad_(), targets[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: feature_score(model, features=x, undefended=y), (rows, undefended))


@pytest.mark.parametrize("counts", [(9, 9), (0, 0), (20, 19), (12, 30)])
def test_too_few_images_to_fit_are_refused(counts):
    rows, others = (torch.randn(count, 3) for count in counts)
    message = f"needs at least 10 images, with one row of features each; got {counts[0]} and {counts[1]}"
    with pytest.raises(ValueError, match=message):
        fit_features(rows, others)


# the detector


def inputs_of(count=40, seed=0, branches=3, classes=4):
    """Inputs of a detector whose reference features follow from four others, two of them the blurred ones."""
    generator = torch.Generator().manual_seed(seed)
    features, undefended = (part.float() for part in related(count, width=7, noise=0.3, seed=seed))
    stacked = 2 * torch.randn(branches, count, classes, generator=generator)
    return DetectorInputs(
        logits=stacked,
        hardened_features=features[:, :4],
        reference_logits=torch.randn(count, classes, generator=generator),
        reference_features=undefended,
        blurred_features=features[:, 4:],
    )


def sides(inputs):
    return torch.cat([inputs.hardened_features, inputs.blurred_features], dim=1), inputs.reference_features


def unfitted(name):
    return FittedDetector(resolve(name, argument="detector")).eval()


def fitted(name, given=None):
    detector = unfitted(name)
    detector.fit(inputs_of() if given is None else given)
    return detector


def test_each_detector_is_its_function():
    seen = inputs_of(seed=3)
    assert torch.equal(fitted("gap")(seen), detection_score(seen.logits))
    features, undefended = sides(seen)
    expected = feature_score(fit_features(*sides(inputs_of())), features=features, undefended=undefended)
    assert torch.equal(fitted("features")(seen), expected)


def test_the_combined_score_is_the_most_suspicious_of_all_in_benign_deviations():
    basis, seen = inputs_of(), inputs_of(seed=3)
    model = fit_features(*sides(basis))

    def parts(e):
        features, undefended = sides(e)
        return torch.stack(
            [
                detection_score(e.logits),
                disagreement_score(e.logits).log(),
                reference_divergence(e.logits, reference=e.reference_logits).log(),
                feature_score(model, features=features, undefended=undefended),
            ]
        )

    benign = parts(basis)
    expected = (parts(seen) - benign.mean(dim=1)[:, None]) / benign.std(dim=1)[:, None]
    torch.testing.assert_close(fitted("combined")(seen), expected.max(dim=0).values)


def test_a_detector_with_nothing_to_fit_is_fitted_from_the_start():
    detector = unfitted("gap")
    assert detector.is_fitted
    assert not detector.state_dict()
    assert detector(inputs_of()).shape == (40,)


@pytest.mark.parametrize("name", ["features", "combined"])
def test_a_detector_that_is_not_fitted_names_the_call_that_fits_it(name):
    detector = unfitted(name)
    assert not detector.is_fitted
    with pytest.raises(StageError, match=rf'the detector "{name}" is not fitted. Call calibrate\(benign_loader\)'):
        detector(inputs_of())
    assert fitted(name).is_fitted


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_detector_is_what_it_says_it_is(name):
    detector, widths = fitted(name), Widths(hardened=4, reference=3)
    shapes = {key: tuple(tensor.shape) for key, tensor in detector.state_dict().items()}
    assert shapes == detector.rule.state_shapes(widths)
    assert bool(shapes) == detector.rule.is_fitted_on_images()
    twin = unfitted(name)
    twin.allocate(widths)
    twin.load_state_dict(detector.state_dict())
    seen = inputs_of(seed=5)
    assert torch.equal(twin(seen), detector(seen))


@pytest.mark.parametrize(("name", "passes"), [("gap", 0), ("features", 2), ("combined", 2)])
def test_a_detector_looks_at_what_it_declares_and_pays_for_it(name, passes):
    """It is differentiable in all that it looks at, and gives the same score where the rest is missing."""
    detector = fitted(name)
    needs = detector.rule.needs
    parts = {
        DetectorInput.HARDENED_FEATURES: {"hardened_features"},
        DetectorInput.REFERENCE: {"reference_features", "reference_logits"},
        DetectorInput.BLURRED_REFERENCE: {"blurred_features"},
    }
    declared = {"logits"}.union(*(fields for need, fields in parts.items() if need in needs))
    given = DetectorInputs(*(part.clone().requires_grad_() for part in inputs_of(seed=7)))
    gradients = torch.autograd.grad(detector(given).sum(), given, allow_unused=True)
    looked_at = {field for field, g in zip(DetectorInputs._fields, gradients, strict=True) if g is not None and g.any()}
    assert looked_at <= declared
    assert {field for need, fields in parts.items() if need in needs for field in fields} - looked_at <= {
        "reference_logits"  # which come with the features at no further cost
    }
    bare = given._replace(**{field: None for field in DetectorInputs._fields if field not in declared})
    assert torch.equal(detector(bare), detector(given))
    assert detector.rule.extra_passes() == passes
    assert detector.rule.needs_reference() == (passes > 0)


def test_too_few_images_leave_the_detector_as_it_was():
    detector = unfitted("combined")
    with pytest.raises(ValueError, match="at least 10 images"):
        detector.fit(inputs_of(count=9))
    assert not detector.is_fitted


# A model in half or in double precision casts what its detector was fitted to.
@pytest.mark.parametrize("name", ["features", "combined"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_fitted_detector_works_in_another_precision(name, dtype):
    detector, seen = fitted(name), inputs_of(seed=5)
    expected = detector(seen)
    actual = detector.to(dtype)(DetectorInputs(*(part.to(dtype) for part in seen)))
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("name", ["", "votes", None, 1, "Gap"])
def test_an_unknown_detector_is_refused(name):
    with pytest.raises(ConfigError, match=r'^detector must be "gap" or .*; got .*Add your own with zepad.detectors'):
        resolve(name, argument="detector")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothing_is_torchvisions_gaussian_inside_the_border(dtype):
    images = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    blurred = smoothed(images)
    assert blurred.dtype == dtype
    expected = gaussian_blur(images, [3, 3], [0.8, 0.8])
    torch.testing.assert_close(blurred[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


def test_smoothing_keeps_what_is_flat_and_stays_in_range():
    flat = torch.full((1, 2, 1, 4), 0.3)
    torch.testing.assert_close(smoothed(flat), flat)
    noise = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)).round()
    assert smoothed(noise).min() >= 0
    assert smoothed(noise).max() <= 1 + 1e-6
    channels = torch.zeros(1, 3, 5, 5)
    channels[:, 1] = 1.0
    torch.testing.assert_close(smoothed(channels), channels)  # no channel leaks into another

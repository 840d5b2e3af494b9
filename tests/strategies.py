"""Hypothesis strategies for logits, features and images, including ties and extreme values."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

laws = settings()  # how many examples is the profile's say: see conftest.py

MODERATE = (0.0, 1e-3, 1.0, 10.0)  # beyond this a softmax saturates and strict inequalities become equalities
SCALES = (*MODERATE, 1e3)
one_to_four, one_to_six = st.integers(1, 4), st.integers(1, 6)
two_to_eight = st.integers(2, 8)
AVERAGING = ("rfdm", "mean", "temperature")
BOUNDING = ("bounded", "mixed")  # what the benign branch may do is bounded
RULES = (*AVERAGING, *BOUNDING)
MALFORMED_LOGITS = (  # tensors that are not stacked logits, and how an error describes them
    (torch.zeros(2, 3), r"torch.float32 of shape \(2, 3\)"),
    (torch.zeros(1, 2, 3, 4), r"torch.float32 of shape \(1, 2, 3, 4\)"),
    (torch.zeros(2, 2, 3, dtype=torch.int64), r"torch.int64 of shape \(2, 2, 3\)"),
)


@st.composite
def logits(draw, branches=one_to_four, scales=SCALES):
    """Stacked logits `(B, N, K)` in float64."""
    shape = draw(st.tuples(branches, st.integers(1, 5), st.integers(2, 8)))
    return torch.from_numpy(draw(arrays(np.float64, shape, elements=st.floats(-1, 1))) * draw(st.sampled_from(scales)))


@st.composite
def clear_logits(draw, branches=one_to_four, classes=two_to_eight):
    """As `logits`, but any two numbers are equal or at least 0.1 apart: no choice hangs on rounding."""
    shape = draw(st.tuples(branches, st.integers(1, 5), classes))
    steps = draw(arrays(np.int64, shape, elements=st.integers(-40, 40)))
    return torch.from_numpy(steps).double() / 10


@st.composite
def rule_settings(draw, rule, branches):
    """Settings of a rule for so many branches."""
    sharpness = {"sharpness": draw(st.floats(0, 20))}
    match rule:
        case "rfdm":
            return sharpness
        case "temperature":
            temperature = st.floats(0.2, 5)
            given = draw(st.just(()) | st.tuples(*[temperature] * branches))
            return {**sharpness, "temperatures": given}
        case "bounded":
            return {"vote": draw(st.floats(0, 10))}
        case "mixed":
            return {
                "scale": draw(st.floats(0.1, 10)),
                "power": draw(st.floats(1, 6)),
                "bias": draw(st.floats(-2, 0)),
                "benign_weight": draw(st.floats(0.01, 0.9)),
            }
    return {}


@st.composite
def feature_pairs(draw, rows=one_to_six, columns=one_to_six):
    """Adversarial and benign features, both `(N, D)` in float64; zero and duplicate rows are common."""
    shape = draw(st.tuples(rows, columns))
    pair = (draw(arrays(np.float64, shape, elements=st.floats(-1, 1))) for _ in range(2))
    return tuple(torch.from_numpy(array * draw(st.sampled_from((1e-3, 1.0, 1e3)))) for array in pair)


@st.composite
def deltas(draw):
    """Perturbations or gradients `(N, C, H, W)` in float64, from well inside a ball of pixels to far outside."""
    shape = draw(st.tuples(*[st.integers(1, 3)] * 4))
    array = draw(arrays(np.int64, shape, elements=st.integers(-100, 100)))
    return torch.from_numpy(array).double() * draw(st.sampled_from((1e-3, 1e-2, 0.1)))


def images(size=4):
    """Three-channel float32 images in [0, 1], pure black and white pixels included."""
    shapes = st.integers(1, 3).map(lambda count: (count, 3, size, size))
    return shapes.flatmap(
        lambda shape: arrays(np.float32, shape, elements=st.floats(0, 1, width=32)).map(
            lambda x: torch.from_numpy(x.copy())
        )
    )


radii = st.floats(1 / 255, 1)
seeds = st.integers(0, 2**32 - 1)

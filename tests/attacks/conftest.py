"""Data and a classifier that are smaller than elsewhere: an attack differentiates through the model in every step."""

import pytest

from tiny import toy_data, trained_classifier


@pytest.fixture
def toy():
    """24 separable images of three classes, `(N, 3, 8, 8)` in [0, 1], and their labels."""
    return toy_data(24, size=8)


@pytest.fixture(scope="module")
def trained():
    return trained_classifier()

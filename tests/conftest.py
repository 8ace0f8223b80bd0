"""Fixtures that several test files share."""

import pytest
import torch
from components import tiny_transformer
from transformer_cases import CONFIGURATIONS

from freqgate_dit import VARIANTS
from freqgate_dit.transformer_freqgate_dit import ConditionedDiTTransformer2DModel


# Tests run side by side (pytest-xdist), and threads that wait for a core of each other's make all of them slow.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(params=CONFIGURATIONS)
def model(request) -> ConditionedDiTTransformer2DModel:
    name, kwargs = CONFIGURATIONS[request.param]
    return tiny_transformer(name, **kwargs)

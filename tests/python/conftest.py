"""Shared settings of the Python tests."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("flashdelta", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("flashdelta")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--host-time", action="store_true", help="test_cuda.py: the host time of a call must be short")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers in any order."""
    torch.manual_seed(0)

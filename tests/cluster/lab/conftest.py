"""Laboratories run for many minutes and need root, so only ``-m lab`` runs them."""

import machines
import pytest


@pytest.fixture(scope="session", autouse=True)
def able():
    if lacks := machines.missing():
        pytest.skip(f"a laboratory {lacks}")

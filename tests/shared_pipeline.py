"""A fixture for tests that call scripts many times: the models of a checkpoint are read once."""
from functools import lru_cache

import pytest

from engine import jobs
from engine.pipeline import Pipeline


@lru_cache
def load(*arguments):
    """A Pipeline whose models stay in memory, the same one for the same arguments."""
    pipe = Pipeline(*arguments)
    pipe.make_room = lambda: None
    return pipe


@pytest.fixture
def load_once(monkeypatch):
    """Scripts get their Pipeline from `load`."""
    monkeypatch.setattr(jobs, "Pipeline", load)

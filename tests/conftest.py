"""Shared fixtures. One compute thread each: the tests run beside other work."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")

from pathlib import Path

import pytest
from tiny import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the two-layer ChatML model."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")

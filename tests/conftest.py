"""Fixtures for the whole tree of tests. Nothing here or below reaches for the network."""

import faulthandler
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests import tiny

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A thread or process that a test left keeps the run for two minutes at most, and is shown."""
    faulthandler.dump_traceback_later(120, exit=True)


@pytest.fixture(autouse=True)
def no_log_left():
    """A command that a test runs logs to that test's stderr, which is closed when a later test logs."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Directory of the conformance vectors; see its README.md."""
    return Path(__file__).parent / "data" / "vectors"


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """Directory of a tiny base model by its name in `tiny.BASES`, made on first use."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tiny.save_base(name, root / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def mistral(base_dir) -> Path:
    """The tiny base model that most tests use."""
    return base_dir("mistral")

"""A text and a small encoder, for tests of what reads text."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.commands.test_calibrate import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.commands.test_calibrate import save_model

    return save_model("bert", tmp_path_factory.mktemp("bert") / "model")

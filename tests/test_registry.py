from __future__ import annotations

from dataclasses import dataclass

import pytest

from spectral_surgery.errors import ConfigError
from spectral_surgery.registry import Table


@dataclass(frozen=True)
class Row:
    name: str


TABLE = Table("shape", [Row("circle"), Row("square")])


def test_rows_by_name_in_order() -> None:
    assert list(TABLE) == ["circle", "square"]
    assert len(TABLE) == 2
    assert TABLE["square"] == Row("square")
    assert "circle" in TABLE
    assert "ring" not in TABLE


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"^shape: expected one of circle, square, got 'cirlce'\. Did you mean 'circle'\?$"
    ):
        TABLE["cirlce"]
    with pytest.raises(ConfigError, match=r"^shape: expected one of circle, square, got 'zzz'\.$"):
        TABLE["zzz"]


def test_names_differ() -> None:
    with pytest.raises(ConfigError, match="shape: expected different names, got 'a' twice"):
        Table("shape", [Row("a"), Row("a")])

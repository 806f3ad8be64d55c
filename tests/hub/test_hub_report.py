"""report of a repository: by its name, and with the files that say how it was made."""

from __future__ import annotations

from pathlib import Path

from tests.hub_server import LoopbackHub
from tests.support.checkpoints import llama_like, write_folder
from tests.support.html import parse
from tests.support.hub_client import Client


def test_a_repository_is_reported_under_its_name(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "base", llama_like())
    client.result("compress", source, tmp_path / "small", "--bits", "4")
    (tmp_path / "small" / "heal.json").write_text('{"curve": {"train": [[1, 2.5], [2, 1.5]]}}')
    hub.seed("org/small", tmp_path / "small")
    done = client.result("report", "org/small", "-o", tmp_path / "page.html")
    assert done["title"] == "org/small"
    page = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.one("h1").text == "org/small"
    assert "Healing" in [section.one("h2").text for section in page.all("section")]
    local = client.result("report", tmp_path / "small", "-o", tmp_path / "local.html")
    assert local["figures"] == done["figures"]

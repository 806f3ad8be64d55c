"""Every way a Hub can fail, as one line; passing failures are waited out; secrets are never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectral_surgery.hub.failures import clean
from tests.hub_server import TOKEN, LoopbackHub
from tests.support.checkpoints import contents, llama_like, write_folder
from tests.support.hub_client import Client, running

INFO = "GET /api/models/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("failures") / "source", llama_like())


@pytest.mark.parametrize(
    ("source", "environment", "text"),
    [
        ("org/missing", {}, "org/missing: no such repository, or a private one that the token does not open"),
        ("org/private", {"HF_TOKEN": None}, "org/private: no such repository, or a private one"),
        ("org/private", {"HF_TOKEN": "hf_wrong"}, "org/private: the token is missing or refused (401)"),
        ("org/gated", {}, "org/gated: is gated; expected an account with access. Ask on its page, then: Give"),
        ("org/plain@v9", {}, "org/plain@v9: has no such revision; expected a branch, tag or commit"),
        ("org/plain--x..y", {}, "org/plain--x..y: cannot be reached or used ("),
    ],
)
def test_sources_that_cannot_be_read(
    hub: LoopbackHub, client: Client, folder: Path, source: str, environment: dict[str, str | None], text: str
) -> None:
    hub.seed("org/plain", folder)
    hub.seed("org/private", folder, private=True)
    hub.seed("org/gated", folder, gated=True)
    done = client("inspect", source, **environment)
    assert done.code == 1
    assert done.stderr.startswith("Error: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_token_can_be_given(hub: LoopbackHub, client: Client, folder: Path) -> None:
    hub.seed("org/private", folder, private=True)
    body = client.result("inspect", "org/private", "--token", TOKEN, HF_TOKEN=None)
    assert body["kind"] == "dense"
    assert all(r.authorized for r in hub.log if "org/private" in r.line)


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("POST /api/repos/create", 401, "the token is missing or refused (401)"),
        ("POST /api/repos/create", 403, "not permitted (403); expected a token with the right to do this"),
        ("/preupload/", 403, "not permitted (403)"),
        ("/preupload/", 404, "not found (404); expected an existing repository. Check the name."),
        ("/commit/", 409, "changed while it was written to (409); expected one writer at a time"),
        ("/commit/", 429, "too many requests (429); expected a slower pace"),
        ("/commit/", 500, "the Hub failed (500); expected a working one"),
        ("/objects/batch", 503, "the Hub failed (503); expected a working one"),
        ("PUT /lfs/", 416, "shorter than the Hub says (416)"),
        ("POST /api/validate-yaml", 400, "refused what was sent (Invalid metadata in README.md. - asked to fail);"),
    ],
)
def test_pushes_that_fail(hub: LoopbackHub, client: Client, folder: Path, path: str, status: int, text: str) -> None:
    hub.fail(path, status, times=-1)
    done = client("push", folder, "me/x", "--quiet")
    assert done.code == 1
    assert text in done.stderr
    assert "Error: me/x: " in done.stderr
    hub.faults.clear()
    client.result("push", folder, "me/x")  # and nothing is in the way of trying again
    assert set(hub.contents("me/x")) == {*contents(folder), "README.md"}


def test_failures_that_pass_are_waited_out(hub: LoopbackHub, client: Client, folder: Path) -> None:
    for path in (INFO, "/preupload/", "/objects/batch", "PUT /lfs/", "/lfs-verify/", "/commit/"):
        hub.fail(path, 500)
        hub.fail(path, 429, headers={"Retry-After": "7"})
    done = client("push", folder, "me/x")
    assert done.code == 0, done.stderr
    assert done.slept > 6 * 7
    assert len(hub.repos["me/x"].refs["main"]) == 2
    assert len(hub.stored) == 1


def test_an_upload_with_a_wrong_hash_is_not_committed(hub: LoopbackHub, client: Client, folder: Path) -> None:
    hub.fail("PUT /lfs/", corrupt=True, times=-1)
    done = client("push", folder, "me/x")
    assert done.code == 1
    assert "Error: me/x: " in done.stderr
    assert hub.contents("me/x") == {}
    hub.faults.clear()
    client.result("push", folder, "me/x")
    assert hub.contents("me/x")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_failing_pull_request_is_not_tried_twice(hub: LoopbackHub, client: Client, folder: Path) -> None:
    hub.create("me/x")
    hub.fail("/commit/", 500)
    done = client("push", folder, "me/x", "--create-pr")
    assert "the Hub failed (500)" in done.stderr
    assert hub.repos["me/x"].pull_requests == 0


@pytest.mark.usefixtures("hub")
def test_a_compression_that_cannot_be_pushed_fails_before_the_work(
    client: Client, folder: Path, tmp_path: Path
) -> None:
    done = client("compress", folder, tmp_path / "out", "--bits", "4", "--push", "me/x", HF_TOKEN=None)
    assert done.code == 1
    assert "me/x: the token is missing or refused (401)" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    done = client("decompress", folder, tmp_path / "out", "--push", "nonsense")
    assert "nonsense: cannot be pushed to; expected org/name." in done.stderr


def test_the_token_is_nowhere(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.seed("org/private", folder, private=True)
    said = ""
    for arguments in (
        ("compress", "org/private", tmp_path / "out", "--bits", "4", "--token", TOKEN, "--push", "me/x", "--json"),
        ("push", tmp_path / "out", "me/x", "--token", TOKEN, "--private"),
        ("pull", "me/x", tmp_path / "pulled", "--token", TOKEN),
        ("decompress", "me/x", tmp_path / "plain", "--token", TOKEN, "--json"),
        ("inspect", "org/private", "--token", TOKEN),
        ("inspect", "org/missing", "--token", TOKEN),
    ):
        done = client(*arguments, HF_TOKEN=None, HF_DEBUG="1")
        said += done.stdout + done.stderr
    hub.fail("/commit/", 403, times=-1)
    (tmp_path / "out" / "notes.txt").write_text("x")
    said += client("push", tmp_path / "out", "me/x", "--token", TOKEN).stderr
    said += client.said.read_text()
    assert "org/missing" in said
    assert TOKEN not in said
    written = b"".join(data for name in ("out", "pulled", "plain") for data in contents(tmp_path / name).values())
    assert len(written) > 100_000
    assert TOKEN.encode() not in written + b"".join(hub.contents("me/x").values())


def test_error_texts_are_cleaned() -> None:
    text = f"\n  403: https://s3/x?Signature=abc&y=z with {TOKEN}\nmore"
    assert clean(text) == "403: https://s3/x with hf_... more"
    assert clean(" \n") == ""


def test_a_hub_without_xet_names_the_remedy(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    with running(tmp_path, hub.endpoint, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0") as client:
        done = client("push", folder, "me/x")
    assert done.code == 1
    assert "me/x: cannot store by Xet (" in done.stderr
    assert "For one without, set HF_HUB_DISABLE_XET=1." in done.stderr

"""What goes over the wire: the real huggingface_hub against a Hub on this machine that counts every byte.

Every figure is of commands as a user types them, and is shown only after what came out of them was compared.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.case import Row, require
from spectral_surgery.files.writer import Entry, tensor_bytes, write_checkpoint
from tests.hub_server import TOKEN, LoopbackHub, serving
from tests.hub_server.client import Client, Done, running
from tests.hub_server.storage import LARGE

LIMIT = 1_000_000  # bytes that an unchanged push and a look at headers may move
CUTS = 10
_PIECE = 1 << 22


@dataclass(frozen=True)
class Sizes:
    """Bytes of the checkpoints.

    Attributes:
        small: goes round.
        cut: is cut off, in so many shards.
        shards: of that.
        unchanged: is pushed twice.
        remote: is only looked at.
    """

    small: int
    cut: int
    shards: int
    unchanged: int
    remote: int


FULL = Sizes(32_000_000, 32_000_000, 16, 200_000_000, 1_000_000_000)
QUICK = Sizes(2_000_000, 2_000_000, 8, 20_000_000, 100_000_000)


@dataclass(frozen=True)
class Bench:
    """A Hub, its client, and all that the client said.

    Attributes:
        hub: on this machine.
        client: the real one.
        scratch: folder for everything.
        said: what commands wrote.
    """

    hub: LoopbackHub
    client: Client
    scratch: Path
    said: list[str] = field(default_factory=list)

    def run(self, *arguments: object, environment: dict[str, str | None] | None = None) -> Done:
        """Run a command; it may fail."""
        done = self.client.run(*arguments, environment=environment)
        self.said.append(done.stdout + done.stderr)
        return done

    def result(self, *arguments: object) -> dict[str, object]:
        """Run a command that has to work; its JSON."""
        return self.run(*arguments, "--json", "--quiet").json()


def run(quick: bool) -> list[Row]:
    """Round trip, cuts, a second push, remote headers, and where the token is found."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with (
            serving(scratch / "objects") as hub,
            running(scratch / "client", hub.endpoint, {"HF_TOKEN": TOKEN}) as client,
        ):
            bench = Bench(hub, client, scratch)
            return [
                round_trip(bench, sizes),
                cut_upload(bench, sizes),
                unchanged_push(bench, sizes),
                remote_headers(bench, sizes),
                token(bench),
            ]


def round_trip(bench: Bench, sizes: Sizes) -> Row:
    """Compress, push, pull and decompress, beside decompressing what was never sent."""
    hub, scratch = bench.hub, bench.scratch / "round"
    source = checkpoint(scratch / "source", sizes.small, 2)
    bench.result("compress", source, scratch / "out", "--bits", "4", "--push", "me/round")
    bench.result("pull", "me/round", scratch / "pulled")
    bench.result("decompress", scratch / "pulled", scratch / "plain")
    bench.result("decompress", scratch / "out", scratch / "direct")
    own, back = contents(scratch / "out"), contents(scratch / "pulled")
    card, pulled_card = own.pop("README.md"), back.pop("README.md")
    require(pulled_card == card.replace(b"THIS_FOLDER", b"me/round"), "the card says more than its new place")
    require(back == own, "what was pulled is not what was pushed")
    plain = contents(scratch / "plain")
    require(plain == contents(scratch / "direct"), "decompressed from the Hub, and without it, are not the same")
    require(sum(map(len, plain.values())) > sizes.small, "less came back than there was")
    moved, nbytes = hub.moved, sum(map(len, own.values())) + len(card)
    hub.reset()
    what = "compress --push, pull, decompress"
    return _row(what, sizes.small, moved, "byte-identical", "byte-identical", met=moved >= 2 * nbytes)


def cut_upload(bench: Bench, sizes: Sizes) -> Row:
    """Cut a push at a random byte of what is still missing, ten times, then let it through."""
    hub, folder = bench.hub, checkpoint(bench.scratch / "cut", sizes.cut, sizes.shards)
    here = contents(folder)
    chance = random.Random(0)  # noqa: S311 - repeatable, no secret
    for _ in range(CUTS):
        missing = sum(len(data) for name, data in here.items() if name.endswith(LARGE)) - _stored_bytes(hub)
        fault = hub.fail("PUT /lfs/", times=-1, cut_after=chance.randrange(1, missing), together=True)
        done = bench.run("push", folder, "me/cut", "--quiet")
        require(done.code == 1 and fault.cut_after == 0, "a push whose line went dead did not fail")
        require(not hub.contents("me/cut"), "a push that was cut has published something")
        hub.faults.clear()
    bench.result("push", folder, "me/cut")
    there = hub.contents("me/cut")
    lost = [name for name, data in here.items() if there.get(name) != data]
    doubled = [sha for sha, count in Counter(hub.stored).items() if count > 1]
    extra = there.keys() - here.keys() - {"README.md"}
    require(len(hub.repos["me/cut"].refs["main"]) == 2, "more than one commit was made")
    moved, nbytes = hub.moved, sum(map(len, here.values()))
    hub.reset()
    wrong = len(lost) + len(doubled) + len(extra)
    what = f"push cut at a random byte {CUTS} times, then whole"
    found = f"{len(lost)} lost, {len(doubled) + len(extra)} doubled, {moved / nbytes:.2f} x the bytes"
    return _row(what, nbytes, moved, found, "0 lost, 0 doubled", met=wrong == 0)


def unchanged_push(bench: Bench, sizes: Sizes) -> Row:
    """Push a folder twice; only the second time is counted."""
    hub, folder = bench.hub, checkpoint(bench.scratch / "unchanged", sizes.unchanged, 4)
    first = bench.result("push", folder, "me/unchanged")
    require(hub.received > sizes.unchanged, "the first push moved less than the folder has")
    hub.reset()
    again = bench.result("push", folder, "me/unchanged")
    require((again["changed"], again["commit"]) == (False, first["commit"]), "the second push made a commit")
    require(not hub.stored, "the second push sent a large file")
    files = {name: blob for name, blob in hub.repos["me/unchanged"].refs["main"][-1].files.items() if blob.large}
    same = all(_same(blob.path, folder / name) for name, blob in files.items())
    require(len(files) == 4 and same, "what is on the Hub is not the folder")
    moved = hub.moved
    hub.reset()
    hub.repos.pop("me/unchanged")
    for path in (folder, *(blob.path for blob in files.values())):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = f"nothing sent, {moved / 1e6:.3f} MB"
    return _row("push again, unchanged", sizes.unchanged, moved, found, "< 1 MB", met=moved < LIMIT)


def remote_headers(bench: Bench, sizes: Sizes) -> Row:
    """Inspect a checkpoint on the Hub, beside the same one on disk."""
    hub, folder = bench.hub, hollow(bench.scratch / "remote", sizes.remote)
    hub.seed("org/remote", folder)
    there, here = bench.result("inspect", "org/remote"), bench.result("inspect", folder)
    require(there["tensors"] == here["tensors"], "the tensors of the Hub are not those of the disk")
    require(int(str(there["nbytes"])) >= sizes.remote, "the checkpoint is smaller than it should be")
    moved = hub.moved
    hub.reset()
    hub.repos.pop("org/remote")
    shutil.rmtree(folder)
    tensors = there["tensors"]
    found = f"{len(tensors) if isinstance(tensors, list) else 0} tensors listed, {moved / 1e6:.3f} MB"
    return _row("inspect of a remote checkpoint", sizes.remote, moved, found, "< 1 MB", met=moved < LIMIT)


def token(bench: Bench) -> Row:
    """Look for the access token in all that the commands of this case, and some that fail, wrote anywhere."""
    hub, scratch = bench.hub, bench.scratch / "token"
    debug: dict[str, str | None] = {"HF_DEBUG": "1"}
    alone = debug | {"HF_TOKEN": None}  # so that --token is all there is
    source = checkpoint(scratch / "source", 200_000, 1)
    hub.seed("org/private", source, private=True)
    secret = ("--token", TOKEN)
    working: tuple[tuple[object, ...], ...] = (
        ("compress", "org/private", scratch / "out", "--bits", "4", *secret, "--push", "me/token"),
        ("inject", "org/private", scratch / "adapter", "--method", "lora", "-o", "r=2", "--target-modules", "proj"),
        ("push", scratch / "out", "me/token", *secret, "--revision", "other"),
        ("pull", "me/token", scratch / "pulled", *secret),
        ("decompress", "me/token", scratch / "plain", *secret),
        ("inspect", "org/private", *secret),
    )
    for arguments in working:
        done = bench.run(*arguments, environment=alone if TOKEN in arguments else debug)
        require(done.code == 0, f"{arguments[0]} failed: {done.stderr.strip()[-300:]}")
    hub.fail("/commit/", 403, times=-1)
    (scratch / "out" / "notes.txt").write_text("new", encoding="utf-8")
    failing: tuple[tuple[object, ...], ...] = (
        ("inspect", "org/missing", *secret),
        ("push", scratch / "out", "me/token", *secret),
    )
    for arguments in failing:
        require(bench.run(*arguments, environment=alone).code == 1, f"{arguments[0]} did not fail")
    used = sum(record.authorized for record in hub.log)
    require(used > 0, "no command used the token")
    texts = [*bench.said, *(record.line for record in hub.log)]
    files = [path for path in sorted(bench.scratch.rglob("*")) if path.is_file()]
    require({"README.md", "spectral_surgery.json", "stderr"} <= {path.name for path in files}, "a file is missing")
    count = sum(text.count(TOKEN) for text in texts) + sum(occurrences(path, TOKEN.encode()) for path in files)
    searched = sum(map(len, texts)) + sum(path.stat().st_size for path in files)
    moved = hub.moved
    hub.reset()
    what = "the access token in outputs, logs, cards, manifests, caches"
    return _row(what, searched, moved, f"found {count} times, sent {used} times", "found 0 times", met=count == 0)


def occurrences(path: Path, text: bytes) -> int:
    """How often a file holds a text, read piece by piece."""
    count, tail = 0, b""
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            data = tail + piece
            count += data.count(text)
            tail = data[-len(text) + 1 :]
    return count


def checkpoint(folder: Path, nbytes: int, shards: int) -> Path:
    """Write Gaussian matrices in bfloat16, a matrix per shard."""
    columns = 1000
    rows = -(-nbytes // (2 * columns * shards))

    def matrix(number: int) -> Entry:
        def chunks() -> Iterator[memoryview]:
            values = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(number))
            yield tensor_bytes(values.to(torch.bfloat16))

        return Entry(f"model.layers.{number}.proj.weight", "BF16", (rows, columns), chunks)

    folder.mkdir(parents=True)
    write_checkpoint(folder, [matrix(number) for number in range(shards)], max_shard_size=2 * rows * columns)
    (folder / "config.json").write_text('{"model_type": "llama"}\n', encoding="utf-8")
    return folder


def hollow(folder: Path, nbytes: int) -> Path:
    """Write a checkpoint of zeros that takes no room: its header, and a hole as long as its tensors."""
    side = 2048
    size = 2 * side * side
    count = -(-nbytes // size)
    header = {
        f"model.layers.{number}.proj.weight": {
            "dtype": "BF16",
            "shape": [side, side],
            "data_offsets": [number * size, (number + 1) * size],
        }
        for number in range(count)
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + count * size)
    (folder / "config.json").write_text('{"model_type": "llama"}\n', encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _stored_bytes(hub: LoopbackHub) -> int:
    paths = (hub.kept(sha) for sha in set(hub.stored))
    return sum(path.stat().st_size for path in paths if path is not None)


def _same(one: Path, other: Path) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        while piece := left.read(_PIECE):
            if right.read(_PIECE) != piece:
                return False
        return not right.read(1)


def _row(what: str, nbytes: int, moved: int, found: str, target: str, *, met: bool) -> Row:
    return {"what": what, "of MB": nbytes / 1e6, "MB moved": moved / 1e6, "found": found, "target": target, "met": met}

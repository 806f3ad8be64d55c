"""The documentation: blocks run, or are parsed; names and links exist; generated pages are up to date."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import spectral_surgery
from spectral_surgery import live
from tests.support.command import run
from tests.support.named_models import named_models

PACKAGE = Path(spectral_surgery.__file__).parent
ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md")))
NOT_RUN = "# not run: "  # the first line of a block that needs what a test has not; the reason follows
GENERATED = "cli.md"  # its blocks are examples of help texts, for folders that only stand for something
FILES = runpy.run_path(str(DOCS / "generate.py"))
PLAIN = {"json", "toml", "text", "{toctree}", "{eval-rst}"}  # blocks that are not run; Sphinx reads the last two

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_run(self) -> bool:
        return not self.text.startswith(NOT_RUN) and self.page.name != GENERATED


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text[: match.start()].count("\n") + 1, match[1], match[2])


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------------- shell commands


def shell_lines(block: Block) -> list[list[str]]:
    text = block.text.replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> None:
    """Refuse what is not a command of this project, or has options that the command does not know."""
    program, *rest = words
    if program == "spectral-surgery":
        parsed(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"make: no target {rest}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (package,) = (word for word in rest if word not in ("install", "-e"))
        name, _, asked = package.rstrip("]").partition("[")
        assert name in ("spectral-surgery", ".")
        assert not asked or set(asked.split(",")) <= set(extras), f"pip: no extra {asked}"
    elif program == "eval":
        check_command(shlex.split(rest[0].removeprefix("$(").removesuffix(")")))
    elif program == "python" and rest[0] == "-m":
        check_module(*rest[1:])
    elif program == "python" or "/" in program:
        assert (ROOT / (rest[0] if program == "python" else program)).is_file(), f"no file {words}"
    else:
        raise AssertionError(f"{program}: not a command of this project")


def parsed(words: list[str]) -> None:
    from spectral_surgery.cli import cli

    context = cli.make_context("spectral-surgery", list(words))
    name, command, rest = cli.resolve_command(context, [*context.protected_args, *context.args])
    assert command is not None
    command.make_context(name, rest, parent=context)


def check_module(module: str, *arguments: str) -> None:
    from benchmarks.__main__ import command as benchmarks
    from benchmarks.cases import CASES

    if module == "benchmarks":
        cases = benchmarks.make_context("benchmarks", list(arguments)).params["cases"]
        assert set(cases) <= set(CASES), f"benchmarks: {arguments}"
    else:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"no module {module}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    for block in blocks(page):
        assert block.language in {"python", "bash", *PLAIN}, f"{block.where}: {block.language}"
        for words in shell_lines(block) if block.language == "bash" else ():
            try:
                check_command(words)
            except (click.ClickException, AssertionError) as error:
                pytest.fail(f"{block.where}: {' '.join(words)}: {error}")
    for span in re.findall(r"`((?:spectral-surgery|make|python) [^`]+)`", prose(page)):
        words = shlex.split(span)
        if words[0] == "spectral-surgery":
            assert words[1] in dict(commands()) or words[1] == "COMMAND", span
        elif page.name != GENERATED:
            check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "spectral-surgery compres MODEL OUT --bits 4",
        "spectral-surgery compress MODEL OUT --bit 4",
        "spectral-surgery compress MODEL OUT --bits four",
        "spectral-surgery compress MODEL",
        "spectral-surgery train --init fftnet OUT --data FILE --no-such-option",
        "make nothing",
        'pip install "spectral-surgery[nothing]"',
        "python -m benchmarks nothing",
        "python -m benchmarks rate --no-such-option",
        "python examples/nothing.py",
        "docs/nothing.sh",
        "rm x",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((click.ClickException, AssertionError)):
        check_command(shlex.split(line))


# ------------------------------------------------------------------------------------------------------ running pages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named_models(tmp_path_factory.mktemp("docs"))


def ran(page: Path, folder: Path, models: Path) -> dict[str, Any]:
    """Everything that the blocks of a page define, run in their order."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    if page.parent == ROOT:  # the README makes it itself
        shutil.rmtree(folder / "model-4bit")
    names: dict[str, Any] = {}
    for block in blocks(page):
        if not block.is_run:
            continue
        for words in shell_lines(block) if block.language == "bash" else ():
            if words[0] == "spectral-surgery":
                done = run(*words[1:], env={"HF_HUB_OFFLINE": "1"})
                assert done.returncode == 0, f"{block.where}: {' '.join(words)}\n{done.stderr}"
        if block.language == "python":
            exec(compile(block.text, block.where, "exec"), names)
    return names


WITH_BLOCKS = [page for page in PAGES if any(b.is_run and b.language in ("python", "bash") for b in blocks(page))]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page is many commands, each of which loads a model
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_every_block_runs(page: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ran(page, tmp_path, models)
    if page.name == "format.md":
        the_page_reads_what_the_package_writes(names)


def the_page_reads_what_the_package_writes(names: dict[str, Any]) -> None:
    """The frames themselves are tests/codec/test_format.py's."""
    import numpy as np

    checkpoint = spectral_surgery.open_compressed(names["folder"])
    parts = [checkpoint.part(names["name"], part).to_dense() for part in range(len(names["parts"]))]
    written = np.concatenate([part.numpy() for part in parts]).reshape(names["record"]["shape"])
    np.testing.assert_allclose(names["weights"], written, rtol=1e-4, atol=1e-6 * np.abs(written).max())


def test_a_block_that_fails_is_found(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.chdir(tmp_path)
    page.write_text("```python\nassert False\n```\n")
    with pytest.raises(AssertionError):
        ran(page, tmp_path, models)
    page.write_text("```bash\nspectral-surgery compress MODEL model-4bit --bits 4\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:1: .*\n.*expected a new or empty folder"):
        ran(page, tmp_path, models)
    page.write_text("```python\n# not run: a reason\nassert False\n```\n")
    ran(page, tmp_path, models)


# ----------------------------------------------------------------------------------- names, links and generated pages


@pytest.mark.parametrize("file", FILES["FILES"])
def test_generated_pages_are_up_to_date(file: str) -> None:
    written = FILES["FILES"][file]()
    assert (DOCS / file).read_text(encoding="utf-8") == written, f"docs/{file}: run python docs/generate.py"


def test_the_picture_follows_the_imports(tmp_path: Path) -> None:
    package = tmp_path / "package"
    for room in "abc":
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
    (package / "a" / "__init__.py").write_text("from package.b import x\nimport package.c.y\n")
    rooms, needed, floors = (FILES[name] for name in ("rooms", "needed", "floors"))
    assert floors(rooms(package)) == {FILES["COMMON"]: 0, "a": 1, "b": 0, "c": 0}
    before = FILES["picture"](rooms(package))
    (package / "b" / "__init__.py").write_text("def f():\n    from package.c import z\n")
    assert needed(rooms(package))["a"] == {"b"}  # c is below b now
    assert FILES["picture"](rooms(package)) != before


def commands() -> list[tuple[str, click.Command]]:
    from spectral_surgery.cli import cli

    context = click.Context(cli)
    names = cli.list_commands(context)
    return [(name, command) for name in names if (command := cli.get_command(context, name))]


def test_every_command_has_an_example_and_a_place() -> None:
    page = (DOCS / GENERATED).read_text(encoding="utf-8")
    for name, command in commands():
        assert f"spectral-surgery {name}" in (command.help or ""), f"{name}: no example in its help"
        assert f"\n## {name}\n" in page, f"{name}: not in docs/{GENERATED}"


def test_every_public_name_is_on_its_page() -> None:
    listed: dict[str, set[str]] = {}
    module = ""
    for line in (DOCS / "python-api.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = match[1]
        elif match := re.match(r"\.\. auto\w+:: (\w+)", line):
            listed.setdefault(module, set()).add(match[1])
    assert listed == {
        "spectral_surgery": set(spectral_surgery.__all__) - {"live"},
        "spectral_surgery.live": set(live.__all__),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_their_names_exist(page: Path) -> None:
    """Of `room/file.py` and `room/file.py:name` in a page, from the root or within the package."""
    for file, name in re.findall(r"`([\w/]+\.(?:py|sh|ipynb))(?::(\w+))?`", prose(page)):
        path = next((path for path in (ROOT / file, PACKAGE / file) if path.is_file()), None)
        assert path or file == "shim_spectral_surgery.py", f"{page.name}: no file {file}"
        if path and name:
            assert name in defined(path), f"{page.name}: no {name} in {file}"


def defined(path: Path) -> set[str]:
    """Functions, classes and constants of a module."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return {getattr(node, "name", "") for node in body} | {ast.unparse(target) for target in targets}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("word", ["bits_per_weight", "compression_ratio", "relative_error"])
def test_the_readme_explains_the_figures(word: str) -> None:
    assert word in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def undocumented(node: ast.AST, where: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            overload = any(ast.unparse(decorator) == "overload" for decorator in child.decorator_list)
            if not overload and not ast.get_docstring(child):
                yield f"{where}:{child.lineno} {child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, where)


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            missing.append(str(path))
        missing += undocumented(tree, str(path.relative_to(PACKAGE)))
    assert not missing, "\n".join(missing)

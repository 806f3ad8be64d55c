"""Every public name is documented, every command has an example and is in the README."""

from __future__ import annotations

import ast
from pathlib import Path

import click
import pytest

import spectral_surgery

PACKAGE = Path(spectral_surgery.__file__).parent
README = PACKAGE.parent / "README.md"


def undocumented(node: ast.AST, where: str) -> list[str]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            overload = any(ast.unparse(decorator) == "overload" for decorator in child.decorator_list)
            if not overload and not ast.get_docstring(child):
                found.append(f"{where}:{child.lineno} {child.name}")
            if isinstance(child, ast.ClassDef):
                found += undocumented(child, where)
    return found


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            missing.append(str(path))
        missing += undocumented(tree, str(path.relative_to(PACKAGE)))
    assert not missing, "\n".join(missing)


def commands() -> list[tuple[str, click.Command]]:
    from spectral_surgery.cli import cli

    context = click.Context(cli)
    names = cli.list_commands(context)
    return [(name, command) for name in names if (command := cli.get_command(context, name))]


def test_every_command_has_an_example_and_is_in_the_readme() -> None:
    readme = README.read_text(encoding="utf-8")
    for name, command in commands():
        assert f"spectral-surgery {name}" in (command.help or ""), f"{name}: no example in its help"
        assert f"spectral-surgery {name}" in readme, f"{name}: not in the README"


@pytest.mark.parametrize("word", ["bits_per_weight", "compression_ratio", "relative_error"])
def test_the_readme_explains_the_figures(word: str) -> None:
    assert word in README.read_text(encoding="utf-8")

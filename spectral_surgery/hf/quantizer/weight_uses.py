"""What the forward of a class does with a parameter, read from its source.

A weight that is only multiplied by, looked up in or asked for its shape can stay a spectrum. It would give the right
numbers anyhow (see `lazy_weight`); what else is done with it would decode it at every step, and such a weight is
better held dense. So whatever cannot be read counts as something else.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "embedding"}
_VIEWS = {"t", "transpose", "permute", "view", "reshape", "unsqueeze", "chunk", "split", "unbind"}
_ASKED = {"dtype", "device", "shape", "ndim", "size", "dim", "requires_grad"}


@cache
def only_multiplies(cls: type[nn.Module], leaf: str) -> bool:
    """Whether a weight is used by its class alone, and for nothing but products, look-ups of rows and its shape."""
    used, waiting, seen = False, [("forward", cls)], set()
    while waiting:
        name, start = waiting.pop()
        owner = _owner(start, cls, name)
        if owner is None or (name, owner) in seen:
            continue
        seen.add((name, owner))
        if owner.__module__.startswith("torch.nn."):  # the forward of nn.Linear or nn.Embedding, for which ours stands
            used = used or (owner in (nn.Linear, nn.Embedding) and name == "forward" and leaf == "weight")
            continue
        method = _Method.read(getattr(owner, name))
        if method is None or not all(method.fine(use, rows=issubclass(cls, nn.Embedding)) for use in method.uses(leaf)):
            return False
        used = used or bool(method.uses(leaf))
        waiting += [(called, cls) for called in method.calls("self")]
        waiting += [(called, cls.__mro__[cls.__mro__.index(owner) + 1]) for called in method.calls("super")]
    return used


def _owner(start: type, cls: type, name: str) -> type | None:
    """The class whose method of a name is called, looked for from a class on, in the order of another."""
    order = cls.__mro__
    return next((cls for cls in order[order.index(start) :] if inspect.isfunction(vars(cls).get(name))), None)


class _Method:
    """The source of a method as a tree that knows its parents."""

    def __init__(self, tree: ast.FunctionDef) -> None:
        self._tree = tree
        self._parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._me = tree.args.args[0].arg if tree.args.args else ""
        self._followed: set[str] = set()  # names; one may be assigned from itself, or from one that it was assigned to

    @classmethod
    def read(cls, method: object) -> _Method | None:
        """None where there is no source."""
        try:
            text = inspect.getsource(inspect.unwrap(method))  # type: ignore[arg-type]  # a function
            tree = ast.parse(textwrap.dedent(text)).body[0]
        except (OSError, TypeError, SyntaxError):
            return None
        return cls(tree) if isinstance(tree, ast.FunctionDef) else None

    def uses(self, leaf: str) -> list[ast.expr]:
        """Where a parameter of the module is read or written."""
        return [
            node
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Attribute) and node.attr == leaf and self._is_me(node.value)
        ]

    def calls(self, of: str) -> Iterator[str]:
        """Names of methods that are called of the module itself, or of its ``super()``."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and isinstance(self._parents[node], ast.Call):
                above = isinstance(node.value, ast.Call) and _name(node.value.func) == "super"
                if above if of == "super" else self._is_me(node.value):
                    yield node.attr

    def _is_me(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self._me

    def fine(self, node: ast.expr, *, rows: bool) -> bool:
        """Whether a value is only multiplied by; or, where rows may be taken, looked up in."""
        parent = self._parents[node]
        if isinstance(parent, ast.keyword):
            parent = self._parents[parent]
        if isinstance(parent, ast.Attribute):
            return self._fine_attribute(parent, rows=rows)
        if isinstance(parent, ast.Subscript) and parent.value is node:
            return rows or self.fine(parent, rows=rows)
        if isinstance(parent, ast.Call):
            return node is not parent.func and _name(parent.func) in _PRODUCTS
        if isinstance(parent, ast.Assign):
            return all(self._fine_target(target, rows=rows) for target in parent.targets)
        if isinstance(parent, ast.Compare):
            return all(isinstance(operator, ast.Is | ast.IsNot) for operator in parent.ops)
        return isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult)

    def _fine_attribute(self, node: ast.Attribute, *, rows: bool) -> bool:
        if node.attr in _ASKED:
            return True
        if node.attr in ("T", "mT"):
            return self.fine(node, rows=rows)
        call = self._parents[node]
        if not isinstance(call, ast.Call) or call.func is not node:
            return False
        return node.attr in _PRODUCTS or (node.attr in _VIEWS and self.fine(call, rows=rows))

    def _fine_target(self, target: ast.expr, *, rows: bool) -> bool:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        ids = {name.id for name in names if isinstance(name, ast.Name)}
        new = ids - self._followed
        self._followed |= new
        reads = [
            node
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Name) and node.id in new and isinstance(node.ctx, ast.Load)
        ]
        return len(ids) == len(names) and all(self.fine(node, rows=rows) for node in reads)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")

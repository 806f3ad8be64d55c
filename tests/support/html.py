"""HTML as a test reads it: a tree that is checked for balance, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, *tags: str, kind: str | None = None) -> Iterator[Node]:
        """Nodes of these tags, at any depth, in order; of a class, where it is given."""
        for child in self.children:
            if isinstance(child, Node):
                if child.tag in tags and (kind is None or kind in (child.attributes.get("class") or "").split()):
                    yield child
                yield from child.all(*tags, kind=kind)

    def one(self, *tags: str, kind: str | None = None) -> Node:
        (found,) = self.all(*tags, kind=kind)
        return found


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    """The tree of a page whose tags are all closed."""
    tree = _Tree()
    tree.feed(page)
    tree.close()
    assert tree.open == [tree.root]
    return tree.root


def facts(node: Node) -> dict[str, str]:
    """Names and values of all lists of definitions in a node."""
    return {row.one("dt").text: row.one("dd").text for part in node.all("dl") for row in part.all("div")}


def rows(node: Node, title: str) -> list[dict[str, str]]:
    """A table by its heading: for each row, what each column sorts by."""
    (table,) = [own for own in node.all("table") if own.one("caption").text.rpartition(" ")[0] == title]
    columns = [head.text for head in table.one("thead").all("th")]
    body = [[cell.attributes["data-value"] or "" for cell in row.all("td")] for row in table.one("tbody").all("tr")]
    return [dict(zip(columns, row, strict=True)) for row in body]


def tips(node: Node, kind: str) -> list[str]:
    """What pointing at the shapes of a class says, in the drawing for wide windows."""
    wide = list(node.all("svg", kind="wide"))
    return [shape.one("title").text for svg in wide for shape in svg.all("rect", "circle", kind=kind)]

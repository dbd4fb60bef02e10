"""Finds what a chat template reads: variables, and fields of messages.

It imports nothing of dgemma: the process that renders templates loads it by its path.

The analysis follows the variable `messages` through loops, slices, filters, assignments and macros. So a field of a
tool, or a word in the template's text, is not taken for a field of a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes

WHOLE_MESSAGE = "*"  # stands for all fields: messages are written whole, as JSON for example
ELEMENT_FILTERS = {
    *("first", "last", "list", "reverse", "sort", "unique", "batch", "slice", "random", "default", "d"),
    *("select", "reject", "selectattr", "rejectattr", "groupby"),
}  # filters that return messages, or lists of them
# Filters that read the field which their argument names.
FIELD_FILTERS = {"selectattr", "rejectattr", "map", "groupby", "sort", "sum", "join", "unique", "attr"}
# Filters that write all fields of a message.
WHOLE_FILTERS = {"tojson", "string", "items", "dictsort", "pprint", "xmlattr"}
LOOP_NEIGHBOURS = {"previtem", "nextitem"}
METHODS = {"get", "items", "values", "keys", "copy"}


def reads(tree: nodes.Template) -> dict[str, list[str]]:
    """Return {"fields": the fields of messages, "names": the variables} that a parsed template reads."""
    held = _MessageVariables(tree)
    names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    return {"fields": sorted(held.fields()), "names": sorted(names)}


class _MessageVariables:
    """The names of variables that hold messages; a name that holds them once is assumed to hold them everywhere."""

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._names, before = {"messages"}, 0
        while len(self._names) > before:
            before = len(self._names)
            for name, value in self._assignments():
                if self._is_messages(value):
                    self._names.add(name)

    def fields(self) -> set[str]:
        return {field for node in self._tree.find_all(nodes.Node) for field in self._read_by(node)}

    def _assignments(self) -> Iterator[tuple[str, nodes.Node]]:
        """Yield each assigned name with its value; an attribute of a namespace is NAME.ATTRIBUTE."""
        macros = {macro.name: [each.name for each in macro.args] for macro in self._tree.find_all(nodes.Macro)}
        for node in self._tree.find_all((nodes.For, nodes.Assign, nodes.With, nodes.Call)):
            if isinstance(node, nodes.For):
                yield from _pairs(node.target, node.iter)
            elif isinstance(node, nodes.Assign):
                yield from _pairs(node.target, node.node)
                if isinstance(node.node, nodes.Call) and isinstance(node.target, nodes.Name):
                    yield from ((f"{node.target.name}.{each.key}", each.value) for each in node.node.kwargs)
            elif isinstance(node, nodes.With):
                for target, value in zip(node.targets, node.values, strict=True):
                    yield from _pairs(target, value)
            elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in macros:
                yield from zip(macros[node.node.name], node.args, strict=False)
                yield from ((each.key, each.value) for each in node.kwargs)

    def _is_messages(self, node: Any) -> bool:
        """Return whether an expression is a list of messages, or one message."""
        if isinstance(node, nodes.Name):
            return node.name in self._names
        if isinstance(node, nodes.Getattr):
            return _dotted(node) in self._names or node.attr in LOOP_NEIGHBOURS
        if isinstance(node, nodes.Getitem):
            return self._is_messages(node.node) and _text(node.arg) is None
        if isinstance(node, nodes.Filter):
            return node.name in ELEMENT_FILTERS and self._is_messages(node.node)
        if isinstance(node, nodes.CondExpr):
            return self._is_messages(node.expr1) or self._is_messages(node.expr2)
        if isinstance(node, nodes.BinExpr):
            return self._is_messages(node.left) or self._is_messages(node.right)
        if isinstance(node, nodes.List | nodes.Tuple):
            return any(map(self._is_messages, node.items))
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
            return node.node.name == "dict" and any(map(self._is_messages, node.args))
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            return node.node.attr in ("copy", "pop") and self._is_messages(node.node.node)
        return False

    def _read_by(self, node: nodes.Node) -> Iterator[str]:
        """Yield the fields of messages that one expression reads."""
        if isinstance(node, nodes.Getattr) and self._is_messages(node.node) and node.attr not in METHODS:
            yield node.attr
        elif isinstance(node, nodes.Getitem) and self._is_messages(node.node) and (name := _text(node.arg)) is not None:
            yield name
        elif isinstance(node, nodes.Filter) and self._is_messages(node.node):
            if node.name in WHOLE_FILTERS:
                yield WHOLE_MESSAGE
            if node.name in FIELD_FILTERS:
                named = [each.value for each in node.kwargs if each.key == "attribute"]
                yield from (path.split(".")[0] for each in [*node.args[:1], *named] if (path := _text(each)))
        elif (
            isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and self._is_messages(node.node.node)
        ):
            if node.node.attr in ("items", "values"):
                yield WHOLE_MESSAGE
            if node.node.attr == "get" and node.args and (name := _text(node.args[0])) is not None:
                yield name
        elif isinstance(node, nodes.Output) and any(map(self._is_messages, node.nodes)):
            yield WHOLE_MESSAGE


def _pairs(target: nodes.Node, value: nodes.Node) -> Iterator[tuple[str, nodes.Node]]:
    if isinstance(target, nodes.Tuple):
        if isinstance(value, nodes.Tuple | nodes.List):  # a, b = x, y
            for each, one in zip(target.items, value.items, strict=False):
                yield from _pairs(each, one)
        else:  # the result of groupby: each item is (value, messages)
            for each in target.items[1:]:
                yield from _pairs(each, value)
    elif isinstance(target, nodes.Name):
        yield target.name, value
    elif isinstance(target, nodes.NSRef):
        yield f"{target.name}.{target.attr}", value


def _dotted(node: nodes.Getattr) -> str | None:
    return f"{node.node.name}.{node.attr}" if isinstance(node.node, nodes.Name) else None


def _text(node: Any) -> str | None:
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None

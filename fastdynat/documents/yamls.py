"""YAML for configuration files: a safe loader without surprises and with limits.

It differs from YAML 1.1: ``no``, ``off``, dates, ``010`` and ``1:30`` are text, and a key may occur only
once. The type of a key decides whether its text is a switch or a number."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from fastdynat.documents.files import KIB, DocumentError, read_text, short_repr

LIMIT = 256 * KIB  # bytes of a file; a full configuration has 4 KiB
DEPTH, NODES = 16, 20_000
_TAG = "tag:yaml.org,2002:"
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)")
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits: nesting, nodes with aliases counted in full, one value per key."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it as an instance variable)
        first: [(tag, pattern) for tag, pattern in rules if tag in (f"{_TAG}null", f"{_TAG}merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._nodes = 0, 0
        self._sizes: dict[int, int] = {}  # nodes under each collection that is complete, by id

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        mark = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        before, self._depth = self._nodes, self._depth + 1
        self._nodes += 1
        if self._depth > DEPTH:
            raise ConstructorError(None, None, f"nested more than {DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            raise ConstructorError(None, None, "an alias stands inside of what it is an alias of", mark)
        if alias:
            self._nodes += self._sizes[id(node)]
        if self._nodes > NODES:
            raise ConstructorError(None, None, f"more than {NODES} values, aliases counted in full", mark)
        self._depth -= 1
        self._sizes.setdefault(id(node), self._nodes - before)
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a key must be a name", key.start_mark)
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                where = f"on lines {lines[name]} and {line}" if lines[name] != line else "on one line"
                raise ConstructorError(
                    None, None, f"{short_repr(key.value)} is given twice, {where}", key.start_mark
                )
            lines[name] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, RecursionError):
            tag = str(node.tag).replace(_TAG, "!!")
            raise ConstructorError(None, None, f"this is no {tag}", node.start_mark) from None


for _name, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern.pattern})$"), list(_first))


def read_yaml_value(path: Path, *, remedy: str = "") -> Any:
    """The plain value in the YAML file, or pipe, at `path`.

    Raises:
        DocumentError: it cannot be read, is not YAML, or goes beyond a limit.
    """
    return parse_yaml(read_text(path, limit=LIMIT, remedy=remedy, stream=True), origin=str(path))


def parse_yaml(text: str, *, origin: str) -> Any:
    """The plain value of the YAML `text`, which messages call `origin`. Raises DocumentError."""
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise DocumentError(f"{origin} is not valid YAML: {error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise DocumentError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise DocumentError(f"{origin} is not valid YAML: nested too deep") from None

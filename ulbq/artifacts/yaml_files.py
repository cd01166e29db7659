"""YAML of strangers: bounded in size, depth and in what its aliases come to when they are written out."""

from collections import Counter

import yaml

from ulbq import limits
from ulbq.printable import one_line

_BAD_VALUES = (ValueError, OverflowError, TypeError, RecursionError)


def parse_yaml(text: str, keys: frozenset[str] | None = None) -> object:
    """The value of a YAML document, of plain values, lists and maps, in which no key stands twice.

    Args:
        text: the document.
        keys: of a map at the top, build the values of these alone; what the others hold need not even have a value,
            and of one that stands twice the last counts.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: it is too large or too deep, names a key twice, or has a value that does not exist, the 30th of
            February for one.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if keys is not None and isinstance(node, yaml.MappingNode):
            node.value = [*{key.value: (key, value) for key, value in node.value if key.value in keys}.values()]
        if _size(node, {}, limits.YAML_DEPTH) > limits.YAML_NODES:
            raise ValueError("it is too large with its aliases written out")
        built: object = loader.construct_document(node)
        return built
    except yaml.YAMLError:
        raise
    except _BAD_VALUES as error:
        deep = isinstance(error, RecursionError)
        raise ValueError("it is nested too deeply" if deep else one_line(str(error))) from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many nodes a document has with its aliases written out; an alias for what it stands in has no end."""
    if depth == 0:
        raise ValueError("it is nested too deeply")
    if id(node) not in known:
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > limits.YAML_SCALAR:
                raise ValueError("one of its values is too long")
            parts: list[yaml.Node] = []
        elif isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"it has '{one_line(twice[0])}' twice")
            parts = [part for pair in node.value for part in pair]
        else:
            parts = list(node.value)
        known[id(node)] = 1 + sum(_size(part, known, depth - 1) for part in parts)
    return known[id(node)]

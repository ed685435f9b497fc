"""YAML as people write it: a key given twice is an error with its line, and `1e4` is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pe_swap.errors import ConfigError

FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""Floats with an exponent, as in YAML 1.2. YAML 1.1, which PyYAML reads, takes `1e4` and `1e-4` for text."""


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key given twice; PyYAML itself keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping whose keys differ.

        Raises:
            MarkedYAMLError: a key is given twice.
        """
        given = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in given:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
            given.add(key.value)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the content of a YAML (or JSON) file.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or not a mapping.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration '{path}': {error.strerror}. Give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not YAML that can be read: {explain(error)}. Correct the file.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' holds {type(content).__name__}, where a mapping of keys to values was expected.")
    return content


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        YAMLError: it is not YAML, or a key is given twice.
    """
    return yaml.load(text, StrictLoader)  # derived from the safe loader


def explain(error: Exception) -> str:
    """Return a YAML error in one line, with the line in the file."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return str(error) if mark is None or problem is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"

"""The command line of the scripts: `--config file.yaml` and `--section.key value`, for any section of `config.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel

from pe_swap.errors import ConfigError, PESwapError
from pe_swap.runs.config import SOURCES, ConfigType, build, read_yaml, section_of


def parse(config_class: type[ConfigType], arguments: Sequence[str], *, description: str) -> ConfigType:
    """Build a configuration from `--config file.yaml` and overrides `--section.key value`, which win.

    Values are read as YAML: `--lengths 512 1024` is a list, `--train.bf16 true` a boolean; where text is expected (a path, a name)
    they are taken as they are. `--scheme.<option>` takes any option of the scheme; `--scheme.name` with another name than the file's
    drops the options that the file gives its own.

    Raises:
        ConfigError: unknown keys or values that break their rules.
        SystemExit: `--help`, with status 0.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, add_help=True)
    parser.add_argument("--config", help="a YAML file; what follows overrides it")
    _add_arguments(parser, config_class, "")
    parser.exit_on_error = False
    parser.error = _raise_config_error  # type: ignore[method-assign]  # a ConfigError instead of a usage dump
    known, unknown = parser.parse_known_args(list(arguments))
    given = {key: value for key, value in vars(known).items() if value is not None and key != "config"}
    for key, texts in given.items():
        if not texts and not _is_list(config_class, key) and bool not in _leaf_types(_annotation(config_class, key)):
            raise ConfigError(f"--{key} has no value. Write one behind it (--{key} VALUE), or leave it out; see --help.")
    values = read_yaml(known.config) if known.config else {}
    if (
        "scheme.name" in given
        and isinstance(values.get("scheme"), dict)
        and values["scheme"].get("name") != given["scheme.name"][0]
    ):
        values["scheme"] = {}  # the file's options belong to the file's scheme
    if any(f"data.{source}" in given for source in SOURCES) and isinstance(values.get("data"), dict):
        values["data"] = {key: value for key, value in values["data"].items() if key not in (*SOURCES, "dataset_config")}
    for key, texts in {**given, **_words(unknown)}.items():
        _assign(values, key.split("."), _parsed(texts, _is_list(config_class, key), _leaf_types(_annotation(config_class, key))))
    return build(config_class, values)


def _raise_config_error(message: str) -> NoReturn:
    raise ConfigError(f"{message[:1].upper()}{message[1:]}. See --help.")


def _add_arguments(parser: argparse.ArgumentParser, section: Any, prefix: str) -> None:
    """Add an argument for every leaf of a section."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            _add_arguments(parser, inner, f"{prefix}{name}.")
        else:
            shown = "" if field.is_required() else f" (default: {field.default})"
            help_text = (field.description or name) + shown
            parser.add_argument(
                f"--{prefix}{name}", dest=f"{prefix}{name}", nargs="*", metavar="VALUE", help=help_text.replace("%", "%%")
            )


def free_options(arguments: list[str]) -> dict[str, Any]:
    """Return `--option value...` as plain values, read as YAML.

    Raises:
        ConfigError: a word that belongs to no option.
    """
    return {key: _parsed(texts, False, set()) for key, texts in _words(arguments).items()}


def _words(arguments: list[str]) -> dict[str, list[str]]:
    """Return `--scheme.<option> value...` and anything else that looks like a key; unknown keys fail in `build`."""
    found: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            key, _, value = argument[2:].partition("=")
            found[key] = [value] if value else []
        elif found:
            found[list(found)[-1]].append(argument)
        else:
            raise ConfigError(f"Unexpected argument {argument!r}. Arguments are --key value; see --help.")
    return found


def _annotation(config_class: Any, key: str) -> Any:
    """Return the type of a key's value, or None where no section has the key."""
    annotation = config_class
    for part in key.split("."):
        field = getattr(section_of(annotation), "model_fields", {}).get(part)
        if field is None:
            return None
        annotation = field.annotation
    return annotation


def _is_list(config_class: Any, key: str) -> bool:
    """Tell whether a key holds a list."""
    annotation = _annotation(config_class, key)
    return any(get_origin(part) in (list, tuple) for part in (annotation, *get_args(annotation)))


def _leaf_types(annotation: Any) -> set[Any]:
    """Return the plain types that a value, or the entries of a list or mapping, may have."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) is Annotated:
        return _leaf_types(get_args(annotation)[0])
    return set().union(*map(_leaf_types, get_args(annotation))) if get_args(annotation) else {annotation}


def _parsed(texts: Any, is_list: bool, types: set[Any]) -> Any:
    """Read the words after a key: as they are where text is expected, else as YAML. A key alone is a switch turned on."""
    if not texts:
        return [] if is_list else True
    values = [text if _is_text(text, types) else _scalar(text) for text in texts]
    return values if is_list or len(values) > 1 else values[0]


def _is_text(text: str, types: set[Any]) -> bool:
    """Tell whether a word is text by the types its key takes; where it may be a mapping too, a brace begins one."""
    return str in types and (types <= {str, NoneType} or not text.startswith("{"))


def _scalar(text: str) -> Any:
    """Read one word as YAML; YAML 1.1 takes '1e-4' for text, people do not."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except (yaml.YAMLError, ValueError):
        return text


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested key."""
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = values[part] = {}
        values = inner
    values[path[-1]] = value


def run(main: Callable[[Sequence[str]], object], arguments: Sequence[str] | None = None) -> int:
    """Call a script's `main`; an error of ours is one message and status 2, not a traceback."""
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except PESwapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

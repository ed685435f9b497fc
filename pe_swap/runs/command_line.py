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
from pe_swap.runs.config import KEYS_OF_SOURCE, SOURCES, ConfigType, Layers, build, section_of
from pe_swap.runs.files import DISK_ERRORS, disk_error
from pe_swap.runs.progress import show_bars_on_terminals_only
from pe_swap.runs.yaml_reader import explain, parse_yaml, read_yaml


def parse(config_class: type[ConfigType], arguments: Sequence[str], *, description: str) -> ConfigType:
    """Build a configuration from `--config file.yaml` and overrides `--section.key value`, which win.

    Values are read as YAML: `--lengths 512 1024` is a list, `--train.bf16 true` a boolean; where text is expected (a path, a name)
    they are taken as they are. `null` takes a value of the file back where a key may be without one. `--scheme.<option>` takes any
    option of the scheme; `--scheme.name` with another name than the file's drops the options that the file gives its own.

    Raises:
        ConfigError: unknown keys or values that break their rules.
        SystemExit: `--help`, with status 0.
    """
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config FILE] [--key value ...]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file; the other arguments override it")
    _add_arguments(parser, config_class, "")
    parser.exit_on_error = False
    parser.error = _raise_config_error  # type: ignore[method-assign]  # a ConfigError instead of a usage dump
    known, unknown = parser.parse_known_args(list(arguments))
    words: dict[str, list[str]] = vars(known)
    path = words.pop("config", None)
    values = read_yaml(str(path)) if path else {}
    given = {key: _value(config_class, key, texts) for key, texts in words.items()}
    _drop_what_is_replaced(values, given)
    for key, value in {**given, **free_options(unknown)}.items():
        _assign(values, key.split("."), value)
    return build(config_class, values)


def _value(config_class: Any, key: str, texts: list[str]) -> Any:
    """Return the value of a known key.

    Raises:
        ConfigError: the key needs a value and has none.
    """
    annotation, is_list = _annotation(config_class, key), _is_list(config_class, key)
    types = _leaf_types(annotation) if Layers not in get_args(annotation) else {int}
    if not texts and not is_list and bool not in types:
        raise ConfigError(f"--{key} has no value. Write one after it (--{key} VALUE), or leave it out; see --help.")
    if texts == ["null"] and NoneType in get_args(annotation):
        return None
    if (
        is_list
        and len(texts) == 1
        and Layers in get_args(annotation)
        and texts[0][:1].isalpha()
        and isinstance(_scalar(texts[0]), str)
    ):
        return texts[0]
    return _parsed(texts, is_list, types)


def _drop_what_is_replaced(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Take out of a file's values what another scheme, or another source of text, on the command line makes meaningless."""
    scheme, data = values.get("scheme"), values.get("data")
    if "scheme.name" in given and isinstance(scheme, dict) and scheme.get("name") != given["scheme.name"]:
        values["scheme"] = {}
    sources = [source for source in SOURCES if given.get(f"data.{source}")]
    if sources and isinstance(data, dict):
        others = [key for source in SOURCES if source not in sources for key in KEYS_OF_SOURCE[source]]
        values["data"] = {key: value for key, value in data.items() if key not in (*SOURCES, "dataset_config", *others)}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's help, with `VALUE` after a key that takes one value and `VALUE ...` after a list."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if action.nargs == "*" else super()._format_args(action, default_metavar)


def _raise_config_error(message: str) -> NoReturn:
    raise ConfigError(f"{message[:1].upper()}{message[1:]}. See --help.")


def _add_arguments(parser: argparse.ArgumentParser, section: Any, prefix: str) -> None:
    """Add an argument for every leaf of a section."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            _add_arguments(parser, inner, f"{prefix}{name}.")
            continue
        shown = "" if field.is_required() else f" (default: {_shown(field.default)})"
        types = _leaf_types(field.annotation) - {NoneType}
        metavar = "true|false" if types == {bool} else "VALUE ..." if _is_list(section, name) else "VALUE"
        parser.add_argument(
            f"--{prefix}{name}",
            dest=f"{prefix}{name}",
            nargs="*",
            metavar=metavar,
            help=((field.description or name) + shown).replace("%", "%%"),
        )


def _shown(default: Any) -> str:
    """Return a default as it would be written on the command line."""
    if isinstance(default, list | tuple):
        return " ".join(map(_shown, default)) or "none"
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return str(default)


def free_options(arguments: list[str]) -> dict[str, Any]:
    """Return `--option value...` as plain values, read as YAML.

    Raises:
        ConfigError: a word that belongs to no option.
    """
    return {key: _parsed(texts, False, set()) for key, texts in _words(arguments).items()}


def _words(arguments: list[str]) -> dict[str, list[str]]:
    """Return `--scheme.<option> value...` and everything else that has the form of a key; `build` refuses unknown keys."""
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
    return any(get_origin(part) in (list, tuple) or part is Layers for part in (annotation, *get_args(annotation)))


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
    """Read one word as YAML.

    Raises:
        ConfigError: it begins as a mapping or a list and is not one.
    """
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        if text[:1] in "{[":
            raise ConfigError(f"{text!r} is not YAML that can be read: {explain(error)}. Correct it.") from error
        return text


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested key. Sections on the way are copied: a YAML file may have one under two names (`train: *base`)."""
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, dict) else {}
        values = values[part]
    values[path[-1]] = value


def run(main: Callable[[Sequence[str]], object], arguments: Sequence[str] | None = None) -> int:
    """Call a script's `main`; an error of ours, or of a disk, is one message and status 2, not a traceback."""
    show_bars_on_terminals_only()
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except PESwapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {disk_error(error)}", file=sys.stderr)
        return 2
    return 0

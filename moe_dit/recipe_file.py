"""Reading recipes: a YAML file and --set, into :class:`moe_dit.recipe.Recipe`, or one line that says what is wrong."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from moe_dit.models import FAMILIES
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import parse_yaml, read_yaml
from moe_dit.runtime.wording import shortened

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "dsmoe_s_e16"


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name, or from a YAML file.

    Args:
        name_or_file: a name of :func:`names`, or a path that ends in .yaml or .yml.
        overrides: "section.key=value" strings, the value in YAML (--set).

    Raises:
        InputError: no such recipe, or a key or value that is wrong; names the key, the file and the valid choice.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_file}.yaml"
        if not os.path.exists(path):
            near = difflib.get_close_matches(name_or_file, names(), 1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names())}, or give a .yaml file"
            raise InputError(f"no recipe named {shortened(repr(name_or_file))}; {hint}")
    return parse_recipe(_read_yaml(path), str(name_or_file), overrides)


def parse_recipe(values: Any, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check plain values against the schema; ``source`` names them in errors (see :func:`load_recipe`)."""
    if not isinstance(values, dict):
        raise InputError(f"recipe {source} should be a mapping of keys to values, see {RECIPES / DEFAULT_RECIPE}.yaml")
    sources: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(
                f"--set {shortened(override)}: expected section.key=value, for example --set optimizer.lr=1e-4"
            )
        _set(values, key.strip().split("."), _parse_value(text, override), override)
        sources[key.strip()] = f"--set {shortened(override)}"
    try:
        values = _floats(values)
        recipe = TypeAdapter(Recipe).validate_python(values)
    except RecursionError:  # a YAML anchor inside itself
        raise InputError(f"recipe {source} nests without end") from None
    except ValidationError as error:
        raise InputError(_explain(error, values, source, sources)) from None
    for key, message in recipe.problems():
        raise InputError(f"recipe {source}: {key} {message}")
    return recipe


def _read_yaml(path: Path) -> Any:
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise InputError(f"no recipe file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from None


def _parse_value(text: str, override: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise InputError(f"--set {shortened(override)}: the value is not YAML: {error}") from None


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {shortened(override)}: {shortened(key)} is a value, not a section")
    values[keys[-1]] = value


def _floats(value: Any) -> Any:
    """YAML 1.1 (PyYAML) reads 1e-4 as text, for want of a dot: read it as the number it is."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, str) and value[:1] in "0123456789.+-" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _schema(loc: tuple, values: dict) -> Any:
    """The dataclass at a location, for the names of its keys."""
    schema: Any = Recipe
    if loc[:1] == ("model",):
        schema = FAMILIES[values["model"]["family"]].config
        loc = loc[1:]
    for key in loc:
        fields = {f.name: f.type for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
        schema = fields.get(key)
        schema = next((arg for arg in get_args(schema) if dataclasses.is_dataclass(arg)), schema)
    return schema if dataclasses.is_dataclass(schema) else None


def _explain(error: ValidationError, values: dict, source: str, sources: dict[str, str]) -> str:
    """One line for the first problem pydantic found."""
    # An unknown key explains a missing one (a typo makes both), so it comes first.
    problem = sorted(error.errors(), key=lambda p: p["type"] != "unexpected_keyword_argument")[0]
    loc = problem["loc"]
    if not loc:  # a key that is no text
        return f"recipe {source}: {problem['msg']}"
    if loc[0] == "model":
        if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
            loc = ("model", "family")
            kind = "missing" if problem["type"] == "union_tag_not_found" else "literal_error"
            tag = problem["ctx"].get("tag")
            problem = problem | {"type": kind, "input": tag, "ctx": {"expected": ", ".join(FAMILIES)}}
        else:
            loc = (*loc[:1], *loc[2:])  # without the family, which pydantic puts between
    key = shortened(".".join(str(part) for part in loc))
    if not key.isascii():  # letters of other alphabets look like ours
        key = f"{key} ({key!a})"
    where = next((text for name, text in sources.items() if f"{name}.".startswith(f"{key}.")), f"recipe {source}")
    if problem["type"] == "unexpected_keyword_argument":
        schema = _schema(loc[:-1], values)
        valid = [f.name for f in dataclasses.fields(schema)] if schema else []
        near = difflib.get_close_matches(str(loc[-1]), valid, 1)
        hint = f"did you mean {near[0]}?" if near else f"valid keys here: {', '.join(valid)}"
        return f"{where}: unknown key {key}; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: key {key} is missing"
    if problem["type"] == "literal_error":
        choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(problem["input"]), choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
        return f"{where}: {key} is {shortened(repr(problem['input']))}; {hint}"
    message = problem["msg"].replace("Input should be", "it should be")
    return f"{where}: {key} is {shortened(repr(problem['input']))}; {message}"

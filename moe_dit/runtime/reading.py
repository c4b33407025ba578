"""The one way to read what anybody may have written: files of bytes, JSON and YAML, and the values of ``--set``.

Nothing here waits (a named pipe has no end), fills the memory (aliases of YAML that repeat each other, a file of
terabytes) or lets through numbers that the next program cannot take. What cannot be read is an OSError, what is no such
text a ValueError, and nothing else.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

MOST_JSON = 2**28  # bytes of a file; a manifest of a million shards has about 2**27
MOST_YAML = 2**18  # bytes of a file; a recipe has some thousands, and a MB takes ten seconds to read
MOST_VALUES = 100_000  # of a YAML text, aliases counted as often as they stand for something
MOST_NESTED = 50  # levels of a YAML text
INTEGER_BITS = 64

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | Path) -> None:
    """Raise OSError where a path leads to no file of bytes: opening a named pipe would wait for whoever writes."""
    _check_mode(os.stat(_checked(path)).st_mode, path)


def open_file(path: str | Path) -> BufferedReader:
    """Open a file of bytes to read, without ever waiting for what is none.

    Raises:
        OSError: there is none, it may not be read, or it is a folder, a named pipe, a socket or a device.
    """
    check_regular(path)
    # Another may have put something else there since, so it must not wait either.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """A whole file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: as :func:`open_file`.
        ValueError: it has more than ``most``.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f"it has {size} bytes, more than the {most} that such a file may have")
        return file.read()


def read_json(path: str | Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A file's JSON value (see :func:`parse_json`).

    Raises:
        OSError: as :func:`open_file`.
        ValueError: it is no JSON.
    """
    return parse_json(read_bytes(path, MOST_JSON), pairs)


def parse_json(text: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text, UTF-8.

    Args:
        text: of at most some hundred MB.
        pairs: makes an object of its keys and values; None for a dict.

    Raises:
        ValueError: it is no JSON, which knows no NaN and no Infinity, or holds integers of more than 64 bits or numbers
            that are infinite as float64.
    """
    try:
        return json.loads(
            _decoded(text),
            object_pairs_hook=pairs,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def read_yaml(path: str | Path, errors: str = "strict") -> Any:
    """A file's YAML value (see :func:`parse_yaml`).

    Args:
        path: of the file.
        errors: what is done with bytes that are no UTF-8, as bytes.decode's.

    Raises:
        OSError: as :func:`open_file`.
        ValueError: it is no such YAML.
    """
    return parse_yaml(_decoded(read_bytes(path, MOST_YAML), errors))


def parse_yaml(text: str) -> Any:
    """The plain value of a YAML text.

    Raises:
        ValueError: it is no YAML of plain values, has a key twice, stands for more than MOST_VALUES, nests deeper than
            MOST_NESTED or in itself, or holds integers of more than 64 bits or dates that there are not.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)  # before the values are made
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except ValueError as error:
        raise ValueError(_first_line(error)) from None
    except Exception as error:  # PyYAML lets through what Python says of impossible dates, tags and numbers
        raise ValueError(f"it is no YAML of plain values: {type(error).__name__} {_first_line(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values, for integers that other programs can take."""


def _construct_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    value = loader.construct_yaml_int(node)
    if value.bit_length() > INTEGER_BITS:  # in digits it could not even be told: Python refuses more than 4300
        raise ValueError(f"the integer in line {node.start_mark.line + 1} has more than {INTEGER_BITS} bits")
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_integer)


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for; ``known`` keeps those that aliases stand for again, 0 while they are open."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("it nests without end: a value holds an alias of itself")
        return known[id(node)]
    if depth > MOST_NESTED:
        raise ValueError(f"it nests deeper than {MOST_NESTED} levels")
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    if isinstance(node, yaml.SequenceNode):
        inside = node.value
    else:
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
    for part in inside:
        total += _count(part, known, depth + 1)
        if total > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES} values, its aliases followed")
    known[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    """Raise ValueError where a key stands twice: PyYAML takes the last one without a word."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise ValueError(
                    f"the key {key.value[:80]!r} stands twice, the second time in line {key.start_mark.line + 1}"
                )
            seen.add((key.tag, key.value))


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names, all of them beside it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index, or leads out of its folder.
    """
    found = read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index.name} is no index of weights")
    names = sorted(set(places.values()))
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
            raise ValueError(f"{index.name} names {json.dumps(name)[:80]}, which is no file of its folder")
    return names


def _checked(path: str | Path) -> str:
    """A path as text; one with a zero byte is an OSError like any other that no system can have."""
    text = os.fspath(path)
    if "\0" in text:
        raise OSError(errno.EINVAL, "Its name holds a zero byte", text.replace("\0", "\\0"))
    return text


def _check_mode(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"It is {kind}, not a file", str(path))


def _decoded(text: bytes, errors: str = "strict") -> str:
    try:
        return text.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start})") from None


def _integer(text: str) -> int:
    if len(text) > 20 or (value := int(text)).bit_length() > INTEGER_BITS:
        raise ValueError(f"it holds an integer of {len(text.lstrip('-'))} digits, more than {INTEGER_BITS} bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:20]}, which is infinite as float64")
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"it holds {text}, which is no number of JSON")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]

"""What settings are made of: strict, frozen dataclasses that refuse unknown keys and wrong values.

A settings class is declared ``@dataclass(frozen=True, config=STRICT)``. What one key's type cannot say, its method
``problems`` does: it gives pairs (key, what is wrong with it), the key relative to the class.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")

Count = Annotated[int, Field(strict=True, gt=0)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]

Problem = tuple[str, str]


def divisors(n: int) -> str:
    """The divisors of n, for a message."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def is_under(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of these keys and sections, or in one of them."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two settings, as nested dicts, differ: (dotted key, our value, their value), None for a key that is absent.

    Args:
        ours, theirs: the settings, or values inside them.
        path: the dotted key of where they stand.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in {**ours, **theirs}:
            yield from differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        yield path, ours, theirs

"""What settings are made of: strict, frozen dataclasses that refuse unknown keys and wrong values.

A settings class is declared ``@dataclass(frozen=True, config=STRICT)``. What one key's type cannot say, its method
``problems`` does: it gives pairs (key, what is wrong with it), the key relative to the class.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")

# Numbers are finite: NaN is not even equal to itself when a run goes on. Whole ones fit into 32 bits, so that none is
# counted through for ages, and those that lists are made of are fewer.
MOST = 2**31 - 1
MOST_LISTED = 10**6
MOST_BUILT = 10**4
Count = Annotated[int, Field(strict=True, gt=0, le=MOST)]
Natural = Annotated[int, Field(strict=True, ge=0, le=MOST)]
ListedCount = Annotated[int, Field(strict=True, gt=0, le=MOST_LISTED)]  # of samples that are held at once
ListedNatural = Annotated[int, Field(strict=True, ge=0, le=MOST_LISTED)]
BuiltCount = Annotated[int, Field(strict=True, gt=0, le=MOST_BUILT)]  # of modules
Size = Annotated[int, Field(strict=True, ge=0, lt=2**63)]  # bytes, or samples of a data set
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
Interval = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
# A path or name: no system's holds a zero byte or is longer.
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]

Problem = tuple[str, str]


def divisors(n: int) -> list[int]:
    """The divisors of n > 0 in order; of 2^31 in a few milliseconds."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def listed(numbers: Iterable[int]) -> str:
    """Numbers for a message."""
    return ", ".join(map(str, numbers))


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

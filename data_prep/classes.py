"""What a class is and which label it has: one rule for every source of images.

Classes are told by names (of folders, of tars, of a table's label column) or by numbers (.cls files). Numbers are
labels. Names that are numbers are the labels they say, however many zeros stand before them; all others are labelled in
the order of their names as text. A file may give the order instead (``--classes``), a name a line.
"""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dit.classes import listed
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import MOST_JSON, read_bytes

MOST = 1_000_000  # classes
SPARSE = 10  # labels up to the largest, for each that there is: more make numbers something else, as years are


@dataclass(frozen=True)
class Labelled:
    """The classes of images.

    Attributes:
        labels: of each image.
        classes: names in the order of the labels.
        order: how they were ordered, in words.
    """

    labels: list[int]
    classes: list[str]
    order: str


def is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 18


def label(
    kinds: Sequence[str] | Sequence[int],
    where: str,
    names: Sequence[str] | None = None,
    told: Sequence[str] | None = None,
    strict: bool = True,
) -> Labelled:
    """Give each image its label.

    Args:
        kinds: the class of each image as its source tells it, a name or a number; at least one.
        where: the source, for messages.
        names: of the classes, in order, as a person gives them.
        told: the same as the source tells them, of numbers.
        strict: refuse what is ambiguous; else numbers are the labels that they say.

    Raises:
        InputError: it is ambiguous which label a class has, or a class is not among the names.
    """
    if told and not isinstance(kinds[0], str):
        most = max(kinds)
        if most >= len(told):  # type: ignore[operator]
            raise InputError(f"{where}: a label is {most}, but it names {len(told)} classes")
        if names is None or list(names) == list(told):
            return Labelled(list(kinds), list(told), "labels are the file's own")  # type: ignore[arg-type]
        kinds = [told[kind] for kind in kinds]  # type: ignore[index]
    if isinstance(kinds[0], str):
        return _by_name(kinds, where, names, strict)  # type: ignore[arg-type]
    return _by_number(kinds, where, names, "labels are the numbers")  # type: ignore[arg-type]


def _by_number(kinds: Sequence[int], where: str, names: Sequence[str] | None, order: str) -> Labelled:
    found = set(kinds)
    most = max(found)
    if names is not None and most >= len(names):
        raise InputError(
            f"{where}: a label is {most}, but --classes names {len(names)} classes, 0 to {len(names) - 1}; give a line "
            "for each label, or the very names that the classes have"
        )
    if most >= MOST:
        raise InputError(f"{where}: a label is {most}; it should be below {MOST:,}")
    count = len(names) if names is not None else most + 1
    empty = [number for number in range(count) if number not in found]
    order += ", named by --classes" if names is not None else ""
    if empty:
        first = f"label {empty[0]} has no images" if len(empty) == 1 else f"{len(empty)} of them have no images"
        order += f"; {first}" if len(empty) == 1 else f"; {first}, the first is {empty[0]}"
    return Labelled(list(kinds), list(names or map(str, range(count))), order)


def _by_name(kinds: Sequence[str], where: str, names: Sequence[str] | None, strict: bool) -> Labelled:
    raw = set(kinds)
    plain = {kind: normal(kind) for kind in raw}
    by_name: dict[str, str] = {}
    for kind in sorted(raw):
        if plain[kind] in by_name:
            raise InputError(f"{where}: {by_name[plain[kind]]!r} and {kind!r} are one class; give them one name")
        by_name[plain[kind]] = kind
    numbers = all(map(is_number, raw))
    if names is not None:
        places = {normal(name): place for place, name in enumerate(names)}
        missing = sorted(by_name.keys() - places)
        if not missing:
            if len(places) < len(names):
                raise InputError(f"{where}: --classes names a class twice; a label has one name")
            numbered = {kind: places[plain[kind]] for kind in raw}
            empty = len(names) - len(raw)
            order = "labels follow --classes" + (f"; {empty} of those have no images" if empty else "")
            return Labelled([numbered[kind] for kind in kinds], list(names), order)
        if not numbers:
            raise InputError(f"{where}: {len(missing)} of its classes are not in --classes: {listed(missing)}")
    if not numbers:
        classes = sorted(by_name)
        place = {by_name[name]: i for i, name in enumerate(classes)}
        return Labelled([place[kind] for kind in kinds], classes, "labels follow their names as text")
    value = {kind: int(plain[kind]) for kind in raw}
    if strict and names is None:
        _check_numbers(sorted(value.values()), where)
    return _by_number([value[kind] for kind in kinds], where, names, "labels are the numbers in their names")


def _check_numbers(found: list[int], where: str) -> None:
    """Refuse numbers of which nobody can tell whether they are the labels."""
    if found == list(range(1, len(found) + 1)):
        why = f"their labels may be 1 to {found[-1]}, or 0 to {found[-1] - 1}"
    elif len(found) * SPARSE < found[-1] + 1:
        why = f"as labels they would make {found[-1] + 1} classes"
    else:
        return
    raise InputError(
        f"{where}: {len(found)} classes are named by numbers, {found[0]} to {found[-1]}, and {why}; give --classes "
        "FILE with their names in the order of the labels, one a line"
    )


def normal(name: str) -> str:
    """A class's name as it is kept: one form of Unicode, since file systems have two; numbers without leading zeros."""
    return str(int(name)) if is_number(name) else unicodedata.normalize("NFC", name)


def read_names(file: Path | None) -> list[str] | None:
    """The names that ``--classes`` gives, one a line; None where it is not given.

    Raises:
        InputError: it cannot be read, or a line is empty.
    """
    if file is None:
        return None
    try:
        names = read_bytes(file, MOST_JSON).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--classes {file} cannot be read: {error}") from None
    names = [unicodedata.normalize("NFC", name) for name in names]
    if not names or not all(map(str.strip, names)):
        raise InputError(f"--classes {file}: it should hold a class's name in each line, and some are empty")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Splits

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(name: str) -> str | None:
    """The split that a file or folder is of by its name, as the hub's datasets tell it: train, validation or test."""
    return next((_SPLITS[word] for word in _words(name) if word in _SPLITS), None)


def is_split(name: str) -> bool:
    """Whether a folder's name is that of a split and nothing else, but for numbers (``val_256``)."""
    words = _words(name)
    return any(word in _SPLITS for word in words) and all(word in _SPLITS or not word for word in words)


def check_splits(folder: str, classes: Collection[str]) -> None:
    """Raise InputError where what stands for classes in a folder are splits: all of it, or several."""
    splits = sorted(name for name in classes if is_split(name))
    if splits and (len(splits) == len(classes) or len(splits_in(splits)) > 1):
        raise InputError(
            f"{folder} holds the splits {' and '.join(splits)}, not classes; give one instead, e.g. "
            f"{folder}/{next((name for name in splits if split_of(name) == 'train'), splits[0])}"
        )


def _words(name: str) -> list[str]:
    """The words of a name, without digits at their ends."""
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    return [word.rstrip("0123456789") for word in words]


def splits_in(names: Collection[str]) -> list[str]:
    """The splits that names are of, sorted."""
    return sorted({split for name in names if (split := split_of(name)) is not None})

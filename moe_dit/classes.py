"""Classes by their names, wherever two sets of labels meet: shards, models, samples, references.

Who numbers classes keeps their names beside the numbers, in the order of the labels. Names that are the labels
themselves ("0", "1", ...) are those of nobody who told any, unless those that they meet are numbers too.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say
from moe_dit.runtime.reading import read_json

if TYPE_CHECKING:
    import torch

CLASSES_FILE = "classes.json"  # of a model folder: a list of the names in the order of the labels, if they are known
SHOWN = 3  # names in a line


def are_names(value: Any) -> bool:
    """Whether a file's value is the names of some classes."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def model_classes(folder: str | Path) -> list[str] | None:
    """The names of a model folder's classes in the order of the labels; None where nobody told them.

    Raises:
        InputError: the file is damaged.
    """
    file = Path(folder) / CLASSES_FILE
    try:
        found = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); export the model again, or remove the file") from None
    if not are_names(found):
        raise InputError(f"{file} should be a JSON list of the classes' names; export again, or remove the file")
    return found


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether the names are the labels themselves."""
    return all(name == str(label) for label, name in enumerate(classes))


def listed(names: Sequence[str]) -> str:
    """Some names in words."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def differing(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """In words, what of classes that are not the same is ours, and what theirs instead: the first label says enough."""
    if len(ours) != len(theirs):
        return f"{len(ours)} names", f"{len(theirs)}"
    place = next(i for i in range(len(ours)) if ours[i] != theirs[i])
    return f"{ours[place]!r} as class {place}", f"{theirs[place]!r}"


def lacking(theirs: Sequence[str], ours: Sequence[str], whose: str, of: str) -> str | None:
    """In words, which of their classes are not among ours; None where all are."""
    there = set(ours)
    missing = [name for name in theirs if name not in there]
    if not missing:
        return None
    return f"{whose} has {len(missing)} of {len(theirs)} classes that {of} has not ({listed(missing)})"


def unnamed(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether just one of two sets has names, so that nothing tells what the labels of one are in the other."""
    if are_numbers(theirs) == are_numbers(ours) or not set(theirs).isdisjoint(ours):
        return False
    return not all(name.isdigit() for name in (*theirs, *ours))


def labels_among(theirs: Sequence[str], ours: Sequence[str], whose: str, of: str) -> np.ndarray | None:
    """What each label of one set is in another, which has all of its classes.

    Args:
        theirs: class names in the order of the labels that are to be translated.
        ours: those of the set to whose labels they are translated.
        whose, of: what the two belong to, for messages.

    Returns:
        int64 [len(theirs)], the label among ``ours`` of each of ``theirs``; None where labels stay as they are. A
        translation by name is said in a line, and so is a set without names whose labels are taken as they are.

    Raises:
        InputError: a class is not among ``ours``, or one of several of its name.
    """
    if list(theirs) == list(ours[: len(theirs)]):
        return None
    if unnamed(theirs, ours) and len(theirs) <= len(ours):
        bare, named, first = (whose, of, ours[0]) if are_numbers(theirs) else (of, whose, theirs[0])
        say(f"{bare} names no classes; its labels are taken for those of {named}, whose class 0 is {first!r}")
        return None
    if missing := lacking(theirs, ours, whose, of):
        raise InputError(f"{missing}; {of} has {listed(ours)}, and labels mean nothing among others")
    often = Counter(theirs) | Counter(ours)
    if twice := [name for name in theirs if often[name] > 1]:
        raise InputError(f"{whose} and {of} number classes otherwise, and {twice[0]!r} is the name of several")
    say(f"the classes of {whose} are numbered otherwise than those of {of}, and are taken by name")
    places = {name: label for label, name in enumerate(ours)}
    return np.array([places[name] for name in theirs], np.int64)


def translated(labels: "torch.Tensor", places: np.ndarray | None) -> "torch.Tensor":
    """Labels int64 [N] as :func:`labels_among` says; -1 for those beyond its names, which nobody has named."""
    if places is None:
        return labels
    return labels.new_tensor([*places.tolist(), -1])[labels.clamp_max(len(places))]

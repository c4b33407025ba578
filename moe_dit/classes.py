"""Classes by their names, wherever two sets of labels meet: shards, models, samples, references.

Who numbers classes keeps their names beside the numbers, in the order of the labels. Names that are the labels
themselves ("0", "1", ...) are those of nobody who told any.
"""

from collections.abc import Sequence

import numpy as np

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say

SHOWN = 3  # names in a line


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether the names are the labels themselves."""
    return all(name == str(label) for label, name in enumerate(classes))


def listed(names: Sequence[str]) -> str:
    """Some names in words."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


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
    if (are_numbers(theirs) or are_numbers(ours)) and len(theirs) <= len(ours):
        bare, named = (whose, of) if are_numbers(theirs) else (of, whose)
        say(f"{bare} names no classes; its labels are taken as those of {named}")
        return None
    places = {name: label for label, name in enumerate(ours)}
    missing = [name for name in theirs if name not in places]
    if missing:
        raise InputError(
            f"{whose} has {len(missing)} classes that {of} has not: {listed(missing)}; that has {listed(ours)}"
        )
    twice = [name for name in theirs if list(ours).count(name) > 1 or list(theirs).count(name) > 1]
    if twice:
        raise InputError(f"{whose} and {of} number classes otherwise, and {twice[0]!r} is the name of several")
    say(f"the classes of {whose} are numbered as those of {of}, by name")
    return np.array([places[name] for name in theirs], np.int64)

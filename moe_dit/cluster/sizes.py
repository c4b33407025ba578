"""How many nodes a run can use: expert-parallel groups and batches must divide."""

from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError


def fits(recipe: Recipe, ds: str, ranks: int) -> bool:
    """Whether so many ranks can share the recipe's experts and batches."""
    try:
        load_parallelism(ds, recipe, ranks)
    except InputError:
        return False
    return True


def node_range(recipe: Recipe, ds: str, nodes: int, ranks_per_node: int) -> tuple[int, int] | None:
    """The range of numbers of nodes that an elastic launcher may go on with.

    Args:
        recipe: to train.
        ds: the DeepSpeed JSON.
        nodes: that there are at most.
        ranks_per_node: on each.

    Returns:
        (least, most): ``most`` is the largest number up to ``nodes`` that fits, ``least`` the smallest such that each
        between them fits too. None where no number fits.
    """
    fitting = [n for n in range(1, nodes + 1) if fits(recipe, ds, n * ranks_per_node)]
    if not fitting:
        return None
    least = most = fitting[-1]
    while least - 1 in fitting:
        least -= 1
    return least, most


def check_nodes(recipe: Recipe, ds: str, nodes: int, ranks_per_node: int, most: int = 64) -> None:
    """Raise InputError where a run does not divide by its ranks, with the numbers of nodes that would do."""
    try:
        load_parallelism(ds, recipe, nodes * ranks_per_node)
    except InputError as error:
        fitting = [str(n) for n in range(1, max(nodes, most) + 1) if fits(recipe, ds, n * ranks_per_node)]
        near = sorted(fitting, key=lambda n: abs(int(n) - nodes))[:5]
        others = (
            f"; with {ranks_per_node} ranks a node it divides on {', '.join(sorted(near, key=int))}" if near else ""
        )
        raise InputError(f"{nodes} x {ranks_per_node} = {nodes * ranks_per_node} ranks: {error}{others}") from None

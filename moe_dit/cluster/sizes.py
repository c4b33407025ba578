"""How many nodes a run can use: expert-parallel groups and batches must divide."""

from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.schema import divisors, listed


def fits(recipe: Recipe, ds: str, ranks: int) -> bool:
    """Whether so many ranks can share the recipe's experts and batches."""
    try:
        load_parallelism(ds, recipe, ranks)
    except InputError:
        return False
    return True


def _fitting(recipe: Recipe, ds: str, ranks_per_node: int) -> list[int]:
    """All numbers of nodes that fit, in order. Ranks must divide the batch, so no other numbers need be tried."""
    ranks = [ranks for ranks in divisors(recipe.global_batch_size) if ranks % ranks_per_node == 0]
    return [n // ranks_per_node for n in ranks if fits(recipe, ds, n)]


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
    fitting = [n for n in _fitting(recipe, ds, ranks_per_node) if n <= nodes]
    if not fitting:
        return None
    least = most = fitting[-1]
    while least - 1 in fitting:
        least -= 1
    return least, most


def check_nodes(recipe: Recipe, ds: str, nodes: int, ranks_per_node: int) -> None:
    """Raise InputError where a run does not divide by its ranks, with the numbers of nodes that would do."""
    if not (1 <= nodes < 2**31 and 1 <= ranks_per_node < 2**31):
        raise InputError("the number of nodes, and that of the ranks on each, should be from 1 to 2^31 - 1")
    try:
        load_parallelism(ds, recipe, nodes * ranks_per_node)
    except InputError as error:
        near = sorted(_fitting(recipe, ds, ranks_per_node), key=lambda n: abs(n - nodes))[:5]
        others = f"; with {ranks_per_node} ranks a node it divides on {listed(sorted(near))}" if near else ""
        raise InputError(f"{nodes} x {ranks_per_node} = {nodes * ranks_per_node} ranks: {error}{others}") from None

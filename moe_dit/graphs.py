"""torch.compile for the project's own functions: whole graphs of known shapes, as many as a run asks for.

torch gives a code object 8 graphs (``torch._dynamo.config.recompile_limit``), shared by all that is compiled from it,
and a function that must be one graph fails at the ninth: a run would die after weeks because a look or a last batch had
another shape. torch 2.14 can be told a limit for one function, torch 2.11 only for all; and the setting holds in the
thread that made it alone (2.14), while autograd's threads compile what is computed again. So each shape has a code
object of its own here.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Any, backend: Any = "inductor") -> Callable:
    """``function``, compiled as one graph for each shape of its first tensor, and apart with gradients and without.

    Within these there is a graph for each combination of what else its branches ask (a module's settings, whether it
    trains); of those there should be few, 8 at most.

    Args:
        function: a plain function, or a class's. The shapes of all tensors follow from the first one's.
        backend: torch.compile's.
    """
    graphs: dict[tuple[torch.Size, bool], Any] = {}

    def call(*args: Any, **named: Any) -> Any:
        shape = next(value.shape for value in args if isinstance(value, torch.Tensor))
        key = shape, torch.is_grad_enabled()
        if key not in graphs:
            code = function.__code__.replace()  # another object, though nothing in it differs
            own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
            graphs[key] = torch.compile(own, dynamic=False, fullgraph=True, backend=backend)
        return graphs[key](*args, **named)

    return call

"""A network's forward pass as a CUDA graph: sampling asks for the same shapes again and again.

What a step launches is then one graph, which a small network's thousands of kernels would otherwise wait for.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError

WARM_UPS = 3  # passes before the capture, in which libraries choose kernels and take memory


class Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]  # where the graph reads
    output: torch.Tensor  # where it writes


class Captured:
    """A network that is captured at the first call of each shape, and replayed after that.

    The same kernels run on the same numbers, so that its outputs are the network's own. Attributes are the network's.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.graphs: dict[torch.Size, Graph] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The network's arguments: z [N, C, side, side], t [N], y [N]."""
        shape = inputs[0].shape
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(inputs)
        graph, places, output = self.graphs[shape]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return output.clone()

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> Graph:
        places = tuple(value.clone() for value in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.model(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            output = self.model(*places)
        return Graph(graph, places, output)


def captured(model: nn.Module, recipe: Recipe, device: torch.device) -> Captured:
    """Wrap a network that is ready to compute.

    Raises:
        InputError: its forward pass cannot be captured, because it waits for numbers from the GPU.
    """
    if device.type != "cuda" or not recipe.in_bf16(device.type):
        # In float32 experts are computed one by one, and how many rows each has is asked of the GPU.
        raise InputError("--capture needs a GPU and bf16; leave it out")
    if getattr(model, "couples_samples", False):
        raise InputError("--capture: DiffMoE's experts choose how many tokens they take; leave it out")
    return Captured(model)

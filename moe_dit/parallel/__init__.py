"""How a network's work is spread and bounded, applied to it from outside: the DeepSpeed JSON, expert parallelism,
recomputing activations, torch.compile."""

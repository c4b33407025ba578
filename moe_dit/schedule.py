"""The learning rate over a run, as a function of the step alone."""

import math

from moe_dit.recipe import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of one step.

    Over ``warmup_steps`` it rises linearly from 0 to ``lr``. After that it stays there ("constant"), or falls to
    ``final_lr`` at the run's last step along half a cosine ("cosine", arXiv:1608.03983) or a line ("linear").

    Args:
        optimizer: the recipe's section.
        step: counted from 0.
        steps: of the whole run.
    """
    warmup = optimizer.warmup_steps
    lr = optimizer.lr
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    if optimizer.schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    share = (1 + math.cos(math.pi * progress)) / 2 if optimizer.schedule == "cosine" else 1 - progress
    return optimizer.final_lr + (lr - optimizer.final_lr) * share

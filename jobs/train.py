"""Train a recipe: deepspeed [--num_gpus N] jobs/train.py --ds FILE [--recipe NAME] [--data SHARDS] [--out RUN]."""

from moe_dit.runtime import ranks
from moe_dit.runtime.command import run
from moe_dit.train import train
from moe_dit.training_command import parse_training


def main() -> None:
    asked = parse_training()
    ranks.start()
    recipe = ranks.agreed(asked.recipe)
    train(recipe, asked.ds, asked.run(recipe), asked.resume, asked.named)


if __name__ == "__main__":
    run(main)

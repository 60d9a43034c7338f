"""`pretrain show`: a recipe as it will be trained."""

from __future__ import annotations

import sys

from launch.commands.arguments import NumRanks, Overrides, RecipePath, command_app, examples

app = command_app()


@app.command(
    epilog=examples(
        "pretrain show configs/recipes/mae_vit_b16.yaml --nproc 8",
        "pretrain show configs/recipes/mae_vit_b16.yaml --set batch.global_size=512",
    )
)
def show(recipe_path: RecipePath, overrides: Overrides = None, num_ranks: NumRanks = 1) -> None:
    """Prints a recipe with every value written out, and what follows from it at a number of processes."""
    from pretrain.recipe.files import dump, load_recipe, print_note, resolved_yaml
    from pretrain.recipe.resolve import resolve, split_batch

    recipe = load_recipe(recipe_path, overrides, note=print_note)
    split_batch(recipe, num_ranks)
    from data_pipeline.datasets.training import open_training
    from data_pipeline.errors import DataError

    try:
        num_samples = open_training(recipe.data.train, recipe.data.cache).num_samples
    except DataError as error:
        print(dump(recipe), end="")
        print(f"Without the data, no number of steps: {error}", file=sys.stderr)
    else:
        print(resolved_yaml(recipe, resolve(recipe, num_ranks, num_samples)), end="")

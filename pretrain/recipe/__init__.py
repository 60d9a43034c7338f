"""The typed recipe: its groups, strict YAML, the messages for wrong input, and what follows from a recipe.

Nothing here imports torch.
"""

"""From a recipe to an encoder, and its evaluation. Start reading at run.py."""

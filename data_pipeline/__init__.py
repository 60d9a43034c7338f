"""From images to batches: shards, their order, reading, views and the loader. Nothing here knows of models."""

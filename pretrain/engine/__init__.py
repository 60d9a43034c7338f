"""DeepSpeed behind a handful of methods: one optimizer step, evaluation, and the training state by name."""

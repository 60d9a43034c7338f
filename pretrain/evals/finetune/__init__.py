"""Fine-tuning: the whole encoder is trained with a classifier by the project's own trainer."""

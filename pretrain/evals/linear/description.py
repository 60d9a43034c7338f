"""What a report says of how a linear probe was fitted: everything that was chosen, and what was fixed."""

from __future__ import annotations

from pretrain.evals.classifiers.augmented import READ_STREAMS, SHUFFLE_WINDOW, augmented_views
from pretrain.evals.classifiers.heads import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, LR_BATCH, MOMENTUM, TRUST
from pretrain.evals.classifiers.logistic import MAX_ITERATIONS, TOLERANCE
from pretrain.evals.encoder import Encoder
from pretrain.evals.linear.config import LinearConfig


def describe(config: LinearConfig, num_train: int, encoder: Encoder) -> dict[str, object]:
    """Describes a probe that is retrained on so many samples."""
    preset = {"paper": config.paper} if config.paper else {}
    common = {"classifier": "multinomial logistic regression", **preset, "standardised": _normalisation(config)}
    if config.solver == "lbfgs":
        return {
            **common,
            "optimizer": "L-BFGS with strong Wolfe line search in fp64",
            "minimised": "mean cross entropy + |weights|^2 / (2 C N), biases without penalty; C is inverse_penalty",
            "tolerance": f"{TOLERANCE:g}, of the largest entry of its gradient, in at most {MAX_ITERATIONS} iterations",
            "inverse_penalties": list(config.inverse_penalties),
        }
    training = config.training(num_train)
    return {
        **common,
        "optimizer": _optimizer(config),
        "batch_size": training.batch_size,
        "num_steps": training.num_steps,
        **({"warmup_steps": training.warmup_steps} if training.warmup_steps else {}),
        "learning_rates": list(config.learning_rates),
        "learning_rates_are_for_batch": LR_BATCH,
        "weight_decays": list(config.weight_decays),
        **(_augmentation(config, encoder) if config.augment else {}),
    }


def _normalisation(config: LinearConfig) -> str:
    if config.batch_norm:
        return (
            f"by batch norm without affine (eps {BATCH_NORM_EPS:g}): by the whole batch in training, by running "
            f"statistics (momentum {BATCH_NORM_MOMENTUM:g}) in testing"
        )
    views = ", as they are without augmentation" if config.augment else ""
    return f"per feature, by mean and deviation of the samples that are fitted on{views}"


def _optimizer(config: LinearConfig) -> str:
    start = f"normal of deviation {config.initial_std:g}, cut off at 2" if config.initial_std else "0"
    warmup = "linear warmup, then " if config.warmup_epochs else ""
    if config.solver == "lars":
        return (
            f"LARS, momentum {MOMENTUM:g}, trust coefficient {TRUST:g}, {warmup}cosine to 0; weights from {start}, "
            "biases from 0, without decay, not adapted"
        )
    biases = "biases without decay" if start == "0" else "biases from 0, without decay"
    return f"SGD, momentum {MOMENTUM:g}, {warmup}cosine to 0; weights from {start}, {biases}"


def _augmentation(config: LinearConfig, encoder: Encoder) -> dict[str, object]:
    views = augmented_views(encoder, config.crop_scale)
    return {
        "augmentation": {
            "random_resized_crop": {"scale": list(views.scale), "ratio": list(views.ratio)},
            "horizontal_flip": views.flip,
            "interpolation": views.interpolation,
        },
        # The words of earlier results: evaluations are compared by them.
        "order": f"every sample once an epoch, shuffled over {READ_STREAMS} lanes in windows of {SHUFFLE_WINDOW}; "
        "views drawn anew",
    }

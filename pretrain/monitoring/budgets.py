"""How much may go wrong before a run stops: steps without a finite loss or gradient, and samples that are unusable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, PretrainError, RunError
from data_pipeline.loader import BadSample
from data_pipeline.messages import short_list
from pretrain.runtime.collectives import gather_objects

NUM_SHOWN = 5  # keys of samples in a message
FILE_NAME = "skipped-samples.jsonl"  # in the run's folder: all of them, a line for each step


def too_many_left_out(where: str, found: int, budget: int | None) -> PretrainError:
    """Makes the error of an evaluation that may not leave out as many samples as cannot be used.

    Args:
        where: the data set.
        found: how many cannot be used.
        budget: how many may be left out; None: there is no usable sample at all.
    """
    what = f"{found} that cannot be used"
    fix = "`pretrain data verify` names them all, in shards; of an image folder make some: `pretrain data convert`."
    if budget is None:
        return DataError(where, "a sample that can be used", what, fix)
    return RunError(where, f"at most {budget} samples that an evaluation leaves out (data.max_bad_samples)", what, fix)


@dataclass(frozen=True)
class Budgets:
    """The budgets of a run, and the sentences on what uses them up. Every rank calls its methods alike.

    Attributes:
        bad_samples: that may be replaced.
        skipped_steps: that may be without a finite loss or gradient.
        say: receives a sentence for the log, on rank 0.
        append: writes a line to a file, on rank 0.
        file: takes the samples of skipped steps that a message has no room for.
    """

    bad_samples: int
    skipped_steps: int
    say: Callable[[str], None]
    append: Callable[[Path, Mapping[str, Any]], object]
    file: Path

    def count_skipped_step(self, step: int, num_skipped: int, loss_is_finite: bool, keys: Sequence[str]) -> None:
        """Names the samples of a skipped step; those of a rank whose own loss was finite only if all losses were.

        Args:
            step: the one that was to be applied, counted from 1.
            num_skipped: skipped steps so far, this one included.
            loss_is_finite: on this rank.
            keys: of this rank's samples.

        Raises:
            RunError: the budget is used up.
        """
        found = gather_objects((loss_is_finite, list(keys)))
        blamed = [key for finite, ks in found if not finite for key in ks]
        blamed = blamed or [key for _, ks in found for key in ks]
        what = "loss" if any(not finite for finite, _ in found) else "gradient"
        shown = short_list(blamed, NUM_SHOWN)
        if len(blamed) > NUM_SHOWN:
            self.append(self.file, {"step": step, "samples": blamed})
            shown += f", all of them in {self.file}"
        self.say(f"step {step} skipped: the {what} is not finite ({num_skipped} so far); samples: {shown}")
        if num_skipped > self.skipped_steps:
            raise RunError(
                where=f"step {step}", expected=f"at most {self.skipped_steps} steps without a finite {what}",
                found=f"{num_skipped}; samples of the last: {shown}",
                fix="Lower optim.base_lr or set optim.clip_norm; look at these samples. "
                "Budget: runtime.max_skipped_steps.",
            )  # fmt: skip

    def count_bad_samples(self, num_before: int, bad: Sequence[BadSample]) -> int:
        """Names the samples that were replaced, on all ranks.

        Args:
            num_before: bad samples so far.
            bad: those that this rank has found since.

        Returns:
            Bad samples so far, those of all ranks included.

        Raises:
            RunError: the budget is used up.
        """
        found = [one for rank in gather_objects(list(bad)) for one in rank]
        for one in found:
            self.say(f"bad sample {one.key} in {one.shard}: {one.reason} In its place: {one.replacement_key}")
        num_bad = num_before + len(found)
        if num_bad > self.bad_samples:
            raise RunError(
                where="data.max_bad_samples", expected=f"at most {self.bad_samples} unusable samples",
                found=f"{num_bad}; the last: {short_list([one.key for one in found], NUM_SHOWN)}",
                fix="Run `pretrain data verify` on the shards, or raise the budget.",
            )  # fmt: skip
        return num_bad

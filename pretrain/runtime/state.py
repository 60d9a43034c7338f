"""Where a run stands. Small, frozen, and all that a schedule or a loader needs in order to go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Progress:
    """Counts applied steps; every schedule is a pure function of it.

    Attributes:
        step: optimizer steps applied so far.
        total_steps: steps of the whole run.
        samples_seen: samples that took part in applied steps, over all ranks.
    """

    step: int
    total_steps: int
    samples_seen: int

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.total_steps)

    def advance(self, num_samples: int) -> Progress:
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + num_samples)


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps beside the tensors.

    Attributes:
        progress: applied steps and samples.
        cursor: the next global position to read. Apart from `samples_seen`: a skipped step reads and does not learn.
        skipped_steps: steps not applied because a loss or a gradient was not finite.
        bad_samples: samples replaced because they could not be used, over all ranks.
    """

    progress: Progress
    cursor: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, object]) -> RunState:
        rest = {name: value for name, value in data.items() if name != "progress"}
        return cls(progress=Progress(**data["progress"]), **rest)  # type: ignore[arg-type]

"""Jobs that wait at a step of their training, so that what is then done to them finds them at work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.runtime.run_folder import folder_name

INSIDE = Path(__file__).resolve().parent / "inside"


@dataclass(frozen=True)
class JobGate:
    """Where the ranks of a job wait (inside/sitecustomize.py): in the middle of the saves of some steps."""

    folder: Path

    def close(self, *steps: int) -> None:
        self.folder.mkdir(exist_ok=True)
        for step in steps:
            (self.folder / folder_name(step)).touch()

    def setup(self) -> list[str]:
        """Lines of a cluster file, of jobs that have this gate."""
        return [f"export PRETRAIN_TESTS_GATE={self.folder} PYTHONPATH={INSIDE}${{PYTHONPATH:+:$PYTHONPATH}}"]

    def waiting(self, step: int) -> int:
        """How many ranks stand there."""
        return len(list(self.folder.glob(f"{folder_name(step)}.*")))

    def release(self, step: int) -> None:
        (self.folder / folder_name(step)).unlink()

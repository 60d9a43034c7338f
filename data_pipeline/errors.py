"""Every error a user can meet, as one tree.

    PretrainError
    ├── InputError            what was given is wrong; nothing was started or changed (exit status 2)
    │   ├── RecipeError       a recipe, or an override of one
    │   ├── CheckpointError   a checkpoint, or weights that do not fit
    │   └── DataError         a dataset
    │       ├── SourceError   an image folder or archive that is to become shards
    │       ├── ManifestError a manifest or index: missing, damaged, not of these shards
    │       ├── ShardError    a tar: missing, damaged, refused
    │       ├── FieldError    samples lack what the run needs (an image, a label in range)
    │       └── SampleError   one sample cannot be used; a loader replaces and counts it
    └── RunError              the run failed after it had started (exit status 1)

A message names the field or path, what was expected, what was found, and the next step.
"""

from data_pipeline.messages import visible


class PretrainError(Exception):
    """Base of all errors that are told to a user as one message, without a traceback.

    Args:
        where: the field or path it is about.
        expected: what would have been right.
        found: what was there.
        fix: what to do next, an imperative sentence; empty where `expected` already says it.
    """

    exit_status = 1

    def __init__(self, where: str, expected: str, found: str, fix: str = "") -> None:
        self.where, self.expected, self.found, self.fix = where, expected, found, fix
        super().__init__(where, expected, found, fix)  # as given, so that it survives pickling

    def __str__(self) -> str:
        text = f"{self.where}: expected {self.expected}, found {self.found}."
        return visible(f"{text} {self.fix}" if self.fix else text, lines=True)


class InputError(PretrainError):
    exit_status = 2


class RecipeError(InputError):
    """A recipe is wrong. `problems` holds all of them, each already a full sentence with its path; `fix` is none."""

    def __init__(self, where: str, problems: list[str], fix: str = "") -> None:
        self.problems = problems
        PretrainError.__init__(self, where, "a valid recipe", f"{len(problems)} problem(s)", fix)
        self.args = (where, problems, fix)

    def __str__(self) -> str:
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        told = "\n".join([f"{self.where}: {head}", *(f"  {line}" for line in [*self.problems, self.fix] if line)])
        return visible(told, lines=True)


class CheckpointError(InputError):
    pass


class DataError(InputError):
    pass


class SourceError(DataError):
    pass


class ManifestError(DataError):
    pass


class ShardError(DataError):
    pass


class FieldError(DataError):
    pass


class SampleError(DataError):
    pass


class RunError(PretrainError):
    pass

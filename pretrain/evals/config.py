"""What is chosen of an evaluation: the base of every protocol's group, and the table of protocols. Imports no torch.

A new protocol is a folder here, with its `config.py` and its `protocol.py`, and a line in `KINDS`. From its config come
the options of `pretrain eval KIND`, and so of a suite file, the entry in a recipe's `evals`, and its title in a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from data_pipeline.errors import InputError
from pretrain.recipe.base import Group

# Each kind, which is also its folder's name: what the name of its group in `config.py` begins with, before "Config".
KINDS = {
    "knn": "Knn",
    "ncm": "Ncm",
    "linear": "Linear",
    "fewshot": "Fewshot",
    "finetune": "Finetune",
    "zeroshot": "ZeroShot",
    "retrieval": "Retrieval",
}

Count = Annotated[int, Field(ge=1)]
POOLING_HELP = (
    "own: as the encoder does; else class token, mean of patches, or both, of each block; dinov2: class tokens of all "
    "--blocks and the mean of the last one's patches."
)
Pooling = Literal["own", "cls", "mean", "both", "dinov2"]


@dataclass(frozen=True)
class Option:
    """How a field of a protocol's group is given on a command line. Its type, range and default come from the field.

    Attributes:
        help: the text of `--help`.
        name: of the option, without dashes; empty: the field's.
        parameter: what the argument is called in reports; empty: the field's name.
        short: a further name, such as `-C`.
        default: of the command, where it is another than the field's. None: the group decides, if nothing is given.
        metavar: what stands for the value in `--help`; empty: its type.
        shared: whether the option is one that all commands have, and that the group only reads.
    """

    help: str = ""
    name: str = ""
    parameter: str = ""
    short: str = ""
    default: Any = ...
    metavar: str = ""
    shared: bool = False


class WrongFieldsError(ValueError):
    """Fields of a group that are wrong, alone or together.

    Args:
        fields: their names.
        expected: what should stand there.
        found: what does.
        fix: what to do; empty: nothing more is known.
    """

    def __init__(self, fields: Iterable[str], expected: str, found: str, fix: str = "") -> None:
        self.fields, self.expected, self.found, self.fix = tuple(fields), expected, found, fix
        named = f"{', '.join(self.fields)}: " if self.fields else ""
        super().__init__(f"{named}expected {expected}, found {found}." + (f" {fix}" if fix else ""))


class ProtocolConfig(Group):
    """A protocol's group: what decides its numbers. In a recipe's `evals` it also says when it is due.

    Attributes:
        summary: what the protocol measures, in a sentence, for `--help`.
        title: its name in a report; fields of the report's protocol stand in braces.
        examples: commands.
        judges: an encoder's features, or two towers.
        trains: whether the encoder is trained, which takes a run of its own.
        found: what its reports say under `protocol` on which the reported number does not depend: found out, or
            measured beside it.
    """

    summary: ClassVar[str]
    title: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    judges: ClassVar[Literal["encoder", "towers"]] = "encoder"
    trains: ClassVar[bool] = False
    found: ClassVar[frozenset[str]] = frozenset()

    kind: str
    train: str | None = None
    test: str
    every_epochs: float = Field(1, gt=0)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Paths of what is learned from, if anything is, and of what is tested."""
        return (self.test,) if self.train is None else (self.train, self.test)

    @classmethod
    def options(cls) -> dict[str, tuple[FieldInfo, Option]]:
        """Fields that are options of the command, in its order, each with its option."""
        found = {}
        for name, field in cls.model_fields.items():
            for option in field.metadata:
                if isinstance(option, Option):
                    found[name] = field, option
        return found

    @classmethod
    def of_options(cls, given: Mapping[str, Any]) -> ProtocolConfig:
        """Makes a group of what was given on a command line, by fields; None is what was not given.

        Raises:
            InputError: a value is wrong; the error names its option.
        """
        values = {name: value for name, value in given.items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise cls._told(error) from None

    @classmethod
    def _told(cls, error: ValidationError) -> InputError:
        details = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))  # the innermost
        wrong = details.get("ctx", {}).get("error")
        if isinstance(wrong, WrongFieldsError):
            where = ", ".join(cls._flag(name) for name in wrong.fields)
            return InputError(where=where, expected=wrong.expected, found=wrong.found, fix=wrong.fix)
        expected = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        where = cls._flag(str(details["loc"][0])) if details["loc"] else cls.__name__
        return InputError(where=where, expected=expected, found=repr(details["input"]))

    @classmethod
    def _flag(cls, name: str) -> str:
        options = cls.options()
        return f"--{option_name(name, options[name][1])}" if name in options else name

    def words(self) -> list[str]:
        """The options of a command line that asks the same."""
        words: list[str] = []
        for name, (_, option) in self.options().items():
            value, flag = getattr(self, name), f"--{option_name(name, option)}"
            if isinstance(value, bool):
                negative = f"--no-{option_name(name, option)}"
                words += [flag] if value else [negative] if option.default is None else []
            elif isinstance(value, tuple) and is_pair(type(self).model_fields[name]):
                words += [flag, *map(str, value)]
            elif value is not None:
                words += [f"{flag}={one}" for one in (value if isinstance(value, tuple) else (value,))]
        return words


class ClassificationConfig(ProtocolConfig):
    """A protocol that learns the classes of `test` from the labels of `train`, both by features of an encoder."""

    train: Annotated[str, Option("Labeled training set: shards or an image folder.")]
    test: Annotated[str, Option("Test set with the same classes: shards or an image folder.")]
    max_train: Annotated[
        Count | None, Option("The first N training samples only.", name="limit-train", parameter="limit_train")
    ] = None
    max_test: Annotated[
        Count | None, Option("The first N test samples only.", name="limit-test", parameter="limit_test")
    ] = None


class FeatureConfig(ClassificationConfig):
    """A protocol that takes one feature of each image: how the encoder's tokens are pooled, and of how many blocks."""

    pooling: Annotated[Pooling, Option(POOLING_HELP)] = "own"
    blocks: Annotated[Count, Option("The last N blocks, side by side.")] = 1


def config_class(kind: str) -> type[ProtocolConfig]:
    """The group that belongs to a kind of the table."""
    module = import_module(f"pretrain.evals.{kind}.config")
    found: type[ProtocolConfig] = getattr(module, f"{KINDS[kind]}Config")
    return found


def config_classes() -> list[type[ProtocolConfig]]:
    """The groups of all kinds, in the order of the table."""
    return [config_class(kind) for kind in KINDS]


def option_name(field: str, option: Option) -> str:
    """What the option of a field is called, without dashes before it."""
    return option.name or field.replace("_", "-")


def is_pair(field: FieldInfo) -> bool:
    """Whether the value of a field is a tuple of fixed length, which one option takes at once."""
    return any(Ellipsis not in get_args(found) for found in tuples_in(field.annotation))


def tuples_in(annotation: Any) -> list[Any]:
    """The tuple types of an annotation, or of the members of its union."""
    if get_origin(annotation) is tuple:
        return [annotation]
    return [found for part in get_args(annotation) for found in tuples_in(part)]

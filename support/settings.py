"""What this package has to be told about the program that uses it. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RunSettings:
    """What is special about a program's runs: their arguments, their files and their history.

    A resumed run must have the arguments that it started with. The first five fields name the
    exceptions.
    """

    # Files and folders. They may move: the run's fingerprint holds a digest of what they contain.
    path_arguments: frozenset[str]
    # Arguments that change the result by rounding at most, and paths: a resumed run may change
    # them.
    free_arguments: frozenset[str]
    # Free arguments on which all processes of a run must still agree, because they synchronise by
    # them.
    synchronised_arguments: frozenset[str]
    # Arguments that the program compares itself, and does not save.
    unsaved_arguments: frozenset[str]
    # Where a run was created. It may have been moved since.
    place_arguments: frozenset[str]
    # Values that stand for arguments missing from args.json, where today's default would change the
    # result.
    values_if_missing: Mapping[str, object]

    # The first bytes of a checkpoint. Change them when the content of checkpoints changes.
    checkpoint_magic: bytes
    # Folders in a run directory that the program writes to, besides weights/ and runs/.
    folders: tuple[str, ...]
    # The beginning of the names of other runs that may be inside a run directory.
    inner_run_prefix: str

    # History fields that count what is finished. A history has one of them, and its rows count from
    # 1.
    step_fields: tuple[str, ...]
    # History fields that are not numbers.
    other_fields: frozenset[str]

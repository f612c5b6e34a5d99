"""What a program tells this package about its runs. This module does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RunSettings:
    """The arguments, the files and the history of a program's runs.

    A resumed run must have the arguments that it started with. The first five fields name the
    exceptions to this rule.
    """

    # Arguments that name files and folders, which may be moved. The run's fingerprint holds a
    # digest of their content.
    path_arguments: frozenset[str]
    # Arguments that a resumed run may change: paths, and arguments that change the result by
    # rounding at most.
    free_arguments: frozenset[str]
    # Free arguments that must still be the same in all processes of a run, because they decide at
    # which steps the processes synchronise.
    synchronised_arguments: frozenset[str]
    # Arguments that are not saved in args.json. The program checks these arguments itself.
    unsaved_arguments: frozenset[str]
    # Arguments that say where a run was created. The run may have been moved since.
    place_arguments: frozenset[str]
    # Values for arguments that are missing from an old args.json. An argument needs such a value if
    # today's default would change the result.
    values_if_missing: Mapping[str, object]

    # The argument with which a new run begins where another one has ended.
    new_run_argument: str

    # The first bytes of a checkpoint. Change these bytes when the content of checkpoints changes.
    checkpoint_magic: bytes
    # Folders in a run directory that the program writes to, besides weights/ and runs/.
    folders: tuple[str, ...]
    # Prefix of the names of other runs that may be inside a run directory.
    inner_run_prefix: str

    # Names of the history field that counts steps. A history has one of these fields, which counts
    # from 1.
    step_fields: tuple[str, ...]
    # History fields that are not numbers.
    other_fields: frozenset[str]

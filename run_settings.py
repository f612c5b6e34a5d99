"""Describe the runs of EvNAS to the general code in `support/`: their arguments, files and history.

This module does not import torch.
"""

from support.settings import RunSettings

INPUTS = frozenset({"data", "api_path", "split_file"})  # paths of what a run reads; the files may be moved

SETTINGS = RunSettings(
    path_arguments=INPUTS | {"init_from", "init_weights"},
    free_arguments=INPUTS
    | {
        "checkpoint",
        "compile",
        "cuda_graph",
        "device",
        "gpu",
        "image_cache",
        "rank_all",
        "report_freq",
        "resume",
        "self_check",
        "triton",
        "workers",
    },
    synchronised_arguments=frozenset({"report_freq"}),  # at each report, processes agree on whether to stop
    unsaved_arguments=frozenset({"config_path", "parallel"}),
    place_arguments=frozenset({"dir", "run_name", "save"}),
    values_if_missing={"seed_scheme": 1},
    new_run_argument="init_from",
    checkpoint_magic=b"EvNAS checkpoint 1 ",
    folders=("population",),
    inner_run_prefix="eval-",  # a retraining inside the directory of its search
    step_fields=("generation", "epoch"),
    other_fields=frozenset({"best_genotype", "true_accuracy", "truth"}),
)

#!/usr/bin/env bash
# Run three EvNAS searches on NAS-Bench-201 with the seeds 18, 19 and 20, and print a summary of the three.
#
#   ./searchNAS201.sh DATASET GPU OUTPUT_DIR [more flags of nas201.train_search]
#   ./searchNAS201.sh digits cpu out --epochs 3 --pop_size 8 --tsize 3 --init_channels 4 --num_cells 1
#
# DATASET      a choice of --dataset, such as cifar10 or ImageNet16-120
# GPU          the number of a GPU, or cpu (or -1) for the CPU
# OUTPUT_DIR   the folder for the runs; their names are search-DATASET-seed18 and so on
#
# If you call the script again, it skips the runs that have finished and continues the others.
#
# Environment variables:
# PYTHON       the Python interpreter (default: python)
# DATA         the folder of the data set (default: ../data; for ImageNet16-120 it is ../data/ImageNet16)
set -euo pipefail

module=nas201.train_search
published=(--track_running_stats)
source "$(dirname "$(readlink -f "$0")")/search_seeds.sh"
run_module nas201.summary "$output" "$dataset"

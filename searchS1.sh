#!/usr/bin/env bash
# Run three EvNAS searches in the DARTS space with the seeds 18, 19 and 20, and print a table of the three.
#
#   ./searchS1.sh DATASET GPU OUTPUT_DIR [more flags of train_search.py]
#   ./searchS1.sh digits cpu out --epochs 3 --pop_size 6 --tsize 3 --init_channels 4 --layers 3
#
# The arguments and environment variables are the same as those of searchNAS201.sh. The script also writes the table
# to OUTPUT_DIR/summary.csv, and charts to OUTPUT_DIR/compare.html. If you call the script again after you have
# retrained the winners, the table also has the winners' test accuracy.
set -euo pipefail

module=train_search
published=()
source "$(dirname "$(readlink -f "$0")")/search_seeds.sh"
run_module summary "${runs[@]}" --output "$output"

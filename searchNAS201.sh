#!/usr/bin/env bash
# Three EvNAS searches on NAS-Bench-201, seeds 18, 19 and 20, and their table.
#
#   ./searchNAS201.sh DATASET GPU OUTPUT_DIR [more flags of nas201.train_search]
#   ./searchNAS201.sh digits cpu out --epochs 3 --pop_size 8 --tsize 3 --init_channels 4 --num_cells 1
#
# DATASET: a choice of --dataset, such as cifar10 or ImageNet16-120. GPU: a number; -1 or cpu for the CPU.
# Runs are OUTPUT_DIR/search-DATASET-seed18 and so on. Called again, it skips finished runs and continues broken ones.
# Environment: PYTHON, the interpreter (python); DATA, the data directory (../data, or ../data/ImageNet16).
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "error: usage: $0 DATASET GPU OUTPUT_DIR [more flags]" >&2
  exit 2
fi
dataset=$1 gpu=$2 output=$3
shift 3
python=${PYTHON:-python}

case $gpu in
  -1 | cpu) device=(--device cpu) ;;
  *) device=(--gpu "$gpu") ;;
esac
for flag in "$@"; do
  case ${flag%%=*} in
    --dataset | --dir | --run_name | --resume | --seed)
      echo "error: ${flag%%=*} is set by $0" >&2
      exit 2
      ;;
  esac
done

# This script may be called from any folder and through a link; modules in the current folder are not imported.
root=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
# The registry of data sets says which ones there are, and where each is unless DATA says otherwise.
data=$("$python" -c 'import sys
sys.path[0], name = sys.argv[1:]
import datasets
from support.cli import command
command(lambda argv: print(datasets.default_folder(datasets.S2_SEARCH, name)))()' "$root" "$dataset")
run_module() {
  "$python" -c 'import runpy, sys
sys.path[0], module = sys.argv[1:3]
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)' "$root" "$@"
}

for seed in 18 19 20; do
  run=$output/search-$dataset-seed$seed
  if [ -e "$run/checkpoint.pt" ]; then
    place=(--resume "$run")
  else # a new run, or one without a checkpoint, whose files are moved aside
    place=(--dir "$output" --run_name "${run##*/}")
  fi
  run_module nas201.train_search "${place[@]}" --dataset "$dataset" --data "${DATA:-$data}" "${device[@]}" \
    --track_running_stats --seed "$seed" "$@"
done
run_module nas201.summary "$output" "$dataset"

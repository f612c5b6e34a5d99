#!/usr/bin/env bash
# Run three EvNAS searches on NAS-Bench-201, with the seeds 18, 19 and 20, and print a summary of them.
#
#   ./searchNAS201.sh DATASET GPU OUTPUT_DIR [more flags of nas201.train_search]
#   ./searchNAS201.sh digits cpu out --epochs 3 --pop_size 8 --tsize 3 --init_channels 4 --num_cells 1
#
# DATASET      a choice of --dataset, such as cifar10 or ImageNet16-120
# GPU          the number of a GPU; -1 or cpu for the CPU
# OUTPUT_DIR   folder of the runs, which are named search-DATASET-seed18 and so on
#
# If you call the script again, it skips the runs that have finished and continues the others.
#
# Environment variables:
# PYTHON       the interpreter (default: python)
# DATA         folder of the data set (default: ../data, for ImageNet16-120 ../data/ImageNet16)
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "error: arguments are missing; usage: $0 DATASET GPU OUTPUT_DIR [more flags]" >&2
  exit 2
fi
dataset=$1
gpu=$2
output=$3
shift 3
python=${PYTHON:-python}

case $gpu in
  -1 | cpu) device=(--device cpu) ;;
  *) device=(--gpu "$gpu") ;;
esac
for flag in "$@"; do
  case ${flag%%=*} in
    --dataset | --dir | --run_name | --resume | --seed)
      echo "error: ${flag%%=*} is set by $0; leave it out" >&2
      exit 2
      ;;
  esac
done

# The script can be called from any folder and through a link. Python looks for modules in the folder of the script,
# not in the current folder.
root=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
# The registry of data sets knows their names and their default folders.
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
  else # a new run, or one that ended before its first checkpoint: its files are moved aside
    place=(--dir "$output" --run_name "${run##*/}")
  fi
  run_module nas201.train_search "${place[@]}" --dataset "$dataset" --data "${DATA:-$data}" "${device[@]}" \
    --track_running_stats --seed "$seed" "$@"
done
run_module nas201.summary "$output" "$dataset"

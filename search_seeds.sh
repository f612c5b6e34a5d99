# The common part of searchNAS201.sh and searchS1.sh: run one search for each of the seeds 18, 19 and 20.
# Do not call this file directly. The calling script sets two variables and then sources this file:
#
# module       the Python module that searches
# published    an array of flags that the published search passes to the module
#
# This file sets the variables `output`, `dataset` and `runs` for the calling script, and defines `run_module`, a
# function that runs a Python module of this project.

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

# You can call the scripts from any folder and through a symbolic link. Python has to import the modules from the
# folder of this file, not from the current folder.
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# datasets.py has the names and the default folders of all data sets.
data=$("$python" -c 'import sys
sys.path[0], module, name = sys.argv[1:]
import datasets
from support.cli import command
search = datasets.S1_SEARCH if module == "train_search" else datasets.S2_SEARCH
command(lambda argv: print(datasets.default_folder(search, name)))()' "$root" "$module" "$dataset")
run_module() {
  "$python" -c 'import runpy, sys
sys.path[0], module = sys.argv[1:3]
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)' "$root" "$@"
}

runs=()
for seed in 18 19 20; do
  run=$output/search-$dataset-seed$seed
  runs+=("$run")
  if [ -e "$run/checkpoint.pt" ]; then
    place=(--resume "$run")
  else # a new run, or a run that ended before its first checkpoint; the new run moves the old files aside
    place=(--dir "$output" --run_name "${run##*/}")
  fi
  run_module "$module" "${place[@]}" --dataset "$dataset" --data "${DATA:-$data}" "${device[@]}" \
    ${published[@]+"${published[@]}"} --seed "$seed" "$@"
done

# What all launchers share; sourced by them. Each sets the OPENPI_DUQUANT_* variables that its preset means, only where
# the caller has not, and calls `evaluate`.
#
#   CKPT           checkpoint of openpi, original or converted; not needed with HOST
#   HOST, PORT     ask running policy servers instead (several: separated by spaces)
#   TASK_SUITE     libero_spatial (default), libero_object, libero_goal, libero_10, libero_90
#   TASKS          numbers of tasks, separated by spaces or commas (default: all)
#   NUM_TRIALS     episodes of every task (default: 50)
#   SEED           default: 7
#   RESULTS_DIR    default: results/libero/<launcher>/<suite>
#   LIBERO_ASSETS  folder of LIBERO's assets, where LIBERO does not find them by itself
#   PYTHON         default: python
#
# Arguments are passed on to main.py: --resume, --num-workers 4, --keep-going and the others that --help lists.
# shellcheck shell=bash
set -euo pipefail

# default NAME=VALUE...: sets and exports each variable that the caller has not set.
default() {
  local pair
  for pair in "$@"; do
    [[ -v ${pair%%=*} ]] || export "${pair?}"
  done
}

fail() {
  echo "error: $1" >&2
  exit 1
}

require_checkpoint() {
  [[ -n ${CKPT:-} ]] || fail "checkpoint: set CKPT to a checkpoint of openpi${1:-}"
  [[ -d $CKPT ]] || fail "checkpoint: there is no folder $CKPT"
  compgen -G "$CKPT/*.safetensors" >/dev/null || fail "checkpoint $CKPT: has no model.safetensors"
}

# evaluate CONFIG ARGUMENT...: runs main.py with openpi's config of that name in place of this shell.
evaluate() {
  local folder name suite arguments hosts ports tasks
  folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
  name=$(basename -- "$0" .sh)
  suite=${TASK_SUITE:-libero_spatial}
  arguments=(--policy-config "$1" --task-suite-name "$suite" --num-trials-per-task "${NUM_TRIALS:-50}")
  arguments+=(--seed "${SEED:-7}" --results-dir "${RESULTS_DIR:-results/libero/${name#run_}/$suite}")
  shift
  if [[ -n ${HOST:-} ]]; then
    read -ra hosts <<<"$HOST"
    read -ra ports <<<"${PORT:-8000}"
    arguments+=(--host "${hosts[@]}" --port "${ports[@]}")
  else
    require_checkpoint ", or HOST to a running policy server"
    arguments+=(--checkpoint "$CKPT")
  fi
  if [[ -n ${TASKS:-} ]]; then
    read -ra tasks <<<"${TASKS//,/ }"
    arguments+=(--tasks "${tasks[@]}")
  fi
  [[ -z ${LIBERO_ASSETS:-} ]] || arguments+=(--assets "$LIBERO_ASSETS")
  exec "${PYTHON:-python}" "$folder/main.py" "${arguments[@]}" "$@"
}

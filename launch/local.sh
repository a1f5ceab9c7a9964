#!/usr/bin/env bash
# The ranks of one run on this machine, under the deepspeed launcher itself. `dynmoe train` does the same.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: [RANKS=N] launch/local.sh OVERRIDE...

Starts N ranks (2 unless RANKS says otherwise) of `dynmoe train OVERRIDE...` on this machine under the deepspeed
launcher. `dynmoe train OVERRIDE...` starts them by itself and also clears up after Ctrl-C; use this script to give the
launcher options of your own, or as a pattern for other launchers.

environment:
  RANKS            number of ranks, passed on as parallel.num_ranks
  DYNMOE_RUN_DIR   run folder; runs/local-DATE-TIME unless set (or give run_dir=FOLDER)
  DEEPSPEED_ARGS   further options of the launcher, such as "--master_port 29501"

examples:
  launch/local.sh experiment=demo
  RANKS=1 launch/local.sh experiment=demo parallel=single
TEXT
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  usage
  exit 0
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -x "$root/.venv/bin/deepspeed" ]]; then
  PATH="$root/.venv/bin:$PATH"
fi
if ! command -v deepspeed >/dev/null; then
  echo "launch/local.sh: there is no deepspeed on the PATH. Activate the environment, or run \`pip install -e .\`." >&2
  exit 2
fi

ranks="${RANKS:-2}"
# Every rank must use the same folder; ranks that named it by the clock could differ by a second.
export DYNMOE_RUN_DIR="${DYNMOE_RUN_DIR:-runs/local-$(date +%Y%m%d-%H%M%S)}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2086 # DEEPSPEED_ARGS is a list of words
exec deepspeed --no_local_rank --num_gpus "$ranks" ${DEEPSPEED_ARGS:-} \
  --module dynmoe_ds train "$@" "parallel.num_ranks=$ranks"

#!/usr/bin/env bash
# Which layers every preset quantizes in CKPT, an original checkpoint, and how many: a dry run, nothing is written.
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

require_checkpoint
for preset in default simple optimized dit_qkvo llm full_llm_dit quantvla; do
  echo "== $preset"
  "${PYTHON:-python}" -m openpi_duquant convert-checkpoint "$CKPT" --preset "$preset" --dry-run "$@"
done

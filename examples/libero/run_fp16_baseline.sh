#!/usr/bin/env bash
# The policy that is not quantized, in openpi's own precision (bf16). CKPT is an original checkpoint.
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

evaluate pi05_libero "$@"

#!/usr/bin/env bash
# Preset optimized: the action expert, permuted, SVD blocks of 16, output rows rotated and restored.
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

default OPENPI_DUQUANT_SCOPE=paligemma_with_expert.gemma_expert.model.
default OPENPI_DUQUANT_WBITS_DEFAULT=4
default OPENPI_DUQUANT_ABITS=8
default OPENPI_DUQUANT_PERMUTE=1
default OPENPI_DUQUANT_ROTATION=svd
default OPENPI_DUQUANT_BLOCK=16
default OPENPI_DUQUANT_ROW_ROT=restore
default OPENPI_DUQUANT_LS=0.15

evaluate pi05_libero_duquant "$@"

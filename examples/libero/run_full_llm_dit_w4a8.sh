#!/usr/bin/env bash
# Preset full_llm_dit: language model and action expert, permuted, SVD blocks of 64, output rows restored.
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

default OPENPI_DUQUANT_SCOPE=
default OPENPI_DUQUANT_WBITS_DEFAULT=4
default OPENPI_DUQUANT_ABITS=8
default OPENPI_DUQUANT_PERMUTE=1
default OPENPI_DUQUANT_ROTATION=svd
default OPENPI_DUQUANT_BLOCK=64
default OPENPI_DUQUANT_ROW_ROT=restore
default OPENPI_DUQUANT_LS=0.15

evaluate pi05_libero_duquant "$@"

#!/usr/bin/env bash
# Preset simple: the action expert, neither permuted nor rotated.
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

default OPENPI_DUQUANT_SCOPE=paligemma_with_expert.gemma_expert.model.
default OPENPI_DUQUANT_WBITS_DEFAULT=4
default OPENPI_DUQUANT_ABITS=8
default OPENPI_DUQUANT_PERMUTE=0
default OPENPI_DUQUANT_ROTATION=none
default OPENPI_DUQUANT_ROW_ROT=0

evaluate pi05_libero_duquant "$@"

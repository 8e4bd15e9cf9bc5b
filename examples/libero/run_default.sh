#!/usr/bin/env bash
# Preset default, the best we know: language model and action expert, permuted, Hadamard blocks of 64.
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

default OPENPI_DUQUANT_SCOPE=
default OPENPI_DUQUANT_WBITS_DEFAULT=4
default OPENPI_DUQUANT_ABITS=8
default OPENPI_DUQUANT_PERMUTE=1
default OPENPI_DUQUANT_ROTATION=hadamard
default OPENPI_DUQUANT_BLOCK=64
default OPENPI_DUQUANT_ROW_ROT=0
default OPENPI_DUQUANT_LS=0.15

evaluate pi05_libero_duquant "$@"

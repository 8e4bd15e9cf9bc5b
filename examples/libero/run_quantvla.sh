#!/usr/bin/env bash
# Preset quantvla: language model; gate, up, down of the action expert; SVD blocks of 64, output rows restored.
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

default OPENPI_DUQUANT_SCOPE=
default OPENPI_DUQUANT_EXCLUDE='vision_tower|multi_modal_projector|lm_head|embed|gemma_expert.*self_attn'
default OPENPI_DUQUANT_WBITS_DEFAULT=4
default OPENPI_DUQUANT_ABITS=8
default OPENPI_DUQUANT_PERMUTE=1
default OPENPI_DUQUANT_ROTATION=svd
default OPENPI_DUQUANT_BLOCK=64
default OPENPI_DUQUANT_ROW_ROT=restore
default OPENPI_DUQUANT_LS=0.15

evaluate pi05_libero_duquant "$@"

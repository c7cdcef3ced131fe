#!/usr/bin/env bash
# Translate the WMT14 test set with a trained model and score it, with the search of Vaswani et al.
# (2017): beam 4, length penalty 0.6, the mean of the last five checkpoints.
#
#   scripts/evaluate_wmt14.sh RUN_DIR|CHECKPOINT [flags of `fairseq-sparsemixer evaluate`, which go first]
#
# Paths are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

average=(--last 5)
model="${1:-}"
[ ! -f "${model%%:*}" ] || average=() # a checkpoint, or several, in place of a folder
for argument in "$@"; do
    case "$argument" in
    --last | --last=* | --best | --best=* | --checkpoint | --checkpoint=*) average=() ;;
    esac
done
exec fairseq-sparsemixer evaluate --beam 4 --lenpen 0.6 ${average[@]+"${average[@]}"} "$@"

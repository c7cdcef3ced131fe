#!/usr/bin/env bash
# One table of the runs on WMT14, routers x experts x seeds, with the dense model as the baseline.
# All arguments go to `fairseq-sparsemixer table` (see --help); where the first of them is a flag or
# missing, the runs are those below runs/wmt14*.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

defaults=(--baseline dense --output runs/wmt14-table)
case "${1:-}" in
-h | --help) ;;
"" | -*)
    shopt -s nullglob
    runs=(runs/wmt14*/)
    [ "${#runs[@]}" -gt 0 ] || fail "there is no folder runs/wmt14*: train first, or name run folders"
    defaults=("${runs[@]}" "${defaults[@]}")
    ;;
esac
exec fairseq-sparsemixer table "${defaults[@]}" "$@"

#!/usr/bin/env bash
# Train a Switch Transformer on WMT14 English-German on the GPUs of this machine; the same command
# again goes on where it was. All arguments go to `fairseq-sparsemixer train`; see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec fairseq-sparsemixer train "$@"

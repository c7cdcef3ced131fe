#!/usr/bin/env bash
# Train a small Switch Transformer on real English-German text, translate with it and score it.
# All arguments go to `fairseq-sparsemixer demo`; see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec fairseq-sparsemixer demo "$@"

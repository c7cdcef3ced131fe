#!/usr/bin/env bash
# Download WMT14 English-German and build what fairseq-train reads, in data/wmt14_en_de, or with
# --pipeline moses in data/wmt14_en_de_moses (the archives are shared). Paths are relative to the
# checkout. All arguments go to `fairseq-sparsemixer prepare wmt14`; see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec fairseq-sparsemixer prepare wmt14 "$@"

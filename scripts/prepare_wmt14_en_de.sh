#!/usr/bin/env bash
# Download WMT14 English-German and build what fairseq-train reads, in data/wmt14_en_de, or with
# --pipeline moses in data/wmt14_en_de_moses (the archives are shared).
# All arguments go to `fairseq-sparsemixer prepare wmt14`; see `fairseq-sparsemixer prepare --help`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output=data/wmt14_en_de
previous=
for argument in "$@"; do
    case "$previous $argument" in
    "--pipeline moses" | *" --pipeline=moses") output=data/wmt14_en_de_moses ;;
    esac
    previous="$argument"
done
# What is given last counts, so that --output and --downloads can be chosen.
exec fairseq-sparsemixer prepare wmt14 --output "$output" --downloads data/wmt14_en_de/download "$@"

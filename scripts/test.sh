#!/usr/bin/env bash
# Lint, type check and test. --slow adds the tests that take minutes, --gpu those that need a CUDA
# device; all other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

markers="not slow and not gpu"
arguments=()
for argument in "$@"; do
    case "$argument" in
    --slow) markers="${markers/not slow/(slow or not slow)}" ;;
    --gpu) markers="${markers/not gpu/(gpu or not gpu)}" ;;
    *) arguments+=("$argument") ;;
    esac
done

ruff check .
ruff format --check .
mypy fairseq_sparsemixer
# Two processes with one thread each: threads of several processes that wait for each other are
# slower than one.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 -m "$markers" ${arguments[@]+"${arguments[@]}"}

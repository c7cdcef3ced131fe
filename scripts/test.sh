#!/usr/bin/env bash
# Lint, type check and test. --slow adds the tests that take minutes, --gpu those that need a CUDA
# device; all other arguments go to pytest.
#
# With --gpu, a Python that has PyTorch for the GPU, fairseq and pytest is taken as it is (PYTHON or
# python3): no network is needed. Then the tests for the device run alone, and what that Python does
# not have (ruff, mypy, pytest-xdist) is left out.
set -euo pipefail

markers="not slow and not gpu"
arguments=()
gpu=
for argument in "$@"; do
    case "$argument" in
    --slow) markers="${markers/not slow/(slow or not slow)}" ;;
    --gpu)
        markers="${markers/not gpu/(gpu or not gpu)}"
        gpu=1
        ;;
    *) arguments+=("$argument") ;;
    esac
done

left_out() {
    echo "== Left out: $1"
}

python="$(command -v "${PYTHON:-python3}" || true)"
serves='import fairseq, pytest, torch; assert torch.cuda.is_available()'
if [ -n "$gpu" ] && [ -n "$python" ] && "$python" -c "$serves" 2>/dev/null; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    echo "== Testing with $python as it is; nothing is installed"
    left_out "the tests that need no GPU (run without --gpu)"
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    markers="${markers/(gpu or not gpu)/gpu}"
    while IFS= read -r file; do arguments+=("$file"); done < <(grep -rl "mark\.gpu" tests | sort)
else
    source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
    python="$(command -v python)"
fi

has() {
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

if has ruff; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
else
    left_out "ruff, which is not installed"
fi
if has mypy; then
    "$python" -m mypy fairseq_sparsemixer
else
    left_out "mypy, which is not installed"
fi
# Two processes with one thread each: threads of several processes that wait for each other are
# slower than one.
workers=()
if has xdist; then
    workers=(-n 2)
else
    left_out "a second process (pytest-xdist is not installed)"
fi
export OMP_NUM_THREADS=1
exec "$python" -m pytest ${workers[@]+"${workers[@]}"} -m "$markers" \
    ${arguments[@]+"${arguments[@]}"}

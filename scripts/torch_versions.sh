#!/usr/bin/env bash
# Test with several versions of torch: kernels in Triton's interpreter, torch.compile, and a model
# that is trained, resumed and translated with. Prints a line for each, and their output on failure.
#
#   scripts/torch_versions.sh [TORCH[:TRITON]...]    # default: the oldest allowed, and the newest
#
# Each version has an environment of its own, some gigabytes, in .venv-torch/ (or the folder
# ENVIRONMENTS), which is kept. PYTHON and PIP_OPTIONS are as in scripts/environment.sh; no TRITON
# is the version that torch brings (CUDA builds do) or the newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minimum="$(sed -n 's/^MINIMUM_TORCH = "\(.*\)"$/\1/p' fairseq_sparsemixer/version.py)"
[ $# -gt 0 ] || set -- "$minimum.0:3.2.0" newest
selection=(
    tests/moe/test_triton.py
    tests/moe/kernels
    tests/test_compat.py
    tests/models/test_training.py
    tests/models/test_generation.py
)
environments="${ENVIRONMENTS:-.venv-torch}"
mkdir -p "$environments"
# What the tests run with but for these two.
constraints="$environments/constraints.txt"
grep -vE '^(torch|triton)==' scripts/constraints.txt >"$constraints"
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD" PYTHONDONTWRITEBYTECODE=1

failed=
for version in "$@"; do
    name="${version%%:*}"
    folder="$environments/$name"
    wanted=(torch)
    [ "$name" = newest ] || wanted=("torch==$name")
    [ "$name" = "$version" ] || wanted+=("triton==${version#*:}")
    if [ ! -e "$folder/installed" ]; then
        "${PYTHON:-python3}" -m venv --clear "$folder"
        # shellcheck disable=SC2086  # PIP_OPTIONS is a list of words
        "$folder/bin/python" -m pip install --quiet ${PIP_OPTIONS:-} --constraint "$constraints" \
            "${wanted[@]}" --editable '.[dev]'
        touch "$folder/installed"
    fi
    about="$("$folder/bin/python" -c 'import torch, triton
print(f"torch {torch.__version__}, triton {triton.__version__}")')"
    log="$environments/$name.log"
    if "$folder/bin/python" -m pytest -q -p no:cacheprovider "${selection[@]}" >"$log" 2>&1; then
        echo "$about: $(tail -n 1 "$log")"
    else
        echo "$about: FAILED"
        tail -n 40 "$log"
        failed=1
    fi
done
[ -z "$failed" ]

# Sourced by the other scripts: makes .venv in the checkout, once, and puts it on the PATH.
#
# PYTHON       the interpreter, 3.11 or 3.12 (default: the first of python3.11, python3.12, python3)
# PIP_OPTIONS  further options of pip install. Without a GPU, give it PyTorch's index of CPU builds
#              ("--extra-index-url ..."), which saves gigabytes where your own index has none.
#
# A change of setup.py, of the constraints or of the interpreter is installed at the next start,
# and so is an installation that was interrupted.

CHECKOUT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$CHECKOUT"

fail() {
    echo "error: $*" >&2
    exit 1
}

# A path as a value that hydra takes as it is: backslashes escape only before a quote.
quoted() {
    printf "'%s'\n" "$(sed -E "s/(\\\\*)'/\\1\\1\\\\'/g; s/(\\\\+)\$/\\1\\1/" <<<"$1")"
}

find_python() {
    local candidate candidates=(python3.11 python3.12 python3)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed; name yours with PYTHON=/path/to/python $0"
}

interpreter() {
    "$1" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null || true
}

make_environment() {
    local python wanted stamp=.venv/fairseq-sparsemixer.stamp
    python="$(find_python)" || exit 1
    wanted="$("$python" --version) $(cat setup.py scripts/constraints.txt | cksum) $CHECKOUT"
    ! is_made || return 0
    # One at a time: what another that is at it makes need not be made again.
    exec 9<"$CHECKOUT"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        echo "== Waiting for another script that installs into .venv"
        flock 9 || true
    fi
    is_made || install_all
    exec 9<&-
}

# The environment is that which is wanted.
is_made() {
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]
}

install_all() {
    echo "== Installing into .venv, a minute or more (once)"
    rm -f "$stamp"
    local clear=""
    # An environment of another interpreter would be left half in place.
    [ "$(interpreter .venv/bin/python)" = "$(interpreter "$python")" ] || clear=--clear
    # shellcheck disable=SC2086  # no word where it is empty
    "$python" -m venv $clear .venv ||
        fail "no virtual environment: on Debian and Ubuntu install the package python3-venv"
    # shellcheck disable=SC2086  # PIP_OPTIONS is a list of words
    .venv/bin/python -m pip install ${PIP_OPTIONS:-} --constraint scripts/constraints.txt \
        --editable '.[dev]' ||
        fail "pip could not install the requirements (see above): check the network and start again"
    echo "$wanted" >"$stamp"
}

make_environment
export PATH="$CHECKOUT/.venv/bin:$PATH"

#!/usr/bin/env bash
# bash run.sh             set up, then run the pipeline with the preset that fits this machine
# bash run.sh test        set up, then run the tests (arguments go to pytest, say: bash run.sh test -m slow)
# bash run.sh reference   set up, then make the reference study (arguments go to reference.py, say: --list)
# bash run.sh setup       set up only
set -euo pipefail
cd "$(dirname "$0")"

case "${1-}" in
    ""|test|reference|setup) ;;
    -h|--help) sed -n '2,5s/^# //p' run.sh; exit 0 ;;
    *) echo "run.sh: error: unknown argument $1: use none, test, reference, or setup" >&2; exit 2 ;;
esac

# The environment is made once, and again when requirements.txt has changed. PYTHON chooses the interpreter.
venv=.venv
if ! cmp -s requirements.txt "$venv/requirements.txt"; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "run.sh: error: $python is not a Python of 3.10 or newer; name one: PYTHON=python3.12 bash run.sh" >&2; exit 2; }
    [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" || {
        echo "run.sh: error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2; }
    echo "installing requirements.txt into $venv (once; PyTorch is large)"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$venv/requirements.txt"  # last, so that an install that broke off is done again
fi

# The tests in two halves side by side: they are small, and each half keeps one core busy.
test_all() {
    local other code=0 log
    log=$(mktemp)
    half() { ls -S tests/test_*.py | awk -v rest="$1" '(NR % 4 == 0 || NR % 4 == 3) == rest'; }
    "$venv/bin/python" -m pytest $(half 0) > "$log" 2>&1 & other=$!
    "$venv/bin/python" -m pytest $(half 1) || code=$?
    wait "$other" || code=$?
    cat "$log"
    rm "$log"
    return "$code"
}

case "${1-}" in
    "")   "$venv/bin/python" train.py --resume
          "$venv/bin/python" sample.py --route=random
          "$venv/bin/python" oracle.py
          "$venv/bin/python" router.py
          echo "for more: source $venv/bin/activate, then python sample.py --compare"
          "$venv/bin/python" analyze.py ;;  # its last line is the report's path
    test) shift; if [ $# -gt 0 ]; then "$venv/bin/python" -m pytest "$@"; else test_all; fi ;;
    reference) shift; "$venv/bin/python" reference.py "$@" ;;
esac

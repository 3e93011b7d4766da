#!/usr/bin/env bash
# Set up and run all tests: format, lint, types, then the suite with every Python from 3.10 to 3.13 found here: all of it with
# the newest one; the older ones leave out the files below, which try other programs, keys, disks and faults rather than
# Python. The test that compares times runs alone, for what runs beside it slows the larger program more; and once, with
# the python3 of the machine.
# Tests whose programs are missing (gpgsm, NSS, Postfix, OpenDKIM) are skipped; where CI is set, that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

pythons=()
for minor in 13 12 11 10; do
    for python in "$(command -v python3.$minor || true)" "$HOME"/.pyenv/versions/3.$minor.*/bin/python3; do
        if [ -x "$python" ] && "$python" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null; then
            pythons+=("$python")
            break
        fi
    done
done
[ ${#pythons[@]} -gt 0 ] || pythons=(python3)

left_out=() timed=tests/test_cli.py::test_help_starts_in_less_than_twice_the_time_of_argparse
for python in "${pythons[@]}"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    venv=.venv/tests-$version
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
    printf '\n== Python %s\n' "$version"
    if [ "$python" = "${pythons[0]}" ]; then
        "$venv/bin/ruff" format --check .
        "$venv/bin/ruff" check .
        "$venv/bin/mypy" --strict --python-version 3.10 sparkpostSMIME.py
        "$venv/bin/python" -m pytest --quiet $timed
    fi
    "$venv/bin/python" -m pytest --quiet -n 2 --dist loadfile --deselect $timed "${left_out[@]}" tests "$@"
    left_out=(--ignore=tests/test_{scaling,outbox,pipelining,strong,certificates,postfix,readers,review,smtp_faults}.py)
done

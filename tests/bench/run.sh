#!/usr/bin/env bash
# Measure the speed and the memory of the program, and print a table: all parts, or those named, as in `run.sh a c`.
# Needs Python 3.10 or later, with venv, openssl, curl, and Postfix's smtp-sink; leaves nothing behind but .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
PATH="$PWD/.venv/bin:$PATH:/usr/sbin" PYTHONPATH="$PWD/tests" exec python tests/bench/bench.py "$@"

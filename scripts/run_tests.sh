#!/usr/bin/env bash
# The whole test suite in an environment of its own.
#   bash scripts/run_tests.sh [--parity] [pytest arguments]
# --parity also installs torch, transformers, peft and trl, and runs the tests that compare with them.
# Two files of tests run at a time: many of them wait for processes that they have started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

extras=(cpu test)
if [ "${1:-}" = --parity ]; then
    extras+=(parity)
    shift
fi
prepare_environment "${extras[@]}"
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"

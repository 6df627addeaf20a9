#!/usr/bin/env bash
# The whole test suite in an environment of its own.
#   bash scripts/run_tests.sh [--parity] [pytest arguments]
# --parity also installs torch, transformers, peft and trl, and runs the tests that compare with them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

extras=(cpu test)
if [ "${1:-}" = --parity ]; then
    extras+=(parity)
    shift
fi
prepare_environment "${extras[@]}"
exec .venv/bin/python -m pytest "$@"

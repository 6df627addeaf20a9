#!/usr/bin/env bash
# All GPUs of this machine, or NPROC ranks (on a CPU 1 unless NPROC says more).
#   [NPROC=8] bash scripts/launch_one_node.sh train CFG [key=value ...]
# A run that ended early goes on with the same command; RETRIES=N does that by itself, up to N times.
set -euo pipefail
: "${1:?usage: bash scripts/launch_one_node.sh train CFG [key=value ...]}"

for attempt in $(seq 0 "${RETRIES:-0}"); do
    [ "$attempt" = 0 ] || echo "note: attempt $attempt after exit code $code" >&2
    code=0
    erniekit "$@" ${NPROC:+--nproc "$NPROC"} || code=$?
    case $code in
    0 | 2 | 129 | 130 | 143) exit "$code" ;; # done, to be mended by the user, or stopped by the user: again would be no better
    esac
done
exit "$code"

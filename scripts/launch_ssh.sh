#!/usr/bin/env bash
# Several machines over ssh, the first of HOSTS leads. Each has erniekit and, in the same folder as here, the config; all
# share the disk of output_dir.
#   HOSTS="one two" bash scripts/launch_ssh.sh train CFG [--nproc N] [key=value ...]
# HOSTFILE=FILE names them one a line instead, what follows a name on its line is not read.
# MASTER_PORT (29500) must be free on the first; ERNIEKIT names the command on the machines, SSH how to reach them.
set -euo pipefail
: "${1:?usage: HOSTS=\"one two\" bash scripts/launch_ssh.sh train CFG [--nproc N] [key=value ...]}"
if [ -n "${HOSTFILE:-}" ]; then
    [ -r "$HOSTFILE" ] || { echo "error: HOSTFILE=$HOSTFILE cannot be read" >&2; exit 2; }
    HOSTS=$(sed 's/#.*//' "$HOSTFILE" | awk 'NF { print $1 }' | tr '\n' ' ')
fi
read -ra hosts <<<"${HOSTS:?names of the machines, for example HOSTS=\"one two\"}"
read -ra ssh <<<"${SSH:-ssh}"

# command_of NUMBER WORD...: what machine NUMBER runs
command_of() {
    printf 'cd %q && exec env NNODES=%q NODE_RANK=%q MASTER_ADDR=%q MASTER_PORT=%q ' \
        "$PWD" "${#hosts[@]}" "$1" "${MASTER_ADDR:-${hosts[0]#*@}}" "${MASTER_PORT:-29500}"
    printf '%q ' "${ERNIEKIT:-erniekit}" "${@:2}"
}

# A terminal on the other side (-tt): where the connection ends, the launcher there gets SIGHUP, and its ranks save.
others=()
for number in "${!hosts[@]}"; do
    [ "$number" = 0 ] && continue
    "${ssh[@]}" -tt "${hosts[$number]}" "$(command_of "$number" "$@")" </dev/null &
    others+=("$!")
done
trap 'kill -HUP "${others[@]}" 2>/dev/null || true' EXIT

# The first machine has this terminal: Ctrl-C goes there, and its launcher tells the others.
code=0
"${ssh[@]}" -tt "${hosts[0]}" "$(command_of 0 "$@")" || code=$?
for process in "${others[@]}"; do
    wait "$process" || code=$((code ? code : $?))
done
exit "$code"

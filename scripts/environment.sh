# Sourced by quickstart.sh and run_tests.sh, from the repository root: the virtual environment .venv with erniekit in it.
# shellcheck shell=bash

# prepare_environment EXTRA...: make .venv if needed and install `.[EXTRA,...]` editable, unless it already holds exactly
# what setup.py asks for. PYTHON names another interpreter.
prepare_environment() {
    local extras stamp want
    extras=$(IFS=,; echo "$*")
    stamp=.venv/installed-${extras//,/-}
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv with $("${PYTHON:-python3}" --version)"
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "erniekit needs Python 3.10 or newer; name one with PYTHON=/path/to/python" >&2; return 1; }
        "${PYTHON:-python3}" -m venv .venv
    fi
    want=$({ .venv/bin/python --version; cat setup.py erniekit/version.py; } | sha256sum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        echo "reusing .venv: setup.py is unchanged since [$extras] was installed"
        return
    fi
    echo "installing erniekit[$extras] into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    echo "$want" >"$stamp"
}

# Sourced by the other scripts: makes .venv once, installs vlm_adapt into it, and puts it on PATH.
# An interrupted installation is finished the next time; a finished one is not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-}"
for candidate in python3.11 python3.12 python3.13 python3; do
    [ -n "$PYTHON" ] && break
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        PYTHON="$candidate"
    fi
done
if [ -z "$PYTHON" ]; then
    echo "vlm_adapt needs Python 3.11, 3.12 or 3.13: install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    exit 2
fi

VENV="${VENV:-.venv}"
extras="${EXTRAS:-}"
stamp="$VENV/.installed-$(cat pyproject.toml constraints.txt | cksum | tr ' ' '-')${extras//[^a-z]/}"
if [ ! -f "$stamp" ]; then
    echo "== installing into $VENV (PyTorch and its libraries: several GB, once)"
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".$extras"
    rm -f "$VENV"/.installed-*
    touch "$stamp"
fi
export PATH="$PWD/$VENV/bin:$PATH"

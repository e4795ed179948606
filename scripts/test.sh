#!/usr/bin/env bash
# Sets up what the tests need and passes them. `--all`, or CI=true, also runs the slow ones.
set -euo pipefail
export EXTRAS="[test]"
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

ruff check .
ruff format --check .
mypy
pytest -q
if [ "${1:-}" = "--all" ] || [ "${CI:-}" = "true" ]; then
    pytest -q -m "slow or network"
fi

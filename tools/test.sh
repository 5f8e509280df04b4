#!/usr/bin/env bash
# Set up (with the test requirements) and run the tests; arguments go to pytest.
#
#   tools/test.sh [-m slow] [-k NAME] ...      VENV=folder picks the environment, VARIANT=cuda the build,
#                                              PAIR=1.6 the older torch and TorchRec (in a VENV of its own),
#                                              WORKERS=N how many files are tested side by side (default 2; 0: one
#                                              after another in this process, as -s and --pdb need it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
bash tools/setup.sh "${VARIANT:-cpu}" --test ${PAIR:+--pair "$PAIR"} "$venv"
exec "$venv/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile "$@"

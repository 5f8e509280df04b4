#!/usr/bin/env bash
# Set up (with the test requirements) and run the tests; arguments go to pytest.
#
#   tools/test.sh [-m slow] [-k NAME] ...      VENV=folder picks the environment, VARIANT=cuda the build,
#                                              PAIR=1.6 the older torch and TorchRec (in a VENV of its own),
#                                              WORKERS=N how many files are tested side by side (default 3: many
#                                              tests wait for processes; 0: one after another in this process,
#                                              as -s and --pdb need it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
bash tools/setup.sh "${VARIANT:-cpu}" --test ${PAIR:+--pair "$PAIR"} "$venv"
# About a hundred processes start below; each would compile the whole package anew where nothing may be kept.
unset PYTHONDONTWRITEBYTECODE
# In the order of the folders: the few long tests of distributed/ and launch/ begin before the many short ones.
exec "$venv/bin/python" -m pytest -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"

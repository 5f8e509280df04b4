#!/usr/bin/env bash
# Build the documentation into runs/site/html. A warning or a dead link fails.
#
#   tools/site.sh      VENV=.venv-docs is the default: a small environment of its own, without torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv-docs}

want=$(sha256sum < requirements/docs.txt)
if [[ "$(cat "$venv/.embsearch-docs" 2> /dev/null)" != "$want" ]]; then
    echo "site: packages of requirements/docs.txt into $venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps -r requirements/docs.txt
    echo "$want" > "$venv/.embsearch-docs"
fi
"$venv/bin/python" tools/site/links.py
"$venv/bin/python" tools/site/stage.py runs/site/source
# Not --quiet: it hides warnings from --strict, too. The variable silences a notice about Material's own future.
NO_MKDOCS_2_WARNING=1 "$venv/bin/python" -m mkdocs build --strict --config-file runs/site/mkdocs.yml
echo "site: runs/site/html/index.html; with search: python -m http.server -d runs/site/html"

#!/usr/bin/env bash
# Set up, then the main job on bundled synthetic data: prepare, search, retrain the found widths and what they have to
# beat (UES-32, the uniform widths around the found size, FDO and magnitude pruning of that size), evaluate, report.
#
#   tools/demo.sh      ROWS=400000 RUN=runs/demo VENV=.venv VARIANT=cpu are the defaults
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv} run=${RUN:-runs/demo} rows=${ROWS:-400000} data=runs/data/synthetic
# A model this small gains nothing from a second thread, and on a busy machine waiting for it costs ten times.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
bash tools/setup.sh "${VARIANT:-cpu}" "$venv"
PATH="$PWD/$venv/bin:$PATH"
[[ $venv == /* ]] && PATH="$venv/bin:$PATH"

step() {
    echo "+ $*"
    "$@"
}

if [[ ! -e $data/schema.json ]]; then
    step python launch/prepare.py --format synthetic --rows "$rows" --out "$data"
fi
step python launch/search.py --config configs/synthetic/adass_deepfm.yaml --run.dir "$run"
step python launch/retrain.py --run "$run" --name adass
step python launch/retrain.py --run "$run" --allocation ues-32
step python launch/retrain.py --run "$run" --allocation bracket
# FDO drops no field, so it needs a column of each.
size=$(python -c '
import json, sys
found, schema = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("allocation", "schema"))
print(max(found["sizes"]["parameters"], sum(field["cardinality"] for field in schema["fields"])))' "$run")
for rule in fdo magnitude; do
    step python launch/search.py --config configs/synthetic/truncation.yaml --run.dir "$run/cut" --search.rule "$rule" \
        --search.budget "$size"
    step python launch/retrain.py --run "$run" --allocation "$run/cut/allocations/$rule.json" --name "$rule"
done
for model in "$run"/retrain/*; do
    step python launch/evaluate.py --run "$model"
done
step python launch/report.py "$run"

page=$(find "$run/report" -name '*.html' 2> /dev/null | head -n 1)
[[ -n $page ]] || { echo "demo: no HTML report under $run/report" >&2; exit 1; }
echo "demo: done; open $page"

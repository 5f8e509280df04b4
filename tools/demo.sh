#!/usr/bin/env bash
# Set up, then the main job on bundled synthetic data: prepare, search, retrain the found widths and two
# uniform baselines, evaluate, report.
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
for width in 32 16; do
    step python launch/retrain.py --run "$run" --allocation "ues-$width" --name "ues-$width"
done
for name in adass ues-32 ues-16; do
    step python launch/evaluate.py --run "$run/retrain/$name"
done
step python launch/report.py "$run"

page=$(find "$run/report" -name '*.html' 2> /dev/null | head -n 1)
[[ -n $page ]] || { echo "demo: no HTML report under $run/report" >&2; exit 1; }
echo "demo: done; open $page"

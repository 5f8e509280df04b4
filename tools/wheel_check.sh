#!/usr/bin/env bash
# Does a wheel alone do what the demo does? Builds one, installs it with its pinned packages into an empty environment,
# and runs the demo's commands with `embsearch`, in a folder away from the checkout.
#
#   tools/wheel_check.sh [FOLDER]      default: a temporary folder, which is removed; ROWS=20000, PYTHON=python3
#
# TORCH_INDEX_URL picks the index of torch, as for tools/setup.sh. Some minutes, most of them for installing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout=$PWD rows=${ROWS:-20000}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONPATH
if (($#)); then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi

step() {
    echo "+ $*"
    "$@"
}

# From a copy, so that neither the checkout gets a build folder nor the wheel what an earlier build left.
mkdir "$folder/source"
tar -C "$checkout" --exclude=.git --exclude='.venv*' --exclude=runs --exclude=build --exclude='*.egg-info' \
    --exclude='*.so' -cf - . | tar -C "$folder/source" -xf -
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip -q --disable-pip-version-check --no-input "$@"; }
[[ -z ${TORCH_INDEX_URL:-} ]] ||
    pip install --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements/common.txt)"
step pip install -r requirements/common.txt
step pip install --no-deps -r requirements/cpu.txt
step pip wheel --no-deps --no-build-isolation -w "$folder" "$folder/source"
rm -rf "$folder/source"
step pip install --no-deps "$folder"/embsearch_dist-*.whl

PATH="$folder/venv/bin:$PATH"
mkdir "$folder/work"
cd "$folder/work"
embsearch --help > /dev/null
where=$(python -c 'import embsearch_dist; print(embsearch_dist.__file__)')
[[ $where == "$folder/venv/"* ]] || { echo "wheel: embsearch_dist comes from $where" >&2; exit 1; }
step embsearch doctor
embsearch search --help > help.txt  # not into a pipe that head closes: that would end this script
head -n 3 help.txt
configs=$(python -c 'import pathlib, launch; print(pathlib.Path(launch.__file__).parents[1] / "configs")')
step embsearch prepare --format synthetic --rows "$rows" --out runs/data/synthetic
step embsearch search --config "$configs/synthetic/adass_deepfm.yaml" --run.dir runs/demo
step embsearch retrain --run runs/demo --name adass
step embsearch retrain --run runs/demo --allocation bracket
for rule in fdo magnitude; do
    # FDO keeps every field, so it may need more than the search has found.
    step embsearch search --config "$configs/synthetic/truncation.yaml" --run.dir runs/demo/cut --search.rule "$rule" \
        --search.budget 25%
    step embsearch retrain --run runs/demo --allocation "runs/demo/cut/allocations/$rule.json" --name "$rule"
done
for model in runs/demo/retrain/*; do
    step embsearch evaluate --run "$model"
done
step embsearch report runs/demo
[[ -s runs/demo/report/index.html ]] || { echo "wheel: no report" >&2; exit 1; }
echo "wheel: $(basename "$folder"/*.whl) runs alone"

#!/usr/bin/env bash
# Make a virtual environment that runs embsearch_dist; does nothing when it is up to date.
#
#   tools/setup.sh [cpu|cuda] [--test] [--pair 1.6] [FOLDER]      defaults: cpu, .venv
#
# --test adds pytest, ruff and mypy. --pair 1.6 takes torch 2.11 and TorchRec 1.6 in place of torch 2.13 and
# TorchRec 1.8. PYTHON=... picks the interpreter (3.11 to 3.13).
# On Linux the default package index may answer with CUDA builds of torch (some GB). To get the CPU build,
# set TORCH_INDEX_URL to the "CPU" index address that the PyTorch site's install selector prints; the same
# variable picks a CUDA version for `cuda`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

variant=cpu folder=.venv test=0 pair=
while (($#)); do
    case "$1" in
        cpu | cuda) variant=$1 ;;
        --test) test=1 ;;
        --pair) pair=${2:-}; shift; [[ -n $pair ]] || { echo "setup: --pair needs a version" >&2; exit 2; } ;;
        --pair=*) pair=${1#--pair=} ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) echo "setup: unknown option $1 (see --help)" >&2; exit 2 ;;
        *) folder=$1 ;;
    esac
    shift
done
[[ $pair == 1.8 ]] && pair=  # what the files pin anyway
if [[ -n $pair && ! -e requirements/pair-$pair.txt ]]; then
    known=$(cd requirements && printf '%s ' pair-*.txt | sed 's/pair-//g; s/\.txt//g')
    echo "setup: --pair $pair: known are 1.8 (the default) and $known" >&2
    exit 2
fi

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.13 found; on Debian or Ubuntu: apt-get install python3.11 python3.11-venv"
}

make_venv() {
    local python=$1 version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -m venv "$folder" > /dev/null 2>&1 && return
    # Debian's python3 has venv but not ensurepip; the system's pip can put a pip inside all the same.
    if "$python" -m venv --clear --without-pip "$folder" > /dev/null 2>&1 &&
        "$python" -m pip --python "$folder/bin/python" install -q pip > /dev/null 2>&1; then
        return
    fi
    "$python" -m virtualenv -q "$folder" > /dev/null 2>&1 && return
    rm -rf "$folder"
    fail "cannot make a virtual environment; on Debian or Ubuntu: apt-get install python$version-venv"
}

# A stamp holds what a finished installation was made from; a mark says that one has begun.
kind=$variant${pair:+-$pair}
stamp=$folder/.embsearch-$kind mark=$folder/.embsearch-unfinished
digest() { cat "$@" setup.py embsearch_dist/*/*.c | sha256sum | cut -d ' ' -f 1; }
common_digest=$(digest requirements/common.txt "requirements/$variant.txt" ${pair:+"requirements/pair-$pair.txt"})
test_digest=$(digest requirements/test.txt)
here=$(pwd -P)

done_before() { [[ -f $1 && "$(cat "$1")" == "$2 $here" && ! -e $mark ]]; }
python=$folder/bin/python

for other in "$folder"/.embsearch-cpu* "$folder"/.embsearch-cuda*; do
    [[ $other != "$stamp" && -e $other ]] &&
        fail "$folder is set up for ${other##*/.embsearch-}; give another folder, or remove it first"
done

# Two set-ups at once (a test run beside a demo) would break each other's environment.
if command -v flock > /dev/null; then
    mkdir -p "$(dirname "$folder")"
    exec 9> "${folder%/}.lock"
    flock 9
fi

if ! "$python" -m pip --version > /dev/null 2>&1 || [[ -e $mark ]]; then
    made=("$folder"/.embsearch-*)
    if [[ ! -e ${made[0]} && -n "$(ls -A "$folder" 2> /dev/null)" ]]; then
        fail "$folder exists, has no pip, and was not made by this script; give another folder, or remove it first"
    fi
    [[ -e ${made[0]} ]] && say "removing the half-built $folder"
    rm -rf "$folder"
    mkdir -p "$folder"
    : > "$mark"  # from here on it is ours to remove
    base_python=$(find_python)
    say "making $folder with $("$base_python" --version)"
    make_venv "$base_python"
fi

# The files to install from: those of requirements/, or copies with the versions of another pair.
requirements=requirements
if [[ -n $pair ]]; then
    requirements=$folder/requirements
    mkdir -p "$requirements"
    for file in common "$variant" test; do
        awk -F== 'NR == FNR { if (NF == 2) pin[$1] = $0; next } { print ($1 in pin) ? pin[$1] : $0 }' \
            "requirements/pair-$pair.txt" "requirements/$file.txt" > "$requirements/$file.txt"
    done
fi

pip_install() {
    "$python" -m pip install -qq --disable-pip-version-check --no-input "$@" ||
        fail "pip install $* failed; run this again to start over"
}

# Compiled kernels lie in the working tree, where git clean takes them; without a compiler there are none.
kernels() { find embsearch_dist -name '*.so' | wc -l; }

install_itself() {
    say "embsearch_dist itself (editable)"
    pip_install --no-deps --no-build-isolation --editable .
    kernels > "$folder/.embsearch-kernels"
}

level=--quick
if ! done_before "$stamp" "$common_digest"; then
    level=
    rm -f "$folder"/.embsearch-*
    touch "$mark"
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        say "torch from TORCH_INDEX_URL"
        pip_install --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' "$requirements/common.txt")"
    elif [[ $variant == cpu ]]; then
        say "torch from the default index (if it brings CUDA packages: stop, set TORCH_INDEX_URL, see --help)"
    fi
    wanted=(-r "$requirements/common.txt")
    [[ $test == 1 ]] && wanted+=(-r "$requirements/test.txt")
    say "packages of ${wanted[*]}"
    pip_install "${wanted[@]}"
    # The other FBGEMM build shares this one's folder: removing it later would take files of both.
    "$python" -m pip uninstall --quiet --yes fbgemm-gpu fbgemm-gpu-cpu > /dev/null 2>&1 || true
    say "TorchRec and FBGEMM for $kind"
    pip_install --no-deps -r "$requirements/$variant.txt"
    install_itself
    echo "$common_digest $here" > "$stamp"
    [[ $test == 1 ]] && echo "$test_digest $here" > "$folder/.embsearch-test"
    rm -f "$mark"
elif [[ $test == 1 ]] && ! done_before "$folder/.embsearch-test" "$test_digest"; then
    say "packages of requirements/test.txt"
    pip_install -r "$requirements/test.txt"
    echo "$test_digest $here" > "$folder/.embsearch-test"
fi
[[ "$(cat "$folder/.embsearch-kernels" 2> /dev/null)" == "$(kernels)" ]] || install_itself

say "checking the installation"
if ! "$python" -m embsearch_dist.doctor $level; then
    rm -f "$folder"/.embsearch-*
    fail "the installation does not work: see FAIL above"
fi
say "ready: source $folder/bin/activate"

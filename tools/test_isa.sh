#!/usr/bin/env bash
# Run the tests as other processors would: each setting limits what torch, oneDNN, MKL and FBGEMM may use, so that sums
# are added up in other orders. One line for each setting; a setting whose log is complete is not run again.
#
#   tools/test_isa.sh LOGS [SETTING-THREADS ...] [-- arguments of pytest]
#
# SETTING is one of native, avx512, avx2, sse; THREADS 1 or more. Default: native-1 native-2 avx512-1 avx2-1 avx2-2 sse-1.
# PYTHON=... picks the interpreter (default .venv/bin/python), WORKERS=N how many files are tested side by side (2).
set -euo pipefail
[[ $# -gt 0 && $1 != -* ]] || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
mkdir -p "$1"
logs=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment() {
    case $1 in
        native) ;;
        avx512) echo ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512 ;;
        avx2) echo ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AVX2 \
            FBGEMM_ENABLE_INSTRUCTIONS=AVX2 ;;
        sse) echo ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE \
            FBGEMM_NO_ASMJIT=1 ;;
        *) echo "test_isa: no setting $1 (native, avx512, avx2, sse)" >&2; return 2 ;;
    esac
}

settings=()
while [[ $# -gt 0 && $1 != -- ]]; do
    settings+=("$1")
    shift
done
shift $(($# > 0)) # the --
[[ ${#settings[@]} -gt 0 ]] || settings=(native-1 native-2 avx512-1 avx2-1 avx2-2 sse-1)
for setting in "${settings[@]}"; do # a wrong name is told before hours of tests
    environment "${setting%-*}" > /dev/null
    [[ $setting =~ -[1-9][0-9]*$ ]] || { echo "test_isa: $setting does not end in a number of threads" >&2; exit 2; }
done

python=${PYTHON:-.venv/bin/python} failed=0
for setting in "${settings[@]}"; do
    threads=${setting##*-} log=$logs/$setting.log code=1
    workers=$((${WORKERS:-2} > threads ? ${WORKERS:-2} / threads : ${WORKERS:-2} > 0))
    read -ra limits <<< "$(environment "${setting%-*}")"
    if [[ ! -e $log ]]; then
        env "${limits[@]}" EMBSEARCH_TEST_THREADS="$threads" OMP_NUM_THREADS="$threads" \
            "$python" -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder -p no:cacheprovider "$@" > "$log.part" 2>&1 && code=0 || code=$?
        # 0 and 1: all tests ran. What was interrupted begins anew next time.
        [[ $code -le 1 ]] && mv "$log.part" "$log"
    fi
    if [[ -e $log ]]; then
        echo "$setting: $(tail -n 1 "$log")"
        grep -E '^(FAILED|ERROR) ' "$log" && failed=1
    else
        echo "$setting: not complete (pytest ended with $code), see $log.part"
        failed=1
    fi
done
exit "$failed"

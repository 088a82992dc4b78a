#!/usr/bin/env bash
# Tests as on an older x86 processor: bash tests/on_older_x86.sh sse|avx2|avx512 [pytest's arguments]
#
# torch, oneDNN, MKL, NumPy and Numba are told to use no newer instructions; nothing is emulated. avx512: without bfloat16.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
sse)
    export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
    export OPENBLAS_CORETYPE=Nehalem NUMBA_CPU_NAME=nehalem
    export NPY_DISABLE_CPU_FEATURES="AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
    ;;
avx2)
    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
    export OPENBLAS_CORETYPE=Haswell NUMBA_CPU_NAME=haswell
    ;;
avx512)
    export ONEDNN_MAX_CPU_ISA=AVX512_CORE OPENBLAS_CORETYPE=SkylakeX NUMBA_CPU_NAME=skylake-avx512
    ;;
*)
    echo "${0##*/}: ${1:-nothing} is not sse, avx2 or avx512" >&2
    exit 2
    ;;
esac
export NUMBA_CPU_FEATURES=""
exec "${PYTHON:-python}" -m pytest -q -p no:cacheprovider "${@:2}"

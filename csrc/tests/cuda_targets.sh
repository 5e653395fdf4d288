#!/usr/bin/env bash
# Compiles every CUDA kernel for every target from compute capability 7.5 on, and says what each takes. Warnings are errors,
# and so are registers that spill. Usage: csrc/tests/cuda_targets.sh [all]
# Machine code for a major version runs on its minor ones, so that one of each is enough, and Jetson Orin's (87), whose
# code ships; with `all`, every one that this nvcc has.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() {
    local target=$1 source=$2 work=$3 root=$4
    local log="$work/$target-$(basename "$source").log"
    if ! nvcc -std=c++17 -O3 -Werror all-warnings -gencode "arch=compute_$target,code=sm_$target" -Xptxas -v \
        -Xcompiler=-Wall,-Wextra,-Werror -I"$root/csrc" -c "$root/$source" -o "$log.o" >"$log" 2>&1; then
        cat "$log"
        return 1
    fi
    local kernels registers spills
    kernels=$(grep -c 'Compiling entry function' "$log")
    registers=$(grep -o 'Used [0-9]* registers' "$log" | sort -k2 -n | tail -1)
    spills=$(grep -o '[0-9]* bytes spill stores' "$log" | awk '{total += $1} END {print total + 0}')
    echo "sm_$target $source: $kernels kernels, $registers at most, $spills bytes spilled"
    # Some bytes at the edge of a loop cost nothing; more of them would be in it.
    [ "$spills" -le 512 ]
}
export -f compile

targets=$(nvcc --list-gpu-arch | sed 's/compute_//' | awk '$1 >= 75')
if [ "${1:-}" != all ]; then
    targets=$(awk '$1 == 75 || $1 == 87 || $1 % 10 == 0' <<<"$targets")
fi
for target in $targets; do
    for source in csrc/decoder/decoder_cuda.cu csrc/splice/splice_cuda.cu; do
        echo "$target $source"
    done
done | xargs -P "$(nproc)" -L1 bash -c 'compile "$0" "$1" "'"$work"'" "'"$root"'"'

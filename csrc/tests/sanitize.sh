#!/usr/bin/env bash
# Builds the kernels and their test runner with sanitizers, and runs it: once for addresses and undefined behaviour, once
# for races between threads. Usage: csrc/tests/sanitize.sh [BUILD_FOLDER]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$(mktemp -d)}
for sanitizers in address,undefined thread; do
    echo "== $sanitizers"
    cmake -S "$root" -B "$build/$sanitizers" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
        -DCMAKE_CXX_FLAGS="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer" \
        -DBIOMEDGPT_CUDA=OFF -DBIOMEDGPT_BUILD_PYTHON=OFF -DBIOMEDGPT_BUILD_TESTS=ON
    cmake --build "$build/$sanitizers" --parallel 2
    "$build/$sanitizers/kernel_tests"
    "$build/$sanitizers/gpu_tests"
done

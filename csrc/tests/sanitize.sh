#!/usr/bin/env bash
# Builds the kernels and their test runners with sanitizers, and runs them: once for addresses and undefined behaviour, once
# for races between threads (of which the emulation of a GPU has one). Usage: csrc/tests/sanitize.sh [BUILD_FOLDER]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$(mktemp -d)}
for sanitizers in address,undefined thread; do
    echo "== $sanitizers"
    cmake -S "$root" -B "$build/$sanitizers" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
        -DCMAKE_CXX_FLAGS="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer" \
        -DBIOMEDGPT_CUDA=OFF -DBIOMEDGPT_BUILD_PYTHON=OFF -DBIOMEDGPT_BUILD_TESTS=ON
    runners=kernel_tests
    [ "$sanitizers" = thread ] || runners="kernel_tests gpu_tests"
    # shellcheck disable=SC2086 # several words
    cmake --build "$build/$sanitizers" --parallel 2 --target $runners
    for runner in $runners; do
        "$build/$sanitizers/$runner"
    done
done

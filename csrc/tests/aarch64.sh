#!/usr/bin/env bash
# Builds the kernels and their test runner for aarch64 and runs it in an emulator, on a processor with every extension
# and on one with none. Needs Debian's g++-aarch64-linux-gnu and qemu-user. Usage: csrc/tests/aarch64.sh [BUILD_FOLDER]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$(mktemp -d)}
cmake -S "$root" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS=-Werror \
    -DBIOMEDGPT_CUDA=OFF -DBIOMEDGPT_BUILD_PYTHON=OFF -DBIOMEDGPT_BUILD_TESTS=ON
cmake --build "$build" --parallel 2 --target kernel_tests
for cpu in max cortex-a72; do
    echo "== $cpu"
    EMULATED=1 qemu-aarch64 -cpu "$cpu" -L /usr/aarch64-linux-gnu "$build/kernel_tests"
done

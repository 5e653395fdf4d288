#!/usr/bin/env bash
# Builds the wheel for Linux on aarch64 (Jetson, Arm boxes) on an x86-64 machine, without CUDA, checks what is in it,
# and loads its shared objects where there is an emulator. The wheel is for the version of CPython that PYTHON_VERSION
# names, or else for that of python3; JetPack 6 has 3.10. That Python has to be installed here too, with its headers.
# Needs g++-aarch64-linux-gnu, and qemu-user to load. Debian 12's compiler makes what JetPack 6 can load; if that of a
# newer system does not, the check says so. Usage: csrc/aarch64_wheel.sh OUT_FOLDER [PYTHON_VERSION]
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 OUT_FOLDER [PYTHON_VERSION]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
out=$1
for needed in "python${2:-3}" aarch64-linux-gnu-g++; do
    if ! command -v "$needed" >/dev/null; then
        echo "$needed is not installed" >&2
        exit 1
    fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

# Tools of the build are installed first, since pip would choose those for aarch64 once the environment says so.
"python${2:-3}" -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install --quiet scikit-build-core pybind11 cmake ninja
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX").replace("x86_64", "aarch64"))')

# The headers are those of the Python here. A pyconfig.h for aarch64 has the same sizes; it differs in x87 instructions,
# the signedness of wchar_t and the like, which nothing uses but Python itself. Debian has a pyconfig.h that looks for
# the one of its architecture: it finds the one of this machine, and elsewhere the link leads nowhere.
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
mkdir -p "$work/include/aarch64-linux-gnu"
ln -s "$(dirname "$headers")/x86_64-linux-gnu/$(basename "$headers")" "$work/include/aarch64-linux-gnu/"

settings=(
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CXX_FLAGS=-isystem $work/include"
    -DPYBIND11_USE_CROSSCOMPILING=ON # takes the suffix below, and runs no Python of the target
    -DBIOMEDGPT_CUDA=OFF
)
(
    export _PYTHON_HOST_PLATFORM=linux-aarch64 # the wheel's tag
    export SETUPTOOLS_EXT_SUFFIX=$suffix
    SKBUILD_CMAKE_ARGS=$(IFS=';' && echo "${settings[*]}")
    export SKBUILD_CMAKE_ARGS
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/wheel" "$root"
)
wheel=$(echo "$work"/wheel/*.whl)
"$python" "$root/csrc/check_wheel.py" "$wheel"

if command -v qemu-aarch64 >/dev/null; then
    "$python" -m zipfile -e "$wheel" "$work/content"
    native="$work/content/biomedgpt_edge/_native$suffix"
    # There is no Python for aarch64 here: its names stand for it, so that the loader has to find all others.
    {
        aarch64-linux-gnu-nm -D --undefined-only "$native" | sed -nE 's/^ +U (_?Py\w+)$/extern "C" { char \1[64]; }/p'
        cat <<'PROGRAM'
#include <dlfcn.h>
#include <cstdio>
int main(int count, char** arguments) {
    for (int i = 1; i + 1 < count; i += 2) {
        void* library = dlopen(arguments[i], RTLD_NOW);
        if (library == nullptr || dlsym(library, arguments[i + 1]) == nullptr) {
            std::fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        std::printf("loaded in an emulator, without Python: %s\n", arguments[i + 1]);
    }
}
PROGRAM
    } >"$work/load.cpp"
    aarch64-linux-gnu-g++ -rdynamic "$work/load.cpp" -o "$work/load"
    qemu-aarch64 -L /usr/aarch64-linux-gnu "$work/load" \
        "$native" PyInit__native "$work/content/biomedgpt_edge/_ort_ops.so" RegisterCustomOps
else
    echo "qemu-aarch64 is not installed: the shared objects were not loaded"
fi
mkdir -p "$out"
cp "$wheel" "$out/"
echo "$out/$(basename "$wheel")"

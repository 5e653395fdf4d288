"""What the machine a benchmark runs on is, and how fast it can be: the yardsticks that results are held against.

`describe` names it. `compile_peak_loops` and `probe_peaks` find the arithmetic rate that no kernel can exceed, from
loops that touch nothing but registers. `probe_bandwidth` finds what the memory gives.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biomedgpt_edge.bench.counters import usable_processors
from biomedgpt_edge.bench.host import last_level_cache

CPUINFO = Path("/proc/cpuinfo")
# Flags that decide which instructions a matrix product can use, in the words of /proc/cpuinfo (x86-64, then aarch64).
FLAGS_THAT_MATTER = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2", "sme"),
)
LIBRARIES = ("numpy", "torch", "onnxruntime")


def cpu_flags() -> frozenset[str]:
    """Flags of the first processor; empty where Linux does not say."""
    return frozenset(_cpuinfo("flags", "Features").split())


def _cpuinfo(*keys: str) -> str:
    if not CPUINFO.exists():
        return ""
    for line in CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def describe(threads: int) -> dict[str, Any]:
    """The machine and the libraries that results depend on. Absent libraries are None."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    flags = cpu_flags()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS_THAT_MATTER if flag in flags],
        "cores usable": len(usable_processors()),
        "threads used": threads,
        "last-level cache MiB": (last_level_cache() or 0) / 2**20,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "load average at start": os.getloadavg()[0],
    }


# Every loop is `double run(long n)`: n steps of independent sums in registers, and a value that depends on all of them
# so that no step can be left out. Twelve sums hide a latency of four cycles on three units.
_FLOAT_LOOP = """
typedef float Vector __attribute__((vector_size(LANES * 4)));
extern "C" double run(long n) {
    Vector sums[12], factor, term;
    for (int lane = 0; lane < LANES; ++lane) {
        factor[lane] = 0.999f;  // with it the sums approach 1 and never become subnormal, which would be slower
        term[lane] = 0.001f;
    }
    for (int i = 0; i < 12; ++i) sums[i] = term * (float)i;
    for (long step = 0; step < n; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) sums[i] = sums[i] * factor + term;
    }
    double total = 0;
    for (int i = 0; i < 12; ++i) total += sums[i][0];
    return total;
}
"""

_VDPBF16PS_LOOP = """
#include <immintrin.h>
extern "C" double run(long n) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sums[12];
    for (int i = 0; i < 12; ++i) sums[i] = _mm512_set1_ps(i);
    for (long step = 0; step < n; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], ones, ones);
    }
    double total = 0;
    for (int i = 0; i < 12; ++i) total += _mm512_reduce_add_ps(sums[i]);
    return total;
}
"""

# Six tiles are sums and two are factors. Linux gives a process its tiles only when asked, hence the system call.
_AMX_LOOP = """
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
extern "C" double run(long n) {
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) != 0) return -1;
    alignas(64) unsigned char config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
    }
    alignas(64) unsigned short ones[512];
    for (int i = 0; i < 512; ++i) ones[i] = 0x3f80;
    float sums[256];
    _tile_loadconfig(config);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    for (long step = 0; step < n; ++step) {
        _tile_dpbf16ps(0, 6, 7); _tile_dpbf16ps(1, 6, 7); _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7); _tile_dpbf16ps(4, 6, 7); _tile_dpbf16ps(5, 6, 7);
    }
    double total = 0;
    _tile_stored(0, sums, 64); total += sums[0];
    _tile_stored(5, sums, 64); total += sums[0];
    _tile_release();
    return total;
}
"""

_BFMMLA_LOOP = """
#include <arm_neon.h>
extern "C" double run(long n) {
    const bfloat16x8_t ones = vreinterpretq_bf16_u16(vdupq_n_u16(0x3f80));
    float32x4_t sums[12];
    for (int i = 0; i < 12; ++i) sums[i] = vdupq_n_f32(i);
    for (long step = 0; step < n; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) sums[i] = vbfmmlaq_f32(sums[i], ones, ones);
    }
    double total = 0;
    for (int i = 0; i < 12; ++i) total += vgetq_lane_f32(sums[i], 0);
    return total;
}
"""


@dataclass(frozen=True)
class PeakSource:
    """A loop that reaches a processor's arithmetic peak, where the processor has the instructions.

    Attributes:
        name: what is printed.
        kind: "fp32" or "bf16", the operands' type; sums are float32.
        needs: flags of /proc/cpuinfo; all must be there.
        flops_per_step: floating-point operations in a step of the loop, a multiplication and an addition being two.
    """

    name: str
    kind: str
    needs: frozenset[str]
    compiler_flags: tuple[str, ...]
    source: str
    flops_per_step: int


def _float_source(name: str, needs: set[str], lanes: int, *compiler_flags: str) -> PeakSource:
    flags = (f"-DLANES={lanes}", *compiler_flags)
    return PeakSource(f"fp32 {name}", "fp32", frozenset(needs), flags, _FLOAT_LOOP, 12 * lanes * 2)


# Best first within a kind. The last of fp32 needs nothing and runs anywhere.
_AMX_FLAGS = ("-mamx-tile", "-mamx-bf16")
_VDPBF16PS_FLAGS = ("-mavx512f", "-mavx512bf16")
PEAK_SOURCES = (
    _float_source("AVX-512", {"avx512f"}, 16, "-mavx512f", "-mprefer-vector-width=512"),
    _float_source("AVX2", {"avx2", "fma"}, 8, "-mavx2", "-mfma"),
    _float_source("128-bit vectors", set(), 4),
    PeakSource("bf16 AMX", "bf16", frozenset({"amx_bf16"}), _AMX_FLAGS, _AMX_LOOP, 6 * 16 * 16 * 64),
    PeakSource("bf16 VDPBF16PS", "bf16", frozenset({"avx512_bf16"}), _VDPBF16PS_FLAGS, _VDPBF16PS_LOOP, 12 * 16 * 4),
    PeakSource("bf16 BFMMLA", "bf16", frozenset({"bf16", "asimd"}), ("-march=armv8.2-a+bf16",), _BFMMLA_LOOP, 12 * 32),
)


@dataclass(frozen=True)
class PeakLoop:
    """A compiled `PeakSource` and how many of its steps take about `SECONDS_PER_PROBE`."""

    name: str
    kind: str
    flops_per_step: int
    steps: int
    run: Callable[[int], float]


SECONDS_PER_PROBE = 0.02


def _compile(compiler: str, source: PeakSource, folder: Path) -> PeakLoop | str:
    """The loop, or why there is none."""
    library = folder / (source.name.replace(" ", "-") + ".so")
    command = [compiler, "-O3", "-ffp-contract=fast", "-shared", "-fPIC", *source.compiler_flags, "-x", "c++", "-"]
    result = subprocess.run([*command, "-o", str(library)], input=source.source, capture_output=True, text=True)
    if result.returncode:
        reasons = [line for line in result.stderr.splitlines() if "error" in line]
        return f"{compiler} refused it: {(reasons or ['no message'])[0]}"
    run = ctypes.CDLL(str(library)).run  # a call through ctypes lets other threads of the interpreter run
    run.argtypes, run.restype = [ctypes.c_long], ctypes.c_double
    steps = 1000
    while True:
        start = time.perf_counter()
        if run(steps) < 0:
            return "the system does not grant it"
        seconds = time.perf_counter() - start
        if seconds > SECONDS_PER_PROBE / 4:
            steps = int(steps * SECONDS_PER_PROBE / seconds) + 1
            return PeakLoop(source.name, source.kind, source.flops_per_step, steps, run)
        steps *= 4


def compile_peak_loops(folder: Path) -> tuple[list[PeakLoop], dict[str, str]]:
    """Compiles into `folder` the loops this machine can run: per kind all of bf16, and the widest of fp32.

    Returns:
        The loops, and for each loop or kind that is missing the reason.
    """
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return [], dict.fromkeys(("fp32", "bf16"), "no compiler: not probed")
    loops: list[PeakLoop] = []
    missing: dict[str, str] = {}
    flags = cpu_flags()
    for source in PEAK_SOURCES:
        narrower = source.kind == "fp32" and any(loop.kind == "fp32" for loop in loops)
        if narrower or not source.needs <= flags:
            continue
        loop = _compile(compiler, source, folder)
        if isinstance(loop, str):
            missing[source.name] = loop
        else:
            loops.append(loop)
    for kind in {"fp32", "bf16"} - {loop.kind for loop in loops}:
        missing.setdefault(kind, "this processor has no instructions that this script knows")
    return loops, missing


def probe_peaks(loops: list[PeakLoop], threads: int) -> dict[str, float]:
    """FLOP/s of each loop, run by `threads` threads at once."""
    rates = {}
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.001] * threads))  # so that the threads exist
        for loop in loops:
            start = time.perf_counter()
            list(pool.map(loop.run, [loop.steps] * threads))
            rates[loop.name] = threads * loop.steps * loop.flops_per_step / (time.perf_counter() - start)
    return rates


def bandwidth_buffer(limit: int = 2**30) -> npt.NDArray[np.float32]:
    """Memory that no cache holds: four times the last level, at least 256 MiB and at most `limit` bytes.

    A server's last level can be so large, and shared between so many virtual machines, that `limit` is less than four
    times of it. `describe` prints both.
    """
    size = min(max(4 * (last_level_cache() or 0), 2**28), limit)
    return np.ones(size // 4, np.float32)  # written once, so that the pages exist


def probe_bandwidth(buffer: npt.NDArray[np.float32], threads: int) -> dict[str, float]:
    """Bytes/s of reading `buffer` and of copying half of it to the other half; a copied byte is read and written."""
    parts = np.array_split(buffer, threads)
    halves = [part[: len(part) // 2 * 2].reshape(2, -1) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.001] * threads))
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        read = time.perf_counter() - start
        start = time.perf_counter()
        list(pool.map(lambda half: np.copyto(half[1], half[0]), halves))
        copied = time.perf_counter() - start
    return {"memory read": buffer.nbytes / read, "memory copy": buffer.nbytes / copied}

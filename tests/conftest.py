"""What tests of every folder share: a small random checkpoint, bundles made from it, and a cache that is no user's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from threads, and tests that run side by side lose much by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run: a failure seen once is seen again.
settings.register_profile(
    "specification",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("specification")


@pytest.fixture(scope="session", autouse=True)
def device_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The device cache of the whole test session; subprocesses inherit it."""
    folder = tmp_path_factory.mktemp("device_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOMEDGPT_EDGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def cpp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C++ tests and the emulation of a GPU were built."""
    from cpp_build import built

    # Processes of pytest-xdist have folders of their own in one that they share.
    base = tmp_path_factory.getbasetemp()
    return built(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="session")
def emulated_decoder(cpp_folder: Path) -> type[Any]:
    """What stands for ``_native.CudaDecoder`` on a machine without a GPU: the same kernels, emulated."""
    from cpp_build import emulated

    return emulated(cpp_folder).CudaDecoder  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the layout of the release; to be read only."""
    from biomedgpt_export.synthesize import synthesize

    out = tmp_path_factory.mktemp("checkpoint") / "release"
    synthesize(out, scale="tiny", seed=0, report=lambda line: None)
    return out


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bundle of ``tiny_checkpoint`` by precision, exported when it is first asked for; to be read only."""
    folder = tmp_path_factory.mktemp("bundles")

    def exported(precision: str) -> Path:
        from biomedgpt_export.exporter import export_bundle
        from biomedgpt_export.families.biomedgpt_10b import Layout
        from biomedgpt_export.options import ExportOptions

        out = folder / precision
        if not out.exists():
            options = ExportOptions(Layout.locate(tiny_checkpoint), out, precision)  # type: ignore[arg-type]
            export_bundle(options, lambda line: None)
        return out

    return exported


@pytest.fixture(scope="session")
def portable_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged demo with a portable decoder, made from the one in records; to be read only."""
    from biomedgpt_edge.engine import DEMO_BUNDLE
    from biomedgpt_export.relayout import relayout

    out = tmp_path_factory.mktemp("demo") / "portable"
    relayout(DEMO_BUNDLE, out, "portable", lambda line: None)
    return out


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundles: Callable[[str], Path]) -> Path:
    """The int4 bundle of ``tiny_checkpoint``, its decoder in records; to be read only."""
    return tiny_bundles("int4")


@pytest.fixture(scope="session")
def tiny_bundle_fp16(tiny_bundles: Callable[[str], Path]) -> Path:
    """The fp16 bundle of ``tiny_checkpoint``; to be read only."""
    return tiny_bundles("fp16")


@pytest.fixture(scope="session")
def tiny_bundle_fp32(tiny_bundles: Callable[[str], Path]) -> Path:
    """The fp32 bundle of ``tiny_checkpoint``; to be read only."""
    return tiny_bundles("fp32")


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_bundle`` that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))

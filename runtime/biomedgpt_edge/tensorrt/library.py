"""Which TensorRT this machine has, and what it says while it works.

Two libraries share an API: ``tensorrt`` (data centres, JetPack), which builds for the GPU that it finds, and
``tensorrt_rtx`` (GeForce and RTX), which builds for a named compute capability, also on machines without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import OptionError, PlatformError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
# What brings each of them.
PACKAGES = {"tensorrt": "tensorrt (JetPack brings its own)", "tensorrt_rtx": "tensorrt-rtx-cu13"}
EXTRA = "pip install 'biomedgpt-edge[tensorrt]'"
_log = logging.getLogger(__name__)


@dataclass
class Messages:
    """What a library said since the last :meth:`begin`.

    Attributes:
        errors: one line each.
        layers: of the engine that was built, as its builder lists them; see :mod:`inspection`.
    """

    errors: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Forgets what was said."""
        self.errors.clear()
        self.layers.clear()

    def add(self, severe: bool, warning: bool, text: str) -> None:
        """Keeps errors and layers; passes warnings on."""
        if severe:
            self.errors.append(" ".join(text.split())[:400])
        elif warning:
            _log.debug("%s", text)
        else:
            self.layers += [line for line in text.split("\n") if line.startswith("Name: ")]


@dataclass(frozen=True)
class TensorRt:
    """A library that can be used.

    Attributes:
        api: the Python module.
        logger: its one logger; a process has one for each library.
        messages: what that logger got.
    """

    flavour: Flavour
    api: Any
    version: str
    logger: Any
    messages: Messages

    @property
    def name(self) -> str:
        """For people."""
        return f"{'TensorRT for RTX' if self.flavour == 'tensorrt_rtx' else 'TensorRT'} {self.version}"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that it builds for without such a GPU, as "8.9"; none of ``tensorrt``."""
        if self.flavour == "tensorrt":
            return ()
        names = [re.fullmatch(r"SM(\d+)(\d)", name) for name in self.api.ComputeCapability.__members__]
        return tuple(f"{match[1]}.{match[2]}" for match in names if match)


_loaded = dict[Flavour, TensorRt]()


def load_tensorrt(wanted: Flavour | None = None) -> TensorRt:
    """The library to use: ``tensorrt`` where there is one, else ``tensorrt_rtx``.

    Args:
        wanted: take no other one.

    Raises:
        PlatformError: there is none, or it cannot be loaded.
    """
    candidates = FLAVOURS if wanted is None else (wanted,)
    there = [flavour for flavour in candidates if flavour in _loaded or importlib.util.find_spec(flavour) is not None]
    if not there:
        packages = " or ".join(PACKAGES[flavour] for flavour in candidates)
        raise PlatformError(
            f"TensorRT is not installed: there is no Python package {' or '.join(candidates)}.",
            seen=list(candidates),
            remedy=f"Install {packages}: {EXTRA}.",
        )
    failures = []
    for flavour in there:
        try:
            return _load(flavour)
        except PlatformError as error:
            failures.append(error)
    raise failures[0]


def _load(flavour: Flavour) -> TensorRt:
    if flavour not in _loaded:
        try:
            api = importlib.import_module(flavour)
            # A package of stubs can be imported and holds nothing.
            version, logger = str(api.__version__), api.ILogger
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise PlatformError(
                f"the Python package {flavour} is there, and its library cannot be loaded: {error}.",
                seen=flavour,
                remedy=f"Install it again ({PACKAGES[flavour]}), with the CUDA version of this machine's driver.",
            ) from error
        messages = Messages()
        _loaded[flavour] = TensorRt(flavour, api, version, _logger(logger, messages), messages)
    return _loaded[flavour]


def _logger(base: Any, messages: Messages) -> Any:
    class Logger(base):  # type: ignore[misc]
        """Hands everything to ``messages``; TensorRT prints it otherwise."""

        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.add(severity <= base.ERROR, severity == base.WARNING, text)

    return Logger()


def capability_of(device: str, library: TensorRt) -> str:
    """The compute capability that a name such as ``sm89`` or ``8.9`` stands for.

    Raises:
        OptionError: it is none, or the library does not build for it.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", device.lower())
    if match is None:
        raise OptionError(
            f"device is {device[:40]!r}.",
            seen=device[:40],
            limit="gpu, or a compute capability such as sm89",
            remedy="Leave it out for the GPU of this machine.",
        )
    capability = f"{match[1]}.{match[2]}"
    if library.flavour == "tensorrt":
        raise OptionError(
            f"{library.name} builds for the GPU of this machine alone, and {device} was asked for.",
            seen=device,
            remedy=f"Leave the device out, or install {PACKAGES['tensorrt_rtx']}, which builds for others, too.",
        )
    require_capability(capability, library)
    return capability


def require_capability(capability: str, library: TensorRt) -> None:
    """Refuses GPUs that ``tensorrt_rtx`` does not run on; ``tensorrt`` itself says so of those that it does not.

    Raises:
        OptionError: with the reason.
    """
    known = library.capabilities
    if library.flavour == "tensorrt" or capability in known:
        return
    hint = {"8.7": " (Jetson Orin)", "9.0": " (Hopper)", "7.2": " (Jetson Xavier)"}.get(capability, "")
    raise OptionError(
        f"{library.name} runs on GPUs of compute capability {', '.join(known)}, and not on {capability}{hint}.",
        seen=capability,
        limit=", ".join(known),
        remedy="Use the package tensorrt there (JetPack brings its own), or --device cuda.",
    )

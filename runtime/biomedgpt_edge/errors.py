"""One tree of typed errors.

Every error says what was given, what is wrong with it, the limit where there is one, and what to do. ``code`` is
stable and meant for programs; ``exit_code`` is what the commands return.
"""

from __future__ import annotations

from typing import Any, ClassVar


class BioMedGPTError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        code: stable, dotted identifier of the kind of error.
        seen: the offending value or a short form of it (never a whole sequence or file).
        limit: the bound that was passed, if the error is about a bound.
        remedy: what the user can do about it.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, seen: object = None, limit: object = None, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.seen = seen
        self.limit = limit
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-ready fields, for ``--json``."""
        fields: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.seen is not None:
            fields["seen"] = self.seen if isinstance(self.seen, (int, float, str, list)) else str(self.seen)
        if self.limit is not None:
            fields["limit"] = self.limit if isinstance(self.limit, (int, float, str)) else str(self.limit)
        if self.remedy:
            fields["remedy"] = self.remedy
        return fields


class InputError(BioMedGPTError, ValueError):
    """Something the user gave cannot be used."""

    code = "input"
    exit_code = 3


class InputFileError(InputError):
    """An input file (SDF, FASTA) is missing, unreadable or not what its name says."""

    code = "input.file"


class MoleculeError(InputError):
    """A molecule that cannot be parsed, or that the molecule encoder has no features for."""

    code = "input.molecule"


class ProteinError(InputError):
    """A protein sequence the protein encoder cannot read."""

    code = "input.protein"


class PromptTooLongError(InputError):
    """The prompt and the requested answer do not fit the model's context."""

    code = "input.prompt_too_long"


class OptionError(InputError):
    """A generation or loading option outside its range."""

    code = "input.option"


class MemoryLimitError(OptionError):
    """The memory that may be used holds no model and answer."""

    code = "input.memory_limit"


class MissingModalityError(InputError):
    """A molecule or protein was given to a bundle that has no encoder for it."""

    code = "input.modality"


class KernelArgumentError(BioMedGPTError, ValueError):
    """An array handed to the native extension has the wrong shape, dtype or memory layout."""

    code = "kernel.argument"


class ClosedError(BioMedGPTError, RuntimeError):
    """The engine, stream or decoder state was closed before this call."""

    code = "closed"


class BundleError(BioMedGPTError):
    """A bundle cannot be opened."""

    code = "bundle"
    exit_code = 4


class BundleNotFoundError(BundleError):
    """There is no bundle at that path, or one of its files is missing."""

    code = "bundle.not_found"


class ManifestError(BundleError):
    """The manifest is not JSON, misses a field, or a field has the wrong type or an impossible value."""

    code = "bundle.manifest"


class BundleVersionError(BundleError):
    """The bundle was written for another version of this package."""

    code = "bundle.version"


class BundleCorruptError(BundleError):
    """A file of the bundle is truncated, altered, or contradicts the manifest."""

    code = "bundle.corrupt"


class UnsafePathError(BundleError):
    """A path in the bundle is absolute, leaves the bundle, or goes through a link."""

    code = "bundle.unsafe_path"


class PlatformError(BioMedGPTError):
    """This machine misses something the runtime needs."""

    code = "platform"
    exit_code = 5


class UnsupportedGraphError(PlatformError):
    """An engine does not know something that a graph has."""

    code = "platform.graph"

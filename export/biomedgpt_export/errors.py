"""Typed errors of the export toolchain; they extend the runtime's tree, so one ``except`` catches both."""

from __future__ import annotations

from biomedgpt_edge.errors import BioMedGPTError


class ExportError(BioMedGPTError):
    """An export cannot start or finish."""

    code = "export"
    exit_code = 6


class CheckpointError(ExportError):
    """A checkpoint file is missing, truncated, malformed or of an unsupported format."""

    code = "export.checkpoint"


class UnsafeCheckpointError(CheckpointError):
    """A pickle names something other than the rebuilding of tensors; nothing in it was executed."""

    code = "export.checkpoint.unsafe"


class KeyMismatchError(CheckpointError):
    """Tensors are missing, unexpected or misshapen; ``problems`` lists all of them."""

    code = "export.checkpoint.keys"

    def __init__(self, message: str, problems: list[str], *, remedy: str = "") -> None:
        super().__init__(message, seen=problems, remedy=remedy)
        self.problems = problems


class ModelConfigError(ExportError):
    """A model's ``config.json`` lacks a field or asks for something the graphs cannot express."""

    code = "export.config"


class CalibrationError(ExportError):
    """What calibration recorded for a layer, activations or their second moments, cannot be used."""

    code = "export.calibration"


class QuantizationError(ExportError):
    """A weight matrix cannot be quantized as asked."""

    code = "export.quantization"


class JournalError(ExportError):
    """Interrupted work cannot be taken up again as asked."""

    code = "export.journal"


class DeviceError(ExportError):
    """The device that was asked for is not there."""

    code = "export.device"


class MemoryNeedError(ExportError):
    """An export would take more memory than this machine has."""

    code = "export.memory"


class ParityError(ExportError):
    """The exported graph differs from the source module by more than the tolerance."""

    code = "export.parity"


class ProofError(ExportError):
    """A bundle lost more by its precision than it may."""

    code = "export.proof"


class OutputExistsError(ExportError):
    """The output path is already taken."""

    code = "export.output_exists"


class TrainingDataError(ExportError):
    """Training data is missing or not what the trainer expects."""

    code = "export.training_data"

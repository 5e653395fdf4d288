"""What tensors are called in graphs of either layout: one is derived from the other."""

from __future__ import annotations

from collections.abc import Sequence

# Behind the name of a layer: values and scales of MatMulNBits; behind those of one or two, records.
VALUES, SCALES, RECORDS = ".weight_int4", ".scales", ".records"
# Of weights whose zero is not the middle of the range; such ones never lie in records.
ZERO_POINTS = ".zero_points"
_SEPARATOR = "+"
# Behind the name of a layer in int8: values of DynamicQuantizeMatMul, whose scales are called as above; what is added
# to its product; records of all three.
INT8_VALUES, BIAS, INT8_RECORDS = ".weight_int8", ".bias", ".records_int8"
# Cosines and sines by which queries and keys are rotated, float32 [positions, head_size / 2].
ROPE_COS, ROPE_SIN = "rope_cos", "rope_sin"


def records_name(layers: Sequence[str]) -> str:
    """The tensor that holds these linear layers, their panels by turns."""
    return _SEPARATOR.join(layers) + RECORDS


def layer_names(records: str) -> list[str]:
    """The inverse of :func:`records_name`."""
    return records.removesuffix(RECORDS).split(_SEPARATOR)

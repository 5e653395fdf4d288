"""Whether the matrices of a graph have the sizes that its products with quantized weights declare."""

from __future__ import annotations

import math
from collections.abc import Iterator

from . import _native
from .errors import KernelArgumentError
from .onnx_header import INT4_MATRICES, INT8_INPUTS, Header, Product

# Those of int4 and int8, in the groups of our own exports, and in those of records.
BITS, GROUP_SIZES = (4, 8), (16, 32, 64, 128)
RECORDS_GROUP_SIZES = (32, 64, 128)
# By TensorProto.DataType: float, uint8, int8, int32, int64, float16, int4.
_BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 22: 4}


def contradictions(header: Header) -> Iterator[str]:
    """What is wrong with each product whose attributes and tensors contradict each other."""
    for product in header.products:
        if product.operator in INT4_MATRICES:
            wrong = _of_records(header, product, INT4_MATRICES[product.operator])
        elif product.operator in INT8_INPUTS:
            wrong = _of_int8_records(header, product, INT8_INPUTS[product.operator])
        else:
            wrong = _contradiction(header, product)
        if wrong:
            yield wrong


def misfits(header: Header) -> Iterator[str]:
    """What is wrong with each tensor, outside a graph or in it, that is not as large as its shape implies, or empty."""
    lengths = {**header.inside, **{tensor.name: tensor.length for tensor in header.tensors}}
    for name, shape in header.shapes.items():
        bits, length = _BITS.get(header.kinds.get(name) or 0), lengths.get(name)
        if (not shape and shape != ()) or bits is None or length is None:
            yield f"{name} is {shape} of an unknown type or place"
        elif not all(shape or ()) or length != -(-math.prod(shape or ()) * bits // 8):
            yield f"{name} is {shape} of {bits} bits, and has {length} bytes"


def _contradiction(header: Header, product: Product) -> str:
    columns, rows, bits, group_size = (product.attributes.get(name, 0) for name in ("K", "N", "bits", "block_size"))
    weights, scales, zero_points, *more = (*product.inputs[1:], "", "", "")
    if any(more):
        return f"{weights} has more inputs than a product needs"
    if bits not in BITS or group_size not in GROUP_SIZES or not columns or not rows:
        return f"{weights} has {rows} x {columns} values of {bits} bits in groups of {group_size}"
    groups = -(-columns // group_size)
    shape = (rows, groups, group_size * bits // 8)
    if header.shapes.get(weights) != shape:
        return f"{weights} is {header.shapes.get(weights)}, and {shape} is declared"
    # Scales are stored in fp16 and widened: their values are what a Cast reads.
    counts = {header.casts.get(scales, scales): rows * groups}
    if zero_points:
        counts[zero_points] = rows * -(-groups * bits // 8)
    for name, count in counts.items():
        found = None if name is None else header.shapes.get(name)
        if found is None or math.prod(found) != count:
            return f"{name} is {found}, and {count} values are declared"
    return ""


def _of_records(header: Header, product: Product, matrices: int) -> str:
    if len(product.inputs) != 2:
        return f"{product.operator[1]} has {len(product.inputs)} inputs, and needs two"
    rows, columns, records = product.attributes.get("N", 0), product.attributes.get("K", 0), product.inputs[1]
    try:
        shapes = [_native.int4_records_shape(rows, columns, size) for size in RECORDS_GROUP_SIZES]
    except KernelArgumentError:
        return f"{records} has {rows} x {columns} values"
    declared = [(matrices * panels, groups, size) for panels, groups, size in shapes]
    found = header.shapes.get(records)
    return "" if found in declared else f"{records} is {found}, and one of {declared} is declared"


def _of_int8_records(header: Header, product: Product, inputs: int) -> str:
    if len(product.inputs) != inputs:
        return f"{product.operator[1]} has {len(product.inputs)} inputs, and needs {inputs}"
    rows, columns, records = product.attributes.get("N", 0), product.attributes.get("K", 0), product.inputs[1]
    try:
        declared = _native.int8_records_shape(rows, columns)
    except KernelArgumentError:
        return f"{records} has {rows} x {columns} values"
    found = header.shapes.get(records)
    return "" if found == declared else f"{records} is {found}, and {declared} is declared"

"""The models that peers run: one set of weights, in the format of each, written below a work folder once.

A bundle comes first, random or given: its manifest is the shape, its decoder graph with MatMulNBits is what the peers
on ONNX Runtime run, the same decoder in records is ours. Other formats are made of its matrices (`Weights`), so that
everybody's logits can be compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.manifest import RECORDS, DecoderSpec
from biomedgpt_edge.onnx_header import INT4_MATRICES, read_header

# --shape -> scale of biomedgpt_export.synthesize
SHAPES = {"tiny": "tiny", "1b": "1b", "7b": "full"}
PREPACKED = "matmulnbits-prepacked"
MODEL = "model.onnx"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Models:
    """Two bundles with the same weights, and the folder for what is derived from them.

    Attributes:
        records: with the decoder as our operators read it.
        portable: with MatMulNBits.
    """

    records: Path
    portable: Path
    folder: Path

    @property
    def spec(self) -> DecoderSpec:
        """The shape that all engines share."""
        return Bundle.open(self.portable).manifest.decoder

    @property
    def decoder_bytes(self) -> int:
        """Of the decoder's weights in int4."""
        opened = Bundle.open(self.portable)
        return bytes_of_tensors(opened.file(opened.manifest.decoder.graph))


def models_of_shape(work: Path, shape: str, layers: int | None, report: Report) -> Models:
    """Around a random int4 bundle of that shape without a protein encoder; ``layers`` cuts the decoder."""
    from biomedgpt_export.exporter import export_bundle
    from biomedgpt_export.families.biomedgpt_10b import Layout
    from biomedgpt_export.options import ExportOptions
    from biomedgpt_export.synthesize import synthesize

    name = shape if layers is None else f"{shape}-{layers}"
    folder = work / name
    models = Models(folder / "records", folder / "portable", folder)
    if not models.portable.exists():
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            synthesize(checkpoint, scale=SHAPES[shape], seed=0, layers=layers, protein_layers=1, report=report)
        options = ExportOptions(
            Layout.locate(checkpoint, without=("protein",)),
            models.portable,
            "int4",
            quantizer="rtn",
            proof="none",
            decoder_layout="portable",
            name=f"random weights, {name}",
        )
        export_bundle(options, report)
        shutil.rmtree(checkpoint)  # three times as large, and of no more use
    _add_other_layout(models.portable, models.records, report)
    return models


def models_of_bundle(work: Path, bundle: Path, report: Report) -> Models:
    """Around a bundle that is there, in either layout."""
    opened = Bundle.open(bundle)
    folder = work / opened.digest[:16]
    other = folder / "other-layout"
    _add_other_layout(bundle, other, report)
    in_records = opened.manifest.decoder.layout == RECORDS
    return Models(bundle, other, folder) if in_records else Models(other, bundle, folder)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write to, which is called ``folder`` once all is written: nothing half-written is taken for whole."""
    staging = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was interrupted
    staging.mkdir(parents=True)
    yield staging
    staging.rename(folder)


def _add_other_layout(bundle: Path, other: Path, report: Report) -> None:
    from biomedgpt_export.relayout import relayout

    if not other.exists():
        other.parent.mkdir(parents=True, exist_ok=True)
        in_records = Bundle.open(bundle).manifest.decoder.layout == RECORDS
        relayout(bundle, other, "portable" if in_records else "records", report)


@dataclass(frozen=True)
class Matrix:
    """A linear layer; a weight is ``(level - 8) * scale``.

    Attributes:
        levels: uint8 ``[N, K]``, 0 to 15.
        scales: float16 ``[N, K / group]``.
    """

    levels: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]

    def rows(self, order: slice | npt.NDArray[np.int64]) -> Matrix:
        """These rows, in this order."""
        return Matrix(self.levels[order], self.scales[order])

    def dequantized(self) -> npt.NDArray[np.float32]:
        """float32 ``[N, K]``."""
        values = np.empty(self.levels.shape, np.float32)
        groups = values.reshape(*self.scales.shape, -1)
        np.subtract(self.levels.reshape(groups.shape), np.float32(8), out=groups)
        groups *= self.scales.astype(np.float32)[..., np.newaxis]
        return values


class Weights:
    """Of the decoder of a bundle with MatMulNBits; each is read when it is asked for."""

    def __init__(self, bundle: Path) -> None:
        from biomedgpt_export.graphs.stored import StoredWeights

        self._bundle = Bundle.open(bundle)
        self.spec = self._bundle.manifest.decoder
        self._stored = StoredWeights(self._bundle.file(self.spec.graph))

    @cached_property
    def table(self) -> npt.NDArray[np.float32]:
        """Token embeddings, float32 ``[vocabulary, hidden]``."""
        return table_of(self._bundle)

    def matrix(self, part: str, layer: int) -> Matrix:
        """One of q, k, v, o, gate, up and down.

        Raises:
            ValueError: other formats cannot hold it: it has zero points, an order, or a row that is no whole number of
                groups.
        """
        if part not in "qkv":
            return self._matrix(f"layers.{layer}.{part}_proj")
        query, kv = self.spec.heads * self.spec.head_size, self.spec.kv_heads * self.spec.head_size
        ends = {"q": (0, query), "k": (query, query + kv), "v": (query + kv, query + 2 * kv)}
        return self._matrix(f"layers.{layer}.qkv_proj").rows(slice(*ends[part]))

    def head(self) -> Matrix:
        """The LM head. See `matrix`."""
        return self._matrix("lm_head")

    def norm(self, part: str, layer: int) -> npt.NDArray[np.float32]:
        """Gains ``[hidden]`` before attention ("attention") or feed-forward ("ffn") of a layer; those before the head
        are of "attention" of a layer beyond the last."""
        if part == "ffn":
            name = f"layers.{layer}.post_attention_layernorm"
        else:
            name = f"layers.{layer - 1}.next_layernorm" if layer else "layers.0.input_layernorm"
        return np.array(self._stored.array(f"{name}.weight"))

    def _matrix(self, name: str) -> Matrix:
        from biomedgpt_export.quantize.int4 import unpack

        if self._stored.int8(name):
            raise ValueError(f"{name} is int8, which is not written for this engine")
        weight = self._stored.int4(name)
        groups = weight.scales.shape[1]
        if weight.zero_points is not None or weight.order is not None or groups * weight.group_size != weight.columns:
            raise ValueError(
                f"{name} has zero points, an order, or rows of {weight.columns} values, no whole number of groups of "
                f"{weight.group_size}: not written for this engine"
            )
        return Matrix(unpack(weight.packed).flatten(1).numpy(), weight.scales.numpy())


def linear_layers(models: Models) -> Path:
    """The graph of records without all but its int4 operators, each with an input and an output of its own.

    Inputs are ``x{K}``, float32 ``[rows, K]``, for all operators of a width together.
    """
    import onnx
    from onnx import TensorProto, helper

    folder = models.folder / "linear-layers"
    if folder.exists():
        return folder / MODEL
    opened = Bundle.open(models.records)
    source = opened.file(opened.manifest.decoder.graph)
    model = onnx.load(str(source), load_external_data=False)
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) in INT4_MATRICES]
    widths = set()
    outputs = []
    for node in nodes:
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        widths.add(sizes["K"])
        node.input[0] = f"x{sizes['K']}"
        outputs.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["rows", sizes["N"]]))
    records = {node.input[1] for node in nodes}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in records]
    inputs = [helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT, ["rows", width]) for width in widths]
    graph = helper.make_graph(nodes, "linear layers", inputs, outputs, tensors)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    with staged(folder) as staging:
        _link_external_files(source, staging)
        onnx.save(alone, str(staging / MODEL))
    return folder / MODEL


def bytes_of_tensors(graph: Path) -> int:
    """What lies outside the graph file of the weights that it names."""
    return sum(tensor.length or 0 for tensor in read_header(graph).tensors)


def torch_model(models: Models) -> Any:
    """transformers' LlamaForCausalLM in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    weights = Weights(models.portable)
    spec = weights.spec
    config = LlamaConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_size,
        max_position_embeddings=spec.context,
        rms_norm_eps=spec.norm_eps,
        rope_theta=spec.rope_base,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # made of the configuration alone
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_as_transformers_names(weights, name)))
    return model


def _as_transformers_names(weights: Weights, name: str) -> npt.NDArray[np.float32]:
    """The parameter that transformers calls ``name``."""
    if name == "model.embed_tokens.weight":
        return weights.table
    if name == "lm_head.weight":
        return weights.head().dequantized()
    if name == "model.norm.weight":
        return weights.norm("attention", weights.spec.layers)
    _, _, layer, *_, module, _ = name.split(".")
    if module.endswith("_proj"):
        return weights.matrix(module.removesuffix("_proj"), int(layer)).dequantized()
    return weights.norm("attention" if module == "input_layernorm" else "ffn", int(layer))


def genai_folder(models: Models, threads: int) -> Path:
    """The bundle's graph with the inputs that onnxruntime-genai gives, and its configuration.

    Added in front: token ids to embeddings, the attention mask to lengths; behind: logits of the last position alone,
    as genai's own builder makes them with ``prune_lm_head``.
    """
    import onnx

    opened = Bundle.open(models.portable)
    spec = opened.manifest.decoder
    folder = models.folder / "genai"
    if not folder.exists():
        graph = opened.file(spec.graph)
        model = onnx.load(str(graph), load_external_data=False)
        _add_token_inputs(model.graph, table_of(opened))
        with staged(folder) as staging:
            _link_external_files(graph, staging)
            onnx.save(model, str(staging / MODEL))
    (folder / "genai_config.json").write_text(json.dumps(_genai_config(spec, threads), indent=1))
    return folder


def table_of(bundle: Bundle) -> npt.NDArray[np.float32]:
    """Token embeddings, float32 ``[vocabulary, hidden]``."""
    table = bundle.embeddings
    rows: npt.NDArray[np.float32] = table.rows.astype(np.float32)
    return rows if table.scales is None else rows * table.scales[:, None]


def _link_external_files(graph: Path, folder: Path) -> None:
    """Weights are not copied where the file system allows it: they stay one file, under a second name."""
    for name in {tensor.location for tensor in read_header(graph).tensors}:
        if not (folder / name).exists():
            try:
                os.link(graph.parent / name, folder / name)
            except OSError:  # another file system
                shutil.copy2(graph.parent / name, folder / name)


def _add_token_inputs(graph: Any, table: npt.NDArray[np.float32]) -> None:
    from onnx import TensorProto, helper, numpy_helper

    own = {"inputs_embeds", "logit_positions", "seqlens_k", "total_sequence_length"}
    cache = [value for value in graph.input if value.name not in own]
    del graph.input[:]
    graph.input.extend(
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "positions"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *cache,
        ]
    )
    constants = {"table": table, "one": np.array(1, np.int64), "axis_1": np.array([1], np.int64)}
    graph.initializer.extend(numpy_helper.from_array(value, f"genai.{name}") for name, value in constants.items())
    front = [
        helper.make_node("Gather", ["genai.table", "input_ids"], ["inputs_embeds"]),
        helper.make_node("Shape", ["input_ids"], ["genai.positions"], start=1, end=2),
        helper.make_node("Sub", ["genai.positions", "genai.one"], ["logit_positions"]),
        helper.make_node("ReduceSum", ["attention_mask", "genai.axis_1"], ["genai.total"], keepdims=0),
        helper.make_node("Sub", ["genai.total", "genai.one"], ["genai.last"]),
        helper.make_node("Cast", ["genai.last"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["genai.shape"], start=1, end=2),
        helper.make_node("Squeeze", ["genai.shape"], ["genai.length"]),
        helper.make_node("Cast", ["genai.length"], ["total_sequence_length"], to=TensorProto.INT32),
    ]
    nodes = [*front, *graph.node]
    del graph.node[:]
    for node in nodes:
        node.output[:] = ["genai.logits" if name == "logits" else name for name in node.output]
    graph.node.extend(nodes)
    graph.node.append(helper.make_node("Unsqueeze", ["genai.logits", "genai.axis_1"], ["logits"]))
    rows = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "last", rows])
    kept = [value for value in graph.output if value.name != "logits"]
    del graph.output[:]
    graph.output.extend([logits, *kept])


def _genai_config(spec: DecoderSpec, threads: int) -> dict[str, Any]:
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    inputs |= {"past_key_names": "past_key.%d", "past_value_names": "past_value.%d"}
    outputs = {"logits": "logits", "present_key_names": "present_key.%d", "present_value_names": "present_value.%d"}
    decoder = {
        "session_options": {"intra_op_num_threads": threads, "provider_options": []},
        "filename": MODEL,
        "head_size": spec.head_size,
        "hidden_size": spec.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
    }
    # No token ends an answer: bursts have a length of their own.
    ends = {"bos_token_id": 1, "eos_token_id": spec.vocabulary - 1, "pad_token_id": 0}
    model = {"type": "llama", "context_length": spec.context, "vocab_size": spec.vocabulary, "decoder": decoder, **ends}
    search = {"do_sample": False, "max_length": spec.context, "past_present_share_buffer": True}
    return {"model": model, "search": search}

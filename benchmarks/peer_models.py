"""Random models of one shape in the formats of the peers, written below a work folder once and used again.

The bundle comes first: its manifest is the shape, and its portable decoder is the MatMulNBits graph of the peers that
run on ONNX Runtime. Values mean nothing and differ between the formats, since no engine's speed depends on them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.decoder.graph import choose, decoder_graph
from biomedgpt_edge.manifest import DecoderSpec

# --shape -> scale of biomedgpt_export.synthesize
SHAPES = {"tiny": "tiny", "1b": "1b", "7b": "full"}
PREPACKED = "matmulnbits.prepacked.onnx"

Report = Callable[[str], None]


def models_of_shape(work: Path, shape: str, layers: int | None, report: Report) -> Models:
    """Around a random int4 bundle of that shape without a protein encoder; ``layers`` cuts the decoder."""
    from biomedgpt_export.exporter import export_bundle
    from biomedgpt_export.families.biomedgpt_10b import Layout
    from biomedgpt_export.options import ExportOptions
    from biomedgpt_export.synthesize import synthesize

    name = shape if layers is None else f"{shape}-{layers}"
    bundle, checkpoint = work / name / "bundle", work / name / "checkpoint"
    if not bundle.exists():
        if not checkpoint.exists():
            synthesize(checkpoint, scale=SHAPES[shape], seed=0, layers=layers, protein_layers=1, report=report)
        layout = Layout.locate(checkpoint, without=("protein",))
        options = ExportOptions(layout, bundle, "int4", quantizer="rtn", proof="none", name=f"random weights, {name}")
        export_bundle(options, report)
    return Models(bundle, work / name)


def models_of_bundle(work: Path, bundle: Path) -> Models:
    """Around a bundle that is there."""
    return Models(bundle, work / Bundle.open(bundle).digest[:16])


@dataclass(frozen=True)
class Models:
    """A bundle, and the folder for what is derived from it."""

    bundle: Path
    folder: Path

    @property
    def spec(self) -> DecoderSpec:
        """The shape that all engines share."""
        return Bundle.open(self.bundle).manifest.decoder

    @property
    def portable_graph(self) -> Path:
        """The decoder with MatMulNBits, which peers on ONNX Runtime run; of a bundle in records, a derived one."""
        bundle = Bundle.open(self.bundle)
        return decoder_graph(bundle, choose(bundle, "portable"), "once").path


def genai_folder(models: Models, threads: int) -> Path:
    """The bundle's graph with the inputs that onnxruntime-genai gives, and its configuration.

    Added in front: token ids to embeddings, the attention mask to lengths; behind: logits of the last position alone,
    as genai's own builder makes them with ``prune_lm_head``.
    """
    import onnx

    opened = Bundle.open(models.bundle)
    spec = opened.manifest.decoder
    folder = models.folder / "genai"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "genai_config.json").write_text(json.dumps(_genai_config(spec, threads), indent=1))
    if (folder / "model.onnx").exists():
        return folder
    graph = models.portable_graph
    model = onnx.load(str(graph), load_external_data=False)
    _link_external_data(model, graph.parent, folder)
    _add_token_inputs(model.graph, table_of(opened))
    onnx.save(model, str(folder / "model.onnx"))
    return folder


def table_of(bundle: Bundle) -> npt.NDArray[np.float32]:
    """Token embeddings, float32 ``[vocabulary, hidden]``."""
    table = bundle.embeddings
    rows: npt.NDArray[np.float32] = table.rows.astype(np.float32)
    return rows if table.scales is None else rows * table.scales[:, None]


def _link_external_data(model: Any, source: Path, folder: Path) -> None:
    """Weights are not copied where the file system allows it: they stay one file, under a second name."""
    locations = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    for location in locations:
        if not (folder / location).exists():
            try:
                os.link(source / location, folder / location)
            except OSError:  # another file system
                shutil.copy2(source / location, folder / location)


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
        "filename": "model.onnx",
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


def gguf_file(models: Models, kind: str) -> Path:
    """A GGUF of random blocks of ``kind``, "Q4_0" or "Q4_K"; the head is Q6_K, as llama.cpp's quantizer makes it."""
    import gguf

    spec = models.spec
    path = models.folder / f"{kind.lower()}.gguf"
    if path.exists():
        return path
    models.folder.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(staging), "llama", use_temp_file=False)
    _write_gguf_facts(writer, spec)
    rng = np.random.default_rng(0)
    for name, shape, quantized in _gguf_tensors(spec):
        if quantized:
            block = gguf.GGMLQuantizationType["Q6_K" if name == "output.weight" else kind]
            writer.add_tensor(name, _random_blocks(rng, shape, block), raw_dtype=block)
        else:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return staging.replace(path)


def _write_gguf_facts(writer: Any, spec: DecoderSpec) -> None:
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_dimension_count(spec.head_size)
    writer.add_rope_freq_base(spec.rope_base)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocabulary)
    # Ids are given, so the pieces need only be different.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(spec.vocabulary)])
    writer.add_token_scores([0.0] * spec.vocabulary)
    writer.add_token_types([1] * spec.vocabulary)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_tensors(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Names, shapes [out, in], and whether they are quantized."""
    hidden, query, kv = spec.hidden_size, spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    yield "token_embd.weight", (spec.vocabulary, hidden), True
    yield "output_norm.weight", (hidden,), False
    yield "output.weight", (spec.vocabulary, hidden), True
    for layer in range(spec.layers):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", (hidden,), False
        matrices = {"attn_q": (query, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
        matrices |= {"attn_output": (hidden, query), "ffn_down": (hidden, spec.intermediate_size)}
        matrices |= dict.fromkeys(("ffn_gate", "ffn_up"), (spec.intermediate_size, hidden))
        for name, shape in matrices.items():
            yield f"blk.{layer}.{name}.weight", shape, True


# Bytes of a block that hold float16 scales; the others may be anything.
_SCALE_BYTES = {"Q4_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def _random_blocks(rng: np.random.Generator, shape: tuple[int, ...], block: Any) -> npt.NDArray[np.uint8]:
    """Random bytes of a quantized matrix with small scales, uint8 [out, bytes of a row].

    Raises:
        ValueError: rows are no whole number of blocks.
    """
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[block]
    if shape[-1] % values:
        raise ValueError(f"rows of {shape[-1]} values are no whole number of {block.name} blocks of {values}")
    blocks = rng.integers(0, 256, (shape[0], shape[-1] // values, size), np.uint8)
    scale = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    for start in _SCALE_BYTES[block.name]:
        blocks[..., start : start + 2] = scale
    flat: npt.NDArray[np.uint8] = blocks.reshape(shape[0], -1)
    return flat

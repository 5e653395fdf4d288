"""GPTQ checkpoints: read exactly, stored exactly, computed with exactly; what contradicts itself is a named error.

The checkpoints here are packed by hand, eight values to a word as digits of a number to base 16, and dequantized by the
definition in float64. Those of ``data/gptq`` were written by GPTQModel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from biomedgpt_edge.errors import ClosedError
from biomedgpt_export.checkpoint import GptqCheckpoint, GptqConfig, GptqWeight, open_checkpoint, open_gptq
from biomedgpt_export.device import CPU
from biomedgpt_export.errors import CheckpointError, KeyMismatchError
from biomedgpt_export.exporter import _recipe
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import LlamaConfig
from biomedgpt_export.graphs.decoder import build_decoder
from biomedgpt_export.graphs.linear import Activations, Linears
from biomedgpt_export.graphs.matrices import llama_matrices
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.quantize.imported import ImportedWeights, to_int4
from biomedgpt_export.quantize.rtn import RoundToNearest
from biomedgpt_export.source_modules import SourceLlama

DATA = Path(__file__).parents[1] / "data" / "gptq"
WRITTEN_BY_GPTQMODEL = sorted(path.name for path in DATA.iterdir() if path.is_dir())


# --- checkpoints by hand ----------------------------------------------------------------------------------------------


def words(values: np.ndarray) -> np.ndarray:
    """``[A, 8 B]`` digits 0 to 15 -> int32 ``[A, B]``: eight digits of a number to base 16, the first the lowest."""
    digits = values.astype(np.uint64).reshape(len(values), -1, 8)
    return (digits * 16 ** np.arange(8, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


@dataclass
class Layer:
    """A quantized layer in plain numbers, and its tensors."""

    rows: int = 24
    columns: int = 256
    group_size: int = 64
    version: int = 1
    sym: bool = False
    reordered: bool = False
    bias: bool = False
    seed: int = 0
    values: np.ndarray = field(init=False)
    zeros: np.ndarray = field(init=False)
    scales: np.ndarray = field(init=False)
    group_of: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        size = self.columns if self.group_size == -1 else self.group_size
        groups = -(-self.columns // size)
        self.values = random.integers(0, 16, (self.rows, self.columns))
        # Version 1 cannot tell zero points of 0 from 16.
        self.zeros = np.full((self.rows, groups), 8) if self.sym else random.integers(1, 16, (self.rows, groups))
        self.scales = random.uniform(1e-3, 0.1, (self.rows, groups)).astype(np.float16)
        self.group_of = np.arange(self.columns) // size
        if self.reordered:
            self.group_of = self.group_of[random.permutation(self.columns)]

    @property
    def weight(self) -> np.ndarray:
        """float32 ``[N, K]`` by definition; exact, see :meth:`GptqWeight.dequantize`."""
        exact = self.scales.astype(np.float64)[:, self.group_of] * (self.values - self.zeros[:, self.group_of])
        assert np.array_equal(exact, exact.astype(np.float32))
        return exact.astype(np.float32)

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        parts = {
            "qweight": words(self.values).T,
            "qzeros": words((self.zeros - 1 if self.version == 1 else self.zeros).T),
            "scales": self.scales.T,
            "g_idx": self.group_of.astype(np.int32),
        }
        if self.bias:
            parts["bias"] = np.linspace(-1, 1, self.rows, dtype=np.float16)
        return {f"{module}.{name}": torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}


def described(layer: Layer, **changes: object) -> dict[str, object]:
    """``quantize_config.json`` as AutoGPTQ writes it; a change to None takes the field out."""
    known = {
        "bits": 4,
        "group_size": layer.group_size,
        "damp_percent": 0.01,
        "desc_act": layer.reordered,
        "static_groups": False,
        "sym": layer.sym,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": None,
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if layer.version == 1 else "gptq_v2",
    }
    return {name: value for name, value in {**known, **changes}.items() if value is not None}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: object, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    (folder / "quantize_config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, layer: Layer, **changes: object) -> GptqCheckpoint:
    """A checkpoint with one layer, ``m``."""
    return open_gptq(write(folder, layer.tensors("m"), described(layer, **changes)))


def quantized(checkpoint: GptqCheckpoint, key: str) -> GptqWeight:
    weight = checkpoint.quantized(key)
    assert weight is not None
    return weight


def graph_of(
    folder: Path, imported: ImportedWeights, key: str, weight: torch.Tensor, bias: torch.Tensor | None = None,
    activations: Activations = "fp32",
) -> tuple[GraphBuilder, Linears]:  # fmt: skip
    """A saved graph of one linear layer, ``[n, K]`` in and ``[n, N]`` out."""
    graph = GraphBuilder(folder / f"{activations}.onnx")
    linears = Linears("int4", imported, activations)
    graph.input("x", TensorProto.FLOAT, ["n", weight.shape[1]])
    graph.node("Identity", [linears.emit(graph, "x", key, weight, bias)], "y")
    graph.output("y", TensorProto.FLOAT, ["n", weight.shape[0]])
    graph.save()
    return graph, linears


def run(graph: GraphBuilder, source: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": source.astype(np.float32)})[0]
    return result


def require_exact(folder: Path, layer: Layer) -> None:
    """Checkpoint, stored graph and what ONNX Runtime computes all have the weights of the definition."""
    tensors = layer.tensors("m") | {"norm.weight": torch.ones(3, dtype=torch.bfloat16)}
    with open_gptq(write(folder / "model", tensors, described(layer))) as checkpoint:
        expected = torch.from_numpy(layer.weight)
        weight = quantized(checkpoint, "m.weight")
        assert np.array_equal(weight.values, layer.values)
        assert np.array_equal(weight.zeros, layer.zeros)
        assert np.array_equal(weight.scales, layer.scales)
        assert np.array_equal(weight.group_of, layer.group_of)
        assert torch.equal(weight.dequantize(), expected)
        assert torch.equal(checkpoint.tensor("m.weight"), expected)
        assert checkpoint.shape("m.weight") == tuple(expected.shape)
        assert checkpoint.dtype("m.weight") == "float32"
        bias = checkpoint.tensor("m.bias") if layer.bias else None
        graph, linears = graph_of(
            folder, ImportedWeights(checkpoint, RoundToNearest()), "m.weight", expected, bias
        )  # fmt: skip
    stored = StoredWeights(graph.path)
    assert torch.equal(stored.linear("m.weight"), expected)
    assert torch.equal(stored.step("m.weight"), torch.from_numpy(layer.scales.astype(np.float32)[:, layer.group_of]))
    assert linears.asymmetric == ([] if layer.sym else ["m.weight"])
    assert _recipe(linears, CPU)["symmetric"] == layer.sym
    added = np.zeros(layer.rows) if bias is None else bias.double().numpy()
    # Each row of the identity picks one column, so that nothing is summed and nothing is rounded (but for the bias).
    picked = run(graph, np.eye(layer.columns))
    np.testing.assert_array_equal(picked, (layer.weight.T + added.astype(np.float32)).astype(np.float32))
    # A sum of K products in float32 is off by at most K rounding errors of the sum of magnitudes; where a kernel
    # subtracts zero points behind the sum, of those of scale * (q + zero).
    source = np.random.default_rng(1).standard_normal((5, layer.columns))
    magnitude = np.abs(source) @ (layer.scales.astype(float)[:, layer.group_of] * (layer.values + 16)).T
    error = np.abs(run(graph, source) - (source @ layer.weight.astype(float).T + added))
    assert (error <= (layer.columns + 2) * 2.0**-24 * (magnitude + np.abs(added))).all()


# --- every variant, bit for bit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reordered", [False, True], ids=["in place", "reordered"])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_every_variant_reaches_the_graph_bit_for_bit(
    tmp_path: Path, group_size: int, version: int, sym: bool, reordered: bool
) -> None:
    require_exact(tmp_path, Layer(24, 512, group_size, version, sym, reordered))


@pytest.mark.parametrize("reordered", [False, True], ids=["in place", "reordered"])
@pytest.mark.parametrize(
    ("columns", "group_size"),
    [
        *((96, 96), (96, 48), (64, 16), (224, 32)),  # split into blocks of 32 or 16; an odd number of groups
        *((40, -1), (8, -1), (344, -1), (1536, -1)),  # one group, which no block size or the largest divides
        *((160, 128), (168, 64), (200, 96)),  # the last group has fewer columns, the last block is padded
        *((64, 128), (256, 512), (1024, 512)),  # groups wider than the matrix, or than the operator allows
    ],
)
def test_groups_that_the_operator_does_not_know_are_split_and_padded(
    tmp_path: Path, columns: int, group_size: int, reordered: bool
) -> None:
    require_exact(tmp_path, Layer(16, columns, group_size, 2, reordered=reordered))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
def test_a_bias_is_added(tmp_path: Path, version: int, sym: bool) -> None:
    require_exact(tmp_path, Layer(version=version, sym=sym, bias=True))


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    group_size=st.sampled_from([16, 32, 48, 64, 96, 128, 256, -1]),
    sym=st.booleans(),
    reordered=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_bundles_layout_holds_any_weight_exactly(
    rows: int, columns: int, group_size: int, sym: bool, reordered: bool, seed: int
) -> None:
    layer = Layer(8 * rows, 8 * columns, group_size, 2, sym, reordered, seed=seed)
    # Negative and zero scales are unusual and mean what they say.
    layer.scales[:, 0] *= -1
    layer.scales[0] = 0
    parts = (layer.values, layer.zeros, layer.scales, layer.group_of)
    values, zeros, scales, group_of = (torch.from_numpy(part) for part in parts)
    size = 8 * columns if group_size == -1 else group_size
    weight = GptqWeight(values.byte(), zeros.byte(), scales, group_of, size)
    stored = to_int4(weight)
    assert torch.equal(stored.dequantize(), torch.from_numpy(layer.weight))
    assert torch.equal(stored.dequantize(), weight.dequantize())
    assert (stored.zero_points is None) == (layer.zeros == 8).all()
    assert (stored.order is None) == weight.trivial
    order, moved = weight.sorted()
    assert torch.equal(moved.group_of, group_of.sort().values)
    assert torch.equal(moved.dequantize(), weight.dequantize()[:, order])


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_int8_activations_come_close(tmp_path: Path, sym: bool, reordered: bool) -> None:
    layer = Layer(sym=sym, reordered=reordered)
    with read(tmp_path, layer) as checkpoint:
        imported = ImportedWeights(checkpoint, RoundToNearest())
        graph, _ = graph_of(tmp_path, imported, "m.weight", checkpoint.tensor("m.weight"), activations="int8")
    source = np.random.default_rng(1).standard_normal((5, layer.columns))
    expected = source @ layer.weight.astype(float).T
    # Half a step of 1/127 of a block's largest activation, some five standard deviations at worst, averages out.
    assert np.abs(run(graph, source) - expected).max() < 0.02 * np.abs(expected).max()


def test_sorting_keeps_the_order_inside_a_group() -> None:
    group_of = torch.tensor([1, 0, 1, 0])
    values = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    zeros, scales = torch.zeros(1, 2, dtype=torch.uint8), torch.ones(1, 2, dtype=torch.float16)
    order, moved = GptqWeight(values, zeros, scales, group_of, 2).sorted()
    assert order.tolist() == [1, 3, 0, 2]
    assert moved.values.tolist() == [[2, 4, 1, 3]]
    assert moved.trivial


# --- what GPTQModel wrote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN_BY_GPTQMODEL)
def test_gptqmodel_dequantizes_its_own_checkpoints_to_the_same_bytes(name: str) -> None:
    expected = json.loads((DATA / "dequantized.json").read_text())[name]
    with open_gptq(DATA / name) as checkpoint:
        assert sorted(checkpoint.quantized_keys()) == sorted(expected)
        zeros = set()
        for key, digest in expected.items():
            weight = quantized(checkpoint, key)
            # The tool multiplies in float16, which rounds the exact product once.
            assert hashlib.sha256(weight.dequantize().half().numpy().tobytes()).hexdigest() == digest, key
            assert weight.trivial != name.endswith("_reordered")
            zeros |= set(weight.zeros.unique().tolist())
        # Among them 0, which version 1 stores as a borrow from the neighbour.
        assert zeros == ({8} if checkpoint.config.sym else set(range(16)))
        assert checkpoint.dtype("lm_head.weight") == "bfloat16"


@pytest.mark.parametrize("name", WRITTEN_BY_GPTQMODEL)
def test_a_decoder_computes_with_the_checkpoints_own_weights(tmp_path: Path, name: str) -> None:
    config = LlamaConfig.read(DATA / name / "config.json")
    graph = GraphBuilder(tmp_path / "decoder.onnx")
    with open_gptq(DATA / name) as checkpoint:
        imported = ImportedWeights(checkpoint, RoundToNearest(), lambda name: llama_matrices(config)[name].keys)
        linears = Linears("int4", imported)
        build_decoder(graph, config, config.vocabulary, checkpoint.tensor, linears, lambda line: None)
        graph.save()
        stored = StoredWeights(graph.path)
        head = stored.linear("lm_head")
        assert not torch.equal(head, checkpoint.tensor("lm_head.weight").float())
        q, k, v = stored.linear("layers.0.qkv_proj").split([64, 32, 32])
        for part, found in {"q": q, "k": k, "v": v}.items():
            assert torch.equal(found, checkpoint.tensor(f"model.layers.0.self_attn.{part}_proj.weight"))
        # The head is not quantized in the checkpoint: what the graph has of it is not exact, and its logits neither.
        source = SourceLlama(
            config,
            config.vocabulary,
            lambda key: head if key == "lm_head.weight" else checkpoint.tensor(key),
            lambda line: None,
        )
        embeddings = checkpoint.tensor("model.embed_tokens.weight").float()
        expected = source.logits([embeddings])[0].numpy()
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    steps = len(embeddings)
    cache = np.zeros((1, config.kv_heads, steps, config.head_size), np.float32)
    inputs = {
        "inputs_embeds": embeddings.numpy()[None],
        "logit_positions": np.arange(steps),
        "seqlens_k": np.array([steps - 1], np.int32),
        "total_sequence_length": np.array(steps, np.int32),
        "past_key.0": cache,
        "past_value.0": cache.copy(),
    }
    found = session.run(["logits"], inputs)[0]
    # Both sides have the same weights and round differently; as in parity.TOLERANCE.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


# --- which quantizer for which matrix ---------------------------------------------------------------------------------


def several(folder: Path, layers: dict[str, Layer], **changes: object) -> GptqCheckpoint:
    tensors = {key: part for module, layer in layers.items() for key, part in layer.tensors(module).items()}
    tensors["plain.weight"] = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    return open_gptq(write(folder, tensors, described(next(iter(layers.values())), **changes)))


def stack(checkpoint: GptqCheckpoint) -> Callable[[str], list[str]]:
    """Layer ``all`` stacks what is quantized, everything else has its own name."""
    return lambda key: checkpoint.quantized_keys() if key == "all" else [key]


def test_what_is_not_quantized_goes_to_the_other_quantizer(tmp_path: Path) -> None:
    with several(tmp_path, {"m": Layer()}) as checkpoint:
        imported = ImportedWeights(checkpoint, RoundToNearest())
        weight = checkpoint.tensor("plain.weight")
        one, other = imported.quantize("plain.weight", weight), RoundToNearest().quantize("", weight)
        assert torch.equal(one.packed, other.packed)
        assert torch.equal(one.scales, other.scales)
        assert imported.name == "imported gptq, rtn"


@pytest.mark.parametrize("quantized_head", [True, False])
def test_a_head_is_quantized_or_not(tmp_path: Path, quantized_head: bool) -> None:
    layers = {"m": Layer(), "lm_head": Layer(rows=40, seed=1)} if quantized_head else {"m": Layer()}
    tensors = {key: part for module, layer in layers.items() for key, part in layer.tensors(module).items()}
    if not quantized_head:
        tensors["lm_head.weight"] = torch.ones(40, 256, dtype=torch.float16)
    with open_gptq(write(tmp_path, tensors, described(Layer(), lm_head=quantized_head))) as checkpoint:
        assert checkpoint.shape("lm_head.weight") == (40, 256)
        assert (checkpoint.quantized("lm_head.weight") is not None) == quantized_head
        assert checkpoint.dtype("lm_head.weight") == ("float32" if quantized_head else "float16")


@pytest.mark.parametrize("reordered", [False, True])
def test_matrices_over_one_input_are_stacked(tmp_path: Path, reordered: bool) -> None:
    layers = {
        "q": Layer(32, reordered=reordered),
        "k": Layer(16, reordered=reordered, seed=1),
        "v": Layer(16, reordered=reordered, seed=2),
    }
    # One of them needs no zero points, the others do. Layers over one input have one order, that of its statistics.
    layers["k"].zeros[:] = 8
    for name in "kv":
        layers[name].group_of = layers["q"].group_of
    with several(tmp_path, layers) as checkpoint:
        whole = torch.cat([checkpoint.tensor(key) for key in checkpoint.quantized_keys()])
        imported = ImportedWeights(checkpoint, RoundToNearest(), stack(checkpoint))
        graph, _ = graph_of(tmp_path, imported, "all", whole)
    assert torch.equal(StoredWeights(graph.path).linear("all"), whole)
    np.testing.assert_array_equal(run(graph, np.eye(256)), whole.T.numpy())
    assert np.array_equal(whole.numpy(), np.concatenate([layers[name].weight for name in sorted(layers)]))


@pytest.mark.parametrize("columns", [256, 320])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("reordered", [True, False])
def test_what_a_layer_takes_is_known_without_its_values(
    tmp_path: Path, columns: int, sym: bool, reordered: bool
) -> None:
    layers = {
        name: Layer(rows, columns, sym=sym, reordered=reordered, seed=rows) for name, rows in (("k", 16), ("q", 40))
    }
    layers["q"].group_of = layers["k"].group_of
    if not sym:
        # One of the stacked matrices would need none.
        layers["k"].zeros[:] = 8
    with several(tmp_path, layers) as checkpoint:
        assert [checkpoint.asymmetric(f"{name}.weight") for name in layers] == [False, not sym]
        assert [checkpoint.reordered(f"{name}.weight") for name in layers] == [reordered, reordered]
        imported = ImportedWeights(checkpoint, RoundToNearest(), stack(checkpoint))
        whole = torch.cat([checkpoint.tensor(key) for key in checkpoint.quantized_keys()])
        for key, weight in (("all", whole), ("plain.weight", checkpoint.tensor("plain.weight"))):
            stored = imported.quantize(key, weight)
            parts = (stored.packed, stored.scales, stored.zero_points, stored.order)
            assert imported.stored_bytes(key, *weight.shape) == sum(part.nbytes for part in parts if part is not None)


def test_matrices_in_different_orders_are_no_layer(tmp_path: Path) -> None:
    layers = {"k": Layer(reordered=True), "q": Layer(reordered=True, seed=1)}
    with several(tmp_path, layers) as checkpoint:
        imported = ImportedWeights(checkpoint, RoundToNearest(), stack(checkpoint))
        with pytest.raises(CheckpointError, match="activation orders differ"):
            imported.quantize("all", torch.zeros(48, 256))


def test_matrices_of_different_widths_are_no_layer(tmp_path: Path) -> None:
    with several(tmp_path, {"k": Layer(), "q": Layer(columns=128)}) as checkpoint:
        imported = ImportedWeights(checkpoint, RoundToNearest(), stack(checkpoint))
        with pytest.raises(CheckpointError, match="widths or groups differ"):
            imported.quantize("all", torch.zeros(48, 256))


def test_a_layer_is_quantized_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with several(tmp_path, {"m": Layer()}) as checkpoint:
        imported = ImportedWeights(checkpoint, RoundToNearest(), lambda key: ["m.weight", "plain.weight"])
        with pytest.raises(CheckpointError, match="only some of them are quantized"):
            imported.quantize("all", torch.zeros(32, 256))


@pytest.mark.parametrize("change", ["another", "folded", "cut"])
def test_a_layer_that_needs_another_matrix_is_refused(tmp_path: Path, change: str) -> None:
    with several(tmp_path, {"gate": Layer(), "up": Layer(seed=1)}) as checkpoint:
        weight = checkpoint.tensor("up.weight")
        asked = {"another": weight, "folded": checkpoint.tensor("gate.weight") * 1.5, "cut": weight[:8]}[change]
        with pytest.raises(CheckpointError, match="another matrix than the one"):
            ImportedWeights(checkpoint, RoundToNearest()).quantize("gate.weight", asked)


@pytest.mark.parametrize("group_size", [8, 24, 40, 100])
def test_groups_that_no_block_divides_are_refused_before_anything_is_written(tmp_path: Path, group_size: int) -> None:
    layer = Layer(columns=480, group_size=group_size)
    with read(tmp_path, layer) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), torch.from_numpy(layer.weight))
        with pytest.raises(CheckpointError, match=f"groups of {group_size} columns") as caught:
            ImportedWeights(checkpoint, RoundToNearest())
    assert caught.value.limit == "multiples of 16"


# --- files and names --------------------------------------------------------------------------------------------------


def test_it_reads_like_an_ordinary_checkpoint(tmp_path: Path) -> None:
    layer = Layer(bias=True)
    tensors = {"a": torch.zeros(2), **layer.tensors("m"), "z.scales_of_something": torch.ones(1)}
    checkpoint = open_gptq(write(tmp_path, tensors, described(layer)))
    with checkpoint:
        assert sorted(checkpoint.keys()) == ["a", "m.bias", "m.weight", "z.scales_of_something"]
        assert checkpoint.files == [tmp_path / "model.safetensors", tmp_path / "quantize_config.json"]
        assert checkpoint.quantized("a") is None
        assert checkpoint.zero_biases == frozenset()
        for missing in ("m.qweight", "m.scales", "b", "b.weight"):
            for ask in (checkpoint.shape, checkpoint.dtype, checkpoint.tensor, checkpoint.quantized):
                with pytest.raises(KeyMismatchError, match="no tensor named"):
                    ask(missing)
    checkpoint.close()
    with pytest.raises(ClosedError):
        checkpoint.tensor("m.weight")


def test_biases_that_old_tools_made_up_are_named(tmp_path: Path) -> None:
    made_up = Layer(bias=True).tensors("made_up")
    made_up["made_up.bias"].zero_()
    tensors = {**made_up, **Layer(bias=True, seed=1).tensors("real"), "plain.bias": torch.zeros(3)}
    with open_gptq(write(tmp_path, tensors, described(Layer()))) as checkpoint:
        assert checkpoint.zero_biases == {"made_up.bias"}


@pytest.mark.parametrize("name", ["gptq_model-4bit-64g.safetensors", "model.safetensors", "one.safetensors"])
def test_autogptq_has_a_file_name_of_its_own(tmp_path: Path, name: str) -> None:
    write(tmp_path, Layer().tensors("m"), described(Layer()), name)
    if name == "one.safetensors":
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            open_gptq(tmp_path)
    else:
        assert open_gptq(tmp_path).files[0].name == name


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "private", Layer().tensors("m"), described(Layer())) / "model.safetensors"
    folder = write(tmp_path / "model", Layer().tensors("m"), described(Layer()))
    (folder / "gptq_model-4bit-64g.safetensors").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        open_gptq(folder)


def test_torch_files_and_shards_are_read_too(tmp_path: Path) -> None:
    layer = Layer(reordered=True)
    expected = torch.from_numpy(layer.weight)
    (tmp_path / "quantize_config.json").write_text(json.dumps(described(layer)))
    torch.save(layer.tensors("m"), tmp_path / "gptq_model-4bit-64g.bin")
    with open_gptq(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), expected)
    (tmp_path / "gptq_model-4bit-64g.bin").unlink()
    shards = {f"model-{i}-of-4.safetensors": {key: part} for i, (key, part) in enumerate(layer.tensors("m").items())}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    index = {"weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_gptq(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), expected)
    shard = tmp_path / next(iter(shards))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-0-of-4.*(incomplete|damaged)"):
        open_gptq(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, length: int) -> None:
    write(tmp_path, Layer().tensors("m"), described(Layer()))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_gptq(tmp_path)


# --- what it says about itself ----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_quantized_says_so(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert GptqConfig.read(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": null}')
    assert GptqConfig.read(tmp_path) is None
    with pytest.raises(CheckpointError, match="does not say that it is quantized"):
        open_gptq(tmp_path)


def test_the_models_own_configuration_is_enough(tmp_path: Path) -> None:
    layer = Layer(version=2, reordered=True)
    write(tmp_path, layer.tensors("m"), None)
    (tmp_path / "quantize_config.json").unlink()
    entry = {"bits": 4, "group_size": 64, "format": "GPTQ_V2", "method": "gptq", "sym": False, "desc_act": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": entry}))
    with open_gptq(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), torch.from_numpy(layer.weight))
        assert checkpoint.config == GptqConfig(64, "gptq_v2", False, True, False, (tmp_path / "config.json",))


def test_what_one_file_leaves_out_the_other_says_and_neither_may_disagree(tmp_path: Path) -> None:
    layer = Layer(version=2)
    write(tmp_path, layer.tensors("m"), described(layer, sym=None))
    entry: dict[str, object] = {"bits": 4, "group_size": 64, "quant_method": "gptq", "sym": False}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with open_gptq(tmp_path) as checkpoint:
        assert checkpoint.config.format == "gptq_v2"
        assert checkpoint.config.sym is False
        assert [path.name for path in checkpoint.files[1:]] == ["quantize_config.json", "config.json"]
    for name, value in {"group_size": 128, "checkpoint_format": "gptq", "desc_act": True}.items():
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**entry, name: value}}))
        with pytest.raises(CheckpointError, match=r"config\.json says .* beside it says"):
            open_gptq(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"sym": None, "desc_act": None},
        {"checkpoint_format": None, "quant_method": None},
        {"format": "gptq", "method": "gptq", "pack_dtype": "int32"},
        {"meta": {"quantizer": ["optimum:1.23", "auto_gptq:0.7.1"]}},
        {"meta": {"quantizer": "auto_gptq:0.7.1"}},
        {"meta": {}},
        {"dynamic": {}},
        {"dynamic": {"-:.*\\.v_proj": {}, "+:.*\\.o_proj": {"bits": 4, "damp_percent": 0.1}, "m": {"group_size": 64}}},
        {"dynamic": {"-:lm_head": {"bits": 8}}},
        {"dynamic": {"m": {"pack_dtype": "int32", "format": "gptq"}}},
        {"lm_head": True},
        {"is_marlin_format": False, "rotation": None, "adapter": {}},
    ],
)
def test_what_is_unsaid_or_beside_the_point_is_no_matter(tmp_path: Path, change: dict[str, Any]) -> None:
    layer = Layer()
    with read(tmp_path, layer, **change) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), torch.from_numpy(layer.weight))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 8}, "bits is 8"),
        ({"bits": 3}, "bits is 3"),
        ({"bits": 4.0}, r"bits is 4\.0"),
        ({"bits": True}, "bits is True"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": None}, "bits is None"),
        ({"group_size": None}, "group_size is None"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": -2}, "group_size is -2"),
        ({"group_size": 64.0}, r"group_size is 64\.0"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": 2**40}, "group_size is"),
        ({"group_size": [64]}, "group_size is"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"desc_act": 1}, "desc_act is 1"),
        ({"quant_method": "awq"}, "method is 'awq'"),
        ({"quant_method": "marlin"}, "method is 'marlin'"),
        ({"checkpoint_format": "marlin"}, "format is 'marlin'"),
        ({"checkpoint_format": "bitblas"}, "format is 'bitblas'"),
        ({"checkpoint_format": "gemm"}, "format is 'gemm'"),
        ({"checkpoint_format": "exllama"}, "format is 'exllama'"),
        ({"checkpoint_format": 2}, "format is 2"),
        ({"checkpoint_format": ["gptq"]}, "format is"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "says format = 'gptq' and format = 'gptq_v2'"),
        ({"is_marlin_format": True}, "is_marlin_format is True"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
        ({"adapter": {"name": "lora", "rank": 64}}, "adapter is"),
        ({"activation": {"mode": "w4a8"}}, "activation is"),
        ({"dynamic": "lm_head"}, "dynamic is 'lm_head'"),
        ({"dynamic": {"lm_head": {"bits": 8}}}, "dynamic rule 'lm_head' with bits = 8, and bits = 4"),
        ({"dynamic": {"+:.*down.*": {"bits": 4, "group_size": 32}}}, "group_size = 32, and group_size = 64"),
        ({"dynamic": {".*": {"sym": True}}}, "sym = True"),
        ({"dynamic": {".*": {"pack_dtype": "int64"}}}, "pack_dtype = 'int64', and pack_dtype = 'int32'"),
        ({"dynamic": {".*": {"adapter": {"rank": 8}}}}, "without an adapter"),
        ({"dynamic": {".*": 8}}, "an object without an adapter"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        read(tmp_path, Layer(), **change)
    assert "quantize_config.json" in str(caught.value)


@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"4", b'{"bits": 4, "bits": 8}', b"\xff\xfe", b"[" * 200_000, b" " * (5 << 20)],
)
def test_a_configuration_that_is_none(tmp_path: Path, file: str, content: bytes) -> None:
    write(tmp_path, Layer().tensors("m"), described(Layer()))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        open_gptq(tmp_path)


def test_an_entry_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": "gptq"}')
    with pytest.raises(CheckpointError, match="no object that describes a quantization"):
        open_gptq(tmp_path)


# --- numbers that contradict ------------------------------------------------------------------------------------------


def damaged(folder: Path, change: dict[str, torch.Tensor | None], layer: Layer, **config: object) -> GptqCheckpoint:
    """Layer ``m`` with tensors replaced, added, or (by None) taken out."""
    tensors = {**layer.tensors("m"), **change}
    whole = {key: part.contiguous() for key, part in tensors.items() if part is not None}
    return open_gptq(write(folder, whole, described(layer, **config)))


INT, HALF = torch.int32, torch.float16


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"m.scales": None}, r"missing: m.scales \[4, 24\]"),
        ({"m.qzeros": None}, r"missing: m.qzeros \[4, 3\]"),
        ({"m.g_idx": None}, r"missing: m.g_idx \[256\]"),
        ({"m.qzeros": torch.zeros(4, 4, dtype=INT)}, r"m.qzeros is \[4, 4\], \[4, 3\] is implied"),
        ({"m.qzeros": torch.zeros(5, 3, dtype=INT)}, r"m.qzeros is \[5, 3\]"),
        ({"m.qzeros": torch.zeros(4, 24, dtype=INT)}, r"m.qzeros is \[4, 24\]"),
        ({"m.qzeros": torch.zeros(12, dtype=INT)}, r"m.qzeros is \[12\]"),
        ({"m.qzeros": torch.zeros(4, 3, dtype=HALF)}, "m.qzeros is float16, not int32"),
        ({"m.scales": torch.ones(2, 24, dtype=HALF)}, r"m.scales is \[2, 24\]"),
        ({"m.scales": torch.ones(4, 24, dtype=torch.float64)}, "m.scales is float64"),
        ({"m.scales": torch.ones(24, 4, dtype=HALF)}, r"m.scales is \[24, 4\]"),
        ({"m.g_idx": torch.zeros(255, dtype=INT)}, r"m.g_idx is \[255\]"),
        ({"m.g_idx": torch.zeros(256)}, "m.g_idx is float32"),
        ({"m.bias": torch.zeros(23, dtype=HALF)}, r"m.bias is \[23\]"),
        ({"m.weight": torch.zeros(24, 256, dtype=HALF)}, "both quantized and not: m.weight"),
        ({"m.qweight": torch.zeros(32, 24, dtype=torch.int64)}, "m.qweight is int64"),
        ({"m.qweight": torch.zeros(64, 24, dtype=INT)}, r"m.scales is \[4, 24\], \[8, 24\] is implied"),  # 8 bits
        ({"m.qweight": torch.zeros(256, 3, dtype=INT)}, r"m.qweight is \[256, 3\]"),  # AWQ
        ({"m.qweight": torch.zeros(768, dtype=INT)}, r"m.qweight is \[768\]"),
        ({"m.qweight": torch.zeros(0, 24, dtype=INT)}, r"m.qweight is \[0, 24\]"),
        ({"n.scales": torch.ones(1)}, "without qweight: n.scales"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, change: dict[str, torch.Tensor], problem: str) -> None:
    with pytest.raises(KeyMismatchError, match=problem) as caught:
        damaged(tmp_path, change, Layer(reordered=True))
    assert len(caught.value.problems) >= 1


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    change = {"m.scales": None, "m.g_idx": torch.zeros(1), "n.qzeros": torch.ones(1), "o.qweight": torch.ones(1)}
    with pytest.raises(KeyMismatchError, match="in 4 places") as caught:
        damaged(tmp_path, change, Layer())
    assert len(caught.value.problems) == 4


def test_group_counts_follow_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(KeyMismatchError, match=r"m.scales is \[4, 24\], \[2, 24\] is implied"):
        read(tmp_path, Layer(), group_size=128)


def test_plain_weights_beside_a_quantization(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no quantized matrix"):
        open_gptq(write(tmp_path, {"m.weight": torch.ones(8, 8)}, described(Layer())))


@pytest.mark.parametrize(
    ("g_idx", "named"),
    [
        (lambda right: right + 1, "groups from 1 to 4"),
        (lambda right: right - 1, "groups from -1 to 2"),
        (lambda right: right * 2**20, "groups from 0"),
        (lambda right: right * 0, "groups of other sizes than 64"),
        (lambda right: np.where(np.arange(256) == right.argmax(), 0, right), "groups of other sizes than 64"),
    ],
)
def test_groups_have_a_scale_and_one_size(
    tmp_path: Path, g_idx: Callable[[np.ndarray], np.ndarray], named: str
) -> None:
    layer = Layer(reordered=True)
    layer.group_of = g_idx(layer.group_of)
    with pytest.raises(CheckpointError, match=named):
        damaged(tmp_path, {}, layer)


def test_group_indices_follow_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="desc_act = false"):
        read(tmp_path, Layer(reordered=True), desc_act=False)
    # Static groups keep their places under activation order too.
    read(tmp_path, Layer(), desc_act=True, static_groups=True).close()


def test_without_group_indices_columns_are_in_order(tmp_path: Path) -> None:
    layer = Layer()
    for desc_act in (False, None):
        with damaged(tmp_path, {"m.g_idx": None}, layer, desc_act=desc_act) as checkpoint:
            assert torch.equal(checkpoint.tensor("m.weight"), torch.from_numpy(layer.weight))
    wide = torch.from_numpy(layer.group_of)
    assert wide.dtype == torch.int64
    damaged(tmp_path, {"m.g_idx": wide}, layer).close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    layer = Layer()
    layer.scales[3, 1] = value
    with pytest.raises(CheckpointError, match=r"m\.scales holds NaN or infinity"):
        damaged(tmp_path, {}, layer)


def test_negative_scales_mean_what_they_say(tmp_path: Path) -> None:
    layer = Layer(sym=True)
    layer.scales *= -1
    steps = np.abs(layer.scales).astype(np.float32)[:, layer.group_of]
    with read(tmp_path, layer) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), torch.from_numpy(layer.weight))
        stored = to_int4(quantized(checkpoint, "m.weight"))
        assert torch.equal(stored.steps(), torch.from_numpy(steps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_are_taken_if_float16_holds_them(tmp_path: Path, dtype: torch.dtype) -> None:
    scales = torch.full((4, 24), 0.01171875, dtype=dtype)
    with damaged(tmp_path, {"m.scales": scales}, Layer()) as checkpoint:
        assert torch.equal(quantized(checkpoint, "m.weight").scales.float(), scales.T.float())
    for beyond in (1e-9, 1e6):
        with pytest.raises(CheckpointError, match="values that float16 cannot"):
            damaged(tmp_path, {"m.scales": torch.full((4, 24), beyond, dtype=dtype)}, Layer())


def test_symmetric_zero_points_are_eight(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"zero points from 1 to 15 .* sym = true"):
        read(tmp_path, Layer(), sym=True)


@pytest.mark.parametrize(("said", "meant"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_a_checkpoint_that_names_the_wrong_format_is_told(tmp_path: Path, said: str, meant: str) -> None:
    """Qwen3.5-27B-GPTQ-Int4 was published so (vllm-project/vllm#38966); read as it says, every weight is one off."""
    layer = Layer(sym=True, version=1 if meant == "gptq" else 2)
    with pytest.raises(CheckpointError, match=f"In format {meant} they would be 8: set checkpoint_format to {meant}"):
        read(tmp_path, layer, checkpoint_format=said)
    read(tmp_path, layer).close()


def test_a_zero_point_of_zero_is_read_where_it_can_be_told(tmp_path: Path) -> None:
    layer = Layer(version=2)
    layer.zeros[::3] = 0
    with read(tmp_path / "v2", layer) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), torch.from_numpy(layer.weight))
    tensors = layer.tensors("m")
    # GPTQModel subtracts one from eight zero points at once, so that a zero borrows from the next.
    lowered = (tensors["m.qzeros"].long() - 0x11111111) % 2**32
    tensors["m.qzeros"] = torch.from_numpy(lowered.numpy().astype(np.uint32).view(np.int32))
    version_1 = {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.2.0"]}}
    with open_gptq(write(tmp_path / "v1", tensors, described(layer, **version_1))) as checkpoint:
        assert torch.equal(checkpoint.tensor("m.weight"), torch.from_numpy(layer.weight))
    for meta in ({"quantizer": ["auto_gptq:0.7.1"]}, {}, None):
        with pytest.raises(CheckpointError, match="a zero point of 0 or of 16"):
            open_gptq(write(tmp_path / "v1", tensors, described(layer, checkpoint_format="gptq", meta=meta)))


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error_or_another_number(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    """The format has no checksum. Whatever the header or the small tensors then say: no other exception, no crash."""
    folder = tmp_path_factory.mktemp("flipped")
    write(folder, Layer(rows=8, columns=64, group_size=32).tensors("m"), described(Layer(group_size=32)))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        with open_gptq(folder) as checkpoint:
            for key in checkpoint.keys():
                assert torch.isfinite(checkpoint.tensor(key)).all()
    except CheckpointError:
        pass


def test_the_ordinary_reader_shows_the_parts(tmp_path: Path) -> None:
    write(tmp_path, Layer().tensors("m"), described(Layer()))
    with open_checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.keys()) == ["m.g_idx", "m.qweight", "m.qzeros", "m.scales"]
        assert torch.equal(checkpoint.tensor("m.qweight"), load_file(tmp_path / "model.safetensors")["m.qweight"])

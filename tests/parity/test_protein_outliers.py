"""Outlier channels in a trained protein encoder: what each precision loses to them, and what smoothing saves.

The encoder is the packaged demo's. A channel is made an outlier without changing what is computed: gain and shift of a
norm are multiplied by a factor there, the columns of the matrices that read it divided by it. Real models of some size
have such channels by themselves.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import biomedgpt_edge
from biomedgpt_edge import Protein
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.int4_ops import register_int4_ops
from biomedgpt_edge.protein_tokens import residue_ids
from biomedgpt_export import exporter
from biomedgpt_export.calibration import CALIBRATION, PROOF, read_examples
from biomedgpt_export.errors import CalibrationError
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.base import PROTEIN
from biomedgpt_export.families.biomedgpt_10b import WEIGHTS, Layout
from biomedgpt_export.graphs.builder import GraphBuilder
from biomedgpt_export.graphs.config import EsmConfig
from biomedgpt_export.graphs.esm import build_esm
from biomedgpt_export.graphs.int8_ops import write_with_int8_ops
from biomedgpt_export.graphs.linear import GraphPrecision, Linears
from biomedgpt_export.graphs.matrices import esm_matrices, esm_norm_readers
from biomedgpt_export.graphs.stored import StoredWeights
from biomedgpt_export.options import ExportOptions
from biomedgpt_export.quantize.rtn import RoundToNearest
from biomedgpt_export.quantize.smoothing import esm_smoothing
from biomedgpt_export.streamed import ExactStep, StreamedEsm

State = dict[str, torch.Tensor]

DEMO = Path(biomedgpt_edge.__file__).parent / "demo_bundle"
SPEC = Bundle.open(DEMO).manifest.protein_encoder
assert SPEC is not None
CONFIG = EsmConfig(
    hidden_size=SPEC.width,
    intermediate_size=SPEC.intermediate_size,
    layers=SPEC.layers,
    heads=SPEC.heads,
    vocabulary=33,
    context=1026,
    rope_base=10000.0,
    norm_eps=SPEC.norm_eps,
    token_dropout=True,
)


def sequences(path: Path) -> list[str]:
    given = [item for example in read_examples(path) for item in example.inputs]
    return list(dict.fromkeys(item.sequence for item in given if isinstance(item, Protein)))


CALIBRATED = sequences(CALIBRATION)[:12]
HELD_OUT = [*sequences(PROOF), *sequences(CALIBRATION)[12:]]


@pytest.fixture(scope="module")
def trained() -> State:
    """The packaged encoder by the names of transformers; its final norm is part of the projection, hence 1 and 0."""
    path = DEMO / "protein_encoder.onnx"
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
    matrices = StoredWeights(path)
    state: State = {}
    for name, matrix in esm_matrices(CONFIG).items():
        state[f"{matrix.modules[0]}.weight"] = matrices.linear(name)
        state[f"{matrix.modules[0]}.bias"] = torch.tensor(arrays[f"{name}.bias"])
    graph_names = {"attention.LayerNorm": "attention_norm", "LayerNorm": "ffn_norm"}
    for layer in range(CONFIG.layers):
        for norm, name in graph_names.items():
            for part in ("weight", "bias"):
                state[f"encoder.layer.{layer}.{norm}.{part}"] = torch.tensor(arrays[f"layers.{layer}.{name}.{part}"])
    table = torch.tensor(arrays["word_embeddings"])
    state["embeddings.word_embeddings.weight"] = table / EsmConfig.TOKEN_DROPOUT_SCALE
    state["encoder.emb_layer_norm_after.weight"] = torch.ones(CONFIG.hidden_size)
    state["encoder.emb_layer_norm_after.bias"] = torch.zeros(CONFIG.hidden_size)
    return state


def with_outliers(state: State, factor: float, channels: int) -> State:
    """``channels`` of every norm, other ones each time, are ``factor`` times as large."""
    generator = torch.Generator().manual_seed(0)
    changed = dict(state)
    for norm, readers in esm_norm_readers(CONFIG).items():
        scales = torch.ones(CONFIG.hidden_size)
        scales[torch.randperm(CONFIG.hidden_size, generator=generator)[:channels]] = factor
        for part in ("weight", "bias"):
            changed[f"{norm}.{part}"] = state[f"{norm}.{part}"] * scales
        for key in (key for matrix in readers for key in matrix.keys):
            changed[key] = state[key] / scales
    return changed


def smoothed(state: State) -> State:
    ids = [torch.from_numpy(residue_ids(sequence)) for sequence in CALIBRATED]
    factors = esm_smoothing(CONFIG, state.__getitem__, ids)
    return state | {key: state[key] * factor for key, factor in factors.items()}


def features(state: State) -> torch.Tensor:
    """Of all held-out proteins, float32 ``[N, hidden]``, by the checkpoint's own matrices."""
    esm, step = StreamedEsm(CONFIG, state.__getitem__), ExactStep(state.__getitem__)
    ids = [torch.from_numpy(residue_ids(sequence)) for sequence in HELD_OUT]
    hidden = esm.embedded(torch.cat(ids))
    for index in range(esm.layers):
        hidden = esm.layer(index, hidden, [len(one) for one in ids], step)
    return normed(hidden)


def stored_features(state: State, precision: GraphPrecision, *, records: bool = False) -> torch.Tensor:
    """The same by the graph that an export writes, or by that of a bundle in records."""
    options = ort.SessionOptions()
    register_int4_ops(options)
    with tempfile.TemporaryDirectory() as folder:
        graph = GraphBuilder(Path(folder) / "encoder.onnx")
        build_esm(graph, CONFIG, state.__getitem__, Linears(precision, RoundToNearest()), lambda line: None)
        graph.save()
        path = graph.path
        if records:
            path = graph.path.with_name("records.onnx")
            write_with_int8_ops(graph.path, path)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"residue_ids": residue_ids(sequence)[np.newaxis]})[0][0] for sequence in HELD_OUT]
    return normed(torch.from_numpy(np.concatenate(found)))


def normed(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=CONFIG.norm_eps)


def losses(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """1 - cosine, mean and largest over the residues."""
    cosine = torch.nn.functional.cosine_similarity(found.double(), exact.double(), dim=1)
    return float((1 - cosine).mean()), float((1 - cosine).max())


@pytest.fixture(scope="module")
def exact(trained: State) -> torch.Tensor:
    return features(trained)


@pytest.mark.parametrize(
    ("factor", "channels", "mean"),
    [(1, 1, 9e-5), (10, 1, 4e-4), (10, 4, 7e-4), (30, 1, 2.8e-3), (30, 4, 5e-3), (100, 1, 0.033), (100, 4, 0.08)],
)
def test_int8_loses_more_with_each_outlier_and_nothing_more_once_smoothed(
    trained: State, exact: torch.Tensor, factor: float, channels: int, mean: float
) -> None:
    """The mean stays what it is from training to training; the worst of 3,695 residues does not."""
    state = with_outliers(trained, factor, channels)
    assert losses(features(state), exact)[1] < 1e-9, "the model computes what it did"
    assert losses(stored_features(state, "int8"), exact)[0] == pytest.approx(mean, rel=0.5)
    mean, largest = losses(stored_features(smoothed(state), "int8"), exact)
    assert mean < 2e-4
    assert largest < 3e-3


@pytest.mark.parametrize(("factor", "channels"), [(1, 1), (30, 4), (100, 4)])
def test_records_lose_less_since_each_residue_has_a_scale_of_its_own(
    trained: State, exact: torch.Tensor, factor: float, channels: int
) -> None:
    state = with_outliers(trained, factor, channels)
    for one, most in ((state, 0.95 if factor == 1 else 0.5), (smoothed(state), 0.95)):
        records, portable = (losses(stored_features(one, "int8", records=by), exact)[0] for by in (True, False))
        assert records < most * portable


def test_smoothing_helps_where_weights_do_not_make_up_for_an_outlier(trained: State) -> None:
    """Gain and shift alone are scaled: another model, of which nobody knows what is already in the weights."""
    state = with_outliers(trained, 10, channels=1)
    state |= {key: trained[key] for matrix in esm_matrices(CONFIG).values() for key in matrix.keys}
    exact = features(state)
    plain, smooth = (losses(stored_features(one, "int8"), exact)[0] for one in (state, smoothed(state)))
    assert smooth < 0.6 * plain


def test_smoothing_changes_no_bit_of_what_is_computed(trained: State, exact: torch.Tensor) -> None:
    assert torch.equal(features(smoothed(trained)), exact)


def test_fp16_does_not_mind_outliers_and_int4_loses_the_columns_behind_them(
    trained: State, exact: torch.Tensor
) -> None:
    state = with_outliers(trained, 100, channels=4)
    assert losses(stored_features(state, "fp16"), exact)[1] < 1e-5
    assert losses(stored_features(state, "int4"), exact)[0] == pytest.approx(6e-3, rel=0.5)


@pytest.fixture
def release(tiny_checkpoint: Path, trained: State, tmp_path: Path) -> Callable[[float], Path]:
    """The tiny release with the trained encoder in the place of its own, four channels of every norm scaled."""

    def write(factor: float) -> Path:
        folder = tmp_path / "release"
        shutil.copytree(tiny_checkpoint, folder)
        path = folder / "protein_ckpts/esm2-3b/config.json"
        sizes = {
            "hidden_size": CONFIG.hidden_size,
            "intermediate_size": CONFIG.intermediate_size,
            "num_hidden_layers": CONFIG.layers,
            "num_attention_heads": CONFIG.heads,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
        whole: State = torch.load(folder / WEIGHTS, weights_only=True)
        kept = {key: value for key, value in whole.items() if not key.startswith(PROTEIN)}
        kept["proj_prot.weight"] = torch.randn(128, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
        encoder = with_outliers(trained, factor, channels=4)
        torch.save({**kept, **{PROTEIN + key: value for key, value in encoder.items()}}, folder / WEIGHTS)
        return folder

    return write


def proved_cosine(release: Path, out: Path) -> float:
    """What the export prints as the least cosine of soft tokens."""
    lines: list[str] = []
    options = ExportOptions(Layout.locate(release), out, "fp16", protein_encoder="int8")
    export_bundle(options, lines.append)
    (line,) = [line for line in lines if line.strip().startswith("cosine of soft tokens")]
    return float(line.rpartition(" ")[2])


def test_the_export_smooths_an_int8_encoder_and_says_so(release: Callable[[float], Path], tmp_path: Path) -> None:
    assert proved_cosine(release(100), tmp_path / "bundle") > 0.99
    recipe = Bundle.open(tmp_path / "bundle").manifest.quantization["protein_encoder.onnx"]
    assert recipe["smoothing"] == "SmoothQuant, strength 0.5, powers of two"


def test_the_figure_that_the_export_prints_shows_outliers(
    release: Callable[[float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "esm_smoothing", lambda *arguments: {})
    assert proved_cosine(release(100), tmp_path / "bundle") < 0.9


def test_an_int8_encoder_is_calibrated_with_the_questions_that_are_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What is it?", "smiles": "CCO"}')
    options = ExportOptions(
        Layout.locate(tiny_checkpoint), tmp_path / "bundle", "fp16", protein_encoder="int8", calibration=questions
    )
    with pytest.raises(CalibrationError, match="none of the calibration questions has a protein"):
        export_bundle(options, lambda line: None)
    assert not (tmp_path / "bundle").exists()


def test_channels_that_are_silent_or_read_by_nothing_are_left_alone(trained: State) -> None:
    state = dict(trained)
    norm, (query, key, value) = next(iter(esm_norm_readers(CONFIG).items()))
    for part in ("weight", "bias"):
        state[f"{norm}.{part}"] = state[f"{norm}.{part}"].clone()
        state[f"{norm}.{part}"][3] = 0
    for matrix in (query, key, value):
        state[matrix.keys[0]] = state[matrix.keys[0]].clone()
        state[matrix.keys[0]][:, 5] = 0
    factors = esm_smoothing(CONFIG, state.__getitem__, [torch.from_numpy(residue_ids(HELD_OUT[0]))])
    assert factors[query.keys[0]][[3, 5]].tolist() == [1, 1]
    assert bool(torch.stack([factor.isfinite().all() for factor in factors.values()]).all())

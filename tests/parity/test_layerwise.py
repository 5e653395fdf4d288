"""GPTQ through a whole model: better than rounding, in the order in which it computes, and the same when resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from biomedgpt_export.families.tensors import llama_tensors
from biomedgpt_export.graphs.config import LlamaConfig
from biomedgpt_export.quantize.gptq import GptqOptions, Hessian, gptq
from biomedgpt_export.quantize.journal import Journal
from biomedgpt_export.quantize.layerwise import JournalQuantizer, Layerwise
from biomedgpt_export.quantize.rtn import RoundToNearest
from biomedgpt_export.streamed import StreamedLlama, Weights
from biomedgpt_export.streamed_model import walk_exactly

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, head_size=16, vocabulary=40, context=128,
    rope_base=10000.0, norm_eps=1e-6, attention_bias=False, tied_head=False,
)  # fmt: skip
LENGTHS = [40, 7, 60]
OPTIONS = GptqOptions(group_size=32)


@dataclass
class Model:
    llama: StreamedLlama
    weights: Weights
    embeddings: torch.Tensor


@pytest.fixture(scope="module")
def model() -> Model:
    """A random model with a few loud channels, and prompts for it."""
    generator = torch.Generator().manual_seed(0)
    loud = torch.ones(CONFIG.hidden_size)
    loud[::16] = 8.0

    def made(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return loud.clone() if len(shape) == 1 else torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {name: made(name, shape) for name, shape in llama_tensors(CONFIG, CONFIG.vocabulary)}
    embeddings = torch.randn(sum(LENGTHS), CONFIG.hidden_size, generator=generator)
    return Model(StreamedLlama(CONFIG, tensors.__getitem__), tensors.__getitem__, embeddings)


def quantized(model: Model, folder: Path) -> tuple[Journal, torch.Tensor]:
    journal = Journal(folder, {})
    layerwise = Layerwise(journal, OPTIONS, lambda text: None)
    hidden = layerwise.layers("decoder", model.llama, model.weights, model.embeddings, LENGTHS)
    layerwise.head("decoder", model.llama, model.weights, model.llama.normed(hidden))
    return journal, hidden


def rounded(model: Model) -> Weights:
    def weights(key: str) -> torch.Tensor:
        tensor = model.weights(key)
        return RoundToNearest().quantize(key, tensor).dequantize() if key.endswith("_proj.weight") else tensor

    return weights


def test_the_last_layer_is_closer_than_that_of_rounded_weights(model: Model, tmp_path: Path) -> None:
    _, hidden = quantized(model, tmp_path)
    exact = walk_exactly("decoder", model.llama, model.weights, model.embeddings, LENGTHS)
    nearest = walk_exactly("decoder", StreamedLlama(CONFIG, rounded(model)), rounded(model), model.embeddings, LENGTHS)
    errors = [float((one - exact).square().mean()) for one in (hidden, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_each_matrix_is_chosen_for_what_quantized_ones_before_it_put_out(model: Model, tmp_path: Path) -> None:
    """The first layer's output projection again, from the definition."""
    journal, _ = quantized(model, tmp_path)
    unit = journal.read("decoder.layers.0")
    assert unit is not None
    seen: dict[str, torch.Tensor] = {}

    class Watching:
        def __call__(self, matrices, rows):  # type: ignore[no-untyped-def]
            seen[matrices[0].name] = rows
            return [lambda x, m=matrix: x @ unit.matrices[m.name].dequantize().T for matrix in matrices]

    model.llama.layer(0, model.embeddings, LENGTHS, Watching())
    for name, key in (("o_proj", "self_attn.o_proj"), ("down_proj", "mlp.down_proj")):
        hessian = Hessian(name, seen[f"layers.0.{name}"].shape[1])
        hessian.add(seen[f"layers.0.{name}"])
        alone = gptq(model.weights(f"model.layers.0.{key}.weight"), hessian, OPTIONS).weight
        differing = (alone.packed != unit.matrices[f"layers.0.{name}"].packed).float().mean()
        # Sums in another order may tip a value that lies between two levels.
        assert differing < 0.01


@pytest.mark.parametrize("left", [0, 1, 2])
def test_work_that_is_taken_up_ends_with_the_same_bytes(model: Model, tmp_path: Path, left: int) -> None:
    whole, hidden = quantized(model, tmp_path / "whole")
    parts, _ = quantized(model, tmp_path / "parts")
    units = ["decoder.layers.0", "decoder.layers.1", "decoder.lm_head"]
    assert whole.units() == parts.units() == units
    for unit in units[left:]:
        (tmp_path / "parts" / f"{unit}.safetensors").unlink()
    _, again = quantized(model, tmp_path / "parts")
    assert torch.equal(again, hidden)
    for unit in units:
        name = f"{unit}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_damaged_layer_is_quantized_again(model: Model, tmp_path: Path) -> None:
    quantized(model, tmp_path)
    path = tmp_path / "decoder.layers.1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    quantized(model, tmp_path)
    assert path.read_bytes() == whole


def test_graphs_get_the_matrices_of_the_journal(model: Model, tmp_path: Path) -> None:
    journal, _ = quantized(model, tmp_path)
    quantizer = JournalQuantizer(journal, "decoder")
    unit = journal.read("decoder.layers.1")
    assert unit is not None
    found = quantizer.quantize("layers.1.down_proj", torch.zeros(64, 96))
    assert torch.equal(found.packed, unit.matrices["layers.1.down_proj"].packed)
    assert quantizer.quantize("lm_head", torch.zeros(40, 64)).columns == 64
    (tmp_path / "decoder.layers.0.safetensors").unlink()
    with pytest.raises(OSError, match="removed or changed"):
        quantizer.quantize("layers.0.o_proj", torch.zeros(64, 64))

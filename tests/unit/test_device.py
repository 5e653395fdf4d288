"""The quantizer's device: what is not there is refused, and nothing is computed with tensors of two places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from biomedgpt_export import device, streamed
from biomedgpt_export.device import CPU, describe, find_device
from biomedgpt_export.errors import DeviceError
from biomedgpt_export.families.tensors import esm_tensors, llama_tensors
from biomedgpt_export.graphs.config import EsmConfig, LlamaConfig
from biomedgpt_export.graphs.matrices import Weights
from biomedgpt_export.quantize import gptq as gptq_module
from biomedgpt_export.quantize.gptq import GptqOptions
from biomedgpt_export.quantize.journal import Journal
from biomedgpt_export.quantize.layerwise import Layerwise
from biomedgpt_export.streamed import StreamedEsm, StreamedLlama

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, layers=1, heads=4, kv_heads=2, head_size=16, vocabulary=40, context=128,
    rope_base=10000.0, norm_eps=1e-6, attention_bias=True, tied_head=False,
)  # fmt: skip
ESM = EsmConfig(
    hidden_size=64, intermediate_size=96, layers=1, heads=4, vocabulary=33, context=1026, rope_base=10000.0,
    norm_eps=1e-5, token_dropout=True,
)  # fmt: skip
LENGTHS = [40, 7, 60]


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:0:1", "cuda:9999", "CPU", "mps"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="there is no device") as caught:
        find_device(name)
    assert caught.value.limit == "cpu, cuda or cuda:N"


def test_without_cuda_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="built without CUDA"):
        find_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="finds 0 GPUs"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="finds 2 GPUs"):
        find_device("cuda:2")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cuda") == torch.device("cuda", 0)


def test_a_device_is_described_by_what_the_bytes_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert describe(find_device("cpu")) == "cpu"
    assert describe(torch.device("cuda", 0)) == describe(torch.device("cuda", 1)) == "cuda: Some GPU"


# --- one path for every device ----------------------------------------------------------------------------------------


class TwoPlaces(TorchDispatchMode):
    """Fails where one operator reads tensors of the host and of the device; without a place are fresh ones."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        places = {place for place in map(place_of, given) if place}
        assert len(places) < 2, f"{func} reads tensors of the host and of the device"
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and places:
                put(leaf, *places)
        if "device" in places:
            self.on_device.add(str(func))
        return result


def place_of(tensor: torch.Tensor) -> str | None:
    return getattr(tensor, "place", None)


def put(tensor: torch.Tensor, place: str) -> torch.Tensor:
    tensor.place = place  # type: ignore[attr-defined]
    return tensor


def fake_move(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    return tensor.float() if place_of(tensor) == "device" else put(tensor.float().clone(), "device")


def fake_return(tensor: torch.Tensor) -> torch.Tensor:
    return put(tensor.clone(), "host")


@pytest.fixture
def two_places(monkeypatch: pytest.MonkeyPatch) -> TwoPlaces:
    for module in (streamed, gptq_module):
        monkeypatch.setattr(module, "moved", fake_move)
        monkeypatch.setattr(module, "returned", fake_return)
    return TwoPlaces()


def on_the_host(tensors: Any) -> Weights:
    generator = torch.Generator().manual_seed(0)
    made = {name: put(torch.randn(shape, generator=generator) / shape[-1] ** 0.5, "host") for name, shape in tensors}
    return made.__getitem__


def llama_model() -> tuple[StreamedLlama, Weights]:
    weights = on_the_host(llama_tensors(LLAMA, LLAMA.vocabulary))
    return StreamedLlama(LLAMA, weights), weights


def esm_model() -> tuple[StreamedEsm, Weights]:
    weights = on_the_host(esm_tensors(ESM))
    return StreamedEsm(ESM, weights), weights


@pytest.mark.parametrize("made", [llama_model, esm_model])
@pytest.mark.parametrize("rows", [32, 2048])
def test_everything_is_computed_on_the_device_and_kept_on_the_host(
    made: Callable[[], Any], rows: int, two_places: TwoPlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is the host in disguise, so that a tensor which was not moved is found without a GPU."""
    monkeypatch.setattr(streamed, "ROWS_AT_ONCE", rows)
    model, weights = made()
    layerwise = Layerwise(Journal(tmp_path, {}), GptqOptions(group_size=32), lambda line: None)
    hidden = put(torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(1)), "host")
    with two_places:
        last = layerwise.layers("part", model, weights, hidden, LENGTHS)
        if isinstance(model, StreamedLlama):
            layerwise.head("part", model, weights, model.normed(last))
    assert place_of(last) == "host"
    operators = " ".join(two_places.on_device)
    for expected in ("addmm_", "linalg_cholesky_ex", "attention", "linear"):
        assert expected in operators, f"{expected} did not run on the device"


def test_rows_are_the_same_however_many_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    for size in (1, 5, 12, 100):
        monkeypatch.setattr(streamed, "ROWS_AT_ONCE", size)
        assert torch.equal(streamed.rowwise(lambda some: some[:, :1] * 2, rows, CPU), rows[:, :1] * 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("made", [llama_model, esm_model])
def test_a_gpu_quantizes_as_well_as_the_processor(made: Callable[[], Any], tmp_path: Path) -> None:
    model, weights = made()
    outputs = []
    for name in ("cpu", "cuda"):
        model.device = device.find_device(name)
        layerwise = Layerwise(Journal(tmp_path / name, {}), GptqOptions(group_size=32), lambda line: None)
        hidden = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(1))
        outputs.append(layerwise.layers("part", model, weights, hidden, LENGTHS))
    assert outputs[1].device == CPU
    # Values between two levels may fall to either side.
    assert float((outputs[0] - outputs[1]).square().mean()) < 0.05 * float(outputs[0].square().mean())

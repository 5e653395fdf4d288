"""Engines are built here for a GPU that is elsewhere: whole or not at all, once, and of the kernels that are wanted."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import GraphProto, TensorProto

from biomedgpt_edge import device_cache
from biomedgpt_edge.bundle import Bundle
from biomedgpt_edge.cli.main import main
from biomedgpt_edge.device_cache import cache_use, clear_cache
from biomedgpt_edge.engine import DEMO_BUNDLE
from biomedgpt_edge.errors import OptionError, PlatformError, UnsupportedGraphError
from biomedgpt_edge.portable import derived_files, derived_graph, of_standard
from biomedgpt_edge.tensorrt import build as module
from biomedgpt_edge.tensorrt.build import Plan, engines_for, find_target, plan_engines
from biomedgpt_edge.tensorrt.inspection import Layer, Tensor, products
from biomedgpt_edge.tensorrt.library import load_tensorrt
from biomedgpt_edge.tensorrt.profiles import Profile
from biomedgpt_edge.tensorrt.store import building, stored_context
from biomedgpt_export.exporter import export_bundle
from biomedgpt_export.families.biomedgpt_10b import Layout
from biomedgpt_export.options import ExportOptions
from fake_gpu import FakeCuda, Status

REFERENCE = Path(__file__).parents[1] / "data" / "biomedgpt-tiny"
PARTS = ["decoder", "molecule_encoder", "protein_encoder"]


def silent(line: str) -> None:
    pass


# --- real ones --------------------------------------------------------------------------------------------------------


@dataclass
class Built:
    """What one call of the command did.

    Attributes:
        layers: by part, of its engine.
    """

    plan: Plan
    code: int
    facts: dict[str, Any]
    told: str
    files: set[str]
    sizes: dict[str, int]
    derived_left: list[str]
    layers: dict[str, list[Layer]]

    def graph(self, part: str) -> GraphProto:
        found = next(one for one in self.plan.parts if one.name == part)
        path = self.plan.bundle.file(found.derivation.derived.graph)
        return onnx.load(str(path), load_external_data=False).graph

    def profiles(self, part: str) -> list[Profile]:
        return next(one.profiles for one in self.plan.parts if one.name == part)

    def by_profile(self, part: str) -> list[list[Layer]]:
        """The layers of each profile, whose number their names end with."""
        found: list[list[Layer]] = [[] for _ in self.profiles(part)]
        for layer in self.layers[part]:
            match = re.search(r"_myl(\d+)_\d+$", layer.name)
            assert match is not None, layer.name
            found[int(match[1])].append(layer)
        return found


def run_build(cache: Path, bundle: Path, *options: str) -> Built:
    """'engines build --device sm89 --json' in a device cache of its own."""
    layers, out, err = dict[str, list[Layer]](), io.StringIO(), io.StringIO()
    real = module.build_engine

    def recording(*arguments: Any) -> list[Layer]:
        layers[arguments[3].stem] = real(*arguments)
        return layers[arguments[3].stem]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOMEDGPT_EDGE_CACHE", str(cache))
        patch.setattr(module, "build_engine", recording)
        given = [] if bundle == DEMO_BUNDLE else [str(bundle)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["engines", "build", *given, "--device", "sm89", "--json", *options])
        facts = json.loads(out.getvalue())
        context = int(options[options.index("--context") + 1]) if "--context" in options else None
        plan = plan_engines(Bundle.open(bundle), find_target("sm89"), context)
        folder = Path(facts["folder"])
        assert folder == plan.key.folder
        left = [path.name for path in (cache / "standard").rglob("*") if path.suffix != ".lock"]
        paths = list(folder.iterdir())
    sizes = {path.stem: path.stat().st_size for path in paths if path.suffix == ".engine"}
    return Built(plan, code, facts, err.getvalue(), {path.name for path in paths}, sizes, left, layers)


@pytest.fixture(scope="module")
def builds(tiny_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Builds by name, made when they are first asked for."""
    done = dict[str, Built]()

    def reference() -> Path:
        out = tmp_path_factory.mktemp("reference") / "bundle"
        options = ExportOptions(Layout.locate(REFERENCE), out, "int4", quantizer="rtn", proof="none")
        export_bundle(options, lambda line: None)
        return out

    def built(name: str) -> Built:
        if name not in done:
            bundle = DEMO_BUNDLE if name == "demo" else reference() if name == "reference" else tiny_bundles(name)
            options = ["--context", "300"] if name == "fp16" else []
            done[name] = run_build(tmp_path_factory.mktemp(name), bundle, *options)
        return done[name]

    return built


@pytest.fixture(params=["int4", "fp16", "reference", "demo"])
def any_built(request: pytest.FixtureRequest, builds: Callable[[str], Built]) -> Built:
    return builds(request.param)


@pytest.fixture(params=["int4", "reference", "demo"])
def int4_built(request: pytest.FixtureRequest, builds: Callable[[str], Built]) -> Built:
    return builds(request.param)


def test_a_machine_without_a_gpu_builds_for_one(any_built: Built) -> None:
    assert any_built.code == 0
    assert any_built.files == {*(f"{part}.engine" for part in PARTS), "engines.json", "stamp.json"}
    assert any_built.facts["device"] == "8.9"
    assert any_built.facts["library"] == any_built.plan.target.library.name
    assert any_built.facts["built"] is True
    assert any_built.facts["bytes"] == any_built.sizes
    assert set(any_built.layers) == set(any_built.sizes) == set(PARTS)


def test_what_engines_were_built_of_is_gone_afterwards(any_built: Built) -> None:
    assert any_built.derived_left == []


def test_the_estimates_hold_for_what_was_built(any_built: Built) -> None:
    assert sum(any_built.sizes.values()) < any_built.plan.disk
    assert all(any_built.sizes[part.name] < part.weights + 32 * 2**20 for part in any_built.plan.parts)


def matrices(graph: GraphProto) -> list[str]:
    """Names of the products with a stored matrix, dequantized or not."""
    made = {tensor.name for tensor in graph.initializer}
    made |= {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in made]


@pytest.mark.parametrize("part", ["decoder", "protein_encoder"])
def test_int4_matrices_are_multiplied_as_they_are_in_every_profile(int4_built: Built, part: str) -> None:
    wanted = matrices(int4_built.graph(part))
    assert len(wanted) == len([node for node in int4_built.graph(part).node if node.op_type == "MatMul"]) > 10
    for layers in int4_built.by_profile(part):
        assert {name: "Int4" in kinds for name, kinds in products(layers, wanted).items()} == dict.fromkeys(
            wanted, True
        )
    # None is dequantized first: a matrix in 16 bits would be a constant or the output of a layer of its own.
    scales = {"Half", "Int4"}
    for kinds in products(int4_built.layers[part], wanted).values():
        assert kinds == scales


@pytest.mark.parametrize("part", PARTS)
def test_matrices_of_an_fp16_bundle_are_multiplied_in_fp16(builds: Callable[[str], Built], part: str) -> None:
    built = builds("fp16")
    wanted = matrices(built.graph(part))
    for layers in built.by_profile(part):
        assert products(layers, wanted) == {name: {"Half"} for name in wanted}


def test_attention_is_one_kernel_that_reads_the_mask(any_built: Built) -> None:
    count = any_built.plan.bundle.manifest.decoder.layers
    for index, layers in enumerate(any_built.by_profile("decoder")):
        name = f"mask [profile {index}]" if index else "mask"
        reading = [layer for layer in layers if any(tensor.name.startswith("mask") for tensor in layer.inputs)]
        assert [layer.nodes for layer in reading] == [(f"layers.{n}.attention.heads",) for n in range(count)]
        for layer in reading:
            # Queries, keys, values and the mask; scores do not leave the kernel.
            assert [tensor.name for tensor in layer.inputs].count(name) == 1
            assert len(layer.inputs) == 4
            assert [tensor.element for tensor in layer.outputs] == ["Half"]


@pytest.mark.parametrize("part", ["decoder", "protein_encoder"])
def test_scores_of_attention_are_never_written(any_built: Built, part: str) -> None:
    written = [tensor for layer in any_built.layers[part] for tensor in layer.outputs]
    assert [tensor for tensor in written if tensor.shape[-2:] == (-1, -1)] == []


def float_outputs(built: Built, part: str) -> Counter[str]:
    """What layers give in float32, by what it is."""
    graph = built.graph(part)
    outputs = {value.name for value in graph.output}
    last = f"layers.{built.plan.bundle.manifest.decoder.layers - 1}.next_layernorm"

    def what(layer: Layer, tensor: Tensor) -> str:
        name = tensor.name.partition(" [profile")[0]
        if name in outputs:
            return name
        if {node for node in layer.nodes if node.startswith("layers.0.") and node.endswith(".turned")}:
            return f"rotation table of {tensor.shape[:3]}"
        if set(layer.nodes) == {last, f"{last}.residual"}:
            return "last sum" if tensor.shape[-1] > 1 else "its mean square"
        return layer.name

    layers = built.layers[part]
    return Counter(what(layer, tensor) for layer in layers for tensor in layer.outputs if tensor.element == "Float")


def test_values_are_float16_but_for_those_that_are_wanted_otherwise(any_built: Built) -> None:
    decoder, proteins = (len(any_built.profiles(part)) for part in ("decoder", "protein_encoder"))
    # The sine and cosine of each position; they are looked up once.
    table = "rotation table of (1, 1, -1)"
    assert float_outputs(any_built, "decoder") == {
        "logits": decoder,
        table: 2 * decoder,
        "last sum": decoder,
        "its mean square": decoder,
    }
    assert float_outputs(any_built, "protein_encoder") == {"residue_features": proteins, table: 2 * proteins}
    assert float_outputs(any_built, "molecule_encoder") == {
        "atom_features": len(any_built.profiles("molecule_encoder"))
    }


def test_the_kv_cache_is_float16_of_the_asked_for_length_and_written_in_place(any_built: Built) -> None:
    spec, context = any_built.plan.bundle.manifest.decoder, any_built.plan.context
    names = {f"present_{side}.{layer}" for side in ("key", "value") for layer in range(spec.layers)}

    def caches(tensors: Iterable[Tensor]) -> set[Tensor]:
        return {tensor for tensor in tensors if tensor.name.startswith(("past_", "present_"))}

    written = set()
    for layer in any_built.layers["decoder"]:
        read, given = caches(layer.inputs), caches(layer.outputs)
        written |= given
        # Wherever one is given, it is what was read.
        assert given <= read
    assert {tensor.shape for tensor in written} == {(1, spec.kv_heads, context, spec.head_size)}
    assert {tensor.element for tensor in written} == {"Half"}
    assert {re.sub(r" \[profile \d+\]", "", tensor.name) for tensor in written} == names


def test_an_int8_protein_encoder_stays_in_int8_and_a_slow_build_tells_how_far_it_is(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIOMEDGPT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0)
    layout, out = Layout.locate(tiny_checkpoint), tmp_path / "bundle"
    export_bundle(ExportOptions(layout, out, quantizer="rtn", protein_encoder="int8", proof="none"), silent)
    plan = plan_engines(Bundle.open(out), find_target("sm89"))
    part = next(part for part in plan.parts if part.name == "protein_encoder")
    graph, lines = derived_graph(part.derivation, "sizes"), list[str]()
    layers = module.build_engine(
        plan.target, graph, part.profiles, tmp_path / "protein_encoder.engine", plan.context, lines.append
    )
    wanted = matrices(onnx.load(str(graph), load_external_data=False).graph)
    assert len(wanted) == 12
    for index in range(len(part.profiles)):
        of_profile = [layer for layer in layers if re.search(rf"_myl{index}_\d+$", layer.name)]
        assert products(of_profile, wanted) == {name: {"Half", "Int8"} for name in wanted}
    assert lines
    assert all(re.fullmatch(r"protein_encoder: \d+ s, .*, \d+ of \d+", line) for line in lines)


# --- graphs that TensorRT does not take -------------------------------------------------------------------------------


def changed(bundle: Path, part: int, change: Callable[[GraphProto], object], folder: Path) -> tuple[Path, Any]:
    """A copy of a standard graph, and what the bundle says of its data."""
    opened = Bundle.open(bundle)
    derived = of_standard(opened)[part].derived
    model = onnx.load(str(opened.file(derived.graph)), load_external_data=False)
    change(model.graph)
    (folder / derived.graph).write_bytes(model.SerializeToString())
    return folder / derived.graph, derived


def rename_relu(graph: GraphProto) -> None:
    for node in graph.node:
        node.op_type = "Relux" if node.op_type == "Relu" else node.op_type


def add_zero_points(graph: GraphProto) -> None:
    """Not zero, to the first matrix."""
    node = next(node for node in graph.node if node.op_type == "DequantizeLinear")
    shape = next(tensor.dims for tensor in graph.initializer if tensor.name == node.input[1])
    ones = bytes([0x11]) * (shape[0] * shape[1] // 2)
    graph.initializer.append(onnx.helper.make_tensor("zeros_at_one", TensorProto.INT4, shape, ones, raw=True))
    node.input.append("zeros_at_one")


def unsigned(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        tensor.data_type = TensorProto.UINT4 if tensor.data_type == TensorProto.INT4 else tensor.data_type


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        (1, rename_relu, r"layers\.0\.mlp\.relu \(Relux\).*layers\.0 \(Relux\)"),
        (0, add_zero_points, r"layers\.0\.qkv_proj\.dequantized \(DequantizeLinear\).*zero point"),
        (0, unsigned, r"layers\.0\.qkv_proj\.weight_int4_kn"),
    ],
    ids=["an operator", "zero points", "an element type"],
)
def test_what_tensorrt_does_not_take_is_named_before_weights_are_there(
    tmp_path: Path, part: int, change: Callable[[GraphProto], object], named: str
) -> None:
    library = load_tensorrt("tensorrt_rtx")
    graph, derived = changed(DEMO_BUNDLE, part, change, tmp_path)
    with pytest.raises(
        UnsupportedGraphError, match=rf"{re.escape(library.name)} does not take .*{named}.*--device cuda"
    ) as caught:
        module.require_supported(library, graph, derived)
    assert isinstance(caught.value.seen, list)
    assert {path.name for path in tmp_path.iterdir()} == {graph.name}


def test_a_graph_that_cannot_be_parsed_is_refused_by_the_builder_too(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_engines(Bundle.open(DEMO_BUNDLE), find_target("sm89"))
    graph, derived = changed(DEMO_BUNDLE, 0, add_zero_points, tmp_path)
    shutil.copyfile(derived_graph(plan.parts[0].derivation, "sizes").with_name(derived.data), tmp_path / derived.data)
    with pytest.raises(UnsupportedGraphError, match=r"layers\.0\.qkv_proj\.dequantized"):
        module.build_engine(plan.target, graph, plan.parts[0].profiles, tmp_path / "x.engine", plan.context, silent)
    assert not (tmp_path / "x.engine").exists()


def test_a_graph_that_is_not_taken_ends_the_command_before_anything_is_built(
    tiny_bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(library: Any, graph: Path, derived: Any) -> None:
        if "protein" in graph.name:
            raise UnsupportedGraphError("it does not take layers.1", seen=["layers.1"])

    monkeypatch.setattr(module, "require_supported", refusing)
    code = main(["engines", "build", str(tiny_bundle), "--device", "sm89", "--json"])
    assert code == PlatformError.exit_code
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "platform.graph"
    assert (stub.calls, stub.left()) == ([], [])


# --- once, whole or not at all ----------------------------------------------------------------------------------------


class Stub:
    """Takes the place of TensorRT's builder; the engines that it writes hold their names.

    Attributes:
        calls: names of engines.
        failures: what the next calls raise, None where nothing.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.calls = list[str]()
        self.failures = list[BaseException | None]()

    def build(
        self, target: Any, graph: Path, profiles: Any, out: Path, context: int, report: Callable[[str], None]
    ) -> list[Layer]:
        assert graph.exists()
        assert graph.with_suffix(".data").exists()
        self.calls.append(out.stem)
        out.write_bytes(f"{out.stem} for {context}".encode())
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return []

    def left(self) -> list[str]:
        """What lies in the cache but for locks, and folders of kinds."""
        return [
            str(path.relative_to(self.cache))
            for path in sorted(self.cache.rglob("*"))
            if path.suffix != ".lock" and path.parent != self.cache
        ]

    def folders(self) -> list[Path]:
        return sorted(path for path in self.cache.glob("engines/*") if path.is_dir())


@pytest.fixture
def stub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub(cache)
    monkeypatch.setattr(module, "build_engine", made.build)
    monkeypatch.setattr(module, "require_supported", lambda *arguments: None)
    return made


def planned(bundle: Path, context: int | None = None, device: str = "sm89") -> Plan:
    return plan_engines(Bundle.open(bundle), find_target(device), context)


def built(plan: Plan, **options: Any) -> Path:
    engines = engines_for(plan, "once", silent, **options)
    assert {name: path.read_text() for name, path in engines.files.items()} == {
        part: f"{part} for {plan.context}" for part in PARTS
    }
    return engines.folder


def test_engines_are_built_once_and_again_where_that_is_asked_for(
    tiny_bundle: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["engines", "build", str(tiny_bundle), "--device", "sm89"]
    assert main(command) == 0
    first = capsys.readouterr()
    folder = stub.folders()[0]
    assert first.out.startswith(f"built: {folder}\n")
    assert [line.split()[0] for line in first.out.splitlines()[1:]] == PARTS
    assert main(command) == 0
    assert capsys.readouterr() == (first.out.replace("built:", "already there:"), "")
    assert stub.calls == PARTS
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["built"] is False
    assert main([*command, "--again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["built"] is True
    assert stub.calls == 2 * PARTS
    assert stub.folders() == [folder]


def test_engines_lie_in_a_private_folder(tiny_bundle: Path, stub: Stub) -> None:
    folder = built(planned(tiny_bundle))
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
    assert folder.name.startswith(f"{Bundle.open(tiny_bundle).digest[:16]}-8.9-")


def truncate(engine: Path) -> None:
    os.truncate(engine, engine.stat().st_size - 1)


def flip(engine: Path) -> None:
    content = bytearray(engine.read_bytes())
    content[0] ^= 1
    engine.write_bytes(content)


def remove(engine: Path) -> None:
    engine.unlink()


def replace_by_link(engine: Path) -> None:
    engine.rename(engine.parent.parent / "elsewhere")
    engine.symlink_to(engine.parent.parent / "elsewhere")


def damage_the_listing(engine: Path) -> None:
    (engine.parent / "engines.json").write_text('{"key": ')


def empty_the_listing(engine: Path) -> None:
    (engine.parent / "engines.json").write_text("[]")


def list_another_place(engine: Path) -> None:
    (engine.parent.parent / "decoder.engine").write_bytes(engine.read_bytes())
    listing = engine.parent / "engines.json"
    listing.write_text(listing.read_text().replace('"decoder.engine"', '"../decoder.engine"'))


def list_other_positions(engine: Path) -> None:
    listing = engine.parent / "engines.json"
    listing.write_text(listing.read_text().replace('"context": 2048', '"context": 300'))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        remove,
        replace_by_link,
        damage_the_listing,
        empty_the_listing,
        list_another_place,
        list_other_positions,
    ],
)
def test_engines_that_were_damaged_are_built_again(
    tiny_bundle: Path, stub: Stub, damage: Callable[[Path], None]
) -> None:
    plan = planned(tiny_bundle)
    damage(built(plan) / "decoder.engine")
    built(plan)
    assert stub.calls == 2 * PARTS
    built(plan)
    assert stub.calls == 2 * PARTS


def test_hashes_are_compared_where_a_file_was_touched_or_that_is_asked_for(
    tiny_bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_bundle)
    folder, hashed = built(plan), list[str]()
    real = device_cache.sha256_of
    monkeypatch.setattr(device_cache, "sha256_of", lambda path: (hashed.append(path.stem), real(path))[1])
    for verify in ("once", "sizes", "full"):
        assert engines_for(plan, verify, silent).folder == folder  # type: ignore[arg-type]
    assert hashed == PARTS
    os.utime(folder / "decoder.engine")
    built(plan)
    assert hashed == 2 * PARTS
    assert stub.calls == PARTS


def test_engines_for_other_positions_or_another_library_take_their_place(tiny_bundle: Path, stub: Stub) -> None:
    plan = planned(tiny_bundle)
    other_library = dataclasses.replace(plan.target.library, version="9.9")
    others = [
        planned(tiny_bundle, 300),
        dataclasses.replace(plan, target=dataclasses.replace(plan.target, library=other_library)),
        plan,
    ]
    folders = [built(plan)]
    for other in others:
        folders.append(built(other))
        assert stub.folders() == folders[-1:]
        assert stored_context(other.key) == other.context
        assert stored_context(dataclasses.replace(other.key, context=0)) == other.context
    assert len(set(folders)) == 3
    assert stored_context(dataclasses.replace(plan.key, library="tensorrt 1")) is None
    assert stored_context(dataclasses.replace(plan.key, device="8.6")) is None
    assert dataclasses.replace(plan.key, runtime="0.0.0").folder not in folders


def test_engines_for_another_gpu_stay(tiny_bundle: Path, stub: Stub) -> None:
    folders = [built(planned(tiny_bundle, device=device)) for device in ("sm86", "sm89")]
    assert set(stub.folders()) == set(folders)


def test_of_other_bundles_the_last_stays(tiny_bundle: Path, tiny_bundle_fp16: Path, stub: Stub) -> None:
    first = built(planned(tiny_bundle))
    second = built(planned(tiny_bundle_fp16))
    assert set(stub.folders()) == {first, second}
    assert built(planned(tiny_bundle)) == first
    assert len(stub.calls) == 6
    third = built(planned(DEMO_BUNDLE))
    assert set(stub.folders()) == {second, third}


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), PlatformError.exit_code),
        (PlatformError("TensorRT fails."), PlatformError.exit_code),
    ],
    ids=["Ctrl-C", "a full disk", "TensorRT"],
)
@pytest.mark.parametrize("before", [0, 2])
def test_what_ends_midway_leaves_nothing_and_the_next_build_works(
    tiny_bundle: Path, stub: Stub, failure: BaseException, code: int, before: int
) -> None:
    stub.failures = [None] * before + [failure]
    assert main(["engines", "build", str(tiny_bundle), "--device", "sm89"]) == code
    assert len(stub.calls) == before + 1
    assert stub.left() == []
    built(planned(tiny_bundle))
    assert stub.calls[before + 1 :] == PARTS


def test_what_a_killed_process_left_is_removed(tiny_bundle: Path, stub: Stub) -> None:
    plan = planned(tiny_bundle)
    partial = plan.key.folder.with_name(f"{plan.key.folder.name}.partial")
    partial.mkdir(parents=True)
    (partial / "decoder.engine").write_bytes(b"half")
    folder = built(plan)
    assert stub.folders() == [folder]


def test_standard_graphs_are_derived_one_after_the_other_and_removed(
    tiny_bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, there = planned(tiny_bundle), list[list[bool]]()
    real = stub.build

    def looking(*arguments: Any) -> list[Layer]:
        there.append([derived_files(part.derivation)[1].exists() for part in plan.parts])
        return real(*arguments)

    monkeypatch.setattr(module, "build_engine", looking)
    built(plan)
    assert there == [[True, False, False], [False, True, False], [False, False, True]]
    assert {use.name: use.files for use in cache_use()}["standard"] == 0


def test_processes_that_need_them_at_once_build_them_once(tiny_bundle: Path, stub: Stub) -> None:
    plan, found = planned(tiny_bundle), list[Path]()
    threads = [threading.Thread(target=lambda: found.append(built(plan))) for _ in range(2)]
    with building(plan.key):
        for thread in threads:
            thread.start()
        assert stub.calls == []
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert stub.calls == PARTS


def test_clearing_the_cache_removes_engines(tiny_bundle: Path, stub: Stub) -> None:
    built(planned(tiny_bundle))
    held = {use.name: use.files for use in clear_cache()}
    assert held["engines"] == len(PARTS) + 2
    assert stub.left() == []
    built(planned(tiny_bundle))


def test_a_cache_that_cannot_be_written_is_a_typed_error(tiny_bundle: Path, stub: Stub) -> None:
    stub.cache.write_text("")
    with pytest.raises(PlatformError, match=r"engines cannot be kept in .*Set BIOMEDGPT_EDGE_CACHE"):
        engines_for(planned(tiny_bundle), "once", silent)


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_what_a_build_takes_is_said_before_it_begins(
    tiny_bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, lines = planned(tiny_bundle, 1024), list[str]()
    real = stub.build
    monkeypatch.setattr(
        module, "build_engine", lambda *arguments: (lines.append(f"BUILD {arguments[3].stem}"), real(*arguments))[1]
    )
    engines_for(plan, "once", lines.append)
    assert lines[:2] == [
        f"engines for compute capability 8.9, with {plan.target.library.name}, 1,024 positions",
        f"will take {-(-plan.peak_memory // 2**20)} MiB of memory, {-(-plan.disk // 2**20)} MiB in {stub.cache}, and "
        f"{-(-plan.gpu_memory // 2**20)} MiB on the GPU when they run",
    ]
    assert [line for line in lines if line.startswith("BUILD")] == [f"BUILD {part}" for part in PARTS]
    assert all(
        re.fullmatch(r"(decoder|molecule encoder|protein encoder): (unpacking \d+ MiB|built in \d+ s)|BUILD .*", line)
        for line in lines[2:]
    )


def test_more_positions_take_more_of_the_gpu_and_no_more_to_build(tiny_bundle: Path) -> None:
    short, long = planned(tiny_bundle, 160), planned(tiny_bundle, 2048)
    spec = short.bundle.manifest.decoder
    assert long.gpu_memory - short.gpu_memory == (2048 - 160) * 2 * spec.layers * spec.kv_heads * spec.head_size * 2
    assert (short.peak_memory, short.disk) == (long.peak_memory, long.disk)


def test_too_little_memory_is_refused_beforehand(
    tiny_bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_bundle)
    monkeypatch.setattr(module, "available_memory", lambda: plan.peak_memory - 1)
    with pytest.raises(
        PlatformError, match=r"building takes \d+ MiB of memory, and \d+ MiB are .*--device cuda"
    ) as caught:
        engines_for(plan, "once", silent)
    assert (caught.value.seen, caught.value.limit) == (plan.peak_memory - 1, plan.peak_memory)
    assert (stub.calls, stub.left()) == ([], [])
    for enough in (plan.peak_memory, None):
        monkeypatch.setattr(module, "available_memory", lambda enough=enough: enough)
        built(plan, again=True)


def test_too_little_room_is_refused_beforehand(tiny_bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tiny_bundle)
    usage = type(shutil.disk_usage("/"))(0, 0, plan.disk - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PlatformError, match=r"building takes \d+ MiB in .* are free.*cache clear") as caught:
        engines_for(plan, "once", silent)
    assert (caught.value.seen, caught.value.limit) == (plan.disk - 1, plan.disk)
    assert (stub.calls, stub.left()) == ([], [])


def test_a_gpu_that_is_too_small_is_refused_beforehand(
    tiny_bundle: Path, stub: Stub, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load_tensorrt("tensorrt_rtx")
    monkeypatch.setattr(module, "load_tensorrt", lambda wanted=None: library)
    gpu.memory = 2**26
    plan = planned(tiny_bundle, device="gpu")
    with pytest.raises(PlatformError, match=r"take \d+ MiB, and the Fake GPU has 64 MiB\..*--context") as caught:
        engines_for(plan, "once", silent)
    assert (caught.value.seen, caught.value.limit) == (2**26, plan.gpu_memory)
    assert (stub.calls, stub.left()) == ([], [])
    # Of a GPU that is elsewhere nothing is known.
    built(planned(tiny_bundle))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "sm87"], "not on 8.7 (Jetson Orin)"),
        (["--device", "sm90"], "not on 9.0 (Hopper)"),
        (["--device", "7.0"], "not on 7.0."),
        (["--device", "rtx"], "device is 'rtx'"),
        (["--context", "159", "--device", "sm89"], "context is 159"),
        (["--context", "2049", "--device", "sm89"], "context is 2049"),
        (["--context", "-1", "--device", "sm89"], "context is -1"),
    ],
)
def test_what_cannot_be_built_is_an_option_error(
    tiny_bundle: Path, stub: Stub, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["engines", "build", str(tiny_bundle), "--json", *options]) == OptionError.exit_code
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["code"] == "input.option"
    assert words in error["message"]
    assert error["limit"]
    assert (stub.calls, stub.left()) == ([], [])


def test_the_least_context_is_built(tiny_bundle: Path, stub: Stub) -> None:
    built(planned(tiny_bundle, 160))
    assert stub.calls == PARTS


def test_a_bundle_without_standard_graphs_is_refused(
    tiny_bundle_fp32: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engines", "build", str(tiny_bundle_fp32), "--device", "sm89"]) == OptionError.exit_code
    said = capsys.readouterr().err
    assert "holds no standard graph, for TensorRT, of its decoder and molecule encoder and protein encoder." in said
    assert "Export it with this version and precision int4 or fp16" in said
    assert stub.left() == []


def test_without_a_gpu_another_one_has_to_be_named(
    tiny_bundle: Path, stub: Stub, gpu: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.refused["cudaGetDeviceCount"] = Status.cudaErrorNoDevice
    assert main(["engines", "build", str(tiny_bundle)]) == PlatformError.exit_code
    told = capsys.readouterr().err
    assert "this machine has no NVIDIA GPU: cudaErrorNoDevice" in told
    assert "give its compute capability: --device sm89" in told
    assert stub.left() == []

"""GPTQ: the values of a slow float64 reference, losses against round-to-nearest, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedgpt_export.errors import CalibrationError, QuantizationError
from biomedgpt_export.quantize.gptq import MAX_DAMPING, ORDERS, GptqOptions, Hessian, Order, gptq
from biomedgpt_export.quantize.int4 import Int4Weight, group_size_for, grouped
from biomedgpt_export.quantize.rtn import RoundToNearest

PLAIN = GptqOptions(scale_search=False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * scale


def activations(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated, as those of a trained model are: a few directions, some noise, a few channels that are far larger."""
    draw = generator(seed)
    directions = torch.randn(max(1, columns // 8), columns, generator=draw)
    values = torch.randn(count, len(directions), generator=draw) @ directions / len(directions) ** 0.5
    values += 0.3 * torch.randn(count, columns, generator=draw)
    channels = torch.exp(0.5 * torch.randn(columns, generator=draw))
    channels[torch.randperm(columns, generator=draw)[: columns // 32]] *= 10
    return values * channels


def hessian_of(values: torch.Tensor) -> Hessian:
    hessian = Hessian("layer", values.shape[-1])
    hessian.add(values)
    return hessian


def correlated(columns: int, seed: int = 0) -> Hessian:
    return hessian_of(activations(4 * columns, columns, seed))


def diagonal(values: torch.Tensor) -> Hessian:
    return Hessian.from_state("layer", {"mean": torch.diag(values), "samples": torch.tensor(len(values))})


def loss(weight: torch.Tensor, quantized: Int4Weight, hessian: Hessian) -> float:
    """trace(E H E^T) / trace(W H W^T) in float64."""
    error, weight, mean = (quantized.dequantize() - weight).double(), weight.double(), hessian.mean.double()
    return float(((error @ mean) * error).sum() / ((weight @ mean) * weight).sum())


def rtn_loss(weight: torch.Tensor, hessian: Hessian) -> float:
    return loss(weight, RoundToNearest().quantize("w", weight), hessian)


def same(one: Int4Weight, other: Int4Weight) -> bool:
    return torch.equal(one.packed, other.packed) and torch.equal(one.scales, other.scales)


def levels(quantized: Int4Weight) -> torch.Tensor:
    """int ``[N, groups, group_size]``."""
    low, high = quantized.packed & 0xF, quantized.packed >> 4
    return torch.stack([low, high], dim=-1).flatten(-2).int() - 8


# --- against the definition -------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """Optimal brain quantization as it is defined, in float64: after every column the Hessian that is left is inverted.

    Attributes:
        margin: how close the closest decision was, in steps of rounding a value, a scale to float16, or as the relative
            advantage of a scale. Float32 must decide likewise unless this is tiny.
    """

    weight: torch.Tensor
    mean: torch.Tensor
    options: GptqOptions
    group_size: int = field(init=False)
    margin: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        self.group_size = self.options.group_size or group_size_for(self.weight.shape[1])

    def quantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels int ``[N, groups, group_size]`` and scales float16 ``[N, groups]``."""
        size = self.group_size
        left = grouped(self.weight, size).flatten(1).double()
        width = left.shape[1]
        mean = torch.zeros(width, width, dtype=torch.float64)
        mean[: len(self.mean), : len(self.mean)] = self.mean.double()
        order = self.order(mean.diagonal().tolist())
        dead = mean.diagonal() == 0
        left[:, dead] = 0
        ridge = self.options.damping * mean.diagonal()[~dead].mean()
        mean.diagonal()[dead] = 1
        mean.diagonal().add_(ridge)
        chosen = torch.zeros(left.shape, dtype=torch.int32)
        scales = torch.zeros(len(left), width // size, dtype=torch.float16)
        for position, column in enumerate(order):
            free = order[position:]
            inverse = torch.linalg.inv(mean[free][:, free])
            if position % size == 0:
                group = free[:size]
                # What an error in a column costs once only the columns after it are free.
                cost = torch.stack([1 / torch.linalg.inv(mean[free[i:]][:, free[i:]])[0, 0] for i in range(size)])
                scales[:, column // size] = self.scales(left[:, group], cost)
            scale = scales[:, column // size].double()
            level = self.rounded(left[:, column], scale)
            chosen[:, column] = level.int()
            left[:, free] -= torch.outer((left[:, column] - level * scale) / inverse[0, 0], inverse[0])
        return chosen.view(len(left), -1, size), scales

    def order(self, importance: list[float]) -> list[int]:
        size = self.group_size
        groups = [range(start, start + size) for start in range(0, len(importance), size)]
        if self.options.order == "none":
            return [column for group in groups for column in group]
        groups.sort(key=lambda group: -max(importance[column] for column in group))
        return [column for group in groups for column in sorted(group, key=lambda column: -importance[column])]

    def scales(self, groups: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
        extreme = torch.stack([row[row.abs().argmax()] for row in groups])
        widest = self.halved(extreme / -8)
        if not self.options.scale_search:
            return widest
        shrinks = [1 - 0.05 * step for step in range(11)]
        trials = torch.stack([(widest.double() * m).half() for m in (*shrinks, *(-8 / 7 * s for s in shrinks))])
        nearest = (groups / trials.double().unsqueeze(-1)).round().clamp(-8, 7)
        paid = (groups - nearest * trials.double().unsqueeze(-1)).square() @ cost
        first, second = paid.sort(0)[0][:2]
        self.margin = min(self.margin, float((1 - first / second).min()))
        return trials.gather(0, paid.argmin(0, keepdim=True)).squeeze(0)

    def halved(self, values: torch.Tensor) -> torch.Tensor:
        step = 2.0 ** (values.abs().log2().floor() - 10)
        self.margin = min(self.margin, float(((values / step) % 1 - 0.5).abs().min()))
        return values.half()

    def rounded(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        steps = values / scale
        inside = steps[(steps > -8.5) & (steps < 7.5)]
        if len(inside):
            self.margin = min(self.margin, float((inside % 1 - 0.5).abs().min()))
        return steps.round().clamp(-8, 7)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("columns", "seed"), [(64, 0), (96, 0), (96, 1), (100, 0), (128, 0)])
def test_values_are_those_of_the_definition(columns: int, seed: int, order: Order, search: bool) -> None:
    weight, hessian = weights(3, columns, seed), correlated(columns, seed)
    # 100 columns get groups of 32, the last one padded, unless a size is asked for.
    options = GptqOptions(group_size=None if columns == 100 else 32, order=order, scale_search=search)
    reference = Reference(weight, hessian.mean, options)
    expected, scales = reference.quantize()
    assert reference.margin > 1e-5, "float32 may decide otherwise: take another seed"
    result = gptq(weight, hessian, options).weight
    assert torch.equal(result.scales, scales)
    assert torch.equal(levels(result), expected)


@given(columns=st.integers(1, 200), seed=st.integers(0, 999), spread=st.floats(0, 5), order=st.sampled_from(ORDERS))
@settings(max_examples=50)
def test_columns_that_do_not_influence_each_other_are_rounded_to_nearest(
    columns: int, seed: int, spread: float, order: Order
) -> None:
    # In any order: what is stored for a column and its group comes from these columns.
    weight = weights(3, columns, seed)
    importance = torch.exp(spread * torch.randn(columns, generator=generator(seed)))
    for hessian in (diagonal(importance), diagonal(torch.ones(columns))):
        result = gptq(weight, hessian, GptqOptions(order=order, scale_search=False))
        assert same(result.weight, RoundToNearest().quantize("w", weight))


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_correlated_activations_lose_far_less_than_round_to_nearest(order: Order, search: bool) -> None:
    weight, hessian = weights(64, 256), correlated(256)
    result = gptq(weight, hessian, GptqOptions(order=order, scale_search=search))
    assert loss(weight, result.weight, hessian) < 0.3 * rtn_loss(weight, hessian)


def test_what_is_gained_holds_for_activations_that_calibration_did_not_see() -> None:
    values = activations(4096, 256)
    weight, seen, unseen = weights(64, 256), hessian_of(values[:2048]), hessian_of(values[2048:])
    assert loss(weight, gptq(weight, seen).weight, unseen) < 0.3 * rtn_loss(weight, unseen)


@given(columns=st.integers(1, 200), seed=st.integers(0, 9999), order=st.sampled_from(ORDERS), search=st.booleans())
@settings(max_examples=60)
def test_no_width_loses_more_than_round_to_nearest(columns: int, seed: int, order: Order, search: bool) -> None:
    # Over 32 rows: a single one can be unlucky.
    weight, hessian = weights(32, columns, seed), correlated(columns, seed)
    result = gptq(weight, hessian, GptqOptions(order=order, scale_search=search))
    assert loss(weight, result.weight, hessian) <= 1.001 * rtn_loss(weight, hessian)


def mean_loss(options: GptqOptions) -> float:
    cases = [(weights(32, 256, seed), correlated(256, seed)) for seed in range(4)]
    return sum(gptq(weight, hessian, options).loss for weight, hessian in cases) / len(cases)


def test_order_and_scale_search_each_lower_the_loss() -> None:
    assert mean_loss(GptqOptions(order="group-aware")) < 0.9 * mean_loss(GptqOptions(order="none"))
    assert mean_loss(GptqOptions(scale_search=True)) < 0.9 * mean_loss(GptqOptions(scale_search=False))


@given(columns=st.integers(1, 200), seed=st.integers(0, 999), damping=st.sampled_from([1e-4, 0.01, 1.0]))
@settings(max_examples=30)
def test_the_reported_loss_is_the_share_of_the_output_that_is_lost(columns: int, seed: int, damping: float) -> None:
    weight, hessian = weights(4, columns, seed), correlated(columns, seed)
    result = gptq(weight, hessian, GptqOptions(damping=damping))
    assert result.loss == pytest.approx(loss(weight, result.weight, hessian), rel=1e-3, abs=1e-7)


def test_blocks_change_the_speed_alone() -> None:
    weight, hessian = weights(16, 384), correlated(384)
    losses = [gptq(weight, hessian, GptqOptions(group_size=32, block=block)).loss for block in (1, 33, 128, 1000)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)


def test_stacked_matrices_are_quantized_as_each_alone() -> None:
    one, other, hessian = weights(16, 256, 0), weights(16, 256, 1), correlated(256)
    stacked = levels(gptq(torch.cat([one, other]), hessian).weight)
    alone = torch.cat([levels(gptq(weight, hessian).weight) for weight in (one, other)])
    # Products of another shape round differently, which can turn a tie in a row.
    assert (stacked == alone).flatten(1).all(1).float().mean() > 0.8


def test_the_same_input_gives_the_same_bytes() -> None:
    results = [gptq(weights(16, 200), correlated(200)) for _ in range(2)]
    assert same(results[0].weight, results[1].weight)
    assert results[0].loss == results[1].loss


# --- shapes and values ------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 4), columns=st.integers(1, 200), order=st.sampled_from(ORDERS))
@settings(max_examples=50)
def test_every_shape_has_the_stored_layout(rows: int, columns: int, order: Order) -> None:
    weight = weights(rows, columns)
    result = gptq(weight, correlated(columns), GptqOptions(order=order))
    expected = RoundToNearest().quantize("w", weight)
    for name in ("packed", "scales"):
        stored, other = getattr(result.weight, name), getattr(expected, name)
        assert (stored.shape, stored.dtype, stored.is_contiguous()) == (other.shape, other.dtype, True)
    assert (result.weight.columns, result.weight.group_size) == (columns, expected.group_size)
    assert not levels(result.weight).flatten(1)[:, columns:].any()
    assert result.dead == ()


def test_a_group_size_that_was_asked_for_divides_the_width_or_is_refused() -> None:
    weight, hessian = weights(8, 192), correlated(192)
    assert gptq(weight, hessian, GptqOptions(group_size=32)).weight.scales.shape == (8, 6)
    assert RoundToNearest(32).quantize("w", weight).scales.shape == (8, 6)
    for refused in (
        lambda: gptq(weight, hessian, GptqOptions(group_size=128), key="w"),
        lambda: RoundToNearest(128).quantize("w", weight),
    ):
        with pytest.raises(QuantizationError, match="groups of 128 were asked for, and 'w' has 192 columns") as caught:
            refused()
        assert (caught.value.seen, caught.value.limit) == (128, "64, 32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_dtype_are_quantized_from_their_exact_values(dtype: torch.dtype) -> None:
    weight, hessian = weights(4, 128).to(torch.bfloat16).to(dtype), correlated(128)
    assert same(gptq(weight, hessian).weight, gptq(weight.float(), hessian).weight)


def test_neither_the_weight_nor_the_hessian_is_changed() -> None:
    weight, hessian = weights(4, 100), correlated(100)
    weight[0, 0], hessian.mean[5] = 3.0, 0.0
    hessian.mean[:, 5] = 0
    before = weight.clone(), hessian.mean.clone()
    gptq(weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian.mean, before[1])


@pytest.mark.parametrize("search", [False, True])
def test_zeros_stay_zero_and_lose_nothing(search: bool) -> None:
    result = gptq(torch.zeros(4, 96), correlated(96), GptqOptions(scale_search=search))
    assert not result.weight.dequantize().any()
    assert not result.weight.scales.any()
    assert result.loss == 0


def test_a_row_of_zeros_disturbs_no_other() -> None:
    weight = weights(4, 96)
    weight[2] = 0
    result = gptq(weight, correlated(96)).weight.dequantize()
    assert not result[2].any()
    assert result.isfinite().all()


def test_weights_too_small_for_a_scale_in_fp16_become_zero() -> None:
    assert not gptq(torch.full((2, 64), 1e-9), correlated(64)).weight.dequantize().any()


def test_weights_too_large_for_a_scale_in_fp16_are_refused_by_name() -> None:
    weight = weights(4, 64)
    weight[1, 3] = 8 * 65504.0
    assert gptq(weight, diagonal(torch.ones(64)), PLAIN).weight.dequantize()[1, 3] == 8 * 65504
    weight[1, 3] *= 1.01
    with pytest.raises(QuantizationError, match=r"'up_proj\.weight'.*5\.29e\+05.*float16") as caught:
        gptq(weight, correlated(64), key="up_proj.weight")
    assert caught.value.code == "export.quantization"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_a_weight_are_refused_by_name(value: float) -> None:
    weight = weights(4, 64)
    weight[3, 60] = value
    with pytest.raises(QuantizationError, match=r"'up_proj\.weight' holds NaN or infinity"):
        gptq(weight, correlated(64), key="up_proj.weight")
    with pytest.raises(QuantizationError, match="'layer' holds NaN or infinity"):
        gptq(weight, correlated(64))


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 63), torch.zeros(64), torch.zeros(0, 64), torch.zeros(4, 64, 1), torch.zeros(4, 64).int()],
    ids=lambda weight: f"{list(weight.shape)} {weight.dtype}",
)
def test_a_matrix_of_another_layer_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(QuantizationError, match=r"layer 'layer' is 64 wide") as caught:
        gptq(weight, correlated(64))
    assert caught.value.limit == 64


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 16},
        {"group_size": 0},
        {"damping": 0.0},
        {"damping": 1.5},
        {"damping": float("nan")},
        {"block": 0},
        {"order": "random"},
    ],
    ids=str,
)
def test_options_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match=next(iter(wrong))):
        GptqOptions(**wrong)


# --- dead and dependent columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [96, 100])
def test_columns_without_activation_are_stored_as_zero_and_influence_nothing(columns: int, order: Order) -> None:
    dead = [3, 32, *range(64, 96)]
    values = activations(400, columns)
    values[:, dead] = 0
    weight = weights(8, columns)
    weight[:, dead] *= 1000
    silenced = weight.clone()
    silenced[:, dead] = 0
    result = gptq(weight, hessian_of(values), GptqOptions(order=order))
    assert result.dead == tuple(dead)
    assert not result.weight.dequantize()[:, dead].any()
    assert same(result.weight, gptq(silenced, hessian_of(values), GptqOptions(order=order)).weight)
    assert result.loss < 0.01


def few_directions(columns: int) -> Hessian:
    """A singular H: all activations lie in four dimensions, and two columns are equal."""
    draw = generator(0)
    values = torch.randn(500, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
    values[:, 1] = values[:, 0]
    return hessian_of(values)


def test_dependent_columns_are_no_problem_with_the_usual_damping() -> None:
    weight, hessian = weights(16, 128), few_directions(128)
    result = gptq(weight, hessian)
    assert result.damping == 0.01
    assert loss(weight, result.weight, hessian) < 0.05 * rtn_loss(weight, hessian)


def test_damping_is_raised_tenfold_until_a_singular_hessian_can_be_factorized() -> None:
    weight, hessian = weights(16, 128), few_directions(128)
    result = gptq(weight, hessian, GptqOptions(damping=1e-12))
    assert 1e-12 < result.damping < 1e-3
    assert any(result.damping == pytest.approx(10.0**power) for power in range(-11, -2))
    assert loss(weight, result.weight, hessian) < 0.05 * rtn_loss(weight, hessian)


def test_a_hessian_that_no_activations_can_give_is_refused() -> None:
    state = {"mean": torch.tensor([[1.0, 10.0], [10.0, 1.0]]), "samples": torch.tensor(5)}
    with pytest.raises(CalibrationError, match="'o_proj' are not positive definite") as caught:
        gptq(weights(1, 2), Hessian.from_state("o_proj", state))
    assert str(MAX_DAMPING) in str(caught.value.limit)


@pytest.mark.parametrize("count", [0, 7])
def test_a_layer_that_saw_nothing_but_zeros_is_refused(count: int) -> None:
    with pytest.raises(CalibrationError, match=f"'layer' has seen {count} activations"):
        gptq(weights(2, 32), hessian_of(torch.zeros(count, 32)))


# --- Hessian ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_hessian_is_the_mean_of_outer_products_whatever_the_batches(dtype: torch.dtype) -> None:
    values = activations(120, 40).to(dtype)
    hessian = Hessian("layer", 40)
    for batch in (values[:1], values[1:61].reshape(3, 20, 40), values[61:61], values[61], values[62:]):
        hessian.add(batch)
    expected = values.double().T @ values.double() / 120
    assert hessian.samples == 120
    assert hessian.mean.dtype == torch.float32
    torch.testing.assert_close(hessian.mean.double(), expected, rtol=1e-5, atol=1e-5)


def test_rounding_does_not_add_up_over_many_batches() -> None:
    values = activations(64_000, 8)
    hessian = Hessian("layer", 8)
    for batch in values.split(32):
        hessian.add(batch)
    expected = values.double().T @ values.double() / len(values)
    torch.testing.assert_close(hessian.mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_samples_weigh_the_same_whatever_came_before_them() -> None:
    hessian = Hessian("layer", 1)
    hessian.samples = 2**40
    hessian.add(torch.full((1000, 1), 3.0))
    assert hessian.mean.item() == pytest.approx(9000 / (2**40 + 1000), rel=1e-6)


@pytest.mark.parametrize("split", [0, 1, 50, 120])
def test_merged_hessians_equal_one_that_saw_everything(split: int) -> None:
    values = activations(120, 40)
    merged = hessian_of(values[:split])
    merged.merge(hessian_of(values[split:]))
    assert merged.samples == 120
    torch.testing.assert_close(merged.mean, hessian_of(values).mean, rtol=1e-5, atol=1e-5)


def test_two_hessians_without_samples_merge_into_one_without() -> None:
    hessian = Hessian("layer", 4)
    hessian.merge(Hessian("layer", 4))
    assert hessian.samples == 0
    assert not hessian.mean.any()


def test_hessians_of_different_widths_are_not_merged() -> None:
    with pytest.raises(CalibrationError, match="'up' and 'down' are 4 and 8 wide"):
        Hessian("up", 4).merge(Hessian("down", 8))


def test_a_saved_hessian_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    values = activations(120, 40)
    torch.save(hessian_of(values[:70]).state(), tmp_path / "layer.pt")
    loaded = Hessian.from_state("layer", torch.load(tmp_path / "layer.pt", weights_only=True))
    whole = hessian_of(values[:70])
    for hessian in (loaded, whole):
        hessian.add(values[70:])
    assert loaded.samples == whole.samples
    assert torch.equal(loaded.mean, whole.mean)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e20])
def test_activations_that_no_mean_can_hold_are_refused_and_change_nothing(value: float) -> None:
    hessian = correlated(32)
    before, samples = hessian.mean.clone(), hessian.samples
    values = activations(10, 32)
    values[4, [7, 9]] = value
    with pytest.raises(CalibrationError, match=r"2 of 32 channels that enter layer 'layer' hold NaN") as caught:
        hessian.add(values)
    assert caught.value.code == "export.calibration"
    assert torch.equal(hessian.mean, before)
    assert hessian.samples == samples


@pytest.mark.parametrize(
    "values",
    [torch.zeros(3, 31), torch.tensor(1.0), torch.zeros(3, 32).int()],
    ids=lambda values: f"{list(values.shape)} {values.dtype}",
)
def test_activations_of_another_layer_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match="'layer' was given activations"):
        Hessian("layer", 32).add(values)


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": None},
        {"samples": None},
        {"mean": torch.zeros(4, 3)},
        {"mean": torch.zeros(4)},
        {"mean": torch.zeros(4, 4, dtype=torch.float16)},
        {"mean": torch.full((4, 4), torch.nan)},
        {"mean": -torch.eye(4)},
        {"samples": torch.tensor(-1)},
        {"samples": torch.tensor(1.0)},
        {"samples": torch.tensor([1])},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(damage: dict[str, torch.Tensor | None]) -> None:
    damaged = {**correlated(4).state(), **damage}
    state = {name: tensor for name, tensor in damaged.items() if tensor is not None}
    with pytest.raises(CalibrationError, match="'layer' is not one that calibration writes"):
        Hessian.from_state("layer", state)

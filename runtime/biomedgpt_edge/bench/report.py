"""A result as a table for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

Result = dict[str, Any]

_STATISTICS = ("min", "p50", "p90", "p95", "p99", "max")
_HEADER = ("stage", "metric", "unit", "n", *_STATISTICS, "rate", "of the limit")
_NONE = "–"
# unit of samples -> unit shown, factor, decimals
_SHOWN = {"s": ("ms", 1e3, 2), "B": ("MB", 1e-6, 1), "tokens": ("tokens", 1.0, 0)}
_CSV_HEADER = (
    *("stage", "metric", "unit", "count", "mean", "min", "p50", "p90", "p95", "p99", "max"),
    *("limit", "share_reached", "peak_rss", "anonymous", "not_measured"),
)


def as_table(result: Result) -> str:
    """For the terminal: columns under each other."""
    return _document(result, _columns, lambda title: f"\n{title}")


def as_markdown(result: Result) -> str:
    """Tables of GitHub's Markdown."""
    return _document(result, _pipes, lambda title: f"\n**{title}**\n")


def as_csv(result: Result) -> str:
    """One row for each metric of each stage, in seconds, bytes and tokens; a stage without figures has one row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for stage in result["stages"]:
        if not stage["measured"]:
            writer.writerow([stage["name"], *[""] * (len(_CSV_HEADER) - 2), stage["reason"]])
            continue
        memory = [stage["memory"]["peak_rss"], stage["memory"]["anonymous"], ""]
        for metric in stage["metrics"]:
            summary, bound = metric["summary"] or {}, metric.get("bound", {})
            figures = [summary.get(name) for name in _CSV_HEADER[3:11]]
            limits = [bound.get("limit"), bound.get("share_reached")]
            writer.writerow([stage["name"], metric["name"], metric["unit"], *figures, *limits, *memory])
    return text.getvalue()


def _document(result: Result, table: Any, heading: Any) -> str:
    sections = [
        *_head_lines(result),
        heading("Times"),
        *table(_HEADER, list(_time_rows(result))),
        heading("Memory and energy"),
        *table(*_memory_table(result)),
        heading("Limits, the best probe of the run"),
        *table(("limit", "rate"), list(_limit_rows(result))),
    ]
    missing = [f"{stage['name']}: {stage['reason']}" for stage in result["stages"] if not stage["measured"]]
    if missing:
        sections += [heading("Not measured"), *[f"- {line}" for line in missing]]
    return "\n".join([*sections, "", *_method_lines(result)]) + "\n"


def _head_lines(result: Result) -> list[str]:
    machine, model = result["machine"], result["model"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items() if version)
    return [
        f"{model['name']}, {model['precision']}, {model['layers']} layers, {model['bytes'] / 1e6:,.1f} MB",
        f"{machine['cpu']}, {_counted_word(machine['threads_used'], 'thread')}; {machine['system']}; {libraries}",
    ]


def _time_rows(result: Result) -> Iterator[list[str]]:
    for stage in result["stages"]:
        if not stage["measured"]:
            yield [stage["name"], "not measured", *[""] * (len(_HEADER) - 2)]
            continue
        for metric in stage["metrics"]:
            unit, factor, decimals = _SHOWN[metric["unit"]]
            summary = metric["summary"]
            values = [_number(summary and summary[name], factor, decimals) for name in _STATISTICS]
            count = str(summary["count"]) if summary else "0"
            yield [stage["name"], metric["name"], unit, count, *values, _rate(stage, metric), _share(metric)]


def _rate(stage: dict[str, Any], metric: dict[str, Any]) -> str:
    if "bound" not in metric or not stage["positions"]:
        return ""
    return f"{stage['positions'] / metric['summary']['p50']:,.1f}/s"


def _share(metric: dict[str, Any]) -> str:
    bound = metric.get("bound")
    if bound is None or bound["share_reached"] is None:
        return ""
    return f"{bound['share_reached']:.0%} of {bound['limit']}"


def _memory_table(result: Result) -> tuple[tuple[str, ...], list[list[str]]]:
    measured = [stage for stage in result["stages"] if stage["measured"]]
    of_stage = all(stage["memory"]["peak_is_of"] == "stage" for stage in measured)
    peak = "peak RSS, MiB" if of_stage else "peak RSS since the start, MiB"
    rows = []
    for stage in measured:
        memory = [_number(stage["memory"][name], 2**-20, 1) for name in ("peak_rss", "anonymous")]
        rows.append([stage["name"], *memory, _joules(stage, result)])
    return ("stage", peak, "anonymous, MiB", "energy, J per run"), rows


def _joules(stage: dict[str, Any], result: Result) -> str:
    if stage["joules"] is None:
        return "not reported"
    turns = result["counted"]["load" if stage["group"] == "load" else "serve"]["rounds"]
    values = sorted(one["value"] for one in stage["joules"] if one["round"] in turns)
    return f"{values[len(values) // 2]:.2f}" if values else _NONE


def _limit_rows(result: Result) -> Iterator[list[str]]:
    for pattern, rate in result["limits"]["bandwidth"].items():
        yield [f"memory read, {pattern}", f"{rate / 1e9:,.1f} GB/s"]
    for name, rate in result["limits"]["arithmetic"].items():
        yield [name, f"{rate / 1e9:,.0f} GOP/s"]


def _method_lines(result: Result) -> list[str]:
    method = result["method"]
    lines = [
        f"{_counted_word(method['rounds'], 'round')} after one of warm-up; n counts samples; percentiles by "
        f"{method['percentiles']}.",
        *[_counted_line(phase, counted, result) for phase, counted in result["counted"].items()],
    ]
    if method["probe_bytes"] < method["probe_bytes_wanted"]:
        lines.append(f"The probe read {method['probe_bytes'] / 2**20:,.0f} MiB only: there was no memory for more.")
    cache = result["machine"]["last_level_cache"]
    works = [work["bytes"] for stage in result["stages"] if stage["measured"] for work in stage["work"]]
    if cache and works and max(works) < cache:
        lines.append("The weights fit the last-level cache, so a share of the memory's bandwidth says little here.")
    if result["energy"]["source"] is None:
        lines.append(f"Energy: {result['energy']['reason']}.")
    else:
        lines.append(f"Energy: {result['energy']['source']}.")
    return lines


def _counted_line(phase: str, counted: dict[str, Any], result: Result) -> str:
    dropped = [one for one in result["rounds"] if one["phase"] == phase and one["index"] and one["dropped"]]
    reasons = "; ".join(f"round {one['index']}: {' and '.join(one['dropped'])}" for one in dropped)
    if not counted["undisturbed"]:
        return f"{phase}: EVERY ROUND WAS DISTURBED and all count; this is not the machine's best ({reasons})."
    if not dropped:
        return f"{phase}: no round was disturbed."
    return f"{phase}: {_counted_word(len(dropped), 'disturbed round')} dropped ({reasons})."


def _counted_word(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _number(value: float | None, factor: float, decimals: int) -> str:
    return _NONE if value is None else f"{value * factor:,.{decimals}f}"


def _columns(header: Sequence[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]
    # What is read as a word stands left, what is compared as a number right.
    left = [not any(row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in [list(header), *rows]
    ]


def _pipes(header: Sequence[str], rows: list[list[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]

"""report.html of a benchmark: one file with every table, drawing and picture, and beside each number the file that it comes from."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from nnssl_ext.benchmark.charts import label_efficiency, training_curves
from nnssl_ext.benchmark.rows import REFERENCES, Row, sources
from nnssl_ext.benchmark.runs import MODES, Results, Run, read_results
from nnssl_ext.benchmark.summary import NAMES, best_first, control_text, estimate_text, figure, interval, metric_name, percent, setting_name, summarise, verdict
from nnssl_ext.core.files import write_json
from nnssl_ext.evaluation.cost import COSTS
from nnssl_ext.evaluation.results import write_table
from nnssl_ext.io.page import write_page

MOST_LINKS = 6  # of a row before the others are folded away
PICTURE_WIDTH = 720  # pixels; larger ones are reduced
MARKS = {"above": "▲", "below": "▼", "open": "≈", "runs disagree": "≈", "unknown": ""}
SEGMENTATION = ("dice", "nsd", "hd95_mm")
MEANINGS = {
    "probe": "Frozen features, one vector per cell, told apart by a simple classifier that learns from few volumes.",
    "classification": "Frozen features of whole volumes and a linear head, in folds of subjects.",
    "registration": "Pairs registered by the likeness of their features; nothing is trained for it.",
}


class Cell(NamedTuple):
    """Of a table: what is read first, what stands small below it, what a pointer shows."""

    text: str
    small: str = ""
    tip: str = ""
    kind: str = "number"


class Line(NamedTuple):
    """Of a table, with the files that its numbers come from."""

    cells: list[Cell]
    sources: Sequence[str]
    anchor: str = ""
    kind: str = ""


class Table(NamedTuple):
    """Lines under headings of their own."""

    title: str
    head: list[str]
    groups: list[tuple[str, list[Line]]]


def write_report(out: Path) -> Path:
    """Write report.html, summary.json (what the tables say) and results.csv (every case) from results.json.

    Args:
        out: folder of the benchmark.

    Returns:
        The page.

    Raises:
        UserError: results.json is missing or broken.
    """
    results = read_results(out / "results.json")
    summary = summarise(results)
    write_json(out / "summary.json", summary)
    write_table(out / "results.csv", csv_rows(results.runs))
    rows, pictures, lost = summary["segmentation"], *_pictures(out, results.runs)
    values: dict[str, Any] = {
        "summary": summary,
        "files_lost": lost,
        "segmentation": _segmentation_tables(rows),
        "efficiency": _efficiency(rows),
        "per_label": _label_tables(rows),
        "others": [(kind, MEANINGS[kind], REFERENCES[kind], _other_tables(kind, summary[kind])) for kind in MEANINGS if summary[kind]],
        "pretraining": _curves(results.done("pretrain"), True),
        "finetuning": _curves([run for run in results.runs if run.kind != "pretrain" and not run.error], False),
        "pictures": pictures,
        "cost": _cost_table(summary["cost"]),
        "environment": [(name, _plain(value)) for name, value in results.environment.items()],
        "suite": json.dumps(results.suite, indent=2, ensure_ascii=False),
        "counts": _counts(results.runs),
        "made_by": results.version,
    }
    title = str(results.suite.get("title") or results.suite.get("name") or "Benchmark of pretraining methods")
    path = out / "report.html"
    write_page(path, title, _lead(results), [], template="benchmark.html", href=_href, most_links=MOST_LINKS, **values)
    return path


def csv_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A line for every case of every run, figures of single labels as "label:figure"; one without case for the figures of the run as a whole."""
    about = ("kind", "dataset", "family", "mode", "labels", "method", "role", "pretrain_seed", "seed")
    lines = []
    for run in runs:
        common = {**{name: getattr(run, name) for name in about}, "record": run.record, "error": run.error}
        figures = {key: value.get("mean") if isinstance(value, Mapping) else value for key, value in run.figures.items()}
        if figures or not run.cases:
            lines.append({**common, "case": "", "seconds": run.seconds, "cpu_seconds": run.cpu_seconds, **_named("run:", figures)})
        for case, values in run.cases.items():
            single = {key: value for label, inner in (values.get("labels") or {}).items() for key, value in _named(f"{label}:", inner).items()}
            lines.append({**common, "case": case, **_named("", {key: value for key, value in values.items() if key != "labels"}), **single})
    columns = dict.fromkeys([*about, "case", *(key for line in lines for key in line)])
    return [{key: line.get(key) for key in columns} for line in lines] or [dict.fromkeys([*about, "case"])]


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in values.items()}


def _lead(results: Results) -> str:
    methods = sorted({run.method for run in results.runs if run.role == "method"})
    data = sorted({run.dataset for run in results.runs if run.dataset and run.kind != "pretrain"})
    text = str(results.suite.get("description") or "").strip()
    compared = f"{', '.join(methods) or 'No method'} compared on {', '.join(data) or 'no data'}."
    return f"{text} {compared}".strip()


def _counts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Tiles of the head."""
    done = [run for run in runs if not run.error]
    cases = {(run.dataset, case) for run in done if run.kind == "segmentation" for case in run.cases}
    found: dict[str, set[Any]] = {
        "methods": {run.method for run in done if run.role == "method"},
        "backbone families": {run.family for run in done if run.family},
        "pretraining seeds": {run.pretrain_seed for run in done if run.pretrain_seed is not None},
        "fine-tuning seeds": {run.seed for run in done if run.kind == "segmentation" and run.seed is not None},
        "test cases (segmentation)": cases,
        "pairs (registration)": {(run.dataset, case) for run in done if run.kind == "registration" for case in run.cases},
    }
    return [*((name, f"{len(members)}") for name, members in found.items() if members), ("runs", f"{len(done)}")]


def _segmentation_tables(rows: Sequence[Row]) -> list[Table]:
    """One for each dataset and family, grouped by mode and labelled cases; upper bounds last."""
    head = ["method", *map(metric_name, SEGMENTATION), "Dice of every run", "gain over scratch", "relative gain"]
    tables = []
    for (dataset, family), own in _by(rows, "dataset", "family").items():
        bounds = [row for row in own if row["role"] == "upper bound"]
        groups = _by([row for row in own if row["role"] != "upper bound"], "mode", "labels")
        ordered = sorted(groups.values(), key=lambda group: (MODES.index(group[0]["mode"]) if group[0]["mode"] in MODES else -1, group[0]["labels"] or 0))
        found = [(setting_name(group[0]), [_segmentation_line(row, _is_best(row, group)) for row in best_first(group)]) for group in ordered]
        found += [(f"upper bound: {setting_name(row)}", [_segmentation_line(row, False)]) for row in bounds]
        tables.append(Table(_title(dataset, family), head, found))
    return tables


def _segmentation_line(row: Row, best: bool) -> Line:
    metrics = [_estimate(row, name) for name in SEGMENTATION]
    dice = row["metrics"].get("dice")
    every = Cell(" ".join(figure("dice", value) for value in dice["each"]) if dice else "–", tip=f"pretraining seed, seed: {_seeds(row)}")
    gain = (dice or {}).get("gain")
    compared = _gain_cells(row, gain) if gain else [Cell("–")] * 2
    files = [*row["sources"], *(row["reference"]["sources"] if gain else [])]
    kind = row["role"].replace(" ", "-") + (" best" if best else "")
    return Line([_method(row), *metrics, every, *compared], files, row["id"], kind)


def _gain_cells(row: Row, gain: Mapping[str, Any]) -> list[Cell]:
    said, base = verdict(gain), row["reference"]
    mode = f" ({NAMES[base['mode']]})" if base["mode"] in NAMES else ""
    tip = f"paired with {base['method']}{mode}, same labelled cases and seed; every run: " + " ".join(figure("dice", value, True) for value in gain["each"])
    shares = [share for share in gain["each_relative"] if share is not None]
    lowest = f"lowest run {percent(min(shares))}\n" if len(shares) > 1 else ""
    return [
        Cell(f"{MARKS[said]} {figure('dice', gain['mean'], True)}".strip(), interval("dice", gain, True), tip, "number " + said.replace(" ", "-")),
        Cell(percent(gain["relative"]), f"{lowest}{gain['above']} of {len(gain['each'])} runs above"),
    ]


def _method(row: Row) -> Cell:
    """Its name, with role and verdict of a control."""
    small = row["role"] if row["role"] in ("negative control", "upper bound") else ""
    if "passed" in row:
        return Cell(row["method"], f"{small}: {'passed' if row['passed'] else 'NOT PASSED'}", control_text(row), "")
    return Cell(row["method"], small, kind="")


def _estimate(row: Row, name: str, gain: bool = False) -> Cell:
    """Mean and interval; with `gain`, the difference to the reference below."""
    if name not in row["metrics"]:
        return Cell("–")
    found = row["metrics"][name]
    fewer = f"{found['count']} of {row['cases']} cases" if row["cases"] and found["count"] < row["cases"] and found["mean"] is not None else ""
    parts = [interval(name, found), fewer if row["cases"] and found["low"] is not None else ""]
    if gain and "gain" in found and name not in COSTS:
        parts.append(f"Δ {estimate_text(name, found['gain'], True)}")
    tip = f"runs: {' '.join(figure(name, value) for value in found['each'])}"
    return Cell(figure(name, found["mean"]), "\n".join(part for part in parts if part), tip)


def _is_best(row: Row, group: Sequence[Row]) -> bool:
    known = [other["metrics"]["dice"]["mean"] for other in group if other["metrics"].get("dice", {}).get("mean") is not None]
    return len(known) > 1 and "dice" in row["metrics"] and row["metrics"]["dice"]["mean"] == max(known)


def _efficiency(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    """Title, drawing and files for every dataset, family and mode with several numbers of labels."""
    charts = []
    for (dataset, family, mode), own in _by(rows, "dataset", "family", "mode").items():
        bounds = [row for row in rows if (row["dataset"], row["family"], row["role"]) == (dataset, family, "upper bound")]
        shown = [row for row in own if row["role"] != "upper bound"] + bounds
        if svg := label_efficiency(shown):
            charts.append((_title(dataset, family, NAMES.get(mode, mode)), svg, [path for row in shown for path in row["sources"]]))
    return charts


def _label_tables(rows: Sequence[Row]) -> list[Table]:
    """Dice of single labels."""
    tables = []
    for (dataset, family), own in _by([row for row in rows if row.get("dice_per_label")], "dataset", "family").items():
        labels = list(dict.fromkeys(label for row in own for label in row["dice_per_label"]))
        groups = [(setting_name(group[0]), [_label_line(row, labels) for row in best_first(group)]) for group in _by(own, "mode", "labels").values()]
        tables.append(Table(_title(dataset, family), ["method", *labels], groups))
    return tables


def _label_line(row: Row, labels: Sequence[str]) -> Line:
    found = [row["dice_per_label"].get(label) for label in labels]
    cells = [Cell("–") if one is None else Cell(figure("dice", one["mean"]), interval("dice", one)) for one in found]
    return Line([Cell(row["method"], kind=""), *cells], row["sources"], kind=row["role"].replace(" ", "-"))


def _other_tables(kind: str, rows: Sequence[Row]) -> list[Table]:
    """One for each dataset, with all figures that its rows have."""
    tables = []
    for (dataset,), own in _by(rows, "dataset").items():
        metrics = list(dict.fromkeys(name for row in own for name, found in row["metrics"].items() if found["mean"] is not None))
        groups = _by(own, "family", "mode", "labels").values()
        found = [
            (", ".join(part for part in (group[0]["family"], setting_name(group[0])) if part), [_other_line(row, metrics) for row in best_first(group)])
            for group in groups
        ]
        tables.append(Table(_title(dataset), ["features" if kind != "classification" else "method", *map(metric_name, metrics), "runs"], found))
    return tables


def _other_line(row: Row, metrics: Sequence[str]) -> Line:
    cells = [_method(row), *(_estimate(row, name, gain=True) for name in metrics), Cell(str(len(row["seeds"])), tip=_seeds(row))]
    return Line(cells, [*row["sources"], *row.get("reference", {"sources": []})["sources"]], row["id"], row["role"].replace(" ", "-"))


def _curves(runs: Sequence[Run], by_method: bool) -> list[tuple[str, str, list[str]]]:
    return [(title, svg, sources(own)) for title, svg, own in training_curves(runs, by_method)]


def _cost_table(rows: Sequence[Row]) -> Table:
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    head = ["method", "family", *("pretraining" if kind == "pretrain" else kind for kind in kinds), "all"]
    lines = [
        Line(
            [Cell(row["method"], kind=""), Cell(row["family"] or "–", kind=""), *(_spent(row["kinds"].get(kind)) for kind in kinds), _spent(row["total"])],
            row["sources"],
        )
        for row in rows
    ]
    return Table("", head, [("", lines)])


def _spent(spent: Mapping[str, Any] | None) -> Cell:
    if spent is None:
        return Cell("–")
    cpu = "" if spent["cpu_seconds"] is None else f"{spent['cpu_seconds']:,.0f} CPU-s, "
    return Cell(f"{spent['seconds']:,.0f} s", f"{cpu}{spent['runs']} run{'s' if spent['runs'] != 1 else ''}")


def _pictures(out: Path, runs: Sequence[Run]) -> tuple[list[tuple[str, list[tuple[str, str, str]]]], list[str]]:
    """By setting, caption, picture and its file, of the first run of each method at its fewest labels; files that are not there."""
    first: dict[tuple[Any, ...], Run] = {}
    for run in runs:  # in the order of their labels
        if run.pictures and not run.error:
            first.setdefault((run.kind, run.dataset, run.family, run.mode, run.method), run)
    shown: dict[str, list[tuple[str, str, str]]] = {}
    lost = []
    for run in first.values():
        setting = _title(run.kind, run.dataset, run.family, setting_name({"mode": run.mode, "labels": run.labels}))
        for caption, file in run.pictures.items():
            try:
                shown.setdefault(setting, []).append((f"{run.method}: {caption}", _embedded(out / file), file))
            except OSError:
                lost.append(file)
    return [(setting, found) for setting, found in shown.items() if found], lost


def _embedded(path: Path) -> str:
    """PNG in base64, not wider than PICTURE_WIDTH."""
    with Image.open(path) as image:
        picture = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
        if picture.width > PICTURE_WIDTH:
            picture = picture.resize((PICTURE_WIDTH, max(1, round(picture.height * PICTURE_WIDTH / picture.width))), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _by(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _title(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _seeds(row: Row) -> str:
    return "; ".join(", ".join("–" if seed is None else str(seed) for seed in seeds) for seeds in row["seeds"])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _href(path: str) -> str:
    """A path relative to the page, such that it can't be taken for another address."""
    return "./" + quote(path.lstrip("/"))

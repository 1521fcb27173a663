"""The page of a benchmark: it stands alone, shows the numbers of the summary, and every number leads to its file."""

import base64
import csv
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image

from nnssl_ext.benchmark.charts import points
from nnssl_ext.benchmark.report import PICTURE_WIDTH, write_report
from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation.cost import COSTS
from tests.make_results import make_results, write_results


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    write_results(out, make_results(cases=4))
    write_report(out)
    return out


def page(out):
    return write_report(out).read_text(encoding="utf-8")


class Parsed(HTMLParser):
    """Links, and the open tags at the end: all are closed."""

    def __init__(self, text):
        super().__init__()
        self.links, self.stack, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href") if key in values]
        self.ids |= {values["id"]} if "id" in values else set()
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_every_row_shows_the_numbers_of_the_summary_and_names_its_files(out):
    text, summary = (out / "report.html").read_text(encoding="utf-8"), json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for row in summary["segmentation"] + summary["probe"] + summary["classification"] + summary["registration"]:
        shown = re.search(rf'<tr id="{row["id"]}".*?</tr>', text, re.DOTALL).group()
        for name, found in row["metrics"].items():
            digits = {"hd95_mm": 2, "tre_mm": 2, "seconds": 1}.get(name, 3)
            assert f">{found['mean']:.{digits}f}<" in shown
            if found["low"] is not None:
                assert f"[{found['low']:.{digits}f}, {found['high']:.{digits}f}]" in shown
            if "gain" in found and name not in COSTS and (name == "dice" or "segmentation" not in row["id"]):
                assert f"{found['gain']['mean']:+.{digits}f}" in shown
        named = {unescape(path) for path in re.findall(r'<a href="\./[^"]*" title="([^"]*)"', shown)}
        assert row["sources"] and set(row["sources"]) <= named and named == set(row["sources"]) | set(row.get("reference", {"sources": []})["sources"])


def test_the_page_is_well_formed_and_all_its_links_lead_somewhere_beside_it(out):
    parsed = Parsed((out / "report.html").read_text(encoding="utf-8"))
    assert not parsed.stack and len(parsed.links) > 100
    for link in parsed.links:
        if link.startswith("#"):
            assert link[1:] in parsed.ids
        elif not link.startswith("data:image/png;base64,"):
            assert link.startswith("./") and (out / unquote(link)).is_file()
    assert "url(" not in (out / "report.html").read_text(encoding="utf-8") and "@import" not in (out / "report.html").read_text(encoding="utf-8")


def test_the_table_of_cases_holds_every_figure_of_every_case(out):
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        lines = {(line["record"], line["case"]): line for line in csv.DictReader(file)}
    assert len(lines) == sum(len(run["cases"]) + bool(run["figures"] or not run["cases"]) for run in content["runs"])
    for run in content["runs"]:
        for case, values in run["cases"].items():
            line = lines[run["record"], case]
            expected = {key: value for key, value in values.items() if key != "labels"}
            expected |= {f"{label}:{key}": value for label, inner in values.get("labels", {}).items() for key, value in inner.items()}
            assert all(line[key] == ("" if value is None else str(value)) for key, value in expected.items())
            assert (line["method"], line["kind"]) == (run["method"], run["kind"])
    record = next(run for run in content["runs"] if run["kind"] == "classification")
    assert float(lines[record["record"], ""]["run:auc"]) == record["figures"]["auc"]["mean"]


def test_the_same_input_gives_the_same_bytes(out):
    before = [(out / name).read_bytes() for name in ("report.html", "results.csv", "summary.json")]
    write_report(out)
    assert before == [(out / name).read_bytes() for name in ("report.html", "results.csv", "summary.json")]


def test_pictures_are_reduced_and_lost_ones_are_named(tmp_path):
    content = make_results(methods=("MAETrainer",), seeds=1, cases=2, labels=(2,), modes=("full",), kinds=("segmentation",))
    write_results(tmp_path, content)
    lost = content["runs"][0]["pictures"]["case_000, prediction and truth"]
    (tmp_path / lost).unlink()
    text = page(tmp_path)
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert len(found) == 2 and all(Image.open(io.BytesIO(base64.b64decode(data))).width == PICTURE_WIDTH for data in found)
    assert f"<code>{lost}</code>" in text


def test_names_are_shown_and_not_run(tmp_path):
    content = make_results(methods=("MAETrainer",), seeds=1, cases=2, labels=(2, 4), modes=("full",))
    bad = "<script>alert('&')</script>"
    for run in content["runs"]:
        run["method"] = bad if run["method"] == "MAETrainer" else run["method"]
        run["dataset"], run["family"], run["alarms"] = bad, bad, [bad]
        if run["cases"]:
            run["cases"] = {bad: next(iter(run["cases"].values()))}
            run["cases"][bad]["labels"] = {bad: {"dice": 0.5}}
        run["curves"] = {f"train/{bad}": curve for curve in run["curves"].values()}
        run["pictures"] = dict.fromkeys([bad] if run.get("pictures") else [], "units/overlay.png")
    content["runs"][-1] |= {"error": bad, "record": "https://example.org/<a>&.json"}
    content |= {"command": bad, "digest": bad, "environment": {bad: bad}, "suite": {"name": bad, "remarks": bad, "description": bad}}
    write_results(tmp_path, content)
    text = page(tmp_path)
    parsed = Parsed(text)
    assert "<script" not in text and text.count("&lt;script&gt;") > 20 and not parsed.stack
    assert not [link for link in parsed.links if "://" in link]


@pytest.mark.parametrize("kinds", [("segmentation",), ("pretrain", "probe"), ("classification",), ("registration",), ()])
def test_parts_that_were_not_run_are_left_out(kinds, tmp_path):
    write_results(tmp_path, make_results(methods=("MAETrainer",), seeds=1, cases=1, labels=(2, 4), modes=("full",), kinds=kinds))
    text = page(tmp_path)
    for kind in ("segmentation", "probe", "classification", "registration"):
        assert (f'<h2 id="{kind}">' in text) == (kind in kinds) == (f'href="#{kind}"' in text)
    assert ('id="efficiency"' in text) == ("segmentation" in kinds) and ('id="curves"' in text) == bool({"pretrain", "segmentation"} & set(kinds))
    assert not Parsed(text).stack and "nan" not in text.lower().replace("provenance", "")


def test_figures_that_do_not_exist_are_dashes(tmp_path):
    content = make_results(methods=("MAETrainer",), seeds=2, cases=2, labels=(2, 4), modes=("full",))
    for run in content["runs"]:
        for values in run["cases"].values():
            values |= dict.fromkeys((key for key in values if key != "labels"), None)
        run["figures"] = dict.fromkeys(run["figures"], float("nan"))
        run["curves"] = {name: [[step, None] for step, _ in curve] for name, curve in run["curves"].items()}
    write_results(tmp_path, content)
    text = page(tmp_path)
    assert "–" in text and ">nan" not in text and "NaN" not in (tmp_path / "summary.json").read_text(encoding="utf-8") and 'id="efficiency"' not in text


def test_curves_skip_what_is_not_finite():
    assert points([[0, 1.0], [1, None], [2, float("nan")], [3, float("inf")], [4, 2.0]]) == ([0, 4], [1.0, 2.0])


def test_a_missing_results_file_is_told(tmp_path):
    with pytest.raises(UserError):
        write_report(tmp_path)

"""Pages stand alone and show what they were given."""

import base64
import re

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from nnssl_ext.io.page import Section, write_page


def test_a_page_shows_texts_tables_and_pictures_and_asks_for_no_other_file(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "black.png")
    section = Section("Scores")
    section.text("means")
    section.list(["first", "second"])
    section.code("nnssl_train 801")
    section.table(["", "Dice"], [["liver", 0.123456], ["spleen", float("nan")], ["shape", (1, 2)]])
    section.charts([("Loss", "low is good", "<svg>curve</svg>"), ("Rank", "", "<svg>other</svg>")])
    section.image(tmp_path / "black.png", "nothing")
    section.image(Figure(figsize=(1, 1)), "a figure")
    write_page(tmp_path / "index.html", "Title", "Lead", [section], note="Beware")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for text in ("Title", "Lead", "Beware", "Scores", "means", "second", "nnssl_train 801", "0.1235", "–", "1 × 2", "low is good", "<svg>other</svg>"):
        assert text in page
    assert base64.b64encode((tmp_path / "black.png").read_bytes()).decode() in page
    assert len(re.findall('src="data:image/png;base64,', page)) == 2
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_what_a_user_named_is_shown_and_not_run(tmp_path):
    section = Section("<script>alert(1)</script>")
    section.text("<b>bold</b>")
    section.charts([("<b>bold</b>", "<b>bold</b>", "<svg></svg>")])
    write_page(tmp_path / "index.html", "Title", "", [section])
    assert "<script>" not in (tmp_path / "index.html").read_text(encoding="utf-8") and "<b>" not in (tmp_path / "index.html").read_text(encoding="utf-8")

"""Pictures of the methods for their pages."""

import pytest
import torch
from PIL import Image

from documentation import pictures


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setenv("nnssl_sinks", "none")
    monkeypatch.setattr(pictures, "SIZE", 32)
    monkeypatch.setattr(pictures, "CASES", 6)
    monkeypatch.setattr(pictures, "PATCH", (16, 16, 16))
    pictures.phantoms.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    pictures.phantoms.cache_clear()


def drawn(folder, *arguments):
    pictures.main([*arguments, "--out", str(folder)])
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize(("method", "page"), [("mae", "mae"), ("DINOv2Trainer", "dinov2")])
def test_a_small_picture_lies_where_the_page_of_the_method_looks_for_it(method, page, tmp_path, tiny):
    path = drawn(tmp_path, method, "-b", "primus", "--steps", "1")
    with Image.open(path) as image:
        assert path.name == f"{page}.png" and 400 < image.width <= 900 and path.stat().st_size < 250_000


def test_the_picture_is_the_same_every_time_and_another_after_more_training(tmp_path, tiny):
    one, again, longer = (drawn(tmp_path / str(number), "mae", "--steps", steps).read_bytes() for number, steps in enumerate("113"))
    assert one == again != longer

"""Overrides and the names of results folders."""

from dataclasses import dataclass, field

import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.trainers.base import SSLTrainer
from nnssl_ext.trainers.config import SPEED_ONLY, as_plain, folder_suffix, parse_overrides


@dataclass(frozen=True)
class Config:
    epochs: int = 10
    lr: float | None = None
    name: str = "a"
    flip: bool = True
    sizes: tuple[int, ...] = (1, 2)
    workers: int = field(default=0, metadata=SPEED_ONLY)


def test_values_are_converted_to_the_types_of_the_fields():
    values = parse_overrides(Config, ["epochs=3", "lr=1e-4", "name=b", "flip=false", "sizes=4,5,6"])
    assert values == {"epochs": 3, "lr": 1e-4, "name": "b", "flip": False, "sizes": (4, 5, 6)}
    assert parse_overrides(Config, ["lr=none"]) == {"lr": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch=3", "did you mean 'epochs'"),
        ("epochs=3.5", "not a valid int"),
        ("lr=fast", "not a valid float"),
        ("flip=maybe", "not a valid bool"),
        ("epochs", "not of the form"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(UserError) as error:
        parse_overrides(Config, [text])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_only_what_differs_and_matters_is_in_the_folder_name():
    assert folder_suffix(Config(), "primus", "primus") == ""
    assert folder_suffix(Config(epochs=3, workers=4), "primus", "resenc") == "b=primus_epochs=3"
    assert folder_suffix(Config(sizes=(7, 8)), "primus", "primus") == "sizes=(7,8)"


def test_long_folder_names_stay_short_and_distinct():
    names = {folder_suffix(Config(name="x" * 200 + str(i)), "a", "a") for i in range(5)}
    assert len(names) == 5 and max(map(len, names)) <= 100


def test_plain_fields_hold_json_types():
    assert as_plain(Config()) == {"epochs": 10, "lr": None, "name": "a", "flip": True, "sizes": [1, 2], "workers": 0}


@pytest.mark.parametrize(
    "text", ["epochs=0", "iterations=-1", "batch_size=0", "accumulate=0", "lr=-1e-3", "lr=nan", "lr=inf", "warmup=1.5", "workers=-1", "seed=-1"]
)
def test_a_number_out_of_range_is_refused_with_the_range(text):
    with pytest.raises(UserError, match="out of range") as error:
        parse_overrides(SSLTrainer.Config, [text])
    assert error.value.fix.startswith("give a number")


def test_numbers_at_the_ends_of_their_range_and_none_are_accepted():
    texts = ["epochs=1", "warmup=0", "warmup=1", "batch_size=none", "workers=0", "weight_decay=0"]
    assert parse_overrides(SSLTrainer.Config, texts)["batch_size"] is None

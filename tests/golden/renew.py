"""``python -m tests.golden.renew [METHOD ...]``: the golden losses of these methods (all where none is named), METHOD.json beside this file."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch

from nnssl_ext.core.files import write_json
from nnssl_ext.core.rng import torch_seed
from tests.conformance.pairs import METHODS, PAIRS, Pair, first_batch

HERE, STEPS = Path(__file__).parent, 30


def losses(pair: Pair) -> list[float]:
    """Total loss of every batch of STEPS optimiser steps, in fp64 on one thread."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        trainer = pair.trainer(Path(folder), float64=True, epochs=2, iterations=STEPS // 2)
        trainer.fit()
    return list(trainer.trace)


def first_loss_in_fp32(pair: Pair) -> float:
    """Total loss of the first batch in fp32, from the same weights."""
    trainer = pair.trainer(Path("unused"), float64=True)
    trainer.initialize()
    if trainer.init is not None:
        trainer.init.fill(trainer)
    model = trainer.model.float().train()
    torch.manual_seed(torch_seed(trainer.config.seed, 0, "step"))
    with torch.no_grad():
        return float(pair.cls.step(trainer, model, first_batch(trainer))["total"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    chosen = parser.parse_args(arguments).methods or list(METHODS)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with patch.dict("os.environ", nnssl_sinks="none"), patch("nnssl_ext.trainers.base.draw_run"), patch("nnssl_ext.trainers.sinks.draw_progress"):
        for name in chosen:
            write_json(HERE / f"{name}.json", {pair.family: losses(pair) for pair in PAIRS if pair.method == name})
    print("a change of golden losses needs a line in CHANGELOG.md")


if __name__ == "__main__":
    main()

"""A thousand steps: memory, open files and threads stay what they are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import theilslopes

ROOT = Path(__file__).parents[2]
STEPS, EVERY, WARM = 1000, 10, 300
SOAK = """
import gc, json, sys, threading, time
import psutil
from nnssl_ext.trainers.mae import MAETrainer
from tests.make_data import tiny_plan, tiny_store

class Soak(MAETrainer):
    def after_update(self, step):
        if step % int(sys.argv[3]) == 0:
            gc.collect()
            seen.append([step, process.memory_info().rss, process.num_fds(), process.num_threads(), len(process.children(recursive=True))])

seen, process = [], psutil.Process()
config = MAETrainer.Config(epochs=int(sys.argv[2]) // 50, iterations=50, val_iterations=2, workers=1)
Soak(tiny_plan(), "3d_fullres", config, tiny_store(), sys.argv[1], family=sys.argv[4]).fit()
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_nothing_grows_over_a_thousand_steps(family, tmp_path):
    """Twenty epochs with pictures, curves, page, TensorBoard and checkpoints; the first steps warm up allocators and lazy imports."""
    command = [sys.executable, "-W", "ignore", "-c", SOAK, str(tmp_path), str(STEPS), str(EVERY), family]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    seen = np.array(json.loads(done.stdout.splitlines()[-1]), float)
    seen = seen[seen[:, 0] >= WARM]
    assert len(seen) == (STEPS - WARM) // EVERY
    for name, values in zip(("memory", "open files", "threads", "processes"), seen[:, 1:].T):
        slope = 100 * theilslopes(values, seen[:, 0]).slope / values.mean()  # per 100 steps; a picture's memory, given back later, is no growth
        print(f"{family} {name}: {values.mean():.4g}, slope {slope:.3%} per 100 steps, {values.min():.4g} to {values.max():.4g}")
        assert slope <= 1e-3, name

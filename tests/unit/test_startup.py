"""Help and mistakes on the command line answer without loading what only the work needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MODULES = re.findall(r'(?m)^nnssl_\w+ = "([\w.]+):main"$', TEXT)
HEAVY = ("torch", "matplotlib", "blosc2", "SimpleITK", "scipy", "nibabel", "pydicom", "nnunetv2", "numpy")
CODE = """
import importlib, json, sys
main = importlib.import_module(sys.argv[1]).main
try:
    main([sys.argv[2]])
except SystemExit as error:
    print(json.dumps([error.code, [name for name in sys.argv[3:] if name in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize("option", ["--help", "--no-such-option"])
@pytest.mark.parametrize("module", MODULES)
def test_help_and_wrong_options_load_nothing_heavy(module, option):
    done = subprocess.run([sys.executable, "-c", CODE, module, option, *HEAVY], capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == (0 if option == "--help" else 2) and loaded == []


HEAVY_IN_TRAINING = ("torch._dynamo", "torchvision", "timm", "matplotlib", "nnunetv2", "sklearn", "pandas", "sympy", "nibabel", "tensorboard")
FIRST_STEP = """
import sys, tempfile
from itertools import repeat
from nnssl_ext.core.registry import find_class
from nnssl_ext.trainers import launch
from tests.make_data import tiny_plan, tiny_store
cls = find_class("MAETrainer", launch.SSLTrainer, "nnssl_ext.trainers")  # imports every method
trainer = cls(tiny_plan(), "3d_fullres", cls.Config(epochs=2, iterations=2, workers=0), tiny_store(), tempfile.mkdtemp(), family="resenc")
trainer.fit(stop_at=1)
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_a_training_takes_its_first_step_without_what_only_other_work_needs():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST_STEP, *HEAVY_IN_TRAINING], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == ""


def test_a_plan_needs_neither_pytorch_nor_a_drawing_library():
    code = "import sys, nnssl_ext.planners.planner; print(*(name for name in ('torch', 'matplotlib', 'blosc2') if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""

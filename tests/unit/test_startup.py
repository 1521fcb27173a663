"""Help and mistakes on the command line answer without loading what only the work needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
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

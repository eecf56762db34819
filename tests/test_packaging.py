"""What an editable install forgives and a wheel does not."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed_for_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        setup["package-dir"][name] if name in setup["package-dir"] else name.replace(".", "/")
        for name in setup["packages"]
    }
    found = {
        str(p.parent.relative_to(ROOT))
        for top in ("dashbench", "kernels", "baselines")
        for p in (ROOT / top).rglob("__init__.py")
    }
    assert folders == found


def test_kernels_cannot_be_imported_under_the_name_of_another_package():
    code = "import kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode != 0 and "./kernels is dashbench.kernels" in done.stderr

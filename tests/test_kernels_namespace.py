"""`dashbench.kernels` offers the operator by name, and costs nothing until it is asked for."""

import subprocess
import sys

import pytest

from dashbench import kernels


def test_public_names_lead_home():
    from dashbench.kernels.attend import block_sparse_attention
    from dashbench.kernels.dash import dash_attention

    assert kernels.dash_attention is dash_attention
    assert kernels.block_sparse_attention is block_sparse_attention
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
    with pytest.raises(AttributeError, match="dash_atention"):
        kernels.dash_atention  # noqa: B018


def test_import_alone_brings_no_torch():
    code = "import sys, dashbench.kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0

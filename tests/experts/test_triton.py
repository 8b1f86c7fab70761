"""Runs `triton_cases.py` where it can run, and checks what can be said of the backend without running it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from crossways.errors import UserError
from crossways.experts import resolve_backend, why_not
from crossways.experts import triton as backend

CASES = Path(__file__).with_name("triton_cases.py")
needs_triton = pytest.mark.skipif(
    why_not("triton", torch.device("meta"), torch.float32) is not None, reason="triton is not installed"
)


def run_cases(environment):
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(CASES)]
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


@needs_triton
def test_kernels_in_the_interpreter():
    done = run_cases({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu():
    done = run_cases({})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.float64, "float64"),
        pytest.param("cpu", torch.float32, "run on CUDA", marks=needs_triton),
        pytest.param("mps", torch.float32, "on mps", marks=needs_triton),
    ],
)
def test_it_says_why_it_cannot_run(device, dtype, reason):
    with pytest.raises(UserError, match=reason):
        resolve_backend("triton", device, dtype)


def test_old_gpus_and_a_missing_package_are_named(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = torch.device("cuda")
    assert "8.0" in why_not("triton", cuda, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not("triton", cuda, torch.float16) is None
    assert resolve_backend("auto", cuda, torch.float16) == "triton"
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in why_not("triton", cuda, torch.float16)


def test_auto_on_a_gpu_names_what_it_falls_back_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="'triton' cannot run: the package triton is not installed"):
        assert resolve_backend("auto", "cuda", torch.bfloat16) == "grouped_mm"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve_backend("auto", "cuda", torch.float64) == "naive"
    triton, grouped = (str(warning.message) for warning in caught)
    assert "'triton' cannot run" in triton
    assert "'grouped_mm' cannot run" in grouped


def test_without_triton_the_library_imports_and_says_so():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, crossways.experts
assert not [name for name in sys.modules if name.startswith("crossways.experts.triton.")]
print(crossways.experts.why_not("triton", torch.device("cuda"), torch.float32))
"""
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "the package triton is not installed\n", done.stderr

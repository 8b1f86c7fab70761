"""Builds the C++ parts on first use and loads them; says why where that cannot be done.

They are a plain shared library without PyTorch's headers, called through ctypes: it builds in seconds, survives
another version of PyTorch, and shares PyTorch's own thread pool, as both use the same OpenMP runtime.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_NEEDED = ("__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__")
_TIMEOUT = 300


class NativeUnavailableError(RuntimeError):
    """The C++ parts cannot be used here; the message says why."""


def why_not_native() -> str | None:
    """Why the C++ parts cannot be used here, or None. Builds them if that has not been done yet."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def is_loaded() -> bool:
    """Whether the C++ parts are at hand, without building or loading them."""
    try:
        return _found()
    except NativeUnavailableError:
        return False


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        NativeUnavailableError: when it cannot be built or loaded.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise NativeUnavailableError(loaded)
    return loaded


@cache
def _found() -> bool:
    """Whether loading them succeeded. What is raised before that was tried is not cached: then it is asked again."""
    if not _load.cache_info().currsize:
        raise NativeUnavailableError("not loaded yet")
    return not isinstance(_load(), str)


@cache
def _load() -> ctypes.CDLL | str:
    from torch.utils.cpp_extension import get_default_build_root  # slow to import

    try:
        return ctypes.CDLL(str(build(Path(get_default_build_root()) / "crossways")))
    except (NativeUnavailableError, OSError) as error:
        return str(error)


def build(root: Path, compilers: tuple[str, ...] = _COMPILERS) -> Path:
    """Compile into `root`, unless that was done before for these sources, this compiler and this processor.

    Any number of processes may do so at once: one compiles, the others wait for it.

    Returns:
        The shared library.

    Raises:
        NativeUnavailableError: without a compiler, on another processor than x86 with AVX-512, or if it fails.
    """
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise NativeUnavailableError(
            f"the C++ parts are for Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
        )
    compiler = next((path for name in compilers if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailableError(f"no C++ compiler was found (looked for {', '.join(compilers)}); install one")
    macros = _run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    if missing := [name for name in _NEEDED if name not in macros]:
        raise NativeUnavailableError(f"the processor or {compiler} lacks {', '.join(missing)}")
    folder = Path(__file__).parent
    sources = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])
    digest = hashlib.sha256("\n".join([macros, *_FLAGS, *(path.read_text() for path in sources)]).encode())
    target = root / f"{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            _compile(compiler, [path for path in sources if path.suffix == ".cpp"], target)
    return target


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    # Under another name first, so that a process that is killed leaves nothing that looks finished.
    with TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        _run([compiler, *_FLAGS, *map(str, sources), "-o", str(output)])
        output.replace(target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"the C++ compiler could not run: {error}") from error
    if done.returncode:
        raise NativeUnavailableError(f"{command[0]} failed: {done.stderr.strip()[-800:]}")
    return done.stdout

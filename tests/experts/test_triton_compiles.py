"""The kernels compile for Ampere and Hopper, without a GPU: what the interpreter accepts, the compiler need not.

Every block shape that may be chosen must fit the shared memory and keep its sums in registers.
"""

import re
import subprocess
import warnings
from dataclasses import dataclass, field

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from crossways.experts.triton.configs import (  # noqa: E402
    Limits,
    block_rows,
    row_product_candidates,
    weight_grad_candidates,
)
from crossways.experts.triton.hidden_grad import hidden_grad_kernel  # noqa: E402
from crossways.experts.triton.plan import tile_kernel  # noqa: E402
from crossways.experts.triton.rows import row_kernel  # noqa: E402
from crossways.experts.triton.token_sum import token_sum_kernel  # noqa: E402
from crossways.experts.triton.up import up_kernel  # noqa: E402
from crossways.experts.triton.weight_grad import weight_grad_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels were made for the interpreter")
LIMITS = {90: Limits(227 * 1024, 128), 80: Limits(163 * 1024, 64), 86: Limits(99 * 1024, 64)}
PLAN = {"tile_expert_ptr": "*i32", "tile_row_ptr": "*i32", "offsets_ptr": "*i64", "tiles": "i32"}
META = {"UPCAST": False, "PRECISION": "ieee", "BLOCK_M": 128}


@dataclass
class Kernel:
    """How a kernel is called: types of its arguments, and what is fixed at compile time."""

    function: object
    arguments: dict[str, str]
    fixed: dict = field(default_factory=dict)


def kernels(dtype):
    """All of them, at sizes that are multiples of 16."""
    x = f"*{dtype}"
    rows = {"GATED": True, "ACTIVATION": "silu"}
    return {
        "up": Kernel(
            up_kernel,
            {"x_ptr": x, "token_ptr": "*i64", "weight_ptr": "*fp32", "up_ptr": x, "hidden_ptr": x, "before_ptr": x}
            | PLAN
            | dict.fromkeys(("stride_xt", "stride_ue", "stride_uh", "D", "F"), "i32"),
            META | rows | {"SAVE": True, "stride_xd": 1, "stride_ud": 1},
        ),
        "down": Kernel(
            row_kernel,
            {"rows_ptr": x, "matrix_ptr": x, "out_ptr": x}
            | PLAN
            | dict.fromkeys(("stride_me", "stride_mn", "K", "N"), "i32"),
            META | {"stride_mk": 1},
        ),
        "to inputs": Kernel(
            row_kernel,
            {"rows_ptr": x, "matrix_ptr": x, "out_ptr": x}
            | PLAN
            | dict.fromkeys(("stride_me", "stride_mk", "K", "N"), "i32"),
            META | {"stride_mn": 1},
        ),
        "hidden": Kernel(
            hidden_grad_kernel,
            {"grad_ptr": x, "token_ptr": "*i64", "weight_ptr": "*fp32", "down_ptr": x, "before_ptr": x}
            | {"hidden_ptr": x, "grad_before_ptr": x, "part_ptr": "*fp32"}
            | PLAN
            | dict.fromkeys(("stride_gt", "stride_de", "stride_dd", "P", "D", "F"), "i32"),
            META | rows | {"stride_gd": 1, "stride_df": 1},
        ),
        "weights": Kernel(
            weight_grad_kernel,
            {"left_ptr": x, "right_ptr": x, "token_ptr": "*i64", "offsets_ptr": "*i64", "out_ptr": x}
            | dict.fromkeys(("stride_lr", "stride_rr", "ROWS", "COLUMNS"), "i32"),
            {"UPCAST": False, "PRECISION": "ieee", "GATHER_LEFT": True, "stride_li": 1, "stride_rj": 1},
        ),
        "sum": Kernel(
            token_sum_kernel,
            {"rows_ptr": x, "pair_ptr": "*i64", "start_ptr": "*i64", "out_ptr": x, "D": "i32"},
            {"BLOCK_P": 8, "BLOCK_D": 1024},
        ),
        "plan": Kernel(
            tile_kernel,
            {"offsets_ptr": "*i64", "expert_ptr": "*i32", "row_ptr": "*i32", "tiles": "i32", "experts": "i32"},
            {"BLOCK_M": 128, "BLOCK_E": 256, "BLOCK_G": 16},
        ),
    }


def candidates(name, architecture, element_size=2):
    limits = LIMITS[architecture]
    if name == "weights":
        return weight_grad_candidates(limits, 1024, 512, element_size)
    if name in ("sum", "plan"):
        return [triton.Config({}, num_warps=4, num_stages=3)]
    matrices, held = {"up": (2, 1), "hidden": (1, 2)}.get(name, (1, 1))
    return row_product_candidates(limits, 128, 512, element_size, matrices, held)


def compile_kernel(kernel, config, architecture):
    function = kernel.function
    while not isinstance(function, triton.JITFunction):
        function = function.fn  # below the autotuner
    names, fixed = function.arg_names, kernel.fixed | config.kwargs
    signature = {name: kernel.arguments.get(name, "constexpr") for name in names}
    # As at a call: pointers and sizes are multiples of 16.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.arguments if name != "tiles"}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in fixed.items()}, aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )


def spilled_bytes(compiled, folder):
    """Bytes of each thread's stack, where registers go that do not fit."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout + done.stderr)[1])


def check(name, architecture, config, dtype, folder, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    compiled = compile_kernel(kernels(dtype)[name], config, architecture)
    assert compiled.metadata.shared <= LIMITS[architecture].shared_memory
    assert spilled_bytes(compiled, folder) == 0
    return compiled.asm["ptx"]


@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("name", kernels("bf16"))
def test_the_first_candidate(name, architecture, tmp_path, monkeypatch):
    config = candidates(name, architecture)[0]
    code = check(name, architecture, config, "bf16", tmp_path, monkeypatch)
    if name not in ("sum", "plan"):
        assert ("wgmma.mma_async" if architecture == 90 else "mma.sync") in code
        assert "cp.async" in code


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", kernels("bf16"))
def test_every_candidate(name, dtype, architecture, tmp_path, monkeypatch):
    configs = candidates(name, architecture, 4 if dtype == "fp32" else 2)
    assert configs
    for config in configs:
        check(name, architecture, config, dtype, tmp_path, monkeypatch)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("columns", [1, 36, 64, 4096])
@pytest.mark.parametrize("element_size", [2, 4])
def test_there_are_few_candidates_and_always_one(limits, columns, element_size):
    for block_m in (16, 32, 64, 128):
        for matrices, held in ((1, 1), (2, 1), (1, 2)):
            found = row_product_candidates(limits, block_m, columns, element_size, matrices, held)
            assert 1 <= len(found) <= 4
    assert 1 <= len(weight_grad_candidates(limits, columns, 512, element_size)) <= 4


def test_tiles_follow_the_mean_load():
    assert block_rows(0, 8) == 16
    assert block_rows(8 * 40, 8) == 32
    assert block_rows(8 * 100, 8) == 64
    assert block_rows(8 * 10**6, 8) == 128

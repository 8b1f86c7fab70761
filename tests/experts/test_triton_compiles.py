"""The kernels compile for Ampere and Hopper, without a GPU: what the interpreter accepts, the compiler need not.

Every block shape that may be chosen must fit the shared memory and keep its sums in registers; wide ones may lay two
numbers aside after their loop.
"""

import re
import subprocess
import warnings
from dataclasses import dataclass, field

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from crossways.experts.triton import timing  # noqa: E402
from crossways.experts.triton.configs import (  # noqa: E402
    Limits,
    block_rows,
    load_class,
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
META = {"UPCAST": False, "PRECISION": "ieee", "BLOCK_M": 128, "ALIGN": 16}


@dataclass
class Kernel:
    """How a kernel is called: types of its arguments, and what is fixed at compile time."""

    function: object
    arguments: dict[str, str]
    fixed: dict = field(default_factory=dict)


def kernels(dtype):
    """All of them, with weights as layers of ours hold them."""
    x, sizes = f"*{dtype}", ("stride_e", "stride")
    rows = {"GATED": True, "ACTIVATION": "silu"}
    row_product = {"rows_ptr": x, "matrix_ptr": x, "out_ptr": x} | PLAN | dict.fromkeys((*sizes, "K", "N"), "i32")
    return {
        "up": Kernel(
            up_kernel,
            {"x_ptr": x, "token_ptr": "*i64", "weight_ptr": "*fp32", "up_ptr": x, "hidden_ptr": x, "before_ptr": x}
            | PLAN
            | dict.fromkeys((*sizes, "stride_x", "D", "F"), "i32"),
            META | rows | {"SAVE": True, "K_INNER": True},
        ),
        "down": Kernel(row_kernel, row_product, META | {"K_INNER": True}),
        "to inputs": Kernel(row_kernel, row_product, META | {"K_INNER": False}),
        "hidden": Kernel(
            hidden_grad_kernel,
            {"grad_ptr": x, "token_ptr": "*i64", "weight_ptr": "*fp32", "down_ptr": x, "before_ptr": x}
            | {"hidden_ptr": x, "grad_before_ptr": x, "part_ptr": "*fp32"}
            | PLAN
            | dict.fromkeys((*sizes, "stride_g", "P", "D", "F"), "i32"),
            META | rows | {"K_INNER": False},
        ),
        "weights": Kernel(
            weight_grad_kernel,
            {"left_ptr": x, "right_ptr": x, "token_ptr": "*i64", "offsets_ptr": "*i64", "out_ptr": x}
            | dict.fromkeys(("stride_l", "stride_r", "ROWS", "COLUMNS"), "i32"),
            {"UPCAST": False, "PRECISION": "ieee", "GATHER_LEFT": True, "LOAD": 4096, "ALIGN": 16},
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


def candidates(name, architecture, element_size=2, gated=True, block_m=128):
    limits = LIMITS[architecture]
    if name == "weights":
        return weight_grad_candidates(limits, 1024, 512, element_size)
    if name in ("sum", "plan"):
        return [triton.Config({}, num_warps=4, num_stages=3)]
    matrices, held = {"up": (1 + gated, 2), "hidden": (1, 2)}.get(name, (1, 1))
    return row_product_candidates(limits, block_m, 512, element_size, matrices, held, in_pieces=name == "hidden")


def compile_kernel(kernel, config, architecture):
    """As at a call: pointers and sizes are known to be multiples of 16, sizes only where they are."""
    function = kernel.function
    while not isinstance(function, triton.JITFunction):
        function = function.fn  # below the autotuner
    names, fixed = function.arg_names, kernel.fixed | config.kwargs
    signature = {name: "constexpr" if name in fixed else kernel.arguments[name] for name in names}
    sixteens = {name for name in kernel.arguments if name.endswith("_ptr") or fixed.get("ALIGN", 16) == 16}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in sixteens - {"tiles", *fixed}}
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


def check(name, architecture, config, dtype, folder, monkeypatch, **fixed):
    """Compile, hold to the device's limits, and give the PTX; `fixed` replaces compile-time arguments."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    kernel = kernels(dtype)[name]
    kernel.fixed |= {key: value for key, value in fixed.items() if key in kernel.fixed}
    compiled = compile_kernel(kernel, config, architecture)
    assert compiled.metadata.shared <= LIMITS[architecture].shared_memory
    assert spilled_bytes(compiled, folder) <= 8  # two numbers, outside the loop
    return compiled.asm["ptx"]


def loads_in_vectors(code):
    """Whether all that goes to shared memory beside the matrix products goes there 16 bytes at a time; addresses of
    gathered rows, which take 8, are fetched on the way too."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+|\d+)", code)
    return {int(size, 0) for size in sizes} in ({16}, {16, 8})


@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("name", kernels("bf16"))
def test_the_first_candidate(name, architecture, tmp_path, monkeypatch):
    config = candidates(name, architecture)[0]
    code = check(name, architecture, config, "bf16", tmp_path, monkeypatch)
    if name not in ("sum", "plan"):
        assert ("wgmma.mma_async" if architecture == 90 else "mma.sync") in code
        assert loads_in_vectors(code)
    if "wgmma" in code:  # in the loop they wait for the one before last
        assert re.search(r"wgmma\.wait_group\.sync\.aligned [12];", code)


@pytest.mark.parametrize("name", ["up", "down", "to inputs", "hidden", "weights"])
def test_sizes_that_are_multiples_of_eight_load_in_vectors_too(name, tmp_path, monkeypatch):
    code = check(name, 90, candidates(name, 90)[0], "bf16", tmp_path, monkeypatch, ALIGN=8)
    assert loads_in_vectors(code)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", kernels("bf16"))
def test_every_candidate(name, dtype, architecture, tmp_path, monkeypatch):
    configs = candidates(name, architecture, 4 if dtype == "fp32" else 2)
    assert configs
    for config in configs:
        check(name, architecture, config, dtype, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("name", ["up", "down", "to inputs", "hidden"])
def test_few_rows(name, block_m, architecture, tmp_path, monkeypatch):
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for config in candidates(name, architecture, size, block_m=block_m):
            check(name, architecture, config, dtype, tmp_path, monkeypatch, BLOCK_M=block_m)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("name", ["up", "down", "to inputs", "hidden", "weights"])
def test_float32_on_the_tensor_cores(name, architecture, tmp_path, monkeypatch):
    for config in candidates(name, architecture, 4):
        code = check(name, architecture, config, "fp32", tmp_path, monkeypatch, PRECISION="tf32")
        assert "tf32" in code


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("name", ["up", "hidden"])
def test_every_activation(name, activation, gated, architecture, tmp_path, monkeypatch):
    for config in candidates(name, architecture, gated=gated):
        check(name, architecture, config, "bf16", tmp_path, monkeypatch, ACTIVATION=activation, GATED=gated)


@pytest.mark.slow
@pytest.mark.parametrize("align", [4, 2, 1])
@pytest.mark.parametrize("name", ["up", "down", "to inputs", "hidden", "weights"])
def test_any_size_compiles(name, align, tmp_path, monkeypatch):
    """Such widths are padded unless they are small, so they may spill."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = kernels("bf16")[name]
    kernel.fixed["ALIGN"] = align
    compiled = compile_kernel(kernel, candidates(name, 90)[-1], 90)
    assert compiled.metadata.shared <= LIMITS[90].shared_memory


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("columns", [1, 36, 64, 4096])
@pytest.mark.parametrize("element_size", [2, 4])
def test_there_are_few_candidates_and_always_one(limits, columns, element_size):
    for block_m in (16, 32, 64, 128):
        for matrices, held in ((1, 1), (2, 2), (1, 2)):
            found = row_product_candidates(limits, block_m, columns, element_size, matrices, held)
            assert 1 <= len(found) <= 4
    assert 1 <= len(weight_grad_candidates(limits, columns, 512, element_size)) <= 4


def test_a_single_candidate_needs_no_device_in_the_interpreter(monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "do_bench", lambda run, warmup, rep, quantiles: asked.append(rep) or [1.0, 2.0, 3.0])
    assert timing.milliseconds(asked.clear, (0.5, 0.2, 0.8)) == [1.0, 2.0, 3.0]
    assert len(asked) == 1
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert timing.milliseconds(asked.clear, (0.5, 0.2, 0.8)) == [0.0, 0.0, 0.0]
    assert len(asked) == 1


def test_tiles_follow_the_mean_load():
    assert block_rows(0, 8) == 16
    assert block_rows(8 * 40, 8) == 32
    assert block_rows(8 * 100, 8) == 64
    assert block_rows(8 * 10**6, 8) == 128


def test_block_shapes_are_timed_for_five_kinds_of_load():
    loads = [load_class(pairs, 8) for pairs in range(0, 8 * 5000, 8)]
    assert sorted(set(loads)) == [16, 64, 256, 1024, 4096]
    assert loads == sorted(loads)

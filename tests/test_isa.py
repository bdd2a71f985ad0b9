"""Choosing an instruction set: the list, the override, and what happens to a wrong name."""

import os
import platform
import subprocess
import sys

import pytest

import bitnet_ops


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_scalar_is_always_there_and_last() -> None:
    assert bitnet_ops.known_isas()[-1] == "scalar"
    assert "scalar" in bitnet_ops.supported_isas()
    assert set(bitnet_ops.supported_isas()) <= set(bitnet_ops.known_isas())
    assert bitnet_ops.isa() in bitnet_ops.supported_isas()


def test_supported_list_agrees_with_the_kernel_of_the_operating_system() -> None:
    name = {"x86_64": "flags", "aarch64": "Features"}.get(platform.machine())
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if name and line.startswith(name)).split()
    except (OSError, StopIteration):
        pytest.skip("no /proc/cpuinfo with the features of this architecture (an emulator shows the host's)")
    dotprod = ("crc32", "atomics", "asimdrdm", "asimddp")
    avx512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c")
    needed = {
        "amx_int8": (*avx512, "avx512vbmi", "amx_tile", "amx_int8"),
        "avx512_vbmi": (*avx512, "avx512vbmi"),
        "avx512_vnni": avx512,
        "avx_vnni": ("avx_vnni", "avx2", "fma", "f16c"),
        "avx2": ("avx2", "fma", "f16c"),
        "neon_i8mm": (*dotprod, "i8mm"),
        "neon_dotprod": dotprod,
        "neon": (),
        "scalar": (),
    }
    expected = [name for name in bitnet_ops.known_isas() if set(needed[name]) <= set(flags)]
    assert list(bitnet_ops.supported_isas()) == expected


def test_use_isa_restores_what_was(isa: str) -> None:
    with bitnet_ops.use_isa("scalar"):
        assert bitnet_ops.isa() == "scalar"
    assert bitnet_ops.isa() == isa
    with pytest.raises(KeyError), bitnet_ops.use_isa("scalar"):
        raise KeyError
    assert bitnet_ops.isa() == isa


def test_use_isa_refuses_an_unknown_name() -> None:
    before = bitnet_ops.isa()
    with pytest.raises(ValueError, match=r"'avx1024' is unknown; supported: .*scalar"):
        bitnet_ops.use_isa("avx1024").__enter__()
    assert bitnet_ops.isa() == before


def test_use_isa_refuses_an_unsupported_name() -> None:
    unsupported = [name for name in bitnet_ops.known_isas() if name not in bitnet_ops.supported_isas()]
    if not unsupported:
        pytest.skip("this CPU supports every known instruction set")
    with pytest.raises(ValueError, match="is not supported by this CPU; supported: "):
        bitnet_ops.use_isa(unsupported[0]).__enter__()


def test_environment_variable_is_honoured() -> None:
    result = run_python("import bitnet_ops; print(bitnet_ops.isa())", BITNET_OPS_ISA="scalar")
    assert result.stdout.strip() == "scalar", result.stderr


def test_environment_variable_is_refused_loudly() -> None:
    result = run_python("import bitnet_ops", BITNET_OPS_ISA="avx1024")
    assert result.returncode != 0
    supported = ", ".join(bitnet_ops.supported_isas())
    message = f"BITNET_OPS_ISA: instruction set 'avx1024' is unknown; supported: {supported}"
    assert f"ImportError: {message}" in result.stderr


def test_a_missing_extension_is_explained() -> None:
    result = run_python("import sys; sys.modules['bitnet_ops._C'] = None; import bitnet_ops")
    assert "ImportError: bitnet_ops is not built: its extension module bitnet_ops._C" in result.stderr
    assert "pip install" in result.stderr

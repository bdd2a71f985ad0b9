"""A kernel for the Hugging Face hub (.ci/hub_kernel.py) runs beside this package and gives the same bits."""

import ast
import copy
import gc
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sources import ROOT
from tools import need_package
from torch import Tensor, nn

import bitnet_ops

SCRIPT = ROOT / ".ci/hub_kernel.py"
SHAPES = [(3, 48, 80), (1, 17, 33), (20, 130, 261), (0, 16, 16)]  # M, N, K
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def hub_kernel() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("hub_kernel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ternary(rows: int, inputs: int) -> Tensor:
    return torch.randint(-1, 2, (rows, inputs), dtype=torch.int8)


# ---- sources: nothing is compiled ---------------------------------------------------------------------


def test_python_sources_need_nothing_else(hub_kernel: ModuleType) -> None:
    found = hub_kernel.python_sources()
    assert {"__init__.py", "_C.py", "isa.py", "ops/_ternary.py", "layers/__init__.py"} <= found.keys()
    assert "_ops.py" not in found, "builders write it"
    assert not any(name.startswith(("cli/", "decoder/", "generation/")) for name in found)
    for name, file in found.items():
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.append(node.module or "")
            assert not any(module.split(".")[0] == "bitnet_ops" for module in modules), name


@pytest.mark.parametrize(
    "line", ["import bitnet_ops.isa", "from bitnet_ops import ops", "import safetensors"]
)
def test_an_import_that_the_hub_lacks_is_refused(
    hub_kernel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    (tmp_path / "__init__.py").write_text(f"import torch\nfrom . import packing\n{line}\n")
    monkeypatch.setattr(hub_kernel, "OVERLAY", tmp_path)
    with pytest.raises(hub_kernel.HubKernelError, match=r"__init__.py:3: expected relative imports.*got '"):
        hub_kernel.python_sources()


def test_files_of_other_systems_are_empty(hub_kernel: ModuleType, tmp_path: Path) -> None:
    sources = hub_kernel.write_sources(tmp_path, "owner/name")
    everything = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp")}
    assert set(sources) == everything
    conditions = {}
    for name in sources:
        text, original = (tmp_path / name).read_text(), (ROOT / name).read_text()
        if text != original:
            first, rest = text.split("\n", 1)
            assert rest == f"{original}#endif\n"
            conditions[Path(name).name] = first.removeprefix("#if ").split("  //")[0]
    assert conditions["avx2.cpp"] == conditions["amx_int8.cpp"] == "defined(__x86_64__)"
    assert conditions["neon_dotprod.cpp"] == "defined(__aarch64__)"
    assert conditions["linux.cpp"] == conditions["sleep_by_futex.cpp"] == "defined(__linux__)"
    assert conditions["windows.cpp"] == "defined(_WIN32)"
    assert not conditions.keys() & {
        "scalar.cpp",
        "tile16.cpp",
        "ternary.cpp",
        "cpu_features.cpp",
        "library.cpp",
    }


def test_build_toml(hub_kernel: ModuleType, tmp_path: Path) -> None:
    """As `kernels` reads it, with the parser of kernel-builder."""
    pytest.importorskip("kernels", reason="no kernels (pip install -e '.[test]')")
    from kernels._rust import Backend, Build

    hub_kernel.write_sources(tmp_path, "owner/name")
    assert Build.open(tmp_path).general.backends == [Backend.CPU]
    text = (tmp_path / "build.toml").read_text()
    assert 'cpu = "2.10"' in text
    assert text.count('"-ffp-contract=off"') == 2
    assert 'repo-id = "owner/name"' in text


def test_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    for arguments, message in (
        ([tmp_path / "full"], "expected an empty folder"),
        ([tmp_path / "new", "beos"], "systems: expected some of linux-x86_64, .*, got beos"),
    ):
        result = subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True
        )
        assert result.returncode == 1
        assert re.fullmatch(f"hub_kernel.py: .*{message}.*", result.stderr.strip()), result.stderr
    assert not (tmp_path / "new").exists()


# ---- the kernel of this machine ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes."""
    pytest.importorskip("kernels", reason="no kernels (pip install -e '.[test]')")
    out = tmp_path_factory.mktemp("hub") / "bitnet-ops"
    result = subprocess.run([sys.executable, SCRIPT, out], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == out / "build"
    return out


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Any:
    from kernels import get_local_kernel

    return get_local_kernel(folder)


@pytest.fixture(autouse=True)
def forget_programs() -> None:
    """Those of other tests count towards the limit of programs for `nn.Sequential.forward`."""
    torch.compiler.reset()


@pytest.fixture
def kernelized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts forward passes of the kernel into layers of these classes, in place."""
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

    def put(model: nn.Module, classes: dict[type[nn.Module], str], mode: Any = Mode.INFERENCE) -> nn.Module:
        for cls, name in classes.items():
            # What replace_kernel_forward_from_hub does, and undone after the test.
            monkeypatch.setattr(cls, "kernel_layer_name", name, raising=False)
            monkeypatch.setattr(cls, "kernel_condition", staticmethod(lambda module: True), raising=False)
        layers = {name: {"cpu": LocalLayerRepository(folder, layer_name=name)} for name in classes.values()}
        with use_kernel_mapping(layers, inherit_mapping=False):
            result: nn.Module = kernelize(model, mode=mode, device="cpu", use_fallback=False)
        return result

    return put


@pytest.mark.slow
def test_metadata_and_libraries(folder: Path, kernel: Any) -> None:
    from kernels import Metadata, get_loaded_kernels
    from kernels._rust import Digest, DigestAlgorithm

    (variant,) = (folder / "build").iterdir()
    assert variant.name.startswith("torch-stable-abi210-cpu-")
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert kernel.__name__ == metadata.id
    assert metadata.id in [loaded.metadata.id for loaded in get_loaded_kernels()]
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    assert {name for name in kernel.__all__ if not hasattr(kernel, name)} == set()
    checker = pytest.importorskip(
        "kernel_abi_check", reason="no kernel_abi_check (pip install -e '.[release]')"
    )
    (extension,) = (path for path in variant.iterdir() if path.suffix in (".so", ".pyd"))
    assert checker.ObjectFile(extension).check_python_abi("3.10") == []


@pytest.mark.slow
def test_two_namespaces_in_one_process(kernel: Any) -> None:
    theirs, ours = getattr(torch.ops, kernel.__name__), torch.ops.bitnet_ops
    assert theirs.ternary_linear.default is not ours.ternary_linear.default
    assert theirs.ternary_linear.default.name() == f"{kernel.__name__}::ternary_linear"
    assert kernel.supported_isas() == bitnet_ops.supported_isas()
    before = bitnet_ops.isa()
    with kernel.use_isa("scalar"):
        assert (kernel.isa(), bitnet_ops.isa()) == ("scalar", before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions_give_the_same_bits(kernel: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, inputs = shape
    x, w = torch.randn(tokens, inputs).to(dtype), ternary(rows, inputs)
    weight, table = torch.rand(inputs), torch.randn(rows, inputs).bfloat16()
    for mine, other in (
        (kernel.pack_ternary(w, "row"), bitnet_ops.pack_ternary(w, "row")),
        (kernel.rms_norm(x, weight, 1e-6), bitnet_ops.rms_norm(x, weight, 1e-6)),
        (kernel.lm_head(x.float(), table), bitnet_ops.lm_head(x.float(), table)),
        *zip(kernel.quantize_activations(x), bitnet_ops.quantize_activations(x), strict=True),
    ):
        assert torch.equal(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["tile16", "tile16_base3", "row", "column", "groups"])
def test_layer_gives_the_same_bits(
    kernel: Any, kernelized: Any, shape: tuple[int, int, int], dtype: torch.dtype, bits: int, layout: str
) -> None:
    """The layer of the kernel, and this package's with the forward pass of the kernel."""
    tokens, rows, inputs = shape
    x, w, bias = torch.randn(tokens, inputs).to(dtype), ternary(rows, inputs), torch.randn(rows)
    options: dict[str, Any] = {"activation_bits": bits, "layout": layout}
    scale = torch.rand(rows)
    if layout == "groups":
        options = {"activation_bits": bits, "group_size": 64}
        scale = torch.rand(-(-inputs // 64), rows).half()
    ours = bitnet_ops.BitLinear.from_ternary(w, scale, bias, **options).eval()
    expected = ours(x)
    assert torch.equal(kernel.BitLinear.from_ternary(w, scale, bias, **options)(x), expected)
    adopted = kernelized(copy.deepcopy(ours), {bitnet_ops.BitLinear: "PackedBitLinear"})
    assert adopted.forward.__func__ is kernel.layers.PackedBitLinear.forward
    assert torch.equal(adopted(x), expected)


@pytest.mark.slow
def test_state_dicts_are_exchanged(kernel: Any) -> None:
    linear = nn.Linear(70, 40)
    ours, theirs = bitnet_ops.BitLinear.from_linear(linear), kernel.BitLinear(70, 40, bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 70)
    assert torch.equal(theirs(x), ours(x))


@pytest.mark.slow
def test_gradients(kernel: Any, kernelized: Any) -> None:
    from kernels import Mode

    ours = bitnet_ops.BitLinear.from_linear(nn.Linear(70, 40))
    adopted = kernelized(
        copy.deepcopy(ours), {bitnet_ops.BitLinear: "PackedBitLinear"}, Mode.TRAINING | Mode.TORCH_COMPILE
    )
    a, b = torch.randn(5, 70).requires_grad_(), torch.zeros(5, 70).requires_grad_()
    with torch.no_grad():
        b.copy_(a)
    ours(a).square().sum().backward()
    adopted(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)


# ---- layers of transformers -------------------------------------------------------------------------


def their_layers() -> dict[str, nn.Module]:
    """One of each kind, with biases and scales."""
    from transformers.integrations import bitnet as theirs

    packed = theirs.BitLinear(80, 48, True, dtype=torch.float32)
    offline = theirs.AutoBitLinear(80, 48, True)
    normed = theirs.AutoBitLinear(80, 48, True, online_quant=True, use_rms_norm=True)
    with torch.no_grad():
        packed.weight.copy_(theirs.pack_weights(ternary(48, 80)))
        packed.bias.normal_()
        packed.weight_scale.fill_(40.0)
        offline.weight.copy_(ternary(48, 80))
        offline.weight_scale.fill_(0.02)
        normed.rms_norm.weight.uniform_()
    return {"bitlinear": packed, "offline": offline, "online": normed}


def their_names() -> dict[type[nn.Module], str]:
    from transformers.integrations import bitnet as theirs

    return {theirs.BitLinear: "BitLinear", theirs.AutoBitLinear: "AutoBitLinear"}


def compiled_exactly(model: nn.Module, kind: str) -> Any:
    """Inductor sums the norm of the online layer, which is transformers', in an order of its own."""
    return torch.compile(model, fullgraph=True, backend="aot_eager" if kind == "online" else "inductor")


each_kind = pytest.mark.parametrize("kind", ["bitlinear", "offline", "online"])


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_transformers(kernelized: Any, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    model = nn.Sequential(their_layers()[kind]).eval()
    x = torch.randn(2, 7, 80).to(dtype)
    expected = bitnet_ops.accelerate(copy.deepcopy(model))(x)
    kernelized(model, their_names())
    assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    compiled = compiled_exactly(model, kind)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[:, :3]), expected[:, :3])


@pytest.mark.slow
@each_kind
def test_new_weights_are_seen(kernelized: Any, kind: str) -> None:
    """Eager and compiled: each tensor is written to in place."""
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    model, other = (nn.Sequential(their_layers()[kind]).eval() for _ in range(2))
    x = torch.randn(4, 80)
    kernelized(model, their_names())
    compiled = compiled_exactly(model, kind)
    before = model(x), compiled(x)
    assert torch.equal(*before)
    model.load_state_dict(other.state_dict())
    expected = bitnet_ops.accelerate(other)(x)
    assert not torch.equal(before[0], expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        model[0].bias.add_(1.0)
    assert not torch.equal(model(x), expected)


@pytest.mark.slow
def test_use_kernels(tmp_path: Path, folder: Path, kernelized: Any) -> None:
    """Transformers' own argument, where the installed `kernels` is one that it takes."""
    pytest.importorskip("transformers")
    from kernels import LocalLayerRepository, use_kernel_mapping
    from transformers import AutoModelForCausalLM
    from transformers.utils.import_utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("this transformers wants another version of kernels")
    ours = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    bitnet_ops.save_published(ours, tmp_path / "published")
    kernelized(nn.Sequential(), their_names())  # marks the classes
    mapping = {
        name: {"cpu": LocalLayerRepository(folder, layer_name=name)} for name in their_names().values()
    }
    options = {"dtype": torch.float32}
    with torch.compiler.set_stance("force_eager"):
        with use_kernel_mapping(mapping):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "published", use_kernels=True, **options)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "published", **options)
        layer = model.model.layers[0].mlp.up_proj
        x = torch.randn(1, 3, layer.in_features)
        name = "model.layers.0.mlp.up_proj"
        expected = bitnet_ops.accelerate(theirs).get_submodule(name)(x)
        assert torch.equal(layer(x), expected)


@pytest.mark.slow
def test_packed_copies_go_with_the_weights(kernel: Any, kernelized: Any) -> None:
    pytest.importorskip("transformers")
    kept = sys.modules[f"{kernel.__name__}.layers.repacked"]._kept
    before = len(kept)  # of other tests, whose models are still there
    for _ in range(20):
        model = kernelized(nn.Sequential(their_layers()["bitlinear"]).eval(), their_names())
        model(torch.randn(1, 80))
        del model
        gc.collect()
    assert len(kept) <= before + 1


@pytest.mark.slow
def test_threads_that_come_first_pack_once(
    kernel: Any, kernelized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    repacked = sys.modules[f"{kernel.__name__}.layers.repacked"]
    pack, packed = repacked._packed, []

    def slowly(*arguments: Any) -> Any:
        packed.append(arguments)
        time.sleep(0.2)
        return pack(*arguments)

    monkeypatch.setattr(repacked, "_packed", slowly)
    model = kernelized(nn.Sequential(their_layers()["bitlinear"]).eval(), their_names())
    x = torch.randn(1, 80)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model, [x] * 4))
    assert len(packed) == 1
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.slow
@each_kind
def test_gradient_of_the_input(kernelized: Any, kind: str) -> None:
    """The only one: for training, `kernels` refuses these layers, or keeps their own forward passes."""
    pytest.importorskip("transformers")
    from kernels import Mode

    model = nn.Sequential(their_layers()[kind])
    with pytest.raises(ValueError, match="does not support"):
        kernelized(model, their_names(), Mode.TRAINING)
    expected = bitnet_ops.accelerate(copy.deepcopy(model.eval()))
    kernelized(model, their_names())
    x = torch.randn(3, 80)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(a).square().sum().backward()
    expected(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert model[0].weight.grad is None


@pytest.mark.slow
def test_errors_name_what_is_wrong(kernel: Any, kernelized: Any) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(RuntimeError, match=r"bitnet_ops::ternary_linear: argument 'packed'.*in_features=81"):
        kernel.BitLinear(80, 48)(torch.randn(2, 81))
    layers = their_layers()
    with torch.no_grad():
        layers["offline"].weight[0, 0] = 0.5
        layers["bitlinear"].weight[0, 0] = 255
    for kind, message in (("offline", r"weights in \{-1, 0, 1\}"), ("bitlinear", "2-bit codes")):
        model = kernelized(nn.Sequential(layers[kind]).eval(), their_names())
        with pytest.raises(RuntimeError, match=f"bitnet_ops::repacked_linear: expected .*{message}"):
            model(torch.randn(2, 80))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["autobitlinear", "bitlinear", "online"])
def test_model_of_transformers(tmp_path: Path, kernelized: Any, form: str) -> None:
    """A whole model: linear layers as `accelerate` makes them, norms by `rms_norm`."""
    pytest.importorskip("transformers")
    from their_models import make_pair
    from tiny_checkpoints import Sizes
    from transformers.models.bitnet.modeling_bitnet import BitNetRMSNorm

    model = make_pair(
        tmp_path, Sizes(vocab=97, hidden=60, intermediate=100, heads=5, kv_heads=1, layers=2), form
    ).theirs.eval()
    expected = copy.deepcopy(model)
    for layer in expected.model.layers:
        for part in (layer.self_attn, layer.mlp):
            bitnet_ops.accelerate(part)
    for module in expected.modules():
        if isinstance(module, BitNetRMSNorm):
            module.forward = lambda x, norm=module: bitnet_ops.rms_norm(x, norm.weight, norm.variance_epsilon)
    kernelized(model, their_names() | {BitNetRMSNorm: "RMSNorm"})
    ids = torch.randint(97, (2, 12))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


# ---- other ways to fail or to build -------------------------------------------------------------------


@pytest.mark.slow
def test_an_extension_that_does_not_load(folder: Path, tmp_path: Path) -> None:
    from kernels import get_local_kernel

    broken = tmp_path / "broken"
    shutil.copytree(folder / "build", broken / "build")
    (extension,) = broken.glob("build/*/*.so")
    extension.write_text("no library")
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("_bitnet_ops_cpu")}
    for name in loaded:
        del sys.modules[name]
    try:
        with pytest.raises(ImportError, match=re.escape(extension.name)):
            get_local_kernel(broken)
    finally:
        sys.modules.update(loaded)


@pytest.mark.slow
def test_build_by_zig(hub_kernel: ModuleType, tmp_path: Path) -> None:
    """What is published: for old systems, and with the bits of this package."""
    pytest.importorskip("kernels", reason="no kernels (pip install -e '.[test]')")
    need_package("ziglang")
    checker = need_package("kernel_abi_check")
    name = f"linux-{platform.machine()}"
    (variant,) = hub_kernel.write_hub_kernel(tmp_path / "out", [name])
    (extension,) = variant.glob("*.abi3.so")
    assert checker.ObjectFile(extension).check_manylinux("manylinux_2_28") == []
    assert checker.ObjectFile(extension).check_python_abi("3.10") == []
    program = (
        "import torch, kernels, bitnet_ops; from pathlib import Path\n"
        f"kernel = kernels.get_local_kernel(Path({str(tmp_path / 'out')!r}))\n"
        "linear, x = torch.nn.Linear(100, 60), torch.randn(3, 100)\n"
        "layer, ours = (package.BitLinear.from_linear(linear) for package in (kernel, bitnet_ops))\n"
        "assert torch.equal(layer(x), ours(x))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

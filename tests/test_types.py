"""The package's types reach its users: a script that imports it passes mypy --strict.

Python's own typing is checked by `mypy` in README's test block; here it is what lies outside of the package.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bitnet_ops

SCRIPT = '''\
"""What a researcher writes."""

from pathlib import Path

import torch
from torch import Tensor, nn

import bitnet_ops
from bitnet_ops import BitLinear, BitLinearQAT, BitNet, BitNetConfig, DecoderConfig, KVCache, ops
from bitnet_ops.evaluation.sparsity import measure_sparsity


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = BitLinearQAT(size, 4 * size, bias=False)
        self.down = BitLinear.from_linear(nn.Linear(4 * size, size), layout="row")

    def forward(self, x: Tensor) -> Tensor:
        y = ops.ternary_linear(x, self.down.packed_weight, self.down.weight_scale, self.down.bias, 4)
        return self.down.forward(self.up.forward(y)) + bitnet_ops.rms_norm(x, self.up.weight, 1e-5)


def write(folder: Path) -> list[str]:
    model: BitNet = bitnet_ops.from_pretrained(folder)
    batch = model.encode(["It is a truth", "Emma"])
    ids: Tensor = model.generate(batch["input_ids"], max_new_tokens=8, do_sample=True, top_p=0.9)
    cache = KVCache(model.config, batch_size=1, capacity=64, dtype=torch.bfloat16)
    with bitnet_ops.use_isa(bitnet_ops.supported_isas()[-1]):
        pieces: list[str] = list(model.stream("Mr. Darcy", max_new_tokens=4, cache=cache))
    config: DecoderConfig = model.config.replace(num_hidden_layers=2)
    small: BitNetConfig = BitNetConfig().replace(num_hidden_layers=config.num_hidden_layers)
    print(small)
    shares: list[float] = [layer.open_gates for layer in measure_sparsity(model, ids[:1])]
    model.save_pretrained(folder / f"{config.head_dim}-{sum(shares):.2f}")
    q, x_scale = bitnet_ops.quantize_activations(torch.ones(1, 4))
    print((q * x_scale).sum(), bitnet_ops.pack(Block(4)))
    return pieces
'''

WRONG = {
    "bitnet_ops.isa() + 1": "operator",
    'bitnet_ops.pack_ternary("tile16")': "arg-type",
    "bitnet_ops.BitLinear(64, 64, layouts=8)": "call-arg",
    "bitnet_ops.from_pretrained(3)": "arg-type",
    "bitnet_ops.from_pretrained('a').generate([1, 2])": "arg-type",
    "bitnet_ops.from_pretrained('a').stream('b', temprature=1.0)": "call-arg",
    "bitnet_ops.nothing": "attr-defined",
}
"""What a type checker has to see, and could not where a type is Any."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory, pytestconfig):
    """What mypy says of both, in a folder where only the installed package is to be found."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    wrong = "import bitnet_ops\n\n" + "".join(f"{line}\n" for line in WRONG)
    (folder / "wrong.py").write_text(wrong, encoding="utf-8")
    # PYTHONPATH for a build in place. There mypy asks for py.typed, as among installed packages.
    environment = dict(os.environ, PYTHONPATH=str(Path(bitnet_ops.__file__).parent.parent))
    environment.pop("MYPYPATH", None)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--show-error-codes", "--no-pretty", "--no-error-summary",
         "--cache-dir", str(pytestconfig.cache.mkdir("mypy")), "script.py", "wrong.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.stderr == ""
    return result.stdout.splitlines()


@pytest.mark.slow
def test_a_users_script_passes_strictly(errors):
    assert [line for line in errors if not line.startswith("wrong.py")] == []


@pytest.mark.slow
@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_found(errors, line):
    number = 3 + list(WRONG).index(line)
    found = [error for error in errors if error.startswith(f"wrong.py:{number}: error:")]
    assert len(found) == 1, errors
    assert found[0].endswith(f"[{WRONG[line]}]")


def test_the_package_says_that_it_is_typed():
    """In the folder that is imported, and among the files that were installed, where that is known."""
    assert (Path(bitnet_ops.__file__).parent / "py.typed").exists()
    files = importlib.metadata.files("bitnet_ops") or []
    installed = {file.as_posix() for file in files if file.as_posix().startswith("bitnet_ops/")}
    if installed:  # an installation in place lists no files of the package
        assert "bitnet_ops/py.typed" in installed

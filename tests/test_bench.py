"""The comparison of bench/ with small sizes and made-up programs: no time is checked here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bitnet_ops

BENCH = Path(__file__).parents[1] / "bench"

sys.path.insert(0, str(BENCH))
from comparison import llama_bench_engine  # noqa: E402
from comparison.energy import EnergyMeter  # noqa: E402
from comparison.random_gguf import bytes_read, write_random  # noqa: E402
from comparison.rows import Program, Row, comparison_rows  # noqa: E402
from comparison.shapes import SHAPES, shape  # noqa: E402
from comparison.turns import Comparison, Figure, Plan, Results, fair_share  # noqa: E402
from probes import multiply_rate  # noqa: E402
from report import report  # noqa: E402

sys.path.remove(str(BENCH))

ENGINE = """
import time
from .engine import Engine

def make(speed, peak=1000, fail=""):
    if fail == "make":
        raise ValueError("no such model")
    return Fake(speed, peak, fail)

class Fake(Engine):
    def __init__(self, speed, peak, fail):
        self.speed, self.peak, self.fail = speed, peak, fail
    def set_threads(self, count):
        self.count = count
    def prompt(self, tokens):
        print("noise on standard output")
        if self.fail == "prompt" and tokens > 16:
            raise ValueError("prompt too long")
        seconds = tokens / (self.speed * self.count)
        if seconds > 1:
            time.sleep(60)
        return seconds
    def decode(self, tokens, seconds):
        return tokens, tokens / (self.speed * self.count / 2)
    def weight_bytes(self):
        return 100
    def peak_bytes(self):
        return self.peak
    def forget_peak(self):
        self.peak = self.peak // 2
"""

PLAN = Plan((2, 1), prompts=(100, 400), tokens=8, limit_seconds=0.5, rounds=3, seconds=30)


def fake_row(**options: Any) -> Row:
    return Row("a model", "a table", Program(sys.executable), lambda _: {"engine": "fake", **options}, 0.0)


def fake_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan = PLAN, **rows: Row
) -> dict[str, Results]:
    """Runs rows of made-up speeds."""
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "fake.py").write_text(ENGINE, encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Comparison(rows, plan, tmp_path, lambda threads: 1e5 * threads).run()


def test_figures_of_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = fake_run(tmp_path, monkeypatch, one=fake_row(speed=1e4), other=fake_row(speed=2e4))
    for key, speed in (("one", 1e4), ("other", 2e4)):
        result = results[key]
        assert result.failure == ""
        rates = {at: one.values for at, one in result.rates.items()}
        assert list(rates) == [(2, 100), (2, 0), (2, 400), (1, 100), (1, 0)]
        assert rates[2, 100] == rates[2, 400] == pytest.approx([2 * speed] * 3)
        assert rates[1, 100] == pytest.approx([speed] * 3)
        assert rates[2, 0] == pytest.approx([speed] * 3)
        assert result.shares[2] == pytest.approx([100 * speed / 2e5] * 3)
        assert (result.read, result.peak_bytes, result.running_bytes) == (100, 1000, 500)
        assert result.spread(2) == "0% of 3"


def test_slow_prompts_are_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens would take 2 seconds: they are ended, and 16 tokens stand for them."""
    result = fake_run(tmp_path, monkeypatch, slow=fake_row(speed=25.0))["slow"]
    assert result.failure == ""
    assert result.rates[2, 100].cell() == "50 (prompt of 16)"
    assert result.rates[2, 0].cell() == "25 (prompt of 16)"
    assert result.rates[2, 400].cell() == "over 0.5 s"
    assert result.rates[1, 100].cell() == "25 (prompt of 16)"


def test_a_long_prompt_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens take 0.25 s, so 400 would take a second."""
    plan = Plan((1,), prompts=(100, 400), limit_seconds=0.5, rounds=1, seconds=30)
    result = fake_run(tmp_path, monkeypatch, plan, slow=fake_row(speed=400.0))["slow"]
    assert result.rates[1, 100].cell() == pytest.approx(400.0)
    assert result.rates[1, 400].cell() == "over 0.5 s"


@pytest.mark.parametrize(("fail", "message"), [("make", "no such model"), ("prompt", "prompt too long")])
def test_failures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, message: str) -> None:
    results = fake_run(tmp_path, monkeypatch, bad=fake_row(speed=1e4, fail=fail), good=fake_row(speed=1e4))
    assert message in results["bad"].failure
    assert results["good"].failure == ""
    assert len(results["good"].rates[2, 100].values) == 3


def test_memory_for_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that do not fit beside each other are made anew in each turn."""
    monkeypatch.setattr("comparison.turns.available_gigabytes", lambda: 0.0)
    rows = {
        name: Row(name, "", Program(sys.executable), lambda _: {"engine": "fake", "speed": 1e4}, 1.0)
        for name in ("a", "b")
    }
    for result in fake_run(tmp_path, monkeypatch, **rows).values():
        assert result.failure == ""
        assert len(result.rates[1, 0].values) == 3


def test_fair_share() -> None:
    assert fair_share(10.0, [1.0, 2.0]) == float("inf")
    assert fair_share(10.0, [1.0, 8.0, 9.0]) == 4.5
    assert fair_share(9.0, [5.0, 5.0, 5.0]) == 3.0
    assert fair_share(-1.0, [5.0]) == -1.0


def test_cells() -> None:
    assert Figure().cell() is None
    assert Figure([3.0, 1.0, 2.0]).cell() == 2.0
    assert Figure([0.1234], note="prompt of 16").cell() == "0.123 (prompt of 16)"
    assert Figure(given_up=20.0).cell() == "over 20 s"


def make_zone(folder: Path, name: str, energy: int, maximum: int = 1000) -> Path:
    folder.mkdir()
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", maximum)):
        (folder / file).write_text(f"{value}\n", encoding="ascii")
    return folder / "energy_uj"


def test_energy_counters(tmp_path: Path) -> None:
    """Packages and their memory count, parts of them do not; a counter that starts again goes on."""
    package = make_zone(tmp_path / "intel-rapl:0", "package-0", 900)
    memory = make_zone(tmp_path / "intel-rapl:0:1", "dram", 100)
    part = make_zone(tmp_path / "intel-rapl:0:0", "core", 100)
    other = make_zone(tmp_path / "intel-rapl-mmio:0", "package-0", 900)
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    for file, value in ((package, 400), (memory, 350), (part, 999), (other, 400)):
        file.write_text(f"{value}\n", encoding="ascii")
    assert meter.joules_since(before) == pytest.approx(750e-6)


def test_no_energy_counters(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    assert meter.joules_since(meter.read()) is None


@pytest.mark.parametrize(
    ("model", "types"),
    [
        ("bitnet-2b4t", ("bitnet-b1.58", "IQ2_BN", "Q6_K")),
        ("bitnet-2b4t", ("bitnet-b1.58", "TQ2_0", "F16")),
        ("llama-3.2-1b", ("llama", "TQ2_0", "Q4_0")),
        ("qwen3-1.7b", ("qwen3", "PQ2_0", "F16")),
        ("qwen3-1.7b", ("qwen3", "Q2_0", "Q6_K")),
    ],
)
def test_random_gguf(tmp_path: Path, model: str, types: tuple[str, str, str]) -> None:
    """Our own reader checks every byte, and finds weights of all three values, and finite scores."""
    config = shape(model, tiny=True)
    write_random(tmp_path / "a.gguf", config, *types)
    loaded = bitnet_ops.from_pretrained(tmp_path / "a.gguf")
    assert loaded.config.hidden_size == config.hidden_size
    assert loaded.config.sub_norms == config.sub_norms
    assert loaded.config.qk_norm == config.qk_norm
    up = loaded.model.layers[0].mlp.up_proj
    assert up.unpack().unique().tolist() == [-1, 0, 1]
    logits = loaded(torch.arange(8)[None])
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_bytes_read_of_the_real_sizes() -> None:
    """2B4T: 2.08 thousand million ternary weights, and a head of 128256 x 2560."""
    weights = 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 6912 * 2560)
    assert bytes_read(SHAPES["bitnet-2b4t"], "TQ2_0", "F16") == weights * 66 // 256 + 128256 * 2560 * 2


def test_rows_of_programs_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in the list, and say what to do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("LLAMA_CPP_PYTHON", "LITESPARK_PYTHON", "IK_LLAMA_BENCH"):
        monkeypatch.delenv(f"BITNET_OPS_{name}", raising=False)
    programs = {key: row.program for key, row in comparison_rows(Path()).items()}
    missing = {key: program for key, program in programs.items() if program.command is None}
    assert {"bitnet-tq2_0-Q6_K", "bitnet-litespark", "bitnet-iq2_bn-F16", "llama-q4_0"} <= set(missing)
    assert {"gemma-bf16", "llama-int4"} <= set(missing)
    assert all(program.missing for program in missing.values())


def test_report_and_chart(tmp_path: Path) -> None:
    """Of a run with a text in place of a number, and without most models."""
    rows = comparison_rows(Path())
    title = f"{rows['bitnet'].table}, random weights, one sequence, "
    benchmarks = []
    for key, prompt in (("bitnet", 100.0), ("bitnet-transformers", "0.5 (prompt of 16)")):
        for what, columns in (
            ("2 threads:", {"prompt of 128, tok/s": prompt, "prompt of 512, tok/s": "over 20 s"}),
            ("1 thread:", {"prompt of 128, tok/s": 1.0, "decode, tok/s": 2.0}),
            ("memory and energy:", {"peak memory, GB": 1.5, "energy for a token, J": "not readable"}),
        ):
            more = {"decode, tok/s": 30.0} if what == "2 threads:" else {}
            row = {"table": title + what, "row": {"model": rows[key].name}, **columns, **more}
            benchmarks.append({"extra_info": row})
    text = report([one["extra_info"] for one in benchmarks], {})
    assert f"| {rows['bitnet-transformers'].name} | 0.5 (prompt of 16) | over 20 s | 30 |" in text
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"benchmarks": benchmarks}), encoding="utf-8")
    command = [sys.executable, BENCH / "chart.py", results, tmp_path / "chart.png"]
    root = str(Path(bitnet_ops.__file__).parents[1])
    subprocess.run(command, check=True, env={"PYTHONPATH": root, "PATH": ""})
    assert 5_000 < (tmp_path / "chart.png").stat().st_size < 100_000


BENCH_PROGRAM = """#!{python}
import json, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
prompt = int(arguments["-p"])
rate = 10.0 * int(arguments["-t"]) if prompt else float(arguments["-gp"].split(",")[0])
print(json.dumps([{{"samples_ts": [1.0, rate]}}]))
"""


def test_llama_bench(tmp_path: Path) -> None:
    """The second repeat counts; tokens are written behind the prompt that came last."""
    program = tmp_path / "llama-bench"
    program.write_text(BENCH_PROGRAM.format(python=sys.executable), encoding="ascii")
    program.chmod(0o755)
    engine = llama_bench_engine.make(str(program), "model.gguf")
    engine.set_threads(2)
    assert engine.prompt(40) == pytest.approx(2.0)
    assert engine.decode(20, 4.0) == (20, pytest.approx(0.5))
    assert engine.peak_bytes() > 1 << 20


@pytest.mark.slow
def test_every_model_with_small_sizes(tmp_path: Path) -> None:
    """Those of programs that are there; ik_llama.cpp's would need its real sizes."""
    script = BENCH / "make_synthetic_checkpoint.py"
    sizes = {"layers": 2, "hidden": 256, "intermediate": 512, "heads": 4, "kv-heads": 2, "vocab": 512}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, script, tmp_path / "packed", *options], check=True)
    rows = {
        key: row
        for key, row in comparison_rows(tmp_path / "packed", tiny=True).items()
        if row.program.command is not None
    }
    assert {"bitnet", "bitnet-transformers", "llama-bf16", "gemma-bf16", "qwen3-16"} <= set(rows)
    plan = Plan((2, 1), prompts=(24, 48), tokens=4, limit_seconds=120, ready_seconds=600, rounds=1)
    results = Comparison(rows, plan, tmp_path, lambda threads: 1e9).run()
    assert {key: result.failure for key, result in results.items() if result.failure} == {}
    for key, result in results.items():
        assert all(isinstance(figure.cell(), float) for figure in result.rates.values()), key
        assert len(result.rates) == 5
        assert result.read
        assert result.peak_bytes >= result.running_bytes > 0


def test_every_benchmark_can_be_imported(tmp_path: Path) -> None:
    options = ["--collect-only", "-q", "-c", str(BENCH.parent / "pyproject.toml"), str(BENCH)]
    command = [sys.executable, "-m", "pytest", *options]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert collected.returncode == 0, collected.stdout[-4000:]


@pytest.mark.skipif(sys.platform != "linux", reason="the probes are for Linux")
def test_probes_compile() -> None:
    assert multiply_rate("no such instruction", 1) is None

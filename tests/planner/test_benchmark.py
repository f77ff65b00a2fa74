import subprocess
import sys


def test_the_benchmark_runs_on_a_cpu_and_knows_a_gpu_from_one():
    command = [sys.executable, "-m", "benchmarks.memory"]
    done = subprocess.run([*command, "--tiny"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("tiny")]
    assert [row[2] for row in rows] == ["load", "generate", "update", "optimizer"], done.stdout
    weights, measured = map(float, rows[0][3:5])
    assert 0.8 * weights < measured < 1.5 * weights + 0.05  # resident memory: the weights, and little else


def test_without_a_gpu_it_reports_nothing():
    import torch

    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU" in done.stderr

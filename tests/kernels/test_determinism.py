"""Kernels of ours give the same bits each time."""

from pathlib import Path

from grpo_plus import kernels


def test_no_kernel_adds_with_atomics():
    sources = list(Path(kernels.__file__).parent.rglob("*.py"))
    assert any("triton.jit" in path.read_text(encoding="utf-8") for path in sources)
    assert [path.name for path in sources if "atomic" in path.read_text(encoding="utf-8")] == []

"""Which lines of a traceback are the user's: neither an installed package's, wherever it is installed, nor ours."""

import importlib
import sys

import pytest

from grpo_plus.cli.tracebacks import users_part


@pytest.mark.parametrize("installed", [True, False])
def test_a_package_in_a_folder_of_pips_is_nobodys_own_code(tmp_path, monkeypatch, installed):
    name = f"judge_{installed}".lower()
    (tmp_path / f"{name}.py").write_text("def score():\n    raise KeyError('b')\n")
    if installed:
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    with pytest.raises(KeyError) as caught:
        module.score()
    trace = caught.value.__traceback__.tb_next  # without the line of this test
    shown = users_part(caught.value.with_traceback(trace))
    assert shown == "" if installed else "raise KeyError('b')" in shown
    sys.modules.pop(name)

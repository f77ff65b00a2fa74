import sys

import pytest

from grpo_plus.registry import Registry, UnknownNameError


@pytest.fixture
def registry() -> Registry[object]:
    registry: Registry[object] = Registry("advantage estimator", lambda name, function: function)
    registry.add("dr_grpo", 1)
    registry.add("grpo", 2)
    return registry


def test_an_unknown_name_suggests_the_nearest(registry):
    with pytest.raises(UnknownNameError, match="Unknown advantage estimator 'dr_grop'. Did you mean 'dr_grpo'"):
        registry["dr_grop"]


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="'grpo' is already registered"):
        registry.add("grpo", 3)


def test_a_name_cannot_look_like_a_path(registry):
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        registry.add("my.grpo", 3)


def test_names_come_sorted(registry):
    registry.add("a", 0)
    assert list(registry) == ["a", "dr_grpo", "grpo"]


def test_a_dotted_path_is_imported(registry):
    assert registry["os.path.join"] is __import__("os").path.join


@pytest.mark.parametrize("name", [".grpo", "", "grpo."])
def test_half_a_path_is_refused(registry, name):
    with pytest.raises(UnknownNameError, match="Unknown advantage estimator"):
        registry[name]


def test_a_missing_module_is_named(registry):
    with pytest.raises(UnknownNameError, match="no module 'nowhere'"):
        registry["nowhere.at.all"]


def test_a_missing_function_suggests_the_nearest(registry):
    with pytest.raises(UnknownNameError, match="'os.path' has no function 'joyn'. Did you mean 'join'"):
        registry["os.path.joyn"]


def test_an_import_error_inside_the_users_module_shows_as_itself(registry, tmp_path, monkeypatch):
    (tmp_path / "mine_with_a_typo.py").write_text("import nunpy\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nunpy"):
        registry["mine_with_a_typo.estimator"]
    assert "mine_with_a_typo" not in sys.modules

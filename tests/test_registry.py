import sys
from collections.abc import Callable
from typing import Any

import pytest

from grpo_plus.advantages import register as register_estimator
from grpo_plus.losses import register as register_loss
from grpo_plus.registry import Registry, UnknownNameError, import_function


@pytest.fixture
def registry() -> Registry[Any, Any, Any]:
    def entry(name: str, function: Callable[..., Any], *, scope: str = "batch") -> Any:
        return function if scope == "batch" else (scope, function)

    registry = Registry("advantage estimator", "grpo_plus.tests", entry)
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


def test_an_entry_is_made_of_the_function_and_its_promises(registry):
    @registry.register("mine", scope="group")
    def mine(rewards):
        return rewards

    assert registry["mine"] == ("group", mine)
    assert mine(1) == 1


@pytest.mark.parametrize(
    ("register", "known", "misspelt", "kind"),
    [
        (register_estimator, "sums_to_zero", "sum_to_zero", "advantage estimator"),
        (register_loss, "zero_without_advantage", "zero_without_advantages", "loss_type"),
    ],
)
def test_an_unknown_promise_suggests_the_nearest(register, known, misspelt, kind):
    message = f"The {kind} 'mine' makes an unknown promise '{misspelt}'. Did you mean '{known}'"
    with pytest.raises(TypeError, match=message):
        register("mine", **{misspelt: True})


@pytest.mark.parametrize("register", [register_estimator, register_loss])
def test_promises_are_keywords(register):
    with pytest.raises(TypeError, match="positional argument"):
        register("mine", "batch")(lambda data: data)


def test_what_is_registered_temporarily_is_forgotten(registry):
    with registry.temporarily():
        registry.register("mine")(len)
        assert registry["mine"] is len
    assert list(registry) == ["dr_grpo", "grpo"]


def test_what_is_registered_temporarily_is_forgotten_after_an_error(registry):
    def fail():
        with registry.temporarily():
            registry.register("mine")(len)
            raise RuntimeError("of the test")

    with pytest.raises(RuntimeError, match="of the test"):
        fail()
    assert "mine" not in registry


def defined(value):
    """What a cell of a notebook defines, each time that it runs."""

    def mine(rewards):
        return value

    mine.__qualname__ = "mine"
    return mine


def test_the_same_name_from_the_same_place_replaces(registry):
    registry.register("mine")(defined(1))
    registry.register("mine")(defined(2))
    assert registry["mine"](None) == 2


def test_the_same_name_from_another_place_is_refused(registry):
    registry.register("mine")(defined(1))
    with pytest.raises(
        ValueError, match=r"'mine' is already registered, by tests.test_registry.mine, and not by .*<lambda>"
    ):
        registry.register("mine")(lambda rewards: 2)
    registry.register("short")(lambda rewards: 1)
    with pytest.raises(ValueError, match="'short' is already registered"):
        registry.register("short")(lambda rewards: 2)


def test_a_name_of_ours_cannot_be_taken():
    with pytest.raises(ValueError, match="'rloo' is already registered, by grpo_plus.advantages.unnormalized.rloo"):
        register_estimator("rloo")(defined(1))


def test_a_function_goes_by_its_registered_name_or_its_path(registry):
    mine, other = defined(1), defined(2)
    registry.register("known")(mine)
    assert registry.name_of(mine) == "known"
    assert registry.name_of(other) == "tests.test_registry.mine"
    assert registry[other](None) == 2
    assert list(registry) == ["dr_grpo", "grpo", "known"]
    assert registry.name_of("anything") == "anything"


def test_two_functions_without_a_name_are_told_apart(registry):
    names = [registry.name_of(function) for function in (lambda rewards: 1, lambda rewards: 2)]
    assert len(set(names)) == 2
    assert [registry[name](None) for name in names] == [1, 2]


@pytest.mark.parametrize("path", ["./rewards.py", "rewards..right", ".right", "rewards."])
def test_a_path_of_files_says_how_a_function_is_written(path):
    with pytest.raises(UnknownNameError, match=r"A function of yours is written package\.module\.function"):
        import_function("reward function", path)


def install(folder, name, code, **points):
    """A package as pip would leave it in a folder of sys.path, with entry points of the group of the tests."""
    (folder / f"{name}.py").write_text(code)
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (information / "entry_points.txt").write_text("\n".join(["[grpo_plus.tests]", *lines]))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_installed_package_is_listed_and_imported_on_lookup(registry, site):
    install(site, "plug_in_of_one", "def mine(rewards):\n    return 1\n", mine="plug_in_of_one:mine")
    assert list(registry) == ["dr_grpo", "grpo", "mine"]
    assert "mine" in registry
    assert len(registry) == 3
    assert registry.registered == ["dr_grpo", "grpo"]
    assert "plug_in_of_one" not in sys.modules
    assert registry["mine"](None) == 1
    assert registry["mine"] is sys.modules["plug_in_of_one"].mine


def test_an_installed_function_may_register_itself_with_its_promises(registry, site, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "shared", registry, raising=False)
    code = f"from {__name__} import shared\n@shared.register('own', scope='group')\ndef mine(rewards): ...\n"
    install(site, "plug_in_with_promises", code, own="plug_in_with_promises:mine")
    assert registry["own"][0] == "group"


@pytest.mark.filterwarnings("error")
def test_a_registered_name_is_not_taken_by_an_installed_package(registry, site):
    registry.register("mine")(defined(1))
    install(site, "plug_in_of_a_taken_name", "def mine(rewards): ...\n", mine="plug_in_of_a_taken_name:mine")
    with pytest.warns(UserWarning, match="'mine' of plug_in_of_a_taken_name:mine is left out: tests has the name"):
        assert list(registry) == ["dr_grpo", "grpo", "mine"]
    assert len(registry) == 3  # warned once
    assert registry["mine"](None) == 1


def test_an_installed_package_that_cannot_be_loaded_is_named(registry, site):
    install(site, "plug_in_that_is_broken", "import nunpy\n", mine="plug_in_that_is_broken:mine")
    with pytest.raises(
        ImportError, match="'mine' of an installed package .* plug_in_that_is_broken:mine: No module named 'nunpy'"
    ):
        registry["mine"]


def test_an_installed_name_is_suggested(registry, site):
    install(site, "plug_in_to_suggest", "def nearest(rewards): ...\n", nearest="plug_in_to_suggest:nearest")
    with pytest.raises(UnknownNameError, match="Did you mean 'nearest'"):
        registry["nearst"]

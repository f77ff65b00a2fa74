"""TRL's code under the seam is the code that was read. If this fails after an upgrade of TRL: read the diff of the
methods it names, decide whether `grpo_plus/trainer/seam.py` still holds, then run `python -m tests.contract.refresh`."""

import inspect
import runpy
from importlib import metadata
from importlib.metadata import version

import pytest
from packaging.version import Version
from trl import GRPOTrainer

from grpo_plus.trainer import contract, names, seam


def test_the_installed_trl_is_the_tested_one():
    assert contract.check_seam() == []
    assert version("trl") in contract.known_fingerprints(), "run `python -m tests.contract.refresh`"


def test_each_minor_of_the_supported_window_was_recorded():
    minors = {Version(known).release[:2] for known in contract.known_fingerprints()}
    assert minors == {(1, 15), (1, 16)}
    assert [known for known in contract.known_fingerprints() if not names.TESTED_TRL.contains(known)] == []


def test_the_minors_differ_in_generation_alone():
    """The marker newest_trl keeps tests of all else from the previous minor: give up the marker where this fails."""
    (_, previous), (_, newest) = sorted(contract.known_fingerprints().items())
    assert {name for name in newest if newest[name] != previous[name]} == {"_generate", "_generate_single_turn"}


PARTS = [part for part in seam.TRLSeam.__mro__ if part.__module__.startswith("grpo_plus")]
OVERRIDES = list(dict.fromkeys(name for part in PARTS for name in vars(part) if name in names.RELIED_ON))


def test_an_overridden_private_method_is_fingerprinted():
    ours = {name for part in PARTS for name, value in vars(part).items() if callable(value)}
    private = {name for name in ours if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(GRPOTrainer, name)} - set(names.RELIED_ON) == set()


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_takes_what_trls_method_takes(name):
    ours, theirs = getattr(seam.TRLSeam, name), getattr(GRPOTrainer, name)
    assert ours is not theirs
    mine, trls = (inspect.signature(method).parameters for method in (ours, theirs))
    if {p.kind for p in mine.values()} >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return  # it passes on whatever there is
    rest = [p for p in mine.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = list(mine)[: len(mine) - len(rest)]
    assert named == list(trls)[: len(named)]
    # What an override passes on as it is, TRL's own calls must name.
    assert len(named) == len(trls) or (rest and tuple(trls)[len(named) :] == names.MULTIMODAL)


def plain(self, inputs):
    return inputs["a"]


def documented(self, inputs):
    """With a docstring."""

    # and a comment
    return inputs["a"]  # and another


def changed(self, inputs):
    return inputs["b"]


def more(self, inputs, mode):
    return inputs["a"]


def test_a_fingerprint_ignores_comments_and_docstrings_only():
    codes = [contract._bare_code(function).partition("\n")[2] for function in (plain, documented, changed)]
    assert codes[0] == codes[1] != codes[2]


def test_the_code_of_a_method_of_transformers_is_not_trls_to_change():
    recorded = contract.known_fingerprints()[contract.reference_version(version("trl"))]
    assert {name for name, found in recorded.items() if found["code"] is None} >= {
        "_load_from_checkpoint",
        "_load_best_model",
    }
    assert recorded["_compute_loss"]["code"] is not None


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (changed, r"GRPOTrainer.log has changed its code since trl"),
        (more, r"GRPOTrainer.log takes self, inputs, mode instead of self, logs, start_time since trl"),
    ],
)
def test_doctor_names_what_changed(monkeypatch, replacement, message):
    recorded = contract.fingerprint(replacement)
    if replacement is changed:
        recorded["parameters"] = ["self", "logs", "start_time"]
    monkeypatch.setattr(contract, "fingerprints", lambda: contract_with(log=recorded))
    (change,) = contract.check_seam()
    assert change.startswith(message)


def contract_with(**replaced):
    reference = contract.known_fingerprints()[contract.reference_version(version("trl"))]
    return reference | replaced


def test_doctor_names_what_is_gone(monkeypatch):
    left = contract_with()
    del left["_compute_loss"]
    monkeypatch.setattr(contract, "fingerprints", lambda: left)
    (change,) = contract.check_seam()
    assert change.startswith("GRPOTrainer._compute_loss is gone since trl")


@pytest.mark.parametrize(
    ("installed", "reference"), [("1.16.3", "1.16.0"), ("1.15.0", "1.15.0"), ("1.20.0", "1.16.0"), ("1.2.0", "1.15.0")]
)
def test_an_unknown_version_is_compared_with_the_newest_older_one(installed, reference):
    assert contract.reference_version(installed) == reference


def test_a_version_outside_the_window_is_warned_about():
    assert names.untested_version("1.16.2") is None
    message = names.untested_version("1.17.0")
    assert message is not None
    assert "tested with trl <1.17,>=1.15, found 1.17.0" in message


def test_importing_the_trainer_beside_another_trl_warns(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: "1.99.0")
    with pytest.warns(UserWarning, match=r"grpo_plus was tested with trl <1.17,>=1.15, found 1.99.0") as caught:
        runpy.run_path(names.__file__)
    assert len(caught) == 1

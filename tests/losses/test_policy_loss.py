import sys

import pytest
import torch

from grpo_plus.losses import LOSSES, Loss, LossInputs, TokenLoss, check_loss_keywords, policy_loss, register
from tests.close import assert_close


def inputs(**fields) -> LossInputs:
    """Two rows of two and one tokens; log-ratios .1, .1 and .2."""
    logps = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    values = {
        "logps": logps,
        "old_logps": logps - torch.tensor([[0.1, 0.1], [0.2, 0.0]]),
        "advantages": torch.tensor([[1.0], [-1.0]]),
        "mask": torch.tensor([[1, 1], [1, 0]]),
    }
    return LossInputs(**{**values, **fields})


def returning(value) -> Loss:
    return Loss("mine", lambda inputs: value)


def test_the_reduction_may_be_chosen():
    # losses 1, 2 and -3: all tokens 0 / 3, rows (3/2 - 3) / 2
    assert policy_loss("reinforce", inputs(), num_items=3).loss == 0.0
    assert policy_loss("reinforce", inputs(), loss_reduction="seq-mean-token-mean").loss == -0.75


def test_the_sampling_ratio_multiplies_the_loss_and_not_the_kl():
    ratio = torch.tensor([[0.5, 2.0], [0.0, float("nan")]])
    given = inputs(importance_sampling_ratio=ratio, ref_logps=torch.tensor([[-1.0, -2.0], [-3.5, 0.0]]))
    # losses .5 * 1, 2 * 2, 0 * -3; k1 of the third token .5
    result = policy_loss("reinforce", given, beta=0.1, kl_estimator="k1", kl_ratio=None, num_items=1)
    assert_close("loss", result.loss, torch.tensor(0.5 + 4.0 + 0.0 + 0.1 * 0.5), rtol=1e-6)
    assert_close("kl", result.metrics["kl"][1, 0], torch.tensor(0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "keywords", "flagged"),
    [
        # Ratios 1.5 and .5 with A = 1, then with A = -1. The second clip stops 1.5 > c where A < 0.
        ("dual_clip", {"c": 1.4}, {"clip_ratio/dual_mean": [[0, 0], [1, 0]]}),
        ("cispo_two_sided", {}, {"clip_ratio/low_mean": [[0, 1], [0, 1]], "clip_ratio/high_mean": [[1, 0], [1, 0]]}),
        # Its bounds stop a token only in the direction of its advantage.
        ("gmpo", {"epsilon": 0.3}, {"clip_ratio/low_mean": [[0, 0], [0, 1]], "clip_ratio/high_mean": [[1, 0], [0, 0]]}),
        ("grpo", {}, {"clip_ratio/low_mean": [[0, 0], [0, 1]], "clip_ratio/high_mean": [[1, 0], [0, 0]]}),
    ],
)
def test_the_metrics_flag_the_tokens_that_were_clipped(name: str, keywords, flagged):
    logps = torch.full((2, 2), -1.0)
    ratios = torch.tensor([[1.5, 0.5], [1.5, 0.5]])
    given = inputs(logps=logps, old_logps=logps - ratios.log(), mask=torch.ones(2, 2))
    metrics = policy_loss(name, given, keywords, num_items=4).metrics
    assert {key: metrics[key].tolist() for key in flagged} == flagged


def test_clip_cov_drops_two_of_ten_thousand_tokens_by_default():
    # Deviations of 1 and 2 with the same sign: a covariance of 2 everywhere, inside its default band.
    signs = torch.tensor([1.0, -1.0]).repeat(60).unsqueeze(1)
    logps = (2 * signs - 3).expand(120, 100)
    given = LossInputs(logps, logps, signs, torch.ones(120, 100))
    assert policy_loss("clip_cov", given, num_items=1).metrics["clip_cov/dropped_mean"].sum() == 2


def test_vespo_takes_the_sampling_ratio_into_its_weight():
    # Row ratios e^.2 * 2 and e^.2 * .5; phi = w^k e^(lambda (1 - w))
    w = torch.tensor(0.2).exp() * torch.tensor([2.0, 0.5])
    phi = w ** torch.tensor([2.0, 3.0]) * (torch.tensor([3.0, 2.0]) * (1 - w)).exp()
    given = inputs(importance_sampling_ratio=torch.tensor([[2.0], [0.5]]))
    assert_close("phi", policy_loss("vespo", given, num_items=1).metrics["vespo/phi_seq_mean"][:, 0], phi, rtol=1e-5)


def test_vespo_bounds_the_sampling_ratio_of_each_token():
    # The first row's 0 counts as 1e-8, which 1e8 makes up for: w = e^.2, k = 2, lambda = 3.
    given = inputs(importance_sampling_ratio=torch.tensor([[0.0, 1e8], [1.0, 1.0]]))
    phi = policy_loss("vespo", given, num_items=1).metrics["vespo/phi_seq_mean"]
    w = torch.tensor(0.2).exp()
    assert_close("phi", phi[0, 0], w**2 * (3 * (1 - w)).exp(), rtol=1e-5)


def test_metrics_carry_no_gradient():
    logps = torch.full((2, 2), -1.0, requires_grad=True)
    metrics = policy_loss("kl_to_old", inputs(logps=logps)).metrics
    assert metrics
    assert [name for name, values in metrics.items() if values.requires_grad] == []


def test_the_inputs_pass_a_gradient_to_the_log_probabilities_alone():
    leaves = {name: torch.full((2, 2), -1.0, requires_grad=True) for name in ("logps", "old_logps", "ref_logps")}
    leaves["advantages"] = torch.ones(2, 1, requires_grad=True)
    policy_loss("grpo", inputs(**leaves), beta=0.1).loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["logps"]


def test_the_inputs_overwrite_what_the_mask_hides():
    nan = float("nan")
    given = inputs(
        logps=torch.tensor([[-1.0, nan], [nan, nan]]),
        old_logps=torch.tensor([[-2.0, nan], [nan, nan]]),
        ref_logps=torch.tensor([[-3.0, nan], [nan, nan]]),
        advantages=torch.tensor([[2.0], [nan]]),
        mask=torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        importance_sampling_ratio=torch.tensor([[0.5, nan], [nan, nan]]),
    )
    assert given.log_ratio.tolist() == [[1, 0], [0, 0]]
    assert given.ref_logps is not None
    assert given.ref_logps.tolist() == [[-3, 0], [0, 0]]
    assert given.advantages.tolist() == [[2], [0]]
    assert given.importance_sampling_ratio is not None
    assert given.importance_sampling_ratio.tolist() == [[0.5, 1], [1, 1]]
    assert given.lengths.tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logps": torch.zeros(4)}, r"logps has shape \(4,\)"),
        ({"advantages": torch.zeros(2)}, r"advantages has shape \(2,\).*advantages.unsqueeze\(1\)"),
        ({"old_logps": torch.zeros(2, 1)}, r"old_logps has shape \(2, 1\)"),
        ({"mask": torch.zeros(2, 3)}, r"mask has shape \(2, 3\)"),
        ({"ref_logps": torch.zeros(1, 2)}, r"ref_logps has shape \(1, 2\)"),
        ({"importance_sampling_ratio": torch.zeros(1, 1)}, r"importance_sampling_ratio has shape \(1, 1\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(fields, message: str):
    with pytest.raises(ValueError, match=message):
        inputs(**fields)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("grpo", {"epsilon": -0.1}, "epsilon=-0.1"),
        ("grpo", {"importance_sampling_level": "sequense"}, "Did you mean 'sequence'"),
        ("dual_clip", {"c": 1.0}, "c=1.0"),
        ("cispo", {"epsilon_high": 0.0}, "epsilon_high=0.0"),
        ("sapo", {"sapo_temperature_neg": 0.0}, "sapo_temperature_neg=0.0"),
        ("gmpo", {"epsilon_high": -0.1}, "epsilon_high=-0.1"),
        ("kl_to_old", {"beta_old": -0.1}, "beta_old=-0.1"),
        ("kl_to_old", {"beta_old": float("nan")}, "beta_old=nan"),
        ("dual_clip", {"epsilon": float("nan")}, "epsilon=nan"),
        ("dual_clip", {"epsilon_high": float("nan")}, "epsilon_high=nan"),
        ("gmpo", {"epsilon": float("nan")}, "epsilon=nan"),
        ("kl_to_old", {"kl_estimator": "k5"}, "'k5'"),
        ("clip_cov", {"clip_cov_ratio": 0.0}, "clip_cov_ratio=0.0"),
        ("clip_cov", {"clip_cov_lb": 5.0}, "clip_cov_lb=5.0"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_named(name: str, keywords, message: str):
    with pytest.raises(ValueError, match=message):
        policy_loss(name, inputs(), keywords, num_items=3)


def test_an_unknown_loss_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown loss_type 'gmpoo'\. Did you mean 'gmpo'"):
        policy_loss("gmpoo", inputs())


def test_a_reduced_result_is_refused():
    with pytest.raises(ValueError, match=r"'mine' returned 'loss' of shape \(\).*\(2, 2\) or \(2, 1\) is needed"):
        policy_loss(returning(TokenLoss(torch.tensor(1.0))), inputs())


def test_a_bare_tensor_is_refused():
    with pytest.raises(ValueError, match=r"'mine' returned Tensor. Return TokenLoss\(loss\)"):
        policy_loss(returning(torch.zeros(2, 2)), inputs())


def test_a_metric_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"returned 'share' of shape \(2,\)"):
        policy_loss(returning(TokenLoss(torch.zeros(2, 2), {"share": torch.zeros(2)})), inputs())


def test_registration_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        register("mine", reduction="mean")(lambda inputs: TokenLoss(inputs.logps))  # type: ignore[arg-type]
    assert "mine" not in LOSSES


def test_a_function_of_the_user_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from grpo_plus.losses import TokenLoss\n"
        "def scaled(inputs, *, factor=2.0):\n    return TokenLoss(-factor * inputs.advantages * inputs.logps)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reinforce = policy_loss("reinforce", inputs(), loss_reduction="seq-mean-token-sum").loss
    scaled = policy_loss("my_losses.scaled", inputs(), {"factor": 3.0}, loss_reduction="seq-mean-token-sum").loss
    assert scaled == 3 * reinforce
    entry = LOSSES["my_losses.scaled"]
    assert (entry.reduction, entry.origin, entry.keywords) == ("token-mean", "grpo_plus", {"factor": 2.0})
    sys.modules.pop("my_losses")


def test_a_loss_of_the_users_is_not_tried():
    def mine(inputs: LossInputs, *, power: float) -> TokenLoss:
        return TokenLoss(inputs.importance_sampling_ratio**power * inputs.logps)  # None on a made-up batch

    check_loss_keywords(Loss("mine", mine), {"power": 2.0})
    with pytest.raises(ValueError, match="does not fit 'mine': missing a required .*'power'"):
        check_loss_keywords(Loss("mine", mine), {})
    with pytest.raises(ValueError, match="takes no keyword 'powr'. Did you mean 'power'"):
        check_loss_keywords(Loss("mine", mine), {"powr": 2.0})


def test_names_that_share_a_function_describe_themselves():
    assert LOSSES["dapo"].summary == "PPO's clip; mean over all tokens of the optimizer step."
    assert LOSSES["dapo"].paper == "https://huggingface.co/papers/2503.14476"
    assert LOSSES["dr_grpo"].paper == "https://huggingface.co/papers/2503.20783"
    assert len({LOSSES[name].summary for name in LOSSES}) == len(LOSSES)
    assert [name for name in LOSSES if not LOSSES[name].paper] == []

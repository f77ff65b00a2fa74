import math

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import estimate
from grpo_plus.compare.gradients import GradientSum, measure_start, signal_to_noise
from grpo_plus.trainer.probe import logps_of, sampled_batches
from tests.compare.small import small_task


def gradients_of(rows):
    gradients = GradientSum(rows.shape[1])
    for row in rows:
        gradients.add(row)
    return gradients


def test_the_ratio_of_a_worked_example():
    # mean (2, 1), |m|² 5; deviations (1, 0), (-1, 0), (0, 2), (0, -2): V = 10 / 3; (5 - 10/12) / (10/3) = 1.25
    rows = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 3.0], [2.0, -1.0]])
    assert signal_to_noise(gradients_of(rows)) == pytest.approx(1.25)
    assert signal_to_noise(gradients_of(10 * rows)) == pytest.approx(1.25)


def test_a_group_without_a_gradient_counts():
    # (2), (0): mean 1, V = 2, (1 - 1) / 2
    gradients = gradients_of(torch.tensor([[2.0]]))
    gradients.add(None)
    assert signal_to_noise(gradients) == 0.0
    nothing = GradientSum(1)
    nothing.add(None)
    assert math.isnan(signal_to_noise(nothing))


def test_the_correction_takes_off_what_noise_alone_gives():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 8, 50, generator=generator).double()
    draws[..., 0] += 1.0  # |mean|² 1, V 50
    found = [signal_to_noise(gradients_of(rows.float())) for rows in draws]
    biased = [(rows.mean(0).square().sum() / rows.var(0).sum()).item() for rows in draws]
    assert sum(found) / 400 == pytest.approx(1 / 50, rel=0.5)  # the cut at 0 adds a little
    assert sum(biased) / 400 > 5 / 50


def test_a_tools_tokens_do_not_count(tmp_path):
    task = small_task()
    made = task.trainer(task.start(), task.config(output_dir=str(tmp_path)))
    _, rows = next(sampled_batches(made, 1))
    tools = torch.ones_like(rows["completion_mask"])
    tools[:, 0] = 0
    mask = logps_of(made, rows | {"tool_mask": tools})[1]
    assert mask[:, 0].sum() == 0
    assert (mask[:, 1:] == rows["completion_mask"][:, 1:]).all()


def test_the_gradients_are_those_of_the_policy_gradient(tmp_path):
    """Two estimators on a tiny model, against one backward pass per group of plain log-probabilities."""
    task = small_task()
    config = {
        name: task.config(advantage_estimator=name, output_dir=str(tmp_path)) for name in ("dr_grpo", "rloo", "grpo")
    }

    def trainer():
        return task.trainer(task.start(), task.config(output_dir=str(tmp_path), packing="none"))

    found = measure_start(trainer(), config)
    again = trainer()
    expected = {name: [] for name in config}
    for rewards, rows in sampled_batches(again, 8):
        for name, gradients in expected.items():
            advantages = estimate(name, rewards)
            for group in range(len(advantages)):
                part = slice(4 * group, 4 * group + 4)
                ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)[part]
                mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)[part]
                again.model.zero_grad()
                logits = again.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
                logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
                kept = rows["completion_mask"][part]
                weighted = logps[:, -kept.shape[1] :] * kept * advantages[group].float()[:, None]
                (weighted.sum() / rows["completion_mask"].sum()).backward()
                gradients.append(torch.cat([w.grad.flatten() for w in again.model.parameters()]))
    assert found.groups == len(expected["rloo"]) == 16
    for name, gradients in expected.items():
        stacked = torch.stack(gradients).double()
        noise = stacked.var(0).sum()
        snr = ((stacked.mean(0).square().sum() - noise / 16) / noise).clamp(min=0).item()
        assert found.snr[name] == pytest.approx(snr, rel=1e-3, abs=1e-6)
    mean = {name: torch.stack(gradients).double().mean(0) for name, gradients in expected.items()}
    cosine = torch.nn.functional.cosine_similarity(mean["grpo"], mean["dr_grpo"], dim=0).item()
    assert found.cosine["grpo"]["dr_grpo"] == pytest.approx(cosine, abs=1e-5)
    assert found.cosine["rloo"]["dr_grpo"] == pytest.approx(1.0, abs=1e-5)  # they differ by a factor
    assert len(found.advantages["grpo"]) == 16 * 4


def test_no_more_rows_than_in_training_go_through_the_model_at_once(tmp_path):
    found, rows = [], []
    for at_once in (8, 3, 1):
        config = {"per_device_train_batch_size": at_once, "generation_batch_size": 24, "output_dir": str(tmp_path)}
        task = small_task()
        config = task.config(advantage_estimator="rloo", packing="none", **config)
        trainer = task.trainer(task.start(), config)
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda module, given, output: rows.append(len(output)) if output.requires_grad else None
        )
        found.append(measure_start(trainer, {"rloo": config}))
        assert 0 < max(rows) <= at_once
        rows.clear()
    assert found[1].snr["rloo"] == pytest.approx(found[0].snr["rloo"], rel=1e-4)
    assert found[2].snr["rloo"] == pytest.approx(found[0].snr["rloo"], rel=1e-4)


def test_what_an_estimator_refuses_is_its_own_affair(tmp_path):
    task = small_task()
    configs = {
        name: task.config(advantage_estimator=name, output_dir=str(tmp_path)) for name in ("rloo", "maxrl", "passk")
    }
    assert isinstance(configs["rloo"], GRPOPlusConfig)
    found = measure_start(task.trainer(task.start(), configs["rloo"]), configs)
    assert set(found.refused) == {"passk"}
    assert "brevity" in found.refused["passk"]
    assert set(found.snr) == {"rloo", "maxrl"}


def unfinished(rewards):
    raise NotImplementedError("later")


def test_an_estimator_that_raises_whatever_error_is_its_own_affair(tmp_path):
    task = small_task()
    names = ("rloo", f"{__name__}.unfinished")
    configs = {name: task.config(advantage_estimator=name, output_dir=str(tmp_path)) for name in names}
    found = measure_start(task.trainer(task.start(), configs["rloo"]), configs)
    assert found.refused == {names[1]: "NotImplementedError: later"}
    assert set(found.snr) == {"rloo"}


def test_gradients_that_are_too_large_to_keep_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_plus.compare.gradients.NUMBERS", 1000)
    task = small_task()
    config = task.config(advantage_estimator="rloo", output_dir=str(tmp_path))
    found = measure_start(task.trainer(task.start(), config), {"rloo": config})
    assert "over the limit of 1.0e+03" in found.skipped
    assert found.snr == {}
    assert len(found.advantages["rloo"]) == 64


def nothing(rewards):
    return torch.zeros_like(rewards.total())


def test_an_estimator_without_a_gradient_has_no_cosine(tmp_path):
    task = small_task()
    names = ("rloo", f"{__name__}.nothing")
    configs = {name: task.config(advantage_estimator=name, output_dir=str(tmp_path)) for name in names}
    found = measure_start(task.trainer(task.start(), configs["rloo"]), configs)
    assert found.cosine["rloo"] == {"rloo": pytest.approx(1.0), names[1]: None}
    assert found.snr[names[1]] is None


class WithImages(GRPOPlusTrainer):
    """Rows as TRL makes them of prompts with images: placeholders in the ids, and the images beside them."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return output | {"pixel_values": torch.zeros(len(inputs), 3), "num_images": [1] * len(inputs)}


def test_prompts_with_images_are_skipped_with_the_reason(tmp_path):
    """Without the images, the forward of their placeholders would give other log-probabilities."""
    task = small_task()
    config = task.config(advantage_estimator="rloo", output_dir=str(tmp_path))
    made = task.trainer(task.start(), config)
    made.__class__ = WithImages
    found = measure_start(made, {"rloo": config})
    assert found.skipped.startswith("images: ")
    assert (found.snr, found.cosine) == ({}, {})
    assert len(found.advantages["rloo"]) == 64

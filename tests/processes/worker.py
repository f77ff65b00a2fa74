"""One rank of a training under `accelerate launch`: writes the rows it trained on and what it logged."""

import argparse
import json
from pathlib import Path

import torch
from accelerate import PartialState

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.refilling import MIXED, Judge
from tests.training import brevity, make_trainer, stepwise, vowels, weights_of


class Recorder(GRPOPlusTrainer):
    """Keeps every row that reaches the loss: prompt, completion and advantage, or one advantage per token."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.rows = []
        self.drifts = []
        self.tokens = []

    def compute_loss(self, model, inputs, *arguments, **keywords):
        decode = self.processing_class.batch_decode
        prompts = decode(inputs["prompt_ids"], skip_special_tokens=True)
        completions = inputs["completion_ids"].tolist()
        self.rows.extend(zip(prompts, completions, inputs["advantages"].tolist(), strict=True))
        self.tokens.append((inputs["completion_mask"].sum().item(), inputs["num_items_in_batch"].item()))
        if "old_per_token_logps" in inputs:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                logps = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]
            self.drifts.append((logps - inputs["old_per_token_logps"]).abs().max().item())
        return super().compute_loss(model, inputs, *arguments, **keywords)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("config", type=json.loads)
    args = parser.parse_args()
    resume_from = args.config.pop("resume_from", None)
    judge = Judge()
    stepped = args.config.get("advantage_estimator") == "process"
    task = {"reward_funcs": [stepwise] if stepped else [vowels, brevity]}
    if args.config.pop("half_dead", False):
        task = {"reward_funcs": [judge], "train_dataset": MIXED}
    trainer = make_trainer(
        args.output_dir,
        trainer_class=Recorder,
        config_class=GRPOPlusConfig,
        log_completions=True,
        **task,
        **args.config,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    rank = PartialState().process_index
    (args.output_dir / f"rows_{rank}.json").write_text(json.dumps(trainer.rows))
    (args.output_dir / f"calls_{rank}.json").write_text(json.dumps(judge.calls))
    (args.output_dir / f"drifts_{rank}.json").write_text(json.dumps(trainer.drifts))
    (args.output_dir / f"tokens_{rank}.json").write_text(json.dumps(trainer.tokens))
    (args.output_dir / f"log_{rank}.json").write_text(json.dumps(trainer.state.log_history))
    (args.output_dir / f"state_{rank}.json").write_text(json.dumps(trainer.estimator_state))
    (args.output_dir / f"weights_{rank}.json").write_text(
        json.dumps({k: v.tolist() for k, v in weights_of(trainer).items()})
    )


if __name__ == "__main__":
    main()

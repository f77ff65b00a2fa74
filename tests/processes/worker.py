"""One rank of a training under `accelerate launch`: writes the rows it trained on and what it logged."""

import argparse
import json
from pathlib import Path

from accelerate import PartialState

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.training import brevity, make_trainer, stepwise, vowels, weights_of


class Recorder(GRPOPlusTrainer):
    """Keeps every row that reaches the loss: prompt, completion and advantage, or one advantage per token."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.rows = []

    def compute_loss(self, model, inputs, *arguments, **keywords):
        decode = self.processing_class.batch_decode
        prompts = decode(inputs["prompt_ids"], skip_special_tokens=True)
        completions = inputs["completion_ids"].tolist()
        self.rows.extend(zip(prompts, completions, inputs["advantages"].tolist(), strict=True))
        return super().compute_loss(model, inputs, *arguments, **keywords)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("config", type=json.loads)
    args = parser.parse_args()
    resume_from = args.config.pop("resume_from", None)
    trainer = make_trainer(
        args.output_dir,
        trainer_class=Recorder,
        config_class=GRPOPlusConfig,
        reward_funcs=[stepwise] if args.config.get("advantage_estimator") == "process" else [vowels, brevity],
        log_completions=True,
        **args.config,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    rank = PartialState().process_index
    (args.output_dir / f"rows_{rank}.json").write_text(json.dumps(trainer.rows))
    (args.output_dir / f"state_{rank}.json").write_text(json.dumps(trainer.estimator_state))
    (args.output_dir / f"weights_{rank}.json").write_text(
        json.dumps({k: v.tolist() for k, v in weights_of(trainer).items()})
    )


if __name__ == "__main__":
    main()

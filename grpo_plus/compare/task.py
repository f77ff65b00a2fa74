"""What a comparison needs to know of the thing that is trained: four functions, and a fifth for the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from grpo_plus.compare.samples import Sample
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.trainer import GRPOPlusTrainer

Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Task:
    """What every arm of a comparison trains on.

        task = Task(
            name="mine",
            config=functools.partial(GRPOPlusConfig, max_steps=200, num_generations=8),
            start=lambda: AutoModelForCausalLM.from_pretrained("my/model"),
            trainer=lambda model, config: GRPOPlusTrainer(
                model=model, args=config, reward_funcs=my_rewards, train_dataset=my_rows
            ),
            evaluate=lambda trainer: {"accuracy": right_or_wrong(trainer.model, held_out_rows)},
        )

    Attributes:
        name: a title for the report.
        config: (**fields) -> configuration. It is called once per arm, with the fields in which the arm differs from
            the rest, and `output_dir`. Cheap: all are made before anything is trained.
        start: () -> the model that every arm starts from, with its adapters if it has any. It is called once; between
            arms what is trainable is put back in place.
        trainer: (model, configuration) -> a trainer that has not trained.
        evaluate: a trainer that has -> scores of the held-out items by name, one number per item, in the same order
            each time. The verdict is about the first name. The global random state is that of the arm's seed.
        samples: a trainer that has been evaluated -> a few held-out prompts, each with a completion, for the report to
            show side by side. The same prompts in the same order each time. None: the report shows none.
        facts: whatever else decides the result (sizes of data sets, how the model was warmed up), as JSON: it is part
            of the report, and of what a comparison that goes on must agree with.
    """

    name: str
    config: Callable[..., GRPOPlusConfig]
    start: Callable[[], PreTrainedModel]
    trainer: Callable[[PreTrainedModel, GRPOPlusConfig], GRPOPlusTrainer]
    evaluate: Callable[[GRPOPlusTrainer], Scores]
    samples: Callable[[GRPOPlusTrainer], Sequence[Sample]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

"""The start in the report of a comparison: what each estimator makes of the same completions, before any training."""

from collections.abc import Mapping

import numpy as np

from grpo_plus.compare.comparison import Comparison
from grpo_plus.report.figures import bars, heatmap, histograms
from grpo_plus.report.page import Block, Figure, Table, Text


def advantages(comparison: Comparison) -> list[Block]:
    """The advantages of the same completions under each estimator: drawn, and their sizes."""
    signal = comparison.signal
    samples = {label: np.array(values) for label, values in signal.advantages.items()}
    blocks: list[Block] = []
    if signal.groups and samples:
        count = len(next(iter(samples.values())))
        caption = f"The same {count:,} completions of the start under each estimator; what is beyond ±4 is at the edge."
        blocks.append(Figure(caption, histograms(samples)))
        blocks.append(
            Table(
                "Sizes at the start",
                ("variant", "mean |A|", "root mean square", "A = 0"),
                [
                    (label, np.abs(a).mean().item(), np.sqrt((a**2).mean()).item(), (a == 0).mean().item())
                    for label, a in samples.items()
                ],
                folded=True,
            )
        )
    if signal.refused:
        caption = "Estimators that cannot be applied to these rewards"
        blocks.append(Table(caption, ("variant", "reason"), list(signal.refused.items())))
    return blocks


def signal_and_noise(comparison: Comparison) -> list[Block]:
    """How much of the first gradient is signal under each estimator, and which estimators point the same way."""
    signal = comparison.signal
    if signal.skipped:
        return [Text(f"Not measured: {signal.skipped}.")]
    snr = {label: float("nan") if value is None else value for label, value in signal.snr.items()}
    text = Text(
        f"The gradient of {signal.groups} groups, sampled once from the start, under each estimator: the squared norm "
        "of what the groups have in common, by the variance between groups (`signal_to_noise` has the formula). Its "
        "inverse is the number of groups in a batch whose gradient is half signal. It does not depend on the size of "
        "the advantages, and it is about the first step only. The loss is a token mean without a KL term for all: "
        "variants that differ in loss or other fields alone are alike here."
    )
    if not snr:
        return [text]
    needed = [
        (label, value, 1 / value if value > 0 else None, cosine)
        for (label, value), cosine in zip(snr.items(), _cosines_to_first(signal.cosine), strict=True)
    ]
    first = next(iter(snr))
    blocks: list[Block] = [
        text,
        Figure("Signal to noise of one group's gradient.", bars(snr, label="signal to noise")),
    ]
    if len(snr) > 1:
        names = list(snr)
        matrix = np.array(
            [[np.nan if (c := signal.cosine[a][b]) is None else min(c, 1.0) for b in names] for a in names]
        )
        low = np.floor(np.nanmin(matrix, initial=0.9) * 10) / 10
        caption = "Cosine between the mean gradients. Bright: the same direction, whatever the length."
        blocks.append(Figure(caption, heatmap(names, matrix, label="cosine", low=low, high=1.0)))
    header = ("variant", "signal to noise", "groups for half signal", f"cosine to {first}")
    return [*blocks, Table("The first gradient", header, needed)]


def _cosines_to_first(cosine: Mapping[str, Mapping[str, float | None]]) -> list[float | None]:
    first = next(iter(cosine))
    return [cosine[first][label] for label in cosine]

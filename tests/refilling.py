"""A task in which half of the prompts are dead, and what dynamic sampling should make of its batches."""

from datasets import Dataset

# Every other prompt is dead, whatever is answered. The live ones are longer, so that joining has to fill up.
MIXED = Dataset.from_list(
    [{"prompt": f"{n}+{n}=" if n % 2 else f"{n}+{n}+{n}={n}+", "task": str(n % 2), "other": n} for n in range(24)]
)


class Judge:
    """A reward that remembers what it was called with: the prompts and completions of every batch generated."""

    __name__ = "judge"

    def __init__(self, dead: float = 0.7):
        self.dead, self.calls, self.columns = dead, [], []

    def __call__(self, prompts, completions, **columns):
        self.calls.append(list(zip(prompts, completions, strict=True)))
        self.columns.append(set(columns))
        return [self.dead if is_dead(p) else float(sum(map(ord, c)) % 97) for p, c in self.calls[-1]]


def is_dead(prompt: str) -> bool:
    return prompt.count("+") == 1


def groups_of(rows: list, size: int = 4) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def expected_batches(judge: Judge, refills: list[int]) -> list[list]:
    """What DAPO's rule makes of the batches generated, as rows: dead slots in order take live groups in order."""
    calls, batches = iter(judge.calls), []
    for count in refills:
        groups = groups_of(next(calls))
        for _ in range(count):
            new = [group for group in groups_of(next(calls)) if not is_dead(group[0][0])]
            slots = [slot for slot, group in enumerate(groups) if is_dead(group[0][0])]
            for slot, group in zip(slots, new, strict=False):
                groups[slot] = group
        batches.append([row for group in groups for row in group])
    assert next(calls, None) is None
    return batches

"""The columns of a table of completions that are no rewards. Each other column of numbers is a reward function's."""

LENGTH = "completion_length"  # in tokens, where a reward function logs it
# What a reward function may fill through `log_extra`, with lists, one per completion.
STEP_COLUMNS = ("step_rewards", "step_ends")
STATES = "step_states"  # texts, of the states that steps start from
NOT_REWARDS = {"step", "prompt", "completion", "advantage", "group", "task", LENGTH, *STEP_COLUMNS, STATES}

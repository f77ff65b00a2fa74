"""What completions earn: calls of the reward functions, their weights, and the rewards of evaluations."""

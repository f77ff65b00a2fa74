"""What a generation batch holds: which prompts, which groups again, and which completions of the dataset."""

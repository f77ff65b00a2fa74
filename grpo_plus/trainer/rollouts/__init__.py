"""From prompts to completions: who generates them, and what is recorded of them."""

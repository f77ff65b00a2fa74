"""What a run does when something goes wrong: steps that are not finite, signals, and bits that must repeat."""

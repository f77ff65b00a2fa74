"""What a run tells you: numbers computed from rewards and advantages, and callbacks that read the log."""

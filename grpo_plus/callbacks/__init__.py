"""Callbacks for any GRPO trainer. They read logs, arguments and files, and touch nothing inside a trainer."""

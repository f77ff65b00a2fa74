"""What a run writes, so that it goes on as if it had never stopped."""

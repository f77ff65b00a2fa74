"""Facts of a model in memory: its adapters and its dropout. Import from the modules."""

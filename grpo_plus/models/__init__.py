"""Facts of a model in memory: its adapters, its dropout, and what its attention layers say. Import from the modules."""

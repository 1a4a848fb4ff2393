"""Models, data, the wiring of HF's Trainer, checkpoints, budgets and measurement: what the command line stands on."""

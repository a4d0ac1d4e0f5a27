"""hydra/launcher=fused."""

"""Losses as pure functions of tensors. They know no model, batch, rank or config."""

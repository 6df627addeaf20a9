"""Making samples: generation with a key/value cache."""

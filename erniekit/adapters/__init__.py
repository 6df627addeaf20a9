"""Low-rank adapters on a frozen model, put into its slots from outside."""

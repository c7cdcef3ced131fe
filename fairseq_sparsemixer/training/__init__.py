"""Training: starting runs, and what their logs say."""

"""Averaging, translation and scoring: what a trained run is worth."""

"""Predictors without gradient training: the floor of every score table, and the background of a field model (models/background.py)."""

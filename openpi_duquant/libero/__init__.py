"""Evaluation in LIBERO: the same observations, replanning and step limits as openpi's client."""

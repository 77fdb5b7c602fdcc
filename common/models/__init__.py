"""Backbones, heads, and the cut between what is frozen and what is trained."""

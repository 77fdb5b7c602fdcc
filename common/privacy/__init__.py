"""Clipping, noise, mechanism events and accounting."""

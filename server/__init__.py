"""Runs at the coordinator and never sees a record."""

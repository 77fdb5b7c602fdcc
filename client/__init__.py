"""Runs at the data holder and trusts nothing that arrives."""

"""Sample data that ships with the recipes."""

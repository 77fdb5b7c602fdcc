"""Many data holders on one machine."""

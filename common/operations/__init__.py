"""What whoever runs a side of a deployment looks at: logs and metrics."""

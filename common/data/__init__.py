"""Records: loading, partitioning, digests."""

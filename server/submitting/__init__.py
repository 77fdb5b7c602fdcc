"""Starting a run on a SuperLink, and carrying it out as its ServerApp."""

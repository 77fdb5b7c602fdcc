"""A data holder in a federation: a supervisor, the node that talks to the server, and the warm process that trains."""

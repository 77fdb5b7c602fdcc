"""What the server and the data holders must agree on; imports neither side."""

"""Programs that measure a peer; each is run by the Python of the peer's own environment, and never
imported."""

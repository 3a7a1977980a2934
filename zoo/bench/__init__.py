"""Measurements that the command line prints: speed against peers, on the machine at hand."""

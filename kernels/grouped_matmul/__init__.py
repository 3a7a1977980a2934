"""Matrix products of expert-sorted rows with one matrix per expert."""

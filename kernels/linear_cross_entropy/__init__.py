"""Output projection and cross entropy in one pass, without the full logits."""

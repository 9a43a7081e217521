"""Post-training pruning of causal language models."""

"""Images without labels, learned by momentum contrast."""

"""Images with boxes, and with masks if need be."""

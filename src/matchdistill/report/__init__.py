"""The page of a run or a comparison: what it was, what came of it, and what was matched."""

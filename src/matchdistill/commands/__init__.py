"""The commands, one file each. What they need is imported by them: the list of commands need not wait for PyTorch."""
